"""The driver by hand: one node's turns, without sockets, its clock and its disk in the test's hands (package docstring,
5).

`Bench` is a node `a:1` with members `b:1` and `c:1` that the test plays. Its transport only notes what goes out, at the
moment of the flush that would put it on the line; its store is real and notes when a transaction begins and ends. So
what a test compares is the order in which the world would see things. Whatever a test is about, three rules are checked
on everything that goes out: no vote, term or acknowledgement that is not on disk, no success that a majority does not
hold.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec import UNSET, Raw

from raftnode import RaftNode
from raftnode.config import Role, Settings
from raftnode.consensus.ballot import Ballot
from raftnode.election import Election
from raftnode.errors import (
    BadRequest,
    NotCommitted,
    ProtocolError,
    RequestError,
    StoreDamaged,
    StoreFailed,
    StoreForeign,
    StoreOwned,
    Unavailable,
)
from raftnode.mailbox import Arrival, Cut, Greeting, Letter, Reply
from raftnode.messages import (
    GENESIS,
    AddPeer,
    Answer,
    AnyRequest,
    Data,
    DataAnswer,
    Delete,
    Entry,
    EntryId,
    ErrorDetail,
    Found,
    Get,
    GetAnswer,
    Heartbeat,
    HeartbeatAnswer,
    Hello,
    HelloAnswer,
    Noop,
    Ping,
    Put,
    PutAnswer,
    PutCommand,
    Snapshot,
    Staged,
    VoteAnswer,
    VoteRequest,
    chain,
    data_object,
    encode_command,
    failure,
)
from raftnode.store import Store
from raftnode.testing.processes import free_address
from raftnode.transport import Transport

ME, B, C = "a:1", "b:1", "c:1"
WRITE, WRITTEN = "write", "written"
LOW_S = Settings().election_low_ms / 1000
BEAT_S = Settings().heartbeat_ms / 1000
TIMEOUT_S = Settings().request_timeout_ms / 1000
PATIENCE = 10.0
OTHERS = ["127.0.0.1:9", "127.0.0.1:10"]
"""Members of a live node that are not there."""

# --- helpers --------------------------------------------------------------------------------------------------


@dataclass
class Sent:
    """What went out, and to whom."""

    to: str
    message: Any

    def __str__(self) -> str:
        return f"{type(self.message).__name__} to {self.to}"


class Asker:
    """One who asks: a client, or the member `peer`."""

    is_full = False

    def __init__(self, bench: Bench, name: str, peer: str | None) -> None:
        self.bench, self.client, self.peer = bench, name, peer
        self.answers: list[Any] = []

    def answer(self, arrival: Arrival, answer: Answer) -> None:
        self.answers.append(answer)
        self.bench.transport.pending.append((self.client, arrival, answer))

    def defer(self, arrival: Arrival) -> None:  # noqa: ARG002
        raise AssertionError("nobody here is full")

    def become_link_of(self, peer: str, is_link: bool) -> None:
        assert is_link
        self.peer = peer

    def close_after_answer(self) -> None:
        raise AssertionError("nobody here is refused")

    def cut(self) -> None:
        raise AssertionError("the transport ends connections")

    @property
    def only(self) -> Any:
        """The one answer that it got."""
        assert len(self.answers) == 1, f"{self.client} got {self.answers}"
        return self.answers[0]

    @property
    def code(self) -> str:
        assert self.only.error is not UNSET, f"{self.client} got {self.only}"
        code: str = self.only.error.code
        return code


class NotingTransport(Transport):
    """A transport without sockets: what goes out collects, and is out when it is flushed."""

    def __init__(self, bench: Bench, others: list[str]) -> None:
        super().__init__(ME, 5, queue.Queue(100))
        self.bench = bench
        self.peers = others
        self.reachable: set[str] = set()
        """Members over whose link a request could be passed on now."""
        self.pending: list[tuple[str, Arrival | None, Any]] = []
        self.passed_on: list[Arrival] = []

    def post(self, peer: str, message: Any) -> None:
        self.pending.append((peer, None, message))

    def can_forward(self, peer: str) -> bool:
        return peer in self.reachable

    def forward(self, peer: str, request: Any, arrival: Arrival) -> None:
        assert peer in self.reachable
        self.pending.append((peer, None, request))
        self.passed_on.append(arrival)

    def flush(self) -> None:
        pending, self.pending = self.pending, []
        for to, arrival, message in pending:
            self.bench.check(arrival, message)
            self.bench.events.append(Sent(to, message))


class Bench:
    """One node, and its world."""

    def __init__(self, others: tuple[str, ...] = (B, C), store: Store | None = None, **settings: int) -> None:
        self.events: list[Sent | str] = []
        self.now = time.monotonic()
        self.transport = NotingTransport(self, list(others))
        self.store = store or Store("memory", settings=Settings(**settings))
        self.election = Election(self.transport, self.store, self.transport.queue)
        self.election.chance.seed(7)
        self.election.clock = lambda: self.now
        self.raft = self.election.raft
        self.acknowledged: dict[str, int] = {}
        self.on_disk = (self.store.ballot, self.store.journal.written)
        self.in_write: Callable[[], None] = lambda: None
        """What happens while the disk syncs."""
        self._write = self.store.write
        self.store.write = self._noted_write  # type: ignore[method-assign]
        self._extend, self._append = self.store.extend_tail, self.store._tail.append
        self.store.extend_tail = self._noted_extend  # type: ignore[method-assign]
        self.store._tail.append = self._noted_append  # type: ignore[method-assign]

    def _noted_write(
        self, ballot: Ballot | None = None, chunk: Snapshot | None = None, keys: int | None = None
    ) -> bool:
        self.events.append(WRITE)
        self.in_write()
        has_installed = self._write(ballot, chunk, keys)
        self._note_written()
        return has_installed

    def _noted_append(self, entries: Sequence[Entry]) -> None:
        self.events.append(WRITE)
        self.in_write()
        self._append(entries)

    def _noted_extend(self) -> bool:
        if has_written := self._extend():
            self._note_written()
        return has_written

    def _note_written(self) -> None:
        self.on_disk = (self.store.ballot, self.store.journal.written)
        self.events.append(WRITTEN)

    def check(self, arrival: Arrival | None, message: Any) -> None:
        """Whatever goes out promises nothing that is not so (rules 1 and 2 of TRAPS)."""
        ballot, written = self.on_disk
        match message:
            case VoteAnswer(data=True, pre_vote=False):
                assert arrival is not None
                assert isinstance(arrival.message, VoteRequest)
                candidate = arrival.message.staged.address
                is_kept = ballot == Ballot(message.term, candidate) or ballot.term > message.term
                assert is_kept, f"{message} is out, on disk is {ballot}"
            case VoteRequest(pre_vote=False):
                assert ballot == Ballot(message.term, ME), f"{message} is out, on disk is {ballot}"
            case DataAnswer(data=True):
                assert message.match <= written, f"{message} is out, the log on disk ends at {written}"
            case PutAnswer(data=True) if arrival is not None and arrival not in self.transport.passed_on:
                assert isinstance(message.commit_id, int)
                copies = [written, *(self.acknowledged.get(peer, 0) for peer in self.transport.peers)]
                holders = sum(copy >= message.commit_id for copy in copies)
                assert 2 * holders > len(copies), f"{message} is out, and {holders} of {len(copies)} hold it"
        if isinstance(message, VoteAnswer | HeartbeatAnswer | DataAnswer | Data | Heartbeat) and not getattr(
            message, "pre_vote", False
        ):
            assert message.term <= ballot.term, f"{message} is out, on disk is {ballot}"

    # --- what comes in ---

    def letter(self, letter: Letter) -> None:
        self.transport.queue.put([letter])

    def ask(self, message: AnyRequest, name: str = "client", peer: str | None = None) -> Asker:
        asker = Asker(self, peer or name, peer)
        self.letter(Arrival(message, asker))
        return asker

    def say(self, peer: str, answer: Any, forwarded: Arrival | None = None) -> None:
        """A member answers; what it acknowledges is remembered."""
        if isinstance(answer, DataAnswer) and answer.data:
            self.acknowledged[peer] = max(self.acknowledged.get(peer, 0), answer.match)
        self.letter(Reply(peer, answer, forwarded))

    def turn(self, later: float = 0.0) -> list[str]:
        """One turn, `later` seconds after the last; what happened in it, in order."""
        before = len(self.events)
        self.now += later
        self.election.cycle(self.now)
        return [str(event) for event in self.events[before:]]

    # --- shortcuts ---

    def lead(self) -> None:
        """Win an election with the votes of both, and commit the no-op."""
        self.election.ask_for_vote()
        term = self.raft.term + 1
        for pre_vote in (True, False):
            self.say(B, VoteAnswer(data=True, term=term, pre_vote=pre_vote))
            self.turn()
        assert self.raft.is_leader
        self.acknowledge()
        assert self.raft.may_serve_reads

    def acknowledge(self, *peers: str) -> list[str]:
        """These members (default: both) hold everything that this leader has staged, and say so; what followed."""
        match = self.store.journal.last.id.commit_id
        for peer in peers or (B, C):
            self.say(peer, DataAnswer(data=True, term=self.raft.term, match=match))
        return self.turn()

    def follow(self, leader: str = B, term: int = 1) -> None:
        """Hear of a leader, and settle."""
        self.ask(Heartbeat(term=term, leader=leader, commit_id=0), peer=leader)
        self.turn()
        assert self.raft.leader == leader
        self.turn()

    def sent(self, kind: type[Any], to: str | None = None) -> list[Any]:
        return [
            event.message
            for event in self.events
            if isinstance(event, Sent) and isinstance(event.message, kind) and to in (None, event.to)
        ]

    def close(self) -> None:
        self.store.close()


Make = Callable[..., Bench]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes benches, and closes their stores."""
    benches: list[Bench] = []

    def make_one(others: tuple[str, ...] = (B, C), store: Store | None = None, **settings: int) -> Bench:
        benches.append(Bench(others, store, **settings))
        return benches[-1]

    yield make_one
    for bench in benches:
        bench.close()


