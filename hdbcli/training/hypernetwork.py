"""Train the hypernetwork of a base model: the diffusion loss of each person under the
predicted theta.

HyperDreamBooth §3.3, eq. 4: the diffusion loss, and with a bank of optimised LiDBs beta times the
distance from them, taken between residuals, since factors are only defined up to a scale. The face
that is read and the face that is drawn are different photos of a person where there are two, so
that pose and light are not taken for identity. Pictures with captions of their own, the person in
a style, teach theta to serve every prompt. To prompts without "[V]", empty ones too, the
base shall answer as it does by itself: so what the identity changes is tied to "[V]", and guidance
enlarges it (prior preservation, DreamBooth §3.3). With a weight for it, portraits are drawn from
noise as well, and their distance from the person is a loss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hdbcli.config import PretrainConfig, Tell, unnamed
from hdbcli.method.hypernet import Faces, HyperConfig, HyperNetwork
from hdbcli.method.lidb import Theta
from hdbcli.model.base import Base
from hdbcli.model.device import ALONE, Workers, autocast, make_optimizer
from hdbcli.model.memory import Work
from hdbcli.training import objective
from hdbcli.training.batch import Batch, draw_batch
from hdbcli.training.likeness_loss import check_drafts
from hdbcli.training.loop import Plan, Step, averaged, averages_of, fit, settle
from hdbcli.training.objective import DRAWS, Portraits, weight_loss
from hdbcli.training.people import People, Rows
from hdbcli.training.questions import Samples
from registry.errors import HdbError
from registry.pixels import to_unit
from registry.spec import BaseSpec, passes_of

AVERAGE = 0.998

# A caller that looks at the model now and then is told (step, training loss since, model).
Watch = Callable[[int, float, HyperNetwork], object]


def work_of(spec: BaseSpec, config: PretrainConfig) -> Work:
    """Say what training asks of a base; all passes of a portrait are of one graph."""
    drafts = DRAWS * passes_of(spec.guidance) * bool(config.likeness)  # of a person
    samples = max(config.batch * DRAWS, -(-config.batch // config.share) * drafts)
    least = max(DRAWS, drafts)
    return Work(samples, spec.resolution, trains=True, exact=True, least=least)


def new_hypernetwork(
    base: Base,
    seed: int,
    iterations: int | None = None,
    recogniser: bool = True,
) -> HyperNetwork:
    """Build the untrained hypernetwork that fits a base: the paper's has k `iterations`, 1 being an
    ablation, and no `recogniser`."""
    injected = base.injected
    side = base.spec.resolution
    channels, cells, _ = base.latent_shape
    scale = side // cells
    config = HyperConfig(
        targets=len(injected.layers),
        a=base.spec.a,
        b=base.spec.b,
        targets_digest=injected.targets_digest(),
        base=base.spec.name,
        basis_digest=injected.fingerprint().digest,
        resolution=side,
        patch=max(side // 8, 2 * scale),  # the stem halves the cells of a small base's patch too
        scale=scale,
        channels=channels,
        iterations=iterations or HyperConfig.iterations,
        traits=HyperConfig.traits if recogniser else 0,
    )
    with torch.random.fork_rng(devices=[]):  # built on the CPU; GPUs are not to be woken for it
        torch.default_generator.manual_seed(seed)
        return HyperNetwork(config)


def pretrain(
    base: Base,
    model: HyperNetwork,
    people: People,
    config: PretrainConfig,
    tell: Tell,
    bank: Mapping[str, Theta] | None = None,
    workers: Workers = ALONE,
    watch: Watch | None = None,
) -> Iterator[Step]:
    """Train `model` in place; at the end it holds the moving average of its weights, and whenever
    `watch` looks."""
    if config.likeness:
        check_drafts(base)
    _check_captions(people, config.any_colours)
    known = None if bank is None else _known(bank, people, base.device)
    model.to(base.device).train()
    if not config.likeness:
        base.free_autoencoder()
    material = Material(people, known)
    parameters = dict(model.named_parameters())
    averages = averages_of(parameters)
    optimizer, used = make_optimizer(config.optimizer, parameters.values(), config.lr, 0.01)
    described = _described(base, model, material, config, used, workers.count)
    plan = Plan(
        config.steps,
        config.lr,
        warmup=100,
        average=AVERAGE,
        seed=config.seed,
        checkpoint_seconds=config.save_seconds,
        of=described,
    )
    steps = fit(
        parameters,
        partial(_losses, base, model, material, config, workers),
        optimizer,
        plan,
        averages,
        config.checkpoint,
        workers.share,
        writes=workers.rank == 0,
        agree=workers.agree,
    )
    since: list[float] = []  # losses since the last look
    with base.injected.adapted(None):
        for step in steps:
            since.append(step.loss)
            if watch and (step.number % config.look == 0 or step.number == step.steps):
                with averaged(parameters, averages):
                    watch(step.number, sum(since) / len(since), model.eval())
                model.train()
                since.clear()
                if not config.likeness:
                    base.free_autoencoder()  # which drew the portraits, and serves nothing else
            yield step
    settle(parameters, averages)
    model.eval()


def _check_captions(people: People, any_colours: Sequence[str]) -> None:
    """Raise HdbError for words that would leave out nothing, or everything."""
    for words in any_colours:
        if not words.strip() or not any(words in text for text in people.captions.values()):
            raise HdbError(
                f"no picture of these people has a caption with {words!r}; give --any-colours "
                "words of a caption, as they stand there"
            )


def _described(
    base: Base,
    model: HyperNetwork,
    material: Material,
    config: PretrainConfig,
    optimizer: str,
    processes: int,
) -> str:
    """Name all that decides the numbers of a run, but how many steps it takes, and the memory plan,
    which rounds only: a run that runs out of memory goes on with the next."""
    people, bank = material.people, material.known
    whose = people.names, people.members, people.styled, sorted(people.captions.items())
    facts = {
        "base": f"{base.spec.name} {base.injected.weights_digest()[:8]}",
        "start": _digest(*model.state_dict().values()),
        "people": f"{len(people.names)} {_digest(text=repr((people.digest, whose)))}",
        "bank": "none" if bank is None else _digest(bank.down, bank.up),
        "optimizer": optimizer,
        "processes": processes,
        **{
            k: getattr(config, k)
            for k in (
                *("seed", "lr", "batch", "beta", "prior", "likeness", "share", "precision"),
                "any_colours",
            )
        },
    }
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _digest(*tensors: Tensor, text: str = "") -> str:
    whole = hashlib.sha256(text.encode())
    for tensor in tensors:
        whole.update(tensor.detach().cpu().numpy().tobytes())
    return whole.hexdigest()[:8]


class Material(NamedTuple):
    """What training reads: people with their embeddings and latents, and the bank's theta of each.

    Rows are read when they are asked for: a process reads those of its own part of a batch.
    """

    people: People
    known: Theta | None  # the bank, person by person

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape (c, h, w) of a latent."""
        return _needed(self.people.latents).shape[2:]

    def images(self, rows: Tensor) -> Tensor:
        """Return crops (B, 3, S, S) in -1..1."""
        crops = torch.from_numpy(self.people.crops[rows.tolist()])
        return to_unit(crops.permute(0, 3, 1, 2))

    def traits(self, rows: Tensor) -> Tensor:
        """Return the recognisers' embeddings (B, 256)."""
        return torch.from_numpy(_needed(self.people.traits)[rows.tolist()])

    def latents(self, rows: Sequence[int]) -> Tensor:
        """Return latents (B, 2, c, h, w) float16, of crops and of their mirror images."""
        return torch.from_numpy(_needed(self.people.latents)[rows])


