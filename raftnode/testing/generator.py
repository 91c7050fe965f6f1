"""The load generator: a process that offers `load` over sockets, cheaply, and tells how long each request took.

    plan = Plan(addresses=[node.address], workload="put", connections=100, seconds=5)
    with Generator(plan) as generator:
        generator.await_ready()
        generator.begin(time.monotonic())
        report = generator.report(timeout=30)

`python -m raftnode.testing.generator` is that process. It is told its plan and the beginning on stdin, and tells
`Ready`, `Progress` and its `Report` on stdout, each a line of JSON. Bytes that do not change from request to request
are made beforehand, and of an answer only `id` and `error` are decoded.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self, cast

import msgspec
from msgspec import Struct

from raftnode.config import parse_address
from raftnode.testing.limited import allow_files
from raftnode.testing.load import PAUSE_S, Core, Kind, Plan, Progress, Ready, Report, Slot
from raftnode.testing.processes import PATIENCE_S, NotReached, command_environment

_LEAST_TICK_S: Final = 0.0002


# --- in the process ---------------------------------------------------------------------------------------------


class _ErrorDetail(Struct):
    code: str


class _Reply(Struct):
    """What is looked at of an answer."""

    id: int = -1
    error: _ErrorDetail | None = None


_decode_reply: Final = msgspec.json.Decoder(_Reply).decode
_ABSENT: Final[dict[Kind, bytes]] = {"put": b"\n", "get": b'"value":null', "delete": b'"replaced":null'}
"""What an answer holds whose request met no value; a put needs none, and no line holds its own end."""


class _Connection(asyncio.Protocol):
    """One connection, with its slots."""

    def __init__(self, core: Core, ended: Callable[[_Connection], None]) -> None:
        self.slots = [Slot(self, n) for n in range(core.plan.in_flight)]
        self._core = core
        self._ended = ended
        self._rest = b""
        self._lines: list[bytes] = []
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)
        self._core.connected(self.slots)

    def send(self, line: bytes) -> None:
        self._lines.append(line)

    def flush(self) -> None:
        """Everything in one write: what comes together goes together."""
        if self._lines and self._transport is not None:
            self._transport.write(b"".join(self._lines))
            self._lines.clear()

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take(line, now)
        self.flush()

    def _take(self, line: bytes, now: float) -> None:
        core = self._core
        try:
            reply = _decode_reply(line)
            slot = self.slots[reply.id] if 0 <= reply.id < len(self.slots) else None
        except msgspec.MsgspecError:
            core.unasked["bad_answer"] += 1
            return
        if slot is None or slot.kind is None:
            core.unasked[reply.error.code if reply.error else "bad_answer"] += 1
        elif reply.error is not None:
            core.ended_badly(slot, now, reply.error.code)
        else:
            core.ended_well(slot, now, is_absent=_ABSENT[slot.kind] in line)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._core.lost(self, self.slots, time.monotonic())
        self._ended(self)


class _Run:
    """The generator's process: the core, its connections, and who started it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._loop = asyncio.get_running_loop()
        self._core = Core(plan, time.monotonic, self._loop.call_later)
        self._connections: dict[_Connection, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._told_to_begin: asyncio.Future[float] = self._loop.create_future()
        self._is_closing = False
        self._cpu_s = 0.0

    async def run(self) -> Report:
        for number in range(self._plan.connections):
            await self._connect(number)
        self._loop.add_reader(0, self._read_orders)
        _tell(Ready())
        at = await self._told_to_begin
        self._loop.call_at(at + self._plan.warm_up_s, self._measure)
        self._tick_regularly(at)
        self._core.begin(at)
        self._loop.call_at(at, self._core.tick)
        await self._follow()
        return self._report()

    async def _connect(self, number: int) -> None:
        """Open a connection to the address whose turn it is."""
        address = self._plan.addresses[number % len(self._plan.addresses)]
        host, port = parse_address(address)
        _, connection = await self._loop.create_connection(lambda: _Connection(self._core, self._lost), host, port)
        self._connections[connection] = number

    def _lost(self, connection: _Connection) -> None:
        number = self._connections.pop(connection, 0)
        if not self._is_closing:
            task = self._loop.create_task(self._reconnect(number + 1))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _reconnect(self, number: int) -> None:
        while not self._is_closing:
            await asyncio.sleep(PAUSE_S)
            try:
                await self._connect(number)
            except OSError:
                number += 1
            else:
                return

    def _read_orders(self) -> None:
        """The first line is when to begin; the next one, or the end of the input, says stop."""
        words = os.read(0, 1000).split()
        if words and not self._told_to_begin.done():
            self._told_to_begin.set_result(float(words.pop(0)))
            if not words:
                return
        self._loop.remove_reader(0)
        self._core.stop()
        if not self._told_to_begin.done():
            self._told_to_begin.set_result(time.monotonic())

    def _measure(self) -> None:
        self._cpu_s = time.process_time()

    def _tick_regularly(self, at: float) -> None:
        """Wake the core when requests get due. By a signal: the loop's own timers are only good to a millisecond."""
        if self._plan.rate:
            tick = max(_LEAST_TICK_S, self._plan.of / self._plan.rate)
            self._loop.add_signal_handler(signal.SIGALRM, self._core.tick)
            signal.setitimer(signal.ITIMER_REAL, max(at - time.monotonic(), 1e-6), tick)

    async def _follow(self) -> None:
        """Tell how it goes until the measured time is over, and then until all is answered."""
        core, told, now = self._core, time.monotonic(), time.monotonic()
        cpu_s = None
        while not core.is_done() and now < core.ended + self._plan.patience_s:
            if now >= told:
                _tell(Progress(core.answered, core.failed, core.last))
                told = now + self._plan.tell_s
            if cpu_s is None and now >= core.ended:
                cpu_s = time.process_time()
            wake = core.ended if cpu_s is None else now + PAUSE_S
            step = PAUSE_S if self._plan.seconds is None else self._plan.tell_s
            await asyncio.sleep(max(0.0, min(wake, told, now + step) - now))
            now = time.monotonic()
        core.stop()
        self._cpu_s = (time.process_time() if cpu_s is None else cpu_s) - self._cpu_s

    def _report(self) -> Report:
        self._is_closing = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        core = self._core
        core.close(slot for connection in self._connections for slot in connection.slots)
        return Report(
            tallies=core.tallies(),
            began=core.began,
            ended=core.ended,
            cpu_s=self._cpu_s,
            late=core.late.tobytes(),
            uvloop="uvloop" in sys.modules,
            unasked=dict(core.unasked),
            lost_connections=core.lost_connections,
            times=core.times.tobytes(),
        )


def _tell(line: Ready | Progress | Report) -> None:
    """All of it: a report has millions of bytes, and a pipe may take a part of them at a time."""
    left = memoryview(msgspec.json.encode(line) + b"\n")
    while left:
        left = left[os.write(1, left) :]


def main() -> None:
    """Take a plan from stdin, and carry it out."""
    plan = msgspec.json.decode(os.read(0, 1 << 16), type=Plan)
    allow_files()
    gc.disable()  # makes no cycles, and a collection would be a pause in what it measures
    runner: Any = asyncio.run
    with contextlib.suppress(ImportError):
        import uvloop

        runner = uvloop.run

    async def run() -> Report:
        return await _Run(plan).run()

    _tell(runner(run()))


# --- for whoever starts one -----------------------------------------------------------------------------------

_decode_line: Final = msgspec.json.Decoder(Ready | Progress | Report).decode


class Generator:
    """The process of a load generator, and what it tells. Ends with its block, whatever it does."""

    def __init__(self, plan: Plan) -> None:
        self.latest = Progress(0, 0, 0.0)
        self._news = threading.Condition()
        self._lines: list[Ready | Report] = []
        self._has_ended = False
        command = [sys.executable, "-m", "raftnode.testing.generator"]
        self._process = subprocess.Popen(
            command,
            env=command_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for who started us; it ends with our block
        )
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        self._order(msgspec.json.encode(plan))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._thread.join()
        with self._process:
            self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None, "it was asked for"
        for line in self._process.stdout:
            if not line.endswith(b"\n"):
                break  # it was killed in the middle of it: whoever awaits it is told that it has ended
            found = _decode_line(line)
            with self._news:
                if isinstance(found, Progress):
                    self.latest = found
                else:
                    self._lines.append(found)
                self._news.notify_all()
        with self._news:
            self._has_ended = True
            self._news.notify_all()

    def _order(self, line: bytes) -> None:
        assert self._process.stdin is not None, "it was asked for"
        with contextlib.suppress(BrokenPipeError):  # it has ended: whoever awaits it is told
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()

    def _await(self, kind: type[Any], timeout: float) -> Any:
        def found() -> bool:
            return self._has_ended or any(isinstance(line, kind) for line in self._lines)

        with self._news:
            self._news.wait_for(found, timeout)
            for line in self._lines:
                if isinstance(line, kind):
                    return line
        why = "it has ended" if self._has_ended else f"not within {timeout:g} s"
        raise NotReached(f"awaited: the load generator's {kind.__name__.lower()}; {why}")

    def await_ready(self, timeout: float = PATIENCE_S) -> None:
        """Wait until all of its connections are open. Raises NotReached."""
        self._await(Ready, timeout)

    def begin(self, at: float) -> None:
        """Load from `at` on, monotonic seconds."""
        self._order(repr(at).encode())

    def stop(self) -> None:
        """Send no more, and report."""
        self._order(b"stop")

    def report(self, timeout: float) -> Report:
        """Wait for its report. Raises NotReached."""
        found: Report = self._await(Report, timeout)
        return found

    @property
    def has_reported(self) -> bool:
        """It has, or has ended without."""
        with self._news:
            return self._has_ended or any(isinstance(line, Report) for line in self._lines)


if __name__ == "__main__":
    main()
