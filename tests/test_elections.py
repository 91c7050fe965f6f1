"""Who leads, and how the members come to agree on it: ballots, votes, pre-votes, timers (rules 1-3)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from raftnode.config import Role, Settings
from raftnode.consensus.ballot import Ballot
from raftnode.messages import GENESIS, Data, EntryId, Heartbeat, HeartbeatAnswer, Staged, VoteAnswer, VoteRequest
from raftnode.testing.network import CrashPoint, Envelope, Network

LOW = Settings().election_low_ms / 1000
HIGH = Settings().election_high_ms / 1000
BEAT = Settings().heartbeat_ms / 1000


def vote_request(candidate: str, term: int, last: EntryId = GENESIS, *, pre_vote: bool = False) -> VoteRequest:
    staged = Staged(address=candidate, term=last.term, commit_id=last.commit_id)
    return VoteRequest(term=term, commit_id=0, staged=staged, pre_vote=pre_vote)


def ask_vote(network: Network, voter: str, candidate: str, term: int, last: EntryId = GENESIS) -> VoteAnswer:
    """`candidate` asks `voter`; what the voter says."""
    answer = network.ask(candidate, voter, vote_request(candidate, term, last))
    assert isinstance(answer, VoteAnswer)
    return answer


def ask_pre_vote(network: Network, voter: str, candidate: str, term: int, last: EntryId = GENESIS) -> VoteAnswer:
    answer = network.ask(candidate, voter, vote_request(candidate, term, last, pre_vote=True))
    assert isinstance(answer, VoteAnswer)
    return answer


def real_votes(network: Network) -> list[Envelope]:
    """The vote requests under way that are no pre-votes."""
    return [envelope for envelope in network.select(kind=VoteRequest) if not envelope.message.pre_vote]


def campaign_moment(network: Network, name: str) -> float:
    """How long from now until `name` campaigns by itself, when it hears nothing any more."""
    start = network.now
    while network[name].raft.role is Role.FOLLOWER:
        assert network.now < start + 2 * HIGH, f"{name} never campaigns"
        network.now += 0.005
        network.turn(name)
    return network.now - start


# --- rule 1: the ballot is on disk before anyone hears of it -----------------------------------------------------


def test_voter_that_dies_before_its_ballot_is_written_has_said_nothing() -> None:
    """A vote is asked for, and the voter dies in the turn that takes the request. No answer may have left, and when it
    comes back, its vote is free. (Thesis 3.8; TRAPS 1.)"""
    network = Network(3)
    network.crash("2", CrashPoint.BEFORE_WRITE)
    network.turn("2", lambda raft: raft.step("1", vote_request("1", 1)))
    assert not network.in_flight
    network.restart("2")
    assert network["2"].raft.ballot == Ballot(0, None)
    assert ask_vote(network, "2", "3", 1).data


def test_voter_that_dies_after_its_ballot_is_written_remembers_it() -> None:
    """The voter dies when its ballot is on disk and its answer is not yet sent. Back again, it refuses the vote to
    another candidate of that term, and grants it to the same one, whose answer was lost. (Thesis 3.8; TRAPS 1,
    4.)"""
    network = Network(3)
    network.crash("2", CrashPoint.AFTER_WRITE)
    network.turn("2", lambda raft: raft.step("1", vote_request("1", 1)))
    assert not network.in_flight
    network.restart("2")
    assert not ask_vote(network, "2", "3", 1).data
    assert ask_vote(network, "2", "1", 1).data


def test_vote_in_a_term_that_is_known_already_is_written_too() -> None:
    """The voter has gone to the term before, for a candidate that it refused. Now it votes in it: the term on its disk
    is the same, the vote is new, and it must not be forgotten. (Thesis 3.8; TRAPS 1.)"""
    network = Network(3)
    network.give_log("2", 1, 1)
    assert not ask_vote(network, "2", "3", 7).data
    assert network["2"].disk.ballot == Ballot(7, None)
    assert ask_vote(network, "2", "1", 7, EntryId(1, 2)).data
    assert network["2"].disk.ballot == Ballot(7, "1")
    network.crash("2")
    network.restart("2")
    assert not ask_vote(network, "2", "3", 7, EntryId(6, 9)).data


@pytest.mark.parametrize("point", [CrashPoint.BEFORE_WRITE, CrashPoint.AFTER_WRITE])
def test_candidate_asks_for_votes_only_when_its_own_is_on_disk(point: CrashPoint) -> None:
    """The candidate dies in the turn in which it has won the pre-vote and gone to the new term: no vote request of
    that term is under way, wherever in the turn it died. (Thesis 3.8; TRAPS 1.)"""
    network = Network(3)
    network.campaign("1")
    network.crash("1", point)
    network.deliver()
    assert not network["1"].is_up
    assert not real_votes(network)
    assert network["1"].disk.ballot == (Ballot(1, "1") if point is CrashPoint.AFTER_WRITE else Ballot(0, None))


def test_terms_survive_the_restart_of_everyone() -> None:
    """All members die and come back: no term is used twice, as each remembers the one that it was in. (Thesis 3.8;
    TRAPS 1.)"""
    network = Network(3)
    network.elect("1")
    network.propose("1", "kept")
    network.run(0.5)
    for name in network.members:
        network.crash(name)
    for name in network.members:
        network.restart(name)
    assert {member.raft.term for member in network.members.values()} == {1}
    network.run_until(lambda: bool(network.leaders))
    assert network[network.leader].raft.term > 1
    network.run(0.5)
    assert all(member.keys == ["kept"] for member in network.members.values())


def test_refusal_in_a_new_term_waits_for_the_ballot_too() -> None:
    """A request of a higher term raises the voter's term even when the vote is refused, and the refusal tells that
    term: it must not leave before the term is on disk. (Thesis 3.3; TRAPS 1.)"""
    network = Network(3)
    network.give_log("2", 1, 1)
    network.crash("2", CrashPoint.BEFORE_WRITE)
    network.turn("2", lambda raft: raft.step("3", vote_request("3", 7)))
    assert not network.in_flight
    network.restart("2")
    assert network["2"].raft.term == 1
    answer = ask_vote(network, "2", "3", 7)
    assert (answer.data, answer.term) == (False, 7)
    assert network["2"].disk.ballot == Ballot(7, None)


# --- rule 2: one vote a term, for a log at least as up to date -----------------------------------------------------


def test_one_vote_a_term() -> None:
    """The first candidate to ask gets the vote of the term, a second one does not; the first may ask again, as its
    answer may be lost; in a higher term the vote is free. (Thesis 3.4; TRAPS 4.)"""
    network = Network(3)
    assert ask_vote(network, "3", "1", 1).data
    assert not ask_vote(network, "3", "2", 1).data
    assert ask_vote(network, "3", "1", 1).data, "the same candidate may ask again"
    assert ask_vote(network, "3", "2", 2).data


def test_candidate_votes_for_itself_only() -> None:
    """Two members campaign in one term: neither gives its vote to the other. (Thesis 3.4.)"""
    network = Network(2)
    network.campaign("1")
    network.campaign("2")
    while not real_votes(network):
        network.deliver_one()
    network.deliver(4)
    assert {member.raft.ballot for member in network.members.values()} == {Ballot(1, "1"), Ballot(1, "2")}
    assert not network.leaders


def test_request_of_an_older_term_is_refused_with_the_newer_term() -> None:
    """Whatever its log: a candidate of a term gone by is told the term, and does not get the vote. (Thesis 3.3.)"""
    network = Network(3)
    ask_vote(network, "2", "3", 5)
    answer = ask_vote(network, "2", "1", 4, EntryId(4, 100))
    assert (answer.data, answer.term) == (False, 5)
    assert network["2"].disk.ballot == Ballot(5, "3")


@pytest.mark.parametrize(
    ("last", "granted"),
    [
        (EntryId(2, 3), True),  # the same log
        (EntryId(2, 4), True),  # longer
        (EntryId(3, 1), True),  # shorter, but a newer term counts first
        (EntryId(2, 2), False),  # shorter
        (EntryId(1, 9), False),  # longer, but of an older term
        (EntryId(0, 0), False),  # empty
    ],
)
def test_vote_only_for_a_log_at_least_as_up_to_date(last: EntryId, granted: bool) -> None:
    """The voter's log ends with entry 3 of term 2. Terms are compared first, positions after; pre-votes obey the same
    rule. (Thesis 3.6.1; TRAPS 3.)"""
    network = Network(3)
    network.give_log("1", 1, 2, 2)
    assert ask_pre_vote(network, "1", "2", 5, last).data is granted
    assert ask_vote(network, "1", "2", 5, last).data is granted


def test_staged_entries_count_for_the_vote_too() -> None:
    """An entry that is staged, not known to be committed, may be committed without this voter knowing: a candidate
    without it must not win. (Thesis 3.6.1; TRAPS 3.)"""
    network = Network(3)
    network.elect("1")
    network.run(0.5)
    network.cut("1", "3")
    network.propose("1", "chosen")
    network.deliver()
    network.crash("1")
    assert network["2"].log[-1].commit_id > network["2"].raft.commit_id, "staged at 2 only"
    network["2"].raft.suspect("1")
    network.campaign("3")
    network.deliver()
    assert not network.leaders, "3 lacks what the leader has committed"
    network.elect("2")
    network.run(0.5)
    assert network["3"].keys == ["chosen"]


def test_votes_of_one_voter_count_once() -> None:
    """Answers may come twice. In five members, two votes are no majority however often they arrive. (TRAPS 8,
    36.)"""
    network = Network(5)
    network.campaign("1")
    network.deliver(4)
    assert len(network.select(target="1", kind=VoteAnswer)) == 4, "all have said yes, and none of it has arrived"
    for _ in range(5):
        network.turn("1", lambda raft: raft.take("2", VoteAnswer(data=True, term=1, pre_vote=True)))
    assert network["1"].raft.role is Role.PRE_CANDIDATE
    network.turn("1", lambda raft: raft.take("3", VoteAnswer(data=True, term=1, pre_vote=True)))
    assert network["1"].raft.role is Role.CANDIDATE
    for _ in range(5):
        network.turn("1", lambda raft: raft.take("2", VoteAnswer(data=True, term=1)))
    assert network["1"].raft.role is Role.CANDIDATE


def test_pre_votes_are_no_votes() -> None:
    """Granted pre-votes that arrive late, when the candidate is in its new term already, do not make it leader.
    (Thesis 9.6.)"""
    network = Network(5)
    network.campaign("1")
    network.deliver(4)
    assert len(network.select(target="1", kind=VoteAnswer)) == 4
    network.deliver(4)
    assert network["1"].raft.role is Role.CANDIDATE, "two of the four pre-votes came after it had won"
    network.turn("1", lambda raft: raft.take("2", VoteAnswer(data=True, term=2, pre_vote=True)))
    assert network["1"].raft.role is Role.CANDIDATE
    assert network["1"].raft.term == 1


def test_vote_of_an_earlier_campaign_does_not_count() -> None:
    """A vote that was granted for term 1 arrives when the candidate asks for votes in term 2: it counts for nothing.
    (TRAPS 36.)"""
    network = Network(3)
    network.campaign("1")
    network.deliver(3)
    assert network["1"].raft.role is Role.CANDIDATE
    network.drop()
    network.campaign("1")
    network.deliver(3)
    assert (network["1"].raft.role, network["1"].raft.term) == (Role.CANDIDATE, 2)
    network.turn("1", lambda raft: raft.take("2", VoteAnswer(data=True, term=1)))
    assert network["1"].raft.role is Role.CANDIDATE


def test_split_vote_is_resolved_by_the_next_time_out() -> None:
    """Four members, two candidates, two votes each: nobody leads that term, and as every timer is drawn anew, one
    soon leads a later term. (Thesis 3.4; TRAPS 18.)"""
    network = Network(4)
    network.campaign("1")
    network.campaign("2")
    while pre_votes := [n for n, envelope in enumerate(network.in_flight) if envelope.message.pre_vote]:
        network.deliver_one(pre_votes[0])
    for candidate, voter in (("1", "3"), ("2", "4")):
        network.deliver_one(network.in_flight.index(network.select(candidate, voter)[0]))
    network.deliver()
    votes = {name: member.raft.ballot.voted_for for name, member in network.members.items()}
    assert votes == {"1": "1", "2": "2", "3": "1", "4": "2"}
    assert not network.leaders
    network.run_until(lambda: bool(network.leaders), seconds=8 * HIGH)
    assert network[network.leader].raft.term >= 2


# --- rule 3: pre-vote and check-quorum --------------------------------------------------------------------------


def test_pre_vote_changes_no_term() -> None:
    """Asking for pre-votes, granting and refusing them leaves every ballot alone, on disk and in memory. (Thesis 9.6;
    TRAPS 13.)"""
    network = Network(3)
    writes = {name: member.disk.writes for name, member in network.members.items()}
    network.campaign("1")
    network.deliver(2)
    answer = ask_pre_vote(network, "2", "3", 9)
    assert (answer.data, answer.term) == (True, 9), "a granted pre-vote carries the term that was asked for"
    answer = ask_pre_vote(network, "2", "3", 0)
    assert (answer.data, answer.term) == (False, 0), "a refused one carries the voter's own"
    assert {member.raft.ballot for member in network.members.values()} == {Ballot()}
    assert writes == {name: member.disk.writes for name, member in network.members.items()}


def test_pre_votes_are_granted_to_more_than_one() -> None:
    """A pre-vote says only how this node would vote, so it may be granted to everyone who has the log for it. (Thesis
    9.6.)"""
    network = Network(3)
    assert ask_pre_vote(network, "1", "2", 1).data
    assert ask_pre_vote(network, "1", "3", 1).data


def test_member_cut_off_for_long_comes_back_in_its_old_term() -> None:
    """One member hears nobody for many election timeouts and campaigns all the while; when it comes back, terms are as
    they were, and so is the leader. (Thesis 9.6; TRAPS 13, 14.)"""
    network = Network(3)
    network.elect("1")
    network.run(0.5)
    network.isolate("3")
    network.run(20 * HIGH)
    assert network["3"].raft.role is Role.PRE_CANDIDATE
    assert network["3"].raft.term == 1
    network.heal()
    network.run(HIGH)
    assert (network.leaders, network["1"].raft.term) == (["1"], 1)
    assert network["3"].raft.leader == "1"


@pytest.mark.parametrize("voter", ["1", "2"])
def test_disruption_is_ignored(voter: str) -> None:
    """A removed or half-connected node with the newest log and a high term asks for votes and pre-votes: the leader,
    and a follower that hears it, refuse without changing their term, and go on. (Thesis 4.2.3; TRAPS 14.)"""
    network = Network(3)
    network.elect("1")
    network.run(0.5)
    last = EntryId(50, 50)
    assert not ask_pre_vote(network, voter, "3", 100, last).data
    answer = ask_vote(network, voter, "3", 100, last)
    assert (answer.data, answer.term) == (False, 1)
    assert network[voter].raft.ballot == Ballot(1, "1")
    network.propose("1", "going on")
    network.run(0.5)
    assert network["2"].keys == ["going on"]


def test_voter_that_has_not_heard_a_leader_for_the_least_timeout_helps_to_replace_it() -> None:
    """Just short of the least election timeout it refuses, just past it it grants. (Thesis 4.2.3; TRAPS 13, 14.)"""
    network = Network(3, settings=Settings(election_high_ms=100_000))
    network.elect("1")
    network.in_flight.clear()
    last = EntryId(1, 1)
    network.advance(LOW - 0.01)
    assert not ask_pre_vote(network, "2", "3", 2, last).data
    network.advance(0.02)
    assert ask_pre_vote(network, "2", "3", 2, last).data
    assert ask_vote(network, "2", "3", 2, last).data


def test_leader_without_a_majority_steps_down() -> None:
    """The leader is alone on its side of a cut: after an election timeout it leads no more, in the same term. (Thesis
    6.2; TRAPS 15.)"""
    network = Network(5)
    network.elect("1")
    network.run(0.5)
    network.isolate("1", "2")
    network.run(LOW - BEAT)
    assert network["1"].raft.is_leader
    network.run(3 * BEAT)
    assert not network["1"].raft.is_leader
    assert network["1"].raft.term == 1


def test_leader_that_sends_but_cannot_hear_steps_down() -> None:
    """Answers to the leader are lost while its heartbeats arrive: the others would follow it for ever and could commit
    nothing. It gives up, and somebody else is elected. (Thesis 6.2; TRAPS 15.)"""
    network = Network(3)
    network.elect("1")
    network.run(0.5)
    network.cut("2", "1", both=False)
    network.cut("3", "1", both=False)
    network.run(LOW + 2 * BEAT)
    assert not network["1"].raft.is_leader
    network.run_until(lambda: network.leaders in (["2"], ["3"]))


def test_leader_with_just_a_majority_stays() -> None:
    """Two of five are gone for long: the three that are left are a majority, and nothing changes. (Thesis 6.2.)"""
    network = Network(5)
    network.elect("1")
    network.crash("4")
    network.crash("5")
    network.run(10 * HIGH)
    assert (network.leaders, network["1"].raft.term) == (["1"], 1)


def test_new_leader_grants_everyone_an_election_timeout() -> None:
    """A member that has just been elected has heard nobody as a leader yet: check-quorum counts from its election.
    (Thesis 6.2.)"""
    network = Network(3)
    network.run(5.0)
    network.elect(network.leader)
    network.in_flight.clear()
    network.advance(LOW / 2)
    assert network.leaders


def test_member_at_a_higher_term_is_freed() -> None:
    """A member got to a higher term (its candidacy was cut off). It can't be elected, as the others hear their leader,
    and must not stay outside for ever: it answers the leader's heartbeat with its own term, the leader steps down, and
    an election takes it in. (TRAPS 16.)"""
    network = Network(3)
    network.elect("1")
    network.propose("1", "kept")
    network.run(0.5)
    network.crash("3")
    network["3"].disk.ballot = Ballot(9, "3")
    network.restart("3")
    answer = network.ask("1", "3", Heartbeat(term=1, leader="1", commit_id=0, round=1))
    assert isinstance(answer, HeartbeatAnswer)
    assert answer.term == 9
    assert network["3"].raft.leader is None, "a leader of an older term is not followed"
    network.run_until(lambda: bool(network.leaders) and network[network.leader].raft.term > 9)
    network.run(1.0)
    assert {member.raft.leader for member in network.members.values()} == {network.leader}
    assert network["3"].keys == ["kept"]


def test_pre_candidate_of_an_older_term_is_told_the_newer_one() -> None:
    """The one member with the newest log is in an older term than the others, who can't win without it. Its pre-vote
    is of a term gone by for them, yet it must be answered, with their term: so it can ask again. (TRAPS 13; the
    deadlock that etcd describes.)"""
    network = Network(3)
    for name in ("2", "3"):
        network.crash(name)
        network[name].disk.ballot = Ballot(7, None)
        network.restart(name)
    network.give_log("1", 1, 1)
    network.campaign("1")
    network.deliver()
    assert network["1"].raft.term == 7
    network.crash("3")
    network.run_until(lambda: network.leaders == ["1"])
    assert network["1"].raft.term > 7


# --- who follows whom ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["heartbeat", "data"])
def test_candidate_follows_the_leader_of_its_term(kind: str) -> None:
    """A candidate that hears a leader of its own term has lost the election and follows. (Thesis 3.4.)"""
    network = Network(3)
    network.campaign("1")
    network.deliver(3)
    assert network["1"].raft.role is Role.CANDIDATE
    if kind == "heartbeat":
        network.ask("2", "1", Heartbeat(term=1, leader="2", commit_id=0))
    else:
        network.ask("2", "1", Data(action="commit", term=1, leader="2", previous=GENESIS))
    assert (network["1"].raft.role, network["1"].raft.leader) == (Role.FOLLOWER, "2")
    assert network["1"].raft.ballot == Ballot(1, "1"), "its vote of this term stays its own"


def test_leader_of_an_older_term_is_not_followed() -> None:
    """What a deposed leader still sends is refused with the newer term, does not count as a leader's sign of life, and
    does not start the timer anew. (Thesis 3.3; TRAPS 18.)"""
    network = Network(3)
    ask_vote(network, "2", "3", 4)
    due = network["2"].raft._election_due
    network.now += LOW / 2
    answer = network.ask("1", "2", Heartbeat(term=3, leader="1", commit_id=0))
    assert answer.term == 4
    answer = network.ask("1", "2", Data(action="commit", term=3, leader="1", previous=GENESIS))
    assert (answer.data, answer.term) == (False, 4)
    assert network["2"].raft.leader is None
    assert network["2"].raft._election_due == due


def test_leader_that_hears_of_a_higher_term_steps_down() -> None:
    """Whatever kind of answer carries it, a higher term ends a leadership, and the term is on disk. (Thesis 3.3.)"""
    for answer in (
        HeartbeatAnswer(term=5, commit_id=0),
        VoteAnswer(data=False, term=5),
        VoteAnswer(data=False, term=5, pre_vote=True),
    ):
        network = Network(3)
        network.elect("1")
        network.turn("1", lambda raft, answer=answer: raft.take("2", answer))
        assert not network["1"].raft.is_leader
        assert network["1"].disk.ballot == Ballot(5, None)


def test_two_leaders_of_one_term_never_lead_at_once() -> None:
    """A leader is cut off and another one elected. When the cut heals while the old one still believes, the first
    message between them settles it, in favour of the higher term. (Thesis 3.3, 3.4.)"""
    network = Network(3)
    network.elect("1")
    network.run(0.5)
    network.isolate("1")
    network.elect("2")
    assert network.leaders == ["1", "2"], "each in its own term, checked by the invariants"
    network.heal()
    network.run(2 * BEAT)
    assert network.leaders == ["2"]
    assert network["1"].raft.leader == "2"


def test_all_roads_back_to_one_leader() -> None:
    """Members that die one after the other, the leader each time: while a majority is up, somebody leads soon, each
    time in a higher term. (Thesis 3.9.)"""
    network = Network(5)
    terms = []
    for _ in range(6):
        network.run_until(lambda: bool(network.leaders), seconds=6 * HIGH)
        terms.append(network[network.leader].raft.term)
        down = network.leader
        network.crash(down)
        network.run(1.0)
        network.restart(down)
    assert terms == sorted(set(terms))


# --- timers --------------------------------------------------------------------------------------------------------


def test_time_outs_are_drawn_anew_from_the_whole_range() -> None:
    """Every start of the timer draws a new time-out between low and high, so that two members that have split a vote do
    not split the next. (Thesis 3.4; TRAPS 18.)"""
    network = Network(3)
    drawn = set()
    for _ in range(30):
        network.ask("1", "2", Heartbeat(term=1, leader="1", commit_id=0))
        drawn.add(network["2"].raft._election_due - network.now)
    assert len(drawn) == 30
    assert LOW - 1e-9 <= min(drawn) < LOW + 0.2
    assert HIGH - 0.2 < max(drawn) <= HIGH + 1e-9


def test_silent_follower_campaigns_between_the_least_and_the_most() -> None:
    """Nothing is heard any more: the follower campaigns, neither before the least time-out nor after the most. (Thesis
    3.4.)"""
    for seed in range(10):
        network = Network(3, seed)
        network.ask("1", "2", Heartbeat(term=1, leader="1", commit_id=0))
        assert LOW <= campaign_moment(network, "2") <= HIGH + 0.01


def _heartbeat(network: Network) -> None:
    network.ask("1", "2", Heartbeat(term=1, leader="1", commit_id=0))


def _data(network: Network) -> None:
    network.ask("1", "2", Data(action="commit", term=1, leader="1", previous=GENESIS))


def _granted_vote(network: Network) -> None:
    assert ask_vote(network, "2", "3", 2).data


def _refused_vote(network: Network) -> None:
    assert not ask_vote(network, "2", "3", 1).data


def _granted_pre_vote(network: Network) -> None:
    assert ask_pre_vote(network, "2", "3", 2).data


def _answer(network: Network) -> None:
    network.turn("2", lambda raft: raft.take("1", HeartbeatAnswer(term=1, commit_id=0)))


@pytest.mark.parametrize(
    ("event", "starts_anew"),
    [
        (_heartbeat, True),
        (_data, True),
        (_granted_vote, True),
        (_refused_vote, False),
        (_granted_pre_vote, False),
        (_answer, False),
    ],
)
def test_what_starts_the_timer_anew(event: Callable[[Network], None], starts_anew: bool) -> None:
    """Only a granted vote and a message of the current leader start the election timer anew. A refused vote does not:
    a candidate that can never win would keep the others from trying. (Thesis 3.4; TRAPS 18; published interface.)"""
    network = Network(3)
    ask_vote(network, "2", "1", 1)
    due = network["2"].raft._election_due
    network.now += LOW / 2
    event(network)
    assert (network["2"].raft._election_due != due) is starts_anew


def test_vote_refused_in_a_new_term_does_not_postpone_the_own_election() -> None:
    """The candidate's term is higher, so the voter goes to that term; but its log is older, so it gets no vote, and the
    voter's own election, which can be won, comes no later for it. (Thesis 3.4; TRAPS 18; published interface.)"""
    network = Network(3)
    network.give_log("2", 1, 1)
    due = network["2"].raft._election_due
    network.now += LOW / 2
    assert not ask_vote(network, "2", "3", 3).data
    assert network["2"].raft.term == 3
    assert network["2"].raft._election_due == due
    assert campaign_moment(network, "2") <= due - LOW / 2 + 0.01


