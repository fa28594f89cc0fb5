"""Let every method learn the same people and keep what it drew, as embeddings: the run of
`hdb compare`.

People learn side by side where a method allows it, which changes nothing for any of them but
rounding: many are computed in bfloat16 where one alone is not, and blocks of the 8-bit optimizer
may reach from one to the next. Seconds and memory are those of one person in a process of their own
(`timing`). A run that was cut off goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hdbcli import __version__
from hdbcli.compare.methods import Method
from hdbcli.config import CAPTIONS, PORTRAIT, PROMPTS, RefineConfig, Tell, unnamed
from hdbcli.faces.embedding import landmarks, recognisers
from hdbcli.measure.metrics import FACE, FaceMetric, Judges
from hdbcli.method.hypernet import HyperNetwork
from hdbcli.model.base import Adapter, Base
from hdbcli.model.sample import generate
from hdbcli.training import preservation
from hdbcli.training.likeness_loss import AHEAD, CELLS, CONTRAST, EARLY, RENEWED, STEPS
from hdbcli.training.people import People
from hdbcli.training.refine import train, weight_of
from registry.checkpoints.safetensors import read_tensors, save_tensors
from registry.errors import HdbError
from registry.files import write_beside
from registry.metric import Recogniser
from registry.spec import Drafting

SHOWN = 6  # people whose pictures are kept
_KINDS = ("faces", "texts", "persons")  # fields of a record with a tensor a measure
DRAWINGS = 4  # of each person and prompt, from noises of their own


@dataclass(frozen=True, eq=False)
class Setup:
    """What all methods share: base, hypernetwork, people, metrics, and pictures by the
    base alone."""

    base: Base
    model: HyperNetwork | None  # of a base that has one
    given: tuple[np.ndarray, ...]  # each person's crop (S, S, 3) that methods learn from
    photos: tuple[np.ndarray, ...]  # another photo of each, or the same if there is one
    truth: Mapping[str, Tensor]  # recogniser -> (P, D) embeddings of those
    same_photo: bool  # at least one person has one photo only
    judges: Judges
    recognisers: Mapping[str, Recogniser]  # dlib's first
    plain: np.ndarray  # (2 P, S, S, 3): prompts without [V], by the base
    batch: int  # samples a step, of every method
    key: str  # of all the above and of this hdb: others' records are not mistaken for its own
    predicted_key: str  # with the hypernetwork, on which some methods rest
    tell: Tell


def new_setup(
    base: Base,
    model: HyperNetwork | None,
    people: People,
    judges: Judges,
    batch: int | None,
    tell: Tell,
) -> Setup:
    """Take each person's first photo to learn from and the last to be measured on."""
    given = tuple(people.crops[theirs[0]] for theirs in people.members)
    photos = tuple(people.crops[theirs[-1]] for theirs in people.members)
    recognisers = {FACE: FaceMetric(), **judges.recognisers}
    truth = {name: torch.from_numpy(each.embed(photos)) for name, each in recognisers.items()}
    plain = _plain(base, None, range(len(given)), tell)
    key = hashlib.sha256(base.injected.weights_digest().encode())
    for embeddings in truth.values():
        key.update(embeddings.numpy().tobytes())
    for crop in given:
        key.update(crop.tobytes())
    batch = batch or base.spec.batch
    measures = sorted([*judges.texts, *(name for name in judges.persons if name != FACE)])
    backbone, sampling = base.backbone, base.spec.sampling
    # Where steps lie is not said by how many there are.
    times = backbone.times(sampling.steps).tolist() if isinstance(backbone, Drafting) else []
    key.update(repr((__version__, batch, measures, sampling, times, DRAWINGS)).encode())
    own = key.hexdigest()[:12]
    for tensor in model.state_dict().values() if model else ():
        key.update(tensor.cpu().float().numpy().tobytes())
    predicted = key.hexdigest()[:12]
    one = any(len(theirs) < 2 for theirs in people.members)
    shared = (base, model, given, photos, truth, one, judges, recognisers, plain, batch)
    return Setup(*shared, own, predicted, tell)


