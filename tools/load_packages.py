"""The main job on real input: load this machine's package database and its table of network services into a cluster of
real nodes, kill the nodes with kill -9 on the way, and show that nothing was lost.

    python tools/load_packages.py                      # three nodes, eight clients, a temporary directory
    python tools/load_packages.py --volume /srv/trial  # keeps the data directories and the logs

Nodes are processes on loopback, started by the command line, with sync on. One record a package, its paragraph of
dpkg's status file as the value, goes into the namespace `packages`; one record a service into `services`. The clients
write through all nodes at once. At a quarter of the load the leader is killed, at half it is started again and has to
catch up; at three quarters all nodes are killed at once and started again.

Then every record is read back through every node, and what `raftnode-inspect log --json` prints of the data
directories is compared entry by entry. Exit status: 0 all is as it must be; 1 something differs; 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

import click

from raftnode.errors import RaftnodeError
from raftnode.messages import encode_object
from raftnode.testing.processes import (
    ClusterOfProcesses,
    InspectionFailed,
    NodeProcess,
    NotReached,
    WriteRecord,
    Writers,
    wait_until,
)

PACKAGES: Final = "packages"
SERVICES: Final = "services"
_SEED: Final = 1
_READERS: Final = 4
_SHOWN: Final = 5
_PATIENCE_S: Final = 120.0

Progress = Callable[[str], None]


# --- the input ------------------------------------------------------------------------------------------------


class BadInput(Exception):
    """A file that was to be loaded is missing or is not what it should be; the message says what to give instead."""


def read_packages(status_file: Path) -> list[WriteRecord]:
    """The installed packages: the name as the key, as dpkg writes it, and the paragraph as the value."""
    advice = (
        "give dpkg's status file, or any file of paragraphs that begin with `Package:` and are parted by an empty "
        "line, with --status-file (on a system without dpkg: a `Packages` file of a Debian mirror)"
    )
    text = _read_text(status_file, advice)
    paragraphs = [paragraph for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
    records = {name: paragraph for paragraph in paragraphs if (name := _package_name(paragraph))}
    if not records:
        raise BadInput(f"{status_file} has no package in it: {advice}")
    return [WriteRecord(name, paragraph.strip("\n"), PACKAGES) for name, paragraph in records.items()]


def _package_name(paragraph: str) -> str | None:
    """As `dpkg-query` shows it: with the architecture where several may be installed side by side."""
    fields: dict[str, str] = dict(re.findall(r"^(Package|Architecture|Multi-Arch): *(\S+)", paragraph, re.MULTILINE))
    if "Package" not in fields:
        return None
    suffix = f":{fields.get('Architecture', '')}" if fields.get("Multi-Arch") == "same" else ""
    return fields["Package"] + suffix


def read_services(services_file: Path) -> list[WriteRecord]:
    """The network services: name/port/protocol as the key, and an object as the value."""
    advice = "give a table of services (lines such as `ssh 22/tcp`) with --services-file"
    records = dict(filter(None, map(_service, _read_text(services_file, advice).splitlines())))
    if not records:
        raise BadInput(f"{services_file} has no service in it: {advice}")
    return [WriteRecord(key, value, SERVICES) for key, value in records.items()]


def _service(line: str) -> tuple[str, dict[str, Any]] | None:
    entry, _, comment = line.partition("#")
    match entry.split():
        case [name, where, *aliases] if re.fullmatch(r"\d+/\w+", where):
            port, protocol = where.split("/")
            value = {"name": name, "port": int(port), "protocol": protocol, "aliases": aliases}
            return f"{name}/{where}", {**value, "comment": comment.strip()}
    return None


def _read_text(file: Path, advice: str) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise BadInput(f"{file} can't be read ({error.strerror}): {advice}") from error


# --- what is found out ----------------------------------------------------------------------------------------


@dataclass
class Kill:
    """One kill -9, and what it cost: the longest time around it without an acknowledged write."""

    who: str
    acknowledged: int
    gap_s: float


@dataclass
class CatchUp:
    """What a node that was restarted alone had on its disk, and where it got to."""

    who: str
    committed: int
    staged: int
    upto: int

    @property
    def fetched(self) -> int:
        """Entries that came from the other members, over their sockets."""
        return self.upto - self.committed - self.staged


@dataclass
class Account:
    """The figures of a run. `problems` is empty when all is as it must be."""

    records: int
    value_bytes: int
    largest: int
    packages: int
    services: int
    acknowledged: int = 0
    found: int = 0
    open_outcomes: int = 0
    not_executed: int = 0
    repeated: int = 0
    kills: list[Kill] = field(default_factory=list)
    catch_ups: list[CatchUp] = field(default_factory=list)
    left_on_disk: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By node: what all of them had committed and staged on their disks when they were killed at once."""
    elections: int = 0
    terms: tuple[int, int] = (0, 0)
    load_s: float = 0.0
    read_back: dict[str, int] = field(default_factory=dict)
    log_ends: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def account_for(records: Sequence[WriteRecord]) -> Account:
    sizes = [len(encode_object({"value": record.value})) for record in records]
    spaces = [record.namespace for record in records]
    return Account(len(records), sum(sizes), max(sizes), spaces.count(PACKAGES), spaces.count(SERVICES))


