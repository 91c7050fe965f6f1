"""Real nodes under kill -9, SIGSTOP and SIGTERM: three processes, real sockets, a real disk.

Most tests share one cluster, which is whole again when the next one begins; what has been acknowledged to any of them
is in one book, and the last test looks at all of it. A record's value holds its key, so that a mix-up would show.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import pytest

from raftnode import records
from raftnode.config import parse_address
from raftnode.messages import decode_object, encode_object
from raftnode.testing.processes import (
    FAST,
    PATIENCE_S,
    ClusterOfProcesses,
    InspectionFailed,
    NodeProcess,
    WriteRecord,
    Writers,
    command_environment,
    free_addresses,
    wait_until,
)

REQUEST_TIMEOUT_S = 1
"""How long a node of the shared cluster lets a request wait."""


# --- what is written, and what must be there afterwards -------------------------------------------------------


def seeded(seed: int) -> random.Random:
    """Chance that can be had again: the seed is printed."""
    sys.stdout.write(f"seed {seed}\n")
    return random.Random(seed)


def numbered(prefix: str, chance: random.Random, largest: int = 2000) -> Iterator[WriteRecord]:
    """Records without end, each with a key of its own."""
    n = 0
    while True:
        key = f"{prefix}-{n}"
        yield WriteRecord(key, {"key": key, "text": "x" * chance.randrange(largest)})
        n += 1


class Book:
    """What became of every write of some writers: the three outcomes that a write may have."""

    def __init__(self) -> None:
        self.acknowledged: dict[str, tuple[Any, int]] = {}
        self.open: dict[str, Any] = {}
        self.refused: set[str] = set()
        self.put_once: set[str] = set()

    def add(self, writers: Writers) -> None:
        """Take over what became of the records of writers that repeat nothing of which the outcome is open."""
        self.acknowledged |= {done.record.key: (done.record.value, done.commit_id) for done in writers.acknowledged}
        self.open |= {record.key: record.value for record in writers.open}
        self.refused |= {record.key for record in writers.refused}
        self.put_once |= {done.record.key for done in writers.acknowledged} | {record.key for record in writers.open}

    def note(self, key: str, value: Any, commit_id: int) -> None:
        self.acknowledged[key] = (value, commit_id)

    def check(self, *nodes: NodeProcess, consistency: str = "linearizable") -> None:
        """Through each node: every acknowledged write is there; an open one is whole or not there, for all nodes
        alike; what was surely not executed is not there."""
        keys = [*self.acknowledged, *self.open, *self.refused]
        views = [node.read(keys, consistency=consistency) for node in nodes]
        for node, found in zip(nodes, views, strict=True):
            lost = [key for key, (value, _) in self.acknowledged.items() if found.get(key) != value]
            assert not lost, f"{len(lost)} of {len(self.acknowledged)} acknowledged are lost, by {node}: {lost[:5]}"
            wrong = [key for key, value in self.open.items() if found.get(key, value) != value]
            assert not wrong, f"open writes that hold what nobody wrote, by {node}: {wrong[:5]}"
            raised = [key for key in self.refused if key in found]
            assert not raised, f"refused as not executed, but there, by {node}: {raised[:5]}"
            assert found == views[0], f"{node} and {nodes[0]} differ"

    def check_log(self, log: list[dict[str, Any]]) -> None:
        """Each acknowledged write is in the log where its answer said; none was done twice, and no refused one."""
        by_id = {line["commit_id"]: line for line in log}
        for key, (_, commit_id) in self.acknowledged.items():
            assert by_id[commit_id]["key"] == key, f"{key} was acknowledged as {commit_id}: {by_id[commit_id]}"
        puts = collections.Counter(line["key"] for line in log if line["kind"] == "put")
        twice = [key for key in self.put_once if puts[key] > 1]
        assert not twice, f"put once, but more often in the log: {twice[:5]}"
        assert not [key for key in self.refused if puts[key]]


def positions(log: list[dict[str, Any]]) -> list[tuple[int, int, str]]:
    """A log as commit_id, term and rolling checksum: equal lists are equal histories."""
    return [(line["commit_id"], line["term"], line["checksum"]) for line in log]


def one_log(cluster: ClusterOfProcesses) -> list[dict[str, Any]]:
    """The log that all directories hold."""
    first, *others = [node.inspect("log") for node in cluster]
    assert [line["commit_id"] for line in first] == list(range(1, len(first) + 1))
    for other in others:
        assert positions(other) == positions(first)
    return first


class Line:
    """A connection that may send without waiting for the answer."""

    def __init__(self, node: NodeProcess) -> None:
        self._socket = socket.create_connection(parse_address(node.address), PATIENCE_S)
        self._stream = self._socket.makefile("rwb")

    def send(self, message: dict[str, Any]) -> None:
        self._stream.write(encode_object(message))
        self._stream.flush()

    def answer(self) -> dict[str, Any]:
        return decode_object(self._stream.readline())

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        self.send(message)
        return self.answer()

    def close(self) -> None:
        self._stream.close()
        self._socket.close()


@contextlib.contextmanager
def lines_to(node: NodeProcess, count: int) -> Iterator[list[Line]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(contextlib.closing(Line(node))) for _ in range(count)]


# --- the shared cluster ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterOfProcesses]:
    options = ["--timeout", str(REQUEST_TIMEOUT_S)]
    with ClusterOfProcesses(3, tmp_path_factory.mktemp("cluster"), FAST, options) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared: ClusterOfProcesses) -> ClusterOfProcesses:
    """Three nodes, all of them up, with a leader, and caught up."""
    return shared.heal()


@pytest.fixture(scope="module")
def book() -> Book:
    """What was acknowledged by the shared cluster, in all tests."""
    return Book()


def spawn_and_end(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`raftnode serve` with these arguments, of which it is expected that it ends by itself."""
    return subprocess.run(
        [sys.executable, "-m", "raftnode", "serve", *arguments],
        env=command_environment(FAST),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


# --- (a) all is well ------------------------------------------------------------------------------------------


def test_every_node_takes_every_request(cluster: ClusterOfProcesses, book: Book) -> None:
    """Any node takes any request, and a read through any node sees what was acknowledged before it began. Three nodes
    elect a leader that all of them know; then each record is put through one node, read at once through the two others
    and itself, overwritten through the next, and deleted through the third. Versions and commit_ids fit together
    throughout, whoever answers."""
    leader = cluster.await_leader()
    statuses = wait_until(
        lambda: [s for node in cluster if (s := node.status()) and s["leader"] == leader.address],
        "all know the leader",
        explain=cluster.describe,
    )
    assert {status["cluster"] for status in statuses} == {statuses[0]["cluster"]}
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(node.client()) for node in cluster]
        for n in range(15):
            putter, overwriter, deleter = clients[n % 3], clients[(n + 1) % 3], clients[(n + 2) % 3]
            key = f"every-{n}"
            first = putter.put(key, {"key": key, "n": n})
            for client in clients:
                assert client.get(key) == {"key": key, "n": n}
            second = overwriter.put(key, [key])
            assert (first["version"], second["version"], second["replaced"]) == (1, 2, first["commit_id"])
            for client in clients:
                record = client.get_record(key)
                assert (record["value"], record["created"], record["modified"], record["version"]) == (
                    [key], first["commit_id"], second["commit_id"], 2,
                )  # fmt: skip
            if n % 3 == 0:
                book.note(key, [key], second["commit_id"])
                continue
            deleted = deleter.delete(key)
            assert deleted["replaced"] == second["commit_id"]
            assert deleted["commit_id"] > second["commit_id"]
            assert [client.get_record(key)["version"] for client in clients] == [0, 0, 0]
        for client in clients:
            peers = client.peers()
            assert peers["peers"] == cluster.addresses
            assert peers["live"] == cluster.addresses


