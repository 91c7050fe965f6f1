"""Measures clusters: what they do under load and what that costs, what a fault of the leader costs, how long a start
takes, and what an idle cluster uses. `tools/bench.py` is its command line, `results` what it gives.

    with ClusterOfProcesses(3) as cluster:
        side = OwnCluster(cluster)
        fill(side, Load(keys=1000))
        result = measure_load(side, Load(workload="get", keys=1000))

These measurements wait for time to pass, which tests must not: so they are no tests, and give no verdicts.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import msgspec
from msgspec import Struct

from raftnode.blocking import LineConnection
from raftnode.config import Settings
from raftnode.errors import ProtocolError
from raftnode.messages import decode_object, encode_object
from raftnode.testing import results
from raftnode.testing.generator import Generator
from raftnode.testing.limited import usage
from raftnode.testing.load import NAMESPACE, Plan, Report, Workload, as_seconds, key_of
from raftnode.testing.machine import cpu_seconds, disk_written_bytes, machine_busy_seconds, written_bytes
from raftnode.testing.processes import PATIENCE_S, ClusterOfProcesses, NodeProcess, NotReached, wait_until
from raftnode.testing.results import (
    FailoverResult,
    IdleResult,
    JoinResult,
    LoadResult,
    NodeCost,
    Operations,
    RestartResult,
    spread_of,
)

Target = Literal["leader", "followers", "all"]
Fault = Literal["kill", "stop"]
Told = Callable[[str], None]
"""Is told often what is going on."""

_LOOK_S: Final = 0.1
_POLL_S: Final = 0.002
_ANSWER_S: Final = 20.0
_JOIN_PATIENCE_S: Final = 3600.0
_LIMIT: Final = Settings().peer_frame_bytes


def _silent(words: str) -> None:
    """Nobody is told."""


class Load(Struct, frozen=True, kw_only=True):
    """What load is offered, and to whom. As in `load.Plan`, where names are the same."""

    workload: Workload = "put"
    connections: int = 1
    in_flight: int = 1
    keys: int = 1000
    new_keys: bool = False
    key_bytes: int = 240
    value_bytes: int = 1024
    reads: float = 0.5
    rate: float = 0.0
    warm_up_s: float = 1.0
    seconds: float = 5.0
    patience_s: float = 10.0
    seed: int = 1
    target: Target = "leader"
    processes: int = 1
    """Generators, which share the connections and the rate."""
    round: int = 1
    """Of several that measure the same."""

    def plans(self, addresses: list[str]) -> list[Plan]:
        """For each generator its part."""
        of = min(self.processes, self.connections)
        shared = {name: getattr(self, name) for name in _SHARED}
        seed = self.seed * 1000 + self.round  # each round draws other keys
        return [
            Plan(**{
                **shared, "addresses": addresses[n:] + addresses[:n], "number": n, "of": of, "seed": seed,
                "connections": self.connections // of + (n < self.connections % of),
            })
            for n in range(of)
        ]  # fmt: skip


_SHARED: Final = [name for name in Load.__struct_fields__ if name in Plan.__struct_fields__]


# --- whom to measure ------------------------------------------------------------------------------------------


class NodeSample(Struct, frozen=True):
    """What a node had used at one moment; null where that can't be known."""

    address: str
    at: float
    """Monotonic seconds when the process was looked at; `asked_at`: when the status came."""
    asked_at: float
    status: dict[str, Any] | None
    cpu_s: float | None = None
    written_bytes: int | None = None
    anonymous_bytes: int | None = None
    file_bytes: int | None = None


class Side(Protocol):
    """Some cluster."""

    name: str

    def addresses(self, target: Target) -> list[str]:
        """Where to connect."""

    def sample(self) -> list[NodeSample]:
        """What its nodes have used so far, as far as that can be known."""

    def disk_bytes(self) -> int | None:
        """What the disk of its nodes has been given so far, if that is known."""

    def settle(self) -> None:
        """Wait until all nodes have what was written."""


