"""Scenario files: commands to a cluster in memory, and the transcript that they produced, to be read and compared.

In the style of etcd-io/raft's test data. A file is a list of steps; each is one command line, a line of four dashes,
and what happened, up to an empty line. Lines that begin with `#` tell the story and are kept.

    # The first election.
    add-nodes 3
    ----
    ok

    campaign 1
    ----
    1 becomes pre-candidate in term 0

`run` plays the commands of such a text and returns it with the transcript that they produce now: equal texts mean equal
behaviour, and a difference is reviewed as a diff. Everything random has the seed of `add-nodes`.

    add-nodes N [learners=N] [seed=N] [batch=N] [window=N]
                             found the cluster, members 1 to N; comes first
    elect X                  X becomes the leader and its no-op is committed everywhere; how is not shown
    campaign X               the election timer of X runs out
    suspect                  every follower loses its connection to its leader, as when that one dies
    deliver [N] [drop=X]     deliver what is under way, with all that it brings about, or the first N messages;
                             those to or from X are lost
    lose X [Y]               what is under way from X to Y, or to anyone, is lost
    link-lost X Y            X notices that its link to Y was cut: what was under way may be lost
    cut X Y, isolate X ..., heal
                             cut the link between two; part some from all others; mend all links
    propose X key ...        clients write at the leader X
    read X name              a client's linearizable read at the leader X
    add X Y, remove X Y, promote X Y
                             the leader X takes Y as a learner, takes it out, or gives it a vote; a new Y starts with an
                             empty disk and the members that X knows
    transfer X Y             the leader X hands over to Y
    crash X [before-write or after-write]
                             kill X, now or in its next turn that writes
    restart X                start X from its disk
    pause X, resume X        stop X as SIGSTOP does; let it go on
    tick                     just over a heartbeat's time passes and all timers act; nothing is delivered
    run SECONDS              time passes, everything is delivered; messages are not shown
    status                   role, term and log of every member; what it knows as committed stands before the bar

Entries are written term/commit_id, as in 2/7. Messages are shown when they arrive or are lost, each followed by what it
did to its target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from msgspec import UNSET

from raftnode.config import Role, Settings
from raftnode.consensus.changes import ChangeRefused, added, promoted, removed
from raftnode.consensus.membership import Membership
from raftnode.messages import (
    Data,
    DataAnswer,
    Entry,
    EntryId,
    Heartbeat,
    HeartbeatAnswer,
    MembersCommand,
    Snapshot,
    SnapshotAnswer,
    TimeoutNow,
    TimeoutNowAnswer,
    VoteAnswer,
    VoteRequest,
)
from raftnode.testing.network import MESSAGES_MAX, CrashPoint, Envelope, Member, Network, key_of

RULE = "----"


class ScenarioError(Exception):
    """A scenario that can't be played: the message tells the line."""


class Step(NamedTuple):
    """One step of a scenario: the lines before its command (comments and empty ones), and the command."""

    lead: list[str]
    command: str
    line: int


def parse(text: str) -> tuple[list[Step], list[str]]:
    """The steps of a scenario without their transcripts, and the lines after the last one. Raises ScenarioError."""
    steps: list[Step] = []
    lead: list[str] = []
    lines = enumerate(text.splitlines(), start=1)
    for number, line in lines:
        if not line or line.startswith("#"):
            lead.append(line)
            continue
        steps.append(Step(lead, line, number))
        lead = []
        _skip_transcript(number, lines)
    return steps, lead


def _skip_transcript(command: int, lines: Iterator[tuple[int, str]]) -> None:
    """Go past the rule and what follows it, up to an empty line. A command without a rule is a new one."""
    number, line = next(lines, (command, ""))
    if line == RULE:
        while line:
            number, line = next(lines, (number, ""))
    elif line:
        raise ScenarioError(f"line {number}: {RULE} or an empty line comes after a command")


