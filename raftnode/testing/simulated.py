"""One simulated node: the production election, requests, handshake, consensus and store, over LMDB files that survive
its crashes, with a clock that can jump, a disk that can be slow, full or broken, and a death at any write, or in it.
"""

from __future__ import annotations

import enum
import itertools
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import lmdb

from raftnode import records, tail
from raftnode.config import Role, Settings
from raftnode.consensus.ballot import Ballot
from raftnode.consensus.journal import Mark
from raftnode.consensus.membership import Membership
from raftnode.consensus.raft import Raft
from raftnode.consensus.transfer import Incoming
from raftnode.election import Election
from raftnode.errors import StoreFailed
from raftnode.mailbox import Arrival
from raftnode.messages import (
    GENESIS,
    AnyRequest,
    DeleteCommand,
    Entry,
    EntryId,
    PutCommand,
    Snapshot,
    SnapshotAnswer,
    decode_answer,
    decode_command,
    store_key,
)
from raftnode.namespaces import Behind, Outcome
from raftnode.store import Store
from raftnode.tail import SECTOR, Tail, TailFact
from raftnode.testing.fabric import Fabric, Session, SimulatedTransport, describe
from raftnode.testing.invariants import Invariants
from raftnode.testing.network import CrashPoint, Reads
from raftnode.testing.world import World

AMPLE: Final = 1 << 40
"""Bytes of room on a disk that is not full."""
FULL_CHECK_EVERY: Final = 40
"""Every so many transactions everything on the disk is read and compared, not only what should have changed."""
_SHORTEST: Final = 1e-6
"""Seconds between two turns, at the least, as a real loop needs: else rounding could make time stand still."""


class Crash(BaseException):
    """The process dies here. Not an Exception: nothing in the product may catch it."""


class WriteFault(enum.Enum):
    """How a write, in a transaction or to the tail, fails for good; the node must stop."""

    LOST = "lost"
    """The error is true: nothing is on disk."""
    KEPT = "kept"
    """The error is reported, but everything is on disk."""


