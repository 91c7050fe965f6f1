"""The tables of measurements, for people: what `results` holds, line by line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from raftnode.table import Column, Table, terminal_width
from raftnode.testing.results import Circumstances, JoinResult, Latency, NodeCost, Run, Spread, point_of

_LEAST_WIDTH: Final = 160
_BUSY_GENERATOR: Final = 0.8
_BUSY_MACHINE: Final = 0.1


def tables(run: Run) -> Iterator[str]:
    """Everything that was measured, for people, line by line."""
    yield from _about(run.circumstances)
    if run.loads:
        yield from ["", *_load_table(run), "", *_cost_table(_loaded(run)), *_disk_lines(run)]
    if run.ratios:
        yield from ["", *_ratio_table(run)]
    if run.failovers:
        yield from ["", *_failover_table(run)]
    if run.restarts:
        yield from ["", *_restart_table(run)]
    if run.joins:
        yield from ["", *_join_table(run)]
    for idle in run.idle:
        yield from ["", f"idle for {idle.seconds:g} s", *_cost_table([("idle", node) for node in idle.nodes])]
    yield from ["", *_remarks(run)]


def _about(of: Circumstances) -> Iterator[str]:
    where = f"on {of.file_system}" if of.file_system else f"running at {', '.join(of.addresses)}"
    yield of.command
    yield f"{of.began}, raftnode {of.raftnode} ({of.commit}), {of.nodes} nodes {where}, seed {of.seed}"
    yield (
        f"{of.cpus} CPUs ({of.cpu}), {of.system}, {of.python}, lmdb {of.lmdb}, msgspec {of.msgspec}, "
        f"load average before {of.load_average:.2f}"
    )
    if of.settings:
        yield "settings: " + ", ".join(f"{name}={text}" for name, text in of.settings.items())


def _table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> list[str]:
    lines: list[str] = []
    table = Table(columns, max(terminal_width(), _LEAST_WIDTH), lines.append, None)
    for row in rows:
        table.add(row)
    table.finish()
    return lines


def _columns(texts: Iterable[str], numbers: Iterable[str]) -> list[Column]:
    return [*(Column(title) for title in texts), *(Column(title, right=True) for title in numbers)]


def _load_table(run: Run) -> list[str]:
    times = ("p50 ms", "p90", "p99", "p99.9", "max")
    columns = _columns(("side", "load", "of"), ("keys", "per s", *times, "failed", "generator"))
    rows = [
        (
            load.side,
            point_of(load),
            each.kind,
            str(load.keys),
            f"{each.per_s:.0f}",
            *_times(each.latency),
            _counted(each.failures),
            f"{100 * load.generator.cpu_share:.0f} %",
        )
        for load in run.loads
        for each in load.operations
    ]
    return _table(columns, rows)


def _times(latency: Latency | None) -> list[str]:
    if latency is None:
        return ["-"] * 5
    names = ("p50_ms", "p90_ms", "p99_ms", "p999_ms", "max_ms")
    return [f"{getattr(latency, name):.2f}" for name in names]


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "0"


def _loaded(run: Run) -> list[tuple[str, NodeCost]]:
    return [(point_of(load), node) for load in run.loads for node in load.nodes]


def _cost_table(costs: Sequence[tuple[str, NodeCost]]) -> list[str]:
    if not costs:
        return []
    numbers = ("CPU", "us/op", "written/s", "per byte put", "syncs/s", "ops/sync", "memory", "file", "log entries")
    rows = [
        (
            name,
            node.role or "?",
            _number(node.cpu_share, "{:.1%}"),
            _number(node.cpu_us_per_operation, "{:.0f}"),
            _size(node.written_bytes_per_s),
            _number(node.written_per_byte_put, "{:.1f}"),
            _number(node.syncs_per_s, "{:.0f}"),
            _number(node.operations_per_sync, "{:.1f}"),
            _size(node.anonymous_bytes),
            _size(node.file_bytes),
            _number(node.log_entries, "{:.0f}"),
        )
        for name, node in costs
    ]
    return _table(_columns(("load", "node"), numbers), rows)


def _disk_lines(run: Run) -> Iterator[str]:
    for load in run.loads:
        if load.disk_per_byte_put is not None:
            yield (
                f"{point_of(load)}: the disk was given {_size(load.disk_bytes_per_s)}/s, "
                f"{load.disk_per_byte_put:.1f} bytes for each byte put"
            )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _size(value: float | None) -> str:
    return "-" if value is None else f"{value / (1 << 20):.1f} MiB"


def _ratio_table(run: Run) -> list[str]:
    columns = _columns(
        ("load",), ("keys", "ours per s", "other per s", "ratio", "lowest", "highest", "p50 ratio", "p99 ratio")
    )
    rows = [
        (
            f"{each.workload} {each.connections}" + (f"x{each.in_flight}" if each.in_flight > 1 else ""),
            str(each.keys),
            f"{each.ours_per_s:.0f}",
            f"{each.other_per_s:.0f}",
            f"{each.per_s:.2f}",
            f"{each.per_s_lowest:.2f}",
            f"{each.per_s_highest:.2f}",
            _number(each.p50, "{:.2f}"),
            _number(each.p99, "{:.2f}"),
        )
        for each in run.ratios
    ]
    return _table(columns, rows)


def _failover_table(run: Run) -> list[str]:
    columns = _columns(
        ("fault of the leader",), ("times", "median s", "worst s", "longest gap s", "elections", "answered", "failed")
    )
    rows = [
        (
            each.fault,
            str(len(each.without_writes.all_s)),
            f"{each.without_writes.median_s:.3f}",
            f"{each.without_writes.worst_s:.3f}",
            f"{each.longest_gap_s:.3f}",
            str(each.elections),
            str(each.answered),
            _counted(each.failures),
        )
        for each in run.failovers
    ]
    return ["without acknowledged writes:", *_table(columns, rows)]


def _restart_table(run: Run) -> list[str]:
    numbers = ("keys", "file", "log entries", "one: local read s", "linearizable", "all: local read s", "linearizable")
    rows = [
        (
            str(each.keys),
            _size(each.file_bytes),
            str(each.log_entries),
            _spread(each.one_local_read),
            _spread(each.one_linearizable_read),
            _spread(each.all_local_read),
            _spread(each.all_linearizable_read),
        )
        for each in run.restarts
    ]
    return ["from the start of the process (median, worst):", *_table(_columns((), numbers), rows)]


def _join_table(run: Run) -> list[str]:
    times = ("put p50 ms", "p99", "max")
    numbers = ("keys", "state", "clients", "joined s", "puts per s", *times, "leader", "newcomer", "leader's file")
    rows = [
        (
            *(str(each.keys), _size(each.state_bytes), str(each.connections), joined, f"{puts.per_s:.0f}"),
            *([f"{ms:.1f}" for ms in (puts.latency.p50_ms, puts.latency.p99_ms, puts.latency.max_ms)]),
            *memory,
        )
        for each in run.joins
        for puts, joined, memory in (
            (each.before, "before", ("", "", "")),
            (each.during, f"{each.joined_s:.1f}", _memory_of(each)),
        )
        if puts.latency is not None
    ]
    return [
        "an empty node joins (anonymous memory at most; how much the file grew):",
        *_table(_columns((), numbers), rows),
    ]


def _memory_of(join: JoinResult) -> tuple[str, str, str]:
    leader, newcomer = _size(join.leader_anonymous_bytes), _size(join.newcomer_anonymous_bytes)
    return leader, newcomer, _size(join.leader_file_grew_bytes)


def _spread(spread: Spread) -> str:
    return f"{spread.median_s:.3f}, {spread.worst_s:.3f}"


def _remarks(run: Run) -> Iterator[str]:
    """What a reader of the figures has to know."""
    for load in run.loads:
        point = f"{load.side}, {point_of(load)}"
        if load.generator.cpu_share >= _BUSY_GENERATOR:
            yield f"{point}: the load generator was the limit, or near it (see --processes)"
        if load.elections:
            yield f"{point}: {load.elections} elections"
        if load.nodes and (load.other_cpu_share or 0.0) > _BUSY_MACHINE:
            yield f"{point}: something else took {load.other_cpu_share:.0%} of a core"
        if absent := sum(each.absent for each in load.operations):
            yield f"{point}: {absent} requests were for keys that were not there"
        if load.unasked or load.lost_connections:
            yield f"{point}: {load.lost_connections} connections lost; beside requests: {_counted(load.unasked)}"
    if not run.is_complete:
        yield "INTERRUPTED: this is not all that was to be measured"
