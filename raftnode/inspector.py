"""raftnode-inspect: read what a node has on disk, live or dead, without changing it. Layer 5.

The names of the commands, their options, and the fields of `--json` are a published interface: fields may be added,
none changes its meaning. Every line of `--json` is one object whose `record` says what it is:

    entry      commit_id term time kind namespace key client size checksum state [value] [voters learners]
    value      namespace key [value] created modified version
    committed  commit_id staged: the last line of `commits`; what the directory has on disk as committed
    node       the one line of `info`: node address cluster format term voted_for commit_id entries staged first_kept
               last membership keys sizes readers
    damage     commit_id to: something that could not be read at all; positions in the log when it was there

and those of `verify`, `diff`, `best` and `timeline`, which are in `comparing`.

`time` is the leader's wall clock in ms since 1970. `kind` is put, delete, members or noop; a field that a kind does
not have is null. `size` counts the bytes of the command. `checksum` is the rolling one, 8 hex digits: equal checksums
at one commit_id in two directories mean equal histories up to there. `state` is committed or staged, null when that
can't be told. Sizes are bytes. What is damaged has `"damaged": true` and a `reason`, besides everything that could
still be read; of a value that is no JSON any more, the bytes are under `raw` as text.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from raftnode.comparing import COMMANDS
from raftnode.config import Settings
from raftnode.errors import StoreDamaged
from raftnode.inspection import Directory, LogRecord, StoredValue, command_of, salvage_command
from raftnode.messages import DeleteCommand, Entry, MembersCommand, PutCommand
from raftnode.output import (
    EPILOG,
    DamageLine,
    Inspector,
    Output,
    Point,
    human,
    one_directory,
    open_directory,
    options,
    or_dash,
    print_json,
    print_table,
    report_damage,
    utc,
)
from raftnode.records import Record
from raftnode.table import Column, escape, terminal_width
from raftnode.version import __version__

_SNAPSHOT: Final = (
    "One consistent snapshot. On a live node it holds back the reuse of pages: its file may grow until the listing has "
    "ended."
)
_ranged = options(
    click.option("--from", "first", type=click.IntRange(min=0), metavar="ID", help="The first commit_id to show."),
    click.option("--to", "last", type=click.IntRange(min=0), metavar="ID", help="The last commit_id to show."),
    click.option("--tail", type=click.IntRange(min=1), metavar="N", help="Only the newest N of those."),
    click.option("--values", is_flag=True, help="Show what was put; whole with --json, else shortened."),
)


# --- the lines of --json --------------------------------------------------------------------------------------


class EntryLine(Struct, tag_field="record", tag="entry", kw_only=True):
    """A log entry."""

    commit_id: int
    term: int
    time: int
    kind: str | None = None
    namespace: str | None = None
    key: str | None = None
    client: str | None = None
    size: int
    checksum: str
    state: str | None
    value: Raw | UnsetType = UNSET
    raw: str | UnsetType = UNSET
    voters: dict[str, str] | UnsetType = UNSET
    learners: dict[str, str] | UnsetType = UNSET
    damaged: bool | UnsetType = UNSET
    reason: str | UnsetType = UNSET


class ValueLine(Struct, tag_field="record", tag="value", kw_only=True):
    """A committed value."""

    namespace: str
    key: str
    value: Raw | UnsetType = UNSET
    raw: str | UnsetType = UNSET
    created: int
    modified: int
    version: int
    damaged: bool | UnsetType = UNSET
    reason: str | UnsetType = UNSET


class CommittedLine(Struct, tag_field="record", tag="committed", kw_only=True):
    """What is committed on disk, and how many entries are staged after it."""

    commit_id: int
    staged: int


class NodeLine(Struct, tag_field="record", tag="node", kw_only=True):
    """The node that a directory belongs to."""

    node: str | None
    address: str | None
    cluster: str | None
    format: int | None
    term: int | None
    voted_for: str | None
    commit_id: int | None
    entries: int
    staged: int | None
    first_kept: Point | None
    last: Point | None
    membership: dict[str, Any] | None
    keys: int
    sizes: dict[str, int]
    readers: list[dict[str, Any]]
    damaged: bool | UnsetType = UNSET
    reason: str | UnsetType = UNSET


@click.group(
    cls=Inspector, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__)
def main() -> None:
    """Read what a node has on disk: its log, its commits, its values, and what it is.

    DIR is the data directory of a node, running or not, or a copy of one. Nothing is ever written to it.

    With --json every line is one object; its "record" is "entry", "value", "committed", "node" or "damage". Fields may
    be added to it; none changes its meaning. See each command for the fields.
    """


# --- log and commits ------------------------------------------------------------------------------------------


@main.command(
    help=f"""Every kept entry of the log, staged and committed, oldest first.

    Fields: commit_id, term, time (the leader's clock, ms since 1970; in the table UTC), kind (put, delete, members,
    noop), namespace, key, client, size (bytes of the command), checksum (rolling: equal at one commit_id in two
    directories means equal histories up to there), state (staged or committed); value with --values; voters and
    learners of a members entry; damaged and reason where something is wrong.

    --from and --tail seek, they do not scan. {_SNAPSHOT}
    """,
    epilog=EPILOG,
)
@one_directory
@_ranged
def log(
    output: Output,
    directory: Path,
    as_json: bool,
    first: int | None,
    last: int | None,
    tail: int | None,
    values: bool,
) -> None:
    with open_directory(output, directory, as_json) as opened:
        window = _window(first, last, tail, opened.last)
        _list_entries(output, opened, window, as_json, values, with_state=True)
    report_damage(output, directory)


@main.command(
    help=f"""The committed entries of the log, and at the end the commit_id that is committed on disk.

    A running node may have acknowledged more: what a majority has in its log is safe before its commit_id is written
    here. Fields as in `log`; the last line is {{"record": "committed", "commit_id": ..., "staged": ...}}.

    {_SNAPSHOT}
    """,
    epilog=EPILOG,
)
@one_directory
@_ranged
def commits(
    output: Output,
    directory: Path,
    as_json: bool,
    first: int | None,
    last: int | None,
    tail: int | None,
    values: bool,
) -> None:
    with open_directory(output, directory, as_json) as opened:
        committed = opened.facts.commit_id
        if committed is None:
            raise StoreDamaged(f"{directory}: what is committed can't be told; `log` lists the entries all the same")
        upto = committed if last is None else min(last, committed)
        window = _window(first, upto, tail, upto)
        _list_entries(output, opened, window, as_json, values, with_state=False)
        staged = max(0, opened.last - committed)
    if as_json:
        output.json(CommittedLine(commit_id=committed, staged=staged))
    else:
        output.text(f"committed on disk: commit_id {committed}; staged after it: {staged}")
    report_damage(output, directory)


def _window(first: int | None, last: int | None, tail: int | None, newest: int) -> tuple[int, int | None]:
    """The range of commit_ids to show."""
    if first is not None and last is not None and first > last:
        raise click.UsageError(f"--from {first} is after {last}, the last one to show")
    first = first or 1
    if tail is not None:
        first = max(first, (newest if last is None else min(last, newest)) - tail + 1)
    return first, last


def _list_entries(
    output: Output,
    opened: Directory,
    window: tuple[int, int | None],
    as_json: bool,
    values: bool,
    with_state: bool,
) -> None:
    lines = (_entry_line(record, opened.facts.commit_id, values) for record in opened.entries(*window))
    if as_json:
        print_json(output, lines)
        return
    columns = _ENTRY_COLUMNS + ([_STATE] if with_state else []) + ([_VALUE] if values else [])
    columns[0] = msgspec.structs.replace(columns[0], expect=len(str(opened.last)))
    staged, width = output.style(fg="yellow"), terminal_width()
    print_table(output, columns, lines, lambda line: _entry_cells(line, width, with_state, values), staged)


_ENTRY_COLUMNS = [
    Column("commit_id", right=True),
    Column("term", right=True),
    Column("time", rank=2),
    Column("kind"),
    Column("namespace", least=7, rank=1),
    Column("key", least=8),
    Column("client", least=9, rank=5),
    Column("size", right=True, rank=4),
    Column("checksum", rank=3),
]
_STATE = Column("state")
_VALUE = Column("value", least=16)


def _entry_line(record: LogRecord, committed: int | None, values: bool) -> EntryLine | DamageLine:
    entry = record.entry
    if entry is None:
        return DamageLine(commit_id=record.commit_id, to=record.to, reason=record.damage)
    line = EntryLine(
        commit_id=entry.commit_id,
        term=entry.term,
        time=entry.time,
        size=entry.size,
        checksum=f"{entry.checksum:08x}",
        state=None if committed is None else "committed" if entry.commit_id <= committed else "staged",
    )
    problem = _add_command(line, entry, values) or ""
    if record.damage or problem:
        line.damaged, line.reason = True, record.damage or f"entry {entry.commit_id}: {problem}"
    return line


def _add_command(line: EntryLine, entry: Entry, values: bool) -> str | None:
    """Fill in what the command says; returns what is wrong with it."""
    command, problem = command_of(entry)
    match command:
        case PutCommand():
            line.kind, line.namespace, line.key = "put", command.namespace, command.key
            line.client = command.client or None
            return _add_value(line, command.value) if values else None
        case DeleteCommand():
            line.kind, line.namespace, line.key = "delete", command.namespace, command.key
            line.client = command.client or None
        case MembersCommand():
            line.kind, line.voters, line.learners = "members", command.voters, command.learners
        case None:
            line.kind, line.namespace, line.key = salvage_command(bytes(entry.command))
            if values:
                line.raw = bytes(entry.command).decode(errors="backslashreplace")
            return problem
        case _:
            line.kind = str(type(command).__struct_config__.tag)
    return None


def _add_value(line: EntryLine | ValueLine, value: Raw) -> str | None:
    """Fill in a value, on one line; its bytes when it is no JSON any more. Returns what is wrong with it."""
    try:
        msgspec.json.decode(value)
    except (ValueError, RecursionError) as error:
        line.raw = bytes(value).decode(errors="backslashreplace")
        return f"its value is no JSON: {error}"
    text = bytes(value)
    line.value = Raw(msgspec.json.format(text, indent=-1)) if b"\n" in text or b"\r" in text else value
    return None


def _entry_cells(line: EntryLine, width: int, with_state: bool, values: bool) -> list[str]:
    cells = [
        str(line.commit_id),
        str(line.term),
        utc(line.time),
        line.kind or "?",
        line.namespace or "-",
        "-" if line.key is None else line.key,
        line.client or "-",
        str(line.size),
        line.checksum,
    ]
    if with_state:
        cells.append(line.state or "?")
    if values:
        cells.append(_value_text(line, width))
    return cells


def _value_text(line: EntryLine | ValueLine, width: int) -> str:
    """As much of a value as a line of the table can hold: it may have megabytes."""
    if isinstance(line.raw, str):
        return line.raw[: width + 1]
    if isinstance(line, EntryLine) and isinstance(line.voters, dict):
        learners = line.learners or {}
        return ", ".join([*line.voters, *(f"{address} (learner)" for address in learners)])
    if not isinstance(line.value, Raw):
        return "-"
    return bytes(memoryview(line.value)[: 4 * width + 4]).decode(errors="ignore")


# --- state ----------------------------------------------------------------------------------------------------


@main.command(
    help=f"""The committed values, in order of namespace and key.

    Fields: namespace, key, value, created and modified (the commit_ids that did it), version (puts since it was
    created); damaged and reason where something is wrong.

    --namespace and --prefix seek, they do not scan. {_SNAPSHOT}
    """,
    epilog=EPILOG,
)
@one_directory
@click.option("--namespace", metavar="NAME", help="Only of this namespace.")
@click.option("--prefix", metavar="TEXT", default="", help="Only keys that begin so.")
@click.option("--keys-only", is_flag=True, help="Leave the values out.")
def state(output: Output, directory: Path, as_json: bool, namespace: str | None, prefix: str, keys_only: bool) -> None:
    with open_directory(output, directory, as_json) as opened:
        lines = (_value_line(found, not keys_only) for found in opened.values(namespace, prefix))
        if as_json:
            print_json(output, lines)
        else:
            columns = [column for column in _STATE_COLUMNS if not keys_only or column is not _STATE_VALUE]
            number, width = len(str(opened.last)), terminal_width()
            columns = [msgspec.structs.replace(c, expect=number) if c.title == "modified" else c for c in columns]
            print_table(output, columns, lines, lambda line: _state_cells(line, width, keys_only), None)
    report_damage(output, directory)


_STATE_VALUE = Column("value", least=16)
_STATE_COLUMNS = [
    Column("namespace", least=9),
    Column("key", least=16),
    Column("created", right=True, rank=1),
    Column("modified", right=True),
    Column("version", right=True),
    _STATE_VALUE,
]


def _value_line(found: StoredValue, values: bool) -> ValueLine | DamageLine:
    record = found.record
    if record is None or found.namespace is None or found.key is None:
        return DamageLine(namespace=found.namespace, key=found.key, reason=found.damage)
    line = _new_value_line(found.namespace, found.key, record)
    problem = _add_value(line, record.value) if values else None
    if found.damage or problem:
        line.damaged, line.reason = True, found.damage or f"{found.key!r} in {found.namespace!r}: {problem}"
    return line


def _new_value_line(namespace: str, key: str, record: Record) -> ValueLine:
    return ValueLine(
        namespace=namespace, key=key, created=record.created, modified=record.modified, version=record.version
    )


def _state_cells(line: ValueLine, width: int, keys_only: bool) -> list[str]:
    cells = [line.namespace, line.key, str(line.created), str(line.modified), str(line.version)]
    return cells if keys_only else [*cells, _value_text(line, width)]


# --- info -----------------------------------------------------------------------------------------------------


@main.command(
    help="""What the directory says of its node, and how large it is.

    Fields: node, address and cluster (null until the node first started with its members), format, term, voted_for,
    commit_id (committed on disk), entries (kept in the log), staged, first_kept and last (the ends of the kept log:
    commit_id, term, time, checksum; null in an empty log), membership (in force: commit_id of its entry, voters,
    learners, by address with node id), keys, sizes (bytes: file on disk, used by data, map: the most that the file
    may grow to), readers (pid, thread, txn: the snapshot that it holds), damaged and reason.
    """,
    epilog=EPILOG,
)
@one_directory
def info(output: Output, directory: Path, as_json: bool) -> None:
    with Directory(directory, Settings().map_bytes) as opened:
        line = _node_line(opened)
    if line.damaged is True:
        output.damage += 1
    if as_json:
        output.json(line)
    else:
        _print_node(output, line)
    report_damage(output, directory)


def _node_line(opened: Directory) -> NodeLine:
    facts, damage = opened.facts, list(opened.facts.damage)
    membership = facts.memberships[-1] if facts.memberships else None
    line = NodeLine(
        node=facts.node,
        address=facts.address,
        cluster=facts.cluster,
        format=facts.format,
        term=None if facts.ballot is None else facts.ballot.term,
        voted_for=None if facts.ballot is None else facts.ballot.voted_for,
        commit_id=facts.commit_id,
        entries=opened.kept,
        staged=None if facts.commit_id is None else max(0, opened.last - facts.commit_id),
        first_kept=_point(opened, opened.first, damage),
        last=_point(opened, opened.last, damage),
        membership=None if membership is None else msgspec.structs.asdict(membership),
        keys=opened.keys,
        sizes=opened.sizes(),
        readers=[
            {"pid": reader.pid, "thread": reader.thread, "txn": reader.transaction}
            for reader in opened.readers()
            if reader.pid != os.getpid()
        ],
    )
    if damage:
        line.damaged, line.reason = True, "; ".join(dict.fromkeys(damage))
    return line


def _point(opened: Directory, commit_id: int, damage: list[str]) -> Point | None:
    """One end of the kept log; notes what is wrong with it."""
    if opened.first > opened.last:
        return None
    record = next(opened.entries(commit_id, commit_id))
    if record.damage:
        damage.append(record.damage)
    entry = record.entry
    return None if entry is None else Point(entry.commit_id, entry.term, entry.time, f"{entry.checksum:08x}")


def _print_node(output: Output, line: NodeLine) -> None:
    heading = output.style(bold=True) or str
    for name, text in _node_rows(line):
        output.text(f"{heading(f'{name:<11}')}{escape(text)}")
    if isinstance(line.reason, str):
        red = output.style(fg="red") or str
        output.text(red(f"DAMAGED    {escape(line.reason)}"))


def _node_rows(line: NodeLine) -> Iterator[tuple[str, str]]:
    yield "node", line.node or "-"
    yield "address", line.address or "- (not founded yet)"
    yield "cluster", line.cluster or "-"
    yield "format", or_dash(line.format)
    yield "term", f"{or_dash(line.term)}, " + (f"voted for {line.voted_for}" if line.voted_for else "vote is free")
    yield "commit_id", f"{or_dash(line.commit_id)} committed on disk"
    yield "staged", f"{or_dash(line.staged)} entries"
    yield "log", f"{line.entries} entries kept"
    yield "first kept", _point_text(line.first_kept)
    yield "last", _point_text(line.last)
    yield from _member_rows(line.membership or {})
    yield "keys", str(line.keys)
    for name, size in line.sizes.items():
        yield name, f"{human(size)} ({size} bytes)"
    if not line.readers:
        yield "readers", "none besides this one"
    for n, reader in enumerate(line.readers):
        holds = "idle" if reader["txn"] is None else f"reads snapshot {reader['txn']}"
        yield "" if n else "readers", f"process {reader['pid']}, {holds}"


def _member_rows(membership: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for title, members in (("voters", membership.get("voters")), ("learners", membership.get("learners"))):
        for n, (address, node) in enumerate((members or {}).items()):
            yield "" if n else title, f"{address}  {node or '(not met yet)'}"
        if not members:
            yield title, "none"


def _point_text(point: Point | None) -> str:
    if point is None:
        return "-"
    return f"commit_id {point.commit_id}, term {point.term}, checksum {point.checksum}, {utc(point.time)}"


for _command in COMMANDS:
    main.add_command(_command)


def _main() -> NoReturn:
    sys.exit(main())


if __name__ == "__main__":
    _main()
