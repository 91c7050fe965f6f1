"""Measures a cluster: throughput and latency under load, with what they cost; failover; restart; a node that joins; an
idle cluster.

    python tools/bench.py load                                     # puts on three nodes, 100 connections, 5 s
    python tools/bench.py load --workload put,get,get-local --connections 1,100,10x50 --json result.json
    python tools/bench.py load --rate 2000                         # open loop: latency counts from when it was due
    python tools/bench.py load --node 10.0.0.1:5001                # a cluster that runs already
    python tools/bench.py load --against 127.0.0.1:6100 --rounds 3 # in turn with another server, and the ratio
    python tools/bench.py failover --fault kill,stop --times 20
    python tools/bench.py restart --keys 1000,100000
    python tools/bench.py join --keys 1000000                      # an empty node joins while clients write
    python tools/bench.py idle

Nodes are processes started by the command line, with the settings that they have by default, on a real disk. With
--node nothing is started; the namespace "bench" is written to, and what only a node's own machine can tell is left out.

Compare ratios that were measured in turn in one run (--against), not figures of different runs: machines are noisy. The
result says where it was made, what else was running, and whether the load generator was the limit. Names and units of
the JSON are in raftnode/testing/results.py, what the loads are in raftnode/testing/load.py.

Exit status: 0 measured (failed requests are in the result); 1 the cluster could not be measured; 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import itertools
import os
import platform
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final, NamedTuple, TypeVar, get_args

import click
import lmdb
import msgspec

from raftnode.config import ENVIRONMENT, parse_address
from raftnode.errors import ConfigError
from raftnode.testing.load import KEY_DIGITS, Workload
from raftnode.testing.machine import NoDisk, cpu_model, file_system_of, memory_bytes, new_directory_on_disk
from raftnode.testing.measuring import (
    Endpoint,
    Fault,
    Load,
    OwnCluster,
    RunningCluster,
    Side,
    Target,
    Told,
    fill,
    measure_failovers,
    measure_idle,
    measure_join,
    measure_load,
    measure_restarts,
)
from raftnode.testing.pictures import NoMatplotlib, draw, require_matplotlib
from raftnode.testing.processes import ClusterOfProcesses, NotReached
from raftnode.testing.results import Circumstances, Run, ratios_of
from raftnode.testing.tables import tables
from raftnode.version import __version__

T = TypeVar("T")

WORKLOADS: Final = tuple(name for name in get_args(Workload) if name != "fill")
_TELL_S: Final = 3.0


class Shape(NamedTuple):
    """Of the clients."""

    connections: int
    in_flight: int


class Options(NamedTuple):
    """What all measurements have in common."""

    nodes: int
    keys: tuple[int, ...]
    key_bytes: int
    value_bytes: int
    seed: int
    settings: dict[str, str]
    directory: Path | None
    json: str | None
    plot: Path | None

    def load(self, **more: Any) -> Load:
        return Load(key_bytes=self.key_bytes, value_bytes=self.value_bytes, seed=self.seed, **more)


# --- what is measured -----------------------------------------------------------------------------------------


class Grid(NamedTuple):
    """Every combination of these, `rounds` times."""

    workloads: tuple[Workload, ...]
    shapes: tuple[Shape, ...]
    rounds: int
    common: dict[str, Any]
    """The rest of each `Load`."""


def run_loads(run: Run, options: Options, grid: Grid, sides: Sequence[Side], told: Told) -> None:
    """Measure each point on each side in turn, the sides by turns first."""
    stored = dict.fromkeys((side.name for side in sides), 0)
    for keys in options.keys:
        for workload, shape, n in itertools.product(grid.workloads, grid.shapes, range(1, grid.rounds + 1)):
            load = options.load(workload=workload, keys=keys, round=n, **shape._asdict(), **grid.common)
            for side in sides if n % 2 else sides[::-1]:
                fill(side, load, stored[side.name], told)
                run.loads.append(measure_load(side, load, told))
                stored[side.name] = 0 if workload == "delete" else keys
    run.ratios = ratios_of(run.loads)


@contextlib.contextmanager
def own_cluster(options: Options) -> Iterator[ClusterOfProcesses]:
    """A cluster on a disk, which is removed afterwards."""
    directory = new_directory_on_disk("raftnode-bench-", options.directory)
    try:
        with ClusterOfProcesses(options.nodes, directory, options.settings) as cluster:
            cluster.await_caught_up()
            yield cluster
    finally:
        shutil.rmtree(directory, ignore_errors=True)


# --- where it is measured -------------------------------------------------------------------------------------


def circumstances(options: Options, addresses: list[str]) -> Circumstances:
    """Of a run that begins now."""
    return Circumstances(
        command=shlex.join(["bench.py", *sys.argv[1:]]),
        began=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        seed=options.seed,
        settings=options.settings,
        nodes=options.nodes,
        addresses=addresses,
        raftnode=__version__,
        commit=_commit(),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        lmdb=".".join(map(str, lmdb.version())),
        msgspec=msgspec.__version__,
        uvloop=_version_of("uvloop"),
        system=f"{platform.system()} {platform.release()}",
        cpus=len(os.sched_getaffinity(0)),
        cpu=cpu_model(),
        memory_bytes=memory_bytes(),
        file_system=None,
        load_average=os.getloadavg()[0],
    )


def _version_of(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError):
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return found.stdout.strip() or None
    return None


# --- the command ----------------------------------------------------------------------------------------------


def _show_on_terminal() -> Told:
    """A line every few seconds; nothing where nobody watches."""
    last, began = 0.0, time.monotonic()

    def show(words: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _TELL_S:
            last = now
            click.echo(f"{now - began:5.0f} s  {words}", err=True)

    return show if sys.stderr.isatty() else lambda _: None


def _measure(options: Options, addresses: list[str], measure: Callable[[Run, Told], None]) -> None:
    """Measure, and hand over what was measured, also when it was interrupted."""
    _check_files(options)
    signal.signal(signal.SIGTERM, _interrupt)
    run = Run(circumstances=circumstances(options, addresses))
    try:
        measure(run, _show_on_terminal())
        run.is_complete = True
    except NoDisk as error:
        raise click.UsageError(str(error)) from error
    except (NotReached, OSError) as error:
        raise click.ClickException(str(error)) from error
    finally:
        if run.is_complete or any((run.loads, run.failovers, run.restarts, run.joins, run.idle)):
            _hand_over(run, options)


def _check_files(options: Options) -> None:
    """What can't be written afterwards is refused before."""
    for file in (options.plot, None if options.json in (None, "-") else Path(str(options.json))):
        if file is not None and not file.resolve().parent.is_dir():
            raise click.UsageError(f"{file}: there is no such directory")
    if options.plot is not None:
        try:
            require_matplotlib()
        except NoMatplotlib as error:
            raise click.UsageError(f"--plot: {error}") from error


