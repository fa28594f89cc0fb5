"""The families of Stable Diffusion as data: what they look like inside, and how hdb works on them.

A family is what identities move within: the same targets in the same order, a, b and basis. It is
recognised by its layout alone, the number of transformer blocks and the layers of its text
encoders, so that a fine-tune is known whatever it is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from registry.spec import Point, Targets

CONFIGS = Path(__file__).parent / "configs"  # diffusers configurations, a folder for each family

ATTENTION = (r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)", r".*\.ff\.net\.0\.proj")
# Every convolution inside the blocks. The first and the last of the UNet are narrower than a basis.
CONVOLUTIONS = (
    r".*\.resnets\.\d+\.(conv1|conv2|conv_shortcut)",
    r".*\.(down|up)samplers\.0\.conv",
    r".*\.proj_(in|out)",  # linear in some families, a convolution of 1 x 1 in others
)
TEXT = (r".*\.self_attn\.(q_proj|k_proj|v_proj|out_proj)",)
END = "<|endoftext|>"
PER_BLOCK, PER_LAYER = 9, 4  # targets that these find in a transformer block, in a text layer

# FFHQ's alignment in the unit square: how most portraits that these models saw are cropped.
_FFHQ = ((0.377, 0.469), (0.623, 0.469), (0.5, 0.613), (0.391, 0.725), (0.609, 0.725))


@dataclass(frozen=True)
class Family:
    """What all bases of a family share.

    `budget` bounds the bytes of an identity by default; the same choices fit it in each family:
    rank 1 as fp32, rank 2 as fp16, rank 4 as int8.
    """

    name: str
    title: str
    blocks: int  # transformer blocks of the UNet
    layers: Mapping[str, int]  # text encoder -> its layers
    budget: int  # bytes
    pads: tuple[str, ...]  # token after a prompt's end, for each text encoder
    variants: Mapping[str, str] = field(default_factory=dict)  # prediction type -> configuration
    guidance: float = 7.5  # as their pipelines in diffusers take
    a: int = 100  # as in the paper
    b: int = 50
    basis_seed: int = 20230713  # the day the paper came out
    identifier: str = "sks"  # one rare token of CLIP's vocabulary
    template: tuple[Point, Point, Point, Point, Point] = _FFHQ

    @property
    def targets(self) -> Targets:
        """Return the paper's targets, as patterns."""
        return self.target_sets["attention"]

    @property
    def target_sets(self) -> dict[str, Targets]:
        """Return the targets there are to choose from: the paper's alone, or with the UNet's
        convolutions, which reach the finest grid, where the paper's see nothing."""
        text = dict.fromkeys(self.layers, TEXT)
        return {
            "attention": {"unet": ATTENTION, **text},
            "all": {"unet": (*ATTENTION, *CONVOLUTIONS), **text},
        }

    @property
    def count(self) -> int:
        """Count the paper's targets."""
        return PER_BLOCK * self.blocks + PER_LAYER * sum(self.layers.values())

    @property
    def double(self) -> bool:
        """Say whether there are two text encoders."""
        return len(self.layers) > 1

    def configs(self, prediction: str | None = None) -> Path:
        """Return the diffusers configuration that an original single file lacks."""
        return CONFIGS / self.variants.get(prediction or "", self.name)


FAMILIES = {
    family.name: family
    for family in (
        Family("sd1", "Stable Diffusion 1.x", 16, {"text_encoder": 12}, 120_000, (END,)),
        Family(
            "sd2",
            "Stable Diffusion 2.x",
            16,
            {"text_encoder": 23},  # OpenCLIP's, without its last layer, which 2.x does not use
            150_000,
            ("!",),
            {"epsilon": "sd2-base"},  # 512 px; the others are 768 px and predict velocity
        ),
        Family(
            "sdxl",
            "Stable Diffusion XL",
            70,
            {"text_encoder": 12, "text_encoder_2": 32},
            500_000,
            (END, "!"),
            guidance=5.0,
        ),
    )
}
