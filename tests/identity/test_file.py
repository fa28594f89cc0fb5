"""An identity comes back as it was saved; a damaged, edited, foreign or newer file is refused."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from identities import FACTS, facts
from torch import Tensor

from hdbcli.identity.file import Identity, check_fits, encode, load, save
from registry.checkpoints.safetensors import TensorInfo, read_header
from registry.errors import HdbError
from registry.identity_facts import content_digest
from registry.store import summary

Table = dict[str, Any]
SHAPE = 6, 10, 5  # targets, a and b of what `make` makes


def make(targets: int = 6, rank: int = 2, a: int = 10, b: int = 5, **changes: Any) -> Identity:
    generator = torch.Generator().manual_seed(1)
    down = torch.randn(targets, rank, a, generator=generator)
    up = torch.randn(targets, b, rank, generator=generator) * 0.02
    down, up = changes.pop("down", down), changes.pop("up", up)
    return Identity(facts(**changes), down, up)


def split(raw: bytes) -> tuple[Table, bytes]:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(table: Table | str, content: bytes) -> bytes:
    text = (table if isinstance(table, str) else json.dumps(table)).encode()
    return len(text).to_bytes(8, "little") + text + content


def sign(table: Table, content: bytes) -> bytes:
    """Make the content digest right again, as an attacker would."""
    tensors = {
        name: TensorInfo(one["dtype"], tuple(one["shape"]), tuple(one["data_offsets"]))
        for name, one in table.items()
        if name != "__metadata__"
    }
    words = table["__metadata__"]
    words["hdb.content"] = content_digest(words, tensors, content)
    return join(table, content)


def told(path: Path, raw: bytes) -> str:
    """Write bytes and return what `load` says against them."""
    path.write_bytes(raw)
    with pytest.raises(HdbError) as caught:
        load(path)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "alice.safetensors"
    save(make(), path)
    return path


def same(first: Identity, second: Identity) -> bool:
    names = [name for name in first.__dataclass_fields__ if name not in {"down", "up"}]
    return all(getattr(first, name) == getattr(second, name) for name in names)


def bound(side: Tensor, dim: int, dtype: str) -> Tensor:
    """Return how far a number may be off, as the docstring of `save` says."""
    if dtype == "fp32":
        return torch.zeros_like(side)
    if dtype == "fp16":
        return side.abs() * 2**-11 + 3e-8
    return side.abs().amax(dim, keepdim=True) * 0.004 + 3e-8


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_what_is_saved_comes_back(tmp_path: Path, dtype: str) -> None:
    path, again = tmp_path / "alice.safetensors", tmp_path / "b.safetensors"
    down, up = make().down, make().up
    down[0] *= 1e-4  # rows near fp16's floor
    up[1] = 0  # as theta_0 is
    made = make(down=down, up=up)
    assert save(made, path, dtype) == path.stat().st_size
    back = load(path)
    assert same(made, back) and back.rank == 2 and back.numbers == made.numbers == 180
    assert back.down.dtype == back.up.dtype == torch.float32
    assert ((back.down - down).abs() <= bound(down, 2, dtype)).all()
    assert ((back.up - up).abs() <= bound(up, 1, dtype)).all()
    assert (back.up[1] == 0).all()
    assert torch.equal(back.down, down) == (dtype == "fp32")  # the control: rounding was real
    assert summary(path)["dtype"] == dtype and path.stem.encode() not in path.read_bytes()
    save(made, again, dtype)
    assert again.read_bytes() == path.read_bytes()  # equal content, equal bytes
    save(made.saying(steps=41), again, dtype)
    assert again.read_bytes() != path.read_bytes()


# Of the files that the first hdb wrote of numbers that round the same everywhere.
FIRST = {
    "fp32": "17a652f3d66977576c0e8dcab2a7ab25b582bce2fa6b78100869246428db0d7c",
    "fp16": "6f7f43ed4e290ba138f81f89b1282ebab05d008f4441176129aa704049ad0c15",
    "int8": "47c5c6a812f218a15ff2ab5161ffa76d1788595893bffc9640d6f7568712ba2d",
}


@pytest.mark.parametrize("dtype", FIRST)
def test_files_are_byte_for_byte_those_of_the_first_format(dtype: str) -> None:
    down = torch.arange(120.0).view(6, 2, 10) / 64 - 1
    up = torch.arange(60.0).view(6, 5, 2) / 512
    raw = encode(make(down=down, up=up), dtype)
    assert hashlib.sha256(raw).hexdigest() == FIRST[dtype]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_the_library_reads_the_same_and_a_second_save_too(tmp_path: Path, dtype: str) -> None:
    path, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save(make(), path, dtype)
    save(load(path), again, dtype)
    assert path.read_bytes() == again.read_bytes()  # rounded once, then never again
    with safetensors.safe_open(path, "pt") as stock:
        metadata = stock.metadata()
    ours = read_header(path)
    assert metadata == ours.metadata and metadata["format"] == "pt"
    tensors = safetensors.torch.load_file(path)
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in ours.tensors.items()}
    down = tensors["down"].float()
    if dtype == "int8":
        down = down * tensors["down_scale"].float()[:, :, None]
    assert torch.equal(down, load(path).down)


@pytest.mark.parametrize(("rank", "dtype"), [(1, "fp32"), (2, "fp16"), (4, "int8")])
def test_the_budget_of_stable_diffusion_1_holds(tmp_path: Path, rank: int, dtype: str) -> None:
    path = tmp_path / "a.safetensors"
    probes = tuple((-1) ** n * 0.0123456789 / (n + 1) for n in range(4))
    made = make(192, rank, 100, 50, probes=probes)
    assert 115_200 < save(made, path, dtype) <= 120_000
    assert load(path).numbers == 28_800 * rank
    assert save(made, path, "fp32") > 120_000 or rank == 1  # the control


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"down": torch.full((6, 2, 10), float("nan"))}, "not finite"),
        ({"up": torch.full((6, 5, 2), float("inf"))}, "not finite"),
        ({"up": torch.full((6, 5, 2), 1e6)}, "save as fp32"),
        ({"up": torch.zeros(5, 5, 2)}, "tensor up"),
        ({"up": torch.zeros(6, 5, 3)}, "tensor up"),
        ({"up": torch.zeros(6, 5)}, "3 dimensions"),
        ({"down": torch.zeros(6, 7, 10), "up": torch.zeros(6, 5, 7)}, "rank 7"),
        ({"down": torch.zeros(0, 2, 10), "up": torch.zeros(0, 5, 2)}, "hdb.targets"),
        ({"likeness": float("nan")}, "likeness"),
        ({"created": "2026-11-22T12:00:00"}, "UTC"),
        ({"created": "2026-11-22T12:00:00+02:00"}, "UTC"),
        ({"identifier": "\x1b[2J"}, "hdb.identifier"),
        ({"probes": (float("nan"),)}, "hdb.basis_probes"),
        ({"lineage": ("a\nb",)}, "hdb.lineage"),
    ],
)
def test_what_could_not_be_loaded_is_never_written(
    tmp_path: Path, changes: Table, says: str
) -> None:
    path = tmp_path / "folder" / "a.safetensors"
    with pytest.raises(HdbError, match=says):
        save(make(**changes), path)
    assert not path.parent.exists()
    save(make(), path)  # the control
    assert os.listdir(path.parent) == ["a.safetensors"]


def test_save_tells_a_wrong_dtype_and_an_unwritable_folder(tmp_path: Path, file: Path) -> None:
    with pytest.raises(HdbError, match="fp32, fp16, int8"):
        save(make(), tmp_path / "a.safetensors", "fp8")
    with pytest.raises(HdbError, match="cannot write"):
        save(make(), file / "a.safetensors")
    with pytest.raises(HdbError, match="at most 16777216"):
        save(make(2000, 50, 60, 50), tmp_path / "a.safetensors", "fp32")
    assert os.listdir(tmp_path) == ["alice.safetensors"]


# Key -> bad value -> what is said; None takes the key away.
BAD_METADATA: dict[str, dict[str | None, str]] = {
    "hdb.version": {"2": "newer hdb .*upgrade", "0": "hdb.version", "one": "hdb.version"},
    "hdb.kind": {"hypernetwork": "not an identity", None: "not an identity"},
    "hdb.content": {"0" * 64: "edited by hand", "0": "hdb.content", None: "hdb.content"},
    "hdb.targets": {"7": "tensor down"},
    "hdb.a": {"11": "tensor down"},
    "hdb.b": {"4": "tensor up"},
    "hdb.rank": {"1": "tensor", "6": "rank 6 is above b 5", "9" * 400: "hdb.rank", "²": "hdb.rank"},
    "hdb.dtype": {"fp32": "tensor down is F16", "int8": "down_scale", "fp64": "unknown dtype"},
    "hdb.base": dict.fromkeys((None, "x" * 201, "\x1b]0;x\x07"), "hdb.base"),
    "hdb.steps": {"-1": "hdb.steps"},
    "hdb.created": {"today": "ISO 8601"},
    "hdb.lineage": dict.fromkeys(("{}", "[1]", "[" * 100_000), "hdb.lineage"),
    "hdb.basis_probes": dict.fromkeys(("[NaN]", "[true]", ""), "hdb.basis_probes"),
    "hdb.likeness": dict.fromkeys(("Infinity", "1" * 5000), "hdb.likeness"),
}


@pytest.mark.parametrize("key", BAD_METADATA)
def test_bad_metadata_are_refused_even_when_signed(file: Path, key: str) -> None:
    raw = file.read_bytes()
    for value, says in BAD_METADATA[key].items():
        table, content = split(raw)
        words = table["__metadata__"]
        del words[key]
        words.update({} if value is None else {key: value})
        file.write_bytes((join if key == "hdb.content" else sign)(table, content))
        with pytest.raises(HdbError, match=says):
            load(file)
        if says != "edited by hand":  # the header alone tells, so a list does too
            with pytest.raises(HdbError, match=says):
                summary(file)
    table, content = split(raw)
    table["__metadata__"]["hdb.steps"] = "41"
    file.write_bytes(sign(table, content))
    assert load(file).facts.steps == 41  # the control: signing is right


def test_an_edit_by_hand_is_seen(file: Path) -> None:
    raw = file.read_bytes()
    assert "edited by hand" in told(file, raw[:-1] + bytes([raw[-1] ^ 1]))
    table, content = split(raw)
    table["__metadata__"]["hdb.base"] = "other"
    assert "edited by hand" in told(file, join(table, content))
    file.write_bytes(join(*split(raw)))  # the control: laid out anew, nothing changed
    assert same(load(file), make())


Edit = Callable[[Table, bytes], bytes]


def up(key: str, value: Any) -> Edit:
    """Return an editor that sets one field of tensor `up`."""
    return lambda table, content: join({**table, "up": {**table["up"], key: value}}, content)


def words(value: Any) -> Edit:
    return lambda table, content: join({**table, "__metadata__": value}, content)


def text(old: str, new: str) -> Edit:
    """Return an editor that replaces in the JSON text, where a dict could not say it."""
    return lambda table, content: join(json.dumps(table).replace(old, new), content)


def head(start: str) -> Edit:
    return lambda table, content: join(start, content)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t, c: b"", "not a safetensors"),
        (lambda t, c: join(t, c)[:8], "not a safetensors"),
        (lambda t, c: b"just some text, longer than a header", "not a safetensors"),
        (lambda t, c: join(t, c)[:200], "truncated"),
        (lambda t, c: join(t, c[:-1]), "truncated"),
        (lambda t, c: join(t, c + b"\0"), "1 bytes too many"),
        (lambda t, c: join(t, c) + bytes(2**24), "at most 16777216"),
        (lambda t, c: join({**t, "pad": "x" * 2**20}, c), "at most 1048576"),
        (lambda t, c: (4).to_bytes(8, "little") + b"{\xff\xff}" + c, "damaged"),
        (head('{"a":' + "[" * 300_000), "nested too deeply"),
        (head("{" + "1" * 50), "damaged"),
        (head('{"a":' + "9" * 5000 + "}"), "damaged"),
        (text('"up"', '"up": 1, "up"'), "comes twice"),
        (text('"hdb.rank"', '"hdb.rank": "9", "hdb.rank"'), "comes twice"),
        (text('"up"', '"x"'), "'x'"),
        (text('"up"', '"b": {"dtype":"I8","shape":[0],"data_offsets":[0,0]}, "up"'), "'b'"),
        (words({"hdb.kind": 7}), "not a string"),
        (words({"hdb.kind": {"deep": "er"}}), "not a string"),
        (words(["a"]), "not a table"),
        (words({"a": "\ud800"}), "damaged"),
        (up("data_offsets", [242, 362]), "starts at 242, not at 240"),
        (up("data_offsets", [238, 358]), "starts at 238, not at 240"),
        (up("data_offsets", [240]), "do not agree"),
        (up("dtype", "F128"), "unknown dtype"),
        (up("dtype", ["F16"]), "unknown dtype"),
        (up("dtype", "BF16"), "tensor up is BF16"),
        (up("shape", [6, 2, 5]), "tensor up"),
        (up("shape", [6, 5, 3]), "do not agree with its shape"),
        (up("shape", [-6, -5, 2]), "whole numbers"),
        (up("shape", [6, 5.0, 2]), "whole numbers"),
        (up("shape", [True, 60]), "whole numbers"),
        (up("shape", [60] + [1] * 9), "dimensions"),
        (up("more", 1), "or has more"),
    ],
)
def test_a_damaged_or_hostile_file_is_refused(file: Path, edit: Edit, says: str) -> None:
    raw = file.read_bytes()
    table, content = split(raw)
    assert len(content) == 360 and table["up"]["data_offsets"] == [240, 360]
    said = told(file, edit(table, content))
    assert says in said and str(file) in said and "\n" not in said
    file.write_bytes(raw)
    assert same(load(file), make())


def test_numbers_that_are_not_finite_are_refused_even_when_signed(file: Path) -> None:
    table, content = split(file.read_bytes())
    for bits in (b"\x00\x7e", b"\x00\x7c"):  # nan and inf in fp16
        assert "not finite" in told(file, sign(table, bits + content[2:]))
    save(make(), file, "int8")
    table, content = split(file.read_bytes())
    first = table["down_scale"]["data_offsets"][0]
    bad = content[:first] + b"\x00\x7c" + content[first + 2 :]
    assert "not finite" in told(file, sign(table, bad))
    file.write_bytes(sign(table, content))
    assert same(load(file), make())


def test_an_identity_fits_its_base_and_warns_on_a_fine_tune() -> None:
    assert check_fits(make(), FACTS, SHAPE) is None
    near = FACTS.probes[0] + 9e-6, FACTS.probes[1]
    assert check_fits(make(), facts(probes=near), SHAPE) is None  # another library's rounding
    with pytest.raises(HdbError, match="of 6 targets, a = 10, b = 5, and tiny has 7, 10, 5"):
        check_fits(make(), FACTS, (7, 10, 5))
    warning = check_fits(make(), facts(base="tuned", base_digest="f" * 64), SHAPE)
    assert warning and "tiny" in warning and "tuned" in warning


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base": "xl", "family": "sdxl"}, r"tiny \(family sd1\).*xl is of family sdxl"),
        ({"targets_digest": "0" * 64}, "cccccccccccc.*000000000000 by now.*make it again"),
        ({"base": "tuned", "targets_digest": "0" * 64}, "000000000000; pass --base tiny"),
        ({"scheme": "other"}, "other/7"),
        ({"seed": 8}, "basis .*/7/.*/8/"),
        ({"basis_digest": "0" * 64}, "in basis"),
        ({"probes": (FACTS.probes[0], -0.2501)}, "off by up to 0.0001"),
        ({"probes": (float("nan"), -0.25)}, "differently"),
        ({"probes": FACTS.probes[:1]}, "1 probes for 2"),
    ],
)
def test_an_identity_is_refused_where_it_means_nothing(changes: Table, says: str) -> None:
    with pytest.raises(HdbError, match=says):
        check_fits(make(), facts(**changes), SHAPE)


def test_what_was_made_is_kept_where_its_name_is_taken_by_then(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before, mine = file.read_bytes(), make(steps=77)
    with pytest.raises(HdbError, match="appeared while this ran") as error:
        save(mine, file, new=True)
    kept = next((tmp_path / "temporary").glob(f"hdb-*/{file.name}"))
    assert (
        str(kept) in str(error.value)
        and load(kept).facts.steps == 77
        and file.read_bytes() == before
    )


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_linked_identity_is_replaced_behind_its_link(tmp_path: Path, file: Path) -> None:
    link = tmp_path / "linked.safetensors"
    link.symlink_to(file)
    save(make(steps=77), link)
    assert link.is_symlink() and load(file).facts.steps == load(link).facts.steps == 77