class Mirror:
    """What is in a node's LMDB file and its tail, as last read from there, and what should be: the durable state for
    `Invariants`.

    Invariants: `entries[n]` has commit_id `n + 1`, and those up to `base` were on disk once, or are what others have
    committed there, if they came as a snapshot; `state` is what the entries up to `commit_id` make, worked out here and
    not by the product; while the disk is behind with some keys, `before` is what it was when that flush began.
    """

    def __init__(self, founding: Membership) -> None:
        self.ballot = Ballot()
        self.entries: list[Entry] = []
        self.commit_id = 0
        self.base = Mark(GENESIS, 0)
        self.incoming = Incoming()
        self.membership = founding
        self._current = records.COMMITTED
        self.state: dict[bytes, records.Record] = {}
        self.before: dict[bytes, records.Record] = {}
        self.behind: Behind | None = None
        self._flushed: set[bytes] = set()  # the keys that this flush writes, or has written
        self._in_database = 0  # the newest entry that was seen in LMDB's log; later ones were in the tail
        self._comparisons = 0

    @property
    def last(self) -> Mark:
        """The newest entry."""
        return Mark(self.entries[-1].id, self.entries[-1].checksum) if self.entries else Mark(GENESIS, 0)

    def holds(self, id: EntryId) -> bool:
        """True when the entry is in this log."""
        return 0 < id.commit_id <= len(self.entries) and self.entries[id.commit_id - 1].term == id.term

    def read(
        self,
        txn: lmdb.Transaction,
        db: Callable[[bytes], Any],
        directory: Path,
        changed_from: int,
        history: Sequence[Entry],
        name: str,
    ) -> None:
        """After a write, take over what is on disk: the facts, and the log from `changed_from` on. `history` is all
        that was committed anywhere, which tells what a snapshot must be."""
        meta = db(records.META)
        self.incoming = _fact(txn, meta, b"incoming", Incoming) or Incoming()
        stored = txn.get(records.STATE_FACT, db=meta)
        current = records.state_named(None if stored is None else bytes(stored))
        base = _fact(txn, meta, b"base", Mark) or Mark(GENESIS, 0)
        has_installed, self._current = current != self._current, current
        if has_installed:
            self._install(base.id.commit_id, history, name)
            changed_from = base.id.commit_id + 1
        self.ballot = _fact(txn, meta, b"ballot", Ballot) or Ballot()
        self.membership = (_fact(txn, meta, b"memberships", list[Membership]) or [self.membership])[-1]
        commit_id: int = _fact(txn, meta, b"commit_id", int) or 0
        first = max(min(changed_from, self._in_database + 1), base.id.commit_id + 1)
        in_database, in_tail = _log(txn, db, directory, first, base, name)
        on_disk = in_database + in_tail
        known = [entry for entry in on_disk if entry.commit_id < changed_from]
        before = self.entries[first - 1 : changed_from - 1]
        assert known == before, f"what leaves the tail stays the same: {name} has {known}, had {before}"
        del self.entries[changed_from - 1 :]
        self.entries += history[changed_from - 1 : base.id.commit_id]  # compacted as soon as they were there
        self.entries += on_disk[len(known) :]
        self._in_database = first + len(in_database) - 1
        self._begin_after(base, name)
        count, kept = txn.stat(db(records.LOG))["entries"] + len(in_tail), len(self.entries) - base.id.commit_id
        assert count == kept, f"the log on disk has no rests: {name} has {count}, not {kept}"
        assert commit_id <= len(self.entries), f"applied entries are on disk: {name} lacks {commit_id}"
        self._follow_flush(_fact(txn, meta, b"behind", Behind | None), commit_id, name)
        self._comparisons += 1
        if has_installed or self._comparisons % FULL_CHECK_EVERY == 0:
            self.compare(txn, db, directory, name)
        else:
            self._compare_keys(txn, db(current), self._flushed, name)

    def _follow_flush(self, behind: Behind | None, commit_id: int, name: str) -> None:
        """The disk has come to `commit_id`, but for the keys that it is `behind` with."""
        last = self.commit_id if self.behind is None else self.behind.after
        if behind is not None and self.behind is None:
            self.before = dict(self.state)
        if behind is not None:
            assert last == behind.after >= self.base.id.commit_id, f"{name} is behind {last}, not {behind.after}"
            assert self.behind is None or self.behind.key <= behind.key, f"a flush goes on: {name} is at {behind.key!r}"
            assert self.behind is None or self.commit_id == commit_id, f"{name} began a flush in another"
        if self.behind is None:
            self._flushed = set()
        self._flushed |= self._advance(commit_id)
        self.behind = behind

    def _expected(self, key: bytes) -> records.Record | None:
        is_behind = self.behind is not None and key >= self.behind.store_key
        return (self.before if is_behind else self.state).get(key)

    def _install(self, commit_id: int, history: Sequence[Entry], name: str) -> None:
        """A snapshot is there: its state must be what all that was committed up to there makes."""
        assert self.commit_id < commit_id <= len(history), (
            f"a snapshot is of what is committed: {name} had {self.commit_id}, has {commit_id} of {len(history)}"
        )
        self.entries[:] = history[:commit_id]
        self.commit_id, self.state, self.behind = 0, {}, None
        self._advance(commit_id)

    def _begin_after(self, base: Mark, name: str) -> None:
        """The log begins after `base`, which must be an entry that was there."""
        assert base.id.commit_id >= self.base.id.commit_id, f"the base never falls: {name} had {self.base}, has {base}"
        if base.id.commit_id:
            entry = self.entries[base.id.commit_id - 1]
            assert base == Mark(entry.id, entry.checksum), f"the base is an entry: {name} has {base}, not {entry.id}"
        self.base = base

    def compare(self, txn: lmdb.Transaction, db: Callable[[bytes], Any], directory: Path, name: str) -> None:
        """Everything on disk is what it should be: the log that was seen last, wherever it is, and the state that it
        makes."""
        in_database, in_tail = _log(txn, db, directory, 1, self.base, name)
        expected_log = self.entries[self.base.id.commit_id :]
        assert in_database + in_tail == expected_log, f"the log on disk is the one that was written: {name}"
        keys = [bytes(key) for key in txn.cursor(db(self._current)).iternext(values=False)]
        expected = [key for key in sorted({*self.state, *self.before}) if self._expected(key) is not None]
        assert keys == expected, f"state equals log: {name} has the keys {keys}, not {expected}"
        self._compare_keys(txn, db(self._current), keys, name)

    def _advance(self, commit_id: int) -> set[bytes]:
        """Carry out the entries up to `commit_id`; returns the keys that they wrote."""
        changed: set[bytes] = set()
        for entry in self.entries[self.commit_id : commit_id]:
            command = decode_command(entry.command)
            if isinstance(command, PutCommand):
                key = store_key(command.namespace, command.key)
                before = self.state.get(key)
                created, version = (before.created, before.version + 1) if before else (entry.commit_id, 1)
                self.state[key] = records.Record(created, entry.commit_id, version, 0, command.value)
            elif isinstance(command, DeleteCommand):
                key = store_key(command.namespace, command.key)
                self.state.pop(key, None)
            else:
                continue
            changed.add(key)
        self.commit_id = max(self.commit_id, commit_id)
        return changed

    def _compare_keys(self, txn: lmdb.Transaction, db: Any, keys: Iterable[bytes], name: str) -> None:
        for key in sorted(keys):
            stored = txn.get(key, db=db)
            record = None if stored is None else records.unpack_record(key, bytes(stored))
            assert record == self._expected(key), (
                f"state equals log: {name} has {record} under {key!r}, its log makes {self._expected(key)}"
            )


