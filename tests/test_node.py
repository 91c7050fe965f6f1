"""A node inside another program (published interface, 4): `RaftNode` started, used and closed from that program's
threads."""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raftnode import Client, Node, RaftNode
from raftnode.config import parse_address
from raftnode.errors import (
    BadRequest,
    ConfigError,
    NotCommitted,
    ProtocolError,
    RequestError,
    StoreClosed,
    StoreError,
    StoreForeign,
    StoreInUse,
    Unavailable,
)
from raftnode.testing.processes import free_addresses
from raftnode.testing.processes import wait_until as until

PATIENCE = 20.0

# --- helpers --------------------------------------------------------------------------------------------------


Make = Callable[..., RaftNode]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes nodes, each with a directory of its own unless told otherwise, and closes them. An exception that one of
    their callbacks let through fails the test."""
    complaints: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: complaints.append(handler.format(record)[-600:])  # type: ignore[method-assign]
    logging.getLogger("asyncio").addHandler(handler)
    nodes: list[RaftNode] = []

    def make_one(address: str | None = None, peers: list[str] | str = "", **kwargs: Any) -> RaftNode:
        kwargs = {"data_dir": tmp_path / f"node{len(nodes)}", **kwargs}
        nodes.append(RaftNode(address or free_addresses(1)[0], peers, 5, **kwargs))  # type: ignore[arg-type]
        return nodes[-1]

    yield make_one
    found = list(complaints)
    for node in nodes:
        with contextlib.suppress(ConfigError, StoreError):  # what ended it, which the test has seen
            node.close()
    logging.getLogger("asyncio").removeHandler(handler)
    assert not found, "\n".join(found)


def threads_of(node: RaftNode) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == f"raftnode {node.my_ip}"]


# --- one node -------------------------------------------------------------------------------------------------


def test_the_example_of_the_docstring(tmp_path: Path) -> None:
    """`with RaftNode(...) as node`: a cluster of one serves at once; at the end of the block its thread is gone."""
    with RaftNode(free_addresses(1)[0], [], 5, data_dir=tmp_path / "state") as node:
        node.put("name", "John Doe")
        assert node.get("name")["value"] == "John Doe"
        assert len(threads_of(node)) == 1
    assert not threads_of(node)
    assert not node.is_serving
    assert (tmp_path / "state" / "raftnode.mdb").exists()


def test_put_get_delete_status(make: Make) -> None:
    """What the four methods return: commit ids in one order, versions, what was replaced, and every JSON value."""
    node = make().start()
    first = node.put("k", {"a": [1, None, "ä"]})
    assert (first["version"], first["replaced"]) == (1, None)
    second = node.put("k", 0.5)
    assert (second["version"], second["replaced"]) == (2, first["commit_id"])
    assert second["commit_id"] > first["commit_id"]
    found = node.get("k")
    assert (found["value"], found["created"], found["modified"], found["version"]) == (
        0.5,
        first["commit_id"],
        second["commit_id"],
        2,
    )
    assert node.get("k", consistency="local")["value"] == 0.5
    node.put("k", "elsewhere", namespace="other")
    gone = node.delete("k")
    assert gone["replaced"] == second["commit_id"]
    assert node.delete("k")["replaced"] is None
    assert (node.get("k")["value"], node.get("k", "other")["value"]) == (None, "elsewhere")
    status = node.status()
    assert (status["role"], status["leader"], status["address"]) == ("leader", node.my_ip, node.my_ip)
    assert status["commit_id"] == status["last"]["commit_id"] == 6
    assert list(status["members"]) == [node.my_ip]


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (lambda node: node.put("", 1), "bad_request"),
        (lambda node: node.put("k" * 600, 1), "key_too_long"),
        (lambda node: node.put("k", 1, namespace="n" * 65), "bad_request"),
        (lambda node: node.put("k", 1, namespace=""), "bad_request"),
        (lambda node: node.get(""), "bad_request"),
        (lambda node: node.delete("a\ud800"), "bad_request"),
        (lambda node: node.get("k", consistency="lucky"), "bad_request"),
        (lambda node: node.put("k", float("nan")), "bad_request"),
        (lambda node: node.put("k", {1, 2}), "bad_request"),
        (lambda node: node.put("k", b"bytes"), "bad_request"),
        (lambda node: node.put(7, 1), "bad_request"),
        (lambda node: node.put("k", 10**400), "bad_request"),
    ],
)
def test_wrong_requests(make: Make, request_: Callable[[RaftNode], Any], code: str) -> None:
    """What is wrong in itself raises an error of ours with the designed code, never one of a library; the node goes on,
    and nothing was written."""
    node = make(store_type="memory").start()
    before = node.status()["commit_id"]
    with pytest.raises((BadRequest, ProtocolError)) as refused:
        request_(node)
    assert refused.value.code == code
    assert node.status()["commit_id"] == before
    assert node.put("k", "fine")["version"] == 1


def test_no_majority(make: Make) -> None:
    """One of three nodes alone: writes and reads raise Unavailable (never executed), a local read and status answer."""
    addresses = free_addresses(3)
    node = make(addresses[0], addresses[1:], request_timeout_ms=300).start()
    for request in (lambda: node.put("k", 1), lambda: node.get("k"), lambda: node.delete("k")):
        with pytest.raises(Unavailable) as refused:
            request()
        assert refused.value.code == "no_leader"
    assert node.get("k", consistency="local")["value"] is None
    status = node.status()
    assert (status["leader"], status["term"]) == (None, 0), "pre-vote keeps the term where it was"
    assert list(status["members"]) == sorted(addresses)


# --- starting and stopping ------------------------------------------------------------------------------------


def test_start_twice(make: Make) -> None:
    """A second start is refused in words, and the node that runs is not disturbed; so after its end."""
    node = make(store_type="memory").start()
    with pytest.raises(ConfigError, match="started already"):
        node.start()
    assert node.put("k", 1)["version"] == 1
    node.close()
    with pytest.raises(ConfigError, match="started already"):
        node.start()


@pytest.mark.parametrize("is_started", [False, True])
def test_close_any_number_of_times(make: Make, tmp_path: Path, is_started: bool) -> None:
    """Close after close does nothing more, for a node that ran and for one that was never started; and the directory is
    free again."""
    node = make(data_dir=tmp_path / "one")
    if is_started:
        node.start()
    for _ in range(3):
        node.close()
    assert not node.is_serving
    make(node.my_ip, data_dir=tmp_path / "one").close()


def test_stop_before_start(make: Make) -> None:
    """A node that was told to stop before it began comes up and goes straight down: `start` does not hang."""
    node = make(store_type="memory")
    node.stop()
    node.start()
    node.join(PATIENCE)
    until(lambda: not threads_of(node), "its thread ends")


def test_after_the_close(make: Make) -> None:
    """A closed node answers at once, with an error of ours: nobody waits for what can't come."""
    node = make(store_type="memory").start()
    node.put("k", 1)
    node.close()
    began = time.monotonic()
    for request in (lambda: node.put("k", 2), lambda: node.get("k"), node.status, lambda: node.delete("k")):
        with pytest.raises(Unavailable) as refused:
            request()
        assert refused.value.code == "shutting_down"
    assert time.monotonic() - began < 4, "none waited for its time-out"


