"""How entries get from the leader to the others, and when they are committed (rules 4-6)."""

from __future__ import annotations

import random
from itertools import pairwise

import msgspec
import pytest

from raftnode.config import Settings
from raftnode.messages import (
    GENESIS,
    Data,
    DataAnswer,
    Entry,
    EntryId,
    Heartbeat,
    HeartbeatAnswer,
    Noop,
    chain,
    decode_command,
)
from raftnode.testing.network import CrashPoint, Envelope, Network, history, put

LOW = Settings().election_low_ms / 1000
BEAT = Settings().heartbeat_ms / 1000
SETTLED = 2.0
"""In this time (s) a cluster finds a leader, repeats what was lost, and tells everyone what is committed."""


def data(term: int, previous: EntryId, *entries: Entry, commit_id: int = 0, leader: str = "1") -> Data:
    """What `leader` would send to have `entries` staged after `previous`."""
    action = "log" if entries else "commit"
    return Data(action=action, term=term, leader=leader, previous=previous, entries=list(entries), commit_id=commit_id)


def ask(network: Network, target: str, request: Data) -> DataAnswer:
    """The leader that the request names sends it to `target`; what that one says."""
    answer = network.ask(request.leader, target, request)
    assert isinstance(answer, DataAnswer)
    return answer


def led_by_1(size: int = 3, settings: Settings | None = None) -> Network:
    """A cluster at rest that "1" leads in term 1; its no-op is committed everywhere."""
    network = Network(size, settings=settings)
    network.elect("1")
    network.run(SETTLED)
    network.deliver()
    assert not network.in_flight
    return network


# --- what commits, and when ----------------------------------------------------------------------------------------


def test_write_commits_on_a_majority_and_reaches_everyone() -> None:
    """The plain case: staged on all, committed by the leader when a majority has it, by the others when they are told.
    (Thesis 3.5.)"""
    network = led_by_1(5)
    network.crash("4")
    network.crash("5")
    (commit_id,) = network.propose("1", "colour")
    assert network["1"].raft.commit_id < commit_id
    network.deliver()
    assert network["1"].keys == ["colour"]
    network.run(2 * BEAT)
    assert network["3"].keys == ["colour"]
    for name in ("4", "5"):
        network.restart(name)
    network.run(SETTLED)
    assert all(member.keys == ["colour"] for member in network.members.values())


def test_write_does_not_commit_without_a_majority() -> None:
    """Two of five copies are not enough, however long the leader waits. (Thesis 3.5.)"""
    network = led_by_1(5)
    for name in ("3", "4", "5"):
        network.cut("1", name, both=False)
    network.propose("1", "colour")
    network.run(LOW)
    assert all(member.keys == [] for member in network.members.values())


def test_leader_sends_before_its_own_write_and_counts_itself_after() -> None:
    """The leader's entries are on their way before its disk has them. One follower of two acknowledges faster than that
    disk: one durable copy is no majority of three; with the leader's own write there are two. (Thesis 10.2.1; TRAPS
    2.)"""
    network = led_by_1()
    member = network["1"]
    commit_id = member.raft.propose(put("colour"))
    ready = member.raft.ready()
    assert [peer for peer, request in ready.requests if isinstance(request, Data)] == ["2", "3"]
    member.raft.take("2", DataAnswer(data=True, term=1, match=commit_id))
    assert member.raft.commit_id < commit_id
    assert member.raft.ready().committed == []
    member.disk.write(member.raft.ballot, member.raft.journal, member.raft.applied)
    member.raft.written()
    assert [entry.commit_id for entry in member.raft.ready().committed] == [commit_id]


def test_a_leader_writes_what_it_sends() -> None:
    """Its own copy is written while the others write theirs. What has to wait for their windows can't be on a majority
    of disks before those open, so it waits for its transaction too, with all that comes meanwhile; a follower's
    entries never wait, as its acknowledgement promises them."""
    network = led_by_1()
    leader, follower = network["1"], network["2"]

    def write() -> None:
        assert leader.raft.wants_write
        leader.disk.write(leader.raft.ballot, leader.raft.journal, leader.raft.applied)
        leader.raft.written()

    first = leader.raft.propose(put("colour"))
    assert not leader.raft.wants_write, "nobody was sent it yet"
    sent = dict(leader.raft.ready().requests)
    assert sent.keys() == {"2", "3"}
    write()
    assert not leader.raft.wants_write
    for n in range(3):
        second = leader.raft.propose(put(f"shape-{n}"))
    assert leader.raft.ready().requests == []
    assert not leader.raft.wants_write, "both have their window full"
    leader.raft.take("3", DataAnswer(data=True, term=1, match=first))
    assert [peer for peer, _ in leader.raft.ready().requests] == ["3"]
    write()
    leader.raft.take("3", DataAnswer(data=True, term=1, match=second))
    assert leader.raft.commit_id == second

    message = sent["2"]
    assert isinstance(message, Data)
    follower.raft.step("ticket", message)
    assert follower.raft.wants_write


