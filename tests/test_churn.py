"""Members that come and go in the chaos run (`tools/chaos.py --churn`), a short run; and that its judge finds what is
wrong with members, and with what was in logs whose beginning is gone.

What a run leaves is judged. And of a small run that was judged good, copies are damaged, each in one way that a fault
of the product could bring about.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_chaos import _acknowledged, _written, breaking, do_run, tool

from raftnode import records
from raftnode.messages import Members
from raftnode.testing import chaos, turnover
from raftnode.testing.arena import Arena, NotNow, Wound, log_limits
from raftnode.testing.history import History, Operation
from raftnode.testing.judge import ENTRIES, HISTORY, RUN, Evidence, judge
from raftnode.testing.judge_members import GRACE_S, End, check_members, is_expected
from raftnode.testing.known_log import KnownLog, LogLine, Replay
from raftnode.testing.processes import ClusterOfProcesses, NodeProcess
from raftnode.testing.roll import Change, Seen

LIMITS = (
    ("RAFTNODE_LOG_ENTRIES", "100"),
    ("RAFTNODE_LOG_BYTES", "1000000"),
    ("RAFTNODE_SNAPSHOT_BYTES_PER_S", "200000"),
)
A, B, C, D = (f"127.0.0.1:500{n}" for n in range(1, 5))


def _run(options: Any, directory: Path) -> Path:
    """A run that has to be good."""
    findings, _ = do_run(options, directory)
    assert findings.problems == []
    return directory


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves in which a leader is removed in peace, and logs have about a hundred entries."""
    directory = tmp_path_factory.mktemp("small")
    faults = ("remove",)
    return _run(tool.Options(3, seconds=4, clients=4, seed=13, faults=faults, environment=LIMITS), directory)


@pytest.fixture
def damaged(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "bundle"))


# --- the run --------------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
def test_nothing_is_lost_while_members_come_and_go(tmp_path: Path) -> None:
    """Whatever joins, leaves, is replaced or loses its disk, and whatever is killed or cut meanwhile: what was
    acknowledged stays, on every member that there is in the end; they agree who the members are; the rest is history.
    Three nodes with logs of one entry, and some seconds of events from a fixed seed: a disk is lost and another node
    takes its place, one more joins, one is killed. Seen: the judge finds nothing; memberships have followed each other;
    every event has ended; snapshots were sent. (TRAPS 28 to 34.)"""
    bundle = _run(tool.Options(3, seconds=3, clients=4, seed=2809, faults=tuple(tool.ALL)), tmp_path)
    facts = json.loads((bundle / RUN).read_bytes())
    assert len(facts["seen"]) >= 3
    assert any(change["kind"] == "join" for change in facts["changes"])
    schedule = [json.loads(line) for line in (bundle / tool.FAULTS_FILE).read_text().splitlines()]
    assert all(entry["began"] <= entry["in_force"] <= entry["ended"] for entry in schedule)
    assert {entry["fault"] for entry in schedule} & set(turnover.TURNOVER)
    assert tool._logged(bundle, [*facts["nodes"], *facts["left"]], "snapshot_installed") > 0


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("nodes", "seed"), [(3, 201), (5, 202)])
def test_nothing_is_lost_in_a_long_run(tmp_path: Path, nodes: int, seed: int) -> None:
    """The same for three minutes, with three nodes and with five."""
    _run(tool.Options(nodes=nodes, seconds=180, seed=seed, faults=tuple(tool.ALL)), tmp_path)


FORGET_WHAT_IS_WRITTEN = """
from raftnode.snapshots import Transfer
track = Transfer._track
Transfer._track = lambda self, key: track(self, key) if self.walked is None else None
"""


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_faulty_snapshot_is_found(tmp_path: Path) -> None:
    """A run that finds nothing must be shown able to find something: leaders that do not send again what is written
    while a snapshot goes are found out, as the log that would have told is gone."""
    slow = (("RAFTNODE_LOG_ENTRIES", "5"), ("RAFTNODE_SNAPSHOT_BYTES_PER_S", "20000"))
    environment = (*breaking(tmp_path, FORGET_WHAT_IS_WRITTEN), *slow)
    findings, _ = do_run(
        tool.Options(3, seconds=20, seed=3, faults=("add",), environment=environment), tmp_path / "bundle"
    )
    assert {"wrong_state", "wrong_read"} & {problem.kind for problem in findings.problems}


