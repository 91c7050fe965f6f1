"""Reading a data directory from outside: every record with the result of its check. Layer 5.

A `Directory` looks at a live node's data or a dead one's through LMDB's read transactions, and nothing is ever written.
It differs from the store in what it does about damage: the store stops at the first record that does not match
its checksum, this goes on, tells what is wrong, and reads what can still be read. So damage is a text beside a record
here, and an error only when nothing at all can be read.

How it gets past damage:

* the log is looked up position by position, so neither a hole, nor a key that was changed, nor a page that LMDB can't
  read hides the entries after it;
* the checksum of an entry is seeded with the entry before. After a damaged one there are two candidates for the seed,
  the checksum that is stored and the one computed from what is there; if the next entry fits either, it is sound, and
  the damage is exactly one entry;
* a committed value that does not match its checksum is read as if it did, and marked.

While a flush is under way the values on disk are of two times (`namespaces`). All that is told of them here is as of
the commit_id on disk: an `Overlay` of the entries that are not in place yet lies over them. It is made when values are
asked for, from the look that they come from.

The newest entries of the log may be in the `tail` only, a file beside LMDB's. It is read with each look, and what it
holds is part of the log here as if LMDB had it; what is lost of it is damage of these entries. A live node takes it
over in a transaction, and only then overwrites it: so a look that is still LMDB's newest after the file was read fits
it, and any other is taken anew. The newer one's log has all that was in the tail before; so after some tries LMDB alone
will do, as nothing is missing that was there when the first look began, and `last` never falls.

An open read transaction holds back the reuse of pages on a live node: its file grows as long as somebody reads and the
node writes. So no *look*, which is one transaction and one consistent snapshot, is held for longer than half a second,
nor while the output waits for whoever reads it (`release`); the next read takes a new look. What is committed in the
log is the same in each; staged entries may have been cut meanwhile, which a `LogReading` notices; values may have
changed, which `on_new_look` tells.
"""

from __future__ import annotations

import contextlib
import math
import re
import struct
import time
from array import array
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

import lmdb
import msgspec
from msgspec import Struct
from zlib_ng.zlib_ng import crc32

from raftnode import records, tail
from raftnode.consensus.ballot import Ballot
from raftnode.consensus.journal import Mark
from raftnode.consensus.membership import Membership
from raftnode.consensus.witness import Witness
from raftnode.environment import explain_open_error, open_databases, open_reader
from raftnode.errors import ProtocolError, StoreDamaged, StoreError, StoreFailed, StoreForeign, StoreTooNew
from raftnode.messages import (
    GENESIS,
    LMDB_KEY_BYTES,
    AnyCommand,
    Change,
    Effect,
    Entry,
    chain,
    decode_command,
    decode_effect,
)
from raftnode.namespaces import Behind
from raftnode.overlay import Below, Overlay, carry_out

_T = TypeVar("_T")

_NOTHING: Final = Overlay(None, None, {}, {}, ())
HOLD_S: Final = 0.5
"""How long a look is held at the most. A node under full load writes some 10 MB meanwhile."""
_BETWEEN_CLOCKS: Final = 0xFF
"""The clock is looked at once in so many positions or values, and one."""
_LARGE: Final = 1 << 16
"""After an entry of so many bytes the clock is looked at, too."""
_COUNTED_AT_ONCE: Final = 50_000
_META_PAGES: Final = 2
_MOST_TAILS: Final = 20
"""So often a look is taken anew when a node has taken the tail over while it was read."""
_SURE: Final = 3
"""Damage of the tail is believed when it was met so many times in a row: a record that is just being written may look
damaged to who reads it."""
_BETWEEN_TAILS_S: Final = 0.01
_MOST_SEEDS: Final = 3
_MOST_BAD_PLACES: Final = 50
"""Each costs some milliseconds to get past."""
_COMMAND_START = re.compile(
    rb'\{"kind":("[a-z_]+")(?:,"namespace":("(?:[^"\\]|\\.)*"))?(?:,"key":("(?:[^"\\]|\\.)*"))?', re.DOTALL
)
"""How `encode_command` begins the command of a put or a delete: what can be told of one whose rest is damaged."""


class Facts(Struct, frozen=True, kw_only=True):
    """What the directory says of its node. A fact is None when its record is damaged, or when there is none yet."""

    format: int | None
    node: str | None
    cluster: str | None
    """None until the node was founded, as `address` and the memberships."""
    address: str | None
    ballot: Ballot | None
    commit_id: int | None
    """Committed on disk; 0 before the first commit. None only when damaged."""
    behind: Behind | None
    """How far the values on disk are behind commit_id; None, too, when they are not."""
    base: Mark | None
    """The point before the first kept entry. None only when damaged."""
    memberships: list[Membership]
    """The newest committed one, and the staged ones after it; the last is in force."""
    witnesses: dict[str, Witness]
    """What this node remembers of the promises of the others, by address."""
    damage: list[str]


class LogRecord(Struct, frozen=True):
    """A place in the log, and what the check said of it. Invariant: without an `entry` there is `damage`."""

    commit_id: int
    entry: Entry | None
    damage: str = ""
    """What is wrong, in words; "" when the entry matches its checksum."""
    to: int | None = None
    """Without an entry: the last of the positions that are lost."""


class StoredValue(Struct, frozen=True):
    """A committed value as of the commit_id on disk, and what the check said of it. Invariant: without a `record` there
    is `damage`."""

    namespace: str | None
    """None when not even the key can be read."""
    key: str | None
    record: records.Record | None
    damage: str = ""
    is_gone: bool = False
    """The log has deleted it, and what is damaged is only what the disk still has of it."""


