"""When the effects of committed entries go to the disk. Part of the driver (layer 3).

They lose nothing by waiting: they are in the log of a majority, reads see them in memory, and a restart carries out
again what the disk lacks. They gain by it: a page of LMDB that several of them change is written once, and the more
have collected, the more of them are neighbours. Then they go along with the entries of the next transactions, some at a
time, as fast as others collect (`namespaces` tells how the disk stays a known state meanwhile). So every transaction is
about as long as every other one. Written all at once they made the slowest of a hundred requests two to five times as
slow as most.

When few come, they wait only for a moment, so that who looks at the directory sees them.
"""

from __future__ import annotations

from typing import Final

from raftnode.config import Settings
from raftnode.store import Store

_HASTE: Final = 1.25
"""They go so much faster than others collect, so that they are gone before there are as many again."""
_ALONE: Final = 32
"""So many times `flush_step` go in a transaction of their own: it takes some 10 ms."""
_PATIENCE: Final = 20
"""However slowly they collect, they wait no longer than so many times `flush_delay_ms`."""
_NEVER: Final = float("inf")


class Flushing:
    """Decides when the effects that a store has in memory are written, and how many of them at a time."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._entries = settings.flush_entries
        self._bytes = max(1, min(settings.flush_bytes, settings.reserve_bytes // 8))  # there must be room for them
        self._step = settings.flush_step
        self._delay = settings.flush_delay_ms / 1000
        self._since: float | None = None  # when the first was seen that waits for a flush to begin
        self._newest, self._came = 0, 0.0  # the commit_id that was seen last, and when it was seen first

    def along(self, now: float) -> int:
        """How many changed values should go along with a transaction that has something else to write."""
        store = self._store
        if store.behind is not None:
            on_time = len(store.namespaces.leaving) * max(0.0, 1 - _HASTE * self._collected())
            return max(self._at_least(), store.namespaces.left - int(on_time))
        is_late = self._since is not None and now >= self._since + _PATIENCE * self._delay
        if not is_late and self._collected() < 1:
            return 0
        self._since = now
        return self._at_least()

    def _at_least(self) -> int:
        """... while there are some to go. The transaction after many writes to the tail has more along: for each entry
        that it takes over one and a quarter, or they would fall behind."""
        return max(self._step, int(_HASTE * self._store.entries_in_tail))

    def _collected(self) -> float:
        """How much was carried out since the last flush began, as a part of what may collect before the next one."""
        store = self._store
        entries = store.commit_id - store.commit_id_on_disk
        return max(entries / self._entries, store.waiting_bytes / self._bytes)

    def alone(self, now: float) -> int:
        """How many should have a transaction of their own, at the end of a turn; 0 when none is due, as entries that
        could take them along come all the time, or nothing waits. It is for the rests of an old state as well."""
        return _ALONE * self._step if now >= self.due(now) else 0

    def due(self, now: float) -> float:
        """When `alone` should be asked at the latest."""
        store = self._store
        if not store.has_effects and not store.has_leftover:
            self._since = None
            return _NEVER
        if self._since is None:
            self._since = self._came = now
        if self._newest != store.commit_id:
            self._newest, self._came = store.commit_id, now
        return self._came + self._delay

    def written_alone(self) -> None:
        """Such a transaction is done. Rests are not urgent; effects that are left follow at once."""
        if not self._store.has_effects:
            self._since = None
