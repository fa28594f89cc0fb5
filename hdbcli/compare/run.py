"""Let every method learn the same people and keep what it drew, as embeddings: the run of
`hdb compare`.

People learn side by side where a method allows it, which changes nothing for any of them but
rounding: many are computed in bfloat16 where one alone is not, and blocks of the 8-bit optimizer
may reach from one to the next. Seconds and memory are those of one person in a process of their own
(`timing`). A run that was cut off goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hdbcli import __version__
from hdbcli.compare.methods import Contender, entered
from hdbcli.config import CAPTIONS, PORTRAIT, PROMPTS, RefineConfig, Tell, unnamed
from hdbcli.errors import HdbError
from hdbcli.faces.embedding import embed, found
from hdbcli.measure.metrics import FACE, Judges
from hdbcli.method.hypernet import HyperNetwork
from hdbcli.model.base import Base, Worn
from hdbcli.model.sample import Picture, generate
from hdbcli.training import style_prior
from hdbcli.training.likeness_loss import CONTRAST
from hdbcli.training.people import People
from hdbcli.training.refine import Trial, train, weight_of
from registry.checkpoints.tensors import save_tensors
from registry.files import write_beside

SHOWN = 6  # people whose pictures are kept
MARKS = 8  # points of a curve, each half the steps of the next


@dataclass(frozen=True, eq=False)
class Arena:
    """What all contenders share: base, hypernetwork, people, metrics, and what nobody changed."""

    base: Base
    model: HyperNetwork | None  # of a base that has one
    given: tuple[np.ndarray, ...]  # each person's crop (S, S, 3) that methods learn from
    photos: tuple[np.ndarray, ...]  # another photo of each, or the same if there is one
    truth: Tensor  # (P, 128) embeddings of those
    same_photo: bool  # somebody has but one
    judges: Judges
    plain: np.ndarray  # (2 P, S, S, 3): prompts without [V], by the base
    batch: int  # samples a step, of every method
    key: str  # of all the above and of this hdb: others' records are not mistaken for its own
    predicted_key: str  # with the hypernetwork, on which some methods rest
    tell: Tell


def new_arena(
    base: Base,
    model: HyperNetwork | None,
    people: People,
    judges: Judges,
    batch: int | None,
    tell: Tell,
) -> Arena:
    """Take each person's first photo to learn from and the last to be measured on."""
    given = tuple(people.crops[theirs[0]] for theirs in people.members)
    photos = tuple(people.crops[theirs[-1]] for theirs in people.members)
    truth = embed(photos)
    plain = _plain(base, None, range(len(given)), tell)
    key = hashlib.sha256(base.injected.weights_digest().encode())
    key.update(truth.numpy().tobytes())
    for crop in given:
        key.update(crop.tobytes())
    batch = batch or base.spec.batch
    measures = sorted([*judges.texts, *(name for name in judges.persons if name != FACE)])
    key.update(repr((__version__, batch, measures, base.spec.sampling)).encode())
    own = key.hexdigest()[:12]
    for tensor in model.state_dict().values() if model else ():
        key.update(tensor.cpu().float().numpy().tobytes())
    predicted = key.hexdigest()[:12]
    one = any(len(theirs) < 2 for theirs in people.members)
    return Arena(base, model, given, photos, truth, one, judges, plain, batch, own, predicted, tell)


def compete(arena: Arena, contender: Contender, folder: Path) -> Record:
    """Let one method learn its people, groups of them at a time; a group done is not done again."""
    groups = []
    people = min(contender.people or len(arena.given), len(arena.given))
    key = arena.predicted_key if contender.predicted else arena.key
    size = contender.at_once(arena.base.spec.resolution)
    for start in range(0, people, size):
        persons = range(start, min(start + size, people))
        weight = weight_of(arena.base.spec, contender.likeness)
        settings = f"{contender.name}-{contender.steps}-{contender.lr:g}-{weight:g}"
        if weight and contender.steps:  # what another loss made is not taken for its own
            settings += f"-{CONTRAST:g}-{style_prior.WEIGHT * contender.predicted:g}"
        stem = f"{settings}-{key}-{start:04d}-{len(persons)}"
        groups.append(_group(arena, contender, persons, folder / f"{stem}.safetensors"))
    return _joined(groups)


@dataclass(frozen=True)
class Record:
    """What one method drew of P people at M marks: S captions, D texts a picture is scored against.

    Embeddings are of faces; `drift` is the mean change of a pixel, 0 to 255, in pictures whose
    prompt has no [V].
    """

    marks: Tensor  # (M,) steps
    portraits: Tensor  # (M, P, 128)
    prompted: Tensor  # (1 + S, P, 128), at the end
    found: Tensor  # (1 + S, P) whether the detector found a face
    drift: Tensor  # (P,)
    numbers: Tensor  # (1,) trained for one person
    texts: dict[str, Tensor]  # metric -> (1 + S, P, 1 + S)
    pictures: Tensor  # (1 + S, at most 6, S, S, 3) uint8
    persons: dict[str, Tensor] = field(default_factory=dict)  # metric -> (P,), of portraits


def marks_of(steps: int) -> list[int]:
    """Return the steps at which a method is looked at: 0, the end, and halves of halves of it."""
    return sorted({0} | {max(1, round(steps / 2**k)) for k in range(MARKS)} if steps else {0})