# --- (b) the leader dies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_kill_9_of_the_leader_under_load(cluster: ClusterOfProcesses, book: Book, seed: int) -> None:
    """A leader that is killed with -9 while clients write costs no acknowledged write, and comes back by itself. Four
    clients write through all nodes without a pause; at a moment drawn by the seed the leader is killed. Writes go on;
    the killed node, started again in the midst of them, begins with exactly what its disk held, catches up with the
    others, and reads the newest write by itself. Every acknowledged write is there through each node, what was refused
    is not, and open ones are the same for all."""
    chance = seeded(seed)
    with Writers(cluster.addresses, numbered(f"failover-{seed}", chance), timeout=5, resolve=False) as writers:
        writers.await_more(chance.randrange(20, 150), explain=cluster.describe)
        leader = cluster.await_leader()
        term = cluster.term()
        time.sleep(chance.uniform(0, 0.01))  # the moment within a turn
        leader.kill()
        writers.await_more(30, explain=cluster.describe)
        on_disk = leader.inspect("info")[0]
        mark = leader.mark()
        leader.start().await_answer()
        cluster.await_caught_up(nodes=[leader])
        writers.await_more(30, explain=cluster.describe)
        writers.stop()
    book.add(writers)
    [begin] = leader.events("starting", since=mark)
    assert (begin["commit_id"], begin["staged"], begin["term"]) == (
        on_disk["commit_id"], on_disk["staged"], on_disk["term"],
    )  # fmt: skip
    assert cluster.term() > term
    upto = cluster.await_caught_up()
    status = leader.await_answer()
    assert status["commit_id"] >= upto >= writers.acknowledged[-1].commit_id
    wait_until(lambda: leader.await_answer()["staged"] == 0, "nothing is staged any more", explain=cluster.describe)
    done = Book()
    done.add(writers)
    done.check(leader, consistency="local")
    done.check(*cluster)


