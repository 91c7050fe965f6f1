"""A network between real nodes that can be cut, slowed and broken: a TCP proxy in front of every member.

    with Proxy({"127.0.0.1:5001": "127.0.0.1:6001", "127.0.0.1:5002": "127.0.0.1:6002"}) as proxy:
        proxy.cut("127.0.0.1:5001", "127.0.0.1:5002")
        proxy.heal()

It listens on each member's address, by which the others know it (`--ip`), and passes on to where the member really
listens (`--listen`). Who is at the other end of a connection it learns from the first line: members say hello, with
their address; whoever does not is one of the `CLIENTS`.

Between any two there is a *road* for each direction, in one of four states:

    pass    bytes go on; also after a delay, in an order that is kept, and no faster than so many bytes a second
    held    nothing goes on, neither bytes nor the end of a connection, until the road is open again: what two hosts see
            of a network that loses every packet is silence. A new connection is not made while either road is held
    refuse  every connection is reset, and each new one as soon as it says who it is

A connection uses both roads, so that a road cut one way holds requests on the connections of one end and the answers on
those of the other. TCP keeps what was sent into a partition and delivers it afterwards; so does this.

Memory is bounded: while a road is held, or the other end does not take what it is sent, nothing more is read, and the
sender finds its kernel's buffer full in the end, as with a real network.

The methods may be called from any thread; when they return, the roads are as they say. Clients are slowed, held and
reset like members (`CLIENTS` stands for all of them), but never by `isolate` or `split`: who cuts a member off from the
others wants to ask it what it makes of that.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import random
import socket
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeVar, cast

from raftnode.config import parse_address
from raftnode.errors import ProtocolError
from raftnode.messages import Hello, decode_request

T = TypeVar("T")

CLIENTS: Final = "clients"
"""Stands for everybody who is no member."""

_HELLO: Final = b'{"type":"hello"'
"""How the first line of a member begins."""
_LONGEST_HELLO: Final = 4096
_MOST_WAITING: Final = 1 << 18
"""Bytes of one direction of one connection that may wait here; past that nothing is read."""
_PATIENCE_S: Final = 10.0


class Passage(enum.Enum):
    """What becomes of the bytes on a road."""

    PASS = "pass"
    HELD = "held"
    REFUSE = "refuse"


class _End(enum.Enum):
    """What may follow the last bytes of one direction."""

    EOF = "the sender has said all"
    LOST = "the connection has ended"


class _Parcel(NamedTuple):
    due: float
    content: bytes | _End


class _Road:
    """One direction between two, for all their connections."""

    def __init__(self) -> None:
        self.passage = Passage.PASS
        self.delay_s = 0.0
        self.rate: float | None = None
        self.free_at = 0.0
        """When a road with a limited rate is done with what it has taken so far."""
        self.flows: set[_Flow] = set()
        self.connecting: set[_Pair] = set()
        """Connections that wait to be made."""

    @property
    def is_disturbed(self) -> bool:
        return self.passage is not Passage.PASS or self.delay_s > 0 or self.rate is not None

    def arrival(self, now: float, size: int, chance: random.Random) -> float:
        """When bytes that set out now arrive."""
        if self.rate is not None:
            self.free_at = max(self.free_at, now) + size / self.rate
        jitter = self.delay_s * chance.uniform(-0.5, 0.5)
        return max(now, self.free_at) + self.delay_s + jitter


class _Half(asyncio.Protocol):
    """One of the two sockets of a connection: what it reads goes into its flow, whose other end writes it."""

    transport: asyncio.Transport

    def __init__(self, pair: _Pair) -> None:
        self._pair = pair
        self.is_open = False
        self.writable = True
        self.out: _Flow | None = None
        """What this socket receives goes here; None while it is not known where to."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.is_open = True
        self._pair.opened(self)

    def data_received(self, data: bytes) -> None:
        if self.out is None:
            self._pair.introduced(data)
        else:
            self.out.take(data)

    def eof_received(self) -> bool:
        if self.out is None or self._pair.is_kept_waiting:
            return False  # it gave up before there was a connection
        self.out.take(_End.EOF)
        return True  # the other direction goes on

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - how it ended makes no difference
        self.is_open, self.writable = False, True  # what still comes for it is dropped, and does not wait
        if self.out is not None:
            self.out.take(_End.LOST)
        self._pair.lost()

    def half_closed(self) -> None:
        """What it had to say has arrived, up to its end."""
        self._pair.close_when_done()

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        self._pair.pump()

    def read_on(self, may_read: bool) -> None:
        """Read, or leave what comes to the kernel's buffers."""
        if not self.is_open or self.transport.is_closing() or self.transport.is_reading() is may_read:
            return
        if may_read:
            self.transport.resume_reading()
        else:
            self.transport.pause_reading()

    def abort(self) -> None:
        """End it with a reset."""
        if self.is_open:
            with contextlib.suppress(OSError):
                # Without lingering, a close is a reset: what a peer sees of a connection that a network has broken.
                linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
                self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.transport.abort()


