"""The passes of the loop. Each reads the streams that are ready and has its end behind the last of them, and always
before the loop waits; and it waits without sleep where the next is near."""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import socket
from collections.abc import Callable, Iterator

import pytest

from raftnode.passes import PassSelector
from raftnode.streams import Stream, StreamProtocol

PATIENCE_S = 20.0
ASKED = "asked for more"


class Noting(PassSelector):
    """Notes when the system is asked for what is ready."""

    def __init__(self, events: list[str]) -> None:
        super().__init__(lambda: events.append("end"), poll_s=0.0002)
        self.events = events

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.events.append(ASKED)
        return super().select(timeout)


class Reader(StreamProtocol):
    """Notes what it reads, and asks for the end of the pass."""

    def __init__(self, name: str, passes: Noting) -> None:
        self.name = name
        self.passes = passes

    def data_received(self, data: bytes) -> None:
        self.passes.events.append(f"{self.name} {data.decode()}")
        self.passes.end_soon()


class Stage:
    """A loop with the selector, and sockets that are connected to it."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.passes = Noting(self.events)
        self.loop = asyncio.SelectorEventLoop(self.passes)
        self._streams: list[Stream] = []
        self._ends: list[socket.socket] = []

    def connect(self, name: str) -> socket.socket:
        mine, theirs = socket.socketpair()
        mine.setblocking(False)
        self.loop.run_until_complete(self._open(mine, Reader(name, self.passes)))
        self._ends.append(theirs)
        return theirs

    async def _open(self, mine: socket.socket, reader: Reader) -> None:
        self._streams.append(Stream(mine, reader, self.passes, memoryview(bytearray(100))))

    def run_until(self, condition: Callable[[], bool]) -> None:
        """Let the loop go on until this holds."""

        async def until() -> None:
            while not condition():
                await asyncio.sleep(0.001)

        self.loop.run_until_complete(asyncio.wait_for(until(), PATIENCE_S))

    def close(self) -> None:
        for stream in self._streams:
            stream.abort()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()
        for end in self._ends:
            end.close()


@pytest.fixture
def stage() -> Iterator[Stage]:
    with contextlib.closing(Stage()) as stage:
        yield stage


def test_the_end_comes_right_behind_the_last_that_was_ready(stage: Stage) -> None:
    """Two sockets are ready in one pass: both are read, then comes one end for both, and the system is not asked for
    more in between."""
    first, second = stage.connect("first"), stage.connect("second")
    first.send(b"a")
    second.send(b"b")
    stage.events.clear()
    stage.run_until(lambda: "end" in stage.events)
    at = stage.events.index("end")
    assert {stage.events[at - 2], stage.events[at - 1]} == {"first a", "second b"}
    stage.run_until(lambda: True)
    assert stage.events.count("end") == 1


def test_what_asyncio_looks_after_is_left_to_it(stage: Stage) -> None:
    """A new connection is ready in the same pass. The stream is read and the end comes at once; then asyncio calls back
    whoever looks after the connection, and the end that this one asks for comes before the loop waits for anything."""
    stage.connect("first").send(b"a")

    def accept() -> None:
        stage.loop.remove_reader(listening)
        stage.events.append("accepted")
        stage.passes.end_soon()

    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listening:
        stage.loop.add_reader(listening, accept)
        with socket.create_connection(listening.getsockname()):
            stage.events.clear()
            stage.run_until(lambda: stage.events.count("end") == 2)
    at = stage.events.index("first a")
    assert stage.events[at : at + 5] == ["first a", "end", "accepted", ASKED, "end"]


def test_the_end_is_asked_for_when_nothing_is_read(stage: Stage) -> None:
    """A timer, or another thread, asks for it: it comes, once for all that ask at the time."""
    for _ in range(2):
        stage.loop.call_soon(stage.passes.end_soon)
    stage.run_until(lambda: "end" in stage.events)
    stage.run_until(lambda: True)
    assert stage.events.count("end") == 1
    stage.loop.call_soon_threadsafe(stage.passes.end_soon)
    stage.run_until(lambda: stage.events.count("end") == 2)


# --- how it waits ---------------------------------------------------------------------------------------------


class Near:
    """A selector with a socket, at a clock of its own. The socket is ready when `ready_in` seconds have passed, of
    which each look takes 10 us; a sleep takes as long as it must. `looks` are the timeouts with which the system was
    asked, one list for each wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.ready_at = 0.0
        self.looks: list[list[float | None]] = []
        self.passes = PassSelector(lambda: None, poll_s=0.0002, clock=lambda: self.now)
        monkeypatch.setattr(selectors.DefaultSelector, "select", lambda _passes, timeout: self.look(timeout))

    def look(self, timeout: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        self.looks[-1].append(timeout)
        self.now += 1e-5
        if timeout != 0:
            self.now = max(self.now, min(self.ready_at, self.now + (timeout or 1e9)))
        key = selectors.SelectorKey(0, 0, selectors.EVENT_READ, None)
        return [(key, selectors.EVENT_READ)] if self.now >= self.ready_at else []

    def wait(self, ready_in: float, timeout: float | None = None) -> bool:
        """Wait once; whether the socket was ready at the end."""
        self.ready_at = self.now + ready_in
        self.looks.append([])
        return bool(self.passes.select(timeout))

    def slept(self) -> bool:
        """... in the last wait."""
        return self.looks[-1][-1] != 0


def test_it_sleeps_until_what_comes_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sleeps until something was ready within the time. From then on it looks again and again. The first time in
    vain, it looks no longer than the time, and sleeps from then on."""
    near = Near(monkeypatch)
    assert near.wait(0.0001)
    assert near.slept(), "what came first could not be known to be near"
    for _ in range(3):
        assert near.wait(0.0001)
        assert not near.slept()
    assert near.wait(1.0)
    assert near.slept()
    assert 2 < len(near.looks[-1]) <= 22, "looked for 0.2 ms, in steps of 0.01, then slept"
    assert near.wait(1.0)
    assert near.looks[-1] == [0, None], "one look, then sleep"


def test_what_is_ready_at_once_takes_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is busy there is no time to be lost: a socket that is ready is found by the first look, without the
    clock being read."""
    near = Near(monkeypatch)
    monkeypatch.setattr(near.passes, "_clock", lambda: pytest.fail("the clock was read"))
    for _ in range(3):
        assert near.wait(0.0)
        assert near.looks[-1] == [0]


def test_a_pass_that_may_not_wait_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio asks with no time while it has callbacks to call, and with little when a timer is due: then one look must
    do, or a sleep of that time, however near the next one may be."""
    near = Near(monkeypatch)
    near.wait(0.0001)
    assert not near.wait(0.0001, timeout=0)
    assert near.looks[-1] == [0]
    assert not near.wait(1.0, timeout=0.0001)
    assert near.looks[-1] == [0, 0.0001]
    near.wait(0.0001)
    assert not near.wait(1.0, timeout=0.5), "looked in vain, slept in vain: it returns for the timer"
    assert near.looks[-1][-1] == 0.5
