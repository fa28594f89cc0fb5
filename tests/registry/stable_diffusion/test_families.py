"""The three families: targets of the full-size models, the vocabulary, and a folder drawing what
the single file of the same weights draws."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hdbcli.method.inject import find_targets
from hdbcli.method.lidb import shape_of
from hdbcli.training.likeness_loss import draft
from hdbcli.training.questions import diffusion_loss
from registry.checkpoints.contents import read_checkpoint, read_config
from registry.checkpoints.ldm import canonical
from registry.checkpoints.safetensors import read_floats
from registry.errors import HdbError
from registry.spec import SampleSettings
from registry.stable_diffusion.backbone import StableDiffusion, _scheduler
from registry.stable_diffusion.families import FAMILIES
from registry.stable_diffusion.loading import load_folder, load_single
from registry.stable_diffusion.recognise import prediction_of, recognise, resolution_of
from registry.stable_diffusion.tokenizer import clip_tokenizer

if TYPE_CHECKING:
    from cutdown import Narrow

NOTHING = torch.zeros(0)


def full_size(family: str, variant: str | None = None) -> dict[str, nn.Module]:
    """Build the models of a shipped configuration without memory."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    configs = FAMILIES[family].configs(variant)
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with torch.device("meta"):
        found = {
            "unet": UNet2DConditionModel.from_config(read_config(configs / "unet" / "config.json"))
        }
        for name in FAMILIES[family].layers:
            found[name] = kinds[name](CLIPTextConfig.from_pretrained(configs / name))
    return found


@pytest.mark.parametrize(
    ("name", "count", "unet", "numbers", "width", "pixels"),
    [
        ("sd1", 192, 859_520_964, 385_344, 768, 512),
        ("sd2", 236, 865_910_724, None, 1024, 768),
        ("sdxl", 806, 2_567_463_684, None, 2048, 1024),
    ],
)
def test_targets_of_the_full_size_models(
    name: str, count: int, unet: int, numbers: int | None, width: int, pixels: int
) -> None:
    family, models = FAMILIES[name], full_size(name)
    assert sum(p.numel() for p in models["unet"].parameters()) == unet  # as published
    targets = find_targets(models, family.targets, canonical)
    assert len(targets) == count == family.count
    shapes = {path: shape_of(layer) for _, path, layer in targets}
    assert numbers in (None, sum(sum(shape_of(layer)) for _, _, layer in targets))
    assert {m for path, (_, m) in shapes.items() if path.endswith("attn2.to_k")} == {width}
    assert all(m >= family.a and n >= family.b for n, m in shapes.values())
    assert resolution_of(family.configs()) == pixels


def test_the_base_of_2_is_512_pixels_and_epsilon() -> None:
    base = FAMILIES["sd2"].configs("epsilon")
    assert resolution_of(base) == 512 and FAMILIES["sd2"].configs("v_prediction") != base
    assert len(find_targets(full_size("sd2", "epsilon"), FAMILIES["sd2"].targets, canonical)) == 236


def test_vocabulary_is_clips() -> None:
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49_408
    ids = tokenizer("a photo of a cat, it's 12 CAFÉ").input_ids
    assert ids[:6] == [49406, 320, 1125, 539, 320, 2368] and ids[-1] == 49407
    assert tokenizer("sks", add_special_tokens=False).input_ids == [48136]  # the identifier
    padded = clip_tokenizer("!")("a", padding="max_length").input_ids
    assert len(padded) == 77 and padded[:4] == [49406, 320, 49407, 0]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10((((a / 255.0) - (b / 255.0)) ** 2).mean() + 1e-12))


def draw(backbone: StableDiffusion, *prompts: str) -> np.ndarray:
    settings = SampleSettings(steps=3, guidance=5.0)
    return backbone.sample(prompts, settings, [1] * len(prompts), lambda *_: None)


@pytest.mark.parametrize("name", FAMILIES)
def test_single_file_and_folder_draw_the_same(narrow: Narrow, name: str) -> None:
    folder, single = narrow.folder(name), narrow.single(name)
    families = [recognise(read_checkpoint(path)) for path in (folder, single)]
    assert [family.name for family in families] == [name, name]
    told = prediction_of(read_checkpoint(folder), families[0], None)
    assert told == ("v_prediction" if name == "sd2" else "epsilon")
    one = load_folder(folder, "cpu", "float32", families[0].double)
    two = load_single(single, families[1], told, "cpu", "float32")
    drawn, same = draw(one, "a sks face", "a cat"), draw(two, "a sks face", "a cat")
    assert drawn.shape == (2, 64, 64, 3) and drawn.std() > 10
    assert psnr(drawn, same) > 50 > psnr(drawn[0], drawn[1])  # the prompt is read
    assert one.token_embeddings("sks")[-1][1] == two.token_embeddings("sks")[-1][1] == 48136
    assert len(one.token_embeddings("sks")) == len(families[0].layers)