def test_the_only_member_writes_at_once() -> None:
    """It is its own majority, and has nobody to wait for."""
    network = led_by_1(size=1)
    network["1"].raft.propose(put("colour"))
    assert network["1"].raft.wants_write


def test_majority_of_followers_commits_without_the_leaders_own_copy() -> None:
    """Both followers have the entry, the leader's disk is slow: two of three copies are a majority, whosever they are.
    (Thesis 10.2.1.)"""
    network = led_by_1()
    raft = network["1"].raft
    commit_id = raft.propose(put("colour"))
    raft.ready()
    for peer in ("2", "3"):
        raft.take(peer, DataAnswer(data=True, term=1, match=commit_id))
    assert raft.commit_id == commit_id


def test_leader_alone_commits_after_its_write_and_never_before() -> None:
    """In a cluster of one the leader's own write is the whole commit rule. It dies before the write: nothing happened;
    after it: the entry is there when it comes back. (TRAPS 2; etcd #14370.)"""
    network = Network(1)
    network.turn("1")
    network.crash("1", CrashPoint.BEFORE_WRITE)
    network.propose("1", "lost")
    assert network["1"].keys == []
    network.restart("1")
    network.turn("1")
    assert network["1"].keys == []
    network.crash("1", CrashPoint.AFTER_WRITE)
    network.propose("1", "kept")
    network.restart("1")
    network.turn("1")
    assert network["1"].keys == ["kept"]


@pytest.mark.parametrize("point", [CrashPoint.BEFORE_WRITE, CrashPoint.AFTER_WRITE])
def test_follower_acknowledges_nothing_before_it_is_on_disk(point: CrashPoint) -> None:
    """A follower dies in the turn in which it takes entries: no acknowledgement leaves it, and the leader, which needs
    it for a majority, has not committed. (Thesis 3.8; TRAPS 2.)"""
    network = led_by_1()
    network.crash("3")
    network.crash("2", point)
    network.propose("1", "colour")
    network.deliver()
    assert not network["2"].is_up
    assert network["1"].keys == []
    network.restart("2")
    network.run(SETTLED)
    assert network["1"].keys == network["2"].keys == ["colour"]


def test_new_leader_begins_with_a_no_op() -> None:
    """First of all a new leader appends an empty entry of its own term: with it commits what earlier terms have left,
    and what clients write comes after it. (Thesis 3.6.2, 6.4; TRAPS 6.)"""
    network = led_by_1()
    network.cut("1", "3")
    network.propose("1", "left over")
    network.deliver(2)
    network.crash("1")
    network.in_flight.clear()
    assert network["2"].keys == []
    network.elect("2")
    network.propose("2", "new")
    first_own = next(entry for entry in network["2"].disk.entries if entry.term == network["2"].raft.term)
    assert isinstance(decode_command(first_own.command), Noop)
    network.run(SETTLED)
    assert network["2"].keys == network["3"].keys == ["left over", "new"]


def test_figure_8() -> None:
    """The thesis' own counter-example. "1" leads term 1 and gets an entry to "2" only; "5" leads term 2 and writes one
    of its own, to nobody; "1" leads again and copies its old entry to "3": now it is on a majority, but "5", with the
    higher term at the end of its log, can still win and overwrite it. So it must not count as committed until an entry
    of the new term is on a majority as well. (Thesis figure 3.7, 3.6.2; TRAPS 5.)"""
    network = Network(5, settings=Settings(batch_entries=1))
    network.elect("1")
    network.run(SETTLED)
    network.isolate("1", "2")
    (old,) = network.propose("1", "old")
    network.deliver()
    network.crash("1")
    assert network["2"].log[-1] == EntryId(1, old)

    network.heal()
    network.cut("5", "2")
    network.lose_leaders()
    network.campaign("5")
    while not network["5"].raft.is_leader:
        network.deliver_one()
    network.crash("5")
    network.in_flight.clear()
    assert network["5"].log[-1] == EntryId(2, old)

    network.restart("1")
    network.heal()
    network.cut("1", "4")
    network.lose_leaders()
    for _ in range(2):  # the first only tells it that term 2 has passed
        network.campaign("1")
        while network.in_flight and EntryId(1, old) not in network["3"].log:
            network.deliver_one()
    holders = [name for name, member in network.members.items() if EntryId(1, old) in member.log]
    assert holders == ["1", "2", "3"], "on a majority of five"
    assert network["1"].raft.is_leader
    assert network["1"].raft.term == 3
    network.deliver_one(network.in_flight.index(network.select("3", "1", DataAnswer)[-1]))
    assert network["1"].raft.progress["3"].match == old, "and its leader knows it"
    assert network["1"].raft.commit_id < old, "the no-op of term 3 is on no majority"

    network.crash("1")
    network.in_flight.clear()
    network.restart("5")
    network.heal()
    network.elect("5")
    network.run(SETTLED)
    network.restart("1")
    network.run(1.0)
    for member in network.members.values():
        assert EntryId(1, old) not in member.log, "overwritten, as nobody was told that it is committed"


