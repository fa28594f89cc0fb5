"""hdb from Python: plain functions, typed results, progress as a callback; nothing is printed.

A base model is loaded once by `load` and handed to the others as `base`; where they get a name, or
nothing, they load one themselves, within the memory there is. A person is an `Identity`, the name
of one in the store, or the path of an identity file. What a user can put right raises HdbError.

`tell(stage, done, total)` is called as work goes on. `note(line)` gets what a command line would
print beside its result; left alone, warnings among these become Python warnings.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image

from hdbcli.config import LARGEST_SEED, MAIN_METHODS, RefineConfig, Tell
from hdbcli.faces.photo import Crop
from hdbcli.faces.source import check_photos
from hdbcli.identity import file as identities
from hdbcli.identity.file import Identity
from hdbcli.method.algebra import stack
from hdbcli.method.lidb import Theta
from hdbcli.model import sample
from hdbcli.model.base import Base, load_base, on_base
from hdbcli.model.contact_sheet import contact_sheet, in_rows
from hdbcli.model.gallery import gallery
from hdbcli.model.hypernetwork_file import targets_of
from hdbcli.model.settings import Settings, read_settings
from hdbcli.training import personalise
from hdbcli.training.personalise import Created
from registry import store
from registry.errors import HdbError, HdbWarning, UsageError
from registry.files import write_kept
from registry.plugins import find_base
from registry.spec import BaseSpec

if TYPE_CHECKING:
    from hdbcli.compare.comparison import Comparison
    from hdbcli.interop.lora_readers import Reading
    from hdbcli.interop.lora_stack import Stacked
    from hdbcli.measure.metrics import Judges
    from hdbcli.measure.score import Score

__all__ = [
    "Base",
    "Compared",
    "Created",
    "Drawn",
    "Exported",
    "HdbError",
    "HdbWarning",
    "Identity",
    "Merged",
    "Picture",
    "Saved",
    "Settings",
    "Walk",
    "compare",
    "compose",
    "export",
    "generate",
    "load",
    "merge",
    "new",
    "read_settings",
    "refine",
    "save",
    "score",
    "walk",
]

Photos: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]"
Person: TypeAlias = "Identity | str | os.PathLike[str]"
Note: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class Saved:
    """Where an identity was saved, and how large its file is."""

    name: str
    path: Path
    bytes: int
    dtype: str


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture (H, W, 3) uint8, whom it shows, its prompt and seed, how it was made in the words
    that A1111, Forge and ComfyUI read, and what `generate` draws it again from."""

    image: np.ndarray
    name: str
    prompt: str
    seed: int
    parameters: str
    settings: Settings | None = None

    def pil(self) -> Image.Image:
        """Return it as a PIL image."""
        return Image.fromarray(self.image)

    def png(self) -> bytes:
        """Return it as a PNG file with how it was made inside."""
        return sample.png(self.image, self.parameters, self.settings)

    def save(self, path: str | os.PathLike[str], new: bool = False) -> None:
        """Write it as PNG with how it was made inside; HdbError if it is to be `new` and is not."""
        write_kept(Path(path), lambda file: file.write_bytes(self.png()), new)


@dataclass(frozen=True, eq=False)
class Drawn:
    """The pictures of one call, person by person and prompt by prompt, what it settled on, and the
    LoRA files that were added."""

    pictures: tuple[Picture, ...]
    settings: Settings
    loras: tuple[Stacked, ...] = ()

    def sheet(self) -> Picture:
        """Lay the pictures out as one, each with its prompt and seed, and among several people its
        name: a row for each person and prompt, or for each person where seeds do not differ."""
        people, prompts = len(self.settings.people), len(self.settings.prompt)
        columns = self.settings.count if self.settings.count > 1 else prompts
        if people == 1 and 1 in (self.settings.count, prompts):
            columns = min(4, len(self.pictures))
        captions = [self._caption(each) for each in self.pictures]
        rows = in_rows([each.image for each in self.pictures], columns)
        image = contact_sheet(rows, captions=in_rows(captions, columns))
        return replace(self.pictures[0], image=image, settings=self.settings)

    def html(self) -> str:
        """Return a page for a browser that shows the pictures and needs no other file."""
        title = ", ".join(dict.fromkeys(each.name for each in self.pictures))
        each = ((p.png(), self._caption(p), p.parameters) for p in self.pictures)
        return gallery(title, each)

    def _caption(self, picture: Picture) -> str:
        whose = f"{picture.name}: " if len(self.settings.people) > 1 else ""
        return f"{whose}{picture.prompt}, seed {picture.seed}"


