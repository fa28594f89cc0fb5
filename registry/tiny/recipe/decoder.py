"""Train the decoder of `tiny` further, alone: latents, base model and identities stay as they are.

It learns from what it will be handed: latents of photographs, some with noise on them, and what the
base makes of a picture in its last steps, which is softer than any photograph, since a network
that has to guess answers with the middle of what might be. Decoded, they are compared with the
photograph as the autoencoder's were; a discriminator, which sees them through dlib's frozen
features (Sauer et al. 2021, "Projected GANs Converge Faster"), says what a photograph has and they
have not; and two recognisers say how far the person is from the one on the photograph (`alike`).
All three pull at the pixels, discriminator and recognisers BALANCE and ALIKE times as hard as the
photograph, whatever the sizes of the losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from hdbcli.faces.dlib import load_dlib
from hdbcli.model.base import load_predictor, open_base
from hdbcli.training.likeness_loss import apart, check_drafts, places_of, sight
from hdbcli.training.loop import Plan, Step, averaged, averages_of, fit
from registry.checkpoints.safetensors import save_tensors
from registry.spec import Drafting
from registry.tiny import SAMPLING
from registry.tiny.recipe.autoencoder import (
    NOISE,
    SCALE,
    SHOWN_EVERY,
    reconstruction,
    show,
)
from registry.tiny.recipe.base import prompt_of
from registry.tiny.recipe.latents import (
    AT_ONCE,
    PORTRAIT,
    Latents,
    read_autoencoder,
    read_latents,
)
from registry.tiny.recipe.photographs import Photographs, read_photographs
from registry.tiny.recipe.pictures import STYLES, as_images, half

BALANCE = 0.5  # how hard the discriminator pulls at a pixel, over how hard the photograph does
ALIKE = 0.5  # and how hard likeness does
JUDGED = {2: 32, 6: 64, 9: 128}  # blocks of the recogniser that the discriminator sees, channels
LAST = 4  # steps of drawing that the base has taken, at most
DRAWN = 1200  # pictures
SHARE = 0.6  # of pictures that are of those
# Styles whose colours are chance: the mean of all stage lights, which is what drawing from nothing
# but noise would learn to hit, is no light at all.
ANY_COLOURS = [STYLES.index(style) for style in ("rockstar", "popart")]


class Discriminator(nn.Module):
    """Say of windows (B, 3, S, S) in -1..1 how much each place looks like a photograph's of its
    style (B,), an index into STYLES: a few maps of logits (B, h, w), from frozen features."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(
            {
                str(block): nn.Sequential(
                    nn.Conv2d(width, 64, 3, padding=1),
                    nn.GroupNorm(8, 64),
                    nn.LeakyReLU(0.2),
                    nn.Conv2d(64, 64, 3, padding=1),
                    nn.LeakyReLU(0.2),
                    nn.Conv2d(64, 1, 1),
                )
                for block, width in JUDGED.items()
            }
        )
        self.styles = nn.ModuleDict(
            {str(block): nn.Embedding(len(STYLES), width) for block, width in JUDGED.items()}
        )

    def forward(self, windows: Tensor, styles: Tensor) -> list[Tensor]:
        pictures = F.interpolate(windows, scale_factor=SCALE, mode="bilinear")
        model = load_dlib(str(windows.device))
        features = enumerate(islice(model.features((pictures + 1) * 127.5), max(JUDGED) + 1))
        told = []
        for block, x in features:
            if block in JUDGED:
                style = self.styles[str(block)](styles)[:, :, None, None]
                told.append(self.heads[str(block)](x + style)[:, 0])
        return told


