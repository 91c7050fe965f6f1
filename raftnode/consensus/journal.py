"""The journal: the log as consensus sees it, and the rule for entries that conflict.

    base            written          last
     |                |               |
     v                v               v
     [ kept log ......|...............]      positions are commit_ids, without holes
            ^
            committed: never cut, and at most `written` on a leader that counts itself

Entries up to `written` are on disk; those above are in memory only and go there with the next write. The newest
entries are also kept in memory; older ones come from the `LogReader`, which is the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from msgspec import Raw, Struct

from raftnode.consensus.membership import Membership
from raftnode.messages import Effect, Entry, EntryId, MembersCommand, chain, decode_effect


class LogReader(Protocol):
    """Where older entries come from."""

    def read_id(self, commit_id: int) -> EntryId:
        """The id of an entry that is on disk."""
        ...

    def read_entries(self, first: int, last: int, size: int) -> list[Entry]:
        """Entries from `first` to at most `last`, in order; stops before `size` bytes are passed, but has one."""
        ...


class Mark(Struct, frozen=True, gc=False):
    """A point in a history: an entry's id and its rolling checksum."""

    id: EntryId
    checksum: int


class Unwritten(Struct, frozen=True):
    """What the disk does not have yet: first delete from `cut_from` on (None: nothing to delete), then add."""

    cut_from: int | None
    entries: list[Entry]


class Gap(Exception):
    """The entry before the offered ones is not in this log (thesis 3.5: the consistency check failed)."""


class HistoryDiffers(Exception):
    """Offered entries do not continue this history, though terms say they do: one of the two logs is damaged."""


