"""Where commands meet the terminal: errors and signals become a line and an exit code, questions
are asked, help is grouped."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any

import typer
from typer._click.exceptions import ClickException

from hdbcli.cli import render
from registry.errors import HdbError, HdbWarning, UsageError

INTERRUPTED = "interrupted; no file was left half-written"


def new_app(about: str, **more: Any) -> typer.Typer:
    return typer.Typer(
        help=about,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        **{"cls": Grouped, **more},
    )


def only_asked(app: typer.Typer) -> None:
    """Drop every command but the one that the command line names, or the one that a shell asks to
    complete, if it names one: Typer reads the signatures of all, which takes longer than `hdb
    list`."""
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS")
    words = line.split() if line and "_HDB_COMPLETE" in os.environ else sys.argv
    name = next((word for word in words[1:] if not word.startswith("-")), None)
    commands = [
        c
        for c in app.registered_commands
        if name == (c.name or getattr(c.callback, "__name__", ""))
    ]
    groups = [group for group in app.registered_groups if name == group.name]
    if commands or groups:
        app.registered_commands, app.registered_groups = commands, groups


class Grouped(typer.core.TyperGroup):
    """Lists commands by what they are for, each with its whole first sentence."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            panel = getattr(command, "rich_help_panel", None) or "Commands"
            groups.setdefault(panel, []).append((name, command.get_short_help_str(limit=500)))
        for panel, rows in groups.items():
            with formatter.section(panel):
                formatter.write_dl(rows)


class Boundary(Grouped):
    """The one place where errors become a line on stderr and an exit code; bugs keep
    their traceback."""

    as_json = False

    def main(self, *args: Any, **more: Any) -> Any:
        """Run a command; a closed pipe ends it without a word, a full disk with a line."""
        _open_missing()
        words = [*args, more.get("args")][0]
        self.as_json = "--json" in (sys.argv[1:] if words is None else words)
        try:
            try:
                code = super().main(*args, **{**more, "standalone_mode": False})
                raise SystemExit(code or 0)
            except ClickException as error:
                error.show()
                self._tell(error.exit_code, error.format_message())
                raise SystemExit(error.exit_code) from None
            except typer.Abort:  # a question without an answer
                self._tell(1, "nothing was done", "")
                raise SystemExit(1) from None
            finally:  # what the interpreter fails to flush at its end is exit code 120
                sys.stdout.flush()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ENOSPC):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())  # for that flush, with what is left over
            if error.errno == errno.ENOSPC:
                render.note(f"error: {error.strerror}; free some, or write elsewhere")
            raise SystemExit(1) from None

    def invoke(self, ctx: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):  # a name of a file need not be text
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        with _stoppable() as stopped:
            try:
                with _told():
                    return super().invoke(ctx)
            except (typer.Exit, typer.Abort, ClickException) as error:
                if not stopped:
                    raise
                raise self._end(128 + stopped[0], INTERRUPTED, "") from error
            except UsageError as error:
                raise self._end(2, str(error)) from None
            except HdbError as error:
                raise self._end(1, str(error)) from None
            except (Exception, KeyboardInterrupt) as error:
                # What is interrupted while it loads may fail in any way.
                if stopped or isinstance(error, KeyboardInterrupt):
                    number = stopped[0] if stopped else signal.SIGINT
                    raise self._end(128 + number, INTERRUPTED, "") from None
                if _out_of_memory(error):
                    said = "out of memory; close other programs, or try --device cpu"
                    raise self._end(1, said) from None
                if isinstance(error, OSError) and error.filename is not None:
                    raise self._end(1, f"{error.filename}: {error.strerror}") from None
                if self.as_json:  # a bug keeps its traceback
                    render.failure(1, f"{type(error).__name__}: {error}")
                raise

    def _end(self, code: int, message: str, kind: str = "error: ") -> typer.Exit:
        """Say why the command ends; return what ends it."""
        self._tell(code, message, kind)
        return typer.Exit(code)

    def _tell(self, code: int, message: str, kind: str | None = None) -> None:
        if kind is not None:
            render.note(f"{kind}{message}")
        if self.as_json:
            render.failure(code, message)


def _open_missing() -> None:
    """Give streams that the shell closed a place to read nothing from and to write to."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  until the end


def _out_of_memory(error: BaseException) -> bool:
    if "torch" not in sys.modules:  # nor is it to be loaded for a RuntimeError such as Exit
        return isinstance(error, MemoryError)
    from registry.stable_diffusion.loading import out_of_memory

    return out_of_memory(error)


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Turn the signals that ask a program to end into KeyboardInterrupt, so that everything cleans
    up after itself; yield the list of those that came."""
    came: list[int] = []

    def stop(number: int, _frame: Any) -> None:
        came.append(number)
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows lacks the last
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
                before[number] = signal.signal(number, stop)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ask(question: str) -> None:
    """Ask on the terminal; who says no ends the command there."""
    try:
        if typer.confirm(question, err=True):
            return
    except typer.Abort as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    render.note("nothing was done")
    raise typer.Exit(1)


@contextmanager
def _told() -> Iterator[None]:
    """Print hdb's own warnings as a line, and leave others to Python."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *more: Any, **named: Any) -> None:
        if issubclass(category, HdbWarning):
            render.note(f"warning: {message}")
        else:
            shown(message, category, *more, **named)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown
