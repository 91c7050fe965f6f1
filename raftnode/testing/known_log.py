"""What is known of the log of a run: from the logs that are left, from what nodes told while it ran, and from answers.

Logs end: what is left of each begins late, and nobody may have the beginning any more. But every position that anybody
has told as committed is the same entry for ever, so all sources are one log, and where two have a position they must
agree. Where none has it, the answers of clients tell most: an acknowledged write says its position, and a read says
that of the write which it found. What stays unknown can hide only writes with an open outcome that nobody has read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from msgspec import Struct

from raftnode.testing.history import Operation

Place = tuple[str, str]
"""Namespace and key."""


class LogLine(Struct):
    """A line of `raftnode-inspect log --json --values`."""

    record: str = "entry"
    commit_id: int | None = None
    term: int = 0
    kind: str | None = None
    namespace: str | None = None
    key: str | None = None
    client: str | None = None
    checksum: str = ""
    state: str | None = None
    value: Any = None
    voters: dict[str, str] | None = None
    damaged: bool = False
    reason: str = ""
    node: str = ""
    """Who told it while it ran; "" when it was read from a directory."""

    @property
    def is_write(self) -> bool:
        return self.kind in ("put", "delete")

    @property
    def content(self) -> tuple[Any, ...]:
        """What it does, and who asked."""
        return self.kind, self.namespace, self.key, self.value


class Difference(NamedTuple):
    """Two sources have not the same entry at a position."""

    position: int
    found: tuple[int, str]
    """Its term and checksum."""
    known: tuple[int, str]
    by: str
    """Who has that."""


class KnownLog:
    """All that is known of one log, by position. What several sources tell is equal, else the first one counts."""

    def __init__(self, last: int) -> None:
        """`last`: up to there it is committed, for certain; what lies behind is not looked at."""
        self.last = last
        self._lines: dict[int, LogLine] = {}
        self._marks: dict[int, tuple[int, str, str]] = {}
        self._reached: list[tuple[float, int]] = []

    def add(self, source: str, lines: Iterable[LogLine]) -> Difference | None:
        """Committed entries of one source; the first that differs from what is known, and then no more are taken."""
        for line in lines:
            assert line.commit_id is not None, "an entry has a position"
            mark = line.term, line.checksum
            term, checksum, by = self._marks.setdefault(line.commit_id, (*mark, source))
            if (term, checksum) != mark:
                return Difference(line.commit_id, mark, (term, checksum), by)
            if line.commit_id <= self.last:
                self._lines.setdefault(line.commit_id, line)
        return None

    def learn(self, history: Iterable[Operation]) -> None:
        """Fill in what the answers of clients tell."""
        operations = list(history)
        written = {o.value: o for o in operations if o.kind == "put"}
        for operation in operations:
            if operation.outcome != "ok" or operation.commit_id is None:
                continue
            if operation.kind != "get":
                self._learn(operation.commit_id, operation)
            elif operation.modified is not None and operation.value in written:
                self._learn(operation.modified, written[operation.value])
        answered = (o for o in operations if o.outcome == "ok" and o.returned is not None and o.commit_id is not None)
        self._learn_from_replaced(operations)
        upto = 0
        for operation in sorted(answered, key=lambda o: o.returned or 0.0):
            upto = max(upto, operation.commit_id or 0)
            self._reached.append((operation.returned or 0.0, upto))

    def _learn(self, position: int, write: Operation) -> None:
        if position <= self.last and position not in self._lines:
            self._lines[position] = LogLine(
                commit_id=position, kind=write.kind, namespace=write.namespace, key=write.key, client=write.client,
                value=write.value,
            )  # fmt: skip

    def _learn_from_replaced(self, operations: list[Operation]) -> None:
        """A write was told which one it has replaced: when only one put of that key can be it, it is it."""
        placed = {line.client for line in self._lines.values()}
        opens: dict[Place, list[Operation]] = defaultdict(list)
        for put in operations:
            if put.kind == "put" and put.outcome == "open" and put.client not in placed:
                opens[put.namespace, put.key].append(put)
        for write in operations:
            if write.outcome == "ok" and write.replaced is not None and write.replaced not in self._lines:
                may = [p for p in opens[write.namespace, write.key] if p.invoked < (write.returned or 0.0)]
                if len(may) == 1:
                    self._learn(write.replaced, may[0])

    def __iter__(self) -> Iterator[LogLine]:
        """What is known, in order."""
        return (self._lines[position] for position in sorted(self._lines))

    def __len__(self) -> int:
        return len(self._lines)

    def at(self, position: int) -> LogLine | None:
        return self._lines.get(position)

    @property
    def unknown(self) -> list[int]:
        """Positions of which nothing is known."""
        return [position for position in range(1, self.last + 1) if position not in self._lines]

    def hidden(self, opens: Iterable[Operation]) -> list[Operation]:
        """Which of these writes, whose positions are not known, may be in the log nevertheless: a write is not before
        what had been committed when it was asked for."""
        unknown, moments = self.unknown, [moment for moment, _ in self._reached]
        found = []
        for write in opens:
            index = bisect_right(moments, write.invoked)
            after = self._reached[index - 1][1] if index else 0
            if unknown and unknown[-1] > after:
                found.append(write)
        return found


class Value(Struct, frozen=True):
    """A committed value, as a replay makes it."""

    value: Any
    created: int
    modified: int
    version: int


class Replay:
    """What a log does to the namespaces, by rules of our own: every state that each key ever had."""

    def __init__(self, lines: Iterable[LogLine]) -> None:
        self.answers: dict[int, tuple[int | None, int | None]] = {}
        """By commit_id of a write: the version and the `replaced` that its client is told."""
        self._times: dict[Place, list[int]] = defaultdict(list)
        self._values: dict[Place, list[Value | None]] = defaultdict(list)
        for line in lines:
            if line.is_write:
                self._apply(line)

    def _apply(self, line: LogLine) -> None:
        assert line.namespace is not None and line.key is not None and line.commit_id is not None, "a write has them"  # noqa: PT018
        place, at = (line.namespace, line.key), line.commit_id
        old = self._values[place][-1] if self._values[place] else None
        replaced = None if old is None else old.modified
        new: Value | None = None
        if line.kind == "put":
            created, version = (at, 1) if old is None else (old.created, old.version + 1)
            new = Value(line.value, created, at, version)
        self.answers[at] = (None if new is None else new.version, replaced)
        self._times[place].append(at)
        self._values[place].append(new)

    def at(self, place: Place, commit_id: int) -> Value | None:
        """What a key held when everything up to `commit_id` had been applied."""
        index = bisect_right(self._times[place], commit_id) if place in self._times else 0
        return self._values[place][index - 1] if index else None

    def state(self, commit_id: int) -> dict[Place, Value]:
        """What all keys held then."""
        found = {place: self.at(place, commit_id) for place in self._times}
        return {place: value for place, value in found.items() if value is not None}
