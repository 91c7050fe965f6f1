"""Snapshots (thesis 5.3): the state of a leader comes in whole, as of one entry, whatever is written, lost, repeated or
killed meanwhile; and the rules of the consensus for it, each with its paper test."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import UNSET, Raw
from test_store import raw, stage

from raftnode import records
from raftnode.config import GIB, KIB, Settings
from raftnode.consensus.ballot import Ballot
from raftnode.consensus.journal import Journal, Mark
from raftnode.consensus.membership import Membership
from raftnode.consensus.progress import Progress
from raftnode.consensus.raft import Raft, Ready
from raftnode.consensus.transfer import Incoming
from raftnode.errors import ProtocolError, StoreDamaged
from raftnode.messages import (
    GENESIS,
    Data,
    DataAnswer,
    DeleteCommand,
    Entry,
    EntryId,
    Heartbeat,
    HeartbeatAnswer,
    PutCommand,
    Snapshot,
    SnapshotAnswer,
    SnapshotEnd,
    VoteAnswer,
    decode_answer,
    decode_request,
    encode,
    encode_command,
    store_key,
)
from raftnode.replay import Replay
from raftnode.snapshots import Overflow, Transfer
from raftnode.states import check_chunk
from raftnode.store import Store
from raftnode.testing.network import history, put

FOUNDING = Membership.founding(["1", "2", "3"])
OTHERS = Membership(commit_id=40, voters={"1": "a", "2": "", "4": ""})


# --- the rules, on paper --------------------------------------------------------------------------------------


class Log:
    """The disk of a member whose log begins late: a log reader, and the journal over it."""

    def __init__(self, base: int, entries: list[Entry]) -> None:
        self.all = entries
        mark = Mark(entries[base - 1].id, entries[base - 1].checksum) if base else Mark(GENESIS, 0)
        last = Mark(entries[-1].id, entries[-1].checksum) if entries else mark
        self.journal = Journal(self, mark, last, [FOUNDING])

    def read_id(self, commit_id: int) -> EntryId:
        assert commit_id > self.journal.base.id.commit_id, f"{commit_id} is gone"
        return self.all[commit_id - 1].id

    def read_entries(self, first: int, last: int, size: int) -> list[Entry]:  # noqa: ARG002 - all fit
        assert first > self.journal.base.id.commit_id, f"{first} is gone"
        return self.all[first - 1 : last]


def member(name: str, base: int, *terms: int, commit_id: int | None = None, incoming: Incoming | None = None) -> Raft:
    """A member whose log has entries of these terms, and has lost those up to `base`."""
    log = Log(base, history(*terms))
    term = max(terms, default=0)
    at = base if commit_id is None else commit_id
    return Raft(name, log.journal, Ballot(term), at, random.Random(1), Settings(), 0.0, incoming=incoming)


def leader(base: int, *terms: int) -> Raft:
    """One that leads the next term, with its no-op after these entries."""
    raft = member("1", base, *terms, commit_id=len(terms))
    raft.campaign()
    raft.take("2", VoteAnswer(data=True, term=raft.term + 1, pre_vote=True))
    raft.take("2", VoteAnswer(data=True, term=raft.term))
    assert raft.is_leader
    return raft


def turn(raft: Raft, has_installed: bool = False) -> Ready:
    """What a driver does: the transaction is on disk when this returns."""
    ready = raft.ready()
    if has_installed:
        assert ready.chunk is not None
        assert ready.chunk.end is not UNSET
        end = ready.chunk.end
        membership = msgspec.json.decode(end.membership, type=Membership)
        raft.journal.begin_anew(Mark(end.id, end.checksum), membership)
    raft.journal.mark_written()
    raft.written(has_installed)
    return ready


def answers(raft: Raft, ready: Ready) -> list[Any]:
    """All that a turn has answered, after its transaction."""
    return [answer for _, answer in (*ready.answers, *ready.promises, *raft.ready().answers)]


def chunk(seq: int, transfer: int = 1, term: int = 5, end: EntryId | None = None, leader: str = "1") -> Snapshot:
    found = UNSET
    if end is not None:
        found = SnapshotEnd(id=end, checksum=77, keys=0, membership=Raw(msgspec.json.encode(OTHERS)))
    return Snapshot(term=term, leader=leader, transfer=transfer, seq=seq, end=found)


def sent_to(ready: Ready, peer: str) -> list[Data]:
    return [message for to, message in ready.requests if to == peer and isinstance(message, Data)]


def test_who_lacks_the_base_needs_a_snapshot() -> None:
    """The leader's log begins after entry 3. A member whose log ends before that refuses what follows the base: it gets
    no entries any more, and the driver is told that it needs a snapshot. Heartbeats go on. (Thesis 5.3.)"""
    raft = leader(3, 1, 1, 1, 1, 1)
    (probe,) = sent_to(turn(raft), "2")
    assert probe.previous.commit_id == 5
    raft.take("2", DataAnswer(data=False, term=2, asked=5, last=EntryId(1, 1), reason="gap"))
    (probe,) = sent_to(turn(raft), "2")
    assert (probe.previous.commit_id, raft.lacking) == (3, ()), "perhaps it holds the base"
    raft.take("2", DataAnswer(data=False, term=2, asked=3, last=EntryId(1, 1), reason="gap"))
    assert raft.lacking == ("2",)
    raft.propose(put("k"))
    ready = turn(raft)
    assert not sent_to(ready, "2")
    raft.beat()
    assert "2" in [to for to, _ in turn(raft).requests]


def test_who_holds_the_base_needs_none() -> None:
    """What was to be sent next has been deleted meanwhile, but the member has it: its acknowledgement was lost."""
    raft = leader(0, 1, 1, 1, 1, 1)
    turn(raft)
    raft.take("2", DataAnswer(data=True, term=2, match=2))
    raft.unreachable("2")
    mark = raft.journal.mark_at(4)
    raft.journal.begin_after(mark)
    (probe,) = sent_to(turn(raft), "2")
    assert probe.previous == mark.id
    raft.take("2", DataAnswer(data=True, term=2, match=probe.entries[-1].commit_id))
    assert (raft.lacking, raft.progress["2"].match) == ((), 5)


def test_one_probe_at_a_time_while_the_base_moves() -> None:
    """The log is compacted faster than the member answers: it is not asked anew with each step."""
    progress = Progress(5, 0.0)
    progress.sent(9, 0.0)
    for base in (10, 11, 12):
        progress.ask_for(base)
        assert not progress.may_send(20, 1)
    progress.acknowledged(9)
    progress.ask_for(12)
    assert (progress.next, progress.probing) == (13, True)


def test_entries_after_an_installed_snapshot_follow() -> None:
    """The member has installed the state as of 5: that counts as a copy of all up to there, and it gets the rest."""
    raft = leader(3, 1, 1, 1, 1, 1)
    turn(raft)
    raft.progress["2"].lacks()
    raft.take("2", SnapshotAnswer(data=True, term=2, transfer=1, seq=4))
    assert raft.lacking == ("2",), "that was not the last chunk"
    raft.take("2", SnapshotAnswer(data=True, term=2, transfer=1, seq=5, match=5))
    assert (raft.lacking, raft.progress["2"].match) == ((), 5)
    (follows,) = sent_to(turn(raft), "2")
    assert (follows.previous.commit_id, [entry.commit_id for entry in follows.entries]) == (5, [6])


def test_an_answer_of_an_old_term_says_nothing() -> None:
    """It was given to another leader, or to this one in another term; and one of a later term ends the office."""
    raft = leader(3, 2, 2, 2, 2, 2)
    turn(raft)
    raft.progress["2"].lacks()
    raft.take("2", SnapshotAnswer(data=True, term=2, transfer=1, seq=5, match=5))
    assert raft.lacking == ("2",)
    raft.take("2", SnapshotAnswer(data=False, term=9, transfer=1, seq=5, reason="stale_term"))
    assert (raft.is_leader, raft.term, raft.lacking) == (False, 9, ())


def test_a_member_that_has_committed_the_base_needs_no_snapshot_any_more() -> None:
    """It has installed one, but the answer was lost: its next heartbeat tells."""
    raft = leader(3, 1, 1, 1, 1, 1)
    turn(raft)
    raft.progress["2"].lacks()
    raft.take("2", HeartbeatAnswer(term=2, commit_id=2))
    assert raft.lacking == ("2",)
    raft.take("2", HeartbeatAnswer(term=2, commit_id=4))
    assert raft.lacking == ()
    (probe,) = sent_to(turn(raft), "2")
    assert probe.previous.commit_id == 4


def test_a_snapshot_answer_from_the_future_is_told() -> None:
    raft = leader(3, 1, 1, 1, 1, 1)
    raft.take("2", SnapshotAnswer(data=True, term=2, transfer=1, seq=5, match=50))
    assert "never sent" in raft.complaint


def test_chunks_are_taken_in_their_order() -> None:
    """The next one is taken, one that comes again is acknowledged again, and for any other the leader begins anew. The
    answers wait for the disk."""
    raft = member("2", 0, 1)
    for seq, taken in ((1, True), (1, True), (2, True), (1, True), (2, True), (4, False), (3, True)):
        raft.step("t", chunk(seq))
        ready = raft.ready()
        early = [answer for _, answer in ready.answers]
        assert all(not answer.data for answer in early)
        raft.written()
        (answer,) = [*early, *(a for _, a in (*ready.promises, *raft.ready().answers))]
        assert (answer.data, answer.seq) == (taken, seq)
        assert answer.reason == ("" if taken else "restart")
    assert raft.incoming == Incoming(5, 1, 3, is_over=False)


def test_only_a_newer_transfer_takes_the_place_of_another() -> None:
    """Chunks of an older transfer may come late: they neither join the newer one nor begin their own again."""
    raft = member("2", 0, 1, incoming=Incoming(4, 7, 3, is_over=False))
    for term, transfer, seq, is_taken in (
        (5, 2, 2, False),
        (5, 2, 1, True),
        (5, 1, 1, False),
        (5, 3, 2, False),
        (5, 2, 2, True),
        (5, 3, 1, True),
        (5, 2, 3, False),
    ):
        raft.step("t", chunk(seq, transfer, term))
        (answer,) = answers(raft, turn(raft))
        assert answer.data == is_taken, (term, transfer, seq)
    raft.step("t", chunk(2, 7, 4))
    (answer,) = answers(raft, turn(raft))
    assert (answer.reason, answer.term) == ("stale_term", 5)


def test_a_second_chunk_in_one_turn_has_to_wait() -> None:
    """What one transaction may hold of a snapshot is a chunk."""
    raft = member("2", 0, 1)
    raft.step("first", chunk(1))
    raft.step("second", chunk(1, transfer=2))
    ready = turn(raft)
    assert [(ticket, answer.reason) for ticket, answer in ready.answers] == [("second", "busy")]
    assert raft.incoming.transfer == 1


def test_a_chunk_is_acknowledged_in_the_term_it_was_taken_in() -> None:
    """A leader of a later term is heard in the same turn, before the chunk is written: the answer is to the leader that
    sent the chunk, and not a promise in a term which that one does not lead. (Found by the simulator.)"""
    raft = member("2", 0, 1)
    raft.step("t", chunk(1))
    raft.step("h", Heartbeat(term=6, leader="3", commit_id=0))
    found = answers(raft, turn(raft))
    assert raft.term == 6
    assert [(answer.seq, answer.term) for answer in found if isinstance(answer, SnapshotAnswer)] == [(1, 5)]


def test_the_last_chunk_installs() -> None:
    """Log, commit_id and membership are those of the snapshot; entries after it follow it, and are in the chain of its
    checksum."""
    raft = member("2", 0, 1, 1, 2, commit_id=2, incoming=Incoming(5, 1, 3, is_over=False))
    raft.step("t", chunk(4, end=EntryId(5, 50)))
    ready = turn(raft, has_installed=True)
    (answer,) = answers(raft, ready)
    assert (answer.data, answer.match, ready.promises) == (True, 50, [])
    assert (raft.commit_id, raft.applied, raft.journal.base) == (50, 50, Mark(EntryId(5, 50), 77))
    assert raft.membership == OTHERS
    assert raft.incoming.is_over
    after = leader_entries(Mark(EntryId(5, 50), 77), 2)
    raft.step("t", Data(action="log", term=5, leader="1", previous=EntryId(5, 50), entries=after, commit_id=51))
    (answer,) = answers(raft, ready := turn(raft))
    assert (answer.data, answer.match, [entry.commit_id for entry in ready.committed]) == (True, 52, [51])


def leader_entries(base: Mark, count: int) -> list[Entry]:
    journal = Journal(Log(0, []), base, base, [FOUNDING])
    return [journal.append(5, 0, put(f"k{n}")) for n in range(count)]


def test_a_snapshot_that_lacks_keys_is_not_installed() -> None:
    """The store counts them; the leader begins anew."""
    raft = member("2", 0, 1, 1, commit_id=2, incoming=Incoming(5, 1, 3, is_over=False))
    raft.step("t", chunk(4, end=EntryId(5, 50)))
    (answer,) = answers(raft, turn(raft, has_installed=False))
    assert (answer.data, answer.reason, raft.commit_id) == (False, "restart", 2)
    raft.step("t", chunk(4, end=EntryId(5, 50)))
    (answer,) = answers(raft, turn(raft))
    assert answer.reason == "restart", "not acknowledged as one that was taken"


def test_what_the_log_holds_already_is_not_installed() -> None:
    """The log has the snapshot's last entry: nothing of it is cut, what the leader calls committed is committed here,
    and its answer is that of a copy. What is committed past it stays so. (TRAPS 29.)"""
    for commit_id, committed in ((1, 3), (4, 4)):
        raft = member("2", 0, 1, 1, 2, 2, 2, commit_id=commit_id, incoming=Incoming(5, 1, 3, is_over=False))
        raft.step("t", chunk(4, end=EntryId(2, 3)))
        ready = turn(raft)
        (answer,) = answers(raft, ready)
        assert (answer.data, answer.match) == (True, 3)
        assert ready.chunk is None
        assert (raft.commit_id, raft.journal.last.id.commit_id) == (committed, 5)


def test_what_the_log_reaches_in_the_same_turn_is_not_installed() -> None:
    """A new leader's entries come with the last chunk of the old one: a transaction must not take back what it has
    just acknowledged."""
    entries = history(1, 1, 5, 5)
    raft = member("2", 0, 1, commit_id=1, incoming=Incoming(5, 1, 3, is_over=False))
    raft.step("chunk", chunk(4, end=entries[2].id))
    later = Data(action="log", term=6, leader="3", previous=entries[0].id, entries=entries[1:], commit_id=4)
    raft.step("data", later)
    ready = turn(raft)
    assert ready.chunk is None
    assert {ticket for ticket, answer in ready.promises if answer.data} == {"chunk", "data"}
    assert raft.journal.last.id == entries[3].id


def test_entries_that_are_taken_end_a_transfer() -> None:
    """The log goes on by itself, so what has come in of a snapshot is of no use any more."""
    entries = history(1, 1)
    raft = member("2", 0, 1, incoming=Incoming(5, 1, 3, is_over=False))
    raft.step("t", Data(action="log", term=5, leader="1", previous=entries[0].id, entries=entries[1:]))
    turn(raft)
    assert raft.incoming.is_over


def test_node_ids_that_were_learned_stay_known() -> None:
    """The leader may not have met everybody that this member has met."""
    raft = member("2", 0, 1, incoming=Incoming(5, 1, 3, is_over=False))
    raft.journal.bind("1", "other")
    raft.journal.bind("2", "me")
    raft.step("t", chunk(4, end=EntryId(5, 50)))
    turn(raft, has_installed=True)
    assert (raft.membership.node_of("2"), raft.membership.node_of("1")) == ("me", "a")


# --- the state on its way -------------------------------------------------------------------------------------


def random_entry(store: Store, chance: random.Random, keys: int) -> None:
    """A committed write, perhaps on disk."""
    key, kind = f"key-{chance.randrange(keys)}", chance.random()
    if kind < 0.3:
        command = encode_command(DeleteCommand(namespace=chance.choice(["a", "b"]), key=key))
    else:
        size = chance.choice([0, 10, 300, 6000])
        value = Raw(b'"%d-%s"' % (store.commit_id, b"x" * size))
        command = encode_command(PutCommand(namespace=chance.choice(["a", "b"]), key=key, value=value))
    store.journal.append(1, 0, command)
    store.apply(store.journal.entries(store.commit_id + 1, store.commit_id + 1, GIB))
    if chance.random() < 0.3:
        store.write(Ballot(1))


def replayed(entries: list[Entry]) -> dict[bytes, tuple[int, int, int, bytes]]:
    """What the log makes, and the checksums of the records on disk."""
    replay = Replay()
    for entry in entries:
        replay.apply(entry)
    return {key: (it.created, it.modified, it.version, it.checksum) for key, it in replay.state.items()}


def on_disk(directory: Path) -> dict[bytes, tuple[int, int, int, bytes]]:
    """The state database of a closed store, byte for byte by its checksums, read without our code."""
    with raw(directory, readonly=True) as env, env.begin() as txn:
        meta = env.open_db(b"meta", txn=txn, create=False)
        current = records.state_named(txn.get(b"state", db=meta))
        found = {}
        for key, stored in txn.cursor(env.open_db(current, txn=txn, create=False)):
            records.unpack_record(bytes(key), bytes(stored))
            created, modified, version = struct.unpack_from(">QQQ", stored, 4)
            found[bytes(key)] = created, modified, version, bytes(stored[:4])
        return found


class Receiver:
    """The member at the other end: its store, and the consensus that its driver would step."""

    def __init__(self, directory: Path, settings: Settings) -> None:
        self.directory, self.settings = directory, settings
        self.store = Store("database", directory, settings=settings)
        self.store.found("b:1", ["a:1", "b:1", "c:1"])
        for _ in range(2):  # of another history, and staged: nothing of it may be left
            self.store.journal.append(0, 0, put("junk"))
        self.store.write()
        self.raft = self._raft()

    def _raft(self) -> Raft:
        store = self.store
        return Raft(
            "b:1",
            store.journal,
            store.ballot,
            store.commit_id,
            random.Random(1),
            self.settings,
            0.0,
            incoming=store.incoming,
        )

    def restart(self) -> None:
        """kill -9 between two transactions."""
        self.store.close()
        self.store = Store("database", self.directory, settings=self.settings)
        self.raft = self._raft()

    def take(self, message: Snapshot, dies: bool) -> SnapshotAnswer | None:
        """One turn with this chunk; with `dies`, killed before its transaction."""
        received = decode_request(encode(message))
        assert isinstance(received, Snapshot)
        check_chunk(received)
        self.raft.step("t", received)
        ready = self.raft.ready()
        if dies:
            self.restart()
            return None
        self.store.apply(ready.committed)
        self.store.incoming = self.raft.incoming
        has_installed = self.store.write(ready.ballot, ready.chunk)
        self.raft.written(has_installed)
        (answer,) = [answer for _, answer in (*ready.answers, *ready.promises, *self.raft.ready().answers)]
        decoded = decode_answer(encode(answer))
        assert isinstance(decoded, SnapshotAnswer)
        return decoded


@pytest.fixture
def a_leader(tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """Makes a store that is written to, and closes it."""
    stores: list[Store] = []

    def make(**settings: int) -> Store:
        stores.append(Store("database", tmp_path / f"leader-{len(stores)}", settings=Settings(**settings)))
        stores[-1].found("a:1", ["a:1", "b:1", "c:1"])
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.mark.parametrize("seed", range(25))
def test_the_state_at_the_end_is_a_replay_of_the_log(tmp_path: Path, a_leader: Callable[..., Store], seed: int) -> None:
    """Random writes while the state is sent in chunks of random sizes; chunks are repeated, and lost with their link;
    the receiver is killed before transactions and between them. What it has installed is byte for byte, created,
    modified and version too, what all entries up to the snapshot's make. (TRAPS 28.)"""
    chance = random.Random(seed)
    leader_store = a_leader(log_entries=chance.choice([1, 5, 1000]))
    everything: list[Entry] = []
    keys = chance.choice([3, 30, 200])
    receiver = Receiver(tmp_path / "receiver", Settings(sweep_keys=chance.choice([1, 1000])))

    def write(count: int) -> None:
        for _ in range(count):
            random_entry(leader_store, chance, keys)
            everything.append(leader_store.journal.entries(leader_store.commit_id, leader_store.commit_id, GIB)[0])

    write(chance.choice([0, 20, 400]) + 1)
    installed = 0
    for number in itertools.count(1):
        transfer = Transfer(leader_store)
        sizes = chance.choice([[1], [1, 100], [1, 1, 1, 3000], [1, 100, 3000, 100_000]])
        abandoned = number < 3 and chance.random() < 0.5
        for seq in itertools.count(1):
            part = transfer.next(chance.choice(sizes))
            message = Snapshot(
                term=1, leader="a:1", transfer=number, seq=seq, records=part.records, gone=part.gone, end=part.end
            )
            answer = None
            while answer is None or chance.random() < 0.2:
                write(chance.randrange(3) if seq < 300 else 0)
                answer = receiver.take(message, dies=chance.random() < 0.1)
                if chance.random() < 0.1:
                    receiver.restart()
                if chance.random() < 0.1:
                    answer = None  # lost
            assert answer.data, (answer, receiver.raft.complaint)
            if answer.match:
                installed = answer.match
            if installed or (abandoned and chance.random() < 0.2):
                break
            if chance.random() < (0.7 if seq < 300 else 0.05):  # else it might never end
                write(chance.randrange(6))
        transfer.close()
        if installed:
            break
    assert not leader_store.trackers
    assert part.end is not UNSET
    assert (installed, receiver.store.commit_id) == (part.end.id.commit_id, installed)
    assert receiver.store.journal.base == Mark(everything[installed - 1].id, everything[installed - 1].checksum)
    while receiver.store.has_leftover:
        receiver.store.write()
    receiver.restart()
    assert receiver.store.journal.membership.voters.keys() == {"a:1", "b:1", "c:1"}
    receiver.store.close()
    assert on_disk(receiver.directory) == replayed(everything[:installed])


