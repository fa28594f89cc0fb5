"""The identity file: one person in one small safetensors file that says all about itself.

Two tensors hold the numbers, `down` and `up`, in the spec's target order; the metadata hold the
rest. It holds no path, no photo and no source-file name. A digest over tensors and metadata
makes an edit by hand visible; it is not a signature.

Letters: L targets, r rank, a numbers of the down side, b of the up side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hdbcli.config import RefineConfig
from hdbcli.method.basis import PROBE_TOLERANCE, Fingerprint
from hdbcli.method.lidb import Theta
from hdbcli.model.base import Base
from registry.checkpoints.safetensors import (
    DTYPE_BYTES,
    MAX_FILE,
    NUMBERS,
    header_bytes,
    laid_out,
    read_header,
    tensor_of,
)
from registry.errors import HdbError, UsageError
from registry.files import Taken, keep_elsewhere, write_kept
from registry.identity_facts import (
    LAYOUTS,
    Facts,
    Layout,
    content_digest,
    metadata_of,
    parse_facts,
    read_content,
    read_facts,
)
from registry.spec import BaseSpec

_NAMES = {f"torch.{kind}": name for name, kind in NUMBERS.items()}
# The facts that say which base an identity is of.
HOME = (
    *("base", "family", "base_digest", "targets_digest"),
    *("scheme", "seed", "basis_digest", "probes"),
)

HEADER = 1500  # bytes; 1,304 with the longest name of a base
BY_DEFAULT = ("fp16", "int8")  # the finer first; fp32 is finer than training is


@dataclass(frozen=True, eq=False)
class Identity:
    """One person: what the file says of them, and the cores of every target."""

    facts: Facts
    down: Tensor  # (L, r, a) float32
    up: Tensor  # (L, b, r) float32

    @property
    def rank(self) -> int:
        """Return r."""
        return self.down.shape[1]

    @property
    def numbers(self) -> int:
        """Count the trained numbers."""
        return self.down.numel() + self.up.numel()

    @property
    def theta(self) -> Theta:
        """Return the numbers as a batch of one."""
        return Theta(self.down[None], self.up[None])

    def saying(self, **facts: Any) -> Identity:
        """Return the same numbers with some facts changed."""
        return replace(self, facts=replace(self.facts, **facts))


def save(identity: Identity, path: Path, dtype: str = "fp16", new: bool = False) -> int:
    """Write an identity as `encode` gives it and return its bytes.

    Raises HdbError as that does, and if the file is to be `new` and there is one by then. Where the
    file cannot be written the identity is kept elsewhere, and the error says where.
    """
    raw = encode(identity, dtype)
    try:
        write_kept(path, lambda file: file.write_bytes(raw), new)
    except Taken as error:
        raise Taken(f"{error}; {keep_aside(identity, path, dtype)}") from error
    return len(raw)


def encode(identity: Identity, dtype: str = "fp16") -> bytes:
    """Return an identity as the bytes of its file; equal content gives equal bytes.

    `dtype` is fp32 (exact), fp16 (11 bits of each number) or int8: each target and rank has an
    fp16 step, its largest number / 127 rounded up, and every number is off by at most half a
    step, 0.4 % of the largest in its row (plus 3e-8, the floor of fp16, for rows below 1e-3).

    Raises HdbError for numbers that are not finite or do not fit, and for anything that `load`
    would refuse.
    """
    tensors = _pack(identity, dtype)
    # Widest first, as the format asks, so that every tensor is aligned; then by name.
    order = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    infos = laid_out((name, _NAMES[str(t.dtype)], tuple(t.shape)) for name, t in order)
    content = b"".join(tensor.numpy().tobytes() for _, tensor in order)
    count, rank, a = identity.down.shape
    layout = Layout(count, a, identity.up.shape[1], rank, dtype)
    metadata = metadata_of(identity.facts, layout)
    metadata["hdb.content"] = content_digest(metadata, infos, content)
    try:
        parse_facts(metadata, infos)
        raw = header_bytes(dict(sorted(metadata.items())), infos) + content
        if len(raw) > MAX_FILE:
            raise HdbError(f"{len(raw)} bytes; at most {MAX_FILE} can be read back")
    except HdbError as error:
        raise HdbError(f"the identity cannot be saved: {error}") from error
    return raw


def keep_aside(identity: Identity, path: Path, dtype: str) -> str:
    """Write an identity that cannot go to `path` into a new private folder; return where it is, in
    words, and how to take it in."""
    raw = encode(identity, dtype)
    return f"{keep_elsewhere(path.name, lambda file: file.write_bytes(raw))}; see hdb import"


def load(path: Path) -> Identity:
    """Read an identity; raise HdbError for a file that is damaged, edited, foreign or newer."""
    header = read_header(path)
    facts, layout = read_facts(path, header)
    content = read_content(path, header)
    tensors = {}
    for name, info in header.tensors.items():
        raw = bytearray(content[slice(*info.offsets)])  # of its own: aligned, and writable
        tensors[name] = tensor_of(raw, info).float()
    down, up = tensors["down"], tensors["up"]  # (L, r, a), (L, b, r)
    if layout.dtype == "int8":
        down = down * tensors["down_scale"][:, :, None]
        up = up * tensors["up_scale"][:, None, :]
    if not (down.isfinite().all() and up.isfinite().all()):
        raise HdbError(f"{path} holds numbers that are not finite; make it again with hdb new")
    return Identity(facts, down, up)


class Weights(Protocol):
    """A base's targets, loaded or still in their files."""

    def weights_digest(self) -> str: ...

    def targets_digest(self) -> str: ...

    def fingerprint(self) -> Fingerprint: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]: ...


