"""The store's own replication: a primary with followers, without elections (published interface, `Store.put`,
`send_data`, `commit`, `action_handler`). The same staging, checks and transactions as a node's; only term and majority
are given."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import Raw
from test_store import change, flip, position

from raftnode.config import Settings
from raftnode.errors import ProtocolError, StoreDamaged, StoreOwned
from raftnode.messages import EntryId, Malformed, decode_object, encode, encode_object
from raftnode.store import Store

A, B, C, D = "127.0.0.1:5001", "127.0.0.1:5002", "127.0.0.1:5003", "127.0.0.1:5004"

# --- helpers --------------------------------------------------------------------------------------------------


class Wire:
    """A transport within the process: a message goes to the follower's `action_handler`, its answer comes back.

    It keeps what was sent, and stops a sender that does not come to an end.
    """

    def __init__(self, me: str, stores: dict[str, Store]) -> None:
        self.my_ip = me
        self.peers = [peer for peer in stores if peer != me]
        self.stores = stores
        self.down: set[str] = set()
        self.replies: dict[str, Callable[[dict[str, Any]], Any]] = {}
        """Peers that answer by themselves."""
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.answers: list[dict[str, Any]] = []
        self.identity: tuple[str, str] | None = None

    def identify(self, cluster: str, node: str) -> None:
        self.identity = cluster, node

    def send_data(self, peer: str | None = None, message: dict[str, Any] | None = None) -> Any:
        assert peer in self.peers
        assert message is not None
        line = encode_object(message)
        assert line.count(b"\n") == 1, "a message is one line"
        self.sent.append((peer, message))
        assert len(self.sent) < 2000, f"there is no end to it: {message}"
        if peer in self.down:
            return None
        if peer in self.replies:
            return self.replies[peer](message)
        try:
            answer = self.stores[peer].action_handler(message)
        except ProtocolError as error:
            answer = decode_object(encode(Malformed(error.code, str(error), "data").answer()))
        self.answers.append(answer)
        return answer

    def entries_to(self, peer: str) -> list[list[int]]:
        """The commit_ids in each message to `peer`."""
        return [[e["commit_id"] for e in m["entries"]] for to, m in self.sent if to == peer and m["action"] == "log"]


@pytest.fixture
def make() -> Iterator[Callable[..., dict[str, Store]]]:
    """Makes founded stores by address."""
    made: list[Store] = []

    def make_stores(*addresses: str, directory: Path | None = None, **limits: int) -> dict[str, Store]:
        stores = {}
        for address in addresses:
            where = ("database", directory / address[-4:]) if directory else ("memory", "unused")
            store = Store(where[0], where[1], settings=Settings(**limits))
            store.found(address, addresses)
            made.append(store)
            stores[address] = store
        return stores

    yield make_stores
    for store in made:
        store.close()


def entries_of(store: Store) -> list[tuple[int, int, int, bytes]]:
    """The whole log: term, commit_id, checksum, command."""
    found: list[tuple[int, int, int, bytes]] = []
    while len(found) < store.journal.last.id.commit_id:
        batch = store.journal.entries(len(found) + 1, store.journal.last.id.commit_id, 1 << 20)
        found += [(e.term, e.commit_id, e.checksum, bytes(e.command)) for e in batch]
    return found


def put(store: Store, wire: Wire, key: str, value: Any = 1, *, term: int = 1, majority: int = 2, **more: Any) -> bool:
    return store.put(term, {"key": key, "value": value, **more}, wire, majority)


def value_of(store: Store, key: str) -> Any:
    return store.get({"key": key})["value"]


def same_history(*stores: Store) -> None:
    """All have one log, one commit_id and the same values."""
    one = stores[0]
    for other in stores[1:]:
        assert entries_of(other) == entries_of(one)
        assert other.journal.last == one.journal.last
        assert other.commit_id == one.commit_id
    for key in {json.loads(command).get("key") for *_, command in entries_of(one)} - {None}:
        assert len({json.dumps(store.get({"key": key})) for store in stores}) == 1


# --- a majority -----------------------------------------------------------------------------------------------


def test_a_put_is_on_all_who_answer(make: Callable[..., dict[str, Store]]) -> None:
    """True only once a majority holds it durably; the followers are told to commit, and the three then have one log,
    equal checksums, one commit_id and the same value. The link says who it is first (rule 9)."""
    stores = make(A, B, C)
    wire = Wire(A, stores)
    assert put(stores[A], wire, "a", "one")
    assert put(stores[A], wire, "a", {"two": [2]})
    same_history(*stores.values())
    assert [value_of(store, "a") for store in stores.values()] == [{"two": [2]}] * 3
    assert stores[B].get({"key": "a"})["version"] == 2
    assert wire.identity == (stores[A].cluster_id, stores[A].node_id)
    assert [m["action"] for to, m in wire.sent if to == B] == ["log", "commit"] * 2
    assert all(store.ballot.term == 1 for store in stores.values())
    assert stores[A].ballot.voted_for == A


def test_what_a_majority_confirmed_is_on_their_disks(make: Callable[..., dict[str, Store]], tmp_path: Path) -> None:
    """When put says True, all three can be stopped and opened again: entries, commit_id, ballot and values are there
    (TRAPS 2)."""
    stores = make(A, B, C, directory=tmp_path)
    wire = Wire(A, stores)
    for n in range(5):
        assert put(stores[A], wire, f"key-{n}", n)
    assert not put(stores[A], Wire(A, {A: stores[A]}), "staged", majority=2)
    for store in stores.values():
        store.close()
    again = [Store("database", tmp_path / address[-4:]) for address in stores]
    try:
        assert [store.commit_id for store in again] == [5, 5, 5]
        assert [store.ballot.term for store in again] == [1, 1, 1]
        assert [[value_of(store, f"key-{n}") for n in range(5)] for store in again] == [[0, 1, 2, 3, 4]] * 3
        assert [store.journal.last.id.commit_id for store in again] == [6, 5, 5]
        same_history(*again[1:])
    finally:
        for store in again:
            store.close()


def test_the_entry_is_on_the_primarys_disk_before_it_is_sent(
    make: Callable[..., dict[str, Store]], tmp_path: Path
) -> None:
    """The primary counts itself, so its own copy must be durable by the time a follower confirms: a transport that
    looks when the first message comes finds nothing unwritten (TRAPS 2)."""
    stores = make(A, B, C, directory=tmp_path)
    seen = []

    def look(message: dict[str, Any]) -> Any:
        seen.append((stores[A].journal.has_unwritten, stores[A].syncs, stores[A].commit_id, message["action"]))
        return stores[B].action_handler(message)

    wire = Wire(A, stores)
    wire.replies[B] = look
    wire.down = {C}
    syncs = stores[A].syncs
    assert put(stores[A], wire, "a")
    assert seen == [(False, syncs + 1, 0, "log"), (False, syncs + 2, 1, "commit")]


def test_without_a_majority_the_entry_stays_staged(make: Callable[..., dict[str, Store]]) -> None:
    """False when too few confirm: the entry is in the log, not in the values, and its outcome is open (TRAPS 24).
    The next put that reaches a majority commits it as well, in order, and brings the followers up to date."""
    stores = make(A, B, C)
    wire = Wire(A, stores)
    assert put(stores[A], wire, "a", "one")
    wire.down = {B, C}
    assert put(stores[A], wire, "a", "two") is False
    assert put(stores[A], wire, "b", "three") is False
    assert (stores[A].commit_id, stores[A].journal.last.id.commit_id) == (1, 3)
    assert (value_of(stores[A], "a"), value_of(stores[A], "b")) == ("one", None)
    wire.down = {C}
    assert put(stores[A], wire, "c", "four")
    same_history(stores[A], stores[B])
    assert [value_of(stores[B], key) for key in "abc"] == ["two", "three", "four"]
    assert stores[C].commit_id == 1
    wire.down = set()
    assert put(stores[A], wire, "d", "five")
    same_history(*stores.values())


@pytest.mark.parametrize(
    ("majority", "up", "outcome"),
    [(1, 0, True), (2, 0, False), (2, 1, True), (3, 1, False), (3, 2, True), (4, 3, True)],
)
def test_a_majority_counts_the_primary_once(
    make: Callable[..., dict[str, Store]], majority: int, up: int, outcome: bool
) -> None:
    """`majority` durable copies, this one counted, whoever is down; the primary in its own list of peers is not asked
    and not counted twice. With a majority of one, nobody needs to answer (TRAPS, etcd, "N=1")."""
    stores = make(A, B, C, D)
    wire = Wire(A, stores)
    wire.peers.append(A)
    wire.down = set([B, C, D][up:])
    assert put(stores[A], wire, "a", majority=majority) is outcome
    assert stores[A].commit_id == (1 if outcome else 0)


def test_a_delete_is_replicated(make: Callable[..., dict[str, Store]]) -> None:
    """A payload of type `delete` takes the value away everywhere, also one that is not there; only its own key and
    namespace."""
    stores = make(A, B, C)
    wire = Wire(A, stores)
    for namespace in ("default", "other"):
        assert put(stores[A], wire, "a", namespace, namespace=namespace)
    assert stores[A].put(1, {"type": "delete", "key": "a"}, wire, 2)
    assert stores[A].put(1, {"type": "delete", "key": "never"}, wire, 2)
    same_history(*stores.values())
    for store in stores.values():
        assert store.commit_id == 4
        assert value_of(store, "a") is None
        assert store.get({"key": "a", "namespace": "other"})["value"] == "other"


# --- followers that are behind --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limits", [{}, {"batch_bytes": 1}, {"batch_bytes": 200}, {"batch_entries": 1}, {"batch_entries": 4}], ids=str
)
@pytest.mark.parametrize("forgotten", [False, True], ids=["in memory", "on disk"])
def test_a_follower_that_is_behind_catches_up(
    make: Callable[..., dict[str, Store]], limits: dict[str, int], forgotten: bool
) -> None:
    """A follower that was down for 30 entries, and one that has nothing at all, get what they lack with the next put,
    from memory or from the primary's disk, in batches within the limits of the settings (one entry may be larger), and
    then hold it all (TRAPS 12, 38)."""
    stores = make(A, B, C, **limits)
    wire = Wire(A, stores)
    wire.down = {C}
    for n in range(30):
        assert put(stores[A], wire, f"key-{n % 7}", n)
    if forgotten:
        stores[A].journal.forget(stores[A].commit_id, 0, 0)
    wire.down = set()
    wire.sent.clear()
    assert put(stores[A], wire, "last", majority=3)
    same_history(*stores.values())
    caught_up = wire.entries_to(C)[1:]
    assert [n for batch in caught_up for n in batch] == list(range(1, 32)), "each entry once"
    most = stores[A].settings.batch_entries
    assert max(len(batch) for batch in caught_up) <= most
    sizes = {commit_id: len(command) for _, commit_id, _, command in entries_of(stores[A])}
    for batch in caught_up:
        assert len(batch) == 1 or sum(sizes[n] for n in batch) <= stores[A].settings.batch_bytes


def test_a_commit_reaches_a_follower_that_missed_the_entry(make: Callable[..., dict[str, Store]]) -> None:
    """A follower that misses the log message of a put and gets its commit message is brought up to date by that: the
    primary sends what it lacks rather than let it commit what it does not hold (TRAPS 7)."""
    stores = make(A, B, C)
    wire = Wire(A, stores)
    lost = {"log": 1}

    def lose_first(message: dict[str, Any]) -> Any:
        if lost.get(message["action"]):
            lost[message["action"]] -= 1
            return None
        return stores[C].action_handler(message)

    wire.replies[C] = lose_first
    assert put(stores[A], wire, "a", "one")
    same_history(*stores.values())
    assert value_of(stores[C], "a") == "one"


def test_a_repeated_message_changes_nothing(make: Callable[..., dict[str, Store]]) -> None:
    """A follower that gets every message again, in any order, confirms what it holds, keeps what came after, and writes
    nothing twice (TRAPS 9, 36)."""
    stores = make(A, B)
    wire = Wire(A, stores)
    for n in range(6):
        assert put(stores[A], wire, f"key-{n}", n)
    before, messages = entries_of(stores[B]), [message for _, message in wire.sent]
    chance = random.Random(6)
    for message in chance.sample(messages, len(messages)) + messages:
        answer = stores[B].action_handler(message)
        assert answer["data"] is True
    assert entries_of(stores[B]) == before
    same_history(*stores.values())
    assert stores[B].get({"key": "key-0"})["version"] == 1


# --- other primaries ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("committed", [0, 1, 3])
@pytest.mark.parametrize("staged", [1, 2, 5])
@pytest.mark.parametrize("new", [1, 3])
def test_a_divergent_suffix_is_cut(
    make: Callable[..., dict[str, Store]], tmp_path: Path, committed: int, staged: int, new: int
) -> None:
    """A led and staged entries that nobody else got; B leads a later term. When A follows, its suffix goes, from its
    disk too, in the very transaction that commits what takes its place, and what was committed stays (TRAPS 9). A
    store that is opened from A's disk afterwards has B's history."""
    stores = make(A, B, C, directory=tmp_path)
    wire = Wire(A, stores)
    for n in range(committed):
        assert put(stores[A], wire, f"old-{n}", n, majority=3)
    wire.down = {B, C}
    for n in range(staged):
        assert not put(stores[A], wire, f"lost-{n}", n)
    second = Wire(B, stores)
    second.down = {A}
    for n in range(new - 1):
        assert put(stores[B], second, f"new-{n}", n, term=2)
    second.down = set()
    assert put(stores[B], second, "newest", term=2, majority=3)
    same_history(*stores.values())
    assert stores[A].commit_id == committed + new
    assert value_of(stores[A], "lost-0") is None
    stores[A].close()
    again = Store("database", tmp_path / A[-4:])
    try:
        same_history(again, stores[B])
        assert again.ballot.term == 2
    finally:
        again.close()


def test_primaries_that_take_turns_end_with_one_history(make: Callable[..., dict[str, Store]], tmp_path: Path) -> None:
    """Ten terms with a random primary, who reaches random followers, some of them with entries that are never
    confirmed: what was confirmed stays through all of them, and in the end all have one history. A primary is one
    that may be elected: whose log is the newest of a majority (TRAPS 3)."""
    for seed in range(4):
        chance = random.Random(seed)
        stores = make(A, B, C, directory=tmp_path / str(seed), batch_bytes=100)
        confirmed: dict[str, int] = {}
        for term in range(1, 11):
            voters = chance.sample(sorted(stores), 2)
            me = max(voters, key=lambda name: stores[name].journal.last.id)
            wire = Wire(me, stores)
            for n in range(chance.randint(1, 4)):
                wire.down = set(chance.sample(wire.peers, chance.randint(0, 2)))
                key = f"{term}-{n}"
                if put(stores[me], wire, key, term, term=term):
                    confirmed[key] = term
            for store in stores.values():
                assert store.commit_id <= store.journal.last.id.commit_id
        wire = Wire(max(stores, key=lambda name: stores[name].journal.last.id), stores)
        assert put(stores[wire.my_ip], wire, "end", term=20, majority=3), f"seed {seed}"
        same_history(*stores.values())
        assert confirmed, f"seed {seed}"
        for key, value in confirmed.items():
            assert [value_of(store, key) for store in stores.values()] == [value] * 3, f"seed {seed}: {key}"


def test_a_term_that_is_over_is_refused(make: Callable[..., dict[str, Store]]) -> None:
    """A primary of an old term can do nothing: its own store refuses once it knows, followers in a later term refuse
    with their term, and it counts none of them (TRAPS 10)."""
    stores = make(A, B, C)
    assert put(stores[B], Wire(B, {B: stores[B], C: stores[C]}), "new", term=3)
    wire = Wire(A, stores)
    assert put(stores[A], wire, "old", term=2) is False
    assert [(a["data"], a["reason"], a["term"]) for a in wire.answers] == [(False, "stale_term", 3)] * 2
    assert stores[C].journal.last.id == EntryId(3, 1)
    assert [value_of(store, "old") for store in stores.values()] == [None] * 3
    assert put(stores[B], Wire(B, stores), "newer", term=3, majority=3)
    before = entries_of(stores[A])
    for term in (0, 1, 2):
        with pytest.raises(ProtocolError, match=f"term {term}") as refused:
            put(stores[A], wire, "late", term=term)
        assert refused.value.code == "no_leader"
    assert entries_of(stores[A]) == before
    assert stores[A].ballot.term == 3


def test_a_term_that_is_anothers_is_refused(make: Callable[..., dict[str, Store]]) -> None:
    """A store that has voted for another in a term does not lead in it (TRAPS 4, one vote a term)."""
    stores = make(A, B, C)
    stores[A].write(stores[A].ballot.in_term(2).vote(B))
    with pytest.raises(ProtocolError) as refused:
        put(stores[A], Wire(A, stores), "a", term=2)
    assert refused.value.code == "no_leader"
    assert stores[A].journal.last.id.commit_id == 0
    assert put(stores[A], Wire(A, stores), "a", term=3)


@pytest.mark.parametrize("ahead", [0, 2])
def test_two_primaries_of_one_term_are_noticed(make: Callable[..., dict[str, Store]], ahead: int) -> None:
    """Who vouches wrongly that nobody else leads in the term, so that two stores put in the same: a follower that
    holds the one's entry refuses the other's with `checksum`, though term and position agree, and does not confirm it;
    nothing is overwritten, on the follower or on the primary (TRAPS 37)."""
    stores = make(A, B, C)
    assert put(stores[A], Wire(A, {A: stores[A], C: stores[C]}), "a", "from A", term=1)
    alone = Wire(B, {B: stores[B]})
    for n in range(ahead):
        assert not put(stores[B], alone, f"b-{n}", "from B", term=1)
    before = {name: entries_of(store) for name, store in stores.items()}
    wire = Wire(B, stores)
    assert put(stores[B], wire, "b", "from B", term=1) is False
    assert "checksum" in [answer["reason"] for answer in wire.answers]
    assert not any(answer["data"] for answer in wire.answers)
    assert entries_of(stores[A]) == before[A]
    assert entries_of(stores[C]) == before[C]
    assert entries_of(stores[B])[: len(before[B])] == before[B]
    assert value_of(stores[C], "a") == "from A"
    assert stores[B].commit_id == 0


def test_what_was_forgotten_is_compared_too(make: Callable[..., dict[str, Store]]) -> None:
    """The same when the follower's entry is not in memory any more but on disk only: equal terms with other checksums
    are still refused."""
    stores = make(A, B, C)
    for n in range(3):
        assert put(stores[A], Wire(A, {A: stores[A], C: stores[C]}), f"a-{n}", "from A", term=1)
    alone = Wire(B, {B: stores[B]})
    for n in range(2):
        assert not put(stores[B], alone, f"b-{n}", "from B", term=1)
    stores[C].journal.forget(3, 0, 0)
    wire = Wire(B, stores)
    assert put(stores[B], wire, "b", "from B", term=1) is False
    assert "checksum" in [answer["reason"] for answer in wire.answers]
    assert not any(answer["data"] for answer in wire.answers)


# --- values ---------------------------------------------------------------------------------------------------

SPELLINGS = [
    b"1.10", b"1E5", b"1e+05", b"-0", b"-0.0", b"123456789012345678901234567890",
    b"0.1000000000000000055511151231257827",
    b'"\\u0061\\/"', b'{"b":1.0,"a":1.00}', b"[1e0,1E0]", b'{"a":1,"a":2}',
]  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.decode())
def test_a_number_keeps_its_spelling(make: Callable[..., dict[str, Store]], spelling: bytes) -> None:
    """Commands are bytes, never decoded and encoded again: a value that JSON could write otherwise is on each store as
    it was put, also on one that catches up from the disk, and the checksums agree."""
    stores = make(A, B, C)
    wire = Wire(A, stores)
    wire.down = {C}
    assert put(stores[A], wire, "a", Raw(spelling))
    assert put(stores[A], wire, "b", Raw(b"[" + spelling + b"]"))
    wire.down = set()
    stores[A].journal.forget(2, 0, 0)
    assert put(stores[A], wire, "c", Raw(spelling), majority=3)
    same_history(*stores.values())
    for store in stores.values():
        log = [command for *_, command in entries_of(store)]
        assert [spelling in command for command in log] == [True] * 3
        with store.snapshot() as find:
            record = find(b"default\0a")
        assert record is not None
        assert bytes(record.value) == spelling
        assert value_of(store, "a") == json.loads(spelling)


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -1, 2**53 + 1, 2**64, 10**30, 1.5, 1e300, 5e-324, "", "é😀\0\n", [], {}, [[[]]], {"a": [None]}],
)  # fmt: skip
def test_any_value_comes_back(make: Callable[..., dict[str, Store]], value: Any) -> None:
    """Any JSON value, given as the Python value, is read as the same from primary and follower; a null is a value."""
    stores = make(A, B)
    assert put(stores[A], Wire(A, stores), "a", value)
    for store in stores.values():
        found = store.get({"key": "a"})
        assert found["value"] == value
        assert type(found["value"]) is type(value)
        assert found["version"] == 1


def test_a_raw_value_with_line_ends_does_not_break_the_stream(make: Callable[..., dict[str, Store]]) -> None:
    """A raw value may be JSON over several lines. On the wire a message is one line: such a value is refused, or kept
    in a spelling that is one line; never staged so that no follower could ever take it."""
    stores = make(A, B)
    wire = Wire(A, stores)
    try:
        assert put(stores[A], wire, "a", Raw(b'{\n"a": 1}'))
    except ProtocolError as refused:
        assert refused.code == "bad_request"  # noqa: PT017 - either is right
    assert put(stores[A], wire, "b")
    same_history(*stores.values())


BAD_PAYLOADS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "bad_request"),
    "no key": ({"value": 1}, "bad_request"),
    "no value": ({"key": "a"}, "bad_request"),
    "empty key": ({"key": "", "value": 1}, "bad_request"),
    "key a number": ({"key": 1, "value": 1}, "bad_request"),
    "key with half a character": ({"key": "\ud800", "value": 1}, "bad_request"),
    "key too long": ({"key": "x" * 504, "value": 1}, "key_too_long"),
    "deleted key too long": ({"type": "delete", "key": "x" * 504}, "key_too_long"),
    "deleted key empty": ({"type": "delete", "key": ""}, "bad_request"),
    "bad namespace": ({"key": "a", "value": 1, "namespace": "a\0"}, "bad_request"),
    "long namespace": ({"key": "a", "value": 1, "namespace": "x" * 65}, "bad_request"),
    "NaN": ({"key": "a", "value": math.nan}, "bad_request"),
    "infinity inside": ({"key": "a", "value": {"b": [math.inf]}}, "bad_request"),
    "a set": ({"key": "a", "value": {1, 2}}, "bad_request"),
    "bytes": ({"key": "a", "value": b"x"}, "bad_request"),
    "bytes inside": ({"key": "a", "value": [b"x"]}, "bad_request"),
    "an object": ({"key": "a", "value": object()}, "bad_request"),
    "half a character": ({"key": "a", "value": "\udfff"}, "bad_request"),
    "a huge number": ({"key": "a", "value": 10**400}, "bad_request"),
    "no double comes near": ({"key": "a", "value": 2**1024 - 2**970}, "bad_request"),
    "raw, no JSON": ({"key": "a", "value": Raw(b"[")}, "bad_request"),
    "raw, nothing": ({"key": "a", "value": Raw(b"")}, "bad_request"),
    "raw, not UTF-8": ({"key": "a", "value": Raw(b'"\xff"')}, "bad_request"),
    "raw, out of range": ({"key": "a", "value": Raw(b"1e999")}, "bad_request"),
    "nested too deep": ({"key": "a", "value": Raw(b"[" * 200 + b"]" * 200)}, "bad_request"),
    "a read": ({"type": "get", "key": "a"}, "bad_request"),
    "another type": ({"type": "swap", "key": "a", "value": 1}, "unknown_type"),
    "type a number": ({"type": 7, "key": "a", "value": 1}, "bad_request"),
    "a message of members": ({"type": "heartbeat", "term": 1, "leader": A, "commit_id": 0}, "bad_request"),
}


@pytest.mark.parametrize("name", BAD_PAYLOADS)
def test_a_bad_payload_is_refused_before_anything_happens(make: Callable[..., dict[str, Store]], name: str) -> None:
    """What could not be written as JSON, or not be read back by everyone, is a ProtocolError with its code; nothing is
    staged, nothing sent, and the ballot is as it was."""
    payload, code = BAD_PAYLOADS[name]
    stores = make(A, B)
    wire = Wire(A, stores)
    with pytest.raises(ProtocolError) as refused:
        stores[A].put(1, payload, wire, 2)
    assert refused.value.code == code
    assert wire.sent == []
    assert (stores[A].journal.last.id.commit_id, stores[A].ballot.term) == (0, 0)
    assert put(stores[A], wire, "fine")


# --- answers that are none ------------------------------------------------------------------------------------

NONSENSE: dict[str, Any] = {
    "nothing": None,
    "an empty object": {},
    "a list": [],
    "a text": "fine",
    "a number": 7,
    "true": True,
    "no type": {"data": True},
    "another type": {"type": "ping", "data": True, "node": "x"},
    "an unknown type": {"type": "sure", "data": True},
    "no term": {"type": "data", "data": True, "match": 1},
    "term a text": {"type": "data", "data": True, "term": "1", "match": 1},
    "an older term": {"type": "data", "data": True, "term": 0, "match": 1},
    "a later term": {"type": "data", "data": True, "term": 9, "match": 1},
    "negative match": {"type": "data", "data": True, "term": 1, "match": -1},
    "data a text": {"type": "data", "data": "true", "term": 1, "match": 1},
    "bytes": {"type": "data", "data": b"x", "term": 1},
    "true, but it holds nothing": {"type": "data", "data": True, "term": 1, "match": 0},
    "true, without match": {"type": "data", "data": True, "term": 1},
    "an unknown reason": {"type": "data", "data": False, "term": 1, "reason": "mood"},
    "no reason": {"type": "data", "data": False, "term": 1},
    "a gap that was not asked about": {"type": "data", "data": False, "term": 1, "reason": "gap", "asked": 10**6},
    "a gap before nothing": {"type": "data", "data": False, "term": 1, "reason": "gap", "asked": 0},
    "a hint beyond the log": {
        "type": "data", "data": False, "term": 1, "reason": "gap", "asked": 10**7, "commit_id": 10**6,
        "last": {"term": 1, "commit_id": 10**6},
    },
    "no room": {"type": "data", "data": False, "term": 1, "reason": "storage_full"},
    "a failure": {"type": "data", "data": False, "term": 0, "error": {"code": "wrong_cluster", "message": "no"}},
}  # fmt: skip


@pytest.mark.parametrize("name", NONSENSE)
@pytest.mark.parametrize("before", [0, 3], ids=["first entry", "fourth entry"])
def test_a_peer_that_answers_nonsense_confirms_nothing(
    make: Callable[..., dict[str, Store]], name: str, before: int
) -> None:
    """Whatever a peer answers, put neither raises nor goes on for ever, and does not count it: with it alone there is
    no majority; with another that confirms there is (README, messages: a bad message never ends the process)."""
    stores = make(A, B, C)
    wire = Wire(A, stores)
    for n in range(before):
        assert put(stores[A], wire, f"key-{n}")
    wire.sent.clear()
    wire.replies[B] = lambda _: NONSENSE[name]
    wire.down = {C}
    assert put(stores[A], wire, "a") is False
    assert stores[A].commit_id == before
    wire.down = set()
    assert put(stores[A], wire, "b")
    same_history(stores[A], stores[C])


def test_an_answer_with_more_than_was_sent_is_no_crash(make: Callable[..., dict[str, Store]]) -> None:
    """A peer that claims to hold more than there is confirms at least what was sent, and makes nothing fall over."""
    stores = make(A, B, C)
    wire = Wire(A, stores)
    wire.replies[B] = lambda _: {"type": "data", "data": True, "term": 1, "match": 10**9}
    wire.down = {C}
    put(stores[A], wire, "a")
    wire.down = set()
    assert put(stores[A], wire, "b")
    same_history(stores[A], stores[C])


def test_confirmations_name_who_holds_it(make: Callable[..., dict[str, Store]]) -> None:
    """`send_data` notes the peers that confirmed in the list that it is given, in the order of the peers, and needs
    none; a message that is no `data` message is a ProtocolError."""
    stores = make(A, B, C)
    wire = Wire(A, stores)
    assert put(stores[A], wire, "a")
    message = next(message for _, message in wire.sent if message["action"] == "log")
    confirmations = ["someone"]
    stores[A].send_data(message, wire, confirmations)
    assert confirmations == ["someone", B, C]
    wire.down = {B}
    stores[A].send_data(message, wire, confirmations)
    assert confirmations == ["someone", B, C, C]
    stores[A].send_data(message, wire)
    for bad in ({}, {"type": "ping"}, {"action": "log"}, {**message, "term": -1}, {**message, "entries": [1]}):
        with pytest.raises(ProtocolError):
            stores[A].send_data(bad, wire)


# --- owned ----------------------------------------------------------------------------------------------------


def test_a_store_that_an_election_owns_refuses_all_four(make: Callable[..., dict[str, Store]]) -> None:
    """While an election owns the store nobody else writes to it: put, send_data, commit and action_handler raise
    StoreOwned and change nothing; reads go on. Given back, it takes them again (published interface)."""
    stores = make(A, B)
    wire = Wire(A, stores)
    assert put(stores[A], wire, "a", "one")
    message = wire.sent[0][1]
    wire.sent.clear()
    stores[A].owner = object()
    for use in (
        lambda: put(stores[A], wire, "a", "two"),
        lambda: stores[A].send_data(message, wire, []),
        lambda: stores[A].commit("default"),
        lambda: stores[A].action_handler(message),
    ):
        with pytest.raises(StoreOwned, match="election owns"):
            use()
    assert wire.sent == []
    assert value_of(stores[A], "a") == "one"
    stores[A].owner = None
    assert put(stores[A], wire, "a", "two")


# --- commit by hand -------------------------------------------------------------------------------------------


@pytest.fixture
def staged(make: Callable[..., dict[str, Store]]) -> Store:
    """A store with one committed entry, 1, and three staged: put x in default, delete x in other, put y in default."""
    stores = make(A, B, C)
    store = stores[A]
    wire = Wire(A, stores)
    wire.down = {B, C}
    assert put(store, wire, "w", 0, majority=1)
    assert not put(store, wire, "x", 1)
    assert not store.put(1, {"type": "delete", "key": "x", "namespace": "other"}, wire, 2)
    assert not put(store, wire, "y", 2)
    return store


def test_commit_takes_everything_up_to_the_entry(staged: Store) -> None:
    """The log commits in order: by default everything that is staged, with `commit_id=` everything up to there, in one
    transaction; the new commit_id is returned."""
    syncs = staged.syncs
    assert staged.commit("default", commit_id=2) == 2
    assert (staged.commit_id, value_of(staged, "x"), value_of(staged, "y")) == (2, 1, None)
    assert staged.syncs == syncs + 1
    assert not staged.has_effects
    assert staged.commit("other", delete=True, commit_id=3, key="x") == 3
    assert value_of(staged, "x") == 1, "the delete was in another namespace"
    assert staged.commit("default", key="y") == 4
    assert value_of(staged, "y") == 2


def test_commit_of_everything_in_one_go(staged: Store) -> None:
    """Three staged entries are one transaction."""
    syncs = staged.syncs
    assert staged.commit("default") == 4
    assert staged.syncs == syncs + 1
    assert (value_of(staged, "x"), value_of(staged, "y")) == (1, 2)


@pytest.mark.parametrize(
    ("namespace", "arguments"),
    [
        ("other", {}),
        ("", {}),
        ("default", {"delete": True}),
        ("default", {"key": "x"}),
        ("default", {"commit_id": 0}),
        ("default", {"commit_id": 1}),
        ("default", {"commit_id": -1}),
        ("default", {"commit_id": 5}),
        ("default", {"commit_id": 10**30}),
        ("default", {"commit_id": 3}),
        ("other", {"commit_id": 3}),
        ("other", {"commit_id": 3, "delete": True, "key": "y"}),
        ("default", {"commit_id": 3, "delete": True}),
    ],
    ids=str,
)
def test_commit_checks_what_it_is_asked(staged: Store, namespace: str, arguments: dict[str, Any]) -> None:
    """An entry that is committed already, not there, of another namespace or key, or a delete where a put was meant
    (and the other way round) is a ProtocolError, and nothing has been committed."""
    with pytest.raises(ProtocolError) as refused:
        staged.commit(namespace, **arguments)
    assert refused.value.code == "bad_request"
    assert staged.commit_id == 1
    assert staged.commit("default") == 4


def test_commit_with_nothing_staged(make: Callable[..., dict[str, Store]]) -> None:
    """An empty store, and one with everything committed, have nothing to commit."""
    stores = make(A, B)
    with pytest.raises(ProtocolError):
        stores[A].commit("default")
    assert put(stores[A], Wire(A, stores), "a")
    with pytest.raises(ProtocolError):
        stores[A].commit("default")


# --- a follower by itself -------------------------------------------------------------------------------------


def test_a_follower_refuses_what_is_no_data_message(make: Callable[..., dict[str, Store]]) -> None:
    """`action_handler` takes `data` messages; anything else is a ProtocolError, also entries whose checksums are no
    numbers; nothing is written."""
    stores = make(A, B)
    good = {"action": "log", "term": 1, "leader": A, "previous": {"term": 0, "commit_id": 0}}
    for bad in (
        {},
        {"type": "heartbeat", "term": 1, "leader": A, "commit_id": 0},
        {**good, "action": "cut"},
        {**good, "term": 2**63},
        {**good, "previous": None},
        {**good, "entries": [{"term": 1}]},
        {**good, "entries": {1}},
    ):
        with pytest.raises(ProtocolError):
            stores[B].action_handler(bad)
    assert stores[B].ballot.term == 0
    assert stores[B].action_handler(good)["data"] is True


def test_a_store_of_no_cluster_follows_nobody(make: Callable[..., dict[str, Store]]) -> None:
    """Before `found` a store does not know who may lead it, and refuses (rule 9)."""
    stores = make(A, B)
    wire = Wire(A, stores)
    assert put(stores[A], wire, "a")
    stranger = Store()
    try:
        with pytest.raises(ProtocolError) as refused:
            stranger.action_handler(wire.sent[0][1])
        assert refused.value.code == "wrong_cluster"
        stranger.found(C, [A, B, C])
        assert stranger.action_handler(wire.sent[0][1])["data"] is True
    finally:
        stranger.close()


def test_a_primary_founds_its_cluster_with_the_first_put() -> None:
    """A store that belongs to no cluster becomes the primary of its transport's peers with its first put."""
    primary = Store()
    try:
        wire = Wire(A, {A: primary, B: primary})
        wire.down = {B}
        assert put(primary, wire, "a", majority=1)
        assert primary.address == A
        assert set(primary.journal.membership.voters) == {A, B}
    finally:
        primary.close()


