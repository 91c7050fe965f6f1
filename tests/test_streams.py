"""Sockets on the node's loop. A stream behaves as asyncio's own transport does: whatever can be asked of both is asked
of both, by the same tests. What is left is said of listening and connecting."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import socket
import struct
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, cast

import pytest

from raftnode.passes import PassSelector
from raftnode.streams import Listener, Stream, StreamProtocol, connect, listen

PATIENCE_S = 20.0
MUCH = 4 << 20
"""Bytes that no socket takes at once."""


class Noting(StreamProtocol):
    """Notes what it is told, and answers as the test has asked it to."""

    def __init__(self, events: list[Any]) -> None:
        self.events = events
        self.stays_open_at_eof = False
        self.on_data: Callable[[bytes], object] = lambda _: None
        self.has_time = True
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.events.append("made")

    def may_read(self) -> bool:
        if not self.has_time:
            self.events.append("not now")
            self.transport.pause_reading()
        return self.has_time

    def data_received(self, data: bytes) -> None:
        self.events.append(data)
        self.on_data(data)

    def eof_received(self) -> bool:
        self.events.append("eof")
        return self.stays_open_at_eof

    def pause_writing(self) -> None:
        self.events.append("pause")

    def resume_writing(self) -> None:
        self.events.append("resume")

    def connection_lost(self, error: Exception | None) -> None:
        self.events.append(("lost", error if error is None else type(error)))


class Bench:
    """A loop of the kind under test, and one connection on it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.passes = PassSelector(lambda: None, poll_s=1e-6)
        self.loop = asyncio.SelectorEventLoop(self.passes)
        self.events: list[Any] = []
        self.failures: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, facts: self.failures.append(facts))
        self.protocol = Noting(self.events)
        self.mine, self.theirs = self._pair()
        self.run(self._open())
        self.transport = self.protocol.transport

    @staticmethod
    def _pair() -> tuple[socket.socket, socket.socket]:
        """Two ends of a TCP connection: a reset is something that only these have."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            theirs = socket.create_connection(server.getsockname(), PATIENCE_S)
            mine, _ = server.accept()
        mine.setblocking(False)
        return mine, theirs

    async def _open(self) -> None:
        if self.kind == "stream":
            Stream(self.mine, self.protocol, self.passes, memoryview(bytearray(1 << 16)))
        else:
            await self.loop.connect_accepted_socket(lambda: self.protocol, self.mine)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, PATIENCE_S))

    def call(self, work: Callable[[], object]) -> None:
        """Do this on the loop's thread, while it runs."""

        async def do() -> None:
            work()

        self.run(do())

    def until(self, condition: Callable[[], bool]) -> None:
        async def wait() -> None:
            while not condition():
                await asyncio.sleep(0.001)

        self.run(wait())

    def settle(self) -> None:
        """Let the loop take what is there already."""

        async def rounds() -> None:
            for _ in range(5):
                await asyncio.sleep(0)

        self.run(rounds())

    @property
    def is_lost(self) -> bool:
        return any(isinstance(event, tuple) for event in self.events)

    def lost(self) -> Any:
        """Await the end; the error that it came with."""
        self.until(lambda: self.is_lost)
        return next(event[1] for event in self.events if isinstance(event, tuple))

    def read_all(self) -> bytes:
        """What arrives at the other end until this one has ended; the loop goes on meanwhile."""
        parts = []

        async def read() -> None:
            while part := await asyncio.to_thread(self.theirs.recv, 1 << 16):
                parts.append(part)

        self.run(read())
        return b"".join(parts)

    def close(self) -> None:
        if not self.is_lost:
            self.transport.abort()
        self.settle()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        self.theirs.close()


