"""The client against scripted nodes on real sockets: when it goes to the next node, when it must not send again, and
that one request's answer is never taken for another's (rule 12; TRAPS 24, 36)."""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from raftnode import Client
from raftnode.blocking import ConnectFailed, LineConnection
from raftnode.client import _TRY_AGAIN
from raftnode.errors import (
    BadRequest,
    ConfigError,
    NodeDamaged,
    NotCommitted,
    ProtocolError,
    RaftnodeError,
    RequestError,
    Unavailable,
)
from raftnode.messages import CODES

PATIENCE_S: Final = 10.0
"""A test that waits this long has failed; none waits it out."""
CUT: Final = "cut the connection"
HANG: Final = "say nothing"

Step = Any
"""What a node does with a request: CUT, HANG, a dict (its answer), bytes (sent as they are), a function of the request
that gives one of these, or a tuple of several."""

# --- scripted nodes -------------------------------------------------------------------------------------------


class FakeNode:
    """Listens, does with each request what the script says next, and keeps what it was asked. The last step of the
    script stays for all requests after it."""

    def __init__(self, *script: Step) -> None:
        self.script = list(script)
        self.requests: list[dict[str, Any]] = []
        self.connections = 0
        self.gone = threading.Semaphore(0)
        """Released each time a client closes its connection."""
        self.asked = threading.Semaphore(0)
        """Released with each request."""
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.connections += 1
                self._sockets.append(connection)
                self._threads.append(threading.Thread(target=self._serve, args=(connection,), daemon=True))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            try:
                for line in lines:
                    if not self._take(connection, json.loads(line)):
                        return
            except OSError:
                pass
            self.gone.release()

    def _take(self, connection: socket.socket, request: dict[str, Any]) -> bool:
        with self._lock:
            self.requests.append(request)
            step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        self.asked.release()
        return all(self._do(connection, request, part) for part in (step if isinstance(step, tuple) else (step,)))

    def _do(self, connection: socket.socket, request: dict[str, Any], step: Step) -> bool:
        if callable(step):
            step = step(request)
        if step == CUT:
            connection.shutdown(socket.SHUT_RDWR)
            return False
        if step != HANG:
            connection.sendall(step if isinstance(step, bytes) else json.dumps(step).encode() + b"\n")
        return True

    def say(self, text: bytes) -> None:
        """Something that nobody asked for, on the newest connection."""
        self._sockets[-1].sendall(text)

    def cut(self) -> None:
        """Cut the newest connection."""
        self._sockets[-1].shutdown(socket.SHUT_RDWR)

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        return [request for request in self.requests if request["type"] == kind]

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in self._sockets:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


Nodes = Callable[..., FakeNode]
Clients = Callable[..., Client]


@pytest.fixture
def node() -> Iterator[Nodes]:
    """Starts scripted nodes, and stops them at the end."""
    started: list[FakeNode] = []

    def start(*script: Step) -> FakeNode:
        started.append(FakeNode(*script))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def client(node: Nodes) -> Iterator[Clients]:  # noqa: ARG001 - clients are closed before the nodes
    """Makes clients of nodes or addresses."""
    made: list[Client] = []

    def make(*nodes: FakeNode | str, timeout: float = PATIENCE_S, name: str = "") -> Client:
        addresses = [one if isinstance(one, str) else one.address for one in nodes]
        made.append(Client(addresses, timeout=timeout, name=name))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address that refuses connections, and stays taken meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


def put_answer(request: dict[str, Any]) -> dict[str, Any]:
    return {"type": request["type"], "data": True, "commit_id": 7, "version": 1, "replaced": None}


def get_answer(request: dict[str, Any]) -> dict[str, Any]:
    found = {"key": request["key"], "namespace": request["namespace"], "value": f"value of {request['key']}"}
    return {"type": "get", "data": {**found, "created": 1, "modified": 2, "version": 3}, "commit_id": 9}


def fine(request: dict[str, Any]) -> dict[str, Any]:
    """What a healthy node answers."""
    kind = request["type"]
    if kind in ("put", "delete"):
        return put_answer(request)
    if kind == "get":
        return get_answer(request)
    if kind == "peers":
        return {"type": "peers", "data": True, "peers": ["a:1"], "leader": "a:1", "live": []}
    if kind == "status":
        return {"type": "status", "data": {"role": "leader"}}
    return {"type": kind, "data": True, "node": "x"}


