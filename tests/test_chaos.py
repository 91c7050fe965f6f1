"""Chaos over real processes, a short run: `tools/chaos.py`, run as a test; and that its judge finds what is wrong.

What a run leaves is judged. And of a small run that was judged good, copies are damaged, each in one way that a fault
of the product could bring about: the judge has to find each and say what it is.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import lmdb
import msgspec
import pytest
from click.testing import CliRunner

import raftnode
from raftnode import records
from raftnode.consensus.journal import Mark
from raftnode.errors import error_for
from raftnode.messages import PutCommand, chain, decode_command, encode_command
from raftnode.testing import chaos, workload
from raftnode.testing.history import History, Operation
from raftnode.testing.judge import ENTRIES, HISTORY, RUN, Evidence, Findings, judge
from raftnode.testing.machine import file_system_of
from raftnode.testing.processes import ClusterOfProcesses, wait_until


def _load_tool(name: str) -> ModuleType:
    file = Path(__file__).resolve().parents[1] / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


tool = _load_tool("chaos")


def do_run(options: Any, directory: Path) -> tuple[Findings, list[str]]:
    """A run, and what is to be told of it, which is printed."""
    tool.run(options, directory)
    findings, lines = tool.look_at(directory)
    sys.stdout.write("\n".join(lines) + "\n")
    return findings, lines


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of three nodes with 22 seconds of all kinds of faults leaves."""
    directory = tmp_path_factory.mktemp("chaos")
    tool.run(tool.Options(nodes=3, seconds=22, seed=25), directory)
    return directory


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of a second leaves."""
    directory = tmp_path_factory.mktemp("small")
    findings, _ = do_run(tool.Options(nodes=3, seconds=1, seed=1, keys=12, faults=("reset",)), directory)
    assert findings.problems == []
    return directory


@pytest.fixture
def damaged(small: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(small, tmp_path / "bundle"))


# --- the run --------------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
def test_nothing_is_lost_in_a_short_run(bundle: Path) -> None:
    """Whatever is killed, stopped or cut, what was acknowledged is on every node, every answer agrees with one order of
    all writes, and the logs are one. Three nodes, eight clients, 22 seconds of faults from a fixed seed, all kinds.
    Seen: the judge finds nothing; there were hundreds of acknowledged writes, several kinds of faults, and elections;
    all that was in force has ended; nothing is left open."""
    findings, lines = tool.look_at(bundle)
    sys.stdout.write("\n".join(lines) + "\n")
    assert findings.problems == []
    assert lines[-1] == "good: nothing is lost"
    history = History.load(bundle / HISTORY)
    assert sum(operation.outcome == "ok" and operation.kind != "get" for operation in history) > 200
    assert {operation.node for operation in history} == _addresses(bundle)
    assert findings.log_entries > 200
    assert findings.reads_compared > 200
    assert findings.open_still == 0
    schedule = [json.loads(line) for line in (bundle / tool.FAULTS_FILE).read_text().splitlines()]
    assert len({entry["fault"] for entry in schedule}) >= 4
    assert all(entry["began"] <= entry["in_force"] <= entry["ended"] for entry in schedule)
    assert tool._logged(bundle, _nodes(bundle), "role", b'"role": "leader"') >= 2
    assert max(_count_by_key(history).values()) <= workload.OPERATIONS_PER_KEY + 3


def _nodes(bundle: Path) -> list[str]:
    nodes: list[str] = json.loads((bundle / RUN).read_bytes())["nodes"]
    return nodes


def _addresses(bundle: Path) -> set[str]:
    return {f"127.0.0.1:{node.removeprefix('node-')}" for node in _nodes(bundle)}


def _count_by_key(history: History) -> dict[str, int]:
    counts: dict[str, int] = {}
    for operation in history:
        counts[operation.key] = counts.get(operation.key, 0) + 1
    return counts


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("nodes", "seed"), [(3, 101), (5, 102)])
def test_nothing_is_lost_in_a_long_run(tmp_path: Path, nodes: int, seed: int) -> None:
    """The same for three minutes, with three nodes and with five."""
    findings, _ = do_run(tool.Options(nodes=nodes, seconds=180, seed=seed), tmp_path)
    assert findings.problems == []


ANSWER_READS_UNCONFIRMED = """
from raftnode.consensus.raft import Raft
Raft.read = lambda self, token: self._confirmed_reads.append((self.commit_id, token))
"""

COMMIT_ALONE = """
from raftnode.consensus.membership import Membership
Membership.agreed = lambda self, reached: max(reached.values())
"""

CALL_FAILED_WHAT_IS_OPEN = """
from raftnode.requests import Requests
def give_up(self):
    self._lead_term = 0
    for arrival in self._waiting.values():
        arrival.refuse("no_leader", "a lie")
    self._waiting.clear()
