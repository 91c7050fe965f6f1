"""A member that lacks more than the others' logs keep, as a real process: it comes back by a snapshot while clients
write, whatever kills it on the way; and the inspector is right about directories whose log begins late."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raftnode.testing.processes import (
    FAST,
    ClusterOfProcesses,
    NodeProcess,
    WriteRecord,
    Writers,
    command_environment,
    wait_until,
)

SHORT = {
    **FAST,
    "RAFTNODE_LOG_ENTRIES": "100",
    "RAFTNODE_SNAPSHOT_CHUNK_BYTES": "4000",
    "RAFTNODE_SNAPSHOT_BYTES_PER_S": "400000",
    "RAFTNODE_SWEEP_KEYS": "50",
}
KEYS = 1000


def records() -> Iterator[WriteRecord]:
    """All keys once, and then some of them again and again, with a value of its own each time."""
    chance = random.Random(7)
    for n in range(KEYS):
        yield WriteRecord(f"key-{n}", {"n": n, "text": "x" * 300})
    for n in range(KEYS, 1 << 30):
        yield WriteRecord(f"again-{chance.randrange(200)}-{n}", {"n": n})


@pytest.fixture
def three(tmp_path: Path) -> Iterator[ClusterOfProcesses]:
    with ClusterOfProcesses(3, tmp_path, SHORT, options=["--timeout", "5"]) as cluster:
        cluster.await_leader()
        yield cluster


def inspector(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raftnode.inspector", *map(str, words)]
    return subprocess.run(command, env=command_environment(), capture_output=True, text=True, timeout=60)


def state(node: NodeProcess) -> list[dict[str, Any]]:
    """All values in its directory, with created, modified and version."""
    return node.inspect("state")


def first_kept(node: NodeProcess) -> int:
    found: int = node.inspect("info")[0]["first_kept"]["commit_id"]
    return found


def left_behind(cluster: ClusterOfProcesses, writers: Writers) -> NodeProcess:
    """A follower that was killed before the others wrote, and deleted, what it lacks."""
    writers.await_acknowledged(KEYS)
    leader = cluster.await_leader()
    behind = cluster.others(leader)[0]
    behind.kill()
    last = behind.inspect("log")[-1]["commit_id"]
    writers.await_more(400)
    wait_until(lambda: (leader.status() or {"first": 0})["first"] > last + 1, f"the leader's log begins after {last}")
    return behind


def test_who_was_away_too_long_comes_back_by_a_snapshot(three: ClusterOfProcesses) -> None:
    """Clients write all the time. The follower has installed a snapshot, its log goes on from there, and in the end all
    three directories hold the same state, each with a log that begins late; the leader was not disturbed. What can be
    told of these directories is told, and no more."""
    with Writers(three.addresses, records(), clients=4) as writers:
        behind = left_behind(three, writers)
        leader = three.await_leader()
        term, mark = three.term(), behind.mark()
        behind.start()
        installed = behind.await_event("snapshot_installed", mark)
        writers.await_more(200)
        leader.await_event("snapshot_sent", peer=behind.address)
    assert installed["leader"] == leader.address
    assert three.term() == term
    three.await_caught_up()
    keys = [record.key for record in writers.written]
    assert behind.read(keys, consistency="local") == {record.key: record.value for record in writers.written}
    assert leader.status() is not None
    three.terminate()
    assert state(three[0]) == state(three[1]) == state(three[2])
    for node in three:
        assert first_kept(node) > 100
        check_what_is_told(node)
    compare = inspector("diff", *(node.volume for node in three), "--json")
    assert compare.returncode in (0, 1), compare.stderr
    best = inspector("best", *(node.volume for node in three), "--json")
    assert best.returncode == 0, best.stderr
    three.start()
    with three.client() as client:
        client.put("after", 1)
    three.await_caught_up()


def check_what_is_told(node: NodeProcess) -> None:
    """Of one directory whose log begins late."""
    verified = inspector("verify", node.volume, "--json")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    first = first_kept(node)
    log = node.inspect("log")
    assert [entry["commit_id"] for entry in log] == list(range(first, first + len(log)))
    assert not [entry for entry in log if entry.get("damaged")]
    past = inspector("state", node.volume, "--at", first)
    assert past.returncode == 3
    assert f"the log begins at {first}" in past.stderr
    newest = log[-1]
    changes = inspector("history", node.volume, newest["key"], "--json") if newest.get("key") else None
    if changes is not None:
        assert changes.returncode == 0
        assert json.loads(changes.stdout.splitlines()[-1])["commit_id"] == newest["commit_id"]


@pytest.mark.parametrize(
    ("seed", "most"), [(0, 4), *(pytest.param(seed, 8, marks=pytest.mark.long) for seed in (0, 1))]
)
def test_kill_9_of_a_receiver_at_any_instant(three: ClusterOfProcesses, seed: int, most: int) -> None:
    """The snapshot takes a second or two; the receiver is killed in the middle, again and again. Each time its
    directory is sound and holds the old state or a new one, all of it; and it gets there in the end."""
    chance = random.Random(seed)
    with Writers(three.addresses, records(), clients=2) as writers:
        behind = left_behind(three, writers)
        old = state(behind)
        kills, is_new = 0, False
        while not is_new and kills < most:
            mark = behind.mark()
            behind.start()
            if kills < most - 1:
                behind.await_event("peer_connected", mark)
                time.sleep(chance.uniform(0, 0.8))  # the instant is what is drawn; nothing is awaited
            else:
                behind.await_event("snapshot_installed", mark)
            behind.kill()
            kills += 1
            assert inspector("verify", behind.volume).returncode == 0
            found = state(behind)
            is_new = found != old
            if is_new:
                assert {f"key-{n}" for n in range(KEYS)} <= {value["key"] for value in found}
        behind.start()
        writers.await_more(100)
    three.await_caught_up()
    three.terminate()
    assert state(three[0]) == state(three[1]) == state(three[2])
