"""Examine an installation: libraries, devices, base models, plug-ins, the store, caches and
the environment.

What can take a process down, native libraries above all, is tried in a process of its own.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hdbcli import __version__
from hdbcli.config import user_defaults, user_file
from hdbcli.limits import free_ram
from registry import orphans, store
from registry.bases.settings import DEFAULT, customised, default_base, read_settings, settings_path
from registry.checkpoints.contents import read_checkpoint
from registry.errors import HdbError
from registry.plugins import Registry, load_metrics, load_registry
from registry.spec import BaseSpec

OK, WARNING, BROKEN = "ok", "warning", "broken"  # hdb works without what is "warning"

LIBRARIES = {  # what is imported -> who publishes it; without one of these hdb does not work
    "torch": "torch",
    "diffusers": "diffusers",
    "transformers": "transformers",
    "numpy": "numpy",
    "cv2": "opencv-python-headless",
    "safetensors": "safetensors",
    "PIL": "pillow",
}
VARIABLES = {
    "HDB_HOME": "the store",
    "HDB_PLUGINS": "which plug-ins are loaded",
    "HDB_DEBUG": "1 lets errors of plug-ins come through",
    "HF_HOME": "folder of the hub's client",
    "HF_HUB_CACHE": "the hub's cache",
    "HF_HUB_OFFLINE": "1 keeps the hub from being asked",
    "CUDA_VISIBLE_DEVICES": "which GPUs torch sees",
    "OMP_NUM_THREADS": "threads of the CPU",
    "OMP_WAIT_POLICY": "PASSIVE lets threads sleep while they wait",
    "LOCAL_RANK": "of accelerate launch",
    "WORLD_SIZE": "of accelerate launch",
}

# Probes say one JSON line a finding, and that they came to their end. A file of the working folder
# is not what they ask for.
_START = "import sys; sys.path[:] = [p for p in sys.path if p]; import importlib, json\n"
_END = "\nprint(json.dumps({'done': True}))"
_LIBRARIES = """
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        why = None
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    print(json.dumps({name: why}), flush=True)
import torch
found = [{"name": "cpu", "threads": torch.get_num_threads()}]
for i in range(torch.cuda.device_count()):
    free, total = torch.cuda.mem_get_info(i)
    found.append({"name": f"cuda:{i}", "model": torch.cuda.get_device_name(i),
                  "free": free, "total": total})
if torch.backends.mps.is_available():
    found.append({"name": "mps", "total": torch.mps.recommended_max_memory()})
print(json.dumps({"devices": found}))
"""
_EIGHT_BIT = """
from bitsandbytes.optim import AdamW8bit
import torch
devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
for device in devices:
    scratch = torch.zeros(4096, device=device, requires_grad=True)
    scratch.grad = torch.ones_like(scratch)
    AdamW8bit([scratch], lr=1e-3).step()