Requests._give_up_leading = give_up
"""


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("fault", "faults", "kinds"),
    [
        (ANSWER_READS_UNCONFIRMED, ("refuse-leader",), {"not_linearizable", "order_against_time"}),
        (ANSWER_READS_UNCONFIRMED, ("outlive",), {"not_linearizable", "order_against_time"}),
        (COMMIT_ALONE, ("isolate-leader", "kill-leader"), {"not_healed", "lost", "logs_differ"}),
        (CALL_FAILED_WHAT_IS_OPEN, ("refuse-leader", "isolate-leader"), {"failed_but_done", "failed_put_read"}),
    ],
    ids=["reads without a round, links refused", "reads without a round, late", "commit alone", "open called failed"],
)
def test_a_faulty_node_is_found(tmp_path: Path, fault: str, faults: tuple[str, ...], kinds: set[str]) -> None:
    """A run that finds nothing must be shown able to find something: nodes that break one rule are found out within
    half a minute of the faults that are made for it."""
    options = tool.Options(nodes=3, seconds=30, seed=3, faults=faults, environment=breaking(tmp_path, fault))
    findings, _ = do_run(options, tmp_path / "bundle")
    assert kinds & {problem.kind for problem in findings.problems}


def breaking(directory: Path, fault: str) -> tuple[tuple[str, str], ...]:
    """The environment of nodes that break a rule as each of them starts, by a module that Python imports before all
    others. Makes a directory for the bundle, too."""
    broken = directory / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(fault)
    (directory / "bundle").mkdir()
    return (("PYTHONPATH", f"{broken}{os.pathsep}{Path(raftnode.__file__).resolve().parents[1]}"),)


# --- the judge finds what is wrong ----------------------------------------------------------------------------

Plant = Callable[[Path], str]
"""Does the damage to a bundle; what the judge has to name."""


@contextlib.contextmanager
def _written(bundle: Path, node: str) -> Iterator[tuple[lmdb.Transaction, Callable[[bytes], Any]]]:
    """A write transaction on a node's directory, and its databases."""
    env = lmdb.open(str(bundle / node / records.DATA_FILE), subdir=False, map_size=1 << 36, max_dbs=8)
    try:
        databases = {name: env.open_db(name, create=False) for name in records.DATABASES}
        with env.begin(write=True) as txn:
            yield txn, databases.__getitem__
    finally:
        env.close()


def _change(bundle: Path, wanted: Callable[[Operation], bool], **changes: Any) -> Operation:
    """Another outcome of the last operation of that kind, in the history."""
    history = History.load(bundle / HISTORY)
    at = max(n for n, operation in enumerate(history) if wanted(operation))
    history.operations[at] = msgspec.structs.replace(history.operations[at], **changes)
    history.save(bundle / HISTORY)
    return history.operations[at]


