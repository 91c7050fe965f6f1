"""The end of a pass of the loop: behind the last of all that was ready, and always before the loop waits."""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import socket
from collections.abc import Callable, Iterator

import pytest

from raftnode.passes import PassSelector

PATIENCE_S = 20.0
ASKED = "asked for more"


class Noting(PassSelector):
    """Notes when the system is asked for what is ready."""

    def __init__(self, events: list[str]) -> None:
        super().__init__(lambda: events.append("end"))
        self.events = events

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.events.append(ASKED)
        return super().select(timeout)


class Reader(asyncio.Protocol):
    """Notes what it reads, asks for the end of the pass, and says that it has read."""

    def __init__(self, name: str, passes: Noting) -> None:
        self.name = name
        self.passes = passes

    def data_received(self, data: bytes) -> None:
        self.passes.events.append(f"{self.name} {data.decode()}")
        self.passes.end_soon()
        self.passes.has_read()


class Stage:
    """A loop with the selector, and sockets that are connected to it."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.passes = Noting(self.events)
        self.loop = asyncio.SelectorEventLoop(self.passes)
        self._transports: list[asyncio.BaseTransport] = []
        self._ends: list[socket.socket] = []

    def connect(self, name: str) -> socket.socket:
        mine, theirs = socket.socketpair()
        making = self.loop.create_connection(lambda: Reader(name, self.passes), sock=mine)
        self._transports.append(self.loop.run_until_complete(making)[0])
        self._ends.append(theirs)
        return theirs

    def run_until(self, condition: Callable[[], bool]) -> None:
        """Let the loop go on until this holds."""

        async def until() -> None:
            while not condition():
                await asyncio.sleep(0.001)

        self.loop.run_until_complete(asyncio.wait_for(until(), PATIENCE_S))

    def close(self) -> None:
        for transport in self._transports:
            transport.close()
        self.loop.run_until_complete(asyncio.sleep(0.01))
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


def test_the_end_comes_when_something_was_ready_that_is_not_read(stage: Stage) -> None:
    """A new connection is ready in the same pass, so it is not known what was the last: the end comes with the next
    pass, which does not wait."""
    stage.connect("first").send(b"a")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listening:
        stage.loop.add_reader(listening, lambda: stage.loop.remove_reader(listening))
        with socket.create_connection(listening.getsockname()):
            stage.events.clear()
            stage.run_until(lambda: "end" in stage.events)
    at = stage.events.index("first a")
    assert stage.events[at : at + 3] == ["first a", ASKED, "end"]


def test_the_end_is_asked_for_when_nothing_is_read(stage: Stage) -> None:
    """A timer, or another thread, asks for it: it comes, once for all that ask at the time."""
    for _ in range(2):
        stage.loop.call_soon(stage.passes.end_soon)
    stage.run_until(lambda: "end" in stage.events)
    stage.run_until(lambda: True)
    assert stage.events.count("end") == 1
    stage.loop.call_soon_threadsafe(stage.passes.end_soon)
    stage.run_until(lambda: stage.events.count("end") == 2)
