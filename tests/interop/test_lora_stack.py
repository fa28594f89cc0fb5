"""LoRA files stack with identities: what is added is what diffusers adds, and what is not a plain
LoRA of the base is refused."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import hdb, ok
from diffusers import StableDiffusionPipeline
from identities import TINY, describe
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hdbcli.identity.file import save
from hdbcli.interop import lora_stack
from hdbcli.method.lidb import Theta
from hdbcli.model.base import Base, load_base
from registry import store
from registry.checkpoints.ldm import original_layer
from registry.errors import HdbError
from registry.plugins import load_registry
from registry.spec import SampleSettings
from registry.stable_diffusion.backbone import _scheduler
from registry.stable_diffusion.families import CONFIGS
from registry.tiny import SAMPLING, WEIGHTS

SDXL = CONFIGS / "sdxl" / "unet"
PROMPT = ("a [V] face", "-n", 1, "--seed", 3, "--steps", 2)


def draw(out: Path, *words: object) -> np.ndarray:
    ok("gen", *words, "-o", out)
    return np.asarray(Image.open(out)).astype(float)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * math.log10(255**2 / max(1e-9, float(((a - b) ** 2).mean())))


@pytest.fixture
def people(tiny: Base, hdb_home: Path) -> None:
    """Put alice and bob, random people of rank 2, into the store."""
    for seed, name in enumerate(("alice", "bob")):
        first = tiny.first_theta(2)
        generator = torch.Generator().manual_seed(seed)
        down = first.down + 0.1 * torch.randn(first.down.shape, generator=generator)
        theta = Theta(down, 0.4 * torch.randn(first.up.shape, generator=generator))
        save(describe(tiny, theta, ""), store.path_of(name), "fp32")


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_a_stacked_identity_is_the_sum(people: None, tmp_path: Path, form: str) -> None:
    file = tmp_path / "style.safetensors"
    ok("export", "alice", "--format", form, "--dtype", "fp32", "-o", file)
    ok("compose", "alice=1", "bob=1", "--as", "both", "--dtype", "fp32")
    both = draw(tmp_path / "both.png", "both", *PROMPT)
    bob = draw(tmp_path / "bob.png", "bob", *PROMPT)
    stacked = draw(tmp_path / "stacked.png", "bob", *PROMPT, "--lora", file)
    assert psnr(stacked, both) > 40 > 30 > psnr(stacked, bob)
    none = draw(tmp_path / "none.png", "bob", *PROMPT, "--lora", f"{file}=0")
    assert (none == bob).all()
    twice = ["--lora", f"{file}=0.25", "--lora", f"{file}=0.75"]
    assert psnr(draw(tmp_path / "twice.png", "bob", *PROMPT, *twice), stacked) > 40


def test_few_steps_and_what_is_recorded(people: None, tmp_path: Path) -> None:
    file, out = tmp_path / "few.safetensors", tmp_path / "out.png"
    ok("export", "alice", "-o", file)
    odd = load_file(file) | {"bundle_emb.x.string_to_param.*": torch.zeros(1)}
    save_file(odd, file)
    words = ("--scheduler", "lcm", "--guidance", 1, "--json", "-o", out)
    result = ok("gen", "bob", *PROMPT, *words, "--lora", f"{file}=0.8")
    (said,) = json.loads(result.stdout)["loras"]
    assert said["strength"] == 0.8 and said["layers"] == TINY[0] and said["unread"] == 1
    assert (
        f"1 of {3 * TINY[0] + 1} keys name no layer" in result.stderr
        and "bundle_emb" in result.stderr
    )
    text = Image.open(out).text["parameters"]
    assert f'Lora hashes: "few: {said["hash"]}", Loras: few 0.8' in text
    assert "Sampler: lcm" in text and len(said["hash"]) == 12
    draw(out, "bob", *PROMPT)
    assert "Lora" not in Image.open(out).text["parameters"]


def test_a_few_step_file_chooses_how_to_sample(
    people: None, tmp_path: Path, usual_sampling_steps: None
) -> None:
    """By its own name, its folder's or its title; what was asked for comes first."""
    tensors = {"lora_unet_x.lora_up.weight": torch.zeros(1)}
    hub = tmp_path / "models--latent-consistency--lcm-lora-sdv1-5" / "snapshots" / "c0ffee"
    (tmp_path / "lightning").mkdir()
    hub.mkdir(parents=True)
    files: dict[Path, tuple[dict[str, str], SampleSettings]] = {
        tmp_path / "sdxl_lightning_2step_lora.safetensors": (
            {},
            SampleSettings(2, 1.0, scheduler="euler", trailing=True),
        ),
        hub / "pytorch_lora_weights.safetensors": (
            {},
            SampleSettings(4, 1.0, scheduler="lcm", trailing=True),
        ),
        tmp_path / "renamed.safetensors": (
            {"modelspec.title": "Hyper-SD15 8-steps CFG"},
            SampleSettings(8, 1.0, scheduler="ddim", trailing=True),
        ),
        tmp_path / "lightning" / "style.safetensors": ({}, SAMPLING),
    }
    spec = load_registry().get("tiny")
    for path, (metadata, wanted) in files.items():
        save_file(tensors, path, metadata)
        found, said = lora_stack.sampling(spec, [lora_stack.read(str(path))])
        assert found == wanted and bool(said) == wanted.trailing
        assert lora_stack.sampling(spec, [lora_stack.read(f"{path}=0")])[0] == spec.sampling
    few, _, other, _ = files
    both = [lora_stack.read(str(each)) for each in (few, other)]
    assert lora_stack.sampling(spec, both)[0].steps == 8  # the last one

    ok("export", "alice", "-o", few, "--force")
    plain = ok("gen", "bob", "a [V] face", "-n", 1, "--lora", few, "-o", tmp_path / "a.png")
    assert "2 steps, guidance 1, euler, trailing" in plain.stderr
    text = Image.open(tmp_path / "a.png").text["parameters"]
    assert "Steps: 2, Sampler: euler, CFG scale: 1.0" in text and "Spacing: trailing" in text
    asked = ("--steps", 3, "--guidance", 2, "--scheduler", "ddim", "-o", tmp_path / "b.png")
    ok("gen", "bob", "a [V] face", "-n", 1, "--lora", few, *asked)
    text = Image.open(tmp_path / "b.png").text["parameters"]
    assert "Steps: 3, Sampler: ddim, CFG scale: 2.0" in text


