"""Read the tensors of safetensors files one by one, each in the number format that is wanted: a
file that is opened as a whole would lie in memory beside the model. And write them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from registry.checkpoints.contents import LARGEST
from registry.checkpoints.safetensors import TensorInfo, read_header
from registry.errors import HdbError

FLOATS = ("F64", "F32", "F16", "BF16")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
}


def canonical(component: str, path: str) -> str:
    """Name a module so that the name lasts: newer transformers dropped `text_model.` from
    CLIP's paths."""
    own = path.startswith(("text_model.", "text_projection"))
    if component.startswith("text_encoder") and not own:
        return f"text_model.{path}"
    return path


def tensor_of(content: bytearray, info: TensorInfo) -> Tensor:
    """View bytes as the tensor they are."""
    return torch.frombuffer(content, dtype=DTYPES[info.dtype]).view(info.shape)


def read_floats(
    files: Sequence[Path],
    prefix: str,
    dtype: torch.dtype,
    renamed: Callable[[Iterable[str]], Mapping[str, str]] | None = None,
) -> dict[str, Tensor]:
    """Return the tensors whose names start with `prefix`, as `dtype`; HdbError for what is
    no float.

    `renamed` gives each tensor of a file the name that counts; position ids, of which old files
    hold a row and new ones make it, are left out.
    """
    found = {}
    for path in files:
        header = read_header(path, LARGEST)
        names = renamed(header.tensors) if renamed else {}
        with path.open("rb") as file:
            for stored, info in header.tensors.items():
                name = names.get(stored, stored)
                if not name.startswith(prefix) or name.endswith(".position_ids"):
                    continue
                if info.dtype not in FLOATS:
                    raise HdbError(
                        f"{path}: {name} is {info.dtype}, no float; give the model in F16 or F32"
                    )
                start, end = info.offsets
                file.seek(header.start + start)
                content = bytearray(file.read(end - start))
                found[name] = tensor_of(content, info).to(dtype)
    return found


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write contiguous tensors by name; OSError where that does not work.

    The library's own writer leaves a file that only its owner can read, and has an error of its own
    for a full disk.
    """
    path.write_bytes(save(dict(tensors), metadata))