# --- (c) all die at once --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [11, 12])
def test_kill_9_of_all_at_once_under_load(cluster: ClusterOfProcesses, book: Book, seed: int) -> None:
    """What was acknowledged is on the disks of a majority, so that nothing but the disks is needed. While four clients
    write, all three nodes are killed with -9 at one moment drawn by the seed, and started again. Nothing acknowledged
    is lost, through any node; the logs of the three directories are one, and hold each write where its answer said."""
    chance = seeded(seed)
    with Writers(cluster.addresses, numbered(f"blackout-{seed}", chance), timeout=1.5, resolve=False) as writers:
        writers.await_more(chance.randrange(50, 250), explain=cluster.describe)
        time.sleep(chance.uniform(0, 0.01))
        cluster.kill()
        before = len(writers.acknowledged)
        cluster.start()
        writers.await_more(20, explain=cluster.describe)
    assert before < len(writers.acknowledged)
    book.add(writers)
    cluster.await_caught_up()
    done = Book()
    done.add(writers)
    done.check(*cluster)
    done.check_log(one_log(cluster))


def test_kill_9_of_a_single_node_again_and_again(tmp_path: Path) -> None:
    """A cluster of one keeps the promise too: with a single disk, the sync before the answer is all there is. Six times
    the one node is killed with -9 under the load of three clients, each time at another moment by the seed, and started
    on the same directory. It begins with what its disk held and serves at once; after each start everything that was
    ever acknowledged is there, and in the end the log holds each write where its answer said: no commit_id was given
    twice."""
    chance = seeded(21)
    everything = Book()
    with ClusterOfProcesses(1, tmp_path, FAST) as cluster:
        [node] = cluster
        for turn in range(6):
            cluster.await_leader()
            everything.check(node)
            with Writers(
                cluster.addresses, numbered(f"alone-{turn}", chance), 3, timeout=0.3, resolve=False
            ) as writers:
                writers.await_acknowledged(chance.randrange(1, 150), explain=cluster.describe)
                time.sleep(chance.uniform(0, 0.01))
                node.kill()
            everything.add(writers)
            on_disk = node.inspect("info")[0]
            mark = node.mark()
            cluster.start()
            [begin] = node.events("starting", since=mark)
            assert (begin["commit_id"], begin["staged"]) == (on_disk["commit_id"], on_disk["staged"])
        cluster.await_leader()
        everything.check(node)
        everything.check_log(one_log(cluster))
        assert cluster.terminate() == [0]


