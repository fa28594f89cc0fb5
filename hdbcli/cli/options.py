"""What all command modules share: option types, checks of their values, and ways to a base and its
identities."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hdbcli.cli import complete
from hdbcli.config import DEVICES, LARGEST_SEED, MEMORIES, OPTIMIZERS, PICTURES, SCHEDULERS
from hdbcli.faces.source import KINDS, STDIN, check_photos
from registry import store
from registry.errors import HdbError, UsageError
from registry.files import OTHER_FILES, check_writable, refuse_file_as
from registry.spec import SampleSettings

if TYPE_CHECKING:
    from registry.bases.settings import Added
    from registry.plugins import Registry

FORMATS = "fp16, fp32 or int8"
complete_format = complete.words("fp16", "fp32", "int8")


def as_text(value: str) -> str:
    """Refuse what no encoding of text could hold, such as bytes of a shell that are no UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise typer.BadParameter(f"{value!r} is not UTF-8 text") from error
    return value


def as_texts(values: list[str] | None) -> list[str] | None:
    """Refuse it of each of several."""
    return [as_text(value) for value in values] if values else values


def finite(value: float | None) -> float | None:
    """Refuse NaN and infinity, which no range of an option does."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a number to work with")
    return value


def one_of(noun: str, choices: Sequence[str]) -> Callable[[str | None], str | None]:
    """Make a check of an option, so that a wrong word is told before any work."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in choices:
            raise UsageError(f"unknown {noun} {value!r}; choose {' or '.join(choices)}")
        return value

    return check


def drawn_as(ctx: typer.Context, picture: Path | None) -> Path | None:
    """Let all that is not given be as it was for a picture."""
    if picture is None or ctx.resilient_parsing:
        return picture
    from hdbcli.model.settings import read_settings

    made = vars(read_settings(picture))
    names = {"people": "identity", "prompt": "prompts", "loras": "lora"}
    values = {names.get(key, key): value for key, value in made.items()}
    values["identity"] = ",".join(values["identity"])
    values["lora"] = [_beside(picture, lora) for lora in values["lora"]]
    ctx.default_map = {**(ctx.default_map or {}), **values}
    return picture


def _beside(picture: Path, lora: str) -> str:
    """Find the LoRA file that a picture names: here, or beside the picture."""
    name, _, strength = lora.rpartition("=")
    for path in (Path(name), picture.parent / name):
        if path.is_file():
            return f"{path}={strength}"
    return lora  # reading it says that it is not there


known_optimizer = one_of("optimizer", OPTIMIZERS)
Photo = Annotated[Path, typer.Argument(help=f"Photo of the face: {KINDS}; - reads standard input.")]
TargetSet = Annotated[
    str | None,
    typer.Option(
        "--targets",
        autocompletion=complete.words("attention", "all"),
        help="Layers that get residuals: attention, or all for the convolutions too; default: "
        "those of the base and of its hypernetwork.",
    ),
]
Identity = Annotated[
    str,
    typer.Argument(
        autocompletion=complete.identities, help="Name of an identity, or an identity file."
    ),
]
BaseName = Annotated[
    str | None,
    typer.Option(
        "--base",
        autocompletion=complete.bases,
        help="Base model; default: see hdb base default.",
    ),
]
OwnBase = Annotated[
    str | None,
    typer.Option("--base", autocompletion=complete.bases, help="Default: the identity's."),
]
Device = Annotated[
    str | None,
    typer.Option(
        autocompletion=complete.words(*DEVICES),
        help="cpu, cuda or mps; default: the fastest there is.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what has this name already.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing.")]