def test_a_transfer_holds_no_view_and_only_what_was_written(a_leader: Callable[..., Store]) -> None:
    """Between two chunks no reader is open, so pages are used again; and keys that are still to come are not
    remembered."""
    store = a_leader()
    stage(store, *(put_of(f"key-{n:03}", 1000) for n in range(200)))
    store.apply(store.journal.entries(1, 200, GIB))
    store.write()
    transfer = Transfer(store)
    transfer.next(20_000)
    assert not [line for line in store._env._usable().readers().splitlines()[1:] if line.split()[2] != "-"]
    entries = stage(store, put_of("key-199", 10), put_of("key-000", 10))
    store.apply(entries)
    assert [key.partition(b"\0")[2] for key in transfer._tracked] == [b"key-000"]
    transfer.close()


def put_of(key: str, size: int) -> Raw:
    return encode_command(PutCommand(namespace="default", key=key, value=Raw(b'"%s"' % (b"x" * size))))


def test_the_leaders_file_does_not_grow_because_a_transfer_is_slow(a_leader: Callable[..., Store]) -> None:
    """A transfer that takes as long as it takes to overwrite the whole state ten times: the file has no more pages than
    without one. Measured in pages, not in time."""
    pages = []
    for with_transfer in (False, True):
        store = a_leader(log_bytes=50 * KIB)
        stage(store, *(put_of(f"key-{n:03}", 2000) for n in range(200)))
        store.apply(store.journal.entries(1, 200, GIB))
        store.write()
        transfer = Transfer(store)
        if not with_transfer:
            transfer.close()
        for number in range(2000):
            entries = stage(store, put_of(f"key-{number % 200:03}", 2000))
            store.apply(entries)
            store.journal.forget(store.commit_id, 1, 1)
            if with_transfer and number % 20 == 0 and transfer.walked is not None:
                transfer.next(4000)
        pages.append(store.sizes()["file"])
    assert pages[1] <= 1.05 * pages[0]