def test_old_entry_commits_with_the_first_one_of_the_new_term() -> None:
    """The other end of figure 8: the entry of the new term gets to a majority, and the older one commits with it.
    (Thesis figure 3.7, 3.6.2; TRAPS 5.)"""
    network = Network(3)
    network.give_log("1", 1, 1, 2)
    network.elect("1")
    network.run(SETTLED)
    assert network["3"].keys == ["1/1", "1/2", "2/3"]
    assert network["1"].raft.commit_id == 4


def test_entry_of_a_deposed_leader_may_still_commit() -> None:
    """A leader loses its leadership between append and commit. Its client must not be told "failed": the entry is on
    another disk, whose owner is elected and commits it. The outcome was open. (Thesis 3.6; TRAPS 24.)"""
    network = led_by_1()
    network.propose("1", "open")
    network.drop("1", "3")
    network.deliver(1)
    network.isolate("1")
    network.run(LOW + 2 * BEAT)
    assert not network["1"].raft.is_leader
    assert network["1"].keys == []
    network.elect("2")
    network.heal()
    network.run(SETTLED)
    assert network["1"].keys == ["open"]


def test_entry_of_a_deposed_leader_may_also_be_overwritten() -> None:
    """The other outcome: nobody else has it, and the next leader's log takes its place. (Thesis 3.6; TRAPS 24.)"""
    network = led_by_1()
    network.isolate("1")
    network.propose("1", "open", "open too")
    network.elect("2")
    network.propose("2", "chosen")
    network.deliver()
    network.heal()
    network.run(SETTLED)
    assert network["1"].keys == ["chosen"]
    assert network["1"].log == network["2"].log


def test_only_a_leader_appends() -> None:
    """Role and append are checked in the same step: a deposed leader can't append under a term that is not its own.
    (TRAPS 10; camunda #5360.)"""
    network = led_by_1()
    with pytest.raises(AssertionError, match="only a leader appends"):
        network["2"].raft.propose(put("colour"))
    raft = network["1"].raft
    raft.take("2", HeartbeatAnswer(term=4, commit_id=0))
    with pytest.raises(AssertionError, match="only a leader appends"):
        raft.propose(put("colour"))


def test_everyone_dies_and_the_committed_write_is_there() -> None:
    """The cluster loses its power after an acknowledgement: whoever is elected has the write, as a majority of the
    disks does. (Thesis 3.6.3, 3.8; TRAPS 1, 27.)"""
    for first in ("1", "2"):
        network = led_by_1()
        network.crash("3")
        network.propose("1", "kept")
        network.deliver()
        assert network["1"].keys == ["kept"]
        network.crash("1")
        network.crash("2")
        for name in network.members:
            network.restart(name)
        network.elect(first)
        network.run(SETTLED)
        assert all(member.keys == ["kept"] for member in network.members.values())


def test_leader_comes_back_with_its_staged_entries() -> None:
    """A leader dies with entries on its disk that nobody else has. Back again and elected, it still has them, and they
    commit under its new term. (Thesis 3.6.2, 3.8.)"""
    network = led_by_1()
    network.isolate("1")
    network.propose("1", "staged", "staged too")
    network.drop()
    network.crash("1")
    network.restart("1")
    assert network["1"].keys == []
    network.heal()
    network.elect("1")
    network.run(SETTLED)
    assert network["3"].keys == ["staged", "staged too"]


# --- what a follower takes -----------------------------------------------------------------------------------------


def test_entries_are_refused_unless_the_one_before_matches() -> None:
    """The follower's log is 1, 1, 2. It refuses what comes after a position that it does not have, or has with another
    term, changes nothing, and takes what fits. (Thesis 3.5, figure 3.2.)"""
    network = Network(3)
    network.give_log("2", 1, 1, 2)
    log = network["2"].log
    for previous in (EntryId(2, 4), EntryId(3, 3), EntryId(2, 2), EntryId(3, 9)):
        entry = msgspec.structs.replace(history(1)[0], term=3, commit_id=previous.commit_id + 1)
        answer = ask(network, "2", data(3, previous, entry))
        assert (answer.data, answer.reason, answer.asked) == (False, "gap", previous.commit_id)
        assert network["2"].log == log
    answer = ask(network, "2", data(3, EntryId(2, 3), history(1, 1, 2, 3)[3]))
    assert (answer.data, answer.match) == (True, 4)


def test_conflicting_suffix_is_replaced() -> None:
    """The thesis' follower (f): two terms of entries that were never committed give way to the leader's. (Thesis
    figure 3.6; TRAPS 9.)"""
    network = Network(3)
    network.give_log("2", 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3)
    answer = ask(network, "2", data(4, EntryId(1, 3), *history(1, 1, 1, 4, 4)[3:]))
    assert (answer.data, answer.match) == (True, 5)
    assert [id.term for id in network["2"].log] == [1, 1, 1, 4, 4]


