"""Who counts, from when on, and until when (rules 8 and 9 as far as the consensus core knows them)."""

from __future__ import annotations

import pytest
from msgspec import Raw

from raftnode.config import Role, Settings
from raftnode.consensus.membership import Membership, cluster_id
from raftnode.messages import (
    DataAnswer,
    EntryId,
    HeartbeatAnswer,
    MembersCommand,
    Staged,
    VoteAnswer,
    VoteRequest,
    encode_command,
)
from raftnode.testing.network import Network

LOW = Settings().election_low_ms / 1000
BEAT = Settings().heartbeat_ms / 1000


def members(*voters: str, learners: tuple[str, ...] = ()) -> Raw:
    """The command that makes these the members."""
    return encode_command(MembersCommand(voters=dict.fromkeys(voters, ""), learners=dict.fromkeys(learners, "")))


def led_by_1(size: int = 3, learners: int = 0) -> Network:
    """A cluster at rest that "1" leads in term 1; its no-op is committed everywhere."""
    network = Network(size, learners=learners)
    network.elect("1")
    network.run(2.0)
    network.deliver()
    return network


# --- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "majority"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3), (6, 4), (7, 4)])
def test_majority_is_more_than_half_of_the_voters(size: int, majority: int) -> None:
    """Any two majorities share a voter. (Thesis 3.4.)"""
    membership = Membership.founding([f"n{n}" for n in range(size)])
    assert membership.majority == majority
    everyone = sorted(membership.voters)
    assert membership.is_majority(everyone[:majority])
    assert not membership.is_majority(everyone[: majority - 1])
    assert 2 * majority > size


def test_only_voters_count() -> None:
    """Strangers, learners and members named twice do not make a majority. (Thesis 4.2.1; published interface: a
    majority is counted over the members, never over who answers.)"""
    membership = Membership(voters={"a": "", "b": "", "c": ""}, learners={"d": ""})
    assert not membership.is_majority(["a", "d", "e", "f"])
    assert not membership.is_majority(["a", "a", "a"])
    assert membership.is_majority({"a", "c"})
    assert membership.agreed({"a": 9, "d": 9, "e": 9}) == 0


@pytest.mark.parametrize(
    ("reached", "agreed"),
    [
        ({"a": 5, "b": 5, "c": 5}, 5),
        ({"a": 9, "b": 5, "c": 1}, 5),
        ({"a": 9, "b": 9, "c": 0}, 9),
        ({"a": 9}, 0),  # who is missing has reached nothing
        ({"a": 9, "b": 4}, 4),
    ],
)
def test_agreed_is_what_a_majority_has_reached(reached: dict[str, int], agreed: int) -> None:
    """The middle of the sorted numbers; with an even size, the lower one. (Thesis 3.5.)"""
    assert Membership.founding(["a", "b", "c"]).agreed(reached) == agreed
    assert Membership.founding(["a", "b", "c", "d"]).agreed({**reached, "d": 0}) <= agreed


def test_membership_keeps_its_own_rules() -> None:
    """There is a voter, and nobody is voter and learner at once. (Thesis 4.2.1.)"""
    with pytest.raises(AssertionError, match="at least one voter"):
        Membership(voters={})
    with pytest.raises(AssertionError, match="both voter and learner"):
        Membership(voters={"a": ""}, learners={"a": ""})
    membership = Membership(voters={"b": "", "a": ""}, learners={"c": ""})
    assert membership.addresses == ("a", "b", "c")


# --- node ids and the cluster's -----------------------------------------------------------------------------------


def test_node_id_is_bound_once() -> None:
    """A member is known by address and id. The id of a member met for the first time is written down; another id at
    that address is another node, which has lost its disk, its votes and its acknowledgements. (rule 9; TRAPS
    34.)"""
    membership = Membership(voters={"a": "", "b": ""}, learners={"c": ""})
    assert membership.node_of("a") == ""
    assert membership.node_of("x") is None
    bound = membership.bind("a", "id-1").bind("c", "id-3")
    assert (bound.node_of("a"), bound.node_of("b"), bound.node_of("c")) == ("id-1", "", "id-3")
    assert membership.node_of("a") == "", "a value does not change"
    for address, node in (("a", "id-2"), ("a", "id-1"), ("x", "id-4")):
        with pytest.raises(AssertionError, match="is bound to"):
            bound.bind(address, node)


def test_journal_binds_in_every_membership_that_does_not_know_the_id() -> None:
    """While a change is staged there are two memberships in the journal: whichever of them remains knows the id.
    (rule 9.)"""
    network = led_by_1()
    network.isolate("1")
    network.propose_commands("1", [members("1", "2")])
    journal = network["1"].raft.journal
    journal.bind("2", "id-2")
    journal.bind("3", "id-3")
    staged, before = journal.memberships[-1], journal.memberships[0]
    assert (before.node_of("2"), before.node_of("3")) == ("id-2", "id-3")
    assert (staged.node_of("2"), staged.node_of("3")) == ("id-2", None)


