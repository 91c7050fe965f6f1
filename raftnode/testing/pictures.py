"""Pictures of measurements, drawn with matplotlib, which is an extra: `pip install 'raftnode[tools]'`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from raftnode.testing.results import FailoverResult, IdleResult, JoinResult, LoadResult, RestartResult, Run, point_of

_PANEL_INCHES: Final = (8.0, 4.5)
_POINT_INCHES: Final = 0.9
"""A panel is wider than that when it has many points: so much takes the name of one, "get-local"."""


class NoMatplotlib(Exception):
    """It is not installed; the message says what to do."""


def require_matplotlib() -> Any:
    """Its class of figures. Raises NoMatplotlib: to be asked before anything is measured."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoMatplotlib("drawing needs matplotlib: pip install 'raftnode[tools]'") from error
    return Figure


def draw(run: Run, file: Path) -> None:
    """A picture of everything that a run has measured, a panel each, as PNG (or what the file's name says). Raises
    NoMatplotlib, OSError, and ValueError for a run without figures."""
    panels: list[Callable[[Any], None]] = []
    if run.loads:
        panels += [lambda axes: _throughput(axes, run.loads), lambda axes: _latency(axes, run.loads)]
    if run.failovers:
        panels.append(lambda axes: _failovers(axes, run.failovers))
    if run.restarts:
        panels.append(lambda axes: _restarts(axes, run.restarts))
    if run.joins:
        panels.append(lambda axes: _joins(axes, run.joins))
    if run.idle:
        panels.append(lambda axes: _idle(axes, run.idle))
    if not panels:
        raise ValueError("nothing was measured")
    width, height = _PANEL_INCHES
    width = max(width, _POINT_INCHES * len(set(_points(run.loads))))
    figure = require_matplotlib()(figsize=(width, height * len(panels)), layout="constrained")
    for panel, axes in zip(panels, figure.subplots(len(panels), squeeze=False)[:, 0], strict=True):
        panel(axes)
    of = run.circumstances
    figure.suptitle(f"raftnode {of.raftnode}, {of.nodes} nodes, {of.cpus} CPUs, {of.file_system or '?'}, {of.began}")
    figure.savefig(file, dpi=120)


def _points(loads: Sequence[LoadResult]) -> list[str]:
    """Where on the axis each load goes; with the number of keys where several were measured."""
    if len({load.keys for load in loads}) > 1:
        return [f"{point_of(load)}\n{load.keys} keys" for load in loads]
    return [point_of(load).replace(" ", "\n", 1) for load in loads]


def _by_side(loads: Sequence[LoadResult]) -> dict[str, list[LoadResult]]:
    sides: dict[str, list[LoadResult]] = {}
    for load in loads:
        sides.setdefault(load.side, []).append(load)
    return sides


def _throughput(axes: Any, loads: Sequence[LoadResult]) -> None:
    """A dot for each round."""
    for side, found in _by_side(loads).items():
        axes.plot(_points(found), [load.per_s for load in found], "o", label=side, alpha=0.7)
    axes.set_ylabel("answers a second")
    axes.set_yscale("log")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()


def _latency(axes: Any, loads: Sequence[LoadResult]) -> None:
    """Median, 99 % and worst, for each round."""
    marks = (("p50_ms", "o", "p50"), ("p99_ms", "^", "p99"), ("max_ms", "x", "max"))
    for n, (side, found) in enumerate(_by_side(loads).items()):
        timed = [load for load in found if load.operations and load.operations[0].latency]
        for name, mark, words in marks:
            times = [getattr(load.operations[0].latency, name) for load in timed]
            axes.plot(_points(timed), times, mark, color=f"C{n}", label=f"{side}, {words}", alpha=0.7)
    axes.set_ylabel("latency, ms")
    axes.set_yscale("log")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()


def _failovers(axes: Any, failovers: Sequence[FailoverResult]) -> None:
    """How many of the faults were over after how long."""
    for result in failovers:
        ranked = sorted(result.without_writes.all_s)
        shares = [(n + 1) / len(ranked) for n in range(len(ranked))]
        words = f"{result.fault} of the leader, {result.nodes} nodes"
        axes.step([0.0, *ranked], [0.0, *shares], where="post", label=words)
    axes.set_xlabel("seconds without an acknowledged write")
    axes.set_ylabel("share of the faults")
    axes.grid(alpha=0.3)
    axes.legend()


def _restarts(axes: Any, restarts: Sequence[RestartResult]) -> None:
    keys = [result.keys for result in restarts]
    for name in ("one_local_read", "one_linearizable_read", "all_linearizable_read"):
        medians = [getattr(result, name).median_s for result in restarts]
        axes.plot(keys, medians, "o-", label=name.replace("_", " "))
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("keys stored")
    axes.set_ylabel("seconds from the start")
    axes.grid(alpha=0.3)
    axes.legend()


def _joins(axes: Any, joins: Sequence[JoinResult]) -> None:
    names = [f"{join.keys} keys, {when}" for join in joins for when in ("before", "during")]
    latencies = [puts.latency for join in joins for puts in (join.before, join.during)]
    axes.bar(names, [latency.p99_ms if latency else 0.0 for latency in latencies])
    axes.set_ylabel("p99 of puts in ms, while a node joins")


def _idle(axes: Any, idle: Sequence[IdleResult]) -> None:
    nodes = [node for result in idle for node in result.nodes]
    axes.bar([f"{node.role}\n{node.address}" for node in nodes], [100 * (node.cpu_share or 0.0) for node in nodes])
    axes.set_ylabel("% of one core, idle")