def failed(code: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A node that refuses."""

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        data = None if request["type"] in ("get", "status") else False
        return {"type": request["type"], "data": data, "error": {"code": code, "message": f"because of {code}"}}

    return answer


CALLS: dict[str, Callable[[Client], Any]] = {
    "put": lambda client: client.put("a", 1),
    "delete": lambda client: client.delete("a"),
    "get": lambda client: client.get("a"),
    "peers": lambda client: client.peers(),
    "status": lambda client: client.status(),
    "ping": lambda client: client.ping(),
}
WRITES = ("put", "delete")
READS = ("get", "peers", "status", "ping")


def readable(client: Client) -> None:
    """Wait until something has come in on the client's kept connection: an end, or bytes."""
    assert client._connection is not None
    assert select.select([client._connection._socket], [], [], PATIENCE_S)[0]


# --- what is sent and what comes back -------------------------------------------------------------------------


def test_each_call_sends_one_message_and_returns_its_answer(node: Nodes, client: Clients) -> None:
    """The messages of README, messages, over one connection that is kept; answers as documented."""
    served = node(fine)
    one = client(served)
    assert one.put("a", {"b": [1.5, None, "é"]}, "space") == {"commit_id": 7, "version": 1, "replaced": None}
    assert one.delete("a") == {"commit_id": 7, "version": 1, "replaced": None}
    assert one.get("a") == "value of a"
    assert one.get_record("a", consistency="local")["modified"] == 2
    assert one.peers() == {"peers": ["a:1"], "leader": "a:1", "live": []}
    assert one.status() == {"role": "leader"}
    assert 0 <= one.ping() < PATIENCE_S
    assert served.requests == [
        {"type": "put", "key": "a", "value": {"b": [1.5, None, "é"]}, "namespace": "space"},
        {"type": "delete", "key": "a", "namespace": "default"},
        {"type": "get", "key": "a", "namespace": "default", "consistency": "linearizable"},
        {"type": "get", "key": "a", "namespace": "default", "consistency": "local"},
        {"type": "peers"},
        {"type": "status"},
        {"type": "ping"},
    ]
    assert served.connections == 1


def test_a_null_is_a_value_and_nothing_is_the_default(node: Nodes, client: Clients) -> None:
    """A key that holds null reads as None; one that is not there reads as the default."""
    there = {
        "type": "get",
        "data": {"key": "a", "namespace": "default", "value": None, "created": 1, "modified": 1, "version": 1},
    }
    absent = {
        "type": "get",
        "data": {"key": "a", "namespace": "default", "value": None, "created": None, "modified": None, "version": 0},
    }
    one = client(node(there, absent, absent))
    assert one.get("a", default="nothing") is None
    assert one.get("a", default="nothing") == "nothing"
    assert one.get_record("a")["version"] == 0


def test_the_name_goes_with_writes(node: Nodes, client: Clients) -> None:
    """Who writes is recorded with each write; reads do not carry it."""
    served = node(fine)
    one = client(served, name="billing")
    one.put("a", 1)
    one.delete("a")
    one.get("a")
    assert [request.get("client") for request in served.requests] == ["billing", "billing", None]


@pytest.mark.parametrize(
    "value",
    [float("nan"), {1}, b"x", object(), "\ud800", [float("inf")]],
    ids=["nan", "set", "bytes", "object", "surrogate", "infinity"],
)
def test_what_is_no_json_is_never_sent(node: Nodes, client: Clients, value: Any) -> None:
    """A value that JSON can't hold is a BadRequest, before a connection is made."""
    served = node(fine)
    one = client(served)
    with pytest.raises(BadRequest):
        one.put("a", value)
    with pytest.raises(BadRequest):
        one.put("\udc00", 1)
    assert served.connections == 0


def test_nodes_are_given_in_several_ways(node: Nodes) -> None:
    """A list, or a text with commas; spellings become one; none, or one that is no address, is a ConfigError."""
    assert Client("A:1, b:02,").nodes == ["a:1", "b:2"]
    assert Client(("[::1]:5",)).nodes == ["[::1]:5"]
    for bad in ("", " , ", [], "a", "a:1,b", ["a:0"]):
        with pytest.raises(ConfigError):
            Client(bad)
    served = node(fine)
    with Client(f" {served.address} ") as one:
        one.ping()
    assert served.gone.acquire(timeout=PATIENCE_S), "leaving the context closes the connection"


def test_a_closed_client_opens_again(node: Nodes, client: Clients) -> None:
    """`close` closes the connection; the next call makes a new one."""
    served = node(fine)
    one = client(served)
    one.ping()
    one.close()
    assert served.gone.acquire(timeout=PATIENCE_S)
    one.close()
    one.ping()
    assert served.connections == 2


# --- the next node --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
def test_a_node_that_is_down_is_passed_over(node: Nodes, client: Clients, nobody: str, call: str) -> None:
    """When no connection can be made nothing was sent, so a write, too, goes to the next node; and the next call goes
    there at once, over the kept connection."""
    served = node(fine)
    one = client(nobody, nobody, served)
    CALLS[call](one)
    CALLS[call](one)
    assert len(served.requests) == 2
    assert served.connections == 1


@pytest.mark.parametrize("code", ["no_leader", "overloaded", "shutting_down"])
@pytest.mark.parametrize("call", CALLS)
def test_what_was_surely_not_executed_goes_to_the_next_node(node: Nodes, client: Clients, call: str, code: str) -> None:
    """An answer that says "not executed, and may work elsewhere" leads to the next node, for a write as well; each node
    is asked once."""
    refusing, served = node(failed(code)), node(fine)
    one = client(refusing, served)
    CALLS[call](one)
    assert (len(refusing.requests), len(served.requests)) == (1, 1)
    CALLS[call](one)
    assert (len(refusing.requests), len(served.requests)) == (1, 2), "it stays with the node that served"


def test_a_cluster_that_elects_is_waited_for(node: Nodes, client: Clients) -> None:
    """While no node has a leader the client goes round until one serves, within its time."""
    first = node(*[failed("no_leader")] * 3, fine)
    second = node(failed("no_leader"))
    assert client(first, second).put("a", 1)["commit_id"] == 7
    assert len(first.requests) == 4
    assert len(second.requests) == 3


def test_the_time_bounds_the_search(node: Nodes, client: Clients, nobody: str) -> None:
    """When no node serves in time the last reason is raised, and not much later than the time-out."""
    refusing = node(failed("no_leader"))
    began = time.monotonic()
    with pytest.raises(Unavailable) as error:
        client(refusing, timeout=0.3).get("a")
    assert error.value.code == "no_leader"
    assert 0.1 <= time.monotonic() - began < PATIENCE_S / 2
    assert len(refusing.requests) > 1
    with pytest.raises(Unavailable, match="no connection") as error:
        client(nobody, timeout=0.2).put("a", 1)
    assert error.value.code == "no_leader"


@pytest.mark.parametrize("code", sorted(set(CODES) - set(_TRY_AGAIN)))
@pytest.mark.parametrize("call", ["put", "get"])
def test_other_failures_are_raised_at_once(node: Nodes, client: Clients, call: str, code: str) -> None:
    """A bad request is bad everywhere, an open outcome is open everywhere: the error goes to the caller, typed by its
    code, and no other node is asked. The connection is kept: the node did answer."""
    refusing, other = node(failed(code)), node(fine)
    one = client(refusing, other)
    with pytest.raises(RequestError, match=f"because of {code}") as error:
        CALLS[call](one)
    assert error.value.code == code
    with pytest.raises(RequestError):
        CALLS[call](one)
    assert (len(refusing.requests), len(other.requests)) == (2, 0)
    assert (refusing.connections, other.connections) == (1, 0)


@pytest.mark.parametrize(
    ("type", "codes"),
    [
        (BadRequest, ("bad_request", "unknown_type", "too_large", "key_too_long", "unsupported")),
        (BadRequest, ("last_voter", "no_such_member", "not_voter", "wrong_cluster", "wrong_node")),
        (Unavailable, ("storage_full", "change_under_way", "no_live_majority", "no_successor", "not_transferred")),
        (NodeDamaged, ("damaged",)),
        (
            NotCommitted,
            (
                "not_committed",
                "internal",
                "wrong_protocol",
                "of_a_newer_one",
            ),
        ),
    ],
)
def test_each_code_has_its_type(node: Nodes, client: Clients, type: type, codes: tuple[str, ...]) -> None:
    """The table of README, messages's codes as errors to catch; a code that this version does not know counts as an
    open outcome, the safe reading."""
    one = client(node(*(failed(code) for code in codes)))
    for code in codes:
        with pytest.raises(type) as error:
            one.put("a", 1)
        assert error.value.code == code
        assert isinstance(error.value, RaftnodeError)


# --- a lost answer --------------------------------------------------------------------------------------------

LOST: dict[str, Step] = {
    "cut": CUT,
    "half an answer, then cut": (b'{"type":"put","data":tr', CUT),
    "an answer that is no JSON": b"HTTP/1.1 400 Bad Request\r\n",
    "an answer that is no object": b"[1]\n",
    "an answer that is not UTF-8": b'{"type":"put","data":true,"x":"\xff"}\n',
}


@pytest.mark.parametrize("how", LOST)
@pytest.mark.parametrize("call", WRITES)
def test_a_write_whose_answer_is_lost_is_sent_once(node: Nodes, client: Clients, call: str, how: str) -> None:
    """The write may have happened: NotCommitted is raised, and all servers together were sent it exactly once
    (TRAPS 24). The next call works, on a new connection."""
    first, second = node(LOST[how], fine), node(fine)
    one = client(first, second)
    with pytest.raises(NotCommitted, match="lost") as error:
        CALLS[call](one)
    assert error.value.code == "not_committed"
    assert len(first.of_type(call)) + len(second.of_type(call)) == 1
    one.ping()
    assert len(first.of_type(call)) + len(second.of_type(call)) == 1
    assert first.connections + second.connections == 2


@pytest.mark.parametrize("how", LOST)
@pytest.mark.parametrize("call", READS)
def test_a_read_whose_answer_is_lost_is_asked_again(node: Nodes, client: Clients, call: str, how: str) -> None:
    """A read changes nothing, so it is asked again, at the next node."""
    first, second = node(LOST[how]), node(fine)
    CALLS[call](client(first, second))
    assert (len(first.requests), len(second.requests)) == (1, 1)


def test_a_read_is_asked_again_at_the_only_node(node: Nodes, client: Clients) -> None:
    """With one node the same node is asked again, over a new connection."""
    served = node(CUT, CUT, fine)
    assert client(served).get("a") == "value of a"
    assert served.connections == 3


def test_a_write_that_is_refused_and_then_lost_is_sent_to_each_once(node: Nodes, client: Clients) -> None:
    """Refused as surely not executed by one node, and lost at the next: no third try."""
    refusing, cutting, third = node(failed("no_leader")), node(CUT), node(fine)
    with pytest.raises(NotCommitted):
        client(refusing, cutting, third).put("a", 1)
    assert [len(one.requests) for one in (refusing, cutting, third)] == [1, 1, 0]


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"type": "put"},
        {"type": "put", "data": False},
        {"type": "put", "data": None},
        {"type": "put", "data": "true"},
        {"type": "get", "data": True},
        {"type": "put", "data": False, "error": {}},
        {"type": "put", "data": False, "error": "no"},
        {"type": "put", "data": False, "error": {"code": 5, "message": None}},
    ],
    ids=json.dumps,
)
def test_an_answer_that_does_not_say_yes_is_no_success(node: Nodes, client: Clients, answer: dict[str, Any]) -> None:
    """Only `"data": true` acknowledges a write. Whatever else a broken or strange node answers, the outcome is open:
    NotCommitted, not success and not a KeyError (README, promise 1)."""
    with pytest.raises(NotCommitted):
        client(node(answer), timeout=0.3).put("a", 1)


