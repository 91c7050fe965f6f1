"""The driver: the one place that steps the consensus, writes the store and posts to the transport. Layer 3.

`cycle` is one turn, and the order of effects in it never varies:

    take      everything in the mailbox, into the consensus
    before    what promises nothing that is not on disk: a leader's entries to its followers, heartbeats; and answers to
              clients whose entries a majority already holds durably
    write     one transaction: ballot, entries, effects of what has committed, commit_id
    after     what promises that something is on disk: votes, acknowledgements; and what this write has committed

The way of a put: `_on_write` appends it to the journal -> *before* sends it to the followers -> *write* makes it
durable here -> acknowledgements arrive, a later *take* commits it -> `_settle` applies it and answers the client.

Public methods may be called from any thread: they become letters in the mailbox, and wait for the answer. When no loop
runs (a test, a simulator), the calling thread takes the turns itself.
"""

from __future__ import annotations

import concurrent.futures
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec
from msgspec import UNSET, Struct

from raftnode.config import Role, canonical_address
from raftnode.connections import Connection
from raftnode.consensus.raft import Raft, Ready
from raftnode.errors import BadRequest, ConfigError, NotCommitted, ProtocolError, StoreDamaged, error_for
from raftnode.log import get_logger
from raftnode.mailbox import Arrival, Cut, Greeting, Letter, Reply, Task, drain
from raftnode.messages import (
    PEER_TYPES,
    PROTOCOL_VERSION,
    AddPeer,
    AddPeerAnswer,
    Answer,
    AnyRequest,
    ClientRequest,
    Data,
    DataAnswer,
    Delete,
    DeleteAnswer,
    DeleteCommand,
    Entry,
    Get,
    GetAnswer,
    Heartbeat,
    HeartbeatAnswer,
    Hello,
    HelloAnswer,
    PeerAnswer,
    Peers,
    PeersAnswer,
    Ping,
    PingAnswer,
    Put,
    PutAnswer,
    PutCommand,
    Refusal,
    RemovePeer,
    Staged,
    Status,
    StatusAnswer,
    VoteAnswer,
    VoteRequest,
    check_value,
    decode_object,
    encode,
    encode_command,
    store_key,
    to_request,
)
from raftnode.namespaces import Outcome
from raftnode.store import Store, found
from raftnode.transport import Transport
from raftnode.version import __version__

T = TypeVar("T")

OPEN: Final = "the outcome is open: the write may have happened, or may happen yet. Read the key before you repeat it"


class _Caller:
    """Another thread that waits for the answer to its request."""

    peer: str | None = None
    is_full = False

    def __init__(self, client: str) -> None:
        self.client = client
        self.future: concurrent.futures.Future[Answer] = concurrent.futures.Future()

    def answer(self, arrival: Arrival, answer: Answer) -> None:  # noqa: ARG002 - it has only the one request
        self.future.set_result(answer)

    def defer(self, arrival: Arrival) -> None:  # noqa: ARG002
        raise AssertionError("a caller is never full")