def _acknowledged(bundle: Path) -> list[Operation]:
    """The puts that were acknowledged, in the order of the log."""
    found = [o for o in History.load(bundle / HISTORY) if o.outcome == "ok" and o.kind == "put"]
    return sorted(found, key=lambda operation: operation.commit_id or 0)


def _is_acknowledged_put(operation: Operation) -> bool:
    return operation.outcome == "ok" and operation.kind == "put"


def _is_read(operation: Operation) -> bool:
    return operation.outcome == "ok" and operation.kind == "get" and operation.value is not None


def drop_an_entry(bundle: Path) -> str:
    """One acknowledged entry is missing in the log of one node."""
    puts = _acknowledged(bundle)
    put = puts[len(puts) // 2]
    with _written(bundle, _nodes(bundle)[1]) as (txn, database):
        assert txn.delete(records.log_key(put.commit_id or 0), db=database(records.LOG))
    return f"put {put.key}"


def forget_the_tail(bundle: Path) -> str:
    """One node has forgotten its newest entries, and knows nothing of it: an old copy of the log, checksums right."""
    put = _acknowledged(bundle)[-3]
    assert put.commit_id is not None
    with _written(bundle, _nodes(bundle)[2]) as (txn, database):
        with txn.cursor(database(records.LOG)) as cursor:
            assert cursor.set_key(records.log_key(put.commit_id))
            while cursor.delete():
                pass
        commit_id = records.pack_meta(b"commit_id", put.commit_id - 1)
        txn.put(b"commit_id", commit_id, db=database(records.META))
    return put.client


def swap_values(bundle: Path) -> str:
    """Two values of one node are swapped, with right checksums."""
    with _written(bundle, _nodes(bundle)[0]) as (txn, database):
        committed = database(records.COMMITTED)
        with txn.cursor(committed) as cursor:
            (one, first), (other, second) = [(bytes(k), bytes(v)) for k, v in cursor][:2]
        a, b = records.unpack_record(one, first), records.unpack_record(other, second)
        txn.put(one, records.pack_record(one, msgspec.structs.replace(a, value=b.value)), db=committed)
        txn.put(other, records.pack_record(other, msgspec.structs.replace(b, value=a.value)), db=committed)
    return one.partition(b"\0")[2].decode()


def fork_a_log(bundle: Path) -> str:
    """One node has another last put in its log than the others, and in its namespaces, and all its checksums are
    right: two leaders have led."""
    put = _acknowledged(bundle)[-1]
    assert put.commit_id is not None
    with _written(bundle, _nodes(bundle)[1]) as (txn, database):
        log, committed = database(records.LOG), database(records.COMMITTED)
        position, end = put.commit_id, txn.stat(log)["entries"]
        before = records.unpack_entry(position - 1, bytes(txn.get(records.log_key(position - 1), db=log)))
        checksum = before.checksum
        for n in range(position, end + 1):
            entry = records.unpack_entry(n, bytes(txn.get(records.log_key(n), db=log)))
            command = entry.command
            if n == position:
                old = decode_command(command)
                assert isinstance(old, PutCommand)
                command = encode_command(msgspec.structs.replace(old, value=msgspec.Raw(b'"forked"')))
            checksum = chain(checksum, entry.term, n, entry.time, command)
            entry = msgspec.structs.replace(entry, command=command, checksum=checksum)
            txn.put(records.log_key(n), records.pack_entry(entry), db=log)
        key = f"{put.namespace}\0{put.key}".encode()
        if (stored := txn.get(key, db=committed)) is not None:
            record = records.unpack_record(key, bytes(stored))
            if record.modified == position:
                forked = msgspec.structs.replace(record, value=msgspec.Raw(b'"forked"'))
                txn.put(key, records.pack_record(key, forked), db=committed)
    return f"at {position}"


def acknowledge_what_is_nowhere(bundle: Path) -> str:
    """A write was acknowledged, and no node has it."""
    history = History.load(bundle / HISTORY)
    last = _acknowledged(bundle)[-1]
    end = max(operation.commit_id or 0 for operation in history)
    lost = msgspec.structs.replace(last, client="c1.lost", value="lost", commit_id=end + 5, replaced=last.commit_id)
    history.add(lost)
    history.save(bundle / HISTORY)
    return "c1.lost"


def refuse_what_was_done(bundle: Path) -> str:
    """A write that is in the log was answered as surely not executed."""
    changes = {"commit_id": None, "version": None, "replaced": None, "outcome": "failed", "code": "no_leader"}
    return _change(bundle, _is_acknowledged_put, **changes).client


def write_what_nobody_asked(bundle: Path) -> str:
    """The log holds a write that no client of the history asked for."""
    history = History.load(bundle / HISTORY)
    put = _acknowledged(bundle)[-1]
    history.operations = [operation for operation in history if operation.client != put.client]
    history.save(bundle / HISTORY)
    return put.client


def read_what_is_old(bundle: Path) -> str:
    """A read that asked for the newest value was answered with an old state of the key, as a replaced leader would."""
    puts = _acknowledged(bundle)
    old = next(old for old, new in itertools.combinations(puts, 2) if old.key == new.key)
    history = History.load(bundle / HISTORY)
    end = max(operation.returned or 0.0 for operation in history)
    stale = Operation(
        client="c1.stale", kind="get", key=old.key, namespace=old.namespace, value=old.value, outcome="ok",
        invoked=end + 1, returned=end + 2, commit_id=old.commit_id, modified=old.commit_id, version=old.version,
    )  # fmt: skip
    history.add(stale)
    history.save(bundle / HISTORY)
    return "c1.stale"


def read_what_never_was(bundle: Path) -> str:
    """A local read, which may be old, was answered with a state that was not at its commit_id: the value of one time
    with the version of another."""
    get = next(o for o in History.load(bundle / HISTORY) if _is_read(o))
    changed = _change(bundle, lambda o: o.client == get.client, version=(get.version or 0) + 1, is_local=True)
    return changed.client


def tell_a_wrong_version(bundle: Path) -> str:
    """A write was acknowledged with another version than it has."""
    put = _acknowledged(bundle)[-1]
    return _change(bundle, lambda o: o.client == put.client, version=(put.version or 0) + 1).client


def lead_twice(bundle: Path) -> str:
    """Two nodes have led one term, by their logs."""
    nodes = _nodes(bundle)
    logs = {node: (bundle / f"{node}.log").read_text() for node in nodes}
    node, line = next(
        (node, line) for node, text in logs.items() for line in text.splitlines() if '"role": "leader"' in line
    )
    other = next(name for name in nodes if name != node)
    (bundle / f"{other}.log").write_text(f"{logs[other]}{line}\n")
    return f"led term {json.loads(line)['term']}"


def forget_at_a_start(bundle: Path) -> str:
    """A node started with less than it had when it started before."""
    log = bundle / f"{_nodes(bundle)[0]}.log"
    starts = [line for line in log.read_text().splitlines() if '"starting"' in line]
    log.write_text(f"{log.read_text()}{starts[0]}\n")
    with log.open("a") as stream:
        stream.write(json.dumps({**json.loads(starts[0]), "term": 0}) + "\n")
    return "started with term 0"


def crash(bundle: Path) -> str:
    """A node printed a traceback."""
    with (bundle / f"{_nodes(bundle)[0]}.log").open("a") as stream:
        stream.write("Traceback (most recent call last):\n")
    return "Traceback"


def lose_a_directory(bundle: Path) -> str:
    """The directory of one node can't be read."""
    shutil.rmtree(bundle / _nodes(bundle)[2])
    return _nodes(bundle)[2]


PLANTS: list[tuple[Plant, set[str]]] = [
    (drop_an_entry, {"damage", "log_has_a_hole", "lost"}),
    (forget_the_tail, {"not_durable", "lost", "wrong_state"}),
    (swap_values, {"wrong_state"}),
    (fork_a_log, {"logs_differ", "replaced", "other_content"}),
    (acknowledge_what_is_nowhere, {"lost", "from_the_future"}),
    (refuse_what_was_done, {"failed_but_done"}),
    (write_what_nobody_asked, {"nobody_asked"}),
    (read_what_is_old, {"not_linearizable", "order_against_time"}),
    (read_what_never_was, {"wrong_read"}),
    (tell_a_wrong_version, {"wrong_answer"}),
    (lead_twice, {"two_leaders"}),
    (forget_at_a_start, {"forgot"}),
    (crash, {"strange_line"}),
    (lose_a_directory, {"unreadable", "lost"}),
]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("plant", "kinds"), PLANTS, ids=[plant.__name__ for plant, _ in PLANTS])
def test_the_judge_finds_what_is_planted(damaged: Path, plant: Plant, kinds: set[str]) -> None:
    """A judge that finds nothing must be shown able to find something. A bundle that was judged good is damaged in one
    way; the judge names it by each of the words that fit, and says where."""
    named = plant(damaged)
    findings = judge(Evidence.load(damaged))
    told = "\n".join(map(str, findings.problems))
    assert kinds <= {problem.kind for problem in findings.problems}, told
    assert named in told
    assert not findings.is_good