# --- the judge finds what is wrong ----------------------------------------------------------------------------


def _facts(bundle: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((bundle / RUN).read_bytes())
    return facts


def _first_kept(bundle: Path, node: str) -> int:
    with _written(bundle, node) as (txn, database), txn.cursor(database(records.LOG)) as cursor:
        assert cursor.first()
        return int.from_bytes(cursor.key(), "big")


def drop_from_a_log(bundle: Path) -> str:
    """An acknowledged entry is missing in a log that begins late."""
    node = _facts(bundle)["nodes"][1]
    begin = _first_kept(bundle, node)
    put = next(put for put in _acknowledged(bundle) if (put.commit_id or 0) > begin)
    with _written(bundle, node) as (txn, database):
        assert txn.delete(records.log_key(put.commit_id or 0), db=database(records.LOG))
    return f"put {put.key}"


def drop_from_before_a_log(bundle: Path) -> str:
    """An acknowledged write that was in the log before its beginning is not in the state that took its place."""
    node = _facts(bundle)["nodes"][1]
    begin = _first_kept(bundle, node)
    with _written(bundle, node) as (txn, database):
        committed = next(database(name) for name in records.DATABASES if _is_state(txn, database, name))
        with txn.cursor(committed) as cursor:
            for key, value in cursor:
                if records.unpack_record(bytes(key), bytes(value)).modified < begin:
                    name = bytes(key).partition(b"\0")[2].decode()
                    assert cursor.delete()
                    return name
    raise AssertionError("every value is newer than the log")


def _is_state(txn: Any, database: Callable[[bytes], Any], name: bytes) -> bool:
    """The database that holds the values."""
    if name in (records.LOG, records.META):
        return False
    return bool(txn.stat(database(name))["entries"])


def serve_after_removal(bundle: Path) -> str:
    """A removed node answers a read rightly, long after."""
    facts, history = _facts(bundle), History.load(bundle / HISTORY)
    removed = next(change for change in facts["changes"] if change["kind"] == "remove" and change["outcome"] == "done")
    gone = next(
        seen["first"]
        for seen in facts["seen"]
        if seen["first"] > removed["began"] and removed["asked"]["address"] not in seen["members"]["voters"]
    )
    read = [o for o in history if o.outcome == "ok" and o.kind == "get" and not o.is_local][-1]
    begin = max(gone + GRACE_S, read.returned or 0.0) + 1
    node = removed["asked"]["address"]
    history.add(msgspec.structs.replace(read, client="c1.late", node=node, invoked=begin, returned=begin + 1))
    history.save(bundle / HISTORY)
    return "c1.late"


def differ_in_members(bundle: Path) -> str:
    """One member has an older membership on its disk than the others."""
    node = _facts(bundle)["nodes"][0]
    with _written(bundle, node) as (txn, database):
        founding = [{"voters": {A: "", B: ""}}]
        txn.put(b"memberships", records.pack_meta(b"memberships", founding), db=database(records.META))
    return node


def change_what_nobody_asked(bundle: Path) -> str:
    """Members have come and gone, and there was no change that names them."""
    facts = _facts(bundle)
    facts["changes"] = []
    (bundle / RUN).write_text(json.dumps(facts))
    return "has come, gone or changed"


def forget_what_was_told(bundle: Path) -> str:
    """A node has told an entry as committed while it ran, and the logs have another one there."""
    lines = [json.loads(line) for line in (bundle / ENTRIES).read_text().splitlines()]
    lines[-1]["checksum"] = "00000000"
    (bundle / ENTRIES).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"at {lines[-1]['commit_id']}"


PLANTS = [
    (drop_from_a_log, {"log_has_a_hole", "lost"}),
    (drop_from_before_a_log, {"wrong_state"}),
    (serve_after_removal, {"served_by_removed"}),
    (differ_in_members, {"membership_differs"}),
    (change_what_nobody_asked, {"nobody_asked"}),
    (forget_what_was_told, {"logs_differ"}),
]


def _assert_found(bundle: Path, named: list[str], kinds: set[str]) -> None:
    findings = judge(Evidence.load(bundle))
    told = "\n".join(map(str, findings.problems))
    assert kinds <= {problem.kind for problem in findings.problems}, told
    assert [name for name in named if name not in told] == [], told


@pytest.mark.timeout(240)
def test_the_judge_finds_all_that_is_planted(damaged: Path) -> None:
    """A bundle that was judged good is damaged in all ways; the judge names each by the words that fit."""
    named = [plant(damaged) for plant, _ in PLANTS]
    _assert_found(damaged, named, set().union(*(kinds for _, kinds in PLANTS)))


@pytest.mark.long
@pytest.mark.parametrize(("plant", "kinds"), PLANTS, ids=[plant.__name__ for plant, _ in PLANTS])
def test_the_judge_finds_what_is_planted(damaged: Path, plant: Callable[[Path], str], kinds: set[str]) -> None:
    """The same, each way by itself."""
    _assert_found(damaged, [plant(damaged)], kinds)


# --- its parts ------------------------------------------------------------------------------------------------


def _seen(at: float, commit_id: int, *voters: str, **more: Any) -> Seen:
    return Seen(at, at + 1, Members(commit_id=commit_id, voters=dict.fromkeys(voters, "x"), **more))


def _end(address: str, *voters: str, commit_id: int = 5, **more: Any) -> End:
    members = {"commit_id": commit_id, "voters": dict.fromkeys(voters, "x"), "learners": {}, "replaces": {}, **more}
    return End(f"node-{address[-4:]}", address, "x", members)


@pytest.mark.parametrize(
    ("ends", "kinds"),
    [
        ([_end(A, A, B), _end(B, A, B)], set()),
        ([_end(A, A, B), _end(B, A, B, commit_id=4)], {"membership_differs"}),
        ([_end(A, A, B), _end(B, A, B, C)], {"membership_differs"}),
        ([_end(A, A, B)], {"membership_differs"}),
        ([_end(A, A, B), _end(B, A, B)._replace(node="y")], {"membership_differs"}),
        ([_end(A, A, B), _end(B, A, B, learners={C: ""})], {"change_not_finished"}),
        ([_end(A, A, B), _end(B, A, B, replaces={B: A})], {"change_not_finished"}),
    ],
)
def test_members_at_the_end(ends: list[End], kinds: set[str]) -> None:
    """All have the newest membership, and nothing is left to be done."""
    seen = [_seen(1.0, 0, A, B, C), _seen(2.0, 5, A, B)]
    changes = [Change(kind="remove", asked={"address": C}, began=1.5, outcome="open")]
    found = check_members(ends, KnownLog(10), [], seen, changes)
    assert {kind for kind, _, _ in found} == kinds


@pytest.mark.parametrize(
    ("positions", "voters", "kinds"),
    [
        ((3, 4), {A: "a", B: "b"}, set()),
        ((3, 4), {A: "a", B: "b", C: "c", D: ""}, set()),
        ((3, 4), {A: "a", B: "b", C: "other"}, set()),
        ((3, 4), {A: "a"}, {"two_at_once"}),
        ((3, 4), {A: "a", B: "b", D: ""}, {"two_at_once"}),
        ((3, 5), {A: "a"}, set()),
    ],
)
def test_votes_change_one_at_a_time(positions: tuple[int, int], voters: dict[str, str], kinds: set[str]) -> None:
    """By two memberships of the log that surely follow each other; between two others there may be more."""
    known = KnownLog(5)
    before, after = positions
    lines = [
        LogLine(commit_id=before, checksum="x", kind="members", voters={A: "a", B: "b", C: "c"}),
        LogLine(commit_id=after, checksum="x", kind="members", voters=voters),
    ]
    assert known.add("a", lines) is None
    seen = [_seen(2.0, 5, A)]
    assert {kind for kind, _, _ in check_members([_end(A, A)], known, [], seen, [])} - {"membership_differs"} == kinds


def test_who_was_away_is_out_only_for_so_long() -> None:
    """A member that was removed and came back may answer before, and again after; in between only within the time of
    what it had passed on. Local reads show that they are old, and refusals are as it must be."""
    seen = [_seen(0.0, 0, A, B, C), _seen(100.0, 5, A, B), _seen(200.0, 6, A, B, C)]
    ends = [_end(node, A, B, C, commit_id=6) for node in (A, B, C)]
    asked = [
        Change(kind="remove", asked={"address": C}, began=1.5),
        Change(kind="add", asked={"address": C}, began=1.5),
    ]

    def found(at: float, **facts: Any) -> set[str]:
        get = Operation(client="c", kind="get", key="k", node=C, invoked=at, returned=at, **{"outcome": "ok", **facts})
        return {kind for kind, _, _ in check_members(ends, KnownLog(10), [get], seen, asked)}

    assert found(99.0) == found(100.0 + GRACE_S / 2) == found(150.0) == set()
    seen[1].last = 199.0
    assert found(150.0) == {"served_by_removed"}
    assert found(150.0, is_local=True) == found(150.0, outcome="failed") == found(200.5) == set()


def test_errors_of_changes_are_expected_of_whom_they_concern() -> None:
    """Nodes log it as an error that their disk was lost, or that they are no member. Others must not."""
    seen = [_seen(0.0, 0, A, B, C), _seen(100.0, 5, A, B)]
    lost, out = {"event": "disk_was_lost"}, {"event": "not_member"}
    assert is_expected(lost, "node-5001.2", seen)
    assert not is_expected(lost, "node-5001", seen)
    assert is_expected(out, "node-5003", seen)
    assert not is_expected(out, "node-5001", seen)
    assert not is_expected({"event": "peer_refused", "code": "old_copy"}, "node-5001", seen)
    assert not is_expected({"event": "peer_refused", "code": "not_member"}, "node-5001", [])


def _put(position: int | None, key: str = "k", **facts: Any) -> Operation:
    """A put that is acknowledged as `position`, or of which it is not known."""
    facts = {"client": f"c{position}", "value": f"v{position}", "invoked": float(position or 0), **facts}
    if position is not None:
        facts = {"outcome": "ok", "commit_id": position, "returned": position + 0.5, **facts}
    return Operation(kind="put", key=key, **facts)


def test_what_is_known_of_a_log_without_its_beginning() -> None:
    """Positions that no log has any more are told by answers: an acknowledged write's own, that of the write which a
    read found, and that of the one which a write has replaced. What is left can only be a write that nobody has seen,
    and only behind what was committed when it was asked for."""
    known = KnownLog(9)
    assert known.add("a", [LogLine(commit_id=n, term=1, checksum="x", kind="noop") for n in (8, 9)]) is None
    read, replaced, lost, late = (
        _put(None, k, client=k, value=k, invoked=1.5) for k in ("read", "old", "lost", "late")
    )
    late.invoked = 7.9
    get = Operation(
        client="g", kind="get", key="read", value="read", modified=3, commit_id=3, outcome="ok", invoked=4.0
    )
    get.returned = 4.1
    over = _put(6, "old", replaced=5)
    known.learn([_put(1), _put(2), read, replaced, lost, late, get, over, _put(7)])
    assert known.unknown == [4]
    assert [line.client for line in known if line.is_write] == ["c1", "c2", "read", "old", "c6", "c7"]
    assert known.hidden([lost, late]) == [lost]
    assert Replay(known).answers[6] == (2, 5)


def test_two_sources_of_one_log_must_agree() -> None:
    """Where it begins to differ is told, with who has it otherwise."""
    known = KnownLog(9)
    ours = [LogLine(commit_id=n, term=1, checksum=f"{n}") for n in range(5, 9)]
    theirs = [LogLine(commit_id=n, term=1, checksum=f"{n}" if n < 7 else "other") for n in range(3, 9)]
    assert known.add("a", ours) is None
    difference = known.add("b", theirs)
    assert difference is not None
    assert (difference.position, difference.by) == (7, "a")
    assert len(known) == 6


def test_a_fault_leaves_nothing_to_those_who_come_later(tmp_path: Path) -> None:
    """What a fault has cut is open again at its end, also the roads to addresses at which nobody has been yet: a
    newcomer there would be cut off without anybody knowing why. Brought about on a cluster that is not started."""
    roads = ["cut", "cut-one-way", "mute", "isolate", "isolate-leader", "split", "bridge", "slow", "slow-clients",
             "cut-clients", "refuse", "refuse-leader", "outlive", "wake-alone"]  # fmt: skip
    cluster = ClusterOfProcesses(3, tmp_path, proxied=True, spares=2)
    with contextlib.closing(cluster), pytest.MonkeyPatch.context() as patch:
        patch.setattr(chaos.time, "sleep", lambda _: None)
        patch.setattr(Arena, "leader", lambda arena: arena.cluster[0])
        for action in ("pause", "resume"):
            patch.setattr(NodeProcess, action, lambda _: None)
        for name in roads:
            with chaos.FAULTS[name].act(Arena(cluster), random.Random(1)):
                assert cluster.proxy.disturbed
            assert cluster.proxy.disturbed == [], name


def test_at_most_one_disk_is_lost_at_a_time(tmp_path: Path) -> None:
    """A disk may be lost only while all voters are well and agree, and until it is made up for nobody is taken out:
    else a run could break a majority for good by itself. Brought about on a cluster that is not started."""
    cluster = ClusterOfProcesses(4, tmp_path, proxied=True, spares=1)
    with contextlib.closing(cluster):
        arena = Arena(cluster)
        node = cluster[0]
        arena.may_shrink()
        with pytest.raises(NotNow):
            arena.may_lose(node)  # nobody answers
        arena.wound = Wound(node, node)
        with pytest.raises(NotNow):
            arena.may_shrink()
        arena.wound = None
        arena.roll.note("remove", {"address": node.address}, via="another")
        with pytest.raises(NotNow):
            arena.may_shrink()  # the first one may be made yet


def test_a_lost_disk_is_made_up_for_by_the_new_one(tmp_path: Path) -> None:
    """What a voter has answered an instant before its disk was lost does not heal the wound: only the vote of the node
    with the new disk does."""
    cluster = ClusterOfProcesses(3, tmp_path, proxied=True)
    with contextlib.closing(cluster):
        arena, node = Arena(cluster), cluster[0]
        arena.roll.seen = [_seen(1.0, 0, *cluster.addresses)]
        arena.roll.answered, arena.roll.statuses = {node.name}, {node: {"node": "x"}}
        arena.exchange_disk(node)
        arena.wound = Wound(node, node)
        arena._tend_wound()
        assert arena.wound is not None
        arena.roll.answered.add(node.name)
        arena._tend_wound()
        assert arena.wound is None


def test_addresses_are_used_again_with_another_disk(tmp_path: Path) -> None:
    """A newcomer takes a spare address; when it has gone, the next one there has an empty directory and a log of its
    own. What was on a lost disk stays under its old name."""
    cluster = ClusterOfProcesses(1, tmp_path, proxied=True, spares=1)
    with contextlib.closing(cluster):
        first = cluster.newcomer()
        assert cluster.spares == 0
        name = first.name
        assert first.exchange_disk() == name
        assert (first.name, first.volume.name, first.log_file.name) == (f"{name}.2", f"{name}.2", f"{name}.2.log")
        cluster.let_go(first)
        cluster.reuse(first)
        again = cluster.newcomer()
        assert (again.address, again.name) == (first.address, f"{name}.3")


def test_limits_come_from_the_seed() -> None:
    """One seed, one set of limits; over many, logs from one entry on."""
    assert log_limits(7) == log_limits(7)
    drawn = [log_limits(seed) for seed in range(50)]
    assert {"1", "1000"} <= {limits["RAFTNODE_LOG_ENTRIES"] for limits in drawn}
    assert not set(chaos.FAULTS) & set(turnover.TURNOVER)
