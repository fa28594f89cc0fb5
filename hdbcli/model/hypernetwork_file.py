"""The hypernetwork's file: fp16 weights in safetensors, the configuration in the header."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from hdbcli.method.hypernet import HyperConfig, HyperNetwork
from registry.checkpoints.safetensors import LARGEST, read_header, read_tensors, save_tensors
from registry.errors import HdbError
from registry.files import write_kept


def save_hypernetwork(model: HyperNetwork, path: Path) -> None:
    """Write the weights as fp16 safetensors with the configuration in the header."""
    tensors = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    metadata = {"format": "pt", "hdb.kind": "hypernetwork"}
    metadata["hdb.config"] = json.dumps(asdict(model.config))
    write_kept(path, lambda file: save_tensors(tensors, file, metadata))


def targets_of(path: Path | None) -> str | None:
    """Return the digest of the targets that a hypernetwork was trained for; None where there is no
    file, or none that says so."""
    if path is None:
        return None
    try:
        return str(json.loads(read_header(path, LARGEST).metadata["hdb.config"])["targets_digest"])
    except (HdbError, KeyError, TypeError, ValueError):
        return None


def load_hypernetwork(path: Path) -> tuple[HyperNetwork, str]:
    """Read a hypernetwork in fp32 and the sha256 of its file; HdbError if the file is not one."""
    try:
        metadata, tensors = read_tensors(path)
        model = HyperNetwork(HyperConfig(**json.loads(metadata["hdb.config"])))
        model.load_state_dict(tensors)
    except (HdbError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise HdbError(
            f"{path} is not a hypernetwork this hdb can read ({error}); train or fetch it again"
        ) from error
    return model.eval(), hashlib.sha256(path.read_bytes()).hexdigest()
