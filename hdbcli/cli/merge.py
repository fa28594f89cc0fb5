"""The command that writes identities into a full checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hdbcli.cli import complete, render
from hdbcli.cli.options import Force, Json, OwnBase


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
    if as_json:
        render.document(asdict(merged))
    else:
        render.say(f"{out}  {merged.bytes:,} bytes; use {merged.identifier!r} where you wrote [V]")
