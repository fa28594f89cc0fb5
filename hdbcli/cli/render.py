"""Turn facts into what a person or a script reads: tables, one JSON document, progress with
time left."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer._click.globals import get_current_context

from hdbcli.config import CAPTIONS, Tell
from hdbcli.faces.source import STDIN

if TYPE_CHECKING:
    from hdbcli.api import Exported, Saved
    from hdbcli.bench.suite import Row
    from hdbcli.cli.progress import Bars
    from hdbcli.compare.comparison import Comparison
    from hdbcli.identity.inspection import Inspection
    from hdbcli.identity.verification import Verdict
    from hdbcli.measure.statistics import Interval
    from hdbcli.training.evaluate import Evaluation
    from hdbcli.training.loop import Step
    from hdbcli.training.personalise import Created
    from hdbcli.training.shards import Prepared
    from registry.bases.settings import Added
    from registry.spec import BaseSpec
    from registry.store import Entry

UNSAID = ("json", "yes")  # options that change nothing of what is done
COUNTS = {"bytes": True, "budget": True, "numbers": False}  # names of counts -> whether of bytes
NAMED = 3  # pairs of names in a message; the report has all


def say(text: str) -> None:
    """Print a line on standard output as it is: brackets such as [V] are no markup here."""
    sys.stdout.write(f"{text}\n")


def note(text: str) -> None:
    """Print a line beside the result, on standard error."""
    sys.stderr.write(f"{text}\n")


def document(values: Mapping[str, Any]) -> None:
    """Print what a command has found as one JSON document, alone on standard output, with the
    settings it ran with and the seconds it took."""
    ctx = get_current_context()
    options: list[Any] = [each for each in ctx.command.params if each.name in ctx.params]
    names = [_long(option) for option in options]
    settings = {
        option.name if names.count(name) > 1 else name: _value(option, ctx.params[option.name])
        for name, option in zip(names, options, strict=True)
        if name not in UNSAID
    }
    took = {"total": round(time.perf_counter() - ctx.find_root().obj, 3)}
    both = {"settings": settings | values.get("settings", {})}
    _print({**values, **both, "seconds": {**took, **values.get("seconds", {})}})


def result(values: Mapping[str, Any], shown: str | Callable[[], object]) -> None:
    """Print what a command has found: as one JSON document where that was asked for, else the
    words, or what the function prints."""
    if get_current_context().params["as_json"]:
        document(values)
    elif isinstance(shown, str):
        say(shown)
    else:
        shown()


def failure(code: int, message: str) -> None:
    """Print why a command failed as one JSON document."""
    _print({"error": {"code": code, "message": message}})


def _print(value: Mapping[str, Any]) -> None:
    """Print JSON, with absolute paths; it is UTF-8, so in any other encoding all but ASCII is
    escaped."""
    plain = (sys.stdout.encoding or "").lower() not in ("utf-8", "utf8")
    text = json.dumps(value, indent=2, ensure_ascii=plain, allow_nan=False, default=_absolute)
    sys.stdout.write(f"{text}\n")


def _absolute(value: object) -> str:
    return os.path.abspath(value) if isinstance(value, Path) and str(value) != STDIN else str(value)


def _value(option: Any, value: Any) -> Any:
    """Return what an option says, a path as such: Click has it as text."""
    if isinstance(value, list | tuple):
        return [_value(option, each) for each in value]
    return Path(value) if option.type.name == "path" and value is not None else value


def _long(option: Any) -> str:
    """Return the long name of an option, or an argument's own."""
    words = (word for word in option.opts if word.startswith("--"))
    return next(words, option.name).removeprefix("--")


def progress(**planned: float) -> Bars:
    """Show on one line how far the command is and the time left; silent where standard error is not
    a terminal.

    It is there at once: what a command needs, torch above all, is imported inside. `planned` names
    the stages that are to come, in their order, and how much of each: the time left is that of all.
    """
    from hdbcli.cli.progress import Bars  # rich, which `hdb list` has no time for

    return Bars({"start": 1, **planned} if planned else {})


def follow(steps: Iterator[Step], tell: Tell) -> None:
    """Run a training to its end; say the loss now and then, for logs have no bars."""
    mean = 0.0
    for step in steps:
        mean = step.loss if not mean else 0.98 * mean + 0.02 * step.loss
        tell("train", step.number, step.steps)
        if step.number % 50 == 0 or step.number == step.steps:
            note(f"step {step.number}/{step.steps}, loss {mean:.4f}, {step.left / 60:.1f} min left")