def _group(arena: Arena, contender: Contender, persons: range, file: Path) -> Record:
    if file.exists():
        return _read(file)
    base = arena.base
    faces = [base.faces([arena.given[p]]) for p in persons]
    latents = [base.backbone.encode_images(each.crops) for each in faces]
    lr, optimizer = max(contender.lr, 1e-12), contender.optimizer
    config = RefineConfig(contender.steps, lr=lr, batch=arena.batch, optimizer=optimizer)
    with entered(contender, base, arena.model, faces, arena.tell) as trial:
        marks, portraits = marks_of(contender.steps), []
        for step in _steps(base, trial, latents, config):
            arena.tell(contender.name, step, max(1, contender.steps))
            if step in marks:
                portraits.append(_draw(arena, trial.worn(), PORTRAIT, persons)[1])
        record = _final(arena, trial.worn(), persons, marks, torch.stack(portraits), trial.numbers)
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v for k, v in vars(record).items() if isinstance(v, Tensor)}
    tensors |= {f"text.{name}": scores for name, scores in record.texts.items()}
    tensors |= {f"person.{name}": scores for name, scores in record.persons.items()}
    with write_beside(file) as beside:
        save_tensors({k: v.contiguous() for k, v in tensors.items()}, beside)
    return record


def _steps(
    base: Base, trial: Trial, latents: Sequence[Tensor], config: RefineConfig
) -> Iterator[int]:
    yield 0
    if config.steps:
        for step in train(base, trial, latents, config):
            yield step.number


@torch.no_grad()
def _draw(
    arena: Arena, worn: Worn | None, prompt: str, persons: range
) -> tuple[list[Picture], Tensor, Tensor]:
    """Draw everybody once; return pictures, embeddings (P, 128) and whether a face was found."""
    base = arena.base
    drawn = generate(base, worn, prompt, list(persons), base.spec.sampling, arena.tell)
    faces = embed([picture.image for picture in drawn])
    return drawn, faces, found(faces)


def _final(
    arena: Arena,
    worn: Worn | None,
    persons: range,
    marks: Sequence[int],
    portraits: Tensor,
    numbers: int,
) -> Record:
    drawn = [_draw(arena, worn, prompt, persons) for prompt in PROMPTS]
    texts = [unnamed(prompt) for prompt in PROMPTS]
    scores = {
        name: torch.tensor([metric.score([p.image for p in row], texts) for row, _, _ in drawn])
        for name, metric in arena.judges.texts.items()
    }
    photos, portraits_drawn = [arena.photos[p] for p in persons], [p.image for p in drawn[0][0]]
    subjects = {
        name: torch.tensor(metric.score(portraits_drawn, photos)).diagonal()
        for name, metric in arena.judges.persons.items()
        if name != FACE  # which likeness is
    }
    ours = _plain(arena.base, worn, persons, arena.tell)
    pick = [2 * p + k for p in persons for k in range(2)]
    change = np.abs(ours.astype(np.float32) - arena.plain[pick].astype(np.float32))
    kept = [p for p in persons if p < SHOWN]
    pictures = [[row[p - persons.start].image for p in kept] for row, _, _ in drawn]
    side = arena.base.spec.resolution
    return Record(
        marks=torch.tensor(marks),
        portraits=portraits,
        prompted=torch.stack([faces for _, faces, _ in drawn]),
        found=torch.stack([found for _, _, found in drawn]),
        drift=torch.from_numpy(change.reshape(len(persons), -1).mean(1)),
        numbers=torch.tensor([numbers]),
        texts=scores,
        pictures=torch.from_numpy(
            np.array(pictures, np.uint8).reshape(len(PROMPTS), -1, side, side, 3)
        ),
        persons=subjects,
    )


def _plain(base: Base, worn: Worn | None, persons: range, tell: Tell) -> np.ndarray:
    """Draw two prompts without [V] for everybody: other people, whom an identity must leave
    alone."""
    prompts = [unnamed(prompt) for prompt in (PORTRAIT, CAPTIONS[1])]
    rows = [
        [p.image for p in generate(base, worn, prompt, list(persons), base.spec.sampling, tell)]
        for prompt in prompts
    ]
    return np.stack([image for pair in zip(*rows, strict=True) for image in pair])


def _read(file: Path) -> Record:
    try:
        tensors = load_file(file)
        texts, persons = (
            {k.removeprefix(kind): v for k, v in tensors.items() if k.startswith(kind)}
            for kind in ("text.", "person.")
        )
        rest = {k: v for k, v in tensors.items() if "." not in k}
        return Record(**rest, texts=texts, persons=persons)
    except (OSError, SafetensorError, TypeError) as error:
        raise HdbError(f"{file} is no record of hdb compare ({error}); delete it") from error


def _joined(groups: Sequence[Record]) -> Record:
    """Put groups of people side by side."""
    first = groups[0]

    def along(field: str, axis: int) -> Tensor:
        return torch.cat([getattr(group, field) for group in groups], axis)

    return Record(
        marks=first.marks,
        portraits=along("portraits", 1),
        prompted=along("prompted", 1),
        found=along("found", 1),
        drift=along("drift", 0),
        numbers=first.numbers,
        texts={k: torch.cat([group.texts[k] for group in groups], 1) for k in first.texts},
        pictures=along("pictures", 1),
        persons={k: torch.cat([group.persons[k] for group in groups]) for k in first.persons},
    )
