"""The likeness loss: draw the person in a few steps, and ask face recognisers how far they are from
the true picture.

    loss = sum_r ( | e(x) - e(y) |^2  +  mean_b | f_b(x) - f_b(y) |^2 / | f_b(y) |^2 )
           +  | m(x) - m(y) |^2

of a drawn picture x and the true one y: of every recogniser r its embeddings e and the features f
of three blocks b on the way to them, in coarse cells; and the colours m of the middle of the
picture, coarse as a mosaic. An embedding alone can be met by marks that no person takes for a
likeness. Features hardly can, and what fools one recogniser does not fool two: one that is not
asked sees more of the person. None of them sees colours: alone they gave all people one complexion
and blue eyes. And faces in a haze please them: with half the contrast of true ones, eyes and
glasses gone. So contrast is compared in the same cells.

Where every step of drawing starts from fresh noise, the first ones decide who is drawn, and the
last only sharpen: asked of those, faces came out carved from wood. So there the loss looks at what
the network makes of the picture earlier on, which is blurred, and leaves contrast alone.

Not in HyperDreamBooth. The diffusion loss never sees a picture drawn from noise, where small errors
of every step add up to another person; this one goes through the drawing itself, as PuLID does with
a distilled model (Guo et al. 2024, §3.3).

Pictures are drawn by DDIM's deterministic steps (Song et al. 2021, eq. 12), or by fresh noise in
every step where the base's own scheduler renews it, as that of consistency models does. Gradients
pass through the last step alone: what lies before it changes the picture as much, but its gradient
adds nothing but seconds (Clark et al. 2024, DRaFT-1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hdbcli.config import PORTRAIT
from hdbcli.faces.embedding import recognisers
from hdbcli.faces.photo import find_points
from hdbcli.method.hypernet import Faces
from hdbcli.method.lidb import Factors, Theta
from hdbcli.model.base import Base
from hdbcli.model.device import autocast
from hdbcli.training.questions import Question, Samples, joined, pairs_at_once
from registry.errors import HdbError
from registry.pixels import to_pixels
from registry.seeds import generator_of
from registry.spec import NOISIEST, Drafting, passes_of

STEPS = 4
RENEWED, EARLY = 6, 5  # steps where noise is renewed, and after how many of them it looks
AHEAD = 8  # steps of refinement whose drafts are begun together, in half the time
SHARE = 4  # one sample in SHARE of a step is drawn from noise too, which costs several passes
CELLS = 4  # a side of a face's features
CONTRAST = 0.2  # its weight, so that it counts about as much as colours do


def likeness(
    base: Base,
    prompts: Sequence[str],
    noise: Tensor,
    true: Tensor,
    precision: str = "auto",
    coloured: Tensor | None = None,
) -> Question:
    """Draw faces up to the last step, and ask for the losses (B,).

    `noise` (B, c, h, w) is what they are drawn from, `true` (B, 3, S, S) the aligned pictures in
    -1..1, whose colours count as `apart` says; B is a multiple of the people whom the base is
    adapted to, who lie fastest.
    """
    last = _begun(base, prompts, noise, precision)
    # Faces are looked for, in what is drawn too: in some styles they lie elsewhere.
    true_places = places_of(true, np.array(base.spec.template))
    seen = _seen(base, true, true_places, precision)
    return _compared(base, last, seen, true_places, precision, coloured, finds=True)


def _begun(base: Base, prompts: Sequence[str], noise: Tensor, precision: str = "auto") -> Samples:
    """Draw up to the step that is looked at, and return what that asks."""
    backbone, guidance = check_drafts(base), base.spec.guidance
    steps, taken = (RENEWED, EARLY) if backbone.renews else (STEPS, STEPS)
    with autocast(base.device, precision, noise):
        return before_last(backbone, prompts, noise, steps, guidance, taken)


def _compared(
    base: Base,
    last: Samples,
    true: Sight,
    places: np.ndarray,
    precision: str = "auto",
    coloured: Tensor | None = None,
    finds: bool = False,
) -> Question:
    """Ask how far the pictures are that the last step leads to, finished ones in contrast too.

    The five points of their faces lie at `places`, or where it `finds` them in what is drawn.
    """
    backbone, guidance = check_drafts(base), base.spec.guidance

    def far(answer: Tensor) -> Tensor:
        drawn = picture(backbone, last, answer, guidance)
        with autocast(base.device, precision):
            made = backbone.decode(drawn)
            seen = sight(made, places_of(made, places) if finds else places)
            if backbone.renews:
                return apart(seen, true, coloured)
            hazy = (seen.contrast - true.contrast).square().mean((1, 2, 3))
            return apart(seen, true, coloured) + CONTRAST * hazy

    return Question(last, far)


@torch.no_grad()
def _seen(base: Base, true: Tensor, places: np.ndarray, precision: str = "auto") -> Sight:
    with autocast(base.device, precision):
        return sight(true, places)


def portrait_likeness(
    base: Base, faces: Sequence[Faces], weight: float
) -> Callable[[Theta | Factors | None, torch.Generator, int, int], Question]:
    """Return what asks for the loss of a step for P people, person p by row p of the adapter: the
    weighted distance of their portraits from the faces on their photos, in turn.

    It takes their adapter, and the step's generator, batch and number; all people's portraits
    start from the same noise. Portraits of up to AHEAD steps are begun together, as the people are
    then.
    """
    check_drafts(base)
    shape, prompt = faces[0].latents.shape[1:], base.prompt(PORTRAIT)
    template = np.array(base.spec.template)
    seen = [_seen(base, each.crops, template) for each in faces]
    begun: list[Samples] = []  # of this step and the next ones
    # Noise has a generator of its own, so that no other changes with how many steps fit together.
    starts: torch.Generator | None = None

    def question(
        adapter: Theta | Factors | None, generator: torch.Generator, batch: int, turn: int
    ) -> Question:
        nonlocal starts
        count = portraits_of(batch)
        if starts is None:
            starts = generator_of(int(torch.randint(2**31, (), generator=generator)))
        if not begun:
            fits = pairs_at_once(base, len(faces), faces[0].latents)
            ahead = max(1, min(AHEAD, fits // count))
            noise = torch.randn((ahead * count, *shape), generator=starts)
            noise = noise.repeat_interleave(len(faces), 0).to(base.device)
            with base.adapted(adapter):
                drafts = _begun(base, [prompt] * len(noise), noise)
            rows = torch.arange(len(drafts.clean)).view(-1, ahead, count * len(faces))
            begun.extend(drafts.part(rows[:, k].flatten().tolist()) for k in range(ahead))
        own = [(each, (turn + k) % len(each.colours)) for k in range(count) for each in seen]
        far = _compared(base, begun.pop(0), joined_rows(own), template)
        return far.weighed(weight / count)

    return question


def portraits_of(batch: int) -> int:
    """Return how many portraits of a person are drawn in a step of so many samples."""
    return max(1, batch // SHARE)


def check_drafts(base: Base) -> Drafting:
    """Return the backbone that draws with gradients; HdbError if this base's does not."""
    if not isinstance(base.backbone, Drafting):
        raise HdbError(
            f"base model {base.spec.name} cannot draw with gradients; leave --likeness out"
        )
    return base.backbone


