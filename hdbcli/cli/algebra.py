"""Commands that look inside identities, and make others of them, LoRA files and checkpoints."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hdbcli.cli import complete, render
from hdbcli.cli.boundary import ask
from hdbcli.cli.options import (
    FORMATS,
    As,
    Device,
    Force,
    Identity,
    Json,
    Memory,
    OwnBase,
    Yes,
    complete_format,
    free_path,
    new_path,
    refuse_given,
)
from registry import store
from registry.errors import HdbError, UsageError
from registry.files import write_kept
from registry.spec import SampleSettings


def inspect(
    identity: Identity,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Draw it as a .png file too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Look inside an identity: energy by target, component and kind; whether its basis verifies."""
    from hdbcli.identity import inspection
    from hdbcli.identity.file import fit, load
    from hdbcli.identity.verification import weights_of

    path = store.resolve(identity)
    loaded = load(path)
    if out:
        store.check_picture(out, path)
    names, verified, problem = None, None, None
    try:
        spec, weights = weights_of(loaded.facts.base, loaded.facts.targets_digest)
        problem = fit(loaded, spec, weights)
        names, verified = list(weights.shapes), True
    except HdbError as error:
        problem, verified = str(error), False
    result = inspection.inspect(loaded, names, verified, problem)
    if out:
        with store.write_beside(out) as beside:
            inspection.draw(result, beside)
        render.note(str(out))
    said = store.summary(path)
    shares = {field: result.share(field) for field in ("component", "kind")}
    values = {**said, **asdict(result), "shares": shares}
    render.result(values, lambda: render.show_inspection(said, result))


def relax(
    identity: Identity,
    rank: Annotated[int, typer.Option(min=1, help="The new, higher rank.")],
    new_name: As = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Give an identity more ranks; it draws what it did, and hdb refine can train them."""
    from hdbcli.identity import derivation
    from hdbcli.identity.file import load, save

    source, path, new = _source_and_target(identity, new_name, force)
    stamp = store.stamp(source)
    made = derivation.relaxed(load(source), rank)
    dtype = store.summary(source)["dtype"]  # in any other the old numbers would be rounded
    _check_unchanged(source, stamp)
    _tell(path, rank, save(made, path, dtype, new))


def shrink(
    identity: Identity,
    rank: Annotated[int, typer.Option(min=1, help="The new, lower rank.")],
    new_name: As = None,
    dtype: Annotated[
        str | None,
        typer.Option(autocompletion=complete_format, help=f"{FORMATS}; default: the file's own."),
    ] = None,
    force: Force = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Give an identity fewer ranks, the closest there are, saying what that costs."""
    from hdbcli.identity import derivation
    from hdbcli.identity.file import load, save

    source, path, new = _source_and_target(identity, new_name, force)
    stamp = store.stamp(source)
    made, lost = derivation.shrunk(load(source), rank)
    dtype = dtype or store.summary(source)["dtype"]
    render.note(f"rank {rank} keeps {1 - lost:.2%} of the identity's energy, {lost:.2%} is lost")
    if path == source and not yes:
        if not sys.stdin.isatty():
            raise HdbError(f"this overwrites {path.stem}; use --as NEW to keep it, or --yes")
        ask(f"Replace {path.stem}?")
    _check_unchanged(source, stamp)
    _tell(path, rank, save(made, path, dtype, new), lost=lost)


def compose(
    ctx: typer.Context,
    parts: Annotated[
        list[str],
        typer.Argument(
            autocompletion=complete.identities, help="NAME=WEIGHT, such as alice=0.6 bob=0.4."
        ),
    ],
    new_name: Annotated[str, typer.Option("--as", help="Name of the new identity.")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Highest rank; default: whatever is exact.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            autocompletion=complete_format,
            help=f"{FORMATS}; default: fp16, or what the base's budget allows.",
        ),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Draw the walk from the first to the last, step by step.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="PNG of --show, or a folder; default: NAME-walk.png."),
    ] = None,
    device: Device = None,
    memory: Memory = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Add identities of one base up, exactly: what each changes, times its weight.

    A weight may be negative: "--" before the parts keeps alice=-0.5 from being an option. The walk
    that --show draws leads from each identity to the next, whatever the weights; an animation of it
    lies beside the sheet.
    """
    if not show:
        refuse_given(ctx, "nothing is drawn; add --show or drop", "device", "memory")
    steps = 2 * 6 * len(parts) * SampleSettings.steps if show else 0  # about
    with render.progress(load=show, draw=steps) as tell:
        from hdbcli import api
        from hdbcli.identity.derivation import read_weights

        weights = read_weights(parts)
        path = new_path(new_name, force)
        sheet, drawn = _sheet_path(show, out, path.stem, len(weights)), None
        made = api.compose(weights, rank=rank)
        if sheet:
            drawn = api.walk(
                list(weights),
                base=made.facts.base,
                device=device,
                memory=memory,
                tell=tell,
                note=render.note,
            )
    saved = api.save(made, new_name, dtype=dtype, replace=force)
    shown: dict[str, Path | None] = {"sheet": None, "animation": None}
    if sheet and drawn:
        drawn.sheet.save(sheet)
        moving = free_path(sheet.parent, sheet.stem, suffix=".webp")
        write_kept(moving, lambda file: file.write_bytes(drawn.animation))
        shown = {"sheet": sheet, "animation": moving}
    _tell(path, made.rank, saved.bytes, **shown)


def export(
    identity: Identity,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            autocompletion=complete.words("kohya", "diffusers"),
            help="kohya or diffusers.",
        ),
    ] = "kohya",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="File; default: NAME-lora.safetensors.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(autocompletion=complete.words("fp16", "fp32"), help="fp16 or fp32."),
    ] = "fp16",
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Prove it first: load it in diffusers, replay what other tools read."
        ),
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write an identity as a plain LoRA for other tools.

    With --check the file is kept only if every tool that its format is meant for, and that knows
    this kind of base, would apply all of it.
    """
    with render.progress(load=1) as tell:
        from hdbcli import api

        tell("load", 0, 1)
        made = api.export(
            identity, out, format=form, dtype=dtype, check=check, force=force, note=render.note
        )
    readers = [asdict(reading) | {"ok": reading.ok} for reading in made.readers]
    render.result({**asdict(made), "readers": readers}, lambda: render.show_exported(made))


