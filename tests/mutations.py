"""Feed damaged files to whatever reads files from outside: HdbError is allowed, and nothing else.

    python tests/mutations.py --identities 200000 --loras 50000 --photos 5000

prints a line for each kind: how many were read after all, the slowest, the peak of memory, and the
seeds of files that raise anything else; then the exit code is 1. Every file is a function of its
seed. `test_mutations.py` runs a few of each.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from hdbcli.model.base import Base

SLOWEST = 10.0  # seconds of one file
LARGEST = 2e9  # bytes of memory
# What a hand, a bug or an attacker writes where something else belongs.
ODD = (
    *(None, True, "", "x" * 300, [], {}, [[]], "../../etc/passwd", "NaN", "\u202e\x00"),
    *(-1, 0, 1, 2**31, 2**63, 10**400, 1e308, -0.0),
)
# What the same bytes may be taken for.
SAME_WIDTH = {
    **dict.fromkeys(("F32", "I32", "U32"), ("F32", "I32", "U32")),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), ("F16", "BF16", "I16", "U16")),
    **dict.fromkeys(("I8", "U8", "BOOL"), ("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2")),
    **dict.fromkeys(("F64", "I64", "U64"), ("F64", "I64", "U64")),
}


@dataclass
class Outcome:
    """What became of the files of one kind."""

    files: int = 0
    read: int = 0
    slowest: float = 0.0
    failures: dict[int, str] = field(default_factory=dict)  # seed -> what was raised

    @property
    def good(self) -> bool:
        return not self.failures and self.slowest < SLOWEST and peak() < LARGEST


def peak() -> float:
    """Return the most memory that this process ever held, in bytes."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def damaged(whole: bytes, seed: int) -> bytes:
    """Damage a file in one to three ways: bits, bytes, runs, its end, or its header's JSON."""
    rng = np.random.default_rng(seed)
    content = bytearray(whole)
    for _ in range(rng.integers(1, 4)):
        _WAYS[rng.integers(len(_WAYS))](content, rng)
    return bytes(content)


