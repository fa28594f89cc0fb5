"""Write a merged model: one original checkpoint or a diffusers folder, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from hdbcli.config import Tell
from hdbcli.interop.merge import Merge
from hdbcli.model.files import Checkpoint, open_checkpoint
from registry.bases.settings import predicts
from registry.checkpoints.contents import INDEX, PREDICTS_V, ZERO_SNR, read_config
from registry.checkpoints.ldm import architecture_of
from registry.checkpoints.safetensors import NUMBERS, Item, write_tensors
from registry.errors import HdbError, UsageError
from registry.files import REFUSALS, WEIGHTS, check_writable, refuse_file_as_folder, write_beside
from registry.spec import BaseSpec

FORMATS = ("diffusers", "single-file")
MODEL_SPEC = {"epsilon": "epsilon", "v_prediction": "v"}


def write_single(merge: Merge, out: Path, title: str, tell: Tell) -> int:
    """Write one checkpoint file in the original layout; return its bytes."""
    checkpoint = merge.checkpoint
    root = checkpoint.root
    items = merge.items(root) if checkpoint.single else merge.single_file() + _marks(checkpoint)
    metadata = dict(checkpoint.headers[root].metadata) if checkpoint.single else {}
    metadata |= _model_spec(checkpoint, title)
    total = sum(item.bytes for item in items)
    out = out.resolve()  # a link stays, and what it leads to is replaced
    _check_space(out, total)
    with write_beside(out) as beside:
        write_tensors(beside, items, metadata, _counter(tell, total))
    return out.stat().st_size


def write_folder(merge: Merge, out: Path, title: str, tell: Tell) -> int:
    """Write a diffusers folder: configs and untouched files as they are; return its bytes."""
    checkpoint = merge.checkpoint
    plan = list(_plan(merge))
    total = sum(source.stat().st_size for source, _ in plan)
    _check_space(out, total)
    counted = _counter(tell, total)
    copied = {source.relative_to(checkpoint.root).parts[0] for source, _ in plan}
    index = _index(checkpoint.root, copied)
    with _folder_beside(out) as beside:
        (beside / INDEX).write_bytes(index)
        for source, items in plan:
            target = beside / source.relative_to(checkpoint.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            if items is None:
                shutil.copyfile(source, target)
                counted(source.stat().st_size)
            else:
                metadata = checkpoint.headers[source].metadata | _model_spec(checkpoint, title)
                write_tensors(target, items, metadata, counted)
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())


def _plan(merge: Merge) -> Iterator[tuple[Path, list[Item] | None]]:
    """Yield every file of the pipeline's components, with its tensors if some of them change."""
    checkpoint = merge.checkpoint
    patched = {file for file, _ in merge.targets}
    loaded = {file for files in checkpoint.files.values() for file in files}
    named = read_config(checkpoint.root / INDEX)  # whose words are never taken for paths
    for folder in sorted(part for part in checkpoint.root.iterdir() if part.name in named):
        files = sorted(folder.rglob("*"))
        if not checkpoint.files[folder.name] and any(file.suffix in WEIGHTS for file in files):
            continue  # a safety checker that is a pickle: its settings alone are no component
        for file in files:
            if file in loaded:
                changed = file in patched or merge.cast
                yield file, merge.items(file) if changed else None
            elif file.is_file() and file.suffix not in WEIGHTS:  # other weights lack the identity
                yield file, None


def _index(root: Path, copied: Set[str]) -> bytes:
    """Return the index without the components that were not copied, which diffusers would look for:
    hdb downloads no safety checker."""
    index = read_config(root / INDEX)
    gone = [
        name
        for name, value in index.items()
        if isinstance(value, list) and any(value) and name not in copied
    ]
    if not gone:
        return (root / INDEX).read_bytes()
    return json.dumps(index | {name: [None, None] for name in gone}, indent=2).encode()


def check_folder(out: Path, force: bool) -> None:
    """Raise HdbError now if the merged model could not be written to `out`."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give a folder")
    refuse_file_as_folder(out, "one file is named .safetensors, the one kind that hdb writes")
    if out.resolve() == Path.cwd() or os.path.ismount(out):  # cannot be renamed away
        raise HdbError(f"{out} cannot be replaced as a whole; give a folder inside it")
    if out.exists() and any(out.iterdir()):
        if not force:
            raise HdbError(
                f"{out} is not empty; give another folder, or --force to replace a model"
            )
        if not (out / INDEX).exists():
            raise HdbError(
                f"{out} holds no model, so --force does not replace it; give another folder"
            )
    _rehearse(out)


def _rehearse(out: Path) -> None:
    """Do beside `out` with a small folder what is done with the model at the end."""
    parent = out.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".hdb-", dir=parent) as room:
            new, place = Path(room, "new"), Path(room, "model")
            new.mkdir()
            (new / INDEX).write_bytes(b"{}")
            if out.exists():
                place.mkdir()
            _take_place(new, place)
    except OSError as error:
        raise HdbError(
            f"cannot write {out}: {error.strerror or error}; give another --out"
        ) from error


def check_file(out: Path, force: bool) -> None:
    """Raise HdbError now if the merged checkpoint could not be written to `out`."""
    if out.suffix.casefold() != ".safetensors":
        raise UsageError(f"{out} is not named .safetensors, the one kind of file hdb writes")
    if out.is_dir():
        raise HdbError(f"{out} is a folder; give a file")
    if out.exists() and not force:
        raise HdbError(f"{out} exists already; give another name, or --force to replace it")
    check_writable(out)


def check_apart(out: Path, root: Path) -> None:
    """Raise HdbError if writing `out` would touch the base's own files."""
    mine, theirs = out.resolve(), root.resolve()
    if mine == theirs or theirs in mine.parents or mine in theirs.parents:
        raise HdbError(f"{out} and the base's own files in {root} overlap; give another --out")


