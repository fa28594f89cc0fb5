"""A base model of a family that hdb does not know, offered through the entry point `hdb.models`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from registry.spec import BaseSpec

if TYPE_CHECKING:
    from hdb_example.backbone import RectifiedFlow

# Where the crop puts eyes, nose and corners of the mouth, in parts of the side.
TEMPLATE = ((0.34, 0.42), (0.66, 0.42), (0.5, 0.62), (0.37, 0.77), (0.63, 0.77))


def load(device: str, dtype: str) -> RectifiedFlow:
    """Load the model; torch is imported here and not before."""
    from hdb_example.backbone import load_backbone

    return load_backbone(device, dtype)


def register(add: Callable[[BaseSpec], None]) -> None:
    """Offer `example` to hdb."""
    add(
        BaseSpec(
            name="example",
            family="example-dit",
            summary="diffusion transformer with rectified flow, 32 px, random weights",
            licence="Apache-2.0",
            targets={
                "denoiser": (r"blocks\.\d+\.(query|key|value|out|wide)",),
                "words": (r"mix",),
            },
            a=32,
            b=16,
            basis_seed=1,
            identifier="sks",
            resolution=32,
            template=TEMPLATE,
            hypernetwork=None,
            load=load,
            budget=20_000,
        )
    )