def run(text: str) -> str:
    """Play a scenario; returns it with the transcript that its commands produce now.

    Raises ScenarioError for a text that is none. A broken invariant is an AssertionError, as everywhere.
    """
    steps, rest = parse(text)
    player = Player()
    played: list[str] = []
    for step in steps:
        try:
            transcript = player.play(step.command)
        except (ScenarioError, LookupError, ValueError) as error:
            raise ScenarioError(f"line {step.line}: {step.command}: {error}") from error
        played += [*step.lead, step.command, RULE, *transcript, ""]
    return "\n".join([*played, *rest]).rstrip("\n") + "\n"


class View(NamedTuple):
    """What a transcript tells of a member: compared before and after its turns."""

    up: bool
    role: Role | None
    term: int
    voted_for: str | None
    leader: str | None
    log: tuple[Entry, ...]
    commit_id: int
    members: tuple[str, ...]
    answered: dict[object, int]
    dropped: tuple[object, ...]

    @classmethod
    def of(cls, member: Member) -> View:
        raft = member.raft if member.is_up else None
        return cls(
            up=member.is_up,
            role=raft.role if raft else None,
            term=member.disk.ballot.term,
            voted_for=member.disk.ballot.voted_for,
            leader=raft.leader if raft else None,
            log=tuple(member.disk.entries),
            commit_id=raft.commit_id if raft else member.disk.commit_id,
            members=_members((raft or member.disk).membership),
            answered=dict(member.reads.answered),
            dropped=tuple(member.reads.dropped),
        )