@dataclass(frozen=True, eq=False)
class Walk:
    """The way from one person to the next: a sheet of its steps, and the same as an animation
    there and back, the bytes of a WebP file."""

    sheet: Picture
    animation: bytes


@dataclass(frozen=True)
class Merged:
    """A checkpoint with identities in it: where, on which base, of whom, and the word for [V]."""

    path: Path
    base: str
    format: str
    bytes: int
    of: str
    identifier: str


@dataclass(frozen=True)
class Exported:
    """A LoRA file, the word for [V], and what other tools make of it, if that was checked."""

    name: str
    path: Path
    bytes: int
    rank: int
    format: str
    dtype: str
    identifier: str
    readers: tuple[Reading, ...]


@dataclass(frozen=True, eq=False)
class Compared:
    """A comparison: its tables, the same as a JSON document, and the files that were written."""

    comparison: Comparison
    document: Mapping[str, Any]
    files: tuple[Path, ...]


def _silent(stage: str, done: int, total: int) -> None:
    """Show no progress."""


def _warn(line: str) -> None:
    """Turn a warning among the notes into a Python warning, and leave the others unsaid."""
    if line.startswith("warning: "):
        warnings.warn(line.removeprefix("warning: "), HdbWarning, stacklevel=3)


def load(
    base: str | None = None,
    *,
    targets: str | None = None,
    device: str | None = None,
    memory: str = "auto",
    note: Note = _warn,
) -> Base:
    """Load a base model once, to be handed to the other functions; None is the user's default.

    `targets` names one of its target sets, None is that of its hypernetwork; `device` None takes
    the fastest there is; `memory` is auto (the most generous plan on which a new identity fits),
    low, normal, half or recompute.
    """
    spec = find_base(base, targets)
    work = personalise.work_of(spec, refines=True, likeness=None)
    digest = targets_of(spec.hypernetwork)
    return on_base(spec, device, memory, work, lambda loaded: loaded, note, _silent, digest)


def new(
    photos: Photos,
    *,
    base: Base | str | None = None,
    steps: int | None = None,
    rank: int | None = None,
    seed: int = RefineConfig.seed,
    optimizer: str = RefineConfig.optimizer,
    likeness: float | None = None,
    refine: bool = True,
    face: int | None = None,
    crop: str | os.PathLike[str] | None = None,
    targets: str | None = None,
    agree: Callable[[], None] | None = None,
    device: str | None = None,
    memory: str = "auto",
    tell: Tell = _silent,
    note: Note = _warn,
) -> Created:
    """Make an identity from one photo of a face, or several of the same person.

    HyperDreamBooth, figure 2: crop, predict, relax the rank, refine; `refine` False keeps the
    prediction. `face` chooses one of several in a photo, from 1 at the left; `crop` is a .png file
    for the face as it was cropped; `targets` names a target set of a base that is not loaded yet.
    `agree` is called once the photo is known to be usable: raise there if the person does not.
    The identity is not saved: see `save`. Options left None are the base's own, as `hdb new --help`
    says. HdbError for a photo without a face, and for options out of range.
    """
    _check(1, steps=steps, rank=rank)
    _check(0, likeness=likeness)
    _check_seed(seed)
    if targets is not None and isinstance(base, Base):
        raise UsageError(f"the base is loaded already; load it with targets={targets!r} instead")
    home = base if isinstance(base, Base) else find_base(base, targets)
    digest = None if isinstance(home, Base) else targets_of(home.hypernetwork)
    spec, out = _spec(home), None if crop is None else Path(crop)
    if out is not None:
        store.check_picture(out, *_paths(photos))
    crops, seconds = _cropped(photos, spec, face, note, tell)
    if agree is not None:
        agree()
    start = time.perf_counter() - seconds  # the time a user takes to answer does not count
    if out is not None:
        sample.save_crops([each.image for each in crops], out)

    def make(loaded: Base) -> Created:
        if not refine:
            return personalise.create(crops, loaded, None, tell)
        config = personalise.settle(loaded, steps, rank, seed, optimizer, likeness)
        if loaded.spec.hypernetwork is None:
            note(
                f"hint: {loaded.spec.name} has no hypernetwork, so this starts from scratch and "
                f"takes {config.steps} iterations; once hdb train hypernetwork has made one: "
                f"hdb base set-hypernetwork {loaded.spec.name} FILE"
            )
        return personalise.create(crops, loaded, config, tell)

    work = personalise.work_of(spec, refine, likeness)
    created = on_base(home, device, memory, work, make, note, tell, digest)
    return _timed(created, seconds, start)


