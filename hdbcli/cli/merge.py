"""The command that writes identities into a full checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hdbcli.cli import render
from hdbcli.cli.options import Force, Json, check_among, spec_of
from hdbcli.errors import HdbError
from registry import store


def merge(
    parts: Annotated[
        list[str], typer.Argument(help="NAME, or NAME=STRENGTH; several are added up.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="A folder, or a .safetensors file.")],
    form: Annotated[
        str | None,
        typer.Option("--format", help="diffusers or single-file; default: by the name of --out."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16; default: each tensor keeps its own.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Default: the identity's.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the base model with the identity in it: a checkpoint that needs no hdb.

    A folder in the layout of diffusers, or one file as A1111, Forge and ComfyUI load it.
    """
    from hdbcli.identity import derivation
    from hdbcli.identity.file import fit, load
    from hdbcli.interop import merged_files
    from hdbcli.interop.merge import Merge
    from hdbcli.model.files import open_checkpoint

    chosen = form or ("single-file" if out.suffix.casefold() == ".safetensors" else "diffusers")
    if chosen not in merged_files.FORMATS:
        raise HdbError(f"unknown format {chosen!r}; choose {' or '.join(merged_files.FORMATS)}")
    single = chosen == "single-file"
    check_among(out)
    (merged_files.check_file if single else merged_files.check_folder)(out, force)
    weights = derivation.read_weights(parts)
    loaded = {name: (load(store.resolve(name)), weight) for name, weight in weights.items()}
    identity = derivation.composed(loaded, None)
    spec = spec_of(base or identity.base)
    title = " + ".join(
        store.shown(Path(name)) if weight == 1 else f"{weight:g} {store.shown(Path(name))}"
        for name, weight in weights.items()
    )
    if spec.files is not None:
        merged_files.check_apart(out, spec.files)
    with render.progress() as tell, merged_files.with_files(spec, chosen, out) as copied:
        checkpoint = open_checkpoint(copied, identity.targets_digest)
        warning = fit(identity, spec, checkpoint)
        if warning:
            render.note(f"warning: {warning}")
        merged = Merge(checkpoint, derivation.theta_of(identity), dtype)
        write = merged_files.write_single if single else merged_files.write_folder
        size = write(merged, out, title, tell)
    if as_json:
        render.document(
            {"path": str(out), "base": spec.name, "format": chosen, "bytes": size, "of": title}
        )
    else:
        render.say(f"{out}  {size:,} bytes; use {spec.identifier!r} where you wrote [V]")
