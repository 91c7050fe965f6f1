"""An in-memory cluster of pure `Raft` members: simulated disks, a network that misbehaves when told to, and time that
moves only when told to.

Nothing here knows LMDB, sockets or threads, so a test that fails has failed because of the consensus rules. One seed
gives one trace: every choice comes from `Network.random`, and members take turns in the order that the test asks for.

    network = Network(3, seed=7)
    network.elect("1")
    network.propose("1", "colour")
    network.run(1.0)
    assert network["2"].keys == ["colour"]

Members are called "1", "2", ... A *turn* is what the production driver calls a cycle: the inputs, then the effects in
the order that `raft.Ready` documents. After each turn `invariants.Invariants` looks at what must always hold.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from msgspec import Raw

from raftnode.config import DEFAULT_NAMESPACE, Settings
from raftnode.consensus.ballot import Ballot
from raftnode.consensus.changes import ChangeRefused
from raftnode.consensus.journal import Journal, Mark
from raftnode.consensus.membership import Membership
from raftnode.consensus.raft import Raft, Ready
from raftnode.messages import (
    GENESIS,
    AnyCommand,
    Entry,
    EntryId,
    MembersCommand,
    PeerAnswer,
    PeerRequest,
    PutCommand,
    chain,
    decode_answer,
    decode_command,
    decode_request,
    encode,
    encode_command,
)
from raftnode.testing.invariants import Invariants

MESSAGES_MAX = 100_000
"""More deliveries than this in one `deliver` means that members answer each other without end."""


def put(key: str) -> Raw:
    """The command that a test proposes when it does not care for more than a name."""
    return encode_command(PutCommand(namespace=DEFAULT_NAMESPACE, key=key, value=Raw(b"true")))


def key_of(entry: Entry) -> str | None:
    """The key that an entry writes; None for entries that write none, such as a new leader's no-op."""
    command: AnyCommand = decode_command(entry.command)
    return command.key if isinstance(command, PutCommand) else None


def history(*terms: int) -> list[Entry]:
    """A log whose entries have these terms, each with its right checksum.

    Equal terms up to a position give equal entries up to there, as if one leader had made them.
    """
    entries: list[Entry] = []
    checksum = 0
    for commit_id, term in enumerate(terms, start=1):
        command = put(f"{term}/{commit_id}")
        checksum = chain(checksum, term, commit_id, 0, command)
        entries.append(Entry(term, commit_id, 0, checksum, command))
    return entries


class Disk:
    """What survives a crash: ballot, log and commit_id, changed by whole transactions only.

    Is the journal's `LogReader`. Invariant: `entries[n]` has commit_id `n + 1`.
    """

    def __init__(self, founding: Membership) -> None:
        self.ballot = Ballot()
        self.entries: list[Entry] = []
        self.commit_id = 0
        """What the state machine on this disk has applied."""
        self.writes = 0
        """Transactions so far."""
        self._founding = founding

    @property
    def last(self) -> Mark:
        """The newest entry."""
        return Mark(self.entries[-1].id, self.entries[-1].checksum) if self.entries else Mark(GENESIS, 0)

    @property
    def base(self) -> Mark:
        """Nothing is compacted here."""
        return Mark(GENESIS, 0)

    @property
    def membership(self) -> Membership:
        """The members in force by this log."""
        return self.journal().membership

    def holds(self, id: EntryId) -> bool:
        """True when the entry is in this log."""
        return 0 < id.commit_id <= len(self.entries) and self.entries[id.commit_id - 1].term == id.term

    def read_id(self, commit_id: int) -> EntryId:
        """For the journal: the id of an entry."""
        return self.entries[commit_id - 1].id

    def read_entries(self, first: int, last: int, size: int) -> list[Entry]:
        """For the journal: entries from `first` to at most `last` and `size` bytes, but at least one."""
        found: list[Entry] = []
        for entry in self.entries[first - 1 : last]:
            size -= entry.size
            if found and size < 0:
                break
            found.append(entry)
        return found

    def write(self, ballot: Ballot, journal: Journal, commit_id: int) -> None:
        """One transaction: all of it, or, when a crash comes before, nothing."""
        unwritten = journal.unwritten()
        if unwritten.cut_from is not None:
            del self.entries[unwritten.cut_from - 1 :]
        for entry in unwritten.entries:
            assert entry.commit_id == len(self.entries) + 1, f"a hole in the log before {entry.commit_id}"
            self.entries.append(entry)
        self.ballot, self.commit_id = ballot, commit_id
        self.writes += 1
        journal.mark_written()

    def journal(self) -> Journal:
        """The journal of a member that starts from this disk."""
        memberships = [self._founding]
        for entry in self.entries[self._founding.commit_id :]:
            command = decode_command(entry.command)
            if isinstance(command, MembersCommand):
                if entry.commit_id <= self.commit_id:
                    memberships.clear()
                memberships.append(Membership.of(entry.id, command))
        return Journal(self, Mark(GENESIS, 0), self.last, memberships)