def show_prepared(done: Prepared, report: Path, seconds: float) -> None:
    """Say what preparing people came to, and what to look at."""
    from hdbcli.training.people import tell_skipped

    tell_skipped(done.left_out, note)
    for one, other, distance in done.alike[:NAMED]:
        note(f"warning: {one} and {other} look like one person ({distance:.2f} apart)")
    if len(done.alike) > NAMED:
        note(f"warning: so do {len(done.alike) - NAMED} more pairs, see the report")
    kept = f", {done.kept} of them from an earlier run" if done.kept else ""
    note(
        f"{done.people} people, {done.pictures} pictures in {done.files} files{kept}; "
        f"{seconds:.0f} s; report: {report}"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print plain columns, the same for a terminal and a pipe.

    Not by rich: to load it takes longer than `hdb list` of a thousand identities may.
    """
    cells = [tuple(columns), *(tuple(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
    say("\n".join(lines))


def facts(values: Mapping[str, object]) -> None:
    """Print names and values in two columns."""
    width = max(map(len, values))
    for key, value in values.items():
        say(f"{key.ljust(width)}  {_cell(key, value)}")


def _cell(name: str, value: object) -> str:
    """Return a value as a person reads it: a list with commas, thousands apart, bytes as such."""
    if value is None or (isinstance(value, str | Sequence | Mapping) and not value):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_cell(key, each)}" for key, each in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_cell(name, each) for each in value)
    if isinstance(value, int) and name in COUNTS:
        return f"{value:,}{' bytes' if COUNTS[name] else ''}"
    return str(value)


def created_facts(saved: Saved, created: Created, preview: Path | None) -> dict[str, Any]:
    """Return what `hdb new --json` prints."""
    identity = created.identity
    return {
        "name": saved.name,
        "base": identity.facts.base,
        "numbers": identity.numbers,
        "bytes": saved.bytes,
        "rank": identity.rank,
        "dtype": saved.dtype,
        "seconds": {key: round(value, 3) for key, value in created.seconds.items()},
        "loss": {"start": created.loss_start, "end": created.loss_end},
        "likeness": identity.facts.likeness,
        "base_likeness": round(created.base_likeness, 4),
        "path": saved.path,
        "preview": preview,
    }


def show_created(values: Mapping[str, Any]) -> None:
    """Print the small table that ends `hdb new` and `hdb refine`, and what to type next."""
    seconds, loss = values["seconds"], values["loss"]
    facts(
        {
            "identity": f"{values['name']} (on {values['base']}, rank {values['rank']})",
            "numbers": f"{values['numbers']:,}",
            "bytes": f"{values['bytes']:,} ({values['dtype']})",
            "seconds": ", ".join(f"{key} {value:.1f}" for key, value in seconds.items()),
            "loss": f"{loss['start']:.4f} before, {loss['end']:.4f} after",
            "likeness": f"{values['likeness']:.2f} (the base's own: {values['base_likeness']:.2f})",
            "file": str(values["path"]),
            **({"preview": str(values["preview"])} if values["preview"] else {}),
            "next": f'hdb gen {values["name"]} "{CAPTIONS[1]}"',
        }
    )


def show_pictures(saved: Mapping[str, Any]) -> None:
    """Print where each picture is and its seed, and then the sheet and the page of them."""
    for picture in saved["pictures"]:
        say(f"{picture['path'] or 'in the sheet'}  seed {picture['seed']}")
    for more in filter(None, (saved["grid"], saved["html"])):
        say(str(more))


def show_entries(entries: Sequence[Entry]) -> None:
    """Print the identities, one a line; a damaged file says so in its line."""
    rows: list[tuple[object, ...]] = []
    for entry in entries:
        known, layout = entry.facts, entry.layout
        if known is None or layout is None:
            rows.append((entry.name, "?", f"{entry.bytes:,}", "?", entry.problem))
        else:
            rows.append((entry.name, known.base, f"{entry.bytes:,}", layout.rank, known.created))
    table(("name", "base", "bytes", "rank", "created"), rows)


def base_facts(spec: BaseSpec, source: str, added: Added | None) -> dict[str, Any]:
    """Return what `hdb base show --json` prints."""
    where = {k: getattr(added, k, None) for k in ("path", "origin", "prediction", "digest")}
    return {
        "name": spec.name,
        "family": spec.family,
        "summary": spec.summary,
        "licence": spec.licence,
        "resolution": spec.resolution,
        "a": spec.a,
        "b": spec.b,
        "basis_seed": spec.basis_seed,
        "identifier": spec.identifier,
        "targets": {component: list(patterns) for component, patterns in spec.targets.items()},
        "target_sets": list(spec.target_sets),
        "hypernetwork": bool(spec.hypernetwork and spec.hypernetwork.exists()),
        "budget": spec.budget,
        "guidance": spec.guidance,
        "source": source,
        **where,  # null where the base came with a package
        "bytes": sum(mark.bytes for mark in added.files.values()) if added else None,
    }


def show_evaluation(result: Evaluation) -> None:
    """Print the held-out losses with their intervals, and retrieval beside its ceilings
    and chance."""

    def interval(value: Interval) -> str:
        return f"{value.mean:+.4f} (95 % {value.low:+.4f} to {value.high:+.4f})"

    chance = 1 / result.people
    say(f"{result.people} held-out people, prediction from one photo, tested on another")
    table(
        ("diffusion loss", "mean"),
        (
            ("with their own theta", f"{result.own:.4f}"),
            ("with another's theta", f"{result.another:.4f}"),
            ("base model", f"{result.base:.4f}"),
            ("base - own, paired", interval(result.base_minus_own)),
            ("another's - own, paired", interval(result.another_minus_own)),
        ),
    )
    rows = [
        ("portrait, predicted theta", result.portraits),
        ("ceiling: another true photo", result.other_photo),
        ("ceiling: that photo through the autoencoder", result.autoencoded),
    ]
    if result.refined:
        among = f", the first {result.refined_people} people"
        among = "" if result.refined_people == result.people else among
        rows.insert(1, (f"portrait, refined theta{among}", result.refined))
    cells = [(name, f"{r.top1:.0%}", f"{r.top5:.0%}", f"{r.auc:.3f}") for name, r in rows]
    cells.append(("chance", f"{chance:.0%}", f"{min(1, 5 * chance):.0%}", "0.500"))
    table(("retrieval among true photos", "first", "in five", "AUC"), cells)


def show_comparison(result: Comparison) -> None:
    """Print the tables of a comparison and what bounds its likeness."""
    from hdbcli.compare.page import notes, tables

    for each in tables(result):
        say(f"{each.title}:")
        table(each.heads, each.rows)
        say("")
    for line in notes(result):
        say(line)


def show_bench(rows: Sequence[Row], where: str) -> None:
    """Print figures beside what they have to be."""
    lines = []
    for row in rows:
        bound = f"< {_figure(row.below)}" if row.below is not None else ""
        bound = f">= {_figure(row.above)}" if row.above is not None else bound
        kept = "" if row.kept is None else "yes" if row.kept else "NO"
        lines.append((row.name, f"{_figure(row.value)} {row.unit}", bound, kept))
    table(("benchmark", "measured", "promised", "kept"), lines)
    say(where)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def show_inspection(summary: Mapping[str, Any], result: Inspection) -> None:
    """Print what the file says, where the energy lies, and the strongest targets."""
    basis = "verifies" if result.verified else "not verified"
    facts({**summary, "energy": f"{result.energy:.4g}", "this base": result.problem or basis})
    for field in ("component", "kind"):
        shares = sorted(result.share(field).items(), key=lambda item: -item[1])
        table((field, "energy"), [(name, f"{share:.1%}") for name, share in shares])
    whole = max(result.energy, 1e-30)
    strongest = sorted(result.targets, key=lambda target: -target.energy)[:10]
    rows = [
        (t.name, f"{t.energy / whole:.1%}", ", ".join(f"{s:.3f}" for s in t.singular))
        for t in strongest
    ]
    table(("strongest targets", "energy", "singular values"), rows)


def show_exported(made: Exported) -> None:
    """Print where a LoRA file is, and a line a reader: how many targets map, or why it was not
    asked."""
    say(
        f"{made.path}  {made.bytes:,} bytes, rank {made.rank}, {made.format}; use "
        f"{made.identifier!r} where you wrote [V]"
    )
    for reading in made.readers:
        counts = f"{reading.mapped} of {reading.total} targets map"
        if reading.unread:
            counts += f", {len(reading.unread)} keys unread"
        said = reading.problem if not reading.asked else counts
        say(f"{reading.reader.ljust(max(len(r.reader) for r in made.readers))}  {said}")


def show_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Print a line an identity: whether the file and its basis hold, and what is wrong."""
    words = {True: "verifies", False: "differs", None: "?"}
    rows = [
        (v.name, "good" if v.ok else "BAD", words[v.basis], f"{v.bytes:,}", v.problem or "")
        for v in verdicts
    ]
    table(("name", "file", "basis", "bytes", ""), rows)