# --- (d) the leader stands still ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [31, 32])
def test_a_leader_that_was_stopped_gives_no_old_answer(cluster: ClusterOfProcesses, book: Book, seed: int) -> None:
    """A leader that did not run while another was elected must not answer from what it knew (TRAPS 20, 21). SIGSTOP
    holds the leader; a new one is elected and a write through another node is acknowledged. Then, while the old one
    still stands, linearizable reads and a write are put into its sockets, so that they are the first thing it finds
    when SIGCONT lets it go on. Each read gives the new value, or says that there is no leader; the write is either
    acknowledged and there, or not acknowledged; the old leader becomes a follower, and catches up."""
    chance = seeded(seed)
    key, late = f"stopped-{seed}", f"stopped-{seed}-late"
    leader = cluster.await_leader()
    with leader.client() as client:
        client.put(key, {"key": key, "age": "old"})
    with lines_to(leader, 8) as readers, lines_to(leader, 1) as [writer]:
        assert [line.ask({"type": "ping"})["data"] for line in [*readers, writer]] == [True] * 9
        time.sleep(chance.uniform(0, 0.05))
        mark, term = leader.mark(), cluster.term()
        leader.pause()
        other = cluster.await_leader()
        assert other is not leader
        with chance.choice(cluster.others(leader)).client() as client:
            done = client.put(key, {"key": key, "age": "new"})
            for line in readers:
                line.send({"type": "get", "key": key})
            writer.send({"type": "put", "key": late, "value": {"key": late}})
            leader.resume()
            answers = [line.answer() for line in readers]
            written = writer.answer()
            assert client.get(key) == {"key": key, "age": "new"}
    for answer in answers:
        if answer["data"] is None:
            assert answer["error"]["code"] == "no_leader"
        else:
            assert answer["data"]["value"] == {"key": key, "age": "new"}, answer
    leader.await_event("role", since=mark, role="follower")
    cluster.await_caught_up()
    assert leader.await_answer()["term"] > term
    book.note(key, {"key": key, "age": "new"}, done["commit_id"])
    if written["data"]:
        book.note(late, {"key": late}, written["commit_id"])
    else:
        assert written["error"]["code"] in ("no_leader", "not_committed")
    book.check(leader)


# --- (e) a minority alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("survivor", ["leader", "follower"])
def test_without_a_majority_nothing_is_acknowledged(cluster: ClusterOfProcesses, book: Book, survivor: str) -> None:
    """A node alone acknowledges nothing, says so in time, and still serves local reads as what they are. Two of three
    nodes are killed; eight clients at once put through the one that is left, the leader or a follower, and then another
    eight. Each is answered by the node within its request timeout: open (`not_committed`) where the leader had appended
    it, else `no_leader`. A linearizable read gives `no_leader`, even at once after the kill, when the leader does not
    know yet; a local one gives the value, marked as local. When the others are back, what was told not to be executed
    is not there, and writes go on."""
    leader = cluster.await_leader()
    left = leader if survivor == "leader" else cluster.others(leader)[0]
    known = f"known-{survivor}"
    with left.client() as client:
        book.note(known, [known], client.put(known, [known])["commit_id"])
        assert client.get(known) == [known]
    cluster.await_caught_up()

    def put(key: str) -> tuple[str, dict[str, Any] | None]:
        return key, left.ask({"type": "put", "key": key, "value": [key]}, timeout=PATIENCE_S)

    outcomes = Book()
    with ThreadPoolExecutor(8) as pool, lines_to(left, 1) as [reader]:
        cluster.kill(cluster.others(left))
        reader.send({"type": "get", "key": known})
        for turn in range(2):
            began = time.monotonic()
            answers = list(pool.map(put, [f"minority-{survivor}-{turn}-{n}" for n in range(8)]))
            assert time.monotonic() - began < 4 * REQUEST_TIMEOUT_S
            for key, answer in answers:
                assert answer is not None, f"{left.name} did not answer"
                assert answer["data"] is False, f"acknowledged without a majority: {answer}"
                code = answer["error"]["code"]
                assert code in ("no_leader", "not_committed")
                if code == "not_committed":
                    outcomes.open[key] = [key]
                else:
                    outcomes.refused.add(key)
        early = reader.answer()
        assert (early["data"], early["error"]["code"]) == (None, "no_leader")
    if survivor == "follower":
        assert not outcomes.open, "a follower without a leader has appended nothing"
    assert len(outcomes.refused) >= 8
    with lines_to(left, 1) as [line]:
        strict = line.ask({"type": "get", "key": known})
        assert (strict["data"], strict["error"]["code"]) == (None, "no_leader")
        local = line.ask({"type": "get", "key": known, "consistency": "local"})
        assert (local["data"]["value"], local["consistency"]) == ([known], "local")
        assert line.ask({"type": "peers"})["leader"] is None
    assert left.await_answer()["role"] != "leader"

    cluster.heal()
    with left.client() as client:
        again = client.put(f"again-{survivor}", ["back"])
    outcomes.note(f"again-{survivor}", ["back"], again["commit_id"])
    outcomes.note(known, *book.acknowledged[known])
    outcomes.check(*cluster)