def run_method(setup: Setup, method: Method, folder: Path) -> Record:
    """Let one method learn its people, groups of them at a time; a group done is not done again."""
    groups = []
    people = min(method.people or len(setup.given), len(setup.given))
    key = setup.predicted_key if method.predicted else setup.key
    size = method.at_once(setup.base.spec.resolution)
    for start in range(0, people, size):
        persons = range(start, min(start + size, people))
        weight = weight_of(setup.base.spec, method.likeness)
        settings = f"{method.name}-{method.steps}-{method.lr:g}-{weight:g}"
        if weight and method.steps:  # what another loss made is not taken for its own
            asked = "-".join(
                ".".join([type(each).__name__, *map(str, each.compared)]) for each in recognisers()
            )
            settings += f"-{CONTRAST:g}-{asked}-{CELLS}-{STEPS}-{RENEWED}.{EARLY}-{AHEAD}"
        if method.preserves and method.steps:
            turns = repr(preservation.turns_of(method.predicted)).encode()
            held = preservation.WEIGHT, preservation.STYLES, preservation.SHIFT, preservation.STEPS
            settings += "".join(f"-{each:g}" for each in held)
            settings += f"-{hashlib.sha256(turns).hexdigest()[:6]}"
        stem = f"{settings}-{key}-{start:04d}-{len(persons)}"
        groups.append(_group(setup, method, persons, folder / f"{stem}.safetensors"))
    return _joined(groups)


@dataclass(frozen=True)
class Record:
    """What one method drew of P people at the end of its schedule: the portrait and S captions, K
    drawings of each.

    `drift` is the mean change of a pixel, 0 to 255, in pictures whose prompt has no [V].
    """

    steps: Tensor  # (1,) of the schedule
    faces: dict[str, Tensor]  # recogniser -> (1 + S, P, K, D), NaN without a face
    found: Tensor  # (1 + S, P, K) whether the detector found a face
    drift: Tensor  # (P,)
    numbers: Tensor  # (1,) trained for one person
    texts: dict[str, Tensor]  # metric -> (1 + S, P, K, 1 + S): against each prompt
    pictures: Tensor  # (1 + S, at most 6, S, S, 3) uint8, the first drawings
    persons: dict[str, Tensor] = field(default_factory=dict)  # metric -> (P,), of portraits


def _group(setup: Setup, method: Method, persons: range, file: Path) -> Record:
    if file.exists():
        return _read(file)
    base = setup.base
    faces = [base.faces([setup.given[p]]) for p in persons]
    latents = [each.latents for each in faces]
    lr, optimizer = max(method.lr, 1e-12), method.optimizer
    config = RefineConfig(method.steps, lr=lr, batch=setup.batch, optimizer=optimizer)
    with method.prepared(base, setup.model, faces, setup.tell) as trainable:
        for step in train(base, trainable, latents, config) if method.steps else ():
            setup.tell(method.name, step.number, method.steps)
        record = _final(setup, trainable.adapter(), persons, method.steps, trainable.numbers)
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v for k, v in vars(record).items() if isinstance(v, Tensor)}
    for kind in _KINDS:
        tensors |= {f"{kind}.{name}": rows for name, rows in getattr(record, kind).items()}
    with write_beside(file) as beside:
        save_tensors({k: v.contiguous() for k, v in tensors.items()}, beside)
    return record


@torch.no_grad()
def _draw(
    setup: Setup, adapter: Adapter | None, prompt: str, persons: range
) -> list[list[np.ndarray]]:
    """Draw each person K times: a list of K pictures for each person."""
    base, people = setup.base, len(setup.given)
    rounds = []
    for k in range(DRAWINGS):
        seeds = [person + k * people for person in persons]
        drawn = generate(base, adapter, prompt, seeds, base.spec.sampling, setup.tell)
        rounds.append([picture.image for picture in drawn])
    return [list(theirs) for theirs in zip(*rounds, strict=True)]