def compact(bundle: Path, node: str, upto: int) -> None:
    """Take the first entries of a log away, as compaction does."""
    with _written(bundle, node) as (txn, database):
        log, meta = database(records.LOG), database(records.META)
        entry = records.unpack_entry(upto, bytes(txn.get(records.log_key(upto), db=log)))
        for commit_id in range(1, upto + 1):
            txn.delete(records.log_key(commit_id), db=log)
        base = Mark(entry.id, entry.checksum)
        txn.put(b"base", records.pack_meta(b"base", base), db=meta)


@pytest.mark.timeout(120)
def test_the_judge_knows_logs_that_begin_late(damaged: Path) -> None:
    """What one log does not tell any more is taken from another, and the judgement is the same; what no log tells can't
    be judged, and that is said."""
    nodes = _nodes(damaged)
    compact(damaged, nodes[0], 100)
    compact(damaged, nodes[1], 20)
    assert judge(Evidence.load(damaged)).problems == []
    compact(damaged, nodes[2], 50)
    assert judge(Evidence.load(damaged)).problems == [], "a node has told it while it ran"
    (damaged / ENTRIES).unlink()
    assert {problem.kind for problem in judge(Evidence.load(damaged)).problems} >= {"log_begins_late"}


# --- its parts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("bad_request", "failed"), ("no_leader", "failed"), ("overloaded", "failed"), ("storage_full", "failed"),
        ("shutting_down", "failed"), ("not_committed", "open"), ("internal", "open"), ("damaged", "open"),
        ("a code of later", "open"),
    ],
)  # fmt: skip
def test_outcomes_are_those_of_the_errors(code: str, outcome: str) -> None:
    """An answer is noted as failed only when it says that nothing was executed, by raftnode/errors.py; everything that
    is not known to be so is open."""
    operation = Operation(client="c", kind="put", key="k", value="v", invoked=1.0)
    workload._note_answer(operation, {"type": "put", "data": False, "error": {"code": code, "message": ""}}, 2.0)
    assert (operation.outcome, operation.code) == (outcome, code), error_for(code, "")
    assert operation.returned == (2.0 if outcome == "failed" else None)