class Reader(Struct, frozen=True):
    """A slot in LMDB's table of readers."""

    pid: int
    thread: str
    transaction: int | None
    """The snapshot that it holds; None while it holds none."""


class NamespaceSize(Struct, frozen=True):
    """What a namespace holds."""

    namespace: str
    keys: int
    bytes: int
    """Of its keys, and of its values as they are stored."""


class Directory:
    """An open data directory, for reading. A context manager; `close` ends it.

    Public facts: `path`; `facts`, as of the first look; as of the newest one `committed` (the commit_id on disk),
    `behind` (how far the values on disk are behind it), `base` (the point before the first kept entry; None when it is
    damaged), `first` and `last` (the ends of the log; `last` is below `first` in an empty one), `tail_damage` (what is
    wrong with its tail, in words); `looks`, which counts them.
    """

    def __init__(self, path: Path, map_bytes: int) -> None:
        """Raises StoreForeign, StoreTooNew, StoreDamaged or StoreFailed, each saying what to do."""
        self.path = path
        self.looks = 0
        self.on_new_look: Callable[[], None] | None = None
        """Called when a new look sees more committed than the one before."""
        self.hold_s = HOLD_S
        """How long a look may be held. Who needs one look for all raises it, and reads little or not for long."""
        self.as_on_disk = False
        """Show the values as they are on disk, of two times while a flush is under way. For who checks these."""
        self._map_bytes = map_bytes
        self._held: lmdb.Transaction | None = None
        self._tail_fact = tail.TailFact()
        self._is_tail_lost = False
        self._seen: int | None = None
        """The newest transaction of which all was read that is kept here; None while it is opened."""
        self._open_env()

    def _open_env(self) -> None:
        path = self.path
        self._file = _identity(path)
        self._env = _open(path, self._map_bytes)
        try:
            self._dbs = self._open_databases()
            self._state = records.COMMITTED
            self._overlay = _NOTHING
            self._read_look(self._read_first)
        except lmdb.Error as error:
            self._env.close()
            raise explain_open_error(path, error) from error
        except BaseException:
            self._env.close()
            raise

    def __enter__(self) -> Directory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the look. May be called twice."""
        self.release()
        self._env.close()

    # --- looks ---

    def release(self) -> None:
        """End the look; the next read takes a new one."""
        if self._held is not None:
            self._held.abort()
            self._held = None
            self.looks += 1

    def release_if_long(self) -> None:
        """End the look if it has been held for long."""
        if self._held is not None and time.monotonic() - self._since > self.hold_s:
            self.release()

    @property
    def _txn(self) -> lmdb.Transaction:
        """The look: the one that is held, or a new one."""
        if self._held is None:
            held = self._begin()
            if self._seen is None:  # it is being opened
                return held
            committed = self.committed
            self._read_look(self._take_news)
            if self.on_new_look is not None and self.committed != committed:
                self.on_new_look()
            return self._txn
        return self._held

    def _begin(self) -> lmdb.Transaction:
        held = self._held = self._env.begin(buffers=True)  # a value that is only counted is not read
        self._since = time.monotonic()
        self._log = held.cursor(self._dbs[records.LOG])
        return held

    def _read_look(self, read: Callable[[], object]) -> None:
        """Let `read` take in what a new look has in LMDB, and then look at the tail: until the two fit each other, or
        for the last time without the tail. What was in it when the first look began is in LMDB then."""
        for tries_left in range(_MOST_TAILS, -1, -1):
            read()
            if not tries_left or self._look_at_tail():
                return

    def _read_first(self) -> None:
        """All that is kept of a look, read for the first time."""
        self._seen = None
        self.facts = self._read_facts()
        self.base = self.facts.base
        self.behind = self.facts.behind
        self.committed = self.facts.commit_id
        self.first, self._end = self._ends()
        self._keep_tail(tail.NOTHING)
        self._seen = self._txn.id()

    def _take_news(self) -> None:
        """What has changed since the look before."""
        txn = self._txn
        if self._seen == txn.id():
            return
        self._seen = txn.id()
        self._take_tail_fact(None)
        self._keep_tail(tail.NOTHING)  # it goes with the look before
        meta = self._dbs[records.META]
        names = (b"commit_id", b"base", b"behind", b"tail")
        stored, base, behind, tail_fact = (txn.get(name, db=meta) for name in names)
        with contextlib.suppress(StoreDamaged):  # then it stays at what was read before
            if stored is not None and self.committed is not None:
                self.committed = records.unpack_meta(b"commit_id", bytes(stored), int)
            if base is not None and self.base is not None:
                self.base = records.unpack_meta(b"base", bytes(base), Mark)
            self._state = self._state_in(txn)
        self._take_behind(None if behind is None else bytes(behind))
        self._take_tail_fact(None if tail_fact is None else bytes(tail_fact))
        self.first, self._end = self._ends()
        self.last = self._end

    def _take_behind(self, stored: bytes | None) -> None:
        """How far the values are behind in a new look. That of another look would be wrong."""
        self.behind, self._is_behind_lost = None, False
        try:
            if stored is not None:
                self.behind = records.unpack_meta(b"behind", stored, Behind | None)
        except StoreDamaged:
            self._is_behind_lost = True

    def _take_tail_fact(self, stored: bytes | None) -> None:
        """What a new look says of the tail. That of another look would be wrong."""
        self._tail_fact, self._is_tail_lost = tail.TailFact(), False
        try:
            if stored is not None:
                self._tail_fact = records.unpack_meta(b"tail", stored, tail.TailFact)
        except StoreDamaged:
            self._is_tail_lost = True

    def _look_at_tail(self) -> bool:
        """Take in what the tail holds beside the look. False when a node has written to LMDB meanwhile, and so may have
        taken the tail over and begun to overwrite it: the look is a newer one then, of which nothing was read yet."""
        if not self._tail_fact.bytes and not self._is_tail_lost:
            return True
        before: tuple[str, ...] = ()
        times = 0
        for _ in range(_MOST_TAILS):
            found = self._read_tail()
            if not self._is_still_newest():
                return False
            if not _is_same_file(self._file, _identity(self.path)):
                return True  # this may be the tail of the other data file: what was read before is all that is sure
            times = times + 1 if found.damage == before else 1
            if not found.damage or found == self._tail or times == _SURE:
                break
            before = found.damage
            time.sleep(_BETWEEN_TAILS_S)
        self._keep_tail(found)
        return True

    def _read_tail(self) -> tail.Found:
        """What the tail holds; when nothing can be read of it, a position is lost, at least."""
        lost = f"entry {self._end + 1} and later ones"
        if self._is_tail_lost:
            text = f"the record 'tail' of the node is damaged or missing: {records.TAIL_FILE} may hold {lost}"
            return tail.Found({self._end + 1: b""}, (text,))
        try:
            found = tail.look(self.path, self._tail_fact, self._end)
            if found.damage:
                first = next((commit_id for commit_id, record in found.records.items() if record), 0)
                if first > self._end + 1 and self._is_in_lmdb(first - 1):  # there is a hole, but not in the tail
                    found = tail.look(self.path, self._tail_fact, first - 1)
        except OSError as error:
            text = f"{records.TAIL_FILE} can't be read: {error.strerror or error}: it may hold {lost}"
            return tail.Found({self._end + 1: b""}, (text,))
        return found

    def _is_in_lmdb(self, commit_id: int) -> bool:
        """False, too, when it can't be told."""
        held = self._held or self._begin()
        try:
            return held.get(records.log_key(commit_id), db=self._dbs[records.LOG]) is not None
        except lmdb.Error:
            held.abort()
            self._begin()
            return False

    def _is_still_newest(self) -> bool:
        """True when no transaction has come since what is kept here was read: the look is as it was then. Else it is a
        newer one. LMDB's own figure won't do: it tells of a transaction that no reader sees yet, while that is synced.
        """
        if self._held is not None:
            self._held.abort()
        return self._begin().id() == self._seen

    def _keep_tail(self, found: tail.Found) -> None:
        self._tail, self._tail_problems = found, _problems_of(found)
        self.tail_damage = found.damage
        self.last = max(self._end, next(reversed(found.records), 0))

    def look_again(self) -> None:
        """A new look, also when the file was replaced by another one, or a node has started on a copy that had none.

        Raises StoreForeign when the directory now holds another node, and what the constructor raises."""
        self.release()
        if _identity(self.path) == self._file:
            return
        node = self.facts.node
        self._env.close()
        self._seen = None
        self._open_env()
        if self.facts.node != node:
            raise StoreForeign(f"{self.path} now holds node {self.facts.node}; it was node {node}")

    # --- opening ---

    def _open_databases(self) -> dict[bytes, lmdb._Database]:
        try:
            return open_databases(self._env, may_create=False)
        except lmdb.NotFoundError as error:
            raise self._empty() from error
        except lmdb.IncompatibleError as error:
            raise StoreForeign(
                f"{self.path / records.DATA_FILE} is an LMDB file of another program: give the data directory of a node"
            ) from error

    def _empty(self) -> StoreForeign:
        return StoreForeign(f"{self.path} holds no node yet: its first start was not finished")

    def _read_facts(self) -> Facts:
        damage: list[str] = []
        lost: set[bytes] = set()

        def fact(name: bytes, type: Any, missing: object = None) -> Any:
            try:
                stored = self._txn.get(name, db=self._dbs[records.META])
                return missing if stored is None else records.unpack_meta(name, bytes(stored), type)
            except StoreDamaged as error:
                damage.append(str(error))
            except lmdb.Error as error:
                damage.append(f"the record {name.decode()!r} of the node can't be read: {error}")
                self.release()
            lost.add(name)
            return None

        format_version = fact(b"format", int)
        self._check_format(format_version, damage)
        try:
            self._state = self._state_in(self._txn)
        except StoreDamaged as error:
            damage.append(str(error))
            self._state = max(records.STATES, key=lambda name: self._count(name) if name in self._dbs else -1)
        facts = Facts(
            format=format_version,
            node=fact(b"node", str),
            cluster=fact(b"cluster", str),
            address=fact(b"address", str),
            ballot=fact(b"ballot", Ballot, Ballot()),
            commit_id=fact(b"commit_id", int, 0),
            behind=fact(b"behind", Behind | None),
            base=fact(b"base", Mark, Mark(GENESIS, 0)),
            memberships=fact(b"memberships", list[Membership], []) or [],
            witnesses=fact(b"witnesses", dict[str, Witness], {}) or {},
            damage=damage,
        )
        tail_fact = fact(b"tail", tail.TailFact)
        if tail_fact is None and b"tail" not in lost and facts.cluster and (facts.format or 0) >= tail.SINCE_FORMAT:
            damage.append("the record 'tail' of the node is missing")
            lost.add(b"tail")
        self._tail_fact = tail_fact or tail.TailFact()
        self._is_behind_lost, self._is_tail_lost = b"behind" in lost, b"tail" in lost
        return facts

    def _check_format(self, found: int | None, damage: list[str]) -> None:
        """Nothing but the record of the format may be read of a newer directory: all else may mean something else."""
        if found is not None and found > records.FORMAT:
            raise StoreTooNew(
                f"{self.path} was written in format {found}; this raftnode reads up to {records.FORMAT}: inspect it "
                "with the newer raftnode"
            )
        if found is None and not damage:
            if not any(self._count(name) for name in self._dbs):
                raise self._empty()
            damage.append("the record 'format' of the node is missing")

    def _ends(self) -> tuple[int, int]:
        """The first and last commit_id that should be in LMDB: counted, as any single key may be damaged."""
        base, committed = self.base, self.committed or 0
        if base is not None:
            return base.id.commit_id + 1, max(base.id.commit_id + self._count(records.LOG), committed)
        first = self._position_from(b"")
        if first is None:
            return 1, 0
        return first, max(first - 1 + self._count(records.LOG), committed)

    def _state_in(self, txn: lmdb.Transaction) -> bytes:
        """Which database is the state. Raises StoreDamaged."""
        stored = txn.get(records.STATE_FACT, db=self._dbs[records.META])
        return records.state_named(None if stored is None else bytes(stored))

    def _guarded(self, read: Callable[[], _T]) -> _T:
        """Do one read; when it meets a page that LMDB can't read, raise StoreDamaged and leave a usable transaction."""
        try:
            return read()
        except lmdb.Error as error:
            self.release()
            raise StoreDamaged(str(error)) from error

    # --- the log ---

    def entries(
        self, first: int = 1, last: int | None = None, on_cut: Callable[[int], None] | None = None
    ) -> Iterator[LogRecord]:
        """The kept entries from `first` to `last` (default: all that there are now), in order, each checked. Seeks to
        `first`, keeps nothing: a million entries need no more memory than ten. For `on_cut` see LogReading."""
        yield from LogReading(self, first, on_cut).upto(self.last if last is None else last)
        yield from self._strays(last)

    def position_of_term(self, term: int) -> int | None:
        """The first position with this term or a later one, found by halving, as terms never fall along a log; `last`
        + 1 if there is none. None when damage is met, and only a scan can tell."""
        low, high = self.first, self.last + 1
        while low < high:
            middle = (low + high) // 2
            record = next(LogReading(self, middle).upto(middle), None)
            if record is None or record.entry is None or record.damage:
                return None
            low, high = (low, middle) if record.entry.term >= term else (middle + 1, high)
        return low

    def checksums_before(self, start: int) -> tuple[int, ...]:
        """The checksum before `start`; nothing when it can't be told, and then the first entry goes unchecked."""
        if start == self.first:
            return () if self.base is None else (self.base.checksum,)
        found = self.checksum_at(start - 1)
        return () if found is None else (found,)

    def checksum_at(self, commit_id: int) -> int | None:
        """The checksum that is stored with an entry, or with the base; None when there is none to be read."""
        stored, _ = self.look_up(commit_id)
        if stored is None and self.base is not None and commit_id == self.base.id.commit_id:
            return self.base.checksum
        if stored is not None:
            with contextlib.suppress(StoreDamaged):
                return records.unpack_entry(commit_id, stored).checksum
        return None

    def look_up(self, commit_id: int) -> tuple[bytes | None, str]:
        """The stored bytes of a position, or why there are none."""
        try:
            if self._held is None:
                _ = self._txn
            if record := self._tail.records.get(commit_id):
                return record, ""
            stored = self._log.get(records.log_key(commit_id))
        except lmdb.Error as error:
            self.release()
            return None, f"can't be read: {error}"
        if stored is None:
            return None, self._tail_problems.get(commit_id, "not in the log")
        return bytes(stored), ""

    def _strays(self, last: int | None) -> Iterator[LogRecord]:
        """Entries past the end that the count gives: with a hole in the log, or when a key was changed."""
        commit_id, looks = self.last + 1, self.looks
        while (last is None or commit_id <= last) and looks == self.looks:  # in another look the log may be longer
            try:
                found = self._position_from(records.log_key(commit_id))
            except (StoreDamaged, struct.error) as error:
                yield LogRecord(commit_id, None, f"what follows entry {commit_id - 1} can't be read: {error}")
                return
            if found is None or (last is not None and found > last):
                return
            stored, problem = self.look_up(found)
            if stored is None:
                yield LogRecord(found, None, f"entry {found}: {problem}", found)
            else:
                entry, problem = _salvage_entry(found, stored)
                text = problem or f"entry {found} is out of place: the log should end at {self.last}"
                yield LogRecord(found, entry, text, None if entry else found)
            if found == 2**64 - 1:
                return
            commit_id = found + 1

    def _position_from(self, key: bytes) -> int | None:
        """The first position in the log at or after a key. Raises StoreDamaged."""

        def read() -> bytes | None:
            with self._txn.cursor(self._dbs[records.LOG]) as cursor:
                return bytes(cursor.key()) if cursor.set_range(key) else None

        found = self._guarded(read)
        return None if found is None else records.position_of(found)

    # --- the committed namespaces ---

    def overlay(self) -> Overlay:
        """What lies over the values on disk in this look; it takes the look when none is held.

        One that was made in a look before is still right while the same flush is under way: it is made of entries and
        of values that do not change before the flush comes to them."""
        while True:
            _ = self._txn
            behind, committed = self.behind, self.committed
            if behind is None or self.as_on_disk:
                return self._without_overlay()
            if self._overlay.is_of(behind, committed):
                return self._overlay
            if self._overlay.goes_on_to(behind, committed):
                self._overlay = self._overlay.shortened(behind)
            else:
                self._overlay = self._carry_out(behind, committed)

    def _without_overlay(self) -> Overlay:
        if not self._is_behind_lost:
            return _NOTHING
        text = f"which values are older than commit_id {self.committed} can't be told: the record 'behind' is damaged"
        return Overlay(None, None, {}, {}, [text])

    def _carry_out(self, behind: Behind, committed: int | None) -> Overlay:
        """Make the overlay, in one look: it takes some tenths of a second at the most, and reading the values has its
        full time after that. A page that can't be read ends the look: `overlay` sees whether it still fits the next."""
        damage: list[str] = []
        hold_s, self.hold_s = self.hold_s, math.inf
        try:
            changes = self._changes_since(behind, committed, damage)
            return carry_out(behind, committed, changes, self._below, damage)
        finally:
            self.hold_s = hold_s
            self._since = time.monotonic()

    def _changes_since(
        self, behind: Behind, committed: int | None, damage: list[str]
    ) -> Iterator[tuple[Entry, Change]]:
        """What the entries past `behind.after` change of the keys that are behind; `damage` is told what is lost."""
        first, start = behind.after + 1, behind.store_key
        if committed is None:
            damage.append(f"values from {_shown(start)} on are as of commit_id {behind.after}: the newest is damaged")
            return
        then = f"values from {_shown(start)} on may be older than commit_id {committed}, or wrong"
        if first < self.first:
            damage.append(f"entries {first} to {self.first - 1}: not in the log; {then}")
        for record in LogReading(self, first).upto(committed):
            effect, problem = (None, "") if record.entry is None else _effect_of(record.entry)
            if record.damage or problem:
                damage.append(f"{record.damage or problem}; {then}")
            if record.entry is not None and isinstance(effect, Change) and behind.lacks(record.commit_id, effect):
                yield record.entry, effect

    def _below(self, key: bytes) -> Below | None:
        """What the disk has under a key."""
        try:
            stored = self._txn.get(key, db=self._dbs[self._state])
        except lmdb.Error as error:
            self.release()
            return Below(None, f"the value of key {_shown(key)} can't be read: {error}")
        if stored is None:
            return None
        found = _check_value(key, bytes(stored))
        return Below(found.record, found.damage)

    def values(self, namespace: str | None = None, prefix: str = "") -> Iterator[StoredValue]:
        """The committed values in order of namespace and key, each checked; with a namespace, of that one only, and
        with a prefix, only of keys that begin so. Both seek; neither scans."""
        start = prefix.encode(errors="surrogateescape")
        told: set[str] = set()
        if namespace is not None:
            yield from self._values(namespace.encode(errors="surrogateescape") + b"\0" + start, told)
        elif start:
            for name in self._namespaces():
                yield from self._values(name + b"\0" + start, told)
        else:
            yield from self._values(b"", told)

    def _values(self, start: bytes, told: set[str]) -> Iterator[StoredValue]:
        """Everything whose store key begins with `start`, also past pages that can't be read. `told`: what was said of
        the overlay already."""
        position: bytes | None = start
        shown, looks = 0, self.looks
        for attempt in range(_MOST_BAD_PLACES):
            if position is None:
                return
            after = position
            try:
                for key, value in self._walk(position, start, told):
                    if value.key is None:
                        yield value
                        continue
                    if key.startswith(start):
                        yield value
                        shown += not value.is_gone
                    elif not value.damage:  # a changed key may stand anywhere
                        return
                    after = key + b"\0"
                if not start and not attempt and looks == self.looks and shown != self.keys:
                    text = f"{self.keys} values should be there, but {shown} are: a page is damaged"
                    yield StoredValue(None, None, None, text)
                return
            except lmdb.Error as error:
                self.release()
                position = self._next_readable(after)
                yield StoredValue(None, None, None, f"values from {_shown(after)} on can't be read: {error}")
                yield from self._laid_over(after, position, start)
        yield StoredValue(None, None, None, "too many pages can't be read: the rest is not listed")

    def _walk(self, position: bytes, start: bytes, told: set[str]) -> Iterator[tuple[bytes, StoredValue]]:
        """The values from a key on, in the order of the pages: so one whose key was changed is met as well. Before
        them, what makes those under `start` doubtful, if it was not told. Stepping on to a page of zeros ends the
        process, inside LMDB: who calls this on a damaged directory is `supervised`."""
        done = None
        while True:
            overlay, looks = self.overlay(), self.looks
            for text in overlay.damage if overlay.concerns(start) else ():
                if text not in told:
                    told.add(text)
                    yield position, StoredValue(None, None, None, text)
            if self.looks != looks:
                continue
            with self._txn.cursor(self._dbs[self._state]) as cursor:
                for number, (key, stored) in enumerate(_merged(cursor, position, overlay)):
                    if key == done:
                        continue
                    value = _value_over(key, overlay) if stored is None else _check_value(key, bytes(stored))
                    if value is not None:
                        yield key, value
                    position = done = key
                    if not number & _BETWEEN_CLOCKS:
                        self.release_if_long()
                    if self.looks != looks:
                        break
                else:
                    return

    def _laid_over(self, position: bytes, end: bytes | None, start: bytes) -> Iterator[StoredValue]:
        """What the log makes of the keys between two, where the disk can't be read; of those that begin with
        `start`."""
        overlay = self.overlay()
        for key in overlay.between(position, end):
            value = _value_over(key, overlay)
            if value is not None and key.startswith(start):
                yield value

    def _next_readable(self, lost: bytes) -> bytes | None:
        """The first key from which LMDB can read again, found by halving; None when there is none."""
        low, high = _number(lost), _number(b"\xff" * LMDB_KEY_BYTES)
        if not self._is_readable(_key(high)):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if self._is_readable(_key(middle)):
                high = middle
            else:
                low = middle
        return _key(high)

    def _is_readable(self, key: bytes) -> bool:
        try:
            with self._txn.cursor(self._dbs[self._state]) as cursor:
                if cursor.set_range(key):
                    cursor.item()
        except lmdb.Error:
            self.release()
            return False
        return True

    def _namespaces(self) -> Iterator[bytes]:
        """The namespaces, by jumping from one to the next: no name holds NUL, so name + 01 is past all its keys."""
        position = b""
        while True:
            keys = self.overlay().added_from(position)[:1]
            with self._txn.cursor(self._dbs[self._state]) as cursor:
                if cursor.set_range(position):
                    keys.append(bytes(cursor.key()))
            if not keys:
                return
            name = min(keys).partition(b"\0")[0]
            yield name
            position = name + b"\x01"

    # --- counts and sizes ---

    @property
    def keys(self) -> int:
        """How many committed values there are, as of the commit_id on disk."""
        more = self.overlay().more
        return self.keys_on_disk + more

    @property
    def keys_on_disk(self) -> int:
        """How many values the disk has, whatever they are as of: told at once."""
        return self._count(self._state)

    @property
    def kept(self) -> int:
        """How many log entries there are, staged and committed, without those that the tail has lost."""
        return self._count(records.LOG) + sum(1 for record in self._tail.records.values() if record)

    def sizes(self) -> dict[str, int]:
        """Bytes: `file` (on disk), `used` (pages that hold data in this look), `free` (pages that hold none, to be used
        again) and `map` (the file's bound)."""
        main, info = self._env.stat(), self._env.info()
        page = main["psize"]
        used = sum(self._measure(name)[1] for name in self._dbs)
        inner = _META_PAGES + main["branch_pages"] + main["leaf_pages"]
        free = max(0, info["last_pgno"] + 1 - inner - used)
        file = (self.path / records.DATA_FILE).stat().st_size
        return {"file": file, "used": used * page, "free": free * page, "map": info["map_size"]}

    def namespaces(self, advance: Callable[[int], None]) -> list[NamespaceSize]:
        """How much each namespace holds; `advance` is told how many keys were counted. Looks at every key. While a node
        writes, what is counted later is as of a later look. Raises StoreDamaged."""
        found: dict[bytes, list[int]] = {}
        position: bytes | None = b""
        try:
            while position is not None:
                self.release()
                position = self._count_some(position, found)
                advance(_COUNTED_AT_ONCE)
        except lmdb.Error as error:
            self.release()
            raise StoreDamaged(f"the keys can't be counted: {error}") from error
        return [NamespaceSize(name.decode(errors="backslashreplace"), *counts) for name, counts in found.items()]

    def _count_some(self, position: bytes, found: dict[bytes, list[int]]) -> bytes | None:
        """Count from a key on, in one look; the key to go on from. Only lengths of values are read, not their pages."""
        overlay = self.overlay()
        if overlay.damage:
            raise StoreDamaged(f"the keys can't be counted: {overlay.damage[0]}")
        with self._txn.cursor(self._dbs[self._state]) as cursor:
            for number, (key, stored) in enumerate(_merged(cursor, position, overlay)):
                if number == _COUNTED_AT_ONCE:
                    return key
                size = overlay.size_of(key) if stored is None else len(stored)
                if size is None:
                    continue
                name, _, rest = key.partition(b"\0")
                counts = found.setdefault(name, [0, 0])
                counts[0] += 1
                counts[1] += len(rest) + size
        return None

    def readers(self) -> list[Reader]:
        """Who reads or has read, this reader too; LMDB's table of them tells it as text."""
        rows = (line.split() for line in self._env.readers().splitlines())
        return [
            Reader(int(row[0]), row[1], int(row[2]) if row[2].isdigit() else None)
            for row in rows
            if len(row) == 3 and row[0].isdigit()
        ]

    def _count(self, name: bytes) -> int:
        return self._measure(name)[0]

    def _measure(self, name: bytes) -> tuple[int, int]:
        """Entries and pages of a database."""
        try:
            stat = self._txn.stat(self._dbs[name])
        except lmdb.BadTxnError:  # an earlier read met a damaged page, and LMDB tells only now
            self.release()
            stat = self._txn.stat(self._dbs[name])
        return stat["entries"], stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]


