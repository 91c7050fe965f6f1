"""What measures must be right itself: the arithmetic of open and closed loop, of percentiles and of outages, on
scripted servers and a clock that is moved by hand; that no failure is dropped; and short runs of every measurement
against real nodes, for the names that they give. No figure of this machine is judged."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import random
import socket
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from raftnode.messages import Delete, Get, Put, decode_request
from raftnode.testing import generator, results
from raftnode.testing.generator import Generator
from raftnode.testing.load import NAMESPACE, PAUSE_S, Core, Plan, Report, Slot, Tally, as_seconds, key_of
from raftnode.testing.machine import cpu_seconds, disk_written_bytes, file_system_of, written_bytes
from raftnode.testing.measuring import Load, NodeSample, costs, elections
from raftnode.testing.processes import NodeProcess, NotReached, free_address


def _load_tool(name: str) -> ModuleType:
    file = Path(__file__).resolve().parents[1] / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


tool = _load_tool("bench")


# --- the core, on a scripted server ---------------------------------------------------------------------------


class Script:
    """A core with connections to a server that answers when the test says so, in a time that the test moves on."""

    def __init__(self, **plan: Any) -> None:
        self.now = 0.0
        self.plan = Plan(addresses=["a:1"], **{"workload": "put", **plan})
        self.core = Core(self.plan, lambda: self.now, self._later)
        self.sent: list[dict[str, Any]] = []
        self.connections = [self.Sink(self) for _ in range(self.plan.connections)]
        self._laters: list[tuple[float, Callable[[], None]]] = []
        for connection in self.connections:
            self.core.connected(connection.slots)

    class Sink:
        """A connection, of which only what was sent is of interest."""

        def __init__(self, script: Script) -> None:
            self.slots = [Slot(self, n) for n in range(script.plan.in_flight)]
            self.script = script

        def send(self, line: bytes) -> None:
            self.script.sent.append(json.loads(line))

        def flush(self) -> None:
            """Sent is sent."""

    def _later(self, delay: float, function: Callable[[], None]) -> None:
        self._laters.append((self.now + delay, function))

    def to(self, moment: float) -> None:
        """Time moves on; what was put off happens, and the timer ticks."""
        self.now = moment
        due = [function for at, function in self._laters if at <= moment]
        self._laters = [(at, function) for at, function in self._laters if at > moment]
        for function in due:
            function()
        self.core.tick()

    @property
    def under_way(self) -> list[Slot]:
        return [slot for connection in self.connections for slot in connection.slots if slot.kind is not None]

    def answer(self, count: int | None = None, is_absent: bool = False) -> None:
        """The server answers what is under way now, or so many of it, the oldest first."""
        for slot in sorted(self.under_way, key=lambda slot: slot.began)[:count]:
            self.core.ended_well(slot, self.now, is_absent)

    def close(self) -> Tally:
        """The end; the tally of the one kind of request."""
        self.core.close(slot for connection in self.connections for slot in connection.slots)
        (tally,) = self.core.tallies()
        return tally


def latencies(tally: Tally) -> list[float]:
    return [round(each, 6) for each in as_seconds(tally.latencies)]


def test_open_loop_counts_the_waiting_of_requests_that_could_not_be_sent() -> None:
    """Ten requests a second are due, over one connection that takes one at a time. The server hangs for a second and
    then answers at once. A closed loop would have seen one slow request; the open loop has ten that were due meanwhile,
    and each has waited for as long as its user would have."""
    script = Script(rate=10.0, seconds=1.5)
    script.core.begin(0.0)
    for moment in range(1, 11):
        script.to(moment / 10)
    assert len(script.sent) == 1, "the only connection is taken"
    for _ in range(11):
        script.answer()  # each answer makes room for the next
    for moment in (1.1, 1.2, 1.3, 1.4, 1.5):
        script.to(moment)
        script.answer()
    assert latencies(script.close()) == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_connections_have_their_turns() -> None:
    """One connection does not get all until it is full. Else seconds could pass in which only a node that hangs is
    asked, and they would be counted as an outage of the others."""
    script = Script(rate=10.0, seconds=2.0, connections=3, in_flight=100)
    script.core.begin(0.0)
    for moment in range(1, 13):
        script.to(moment / 10)
        script.answer(moment % 2)
    assert len(script.sent) == 13
    assert [[slot.kind for slot in c.slots].count("put") for c in script.connections] == [3, 2, 2]
    script.core.lost(script.connections[0], script.connections[0].slots, 1.2)
    for moment in range(13, 19):
        script.to(moment / 10)
    assert [[slot.kind for slot in c.slots].count("put") for c in script.connections] == [0, 5, 5]


def test_open_loop_offers_the_same_load_to_a_slow_server() -> None:
    """With room for them, requests go out when they are due, answered or not; those that the timer sends late say by
    how much."""
    script = Script(rate=100.0, seconds=1.0, connections=2, in_flight=100)
    script.core.begin(0.0)
    script.to(0.095)
    assert len(script.sent) == 10
    late = [round(each, 6) for each in script.core.late]
    assert late == [0.0, 0.085, 0.075, 0.065, 0.055, 0.045, 0.035, 0.025, 0.015, 0.005]


def test_generators_that_share_a_rate_take_turns() -> None:
    """Three generators at 30 requests a second together: each takes every third, and together they are even."""
    scripts = [Script(rate=30.0, seconds=1.0, in_flight=100, number=n, of=3) for n in range(3)]
    for script in scripts:
        script.core.begin(0.0)
        script.to(0.999)
    began = sorted(slot.began for script in scripts for slot in script.under_way)
    assert began == pytest.approx([n / 30 for n in range(30)])


def test_every_request_that_was_due_has_one_outcome() -> None:
    """The server answers two of ten, refuses one, and hangs; the connection takes three at a time. At the end three
    were sent and have no answer, and four were due and never sent: all ten are told."""
    script = Script(rate=10.0, seconds=1.0, in_flight=3)
    script.core.begin(0.0)
    for moment in (0.1, 0.2):
        script.to(moment)
    script.answer(2)
    script.core.ended_badly(script.under_way[0], script.now, "overloaded")
    for moment in range(3, 16):
        script.to(moment / 10)
    assert not script.core.is_done(), "there is something to wait for"
    tally = script.close()
    assert len(latencies(tally)) == 2
    assert tally.failures == {"overloaded": 1, "unanswered": 3, "not_sent": 4}
    assert tally.longest_failure_s == pytest.approx(1.2), "the first that was never answered was due at 0.3"


def test_closed_loop_sends_the_next_when_one_is_answered() -> None:
    """Two connections with two requests each: four are under way at any time, until the end."""
    script = Script(seconds=1.0, connections=2, in_flight=2)
    script.core.begin(0.0)
    assert len(script.sent) == 4
    script.to(0.25)
    script.answer()
    assert len(script.sent) == 8
    script.to(1.0)
    script.answer()
    assert len(script.sent) == 8, "the time is over"
    assert script.core.is_done()
    tally = script.close()
    assert latencies(tally) == [0.25] * 4 + [0.75] * 4
    assert tally.finished == 4, "what came after the end is no throughput"


def test_only_the_measured_time_counts() -> None:
    """What was sent while the server warmed up is not measured, though its answer, which came later, is throughput;
    what was sent in the measured time and answered after it is measured, and is no throughput."""
    script = Script(warm_up_s=1.0, seconds=1.0)
    script.core.begin(0.0)
    script.to(0.5)
    script.answer()
    script.to(1.5)
    script.answer()
    script.to(2.5)
    script.answer()
    tally = script.close()
    assert latencies(tally) == [1.0]
    assert tally.finished == 1


def test_failures_are_counted_and_followed_by_a_pause() -> None:
    """A server that refuses at once is not asked again at once: that would measure how fast it refuses."""
    script = Script(seconds=10.0)
    script.core.begin(0.0)
    script.core.ended_badly(script.under_way[0], script.now, "no_leader")
    script.to(PAUSE_S / 2)
    assert len(script.sent) == 1
    script.to(2 * PAUSE_S)
    assert len(script.sent) == 2
    script.to(1.0)
    script.core.stop()
    assert script.close().failures == {"no_leader": 1, "unanswered": 1}


def test_a_lost_connection_fails_what_was_under_way_on_it() -> None:
    """One of two connections breaks: its three requests have failed, those of the other go on, and nothing is sent on
    the broken one any more."""
    script = Script(seconds=10.0, connections=2, in_flight=3)
    broken, other = script.connections
    script.core.begin(0.0)
    script.core.lost(broken, broken.slots, 0.5)
    script.to(1.0)
    assert [slot.sink for slot in script.under_way] == [other] * 3
    script.core.stop()
    script.answer()
    tally = script.close()
    assert tally.failures == {"connection_lost": 3}
    assert latencies(tally) == [1.0] * 3


def test_filling_ends_when_every_key_is_there() -> None:
    """A key whose put was refused is put again, and as long as one is missing it is not done."""
    script = Script(workload="fill", keys=5, first=1, connections=1, in_flight=4)
    script.core.begin(0.0)
    for slot in script.under_way:
        script.core.ended_badly(slot, script.now, "overloaded")
    assert not script.core.is_done(), "four keys are to be tried again"
    script.to(2 * PAUSE_S)
    script.answer()
    assert script.core.is_done()
    assert [sent["key"][-1] for sent in script.sent] == ["1", "2", "3", "4"] * 2


def test_deletes_take_each_key_once_before_one_comes_again() -> None:
    """Two generators delete from a thousand keys: each key is met once, and then the absent ones are told."""
    scripts = [Script(workload="delete", keys=1000, in_flight=500, seconds=1.0, number=n, of=2) for n in range(2)]
    for script in scripts:
        script.core.begin(0.0)
    assert len({sent["key"] for script in scripts for sent in script.sent}) == 1000
    scripts[0].to(0.5)
    scripts[0].answer(7, is_absent=True)
    assert scripts[0].close().absent == 7


# --- what it asks for -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workload", "kinds"),
    [("put", {Put}), ("get", {Get}), ("get-local", {Get}), ("delete", {Delete}), ("mixed", {Put, Get})],
)
def test_requests_are_messages_of_the_size_that_was_asked_for(workload: str, kinds: set[type]) -> None:
    """Lines are made of parts that were prepared: whole, they have to be messages that a node takes."""
    script = Script(workload=workload, in_flight=50, keys=20, key_bytes=33, value_bytes=77, seconds=1.0)
    script.core.begin(0.0)
    requests = [decode_request(json.dumps(sent).encode()) for sent in script.sent]
    assert {type(request) for request in requests} == kinds
    for request in requests:
        assert isinstance(request, Put | Get | Delete)
        assert request.namespace == NAMESPACE
        assert len(request.key) == 33
        assert request.key in {key_of(n, 33) for n in range(20)}
        if isinstance(request, Put):
            assert len(bytes(request.value)) == 77 + len('""')
        if isinstance(request, Get):
            assert request.consistency == ("local" if workload == "get-local" else "linearizable")


def test_new_keys_are_none_of_those_that_are_there() -> None:
    """`new_keys` inserts among the keys that exist; without it, puts overwrite. The seed decides which."""
    first, again, other = (
        Script(in_flight=100, keys=1000, key_bytes=10, seconds=1.0, new_keys=True, seed=seed) for seed in (1, 1, 2)
    )
    for script in (first, again, other):
        script.core.begin(0.0)
    assert all(int(sent["key"]) >= 1000 for sent in first.sent)
    assert first.sent == again.sent != other.sent


def test_keys_that_are_too_short_are_refused() -> None:
    """A key holds its number."""
    with pytest.raises(ValueError, match="at least 10"):
        Plan(addresses=[], workload="put", key_bytes=9)


def test_load_is_shared_among_generators() -> None:
    """No connection is lost in dividing, and there are never more generators than connections."""
    plans = Load(connections=10, processes=4).plans(["a:1", "a:2", "a:3"])
    assert [plan.connections for plan in plans] == [3, 3, 2, 2]
    assert [(plan.number, plan.of) for plan in plans] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [plan.addresses[0] for plan in plans] == ["a:1", "a:2", "a:3", "a:1"]
    assert len(Load(connections=2, processes=4).plans(["a:1"])) == 2


# --- arithmetic -----------------------------------------------------------------------------------------------


def test_percentiles_are_times_that_were_measured() -> None:
    """Nearest rank: of 1000 times, the 99.9th percentile is the 999th, and not the worst."""
    ranked = [float(n) for n in range(1, 1001)]
    assert [results.percentile(ranked, each) for each in (50, 90, 99, 99.9, 100)] == [500, 900, 990, 999, 1000]
    assert results.percentile([7.0], 50) == results.percentile([7.0], 99.9) == 7.0
    chance = random.Random(1)
    times = [chance.random() for _ in range(777)]
    for percent in (50, 90, 99, 99.9):
        found = results.percentile(sorted(times), percent)
        assert sum(each <= found for each in times) == math.ceil(777 * percent / 100)


def test_latency_is_told_in_milliseconds() -> None:
    found = results.latency_of([0.002, 0.001, 0.006])
    assert found == results.Latency(2.0, 6.0, 6.0, 6.0, 6.0, pytest.approx(3.0))
    assert results.latency_of([]) is None


def test_an_outage_ends_with_the_first_answer_after_the_silence() -> None:
    """At the fault, an answer was on its way and came 10 ms later: that is not the end of the outage. Nor does a
    silence after the healing began count."""
    answers = [0.8, 0.9, 1.0, 1.01, 2.5, 2.51, 3.0, 9.0]
    assert results.outage(answers, 1.0, 3.5) == pytest.approx(1.5)
    assert results.longest_gap(answers) == pytest.approx(6.0)
    assert results.outage([0.5], 1.0, 4.0) == pytest.approx(3.0), "nothing came at all"


def packed(*seconds: float) -> bytes:
    return array("d", seconds).tobytes()


def report(*tallies: Tally, **facts: Any) -> Report:
    known = {"began": 10.0, "ended": 12.0, "cpu_s": 1.0, "late": b"", "uvloop": True}
    return Report(tallies=list(tallies), **{**known, **facts})


def test_reports_of_several_generators_are_one_result() -> None:
    """Percentiles are of all their times together, failures are added up by code, and the busiest generator is told:
    it is that which would have been the limit."""
    first = report(Tally("put", packed(0.001, 0.003), 3, {"no_leader": 1}, 0.5, 0), cpu_s=1.8, late=packed(0.001))
    second = report(
        Tally("put", packed(0.002), 1, {"no_leader": 2, "overloaded": 1}, 0.25, 0),
        Tally("get", packed(0.1), 1, absent=1),
    )
    put, get = results.operations_of([first, second])
    assert (put.per_s, put.answered, put.failures) == (2.0, 3, {"no_leader": 3, "overloaded": 1})
    assert put.latency is not None
    assert (put.latency.p50_ms, put.latency.max_ms, put.longest_failure_ms) == (2.0, 3.0, 500.0)
    assert (get.kind, get.absent) == ("get", 1)
    cost = results.generator_of([first, second])
    assert (cost.processes, cost.cpu_share, cost.late_max_ms) == (2, pytest.approx(0.9), 1.0)


def test_costs_are_of_the_time_between_two_samples() -> None:
    """The status of a node under load comes late: its counts are divided by the time between the statuses, and what
    the kernel tells by its own. A node that told nothing is null, not nothing."""
    status = {"role": "leader", "term": 3, "syncs": 100, "first": 1, "last": {"commit_id": 50}, "storage": {"file": 1}}
    later = {**status, "term": 5, "syncs": 400}
    before = [NodeSample("a:1", 10.0, 11.0, status, 1.0, 1000, 5, 7), NodeSample("a:2", 10.0, 10.0, None)]
    after = [NodeSample("a:1", 12.0, 14.0, later, 2.0, 9000, 6, 8), NodeSample("a:2", 12.0, 12.0, None)]
    put = results.Operations("put", 500.0, 1000, {}, None, 0.0, 0)
    known, unknown = costs(before, after, [put], put_bytes=2)
    assert (known.cpu_share, known.cpu_us_per_operation) == (0.5, 1000.0)
    assert (known.written_bytes_per_s, known.written_per_byte_put) == (4000.0, 4.0)
    assert (known.syncs_per_s, known.operations_per_sync) == (100.0, 5.0)
    assert (known.anonymous_bytes, known.file_bytes, known.log_entries) == (6, 8, 50)
    assert [getattr(unknown, name) for name in unknown.__struct_fields__[1:]] == [None] * 10
    assert elections(before, after) == 2
    assert elections(before[1:], after[1:]) is None


def load_result(side: str, n: int, per_s: float, p50_s: float) -> results.LoadResult:
    latency = results.latency_of([p50_s])
    return results.LoadResult(
        side=side,
        workload="put",
        connections=10,
        in_flight=5,
        keys=100,
        round=n,
        rate_per_s=0.0,
        seconds=1.0,
        operations=[results.Operations("put", per_s, 1, {}, latency, 0.0, 0)],
        per_s=per_s,
        nodes=[],
        disk_bytes_per_s=None,
        disk_per_byte_put=None,
        elections=None,
        generator=results.GeneratorCost(1, 0.9, 0.0, 0.0, True),
        other_cpu_share=None,
        unasked={"overloaded": 1},
        lost_connections=1,
    )


def test_ratios_are_taken_round_by_round() -> None:
    """The machine was half as fast in the second round, for both: the ratio of that round says so, and the ratio of
    all rounds is their median. What was measured on one side only has none."""
    rates = [
        ("ours", 1, 100.0),
        ("a:1", 1, 200.0),
        ("a:1", 2, 100.0),
        ("ours", 2, 60.0),
        ("ours", 3, 70.0),
        ("a:1", 3, 100.0),
    ]
    (ratio,) = results.ratios_of([load_result(side, n, per_s, 1 / per_s) for side, n, per_s in rates])
    assert (ratio.per_s, ratio.per_s_lowest, ratio.per_s_highest) == pytest.approx((0.6, 0.5, 0.7))
    assert (ratio.ours_per_s, ratio.other_per_s, ratio.rounds) == (70.0, 100.0, 3)
    assert ratio.p50 == pytest.approx(1 / 0.6)
    assert results.ratios_of([load_result("ours", 1, 1.0, 1.0)]) == []


def test_the_kernel_is_understood(tmp_path: Path) -> None:
    """A process that writes and computes is seen to do both; what can't be known is None, not an error."""
    pid, file = os.getpid(), tmp_path / "written"
    before, cpu = written_bytes(pid), cpu_seconds(pid)
    file.write_bytes(bytes(1 << 20))
    assert written_bytes(pid) - before >= 1 << 20
    assert 0 < cpu <= cpu_seconds(pid)
    assert file_system_of(Path("/proc")) == "proc"
    assert disk_written_bytes(Path("/proc")) is None
    with pytest.raises(OSError, match="No such file"):
        cpu_seconds(2**30)


