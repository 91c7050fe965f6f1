"""A well-behaved client in a process of its own, which shares no lock with whoever attacks the same node meanwhile.

    with SteadyClients(node.address) as steady:
        steady.figures()                # of the time since it began, or since the last call
        ...
        assert not steady.figures().failures
    steady.written                      # what it was told is committed

It writes and reads at a steady pace on two connections, one request at a time on each, and checks every answer: a read
must show a value at least as new as the last that was acknowledged before it was asked for.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from raftnode.blocking import LineConnection
from raftnode.messages import decode_object, encode_object
from raftnode.testing.processes import command_environment

NAMESPACE: Final = "steady"
_PACE_S: Final = 0.004
_PATIENCE_S: Final = 20.0
_KEYS: Final = 20
_LIMIT: Final = 1 << 20


class Figures(NamedTuple):
    """Of one stretch of time. Times in milliseconds."""

    requests: int
    p50: float
    p99: float
    longest: float
    failures: list[str]

    def __str__(self) -> str:
        return f"{self.requests} requests, p50 {self.p50:.1f} p99 {self.p99:.1f} max {self.longest:.0f} ms"


class Written(NamedTuple):
    """A put that was acknowledged."""

    commit_id: int
    key: str
    value: Any


class SteadyClients:
    """The process, and what it tells."""

    def __init__(self, address: str) -> None:
        self.written: list[Written] = []
        """Complete after the block."""
        command = [sys.executable, "-m", "raftnode.testing.steady", address]
        self._process = subprocess.Popen(
            command, env=command_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def figures(self) -> Figures:
        """Those of the time since the last call."""
        assert self._process.stdin is not None
        self._process.stdin.write("figures\n")
        self._process.stdin.flush()
        return Figures(*self._line())

    def _line(self) -> list[Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the steady clients have ended before they were told to"
        found: list[Any] = json.loads(line)
        return found

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                assert self._process.stdin is not None
                self._process.stdin.close()
                self.written = [Written(*each) for each in self._line()]
        finally:
            self.end()

    def end(self) -> None:
        """End the process, whatever it does; does nothing when it has ended."""
        self._process.kill()
        with self._process:
            self._process.wait()


class _Clients:
    """The two, each in a thread."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._done = threading.Event()
        self._acknowledged = -1  # number of the newest put that was
        self._written: list[Written] = []
        self._times: list[float] = []
        self._failures: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(each,)) for each in (self._put, self._get)]

    def run(self) -> None:
        for thread in self._threads:
            thread.start()
        for _ in sys.stdin:
            self._tell(self._figures())
        self._done.set()
        for thread in self._threads:
            thread.join()
        self._tell(self._written)

    @staticmethod
    def _tell(found: Any) -> None:
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()

    def _figures(self) -> Figures:
        times, failures = self._times, self._failures
        self._times, self._failures = [], []
        ranked = [1000 * each for each in sorted(times)] or [0.0]
        p50, p99 = (ranked[len(ranked) * part // 100] for part in (50, 99))
        return Figures(len(times), p50, p99, ranked[-1], failures)

    def _run(self, request: Any) -> None:
        connection = LineConnection(self._address, _PATIENCE_S, _LIMIT)
        with contextlib.closing(connection):
            number = 0
            while not self._done.wait(_PACE_S):
                began = time.monotonic()
                try:
                    request(connection, number)
                except Exception as error:  # told to whoever asks for figures: the verdict is theirs
                    self._failures.append(f"{request.__name__[1:]} {number}: {type(error).__name__}: {error}")
                    return
                self._times.append(time.monotonic() - began)
                number += 1

    def _put(self, connection: LineConnection, number: int) -> None:
        key = f"k{number % _KEYS}"
        answer = self._ask(connection, {"type": "put", "namespace": NAMESPACE, "key": key, "value": number})
        self._written.append(Written(answer["commit_id"], key, number))
        self._acknowledged = number

    def _get(self, connection: LineConnection, number: int) -> None:  # noqa: ARG002 - reads what was written last
        newest = self._acknowledged
        if newest >= 0:
            message = {"type": "get", "namespace": NAMESPACE, "key": f"k{newest % _KEYS}"}
            found = self._ask(connection, message)["data"]["value"]
            assert found >= newest, f"read {found}, but {newest} was acknowledged before"

    @staticmethod
    def _ask(connection: LineConnection, message: dict[str, Any]) -> dict[str, Any]:
        answer = decode_object(connection.request(encode_object(message), _PATIENCE_S))
        assert "error" not in answer, f"{message} was answered {answer}"
        return answer


if __name__ == "__main__":
    _Clients(sys.argv[1]).run()