@contextmanager
def with_files(spec: BaseSpec, form: str, out: Path) -> Iterator[BaseSpec]:
    """Give a base files that can be copied in this format.

    Only a base that lies in one file, or names none, is loaded and unpacked for it, into a folder
    beside `out`, where there must be room for a model anyway.
    """
    if spec.files is not None and (form == "single-file" or spec.files.is_dir()):
        yield spec
        return
    dtype = "float32"
    if spec.files is not None:
        checkpoint = open_checkpoint(spec)
        place = next(iter(checkpoint.places.values()))
        dtype = NUMBERS[checkpoint.info(place).dtype]
    parent = out.resolve().parent
    with tempfile.TemporaryDirectory(prefix=".hdb-", dir=parent) as folder:
        try:
            spec.load("cpu", dtype).save(Path(folder))
        except (OSError, SafetensorError) as error:
            raise HdbError(
                f"base model {spec.name} could not be unpacked in {parent} ({error}); free space "
                "there, or give another --out"
            ) from error
        if not (Path(folder) / INDEX).is_file():
            raise HdbError(f"base model {spec.name} wrote no {INDEX}; ask who made its plug-in")
        yield replace(spec, files=Path(folder))


def _check_space(out: Path, size: int) -> None:
    parent = out.resolve().parent
    free = shutil.disk_usage(parent).free
    if free < size + 2**20:
        raise HdbError(
            f"the model takes {size:,} bytes and {parent} has {free:,} free; "
            "free some, or give another --out"
        )


@contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `out` at the end; any error removes it, but a
    finished model that cannot take its place is kept, and the HdbError says where."""
    out = out.resolve()  # a link stays, and what it leads to is replaced
    beside, finished = None, False
    try:
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        yield beside
        with suppress(OSError):  # not every file system has permissions
            beside.chmod(0o755)
        finished = True
        _take_place(beside, out)
    except OSError as error:
        advice = f"the model is kept in {beside}" if finished else "free space or go elsewhere"
        raise HdbError(
            f"{out} could not be written ({error.strerror or error}); {advice}"
        ) from error
    except BaseException:
        finished = False
        raise
    finally:
        if beside is not None and not finished:
            shutil.rmtree(beside, ignore_errors=True)


def _take_place(folder: Path, out: Path) -> None:
    """Rename a folder, also where there is one; copy it where the file system cannot rename."""
    before = folder.with_name(f"{folder.name}-before")
    if out.exists():  # is moved away, and back if the new one does not take its place
        os.replace(out, before)
    try:
        os.replace(folder, out)
    except BaseException as error:
        if before.exists():
            os.replace(before, out)
        refused = isinstance(error, OSError) and error.errno in REFUSALS
        if not refused or out.exists():
            raise
        try:
            _copy(folder, out)
        except BaseException:
            shutil.rmtree(out, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
    for _ in range(2):  # the first try fails where the folder got another number as it was renamed
        shutil.rmtree(before, ignore_errors=True)


def _copy(folder: Path, out: Path) -> None:
    """Copy a folder without permissions and times, which `shutil.copytree` does not do without."""
    out.mkdir()
    for source in sorted(folder.rglob("*")):  # a folder before what is in it
        target = out / source.relative_to(folder)
        if source.is_dir():
            target.mkdir()
        else:
            shutil.copyfile(source, target)


def _model_spec(checkpoint: Checkpoint, title: str) -> dict[str, str]:
    """Say what the file is, in the words of ModelSpec."""
    spec = checkpoint.spec
    prediction = predicts(spec.name)
    told = {"modelspec.prediction_type": MODEL_SPEC[prediction]} if prediction else {}
    return told | {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture_of(spec.family, prediction),
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": f"{spec.resolution}x{spec.resolution}",
        "modelspec.trigger_phrase": spec.identifier,
        "modelspec.merged_from": f"{spec.name}, {title}",
    }


def _marks(checkpoint: Checkpoint) -> list[Item]:
    """Return the empty tensors by which a single file of XL says that it predicts v, and up to the
    very end: its weights do not show it."""
    config = checkpoint.root / "scheduler" / "scheduler_config.json"
    if checkpoint.spec.family != "sdxl" or not config.is_file():
        return []
    told = json.loads(config.read_text(encoding="utf-8"))
    there = {
        PREDICTS_V: told.get("prediction_type") == "v_prediction",
        ZERO_SNR: bool(told.get("rescale_betas_zero_snr")),
    }
    return [Item(key, "F32", (0,), lambda: ()) for key, said in there.items() if said]


def _counter(tell: Tell, total: int) -> Callable[[int], None]:
    """Tell in megabytes how far the work is."""
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        tell("merge", done >> 20, max(1, total >> 20))

    return count
