"""Prepared people: the same numbers as in memory, whatever interrupts it, and one line for what is
wrong with a file."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import hdb, refused, told
from identities import LATENT
from PIL import Image
from safetensors.torch import load_file, save_file

from hdbcli.model.base import Base
from hdbcli.model.device import autocast
from hdbcli.training import shards
from hdbcli.training.people import ENOUGH, People, list_people, read_people, read_pictures
from hdbcli.training.shards import INDEX, REPORT, Prepared, encoded, open_shards, prepare
from registry.errors import HdbError

HELD_OUT = Path(__file__).parents[1] / "data/heldout"
PEOPLE = 6


def quiet(*_: object) -> None: ...


def made(data: Path, tiny: Base, out: Path, aligned: bool = False) -> Prepared:
    return prepare(data, tiny, out, "*", aligned, quiet)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Copy six held-out people, two photos each, one of the first with a caption."""
    folder = tmp_path / "data"
    for person in sorted(HELD_OUT.iterdir())[:PEOPLE]:
        shutil.copytree(person, folder / person.name)
    (folder / "900000" / "pixar.txt").write_text("A Pixar character of a [V] face")
    shutil.copy(folder / "900000" / "photo-1.jpg", folder / "900000" / "pixar.jpg")
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make files of about four pictures, so that a few photos fill several."""
    monkeypatch.setattr(shards, "FILE_BYTES", 4 * (3 * 128**2 + 4 * math.prod(LATENT)))


@pytest.mark.usefixtures("small")
def test_what_is_read_from_disk_is_what_was_in_memory(
    tiny: Base, data: Path, tmp_path: Path
) -> None:
    done = made(data, tiny, tmp_path / "out")
    assert (done.people, done.pictures, done.files, done.kept) == (PEOPLE, 13, 3, 0)
    stored = open_shards(tmp_path / "out", tiny)
    held = encoded(tiny, read_people(data, tiny.spec, "*", False, quiet))
    for field in ("names", "members", "styled", "captions", "skipped"):
        assert getattr(stored, field) == getattr(held, field), field
    assert stored.captions and stored.styled[0] == (2,)
    order = [12, 0, 5, 5, 3]  # across files, twice, and backwards
    for field in ("crops", "traits", "latents"):
        disk, memory = getattr(stored, field), getattr(held, field)
        assert disk.shape == memory.shape and disk[order].dtype == memory.dtype
        assert np.array_equal(disk[order], memory[order]) and np.array_equal(disk[7], memory[7])
        assert not np.array_equal(disk[0], disk[12])
    own = tiny.embed(tiny.images([held.crops[3]]))[0]  # of the photos, which alone are read
    assert (torch.from_numpy(held.traits[3]) - own).abs().max() < 1e-3 and not held.traits[2].any()
    with pytest.raises(IndexError):
        stored.crops[13]
    with autocast(tiny.device):  # as preparing encodes: in bfloat16 where a CPU does that fast
        own = tiny.backbone.encode_images(tiny.images([held.crops[3]]).flip(-1))[0].float()
    mirrored, plain = (torch.from_numpy(stored.latents[3][side]).float() for side in (1, 0))
    assert (mirrored - own).abs().max() < 0.01 < (plain - own).abs().max()


@pytest.mark.usefixtures("small")
def test_an_interrupted_run_goes_on_and_ends_the_same(
    tiny: Base, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(data, tiny, tmp_path / "whole")
    with monkeypatch.context() as patch:

        def write(part: shards.Part, *_: object) -> None:
            if "00001" in part.file.name:
                raise KeyboardInterrupt
            real(part, *_)

        real = shards._write
        patch.setattr(shards, "_write", write)
        with pytest.raises(KeyboardInterrupt):
            made(data, tiny, tmp_path / "cut")
    assert len(contents(tmp_path / "cut")) == 1
    with pytest.raises(HdbError, match="is not finished"):
        open_shards(tmp_path / "cut", tiny)
    before = (tmp_path / "cut/people-00000.safetensors").stat()
    assert made(data, tiny, tmp_path / "cut").kept == 1
    assert (tmp_path / "cut/people-00000.safetensors").stat().st_mtime_ns == before.st_mtime_ns
    cut, whole = contents(tmp_path / "cut"), contents(tmp_path / "whole")
    assert cut.keys() == whole.keys() and len(whole) == 5
    for name in (INDEX, REPORT):  # the index has a digest of the content of every file
        assert cut[name] == whole[name]


@pytest.mark.usefixtures("small")
def test_only_what_changed_is_prepared_anew(tiny: Base, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = made(data, tiny, out)
    assert made(data, tiny, out) == replace(first, kept=3)
    digest = open_shards(out, tiny).digest
    Image.open(data / "900004" / "photo-0.jpg").rotate(5).save(data / "900004" / "photo-0.jpg")
    assert made(data, tiny, out).kept == 2
    assert open_shards(out, tiny).digest != digest
    shutil.rmtree(data / "900005")  # who leaves the folder leaves the prepared people
    shutil.rmtree(data / "900004")
    gone = made(data, tiny, out)
    assert gone.people == 4 and len(list(out.glob("people-*"))) == gone.files == 2


def test_who_is_left_out_and_why(tiny: Base, data: Path, tmp_path: Path) -> None:
    for name, content in (("faceless", None), ("broken", b"\xff\xd8\xff no picture")):
        (data / name).mkdir()
        photo = data / name / "0.png"
        Image.new("RGB", (200, 200)).save(photo) if content is None else photo.write_bytes(content)
    (data / "empty").mkdir()
    shutil.copytree(data / "900001", data / "twin")
    done = made(data, tiny, tmp_path / "out")
    assert done.people == PEOPLE + 1
    report = (tmp_path / "out" / REPORT).read_text().splitlines()
    for fact in ("empty holds no photo", "faceless is left out: none of 1", "no face found"):
        assert sum(fact in line for line in report) == 1, fact
    assert sum("broken" in line for line in report) == 2
    ((one, other, distance),) = done.alike
    assert {one, other} == {"900001", "twin"} and distance < 1e-3
    assert any("900001 and twin look like one person" in line for line in report)


def test_no_person_left(tiny: Base, tmp_path: Path) -> None:
    (tmp_path / "data/ann").mkdir(parents=True)
    Image.new("RGB", (200, 200)).save(tmp_path / "data/ann/0.png")
    with pytest.raises(HdbError, match=r"none of the 1 photos .* no face found"):
        made(tmp_path / "data", tiny, tmp_path / "out")
    with pytest.raises(HdbError, match="is the folder of the photos"):
        made(tmp_path / "data", tiny, tmp_path / "data")


def cut(out: Path) -> None:
    path = out / "people-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-60_000])


def removed(out: Path) -> None:
    (out / "people-00000.safetensors").unlink()


def replaced(out: Path) -> None:
    rewritten(out, **{"hdb.content": "f" * 64})


def renewed(out: Path) -> None:
    rewritten(out, **{"hdb.format": "3"})


def foreign(out: Path) -> None:
    save_file({"crops": torch.zeros(1)}, out / "people-00000.safetensors")


def rewritten(out: Path, **changes: str) -> None:
    from safetensors import safe_open

    path = out / "people-00000.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata() | changes
    save_file(load_file(path), path, metadata)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (cut, "truncated"),
        (removed, "no such file"),
        (replaced, "is not the file that was prepared"),
        (renewed, "has format 3, this hdb reads 2"),
        (foreign, "does not hold prepared people"),
    ],
)
def test_a_file_that_is_not_what_it_was(
    tiny: Base, prepared: Path, tmp_path: Path, harm: Callable[[Path], None], says: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    open_shards(out, tiny)  # the control
    harm(out)
    with pytest.raises(HdbError, match=says) as raised:
        open_shards(out, tiny)
    assert "hdb train prepare" in str(raised.value) and "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def prepared(tiny: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare one person's two photos as crops that need no detector."""
    data = tmp_path_factory.mktemp("people") / "photos"
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 256, (128, 128, 3), np.uint8)
        (data / "ann").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(data / "ann" / f"{index}.png")
    made(data, tiny, data.with_name("prepared"), aligned=True)
    return data.with_name("prepared")