class LogReading:
    """The log from a position on, read while a node may be writing it.

    A look is not held for long, and in the next one staged entries may have been cut and others may stand in their
    place. Then `on_cut` is called with the first position of those that were read before and are no longer there, and
    the reading goes on from that position. For this it keeps the checksums, 4 bytes each, of the entries that it has
    read and that were not committed yet. Old entries may have been deleted meanwhile, by compaction or a snapshot: then
    it goes on where the log begins, and the positions between are missing.

    Public facts: `next`, the position that is read next.
    """

    def __init__(self, directory: Directory, first: int, on_cut: Callable[[int], None] | None = None) -> None:
        self._directory = directory
        self._on_cut = on_cut
        self.next = max(first, directory.first)
        self._staged = array("I")
        """Of the positions right before `next`."""
        self._looks = directory.looks
        self._seeds = self._seeds_at(self.next)

    def _seeds_at(self, start: int) -> tuple[int, ...]:
        """The seeds for a position, from a look at the entry before it: sound even if its stored checksum is not."""
        before = start - 1
        if not self._directory.first <= before <= self._directory.last:
            return self._directory.checksums_before(start)
        stored, _ = self._directory.look_up(before)
        if stored is None:
            return ()
        return check_entry(before, stored, self._directory.checksums_before(before))[1]

    def upto(self, last: int) -> Iterator[LogRecord]:
        """The entries from `next` to `last`, or to where the log ends. Positions that are lost come as one record."""
        directory = self._directory
        lost: LogRecord | None = None
        size = 0
        while True:
            commit_id = self.next
            if not commit_id & _BETWEEN_CLOCKS or size > _LARGE:
                directory.release_if_long()
            if directory.looks != self._looks:
                self._look_back()
                commit_id = self.next
                if lost is not None and lost.commit_id < directory.first:
                    lost = None
            if commit_id > last or commit_id > directory.last:
                break
            stored, problem = directory.look_up(commit_id)
            size = 0 if stored is None else len(stored)
            self.next = commit_id + 1
            if stored is None:
                self._seeds = ()
                self._remember(commit_id, 0)
                lost, done = _add_lost(lost, commit_id, problem)
                yield from done
                continue
            if lost is not None:
                yield lost
                lost = None
            record, self._seeds = check_entry(commit_id, stored, self._seeds)
            if directory.committed is None or commit_id > directory.committed:
                self._remember(commit_id, 0 if record.entry is None else record.entry.checksum)
            yield record
        if lost is not None:
            yield lost

    def _remember(self, commit_id: int, checksum: int) -> None:
        if commit_id > (self._directory.committed or 0):
            self._staged.append(checksum)

    def _look_back(self) -> None:
        """In a new look: is what was read still there? Those of the staged that have committed are forgotten."""
        directory = self._directory
        newest = directory.checksum_at(self.next - 1)  # takes the look
        self._looks = directory.looks
        if self.next < directory.first:
            self._skip()
            return
        start = self.next - len(self._staged)
        del self._staged[: max(0, directory.first - start)]
        start = self.next - len(self._staged)
        if self._staged:
            if (newest or 0) != self._staged[-1]:
                self._go_back(start)
        elif self._seeds and self.next > directory.first and newest != self._seeds[0]:
            raise StoreForeign(
                f"{directory.path}: entry {self.next - 1}, which was committed, is not there any more: the directory "
                "was replaced by another copy"
            )
        settled = (directory.committed or 0) - start + 1
        if settled > 0:
            del self._staged[:settled]

    def _skip(self) -> None:
        """What comes next is gone: go on where the log begins now."""
        self.next = self._directory.first
        del self._staged[:]
        self._seeds = self._seeds_at(self.next)

    def _go_back(self, start: int) -> None:
        """To the first entry, of the staged ones that were read, that is no longer there."""
        same, read = 0, len(self._staged)
        while same < read and (self._directory.checksum_at(start + same) or 0) == self._staged[same]:
            same += 1
        if same == read:  # a page that could not be read, a moment ago
            return
        del self._staged[same:]
        self.next = start + same
        self._seeds = self._seeds_at(self.next)
        if self._on_cut is not None:
            self._on_cut(self.next)


