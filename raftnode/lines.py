"""The lines of raftnode-inspect about entries and values: as objects for --json, and as cells of a table. Layer 5.

Their fields are a published interface, documented in `inspector`.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from raftnode.inspection import LogRecord, StoredValue, command_of, salvage_command
from raftnode.messages import AnyCommand, DeleteCommand, Entry, MembersCommand, Noop, PutCommand
from raftnode.output import DamageLine, utc
from raftnode.table import Column


class EntryLine(Struct, tag_field="record", tag="entry", kw_only=True, gc=False):
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


# --- entries --------------------------------------------------------------------------------------------------

ENTRY_COLUMNS: Final = [
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
STATE_COLUMN: Final = Column("state")
VALUE_COLUMN: Final = Column("value", least=16)


def entry_line(record: LogRecord, committed: int | None, values: bool) -> EntryLine | DamageLine:
    """An entry as it was read; `committed` is the commit_id on disk."""
    entry = record.entry
    if entry is None:
        return DamageLine(commit_id=record.commit_id, to=record.to, reason=record.damage)
    line = EntryLine(
        commit_id=entry.commit_id,
        term=entry.term,
        time=entry.time,
        size=entry.size,
        checksum=f"{entry.checksum:08x}",
        state=None if committed is None else "committed" if record.commit_id <= committed else "staged",
    )
    problem = _add_command(line, entry, values)
    if record.damage or problem:
        line.damaged, line.reason = True, record.damage or f"entry {entry.commit_id}: {problem}"
    return line


def state_of(commit_id: int, committed: int | None) -> str | None:
    """Whether an entry is committed or staged; None when that can't be told."""
    return None if committed is None else "committed" if commit_id <= committed else "staged"


def _add_command(line: EntryLine, entry: Entry, values: bool) -> str | None:
    """Fill in what the command says; returns what is wrong with it."""
    command, problem = command_of(entry)
    if command is None:
        line.kind, line.namespace, line.key = salvage_command(bytes(entry.command))
        if values:
            line.raw = bytes(entry.command).decode(errors="backslashreplace")
        return problem
    line.kind = _KIND_OF[type(command)]
    if isinstance(command, _CHANGES):
        line.namespace, line.key, line.client = command.namespace, command.key, command.client or None
        return add_value(line, command.value) if values and isinstance(command, PutCommand) else None
    if isinstance(command, MembersCommand):
        line.voters, line.learners = command.voters, command.learners
    return None


_CHANGES: Final = (PutCommand, DeleteCommand)
_KIND_OF: Final[dict[type, str]] = {
    kind: str(kind.__struct_config__.tag) for kind in (PutCommand, DeleteCommand, MembersCommand, Noop)
}
KINDS: Final = tuple(_KIND_OF.values())


def kind_of(command: AnyCommand) -> str:
    """What the log calls this kind of command."""
    return _KIND_OF[type(command)]


def add_value(line: EntryLine | ValueLine, value: Raw) -> str | None:
    """Fill in a value; its bytes when it is no JSON any more. Returns what is wrong with it."""
    found, problem = one_line(value)
    if found is None:
        line.raw = bytes(value).decode(errors="backslashreplace")
        return problem
    line.value = found
    return None


def one_line(value: Raw) -> tuple[Raw | None, str]:
    """A value as JSON on one line, its numbers as they were written; or why it is no JSON."""
    try:
        msgspec.json.decode(value)
    except (ValueError, RecursionError) as error:
        return None, f"its value is no JSON: {error}"
    text = bytes(value)
    return (Raw(msgspec.json.format(text, indent=-1)) if b"\n" in text or b"\r" in text else value), ""


def entry_cells(line: EntryLine, width: int, with_state: bool, values: bool) -> list[str]:
    """An entry as a row of the table, under ENTRY_COLUMNS and those asked for."""
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
        cells.append(_members_text(line) or value_text(line.value, line.raw, width))
    return cells


def _members_text(line: EntryLine) -> str:
    learners = line.learners or {}
    return ", ".join([*(line.voters or {}), *(f"{address} (learner)" for address in learners)])


def value_text(value: Raw | UnsetType | None, raw: str | UnsetType, width: int) -> str:
    """As much of a value as a line of the table can hold: it may have megabytes."""
    if isinstance(raw, str):
        return raw[: width + 1]
    if not isinstance(value, Raw):
        return "-"
    return bytes(memoryview(value)[: 4 * width + 4]).decode(errors="ignore")


# --- values ---------------------------------------------------------------------------------------------------

STATE_VALUE: Final = Column("value", least=16)
STATE_COLUMNS: Final = [
    Column("namespace", least=9),
    Column("key", least=16),
    Column("created", right=True, rank=1),
    Column("modified", right=True),
    Column("version", right=True),
    STATE_VALUE,
]


def value_line(found: StoredValue, values: bool) -> ValueLine | DamageLine:
    """A committed value as it was read."""
    record = found.record
    if record is None or found.namespace is None or found.key is None:
        return DamageLine(namespace=found.namespace, key=found.key, reason=found.damage)
    line = ValueLine(
        namespace=found.namespace,
        key=found.key,
        created=record.created,
        modified=record.modified,
        version=record.version,
    )
    problem = add_value(line, record.value) if values else None
    if found.damage or problem:
        line.damaged, line.reason = True, found.damage or f"{found.key!r} in {found.namespace!r}: {problem}"
    return line


def value_cells(line: ValueLine, width: int, keys_only: bool) -> list[str]:
    """A value as a row of the table, under STATE_COLUMNS."""
    cells = [line.namespace, line.key, str(line.created), str(line.modified), str(line.version)]
    return cells if keys_only else [*cells, value_text(line.value, line.raw, width)]


def replace_column(columns: list[Column], title: str, **facts: Any) -> list[Column]:
    """The columns, with one of them changed."""
    return [msgspec.structs.replace(column, **facts) if column.title == title else column for column in columns]