def refine(
    person: Person,
    photos: Photos,
    *,
    base: Base | str | None = None,
    steps: int = RefineConfig.steps,
    rank: int | None = None,
    seed: int = RefineConfig.seed,
    optimizer: str = RefineConfig.optimizer,
    likeness: float | None = None,
    face: int | None = None,
    device: str | None = None,
    memory: str = "auto",
    tell: Tell = _silent,
    note: Note = _warn,
) -> Created:
    """Give an identity more iterations on photos, from where it is; its rank may be raised first.

    The identity that was given stays as it is: the one that is returned can be saved.
    """
    _check(1, steps=steps, rank=rank)
    _check(0, likeness=likeness)
    _check_seed(seed)
    _, identity = _read(person)
    home, digest = _home(base, identity)
    spec, start = _spec(home), time.perf_counter()
    crops, seconds = _cropped(photos, spec, face, note, tell)

    def make(loaded: Base) -> Created:
        wanted = rank or identity.rank
        config = personalise.settle(loaded, steps, wanted, seed, optimizer, likeness, goes_on=True)
        return personalise.continue_refining(identity, crops, loaded, config, tell)

    work = personalise.work_of(spec, True, likeness)
    created = on_base(home, device, memory, work, make, note, tell, digest)
    return _timed(created, seconds, start)


def save(
    identity: Identity,
    name: str,
    *,
    dtype: str | None = None,
    replace: bool = False,
    stamp: tuple[int, int, int] | None = None,
) -> Saved:
    """Save an identity in the store; HdbError, with nothing written, if the name is taken already
    and not to be replaced.

    `dtype` is fp16, int8 or fp32; None takes what keeps within the bytes that its base allows. With
    the `registry.store.stamp` of the file that it is to replace, only that very file is replaced:
    if it has changed meanwhile, the identity is kept aside, and the HdbError says where.
    """
    path = store.path_of(name)
    if dtype is None:
        try:
            dtype = identities.dtype_for(identity, find_base(identity.facts.base).budget)
        except HdbError:  # that base is not here
            dtype = identities.BY_DEFAULT[0]
    if stamp is not None and (now := store.stamp(path)) != stamp:
        what = "changed" if now else "is gone, removed"
        aside = identities.keep_aside(identity, path, dtype)
        raise HdbError(f"{path.stem} {what} while it was refined; {aside}")
    size = identities.save(identity, path, dtype, new=not replace)
    return Saved(path.stem, path, size, dtype)


