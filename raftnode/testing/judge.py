"""Judges what is left of a run with faults over real nodes: what the clients were told, what the stopped nodes have on
disk, and what they logged, against each other.

    findings = judge(Evidence.load(Path("bundle")))
    findings.problems      # empty when all is as it must be

What a run leaves is a *bundle*, a directory:

    history.jsonl   every operation of every client, with its outcome (`history`); the name of the client is another one
                    for each operation, and is what the log records with a write
    run.json        what the run was, and the commit_id that all nodes had reached when it ended (`reached`)
    node-PORT/      the data directory of each node
    node-PORT.log   what it logged

    entries.jsonl   committed entries that nodes told while it ran

When members came and went, the memberships that were committed and the changes that were asked for are in run.json,
and `left` names the nodes that are no members any more, and the disks that were lost, as they were then. `known_log`
has what can be known of a log that begins late, and `judge_members` what must hold of the members.

What must hold, and is looked at for each node by itself:

* the directory can be read, nothing in it is damaged, the log has every position from where it begins, and its terms
  never fall; what was before is taken from other logs, and from what nodes told while it ran;
* every acknowledged write is in the log at the commit_id that was told, committed, as it was asked for;
* every write in the log was asked for, by exactly one operation, is in it once, and was not answered as not executed;
* the values in the namespaces are what the log makes of them, replayed here by rules of our own;
* its term and commit_id never fell over its restarts, and it logged no error and no traceback.

And for all together: the logs are equal, by the rolling checksums and to the position that was reached; nobody led a
term in which another led; every answer of a write (`version`, `replaced`) and of a read, local ones too, is what the
log says of its commit_id; and the history is linearizable, with every open outcome resolved from the log.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
from msgspec import Struct

from raftnode.testing import linearizability
from raftnode.testing.history import History, Operation
from raftnode.testing.judge_members import End, check_members, is_expected
from raftnode.testing.known_log import KnownLog, LogLine, Place, Replay, Value
from raftnode.testing.processes import InspectionFailed, inspect_lines
from raftnode.testing.roll import Change, Seen

HISTORY: Final = "history.jsonl"
RUN: Final = "run.json"
ENTRIES: Final = "entries.jsonl"

_SHOWN: Final = 3
"""Problems of one kind at one node that are told in full; the rest is counted."""

S = TypeVar("S", bound=Struct)


class Problem(Struct, frozen=True):
    """Something that must not be. `str()` is what to print."""

    kind: str
    where: str
    """The node, or what the problem is in."""
    words: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.words}"


class Findings(Struct):
    """The verdict: good when there is no problem. The rest are counts."""

    problems: list[Problem] = []
    operations: int = 0
    log_entries: int = 0
    """Committed, and known."""
    reads_compared: int = 0
    """Answers of reads that were compared with the log."""
    open_happened: int = 0
    """Writes with an open outcome that are committed in the log."""
    open_never: int = 0
    """... that are in no log, and never will be."""
    open_still: int = 0
    """... that are staged at the end."""
    open_unknown: int = 0
    """... of which no log that is left, and no answer, tells whether they happened."""
    unknown_entries: int = 0
    """Committed entries that nobody has any more, and of which no answer tells."""
    loose_keys: int = 0
    """Keys that one of these seems to have changed: of them less can be judged."""
    checker: str = ""
    """What the checker of linearizability said, in a line."""

    @property
    def is_good(self) -> bool:
        return not self.problems


class Evidence(Struct):
    """What a run left. See the module's docstring."""

    directory: Path
    history: History
    nodes: list[str]
    reached: int | None
    """The commit_id to which all nodes had committed at the end; None when they did not get there."""
    left: list[str] = []
    """The other nodes that there were: their last disk, or one that was lost, as it was then."""
    is_churned: bool = False
    """Members came and went, and logs were so short that nobody may know any more what was in them."""
    seen: list[Seen] = []
    """The committed memberships."""
    changes: list[Change] = []
    kept: list[LogLine] = []
    """Committed entries that nodes told while it ran, by position."""

    @classmethod
    def load(cls, directory: Path) -> Evidence:
        """Read a bundle. Raises OSError for what is none."""
        run = json.loads((directory / RUN).read_bytes())
        kept = directory / ENTRIES
        return cls(
            directory,
            History.load(directory / HISTORY),
            run["nodes"],
            run["reached"],
            run["left"],
            run["is_churned"],
            msgspec.convert(run["seen"], list[Seen]),
            msgspec.convert(run["changes"], list[Change]),
            msgspec.json.Decoder(LogLine).decode_lines(kept.read_bytes()) if kept.exists() else [],
        )