class CrashPoint(enum.Enum):
    """Where in a turn a member dies."""

    NOW = "now"
    """Between two turns."""
    BEFORE_WRITE = "before-write"
    """In its next turn that writes: what may go out before the write has gone out, the disk is unchanged."""
    AFTER_WRITE = "after-write"
    """In its next turn that writes: the disk has it, nobody has been told."""


@dataclass(slots=True, frozen=True)
class Envelope:
    """A message under way, as the bytes that a socket would carry."""

    number: int
    """Counts all messages of a network, so that a test can name one."""
    source: str
    target: str
    frame: bytes
    is_answer: bool

    @property
    def message(self) -> PeerRequest | PeerAnswer:
        """The message, through the production decoder."""
        if self.is_answer:
            answer = decode_answer(self.frame)
            assert isinstance(answer, PeerAnswer), "members send each other these only"
            return answer
        request = decode_request(self.frame)
        assert isinstance(request, PeerRequest), "members send each other these only"
        return request


@dataclass(slots=True)
class Reads:
    """What became of the reads that were asked of one member. Each token is in exactly one of the three."""

    waiting: list[object] = field(default_factory=list)
    answered: dict[object, int] = field(default_factory=dict)
    """token -> the commit_id that the answer shows."""
    dropped: list[object] = field(default_factory=list)


class Member:
    """One member: a disk that lasts, and a `Raft` that lives from one start to the next crash."""

    def __init__(self, name: str, disk: Disk, settings: Settings, chance: random.Random, now: float) -> None:
        self.name = name
        self.node = ""
        """Its node id; pure members have none."""
        self.changes_members = False
        """As leader it takes the next step of a change of the members by itself, as a driver lets it."""
        self.disk = disk
        self.applied: list[Entry] = []
        """The state machine: the entries applied, in order. In memory it may be ahead of the disk."""
        self.reads = Reads()
        self.paused = False
        """Stopped as by SIGSTOP: takes no turns, loses nothing."""
        self.crash_at: CrashPoint | None = None
        self._settings = settings
        self._chance = chance
        self._raft: Raft | None = None
        self.start(now)

    @property
    def raft(self) -> Raft:
        """The running state machine."""
        assert self._raft is not None, f"{self.name} is down"
        return self._raft

    @property
    def is_up(self) -> bool:
        """False between a crash and the restart."""
        return self._raft is not None

    @property
    def takes_turns(self) -> bool:
        """Up, and not paused."""
        return self.is_up and not self.paused

    @property
    def keys(self) -> list[str]:
        """The keys that the applied entries have written, in order: what a client could know of this member."""
        return [key for entry in self.applied if (key := key_of(entry)) is not None]

    @property
    def log(self) -> list[EntryId]:
        """The ids in the log on disk."""
        return [entry.id for entry in self.disk.entries]

    def start(self, now: float) -> None:
        """Start from the disk alone."""
        assert self._raft is None, f"{self.name} is up already"
        self.applied = self.disk.entries[: self.disk.commit_id]
        self.paused, self.crash_at = False, None
        self._raft = Raft(
            self.name, self.disk.journal(), self.disk.ballot, self.disk.commit_id, self._chance, self._settings, now
        )

    def crash(self) -> None:
        """Lose the memory. Reads that waited get no answer."""
        self._raft, self.crash_at = None, None
        self.applied = self.disk.entries[: self.disk.commit_id]
        self.reads.dropped += self.reads.waiting
        self.reads.waiting.clear()

    def turn(self, now: float, inputs: Iterable[Callable[[Raft], object]]) -> Iterator[tuple[str, bytes, bool]]:
        """Take the inputs, then carry out what `ready` says, in its order. Yields (target, frame, is answer) at the
        moment when each message leaves; a member that crashes on the way yields no more.
        """
        raft = self.raft
        raft.clock(now, int(now * 1000))
        for take in inputs:
            take(raft)
        raft.tick()
        if self.changes_members and (command := raft.next_change()) is not None:
            raft.change(command)
        first = raft.ready()
        if first.ballot is None:
            yield from _outgoing(first)
        self._apply(first)
        if self._has_to_write(first):
            if self.crash_at is CrashPoint.BEFORE_WRITE:
                self.crash()
                return
            self.disk.write(raft.ballot, raft.journal, raft.applied)
            if self.crash_at is CrashPoint.AFTER_WRITE:
                self.crash()
                return
        raft.written()
        if first.ballot is not None:
            yield from _outgoing(first)
        yield from _promises(first)
        yield from self._after_write()
        raft.forget_old_entries()

    def _after_write(self) -> Iterator[tuple[str, bytes, bool]]:
        """What the write has made committable, in as many batches as it takes."""
        while True:
            ready = self.raft.ready()
            assert ready.ballot is None, "no input, no new ballot"
            assert not ready.promises, "no input, nothing to promise"
            self._apply(ready)
            yield from _outgoing(ready)
            if self.raft.applied == self.raft.commit_id:
                return

    def _has_to_write(self, ready: Ready) -> bool:
        unwritten = self.raft.journal.unwritten()
        return (
            ready.ballot is not None
            or unwritten.cut_from is not None
            or bool(unwritten.entries)
            or self.raft.applied > self.disk.commit_id
        )

    def _apply(self, ready: Ready) -> None:
        self.applied += ready.committed
        for token in ready.reads:
            self.reads.waiting.remove(token)
            self.reads.answered[token] = len(self.applied)
        for token in ready.dropped_reads:
            self.reads.waiting.remove(token)
            self.reads.dropped.append(token)