def test_a_transfer_begins_anew_when_too_much_is_written(a_leader: Callable[..., Store]) -> None:
    """The keys that have to be sent again are in memory: there is a limit."""
    store = a_leader(snapshot_tracked_keys=10)
    stage(store, *(put_of(f"key-{n:03}", 10) for n in range(50)))
    store.apply(store.journal.entries(1, 50, GIB))
    store.write()
    transfer = Transfer(store)
    transfer.next(2000)
    entries = stage(store, *(put_of(f"key-{n:03}", 10) for n in range(12)))
    store.apply(entries)
    with pytest.raises(Overflow):
        transfer.next(1)


def test_a_damaged_value_is_not_sent(a_leader: Callable[..., Store]) -> None:
    """The leader sees it before anybody else does."""
    store = a_leader()
    stage(store, put_of("key", 10))
    store.apply(store.journal.entries(1, 1, GIB))
    store.write()
    with store._env.write() as txn:
        txn.put(b"default\0key", b"x" * 50, db=store.states.db)
    with pytest.raises(StoreDamaged):
        Transfer(store).next(1000)


def test_a_value_that_was_changed_on_its_way_is_refused(a_leader: Callable[..., Store]) -> None:
    store = a_leader()
    stage(store, put_of("key", 10))
    store.apply(store.journal.entries(1, 1, GIB))
    part = Transfer(store).next(1000)
    (record,) = part.records
    message = Snapshot(term=1, leader="a:1", transfer=1, seq=1, records=[msgspec.structs.replace(record, version=2)])
    with pytest.raises(ProtocolError, match="checksum"):
        check_chunk(message)
    check_chunk(Snapshot(term=1, leader="a:1", transfer=1, seq=1, records=[record]))


