"""The replicated state: what each committed command does to the namespaces. Layer 1, pure.

Every node applies the same entries in the same order to the same state, so nothing here may look at a clock, a random
number, the order of a set or an error of this machine (TRAPS 26).

Effects are applied here first and reach the disk with a later transaction, together with their commit_id. Until then
reads find them in `changes`, before they look at the disk: an acknowledged write is always seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from msgspec import Raw, Struct

from raftnode.messages import Change, Effect, Entry, decode_effect
from raftnode.records import Record


class Outcome(Struct, frozen=True):
    """What an entry did; what its client is told."""

    commit_id: int
    version: int = 0
    """Version of the value it wrote; 0 when it wrote none."""
    replaced: int | None = None
    """commit_id of the value that was there before."""


_UNCHANGED: Final = Record(0, 0, 0, 0, Raw())
"""Stands for no change, where None stands for a deleted value."""


class Namespaces:
    """The committed values: those on disk, and over them the changes that are not there yet."""

    def __init__(self) -> None:
        self.changes: dict[bytes, Record | None] = {}
        """By store key: the value to write, or None to delete it. What applies them to the disk clears them."""

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
        return on_disk(key) if change is _UNCHANGED else change
