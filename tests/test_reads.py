"""Linearizable reads: a leader proves that it still leads before it answers (rule 7)."""

from __future__ import annotations

import pytest

from raftnode.config import Settings
from raftnode.consensus.reads import ReadRounds
from raftnode.messages import Data, DataAnswer, Heartbeat, HeartbeatAnswer
from raftnode.testing.network import CrashPoint, Network, put

LOW = Settings().election_low_ms / 1000
BEAT = Settings().heartbeat_ms / 1000


def led_by_1(size: int = 3, settings: Settings | None = None, learners: int = 0) -> Network:
    """A cluster at rest that "1" leads in term 1; its no-op is committed everywhere."""
    network = Network(size, settings=settings, learners=learners)
    network.elect("1")
    network.run(2.0)
    network.deliver()
    return network


def confirm(network: Network, peer: str, round: int, term: int = 1) -> None:
    """An answer of `peer` to a heartbeat of this round reaches the leader."""
    answer = HeartbeatAnswer(term=term, commit_id=network["1"].raft.commit_id, round=round)
    network.turn("1", lambda raft: raft.take(peer, answer))


def rounds_under_way(network: Network) -> set[int]:
    return {envelope.message.round for envelope in network.select("1", kind=Heartbeat)}


# --- a read and its round ------------------------------------------------------------------------------------------


def test_read_is_answered_after_one_round() -> None:
    """A read starts a round at once; the answers of a majority, and no time, let it go on. It shows what was committed
    when it came. (Thesis 6.4.)"""
    network = led_by_1(5)
    network.propose("1", "colour")
    network.deliver()
    network.read("1", "r")
    assert network["1"].reads.waiting == ["r"]
    network.drop(target="4")
    network.drop(target="5")
    network.deliver()
    assert network["1"].reads.answered == {"r": network["1"].raft.commit_id}


def test_read_is_not_answered_by_belief() -> None:
    """The leader hears nobody, and has not noticed yet: the read waits, and is dropped when the leadership ends.
    (Thesis 6.4; TRAPS 20.)"""
    network = led_by_1()
    network.isolate("1")
    network.read("1", "r")
    network.run(LOW - BEAT)
    assert network["1"].raft.is_leader
    assert network["1"].reads.waiting == ["r"]
    network.run(3 * BEAT)
    assert network["1"].reads.dropped == ["r"]


def test_deposed_leader_answers_nothing_old() -> None:
    """The leader is cut off, another one is elected and commits a write. A read at the old one, which still believes,
    must not be answered from its state, neither during the cut nor after it. (Thesis 6.4; TRAPS 20.)"""
    network = led_by_1()
    network.isolate("1")
    network.elect("2")
    network.propose("2", "newer")
    network.deliver()
    assert network["2"].keys == ["newer"]
    network.read("1", "stale")
    network.deliver()
    network.heal()
    network.run(2.0)
    assert network["1"].reads.answered == {}
    assert network["1"].reads.dropped == ["stale"]


def test_answer_to_an_older_heartbeat_confirms_nothing() -> None:
    """A majority's answers were under way when the read came: they left before it, and a new leader may have been
    elected in between. Only a round that starts after the read counts. (Thesis 6.4; TRAPS 20.)"""
    network = led_by_1()
    network.read("1", "first")
    network.deliver()
    (done,) = {network["1"].raft.reads.number}
    network.now += BEAT
    network.turn("1")
    assert rounds_under_way(network) == {done}, "an ordinary heartbeat"
    beats = network.select("1", kind=Heartbeat)
    for beat in beats:
        network.deliver_one(network.in_flight.index(beat))
    network.read("1", "second")
    for peer in ("2", "3"):
        confirm(network, peer, done)
    network.drop(kind=HeartbeatAnswer)
    assert network["1"].reads.waiting == ["second"]
    network.deliver()
    assert "second" in network["1"].reads.answered


def test_answer_to_a_round_that_never_began_confirms_nothing() -> None:
    """A member that answers with a round of the future has confirmed none: neither this one nor a later one. (Thesis
    6.4; TRAPS 21.)"""
    network = led_by_1()
    confirm(network, "2", 99)
    network.read("1", "r")
    network.drop()
    network.turn("1")
    assert network["1"].reads.waiting == ["r"]
    confirm(network, "2", network["1"].raft.reads.number)
    assert "r" in network["1"].reads.answered


