"""Fast fine-tuning: a few dozen iterations of diffusion loss on the crops, from a predicted and
relaxed theta.

HyperDreamBooth §3.4; the paper takes 40 iterations on "a [V] face". P people are refined side by
side through the per-sample layer, each as if alone but for rounding: same noise, nothing shared.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from hdbcli.config import PORTRAIT, RefineConfig, Tell
from hdbcli.method.hypernet import Faces
from hdbcli.method.lidb import Factors, Theta, pack, unpack
from hdbcli.model.base import Adapter, Base
from hdbcli.model.device import make_optimizer
from hdbcli.model.tokens import Tokens
from hdbcli.training.likeness_loss import portrait_likeness
from hdbcli.training.loop import Plan, Step, averages_of, fit, settle
from hdbcli.training.preservation import preservation
from hdbcli.training.questions import Question, Samples, answers, ask, diffusion, joined
from registry.errors import HdbError
from registry.spec import NOISIEST, BaseSpec

# (generator, batch, step) -> what a step of P people asks besides the diffusion loss
MoreQuestions: TypeAlias = Callable[[torch.Generator, int, int], Iterator[Question]]

AVERAGE = 0.9  # of a LiDB: a step learns from one portrait and two noises, and sways with them
PAIRS = 16  # (timestep, noise) pairs that the loss is reported on
PAIRS_SEED = 0


@dataclass(frozen=True)
class Trainable:
    """What a method trains for P people, `numbers` each, and the adapter it makes at this moment.

    LiDB here, the other methods in `compare.baselines`: the loop is one.
    """

    people: int
    parameters: Mapping[str, Tensor]
    adapter: Callable[[], Adapter | None]
    numbers: int
    more_questions: MoreQuestions | None = None
    prior: Callable[[torch.Generator, int], Samples] | None = None  # as many more, one person's
    average: float = 0.0  # decay of the moving average that is kept at the end; 0 keeps the last


@dataclass(frozen=True)
class Refined:
    """What refinement made, and each person's loss (P,) before and after on the same pairs."""

    theta: Theta
    loss_start: Tensor
    loss_end: Tensor
    optimizer: str


def refine(
    base: Base,
    theta: Theta,
    latents: Sequence[Tensor],
    config: RefineConfig,
    tell: Tell,
    faces: Sequence[Faces] | None = None,
) -> Refined:
    """Train theta of P identities, person p on the latents (N_p, c, h, w) of their crops; with the
    faces on them, preserve other prompts too, and learn likeness as the config weighs it."""
    trainable = trainable_lidb(base, theta)
    if faces is not None:
        trainable = with_losses(base, trainable, faces, config.likeness, config.predicted)
    _check(trainable, latents)
    optimizer, label = optimizer_of(trainable, config)
    tell("refine", 0, config.steps)
    start = portrait_loss(base, theta, latents)
    for step in train(base, trainable, latents, config, optimizer):
        tell("refine", step.number, step.steps)
    with torch.no_grad():
        refined = trainable.adapter()
    assert isinstance(refined, Theta)
    return Refined(refined, start, portrait_loss(base, refined, latents), label)


def optimizer_of(trainable: Trainable, config: RefineConfig) -> tuple[torch.optim.Optimizer, str]:
    """Return what trains a method, and the name of what it really is."""
    return make_optimizer(config.optimizer, trainable.parameters.values(), config.lr)


def trainable_lidb(base: Base, theta: Theta) -> Trainable:
    """Train the cores, as one flat parameter."""
    flat = pack(theta).detach().clone().requires_grad_(True)
    targets, spec = len(base.injected.layers), base.spec

    def adapter() -> Theta:
        return unpack(flat, targets, spec.a, spec.b)

    return Trainable(len(flat), {"theta": flat}, adapter, flat.shape[1], average=AVERAGE)


def weight_of(spec: BaseSpec, likeness: float | None) -> float:
    """Return what likeness weighs in refinement: what was asked for, or else the base's own."""
    return spec.likeness if likeness is None else likeness


def with_losses(
    base: Base,
    trainable: Trainable,
    faces: Sequence[Faces],
    likeness: float | None,
    predicted: bool = True,
    preserves: bool = True,
) -> Trainable:
    """Add the likeness loss and prior preservation to a method that trains thetas, plain factors or
    all weights; the last has a prior of its own instead of preservation.

    A likeness of None is weighed as the base's spec says, which may be 0. `predicted` says that it
    starts from a prediction, whose styles are held.
    """
    weight = weight_of(base.spec, likeness)

    def factors() -> Factors | None:
        adapter = trainable.adapter()
        assert not isinstance(adapter, Tokens)
        return base.injected.factors(adapter) if isinstance(adapter, Theta) else adapter

    alike = portrait_likeness(base, faces, weight) if weight else None
    start = factors() if preserves else None
    kept = None
    if start is not None:
        photos = torch.stack([each.latents[0] for each in faces])
        kept = preservation(base, start, photos, predicted, weight)
    if alike is None and kept is None:
        return trainable

    def more_questions(generator: torch.Generator, batch: int, turn: int) -> Iterator[Question]:
        if alike is not None:
            with torch.no_grad():
                now = factors()
            yield alike(now, generator, batch, turn)
        if kept is not None:
            yield kept(turn)

    return replace(trainable, more_questions=more_questions)


