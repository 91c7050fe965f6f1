"""The log as consensus sees it: what is staged, written and kept in memory, against a plain list (rule 4)."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec import Raw

from raftnode.consensus.journal import Gap, HistoryDiffers, Journal, Mark
from raftnode.consensus.membership import Membership
from raftnode.messages import (
    GENESIS,
    Change,
    Entry,
    EntryId,
    MembersCommand,
    Noop,
    chain,
    decode_command,
    decode_effect,
    encode_command,
)
from raftnode.testing.network import Disk, history, put

FOUNDING = Membership.founding(["1", "2", "3"])
EVERYTHING = 1 << 30


def started(*terms: int, written: bool = True) -> Journal:
    """A journal that holds entries of these terms, started from a disk that has them, or only told of them."""
    disk = Disk(FOUNDING)
    if written:
        disk.entries = history(*terms)
        return disk.journal()
    journal = disk.journal()
    journal.accept(GENESIS, history(*terms), 0)
    return journal


def terms_of(journal: Journal) -> list[int]:
    return [journal.id_at(n).term for n in range(journal.first, journal.last.id.commit_id + 1)]


# --- against a plain list -----------------------------------------------------------------------------------------


def lengthened(log: Sequence[Entry], term: int, commands: Sequence[Raw]) -> list[Entry]:
    """The log with entries of this term behind it, made without the journal's help."""
    entries, checksum = list(log), log[-1].checksum if log else 0
    for command in commands:
        commit_id = len(entries) + 1
        checksum = chain(checksum, term, commit_id, 7, command)
        entries.append(Entry(term, commit_id, 7, checksum, command))
    return entries


COMMANDS = st.lists(
    st.one_of(
        st.sampled_from(["a", "b" * 50, "c" * 500]).map(put),
        st.sampled_from([["1", "2"], ["1", "2", "3"], ["3"]]).map(
            lambda voters: encode_command(MembersCommand(voters=dict.fromkeys(voters, "")))
        ),
    ),
    min_size=1,
    max_size=4,
)