def _fact(txn: lmdb.Transaction, meta: Any, name: bytes, kind: Any) -> Any:
    stored = txn.get(name, db=meta)
    return None if stored is None else records.unpack_meta(name, bytes(stored), kind)


def _entries(txn: lmdb.Transaction, log: Any, first: int) -> Iterator[Entry]:
    with txn.cursor(log) as cursor:
        if cursor.set_range(records.log_key(first)):
            for key, record in cursor:
                yield records.unpack_entry(records.position_of(bytes(key)), bytes(record))


def _log(
    txn: lmdb.Transaction, db: Callable[[bytes], Any], directory: Path, first: int, base: Mark, name: str
) -> tuple[list[Entry], list[Entry]]:
    """The log on disk, which begins after `base`: its entries from `first` on in LMDB, and all those in the tail."""
    fact = _fact(txn, db(records.META), b"tail", TailFact) or TailFact()
    log = db(records.LOG)
    with txn.cursor(log) as cursor:
        last = records.position_of(bytes(cursor.key())) if cursor.last() else base.id.commit_id
    found = tail.look(directory, fact, last)
    assert not found.damage, f"a crash is never taken for damage: {name}: {found.damage}"
    follows = list(range(last + 1, last + 1 + len(found.records)))
    assert list(found.records) == follows, f"the tail follows the log: {name} has {list(found.records)} after {last}"
    in_tail = [records.unpack_entry(commit_id, record) for commit_id, record in found.records.items()]
    return list(_entries(txn, log, first)), in_tail


def _torn(old: bytes, new: bytes, chance: random.Random) -> bytes:
    """What is in a place after a write that was cut off: each sector as it was, or as it should be."""
    share = chance.choice([0.2, 0.5, 0.8])
    return b"".join(
        (new if chance.random() < share else old)[at : at + SECTOR].ljust(SECTOR, b"\0")
        for at in range(0, len(new), SECTOR)
    )