def facts_of(spec: BaseSpec, weights: Weights, hypernetwork: str = "") -> Facts:
    """Return the facts of an identity that is made on a base now; all targeted weights are hashed
    for it, so ask once."""
    basis = weights.fingerprint()
    return Facts(
        base=spec.name,
        family=spec.family,
        base_digest=weights.weights_digest(),
        targets_digest=weights.targets_digest(),
        scheme=basis.scheme,
        seed=basis.seed,
        basis_digest=basis.digest,
        probes=basis.probes,
        identifier=spec.identifier,
        created=now(),
        hypernetwork=hypernetwork,
    )


def now() -> str:
    """Return the time as identities say it: ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def moved(facts: Facts, home: Facts) -> Facts:
    """Return what an identity says that goes on to be made on another base of its family."""
    return replace(facts, **{name: getattr(home, name) for name in HOME})


def terms_of(spec: BaseSpec, weights: Weights) -> tuple[Facts, tuple[int, int, int]]:
    """Return all that `check_fits` asks of a base: what its identities say, and (L, a, b)."""
    return facts_of(spec, weights), (len(weights.shapes), spec.a, spec.b)


def fit(identity: Identity, spec: BaseSpec, weights: Weights) -> str | None:
    """Ask `check_fits` of one identity and one base."""
    return check_fits(identity, *terms_of(spec, weights))


def check_fits(identity: Identity, home: Facts, shape: tuple[int, int, int]) -> str | None:
    """Return None where an identity is at home on a base, a warning on a fine-tune of its base.

    `home` is what identities of the base say, `shape` its (L, a, b). Raises HdbError for another
    family, other targets or another basis, where it means nothing.
    """
    facts, base = identity.facts, home.base
    made = f"the identity was made on {facts.base} (family {facts.family})"
    if facts.family != home.family:
        raise HdbError(f"{made}, {base} is of family {home.family}; pass --base {facts.base}")
    if facts.targets_digest != home.targets_digest:
        targets = f"with targets {facts.targets_digest[:12]}, {base} has {home.targets_digest[:12]}"
        if facts.base == base:  # a release of hdb, or `hdb base`, put another model under its name
            targets += " by now: it is another model of that name; make it again with hdb new PHOTO"
            raise HdbError(f"{made} {targets}")
        raise HdbError(f"{made} {targets}; pass --base {facts.base} or make it again with hdb new")
    mine, theirs = ((each.scheme, each.seed, each.basis_digest) for each in (facts, home))
    if mine != theirs:
        raise HdbError(
            f"{made} in basis {mine[0]}/{mine[1]}/{mine[2][:12]}, {base} has "
            f"{theirs[0]}/{theirs[1]}/{theirs[2][:12]}; make it again with hdb new"
        )
    own = len(identity.down), identity.down.shape[2], identity.up.shape[1]
    if own != shape:
        raise HdbError(
            f"{made}, but its numbers are of {own[0]} targets, a = {own[1]}, b = {own[2]}, and "
            f"{base} has {shape[0]}, {shape[1]}, {shape[2]}; make it again with hdb new"
        )
    pairs = list(zip(facts.probes, home.probes, strict=False))
    worst = max((abs(m - t) for m, t in pairs), default=0.0)
    if len(facts.probes) != len(home.probes) or not worst <= PROBE_TOLERANCE:
        raise HdbError(
            f"the basis of {base} came out differently here: {len(home.probes)} probes for "
            f"{len(facts.probes)}, off by up to {worst:.2g} (at most {PROBE_TOLERANCE:g}); "
            "reinstall numpy and torch, and report it if it stays"
        )
    if facts.base_digest != home.base_digest:
        return f"{made}; the weights of {base} differ from it, so the likeness may suffer"
    return None


def _pack(identity: Identity, dtype: str) -> dict[str, Tensor]:
    """Return the tensors of the file on the CPU; raise HdbError for what would not come back."""
    if dtype not in LAYOUTS:
        raise UsageError(f"unknown dtype {dtype!r}; choose from {', '.join(LAYOUTS)}")
    down, up = (
        side.detach().to("cpu", torch.float32).contiguous() for side in (identity.down, identity.up)
    )
    if down.dim() != 3 or up.dim() != 3:
        raise HdbError(f"down {tuple(down.shape)} and up {tuple(up.shape)} need 3 dimensions each")
    if not (down.isfinite().all() and up.isfinite().all()):
        raise HdbError(
            "the identity holds numbers that are not finite, so training has diverged; nothing "
            "was written; try another --seed or a lower learning rate"
        )
    if dtype == "fp32":
        packed = {"down": down, "up": up}
    elif dtype == "fp16":
        packed = {"down": down.half(), "up": up.half()}
    else:
        q_down, down_scale = _quantise(down, 2)
        q_up, up_scale = _quantise(up, 1)
        packed = {"down": q_down, "up": q_up, "down_scale": down_scale, "up_scale": up_scale}
    if not all(tensor.isfinite().all() for tensor in packed.values()):
        raise HdbError(
            f"numbers up to {max(down.abs().max(), up.abs().max()):.3g} do not fit {dtype}; "
            "save as fp32"
        )
    return packed


def _quantise(side: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return int8 numbers and the fp16 step of each row along `dim`; rounded up, so none clips."""
    step = side.abs().amax(dim, keepdim=True) / 127
    half = step.half()
    above = torch.from_numpy(np.nextafter(half.numpy(), np.float16(np.inf)))
    half = torch.where(half.float() < step, above, half)
    safe = torch.where(half > 0, half.float(), 1.0)  # a row of zeros stays zero
    return (side / safe).round().to(torch.int8), half.squeeze(dim).contiguous()


