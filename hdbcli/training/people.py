"""Read a folder of people: a folder of photos per person, or one photo per person side by side.

Reading needs no torch: the processes that `read_pictures` starts find and crop faces, and
nothing else.
"""

from __future__ import annotations

import functools
import multiprocessing
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import cv2
import numpy as np

from hdbcli.config import PICTURES, PLACEHOLDER, PORTRAIT, Tell
from hdbcli.faces.photo import crop_face, read_photo
from hdbcli.limits import cpus
from registry.errors import HdbError
from registry.spec import BaseSpec

if TYPE_CHECKING:
    from torch import Tensor

    from hdbcli.training.shards import StoredRows

ENOUGH = 32  # pictures that are worth starting another process for

# One row a picture: an array in memory, or a tensor of which rows are read when they are asked for.
Rows: TypeAlias = "np.ndarray | StoredRows"
Persons: TypeAlias = Mapping[str, Sequence[Path]]  # photos by the name of whom they show


@dataclass(frozen=True, eq=False)
class People:
    """Pictures of P people: their aligned crops (N, S, S, 3) uint8, and who is on which.

    `members[p]` indexes the photos of person p; `styled[p]` pictures of them with a caption of
    their own, which are drawn in training and never read by the hypernetwork. Training also needs
    `traits` (N, 256) float32, the recognisers' embeddings of photos, and `latents` (N, 2, c, h, w)
    float16, of each crop and of its mirror image; `shards.encoded` computes them. `digest` names
    the content, where it lies on disk.
    """

    crops: Rows
    names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    skipped: tuple[str, ...] = ()
    styled: tuple[tuple[int, ...], ...] = ()
    captions: Mapping[int, str] = field(default_factory=dict)  # of the styled
    traits: Rows | None = None
    latents: Rows | None = None
    digest: str = ""

    def first(self, count: int | None) -> People:
        """Return the first `count` people, or all."""
        return self._part(slice(count))

    def hold_out(self, wanted: int) -> tuple[People, People | None]:
        """Divide into those to train on and the last `wanted`, at most a tenth: None if that is
        fewer than two."""
        last = min(wanted, len(self.names) // 10)
        if last < 2:  # one alone has no other's theta to compare with
            return self, None
        keep = len(self.names) - last
        return self._part(slice(keep)), self._part(slice(keep, None))

    @functools.cached_property
    def everything(self) -> np.ndarray:
        """Return the numbers of all pictures of these people."""
        groups = (*self.members, *self.styled)
        return np.array([picture for group in groups for picture in group], np.int64)

    def caption(self, drawn: Tensor) -> list[str]:
        """Return the captions of pictures (P, K), people fastest, as samples lie."""
        return [self.captions.get(index, PORTRAIT) for index in drawn.T.flatten().tolist()]

    def _part(self, part: slice) -> People:
        return replace(
            self, names=self.names[part], members=self.members[part], styled=self.styled[part]
        )


class Picture(NamedTuple):
    """What became of one file: a crop (S, S, 3), perhaps with a caption, or why there is none."""

    crop: np.ndarray | None
    caption: str | None = None
    problem: str = ""


def tell_skipped(skipped: Sequence[str], note: Callable[[str], None]) -> None:
    """Say how many photos were left out, if any, and why the first one was."""
    if skipped:
        note(f"warning: {len(skipped)} photos were skipped, the first because: {skipped[0]}")


def read_people(folder: Path, spec: BaseSpec, pattern: str, aligned: bool, tell: Tell) -> People:
    """Read and crop every photo matching `pattern` into memory; photos without one clear face are
    skipped and named.

    `aligned` says that the pictures already are crops of the base's size and framing. A picture
    with a caption beside it (PICTURE.txt, as trainers have it) shows its person in that style.
    """
    persons, skipped = list_people(folder, pattern)
    files = [file for files in persons.values() for file in files]
    pictures = told(read_pictures(files, spec, aligned, processes=1), len(files), tell)
    people = assemble(persons, pictures, spec)
    check_people(folder, len(files), len(people.names), [*people.skipped, *skipped])
    return replace(people, skipped=(*skipped, *people.skipped))


def check_people(folder: Path, files: int, people: int, skipped: Sequence[str]) -> None:
    """Raise HdbError if no picture of a folder can be used."""
    if not people:
        reason = f"first: {skipped[0]}" if skipped else "there is none"
        raise HdbError(f"none of the {files} photos in {folder} can be used; {reason}")


def list_people(folder: Path, pattern: str) -> tuple[dict[str, list[Path]], list[str]]:
    """Return each person's photos by name, and a line for each file and folder that is left out.

    HdbError if there is no photo at all.
    """
    skipped: list[str] = []
    if folder.is_file():
        persons = {folder.stem: [folder]}
    elif folder.is_dir():
        persons, skipped = photos_by_person(folder, pattern)
    else:
        raise HdbError(f"{folder} does not exist; give a folder of photos, or a folder per person")
    if not persons:
        raise HdbError(f"no photo in {folder} matches {pattern!r} ({', '.join(PICTURES)})")
    return persons, skipped


def photos_by_person(folder: Path, pattern: str) -> tuple[dict[str, list[Path]], list[str]]:
    """Return each person's photos by name, and notes on the photos that belong to no person."""

    def photos(place: Path) -> list[Path]:
        try:
            return sorted(f for f in place.glob(pattern) if f.suffix.lower() in PICTURES)
        except (ValueError, NotImplementedError) as error:
            raise HdbError(f"no pattern of file names: {pattern!r} ({error})") from None

    folders = sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    found = {place.name: photos(place) for place in folders}
    persons = {name: files for name, files in found.items() if files}
    loose = photos(folder)
    if persons:
        why = f"lies beside the folders of people; put it into its person's folder in {folder}"
        empty = [  # but for what training itself put there
            name
            for name, files in found.items()
            if not files and not any((folder / name).glob("*.safetensors"))
        ]
        return persons, [
            *(f"{file.name} {why}" for file in loose),
            *(f"{folder / name} holds no photo that matches {pattern!r}" for name in empty),
        ]
    stems = Counter(file.stem for file in loose)
    return {file.stem if stems[file.stem] == 1 else file.name: [file] for file in loose}, []


def assemble(persons: Persons, pictures: Iterator[Picture], spec: BaseSpec) -> People:
    """Put together what came of the photos of some people, in order; there may be none left.

    `skipped` gets a line for each picture that cannot be used, and one for each person of whom
    none can.
    """
    crops: list[np.ndarray] = []
    names: list[str] = []
    members: list[tuple[int, ...]] = []
    styled: list[tuple[int, ...]] = []
    captions: dict[int, str] = {}
    skipped: list[str] = []
    for name, files in persons.items():
        plain: list[int] = []
        others: list[int] = []
        for _ in files:
            crop, caption, problem = next(pictures)
            if crop is None:
                skipped.append(problem)
                continue
            if caption:
                captions[len(crops)] = caption
            (others if caption else plain).append(len(crops))
            crops.append(crop)
        if plain:
            names.append(name)
            members.append(tuple(plain))
            styled.append(tuple(others))
        elif others:
            skipped.append(
                f"all pictures of {name} have captions of their own; add a photo without one"
            )
        else:
            skipped.append(f"{name} is left out: none of {len(files)} photos can be used")
    side = spec.resolution
    return People(
        np.stack(crops) if crops else np.zeros((0, side, side, 3), np.uint8),
        tuple(names),
        tuple(members),
        tuple(skipped),
        tuple(styled),
        captions,
    )


def told(pictures: Iterable[Picture], total: int, tell: Tell) -> Iterator[Picture]:
    """Pass pictures on and tell how many were read."""
    for done, picture in enumerate(pictures, 1):
        tell("read", done, total)
        yield picture


def read_pictures(
    files: Sequence[Path],
    spec: BaseSpec,
    aligned: bool,
    processes: int | None = None,
    ahead: int = ENOUGH,
) -> Generator[Picture]:
    """Read and crop pictures, in order, in `processes` (None: one a core that this process may
    use) that never are more than `ahead` pictures ahead of what was taken from the iterator.

    HdbError if one of the processes is killed.
    """
    cores = processes or cpus()
    read = partial(read_picture, spec.template, spec.resolution, aligned)
    if min(cores, len(files) // ENOUGH) < 2:
        yield from map(read, files)
        return
    fresh = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads hangs
    pool = ProcessPoolExecutor(min(cores, len(files) // ENOUGH), fresh, _serve)
    try:
        waiting: deque[Future[Picture]] = deque()
        for file in files:
            waiting.append(pool.submit(read, file))
            if len(waiting) > max(ahead, 2 * cores):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise HdbError(
            "a process that reads photos was killed, most likely for want of memory; run the same "
            f"command with fewer than --processes {cores}: it goes on where it was"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _serve() -> None:
    """Get a reading process ready: Ctrl-C is its parent's to answer, whose death ends it too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        assert parent is not None
        parent.join()
        signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()


def read_picture(
    template: Sequence[tuple[float, float]], side: int, aligned: bool, file: Path
) -> Picture:
    """Read one picture as an aligned crop of `side` pixels, with the caption beside it."""
    try:
        caption = _caption(file)
        if not aligned:
            return Picture(crop_face(file, np.array(template), side).image, caption)
        image = read_photo(file)
        if image.shape[:2] == (side, side):
            return Picture(image, caption)
        height, width = image.shape[:2]
        return Picture(None, None, f"{file} is {width} x {height} px, an aligned crop has {side}")
    except HdbError as error:
        return Picture(None, None, str(error))


def _caption(file: Path) -> str | None:
    """Return the caption beside a picture, with [V] for the person; None without one."""
    beside = file.with_suffix(".txt")
    if not beside.exists():
        return None
    try:
        caption = " ".join(beside.read_text(encoding="utf-8").split())
    except (OSError, ValueError) as error:
        raise HdbError(
            f"{beside} cannot be read as a caption ({error}); mend or remove it"
        ) from None
    if PLACEHOLDER not in caption:
        raise HdbError(f"{beside} says {caption[:60]!r}; put {PLACEHOLDER} where the person is")
    return caption