def judge(evidence: Evidence) -> Findings:
    """Look at everything."""
    return _Judge(evidence).run()


# --- what is read from a node ---------------------------------------------------------------------------------


class _ValueLine(Struct):
    """A line of `raftnode-inspect state --json`."""

    record: str
    namespace: str | None = None
    key: str | None = None
    value: Any = None
    created: int = 0
    modified: int = 0
    version: int = 0
    damaged: bool = False
    reason: str = ""


class _NodeLine(Struct):
    """What `raftnode-inspect info --json` says of a node; other lines have another `record`."""

    record: str
    node: str | None = None
    address: str | None = None
    commit_id: int | None = None
    membership: dict[str, Any] | None = None


class _Side(NamedTuple):
    """What one node has left."""

    name: str
    info: _NodeLine
    log: list[LogLine]
    is_left: bool

    @property
    def commit_id(self) -> int:
        return self.info.commit_id or 0

    @property
    def committed(self) -> list[LogLine]:
        return [line for line in self.log if line.state == "committed"]

    @property
    def first(self) -> int:
        """Where its log begins."""
        return (self.log[0].commit_id or 1) if self.log else self.commit_id + 1


# --- the judge ------------------------------------------------------------------------------------------------


class _Judge:
    def __init__(self, evidence: Evidence) -> None:
        self._evidence = evidence
        self._findings = Findings(operations=len(evidence.history))
        self._counts: Counter[tuple[str, str]] = Counter()
        self._writes: dict[str, Operation] = {}
        self._loose: set[Place] = set()
        """Keys that a write may have changed of which nothing is known."""
        self._doubtful: set[Place] = set()
        """Those of them that it seems to have changed: what is known does not explain the rest."""

    def run(self) -> Findings:
        self._name_writes()
        evidence = self._evidence
        sides = [self._read(node, is_left=False) for node in evidence.nodes]
        left = [self._read(node, is_left=True) for node in evidence.left]
        known = self._join(sides, [side for side in left if side.info.node])
        replay = Replay(known)
        hidden = known.hidden(self._not_placed(known))
        self._loose = {(write.namespace, write.key) for write in hidden}
        self._findings.log_entries, self._findings.unknown_entries = len(known), len(known.unknown)
        for side in (*sides, *left):
            self._check_node(side, replay)
        self._check_answers(replay, known.last)
        staged = {line.client for side in sides for line in side.log if line.state != "committed" and line.is_write}
        self._check_history(self._resolved(known, staged, {write.client for write in hidden}))
        if evidence.seen:
            ends = [End(side.name, side.info.address, side.info.node, side.info.membership) for side in sides]
            for kind, where, words in check_members(ends, known, evidence.history, evidence.seen, evidence.changes):
                self._problem(kind, where, words)
        self._check_node_logs()
        self._tell_counts()
        self._findings.loose_keys = len(self._doubtful)
        return self._findings

    def _read(self, node: str, is_left: bool) -> _Side:
        """What there is of a node. One that went before it was taken has nothing to tell."""
        info = _NodeLine("node")
        if is_left and not any((self._evidence.directory / node).glob("*.mdb")):
            return _Side(node, info, [], is_left)
        if is_left and self._holds_no_node(node):
            return _Side(node, info, [], is_left)
        for line in self._inspected(node, _NodeLine, "info"):
            info = line if line.record == "node" else info
        return _Side(node, info, self._read_log(node), is_left)

    def _holds_no_node(self, node: str) -> bool:
        try:
            return not list(inspect_lines(self._evidence.directory / node, "info"))
        except InspectionFailed as failure:
            return "holds no node yet" in failure.words

    def _join(self, sides: list[_Side], left: list[_Side]) -> KnownLog:
        """All logs as one."""
        known = KnownLog(max([side.commit_id for side in sides], default=0))
        kept = self._evidence.kept
        self._check_writes("told while it ran", kept)
        for name, lines in (*((s.name, s.committed) for s in (*sides, *left)), ("told while it ran", kept)):
            if difference := known.add(name, lines):
                position, found, other, by = difference
                words = f"at {position} it has (term, checksum) {found}, {by} has {other}"
                self._problem("logs_differ", name, words)
        known.learn(self._evidence.history)
        if (unknown := known.unknown) and not self._evidence.is_churned:
            self._problem("log_begins_late", "log", f"nothing tells what entries {unknown[0]} to {unknown[-1]} were")
        return known

    def _not_placed(self, known: KnownLog) -> list[Operation]:
        """Writes with an open outcome of which it is not known whether they are in the log."""
        placed = {line.client for line in known if line.is_write}
        return [write for name, write in self._writes.items() if write.outcome == "open" and name not in placed]

    def _problem(self, kind: str, where: str, words: str) -> None:
        self._counts[kind, where] += 1
        if self._counts[kind, where] <= _SHOWN:
            self._findings.problems.append(Problem(kind, where, words))

    def _tell_counts(self) -> None:
        for (kind, where), count in self._counts.items():
            if count > _SHOWN:
                self._findings.problems.append(Problem(kind, where, f"and {count - _SHOWN} more of these"))

    def _name_writes(self) -> None:
        for operation in self._evidence.history:
            if operation.kind != "get":
                if operation.client in self._writes:
                    self._problem("bad_history", operation.client, "two operations of one name: the log can't tell")
                self._writes[operation.client] = operation

    # --- one node ---

    def _read_log(self, node: str) -> list[LogLine]:
        lines: list[LogLine] = []
        for line in self._inspected(node, LogLine, "log", "--values"):
            if line.damaged or line.record != "entry":
                self._problem("damage", node, f"entry {line.commit_id}: {line.reason}")
            if line.record == "entry":
                lines.append(line)
        return lines

    def _inspected(self, node: str, type: type[S], *command: str) -> Iterator[S]:
        """What `raftnode-inspect` prints of a node. That it fails is a problem of the node."""
        decode = msgspec.json.Decoder(type).decode
        try:
            for line in inspect_lines(self._evidence.directory / node, *command):
                yield decode(line)
        except InspectionFailed as failure:
            self._problem("unreadable", node, str(failure))

    def _check_node(self, side: _Side, replay: Replay) -> None:
        node, reached = side.name, self._evidence.reached
        self._check_shape(side)
        if reached is not None and side.commit_id < reached and not side.is_left:
            self._problem("not_durable", node, f"had committed {reached} when it ran, and {side.commit_id} on disk")
        self._check_writes(node, side.log)
        self._check_acknowledged(side)
        if side.info.node:
            self._check_state(side, replay.state(side.commit_id))

    def _check_shape(self, side: _Side) -> None:
        """Every position from the first on is there, and the terms do not fall."""
        node, term = side.name, 0
        for position, line in enumerate(side.log, side.first):
            if line.commit_id != position:
                self._problem("log_has_a_hole", node, f"position {position} is missing: {line.commit_id} follows")
                return
            if line.term < term:
                self._problem("terms_fall", node, f"entry {position} is of term {line.term}, the one before of {term}")
            term = line.term

    def _check_writes(self, node: str, log: list[LogLine]) -> None:
        """Every write in the log was asked for, once, so, and not answered as not executed."""
        seen: dict[str, int | None] = {}
        for line in log:
            if not line.is_write:
                continue
            name = line.client or ""
            asked = self._writes.get(name)
            if asked is None:
                self._problem(
                    "nobody_asked", node, f"entry {line.commit_id} is a write that no client asked for: {line}"
                )
                continue
            if line.content != (asked.kind, asked.namespace, asked.key, asked.value):
                self._problem("other_content", node, f"entry {line.commit_id} is {line}, asked was {_told(asked)}")
            if name in seen:
                self._problem("done_twice", node, f"{_told(asked)} is in the log at {seen[name]} and {line.commit_id}")
            seen[name] = line.commit_id
            if asked.outcome == "failed":
                why = f"answered as not executed ({asked.code}), but is in the log at {line.commit_id}"
                self._problem("failed_but_done", node, f"{_told(asked)} was {why}")

    def _check_acknowledged(self, side: _Side) -> None:
        """What is in its log is as it was asked for. What is not is before its beginning (then the state tells, see
        `_check_state`), or after the end of a node that left."""
        committed = {line.commit_id: line for line in side.committed}
        for asked in self._writes.values():
            at = asked.commit_id
            if asked.outcome != "ok" or at is None or self._is_excused(side, at):
                continue
            line = committed.get(at)
            if line is None:
                self._problem("lost", side.name, f"acknowledged, and not committed here: {_told(asked)}")
            elif line.client != asked.client or line.content != (asked.kind, asked.namespace, asked.key, asked.value):
                self._problem("replaced", side.name, f"acknowledged was {_told(asked)}, but at its place is {line}")

    def _is_excused(self, side: _Side, commit_id: int) -> bool:
        if side.is_left and (commit_id > side.commit_id or not side.info.node):
            return True
        return commit_id < side.first

    def _check_state(self, side: _Side, expected: dict[Place, Value]) -> None:
        """The namespaces are what the log makes of them up to its commit_id."""
        node = side.name
        for line in self._inspected(node, _ValueLine, "state"):
            if line.damaged or line.namespace is None or line.key is None:
                self._problem("damage", node, f"value of {line.key!r}: {line.reason}")
                continue
            place = line.namespace, line.key
            wanted = expected.pop(place, None)
            found = Value(line.value, line.created, line.modified, line.version)
            if found != wanted and place in self._loose:
                self._doubtful.add(place)
                self._check_loose(node, line.key, found, wanted)
            elif found != wanted:
                self._problem("wrong_state", node, f"{line.key!r} holds {_short(found)}; by the log {_short(wanted)}")
        for place, missing in expected.items():
            if place in self._loose:
                self._doubtful.add(place)
            else:
                words = f"{place[1]!r} is not there; by the log it holds {_short(missing)}"
                self._problem("wrong_state", node, words)

    def _check_loose(self, node: str, key: str, found: Value, known: Value | None) -> None:
        """A key that a write may have changed of which nothing is known: what it holds is no older than what is known,
        and was asked for."""
        if known is not None and found.modified < known.modified:
            self._problem("wrong_state", node, f"{key!r} holds {_short(found)}; by the log it had {_short(known)}")
        elif known is not None and found.modified == known.modified and found.value != known.value:
            self._problem("wrong_state", node, f"{key!r} holds {_short(found)}; by the log {_short(known)}")
        elif not any(w.value == found.value and w.key == key for w in self._writes.values() if w.kind == "put"):
            self._problem("nobody_asked", node, f"{key!r} holds {_short(found)}, which no client asked for")

    # --- all together ---

    def _check_answers(self, replay: Replay, last: int) -> None:
        """What clients were told is what the log says."""
        for asked in self._evidence.history:
            if asked.outcome != "ok" or asked.commit_id is None:
                continue
            if asked.commit_id > last:
                self._problem("from_the_future", "history", f"{_told(asked)} tells of more than is committed: {last}")
            elif asked.kind == "get":
                self._check_read(asked, replay)
            elif asked.commit_id in replay.answers:  # else it is told as lost
                wanted = replay.answers[asked.commit_id]
                if (asked.version, asked.replaced) != wanted and not self._is_doubtful(asked):
                    words = f"{_told(asked)} was told a wrong version or `replaced`: {wanted} by the log"
                    self._problem("wrong_answer", "history", words)

    def _check_read(self, get: Operation, replay: Replay) -> None:
        assert get.commit_id is not None, "a read shows one"
        self._findings.reads_compared += 1
        state = replay.at((get.namespace, get.key), get.commit_id)
        wanted = (None, None, 0) if state is None else (state.value, state.modified, state.version)
        if (get.value, get.modified, get.version or 0) != wanted and not self._is_doubtful(get):
            self._problem("wrong_read", "history", f"{_told(get)}; by the log at {get.commit_id}: {_short(state)}")

    def _is_doubtful(self, asked: Operation) -> bool:
        """The answer is not what is known, but a write of which nothing is known may explain it. Then only the checkers
        of the history look at it."""
        place = asked.namespace, asked.key
        if place in self._loose:
            self._doubtful.add(place)
        return place in self._loose

    def _resolved(self, known: KnownLog, staged: set[str | None], hidden: set[str]) -> list[Operation]:
        """The history, with open outcomes as the log tells them: a write that is in no log never happened."""
        done = {line.client: line.commit_id for line in known if line.is_write}
        resolved = []
        for operation in self._evidence.history:
            if operation.kind != "get" and operation.outcome == "open":
                if operation.client in done:
                    self._findings.open_happened += 1
                    operation = msgspec.structs.replace(operation, commit_id=done[operation.client])
                elif operation.client in staged:
                    self._findings.open_still += 1
                elif operation.client in hidden:
                    self._findings.open_unknown += 1
                else:
                    self._findings.open_never += 1
                    operation = msgspec.structs.replace(operation, outcome="failed")
            resolved.append(operation)
        return resolved

    def _check_history(self, resolved: list[Operation]) -> None:
        verdict = linearizability.judge(resolved)
        self._findings.checker = str(verdict).splitlines()[0]
        for violation in verdict.violations:
            self._problem(violation.kind, "history", str(violation))
        for namespace, key in verdict.undecided:
            self._problem("undecided", "history", f"key {key!r} in namespace {namespace!r}: too much to search")

    # --- what they logged ---

    def _check_node_logs(self) -> None:
        leaders: dict[int, str] = {}
        for node in (*self._evidence.nodes, *self._evidence.left):
            term = commit_id = 0
            for event in self._events(node):
                if event.get("event") == "starting":
                    if event["term"] < term or event["commit_id"] < commit_id:
                        words = f"started with term {event['term']} and commit_id {event['commit_id']}"
                        self._problem("forgot", node, f"{words}, after {term} and {commit_id}")
                    term, commit_id = max(term, event["term"]), max(commit_id, event["commit_id"])
                elif event.get("event") == "role":
                    term = max(term, event["term"])  # it is told after it is on disk
                    if event["role"] == "leader" and (other := leaders.setdefault(event["term"], node)) != node:
                        self._problem("two_leaders", node, f"led term {event['term']}, as {other} did")
                elif event.get("level") in ("error", "critical") and not is_expected(event, node, self._evidence.seen):
                    self._problem("error_logged", node, json.dumps(event))

    def _events(self, node: str) -> Iterator[dict[str, Any]]:
        """The lines of its log. A kill -9 may cut one off; else all of them are objects."""
        for line in (self._evidence.directory / f"{node}.log").read_bytes().splitlines():
            event: Any = None
            with contextlib.suppress(ValueError):
                event = json.loads(line)
            if isinstance(event, dict):
                yield event
            elif not (self._evidence.seen and line.startswith(b"raftnode: no member has taken ")):
                self._problem("strange_line", node, line.decode(errors="replace"))


def _told(operation: Operation) -> str:
    return linearizability.describe(operation)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
