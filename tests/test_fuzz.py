"""Broken and hostile messages at the ports of real nodes, from a seed that is printed: byte by byte (clients), and
field by field (somebody who says a member's hello).

The messages are made by `raftnode.testing.fuzz`. Bits are flipped, texts are cut, doubled and spliced, numbers become
extreme, fields come twice, nesting is deep, surrogates and UTF-8 are broken, lines are long or lack their end, several
objects stand in one line, and there is plain noise. What must hold: a node never ends, raises nothing, changes no term
because of a client, and carries out exactly what it acknowledges.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from typing import Any, Final

import pytest

from raftnode.config import KIB
from raftnode.testing.fuzz import Facts, Fuzzer, say
from raftnode.testing.limited import cluster_with_limits
from raftnode.testing.processes import ClusterOfProcesses, NodeProcess, wait_until

LIMITS: Final = {"frame_bytes": 64 * KIB, "election_low_ms": 3000, "election_high_ms": 4000}
QUICK: Final = LIMITS | {"heartbeat_ms": 50, "election_low_ms": 300, "election_high_ms": 600}
LINES: Final = 40
"""Messages on one connection."""
PATIENCE: Final = 30.0

pytestmark = pytest.mark.timeout(180)


def assert_unharmed(cluster: ClusterOfProcesses) -> None:
    """All nodes live, and nobody has raised what nobody caught: a traceback is no line of JSON."""
    for node in cluster:
        assert node.is_running, node.describe()
        bare = [line["event"] for line in node.events() if set(line) == {"event"}]
        assert not bare, "\n".join(bare)
        assert not node.events("ended"), node.describe()


def facts_of(node: NodeProcess) -> Facts:
    return Facts.of(node.await_answer(PATIENCE))


def acknowledged(answers: list[dict[str, Any]]) -> Iterator[int]:
    """The commit_ids of the writes that were acknowledged."""
    for answer in answers:
        if answer["type"] in ("put", "delete") and answer["data"] is True:
            yield answer["commit_id"]


def changes(answers: list[dict[str, Any]]) -> Iterator[int]:
    """The commit_ids of the memberships that were acknowledged: the one that there was, when nothing had to change."""
    for answer in answers:
        if answer["type"] in ("add_peer", "remove_peer", "replace_peer") and answer["data"] is True:
            yield answer["membership"].get("commit_id", 0)


def fuzz_clients(cluster: ClusterOfProcesses, seed: int, seconds: float) -> int:
    """Say broken things to all nodes in turn for so long, and check what they did; how many messages there were."""
    print(f"seed {seed}")  # noqa: T201 - shown when the test fails
    chance = random.Random(seed)
    cluster.await_leader()
    cluster.await_caught_up()
    term = cluster.term()
    fuzzer = Fuzzer(chance, facts_of(cluster[0]))
    done: list[int] = []
    memberships: set[int] = set()
    said, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        node = cluster[said % len(cluster)]
        answers = say(node.address, b"".join(fuzzer.line() for _ in range(LINES)))
        assert all("type" in answer and "data" in answer for answer in answers), answers
        done += acknowledged(answers)
        memberships.update(changes(answers))
        said += 1
    assert_unharmed(cluster)
    assert cluster.term() == term, cluster.describe()
    assert_carried_out(cluster, done, memberships)
    return said * LINES


def assert_carried_out(cluster: ClusterOfProcesses, done: list[int], memberships: set[int]) -> None:
    """The logs hold what was acknowledged, each once, and nothing else; the states are what the logs say; the logs are
    equal."""
    assert done, "no message was good enough to be carried out"
    assert len(done) == len(set(done)), "two acknowledged writes share a commit_id"
    cluster.await_caught_up(max(done))
    for node in cluster:
        entries = [record for record in node.inspect("commits", "--values") if record["record"] == "entry"]
        changed = {entry["commit_id"] for entry in entries if entry["kind"] == "members"}
        assert changed, "no change of the members was good enough to be carried out"
        assert changed == memberships - {0}, "the members are changed as acknowledged; they began without an entry"
        writes = [entry for entry in entries if entry["kind"] not in ("noop", "members")]
        assert {entry["commit_id"] for entry in writes} == set(done), "what was carried out is what was acknowledged"
        state: dict[tuple[str, str], Any] = {}
        for entry in writes:
            where = entry["namespace"], entry["key"]
            state.pop(where, None) if entry["kind"] == "delete" else state.update({where: entry["value"]})
        await_state(node, state)
    assert len({node.await_answer()["last"]["checksum"] for node in cluster}) == 1, "equal checksums, equal histories"


def await_state(node: NodeProcess, expected: dict[tuple[str, str], Any]) -> None:
    """What has committed is on disk a moment later."""

    def holds() -> bool:
        found = (record for record in node.inspect("state") if record["record"] == "value")
        return {(each["namespace"], each["key"]): each["value"] for each in found} == expected

    wait_until(holds, f"{node.name} holds what its log says", PATIENCE)


@pytest.mark.parametrize(("size", "seed"), [(1, 11), (3, 12)])
def test_broken_messages_of_clients(size: int, seed: int) -> None:
    """Thousands of broken messages to one node, and to each of three: see the top of this file."""
    with cluster_with_limits(size, LIMITS) as cluster:
        print(fuzz_clients(cluster, seed, seconds=3), "messages")  # noqa: T201


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(100, 104))
def test_broken_messages_of_clients_for_long(seed: int) -> None:
    """The same for a minute each, at three nodes."""
    with cluster_with_limits(3, LIMITS) as cluster:
        print(fuzz_clients(cluster, seed, seconds=60), "messages")  # noqa: T201


# --- somebody who says a member's hello -----------------------------------------------------------------------


def fuzz_members(cluster: ClusterOfProcesses, seed: int, seconds: float, highest: int) -> int:
    """Say to all nodes in turn, as another member of the cluster, what a member might say and what none would; how
    many messages got an answer that is no refusal of the speaker."""
    print(f"seed {seed}")  # noqa: T201 - shown when the test fails
    chance = random.Random(seed)
    taken, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        node = chance.choice(cluster.nodes)
        fuzzer = Fuzzer(chance, facts_of(node), highest)
        liar = chance.choice([address for address in cluster.addresses if address != node.address])
        hello = json.dumps(fuzzer.hello(liar, link=chance.random() < 0.3)).encode() + b"\n"
        answers = say(node.address, hello + b"".join(fuzzer.peer_line(liar) for _ in range(6)))
        taken += sum("error" not in answer for answer in answers)
    assert_unharmed(cluster)
    return taken


@pytest.mark.parametrize(("seed", "highest"), [(21, 10**6), (22, 2**53 - 1)], ids=["likely", "absurd"])
def test_messages_in_the_name_of_a_member(seed: int, highest: int) -> None:
    """Who knows cluster id, node id and address of a member can speak for it, as there is no authentication (README).
    Such a member is outside of what Raft promises anything about: it may depose leaders, and spoil the logs. But no
    message of its ends a node or makes it raise: not gaps, wrong checksums, terms that fall or jump, commit_ids far
    beyond the log, rounds that were never started, or commands that are none."""
    with cluster_with_limits(3, QUICK) as cluster:
        cluster.await_leader()
        cluster.await_caught_up()
        taken = fuzz_members(cluster, seed, seconds=3, highest=highest)
        print(taken, "messages were taken")  # noqa: T201
        assert taken > 50
        for node in cluster:
            node.await_answer()


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(200, 204))
def test_messages_in_the_name_of_a_member_for_long(seed: int) -> None:
    """The same for a minute each."""
    with cluster_with_limits(3, QUICK) as cluster:
        cluster.await_leader()
        cluster.await_caught_up()
        print(fuzz_members(cluster, seed, 60, 10**6), "messages were taken")  # noqa: T201