@pytest.fixture
def bench(make: Make) -> Bench:
    return make()


def entries(*terms: int, after: int = 0, checksum: int = 0) -> list[Entry]:
    """Entries of these terms, each a put of its own key, chained from `checksum`."""
    found = []
    for place, term in enumerate(terms, after + 1):
        command = encode_command(PutCommand(namespace="default", key=f"k{place}", value=Raw(b"%d" % place)))
        checksum = chain(checksum, term, place, 0, command)
        found.append(Entry(term, place, 0, checksum, command))
    return found


def log_of(leader: str, term: int, found: list[Entry], commit_id: int = 0, previous: EntryId = GENESIS) -> Data:
    return Data(
        action="log" if found else "commit",
        term=term,
        leader=leader,
        previous=previous,
        entries=found,
        commit_id=commit_id,
    )


def vote_request(candidate: str, term: int, last: EntryId = GENESIS, commit_id: int = 0) -> VoteRequest:
    staged = Staged(address=candidate, term=last.term, commit_id=last.commit_id)
    return VoteRequest(term=term, commit_id=commit_id, staged=staged)


def put(key: str = "k", value: bytes = b"1") -> Put:
    return Put(key=key, value=Raw(value))


def who(address: str, term: int = 0, commit_id: int = 0) -> dict[str, Any]:
    return {"address": address, "term": term, "commit_id": commit_id}


# --- the published methods, in this thread --------------------------------------------------------------------


def test_one_vote_a_term_and_it_is_on_disk(make: Make, tmp_path: Path) -> None:
    """published interface, TRAPS 1 and 4: B gets the vote of term 5, and again when it asks again (its answer was
    lost); C does not. The directory is closed without a farewell and opened again: B still has the vote, C still does
    not get it. An older term gets nothing, a newer one a vote of its own."""
    first = make(store=Store("database", tmp_path))
    assert first.election.decide_vote(5, 0, who(B)) is True
    assert first.election.decide_vote(5, 0, who(B)) is True
    assert first.election.decide_vote(5, 0, who(C)) is False
    first.close()

    store = Store("database", tmp_path)
    assert store.ballot == Ballot(5, B)
    again = make(store=store)
    assert again.election.decide_vote(5, 0, who(C)) is False
    assert again.election.decide_vote(5, 0, who(B)) is True
    assert again.election.decide_vote(4, 0, who(B)) is False
    assert again.election.decide_vote(6, 0, who(C)) is True
    again.close()

    last = Store("database", tmp_path)
    assert last.ballot == Ballot(6, C)
    last.close()


def test_decide_vote_waits_for_the_disk(tmp_path: Path) -> None:
    """published interface: "the ballot is on disk before True is returned". A live node is asked, and its disk is held:
    while the transaction is under way the caller has no answer; when it ends, it has."""
    node = live(OTHERS, data_dir=tmp_path, election_low_ms=20_000, election_high_ms=20_000)
    write, reached, go_on = node.store.write, threading.Event(), threading.Event()

    def held(*what: Any) -> bool:
        reached.set()
        assert go_on.wait(PATIENCE)
        return write(*what)

    node.store.write = held  # type: ignore[method-assign]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(node.election.decide_vote, 9, 0, who("b:1"))
        try:
            assert reached.wait(PATIENCE)
            assert not concurrent.futures.wait([asked], 0.2).done, "answered before the transaction has ended"
        finally:
            go_on.set()
        assert asked.result(PATIENCE) is True
    node.close()


@pytest.mark.parametrize(
    ("last", "commit_id", "granted"),
    [
        (EntryId(2, 900), 900, False),  # a longer log of an older term, and more of it committed
        (EntryId(3, 2), 900, False),  # the same term, but shorter
        (EntryId(0, 0), 900, False),  # an empty log that boasts of its commit_id
        (EntryId(3, 3), 0, True),  # the very same log
        (EntryId(3, 4), 0, True),
        (EntryId(4, 1), 0, True),  # shorter, of a newer term
    ],
)
def test_votes_compare_the_newest_entry(bench: Bench, last: EntryId, commit_id: int, granted: bool) -> None:
    """published interface, TRAPS 3: this log ends at entry 3 of term 3, committed up to 1. A candidate is compared by
    the (term, commit_id) of its newest entry; what it has committed counts for nothing."""
    found = entries(1, 2, 3)
    assert bench.election.heartbeat_handler(data_object(log_of(B, 3, found, commit_id=1))) == (3, 1)
    bench.turn(10)  # the leader is silent for longer than an election timeout
    assert bench.election.decide_vote(7, commit_id, who(C, last.term, last.commit_id)) is granted
    assert bench.store.ballot == Ballot(7, C if granted else None)


def test_a_node_that_hears_a_leader_grants_nothing(bench: Bench) -> None:
    """TRAPS 14: within the least election timeout of a leader's message a vote is refused and the term stays; after
    it the same request is granted."""
    bench.follow(B, 3)
    assert bench.election.decide_vote(8, 0, who(C)) is False
    assert bench.raft.term == 3
    bench.turn(LOW_S + 0.01)
    assert bench.election.decide_vote(8, 0, who(C)) is True


def test_heartbeat_handler(bench: Bench) -> None:
    """published interface: the follower's side of heartbeat and data, in the caller's thread: the answer is this node's
    (term, commit_id), entries are on disk, and a heartbeat commits only what matched (rule 6)."""
    handle = bench.election.heartbeat_handler
    assert handle({"term": 2, "leader": B, "commit_id": 0}) == (2, 0)
    assert bench.store.ballot == Ballot(2, None)
    assert handle({"term": 2, "leader": B, "commit_id": 9}) == (2, 0), "nothing has matched yet"
    found = entries(2, 2, 2)
    assert handle(data_object(log_of(B, 2, found))) == (2, 0)
    assert bench.store.journal.written == 3
    assert handle({"term": 2, "leader": B, "commit_id": 2}) == (2, 2)
    assert handle(data_object(log_of(B, 2, [], commit_id=3, previous=found[-1].id))) == (2, 3)
    assert bench.store.get({"key": "k3"})["value"] == 3
    assert handle({"term": 1, "leader": C, "commit_id": 0}) == (2, 3), "an old leader is told the term"
    assert bench.raft.leader == B


