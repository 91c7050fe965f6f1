"""Compaction: the log ends somewhere. Layer 2, part of the store.

The log keeps `log_entries` entries, or `log_bytes` of them, behind commit_id; the older ones are deleted. The point
where the kept log begins, its *base*, is a fact of the node: id and rolling checksum of the newest entry that is gone
(thesis 5.1). So the first kept entry is still checked, against the base.

**No pause.** Entries are deleted in transactions that happen anyway, about twice as many as these append. LMDB uses
their pages again, so the file levels off too. Nothing is copied: the state is in the same file.

**What may go**: only what has been applied on disk, to every key: a restart needs none of that. A member that lacks an
entry that is gone gets a snapshot (`raftnode.snapshots`).
"""

from __future__ import annotations

import lmdb

from raftnode import records
from raftnode.config import Settings
from raftnode.consensus.journal import Mark
from raftnode.errors import StoreDamaged
from raftnode.messages import Entry


class Retention:
    """How much of the log is kept. Invariant: `size` is that of the commands from the base to the commit_id on disk, in
    bytes."""

    def __init__(self, settings: Settings, size: int) -> None:
        self.size = size
        self._settings = settings

    def shorten(
        self, txn: lmdb.Transaction, db: lmdb._Database, base: Mark, applied: int, commit_id: int, count: int, size: int
    ) -> Mark:
        """Delete the oldest entries, as many as are too many behind `commit_id`, but none past `applied`, and not many
        more than twice `count`, or twice `size` bytes of them. Returns the new base.

        Nothing rests on what goes any more, so only the last of it is looked at: a look at each takes 1.5 us a put, a
        fifteenth of all that a put costs a node."""
        kept, may_go = commit_id - base.id.commit_id, applied - base.id.commit_id
        if not may_go or not self._is_too_long(kept, self.size):
            return base
        most = min(max(self._settings.compaction_step, 2 * count), may_go)
        most_bytes = max(self._settings.compaction_bytes, 2 * size)
        with txn.cursor(db) as cursor:
            gone = freed = 0
            for _, record in cursor.iternext():
                if gone >= most or freed >= most_bytes or not self._is_too_long(kept - gone, self.size - freed):
                    break
                gone, freed = gone + 1, freed + records.size_of_command(bytes(record))
            cursor.first()
            for _ in range(gone - 1):
                cursor.delete()
            newest = self._entry_at(cursor, base.id.commit_id + gone)
            cursor.delete()
        self.size -= freed
        return Mark(newest.id, newest.checksum)

    def _is_too_long(self, count: int, size: int) -> bool:
        return count > 1 and (count > self._settings.log_entries or size > self._settings.log_bytes)

    @staticmethod
    def _entry_at(cursor: lmdb.Cursor, wanted: int) -> Entry:
        """The entry where a cursor stands. If it is the one that should be there, none is missing before it. Raises
        StoreDamaged."""
        found = records.position_of(bytes(cursor.key()))
        if found != wanted:
            raise StoreDamaged(f"the log should have entry {wanted} here, but it has {found}", wanted)
        return records.unpack_entry(found, bytes(cursor.value()))