class OwnCluster:
    """A cluster of processes of ours."""

    def __init__(self, cluster: ClusterOfProcesses) -> None:
        self.name = results.OURS
        self.cluster = cluster

    def addresses(self, target: Target) -> list[str]:
        return _chosen(self.cluster.addresses, self.cluster.await_leader().address, target)

    def sample(self) -> list[NodeSample]:
        looked = [_look_at(node) for node in self.cluster]  # first: a node under load may answer late
        return [msgspec.structs.replace(each, **_asked(each.address)) for each in looked]

    def disk_bytes(self) -> int | None:
        return disk_written_bytes(self.cluster.directory)

    def settle(self) -> None:
        self.cluster.await_caught_up()


class RunningCluster:
    """A cluster of raftnode that runs already, known by the address of one node."""

    def __init__(self, address: str) -> None:
        self.name = results.OURS
        self._address = address

    def _status(self) -> dict[str, Any]:
        def led() -> dict[str, Any] | None:
            found = _status_of(self._address)
            return found if found and found["leader"] else None

        return wait_until(led, f"{self._address} answers and knows a leader")

    def addresses(self, target: Target) -> list[str]:
        status = self._status()
        return _chosen(sorted(status["members"]), status["leader"], target)

    def sample(self) -> list[NodeSample]:
        return [
            NodeSample(address, time.monotonic(), **_asked(address))
            for address in sorted(self._status()["members"])
        ]  # fmt: skip

    def disk_bytes(self) -> None:
        """Its nodes may be anywhere."""

    def settle(self) -> None:
        commit_id = self._status()["commit_id"]

        def settled() -> bool:
            found = [_status_of(address) for address in self._status()["members"]]
            return all(each is None or each["commit_id"] >= commit_id for each in found)

        wait_until(settled, "all nodes that answer have caught up")


class Endpoint:
    """Some other server that takes our put and get messages. It is asked nothing else."""

    def __init__(self, address: str) -> None:
        self.name = address

    def addresses(self, target: Target) -> list[str]:  # noqa: ARG002 - there is only one
        return [self.name]

    def sample(self) -> list[NodeSample]:
        return []

    def disk_bytes(self) -> None:
        """What it has written is its own business."""

    def settle(self) -> None:
        """It has answered, and is not asked for more."""


def _chosen(addresses: Sequence[str], leader: str, target: Target) -> list[str]:
    followers = [address for address in addresses if address != leader]
    chosen = {"leader": [leader], "followers": followers, "all": [leader, *followers]}[target]
    return chosen or [leader]


def _look_at(node: NodeProcess) -> NodeSample:
    pid = node.pid
    return NodeSample(
        address=node.address,
        at=time.monotonic(),
        asked_at=0.0,
        status=None,
        cpu_s=cpu_seconds(pid),
        written_bytes=written_bytes(pid),
        anonymous_bytes=usage(pid).anonymous,
        file_bytes=store_bytes(node.volume),
    )


def store_bytes(volume: Path) -> int:
    """The size of what is in a data directory, as blocks that are taken: the file may have holes."""
    return sum(512 * each.stat().st_blocks for each in volume.iterdir())


def _asked(address: str) -> dict[str, Any]:
    status = _status_of(address)
    return {"status": status, "asked_at": time.monotonic()}


def _status_of(address: str) -> dict[str, Any] | None:
    answer = _ask(address, {"type": "status"})
    return answer["data"] if answer else None


def _ask(address: str, message: dict[str, Any]) -> dict[str, Any] | None:
    """One request on a connection of its own; None when it is not answered."""
    with contextlib.suppress(OSError, ProtocolError):
        connection = LineConnection(address, _ANSWER_S, _LIMIT)
        with contextlib.closing(connection):
            return decode_object(connection.request(encode_object(message), _ANSWER_S))
    return None