def command_of(entry: Entry) -> tuple[AnyCommand | None, str]:
    """The command of an entry, or why it can't be read."""
    try:
        return decode_command(entry.command), ""
    except ProtocolError as error:
        return None, str(error)


def _effect_of(entry: Entry) -> tuple[Effect | None, str]:
    """What an entry does, or why that can't be told."""
    try:
        return decode_effect(entry.command), ""
    except ProtocolError as error:
        return None, f"entry {entry.commit_id}: {error}"


def in_json(text: str) -> bytes:
    """A text as it stands in a command, which has one JSON form: where these bytes are not, the text is not."""
    return msgspec.json.encode(text)[1:-1]


def salvage_command(command: bytes) -> tuple[str | None, str | None, str | None]:
    """Kind, namespace and key of a command whose rest can't be read; None for each that can't either."""
    found = _COMMAND_START.match(command)
    if found is None:
        return None, None, None
    kind, namespace, key = (_json_string(part) for part in found.groups())
    return kind, namespace, key


def _json_string(text: bytes | None) -> str | None:
    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=str)
    except ValueError:
        return text[1:-1].decode(errors="backslashreplace")


def _problems_of(found: tail.Found) -> dict[int, str]:
    """What is wrong with the positions that a tail has lost."""
    if not found.damage:
        return {}
    lost = [commit_id for commit_id, record in found.records.items() if not record]
    rows = [[at for _, at in row] for _, row in groupby(enumerate(lost), key=lambda item: item[1] - item[0])]
    texts = found.damage if len(rows) == len(found.damage) else ["; ".join(found.damage)] * len(rows)
    return {commit_id: text for row, text in zip(rows, texts, strict=True) for commit_id in row}