def _outgoing(ready: Ready) -> Iterator[tuple[str, bytes, bool]]:
    for peer, request in ready.requests:
        yield peer, encode(request), False
    for ticket, answer in ready.answers:
        yield str(ticket), encode(answer), True


def _promises(ready: Ready) -> Iterator[tuple[str, bytes, bool]]:
    for ticket, answer in ready.promises:
        yield str(ticket), encode(answer), True


class Network:
    """A cluster, what is under way between its members, and its time.

    Time is in seconds from 0. `in_flight` holds messages in the order in which they were sent; a message is lost when
    its link is cut, or its target is down, at the moment of delivery.
    """

    def __init__(self, size: int = 3, seed: int = 0, settings: Settings | None = None, learners: int = 0) -> None:
        """`size` founding voters, "1" to str(size), and after them `learners`, who replicate but do not vote.

        `seed` decides every random choice.
        """
        self.random = random.Random(seed)
        self.settings = settings or Settings()
        self.now = 0.0
        self.in_flight: list[Envelope] = []
        self.watch: Callable[[str, Envelope], None] = lambda _event, _envelope: None
        """Called with "sent", "delivered" or "lost" and the message; for transcripts."""
        self._cut: set[tuple[str, str]] = set()
        self._sent = 0
        names = [str(n + 1) for n in range(size + learners)]
        founding = Membership(voters=dict.fromkeys(names[:size], ""), learners=dict.fromkeys(names[size:], ""))
        self.members = {
            name: Member(name, Disk(founding), self.settings, random.Random(self.random.getrandbits(64)), self.now)
            for name in names
        }
        self.invariants = Invariants(self.members)

    def __getitem__(self, name: str) -> Member:
        return self.members[name]

    @property
    def leaders(self) -> list[str]:
        """Who leads, each in a term of its own; while links are cut there may be a deposed one among them."""
        return [name for name, member in self.members.items() if member.is_up and member.raft.is_leader]

    @property
    def leader(self) -> str:
        """The leader of the highest term."""
        assert self.leaders, "nobody leads"
        return max(self.leaders, key=lambda name: self[name].raft.term)

    # --- turns ---

    def turn(self, name: str, *inputs: Callable[[Raft], object]) -> None:
        """One turn of a member that is up; `inputs` are called with its `Raft`."""
        member = self[name]
        for target, frame, is_answer in member.turn(self.now, inputs):
            self._sent += 1
            envelope = Envelope(self._sent, name, target, frame, is_answer)
            self.invariants.sent(member, target, envelope.message)
            self.in_flight.append(envelope)
            self.watch("sent", envelope)
        self.invariants.check(member)

    def campaign(self, name: str) -> None:
        """The member's election timer has run out."""
        self.turn(name, lambda raft: raft.campaign())

    def lose_leaders(self) -> None:
        """Every follower loses its connection to its leader, as when that one dies: none of them defends it now."""
        for name, member in self.members.items():
            if member.takes_turns and (leader := member.raft.leader) not in (None, name):
                assert leader is not None
                member.raft.suspect(leader)

    def elect(self, name: str) -> None:
        """Make `name` the leader: followers lose their leaders, and it campaigns; a second time, if all that it got
        from the first is a newer term.

        Fails when it can't win, as its log is behind or no majority can be reached.
        """
        for _ in range(2):
            self.lose_leaders()
            self.campaign(name)
            self.deliver()
            if self[name].raft.is_leader:
                return
        raise AssertionError(f"{name} was to lead but is {self[name].raft.role}")

    def ask(self, source: str, target: str, request: PeerRequest) -> PeerAnswer:
        """Hand `target` a request that the test made up, as if it came from `source`, and return its answer, which is
        not sent. What the rules say of one member is tested so, message by message."""
        self.turn(target, lambda raft: raft.step(source, request))
        answers = [envelope for envelope in self.select(target, source) if envelope.is_answer]
        assert answers, f"{target} has not answered {request}"
        self.in_flight.remove(answers[-1])
        answer = answers[-1].message
        assert isinstance(answer, PeerAnswer), "the envelope says that it is an answer"
        return answer

    def give_log(self, name: str, *terms: int) -> None:
        """Let a member start anew with a log of these terms (see `history`), in the term of its newest entry."""
        member = self[name]
        if member.is_up:
            member.crash()
        assert not member.disk.commit_id, "what is committed stays"
        member.disk.entries = history(*terms)
        if member.disk.ballot.term < max(terms, default=0):
            member.disk.ballot = Ballot(max(terms))
        self.restart(name)

    def propose(self, name: str, *keys: str) -> list[int]:
        """Client writes at a leader, in one turn. Returns their commit_ids; appended is not yet committed. One that
        finds at the start of its turn that it was stopped for long steps down, and appends nothing: then []."""
        return self.propose_commands(name, [put(key) for key in keys])

    def propose_commands(self, name: str, commands: Iterable[Raw]) -> list[int]:
        """The same with any commands."""
        found: list[int] = []

        def append(raft: Raft) -> None:
            if raft.is_leader:
                found.extend([raft.propose(command) for command in commands])

        assert self[name].raft.is_leader, f"{name} does not lead"
        self.turn(name, append)
        return found

    def change(self, name: str, change: Callable[[Membership], MembersCommand | None], force: bool = False) -> int:
        """A change of the members at a leader, made of the membership in force (see `consensus.changes`); returns its
        commit_id. Raises ChangeRefused."""
        found: list[int] = []
        refused: list[ChangeRefused] = []

        def act(raft: Raft) -> None:
            try:
                raft.check_may_change()
                command = change(raft.membership)
                assert command is not None, "there is something to change"
                found.append(raft.change(command, force))
            except ChangeRefused as refusal:
                refused.append(refusal)

        self.turn(name, act)
        for refusal in refused:
            raise refusal
        return found[0]

    def join(self, name: str, membership: Membership) -> None:
        """A new member starts with an empty disk, and the membership that it was told of."""
        self.members[name] = Member(
            name, Disk(membership), self.settings, random.Random(self.random.getrandbits(64)), self.now
        )
        self.invariants.joined(self.members[name])

    def read(self, name: str, token: object) -> None:
        """A client's linearizable read at a leader that may serve reads; its outcome is in `Member.reads`."""
        reads = self[name].reads

        def begin(raft: Raft) -> None:
            if raft.may_serve_reads:
                reads.waiting.append(token)
                raft.read(token)
            else:
                reads.dropped.append(token)

        assert self[name].raft.may_serve_reads, f"{name} may not serve reads"
        self.invariants.read_began(token)
        self.turn(name, begin)

    # --- messages ---

    def deliver_one(self, index: int = 0) -> None:
        """Deliver the message at `index` of `in_flight`: a turn of its target, unless it is lost."""
        envelope = self.in_flight.pop(index)
        source, target, message = envelope.source, envelope.target, envelope.message
        if not self.reaches(source, target) or target not in self.members or not self[target].is_up:
            self.watch("lost", envelope)
            return
        assert not self[target].paused, "a paused member takes no turns; see `deliverable`"
        self.watch("delivered", envelope)
        if isinstance(message, PeerRequest):
            self.turn(target, lambda raft: raft.step(source, message))
        else:
            self.turn(target, lambda raft: raft.take(source, message))

    def deliverable(self) -> list[int]:
        """Indexes into `in_flight` of what is not addressed to a paused member."""
        return [n for n, envelope in enumerate(self.in_flight) if not self._is_paused(envelope.target)]

    def _is_paused(self, name: str) -> bool:
        """A member that has not joined yet is not paused: what it is sent is lost."""
        return name in self.members and self[name].paused

    def deliver(self, count: int = MESSAGES_MAX) -> int:
        """Deliver in the order of sending, with the answers that this brings about, until nothing is under way or
        `count` messages have arrived. What is addressed to a paused member stays. Returns how many arrived."""
        for arrived in range(count):
            index = next((n for n, e in enumerate(self.in_flight) if not self._is_paused(e.target)), None)
            if index is None:
                return arrived
            self.deliver_one(index)
        assert count < MESSAGES_MAX, "the members answer each other without end"
        return count

    def select(self, source: str | None = None, target: str | None = None, kind: type | None = None) -> list[Envelope]:
        """The messages under way that have this source, target and message type; None means any."""
        return [
            envelope
            for envelope in self.in_flight
            if source in (None, envelope.source)
            and target in (None, envelope.target)
            and (kind is None or isinstance(envelope.message, kind))
        ]

    def drop(self, source: str | None = None, target: str | None = None, kind: type | None = None) -> int:
        """Lose the selected messages; returns how many."""
        lost = self.select(source, target, kind)
        for envelope in lost:
            self.in_flight.remove(envelope)
            self.watch("lost", envelope)
        return len(lost)

    def duplicate(self, envelope: Envelope) -> None:
        """The message will arrive once more, after all that is under way now."""
        self.in_flight.append(envelope)

    def shuffle(self) -> None:
        """Bring all that is under way into another order."""
        self.random.shuffle(self.in_flight)

    # --- faults ---

    def cut(self, source: str, target: str, *, both: bool = True) -> None:
        """Lose everything from `source` to `target`, and back when `both`."""
        self._cut.add((source, target))
        if both:
            self._cut.add((target, source))

    def isolate(self, *names: str) -> None:
        """Part these members from all the others; among themselves they are connected."""
        for name in names:
            for other in self.members:
                if other not in names:
                    self.cut(name, other)

    def heal(self) -> None:
        """Mend every link."""
        self._cut.clear()

    def reaches(self, source: str, target: str) -> bool:
        """True when messages from `source` get to `target`."""
        return (source, target) not in self._cut

    def crash(self, name: str, point: CrashPoint = CrashPoint.NOW) -> None:
        """Kill a member, now or in its next turn that writes. What it has sent is under way still."""
        if point is CrashPoint.NOW:
            self[name].crash()
        else:
            self[name].crash_at = point

    def restart(self, name: str) -> None:
        """Start a member that is down, from its disk."""
        self[name].start(self.now)
        self.invariants.restarted(self[name])

    def pause(self, name: str) -> None:
        """Stop a member as by SIGSTOP."""
        self[name].paused = True

    def resume(self, name: str) -> None:
        """Let it go on; it finds out by itself how long it was away."""
        self[name].paused = False

    # --- time ---

    def advance(self, seconds: float) -> None:
        """Let time pass and every member act on its timers, without delivering anything."""
        for _ in self._moments(seconds):
            self._tick_all()

    def run(self, seconds: float) -> None:
        """Let time pass with a network that delivers at once."""
        for _ in self._moments(seconds):
            self._tick_all()
            self.deliver()

    def run_until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """`run` until the condition holds; AssertionError when it does not within `seconds`."""
        for _ in self._moments(seconds):
            if condition():
                return
            self._tick_all()
            self.deliver()
        assert condition(), f"not reached within {seconds} s of simulated time"

    def _moments(self, seconds: float) -> Iterator[None]:
        """Steps of half a heartbeat: a member that is given no turn for longer than an election timeout would take
        itself for stalled."""
        step = self.settings.heartbeat_ms / 2000
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.now = min(self.now + step, end)
            yield

    def _tick_all(self) -> None:
        for name, member in self.members.items():
            if member.takes_turns:
                self.turn(name)