# --- load -----------------------------------------------------------------------------------------------------


def fill(side: Side, load: Load, first: int = 0, told: Told = _silent) -> None:
    """Put the keys from number `first` up to `load.keys`, through the cluster, and wait until all nodes have them.
    Raises NotReached when nothing goes on any more."""
    if first >= load.keys:
        return
    plan = Plan(
        addresses=side.addresses("leader"),
        workload="fill",
        first=first,
        keys=load.keys,
        key_bytes=load.key_bytes,
        value_bytes=load.value_bytes,
        connections=10,
        in_flight=50,
    )
    with Generator(plan) as generator:
        generator.await_ready()
        generator.begin(time.monotonic())
        _await_filled(generator, load.keys - first, side.name, told)
        generator.report(PATIENCE_S)
    side.settle()


def _await_filled(generator: Generator, keys: int, name: str, told: Told) -> None:
    answered, moved = 0, time.monotonic()
    while not generator.has_reported:
        so_far, now = generator.latest, time.monotonic()
        if so_far.answered > answered:
            answered, moved = so_far.answered, now
        if now > moved + PATIENCE_S:
            raise NotReached(f"filling {name} has stuck at {answered} of {keys} keys; {so_far.failed} puts failed")
        told(f"{name}: filling, {answered} of {keys} keys")
        time.sleep(_LOOK_S)


def measure_load(side: Side, load: Load, told: Told = _silent) -> LoadResult:
    """One workload for some seconds, and what it costs. Raises NotReached when the generators can't do their work."""
    plans = load.plans(side.addresses(load.target))
    words = f"{side.name}: {load.workload}, {load.connections} x {load.in_flight}, {load.keys} keys"
    with contextlib.ExitStack() as stack:
        generators = [stack.enter_context(Generator(plan)) for plan in plans]
        for generator in generators:
            generator.await_ready()
        begin = time.monotonic() + _LOOK_S  # so that all of them are told before
        for generator in generators:
            generator.begin(begin)
        _watch(generators, begin + load.warm_up_s, words, told)
        before = Moment.of(side)
        _watch(generators, begin + load.warm_up_s + load.seconds, words, told)
        after = Moment.of(side)
        reports = [generator.report(load.patience_s + PATIENCE_S) for generator in generators]
    return _load_result(side, load, reports, before, after)


def _watch(generators: Sequence[Generator], until: float, words: str, told: Told) -> None:
    """Wait for that moment, or for a generator that has ended before it."""
    while (left := until - time.monotonic()) > 0 and not any(each.has_reported for each in generators):
        answered, failed = (sum(getattr(each.latest, name) for each in generators) for name in ("answered", "failed"))
        told(f"{words}: {answered} answered, {failed} failed")
        time.sleep(min(left, _LOOK_S))


class Moment(Struct, frozen=True):
    """What was used up to one moment."""

    at: float
    busy_s: float
    """CPU time of all processes on this machine but this one."""
    disk_bytes: int | None
    nodes: list[NodeSample]

    @classmethod
    def of(cls, side: Side) -> Moment:
        busy = machine_busy_seconds() - time.process_time()
        return cls(time.monotonic(), busy, side.disk_bytes(), side.sample())


def _load_result(side: Side, load: Load, reports: Sequence[Report], before: Moment, after: Moment) -> LoadResult:
    operations = results.operations_of(reports)
    took = after.at - before.at
    put_bytes = load.key_bytes + load.value_bytes
    put_per_s = put_bytes * _puts(operations)
    nodes = costs(before.nodes, after.nodes, operations, put_bytes)
    known = sum(report.cpu_s for report in reports) / took + sum(node.cpu_share or 0.0 for node in nodes)
    disk = None
    if after.disk_bytes is not None and before.disk_bytes is not None:
        disk = (after.disk_bytes - before.disk_bytes) / took
    return LoadResult(
        side=side.name,
        workload=load.workload,
        connections=load.connections,
        in_flight=load.in_flight,
        keys=load.keys,
        round=load.round,
        rate_per_s=load.rate,
        seconds=results.lasted(reports),
        operations=operations,
        per_s=sum(each.per_s for each in operations),
        nodes=nodes,
        disk_bytes_per_s=disk,
        disk_per_byte_put=disk / put_per_s if disk is not None and put_per_s else None,
        elections=elections(before.nodes, after.nodes),
        generator=results.generator_of(reports),
        other_cpu_share=max(0.0, (after.busy_s - before.busy_s) / took - known),
        unasked=results.add_up(*(report.unasked for report in reports)),
        lost_connections=sum(report.lost_connections for report in reports),
    )


