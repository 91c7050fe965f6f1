"""The replicated state: what each committed command does to the namespaces. Layer 1, pure.

Every node applies the same entries in the same order to the same state, so nothing here may look at a clock, a random
number, the order of a set or an error of this machine (TRAPS 26).

Effects are applied here first and reach the disk later. Until then reads find them here, before they look at the disk:
an acknowledged write is always seen.

**A flush** takes to the disk what has collected up to one commit_id, some keys in each of several transactions, in the
order of the keys: neighbours share pages, and no transaction is long. Meanwhile the disk is `Behind`: keys below one
point are as of the new commit_id, those from there on as of the one before, and the log has what is between. So every
state between two transactions is a known one. This rests on an entry reading and changing one key only. Who adds one
that reads or changes several has to see that no flush is under way when it is applied, or a restart would carry it out
on values of two times.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from msgspec import Raw, Struct

from raftnode.messages import Change, Effect, Entry, decode_effect
from raftnode.records import Record


class Outcome(Struct, frozen=True, gc=False):
    """What an entry did; what its client is told."""

    commit_id: int
    version: int = 0
    """Version of the value it wrote; 0 when it wrote none."""
    replaced: int | None = None
    """commit_id of the value that was there before."""


_UNCHANGED: Final = Record(0, 0, 0, 0, Raw())
"""Stands for no change, where None stands for a deleted value."""


class Behind(Struct, frozen=True):
    """On disk, while a flush is under way: the values of the store keys from `key` on are still as of commit_id
    `after`, all others as of the commit_id on disk. The log has every entry past `after`."""

    after: int
    key: str

    @property
    def store_key(self) -> bytes:
        return self.key.encode()

    def lacks(self, commit_id: int, effect: Effect) -> bool:
        """True when what a committed entry has done is not in the values on disk yet."""
        return commit_id > self.after and isinstance(effect, Change) and effect.key >= self.store_key

    def contradiction(self, base: int, commit_id: int) -> str:
        """What can't be true in a directory whose log begins after `base`, in words; "" when all can."""
        if base <= self.after < commit_id:
            return ""
        values = f"values are as of {self.after} still, by the record 'behind' of the node"
        return f"{values}, but the log begins after {base}, and {commit_id} is committed"


Changes: TypeAlias = dict[bytes, Record | None]
"""By store key: the value to write, or None to delete it."""


class Namespaces:
    """The committed values: those on disk, and over them the changes that are not there yet."""

    def __init__(self) -> None:
        self.changes: Changes = {}
        """Those since the last flush began."""
        self.leaving: Changes = {}
        """Those of the flush that is under way, to its end: some of them may be on disk by now."""
        self._order: list[bytes] = []  # their keys, as they go
        self._gone = 0  # so many of them are on disk

    @property
    def left(self) -> int:
        """How many changes of the flush that is under way are not on disk yet."""
        return len(self._order) - self._gone

    def apply(
        self,
        entry: Entry,
        on_disk: Callable[[bytes], Record | None],
        changed: Callable[[bytes], object] = lambda _key: None,
        effect: Effect | None = None,
    ) -> Outcome:
        """Carry out one committed entry; `changed` is told the store key of the value that it has changed. `effect`:
        what its command does, if that was decoded before."""
        effect = effect or decode_effect(entry.command)
        if not isinstance(effect, Change):
            return Outcome(entry.commit_id)
        key, value, before = effect.key, effect.value, self.find(effect.key, on_disk)
        replaced = None if before is None else before.modified
        if value is None:
            if before is not None:
                changed(key)
                self.changes[key] = None
            return Outcome(entry.commit_id, replaced=replaced)
        created, version = (entry.commit_id, 1) if before is None else (before.created, before.version + 1)
        changed(key)
        self.changes[key] = Record(created, entry.commit_id, version, 0, value)
        return Outcome(entry.commit_id, version, replaced)

    def find(self, key: bytes, on_disk: Callable[[bytes], Record | None]) -> Record | None:
        """The value under a store key, with every applied entry seen."""
        change = self.changes.get(key, _UNCHANGED)
        if change is _UNCHANGED:
            change = self.leaving.get(key, _UNCHANGED)
        return on_disk(key) if change is _UNCHANGED else change

    def waiting(self) -> Changes:
        """All changes that are not on disk yet, as they are now."""
        return {**{key: self.leaving[key] for key in self._order[self._gone :]}, **self.changes}

    def waiting_between(self, after: bytes, last: bytes | None) -> list[bytes]:
        """The keys of these changes past `after`, up to `last`; None: to the end. Some may come twice."""
        order = self._order
        first = max(self._gone, bisect_right(order, after))
        end = len(order) if last is None else bisect_right(order, last)
        return order[first:end] + [key for key in self.changes if key > after and (last is None or key <= last)]

    def begin_flush(self) -> None:
        """All that is not on disk yet is on its way there from now on. If a flush was under way, what is left of it can
        only be written together with the rest, in one transaction."""
        self.leaving = self.waiting() if self.left else self.changes
        self.changes, self._order, self._gone = {}, sorted(self.leaving), 0

    def next(self, count: int | None) -> tuple[Changes, bytes | None]:
        """The next `count` of those that are leaving (None: all), and the key that follows; None when none does."""
        first, last = self._gone, len(self._order) if count is None else self._gone + count
        following = self._order[last] if last < len(self._order) else None
        return {key: self.leaving[key] for key in self._order[first:last]}, following

    def written(self, changes: Changes) -> None:
        """These, of those that were leaving, are on disk."""
        self._gone += len(changes)
        if self._gone == len(self._order):
            self.leaving, self._order, self._gone = {}, [], 0

    def resume_flush(self, behind: Behind, entries: Sequence[Entry], on_disk: Callable[[bytes], Record | None]) -> None:
        """After a restart: carry out again, from the entries past `behind.after` up to the commit_id on disk, what was
        still to be written."""
        for entry in entries:
            effect = decode_effect(entry.command)
            if behind.lacks(entry.commit_id, effect):
                self.apply(entry, on_disk, effect=effect)
        self.begin_flush()
