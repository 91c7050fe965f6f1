"""What one directory holds, for a comparison with others: a `Survey`. Layer 5. Nothing is printed.

A survey reads the whole log once, each entry checked, and keeps of it the term and the rolling checksum of every
position: some megabytes for a million entries, however large they are. Equal (term, checksum) at one position in two
logs mean equal histories up to there, as far as CRC-32 tells histories apart; so two surveys tell by halving where
their logs part.

Each directory is surveyed in a process of its own: a page that kills its reader (see `supervised`) costs the survey of
that directory, not of the others.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import resource
import signal
import struct
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

import msgspec
from msgspec import Struct

from raftnode.consensus.journal import Mark
from raftnode.errors import StoreDamaged, StoreError
from raftnode.inspection import Directory, Facts, LogRecord
from raftnode.messages import GENESIS, Entry, EntryId

_STEP: Final = 2000
_frame = struct.Struct("=BQ")
_PROGRESS, _RESULT, _BROKEN = 0, 1, 2

Advance = Callable[[int], object]


class EntryMark(Struct, frozen=True):
    """What identifies an entry and all before it."""

    term: int
    checksum: int


class Marks(Protocol):
    """A log, as far as comparing needs it."""

    first: int
    last: int

    def mark(self, commit_id: int) -> EntryMark | None:
        """Of one position between `first` and `last`, or right before `first`; None when it is damaged or unknown."""
        ...


class Damage(Struct, frozen=True):
    """Positions of a log at which something is wrong."""

    first: int
    last: int
    reason: str


class Tally(Protocol):
    """Something else that is made of the entries on the way, `chronology` say."""

    def add(self, entry: Entry) -> None: ...


class Survey(Struct, kw_only=True):
    """One directory. With a `failure` nothing could be read, or the reading came to a sudden end, and there are no
    `facts`; all else is empty then."""

    path: Path
    failure: str = ""
    is_damaged: bool = False
    """With a `failure`: the directory is one of ours, and damaged."""
    facts: Facts | None = None
    first: int = 1
    last: int = 0
    damage: list[Damage] = []
    tally: Any = None
    _starts: list[int] = []
    _terms: list[int] = []
    _checksums: array[int] = msgspec.field(default_factory=lambda: array("I"))
    """Of each position from `first` on; 0 where there is nothing."""

    @property
    def is_readable(self) -> bool:
        return self.facts is not None

    @property
    def is_whole(self) -> bool:
        """True when every fact and every entry is as it was written."""
        return self.facts is not None and not self.facts.damage and not self.damage

    @property
    def known(self) -> Facts:
        """The facts of a directory that is readable."""
        assert self.facts is not None, "who asks has looked whether it is readable"
        return self.facts

    @property
    def committed(self) -> int:
        """The commit_id on disk, as far as the log goes; 0 when it can't be told."""
        return min(self.known.commit_id or 0, self.last)

    @property
    def base(self) -> Mark:
        """The point before the first kept entry."""
        return self.known.base or Mark(GENESIS, 0)

    @property
    def newest(self) -> EntryId:
        """The last entry that can be read; what elections compare."""
        for commit_id in range(self.last, self.first - 1, -1):
            if (mark := self.mark(commit_id)) is not None:
                return EntryId(mark.term, commit_id)
        return self.base.id

    def mark(self, commit_id: int) -> EntryMark | None:
        """The mark of a position, or of the base; None outside the log, and where it is damaged."""
        if not self.first <= commit_id <= self.last:
            base = self.base
            return EntryMark(base.id.term, base.checksum) if commit_id == base.id.commit_id > 0 else None
        if self.is_bad(commit_id):
            return None
        run = bisect_right(self._starts, commit_id) - 1
        assert run >= 0, "what is not damaged was read"
        return EntryMark(self._terms[run], self._checksums[commit_id - self.first])

    def is_bad(self, commit_id: int) -> bool:
        """True where the log is damaged."""
        at = bisect_right(self.damage, commit_id, key=lambda damage: damage.first) - 1
        return at >= 0 and self.damage[at].last >= commit_id

    def holds(self, id: EntryId) -> bool:
        """True when this log has that entry, and so every entry before it."""
        if id.commit_id <= self.base.id.commit_id:
            return True
        mark = self.mark(id.commit_id)
        return mark is not None and mark.term == id.term

    @property
    def _next(self) -> int:
        """Where the reading goes on."""
        read = self.first + len(self._checksums)
        return max(read, self.damage[-1].last + 1) if self.damage else read

    def _take(self, record: LogRecord) -> None:
        """The next record of the log."""
        if record.commit_id > self._next:  # what comes between was deleted while this was read
            self.first = record.commit_id
            self.damage, self._starts, self._terms, self._checksums = [], [], [], array("I")
        if record.damage:
            self.damage.append(Damage(record.commit_id, record.to or record.commit_id, record.damage))
        entry = record.entry
        if entry is None or record.damage:
            return
        if not self._terms or self._terms[-1] != entry.term:
            self._starts.append(entry.commit_id)
            self._terms.append(entry.term)
        missing = entry.commit_id - self.first - len(self._checksums)
        self._checksums.extend([0] * missing)
        self._checksums.append(entry.checksum)
        if self.tally is not None:
            self.tally.add(entry)


