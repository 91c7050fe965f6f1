"""The two databases of the state: one holds the committed values, the other is empty, or on its way in or out. Layer 2,
part of the store.

A snapshot comes in chunk by chunk into the one that is not the state, in the transactions that happen anyway, so reads
see the old state all the while. To install it is one transaction: the fact `state` names the other database, the log
is emptied, and base, commit_id and membership become those of the snapshot. Then the old state is *leftover*, as is
what came of a snapshot that was given up, and it is emptied in small steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import lmdb

from raftnode import records
from raftnode.config import Settings
from raftnode.environment import Environment
from raftnode.errors import ProtocolError
from raftnode.messages import Snapshot, SnapshotRecord, store_key


class States:
    """Which database is which. Invariant: `current` is what the fact `state` on disk says, between transactions."""

    def __init__(self, env: Environment, settings: Settings, current: bytes) -> None:
        self._env = env
        self._settings = settings
        self._use(current)

    def _use(self, name: bytes) -> None:
        self.current = name
        self._other = records.SECOND if name == records.COMMITTED else records.COMMITTED
        self.db = self._env.db(name)
        """The committed values."""

    def count(self, txn: lmdb.Transaction) -> int:
        """How many values are on disk."""
        return int(txn.stat(self.db)["entries"])

    def walk(self, txn: lmdb.Transaction, after: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The stored values in order of their keys, from past `after` on."""
        with txn.cursor(self.db) as cursor:
            if cursor.set_range(after + b"\0"):
                for key, stored in cursor:
                    yield bytes(key), bytes(stored)

    # --- on the way in ---

    def take(self, txn: lmdb.Transaction, chunk: Snapshot) -> None:
        """Put a chunk to what has come before; the first one takes the place of whatever was there."""
        db = self._env.db(self._other)
        if chunk.seq == 1:
            txn.drop(db, delete=False)
        for record in chunk.records:
            txn.put(*_packed(record), db=db)
        for namespace, key in chunk.gone:
            txn.delete(store_key(namespace, key), db=db)

    def count_incoming(self, txn: lmdb.Transaction) -> int:
        """How many values have come in."""
        return int(txn.stat(self._env.db(self._other))["entries"])

    def install(self, txn: lmdb.Transaction, keys: int) -> bool:
        """Let what has come in be the state from this transaction on; false when it lacks keys or has too many."""
        if self.count_incoming(txn) != keys:
            return False
        self._use(self._other)
        return True

    # --- on the way out ---

    def has_leftover(self, txn: lmdb.Transaction) -> bool:
        """True when the other database, into which nothing comes now, is not empty."""
        return bool(txn.stat(self._env.db(self._other))["entries"])

    def sweep(self, txn: lmdb.Transaction) -> bool:
        """Delete some of the leftover; true when there is more."""
        keys, size = self._settings.sweep_keys, self._settings.compaction_bytes
        with txn.cursor(self._env.db(self._other)) as cursor:
            there = cursor.first()
            while there and keys > 0 and size > 0:
                keys, size = keys - 1, size - len(cursor.value())
                there = cursor.delete()
        return self.has_leftover(txn)


_HEADER: Final = 4


def _packed(record: SnapshotRecord) -> tuple[bytes, bytes]:
    key = store_key(record.namespace, record.key)
    value = records.Record(record.created, record.modified, record.version, record.lease, record.value)
    return key, records.pack_record(key, value)


def check_chunk(chunk: Snapshot) -> None:
    """Hold each value of a chunk against the checksum that its sender has stored. Raises ProtocolError."""
    for namespace, name in chunk.gone:
        store_key(namespace, name)
    for record in chunk.records:
        _, stored = _packed(record)
        if int.from_bytes(stored[:_HEADER]) != record.checksum:
            raise ProtocolError("bad_request", "a value of the snapshot does not match its checksum")