def test_a_new_leaders_heartbeat_commits_only_what_it_matched(bench: Bench) -> None:
    """Rule 6, TRAPS 7: three entries are staged from B; C leads the next term and says that 2 is committed. These may
    be other entries: nothing commits before C's own message has matched them, and then no further than that."""
    handle = bench.election.heartbeat_handler
    found = entries(2, 2, 2)
    assert handle(data_object(log_of(B, 2, found))) == (2, 0)
    assert handle({"term": 3, "leader": C, "commit_id": 2}) == (3, 0)
    assert handle(data_object(log_of(C, 3, [], commit_id=2, previous=found[0].id))) == (3, 1)
    assert handle({"term": 3, "leader": C, "commit_id": 3}) == (3, 1)
    assert handle(data_object(log_of(C, 3, [], commit_id=3, previous=found[2].id))) == (3, 3)


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"term": "2", "leader": B},
        {"term": -1, "leader": B},
        {"action": "dance", "term": 1, "leader": B, "previous": {"term": 0, "commit_id": 0}},
        {"action": "log", "term": 1, "leader": B},
        {"term": 1, "leader": {B}},
    ],
)
def test_heartbeat_handler_refuses_what_is_no_message(bench: Bench, message: dict[str, Any]) -> None:
    """A message that is neither heartbeat nor data raises our protocol error, and changes nothing."""
    with pytest.raises(ProtocolError):
        bench.election.heartbeat_handler(message)
    assert (bench.raft.term, bench.events) == (0, [])


def test_put_and_get_of_one_node_without_a_loop(make: Make) -> None:
    """A cluster of one leads as soon as its timer is armed. Nobody runs the loop: the caller's thread takes the turns,
    and every put is written before it returns (TRAPS 2; etcd #14370)."""
    bench = make(others=())
    bench.election.init_timeout()
    assert bench.raft.is_leader
    assert bench.election.handle_put({"key": "name", "value": {"first": "John"}}) is True
    assert bench.store.journal.written == 2
    found = bench.election.handle_get({"key": "name"})
    assert (found["value"], found["version"], found["namespace"], found["modified"]) == (
        {"first": "John"},
        1,
        "default",
        2,
    )
    assert bench.election.handle_put({"type": "delete", "key": "name"}) is True
    assert bench.election.handle_get({"key": "name"})["value"] is None
    assert bench.election.handle_get({"key": "name", "consistency": "local"})["value"] is None


def test_wrong_requests_raise_and_lost_ones_are_false(make: Make) -> None:
    """A put that is wrong itself raises; without a leader a put is False and a read raises Unavailable, when the
    request's time is up."""
    bench = make(others=(B, C), request_timeout_ms=60)
    bench.election.clock = time.monotonic
    for payload in ({}, {"key": "", "value": 1}, {"key": "k"}, {"key": "k" * 600, "value": 1}, {"key": 1, "value": 1}):
        with pytest.raises((BadRequest, ProtocolError)):
            bench.election.handle_put(payload)
    with pytest.raises(ProtocolError, match="is for members"):
        bench.election.request({"type": "heartbeat", "term": 9, "leader": B, "commit_id": 0})
    assert bench.election.handle_put({"key": "k", "value": 1}) is False
    with pytest.raises(Unavailable) as refused:
        bench.election.handle_get({"key": "k"})
    assert refused.value.code == "no_leader"


def test_ask_for_vote(bench: Bench) -> None:
    """published interface, rule 3: a pre-vote first, to every other voter, for the next term, with the position of the
    newest staged entry; it changes no ballot. Only a majority of those leads to a term of its own and to real
    requests."""
    bench.election.heartbeat_handler(data_object(log_of(B, 3, entries(3, 3), commit_id=1)))
    bench.turn(10)
    bench.events.clear()
    bench.election.ask_for_vote()
    asked = bench.sent(VoteRequest)
    assert [(r.term, r.pre_vote, r.staged.last, r.commit_id) for r in asked] == [(4, True, EntryId(3, 2), 1)] * 2
    assert bench.store.ballot == Ballot(3, None)
    bench.events.clear()
    bench.say(C, VoteAnswer(data=True, term=4, pre_vote=True))
    assert bench.turn() == [WRITE, WRITTEN, f"VoteRequest to {B}", f"VoteRequest to {C}"]
    assert [(r.term, r.pre_vote) for r in bench.sent(VoteRequest)] == [(4, False)] * 2


def test_send_vote_request(bench: Bench) -> None:
    """published interface: one request to one voter: for the node's own term a vote, for any other a pre-vote, which
    binds nobody. It is a real vote request only in a term in which this node has voted for itself."""
    bench.election.send_vote_request(C, 6)
    request = bench.sent(VoteRequest, C)[0]
    assert (request.term, request.pre_vote, request.staged.address) == (6, True, ME)
    assert [str(event) for event in bench.events] == [f"VoteRequest to {C}"]
    bench.lead()
    bench.events.clear()
    bench.election.send_vote_request(C, bench.raft.term)
    request = bench.sent(VoteRequest, C)[0]
    assert (request.term, request.pre_vote, request.staged.last) == (1, False, EntryId(1, 1))


def test_send_heartbeat_and_start_heartbeat(bench: Bench) -> None:
    """published interface: a leader sends a member what it needs next: entries if it lacks any, else a heartbeat. A
    node that does not lead sends nothing."""
    bench.election.send_heartbeat(B)
    bench.election.start_heartbeat()
    assert bench.events == []
    bench.lead()
    bench.events.clear()
    bench.election.send_heartbeat(B)
    assert [str(event) for event in bench.events] == [f"Heartbeat to {B}"]
    bench.events.clear()
    bench.election.start_heartbeat()
    assert [str(event) for event in bench.events] == [f"Heartbeat to {B}", f"Heartbeat to {C}"]
    bench.election.send_heartbeat("nobody:1")
    bench.ask(put())
    bench.turn()
    bench.say(B, DataAnswer(data=False, term=1, asked=1, reason="gap", last=GENESIS))
    bench.turn()
    bench.events.clear()
    bench.say(B, DataAnswer(data=False, term=1, asked=0, reason="gap", last=GENESIS))
    bench.election.send_heartbeat(B)
    assert all(str(event) in (f"Data to {B}", f"Heartbeat to {B}") for event in bench.events)


def test_heartbeats_go_on_by_themselves(bench: Bench) -> None:
    """A leader speaks to every member at least every `heartbeat_ms`, whether or not clients come."""
    bench.lead()
    bench.events.clear()
    for _ in range(5):
        for peer in (B, C):
            bench.say(peer, HeartbeatAnswer(term=1, commit_id=1))
        bench.election._is_timed = True
        bench.turn(BEAT_S)
    assert len(bench.sent(Heartbeat, B)) == len(bench.sent(Heartbeat, C)) == 5


def test_init_timeout_arms_the_timer(bench: Bench) -> None:
    """published interface: before `init_timeout` a node never campaigns; after it, once no leader was heard for the
    timeout, which is drawn between the two limits."""
    for _ in range(100):
        bench.turn(BEAT_S)
    assert bench.events == []
    bench.election.init_timeout()
    armed = bench.now
    while not bench.events:
        bench.turn(0.01)
        assert bench.now < armed + 5
    low, high = (ms / 1000 for ms in (bench.store.settings.election_low_ms, bench.store.settings.election_high_ms))
    assert low <= bench.now - armed <= high + 0.02
    assert [r.pre_vote for r in bench.sent(VoteRequest)] == [True, True]


def test_a_store_has_one_owner(make: Make) -> None:
    """published interface: a store that a running election owns refuses writes from anyone else; after `close` it takes
    them."""
    bench = make(others=())
    with pytest.raises(StoreOwned):
        bench.store.put(1, {"key": "k", "value": 1}, bench.transport, 1)
    bench.election.init_timeout()
    bench.election.close()
    assert bench.store.put(2, {"key": "k", "value": 1}, bench.transport, 1) is True


def test_a_store_of_another_address(tmp_path: Path) -> None:
    """rule 9: a directory belongs to the address that it was founded with."""
    transport = Transport(ME, 5, queue.Queue())
    store = Store("database", tmp_path)
    Election(transport, store, transport.queue)
    store.close()
    other, store = Transport(B, 5, queue.Queue()), Store("database", tmp_path)
    with pytest.raises(StoreForeign, match="belongs to the node at a:1"):
        Election(other, store, other.queue)
    store.close()


# --- the order of effects -------------------------------------------------------------------------------------


