"""The transport: blocking requests from other threads, and the links between members (published interface, 4; TRAPS 35,
36).

What comes over a client's connection is tested in `test_wire`.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import itertools
import json
import logging
import queue
import socket
import socketserver
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raftnode import RaftNode
from raftnode.config import Settings
from raftnode.errors import ConfigError, NotCommitted, ProtocolError, RequestError, Unavailable
from raftnode.mailbox import Arrival, drain
from raftnode.messages import PROTOCOL_VERSION, Get, Ping, Put
from raftnode.testing.processes import free_addresses
from raftnode.testing.processes import wait_until as until
from raftnode.transport import RECONNECT_TRIES, Transport

PATIENCE = 20.0
FAST = {"heartbeat_ms": 50, "election_low_ms": 400, "election_high_ms": 800, "reconnect_ms": 20}
CALM = {"election_low_ms": 30_000, "election_high_ms": 30_000}
"""No elections: nothing moves but what the test moves."""

# --- helpers --------------------------------------------------------------------------------------------------


class Line:
    """A plain socket that speaks lines."""

    def __init__(self, address: str) -> None:
        host, port = address.split(":")
        self.socket = socket.create_connection((host, int(port)), PATIENCE)
        self.file = self.socket.makefile("rwb")

    def ask(self, message: dict[str, Any] | bytes) -> dict[str, Any]:
        self.file.write(message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n")
        self.file.flush()
        return self.read()

    def read(self) -> dict[str, Any]:
        line = self.file.readline()
        assert line, "the other end has closed"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def is_ended(self) -> bool:
        """True when the other end has closed. Does not wait."""
        self.socket.setblocking(False)
        try:
            return self.socket.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.socket.settimeout(PATIENCE)

    def close(self) -> None:
        self.file.close()
        self.socket.close()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def plain() -> Iterator[Callable[..., Transport]]:
    """Transports without a driver; those with `serve=True` run in a thread."""
    made: list[tuple[Transport, threading.Thread | None]] = []

    def make(serve: bool = False, size: int = 100, peers: list[str] | None = None) -> Transport:
        transport = Transport(free_addresses(1)[0], 1, queue.Queue(size))
        transport.peers = peers or []
        thread = threading.Thread(target=transport.serve) if serve else None
        made.append((transport, thread))
        if thread is not None:
            thread.start()
            until(lambda: transport.is_serving, "it listens")
        return transport

    yield make
    for transport, thread in made:
        transport.close()
        if thread is not None:
            thread.join(PATIENCE)
            assert not thread.is_alive()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., RaftNode]]:
    """Starts nodes, and closes them; an exception in one of their callbacks fails the test."""
    complaints: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: complaints.append(handler.format(record)[-600:])  # type: ignore[method-assign]
    logging.getLogger("asyncio").addHandler(handler)
    nodes: list[RaftNode] = []

    def start_one(address: str | None = None, peers: list[str] | None = None, **kwargs: Any) -> RaftNode:
        address = address or free_addresses(1)[0]
        kwargs = {"data_dir": tmp_path / address.replace(":", "-"), **kwargs}
        nodes.append(RaftNode(address, peers or [], 1, **kwargs))
        return nodes[-1].start()

    yield start_one
    found = list(complaints)
    for node in nodes:
        node.close()
    logging.getLogger("asyncio").removeHandler(handler)
    assert not found, "\n".join(found)


def hello(of: RaftNode, as_node: str, address: str, **more: Any) -> dict[str, Any]:
    """What a member of the cluster of `of` would begin with."""
    return {
        "type": "hello",
        "cluster": of.store.cluster_id,
        "node": as_node,
        "address": address,
        "protocol": PROTOCOL_VERSION,
        **more,
    }


# --- a transport without a driver -----------------------------------------------------------------------------


def test_a_plain_transport_fills_its_queue(plain: Callable[..., Transport]) -> None:
    """published interface: Transport(my_ip, timeout, queue) is a working part by itself: what is received lies in the
    queue, typed, for whoever drains it; and an answer finds its way back to the one who asked."""
    transport = plain(serve=True)
    with Line(transport.my_ip) as client:
        client.file.write(b'{"type":"put","key":"k","value":1,"id":1}\n{"type":"ping","id":2}\n')
        client.file.flush()
        found: list[Any] = []
        until(lambda: found.extend(drain(transport.queue)) or len(found) == 2, "both are in the queue")
        assert [type(arrival.message) for arrival in found] == [Put, Ping]
        assert all(isinstance(arrival, Arrival) for arrival in found)
        loop = transport._loop
        assert loop is not None
        loop.call_soon_threadsafe(lambda: (found[1].refuse("overloaded", "later"), transport.flush()))
        answer = client.read()
        assert (answer["type"], answer["id"], answer["error"]["code"]) == ("ping", 2, "overloaded")


def test_a_plain_transport_answers_what_is_malformed(plain: Callable[..., Transport]) -> None:
    """What never becomes a request is answered by the transport itself, at once, and nothing of it is in the queue."""
    transport = plain(serve=True)
    with Line(transport.my_ip) as client:
        assert client.ask(b"nonsense\n")["error"]["code"] == "bad_request"
        assert client.ask({"type": "dance"})["error"]["code"] == "unknown_type"
        assert client.ask({"type": "put", "value": 1})["error"]["code"] == "bad_request"
    assert transport.queue.empty()


def test_a_plain_transport_answers_what_comes_together_with_a_request(plain: Callable[..., Transport]) -> None:
    """A request and something malformed come in one packet: the one lies in the queue, the other is answered at once,
    though nobody takes turns."""
    transport = plain(serve=True)
    with Line(transport.my_ip) as client:
        assert client.ask(b'{"type":"get","key":"k","id":1}\n{"type":"dance","id":2}\n')["id"] == 2
        assert [type(arrival.message) for arrival in drain(transport.queue)] == [Get]


def test_a_full_queue_answers_overloaded(plain: Callable[..., Transport]) -> None:
    """TRAPS 38: nobody drains the queue of two places: the third connection's request is answered `overloaded` at
    once, and the first two still lie there."""
    transport = plain(serve=True, size=2)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Line(transport.my_ip)) for _ in range(3)]
        for n, client in enumerate(clients[:2], 1):
            client.file.write(b'{"type":"ping"}\n')
            client.file.flush()
            until(lambda n=n: transport.queue.qsize() == n, "it is in the queue")  # type: ignore[misc]
        assert clients[2].ask({"type": "get", "key": "k"})["error"]["code"] == "overloaded"
        assert transport.queue.qsize() == 2


def test_what_there_is_no_time_for_is_not_read(plain: Callable[..., Transport]) -> None:
    """TRAPS 38: twenty clients send a large part of a message in the same pass, and time is up after the first. All
    that has come is either counted as kept here, by which `client_bytes` bounds it, or still with the system; nothing
    is lost, and everybody's turn comes."""
    transport = plain(serve=True)
    transport.settings = Settings(stall_timeout_ms=1_000_000_000)  # by the clock of this test nothing ever stalls
    count, message = 20, b'{"type":"ping"' + b" " * 50_000 + b"}\n"
    part = message[:-2]
    loop = transport._loop
    assert loop is not None
    seen = list[tuple[int, int]]()
    held_up, sent, done = threading.Event(), threading.Event(), threading.Event()
    clock = itertools.count(step=transport.settings.heartbeat_ms / 1000)

    def look() -> None:
        """Between two passes, again and again."""
        sockets = [connection.transport.get_extra_info("socket") for connection in transport._connections]
        unread = sum(struct.unpack("i", fcntl.ioctl(each, termios.FIONREAD, b"1234"))[0] for each in sockets)
        seen.append((unread, transport.client_bytes))
        if transport.client_bytes < count * len(part) and len(seen) < 10_000:
            loop.call_soon(look)
        else:
            done.set()

    def begin() -> None:
        held_up.set()
        assert sent.wait(PATIENCE)
        transport.now = lambda: float(next(clock))
        look()

    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Line(transport.my_ip)) for _ in range(count)]
        until(lambda: len(transport._connections) == count, "all are there")
        loop.call_soon_threadsafe(begin)
        assert held_up.wait(PATIENCE)
        for client in clients:
            client.socket.sendall(part)
        sent.set()
        assert done.wait(PATIENCE)
        assert {unread + kept for unread, kept in seen} == {count * len(part)}
        assert len(seen) > count // 4, "a few at a time"
        for client in clients:
            client.socket.sendall(message[len(part) :])
        found: list[Any] = []
        until(lambda: found.extend(drain(transport.queue)) or len(found) == count, "all are taken")


