"""Find the source of a base model: a path, or a model of the Hugging Face hub, in the hub's
own cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from registry.checkpoints.contents import INDEX, INDEXED, VARIANT, WEIGHTS
from registry.errors import HdbError, UsageError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# What hdb reads of a diffusers folder, and no more: repositories hold the weights several times.
NEEDED = [INDEX, "scheduler/*.json", "tokenizer/*", "tokenizer_2/*"]
NEEDED += [f"{component}/config.json" for component in WEIGHTS]


def _weights(ending: str = "") -> list[str]:
    """Name the weights of all components, plain or of a variant: whole, or an index and shards."""
    return [
        f"{component}/{name}"
        for component, stem in WEIGHTS.items()
        for name in (
            f"{stem}{ending}.safetensors",
            f"{stem}{INDEXED}{ending}.json",
            f"{stem}{ending}-*.safetensors",
        )
    ]


def locate(source: str, revision: str | None) -> tuple[Path, str]:
    """Return the path of a source, downloaded if need be, and its hub id with the commit, if any.

    HdbError for what is nowhere.
    """
    path = Path(os.path.expanduser(source))  # a ~name that is no user's stays as it is
    if path.exists():
        if revision:
            raise UsageError(f"{source} is a path; --revision is for models of the hub")
        return path.absolute(), ""
    if not HUB_ID.fullmatch(source) or source.casefold().endswith((".safetensors", ".ckpt")):
        raise HdbError(f"no such file or folder: {source}")
    folder = _download(source, revision)
    return folder, f"{source}@{folder.name[:12]}"


def _download(name: str, revision: str | None) -> Path:
    """Let the hub's client fetch what is not in its cache; it resumes what was cut off."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    whole = f"{name}@{revision}" if revision else name
    try:
        wanted = NEEDED + _weights()
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
        if any((folder / "unet").glob("*.safetensors")):
            return folder
        wanted += _weights(f".{VARIANT}")  # where the UNet comes in it alone, so does all the rest
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except GatedRepoError as error:
        reason = "asks for its licence to be accepted; do so on its page, then: hf auth login"
        raise HdbError(f"{whole} {reason}") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise HdbError(
            f"{whole} is neither a path here nor a model of the hub; check its name"
        ) from error
    except LocalEntryNotFoundError as error:
        raise HdbError(
            f"{whole} is not a path here, not whole in the hub's cache, and the hub is out of "
            "reach (offline, or HF_HUB_OFFLINE is set); connect and try again, or give a path"
        ) from error
    except Exception as error:
        # The client's transport has errors of its own, of a package that only the client names.
        if not isinstance(error, OSError) and not type(error).__module__.startswith("http"):
            raise
        reason = " ".join(str(error).split())[:200]
        raise HdbError(
            f"{whole} could not be downloaded ({reason}); the same command goes on where it stopped"
        ) from error
