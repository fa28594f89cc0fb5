"""Keep identities: take one in from elsewhere, fully checked, and verify those that are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hdbcli.base import Base, theta_for
from hdbcli.errors import HdbError
from hdbcli.identity import Identity, load
from registry import store
from registry.errors import RegistryError
from registry.foreign import lora_style
from registry.header import read_header

MAX_LORA = 2**40  # of a foreign file the header alone is read

Open = Callable[[str], Base]


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
    try:
        header = read_header(path, MAX_LORA)
    except RegistryError as error:
        raise HdbError(str(error)) from error
    style = lora_style(header.tensors)
    if style:
        raise HdbError(
            f"{path} is a LoRA with {style} keys, and no identity can be made of it: an identity "
            "lives in a random basis, which keeps under 5 % of such a LoRA's energy; use it in the "
            "tool it was made for, or make an identity from a photo of the person: hdb new PHOTO"
        )
    return load(path)


def fits_here(identity: Identity, open_base: Open) -> tuple[bool | None, str | None]:
    """Return True if the identity is at home on its base model, None if that is not here to ask;
    and a warning, if there is one.

    HdbError if the base is here and refuses it: other family, targets or basis.
    """
    try:
        base = open_base(identity.base)
    except RegistryError as error:
        return None, f"its basis is not verified: {error}"
    return True, theta_for(base, identity)[1]


def verify(paths: Iterable[Path], open_base: Open) -> Iterator[Verdict]:
    """Check each file in full: header, numbers, digest, and its basis on its base model."""
    opened: dict[str, Base] = {}

    def once(name: str) -> Base:
        if name not in opened:
            opened[name] = open_base(name)
        return opened[name]

    for path in paths:
        size = path.stat().st_size if path.is_file() else 0
        known = (path.stem, str(path), size)
        try:
            if path.parent == store.folder():
                store.check_name(path.stem)  # a name that no other command would take
            identity = load(path)
        except (HdbError, RegistryError) as error:
            yield Verdict(*known, False, None, str(error))
            continue
        try:
            yield Verdict(*known, True, *fits_here(identity, once))
        except HdbError as error:
            yield Verdict(*known, False, False, str(error))