# --- (f) a clean end ------------------------------------------------------------------------------------------


def test_sigterm_under_load(cluster: ClusterOfProcesses, book: Book) -> None:
    """SIGTERM ends a node with status 0 and loses nothing, at rest and under load. While four clients write, the leader
    gets SIGTERM; writes go on through the others, and it is started again; then all three get it at once. All end with
    0 and say that they stopped; everything acknowledged is there afterwards."""
    chance = seeded(41)
    with Writers(cluster.addresses, numbered("sigterm", chance), timeout=1.5, resolve=False) as writers:
        writers.await_more(chance.randrange(20, 100), explain=cluster.describe)
        leader = cluster.await_leader()
        mark = leader.mark()
        assert leader.terminate() == 0
        assert leader.events("stopped", since=mark)
        writers.await_more(30, explain=cluster.describe)
        leader.start().await_answer()
        writers.await_more(chance.randrange(20, 100), explain=cluster.describe)
        assert cluster.terminate() == [0, 0, 0]
    book.add(writers)
    cluster.heal()
    done = Book()
    done.add(writers)
    done.check(*cluster)


def test_a_second_node_is_kept_out(cluster: ClusterOfProcesses, tmp_path: Path) -> None:
    """A directory has one node, and an address has one: the second says which it is and what to do, and the first does
    not notice. Brought about with a second node on the directory of a live one (status 3: a directory that can't be
    used) and one at its address with a directory of its own (status 2: wrong usage)."""
    [node, other, _] = cluster
    with node.client() as client:
        [free] = free_addresses(1)
        same_directory = spawn_and_end("--ip", free, "--volume", str(node.volume))
        assert same_directory.returncode == 3
        assert f"{node.volume} is in use by another node" in same_directory.stderr
        same_port = spawn_and_end("--ip", node.address, "--volume", str(tmp_path / "new"))
        assert same_port.returncode == 2
        assert f"can't listen on {node.address}" in same_port.stderr
        for run in (same_directory, same_port):
            assert "Traceback" not in run.stdout + run.stderr
        assert client.put("second", 1)["commit_id"]
    with other.client() as client:
        assert client.get("second") == 1


# --- (g, h, i) nodes that are not who they should be ----------------------------------------------------------