def test_stalled_follower_starts_its_timer_anew_instead_of_campaigning() -> None:
    """A follower did not run for longer than an election timeout (SIGSTOP, a slow disk). Its timer has run out, but the
    silence was its own: it listens first. (TRAPS 18.)"""
    network = Network(3)
    network.elect("1")
    network.run(0.5)
    network.pause("2")
    network.run(5.0)
    network.in_flight.clear()
    network.resume("2")
    network.turn("2")
    assert network["2"].raft.role is Role.FOLLOWER
    assert network["2"].raft._election_due >= network.now + LOW
    network.run(1.0)
    assert network.leaders == ["1"]


def test_stalled_leader_steps_down() -> None:
    """A leader did not run for longer than an election timeout: another may have been elected, so it confirms nothing
    and takes no write in the old belief. (TRAPS 18, 19.)"""
    network = Network(3)
    network.elect("1")
    network.run(0.5)
    network.pause("1")
    network.now += LOW + 0.01
    network.resume("1")
    assert network.propose("1", "too late") == []
    assert network["1"].raft.role is Role.FOLLOWER
    assert network["1"].raft.leader is None
    assert network["1"].raft._election_due >= network.now + LOW


def test_short_stall_changes_nothing() -> None:
    """A pause shorter than the least election timeout is nothing to be afraid of. (TRAPS 18.)"""
    network = Network(3)
    network.elect("1")
    network.run(0.5)
    network.pause("1")
    network.now += LOW - 0.2
    network.resume("1")
    network.propose("1", "in time")
    network.run(0.5)
    assert network.leaders == ["1"]
    assert network["3"].keys == ["in time"]


