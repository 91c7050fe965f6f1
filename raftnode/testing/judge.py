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

What must hold, and is looked at for each node by itself:

* the directory can be read, nothing in it is damaged, the log has every position from where it begins, and its terms
  never fall; what was before, which was committed, is taken from the log of another node;
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
import itertools
import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct

from raftnode.testing import linearizability
from raftnode.testing.history import History, Operation
from raftnode.testing.processes import InspectionFailed, inspect_lines

HISTORY: Final = "history.jsonl"
RUN: Final = "run.json"

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
    """Committed, on the node that has most."""
    reads_compared: int = 0
    """Answers of reads that were compared with the log."""
    open_happened: int = 0
    """Writes with an open outcome that are committed in the log."""
    open_never: int = 0
    """... that are in no log, and never will be."""
    open_still: int = 0
    """... that are staged at the end."""
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

    @classmethod
    def load(cls, directory: Path) -> Evidence:
        """Read a bundle. Raises OSError for what is none."""
        run = json.loads((directory / RUN).read_bytes())
        return cls(directory, History.load(directory / HISTORY), run["nodes"], run["reached"])


def judge(evidence: Evidence) -> Findings:
    """Look at everything."""
    return _Judge(evidence).run()


# --- what is read from a node ---------------------------------------------------------------------------------


class _LogLine(Struct):
    """A line of `raftnode-inspect log --json --values`."""

    record: str
    commit_id: int | None = None
    term: int = 0
    kind: str | None = None
    namespace: str | None = None
    key: str | None = None
    client: str | None = None
    checksum: str = ""
    state: str | None = None
    value: Any = None
    damaged: bool = False
    reason: str = ""

    @property
    def is_write(self) -> bool:
        return self.kind in ("put", "delete")

    @property
    def content(self) -> tuple[Any, ...]:
        """What it does, and who asked."""
        return self.kind, self.namespace, self.key, self.value


class _InfoLine(Struct):
    """A line of `raftnode-inspect info --json`."""

    commit_id: int | None = None


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


class _Value(Struct, frozen=True):
    """A committed value, as a replay makes it."""

    value: Any
    created: int
    modified: int
    version: int


Place = tuple[str, str]
"""Namespace and key."""


class _Replay:
    """What a log does to the namespaces: every state that each key ever had."""

    def __init__(self, lines: list[_LogLine]) -> None:
        self.answers: dict[int, tuple[int | None, int | None]] = {}
        """By commit_id of a write: the version and the `replaced` that its client is told."""
        self._times: dict[Place, list[int]] = defaultdict(list)
        self._values: dict[Place, list[_Value | None]] = defaultdict(list)
        for line in lines:
            if line.is_write:
                self._apply(line)

    def _apply(self, line: _LogLine) -> None:
        assert line.namespace is not None and line.key is not None and line.commit_id is not None, "a write has them"  # noqa: PT018
        place, at = (line.namespace, line.key), line.commit_id
        old = self._values[place][-1] if self._values[place] else None
        replaced = None if old is None else old.modified
        new: _Value | None = None
        if line.kind == "put":
            created, version = (at, 1) if old is None else (old.created, old.version + 1)
            new = _Value(line.value, created, at, version)
        self.answers[at] = (None if new is None else new.version, replaced)
        self._times[place].append(at)
        self._values[place].append(new)

    def at(self, place: Place, commit_id: int) -> _Value | None:
        """What a key held when everything up to `commit_id` had been applied."""
        index = bisect_right(self._times[place], commit_id) if place in self._times else 0
        return self._values[place][index - 1] if index else None

    def last(self) -> dict[Place, _Value]:
        """What all keys hold in the end."""
        return {place: values[-1] for place, values in self._values.items() if values[-1] is not None}


# --- the judge ------------------------------------------------------------------------------------------------


