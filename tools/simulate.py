"""Runs the deterministic simulator: whole clusters of production code in simulated time, from seeds.

    python tools/simulate.py                    # 200 seeds
    python tools/simulate.py --minutes 10       # seeds from a random one on, for ten minutes
    python tools/simulate.py --seed 17          # one seed again, with its transcript

A seed that breaks a promise is printed with what it broke. The exit status is 1 then, and 0 when every seed held.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import secrets
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait

import click
from msgspec import Struct

from raftnode.testing import simulator
from raftnode.testing.simulator import Options, Report, Simulation


class Result(Struct):
    """What became of a seed. Invariant: one of the two is there."""

    seed: int
    report: Report | None = None
    failure: str = ""


class Total(Struct):
    """What all seeds together were."""

    seeds: int = 0
    failed: list[int] = []
    seconds: float = 0.0
    events: int = 0
    elections: int = 0
    committed: int = 0
    starts: int = 0
    snapshots: int = 0
    operations: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    happened: Counter[str] = Counter()

    def add(self, result: Result) -> None:
        self.seeds += 1
        if (report := result.report) is None:
            self.failed = [*self.failed, result.seed]
            return
        self.seconds += report.seconds
        self.events += report.events
        self.elections += report.elections
        self.committed += report.committed
        self.starts += report.starts
        self.snapshots += report.snapshots
        self.operations = self.operations + report.operations
        self.faults = self.faults + report.faults
        self.happened = self.happened + report.happened

    def lines(self) -> Iterator[str]:
        """The figures, for people."""
        yield f"{self.seeds} seeds, {self.seconds:,.0f} simulated seconds, {self.events:,} events"
        yield (
            f"{self.elections:,} elections, {self.starts:,} starts of nodes, {self.snapshots:,} snapshots installed, "
            f"{self.committed:,} entries committed, "
            f"{sum(self.operations.values()):,} operations: "
            + ", ".join(f"{count:,} {name}" for name, count in self.operations.most_common())
        )
        yield f"{sum(self.faults.values()):,} faults: " + ", ".join(
            f"{n} {kind}" for kind, n in self.faults.most_common()
        )
        yield "disks: " + ", ".join(f"{n:,} {kind}" for kind, n in self.happened.most_common())
        if self.failed:
            yield f"FAILED: {len(self.failed)} of {self.seeds} seeds: {' '.join(map(str, sorted(self.failed)))}"
        else:
            yield "every promise was kept"


def try_seed(seed: int) -> Result:
    """Run one seed, and say in words what broke."""
    _silence()
    try:
        return Result(seed, simulator.run(seed))
    except Exception as failure:
        where = traceback.extract_tb(failure.__traceback__)[-1]
        return Result(seed, failure=f"{type(failure).__name__} at {where.filename}:{where.lineno}: {failure}")


def _silence() -> None:
    """The transcript tells more than the logs of the nodes."""
    logging.getLogger("raftnode").setLevel(logging.CRITICAL + 1)


def replay(seed: int) -> bool:
    """One seed with its transcript; True when it held."""
    _silence()
    try:
        report = Simulation(Options.draw(seed), click.echo).run()
    except Exception:
        click.echo(traceback.format_exc())
        click.echo(f"seed {seed} FAILED")
        return False
    click.echo(f"seed {seed} held; trace {report.digest}")
    return True


def run_many(seeds: Iterator[int], jobs: int, until: float, stops: bool = False) -> Total:
    """Run seeds side by side until there are no more, or it is time; with `stops`, until one fails."""
    total, told_at = Total(), 0.0
    in_time = itertools.takewhile(lambda _: time.monotonic() < until and not (stops and total.failed), seeds)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(try_seed, seed) for seed in itertools.islice(in_time, 2 * jobs)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(try_seed, seed) for seed in itertools.islice(in_time, len(done))}
            for result in (future.result() for future in done):
                total.add(result)
                if result.report is None:
                    click.echo(f"seed {result.seed}: {result.failure}")
                    click.echo(f"  again: python tools/simulate.py --seed {result.seed}")
            if sys.stderr.isatty() and time.monotonic() - told_at > 1:
                told_at = time.monotonic()
                click.echo(f"\r{total.seeds} seeds, {len(total.failed)} failed ", nl=False, err=True)
    if sys.stderr.isatty():
        click.echo("\r" + " " * 40 + "\r", nl=False, err=True)
    return total


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seed", type=int, help="Run this one, and print its transcript.")
@click.option("--first", type=int, default=0, show_default=True, help="The first seed of many.")
@click.option("--seeds", type=click.IntRange(1), default=200, show_default=True, help="How many.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Go on for so long instead.")
@click.option("--stop", "stops", is_flag=True, help="Begin no more seeds after the first that fails.")
@click.option("--jobs", type=click.IntRange(1), default=os.cpu_count() or 1, show_default=True, help="Processes.")
def main(seed: int | None, first: int, seeds: int, minutes: float | None, stops: bool, jobs: int) -> None:
    if seed is not None:
        sys.exit(0 if replay(seed) else 1)
    began = time.monotonic()
    if minutes is None:
        total = run_many(iter(range(first, first + seeds)), jobs, float("inf"), stops)
    else:
        first = first or secrets.randbelow(1 << 40)
        click.echo(f"seeds from {first} on")
        total = run_many(itertools.count(first), jobs, began + 60 * minutes, stops)
    for line in total.lines():
        click.echo(line)
    click.echo(f"{time.monotonic() - began:.1f} s")
    sys.exit(1 if total.failed else 0)


if __name__ == "__main__":
    main()
