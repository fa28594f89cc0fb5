"""Run one step of the recipe: `python -m registry.tiny.recipe STEP`; see the README beside this
file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import hdbcli  # noqa: F401  sets how torch's threads wait, before it is loaded
from registry.errors import HdbError
from registry.tiny import SAMPLING

if TYPE_CHECKING:
    from hdbcli.training.loop import Step


def render(options: argparse.Namespace) -> Iterator[str]:
    from registry.tiny.recipe.assets import fetch_assets
    from registry.tiny.recipe.people import HELD_OUT_SEED, render_people

    assets = fetch_assets(options.build / "assets")
    first = HELD_OUT_SEED if options.held_out else 0
    out = options.build / ("heldout" if options.held_out else "people")
    seeds = range(first, first + options.people)
    total = len(seeds[options.worker :: options.workers])
    workers = (options.worker, options.workers)
    for done, seconds in render_people(assets, out, seeds, options.size, workers):
        if done % 20 == 0 or done == total:
            yield _progress(done, total, "people", seconds)


def photos(options: argparse.Namespace) -> Iterator[str]:
    from registry.tiny.recipe.assets import fetch_assets
    from registry.tiny.recipe.people import HELD_OUT_SEED, render_photos

    assets = fetch_assets(options.build / "assets")
    first = HELD_OUT_SEED + options.skip
    seeds = range(first, first + options.people)
    for done, seconds in render_photos(assets, options.out, seeds, options.size):
        if done % 20 == 0 or done == len(seeds):
            yield _progress(done, len(seeds), "people", seconds)


def selfies(options: argparse.Namespace) -> Iterator[str]:
    from registry.tiny.recipe.assets import fetch_selfies

    for path in fetch_selfies(options.build / "assets", options.out, options.people):
        yield str(path)


def photographs(options: argparse.Namespace) -> Iterator[str]:
    from registry.tiny.recipe.photographs import paint_photographs

    workers = (options.worker, options.workers)
    steps = paint_photographs(options.data, options.build, options.seed, options.variants, workers)
    for done, total, seconds in steps:
        if done % 20 == 0 or done == total:
            yield _progress(done, total, "photographs", seconds)


def people(options: argparse.Namespace) -> Iterator[str]:
    from registry.tiny.recipe.photographs import write_people

    for done, total in write_people(options.build, options.held_out):
        yield f"{done}/{total} files of photographs"


def autoencoder(options: argparse.Namespace) -> Iterator[str]:
    from hdbcli.training.loop import Plan
    from registry.tiny.recipe.autoencoder import train_autoencoder

    plan = Plan(options.steps, options.lr, warmup=100, average=0.998, seed=options.seed)
    return _report(
        train_autoencoder(options.build, plan, options.batch, options.device, options.teacher)
    )


def decoder(options: argparse.Namespace) -> Iterator[str]:
    from hdbcli.training.loop import Plan
    from registry.tiny.recipe.decoder import train_decoder

    plan = Plan(options.steps, options.lr, warmup=100, average=0.998, seed=options.seed)
    return _report(train_decoder(options.build, plan, options.batch, options.device))


def sharpen(options: argparse.Namespace) -> Iterator[str]:
    from hdbcli.training.loop import Plan
    from registry.tiny.recipe.sharpen import train_sharper

    plan = Plan(options.steps, options.lr, warmup=100, average=0.995, seed=options.seed)
    return _report(train_sharper(options.build, plan, options.batch, options.device))


def base(options: argparse.Namespace) -> Iterator[str]:
    from hdbcli.training.loop import Plan
    from registry.tiny.recipe.base import train_base

    decay = 0.0 if options.steady else 1.0
    plan = Plan(
        options.steps, options.lr, warmup=200, decay=decay, average=0.999, seed=options.seed
    )
    data = (options.side, options.start)
    return _report(
        train_base(options.build, plan, options.batch, options.device, options.compile, *data)
    )


def clip(options: argparse.Namespace) -> Iterator[str]:
    from hdbcli.training.loop import Plan
    from registry.tiny.recipe.clip import train_clip

    plan = Plan(options.steps, options.lr, warmup=50, average=0.99, seed=options.seed)
    return _report(train_clip(options.build, plan, options.batch, options.device))


def contact(options: argparse.Namespace) -> Iterator[str]:
    from registry.tiny.recipe.pictures import photo_rows, sheet

    rows = photo_rows(options.photos, options.drawn, 128)
    sheet(rows, options.out, titles=options.titles)
    yield str(options.out)


def judge_autoencoder(options: argparse.Namespace) -> Iterator[str]:
    from registry.tiny.recipe.judge import judge_autoencoder

    return judge_autoencoder(options.vae, options.photos, options.people, options.noise)


def judge_base(options: argparse.Namespace) -> Iterator[str]:
    from registry.tiny.recipe.judge import judge_base

    portraits = {options.prompt: options.portraits, "a face with bark skin": options.bark}
    folders = options.weights, options.photos, options.nobodies
    return judge_base(*folders, options.held_out, portraits, options.steps)


def trial(options: argparse.Namespace) -> Iterator[str]:
    from registry.tiny.recipe.trial import Setting, try_settings

    each = product(options.targets, options.sizes, options.rank, options.steps, options.lr)
    settings = [
        Setting(targets, a, b, rank, steps, lr, options.likeness)
        for targets, (a, b), rank, steps, lr in each
    ]
    folders = options.pipeline, options.photos
    return try_settings(*folders, options.people, options.side, options.drawings, settings)


def publish(options: argparse.Namespace) -> Iterator[str]:
    from registry.tiny.recipe.publish import check_finite
    from registry.tiny.recipe.publish import publish as copy

    size = copy(options.build, options.weights, options.halfway)
    check_finite(options.weights)
    yield f"{options.weights}: {size:,} bytes"


def _report(steps: Iterator[Step]) -> Iterator[str]:
    mean = 0.0
    for step in steps:
        mean = step.loss if not mean else 0.98 * mean + 0.02 * step.loss
        if step.number % 50 == 0 or step.number == step.steps:
            left = f"{step.left / 60:.1f} min left"
            yield f"step {step.number}/{step.steps}, loss {mean:.4f}, {left}"


def _progress(done: int, total: int, unit: str, seconds: float) -> str:
    left = seconds / done * (total - done)
    return f"{done}/{total} {unit}, {seconds:.0f} s, {left / 60:.1f} min left"


def _pair(text: str) -> tuple[int, int]:
    a, b = text.split(",")
    return int(a), int(b)


def _trains(
    step: argparse.ArgumentParser, run: Callable, count: int, lr: float, batch: int
) -> None:
    """Let a step take what every training takes."""
    step.set_defaults(run=run)
    step.add_argument("--steps", type=int, default=count)
    step.add_argument("--lr", type=float, default=lr)
    step.add_argument("--batch", type=int, default=batch)
    step.add_argument("--seed", type=int, default=0)
    step.add_argument("--device", default="cpu", help="cpu or cuda")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="registry.tiny.recipe", description=__doc__)
    parser.add_argument("--build", type=Path, default=Path("build/tiny"), help="work folder")
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("render", help="fetch the assets and render people")
    step.set_defaults(run=render)
    step.add_argument("--people", type=int, default=6000)
    step.add_argument("--size", type=int, default=128)
    step.add_argument("--held-out", action="store_true", help="people that no training step sees")
    step.add_argument("--worker", type=int, default=0, help="which of --workers this process is")
    step.add_argument("--workers", type=int, default=1)
    step = steps.add_parser("photos", help="render photos of held-out people, to test hdb with")
    step.set_defaults(run=photos)
    step.add_argument("--people", type=int, default=100)
    step.add_argument("--skip", type=int, default=0, help="of them, for people beside the first")
    step.add_argument("--size", type=int, default=256)
    step.add_argument("--out", type=Path, default=Path("tests/data/heldout"))
    step = steps.add_parser("photographs", help="align photographs and paint them in every style")
    step.set_defaults(run=photographs)
    step.add_argument("--data", type=Path, required=True, help="people/NNNN/K.jpg, nobodies/*.jpg")
    step.add_argument("--variants", type=int, default=1, help="how often each style is painted")
    step.add_argument("--seed", type=int, default=0)
    step.add_argument("--worker", type=int, default=0, help="which of --workers this process is")
    step.add_argument("--workers", type=int, default=1)
    step = steps.add_parser("people", help="write the painted photographs as a folder of people")
    step.set_defaults(run=people)
    step.add_argument("--held-out", action="store_true", help="people that no training step sees")
    step = steps.add_parser("autoencoder", help="train pictures to latents and back")
    _trains(step, autoencoder, count=6000, lr=1e-3, batch=16)
    step.add_argument("--teacher", type=Path, required=True, help="folder of TAEF2's two files")
    step = steps.add_parser("base", help="train the UNet and the text encoder")
    _trains(step, base, count=8000, lr=1e-3, batch=64)
    step.add_argument(
        "--compile", action="store_true", help="compile the UNet; needs a C++ compiler"
    )
    step.add_argument("--side", type=int, default=128, help="of the pictures, in pixels")
    step.add_argument("--from", dest="start", type=Path, help="pipeline of a run before")
    step.add_argument("--steady", action="store_true", help="keep the rate to the end")
    step = steps.add_parser("decoder", help="train the decoder on what the base draws")
    _trains(step, decoder, count=3000, lr=3e-4, batch=32)
    step = steps.add_parser(
        "sharpen", help="train base, decoder and hypernetwork on what they draw"
    )
    _trains(step, sharpen, count=600, lr=3e-5, batch=8)
    step = steps.add_parser("clip", help="train the in-domain CLIP that measures style")
    _trains(step, clip, count=800, lr=2e-3, batch=128)
    step = steps.add_parser("selfies", help="fetch selfies of people who do not exist, to show")
    step.set_defaults(run=selfies)
    step.add_argument("--people", type=int, default=6)
    step.add_argument("--out", type=Path, required=True)
    step = steps.add_parser("contact", help="put photos and what hdb drew of them on one sheet")
    step.set_defaults(run=contact)
    step.add_argument("photos", type=Path, nargs="+")
    step.add_argument("--drawn", type=Path, required=True)
    step.add_argument("--titles", nargs="*", default=())
    step.add_argument("--out", type=Path, required=True)
    step = steps.add_parser(
        "judge-autoencoder", help="look real people up after an autoencoder and noise on latents"
    )
    step.set_defaults(run=judge_autoencoder)
    step.add_argument("vae", type=Path, help="folder of an autoencoder, as diffusers saves it")
    step.add_argument("photos", type=Path, help="folder of people, two photos of each at least")
    step.add_argument("--people", type=int, default=60, help="the first so many")
    step.add_argument("--noise", type=float, nargs="*", default=(0.0, 0.5))
    step = steps.add_parser(
        "judge-base", help="look for faces, and for training faces, in what the base draws"
    )
    step.set_defaults(run=judge_base)
    step.add_argument("weights", type=Path, help="folder of the base model, as diffusers saves it")
    step.add_argument("photos", type=Path, help="folder of people, the first of them held out")
    step.add_argument("--nobodies", type=Path, help="folder of photos, every tenth held out")
    step.add_argument("--held-out", type=int, default=100, help="people, in the order of names")
    step.add_argument("--prompt", default="a face", help="what portraits of nobody are asked by")
    step.add_argument("--portraits", type=int, default=500)
    step.add_argument("--bark", type=int, default=100, help="portraits with bark skin")
    step.add_argument("--steps", type=int, default=SAMPLING.steps, help="of drawing")
    step = steps.add_parser("trial", help="refine real people by several settings; print a table")
    step.set_defaults(run=trial)
    step.add_argument("pipeline", type=Path, help="folder of the base model")
    step.add_argument("photos", type=Path, help="folder of people, two photos of each at least")
    step.add_argument("--people", type=int, default=4)
    step.add_argument("--side", type=int, default=128, help="of the pictures, in pixels")
    step.add_argument("--drawings", type=int, default=4, help="pictures of each person")
    step.add_argument("--targets", nargs="+", default=["all"], help="attention, blocks, ...")
    step.add_argument("--sizes", nargs="+", type=_pair, default=[(64, 32)], help="A,B")
    step.add_argument("--rank", nargs="+", type=int, default=[4])
    step.add_argument("--steps", nargs="+", type=int, default=[40])
    step.add_argument("--lr", nargs="+", type=float, default=[5e-3])
    step.add_argument("--likeness", type=float, default=0.0)
    step = steps.add_parser("publish", help="copy what was trained to the folder that ships")
    step.set_defaults(run=publish)
    step.add_argument("--weights", type=Path, default=Path("registry/tiny/weights"))
    step.add_argument(
        "--halfway", action="store_true", help="write the means of these weights and those there"
    )
    options = parser.parse_args(arguments)
    try:
        for line in options.run(options):
            print(line, flush=True)
    except HdbError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