@pytest.mark.parametrize(
    "answer",
    [{}, {"type": "get"}, {"type": "get", "data": None}, {"type": "get", "data": True}, {"type": "get", "data": {}},
     {"type": "get", "data": None, "error": {}}, {"type": "get", "data": None, "error": "no"}],
    ids=json.dumps,
)  # fmt: skip
def test_an_answer_that_is_no_answer_to_a_read_is_a_request_error(
    node: Nodes, client: Clients, answer: dict[str, Any]
) -> None:
    """A read that is answered with what is no answer ends in a RequestError, never in a KeyError or TypeError."""
    for call in (lambda one: one.get("a"), lambda one: one.peers()):
        with pytest.raises(RequestError):
            call(client(node(answer), timeout=0.2))


# --- time-outs and stale connections --------------------------------------------------------------------------


def test_a_late_answer_is_never_taken_for_anothers(node: Nodes, client: Clients) -> None:
    """A request that times out closes its connection, so the answer that comes after all is read by nobody; the next
    request has its own, on a new connection (TRAPS 36)."""
    late = threading.Event()
    served = node(lambda request: late.wait(PATIENCE_S) and {**get_answer(request), "late": True}, fine)
    one = client(served, timeout=0.3)
    with pytest.raises(Unavailable):
        one.get("first")
    assert served.asked.acquire(timeout=PATIENCE_S)
    late.set()
    one.timeout = PATIENCE_S
    assert one.get("second") == "value of second"
    assert served.connections >= 2
    assert served.gone.acquire(timeout=PATIENCE_S), "the old connection was closed by the client"