# --- the generator's process, on a scripted server ------------------------------------------------------------


class ScriptedServer:
    """Answers each line that comes as `script` says, in a thread for each connection. None: it hangs up."""

    def __init__(self, script: Callable[[dict[str, Any]], bytes | None]) -> None:
        self._script = script
        self.seen: Counter[str] = Counter()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._listener.getsockname())
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> ScriptedServer:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed: that is the end
            while True:
                connection, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rwb", buffering=0) as stream, contextlib.suppress(OSError):
            for line in stream:
                request = json.loads(line)
                self.seen[request["type"]] += 1
                answer = self._script(request)
                if answer is None:
                    return
                stream.write(answer)


def answer_to(request: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"type": request["type"], "id": request["id"], "data": True, **more}).encode() + b"\n"


def generate(server: ScriptedServer, **plan: Any) -> Report:
    with Generator(Plan(addresses=[server.address], **plan)) as generator:
        generator.await_ready()
        generator.begin(time.monotonic())
        return generator.report(30)


def test_failures_over_sockets_keep_their_codes() -> None:
    """A server that takes each key but refuses some, answers some with what nobody asked for first, and hangs up once:
    the generator fills in every key all the same, and tells each failure by its code."""
    met: Counter[int] = Counter()

    def script(request: dict[str, Any]) -> bytes | None:
        number = int(request["key"][-3:])
        met[number] += 1
        if met[number] > 1 or number % 10:
            return answer_to(request)
        if number == 50:
            return None
        if number == 70:
            return b'{"id":99,"error":{"code":"internal","message":""}}\nnonsense\n' + answer_to(request)
        return answer_to(request, data=False, error={"code": "overloaded", "message": "later"})

    with ScriptedServer(script) as server:
        found = generate(server, workload="fill", connections=4, in_flight=1, keys=100, key_bytes=10, value_bytes=5)
    (tally,) = found.tallies
    assert len(as_seconds(tally.latencies)) == 100
    assert tally.failures == {"overloaded": 8, "connection_lost": 1}
    assert (found.lost_connections, found.unasked) == (1, {"internal": 1, "bad_answer": 1})
    assert server.seen == {"put": 109}