def test_equal_entries_cut_nothing() -> None:
    """Messages of the leader arrive late, twice and in any order: one that holds less than the follower already has
    takes nothing away, and acknowledges only what it held itself. (Thesis 3.5; TRAPS 8, 9; RaftOS #26 erased
    committed entries here.)"""
    network = Network(3)
    log = history(1, 1, 1, 1)
    assert ask(network, "2", data(1, GENESIS, *log)).match == 4
    for previous, entries in ((GENESIS, log[:1]), (GENESIS, log[:3]), (log[0].id, log[1:2]), (GENESIS, [])):
        answer = ask(network, "2", data(1, previous, *entries))
        assert (answer.data, answer.match) == (True, previous.commit_id + len(entries))
        assert network["2"].log == [entry.id for entry in log]


def test_committed_entry_is_never_cut() -> None:
    """A message that would replace a committed entry can only come from a defect or from damage: the member does not
    obey, and says why. (Thesis 3.6; TRAPS 9.)"""
    network = Network(3)
    network.give_log("1", 1, 1)
    ask(network, "2", data(1, GENESIS, *history(1, 1), commit_id=2))
    assert network["2"].raft.commit_id == 2
    answer = ask(network, "2", data(2, EntryId(1, 1), history(1, 2)[1]))
    assert not answer.data
    assert network["2"].log == [EntryId(1, 1), EntryId(1, 2)]
    assert "committed" in network["2"].raft.complaint


def test_follower_commits_no_further_than_the_message_has_checked() -> None:
    """The follower's log is longer than what the leader's message covers, and the leader has committed beyond: what
    lies past the message may be another history, so it does not commit. (TRAPS 7; PySyncObj #166.)"""
    network = Network(3)
    network.give_log("1", 1, 1, 1, 1, 1)
    network.give_log("2", 1, 1, 1, 1, 1)
    answer = ask(network, "2", data(2, EntryId(1, 1), history(1, 1)[1], commit_id=5))
    assert (answer.match, answer.commit_id) == (2, 2)
    assert network["2"].raft.commit_id == 2
    ask(network, "2", data(2, EntryId(1, 3), commit_id=5))
    assert network["2"].raft.commit_id == 3, "an empty message has checked up to the entry before it"


def test_heartbeat_commits_no_further_than_was_matched() -> None:
    """A heartbeat says what is committed and checks nothing: the follower commits up to what this leader's data has
    matched, and before the first data nothing. (TRAPS 7; rule 6.)"""
    network = Network(3)
    network.give_log("1", 1, 1, 1, 1)
    network.give_log("2", 1, 1, 1, 1)
    beat = Heartbeat(term=2, leader="1", commit_id=4)
    network.ask("1", "2", beat)
    assert network["2"].raft.commit_id == 0
    ask(network, "2", data(2, EntryId(1, 2)))
    network.ask("1", "2", beat)
    assert network["2"].raft.commit_id == 2


def test_commit_id_never_goes_back() -> None:
    """Late messages carry an older commit_id. (TRAPS 7.)"""
    network = Network(3)
    network.give_log("1", 1, 1, 1)
    log = history(1, 1, 1)
    ask(network, "2", data(1, GENESIS, *log, commit_id=3))
    ask(network, "2", data(1, GENESIS, *log[:1], commit_id=1))
    network.ask("1", "2", Heartbeat(term=1, leader="1", commit_id=1))
    assert network["2"].raft.commit_id == 3


def test_heartbeat_of_a_later_term_commits_nothing_that_this_leader_has_not_checked() -> None:
    """A member stops (SIGSTOP) while "1" leads; its newest entry, never committed, is replaced under another leader,
    and "1" is elected anew. When the member wakes, a heartbeat of "1" overtakes its data: what matched in the old term
    says nothing of the new one, so nothing may be committed by it. (Thesis 3.5; TRAPS 7; rule 6.)"""
    network = Network(5)
    network.elect("1")
    network.run(SETTLED)
    network.isolate("1", "5")
    (lost,) = network.propose("1", "lost")
    network.deliver()
    assert network["5"].log[-1].commit_id == lost, "staged at 5, on no majority"
    network.pause("5")

    network.elect("2")
    network.propose("2", "chosen")
    network.deliver()
    network.heal()
    network.run(2.0)
    network.elect("1")
    network.run(0.3)
    assert network["1"].keys == ["chosen"], "1 leads again, with the log of 2"

    network.in_flight.clear()
    network.resume("5")
    network.advance(0.2)
    network.drop("1", "5", Data)
    network.deliver()
    network.run(1.0)
    assert network["5"].keys == ["chosen"]


def test_what_matched_with_one_leader_says_nothing_of_the_next() -> None:
    """Another leader's heartbeat arrives before its data. (TRAPS 7; rule 6.)"""
    network = Network(3)
    ask(network, "2", data(1, GENESIS, *history(1, 1, 1)))
    network.ask("3", "2", Heartbeat(term=2, leader="3", commit_id=3))
    assert network["2"].raft.commit_id == 0
    network.ask("1", "2", Heartbeat(term=3, leader="1", commit_id=3))
    assert network["2"].raft.commit_id == 0, "nor of the same one in a later term"


