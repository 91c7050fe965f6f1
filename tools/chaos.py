"""Chaos over real processes: clients that read and write through all nodes while the nodes are killed and stopped and
the network between them is cut, slowed and broken; then everything that they were told is held against the logs.

    python tools/chaos.py                                          # three nodes, a minute
    python tools/chaos.py --nodes 5 --minutes 10 --seed 7
    python tools/chaos.py --faults kill-all,stop --keep            # only these; the bundle is kept
    python tools/chaos.py --judge /var/tmp/raftnode-chaos-...      # look at a bundle again

Nodes are processes started by the command line, with the times that they have by default, on a real file system, and
with a proxy between them (raftnode/testing/proxy.py). Every operation of every client is noted, with its outcome by the
rules of raftnode/errors.py: a write that was cut off or timed out is open. Each is tried once.

The seed decides which faults come when, and for how long; whom they hit may depend on who leads at that moment. In the
end all is healed, the cluster has to serve again and all nodes to catch up, and raftnode/testing/judge.py judges the
history and the directories of the stopped nodes. What a run leaves is a bundle: history, node logs, the faults with
their times, directories. It is kept when something is wrong, or with --keep.

Exit status: 0 all is as it must be; 1 something is wrong; 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, Final, NamedTuple

import click

from raftnode.testing.chaos import FAULTS, Arena, Monkey
from raftnode.testing.history import History, Operation
from raftnode.testing.judge import HISTORY, RUN, Evidence, Findings, Problem, judge
from raftnode.testing.machine import NoDisk, new_directory_on_disk
from raftnode.testing.processes import ClusterOfProcesses, NotReached
from raftnode.testing.workload import PATIENCE_S, ChaosClient, Load, is_acknowledged

FAULTS_FILE: Final = "faults.jsonl"
_TELL_S: Final = 3.0

Progress = Callable[[Callable[[], str]], None]
"""Is told often what is going on, by a function that makes the words when they are wanted."""


# --- one run --------------------------------------------------------------------------------------------------


class Options(NamedTuple):
    """What a run is."""

    nodes: int = 3
    seconds: float = 60.0
    clients: int = 8
    keys: int = 8
    seed: int = 1
    faults: tuple[str, ...] = tuple(FAULTS)
    environment: tuple[tuple[str, str], ...] = ()
    """Settings of the nodes, besides their defaults."""


def run(options: Options, bundle: Path, told: Progress = lambda _: None) -> None:
    """A whole run, which leaves its bundle in this directory. What goes wrong with the nodes is noted in the bundle;
    what is raised is a defect of this program, or NotReached when they did not even come up."""
    with ClusterOfProcesses(options.nodes, bundle, dict(options.environment), proxied=True) as cluster:
        cluster.await_caught_up()
        trial = Trial(options, cluster, told)
        try:
            trial.run()
        finally:
            trial.save(bundle)


class Trial:
    """A cluster, its clients, and who disturbs them."""

    def __init__(self, options: Options, cluster: ClusterOfProcesses, told: Progress) -> None:
        self._options = options
        self._cluster = cluster
        self._arena = Arena(cluster)
        self._load = Load(cluster, options.clients, options.keys, options.seed)
        self._monkey = Monkey(self._arena, options.faults, options.seed, lambda: told(self._so_far))
        self._reached: int | None = None

    def run(self) -> None:
        """Faults, then healing. Raises what went wrong in one of the threads."""
        stopping = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            watching = pool.submit(self._arena.watch, stopping)
            try:
                self._disturb()
            finally:
                stopping.set()
            watching.result()

    def _disturb(self) -> None:
        try:
            self._load.start()
            self._monkey.run(self._options.seconds)
            self._reached = self._settle()
        except NotReached as failure:
            self._arena.problems.append(Problem("not_healed", "cluster", str(failure)))
        finally:
            self._load.stop()

    def _settle(self) -> int:
        """Everything is healed: the cluster serves again, all nodes catch up, and a last look at all keys through each
        of them finds one state; the nodes end cleanly. Returns the commit_id that all have reached. Raises
        NotReached."""
        cluster, load = self._cluster, self._load
        cluster.heal()
        load.await_progress()
        load.stop()
        cluster.await_caught_up(timeout=PATIENCE_S)
        for n, node in enumerate(cluster):
            reader = ChaosClient(f"last{n}", cluster, load.window, load.history, "reader")
            with contextlib.closing(reader):
                reader.read(node.address, load.window.used)
        reached = cluster.await_caught_up(timeout=PATIENCE_S)
        with self._arena.hitting(*cluster):
            statuses = cluster.terminate()
        if any(statuses):
            words = f"SIGTERM: the nodes ended with {statuses}, not 0"
            self._arena.problems.append(Problem("bad_exit", "cluster", words))
        return reached

    def _so_far(self) -> str:
        operations = list(self._load.history)
        unknown = sum(1 for operation in operations if operation.outcome == "open")
        return f"{len(operations)} operations, {unknown} of them open; {self._monkey.now}"

    def save(self, bundle: Path) -> None:
        """Leave everything that is to be judged, besides what the nodes have left."""
        facts = {
            "nodes": [node.name for node in self._cluster],
            "reached": self._reached,
            "problems": [(problem.kind, problem.where, problem.words) for problem in self._arena.problems],
            "options": self._options._asdict(),
            "began": self._arena.began,
            "faults_end": self._monkey.ended_at,
            "healthy": self._arena.healthy,
        }
        self._load.history.save(bundle / HISTORY)
        (bundle / RUN).write_text(json.dumps(facts, indent=1))
        schedule = self._monkey.schedule
        (bundle / FAULTS_FILE).write_text("".join(json.dumps(entry) + "\n" for entry in schedule))


# --- the figures ----------------------------------------------------------------------------------------------


def look_at(bundle: Path) -> tuple[Findings, list[str]]:
    """The findings of a bundle, and everything that is to be told of it, line by line. Raises OSError, KeyError or
    ValueError for what is no bundle."""
    facts = json.loads((bundle / RUN).read_bytes())
    evidence = Evidence.load(bundle)
    findings = judge(evidence)
    findings.problems[:0] = [Problem(*problem) for problem in facts["problems"]]
    schedule = [json.loads(line) for line in (bundle / FAULTS_FILE).read_text().splitlines()]
    return findings, [*_tell_run(evidence.history, facts, schedule, bundle), *_tell_findings(findings)]


def _tell_run(history: History, facts: dict[str, Any], schedule: list[dict[str, Any]], bundle: Path) -> Iterator[str]:
    options, end = facts["options"], facts["faults_end"]
    writes = [operation for operation in history if operation.kind != "get"]
    acknowledged = sorted(o.returned - facts["began"] for o in writes if is_acknowledged(o) and o.returned)
    reads = [operation for operation in history if operation.kind == "get"]
    yield (
        f"run           {options['nodes']} nodes, {options['clients']} clients, {end:.0f} s of faults, "
        f"seed {options['seed']}"
    )
    yield (
        f"writes        {len(writes)}: {len(acknowledged)} acknowledged, {_by_code(writes, 'failed')} not executed, "
        f"{_by_code(writes, 'open')} open"
    )
    local = sum(1 for operation in reads if operation.is_local)
    answered = sum(1 for operation in reads if operation.outcome == "ok")
    yield (
        f"reads         {len(reads)} ({local} of them local): {answered} answered, "
        f"{_by_code(reads, 'failed')} not executed, {_by_code(reads, 'open')} without an answer"
    )
    yield f"faults        {_counted(Counter(entry['fault'] for entry in schedule))}"
    yield f"elections     {_elections(bundle, facts['nodes'])} won"
    yield (
        f"longest time  without an acknowledged write: {longest_gap(acknowledged, [(0.0, end)]):.2f} s; "
        f"with an unharmed majority: {longest_gap(acknowledged, _unharmed(facts['healthy'], end)):.2f} s"
    )


def _tell_findings(findings: Findings) -> Iterator[str]:
    resolved = f"{findings.open_happened} had happened, {findings.open_never} never, {findings.open_still} still open"
    yield f"open writes   {resolved}"
    yield f"compared      {findings.log_entries} entries of each log, {findings.reads_compared} answers of reads"
    yield f"history       {findings.checker}"
    yield from (f"WRONG         {problem}" for problem in findings.problems)
    yield "good: nothing is lost" if findings.is_good else f"BAD: {len(findings.problems)} problems"


def _by_code(operations: Iterable[Operation], outcome: str) -> str:
    codes = Counter(operation.code for operation in operations if operation.outcome == outcome)
    return f"{codes.total()} ({_counted(codes)})" if codes else "0"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"


def _elections(bundle: Path, nodes: Iterable[str]) -> int:
    """How often a node became leader, by the logs."""
    marks = (b'"role": "leader"', b'"event": "role"')
    lines = (line for node in nodes for line in (bundle / f"{node}.log").read_bytes().splitlines())
    return sum(all(mark in line for mark in marks) for line in lines)


def _unharmed(changes: Sequence[tuple[float, bool]], end: float) -> list[tuple[float, float]]:
    """The times with an unharmed majority, as (from, to)."""
    ends = [*(at for at, _ in changes[1:]), end]
    return [(at, min(until, end)) for (at, is_healthy), until in zip(changes, ends, strict=True) if is_healthy]


def longest_gap(moments: Sequence[float], spans: Iterable[tuple[float, float]]) -> float:
    """The longest time within one of the spans in which nothing happened."""
    longest = 0.0
    for begin, end in spans:
        inside = [begin, *(moment for moment in moments if begin < moment < end), end]
        longest = max([longest, *(later - sooner for sooner, later in itertools.pairwise(inside))])
    return longest


# --- the command ----------------------------------------------------------------------------------------------


def _show_on_terminal() -> Progress:
    """A line every few seconds; nothing where nobody watches."""
    last, began = 0.0, time.monotonic()

    def show(words: Callable[[], str]) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _TELL_S:
            last = now
            click.echo(f"{now - began:5.0f} s  {words()}", err=True)

    return show if sys.stderr.isatty() else lambda _: None


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a signal handler's signature
    raise KeyboardInterrupt


def _fault_names(context: click.Context, option: click.Parameter, text: str) -> tuple[str, ...]:  # noqa: ARG001
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in FAULTS]
    if unknown or not names:
        raise click.BadParameter(f"{', '.join(unknown) or 'none'}: there are {', '.join(FAULTS)}")
    return names


@click.command(help=__doc__.replace("\n\n    ", "\n\n\b\n    "))
@click.option("--nodes", default=3, show_default=True, type=click.IntRange(3, 9), help="Nodes of the cluster.")
@click.option("--seconds", type=click.FloatRange(1), help="How long faults go on.  [default: 60]")
@click.option("--minutes", type=click.FloatRange(0.1), help="The same in minutes.")
@click.option("--clients", default=8, show_default=True, type=click.IntRange(1, 64), help="Clients at once.")
@click.option("--keys", default=8, show_default=True, type=click.IntRange(1), help="Keys in use at a time.")
@click.option("--seed", type=int, help="Which faults come when.  [default: drawn, and told]")
@click.option("--faults", default=",".join(FAULTS), callback=_fault_names, metavar="NAME,...",
              help=f"Only these.  [default: {', '.join(FAULTS)}]")  # fmt: skip
@click.option("--directory", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Make the bundle below this directory, which is made if need be.")  # fmt: skip
@click.option("--keep", is_flag=True, help="Keep the bundle of a good run, too.")
@click.option("--judge", "bundle", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="BUNDLE",
              help="Run nothing: judge this bundle again.")  # fmt: skip
def main(
    nodes: int,
    seconds: float | None,
    minutes: float | None,
    clients: int,
    keys: int,
    seed: int | None,
    faults: tuple[str, ...],
    directory: Path | None,
    keep: bool,
    bundle: Path | None,
) -> None:
    if bundle is not None:
        _judge_again(bundle)
    if seconds is not None and minutes is not None:
        raise click.UsageError("give --seconds or --minutes, not both")
    signal.signal(signal.SIGTERM, _interrupt)
    lasts = 60 * minutes if minutes is not None else seconds or 60.0
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    try:
        bundle = new_directory_on_disk("raftnode-chaos-", directory)
    except NoDisk as error:
        raise click.UsageError(str(error)) from error
    click.echo(f"bundle        {bundle}, seed {seed}")
    try:
        run(Options(nodes, lasts, clients, keys, seed, faults), bundle, _show_on_terminal())
    except NotReached as error:
        raise click.ClickException(f"BAD: {error}; kept {bundle}") from error
    findings, lines = look_at(bundle)
    for line in lines:
        click.echo(line)
    if findings.is_good and not keep:
        shutil.rmtree(bundle)
    else:
        click.echo(f"kept          {bundle}; judge it again with --judge {bundle}")
    raise SystemExit(0 if findings.is_good else 1)


def _judge_again(bundle: Path) -> None:
    try:
        findings, lines = look_at(bundle)
    except (OSError, KeyError, ValueError) as error:
        raise click.UsageError(f"{bundle} is no bundle of a run: {error}") from error
    for line in lines:
        click.echo(line)
    raise SystemExit(0 if findings.is_good else 1)


if __name__ == "__main__":
    main()