def _is_same_file(one: tuple[int, int, bool] | None, other: tuple[int, int, bool] | None) -> bool:
    """True when two identities are of one data file."""
    return one is not None and other is not None and one[:2] == other[:2]


def _identity(path: Path) -> tuple[int, int, bool] | None:
    """What changes when another data file is put in place of this one, or LMDB's table of readers appears beside it."""
    file = path / records.DATA_FILE
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, Path(f"{file}-lock").exists()


def _open(path: Path, map_bytes: int) -> lmdb.Environment:
    try:
        if path.exists() and not path.is_dir():
            raise StoreForeign(f"{path} is a file: give the data directory of a node, the one with the file in it")
        return open_reader(path, map_bytes)
    except lmdb.Error as error:
        raise explain_open_error(path, error) from error
    except OSError as error:
        raise StoreFailed(f"{path} can't be read: {error.strerror}. Check who owns it") from error


def _add_lost(lost: LogRecord | None, commit_id: int, problem: str) -> tuple[LogRecord, list[LogRecord]]:
    """Join a lost position to the run of them before it; a run of another reason is handed back as done."""
    if lost is None or not lost.damage.endswith(problem):
        return LogRecord(commit_id, None, f"entry {commit_id}: {problem}", commit_id), [] if lost is None else [lost]
    return LogRecord(lost.commit_id, None, f"entries {lost.commit_id} to {commit_id}: {problem}", commit_id), []


