"""Commands that keep the store: take identities in, copy, rename, verify and delete them."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from hdbcli.cli import complete, render
from hdbcli.cli.boundary import ask
from hdbcli.cli.options import Force, Identity, Json, NewName, Yes, bases, new_path
from registry import orphans, store
from registry.errors import HdbError


def import_identity(
    file: Annotated[Path, typer.Argument(help="An identity file, from wherever.")],
    name: Annotated[str | None, typer.Argument(help="Default: the file's own name.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Take an identity file into the store, after checking all of it.

    Header, sizes, numbers and digest are checked before anything is used, and the basis where the
    base model is there.
    """
    from hdbcli.identity import verification

    identity = verification.read_foreign(file)
    path = new_path(store.name_from_stem(file.stem) if name is None else name, force)
    verified, warning = verification.fits_here()(identity)
    if warning:
        render.note(f"warning: {path.stem}: {warning}")
    verification.take_in(file, identity, path, new=not force)
    _tell(path, base=identity.facts.base, rank=identity.rank, verified=verified)


def cp(name: Identity, new_name: NewName, force: Force = False, as_json: Json = False) -> None:
    """Copy an identity under another name."""
    source = store.resolve(name)
    store.check(source)  # what is damaged is not copied
    _tell(store.copy(source, new_path(new_name, force), new=not force))


def mv(name: Identity, new_name: NewName, force: Force = False, as_json: Json = False) -> None:
    """Give an identity another name."""
    source = store.resolve(store.check_name(name))
    same = store.path_of(new_name) == source  # a change of case alone
    target = source.with_name(new_name + store.SUFFIX) if same else new_path(new_name, force)
    moved = store.rename(source, target, new=not (force or same))
    if not as_json:
        render.say(f"{source.stem} is now {moved.stem}")
    _tell(moved, was=source.stem)


def rm(
    names: Annotated[
        list[str],
        typer.Argument(autocompletion=complete.identities, help="Names of identities."),
    ],
    purge: Annotated[
        bool, typer.Option("--purge", help="With all temporary files that may hold part of one.")
    ] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Delete identities for good.

    An identity's file is all that hdb keeps of a person. A run that was killed can leave part of
    one in a temporary file: --purge deletes those in the store too, even of a run that is writing
    just now.
    """
    paths = list(dict.fromkeys(store.resolve(store.check_name(name)) for name in names))
    if not yes:
        if not sys.stdin.isatty():
            raise HdbError("rm deletes for good; without a terminal to ask on, pass --yes")
        ask(f"Delete {', '.join(path.stem for path in paths)}?")
    files = [_file(path) for path in paths]
    for path in paths:
        store.remove(path.stem)
    left = orphans.temporaries(older=0) if purge else []
    for orphan in left:
        orphans.delete(orphan)
    files += [{"name": None, "path": o.path, "bytes": o.bytes} for o in left]
    for path in paths if purge else []:
        for other in store.composed_of(path.stem):
            render.note(f"note: {other} was composed of {path.stem} and still holds its share")
    shown = [f"deleted {each['name'] or each['path']}  {each['bytes']:,} bytes" for each in files]
    values = {"deleted": files, "bytes": sum(each["bytes"] for each in files)}
    render.result(values, "\n".join(shown))


def verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            autocompletion=complete.identities,
            help="Names or files of identities; default: all.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check identities in full: header, numbers, digest and basis; exit code 1 if one is bad."""
    from hdbcli.identity import verification

    paths = [store.resolve(name) for name in names or []]
    if not names:
        paths = [entry.path for entry in store.entries()]
    verdicts = list(verification.verify(paths))
    if as_json:
        found = [asdict(verdict) for verdict in verdicts]
        render.document({"ok": all(verdict.ok for verdict in verdicts), "identities": found})
    elif verdicts:
        render.show_verdicts(verdicts)
    else:
        render.note("no identities yet; make one with: hdb new PHOTO")
    bad = sum(not verdict.ok for verdict in verdicts)
    if bad:
        render.note(f"error: {bad} of {len(verdicts)} are bad; restore, make again or delete them")
        raise typer.Exit(1)


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, only.")] = False,
    as_json: Json = False,
) -> None:
    """Delete what nothing needs in the store: temporary files of killed runs, settings of bases
    that are gone.

    Never an identity, not even a damaged one.
    """
    found = orphans.temporaries()
    registry = bases()
    if registry.problems or "HDB_PLUGINS" in os.environ:  # a base may be there and not seen
        render.note("note: settings of bases are left alone while plug-ins are off or broken")
    else:
        found += orphans.settings_without_base(registry.names())
    for orphan in [] if dry_run else found:
        orphans.delete(orphan)
    freed = sum(orphan.bytes for orphan in found)
    shown = [f"{orphan.path}  {orphan.bytes:,} bytes, {orphan.reason}" for orphan in found]
    shown.append(f"{freed:,} bytes {'would be' if dry_run else 'were'} freed")
    files = [asdict(orphan) for orphan in found]
    render.result({"dry_run": dry_run, "files": files, "bytes": freed}, "\n".join(shown))


def _file(path: Path) -> dict[str, Any]:
    """Describe a file of the store, damaged or not."""
    return {"name": path.stem, "path": path, "bytes": path.lstat().st_size}


def _tell(path: Path, **more: object) -> None:
    """Say where an identity is now."""
    values = _file(path)
    render.result({**values, **more}, f"{path}  {values['bytes']:,} bytes")
