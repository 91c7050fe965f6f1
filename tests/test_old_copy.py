"""A directory that was put back from an old copy: it has the node's id, and has forgotten votes and entries that others
count on. The others remember, and remind it (`consensus.witness`; rule 9; TRAPS 34).

First the witness by itself, then members of the pure network, under random schedules too: nobody who has lost nothing
is ever taken for an old copy, and with old copies kept out nothing is lost. Then nodes at whose other end the test
sits, and at last real processes whose directories are exchanged.
"""

from __future__ import annotations

import copy
import itertools
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest
from test_random_schedules import STEPS, Chaos

from raftnode import RaftNode, records
from raftnode.blocking import LineConnection
from raftnode.config import Settings
from raftnode.consensus.ballot import Ballot
from raftnode.consensus.changes import removed
from raftnode.consensus.raft import Raft
from raftnode.consensus.witness import Witness, Witnesses
from raftnode.errors import Unavailable
from raftnode.messages import (
    PROTOCOL_VERSION,
    Data,
    DataAnswer,
    EntryId,
    Heartbeat,
    HeartbeatAnswer,
    PeerAnswer,
    PeerRequest,
    Staged,
    VoteAnswer,
    VoteRequest,
    decode_object,
    encode_object,
)
from raftnode.testing.network import Disk, Member, Network
from raftnode.testing.processes import (
    FAST,
    PATIENCE_S,
    ClusterOfProcesses,
    NodeProcess,
    WriteRecord,
    Writers,
    free_addresses,
    wait_until,
)

# --- the value ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("witness", "is_kept"),
    [
        (Witness(), True),
        (Witness(3, EntryId(2, 4), EntryId(2, 4)), True),
        (Witness(term=4), False),
        (Witness(3, held=EntryId(2, 5)), False),
        (Witness(3, held=EntryId(1, 4)), False),
        (Witness(2, held=EntryId(2, 5)), True),
        (Witness(3, vote="1"), True),
        (Witness(3, vote="3"), False),
        (Witness(2, vote="3"), True),
        (Witness(floor=EntryId(1, 2)), True),
        (Witness(floor=EntryId(2, 5)), False),
        (Witness(floor=EntryId(2, 2)), False),
        (Witness(floor=EntryId(1, 3)), False),
        (Witness(2, floor=EntryId(3, 3)), False),
    ],
)
def test_what_is_kept(witness: Witness, is_kept: bool) -> None:
    """A log of the terms 1 1 2 2 in term 3 keeps every witness whose term is not above 3 and whose floor is one of
    these very entries; a longer log of another history would not do. What was held in term 3 must be one of them; what
    was held in term 2 may have been cut since."""
    network = Network(3)
    network.give_log("2", 1, 1, 2, 2)
    raft = network["2"].raft
    raft.ballot = Ballot(3, "1")
    assert witness.is_kept(raft.ballot, raft.journal) is is_kept


def test_a_witness_only_rises() -> None:
    """Whatever is added in whatever order: the highest term, the latest entry held in that term, and the latest floor;
    of nobody else is anything known."""
    known = [
        Witness(2, EntryId(2, 11), EntryId(1, 5)),
        Witness(5),
        Witness(1, EntryId(1, 12), EntryId(2, 9)),
        Witness(5, EntryId(4, 8)),
        Witness(5, EntryId(4, 7), EntryId(2, 7)),
    ]
    for order in itertools.permutations(known):
        witnesses = Witnesses({"b": Witness(1, EntryId(1, 1))})
        for witness in order:
            witnesses.add("a", witness)
        witnesses.spoke("a", 4)
        assert witnesses.facts() == {
            "a": Witness(5, EntryId(4, 8), EntryId(2, 9)),
            "b": Witness(1, EntryId(1, 1)),
        }
        assert witnesses.of("c") == Witness()


# --- what is evidence -----------------------------------------------------------------------------------------

STAGED = Staged(address="1", term=0, commit_id=0)