class Journal:
    """One log. Invariants: base <= commit_id <= last; written <= last; terms never fall along the log."""

    def __init__(self, reader: LogReader, base: Mark, last: Mark, memberships: Sequence[Membership]) -> None:
        """`base` is the point before the first kept entry, `last` the newest entry, which is on disk.

        `memberships` are the ones that the log still needs: the newest committed one first, staged ones after it.
        """
        self.base = base
        self.last = last
        self.written = last.id.commit_id
        self._reader = reader
        self.memberships: tuple[Membership, ...] = ()
        """Those that a restart needs: the newest committed one, and the staged ones after it. Another tuple whenever
        anything about them changes."""
        self.membership: Membership
        """The members in force: the newest membership entry counts from when it is appended (thesis 4.1)."""
        self._set_memberships(tuple(memberships))
        self._kept: dict[int, Entry] = {}
        self._effects: dict[int, Effect] = {}  # of entries that are not carried out yet, as far as they were looked at
        self._kept_first = last.id.commit_id + 1
        self._kept_bytes = 0
        self._cut_from: int | None = None

    def _set_memberships(self, memberships: tuple[Membership, ...]) -> None:
        self.memberships = memberships
        if memberships:
            self.membership = memberships[-1]

    def found(self, membership: Membership) -> None:
        """Set the founding membership of an empty log."""
        assert not self.memberships, "a cluster is founded once"
        self._set_memberships((membership,))

    def bind(self, address: str, node: str) -> None:
        """Remember the node id of a member met for the first time, in every membership that has it unbound."""
        bound = [m.bind(address, node) if m.node_of(address) == "" else m for m in self.memberships]
        self._set_memberships(tuple(bound))

    def correct(self, address: str, node: str) -> None:
        """In the newest committed membership this address belongs to another node than was thought here."""
        first, *staged = self.memberships
        self._set_memberships((first.with_node(address, node), *staged))

    @property
    def has_unwritten(self) -> bool:
        """True when the log in memory is ahead of the disk."""
        return self._cut_from is not None or self.written < self.last.id.commit_id

    @property
    def first(self) -> int:
        """The first kept commit_id (one past `last` in an empty log)."""
        return self.base.id.commit_id + 1

    def term_at(self, commit_id: int) -> int | None:
        """The term of an entry, or of the base; None for what this log does not hold."""
        if (entry := self._kept.get(commit_id)) is not None:
            return entry.term
        if commit_id == self.last.id.commit_id:
            return self.last.id.term
        if commit_id == self.base.id.commit_id:
            return self.base.id.term
        if not self.base.id.commit_id < commit_id < self.last.id.commit_id:
            return None
        return self._reader.read_id(commit_id).term

    def id_at(self, commit_id: int) -> EntryId:
        """The id of a position that this log holds."""
        term = self.term_at(commit_id)
        assert term is not None, f"position {commit_id} is outside {self.first}..{self.last.id.commit_id}"
        return EntryId(term, commit_id)

    def holds(self, id: EntryId) -> bool:
        """True when this log has that entry, and so every entry before it (Log Matching, thesis 3.5)."""
        return self.term_at(id.commit_id) == id.term

    def entries(self, first: int, last: int, size: int) -> list[Entry]:
        """At least one entry from `first` on, up to `last`; stops before `size` bytes of commands are passed."""
        assert self.first <= first <= last <= self.last.id.commit_id, f"{first}..{last} is not in the log"
        if first < self._kept_first:
            return self._reader.read_entries(first, min(last, self._kept_first - 1), size)
        kept = self._kept
        found = [kept[first]]
        size -= found[0].size
        for commit_id in range(first + 1, last + 1):
            entry = kept[commit_id]
            size -= len(entry.command)
            if size < 0:
                break
            found.append(entry)
        return found

    def append(self, term: int, time: int, command: Raw, effect: Effect | None = None) -> Entry:
        """A leader's own entry at the end of the log. `effect`: what the command does, if that is known; else it is
        decoded, and a ProtocolError raised for a command that this node could not carry out."""
        previous = self.last.id
        assert term >= previous.term, f"terms never fall along the log: {term} after {previous.term}"
        commit_id = previous.commit_id + 1
        entry = Entry(term, commit_id, time, chain(self.last.checksum, term, commit_id, time, command), command)
        self._keep(entry, effect or decode_effect(command))
        self.last = Mark(entry.id, entry.checksum)
        return entry

    def accept(self, previous: EntryId, entries: Sequence[Entry], committed: int) -> int:
        """A follower's side (thesis 3.5): stage the leader's entries, and return how far the logs now match.

        Entries that this log already holds are left alone, and so is what follows them; where the terms of one
        position differ, this log is cut from there. What is below the base counts as held: it is committed.
        Nothing has changed when Gap, HistoryDiffers or ProtocolError (a command that is none) is raised.
        """
        match = entries[-1].commit_id if entries else previous.commit_id
        self._check_order(previous, entries)
        if previous.commit_id >= self.base.id.commit_id and not self.holds(previous):
            raise Gap
        fresh = self._unknown(previous, entries)
        if not fresh:
            return match
        first = fresh[0].commit_id
        if first <= committed:
            raise HistoryDiffers(f"entry {first} of term {fresh[0].term} would take the place of a committed one")
        self._check_chain(self._checksum_at(first - 1), fresh)
        effects = [decode_effect(entry.command) for entry in fresh]
        if first <= self.last.id.commit_id:
            self._cut(first)
        for entry, effect in zip(fresh, effects, strict=True):
            self._keep(entry, effect)
        self.last = Mark(entries[-1].id, entries[-1].checksum)
        return match

    def take_effects(self, entries: Sequence[Entry]) -> list[Effect]:
        """What these entries do, now that they are carried out. What was checked before it was acknowledged is not
        decoded again. Raises ProtocolError for an entry from disk that no version of ours wrote."""
        known = self._effects
        return [
            known.pop(entry.commit_id) if entry.commit_id in known else decode_effect(entry.command)
            for entry in entries
        ]

    def _unknown(self, previous: EntryId, entries: Sequence[Entry]) -> Sequence[Entry]:
        """The entries from the first on that this log does not hold."""
        if previous == self.last.id:
            return entries
        for n, entry in enumerate(entries):
            if entry.commit_id <= self.base.id.commit_id:
                continue
            if self.term_at(entry.commit_id) != entry.term:
                return entries[n:]
            if self._checksum_at(entry.commit_id) != entry.checksum:
                raise HistoryDiffers(f"entry {entry.commit_id} of term {entry.term} is another one here")
        return ()

    def hint(self, asked: int, term: int, committed: int) -> EntryId:
        """For a refusal: the newest entry at or before `asked` that a leader whose entry there has `term` could hold.

        Terms never fall along a log, so an entry of a higher term than that can't be the leader's. What is committed
        matches for certain, so the search ends there.
        """
        position = min(asked, self.last.id.commit_id)
        while position > committed and self.id_at(position).term > term:
            position -= 1
        return self.id_at(max(position, self.base.id.commit_id))

    def find(self, hint: EntryId, at_least: int) -> int:
        """A leader's use of a hint: the newest own position at or before it whose term is not higher, and not below
        `at_least`, which is known to match."""
        at_least = min(max(at_least, self.base.id.commit_id), self.last.id.commit_id)
        position = min(hint.commit_id, self.last.id.commit_id)
        while position > at_least and self.id_at(position).term > hint.term:
            position -= 1
        return max(position, at_least)

    def unwritten(self) -> Unwritten:
        """What the next write has to do so that the disk has this log."""
        last = self.last.id.commit_id
        return Unwritten(self._cut_from, [self._kept[n] for n in range(self.written + 1, last + 1)])

    def mark_at(self, commit_id: int) -> Mark:
        """The point in the history right after a position that this log holds."""
        return Mark(self.id_at(commit_id), self._checksum_at(commit_id))

    def begin_after(self, base: Mark) -> None:
        """What is not above `base` was deleted from the disk: compaction. All of it is applied there."""
        assert self.base.id.commit_id <= base.id.commit_id <= self.last.id.commit_id, (
            f"{base.id.commit_id} is not in the log"
        )
        self.base = base
        while self._kept_first <= base.id.commit_id:
            entry = self._kept.pop(self._kept_first, None)
            self._kept_bytes -= 0 if entry is None else entry.size
            self._kept_first += 1

    def begin_anew(self, base: Mark, membership: Membership) -> None:
        """A snapshot as of `base` was installed: the log is empty, and goes on from there. Node ids that this member
        has learned stay known, and so does a newer membership, with which a node that joins has begun."""
        newest = max(self.memberships[0], membership, key=lambda m: m.commit_id)
        self._set_memberships((newest.knowing(self.membership),))
        self.base = self.last = base
        self.written = base.id.commit_id
        self._kept.clear()
        self._effects.clear()
        self._kept_first, self._kept_bytes, self._cut_from = base.id.commit_id + 1, 0, None

    def committed_membership(self, commit_id: int) -> Membership:
        """The newest membership that was committed when `commit_id` was; a newer one, if this log began with that."""
        return [m for m in self.memberships if m.commit_id <= commit_id or m is self.memberships[0]][-1]

    def mark_written(self) -> None:
        """That is on disk."""
        self.written = self.last.id.commit_id
        self._cut_from = None

    def forget(self, applied: int, count: int, size: int) -> None:
        """Let go of entries in memory that are written and applied, oldest first, down to `count` and `size` bytes."""
        settled = min(applied, self.written)
        while self._kept_first <= settled and (len(self._kept) > count or self._kept_bytes > size):
            self._kept_bytes -= len(self._kept.pop(self._kept_first).command)
            self._kept_first += 1
        while len(self.memberships) > 1 and self.memberships[1].commit_id <= settled:
            self._set_memberships(self.memberships[1:])

    def _keep(self, entry: Entry, effect: Effect) -> None:
        """Take an entry in, which follows the one before; `last` is it, or is about to be."""
        self._kept[entry.commit_id] = entry
        self._effects[entry.commit_id] = effect
        self._kept_bytes += len(entry.command)
        if type(effect) is MembersCommand:
            self._take_membership(Membership.of(entry.id, effect))

    def _take_membership(self, membership: Membership) -> None:
        """A node that joins has the membership of that day from the beginning, and then passes through older ones."""
        if membership.commit_id > self.memberships[0].commit_id:
            self._set_memberships((*self.memberships, membership.knowing(self.membership)))

    def _cut(self, first: int) -> None:
        """Take the entries from `first` on away, with the memberships that they made."""
        for commit_id in range(max(first, self._kept_first), self.last.id.commit_id + 1):
            self._kept_bytes -= self._kept.pop(commit_id).size
            self._effects.pop(commit_id, None)
        self._kept_first = min(self._kept_first, first)
        self.last = Mark(self.id_at(first - 1), self._checksum_at(first - 1))
        while len(self.memberships) > 1 and self.membership.commit_id >= first:
            # the first is committed, if not yet known so by a log begun anew
            self._set_memberships(self.memberships[:-1])
        if first <= self.written:
            self.written = first - 1
            self._cut_from = first if self._cut_from is None else min(first, self._cut_from)

    def _checksum_at(self, commit_id: int) -> int:
        if (entry := self._kept.get(commit_id)) is not None:
            return entry.checksum
        for mark in (self.last, self.base):
            if mark.id.commit_id == commit_id:
                return mark.checksum
        return self._reader.read_entries(commit_id, commit_id, 0)[0].checksum

    @staticmethod
    def _check_order(previous: EntryId, entries: Sequence[Entry]) -> None:
        """A message whose entries do not follow each other is a defect of the sender; nothing of it is taken."""
        term, commit_id = previous.term, previous.commit_id
        for entry in entries:
            if entry.commit_id != commit_id + 1 or entry.term < term:
                raise HistoryDiffers(f"entry {entry.commit_id} of term {entry.term} can't follow {commit_id} of {term}")
            term, commit_id = entry.term, entry.commit_id

    @staticmethod
    def _check_chain(checksum: int, entries: Sequence[Entry]) -> None:
        for entry in entries:
            checksum = chain(checksum, entry.term, entry.commit_id, entry.time, entry.command)
            if checksum != entry.checksum:
                raise HistoryDiffers(
                    f"entry {entry.commit_id} of term {entry.term}: checksum {entry.checksum:08x} from the leader, "
                    f"{checksum:08x} here"
                )
