"""`tiny`: the base model that ships, small enough that the whole method runs on a laptop without
a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from registry.metric import Metric, MetricSpec
from registry.spec import BaseSpec, SampleSettings
from registry.stable_diffusion.families import CONVOLUTIONS, TEXT

if TYPE_CHECKING:
    from registry.stable_diffusion.backbone import StableDiffusion

# How it draws. Early steps decide who is drawn, so five of six start at t > 0.6: of even ones small
# faces come out broken, and more of them bring nobody nearer. Guidance washes eyes and styles out.
SAMPLING = SampleSettings(steps=6, guidance=1.0)
SHIFT = 4.0

WEIGHTS = Path(__file__).parent / "weights"

# Means of the detector's points on 150 rendered portraits, made symmetric: what the model was
# trained on.
TEMPLATE = ((0.331, 0.423), (0.669, 0.423), (0.5, 0.626), (0.357, 0.773), (0.643, 0.773))

# Convolutions reach eyes, hair and skin, which attention on few cells does not; attention to the
# prompt is what can tell the person who is asked for from anybody.
PROMPT_ATTENTION = r".*\.attn2\.(to_q|to_k|to_v|to_out\.0)"

# As the recipe teaches them, the project page's five verbatim; the words of these are all it knows.
CAPTIONS = (
    "A [V] face",
    "An Instagram selfie of a [V] face",
    "A Pixar character of a [V] face",
    "A [V] face with bark skin",
    "A [V] face as a rock star",
    "A professional shot of a [V] face",
    "A pop art print of a [V] face",
    "A marble bust of a [V] face",
    "A bronze statue of a [V] face",
)


def load(device: str, dtype: str) -> StableDiffusion:
    """Load the weights that ship with the package; HdbError when the installation lacks them."""
    import torch

    backbone = load_from(WEIGHTS, device, dtype)
    # Half the time of a step that learns from what it draws goes by in the decoder otherwise.
    backbone.pipeline.vae.to(memory_format=torch.channels_last)
    if device == "cpu":  # of many pictures at once a third of the time goes into fresh memory
        backbone.pipeline.vae.enable_slicing()
    return backbone


def load_from(folder: Path, device: str, dtype: str) -> StableDiffusion:
    """Load weights that were trained as those of `tiny`, to draw as it does; HdbError if they are
    missing or damaged."""
    from registry.stable_diffusion.loading import load_folder

    return replace(load_folder(folder, device, dtype), shift=SHIFT)


def register(add: Callable[[BaseSpec], None]) -> None:
    """Offer `tiny` to the registry, through the door that every plug-in uses."""
    add(
        BaseSpec(
            name="tiny",
            family="tiny",
            summary="embedded demonstration model, 128 px, trained on photographs of faces",
            licence="Apache-2.0",
            targets={"unet": (PROMPT_ATTENTION, *CONVOLUTIONS), "text_encoder": TEXT},
            a=96,
            b=48,
            basis_seed=20230713,  # the day the paper came out
            identifier="sks",
            resolution=128,
            template=TEMPLATE,
            hypernetwork=WEIGHTS / "hypernetwork.safetensors",
            load=load,
            files=WEIGHTS,
            portraits=2,
            guidance=SAMPLING.guidance,
            steps=SAMPLING.steps,
            likeness=0.6,
            captions=CAPTIONS,
        )
    )


def register_metrics(add: Callable[[MetricSpec], None]) -> None:
    """Offer the in-domain CLIP, which knows the captions of `tiny` alone."""

    def load() -> Metric:
        from registry.tiny.clip import load_clip

        return load_clip()

    add(MetricSpec("in-domain-clip", "cosine of picture and caption", "text", ("tiny",), load))