def generate(
    people: Person | Sequence[Person],
    prompt: str | Sequence[str],
    *,
    count: int = 4,
    seed: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    negative: str = "",
    strength: float = 1.0,
    size: int | None = None,
    scheduler: str | None = None,
    loras: Sequence[str] = (),
    base: Base | str | None = None,
    device: str | None = None,
    memory: str = "auto",
    keep: Callable[[Sequence[Picture]], None] | None = None,
    tell: Tell = _silent,
    note: Note = _warn,
) -> Drawn:
    """Draw people in any style, such as "a Pixar character of a [V] face".

    Each gets `count` pictures of every prompt, from the seeds `seed`, `seed` + 1, ...; None starts
    at a random one. Several people are drawn in one pass. `strength` weighs the identity, 0 is the
    base alone. Options left None are the base's own, or what a few-step model needs.
    `loras` are FILE or FILE=STRENGTH, added to the weights of a base that is loaded for this call.
    `keep` is handed all pictures so far after each pass, again from the start where a run begins
    anew with less memory.
    """
    from hdbcli.interop import lora_stack

    _check(1, count=count, steps=steps, size=size)
    _check(-math.inf, strength=strength)
    _check(0, guidance=guidance)
    _check_seed(0 if seed is None else seed)
    several = [people] if isinstance(people, Identity | str | os.PathLike) else list(people)
    if not several:
        raise UsageError("no identity was given; name at least one")
    prompts = (prompt,) if isinstance(prompt, str) else tuple(dict.fromkeys(prompt))
    if not prompts:
        raise UsageError("no prompt was given; say what to draw, such as 'a [V] face'")
    read = [_read(each) for each in several]
    if loras and isinstance(base, Base):
        raise UsageError("LoRA files would stay in a base that is loaded already; give its name")
    files = [lora_stack.read(each) for each in loras]  # a bad one is told before the work
    home, first = _home(base, read[0][1])
    spec = _spec(home)
    settings, said = lora_stack.sampling(spec, files)
    given: dict[str, Any] = {
        "steps": steps,
        "guidance": guidance,
        "scheduler": scheduler,
        "size": size,
    }
    given = {option: value for option, value in given.items() if value is not None}
    settings = replace(settings, negative=negative, **given)  # what was asked for comes first
    for line in [said, *sample.doubts(spec, settings, strength)]:
        if line:
            note(line)
    for each in prompts:
        if "[V]" not in each:
            which = "the prompt" if len(prompts) == 1 else repr(each)
            note(f'hint: {which} has no [V], the place of the person: "a [V] face as ..."')
    seed = int.from_bytes(os.urandom(4), "big") if seed is None else seed
    made = Settings(
        people=tuple(name for name, _ in read),
        prompt=prompts,
        count=count,
        seed=seed,
        steps=settings.steps,
        guidance=settings.guidance,
        negative=negative,
        strength=strength,
        size=size,
        scheduler=settings.scheduler,
        loras=tuple(f"{each.path.name}={each.strength:g}" for each in files),
        base=spec.name,
    )
    wanted = list(product(range(len(read)), prompts, range(seed, seed + count)))
    whose, texts, seeds = zip(*wanted, strict=True)

    def draw(loaded: Base) -> Drawn:
        theta = _adapter(loaded, read, note).scaled(strength)
        if line := sample.strange_words(loaded, [*prompts, negative]):
            note(line)
        stacked = lora_stack.stack(loaded, files)
        for each in stacked:
            if each.unread:
                note(f"warning: {each.problem}")
        if len(read) > 1:  # an adapter a picture; of one person alone, one for all
            theta = theta[list(whose)]
        more = lora_stack.parameters(stacked)

        def described(drawn: Sequence[sample.Picture]) -> tuple[Picture, ...]:
            parts = []
            for (person, prompt, seed), each in zip(wanted, drawn, strict=False):
                name = read[person][0]
                identity = f"{name} {strength:g}"
                text = sample.parameters_text(prompt, settings, each, spec.name, identity, more)
                one = replace(made, people=(name,), prompt=(prompt,), count=1, seed=seed)
                parts.append(Picture(each.image, name, prompt, seed, text, one))
            return tuple(parts)

        hand_on = None if keep is None else lambda drawn: keep(described(drawn))
        drawn = sample.generate(loaded, theta, texts, seeds, settings, tell, hand_on)
        return Drawn(described(drawn), made, tuple(stacked))

    side = size or spec.resolution
    work = sample.work_of(len(seeds), side, settings.guidance, exact=bool(files))
    return on_base(home, device, memory, work, draw, note, tell, first)