def test_a_node_of_another_cluster_is_refused(cluster: ClusterOfProcesses, book: Book, tmp_path: Path) -> None:
    """Nodes that were started with different sets of addresses do not work together, and say why. A fourth node is
    started with the three as its peers, who know nothing of it. Both sides log the refusal with both cluster ids and
    what to do; the stranger never gets a leader or a term, a put through it is not executed; the three go on."""
    stranger = NodeProcess(free_addresses(1)[0], cluster.addresses, tmp_path, FAST, ["--timeout", "1"])
    marks = {node: node.mark() for node in cluster}
    own = cluster[0].await_answer()["cluster"]
    try:
        theirs = stranger.start().await_answer()["cluster"]
        assert theirs != own
        with Writers(cluster.addresses, numbered("stranger", seeded(51)), timeout=5, resolve=False) as writers:
            for node in cluster:
                for said in (
                    node.await_event("stranger_refused", since=marks[node], peer=stranger.address),
                    stranger.await_event("peer_refused", peer=node.address),
                ):
                    assert said["code"] == "wrong_cluster"
                    assert own in said["why"]
                    assert theirs in said["why"]
                    assert "same set of addresses" in said["why"]
            refused = stranger.ask({"type": "put", "key": "strange", "value": 1}, timeout=PATIENCE_S)
            assert refused is not None
            assert (refused["data"], refused["error"]["code"]) == (False, "no_leader")
            writers.await_more(20, explain=cluster.describe)
            status = stranger.await_answer()
            assert (status["term"], status["commit_id"], status["leader"]) == (0, 0, None)
    finally:
        stranger.kill()
    book.add(writers)
    assert cluster[0].read(["strange"]) == {}
    with cluster.client() as client:
        assert stranger.address not in client.peers()["peers"]


@contextlib.contextmanager
def directories(*moves: tuple[NodeProcess, Path]) -> Iterator[None]:
    """Each node's directory moved to that path; back again in the end, whatever was made in its place meanwhile."""
    for node, path in moves:
        node.volume.rename(path)
    try:
        yield
    finally:
        for node, path in moves:
            node.kill()
            if node.volume.exists():
                node.volume.rename(path.with_name(f"{path.name}-replaced"))
            path.rename(node.volume)


def test_a_wiped_node_is_another_one(cluster: ClusterOfProcesses, book: Book, tmp_path: Path) -> None:
    """A node that lost its disk has forgotten its votes and what it acknowledged: under its old address it is a
    stranger (TRAPS 34). A follower is killed, its directory removed, and it is started again. It is refused as
    `wrong_node`, with both node ids; the writes of the others go on. Once the old node is silent for long enough the
    leader takes the new one as a learner, and it has a vote when it has caught up. With its own directory back it is a
    stranger by the same rule, and comes back in the same way."""
    leader = cluster.await_leader()
    node = cluster.others(leader)[0]
    old = node.await_answer()["node"]
    node.kill()
    marks = {other: other.mark() for other in cluster.others(node)}
    with directories((node, tmp_path / "own")):
        new = node.start().await_answer()["node"]
        assert new != old

        def refusals(other: NodeProcess, since: int) -> list[dict[str, Any]]:
            return [event for event in other.events("peer_refused", since) if event["peer"] == node.address]

        with Writers(
            [other.address for other in marks], numbered("wiped", seeded(61)), timeout=5, resolve=False
        ) as writers:
            said = wait_until(
                lambda: next((event for other, mark in marks.items() for event in refusals(other, mark)), None),
                "one of the others refuses it: the leader, or who hears of it before it has its new place",
                explain=cluster.describe,
            )
            assert said["code"] == "wrong_node"
            assert old in said["why"]
            assert new in said["why"]
            writers.await_more(30, explain=cluster.describe)
            await_vote(cluster, node, new)
    book.add(writers)
    cluster.heal()
    await_vote(cluster, node, old)
    cluster.await_caught_up()
    book.check(node, consistency="local")


def await_vote(cluster: ClusterOfProcesses, node: NodeProcess, node_id: str) -> None:
    """Wait until the leader counts the votes of the node with this id, at this address."""

    def has_vote() -> bool:
        member = cluster.await_leader().await_answer()["members"][node.address]
        return (member["node"], member["voter"]) == (node_id, True)

    wait_until(has_vote, f"{node.name} has a vote as node {node_id}", explain=cluster.describe)