def test_lcm_takes_more_steps_than_it_was_distilled_on(tiny: Base) -> None:
    config = tiny.backbone.pipeline.scheduler.config
    for steps in (4, 60):
        schedule = _scheduler(SampleSettings(steps, scheduler="lcm"), config)
        schedule.set_timesteps(steps)
        assert len(schedule.timesteps) == steps


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 8


def kohya_file(path: Path) -> Path:
    """Write a file that changes linear and convolutional layers, with an alpha that is not r."""
    pipeline = pipeline_of_tiny()
    tensors = {}
    for short, module in (("unet", pipeline.unet), ("te", pipeline.text_encoder)):
        layers = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        for seed, (name, layer) in enumerate(layers):
            whole = name if short == "unet" or "text_model" in name else f"text_model.{name}"
            stem = f"lora_{short}_{whole.replace('.', '_')}"
            n, m, *kernel = layer.weight.shape
            tensors[f"{stem}.lora_down.weight"] = random((4, m, *kernel), seed)
            tensors[f"{stem}.lora_up.weight"] = random((n, 4, *([1] * len(kernel))), seed + 1)
            tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)
    return path


def diffusers_file(path: Path) -> Path:
    """Let diffusers and PEFT write a file whose alpha, 12 at rank 4, is beside the tensors."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = pipeline_of_tiny().unet
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["to_q", "to_out.0", "conv1"])
    unet.add_adapter(config)
    tensors = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(
        path.parent,
        unet_lora_layers={k: random(tuple(v.shape), 0) for k, v in tensors.items()},
        unet_lora_adapter_metadata=config.to_dict(),
        weight_name=path.name,
    )
    return path


def pipeline_of_tiny() -> Any:
    return StableDiffusionPipeline.from_pretrained(WEIGHTS, safety_checker=None)


@pytest.mark.parametrize("write", [kohya_file, diffusers_file], ids=["kohya", "diffusers"])
def test_diffusers_adds_the_same(write: Callable[[Path], Path], tmp_path: Path) -> None:
    file = write(tmp_path / "style.safetensors")
    pipeline = pipeline_of_tiny()
    before = {k: v.clone() for k, v in pipeline.unet.state_dict().items()}
    pipeline.load_lora_weights(str(tmp_path), weight_name=file.name)
    pipeline.fuse_lora(lora_scale=0.7)
    pipeline.unload_lora_weights()
    base = load_base(load_registry().get("tiny"), "cpu")
    digest = base.injected.weights_digest()
    (stacked,) = lora_stack.stack(base, [lora_stack.read(f"{file}=0.7")])
    assert not stacked.unread and base.injected.weights_digest() != digest
    changed = 0
    for component, module in base.backbone.components.items():
        mine = {name.replace(".base.", "."): value for name, value in module.state_dict().items()}
        theirs = getattr(pipeline, component).state_dict()
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert (mine[name] - value).abs().max() < 1e-6, name
            changed += component == "unet" and not torch.equal(value, before[name])
    assert changed >= 10


def test_names_of_the_original_network() -> None:
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    flat = "input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    assert f"lora_unet_{flat}" in set(lora_stack._names("sdxl", "unet", path))
    assert "lora_unet_time_embed_0" in set(
        lora_stack._names("sdxl", "unet", "time_embedding.linear_1")
    )
    assert f"lora_unet_{flat}" not in set(lora_stack._names("tiny", "unet", path))
    old = "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out"
    path = old.replace(".processor", "") + ".0"
    assert {old, f"unet.{old}", f"unet.{path}"} < set(lora_stack._names("tiny", "unet", path))


def test_diffusers_reads_the_same_names_of_the_original_network() -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SDXL))
    paths = [n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    paths = [path for path in paths if ".attentions." in path]  # what it maps in every version
    kohya = {}
    for path in paths:
        original = original_layer("sdxl", path)
        assert original
        key = f"lora_unet_{original.replace('.', '_')}.alpha"
        kohya[key] = f"lora_unet_{path.replace('.', '_')}.alpha"
    assert len(kohya) == len(paths) > 700
    read = _maybe_map_sgm_blocks_to_diffusers(dict(kohya), unet.config)
    assert len(read) == len(kohya)
    for key, path in read.items():  # its next step renames the three rows of blocks
        for old, new in (("input_b", "down_b"), ("middle_b", "mid_b"), ("output_b", "up_b")):
            key = key.replace(old, new)
        assert key == path


def test_strength_is_after_the_last_equals_sign() -> None:
    assert lora_stack.parse("a=b.safetensors") == (Path("a=b.safetensors"), 1.0)
    assert lora_stack.parse("a=b.safetensors=-0.5") == (Path("a=b.safetensors"), -0.5)


STEM = "lora_unet_conv_in"
UNET_ONLY = {f"{STEM}.lora_up.weight": (1, 4), f"{STEM}.lora_down.weight": (4, 1)}
QUERY = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
OF_NO_BIAS = {f"{QUERY}.bias": (1,), f"{QUERY}x.lora_A.weight": (1, 4)}
# Small files that ask for terabytes.
LARGE = {f"{STEM}.lora_up.weight": (100_000, 1), f"{STEM}.lora_down.weight": (1, 100_000)}
LARGE_KRONECKER = {f"{STEM}.lokr_w1": (1000, 1000), f"{STEM}.lokr_w2": (1000, 1000)}


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (UNET_ONLY, "was made for another base model: 'lora_unet_conv_in' changes 1 x 1"),
        ({"lora_unet_nowhere.lora_up.weight": (1, 4)}, "has no layer of base model tiny"),
        ({f"{STEM}.lora_down.weight": (4, 1)}, "has no up matrix"),
        ({f"{STEM}.alpha": (1,)}, "has no down matrix"),
        ({f"{STEM}.dora_scale": (1,)}, "has no down matrix"),
        ({f"{STEM}.hada_w1_b": (4, 4)}, "has no hada_w1_a matrix"),
        ({f"{STEM}.diff": ()}, "has no diff matrix"),
        ({f"{STEM}.lokr_w1": (), f"{STEM}.lokr_w2": (8, 8)}, "has no lokr_w1 matrix"),
        ({"lora_unet_x_attn2_to_k.lora_down.weight": ()}, "has no layer of base model tiny"),
        (OF_NO_BIAS, "does not fit the bias"),
        (LARGE, "changes 100000 x 100000 numbers"),
        (LARGE_KRONECKER, "changes 1000000 x 1000000 numbers"),
        ({"model.weight": (4, 4)}, "not a LoRA with kohya, diffusers, PEFT or ComfyUI keys"),
        ({"\x1b[2Jmodel.weight": (4, 4)}, r"first tensor: '\\x1b\[2Jmodel"),
        ({"unet.\x1b[2J.lora_A.weight": (1, 4)}, r"first key is 'unet.\\x1b\[2J"),
        ({**UNET_ONLY, "\x1b[2J.oft_blocks": (1,)}, r"by its tensor '\\x1b\[2J"),
    ],
    ids=["shape", "nothing", "no up", "no down", "dora", "loha", "number", "number in kron"]
    + ["number elsewhere", "no bias", "large", "large kron", "no lora"]
    + ["control"] * 3,
)
def test_what_cannot_be_added_is_refused(
    tiny: Base, tmp_path: Path, shapes: dict[str, tuple[int, ...]], says: str
) -> None:
    file = tmp_path / "bad.safetensors"
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, file)
    with pytest.raises(HdbError, match=says) as caught:
        lora_stack.stack(tiny, [lora_stack.read(str(file))])
    assert str(caught.value).isprintable() and str(file) in str(caught.value)


@pytest.mark.parametrize("said", [{"alpha": 10**400}, {"r": 10**400, "use_rslora": True}])
def test_an_alpha_that_is_no_number_is_refused(tmp_path: Path, said: dict[str, object]) -> None:
    """Whole numbers of JSON have any length."""
    layer = nn.Linear(8, 8)
    before = layer.weight.clone()
    parts = {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(4, 4)}
    whole = lora_stack.Parts("x", "unet.conv_in", parts)

    def changed(adapter: dict[str, object]) -> float:
        lora = lora_stack.Lora(tmp_path / "x", 1.0, "", {}, adapter)
        lora_stack._change(lora, whole, [layer])
        return float((layer.weight - before).detach().mean())

    with pytest.raises(HdbError, match=r"alpha of 'unet\.conv_in' is not a number"):
        changed({"r": 4, "alpha": 8} | said)
    assert changed({"r": 4, "alpha": 8}) == pytest.approx(2)  # the control


def test_a_change_that_the_format_of_the_base_cannot_hold_is_refused(tmp_path: Path) -> None:
    lora = lora_stack.Lora(tmp_path / "x", 1.0, "", {}, {})
    parts = lora_stack.Parts("x", "y", {"diff": torch.full((8, 8), 1e5)})
    with pytest.raises(HdbError, match="not finite"):
        lora_stack._change(lora, parts, [nn.Linear(8, 8).half()])
    lora_stack._change(lora, parts, [nn.Linear(8, 8)])  # the control


def test_a_magnitude_is_one_for_each_row(tmp_path: Path) -> None:
    lora, layer = lora_stack.Lora(tmp_path / "x", 1.0, "", {}, {}), nn.Linear(8, 8)
    whole = {"down": torch.ones(1, 8), "up": torch.zeros(8, 1), "magnitude": torch.ones(8)}
    one = {**whole, "magnitude": torch.ones(1)}
    with pytest.raises(HdbError, match="does not fit the weight"):
        lora_stack._change(lora, lora_stack.Parts("x", "y", one), [layer])
    lora_stack._change(lora, lora_stack.Parts("x", "y", whole), [layer])  # the control
    assert torch.allclose(layer.weight.norm(dim=1), torch.ones(8))


def test_what_is_no_file_of_numbers_is_refused(people: None, tmp_path: Path) -> None:
    file, out = tmp_path / "style.safetensors", tmp_path / "out.png"
    refused(out, tmp_path / "none.safetensors", "no such file")
    refused(out, store.path_of("alice"), "hdb compose")
    refused(out, f"{file}=nan", "not a finite number")
    file.write_bytes(pickle.dumps({"lora_unet_conv_in.alpha": 1}))
    refused(out, file, "pickle")
    ok("export", "alice", "--dtype", "fp32", "-o", file, "--force")
    good = load_file(file)
    bad = next(key for key in good if key.endswith("lora_up.weight"))
    save_file({**good, bad: torch.full_like(good[bad], math.inf)}, file)
    refused(out, file, "not finite")
    save_file(good, file)
    ok("gen", "bob", *PROMPT, "-o", out, "--lora", file)  # the control


def refused(out: Path, lora: object, says: str) -> None:
    """Assert exit 1, one line that says what, and no picture."""
    result = hdb("gen", "bob", *PROMPT, "-o", out, "--lora", lora)
    assert result.exit_code in (1, 2) and not result.stdout, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("memory: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert says in result.stderr and not out.exists()


def test_lora_files_keep_the_plan_from_quantising(
    people: None, tmp_path: Path, float32_weights: None
) -> None:
    ok("export", "alice", "-o", tmp_path / "l.safetensors")
    words = ["gen", "bob", *PROMPT, "--lora", tmp_path / "l.safetensors", "-o", tmp_path / "p.png"]
    low = hdb(*words, "--memory", "low")
    assert low.exit_code == 0 and "memory: recompute" in low.stderr, low.stderr
    without = hdb("gen", "bob", *PROMPT, "-o", tmp_path / "q.png", "--memory", "low")
    assert without.exit_code == 0 and "memory: nf4" in without.stderr  # the control
