"""The witness: what each member remembers of the promises of the others, so that none comes back without them.

A member whose directory was put back from an old copy still has its node id, but has forgotten votes and entries that
others count on. It can't know that by itself. What a member never takes back, whatever happens to it:

* the term of its ballot never falls, and is on disk before the member speaks in that term (rule 1);
* the vote that it gave in a term is on disk as long as its ballot is of that term; one who votes for itself enters the
  term with that vote, so this concerns the votes for others;
* an entry that it has acknowledged to the leader of some term stays in its log while its ballot is of that term: only
  the leader of a later term could cut it;
* when that leader, while it leads, knows the entry as committed, it stays in the log for good: every later leader has
  it (thesis 3.6.3, Leader Completeness);
* so does an entry that it has itself, as a leader, called committed: its own copy may be one of the majority's.

So a `Witness` of a member is the highest term that it spoke in on its own behalf; the vote that it gave to the witness
in that term, and the newest entry that it was known to hold in it; and as its *floor* the newest of the committed ones.
Nothing else is evidence:

* a pre-vote request and a granted pre-vote carry a term that its sender does not have;
* an acknowledged entry that commits only *after* the leader has lost its office is no floor: a leader of a later term
  may have cut it from this member, and one of a still later term may commit it by the others;
* a commit_id on disk may be older than what was said, as effects are written later (package docstring).

**Who compares.** Not the one who remembers: it would have to compare with a position that the other end has sent at
some moment, and acknowledgements on another connection overtake such a message, which would keep out a healthy node.
Instead members *remind* each other in hello and its answer, and the one who is reminded compares the reminder with its
own ballot and log. What it is reminded of it has itself said, before; so however late a reminder comes, however often,
and by whatever way, a member that has lost nothing keeps it. And the comparison is exact: the log holds the floor or it
does not (Log Matching), while of a log whose end only is known, the end may be of a later position and yet of another
history. One who has forgotten knows it from then on of all members, not of the one who reminded it alone: it refuses
every link, has none itself, and never campaigns. It writes that down, so that it also knows after a restart that finds
nobody who could remind it. When the newest copy of its directory is put back, it is reminded again, and keeps all.

**What stays unnoticed**: what nobody who can be reached remembers. Floors are known between a leader and its followers,
not among these; a term is known to those who were spoken to, and whose log names the member that spoke. A witness goes
to disk at most once a second, and only with a transaction that happens anyway: if its owner is killed, what it learned
in its last second is lost, and what it learned after its last transaction. And an old copy that first meets one who
remembers nothing of it works with that one until another reminds it. Followers are not told the floors of other
followers: the entry of a floor would reach a follower together with that news, and who holds the entry does not vote
for a log that lacks it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Protocol

import msgspec
from msgspec import Struct

from raftnode.consensus.ballot import Ballot
from raftnode.consensus.journal import Mark
from raftnode.messages import GENESIS, EntryId


class History(Protocol):
    """A log, as far as promises are about it: a node's `Journal`, or one that is read from outside."""

    @property
    def base(self) -> Mark:
        """The point before the first kept entry."""
        ...

    def holds(self, id: EntryId) -> bool:
        """True when the log has that entry, and so every entry before it."""
        ...


class Witness(Struct, frozen=True):
    """What one member has promised, as another knows it. `term` and `floor` only rise, `held` within a term, in which
    there is one `vote`."""

    term: int = 0
    """It has spoken in this term: its ballot on disk is of this term or a later one."""
    held: EntryId = GENESIS
    """It has acknowledged this entry in that very term: its log holds it as long as its ballot is of that term."""
    floor: EntryId = GENESIS
    """Its log holds this entry for good: others have counted on its copy, and the entry is committed."""
    vote: str = ""
    """It has voted for this member in that very term; "" when that is not known."""
    node: str = ""
    """Which node has promised it; "" while that is not known. Another node at its address has promised nothing."""

    def joined(self, other: Witness) -> Witness:
        """All that either of the two says, of one node. Of two entries in one history the later one says more."""
        newer, older = (self, other) if self.term >= other.term else (other, self)
        held, vote = newer.held, newer.vote
        if newer.term == older.term:
            held, vote = _later(held, older.held), vote or older.vote
        return Witness(newer.term, held, _later(self.floor, other.floor), vote, self.node or other.node)

    def is_kept(self, ballot: Ballot, journal: History) -> bool:
        """True when nothing of it is forgotten."""
        if ballot.term < self.term or not _is_in(journal, self.floor):
            return False
        is_same = self.vote in ("", ballot.voted_for) and _is_in(journal, self.held)
        return ballot.term > self.term or is_same


def _later(one: EntryId, other: EntryId) -> EntryId:
    return one if one.commit_id >= other.commit_id else other


def _is_in(journal: History, id: EntryId) -> bool:
    """What is not above the journal's base was committed, and so it was held."""
    return id.commit_id <= journal.base.id.commit_id or journal.holds(id)


_NOTHING: Final = Witness()


class Witnesses:
    """What this member remembers, by address: of the node that is the member there now."""

    def __init__(self, known: Mapping[str, Witness], node_of: Callable[[str], str | None] = lambda _member: "") -> None:
        """`node_of` tells which node is the member at an address: "" while its id is not known, None for no member."""
        self._known = dict(known)
        self._node_of = node_of

    def of(self, member: str) -> Witness:
        """What is remembered of `member`."""
        known = self._known.get(member, _NOTHING)
        return known if known.node in ("", self._node_of(member) or known.node) else _NOTHING

    def spoke(self, member: str, term: int) -> None:
        """The member has spoken in `term`, on its own behalf."""
        if term > self.of(member).term:
            self.add(member, Witness(term))

    def add(self, member: str, witness: Witness) -> None:
        """Remember more of `member`; nothing of who is none. That may be a leader, for one who lags: what it promised
        would be taken for a promise of whichever node is at its address when the log tells."""
        if (node := self._node_of(member)) is None:
            return
        known = self.of(member).joined(witness)
        self._known[member] = known if known.node == node or not node else msgspec.structs.replace(known, node=node)

    def facts(self) -> dict[str, Witness]:
        """All of it as it is now, for the disk."""
        return dict(self._known)