def merge(
    people: Person | Mapping[str, float],
    out: str | os.PathLike[str],
    *,
    format: str | None = None,
    dtype: str | None = None,
    base: str | None = None,
    force: bool = False,
    tell: Tell = _silent,
    note: Note = _warn,
) -> Merged:
    """Write the base model with an identity in it, or the weighted sum of several: a checkpoint
    that needs no hdb.

    `format` is diffusers (a folder) or single-file, as A1111, Forge and ComfyUI load it; None goes
    by the name of `out`. `dtype` is fp32, fp16 or bf16; None keeps each tensor's own. `force`
    replaces a model that is there.
    """
    from hdbcli.identity import derivation
    from hdbcli.interop import merged_files
    from hdbcli.interop.merge import Merge
    from hdbcli.model.files import open_checkpoint

    out = Path(out)
    chosen = format or ("single-file" if out.suffix.casefold() == ".safetensors" else "diffusers")
    if chosen not in merged_files.FORMATS:
        raise UsageError(f"unknown format {chosen!r}; choose {' or '.join(merged_files.FORMATS)}")
    single = chosen == "single-file"
    store.check_among(out)
    (merged_files.check_file if single else merged_files.check_folder)(out, force)
    parts = _weighted(people if isinstance(people, Mapping) else [(people, 1.0)])
    identity = derivation.composed(parts, None)
    spec = find_base(base or identity.facts.base)
    title = " + ".join(
        store.shown(Path(name)) if weight == 1 else f"{weight:g} {store.shown(Path(name))}"
        for name, (_, weight) in parts.items()
    )
    if spec.files is not None:
        merged_files.check_apart(out, spec.files)
    with merged_files.with_files(spec, chosen, out) as copied:
        checkpoint = open_checkpoint(copied, identity.facts.targets_digest)
        if warning := identities.fit(identity, spec, checkpoint):
            note(f"warning: {warning}")
        merged = Merge(checkpoint, identity.theta, dtype)
        write = merged_files.write_single if single else merged_files.write_folder
        size = write(merged, out, title, tell)
    return Merged(out, spec.name, chosen, size, title, spec.identifier)


def export(
    person: Person,
    out: str | os.PathLike[str] | None = None,
    *,
    format: str = "kohya",
    dtype: str = "fp16",
    check: bool = False,
    force: bool = False,
    note: Note = _warn,
) -> Exported:
    """Write an identity as a plain LoRA for other tools; `out` None is NAME-lora.safetensors.

    `format` is kohya or diffusers, `dtype` fp16 or fp32. With `check` the file is kept only if
    every tool that its format is meant for, and that knows this kind of base, would apply all
    of it.
    """
    from hdbcli.interop import export as lora
    from hdbcli.interop.diffusers_reader import require_peft

    name, identity = _read(person)
    sources = () if isinstance(person, Identity) else (store.resolve(person),)
    stem = sources[0].stem if sources else name
    target = Path(out) if out is not None else Path(f"{stem}-lora.safetensors")
    if target.exists() and not force:
        raise HdbError(f"{target} exists already; give another with -o, or --force to replace it")
    store.check_weights(target, *sources)
    if check:
        require_peft()
    facts = identity.facts
    loaded = load_base(find_base(facts.base), "cpu", targets_digest=facts.targets_digest)
    theta = _adapter(loaded, [(name, identity)], note)
    size, readings = lora.export(loaded, theta, name, format, dtype, target, check)
    word = loaded.spec.identifier
    return Exported(name, target, size, theta.rank, format, dtype, word, tuple(readings))


def compose(
    parts: Mapping[str, float] | Sequence[tuple[Person, float]], *, rank: int | None = None
) -> Identity:
    """Add identities of one base up, exactly: what each changes, times its weight, which may be
    negative. With `rank` the closest of that rank."""
    from hdbcli.identity import derivation

    _check(1, rank=rank)
    return derivation.composed(_weighted(parts), rank)