print(json.dumps({"devices": devices}))
"""
SECONDS = 120.0  # that a probe may take; importing torch from a cold disk takes a while


@dataclass(frozen=True)
class Check:
    """One thing looked at: what was found, with what to do if it is bad, and numbers
    for scripts."""

    section: str
    name: str
    found: str
    state: str = OK
    facts: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "state": self.state, "found": self.found, **self.facts}


def examine() -> Iterator[Check]:
    """Look at everything, one thing after the other; nothing that is broken stops it."""
    yield Check("versions", "hdb", __version__)
    yield Check("versions", "python", platform.python_version())
    tried = [*libraries(), eight_bit()]
    yield from sorted(tried, key=lambda check: check.section == "devices")
    registry, metrics = load_registry(), load_metrics()
    yield from bases(registry)
    yield from plugins(registry, metrics)
    yield the_store()
    yield the_defaults()
    yield hub_cache()
    for name, about in VARIABLES.items():
        value = os.environ.get(name)
        said = "not set" if value is None else repr(value)
        yield Check("environment", name, f"{said}: {about}", facts={"value": value})


def libraries(seconds: float = SECONDS) -> Iterator[Check]:
    """Import each library that hdb needs, and ask torch for its devices."""
    told, problem = probe(_LIBRARIES, *LIBRARIES, seconds=seconds)
    culprit = next((name for module, name in LIBRARIES.items() if module not in told), None)
    for module, name in LIBRARIES.items():
        installed = _version(name)
        facts = {"version": installed}
        if module not in told and name != culprit:
            yield Check("versions", name, f"not tried: {culprit} came first", WARNING, facts)
        elif why := told.get(module, problem):
            found = f"{why}; pip install --force-reinstall {name}"
            yield Check("versions", name, found, BROKEN, facts)
        else:
            yield Check("versions", name, installed or "of unknown version", facts=facts)
    yield memory()
    if problem and culprit is None and told["torch"] is None:
        found = f"torch cannot tell ({problem}); look after their drivers, or hide them from it"
        yield Check("devices", "all", found, BROKEN)
    for device in told.get("devices", []):
        name, model = device.pop("name"), device.get("model", "")
        words = [model] if model else []
        words += [f"threads: {device['threads']}"] if "threads" in device else []
        words += [_room(device.get("free"), device["total"])] if "total" in device else []
        yield Check("devices", name, ", ".join(words), facts=device)


def memory() -> Check:
    """Say how much memory the machine has, and how much of it is to be had."""
    free, total = free_ram(), None
    with suppress(AttributeError, OSError, ValueError):  # os.sysconf knows less on some systems
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Check("devices", "memory", _room(free, total), facts={"free": free, "total": total})


def eight_bit(seconds: float = SECONDS) -> Check:
    """Take one step with bitsandbytes' 8-bit AdamW on every kind of device."""
    installed = _version("bitsandbytes")
    told, problem = probe(_EIGHT_BIT, seconds=seconds)
    facts = {"version": installed, "devices": told.get("devices", [])}
    if problem:
        found = f"{problem}; hdb uses AdamW in 32 bits instead; pip install -U bitsandbytes"
        return Check("versions", "bitsandbytes", found, WARNING, facts)
    found = f"{installed}, 8-bit AdamW steps on {' and '.join(facts['devices'])}"
    return Check("versions", "bitsandbytes", found, facts=facts)