def test_longest_gap() -> None:
    """The longest time without an event is looked for within each span, its ends included; what lies outside counts for
    nothing."""
    assert tool.longest_gap([1.0, 2.0, 6.0], [(0.0, 7.0)]) == 4.0
    assert tool.longest_gap([1.0, 2.0, 6.0], [(0.0, 2.5), (5.5, 9.0)]) == 3.0
    assert tool.longest_gap([], [(0.0, 5.0)]) == 5.0
    assert tool.longest_gap([1.0], []) == 0.0


def test_a_key_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key collects more operations than a checker can decide, and a new one takes its place; several are in use at a
    time, in more than one namespace. Brought about with a small limit."""
    monkeypatch.setattr(workload, "OPERATIONS_PER_KEY", 10)
    window, chance = workload.Window(3), random.Random(1)
    taken = [window.take(chance) for _ in range(500)]
    counts = {place: taken.count(place) for place in taken}
    assert max(counts.values()) == 10
    assert len(counts) >= 50
    assert sorted(counts) == sorted(window.used)
    assert {namespace for namespace, _ in counts} == set(workload.NAMESPACES)


class _Clock:
    """An arena in which only time passes."""

    def __init__(self) -> None:
        self.now = 0.0

    def seconds(self) -> float:
        return self.now


def _fake_faults(arena: _Clock, done: list[str]) -> dict[str, Any]:
    """Faults that only note that they begin and end; one of them is never possible."""

    @contextlib.contextmanager
    def act(name: str, chance: Any) -> Iterator[str]:
        if name == "never":
            raise chaos.NotNow
        done.append(f"{name} begins at {arena.now:.2f}")
        yield f"{chance.random():.3f}"
        done.append(f"{name} ends at {arena.now:.2f}")

    names = ("one", "two", "never")
    return {name: chaos.Fault(lambda _, chance, name=name: act(name, chance), 0.5, 3.0) for name in names}


def test_the_seed_makes_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed, one schedule: which faults come when and for how long; another seed makes another. What can't be done
    is left out; faults overlap; all have ended at the end, also when something fails in between. Brought about with
    faults that only take notes, and a clock of our own."""

    def schedule(seed: int) -> tuple[list[str], list[dict[str, Any]]]:
        arena, done = _Clock(), []
        monkeypatch.setattr(chaos, "FAULTS", _fake_faults(arena, done))
        monkeypatch.setattr(chaos.time, "sleep", lambda seconds: setattr(arena, "now", arena.now + seconds + 1e-9))
        monkey = chaos.Monkey(arena, ["one", "two", "never"], seed)
        monkey.run(60.0)
        return done, monkey.schedule

    done, made = schedule(7)
    assert schedule(7) == (done, made)
    assert schedule(8)[1] != made
    assert len(done) == 2 * len(made) > 20
    assert {entry["fault"] for entry in made} == {"one", "two"}
    assert all(0.5 <= entry["ended"] - entry["began"] <= 3.2 for entry in made)
    overlapping = [(a, b) for a, b in itertools.pairwise(made) if b["began"] < a["ended"]]
    assert overlapping