def test_a_write_that_times_out_is_open(node: Nodes, client: Clients) -> None:
    """No answer in time: NotCommitted, sent once, after about the time-out."""
    served, other = node(HANG), node(fine)
    began = time.monotonic()
    with pytest.raises(NotCommitted, match="lost"):
        client(served, other, timeout=0.3).put("a", 1)
    assert 0.2 <= time.monotonic() - began < PATIENCE_S / 2
    assert served.gone.acquire(timeout=PATIENCE_S)
    assert (len(served.requests), len(other.requests)) == (1, 0)


def test_an_answer_that_drips_does_not_stretch_the_time(node: Nodes, client: Clients) -> None:
    """The time-out is for the whole answer: a node that sends a byte now and then does not keep a caller for ever."""
    stop = threading.Event()
    drips = []

    def drip(connection_bytes: bytes = b" ") -> bytes:
        drips.append(1)
        stop.wait(0.02)
        return connection_bytes

    served = node(tuple([lambda _: drip()] * 400))
    began = time.monotonic()
    with pytest.raises(NotCommitted):
        client(served, timeout=0.3).put("a", 1)
    assert time.monotonic() - began < PATIENCE_S / 2
    stop.set()
    assert len(drips) > 2


@pytest.mark.parametrize("how", ["cut", "bytes", "a whole answer"])
@pytest.mark.parametrize("call", CALLS)
def test_a_stale_connection_is_replaced_before_sending(node: Nodes, client: Clients, call: str, how: str) -> None:
    """A kept connection that the node has closed meanwhile (a restart), or on which it said what nobody asked for, is
    not used: the write goes once, over a new connection, and succeeds instead of being open."""
    served = node(fine)
    one = client(served)
    one.ping()
    if how == "cut":
        served.cut()
    else:
        served.say(b"x" if how == "bytes" else b'{"type":"put","data":true,"commit_id":1}\n')
    readable(one)
    result = CALLS[call](one)
    if call in WRITES:
        assert result["commit_id"] == 7
    assert served.connections == 2
    assert len(served.requests) == 2