def _hand_over(run: Run, options: Options) -> None:
    encoded = msgspec.json.format(msgspec.json.encode(run), indent=1)
    to_stdout = options.json == "-"
    for line in tables(run):
        click.echo(line, err=to_stdout)
    if to_stdout:
        click.echo(encoded)
    elif options.json is not None:
        Path(options.json).write_bytes(encoded + b"\n")
    if options.plot is not None:
        draw(run, options.plot)


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a signal handler's signature
    raise KeyboardInterrupt


def _with_disk(run: Run, cluster: ClusterOfProcesses) -> None:
    """Note what file system the data directories are on."""
    kind = file_system_of(cluster.directory)
    run.circumstances = msgspec.structs.replace(run.circumstances, file_system=kind)


def _list_of(words: str, parse: Callable[[str], T]) -> tuple[T, ...]:
    """The parts of a list with commas. Raises BadParameter for one that `parse` refuses, and for none."""
    try:
        found = tuple(parse(word.strip()) for word in words.split(",") if word.strip())
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    if not found:
        raise click.BadParameter("there is nothing in it")
    return found


def _one_of(names: Sequence[str]) -> Callable[[str], str]:
    def parse(word: str) -> str:
        if word not in names:
            raise ValueError(f"{word!r}: there are {', '.join(names)}")
        return word

    return parse


def _count(word: str) -> int:
    if not (word.isascii() and word.isdigit() and 0 < int(word) <= 10**9):
        raise ValueError(f"{word!r} is no count: a whole number from 1 on")
    return int(word)


def _shape(word: str) -> Shape:
    connections, x, in_flight = word.partition("x")
    return Shape(_count(connections), _count(in_flight) if x else 1)


def _setting(word: str) -> tuple[str, str]:
    name, _, text = word.partition("=")
    if name not in ENVIRONMENT or not text:
        raise ValueError(f"{word!r}: NAME=VALUE, where NAME is one of {', '.join(sorted(ENVIRONMENT))}")
    return name, text


