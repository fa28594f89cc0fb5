"""Commands that train and measure the hypernetwork of a base model."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hdbcli.cli import complete, render
from hdbcli.cli.boundary import new_app
from hdbcli.cli.options import (
    Aligned,
    BaseName,
    Data,
    Device,
    Json,
    Memory,
    Optimizer,
    Pattern,
    Seed,
    TargetSet,
    finite,
    one_of,
    refuse_given,
)
from hdbcli.config import PRECISIONS, TRACKERS, BankConfig, PretrainConfig
from registry import store
from registry.checkpoints.safetensors import LARGEST, read_header
from registry.errors import HdbError, UsageError

if TYPE_CHECKING:
    from hdbcli.model.base import Base

LearningRate = Annotated[
    float, typer.Option(min=0, callback=finite, help="Learning rate, at its highest.")
]
Processes = Annotated[
    int | None,
    typer.Option(min=1, help="Processes that read photos; default: one a core."),
]
train_app = new_app("Train and measure the hypernetwork of a base model.")


@train_app.command("prepare")
def train_prepare(
    data: Data,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the prepared people.")],
    base: BaseName = None,
    processes: Processes = None,
    pattern: Pattern = "*",
    aligned: Aligned = False,
    device: Device = None,
    memory: Memory = "auto",
    as_json: Json = False,
) -> None:
    """Find, crop and encode the faces of a folder once, for any number of trainings; interrupted,
    the same command goes on."""
    with render.progress() as tell:
        from hdbcli.model.base import on_base
        from hdbcli.model.memory import Work
        from hdbcli.training import shards
        from registry.plugins import find_base

        store.check_folder(out)
        spec = find_base(base)

        def prepare(loaded: Base) -> shards.Prepared:
            start = time.perf_counter()
            done = shards.prepare(data, loaded, out, pattern, aligned, tell, processes)
            render.show_prepared(done, out / shards.REPORT, time.perf_counter() - start)
            return done

        one = Work(1, spec.resolution, trains=False, exact=True)  # encoding, one picture at a time
        done = on_base(spec, device, memory, one, prepare, render.note, tell)
    render.result({"path": out, "report": out / shards.REPORT, **asdict(done)}, str(out))


@train_app.command("bank")
def train_bank(
    data: Data,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the bank.")],
    base: BaseName = None,
    steps: Annotated[int, typer.Option(min=1, help="Iterations each.")] = BankConfig.steps,
    lr: LearningRate = BankConfig.lr,
    at_once: Annotated[int, typer.Option(min=1, help="People side by side.")] = BankConfig.at_once,
    seed: Seed = BankConfig.seed,
    optimizer: Optimizer = BankConfig.optimizer,
    targets: TargetSet = None,
    pattern: Pattern = "*",
    aligned: Aligned = False,
    device: Device = None,
    memory: Memory = "auto",
    as_json: Json = False,
) -> None:
    """Optimise the LiDB of every person in a folder; interrupted, the same command goes on."""
    config = BankConfig(steps, lr=lr, at_once=at_once, seed=seed, optimizer=optimizer)
    with render.progress() as tell:
        from hdbcli.model.base import on_base
        from hdbcli.training import bank
        from hdbcli.training.people import tell_skipped
        from hdbcli.training.shards import open_people
        from registry.plugins import find_base

        store.check_folder(out)
        spec = find_base(base, targets)

        def build(loaded: Base) -> int:
            people = open_people(data, loaded, pattern, aligned, out / "people", tell)
            tell_skipped(people.skipped, render.note)
            start, made = time.perf_counter(), 0
            for shard in bank.build_bank(loaded, people, out, config, tell):
                made += shard.people
                rate = made / (time.perf_counter() - start)
                render.note(
                    f"{shard.total}/{len(people.names)} people, loss {shard.loss_start:.4f} to "
                    f"{shard.loss_end:.4f}, {rate:.2f} people a second, "
                    f"{(len(people.names) - shard.total) / rate / 60:.1f} min left"
                )
            return len(people.names)

        fewer = f"take fewer people side by side than --at-once {at_once}"
        work = bank.work_of(spec, at_once)
        people = on_base(spec, device, memory, work, build, render.note, tell, advice=fewer)
    render.result({"path": out, "people": people}, str(out))


Prior = Annotated[
    float,
    typer.Option(min=0, callback=finite, help="Weight of leaving alone what is drawn without [V]."),
]
Likeness = Annotated[
    float,
    typer.Option(
        min=0,
        callback=finite,
        help="Weight of the likeness of portraits drawn while training.",
    ),
]
Share = Annotated[
    int,
    typer.Option(
        min=1,
        help="Apply the likeness and prior losses to every N-th person of a batch.",
    ),
]
AnyColours = Annotated[
    list[str] | None,
    typer.Option(
        help="Leave colours out of the likeness of pictures whose caption has these words, since "
        "they are chance in that style; may be given several times."
    ),
]
Track = Annotated[
    str | None,
    typer.Option(
        callback=one_of("tracker", TRACKERS),
        autocompletion=complete.words(*TRACKERS),
        help="Log the curves to tensorboard, wandb or another tracker that accelerate knows.",
    ),
]
# Not "--start": torchrun takes that for one of its own, wherever it stands.
Start = Annotated[
    Path | None,
    typer.Option("--from", help="A hypernetwork to train on, instead of from nothing."),
]
Iterations = Annotated[
    int | None,
    typer.Option(min=1, help="Passes of the decoder over the weights, k in the paper; default: 3."),
]
Recogniser = Annotated[
    bool | None,
    typer.Option(
        "--recogniser/--no-recogniser",
        help="Read face recognisers beside the picture, or the picture alone; default: both.",
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        callback=one_of("precision", PRECISIONS),
        autocompletion=complete.words(*PRECISIONS),
        help=f"{' or '.join(PRECISIONS)}.",
    ),
]
SaveSeconds = Annotated[
    float, typer.Option(min=0, callback=finite, help="Seconds between checkpoints.")
]
Beta = Annotated[float, typer.Option(min=0, callback=finite, help="Weight of the bank.")]
Look = Annotated[int, typer.Option(min=1, help="Steps between looks at people held out.")]
HeldOut = Annotated[
    int, typer.Option(min=0, help="People to hold out, at most a tenth of all; 0: no looks.")
]


@train_app.command("hypernetwork")
def train_hypernetwork(
    ctx: typer.Context,
    data: Data,
    out: Annotated[Path, typer.Option("-o", "--out", help="File of the hypernetwork.")],
    base: BaseName = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps.")] = PretrainConfig.steps,
    batch: Annotated[
        int, typer.Option(min=1, help="People a step, of each process.")
    ] = PretrainConfig.batch,
    accumulate: Annotated[
        int, typer.Option(min=1, help="Parts to take a batch in: less memory, the same gradient.")
    ] = PretrainConfig.accumulate,
    lr: LearningRate = PretrainConfig.lr,
    bank: Annotated[Path | None, typer.Option(help="Bank made by hdb train bank.")] = None,
    beta: Beta = PretrainConfig.beta,
    prior: Prior = PretrainConfig.prior,
    likeness: Likeness = PretrainConfig.likeness,
    share: Share = PretrainConfig.share,
    any_colours: AnyColours = None,
    seed: Seed = PretrainConfig.seed,
    optimizer: Optimizer = PretrainConfig.optimizer,
    precision: Precision = PretrainConfig.precision,
    save_seconds: SaveSeconds = PretrainConfig.save_seconds,
    look: Look = PretrainConfig.look,
    held_out: HeldOut = PretrainConfig.held_out,
    track: Track = None,
    start: Start = None,
    iterations: Iterations = None,
    recogniser: Recogniser = None,
    targets: TargetSet = None,
    pattern: Pattern = "*",
    aligned: Aligned = False,
    device: Device = None,
    memory: Memory = "auto",
    as_json: Json = False,
) -> None:
    """Train the hypernetwork of a base model; interrupted, the same command goes on.

    On several GPUs: accelerate launch --multi_gpu -m hdbcli train hypernetwork ..., on several
    processes of any kind: torchrun --nproc_per_node N -m hdbcli train hypernetwork ...
    """
    if not bank:
        refuse_given(ctx, "there is nothing to weigh; add --bank or drop", "beta")
    if start:
        why = "the hypernetwork after --from has its shape already; drop it or"
        refuse_given(ctx, why, "iterations", "recogniser")
    if not likeness:
        refuse_given(ctx, "no likeness is asked for; add --likeness or drop", "any_colours")
    if accumulate > batch:
        raise UsageError(f"a batch of {batch} has no {accumulate} parts; lower --accumulate")
    if not held_out:
        refuse_given(ctx, "--held-out 0 leaves no one to look at; drop it or", "look")
    _check_hypernetwork_out(out, start)
    checkpoint = out.with_name(f"{out.stem}-checkpoint.safetensors")
    goals = (steps, lr, batch, beta, prior, likeness, share, tuple(any_colours or ()))
    config = PretrainConfig(
        *goals, seed, optimizer, precision, save_seconds, look, held_out, checkpoint, accumulate
    )
    with render.progress() as tell:
        from hdbcli.model.base import load_predictor, on_base
        from hdbcli.model.device import join_workers
        from hdbcli.model.hypernetwork_file import save_hypernetwork, targets_of
        from hdbcli.training.bank import read_bank
        from hdbcli.training.hypernetwork import new_hypernetwork, pretrain, work_of
        from hdbcli.training.monitor import Watch, open_tracker, tracked
        from hdbcli.training.people import tell_skipped
        from hdbcli.training.shards import open_people
        from registry.plugins import find_base

        spec = find_base(base, targets, start)

        def learn(loaded: Base) -> dict[str, Any] | None:
            # Before photos are read, for hours: these may be missing, or of another base.
            known = read_bank(bank, loaded) if bank else None
            model = (
                load_predictor(loaded)[0]
                if start
                else new_hypernetwork(
                    loaded, seed, iterations=iterations, recogniser=recogniser is not False
                )
            )
            workers = join_workers(loaded.device)
            cache = out.with_name(f"{out.stem}-people")
            with workers.first():
                people = open_people(data, loaded, pattern, aligned, cache, tell)
            if not workers.rank:
                tell_skipped(people.skipped, render.note)
            people, held = people.hold_out(config.held_out)
            tracker = watch = None
            if track and not workers.rank:
                tracker = open_tracker(track, out.with_name(f"{out.stem}-runs"), asdict(config))
            if held and not workers.rank:
                watch = Watch(loaded, held, out, tell, tracker)
            look_at = watch.look if watch else None
            steps = pretrain(loaded, model, people, config, tell, known, workers, look_at)
            if workers.rank:  # the first process writes, and says what was made
                deque(steps, maxlen=0)
                return None
            render.follow(tracked(steps, tracker) if tracker else steps, tell)
            save_hypernetwork(model, out)
            if watch:
                render.note(f"curves and portraits of people held out: {watch.picture}")
            counts = {"people": len(people.names), "held_out": len(held.names) if held else 0}
            return {"path": out, **counts, "curves": watch.picture if watch else None}

        work = work_of(spec, config)
        made = on_base(spec, device, memory, work, learn, render.note, tell, targets_of(start))
    if made is not None:  # else another process says it
        render.result(made, str(out))


def _check_hypernetwork_out(out: Path, start: Path | None) -> None:
    """Refuse to write over what a run starts from, or over anything but a hypernetwork: an older
    one is replaced, since a run that is interrupted goes on with the same command."""
    if out.is_dir():
        raise HdbError(f"{out} is a folder; give a file in it, such as hyper.safetensors")
    store.check_weights(out, *([start] if start else []))
    if not out.exists():
        return
    try:
        kind = read_header(out, LARGEST).metadata.get("hdb.kind")
    except HdbError:
        kind = None
    if kind != "hypernetwork":
        raise HdbError(
            f"{out} is there and is not a hypernetwork of hdb; give another file with -o"
        )


@train_app.command("evaluate")
def train_evaluate(
    data: Data,
    base: BaseName = None,
    hypernetwork: Annotated[
        Path | None, typer.Option(help="Another file than the base's own.")
    ] = None,
    refined: Annotated[int, typer.Option(min=0, help="People to refine and draw as well.")] = 0,
    pattern: Pattern = "*",
    aligned: Aligned = False,
    device: Device = None,
    memory: Memory = "auto",
    as_json: Json = False,
) -> None:
    """Measure a hypernetwork on people it never saw: loss with intervals, retrieval
    of portraits."""
    with render.progress() as tell:
        from hdbcli.model.base import load_predictor, on_base
        from hdbcli.model.hypernetwork_file import targets_of
        from hdbcli.training import evaluate
        from hdbcli.training.people import tell_skipped
        from hdbcli.training.shards import open_people
        from registry.plugins import find_base

        spec = find_base(base, None, hypernetwork)

        def measure(loaded: Base) -> evaluate.Evaluation:
            model, _ = load_predictor(loaded)  # before the photos are read, which takes hours
            with TemporaryDirectory(prefix="hdb-people-") as cache:
                people = open_people(data, loaded, pattern, aligned, Path(cache) / "people", tell)
                tell_skipped(people.skipped, render.note)
                return evaluate.evaluate(loaded, model, people, refined, tell)

        work = evaluate.work_of(spec, refined)
        digest = targets_of(spec.hypernetwork)
        result = on_base(spec, device, memory, work, measure, render.note, tell, digest)
    render.result(asdict(result), lambda: render.show_evaluation(result))