def walk(
    people: Sequence[Person],
    *,
    base: Base | str | None = None,
    device: str | None = None,
    memory: str = "auto",
    tell: Tell = _silent,
    note: Note = _warn,
) -> Walk:
    """Draw the way from each person to the next, step by step."""
    from hdbcli.identity import interpolation

    read = [_read(each) for each in people]
    interpolation.weights_of(len(read))
    home, first = _home(base, read[0][1])
    spec = _spec(home)
    names = " to ".join(name for name, _ in read)

    def draw(loaded: Base) -> Walk:
        theta = _adapter(loaded, read, note)
        rows = interpolation.draw(loaded, [theta[[i]] for i in range(len(read))], tell)
        sheet = sample.Picture(contact_sheet(rows), interpolation.SEED)
        prompts = " | ".join(interpolation.ROWS)
        text = sample.parameters_text(prompts, spec.sampling, sheet, spec.name, names)
        picture = Picture(sheet.image, names, prompts, sheet.seed, text)
        return Walk(picture, interpolation.animation(rows))

    pictures = len(interpolation.ROWS) * len(interpolation.weights_of(len(read)))
    work = sample.work_of(pictures, spec.resolution, spec.sampling.guidance)
    return on_base(home, device, memory, work, draw, note, tell, first)


def score(
    person: Person,
    photos: Photos = (),
    *,
    base: Base | str | None = None,
    face: int | None = None,
    judge: bool = False,
    device: str | None = None,
    memory: str = "auto",
    tell: Tell = _silent,
    note: Note = _warn,
) -> Score:
    """Measure likeness (only with photos), style fidelity and drift of an identity.

    `judge` fetches FaceRes, a face recogniser that nothing in hdb is trained on, and asks it too.
    """
    from hdbcli.measure import score as measure

    name, identity = _read(person)
    home, first = _home(base, identity)
    spec = _spec(home)
    crops, _ = _cropped(photos, spec, face, note, tell)
    judges = _judges(spec, judge, note)

    def measured(loaded: Base) -> Score:
        theta = _adapter(loaded, [(name, identity)], note)
        return measure.score(loaded, theta, crops, judges, tell)

    work = sample.work_of(len(measure.SEEDS), spec.resolution, spec.sampling.guidance)
    return on_base(home, device, memory, work, measured, note, tell, first)


def compare(
    photos: str | os.PathLike[str],
    out: str | os.PathLike[str] = "compare",
    *,
    methods: str | Sequence[str] = MAIN_METHODS,
    base: str | None = None,
    steps: int | None = None,
    batch: int | None = None,
    people: int | None = None,
    tune: str | os.PathLike[str] | None = None,
    truth: str | os.PathLike[str] | None = None,
    pattern: str = "*",
    judge: bool = False,
    device: str | None = None,
    command: str = "",
    tell: Tell = _silent,
    note: Note = _warn,
) -> Compared:
    """Let methods learn the same people: seconds, memory, bytes, likeness, style, drift.

    `photos` is a photo, a folder of photos, or a folder with one for each person; `methods` are
    NAME or NAME:PEOPLE. What is done is kept in the folder `out`: interrupted, the same call goes
    on. `judge` as for `score`; `command` is written into the document as what made it.
    """
    from functools import partial

    from hdbcli.compare import comparison
    from hdbcli.compare.methods import choose as choose_methods
    from hdbcli.compare.methods import suited
    from hdbcli.compare.run import new_setup
    from hdbcli.model.base import open_pair
    from hdbcli.model.memory import enough
    from hdbcli.training.people import read_people, tell_skipped
    from registry.bases.settings import DEFAULT

    out = Path(out)
    names = methods.split(",") if isinstance(methods, str) else methods
    chosen = choose_methods(names, steps)
    store.check_folder(out)
    predicted = any(each.predicted for each in chosen)
    open_again = partial(open_pair, base, device, predicted)
    loaded, model = open_again()
    chosen = [suited(each, loaded, steps) for each in chosen]
    with enough("close other programs, take a smaller --batch"):
        test = read_people(Path(photos), loaded.spec, pattern, False, tell).first(people)
        tell_skipped(test.skipped, note)
        if tune is not None:
            others = read_people(Path(tune), loaded.spec, pattern, False, tell)
            chosen = comparison.tuned(loaded, model, others, chosen, out, batch, tell)
        elif loaded.spec.name != DEFAULT:
            note(f"note: rates were chosen on {DEFAULT}; --tune OTHERS chooses them anew")
        judges = _judges(loaded.spec, judge, note)
        setup = new_setup(loaded, model, test, judges, batch, tell)
        styles = comparison.true_styles(Path(truth), test, setup) if truth is not None else []
        result, records = comparison.run(setup, chosen, styles, out, open_again)
    facts = comparison.document(result, command)
    files = comparison.save(result, records, setup.given[0], facts, out)
    return Compared(result, facts, tuple(files))