def check_entry(commit_id: int, stored: bytes, seeds: tuple[int, ...]) -> tuple[LogRecord, tuple[int, ...]]:
    """A log record with the result of its check, and the seeds with which the next one may match. Without seeds the
    checksum can't be checked, and goes for right."""
    if len(seeds) == 1:
        try:
            entry = records.unpack_entry(commit_id, stored)
            if entry.checksum == chain(seeds[0], entry.term, commit_id, entry.time, entry.command):
                return LogRecord(commit_id, entry), (entry.checksum,)
        except StoreDamaged:
            pass  # told below
    return _check_doubtful(commit_id, stored, seeds)


def _check_doubtful(commit_id: int, stored: bytes, seeds: tuple[int, ...]) -> tuple[LogRecord, tuple[int, ...]]:
    """The same for one that is damaged, or follows one that is."""
    entry, problem = _salvage_entry(commit_id, stored)
    if entry is None:
        return LogRecord(commit_id, None, problem, commit_id), ()
    computed = [chain(seed, entry.term, commit_id, entry.time, entry.command) for seed in seeds]
    if not seeds or entry.checksum in computed:
        return LogRecord(commit_id, entry, problem), (entry.checksum,)
    problem = problem or f"entry {commit_id} does not match its checksum"
    return LogRecord(commit_id, entry, problem), (entry.checksum, *computed)[:_MOST_SEEDS]