def test_swapped_directories_are_refused(cluster: ClusterOfProcesses, book: Book, tmp_path: Path) -> None:
    """A node that finds the directory of another does not go on as that one. Two nodes are killed, their directories
    swapped, and both started: each ends with status 3 and names the directory and whose it is. With the directories
    swapped back, all is as before."""
    one, two = cluster[0], cluster[2]
    cluster.kill([one, two])
    with directories((one, tmp_path / "one"), (two, tmp_path / "two")):
        (tmp_path / "one").rename(two.volume)
        (tmp_path / "two").rename(one.volume)
        try:
            marks = {node: node.mark() for node in (one, two)}
            for node in marks:
                node.start()
            for node, owner in ((one, two), (two, one)):
                assert node.await_exit() == 3
                words = node.log_text(since=marks[node])
                assert f"{node.volume} belongs to the node at {owner.address}, not to {node.address}" in words
        finally:
            cluster.kill([one, two])
            two.volume.rename(tmp_path / "one")
            one.volume.rename(tmp_path / "two")
    cluster.heal()
    book.check(one, two)


# --- (j) damage -----------------------------------------------------------------------------------------------


def flip_newest_entry(volume: Path, chance: random.Random) -> int:
    """Flip one bit of the newest log entry in the data file, in each of its copies; done twice with the same chance, it
    is whole again. Returns its commit_id."""
    file = volume / records.DATA_FILE
    with lmdb.open(str(file), subdir=False, readonly=True, map_size=1 << 36, max_dbs=16, lock=False) as env:
        log = env.open_db(records.LOG, create=False)
        with env.begin() as txn, txn.cursor(log) as cursor:
            assert cursor.last()
            commit_id, entry = records.position_of(bytes(cursor.key())), bytes(cursor.value())
    damaged = bytearray(entry)
    damaged[chance.randrange(1, len(entry))] ^= 1 << chance.randrange(8)
    whole = file.read_bytes()
    assert entry in whole
    file.write_bytes(whole.replace(entry, damaged))
    return commit_id


@pytest.mark.parametrize("seed", [71, 72])
def test_a_damaged_log_entry_stops_the_node(cluster: ClusterOfProcesses, book: Book, seed: int) -> None:
    """A node with a damaged entry must not vote or acknowledge as if its log were shorter (TRAPS 37). A follower is
    killed and one bit of the newest entry in its data file is flipped, by the seed. It does not start: status 3, and
    words that name the entry and the directory; the inspector finds the same entry. The two others go on. With a good
    copy of the file, as advised, it starts and catches up."""
    chance = seeded(seed)
    with cluster.client() as client:
        client.put(f"damaged-{seed}", {"key": "the newest", "text": "y" * 100})
    cluster.await_caught_up()
    node = cluster.others(cluster.await_leader())[0]
    node.kill()
    good = (node.volume / records.DATA_FILE).read_bytes()
    commit_id = flip_newest_entry(node.volume, chance)
    try:
        mark = node.mark()
        assert node.start().await_exit() == 3
        assert f"log entry {commit_id} in {node.volume} is damaged" in node.log_text(since=mark)
        assert "Traceback" not in node.log_text(since=mark)
        with pytest.raises(InspectionFailed, match=f"{node.volume}") as failed:
            node.inspect("log")
        assert failed.value.status == 4
        with cluster.others(node)[0].client() as client:
            done = client.put(f"meanwhile-{seed}", [seed])
            book.note(f"meanwhile-{seed}", [seed], done["commit_id"])
    finally:
        (node.volume / records.DATA_FILE).write_bytes(good)
    cluster.heal()
    assert node.read([f"meanwhile-{seed}"], consistency="local") == {f"meanwhile-{seed}": [seed]}


# --- (k) looking inside a live node ---------------------------------------------------------------------------


def listed_at_once(node: NodeProcess) -> list[dict[str, Any]] | None:
    """The state of a node; None when it took so long that the listing is of more than one snapshot."""
    found = node.inspect("state")
    return None if any(line["record"] == "renewed" for line in found) else found


