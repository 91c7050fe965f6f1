"""What all commands of raftnode-inspect share: how they are run, what they open, how they print, how they end. Layer 5.

`Inspector` is the group: every failure becomes one line on standard error and an exit status there. `Output` is what a
command prints to: whole lines of JSON, or a table, through memory that outlives the process (see `supervised`), and the
count of the damage that it met, which decides the exit status. A command is made so:

    @click.command(help=..., epilog=EPILOG)
    @one_directory                        # or many_directories: DIR, --json, and the Output
    def name(output: Output, directory: Path, as_json: bool) -> None:
        with open_directory(output, directory, as_json) as opened:
            ...                           # output.json(line), print_json, or print_table
        report_damage(output, directory)
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

import click
import msgspec
from msgspec import Struct

from raftnode.config import Settings
from raftnode.environment import RESTORE
from raftnode.errors import StoreDamaged, StoreError
from raftnode.inspection import Directory
from raftnode.supervised import OutputFailed, Spool, supervise
from raftnode.table import Column, Style, Table, escape, terminal_width

EXIT_UNEXPECTED: Final = 1
EXIT_UNUSABLE: Final = 3
EXIT_DAMAGED: Final = 4
EXIT_INTERRUPTED: Final = 130
_PATIENCE_S: Final = 1.0

EPILOG: Final = (
    "Exit status: 0 fine; 1 something unexpected; 2 wrong usage; 3 the directory is missing, not a node's, of a newer "
    "format or can't be opened; 4 something in it is damaged: what could be read was printed, and marked."
)

_encode = msgspec.json.Encoder().encode
Command: TypeAlias = Callable[..., Any]


# --- lines that several commands print ------------------------------------------------------------------------


class Point(Struct):
    """An entry, without its command."""

    commit_id: int
    term: int
    time: int
    checksum: str


class DamageLine(Struct, tag_field="record", tag="damage", kw_only=True):
    """Something that could not be read at all."""

    commit_id: int | None = None
    to: int | None = None
    namespace: str | None = None
    key: str | None = None
    damaged: bool = True
    reason: str


# --- where it goes --------------------------------------------------------------------------------------------


class Output:
    """Standard output and error of one run, and how much damage was met."""

    def __init__(self, stream: BinaryIO) -> None:
        self.spool = Spool(stream)
        self.is_terminal = stream.isatty()
        self.is_coloured = self.is_terminal and not os.environ.get("NO_COLOR")
        self.encoding = sys.stdout.encoding or "utf-8"
        self.damage = 0
        self.before_next_line: Callable[[], None] | None = None
        """Called once, before anything more is printed: it takes a progress bar away."""

    def json(self, line: Struct) -> None:
        """One object, one line."""
        if self.before_next_line is not None:
            self._make_way()
        self.spool.write(_encode(line) + b"\n")

    def text(self, line: str) -> None:
        if self.before_next_line is not None:
            self._make_way()
        self.spool.write(line.encode(self.encoding, errors="replace") + b"\n")

    def _make_way(self) -> None:
        assert self.before_next_line is not None, "asked only when there is something in the way"
        self.before_next_line()
        self.before_next_line = None

    def style(self, **how: Any) -> Style | None:
        """A colour, on a terminal that wants one."""
        return (lambda text: click.style(text, **how)) if self.is_coloured else None

    def table(self, columns: list[Column]) -> Table:
        return Table(columns, terminal_width(), self.text, self.style(bold=True))

    def complain(self, message: str) -> None:
        """One line on standard error, after all that was printed so far."""
        try:
            self.spool.flush()
        except OSError:
            _end_quietly()
        click.echo(f"raftnode-inspect: {escape(message)}", err=True)


class Inspector(click.Group):
    """The command itself: where every failure becomes one line and an exit status."""

    def main(self, *args: Any, **named: Any) -> Any:
        """With arguments given, run in this process; from the command line, in a child (see `supervised`)."""
        _open_missing_streams()
        output = Output(sys.stdout.buffer)
        if args or named.get("args") is not None:
            return super().main(*args, **named, obj=output)
        run: Callable[..., object] = super().main
        return sys.exit(supervise(lambda: run(obj=output), output_crashed(output)))

    def _invoke_and_flush(self, ctx: click.Context) -> None:
        output: Output = ctx.obj
        try:
            super().invoke(ctx)
        except click.exceptions.Exit:  # a command's own status
            output.spool.flush()
            raise
        output.spool.flush()

    def invoke(self, ctx: click.Context) -> Any:
        output: Output = ctx.obj
        try:
            self._invoke_and_flush(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except BrokenPipeError:
            _end_quietly()
        except OutputFailed as error:
            _end_quietly()
            output.complain(f"the output can't be written: {error.strerror}")
            ctx.exit(EXIT_UNEXPECTED)
        except (KeyboardInterrupt, click.Abort):
            ctx.exit(EXIT_INTERRUPTED)
        except StoreDamaged as error:
            output.complain(str(error))
            ctx.exit(EXIT_DAMAGED)
        except StoreError as error:
            output.complain(str(error))
            ctx.exit(EXIT_UNUSABLE)
        except Exception as error:
            output.complain(_unexpected(error))
            ctx.exit(EXIT_UNEXPECTED)
        if output.damage:
            ctx.exit(EXIT_DAMAGED)


def output_crashed(output: Output) -> Callable[[str], int]:
    """What the parent does when the child was ended by what it read."""

    def crashed(signal_name: str) -> int:
        output.complain(
            f"the data file is damaged: reading one of its pages ended the reader ({signal_name}). What could be read "
            f"before is printed. {RESTORE}"
        )
        return EXIT_DAMAGED

    return crashed


def _end_quietly() -> None:
    """Nobody reads any more (`| head`), or nothing can be written: let what Python flushes at its end go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _open_missing_streams() -> None:
    """When we were started without standard output or error, something must stand in their place: else the next file
    that is opened, which is the data file, gets their number and with that what is written to them."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - open to the end, as the streams are


def _unexpected(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"unexpected {type(error).__name__}: {error} (at {Path(where.filename).name}:{where.lineno})"


# --- options --------------------------------------------------------------------------------------------------


def options(*several: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several options as one decorator."""

    def add(command: Command) -> Command:
        for option in reversed(several):
            command = option(command)
        return command

    return add