def test_reads_share_a_round() -> None:
    """Many reads of one turn start one round; those that come while it runs share the next, and are not answered by the
    first. (Thesis 6.4; TRAPS 20.)"""
    network = led_by_1()
    before = network["1"].raft.reads.number
    for n in range(10):
        network["1"].reads.waiting.append(f"a{n}")
    network.turn("1", *[lambda raft, n=n: raft.read(f"a{n}") for n in range(10)])
    for n in range(10):
        network.read("1", f"b{n}")
    assert rounds_under_way(network) == {before + 1}
    assert len(network.select("1", kind=Heartbeat)) == 2, "one heartbeat to each"
    confirm(network, "2", before + 1)
    assert sorted(network["1"].reads.answered) == [f"a{n}" for n in range(10)]
    assert rounds_under_way(network) == {before + 1, before + 2}, "the next starts when the first is over"
    network.deliver()
    assert network["1"].reads.waiting == []
    assert network["1"].raft.reads.number == before + 2


def test_round_is_repeated_with_the_heartbeat() -> None:
    """The messages of a round are lost. The next heartbeat carries the same round, and its answers count. (Thesis
    6.4.)"""
    network = led_by_1()
    network.read("1", "r")
    network.drop()
    network.run(2 * BEAT)
    assert "r" in network["1"].reads.answered


def test_answers_of_one_member_are_one() -> None:
    """A member's answer comes again and again: in five members, leader and one other are no majority. (TRAPS 36.)"""
    network = led_by_1(5)
    network.read("1", "r")
    network.drop()
    round = network["1"].raft.reads.number
    for _ in range(5):
        confirm(network, "2", round)
    assert network["1"].reads.waiting == ["r"]
    confirm(network, "3", round)
    assert "r" in network["1"].reads.answered


def test_learners_confirm_nothing() -> None:
    """Who has no vote can't say whether a leader still leads. (Thesis 4.2.1, 6.4.)"""
    network = led_by_1(3, learners=2)
    network.read("1", "r")
    network.drop()
    round = network["1"].raft.reads.number
    confirm(network, "4", round)
    confirm(network, "5", round)
    assert network["1"].reads.waiting == ["r"]
    confirm(network, "3", round)
    assert "r" in network["1"].reads.answered


def test_acknowledged_entries_confirm_no_round() -> None:
    """An answer to entries says nothing of when the leader was confirmed: it may be older than the read. (Thesis 6.4;
    TRAPS 20.)"""
    network = led_by_1()
    network.propose("1", "colour")
    network.deliver(2)
    assert len(network.select(target="1", kind=DataAnswer)) == 2
    network.read("1", "r")
    network.drop(kind=Heartbeat)
    network.deliver()
    assert network["1"].keys == ["colour"]
    assert network["1"].reads.waiting == ["r"]


# --- before the no-op ----------------------------------------------------------------------------------------------


def test_no_reads_before_the_no_op_has_committed() -> None:
    """A new leader has all that is committed, but does not know how far that is: it may serve no read until an entry of
    its own term has committed. (Thesis 6.4; TRAPS 6, 20; etcd #7331.)"""
    network = led_by_1()
    network.cut("1", "3")
    network.propose("1", "chosen")
    network.deliver()
    assert network["1"].keys == ["chosen"]
    assert network["2"].keys == [], "2 has it and does not know that it is committed"
    network.crash("1")
    network.heal()
    network.lose_leaders()
    network.campaign("2")
    while not network["2"].raft.is_leader:
        network.deliver_one()
    raft = network["2"].raft
    assert not raft.may_serve_reads
    with pytest.raises(AssertionError, match="no reads before"):
        raft.read("too early")
    network.deliver()
    assert raft.may_serve_reads
    network.read("2", "r")
    network.deliver()
    assert network["2"].reads.answered == {"r": raft.commit_id}
    assert network["2"].keys == ["chosen"]


def test_commit_of_an_older_term_opens_no_reads() -> None:
    """The new leader knows of commits of an older term, more than one: its own no-op is what counts. (TRAPS 6; TiKV
    #9208 looked at the wrong term.)"""
    network = led_by_1()
    network.propose("1", "a", "b", "c")
    network.run(1.0)
    network.lose_leaders()
    network.campaign("2")
    while not network["2"].raft.is_leader:
        network.deliver_one()
    assert network["2"].raft.commit_id == 4
    assert not network["2"].raft.may_serve_reads