def _listed(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, str], Any]:
    return lambda context, option, words: _list_of(words, parse)  # noqa: ARG005


def _address(context: click.Context, option: click.Parameter, text: str | None) -> str | None:  # noqa: ARG001
    if text is not None:
        try:
            parse_address(text)
        except ConfigError as error:
            raise click.BadParameter(str(error)) from error
    return text


def _settings(context: click.Context, option: click.Parameter, words: tuple[str, ...]) -> dict[str, str]:  # noqa: ARG001
    return dict(_list_of(word, _setting)[0] for word in words)


_COMMON: Final = [
    click.option("--nodes", default="3", show_default=True, type=click.Choice(["1", "3", "5"]), help="Nodes to start."),
    click.option("--keys", default="10000", show_default=True, callback=_listed(_count), metavar="N,...",
                 help="Keys that are stored before; several: one after the other, ascending."),
    click.option("--key-size", default=240, show_default=True, type=click.IntRange(KEY_DIGITS, 500), metavar="BYTES"),
    click.option("--value-size", default=1024, show_default=True, type=click.IntRange(0, 4 << 20), metavar="BYTES"),
    click.option("--seed", type=int, help="Of keys, and of when faults come.  [default: drawn, and told]"),
    click.option("--setting", multiple=True, callback=_settings, metavar="NAME=VALUE",
                 help="A setting of the nodes, as in their environment: RAFTNODE_LOG_ENTRIES=1000."),
    click.option("--directory", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
                 help="Keep the nodes' data below this directory while it lasts."),
    click.option("--json", metavar="FILE", help="Write the result as JSON; - is stdout, and the table goes to stderr."),
    click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.png",
                 help="Draw it (needs matplotlib)."),
]  # fmt: skip


