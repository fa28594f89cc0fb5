"""The model in hdb's language: the members of `registry.spec.Backbone`, and nothing of hdb besides.

Rectified flow (Liu et al. 2022): x_t = (1 - t) x + t noise, and the network predicts noise - x.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from hdb_example.network import NUMBERS, PATCH, Denoiser, Words, rows_of
from registry.errors import HdbError
from registry.spec import SampleSettings

SIDE = 32  # pixels
SEED = 0  # of the weights


@dataclass(frozen=True, eq=False)
class RectifiedFlow:
    """A loaded model. Latents are the pixels themselves, 48 numbers a patch of 4 x 4."""

    words: Words
    denoiser: Denoiser

    @property
    def components(self) -> Mapping[str, nn.Module]:
        return {"denoiser": self.denoiser, "words": self.words}

    def encode_images(self, images: Tensor) -> Tensor:
        return F.pixel_unshuffle(images.float(), PATCH)

    def decode_latents(self, latents: Tensor) -> np.ndarray:
        pixels = F.pixel_shuffle(latents.float(), PATCH).clamp(-1, 1)
        pictures = ((pixels + 1) * 127.5).round().to(torch.uint8)
        return pictures.permute(0, 2, 3, 1).cpu().numpy()

    def predict(self, latents: Tensor, prompts: Sequence[str], noise: Tensor, t: Tensor) -> Tensor:
        part = t.view(-1, 1, 1, 1)
        return self._velocity((1 - part) * latents + part * noise, t, prompts)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - latents

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        settings: SampleSettings,
        seeds: Sequence[int],
        progress: Callable[[int, int], None],
    ) -> np.ndarray:
        if settings.scheduler:
            raise HdbError(f"{settings.scheduler!r} is not a scheduler of this model; drop it")
        side = settings.size or SIDE
        if side % PATCH:
            raise HdbError(f"--size {side} does not fit this model; use a multiple of {PATCH}")
        shape = (NUMBERS, side // PATCH, side // PATCH)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        x = torch.stack(noise).to(self.denoiser.last.weight)
        negative = [settings.negative] * len(prompts)
        for step in range(settings.steps):
            t = torch.full((2 * len(x),), 1 - step / settings.steps, device=x.device)
            both = self._velocity(torch.cat([x, x]), t, [*negative, *prompts])
            away, towards = both.chunk(2)
            x = x - (away + settings.guidance * (towards - away)) / settings.steps
            progress(step + 1, settings.steps)
        return self.decode_latents(x)

    def token_embeddings(self, word: str) -> Sequence[tuple[nn.Embedding, int]]:
        rows = rows_of(word)
        if len(rows) != 1:
            raise HdbError(f"{word!r} is {len(rows)} words of this model; give one")
        return [(self.words.embedding, rows[0])]

    def save(self, folder: Path) -> None:
        kind = type(self).__name__
        for name, module in self.components.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            save_file(module.state_dict(), folder / name / "model.safetensors", {"format": "pt"})
        index = {"_class_name": kind, **{name: ["hdb_example", kind] for name in self.components}}
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")

    def _velocity(self, x: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        dtype = self.denoiser.last.weight.dtype
        return self.denoiser(x.to(dtype), t, self.words(prompts)).float()


def load_backbone(device: str, dtype: str) -> RectifiedFlow:
    """Make the weights from their seed, which leaves torch's own generator alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = RectifiedFlow(Words(), Denoiser())
    for module in model.components.values():
        module.to(device, getattr(torch, dtype)).eval()
    return model
