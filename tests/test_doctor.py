"""`hdb doctor` says what is there; what is broken becomes one line and never takes it down."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import hdb
from documents import match_page

from hdbcli import doctor
from hdbcli.doctor import BROKEN, OK, WARNING, Check
from registry import store
from registry.bases.added import mark
from registry.bases.settings import Added, Settings, set_default, set_hypernetwork, write_settings
from registry.plugins import load_metrics, load_registry
from registry.tiny import WEIGHTS

ROOT = Path(__file__).resolve().parents[1]
Fake = Callable[[str, str], None]


def named(checks: Any) -> dict[str, Check]:
    return {check.name: check for check in checks}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put modules where the processes that doctor starts, and they alone, find them first."""
    folder = tmp_path / "fakes"

    def write(name: str, code: str) -> None:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(code)

    monkeypatch.setenv("PYTHONPATH", str(folder))
    return write


@pytest.fixture
def added(hdb_home: Path, tmp_path: Path) -> Path:
    """Add a base whose files are a copy of tiny's; return their folder."""
    folder = shutil.copytree(WEIGHTS, tmp_path / "mine")
    files = {str(p.relative_to(folder)): mark(p) for p in folder.rglob("*") if p.is_file()}
    known = Added("mine", str(folder), "sd1", "epsilon", 64, "0" * 64, files)
    write_settings("mine", Settings(added=known))
    return folder


TORCH = """
from types import SimpleNamespace as Made
get_num_threads = lambda: 1
cuda = Made(device_count=lambda: 0)
backends = Made(mps=Made(is_available=lambda: False))
"""


def quick(fake: Fake) -> None:
    """Leave out what takes seconds to import, where a test is about something else."""
    for name, code in {"torch": TORCH, "diffusers": "", "transformers": ""}.items():
        fake(name, code)