def _common(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that all measurements have, and make `Options` of them."""

    def with_options(
        nodes: str,
        keys: tuple[int, ...],
        key_size: int,
        value_size: int,
        seed: int | None,
        setting: dict[str, str],
        directory: Path | None,
        json: str | None,
        plot: Path | None,
        **rest: Any,
    ) -> None:
        drawn = random.SystemRandom().randrange(1 << 32) if seed is None else seed
        sizes = tuple(sorted(set(keys)))
        command(Options(int(nodes), sizes, key_size, value_size, drawn, setting, directory, json, plot), **rest)

    with_options.__doc__ = command.__doc__
    with_options.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    for option in reversed(_COMMON):
        option(with_options)
    return with_options


@click.group(help=__doc__.replace("\n\n    ", "\n\n\b\n    "))
def main() -> None:
    pass


@main.command("load")
@click.option("--workload", default="put", show_default=True, callback=_listed(_one_of(WORKLOADS)), metavar="NAME,...",
              help=f"Any of {', '.join(WORKLOADS)}. get is linearizable; mixed is puts and gets.")  # fmt: skip
@click.option("--connections", default="100", show_default=True, callback=_listed(_shape), metavar="N[xM],...",
              help="Connections, and requests in flight on each: 10x50.")  # fmt: skip
@click.option("--seconds", default=5.0, show_default=True, type=click.FloatRange(0.1), help="The measured time, each.")
@click.option("--warm-up", default=1.0, show_default=True, type=click.FloatRange(0), help="Seconds of load before it.")
@click.option("--rate", default=0.0, type=click.FloatRange(0), help="Open loop: so many requests a second are due.")
@click.option("--reads", default=0.5, show_default=True, type=click.FloatRange(0, 1), help="Share of gets in mixed.")
@click.option("--new-keys", is_flag=True, help="Puts make new keys, instead of new values of those that are there.")
@click.option("--target", default="leader", show_default=True, type=click.Choice(get_args(Target)),
              help="The nodes that clients talk to.")  # fmt: skip
@click.option("--processes", default=1, show_default=True, type=click.IntRange(1, 64), help="Load generators.")
@click.option("--node", callback=_address, metavar="HOST:PORT", help="Start nothing: measure the cluster of this node.")
@click.option("--against", callback=_address, metavar="HOST:PORT",
              help="In turn with this server, which takes the same put and get messages.")  # fmt: skip
@click.option("--rounds", default=1, show_default=True, type=click.IntRange(1, 1000), help="Measure each so often.")
@_common
def load_command(
    options: Options,
    workload: tuple[Workload, ...],
    connections: tuple[Shape, ...],
    rounds: int,
    node: str | None,
    against: str | None,
    **common: Any,
) -> None:
    """Throughput and latency, and what they cost the nodes."""
    if against and "delete" in workload:
        raise click.UsageError("--against: delete is measured on our side only")
    common["warm_up_s"] = common.pop("warm_up")
    grid = Grid(workload, connections, rounds, common)
    others = [Endpoint(against)] if against else []

    def measure(run: Run, told: Told) -> None:
        with contextlib.ExitStack() as stack:
            if node:
                side: Side = RunningCluster(node)
                members = len(side.addresses("all"))
                run.circumstances = msgspec.structs.replace(run.circumstances, nodes=members)
            else:
                cluster = stack.enter_context(own_cluster(options))
                side = OwnCluster(cluster)
                _with_disk(run, cluster)
            run_loads(run, options, grid, [side, *others], told)

    _measure(options, [node] if node else [], measure)


@main.command("failover")
@click.option("--fault", default="kill,stop", show_default=True, callback=_listed(_one_of(get_args(Fault))),
              metavar="NAME,...", help="Of the leader: kill -9, SIGSTOP.")  # fmt: skip
@click.option("--times", default=20, show_default=True, type=click.IntRange(1, 10_000), help="Faults of each kind.")
@click.option("--rate", default=200.0, show_default=True, type=click.FloatRange(20, 10_000),
              help="Puts a second that are due, through all nodes.")  # fmt: skip
@_common
def failover_command(options: Options, fault: tuple[Fault, ...], times: int, rate: float) -> None:
    """Time without acknowledged writes after a fault of the leader."""
    if options.nodes == 1:
        raise click.UsageError("one node has nobody to take over: --nodes 3 or 5")

    def measure(run: Run, told: Told) -> None:
        with own_cluster(options) as cluster:
            _with_disk(run, cluster)
            load = options.load(keys=options.keys[-1])
            fill(OwnCluster(cluster), load, told=told)
            for each in fault:
                run.failovers.append(measure_failovers(cluster, each, times, rate, load, told))

    _measure(options, [], measure)


@main.command("restart")
@click.option("--times", default=3, show_default=True, type=click.IntRange(1, 1000), help="Starts at each size.")
@_common
def restart_command(options: Options, times: int) -> None:
    """Time from the start of a process to its first read, against the size of the database."""

    def measure(run: Run, told: Told) -> None:
        with own_cluster(options) as cluster:
            _with_disk(run, cluster)
            for first, keys in itertools.pairwise((0, *options.keys)):
                load = options.load(keys=keys)
                fill(OwnCluster(cluster), load, first, told)
                run.restarts.append(measure_restarts(cluster, load, times, told))

    _measure(options, [], measure)


@main.command("join")
@click.option(
    "--connections", default=50, show_default=True, type=click.IntRange(1, 10_000), help="Clients that write."
)
@click.option("--seconds", default=15.0, show_default=True, type=click.FloatRange(0.1),
              help="They write for so long before the node comes, to compare.")  # fmt: skip
@click.option("--rate", default=0.0, type=click.FloatRange(0), help="Open loop: so many puts a second are due.")
@_common
def join_command(options: Options, connections: int, seconds: float, rate: float) -> None:
    """Time until an empty node has the whole state and a vote, and what clients that write feel of it."""

    def measure(run: Run, told: Told) -> None:
        with own_cluster(options) as cluster:
            _with_disk(run, cluster)
            for first, keys in itertools.pairwise((0, *options.keys)):
                load = options.load(keys=keys, connections=connections, seconds=seconds, rate=rate)
                fill(OwnCluster(cluster), load, first, told)
                run.joins.append(measure_join(cluster, load, told))

    _measure(options, [], measure)


@main.command("idle")
@click.option("--seconds", default=10.0, show_default=True, type=click.FloatRange(0.1), help="How long to look.")
@_common
def idle_command(options: Options, seconds: float) -> None:
    """What nodes use that nobody asks for anything."""

    def measure(run: Run, told: Told) -> None:
        with own_cluster(options) as cluster:
            _with_disk(run, cluster)
            side = OwnCluster(cluster)
            fill(side, options.load(keys=options.keys[-1]), told=told)
            run.idle.append(measure_idle(side, seconds, told))

    _measure(options, [], measure)


if __name__ == "__main__":
    main()