def _final(
    setup: Setup, adapter: Adapter | None, persons: range, steps: int, numbers: int
) -> Record:
    drawn = [_draw(setup, adapter, prompt, persons) for prompt in PROMPTS]
    flat = [image for prompted in drawn for theirs in prompted for image in theirs]
    shape = len(PROMPTS), len(persons), DRAWINGS
    texts = [unnamed(prompt) for prompt in PROMPTS]
    photos = [setup.photos[p] for p in persons]
    subjects = {
        name: torch.stack(
            [
                torch.tensor(metric.score(theirs, [photo])).mean()
                for theirs, photo in zip(drawn[0], photos, strict=True)
            ]
        )
        for name, metric in setup.judges.persons.items()
        if name not in setup.recognisers  # which get embeddings
    }
    ours = _plain(setup.base, adapter, persons, setup.tell)
    pick = [2 * p + k for p in persons for k in range(2)]
    change = np.abs(ours.astype(np.float32) - setup.plain[pick].astype(np.float32))
    kept = [p for p in persons if p < SHOWN]
    pictures = [[prompted[p - persons.start][0] for p in kept] for prompted in drawn]
    side = setup.base.spec.resolution
    return Record(
        steps=torch.tensor([steps]),
        faces={
            name: torch.from_numpy(each.embed(flat)).view(*shape, -1)
            for name, each in setup.recognisers.items()
        },
        found=torch.tensor([landmarks(image) is not None for image in flat]).view(shape),
        drift=torch.from_numpy(change.reshape(len(persons), -1).mean(1)),
        numbers=torch.tensor([numbers]),
        texts={
            name: torch.tensor(metric.score(flat, texts)).view(*shape, -1)
            for name, metric in setup.judges.texts.items()
        },
        pictures=torch.from_numpy(
            np.array(pictures, np.uint8).reshape(len(PROMPTS), -1, side, side, 3)
        ),
        persons=subjects,
    )


def _plain(base: Base, adapter: Adapter | None, persons: range, tell: Tell) -> np.ndarray:
    """Draw two prompts without [V] for each person: other people, whom an identity must
    leave alone."""
    prompts = [unnamed(prompt) for prompt in (PORTRAIT, CAPTIONS[1])]
    rows = [
        [p.image for p in generate(base, adapter, prompt, list(persons), base.spec.sampling, tell)]
        for prompt in prompts
    ]
    return np.stack([image for pair in zip(*rows, strict=True) for image in pair])


def _read(file: Path) -> Record:
    try:
        _, tensors = read_tensors(file)
        rest = {k: v for k, v in tensors.items() if "." not in k}
        measured: dict[str, dict[str, Tensor]] = {kind: {} for kind in _KINDS}
        for key in tensors.keys() - rest.keys():
            kind, _, name = key.partition(".")
            measured[kind][name] = tensors[key]
        return Record(**rest, **measured)  # type: ignore[arg-type]  # by names
    except (HdbError, TypeError) as error:
        raise HdbError(f"{file} is not a record of hdb compare ({error}); delete it") from error


def _joined(groups: Sequence[Record]) -> Record:
    """Put groups of people side by side."""
    first = groups[0]

    def along(field: str, axis: int) -> Tensor:
        return torch.cat([getattr(group, field) for group in groups], axis)

    def measured(kind: str, axis: int) -> dict[str, Tensor]:
        rows = [getattr(group, kind) for group in groups]
        return {name: torch.cat([row[name] for row in rows], axis) for name in rows[0]}

    return Record(
        steps=first.steps,
        faces=measured("faces", 1),
        found=along("found", 1),
        drift=along("drift", 0),
        numbers=first.numbers,
        texts=measured("texts", 1),
        pictures=along("pictures", 1),
        persons=measured("persons", 0),
    )