def test_a_vote_goes_out_after_its_transaction(bench: Bench) -> None:
    """TRAPS 1: the ballot is written and synced, then the vote is sent."""
    asker = bench.ask(vote_request(B, 1), peer=B)
    assert bench.turn() == [WRITE, WRITTEN, f"VoteAnswer to {B}"]
    assert asker.only.data is True


def test_a_vote_in_a_term_that_is_known_is_written_too(bench: Bench) -> None:
    """TRAPS 1: the term is on disk already (a member's answer told it), and the vote alone is new: it is written and
    synced before it is sent."""
    bench.say(C, HeartbeatAnswer(term=4, commit_id=0))
    assert bench.turn() == [WRITE, WRITTEN]
    assert bench.store.ballot == Ballot(4, None)
    bench.ask(vote_request(B, 4), peer=B)
    assert bench.turn() == [WRITE, WRITTEN, f"VoteAnswer to {B}"]
    assert bench.store.ballot == Ballot(4, B)


def test_with_a_changed_ballot_everything_waits(bench: Bench) -> None:
    """TRAPS 1, etcd's `msgsAfterAppend`: the turn that enters a term says nothing to members before that term is on
    disk, refusals and heartbeat answers included. A client's ping, which promises nothing, need not wait."""
    bench.ask(vote_request(B, 4), peer=B)
    bench.ask(vote_request(C, 4), peer=C)
    bench.ask(Heartbeat(term=5, leader=C, commit_id=0), peer=C)
    bench.ask(Heartbeat(term=1, leader=B, commit_id=0), peer=B)
    bench.ask(Ping(), "client")
    happened = bench.turn()
    assert happened[:3] == ["PingAnswer to client", WRITE, WRITTEN]
    assert sorted(happened[3:]) == sorted(
        [f"VoteAnswer to {B}", f"VoteAnswer to {C}", f"HeartbeatAnswer to {C}", f"HeartbeatAnswer to {B}"]
    )
    assert bench.store.ballot == Ballot(5, None)


def test_acknowledgements_go_out_after_their_transaction(bench: Bench) -> None:
    """TRAPS 2: entries in a term that is known already: the heartbeat's answer, which promises nothing, goes out
    before the transaction, and the acknowledgement after it."""
    bench.follow(B, 1)
    bench.ask(Heartbeat(term=1, leader=B, commit_id=0), peer=B)
    asker = bench.ask(log_of(B, 1, entries(1, 1)), peer=B)
    assert bench.turn() == [f"HeartbeatAnswer to {B}", WRITE, WRITTEN, f"DataAnswer to {B}"]
    assert (asker.only.data, asker.only.match) == (True, 2)


def test_entries_of_a_new_leader_are_one_transaction_with_its_term(bench: Bench) -> None:
    """The first entries of a new term: one transaction has both, and the acknowledgement is the first word."""
    bench.ask(log_of(B, 2, entries(1, 2)), peer=B)
    assert bench.turn() == [WRITE, WRITTEN, f"DataAnswer to {B}"]
    assert bench.on_disk == (Ballot(2, None), 2)


def test_a_leader_sends_its_entries_before_it_writes(bench: Bench) -> None:
    """package docstring, thesis 10.2.1: the entry is on its way to the followers while the leader's own disk syncs; the
    client waits for a majority of disks."""
    bench.lead()
    client = bench.ask(put())
    assert bench.turn() == [f"Data to {B}", f"Data to {C}", WRITE, WRITTEN]
    assert client.answers == []
    assert bench.acknowledge(B)[0] == "PutAnswer to client"
    assert (client.only.data, client.only.commit_id, client.only.version) == (True, 2, 1)


def test_clients_wait_for_a_majority(make: Make) -> None:
    """Rule 5 with five members: its own disk and one follower are not enough, a follower that acknowledges an older
    entry counts for nothing, an acknowledgement twice counts once; the third disk is what answers the client."""
    bench = make(others=(B, C, "d:1", "e:1"))
    bench.election.ask_for_vote()
    for pre_vote in (True, False):
        for peer in (B, C):
            bench.say(peer, VoteAnswer(data=True, term=1, pre_vote=pre_vote))
        bench.turn()
    bench.acknowledge(B, C, "d:1")
    client = bench.ask(put())
    bench.turn()
    bench.acknowledge(B)
    bench.acknowledge(B)
    bench.say(C, DataAnswer(data=True, term=1, match=1))
    bench.turn()
    assert client.answers == []
    bench.acknowledge("e:1")
    assert client.only.data is True


def test_one_node_counts_itself_after_its_write(make: Make) -> None:
    """TRAPS 2, etcd #14370: with one node the disk is the whole commit rule: nothing is answered before it."""
    bench = make(others=())
    bench.election.init_timeout()
    bench.ask(put())
    happened = bench.turn()
    assert happened == [WRITE, WRITTEN, "PutAnswer to client"]


def test_answers_of_a_batch_do_not_wait_for_the_next_write(bench: Bench) -> None:
    """package docstring: what a majority holds is answered before this turn's own transaction, and the next batch's
    entries go out with it: the group commit costs one sync a turn."""
    bench.lead()
    first = bench.ask(put("one"), "first")
    bench.turn()
    second = bench.ask(put("two"), "second")
    happened = bench.acknowledge()
    assert happened == ["PutAnswer to first", f"Data to {B}", f"Data to {C}", WRITE, WRITTEN]
    bench.acknowledge()
    assert first.only.data is second.only.data is True


def test_a_read_waits_for_its_own_round(bench: Bench) -> None:
    """Rule 7, TRAPS 20: a round of heartbeats that began before the read came says nothing about it; the round that
    starts after it does, and needs a majority."""
    bench.lead()
    bench.election.start_heartbeat()
    before = bench.sent(Heartbeat, B)[-1].round
    read = bench.ask(Get(key="k"))
    bench.turn()
    asked = bench.sent(Heartbeat, B)[-1].round
    assert asked > before
    bench.say(B, HeartbeatAnswer(term=1, commit_id=1, round=before))
    bench.turn()
    assert read.answers == []
    bench.say(B, HeartbeatAnswer(term=1, commit_id=1, round=asked))
    bench.turn()
    assert read.only.data.value == Raw(b"null")


def test_a_read_sees_what_was_acknowledged_and_is_not_on_disk(bench: Bench) -> None:
    """store docstring: effects may wait for their transaction, but a read after the acknowledgement sees them."""
    bench.lead()
    bench.ask(put("k", b'"new"'))
    bench.turn()
    bench.acknowledge()
    assert bench.store.has_effects
    read = bench.ask(Get(key="k"))
    bench.turn()
    bench.say(C, HeartbeatAnswer(term=1, commit_id=2, round=bench.sent(Heartbeat, C)[-1].round))
    assert bench.turn()[0] == "GetAnswer to client"
    assert read.only.data.value == Raw(b'"new"')


def test_no_view_of_the_disk_outlives_a_turn(bench: Bench) -> None:
    """Pages that a view sees are not used again while it is there: one that local reads have opened between two turns
    is gone after the next, and so is what a turn has used."""
    bench.lead()

    def views() -> list[str]:
        env = bench.store._env._env
        assert env is not None
        return [line for line in env.readers().splitlines()[1:] if not line.endswith(" -")]

    assert bench.election.answer_at_once(Get(key="k", consistency="local")) is not None
    assert len(views()) == 1
    bench.turn()
    assert views() == []


def test_effects_wait_for_a_transaction(make: Make) -> None:
    """While entries go to the tail of the log, effects wait, however many have collected: the transaction that takes
    the tail over when it is full has the first of them with it."""
    bench = make(flush_entries=2, tail_bytes=4 * 4096)
    bench.lead()
    on_disk, transactions = [], []
    for n in range(11):
        bench.ask(put("k", b"%d" % n))
        before = bench.store._tail.fact
        assert bench.turn().count(WRITTEN) == 1
        transactions.append(bench.store._tail.fact != before)
        bench.acknowledge()
        on_disk.append(bench.store.commit_id_on_disk)
    assert transactions == [n % 5 == 3 for n in range(11)], "four fill the tail, the leader's no-op first"
    assert [before != after for before, after in itertools.pairwise([0, *on_disk])] == transactions