def theta_for(base: Base, identity: Identity) -> tuple[Theta, str | None]:
    """Return an identity's theta for this base, and a warning if it was made on another of
    the family."""
    warning = fit(identity, base.spec, base.injected)
    return identity.theta.to(base.device), warning


def file_bytes(targets: int, a: int, b: int, rank: int, dtype: str) -> int:
    """Return at most how many bytes an identity's file has."""
    layout = LAYOUTS[dtype]
    scales = sum(DTYPE_BYTES[kind] for name, kind in layout.items() if name.endswith("_scale"))
    number = DTYPE_BYTES[layout["down"]]
    return HEADER + targets * rank * (number * (a + b) + scales)


def dtype_within(budget: int, targets: int, a: int, b: int, rank: int) -> str:
    """Return fp16, or int8 where only that fits; a rank asked for that fits neither stays fp16."""
    fitting = (d for d in BY_DEFAULT if file_bytes(targets, a, b, rank, d) <= budget)
    return next(fitting, BY_DEFAULT[0])


def dtype_for(identity: Identity, budget: int) -> str:
    """Return the number format in which an identity is written unless another is asked for."""
    (targets, rank, a), b = identity.down.shape, identity.up.shape[1]
    return dtype_within(budget, targets, a, b, rank)


def rank_within(budget: int, targets: int, a: int, b: int) -> int:
    """Return the rank to refine at: the usual one, or the highest that fits in some format."""
    least = BY_DEFAULT[-1]
    ranks = range(RefineConfig.rank, 0, -1)
    return next((r for r in ranks if file_bytes(targets, a, b, r, least) <= budget), 1)
