"""The command line: the only file that knows the CLI framework, prints errors or exits."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hdbcli import __version__, render
from hdbcli.config import (
    DEFAULT_BASE,
    MAIN_METHODS,
    METHODS,
    OPTIMIZERS,
    PRECISIONS,
    BankConfig,
    PretrainConfig,
    RefineConfig,
)
from hdbcli.errors import HdbError
from registry import store
from registry.errors import RegistryError
from registry.spec import SampleSettings

if TYPE_CHECKING:
    from hdbcli.base import Base
    from hdbcli.create import Created
    from hdbcli.lidb import Theta
    from registry.plugins import Registry
    from registry.spec import BaseSpec


class Boundary(typer.core.TyperGroup):
    """The one place where errors become a line on stderr and an exit code; bugs keep their
    traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (HdbError, RegistryError) as error:
            render.note(f"error: {error}")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            render.note("interrupted; nothing was written")
            raise typer.Exit(130) from None


def _app(about: str, **more: Any) -> typer.Typer:
    return typer.Typer(
        help=about,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        **more,
    )


app = _app("One photo of a face in, that person in any style out.", cls=Boundary)
base_app = _app("The base models that hdb knows.")
train_app = _app("Train and measure the hypernetwork of a base model.")
app.add_typer(base_app, name="base")
app.add_typer(train_app, name="train")

Photo = Annotated[Path, typer.Argument(help="JPEG, PNG or WebP photo of the face.")]
Identity = Annotated[str, typer.Argument(help="Name of an identity, or an identity file.")]
BaseName = Annotated[str, typer.Option("--base", help="Base model; see: hdb base list.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or mps; default: the fastest there is.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what has this name already.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing.")]
More = Annotated[
    list[Path] | None, typer.Option("--photo", help="Another photo of the person; repeatable.")
]
FaceNumber = Annotated[
    int | None, typer.Option("--face", help="Which face, from the left, where there are several.")
]
NewName = Annotated[str, typer.Argument(help="The new name.")]
Steps = Annotated[int, typer.Option(min=1, help="Iterations of refinement.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the refinement's noise.")]
Optimizer = Annotated[str, typer.Option(help=f"{' or '.join(OPTIMIZERS)}.")]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        render.say(f"hdb {__version__}")
        raise typer.Exit