def test_cluster_of_one_is_not_impressed_by_a_stall() -> None:
    """There is nobody who could have been elected meanwhile. (TRAPS 18.)"""
    network = Network(1)
    network.turn("1")
    network.now += 60.0
    network.propose("1", "later")
    assert network["1"].keys == ["later"]


def test_time_never_goes_back() -> None:
    """A clock that is handed in older than before is taken as no time passed. (TRAPS 18.)"""
    network = Network(3)
    network.run(0.5)
    network["1"].raft.clock(0.1)
    assert network["1"].raft.deadline() >= 0.5


def test_deadline_is_the_next_thing_to_do() -> None:
    """The driver sleeps until `deadline`: a leader's next heartbeat; a follower's time-out, or a heartbeat at most, so
    that a node that sleeps is not taken for one that was stopped. (package docstring.)"""
    network = Network(3)
    network.elect("1")
    assert network["1"].raft.deadline() == pytest.approx(network.now + BEAT)
    assert network["2"].raft.deadline() == pytest.approx(network.now + BEAT)
    network.in_flight.clear()
    due = network["2"].raft._election_due
    while network["2"].raft.role is Role.FOLLOWER:
        network.now = network["2"].raft.deadline()
        network.turn("2")
    assert network.now == pytest.approx(due)