class JournalAgainstList(RuleBasedStateMachine):
    """Whatever is appended, accepted, cut, written, applied, forgotten and restarted, in any order: the journal holds
    what a plain list of entries holds, and what it asks to have written makes the disk equal to it.

    The model is `log`, all entries in memory; `committed` and `applied` only rise, as consensus sees to it.
    """

    @initialize()
    def found(self) -> None:
        self.disk = Disk(FOUNDING)
        self.journal = self.disk.journal()
        self.log: list[Entry] = []
        self.committed = self.applied = 0
        self.term = 1

    @rule(commands=COMMANDS, new_term=st.booleans(), are_known=st.booleans())
    def append(self, commands: list[Raw], new_term: bool, are_known: bool) -> None:
        """A leader's own entries; it may know already what they do."""
        self.term += new_term
        self.log = lengthened(self.log, self.term, commands)
        for command in commands:
            self.journal.append(self.term, 7, command, decode_effect(command) if are_known else None)

    @rule(commands=COMMANDS, place=st.floats(0, 1))
    def accept_another_history(self, commands: list[Raw], place: float) -> None:
        """A new leader's log parts from ours somewhere above what is committed: the rest of ours is cut."""
        self.term += 1
        parting = self.committed + round(place * (len(self.log) - self.committed))
        leaders = lengthened(self.log[:parting], self.term, commands)
        previous = leaders[parting - 1].id if parting else GENESIS
        assert self.journal.accept(previous, leaders[parting:], self.committed) == len(leaders)
        self.log = leaders

    @rule(commands=COMMANDS, start=st.floats(0, 1), end=st.floats(0, 1))
    def accept_what_is_partly_known(self, commands: list[Raw], start: float, end: float) -> None:
        """The leader sends a stretch of its log that begins in what is known, and may end before our end or past it:
        what is known stays, all of it."""
        leaders = lengthened(self.log, self.term, commands)
        first = round(start * len(self.log))
        last = first + round(end * (len(leaders) - first))
        previous = leaders[first - 1].id if first else GENESIS
        assert self.journal.accept(previous, leaders[first:last], self.committed) == last
        if last > len(self.log):
            self.log = leaders[:last]

    @rule(ahead=st.integers(1, 3), term=st.integers(0, 3))
    def refuse_what_does_not_fit(self, ahead: int, term: int) -> None:
        """The position before is past our end, or has another term here: nothing changes."""
        beyond = EntryId(self.term + term, len(self.log) + ahead)
        with pytest.raises(Gap):
            self.journal.accept(beyond, [], self.committed)
        if self.log:
            with pytest.raises(Gap):
                self.journal.accept(EntryId(self.term + 1, len(self.log)), [], self.committed)

    @precondition(lambda self: self.log)
    @rule(flip=st.integers(1, 2**32 - 1))
    def refuse_what_was_changed_on_its_way(self, flip: int) -> None:
        """The checksum does not continue our history: nothing changes."""
        entry = lengthened(self.log, self.term, [put("next")])[-1]
        damaged = msgspec.structs.replace(entry, checksum=entry.checksum ^ flip)
        with pytest.raises(HistoryDiffers):
            self.journal.accept(self.log[-1].id, [damaged], self.committed)

    @rule()
    def write(self) -> None:
        """A transaction: the model's disk does exactly what the journal asks for, and then equals the log."""
        unwritten = self.journal.unwritten()
        assert self.journal.has_unwritten == bool(unwritten.entries or unwritten.cut_from is not None)
        if unwritten.cut_from is not None:
            assert unwritten.cut_from <= len(self.disk.entries), "there is something to cut"
            del self.disk.entries[unwritten.cut_from - 1 :]
        self.disk.entries += unwritten.entries
        assert self.disk.entries == self.log
        self.journal.mark_written()
        assert not self.journal.has_unwritten

    @rule(place=st.floats(0, 1))
    def commit(self, place: float) -> None:
        self.committed += round(place * (len(self.log) - self.committed))

    @rule(place=st.floats(0, 1))
    def apply(self, place: float) -> None:
        """What is carried out is what the entries say, whatever stood in their places before."""
        before, self.applied = self.applied, self.applied + round(place * (self.committed - self.applied))
        entries = self.log[before : self.applied]
        assert self.journal.take_effects(entries) == [decode_effect(entry.command) for entry in entries]

    @rule(count=st.sampled_from([1, 2, 5]), size=st.sampled_from([1, 200, EVERYTHING]))
    def forget(self, count: int, size: int) -> None:
        """Memory goes back to its limits, except for what is not written or not applied yet."""
        before = set(self.journal._kept)
        self.journal.forget(self.applied, count, size)
        kept = self.journal._kept
        settled = min(self.applied, self.journal.written)
        assert {n for n in before if n > settled} <= set(kept), "needed still"
        assert all(n in kept for n in range(self.journal.written + 1, len(self.log) + 1)), "nowhere else"
        over = len(kept) > count or sum(entry.size for entry in kept.values()) > size
        assert not over or min(kept) > settled, "within the limits, as far as it may be"

    @rule()
    def restart(self) -> None:
        """What was not written is gone; what was written is all there."""
        self.log = self.disk.entries.copy()
        self.disk.commit_id = self.applied = self.committed = min(self.committed, self.applied, len(self.log))
        self.journal = self.disk.journal()

    @invariant()
    def same_entries(self) -> None:
        journal, log = self.journal, self.log
        assert journal.last == (Mark(log[-1].id, log[-1].checksum) if log else Mark(GENESIS, 0))
        assert [journal.term_at(n) for n in range(1, len(log) + 1)] == [entry.term for entry in log]
        assert (journal.term_at(0), journal.term_at(len(log) + 1)) == (0, None)
        found: list[Entry] = []
        while len(found) < len(log):
            part = journal.entries(len(found) + 1, len(log), 120)
            assert len(part) == 1 or sum(entry.size for entry in part) <= 120
            found += part
        assert found == log
        assert journal._kept_bytes == sum(entry.size for entry in journal._kept.values())
        assert 0 <= journal.written <= len(log)

    @invariant()
    def same_memberships(self) -> None:
        """The newest in the log is in force; all that a restart or a cut could need are remembered."""
        made = self._memberships()
        assert self.journal.membership == made[-1]
        known = self.journal.memberships
        assert list(known) == made[-len(known) :]
        assert known[0].commit_id <= self.committed or known[0] == FOUNDING

    def _memberships(self) -> list[Membership]:
        commands = [(entry.commit_id, decode_command(entry.command)) for entry in self.log]
        return [FOUNDING] + [
            Membership.of(self.log[commit_id - 1].id, command)
            for commit_id, command in commands
            if isinstance(command, MembersCommand)
        ]


JournalAgainstList.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestJournalAgainstList = JournalAgainstList.TestCase


# --- one by one -------------------------------------------------------------------------------------------------------


def test_cut_is_written_as_one_with_what_follows() -> None:
    """Written entries are replaced twice before the disk is told: one deletion from the lowest place, then everything
    behind it. (Thesis 3.5; TRAPS 9.)"""
    journal = started(1, 1, 1, 1)
    journal.accept(EntryId(1, 3), history(1, 1, 1, 2)[3:], 0)
    journal.accept(EntryId(1, 1), history(1, 3, 3)[1:], 0)
    unwritten = journal.unwritten()
    assert unwritten.cut_from == 2
    assert unwritten.entries == history(1, 3, 3)[1:]