def _needed(rows: Rows | None) -> Rows:
    assert rows is not None, "people are to be encoded first: hdbcli.training.shards"
    return rows


def _losses(
    base: Base,
    model: HyperNetwork,
    material: Material,
    config: PretrainConfig,
    workers: Workers,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """Yield the parts of the loss of one batch, drawn from the generator: it is taken in
    `config.accumulate` parts, each of which needs the memory of its own people alone."""
    # Every process draws the batch of all and takes its part: N processes are one with N times the
    # batch.
    whole = draw_batch(material.people, config.batch * workers.count, generator)
    batch = whole.part(slice(workers.rank, None, workers.count))
    served, weight = share_out(config.batch, workers, config.share)
    size = -(-config.batch // config.accumulate)
    for first in range(0, config.batch, size):
        part = batch.part(slice(first, first + size))
        some = min(max(served - first, 0), len(part.person))  # the first of all are served
        share = some / served * weight if served else 0.0
        yield from _part_losses(base, model, material, config, part, some, share)


def _part_losses(
    base: Base,
    model: HyperNetwork,
    material: Material,
    config: PretrainConfig,
    batch: Batch,
    some: int,
    share: float,
) -> Iterator[Tensor]:
    """Yield what some people of a batch add to its loss.

    The first `some` have portraits drawn and others left alone, which counts `share` of what the
    whole batch's do. Gradients gather at theta, and go through the hypernetwork once, at the end.
    """
    device, precision = base.device, config.precision
    mirrored = batch.mirror < 0.5
    counts = len(mirrored) / config.batch
    noise = batch.noises(material.shape)

    def seen(rows: Tensor, turned: Tensor) -> Tensor:
        images = material.images(rows)
        return torch.where(turned.view(-1, 1, 1, 1), images.flip(-1), images).to(device)

    def encoded(rows: Tensor, turned: Tensor) -> Tensor:
        both = material.latents(rows.tolist())
        return both[torch.arange(len(rows)), turned.long()].float().to(device)

    # Only what the hypernetwork reads is read from the files.
    unread, traits = torch.empty(0), material.traits(batch.read).to(device)
    if model.reads_latents:
        faces = Faces(unread, traits, encoded(batch.read, mirrored))
    else:
        faces = Faces(seen(batch.read, mirrored), traits, unread)
    with autocast(device, precision), base.short_attention(noise.flatten(0, 1), precision):
        theta = model(faces)

    # Samples lie people fastest: the order in which the layer deals out identities.
    def samples(drawn: Tensor, captions: Sequence[str]) -> Samples:
        count, rows = len(drawn), drawn.T.flatten()
        return Samples(
            encoded(rows, mirrored[:count].repeat(DRAWS)),
            [base.prompt(caption) for caption in captions],
            noise[:count].transpose(0, 1).flatten(0, 1).to(device),
            batch.t[:count].T.flatten().to(device),
        )

    leaf = theta.as_leaves()
    own = samples(batch.drawn, material.people.caption(batch.drawn))
    yield from objective.diffusion(base, leaf, own, counts, precision)
    if some and config.prior:
        others, empty = batch.others[:some], batch.empty[:some].T.flatten()
        captions = [
            "" if each else unnamed(caption)
            for each, caption in zip(empty, material.people.caption(others), strict=True)
        ]
        asked, weight = samples(others, captions), share * config.prior
        yield from objective.prior(base, leaf[:some], asked, weight, precision)
    if some and config.likeness:
        drawn = batch.drawn[:some]
        rows, captions = drawn.T.flatten(), material.people.caption(drawn)
        chance = [any(part in caption for part in config.any_colours) for caption in captions]
        portraits = Portraits(
            [base.prompt(caption) for caption in captions],
            noise[:some].transpose(0, 1).flatten(0, 1).to(device),
            seen(rows, mirrored[:some].repeat(DRAWS)),
            ~torch.tensor(chance),
        )
        weight = share * config.likeness
        yield from objective.likeness(base, leaf[:some], portraits, weight, precision)
    if material.known is not None:
        far = weight_loss(leaf, material.known[batch.person.to(device)])
        yield counts * config.beta * far.mean()
    theta.backward(leaf)


def share_out(batch: int, workers: Workers, share: int) -> tuple[int, float]:
    """Return how many of this process's people have portraits drawn and others left alone, one in
    `share` of all people's, and what a mean over them counts beside the other processes'."""
    total = -(-batch * workers.count // share)
    mine = len(range(workers.rank, total, workers.count))
    return mine, mine * workers.count / total


def _known(bank: Mapping[str, Theta], people: People, device: str) -> Theta:
    """Put the bank in the order of the people; HdbError if a person is not in it."""
    missing = [name for name in people.names if name not in bank]
    if missing:
        raise HdbError(
            f"{len(missing)} of {len(people.names)} people are not in the bank, {missing[0]} for "
            "one; run hdb train bank on the same folder"
        )
    chosen = [bank[name] for name in people.names]
    return Theta(
        torch.cat([theta.down for theta in chosen]).to(device),
        torch.cat([theta.up for theta in chosen]).to(device),
    )
