"""Base models that the user added: their files are referenced, never copied, and watched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from registry.bases.settings import (
    Added,
    Mark,
    Settings,
    all_settings,
    read_settings,
    settings_path,
    write_settings,
)
from registry.errors import HdbError
from registry.files import reading, sha256_of
from registry.spec import BaseSpec
from registry.stable_diffusion.families import FAMILIES
from registry.stable_diffusion.few_steps import few_steps

if TYPE_CHECKING:
    from registry.stable_diffusion.backbone import StableDiffusion


def added_bases() -> Iterator[BaseSpec | str]:
    """Yield the spec of each added base, or a line on what is wrong with one."""
    for path in all_settings():
        try:
            added = read_settings(path).added
            if added:
                yield spec_of(added)
        except HdbError as error:
            yield str(error)


def spec_of(added: Added) -> BaseSpec:
    """Make the spec of an added base from its family's; HdbError if this hdb has no such."""
    family = FAMILIES.get(added.family)
    if family is None:
        raise HdbError(
            f"base model {added.name} is of family {added.family!r}; this hdb knows "
            f"{', '.join(FAMILIES)}; upgrade hdb, or hdb base rm {added.name}"
        )
    few = few_steps(added.origin.partition("@")[0] or Path(added.path).stem)
    title = f"{family.title} {few.kind}" if few else family.title
    return BaseSpec(
        name=added.name,
        family=family.name,
        summary=f"{title}, {added.origin or added.path}",
        licence="its own",
        targets=family.targets,
        a=family.a,
        b=family.b,
        basis_seed=family.basis_seed,
        identifier=family.identifier,
        resolution=added.resolution,
        template=family.template,
        hypernetwork=None,
        load=partial(load, added),
        files=Path(added.path),
        check=partial(check, added),
        budget=family.budget,
        guidance=family.guidance if few is None or few.guidance is None else few.guidance,
        target_sets=family.target_sets,
        few_steps=few,
    )


def load(added: Added, device: str, dtype: str) -> StableDiffusion:
    """Load an added base, offline; HdbError if its files changed or are damaged."""
    check(added)
    from registry.stable_diffusion.loading import load_folder, load_single

    path, family = Path(added.path), FAMILIES[added.family]
    if path.is_dir():
        return load_folder(path, device, dtype, family.double)
    return load_single(path, family, added.prediction, device, dtype)


def check(added: Added) -> None:
    """Raise HdbError if the files of an added base are not what they were."""
    changes = changed(added, trust_times=True)
    if changes:
        raise HdbError(
            f"base model {added.name} changed since it was added: {'; '.join(changes)}; restore "
            f"{added.path}, or add it anew: hdb base rm {added.name}, then hdb base add"
        )


def mark(file: Path) -> Mark:
    """Read a file whole and say what it is; HdbError if it cannot be read."""
    with reading(file):
        state = file.stat()
    return Mark(state.st_size, state.st_mtime_ns, sha256_of(file))


def changed(added: Added, trust_times: bool) -> list[str]:
    """Say which files are not what they were, empty if none.

    A file of the same size and time is trusted where that is asked for; others are read whole.
    """
    changes = []
    for name, then in added.files.items():
        file = _folder(added) / name
        try:
            state = file.stat()
        except OSError as error:
            changes.append(f"{name}: {error.strerror or error}")
            continue
        if trust_times and (state.st_size, state.st_mtime_ns) == (then.bytes, then.modified):
            continue
        if state.st_size != then.bytes:
            changes.append(f"{name} has {state.st_size} bytes, it had {then.bytes}")
        elif (digest := mark(file).sha256) != then.sha256:
            changes.append(f"{name} has sha256 {digest[:12]}, it had {then.sha256[:12]}")
    return changes


def verify(base: str) -> Added:
    """Read every file of an added base again; HdbError if one is not what it was.

    Times that changed while the content did not are kept, so that the next load trusts them.
    """
    settings = _settings(base)
    assert settings.added is not None
    changes = changed(settings.added, trust_times=False)
    if changes:
        raise HdbError(
            f"base model {base} changed since it was added: {'; '.join(changes)}; restore its files"
        )
    folder = _folder(settings.added)
    files = {
        name: replace(then, modified=(folder / name).stat().st_mtime_ns)
        for name, then in settings.added.files.items()
    }
    if files != settings.added.files:
        write_settings(base, replace(settings, added=replace(settings.added, files=files)))
    return settings.added


def forget(base: str) -> Added:
    """Forget an added base and what was set for it; its files stay."""
    added = _settings(base).added
    assert added is not None
    write_settings(base, Settings())
    return added


def _settings(base: str) -> Settings:
    settings = read_settings(settings_path(base))
    if settings.added is None:
        raise HdbError(
            f"base model {base} was not added with hdb base add; it comes with the package that "
            "hdb base show names"
        )
    return settings


def _folder(added: Added) -> Path:
    """Return what the names of the files start from."""
    path = Path(added.path)
    return path.parent if path.name in added.files and not path.is_dir() else path