def test_two_leaders_of_one_term_are_not_both_followed() -> None:
    """It can't happen; should it, through a disk that was put back from a copy, say, the member stays with the one that
    it follows, and tells the other. (Thesis 3.4; TRAPS 34.)"""
    network = Network(3)
    ask(network, "2", data(1, GENESIS, *history(1)))
    answer = ask(network, "2", data(1, EntryId(1, 1), history(1, 1)[1], leader="3"))
    assert (answer.data, answer.reason) == (False, "two_leaders")
    assert network["2"].raft.leader == "1"
    assert network["2"].log == [EntryId(1, 1)]


def test_entry_of_a_later_term_than_its_leader_is_refused() -> None:
    """No leader has one, and a member that took it could not append its own entries when it leads: terms never fall
    along a log. Found by fuzzing as somebody who says a member's hello. (Thesis 3.5; TRAPS 9.)"""
    network = led_by_1()
    last = network["2"].disk.last
    command = put("later")
    later = Entry(99, 2, 0, chain(last.checksum, 99, 2, 0, command), command)
    answer = ask(network, "2", data(1, last.id, later))
    assert (answer.data, answer.reason) == (False, "checksum")
    assert "99" in network["2"].raft.complaint
    assert network["2"].log[-1] == last.id
    network.elect("2")
    network.propose("2", "colour")
    network.run(SETTLED)
    assert network["3"].keys == ["colour"]


def test_entries_of_another_history_are_refused_and_told() -> None:
    """Terms fit, but checksums say that the two logs differ: one of them is damaged. Nothing is staged, the leader is
    told why, and does not ask again before its next heartbeat. (store docstring; TRAPS 37.)"""
    network = led_by_1()
    (commit_id,) = network.propose("1", "colour")
    network.drop()
    entry = network["1"].disk.entries[-1]
    damaged = msgspec.structs.replace(entry, checksum=entry.checksum ^ 1)
    answer = ask(network, "2", data(1, EntryId(1, commit_id - 1), damaged))
    assert (answer.data, answer.reason) == (False, "checksum")
    assert network["2"].log[-1].commit_id == commit_id - 1
    assert f"entry {commit_id}" in network["2"].raft.complaint

    raft = network["1"].raft
    network.turn("1", lambda raft: raft.unreachable("2"))
    probe = network.select("1", "2", Data)
    assert probe
    network.drop()
    network.turn("1", lambda raft: raft.take("2", msgspec.structs.replace(answer, asked=commit_id - 2)))
    assert not raft.complaint, "an answer to something else"
    network.turn(
        "1", lambda raft: raft.take("2", msgspec.structs.replace(answer, asked=probe[-1].message.previous.commit_id))
    )
    assert "checksum" in raft.complaint
    assert not network.select("1", "2", Data)
    network.run(SETTLED)
    assert not raft.complaint
    assert network["2"].keys == ["colour"], "the message was damaged, not the log: the next one is taken"


@pytest.mark.parametrize("command", [b'{"kind":"fly"}', b'{"kind":"put","namespace":"n","key":"","value":1}', b"7"])
def test_command_that_cannot_be_applied_is_not_staged(command: bytes) -> None:
    """An entry that this version does not understand, or could not apply, must not be acknowledged: it would count as a
    copy on a node that stops when it commits. Nothing is staged, and the leader is told why. (TRAPS 26.)"""
    network = Network(3)
    checksum = chain(0, 1, 1, 0, command)
    answer = ask(network, "2", data(1, GENESIS, Entry(1, 1, 0, checksum, msgspec.Raw(command))))
    assert (answer.data, answer.reason) == (False, "unknown_command")
    assert network["2"].log == []
    assert network["2"].raft.complaint


def test_message_whose_entries_do_not_follow_each_other_is_not_taken() -> None:
    """A hole or a falling term inside one message: a defect of the sender; nothing of it is staged. (Thesis 3.5.)"""
    network = Network(3)
    log = history(1, 2, 2)
    falling = msgspec.structs.replace(log[2], term=1)
    for entries in ([log[0], log[2]], [log[0], log[1], falling], [log[1]]):
        answer = ask(network, "2", data(2, GENESIS, *entries))
        assert (answer.data, answer.reason) == (False, "checksum")
        assert network["2"].log == []


def test_full_disk_keeps_the_leader_and_refuses_its_entries() -> None:
    """The driver finds no room: the leader is heard, so there is no election, but its entries are not taken, and it
    asks again at its next heartbeat, not at once. (store docstring, "room is watched".)"""
    network = led_by_1()
    due = network["2"].raft._election_due
    network.now += BEAT
    network.propose("1", "colour")
    (request,) = (envelope.message for envelope in network.select("1", "2", Data))
    network.drop("1", "2")
    network.turn("2", lambda raft: raft.refuse_for_space("1", request))
    assert network["2"].raft._election_due != due
    network.deliver()
    assert network["1"].keys == ["colour"], "the majority has room"
    assert not network.select("1", "2", Data)
    network.run(SETTLED)
    assert network["2"].keys == ["colour"]
    answer = ask(network, "2", data(0, GENESIS))
    assert answer.reason == "stale_term"
    network.turn("2", lambda raft: raft.refuse_for_space("3", data(0, GENESIS, leader="3")))
    assert network["2"].raft.leader == "1"


