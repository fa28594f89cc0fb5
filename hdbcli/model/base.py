"""A base model made ready: loaded, with LiDB layers on every target, and its hypernetwork
at hand."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hdbcli.config import PLACEHOLDER, Tell
from hdbcli.faces.embedding import traits
from hdbcli.limits import loading
from hdbcli.method.hypernet import Faces, HyperNetwork
from hdbcli.method.inject import Injected, inject, layers_in
from hdbcli.method.lidb import Factors, Theta, first_theta
from hdbcli.model.device import choose_device, give_back_memory, in_halves
from hdbcli.model.files import made_with, open_checkpoint
from hdbcli.model.hypernetwork_file import load_hypernetwork, targets_of
from hdbcli.model.memory import NORMAL, MemoryPlan, Work, choose, run_within
from hdbcli.model.quantise import quantise
from hdbcli.model.tokens import Tokens
from registry.checkpoints.ldm import canonical
from registry.errors import HdbError, UsageError
from registry.pixels import to_unit
from registry.plugins import find_base
from registry.spec import Backbone, BaseSpec, Frugal

SHORT = 256  # tokens: as fast there either way, and the layers below have fewer
_MARK = re.escape(PLACEHOLDER)

T = TypeVar("T")
Adapter: TypeAlias = Theta | Factors | Tokens


@dataclass(frozen=True, eq=False)
class Base:
    """A base model on its device, with LiDB layers on its targets."""

    spec: BaseSpec
    backbone: Backbone
    injected: Injected
    device: str
    plan: MemoryPlan = NORMAL
    notes: tuple[str, ...] = ()  # what of the plan could not be done

    def prompt(self, text: str) -> str:
        """Put the base's rare token where the user wrote [V], as a word of its own: in "a [V]man"
        it would be part of another."""
        apart = re.sub(rf"(?<=[\w\]])(?={_MARK})|(?<={_MARK})(?=\w)", " ", text)
        return apart.replace(PLACEHOLDER, self.spec.identifier)

    def first_theta(self, rank: int = 1, people: int = 1) -> Theta:
        """Return theta_0 of `people` people, all alike."""
        first = first_theta(len(self.injected.layers), self.spec.a, self.spec.b, rank)
        repeated = (core.repeat(people, 1, 1, 1) for core in (first.down, first.up))
        return Theta(*repeated).to(self.device)

    @contextmanager
    def adapted(self, adapter: Adapter | None) -> Iterator[None]:
        """Adapt the model inside the block: to a batch of people, to one for all samples,
        or not."""
        if isinstance(adapter, Tokens):
            with adapter.on(self.backbone):
                yield
        else:
            with self.injected.adapted(adapter):
                yield

    @functools.cached_property
    def latent_shape(self) -> tuple[int, ...]:
        """Return the shape (c, h, w) of a picture's latents, learned by encoding one."""
        side = self.spec.resolution
        with torch.no_grad():
            blank = torch.zeros(1, 3, side, side, device=self.device)
            return tuple(self.backbone.encode_images(blank).shape[1:])

    def free_autoencoder(self) -> None:
        """Let go of the autoencoder until it is needed again, if the plan is to save memory."""
        if self.plan.frugal and isinstance(self.backbone, Frugal):
            self.backbone.free_autoencoder()

    def short_attention(
        self, latents: Tensor, precision: str = "auto"
    ) -> AbstractContextManager[None]:
        """Train on latents (B, c, h, w) with plain attention where a CPU multiplies in bfloat16 and
        they have few tokens when the base first attends: torch's fused kernel takes several times
        as long backwards then, though not in float32."""
        tokens = latents[0, 0].numel() >> 2 * getattr(self.backbone, "halvings", 0)
        halves = in_halves(self.device, precision, latents)
        plain = self.device == "cpu" and halves and tokens <= SHORT
        return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()

    def images(self, crops: list[np.ndarray]) -> Tensor:
        """Stack uint8 crops (S, S, 3) as (B, 3, S, S) in -1..1 on the device."""
        stacked = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
        return to_unit(stacked).contiguous().to(self.device)

    def faces(self, crops: list[np.ndarray]) -> Faces:
        """Return aligned crops, their embeddings and their latents: what a hypernetwork reads and
        refinement learns from."""
        images = self.images(crops)
        with torch.no_grad():
            return Faces(images, self.embed(images), self.backbone.encode_images(images))

    @torch.no_grad()
    def through_autoencoder(self, crops: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Encode and decode uint8 crops (S, S, 3), one at a time: what latents keep of them."""
        latents = (self.backbone.encode_images(self.images([crop])) for crop in crops)
        return [self.backbone.decode_latents(each)[0] for each in latents]

    def embed(self, images: Tensor) -> Tensor:
        """Return what the face recognisers say (B, 256) of aligned images, with gradients."""
        return traits(images, np.array(self.spec.template))


def load_base(
    spec: BaseSpec, device: str, plan: MemoryPlan = NORMAL, targets_digest: str | None = None
) -> Base:
    """Load a base model as a plan holds it and put LiDB layers on its targets.

    Of several target sets the one with `targets_digest` is taken, which identities and
    hypernetworks name, else the spec's own.
    """
    if plan.quantised:
        give_back_memory()
    with loading():
        backbone = spec.load(device, plan.dtype)
    if plan.frugal and isinstance(backbone, Frugal):
        backbone.save_memory(plan.recompute)
    note = quantise(backbone.components.values(), plan.quantised) if plan.quantised else None
    spec = made_with(spec, layers_in(backbone.components, canonical), targets_digest)
    injected = inject(backbone.components, spec.targets, spec.a, spec.b, spec.basis_seed, canonical)
    if plan.dtype != NORMAL.dtype or plan.quantised:  # identities know it before any rounding
        injected = replace(injected, digest=open_checkpoint(spec).weights_digest())
    return Base(spec, backbone, injected, device, plan, (note,) if note else ())


def on_base(
    home: Base | BaseSpec,
    device: str | None,
    memory: str,
    work: Work,
    attempt: Callable[[Base], T],
    note: Callable[[str], None],
    tell: Tell,
    targets_digest: str | None = None,
    **advice: str,
) -> T:
    """Run an attempt at some work on a base that is loaded, or load one for it, with the targets of
    that digest, by the memory plan on which the work fits: out of memory, once more by the next
    smaller plan, or HdbError with the `advice`.

    What was chosen, and what of it cannot be done, is said by `note`.
    """
    if isinstance(home, Base):
        if device is not None and choose_device(device) != home.device:
            raise UsageError(f"the base is loaded on {home.device}; load it on {device} instead")
        return attempt(home)
    tell("load", 0, 1)
    chosen = choose_device(device)
    choice = choose(home, chosen, memory, work)
    note(choice.line)

    def run(plan: MemoryPlan) -> T:
        loaded = load_base(home, chosen, plan, targets_digest)
        for each in loaded.notes:
            note(f"warning: {each}")
        return attempt(loaded)

    return run_within(choice, run, note, **advice)


def open_base(name: str | None = None, device: str | None = None) -> Base:
    """Find a base model by name, None for the user's default, and load it on a device, with the
    targets of its hypernetwork if it has one."""
    spec = find_base(name)
    return load_base(spec, choose_device(device), targets_digest=targets_of(spec.hypernetwork))


def open_pair(
    name: str | None, device: str | None = None, needed: bool = True
) -> tuple[Base, HyperNetwork | None]:
    """Load a base model and its hypernetwork, or None where it has none and none is `needed`."""
    base = open_base(name, device)
    none = base.spec.hypernetwork is None and not needed
    return base, None if none else load_predictor(base)[0]


def load_predictor(base: Base) -> tuple[HyperNetwork, str]:
    """Load the base's hypernetwork and its digest; HdbError if it has none or it is
    another base's."""
    path = base.spec.hypernetwork
    if path is None or not path.exists():
        where = f" at {path}" if path else ""
        raise HdbError(
            f"base model {base.spec.name} has no hypernetwork{where}; train one, then: "
            f"hdb base set-hypernetwork {base.spec.name} FILE"
        )
    model, digest = load_hypernetwork(path)
    mine, theirs = base.injected.targets_digest(), model.config.targets_digest
    basis = base.injected.fingerprint().digest
    if mine != theirs or basis != model.config.basis_digest:
        raise HdbError(
            f"{path.name} was trained for {model.config.base} (targets {theirs[:12]}, basis "
            f"{model.config.basis_digest[:12]}), {base.spec.name} has {mine[:12]}, {basis[:12]}; "
            "train a hypernetwork for this base"
        )
    if model.config.resolution != base.spec.resolution:
        raise HdbError(
            f"{path.name} reads faces of {model.config.resolution} px, {base.spec.name} draws "
            f"{base.spec.resolution}; train a hypernetwork for this base"
        )
    model.to(base.device)
    if base.plan.quantised:
        _quantise_encoder(model, base.plan.quantised)
    return model, digest


def _quantise_encoder(model: HyperNetwork, kind: str) -> None:
    """Hold the wide layers of the face encoder in few bits.

    Without dropout training mode changes no number; in evaluation mode torch would hand the weights
    to a fused kernel that takes them for floats. A note is not needed: the base gave it.
    """
    quantise([layer for layer in model.encoder.layers], kind)
    model.encoder.train()
