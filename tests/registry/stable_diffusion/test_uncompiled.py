"""Loading a model and taking a step load no compiler, and compiling works afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from registry.stable_diffusion.uncompiled import without_compiler

CODE = """
import json, sys, torch
from registry.spec import SampleSettings
from registry.tiny import load
loaded = lambda: [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules]
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
result = [drawn, stepped, loaded(), name, float(numbers[0]), float(twice[0])]
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
    drawn, stepped, after, name, number, twice = json.loads(done.stdout.splitlines()[-1])
    assert drawn == stepped == [] and name == "adamw8bit"
    assert abs(number + 0.5) < 1e-3 and twice == 2 * number  # a first step of Adam is the rate
    assert "torch._dynamo" in after  # the control: who compiles gets the real one


def test_what_is_loaded_already_stays() -> None:
    import torch._dynamo

    before = torch.compile, torch._disable_dynamo, sys.modules["torch._dynamo"]
    with without_compiler():
        assert (torch.compile, torch._disable_dynamo, sys.modules["torch._dynamo"]) == before


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