def test_timer_may_be_started_anew_from_outside() -> None:
    """The driver was busy before its first turn: it starts the timer anew. A cluster of one waits for nobody. (TRAPS
    18.)"""
    network = Network(3)
    network.now += 0.7
    network["2"].raft.clock(network.now)
    network["2"].raft.rearm()
    assert LOW - BEAT <= campaign_moment(network, "2") <= HIGH + 0.01
    network = Network(1)
    network["1"].raft.rearm()
    network.turn("1")
    assert network.leaders == ["1"]


# --- suspicion -------------------------------------------------------------------------------------------------------


def test_leader_that_dies_is_replaced_within_a_few_heartbeats() -> None:
    """A process that dies has its connections cut at once. Its followers then need not wait for a whole time-out:
    pre-vote makes it safe to try. (Thesis 9.6.)"""
    network = Network(3)
    network.elect("1")
    network.run(0.5)
    network.crash("1")
    for name in ("2", "3"):
        network.turn(name, lambda raft: raft.suspect("1"))
    network.run(3 * BEAT)
    assert len(network.leaders) == 1


@pytest.mark.parametrize("seed", range(50))
def test_followers_that_campaign_at_once_soon_try_again(seed: int) -> None:
    """Both followers see at the same moment that the leader has died, campaign in that moment, and each votes for
    itself. Nobody waits for a whole time-out then: one of them leads long before the shortest one is over. From 50
    seeds. (Thesis 3.4.)"""
    network = Network(3, seed=seed)
    network.elect("1")
    network.run(0.5)
    network.crash("1")
    before = network.now
    for name in ("2", "3"):
        network.turn(name, lambda raft: raft.suspect("1"), lambda raft: raft.campaign())
    while not network.leaders:
        network.run(0.01)
    assert network[network.leaders[0]].raft.term > 2, "the votes were split in the first term"
    assert network.now - before < LOW