class _Flow:
    """One direction of one connection. Invariant: what waits is at most `_MOST_WAITING` and one read more."""

    def __init__(self, proxy: Proxy, road: _Road, source: _Half) -> None:
        self._proxy = proxy
        self._road = road
        self._source = source
        self._waiting: deque[_Parcel] = deque()
        self.size = 0
        """Bytes that wait."""
        self._last_due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.sink: _Half | None = None
        """Where it goes; None until there is a connection."""
        self.has_ended = False
        """True when the other end knows that nothing more comes."""
        road.flows.add(self)

    def take(self, content: bytes | _End) -> None:
        """Something has set out."""
        now = self._proxy.now()
        size = len(content) if isinstance(content, bytes) else 0
        due = max(self._road.arrival(now, size, self._proxy.chance), self._last_due)
        self._last_due = due
        self._waiting.append(_Parcel(due, content))
        self.size += size
        self.pump()

    def pump(self) -> None:
        """Deliver what is due, as far as the road and the other end let."""
        while self._may_deliver():
            parcel = self._waiting.popleft()
            if isinstance(parcel.content, bytes):
                self.size -= len(parcel.content)
            self._deliver(parcel.content)
        # Before there is a connection it is read on: who gives up is to be forgotten, as a handshake would be.
        is_open = self._road.passage is Passage.PASS or self.sink is None
        self._source.read_on(is_open and self.size < _MOST_WAITING)

    def hasten(self) -> None:
        """What is on its way is there now."""
        self._last_due = 0.0
        self._waiting = deque(parcel._replace(due=0.0) for parcel in self._waiting)
        self._stop_timer()

    def _may_deliver(self) -> bool:
        if not self._waiting or self._road.passage is not Passage.PASS or self.sink is None or not self.sink.writable:
            return False
        wait = self._waiting[0].due - self._proxy.now()
        if wait > 0:
            self._wake_after(wait)
            return False
        return True

    def _wake_after(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = self._proxy.loop.call_later(seconds, self._woken)

    def _woken(self) -> None:
        self._timer = None
        self.pump()

    def _deliver(self, content: bytes | _End) -> None:
        assert self.sink is not None, "a flow without an end delivers nothing"
        if content is _End.LOST:
            self.sink.abort()
            self.close()
        elif self.sink.is_open and not self.sink.transport.is_closing():
            if content is _End.EOF:
                self.has_ended = True
                with contextlib.suppress(OSError):  # it was reset in this moment, which it is told next
                    self.sink.transport.write_eof()
                self._source.half_closed()
            else:
                assert isinstance(content, bytes)
                self.sink.transport.write(content)

    def close(self) -> None:
        """Nothing more goes this way."""
        self._road.flows.discard(self)
        self._waiting.clear()
        self.size = 0
        self._stop_timer()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Pair:
    """A connection: the socket that we accepted, and the one that we opened for it to the member."""

    def __init__(self, proxy: Proxy, to: str) -> None:
        self._proxy = proxy
        self._to = to
        self._near = _Half(self)
        self._far: _Half | None = None
        self._first = b""
        self._roads: tuple[_Road, _Road] | None = None
        self._is_connecting = False

    @property
    def accepted(self) -> asyncio.Protocol:
        return self._near

    def opened(self, half: _Half) -> None:
        """One of the sockets is connected."""
        if half is self._near:
            self._proxy.pairs.add(self)
            return
        assert self._roads is not None, "a connection is opened when it is known for whom"
        back = self._roads[1]
        assert self._near.out is not None, "its flow was there before"
        half.out = _Flow(self._proxy, back, half)
        half.out.sink, self._near.out.sink = self._near, half
        self.pump()

    def introduced(self, data: bytes) -> None:
        """The first bytes: they tell who it is, once there are enough of them."""
        self._first += data
        who = _sender(self._first)
        if who is None:
            return
        there, back = self._roads = self._proxy.road(who, self._to), self._proxy.road(self._to, who)
        self._near.out = _Flow(self._proxy, there, self._near)
        self._near.out.take(self._first)
        there.connecting.add(self)
        back.connecting.add(self)
        self.connect()

    def connect(self) -> None:
        """Open the connection to the member, once both roads are open: the handshake of TCP needs both."""
        assert self._roads is not None, "it is known who wants it"
        if any(road.passage is Passage.REFUSE for road in self._roads):
            self.abort()
        elif not (self.is_kept_waiting or self._is_connecting):
            self._is_connecting = True
            self._proxy.start(self._connect())

    async def _connect(self) -> None:
        try:
            _, self._far = await self._proxy.loop.create_connection(
                lambda: _Half(self), *parse_address(self._proxy.listens[self._to])
            )
        except OSError:
            self.abort()
        finally:
            self._leave_queue()

    @property
    def is_kept_waiting(self) -> bool:
        """True while there is no connection yet because a road is held."""
        return (
            self._roads is not None
            and not self._is_connecting
            and any(road.passage is Passage.HELD for road in self._roads)
        )

    def _leave_queue(self) -> None:
        for road in self._roads or ():
            road.connecting.discard(self)

    def pump(self) -> None:
        for half in self._halves:
            if half.out is not None:
                half.out.pump()

    @property
    def _halves(self) -> list[_Half]:
        return [half for half in (self._near, self._far) if half is not None]

    def uses(self, road: _Road) -> bool:
        return self._roads is not None and road in self._roads

    def abort(self) -> None:
        """Reset both sockets, and forget what was on its way."""
        for half in self._halves:
            if half.out is not None:
                half.out.close()
            half.abort()
        self._leave_queue()

    def close_when_done(self) -> None:
        """Close both sockets once both ends have said all, and have been told."""
        if all(half.out is not None and half.out.has_ended for half in self._halves) and self._far is not None:
            for half in self._halves:
                half.transport.close()

    def lost(self) -> None:
        """One of the sockets is closed."""
        if self._far is None and not self._is_connecting:
            self._leave_queue()
        if not any(half.is_open for half in self._halves):
            self._proxy.pairs.discard(self)


def _sender(first: bytes) -> str | None:
    """Who begins so; None when more of the first line is needed to tell."""
    if not first.startswith(_HELLO):
        return None if _HELLO.startswith(first) else CLIENTS
    line, newline, _ = first.partition(b"\n")
    if not newline:
        return None if len(first) < _LONGEST_HELLO else CLIENTS
    with contextlib.suppress(ProtocolError):
        hello = decode_request(line)
        if isinstance(hello, Hello):
            return hello.address
    return CLIENTS


class Proxy:
    """The roads between the members, and from and to the clients. A context manager; `close` ends it."""

    def __init__(self, listens: Mapping[str, str], seed: int = 0) -> None:
        """`listens`: by each member's address, where it listens. `seed`: of the jitter of slow roads."""
        self.listens = dict(listens)
        self.chance = random.Random(seed)
        self.pairs: set[_Pair] = set()
        self._roads: dict[tuple[str, str], _Road] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []
        self._failures: list[BaseException | str] = []
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(self._note_failure)
        self._thread = threading.Thread(target=self.loop.run_forever, name="raftnode proxy", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._listen(), self.loop).result(_PATIENCE_S)
        except BaseException:
            self.close()
            raise

    def _note_failure(self, loop: asyncio.AbstractEventLoop, facts: dict[str, Any]) -> None:  # noqa: ARG002
        """A defect of the proxy itself, for whoever uses it next."""
        self._failures.append(facts.get("exception") or facts["message"])

    def _check(self) -> None:
        """Raise when the proxy has failed: what was seen through it proves nothing."""
        if self._failures:
            raise RuntimeError(f"the proxy has failed: {self._failures[0]!r}")

    async def _listen(self) -> None:
        for member in self.listens:
            self._servers.append(await self._listen_for(member))

    async def _listen_for(self, member: str) -> asyncio.Server:
        host, port = parse_address(member)
        return await self.loop.create_server(lambda: _Pair(self, member).accepted, host, port, backlog=1024)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Reset every connection and listen no more. May be called again. Raises RuntimeError when the proxy itself has
        failed, as the other methods do."""
        if self.loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._close(), self.loop).result(_PATIENCE_S)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        self._check()

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for pair in list(self.pairs):
            pair.abort()
        while self.pairs:
            await asyncio.sleep(0)  # aborted connections end in the next round of the loop
        for server in self._servers:
            await server.wait_closed()

    # --- what may be done to the roads ---

    def cut(self, a: str, b: str) -> None:
        """Hold both directions between two: packets are lost."""
        self._set([(a, b), (b, a)], Passage.HELD)

    def cut_one_way(self, a: str, b: str) -> None:
        """Hold what goes from `a` to `b`."""
        self._set([(a, b)], Passage.HELD)

    def isolate(self, a: str) -> None:
        """Hold everything between `a` and the other members."""
        self.split([a], [member for member in self.listens if member != a])

    def split(self, one: Iterable[str], other: Iterable[str]) -> None:
        """Hold everything between the members of two groups."""
        self._set(both_ways(one, other), Passage.HELD)

    def refuse(self, a: str, b: str) -> None:
        """Reset every connection between two, and each new one."""
        self._set([(a, b), (b, a)], Passage.REFUSE)

    def slow(self, a: str, b: str, delay_ms: float, rate: float | None = None) -> None:
        """Let what goes from `a` to `b` arrive `delay_ms` later, give or take a half of that, and at most `rate` bytes
        a second of it; None: without a limit."""

        def act() -> None:
            road = self.road(a, b)
            road.delay_s, road.rate = delay_ms / 1000, rate

        self._run(act)

    def reset(self, a: str, b: str) -> None:
        """Reset the connections that there are between two; new ones may be made at once."""

        def act() -> None:
            roads = self.road(a, b), self.road(b, a)
            for pair in [pair for pair in self.pairs if any(pair.uses(road) for road in roads)]:
                pair.abort()

        self._run(act)

    def open(self, roads: Iterable[tuple[str, str]]) -> None:
        """These directions (from, to) are as they were at first; what was held goes on."""
        given = list(roads)

        def act() -> None:
            for a, b in given:
                road = self.road(a, b)
                road.delay_s, road.rate, road.free_at = 0.0, None, 0.0
                for flow in road.flows:
                    flow.hasten()

        self._run(act)
        self._set(given, Passage.PASS)

    def heal(self) -> None:
        """All roads are as they were at first; what was held goes on."""
        self.open(list(self._run(lambda: list(self._roads))))

    def state(self, a: str, b: str) -> Passage:
        """What becomes of bytes from `a` to `b` now."""
        return self._run(lambda: self.road(a, b).passage)

    @property
    def disturbed(self) -> list[tuple[str, str]]:
        """The directions that are not as they were at first."""

        def found() -> list[tuple[str, str]]:
            return sorted(between for between, road in self._roads.items() if road.is_disturbed)

        return self._run(found)

    @property
    def waiting_bytes(self) -> int:
        """What was read and not yet passed on, of all connections."""
        return self._run(lambda: sum(flow.size for road in self._roads.values() for flow in road.flows))

    @property
    def connection_count(self) -> int:
        return self._run(lambda: len(self.pairs))

    # --- in the loop ---

    def now(self) -> float:
        return self.loop.time()

    def road(self, a: str, b: str) -> _Road:
        """The road from `a` to `b`."""
        return self._roads.setdefault((a, b), _Road())

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine, and keep it until it has ended."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _set(self, roads: Iterable[tuple[str, str]], passage: Passage) -> None:
        given = list(roads)

        def act() -> None:
            changed = [self.road(a, b) for a, b in given]
            for road in changed:
                road.passage = passage
            for road in changed:
                self._apply(road)

        self._run(act)

    def _apply(self, road: _Road) -> None:
        """Let the connections of a road know what has become of it."""
        if road.passage is Passage.REFUSE:
            for pair in [pair for pair in self.pairs if pair.uses(road)]:
                pair.abort()
            return
        for pair in list(road.connecting):
            pair.connect()
        for flow in list(road.flows):
            flow.pump()

    def _run(self, act: Callable[[], T]) -> T:
        """Do something in the loop's thread, and wait until it is done."""

        self._check()

        async def call() -> T:
            return act()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(_PATIENCE_S)


def both_ways(one: Iterable[str], other: Iterable[str]) -> list[tuple[str, str]]:
    """Every direction between two groups, as (from, to)."""
    here, there = sorted(one), sorted(other)
    return [road for a in here for b in there for road in ((a, b), (b, a))]