def probe(code: str, *words: str, seconds: float = SECONDS) -> tuple[dict[str, Any], str | None]:
    """Run Python code in a process of its own; return what it told, and how it failed if it did."""
    command = [sys.executable, "-c", _START + code + _END, *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {}, f"no answer within {seconds:g} seconds"
    except OSError as error:
        return {}, f"{sys.executable} does not start ({error.strerror or error})"
    told: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        with suppress(ValueError):  # a library says something of its own
            value = json.loads(line)
            told |= value if isinstance(value, dict) else {}
    if told.pop("done", False):
        return told, None
    if done.returncode < 0:
        number = -done.returncode
        known = number in {s.value for s in signal.Signals}
        return told, f"crashed with {signal.Signals(number).name if known else number}"
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return told, " ".join(said[-1].split())[:300]


def bases(registry: Registry[BaseSpec]) -> Iterator[Check]:
    """Look at the files of each base model; hdb needs the one that ships and the default one."""
    default = default_base()
    needed = {DEFAULT, default.casefold()}
    missing = needed - {name.casefold() for name in registry.names()}
    for name in sorted(missing):
        advice = "install hyperdreambooth again" if name == DEFAULT else "hdb base default tiny"
        yield Check("bases", name, f"it is not there, though it is needed; {advice}", BROKEN)
    for spec in registry.specs():
        source, facts = registry.source(spec.name), {"family": spec.family, "predicts": False}
        facts |= {"source": source, "default": spec.name.casefold() == default.casefold()}
        try:
            found = _files(spec)
            own = customised(spec).hypernetwork
            if own and not own.is_file():
                raise HdbError(
                    f"its hypernetwork {own} is gone; hdb base set-hypernetwork {spec.name} "
                    "with a FILE, or --reset"
                )
        except HdbError as error:
            state = BROKEN if spec.name.casefold() in needed else WARNING
            yield Check("bases", spec.name, str(error), state, facts)
            continue
        facts["predicts"] = own is not None
        predicts = "with" if own else "without"
        star = ", the default" if facts["default"] else ""
        found = f"{spec.family}, {found}, {predicts} a hypernetwork{star}; {source}"
        yield Check("bases", spec.name, found, facts=facts)


def plugins(*registries: Registry[Any]) -> Iterator[Check]:
    """Name what each plug-in offers, then what is wrong with some."""
    offered: dict[str, list[str]] = {}
    for registry in registries:
        for name in registry.names():
            offered.setdefault(registry.source(name), []).append(f"{registry.noun} {name}")
    for source, names in offered.items():
        found = f"{', '.join(names)}; {source}"
        facts = {"source": source, "offers": names}
        yield Check("plug-ins", source.partition(":")[0], found, facts=facts)
    problems = [problem for registry in registries for problem in registry.problems]
    for problem in dict.fromkeys(problems):  # both groups complain of HDB_PLUGINS
        yield Check("plug-ins", "problem", problem, WARNING)


def the_store() -> Check:
    """Look at the folder of identities: how many, how large, what is damaged or left over."""
    root = store.root()
    facts: dict[str, Any] = {"path": str(root)}
    above = next(path for path in (root, *root.parents) if path.exists())
    if not os.access(above, os.W_OK):
        found = f"{above} cannot be written; set HDB_HOME to another folder"
        return Check("store", "identities", found, BROKEN, facts)
    try:
        entries, left = store.entries(), orphans.temporaries()
    except HdbError as error:
        return Check("store", "identities", str(error), BROKEN, facts)
    problems = [entry.problem for entry in entries if entry.problem]
    size = sum(entry.bytes for entry in entries)
    disk = shutil.disk_usage(above)
    facts |= {"identities": len(entries), "bytes": size, "problems": problems}
    facts |= {"temporary": len(left), "free": disk.free, "total": disk.total}
    found = f"{len(entries)}, {size:,} bytes in {root}; disk {_room(disk.free, disk.total)}"
    if left:
        found += f"; {len(left)} temporary files of killed runs, see hdb gc"
    if problems:
        found += f"; {len(problems)} damaged, see hdb verify: {problems[0]}"
    return Check("store", "identities", found, WARNING if problems else OK, facts)


def the_defaults() -> Check:
    """Say where the user's own defaults lie, and what they are."""
    path, facts = user_file(), {"path": str(user_file())}
    try:
        values = list(_flat(user_defaults()))
    except HdbError as error:
        return Check("store", "defaults", str(error), WARNING, facts)
    found = f"{', '.join(values) or 'none of the user'}; {path}"
    found += "" if path.exists() else ", which is not there"
    return Check("store", "defaults", found, facts={**facts, "values": values})


def _flat(values: Mapping[str, Any], under: str = "") -> Iterator[str]:
    """Write tables as lines: gen.steps = 30."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{under}{key}.")
        else:
            yield f"{under}{key} = {value}"


def hub_cache() -> Check:
    """Say where the hub's client keeps what it downloaded, and how much that is."""
    from huggingface_hub.constants import HF_HUB_CACHE

    path, size = Path(HF_HUB_CACHE), 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):  # links, of which the cache is full, count as themselves
                size += (Path(folder) / name).lstat().st_size
    found = f"{size:,} bytes in {path}"
    return Check("caches", "hub", found, facts={"path": str(path), "bytes": size})


def _files(spec: BaseSpec) -> str:
    """Say what a base model's files are; HdbError if some are missing, damaged or changed."""
    spec.check()
    if spec.files is None:
        return "files known to its plug-in alone"
    found = read_checkpoint(spec.files)
    added = read_settings(settings_path(spec.name)).added
    unchanged = " unchanged" if added else ""  # only those that were added are watched
    size = sum(path.stat().st_size for path in found.files)
    return f"{len(found.files)} files{unchanged}, {size:,} bytes"


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _room(free: int | None, total: int | None) -> str:
    """Say a size and what is free of it, in GB."""
    words = "? GB" if total is None else f"{total / 1e9:,.1f} GB"
    return words if free is None else f"{words}, {free / 1e9:,.1f} free"