def test_never_started_then_used(make: Make) -> None:
    """A node that was closed before it was ever started raises an error of ours, and does not hang."""
    node = make(store_type="memory", request_timeout_ms=300)
    node.close()
    with pytest.raises((RequestError, StoreClosed)):
        node.put("k", 1)


def test_the_address_is_taken(make: Make) -> None:
    """Somebody listens there already: `start` raises ConfigError that says so, and the directory is free again."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        node = make(address)
        with pytest.raises(ConfigError, match="can't listen"):
            node.start()
        assert not threads_of(node)
    again = make(address, data_dir=node.store.data_dir).start()
    assert again.put("k", 1)["version"] == 1


def test_another_address_to_listen_on(make: Make, tmp_path: Path) -> None:
    """The address by which the members know a node need not be one of its machine: `listen` says where it listens, and
    its identity stays the former. What is no address is told before the directory is touched. Seen: it serves there,
    and nothing listens at the other."""
    known, listening = free_addresses(2)
    with pytest.raises(ConfigError, match="expected host:port"):
        make(known, data_dir=tmp_path / "untouched", listen="nowhere")
    assert not (tmp_path / "untouched").exists()
    node = make(known, listen=listening).start()
    assert (node.my_ip, node.listen) == (known, listening)
    with Client(listening) as client:
        client.put("k", 1)
        assert client.peers()["peers"] == [known]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(parse_address(known), 1)


@pytest.mark.parametrize(
    ("address", "peers", "timeout", "kwargs"),
    [
        ("nonsense", [], 5, {}),
        ("127.0.0.1:0", [], 5, {}),
        ("127.0.0.1:5001", ["x"], 5, {}),
        ("127.0.0.1:5001", [], 0, {}),
        ("127.0.0.1:5001", [], 5, {"heartbeat": 3}),
        ("127.0.0.1:5001", [], 5, {"heartbeat_ms": "fast"}),
        ("127.0.0.1:5001", [], 5, {"heartbeat_ms": 5000}),
        ("127.0.0.1:5001", [], 5, {"store_type": "paper"}),
    ],
)
def test_wrong_settings(tmp_path: Path, address: str, peers: list[str], timeout: int, kwargs: dict[str, Any]) -> None:
    """A wrong address, peer, time-out, setting or store type is ConfigError, before anything has started; with right
    ones the same directory is taken afterwards."""
    with pytest.raises(ConfigError):
        RaftNode(address, peers, timeout, data_dir=tmp_path, **kwargs)
    RaftNode("127.0.0.1:5001", [], 5, data_dir=tmp_path).close()


def test_two_nodes_on_one_directory(make: Make, tmp_path: Path) -> None:
    """store docstring: the second is kept out, with the same address or another, while the first lives."""
    node = make(data_dir=tmp_path / "one").start()
    with pytest.raises(StoreInUse):
        make(node.my_ip, data_dir=tmp_path / "one")
    assert node.put("k", 1)["version"] == 1


def test_restart_keeps_everything(make: Make, tmp_path: Path) -> None:
    """Three lives on one directory and one address: values, versions and commit ids go on where they were, the node
    keeps its id, and the term never falls."""
    address, terms, ids = free_addresses(1)[0], [], set()
    for life in range(3):
        node = make(address, data_dir=tmp_path / "one").start()
        assert node.get("k")["value"] == (life - 1 if life else None)
        assert node.put("k", life)["version"] == life + 1
        status = node.status()
        terms.append(status["term"])
        ids.add(status["node"])
        node.close()
    assert terms == sorted(terms)
    assert len(ids) == 1


def test_memory_is_thrown_away(make: Make) -> None:
    """A memory store ends with its node, and leaves no directory behind."""
    node = make(store_type="memory").start()
    directory = node.store.data_dir
    node.put("k", 1)
    assert directory.exists()
    node.close()
    assert not directory.exists()


def test_a_directory_of_another_address(make: Make, tmp_path: Path) -> None:
    """The directory of one node is refused to another address, in words that name the right one (rule 9); and
    it is not harmed, nor held."""
    mine, other = free_addresses(2)
    with make(mine, data_dir=tmp_path / "one") as node:
        node.put("k", "mine")
    with pytest.raises(StoreForeign, match=mine):
        make(other, data_dir=tmp_path / "one")
    with make(mine, data_dir=tmp_path / "one") as node:
        assert node.get("k")["value"] == "mine"


def test_other_peers_than_the_stores(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The membership is in the store (rule 8): other peers at a later start are ignored, and a warning says so; the
    same peers in another spelling or order, or none at all, are not worth one."""
    me, b, c = free_addresses(3)
    make(me, [b, c], data_dir=tmp_path / "one").close()
    caplog.set_level(logging.WARNING, "raftnode")
    for peers in ([c, b, b, me], f" {c} , {b}", ""):
        make(me, peers, data_dir=tmp_path / "one").close()
    assert "peers_ignored" not in caplog.text
    node = make(me, ["127.0.0.1:1"], data_dir=tmp_path / "one")
    assert node.peers == sorted([b, c])
    assert list(node.election.status()["members"]) == sorted([me, b, c])
    warning = next(record for record in caplog.records if "peers_ignored" in record.getMessage())
    assert warning.levelno == logging.WARNING
    assert "127.0.0.1:1" in warning.getMessage()


