"""Compaction: the log ends somewhere. Layer 2, part of the store.

The log keeps `log_entries` entries, or `log_bytes` of them, behind commit_id; the older ones are deleted. The point
where the kept log begins, its *base*, is a fact of the node: id and rolling checksum of the newest entry that is gone
(thesis 5.1). So the first kept entry is still checked, against the base.

**No pause.** Entries are deleted in transactions that happen anyway, about twice as many as have come. LMDB uses
their pages again, so the file levels off too. Nothing is copied: the state is in the same file, as of commit_id.

**What may go**: only what has been applied on disk. A transaction has the effects of all entries up to its commit_id,
so a restart needs none of these. A member that lacks an entry that is gone gets a snapshot (`raftnode.snapshots`).
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
        self, txn: lmdb.Transaction, db: lmdb._Database, base: Mark, commit_id: int, added: int, added_bytes: int
    ) -> Mark:
        """With this transaction `added` entries, of so many bytes, come to what is kept behind `commit_id`. Delete the
        oldest, as many as are too many, but not many more than these. Returns the new base."""
        self.size += added_bytes
        if not self._is_too_long(commit_id - base.id.commit_id):
            return base
        entries = max(self._settings.compaction_step, 2 * added)
        size = max(self._settings.compaction_bytes, 2 * added_bytes)
        with txn.cursor(db) as cursor:
            cursor.first()
            while entries > 0 and size > 0 and self._is_too_long(commit_id - base.id.commit_id):
                entry = self._oldest(cursor, base)
                cursor.delete()
                base = Mark(entry.id, entry.checksum)
                self.size -= entry.size
                entries, size = entries - 1, size - entry.size
        return base

    def _is_too_long(self, count: int) -> bool:
        return count > 1 and (count > self._settings.log_entries or self.size > self._settings.log_bytes)

    @staticmethod
    def _oldest(cursor: lmdb.Cursor, base: Mark) -> Entry:
        """The entry after the base, where a cursor must stand. Raises StoreDamaged."""
        wanted = base.id.commit_id + 1
        found = records.position_of(bytes(cursor.key()))
        if found != wanted:
            raise StoreDamaged(f"the log should begin with entry {wanted}, but begins with {found}", wanted)
        return records.unpack_entry(found, bytes(cursor.value()))
