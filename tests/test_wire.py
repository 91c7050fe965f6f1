"""The wire: bytes on a real socket against a live node (README, messages; TRAPS 35, 38).

Each test plays one or more clients with plain sockets, so that it says exactly what goes over the line and in which
pieces. Where a test needs the node to hold still, it gives the node's own thread something to wait for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from raftnode import RaftNode, transport
from raftnode.connections import Connection
from raftnode.mailbox import Arrival, Task
from raftnode.messages import CODES, LMDB_KEY_BYTES, PROTOCOL_VERSION, Get
from raftnode.testing.processes import free_address
from raftnode.testing.processes import wait_until as until

PATIENCE = 10.0
SWEEP = 0.05
"""Seconds between two looks at silent connections, in these tests."""

# --- helpers --------------------------------------------------------------------------------------------------


def line(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Socket:
    """A client that says what it is told to, byte by byte."""

    def __init__(self, node: RaftNode) -> None:
        host, port = node.my_ip.split(":")
        self.socket = socket.create_connection((host, int(port)), PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.name = "{}:{}".format(*self.socket.getsockname())
        self._rest = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self) -> dict[str, Any]:
        """The next answer. Fails at the end of the stream, or when none comes."""
        while b"\n" not in self._rest:
            part = self.socket.recv(1 << 18)
            assert part, f"the node closed the connection; before that came {self._rest!r}"
            self._rest += part
        found, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(found)
        return answer

    def answers(self, count: int) -> list[dict[str, Any]]:
        return [self.answer() for _ in range(count)]

    def ask(self, **message: Any) -> dict[str, Any]:
        self.send(line(message))
        return self.answer()

    def end(self) -> None:
        """Say that nothing more will come."""
        self.socket.shutdown(socket.SHUT_WR)

    def is_ended(self) -> bool:
        """True when the other end has closed; what it had sent before is dropped. Does not wait."""
        self.socket.setblocking(False)
        try:
            while self.socket.recv(1 << 20):
                pass
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            with contextlib.suppress(OSError):
                self.socket.settimeout(PATIENCE)
        return True

    def close(self) -> None:
        self.socket.close()


class Asked:
    """Who asks without a connection."""

    peer: str | None = None
    client = "somebody"
    is_full = False

    def __init__(self) -> None:
        self.answers: list[Any] = []

    def answer(self, arrival: Arrival, answer: Any) -> None:  # noqa: ARG002
        self.answers.append(answer)

    def defer(self, arrival: Arrival) -> None:
        raise AssertionError(f"{arrival} has room for its answer")


Start = Callable[..., RaftNode]
Connect = Callable[[RaftNode], Socket]


class _Complaints(logging.Handler):
    """What asyncio says of exceptions that a callback let through."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record)[-400:])


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Opens connections, and closes them at the end of the test."""
    sockets: list[Socket] = []

    def open_one(node: RaftNode) -> Socket:
        sockets.append(Socket(node))
        return sockets[-1]

    yield open_one
    for each in sockets:
        each.close()


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts nodes in threads, and stops them at the end of the test. A node that ended by itself fails the test, and
    so does an exception in one of its callbacks. Limits are given as settings; silent connections are looked at often.
    """
    monkeypatch.setattr(transport, "_SWEEP_S", SWEEP)
    complaints = _Complaints()
    logging.getLogger("asyncio").addHandler(complaints)
    nodes: list[RaftNode] = []

    def start_one(peers: list[str] | None = None, address: str | None = None, **settings: Any) -> RaftNode:
        settings = {"store_type": "memory", **settings}
        node = RaftNode(address or free_address(), peers or [], 5, **settings)
        nodes.append(node)
        return node.start()

    yield start_one
    found = list(complaints.texts)
    for node in nodes:
        node.close()
    logging.getLogger("asyncio").removeHandler(complaints)
    assert not found, "\n".join(found)


def connection_of(node: RaftNode, client: Socket) -> Connection:
    """The node's end of a connection."""

    def find() -> Connection | None:
        return next((c for c in list(node._connections) if c.client == client.name), None)

    found: Connection = until(find, f"a connection from {client.name}")
    return found


@contextlib.contextmanager
def held(node: RaftNode) -> Iterator[None]:
    """The node's thread does nothing inside this block; what arrives collects in the kernel."""
    reached, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        reached.set()
        go_on.wait(PATIENCE)

    node.deliver([Task(wait)], limited=False)
    assert reached.wait(PATIENCE), "the node takes no turns"
    try:
        yield
    finally:
        go_on.set()


def until_quiet(connection: Connection) -> None:
    """Wait until the node has had nothing more to put into this connection's buffer for a while."""

    def held_for() -> int:
        return connection._out_bytes + connection.transport.get_write_buffer_size()

    until(lambda: not connection.writable, "the node finds that the client takes nothing")
    since, last = time.monotonic(), held_for()

    def is_quiet() -> bool:
        nonlocal since, last
        if (now := held_for()) != last:
            since, last = time.monotonic(), now
        return time.monotonic() - since > 0.15

    until(is_quiet, "the node stops collecting answers")


