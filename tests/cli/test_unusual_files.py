"""Files that are no plain files, and names that are no text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ok, told
from PIL import Image

from registry import store
from registry.checkpoints.safetensors import read_header
from registry.errors import HdbError


@pytest.mark.skipif(os.name != "posix", reason="pipes")
def test_what_is_no_plain_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")  # as /dev/stdout leads to one
    for name in ("pipe", "link"):
        with (
            pytest.raises(HdbError, match=f"cannot write .*{name}: it is not a plain file"),
            store.write_beside(tmp_path / name),
        ):
            raise AssertionError("the block must not run")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


@pytest.mark.skipif(os.name != "posix", reason="names of bytes")
def test_a_name_that_is_no_text_becomes_text_where_it_is_written(
    alice: Path, tmp_path: Path
) -> None:
    odd = tmp_path / os.fsdecode(b"b\xff\x1b.safetensors")
    shown = "b\ufffd\ufffd"
    odd.write_bytes(alice.read_bytes())
    lora, merged = tmp_path / os.fsdecode(b"l\xff.safetensors"), tmp_path / "m"
    ok("export", odd, "-o", lora)
    assert read_header(lora, 2**30).metadata["modelspec.title"] == shown
    ok("merge", odd, "-o", merged)
    unet = merged / "unet" / "diffusion_pytorch_model.safetensors"
    assert read_header(unet, 2**40).metadata["modelspec.title"] == shown
    told("compose", f"{odd}=0.5", "alice=0.5", "--as", "eve")
    assert told("show", "eve")["lineage"] == [f"composed of 0.5 {shown} + 0.5 alice"]
    words = "-n", 1, "--steps", 1, "--seed", 1, "--lora", lora, "-o", tmp_path / "pictures"
    made = told("gen", odd, "a [V] face", *words)
    assert made["name"] == made["pictures"][0]["name"] == shown
    (picture,) = (tmp_path / "pictures").iterdir()
    said = Image.open(picture).info["parameters"]
    assert f"Identity: {shown} 1," in said and "Loras: l\ufffd 1" in said


@pytest.mark.skipif(os.name != "posix", reason="names of bytes")
def test_a_name_that_is_no_text_does_not_end_a_list(alice: Path) -> None:
    odd = os.fsencode(alice.parent) + b"/\xff.safetensors"
    Path(os.fsdecode(odd)).write_bytes(alice.read_bytes())
    for words in (["list"], ["list", "--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "hdbcli", *words],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        )
        assert done.returncode == 0 and "alice" in done.stdout and "udcff" in done.stdout