def sectors_of(path: Path, generation: int) -> list[int]:
    """The sectors of a tail that belong to a generation."""
    content = path.read_bytes() if path.exists() else b""
    generations = [int.from_bytes(content[at + 4 : at + 12]) for at in range(0, len(content), SECTOR)]
    return [sector for sector, found in enumerate(generations) if found == generation]


class SimulatedTail(Tail):
    """The production tail; each write is an occasion for its node to die, also in the middle of it, or for its disk to
    fail."""

    def __init__(self, directory: Path, is_durable: bool, node: SimulatedNode) -> None:
        super().__init__(directory, is_durable)
        self._node = node
        self.is_held = True
        """What was appended last is in the file, and not a part of it."""

    def make(self, size: int, generation: int) -> None:
        """As `Tail.make`, if the node lives that long."""
        node = self._node
        if node.dies_in_start:
            before = self._path.read_bytes() if self._path.exists() else b""
            self._path.write_bytes(_torn(before, bytes(tail.file_size(size)), node.chance))
            node.happened["deaths while a tail was made"] += 1
            raise Crash
        super().make(size, generation)

    def go_on(self, fact: TailFact) -> None:
        """As `Tail.go_on`, which begins with nothing: a sector that a torn record has left could make another torn
        record of the same generation whole."""
        super().go_on(fact)
        left = sectors_of(self._path, self.fact.generation)
        assert not left, f"a start leaves nothing of a torn record: {self._node.name} goes on over the sectors {left}"

    def append(self, entries: Sequence[Entry]) -> None:
        """As `Tail.append`; the death after it is that of the store."""
        node = self._node
        self.is_held = False
        node.happened["deaths before a write to the tail"] += node.crash_at is CrashPoint.BEFORE_WRITE
        node.before_write(len(entries))
        fault, node.tail_fault = node.tail_fault, None
        if fault is WriteFault.LOST:
            node.happened["errors of the tail without a write"] += 1
            raise OSError(f"simulated: Input/output error ({fault.value})")
        before, at = self._path.read_bytes(), self._offset
        super().append(entries)
        self.is_held = True
        if fault is WriteFault.KEPT:
            node.happened["errors of the tail after a write"] += 1
            raise OSError(f"simulated: Input/output error ({fault.value})")
        if node.tears:
            self._tear(at, before)
            raise Crash

    def _tear(self, at: int, before: bytes) -> None:
        """The record at an offset was not written to its end."""
        written = self._path.read_bytes()
        end = max(n for n in range(at, len(written), SECTOR) if written[n : n + SECTOR] != before[n : n + SECTOR])
        torn = _torn(before[at : end + SECTOR], written[at : end + SECTOR], self._node.chance)
        self._path.write_bytes(before[:at] + torn + written[end + SECTOR :])
        self.is_held = torn == written[at : end + SECTOR]
        self._node.happened[f"deaths {'at the end of' if self.is_held else 'in'} a write to the tail"] += 1


