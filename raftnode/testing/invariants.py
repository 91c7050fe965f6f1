"""What must hold after every turn of every member, whatever was lost, delayed, repeated or crashed.

In the manner of LogCabin's invariants: `basic` properties of one member as it is now, `delta` properties against the
last look at it, and properties of the cluster over all that was ever seen. They look at durable state first: what is
in memory is worth nothing after a crash. Each failure is an AssertionError that begins with the name of the broken
property; the names of the thesis (figure 3.2) are used where it has one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from msgspec import UNSET

from raftnode.consensus.ballot import Ballot
from raftnode.consensus.journal import Mark
from raftnode.consensus.membership import Membership
from raftnode.consensus.raft import Raft
from raftnode.messages import (
    DataAnswer,
    DeleteAnswer,
    Entry,
    EntryId,
    GetAnswer,
    PeerAnswer,
    PeerRequest,
    PutAnswer,
    SnapshotAnswer,
    TimeoutNow,
    VoteAnswer,
    VoteRequest,
)

if TYPE_CHECKING:
    from raftnode.testing.network import Reads


class Durable(Protocol):
    """What is on a member's disk. `entries[n]` has commit_id `n + 1`; those up to `base` have been compacted away, or
    came as a snapshot: they are there because they are committed, and so count as held."""

    ballot: Ballot
    commit_id: int

    @property
    def base(self) -> Mark: ...

    @property
    def entries(self) -> Sequence[Entry]: ...
    @property
    def last(self) -> Mark: ...
    @property
    def membership(self) -> Membership: ...
    def holds(self, id: EntryId) -> bool: ...


class Watched(Protocol):
    """A member of a simulated cluster: a pure one (`network.Member`), or a whole node (`simulated.SimulatedNode`)."""

    name: str

    @property
    def node(self) -> str: ...
    @property
    def disk(self) -> Durable: ...
    @property
    def is_up(self) -> bool: ...
    @property
    def raft(self) -> Raft: ...
    @property
    def applied(self) -> Sequence[Entry]: ...
    @property
    def reads(self) -> Reads: ...


class Chosen(NamedTuple):
    """An entry that some member has applied."""

    id: EntryId
    checksum: int
    by_term: int
    """The term of the member that applied it first: it was committed in this term or before."""


class Look(NamedTuple):
    """What a member showed when it was looked at last."""

    ballot: Ballot
    disk_commit_id: int
    commit_id: int
    applied: int
    led_term: int = 0
    """The term that it led; 0 when it did not lead."""
    matches: Mapping[tuple[str, str | None], int] = {}
    """As the leader: how far each other member, by address and node id, held its log."""
    membership: Membership | None = None
    """In force by its log."""


class Invariants:
    """Checks one cluster from its first turn on. `check` is called after each turn with the member that took it."""

    def __init__(self, members: Mapping[str, Watched]) -> None:
        self._members = members
        self.chosen: list[Chosen] = []
        """What was committed, by position: `chosen[n]` has commit_id `n + 1`."""
        self.history: list[Entry] = []
        """The same, as entries: the whole log, which no member needs to have any more."""
        self._leaders: dict[int, str] = {}
        self._votes: dict[tuple[str, int], str] = {}
        self._pre_votes: dict[tuple[str, int], set[str]] = {}  # who granted one, by candidate and term
        self._checksums: dict[EntryId, int] = {}
        self._lost: dict[tuple[str, str], Durable] = {}  # what was on disks that are gone, by address and node
        self._transfers: set[tuple[str, int]] = set()  # who was asked by its leader to campaign for this term
        self._looks = {name: Look(Ballot(), 0, 0, 0) for name in members}
        self._logs: dict[str, tuple[int, Entry | None]] = dict.fromkeys(members, (0, None))
        self._read_floors: dict[object, int] = {}

    def joined(self, member: Watched) -> None:
        """A new member has begun, with an empty disk; or one whose disk was wiped, as another node."""
        self._looks[member.name] = Look(Ballot(), 0, 0, 0)
        self._logs[member.name] = (0, None)
        for name, term in [vote for vote in self._votes if vote[0] == member.name]:
            del self._votes[name, term]

    def lost(self, member: Watched) -> None:
        """The disk of `member` is going to be lost. Others may count on it for a while: it did hold what they think."""
        self._lost[member.name, member.node] = member.disk

    def _disk_of(self, name: str, node: str | None) -> Durable | None:
        """The disk of the node that somebody takes for the member `name`, also if it is lost by now."""
        there = self._members.get(name)
        if there is not None and (node in ("", None, there.node) or not there.node):
            return there.disk
        return self._lost.get((name, node or ""))

    def _copies(self, membership: Membership, id: EntryId) -> list[str]:
        """The voters that have an entry on disk, or had it until the disk was lost."""
        disks = {name: self._disk_of(name, node) for name, node in membership.voters.items()}
        return [name for name, disk in disks.items() if disk is not None and disk.holds(id)]

    @property
    def elections(self) -> int:
        """How many terms have had a leader."""
        return len(self._leaders)

    def check(self, member: Watched) -> None:
        """Everything, after a turn of `member`, which may have ended in a crash."""
        self._check_durable(member)
        self._check_log_matching(member)
        self._check_applied(member)
        if member.is_up:
            self._check_basic(member)
            self._check_leader(member)
            self._check_reads(member)
        self._look(member)

    def sent(self, member: Watched, target: str, message: Any) -> None:
        """A message leaves `member` for `target`: what it says must be on the disk already (thesis 3.8; TRAPS 1, 2)."""
        name, disk = member.name, member.disk
        if isinstance(message, PutAnswer | DeleteAnswer | GetAnswer) and message.commit_id is not UNSET:
            self._check_told(member, message.commit_id)
        if not isinstance(message, PeerRequest | PeerAnswer):
            return  # not of the consensus
        if isinstance(message, VoteRequest | VoteAnswer) and message.pre_vote:
            if isinstance(message, VoteAnswer) and message.data:
                self._pre_votes.setdefault((target, message.term), set()).add(name)
            return  # promises nothing
        assert message.term <= disk.ballot.term, (
            f"disk before words: {name} speaks in term {message.term}, on disk is {disk.ballot}"
        )
        if isinstance(message, TimeoutNow):
            self._check_handover(member, message)
            self._transfers.add((target, message.term + 1))
        if isinstance(message, VoteRequest):
            self._voted(member, message.term, name)
            self._check_campaign(member, message)
        if isinstance(message, VoteAnswer) and message.data:
            self._voted(member, message.term, target)
        if isinstance(message, DataAnswer) and message.data:
            # The leader of a later term may have cut it in the same turn, as if it had been written in between.
            assert message.match <= len(disk.entries) or disk.ballot.term > message.term, (
                f"disk before words: {name} acknowledges {message.match}, on disk are {len(disk.entries)}"
            )
        if isinstance(message, SnapshotAnswer) and message.match:
            assert message.match <= disk.commit_id or message.match <= len(disk.entries), (
                f"disk before words: {name} has installed {message.match}, on disk {disk.commit_id} is committed"
            )
        if isinstance(message, DataAnswer | SnapshotAnswer) and message.data:
            leader = self._leaders.get(message.term, target)
            assert leader == target, (
                f"one leader is followed: {name} takes entries of {target} in term {message.term}, which {leader} leads"
            )

    def _voted(self, member: Watched, term: int, candidate: str) -> None:
        """`member` tells its vote: it is on disk, or a later term is, in which it will never vote again in this one."""
        ballot = member.disk.ballot
        assert ballot == Ballot(term, candidate) or ballot.term > term, (
            f"disk before words: {member.name} votes for {candidate} in term {term}, on disk is {ballot}"
        )
        before = self._votes.setdefault((member.name, term), candidate)
        assert before == candidate, f"one vote a term: {member.name} told {before} and {candidate} in term {term}"

    def _check_handover(self, member: Watched, message: TimeoutNow) -> None:
        """A leader that lets another one campaign leaves no client in doubt: all of its log is committed."""
        assert member.raft.commit_id == len(member.disk.entries), (
            f"a leader hands over what is finished: {member.name} has committed {member.raft.commit_id} of "
            f"{len(member.disk.entries)} entries"
        )
        assert self._leaders.get(message.term) == member.name, f"only a leader hands over: {member.name}"

    def _check_campaign(self, member: Watched, message: VoteRequest) -> None:
        """`member` asks for votes: nobody's term rises before a majority has said that it would vote so (rule 3), or
        their leader has asked for it (thesis 3.10)."""
        term = message.term
        if message.transfer:
            assert (member.name, term) in self._transfers, f"nobody asked {member.name} to take over in term {term}"
            return
        granted = {member.name, *self._pre_votes.get((member.name, term), ())}
        assert _is_majority(_membership(member), granted), (
            f"pre-vote before every campaign: {member.name} asks for votes in term {term}, of {sorted(granted)} only"
        )

    def _check_told(self, member: Watched, commit_id: int) -> None:
        """A client is told of what is committed up to here: it may be what a majority has on disk, and no more."""
        if commit_id > len(self.chosen):
            for membership in self._memberships(member):
                disks = [self._disk_of(name, node) for name, node in membership.voters.items()]
                logs = [disk.entries for disk in disks if disk is not None]
                copies = Counter(log[commit_id - 1].term for log in logs if len(log) >= commit_id)
                if 2 * max(copies.values(), default=0) > len(membership.voters):
                    return
            raise AssertionError(
                f"disk before words: {member.name} tells a client of {commit_id}, which is on no majority of disks"
            )

    def restarted(self, member: Watched) -> None:
        """`member` has come back from its disk: in memory it may have fallen behind what it knew, on disk not."""
        self._look(member)
        self.check(member)

    def read_began(self, token: object) -> None:
        """A linearizable read has begun: its answer must show all that is committed by now."""
        self._read_floors[token] = len(self.chosen)

    def _look(self, member: Watched) -> None:
        disk = member.disk
        look = Look(disk.ballot, disk.commit_id, disk.commit_id, disk.commit_id, membership=_membership(member))
        if member.is_up:
            raft = member.raft
            look = look._replace(commit_id=raft.commit_id, applied=raft.applied)
            if raft.is_leader:
                node_of = raft.membership.node_of
                matches = {(peer, node_of(peer)): progress.match for peer, progress in raft.progress.items()}
                look = look._replace(led_term=raft.term, matches=matches)
        self._looks[member.name] = look

    def _check_durable(self, member: Watched) -> None:
        """Against the last look at the disk; holds across restarts too."""
        before, disk = self._looks[member.name], member.disk
        name, ballot = member.name, disk.ballot
        assert ballot.term >= before.ballot.term, f"term never falls: {name} had {before.ballot}, has {ballot}"
        if ballot.term == before.ballot.term and before.ballot.voted_for is not None:
            assert ballot == before.ballot, f"one vote a term: {name} had {before.ballot}, has {ballot}"
        assert disk.commit_id >= before.disk_commit_id, (
            f"commit_id never falls: {name} had {before.disk_commit_id} on disk, has {disk.commit_id}"
        )
        assert disk.commit_id <= len(disk.entries), f"applied entries are on disk: {name} lacks {disk.commit_id}"

    def _check_basic(self, member: Watched) -> None:
        """Of the member as it is between two turns."""
        name, raft, disk, before = member.name, member.raft, member.disk, self._looks[member.name]
        assert raft.ballot == disk.ballot, f"memory equals disk: {name} has {raft.ballot}, on disk {disk.ballot}"
        written = raft.journal.written
        assert raft.journal.mark_at(written) == disk.last, (
            f"memory equals disk: {name} has {raft.journal.mark_at(written)}, on disk the log ends with {disk.last}"
        )
        if raft.journal.has_unwritten:
            sent = {peer: progress.next - 1 for peer, progress in raft.progress.items()}
            assert raft.is_leader, f"only a leader has entries that are not on its disk: {name} ends with {disk.last}"
            assert sent, f"only a leader of others may write later: the disk of {name} has {disk.last}"
            assert max(sent.values()) <= written, f"what was sent is on disk: {name} has sent {sent}, written {written}"
        assert raft.journal.base == disk.base, (
            f"memory equals disk: the log of {name} begins after {raft.journal.base}, on disk after {disk.base}"
        )
        assert disk.base.id.commit_id <= disk.commit_id, f"what a restart needs is kept: {name} lacks {disk.commit_id}"
        assert raft.commit_id >= before.commit_id, (
            f"commit_id never falls: {name} had {before.commit_id}, has {raft.commit_id}"
        )
        assert raft.applied >= before.applied, f"applied never falls: {name} had {before.applied}, has {raft.applied}"
        assert raft.applied <= raft.commit_id <= disk.last.id.commit_id, (
            f"applied <= commit_id <= last: {name} has {raft.applied}, {raft.commit_id}, {disk.last.id.commit_id}"
        )
        assert len(member.applied) == raft.applied, f"each entry is applied once: {name}"

    def _check_log_matching(self, member: Watched) -> None:
        """Equal ids have equal checksums, which cover all that comes before; terms never fall along a log."""
        log = member.disk.entries
        length, last = self._logs[member.name]
        only_grown = 0 < length <= len(log) and log[length - 1] is last
        for n in range(length if only_grown else 0, len(log)):
            entry = log[n]
            known = self._checksums.setdefault(entry.id, entry.checksum)
            assert entry.checksum == known, f"log matching: {member.name} has another history up to {entry.id}"
            assert entry.commit_id == n + 1, f"positions have no holes: {member.name} has {entry.id} at {n + 1}"
            assert n == 0 or log[n - 1].term <= entry.term, f"terms never fall along the log: {member.name} at {n + 1}"
        self._logs[member.name] = (len(log), log[-1] if log else None)

    def _check_applied(self, member: Watched) -> None:
        """What a member newly applied is what all others have applied there. One that died in this turn counts too, as
        far as its disk tells: it may have been the first."""
        for entry in member.applied[self._looks[member.name].applied :]:
            if entry.commit_id > len(self.chosen):
                self._check_majority(member, entry)
                self.chosen.append(Chosen(entry.id, entry.checksum, member.disk.ballot.term))
                self.history.append(entry)
            chosen = self.chosen[entry.commit_id - 1]
            assert (chosen.id, chosen.checksum) == (entry.id, entry.checksum), (
                f"state-machine safety: {member.name} applied {entry.id}, another member {chosen.id}"
            )

    def _check_majority(self, member: Watched, entry: Entry) -> None:
        """An entry is applied first when a majority of the voters, as `member` knows them, has it on disk (thesis 3.5,
        10.2.1)."""
        found = [(known, self._copies(known, entry.id)) for known in self._memberships(member)]
        assert any(_is_majority(known, copies) for known, copies in found), (
            f"a commit is on a majority of disks: {entry.id} is on those of {found[0][1]} only"
        )

    def _memberships(self, member: Watched) -> list[Membership]:
        """By which a commit of this turn may have been counted: the members may have changed after it."""
        before = self._looks[member.name].membership
        return [_membership(member), *([] if before is None else [before])]

    def _check_leader(self, member: Watched) -> None:
        raft = member.raft
        if not raft.is_leader:
            return
        first = raft.term not in self._leaders
        leader = self._leaders.setdefault(raft.term, member.name)
        assert leader == member.name, f"election safety: {leader} and {member.name} lead term {raft.term}"
        self._check_counted(member)
        if first:
            for chosen in self.chosen:
                assert chosen.by_term >= raft.term or member.disk.holds(chosen.id), (
                    f"leader completeness: {member.name} leads term {raft.term} without {chosen.id}"
                )

    def _check_counted(self, member: Watched) -> None:
        """What a leader counts: copies that are on disks, of which it forgets none, and only entries of its own term
        commit by counting (thesis 3.6.2, rule 5; TRAPS 5, 8)."""
        name, raft, log, before = member.name, member.raft, member.disk.entries, self._looks[member.name]
        if before.led_term == raft.term and raft.commit_id > before.commit_id:
            entry = log[raft.commit_id - 1]
            assert entry.term == raft.term, f"commit by counting: {name} leads term {raft.term}, commits {entry.id}"
        for peer, progress in raft.progress.items():
            match, node = progress.match, raft.membership.node_of(peer)
            known = before.matches.get((peer, node), 0)
            assert before.led_term != raft.term or match >= known, (
                f"match never falls: {name} had {known} of {peer}, has {match}"
            )
            if not match:
                continue
            disk = self._disk_of(peer, node)
            assert disk is not None, f"match is on disk: {name} counts {match} of {peer}, which never was"
            if disk.ballot.term <= raft.term:  # the leader of a later term may have cut it
                assert match <= len(log), f"match is on disk: {name} has {len(log)} and counts {match} of {peer}"
                assert disk.holds(log[match - 1].id), (
                    f"match is on disk: {name} leads term {raft.term} and counts {match} of {peer}, which ends with "
                    f"{disk.last.id}"
                )

    def _check_reads(self, member: Watched) -> None:
        for token, shown in member.reads.answered.items():
            floor = self._read_floors.get(token)
            if floor is not None:
                assert shown >= floor, f"linearizable reads: {token!r} shows {shown}, {floor} was committed before it"
                del self._read_floors[token]


def _membership(member: Watched) -> Membership:
    return member.raft.membership if member.is_up else member.disk.membership


def _is_majority(membership: Membership, who: Collection[str]) -> bool:
    """Worked out here and not by the product."""
    return 2 * len(membership.voters.keys() & set(who)) > len(membership.voters)