def run(read: Callable[[Path], object], sound: Sequence[bytes], count: int, suffix: str) -> Outcome:
    """Let `read` read `count` damaged copies of some files in turn."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"damaged{suffix}"
        for seed in range(count):
            path.write_bytes(damaged(sound[seed % len(sound)], seed))
            seconds, wrong = _timed(read, path)
            if seconds >= SLOWEST:  # a machine may stop a process for a while, but hardly twice
                seconds = min(seconds, _timed(read, path)[0])
            outcome.slowest = max(outcome.slowest, seconds)
            if wrong is None:
                outcome.read += 1
            elif wrong:
                outcome.failures[seed] = wrong
            outcome.files += 1
    return outcome


def _timed(read: Callable[[Path], object], path: Path) -> tuple[float, str | None]:
    """Read a file; return the seconds and what was wrong with how it ended: "" for a refusal in a
    line, None if it was read."""
    from registry.errors import HdbError

    start, wrong = time.perf_counter(), None
    try:
        read(path)
    except HdbError as error:
        wrong = f"more than a line: {error!r}" if "\n" in str(error) else ""
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    return time.perf_counter() - start, wrong


def readers() -> Mapping[str, tuple[Callable[[Path], object], str]]:
    """Return what reads each kind of file, and the suffix of its name."""
    from hdbcli.faces.reading import read_photo
    from hdbcli.identity.file import load

    return {
        "identities": (load, ".safetensors"),
        "loras": (add_lora, ".safetensors"),
        "photos": (read_photo, ".png"),
    }


def add_lora(path: Path) -> None:
    """Add a LoRA file to `tiny`, as `hdb gen --lora` does, and put the weights back."""
    from hdbcli.interop.lora_stack import read, stack

    base, kept = _tiny()
    before = [value._version for value in kept]
    try:
        stack(base, [read(str(path))])
    finally:
        for (value, own), version in zip(kept.items(), before, strict=True):
            if value._version != version:
                value.copy_(own)


@cache
def _tiny() -> tuple[Base, dict[Tensor, Tensor]]:
    """Return `tiny` and a copy of each of its parameters."""
    from hdbcli.model.base import load_base
    from registry.plugins import load_registry

    base = load_base(load_registry().get("tiny"), "cpu")
    modules = base.backbone.components.values()
    values = [value.detach() for module in modules for value in module.parameters()]
    return base, {value: value.clone() for value in values}


def _flip(content: bytearray, rng: np.random.Generator) -> None:
    for _ in range(rng.integers(1, 9)):
        if content:
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)


def _early(content: bytearray, rng: np.random.Generator) -> None:
    """Damage the first bytes, where formats say what follows."""
    for _ in range(rng.integers(1, 5)):
        if content:
            content[rng.integers(min(len(content), 64))] = rng.integers(256)


def _cut(content: bytearray, rng: np.random.Generator) -> None:
    del content[rng.integers(len(content) + 1) :]


def _insert(content: bytearray, rng: np.random.Generator) -> None:
    at = rng.integers(len(content) + 1)
    content[at:at] = rng.bytes(rng.integers(1, 65))


def _repeat(content: bytearray, rng: np.random.Generator) -> None:
    first = rng.integers(len(content) + 1)
    content[first:first] = content[first : first + rng.integers(1, 257)]


def _header(content: bytearray, rng: np.random.Generator) -> None:
    """Put something odd in one place of a safetensors header, which stays JSON."""
    if len(content) < 8:
        return
    (length,) = struct.unpack("<Q", content[:8])
    try:
        header = json.loads(bytes(content[8 : 8 + length]))
        holder, key = _place(header, rng)
    except (ValueError, IndexError, RecursionError):
        return _flip(content, rng)
    odd = ODD[rng.integers(len(ODD))]
    if isinstance(holder, dict) and rng.random() < 0.2:
        holder[f"{key}x"] = holder.pop(key)
    else:
        holder[key] = odd
    text = json.dumps(header).encode()
    content[: 8 + length] = struct.pack("<Q", len(text)) + text


def _entry(content: bytearray, rng: np.random.Generator) -> None:
    """Say something else of the same bytes: another shape, other numbers, or another tensor's
    name."""
    if len(content) < 8:
        return
    (length,) = struct.unpack("<Q", content[:8])
    try:
        header = json.loads(bytes(content[8 : 8 + length]))
        names = [name for name in header if name != "__metadata__"]
        one, other = (names[rng.integers(len(names))] for _ in range(2))
        entry = header[one]
        numbers = int(np.prod(entry["shape"]))
        way = rng.integers(4)
        if way == 0:
            header[one], header[other] = header[other], header[one]
        elif way == 1:
            entry["dtype"] = str(rng.choice(SAME_WIDTH[entry["dtype"]]))
        elif way == 2:
            rng.shuffle(entry["shape"])
        else:
            divisor = next(d for d in (*rng.integers(1, 33, 8), 1) if numbers % d == 0)
            shape = [int(divisor), numbers // int(divisor)]
            entry["shape"] = [shape, [numbers], [*shape, 1, 1], [1] * 8][rng.integers(4)]
            entry["shape"] = [] if numbers == 1 and rng.random() < 0.5 else entry["shape"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return _flip(content, rng)
    text = json.dumps(header).encode()
    content[: 8 + length] = struct.pack("<Q", len(text)) + text


def _place(value: object, rng: np.random.Generator) -> tuple[dict | list, str | int]:
    """Return a container inside a JSON value and one of its keys."""
    while True:
        keys: list = list(value) if isinstance(value, dict) else list(range(len(value)))  # type: ignore[arg-type]
        key = keys[rng.integers(len(keys))]
        inner = value[key]  # type: ignore[index]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.1:
            return value, key  # type: ignore[return-value]
        value = inner


_WAYS = (_flip, _early, _cut, _insert, _repeat, _header, _header, _entry, _entry)


FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "HEIF", "JPEG2000", "MPO")


def photos() -> list[bytes]:
    """Return one photo in many formats."""
    from PIL import Image
    from pillow_heif import register_heif_opener

    register_heif_opener()
    photo = Image.open(Path(__file__).parent / "data" / "astronaut.png").convert("RGB")
    photo = photo.resize((128, 128))
    found = []
    for name in FORMATS:
        buffer = io.BytesIO()
        photo.save(buffer, name)
        found.append(buffer.getvalue())
    return found


# The parts of a change of a layer (n, m, k, k) in each kind of file, by what follows its name:
# letters stand for sizes, r for 4, f and g for a factor of n and of m, F and G for the other.
LORAS = (
    {"lora_down.weight": "rmkk", "lora_up.weight": "nr11", "alpha": ""},
    {"lora_down.weight": "rm11", "lora_mid.weight": "rrkk", "lora_up.weight": "nr11"},
    {"lora_down.weight": "rmkk", "lora_up.weight": "nr11", "dora_scale": "n111"},
    {"lora_A.weight": "rmkk", "lora_B.weight": "nr11", "lora_B.bias": "n"},
    {"hada_w1_a": "nr", "hada_w1_b": "rM", "hada_w2_a": "nr", "hada_w2_b": "rM", "alpha": ""},
    {"hada_t1": "rrkk", "hada_w1_a": "rn", "hada_w1_b": "rm"}
    | {"hada_t2": "rrkk", "hada_w2_a": "rn", "hada_w2_b": "rm"},
    {"lokr_w1": "fg", "lokr_w2": "FGkk", "alpha": ""},
    {"lokr_w1_a": "fr", "lokr_w1_b": "rg", "lokr_w2_a": "rF", "lokr_w2_b": "rG", "lokr_t2": "rrkk"},
    {"diff": "nmkk", "diff_b": "n"},
)


def loras() -> list[bytes]:
    """Return small LoRA files of `tiny`, of every kind and with every tool's names."""
    import torch
    from safetensors.torch import save

    base, _ = _tiny()
    unet = base.backbone.components["unet"]
    query = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    paths = ["conv_in", "time_embedding.linear_1", "mid_block.resnets.0.norm1", query]
    found = []
    generator = torch.Generator().manual_seed(0)
    for number, parts in enumerate(LORAS):
        tensors, flat = {}, number % 2 == 0 and "lora_A.weight" not in parts
        for path in paths:
            layer = unet.get_submodule(path)
            layer = getattr(layer, "base", layer)
            n, m, k, _ = (*layer.weight.shape, 1, 1, 1)[:4]
            own = parts if layer.weight.dim() > 1 else {"w_norm": "n", "b_norm": "n"}
            own = {part: own[part] for part in own if own[part] != "n" or layer.bias is not None}
            sizes = {"n": n, "m": m, "k": k, "r": 4, "1": 1, "M": m * k * k}
            sizes |= {"f": 2, "F": n // 2, "g": 4, "G": m // 4}
            stem = f"lora_unet_{path.replace('.', '_')}" if flat else f"base_model.model.{path}"
            for part, letters in own.items():
                shape = [sizes[letter] for letter in letters]
                shape = shape if layer.weight.dim() == 4 or len(shape) < 3 else shape[:2]
                value = torch.randn(shape, generator=generator) / 8
                tensors[f"{stem}.{part}"] = value.half() if number % 3 == 0 else value
        said = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2}, "use_rslora": False}
        found.append(save(tensors, {"lora_adapter_metadata": json.dumps(said), "ss_title": "x"}))
    return found


