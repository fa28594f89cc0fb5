"""Single files as other tools name their tensors are read as the original; files that are something
else are named for what they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from hdbcli.interop.merge import Merge
from hdbcli.method.lidb import first_theta
from hdbcli.model.files import open_checkpoint
from registry.bases.added import spec_of
from registry.bases.settings import Added
from registry.checkpoints.contents import read_checkpoint
from registry.checkpoints.ldm import original_names
from registry.checkpoints.safetensors import LARGEST, TensorInfo, read_header
from registry.errors import HdbError, HdbWarning
from registry.spec import BaseSpec, SampleSettings
from registry.stable_diffusion.families import FAMILIES
from registry.stable_diffusion.few_steps import few_steps
from registry.stable_diffusion.loading import load_single
from registry.stable_diffusion.recognise import prediction_of, recognise

if TYPE_CHECKING:
    from cutdown import Narrow

UNET, CLIP, VAE = "model.diffusion_model.", "cond_stage_model.transformer.", "first_stage_model."


def averaged(name: str) -> str:
    """Name a tensor of the UNet as the original code's moving average does: without dots."""
    if not name.startswith(UNET):
        return name
    return "model_ema." + name.removeprefix("model.").replace(".", "")


RENAMED: dict[str, Callable[[str], str]] = {
    "bare CLIP": lambda name: name.replace("transformer.text_model.", "transformer."),
    "wrapped": lambda name: f"state_dict.{name}",
    "averaged": averaged,
    "all": lambda name: f"module.{averaged(name).replace(f'{CLIP}text_model.', CLIP)}",
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", RENAMED)
def test_names_of_other_tools_mean_the_original_ones(narrow: Narrow, how: str, family: str) -> None:
    names = set(read_header(narrow.single(family), LARGEST).tensors)
    renamed = {RENAMED[how](name): name for name in names}
    assert len(renamed) == len(names) and (renamed.keys() != names or family == "sd2")
    assert original_names(renamed) == renamed
    assert original_names(names) == {name: name for name in names}


def test_a_file_with_names_of_other_tools_is_the_same_model(narrow: Narrow, tmp_path: Path) -> None:
    original, family = narrow.single("sd1"), FAMILIES["sd1"]
    tensors, file = load_file(original), tmp_path / "other.safetensors"
    save_file({RENAMED["all"](name): tensor for name, tensor in tensors.items()}, file)
    checkpoint = read_checkpoint(file)
    assert recognise(checkpoint) is family
    assert prediction_of(checkpoint, family, None) == "epsilon"
    loaded = [load_single(path, family, "epsilon", "cpu", "float16") for path in (original, file)]
    for one, other in zip(*(each.components.values() for each in loaded), strict=True):
        weights = dict(one.named_parameters())
        assert weights and all(p.equal(weights[name]) for name, p in other.named_parameters())

    one, other = (open_checkpoint(spec(path)) for path in (original, file))
    assert one.weights_digest() == other.weights_digest()
    plain = first_theta(len(other.places), other.spec.a, other.spec.b)
    merged = {item.key for item in Merge(other, plain, None).items(file)}
    assert merged == set(tensors)  # what hdb writes has the names that every reader knows


def spec(path: Path, family: str = "sd1") -> BaseSpec:
    return spec_of(Added("narrow", str(path), family, "epsilon", 64, "", {}))


def test_an_average_beside_the_weights_is_left_alone() -> None:
    names = [f"{UNET}input_blocks.1.0.in_layers.0.weight"]
    both = [*names, averaged(names[0]), "model_ema.decay"]
    assert original_names(both) == {name: name for name in both}
    assert original_names(both[1:]) == {both[1]: names[0], "model_ema.decay": "model_ema.decay"}


def test_a_component_alone_is_named(narrow: Narrow, tmp_path: Path) -> None:
    """By its names: there is nothing in these tensors."""
    file = tmp_path / "part.safetensors"
    whole = set(read_header(narrow.single("sd1"), LARGEST).tensors)
    unet = {name for name in whole if name.startswith(UNET)}
    vae = {name for name in whole if name.startswith(VAE)}
    folder = narrow.folder("sd1") / "unet" / "diffusion_pytorch_model.safetensors"
    parts = [
        ({name.removeprefix(UNET) for name in unet}, "a UNet alone, as of"),
        (unet, "a UNet alone, as of Stable Diffusion 1.x or Stable Diffusion 2.x;"),
        (set(read_header(folder, LARGEST).tensors), "a UNet alone, as of Stable Diffusion 1.x or"),
        ({name.removeprefix(VAE) for name in vae}, "an autoencoder alone;"),
        ({name.removeprefix(CLIP) for name in whole if CLIP in name}, "a text encoder alone;"),
        (unet | vae, "lacks text_encoder, which Stable Diffusion 1.x needs"),
        ({f"{UNET}middle_block.1.proj_in.lora_up.weight"}, "but a LoRA"),
        ({"down_blocks.0.resnets.0.a", "controlnet_cond_embedding.conv_in.a"}, "but a ControlNet"),
        ({"adapter.body.0.block1.weight"}, "but a T2I-Adapter"),
        ({"image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"}, "but an IP-Adapter"),
        ({"emb_params"}, "but a textual inversion embedding"),
        ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight"}, "but Flux"),
        ({"joint_blocks.0.x_block.attn.qkv.weight"}, "but Stable Diffusion 3"),
        ({"blocks.0.self_attn.q.weight"}, "but Wan"),
    ]
    for names, says in parts:
        save_file({name: torch.zeros(1) for name in names}, file)
        with pytest.raises(HdbError, match=says) as said:
            recognise(read_checkpoint(file))
        assert "damaged" not in str(said.value)


@pytest.mark.parametrize(
    ("family", "tensor", "says"),
    [
        ("sd1", "time_embed.cond_proj.weight", "a distilled LCM"),
        ("sdxl", "time_embed.cond_proj.weight", "a distilled LCM"),
        ("sd2", "label_emb.0.0.weight", "an unCLIP model"),
    ],
)
def test_unets_with_further_inputs_are_named(
    narrow: Narrow, tmp_path: Path, family: str, tensor: str, says: str
) -> None:
    checkpoint = read_checkpoint(narrow.single(family))
    assert recognise(checkpoint).name == family  # the control
    unet = {**checkpoint.components["unet"], tensor: TensorInfo("F16", (8, 8), (0, 128))}
    with pytest.raises(HdbError, match=says):
        recognise(replace(checkpoint, components={**checkpoint.components, "unet": unet}))


def test_a_single_file_of_2_says_what_was_assumed(narrow: Narrow) -> None:
    checkpoint, family = read_checkpoint(narrow.single("sd2")), FAMILIES["sd2"]
    with pytest.warns(HdbWarning, match=r"v_prediction at 64 px.*--prediction epsilon"):
        assert prediction_of(checkpoint, family, None) == "v_prediction"
    marks = [
        ("modelspec.prediction_type", "epsilon", "epsilon"),
        ("modelspec.architecture", "stable-diffusion-v2-512", "epsilon"),
        ("modelspec.architecture", "stable-diffusion-v2-768-v", "v_prediction"),
        ("modelspec.title", "SD-Turbo", "epsilon"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", HdbWarning)
        for key, value, predicts in marks:
            marked = replace(checkpoint, metadata={key: value})
            assert prediction_of(marked, family, None) == predicts
        assert prediction_of(checkpoint, family, "v") == "v_prediction"
        assert prediction_of(read_checkpoint(narrow.single("sd1")), FAMILIES["sd1"], None)


@pytest.mark.parametrize("mark", ["edm_mean", "edm_vpred.sigma_max", "v_pred"])
def test_a_single_file_that_was_trained_otherwise_is_named(
    mark: str, narrow: Narrow, tmp_path: Path
) -> None:
    """Playground 2.5 and CosXL have the layout of Stable Diffusion XL, and noise of their own."""
    file = tmp_path / "model.safetensors"
    save_file({**load_file(narrow.single("sdxl")), mark: torch.zeros(1)}, file)
    checkpoint = read_checkpoint(file)
    family = recognise(checkpoint)
    if mark == "v_pred":
        assert prediction_of(checkpoint, family, None) == "v_prediction"
        return
    with pytest.raises(HdbError, match=r"is trained to predict 'EDM'.*knows epsilon and v_pred"):
        prediction_of(checkpoint, family, None)


def test_a_gguf_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"GGUF\3\0\0\0" + bytes(99))
    with pytest.raises(HdbError, match="is a GGUF"):
        read_checkpoint(file)


def test_a_turbo_of_2_is_named_and_drawn_in_few_steps(
    narrow: Narrow, tmp_path: Path, usual_sampling_steps: None
) -> None:
    file = tmp_path / "sd_turbo.safetensors"
    file.symlink_to(narrow.single("sd2"))
    assert prediction_of(read_checkpoint(file), FAMILIES["sd2"], None) == "epsilon"
    turbo, plain = spec(file, "sd2"), spec(narrow.single("sd2"), "sd2")
    assert "Turbo" in turbo.summary and "Turbo" not in plain.summary
    assert turbo.sampling == SampleSettings(4, 1.0, scheduler="euler", trailing=True)
    assert plain.sampling == SampleSettings(guidance=7.5)


@pytest.mark.parametrize(
    ("name", "kind", "steps", "guidance"),
    [
        ("sdxl_lightning_4step_lora", "Lightning", 4, 1.0),
        ("sdxl_lightning_8step_lora", "Lightning", 8, 1.0),
        ("Hyper-SD15-1step-lora", "Hyper", 1, 1.0),
        ("Hyper-SDXL-8steps-CFG-lora", "Hyper", 8, None),
        ("sd_xl_turbo_lora_v1-64dim", "Turbo", 4, 1.0),
        ("stabilityai/sd-turbo", "Turbo", 4, 1.0),
        ("lcm-lora-sdv1-5", "LCM", 4, 1.0),
        ("dmd2_sdxl_4step_lora_fp16", "DMD", 4, 1.0),
    ],
)
def test_few_steps_by_name(name: str, kind: str, steps: int, guidance: float | None) -> None:
    found = few_steps(name)
    assert found is not None
    assert (found.kind, found.steps, found.guidance) == (kind, steps, guidance)


@pytest.mark.parametrize(
    "name", ["lightning bolt style", "porsche-911-turbo", "hyperrealistic", "wednesday turbo"]
)
def test_other_names_say_nothing_of_steps(name: str) -> None:
    assert few_steps(name) is None