def watch_buffers(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The most bytes that a node ever held for each client, by the client's name."""
    most: dict[str, int] = {}
    send = Connection.send

    def watched(connection: Connection, message: Any) -> None:
        send(connection, message)
        size = connection._out_bytes + connection.transport.get_write_buffer_size()
        most[connection.client] = max(most.get(connection.client, 0), size)

    monkeypatch.setattr(Connection, "send", watched)
    return most


def assert_serves(client: Socket, key: str = "witness") -> None:
    """The node takes a write and reads it back for this client."""
    value = f"{time.monotonic_ns()}"
    assert client.ask(type="put", key=key, value=value)["data"] is True
    assert client.ask(type="get", key=key)["data"]["value"] == value


def assert_refused(answer: dict[str, Any], code: str, *words: str) -> None:
    assert code in CODES
    assert answer["error"]["code"] == code, answer
    assert answer["data"] is (None if answer["type"] in ("get", "status") else False)
    for word in words:
        assert word in answer["error"]["message"], answer


# --- messages and bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [b"\n", b"", b" \r\n", b"\n\n"], ids=["newline", "bare", "crlf", "blank-line"])
def test_one_shot(start: Start, connect: Connect, end: bytes) -> None:
    """`printf '{...}' | nc`: one object, with or without its newline, then the client's end of the connection is shut.
    It gets its one answer, and then the node closes too (README, messages)."""
    node = start()
    client = connect(node)
    client.send(b'{"type":"put","key":"name","value":"John Doe"}' + end)
    client.end()
    answer = client.answer()
    assert (answer["type"], answer["data"], answer["version"]) == ("put", True, 1)
    assert client.socket.recv(100) == b""
    until(lambda: not node._connections, "the node forgets the connection")


def test_half_close_without_a_message(start: Start, connect: Connect) -> None:
    """A client that shuts its end without a word, or in the middle of one: nothing is invented; a beginning that never
    ends is answered as what it is, and the connection is closed."""
    node = start()
    silent, broken = connect(node), connect(node)
    silent.end()
    assert silent.socket.recv(100) == b""
    broken.send(b'{"type":"put","key":"na')
    broken.end()
    assert_refused(broken.answer(), "bad_request", "not JSON")
    assert broken.socket.recv(100) == b""
    assert connect(node).ask(type="get", key="na")["data"]["value"] is None


def test_bare_object_needs_neither_newline_nor_end(start: Start, connect: Connect) -> None:
    """A whole object is answered as soon as its last brace is there, and the connection goes on (README, messages)."""
    client = connect(start())
    for n in range(3):
        client.send(b'{"type":"put","key":"}{","value":{"a":"}"}}')
        assert client.answer()["version"] == n + 1


@pytest.mark.parametrize("end", [b"\n", b""], ids=["newline", "bare"])
def test_split_at_every_byte(start: Start, connect: Connect, end: bytes) -> None:
    """The network may cut a message anywhere, also inside an escape or a letter of several bytes. Each place in turn:
    the first part is sent, seen to have arrived in the node's framer, and only then the second."""
    node = start()
    client = connect(node)
    value = {"quote": '"', "brace": "}{", "slash": "\\", "letters": "äπ💾", "line": "\n", "deep": [[{"a": 1.5}]]}
    text = json.dumps({"type": "put", "key": "kö}y", "value": value}, ensure_ascii=False).encode()
    whole = text + end
    pending = connection_of(node, client).framer
    for place in range(1, len(text)):
        client.send(whole[:place])
        until(lambda place=place: len(pending.pending) == place, f"{place} bytes arrive")  # type: ignore[misc]
        client.send(whole[place:])
        assert client.answer()["version"] == place
    assert client.ask(type="get", key="kö}y")["data"]["value"] == value


@pytest.mark.parametrize("between", [b"\n", b"", b" \t ", b"\r\n\r\n"], ids=["lines", "bare", "blanks", "crlf"])
def test_several_objects_in_one_write(start: Start, connect: Connect, between: bytes) -> None:
    """Objects that come in one piece are separate messages, whatever stands between them."""
    client = connect(start())
    client.send(between.join(b'{"type":"put","key":"k%d","value":%d}' % (n, n) for n in range(20)))
    assert [client.answer()["data"] for _ in range(20)] == [True] * 20
    assert [client.ask(type="get", key=f"k{n}")["data"]["value"] for n in range(20)] == list(range(20))


def test_message_larger_than_one_read(start: Start, connect: Connect) -> None:
    """One message may be larger than one `recv` (published interface): a value of 6 MB goes in and comes out equal."""
    client = connect(start())
    value = random.Random(4).randbytes(3_000_000).hex()
    assert client.ask(type="put", key="big", value=value)["data"] is True
    assert client.ask(type="get", key="big")["data"]["value"] == value


def test_any_json_value_comes_back_as_it_was(start: Start, connect: Connect) -> None:
    """Any JSON value (store docstring), numbers as they were written, and null and false are values too."""
    client = connect(start())
    values = [None, False, 0, -0.0, 1e308, 2**53 + 1, 2**80, "", "\u0000", "💾", [], {}, {"": [None, {"a": []}]}]
    for n, value in enumerate(values):
        assert client.ask(type="put", key=f"v{n}", value=value)["data"] is True
    for n, value in enumerate(values):
        assert client.ask(type="get", key=f"v{n}")["data"]["value"] == value
    client.send(b'{"type":"put","key":"n","value":1.10}{"type":"get","key":"n"}')
    assert client.answers(2)[1]["data"]["version"] == 1


# --- pipelining and order -------------------------------------------------------------------------------------


def test_without_ids_strictly_in_order(start: Start, connect: Connect) -> None:
    """Requests without ids, all in one write: each get sees the put before it, and the answers keep the order."""
    client = connect(start())
    requests = []
    for n in range(150):
        requests += [line({"type": "put", "key": "k", "value": n}), line({"type": "get", "key": "k"})]
    client.send(b"".join(requests))
    answers = client.answers(300)
    assert [a["type"] for a in answers] == ["put", "get"] * 150
    assert [a["data"]["value"] for a in answers[1::2]] == list(range(150))


def test_with_ids_they_overlap(start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests with ids may overlap: while the disk is busy with a put, the answer to a later ping is already there.
    The transaction is held until the client has read that answer."""
    node = start()
    client = connect(node)
    write, go_on = node.store.write, threading.Event()

    def slow_write(*what: Any) -> bool:
        assert go_on.wait(PATIENCE), "the ping was not answered while the put was under way"
        return write(*what)

    client.ask(type="ping")
    monkeypatch.setattr(node.store, "write", slow_write)
    try:
        client.send(
            line({"type": "put", "key": "k", "value": 1, "id": "first"}) + line({"type": "ping", "id": "second"})
        )
        assert client.answer()["id"] == "second"
    finally:
        go_on.set()
    answer = client.answer()
    assert (answer["id"], answer["data"]) == ("first", True)


def test_mixed_ids(start: Start, connect: Connect) -> None:
    """With and without ids on one connection: each id is answered once, and those without keep their order."""
    client = connect(start())
    seed = 11
    print(f"seed {seed}")  # noqa: T201 - shown when the test fails
    chance, requests, ids, plain = random.Random(seed), [], [], []
    for n in range(300):
        if chance.random() < 0.5:
            requests.append(line({"type": chance.choice(["ping", "peers", "get"]), "key": "k", "id": n}))
            ids.append(n)
        else:
            requests.append(line({"type": "put", "key": "k", "value": n}))
            plain.append(n)
    client.send(b"".join(requests))
    answers = client.answers(300)
    assert sorted(a["id"] for a in answers if "id" in a) == ids
    commits = [a["commit_id"] for a in answers if "id" not in a]
    assert len(commits) == len(plain)
    assert commits == sorted(commits)
    assert client.ask(type="get", key="k")["data"]["value"] == plain[-1]


@pytest.mark.parametrize("id", [0, -1, 17, 2**63, "", "a-b", "💾", 'quote " brace }'])
def test_id_is_echoed(start: Start, connect: Connect, id: int | str) -> None:
    """Whatever number or text the client chose as `id`, it finds it in the answer, also in that of an error."""
    client = connect(start())
    assert client.ask(type="ping", id=id)["id"] == id
    assert client.ask(type="nonsense", id=id)["id"] == id
    assert client.ask(type="get", id=id)["id"] == id
    assert client.ask(type="get", key="", id=id)["id"] == id


def test_bad_message_keeps_its_place(start: Start, connect: Connect) -> None:
    """Without ids, answers keep the order of requests (README, messages), also when one of them can't be read or is too
    large: else a client takes the error for the answer to its put, and the put's for that of the next."""
    client = connect(start(frame_bytes=1000))
    long = b'{"type":"put","key":"k","value":"' + b"x" * 1000 + b'"}\n'
    put, get = line({"type": "put", "key": "k", "value": 1}), line({"type": "get", "key": "k"})
    client.send(put + b"{nonsense}\n" + get + b'{"type":"fetch"}\n' + put + long + get)
    kinds = [(a["type"], a.get("error", {}).get("code")) for a in client.answers(7)]
    assert kinds == [
        ("put", None),
        ("error", "bad_request"),
        ("get", None),
        ("error", "unknown_type"),
        ("put", None),
        ("error", "too_large"),
        ("get", None),
    ]


def test_local_reads_need_no_turn(start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local read is answered where it comes in, from what this node has applied. Without ids it keeps its place
    behind a put: it waits for that, and sees it. What is wrong with one is told as of any request."""
    node = start()
    client = connect(node)
    assert client.ask(type="put", key="k", value=1)["version"] == 1
    delivered: list[Any] = []
    deliver = node.deliver_on_loop

    def watched(letters: Any, limited: bool) -> None:
        delivered.extend(letter.message.name for letter in letters)
        deliver(letters, limited)

    monkeypatch.setattr(node, "deliver_on_loop", watched)
    local = {"type": "get", "key": "k", "consistency": "local"}
    for n in range(3):
        answer = client.ask(**local, id=n)
        assert (answer["id"], answer["data"]["value"], answer["commit_id"], answer["consistency"]) == (n, 1, 2, "local")
    assert delivered == []
    client.send(line({"type": "put", "key": "k", "value": 2}) + line(local) + line({**local, "key": "other"}))
    put, *gets = client.answers(3)
    assert put["version"] == 2
    assert [answer["data"]["value"] for answer in gets] == [2, None]
    assert delivered == ["put"]
    assert client.ask(**(local | {"key": ""}))["error"]["code"] == "bad_request"


def test_what_arrives_with_the_end_is_told(start: Start) -> None:
    """Requests that have come since the last turn when a node ends are answered, as those in the mailbox are."""
    node = start()
    asked = Asked()

    def arrive_and_end() -> None:
        node.deliver_on_loop([Arrival(Get(key="k"), asked)], limited=True)
        node._end(None)

    assert node._loop is not None
    node._loop.call_soon_threadsafe(arrive_and_end)
    until(lambda: bool(asked.answers), "it is answered")
    assert asked.answers[0].error.code == "shutting_down"


@pytest.mark.parametrize("with_ids", [True, False], ids=["ids", "no-ids"])
def test_pipeline_past_its_limit_loses_nothing(
    start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch, with_ids: bool
) -> None:
    """At most `pipeline_requests` (here 3) of a connection are under way; what it sends beyond waits, and each of 500
    is carried out once."""
    node = start(pipeline_requests=3)
    client = connect(node)
    under_way: list[int] = []
    deliver = node.deliver_on_loop

    def watched(letters: Any, limited: bool) -> None:
        under_way.extend(c._under_way for c in list(node._connections))
        deliver(letters, limited)

    monkeypatch.setattr(node, "deliver_on_loop", watched)
    for n in range(500):
        client.send(line({"type": "put", "key": f"k{n % 7}", "value": n} | ({"id": n} if with_ids else {})))
    answers = client.answers(500)
    assert all(a["data"] is True for a in answers)
    if with_ids:
        assert sorted(a["id"] for a in answers) == list(range(500))
    versions = sorted(client.ask(type="get", key=f"k{n}")["data"]["version"] for n in range(7))
    assert sum(versions) == 500
    assert 1 <= max(under_way) <= 3


# --- bad input ------------------------------------------------------------------------------------------------

DEEP = 50_000
KEY_ROOM = LMDB_KEY_BYTES - len("default") - 1

BAD: list[tuple[str, bytes, str, str]] = [
    ("not-json", b"hello", "bad_request", "not JSON"),
    ("half-an-object", b'{"type":"put","key":', "bad_request", "not JSON"),
    ("single-quotes", b"{'type':'ping'}", "bad_request", "not JSON"),
    ("trailing-comma", b'{"type":"ping",}', "bad_request", "not JSON"),
    ("http", b"GET / HTTP/1.1", "bad_request", "not JSON"),
    ("binary", b"\x16\x03\x01\x02\x00\x01\xff\xfe", "bad_request", "not JSON"),
    ("nul", b"\0\0\0", "bad_request", "not JSON"),
    ("array", b"[1,2]", "bad_request", "expected a JSON object, got an array"),
    ("string", b'"ping"', "bad_request", "expected a JSON object, got a string"),
    ("number", b"17", "bad_request", "expected a JSON object, got a number"),
    ("null", b"null", "bad_request", "expected a JSON object, got null"),
    ("boolean", b"true", "bad_request", "expected a JSON object, got a boolean"),
    ("no-type", b'{"key":"a"}', "bad_request", 'no "type"'),
    ("empty-object", b"{}", "bad_request", 'no "type"'),
    ("type-is-a-number", b'{"type":5}', "bad_request", '"type" must be a string, got a number'),
    ("unknown-type", b'{"type":"fetch","key":"a"}', "unknown_type", "there are: put, get"),
    ("type-in-capitals", b'{"type":"PING"}', "unknown_type", "there are: put, get"),
    ("long-type", b'{"type":"' + b"x" * 5000 + b'"}', "unknown_type", "there are: put, get"),
    ("no-key", b'{"type":"put","value":1}', "bad_request", "missing required field `key`"),
    ("no-value", b'{"type":"put","key":"a"}', "bad_request", "missing required field `value`"),
    ("get-without-key", b'{"type":"get"}', "bad_request", "missing required field `key`"),
    ("delete-without-key", b'{"type":"delete"}', "bad_request", "missing required field `key`"),
    ("key-is-a-number", b'{"type":"put","key":5,"value":1}', "bad_request", "Expected `str`, got `int` - at `$.key`"),
    ("key-is-null", b'{"type":"get","key":null}', "bad_request", "Expected `str`, got `null` - at `$.key`"),
    ("namespace-is-an-array", b'{"type":"get","key":"a","namespace":[]}', "bad_request", "at `$.namespace`"),
    ("unknown-consistency", b'{"type":"get","key":"a","consistency":"maybe"}', "bad_request", "at `$.consistency`"),
    ("forwarded-is-text", b'{"type":"get","key":"a","forwarded":"yes"}', "bad_request", "at `$.forwarded`"),
    ("no-address", b'{"type":"add_peer"}', "bad_request", "missing required field `address`"),
    ("bad-address", b'{"type":"add_peer","address":"here"}', "bad_request", "host:port"),
    ("no-such-member", b'{"type":"remove_peer","address":"h:1"}', "no_such_member", "there are: 127.0.0.1:"),
    ("replaces-a-stranger", b'{"type":"replace_peer","old":"h:1","new":"h:2"}', "no_such_member", "is no member"),
    ("other-cluster", b'{"type":"add_peer","address":"h:1","cluster":"x"}', "wrong_cluster", "empty directory"),
    ("no-successor", b'{"type":"transfer_leader"}', "no_successor", "nobody could take over"),
    ("empty-key", b'{"type":"put","key":"","value":1}', "bad_request", "at least 1 byte"),
    ("empty-key-get", b'{"type":"get","key":""}', "bad_request", "at least 1 byte"),
    ("empty-key-delete", b'{"type":"delete","key":""}', "bad_request", "at least 1 byte"),
    ("empty-namespace", b'{"type":"put","key":"a","value":1,"namespace":""}', "bad_request", "1 to 64 characters"),
    ("long-namespace", b'{"type":"get","key":"a","namespace":"%s"}' % (b"n" * 65), "bad_request", "1 to 64 characters"),
    ("nul-namespace", b'{"type":"get","key":"a","namespace":"a\\u0000b"}', "bad_request", "NUL"),
    ("long-key", b'{"type":"put","key":"%s","value":1}' % (b"k" * (KEY_ROOM + 1)), "key_too_long", f"{KEY_ROOM} fit"),
    ("long-key-get", b'{"type":"get","key":"%s"}' % (b"k" * (KEY_ROOM + 1)), "key_too_long", f"{KEY_ROOM} fit"),
    ("long-key-in-utf8", b'{"type":"delete","key":"%s"}' % ("ä" * 252).encode(), "key_too_long", "504 bytes"),
    ("utf8-in-key", b'{"type":"put","key":"\xff\xfe","value":1}', "bad_request", "UTF-8"),
    ("utf8-in-value", b'{"type":"put","key":"a","value":"\xc3("}', "bad_request", "UTF-8"),
    ("utf8-deep-in-value", b'{"type":"put","key":"a","value":[{"b":["\xed\xa0\x80"]}]}', "bad_request", "UTF-8"),
    ("utf8-in-unknown-field", b'{"type":"fetch","x":"\xff"}', "bad_request", "UTF-8"),
    ("half-a-surrogate-pair", b'{"type":"put","key":"a","value":"\\ud800"}', "bad_request", "surrogate"),
    ("half-a-surrogate-key", b'{"type":"put","key":"\\udc00","value":1}', "bad_request", "surrogate"),
    ("deep-value", b'{"type":"put","key":"a","value":' + b"[" * DEEP + b"]" * DEEP + b"}", "bad_request", "nested"),
    ("deep-objects", b'{"type":"put","key":"a","value":' + b'{"a":' * 200 + b"1" + b"}" * 201, "bad_request", "nested"),
    ("one-too-deep", b'{"type":"put","key":"a","value":' + b"[" * 129 + b"]" * 129 + b"}", "bad_request", "nested"),
    ("deep-type", b'{"type":' + b"[" * DEEP + b"]" * DEEP + b"}", "bad_request", "nested"),
    ("deep-nothing", b"[" * DEEP, "bad_request", "nested"),
    ("too-big", b'{"type":"put","key":"a","value":1e400}', "bad_request", "range of a double"),
    ("too-big-below-zero", b'{"type":"put","key":"a","value":{"b":[-1e999]}}', "bad_request", "range of a double"),
    ("too-many-digits", b'{"type":"put","key":"a","value":%s}' % (b"9" * 400), "bad_request", "range of a double"),
    ("digits-inside", b'{"type":"put","key":"a","value":[%s]}' % (b"9" * 310), "bad_request", "range of a double"),
    ("nan", b'{"type":"put","key":"a","value":NaN}', "bad_request", "not JSON"),
    ("infinity", b'{"type":"put","key":"a","value":-Infinity}', "bad_request", "not JSON"),
    ("heartbeat", b'{"type":"heartbeat","term":9,"leader":"h:1","commit_id":0}', "wrong_cluster", "hello first"),
    (
        "vote-request",
        b'{"type":"vote_request","term":9,"commit_id":0,"staged":{"address":"h:1","term":9,"commit_id":9}}',
        "wrong_cluster",
        "hello first",
    ),
    (
        "data",
        b'{"type":"data","action":"log","term":9,"leader":"h:1","previous":{"term":0,"commit_id":0}}',
        "wrong_cluster",
        "hello first",
    ),
    ("negative-term", b'{"type":"heartbeat","term":-1,"leader":"h:1","commit_id":0}', "bad_request", "at `$.term`"),
    ("huge-term", b'{"type":"heartbeat","term":%d,"leader":"h:1","commit_id":0}' % 2**63, "bad_request", "at `$.term`"),
]


def test_bad_input_in_all_its_forms(start: Start, connect: Connect) -> None:
    """Each kind of bad input gets its designed code, in words that say what is wrong, with the id and the type of the
    request as far as they can be made out; the same connection goes on, another client is served meanwhile, and what
    was stored before is there afterwards (issue, "Bad input"). The state of the node does not change by any of them.
    """
    node = start()
    good = connect(node)
    assert good.ask(type="put", key="a", value="precious")["data"] is True
    problems = []
    for name, message, code, words in BAD:
        client = connect(node)
        before = good.ask(type="status")["data"]
        client.send(message + b"\n")
        answer = client.answer()
        try:
            assert_refused(answer, code, words)
            assert len(json.dumps(answer)) < 1500, f"a long answer to {name}"
            assert_serves(client)
            assert good.ask(type="get", key="a")["data"]["value"] == "precious"
            after = good.ask(type="status")["data"]
            assert after["term"] == before["term"], "a client's message changes no term (TRAPS 13)"
            assert after["commit_id"] == before["commit_id"] + 1, "only the witness was written"
        except AssertionError as error:
            problems.append(f"{name}: {error}")
        client.close()
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (b'{"type":"put","key":5,"value":1,"id":"x1"}', "put"),
        (b'{"type":"get","key":"","id":"x1"}', "get"),
        (b'{"id":"x1","type":"put","key":"a","value":1e400}', "put"),
        (b'{"id":"x1","type":"fetch"}', "error"),
        (b'{"id":"x1"}', "error"),
        (b'{"type":"heartbeat","id":"x1"}', "heartbeat"),
        (b'{"type":"status","id":"x1","id":"x1","x":{"id":"x2"}}', "status"),
    ],
)
def test_refusal_finds_its_request(start: Start, connect: Connect, message: bytes, kind: str) -> None:
    """A refusal carries the id of its request, so that it finds its way among overlapping ones, and its type."""
    client = connect(start())
    client.send(message + b"\n")
    answer = client.answer()
    assert (answer["id"], answer["type"]) == ("x1", kind)


@pytest.mark.parametrize("id", ["1.5", "true", "null", "[1]", "{}"])
def test_id_of_a_wrong_type(start: Start, connect: Connect, id: str) -> None:
    """An id is a number or a text; another one is refused, as the client would not recognise it in the answer."""
    client = connect(start())
    client.send(b'{"type":"ping","id":' + id.encode() + b"}\n")
    answer = client.answer()
    assert_refused(answer, "bad_request", "$.id")
    assert "id" not in answer
    assert_serves(client)


def test_limits_are_exact(start: Start, connect: Connect) -> None:
    """The longest key, the longest namespace, the deepest value and the largest message that are allowed are taken, and
    one more is not."""
    client = connect(start(frame_bytes=20_000, json_depth=20))

    def put(key: str, value: Any, namespace: str = "default") -> Any:
        return client.ask(type="put", key=key, value=value, namespace=namespace).get("error", {}).get("code")

    def nested(levels: int) -> Any:
        return [nested(levels - 1)] if levels > 1 else []

    assert put("k" * KEY_ROOM, 1) is None
    assert put("k" * (KEY_ROOM + 1), 1) == "key_too_long"
    assert put("k", 1, "ö" * 64) is None
    assert put("k", 1, "ö" * 65) == "bad_request"
    assert put("k", nested(20)) is None
    assert put("k", nested(21)) == "bad_request"
    frame = len(line({"type": "put", "key": "k", "value": "", "namespace": "default"})) - 1
    assert put("k", "x" * (20_000 - frame)) is None
    assert put("k", "x" * (20_001 - frame)) == "too_large"


@pytest.mark.parametrize("pieces", [1, 7], ids=["one-write", "pieces"])
def test_message_past_the_limit(start: Start, connect: Connect, pieces: int) -> None:
    """A message past `frame_bytes` is refused once, the rest of its line is passed over, and the next line works; the
    node never keeps more of it than the limit."""
    node = start(frame_bytes=50_000)
    client = connect(node)
    message = line({"type": "put", "key": "a", "value": "x" * 1_000_000}) + line({"type": "ping"})
    step = len(message) // pieces + 1
    for at in range(0, len(message), step):
        client.send(message[at : at + step])
        assert len(connection_of(node, client).framer.pending) <= 50_000
    first, second = client.answers(2)
    assert_refused(first, "too_large", "50000")
    assert second["type"] == "ping"
    assert client.ask(type="get", key="a")["data"]["value"] is None
    assert_serves(client)


def test_error_does_not_wait_for_a_timer(start: Start, connect: Connect) -> None:
    """A bad message is answered at once. The node's timers stand at seconds here, so an answer that only went out with
    the next beat would be late."""
    client = connect(start(heartbeat_ms=4000, election_low_ms=5000, election_high_ms=6000))
    client.ask(type="ping")
    for bad in (b"nonsense\n", b'{"type":"fetch"}\n'):
        began = time.monotonic()
        client.send(bad)
        client.answer()
        assert time.monotonic() - began < 3, "the answer waited for the next heartbeat"


def test_random_bytes(start: Start, connect: Connect) -> None:
    """Messages with bytes changed, dropped and doubled at random, in random pieces: after each stretch the connection
    still takes a good message, and the node serves others."""
    seed = 5
    print(f"seed {seed}")  # noqa: T201 - shown when the test fails
    chance = random.Random(seed)
    node = start(frame_bytes=4000)
    good = connect(node)
    samples = [message for _, message, _, _ in BAD if len(message) < 1000]
    samples += [line({"type": kind, "key": "a", "value": {"b": [1, "}"]}}) for kind in ("put", "get", "delete")]
    for _ in range(40):
        client = connect(node)
        for _ in range(25):
            text = bytearray(chance.choice(samples))
            for _ in range(chance.randrange(4)):
                at = chance.randrange(len(text) + 1)
                text[at : at + chance.choice([0, 1, 1, 5])] = chance.randbytes(chance.choice([0, 1, 1, 3]))
            client.send(bytes(text) + chance.choice([b"\n", b"\n", b"", b"}"]))
        client.send(b"\n" + line({"type": "ping", "id": "end"}))
        while client.answer().get("id") != "end":
            pass
        client.close()
    assert_serves(good)


# --- strangers ------------------------------------------------------------------------------------------------


def hello(node: RaftNode, address: str, /, **changes: Any) -> dict[str, Any]:
    """The first message of a member, right but for `changes`."""
    return {
        "type": "hello",
        "cluster": node.store.cluster_id,
        "node": "f" * 16,
        "address": address,
        "protocol": PROTOCOL_VERSION,
        "link": True,
        "id": 1,
    } | changes


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"cluster": "0" * 16}, "wrong_cluster", "start all nodes of a cluster with the same set of addresses"),
        ({"node": "e" * 16}, "wrong_node", "Give it its own directory back"),
        ({"node": ""}, "wrong_node", "does not say which node it is"),
        ({"protocol": PROTOCOL_VERSION + 1}, "wrong_protocol", "upgrade"),
        ({"address": "127.0.0.1:9"}, "not_member", "not another member"),
    ],
)
def test_stranger_is_refused(start: Start, connect: Connect, changes: dict[str, Any], code: str, words: str) -> None:
    """A hello of another cluster, of an exchanged disk, of another protocol or of a node that is no member is refused
    with its reason and the connection ends (rule 9; TRAPS 34, 35). The right one is welcome before and after."""
    member = free_address()
    node = start([member])
    right = connect(node)
    assert right.ask(**hello(node, member))["data"] is True
    wrong = connect(node)
    answer = wrong.ask(**(hello(node, member) | changes))
    assert_refused(answer, code, words)
    assert (answer["type"], answer["id"]) == ("hello", 1)
    assert wrong.socket.recv(100) == b"", "a stranger's connection ends"
    right.close()
    assert connect(node).ask(**hello(node, member))["data"] is True


def test_own_address_is_no_peer(start: Start, connect: Connect) -> None:
    """A node that says it is this node itself is no peer (a wrong address, or a copied directory)."""
    node = start([free_address()])
    client = connect(node)
    assert_refused(client.ask(**hello(node, node.my_ip)), "not_member", "not another member")


def test_member_speaks_only_for_itself(start: Start, connect: Connect) -> None:
    """After its hello a member may ask for its own votes and send its own beats, but none in another's name."""
    member, other = free_address(), free_address()
    node = start([member, other])
    client = connect(node)
    client.ask(**hello(node, member))
    assert_refused(client.ask(type="heartbeat", term=9, leader=other, commit_id=0), "bad_request", "can't speak for")
    staged = {"address": other, "term": 9, "commit_id": 9}
    assert_refused(
        client.ask(type="vote_request", term=9, commit_id=0, staged=staged), "bad_request", "can't speak for"
    )
    assert node.status()["term"] == 0
    assert client.ask(type="heartbeat", term=9, leader=member, commit_id=0)["term"] == 9


@pytest.mark.parametrize("kind", ["heartbeat", "vote_request", "data"])
def test_a_term_beyond_all_elections_is_refused(start: Start, connect: Connect, kind: str) -> None:
    """One message with the last term that there is would leave a cluster without a next term, and so without a leader
    for ever. It is refused, and the node goes on in its own term."""
    member = free_address()
    node = start([member, free_address()])
    client = connect(node)
    client.ask(**hello(node, member))
    assert client.ask(type="heartbeat", term=9, leader=member, commit_id=0)["term"] == 9
    term = 2**63 - 1
    message = {
        "heartbeat": {"leader": member, "commit_id": 0},
        "vote_request": {"commit_id": 0, "staged": {"address": member, "term": 9, "commit_id": 9}},
        "data": {"action": "commit", "leader": member, "previous": {"term": 0, "commit_id": 0}},
    }[kind]
    assert_refused(client.ask(type=kind, term=term, **message), "bad_request", "no elections can have led")
    assert node.status()["term"] == 9
    assert client.ask(type="heartbeat", term=9, leader=member, commit_id=0)["data"] is True


def test_two_leaders_of_one_term_do_not_end_the_node(start: Start, connect: Connect) -> None:
    """A bad message never ends the process (README, messages), not even one of a member that claims a term in which
    this node follows another leader: it is refused, and the node goes on following."""
    first, second = free_address(), free_address()
    node = start([first, second])
    leader, liar = connect(node), connect(node)
    leader.ask(**hello(node, first, node="1" * 16))
    liar.ask(**hello(node, second, node="2" * 16))
    assert leader.ask(type="heartbeat", term=5, leader=first, commit_id=0)["data"] is True
    liar.send(line({"type": "heartbeat", "term": 5, "leader": second, "commit_id": 0}))
    assert leader.ask(type="heartbeat", term=5, leader=first, commit_id=0)["data"] is True
    assert leader.ask(type="peers")["leader"] == first


def test_a_stranger_that_goes_on_talking_is_let_go(start: Start, connect: Connect) -> None:
    """A refused member gets its reason and the end of the connection (rule 9), also when it has begun another message
    and never ends it: what it says after the refusal is not waited for."""
    node = start([free_address()])
    client = connect(node)
    client.send(line(hello(node, free_address(), cluster="another")) + b'{"type":"put","key":"a","val')
    assert_refused(client.answer(), "wrong_cluster")
    until(client.is_ended, "the connection is ended")
    assert connect(node).ask(type="ping")["data"] is True


def test_strangers_leave_nothing_behind(start: Start, connect: Connect) -> None:
    """Nothing grows without bound (package docstring): 300 hellos under as many made-up names are refused, those with
    names longer than any address already as messages, in few words, and the node does not remember every one of
    them."""
    node = start([free_address()])
    for n in range(300):
        for length, code in ((200, "wrong_cluster"), (5000, "bad_request")):
            client = connect(node)
            answer = client.ask(**hello(node, f"h{n}:" + "9" * length, cluster="c" * length))
            assert_refused(answer, code)
            assert len(json.dumps(answer)) < 3000, "what the stranger said is not all repeated"
            client.close()
    assert len(node.election.handshake._refusals) <= 64


# --- clients that do not read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("with_ids", [True, False], ids=["ids", "no-ids"])
@pytest.mark.parametrize("at_once", [True, False], ids=["one-write", "one-by-one"])
def test_client_that_does_not_read(
    start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch, with_ids: bool, at_once: bool
) -> None:
    """A client asks 150 times for a value of 200 KB and takes no answer. The node holds no more for it than the buffer
    and one answer (README, messages; TRAPS 38), serves others meanwhile, and when the client begins to read, it gets
    each answer, in order when it gave no ids."""
    most = watch_buffers(monkeypatch)
    node = start(send_buffer_bytes=100_000)
    size, count = 200_000, 150
    other = connect(node)
    for n in range(count):
        assert other.ask(type="put", key=f"k{n}", value=f"{n:06}" + "x" * size)["data"] is True
    client = connect(node)
    name = client.name
    requests = [line({"type": "get", "key": f"k{n}"} | ({"id": n} if with_ids else {})) for n in range(count)]
    connection = connection_of(node, client)
    if at_once:
        client.send(b"".join(requests))
    else:
        for request in requests:
            client.send(request)
    until_quiet(connection)
    assert_serves(other)
    answers = client.answers(count)
    numbers = [int(a["data"]["value"][:6]) for a in answers]
    assert sorted(numbers) == list(range(count))
    assert with_ids or numbers == list(range(count))
    assert most[name] <= 100_000 + 2 * size, f"{most[name]} bytes were held for one client"


def test_client_that_does_not_read_at_a_follower(
    start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same at a node that passes the gets on to the leader: what comes back for a client that does not read is
    bounded there too, and in the end each answer arrives."""
    most = watch_buffers(monkeypatch)
    addresses = [free_address(), free_address()]
    times = {"heartbeat_ms": 50, "election_low_ms": 300, "election_high_ms": 600, "send_buffer_bytes": 100_000}
    nodes = [start([b for b in addresses if b != a], a, **times) for a in addresses]
    until(lambda: all(n.status()["leader"] for n in nodes), "a leader that both know")
    follower = next(n for n in nodes if n.status()["role"] == "follower")
    size, count = 200_000, 100
    follower.put("big", "x" * size)
    client = connect(follower)
    connection = connection_of(follower, client)
    client.send(b"".join(line({"type": "get", "key": "big", "id": n}) for n in range(count)))
    until_quiet(connection)
    follower.put("other", 1)
    answers = client.answers(count)
    assert sorted(a["id"] for a in answers) == list(range(count))
    assert all(len(a["data"]["value"]) == size for a in answers)
    assert most[client.name] <= 100_000 + 2 * size, f"{most[client.name]} bytes were held for one client"


def test_client_that_sends_garbage_and_does_not_read(
    start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers to bad messages are answers: a client that sends millions of them and reads none is held back like any
    other. It sends until the kernel takes no more for half a second."""
    most = watch_buffers(monkeypatch)
    node = start(send_buffer_bytes=50_000)
    other, client = connect(node), connect(node)
    client.socket.settimeout(0.5)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < 4_000_000:
            sent += client.socket.send(b"x\n" * 20_000)
    assert_serves(other)
    assert most[client.name] <= 50_000 + 200_000, f"{most[client.name]} bytes were held after {sent} bytes of garbage"


def test_client_that_never_reads_is_cut_off(start: Start, connect: Connect) -> None:
    """After `stall_timeout_ms` without a byte taken, the connection of a client that does not read ends, and with it
    all that was held for it; nobody else is cut."""
    node = start(send_buffer_bytes=10_000, stall_timeout_ms=400)
    other, client = connect(node), connect(node)
    other.ask(type="put", key="big", value="x" * 500_000)
    connection = connection_of(node, client)
    client.send(line({"type": "get", "key": "big"}) * 60)
    until(lambda: not connection.writable, "the node finds that the client takes nothing")
    began = time.monotonic()
    until(lambda: not connection.is_open, "the client is cut off")
    assert time.monotonic() - began > 0.3, "it had its time"
    until(lambda: connection not in node._connections, "the node forgets it")
    assert_serves(other)


# --- clients that do not speak --------------------------------------------------------------------------------


def test_idle_client_is_closed(start: Start, connect: Connect) -> None:
    """A client with nothing under way and nothing to say is closed after `idle_timeout_ms`, whether it ever spoke or
    not; one that asks now and then is not."""
    node = start(idle_timeout_ms=500)
    silent, spoke, alive = connect(node), connect(node), connect(node)
    spoke.ask(type="ping")
    began = time.monotonic()
    while not (silent.is_ended() and spoke.is_ended()):
        alive.ask(type="ping")
        assert time.monotonic() - began < PATIENCE
    assert time.monotonic() - began > 0.4, "they had their time"
    assert_serves(alive)


def test_waiting_for_an_answer_is_not_idle(start: Start, connect: Connect) -> None:
    """A client whose request is under way is not idle, however long that takes: here no leader is found, and the answer
    says so after the request's time, three idle timeouts later."""
    node = start([free_address()], request_timeout_ms=600, idle_timeout_ms=200)
    assert_refused(connect(node).ask(type="get", key="a"), "no_leader")


@pytest.mark.parametrize("drip", [False, True], ids=["silent", "drip"])
def test_message_that_is_never_finished(start: Start, connect: Connect, drip: bool) -> None:
    """A message that was begun must be whole within `stall_timeout_ms`; a byte now and then does not extend that."""
    node = start(stall_timeout_ms=400)
    other, client = connect(node), connect(node)
    began = time.monotonic()
    client.send(b'{"type":"put","key":"a","value":"')
    while not client.is_ended():
        if drip:
            with contextlib.suppress(OSError):
                client.send(b"x")
        assert time.monotonic() - began < PATIENCE, "a slow message holds its connection for ever"
        time.sleep(0.02)
    assert time.monotonic() - began > 0.3, "it had its time"
    assert other.ask(type="get", key="a")["data"]["value"] is None
    assert_serves(other)


def test_silence_before_a_message_does_not_count(start: Start, connect: Connect) -> None:
    """The time for a message runs from its first byte: a client that was silent for longer than `stall_timeout_ms`, as
    it may be, and then sends a message in two pieces is not cut between them. The node looks twice in between."""
    node = start(stall_timeout_ms=400)
    client = connect(node)
    client.ask(type="ping")
    connection = connection_of(node, client)
    until(lambda: node.now() - connection.last_frame_at > 0.5, "a silence longer than the stall timeout")
    client.send(b'{"type":"put","key":"a",')
    time.sleep(2.5 * SWEEP)  # that nothing happens can't be awaited
    client.send(b'"value":1}\n')
    assert client.answer()["data"] is True


def test_time_that_the_node_takes_does_not_count(start: Start, connect: Connect) -> None:
    """While the node does not read from a client because of its own backlog, the client can't finish its message, and
    is not cut for it. Two reads without ids wait for a leader that never comes, one after the other, and each for
    longer than `stall_timeout_ms`; a third has come in half, and its rest soon after."""
    node = start([free_address()], request_timeout_ms=700, stall_timeout_ms=400)
    client = connect(node)
    get = line({"type": "get", "key": "a"})
    client.send(2 * get + get[:10])
    connection = connection_of(node, client)
    until(lambda: connection._backlog and connection.framer.pending, "two and a half requests have come")
    client.send(get[10:])
    for answer in client.answers(3):
        assert_refused(answer, "no_leader")


# --- limits ---------------------------------------------------------------------------------------------------


def test_too_many_connections(start: Start, connect: Connect) -> None:
    """Past `connections` a client is told `overloaded` and closed; the others go on, and when one leaves, there is room
    again."""
    node = start(connections=3)
    clients = [connect(node) for _ in range(3)]
    for client in clients:
        client.ask(type="ping")
    further = connect(node)
    assert_refused(further.answer(), "overloaded", "another node")
    assert further.is_ended() or further.socket.recv(100) == b""
    for client in clients:
        assert_serves(client)
    clients[0].close()
    until(lambda: node.connection_count == 2, "the place is free")
    assert_serves(connect(node))


def test_clients_do_not_shut_members_out(start: Start, connect: Connect) -> None:
    """`connections` counts those from clients (config): with all of them taken, another member can still say hello,
    else clients could keep a cluster from electing a leader."""
    member = free_address()
    node = start([member], connections=2)
    for _ in range(2):
        connect(node).ask(type="ping")
    assert connect(node).ask(**hello(node, member))["data"] is True


def test_too_many_waiting_requests(start: Start, connect: Connect) -> None:
    """With `waiting_requests` requests waiting for a leader, a further one is told `overloaded` at once; those that
    wait are answered when their time is up, and what was never executed says so."""
    node = start([free_address()], waiting_requests=5, request_timeout_ms=1000)
    client = connect(node)
    client.send(b"".join(line({"type": "put", "key": "a", "value": n, "id": n}) for n in range(8)))
    early = client.answers(3)
    assert [a["id"] for a in early] == [5, 6, 7]
    for answer in early:
        assert_refused(answer, "overloaded", "try again later")
    assert client.ask(type="get", key="a", consistency="local", id=9)["data"]["version"] == 0
    late = client.answers(5)
    assert [a["id"] for a in late] == [0, 1, 2, 3, 4]
    for answer in late:
        assert_refused(answer, "no_leader", "not executed")


@pytest.mark.parametrize("with_ids", [True, False], ids=["ids", "no-ids"])
def test_full_mailbox(start: Start, connect: Connect, with_ids: bool) -> None:
    """When the mailbox is full (here: one batch), what comes is refused with `overloaded` at once, each request with
    its own answer, however many came in one piece. The node is held while two clients send, so that both are read
    before the next turn."""
    node = start(mailbox_batches=1)
    clients = [connect(node), connect(node)]
    for client in clients:
        client.ask(type="ping")
    count = 3000
    with held(node):
        for client in clients:
            client.send(b"".join(line({"type": "ping"} | ({"id": n} if with_ids else {})) for n in range(count)))
    codes = []
    for client in clients:
        answers = client.answers(count)
        codes += [a.get("error", {}).get("code") for a in answers]
        if with_ids:
            assert sorted(a["id"] for a in answers) == list(range(count))
    assert set(codes) <= {None, "overloaded"}
    assert "overloaded" in codes
    for client in clients:
        assert_serves(client)


def test_who_asks_for_little_is_served_beside_who_asks_for_all(start: Start, connect: Connect) -> None:
    """The memory for requests under way is shared: a client that fills all that it gets is refused more, and leaves the
    next one its share (config, `in_flight_bytes`). Brought about on a node without a majority, where writes wait."""
    node = start([free_address()], in_flight_bytes=40_000, request_timeout_ms=500)
    greedy, modest = connect(node), connect(node)
    modest.ask(type="ping")
    greedy.send(b"".join(line({"type": "put", "key": "k", "value": "x" * 1000, "id": n}) for n in range(100)))
    refused = greedy.answers(100 - 20)
    assert {answer["error"]["code"] for answer in refused} == {"overloaded"}
    assert modest.ask(type="get", key="k", consistency="local")["data"]["version"] == 0
    modest.send(line({"type": "put", "key": "k", "value": "x" * 1000, "id": 1}))
    assert_refused(modest.answers(1)[0], "no_leader", "not executed")


@pytest.mark.parametrize("limit", ["mailbox_batches", "in_flight_bytes"])
def test_what_members_say_finds_room_at_a_full_node(start: Start, connect: Connect, limit: str) -> None:
    """Clients that fill the mailbox (here: one batch), or all the memory for requests (one byte), must not end the rule
    of a leader: the heartbeats and entries of members are taken all the same (mailbox docstring). Eight clients send
    before the leader does, while the node is held, so that its mailbox is full when the leader is read. Found by the
    simulator, as a cluster at rest that never committed again."""
    leader = free_address()
    node = start([leader], **{limit: 1})
    member, clients = connect(node), [connect(node) for _ in range(8)]
    member.ask(**hello(node, leader))
    beat = {"type": "heartbeat", "term": 5, "leader": leader, "commit_id": 0}
    data = {"type": "data", "action": "commit", "term": 5, "leader": leader, "previous": {"term": 0, "commit_id": 0}}
    for n in range(2, 22, 2):
        with held(node):
            for client in clients:
                client.send(line({"type": "ping", "id": n}))
            member.send(line({**beat, "id": n}) + line({**data, "id": n + 1}))
        answers = member.answers(2)
        assert [a.get("error") for a in answers] == [None, None]
        assert {a["id"] for a in answers} == {n, n + 1}
    assert any(a.get("error", {}).get("code") == "overloaded" for client in clients for a in client.answers(10))


def test_storage_full_and_room_again(start: Start, connect: Connect) -> None:
    """Below the reserve of room, puts get `storage_full` with what to do; gets and deletes go on, and after deletes
    puts go on by themselves (store docstring). A map of 8 MB is filled with values of 100 KB."""
    node = start(map_bytes=8 << 20, reserve_bytes=2 << 20, room_check_ms=1, flush_delay_ms=1)
    client = connect(node)
    stored: list[str] = []
    for n in range(100):
        answer = client.ask(type="put", key=f"k{n}", value="x" * 100_000)
        if answer["data"] is not True:
            break
        stored.append(f"k{n}")
    assert_refused(answer, "storage_full", "delete keys")
    assert 5 < len(stored) < 60
    until(lambda: node.status()["storage"]["full"], "status says so too")
    assert all(len(client.ask(type="get", key=key)["data"]["value"]) == 100_000 for key in stored)
    assert_refused(client.ask(type="put", key="more", value=1), "storage_full")
    for key in stored[:-1]:
        assert client.ask(type="delete", key=key)["data"] is True
    until(lambda: client.ask(type="put", key="more", value=1)["data"] is True, "puts go on by themselves")
    assert client.ask(type="get", key=stored[-1])["data"]["version"] == 1


@pytest.mark.parametrize(
    "flood",
    [b"{}" * 300_000 + b"\n", b"x\n" * 300_000, b'{"type":"ping"}' * 10_000 + b"\n"],
    ids=["objects", "lines", "pings"],
)
def test_a_flood_of_small_messages_takes_turns_with_others(start: Start, connect: Connect, flood: bytes) -> None:
    """One client sends hundreds of thousands of messages at once, good or bad, in one line or in many. Each gets its
    answer, and another client is served many times meanwhile: only a slice is decoded before the loop goes round
    (package docstring)."""
    node = start()
    flooder, other = connect(node), connect(node)
    taken: list[int] = []
    done = threading.Event()

    def take() -> None:
        while piece := flooder.socket.recv(1 << 16):
            taken.append(piece.count(b"\n"))
        done.set()

    reader = threading.Thread(target=take)
    sender = threading.Thread(target=lambda: (flooder.socket.sendall(flood), flooder.socket.shutdown(socket.SHUT_WR)))
    reader.start()
    sender.start()
    served = 0
    while not done.is_set():
        assert other.ask(type="put", key="a", value=served)["data"] is True
        served += 1
    sender.join()
    reader.join()
    expected = flood.count(b"\n") if flood.count(b"\n") > 1 else flood.count(b"}")
    assert sum(taken) == expected
    assert served >= 10