def test_cluster_id_is_that_of_the_founders() -> None:
    """Nodes that were started with the same members in any order have the same cluster; any other set is another one.
    (rule 9; TRAPS 35.)"""
    founders = ["10.0.0.1:5001", "10.0.0.2:5001", "10.0.0.3:5001"]
    assert cluster_id(founders) == cluster_id(reversed(founders)) == cluster_id([*founders, founders[0]])
    others = [founders[:2], [*founders, "10.0.0.4:5001"], [*founders[:2], "10.0.0.3:5002"]]
    assert len({cluster_id(founders), *map(cluster_id, others)}) == 4
    assert Membership.founding([*reversed(founders), founders[0]]) == Membership.founding(founders)


# --- a change is in force when appended -----------------------------------------------------------------------------


def test_membership_is_in_force_when_appended() -> None:
    """ "3" is taken out of three. From the append on, before anything commits, "1" and "2" are the members: "3" is sent
    nothing more, and its acknowledgement makes no majority. (Thesis 4.1; TRAPS 31.)"""
    network = led_by_1()
    network.cut("1", "2")
    (commit_id,) = network.propose_commands("1", [members("1", "2")])
    assert network["1"].raft.membership.addresses == ("1", "2")
    assert network["1"].raft.others == ("2",)
    network.run(3 * BEAT)
    assert network["1"].raft.commit_id < commit_id
    network.heal()
    network.run(1.0)
    assert network["2"].raft.commit_id == commit_id
    assert network["2"].raft.membership.commit_id == commit_id


def test_leader_sends_to_whom_a_change_adds_from_then_on() -> None:
    """A change takes a member out and brings it back. From when each is appended, the leader keeps progress of exactly
    the members in force, sends the returned one what it lacks, heartbeats included, and counts its copy. (Thesis 4.1;
    TRAPS 31.)"""
    network = led_by_1()
    raft = network["1"].raft
    network.propose_commands("1", [members("1", "2")])
    network.deliver()
    assert raft.progress.keys() == {"2"}
    network.propose("1", "without 3")
    network.deliver()
    network.propose_commands("1", [members("1", "2", "3")])
    raft.beat()
    assert raft.progress.keys() == {"2", "3"}
    network.isolate("2")
    network.propose("1", "with 3")
    network.run(1.0)
    assert raft.is_leader, "3 is heard, and counts"
    assert network["3"].keys == ["without 3", "with 3"]


def test_follower_counts_by_the_newest_membership_in_its_log() -> None:
    """A follower has the change in its log, not committed. When it campaigns, it needs the majority of the new members,
    and asks nobody else. (Thesis 4.1; TRAPS 31.)"""
    network = led_by_1(5)
    network.propose_commands("1", [members("1", "2", "3")])
    network.drop("1", "4")
    network.drop("1", "5")
    network.deliver(2)
    network.crash("1")
    network.in_flight.clear()
    network.lose_leaders()
    network.campaign("2")
    assert {envelope.target for envelope in network.select("2", kind=VoteRequest)} == {"1", "3"}
    network.deliver()
    assert network["2"].raft.is_leader, "two of three"


def test_membership_goes_with_the_suffix_that_is_cut() -> None:
    """A leader that is cut off appends a change, in force for it alone. When it comes back, its suffix is cut, and the
    membership before it is in force again, in memory and after a restart. (Thesis 4.1; TRAPS 11.)"""
    network = led_by_1()
    network.isolate("1")
    network.propose_commands("1", [members("1", "2")])
    network.propose("1", "lost")
    assert network["1"].raft.membership.addresses == ("1", "2")
    network.elect("2")
    network.propose("2", "chosen")
    network.deliver()
    network.heal()
    network.run(2.0)
    assert network["1"].keys == ["chosen"]
    assert network["1"].raft.membership == Membership.founding(["1", "2", "3"])
    network.crash("1")
    network.restart("1")
    assert network["1"].raft.membership == Membership.founding(["1", "2", "3"])


def test_of_several_staged_changes_each_cut_takes_its_own() -> None:
    """Two changes are staged behind each other; only the later one is cut. (Thesis 4.1; TRAPS 11.)"""
    network = led_by_1()
    network.isolate("1")
    (first,) = network.propose_commands("1", [members("1", "2")])
    (second,) = network.propose_commands("1", [members("1", "2", "3")])
    journal = network["1"].raft.journal
    assert [m.commit_id for m in journal.memberships] == [0, first, second]
    journal._cut(second)
    assert journal.membership.commit_id == first
    journal._cut(first)
    assert journal.membership.commit_id == 0


def test_change_survives_the_restart_of_everyone() -> None:
    """Committed or only staged, a change in the log is in force when a member comes back from its disk. (Thesis
    4.1.)"""
    network = led_by_1()
    network.crash("3")
    (committed,) = network.propose_commands("1", [members("1", "2")])
    network.run(1.0)
    network.isolate("1")
    (staged,) = network.propose_commands("1", [members("1", "2", "3")])
    for name in ("1", "2"):
        network.crash(name)
        network.restart(name)
    assert [m.commit_id for m in network["1"].raft.journal.memberships] == [committed, staged]
    assert network["2"].raft.membership.addresses == ("1", "2")


