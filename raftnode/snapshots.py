"""Snapshots: the whole state on its way to a member that lacks entries which the leader's log no longer has (thesis
5.3). Part of the driver (layer 3).

**The state changes while it is sent**, and to hold one view of it until all is sent would keep LMDB from using any page
again: the file would grow as long as that takes. So it is copied as running machines are moved (pre-copy):

* first all keys in order, a chunk at a time, each chunk read in a view of its own that ends with it. Keys up to there
  that are written meanwhile are remembered (*tracked*);
* then the tracked keys, as they are by then, or that they are gone, until the rest fits into one chunk;
* that last chunk is read in one view, at exactly the commit_id that is applied then. With it the receiver has the state
  as of that commit_id: each key was sent after it was last written. It carries the id and the rolling checksum of that
  entry, the membership, and the number of keys, by which the receiver checks that nothing is missing.

So the snapshot is fresh when it ends, no part of the log has to be held back for it, and nobody keeps more of it in
memory than a chunk and the tracked keys. When more is written than is sent, each pass over what was tracked is twice as
fast as the one before, and its chunks are larger; when more keys are tracked than memory is meant for, all begins anew.

**One chunk at a time** is under way to a member, and kept until it is answered: then the next is read. When a link is
cut, or an answer does not come, the same chunk is sent again; the receiver, which keeps on disk how far it has come,
also after a restart, acknowledges again what it has. Heartbeats and everything else go on all the while.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec
from msgspec import UNSET, Struct, UnsetType

from raftnode import records
from raftnode.config import Settings
from raftnode.consensus.raft import Raft
from raftnode.errors import ProtocolError, StoreDamaged
from raftnode.mailbox import Arrival
from raftnode.messages import Snapshot, SnapshotAnswer, SnapshotEnd, SnapshotRecord
from raftnode.states import check_chunk
from raftnode.store import Store
from raftnode.transport import Transport

_NEVER: Final = float("inf")
_DOUBLINGS: Final = 16
_NUMBERS: Final = 96
"""Bytes of a record on the wire besides its key and its value, about."""


class Overflow(Exception):
    """More keys were written during a transfer than may be tracked."""


class Chunk(Struct):
    """A part of the state. Invariant: with an `end` it is the last one."""

    records: list[SnapshotRecord] = []
    gone: list[tuple[str, str]] = []
    end: SnapshotEnd | UnsetType = UNSET
    size: int = 0
    """On the wire, about."""


class Transfer:
    """The state on its way out, chunk by chunk. To be closed at the end.

    Invariant: every key has been sent since it was last written, or is tracked, or is still ahead of the walk.
    """

    def __init__(self, store: Store) -> None:
        self.passes = 0
        """Over the keys that were written meanwhile."""
        self.walked: bytes | None = b""
        """All keys up to here have been sent; None when all have."""
        self._store = store
        self._tracked: dict[bytes, None] = {}  # a set that keeps its order
        self._left_of_pass = 0
        store.trackers.append(self._track)

    def close(self) -> None:
        """Nothing more is tracked. May be called twice."""
        if self._track in self._store.trackers:
            self._store.trackers.remove(self._track)

    def _track(self, key: bytes) -> None:
        if self.walked is None or key <= self.walked:
            self._tracked[key] = None

    def next(self, size: int) -> Chunk:
        """The next chunk, of `size` bytes or a little more, but with one value at least; the last one has an `end`.
        Raises Overflow, and StoreDamaged when a value does not match its checksum."""
        chunk = Chunk()
        with self._store.view() as txn:
            if self.walked is not None:
                self._walk(txn, chunk, size)
            if self.walked is None:
                self._send_again(chunk, size)
                if not self._tracked:
                    chunk.end = self._end(txn)
        if len(self._tracked) > self._store.settings.snapshot_tracked_keys:
            raise Overflow
        return chunk

    def _walk(self, txn: Any, chunk: Chunk, size: int) -> None:
        """Keys in order, from the disk. What has been applied and is not there yet is tracked as it is passed."""
        begin, end = self.walked, None
        assert begin is not None, "there is more to walk"
        for key, stored in self._store.states.walk(txn, begin):
            if chunk.size >= size:
                break
            self._add(chunk, key, records.unpack_record(key, stored))
            end = key
        else:
            end = None
        self.walked = end
        self._tracked.update(dict.fromkeys(self._store.namespaces.waiting_between(begin, end)))

    def _send_again(self, chunk: Chunk, size: int) -> None:
        """Tracked keys, the oldest first, as they are now."""
        with self._store.snapshot() as find:
            while self._tracked and (chunk.size < size or not chunk.size):
                if not self._left_of_pass:
                    self.passes += 1
                    self._left_of_pass = len(self._tracked)
                self._left_of_pass -= 1
                key = next(iter(self._tracked))
                del self._tracked[key]
                self._add(chunk, key, find(key))

    @staticmethod
    def _add(chunk: Chunk, key: bytes, record: records.Record | None) -> None:
        namespace, _, name = key.decode().partition("\0")
        chunk.size += len(msgspec.json.encode(name)) + len(namespace) + _NUMBERS
        if record is None:
            chunk.gone.append((namespace, name))
            return
        checksum = int.from_bytes(records.pack_record(key, record)[:4])
        numbers = (record.created, record.modified, record.version, record.lease)
        chunk.records.append(SnapshotRecord(namespace, name, *numbers, checksum, record.value))
        chunk.size += len(memoryview(record.value))

    def _end(self, txn: Any) -> SnapshotEnd:
        """Of the state as it is applied now."""
        store, journal = self._store, self._store.journal
        mark = journal.mark_at(store.commit_id)
        return SnapshotEnd(
            id=mark.id,
            checksum=mark.checksum,
            keys=self._count(txn),
            membership=msgspec.Raw(msgspec.json.encode(journal.committed_membership(store.commit_id))),
        )

    def count(self) -> int:
        """How many keys the state has, as it is applied now."""
        with self._store.view() as txn:
            return self._count(txn)

    def _count(self, txn: Any) -> int:
        return self._store.states.count(txn) + sum(self._added(txn))

    def _added(self, txn: Any) -> Iterator[int]:
        """What each change that is not on disk yet does to the number of keys."""
        for key, record in self._store.namespaces.waiting().items():
            yield (record is not None) - (txn.get(key, db=self._store.states.db) is not None)


class Pace:
    """How fast a transfer goes: at the rate of the settings, and twice as fast with each further pass over what was
    written meanwhile, so that it comes to an end."""

    def __init__(self, settings: Settings, haste: int = 0) -> None:
        """`haste`: how many times the speed is doubled from the beginning."""
        self.haste = haste
        self._settings = settings

    def _doublings(self, transfer: Transfer) -> int:
        return min(self.haste + max(0, transfer.passes - 1), _DOUBLINGS)

    def chunk_bytes(self, transfer: Transfer) -> int:
        """The size of the next chunk, about."""
        size = self._settings.snapshot_chunk_bytes
        return min(size << self._doublings(transfer), max(size, self._settings.batch_bytes))

    def pause(self, transfer: Transfer, size: int) -> float:
        """Seconds to wait after `size` bytes."""
        return size / (self._settings.snapshot_bytes_per_s << self._doublings(transfer))


class _Outgoing:
    """One transfer to one member. Invariant: `message` is the one chunk that was read and is not acknowledged."""

    def __init__(self, store: Store, term: int, number: int, now: float, pace: Pace) -> None:
        self.transfer = Transfer(store)
        self.pace = pace
        self.term = term
        self.number = number
        self.began = now
        self.due = now
        """When to send next."""
        self.message: Snapshot | None = None
        self.size = 0
        self.seq = 0
        self.sent_bytes = 0
        self.sent_keys = 0
        self.complaint = ""


class Snapshots:
    """All snapshots that this node sends, as leader, and what it does with those that come in."""

    def __init__(self, raft: Raft, store: Store, transport: Transport, settings: Settings, log: Any) -> None:
        self._raft = raft
        self._store = store
        self._transport = transport
        self._settings = settings
        self._log = log
        self._numbers = 0
        self._outgoing: dict[str, _Outgoing] = {}

    # --- the leader's side ---

    def send(self, now: float) -> None:
        """Send what is due, at the end of a turn: all that is committed is applied then, and what is applied is on the
        disks of a majority."""
        lacking = self._raft.lacking
        if not lacking and not self._outgoing:
            return
        for peer, out in list(self._outgoing.items()):
            if peer not in lacking or out.term != self._raft.term:
                out.transfer.close()
                del self._outgoing[peer]
        for peer in lacking:
            if peer not in self._outgoing:
                self._begin(peer, now, haste=0)
            if self._outgoing[peer].due <= now and peer in self._transport.live:
                self._send(peer, self._outgoing[peer], now)

    def due(self) -> float:
        """When `send` should be called at the latest."""
        if not self._outgoing:
            return _NEVER
        live = self._transport.live
        return min((out.due for peer, out in self._outgoing.items() if peer in live), default=_NEVER)

    def _begin(self, peer: str, now: float, haste: int) -> None:
        if (before := self._outgoing.pop(peer, None)) is not None:
            before.transfer.close()
        self._numbers += 1
        pace = Pace(self._settings, haste)
        self._outgoing[peer] = _Outgoing(self._store, self._raft.term, self._numbers, now, pace)
        self._log.info("snapshot_begun", peer=peer, transfer=self._numbers, commit_id=self._store.commit_id)

    def _send(self, peer: str, out: _Outgoing, now: float) -> None:
        """The chunk that was not answered, or the next one."""
        if out.message is None:
            try:
                self._read(out)
            except Overflow:
                self._log.warning("snapshot_begins_anew", peer=peer, why="too much is written meanwhile")
                self._begin(peer, now, out.pace.haste + 1)
                return
            except StoreDamaged as damage:
                self._complain(peer, out, str(damage))
                self._begin(peer, now + self._settings.request_timeout_ms / 1000, out.pace.haste)
                return
        assert out.message is not None, "it was read"
        self._transport.post(peer, out.message)
        out.due = now + self._settings.election_high_ms / 1000  # unless it is answered before

    def _read(self, out: _Outgoing) -> None:
        raft, chunk = self._raft, out.transfer.next(out.pace.chunk_bytes(out.transfer))
        out.seq += 1
        out.size = chunk.size
        out.message = Snapshot(
            term=out.term,
            leader=raft.me,
            transfer=out.number,
            seq=out.seq,
            records=chunk.records,
            gone=chunk.gone,
            end=chunk.end,
        )

    def take(self, peer: str, answer: SnapshotAnswer, now: float) -> None:
        """An answer of a member; one to another chunk than the one under way says nothing."""
        out = self._outgoing.get(peer)
        if out is None or out.message is None or answer.term != out.term:
            return
        if (answer.transfer, answer.seq) != (out.number, out.seq):
            return
        if answer.match:
            self._end(peer, out, answer.match, now)
        elif answer.data and out.message.end is UNSET:
            out.sent_bytes += out.size
            out.sent_keys += len(out.message.records)
            out.message = None
            out.due = now + out.pace.pause(
                out.transfer, out.size * len(self._outgoing)
            )  # all together keep to the rate
        elif answer.reason == "restart":
            self._begin(peer, now, out.pace.haste)
        else:
            out.due = now + self._settings.heartbeat_ms / 1000
            if answer.reason not in ("", "busy"):
                self._complain(peer, out, f"{peer} takes no snapshot: {answer.reason}")

    def _end(self, peer: str, out: _Outgoing, match: int, now: float) -> None:
        out.transfer.close()
        del self._outgoing[peer]
        self._log.info(
            "snapshot_sent",
            peer=peer,
            transfer=out.number,
            commit_id=match,
            chunks=out.seq,
            bytes=out.sent_bytes + out.size,
            passes=out.transfer.passes,
            seconds=round(now - out.began, 3),
        )

    def _complain(self, peer: str, out: _Outgoing, why: str) -> None:
        if out.complaint != why:
            out.complaint = why
            self._log.error("snapshot_held_up", peer=peer, why=why)

    def unreachable(self, peer: str, now: float) -> None:
        """What was posted to a member may be lost."""
        if (out := self._outgoing.get(peer)) is not None:
            out.due = now

    def status(self) -> dict[str, dict[str, int]]:
        """By member: how much of its snapshot is sent."""
        return {
            peer: {"transfer": out.number, "chunks": out.seq, "keys": out.sent_keys, "bytes": out.sent_bytes}
            for peer, out in sorted(self._outgoing.items())
        }

    # --- the receiver's side ---

    def receive(self, arrival: Arrival, message: Snapshot, has_room: bool, is_first_hand: bool) -> None:
        """A chunk has arrived: the consensus takes it, if it is whole and there is room for it."""
        try:
            check_chunk(message)
        except ProtocolError as error:
            self._log.error("snapshot_damaged", leader=message.leader, why=str(error))
            self._raft.refuse_snapshot(arrival, message, "checksum")
            return
        if has_room:
            self._raft.step(arrival, message, is_first_hand)
        else:
            self._raft.refuse_snapshot(arrival, message, "storage_full")

    def installed(self, message: Snapshot) -> None:
        """The last chunk of a snapshot, with all before it, has become this node's state."""
        assert message.end is not UNSET, "the last chunk has an end"
        self._log.info(
            "snapshot_installed",
            leader=message.leader,
            transfer=message.transfer,
            chunks=message.seq,
            commit_id=message.end.id.commit_id,
            keys=message.end.keys,
        )