def test_stop_from_other_threads(plain: Callable[..., Transport]) -> None:
    """`stop` returns at once, from any thread and any number of times, also before `serve`, which then returns at
    once."""
    transport = plain(serve=True)
    stoppers = [threading.Thread(target=transport.stop) for _ in range(4)]
    for stopper in stoppers:
        stopper.start()
    for stopper in stoppers:
        stopper.join(PATIENCE)
    until(lambda: not transport.is_serving, "it ends")
    early = plain()
    early.stop()
    early.serve()


def test_a_bad_address(plain: Callable[..., Transport]) -> None:
    """An address that is none, or that is not of this machine, is ConfigError, in words."""
    with pytest.raises(ConfigError, match="expected host:port"):
        Transport("nowhere", 1, queue.Queue())
    transport = Transport("192.0.2.1:5001", 1, queue.Queue())
    with pytest.raises(ConfigError, match=r"can't listen on 192\.0\.2\.1:5001"):
        transport.serve()
    with pytest.raises(ConfigError, match="belongs to no node"):
        plain().hello()


def test_a_defect_at_the_end_of_a_pass_ends_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows from all that was read fails outside of the driver's turn: the state of this node can't be trusted
    any more, so it ends with the error rather than go on. Its store is closed, and can be opened again."""
    node = RaftNode(free_addresses(1)[0], [], 1, data_dir=tmp_path, **CALM)
    node.start()
    until(lambda: node.election.raft.is_leader, "it leads")

    def fail() -> None:
        raise RuntimeError("no idea what to flush")

    monkeypatch.setattr(node, "flush", fail)
    with Line(node.my_ip) as line:
        line.file.write(b"not JSON\n")  # it is answered without a turn
        line.file.flush()
        with pytest.raises(RuntimeError, match="no idea what to flush"):
            node.join(PATIENCE)
    assert not node.is_serving
    RaftNode(node.my_ip, [], 1, data_dir=tmp_path).close()


def test_serving_can_be_tried_again() -> None:
    """Somebody else listens on the address, and stops: the same transport serves then. Until it does, it has no file
    open: whoever only asks others needs no loop."""
    (address,) = free_addresses(1)
    host, port = address.split(":")
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    transport = Transport(address, 1, queue.Queue())
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before
    with contextlib.closing(socket.create_server((host, int(port)))), pytest.raises(ConfigError):
        transport.serve()
    thread = threading.Thread(target=transport.serve)
    thread.start()
    try:
        until(lambda: transport.is_serving, "it serves")
    finally:
        transport.close()
        thread.join()


def test_the_codec(plain: Callable[..., Transport]) -> None:
    """published interface: `decode_json` and `encode_json` are each other's inverse; whatever is no JSON object is our
    protocol error, never one of a library."""
    transport = plain()
    message = {"type": "put", "key": "ä💾", "value": [None, True, 1.5, 2**60, {"": []}]}
    line = transport.encode_json(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert transport.decode_json(line) == message
    assert transport.decode_json(line.decode()) == message
    for bad in (
        b"",
        b"[]",
        b"1",
        b"null",
        b'{"a":',
        b"\xff",
        b'{"a":1}{"b":2}',
        "{'a': 1}",
        b"[" * 100_000,
        b'{"a":1e999}',
    ):
        with pytest.raises(ProtocolError) as refused:
            transport.decode_json(bad)
        assert refused.value.code == "bad_request"
    with pytest.raises(ProtocolError) as refused:
        transport.decode_json(b" " * (transport.settings.peer_frame_bytes + 1))
    assert refused.value.code == "too_large"
    for unfit in ({"a": float("inf")}, {"a": {1, 2}}, {"a": b"b"}, {"a": object()}):
        with pytest.raises(ProtocolError):
            transport.encode_json(unfit)


# --- one request from another thread --------------------------------------------------------------------------


def test_echo_and_the_live_list(start: Callable[..., RaftNode], plain: Callable[..., Transport]) -> None:
    """`echo` pings one peer and notes in `live` whether it answers; the list of peers is not touched (published
    interface)."""
    node, gone = start(), free_addresses(1)[0]
    transport = plain(peers=[node.my_ip, gone])
    answer = transport.echo(node.my_ip)
    assert answer is not None
    assert (answer["type"], answer["node"]) == ("ping", node.my_ip)
    assert transport.echo(gone) is None
    assert transport.live == {node.my_ip}
    node.close()
    assert transport.echo(node.my_ip) is None
    assert (transport.live, transport.peers) == (set(), [node.my_ip, gone])


def test_ping_goes_on_until_stop(start: Callable[..., RaftNode], plain: Callable[..., Transport]) -> None:
    """`ping(timeout)` goes round all peers every `timeout` seconds: a peer that ends leaves the live list, one that
    comes back is in it again; `stop` ends the loop at once, not after the pause."""
    address = free_addresses(1)[0]
    node = start(address)
    transport = plain(peers=[address])
    pinging = threading.Thread(target=transport.ping, args=(0.01,))
    pinging.start()
    until(lambda: transport.live == {address}, "it answers")
    node.close()
    until(lambda: not transport.live, "it is missed")
    start(address)
    until(lambda: transport.live == {address}, "it is back")
    transport.stop()
    pinging.join(PATIENCE)
    assert not pinging.is_alive()
    slow = plain(peers=[])
    pinging = threading.Thread(target=slow.ping, args=(3600.0,))
    pinging.start()
    slow.stop()
    pinging.join(PATIENCE)
    assert not pinging.is_alive()


def test_requests_of_a_member(start: Callable[..., RaftNode]) -> None:
    """`heartbeat`, `vote_request` and `send_data` from a thread of one member to another: without a message they ask
    and change nothing, but tell the other's term; they need the handshake, which goes before by itself."""
    first, second, third = free_addresses(3)
    node = start(first, [second, third], **CALM)
    other = start(second, [first, third], **CALM)
    until(lambda: node.live == {second} and other.live == {first}, "linked")
    beat = node.heartbeat(second)
    assert beat is not None
    assert (beat["type"], beat["data"], beat["term"], beat["commit_id"]) == ("heartbeat", True, 0, 0)
    vote = node.vote_request(second)
    assert vote is not None
    assert (vote["type"], vote["data"], vote["term"]) == ("vote_request", False, 0)
    data = node.send_data(second)
    assert data is not None
    assert data["type"] == "data"
    everyone = node.send_data()
    assert everyone is not None
    assert everyone.keys() == {second, third}
    assert (everyone[second]["type"], everyone[third]) == ("data", None)
    assert other.store.ballot.term == 0
    told = node.heartbeat(second, {"term": 3, "leader": first, "commit_id": 0})
    assert told is not None
    assert told["term"] == 3
    assert other.status()["leader"] == first
    assert node.heartbeat(third) is None
    assert node.vote_request(third) is None
    assert node.live == {second}