class _Judge:
    def __init__(self, evidence: Evidence) -> None:
        self._evidence = evidence
        self._findings = Findings(operations=len(evidence.history))
        self._counts: Counter[tuple[str, str]] = Counter()
        self._writes: dict[str, Operation] = {}
        self._marks: dict[str, list[tuple[int, str]]] = {}  # by node: term and checksum of each position, from 1 on

    def run(self) -> Findings:
        self._name_writes()
        longest: list[_LogLine] = []
        staged: set[str | None] = set()
        logs = {node: self._read_log(node) for node in self._evidence.nodes}
        whole = self._whole(logs.values())
        for node, kept in logs.items():
            log = [*self._before(node, kept, whole), *kept]
            committed = [line for line in log if line.state == "committed"]
            self._check_node(node, log, committed)
            longest = max(longest, committed, key=len)
            staged.update(line.client for line in log[len(committed) :] if line.is_write)
        self._findings.log_entries = len(longest)
        self._check_answers(_Replay(longest), len(longest))
        self._check_history(self._resolved(longest, staged))
        self._compare_logs()
        self._check_node_logs()
        self._tell_counts()
        return self._findings

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

    def _read_log(self, node: str) -> list[_LogLine]:
        lines: list[_LogLine] = []
        for line in self._inspected(node, _LogLine, "log", "--values"):
            if line.damaged or line.record != "entry":
                self._problem("damage", node, f"entry {line.commit_id}: {line.reason}")
            if line.record == "entry":
                lines.append(line)
        return lines

    def _whole(self, logs: Iterable[list[_LogLine]]) -> list[_LogLine]:
        """All that was committed, from position 1 on, as far as any log tells."""
        found = {line.commit_id: line for log in logs for line in log if line.state == "committed"}
        return [found[position] for position in itertools.takewhile(found.__contains__, itertools.count(1))]

    def _before(self, node: str, kept: list[_LogLine], whole: list[_LogLine]) -> list[_LogLine]:
        """What was in a node's log before it begins: it was committed, so another node's log tells it."""
        if kept:
            first = (kept[0].commit_id or 1) - 1
        else:
            first = next((line.commit_id or 0 for line in self._inspected(node, _InfoLine, "info")), 0)
        if first > len(whole):
            self._problem("log_begins_late", node, f"no log tells what came before {first + 1}: {len(whole) + 1}, say")
        return whole[:first]

    def _inspected(self, node: str, type: type[S], *command: str) -> Iterator[S]:
        """What `raftnode-inspect` prints of a node. That it fails is a problem of the node."""
        decode = msgspec.json.Decoder(type).decode
        try:
            for line in inspect_lines(self._evidence.directory / node, *command):
                yield decode(line)
        except InspectionFailed as failure:
            self._problem("unreadable", node, str(failure))

    def _check_node(self, node: str, log: list[_LogLine], committed: list[_LogLine]) -> None:
        self._marks[node] = [(line.term, line.checksum) for line in committed]
        self._check_shape(node, log)
        reached = self._evidence.reached
        if reached is not None and len(committed) < reached:
            self._problem("not_durable", node, f"had committed {reached} when it ran, and {len(committed)} on disk")
        self._check_writes(node, log)
        self._check_acknowledged(node, {line.commit_id: line for line in committed})
        self._check_state(node, _Replay(committed).last())

    def _check_shape(self, node: str, log: list[_LogLine]) -> None:
        """Every position from 1 on is there, and the terms do not fall."""
        term = 0
        for position, line in enumerate(log, 1):
            if line.commit_id != position:
                self._problem("log_has_a_hole", node, f"position {position} is missing: {line.commit_id} follows")
                return
            if line.term < term:
                self._problem("terms_fall", node, f"entry {position} is of term {line.term}, the one before of {term}")
            term = line.term

    def _check_writes(self, node: str, log: list[_LogLine]) -> None:
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

    def _check_acknowledged(self, node: str, committed: dict[int | None, _LogLine]) -> None:
        for asked in self._writes.values():
            if asked.outcome != "ok":
                continue
            line = committed.get(asked.commit_id)
            if line is None:
                self._problem("lost", node, f"acknowledged, and not committed here: {_told(asked)}")
            elif line.client != asked.client or line.content != (
                asked.kind,
                asked.namespace,
                asked.key,
                asked.value,
            ):
                self._problem("replaced", node, f"acknowledged was {_told(asked)}, but at its place is {line}")

    def _check_state(self, node: str, expected: dict[Place, _Value]) -> None:
        """The namespaces are what the log makes of them."""
        for line in self._inspected(node, _ValueLine, "state"):
            if line.damaged or line.namespace is None or line.key is None:
                self._problem("damage", node, f"value of {line.key!r}: {line.reason}")
                continue
            wanted = expected.pop((line.namespace, line.key), None)
            found = _Value(line.value, line.created, line.modified, line.version)
            if found != wanted:
                self._problem("wrong_state", node, f"{line.key!r} holds {_short(found)}; by the log {_short(wanted)}")
        for (_, key), missing in expected.items():
            self._problem("wrong_state", node, f"{key!r} is not there; by the log it holds {_short(missing)}")

    # --- all together ---

    def _compare_logs(self) -> None:
        """Equal checksums at a position are equal histories up to it; a difference is told where it begins."""
        (first, marks), *others = self._marks.items()
        for other, theirs in others:
            for position, (ours, found) in enumerate(zip(marks, theirs, strict=False), 1):
                if ours != found:
                    words = f"at {position} it has (term, checksum) {found}, {first} has {ours}"
                    self._problem("logs_differ", other, words)
                    break

    def _check_answers(self, replay: _Replay, last: int) -> None:
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
                if (asked.version, asked.replaced) != wanted:
                    words = f"{_told(asked)} was told a wrong version or `replaced`: {wanted} by the log"
                    self._problem("wrong_answer", "history", words)

    def _check_read(self, get: Operation, replay: _Replay) -> None:
        assert get.commit_id is not None, "a read shows one"
        self._findings.reads_compared += 1
        state = replay.at((get.namespace, get.key), get.commit_id)
        wanted = (None, None, 0) if state is None else (state.value, state.modified, state.version)
        if (get.value, get.modified, get.version or 0) != wanted:
            self._problem("wrong_read", "history", f"{_told(get)}; by the log at {get.commit_id}: {_short(state)}")

    def _resolved(self, committed: list[_LogLine], staged: set[str | None]) -> list[Operation]:
        """The history, with open outcomes as the log tells them: a write that is in no log never happened."""
        done = {line.client: line.commit_id for line in committed if line.is_write}
        resolved = []
        for operation in self._evidence.history:
            if operation.kind != "get" and operation.outcome == "open":
                if operation.client in done:
                    self._findings.open_happened += 1
                    operation = msgspec.structs.replace(operation, commit_id=done[operation.client])
                elif operation.client in staged:
                    self._findings.open_still += 1
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
        for node in self._evidence.nodes:
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
                elif event.get("level") in ("error", "critical"):
                    self._problem("error_logged", node, json.dumps(event))

    def _events(self, node: str) -> Iterator[dict[str, Any]]:
        """The lines of its log. A kill -9 may cut one off; else all of them are objects."""
        for line in (self._evidence.directory / f"{node}.log").read_bytes().splitlines():
            event: Any = None
            with contextlib.suppress(ValueError):
                event = json.loads(line)
            if isinstance(event, dict):
                yield event
            else:
                self._problem("strange_line", node, line.decode(errors="replace"))


def _told(operation: Operation) -> str:
    return linearizability.describe(operation)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
