"""Bad clients and load, against real nodes in processes of their own whose limits are set low so that they show.

During each attack a well-behaved client, in a process of its own, writes and reads at a steady pace at the same node.
What must hold, whatever the attackers do:

* none of its requests fails, and it never reads anything old;
* the node lives, raises nothing, and no election comes of it;
* the memory stays under a bound that follows from the settings (`memory_bound`), and files are given back;
* afterwards log and state are what was acknowledged, and nothing else; on three nodes the logs are equal.

Figures of each attack are printed; they are no part of the verdict. Seeds are fixed, and printed when a test fails.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import resource
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from raftnode import cli
from raftnode.config import KIB, MIB, Settings, parse_address
from raftnode.testing import attacks
from raftnode.testing.attacks import ATTACKS, Attack, line
from raftnode.testing.fuzz import say
from raftnode.testing.limited import Usage, Watch, allow_files, cluster_with_limits, memory_bound, usage
from raftnode.testing.processes import ClusterOfProcesses, NodeProcess, wait_until
from raftnode.testing.steady import NAMESPACE, SteadyClients

LIMITS: Final = {
    "frame_bytes": 512 * KIB,
    "connections": 300,
    "in_flight_bytes": 4 * MIB,
    "client_bytes": 16 * MIB,
    "send_buffer_bytes": 64 * KIB,
    "kept_bytes": 2 * MIB,
    "uncommitted_bytes": 4 * MIB,
    "batch_bytes": 256 * KIB,
    "reserve_bytes": 1 * MIB,
    # longer than a busy machine may keep a node from its turn, so that an election is the attack's doing
    "election_low_ms": 3000,
    "election_high_ms": 4000,
}
SETTINGS: Final = Settings(**LIMITS)
SECONDS: Final = 0.7
"""How long each attack goes on."""
PATIENCE: Final = 30.0
SEED: Final = 1

pytestmark = pytest.mark.timeout(180)


class Scene:
    """A cluster, with a well-behaved client at one of its nodes."""

    def __init__(self, cluster: ClusterOfProcesses) -> None:
        self.cluster = cluster
        self.leader = cluster.await_leader()
        self.followers = cluster.others(self.leader)
        self.term = cluster.term()
        self.big = attacks.store_big(self.leader.address, LIMITS["frame_bytes"] - 200)
        cluster.await_caught_up()
        self.steady = SteadyClients((self.followers or [self.leader])[-1].address)
        self.pids = {node: node.pid for node in cluster}
        wait_until(lambda: self.steady.figures().requests, "the well-behaved client is under way", PATIENCE)
        for node in cluster:  # no more files than the command line would let it count on
            resource.prlimit(node.pid, resource.RLIMIT_NOFILE, 2 * (LIMITS["connections"] + cli._OTHER_FILES,))
        self.rest = {node: usage(node.pid) for node in cluster}

    def attack(
        self, node: NodeProcess, attack: Callable[[Attack], str], seconds: float = SECONDS
    ) -> Callable[[], None]:
        """Begin an attack on a node; returns what waits for its end and judges what it did to that node."""
        print(f"seed {SEED}")  # noqa: T201 - shown when the test fails
        done: list[str] = []
        watch = Watch(node.pid)

        def run() -> None:
            with watch, Attack(node.address, SETTINGS, seconds, SEED) as attacking:
                done.append(attack(attacking))

        thread = threading.Thread(target=run)
        thread.start()

        def judge() -> None:
            thread.join()
            assert done, "the attack itself has failed"
            self._await_quiet(node)
            self._report(f"{attack.__name__}: {done[0]}", watch, usage(node.pid))
            held = watch.peak.anonymous - self.rest[node].anonymous
            bound = memory_bound(SETTINGS, len(self.cluster))
            assert held <= bound, (
                f"{held / MIB:.0f} MiB more than at rest; at most {bound / MIB:.0f} follow from the settings"
            )

        return judge

    def _await_quiet(self, node: NodeProcess) -> None:
        """The attackers are gone: their files are given back, and the node answers."""
        most = self.rest[node].files + 2
        wait_until(lambda: usage(node.pid).files <= most, "files are given back", PATIENCE, node.describe)
        node.await_answer(PATIENCE)

    @staticmethod
    def _report(what: str, watch: Watch, after: Usage) -> None:
        sizes = [f"{size / MIB:.0f}" for use in (watch.before, watch.peak, after) for size in (use.anonymous, use.rss)]
        anonymous, rss = "/".join(sizes[::2]), "/".join(sizes[1::2])
        print(f"{what}\n    anonymous {anonymous} MiB, rss {rss} MiB, files up to {watch.peak.files}")  # noqa: T201

    def assert_unharmed(self) -> None:
        """Nobody ended, nobody complained, nobody campaigned; and the well-behaved client was served throughout."""
        figures = self.steady.figures()
        print(f"    the well-behaved client: {figures}")  # noqa: T201
        assert not figures.failures, figures.failures
        for node in self.cluster:
            assert node.is_running, node.describe()
            assert node.pid == self.pids[node]
            assert_no_complaint(node)
        assert self.cluster.term() == self.term, self.cluster.describe()

    def assert_history_is_what_was_acknowledged(self, deletes: str) -> None:
        """Ends the well-behaved client. `deletes`: the one namespace in which attackers deleted what was not there."""
        with self.steady:
            assert not self.steady.figures().failures
        written = {each.commit_id: (NAMESPACE, each.key, each.value) for each in self.steady.written}
        assert len(written) == len(self.steady.written), "two acknowledged puts share a commit_id"
        self.cluster.await_caught_up(max(written))
        for node in self.cluster:
            found = node.inspect("commits", "--values")
            state: dict[tuple[str, str], Any] = {}
            for record in found:
                if record["record"] != "entry" or record["kind"] == "noop":
                    continue
                where = record["namespace"], record["key"]
                if record["kind"] == "delete":
                    assert record["namespace"] == deletes, record
                elif record["commit_id"] == self.big:
                    assert where == ("big", attacks.BIG_KEY)
                    state[where] = record["value"]
                else:
                    assert written.pop(record["commit_id"], None) == (*where, record["value"]), record
                    state[where] = record["value"]
            assert not written, f"acknowledged, but not in the log of {node.name}: {written}"
            written = {each.commit_id: (NAMESPACE, each.key, each.value) for each in self.steady.written}
            self._assert_state(node, state)

    @staticmethod
    def _assert_state(node: NodeProcess, expected: dict[tuple[str, str], Any]) -> None:
        def holds() -> bool:
            found = node.inspect("state")
            values = {(r["namespace"], r["key"]): r["value"] for r in found if r["record"] == "value"}
            return values == expected

        wait_until(holds, f"{node.name} holds what its log says", PATIENCE)


def assert_no_complaint(node: NodeProcess) -> None:
    """Nothing was raised that nobody caught: a traceback is no line of JSON."""
    bare = [line["event"] for line in node.events() if set(line) == {"event"}]
    assert not bare, "\n".join(bare)
    assert not node.events("ended"), node.describe()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A cluster of one."""
    yield from scene_of(1, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A cluster of three; the well-behaved client is at a follower that is not attacked itself."""
    yield from scene_of(3, tmp_path_factory.mktemp("three"))


def scene_of(size: int, directory: Path) -> Iterator[Scene]:
    allow_files()
    with cluster_with_limits(size, LIMITS, directory) as cluster:
        scene = Scene(cluster)
        try:
            yield scene
        finally:
            scene.steady.end()


# --- one node -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_one_node_under_attack(alone: Scene, attack: Callable[[Attack], str]) -> None:
    """Each attack by itself, on a node that is its own majority: what goes wrong is this attack's doing."""
    judge = alone.attack(alone.leader, attack)
    judge()
    alone.assert_unharmed()


def test_one_node_holds_what_was_acknowledged(alone: Scene) -> None:
    """After all of these, log and state are what the well-behaved client was told, and nothing of the attackers': what
    they began and never ended, or sent too large, left no trace."""
    alone.assert_history_is_what_was_acknowledged(deletes="none")


# --- three nodes ----------------------------------------------------------------------------------------------

PAIRS: Final = (
    (attacks.never_reads, attacks.begun),
    (attacks.garbage_unread, attacks.endless_pipeline),
    (attacks.costly, attacks.storm),
    (attacks.begun, attacks.never_reads),
)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(attack.__name__ for attack in pair))
def test_leader_and_follower_under_attack(three: Scene, pair: tuple[Callable[[Attack], str], ...]) -> None:
    """One attack on the leader and one on a follower at once; the well-behaved client is at the other follower, which
    passes its requests on to the leader. The leader stays the leader: its heartbeats go out between the attackers'
    messages, and a follower's answers too."""
    judges = [three.attack(node, attack) for node, attack in zip((three.leader, three.followers[0]), pair, strict=True)]
    for judge in judges:
        judge()
    three.assert_unharmed()


