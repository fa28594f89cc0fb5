"""What a user set for a base model: one small JSON file each, `bases/NAME.json` in the store."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from registry.errors import RegistryError
from registry.spec import BaseSpec
from registry.store import root, write_beside

FORMAT = 1


def settings_path(base: str) -> Path:
    """Return where the settings of a base lie; its name was checked when its spec was made."""
    return root() / "bases" / f"{base.casefold()}.json"


def customised(spec: BaseSpec) -> BaseSpec:
    """Return the spec as the user wants it; RegistryError if the settings cannot be read."""
    path = settings_path(spec.name)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return spec
    except (OSError, ValueError) as error:
        raise RegistryError(f"cannot read {path} ({error}); delete it to start again") from error
    try:
        values = json.loads(text)
        if values["format"] != FORMAT or not isinstance(values["hypernetwork"], str):
            raise ValueError(f"format {values['format']}, this hdb reads {FORMAT}")
        return replace(spec, hypernetwork=Path(values["hypernetwork"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RegistryError(
            f"{path} holds no settings of a base model ({error}); delete it to start again"
        ) from error


def set_hypernetwork(base: str, file: Path | None) -> None:
    """Use `file` as the hypernetwork of a base from now on; None goes back to its own."""
    path = settings_path(base)
    if file is None:
        path.unlink(missing_ok=True)
        return
    values = {"format": FORMAT, "hypernetwork": str(file.absolute())}
    with write_beside(path) as beside:
        beside.write_text(json.dumps(values), encoding="utf-8")