# --- the job --------------------------------------------------------------------------------------------------


class MainJob:
    """Loads `records` through a cluster, with the kills on the way, and looks at everything afterwards."""

    def __init__(
        self, cluster: ClusterOfProcesses, records: Sequence[WriteRecord], clients: int, progress: Progress
    ) -> None:
        """`cluster`: running. `progress`: is told what is going on, often."""
        self.cluster = cluster
        self.records = records
        self.account = account_for(records)
        self._clients = clients
        self._progress = progress
        self._killed, self._restarted, self._killed_all = (threading.Event() for _ in range(3))
        self._began = time.monotonic()

    def run(self) -> Account:
        """The whole job. Raises NotReached when something takes for ever."""
        self.cluster.await_leader()
        term = self.cluster.term()
        writers = Writers(self.cluster.addresses, self._feed(), self._clients)
        self._began = time.monotonic()
        try:
            with writers:
                self._disturb(writers)
        finally:
            self._open_gates()
        self._take_figures(writers, term)
        self.cluster.await_caught_up()
        self._read_back(writers)
        self._compare_logs(writers)
        return self.account

    def _part(self, eighths: int) -> int:
        return len(self.records) * eighths // 8

    def _feed(self) -> Iterator[WriteRecord]:
        """The records. Some are not handed out before what is to disturb the load has happened, so that it falls into
        the load on a machine of any speed."""
        held_back = {
            self._part(4): self._killed,
            self._part(5): self._restarted,
            len(self.records) - 1: self._killed_all,
        }
        for number, record in enumerate(self.records):
            if number in held_back:
                held_back[number].wait()
            yield record

    def _open_gates(self) -> None:
        for gate in (self._killed, self._restarted, self._killed_all):
            gate.set()

    # --- what happens in the midst of the writing ---

    def _disturb(self, writers: Writers) -> None:
        self._await(writers, self._part(2))
        leader = self._kill_leader(writers)
        self._await(writers, self._part(4) - self._clients)
        self._bring_back(leader)
        self._await(writers, self._part(6))
        self._kill_all(writers)
        self._await(writers, len(self.records))
        writers.join()

    def _await(self, writers: Writers, count: int) -> None:
        """Wait until so many records are in."""

        def enough() -> bool:
            self._progress(f"{len(writers.acknowledged)} of {len(self.records)} records acknowledged")
            return len(writers.written) >= count or not writers.is_writing

        wait_until(enough, f"{count} records are written", _PATIENCE_S, self.cluster.describe)

    def _kill_leader(self, writers: Writers) -> NodeProcess:
        leader = self.cluster.await_leader()
        since, count = time.monotonic(), len(writers.acknowledged)
        leader.kill()
        self._killed.set()
        self._note_kill(f"the leader, {leader.name}", writers, count, since)
        return leader

    def _bring_back(self, node: NodeProcess) -> None:
        """Start a killed node while the others go on, and wait until it has caught up."""
        committed, staged = _on_disk(node)
        node.start().await_answer()
        upto = self.cluster.await_caught_up(nodes=[node])
        self._restarted.set()
        self.account.catch_ups.append(CatchUp(node.name, committed, staged, upto))

    def _kill_all(self, writers: Writers) -> None:
        """Kill every node at once, and start them all again."""
        since, count = time.monotonic(), len(writers.acknowledged)
        self.cluster.kill()
        self._killed_all.set()
        self.account.left_on_disk = {node.name: _on_disk(node) for node in self.cluster}
        self.cluster.start()
        self._note_kill(f"all {len(self.cluster)} nodes at once", writers, count, since)

    def _note_kill(self, who: str, writers: Writers, count: int, since: float) -> None:
        """Wait for writes to go on after a kill, and note how long there were none."""
        self._progress(f"killed {who}; waiting for the next acknowledged write")
        before = len(writers.acknowledged) + self._clients
        wait_until(
            lambda: len(writers.acknowledged) >= before or not writers.is_writing,
            "writes are acknowledged again",
            _PATIENCE_S,
            self.cluster.describe,
        )
        self.account.kills.append(Kill(who, count, writers.longest_gap(since)))

    def _take_figures(self, writers: Writers, term: int) -> None:
        account = self.account
        account.load_s = time.monotonic() - self._began
        account.acknowledged, account.found = len(writers.acknowledged), len(writers.found)
        account.open_outcomes, account.not_executed = writers.open_outcomes, writers.not_executed
        account.repeated = writers.repeated
        account.terms = (term, self.cluster.term())
        account.elections = self.cluster.elections()
        written = {(record.namespace, record.key) for record in writers.written}
        missing = [record for record in self.records if (record.namespace, record.key) not in written]
        self._complain(f"{record.key} in {record.namespace} was never written" for record in missing)

    # --- looking at it afterwards ---

    def _complain(self, problems: Iterator[str]) -> None:
        self.account.problems.extend(problems)

    def _read_back(self, writers: Writers) -> None:
        """Every written record, through every node, by several clients."""
        for node in self.cluster:
            parts = [writers.written[n::_READERS] for n in range(_READERS)]
            with ThreadPoolExecutor(_READERS) as pool:
                found = list(pool.map(lambda part, node=node: _differing(node, part), parts))
            differing = [problem for part in found for problem in part]
            self.account.read_back[node.name] = len(writers.written) - len(differing)
            self._complain(iter(differing))
            self._progress(f"read back through {node.name}")

    def _compare_logs(self, writers: Writers) -> None:
        """The same log in every directory, and in it every acknowledged write where its answer said."""
        logs = {node.name: node.inspect("log") for node in self.cluster}
        first, *others = logs.items()
        for other in others:
            self._complain(_differences(first, other))
        lines = {line["commit_id"]: line for line in first[1]}
        for done in writers.acknowledged:
            line = lines.get(done.commit_id, {})
            if (line.get("namespace"), line.get("key")) != (done.record.namespace, done.record.key):
                self._complain(iter([f"{done.record.key} was acknowledged as {done.commit_id}, which is {line}"]))
        for name, log in logs.items():
            self.account.log_ends[name] = (log[-1]["commit_id"], log[-1]["term"], log[-1]["checksum"])