def test_effects_wait_for_more_of_them(make: Make) -> None:
    """Entries go to the disk in the turn in which they are sent; their effects, and with them the commit_id on disk,
    go along with some of them, when so many have collected, or alone after a while. (Each turn has its transaction
    here, as the tail of the log is off.)"""
    bench = make(flush_entries=8, flush_delay_ms=100, tail_write_bytes=1)
    bench.lead()
    on_disk: list[int] = []
    for n in range(16):
        bench.ask(put("k", b"%d" % n))
        assert bench.turn().count(WRITTEN) == 1
        assert WRITTEN not in bench.acknowledge(), "a leader has no transaction for effects alone while others come"
        on_disk.append(bench.store.commit_id_on_disk)
    assert bench.store.commit_id == 17
    assert sorted(set(on_disk)) == [0, 8, 16]
    assert bench.store.has_effects
    assert WRITTEN not in bench.turn(0.05)
    assert WRITTEN in bench.turn(0.06)
    assert not bench.store.has_effects


def test_a_follower_promises_before_it_applies(make: Make) -> None:
    """The leader waits for its acknowledgement, and nobody for what it applies: that comes after, and the effects have
    a transaction of their own when no entries follow."""
    bench = make(flush_delay_ms=50)
    bench.follow(B)
    bench.ask(log_of(B, 1, entries(1, 1, 1, 1), commit_id=4), peer=B)
    applied: list[int] = []
    flush = bench.transport.flush

    def noted() -> None:
        applied.append(bench.store.commit_id)
        flush()

    bench.transport.flush = noted  # type: ignore[method-assign]
    assert bench.turn() == [WRITE, WRITTEN, f"DataAnswer to {B}"]
    assert applied[:2] == [0, 0], "before the write, and with the acknowledgement"
    assert (bench.store.commit_id, bench.store.commit_id_on_disk) == (4, 0)
    assert bench.turn(0.06) == [WRITE, WRITTEN]
    assert bench.store.commit_id_on_disk == 4