def test_the_inspector_on_live_nodes_under_writes(cluster: ClusterOfProcesses, book: Book) -> None:
    """`raftnode-inspect` shows a whole state of a node that is being written to: a listing is one snapshot, or says
    where it goes on with a newer one, as it does on a machine that is busy; then it is asked again. While three clients
    write, the logs of all nodes, one's commits and its state are printed. Each log is without a hole, its terms never
    fall, its committed part comes before the staged one; of two logs, of one node or of two, one begins with the other;
    the state is what the committed log says, value for value."""
    with Writers(cluster.addresses, numbered("looked-at", seeded(81)), 3, timeout=5, resolve=False) as writers:
        writers.await_more(50, explain=cluster.describe)
        logs = [node.inspect("log") for node in cluster]
        *commits, end = cluster[0].inspect("commits", "--values")
        state = wait_until(partial(listed_at_once, cluster[0]), "the state is one snapshot", explain=cluster.describe)
        logs.append(cluster[0].inspect("log", "--values"))
        writers.await_more(1, explain=cluster.describe)
    book.add(writers)
    for log in logs:
        assert [line["commit_id"] for line in log] == list(range(1, len(log) + 1))
        terms = [line["term"] for line in log]
        assert terms == sorted(terms)
        states = [line["state"] for line in log]
        assert states == sorted(states), "committed ones come first"
    assert len(logs[-1]) > len(logs[0]), "the clients wrote all the while"
    listings = sorted((positions(log) for log in [*logs, commits]), key=len)
    for shorter, longer in itertools.pairwise(listings):
        assert longer[: len(shorter)] == shorter
    assert commits[-1]["commit_id"] == end["commit_id"]
    assert end["record"] == "committed"
    assert replay(logs[-1], max(line["modified"] for line in state)) == {
        (line["namespace"], line["key"]): (line["value"], line["modified"]) for line in state
    }


def replay(log: list[dict[str, Any]], upto: int) -> dict[tuple[str, str], tuple[Any, int]]:
    """The state after these entries of the log."""
    found: dict[tuple[str, str], tuple[Any, int]] = {}
    for line in log[:upto]:
        where = (line["namespace"], line["key"])
        if line["kind"] == "put":
            found[where] = (line["value"], line["commit_id"])
        elif line["kind"] == "delete":
            found.pop(where, None)
    return found


# --- (l) full load --------------------------------------------------------------------------------------------


def test_no_elections_under_full_load(tmp_path: Path) -> None:
    """With the default timeouts a busy machine does not change its leaders. Fifty clients at once keep three nodes, and
    all cores of this machine, busy with some thousand writes. Seen: the term at the end is that at the start, no node
    has changed its role, and no write had an open outcome or was refused."""
    count = 2500
    feed = (record for _, record in zip(range(count), numbered("full-load", seeded(91), 1000), strict=False))
    with ClusterOfProcesses(3, tmp_path) as cluster:
        leader, term = cluster.await_leader(), cluster.term()
        marks = {node: node.mark() for node in cluster}
        with Writers(cluster.addresses, feed, clients=50, resolve=False) as writers:
            writers.join()
        assert len(writers.acknowledged) == count
        assert (writers.open_outcomes, writers.not_executed) == (0, 0)
        assert cluster.term() == term
        assert cluster.await_leader() is leader
        for node, mark in marks.items():
            assert [line for line in node.events("role", since=mark) if line["role"] == "leader"] == []


# --- the end --------------------------------------------------------------------------------------------------


def test_all_that_the_tests_above_were_told_is_there(cluster: ClusterOfProcesses, book: Book) -> None:
    """After all of the above, in whatever order, the cluster still has everything that it ever acknowledged: through
    each node, and in one log in the three directories, at the places that were told. Each node was killed and started
    many times by then. At last all get SIGTERM and end with 0, and no log of a node has a traceback in it."""
    with cluster.client() as client:
        book.note("the end", ["the end"], client.put("the end", ["the end"])["commit_id"])
    book.check(*cluster)
    assert cluster.terminate() == [0, 0, 0]
    book.check_log(one_log(cluster))
    for node in cluster:
        assert "Traceback" not in node.log_text()