def test_suspicion_of_one_follower_deposes_nobody() -> None:
    """One follower loses its connection to the leader, while the others hear it: its pre-vote is refused, and nothing
    changes. (Thesis 9.6; TRAPS 14.)"""
    network = Network(3)
    network.elect("1")
    network.run(0.5)
    network.cut("1", "3")
    network.turn("3", lambda raft: raft.suspect("1"))
    network.run(2.0)
    assert (network.leaders, network["1"].raft.term) == (["1"], 1)
    network.heal()
    network.run(2 * BEAT)
    assert network["3"].raft.leader == "1"


def test_suspicion_passes_when_the_leader_is_heard_again() -> None:
    """Only the connection was cut: the leader's next message over a new one makes it the leader as before, and a
    pre-vote is refused again. (Thesis 4.2.3.)"""
    network = Network(3)
    network.elect("1")
    network.run(0.5)
    network.turn("2", lambda raft: raft.suspect("1"))
    assert ask_pre_vote(network, "2", "3", 2, EntryId(1, 1)).data
    network.turn("2", lambda raft: raft.step("1", Heartbeat(term=1, leader="1", commit_id=1)))
    assert not ask_pre_vote(network, "2", "3", 2, EntryId(1, 1)).data
    network.run(0.5)
    assert network.leaders == ["1"]