def test_a_stranger_gets_no_answer_out_of_a_member(
    start: Callable[..., RaftNode], plain: Callable[..., Transport]
) -> None:
    """TRAPS 35: a transport that belongs to no node sends no hello, and is told `wrong_cluster`; one of another
    cluster is refused at its hello, and gets nothing at all. Neither changes the node."""
    node = start()
    answer = plain().heartbeat(node.my_ip, {"term": 99, "leader": "x:1", "commit_id": 0})
    assert answer is not None
    assert answer["error"]["code"] == "wrong_cluster"
    stranger = plain()
    stranger.identify("another", "some-node")
    assert stranger.heartbeat(node.my_ip, {"term": 99, "leader": stranger.my_ip, "commit_id": 0}) is None
    assert node.status()["term"] == 1


def test_a_peer_that_never_answers(plain: Callable[..., Transport]) -> None:
    """Somebody accepts and is silent: each request gives up after `timeout` (1 s here), and the late answer of the
    first is not taken for the answer of the second."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        transport = plain(peers=[address])
        began = time.monotonic()
        assert transport.echo(address) is None
        assert 0.9 < time.monotonic() - began < PATIENCE
        assert transport.live == set()
        accepted, _ = silent.accept()
        accepted.close()


def test_redirect_to_leader(start: Callable[..., RaftNode], plain: Callable[..., Transport]) -> None:
    """published interface: a client's request goes to whichever member can be reached, and the leader's answer comes
    back; when nobody can be reached, that is Unavailable."""
    gone, address = free_addresses(2)
    node = start(address)
    transport = plain(peers=[gone, node.my_ip])
    assert transport.redirect_to_leader({"type": "put", "key": "k", "value": [1]})["data"] is True
    assert transport.redirect_to_leader({"type": "get", "key": "k"})["data"]["value"] == [1]
    assert transport.add_peer({"address": node.my_ip})["data"] is True
    assert transport.add_peer({"address": "nobody"})["error"]["code"] == "bad_request"
    answer = transport.add_peer({"address": gone})
    assert answer["membership"]["learners"] == {gone: ""}
    assert transport.req_add_peer(node.my_ip) is True
    assert node.status()["members"][transport.my_ip]["voter"] is False, "it has no vote before it has caught up"
    assert transport.req_add_peer(gone) is False
    with pytest.raises(Unavailable) as refused:
        plain(peers=[gone]).redirect_to_leader({"type": "get", "key": "k"})
    assert refused.value.code == "no_leader"


@pytest.mark.parametrize("kind", ["put", "delete", "get"])
def test_redirect_does_not_repeat_a_write(
    start: Callable[..., RaftNode], plain: Callable[..., Transport], kind: str
) -> None:
    """Rule 12: the first member takes the request and dies before it answers. A write is open, and not sent again to
    the next member; a read is."""
    node = start()
    with socket.create_server(("127.0.0.1", 0)) as dying:

        def take_and_die() -> None:
            taken, _ = dying.accept()
            taken.recv(1000)
            taken.close()

        thread = threading.Thread(target=take_and_die)
        thread.start()
        transport = plain(peers=[f"127.0.0.1:{dying.getsockname()[1]}", node.my_ip])
        message = {"type": kind, "key": "k", **({"value": 1} if kind == "put" else {})}
        if kind == "get":
            assert transport.redirect_to_leader(message)["data"]["value"] is None
        else:
            with pytest.raises(NotCommitted):
                transport.redirect_to_leader(message)
            assert node.status()["commit_id"] == 1, "the write went to another member too"
        thread.join(PATIENCE)


def test_reconnect(start: Callable[..., RaftNode], plain: Callable[..., Transport]) -> None:
    """published interface: up to 20 tries, False when nothing listens; True when something does, also when it begins to
    listen between two tries. `stop` ends the tries."""
    late = free_addresses(1)[0]
    transport = plain()
    transport.settings = type(transport.settings)(reconnect_ms=1)
    waits: list[float] = []

    class Counting(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0)
            if len(waits) == 25:
                start(late)
            return super().wait(timeout)

    transport._stopping = Counting()
    assert transport.reconnect(late) is False
    assert len(waits) == RECONNECT_TRIES == 20
    assert transport.reconnect(late) is True, "it listens since the fifth of these tries"
    assert len(waits) == 25
    assert transport.reconnect(late) is True
    transport.stop()
    assert transport.reconnect(free_addresses(1)[0]) is False
    assert len(waits) == 26


def test_close_closes_the_blocking_connections(start: Callable[..., RaftNode]) -> None:
    """`close` leaves no socket open (a forgotten one is a ResourceWarning, which fails here); the other side sees the
    end. A request after that opens a connection anew."""
    node = start()
    transport = Transport(free_addresses(1)[0], 1, queue.Queue())
    assert transport.echo(node.my_ip) is not None
    assert transport.reconnect(node.my_ip) is True
    until(lambda: node.connection_count == 1, "one connection")
    transport.close()
    until(lambda: node.connection_count == 0, "the node sees the end")
    assert transport.echo(node.my_ip) is not None
    transport.close_callers()
    until(lambda: node.connection_count == 0, "the node sees the end")


def test_a_refused_greeting_leaves_no_socket(start: Callable[..., RaftNode], plain: Callable[..., Transport]) -> None:
    """A hello that is refused leaves no open socket behind, however often it is tried."""
    node = start()
    transport = plain()
    transport.identify("another", "some-node")
    for _ in range(3):
        assert transport.echo(node.my_ip) is None
    until(lambda: node.connection_count == 0, "they are closed")


@pytest.mark.parametrize("ids", [False, True], ids=["in order", "overlapping"])
def test_what_came_with_a_refused_greeting_has_no_effect(start: Callable[..., RaftNode], ids: bool) -> None:
    """A put follows a hello that is refused, in the same packet: it was read before the refusal, which drops it."""
    node = start()
    talk = [hello(node, "n1", node.my_ip) | {"cluster": "0" * 16}, {"type": "put", "key": "late", "value": 1}]
    if ids:
        talk[0]["id"] = 1
    with Line(node.my_ip) as client:
        client.file.write(b"".join(json.dumps(message).encode() + b"\n" for message in talk))
        client.file.flush()
        assert client.read()["error"]["code"] == "wrong_cluster"
        assert client.file.read() == b""
    with Line(node.my_ip) as client:
        assert client.ask({"type": "get", "key": "late"})["data"]["value"] is None


def test_who_is_refused_in_the_middle_of_a_talk_gets_every_answer(start: Callable[..., RaftNode]) -> None:
    """Somebody asks for more than a socket buffer holds, says a hello that is refused, and goes on talking, all before
    it reads anything. What it is owed comes whole, up to the refusal, and then an end: no reset, which would drop what
    was on its way. What it said after the hello has no effect."""
    node = start()
    put = {"type": "put", "key": "big", "value": "x" * 200_000}
    get = {"type": "get", "key": "big", "consistency": "local"}
    wrong = hello(node, "n1", node.my_ip) | {"cluster": "0" * 16}
    with Line(node.my_ip) as client:
        assert client.ask(put)["data"] is True
        talk = [*[get] * 40, wrong]
        client.file.write(b"".join(json.dumps(message).encode() + b"\n" for message in talk))
        client.file.flush()
        late = json.dumps({**put, "key": "late"}).encode() * 40
        sender = threading.Thread(target=client.socket.sendall, args=(late,))
        sender.start()
        answers = [client.read() for _ in talk]
        assert all(len(answer["data"]["value"]) == 200_000 for answer in answers[:-1])
        assert answers[-1]["error"]["code"] == "wrong_cluster"
        assert client.file.read() == b"", "an end, and not a reset"
        sender.join(PATIENCE)
        client.socket.shutdown(socket.SHUT_WR)
        until(lambda: node.connection_count == 0, "both sides have ended")
    assert node.get("late")["version"] == 0, "what came after the refusal is dropped"


def test_who_is_refused_and_goes_on_talking_is_cut_off(start: Callable[..., RaftNode]) -> None:
    """What is said after a refusal is dropped, but not for ever."""
    node = start(stall_timeout_ms=300)
    with Line(node.my_ip) as client:
        wrong = hello(node, "n1", node.my_ip) | {"cluster": "0" * 16}
        assert client.ask(wrong)["error"]["code"] == "wrong_cluster"
        assert client.file.read() == b""

        def is_cut() -> bool:
            with contextlib.suppress(BlockingIOError):
                client.socket.send(b"x" * 1000, socket.MSG_DONTWAIT)
            return node.connection_count == 0

        with contextlib.suppress(ConnectionError):
            until(is_cut, "it is cut off")
        until(lambda: node.connection_count == 0, "it is cut off")


@pytest.mark.parametrize(
    "word",
    [
        b"nonsense",
        b"[]",
        b"{}",
        b'{"data":false}',
        b'{"data":false,"error":{}}',
        b'{"data":false,"error":"no"}',
        b'{"data":false,"error":[1]}',
        b"\xff",
    ],
)
def test_a_greeting_that_is_answered_with_nonsense(plain: Callable[..., Transport], word: bytes) -> None:
    """Whatever the other end answers to our hello: the request could not be had, which is None and no exception; no
    socket stays open on our side, as the other end sees."""
    with socket.create_server(("127.0.0.1", 0)) as mad:
        ended: list[bytes] = []

        def answer() -> None:
            taken, _ = mad.accept()
            with taken:
                taken.settimeout(PATIENCE)
                taken.recv(1000)
                taken.sendall(word + b"\n")
                ended.append(taken.recv(1000))

        thread = threading.Thread(target=answer)
        thread.start()
        transport = plain()
        transport.identify("cluster", "node")
        try:
            assert transport.heartbeat(f"127.0.0.1:{mad.getsockname()[1]}") is None
        finally:
            gc.collect()
            transport.close_callers()
            thread.join(PATIENCE)
        assert ended == [b""]


# --- links between members ------------------------------------------------------------------------------------


def test_links_come_back_every_time(start: Callable[..., RaftNode]) -> None:
    """A member is restarted fifteen times. Each time both links, ours and its own, are up again and can be used: a
    heartbeat goes through each. (Once the old link's end took the new one out of the books, in about half of the
    runs.)"""
    first, second, third = free_addresses(3)
    calm = {**CALM, "reconnect_ms": 5, "reconnect_high_ms": 20}
    stays = start(first, [second, third], **calm)
    for life in range(15):
        other = start(second, [first, third], **calm)
        until(lambda: stays.can_forward(second), f"the link to it, in life {life}")
        until(lambda other=other: other.can_forward(first), f"the link from it, in life {life}")  # type: ignore[misc]
        assert stays.live == {second}
        stays.election.send_vote_request(second, 7)
        link = stays.links[second]
        until(lambda link=link: link.oldest_wait() is None, "its answer")  # type: ignore[misc]
        assert stays.links[second] is link
        other.close()
        until(lambda: not stays.live, f"it is missed after life {life}")
        assert second not in stays.links
    assert sorted(stays.status()["members"]) == sorted([first, second, third])


def test_a_dead_peer_leaves_only_the_live_list(start: Callable[..., RaftNode]) -> None:
    """published interface: who does not answer leaves the live list; the membership stays, and a majority is counted
    over it: two of three serve, one of three does not."""
    addresses = free_addresses(3)
    nodes = [start(me, [a for a in addresses if a != me], **FAST) for me in addresses]
    nodes[0].put("k", 1)
    nodes[2].close()
    until(lambda: all(addresses[2] not in node.live for node in nodes[:2]), "it is missed")
    with Line(nodes[0].my_ip) as client:
        answer = client.ask({"type": "peers"})
        assert (answer["peers"], answer["live"]) == (sorted(addresses), sorted(addresses[:2]))
    until(lambda: serves(nodes[0]), "two of three serve")
    nodes[1].close()
    until(lambda: nodes[0].live == set(), "it is missed too")
    assert nodes[0].peers == sorted(addresses[1:])
    with pytest.raises(RequestError):
        nodes[0].put("k", 3)


def serves(node: RaftNode) -> bool:
    try:
        node.put("k", 2)
    except (Unavailable, NotCommitted):
        return False
    return True


def test_a_new_link_closes_the_old(start: Callable[..., RaftNode]) -> None:
    """TRAPS 36: a member opens its link again (its old one may hang): the older is closed first. A connection for
    single requests (`"link": false`) neither replaces the link nor is replaced by it; a client is not concerned."""
    me, peer, third = free_addresses(3)
    node = start(me, [peer, third], **CALM)
    with contextlib.ExitStack() as stack:
        old, single, new, client = (stack.enter_context(Line(me)) for _ in range(4))
        assert client.ask({"type": "ping"})["data"] is True
        assert old.ask(hello(node, "n1", peer))["data"] is True
        assert single.ask(hello(node, "n1", peer, link=False))["data"] is True
        beat = {"type": "heartbeat", "term": 1, "leader": peer, "commit_id": 0}
        assert old.ask(beat)["term"] == 1, "the single connection has not replaced it"
        assert new.ask(hello(node, "n1", peer))["data"] is True
        until(old.is_ended, "the older link is closed")
        assert new.ask(beat)["term"] == 1
        assert single.ask(beat)["term"] == 1
        assert client.ask({"type": "ping"})["data"] is True
        assert not new.is_ended()


def test_a_member_under_another_id(start: Callable[..., RaftNode]) -> None:
    """Rule 9, TRAPS 34: the first hello binds the address to a node id, on disk; a second id under that address is
    refused with `wrong_node`, and does not cut the link of the right one. So after a restart."""
    me, peer, third = free_addresses(3)
    node = start(me, [peer, third], **CALM)
    with Line(me) as right, Line(me) as wrong:
        assert right.ask(hello(node, "right", peer))["data"] is True
        assert wrong.ask(hello(node, "wrong", peer))["error"]["code"] == "wrong_node"
        until(wrong.is_ended, "it is closed")
        assert not right.is_ended()
    node.close()
    node = start(me, [peer, third], **CALM)
    with Line(me) as wrong:
        assert wrong.ask(hello(node, "wrong", peer))["error"]["code"] == "wrong_node"


class Impostor(socketserver.StreamRequestHandler):
    """A member that only says hello: as the node that its server is just now, by the membership that it names."""

    def handle(self) -> None:
        assert isinstance(self.server, ImpostorServer)
        for line in self.rfile:
            message = json.loads(line)
            if message["type"] == "hello":
                answer = {"type": "hello", "id": message["id"], "data": True, "cluster": message["cluster"]}
                self.wfile.write(json.dumps({**answer, **self.server.says}).encode() + b"\n")


class ImpostorServer(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Impostor)
        host, port = self.server_address[:2]
        self.address = f"{host!s}:{port}"
        self.says: dict[str, Any] = {"address": self.address}


@pytest.fixture
def served(start: Callable[..., RaftNode]) -> Iterator[tuple[RaftNode, ImpostorServer]]:
    """The leader of three, and the third of them, which is the node "old" and only says hello."""
    with ImpostorServer() as server, contextlib.ExitStack() as stack:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        stack.callback(thread.join, PATIENCE)
        stack.callback(server.shutdown)
        server.says |= {"node": "old", "membership": {"term": 0, "commit_id": 0}}
        members = [*free_addresses(2), server.address]
        nodes = [start(me, [a for a in members if a != me], stall_timeout_ms=300, **FAST) for me in members[:2]]
        until(lambda: serves(nodes[0]), "two of three serve")
        (leader,) = (node for node in nodes if status(node)["role"] == "leader")
        until(lambda: known(leader, server.address)["node"] == "old", "its id is known")
        yield leader, server


def status(node: RaftNode) -> dict[str, Any]:
    with Line(node.my_ip) as line:
        found: dict[str, Any] = line.ask({"type": "status"})["data"]
        return found


def known(node: RaftNode, address: str) -> dict[str, Any]:
    """What a node tells of a member."""
    found: dict[str, Any] = status(node)["members"][address]
    return found


def test_who_is_removed_is_told_on_its_newest_link(served: tuple[RaftNode, ImpostorServer]) -> None:
    """A member has opened its link again, and the end of the older one came after that. It is removed: the link that it
    has is cut, so that it asks again and is told. (Found by the simulator: the end of the old link was taken for that
    of the new one, and the removed node asked for votes on that for ever.)"""
    leader, server = served
    with Line(leader.my_ip) as old, Line(leader.my_ip) as new, Line(leader.my_ip) as administrator:
        for line in (old, new):
            assert line.ask(hello(leader, "old", server.address))["data"] is True
        until(old.is_ended, "the older link is closed")
        assert not new.is_ended()
        assert administrator.ask({"type": "remove_peer", "address": server.address})["data"] is True
        until(new.is_ended, "the newer one too")
    with Line(leader.my_ip) as again:
        assert again.ask(hello(leader, "old", server.address))["error"]["code"] == "not_member"


def test_a_new_disk_whose_readmission_was_cut(served: tuple[RaftNode, ImpostorServer]) -> None:
    """A member has lost its disk, and its leader has staged that another node is a learner in its place; the entry has
    reached that node alone, and the next leader has cut it. So the new node goes by a membership that looks newer than
    everybody's, is content, and refuses nobody: the leader learns from its friendly answer who it is, and takes it.
    (Found by the simulator.)"""
    leader, server = served
    assert known(leader, server.address)["voter"]
    server.says |= {"node": "new", "membership": {"term": 1, "commit_id": 1000}}
    until(lambda: known(leader, server.address)["node"] == "new", "it is taken as another node")
    assert not known(leader, server.address)["voter"]


def test_a_member_that_accepts_and_is_silent(start: Callable[..., RaftNode]) -> None:
    """One of three is a socket that accepts and never says a word: the other two elect a leader and serve, and both
    stop cleanly; after `stall_timeout_ms` the silent connection is cut and tried again."""
    first, second = free_addresses(2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        third = f"127.0.0.1:{silent.getsockname()[1]}"
        members = [first, second, third]
        nodes = [start(me, [a for a in members if a != me], stall_timeout_ms=300, **FAST) for me in (first, second)]
        until(lambda: serves(nodes[0]), "two of three serve")
        silent.settimeout(PATIENCE)
        taken = [silent.accept()[0] for _ in range(4)]
        assert all(third not in node.live for node in nodes), "who has not said hello is not live"
        assert serves(nodes[1])
        began = time.monotonic()
        for node in nodes:
            node.close()
        assert time.monotonic() - began < 5
        for each in taken:
            each.close()


def test_a_member_that_answers_nonsense(start: Callable[..., RaftNode]) -> None:
    """The other end of our link answers what is no answer: the link is cut and tried again, and the node serves on."""
    me, third = free_addresses(2)
    with socket.create_server(("127.0.0.1", 0)) as mad:
        peer = f"127.0.0.1:{mad.getsockname()[1]}"
        node = start(me, [peer, third], **CALM, reconnect_ms=5, reconnect_high_ms=10)
        mad.settimeout(PATIENCE)
        for word in (
            b"nonsense\n",
            b"[]\n",
            b'{"type":"ping","data":true,"id":77}\n',
            b'{"type":"hello"}\n',
            b"\xff\xfe\n",
        ):
            taken, _ = mad.accept()
            taken.settimeout(PATIENCE)
            assert json.loads(taken.makefile("rb").readline())["type"] == "hello"
            taken.sendall(word)
            with contextlib.suppress(ConnectionResetError):
                assert taken.recv(100) == b"", word
            taken.close()
        assert node.live == set()
        assert node.get("k", consistency="local")["value"] is None


def test_a_client_of_a_follower_during_a_cut(start: Callable[..., RaftNode]) -> None:
    """Requests through a follower while its link to the leader is cut again and again: each gets one answer, the reads
    all succeed (they are tried again), a write succeeds or is open; then all goes on as before."""
    addresses = free_addresses(3)
    nodes = [start(me, [a for a in addresses if a != me], **FAST) for me in addresses]
    nodes[0].put("k", 0)
    follower = next(node for node in nodes if node.status()["role"] == "follower")
    done = threading.Event()

    def cut() -> None:
        while not done.wait(0.05):
            loop = follower._loop
            assert loop is not None
            for link in list(follower.links.values()):
                loop.call_soon_threadsafe(link.cut)

    cutting = threading.Thread(target=cut)
    cutting.start()
    outcomes = {"done": 0, "open": 0}
    try:
        with Line(follower.my_ip) as client:
            for n in range(30):
                answer = client.ask({"type": "put", "key": "k", "value": n})
                if "error" in answer:
                    assert answer["error"]["code"] in ("not_committed", "no_leader"), answer
                outcomes["open" if "error" in answer else "done"] += 1
                read = client.ask({"type": "get", "key": "k"})
                assert "error" not in read or read["error"]["code"] == "no_leader", read
    finally:
        done.set()
        cutting.join(PATIENCE)
    assert outcomes["done"]
    until(lambda: serves(follower), "all goes on")
