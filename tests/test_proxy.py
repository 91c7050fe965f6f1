"""The network between real nodes that can be cut, slowed and broken: alone, with small servers behind it, and between
the nodes of a real cluster."""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from raftnode.blocking import LineConnection
from raftnode.client import Client
from raftnode.config import parse_address
from raftnode.errors import NotCommitted, Unavailable
from raftnode.messages import Hello, decode_object, encode, encode_object
from raftnode.testing.processes import PATIENCE_S, ClusterOfProcesses, NodeProcess, free_addresses, wait_until
from raftnode.testing.proxy import CLIENTS, Passage, Proxy

MOMENT_S = 0.4
"""For what must not happen: on a road that is open it takes a hundredth of this."""

# --- servers, and who speaks to them --------------------------------------------------------------------------


class _Echo(socketserver.StreamRequestHandler):
    """Sends every line back."""

    server: Server

    def handle(self) -> None:
        self.server.connections.append(self.connection)
        with contextlib.suppress(ConnectionError):
            for line in self.rfile:
                self.server.lines.append(line)
                self.wfile.write(line)
        self.server.ended.append(self.client_address)


class Server(socketserver.ThreadingTCPServer):
    """One member's server: what it has heard, in the order in which it came."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, address: str) -> None:
        super().__init__(parse_address(address), _Echo)
        self.lines: list[bytes] = []
        self.connections: list[socket.socket] = []
        self.ended: list[Any] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        raise AssertionError(f"a connection from {client_address} failed in {request}")


class Network:
    """Members a, b and c, echo servers, with a proxy before them."""

    def __init__(self) -> None:
        found = free_addresses(6)
        self.a, self.b, self.c = found[:3]
        listens = dict(zip(found[:3], found[3:], strict=True))
        self.servers = {member: Server(listen) for member, listen in listens.items()}
        self.proxy = Proxy(listens)

    def link(self, sender: str, to: str) -> Speaker:
        """A connection of one member to another."""
        return Speaker(to, sender)

    def close(self) -> None:
        self.proxy.close()
        for server in self.servers.values():
            server.shutdown()
            server.server_close()


class Speaker:
    """One end of a connection; a member says hello first."""

    def __init__(self, to: str, sender: str | None = None) -> None:
        self.socket = socket.create_connection(parse_address(to), PATIENCE_S)
        self._stream = self.socket.makefile("rb")
        if sender is not None:
            self.hello = encode(Hello(cluster="c", node="n", address=sender, id=1))
            self.socket.sendall(self.hello)

    def greeted(self) -> Speaker:
        """Its hello has come back."""
        assert self.heard() == self.hello
        return self

    def say(self, line: bytes) -> None:
        self.socket.sendall(line)

    def heard(self, within: float = PATIENCE_S) -> bytes | None:
        """The next line; b"" at the end of the connection, None when nothing comes."""
        self.socket.settimeout(within)
        try:
            return self._stream.readline()
        except TimeoutError:
            self._stream = self.socket.makefile("rb")  # one that timed out can't be read again
            return None

    def close(self) -> None:
        self._stream.close()
        self.socket.close()

    def __enter__(self) -> Speaker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def network() -> Iterator[Network]:
    network = Network()
    yield network
    network.close()


# --- alone ----------------------------------------------------------------------------------------------------


def test_bytes_pass_as_they_are(network: Network) -> None:
    """A road that is open changes nothing: bytes arrive in order and whole, both ways, for members and for clients,
    with and without a newline, and the end of each direction arrives by itself. Brought about with a megabyte of lines
    over a link, and with a client that says all, shuts its side and then reads."""
    lines = [b"%d " % n + b"x" * (n % 900) + b"\n" for n in range(2000)]
    with network.link(network.a, network.b).greeted() as link:
        threading.Thread(target=link.say, args=(b"".join(lines),)).start()
        for line in lines:
            assert link.heard() == line
    with Speaker(network.b) as client:
        client.say(b'{"type":"ping"}\nlast, without an end')
        client.socket.shutdown(socket.SHUT_WR)
        assert client.heard() == b'{"type":"ping"}\n'
        assert client.heard() == b"last, without an end"
        assert client.heard() == b""
    wait_until(lambda: not network.proxy.connection_count, "no connection is left")
    assert len(network.servers[network.b].ended) == 2


def test_who_it_is_may_come_in_pieces(network: Network) -> None:
    """A hello that arrives byte by byte makes a member all the same; what only begins like one makes a client. Seen by
    what a cut between two members holds."""
    network.proxy.cut(network.a, network.b)
    hello = encode(Hello(cluster="c", node="n", address=network.a, id=1))
    with Speaker(network.b) as member, Speaker(network.b) as client:
        for n in range(len(hello)):
            member.say(hello[n : n + 1])
        for n in range(12):
            client.say(hello[n : n + 1])
        client.say(b"x\n")
        assert client.heard() == hello[:12] + b"x\n"
        assert member.heard(MOMENT_S) is None
        network.proxy.heal()
        assert member.heard() == hello


def test_a_cut_is_silence(network: Network) -> None:
    """Between two that are cut off nothing arrives, neither bytes nor the end of a connection, and nobody is told; what
    was sent arrives when the road is open again, in order. Brought about between two members, over a connection that
    there was; the others, and clients, are not concerned. One end dies meanwhile: the other learns it afterwards."""
    proxy, server = network.proxy, network.servers[network.b]
    with network.link(network.a, network.b).greeted() as link, network.link(network.c, network.b).greeted() as other:
        proxy.cut(network.a, network.b)
        assert proxy.state(network.a, network.b) is proxy.state(network.b, network.a) is Passage.HELD
        heard = len(server.lines)
        link.say(b"one\n")
        other.say(b"of c\n")
        assert other.heard() == b"of c\n"
        with Speaker(network.b) as client:
            client.say(b"of a client\n")
            assert client.heard() == b"of a client\n"
        assert link.heard(MOMENT_S) is None
        link.say(b"two\n")
        link.close()
        assert server.lines[heard:] == [b"of c\n", b"of a client\n"]
        assert len(server.ended) == 1, "of the client only: the death of the link is held as well"
        proxy.heal()
        wait_until(lambda: len(server.ended) == 2, "the end arrives")
        assert server.lines[heard + 2 :] == [b"one\n", b"two\n"]


def test_a_server_dies_behind_a_cut(network: Network) -> None:
    """The death of who is at the far end is not told over a road that is held. Its connections are reset while it is
    cut off; its member hears nothing, and of the end only when the road is open."""
    with network.link(network.a, network.b).greeted() as link:
        network.proxy.cut(network.a, network.b)
        for connection in network.servers[network.b].connections:
            connection.shutdown(socket.SHUT_RDWR)
        assert link.heard(MOMENT_S) is None
        network.proxy.heal()
        assert link.heard() == b""


def test_a_cut_one_way_holds_one_way(network: Network) -> None:
    """From a to b nothing arrives, from b to a everything: on connections that b opened requests arrive and answers do
    not, on those that a opened answers would, but no request arrives. A new connection needs both ways, and is not made
    from either side; when the road is open it is."""
    proxy = network.proxy
    with network.link(network.a, network.b).greeted() as of_a, network.link(network.b, network.a).greeted() as of_b:
        proxy.cut_one_way(network.a, network.b)
        heard = {member: len(network.servers[member].lines) for member in (network.a, network.b)}
        of_b.say(b"request of b\n")
        wait_until(lambda: len(network.servers[network.a].lines) > heard[network.a], "the request arrives at a")
        assert of_b.heard(MOMENT_S) is None, "the answer goes from a to b"
        of_a.say(b"request of a\n")
        network.servers[network.b].connections[0].sendall(b"of itself\n")
        assert of_a.heard() == b"of itself\n"
        with network.link(network.b, network.a) as new:
            assert new.heard(MOMENT_S) is None
            assert len(network.servers[network.b].lines) == heard[network.b]
            assert len(network.servers[network.a].connections) == 1
            proxy.heal()
            new.greeted()
        assert of_a.heard() == b"request of a\n"
        assert of_b.heard() == b"request of b\n"


def test_who_gives_up_before_there_is_a_connection(network: Network) -> None:
    """A connection that is tried during a cut and given up is none: when the road opens, its hello does not arrive
    late, in the midst of newer ones."""
    network.proxy.isolate(network.a)
    for _ in range(3):
        network.link(network.a, network.b).close()
    wait_until(lambda: not network.proxy.connection_count, "the tries are forgotten")
    network.proxy.heal()
    with network.link(network.a, network.b).greeted():
        assert len(network.servers[network.b].connections) == 1


def test_isolated_and_split(network: Network) -> None:
    """`isolate` cuts one member off from all others, `split` one group from the other, and nothing else; clients reach
    everybody."""
    a, b, c = network.a, network.b, network.c
    roads = [(x, y) for x in (a, b, c, CLIENTS) for y in (a, b, c, CLIENTS) if x != y]

    def held() -> set[tuple[str, str]]:
        return {road for road in roads if network.proxy.state(*road) is Passage.HELD}

    network.proxy.isolate(b)
    assert held() == {(a, b), (b, a), (b, c), (c, b)}
    network.proxy.heal()
    assert held() == set()
    network.proxy.split([a, b], [c])
    assert held() == {(a, c), (c, a), (b, c), (c, b)}
    network.proxy.open([(a, c)])
    assert held() == {(c, a), (b, c), (c, b)}


def test_reset_and_refused(network: Network) -> None:
    """`reset` ends the connections that there are, and a new one is made at once; `refuse` ends new ones as well, until
    `heal`. Others are not concerned. A member behind which nobody listens refuses, too."""
    proxy = network.proxy
    with network.link(network.c, network.b).greeted() as bystander:
        link = network.link(network.a, network.b).greeted()
        proxy.reset(network.a, network.b)
        with pytest.raises(ConnectionResetError):
            link.heard()
        link.close()
        network.link(network.a, network.b).greeted().close()
        proxy.refuse(network.a, network.b)
        with network.link(network.a, network.b) as refused, pytest.raises(ConnectionResetError):
            refused.heard()
        proxy.heal()
        network.link(network.a, network.b).greeted().close()
        bystander.say(b"still there\n")
        assert bystander.heard() == b"still there\n"
    network.servers[network.c].shutdown()
    network.servers[network.c].server_close()
    with network.link(network.a, network.c) as refused, pytest.raises(ConnectionResetError):
        refused.heard()


def test_a_slow_road(network: Network) -> None:
    """A road may be late and narrow: a line takes at least half of the delay, and a burst as long as its size at that
    rate; order is kept, and the other direction is not concerned. `heal` lets through at once what is on its way."""
    proxy, chance = network.proxy, b"x" * 1023 + b"\n"
    with network.link(network.a, network.b).greeted() as link:
        proxy.slow(network.a, network.b, delay_ms=400)
        began = time.monotonic()
        link.say(b"one\ntwo\n")
        assert [link.heard(), link.heard()] == [b"one\n", b"two\n"]
        assert time.monotonic() - began > 0.2
        proxy.slow(network.a, network.b, delay_ms=1, rate=20_000)
        began = time.monotonic()
        link.say(chance * 10)
        for _ in range(10):
            assert link.heard() == chance
        assert time.monotonic() - began > 0.4
        proxy.slow(network.a, network.b, delay_ms=3_600_000)
        link.say(b"in an hour\n")
        wait_until(lambda: proxy.waiting_bytes, "it is on its way")
        proxy.heal()
        assert link.heard() == b"in an hour\n"


def test_memory_is_bounded(network: Network) -> None:
    """While a road is held its sender is not read from: the kernel's buffers fill, the sender finds that it can send no
    more, and what waits here stays small. Brought about with a sender that never stops, on a road that is held and on
    one that is too slow; afterwards everything arrives."""
    with network.link(network.a, network.b).greeted() as link:
        for hold in (
            lambda: network.proxy.cut_one_way(network.a, network.b),
            lambda: network.proxy.slow(network.a, network.b, delay_ms=3_600_000),
        ):
            hold()
            before = len(network.servers[network.b].lines)
            line, sent = b"x" * 65_535 + b"\n", 0
            link.socket.settimeout(MOMENT_S)
            rest = line
            with contextlib.suppress(TimeoutError):
                while sent < 1000:
                    rest = rest[link.socket.send(rest) :]
                    if not rest:
                        rest, sent = line, sent + 1
            assert 0 < sent < 1000, "the sender is stopped"
            assert network.proxy.waiting_bytes <= 1 << 19
            network.proxy.heal()
            link.socket.settimeout(PATIENCE_S)
            reader = threading.Thread(target=lambda: [link.heard() for _ in range(sent + 1)])  # noqa: B023
            reader.start()
            link.say(rest)
            reader.join(PATIENCE_S)
            assert not reader.is_alive()
            assert len(network.servers[network.b].lines) == before + sent + 1


def test_the_end_of_what_was_reset() -> None:
    """The end of one direction is due in the very moment in which the far end resets the connection, before the proxy
    is told: that is no failure, and nothing of the connection is left. Brought about by holding up the proxy's loop
    between the two."""
    member, listen = free_addresses(2)
    with Proxy({member: listen}) as proxy, socket.create_server(parse_address(listen)) as listener:
        with Speaker(member) as client:
            client.say(b"first\n")
            far, _ = listener.accept()
            assert far.recv(100) == b"first\n"
            proxy.slow(CLIENTS, member, delay_ms=3_600_000)
            client.socket.shutdown(socket.SHUT_WR)
            [flow] = proxy.road(CLIENTS, member).flows
            wait_until(lambda: flow._waiting, "the end waits")
            gate = threading.Event()

            def deliver() -> None:
                gate.wait()
                flow.hasten()
                flow.pump()

            proxy.loop.call_soon_threadsafe(deliver)
            far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            far.close()
            gate.set()
            with pytest.raises(ConnectionResetError):
                client.heard()
        wait_until(lambda: not proxy.connection_count, "no connection is left")


def test_a_failure_of_the_proxy_is_told() -> None:
    """What was seen through a proxy that has failed itself proves nothing: whoever uses it next is told, and who closes
    it. Brought about with a callback that raises."""
    [member, listen] = free_addresses(2)
    proxy = Proxy({member: listen})
    proxy.loop.call_soon_threadsafe(lambda: 1 // 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        wait_until(lambda: proxy.connection_count, "never")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        proxy.close()
    assert proxy.loop.is_closed()


# --- between real nodes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterOfProcesses]:
    with ClusterOfProcesses(3, tmp_path_factory.mktemp("proxied"), proxied=True) as cluster:
        cluster.await_caught_up()
        yield cluster


@pytest.fixture(autouse=True)
def _whole_again(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").heal()


def write(node: NodeProcess, key: str, value: str, timeout: float) -> str:
    """One put at one node: "ok", or the name of the error."""
    try:
        with Client(node.address, timeout=timeout) as client:
            client.put(key, value)
    except (NotCommitted, Unavailable) as error:
        return type(error).__name__
    return "ok"


def test_an_isolated_leader_is_replaced(cluster: ClusterOfProcesses) -> None:
    """A leader that is cut off from the others steps down, and they elect another; a write that is sent to it ends as
    open or as not executed, never as done. Seen: its own status says that it does not lead; of two writes to it, one
    before and one after it noticed, the first is not in the namespaces while it is cut off, and both nodes of the
    majority take writes; when the network is whole again all agree."""
    old = cluster.await_leader()
    others = cluster.others(old)
    mark = old.mark()
    cluster.proxy.isolate(old.address)
    assert write(old, "isolated-1", "never done in time", timeout=8) == "NotCommitted"
    new = cluster.await_leader()
    assert new in others
    old.await_event("role", mark, role="follower")
    assert write(old, "isolated-2", "never appended", timeout=8) == "Unavailable"
    for n, node in enumerate(others):
        assert write(node, f"majority-{n}", "done", timeout=8) == "ok"
    assert node.read(["isolated-1", "isolated-2"]) == {}
    cluster.heal()
    for node in cluster:
        found = node.read(["isolated-2", "majority-0", "majority-1"])
        assert found == {"majority-0": "done", "majority-1": "done"}


def test_a_leader_that_is_not_heard(cluster: ClusterOfProcesses) -> None:
    """A leader whose words are lost on the way out, while it hears everybody, is replaced as well: no answer comes to
    what nobody has got (TRAPS 15)."""
    old = cluster.await_leader()
    for node in cluster.others(old):
        cluster.proxy.cut_one_way(old.address, node.address)
    new = wait_until(
        lambda: node if (node := cluster.leader()) not in (None, old) else None,
        "another leads",
        explain=cluster.describe,
    )
    assert write(new, "unheard", "done", timeout=8) == "ok"


def test_a_leader_that_hears_nobody(cluster: ClusterOfProcesses) -> None:
    """A leader that is heard and hears nobody must not stay leader: it could commit nothing, and its heartbeats would
    keep all others from an election (TRAPS 15)."""
    old = cluster.await_leader()
    for node in cluster.others(old):
        cluster.proxy.cut_one_way(node.address, old.address)
    new = wait_until(
        lambda: node if (node := cluster.leader()) not in (None, old) else None,
        "another leads",
        explain=cluster.describe,
    )
    assert write(new, "deaf", "done", timeout=8) == "ok"


def test_a_reset_between_members(cluster: ClusterOfProcesses) -> None:
    """Links that are reset are made again, and the cluster goes on under the same leader: one follower that suspects it
    finds no other one to agree. So the second one's links are reset when the first has heard the leader again, which
    shows in that it has what was written after the reset."""
    leader = cluster.await_leader()
    term = cluster.term()
    for node in cluster.others(leader):
        mark = node.mark()
        cluster.proxy.reset(leader.address, node.address)
        node.await_event("peer_connected", mark, peer=leader.address)
        assert write(leader, f"after the reset of {node.name}", "done", timeout=8) == "ok"
        cluster.await_caught_up()
    assert (cluster.await_leader(), cluster.term()) == (leader, term)


def test_a_node_says_its_name_not_where_it_listens(cluster: ClusterOfProcesses) -> None:
    """A member is known by its address, wherever it listens: no member's other address is in what any of them says of
    the cluster, nor in its directory. A client reaches it at both."""
    node = cluster[0]
    listens = {member.listen for member in cluster}
    for address in (node.address, node.listen):
        with contextlib.closing(LineConnection(address, PATIENCE_S, 1 << 20)) as line:
            status = decode_object(line.request(encode_object({"type": "status"}), PATIENCE_S))["data"]
            assert set(status["members"]) == set(cluster.addresses)
    told = json.dumps([status, node.inspect("info"), node.inspect("log")])
    assert not [listen for listen in listens if listen in told]