def _puts(operations: Sequence[Operations]) -> float:
    """A second."""
    return sum(each.per_s for each in operations if each.kind == "put")


def costs(
    before: Sequence[NodeSample], after: Sequence[NodeSample], operations: Sequence[Operations] = (), put_bytes: int = 0
) -> list[NodeCost]:
    """What each node used between two samples; `put_bytes`: key and value of one put."""
    per_s = sum(each.per_s for each in operations)
    put_per_s = put_bytes * _puts(operations)
    return [
        _cost(old, new, per_s, put_per_s)
        for old, new in zip(before, after, strict=True)
    ]  # fmt: skip


def _cost(old: NodeSample, new: NodeSample, per_s: float, put_per_s: float) -> NodeCost:
    took = new.at - old.at
    cpu = None if new.cpu_s is None or old.cpu_s is None else (new.cpu_s - old.cpu_s) / took
    written = (
        None
        if new.written_bytes is None or old.written_bytes is None
        else (new.written_bytes - old.written_bytes) / took
    )
    syncs, status = None, new.status or {}
    if new.status and old.status:
        syncs = (new.status["syncs"] - old.status["syncs"]) / (new.asked_at - old.asked_at)
    file_bytes = new.file_bytes if new.file_bytes is not None else status.get("storage", {}).get("file")
    return NodeCost(
        address=new.address,
        role=status.get("role"),
        cpu_share=cpu,
        cpu_us_per_operation=1e6 * cpu / per_s if cpu is not None and per_s else None,
        written_bytes_per_s=written,
        written_per_byte_put=written / put_per_s if written is not None and put_per_s else None,
        syncs_per_s=syncs,
        operations_per_sync=per_s / syncs if syncs else None,
        anonymous_bytes=new.anonymous_bytes,
        file_bytes=file_bytes,
        log_entries=status["last"]["commit_id"] - status["first"] + 1 if status else None,
    )


def elections(before: Sequence[NodeSample], after: Sequence[NodeSample]) -> int | None:
    """Terms that began between two samples; None when nobody told."""
    terms = [[each.status["term"] for each in sample if each.status] for sample in (before, after)]
    return max(terms[1]) - max(terms[0]) if all(terms) else None


# --- idle -----------------------------------------------------------------------------------------------------


def measure_idle(side: Side, seconds: float, told: Told = _silent) -> IdleResult:
    """What the nodes use while nobody asks for anything."""
    side.settle()
    before = side.sample()
    until = time.monotonic() + seconds
    _watch([], until, f"{side.name}: idle", told)
    after = side.sample()
    return IdleResult(seconds, costs(before, after), elections(before, after))


# --- failover -------------------------------------------------------------------------------------------------


