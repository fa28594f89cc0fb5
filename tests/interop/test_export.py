"""An exported identity is dW to its last bit in fp32, and diffusers draws the same with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ok, refused
from diffusers import StableDiffusionPipeline
from identities import describe
from safetensors import safe_open
from safetensors.torch import load_file

from hdbcli.identity.file import save
from hdbcli.interop.export import export_tensors
from hdbcli.method.lidb import Theta
from hdbcli.model.base import Base
from registry import store
from registry.checkpoints.ldm import architecture_of
from registry.tiny import WEIGHTS


@pytest.fixture
def theta(tiny: Base) -> Theta:
    first = tiny.first_theta(2)
    generator = torch.Generator().manual_seed(0)
    return Theta(first.down, 0.2 * torch.randn(first.up.shape, generator=generator))


@pytest.fixture
def alice(tiny: Base, theta: Theta, hdb_home: Path) -> Path:
    path = store.path_of("alice")
    save(describe(tiny, theta, ""), path, "fp32")
    return path


def test_both_forms_hold_dw(tiny: Base, theta: Theta) -> None:
    kohya = export_tensors(tiny, theta, "kohya", "fp32")
    peft = export_tensors(tiny, theta, "diffusers", "fp32")
    assert len(kohya) == 3 * len(tiny.injected.layers) and len(peft) == 2 * len(kohya) // 3
    with tiny.injected.adapted(theta):
        for name, layer in tiny.injected.layers.items():
            component, _, path = name.partition(".")
            short = {"unet": "unet", "text_encoder": "te"}[component]
            stem = f"lora_{short}_{path.replace('.', '_')}"
            assert kohya[f"{stem}.alpha"].item() == theta.rank
            up, down = kohya[f"{stem}.lora_up.weight"], kohya[f"{stem}.lora_down.weight"]
            product = up.flatten(1) @ down.flatten(1)  # of a convolution's kernels too
            torch.testing.assert_close(product, layer.delta(), rtol=1e-6, atol=1e-7)
            assert torch.equal(peft[f"{name}.lora_B.weight"], up)
            assert torch.equal(peft[f"{name}.lora_A.weight"], down)


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_diffusers_draws_the_same_with_it(
    form: str, tiny: Base, theta: Theta, alice: Path, tmp_path: Path
) -> None:
    out = tmp_path / "alice.safetensors"
    said = ok("export", "alice", "--format", form, "-o", out, "--dtype", "fp32").stdout
    assert str(out) in said and f"rank {theta.rank}, {form}; use 'sks' where you" in said
    with safe_open(out, "pt") as file:
        words = file.metadata()
    assert words["ss_network_dim"] == words["ss_network_alpha"] == "2"
    assert words["ss_v2"] == "False" and words["modelspec.architecture"] == "tiny/lora"
    assert words["ss_output_name"] == "alice" and str(tmp_path) not in str(words)

    def draw(load: Callable[[StableDiffusionPipeline], object]) -> np.ndarray:
        pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS, safety_checker=None)
        pipeline.set_progress_bar_config(disable=True)
        load(pipeline)
        generator = torch.Generator().manual_seed(0)
        prompt = tiny.prompt("a [V] face")
        options = {"num_inference_steps": 5, "output_type": "np", "generator": generator}
        return pipeline(prompt, height=64, width=64, **options).images[0]

    def fused(pipeline: StableDiffusionPipeline) -> None:
        with tiny.injected.adapted(theta), torch.no_grad():
            for name, layer in tiny.injected.layers.items():
                component, _, path = name.partition(".")
                module = getattr(pipeline, component)
                paths = {path, path.removeprefix("text_model.")}
                target = next(m for p, m in module.named_modules() if p in paths)
                target.weight.add_(layer.delta().view_as(target.weight))

    expected = draw(fused)
    got = draw(lambda pipeline: pipeline.load_lora_weights(str(tmp_path), weight_name=out.name))
    base = draw(lambda pipeline: None)
    assert np.abs(got - expected).max() < 1e-3 < 0.05 < np.abs(base - expected).max()


def test_what_cannot_be_exported_is_told(alice: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    ok("export", "alice", "-o", out)
    assert {t.dtype for t in load_file(out).values()} == {torch.float16}
    for words, says in (
        (("alice", "-o", out), "exists already"),
        (("alice", "-o", tmp_path / "y", "--format", "onnx"), "unknown format 'onnx'"),
        (("alice", "-o", tmp_path / "y", "--dtype", "int8"), "unknown dtype 'int8'"),
        (("alise", "-o", tmp_path / "y"), "alice"),
    ):
        refused("export", *words, says=says)
    assert not (tmp_path / "y").exists()


def test_architectures_are_named_by_what_they_predict() -> None:
    named = {kind: architecture_of("sd2", kind) for kind in ("epsilon", "v_prediction", None)}
    assert named["epsilon"] == "stable-diffusion-v2-512"
    assert named["v_prediction"] == named[None] == "stable-diffusion-v2-768-v"
    assert architecture_of("sd1", "epsilon") == "stable-diffusion-v1"
    assert architecture_of("tiny", None) == "tiny"