@pytest.mark.parametrize(
    ("message", "term"),
    [
        (VoteRequest(term=7, commit_id=0, staged=STAGED), 7),
        (VoteRequest(term=7, commit_id=0, staged=STAGED, pre_vote=True), 0),
        (Heartbeat(term=7, leader="1", commit_id=0), 7),
        (Data(action="commit", term=7, leader="1", previous=EntryId(0, 0)), 7),
        (VoteAnswer(data=True, term=7), 7),
        (VoteAnswer(data=False, term=7), 7),
        (VoteAnswer(data=True, term=7, pre_vote=True), 0),
        (VoteAnswer(data=False, term=7, pre_vote=True), 7),
        (HeartbeatAnswer(term=7, commit_id=0), 7),
        (DataAnswer(data=True, term=7), 7),
        (DataAnswer(data=False, term=7, reason="stale_term"), 7),
    ],
)
def test_which_terms_are_a_members_own(message: PeerRequest | PeerAnswer, term: int) -> None:
    """All that a member says carries its own term, which is on its disk; but a pre-vote asks for one that it does not
    have, and a granted one repeats that. What a program says in a member's name binds no member."""
    network = Network(3)
    raft = network["2"].raft
    if isinstance(message, PeerRequest):
        raft.step("1", message, first_hand=False)
        assert raft.witnesses.of("1") == Witness()
        raft.step("1", message)
    else:
        raft.take("1", message)
    gave_its_vote = isinstance(message, VoteAnswer) and message.data and not message.pre_vote
    assert raft.witnesses.of("1") == Witness(term, vote="2" if gave_its_vote else "")


def test_a_floor_is_acknowledged_and_committed() -> None:
    """A leader of five: what one member acknowledged is no floor before it is committed; it becomes one when two more
    acknowledge, without another word of the first. What is committed is no floor of who has not acknowledged it."""
    network = Network(5)
    network.elect("1")
    network.run(0.3)
    leader = network["1"].raft
    noop = EntryId(1, 1)
    assert all(leader.remember().of(name) == Witness(1, noop, noop, "1") for name in "2345")
    network.propose("1", "k")
    network.drop(source="1", target="3")
    network.drop(source="1", target="4")
    network.drop(source="1", target="5")
    network.deliver()
    assert leader.progress["2"].match == 2
    assert leader.remember().of("2") == Witness(1, EntryId(1, 2), noop, "1"), "acknowledged, not committed"
    network.cut("1", "2")
    network.cut("1", "5")
    network.run(1.5)
    assert leader.is_leader
    assert leader.commit_id == 2
    assert leader.remember().of("2") == Witness(1, EntryId(1, 2), EntryId(1, 2), "1")
    assert leader.remember().of("5") == Witness(1, noop, noop, "1")


def test_a_floor_outlives_the_leadership() -> None:
    """What a leader and its followers knew of each other stays known when another leads; so it does through a restart,
    if it was on disk. Followers know nothing of each other."""
    network = Network(3)
    network.elect("1")
    network.propose("1", "k")
    network.run(0.3)
    assert network["2"].raft.remember().facts() == {"1": Witness(1, floor=EntryId(1, 2))}
    network.elect("2")
    network.propose("2", "l")
    network.run(0.3)
    former = network["1"].raft
    assert not former.is_leader
    assert former.remember().facts() == {
        "2": Witness(2, floor=EntryId(2, 4)),
        "3": Witness(1, EntryId(1, 2), EntryId(1, 2), "1"),
    }
    raft = Raft("1", former.journal, former.ballot, 0, random.Random(1), Settings(), 0.0, former.witnesses.facts())
    assert raft.witnesses.facts() == former.witnesses.facts()
    assert not raft.has_forgotten