@pytest.mark.parametrize("error", [StoreFailed, StoreDamaged])
def test_a_local_read_of_a_store_that_fails_is_for_the_turn(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Outside of a turn nothing is raised, as nobody there could end the node."""
    message = Get(key="k", consistency="local")
    answer = bench.election.answer_at_once(message)
    assert answer is not None
    assert answer.data.version == 0

    def fail() -> None:
        raise error("the disk is gone")

    bench.store.end_view()
    monkeypatch.setattr(bench.store._env, "read", fail)
    assert bench.election.answer_at_once(message) is None


class Dialled:
    """Our end of a link to `peer`, which has refused our hello."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.is_cut = False

    def admit(self) -> None:
        raise AssertionError("it was refused")

    def cut(self) -> None:
        self.is_cut = True


def refused(bench: Bench, peer: str, code: str, membership: EntryId, known_as: str = "") -> None:
    """`peer` answers our hello: by this membership we are no member, or another node is the one at our address."""
    link, detail = Dialled(peer), ErrorDetail(code, "not so")
    bench.letter(Greeting(link, HelloAnswer(data=False, error=detail, membership=membership, known_as=known_as)))
    bench.turn()
    assert link.is_cut


def was_told_of_its_removal(caplog: pytest.LogCaptureFixture) -> bool:
    return any("was removed by entry" in record.getMessage() for record in caplog.records)


def test_a_lost_disk_is_not_taken_for_a_removal(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A node with a new disk learns from one member that its address is that of another node. The next member says the
    same, by a newer membership. That is no news, and nobody has removed it: its operator must not be told so."""
    refused(bench, B, "wrong_node", GENESIS, known_as="the node before")
    assert "disk_was_lost" in caplog.text
    refused(bench, C, "wrong_node", EntryId(1, 9), known_as="the node before")
    assert not was_told_of_its_removal(caplog)


def test_who_is_removed_says_so(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A node that has kept its disk is told by one that goes by a newer membership: that is a removal."""
    refused(bench, C, "not_member", EntryId(1, 9))
    assert was_told_of_its_removal(caplog)
    assert bench.raft.is_outside


def test_a_member_that_stops_is_no_trouble(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """What a member answers in its last moment is told, but not as an error; a refusal that lasts is one."""
    with caplog.at_level(logging.INFO):
        bench.say(B, HeartbeatAnswer(term=0, commit_id=0, error=ErrorDetail(code="shutting_down", message="it stops")))
        bench.turn()
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        bench.say(B, HeartbeatAnswer(term=0, commit_id=0, error=ErrorDetail(code="wrong_cluster", message="another")))
        bench.turn()
    assert [record.levelno for record in caplog.records if "peer_refused" in record.getMessage()] == [logging.ERROR]


@pytest.mark.parametrize("kind", ["vote", "data", "own put", "put"])
def test_a_failed_write_promises_nothing(make: Make, kind: str) -> None:
    """TRAPS, LMDB, "never retry": the transaction raises StoreFailed. The turn raises too, which ends the node; the
    vote, the acknowledgement or the answer that hung on it is never sent; at the end the client is told that its write
    is open."""
    bench = make(others=() if kind == "own put" else (B, C))
    if kind == "own put":
        bench.election.init_timeout()
    elif kind == "put":
        bench.lead()
    else:
        bench.follow(B, 1)
        bench.turn(10)

    def fail() -> None:
        raise StoreFailed("the disk is gone")

    bench.events.clear()
    bench.in_write = fail
    message: AnyRequest = {"vote": vote_request(B, 2), "data": log_of(B, 1, entries(1))}.get(kind, put())
    asker = bench.ask(message, peer=B if kind in ("vote", "data") else None)
    with pytest.raises(StoreFailed):
        bench.turn()
    bench.transport.flush()
    assert asker.answers == []
    assert all(isinstance(m, Data) for m in [e.message for e in bench.events if isinstance(e, Sent)])
    bench.election.end()
    if kind in ("own put", "put"):
        assert asker.code == "not_committed"
        assert "open" in asker.only.error.message
    else:
        assert asker.answers == [], "a member is told nothing"


def test_a_failed_write_ends_the_node(tmp_path: Path) -> None:
    """The same on a live node: the caller's write is open, the node ends with the error, and who comes later is told at
    once that there is no node. (Only a write with entries fails here: the effects of the first put may go to the disk
    at any time.)"""
    node = live(data_dir=tmp_path)
    node.put("k", 1)
    write, extend_tail = node.store.write, node.store.extend_tail

    def failing(real: Callable[..., bool]) -> Callable[..., bool]:
        def fail(*what: Any, **more: Any) -> bool:
            if node.store.journal.has_unwritten:
                raise StoreFailed("the disk is gone")
            return real(*what, **more)

        return fail

    node.store.write = failing(write)  # type: ignore[method-assign]
    node.store.extend_tail = failing(extend_tail)  # type: ignore[method-assign]
    with pytest.raises(NotCommitted):
        node.put("k", 2)
    with pytest.raises(StoreFailed, match="the disk is gone"):
        node.join(PATIENCE)
    began = time.monotonic()
    with pytest.raises(Unavailable) as refused:
        node.get("k")
    assert refused.value.code == "shutting_down"
    assert time.monotonic() - began < 5, "it did not wait for its time-out"


def test_a_leader_whose_sync_hangs_steps_down(bench: Bench) -> None:
    """TRAPS 19: the leader's own transaction takes longer than the election timeout. When it returns, others may lead
    already: the node does not go on as leader, and the write is open, even though it is on disk here."""
    bench.lead()
    client = bench.ask(put())
    read = bench.ask(Get(key="k"), "reader")

    def hang() -> None:
        bench.now += 1.5 * LOW_S

    bench.in_write = hang
    bench.election.cycle()
    assert bench.raft.role is Role.FOLLOWER
    assert client.code == "not_committed"
    assert bench.store.journal.written == 2
    assert read.answers == [], "the read can still be served by the next leader"


def test_a_sync_just_within_the_timeout_changes_nothing(bench: Bench) -> None:
    """The counterpart: half an election timeout is a slow disk, not a lost leadership."""
    bench.lead()
    client = bench.ask(put())

    def dawdle() -> None:
        bench.now += 0.5 * LOW_S

    bench.in_write = dawdle
    bench.election.cycle()
    assert bench.raft.is_leader
    bench.in_write = lambda: None
    bench.acknowledge()
    assert client.only.data is True


def test_a_cluster_of_one_waits_for_its_disk(make: Make) -> None:
    """Nobody else could lead a cluster of one: after a hung sync it simply goes on."""
    bench = make(others=())
    bench.election.init_timeout()
    client = bench.ask(put())

    def hang() -> None:
        bench.now += 10 * LOW_S

    bench.in_write = hang
    bench.election.cycle()
    assert client.only.data is True


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_letters_keeps_the_promises(make: Make, seed: int) -> None:
    """Random letters of random terms, candidates, entries and clients, several a turn, with the clock going on: in no
    turn does anything go out that is not on disk, or answer a client for what no majority holds (`Bench.check`), and
    everyone who asks is answered in the end."""
    chance = random.Random(seed)
    bench = make(request_timeout_ms=500)
    bench.election.init_timeout()
    asked: list[Asker] = []
    for _ in range(150):
        for _ in range(chance.randrange(4)):
            peer, term = chance.choice((B, C)), max(0, bench.raft.term + chance.choice((-1, 0, 0, 0, 0, 1)))
            last = EntryId(chance.randrange(term + 1), chance.randrange(8))
            match chance.randrange(8):
                case 0:
                    asked.append(bench.ask(vote_request(peer, term, last), peer=peer))
                case 1 if not bench.raft.is_leader or term > bench.raft.term:
                    leader = bench.raft.leader if term == bench.raft.term else peer
                    if leader in (B, C):
                        asked.append(bench.ask(Heartbeat(term=term, leader=leader, commit_id=0), peer=leader))
                case 2 if bench.raft.leader in (B, C):
                    newest = bench.store.journal.last
                    more = entries(bench.raft.term, after=newest.id.commit_id, checksum=newest.checksum)
                    data = log_of(bench.raft.leader, bench.raft.term, more, previous=newest.id)
                    asked.append(bench.ask(data, peer=bench.raft.leader))
                case 3:
                    bench.say(peer, VoteAnswer(data=True, term=bench.raft.term + 1, pre_vote=True))
                case 4:
                    bench.say(peer, VoteAnswer(data=True, term=bench.raft.term))
                case 5 if bench.raft.is_leader:
                    sent = [m for m in bench.sent(Data, peer) if m.term == bench.raft.term]
                    if sent:
                        match = sent[-1].previous.commit_id + len(sent[-1].entries)
                        bench.say(peer, DataAnswer(data=True, term=bench.raft.term, match=match))
                case 6:
                    asked.append(bench.ask(put(f"k{chance.randrange(3)}"), "writer"))
                case 7:
                    asked.append(bench.ask(Get(key="k1"), "reader"))
        bench.turn(chance.choice((0.0, 0.01, 0.1, 0.4)))
    bench.election.end()
    assert all(len(asker.answers) == 1 for asker in asked)


def test_status_tells_what_is_committed_of_the_members(bench: Bench) -> None:
    """Rule 8: a change is in force when it is appended, and done when it is committed. `members` is what is in force,
    `membership` what is committed: the founders' until a majority has the change, and then that."""
    bench.lead()
    bench.ask(AddPeer(address="127.0.0.1:5009"))
    bench.turn()
    status = bench.election.status()
    assert "127.0.0.1:5009" in status["members"]
    assert (status["membership"]["commit_id"], status["membership"]["learners"]) == (0, {})
    bench.acknowledge()
    membership = bench.election.status()["membership"]
    assert (membership["commit_id"], membership["learners"]) == (2, {"127.0.0.1:5009": ""})
    assert membership["voters"].keys() == {ME, B, C}


# --- lost leadership, and the way to another leader -----------------------------------------------------------


def test_lost_leadership(bench: Bench) -> None:
    """Rule 12, TRAPS 24: a leader with a staged write and a waiting read hears of a newer term. The write may still
    be committed by the next leader: open. The read was not answered, so it waits, and goes to the new leader."""
    bench.lead()
    bench.transport.reachable = {B}
    write, read = bench.ask(put(), "writer"), bench.ask(Get(key="k"), "reader")
    bench.turn()
    bench.ask(Heartbeat(term=2, leader=B, commit_id=0), peer=B)
    bench.turn()
    assert write.code == "not_committed"
    assert read.answers == []
    bench.turn()
    assert [m.key for m in bench.sent(Get, B)] == ["k"]
    bench.say(B, GetAnswer(data=Found(key="k", namespace="default")), bench.transport.passed_on[0])
    bench.turn()
    assert read.only.data.key == "k"


def test_a_read_that_finds_no_leader_any_more_is_refused(bench: Bench) -> None:
    """The leader steps down because nobody answers it: its waiting read is refused when its time is up, not
    executed."""
    bench.lead()
    bench.election._is_timed = True
    read = bench.ask(Get(key="k"))
    bench.turn()
    steps = 0
    while not read.answers:
        bench.turn(BEAT_S)
        steps += 1
    assert bench.raft.role is not Role.LEADER
    assert read.code == "no_leader"
    assert steps * BEAT_S == pytest.approx(TIMEOUT_S, abs=3 * BEAT_S)


def test_a_write_that_another_leader_cut_is_not_taken_for_done(bench: Bench) -> None:
    """TRAPS 11: the staged write of a deposed leader is overwritten at its commit_id by another entry, which commits:
    the client has long been told "open", and only once."""
    bench.lead()
    write = bench.ask(put("mine"))
    bench.turn()
    base = bench.store.journal.id_at(1)
    other = encode_command(Noop())
    checksum = chain(bench.store.read_entries(1, 1, 0)[0].checksum, 2, 2, 0, other)
    bench.ask(log_of(B, 2, [Entry(2, 2, 0, checksum, other)], commit_id=2, previous=base), peer=B)
    bench.turn()
    assert write.code == "not_committed"
    bench.turn(1)
    assert len(write.answers) == 1
    assert (bench.raft.commit_id, bench.store.get({"key": "mine"})["value"]) == (2, None)


def test_a_request_is_passed_on_once(bench: Bench) -> None:
    """README, messages: a follower passes a request on to the leader, says whose it is and that it was passed on, and
    returns the leader's answer. What has been passed on once is not passed on again."""
    bench.follow(B)
    bench.transport.reachable = {B}
    write = bench.ask(put("k", b'"v"'), "me:77")
    bench.turn()
    passed = bench.sent(Put, B)[0]
    assert (passed.key, passed.value, passed.forwarded, passed.client) == ("k", Raw(b'"v"'), True, "me:77")
    bench.say(B, PutAnswer(data=True, commit_id=9, version=1, replaced=None), bench.transport.passed_on[0])
    bench.turn()
    assert (write.only.data, write.only.commit_id) == (True, 9)
    again = bench.ask(Put(key="k", value=Raw(b"1"), forwarded=True))
    bench.turn()
    assert again.code == "no_leader"
    assert len(bench.sent(Put)) == 1


@pytest.mark.parametrize("code", ["no_leader", "shutting_down"])
def test_what_the_leader_did_not_execute_is_tried_again(bench: Bench, code: str) -> None:
    """The leader answers that it is none any more: nothing was executed, so the client need not know; the next leader
    gets the request, a write too."""
    bench.follow(B)
    bench.transport.reachable = {B, C}
    write = bench.ask(put())
    bench.turn()
    bench.say(B, failure("put", code, "no"), bench.transport.passed_on[0])
    bench.turn()
    assert write.answers == []
    bench.ask(Heartbeat(term=2, leader=C, commit_id=0), peer=C)
    bench.turn()
    bench.turn()
    assert len(bench.sent(Put, C)) == 1


@pytest.mark.parametrize("code", ["overloaded", "storage_full", "not_committed", "too_large"])
def test_other_refusals_of_the_leader_are_the_clients(bench: Bench, code: str) -> None:
    """Any other answer of the leader goes to the client as it is."""
    bench.follow(B)
    bench.transport.reachable = {B}
    write = bench.ask(put())
    bench.turn()
    bench.say(B, failure("put", code, "in words"), bench.transport.passed_on[0])
    bench.turn()
    assert (write.code, write.only.error.message) == (code, "in words")


def test_the_end_of_an_older_link_says_nothing_of_the_newer(bench: Bench) -> None:
    """A member opens its link again; the end of the old one is told later. The new one is its link: what comes over it
    is the member's own word, which is remembered (`consensus.witness`). (Found by the simulator.)"""
    hello = Hello(cluster=str(bench.store.cluster_id), node="id-b", address=B)
    older, newer = bench.ask(hello, "older"), bench.ask(hello, "newer")
    bench.turn()
    assert older.only.data
    assert newer.only.data
    bench.letter(Cut(B, end=older))
    bench.letter(Arrival(Heartbeat(term=1, leader=B, commit_id=0), newer))
    bench.turn()
    assert bench.raft.leader == B
    assert bench.raft.witnesses.of(B).term == 1
    bench.letter(Cut(B, end=newer))
    bench.letter(Arrival(Heartbeat(term=2, leader=B, commit_id=0), newer))
    bench.turn()
    assert bench.raft.term == 2
    assert bench.raft.witnesses.of(B).term == 1, "who is not linked is not taken for the member"


def test_another_node_at_the_address_makes_no_promises_for_the_member(bench: Bench) -> None:
    """A node that goes by a newer membership is welcome, though another node is known at its address: this log may lag.
    What it says is not remembered of the one that is known, which would be kept out if it came back."""
    cluster = str(bench.store.cluster_id)
    member = bench.ask(Hello(cluster=cluster, node="id-b", address=B), "member")
    bench.turn()
    other = bench.ask(Hello(cluster=cluster, node="id-x", address=B, membership=EntryId(7, 70)), "other")
    bench.turn()
    assert member.only.data
    assert other.only.data
    bench.letter(Arrival(Heartbeat(term=3, leader=B, commit_id=0), other))
    bench.turn()
    assert bench.raft.leader == B
    assert bench.raft.membership.node_of(B) == "id-b"
    assert bench.raft.witnesses.of(B).term == 0


def test_the_link_to_the_leader_is_cut(bench: Bench) -> None:
    """TRAPS 24: the link on which a write and a read were passed on ends. The write may have been executed: open. The
    read is kept, and goes out again when the same leader's link is back."""
    bench.follow(B)
    bench.transport.reachable = {B}
    write, delete, read = bench.ask(put(), "w"), bench.ask(Delete(key="d"), "d"), bench.ask(Get(key="k"), "r")
    bench.turn()
    bench.transport.reachable = set()
    bench.letter(Cut(B, forwarded=list(bench.transport.passed_on)))
    bench.turn()
    assert write.code == delete.code == "not_committed"
    assert "cut" in write.only.error.message
    assert read.answers == []
    bench.events.clear()
    bench.transport.reachable = {B}
    bench.turn()
    assert [str(event) for event in bench.events] == [f"Get to {B}"]
    bench.say(B, GetAnswer(data=Found(key="k", namespace="default")), bench.transport.passed_on[-1])
    bench.turn()
    assert read.only.error is UNSET


def test_the_leader_is_replaced(bench: Bench) -> None:
    """The old leader's link stays, but another leads now: the old one may never answer. The write is open; the read
    goes to the new leader, without waiting for anything else to happen. A late answer of the old one changes
    nothing."""
    bench.follow(B)
    bench.transport.reachable = {B, C}
    write, read = bench.ask(put(), "w"), bench.ask(Get(key="k"), "r")
    bench.turn()
    bench.ask(Heartbeat(term=2, leader=C, commit_id=0), peer=C)
    bench.turn()
    assert read.answers == []
    for _ in range(5):
        bench.turn(BEAT_S)
    assert write.code == "not_committed"
    assert "replaced" in write.only.error.message
    assert [m.key for m in bench.sent(Get, C)] == ["k"], "the read was not tried again with the new leader"
    bench.say(B, PutAnswer(data=True, commit_id=5), bench.transport.passed_on[0])
    bench.turn()
    assert len(write.answers) == 1


def test_this_node_takes_over_from_the_leader(bench: Bench) -> None:
    """The same, and the new leader is this node: it serves the read itself."""
    bench.follow(B)
    bench.transport.reachable = {B, C}
    write, read = bench.ask(put(), "w"), bench.ask(Get(key="k"), "r")
    bench.turn()
    bench.turn(2)
    bench.lead()
    for _ in range(3):
        bench.turn()
        if beats := bench.sent(Heartbeat, C):
            bench.say(C, HeartbeatAnswer(term=bench.raft.term, commit_id=1, round=beats[-1].round))
    bench.turn()
    assert write.code == "not_committed"
    assert read.answers, "the read was not served by the new leader"
    assert read.only.data.key == "k"


def test_requests_wait_while_the_leaders_link_is_down(bench: Bench) -> None:
    """A leader is known but can't be reached: requests wait. When the *same* leader's link comes back, nothing but the
    link has changed, and they go out at once, in their order; a turn is due at once too."""
    bench.follow(B)
    asked = [bench.ask(put(f"k{n}")) for n in range(3)] + [bench.ask(Get(key="k"))]
    bench.turn()
    bench.turn(BEAT_S)
    assert not bench.sent(Put)
    assert not any(asker.answers for asker in asked)
    bench.transport.reachable = {B}
    assert bench.election._next_due() <= bench.now
    bench.turn()
    assert [m.key for m in bench.sent(Put, B)] == ["k0", "k1", "k2"]
    assert len(bench.sent(Get, B)) == 1


def test_requests_wait_for_a_leader_to_appear(bench: Bench) -> None:
    """Requests that come during an election wait and are served: here by this node, which wins it."""
    write, read = bench.ask(put("k", b"5"), "w"), bench.ask(Get(key="k"), "r")
    bench.turn()
    assert not write.answers
    assert not read.answers
    bench.lead()
    bench.turn()
    bench.acknowledge()
    assert write.only.data is True
    bench.turn()
    bench.say(C, HeartbeatAnswer(term=1, commit_id=2, round=bench.sent(Heartbeat, C)[-1].round))
    bench.turn()
    assert read.only.data.key == "k"


def test_reads_wait_for_the_no_op(bench: Bench) -> None:
    """Rule 7, TRAPS 6: a new leader does not know the commit_id of the cluster before its own no-op has committed; a
    read that comes before waits for it."""
    bench.election.ask_for_vote()
    for pre_vote in (True, False):
        bench.say(B, VoteAnswer(data=True, term=1, pre_vote=pre_vote))
        bench.turn()
    assert bench.raft.is_leader
    read = bench.ask(Get(key="k"))
    bench.turn()
    bench.say(C, HeartbeatAnswer(term=1, commit_id=0, round=99))
    bench.turn()
    assert read.answers == []
    bench.acknowledge()
    bench.turn()
    bench.say(C, HeartbeatAnswer(term=1, commit_id=1, round=bench.sent(Heartbeat, C)[-1].round))
    bench.turn()
    assert read.only.commit_id == 1


# --- time-outs and limits -------------------------------------------------------------------------------------


def test_time_outs_of_a_follower(bench: Bench) -> None:
    """Every request ends: one that waits for a leader with no_leader, one that was passed on and is not answered with
    not_committed (a write) or no_leader (a read); after `request_timeout_ms`, and not before. Late answers are
    dropped."""
    bench.follow(B)
    parked = [bench.ask(put(), "p1"), bench.ask(Get(key="k"), "p2")]
    bench.turn()
    bench.transport.reachable = {B}
    bench.election.requests._last_serving = bench.election.requests._serving  # they stay where they are
    write, read = bench.ask(put(), "w"), bench.ask(Get(key="k"), "r")
    bench.turn()
    everyone = [*parked, write, read]
    bench.turn(TIMEOUT_S - 0.01)
    assert not any(asker.answers for asker in everyone)
    bench.turn(0.02 + BEAT_S)
    assert [asker.code for asker in everyone] == ["no_leader", "no_leader", "not_committed", "no_leader"]
    assert "not executed" in parked[0].only.error.message
    bench.say(B, PutAnswer(data=True, commit_id=3), bench.transport.passed_on[0])
    bench.turn()
    assert len(write.answers) == 1


def test_time_outs_of_a_leader(bench: Bench) -> None:
    """The members answer heartbeats but take no entries and confirm no round: the leader leads on, and its clients are
    answered when their time is up."""
    bench.lead()
    bench.election._is_timed = True
    write, read = bench.ask(put(), "w"), bench.ask(Get(key="k"), "r")
    began = bench.now
    while not (write.answers and read.answers):
        for peer in (B, C):
            bench.say(peer, HeartbeatAnswer(term=1, commit_id=1, round=0))
        bench.turn(BEAT_S)
        assert bench.now - began < TIMEOUT_S + 1
    assert bench.raft.is_leader
    assert (write.code, read.code) == ("not_committed", "no_leader")
    assert bench.now - began >= TIMEOUT_S - BEAT_S


def test_overloaded_by_size(make: Make) -> None:
    """TRAPS 38: what a leader has staged and not committed is bounded by `uncommitted_bytes`: the next write is
    refused at once and not executed; when the backlog has committed, writes are taken again."""
    bench = make(uncommitted_bytes=1000)
    bench.lead()
    first = bench.ask(put("big", b'"' + b"x" * 2000 + b'"'), "first")
    bench.turn()
    second = bench.ask(put("small"), "second")
    bench.turn()
    assert second.code == "overloaded"
    assert first.answers == []
    bench.acknowledge()
    assert first.only.data is True
    third = bench.ask(put("small"), "third")
    bench.turn()
    bench.acknowledge()
    assert (third.only.data, third.only.version) == (True, 1)


@pytest.mark.parametrize("where", ["writes", "reads", "passed on", "parked"])
def test_overloaded_by_number(make: Make, where: str) -> None:
    """`waiting_requests` bounds each of the four places where a request may wait; the one too many is told at once."""
    bench = make(waiting_requests=3)
    if where in ("writes", "reads"):
        bench.lead()
    else:
        bench.follow(B)
        bench.transport.reachable = {B} if where == "passed on" else set()
    asked = [bench.ask(Get(key="k") if where == "reads" else put()) for _ in range(4)]
    bench.turn()
    assert [len(asker.answers) for asker in asked] == [0, 0, 0, 1]
    assert asked[3].code == "overloaded"


# --- the end --------------------------------------------------------------------------------------------------


def test_a_clean_stop(bench: Bench) -> None:
    """package docstring: from `begin_stop` on nothing new is taken, what waits for a leader is refused, and what is
    under way may still commit; then the node is idle."""
    bench.lead()
    write = bench.ask(put(), "under way")
    bench.turn()
    bench.election.begin_stop()
    late = bench.ask(put(), "late")
    bench.turn()
    assert late.code == "shutting_down"
    assert not bench.election.is_idle
    bench.acknowledge()
    assert write.only.data is True
    assert not bench.election.is_idle, "another one is to lead first"
    bench.acknowledge()
    candidate = Staged(address=B, term=bench.raft.term, commit_id=bench.raft.commit_id)
    bench.ask(VoteRequest(term=bench.raft.term + 1, commit_id=0, staged=candidate, transfer=True), B, peer=B)
    bench.turn()
    assert bench.election.is_idle


def test_a_stop_does_not_wait_for_ever(bench: Bench) -> None:
    """What does not finish within `stop_grace_ms` is open (a write) or refused (a read)."""
    bench.lead()
    write, read = bench.ask(put(), "w"), bench.ask(Get(key="k"), "r")
    bench.turn()
    bench.election.begin_stop()
    bench.turn(0.5)
    assert not write.answers
    bench.turn(0.6)
    assert (write.code, read.code) == ("not_committed", "shutting_down")
    assert bench.election.is_idle


def test_a_stop_refuses_what_waits_for_a_leader(bench: Bench) -> None:
    """There will be no leader for these in time: they are told at once, and so is what a stopping leader sends back."""
    bench.follow(B)
    parked = bench.ask(put(), "parked")
    bench.turn()
    bench.transport.reachable = {B}
    bench.election.requests._last_serving = bench.election.requests._serving
    passed_on = bench.ask(put(), "passed on")
    bench.turn()
    bench.election.begin_stop()
    bench.turn()
    assert parked.code == "shutting_down"
    assert passed_on.answers == []
    bench.say(B, failure("put", "no_leader", "not the leader"), bench.transport.passed_on[0])
    bench.turn()
    assert passed_on.code == "shutting_down"


def test_after_the_end(bench: Bench) -> None:
    """Whatever comes after the last turn, also what lies in the mailbox, is answered at once: shutting_down."""
    left = bench.ask(put(), "left in the mailbox")
    bench.election.end()
    assert left.code == "shutting_down"
    began = time.monotonic()
    assert bench.election.handle_put({"key": "k", "value": 1}) is False
    with pytest.raises(Unavailable) as refused:
        bench.election.handle_get({"key": "k"})
    assert refused.value.code == "shutting_down"
    assert bench.election.request({"type": "status"})["error"]["code"] == "shutting_down"
    calls: list[Callable[[], object]] = [
        lambda: bench.election.decide_vote(3, 0, who(B)),
        bench.election.init_timeout,
        bench.election.ask_for_vote,
        bench.election.start_heartbeat,
        lambda: bench.election.send_heartbeat(B),
        lambda: bench.election.send_vote_request(B, 1),
    ]
    for call in calls:
        with pytest.raises(Unavailable) as refused:
            call()
        assert refused.value.code == "shutting_down"
    assert time.monotonic() - began < 5, "none waited for its time-out"
    assert bench.raft.term == 0


def test_heartbeat_handler_does_not_invent_a_position(bench: Bench) -> None:
    """A node of term 3 that has ended can't carry a heartbeat out: that is an error, and not the term and commit_id of
    an empty node, which a leader would believe."""
    bench.follow(B, 3)
    bench.election.end()
    with pytest.raises(Unavailable) as refused:
        bench.election.heartbeat_handler({"term": 3, "leader": B, "commit_id": 0})
    assert refused.value.code == "shutting_down"


# --- from other threads ---------------------------------------------------------------------------------------


def live(peers: list[str] | None = None, **settings: Any) -> RaftNode:
    """A node that serves in a thread of its own."""
    return RaftNode(free_address(), peers or [], 5, **settings).start()


def test_methods_from_other_threads() -> None:
    """package docstring: the public methods may be called from any thread while the loop runs: eight threads put and
    read their own keys, each read sees the thread's last put, and every version was counted once."""
    node = live(store_type="memory")
    try:

        def work(name: int) -> list[int]:
            versions = []
            for n in range(25):
                assert node.election.handle_put({"key": f"t{name}", "value": n}) is True
                found = node.election.handle_get({"key": f"t{name}"})
                assert found["value"] == n
                versions.append(found["version"])
            node.election.start_heartbeat()
            return versions

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for versions in pool.map(work, range(8)):
                assert versions == list(range(1, 26))
        assert node.election.heartbeat_handler({"term": 0, "leader": "x:1", "commit_id": 0})[0] == 1
    finally:
        node.close()


def test_votes_from_many_threads() -> None:
    """Twenty threads ask a live follower for its vote of one term, for twenty candidates: exactly one gets it."""
    node = live(OTHERS, store_type="memory", election_low_ms=20_000, election_high_ms=20_000)
    try:
        start = threading.Barrier(20)

        def ask(n: int) -> bool:
            start.wait(PATIENCE)
            return node.election.decide_vote(4, 0, who(f"candidate:{n + 1}"))

        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            granted = list(pool.map(ask, range(20)))
        assert granted.count(True) == 1
        assert node.store.ballot == Ballot(4, f"candidate:{granted.index(True) + 1}")
    finally:
        node.close()


def test_callers_do_not_hang_when_the_node_ends(caplog: pytest.LogCaptureFixture) -> None:
    """Callers in several threads while the node closes, again and again: each call returns or raises one of our errors
    within moments, not after its full time-out."""
    caplog.set_level(logging.ERROR)
    for _ in range(5):
        node = live(store_type="memory")
        slowest, ended_with = [0.0], set()

        def call(node: RaftNode = node, slowest: list[float] = slowest, ended_with: set[str] = ended_with) -> None:
            for n in range(100_000):
                began = time.monotonic()
                try:
                    node.put("k", n)
                except RequestError as error:
                    ended_with.add(error.code)
                    return
                finally:
                    slowest[0] = max(slowest[0], time.monotonic() - began)

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        while node.store.commit_id < 20:
            time.sleep(0.001)
        node.close()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert ended_with <= {"shutting_down", "not_committed"}
        assert ended_with
        assert slowest[0] < 4
    assert not [record for record in caplog.records if record.name == "asyncio"]