def test_an_entry_that_was_changed_on_the_way_is_refused(make: Callable[..., dict[str, Store]]) -> None:
    """One character of a command, another time, another term or another checksum: the follower refuses with `checksum`
    and holds nothing of the message; the unchanged one is taken after it (TRAPS 37)."""
    stores = make(A, B)
    wire = Wire(A, stores)
    wire.down = {B}
    put(stores[A], wire, "a", "good")
    (entry,) = wire.sent[0][1]["entries"]
    for changed in (
        {"command": Raw(bytes(entry["command"]).replace(b"good", b"evil"))},
        {"time": entry["time"] + 1},
        {"checksum": entry["checksum"] ^ 1},
    ):
        answer = stores[B].action_handler({**wire.sent[0][1], "entries": [{**entry, **changed}]})
        assert (answer["data"], answer["reason"]) == (False, "checksum")
        assert stores[B].journal.last.id.commit_id == 0
    assert stores[B].action_handler(wire.sent[0][1])["data"] is True


def test_a_damaged_entry_is_not_sent(make: Callable[..., dict[str, Store]], tmp_path: Path) -> None:
    """A primary that finds a damaged entry on its disk while it feeds a follower says so, with the commit_id; it sends
    neither that entry nor one after it (TRAPS 37)."""
    stores = make(A, B, C, directory=tmp_path)
    wire = Wire(A, stores)
    wire.down = {C}
    for n in range(6):
        assert put(stores[A], wire, f"key-{n}")
    stores[A].close()
    change(tmp_path / A[-4:], b"log", position(3), flip(30))
    stores[A] = Store("database", tmp_path / A[-4:])
    try:
        wire.down = set()
        wire.sent.clear()
        with pytest.raises(StoreDamaged) as damage:
            put(stores[A], wire, "more")
        assert damage.value.commit_id == 3
        assert stores[C].journal.last.id.commit_id <= 2
    finally:
        stores[A].close()


def test_a_primary_keeps_no_more_than_its_limit_in_memory(make: Callable[..., dict[str, Store]]) -> None:
    """Entries that are written and applied need not stay in memory: after many puts neither primary nor follower keeps
    more than `kept_entries` (package docstring, "nothing grows without bound")."""
    stores = make(A, B, kept_entries=10)
    wire = Wire(A, stores)
    for n in range(60):
        assert put(stores[A], wire, "a", n)
    for store in stores.values():
        assert len(store.journal._kept) <= 10 + 1
    same_history(*stores.values())