def test_an_open_loop_over_sockets_asks_as_often_as_was_said() -> None:
    """500 requests a second for 0.3 seconds are 150 requests, each with its time, which never begins before it was
    due; gets of what is not there are told."""
    with ScriptedServer(lambda request: answer_to(request, data={"value": None}).replace(b": ", b":")) as server:
        found = generate(
            server, workload="get", connections=3, in_flight=4, rate=500.0, seconds=0.3, keys=10, note_times=True
        )
    (tally,) = found.tallies
    assert (len(as_seconds(tally.latencies)), tally.absent, tally.failures) == (150, 150, {})
    assert server.seen == {"get": 150}
    assert len(as_seconds(found.times)) == 150
    assert min(as_seconds(tally.latencies)) > 0
    assert min(as_seconds(found.late)) >= 0


def test_a_long_report_is_told_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that takes only a part of what it is given gets the rest after it, to the end of the line."""
    told = bytearray()

    def write_some(fd: int, data: memoryview) -> int:
        assert fd == 1
        told.extend(data[:7])
        return min(7, len(data))

    monkeypatch.setattr(os, "write", write_some)
    generator._tell(generator.Progress(12345, 678, 9.0))
    assert told.endswith(b"\n")
    assert generator._decode_line(bytes(told)) == generator.Progress(12345, 678, 9.0)


def test_a_generator_that_finds_nobody_says_so() -> None:
    """It ends, and whoever waits for it is told at once. What it says itself goes to stderr."""
    with (
        Generator(Plan(addresses=[free_address()], workload="put")) as generator,
        pytest.raises(NotReached, match="ended"),
    ):
        generator.await_ready()


# --- the tool, on real nodes ----------------------------------------------------------------------------------

SMALL = ["--keys", "200", "--key-size", "20", "--value-size", "50", "--seed", "1"]
SHORT = ["--seconds", "0.15", "--warm-up", "0.05", "--connections", "2x3"]
SOON = ["--setting", "HB_TIME=50", "--setting", "LOW_TIMEOUT=300", "--setting", "HIGH_TIMEOUT=600"]


def bench(*words: str) -> Result:
    return CliRunner().invoke(tool.main, list(words))


def measured(*words: str) -> results.Run:
    """The result of a run that has to succeed. It has all fields, and none that is not documented."""
    found = bench(*words, "--json", "-")
    assert found.exit_code == 0, found.output
    run = msgspec.json.decode(found.stdout, type=results.Run)
    assert run.is_complete
    assert json.loads(found.stdout) == msgspec.to_builtins(run), "no field is missing, none is unknown"
    assert run.circumstances.command.startswith("bench.py")
    assert run.circumstances.file_system not in ("tmpfs", "")
    assert "raftnode" in found.stderr, "the tables"
    return run


def test_every_workload_is_measured(tmp_path: Path) -> None:
    """All workloads on one node, closed loop, two connections with three requests each: each is answered, none fails,
    and nothing asks for keys that are not there, but deletes, which are soon through with them. The data directory is
    gone afterwards."""
    run = measured("load", "--nodes", "1", "--workload", ",".join(tool.WORKLOADS), *SMALL, *SHORT,
                   "--directory", str(tmp_path))  # fmt: skip
    assert [load.workload for load in run.loads] == list(tool.WORKLOADS)
    for load in run.loads:
        kinds = {"get-local": ["get"], "mixed": ["put", "get"]}.get(load.workload, [load.workload])
        assert sorted(each.kind for each in load.operations) == sorted(kinds)
        assert load.per_s > 0
        assert (load.connections, load.in_flight, load.lost_connections) == (2, 3, 0)
        for each in load.operations:
            assert each.answered > 0
            assert each.failures == {}
            assert each.latency is not None
            assert each.kind == "delete" or not each.absent
        (node,) = load.nodes
        assert node.role == "leader"
        assert None not in (node.cpu_share, node.syncs_per_s, node.anonymous_bytes, node.file_bytes)
        assert (node.written_per_byte_put is not None) == ("put" in kinds)
    assert list(tmp_path.iterdir()) == []


def test_a_running_cluster_is_measured_against_another(tmp_path: Path) -> None:
    """Two nodes that run already, one as ours and one as another server: an open loop on both in turn, two rounds, and
    their ratio. Of a node that may be anywhere only its status is known; of the other side nothing is asked."""
    nodes = [NodeProcess(free_address(), [], tmp_path / str(n)) for n in range(2)]
    with contextlib.ExitStack() as stack:
        for node in nodes:
            stack.callback(node.kill)
            node.start().await_answer()
        found = bench("load", "--node", nodes[0].address, "--against", nodes[1].address, "--rounds", "2", *SMALL,
                      "--workload", "put", "--rate", "100", "--seconds", "0.25", "--warm-up", "0", "--connections", "2",
                      "--json", str(tmp_path / "result.json"))  # fmt: skip
    assert found.exit_code == 0, found.output
    run = msgspec.json.decode((tmp_path / "result.json").read_bytes(), type=results.Run)
    assert [load.side for load in run.loads] == ["ours", nodes[1].address, nodes[1].address, "ours"]
    assert all(sum(each.answered for each in load.operations) == 25 for load in run.loads), "0.25 s at 100 a second"
    (ours, *_), (theirs, *_) = run.loads[0].nodes, [run.loads[1].nodes]
    assert (ours.address, ours.cpu_share, theirs) == (nodes[0].address, None, [])
    assert ours.syncs_per_s is not None
    (ratio,) = run.ratios
    assert (ratio.rounds, ratio.keys) == (2, 200)
    assert "ratio" in found.stdout


def test_failover_and_its_faults() -> None:
    """One kill -9 and one SIGSTOP of the leader, under puts: each has a time, each cost an election at least, and the
    puts that failed are told by their codes."""
    run = measured("failover", "--times", "1", *SMALL, *SOON)
    assert [each.fault for each in run.failovers] == ["kill", "stop"]
    for each in run.failovers:
        assert len(each.without_writes.all_s) == 1
        assert 0 < each.without_writes.worst_s == each.without_writes.median_s
        assert each.longest_gap_s > 0
        assert each.elections >= 1
        assert each.answered > 100
    assert run.circumstances.settings == {"HB_TIME": "50", "LOW_TIMEOUT": "300", "HIGH_TIMEOUT": "600"}


def test_restarts_and_an_idle_cluster() -> None:
    """Two sizes, one start each of one node and of all, which is the same here; and a moment of a cluster that does
    nothing. A read that must be confirmed can't be answered before one that must not."""
    run = measured("restart", "--nodes", "1", "--times", "1", "--keys", "100,300", *SMALL[2:], *SOON)
    assert [each.keys for each in run.restarts] == [100, 300]
    for each in run.restarts:
        assert each.log_entries >= each.keys
        assert each.file_bytes > 0
        for local, confirmed in (
            (each.one_local_read, each.one_linearizable_read),
            (each.all_local_read, each.all_linearizable_read),
        ):
            assert 0 < local.worst_s <= confirmed.worst_s
    (idle,) = measured("idle", "--nodes", "1", "--seconds", "0.1", *SMALL).idle
    assert [node.role for node in idle.nodes] == ["leader"]
    assert idle.elections == 0


