"""Backups: the whole state for a client that asks for it, chunk by chunk. Part of the driver (layer 3).

It is the same `Transfer` as for a member that lags behind, so no reader lives longer than a chunk, and the last chunk
makes it the state as of one commit_id. The client pulls: it asks for the next chunk when it has put away the last one.
An answer waits until the rate lets it go, so that other clients don't notice, and the first one until this node has
applied what the client knows to be committed. A backup belongs to its connection; who loses that begins anew.
"""

from __future__ import annotations

from typing import Final

from msgspec import UNSET

from raftnode.config import Settings
from raftnode.errors import StoreDamaged
from raftnode.mailbox import Arrival, Origin
from raftnode.messages import Backup, BackupAnswer
from raftnode.snapshots import Overflow, Pace, Transfer
from raftnode.store import Store

_NEVER: Final = float("inf")
_TOO_MUCH: Final = "more is written than this node may remember for a backup; try again when there is less to do"


class _Open:
    """A backup under way. Invariant: at most one request for a chunk waits."""

    def __init__(self, origin: Origin, store: Store, settings: Settings, now: float) -> None:
        self.origin = origin
        self.transfer = Transfer(store)
        self.pace = Pace(settings)
        self.seq = 0
        self.due = now
        """When the next chunk may be sent."""
        self.used_at = now
        """When its client was heard, or answered, last."""
        self.waiting: Arrival | None = None


class Backups:
    """All backups that clients take from this node."""

    def __init__(self, address: str, store: Store, settings: Settings) -> None:
        self._address = address
        self._store = store
        self._settings = settings
        self._numbers = 0
        self._open: dict[int, _Open] = {}

    def take(self, arrival: Arrival, now: float) -> None:
        """A client wants the next chunk, or, without a number, to begin."""
        message = arrival.message
        assert isinstance(message, Backup)
        number = message.transfer or self._begin(arrival, now)
        if not number:
            limit = self._settings.backups
            arrival.refuse("overloaded", f"{limit} backups at a time is what this node does; wait for another to end")
            return
        backup = self._open.get(number)
        if backup is None or backup.origin is not arrival.origin:
            arrival.refuse("bad_request", f"there is no backup {number} on this connection any more; begin anew")
        elif backup.waiting is not None or message.seq != backup.seq + 1:
            arrival.refuse("bad_request", f"chunk {backup.seq + 1} comes next; ask for one at a time")
        else:
            arrival.deadline = now + self._settings.request_timeout_ms / 1000
            backup.waiting, backup.used_at = arrival, now

    def _begin(self, arrival: Arrival, now: float) -> int:
        """The number of a new backup; 0 when there are too many."""
        if len(self._open) >= self._settings.backups:
            return 0
        self._numbers += 1
        self._open[self._numbers] = _Open(arrival.origin, self._store, self._settings, now)
        return self._numbers

    def send(self, now: float) -> None:
        """Answer who may have the next chunk, and end the backups that nobody goes on with."""
        for number, backup in list(self._open.items()):
            if backup.waiting is not None and not backup.origin.is_full:
                self._answer(number, backup, backup.waiting, now)
            if number in self._open and now - backup.used_at > self._settings.stall_timeout_ms / 1000:
                self._end(number)

    def due(self) -> float:
        """When `send` should be called at the latest; a turn comes by itself when something is committed."""
        if not self._open:
            return _NEVER
        waiting = [backup for backup in self._open.values() if backup.waiting is not None]
        return min((backup.due for backup in waiting if self._is_fresh_for(backup)), default=_NEVER)

    def _is_fresh_for(self, backup: _Open) -> bool:
        assert backup.waiting is not None, "somebody waits"
        message = backup.waiting.message
        assert isinstance(message, Backup)
        return self._store.commit_id >= message.at_least

    def _answer(self, number: int, backup: _Open, arrival: Arrival, now: float) -> None:
        if not self._is_fresh_for(backup):
            if now >= arrival.deadline:
                self._refuse(number, arrival, "no_leader", f"{self._address} does not have yet what is committed")
        elif backup.due <= now:
            try:
                self._next(number, backup, arrival, now)
            except Overflow:
                self._refuse(number, arrival, "overloaded", _TOO_MUCH)
            except StoreDamaged as damage:
                self._refuse(number, arrival, "damaged", str(damage))

    def _next(self, number: int, backup: _Open, arrival: Arrival, now: float) -> None:
        transfer, pace = backup.transfer, backup.pace
        chunk = transfer.next(pace.chunk_bytes(transfer))
        backup.seq += 1
        backup.due = now + pace.pause(transfer, chunk.size * len(self._open))
        backup.waiting, backup.used_at = None, now
        store, keys = self._store, transfer.count()
        if chunk.end is not UNSET:
            self._end(number)
        arrival.answer(
            BackupAnswer(
                cluster=str(store.cluster_id),
                node=self._address,
                transfer=number,
                seq=backup.seq,
                keys=keys,
                records=chunk.records,
                gone=chunk.gone,
                end=chunk.end,
            )
        )

    def _refuse(self, number: int, arrival: Arrival, code: str, words: str) -> None:
        self._open[number].waiting = None
        self._end(number)
        arrival.refuse(code, words)

    def _end(self, number: int) -> None:
        """Forget a backup; who waits for more of it is told."""
        backup = self._open.pop(number)
        backup.transfer.close()
        if backup.waiting is not None:
            backup.waiting.refuse("overloaded", "the chunks of this backup were not taken in time; begin anew")

    def stop(self) -> None:
        """The node stops: nobody gets any more."""
        for number, backup in list(self._open.items()):
            if backup.waiting is None:
                self._end(number)
            else:
                self._refuse(number, backup.waiting, "shutting_down", "this node is stopping; try another node")