class Election:
    """Drives one node. Owns the `Raft` of this node, and alone writes the store.

    Invariants: each arrival is answered once; `_waiting` holds only entries of this leader's current term.
    """

    def __init__(self, transport: Transport, store: Store, queue: queue.Queue[list[Letter]]) -> None:
        """Take over `store` and drive `transport`, whose mailbox is `queue`. An empty store is founded with the
        transport's address and peers; from then on the membership comes from the store.

        Raises StoreForeign when the store belongs to another address.
        """
        self.transport = transport
        self.store = store
        self.queue = queue
        self.settings = store.settings
        self.chance = random.Random()
        self.clock: Callable[[], float] = time.monotonic
        self.wall_clock: Callable[[], float] = time.time
        store.found(transport.my_ip, transport.peers)
        store.owner = self
        self.me = transport.my_ip
        self.log = get_logger("election", node=self.me)
        self.raft = self._new_raft()
        transport.identify(str(store.cluster_id), store.node_id)
        transport.set_peers(list(self.raft.others))
        transport.attach(self, self.settings)
        self._handlers: dict[type[Struct], Callable[[Arrival], None]] = {
            Put: self._on_write,
            Delete: self._on_write,
            Get: self._on_get,
            Heartbeat: self._on_peer_request,
            Data: self._on_data,
            VoteRequest: self._on_peer_request,
            Hello: self._on_hello,
            Ping: self._on_ping,
            Peers: self._on_peers,
            Status: self._on_status,
            AddPeer: self._on_add_peer,
            RemovePeer: self._on_remove_peer,
        }
        self._turn_lock = threading.Lock()
        self._started = self.clock()
        self._is_timed = False
        self._stopping_since: float | None = None
        self._lead_term = 0  # the term that this node leads in; 0 when it does not
        self._waiting: dict[int, Arrival] = {}  # by commit_id, oldest first: writes of clients, not committed yet
        self._parked: deque[Arrival] = deque()  # no leader to serve them or to pass them on to
        self._forwarded: set[Arrival] = set()  # passed on to the leader
        self._reads: set[Arrival] = set()  # in a read round
        self._local_reads: list[Arrival] = []
        self._after_write: list[Callable[[], None]] = []  # hellos: the node id that they bind must be durable first
        self._effects_since: float | None = None
        self._readers_checked = self.clock()
        self._expire_due = self._started
        self._seen: tuple[Role, int, str | None] = (Role.FOLLOWER, 0, None)
        self._serving_state: tuple[Any, ...] = ()
        self._refusals: dict[str, str] = {}
        self._is_full = False
        self._complaint = ""

    def _new_raft(self) -> Raft:
        store = self.store
        return Raft(self.me, store.journal, store.ballot, store.commit_id, self.chance, self.settings, self.clock())

    # --- one turn ---

    def cycle(self, now: float | None = None) -> float:
        """One turn, in the order of effects that the module's text tells. Returns when the next one is due at the
        latest. `now`: monotonic seconds; the clock's when None. Raises StoreFailed or StoreDamaged: the node must stop.
        """
        clock = self.clock if now is None else lambda: now
        with self._turn_lock:
            self._set_clock(clock())
            self._retry_parked()
            for letter in drain(self.queue):
                self._take(letter)
            self._expire()
            self._end_grace()
            if self._is_timed:
                self.raft.tick()
            ready = self.raft.ready()
            self._settle(ready)
            if ready.ballot is None:
                self._post(ready)
            self.transport.flush()

            if self._must_write(ready):
                self._write(ready, clock)
            self.raft.written()
            if ready.ballot is not None:
                self._post(ready)
            self._promise(ready)
            self._finish()
            self.transport.flush()
            return self._next_due()

    def _set_clock(self, now: float) -> None:
        self._now = now
        self.raft.clock(now, int(self.wall_clock() * 1000))

    def _must_write(self, ready: Ready) -> bool:
        """The log and the ballot never wait for their transaction; effects alone may, for `flush_delay_ms`."""
        if ready.ballot is not None or self.store.journal.has_unwritten or self._after_write:
            return True
        if not self.store.has_effects:
            self._effects_since = None
            return False
        if self._effects_since is None:
            self._effects_since = self._now
        return self._now - self._effects_since >= self.settings.flush_delay_ms / 1000

    def _write(self, ready: Ready, clock: Callable[[], float]) -> None:
        began = clock()
        self.store.write(ready.ballot)
        self._effects_since = None
        took_ms = (clock() - began) * 1000
        if took_ms > self.settings.slow_sync_ms:
            self.log.warning("slow_sync", took_ms=round(took_ms), at=self.store.journal.written)
        self._set_clock(clock())  # a leader whose sync hung for an election timeout steps down here

    def _finish(self) -> None:
        """What the write has made possible: commits of a cluster of one, answers to hellos, and the housekeeping."""
        while True:
            after = self.raft.ready()
            assert after.ballot is None, "nothing came in after the write that could change the ballot"
            self._settle(after)
            self._post(after)
            if self.raft.applied == self.raft.commit_id:
                break
        for finish in self._after_write:
            finish()
        self._after_write.clear()
        self.raft.forget_old_entries()
        self._note_changes()
        self._clear_dead_readers()

    def _next_due(self) -> float:
        if self._parked and self._serves_anew():
            return self._now
        due = self.raft.deadline()
        if self._effects_since is not None or self.store.has_effects:
            due = min(due, (self._effects_since or self._now) + self.settings.flush_delay_ms / 1000)
        return due

    def _post(self, ready: Ready) -> None:
        for peer, request in ready.requests:
            self.transport.post(peer, request)
        for ticket, answer in ready.answers:
            self._give(ticket, answer)

    def _promise(self, ready: Ready) -> None:
        for ticket, answer in ready.promises:
            self._give(ticket, answer)

    @staticmethod
    def _give(ticket: object, answer: PeerAnswer) -> None:
        assert isinstance(ticket, Arrival), "tickets are the arrivals that came with the requests"
        ticket.answer(answer)

    # --- what has committed, and the reads that waited for it ---

    def _settle(self, ready: Ready) -> None:
        """Apply what has committed and answer who waited for it. A majority holds it durably: that is all that these
        answers promise, so they need not wait for this node's own transaction."""
        outcomes = self.store.apply(ready.committed)
        if self._waiting:
            for entry, outcome in zip(ready.committed, outcomes, strict=True):
                self._answer_write(entry, outcome)
        self._parked.extend(self._still_awaited(ready.dropped_reads))
        reads = [*self._still_awaited(ready.reads), *self._local_reads]
        if reads:
            self._local_reads = []
            self._answer_reads(reads)
        if self._lead_term and not (self.raft.is_leader and self.raft.term == self._lead_term):
            self._give_up_leading()

    def _still_awaited(self, tokens: list[object]) -> list[Arrival]:
        """Those reads whose time is not up."""
        reads = [token for token in tokens if isinstance(token, Arrival) and token in self._reads]
        self._reads.difference_update(reads)
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
        else:
            arrival.answer(DeleteAnswer(data=True, commit_id=outcome.commit_id, replaced=outcome.replaced))

    def _answer_reads(self, reads: list[Arrival]) -> None:
        """From one snapshot that holds everything applied."""
        room = []
        for arrival in reads:
            if arrival.origin.is_full:
                arrival.origin.defer(arrival)
            else:
                room.append(arrival)
        try:
            records = self.store.find([_key_of(arrival.message) for arrival in room])
        except StoreDamaged:
            self._answer_reads_singly(room)
            return
        for arrival, record in zip(room, records, strict=True):
            message = arrival.message
            assert isinstance(message, Get)
            arrival.answer(
                GetAnswer(
                    data=found(message.key, message.namespace, record),
                    commit_id=self.store.commit_id,
                    consistency=UNSET if message.consistency == "linearizable" else message.consistency,
                )
            )

    def _answer_reads_singly(self, reads: list[Arrival]) -> None:
        """One of these values is damaged: its reader is told so, the others get theirs."""
        for arrival in reads:
            try:
                self.store.find([_key_of(arrival.message)])
            except StoreDamaged as damage:
                self.log.error("damaged_value", why=str(damage))
                arrival.refuse("damaged", str(damage))
            else:
                self._answer_reads([arrival])

    def _give_up_leading(self) -> None:
        """What was staged may still be committed by the next leader, or cut."""
        self._lead_term = 0
        for arrival in self._waiting.values():
            arrival.refuse("not_committed", f"leadership was lost; {OPEN}")
        self._waiting.clear()

    # --- letters ---

    def _take(self, letter: Letter) -> None:
        match letter:
            case Arrival():
                self._take_request(letter)
            case Reply():
                self._take_reply(letter)
            case Greeting():
                self._on_greeting(letter)
            case Cut():
                self._on_cut(letter)
            case Task():
                letter.run()

    def _take_request(self, arrival: Arrival) -> None:
        arrival.deadline = self._now + self.settings.request_timeout_ms / 1000
        if self._stopping_since is not None and isinstance(arrival.message, ClientRequest):
            arrival.refuse("shutting_down", _STOPPING)
            return
        self._handlers[type(arrival.message)](arrival)

    def _take_reply(self, reply: Reply) -> None:
        if reply.forwarded is not None:
            self._on_forwarded_answer(reply.forwarded, reply.answer)
        elif isinstance(reply.answer, VoteAnswer | HeartbeatAnswer | DataAnswer):
            if reply.answer.error is not UNSET:
                self._note_refusal(reply.peer, reply.answer.error.code, reply.answer.error.message)
            else:
                self.raft.take(reply.peer, reply.answer)
        else:
            self.log.warning("strange_answer", peer=reply.peer, type=type(reply.answer).__name__)

    def _on_cut(self, cut: Cut) -> None:
        self.raft.unreachable(cut.peer)
        self.raft.suspect(cut.peer)
        for arrival in cut.forwarded:
            if arrival in self._forwarded:
                self._forwarded.remove(arrival)
                if isinstance(arrival.message, Get):
                    self._park(arrival)
                else:
                    self._refuse_forwarded(arrival, "the connection to the leader was cut")

    # --- requests of clients ---

    def _on_write(self, arrival: Arrival) -> None:
        message = arrival.message
        assert isinstance(message, Put | Delete)
        try:
            store_key(message.namespace, message.key)
            if isinstance(message, Put):
                check_value(message.value, self.settings)
        except ProtocolError as error:
            arrival.refuse(error.code, str(error))
            return
        if not self.raft.is_leader:
            self._pass_on(arrival)
        elif not self._refuses_write(arrival):
            self._propose(arrival, message)

    def _refuses_write(self, arrival: Arrival) -> bool:
        """Answer a write that this leader can't take now."""
        if len(self._waiting) >= self.settings.waiting_requests or (
            self.raft.uncommitted_bytes > self.settings.uncommitted_bytes
        ):
            arrival.refuse("overloaded", "too many writes wait for their commit; try again later")
        elif isinstance(arrival.message, Put) and self._is_short_of_room():
            room, reserve = self.store.room(self._now), self.settings.reserve_bytes
            arrival.refuse(
                "storage_full",
                f"{room} bytes of room are left, below the reserve of {reserve}: delete keys or make room on the disk; "
                "writes go on by themselves then",
            )
        else:
            return False
        return True

    def _is_short_of_room(self) -> bool:
        is_full = self.store.room(self._now) < self.settings.reserve_bytes
        if is_full != self._is_full:
            self._is_full = is_full
            self.log.warning("storage_full" if is_full else "storage_has_room", room=self.store.room(self._now))
        return is_full

    def _propose(self, arrival: Arrival, message: Put | Delete) -> None:
        client = message.client or arrival.origin.client
        command: PutCommand | DeleteCommand
        if isinstance(message, Put):
            command = PutCommand(namespace=message.namespace, key=message.key, value=message.value, client=client)
        else:
            command = DeleteCommand(namespace=message.namespace, key=message.key, client=client)
        self._lead_term = self.raft.term
        self._waiting[self.raft.propose(encode_command(command))] = arrival

    def _on_get(self, arrival: Arrival) -> None:
        message = arrival.message
        assert isinstance(message, Get)
        try:
            store_key(message.namespace, message.key)
        except ProtocolError as error:
            arrival.refuse(error.code, str(error))
            return
        if message.consistency == "local":
            self._local_reads.append(arrival)
        elif not self.raft.is_leader:
            self._pass_on(arrival)
        elif not self.raft.may_serve_reads:
            self._park(arrival)
        elif len(self._reads) >= self.settings.waiting_requests:
            arrival.refuse("overloaded", "too many reads wait; try again later")
        else:
            self._reads.add(arrival)
            self.raft.read(arrival)

    def _pass_on(self, arrival: Arrival) -> None:
        """To the leader with it; what was passed on once is not passed on again."""
        message, leader = arrival.message, self.raft.leader
        assert isinstance(message, ClientRequest)
        if message.forwarded:
            arrival.refuse("no_leader", "this node is not the leader any more; try again")
        elif leader is None or leader == self.me or not self.transport.can_forward(leader):
            self._park(arrival)
        elif len(self._forwarded) >= self.settings.waiting_requests:
            arrival.refuse("overloaded", "too many requests wait for the leader; try again later")
        else:
            self._forwarded.add(arrival)
            client = message.client or arrival.origin.client
            request = msgspec.structs.replace(message, forwarded=True, client=client, id=UNSET)
            self.transport.forward(leader, request, arrival)

    def _on_forwarded_answer(self, arrival: Arrival, answer: Answer) -> None:
        """The leader's answer, for the client. What surely was not executed is tried again while there is time."""
        if arrival not in self._forwarded:
            return  # its time was up
        self._forwarded.remove(arrival)
        if answer.error is not UNSET and answer.error.code in ("no_leader", "shutting_down"):
            self._park(arrival)
        elif isinstance(answer, Refusal):
            assert answer.error is not UNSET
            arrival.refuse("internal", f"the leader did not understand the request: {answer.error.message}")
        else:
            arrival.answer(answer)

    def _park(self, arrival: Arrival) -> None:
        """Keep it until there is a leader, or its time is up."""
        if self._stopping_since is not None:
            arrival.refuse("shutting_down", _STOPPING)
        elif len(self._parked) >= self.settings.waiting_requests:
            arrival.refuse("overloaded", "too many requests wait for a leader; try again later")
        else:
            self._parked.append(arrival)

    def _serves_anew(self) -> bool:
        """True when requests that wait for a leader should be tried again: who can serve them has changed."""
        leader = self.raft.leader
        can_forward = leader is not None and leader != self.me and self.transport.can_forward(leader)
        return self._serving_state != (self.raft.term, leader, self.raft.may_serve_reads, can_forward) and (
            can_forward or self.raft.is_leader
        )

    def _retry_parked(self) -> None:
        """Take what waited for a leader again, once it can be served."""
        if not self._parked or not self._serves_anew():
            return
        leader = self.raft.leader
        can_forward = leader is not None and leader != self.me and self.transport.can_forward(leader)
        self._serving_state = (self.raft.term, leader, self.raft.may_serve_reads, can_forward)
        parked, self._parked = self._parked, deque()
        for arrival in parked:
            self._handlers[type(arrival.message)](arrival)

    def _expire(self) -> None:
        """Answer those whose time is up."""
        if self._now < self._expire_due:
            return
        self._expire_due = self._now + self.settings.heartbeat_ms / 1000
        for commit_id in [n for n, arrival in self._waiting.items() if arrival.deadline <= self._now]:
            self._waiting.pop(commit_id).refuse("not_committed", f"no majority confirmed in time; {OPEN}")
        for arrival in [a for a in self._forwarded if a.deadline <= self._now]:
            self._forwarded.discard(arrival)
            self._refuse_forwarded(arrival, "the leader did not answer in time")
        for arrival in [a for a in self._reads if a.deadline <= self._now]:
            self._reads.discard(arrival)
            arrival.refuse("no_leader", "no majority confirmed the leader in time")
        for arrival in [a for a in self._parked if a.deadline <= self._now]:
            self._parked.remove(arrival)
            arrival.refuse("no_leader", "no leader was found in time; not executed")

    @staticmethod
    def _refuse_forwarded(arrival: Arrival, why: str) -> None:
        """A read that was passed on can be repeated; of a write it is not known what became of it."""
        if isinstance(arrival.message, Get):
            arrival.refuse("no_leader", why)
        else:
            arrival.refuse("not_committed", f"{why}; {OPEN}")

    def _on_ping(self, arrival: Arrival) -> None:
        arrival.answer(PingAnswer(node=self.me))

    def _on_peers(self, arrival: Arrival) -> None:
        members = list(self.raft.membership.addresses)
        arrival.answer(PeersAnswer(peers=members, leader=self.raft.leader, live=self._live()))

    def _live(self) -> list[str]:
        return sorted({self.me, *self.transport.live})

    def _on_status(self, arrival: Arrival) -> None:
        arrival.answer(StatusAnswer(data=self.status()))

    def status(self) -> dict[str, Any]:
        """What this node knows of itself and the cluster; the `status` message answers with it."""
        raft, store = self.raft, self.store
        last = store.journal.last
        members = {
            address: {
                "node": raft.membership.node_of(address),
                "voter": address in raft.membership.voters,
                "live": address == self.me or address in self.transport.live,
                "match": raft.progress[address].match if address in raft.progress else None,
            }
            for address in raft.membership.addresses
        }
        return {
            "address": self.me,
            "node": store.node_id,
            "cluster": store.cluster_id,
            "version": __version__,
            "role": str(raft.role),
            "term": raft.term,
            "leader": raft.leader,
            "commit_id": raft.commit_id,
            "staged": last.id.commit_id - raft.commit_id,
            "last": {"term": last.id.term, "commit_id": last.id.commit_id, "checksum": f"{last.checksum:08x}"},
            "first": store.journal.first,
            "members": members,
            "connections": self.transport.connection_count,
            "waiting": len(self._waiting) + len(self._reads) + len(self._forwarded) + len(self._parked),
            "syncs": store.syncs,
            "storage": {**store.sizes(), "full": store.room(self._now) < self.settings.reserve_bytes},
            "uptime_s": round(self._now - self._started, 3),
        }

    def _on_add_peer(self, arrival: Arrival) -> None:
        message = arrival.message
        assert isinstance(message, AddPeer)
        try:
            address = canonical_address(message.address)
        except ConfigError as error:
            arrival.refuse("bad_request", str(error))
            return
        if self.raft.membership.node_of(address) is not None:
            arrival.answer(AddPeerAnswer(data=True))
        else:
            arrival.refuse(
                "unsupported", f"{address} is no member, and this version can't change the membership: {_FIXED}"
            )

    def _on_remove_peer(self, arrival: Arrival) -> None:
        arrival.refuse("unsupported", f"this version can't change the membership: {_FIXED}")

    # --- other members ---

    def _on_peer_request(self, arrival: Arrival) -> None:
        if self._is_from_member(arrival):
            message = arrival.message
            assert isinstance(message, VoteRequest | Heartbeat | Data)
            self.raft.step(arrival, message)

    def _on_data(self, arrival: Arrival) -> None:
        """A leader's entries, unless they could use up the room that this node needs for its ballot."""
        message = arrival.message
        assert isinstance(message, Data)
        if not message.entries or self.store.room(self._now) >= self.settings.reserve_bytes // 2:
            self._on_peer_request(arrival)
        elif self._is_from_member(arrival):
            self.raft.refuse_for_space(arrival, message)

    def _is_from_member(self, arrival: Arrival) -> bool:
        """Members say hello before anything else, and speak only for themselves."""
        origin, message = arrival.origin, arrival.message
        if isinstance(origin, _Caller):
            return True
        says = message.staged.address if isinstance(message, VoteRequest) else getattr(message, "leader", "")
        if origin.peer is None:
            arrival.refuse("wrong_cluster", "members say hello first; clients don't send this type")
        elif says != origin.peer:
            arrival.refuse("bad_request", f"{origin.peer} can't speak for {says}")
        else:
            return True
        return False

    def _on_hello(self, arrival: Arrival) -> None:
        """Another member, or a stranger, opens a link to us (rule 9)."""
        hello, connection = arrival.message, arrival.origin
        assert isinstance(hello, Hello)
        if not isinstance(connection, Connection):
            arrival.refuse("bad_request", "hello begins a connection between members")
            return
        problem = self._problem_with(hello.cluster, hello.node, hello.address, hello.protocol)
        if problem is not None:
            self._note_refusal(hello.address, *problem)
            arrival.refuse(*problem)
            connection.close_after_answer()
            return

        def welcome() -> None:
            if hello.link:
                self.transport.replace_connection(connection, hello.address)
            connection.become_link_of(hello.address)
            cluster = str(self.store.cluster_id)
            arrival.answer(HelloAnswer(cluster=cluster, node=self.store.node_id, address=self.me))

        self._once_bound(hello.address, hello.node, welcome)

    def _on_greeting(self, greeting: Greeting) -> None:
        """The other end of our link says who it is."""
        peer, answer = greeting.peer, greeting.answer
        if answer.error is not UNSET:
            problem: tuple[str, str] | None = (answer.error.code, answer.error.message)
        else:
            problem = self._problem_with(answer.cluster, answer.node, peer, PROTOCOL_VERSION)
        if problem is not None:
            self._note_refusal(peer, *problem)
            self.transport.refuse(peer)
            return

        def admit() -> None:
            self._refusals.pop(peer, None)
            self.transport.admit(peer)
            self.raft.unreachable(peer)  # what was posted while there was no link is lost
            self.log.info("peer_connected", peer=peer)

        self._once_bound(peer, answer.node, admit)

    def _once_bound(self, peer: str, node: str, then: Callable[[], None]) -> None:
        """The id of a member met for the first time is on disk before anything is exchanged with it."""
        if self.raft.membership.node_of(peer) == "":
            self.store.bind(peer, node)
            self._after_write.append(then)
        else:
            then()

    def _problem_with(self, cluster: str, node: str, address: str, protocol: int) -> tuple[str, str] | None:
        """Why the node at the other end is not the member that it should be: (code, words), or None."""
        known = self.raft.membership.node_of(address)
        if protocol != PROTOCOL_VERSION:
            return (
                "wrong_protocol",
                f"{self.me} speaks protocol {PROTOCOL_VERSION}, {address} speaks {protocol}: upgrade",
            )
        if cluster != self.store.cluster_id:
            founders = ", ".join(sorted(self.raft.membership.voters))
            return "wrong_cluster", (
                f"{self.me} is of cluster {self.store.cluster_id} (members {founders}), {address} of cluster "
                f"{cluster}: start all nodes of a cluster with the same set of addresses, in --ip and --peers together"
            )
        if known is None or address == self.me:
            return "not_member", f"{address} is not another member of the cluster of {self.me}"
        if known not in ("", node):
            return "wrong_node", (
                f"{address} is known to {self.me} as node {known}, but node {node} answers there: its data "
                "directory was lost or exchanged. Give it its own directory back"
            )
        return None

    def _note_refusal(self, peer: str, code: str, message: str) -> None:
        """Say once why a node and this one do not work together; tries go on."""
        if self._refusals.get(peer) != message:
            self._refusals[peer] = message
            self.log.error("peer_refused", peer=peer, code=code, why=message)

    # --- housekeeping ---

    def _note_changes(self) -> None:
        seen = (self.raft.role, self.raft.term, self.raft.leader)
        if seen != self._seen:
            self._seen = seen
            self.log.info("role", role=str(seen[0]), term=seen[1], leader=seen[2], commit_id=self.raft.commit_id)
        if self.raft.complaint != self._complaint:
            self._complaint = self.raft.complaint
            if self._complaint:
                self.log.error("entries_refused", why=self._complaint)

    def _clear_dead_readers(self) -> None:
        if self._now - self._readers_checked > self.settings.reader_check_ms / 1000:
            self._readers_checked = self._now
            if cleared := self.store.clear_dead_readers():
                self.log.info("dead_readers_cleared", count=cleared)

    # --- the end ---

    def begin_stop(self) -> None:
        """Take no more requests, and let those under way finish; `is_idle` tells when, at the latest after
        `stop_grace_ms`."""
        if self._stopping_since is None:
            self._stopping_since = self.clock()
            self.log.info("stopping", waiting=len(self._waiting))
            for arrival in self._parked:
                arrival.refuse("shutting_down", _STOPPING)
            self._parked.clear()

    @property
    def is_idle(self) -> bool:
        """True when nobody waits for an answer any more."""
        return not (self._waiting or self._forwarded or self._reads or self._parked)

    def _end_grace(self) -> None:
        """Time to finish is over: what is still under way is open."""
        if self._stopping_since is None or self._now - self._stopping_since < self.settings.stop_grace_ms / 1000:
            return
        for arrival in self._waiting.values():
            arrival.refuse("not_committed", f"this node stops; {OPEN}")
        for arrival in self._forwarded:
            self._refuse_forwarded(arrival, "this node stops")
        for arrival in self._reads:
            arrival.refuse("shutting_down", _STOPPING)
        self._waiting.clear()
        self._forwarded.clear()
        self._reads.clear()

    def close(self) -> None:
        """After the last turn: bring the effects to the disk, so that the next start has nothing to catch up on."""
        if self.store.has_effects:
            self.store.write()
        self.store.owner = None

    # --- the published interface, for other threads ---

    def _run(self, work: Callable[[], T]) -> T:
        """Have `work` done in a turn, and return what it returned."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def task() -> None:
            try:
                future.set_result(work())
            except Exception as error:  # it belongs to the caller, who gets it below
                future.set_exception(error)

        return self._await([Task(task)], future)

    def _ask(self, message: AnyRequest) -> Answer:
        """Put a request in as a client's, and wait for its answer."""
        caller = _Caller(f"{self.me} (embedded)")
        return self._await([Arrival(message, caller)], caller.future)

    def _await(self, letters: list[Letter], future: concurrent.futures.Future[T]) -> T:
        self.transport.deliver(letters, limited=False)
        limit = 2 * self.settings.request_timeout_ms / 1000
        if not self.transport.is_serving:
            self._take_turns(future, limit)
        try:
            return future.result(limit)
        except concurrent.futures.TimeoutError as error:
            raise NotCommitted("not_committed", f"the node did not answer; {OPEN}") from error

    def _take_turns(self, future: concurrent.futures.Future[T], limit: float) -> None:
        """Nobody runs the loop: take the turns here until the answer is there."""
        end = self.clock() + limit
        due = self.cycle()
        while not future.done() and self.clock() < end:
            with self.queue.not_empty:
                if not self.queue.queue:
                    self.queue.not_empty.wait(max(0.0, min(due, end) - self.clock()))
            due = self.cycle()

    def init_timeout(self) -> None:
        """Arm the election timeout and start watching for missed heartbeats: from now on this node may campaign."""
        self._run(self._start_timers)

    def _start_timers(self) -> None:
        self._is_timed = True
        self.raft.rearm()

    def ask_for_vote(self) -> None:
        """Campaign now: ask every other voter for a pre-vote, and with a majority of those for its vote in the next
        term. The answers come in later turns."""
        self._run(self.raft.campaign)

    def send_vote_request(self, voter: str, term: int) -> None:
        """Send one vote request to `voter` (`ip:port`) with the position of the newest staged entry: for `term` when
        that is this node's, and a pre-vote for any later one."""
        self._run(lambda: self.raft.send_vote_request(voter, term, pre_vote=term != self.raft.term))

    def decide_vote(self, term: int, commit_id: int, staged: dict[str, Any]) -> bool:
        """True when the vote is granted; the ballot is on disk then (thesis 3.4). `staged` tells who asks (`address`)
        and the `term` and `commit_id` of the candidate's newest log entry, which decide whether it is up to date."""
        who = Staged(
            address=staged.get("address", ""), term=staged.get("term", 0), commit_id=staged.get("commit_id", 0)
        )
        answer = self._ask(VoteRequest(term=term, commit_id=commit_id, staged=who))
        assert isinstance(answer, VoteAnswer)
        return answer.data

    def heartbeat_handler(self, message: dict[str, Any]) -> tuple[int, int]:
        """A follower's side of a leader's heartbeat or `data` message: carry it out, durably, and return the (term,
        commit_id) of this node. Raises ProtocolError for a message that is neither."""
        kind = "data" if "action" in message else "heartbeat"
        request = to_request({"commit_id": 0, "leader": "", **message, "type": kind})
        answer = self._ask(request)
        assert isinstance(answer, HeartbeatAnswer | DataAnswer)
        return answer.term, answer.commit_id

    def send_heartbeat(self, peer: str) -> None:
        """As leader, send `peer` what it needs next: entries if it lacks any, else a heartbeat. Its answer is acted on
        in a later turn. Does nothing on a node that does not lead."""
        self._run(lambda: self.raft.feed(peer))

    def start_heartbeat(self) -> None:
        """As leader, send heartbeats to all now, and from now on every `heartbeat_ms`. A new leader's no-op and its
        first heartbeats go out by themselves. Does nothing on a node that does not lead."""
        self._run(self.raft.beat)

    def request(self, message: dict[str, Any]) -> dict[str, Any]:
        """Any request of a client (`{"type": "put", ...}`), as if it had come over the wire, and its answer. Raises
        ProtocolError for a message that is no request."""
        request = to_request(message)
        if request.name in PEER_TYPES:
            raise ProtocolError("bad_request", f"{request.name} is for members")
        return decode_object(encode(self._ask(request)))

    def handle_put(self, payload: dict[str, Any]) -> bool:
        """Replicate and commit `key`, `value` and `namespace` (with `"type": "delete"`: delete the key). True only once
        committed; False when it was not executed or its outcome is open. Raises BadRequest when it is wrong itself."""
        answer = self.request({"type": "put", **payload})
        detail = answer.get("error")
        if detail and isinstance(error := error_for(detail["code"], detail["message"]), BadRequest):
            raise error
        return bool(answer["data"])

    def handle_get(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Linearizable read of `key` in `namespace` (or what `consistency` says): a dict with both, `value` (None when
        there is none), `created`, `modified` and `version`. Raises RequestError."""
        answer = self.request({**payload, "type": "get"})
        if detail := answer.get("error"):
            raise error_for(detail["code"], detail["message"])
        data: dict[str, Any] = answer["data"]
        return data


_FIXED: Final = "it is the set of addresses with which the cluster was first started"
_STOPPING: Final = "this node is stopping; try another node"


def _key_of(message: AnyRequest) -> bytes:
    assert isinstance(message, Get)
    return store_key(message.namespace, message.key)