def test_two_answers_at_once_are_not_mixed_up(node: Nodes, client: Clients) -> None:
    """A node that answers one request twice in one piece: the second answer is not taken for the next request's."""

    def twice(request: dict[str, Any]) -> bytes:
        return 2 * (json.dumps(get_answer(request)).encode() + b"\n")

    served = node(twice, fine)
    one = client(served)
    assert one.get("first") == "value of first"
    assert one.get("second") == "value of second"
    assert served.connections == 2


def test_an_interrupted_call_leaves_a_client_that_works(
    node: Nodes, client: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while an answer is awaited ends that call; the connection is not used again, and the next call works and
    gets its own answer."""
    served = node(HANG, fine)
    one = client(served)

    def interrupt(*_: object) -> bytes:
        assert served.asked.acquire(timeout=PATIENCE_S)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LineConnection, "_read_line", interrupt)
        with pytest.raises(KeyboardInterrupt):
            one.get("first")
    assert one.get("second") == "value of second"
    assert served.connections == 2


# --- limits ---------------------------------------------------------------------------------------------------


def test_an_answer_over_the_limit_is_not_kept(node: Nodes, client: Clients) -> None:
    """A node that answers without end, or with more than any answer may be long: the connection is closed, a read
    fails as unavailable, a write is open."""
    endless = node(b"x" * 5000)
    one = client(endless)
    one._limit = 1000
    with pytest.raises(NotCommitted, match="longer than 1000"):
        one.put("a", 1)
    one.timeout = 0.3
    with pytest.raises(Unavailable):
        one.get("a")
    assert endless.gone.acquire(timeout=PATIENCE_S)


@pytest.mark.parametrize("size", [999, 1000, 1001, 100_000])
def test_the_limit_of_a_line_is_exact_enough(node: Nodes, size: int) -> None:
    """A line up to the limit, with its newline, is taken; a longer one is a ProtocolError and the connection is closed,
    in however many pieces it came."""
    served = node(b'"' + b"x" * (size - 3) + b'"\n')
    connection = LineConnection(served.address, PATIENCE_S, 1000)
    if size <= 1000:
        assert len(connection.request(b"{}\n", PATIENCE_S)) == size - 1
        assert not connection.is_stale()
        connection.close()
    else:
        with pytest.raises(ProtocolError) as error:
            connection.request(b"{}\n", PATIENCE_S)
        assert error.value.code == "too_large"
    assert served.gone.acquire(timeout=PATIENCE_S)


def test_a_large_value_goes_through(node: Nodes, client: Clients) -> None:
    """4 MB there and back, through buffers that are far smaller."""
    value = "é" * (2 << 20)
    stored: list[str] = []

    def keep(request: dict[str, Any]) -> dict[str, Any]:
        stored.append(request["value"])
        return put_answer(request)

    served = node(keep, lambda _: {"type": "get", "data": {"key": "a", "value": stored[0], "version": 1}})
    one = client(served)
    one.put("a", value)
    assert one.get("a") == value


def test_nobody_there_is_an_error_of_its_own(nobody: str) -> None:
    """ConnectFailed says that nothing was sent, and names the address."""
    with pytest.raises(ConnectFailed, match=nobody):
        LineConnection(nobody, 1.0, 1000)


# --- several threads ------------------------------------------------------------------------------------------


def test_threads_share_a_client(node: Nodes, client: Clients) -> None:
    """Eight threads with one client take turns: each gets the answers to its own requests, over one connection."""
    served = node(fine)
    one = client(served)
    wrong: list[Any] = []
    start = threading.Barrier(8)

    def work(name: str) -> None:
        start.wait(PATIENCE_S)
        for n in range(25):
            found = one.get(f"{name}-{n}")
            if found != f"value of {name}-{n}":
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(f"thread-{t}",)) for t in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert wrong == []
    assert len(served.requests) == 200
    assert served.connections == 1


def test_threads_share_a_client_that_fails_over(node: Nodes, client: Clients, nobody: str) -> None:
    """The same while a node refuses now and then and cuts now and then: each thread's reads are right, and each write
    was sent to all nodes together once, unless it was refused."""
    taken: list[str] = []

    def taking(step: Step) -> Step:
        """Takes the write, and then does `step`."""

        def take(request: dict[str, Any]) -> Step:
            if request["type"] == "put":
                taken.append(request["key"])
            return step(request) if callable(step) else step

        return take

    yes, lost = taking(fine), taking(CUT)
    chaos = [yes, yes, failed("overloaded"), yes, lost, yes, failed("no_leader"), yes, lost, yes] * 20
    first, second = node(*chaos, yes), node(*chaos[3:], yes)
    one = client(first, nobody, second)
    outcomes: dict[str, str] = {}
    wrong: list[Any] = []
    start = threading.Barrier(4)

    def work(name: str) -> None:
        start.wait(PATIENCE_S)
        for n in range(10):
            key = f"{name}-{n}"
            try:
                one.put(key, n)
                outcomes[key] = "done"
            except NotCommitted:
                outcomes[key] = "open"
            if one.get(key) != f"value of {key}":
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(f"thread-{t}",)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert wrong == []
    assert len(outcomes) == 40
    assert set(outcomes.values()) == {"done", "open"}
    assert sorted(taken) == sorted(outcomes), "each write was taken once, by one node"
