"""Commands that look inside identities and make others of them."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hdbcli.cli import render
from hdbcli.cli.boundary import ask
from hdbcli.cli.options import (
    FORMATS,
    As,
    Device,
    Force,
    Identity,
    Json,
    Yes,
    check_output,
    new_path,
    refuse_given,
    spec_of,
    wear,
    weights_of,
    within_memory,
)
from hdbcli.errors import HdbError
from registry import store

if TYPE_CHECKING:
    import numpy as np

    from hdbcli.identity.file import Identity as Identified
    from hdbcli.model.memory import MemoryPlan


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

    path = store.resolve(identity)
    loaded = load(path)
    if out:
        check_output(out, path)
        if out.suffix.lower() != ".png":
            raise HdbError(f"{out} is not named .png, the kind of picture that hdb draws")
    names, verified, problem = None, None, None
    try:
        spec, weights = weights_of(loaded.base, loaded.targets_digest)
        problem = fit(loaded, spec, weights)
        names, verified = list(weights.shapes), True
    except HdbError as error:
        problem, verified = str(error), False
    result = inspection.inspect(loaded, names, verified, problem)
    if out:
        with store.write_beside(out) as beside:
            inspection.draw(result, beside)
        render.note(str(out))
    if as_json:
        shares = {field: result.share(field) for field in ("component", "kind")}
        render.document({**store.summary(path), **asdict(result), "shares": shares})
    else:
        render.show_inspection(store.summary(path), result)


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
    _tell(path, rank, save(made, path, dtype, new), as_json)


def shrink(
    identity: Identity,
    rank: Annotated[int, typer.Option(min=1, help="The new, lower rank.")],
    new_name: As = None,
    dtype: Annotated[str | None, typer.Option(help=f"{FORMATS}; default: the file's own.")] = None,
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
            raise HdbError("shrink replaces what it shrinks; pass --as NEW to keep it, or --yes")
        ask(f"Replace {path.stem}?")
    _check_unchanged(source, stamp)
    _tell(path, rank, save(made, path, dtype, new), as_json, lost=lost)


def compose(
    parts: Annotated[list[str], typer.Argument(help="NAME=WEIGHT, such as alice=0.6 bob=0.4.")],
    new_name: Annotated[str, typer.Option("--as", help="Name of the new identity.")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Highest rank; default: whatever is exact.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help=f"{FORMATS}; default: fp16, or what the base's budget allows."),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Draw the walk from the first to the last, step by step.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="PNG of --show, or a folder; default: NAME-walk.png."),
    ] = None,
    device: Device = None,
    memory: Annotated[str | None, typer.Option(help="auto, low or normal, for --show.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Add identities of one base up, exactly: what each changes, times its weight.

    A weight may be negative: "--" before the parts keeps alice=-0.5 from being an option. The walk
    that --show draws leads from each identity to the next, whatever the weights.
    """
    from hdbcli.identity import derivation
    from hdbcli.identity.file import load, save
    from hdbcli.model.sample import save_picture

    if not show:
        refuse_given("nothing is drawn; add --show or drop", device=device, memory=memory)
    weights = derivation.read_weights(parts)
    path = new_path(new_name, force)
    sheet = _sheet_path(show, out, path.stem, len(weights))
    paths = {name: store.resolve(name) for name in weights}
    loaded = {name: (load(paths[name]), weight) for name, weight in weights.items()}
    made = derivation.composed(loaded, rank)
    drawn = _draw_walk(list(paths.values()), made.base, device, memory or "auto") if sheet else None
    size = save(made, path, dtype or _dtype_of(made), new=not force)
    if sheet and drawn:
        save_picture(drawn[0], sheet, drawn[1])
    _tell(path, made.rank, size, as_json, sheet=str(sheet) if sheet else None)


def export(
    identity: Identity,
    form: Annotated[str, typer.Option("--format", help="kohya or diffusers.")] = "kohya",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="File; default: NAME-lora.safetensors.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp16 or fp32.")] = "fp16",
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
    from hdbcli.interop import export as lora
    from hdbcli.interop.diffusers_reader import require_peft

    path = store.resolve(identity)
    target = out or Path(f"{path.stem}-lora.safetensors")
    if target.exists() and not force:
        raise HdbError(f"{target} exists already; give another with -o, or --force to replace it")
    check_output(target, path)
    if check:
        require_peft()
    base, theta = wear([path], None, "cpu")
    size, readings = lora.export(base, theta, store.shown(path), form, dtype, target, check)
    if as_json:
        values = {"name": store.shown(path), "path": str(target), "bytes": size, "rank": theta.rank}
        values |= {"format": form, "dtype": dtype, "identifier": base.spec.identifier}
        render.document({**values, "readers": [asdict(r) | {"ok": r.ok} for r in readings]})
        return
    word = base.spec.identifier
    render.say(
        f"{target}  {size:,} bytes, rank {theta.rank}, {form}; use {word!r} where you wrote [V]"
    )
    render.show_readings(readings)


def _sheet_path(show: bool, out: Path | None, name: str, people: int) -> Path | None:
    """Return where the sheet of a walk goes, None without one; refuse before any work."""
    from hdbcli.cli.outputs import plan_outputs
    from hdbcli.identity.interpolation import weights_of

    if not show:
        if out:
            raise HdbError(f"-o {out} is the place of what --show draws; add --show")
        return None
    weights_of(people)
    (path,) = plan_outputs(out, [f"{name}-walk"], False).pictures
    check_output(path)
    return path


def _draw_walk(
    paths: list[Path], base: str, device: str | None, memory: str
) -> tuple[np.ndarray, str]:
    """Draw the walk through identities; return the sheet and what is written into it."""
    from hdbcli.identity import interpolation
    from hdbcli.model import sample

    spec = spec_of(base)

    def draw(plan: MemoryPlan) -> sample.Picture:
        loaded, people = wear(paths, spec.name, device, plan)
        with render.progress() as tell:
            return interpolation.draw(loaded, [people[[i]] for i in range(len(paths))], tell)

    sheet = within_memory(spec, device, memory, interpolation.work_of(spec, len(paths)), draw)
    names = " to ".join(map(store.shown, paths))
    prompts = " | ".join(interpolation.ROWS)
    text = sample.parameters_text(prompts, spec.sampling, sheet, spec.name, names)
    return sheet.image, text


def _check_unchanged(source: Path, stamp: tuple[int, int, int] | None) -> None:
    """Refuse to replace what somebody else wrote meanwhile."""
    if store.stamp(source) != stamp:
        raise HdbError(f"{source.stem} changed while it was read; nothing was written, try again")


def _dtype_of(identity: Identified) -> str:
    """Choose the number format that keeps within the budget of the base, if that is here."""
    from hdbcli.identity.budget import BY_DEFAULT, dtype_for

    try:
        return dtype_for(identity, spec_of(identity.base).budget)
    except HdbError:
        return BY_DEFAULT[0]


def _tell(path: Path, rank: int, size: int, as_json: bool, **more: object) -> None:
    """Say what was made, and of what size."""
    if as_json:
        values = {"name": path.stem, "path": str(path), "rank": rank, "bytes": size}
        render.document({**values, **more})
        return
    render.say(f"{path}  rank {rank}, {size:,} bytes")
    if more.get("sheet"):
        render.say(str(more["sheet"]))


def _source_and_target(identity: str, new_name: str | None, force: bool) -> tuple[Path, Path, bool]:
    """Return the file of an identity, where what is made of it goes, itself without a name, and
    whether that file must be new."""
    source = store.resolve(identity)
    if new_name is None:
        return source, source, False
    return source, new_path(new_name, force), not force
