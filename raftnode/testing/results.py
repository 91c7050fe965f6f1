"""What measurements give: records with stable names and units, which are the JSON of `tools/bench.py`, and the
arithmetic that makes them out of what was noted.

A name that ends in `_s` is seconds, `_ms` milliseconds, `_us` microseconds, `_bytes` bytes, `_per_s` a rate; `share` is
a part of 1. Null is what could not be known. Percentiles are nearest-rank: a time that was really measured, at or below
which lies that part of all.
"""

from __future__ import annotations

import bisect
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from raftnode.testing.load import Kind, Report, Tally, as_seconds

FORMAT: Final = 1
"""Raised when a name or a meaning changes."""
OURS: Final = "ours"
"""The side of our own cluster."""


# --- load -----------------------------------------------------------------------------------------------------


class Latency(Struct, frozen=True):
    """Times from when a request was sent (closed loop) or due (open loop) to its answer."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float
    mean_ms: float


class Operations(Struct, frozen=True):
    """The requests of one kind that were sent, or due, in the measured time."""

    kind: Kind
    per_s: float
    """Answers without an error that came in the measured time, a second."""
    answered: int
    """How many of these requests were answered without an error, in the measured time or after it."""
    failures: dict[str, int]
    """How many were not, by code: those of the nodes, and those of raftnode/testing/load.py."""
    latency: Latency | None
    """Of the answered ones; null when there is none. With failures it says less: see `longest_failure_ms`."""
    longest_failure_ms: float
    absent: int
    """Of the answered ones, those that met no value: gets of keys that are not there, deletes of nothing."""


class NodeCost(Struct, frozen=True):
    """What one node used in the measured time."""

    address: str
    role: str | None
    cpu_share: float | None
    """Of one core."""
    cpu_us_per_operation: float | None
    """CPU time for each answer that the cluster gave."""
    written_bytes_per_s: float | None
    """To its files, by /proc/PID/io."""
    written_per_byte_put: float | None
    """The same for each byte of key and value that was put; null without puts."""
    syncs_per_s: float | None
    """Synced transactions, by the node's status."""
    operations_per_sync: float | None
    anonymous_bytes: int | None
    """Memory of the program itself at the end, without the pages of its file."""
    file_bytes: int | None
    """The size of its store at the end."""
    log_entries: int | None
    """In its log at the end."""


class GeneratorCost(Struct, frozen=True):
    """Whether the load generator itself was the limit."""

    processes: int
    cpu_share: float
    """Of one core, by the busiest of them: from 0.8 on, its figures are a lower bound of the server's."""
    late_p99_ms: float
    """Open loop: by how much requests were sent late though a connection was free; a part of the latency."""
    late_max_ms: float
    uvloop: bool


class LoadResult(Struct, frozen=True, kw_only=True):
    """One workload on one cluster for some seconds."""

    side: str
    """`ours`, or the address that it is held against."""
    workload: str
    connections: int
    in_flight: int
    """On each connection."""
    keys: int
    """Stored before."""
    round: int
    rate_per_s: float
    """Of the open loop; 0: closed loop."""
    seconds: float
    operations: list[Operations]
    per_s: float
    """Of all kinds."""
    nodes: list[NodeCost]
    """Empty for a side that is only an address."""
    disk_bytes_per_s: float | None
    """What the disk of the data directories was given, by all nodes and everything else on the machine, with what the
    file system adds for itself."""
    disk_per_byte_put: float | None
    """The same for each byte of key and value that was put, on all nodes together; null without puts."""
    elections: int | None
    """How many terms began meanwhile."""
    generator: GeneratorCost
    other_cpu_share: float | None
    """Cores that were busy with neither the nodes nor the generator: another program, or the other side's nodes."""
    unasked: dict[str, int]
    """Errors that belong to no request, by code."""
    lost_connections: int


def point_of(load: LoadResult) -> str:
    """What a load is called beside its figures."""
    shape = f"{load.connections}" if load.in_flight == 1 else f"{load.connections}x{load.in_flight}"
    rate = f" at {load.rate_per_s:g}/s" if load.rate_per_s else ""
    return f"{load.workload} {shape}{rate}"


