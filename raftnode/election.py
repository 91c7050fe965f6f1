"""The driver: the one place that steps the consensus, writes the store and posts to the transport. Layer 3.

`cycle` is one turn, and the order of effects in it never varies:

    take      everything in the mailbox, into the consensus
    before    what promises nothing that is not on disk: a leader's entries to its followers, heartbeats; and answers to
              clients whose entries a majority already holds durably
    write     one write to the disk: entries, to the tail of the log, when they are few and nothing else is new; or else
              one transaction: ballot, entries; with them also some effects of what has committed (see `flushing`), and
              commit_id
    after     what promises that something is on disk: votes, acknowledgements; and what this write has committed
    at last   for what nobody waits: a follower applies what has committed; effects that go alone

The way of a put: `Requests` proposes it to the consensus, which appends it to the journal -> *before* sends it to the
followers -> *write* makes it durable here -> acknowledgements arrive and, in a later *take*, commit it ->
`_settle` applies it and answers the client.

`requests` has the clients that wait, `handshake` who may be at the other end of a link.

Public methods may be called from any thread: they become letters in the mailbox, and wait for the answer. When no loop
runs (a test, a simulator), the calling thread takes the turns itself.
"""

from __future__ import annotations

import concurrent.futures
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from msgspec import UNSET, Struct

from raftnode.backups import Backups
from raftnode.config import Role
from raftnode.consensus.changes import ChangeRefused
from raftnode.consensus.raft import Raft, Ready, Ticket
from raftnode.errors import BadRequest, NotCommitted, ProtocolError, StoreDamaged, Unavailable, error_for
from raftnode.flushing import Flushing
from raftnode.handshake import Handshake
from raftnode.log import get_logger
from raftnode.mailbox import Arrival, Cut, Greeting, Letter, Reply, Task, drain
from raftnode.members import MemberChanges
from raftnode.messages import (
    PEER_TYPES,
    AddPeer,
    Answer,
    AnyRequest,
    Backup,
    Data,
    DataAnswer,
    Delete,
    Entries,
    EntriesAnswer,
    Entry,
    Get,
    Heartbeat,
    HeartbeatAnswer,
    Hello,
    PeerAnswer,
    PeerRequest,
    Peers,
    PeersAnswer,
    Ping,
    PingAnswer,
    Put,
    RemovePeer,
    ReplacePeer,
    Snapshot,
    SnapshotAnswer,
    Staged,
    Status,
    StatusAnswer,
    TimeoutNow,
    TransferLeader,
    VoteAnswer,
    VoteRequest,
    decode_object,
    encode,
    to_request,
)
from raftnode.requests import OPEN, STOPPING, Requests
from raftnode.snapshots import Snapshots
from raftnode.store import Store
from raftnode.transport import Transport
from raftnode.version import __version__

_WITNESS_S: Final = 1.0
"""So often, at most, the witnesses are written."""