def test_a_node_joins_while_clients_write() -> None:
    """An empty node joins a cluster of one whose log no longer has everything, so that it gets a snapshot. It has a
    vote in the end; puts were answered before and meanwhile, and none failed."""
    short = ("--setting", "RAFTNODE_LOG_ENTRIES=50")
    words = ("--nodes", "1", "--connections", "5", "--seconds", "0.3", "--rate", "200", *SMALL, *short)
    (join,) = measured("join", *words).joins
    assert (join.nodes, join.connections, join.rate_per_s) == (1, 5, 200)
    assert join.joined_s > 0
    assert min(join.leader_anonymous_bytes, join.newcomer_anonymous_bytes) > 0
    for puts in (join.before, join.during):
        assert (puts.kind, puts.failures) == ("put", {})
        assert puts.answered > 0


# --- how it behaves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["load", "--workload", "scan"], "'scan': there are put, get"),
        (["load", "--connections", "10x"], "'' is no count"),
        (["load", "--connections", "0"], "is no count"),
        (["load", "--connections", ","], "nothing in it"),
        (["load", "--node", "nowhere"], "expected host:port"),
        (["load", "--workload", "put,delete", "--against", "a:1"], "our side only"),
        (["load", "--setting", "NO_SUCH=1"], "NAME=VALUE"),
        (["load", "--json", "/no/such/directory/result.json"], "no such directory"),
        (["failover", "--nodes", "1"], "nobody to take over"),
    ],
)  # fmt: skip
def test_what_can_not_be_measured_is_refused_before(words: list[str], complaint: str) -> None:
    """Wrong usage is told in one line, with status 2, and nothing is started."""
    found = bench(*words)
    assert found.exit_code == 2, found.output
    assert complaint in " ".join(found.output.split())


