"""Which entries of a log are wanted: a range of positions, and filters over what is in them. Layer 5.

Positions are sought, never scanned for; so is a term, as terms never fall along a log. All else is scanned for: leaders
write their own wall clocks into the entries, and those may jump; and the committed record of a key knows only of its
newest change, and is not believed here, as somebody who searches a log may doubt exactly that record. With `tail` the
scan goes backwards, so that what happened lately is found at once.

What is damaged is always wanted: it might be what is searched for.
"""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Callable
from typing import Any, Final

import click
from msgspec import Struct

from raftnode.inspection import Directory, LogReading, LogRecord, command_of, in_json
from raftnode.lines import KINDS, kind_of
from raftnode.messages import DeleteCommand, PutCommand
from raftnode.output import Command, options

_BLOCK: Final = 4096


class Filter(Struct, frozen=True, kw_only=True):
    """What an entry must be. None, or nothing, asks for nothing."""

    term: int | None = None
    kinds: frozenset[str] = frozenset()
    namespace: str | None = None
    key: str | None = None
    prefix: str | None = None
    since: int | None = None
    """The leader's clock, ms since 1970; `until` is not part of what is wanted."""
    until: int | None = None

    @property
    def asks_for_commands(self) -> bool:
        return bool(self.kinds) or self._asks_for_keys

    @property
    def _asks_for_keys(self) -> bool:
        return any(text is not None for text in (self.namespace, self.key, self.prefix))

    @property
    def scans(self) -> bool:
        """True when entries have to be looked at one by one."""
        return self.asks_for_commands or self.since is not None or self.until is not None

    def test(self) -> Callable[[LogRecord], bool]:
        """A test for records, made once for many."""
        needles = [in_json(text) for text in (self.namespace, self.key, self.prefix) if text]
        term, since, until = self.term, self.since, self.until

        def is_wanted(record: LogRecord) -> bool:
            entry = record.entry
            if entry is None or record.damage:
                return True
            if term is not None and entry.term != term:
                return False
            if (since is not None and entry.time < since) or (until is not None and entry.time >= until):
                return False
            if not asks:
                return True
            command = bytes(entry.command)
            return all(needle in command for needle in needles) and self._wants_command(record)

        asks = self.asks_for_commands
        return is_wanted

    def _wants_command(self, record: LogRecord) -> bool:
        assert record.entry is not None, "asked of entries that could be read"
        command, problem = command_of(record.entry)
        if command is None:
            return bool(problem)
        if self.kinds and kind_of(command) not in self.kinds:
            return False
        if not self._asks_for_keys:
            return True
        return (
            isinstance(command, PutCommand | DeleteCommand)
            and self.namespace in (None, command.namespace)
            and self.key in (None, command.key)
            and command.key.startswith(self.prefix or "")
        )


def window(
    directory: Directory, wanted: Filter, first: int | None, last: int | None, tail: int | None, staged: bool
) -> tuple[int, int | None]:
    """The positions from which to which the wanted entries are to be looked for; None for no end."""
    if first is not None and last is not None and first > last:
        raise click.UsageError(f"--from {first} is after {last}, the last one to show")
    first, scans = first or 1, wanted.scans
    if staged and directory.committed is not None:
        first = max(first, directory.committed + 1)
    if wanted.term is not None:
        begin, end = directory.position_of_term(wanted.term), directory.position_of_term(wanted.term + 1)
        first = first if begin is None else max(first, begin)
        scans = scans or begin is None or end is None
        if end is not None and end <= directory.last:
            last = end - 1 if last is None else min(last, end - 1)
    if tail is not None:
        newest = directory.last if last is None else min(last, directory.last)
        nth = _nth_newest(directory, wanted, first, newest, tail) if scans else newest - tail + 1
        first = max(first, nth)
    return first, last


def _nth_newest(directory: Directory, wanted: Filter, first: int, last: int, count: int) -> int:
    """The position of the `count`th newest wanted entry that is sound, or `first`; block by block from the end."""
    is_wanted = wanted.test()
    end = last
    while end >= max(first, directory.first):
        start = max(first, end - _BLOCK + 1)
        found = [
            record.commit_id
            for record in LogReading(directory, start).upto(end)
            if not record.damage and is_wanted(record)
        ]
        if len(found) >= count:
            return found[-count]
        count -= len(found)
        end = start - 1
    return first


# --- as options -----------------------------------------------------------------------------------------------


class When(click.ParamType):  # type: ignore[type-arg] # generic only from click 8.4 on
    """A point in time: ISO 8601 (UTC unless it says otherwise), ms since 1970, or how long ago (90s, 15m, 2h, 7d)."""

    name = "when"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        if ago := re.fullmatch(r"-?(\d+(?:\.\d+)?)([smhd])", value):
            return int((time.time() - float(ago[1]) * _SECONDS[ago[2]]) * 1000)
        if value.isdecimal() and len(value) > 8:
            return int(value)
        try:
            found = datetime.datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is no time: say 2026-11-23T06:41:51, 15m (ago), or ms since 1970", param, ctx)
        if found.tzinfo is None:
            found = found.replace(tzinfo=datetime.UTC)
        return int(found.timestamp() * 1000)


_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_position = click.IntRange(min=0)

ranged: Callable[[Command], Command] = options(
    click.option("--from", "first", type=_position, metavar="ID", help="The first commit_id to look at; seeks."),
    click.option("--to", "last", type=_position, metavar="ID", help="The last commit_id to look at."),
    click.option(
        "--tail",
        type=click.IntRange(min=1),
        metavar="N",
        help="Only the newest N of what is wanted; seeks, or with a filter that scans, scans back from the end.",
    ),
    click.option("--term", type=click.IntRange(min=0), metavar="T", help="Only entries of this term; seeks."),
    click.option(
        "--kind",
        "kinds",
        type=click.Choice(KINDS),
        multiple=True,
        help="Only entries of this kind; may be given several times; scans.",
    ),
    click.option("--namespace", metavar="NAME", help="Only puts and deletes in this namespace; scans."),
    click.option("--key", metavar="KEY", help="Only puts and deletes of this key; scans."),
    click.option("--prefix", metavar="TEXT", help="Only puts and deletes of keys that begin so; scans."),
    click.option(
        "--since",
        type=When(),
        metavar="WHEN",
        help="Only entries at or after this time by the leader's clock: ISO 8601 (UTC), ms since 1970, or 15m (ago). "
        "Scans, as clocks may jump.",
    ),
    click.option("--until", type=When(), metavar="WHEN", help="Only entries before this time; scans."),
    click.option("--values", is_flag=True, help="Show what was put; whole with --json, else shortened."),
)
"""The options of a listing of the log."""