def test_what_commits_after_the_leadership_is_no_floor() -> None:
    """The trap in "acknowledged, and committed later": 1 leads and gets an entry to 2 alone. 3 leads without it, and
    cuts it from 2, which is right, as it was not committed; 3 dies. 1 leads again and commits its entry by 4 and 5. Now
    2 has acknowledged to 1 an entry that is committed, does not hold it, and has forgotten nothing: it is not refused,
    and gets the entry again."""
    network = Network(5)
    network.elect("1")
    network.run(0.3)
    network.isolate("1", "2")
    network.propose("1", "k")
    network.deliver()
    assert network["2"].log[-1] == EntryId(1, 2)
    network.heal()
    network.crash("1")
    network.lose_leaders()
    network.campaign("3")
    while not network["3"].raft.is_leader:
        network.deliver(1)
    network.drop(source="3", target="4", kind=Data)
    network.drop(source="3", target="5", kind=Data)
    network.deliver()
    assert network["2"].log[-1] == EntryId(2, 2), "cut by 3, whose entry stands there now"
    network.crash("3")
    network.in_flight.clear()
    network.heal()
    network.isolate("2")
    network.restart("1")
    network.elect("1")
    network.run(0.3)
    assert network["1"].raft.commit_id >= 2
    assert network["1"].log[1] == EntryId(1, 2)
    assert network["2"].raft.remind(network["1"].raft.remember().of("2"))
    network.crash("2")
    network.restart("2")
    assert network["2"].raft.remind(network["1"].raft.remember().of("2"))
    network.heal()
    network.run(1.0)
    assert network["2"].keys == ["k"]


# --- random schedules -----------------------------------------------------------------------------------------


class Remembering:
    """Looks at a random schedule: after every turn each member keeps all that was ever said to it; what it keeps, the
    others' disks must keep too, whatever has happened to them. It survives crashes, as the best of all disks would."""

    def __init__(self, chaos: Chaos) -> None:
        self.network = chaos.network
        self.facts: dict[str, dict[str, Witness]] = {name: {} for name in self.network.members}
        self._check, self._restarted = self.network.invariants.check, self.network.invariants.restarted
        self.network.invariants.check = self.check  # type: ignore[method-assign, assignment]
        self.network.invariants.restarted = self.restarted  # type: ignore[method-assign, assignment]

    def of(self, member: str) -> list[Witness]:
        """What the others remember of it."""
        return [facts[member] for facts in self.facts.values() if member in facts]

    def check(self, member: Member) -> None:
        """After a turn of `member`."""
        self._check(member)
        if member.is_up:
            self.facts[member.name] = member.raft.remember().facts()
        for witness in self.of(member.name):
            self.check_kept(member, witness)
        for name, witness in self.facts[member.name].items():
            self.check_kept(self.network[name], witness)

    def restarted(self, member: Member) -> None:
        """`member` has come back: it takes what it knew from its disk, and is reminded by all others."""
        for name, witness in self.facts[member.name].items():
            member.raft.witnesses.add(name, witness)
        self._restarted(member)
        for witness in self.of(member.name):
            assert member.raft.remind(witness), f"no false alarm: {member.name} has not forgotten {witness}"

    @staticmethod
    def check_kept(member: Member, witness: Witness) -> None:
        """The disk of a member that is up equals its memory between turns."""
        disk = member.disk
        journal = member.raft.journal if member.is_up else disk.journal()
        assert witness.is_kept(disk.ballot, journal), (
            f"no false alarm: {member.name} has {disk.ballot} and ends with {disk.last.id}, not with {witness}"
        )


@pytest.mark.parametrize("seed", range(60))
def test_who_has_lost_nothing_is_never_refused(seed: int) -> None:
    """Messages lost, late, doubled; links cut, members paused and killed at any moment, leaders deposed: at every
    moment every disk keeps what any other member remembers of it, so a reminder is never a false alarm."""
    chaos = Chaos(1000 + seed)
    remembering = Remembering(chaos)
    for _ in range(STEPS):
        chaos.step()
    chaos.mend()
    chaos.network.run_until(chaos.agreed)
    assert len(chaos.network.members) == 1 or any(remembering.facts.values())