def test_what_is_prepared_serves_its_own_base(tiny: Base, prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    index = json.loads((out / INDEX).read_text())
    other = replace(tiny, spec=replace(tiny.spec, name="fine-tune"))
    open_shards(out, other)  # the control: with the same autoencoder
    changed = [
        ({"resolution": 512}, "resolution 512, not 128"),
        ({"probe": [value + 1 for value in index["base"]["probe"]]}, "another autoencoder"),
    ]
    for change, says in changed:
        base = index["base"] | change
        (out / INDEX).write_text(json.dumps(index | {"base": base}))
        with pytest.raises(HdbError, match=says):
            open_shards(out, tiny)
    for text, says in (("{", "not an index"), (json.dumps(index | {"format": 9}), "format 9")):
        (out / INDEX).write_text(text)
        with pytest.raises(HdbError, match=says):
            open_shards(out, tiny)


def test_a_file_that_is_cut_off_in_use(tiny: Base, prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    people = open_shards(out, tiny)
    cut(out)  # a mapped file would end the process with SIGBUS here
    with pytest.raises(HdbError, match="was cut off while it was in use"):
        people.crops[1]


def test_processes_read_what_one_reads(data: Path, tiny: Base) -> None:
    files = [f for photos in list_people(data, "*")[0].values() for f in photos][:2]
    many = files * ENOUGH  # two processes' worth
    alone = [picture.crop for picture in read_pictures(files, tiny.spec, False, 1)]
    several = list(read_pictures(many, tiny.spec, False, 2))
    assert len(several) == len(many) and several[2].crop is not several[0].crop
    for index, picture in enumerate(several):
        assert np.array_equal(picture.crop, alone[index % 2])


def test_a_full_disk_costs_nothing_that_was_prepared(prepared: Path, tmp_path: Path) -> None:
    """A limit on the size of files makes the system itself refuse to write, as a full disk does."""
    resource = pytest.importorskip("resource", reason="no limits on this system")
    out, data = tmp_path / "out", prepared.with_name("photos")
    words = "train", "prepare", data, "--aligned", "--out", out
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))  # Python ignores its signal
    try:
        said = refused(*words, says="cannot write")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "run the same command again" in said and contents(out) == {}
    assert hdb(*words).exit_code == 0  # the control