class SimulatedStore(Store):
    """The production store; each write is an occasion for its node to die, or for its disk to fail."""

    def __init__(self, node: SimulatedNode) -> None:
        self._node = node
        super().__init__("database", node.directory, settings=node.settings, new_id=node.new_id)

    def _begin_tail(self, entries: Sequence[Entry]) -> None:
        """As `Store._begin_tail`, with a tail that may tear."""
        self._tail = SimulatedTail(self.data_dir, self.is_durable, self._node)
        self._node.happened["tails taken over by a start"] += bool(entries)
        is_torn = bool(sectors_of(self.data_dir / records.TAIL_FILE, self._tail_fact.generation))
        self._node.happened["tails with a torn record alone found by a start"] += is_torn and not entries
        super()._begin_tail(entries)

    def write(self, ballot: Ballot | None = None, chunk: Snapshot | None = None, keys: int | None = None) -> bool:
        """As `Store.write`, if the node lives that long."""
        node = self._node
        unwritten = self.journal.unwritten()
        node.before_write(len(unwritten.entries))
        changed_from = unwritten.cut_from or len(node.disk.entries) + 1
        before, base, in_tail = self._transactions, self.journal.base, list(self._tail.entries)
        try:
            has_installed = super().write(ballot, chunk, keys)
        finally:
            self._look(changed_from)
        assert self._transactions <= before + 1, f"one transaction: {node.name} could die in the middle of a write"
        node.happened["transactions"] += 1
        if in_tail:
            has_moved = self.journal.base != base and not has_installed
            node.happened["transactions that took a tail"] += 1
            node.happened["ballots over a tail"] += ballot is not None
            node.happened["cuts in a tail"] += changed_from <= in_tail[-1].commit_id
            node.happened["compactions over a tail"] += has_moved
            node.happened["compactions into a tail"] += has_moved and self.journal.base.id >= in_tail[0].id
            node.happened["snapshots over a tail"] += has_installed
        if has_installed:
            node.installed += 1
            node.applied = node.disk.entries[: node.disk.commit_id]
        node.after_write()
        return has_installed

    def extend_tail(self) -> bool:
        """As `Store.extend_tail`, if the node lives that long."""
        node = self._node
        count, before = len(self.journal.unwritten().entries), self._transactions
        changed_from = len(node.disk.entries) + 1
        try:
            has_written = super().extend_tail()
        except BaseException:
            self._look(changed_from)
            assert isinstance(self._tail, SimulatedTail), "as it was begun"
            expected = changed_from - 1 + (count if self._tail.is_held else 0)
            assert len(node.disk.entries) == expected, (
                f"a record is whole or not there: {node.name} has {len(node.disk.entries)} entries, not {expected}"
            )
            raise
        assert self._transactions == before, f"the tail takes no transaction: {node.name}"
        if has_written:
            self._look(changed_from)
            node.happened["writes to the tail"] += 1
            node.happened["writes of several entries to the tail"] += count > 1
            node.happened["deaths after a write to the tail"] += node.crash_at is CrashPoint.AFTER_WRITE
            node.after_write()
        return has_written

    @property
    def has_tail(self) -> bool:
        """True when some of the log is in the tail."""
        return self.entries_in_tail > 0

    @property
    def _transactions(self) -> int:
        """How many there ever were in this file."""
        env = self._env._env
        assert env is not None, "the environment is open while it is written"
        return int(env.info()["last_txnid"])

    def _put_facts(self, txn: lmdb.Transaction) -> dict[bytes, object]:
        """The last step of a transaction, and so the place where it can fail."""
        facts = super()._put_facts(txn)
        fault, self._node.write_fault = self._node.write_fault, None
        if fault is WriteFault.KEPT:
            txn.commit()
        if fault is not None:
            raise lmdb.Error(f"simulated: Input/output error ({fault.value})")
        return facts

    def _look(self, changed_from: int) -> None:
        """What is on disk now, past the product's own guard, which lets nobody read after a failure."""
        env = self._env._env
        assert env is not None, "the environment is open while it is written"
        with env.begin() as txn:
            self._node.disk.read(txn, self._env.db, self.data_dir, changed_from, self._node.history, self._node.name)

    def compare(self) -> None:
        """Read everything on disk and compare it with what it should be."""
        with self._env.read() as txn:
            self._node.disk.compare(txn, self._env.db, self.data_dir, self._node.name)

    def apply(self, entries: Sequence[Entry]) -> list[Outcome]:
        """As `Store.apply`; the simulation keeps count of what was applied."""
        outcomes = super().apply(entries)
        self._node.applied += entries
        return outcomes

    def room(self, now: float) -> int:  # noqa: ARG002 - the signature of a store
        """What the simulation says."""
        return self._node.room


