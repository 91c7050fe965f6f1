"""What lies over the values on disk while a flush is under way. Layer 5, part of `inspection`.

Then the disk is `Behind` (see `namespaces`): the values from one key on are older than the commit_id. Who reads a
directory wants one state, so the entries in between are carried out again for these keys, as a node does it at its
start, and what they make stands in the place of what is on disk.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from msgspec import Raw, Struct

from raftnode.messages import Change, Entry
from raftnode.namespaces import Behind, Changes, Namespaces
from raftnode.records import Record, pack_record

_UNKNOWN: Final = Record(0, 0, 0, 0, Raw(b"null"))
"""Stands for a value that is there and can't be read."""


class Below(Struct, frozen=True):
    """What the disk has of a key that such an entry changes."""

    record: Record | None
    """None when it can't be read."""
    damage: str = ""


class Overlay:
    """What the entries make of the values on disk, and what of these they were carried out on.

    Public facts: `changes` (by store key, in order: the value as of the commit_id, or None when it is deleted), `below`
    (what the disk has of the keys that the entries name, if it has something), `added` (the keys that the disk has
    not), `more` (how many values more than the disk it makes, or fewer), `damage` (why it may be wrong, in words).
    """

    def __init__(
        self,
        behind: Behind | None,
        commit_id: int | None,
        changes: Changes,
        below: dict[bytes, Below],
        damage: Sequence[str],
    ) -> None:
        self.changes, self.below, self.damage = changes, below, damage
        self.added = [key for key, record in changes.items() if record is not None and key not in below]
        self.more = len(self.added) - sum(record is None and key in below for key, record in changes.items())
        self._behind, self._commit_id = behind, commit_id

    def is_of(self, behind: Behind, commit_id: int | None) -> bool:
        """True when it fits a disk that is so far behind."""
        return (self._behind, self._commit_id) == (behind, commit_id)

    def goes_on_to(self, behind: Behind, commit_id: int | None) -> bool:
        """True when the same flush was under way when it was made, and has come farther since."""
        before = self._behind
        return before is not None and before.after == behind.after and self._commit_id == commit_id

    def shortened(self, behind: Behind) -> Overlay:
        """The same, when the flush has come farther: what is on disk by now lies no longer over it."""
        start = behind.store_key
        changes = {key: record for key, record in self.changes.items() if key >= start}
        below = {key: found for key, found in self.below.items() if key >= start}
        return Overlay(behind, self._commit_id, changes, below, self.damage)

    def concerns(self, start: bytes) -> bool:
        """True when some of the keys that begin with `start` may be under it."""
        key = b"" if self._behind is None else self._behind.store_key
        return key <= start or key.startswith(start)

    def added_from(self, position: bytes) -> list[bytes]:
        """The keys from one on that the disk has not."""
        return self.added[bisect_left(self.added, position) :]

    def between(self, start: bytes, end: bytes | None) -> Iterator[bytes]:
        """Its keys from `start` to before `end`; None: all that follow."""
        for key in self.changes:
            if key >= start and (end is None or key < end):
                yield key

    def size_of(self, key: bytes) -> int | None:
        """How many bytes a value of `changes` takes on disk; None when it is deleted."""
        record = self.changes[key]
        return None if record is None else len(pack_record(key, record))

    def damage_of(self, key: bytes) -> str:
        """What is wrong with the value on disk under a key of `changes`."""
        below = self.below.get(key)
        if below is None or not below.damage or self._behind is None:
            return ""
        on_disk = f"{below.damage}: it is on disk as of commit_id {self._behind.after}"
        if self.changes[key] is None:
            return f"{on_disk}, and was deleted since"
        return f"{on_disk}; the log has a newer value, of which created and version may be wrong for this reason"


def carry_out(
    behind: Behind,
    commit_id: int | None,
    changes: Iterable[tuple[Entry, Change]],
    on_disk: Callable[[bytes], Below | None],
    damage: list[str],
) -> Overlay:
    """Carry out `changes`, those of the entries past `behind.after` that are to be seen. To `damage` may come more
    while they are read."""
    namespaces = Namespaces()
    seen: dict[bytes, Below | None] = {}

    def find(key: bytes) -> Record | None:
        if key not in seen:
            seen[key] = on_disk(key)
        below = seen[key]
        return None if below is None else below.record or _UNKNOWN

    for entry, change in changes:
        namespaces.apply(entry, find, effect=change)
    ordered = {key: namespaces.changes[key] for key in sorted(namespaces.changes)}
    return Overlay(behind, commit_id, ordered, {key: below for key, below in seen.items() if below is not None}, damage)