def test_cut_of_what_was_never_written_needs_no_deletion() -> None:
    """Entries that are only in memory are replaced there. (Thesis 3.5.)"""
    journal = started(1, 1, written=False)
    journal.accept(EntryId(1, 1), history(1, 2)[1:], 0)
    assert journal.unwritten().cut_from is None
    assert journal.unwritten().entries == history(1, 2)


def test_suffix_is_cut_only_where_terms_differ() -> None:
    """Every stretch of the own log, sent again, changes nothing; the first entry with another term cuts from there.
    (Thesis 3.5; TRAPS 9; RaftOS #26.)"""
    log = history(1, 1, 2, 2)
    journal = started(1, 1, 2, 2)
    for first in range(5):
        for last in range(first, 5):
            assert journal.accept(log[first - 1].id if first else GENESIS, log[first:last], 4) == last
            assert not journal.has_unwritten
    journal.accept(EntryId(1, 2), history(1, 1, 3)[2:], 2)
    assert terms_of(journal) == [1, 1, 3]


def test_committed_entry_is_never_cut() -> None:
    """Not even by a leader: that would be a defect or damage, and nothing has changed when it is found. (Thesis 3.6;
    TRAPS 9.)"""
    journal = started(1, 1, 1)
    with pytest.raises(HistoryDiffers, match="the place of a committed one"):
        journal.accept(EntryId(1, 1), history(1, 2)[1:], 2)
    assert terms_of(journal) == [1, 1, 1]
    assert journal.accept(EntryId(1, 2), history(1, 1, 2)[2:], 2) == 3


def test_refused_entries_leave_no_trace() -> None:
    """A conflict that would cut, but whose entries do not continue the history: the suffix stays. (TRAPS 9, 37.)"""
    journal = started(1, 1, 1)
    good, bad = history(1, 2, 2)[1:]
    with pytest.raises(HistoryDiffers, match="checksum"):
        journal.accept(EntryId(1, 1), [good, msgspec.structs.replace(bad, checksum=bad.checksum ^ 1)], 1)
    with pytest.raises(HistoryDiffers, match="can't follow"):
        journal.accept(EntryId(1, 1), [good, msgspec.structs.replace(bad, commit_id=9)], 1)
    assert terms_of(journal) == [1, 1, 1]
    assert not journal.has_unwritten


def test_what_entries_do_goes_with_the_suffix_that_is_cut() -> None:
    """Two puts are staged, and another leader's put takes the place of the first. Then this member leads: its no-op
    stands where the second put was, and does nothing (TRAPS 11)."""
    journal = started(1)
    second, third = history(1, 2, 2)[1:]
    assert isinstance(decode_effect(third.command), Change)
    assert journal.accept(history(1)[-1].id, [second, third], 1) == 3
    others = lengthened(history(1), 3, [put("instead")])[1:]
    journal.accept(history(1)[-1].id, others, 1)
    noop = journal.append(4, 0, encode_command(Noop()))
    assert noop.commit_id == third.commit_id
    assert journal.take_effects([*others, noop]) == [decode_effect(put("instead")), Noop()]