def examples(folder: Path) -> dict[str, list[bytes]]:
    """Return sound files of each kind: an identity, its LoRA and others, and photos."""
    from commands import QUICK, ok

    from registry import store

    photo = Path(__file__).parent / "data" / "astronaut.png"
    ok("new", photo, "alice", *QUICK, "--yes", "--no-preview")
    ok("export", "alice", "--out", folder / "lora.safetensors")
    identity = store.path_of("alice").read_bytes()
    return {
        "identities": [identity],
        "loras": [(folder / "lora.safetensors").read_bytes(), *loras()],
        "photos": photos(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for kind in ("identities", "loras", "photos"):
        parser.add_argument(f"--{kind}", type=int, default=1000)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    good = True
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HDB_HOME"] = folder
        sound = examples(Path(folder))
        for kind, (read, suffix) in readers().items():
            outcome = run(read, sound[kind], getattr(options, kind), suffix)
            good = good and outcome.good
            print(
                f"{kind}: {outcome.files:,} damaged files, {outcome.read:,} read after all, "
                f"{len(outcome.failures)} failures, slowest {outcome.slowest:.2f} s, "
                f"memory {peak() / 1e9:.2f} GB",
                flush=True,
            )
            for seed, what in list(outcome.failures.items())[:20]:
                print(f"  seed {seed}: {what[:300]}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    sys.exit(main())