def _salvage_entry(commit_id: int, stored: bytes) -> tuple[Entry | None, str]:
    """The entry in a log record, also when the byte that names the record's format is wrong, and what is wrong."""
    try:
        return records.unpack_entry(commit_id, stored), ""
    except StoreDamaged as error:
        problem = str(error)
    with contextlib.suppress(StoreDamaged):
        return records.unpack_entry(commit_id, _FIRST_BYTE + stored[1:]), problem
    return None, problem


_FIRST_BYTE: Final = records.pack_entry(Entry(0, 0, 0, 0, msgspec.Raw(b"{}")))[:1]


def _check_value(key: bytes, stored: bytes) -> StoredValue:
    """A committed value with the result of its check; one that fails is read as if its checksum were right."""
    namespace, separator, name = key.partition(b"\0")
    texts = (namespace.decode(errors="backslashreplace"), name.decode(errors="backslashreplace"))
    try:
        record: records.Record | None = records.unpack_record(key, stored)
        return StoredValue(*texts, record, "" if separator else f"the key {_shown(key)} has no namespace")
    except StoreError as error:
        problem = str(error)
    record = None
    with contextlib.suppress(StoreError):
        record = records.unpack_record(key, struct.pack(">I", crc32(stored[4:], crc32(key))) + stored[4:])
    return StoredValue(*texts, record, problem)