@pytest.mark.parametrize("name", FAMILIES)
def test_backbone_trains_every_target(narrow: Narrow, name: str) -> None:
    """But those of SDXL's first text encoder's last layer, which nothing reads."""
    family = FAMILIES[name]
    backbone = load_folder(narrow.folder(name), "cpu", "float32", family.double)
    targets = find_targets(backbone.components, family.targets, canonical)
    for model in backbone.components.values():
        model.requires_grad_(False)
    for _, _, linear in targets:
        linear.weight.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn((2, 2, 4, 8, 8), generator=generator)
    times = torch.tensor([0.4, 0.8])
    loss = diffusion_loss(backbone, latents, ["a sks face", "a dog"], noise, times)
    assert loss.shape == (2,) and loss.isfinite().all()
    loss.sum().backward()
    dead = [f"{part}.{path}" for part, path, linear in targets if linear.weight.grad is None]
    unread = [] if name != "sdxl" else ["q", "k", "v", "out"]
    assert sorted(path.rsplit(".")[-1] for path in dead) == sorted(f"{x}_proj" for x in unread)
    assert all("layers.11." in path and path.startswith("text_encoder.") for path in dead)


def test_what_a_single_file_predicts_can_be_said(narrow: Narrow) -> None:
    checkpoint, family = read_checkpoint(narrow.single("sd2")), FAMILIES["sd2"]
    assert prediction_of(checkpoint, family, "epsilon") == "epsilon"
    backbone = load_single(narrow.single("sd2"), family, "epsilon", "cpu", "float32")
    assert backbone.pipeline.scheduler.config.prediction_type == "epsilon"
    usual = load_single(narrow.single("sd2"), family, "v_prediction", "cpu", "float32")
    assert psnr(draw(backbone, "a cat"), draw(usual, "a cat")) < 50
    bent = load_single(narrow.single("sd1"), FAMILIES["sd1"], "v_prediction", "cpu", "float32")
    assert bent.pipeline.scheduler.config.prediction_type == "v_prediction"


def test_a_single_file_may_say_that_it_predicts_v_up_to_the_very_end(
    narrow: Narrow, tmp_path: Path
) -> None:
    """As ComfyUI reads it: two empty tensors beside the weights."""
    file, family = tmp_path / "v.safetensors", FAMILIES["sdxl"]
    save_file({**load_file(narrow.single("sdxl")), "v_pred": NOTHING, "ztsnr": NOTHING}, file)
    checkpoint = read_checkpoint(file)
    assert recognise(checkpoint) is family
    assert prediction_of(checkpoint, family, None) == "v_prediction"
    ends = [
        load_single(each, family, "v_prediction", "cpu", "float32").pipeline.scheduler
        for each in (file, narrow.single("sdxl"))
    ]
    assert ends[0].alphas_cumprod[-1] < 1e-6 < ends[1].alphas_cumprod[-1]


@pytest.mark.parametrize("name", FAMILIES)
def test_no_scheduler_clips_latents(name: str) -> None:
    """They reach beyond 1, and DDIM clips what it is not told to leave."""
    config = read_config(FAMILIES[name].configs() / "scheduler" / "scheduler_config.json")
    assert config.pop("clip_sample", False) is False
    for said in (config, {**config, "clip_sample": True}):
        assert not _scheduler(SampleSettings(scheduler="ddim"), said).config.clip_sample


def test_autoencoder_is_exact_in_half_precision(narrow: Narrow) -> None:
    images = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole, half = (load_folder(narrow.folder("sd1"), "cpu", d) for d in ("float32", "float16"))
    latents = whole.encode_images(images)
    torch.testing.assert_close(half.encode_images(images), latents)
    assert half.pipeline.vae.dtype == torch.float16
    assert (half.decode_latents(latents) == whole.decode_latents(latents)).all()


def test_tensors_are_read_one_by_one_as_they_are_wanted(tmp_path: Path) -> None:
    file = tmp_path / "part.safetensors"
    numbers = torch.randn(3, 5)
    tensors = {"a.one": numbers, "a.half": numbers.half(), "a.brain": numbers.bfloat16()}
    save_file({**tensors, "b.count": torch.arange(3)}, file)
    read = read_floats([file], "a.", torch.float16)
    assert read.keys() == tensors.keys()
    assert all(read[name].equal(tensor.half()) for name, tensor in tensors.items())
    assert not read["a.brain"].equal(read["a.one"])  # the control: formats are told apart
    with pytest.raises(HdbError, match="is I64, no float"):
        read_floats([file], "", torch.float16)


def test_xl_learns_from_what_its_pipeline_reads(
    narrow: Narrow, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_folder(narrow.folder("sdxl"), "cpu", "float32", True)
    prompts, seen = ["a sks face", "a cat"], []

    def predict(_: object, noisy: torch.Tensor, _steps: torch.Tensor, read: Any) -> torch.Tensor:
        seen.append(read)
        return torch.zeros_like(noisy)

    monkeypatch.setattr(StableDiffusion, "_predict", predict)
    latents = torch.zeros(2, 4, 8, 8)
    with torch.no_grad():
        states, _, pooled, _ = backbone.pipeline.encode_prompt(
            prompts, device="cpu", do_classifier_free_guidance=False
        )
        backbone.predict(latents, prompts, latents, torch.tensor([0.5, 0.5]))
        draft(backbone, prompts, latents, 1, 2.0)
    learns, draws = seen
    torch.testing.assert_close(learns.states, states)
    torch.testing.assert_close(learns.added["text_embeds"], pooled)
    assert learns.added["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    for read, wanted in ((draws.states, states), (draws.added["text_embeds"], pooled)):
        away, towards = read.chunk(2)
        assert not away.any()  # zeros stand for no prompt
        torch.testing.assert_close(towards, wanted)