def break_plugin(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a distribution whose plug-in cannot be imported."""
    info = site / "torn-1.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torn\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text("[hdb.models]\ntorn = torn_plug:register\n")
    (site / "torn_plug.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(str(site))


def test_a_sound_installation(added: Path, tmp_path: Path) -> None:
    result = hdb("doctor", "--json")
    assert result.exit_code == 0 and not result.stderr, result.stderr
    found = json.loads(result.stdout)
    match_page(("doctor",), found)
    assert found.pop("ok") is True and found.pop("settings") == {} and found.pop("seconds")
    assert list(found) == [
        *("versions", "devices", "bases", "plug-ins", "store", "caches", "environment")
    ]
    assert all(check["state"] == OK for section in found.values() for check in section)
    by_name = {check["name"]: check for section in found.values() for check in section}
    assert by_name["bitsandbytes"]["devices"][0] == "cpu"
    assert by_name["cpu"]["threads"] >= 1 and by_name["memory"]["total"] > 2**30
    assert by_name["tiny"]["predicts"] and by_name["tiny"]["default"]
    assert not by_name["mine"]["predicts"] and "unchanged" in by_name["mine"]["found"]
    assert ["base model tiny"] in [check["offers"] for check in found["plug-ins"]]
    assert by_name["identities"]["identities"] == 0
    assert by_name["HDB_HOME"]["value"] == str(store.root())


def test_what_hdb_can_do_without_is_a_warning(
    added: Path, fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("bitsandbytes", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    quick(fake)
    break_plugin(tmp_path / "site", monkeypatch)
    shutil.rmtree(added)
    (store.folder()).mkdir(parents=True)
    (store.folder() / "odd.safetensors").write_bytes(b"nothing")
    result = hdb("doctor")
    assert result.exit_code == 0 and not result.stderr, result.stderr
    lines = [line for line in result.stdout.splitlines() if f"  {WARNING}  " in line]
    said = {line.split()[1]: line for line in lines}
    assert said.keys() == {"bitsandbytes", "mine", "problem", "identities"}
    assert "crashed with SIGSEGV; hdb uses AdamW in 32 bits" in said["bitsandbytes"]
    assert "changed since it was added" in said["mine"] and "hdb base rm mine" in said["mine"]
    assert "(torn 1.5) is broken" in said["problem"] and "no_such_module" in said["problem"]
    assert "1 damaged, see hdb verify" in said["identities"]


def test_what_hdb_needs_is_broken(hdb_home: Path, fake: Fake) -> None:
    fake("cv2", "raise ImportError('libGL.so.1: cannot open shared object file')\n")
    fake("bitsandbytes", "raise SystemExit(0)\n")
    quick(fake)
    result = hdb("doctor", "--json")
    assert result.exit_code == 1
    assert result.stderr == "error: hdb needs what is broken: opencv-python-headless\n"
    found = json.loads(result.stdout)
    assert found["ok"] is False
    (bad,) = [check for check in found["versions"] if check["state"] == BROKEN]
    assert "libGL.so.1" in bad["found"] and "pip install" in bad["found"]


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGABRT)", "crashed with SIGABRT"),
        ("raise OSError('libcudart.so.13 is missing')", "OSError: libcudart.so.13 is missing"),
        ("import time; time.sleep(600)", "no answer within 2 seconds"),
        ("raise ModuleNotFoundError(\"No module named 'bitsandbytes'\")", "No module named"),
    ],
    ids=["crash", "library", "hang", "missing"],
)
def test_a_broken_bitsandbytes_is_one_line(fake: Fake, code: str, says: str) -> None:
    fake("bitsandbytes", code)
    check = doctor.eight_bit(seconds=2)
    assert check.state == WARNING and says in check.found and "\n" not in check.found
    assert "AdamW in 32 bits" in check.found and check.facts["devices"] == []


def test_a_library_that_crashes_is_blamed_alone(fake: Fake) -> None:
    fake("torch", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    found = named(doctor.libraries())
    assert found["torch"].state == BROKEN and "SIGSEGV" in found["torch"].found
    assert found["numpy"].state == WARNING and "not tried: torch" in found["numpy"].found


def test_the_working_folder_offers_no_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "safetensors.py").write_text("raise SystemExit('mine')")
    monkeypatch.chdir(tmp_path)
    told, problem = doctor.probe(
        "import safetensors; print(json.dumps({'file': safetensors.__file__}))"
    )
    assert problem is None and str(tmp_path) not in told["file"]


def test_the_base_in_use_must_hold(added: Path) -> None:
    found = named(doctor.bases(load_registry()))
    assert found["mine"].state == found["tiny"].state == OK
    (added / "unet" / "config.json").write_text("{}")
    assert named(doctor.bases(load_registry()))["mine"].state == WARNING
    set_default("mine")
    bad = named(doctor.bases(load_registry()))["mine"]
    assert bad.state == BROKEN and "config.json" in bad.found
    set_hypernetwork("tiny", added / "gone.safetensors")
    bad = named(doctor.bases(load_registry()))["tiny"]
    assert bad.state == BROKEN and "gone.safetensors is gone" in bad.found


def test_a_default_that_is_gone(hdb_home: Path) -> None:
    write_settings("other", Settings(default=True))
    bad = named(doctor.bases(load_registry()))["other"]
    assert bad.state == BROKEN and "hdb base default tiny" in bad.found


def test_a_store_that_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HDB_HOME", str(tmp_path / "home"))
    assert doctor.the_store().state == OK
    (tmp_path / "home").write_text("")
    check = doctor.the_store()
    assert check.state == BROKEN and "HDB_HOME" in check.found


def test_an_odd_choice_of_plugins_is_told(hdb_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HDB_PLUGINS", "missing")
    found = list(doctor.plugins(load_registry(), load_metrics()))
    assert any("'missing'" in check.found for check in found if check.state == WARNING)


def test_the_hub_cache_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert doctor.hub_cache().facts["bytes"] == 0
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "one").write_bytes(bytes(1000))
    assert doctor.hub_cache().facts["bytes"] == 1000


def test_every_variable_that_hdb_reads_is_named() -> None:
    code = "\n".join(
        path.read_text()
        for package in ("hdbcli", "registry")
        for path in (ROOT / package).glob("*.py")
    )
    read = set(re.findall(r"environ(?:\.get\(|\[)[\"'](\w+)", code))
    assert {"HDB_HOME", "HDB_PLUGINS"} <= read <= set(doctor.VARIABLES)