# --- catching up ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "leaders", "rounds_max"),
    [
        ([1] * 2, [1] * 2000, 3),  # far behind
        ([1] * 10, [1] * 10 + [3] * 2000, 3),
        ([1] * 10 + [2] * 2000, [1] * 10 + [3] * 2000, 3),  # one term of its own, never committed
        ([1] * 10 + [2] * 2000, [1] * 10 + [3] * 5, 3),
        ([1] * 10 + [2] * 500 + [4] * 500 + [6] * 500, [1] * 10 + [3] * 500 + [5] * 500 + [7] * 500, 6),
    ],
)
def test_follower_catches_up_in_a_few_rounds(own: list[int], leaders: list[int], rounds_max: int) -> None:
    """Thousands of entries lie between where the logs part and where they end. The refusal's hint skips a whole term at
    a time, on both sides, so the leader finds the place in at most one round for each term. (Thesis 3.5; TRAPS 12;
    etcd's findConflictByTerm.)"""
    network = Network(3, settings=Settings(batch_entries=10_000))
    network.give_log("2", *own)
    network.give_log("1", *leaders)
    network.give_log("3", *leaders)
    sent: list[Envelope] = []
    network.watch = lambda event, envelope: (
        sent.append(envelope)
        if event == "sent" and envelope.target == "2" and isinstance(envelope.message, Data)
        else None
    )
    network.elect("1")
    network.run_until(lambda: network["2"].log == network["1"].log, seconds=0.1)
    assert len(sent) <= rounds_max


def test_restarted_follower_does_not_wait_for_the_next_write() -> None:
    """A follower dies before it has written what it learned to be committed, and does not know any more how far its log
    matches; nobody writes. The leader sees from its answer to a heartbeat that it commits less than it was told, asks
    again where it stands, and the follower commits. (rule 6.)"""
    network = led_by_1()
    network.propose("1", "colour")
    network.deliver()
    network.crash("2", CrashPoint.BEFORE_WRITE)
    network.run(2 * BEAT)
    assert not network["2"].is_up
    network.restart("2")
    assert network["2"].keys == []
    network.run(3 * BEAT)
    assert network["2"].keys == ["colour"]


def test_new_member_of_the_majority_is_fed_from_the_disk() -> None:
    """A follower is down for longer than the leader keeps entries in memory: the older ones come from the disk, in
    batches. (package docstring.)"""
    network = led_by_1(settings=Settings(kept_entries=3, batch_entries=7))
    network.crash("3")
    for n in range(50):
        network.propose("1", f"k{n}")
        network.deliver()
    network.restart("3")
    network.run(1.0)
    assert network["3"].keys == network["1"].keys
    assert len(network["3"].keys) == 50


@pytest.mark.parametrize("trouble", ["link cut", "message lost", "disk full"])
def test_member_that_a_new_leader_could_not_reach_is_not_sent_the_whole_log(trouble: str) -> None:
    """The first message of a new leader to a member comes to nothing: the member is down, as is usual when there is an
    election, or the message is lost, or the member's disk is full. Nothing matches yet that the leader knows of, and
    still it asks at the end of its log again, not at the beginning: the member's hint finds the place. (TRAPS 12,
    38.)"""
    network = led_by_1(settings=Settings(batch_entries=10))
    network.propose("1", *[f"k{n}" for n in range(300)])
    network.run(SETTLED)
    network.isolate("3")
    network.turn("1", lambda raft: raft.take("2", HeartbeatAnswer(term=2, commit_id=0)))
    network.elect("2")
    assert network["2"].raft.progress["3"].unanswered, "its first message was lost"
    if trouble == "link cut":
        for _ in range(3):
            network.turn("2", lambda raft: raft.unreachable("3"))
    elif trouble == "message lost":
        network.run(LOW + 2 * BEAT)
    else:
        asked = network["2"].raft.progress["3"]._asked
        full = DataAnswer(data=False, term=network["2"].raft.term, asked=asked, reason="storage_full")
        network.turn("2", lambda raft: raft.take("3", full))
        network.run(2 * BEAT)
    network.drop()
    network.heal()
    sent: list[EntryId] = []
    network.watch = lambda event, envelope: (
        sent.extend(entry.id for entry in envelope.message.entries)
        if event == "sent" and envelope.target == "3" and isinstance(envelope.message, Data)
        else None
    )
    network.turn("2", lambda raft: raft.unreachable("3"))
    network.run(SETTLED)
    assert network["3"].log == network["2"].log
    assert len(sent) <= 3, f"{len(sent)} entries sent for the no-op that it lacked"


def test_link_that_was_cut_is_probed_anew() -> None:
    """The link to a follower breaks with messages under way. The leader does not wait for their answers: it asks where
    the follower stands, and goes on from there. (TRAPS 36.)"""
    network = led_by_1()
    network.propose("1", "colour")
    assert network.drop("1", "2") == 1
    network.propose("1", "shape")
    assert not network.select("1", "2", Data), "one message at a time"
    network.turn("1", lambda raft: raft.unreachable("2"))
    network.deliver()
    assert network["2"].log == network["1"].log
    network["2"].raft.unreachable("1")  # a follower has nothing under way