@app.command()
def new(
    photo: Photo,
    name: Annotated[str | None, typer.Argument(help="Default: the photo's file name.")] = None,
    more: More = None,
    base: BaseName = DEFAULT_BASE,
    steps: Steps = RefineConfig.steps,
    rank: Annotated[
        int | None, typer.Option(min=1, help=f"Rank to refine at; default: {RefineConfig.rank}.")
    ] = None,
    seed: Seed = RefineConfig.seed,
    face: FaceNumber = None,
    no_refine: Annotated[bool, typer.Option("--no-refine", help="Keep the prediction.")] = False,
    optimizer: Optimizer = RefineConfig.optimizer,
    force: Force = False,
    device: Device = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Make an identity from one photo of a face (or several of the same person)."""
    name = store.check_name(name) if name else store.name_from_stem(photo.stem)
    path = _new_path(name, force)
    _ask_consent(yes)
    if no_refine and rank:
        raise HdbError("--no-refine keeps the rank of the prediction; drop it or --rank")
    rank = rank or RefineConfig.rank
    config = None if no_refine else RefineConfig(steps, rank, seed=seed, optimizer=optimizer)
    created = _make(base, device, [photo, *(more or [])], face, config)
    _store(created, name, path, as_json)


@app.command()
def refine(
    name: Annotated[str, typer.Argument(help="Name of the identity.")],
    photo: Photo,
    more: More = None,
    base: Annotated[str | None, typer.Option("--base", help="Default: the identity's.")] = None,
    steps: Steps = RefineConfig.steps,
    rank: Annotated[int | None, typer.Option(min=1, help="Raise the rank to this first.")] = None,
    seed: Seed = RefineConfig.seed,
    face: FaceNumber = None,
    optimizer: Optimizer = RefineConfig.optimizer,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Give an existing identity more iterations on a photo; its file is replaced at the end."""
    from hdbcli.identity import load

    path = store.resolve(store.check_name(name))
    identity = load(path)
    config = RefineConfig(steps, rank or identity.rank, seed=seed, optimizer=optimizer)
    photos = [photo, *(more or [])]
    created = _make(base or identity.base, device, photos, face, config, identity)
    _store(created, path.stem, path, as_json)


@app.command()
def gen(
    identity: Annotated[
        str, typer.Argument(help="Name of an identity, or its file; several: alice,bob,carol.")
    ],
    prompt: Annotated[str, typer.Argument(help="What to draw; [V] is the person's place in it.")],
    count: Annotated[int, typer.Option("-n", min=1, max=1000, help="How many pictures.")] = 4,
    seed: Annotated[int | None, typer.Option(min=0, help="First seed; default: random.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = SampleSettings.steps,
    guidance: Annotated[float, typer.Option(min=0, help="CFG scale.")] = SampleSettings.guidance,
    negative: Annotated[
        str, typer.Option(help="What to avoid. It wears the identity too, as in a merged model.")
    ] = "",
    strength: Annotated[float, typer.Option(help="Weight of the identity; 0 is the base.")] = 1.0,
    size: Annotated[int | None, typer.Option(min=8, help="Pixels; default: the base's.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="ddim, dpm++, euler, euler-a or unipc; default: the base's.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Default: the identity's.")] = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option("-o", help="A folder, or one .png file.")] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="Save a contact sheet too; with -o FILE.png, only that.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Draw an identity in any style, such as "a Pixar character of a [V] face".

    The same seed gives the same picture. Prompt and negative prompt both wear the identity. Several
    people are drawn in one pass, each with the same seeds.
    """
    from hdbcli import sample

    first = int.from_bytes(os.urandom(4), "big") if seed is None else seed
    settings = SampleSettings(steps, guidance, negative, size, scheduler)
    paths = [store.resolve(each) for each in identity.split(",")]
    jobs = [(path.stem, first + i) for path in paths for i in range(count)]
    names, seeds = [name for name, _ in jobs], [number for _, number in jobs]
    targets = sample.plan_outputs(out, [f"{name}-{number}" for name, number in jobs], grid)
    loaded, people = _wear(paths, base, device)
    if "[V]" not in prompt:
        render.note('hint: the prompt has no [V], the place of the person: "a [V] face as ..."')
    theta = people.scaled(strength)
    if len(paths) > 1:  # each wears their own; one person alone serves all pictures
        theta = theta[[i for i in range(len(paths)) for _ in range(count)]]
    with render.progress() as tell:
        pictures = sample.generate(loaded, theta, prompt, seeds, settings, tell)
    saved = sample.save_all(pictures, names, targets, prompt, settings, loaded.spec.name, strength)
    if as_json:
        label = ",".join(path.stem for path in paths)
        render.document({"name": label, "base": loaded.spec.name, "prompt": prompt, **saved})
        return
    for picture in saved["pictures"]:
        render.say(f"{picture['path'] or 'in the sheet'}  seed {picture['seed']}")
    if saved["grid"]:
        render.say(saved["grid"])


@app.command()
def merge(
    identity: Identity,
    out: Annotated[Path, typer.Option("--out", help="Folder of the merged model.")],
    strength: Annotated[float, typer.Option(help="Weight of the identity.")] = 1.0,
    base: Annotated[str | None, typer.Option("--base", help="Default: the identity's.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the base model with the identity in it, as a diffusers folder that needs no hdb."""
    from hdbcli.merge import check_folder
    from hdbcli.merge import merge as write

    check_folder(out, force)
    loaded, theta = _wear([store.resolve(identity)], base, "cpu")
    size = write(loaded, theta.scaled(strength), out)
    if as_json:
        render.document({"path": str(out), "base": loaded.spec.name, "bytes": size})
    else:
        render.say(f"{out}  {size:,} bytes; use {loaded.spec.identifier!r} where you wrote [V]")


@app.command("list")
def list_identities(
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Names only.")] = False,
) -> None:
    """List the identities."""
    entries = store.entries()
    if as_json:
        render.document([entry.as_dict() for entry in entries])
    elif quiet:
        for entry in entries:
            render.say(entry.name)
    elif entries:
        render.show_entries(entries)
    else:
        render.note("no identities yet; make one with: hdb new PHOTO")


@app.command()
def show(identity: Identity, as_json: Json = False) -> None:
    """Show everything that an identity file says about itself."""
    summary = store.summary(store.resolve(identity))
    if as_json:
        render.document(summary)
    else:
        render.facts(summary)


@app.command()
def rm(
    names: Annotated[list[str], typer.Argument(help="Names of identities.")], yes: Yes = False
) -> None:
    """Delete identities for good."""
    paths = [store.resolve(store.check_name(name)) for name in names]
    if not yes:
        if not sys.stdin.isatty():
            raise HdbError("rm deletes for good; without a terminal to ask on, pass --yes")
        typer.confirm(f"Delete {', '.join(path.stem for path in paths)}?", abort=True)
    for path in paths:
        store.remove(path.stem)
        render.say(f"deleted {path.stem}")


@app.command()
def inspect(
    identity: Identity,
    out: Annotated[Path | None, typer.Option("-o", help="Draw it as a .png file too.")] = None,
    as_json: Json = False,
) -> None:
    """Look inside an identity: energy by target, component and kind; whether its basis verifies."""
    from hdbcli import inspection, sample
    from hdbcli.base import theta_for
    from hdbcli.identity import load

    path = store.resolve(identity)
    loaded = load(path)
    if out:
        sample.check_writable(out)
    names, verified, problem = None, None, None
    try:
        base = _load(loaded.base, "cpu")
        _, problem = theta_for(base, loaded)
        names, verified = list(base.injected.layers), True
    except (HdbError, RegistryError) as error:
        problem, verified = str(error), False
    result = inspection.inspect(loaded, names, verified, problem)
    if out:
        with store.write_beside(out) as beside:
            inspection.draw(result, beside)
        render.note(str(out))
    if as_json:
        shares = {field: result.share(field) for field in ("component", "kind")}
        render.document({**store.summary(path), **asdict(result), "shares": shares})
    else:
        render.show_inspection(store.summary(path), result)


As = Annotated[str | None, typer.Option("--as", help="Name of the new one; default: replace.")]
Dtype = Annotated[str, typer.Option(help="fp16, fp32 or int8.")]


@app.command()
def relax(
    identity: Identity,
    rank: Annotated[int, typer.Option(min=1, help="The new, higher rank.")],
    new_name: As = None,
    force: Force = False,
) -> None:
    """Give an identity more ranks; it draws what it did, and hdb refine can train them."""
    from hdbcli import derive
    from hdbcli.identity import load, save

    source, path = _source_and_target(identity, new_name, force)
    made = derive.relaxed(load(source), rank)
    render.say(f"{path}  rank {rank}, {save(made, path):,} bytes")


@app.command()
def shrink(
    identity: Identity,
    rank: Annotated[int, typer.Option(min=1, help="The new, lower rank.")],
    new_name: As = None,
    dtype: Dtype = "fp16",
    force: Force = False,
    yes: Yes = False,
) -> None:
    """Give an identity fewer ranks, the closest there are, saying what that costs."""
    from hdbcli import derive
    from hdbcli.identity import load, save

    source, path = _source_and_target(identity, new_name, force)
    made, lost = derive.shrunk(load(source), rank)
    render.note(f"rank {rank} keeps {1 - lost:.2%} of the identity's energy, {lost:.2%} is lost")
    if path == source and not yes:
        if not sys.stdin.isatty():
            raise HdbError("shrink replaces what it shrinks; pass --as NEW to keep it, or --yes")
        typer.confirm(f"Replace {path.stem}?", abort=True)
    render.say(f"{path}  rank {rank}, {save(made, path, dtype):,} bytes")


@app.command()
def compose(
    parts: Annotated[list[str], typer.Argument(help="NAME=WEIGHT, such as alice=0.6 bob=0.4.")],
    new_name: Annotated[str, typer.Option("--as", help="Name of the new identity.")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Highest rank; default: whatever is exact.")
    ] = None,
    dtype: Dtype = "fp16",
    force: Force = False,
) -> None:
    """Add identities of one base up, exactly: what each changes, times its weight.

    A weight may be negative: "--" before the parts keeps alice=-0.5 from being an option.
    """
    from hdbcli import derive
    from hdbcli.identity import load, save

    weights = derive.read_weights(parts)
    path = _new_path(new_name, force)
    loaded = {name: (load(store.resolve(name)), weight) for name, weight in weights.items()}
    made = derive.composed(loaded, rank)
    render.say(f"{path}  rank {made.rank}, {save(made, path, dtype):,} bytes")


@app.command()
def cp(name: Identity, new_name: NewName, force: Force = False) -> None:
    """Copy an identity under another name."""
    from hdbcli.identity import load

    source = store.resolve(name)
    load(source)  # what is damaged is not copied
    render.say(str(store.copy(source, _new_path(new_name, force))))


@app.command()
def mv(name: Identity, new_name: NewName, force: Force = False) -> None:
    """Give an identity another name."""
    source = store.resolve(store.check_name(name))
    render.say(str(store.rename(source, _new_path(new_name, force))))


@app.command()
def score(
    identity: Identity,
    photo: More = None,
    base: Annotated[str | None, typer.Option(help="Another base than its own.")] = None,
    face: FaceNumber = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Say how alike, how stylish and how well-behaved an identity is; likeness needs --photo."""
    from hdbcli import score as measure
    from hdbcli.contest import text_metrics
    from hdbcli.create import crop_photos
    from registry.plugins import load_metrics

    loaded, worn = _wear([store.resolve(identity)], base, device)
    with render.progress() as tell:
        crops = crop_photos(photo or [], loaded.spec, face, tell)
        metrics, missing = text_metrics(load_metrics(), loaded.spec.family)
        result = measure.score(loaded, worn, crops, metrics, tell)
    for line in missing:
        render.note(f"left out: {line}")
    if as_json:
        render.document(asdict(result))
    else:
        render.say("\n".join(measure.words(result)))


@app.command()
def compare(
    photos: Annotated[Path, typer.Argument(help="A photo, a folder of them, or one per person.")],
    methods: Annotated[str, typer.Option(help=f"Of {', '.join(METHODS)}.")] = MAIN_METHODS,
    base: BaseName = DEFAULT_BASE,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Most steps of any method, for a first look.")
    ] = None,
    people: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many people.")
    ] = None,
    tune: Annotated[
        Path | None, typer.Option(help="Other people, to choose each learning rate on.")
    ] = None,
    truth: Annotated[
        Path | None, typer.Option(help="True pictures in the styles: PERSON/pixar-0.png, ...")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the results.")] = Path(
        "compare"
    ),
    pattern: Pattern = "*",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Let methods learn the same people: seconds, memory, bytes, likeness, style, drift.

    What is done is kept in the folder of the results: interrupted, the same command goes on.
    """
    from functools import partial

    from hdbcli import contest
    from hdbcli.base import open_pair
    from hdbcli.compare import new_arena
    from hdbcli.contenders import choose
    from hdbcli.people import read_people
    from registry.plugins import load_metrics

    chosen = choose(methods.split(","), steps)
    load = partial(open_pair, base, device)
    loaded, model = load()
    with render.progress() as tell:
        test = read_people(photos, loaded.spec, pattern, False, tell).first(people)
        render.show_skipped(test.skipped)
        if tune:
            others = read_people(tune, loaded.spec, pattern, False, tell)
            chosen = contest.tuned(loaded, model, others, chosen, out, tell)
        metrics, missing = contest.text_metrics(load_metrics(), loaded.spec.family)
        for line in missing:
            render.note(f"left out: {line}")
        arena = new_arena(loaded, model, test, metrics, tell)
        styles = contest.true_styles(truth, test, arena) if truth else []
        result, records = contest.run(arena, chosen, styles, out, load)
    paths = contest.save(result, records, out)
    if as_json:
        render.document(contest.document(result))
    else:
        render.show_contest(result)
    for path in paths:
        render.note(str(path))


@base_app.command("list")
def base_list(as_json: Json = False) -> None:
    """List the base models, and the plug-ins that could not be loaded."""
    registry = _registry()
    for problem in registry.problems:
        render.note(f"warning: {problem}")
    specs = registry.specs()
    if as_json:
        render.document([render.base_facts(s, registry.source(s.name)) for s in specs])
    else:
        rows = [(s.name, s.family, s.resolution, s.licence, s.summary) for s in specs]
        render.table(("name", "family", "px", "licence", "summary"), rows)


@base_app.command("show")
def base_show(
    name: Annotated[str, typer.Argument(help="Name of a base model.")], as_json: Json = False
) -> None:
    """Show what a base model offers."""
    values = render.base_facts(_spec(name), _registry().source(name))
    (render.document if as_json else render.facts)(values)


@base_app.command("set-hypernetwork")
def base_set_hypernetwork(
    name: Annotated[str, typer.Argument(help="Name of a base model.")],
    file: Annotated[
        Path | None, typer.Argument(help="File made by hdb train hypernetwork.")
    ] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Go back to the base's own.")] = False,
) -> None:
    """Let a base model predict with another hypernetwork, after checking that it fits."""
    from registry.settings import set_hypernetwork

    if reset == (file is not None):
        raise HdbError("give either the file of a hypernetwork or --reset")
    spec = _registry().get(name)
    if file:
        from hdbcli.base import load_predictor

        load_predictor(_load(name, "cpu", file))
    set_hypernetwork(spec.name, file)
    render.say(f"{spec.name} predicts with {file or 'its own hypernetwork'}")


Data = Annotated[Path, typer.Argument(help="Folder of photos, or a folder of them per person.")]
Pattern = Annotated[str, typer.Option(help="Which files to take, such as 'portrait-*'.")]
Aligned = Annotated[bool, typer.Option("--aligned", help="Pictures are the base's crops already.")]


@train_app.command("bank")
def train_bank(
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="Folder of the bank.")],
    base: BaseName = DEFAULT_BASE,
    steps: Annotated[int, typer.Option(min=1, help="Iterations each.")] = BankConfig.steps,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = BankConfig.lr,
    at_once: Annotated[int, typer.Option(min=1, help="People side by side.")] = BankConfig.at_once,
    seed: Seed = BankConfig.seed,
    optimizer: Optimizer = BankConfig.optimizer,
    pattern: Pattern = "*",
    aligned: Aligned = False,
    device: Device = None,
) -> None:
    """Optimise the LiDB of everybody in a folder; interrupted, the same command goes on."""
    from hdbcli.bank import build_bank
    from hdbcli.people import read_people

    loaded = _load(base, device)
    config = BankConfig(steps, lr=lr, at_once=at_once, seed=seed, optimizer=optimizer)
    start, made = time.perf_counter(), 0
    with render.progress() as tell:
        people = read_people(data, loaded.spec, pattern, aligned, tell)
        render.show_skipped(people.skipped)
        for shard in build_bank(loaded, people, out, config, tell):
            made += shard.people
            rate = made / (time.perf_counter() - start)
            render.note(
                f"{shard.total}/{len(people.names)} people, loss {shard.loss_start:.4f} to "
                f"{shard.loss_end:.4f}, {rate:.2f} people a second, "
                f"{(len(people.names) - shard.total) / rate / 60:.1f} min left"
            )
    render.say(str(out))


Prior = Annotated[float, typer.Option(min=0, max=1, help="Share of samples with an empty prompt.")]
Precision = Annotated[str, typer.Option(help=f"{' or '.join(PRECISIONS)}.")]
SaveSeconds = Annotated[float, typer.Option(min=0, help="Seconds between checkpoints.")]
Look = Annotated[int, typer.Option(min=1, help="Steps between looks at people held out.")]
HeldOut = Annotated[
    int, typer.Option(min=0, help="People to hold out, at most a tenth of all; 0: no looks.")
]


@train_app.command("hypernetwork")
def train_hypernetwork(
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="File of the hypernetwork.")],
    base: BaseName = DEFAULT_BASE,
    steps: Annotated[int, typer.Option(min=1, help="Steps.")] = PretrainConfig.steps,
    batch: Annotated[int, typer.Option(min=1, help="People a step.")] = PretrainConfig.batch,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = PretrainConfig.lr,
    bank: Annotated[Path | None, typer.Option(help="Bank made by hdb train bank.")] = None,
    beta: Annotated[float, typer.Option(help="Weight of the bank.")] = PretrainConfig.beta,
    prior: Prior = PretrainConfig.prior,
    seed: Seed = PretrainConfig.seed,
    optimizer: Optimizer = PretrainConfig.optimizer,
    precision: Precision = PretrainConfig.precision,
    save_seconds: SaveSeconds = PretrainConfig.save_seconds,
    look: Look = PretrainConfig.look,
    held_out: HeldOut = PretrainConfig.held_out,
    pattern: Pattern = "*",
    aligned: Aligned = False,
    device: Device = None,
) -> None:
    """Train the hypernetwork of a base model; interrupted, the same command goes on.

    On several GPUs: accelerate launch --multi_gpu -m hdbcli train hypernetwork ..., on several
    processes of any kind: torchrun --nproc_per_node N -m hdbcli train hypernetwork ...
    """
    from hdbcli import pretrain
    from hdbcli.bank import read_bank
    from hdbcli.device import join_workers
    from hdbcli.hyperfile import save_hypernetwork
    from hdbcli.people import read_people
    from hdbcli.watch import Watch

    loaded = _load(base, device)
    checkpoint = out.with_name(f"{out.stem}-checkpoint.safetensors")
    shared = (steps, lr, batch, beta, prior, seed, optimizer, precision, save_seconds, look)
    config = PretrainConfig(*shared, held_out, checkpoint)
    known = read_bank(bank, loaded) if bank else None
    workers = join_workers()
    model = pretrain.new_hypernetwork(loaded, seed)
    with render.progress() as tell:
        people = read_people(data, loaded.spec, pattern, aligned, tell)
        render.show_skipped(people.skipped)
        people, held = people.hold_out(held_out)
        watch = Watch(loaded, held, out, tell) if held and not workers.rank else None
        look_at = watch.look if watch else None
        steps_done = pretrain.pretrain(loaded, model, people, config, tell, known, workers, look_at)
        if workers.rank:
            deque(steps_done, maxlen=0)
            return
        render.follow(steps_done, tell)
    save_hypernetwork(model, out)
    if watch:
        render.note(f"curves and portraits of people held out: {watch.picture}")
    render.say(str(out))


@train_app.command("evaluate")
def train_evaluate(
    data: Data,
    base: BaseName = DEFAULT_BASE,
    hypernetwork: Annotated[
        Path | None, typer.Option(help="Another file than the base's own.")
    ] = None,
    refined: Annotated[int, typer.Option(min=0, help="People to refine and draw as well.")] = 0,
    pattern: Pattern = "*",
    aligned: Aligned = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure a hypernetwork on people it never saw: loss with intervals, retrieval of
    portraits."""
    from hdbcli.base import load_predictor
    from hdbcli.evaluate import evaluate
    from hdbcli.people import read_people

    loaded = _load(base, device, hypernetwork)
    model, _ = load_predictor(loaded)
    with render.progress() as tell:
        people = read_people(data, loaded.spec, pattern, aligned, tell)
        render.show_skipped(people.skipped)
        result = evaluate(loaded, model, people, refined, tell)
    if as_json:
        render.document(asdict(result))
    else:
        render.show_evaluation(result)


def _new_path(name: str, force: bool) -> Path:
    """Return where a new identity goes; before any work, refuse a taken name or an unwritable
    place."""
    from hdbcli.sample import check_writable

    path = store.path_of(name)
    if path.exists() and not force:
        raise HdbError(f"{path.stem} exists already; give another name, or --force to replace it")
    check_writable(path)
    return path


def _source_and_target(identity: str, new_name: str | None, force: bool) -> tuple[Path, Path]:
    """Return the file of an identity and where what is made of it goes: itself without a name."""
    source = store.resolve(identity)
    return source, source if new_name is None else _new_path(new_name, force)


def _ask_consent(yes: bool) -> None:
    """Ask once, before the first identity of a store, and only where there is somebody to ask."""
    if yes or store.names() or not sys.stdin.isatty():
        return
    typer.confirm("Faces belong to people. Does this person agree?", abort=True, err=True)


def _registry() -> Registry:
    from registry.plugins import load_registry  # its importlib.metadata is slow, and `list` is not

    return load_registry()


def _spec(base: str) -> BaseSpec:
    """Return the spec of a base model, with what the user set for it."""
    from registry.settings import customised

    return customised(_registry().get(base))


def _load(base: str, device: str | None, hypernetwork: Path | None = None) -> Base:
    """Load a base model on a device."""
    from hdbcli.base import open_base  # imports torch

    return open_base(base, device, hypernetwork)


def _wear(paths: list[Path], base: str | None, device: str | None) -> tuple[Base, Theta]:
    """Load identities and the base to wear them on; say so where it is not the one they were made
    on."""
    from hdbcli.base import theta_for
    from hdbcli.identity import load
    from hdbcli.relax import stack

    identities = [load(path) for path in paths]
    loaded = _load(base or identities[0].base, device)
    thetas = []
    for path, identity in zip(paths, identities, strict=True):
        theta, warning = theta_for(loaded, identity)
        if warning:
            render.note(f"warning: {path.stem}: {warning}")
        thetas.append(theta)
    return loaded, stack(thetas)


def _make(
    base: str,
    device: str | None,
    photos: list[Path],
    face: int | None,
    config: RefineConfig | None,
    identity: Any = None,
) -> Created:
    """Crop before loading, since a bad photo should be told at once; then create or refine."""
    from hdbcli import create

    spec = _spec(base)
    start = time.perf_counter()
    with render.progress() as tell:
        crops = create.crop_photos(photos, spec, face, tell)
        cropped = time.perf_counter() - start
        tell("load", 0, 1)
        loaded = _load(base, device)
        if identity is None or config is None:
            created = create.create(crops, loaded, config, tell)
        else:
            created = create.continue_refining(identity, crops, loaded, config, tell)
    total = time.perf_counter() - start
    return replace(created, seconds={"crop": cropped, **created.seconds, "total": total})


def _store(created: Created, name: str, path: Path, as_json: bool) -> None:
    from hdbcli.identity import save

    size = save(created.identity, path)
    for warning in created.warnings:
        render.note(f"warning: {warning}")
    values = render.created_facts(name, str(path), size, created)
    (render.document if as_json else render.show_created)(values)


main: Callable[[], None] = app
