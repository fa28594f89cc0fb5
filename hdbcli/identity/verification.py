"""Keep identities: take one in from elsewhere, fully checked, and verify those that are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hdbcli.identity.file import Identity, Weights, check_fits, load, terms_of
from hdbcli.model.base import load_base
from hdbcli.model.files import open_checkpoint
from registry import store
from registry.checkpoints.lora_formats import lora_style
from registry.checkpoints.safetensors import LARGEST, read_header
from registry.errors import HdbError
from registry.identity_facts import Facts
from registry.plugins import find_base
from registry.spec import BaseSpec


@dataclass(frozen=True)
class Verdict:
    """What verifying one file found; `basis` is None where its base model is not here to ask."""

    name: str
    path: str
    bytes: int
    ok: bool
    basis: bool | None
    problem: str | None


def read_foreign(path: Path) -> Identity:
    """Load an identity file from elsewhere; HdbError for what it may be instead."""
    header = read_header(path, LARGEST)
    style = lora_style(header.tensors)
    if style:
        raise HdbError(
            f"{path} is a LoRA with {style} keys, and no identity can be made of it: an identity "
            "lives in a random basis, which keeps under 5 % of the energy of a LoRA of Stable "
            "Diffusion's size; use it in the tool it was made for, or make an identity from a "
            "photo of the person: hdb new PHOTO"
        )
    return load(path)


def take_in(file: Path, identity: Identity, path: Path, new: bool) -> None:
    """Copy the file that an identity was read from into the store; HdbError if by now it
    is another."""
    with store.write_beside(path, new) as beside:
        beside.write_bytes(file.read_bytes())
        taken = load(beside)
        if not (taken.down.equal(identity.down) and taken.up.equal(identity.up)):
            raise HdbError(f"{file} changed while it was checked; nothing was taken in")


def weights_of(base: str, targets_digest: str) -> tuple[BaseSpec, Weights]:
    """Return a base model's spec and its targets, of several sets those with that digest: read in
    its files, which takes no memory, or loaded if it names none."""
    spec = find_base(base)
    if spec.files is None:
        return spec, load_base(spec, "cpu", targets_digest=targets_digest).injected
    return spec, open_checkpoint(spec, targets_digest)


def fits_here() -> Callable[[Identity], tuple[bool | None, str | None]]:
    """Return a check of identities against their base models, each of which is opened once for
    each of its target sets.

    It returns True if an identity is at home on its base, None if that is not here to ask; and a
    warning, if there is one. HdbError if the base refuses it: other family, targets or basis.
    """
    homes: dict[tuple[str, str], tuple[Facts, tuple[int, int, int]] | HdbError] = {}

    def check(identity: Identity) -> tuple[bool | None, str | None]:
        key = identity.facts.base, identity.facts.targets_digest
        if key not in homes:
            try:
                homes[key] = terms_of(*weights_of(*key))
            except HdbError as error:
                homes[key] = error
        home = homes[key]
        if isinstance(home, HdbError):
            return None, f"its basis is not verified: {home}"
        return True, check_fits(identity, *home)

    return check


def verify(paths: Iterable[Path]) -> Iterator[Verdict]:
    """Check each file in full: header, numbers, digest, and its basis on its base model."""
    fits = fits_here()
    for path in paths:
        known = (path.stem, str(path), path.stat().st_size if path.is_file() else 0)
        try:
            if path.parent == store.folder():
                store.check_name(path.stem)  # a name that no other command would take
            identity = load(path)
        except HdbError as error:
            yield Verdict(*known, False, None, str(error))
            continue
        try:
            yield Verdict(*known, True, *fits(identity))
        except HdbError as error:
            yield Verdict(*known, False, False, str(error))
