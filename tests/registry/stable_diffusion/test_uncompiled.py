"""Loading a model and taking a step load no compiler, and compiling works afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from registry.stable_diffusion.uncompiled import without_compiler

CODE = """
import json, sys, torch
from registry.spec import SampleSettings
from registry.tiny import load
heavy = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy")
loaded = lambda: [name for name in heavy if name in sys.modules]
base = load("cpu", "float32")
base.sample(["a portrait"], SampleSettings(steps=1, scheduler="ddim"), [1], lambda *_: None)
drawn = loaded()
from hdbcli.model.device import make_optimizer
numbers = torch.nn.Parameter(torch.zeros(8192))
optimizer, name = make_optimizer(sys.argv[1], [numbers], 0.5)
numbers.grad = torch.ones_like(numbers)
optimizer.zero_grad(set_to_none=False)
numbers.grad += 1
optimizer.step()
stepped = loaded()
twice = torch.compile(lambda x: 2 * x, backend="eager")(numbers)
from transformers.utils import is_torch_distributed_available as told
import functools
kept = functools.lru_cache(lambda: 0).cache_parameters()["maxsize"]
asked = [told(), torch.distributed.is_available(), kept]
result = [drawn, stepped, loaded(), name, float(numbers[0]), float(twice[0]), *asked]
print(json.dumps(result))
"""
# What is asked needs nothing of torch, which takes seconds to import.
STUB = "import sys, types; sys.modules['torch'] = types.ModuleType('torch'); "


def test_neither_drawing_nor_a_step_loads_the_compiler() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, "adamw8bit"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    drawn, stepped, after, name, number, twice, told, there, kept = result
    assert drawn == stepped == [] and name == "adamw8bit"
    assert abs(number + 0.5) < 1e-3 and twice == 2 * number  # a first step of Adam is the rate
    assert {"torch._dynamo", "sympy"} < set(after)  # the control: who compiles gets the real one
    assert not told and there and kept == 128  # what transformers was told, nobody else is


def test_what_is_loaded_already_stays() -> None:
    import torch._dynamo

    before = torch.compile, torch._disable_dynamo, sys.modules["torch._dynamo"]
    with without_compiler():
        assert (torch.compile, torch._disable_dynamo, sys.modules["torch._dynamo"]) == before


def test_only_tensors_without_numbers_are_not_filled() -> None:
    """Inside the block, as by torch itself: what a library makes there is random."""
    fill = torch.nn.init.normal_
    with without_compiler():
        real = torch.nn.Embedding(50, 20)
        with torch.device("meta"):
            empty = torch.nn.Embedding(50, 20)
    assert empty.weight.is_meta and 0.8 < float(real.weight.detach().std()) < 1.2
    assert torch.nn.init.normal_ is fill


def test_python_without_docstrings_is_named_as_the_reason() -> None:
    """diffusers puts docstrings together when it is imported: `-OO` leaves none."""
    script = "from registry.stable_diffusion.uncompiled import _check_docstrings as c; c()"
    runs = {
        flag: subprocess.run(
            [sys.executable, flag, "-c", STUB + script], capture_output=True, text=True, check=False
        )
        for flag in ("-OO", "-O")
    }
    assert runs["-O"].returncode == 0, runs["-O"].stderr
    assert "-OO" in runs["-OO"].stderr.splitlines()[-1]
    assert "HdbError" in runs["-OO"].stderr or "HdbError" in runs["-OO"].stderr