class Sight(NamedTuple):
    """What is compared of B pictures: the recognisers' embeddings (B, 128) of the faces on them,
    what these make on the way there (B, c, CELLS, CELLS), and colours (B, 3, 8, 8) and contrast
    (B, 1, 8, 8) of the pictures' middle."""

    embeddings: tuple[Tensor, ...]
    features: tuple[Tensor, ...]
    colours: Tensor
    contrast: Tensor


def joined_rows(chosen: Sequence[tuple[Sight, int]]) -> Sight:
    """Put together one picture of each of some sights, named by its row."""

    def joined(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([part[row] for part, (_, row) in zip(parts, chosen, strict=True)])

    of = [sight for sight, _ in chosen]
    return Sight(
        tuple(map(joined, zip(*(each.embeddings for each in of), strict=True))),
        tuple(map(joined, zip(*(each.features for each in of), strict=True))),
        joined([each.colours for each in of]),
        joined([each.contrast for each in of]),
    )


def sight(images: Tensor, places: np.ndarray) -> Sight:
    """See pictures (B, 3, S, S) in -1..1, with gradients, whose faces' five points lie at `places`
    (5, 2) or (B, 5, 2) in 0..1."""
    embeddings: list[Tensor] = []
    features: list[Tensor] = []
    for recogniser in recognisers(str(images.device)):
        made = list(recogniser.features(recogniser.chips(images, places)))
        embeddings.append(recogniser.embedding(made[-1]).to(images.device))
        for block in recogniser.compared:
            cells = F.adaptive_avg_pool2d(made[block].float(), CELLS)
            features.append(cells.to(images.device))
    return Sight(tuple(embeddings), tuple(features), mosaic(images), contrast(images))


def places_of(images: Tensor, otherwise: np.ndarray) -> np.ndarray:
    """Find the five points (B, 5, 2) in 0..1 of the largest face of each picture (B, 3, S, S) in
    -1..1; where no face is found they lie as `otherwise` says, (5, 2) or (B, 5, 2)."""
    pixels = to_pixels(images).permute(0, 2, 3, 1).cpu().contiguous()
    found = map(find_points, pixels.numpy())
    known = np.broadcast_to(otherwise, (len(images), 5, 2))
    side = images.shape[-1]
    places = [own if new is None else new / side for own, new in zip(known, found, strict=True)]
    return np.stack(places)


def apart(mine: Sight, true: Sight, coloured: Tensor | None = None) -> Tensor:
    """Return how far the people on B pictures are from those on the true ones (B,), the contrast
    aside; colours count only where they are `coloured` (B,), if that is given."""
    far = (mine.colours - true.colours).square().mean((2, 3)).sum(1)
    if coloured is not None:
        far = far * coloured.to(far)
    for own, theirs in zip(mine.embeddings, true.embeddings, strict=True):
        far = far + (own - theirs).square().sum(1)
    for own, theirs in zip(mine.features, true.features, strict=True):
        away = (own - theirs).square().mean((1, 2, 3)) / theirs.square().mean((1, 2, 3))
        far = far + away * len(true.embeddings) / len(true.features)
    return far


def mosaic(images: Tensor) -> Tensor:
    """Return the means of the middle half of pictures (B, c, S, S) in 8 x 8 cells: of colours, or
    of whatever a pixel has."""
    return F.adaptive_avg_pool2d(images.float(), 16)[:, :, 4:12, 4:12]


def contrast(images: Tensor) -> Tensor:
    """Return how strong fine detail is in the same cells (B, 1, 8, 8): the logarithm, so that dark
    faces count as bright ones do, of the root mean square of what a blur over S / 32 pixels takes
    off the brightness of pictures (B, 3, S, S)."""
    bright = images.float().mean(1, keepdim=True)
    reach = images.shape[-1] // 64
    blurred = F.avg_pool2d(F.pad(bright, (reach,) * 4, mode="replicate"), 2 * reach + 1, 1)
    return 0.5 * (mosaic((bright - blurred).square()) + 1e-4).log()  # -4.6 where there is none


@torch.no_grad()
def before_last(
    backbone: Drafting,
    prompts: Sequence[str],
    noise: Tensor,
    steps: int,
    guidance: float,
    taken: int | None = None,
) -> Samples:
    """Take all steps but the last, from noise (B, c, h, w), or but the last of those `taken`, and
    return what that one asks: B samples, or twice as many with guidance, "" first."""
    clean, rest = torch.zeros_like(noise), noise
    times = backbone.times(steps).clamp(max=NOISIEST).to(noise)
    for number, t in enumerate(times[: taken or steps], 1):
        samples = Samples(clean, prompts, rest, t.expand(len(noise)))
        if passes_of(guidance) == 2:
            samples = joined([samples._replace(prompts=[""] * len(noise)), samples])
        if number < (taken or steps):
            clean, rest = _split(backbone, samples, backbone.predict(*samples), guidance)
            rest = noise.roll(number, 1) if backbone.renews else rest
    return samples


def picture(backbone: Drafting, last: Samples, answer: Tensor, guidance: float) -> Tensor:
    """Return the latents (B, c, h, w) that the network holds for the picture when it answers the
    last step."""
    return _split(backbone, last, answer, guidance)[0]


def draft(
    backbone: Drafting, prompts: Sequence[str], noise: Tensor, steps: int, guidance: float
) -> Tensor:
    """Draw latents (B, c, h, w) in a few steps from noise of that shape."""
    last = before_last(backbone, prompts, noise, steps, guidance)
    return picture(backbone, last, backbone.predict(*last), guidance)


def _split(
    backbone: Drafting, samples: Samples, answer: Tensor, guidance: float
) -> tuple[Tensor, Tensor]:
    """Return what the guided answer says: the picture, and the noise."""
    clean, _, noise, t = samples
    if passes_of(guidance) == 2:
        away, towards = answer.chunk(2)
        answer = away + guidance * (towards - away)
        clean, noise, t = (each.chunk(2)[0] for each in (clean, noise, t))
    return backbone.split(clean, noise, t, answer)