class Player:
    """Plays one scenario, command by command."""

    def __init__(self) -> None:
        self._network: Network | None = None
        self._views: dict[str, View] = {}
        self._lines: list[str] = []
        self._quiet = False
        self._commands: dict[str, Callable[[list[str], dict[str, str]], None]] = {
            "add-nodes": self._add_nodes,
            "elect": lambda words, _: self._elect(*words),
            "campaign": lambda words, _: self.network.campaign(*words),
            "suspect": lambda _words, _: self.network.lose_leaders(),
            "deliver": self._deliver,
            "lose": lambda words, _: self._lose(*words),
            "link-lost": lambda words, _: self._link_lost(*words),
            "cut": lambda words, _: self.network.cut(*words),
            "isolate": lambda words, _: self.network.isolate(*words),
            "heal": lambda _words, _: self.network.heal(),
            "propose": lambda words, _: self._propose(*words),
            "read": lambda words, _: self.network.read(*words),
            "add": lambda words, _: self._add(*words),
            "remove": lambda words, _: self._change(words[0], lambda m: removed(m, words[1])),
            "promote": lambda words, _: self._change(words[0], lambda m: promoted(m, words[1])),
            "transfer": lambda words, _: self._transfer(*words),
            "crash": lambda words, _: self._crash(*words),
            "restart": lambda words, _: self.network.restart(*words),
            "pause": lambda words, _: self.network.pause(*words),
            "resume": lambda words, _: self.network.resume(*words),
            "tick": lambda _words, _: self.network.advance((self.network.settings.heartbeat_ms + 1) / 1000),
            "run": lambda words, _: self._run(*words),
            "status": lambda _words, _: self._status(),
        }

    @property
    def network(self) -> Network:
        """The cluster, once it is founded."""
        if self._network is None:
            raise ScenarioError("add-nodes comes first")
        return self._network

    def play(self, command: str) -> list[str]:
        """Play one command line; returns the lines of its transcript, "ok" when there is nothing to tell."""
        name, *rest = command.split()
        words = [word for word in rest if "=" not in word]
        options = dict(word.split("=", 1) for word in rest if "=" in word)
        if name not in self._commands:
            raise ScenarioError(f"no command is called {name!r}; there are: {', '.join(self._commands)}")
        self._lines = []
        try:
            self._commands[name](words, options)
        except TypeError as error:
            raise ScenarioError(f"wrong arguments: {error}") from error
        self._tell_changes()
        return self._lines or ["ok"]

    # --- commands ---

    def _add_nodes(self, words: list[str], options: dict[str, str]) -> None:
        (size,) = map(int, words)
        number = {name: int(value) for name, value in options.items()}
        limits = Settings(batch_entries=number.get("batch", 1024), window_batches=number.get("window", 1))
        network = Network(size, number.get("seed", 0), limits, number.get("learners", 0))
        network.watch = self._watch
        self._network = network
        self._views = {name: View.of(member) for name, member in network.members.items()}

    def _deliver(self, words: list[str], options: dict[str, str]) -> None:
        count = int(words[0]) if words else MESSAGES_MAX
        dropped = options.get("drop")
        for _ in range(count):
            indexes = self.network.deliverable()
            if not indexes:
                return
            envelope = self.network.in_flight[indexes[0]]
            if dropped in (envelope.source, envelope.target):
                self.network.in_flight.remove(envelope)
                self._watch("lost", envelope)
            else:
                self.network.deliver_one(indexes[0])

    def _elect(self, leader: str) -> None:
        self._quiet = True
        self.network.elect(leader)
        self.network.run(0.2)
        self._quiet = False
        self._views = {name: View.of(member) for name, member in self.network.members.items()}
        self._lines = [f"  {leader} leads term {self.network[leader].raft.term}"]

    def _lose(self, source: str, target: str | None = None) -> None:
        self.network.drop(source, target)

    def _link_lost(self, name: str, peer: str) -> None:
        self.network.turn(name, lambda raft: raft.unreachable(peer))

    def _propose(self, leader: str, *keys: str) -> None:
        self.network.propose(leader, *keys)

    def _add(self, leader: str, name: str) -> None:
        self._change(leader, lambda members: added(members, name, "", is_silent=False))
        if name not in self.network.members:
            self.network.join(name, self.network[leader].raft.membership)
            self._views[name] = View.of(self.network[name])

    def _change(self, leader: str, change: Callable[[Membership], MembersCommand | None]) -> None:
        try:
            self.network.change(leader, change)
        except ChangeRefused as refusal:
            self._lines.append(f"  refused: {refusal.code}")

    def _transfer(self, leader: str, to: str) -> None:
        self.network.turn(leader, lambda raft: raft.hand_over(to))

    def _crash(self, name: str, point: str = "now") -> None:
        self.network.crash(name, CrashPoint(point))

    def _run(self, seconds: str) -> None:
        self._quiet = True
        self.network.run(float(seconds))
        self._quiet = False

    def _status(self) -> None:
        for name, member in self.network.members.items():
            where = str(member.raft.role) if member.is_up else "down"
            where += ", paused" if member.paused else ""
            committed = member.raft.commit_id if member.is_up else member.disk.commit_id
            ids = [f"{id.term}/{id.commit_id}" for id in member.log]
            log = " ".join([*ids[:committed], "|", *ids[committed:]])
            self._lines.append(f"{name} {where}, term {member.disk.ballot.term}: {log}")

    # --- the transcript ---

    def _watch(self, event: str, envelope: Envelope) -> None:
        """A message was sent, delivered or lost. It is told before what it does; what came before it is told first."""
        if event == "sent":
            return
        self._tell_changes()
        if not self._quiet:
            lost = "   (lost)" if event == "lost" else ""
            self._lines.append(f"{envelope.source} -> {envelope.target}: {in_words(envelope)}{lost}")

    def _tell_changes(self) -> None:
        if self._network is None:
            return
        for name, member in self.network.members.items():
            view = View.of(member)
            if view != self._views[name]:
                self._lines += [f"  {name} {line}" for line in changes(self._views[name], view)]
                self._views[name] = view


