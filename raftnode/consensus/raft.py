"""The state machine that joins ballot, journal, progress, membership and read rounds: one member's side of Raft.

One way in: `clock` and `tick` (time), `step` (a request of another member), `take` (its answer), `propose`, `read`. One
way out: `ready`, which holds all that the driver has to do, in the order that `Ready` tells; then it says `written`.

Time is a monotonic number of seconds, passed in. Members are addresses.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Final, NamedTuple

from msgspec import UNSET, Raw, Struct

from raftnode.config import Role, Settings
from raftnode.consensus.ballot import Ballot
from raftnode.consensus.changes import CatchingUp, ChangeRefused, next_steps, voters_changed
from raftnode.consensus.handover import Handover
from raftnode.consensus.journal import Gap, HistoryDiffers, Journal
from raftnode.consensus.membership import Membership
from raftnode.consensus.progress import Progress
from raftnode.consensus.reads import ReadRounds
from raftnode.consensus.transfer import Incoming
from raftnode.consensus.witness import Witness, Witnesses
from raftnode.errors import ProtocolError
from raftnode.messages import (
    GENESIS,
    Data,
    DataAnswer,
    Effect,
    Entry,
    EntryId,
    Heartbeat,
    HeartbeatAnswer,
    MembersCommand,
    Noop,
    PeerAnswer,
    PeerRequest,
    Reason,
    Snapshot,
    SnapshotAnswer,
    SnapshotReason,
    Staged,
    TimeoutNow,
    TimeoutNowAnswer,
    VoteAnswer,
    VoteRequest,
    encode_command,
)

_TERM_STEP_MAX: Final = 1 << 32
"""Nobody falls so many terms behind: at one election in a millisecond it would take 50 days."""

Ticket = object
"""Whatever the driver wants back with the answer to a request."""


class Ready(Struct):
    """What one turn has to do. The order, kept by `Election.cycle`:

    1. apply `committed`, which a majority holds durably, and answer `reads`; a follower, for which nobody waits, may do
       so after step 4, if there is no `chunk`;
    2. unless `ballot` is set: send `requests` and `answers`, which promise nothing that is not on disk;
    3. one write to the disk, if `Raft.wants_write` or there is a `ballot` or a `chunk`: those, and the cut and the
       entries of the journal;
    4. send what step 2 held back, then `promises`: they say that something is on disk.
    """

    ballot: Ballot | None = None
    """Set when it has changed: then nothing may be said before it is on disk (rule 1)."""
    committed: list[Entry] = []
    requests: list[tuple[str, PeerRequest]] = []
    answers: list[tuple[Ticket, PeerAnswer]] = []
    promises: list[tuple[Ticket, PeerAnswer]] = []
    reads: list[object] = []
    """Tokens of reads that may be answered once `committed` is applied."""
    chunk: Snapshot | None = None
    """A chunk of a snapshot to be put on disk, and, with the last one, the snapshot to be installed: see `written`."""
    dropped_reads: list[object] = []
    """Tokens of reads whose leader has stepped down."""


class _Standing(NamedTuple):
    """What the memberships mean for this member."""

    others: tuple[str, ...]
    has_rivals: bool
    """There are other voters."""
    is_voter: bool
    is_member: bool
    """... by one of those that a restart needs, at least."""


class Raft:
    """One member. Between two `ready` calls any number of inputs may come in.

    Invariants: at most one leader a term; `commit_id` and the ballot's term never fall; `applied <= commit_id`;
    `leader` is set only to who leads the ballot's term.
    """

    def __init__(
        self,
        me: str,
        journal: Journal,
        ballot: Ballot,
        commit_id: int,
        chance: random.Random,
        settings: Settings,
        now: float,
        witnesses: Mapping[str, Witness] | None = None,
        node: str = "",
        incoming: Incoming | None = None,
    ) -> None:
        """`commit_id` is what the store has applied; `now` is when this member starts (seconds, monotonic).
        `witnesses` is what this member remembered before of the others, and of itself when it had forgotten. `node` is
        this node's id: under another one, its address is another member's. `incoming` is how far a snapshot had come
        in."""
        self.me = me
        self.node = node
        self.journal = journal
        self.ballot = ballot
        self.term = ballot.term
        self.commit_id = commit_id
        self.applied = commit_id
        self.role = Role.FOLLOWER
        self.is_leader = False
        """`role` is that of a leader."""
        self.leader: str | None = None
        self.progress: dict[str, Progress] = {}
        self.reads = ReadRounds()
        self.uncommitted_bytes = 0
        """Commands that this leader has staged in its term and not handed out as committed."""
        self.complaint = ""
        """Why entries of the leader were refused last, in words, for the log; "" while all is well."""
        self.witnesses = Witnesses(witnesses or {}, self._node_of)
        self.has_forgotten = not self.witnesses.of(me).is_kept(ballot, journal)
        """This member's disk lacks what it has promised (`witness`): it takes part in nothing, for good."""
        self.incoming = incoming or Incoming()
        """The newest snapshot that was on its way to this member; on disk with each chunk."""
        self._chunk: tuple[Ticket, Snapshot] | None = None  # taken in this turn, and not on disk yet
        self._chance = chance
        self._settings = settings
        self._low = settings.election_low_ms / 1000
        self._beat = settings.heartbeat_ms / 1000
        self._now = now
        self._wall_ms = 0
        self._heard_leader_at = float("-inf")
        self._matched = 0  # this log equals the current leader's up to here; known anew with each leader
        self._led: tuple[str, Membership | None, int] = (me, None, 0)
        # who led last, by which membership, and up to where it said that what we share is committed
        self._spoken: tuple[int, tuple[Membership, ...], set[str]] = (0, (), set())  # see `_note_term`
        self._votes: set[str] = set()
        self._is_refused = False  # in the campaign under way
        self._lost = 0  # campaigns in a row in which somebody refused, without a leader since
        self._confirmed_reads: list[tuple[int, object]] = []  # wait only for their commit_id to be applied
        self._first_own = 0  # commit_id of this leader's no-op
        self._heartbeat_due = now
        self._quorum_until = float("-inf")  # as leader: a majority has answered so lately, see `_hears_majority`
        self._ballot_changed = False
        self._out = Ready()
        self._known_standing: tuple[tuple[Membership, ...], _Standing] | None = None
        self._met: tuple[Membership, dict[str, str]] | None = None  # the leader has progress of these nodes
        self._handover: Handover | None = None
        self._catching_up = CatchingUp(self._low)
        self._told_out = False
        self._is_counted_on = False  # a candidate that lags counts this node as a voter, and no leader was heard since
        self._handed_over_term = 0  # the newest term for which a leader asked another one to campaign
        self.rearm()

    # --- what others may look at ---

    @property
    def membership(self) -> Membership:
        return self.journal.membership

    @property
    def _standing(self) -> _Standing:
        """Asked for several times in each turn, and worked out when the memberships have changed."""
        memberships, known = self.journal.memberships, self._known_standing
        if known is None or known[0] is not memberships:
            newest = memberships[-1]
            standing = _Standing(
                others=tuple(address for address in newest.addresses if address != self.me),
                has_rivals=newest.voters.keys() != {self.me},
                is_voter=self._votes_in(newest),
                is_member=any(self._is_mine(members.node_of(self.me)) for members in memberships),
            )
            self._known_standing = known = (memberships, standing)
        return known[1]

    @property
    def others(self) -> tuple[str, ...]:
        """The other members, learners too, sorted."""
        return self._standing.others

    @property
    def may_serve_reads(self) -> bool:
        """True once this leader knows the cluster's commit_id: its own no-op has committed (TRAPS 6)."""
        return self.is_leader and self.commit_id >= self._first_own

    @property
    def is_outside(self) -> bool:
        """This node is no member any more: by its own log, or by the word of a member whose log is longer. It stays so
        until a leader speaks to it."""
        return self._told_out or not self._standing.is_member

    def _is_mine(self, node: str | None) -> bool:
        """The member known by this id is this node (rule 9)."""
        return node is not None and (not self.node or node in ("", self.node))

    @property
    def has_promised_nothing(self) -> bool:
        """It has never voted, and holds no entry: so nobody counts on it."""
        return self.journal.last.id == GENESIS and self.ballot.voted_for is None

    @property
    def is_handing_over(self) -> bool:
        """This leader takes no commands, as another member is about to lead."""
        return self._handover is not None

    @property
    def was_handed_over(self) -> bool:
        """The leader of this term was asked to take over by the one before it, which is alive and knows."""
        return self._handed_over_term == self.term

    @property
    def successor(self) -> str | None:
        """Who is about to lead."""
        return None if self._handover is None else self._handover.to

    def is_silent(self, peer: str) -> bool:
        """This leader has not heard `peer` for an election timeout."""
        return peer != self.me and peer not in self._heard()

    def is_credible(self, term: int) -> bool:
        """False for a term to which no elections can have led: a message of it is best lost, as Raft lets any message
        be. Whoever took it could be left without a next term to elect a leader in."""
        return term <= self.term + _TERM_STEP_MAX

    def deadline(self) -> float:
        """When `tick` should be called next at the latest."""
        return self._heartbeat_due if self.is_leader else min(self._election_due, self._now + self._beat)

    # --- time ---

    def clock(self, now: float, wall_ms: int = 0) -> None:
        """Time has come to `now`; said before anything else of a turn.

        `wall_ms` is the wall clock that entries appended from here on carry, for people to read.
        """
        gap, self._now, self._wall_ms = now - self._now, max(now, self._now), wall_ms
        if gap > self._low and self._has_rivals():
            self._after_stall()

    def tick(self) -> None:
        """Campaign, send heartbeats or step down, whichever is due; said after the turn's messages were taken, so
        that what a leader or a follower has sent in time also counts in time."""
        if self.is_leader:
            self._lead_on()
        elif self._now >= self._election_due:
            self.campaign()

    def rearm(self) -> None:
        """Start the election timer anew; a cluster of one has nobody to wait for, and may campaign at once."""
        self._arm_election()
        if not self._has_rivals():
            self._election_due = self._now

    def suspect(self, peer: str) -> None:
        """The connection from `peer` was cut, as a crash does. If it led, campaign soon: pre-vote makes that safe,
        as the others refuse while they still hear it."""
        if self.leader == peer and self.role is Role.FOLLOWER:
            self._heard_leader_at = float("-inf")
            self._election_due = min(self._election_due, self._now + self._chance.uniform(0, self._beat))

    def _has_rivals(self) -> bool:
        return self._standing.has_rivals

    def _after_stall(self) -> None:
        """This node did not run for an election timeout (TRAPS 18, 19): others may have moved on. Take no
        decision from old timers; a leader gives up rather than go on as if nothing had happened."""
        if self.is_leader:
            self._become_follower(self.term, None)
        else:
            self._arm_election()

    def _lead_on(self) -> None:
        if self._handover is not None and self._now >= self._handover.deadline:
            self._handover = None
            if not self._votes_in(self.membership):
                self._become_follower(self.term, None)
                return
        if self._now > self._quorum_until and not self._hears_majority():
            self._become_follower(self.term, None)
        elif self._now >= self._heartbeat_due:
            for progress in self.progress.values():
                progress.release()
                if progress.unanswered and self._now - progress.unanswered[0][1] > self._low:
                    progress.lost()
            self.reads.start()
            self._send_heartbeats()

    def _hears_majority(self) -> bool:
        """Check-quorum (thesis 6.2): a majority answered within the least election timeout. Also notes until when that
        will be so even if nobody answers any more."""
        heard_at = {peer: progress.heard_at for peer, progress in self.progress.items()}
        self._quorum_until = self._low + self.membership.agreed({**heard_at, self.me: self._now})
        return self._now <= self._quorum_until

    def _heard(self) -> set[str]:
        """Who has answered within the least election timeout; this member hears itself."""
        return {self.me, *(p for p, progress in self.progress.items() if self._now - progress.heard_at <= self._low)}

    def _hears_leader(self) -> bool:
        """This voter has a leader and should not help to replace it (thesis 4.2.3)."""
        return self.is_leader or (self.leader is not None and self._now - self._heard_leader_at < self._low)

    def _arm_election(self) -> None:
        """A new random time-out, at every start of the timer (thesis 3.4)."""
        low, high = self._settings.election_low_ms, self._settings.election_high_ms
        self._election_due = self._now + self._chance.uniform(low, high) / 1000

    def _try_again_soon(self) -> None:
        """Somebody has refused, so most likely another member campaigns at the same time, as when a leader dies and all
        see that at once. Whoever wins is heard within moments; if nobody does, do not wait for a whole time-out. The
        time doubles with each such campaign until it is that of any election; what is drawn keeps the rivals apart
        (thesis 3.4)."""
        if not self._is_refused:
            self._is_refused = True
            beats = self._chance.uniform(0.5, 0.5 + 2 ** min(self._lost, 10))
            self._lost += 1
            self._election_due = min(self._election_due, self._now + beats * self._beat)

    # --- campaigns ---

    def campaign(self) -> None:
        """Ask for a pre-vote; with a majority of those, for votes (thesis 9.6). See `_may_campaign`."""
        self._arm_election()
        if not self._may_campaign:
            return
        self.remember()
        self._set_role(Role.PRE_CANDIDATE)
        self.leader = None
        self._votes = {self.me}
        self._is_refused = False
        self._ask_for_votes(self.term + 1, pre_vote=True)

    @property
    def _may_campaign(self) -> bool:
        """Voters do, and none who has forgotten its promises. Who is taken out by an entry that may not be committed
        yet still campaigns, without a vote of its own: it can be the only one with that entry (thesis 4.2.2). So does a
        learner on whose vote a candidate counts, by an entry that only the candidate has, when the learner's log is the
        newer one: it can't give its vote, and if another voter is gone for good, nobody else can win."""
        is_voter = any(self._votes_in(members) for members in self.journal.memberships)
        is_needed = self._is_counted_on and self._is_mine(self.membership.learners.get(self.me))
        return (is_voter or is_needed) and not self.has_forgotten and not self._told_out

    def _votes_in(self, members: Membership) -> bool:
        return self._is_mine(members.voters.get(self.me))

    def _become_candidate(self, is_transfer: bool = False) -> None:
        self._set_ballot(self.ballot.in_term(self.term + 1).vote(self.me))
        self._set_role(Role.CANDIDATE)
        self.leader = None
        self._votes = {self.me}
        self._is_refused = False
        self._arm_election()
        if is_transfer:
            self._handed_over_term = self.term
        self._ask_for_votes(self.term, pre_vote=False, is_transfer=is_transfer)

    def _ask_for_votes(self, term: int, pre_vote: bool, is_transfer: bool = False) -> None:
        for voter in sorted(self.membership.voters):
            if voter != self.me:
                self.send_vote_request(voter, term, pre_vote, is_transfer)
        self._count_votes()

    def send_vote_request(self, voter: str, term: int, pre_vote: bool, is_transfer: bool = False) -> None:
        """One vote request to one voter."""
        last = self.journal.last.id
        staged = Staged(address=self.me, term=last.term, commit_id=last.commit_id)
        request = VoteRequest(
            term=term, commit_id=self.commit_id, staged=staged, pre_vote=pre_vote, transfer=is_transfer
        )
        self._send(voter, request)

    def _count_votes(self) -> None:
        if self.membership.is_majority(self._votes):
            if self.role is Role.PRE_CANDIDATE:
                self._become_candidate()
            elif self.role is Role.CANDIDATE:
                self._become_leader()

    # --- roles ---

    def _set_role(self, role: Role) -> None:
        if self.is_leader and role is not Role.LEADER:
            self.progress = {}
            self._met = self._handover = None
            self._out.dropped_reads += [*self.reads.drop(), *(token for _, token in self._confirmed_reads)]
            self._confirmed_reads = []
            self.uncommitted_bytes = 0
        self.role = role
        self.is_leader = role is Role.LEADER

    def _set_ballot(self, ballot: Ballot) -> None:
        self.ballot = ballot
        self.term = ballot.term
        self._ballot_changed = True

    def _become_follower(self, term: int, leader: str | None) -> None:
        """Follow in `term`. The election timer goes on: only a leader's message or a granted vote starts it anew."""
        led = self.is_leader
        self.remember()
        if term > self.term:
            self._set_ballot(self.ballot.in_term(term))
        self._matched = 0  # even if the leader is one that was known: what matched in its last term says nothing here
        self.complaint = ""
        self._set_role(Role.FOLLOWER)
        self.leader = leader
        if led:
            self._arm_election()

    def _become_leader(self) -> None:
        """Lead: a no-op of the new term goes first, as only entries of one's own term commit by counting."""
        self._set_role(Role.LEADER)
        self.leader = self.me
        self._heartbeat_due = self._now
        self.uncommitted_bytes = 0
        self.progress = {}
        self._met = None
        self._catching_up.clear()
        self._meet_members()
        self._first_own = self.journal.last.id.commit_id + 1
        self._append(encode_command(Noop()))

    # --- commands and reads of clients (leader only) ---

    def propose(self, command: Raw, effect: Effect | None = None) -> int:
        """Append a command in this leader's term; returns its commit_id. `effect`: what it does, if that is known."""
        assert self.is_leader, "only a leader appends, in its own term (TRAPS 10)"
        assert not self.is_handing_over, "what is appended now would keep the successor waiting"
        return self._append(command, effect)

    def _append(self, command: Raw, effect: Effect | None = None) -> int:
        entry = self.journal.append(self.term, self._wall_ms, command, effect)
        self.uncommitted_bytes += len(command)
        return entry.commit_id

    def read(self, token: object) -> None:
        """A linearizable read arrives (rule 7). Its token comes back in `Ready.reads`, or in `dropped_reads`."""
        assert self.may_serve_reads, "no reads before the leader's own no-op has committed"
        self.reads.add(token, self.commit_id)

    # --- the membership (leader only; `changes` tells what a change may be) ---

    def check_may_change(self) -> None:
        """Raises ChangeRefused while this leader may not change the members: the change before is not committed, or no
        entry of its own is. Without that second rule two leaders could each make a change from one membership, with
        majorities that share nobody (the error in the thesis that was found in 2015; TRAPS 31)."""
        assert self.is_leader, "only a leader changes the members"
        if not self.may_serve_reads:
            raise ChangeRefused("no_leader", f"{self.me} leads, but has committed no entry yet; try again")
        if self.is_handing_over:
            raise ChangeRefused("change_under_way", f"{self.me} is handing over to {self.successor}; try again")
        if self.membership.commit_id > self.commit_id:
            raise ChangeRefused(
                "change_under_way",
                f"another change of the members (entry {self.membership.commit_id}) is not committed yet; try again",
            )

    def change(self, command: MembersCommand, force: bool = False) -> int:
        """Append a membership, in force from now on; returns its commit_id. `force`: also when too few voters are heard
        to commit it now. Raises ChangeRefused."""
        self.check_may_change()
        assert len(voters_changed(self.membership, command)) <= 1, "one at a time: majorities must overlap"
        if not force and not self._has_live_majority(command):
            alive = ", ".join(sorted(self._answering() & command.voters.keys())) or "none"
            raise ChangeRefused(
                "no_live_majority",
                f"of the voters {', '.join(command.voters)} that this would leave, only these answer: {alive}. That is "
                "no majority, and nothing could be written until more of them come back; with force it is done "
                "nevertheless",
            )
        self.remember()
        commit_id = self._append(encode_command(command))
        self._meet_members()
        return commit_id

    def _has_live_majority(self, command: MembersCommand) -> bool:
        """A change that gives or takes no vote can't make it worse."""
        after = Membership(voters=command.voters)
        return after.is_majority(self._answering()) or not voters_changed(self.membership, command)

    def _answering(self) -> set[str]:
        """As `_heard`, without those whom a new leader only grants that they may be there."""
        heard = self._heard()
        return {self.me, *(p for p, progress in self.progress.items() if progress.has_answered and p in heard)}

    def next_change(self) -> MembersCommand | None:
        """What this leader should change now by itself: see `changes.next_steps`."""
        members = self.journal.membership
        if not self.is_leader or not (members.learners or members.replaces):
            return None
        self._meet_members()
        heard = self._heard() - {self.me}  # a leader may be a learner itself, until it hands over
        matches = {learner: self.progress[learner].match for learner in members.learners if learner in heard}
        caught_up = self._catching_up.caught_up(matches, self.commit_id, self._now)
        try:
            self.check_may_change()
        except ChangeRefused:
            return None  # its turn comes
        return next((step for step in next_steps(members, caught_up) if self._has_live_majority(step)), None)

    def hand_over(self, to: str | None = None) -> str:
        """Let another voter lead (thesis 3.10): `to`, or whoever holds most of the log. Returns who. From now on
        nothing is appended; after an election timeout this leader goes on if it still leads. Raises ChangeRefused."""
        assert self.is_leader, "only a leader hands over"
        self._meet_members()
        if self._handover is not None:
            raise ChangeRefused("change_under_way", f"{self.me} is handing over to {self._handover.to} already")
        heard = self._heard() - {self.me}
        if to is None:
            voters = sorted(self.membership.voters.keys() & heard)
            if not voters:
                raise ChangeRefused("no_successor", "no other voter answers: nobody could take over")
            to = max(voters, key=lambda voter: self.progress[voter].match)
        elif to not in self.membership.voters:
            is_learner = to in self.membership.learners
            code, why = ("not_voter", "has no vote yet") if is_learner else ("no_such_member", "is no member")
            raise ChangeRefused(code, f"{to} {why}: it can't lead")
        elif to not in heard:
            raise ChangeRefused("no_successor", f"{to} does not answer: it could not take over")
        self._handover = Handover(to, self._now + self._low)
        return to

    def _drive_handover(self) -> None:
        """When everything is committed and the successor has it, so that no client is left in doubt, it is its turn. A
        leader that its own change has taken out leads until that is committed, and hands over then (thesis 4.2.2)."""
        if self._handover is None and not self._standing.is_voter and self.membership.commit_id <= self.applied:
            try:
                self.hand_over()
            except ChangeRefused:
                self._become_follower(self.term, None)
                return
        if (handover := self._handover) is None:
            return
        last, progress = self.journal.last.id.commit_id, self.progress.get(handover.to)
        if not handover.is_asked and progress is not None and progress.match == self.applied == last:
            handover.is_asked = True
            self._send(handover.to, TimeoutNow(term=self.term, leader=self.me))

    def stand_outside(self) -> None:
        """A member tells this node that it has been taken out, by an entry that is newer than what this node has. Who
        follows a leader is in its hands; a leader that does not know of that entry is none any more."""
        if self.is_leader or not self._hears_leader():
            self._told_out = True
            self._become_follower(self.term, None)

    def give_up_identity(self, node: str) -> None:
        """The others know this address as another node: the one whose disk this was. Until the log says that this node
        is a member, it has no part in any election."""
        self.journal.correct(self.me, node)
        self._become_follower(self.term, None)

    # --- requests of other members ---

    def step(self, ticket: Ticket, message: PeerRequest, first_hand: bool = True) -> None:
        """Take a request of another member; its answer comes in `ready` with the ticket. `first_hand` is false when not
        that member itself has sent it, but a program that speaks for it."""
        match message:
            case Data():
                self._on_data(ticket, message)
            case Heartbeat():
                self._on_heartbeat(ticket, message)
            case VoteRequest():
                self._on_vote_request(ticket, message)
            case TimeoutNow():
                self._on_timeout_now(ticket, message)
            case Snapshot():
                self._on_snapshot(ticket, message)
        if first_hand:
            self._witness_request(message)

    def _on_vote_request(self, ticket: Ticket, message: VoteRequest) -> None:
        if message.transfer:
            self._handed_over_term = max(message.term, self._handed_over_term)
        granted = self._grants_pre_vote(message) if message.pre_vote else self._grants_vote(message)
        self._is_counted_on = self._is_counted_on or not self._is_up_to_date(message)
        term = message.term if granted else self.term
        self._out.answers.append((ticket, VoteAnswer(data=granted, term=term, pre_vote=message.pre_vote)))

    def _on_timeout_now(self, ticket: Ticket, message: TimeoutNow) -> None:
        """The leader of this term wants this member to lead (thesis 3.10): no pre-vote, as it has agreed itself."""
        takes_over = (
            message.term == self.term
            and message.leader == self.leader
            and self.role is Role.FOLLOWER
            and self._may_campaign
        )
        if takes_over:
            self.remember()
            self._become_candidate(is_transfer=True)
        self._out.answers.append((ticket, TimeoutNowAnswer(data=takes_over, term=self.term)))

    def _grants_pre_vote(self, message: VoteRequest) -> bool:
        """Would this node vote so? Promises nothing and changes nothing (thesis 9.6)."""
        is_free = not self._hears_leader() and self._may_vote
        return message.term > self.term and is_free and self._is_up_to_date(message)

    @property
    def _may_vote(self) -> bool:
        """The node that this address is known by may have voted already. Who is no member by its own log may be one by
        the candidate's (TRAPS 32)."""
        node = self.membership.node_of(self.me)
        return node is None or self._is_mine(node)

    def _grants_vote(self, message: VoteRequest) -> bool:
        """One vote a term, for a candidate whose log is at least as up to date (thesis 3.4, 3.6.1). A granted vote
        starts the voter's timer anew; a refused one does not."""
        if message.term < self.term or not self._may_vote:
            return False
        if message.term > self.term:
            if self._hears_leader() and not message.transfer:
                return False
            self._become_follower(message.term, None)
        candidate = message.staged.address
        if (
            self.leader not in (None, candidate)
            or not self.ballot.may_vote_for(candidate)
            or not self._is_up_to_date(message)
        ):
            return False
        self._set_role(Role.FOLLOWER)
        if self.ballot.voted_for is None:
            self._set_ballot(self.ballot.vote(candidate))
        self._arm_election()
        return True

    def _is_up_to_date(self, message: VoteRequest) -> bool:
        return message.staged.last >= self.journal.last.id

    def _on_heartbeat(self, ticket: Ticket, message: Heartbeat) -> None:
        """The leader lives. Commits only up to what is known to match this leader's log (rule 6)."""
        if self._follow(message.term, message.leader):
            self._commit_to(min(message.commit_id, self._matched))
        answer = HeartbeatAnswer(term=self.term, commit_id=self.commit_id, round=message.round)
        self._out.answers.append((ticket, answer))

    def _on_data(self, ticket: Ticket, message: Data) -> None:
        """Stage the leader's entries (thesis 3.5); the answer promises that they are on disk."""
        if not self._follow(message.term, message.leader):
            self._refuse(ticket, message, "stale_term" if message.term < self.term else "two_leaders")
            return
        try:
            self._check_terms(message)
            match = self.journal.accept(message.previous, message.entries, self.commit_id)
        except Gap:
            self._refuse(ticket, message, "gap")
            return
        except HistoryDiffers as difference:
            self.complaint = str(difference)
            self._refuse(ticket, message, "checksum")
            return
        except ProtocolError as error:
            self.complaint = str(error)
            self._refuse(ticket, message, "unknown_command")
            return
        self.complaint = ""
        self.incoming = self.incoming.over()  # this log does without a snapshot
        self._matched = max(self._matched, match)
        self._commit_to(min(message.commit_id, match))
        answer = DataAnswer(data=True, term=self.term, commit_id=self.commit_id, match=match)
        self._out.promises.append((ticket, answer))

    @staticmethod
    def _check_terms(message: Data) -> None:
        """A leader has no entry of a later term than its own. Taken, it would stand in the way of this member's own
        entries once it leads."""
        if message.entries and message.entries[-1].term > message.term:
            raise HistoryDiffers(f"an entry of term {message.entries[-1].term} from a leader of term {message.term}")

    def refuse_for_space(self, ticket: Ticket, message: Data) -> None:
        """The driver has no room for these entries: the leader is heard, its entries are not taken."""
        if self._follow(message.term, message.leader):
            self._refuse(ticket, message, "storage_full")
        else:
            self._refuse(ticket, message, "stale_term")

    def _refuse(self, ticket: Ticket, message: Data, reason: Reason) -> None:
        hint = GENESIS
        if reason == "gap":
            hint = self.journal.hint(message.previous.commit_id, message.previous.term, self.commit_id)
        answer = DataAnswer(
            data=False,
            term=self.term,
            commit_id=self.commit_id,
            asked=message.previous.commit_id,
            last=hint,
            reason=reason,
        )
        self._out.answers.append((ticket, answer))

    def _on_snapshot(self, ticket: Ticket, message: Snapshot) -> None:
        """A chunk of the leader's state (thesis 5.3), for the next transaction. What is held already is not installed:
        an entry that the leader calls committed is so here too."""
        if not self._follow(message.term, message.leader):
            self._refuse_snapshot(ticket, message, "stale_term" if message.term < self.term else "two_leaders")
        elif self._does_without(message):
            self._promise_end(ticket, message)
        elif self._chunk is not None:
            self._refuse_snapshot(ticket, message, "busy")
        else:
            verdict = self.incoming.judge(message.term, message.transfer, message.seq)
            if verdict == "restart":
                self._refuse_snapshot(ticket, message, "restart")
            elif verdict == "again":
                self._out.promises.append((ticket, self._taken(message)))
            else:
                self._chunk = ticket, message
                is_over = message.end is not UNSET
                self.incoming = Incoming(message.term, message.transfer, message.seq, is_over)

    def _does_without(self, message: Snapshot) -> bool:
        """True for the last chunk of a state that this log has reached by itself."""
        if message.end is UNSET:
            return False
        return message.end.id.commit_id <= self.commit_id or self.journal.holds(message.end.id)

    def _promise_end(self, ticket: Ticket, message: Snapshot) -> None:
        assert message.end is not UNSET, "it was looked at"
        match = message.end.id.commit_id
        if (self.leader, self.term) == (message.leader, message.term):
            self._matched = max(self._matched, match)
        self._commit_to(match)
        self._out.promises.append((ticket, self._taken(message, match)))

    def _taken(self, message: Snapshot, match: int = 0) -> SnapshotAnswer:
        """In the term of the leader that sent it: this node may have gone on to a later one before it was written."""
        return SnapshotAnswer(data=True, term=message.term, transfer=message.transfer, seq=message.seq, match=match)

    def refuse_snapshot(self, ticket: Ticket, message: Snapshot, reason: SnapshotReason) -> None:
        """The driver has no room for this chunk, or found it damaged: the leader is heard, the chunk is not taken."""
        self._refuse_snapshot(ticket, message, reason if self._follow(message.term, message.leader) else "stale_term")

    def _refuse_snapshot(self, ticket: Ticket, message: Snapshot, reason: SnapshotReason) -> None:
        answer = SnapshotAnswer(data=False, term=self.term, transfer=message.transfer, seq=message.seq, reason=reason)
        self._out.answers.append((ticket, answer))

    def _chunk_written(self, has_installed: bool) -> None:
        """The chunk of this turn is on disk, and with the last one the state is installed, if it was complete."""
        assert self._chunk is not None, "there was one"
        (ticket, message), self._chunk = self._chunk, None
        if message.end is UNSET:
            self._out.answers.append((ticket, self._taken(message)))
        elif not has_installed:
            self.complaint = f"the snapshot of {message.leader} does not have as many keys as it should"
            self._refuse_snapshot(ticket, message, "restart")
        else:
            match = self.commit_id = self.applied = message.end.id.commit_id
            self._matched = match if (self.leader, self.term) == (message.leader, message.term) else 0
            self._out.answers.append((ticket, self._taken(message, match)))

    def _follow(self, term: int, leader: str) -> bool:
        """True when the message comes from the leader of this node's term, after a term change if need be."""
        if term < self.term:
            return False
        if term == self.term and self.leader not in (None, leader):
            self.complaint = f"two leaders in term {term}: {self.leader} and {leader}"  # Raft's first promise is broken
            return False
        if term > self.term or self.role is not Role.FOLLOWER or self.leader is None:
            self._become_follower(term, leader)
        self._heard_leader_at = self._now
        self._told_out = self._is_counted_on = False
        self._lost = 0
        self._arm_election()
        return True

    def _commit_to(self, commit_id: int) -> None:
        assert commit_id <= self.journal.last.id.commit_id, "nothing commits that is not in the log"
        self.commit_id = max(self.commit_id, commit_id)

    # --- answers of other members ---

    def take(self, peer: str, answer: PeerAnswer) -> None:
        """Take the answer of `peer` to a request of ours. Late ones and those of other terms change nothing."""
        if self.has_forgotten:
            return
        granted_pre_vote = isinstance(answer, VoteAnswer) and answer.pre_vote and answer.data
        if not granted_pre_vote:
            self._note_term(peer, answer.term)
        if isinstance(answer, VoteAnswer) and answer.data and not answer.pre_vote:
            self.witnesses.add(peer, Witness(answer.term, vote=self.me))
        if answer.term > self.term and not granted_pre_vote:
            self._become_follower(answer.term, None)
            return
        match answer:
            case VoteAnswer():
                self._on_vote(peer, answer)
            case HeartbeatAnswer() if self.is_leader and answer.term == self.term:
                self._on_heartbeat_answer(peer, answer)
            case DataAnswer() if self.is_leader and answer.term == self.term:
                self._on_data_answer(peer, answer)
            case SnapshotAnswer() if self.is_leader and answer.term == self.term:
                self._on_snapshot_answer(peer, answer)

    def may_wait(self, peer: str, answer: PeerAnswer) -> bool:
        """True for an answer with which nothing commits, no read goes on and nothing is sent: it says only that `peer`
        is there, and may be taken with whatever comes next, within a heartbeat."""
        progress = self.progress.get(peer)
        if progress is None or answer.term != self.term or progress.probing or progress.needs_snapshot:
            return False
        match answer:
            case HeartbeatAnswer():
                return not self.reads.is_running and answer.commit_id >= min(progress.told, progress.match)
            case DataAnswer():
                is_all = progress.next > self.journal.last.id.commit_id
                is_changing = self._handover is not None or bool(self.journal.membership.learners)
                return answer.data and answer.match <= self.commit_id and is_all and not is_changing
        return False

    def _on_vote(self, peer: str, answer: VoteAnswer) -> None:
        wanted = Role.PRE_CANDIDATE if answer.pre_vote else Role.CANDIDATE
        term = self.term + 1 if answer.pre_vote else self.term
        if self.role is not wanted:
            return
        if answer.data and answer.term == term:
            self._votes.add(peer)
            self._count_votes()
        elif not answer.data and answer.term == self.term:
            self._try_again_soon()

    def _on_heartbeat_answer(self, peer: str, answer: HeartbeatAnswer) -> None:
        progress = self.progress.get(peer)
        if progress is None:
            return
        progress.heard(self._now)
        progress.round = max(progress.round, min(answer.round, self.reads.number))
        if not progress.unanswered and answer.commit_id < min(progress.told, progress.match):
            progress.lost()  # it was restarted and does not know any more that it matches
        if progress.needs_snapshot and answer.commit_id >= self.journal.base.id.commit_id:
            progress.found(answer.commit_id)  # it has installed one, and the answer was lost
        rounds = {voter: other.round for voter, other in self.progress.items()}
        self._finish_reads(self.membership.agreed({**rounds, self.me: self.reads.number}))

    def _finish_reads(self, round: int) -> None:
        self._confirmed_reads.extend(self.reads.confirm(round))

    def _on_data_answer(self, peer: str, answer: DataAnswer) -> None:
        progress = self.progress.get(peer)
        if progress is None:
            return
        progress.heard(self._now)
        if answer.data and answer.match > self.journal.last.id.commit_id:
            self.complaint = f"{peer} says that it holds {answer.match}, which was never sent"
        elif answer.data:
            progress.acknowledged(answer.match)
            self.complaint = ""
            if progress.match > self.commit_id:
                self._count_copies()
        elif progress.is_stale(answer.asked):
            return
        elif answer.reason == "gap" and answer.asked <= self.journal.base.id.commit_id:
            progress.lacks()
        elif answer.reason == "gap":
            progress.refused(self.journal.find(answer.last, at_least=max(answer.commit_id, progress.match)))
        else:
            self.complaint = f"{peer} takes no entries: {answer.reason}"
            progress.hold_back()

    @property
    def lacking(self) -> tuple[str, ...]:
        """As leader: the members that lack entries which this log no longer has, and so need a snapshot, sorted."""
        lacking = [peer for peer, progress in self.progress.items() if progress.needs_snapshot]
        return tuple(sorted(lacking)) if lacking else ()

    def _on_snapshot_answer(self, peer: str, answer: SnapshotAnswer) -> None:
        """Of the chunks in between the driver takes care; a snapshot that is installed is as good as the entries."""
        progress = self.progress.get(peer)
        if progress is None:
            return
        progress.heard(self._now)
        if answer.match > self.journal.last.id.commit_id:
            self.complaint = f"{peer} says that it holds {answer.match}, which was never sent"
        elif answer.data and answer.match > progress.match:
            progress.installed(answer.match)
            self._count_copies()

    def _count_copies(self) -> None:
        """Commit what a majority holds durably, if it is of this term; older entries commit with it (thesis 3.6.2).

        This node counts only what it has written itself (thesis 10.2.1).
        """
        matches = {peer: progress.match for peer, progress in self.progress.items()}
        agreed = self.journal.membership.agreed({**matches, self.me: self.journal.written})
        if agreed > self.commit_id and self.journal.term_at(agreed) == self.term:
            self._commit_to(agreed)

    def unreachable(self, peer: str) -> None:
        """The link to `peer` was cut: what was under way may be lost."""
        self.remember()
        if (progress := self.progress.get(peer)) is not None:
            progress.lost()

    # --- promises (see `witness`) ---

    def remember(self) -> Witnesses:
        """What this member knows of the promises of the others, as of now. What it knows of their logs is added only
        here, as it is asked for seldom: of the members that this one leads, and of the one that led it last."""
        leader, members, position = self._led
        node = None if members is None else members.node_of(leader)
        is_same = node == self.membership.node_of(leader)  # else its disk was lost since, and with it what it held
        if is_same and self._is_news(position, self.witnesses.of(leader).floor):
            self.witnesses.add(leader, Witness(floor=self.journal.id_at(position)))
        for peer, progress in self.progress.items():
            known, match, position = self.witnesses.of(peer), progress.match, min(progress.match, self.commit_id)
            if self._is_news(match, known.held):
                self.witnesses.add(peer, Witness(self.term, held=self.journal.id_at(match)))
            if self._is_news(position, known.floor):
                self.witnesses.add(peer, Witness(floor=self.journal.id_at(position)))
        return self.witnesses

    def _is_news(self, position: int, known: EntryId) -> bool:
        return position > max(known.commit_id, self.journal.base.id.commit_id)

    def _node_of(self, member: str) -> str | None:
        """Which node has the promises that are made at this address; of itself this one knows that whatever the log
        says, as it may be taken out or known as another."""
        return self.node if member == self.me else self.membership.node_of(member)

    def remind(self, witness: Witness) -> bool:
        """Another member tells what this one has promised; false when it has forgotten that, or anything before."""
        if not witness.is_kept(self.ballot, self.journal):
            self.witnesses.add(self.me, witness)
            self.has_forgotten = True
            self._become_follower(self.term, None)
        return not self.has_forgotten

    def _witness_request(self, message: PeerRequest) -> None:
        """Who sends it is in its term; a leader has on disk what it calls committed, as it can't hear of copies of its
        entries before the turn in which it has sent and written them is over."""
        if isinstance(message, VoteRequest):
            if not message.pre_vote:
                self._note_term(message.staged.address, message.term)
            return
        self._note_term(message.leader, message.term)
        if isinstance(message, TimeoutNow | Snapshot):
            return
        if message.leader == self.leader and message.term == self.term:
            self._led = (message.leader, self.journal.membership, min(message.commit_id, self._matched))

    def _note_term(self, member: str, term: int) -> None:
        """A member has spoken in `term`. Each of its messages says so; it is looked at once for each term, and for each
        membership, as another node at its address has not spoken."""
        noted_term, memberships, members = self._spoken
        if noted_term != self.term or memberships is not self.journal.memberships:
            self._spoken = (self.term, self.journal.memberships, members := set())
        if term != self.term or member not in members:
            self.witnesses.spoke(member, term)
        if term == self.term:
            members.add(member)

    # --- the way out ---

    def ready(self) -> Ready:
        """Everything that has become due since the last call, for the driver to do in the order of `Ready`."""
        if self.is_leader:
            self._meet_members()
            if self._handover is not None or not self._standing.is_voter:
                self._drive_handover()
        if self.is_leader:
            self._replicate()
        if self._chunk is not None:
            self._look_at_chunk()
        out, self._out = self._out, Ready()
        if self._ballot_changed:
            out.ballot, self._ballot_changed = self.ballot, False
        out.committed = self._hand_out_committed()
        out.chunk = None if self._chunk is None else self._chunk[1]
        if self._confirmed_reads:
            out.reads = [token for commit_id, token in self._confirmed_reads if commit_id <= self.applied]
            self._confirmed_reads = [read for read in self._confirmed_reads if read[0] > self.applied]
        return out

    @property
    def wants_write(self) -> bool:
        """Some of the log is not on disk, and should be after this turn. A leader writes its own copies while others
        write theirs (thesis 10.2.1), so not before it has sent them to one: what still waits for the window of every
        member can't be on a majority of disks any sooner for it, and more goes into one write."""
        journal = self.journal
        if not journal.has_unwritten:
            return False
        if not self.is_leader or not self._standing.has_rivals:
            return True
        return any(progress.next > journal.written + 1 for progress in self.progress.values())

    def _look_at_chunk(self) -> None:
        """The log may have reached the end of a snapshot in the turn in which its last chunk has come."""
        if self._chunk is not None and self._does_without(self._chunk[1]):
            (ticket, message), self._chunk = self._chunk, None
            self._promise_end(ticket, message)

    def written(self, has_installed: bool = False) -> bool:
        """What the last `ready` asked for is on disk; now this node counts its own copy. `has_installed`: its chunk was
        the last of a snapshot, and the journal and the state are now those of the snapshot. False when nothing can have
        come of it that another `ready` would tell."""
        assert not self.journal.has_unwritten, "a copy counts once it is on disk"
        if has_chunk := self._chunk is not None:
            self._chunk_written(has_installed)
        if self.is_leader:
            self._count_copies()
        return has_chunk or self.is_leader or bool(self._out.dropped_reads)

    def forget_old_entries(self) -> None:
        """Keep the part of the log that is in memory within its limits."""
        self.journal.forget(self.applied, self._settings.kept_entries, self._settings.kept_bytes)

    def _confirm_alone(self) -> None:
        """The only voter is its own majority."""
        self.reads.start()
        self._finish_reads(self.reads.number)

    def feed(self, peer: str) -> None:
        """As leader, send `peer` the entries that it lacks, or else a heartbeat."""
        if not self.is_leader or peer not in self.progress:
            return
        progress, last = self.progress[peer], self.journal.last.id.commit_id
        if self._may_send(progress, last):
            self._send_entries(peer, progress, last)
        else:
            self._send_heartbeat(peer)

    def beat(self) -> None:
        """As leader, send heartbeats to all now."""
        if self.is_leader:
            self._send_heartbeats()

    def _meet_members(self) -> None:
        """Keep progress of exactly the other members in force: a change counts from when it is appended (rule 8). Of
        another node at the address of a member nothing is known (rule 9)."""
        members = self.journal.membership
        if self._met is not None and self._met[0] is members:
            return
        before = {} if self._met is None else self._met[1]
        nodes = {peer: members.node_of(peer) or "" for peer in self.others}
        known = {peer: self.progress[peer] for peer in nodes if before.get(peer) in ("", nodes[peer])}
        next = self.journal.last.id.commit_id + 1
        self.progress = {peer: known.get(peer) or Progress(next, self._now) for peer in nodes}
        self._met = (members, nodes)
        self._quorum_until = float("-inf")

    def _replicate(self) -> None:
        """Send every member the entries that it lacks, as far as its window lets, and start a read round if due."""
        standing, last = self._standing, self.journal.last.id.commit_id
        for peer in standing.others:
            progress = self.progress[peer]
            while (progress.next <= last or progress.probing) and self._may_send(progress, last):
                self._send_entries(peer, progress, last)
        if not standing.has_rivals:
            self._confirm_alone()
        elif self.reads.start():
            self._send_heartbeats()

    def _may_send(self, progress: Progress, last: int) -> bool:
        base = self.journal.base.id.commit_id
        progress.ask_for(base)
        return progress.next > base and progress.may_send(last, self._settings.window_batches)

    def _send_entries(self, peer: str, progress: Progress, last: int) -> None:
        first = progress.next
        entries: list[Entry] = []
        if first <= last:
            last = min(last, first + self._settings.batch_entries - 1)
            entries = self.journal.entries(first, last, self._settings.batch_bytes)
        previous = self.journal.id_at(first - 1)
        progress.sent(first + len(entries) - 1, self._now)
        message = Data(
            action="log" if entries else "commit",
            term=self.term,
            leader=self.me,
            previous=previous,
            entries=entries,
            commit_id=self.commit_id,
        )
        self._send(peer, message)

    def _send_heartbeats(self) -> None:
        self._heartbeat_due = self._now + self._beat
        self._meet_members()
        for peer in self.others:
            self._send_heartbeat(peer)

    def _send_heartbeat(self, peer: str) -> None:
        self.progress[peer].told = self.commit_id
        beat = Heartbeat(term=self.term, leader=self.me, commit_id=self.commit_id, round=self.reads.number)
        self._send(peer, beat)

    def _hand_out_committed(self) -> list[Entry]:
        if self.applied == self.commit_id:
            return []
        entries = self.journal.entries(self.applied + 1, self.commit_id, self._settings.batch_bytes)
        self.applied += len(entries)
        if self.is_leader:
            first = self._first_own
            self.uncommitted_bytes -= sum([len(entry.command) for entry in entries if entry.commit_id >= first])
        return entries

    def _send(self, peer: str, message: PeerRequest) -> None:
        self._out.requests.append((peer, message))
