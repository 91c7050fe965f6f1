"""What a directory's log tells of the past: the state as it was, and all that happened to one key. Layer 5.

Both read the log entry by entry and keep nothing of it but what they are asked for: for a state, some hundred bytes a
key and no values; for one key, its newest value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from msgspec import Raw, Struct

from raftnode.errors import ProtocolError, StoreForeign
from raftnode.inspection import Directory, LogRecord, StoredValue, command_of, in_json
from raftnode.messages import DeleteCommand, Entry, PutCommand, store_key
from raftnode.namespaces import Namespaces
from raftnode.records import Record
from raftnode.replay import Replay, Written

_STEP: Final = 4096


class Unknown(StoreForeign):
    """What is asked for can't be told from this directory."""


# --- the state as it was --------------------------------------------------------------------------------------


def check_at(directory: Directory, at: int) -> None:
    """Raise Unknown when the log can't tell the state as of that commit_id."""
    if directory.committed is None:
        raise Unknown(f"{directory.path}: what is committed can't be told, so no state can be rebuilt")
    if at > directory.committed:
        raise Unknown(f"{directory.path}: {at} is not committed here; the newest on disk is {directory.committed}")
    if directory.first != 1:
        raise Unknown(
            f"{directory.path}: the log begins at {directory.first}, and a state can only be rebuilt from the first "
            "entry on; without --at, `state` shows the newest"
        )


def rebuild(
    directory: Directory, at: int, damaged: Callable[[LogRecord], None], advance: Callable[[int], None]
) -> dict[bytes, Written]:
    """What the entries up to commit_id `at` make of nothing: by store key, without the values. `damaged` gets the
    records that can't be relied on; one that can still be read counts all the same."""
    replay = Replay()
    for record in directory.entries(1, at):
        problem = record.damage
        if record.entry is not None:
            try:
                replay.apply(record.entry)
            except ProtocolError as error:
                problem = problem or f"entry {record.commit_id}: {error}"
        if problem:
            damaged(LogRecord(record.commit_id, None, problem, record.to))
        if not record.commit_id % _STEP:
            advance(_STEP)
    return replay.state


def values(
    directory: Directory, state: dict[bytes, Written], namespace: str | None, prefix: str
) -> Iterator[StoredValue]:
    """The values of a rebuilt state, each read from the entry that wrote it, in order of namespace and key."""
    for key in sorted(state):
        place, _, name = key.decode(errors="backslashreplace").partition("\0")
        if namespace in (None, place) and name.startswith(prefix):
            record, problem = _record_of(directory, state[key])
            yield StoredValue(place, name, record, problem)


def _record_of(directory: Directory, written: Written) -> tuple[Record | None, str]:
    """The value, and what is wrong with the entry that wrote it."""
    found = next(directory.entries(written.modified, written.modified))
    command = None if found.entry is None else command_of(found.entry)[0]
    if not isinstance(command, PutCommand):
        return None, f"the entry that wrote it can't be read any more: {found.damage}"
    return Record(written.created, written.modified, written.version, 0, command.value), found.damage


# --- what happened to one key ---------------------------------------------------------------------------------


def records_of_key(
    directory: Directory, namespace: str, key: str, advance: Callable[[int], None] = lambda _: None
) -> Iterator[LogRecord]:
    """All records that may be about a key, and those that can't be read. Staged ones are handed out at the end, when
    all are there: those that were cut meanwhile are not among them."""
    needles = (in_json(namespace), in_json(key))
    committed = directory.committed or 0
    staged: list[LogRecord] = []

    def forget(commit_id: int) -> None:
        staged[:] = [record for record in staged if record.commit_id < commit_id]

    for number, record in enumerate(directory.entries(on_cut=forget), 1):
        if not number % _STEP:
            advance(_STEP)
        if record.entry is not None and not record.damage:
            text = bytes(record.entry.command)
            if not all(needle in text for needle in needles):
                continue
        if record.commit_id <= committed:
            yield record
        else:
            staged.append(record)
    yield from staged


class Change(Struct, frozen=True):
    """One put or delete of a key, and what was there before. A number is None when there is none, or when the kept log,
    which begins later, does not tell it."""

    entry: Entry
    command: PutCommand | DeleteCommand
    before: Raw | None
    """The value before."""
    replaced: int | None
    """commit_id of the put that wrote it."""
    created: int | None
    version: int | None
    damage: str


def changes(records: Iterable[LogRecord], namespace: str, key: str, from_start: bool) -> Iterator[Change | LogRecord]:
    """Every put and delete of a key among these records of a log, carried out; records whose command can't be read come
    as they are, as it may have been one. `from_start`: the records begin with the first entry there ever was."""
    full = store_key(namespace, key)
    namespaces = Namespaces()
    current: Record | None = None
    known = from_start
    for record in records:
        entry = record.entry
        command = None if entry is None else command_of(entry)[0]
        if entry is None or command is None:
            yield record
        elif isinstance(command, PutCommand | DeleteCommand) and (command.namespace, command.key) == (namespace, key):
            before, found = current, {} if current is None else {full: current}
            outcome = namespaces.apply(entry, found.get)
            current = namespaces.changes.pop(full, None)
            yield Change(
                entry,
                command,
                None if before is None else before.value,
                outcome.replaced,
                current.created if current is not None and known else None,
                outcome.version if current is not None and known else None,
                record.damage,
            )
            known = known or current is None