T = TypeVar("T")


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

    Invariant: one turn at a time, whichever thread takes it.
    """

    def __init__(
        self,
        transport: Transport,
        store: Store,
        queue: queue.Queue[list[Letter]],
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        chance: random.Random | None = None,
    ) -> None:
        """Take over `store` and drive `transport`, whose mailbox is `queue`. An empty store is founded with the
        transport's address and peers; from then on the membership comes from the store.

        `clock` (seconds, monotonic), `wall_clock` (seconds since 1970) and `chance` are for a simulator to pass in: the
        time and the chance of everything that this node does (rule 11).

        Raises StoreForeign when the store belongs to another address.
        """
        self.transport = transport
        self.store = store
        self.queue = queue
        self.settings = store.settings
        self.chance = chance or random.Random()
        self.clock = clock
        self.wall_clock = wall_clock
        store.found(transport.my_ip, transport.peers)
        store.owner = self
        self.me = transport.my_ip
        self.log = get_logger("election", node=self.me)
        self.raft = self._new_raft()
        self.requests = Requests(self.me, self.raft, store, transport, self.settings, self.log)
        self.answer_at_once = self.requests.answer_at_once
        """Local reads take no turn: see `transport.Driver`."""
        self.snapshots = Snapshots(self.raft, store, transport, self.settings, self.log)
        self.backups = Backups(self.me, store, self.settings)
        self.handshake = Handshake(self.me, self.raft, store, transport, self.log)
        self.members = MemberChanges(self.me, self.raft, store, self.requests, self.handshake, self.log)
        transport.identify(str(store.cluster_id), store.node_id)
        transport.set_peers(list(self.raft.others))
        transport.attach(self, self.settings)
        self._handlers = self._new_handlers()
        self._turn_lock = threading.Lock()
        self._now = self._started = self.clock()
        self._is_timed = False
        self._has_ended = False
        self._flushing = Flushing(store, self.settings)
        self._readers_checked = self._started
        self._witnessed_at = float("-inf")
        self._seen: tuple[Role, int, str | None] = (Role.FOLLOWER, 0, None)
        self._memberships = store.journal.memberships
        self._linked_leader: str | None = None
        self._complaint = ""
        self._successor: str | None = None

    def _new_raft(self) -> Raft:
        store, now = self.store, self.clock()
        journal, ballot, known, incoming = store.journal, store.ballot, store.witnesses, store.incoming
        settings, node = self.settings, store.node_id
        return Raft(self.me, journal, ballot, store.commit_id, self.chance, settings, now, known, node, incoming)

    def _new_handlers(self) -> dict[type[Struct], Callable[[Arrival], None]]:
        """Who takes a request, by its type."""
        return {
            Put: self.requests.take,
            Delete: self.requests.take,
            Get: self.requests.take,
            Heartbeat: self._on_peer_request,
            Data: self._on_data,
            VoteRequest: self._on_peer_request,
            Snapshot: self._on_snapshot,
            Hello: self.handshake.on_hello,
            Ping: self._on_ping,
            Peers: self._on_peers,
            Status: self._on_status,
            Entries: self._on_entries,
            Backup: self._on_backup,
            TimeoutNow: self._on_peer_request,
            AddPeer: self.requests.take,
            RemovePeer: self.requests.take,
            ReplacePeer: self.requests.take,
            TransferLeader: self.requests.take,
        }

    # --- one turn ---

    def cycle(self, now: float | None = None) -> float:
        """One turn, in the order of effects that the module's text tells. Returns when the next one is due at the
        latest. `now`: monotonic seconds; the clock's when None. Raises StoreFailed or StoreDamaged: the node must stop.
        """
        clock = self.clock if now is None else lambda: now
        with self._turn_lock:
            self._set_clock(clock())
            self.requests.begin_turn(self._now)
            for letter in drain(self.queue):
                if type(letter) is Arrival:  # most are
                    self._handlers[type(letter.message)](letter)
                else:
                    self._take(letter)
            self.requests.expire()
            if self._is_timed:
                self.raft.tick()
            self.members.step()
            self._follow_membership()
            ready = self.raft.ready()

            is_awaited = self.raft.is_leader or ready.chunk is not None
            if is_awaited:
                self._settle(ready)
            if ready.ballot is None:
                self._post(ready)
            self.transport.flush()

            is_news = False
            if must_write := self._must_write(ready):
                is_news = self.raft.written(has_installed=self._write(ready, clock))

            if ready.ballot is not None:
                self._post(ready)
            if ready.promises:
                self._give(ready.promises)
            if not is_awaited:
                self.transport.flush()  # the leader waits for the promises, and nobody for what this node applies
                self._settle(ready)
            self._go_on(is_news)
            if must_write:
                self.handshake.finish()
            self.transport.flush()
            if keys := self._flushing.alone(self._now):
                self._write_effects(clock, keys)
            self._keep_house()
            self.store.end_view()
            self.transport.flush()
            return self._next_due()

    def may_wait(self, letters: Sequence[Letter]) -> bool:
        """True for answers of members that change nothing, as a majority has answered before; a turn comes with the
        next request, or heartbeat. With three members that is one answer of two."""
        for letter in letters:
            if not isinstance(letter, Reply) or not isinstance(letter.answer, PeerAnswer):
                return False
            if not self.raft.may_wait(letter.peer, letter.answer):
                return False
        return True

    def _follow_membership(self) -> None:
        """Keep links with the members, from when a change is appended (rule 8). Who is taken out keeps its link until
        that is committed, and as long as it leads: it may have to answer what was passed on to it."""
        leader, now, before = self.raft.leader, self.store.journal.memberships, self._memberships
        if now is before and leader == self._linked_leader:
            return
        if now[-1] is before[-1] and now[0] is before[0] and leader == self._linked_leader:
            return
        self._memberships, self._linked_leader = now, leader
        peers = {address for members in now for address in members.addresses} | {leader or self.me}
        if set(self.transport.peers) != (peers := peers - {self.me}):
            self.transport.set_peers(sorted(peers))
        self.handshake.after_change()
        if now[-1].id != before[-1].id:
            facts = {"voters": list(now[-1].voters), "learners": list(now[-1].learners)}
            self.log.info("members", commit_id=now[-1].commit_id, **facts)

    def _set_clock(self, now: float) -> None:
        self._now = now
        self.raft.clock(now, int(self.wall_clock() * 1000))

    def _must_write(self, ready: Ready) -> bool:
        """The ballot and what was sent or acknowledged never wait for their transaction; effects may."""
        if ready.ballot is not None or self.raft.wants_write or self.handshake.needs_write:
            return True
        return ready.chunk is not None

    def _write(self, ready: Ready, clock: Callable[[], float]) -> bool:
        """To the tail of the log, if that will do, or in a transaction; true when that has installed a snapshot."""
        self._keep_witnesses()
        self.store.incoming = self.raft.incoming
        if ready.ballot is None and ready.chunk is None and self._timed(clock, self.store.extend_tail):
            return False
        keys = self._flushing.along(self._now)
        has_installed = self._timed(clock, lambda: self.store.write(ready.ballot, ready.chunk, keys))
        if has_installed:
            assert ready.chunk is not None, "its last chunk"
            self.snapshots.installed(ready.chunk)
        return has_installed

    def _write_effects(self, clock: Callable[[], float], keys: int) -> None:
        """A transaction of the effects alone, when nobody waits for anything else of this turn."""
        assert not self.raft.wants_write, "what was sent or acknowledged is on disk by now"
        self._timed(clock, lambda: self.store.write(keys=keys))
        self._flushing.written_alone()

    def _timed(self, clock: Callable[[], float], write: Callable[[], bool]) -> bool:
        """Write, and look at how long the disk took."""
        began = clock()
        result = write()
        took_ms = (clock() - began) * 1000
        if took_ms > self.settings.slow_sync_ms:
            self.log.warning("slow_sync", took_ms=round(took_ms), at=self.store.journal.written)
        self._set_clock(clock())  # a leader whose sync hung for an election timeout steps down here
        return result

    def _keep_witnesses(self) -> None:
        """Now and then, let a transaction that happens anyway take with it what is known of the others' promises."""
        if self._now - self._witnessed_at >= _WITNESS_S or self.handshake.needs_write:
            self._witnessed_at = self._now
            self.store.witnesses = self.raft.remember().facts()

    def _go_on(self, is_news: bool) -> None:
        """What a write has made possible: commits, all of those of a cluster of one; and what has committed and was too
        much for one step."""
        while is_news or self.raft.applied < self.raft.commit_id:
            after = self.raft.ready()
            assert after.ballot is None, "nothing came in after the write that could change the ballot"
            self._settle(after)
            self._post(after)
            is_news = False

    def _keep_house(self) -> None:
        """What has its own time; there is seldom any of it."""
        self.members.settle(self._now)
        self.snapshots.send(self._now)
        self.backups.send(self._now)
        self.raft.forget_old_entries()
        self._note_changes()
        self._clear_dead_readers()

    def _next_due(self) -> float:
        if self.requests.want_turn:
            return self._now
        return min(self.raft.deadline(), self.snapshots.due(), self.backups.due(), self._flushing.due(self._now))

    def _settle(self, ready: Ready) -> None:
        """Apply what has committed and answer who waited for it. A majority holds it durably: that is all that these
        answers promise, so they need not wait for this node's own transaction."""
        outcomes = self.store.apply(ready.committed) if ready.committed else []
        self.requests.settle(ready, outcomes)

    def _post(self, ready: Ready) -> None:
        for peer, request in ready.requests:
            self.transport.post(peer, request)
        if ready.answers:
            self._give(ready.answers)

    @staticmethod
    def _give(answers: list[tuple[Ticket, PeerAnswer]]) -> None:
        for ticket, answer in answers:
            assert isinstance(ticket, Arrival), "tickets are the arrivals that came with the requests"
            ticket.answer(answer)

    # --- letters ---

    def _take(self, letter: Letter) -> None:
        match letter:
            case Reply():
                self._take_reply(letter)
            case Greeting():
                self.handshake.on_greeting(letter)
            case Cut():
                self.handshake.on_cut(letter)
                self.raft.unreachable(letter.peer)
                self.snapshots.unreachable(letter.peer, self._now)
                self.raft.suspect(letter.peer)
                self.requests.cut_off(letter.forwarded)
            case Task():
                letter.run()

    def _take_reply(self, reply: Reply) -> None:
        if reply.forwarded is not None:
            self.requests.take_forwarded(reply.forwarded, reply.answer)
        elif isinstance(reply.answer, PeerAnswer):
            if reply.answer.error is not UNSET:
                self.handshake.note_refusal(reply.peer, reply.answer.error.code, reply.answer.error.message)
            elif self.raft.is_credible(reply.answer.term):
                self.raft.take(reply.peer, reply.answer)
                if isinstance(reply.answer, SnapshotAnswer):
                    self.snapshots.take(reply.peer, reply.answer, self._now)
            else:
                self.log.error("strange_answer", peer=reply.peer, term=reply.answer.term)
        else:
            self.log.warning("strange_answer", peer=reply.peer, type=type(reply.answer).__name__)

    # --- questions ---

    def _on_ping(self, arrival: Arrival) -> None:
        arrival.answer(PingAnswer(node=self.me))

    def _on_peers(self, arrival: Arrival) -> None:
        members = self.raft.membership
        learners = sorted(members.learners) or UNSET
        answer = PeersAnswer(
            peers=list(members.addresses), leader=self.raft.leader, live=self._live(), learners=learners
        )
        arrival.answer(answer)

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
            "snapshots": self.snapshots.status(),
            "members": members,
            "membership": self.members.committed(),
            "connections": self.transport.connection_count,
            "waiting": self.requests.count,
            "syncs": store.syncs,
            "storage": {**store.sizes(), "full": store.room(self._now) < self.settings.reserve_bytes},
            "uptime_s": round(self._now - self._started, 3),
        }

    def _on_backup(self, arrival: Arrival) -> None:
        """A client takes the whole state, from any member that keeps its promises."""
        if self.raft.has_forgotten:
            self.handshake.refuse_as_old_copy(arrival)
        else:
            self.backups.take(arrival, self._now)

    def _on_entries(self, arrival: Arrival) -> None:
        """Committed entries for the repair of another member, as many as go into one message. Damage that shows here
        is told to who asked, and does not end this node: nothing of what it does rests on this reading."""
        message, journal, settings = arrival.message, self.store.journal, self.settings
        assert isinstance(message, Entries)
        if arrival.origin.is_full:
            arrival.origin.defer(arrival)  # who does not take its answers waits for its turn
            return
        first, last = message.first, min(message.last, self.raft.commit_id)
        if first < journal.first:
            arrival.refuse("bad_request", f"the log of this node begins at {journal.first}")
            return
        last = min(last, first + settings.batch_entries - 1)
        entries: list[Entry] = []
        try:
            if first <= last:
                entries = journal.entries(first, last, settings.batch_bytes)
        except StoreDamaged as damage:
            self.log.error("damaged_entry", why=str(damage))
            arrival.refuse("damaged", str(damage))
        else:
            arrival.answer(EntriesAnswer(entries=entries, commit_id=self.raft.commit_id))

    # --- other members ---

    def _on_peer_request(self, arrival: Arrival) -> None:
        if self._is_trusted(arrival):
            message = arrival.message
            assert isinstance(message, PeerRequest)
            self.raft.step(arrival, message, self.handshake.is_first_hand(arrival))

    def _on_data(self, arrival: Arrival) -> None:
        """A leader's entries, unless they could use up the room that this node needs for its ballot."""
        message = arrival.message
        assert isinstance(message, Data)
        if not message.entries or self.store.room(self._now) >= self.settings.reserve_bytes // 2:
            self._on_peer_request(arrival)
        elif self._is_trusted(arrival):
            self.raft.refuse_for_space(arrival, message)

    def _on_snapshot(self, arrival: Arrival) -> None:
        """A chunk of the leader's state."""
        message = arrival.message
        assert isinstance(message, Snapshot)
        if self._is_trusted(arrival):
            has_room = self.store.room(self._now) >= self.settings.reserve_bytes // 2
            self.snapshots.receive(arrival, message, has_room, self.handshake.is_first_hand(arrival))

    def _is_trusted(self, arrival: Arrival) -> bool:
        """From a member, or from the program that embeds this node; and not asked of one that has forgotten."""
        if self.raft.has_forgotten:
            self.handshake.refuse_as_old_copy(arrival)
            return False
        if not isinstance(arrival.origin, _Caller) and not self.handshake.is_from_member(arrival):
            return False
        message = arrival.message
        assert isinstance(message, PeerRequest)
        if not self.raft.is_credible(message.term):
            arrival.refuse("bad_request", f"no elections can have led from term {self.raft.term} to {message.term}")
            return False
        return True

    # --- housekeeping ---

    def _note_changes(self) -> None:
        seen = (self.raft.role, self.raft.term, self.raft.leader)
        if seen != self._seen:
            self._seen = seen
            self.log.info("role", role=str(seen[0]), term=seen[1], leader=seen[2], commit_id=self.raft.commit_id)
        if self.raft.successor != self._successor:
            self._successor = self.raft.successor
            if self._successor is not None:
                self.log.info("handing_over", to=self._successor, term=self.raft.term)
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
        """Take no more requests, let those under way finish, and let another voter lead, so that nobody has to wait for
        an election timeout; `is_idle` tells when all that is done, at the latest after `stop_grace_ms`."""
        if self.requests.is_stopping:
            return
        self.log.info("stopping", waiting=self.requests.count)
        self.requests.begin_stop(self.clock())
        if self.raft.is_leader and not self.raft.is_handing_over:
            try:
                self.raft.hand_over()
            except ChangeRefused as refusal:
                self.log.info("no_successor", why=str(refusal))

    @property
    def is_idle(self) -> bool:
        """True when nobody waits for an answer any more, nor for this node to hand over what it leads."""
        return self.requests.count == 0 and (not self.raft.is_handing_over or self.requests.is_grace_over)

    def end(self) -> None:
        """There are no more turns: whoever still waits is told, and so is who comes later."""
        self._has_ended = True
        with self._turn_lock:
            self.requests.end()
            self.members.end()
            self.backups.stop()
            for letter in drain(self.queue):
                if isinstance(letter, Arrival):
                    letter.refuse("shutting_down", STOPPING)
                elif isinstance(letter, Task):
                    letter.give_up()

    def close(self) -> None:
        """After the end: bring the effects to the disk, so that the next start has nothing to catch up on."""
        self.end()
        with self._turn_lock:
            self.store.finish()
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

        def give_up() -> None:
            future.set_exception(Unavailable("shutting_down", STOPPING))

        return self._await([Task(task, give_up)], future)

    def _ask(self, message: AnyRequest) -> Answer:
        """Put a request in as a client's, and wait for its answer."""
        caller = _Caller(f"{self.me} (embedded)")
        return self._await([Arrival(message, caller)], caller.future)

    def _await(self, letters: list[Letter], future: concurrent.futures.Future[T]) -> T:
        self.transport.deliver(letters, limited=False)
        if self._has_ended:
            self.end()  # these letters came after the last turn
        limit = 2 * self.settings.request_timeout_ms / 1000
        if not self.transport.is_serving and not self._has_ended:
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
        and the `term` and `commit_id` of the candidate's newest log entry, which decide whether it is up to date.
        Raises Unavailable when the node has ended."""
        who = Staged(
            address=staged.get("address", ""), term=staged.get("term", 0), commit_id=staged.get("commit_id", 0)
        )
        answer = _checked(self._ask(VoteRequest(term=term, commit_id=commit_id, staged=who)))
        assert isinstance(answer, VoteAnswer)
        return answer.data

    def heartbeat_handler(self, message: dict[str, Any]) -> tuple[int, int]:
        """A follower's side of a leader's heartbeat or `data` message: carry it out, durably, and return the (term,
        commit_id) of this node. Raises ProtocolError for a message that is neither, Unavailable when the node has
        ended."""
        kind = "data" if "action" in message else "heartbeat"
        request = to_request({"commit_id": 0, "leader": "", **message, "type": kind})
        answer = _checked(self._ask(request))
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


def _checked(answer: Answer) -> Answer:
    """Raise the typed error of a failure."""
    if answer.error is not UNSET:
        raise error_for(answer.error.code, answer.error.message)
    return answer