def measure_failovers(
    cluster: ClusterOfProcesses, fault: Fault, times: int, rate: float, load: Load, told: Told = _silent
) -> FailoverResult:
    """A fault of the leader, `times` times, each healed before the next, under `rate` puts a second through all nodes.

    The puts are an open loop that never waits for an answer, so a node that hangs holds up none but those sent to it.
    The moment of a fault is drawn by the seed. Raises NotReached when the cluster does not come back.
    """
    chance = random.Random(f"{load.seed} {fault}")
    plan = Plan(
        addresses=cluster.addresses,
        workload="put",
        connections=2 * len(cluster),
        in_flight=500,
        keys=load.keys,
        key_bytes=load.key_bytes,
        value_bytes=load.value_bytes,
        rate=rate,
        seed=load.seed,
        note_times=True,
        tell_s=0.02,
    )
    faults: list[tuple[float, float]] = []
    cluster.await_caught_up()
    term = cluster.term()
    with Generator(plan) as generator:
        generator.await_ready()
        generator.begin(time.monotonic())
        for n in range(1, times + 1):
            _await_answers(generator, chance.randrange(int(rate / 4), int(rate / 2) + 1), cluster)
            faults.append(_fail_leader(cluster, fault, generator, rate))
            told(f"{fault} {n} of {times}")
        _await_answers(generator, int(rate / 4), cluster)
        terms = cluster.term() - term
        generator.stop()
        report = generator.report(PATIENCE_S)
    return _failover_result(fault, cluster, rate, faults, report, terms)


def _fail_leader(cluster: ClusterOfProcesses, fault: Fault, generator: Generator, rate: float) -> tuple[float, float]:
    """One fault, from its moment until puts are acknowledged again and the healing begins."""
    leader = cluster.await_leader()
    began = time.monotonic()
    if fault == "kill":
        leader.kill()
    else:
        leader.pause()
    _await_answers(generator, int(rate / 4), cluster)
    ended = time.monotonic()
    if fault == "kill":
        leader.start().await_answer()
    else:
        leader.resume()
    cluster.await_caught_up()
    return began, ended


def _await_answers(generator: Generator, count: int, cluster: ClusterOfProcesses) -> None:
    """Wait until so many more puts are acknowledged. Enough of them can't all have been under way before."""
    enough = generator.latest.answered + count

    def has_enough() -> bool:
        return generator.latest.answered >= enough

    wait_until(has_enough, f"{count} more puts are acknowledged", PATIENCE_S, cluster.describe)


def _failover_result(
    fault: Fault,
    cluster: ClusterOfProcesses,
    rate: float,
    faults: Sequence[tuple[float, float]],
    report: Report,
    terms: int,
) -> FailoverResult:
    answers = as_seconds(report.times)
    return FailoverResult(
        fault=fault,
        nodes=len(cluster),
        rate_per_s=rate,
        without_writes=spread_of([results.outage(answers, *each) for each in faults]),
        longest_gap_s=results.longest_gap(answers),
        elections=terms,
        answered=len(answers),
        failures=results.add_up(*(tally.failures for tally in report.tallies)),
    )


# --- join -----------------------------------------------------------------------------------------------------


def measure_join(cluster: ClusterOfProcesses, load: Load, told: Told = _silent) -> JoinResult:
    """Clients write for a while, and go on while an empty node joins. Raises NotReached when it gets no vote."""
    side, leader = OwnCluster(cluster), cluster.await_leader()
    nodes, file_bytes = len(cluster), store_bytes(leader.volume)
    with Generator(_endless(side, load)) as generator:
        generator.await_ready()
        generator.begin(time.monotonic())
        _watch([generator], time.monotonic() + load.seconds, "before anybody joins", told)
        generator.stop()
        before = generator.report(load.patience_s + PATIENCE_S)
    with Generator(_endless(side, load)) as generator:
        generator.await_ready()
        generator.begin(time.monotonic())
        began = time.monotonic()
        newcomer = cluster.newcomer().start()
        leaders, newcomers = _await_vote(cluster, leader, newcomer, generator, told)
        joined = time.monotonic() - began
        generator.stop()
        during = generator.report(load.patience_s + PATIENCE_S)
    return JoinResult(
        keys=load.keys,
        state_bytes=load.keys * (load.key_bytes + load.value_bytes),
        nodes=nodes,
        connections=load.connections,
        rate_per_s=load.rate,
        joined_s=joined,
        before=results.operations_of([before])[0],
        during=results.operations_of([during])[0],
        leader_anonymous_bytes=leaders,
        newcomer_anonymous_bytes=newcomers,
        leader_file_grew_bytes=store_bytes(leader.volume) - file_bytes,
    )