_json = click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
one_directory = options(
    click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, readable=False)),
    _json,
    click.pass_obj,
)
many_directories = options(
    click.argument(
        "directories", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path, readable=False)
    ),
    _json,
    click.pass_obj,
)


# --- printing -------------------------------------------------------------------------------------------------


def open_directory(output: Output, directory: Path, as_json: bool) -> Directory:
    """Open a directory and print what is wrong with its facts before anything else.

    When the output has to wait for its reader, the directory's look ends: a paused pager does not make a live node's
    file grow."""
    opened = Directory(directory, Settings().map_bytes)
    output.spool.before_waiting.append(opened.release)
    for reason in opened.facts.damage:
        output.damage += 1
        if as_json:
            output.json(DamageLine(reason=reason))
        else:
            output.text((output.style(fg="red") or str)(f"DAMAGED: {escape(reason)}"))
    return opened


class Printer:
    """Lines of one kind, as JSON or as rows of a table; those whose `damaged` is True count as damage."""

    def __init__(
        self,
        output: Output,
        as_json: bool,
        columns: list[Column],
        cells: Callable[[Any], list[str]],
        staged: Style | None = None,
    ) -> None:
        """`cells` makes the row of a line; `staged` is for lines whose `state` is staged."""
        self._output = output
        self._table = None if as_json else output.table(columns)
        self._cells = cells
        self._staged = staged
        self._red = output.style(fg="red")

    def add(self, line: Any) -> None:
        damaged = line.damaged is True
        if damaged:
            self._output.damage += 1
        if self._table is None:
            self._output.json(line)
            return
        style = self._red if damaged else self._staged if getattr(line, "state", None) == "staged" else None
        if isinstance(line, DamageLine):
            self._table.remark(line.reason, style)
        else:
            self._table.add(self._cells(line), line.reason if damaged else "", style)

    def note(self, line: Struct, text: str) -> None:
        """Something that is told between the lines: as an object in JSON, in words in a table."""
        if self._table is None:
            self._output.json(line)
        else:
            self._table.note(text)

    def settle(self) -> None:
        """Hand over all that was added, though more will come."""
        if self._table is not None:
            self._table.settle()
        self._output.spool.flush()

    def finish(self) -> None:
        """Print what still waits. Columns without room are named."""
        if self._table is None:
            return
        self._table.finish()
        if self._table.left_out:
            missing = ", ".join(self._table.left_out)
            self._output.complain(f"no room for {missing}: use a wider terminal, or --json")


def print_json(output: Output, lines: Iterable[Any]) -> None:
    """All these lines as JSON."""
    printer = Printer(output, True, [], list)
    for line in lines:
        printer.add(line)


def print_table(
    output: Output,
    columns: list[Column],
    lines: Iterable[Any],
    cells: Callable[[Any], list[str]],
    staged: Style | None,
) -> None:
    """All these lines as a table."""
    printer = Printer(output, False, columns, cells, staged)
    for line in lines:
        printer.add(line)
    printer.finish()


@contextlib.contextmanager
def progress(length: int, label: str, output: Output | None = None) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error for work of `length` steps, if it takes longer than a second and that is a
    terminal. The block calls what it gets with the number of steps done since the last call. It prints nothing, or says
    to which output: there the bar is over with the first line that is printed, if both go to a terminal.
    """
    started, done = time.monotonic(), 0
    update: Callable[[int], None] | None = None
    is_wanted = sys.stderr.isatty()

    def end() -> None:
        nonlocal is_wanted, update
        is_wanted, update = False, None
        shown.close()

    with contextlib.ExitStack() as shown:

        def advance(steps: int) -> None:
            nonlocal done, update
            done += steps
            if update is not None:
                update(steps)
            elif is_wanted and time.monotonic() - started > _PATIENCE_S:
                bar = shown.enter_context(click.progressbar(length=length, label=label, file=sys.stderr))
                update = bar.update
                update(done)

        if output is not None and output.is_terminal:
            output.before_next_line = end
        yield advance
    if output is not None:
        output.before_next_line = None


def report_damage(output: Output, directory: Path) -> None:
    """The one line at the end that says what the marks mean."""
    if output.damage:
        places = "place is" if output.damage == 1 else "places are"
        output.complain(
            f"{directory}: {output.damage} {places} damaged, marked above. Do not start the node on it: with the "
            f"node stopped, see what `raftnode repair {directory} --dry-run` says"
        )


# --- words and numbers ----------------------------------------------------------------------------------------


def utc(milliseconds: int) -> str:
    """A time as people read it; a damaged one may be none at all."""
    try:
        return datetime.datetime.fromtimestamp(milliseconds // 1000, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return f"{milliseconds} ms?"


def or_dash(fact: int | None) -> str:
    """A number, or a question mark for what damage hides."""
    return "?" if fact is None else str(fact)


def human(size: int) -> str:
    """Bytes as people read them."""
    number, units = float(size), ("B", "KiB", "MiB", "GiB")
    for unit in units:
        if number < 1024 or unit == units[-1]:
            break
        number /= 1024
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