def survey(path: Path, map_bytes: int, advance: Advance, tally: Tally | None = None) -> Survey:
    """Read one directory, in this process. What can't be opened makes a survey too, with a `failure`."""
    found = Survey(path=path, tally=tally)
    try:
        with Directory(path, map_bytes) as opened:
            found.first = opened.first
            _read(found, opened.entries(opened.first, opened.facts.commit_id or 0), advance)
        with Directory(path, map_bytes) as opened:  # the rest may change: this look tells how all hangs together
            opened.hold_s = math.inf
            found.facts = opened.facts
            _read(found, opened.entries(found._next), advance)
            found.last = opened.last
    except StoreError as error:
        return Survey(path=path, failure=str(error), is_damaged=isinstance(error, StoreDamaged))
    return found


def _read(found: Survey, log: Iterator[LogRecord], advance: Advance) -> None:
    steps = 0
    for record in log:
        found._take(record)
        steps += 1
        if steps == _STEP:
            advance(steps)
            steps = 0
    advance(steps)


# --- in a process of its own ----------------------------------------------------------------------------------


class SurveyApart:
    """`survey` in a child process: what ends that becomes a `failure`. No thread may run. Public facts: `path`, and
    `length`, how many entries will be read."""

    def __init__(self, path: Path, map_bytes: int, tally: Tally | None = None) -> None:
        self.path = path
        reader, writer = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            os.close(reader)
            with os.fdopen(writer, "wb") as out:
                _work(out, path, map_bytes, tally)
            os._exit(0)
        os.close(writer)
        self._answers = os.fdopen(reader, "rb")
        self.length = 0
        head = self._answers.read(_frame.size)
        if len(head) == _frame.size:
            self.length = _frame.unpack(head)[1]

    def result(self, advance: Advance) -> Survey:
        """What the child has found; `advance` is told how many entries it has read since the last call."""
        with self._answers:
            found = _await(self._answers, advance)
        _, status = os.waitpid(self._child, 0)
        code = os.waitstatus_to_exitcode(status)
        if found is not None and code == 0:
            return found
        what = signal.Signals(-code).name if code < 0 else f"status {code}"
        return Survey(
            path=self.path,
            failure=f"{self.path} is damaged: reading one of its pages ended the reader ({what})",
            is_damaged=True,
        )


def _work(out: BinaryIO, path: Path, map_bytes: int, tally: Tally | None) -> None:
    """The child."""
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))

        def advance(steps: int) -> None:
            out.write(_frame.pack(_PROGRESS, steps))
            out.flush()

        advance(_length(path, map_bytes))
        data = pickle.dumps(survey(path, map_bytes, advance, tally))
        out.write(_frame.pack(_RESULT, len(data)))
        out.write(data)
        out.flush()
    except Exception as error:
        words = f"{type(error).__name__}: {error}".encode()
        out.write(_frame.pack(_BROKEN, len(words)) + words)
        out.flush()
    except BaseException:
        os._exit(1)


def _length(path: Path, map_bytes: int) -> int:
    """How many entries there are to read; 0 when that can't be told, and the survey says why."""
    with contextlib.suppress(StoreError), Directory(path, map_bytes) as opened:
        return opened.kept
    return 0


def _await(answers: BinaryIO, advance: Advance) -> Survey | None:
    """What the child says; None when it ended without a result."""
    while len(head := answers.read(_frame.size)) == _frame.size:
        kind, number = _frame.unpack(head)
        if kind == _PROGRESS:
            advance(number)
            continue
        data = answers.read(number)
        if kind == _BROKEN:
            raise RuntimeError(data.decode(errors="replace"))
        return pickle.loads(data) if len(data) == number else None
    return None
