"""Damaged files of every kind end in one line, not in a traceback: a few of each, see mutations."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import mutations
import pytest

from registry.errors import HdbError


@pytest.mark.parametrize("kind", ["identities", "loras", "photos"])
def test_damaged_files_are_refused(kind: str, made: Path, tmp_path: Path) -> None:
    made_of = {"loras": mutations.loras, "photos": mutations.photos}
    sound = made_of[kind]() if kind in made_of else [made.read_bytes()]
    read, suffix = mutations.readers()[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, content in enumerate(sound):  # the control: as they are, they are read
            path = tmp_path / f"{number}{suffix}"
            path.write_bytes(content)
            read(path)
        outcome = mutations.run(read, sound, 100, suffix)
    assert outcome.files == 100 and not outcome.failures
    assert outcome.read < 60  # a photo with a wrong pixel is still one


def test_damage_is_found_and_told(made: Path) -> None:
    """The control: a reader that falls over, and one that says two lines."""

    def falls(_: Path) -> None:
        raise KeyError("hdb.down")

    def talks(_: Path) -> None:
        raise HdbError("one\ntwo")

    for reader in (falls, talks):
        outcome = mutations.run(reader, [made.read_bytes()], 3, ".safetensors")
        assert sorted(outcome.failures) == [0, 1, 2] and not outcome.good
    whole = made.read_bytes()
    assert all(mutations.damaged(whole, seed) != whole for seed in range(50))
    assert mutations.damaged(whole, 7) == mutations.damaged(whole, 7)


def test_a_file_counts_as_slow_only_if_it_is_slow_twice(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutations, "SLOWEST", 0.5)
    monkeypatch.setattr(mutations, "peak", lambda: 0.0)  # which knows what other tests held
    calls: list[float] = []

    def once(_: Path) -> None:
        calls.append(0.0)
        time.sleep(0.7 if len(calls) == 1 else 0)

    whole = made.read_bytes()
    assert mutations.run(once, [whole], 2, ".safetensors").good and len(calls) == 3
    assert not mutations.run(lambda _: time.sleep(0.7), [whole], 1, ".safetensors").good