def train_decoder(build: Path, plan: Plan, batch: int, device: str) -> Iterator[Step]:
    """Train the decoder of the autoencoder in `BUILD/vae` on what `tiny` draws; resumable. Write
    `vae/` and a sheet of pictures held out."""
    pictures = read_photographs(build)
    pixels = pictures.pixels
    latents = read_latents(build, pixels.shape[-1], device)
    drawn = read_drawn(build, pictures, latents, device)
    torch.manual_seed(plan.seed)
    model = read_autoencoder(build).to(device)
    judge = Discriminator().to(device)
    decoder = {f"decoder.{k}": p.requires_grad_() for k, p in model.decoder.named_parameters()}
    parameters = decoder | {f"judge.{k}": p for k, p in judge.named_parameters()}
    averages = averages_of(parameters)

    def chosen(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Choose latents, some drawn and some with noise, and the rows of their pictures."""
        some = torch.randint(len(drawn.rows), (round(batch * SHARE),), generator=generator)
        plain = latents.draw(batch - len(some), generator)
        rows = torch.cat([plain, drawn.rows[some]])
        own = latents.values[0, plain].float()
        level = NOISE * torch.rand(len(own), 1, 1, 1, generator=generator)
        own = own + level * torch.randn(own.shape, generator=generator)
        return torch.cat([own, drawn.latents[some].float()]).to(device), rows

    def losses(generator: torch.Generator) -> Iterator[Tensor]:
        seen, rows = chosen(generator)
        true, styles = as_images(pixels[rows].to(device)), latents.styles[rows].to(device)
        places = pictures.points[rows].numpy() / pixels.shape[-1]
        with half(torch.device(device)):
            made = model.decode(seen).sample
        made = made.float()
        person = alike(true, places, made, styles)
        yield pulled(made, *pull(judge, made, true, styles, alike=person))
        yield hinge(judge(true, styles), judge(made.detach(), styles))

    optimizer = torch.optim.AdamW(
        parameters.values(), lr=plan.lr, weight_decay=0.0, betas=(0.5, 0.99)
    )
    file = build / "decoder.safetensors"
    for step in fit(parameters, losses, optimizer, plan, averages, file):
        yield step
        if step.number % SHOWN_EVERY == 0 or step.number == step.steps:
            with averaged(decoder, averages):
                show(model, build)
                model.save_pretrained(build / "vae")


def pull(
    judge: Discriminator,
    made: Tensor,
    true: Tensor,
    styles: Tensor,
    left: float = 1.0,
    alike: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradient at the pixels `made` (B, 3, S, S), of the distance from the true ones,
    `left` of it, of what the discriminator misses, and of the loss `alike`; and the distance."""
    picture = made.detach().requires_grad_()
    far = reconstruction(picture, true)
    (wanted,) = torch.autograd.grad(far, picture)
    told = torch.stack([each.mean() for each in judge(picture, styles)]).mean()
    others = [(-told, BALANCE)] + ([] if alike is None else [(alike(picture), ALIKE)])
    gradient = left * wanted
    for loss, weight in others:
        (other,) = torch.autograd.grad(loss, picture)
        gradient = gradient + weight * wanted.norm() / other.norm().clamp(min=1e-12) * other
    return gradient, far.detach()


def pulled(made: Tensor, gradient: Tensor, loss: Tensor) -> Tensor:
    """Return a loss of that value whose gradient at `made` is what is given."""
    along = (made * gradient).sum()
    return along - along.detach() + loss


def hinge(real: list[Tensor], made: list[Tensor]) -> Tensor:
    """Return the discriminator's loss: logits of photographs belong above 1, others below -1."""
    each = [F.relu(1 - r).mean() + F.relu(1 + m).mean() for r, m in zip(real, made, strict=True)]
    return torch.stack(each).mean()


@dataclass(frozen=True)
class Drawn:
    """M pictures as hdb draws them: `latents` (M, c, h, w) float16, of which photographs they
    should be: `rows` (M,)."""

    latents: Tensor
    rows: Tensor


@torch.no_grad()
def read_drawn(build: Path, pictures: Photographs, latents: Latents, device: str) -> Drawn:
    """Return photographs as `tiny`, adapted to the person by a prediction from one portrait of
    them, makes them in its last steps, from as much noise as there is before those."""
    kept = build / "drawn.safetensors"
    if not kept.exists():
        base = open_base("tiny", device)
        backbone, (model, _) = check_drafts(base), load_predictor(base)
        times = backbone.times(SAMPLING.steps)[:-1].float()
        generator = torch.Generator().manual_seed(0)
        rows, parts = latents.draw(DRAWN, generator), []
        of = portraits_of(pictures, rows, generator)
        for part, portraits in zip(rows.split(AT_ONCE), of.split(AT_ONCE), strict=True):
            crops = list(pictures.pixels[portraits].permute(0, 2, 3, 1).numpy())
            theta = model(base.faces(crops))
            clean = latents.values[0, part].to(device).float()
            prompts = [prompt_of(group) for group in latents.captions(part, generator)]
            last = int(torch.randint(1, LAST + 1, (), generator=generator))
            with base.adapted(theta), half(torch.device(device)):
                clean = brought_back(backbone, clean, prompts, times[-last:], generator)
            parts.append(clean.half().cpu())
        save_tensors({"latents": torch.cat(parts), "rows": rows}, kept, {"format": "pt"})
    return Drawn(**load_file(kept))


def brought_back(
    backbone: Drafting,
    clean: Tensor,
    prompts: Sequence[str],
    times: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Put fresh noise of each of the `times` (K,) on latents (B, c, h, w) in turn, as drawing does,
    and return what the network makes of them at last."""
    for t in times.to(clean.device):
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        t = t.expand(len(clean))
        clean = backbone.split(clean, noise, t, backbone.predict(clean, prompts, noise, t))[0]
    return clean


def portraits_of(pictures: Photographs, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Return for each picture one portrait, of several a random one, of whom it shows."""
    by_person: dict[int, list[int]] = {}
    for row in (pictures.styles == PORTRAIT).nonzero().flatten().tolist():
        by_person.setdefault(int(pictures.people[row]), []).append(row)
    each = [by_person[person] for person in pictures.people[rows].tolist()]
    chosen = torch.rand(len(rows), generator=generator).tolist()
    return torch.tensor([own[int(k * len(own))] for own, k in zip(each, chosen, strict=True)])


def alike(
    true: Tensor, places: np.ndarray, made: Tensor, styles: Tensor, free: bool = False
) -> Callable[[Tensor], Tensor]:
    """Return how far pictures like those `made` (B, 3, S, S) are from the people on the true ones,
    by faces and by colours: see `hdbcli.training.likeness_loss`.

    The true faces lie at `places` (B, 5, 2). Those that were drawn from nothing but noise lie where
    they are found, or else there too; of these, no colours are compared in `styles` (B,) that are
    among ANY_COLOURS.
    """
    with torch.no_grad():
        theirs = sight(true, places)
    if free:
        places = places_of(made, places)
    coloured = torch.tensor([not free or style not in ANY_COLOURS for style in styles.tolist()])

    def far(images: Tensor) -> Tensor:
        return apart(sight(images, places), theirs, coloured).mean()

    return far