@pytest.fixture(params=["stream", "asyncio"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    with contextlib.closing(Bench(request.param)) as bench:
        yield bench
        assert not bench.failures


# --- as asyncio's ---------------------------------------------------------------------------------------------


def test_both_directions(bench: Bench) -> None:
    bench.theirs.sendall(b"hello")
    bench.until(lambda: b"hello" in bench.events)
    assert bench.events == ["made", b"hello"]
    bench.call(lambda: bench.transport.write(b"good day"))
    assert bench.theirs.recv(100) == b"good day"
    assert bench.transport.get_extra_info("peername") == bench.theirs.getsockname()
    assert bench.transport.get_extra_info("socket").fileno() == bench.mine.fileno()


def test_what_the_system_does_not_take_follows_in_order(bench: Bench) -> None:
    """More is written than the socket takes. The protocol is told to stop, and to go on when it has gone out; it comes
    whole and in order, also what was written behind it."""
    bench.transport.set_write_buffer_limits(high=1 << 16)
    much = bytes(range(256)) * (MUCH // 256)
    bench.call(lambda: (bench.transport.write(much), bench.transport.write(b"and more"), bench.transport.close()))
    assert bench.transport.get_write_buffer_size() > 1 << 16
    assert bench.events == ["made", "pause"]
    assert bench.transport.is_closing()
    assert bench.read_all() == much + b"and more"
    assert bench.lost() is None
    assert bench.events == ["made", "pause", "resume", ("lost", None)]


def test_an_end_is_told_behind_what_is_unsent(bench: Bench) -> None:
    """This side has said all; the other one hears that behind all that was said, and may still speak."""
    bench.call(lambda: (bench.transport.write(b"x" * MUCH), bench.transport.write_eof()))
    assert bench.read_all() == b"x" * MUCH
    bench.theirs.sendall(b"last word")
    bench.until(lambda: b"last word" in bench.events)
    assert not bench.transport.is_closing()


@pytest.mark.parametrize("stays_open", [True, False])
def test_the_other_end_has_said_all(bench: Bench, stays_open: bool) -> None:
    """The protocol decides whether it still answers; else this is the end, when what is unsent has gone out."""
    bench.protocol.stays_open_at_eof = stays_open
    bench.call(lambda: bench.transport.write(b"x" * MUCH))
    bench.theirs.sendall(b"bye")
    bench.theirs.shutdown(socket.SHUT_WR)
    bench.until(lambda: "eof" in bench.events)
    assert bench.transport.is_closing() is not stays_open
    if stays_open:
        bench.call(lambda: (bench.transport.write(b"an answer"), bench.transport.close()))
    assert bench.read_all() == b"x" * MUCH + b"an answer" * stays_open
    assert bench.lost() is None
    assert [event for event in bench.events if event in (b"bye", "eof")] == [b"bye", "eof"]


def test_no_reading_while_it_is_paused(bench: Bench) -> None:
    bench.call(bench.transport.pause_reading)
    assert not bench.transport.is_reading()
    bench.theirs.sendall(b"early")
    bench.settle()
    assert bench.events == ["made"]
    bench.call(bench.transport.resume_reading)
    bench.until(lambda: b"early" in bench.events)


def test_a_pause_in_the_middle_of_a_read(bench: Bench) -> None:
    """The protocol pauses when it gets something: nothing further comes until it goes on."""
    bench.protocol.on_data = lambda _: bench.transport.pause_reading()
    bench.theirs.sendall(b"one")
    bench.until(lambda: b"one" in bench.events)
    bench.theirs.sendall(b"two")
    bench.settle()
    assert bench.events == ["made", b"one"]
    bench.call(bench.transport.resume_reading)
    bench.until(lambda: b"two" in bench.events)


def test_abort_drops_what_is_unsent(bench: Bench) -> None:
    """The end comes at once, but not from inside of the call; what is written then goes nowhere."""
    bench.call(lambda: bench.transport.write(b"x" * MUCH))

    def abort() -> None:
        bench.transport.abort()
        assert bench.events[-1] != ("lost", None)

    bench.call(abort)
    assert bench.lost() is None
    with contextlib.suppress(ConnectionResetError):
        assert len(bench.read_all()) < MUCH
    assert bench.mine.fileno() == -1
    bench.call(lambda: (bench.transport.write(b"late"), bench.transport.close(), bench.transport.abort()))
    bench.settle()
    assert bench.events.count(("lost", None)) == 1


def test_a_reset_is_told(bench: Bench) -> None:
    """The other end is gone without a word: the protocol hears of that once, with the error."""
    bench.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    bench.theirs.close()
    assert bench.lost() is ConnectionResetError


def test_writing_to_who_is_gone(bench: Bench) -> None:
    """A write notices it, while nothing is read: the end comes with the error, and not from inside of the call."""
    bench.call(bench.transport.pause_reading)
    bench.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    bench.theirs.close()

    def write() -> None:
        while not bench.transport.is_closing():
            bench.transport.write(b"anyone?")
        assert bench.events == ["made"]

    bench.call(write)
    assert bench.lost() in (BrokenPipeError, ConnectionResetError)


@pytest.mark.parametrize("kind", ["stream", "asyncio"])
def test_a_defect_of_a_protocol_ends_its_connection_alone(kind: str) -> None:
    """It raises; the loop is told, the connection ends with the error, and the loop goes on."""
    with contextlib.closing(Bench(kind)) as bench:

        def fail(data: bytes) -> None:
            raise RuntimeError(f"no idea what {data!r} is")

        bench.protocol.on_data = fail
        bench.theirs.sendall(b"this")
        assert bench.lost() is RuntimeError
        assert [type(facts["exception"]) for facts in bench.failures] == [RuntimeError]
        bench.settle()


def test_what_has_ended_is_not_kept(bench: Bench) -> None:
    """Stream and protocol know each other. When it has ended, nothing is left for the collector of cycles to find."""
    gc.collect()
    gc.disable()
    try:
        kept = weakref.ref(bench.protocol)
        bench.call(bench.transport.abort)
        bench.settle()
        bench.protocol = None  # type: ignore[assignment]
        assert kept() is None
    finally:
        gc.enable()


# --- what only a stream has to do with ------------------------------------------------------------------------


def test_one_that_was_cut_by_another_in_the_same_pass_is_not_read() -> None:
    """Two are ready. Whichever is read first cuts the other one, which is not read any more."""
    with contextlib.closing(Bench("stream")) as bench:
        mine, theirs = bench._pair()
        other = Noting([])

        async def open_other() -> None:
            Stream(mine, other, bench.passes, memoryview(bytearray(100)))

        bench.run(open_other())
        bench.protocol.on_data = lambda _: other.transport.abort()
        other.on_data = lambda _: bench.transport.abort()
        bench.theirs.sendall(b"a")
        theirs.sendall(b"b")
        bench.until(lambda: ("lost", None) in bench.events + other.events)
        bench.settle()
        assert sorted(map(str, bench.events + other.events)) in (
            sorted(["made", "made", "b'a'", "('lost', None)"]),
            sorted(["made", "made", "b'b'", "('lost', None)"]),
        )
        other.transport.abort()
        bench.settle()
        theirs.close()


def test_what_its_protocol_has_no_time_for_stays_with_the_system() -> None:
    """The protocol says no when something has come: it is still there for whoever looks at the socket, and the protocol
    isn't asked again by itself. It gets it as soon as it reads on, without another look of the selector."""
    with contextlib.closing(Bench("stream")) as bench:
        bench.protocol.has_time = False
        bench.theirs.sendall(b"a")
        bench.until(lambda: "not now" in bench.events)
        bench.settle()
        assert bench.events == ["made", "not now"]
        assert bench.mine.recv(10, socket.MSG_PEEK) == b"a"
        bench.protocol.has_time = True
        stream = cast(Stream, bench.transport)
        bench.call(stream.read_now)
        assert bench.events == ["made", "not now"], "it is paused"

        def read_on() -> None:
            stream.resume_reading()
            stream.read_now()
            bench.events.append("read on")
            stream.read_now()  # there is nothing left, which is no harm

        bench.call(read_on)
        assert bench.events == ["made", "not now", b"a", "read on"]


def run(work: Awaitable[Any]) -> Any:
    async def do() -> Any:
        return await asyncio.wait_for(work, PATIENCE_S)

    return asyncio.run(do())


def test_a_few_are_accepted_at_a_time() -> None:
    """Five wait, two are taken in each pass of the loop, so that others have their turn; all are, in the end."""

    async def story() -> list[int]:
        listening = await listen("127.0.0.1", 0, backlog=10)
        address = listening[0].getsockname()
        waiting = [socket.create_connection(address) for _ in range(5)]
        accepted: list[socket.socket] = []
        counts: list[int] = []
        with contextlib.closing(Listener(listening, accepted.append, at_once=2)):
            while len(accepted) < 5:
                await asyncio.sleep(0)
                counts.append(len(accepted))
        for one in (*waiting, *accepted):
            one.close()
        return counts

    counts = run(story())
    assert {2, 4, 5} <= set(counts) <= {0, 2, 4, 5}


def test_nothing_left_to_accept_with(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """No more files may be opened. That is told, the loop does not spin on the connection that waits, and it is taken
    when there are files again."""
    monkeypatch.setattr("raftnode.streams._ACCEPT_AGAIN_S", 0.01)

    class Poor(socket.socket):
        refusals = 3

        def accept(self) -> tuple[socket.socket, Any]:
            if self.refusals:
                self.refusals -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    async def story() -> int:
        poor = Poor()
        poor.bind(("127.0.0.1", 0))
        poor.listen()
        accepted: list[socket.socket] = []
        with (
            contextlib.closing(Listener([poor], accepted.append, at_once=2)),
            socket.create_connection(poor.getsockname()),
        ):
            while not accepted:
                await asyncio.sleep(0.001)
            accepted[0].close()
        return poor.refusals

    with caplog.at_level(logging.WARNING, "raftnode.transport"):
        assert run(story()) == 0
    assert [record.message for record in caplog.records] == ["accept_failed"] * 3


def test_listening_and_connecting() -> None:
    """By an address or by a name, which may have several addresses; who listens no more is refused."""

    async def story(host: str) -> None:
        listening = await listen(host, 0, backlog=10)
        port = listening[0].getsockname()[1]
        accepted: list[socket.socket] = []
        with contextlib.closing(Listener(listening, accepted.append, at_once=2)):
            with await connect(host, port) as connected:
                assert not connected.getblocking()
                while not accepted:
                    await asyncio.sleep(0)
                connected.send(b"hello")
                accepted[0].setblocking(True)
                assert accepted[0].recv(10) == b"hello"
            accepted[0].close()
        with pytest.raises(ConnectionRefusedError):
            await connect(host, port)

    for host in ("127.0.0.1", "::1", "localhost"):
        run(story(host))


def test_a_name_with_odd_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver tells one address twice, as glibc does of localhost where there is no IPv6, and one of a kind that
    this system does not know. The node listens on what there is; with nothing left it says what is wrong."""

    def told(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        known = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
        unknown = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0))
        return [unknown, known, known] if host == "both" else [unknown]

    create = socket.create_server

    def without_ipv6(address: Any, *, family: int, backlog: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return create(address, family=family, backlog=backlog)

    monkeypatch.setattr(socket, "getaddrinfo", told)
    monkeypatch.setattr(socket, "create_server", without_ipv6)
    with create(("127.0.0.1", 0)) as spare:
        port = spare.getsockname()[1]
    (listening,) = run(listen("both", port, backlog=1))
    with listening:
        assert listening.getsockname() == ("127.0.0.1", port)
    with pytest.raises(OSError, match="family not supported"):
        run(listen("ipv6 only", port, backlog=1))


def test_who_can_not_be_found() -> None:
    with pytest.raises(socket.gaierror):
        run(connect("no-such-host.invalid", 5001))
    with pytest.raises(OSError, match="assign requested address"):
        run(listen("192.0.2.1", 5001, backlog=1))  # an address for documents: no machine has it