class PuttingBack(Chaos):
    """A random schedule in which one member's disk is now and then replaced by an older copy of it. All others remind
    it before it does anything; if it has forgotten, it is out until its newest disk is back."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.remembering = Remembering(self)
        self.victim = self.random.choice(sorted(self.network.members))
        self.copies: list[Disk] = []
        self.accepted = self.refused = 0
        self.actions += [(self.copy_disk, 0.3), (self.put_back, 0.2)]

    def copy_disk(self) -> None:
        self.copies.append(copied(self.network[self.victim].disk))

    def put_back(self) -> None:
        if not self.copies:
            return
        network, member = self.network, self.network[self.victim]
        if member.is_up:
            network.crash(self.victim)
        network.drop(source=self.victim)
        self.late = [envelope for envelope in self.late if envelope.source != self.victim]
        newest, old = member.disk, self.random.choice(self.copies)
        journal = copied(old).journal()
        if all(witness.is_kept(old.ballot, journal) for witness in self.remembering.of(self.victim)):
            self.accepted += 1
            self.forget_lost_votes()
            member.disk = copied(old)
            self.copies = [copy for copy in self.copies if copy.writes <= old.writes]
        else:
            self.refused += 1
            assert newest.writes > old.writes, "the newest disk has forgotten nothing"
        network.restart(self.victim)

    def forget_lost_votes(self) -> None:
        """A vote of which no candidate ever heard, nor ever will, as what was under way is lost, binds nobody."""
        votes, facts = self.network.invariants._votes, self.remembering.facts
        for (voter, term), candidate in list(votes.items()):
            if voter == self.victim and facts[candidate].get(voter, Witness()).term < term:
                del votes[(voter, term)]


def copied(disk: Disk) -> Disk:
    """A disk that the other does not change any more."""
    found = copy.copy(disk)
    found.entries = list(disk.entries)
    return found


@pytest.mark.parametrize("part", range(4))
def test_nothing_is_lost_while_old_copies_are_kept_out(part: int) -> None:
    """Whatever copy of its disk a member comes back with: if no reminder of the others shows that it has forgotten
    something, it may take part, and all invariants hold: no vote is given twice, nothing that was committed is lost.
    Both outcomes occur often."""
    accepted = refused = 0
    for seed in range(2000 + 15 * part, 2015 + 15 * part):
        chaos = PuttingBack(seed)
        if len(chaos.network.members) == 1:
            continue
        for _ in range(STEPS):
            chaos.step()
        chaos.mend()
        chaos.network.run_until(chaos.agreed)
        accepted, refused = accepted + chaos.accepted, refused + chaos.refused
    print(f"{accepted} copies accepted, {refused} refused")  # noqa: T201 - shown when the test fails
    assert min(accepted, refused) > 10


# --- a node, and the test at the other end --------------------------------------------------------------------

CALM = {"election_low_ms": 30_000, "election_high_ms": 30_000}
"""Nobody campaigns by itself in a test that takes less than this."""
AN_ID = "f" * 16
"""The node id of the member that the test plays."""


class Played:
    """A node with two members that are not there; the test speaks for one of them."""

    def __init__(self, directory: Path) -> None:
        self.address, self.member, self.third = free_addresses(3)
        self._directory = directory
        self._open: list[LineConnection] = []
        self.start()

    def start(self) -> None:
        peers = [self.member, self.third]
        self.node = RaftNode(self.address, peers, 1, data_dir=self._directory, **CALM).start()

    def restart(self) -> None:
        self.close()
        self.start()

    def close(self) -> None:
        for connection in self._open:
            connection.close()
        self.node.close()

    def connect(self) -> LineConnection:
        self._open.append(LineConnection(self.address, PATIENCE_S, 1 << 20))
        return self._open[-1]

    def hello(self, **changes: Any) -> dict[str, Any]:
        """What the member begins a link with, but for `changes`."""
        known = {"cluster": self.node.store.cluster_id, "node": AN_ID, "address": self.member}
        return {"type": "hello", **known, "protocol": PROTOCOL_VERSION, "id": 1, **changes}

    def remind(self, **reminder: Any) -> dict[str, Any]:
        """What the hello of the member says of this node."""
        return {"reminder": {"node": self.node.store.node_id, **reminder}}

    def beat(self, term: int) -> dict[str, Any]:
        return {"type": "heartbeat", "term": term, "leader": self.member, "commit_id": 0, "id": 2}


def ask(connection: LineConnection, message: dict[str, Any]) -> dict[str, Any]:
    return decode_object(connection.request(encode_object(message), PATIENCE_S))


@pytest.fixture
def played(tmp_path: Path) -> Iterator[Played]:
    played = Played(tmp_path / "data")
    yield played
    played.close()


def test_hello_is_answered_with_a_reminder(played: Played) -> None:
    """A member that has spoken in term 7 over its link is told so when it opens the next one; and so after a restart of
    the one who remembers, once a transaction has taken it to the disk, which happens when there is one anyway and the
    last time is a second ago."""
    nothing = {"term": 0, "commit_id": 0}
    answer = ask(link := played.connect(), played.hello())
    assert answer["reminder"] == {"node": AN_ID, "term": 0, "held": nothing, "floor": nothing, "vote": ""}
    assert ask(link, played.beat(7))["term"] == 7
    answer = ask(link := played.connect(), played.hello())
    assert answer["reminder"] == {"node": AN_ID, "term": 7, "held": nothing, "floor": nothing, "vote": ""}
    terms = itertools.count(8)

    def on_disk() -> int:
        assert ask(link, played.beat(term := next(terms)))["term"] == term
        known = played.node.store.witnesses.get(played.member, Witness()).term
        return known if known >= 7 else 0

    known = wait_until(on_disk, "a transaction takes it along")
    played.restart()
    assert ask(played.connect(), played.hello())["reminder"]["term"] == known


def test_a_programs_word_is_no_promise(played: Played) -> None:
    """What comes over a connection for single requests, or from the program that embeds the node, says what somebody
    wants to happen; a member's promises are known from its own link alone."""
    link, single = played.connect(), played.connect()
    assert ask(link, played.hello())["data"] is True
    assert ask(single, played.hello(link=False))["data"] is True
    assert ask(single, played.beat(7))["term"] == 7
    beat = {"term": 9, "leader": played.member, "commit_id": 0}
    assert played.node.election.heartbeat_handler(beat) == (9, 0)
    assert ask(played.connect(), played.hello())["reminder"]["term"] == 0