class SimulatedNode:
    """One member: a directory that lasts, and a production `Election` that lives from a start to the next crash."""

    def __init__(
        self,
        name: str,
        members: Sequence[str],
        directory: Path,
        settings: Settings,
        world: World,
        fabric: Fabric,
        turn_delay: float,
        is_guest: bool = False,
    ) -> None:
        """`turn_delay`: seconds that may pass, at the most, between what arrives and the turn that takes it. A guest is
        no founder: with an empty disk it starts only when it was told of the `members` that took it (`join`)."""
        self.is_guest = is_guest
        self._invitation: tuple[str, Membership] | None = None
        self.name = name
        self.directory = directory / name.partition(":")[0]
        self.settings = settings
        self.world = world
        self.fabric = fabric
        self.new_id = f"{world.chance.getrandbits(64):016x}"
        self.disk = Mirror(Membership.founding(members))
        self.applied: list[Entry] = []
        self.reads = Reads()
        self.is_paused = False
        self.crash_at: CrashPoint | None = None
        self.tears = False
        """True: it dies in the middle of its next write to the tail."""
        self.dies_in_start = False
        """True: it dies while it makes the tail anew, if its next start does."""
        self.write_fault: WriteFault | None = None
        """Of its next transaction."""
        self.tail_fault: WriteFault | None = None
        """Of its next write to the tail."""
        self.slow_disk = 0.0
        """Seconds that each write takes, at the most."""
        self.room = AMPLE
        self.clock_rate = 1.0
        self.starts = 0
        self.installed = 0
        """Snapshots that came in and became its state."""
        self.happened: Counter[str] = Counter()
        """What its disk has seen, by kind."""
        self._members = [member for member in members if member != name]
        self._invariants: Invariants | None = None
        self.chance = world.chance_for(name)
        self._turn_delay = turn_delay
        self._clock_offset = 1000 * self.chance.random()
        self._wall_offset = 1.8e9 + 10 * self.chance.random()
        self._busy_until = 0.0
        self._turn_planned = False
        self._turn_ended = 0.0  # by its own clock
        self._followed = False  # when the turn began
        self._timers = itertools.count()
        self._timer = 0
        self._election: Election | None = None

    # --- what others look at ---

    @property
    def node(self) -> str:
        """The id of the node that this directory makes."""
        return self.new_id

    @property
    def is_up(self) -> bool:
        """False between a crash and the restart."""
        return self._election is not None

    @property
    def election(self) -> Election:
        """The running driver."""
        assert self._election is not None, f"{self.name} is down"
        return self._election

    @property
    def raft(self) -> Raft:
        """The running consensus."""
        return self.election.raft

    @property
    def transport(self) -> SimulatedTransport:
        """The running transport."""
        transport = self.election.transport
        assert isinstance(transport, SimulatedTransport), "a simulated node has a simulated transport"
        return transport

    @property
    def store(self) -> SimulatedStore:
        """The open store."""
        store = self.election.store
        assert isinstance(store, SimulatedStore), "a simulated node has a simulated store"
        return store

    @property
    def history(self) -> Sequence[Entry]:
        """All that was committed anywhere."""
        return () if self._invariants is None else self._invariants.history

    def watch(self, invariants: Invariants) -> None:
        """From now on `invariants` are checked after each turn."""
        self._invariants = invariants

    # --- time ---

    @property
    def local_now(self) -> float:
        """Simulated time at this node: past `world.now` while its disk keeps it waiting."""
        return max(self.world.now, self._busy_until)

    def clock(self) -> float:
        """This node's monotonic clock, in seconds."""
        return self._clock_offset + self.clock_rate * self.local_now

    def wall_clock(self) -> float:
        """This node's wall clock, in seconds since 1970: nothing but the time in the entries may depend on it."""
        return self._wall_offset + self.local_now

    def set_clock_rate(self, rate: float) -> None:
        """From now on the monotonic clock runs at this rate; it does not jump."""
        self._clock_offset += (self.clock_rate - rate) * self.local_now
        self.clock_rate = rate

    def jump(self, seconds: float) -> None:
        """The monotonic clock jumps ahead, as after a suspended machine."""
        assert seconds > 0, "a monotonic clock never goes back"
        self._clock_offset += seconds
        self.want_turn()

    def jump_wall(self, seconds: float) -> None:
        """Somebody sets the wall clock."""
        self._wall_offset += seconds

    # --- turns ---

    def want_turn(self) -> None:
        """See that a turn follows soon, unless the node can't take one now."""
        if not self._turn_planned and self.is_up and not self.is_paused:
            self._turn_planned = True
            self.world.at(self.local_now + self._turn_delay * self.chance.random(), self._planned_turn)

    def _planned_turn(self) -> None:
        self._turn_planned = False
        if not self.is_up or self.is_paused:
            return
        if self.world.now < self._busy_until:
            self.want_turn()
            return
        self.turn()

    def turn(self) -> None:
        """One turn of the production driver, and the checks after it."""
        self.transport.fill_mailbox()
        raft = self.raft
        self._followed = raft.role is Role.FOLLOWER
        stalled = self.clock() - self._turn_ended > self.settings.election_low_ms / 1000
        led = raft.term if raft.is_leader and stalled and len(raft.membership.voters) > 1 else None
        self._live(self._cycle)
        assert led is None or not (self.is_up and raft.is_leader and raft.term == led), (
            f"a stalled leader steps down: {self.name} still leads term {led}"
        )

    def _cycle(self) -> None:
        due = self.election.cycle()
        self._turn_ended = self.clock()
        self._timer = timer = next(self._timers)
        seconds = max(_SHORTEST, (due - self.clock()) / self.clock_rate)

        def fire() -> None:
            if self._timer == timer:
                self.want_turn()

        self.world.at(self.local_now + seconds, fire)

    def _live(self, act: Callable[[], object]) -> None:
        """Do something that may end this node, and check what must hold after it."""
        try:
            act()
        except Crash:
            self.crash()
        except StoreFailed as failure:
            why = str(failure).replace(str(self.directory.parent), "").partition(".")[0]
            self.world.tell(f"{self.name} stops: {why}")
            self.election.end()
            self.transport.flush()
            self.crash()
        if self._invariants is not None:
            self._invariants.check(self)

    def sends(self, target: str, message: Any, frame: bytes) -> None:
        """A message leaves this node."""
        self.world.mark(b"%s>%s " % (self.name.encode(), target.encode()) + frame)
        if self.world.is_told:
            self.world.tell(f"{self.name} -> {target}: {describe(message)}")
        if self._invariants is not None:
            self._invariants.sent(self, target, message)
        if isinstance(message, SnapshotAnswer) and message.data and not message.match:
            has = self.disk.incoming
            assert (has.transfer, has.seq) >= (message.transfer, message.seq) or has.term > message.term, (
                f"disk before words: {self.name} has taken chunk {message.seq} of {message.transfer}, on disk is {has}"
            )

    # --- the disk ---

    def before_write(self, entries: int) -> None:
        """A write with so many new entries is about to begin."""
        if entries and self.room < self.settings.reserve_bytes // 2 and self.is_up and self._followed:
            assert self.raft.role is not Role.FOLLOWER, (
                f"a follower keeps room for its ballot: {self.name} takes {entries} entries with {self.room} bytes left"
            )
        if self.crash_at is CrashPoint.BEFORE_WRITE:
            raise Crash
        if self.slow_disk:
            self._busy_until = self.local_now + self.slow_disk * self.chance.random()

    def after_write(self) -> None:
        """A write has ended well."""
        disk = self.disk
        if self.world.is_told:
            ballot = f"term {disk.ballot.term}, vote {disk.ballot.voted_for}"
            self.world.tell(f"{self.name} disk: {ballot}, log up to {disk.last.id}, commit {disk.commit_id}")
        if self.crash_at is CrashPoint.AFTER_WRITE:
            raise Crash

    # --- life and death ---

    @property
    def is_uninvited(self) -> bool:
        """A guest that nobody has taken yet: it can't start."""
        return self.is_guest and self._invitation is None

    def join(self, cluster: str, membership: Membership) -> None:
        """A guest was taken: it starts as a member of this cluster."""
        self._invitation = (cluster, membership)
        self.disk = Mirror(membership)
        self.start()

    def wipe(self) -> None:
        """kill -9, and the disk is lost: with the next start this is another node, which remembers nothing."""
        if self.is_up:
            self.crash()
        self.world.tell(f"{self.name} has lost its disk")
        if self._invariants is not None:
            self._invariants.lost(self)
        shutil.rmtree(self.directory)
        self.dies_in_start = False
        self.new_id = f"{self.chance.getrandbits(64):016x}"
        self._invitation = None
        self.is_guest = self.is_guest or not self._members  # it must not found the cluster again, alone
        self.disk = Mirror(Membership.founding([self.name, *self._members]))
        self.applied = []
        if self._invariants is not None:
            self._invariants.joined(self)

    def ask(self, message: AnyRequest, take: Callable[[Any], object]) -> None:
        """An administrator's request at this node; `take` gets the answer, if there is one."""
        session = Session("administrator", self.transport, lambda frame: take(decode_answer(frame)), lambda: None)
        self.transport.sessions.append(session)
        self.transport.receive([Arrival(message, session)], limited=True)

    def start(self) -> None:
        """Start from the directory alone."""
        assert self._election is None, f"{self.name} is up already"
        if self.is_uninvited:
            return
        self.world.mark(b"start " + self.name.encode())
        self.world.tell(f"{self.name} starts")
        self.starts += 1
        self.is_paused, self.crash_at, self.tears = False, None, False
        self.write_fault = self.tail_fault = None
        self._turn_planned, self._timer = False, next(self._timers)
        self._busy_until, self._followed = 0.0, False
        try:
            store = SimulatedStore(self)
        except Crash:
            self.world.tell(f"{self.name} dies in its start")
            return
        finally:
            self.dies_in_start = False
        if store.cluster_id is None and self._invitation is not None:
            store.adopt(self.name, *self._invitation)
        store.compare()
        self.applied = self.disk.entries[: self.disk.commit_id]
        transport = SimulatedTransport(self, self.fabric)
        transport.peers = self._members
        chance = random.Random(self.chance.getrandbits(64))
        self._election = Election(
            transport, store, transport.queue, clock=self.clock, wall_clock=self.wall_clock, chance=chance
        )
        if self._invariants is not None:
            self._invariants.restarted(self)
        self._live(self._election.init_timeout)
        self._turn_ended = self.clock()
        if self.is_up:
            self.transport.open_links()
            self.want_turn()

    def crash(self) -> None:
        """kill -9."""
        self.world.mark(b"crash " + self.name.encode())
        self.world.tell(f"{self.name} dies")
        self.transport.die()
        self.store.close()
        self._election, self.crash_at, self.tears = None, None, False
        self.write_fault = self.tail_fault = None
        self.applied = self.disk.entries[: self.disk.commit_id]

    def stop(self) -> None:
        """A clean stop: what is under way is given up at once, as when the grace is over."""
        self.world.tell(f"{self.name} is stopped")

        def stop() -> None:
            self.election.begin_stop()
            self.election.cycle()
            self.election.close()
            self.transport.flush()

        self.transport.fill_mailbox()
        self._live(stop)
        if self.is_up:
            self.crash()

    def pause(self) -> None:
        """SIGSTOP."""
        self.world.tell(f"{self.name} is paused")
        self.is_paused = True

    def resume(self) -> None:
        """SIGCONT: what has arrived meanwhile is taken in one turn."""
        self.world.tell(f"{self.name} goes on")
        self.is_paused = False
        self._timer = next(self._timers)
        self.want_turn()