class Ratio(Struct, frozen=True, kw_only=True):
    """`ours` against the other side at one point, measured in turn. A ratio is the median over the rounds, each round
    with its own ratio."""

    workload: str
    connections: int
    in_flight: int
    keys: int
    rounds: int
    ours_per_s: float
    other_per_s: float
    per_s: float
    """Throughput, ours through theirs: above 1 is better."""
    per_s_lowest: float
    per_s_highest: float
    p50: float | None
    """Median latency, ours through theirs: below 1 is better."""
    p99: float | None


# --- the other measurements -----------------------------------------------------------------------------------


class Spread(Struct, frozen=True):
    """Of some repetitions, in seconds."""

    median_s: float
    worst_s: float
    all_s: list[float]
    """In the order in which they were measured."""


class FailoverResult(Struct, frozen=True, kw_only=True):
    """A fault of the leader, again and again, under puts at a fixed rate through all nodes."""

    fault: str
    """`kill`: kill -9. `stop`: SIGSTOP."""
    nodes: int
    rate_per_s: float
    """Puts that were due; a time is good to about 1/rate."""
    without_writes: Spread
    """From the fault to the end of the longest time without an acknowledged put before the node is healed."""
    longest_gap_s: float
    """Of the whole run, healing and all: the longest time without an acknowledged put."""
    elections: int
    """Terms that began."""
    answered: int
    failures: dict[str, int]
    """Puts that failed, or were cut off, by code."""


class RestartResult(Struct, frozen=True, kw_only=True):
    """Starts after kill -9, from before the process is made. `one`: a follower, while the others serve. `all`: every
    node at once."""

    keys: int
    nodes: int
    file_bytes: int
    """Of the store, at the end."""
    log_entries: int
    one_local_read: Spread
    """To the first answered local read."""
    one_linearizable_read: Spread
    """To the first answered linearizable read: it knows the leader."""
    all_local_read: Spread
    all_linearizable_read: Spread
    """There is a leader, and it has committed."""


class JoinResult(Struct, frozen=True, kw_only=True):
    """An empty node joins while clients write, and gets the state as a snapshot."""

    keys: int
    state_bytes: int
    """Of keys and values."""
    nodes: int
    """Before."""
    connections: int
    rate_per_s: float
    """Of the open loop; 0: closed loop."""
    joined_s: float
    """From the start of its process until it has a vote."""
    before: Operations
    during: Operations
    """The puts, before it came and from its start until it had its vote."""
    leader_anonymous_bytes: int
    newcomer_anonymous_bytes: int
    """The most that was seen of each: memory of its own, without the pages of the file."""
    leader_file_grew_bytes: int


class IdleResult(Struct, frozen=True):
    """A cluster that nobody asks for anything."""

    seconds: float
    nodes: list[NodeCost]
    elections: int | None


class Circumstances(Struct, frozen=True, kw_only=True):
    """Where and how a run was made."""

    command: str
    began: str
    """UTC."""
    seed: int
    settings: dict[str, str]
    """Of the nodes, besides their defaults."""
    nodes: int
    addresses: list[str]
    """Of a cluster that ran already; empty for one that was started."""
    raftnode: str
    commit: str | None
    """Of the checkout, with `-dirty` when it was changed."""
    python: str
    lmdb: str
    msgspec: str
    uvloop: str | None
    """In use by the load generator only."""
    system: str
    cpus: int
    """That this program may use."""
    cpu: str
    memory_bytes: int
    file_system: str | None
    """Of the data directories."""
    load_average: float
    """Over the minute before: above 0.1 or so, something else was running."""


class Run(Struct, kw_only=True):
    """Everything that one run has measured."""

    format: int = FORMAT
    circumstances: Circumstances
    loads: list[LoadResult] = []
    ratios: list[Ratio] = []
    failovers: list[FailoverResult] = []
    restarts: list[RestartResult] = []
    joins: list[JoinResult] = []
    idle: list[IdleResult] = []
    is_complete: bool = False
    """False: it was interrupted."""


# --- arithmetic -----------------------------------------------------------------------------------------------