def test_what_was_kept_or_meant_for_another_changes_nothing(played: Played) -> None:
    """A reminder of what the node still has, or of promises of another node that had this address, or from a stranger:
    all is as before."""
    link = played.connect()
    assert ask(link, played.hello())["data"] is True
    assert ask(link, played.beat(7))["term"] == 7
    kept = played.remind(term=7, held={"term": 0, "commit_id": 0}, floor={"term": 0, "commit_id": 0})
    assert ask(played.connect(), played.hello(**kept))["data"] is True
    another = {"reminder": {"node": "a" * 16, "term": 99, "floor": {"term": 9, "commit_id": 9}}}
    assert ask(played.connect(), played.hello(**another))["error"]["code"] == "wrong_node"
    lie = played.remind(term=99)
    assert ask(played.connect(), played.hello(cluster="another", **lie))["error"]["code"] == "wrong_cluster"
    assert ask(played.connect(), played.hello(node="e" * 16, **lie))["error"]["code"] == "wrong_node"
    assert ask(link := played.connect(), played.hello())["data"] is True
    assert ask(link, played.beat(8))["term"] == 8


@pytest.mark.parametrize(
    "forgotten",
    [
        {"term": 8},
        {"term": 7, "held": {"term": 7, "commit_id": 1}},
        {"term": 5, "floor": {"term": 2, "commit_id": 1}},
    ],
)
def test_who_has_forgotten_takes_part_in_nothing(
    played: Played, forgotten: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A node in term 7 with an empty log is reminded of a later term, or of an entry: it refuses that hello as
    `old_copy` and says what it has forgotten and what to do; from then on it refuses every hello, of members that know
    nothing too, ends the links that it had, grants nothing, follows nobody and never campaigns. So it is after a
    restart at which nobody reminds it. Its clients are told that there is no leader, and may read what it has."""
    link = played.connect()
    assert ask(link, played.hello())["data"] is True
    assert ask(link, played.beat(7))["term"] == 7
    refused = ask(played.connect(), played.hello(**played.remind(**forgotten)))["error"]
    assert refused["code"] == "old_copy"
    assert "Put its newest directory back" in refused["message"]
    assert f"term {forgotten['term']}" in refused["message"]
    wait_until(link.is_stale, "the link that it had is ended")
    for _ in range(2):
        election = played.node.election
        assert ask(played.connect(), played.hello())["error"] == refused, "its own member that reminds it of nothing"
        third = played.hello(address=played.third, node="d" * 16)
        assert ask(played.connect(), third)["error"]["code"] == "old_copy"
        with pytest.raises(Unavailable, match="old_copy"):
            election.decide_vote(99, 0, {"address": played.member, "term": 98, "commit_id": 50})
        election.ask_for_vote()
        status = played.node.status()
        assert (status["role"], status["term"], status["leader"]) == ("follower", 7, None)
        assert election.request({"type": "get", "key": "k", "consistency": "local"})["data"]["version"] == 0
        with pytest.raises(Unavailable):
            played.node.get("k")
        events = [record.msg for record in caplog.records if isinstance(record.msg, dict)]
        assert [event["why"] for event in events if event["event"] == "old_copy"] == [refused["message"]]
        caplog.clear()
        played.restart()


def test_a_leader_that_has_forgotten_steps_down() -> None:
    """An old copy may have been elected before anybody reminded it: once it is reminded it leads no more, commits
    nothing by acknowledgements that come late, and does not campaign."""
    network = Network(3)
    network.elect("1")
    network.propose("1", "k")
    raft = network["1"].raft
    network.deliver(1)
    assert not raft.remind(Witness(floor=EntryId(1, 9)))
    assert not raft.is_leader
    network.deliver()
    assert raft.commit_id == 1
    network.campaign("1")
    assert not network.select("1")
    assert raft.remember().of("1") == Witness(floor=EntryId(1, 9))


def test_one_that_its_own_log_does_not_know_notices_too() -> None:
    """The old copy is of a time when the member was taken out; it has come back since then, and promised more. What it
    is reminded of it writes down, for a start that finds nobody who could remind it."""
    network = Network(3)
    network.elect("1")
    network.change("1", lambda members: removed(members, "3"))
    network.run(0.5)
    old = network["2"].raft  # the log that all of them had then
    raft = Raft("3", old.journal, old.ballot, old.commit_id, random.Random(1), Settings(), 0.0, node="id-3")
    assert raft.membership.node_of("3") is None
    assert not raft.remind(Witness(floor=EntryId(1, 9)))
    facts = raft.remember().facts()
    assert facts["3"] == Witness(floor=EntryId(1, 9), node="id-3")
    again = Raft("3", old.journal, old.ballot, old.commit_id, random.Random(1), Settings(), 0.0, facts, "id-3")
    assert again.has_forgotten


# --- processes ------------------------------------------------------------------------------------------------

RECORDS = 200
REQUEST_TIMEOUT_S = 1
"""How long a node lets a request wait."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ClusterOfProcesses]:
    options = ["--timeout", str(REQUEST_TIMEOUT_S)]
    with ClusterOfProcesses(3, tmp_path / "cluster", FAST, options) as cluster:
        yield cluster


def write(cluster: ClusterOfProcesses, name: str, count: int = RECORDS) -> dict[str, str]:
    """Write so many records, each acknowledged and then held by every node; what was written."""
    wanted = {f"{name}-{n}": f"{name} {n}" for n in range(count)}
    with Writers(cluster.addresses, [WriteRecord(*record) for record in wanted.items()]) as writers:
        writers.join()
    assert len(writers.written) == count
    cluster.await_caught_up()
    return wanted


def put_back(node: NodeProcess, directory: Path) -> Path:
    """The node, which is dead, gets this directory in place of its own; where its own is now."""
    aside = directory.with_name(f"{directory.name}-instead-of")
    node.volume.rename(aside)
    shutil.copytree(directory, node.volume)
    return aside


def take_copy(node: NodeProcess, to: Path) -> Path:
    """Copy the directory of a node, which is killed for that and started again."""
    node.kill()
    shutil.copytree(node.volume, to)
    node.start()
    return to


def assert_stands_aside(cluster: ClusterOfProcesses, node: NodeProcess, since: dict[NodeProcess, int]) -> None:
    """The node knows that it has forgotten, and both others are told so."""
    said = node.await_event("old_copy", since[node])
    assert "Put its newest directory back" in said["why"]
    for other in cluster.others(node):
        refused = other.await_event("peer_refused", since[other], peer=node.address)
        assert (refused["code"], refused["why"]) == ("old_copy", said["why"])
    node.await_event("peer_refused", since[node], code="old_copy")


def assert_no_copy_noticed(cluster: ClusterOfProcesses, since: dict[NodeProcess, int]) -> None:
    for node in cluster:
        assert not node.events("old_copy", since[node])
        assert not node.events("peer_refused", since[node])


def marks(cluster: ClusterOfProcesses) -> dict[NodeProcess, int]:
    return {node: node.mark() for node in cluster}


def has_led(node: NodeProcess, since: int) -> bool:
    return any(event["role"] == "leader" for event in node.events("role", since))


def assert_holds(node: NodeProcess, wanted: dict[str, str]) -> None:
    found = node.read(wanted)
    lost = [key for key, text in wanted.items() if found.get(key) != text]
    assert not lost, f"{len(lost)} of {len(wanted)} acknowledged are lost, by {node}: {lost[:5]}"


def witnesses_on_disk(node: NodeProcess) -> dict[str, Witness]:
    """What the node remembers, as far as its disk has it."""
    with (
        lmdb.open(str(node.volume / records.DATA_FILE), subdir=False, readonly=True, lock=False, max_dbs=8) as env,
        env.begin(db=env.open_db(records.META, create=False)) as txn,
    ):
        stored = txn.get(b"witnesses")
        return records.unpack_meta(b"witnesses", bytes(stored), dict[str, Witness]) if stored else {}


@pytest.mark.parametrize("who", ["a follower", "the leader"])
def test_an_old_copy_stands_aside(cluster: ClusterOfProcesses, tmp_path: Path, who: str) -> None:
    """A node comes back with a copy of its directory that is 200 acknowledged records old. It learns that from the
    others, both are told that it is an `old_copy`, and they serve without it. When one more is killed, so that only
    the old copy and one other are left, nobody leads: writes are refused as not executed. With its newest directory it
    is a member again by itself, and all that was ever acknowledged is there."""
    leader = cluster.await_leader()
    node = leader if who == "the leader" else cluster.others(leader)[0]
    wanted = write(cluster, "first", 20)
    old = take_copy(node, tmp_path / "old")
    cluster.await_caught_up()
    if who == "the leader":  # it lost its office when it was copied
        wait_until(lambda: elected(cluster, node), "it leads again", explain=cluster.describe)
    wanted |= write(cluster, "second")
    node.kill()
    newest = put_back(node, old)
    since = marks(cluster)
    node.start()
    assert_stands_aside(cluster, node, since)
    others = cluster.others(node)
    wanted |= {f"third-{n}": f"third {n}" for n in range(20)}
    with others[0].client() as client:
        for n in range(20):
            client.put(f"third-{n}", f"third {n}")
    leader = cluster.await_leader()
    assert leader is not node
    leader.kill()
    (rest,) = cluster.others(node, leader)
    for asked in (rest, node):
        answer = asked.ask({"type": "put", "key": "lost", "value": "lost"}, PATIENCE_S)
        assert answer is not None
        assert answer["error"]["code"] == "no_leader"
    assert not has_led(node, since[node])
    assert node.await_answer()["role"] == "follower"

    node.kill()
    shutil.rmtree(node.volume)
    newest.rename(node.volume)
    since = marks(cluster)
    cluster.heal()
    assert_no_copy_noticed(cluster, since)
    for one in cluster:
        assert_holds(one, wanted)
        assert one.read(["lost"]) == {}


def elected(cluster: ClusterOfProcesses, node: NodeProcess) -> bool:
    """Ask the leader to go, by a short stop, until it is this node."""
    leader = cluster.await_leader()
    if leader is node:
        return True
    leader.restart()
    cluster.await_leader()
    cluster.await_caught_up()
    return False


def test_the_witness_outlives_its_owner(cluster: ClusterOfProcesses, tmp_path: Path) -> None:
    """All three are killed after the leader's witness has gone to disk with a later write, and an old copy is put in
    place of a follower's directory: when all are back, it is noticed all the same."""
    leader = cluster.await_leader()
    node = cluster.others(leader)[0]
    old = take_copy(node, tmp_path / "old")
    cluster.await_caught_up()
    wanted = write(cluster, "first")
    leader = cluster.await_leader()
    assert leader is not node
    upto = leader.await_answer()["commit_id"]
    with leader.client() as client:
        ticks = itertools.count()

        def is_on_disk() -> bool:
            client.put("tick", next(ticks))
            return witnesses_on_disk(leader).get(node.address, Witness()).floor.commit_id >= upto

        wait_until(is_on_disk, "the witness is written", explain=cluster.describe)
    cluster.kill()
    newest = put_back(node, old)
    since = marks(cluster)
    for one in cluster:
        one.start()
    assert_stands_aside(cluster, node, since)
    for one in cluster.others(node):
        assert_holds(one, wanted)
    node.kill()
    shutil.rmtree(node.volume)
    newest.rename(node.volume)
    since = marks(cluster)
    cluster.heal()
    assert_no_copy_noticed(cluster, since)
    assert_holds(node, wanted)


def test_a_copy_of_the_same_age_is_no_old_one(cluster: ClusterOfProcesses, tmp_path: Path) -> None:
    """A directory that was copied after the node was killed, and is put in its place, has forgotten nothing, whatever
    the others did in between: the node goes on with it."""
    leader = cluster.await_leader()
    wanted = write(cluster, "first")
    for node in (leader, cluster.others(leader)[0]):
        node.kill()
        shutil.copytree(node.volume, tmp_path / node.name)
        put_back(node, tmp_path / node.name)
        with cluster.others(node)[0].client() as client:
            client.put(node.name, "meanwhile")
        wanted[node.name] = "meanwhile"
        since = marks(cluster)
        cluster.heal()
        assert_no_copy_noticed(cluster, since)
    for one in cluster:
        assert_holds(one, wanted)


@pytest.mark.parametrize("times", [12, pytest.param(40, marks=pytest.mark.long)])
@pytest.mark.timeout(180)
def test_legal_restarts_are_never_refused(tmp_path: Path, times: int) -> None:
    """Again and again one node, or two, or all are killed with kill -9 at any moment under full load, and the links
    between two others reset: whoever comes back is taken back, and no log tells of an old copy or a refusal."""
    chance = random.Random(71)
    print("seed 71")  # noqa: T201 - shown when the test fails
    endless = (WriteRecord(f"key-{n}", "x" * (n % 500)) for n in itertools.count())
    with ClusterOfProcesses(3, tmp_path / "cluster", FAST, proxied=True) as cluster:
        with Writers(cluster.addresses, endless, clients=8, resolve=False, timeout=2.0) as writers:
            for _ in range(times):
                cluster.await_leader()
                writers.await_more(chance.randrange(1, 60), explain=cluster.describe)
                victims = chance.sample(cluster.nodes, chance.choice([1, 1, 1, 2, 3]))
                if chance.random() < 0.5:
                    cluster.proxy.reset(*chance.sample(cluster.addresses, 2))
                cluster.kill(victims)
                if chance.random() < 0.5:
                    cluster.proxy.reset(*chance.sample(cluster.addresses, 2))
                for node in victims:
                    node.start()
            writers.stop()
        cluster.heal()
        assert_no_copy_noticed(cluster, dict.fromkeys(cluster, 0))
        wanted = {done.record.key: done.record.value for done in writers.acknowledged}
        for node in cluster:
            assert_holds(node, wanted)
