"""When the effects of committed entries go to the disk. Part of the driver (layer 3).

They lose nothing by waiting: they are in the log of a majority, reads see them in memory, and a restart carries out
again what is above the commit_id on disk. They gain by it: a page of LMDB that several batches change is written once.
But a member that writes many is slow for a moment. So

    a leader    takes them along with its next entries, while the others write theirs: all clients wait for it
    a follower  collects more, and writes them when it has acknowledged its entries: nobody waits for it then
    everyone    does it at entries of its own, so that a majority is not slow at that time; the followers begin when
                the leader is done, and are done before its next time

and when few come, they wait only for a moment, so that who looks at the directory sees them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from raftnode.config import Settings
from raftnode.store import Store

_FOLLOWERS: Final = 4
"""A follower collects so many times as much as a leader."""
_FEW: Final = 8
"""So small a part of `flush_entries` is little: it waits no longer than `flush_delay_ms` ..."""
_BUSY: Final = 5
"""... and more than that, so many times as long."""
_AFTER: Final = 8
"""A follower begins this part of `flush_entries` after the leader. Without it the p99 of 100 clients is 27 ms, with it
22: a leader whose time comes while a follower writes has only the other one, and finds the disk busy."""
_NEVER: Final = float("inf")


class Flushing:
    """Decides when the effects that a store has in memory are written."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._entries = settings.flush_entries
        self._bytes = min(settings.flush_bytes, settings.reserve_bytes // 8)  # there must be room for them
        self._delay = settings.flush_delay_ms / 1000
        self._is_leader = False
        self._step, self._first = self._entries, 0
        self._since: float | None = None  # when the oldest that waits was seen

    def take_turns(self, me: str, members: Sequence[str], leader: str | None) -> None:
        """Find this member's own entries to do it at: the leader has the multiples of `flush_entries`, and each
        follower one of four, a little later."""
        self._is_leader = me == leader
        followers = [member for member in members if member != leader]
        if me in followers:
            turn = _FOLLOWERS * followers.index(me) // len(followers)
            self._step, self._first = _FOLLOWERS * self._entries, turn * self._entries + self._entries // _AFTER
        else:
            self._step, self._first = self._entries, 0

    def goes_along(self) -> bool:
        """True when a leader's next transaction should take them along."""
        return self._is_leader and self._are_many()

    def is_due(self, now: float) -> bool:
        """True when they should have a transaction of their own, at the end of a turn."""
        store = self._store
        if not store.has_effects and not store.has_leftover:
            self._since = None
            return False
        if self._since is None:
            self._since = now
        if now >= self._late_at(self._since) or store.waiting_bytes >= self._bytes:
            return True
        return self._are_many() and not self._is_leader

    def due(self, now: float) -> float:
        """When `is_due` should be asked at the latest."""
        if self._since is None and not self._store.has_effects and not self._store.has_leftover:
            return _NEVER
        return self._late_at(now if self._since is None else self._since)

    def written(self) -> None:
        """They are on the disk."""
        self._since = None

    def _are_many(self) -> bool:
        """Once in so many entries, or when commands of so many bytes have collected."""
        store, step, first = self._store, self._step, self._first
        is_past = (store.commit_id - first) // step > (store.commit_id_on_disk - first) // step
        return is_past or store.waiting_bytes >= self._bytes

    def _late_at(self, since: float) -> float:
        waiting = self._store.commit_id - self._store.commit_id_on_disk
        return since + self._delay * (1 if waiting <= self._entries // _FEW else _BUSY)