def test_lost_message_is_repeated_without_anybody_noticing_the_loss() -> None:
    """No link was cut, yet a message never arrives. After an election timeout without an answer it counts as lost.
    (TRAPS 36.)"""
    network = led_by_1()
    network.propose("1", "colour")
    assert network.drop("1", "2") == 1
    network.run(LOW - 2 * BEAT)
    assert network["2"].keys == []
    network.run(5 * BEAT)
    assert network["2"].keys == ["colour"]


def test_late_refusal_does_not_send_the_leader_back() -> None:
    """A refusal is delivered a second time, long after the follower has caught up. It is known as old by the position
    that it answers, and never makes `next` fall to `match` or below. (TRAPS 8, 12.)"""
    network = Network(3)
    network.give_log("2", 1, 1)
    network.give_log("1", 1, 1, 2, 2)
    refusals: list[DataAnswer] = []
    network.watch = lambda event, envelope: (
        refusals.append(envelope.message)
        if event == "delivered" and isinstance(envelope.message, DataAnswer) and not envelope.message.data
        else None
    )
    network.elect("1")
    network.run(SETTLED)
    assert refusals
    progress = network["1"].raft.progress["2"]
    before = (progress.match, progress.next, progress.probing)
    assert before[0] == len(network["1"].log)
    for refusal in refusals:
        network.turn("1", lambda raft, refusal=refusal: raft.take("2", refusal))
        assert (progress.match, progress.next, progress.probing) == before
    lying = DataAnswer(data=False, term=network["1"].raft.term, asked=progress.match + 5, last=GENESIS, reason="gap")
    network.turn("1", lambda raft: raft.take("2", lying))
    assert progress.match == before[0]
    assert progress.next > progress.match, "a hint is a hint: the floor is what is known"


def test_match_never_goes_back() -> None:
    """Acknowledgements arrive in the wrong order. What the older one says was true and stays true, but the newer one
    counts. (TRAPS 8; PySyncObj #167.)"""
    network = led_by_1(settings=Settings(window_batches=8))
    for n in range(4):
        network.propose("1", f"k{n}")
    for envelope in network.select("1", "2"):
        network.deliver_one(network.in_flight.index(envelope))
    answers = network.select("2", "1", DataAnswer)
    assert len(answers) == 4
    matches = []
    for envelope in reversed(answers):
        network.deliver_one(network.in_flight.index(envelope))
        matches.append(network["1"].raft.progress["2"].match)
    assert matches == [5, 5, 5, 5]
    assert network["1"].raft.commit_id == 5


def test_acknowledgement_of_an_earlier_term_does_not_count() -> None:
    """ "1" led term 1, lost, and leads again. An acknowledgement from term 1 arrives late: it tells of entries that may
    have been replaced since. (TRAPS 8, 36; raft.tla #18.)"""
    network = Network(3)
    network.elect("1")
    network.turn("1", lambda raft: raft.take("3", HeartbeatAnswer(term=5, commit_id=0)))
    network.in_flight.clear()
    network.elect("1")
    raft = network["1"].raft
    assert raft.term == 6
    network.in_flight.clear()
    network.propose("1", "colour")
    network.in_flight.clear()
    match = raft.progress["2"].match
    network.turn("1", lambda raft: raft.take("2", DataAnswer(data=True, term=1, match=match + 1)))
    assert raft.progress["2"].match == match
    assert network["1"].keys == []


def test_acknowledgement_of_what_was_never_sent_counts_for_nothing() -> None:
    """A follower can't hold more of this leader's log than there is: who says so is not believed, and the leader goes
    on and says why. (TRAPS 8.)"""
    network = led_by_1()
    raft = network["1"].raft
    match = raft.progress["2"].match
    network.turn("1", lambda raft: raft.take("2", DataAnswer(data=True, term=1, match=99)))
    assert raft.is_leader
    assert raft.progress["2"].match == match
    assert "never sent" in raft.complaint


# --- flow ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("batch", [1, 4])
def test_window_and_batch_are_limits(window: int, batch: int) -> None:
    """However much there is to send: no message holds more entries than a batch, and no more messages than the window
    are unanswered; everything arrives all the same. (TRAPS 38.)"""
    network = led_by_1(settings=Settings(window_batches=window, batch_entries=batch))
    network.propose("1", *[f"k{n}" for n in range(40)])
    sizes: set[int] = set()
    while network.in_flight:
        for peer in ("2", "3"):
            assert len(network["1"].raft.progress[peer].unanswered) <= window
            assert len(network.select("1", peer, Data)) <= window
        sizes |= {len(envelope.message.entries) for envelope in network.select(kind=Data)}
        network.deliver_one()
    assert max(sizes) == batch
    network.run(SETTLED)
    assert len(network["2"].keys) == 40