def test_what_was_read_before_a_snapshot_is_read_anew(tmp_path: Path, a_leader: Callable[..., Store]) -> None:
    """A member keeps in memory what it has read. The snapshot brings another value of one key, and lacks the other."""
    store = a_leader()
    for command in (put_of("changed", 10), put_of("changed", 20)):
        stage(store, command)
    store.apply(store.journal.entries(1, 2, GIB))
    receiver = Receiver(tmp_path / "receiver", Settings())
    changed, gone = store_key("default", "changed"), store_key("default", "gone")
    receiver.store.namespaces.changes.update({key: records.Record(1, 1, 1, 0, Raw(b"1")) for key in (changed, gone)})
    receiver.store.write()
    for _ in range(2):
        assert [receiver.store.find(key) for key in (changed, gone)] == [records.Record(1, 1, 1, 0, Raw(b"1"))] * 2
    part = Transfer(store).next(1000)
    message = Snapshot(term=1, leader="a:1", transfer=1, seq=1, records=part.records, end=part.end)
    answer = receiver.take(message, dies=False)
    assert answer is not None
    assert answer.match == 2
    found = receiver.store.find(changed)
    assert found is not None
    assert (found.modified, found.version) == (2, 2)
    assert receiver.store.find(gone) is None
    receiver.store.close()


def test_an_old_state_is_emptied_in_small_steps(tmp_path: Path, a_leader: Callable[..., Store]) -> None:
    """After the install each transaction deletes some of it, and no more than it may."""
    store = a_leader()
    stage(store, put_of("new", 10))
    store.apply(store.journal.entries(1, 1, GIB))
    receiver = Receiver(tmp_path / "receiver", Settings(sweep_keys=7))
    receiver.store.namespaces.changes.update({b"a\0%d" % n: records.Record(1, 1, 1, 0, Raw(b"1")) for n in range(30)})
    receiver.store.write()
    part = Transfer(store).next(1000)
    message = Snapshot(term=1, leader="a:1", transfer=1, seq=1, records=part.records, end=part.end)
    answer = receiver.take(message, dies=False)
    assert answer is not None
    assert answer.match == 1
    left = []
    while receiver.store.has_leftover:
        with receiver.store.view() as txn:
            left.append(txn.stat(receiver.store._env.db(records.COMMITTED))["entries"])
        receiver.store.write()
    assert left == [23, 16, 9, 2]
    receiver.store.close()