def changes(before: View, now: View) -> Iterator[str]:
    """What has happened to a member between two looks at it, one line each."""
    if now.up and not before.up:
        yield "starts"
    if now.term != before.term:
        yield f"goes to term {now.term}"
    if now.voted_for is not None and (now.term, now.voted_for) != (before.term, before.voted_for):
        yield f"votes for {now.voted_for} in term {now.term}"
    if now.up and now.role is not before.role and (before.up or now.role is not Role.FOLLOWER):
        yield f"becomes {now.role} in term {now.term}"
    if now.role is Role.FOLLOWER and now.leader not in (None, before.leader):
        yield f"follows {now.leader}"
    yield from _log_changes(before.log, now.log)
    if now.members != before.members:
        yield f"goes by the members {' '.join(now.members)}"
    if now.commit_id > before.commit_id:
        keys = [key for entry in now.log[before.commit_id : now.commit_id] if (key := key_of(entry)) is not None]
        yield f"commits up to {now.commit_id}" + (f": {' '.join(keys)}" if keys else "")
    for token, commit_id in now.answered.items():
        if token not in before.answered:
            yield f"answers the read {token} with all up to {commit_id}"
    for token in now.dropped[len(before.dropped) :]:
        yield f"drops the read {token}"
    if before.up and not now.up:
        yield "dies"


def _members(membership: Membership) -> tuple[str, ...]:
    """Voters by name, learners in brackets."""
    return tuple(name if name in membership.voters else f"({name})" for name in membership.addresses)


def _log_changes(before: tuple[Entry, ...], now: tuple[Entry, ...]) -> Iterator[str]:
    """What was cut from the log, and what was written to it."""
    same = 0
    while same < min(len(before), len(now)) and before[same] is now[same]:
        same += 1
    if same < len(before):
        yield f"cuts {_span(before[same:])}"
    if same < len(now):
        yield f"writes {_span(now[same:])}"


def in_words(envelope: Envelope) -> str:
    """A message as a transcript shows it."""
    match envelope.message:
        case VoteRequest(pre_vote=pre_vote, term=term, staged=staged, transfer=transfer):
            asked = ", as the leader asks" if transfer else ""
            return f"{'pre-vote' if pre_vote else 'vote'} for term {term}{asked}? my log ends with {_id(staged.last)}"
        case VoteAnswer(pre_vote=pre_vote, data=granted, term=term):
            return f"{'pre-vote' if pre_vote else 'vote'} {'granted' if granted else 'refused'}, term {term}"
        case Heartbeat(term=term, commit_id=commit_id, round=round):
            return f"heartbeat, term {term}, commit {commit_id}, round {round}"
        case HeartbeatAnswer(term=term, commit_id=commit_id, round=round):
            return f"heard, term {term}, commit {commit_id}, round {round}"
        case Data(term=term, previous=previous, entries=entries, commit_id=commit_id):
            what = _span(entries) if entries else "nothing"
            return f"{what} after {_id(previous)}, term {term}, commit {commit_id}"
        case TimeoutNow(term=term):
            return f"lead, after term {term}"
        case TimeoutNowAnswer(data=done, term=term):
            return f"{'I campaign' if done else 'no'}, term {term}"
        case DataAnswer(data=True, term=term, match=match):
            return f"matches up to {match}, term {term}"
        case DataAnswer(term=term, asked=asked, last=last, reason=reason):
            return f"refused ({reason}) after {asked}, try {_id(last)}, term {term}"
        case Snapshot(term=term, transfer=transfer, seq=seq, end=end):
            return f"chunk {seq} of snapshot {transfer}{'' if end is UNSET else ', the last'}, term {term}"
        case SnapshotAnswer(term=term, transfer=transfer, seq=seq, data=data, reason=reason):
            return f"chunk {seq} of snapshot {transfer} {'taken' if data else f'refused ({reason})'}, term {term}"


def _span(entries: tuple[Entry, ...] | list[Entry]) -> str:
    """Entries in short: runs of one term as 2/4..2/9."""
    runs: list[list[EntryId]] = []
    for entry in entries:
        if runs and runs[-1][-1].term == entry.term:
            runs[-1].append(entry.id)
        else:
            runs.append([entry.id])
    return " ".join(_id(ids[0]) if len(ids) == 1 else f"{_id(ids[0])}..{_id(ids[-1])}" for ids in runs)


def _id(id: EntryId) -> str:
    return f"{id.term}/{id.commit_id}"
