"""The requests of clients, from their arrival to their answer: who waits, and for what. Part of the driver (layer 3).

    a write    on the leader: proposed, waits for its commit               `_waiting`, by commit_id
    a read     on the leader: waits for a read round                       `_reads`
    either     on another member: passed on, waits for the leader's answer `_forwarded`
    either     while no leader is known or reachable: waits for one        `_parked`

Changes of the members go the same ways; what the leader does with them is in `members`.

Each of these is bounded, has a deadline, and ends with exactly one answer. An answer says "failed" only of what was
never appended; after a timeout, a lost leadership or a cut connection a write is open: `not_committed` (rule 12).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final

import msgspec
from msgspec import UNSET

from raftnode.config import Settings
from raftnode.consensus.raft import Raft, Ready
from raftnode.errors import ProtocolError, StoreDamaged, StoreError
from raftnode.mailbox import Arrival
from raftnode.messages import (
    Answer,
    ChangeAnswer,
    ChangeRequest,
    ClientRequest,
    Delete,
    DeleteAnswer,
    DeleteCommand,
    Entry,
    Get,
    GetAnswer,
    Put,
    PutAnswer,
    PutCommand,
    Refusal,
    TransferLeader,
    TransferLeaderAnswer,
    check_value,
    effect_of,
    encode_command,
    store_key,
)
from raftnode.namespaces import Outcome
from raftnode.records import Record
from raftnode.store import Store, found
from raftnode.transport import Transport

_NOT_LED: Final = ("no_leader", "shutting_down", "not_member")
"""With these a member sends back what was passed on to it: it was not executed."""
OPEN: Final = "the outcome is open: the write may have happened, or may happen yet. Read the key before you repeat it"
STOPPING: Final = "this node is stopping; try another node"


_COMMANDS: Final = (Put, Delete, Get)


class Requests:
    """The clients that wait at one node.

    Invariants: each arrival is answered once; `_waiting` holds only entries of this leader's current term.
    """

    def __init__(self, me: str, raft: Raft, store: Store, transport: Transport, settings: Settings, log: Any) -> None:
        self._me = me
        self._raft = raft
        self._store = store
        self._transport = transport
        self._settings = settings
        self._log = log
        self._timeout = settings.request_timeout_ms / 1000
        self._now = 0.0
        self._expire_due = 0.0
        self._stopping_since: float | None = None
        self._lead_term = 0  # the term that this node leads in; 0 when it does not
        self._waiting: dict[int, Arrival] = {}
        self._reads: dict[Arrival, None] = {}  # a set that keeps its order: one seed, one trace
        self._local_reads: list[Arrival] = []
        self._forwarded: dict[Arrival, str] = {}  # with the leader that it was passed on to
        self._parked: deque[Arrival] = deque()
        self._last_serving: tuple[Any, ...] = ()
        self.carry_out_change: Callable[[Arrival], None]
        """What the leader does with a change of the members; `members` sets it."""
        self.answer_to_change: Callable[[Arrival, int], ChangeAnswer]
        """The answer to one when the entry with this commit_id has committed."""
        self._is_full = False  # there is too little room for puts
        self._has_looked_at_room = False

    @property
    def count(self) -> int:
        """How many clients wait."""
        return len(self._waiting) + len(self._reads) + len(self._forwarded) + len(self._parked)

    @property
    def want_turn(self) -> bool:
        """True when what waits for a leader should be tried again: who can serve it has changed."""
        return (
            bool(self._parked) and self._serving != self._last_serving and (self._raft.is_leader or self._can_forward)
        )

    # --- in ---

    def begin_turn(self, now: float) -> None:
        """A turn begins: take again what waited for a leader, once there is one."""
        self._now = now
        self._has_looked_at_room = False
        if self._parked or self._forwarded:
            self._look_for_leader()

    def _look_for_leader(self) -> None:
        serving = self._serving
        if serving == self._last_serving:
            return
        self._last_serving = serving
        self._leave_old_leader()
        if self._raft.is_leader or self._can_forward:
            parked, self._parked = self._parked, deque()
            for arrival in parked:
                self._dispatch(arrival)

    def take(self, arrival: Arrival) -> None:
        """A client's put, delete or get, or a change of the members."""
        arrival.deadline = self._now + self._timeout
        if self._stopping_since is not None:
            arrival.refuse("shutting_down", STOPPING)
        else:
            self._dispatch(arrival)

    def _dispatch(self, arrival: Arrival) -> None:
        message = arrival.message
        if self._raft.is_outside:
            arrival.refuse("not_member", f"{self._me} is not a member of the cluster any more; ask another node")
        elif isinstance(message, _COMMANDS):
            if self._is_sound(arrival, message):
                self._dispatch_command(arrival, message)
        else:
            assert isinstance(message, ChangeRequest), "there is nothing else that clients want done"
            self._dispatch_change(arrival, message)

    def _is_sound(self, arrival: Arrival, message: Put | Delete | Get) -> bool:
        """Answer a request for what no node could do."""
        try:
            arrival.store_key = store_key(message.namespace, message.key)
            if isinstance(message, Put) and not arrival.is_checked:
                check_value(message.value, self._settings)
                arrival.is_checked = True
        except ProtocolError as error:
            arrival.refuse(error.code, str(error))
            return False
        return True

    def _dispatch_command(self, arrival: Arrival, message: Put | Delete | Get) -> None:
        if isinstance(message, Get):
            self._read(arrival, message)
        elif not self._raft.is_leader:
            self._pass_on(arrival, message)
        elif self._raft.is_handing_over:
            self._park(arrival)
        elif not self._refuses_write(arrival):
            self._propose(arrival, message)

    def _dispatch_change(self, arrival: Arrival, message: ChangeRequest) -> None:
        if not self._raft.is_leader:
            self._pass_on(arrival, message)
        elif not self._raft.may_serve_reads:
            self._park(arrival)
        else:
            self.carry_out_change(arrival)

    def await_commit(self, commit_id: int, arrival: Arrival) -> None:
        """Answer when this leader's entry has committed."""
        self._lead_term = self._raft.term
        self._waiting[commit_id] = arrival

    def _refuses_write(self, arrival: Arrival) -> bool:
        """Answer a write that this leader can't take now."""
        if len(self._waiting) >= self._settings.waiting_requests or (
            self._raft.uncommitted_bytes > self._settings.uncommitted_bytes
        ):
            arrival.refuse("overloaded", "too many writes wait for their commit; try again later")
        elif isinstance(arrival.message, Put) and self._is_short_of_room():
            room, reserve = self._store.room(self._now), self._settings.reserve_bytes
            arrival.refuse(
                "storage_full",
                f"{room} bytes of room are left, below the reserve of {reserve}: delete keys or make room on the disk; "
                "writes go on by themselves then",
            )
        else:
            return False
        return True

    def _is_short_of_room(self) -> bool:
        """Looked at once in a turn: it changes with the transactions."""
        if self._has_looked_at_room:
            return self._is_full
        self._has_looked_at_room = True
        room = self._store.room(self._now)
        is_full = room < self._settings.reserve_bytes
        if is_full != self._is_full:
            self._is_full = is_full
            self._log.warning("storage_full" if is_full else "storage_has_room", room=room)
        return is_full

    def _propose(self, arrival: Arrival, message: Put | Delete) -> None:
        client = message.client or arrival.origin.client
        command: PutCommand | DeleteCommand
        if isinstance(message, Put):
            command = PutCommand(namespace=message.namespace, key=message.key, value=message.value, client=client)
        else:
            command = DeleteCommand(namespace=message.namespace, key=message.key, client=client)
        effect = effect_of(command, arrival.store_key)
        self.await_commit(self._raft.propose(encode_command(command), effect), arrival)

    def _read(self, arrival: Arrival, message: Get) -> None:
        if message.consistency == "local":
            self._local_reads.append(arrival)
        elif not self._raft.is_leader:
            self._pass_on(arrival, message)
        elif not self._raft.may_serve_reads:
            self._park(arrival)
        elif len(self._reads) >= self._settings.waiting_requests:
            arrival.refuse("overloaded", "too many reads wait; try again later")
        else:
            self._reads[arrival] = None
            self._raft.read(arrival)

    def _pass_on(self, arrival: Arrival, message: ClientRequest) -> None:
        """To the leader with it; what was passed on once is not passed on again."""
        leader = self._raft.leader
        if message.forwarded:
            arrival.refuse("no_leader", "this node is not the leader any more; try again")
        elif leader is None or not self._can_forward:
            self._park(arrival)
        elif len(self._forwarded) >= self._settings.waiting_requests:
            arrival.refuse("overloaded", "too many requests wait for the leader; try again later")
        else:
            self._forwarded[arrival] = leader
            client = message.client or arrival.origin.client
            request = msgspec.structs.replace(message, forwarded=True, client=client, id=UNSET)
            self._transport.forward(leader, request, arrival)

    def _park(self, arrival: Arrival) -> None:
        """Keep it until there is a leader, or its time is up."""
        if self._stopping_since is not None:
            arrival.refuse("shutting_down", STOPPING)
        elif len(self._parked) >= self._settings.waiting_requests:
            arrival.refuse("overloaded", "too many requests wait for a leader; try again later")
        else:
            self._parked.append(arrival)

    @property
    def _can_forward(self) -> bool:
        """True when another member leads, and can be reached."""
        leader = self._raft.leader
        return leader is not None and leader != self._me and self._transport.can_forward(leader)

    @property
    def _serving(self) -> tuple[Any, ...]:
        """What decides who serves a request now."""
        raft = self._raft
        return raft.term, raft.leader, raft.may_serve_reads, raft.is_handing_over, self._can_forward

    # --- what has committed, and the reads that waited for it ---

    def settle(self, ready: Ready, outcomes: list[Outcome]) -> None:
        """Answer who waited for what has committed and was applied with these outcomes."""
        if self._waiting:
            for entry, outcome in zip(ready.committed, outcomes, strict=True):
                self._answer_write(entry, outcome)
        if ready.dropped_reads:
            self._parked.extend(self._still_awaited(ready.dropped_reads))
        if ready.reads or self._local_reads:
            reads, self._local_reads = [*self._still_awaited(ready.reads), *self._local_reads], []
            self._answer_reads(reads)
        if self._lead_term and not (self._raft.is_leader and self._raft.term == self._lead_term):
            self._give_up_leading()

    def _still_awaited(self, tokens: list[object]) -> list[Arrival]:
        """Those reads whose time is not up."""
        reads = [token for token in tokens if isinstance(token, Arrival) and token in self._reads]
        for read in reads:
            del self._reads[read]
        return reads

    def _answer_write(self, entry: Entry, outcome: Outcome) -> None:
        arrival = self._waiting.pop(entry.commit_id, None)
        if arrival is None:
            return
        if entry.term != self._lead_term:
            arrival.refuse("not_committed", f"leadership was lost; {OPEN}")
        elif isinstance(arrival.message, Put):
            arrival.answer(
                PutAnswer(data=True, commit_id=outcome.commit_id, version=outcome.version, replaced=outcome.replaced)
            )
        elif isinstance(arrival.message, Delete):
            arrival.answer(DeleteAnswer(data=True, commit_id=outcome.commit_id, replaced=outcome.replaced))
        else:
            arrival.answer(self.answer_to_change(arrival, entry.commit_id))

    def _answer_reads(self, reads: list[Arrival]) -> None:
        """From one snapshot that holds everything applied. Who does not take its answers waits for its turn."""
        for arrival in reads:
            message = arrival.message
            assert isinstance(message, Get)
            if arrival.origin.is_full:
                arrival.origin.defer(arrival)
            else:
                self._answer_read(arrival, message)

    def answer_at_once(self, message: Get) -> GetAnswer | None:
        """The answer to a local read, which needs no turn: between two turns everything that this node has applied is
        in its store. None when a turn has to look at it: it is refused, or the store can't be read, which is told, or
        ends the node, there."""
        if self._stopping_since is not None or self._raft.is_outside:
            return None
        try:
            record = self._store.find(store_key(message.namespace, message.key))
        except (ProtocolError, StoreError):
            return None
        return self._answer_to_read(message, record)

    def _answer_read(self, arrival: Arrival, message: Get) -> None:
        try:
            record = self._store.find(arrival.store_key)
        except StoreDamaged as damage:
            self._log.error("damaged_value", why=str(damage))
            arrival.refuse("damaged", str(damage))
            return
        arrival.answer(self._answer_to_read(message, record))

    def _answer_to_read(self, message: Get, record: Record | None) -> GetAnswer:
        return GetAnswer(
            data=found(message.key, message.namespace, record),
            commit_id=self._store.commit_id,
            consistency=UNSET if message.consistency == "linearizable" else message.consistency,
        )

    def _give_up_leading(self) -> None:
        """What was staged may still be committed by the next leader, or cut."""
        self._lead_term = 0
        for arrival in self._waiting.values():
            arrival.refuse("not_committed", f"leadership was lost; {OPEN}")
        self._waiting.clear()

    # --- what was passed on ---

    def take_forwarded(self, arrival: Arrival, answer: Answer) -> None:
        """The leader's answer, for the client. What surely was not executed is tried again while there is time."""
        passed_on_to = self._forwarded.pop(arrival, None)
        if passed_on_to is None:
            return  # its time was up
        if isinstance(arrival.message, Get) and arrival.origin.is_full:
            arrival.origin.defer(arrival)
        elif answer.error is not UNSET and answer.error.code in _NOT_LED:
            self._take_back(arrival, passed_on_to)
        elif isinstance(answer, Refusal):
            assert answer.error is not UNSET
            arrival.refuse("internal", f"the leader did not understand the request: {answer.error.message}")
        else:
            arrival.answer(answer)

    def _take_back(self, arrival: Arrival, passed_on_to: str) -> None:
        """Who was asked does not lead any more: ask the next leader, when it is known."""
        if self._raft.leader in (None, passed_on_to):
            self._park(arrival)
        else:
            self._dispatch(arrival)

    def cut_off(self, forwarded: list[Arrival]) -> None:
        """The link on which these were passed on has ended."""
        for arrival in forwarded:
            self._stop_waiting_for_leader(arrival, "the connection to the leader was cut")

    def _leave_old_leader(self) -> None:
        """There is another leader than the one that a request was passed on to: that one may never answer, unless it
        has handed over; then it has answered what it began, and sends back the rest."""
        leader = self._raft.leader
        if leader is not None and not self._raft.was_handed_over:
            for arrival in [a for a, passed_on_to in self._forwarded.items() if passed_on_to != leader]:
                self._stop_waiting_for_leader(arrival, "the leader was replaced")

    def _stop_waiting_for_leader(self, arrival: Arrival, why: str) -> None:
        """A read is tried again; of a write it is not known what became of it."""
        if self._forwarded.pop(arrival, None) is None:
            return  # its time was up
        if isinstance(arrival.message, Get):
            self._park(arrival)
        elif isinstance(arrival.message, TransferLeader) and (leader := self._raft.leader) is not None:
            arrival.answer(TransferLeaderAnswer(data=True, leader=leader))
        else:
            self._refuse_forwarded(arrival, why)

    @staticmethod
    def _refuse_forwarded(arrival: Arrival, why: str) -> None:
        """A read that was passed on can be repeated; of a write it is not known what became of it."""
        if isinstance(arrival.message, Get):
            arrival.refuse("no_leader", why)
        else:
            arrival.refuse("not_committed", f"{why}; {OPEN}")

    # --- the end of waiting ---

    def expire(self) -> None:
        """Answer those whose time is up."""
        if self._stopping_since is not None:
            self._end_grace()
        if self._now < self._expire_due:
            return
        self._expire_due = self._now + self._settings.heartbeat_ms / 1000
        for commit_id in [n for n, arrival in self._waiting.items() if arrival.deadline <= self._now]:
            self._waiting.pop(commit_id).refuse("not_committed", f"no majority confirmed in time; {OPEN}")
        for arrival in [a for a in self._forwarded if a.deadline <= self._now]:
            del self._forwarded[arrival]
            self._refuse_forwarded(arrival, "the leader did not answer in time")
        for arrival in [a for a in self._reads if a.deadline <= self._now]:
            del self._reads[arrival]
            arrival.refuse("no_leader", "no majority confirmed the leader in time")
        for arrival in [a for a in self._parked if a.deadline <= self._now]:
            self._parked.remove(arrival)
            arrival.refuse("no_leader", "no leader was found in time; not executed")

    @property
    def is_grace_over(self) -> bool:
        """A clean stop waits no longer."""
        since = self._stopping_since
        return since is not None and self._now - since >= self._settings.stop_grace_ms / 1000

    def begin_stop(self, now: float) -> None:
        """Take nothing new; what waits for a leader is refused, what is under way may finish within `stop_grace_ms`."""
        if self._stopping_since is None:
            self._stopping_since = now
            for arrival in self._parked:
                arrival.refuse("shutting_down", STOPPING)
            self._parked.clear()

    @property
    def is_stopping(self) -> bool:
        return self._stopping_since is not None

    def _end_grace(self) -> None:
        """Time to finish is over."""
        if self.is_grace_over:
            self.end()

    def end(self) -> None:
        """Answer everyone who still waits: what is under way is open."""
        for arrival in self._waiting.values():
            arrival.refuse("not_committed", f"this node stops; {OPEN}")
        for arrival in self._forwarded:
            self._refuse_forwarded(arrival, "this node stops")
        for arrival in (*self._reads, *self._parked):
            arrival.refuse("shutting_down", STOPPING)
        self._parked.clear()
        self._waiting.clear()
        self._forwarded.clear()
        self._reads.clear()