def test_members_get_in_when_clients_fill_every_place(three: Scene) -> None:
    """Idle connections take every place of the leader, and as many again want one. A follower that is killed and
    started again meanwhile is let in and catches up: members are not counted with the clients."""
    node = three.followers[0]
    node.kill()
    before = three.leader.await_answer()["commit_id"]
    judge = three.attack(three.leader, attacks.idle_connections, seconds=4.0)
    wait_until(lambda: usage(three.leader.pid).files > LIMITS["connections"], "every place is taken", PATIENCE)
    node.start().await_answer()
    three.pids[node] = node.pid
    three.cluster.await_caught_up(before + 1, [node])
    assert usage(three.leader.pid).files > LIMITS["connections"], "every place is still taken"
    judge()
    three.cluster.await_caught_up()
    three.assert_unharmed()


def test_three_nodes_hold_what_was_acknowledged(three: Scene) -> None:
    """After all of these the three logs are the same, and are what the well-behaved client was told."""
    three.assert_history_is_what_was_acknowledged(deletes="none")
    last = {node.await_answer()["last"]["checksum"] for node in three.cluster}
    assert len(last) == 1, "equal checksums at one commit_id mean equal histories"


# --- without a majority ---------------------------------------------------------------------------------------


def test_large_puts_while_no_majority_is_there(tmp_path: Path) -> None:
    """Two of three nodes are down, and many clients each send a large put to the third: more in all than may be under
    way. Those that are taken wait, the rest is told `overloaded` at once; small reads of others are served meanwhile,
    and memory stays bounded. Each put is answered when its time is up, and none of those answers says that it was done.
    When the others are back, the logs become equal, and a put that was refused is in none of them."""
    size, count = 200 * KIB, 60
    with cluster_with_limits(3, LIMITS | {"request_timeout_ms": 2000}, tmp_path) as cluster:
        node = cluster.await_leader()
        cluster.await_caught_up()
        rest = usage(node.pid)
        cluster.kill(cluster.others(node))
        put = {"type": "put", "namespace": "large", "value": "x" * size}
        answers: list[dict[str, Any]] = []
        with Watch(node.pid) as watch:
            asking = [
                threading.Thread(target=lambda n=n: answers.extend(say(node.address, line({**put, "key": f"k{n}"}))))
                for n in range(count)
            ]
            for thread in asking:
                thread.start()
            local = line({"type": "get", "key": "none", "consistency": "local"})
            while any(thread.is_alive() for thread in asking):
                assert say(node.address, local)[0]["data"]["version"] == 0
        assert len(answers) == count
        codes = [answer["error"]["code"] for answer in answers]
        assert codes.count("overloaded") >= count - LIMITS["in_flight_bytes"] // size
        assert set(codes) <= {"overloaded", "not_committed", "no_leader"}
        assert watch.peak.anonymous - rest.anonymous <= memory_bound(SETTINGS, 3)
        cluster.heal()
        logs = [node.inspect("commits") for node in cluster]
        assert len({node.await_answer()["last"]["checksum"] for node in cluster}) == 1
        assert sum(record.get("kind") == "put" for record in logs[0]) <= codes.count("not_committed")