def merge(
    parts: Annotated[
        list[str],
        typer.Argument(
            autocompletion=complete.identities, help="NAME, or NAME=STRENGTH; several are added up."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="A folder, or a .safetensors file.")],
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            autocompletion=complete.words("diffusers", "single-file"),
            help="diffusers or single-file; default: by the name of --out.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            autocompletion=complete.words("fp32", "fp16", "bf16"),
            help="fp32, fp16 or bf16; default: each tensor keeps its own.",
        ),
    ] = None,
    base: OwnBase = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the base model with the identity in it: a checkpoint that needs no hdb.

    A folder in the layout of diffusers, or one file as A1111, Forge and ComfyUI load it.
    """
    with render.progress(merge=1) as tell:
        from hdbcli import api
        from hdbcli.identity.derivation import read_weights

        merged = api.merge(
            read_weights(parts),
            out,
            format=form,
            dtype=dtype,
            base=base,
            force=force,
            tell=tell,
            note=render.note,
        )
    shown = f"{out}  {merged.bytes:,} bytes; use {merged.identifier!r} where you wrote [V]"
    render.result(asdict(merged), shown)


def _sheet_path(show: bool, out: Path | None, name: str, people: int) -> Path | None:
    """Return where the sheet of a walk goes, None without one; refuse before any work."""
    from hdbcli.cli.outputs import plan_outputs
    from hdbcli.identity.interpolation import weights_of

    if not show:
        if out:
            raise UsageError(f"-o {out} is the place of what --show draws; add --show")
        return None
    weights_of(people)
    (path,) = plan_outputs(out, [f"{name}-walk"], False).pictures
    store.check_output(path)
    return path


def _check_unchanged(source: Path, stamp: tuple[int, int, int] | None) -> None:
    """Refuse to replace a file that another process wrote meanwhile."""
    if store.stamp(source) != stamp:
        raise HdbError(f"{source.stem} changed while it was read; nothing was written, try again")


def _tell(path: Path, rank: int, size: int, **more: object) -> None:
    """Say what was made, and of what size."""
    values = {"name": path.stem, "path": path, "rank": rank, "bytes": size, **more}
    drawn = filter(None, (more.get("sheet"), more.get("animation")))
    shown = [f"{path}  rank {rank}, {size:,} bytes", *map(str, drawn)]
    render.result(values, "\n".join(shown))


def _source_and_target(identity: str, new_name: str | None, force: bool) -> tuple[Path, Path, bool]:
    """Return the file of an identity, where what is made of it goes, itself without a name, and
    whether that file must be new."""
    source = store.resolve(identity)
    if new_name is None:
        return source, source, False
    return source, new_path(new_name, force), not force