def test_followers_serve_no_linearizable_read() -> None:
    """Who does not lead can't start a round. (Thesis 6.4.)"""
    network = led_by_1()
    assert not network["2"].raft.may_serve_reads
    with pytest.raises(AssertionError, match="no reads before"):
        network["2"].raft.read("r")


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_rounds_are_never_numbered_twice() -> None:
    """The same member leads term after term: the numbers of its rounds go on, so a late answer of an older leadership
    can't be taken for one of this. (TRAPS 21; etcd #20418.)"""
    network = led_by_1()
    seen: list[int] = []
    for n in range(4):
        network.read("1", f"r{n}")
        seen.append(network["1"].raft.reads.number)
        network.drop()
        network.elect("2")
        network.elect("1")
    assert seen == sorted(set(seen))
    assert network["1"].reads.dropped == ["r0", "r1", "r2", "r3"]


def test_late_answer_of_an_older_leadership_confirms_nothing() -> None:
    """A round of term 1 was never finished. The same member leads again, with a read of its own waiting, when the
    answers of term 1 arrive. (TRAPS 21; etcd #20418.)"""
    network = led_by_1()
    network.read("1", "old")
    old = network["1"].raft.reads.number
    network.drop()
    network.elect("2")
    network.elect("1")
    term = network["1"].raft.term
    assert term > 1
    network.read("1", "new")
    network.drop()
    for peer in ("2", "3"):
        confirm(network, peer, old, term=1)
        confirm(network, peer, old + 100, term=1)
        confirm(network, peer, old, term=term)
    assert network["1"].reads.waiting == ["new"]


def test_answers_of_a_finished_round_are_ignored() -> None:
    """The slow member's answer to a round that is over arrives while the next one runs. (TRAPS 21.)"""
    network = led_by_1()
    network.read("1", "first")
    network.drop()
    first = network["1"].raft.reads.number
    confirm(network, "2", first)
    assert "first" in network["1"].reads.answered
    network.read("1", "second")
    network.drop()
    confirm(network, "3", first)
    confirm(network, "2", first)
    assert network["1"].reads.waiting == ["second"]


def test_higher_term_in_an_answer_drops_the_reads_before_it_counts() -> None:
    """The very answer that would complete the majority says that the leadership is over. (TRAPS 21; etcd
    raft#397.)"""
    network = led_by_1()
    network.read("1", "r")
    network.drop()
    confirm(network, "2", network["1"].raft.reads.number, term=2)
    assert network["1"].reads.dropped == ["r"]
    assert network["1"].reads.answered == {}


# --- what a read shows -----------------------------------------------------------------------------------------------


def test_confirmed_read_waits_until_its_commit_is_applied() -> None:
    """Much was committed before the read, and it is handed out in small batches: the read is let go only with the batch
    that contains the last of it. (Thesis 6.4; TRAPS 20.)"""
    network = led_by_1(settings=Settings(batch_bytes=1))
    raft = network["1"].raft
    commit_ids = [raft.propose(put(f"k{n}")) for n in range(5)]
    raft.ready()
    for peer in ("2", "3"):
        raft.take(peer, DataAnswer(data=True, term=1, match=commit_ids[-1]))
    assert raft.commit_id == commit_ids[-1]
    raft.read("r")
    raft.ready()
    for peer in ("2", "3"):
        raft.take(peer, HeartbeatAnswer(term=1, commit_id=1, round=raft.reads.number))
    handed_out = {}
    while raft.applied < raft.commit_id:
        ready = raft.ready()
        handed_out[ready.committed[-1].commit_id] = ready.reads
    assert handed_out.pop(commit_ids[-1]) == ["r"]
    assert handed_out
    assert not any(handed_out.values())


def test_confirmed_read_that_still_waits_is_dropped_with_the_leadership() -> None:
    """Its round is confirmed, its commit is not applied when the leadership ends: the token comes back as dropped,
    once. (TRAPS 21.)"""
    network = led_by_1(settings=Settings(batch_bytes=1))
    raft = network["1"].raft
    commit_ids = [raft.propose(put(f"k{n}")) for n in range(5)]
    raft.ready()
    for peer in ("2", "3"):
        raft.take(peer, DataAnswer(data=True, term=1, match=commit_ids[-1]))
    raft.read("r")
    raft.ready()
    for peer in ("2", "3"):
        raft.take(peer, HeartbeatAnswer(term=1, commit_id=1, round=raft.reads.number))
    raft.take("2", HeartbeatAnswer(term=7, commit_id=1))
    ready = raft.ready()
    assert (ready.reads, ready.dropped_reads) == ([], ["r"])
    while raft.applied < raft.commit_id:
        assert raft.ready().reads == []