def percentile(ranked: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of ascending values."""
    assert ranked, "there is something to rank"
    # in thousandths of a percent: whole numbers, so that 99.9 % of 1000 is rank 999 and not 1000
    rank = math.ceil(len(ranked) * round(percent * 1000) / 100_000)
    return ranked[max(rank, 1) - 1]


def latency_of(seconds: Sequence[float]) -> Latency | None:
    """Of times in any order; None for no times."""
    if not seconds:
        return None
    ranked = sorted(seconds)
    p50, p90, p99, p999 = (1000 * percentile(ranked, each) for each in (50, 90, 99, 99.9))
    return Latency(p50, p90, p99, p999, 1000 * ranked[-1], 1000 * statistics.fmean(ranked))


def spread_of(seconds: Sequence[float]) -> Spread:
    """Of at least one repetition."""
    return Spread(statistics.median(seconds), max(seconds), list(seconds))


def operations_of(reports: Sequence[Report]) -> list[Operations]:
    """What the generators of one run have seen together, by kind."""
    kinds = dict.fromkeys(tally.kind for report in reports for tally in report.tallies)
    return [_operations(kind, reports) for kind in kinds]


def _operations(kind: Kind, reports: Sequence[Report]) -> Operations:
    tallies: list[Tally] = [tally for report in reports for tally in report.tallies if tally.kind == kind]
    seconds = [each for tally in tallies for each in as_seconds(tally.latencies)]
    return Operations(
        kind=kind,
        per_s=sum(tally.finished for tally in tallies) / lasted(reports),
        answered=len(seconds),
        failures=add_up(*(tally.failures for tally in tallies)),
        latency=latency_of(seconds),
        longest_failure_ms=1000 * max(tally.longest_failure_s for tally in tallies),
        absent=sum(tally.absent for tally in tallies),
    )


def generator_of(reports: Sequence[Report]) -> GeneratorCost:
    """Of the generators of one run."""
    late = sorted(1000 * each for report in reports for each in as_seconds(report.late)) or [0.0]
    busiest = max(report.cpu_s for report in reports) / lasted(reports)
    return GeneratorCost(
        len(reports), busiest, percentile(late, 99), late[-1], all(report.uvloop for report in reports)
    )


def lasted(reports: Sequence[Report]) -> float:
    """Seconds of the measured time."""
    return max(reports[0].ended - reports[0].began, 1e-9)


def add_up(*counts: dict[str, int]) -> dict[str, int]:
    """One dict of all, by name."""
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(sorted(total.items()))


def outage(answers: Sequence[float], fault: float, healed: float) -> float:
    """Seconds from a fault to the end of the longest time without an answer between it and the healing. What was under
    way at the fault may still be answered right after it: the first answer says nothing. `answers` in order."""
    first, end = bisect.bisect_right(answers, fault), bisect.bisect_left(answers, healed)
    moments = [fault, *answers[first:end], healed]
    _, until = max(itertools.pairwise(moments), key=lambda pair: pair[1] - pair[0])
    return until - fault


def longest_gap(answers: Sequence[float]) -> float:
    """Seconds between the two neighbours that are furthest apart."""
    return max((later - sooner for sooner, later in itertools.pairwise(answers)), default=0.0)


def ratios_of(loads: Sequence[LoadResult]) -> list[Ratio]:
    """Ours against theirs, for each point that has both."""
    points: dict[tuple[str, int, int, int], list[LoadResult]] = {}
    for load in loads:
        points.setdefault((load.workload, load.connections, load.in_flight, load.keys), []).append(load)
    return [_ratio(found) for found in points.values() if len({load.side for load in found}) == 2]


def _ratio(loads: Sequence[LoadResult]) -> Ratio:
    ours = {load.round: load for load in loads if load.side == OURS}
    pairs = [(ours[load.round], load) for load in loads if load.side != OURS and load.round in ours]
    rates = [our.per_s / other.per_s if other.per_s else math.inf for our, other in pairs]
    one = pairs[0][0]
    return Ratio(
        workload=one.workload,
        connections=one.connections,
        in_flight=one.in_flight,
        keys=one.keys,
        rounds=len(pairs),
        ours_per_s=statistics.median(our.per_s for our, _ in pairs),
        other_per_s=statistics.median(other.per_s for _, other in pairs),
        per_s=statistics.median(rates),
        per_s_lowest=min(rates),
        per_s_highest=max(rates),
        p50=_latency_ratio(pairs, "p50_ms"),
        p99=_latency_ratio(pairs, "p99_ms"),
    )


def _latency_ratio(pairs: Sequence[tuple[LoadResult, LoadResult]], name: str) -> float | None:
    """Of the first kind of request; None when one side has answered none."""
    found: list[float] = []
    for our, other in pairs:
        mine, theirs = (side.operations[0].latency if side.operations else None for side in (our, other))
        if mine is None or theirs is None:
            return None
        found.append(getattr(mine, name) / getattr(theirs, name))
    return statistics.median(found)