def test_only_the_leader_is_suspected() -> None:
    """The connection to a follower was cut: this says nothing of the leader. (rule 3.)"""
    network = Network(3)
    network.elect("1")
    network.run(0.5)
    due = network["2"].raft._election_due
    network["2"].raft.suspect("3")
    network["1"].raft.suspect("1")
    assert network["2"].raft._election_due == due
    assert not ask_pre_vote(network, "2", "3", 2, EntryId(1, 1)).data
    assert network["1"].raft.is_leader


# --- a cluster of one ------------------------------------------------------------------------------------------------


def test_cluster_of_one_leads_in_its_first_turn() -> None:
    """There is nobody to wait for or to ask; its ballot is written all the same. (TRAPS, etcd, the suite with N=1.)"""
    network = Network(1)
    network.turn("1")
    assert network.leaders == ["1"]
    assert network["1"].disk.ballot == Ballot(1, "1")
    assert network["1"].log == [EntryId(1, 1)]
    assert not network.in_flight


def test_cluster_of_one_leads_again_after_a_crash_anywhere() -> None:
    """It dies before and after its first write, and later: each time it leads again at once, in a term of its own.
    (TRAPS, etcd.)"""
    network = Network(1)
    for point in (CrashPoint.BEFORE_WRITE, CrashPoint.AFTER_WRITE):
        network.crash("1", point)
        network.turn("1")
        assert not network["1"].is_up
        network.restart("1")
    network.turn("1")
    assert network["1"].raft.is_leader
    assert network["1"].raft.term == 2, "the ballot of the first write counts, that of the lost one does not"


# --- the ballot ------------------------------------------------------------------------------------------------------


def test_ballot_keeps_its_own_rules() -> None:
    """The term only rises, and the vote of a term is given once. (Thesis 3.4.)"""
    ballot = Ballot(3, None).vote("a")
    assert ballot == Ballot(3, "a")
    assert ballot.vote("a") == ballot
    assert ballot.may_vote_for("a")
    assert not ballot.may_vote_for("b")
    with pytest.raises(AssertionError, match="one vote a term"):
        ballot.vote("b")
    with pytest.raises(AssertionError, match="may only rise"):
        ballot.in_term(3)
    assert ballot.in_term(4) == Ballot(4, None)