@pytest.mark.timeout(120)
def test_a_node_that_ends_by_itself_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that ends while no fault has hit it is a problem, even if all else is as it must be, and whatever it left.
    Brought about with a fault that kills one and tells nobody."""

    @contextlib.contextmanager
    def murder(arena: Any, chance: random.Random) -> Iterator[str]:
        node = arena.any_node(chance)
        if arena.problems:
            raise chaos.NotNow
        os.kill(node.pid, signal.SIGKILL)
        wait_until(lambda: arena.problems, "the death is seen")
        yield node.name

    monkeypatch.setitem(chaos.FAULTS, "murder", chaos.Fault(murder, 0.0, 0.0))
    findings, lines = do_run(tool.Options(nodes=3, seconds=1, keys=3, faults=("murder",)), tmp_path)
    [problem] = findings.problems
    assert problem.kind == "ended"
    assert "ended with status -9" in problem.words
    assert lines[-1] == "BAD: 1 problems"


def test_what_goes_wrong_in_a_client_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect of the program itself is no verdict: it is raised, and the bundle is there all the same. Brought about
    with a client that fails at its third operation, or the next one whose connection is not cut."""
    note = workload._note_answer

    def fail(operation: Operation, *rest: Any) -> None:
        note(operation, *rest)
        name, _, number = operation.client.partition(".")
        if name == "c1" and int(number) >= 3:
            raise ZeroDivisionError

    monkeypatch.setattr(workload, "_note_answer", fail)
    with pytest.raises(ZeroDivisionError):
        tool.run(tool.Options(nodes=3, seconds=3, faults=("reset",)), tmp_path)
    assert len(History.load(tmp_path / HISTORY)) >= 3
    assert (tmp_path / RUN).exists()