# --- load -----------------------------------------------------------------------------------------------------


class Crowd:
    """Many well-behaved connections: one request at a time on each, as fast as it is answered."""

    def __init__(self, address: str, count: int) -> None:
        self.times: list[float] = []
        self.codes: list[str] = []
        self._sockets = [socket.create_connection(parse_address(address), PATIENCE) for _ in range(count)]
        self._sent: dict[socket.socket, float] = {}

    def close(self) -> None:
        for each in self._sockets:
            each.close()

    def ask(self, until: Callable[[], bool]) -> None:
        """Ask until `until` says that it is enough, and all answers are there."""
        with selectors.DefaultSelector() as selector:
            for number, each in enumerate(self._sockets):
                selector.register(each, selectors.EVENT_READ, number)
                self._next(each, number)
            while self._sent:
                enough = until()
                for key, _ in selector.select(0.1):
                    each = self._sockets[key.data]
                    answer = json.loads(each.recv(1 << 16))  # one request, one answer: a line in one piece
                    self.times.append(time.monotonic() - self._sent.pop(each))
                    self.codes.append(answer["error"]["code"] if "error" in answer else "")
                    if not enough:
                        self._next(each, key.data)

    def _next(self, each: socket.socket, number: int) -> None:
        kind = {"type": "put", "value": number} if len(self.times) % 2 else {"type": "get"}
        self._sent[each] = time.monotonic()
        each.sendall(line({**kind, "namespace": "crowd", "key": f"k{number}"}))

    def __str__(self) -> str:
        ranked = sorted(self.times)
        p50, p99 = (1000 * ranked[len(ranked) * part // 100] for part in (50, 99))
        return f"{len(ranked)} requests, p50 {p50:.0f} p99 {p99:.0f} max {1000 * ranked[-1]:.0f} ms"


ROOMY: Final = LIMITS | {"connections": 2000}


@pytest.mark.long
def test_a_thousand_clients_and_the_attacks(tmp_path: Path) -> None:
    """A thousand well-behaved connections and every attack, one after the other, for twenty seconds: none of the
    clients' requests fails."""
    allow_files()
    with cluster_with_limits(3, ROOMY, tmp_path) as cluster:
        leader, term = cluster.await_leader(), cluster.term()
        attacks.store_big(leader.address, ROOMY["frame_bytes"] - 200)
        crowd = Crowd(leader.address, 1000)
        end = time.monotonic() + 20

        def attack() -> None:
            for number in itertools.count():
                if time.monotonic() > end:
                    return
                with Attack(leader.address, Settings(**ROOMY), 1.0, number) as attacking:
                    ATTACKS[number % len(ATTACKS)](attacking)

        attacker = threading.Thread(target=attack)
        with Watch(leader.pid) as watch, contextlib.closing(crowd):
            attacker.start()
            crowd.ask(lambda: time.monotonic() > end)
            attacker.join()
        print(crowd, f"\nrss up to {watch.peak.rss / MIB:.0f} MiB, files up to {watch.peak.files}")  # noqa: T201
        assert set(crowd.codes) == {""}
        assert cluster.term() == term
        for node in cluster:
            assert_no_complaint(node)


@pytest.mark.long
def test_a_leader_change_under_five_hundred_connections(tmp_path: Path) -> None:
    """Five hundred clients at a follower, and the leader is killed. Every request is answered; those that were under
    way may be open or refused, and later ones succeed."""
    settings = ROOMY | {"election_low_ms": 800, "election_high_ms": 1600}
    with cluster_with_limits(3, settings, tmp_path) as cluster:
        leader = cluster.await_leader()
        crowd = Crowd(cluster.others(leader)[0].address, 500)
        killed: list[int] = []

        def until() -> bool:
            if not killed and len(crowd.times) > 5000:
                leader.kill()
                killed.append(len(crowd.times))
            return bool(killed) and len(crowd.times) > killed[0] + 5000

        with contextlib.closing(crowd):
            crowd.ask(until)
        found = {code: crowd.codes.count(code) for code in set(crowd.codes)}
        print(crowd, found)  # noqa: T201
        assert set(found) <= {"", "not_committed", "no_leader"}
        assert set(crowd.codes[-500:]) == {""}, "after the change all is well"


@pytest.mark.long
@pytest.mark.timeout(600)
def test_three_hundred_thousand_requests_leave_nothing_behind(tmp_path: Path) -> None:
    """The same connections ask 300,000 times. After a warm-up of 50,000, in which caches fill to their limits, the
    memory of the program itself does not grow any more: by 4 MiB at most, which is 17 bytes a request."""
    with cluster_with_limits(1, ROOMY, tmp_path) as cluster:
        node = cluster.await_leader()
        crowd = Crowd(node.address, 100)
        with contextlib.closing(crowd):
            sizes = []
            for goal in (50_000, 175_000, 300_000):
                crowd.ask(lambda goal=goal: len(crowd.times) >= goal)
                sizes.append(usage(node.pid).anonymous)
        print(crowd, [f"{size / MIB:.1f} MiB" for size in sizes])  # noqa: T201
        assert set(crowd.codes) == {""}
        assert sizes[2] - sizes[0] <= 4 * MIB
