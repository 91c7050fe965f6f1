"""raftnode-inspect: read what a node has on disk, live or dead, without changing it. Layer 5.

The names of the commands, their options, and the fields of `--json` are a published interface: fields may be added,
none changes its meaning. Every line of `--json` is one object whose `record` says what it is:

    entry      commit_id term time kind namespace key client size checksum state [value] [voters learners]
    cut        commit_id: of a live node's log; the staged entries from here on, listed above, were cut by a new leader,
               and what follows begins here again
    committed  commit_id staged: what the directory has on disk as committed; the last line of `commits`, and in
               `log --follow` whenever entries that were listed as staged have committed
    value      namespace key [value] created modified version
    renewed    commit_id: in `state` of a live node; the values below are as of this commit_id
    change     commit_id term time kind namespace key client state [before] [value] replaced created version
    node       directory node address cluster format term voted_for commit_id behind entries staged first_kept last
               membership witnesses keys sizes readers: what `info` tells of a directory
    namespace  directory namespace keys bytes: after the nodes of `info`
    damage     commit_id to: something that could not be read at all; positions in the log when it was there

and those of `verify`, `diff`, `best` and `timeline`, which are in `comparing`.

`time` is the leader's wall clock in ms since 1970. `kind` is put, delete, members or noop; a field that a kind does
not have is null. `size` counts the bytes of the command. `checksum` is the rolling one, 8 hex digits: equal checksums
at one commit_id in two directories mean equal histories up to there. `state` is committed or staged, null when that
can't be told. Sizes are bytes. What is damaged has `"damaged": true` and a `reason`, besides everything that could
still be read; of a value that is no JSON any more, the bytes are under `raw` as text.

**On a live node** no command holds one LMDB snapshot for longer than half a second, nor while its output waits to be
read (`inspection`), so a paused `log | less` costs the node nothing. What that means for a listing: committed entries
are the same in every snapshot; staged ones may be cut meanwhile, which is told; a listing ends where the log ended when
it began. `state` of more values than can be read in half a second tells each time that the node has committed more
between two of them; `state --at` is always one state.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

import click
from msgspec import UNSET, Raw, Struct, UnsetType

from raftnode import past
from raftnode.about import NamespaceLine, NodeLine, namespace_line, node_line, print_namespaces, print_nodes
from raftnode.comparing import COMMANDS
from raftnode.config import DEFAULT_NAMESPACE, Settings
from raftnode.errors import ProtocolError, StoreDamaged, StoreError
from raftnode.inspection import Directory, LogReading, LogRecord, StoredValue
from raftnode.lines import (
    ENTRY_COLUMNS,
    STATE_COLUMN,
    STATE_COLUMNS,
    STATE_VALUE,
    VALUE_COLUMN,
    EntryLine,
    entry_cells,
    entry_line,
    kind_of,
    one_line,
    replace_column,
    state_of,
    value_cells,
    value_line,
    value_text,
)
from raftnode.messages import PutCommand, store_key
from raftnode.output import (
    EPILOG,
    EXIT_DAMAGED,
    EXIT_UNUSABLE,
    DamageLine,
    Inspector,
    Output,
    Printer,
    many_directories,
    one_directory,
    open_directory,
    progress,
    report_damage,
    utc,
)
from raftnode.selection import Filter, ranged, window
from raftnode.table import Column, escape, terminal_width
from raftnode.version import __version__

_FOR_EVER: Final = 2**64
_COUNTED: Final = 4096
_BETWEEN_LOOKS_MS: Final = 100
_ENTRY_FIELDS: Final = (
    "Fields: commit_id, term, time (the leader's clock, ms since 1970; in the table UTC), kind (put, delete, members, "
    "noop), namespace, key, client (who asked: the name it gave, else its address), size (bytes of the command), "
    "checksum (rolling: equal at one commit_id in two directories means equal histories up to there), state (staged or "
    "committed); value with --values; voters and learners of a members entry; damaged and reason where something is "
    "wrong: that is always shown, whatever the filters say."
)
_LIVE: Final = (
    "A live node is not held up, however slowly this is read. The listing ends where the log ended when it began. If "
    'staged entries that it has listed were cut meanwhile, a line with record "cut" tells the first (commit_id), and '
    "the listing goes on from there."
)


class CommittedLine(Struct, tag_field="record", tag="committed", kw_only=True):
    """What is committed on disk, and how many entries are staged after it."""

    commit_id: int
    staged: int


class CutLine(Struct, tag_field="record", tag="cut", kw_only=True):
    """Staged entries that were listed are no longer in the log."""

    commit_id: int


class RenewedLine(Struct, tag_field="record", tag="renewed", kw_only=True):
    """From here on the values are as of another commit_id."""

    commit_id: int | None


class ChangeLine(Struct, tag_field="record", tag="change", kw_only=True):
    """One put or delete of a key."""

    commit_id: int
    term: int
    time: int
    kind: str
    namespace: str
    key: str
    client: str | None
    state: str | None
    before: Raw | UnsetType = UNSET
    value: Raw | UnsetType = UNSET
    raw: str | UnsetType = UNSET
    replaced: int | None
    created: int | None
    version: int | None
    damaged: bool | UnsetType = UNSET
    reason: str | UnsetType = UNSET


@click.group(
    cls=Inspector, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__)
def main() -> None:
    """Read what a node has on disk: its log, its commits, its values, their past, and what it is.

    DIR is the data directory of a node, running or not, or a copy of one. Nothing is ever written to it.

    With --json every line is one object; its "record" says what it is. Fields may be added to it; none changes its
    meaning. See each command for the fields.
    """


# --- log and commits ------------------------------------------------------------------------------------------


@main.command(
    help=f"""Every kept entry of the log, staged and committed, oldest first.

    {_ENTRY_FIELDS}

    --from, --to, --tail, --term and --staged seek. The other filters look at every entry of the range.

    {_LIVE} With --follow it goes on with what the node writes, until Ctrl-C, also over a restart of the node: entries
    are listed when they are in the log, and a line with record "committed" (commit_id, staged) tells when those listed
    as staged have committed.
    """,
    epilog=EPILOG,
)
@one_directory
@ranged
@click.option("--staged", is_flag=True, help="Only entries that are not committed on disk; seeks.")
@click.option("--follow", is_flag=True, help="Go on with what is written from now on.")
def log(
    output: Output,
    directory: Path,
    as_json: bool,
    first: int | None,
    last: int | None,
    tail: int | None,
    values: bool,
    staged: bool,
    follow: bool,
    **filters: Any,
) -> None:
    wanted = _filter(filters)
    with open_directory(output, directory, as_json) as opened:
        if staged and opened.committed is None:
            raise StoreDamaged(f"{directory}: what is committed can't be told, so neither what is staged")
        begin, end = window(opened, wanted, first, last, tail, staged)
        listing = _Listing(output, opened, as_json, wanted, values, with_state=True)
        if follow:
            listing.follow(begin, _FOR_EVER if last is None else last, only_staged=staged)
        else:
            listing.print(begin, end)
    report_damage(output, directory)


@main.command(
    help=f"""The committed entries of the log, and at the end the commit_id that is committed on disk.

    A running node may have acknowledged more: what a majority has in its log is safe before its commit_id is written
    here. Fields as in `log`; the last line is {{"record": "committed", "commit_id": ..., "staged": ...}}.

    {_LIVE}
    """,
    epilog=EPILOG,
)
@one_directory
@ranged
def commits(
    output: Output,
    directory: Path,
    as_json: bool,
    first: int | None,
    last: int | None,
    tail: int | None,
    values: bool,
    **filters: Any,
) -> None:
    wanted = _filter(filters)
    with open_directory(output, directory, as_json) as opened:
        committed = opened.committed
        if committed is None:
            raise StoreDamaged(f"{directory}: what is committed can't be told; `log` lists the entries all the same")
        staged = max(0, opened.last - committed)
        upto = committed if last is None else min(last, committed)
        begin, end = window(opened, wanted, first, upto, tail, False)
        _Listing(output, opened, as_json, wanted, values, with_state=False).print(begin, end)
    if as_json:
        output.json(CommittedLine(commit_id=committed, staged=staged))
    else:
        output.text(_committed_text(committed, staged))
    report_damage(output, directory)


def _filter(options: dict[str, Any]) -> Filter:
    return Filter(**{**options, "kinds": frozenset(options["kinds"])})


def _committed_text(commit_id: int, staged: int) -> str:
    return f"committed on disk: commit_id {commit_id}; staged after it: {staged}"


class _Listing:
    """Entries of a log on their way to the output."""

    def __init__(
        self, output: Output, opened: Directory, as_json: bool, wanted: Filter, values: bool, with_state: bool
    ) -> None:
        columns = replace_column(ENTRY_COLUMNS, "commit_id", expect=len(str(opened.last)))
        columns += ([STATE_COLUMN] if with_state else []) + ([VALUE_COLUMN] if values else [])
        width = terminal_width()
        self._printer = Printer(
            output,
            as_json,
            columns,
            lambda line: entry_cells(line, width, with_state, values),
            output.style(fg="yellow"),
        )
        self._output = output
        self._opened = opened
        self._wanted = wanted
        self._values = values
        self._staged: range = range(0)
        """From the first listed entry that was staged, and is not told to have committed, to the last one."""

    def print(self, first: int, last: int | None) -> None:
        """The wanted entries of a range."""
        if self._wanted.scans:
            upto = self._opened.last if last is None else min(last, self._opened.last)
            with progress(max(1, upto - first + 1), "looking", self._output) as advance:
                self._add_all(_counted(self._opened.entries(first, last, self._cut), advance))
        else:
            self._add_all(self._opened.entries(first, last, self._cut))
        self._printer.finish()

    def follow(self, first: int, last: int, only_staged: bool) -> None:
        """The wanted entries from `first` on, and those that the node writes from now on, until `last`."""
        reading = LogReading(self._opened, first, self._cut)
        while True:
            self._add_all(reading.upto(last), only_staged)
            self._tell_committed()
            self._printer.settle()
            if reading.next > last:
                return
            self._opened.release()
            if not self._output.spool.is_wanted(_BETWEEN_LOOKS_MS):
                raise BrokenPipeError
            self._opened.look_again()

    def _add_all(self, records: Iterator[LogRecord], only_staged: bool = False) -> None:
        is_wanted, opened, values = self._wanted.test(), self._opened, self._values
        add = self._printer.add
        for record in records:
            if not is_wanted(record):
                continue
            committed = opened.committed
            if committed is None or record.commit_id > committed:
                self._staged = range(self._staged.start if self._staged else record.commit_id, record.commit_id + 1)
            elif only_staged:
                continue
            add(entry_line(record, committed, values))

    def _cut(self, commit_id: int) -> None:
        text = f"the staged entries from {commit_id} on, listed above, were cut: another leader has replaced them"
        if self._staged.stop > commit_id:
            self._printer.note(CutLine(commit_id=commit_id), text)
            self._staged = range(self._staged.start, commit_id)

    def _tell_committed(self) -> None:
        committed, staged = self._opened.committed, self._staged
        if committed is None or not staged or committed < staged.start:
            return
        left = max(0, self._opened.last - committed)
        self._printer.note(CommittedLine(commit_id=committed, staged=left), _committed_text(committed, left))
        self._staged = range(committed + 1, staged.stop)


def _counted(records: Iterator[LogRecord], advance: Callable[[int], None]) -> Iterator[LogRecord]:
    """The same records; every now and then `advance` is told how many."""
    for number, record in enumerate(records, 1):
        if not number % _COUNTED:
            advance(_COUNTED)
        yield record


# --- state ----------------------------------------------------------------------------------------------------


@main.command(
    help="""The committed values, in order of namespace and key.

    Fields: namespace, key, value, created and modified (the commit_ids that did it), version (puts since it was
    created); damaged and reason where something is wrong.

    --namespace and --prefix seek, they do not scan. With --at, the state as it was at that commit_id is rebuilt from
    the log, which takes some seconds for a million entries, and memory for each key.

    A live node is not held up: after half a second, or when the output has to wait, the listing goes on in a new
    snapshot. If the node has committed more by then, a line (renewed: commit_id) tells as of which commit_id the values
    after it are. --at is always one state.
    """,
    epilog=EPILOG,
)
@one_directory
@click.option("--namespace", metavar="NAME", help="Only of this namespace.")
@click.option("--prefix", metavar="TEXT", default="", help="Only keys that begin so.")
@click.option("--keys-only", is_flag=True, help="Leave the values out.")
@click.option("--at", type=click.IntRange(min=0), metavar="COMMIT_ID", help="As it was then, rebuilt from the log.")
def state(
    output: Output,
    directory: Path,
    as_json: bool,
    namespace: str | None,
    prefix: str,
    keys_only: bool,
    at: int | None,
) -> None:
    with open_directory(output, directory, as_json) as opened:
        printer = _value_printer(output, opened, as_json, keys_only)
        if at is None:
            opened.on_new_look = lambda: printer.note(
                RenewedLine(commit_id=opened.committed), f"the values below are as of commit_id {opened.committed}"
            )
            found = opened.values(namespace, prefix)
        else:
            past.check_at(opened, at)
            found = _past_values(opened, at, namespace, prefix, printer)
        for stored in found:
            printer.add(value_line(stored, not keys_only))
        printer.finish()
    report_damage(output, directory)


def _value_printer(output: Output, opened: Directory, as_json: bool, keys_only: bool) -> Printer:
    columns = [column for column in STATE_COLUMNS if not keys_only or column is not STATE_VALUE]
    columns = replace_column(columns, "modified", expect=len(str(opened.last)))
    width = terminal_width()
    return Printer(output, as_json, columns, lambda line: value_cells(line, width, keys_only))


def _past_values(
    opened: Directory, at: int, namespace: str | None, prefix: str, printer: Printer
) -> Iterator[StoredValue]:
    lost: list[DamageLine] = []

    def damaged(record: LogRecord) -> None:
        reason = f"what it did may be missing or wrong below: {record.damage}"
        lost.append(DamageLine(commit_id=record.commit_id, to=record.to or record.commit_id, reason=reason))

    with progress(max(1, at), "rebuilding") as advance:
        state = past.rebuild(opened, at, damaged, advance)
    for line in lost:
        printer.add(line)
    return past.values(opened, state, namespace, prefix)


# --- history --------------------------------------------------------------------------------------------------


@main.command(
    help="""Every put and delete of one key that the log has, oldest first: when, by whom, from what value to which.

    Fields: commit_id, term, time (the leader's clock, ms since 1970; in the table UTC), kind (put or delete),
    namespace, key, client (the name that it gave, else its address), state (staged or committed), before (the value
    before; not there when there was none), value (what was put; not there for a delete), replaced (the commit_id of the
    value before), created and version (after it, as in `state`). In a log that does not begin at 1, before and replaced
    are missing for the first change, and created and version are null until a delete. damaged and reason where
    something is wrong: an entry that can't be read may have been a change of the key, and is shown as one of the log.

    It looks at every entry: a million take some seconds. A live node is not held up, however slowly this is read; what
    it writes meanwhile is not listed.
    """,
    epilog=EPILOG,
)
@one_directory
@click.argument("key", metavar="KEY")
@click.option("--namespace", metavar="NAME", default=DEFAULT_NAMESPACE, show_default=True, help="The key's namespace.")
def history(output: Output, directory: Path, as_json: bool, key: str, namespace: str) -> None:
    try:
        store_key(namespace, key)
    except ProtocolError as error:
        raise click.UsageError(str(error)) from error
    width = terminal_width()
    with open_directory(output, directory, as_json) as opened:
        yellow = output.style(fg="yellow")
        printer = Printer(output, as_json, _CHANGE_COLUMNS, lambda line: _change_cells(line, width), yellow)
        with progress(max(1, opened.last - opened.first + 1), "looking", output) as advance:
            records = past.records_of_key(opened, namespace, key, advance)
            for found in past.changes(records, namespace, key, opened.first == 1):
                printer.add(_found_line(found, opened.committed))
        printer.finish()
    report_damage(output, directory)


_CHANGE_COLUMNS: Final = [
    Column("commit_id", right=True),
    Column("term", right=True, rank=3),
    Column("time", rank=1),
    Column("client", least=9, rank=2),
    Column("kind"),
    Column("state", rank=5),
    Column("version", right=True, rank=4),
    Column("before", least=12),
    Column("after", least=12),
]


def _found_line(found: past.Change | LogRecord, committed: int | None) -> ChangeLine | EntryLine | DamageLine:
    if isinstance(found, LogRecord):
        return entry_line(found, committed, values=False)
    entry, command = found.entry, found.command
    line = ChangeLine(
        commit_id=entry.commit_id,
        term=entry.term,
        time=entry.time,
        kind=kind_of(command),
        namespace=command.namespace,
        key=command.key,
        client=command.client or None,
        state=state_of(entry.commit_id, committed),
        replaced=found.replaced,
        created=found.created,
        version=found.version,
    )
    problem = found.damage
    if found.before is not None:
        line.before = one_line(found.before)[0] or UNSET
    if isinstance(command, PutCommand):
        value, wrong = one_line(command.value)
        if value is None:
            line.raw = bytes(command.value).decode(errors="backslashreplace")
        else:
            line.value = value
        problem = problem or wrong
    if problem:
        line.damaged, line.reason = True, problem
    return line


def _change_cells(line: ChangeLine | EntryLine, width: int) -> list[str]:
    before, after = (line.before, line.value) if isinstance(line, ChangeLine) else (UNSET, UNSET)
    version = line.version if isinstance(line, ChangeLine) else None
    return [
        str(line.commit_id),
        str(line.term),
        utc(line.time),
        line.client or "-",
        line.kind or "?",
        line.state or "?",
        "-" if version is None else str(version),
        value_text(before, UNSET, width),
        value_text(after, line.raw, width),
    ]


# --- info -----------------------------------------------------------------------------------------------------


@main.command(
    help="""What directories say of their nodes, and how large they are; several are shown side by side.

    Fields: directory, node, address and cluster (null until the node first started with its members), format, term,
    voted_for, commit_id (committed on disk), behind (null, or while values are on their way to the disk: after,
    namespace, key; the values from that key on are on disk as of commit_id `after`, and the log has what is newer),
    entries (kept in the log), staged, first_kept and last (the ends of the kept log: commit_id, term, time, checksum;
    null in an empty log), membership (in force: term and commit_id of its
    entry, voters, learners, by address with node id, replaces: new member to old), witnesses (what it remembers of the
    promises of the others, by address: term, vote, held and floor, the newest entry that it was known to hold and the
    newest of the committed ones), keys,
    sizes (bytes: file on disk, used by data, free to be used again, map: the most that the file may grow to), readers
    (pid, thread, txn: the snapshot that it holds), damaged and reason.

    After them a line (namespace, keys, bytes) for each namespace of each directory; for that, all keys are looked at.
    """,
    epilog=EPILOG,
)
@many_directories
def info(output: Output, directories: tuple[Path, ...], as_json: bool) -> None:
    nodes: list[NodeLine] = []
    status = 0
    for directory in directories:
        try:
            with Directory(directory, Settings().map_bytes) as opened:
                nodes.append(node_line(opened))
        except StoreError as error:
            if len(directories) == 1:
                raise
            output.complain(str(error))
            status = max(status, EXIT_DAMAGED if isinstance(error, StoreDamaged) else EXIT_UNUSABLE)
    if as_json:
        for line in nodes:
            output.json(line)
    elif nodes:
        print_nodes(output, nodes)
    damaged = [Path(line.directory) for line in nodes if line.damaged is True]
    damaged += [path for path in _print_sizes(output, nodes, as_json) if path not in damaged]
    for directory in damaged:
        output.damage = 1
        report_damage(output, directory)
    if status and not output.damage:
        click.get_current_context().exit(status)


def _print_sizes(output: Output, nodes: list[NodeLine], as_json: bool) -> list[Path]:
    """The namespaces of the directories; returns those in which they could not be counted."""
    lines: list[NamespaceLine] = []
    damaged = []
    output.spool.flush()
    with progress(max(1, sum(line.keys for line in nodes)), "counting") as advance:
        for node in nodes:
            path = Path(node.directory)
            try:
                with Directory(path, Settings().map_bytes) as opened:
                    lines += [namespace_line(path, size) for size in opened.namespaces(advance)]
            except StoreDamaged as error:
                damaged.append((path, str(error)))
    if as_json:
        for line in lines:
            output.json(line)
        for path, reason in damaged:
            output.json(DamageLine(reason=f"{path}: {reason}"))
    elif lines:
        output.text("")
        print_namespaces(output, lines, len(nodes) > 1)
    if not as_json:
        for path, reason in damaged:
            output.text((output.style(fg="red") or str)(escape(f"DAMAGED: {path}: {reason}")))
    return [path for path, _ in damaged]


for _command in COMMANDS:
    main.add_command(_command)


def _main() -> NoReturn:
    sys.exit(main())


if __name__ == "__main__":
    _main()