def test_what_was_checked_is_not_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower decodes a command when it checks it, before it acknowledges; a leader knows what it proposes."""
    journal = started(1)
    entries = history(1, 1, 1)[1:]
    journal.accept(history(1)[-1].id, entries, 1)
    entries.append(journal.append(2, 0, put("own"), decode_effect(put("own"))))
    wanted = [decode_effect(entry.command) for entry in entries]
    monkeypatch.setattr("raftnode.consensus.journal.decode_effect", lambda _: pytest.fail("decoded again"))
    assert journal.take_effects(entries) == wanted


def test_terms_never_fall_along_the_log() -> None:
    """A leader appends in its own term, which is at least that of its last entry. (Thesis 3.5.)"""
    journal = started(1, 3)
    with pytest.raises(AssertionError, match="terms never fall"):
        journal.append(2, 0, put("colour"))


@pytest.mark.parametrize(
    ("own", "asked", "term", "committed", "hint"),
    [
        ([1, 1, 1], 10, 1, 0, EntryId(1, 3)),  # shorter: the end of the log
        ([1, 1, 2, 2], 4, 1, 0, EntryId(1, 2)),  # skip all of term 2: a leader with term 1 there can't have it
        ([1, 1, 2, 2], 4, 3, 0, EntryId(2, 4)),  # the leader has something newer there: it looks for our term 2
        ([2, 2, 2, 2], 3, 1, 0, EntryId(0, 0)),  # nothing in common
        ([2, 2, 2, 2], 3, 1, 2, EntryId(2, 2)),  # what is committed matches for certain
        ([1, 1, 2, 2], 2, 0, 0, EntryId(0, 0)),
    ],
)
def test_hint_of_a_refusal(own: list[int], asked: int, term: int, committed: int, hint: EntryId) -> None:
    """The newest own entry, at or before the place that was asked for, that the leader could hold. (Thesis 3.5; TRAPS
    12; etcd's findConflictByTerm.)"""
    assert started(*own).hint(asked, term, committed) == hint


@pytest.mark.parametrize(
    ("own", "hint", "at_least", "found"),
    [
        ([1, 1, 3, 3], EntryId(1, 2), 0, 2),
        ([1, 1, 3, 3], EntryId(2, 4), 0, 2),  # skip all of term 3: the follower's log ends with an older one
        ([1, 1, 3, 3], EntryId(4, 3), 0, 3),
        ([1, 1, 3, 3], EntryId(3, 99), 0, 4),  # past the end: from the end on
        ([3, 3, 3, 3], EntryId(1, 4), 0, 0),
        ([3, 3, 3, 3], EntryId(1, 4), 2, 2),  # never below what is known
        ([3, 3, 3, 3], EntryId(3, 1), 2, 2),
    ],
)
def test_use_of_a_hint(own: list[int], hint: EntryId, at_least: int, found: int) -> None:
    """The leader goes to its own newest entry that could match, but never below what is known to. (TRAPS 12.)"""
    assert started(*own).find(hint, at_least) == found


def test_log_may_begin_later() -> None:
    """What is below the base is committed and compacted: it counts as held, messages that reach below it are taken for
    what is above it, and hints end there. (Thesis 5.1; TRAPS 30.)"""
    log = history(1, 1, 1, 2, 2)
    disk = Disk(FOUNDING)
    disk.entries = log
    base = Mark(log[2].id, log[2].checksum)
    journal = Journal(disk, base, Mark(log[4].id, log[4].checksum), [FOUNDING])
    assert (journal.first, journal.term_at(2), journal.term_at(3)) == (4, None, 1)
    assert journal.accept(log[0].id, log[1:], 3) == 5
    assert journal.accept(GENESIS, log[:2], 3) == 2
    assert not journal.has_unwritten
    assert journal.hint(5, 0, 3) == base.id
    with pytest.raises(AssertionError, match="outside"):
        journal.id_at(2)


def test_founding_membership_is_set_once() -> None:
    """An empty log has no members before it is founded. (Thesis 4.)"""
    journal = Journal(Disk(FOUNDING), Mark(GENESIS, 0), Mark(GENESIS, 0), [])
    journal.found(FOUNDING)
    assert journal.membership == FOUNDING
    with pytest.raises(AssertionError, match="founded once"):
        journal.found(FOUNDING)


def test_membership_is_needed_until_the_next_one_is_settled() -> None:
    """The one before stays in the journal as long as the next could still be cut. (Thesis 4.1; TRAPS 11.)"""
    disk = Disk(FOUNDING)
    journal = disk.journal()
    journal.append(1, 0, encode_command(MembersCommand(voters={"1": ""})))
    journal.forget(0, 1, 1)
    assert [m.commit_id for m in journal.memberships] == [0, 1]
    journal.forget(1, 1, 1)
    assert [m.commit_id for m in journal.memberships] == [0, 1], "not on disk"
    journal.mark_written()
    journal.forget(1, 1, 1)
    assert [m.commit_id for m in journal.memberships] == [1]


def test_who_joins_passes_through_older_memberships() -> None:
    """A node that joins is founded with the membership of entry 3, which took it, and an empty log. Entries 1 to 3
    change nothing of that; a cut does not take it away; entry 4 does change it. (Thesis 4.1.)"""
    told = Membership(term=1, commit_id=3, voters={"1": "", "2": ""}, learners={"9": ""})
    past = [
        MembersCommand(voters={"7": "", "8": ""}),
        MembersCommand(voters={"1": ""}),
        MembersCommand(voters=told.voters),
    ]
    after = MembersCommand(voters={**told.voters, "9": ""})
    log = lengthened([], 1, [encode_command(command) for command in (*past, after)])
    journal = Disk(told).journal()
    journal.accept(GENESIS, log[:2], 0)
    assert journal.memberships == (told,)
    journal._cut(2)
    assert journal.membership == told
    journal.accept(log[0].id, log[1:3], 1)
    assert journal.membership == told
    journal.accept(log[2].id, log[3:], 3)
    assert journal.membership.voters == after.voters
    journal._cut(4)
    assert journal.membership == told
