"""Read rounds: how a leader proves that it still leads, once for all reads that wait (rule 7; thesis 6.4).

A read notes the commit_id at its arrival and waits for a round that *starts after* that: a heartbeat to everyone with
the round's number, answered by a majority in the same term. One round runs at a time; the reads that arrive meanwhile
share the next. Numbers are never reused, so a late answer confirms nothing new (etcd #20418). No leases.
"""

from __future__ import annotations


class ReadRounds:
    """The reads of one leader.

    Invariant: `number` only rises, across terms too.
    """

    def __init__(self) -> None:
        self.number = 0
        """The round that was started last."""
        self._waiting: list[tuple[int, object]] = []
        self._running: list[tuple[int, object]] = []

    @property
    def is_running(self) -> bool:
        """True while a round waits for its majority."""
        return bool(self._running)

    def add(self, token: object, commit_id: int) -> None:
        """A read has arrived when `commit_id` was committed."""
        self._waiting.append((commit_id, token))

    def start(self) -> bool:
        """Start a round for the waiting reads; False when there are none, or one still runs."""
        if not self._waiting or self._running:
            return False
        self.number += 1
        self._running, self._waiting = self._waiting, []
        return True

    def confirm(self, round: int) -> list[tuple[int, object]]:
        """A majority has confirmed `round`. Returns (commit_id, token) of the reads that this lets go on."""
        if round < self.number or not self._running:
            return []
        done, self._running = self._running, []
        return done

    def drop(self) -> list[object]:
        """Leadership has ended: forget every waiting read, and return their tokens."""
        dropped = [token for _, token in (*self._running, *self._waiting)]
        self._running, self._waiting = [], []
        return dropped