def train(
    base: Base,
    trainable: Trainable,
    latents: Sequence[Tensor],
    config: RefineConfig,
    optimizer: torch.optim.Optimizer | None = None,
) -> Iterator[Step]:
    """Run the iterations on "a [V] face", yielding after each; the optimizer is the config's. At
    the end a method that keeps its moving average has it."""
    _check(trainable, latents)
    optimizer = optimizer or optimizer_of(trainable, config)[0]
    batch = config.batch or base.spec.batch
    turns = itertools.count()
    people = trainable.people + (trainable.prior is not None)
    size = max(1, (base.plan.at_once or batch * people) // people)

    def losses(generator: torch.Generator) -> Iterator[Tensor]:
        noise = torch.randn((batch, *latents[0].shape[1:]), generator=generator)
        t = draw_times(batch, generator)
        turn = next(turns)
        more = trainable.more_questions
        asked = [] if more is None else [*more(generator, batch, turn)]
        prior = None if trainable.prior is None else trainable.prior(generator, batch)
        for first in range(0, batch, size):
            part = slice(first, first + size)
            samples = _samples(base, latents, noise[part], t[part], turn + first)
            if prior is not None:
                samples = joined([samples, prior.part(part)])
            asked.append(diffusion(base.backbone, samples).weighed(1 / batch))
        yield from ask(base, trainable.adapter, asked)

    keep, parameters = trainable.average, trainable.parameters
    averages = averages_of(parameters) if keep else None
    plan = Plan(
        config.steps, config.lr, warmup=3, decay=0.5, clip=None, average=keep, seed=config.seed
    )
    for step in fit(parameters, losses, optimizer, plan, averages):
        if averages is not None and step.number == step.steps:
            settle(parameters, averages)
        yield step


def draw_times(count: int, generator: torch.Generator) -> Tensor:
    """Draw a time (count,) in each of `count` equal parts of 0..1, bent towards the noise.

    Identity matters where noise hides it: on `tiny` 97 % of what an identity takes off the
    loss lies at t > 0.6, nothing at t < 0.4. The density is 3 t^2; equal parts make the gradient
    less noisy.
    """
    part = torch.arange(count) + torch.rand(count, generator=generator)
    return ((part / count) ** (1 / 3)).clamp(max=NOISIEST)


@torch.no_grad()
def portrait_loss(
    base: Base, adapter: Adapter | None, latents: Sequence[Tensor], pairs: int | None = None
) -> Tensor:
    """Return each person's diffusion loss (P,) of "a [V] face", the mean over fixed pairs."""
    pairs = pairs or PAIRS
    generator = torch.Generator().manual_seed(PAIRS_SEED)
    noise = torch.randn((pairs, *latents[0].shape[1:]), generator=generator)
    t = ((torch.arange(pairs) + 0.5) / pairs)[torch.randperm(pairs, generator=generator)]
    people = len(latents)
    question = diffusion(base.backbone, _samples(base, latents, noise, t, 0))
    told = question.loss(answers(base, adapter, question.samples, people))
    return told.view(pairs, people).mean(0).cpu()


def _check(trainable: Trainable, latents: Sequence[Tensor]) -> None:
    if len(latents) != trainable.people:
        raise HdbError(f"{trainable.people} people are trained, on photos of {len(latents)}")


def _samples(
    base: Base, latents: Sequence[Tensor], noise: Tensor, t: Tensor, first: int
) -> Samples:
    """Put pair k before person p, K P samples, k counted from `first`: noise (K, c, h, w) and
    t (K,) serve all people.

    Person p is drawn from their photos in turn; the caller moves on from step to step, by one, so
    that every photo gets every part of the times. Samples lie pair by pair, people fastest: the
    order in which the layer deals out P identities.
    """
    people = len(latents)
    clean = torch.stack(
        [each[k % len(each)] for k in range(first, first + len(t)) for each in latents]
    )
    noise = noise.to(clean).repeat_interleave(people, 0)
    times = t.to(clean.device).repeat_interleave(people)
    prompts = [base.prompt(PORTRAIT)] * len(clean)
    return Samples(clean, prompts, noise, times)
