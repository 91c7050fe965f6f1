"""Compaction: the log ends somewhere. Layer 2, part of the store.

The log keeps `log_entries` entries behind commit_id, or those that fit into `log_bytes` of the file; the older ones are
deleted. The point where the kept log begins, its *base*, is a fact of the node: id and rolling checksum of the newest
entry that is gone (thesis 5.1). So the first kept entry is still checked, against the base.

**No pause.** Entries are deleted in transactions that happen anyway, about twice as many as these append. LMDB uses
their pages again, so the file levels off too. Nothing is copied: the state is in the same file.

**What may go**: only what has been applied on disk, to every key: a restart needs none of that. A member that lacks an
entry that is gone gets a snapshot (`raftnode.snapshots`).
"""

from __future__ import annotations

from typing import Final

import lmdb

from raftnode import records
from raftnode.config import Settings
from raftnode.consensus.journal import Mark
from raftnode.errors import StoreDamaged
from raftnode.messages import Entry

_LOOK: Final = 16
"""After so many entries it is looked again whether the log is still too long."""


class Retention:
    """How much of the log is kept."""

    def __init__(self, settings: Settings, log: lmdb._Database) -> None:
        self._settings = settings
        self._log = log

    def shorten(self, txn: lmdb.Transaction, base: Mark, applied: int, commit_id: int, count: int, size: int) -> Mark:
        """Delete the oldest entries, as many as are too many behind `commit_id`, but none past `applied`, and not many
        more than twice `count`, or twice `size` bytes of them. Returns the new base.

        Nothing rests on what goes any more, so only the last of some is looked at: a look at each, or just at its size,
        takes 1 us a put and more, a twentieth of all that a put costs a node."""
        first = base.id.commit_id
        kept = commit_id - first
        most = min(max(self._settings.compaction_step, 2 * count), applied - first)
        now = self._size(txn, kept)
        least = now - max(self._settings.compaction_bytes, 2 * size)
        step = min(most, self._excess(kept, now))
        if step < 1:
            return base
        with txn.cursor(self._log) as cursor:
            cursor.first()
            while step > 0 and now > least:
                for _ in range(step - 1):
                    cursor.delete()
                newest = self._entry_at(cursor, commit_id - kept + step)
                cursor.delete()
                base = Mark(newest.id, newest.checksum)
                most, kept = most - step, kept - step
                now = self._size(txn, kept)
                step = min(most, self._excess(kept, now))
        return base

    def _excess(self, kept: int, size: int) -> int:
        """How many of so many entries of this size should go before the next look, as far as can be told."""
        too_many = kept - self._settings.log_entries
        if size > (most := self._settings.log_bytes):
            too_many = max(too_many, 1 + (size - most) * kept // size)
        return min(too_many, kept - 1, _LOOK)

    def _size(self, txn: lmdb.Transaction, kept: int) -> int:
        """What so many entries of the log take of the file, in bytes: their share of its pages, as if all entries were
        alike."""
        log = txn.stat(self._log)
        pages = log["leaf_pages"] + log["branch_pages"] + log["overflow_pages"]
        return int(pages * log["psize"] * kept // max(1, log["entries"]))

    @staticmethod
    def _entry_at(cursor: lmdb.Cursor, wanted: int) -> Entry:
        """The entry where a cursor stands. If it is the one that should be there, none is missing before it. Raises
        StoreDamaged."""
        found = records.position_of(bytes(cursor.key()))
        if found != wanted:
            raise StoreDamaged(f"the log should have entry {wanted} here, but it has {found}", wanted)
        return records.unpack_entry(found, bytes(cursor.value()))