def _on_disk(node: NodeProcess) -> tuple[int, int]:
    """What the directory of a dead node holds: committed up to, and staged after that."""
    facts = node.inspect("info")[0]
    return facts["commit_id"], facts["staged"]


def _differing(node: NodeProcess, records: Sequence[WriteRecord]) -> list[str]:
    """What does not read back equal through this node."""
    problems = []
    with node.client() as client:
        for record in records:
            value = client.get(record.key, record.namespace)
            if value != record.value:
                problems.append(f"{record.key} in {record.namespace} reads back through {node.name} as {value!r:.60}")
    return problems


def _differences(one: tuple[str, list[dict[str, Any]]], other: tuple[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Where two logs part: at the first entry that differs in commit_id, term or checksum."""
    facts = ("commit_id", "term", "checksum")
    if len(one[1]) != len(other[1]):
        yield f"the log of {one[0]} has {len(one[1])} entries, that of {other[0]} {len(other[1])}"
    for mine, theirs in zip(one[1], other[1], strict=False):
        if [mine.get(fact) for fact in facts] != [theirs.get(fact) for fact in facts]:
            yield f"the logs of {one[0]} and {other[0]} part at {mine.get('commit_id')}: {mine} and {theirs}"
            return


# --- the account ----------------------------------------------------------------------------------------------


def tell(account: Account) -> Iterator[str]:
    """The account in words, line by line."""
    yield (
        f"records       {account.records}: {account.packages} packages and {account.services} services, "
        f"{account.value_bytes:,} bytes of values, the largest {account.largest:,}"
    )
    yield (
        f"written       {account.acknowledged} acknowledged, {account.found} more found when read back, "
        f"in {account.load_s:.1f} s with all kills"
    )
    yield (
        f"open          {account.open_outcomes} puts with an open outcome, read back before being repeated; "
        f"{account.not_executed} surely not executed; {account.repeated} repeated"
    )
    for kill in account.kills:
        yield (
            f"kill -9       {kill.who}, after {kill.acknowledged} acknowledged records: "
            f"{kill.gap_s:.2f} s without an acknowledged write"
        )
    yield f"elections     {account.elections} won; from term {account.terms[0]} to term {account.terms[1]}"
    for back in account.catch_ups:
        yield (
            f"caught up     {back.who}: had {back.committed} committed and {back.staged} staged on its disk, "
            f"{back.fetched} entries came over the socket transport, up to {back.upto}"
        )
    for name, (committed, staged) in account.left_on_disk.items():
        yield f"all killed    {name}: had {committed} committed and {staged} staged on its disk, and went on from there"
    for name, count in account.read_back.items():
        yield f"read back     {count} of {account.acknowledged + account.found} equal through {name}"
    for name, (commit_id, term, checksum) in account.log_ends.items():
        yield f"log           {name}: ends at {commit_id}, term {term}, checksum {checksum}"


def conclude(account: Account) -> str:
    """The last line."""
    if account.problems:
        more = len(account.problems) - _SHOWN
        shown = "; ".join(account.problems[:_SHOWN])
        return f"DIFFERENT: {len(account.problems)} problems: {shown}" + (f"; and {more} more" if more > 0 else "")
    return "the same: every acknowledged record reads back equal through each node, and all logs are one"


def load(
    records: Sequence[WriteRecord], nodes: int, clients: int, volume: Path, progress: Progress = lambda _: None
) -> Account:
    """Run the job with new nodes whose data and logs go below `volume`; they are stopped cleanly at the end."""
    with ClusterOfProcesses(nodes, volume) as cluster:
        account = MainJob(cluster, records, clients, progress).run()
        statuses = cluster.terminate()
        if any(statuses):
            account.problems.append(f"SIGTERM: the nodes ended with the statuses {statuses}, not 0")
    return account


def choose(packages: list[WriteRecord], services: list[WriteRecord], limit: int | None) -> list[WriteRecord]:
    """Both tables mixed, so that each is in every part of the load; `limit`: only so many, the largest among them."""
    largest = max(packages, key=lambda record: len(str(record.value)))
    rest = [record for record in [*packages, *services] if record is not largest]
    random.Random(_SEED).shuffle(rest)
    chosen = [*rest[: None if limit is None else limit - 1], largest]
    random.Random(_SEED).shuffle(chosen)
    return chosen


def _show_on_terminal() -> Progress:
    """A line that is written over; nothing where nobody watches."""
    if not sys.stderr.isatty():
        return lambda _: None
    return lambda words: click.echo(f"\r\x1b[K{words}", nl=False, err=True)


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a signal handler's signature
    raise KeyboardInterrupt


@click.command(help=__doc__.replace("\n\n    ", "\n\n\b\n    "))
@click.option("--nodes", default=3, show_default=True, type=click.IntRange(3, 9), help="Nodes of the cluster.")
@click.option("--clients", default=8, show_default=True, type=click.IntRange(1, 64), help="Clients that write at once.")
@click.option("--status-file", default="/var/lib/dpkg/status", show_default=True, type=click.Path(path_type=Path),
              help="The package database, as dpkg writes it.")  # fmt: skip
@click.option("--services-file", default="/etc/services", show_default=True, type=click.Path(path_type=Path),
              help="The table of network services.")  # fmt: skip
@click.option("--volume", type=click.Path(path_type=Path), metavar="DIR",
              help="Keep data and logs below this directory. Default: a temporary one.")  # fmt: skip
@click.option("--limit", type=click.IntRange(40), metavar="N", help="Load only N records.")
def main(
    nodes: int, clients: int, status_file: Path, services_file: Path, volume: Path | None, limit: int | None
) -> None:
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        records = choose(read_packages(status_file), read_services(services_file), limit)
    except BadInput as error:
        raise click.UsageError(str(error)) from error
    with contextlib.ExitStack() as stack:
        where = volume or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raftnode-packages-")))
        progress = _show_on_terminal()
        try:
            account = load(records, nodes, clients, where, progress)
        except (NotReached, InspectionFailed, RaftnodeError) as error:
            progress("")
            raise click.ClickException(f"DIFFERENT: {error}") from error
        progress("")
    for line in tell(account):
        click.echo(line)
    click.echo(conclude(account))
    if volume:
        click.echo(f"kept          {volume}: raftnode-inspect log {volume}/node-...")
    raise SystemExit(1 if account.problems else 0)


if __name__ == "__main__":
    main()