def _home(base: Base | str | None, identity: Identity) -> tuple[Base | BaseSpec, str]:
    """Return the base that was given, or that of an identity, and the identity's targets."""
    facts = identity.facts
    home = base if isinstance(base, Base) else find_base(base or facts.base)
    return home, facts.targets_digest


def _spec(base: Base | BaseSpec) -> BaseSpec:
    return base.spec if isinstance(base, Base) else base


def _cropped(
    photos: Photos, spec: BaseSpec, face: int | None, note: Note, tell: Tell
) -> tuple[list[Crop], float]:
    """Crop the faces before a base is loaded, and say at once what is doubtful about photos; return
    the seconds that took too."""
    start = time.perf_counter()
    crops = personalise.crop_photos(_paths(photos), spec, face, tell)
    for number, crop in enumerate(crops, 1):
        where = f"photo {number}: " if len(crops) > 1 else ""
        for warning in crop.warnings:
            note(f"warning: {where}{warning}")
    return crops, time.perf_counter() - start


def _timed(created: Created, cropped: float, start: float) -> Created:
    """Add the seconds of cropping, and those since a start, to the others."""
    total = time.perf_counter() - start
    return replace(created, seconds={"crop": cropped, **created.seconds, "total": total})


def _judges(spec: BaseSpec, fetch: bool, note: Note) -> Judges:
    """Load what can judge the pictures of a base, and say what cannot be had."""
    from hdbcli.measure.metrics import load_judges
    from registry.plugins import load_metrics

    judges = load_judges(load_metrics(), spec.family, fetch)
    for line in judges.missing:
        note(f"left out: {line}")
    return judges


def _check(least: float, **values: float | None) -> None:
    """Refuse NaN, infinity and what is below `least`."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{name} is {value}; give a finite number")
        if value is not None and value < least:
            raise UsageError(f"{name} is {value}; give {least:g} or more")


def _check_seed(seed: int) -> None:
    """Refuse a seed that no generator takes."""
    if not 0 <= seed <= LARGEST_SEED:
        raise UsageError(f"seed is {seed}; give a number from 0 to {LARGEST_SEED}")


def _paths(photos: Photos) -> list[Path]:
    given = [photos] if isinstance(photos, str | os.PathLike) else photos
    paths = [Path(each) for each in given]
    check_photos(paths)
    return paths


def _read(person: Person) -> tuple[str, Identity]:
    """Return an identity and how it is called where it is drawn."""
    if isinstance(person, Identity):
        return "person", person
    path = store.resolve(person)
    return store.shown(path), identities.load(path)


def _weighted(
    parts: Mapping[str, float] | Sequence[tuple[Person, float]],
) -> dict[str, tuple[Identity, float]]:
    """Read weighted identities by name; those that have none are numbered."""
    pairs = parts.items() if isinstance(parts, Mapping) else parts
    found: dict[str, tuple[Identity, float]] = {}
    for number, (person, weight) in enumerate(pairs, 1):
        name = f"person {number}" if isinstance(person, Identity) else str(person)
        if name in found:
            raise UsageError(f"{name} comes twice; give its weights as one")
        _check(-math.inf, weight=weight)
        found[name] = _read(person)[1], weight
    if not found:
        raise UsageError("no identity was given; name at least one")
    return found


def _adapter(base: Base, people: Sequence[tuple[str, Identity]], note: Note) -> Theta:
    """Return the thetas of people for a base; say so where it is not the one they were made on."""
    thetas = []
    for name, identity in people:
        theta, warning = identities.theta_for(base, identity)
        if warning:
            note(f"warning: {name}: {warning}")
        thetas.append(theta)
    return stack(thetas)
