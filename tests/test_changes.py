"""Changes of the membership: what may be changed, when, and what comes of it by itself (rule 8; thesis chapter 4)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from raftnode.config import Role, Settings
from raftnode.consensus.changes import (
    CatchingUp,
    ChangeRefused,
    added,
    next_steps,
    promoted,
    readmitted,
    removed,
    replaced,
    voters_changed,
)
from raftnode.consensus.membership import Membership
from raftnode.consensus.raft import Raft
from raftnode.consensus.witness import Witness, Witnesses
from raftnode.messages import (
    Data,
    DataAnswer,
    EntryId,
    MembersCommand,
    Staged,
    TimeoutNow,
    TimeoutNowAnswer,
    VoteAnswer,
    VoteRequest,
)
from raftnode.testing.network import Member, Network

LOW = Settings().election_low_ms / 1000
BEAT = Settings().heartbeat_ms / 1000

Change = Callable[[Membership], MembersCommand | None]


def add(name: str) -> Change:
    return lambda members: added(members, name, "", is_silent=False)


def remove(name: str) -> Change:
    return lambda members: removed(members, name)


def promote(name: str) -> Change:
    return lambda members: promoted(members, name)


def replace(old: str, new: str) -> Change:
    return lambda members: replaced(members, old, new)


def led_by_1(size: int = 3, learners: int = 0) -> Network:
    """A cluster at rest that "1" leads in term 1; its no-op is committed everywhere. Leaders take the further steps of
    a change by themselves, as drivers let them."""
    network = Network(size, learners=learners)
    network.elect("1")
    network.run(2.0)
    network.deliver()
    return network


def by_themselves(network: Network) -> Network:
    """From now on leaders take the next step of a change, as drivers let them."""
    for member in network.members.values():
        member.changes_members = True
    return network


def refusal(network: Network, leader: str, change: Change, force: bool = False) -> str:
    """The code with which the leader refuses the change; nothing was appended."""
    before = list(network[leader].log)
    with pytest.raises(ChangeRefused) as refused:
        network.change(leader, change, force)
    assert network[leader].log == before
    return refused.value.code


def join(network: Network, name: str) -> None:
    """Add a node that starts with an empty disk, as `serve --join` does."""
    network.change(network.leader, add(name))
    network.deliver()
    network.join(name, network[network.leader].raft.membership)
    network[name].changes_members = True


# --- what a change may be -------------------------------------------------------------------------------------------


def test_who_is_added_is_a_learner_first() -> None:
    """A new member has no vote and does not count. Adding it again changes nothing; a node that says who it is fills in
    what was not known. (Thesis 4.2.1.)"""
    members = Membership.founding(["a", "b", "c"])
    command = added(members, "d", "id-d", is_silent=False)
    assert command is not None
    assert (list(command.voters), command.learners) == (["a", "b", "c"], {"d": "id-d"})
    after = Membership.of(EntryId(1, 2), command)
    assert added(after, "d", "id-d", is_silent=False) is None
    assert added(after, "d", "", is_silent=False) is None
    unknown = Membership(voters=members.voters, learners={"d": ""})
    filled = added(unknown, "d", "id-d", is_silent=False)
    assert filled is not None
    assert filled.learners == {"d": "id-d"}


def test_another_node_at_a_members_address_is_refused_while_the_old_one_answers() -> None:
    """Two nodes can't be one member. Once the old one is silent, its place can be taken by a learner: it has promised
    nothing. So can that of a voter whom this leader never met, as others may count on what it promised. (rule 9; TRAPS
    34.)"""
    members = Membership(voters={"a": "id-a", "b": "id-b", "c": ""})
    with pytest.raises(ChangeRefused) as refused:
        added(members, "b", "id-x", is_silent=False)
    assert refused.value.code == "wrong_node"
    for address in ("b", "c"):
        command = added(members, address, "id-x", is_silent=True)
        assert command is not None
        assert command.learners == {address: "id-x"}
        assert address not in command.voters
        assert voters_changed(members, command) == {address}


def test_last_voter_stays() -> None:
    """Without a voter there is no cluster. (issue: refused with a reason.)"""
    members = Membership(voters={"a": "id-a"}, learners={"b": ""})
    for change in (lambda: removed(members, "a"), lambda: readmitted(members, "a", "id-x")):
        with pytest.raises(ChangeRefused) as refused:
            change()
        assert refused.value.code == "last_voter"
    assert removed(members, "b").learners == {}


def test_replacing_is_two_changes_of_one_voter_each() -> None:
    """The new member comes as a learner, votes when it has caught up, and only then the old one goes. What is meant
    stands in the membership itself. (Thesis 4.1, 4.2.1.)"""
    members = Membership.founding(["a", "b", "c"])
    first = Membership.of(EntryId(1, 2), replaced(members, "b", "d"))
    assert (first.learners, first.replaces) == ({"d": ""}, {"d": "b"})
    assert list(next_steps(first, caught_up=())) == []
    (step,) = next_steps(first, caught_up={"d"})
    second = Membership.of(EntryId(1, 3), step)
    assert (sorted(second.voters), second.replaces) == (["a", "b", "c", "d"], {"d": "b"})
    (step,) = next_steps(second, caught_up=())
    third = Membership.of(EntryId(1, 4), step)
    assert (sorted(third.voters), third.replaces) == (["a", "c", "d"], {})
    assert list(next_steps(third, caught_up={"d"})) == []
    for before, after in ((members, first), (first, second), (second, third)):
        changed = voters_changed(before, MembersCommand(voters=after.voters, learners=after.learners))
        assert len(changed) <= 1
    assert sorted(replaced(third, "a", "d").voters) == ["c", "d"], "who votes already only has to let the other go"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (remove("x"), "no_such_member"),
        (replace("x", "d"), "no_such_member"),
        (replace("a", "a"), "bad_request"),
    ],
)
def test_changes_of_who_is_no_member_are_refused(change: Change, code: str) -> None:
    """Each refusal has its word. (issue.)"""
    with pytest.raises(ChangeRefused) as refused:
        change(Membership.founding(["a", "b", "c"]))
    assert refused.value.code == code


def test_intents_go_with_their_members() -> None:
    """Two learners are to replace one member, or the one that replaces is itself taken out: no intent is left over."""
    members = Membership(voters={"a": "", "b": ""}, learners={"d": "", "e": ""}, replaces={"d": "b", "e": "b"})
    assert removed(members, "b").replaces == {}
    assert removed(members, "d").replaces == {"e": "b"}


def test_caught_up_is_a_round_within_the_time_limit() -> None:
    """A round begins with what is committed, and ends when the learner has it. A slow round means that the next would
    leave the cluster waiting. (Thesis 4.2.1.)"""
    learners = CatchingUp(limit=1.0)
    assert learners.caught_up({"d": 0}, 100, now=0.0) == set()
    assert learners.caught_up({"d": 100}, 300, now=5.0) == set(), "that took too long"
    assert learners.caught_up({"d": 299}, 310, now=5.5) == set()
    assert learners.caught_up({"d": 300}, 310, now=5.9) == {"d"}
    assert learners.caught_up({}, 310, now=6.0) == set(), "it is not heard: it begins anew"
    assert learners.caught_up({"d": 309}, 310, now=9.0) == set()
    assert learners.caught_up({"d": 310}, 310, now=9.5) == {"d"}


# --- when ---------------------------------------------------------------------------------------------------------


def test_no_change_before_the_leaders_own_entry_is_committed() -> None:
    """(Rule 8; the error found in 2015, which `scenarios/single-server-changes.txt` plays; TRAPS 31.)"""
    network = Network(3)
    network.lose_leaders()
    network.campaign("1")
    while not network["1"].raft.is_leader:
        network.deliver(1)
    assert refusal(network, "1", add("4")) == "no_leader"
    network.deliver()
    network.change("1", add("4"))


def test_one_change_at_a_time() -> None:
    """The next has to wait until the one before is committed. (Thesis 4.1; TRAPS 31.)"""
    network = led_by_1()
    network.change("1", add("4"))
    assert refusal(network, "1", add("5")) == "change_under_way"
    assert refusal(network, "1", remove("2"), force=True) == "change_under_way"
    network.deliver()
    network.change("1", remove("2"))


def test_change_that_leaves_no_live_majority_is_refused() -> None:
    """3 is down. Without 2 there would be 1 and 3, and one of two is no majority: refused, unless with force. Taking
    out 3 itself is fine."""
    network = led_by_1()
    network.crash("3")
    network.run(LOW + 2 * BEAT)
    assert refusal(network, "1", remove("2")) == "no_live_majority"
    network.change("1", remove("3"))
    network.deliver()
    assert network["1"].raft.membership.addresses == ("1", "2")

    network = led_by_1()
    network.crash("3")
    network.run(LOW + 2 * BEAT)
    network.change("1", remove("2"), force=True)
    network.run(5.0)
    assert network.leaders == [], "that is what was asked for"
    network.restart("3")
    network.run(5.0)
    assert network.leaders, "it goes on when 3 is back, by the one membership or the other"


def test_a_new_leader_counts_only_on_who_has_answered_it() -> None:
    """3 is dead when 1 hands over to 2. A new leader steps down only when an election timeout has gone by without a
    majority; but whether a change leaves a live one it can't tell from that: without 1 there would be 2 and 3, which
    has never answered it. It is refused, though 2 leads only since a moment. (Found by the simulator, seed 157.)"""
    network = led_by_1()
    network.crash("3")
    network.turn("1", lambda raft: raft.hand_over("2"))
    network.deliver()
    assert network["2"].raft.may_serve_reads
    assert not network["2"].raft.is_silent("3")
    assert refusal(network, "2", remove("1")) == "no_live_majority"
    network.change("2", remove("3"))


def test_change_is_in_force_when_appended_and_gone_when_cut() -> None:
    """A leader that is cut off removes one; by its own members it is alone with the other. The next leader's entries
    cut that, and the membership before it counts again. (Thesis 4.1; TRAPS 11.)"""
    network = led_by_1(5)
    network.isolate("1", "2")
    network.change("1", remove("5"))
    assert network["1"].raft.membership.addresses == ("1", "2", "3", "4")
    network.elect("3")
    network.heal()
    network.run(2.0)
    for name in ("1", "2", "3", "4", "5"):
        assert network[name].raft.membership == Membership.founding(["1", "2", "3", "4", "5"])


# --- by itself ----------------------------------------------------------------------------------------------------


def test_learner_becomes_a_voter_by_itself() -> None:
    """It joins with an empty disk, gets the whole log, and votes. While it has not caught up it does not. (Thesis
    4.2.1; etcd users' wish for automatic promotion.)"""
    network = by_themselves(led_by_1())
    network.propose("1", "a", "b", "c")
    network.deliver()
    network.change("1", add("4"))
    network.run(1.0)
    assert "4" in network["1"].raft.membership.learners, "nobody is there yet"
    network.join("4", network["1"].raft.membership)
    network.run(1.0)
    for name in "1234":
        assert sorted(network[name].raft.membership.voters) == ["1", "2", "3", "4"]
    assert network["4"].keys == ["a", "b", "c"]


def test_promotion_comes_also_from_the_next_leader() -> None:
    """The leader that took it dies at once; the next one gives it its vote."""
    network = by_themselves(led_by_1())
    network.change("1", add("4"))
    network.deliver()
    network.crash("1")
    network.elect("2")
    network.join("4", network["2"].raft.membership)
    network.run(1.0)
    assert "4" in network["2"].raft.membership.voters


def test_dead_learner_is_never_promoted() -> None:
    """It had everything when it died, and nothing is written since: a vote that nobody can give would only make
    majorities harder to reach."""
    network = led_by_1(3, learners=1)
    network.crash("4")
    network.run(2 * LOW)
    by_themselves(network)
    network.run(5.0)
    assert "4" in network["1"].raft.membership.learners


def test_replacement_is_carried_to_its_end_by_another_leader() -> None:
    """2 is dead and is to be replaced by 4. The leader dies after each step; whoever leads next goes on. (etcd users'
    wish: to replace a dead member in one step.)"""
    network = by_themselves(led_by_1(5))
    network.crash("2")
    network.run(LOW + BEAT)
    network.change("1", replace("2", "6"))
    network.deliver()
    membership = network["1"].raft.membership
    network.crash("1")
    network.elect("3")
    network.join("6", membership)
    network["6"].changes_members = True
    network.run_until(lambda: "6" in network["3"].raft.membership.voters)
    network.crash("3")
    network.restart("1")
    network.run_until(lambda: bool(network.leaders) and "2" not in network[network.leader].raft.membership.addresses)
    assert sorted(network[network.leader].raft.membership.voters) == ["1", "3", "4", "5", "6"]


def test_joined_node_passes_through_older_memberships() -> None:
    """A node joins late: the log tells of memberships long past, in which it is no member, and some in which those are
    who left. What it was told when it came counts until the log is past that. (Thesis 4.1.)"""
    network = by_themselves(led_by_1(3))
    join(network, "4")
    network.run(1.0)
    network.change("1", remove("3"))
    network.run(1.0)
    network.change("1", add("5"))
    network.deliver()
    told = network["1"].raft.membership
    network.join("5", told)
    network.cut("1", "5")
    assert network["5"].raft.membership == told
    network.heal()
    network.run(1.0)
    assert sorted(network["5"].raft.membership.voters) == ["1", "2", "4", "5"]
    network.crash("5")
    network.restart("5")
    assert sorted(network["5"].raft.membership.voters) == ["1", "2", "4", "5"]


# --- who leaves ---------------------------------------------------------------------------------------------------


def test_removed_leader_leads_until_that_is_committed_and_hands_over() -> None:
    """It does not count itself meanwhile. Then another leads at once, without an election timeout, and it knows that it
    is no member any more. (Thesis 4.2.2; TRAPS 33.)"""
    network = led_by_1()
    network.isolate("3")
    commit_id = network.change("1", remove("1"))
    network.deliver()
    assert network["1"].raft.is_leader
    assert network["1"].raft.commit_id < commit_id, "its own copy is none of the majority's"
    network.heal()
    network.run_until(lambda: network["1"].raft.commit_id >= commit_id)
    began = network.now
    network.run_until(lambda: any(leader in network.leaders for leader in "23"))
    assert network.now - began < LOW / 2
    assert not network["1"].raft.is_leader
    assert network["1"].raft.is_outside
    network.run(10.0)
    assert network["1"].raft.role is Role.FOLLOWER
    assert sorted(network[network.leader].raft.membership.voters) == ["2", "3"]


def test_a_leader_that_is_a_learner_does_not_promote_itself() -> None:
    """Who comes to lead may find itself a learner by the newest membership, as when it had lost its disk.
    It leads until that is committed, makes no step for itself, and hands over; the next leader gives it its vote."""
    network = by_themselves(led_by_1())
    node = network["1"].raft.membership.node_of("1") or ""
    network.change("1", lambda _members: MembersCommand(voters={"2": "", "3": ""}, learners={"1": node}))
    assert network["1"].raft.next_change() is None
    network.run(2.0)
    network.deliver()
    assert network.leader in ("2", "3")
    network.run(2.0)
    network.deliver()
    assert set(network[network.leader].raft.membership.voters) == {"1", "2", "3"}


def test_a_learner_on_whose_vote_a_candidate_counts_may_campaign() -> None:
    """2 leads, gives the learner 4 its vote by an entry that nobody else gets, and dies. 3 leads next; its first entry
    reaches 4 alone, and then its disk is lost. So of the four that 2 counts, 4 refuses it, as its log is newer, and 3
    is gone; and 1, whose log is old, can't win either. Only 4 can: by its own log it has no vote, but those of 1 and 2
    are enough there. It hands over as soon as it can. (Found by the simulator.)"""
    network = led_by_1()
    network.change("1", add("4"))
    network.join("4", network["1"].raft.membership)
    network.run(1.0)
    network.elect("2")
    network.run(1.0)
    network.isolate("2")
    network.change("2", promote("4"))
    network.turn("2")
    network.crash("2")
    network.drop()
    network.heal()
    network.lose_leaders()
    network.campaign("3")
    while not network["3"].raft.is_leader:
        network.deliver(1)
    network.cut("1", "3")
    network.deliver()
    assert network["4"].raft.journal.last.id.term == network["3"].raft.term
    network.crash("3")
    network.drop()
    network.heal()
    network.restart("2")
    assert "4" in network["2"].raft.membership.voters
    assert "4" in network["4"].raft.membership.learners
    assert network["4"].raft.journal.last.id > network["2"].raft.journal.last.id > network["1"].raft.journal.last.id
    network.run_until(lambda: bool(set(network.leaders) & {"1", "2"}))
    network.propose(network.leader, "k")
    network.run(1.0)
    assert all("k" in network[name].keys for name in "124")


def test_leader_with_its_own_removal_alone_still_finishes_it() -> None:
    """Of two, 1 takes itself out and dies before anyone hears of it. It comes back: only it has the entry, so 2 can't
    be elected without its vote; it campaigns, does not count itself, and finishes what it began. (Thesis 4.2.2,
    figure 4.6.)"""
    network = led_by_1(2)
    network.cut("1", "2")
    network.change("1", remove("1"))
    network.drop()
    network.crash("1")
    network.restart("1")
    network.heal()
    network.run_until(lambda: network.leaders == ["2"])
    network.run(1.0)
    assert network["2"].raft.membership.addresses == ("2",)


def test_node_that_is_told_that_it_was_removed_stays_quiet_until_a_leader_speaks_to_it() -> None:
    """It was away during its removal. Told so, it does not campaign; taken back, it follows. One that hears its leader
    is not misled by a member that lags. (Issue: it can't disturb, and is told.)"""
    network = led_by_1()
    network.turn("3", lambda raft: raft.stand_outside())
    assert not network["3"].raft.is_outside, "it hears its leader"
    network.cut("1", "3")
    network.cut("2", "3")
    network.change("1", remove("3"))
    network.run(LOW + 2 * BEAT)
    network.turn("3", lambda raft: raft.stand_outside())
    network.run(5.0)
    assert network["3"].raft.is_outside
    assert network["3"].raft.role is Role.FOLLOWER
    assert not network.select("3")
    network.heal()
    network.change("1", add("3"))
    network.run(1.0)
    assert not network["3"].raft.is_outside
    assert network["3"].raft.leader == "1"


def test_leader_that_is_told_that_it_was_removed_steps_down() -> None:
    """A cluster of one has grown, and its founder lost its disk: started as on the first day it is a cluster of one
    again, and leads it. As soon as a member of the real one speaks to it, it takes nothing more."""
    network = Network(1)
    network.run(1.0)
    assert network["1"].raft.is_leader
    network.turn("1", lambda raft: raft.stand_outside())
    network.run(5.0)
    assert network["1"].raft.is_outside
    assert network.leaders == []


# --- another node at the address of a member -----------------------------------------------------------------------


def known_nodes(network: Network, ids: dict[str, str]) -> None:
    """Every member knows the node ids of all."""
    for member in network.members.values():
        for address, node in ids.items():
            if member.raft.membership.node_of(address) == "":
                member.raft.journal.bind(address, node)


def wiped(network: Network, name: str, node: str) -> Member:
    """The member comes back with an empty disk, as another node, which knows only the founders."""
    network[name].crash()
    network.join(name, Membership.founding(["1", "2", "3"]).bind(name, node))
    network[name].raft.node = node
    return network[name]


def test_wiped_node_has_no_vote_until_it_is_promoted() -> None:
    """Told that it is taken for the node that it was, it neither campaigns nor votes; the leader takes it as a learner
    in the place of the old voter, counts none of the old one's copies, and gives it a vote when it has everything.
    (Rule 9; TRAPS 34.)"""
    network = led_by_1()
    known_nodes(network, {"1": "id-1", "2": "id-2", "3": "id-3"})
    network.propose("1", "a", "b")
    network.deliver()
    raft = wiped(network, "3", "id-x").raft
    raft.give_up_identity("id-3")
    assert raft.is_outside
    staged = Staged(address="2", term=9, commit_id=9)
    for pre_vote in (True, False):
        answer = network.ask("2", "3", VoteRequest(term=9, commit_id=0, staged=staged, pre_vote=pre_vote))
        assert isinstance(answer, VoteAnswer)
        assert not answer.data
    network.turn("3", lambda raft: raft.campaign())
    assert not network.select("3", kind=VoteRequest)
    network.change("1", lambda members: readmitted(members, "3", "id-x"))
    assert network["1"].raft.progress["3"].match == 0, "what the old node held is gone"
    by_themselves(network)
    network.run(1.0)
    assert network["1"].raft.membership.voters["3"] == "id-x"
    assert network["3"].keys == ["a", "b"]
    assert not raft.is_outside


def test_nothing_of_the_old_node_is_expected_of_the_new_one() -> None:
    """What is remembered of a member's promises is remembered of a node: another one at its address has promised
    nothing, and is not taken for one that has forgotten. (Rule 9, `consensus.witness`.)"""
    ids = {"2": "id-2"}
    witnesses = Witnesses({}, ids.get)
    witnesses.add("2", Witness(term=7, floor=EntryId(6, 40)))
    assert witnesses.of("2").term == 7
    ids["2"] = "id-x"
    assert witnesses.of("2") == Witness()
    witnesses.spoke("2", 8)
    assert witnesses.of("2") == Witness(8, node="id-x")
    again = Witnesses(witnesses.facts(), {"2": "id-y"}.get)
    assert again.of("2") == Witness()
    again.spoke("3", 9)
    assert "3" not in again.facts(), "no member: nobody knows which node that is"


def test_what_led_last_is_not_said_of_the_node_that_came_in_its_place() -> None:
    """A follower knows what its leader holds for good. The leader loses its disk and comes back: reminded of that, the
    new node would take itself for an old copy, and stand aside for ever. (Found by the simulator.)"""
    network = led_by_1()
    known_nodes(network, {"1": "id-1", "2": "id-2", "3": "id-3"})
    network.propose("1", "a")
    network.run(1.0)
    network["1"].crash()
    network.elect("2")
    network.change("2", lambda members: readmitted(members, "1", "id-x"))
    network.deliver()
    for name in "23":
        assert network[name].raft.remember().of("1") == Witness()


def test_nothing_is_remembered_of_who_is_no_member_yet() -> None:
    """A follower that lags is led by a member that it does not know: its log does not tell yet which node that is. The
    member loses its disk, and the follower catches up with that too: it must not say of the new node what the old one
    has promised, as that one would stand aside for ever. (Found by the simulator.)"""
    network = by_themselves(led_by_1())
    known_nodes(network, {"1": "id-1", "2": "id-2", "3": "id-3"})
    follower = network["3"].raft
    network.isolate("3")
    network.change("1", lambda members: added(members, "4", "id-4", is_silent=False))
    network.join("4", network["1"].raft.membership)
    network.cut("3", "4")
    network.run_until(lambda: "4" in network["1"].raft.membership.voters)
    network.run(0.5)
    network.turn("1", lambda raft: raft.hand_over("4"))
    network.run_until(lambda: network["4"].raft.is_leader)
    network.heal()
    network.advance(BEAT)
    network.drop(source="4", target="3", kind=Data)
    network.deliver()
    assert follower.leader == "4"
    assert follower.membership.node_of("4") is None
    assert "4" not in follower.remember().facts()
    network.run_until(lambda: follower.membership.node_of("4") == "id-4")
    network.run(2 * BEAT)
    assert follower.remember().of("4").term == network["4"].raft.term, "heard again, and known now"
    network["4"].crash()
    network.elect("1")
    network.change("1", lambda members: readmitted(members, "4", "id-x"))
    network.deliver()
    assert follower.membership.node_of("4") == "id-x"
    assert follower.remember().of("4") == Witness()


# --- handing over -------------------------------------------------------------------------------------------------


def test_leadership_is_handed_over_without_an_election_timeout() -> None:
    """The successor gets everything first, all is committed, and it is elected although all hear their leader. (Thesis
    3.10; TRAPS 39.)"""
    network = led_by_1()
    (commit_id,) = network.propose("1", "before")
    network.turn("1", lambda raft: raft.hand_over("3"))
    began = network.now
    assert network["1"].raft.is_handing_over
    assert not network.select(kind=TimeoutNow), "3 lacks an entry, and that is not committed"
    network.deliver()
    network.run_until(lambda: network.leaders == ["3"])
    assert network.now - began <= BEAT
    assert network["1"].raft.commit_id >= commit_id
    assert not network["1"].raft.is_handing_over
    network.run(1.0)
    assert network.leaders == ["3"]


def test_successor_is_whoever_holds_most() -> None:
    """2 lags: 3 is asked to take over."""
    network = led_by_1()
    network.cut("1", "2")
    network.propose("1", "a")
    network.deliver()
    network.heal()
    assert network["1"].raft.hand_over() == "3"


def test_handing_over_to_a_dead_member_ends_and_the_leader_goes_on() -> None:
    """Nobody knows yet that 3 is dead. After an election timeout the old leader takes commands again; no term has
    passed. (Thesis 3.10; TRAPS 39.)"""
    network = led_by_1()
    network.crash("3")
    network.turn("1", lambda raft: raft.hand_over("3"))
    network.run(LOW - BEAT)
    assert network["1"].raft.is_handing_over
    with pytest.raises(AssertionError, match="keep the successor waiting"):
        network["1"].raft.propose(network["1"].disk.entries[0].command)
    assert refusal(network, "1", remove("3")) == "change_under_way"
    network.run(2 * BEAT)
    assert not network["1"].raft.is_handing_over
    network.propose("1", "after")
    network.run(1.0)
    assert network["2"].keys == ["after"]
    assert network["1"].raft.term == 1


@pytest.mark.parametrize(("to", "code"), [("9", "no_such_member"), ("4", "not_voter"), ("3", "no_successor")])
def test_handing_over_is_refused_with_a_reason(to: str, code: str) -> None:
    """To a stranger, a learner, or a voter that does not answer."""
    network = led_by_1(3, learners=1)
    network.crash("3")
    network.run(LOW + 2 * BEAT)
    with pytest.raises(ChangeRefused) as refused:
        network["1"].raft.hand_over(to)
    assert refused.value.code == code
    assert not network["1"].raft.is_handing_over


def test_single_voter_has_no_successor() -> None:
    network = Network(1, learners=1)
    network.run(1.0)
    with pytest.raises(ChangeRefused) as refused:
        network["1"].raft.hand_over()
    assert refused.value.code == "no_successor"


def test_only_the_leader_of_this_term_can_ask_to_take_over() -> None:
    """A late message, one of another member, or one to a learner changes nothing."""
    network = led_by_1(3, learners=1)
    for target, source, term in (("2", "3", 1), ("2", "1", 0), ("4", "1", 1)):
        answer = network.ask(source, target, TimeoutNow(term=term, leader=source))
        assert isinstance(answer, TimeoutNowAnswer)
        assert not answer.data
        assert network[target].raft.role is Role.FOLLOWER
        assert network[target].raft.term == 1


def test_copies_of_a_removed_member_do_not_count() -> None:
    """Its late acknowledgement is no vote for an entry. (Thesis 4.1.)"""
    network = led_by_1(3)
    network.isolate("1")
    commit_id = network.change("1", remove("3"))
    network.turn("1", lambda raft: raft.take("3", DataAnswer(data=True, term=1, match=commit_id)))
    assert network["1"].raft.commit_id < commit_id


def test_nobody_changes_two_voters_at_once() -> None:
    """The product's own guard against a defect in what makes the commands."""
    network = led_by_1()
    raft: Raft = network["1"].raft
    with pytest.raises(AssertionError, match="one at a time"):
        raft.change(MembersCommand(voters={"1": ""}))