More = Annotated[
    list[Path] | None, typer.Option("--photo", help="Another photo of the person; repeatable.")
]
FaceNumber = Annotated[
    int | None,
    typer.Option("--face", help="Which of several faces, from 1 at the left."),
]
CropFile = Annotated[
    Path | None,
    typer.Option("--crop", metavar="FILE.png", help="Save the face as it was cropped."),
]
Preview = Annotated[
    Path | None,
    typer.Option("--preview", metavar="FILE.png", help="Where the preview goes."),
]
NoPreview = Annotated[bool, typer.Option("--no-preview", help="Save no preview.")]
Scheduler = Annotated[
    str | None,
    typer.Option(
        autocompletion=complete.words(*SCHEDULERS),
        help=f"{', '.join(SCHEDULERS[:-1])} or {SCHEDULERS[-1]}; default: the base's.",
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[=STRENGTH]",
        help="A LoRA of a style, or of few steps, to add to the base first; repeatable.",
    ),
]
Likeness = Annotated[
    float | None,
    typer.Option(
        min=0,
        callback=finite,
        help="Weight of the likeness of portraits that it draws meanwhile; 0 is faster, default: "
        "the base's.",
    ),
]
FirstSeed = Annotated[
    int | None, typer.Option(min=0, max=LARGEST_SEED, help="First seed; default: random.")
]
SamplingSteps = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1000,
        help=f"Sampling steps; default: {SampleSettings.steps}, or what a few-step model needs.",
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(min=0, callback=finite, help="CFG scale; default: the base's, as base show says."),
]
Strength = Annotated[
    float, typer.Option(callback=finite, help="Weight of the identity; 0 is the base.")
]
Negative = Annotated[
    str,
    typer.Option(
        callback=as_text, help="What to avoid. The identity adapts it too, as in a merged model."
    ),
]
Count = Annotated[int, typer.Option("-n", "--count", min=1, max=1000, help="How many pictures.")]
Size = Annotated[int | None, typer.Option(min=8, max=16384, help="Pixels; default: the base's.")]
Prompts = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PROMPT...",
        callback=as_texts,
        help="What to draw, one picture or more each; [V] is the person's place in it.",
    ),
]
AsPicture = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="PICTURE.png",
        is_eager=True,
        callback=drawn_as,
        help="Draw it again with its own settings; whatever is given overrides.",
    ),
]
PromptFile = Annotated[
    Path | None,
    typer.Option("--prompts", help="A file of prompts, one a line; - reads standard input."),
]
Grid = Annotated[
    bool, typer.Option("--grid", help="Save a contact sheet too; with -o FILE.png, only that.")
]
Html = Annotated[
    bool, typer.Option("--html", help="Save a page too, for a browser, with all pictures inside.")
]
NewName = Annotated[str, typer.Argument(help="The new name.")]
Steps = Annotated[int, typer.Option(min=1, help="Iterations of refinement.")]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the noise.")]
Memory = Annotated[
    str,
    typer.Option(
        autocompletion=complete.words(*MEMORIES),
        help="auto (what fits into the free memory), low (the least), normal, half or recompute.",
    ),
]
Optimizer = Annotated[
    str,
    typer.Option(
        callback=known_optimizer,
        autocompletion=complete.words(*OPTIMIZERS),
        help=f"{' or '.join(OPTIMIZERS)}.",
    ),
]
As = Annotated[str | None, typer.Option("--as", help="Name of the new one; default: replace.")]
Data = Annotated[Path, typer.Argument(help="Folder of photos, or a folder of them per person.")]
Pattern = Annotated[str, typer.Option(help="Which files to take, such as 'portrait-*'.")]
Aligned = Annotated[bool, typer.Option("--aligned", help="Pictures are the base's crops already.")]


def given(ctx: typer.Context, name: str) -> bool:
    """Say whether an option or argument stands on the command line, rather than a default, be it
    hdb's or the user's."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_given(ctx: typer.Context, why: str, *names: str) -> None:
    """Refuse options that were given and would do nothing; `why` ends before their names."""
    for name in names:
        if given(ctx, name):
            raise UsageError(f"{why} --{name.replace('_', '-')}")


def chosen_name(name: str) -> str:
    """Return the name that a new identity is to have; refuse one that was meant as a photo."""
    if name.casefold().endswith(PICTURES) or os.path.isfile(name):
        raise UsageError(f"{name} is a picture or a file, not a name; more photos: --photo {name}")
    return store.check_name(name)


def name_for(photo: Path, name: str | None) -> str:
    """Return the name of a new identity: the one given, or that of the photo's file."""
    if name is not None:
        return chosen_name(name)
    if str(photo) == STDIN:
        raise UsageError("a photo from standard input has no name; give one: hdb new - NAME")
    return store.name_from_stem(photo.stem)


def photos_of(photo: Path, more: Sequence[Path] | None) -> list[Path]:
    """Return all photos given; refuse URLs, and standard input twice, before any work."""
    photos = [photo, *(more or [])]
    check_photos(photos)
    return photos


def refuse_file_as_prompt(texts: Sequence[str]) -> None:
    """Refuse a prompt that is the name of a file: --html takes none, and --prompts stands before
    its own."""
    instead = "--prompts FILE reads prompts, and -o says where pictures and page go"
    for text in texts:
        if len(text.split()) == 1:
            refuse_file_as("a prompt", text, {*PICTURES, *OTHER_FILES}, instead)


def prompts_in(file: Path | None) -> list[str]:
    """Return the lines of a file of prompts that are not empty."""
    if file is None:
        return []
    try:
        raw = sys.stdin.buffer.read() if str(file) == STDIN else file.read_bytes()
        lines = [line.strip() for line in raw.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise HdbError(f"{file} is not UTF-8 text ({error}); give one prompt a line") from error
    if not any(lines):
        raise HdbError(f"{file} holds no prompt; write one a line")
    return [line for line in lines if line]


def new_path(name: str, force: bool) -> Path:
    """Return where a new identity goes; before any work, refuse a taken name or an
    unwritable place."""
    path = store.path_of(name)
    if path.exists() and not force:
        raise HdbError(f"{path.stem} exists already; give another name, or --force to replace it")
    check_writable(path)
    return path


def free_path(folder: Path, stem: str, taken: Sequence[Path] = (), suffix: str = ".png") -> Path:
    """Return a file that is not there yet: STEM.png, STEM-2.png, ..."""
    path, again = folder / f"{stem}{suffix}", 2
    while path.exists() or path in taken:
        path, again = folder / f"{stem}-{again}{suffix}", again + 1
    return path


def bases() -> Registry:
    from registry.plugins import load_registry  # its importlib.metadata is slow, and `list` is not

    return load_registry()


def added_of(base: str) -> Added | None:
    """Return where a base model's files lie, if the user added it."""
    from registry.bases.settings import read_settings, settings_path

    return read_settings(settings_path(base)).added