def test_one_member_may_be_fed_out_of_turn() -> None:
    """The driver is asked to send one member what it needs: entries if it lacks some and its window has room, else a
    heartbeat; or to send heartbeats to all. Who does not lead, or is asked about a stranger, sends nothing. (published
    interface, `Election.send_heartbeat`.)"""
    network = led_by_1()
    raft = network["1"].raft
    network.turn("1", lambda raft: raft.feed("2"))
    assert [type(e.message) for e in network.in_flight] == [Heartbeat]
    assert network.drop("1", "2") == 1
    raft.propose(put("colour"))
    network.turn("1", lambda raft: raft.feed("2"))
    (sent,) = network.select("1", "2")
    assert isinstance(sent.message, Data)
    network.in_flight.clear()
    network.turn("1", lambda raft: raft.feed("2"), lambda raft: raft.feed("9"))
    assert [(e.target, type(e.message)) for e in network.in_flight] == [("2", Heartbeat)], "its window is full"
    network.in_flight.clear()
    network.turn("1", lambda raft: raft.beat())
    assert [(e.target, type(e.message)) for e in network.in_flight] == [("2", Heartbeat), ("3", Heartbeat)]
    network.in_flight.clear()
    network.turn("2", lambda raft: raft.feed("1"), lambda raft: raft.beat())
    assert not network.in_flight


def test_batch_ends_by_size_and_one_large_entry_goes_alone() -> None:
    """A batch stops before the size limit; an entry larger than the limit is sent all the same. (TRAPS 38.)"""
    network = led_by_1(settings=Settings(batch_bytes=300))
    network.propose("1", "a", "b", "x" * 400, "c", "d")
    network.deliver(1)
    first = network.select("1", "2", Data) or network.select("1", "3", Data)
    assert sum(entry.size for entry in first[0].message.entries) <= 300
    network.run(SETTLED)
    assert network["2"].keys == ["a", "b", "x" * 400, "c", "d"]


def test_unanswering_member_holds_nothing() -> None:
    """A dead follower costs one window of messages and one heartbeat a beat, not one message for each write. (TRAPS
    38.)"""
    network = led_by_1()
    network.cut("1", "3")
    for n in range(100):
        network.propose("1", f"k{n}")
        network.deliver()
    assert len(network["1"].raft.progress["3"].unanswered) == 1
    assert len(network["1"].keys) == 100


def test_uncommitted_bytes_return_to_zero() -> None:
    """The leader knows how much it has staged and not committed, so that the driver can refuse more; when all of it is
    committed, or its leadership ends, that is nothing. (TRAPS 38.)"""
    network = led_by_1()
    assert network["1"].raft.uncommitted_bytes == 0
    network.isolate("1")
    network.propose("1", "colour", "shape")
    assert network["1"].raft.uncommitted_bytes == len(put("colour")) + len(put("shape"))
    network.heal()
    network.run(1.5)
    assert network["2"].keys == ["colour", "shape"]
    assert network["1"].raft.uncommitted_bytes == 0
    network.isolate("1")
    network.propose("1", "open")
    network.run(2.0)
    assert network["1"].raft.uncommitted_bytes == 0

    network = Network(3)
    network.give_log("1", 1, 1)
    network.elect("1")
    assert network["1"].raft.commit_id == 3
    assert network["1"].raft.uncommitted_bytes == 0, "what older terms left was never counted"


# --- a bad network -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_data_that_is_lost_repeated_and_reordered_makes_one_log(seed: int) -> None:
    """Every data message and every answer may be lost, come twice, or come in any order, with many under way; every log
    ends equal, and every write is there once, in the order of the leader. (Thesis 3.5; TRAPS 8, 9, 36.)"""
    print(f"seed {seed}")  # noqa: T201 - shown when the test fails
    chance = random.Random(seed)
    network = Network(3, seed, Settings(window_batches=4, batch_entries=2))
    network.elect("1")
    keys = [f"k{n}" for n in range(30)]
    for key in keys:
        network.propose("1", key)
        for _ in range(6):
            network.shuffle()
            if not network.in_flight:
                continue
            match chance.randrange(4):
                case 0:
                    network.duplicate(network.in_flight[0])
                case 1:
                    network.in_flight.pop()
                case _:
                    network.deliver_one()
        network.advance(0.01)
    network.deliver()
    network.run(3.0)
    assert network.leaders == ["1"]
    assert all(member.keys == keys for member in network.members.values())


def test_terms_never_fall_along_any_log() -> None:
    """Many leaders in turn, each with writes of its own, some lost: in every log terms only rise, and every position
    has one entry. (Thesis 3.5, Log Matching.)"""
    network = Network(5)
    for n in range(12):
        leader = str(n % 5 + 1)
        network.heal()
        network.run(1.0)
        network.elect(leader)
        network.isolate(leader, str((n + 1) % 5 + 1))
        network.propose(leader, f"k{n}")
        network.deliver()
    network.heal()
    network.run(3.0)
    logs = {tuple(member.log) for member in network.members.values()}
    assert len(logs) == 1
    (log,) = logs
    assert all(a.term <= b.term and a.commit_id + 1 == b.commit_id for a, b in pairwise(log))