def test_two_faults_do_not_hit_one_thing(tmp_path: Path) -> None:
    """A node or a road belongs to one fault at a time, else the end of one would undo the other. Brought about on a
    cluster that is not started. Seen, too: whether there is an unharmed majority is noted each time when it changes."""
    cluster = ClusterOfProcesses(3, tmp_path, proxied=True)
    with contextlib.closing(cluster):
        arena = chaos.Arena(cluster)
        a, b, c = cluster
        with arena.hitting(a):
            with pytest.raises(chaos.NotNow), arena.hitting(b, a):
                raise AssertionError("never reached")
            assert arena.whole == [b, c]
            road, other = (b.address, c.address), (a.address, b.address)
            with arena.roads([road]), pytest.raises(chaos.NotNow), arena.roads([road, other]):
                raise AssertionError("never reached")
            arena.down.clear()
        assert arena.whole == [a, b, c]
        assert [is_healthy for _, is_healthy in arena.healthy] == [True, False, True]


# --- the command ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--faults", "kill,earthquake"], "earthquake"),
        (["--nodes", "2"], "--nodes"),
        (["--seconds", "5", "--minutes", "1"], "not both"),
        (["--judge", "tests/nowhere"], "nowhere"),
    ],
)
def test_wrong_usage_has_status_2(words: list[str], said: str) -> None:
    """What can't be done is told, with status 2."""
    ran = CliRunner().invoke(tool.main, words)
    assert ran.exit_code == 2
    assert said in ran.output


def test_a_directory_in_memory_is_refused(tmp_path: Path) -> None:
    """A run on a tmpfs tests no disk: it is refused, and a directory that is no bundle is none to judge."""
    ran = CliRunner().invoke(tool.main, ["--judge", str(tmp_path)])
    assert ran.exit_code == 2
    assert f"{tmp_path} is no bundle of a run" in ran.output
    memory = Path("/dev/shm")
    if not memory.is_dir() or file_system_of(memory) != "tmpfs":
        pytest.skip("there is no tmpfs at /dev/shm")
    ran = CliRunner().invoke(tool.main, ["--directory", str(memory)])
    assert ran.exit_code == 2
    assert "/dev/shm: not on a disk" in ran.output


@pytest.mark.timeout(120)
def test_a_bundle_is_judged_again(damaged: Path) -> None:
    """`--judge` tells of a bundle what was told after the run, with the same exit status: 0 for a good one; 1 for one
    that is not, with what is wrong. A problem that was met while it ran is told again as well."""
    good = CliRunner().invoke(tool.main, ["--judge", str(damaged)])
    assert good.exit_code == 0, good.output
    assert good.output.splitlines()[-1] == "good: nothing is lost"
    facts = json.loads((damaged / RUN).read_bytes())
    facts["problems"] = [["ended", "node-1", "the process ended by itself"]]
    (damaged / RUN).write_text(json.dumps(facts))
    named = swap_values(damaged)
    bad = CliRunner().invoke(tool.main, ["--judge", str(damaged)])
    assert bad.exit_code == 1
    assert "WRONG         ended: node-1: the process ended by itself" in bad.output
    assert f"WRONG         wrong_state: {_nodes(damaged)[0]}: '{named}'" in bad.output
    assert bad.output.splitlines()[-1].startswith("BAD: ")