def test_the_command_says_what_it_did(prepared: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = hdb("train", "prepare", data, "--out", out)
    assert result.exit_code == 0 and result.stdout.strip() == str(out), result.stderr
    assert f"{PEOPLE} people, 13 pictures in 1 files" in result.stderr
    again = told("train", "prepare", data, "--out", out)
    assert again["path"] == str(out) and again["people"] == PEOPLE and again["kept"] == 1
    words = "train", "hypernetwork", out, "-o", tmp_path / "h.safetensors"
    refused(*words, "--pattern", "photo-*", says="is prepared already")
    (out / INDEX).unlink()
    refused(*words, says="is not finished")


def test_memory_does_not_grow_with_people(tiny: Base, tmp_path: Path) -> None:
    """Reading rows of twenty times as many pictures holds no more of them: buffers of the files."""
    import tracemalloc

    def peak(count: int) -> int:
        people = synthetic(tiny, tmp_path / str(count), count)
        opened = open_shards(tmp_path / str(count), tiny)
        assert len(opened.names) == count and people
        tracemalloc.start()
        try:
            for row in range(0, count, max(1, count // 20)):
                opened.crops[[row]], opened.latents[[row]]  # type: ignore[index]
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(20), peak(400)
    assert many - few < 200_000 < 400 * 128**2 * 3 / 50  # what it would be, were a fiftieth held


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "wait4"), reason="asks the system for a process's memory")
def test_training_takes_no_more_memory_with_twenty_times_as_many_people(
    tiny: Base, tmp_path: Path
) -> None:
    def peak(count: int) -> int:
        folder = tmp_path / str(count)
        synthetic(tiny, folder, count)
        words = ["train", "hypernetwork", folder, "--out", tmp_path / f"{count}.safetensors"]
        words += ["--steps", 6, "--batch", 4, "--held-out", 0, "--device", "cpu"]
        process = subprocess.Popen([sys.executable, "-m", "hdbcli", *map(str, words)])
        _, status, used = os.wait4(process.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        shutil.rmtree(folder)
        return used.ru_maxrss

    few, many = peak(1000), peak(20_000)
    assert many < 1.05 * few, (few, many)


def synthetic(tiny: Base, out: Path, count: int) -> int:
    """Write prepared people who do not exist: noise, in files of fifty."""
    facts, listed = shards.facts_of(tiny), []
    shape = facts["latent"]
    out.mkdir()
    for start in range(0, count, 50):
        some = min(50, count - start)
        generator = np.random.default_rng(start)
        part = shards.Part(out / f"people-{start // 50:05d}.safetensors", {}, f"{start}")
        people = People(
            generator.integers(0, 256, (some, 128, 128, 3), np.uint8),
            tuple(str(start + k) for k in range(some)),
            tuple((k,) for k in range(some)),
            (),
            ((),) * some,
            {},
            generator.standard_normal((some, 128), np.float32),
            generator.standard_normal((some, 2, *shape), np.float32).astype(np.float16),
        )
        shards._write(part, people, facts)
        header = shards._header(part.file)
        content = header.metadata["hdb.content"]
        listed.append({"file": part.file.name, "bytes": header.bytes, "content": content})
    index = {"kind": shards.KIND, "format": shards.FORMAT, "base": facts, "files": listed}
    (out / INDEX).write_text(json.dumps(index))
    return count