def _merged(
    cursor: lmdb.Cursor, position: bytes, overlay: Overlay
) -> Iterator[tuple[bytes, bytes | memoryview | None]]:
    """The keys from `position` on with what is stored under them, or with None those of the overlay: where the disk has
    them, else in order."""
    added = overlay.added_from(position)
    number = 0
    if cursor.set_range(position):
        for found, stored in cursor.iternext():
            key = bytes(found)
            while number < len(added) and added[number] < key:
                yield added[number], None
                number += 1
            yield key, None if key in overlay.changes else stored
    for key in added[number:]:
        yield key, None


def _value_over(key: bytes, overlay: Overlay) -> StoredValue | None:
    """The value of a key of the overlay; None when there is none, and nothing to tell of it."""
    record, damage = overlay.changes[key], overlay.damage_of(key)
    namespace, _, name = key.decode(errors="backslashreplace").partition("\0")
    if record is None and not damage:
        return None
    return StoredValue(namespace, name, record, damage, is_gone=record is None)


def _number(key: bytes) -> int:
    return int.from_bytes(key.ljust(LMDB_KEY_BYTES, b"\0")[:LMDB_KEY_BYTES])


def _key(number: int) -> bytes:
    return number.to_bytes(LMDB_KEY_BYTES).rstrip(b"\0") or b"\0"


def _shown(key: bytes) -> str:
    namespace, _, name = key.rstrip(b"\0").partition(b"\0")
    shown = f"{name.decode(errors='backslashreplace')!r} in namespace {namespace.decode(errors='backslashreplace')!r}"
    return shown if key else "the first"