def test_memory_is_no_disk() -> None:
    """Nodes on a tmpfs would be measured without a disk."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or file_system_of(memory) != "tmpfs":
        pytest.skip("there is no tmpfs at /dev/shm")
    found = bench("idle", "--directory", str(memory))
    assert found.exit_code == 2
    assert "not on a disk" in found.output


def test_drawing_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without matplotlib, that is told before anything is measured, with what to do."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = bench("idle", "--plot", "picture.png")
    assert found.exit_code == 2
    assert "pip install 'raftnode[tools]'" in " ".join(found.output.split())


@pytest.fixture
def everything() -> results.Run:
    """The record of a run that has one of each."""
    options = tool.Options(3, (100,), 240, 1024, 7, {"HB_TIME": "50"}, None, None, None)
    spread = results.spread_of([0.5, 1.5, 0.7])
    node = results.NodeCost("a:1", "leader", 0.5, 10.0, 1000.0, 2.0, 100.0, 5.0, 1 << 20, 2 << 20, 9)
    loads = [load_result("ours", 1, 100.0, 0.01), load_result("a:1", 1, 50.0, 0.02)]
    return results.Run(
        circumstances=tool.circumstances(options, []),
        loads=[msgspec.structs.replace(loads[0], nodes=[node], elections=1, other_cpu_share=0.5), loads[1]],
        ratios=results.ratios_of(loads),
        failovers=[
            results.FailoverResult(
                fault="kill",
                nodes=3,
                rate_per_s=200.0,
                without_writes=spread,
                longest_gap_s=1.6,
                elections=3,
                answered=99,
                failures={"not_committed": 2},
            )
        ],
        restarts=[
            results.RestartResult(
                keys=100,
                nodes=3,
                file_bytes=1 << 20,
                log_entries=101,
                one_local_read=spread,
                one_linearizable_read=spread,
                all_local_read=spread,
                all_linearizable_read=spread,
            )
        ],
        idle=[results.IdleResult(1.0, [node], 0)],
    )


def test_tables_tell_everything_and_what_to_mind(everything: results.Run) -> None:
    """A reader sees the figures, and what limits them: a generator that was the limit, elections, other programs, lost
    connections, and a run that was cut short."""
    text = "\n".join(tool.tables(everything))
    for words in ("put 10x5", "seed 7", "HB_TIME=50", "not_committed 2", "0.700", "the load generator was the limit",
                  "1 elections", "50% of a core", "1 connections lost", "overloaded 1", "INTERRUPTED"):  # fmt: skip
        assert words in text, words


def test_what_was_measured_before_an_interrupt_is_kept(everything: results.Run, tmp_path: Path) -> None:
    """Ctrl-C in a long run leaves what it had, marked as incomplete."""
    file = tmp_path / "result.json"
    options = tool.Options(3, (100,), 240, 1024, 7, {}, None, str(file), None)

    def measure(run: results.Run, told: object) -> None:  # noqa: ARG001
        run.idle = everything.idle
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tool._measure(options, [], measure)
    left = msgspec.json.decode(file.read_bytes(), type=results.Run)
    assert (left.idle, left.is_complete) == (everything.idle, False)


def test_pictures_are_drawn_of_everything(everything: results.Run, tmp_path: Path) -> None:
    """A panel for each measurement, where matplotlib is installed."""
    pytest.importorskip("matplotlib")
    tool.draw(everything, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """The tool takes SIGTERM for itself."""
    import signal

    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