def test_the_other_name(make: Make) -> None:
    """`raftnode.Node` is the class."""
    assert isinstance(make(store_type="memory"), Node)


@pytest.mark.parametrize("flag", ["-O", "-OO"])
def test_without_asserts_it_does_not_run(flag: str) -> None:
    """The package checks itself with assert statements; a Python that drops them is refused at the import, in words."""
    done = subprocess.run([sys.executable, flag, "-c", "import raftnode"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "do not run it under python -O" in done.stderr


# --- three nodes ----------------------------------------------------------------------------------------------


def cluster(make: Make, **kwargs: Any) -> list[RaftNode]:
    addresses = free_addresses(3)
    return [make(me, [a for a in addresses if a != me], **kwargs).start() for me in addresses]


FAST = {"heartbeat_ms": 50, "election_low_ms": 400, "election_high_ms": 800}


def test_three_nodes_in_one_process(make: Make) -> None:
    """Three nodes form a cluster by themselves: a write through each is read through every other, all agree on one
    leader and one cluster, and the Python client reaches them too."""
    nodes = cluster(make, **FAST)
    for n, node in enumerate(nodes):
        node.put(f"from{n}", n)
    for node in nodes:
        assert [node.get(f"from{n}")["value"] for n in range(3)] == [0, 1, 2]
    seen = [node.status() for node in nodes]
    assert len({(s["leader"], s["term"], s["cluster"]) for s in seen}) == 1
    assert len({s["node"] for s in seen}) == 3
    assert sorted(s["role"] for s in seen) == ["follower", "follower", "leader"]
    with Client([node.my_ip for node in nodes]) as client:
        assert client.get("from1") == 1


def test_the_leader_is_closed(make: Make) -> None:
    """The leader of three is closed: the other two elect one of themselves, keep what was acknowledged and take writes.
    It comes back on the same directory and catches up."""
    nodes = cluster(make, **FAST)
    nodes[0].put("before", 1)
    leader = next(node for node in nodes if node.status()["role"] == "leader")
    rest = [node for node in nodes if node is not leader]
    leader.close()
    assert until(lambda: put_if_possible(rest[0], "after", 2), "a write without the old leader")
    assert [node.get("before")["value"] for node in rest] == [1, 1]
    back = make(leader.my_ip, [node.my_ip for node in rest], data_dir=leader.store.data_dir, **FAST).start()
    until(lambda: back.get("after", consistency="local")["value"] == 2, "it catches up")
    assert back.get("before")["value"] == 1


def put_if_possible(node: RaftNode, key: str, value: Any) -> bool:
    try:
        node.put(key, value)
    except (Unavailable, NotCommitted):
        return False
    return True


# --- closing under load ---------------------------------------------------------------------------------------


class Load:
    """Threads that use a node until it ends, and what they saw."""

    def __init__(self, node: RaftNode, count: int, name: str = "") -> None:
        self.node = node
        self.name = name
        self.acknowledged: dict[str, int] = {}
        self.strange: list[BaseException] = []
        self.slowest = 0.0
        self.threads = [threading.Thread(target=self._work, args=(n,)) for n in range(count)]
        for thread in self.threads:
            thread.start()

    def _work(self, me: int) -> None:
        key, n, began = f"{self.name}{me}", 0, 0.0
        try:
            while True:
                n, began = n + 1, time.monotonic()
                self.node.put(key, n)
                self.acknowledged[key] = n
                assert self.node.get(key)["value"] == n
                self.node.status()
        except (Unavailable, NotCommitted):
            pass
        except BaseException as error:
            self.strange.append(error)
        finally:
            self.slowest = max(self.slowest, time.monotonic() - began)

    def wait(self) -> None:
        for thread in self.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a caller hangs"
        assert not self.strange, self.strange
        assert self.slowest < 4, "a caller was not told at once"


@pytest.mark.parametrize("seed", range(6))
def test_close_under_load(make: Make, tmp_path: Path, seed: int) -> None:
    """Six threads put and read while four others close the node at one moment: everyone returns, with an answer or one
    of two typed errors, and on the next start every acknowledged write is there."""
    chance = random.Random(seed)
    address = free_addresses(1)[0]
    node = make(address, data_dir=tmp_path / "one").start()
    load = Load(node, 6)
    until(lambda: len(load.acknowledged) == 6, "everyone has written")
    enough = chance.randrange(20, 60)
    until(lambda: node.store.commit_id > enough, "some load")
    closers = [threading.Thread(target=node.close) for _ in range(4)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join(PATIENCE)
        assert not closer.is_alive(), "close hangs"
    load.wait()
    again = make(address, data_dir=tmp_path / "one").start()
    for key, n in load.acknowledged.items():
        assert again.get(key)["value"] in (n, n + 1), "n + 1 was open"


def test_close_three_under_load(make: Make) -> None:
    """The same with three nodes, one closed after the other while each has callers of its own: nobody hangs, also not
    those whose requests were passed on to a leader that is closed in this moment."""
    nodes = cluster(make, request_timeout_ms=2000, **FAST)
    nodes[0].put("ready", 1)
    loads = [Load(node, 2, f"{n}-") for n, node in enumerate(nodes)]
    until(lambda: all(len(load.acknowledged) == 2 for load in loads), "everyone has written")
    for node in nodes:
        node.close()
    for load in loads:
        load.wait()