def _endless(side: Side, load: Load) -> Plan:
    """Puts until they are stopped."""
    (plan,) = msgspec.structs.replace(load, processes=1).plans(side.addresses("leader"))
    return msgspec.structs.replace(plan, seconds=None, warm_up_s=0.0)


def _await_vote(
    cluster: ClusterOfProcesses, leader: NodeProcess, newcomer: NodeProcess, generator: Generator, told: Told
) -> tuple[int, int]:
    """The most anonymous memory of both until the newcomer has a vote."""
    most_of_leader = most_of_newcomer = 0

    def has_vote() -> bool:
        nonlocal most_of_leader, most_of_newcomer
        most_of_leader = max(most_of_leader, usage(leader.pid).anonymous)
        most_of_newcomer = max(most_of_newcomer, usage(newcomer.pid).anonymous)
        status = _status_of(leader.listen) or {}
        told(f"joining: {generator.latest.answered} answered; {status.get('snapshots')}")
        return bool(status.get("members", {}).get(newcomer.address, {}).get("voter"))

    wait_until(has_vote, f"{newcomer.name} has a vote", _JOIN_PATIENCE_S, cluster.describe)
    return most_of_leader, most_of_newcomer


# --- restart --------------------------------------------------------------------------------------------------


def measure_restarts(cluster: ClusterOfProcesses, load: Load, times: int, told: Told = _silent) -> RestartResult:
    """Starts after kill -9 with what is stored now, `times` times of a follower and of all nodes. Raises NotReached."""
    key = key_of(0, load.key_bytes)
    one: list[tuple[float, float]] = []
    every: list[tuple[float, float]] = []
    for n in range(1, times + 1):
        told(f"{load.keys} keys: restart {n} of {times}")
        cluster.await_caught_up()
        follower = cluster.others(cluster.await_leader())[0] if len(cluster) > 1 else cluster[0]
        one.append(_restart(cluster, [follower], key))
        cluster.await_caught_up()
        every.append(_restart(cluster, list(cluster), key))
    cluster.await_caught_up()
    status = cluster.await_leader().await_answer()
    return RestartResult(
        keys=load.keys,
        nodes=len(cluster),
        file_bytes=store_bytes(cluster[0].volume),
        log_entries=status["last"]["commit_id"] - status["first"] + 1,
        one_local_read=spread_of([local for local, _ in one]),
        one_linearizable_read=spread_of([linearizable for _, linearizable in one]),
        all_local_read=spread_of([local for local, _ in every]),
        all_linearizable_read=spread_of([linearizable for _, linearizable in every]),
    )


def _restart(cluster: ClusterOfProcesses, nodes: Sequence[NodeProcess], key: str) -> tuple[float, float]:
    """Kill these and start them. Seconds to the first local read of the first of them, and to the first linearizable
    one."""
    cluster.kill(nodes)
    began = time.monotonic()
    for node in nodes:
        node.start()
    return (
        _await_read(nodes[0], key, "local", cluster) - began,
        _await_read(nodes[0], key, "linearizable", cluster) - began,
    )


def _await_read(node: NodeProcess, key: str, consistency: str, cluster: ClusterOfProcesses) -> float:
    """Ask until it is answered without an error; when that was, in monotonic seconds. Asks more often than
    `wait_until` would."""
    message = {"type": "get", "namespace": NAMESPACE, "key": key, "consistency": consistency}
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and node.is_running:
        answer = _ask(node.listen, message)
        if answer and "error" not in answer:
            return time.monotonic()
        time.sleep(_POLL_S)
    raise NotReached(f"awaited: {node.name} answers a {consistency} read\n{cluster.describe()}")
