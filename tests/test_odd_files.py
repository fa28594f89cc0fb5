"""Files that are no plain files, and names that are no text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from registry import store
from registry.errors import RegistryError


@pytest.mark.skipif(os.name != "posix", reason="pipes")
def test_what_is_no_plain_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")  # as /dev/stdout leads to one
    for name in ("pipe", "link"):
        with (
            pytest.raises(RegistryError, match=f"cannot write .*{name}: it is no plain file"),
            store.write_beside(tmp_path / name),
        ):
            raise AssertionError("the block must not run")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]