def test_removed_member_disturbs_nobody() -> None:
    """ "3" is taken out and does not hear of it. It campaigns again and again; the others hear their leader, so its
    pre-votes and its votes are refused, and no term changes. (Thesis 4.2.3; TRAPS 14, 33.)"""
    network = led_by_1()
    network.cut("1", "3")
    network.propose_commands("1", [members("1", "2")])
    network.run(5.0)
    assert network["3"].raft.role is Role.PRE_CANDIDATE
    for voter in ("1", "2"):
        staged = Staged(address="3", term=99, commit_id=99)
        for pre_vote in (True, False):
            answer = network.ask("3", voter, VoteRequest(term=99, commit_id=0, staged=staged, pre_vote=pre_vote))
            assert isinstance(answer, VoteAnswer)
            assert not answer.data
    network.run(1.0)
    assert (network.leaders, network["1"].raft.term) == (["1"], 1)


# --- learners ---------------------------------------------------------------------------------------------------------


def test_learner_gets_everything_and_counts_for_nothing() -> None:
    """A learner is sent the log like the others; two of three voters are cut off, and with any number of learners
    nothing commits. (Thesis 4.2.1; TRAPS 32.)"""
    network = led_by_1(3, learners=2)
    network.propose("1", "colour")
    network.run(0.5)
    assert network["4"].keys == network["5"].keys == ["colour"]
    network.isolate("2", "3")
    (commit_id,) = network.propose("1", "alone")
    network.deliver()
    assert network["4"].log[-1].commit_id == network["5"].log[-1].commit_id == commit_id
    assert network["1"].raft.commit_id < commit_id


def test_learners_do_not_keep_a_leader_in_office() -> None:
    """Check-quorum counts voters: a leader that hears its learners only steps down. (Thesis 4.2.1, 6.2; TRAPS 15.)"""
    network = led_by_1(3, learners=2)
    network.isolate("2", "3")
    network.run(LOW + 2 * BEAT)
    assert not network["1"].raft.is_leader


def test_learner_never_campaigns() -> None:
    """It hears nobody for long and waits, in its term, with a timer that goes on. (Thesis 4.2.1; TRAPS 32.)"""
    network = led_by_1(3, learners=1)
    network.isolate("4")
    network.turn("4", lambda raft: raft.suspect("1"))
    network.run(10.0)
    assert network["4"].raft.role is Role.FOLLOWER
    assert network["4"].raft.term == 1
    assert not network.select("4")


def test_learner_votes_when_it_is_asked() -> None:
    """Its membership may be old: who asks it may know that it is a voter by now. Its vote obeys the same rules and is
    on disk like any other. (TRAPS 32.)"""
    network = led_by_1(3, learners=1)
    network.lose_leaders()
    last = network["4"].log[-1]
    staged = Staged(address="2", term=last.term, commit_id=last.commit_id)
    answer = network.ask("2", "4", VoteRequest(term=2, commit_id=0, staged=staged))
    assert isinstance(answer, VoteAnswer)
    assert answer.data
    assert network["4"].disk.ballot.voted_for == "2"


def test_votes_of_learners_elect_nobody() -> None:
    """A candidate that is wrong about who votes, or is answered by a learner, counts voters only. (Thesis 4.2.1.)"""
    network = Network(3, learners=2)
    network.campaign("1")
    assert {envelope.target for envelope in network.select("1")} == {"2", "3"}
    network.drop()
    for learner in ("4", "5"):
        network.turn(
            "1", lambda raft, learner=learner: raft.take(learner, VoteAnswer(data=True, term=1, pre_vote=True))
        )
    assert network["1"].raft.role is Role.PRE_CANDIDATE


def test_single_voter_with_a_learner_serves_alone() -> None:
    """The one voter is its own majority: it leads, commits and reads without its learner, which follows. (Thesis
    4.2.1.)"""
    network = Network(1, learners=1)
    network.run(0.1)
    network.isolate("2")
    network.propose("1", "colour")
    network.read("1", "r")
    network.run(5.0)
    assert network.leaders == ["1"]
    assert network["1"].keys == ["colour"]
    assert network["1"].reads.answered == {"r": 2}
    network.heal()
    network.run(2.0)
    assert network["2"].keys == ["colour"]


def test_who_is_no_member_is_not_counted_and_not_followed_up() -> None:
    """Answers of a stranger change nothing. (published interface: a majority is counted over the members; TRAPS 35.)"""
    network = led_by_1()
    network.isolate("1")
    (commit_id,) = network.propose("1", "alone")
    network.drop()
    for answer in (DataAnswer(data=True, term=1, match=commit_id), HeartbeatAnswer(term=1, commit_id=1, round=9)):
        network.turn("1", lambda raft, answer=answer: raft.take("9", answer))
    network.turn("1", lambda raft: raft.unreachable("9"))
    assert network["1"].raft.commit_id < commit_id
    assert network["1"].log[-1] == EntryId(1, commit_id)