def test_read_needs_no_write_that_came_after_it() -> None:
    """A write that was staged before the read and is not committed does not hold the read up: it is open, and the read
    may miss it. (Thesis 6.4.)"""
    network = led_by_1()
    network.propose("1", "open")
    network.read("1", "r")
    network.drop(kind=Data)
    network.deliver()
    assert network["1"].reads.answered == {"r": 1}


def test_stalled_leader_drops_its_reads() -> None:
    """A leader is stopped with a read waiting; answers pile up, another member is elected and writes. When it wakes,
    the read is dropped, whatever the old answers say. (TRAPS 18, 20; etcd #20418.)"""
    network = led_by_1()
    network.read("1", "r")
    network.deliver(2)
    network.pause("1")
    network.isolate("1")
    network.run(4.0)
    assert network.leader in ("2", "3")
    network.propose(network.leader, "newer")
    network.run(0.5)
    network.heal()
    network.resume("1")
    network.run(1.0)
    assert network["1"].reads.dropped == ["r"]
    assert network["1"].keys == ["newer"]


def test_cluster_of_one_confirms_itself() -> None:
    """The only voter is its own majority: a read needs no message and no wait. (Thesis 6.4; TRAPS, etcd, N=1.)"""
    network = Network(1)
    network.turn("1")
    network.propose("1", "colour")
    network.read("1", "r")
    assert network["1"].reads.answered == {"r": 2}
    assert not network.in_flight


def test_cluster_of_one_answers_nothing_before_its_first_write() -> None:
    """It leads as soon as it runs, but knows what is committed only when its no-op is on disk. (TRAPS 6, N=1.)"""
    network = Network(1)
    network.crash("1", CrashPoint.BEFORE_WRITE)
    seen: list[bool] = []
    network.turn("1", lambda raft: raft.tick(), lambda raft: seen.append(raft.may_serve_reads))
    assert seen == [False]


# --- the rounds by themselves ----------------------------------------------------------------------------------------


def test_read_rounds_keep_their_own_rules() -> None:
    """No round without a read, one at a time, and each read comes back exactly once. (Thesis 6.4.)"""
    rounds = ReadRounds()
    assert not rounds.start()
    rounds.add("a", 5)
    assert rounds.start()
    rounds.add("b", 6)
    assert not rounds.start(), "one runs"
    assert rounds.confirm(0) == []
    assert rounds.confirm(1) == [(5, "a")]
    assert rounds.confirm(1) == [], "it is over"
    assert rounds.start()
    rounds.add("c", 7)
    assert rounds.drop() == ["b", "c"]
    assert rounds.confirm(2) == []
    assert rounds.drop() == []
    assert not rounds.start()
    assert rounds.number == 2


# --- answers that change nothing ------------------------------------------------------------------------------------


def test_answers_that_change_nothing_may_wait() -> None:
    """A leader of three has its majority with the first answer; the second one is no reason for a turn. So the first
    answer to a round may not wait while a read does, and the second may; the same for copies of an entry. What a member
    still lacks does not wait either, nor does a refusal, or what comes from another term. (rule 7.)"""
    network = led_by_1()
    raft, commit_id = network["1"].raft, network["1"].raft.commit_id

    network.read("1", "r")
    network.deliver(2)
    first, second = network.select(target="1", kind=HeartbeatAnswer)
    assert not raft.may_wait(first.source, first.message)
    network.deliver(1)
    assert network["1"].reads.answered == {"r": commit_id}
    assert raft.may_wait(second.source, second.message)
    assert not raft.may_wait("3", HeartbeatAnswer(term=2, commit_id=commit_id, round=1))
    assert not raft.may_wait("3", HeartbeatAnswer(term=1, commit_id=0, round=1)), "it may have been restarted"
    network.deliver()

    network.propose("1", "colour")
    network.deliver(2)
    first, second = network.select(target="1", kind=DataAnswer)
    assert not raft.may_wait(first.source, first.message)
    network.deliver(1)
    assert raft.commit_id == commit_id + 1
    assert raft.may_wait(second.source, second.message)
    assert not raft.may_wait("3", DataAnswer(data=False, term=1, commit_id=commit_id, asked=commit_id, reason="gap"))
    network.propose("1", "shape")
    assert not raft.may_wait(second.source, second.message), "there is something to send to it"
