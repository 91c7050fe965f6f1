"""Real nodes, each a process started by the command line: for tests with kill -9 and SIGSTOP, and for trials.

    with ClusterOfProcesses(3) as cluster:
        with cluster.client() as client:
            written = client.put("name", "John Doe")
        leader = cluster.await_leader()
        leader.kill()
        cluster.await_leader()
        leader.start()
        cluster.await_caught_up(written["commit_id"])

A node gets exactly the settings that it is given here: the environment's own are not passed on. What it prints goes
to a file beside its data directory. Whatever ends the `with` block, no process is left, nor a temporary directory.

Nothing here sleeps in place of a condition: `wait_until` is the one loop, every wait has a deadline, and a wait that
fails says what was awaited and shows the ends of the nodes' logs.

`Writers` puts them under load: clients that write at once, and what became of every record.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeVar

import raftnode
from raftnode.blocking import LineConnection
from raftnode.client import Client
from raftnode.config import DEFAULT_NAMESPACE, ENVIRONMENT, Settings, parse_address
from raftnode.errors import NotCommitted, ProtocolError, Unavailable, error_for
from raftnode.inspection import Directory
from raftnode.messages import decode_object, encode_object
from raftnode.testing.proxy import Proxy

T = TypeVar("T")

PATIENCE_S: Final = 30.0
"""How long a condition is awaited unless told otherwise: far more than it takes, on a machine that is busy."""
FAST: Final = {"HB_TIME": "50", "LOW_TIMEOUT": "300", "HIGH_TIMEOUT": "600"}
"""Settings for a cluster that notices a dead leader soon. Too short for nodes under full load on two cores."""

_PAUSE_S: Final = 0.02
_LOG_TAIL: Final = 12
_LEAST_PORT: Final = 10_240
_OVERLAPPING: Final = 200
"""Requests at a time on one connection: less than a node takes before it stops to read."""


class NotReached(TimeoutError):
    """An awaited condition did not come about; the message tells what is known of the nodes."""


class Impossible(Exception):
    """Raised by a condition that can't come about any more: there is no sense in waiting on."""


class InspectionFailed(Exception):
    """`raftnode-inspect` ended with `status`, for the reason in `words`."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"raftnode-inspect ended with status {status}: {words}")
        self.status = status
        self.words = words


def wait_until(
    condition: Callable[[], T | None], what: str, timeout: float = PATIENCE_S, explain: Callable[[], str] = str
) -> T:
    """Ask `condition` again and again until it gives something true, and return that.

    Raises NotReached with `what`, the reason and what `explain` tells, after `timeout` seconds, or as soon as the
    condition raises Impossible.
    """
    deadline = time.monotonic() + timeout
    try:
        while not (found := condition()):
            if time.monotonic() > deadline:
                raise Impossible(f"not within {timeout:g} s")
            time.sleep(_PAUSE_S)
    except Impossible as why:
        raise NotReached(f"awaited: {what}; {why}\n{explain()}") from None
    return found


def free_addresses(count: int) -> list[str]:
    """Addresses on loopback where nothing listens.

    Not from the range that the kernel takes the ports of outgoing connections from: there, the port of a killed node
    may be taken before it is back, and a connection to a dead port may even meet itself.
    """
    found: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        while len(found) < count:
            port = random.SystemRandom().randrange(_LEAST_PORT, _first_outgoing_port())
            bound = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                bound.bind(("127.0.0.1", port))
                found[port] = bound
    return [f"127.0.0.1:{port}" for port in sorted(found)]


def free_address() -> str:
    """One address on loopback where nothing listens."""
    return free_addresses(1)[0]


def _first_outgoing_port() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        if first > _LEAST_PORT + 1000:
            return first
    return 32_768


def command_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for a `python -m raftnode...` of ours: this very raftnode, and no settings but those given."""
    inherited = {
        name: text
        for name, text in os.environ.items()
        if not name.startswith("RAFTNODE_") and name not in ENVIRONMENT
    }  # fmt: skip
    ours = str(Path(raftnode.__file__).resolve().parents[1])
    path = os.pathsep.join(part for part in (ours, os.environ.get("PYTHONPATH", "")) if part)
    return {**inherited, "PYTHONPATH": path, **(environment or {})}


def inspect(directory: Path, *command: str) -> list[dict[str, Any]]:
    """What `raftnode-inspect COMMAND DIR --json` prints: one dict a line. Raises InspectionFailed for any exit
    status but 0."""
    return [json.loads(line) for line in inspect_lines(directory, *command)]


def inspect_lines(directory: Path, *command: str) -> Iterator[bytes]:
    """The lines that `inspect` reads, as they come: for logs that are long. Raises InspectionFailed after the last one
    for any exit status but 0."""
    name, *options = command
    words = [sys.executable, "-m", "raftnode.inspector", name, str(directory), "--json", *options]
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(words, env=command_environment(), stdout=subprocess.PIPE, stderr=complaints) as process,
    ):
        assert process.stdout is not None, "it was asked for"
        yield from process.stdout
        if status := process.wait():
            complaints.seek(0)
            raise InspectionFailed(status, complaints.read().decode(errors="replace").strip())


class NodeProcess:
    """One node: its address, its data directory (`volume`), its log (`log_file`), and the process while there is one.

    The process may be started, ended in any way, and started again, any number of times. The log is kept throughout.
    """

    def __init__(
        self,
        address: str,
        members: Iterable[str],
        directory: Path,
        environment: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        listen: str | None = None,
        join: Sequence[str] = (),
        disk: int = 1,
    ) -> None:
        """`members`: addresses of the cluster, this one's among them or not. The data goes below `directory`.
        `environment`: settings (HB_TIME, ...). `options`: more of the command line. `listen`: where it listens, when
        that is not its address. `join`: it asks these members to be taken, and `members` are not told to it. `disk`:
        the how manieth of this address it has; each has a name of its own. Nothing is started yet."""
        self.address = address
        self.join = list(join)
        self.listen = listen or address
        self.members = sorted({address, *members})
        self._directory = directory
        self._take_disk(disk)
        self.environment = dict(environment or {})
        self.options = list(options)
        self.is_paused = False
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<{self.name}, {self._state()}>"

    def _state(self) -> str:
        if self._process is None:
            return "not started"
        if not self.is_running:
            return f"ended with status {self._process.returncode}"
        return f"process {self._process.pid}" + (", paused" if self.is_paused else "")

    def _take_disk(self, disk: int) -> None:
        self.disk = disk
        self.name = f"node-{parse_address(self.address)[1]}" + (f".{disk}" if disk > 1 else "")
        self.volume = self._directory / self.name
        self.log_file = self._directory / f"{self.name}.log"

    # --- its life ---

    @property
    def command(self) -> list[str]:
        """The command line that starts it."""
        peers = ",".join(member for member in self.members if member != self.address)
        founded_by = ["--join", ",".join(self.join)] if self.join else ["--peers", peers]
        where = ["--ip", self.address, *founded_by, "--volume", str(self.volume)]
        listen = ["--listen", self.listen] if self.listen != self.address else []
        return [sys.executable, "-m", "raftnode", "serve", *where, *listen, *self.options]

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def was_started(self) -> bool:
        """True once it has had a process."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """The id of its process, which may have ended."""
        assert self._process is not None, f"{self.name} was never started"
        return self._process.pid

    def start(self) -> Self:
        """Start it; returns at once (see `await_answer`)."""
        assert not self.is_running, f"{self.name} is running already"
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        self.is_paused = False
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                env=command_environment(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for who started us; we end the nodes
            )
        return self

    def kill(self) -> None:
        """kill -9; returns once it is dead. Does nothing when it is."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self.is_paused = False

    def wipe(self) -> None:
        """kill -9, and its disk is lost."""
        self.kill()
        shutil.rmtree(self.volume)

    def exchange_disk(self) -> str:
        """kill -9, and there is an empty disk in place of its own. For the node its disk is lost; for whoever wants to
        know what was on it, it stays under the old name, which is returned. The log begins anew, too."""
        self.kill()
        name = self.name
        self._take_disk(self.disk + 1)
        return name

    def pause(self) -> None:
        """SIGSTOP: it does nothing any more, and its connections stay."""
        self._signal(signal.SIGSTOP)
        self.is_paused = True

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)
        self.is_paused = False

    def terminate(self, timeout: float = PATIENCE_S) -> int:
        """SIGTERM; returns the exit status."""
        self._signal(signal.SIGTERM)
        return self.await_exit(timeout)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, f"{self.name} was never started"
        self._process.send_signal(number)

    def restart(self) -> Self:
        """kill -9, and start again."""
        self.kill()
        return self.start()

    def await_exit(self, timeout: float = PATIENCE_S) -> int:
        """Wait for it to end by itself; the exit status, negative for a signal."""
        process = self._process
        assert process is not None, f"{self.name} was never started"
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise NotReached(f"awaited: {self.name} ends; not within {timeout:g} s\n{self.describe()}") from None

    # --- asking it ---

    def ask(self, message: dict[str, Any], timeout: float = 1.0) -> dict[str, Any] | None:
        """One request over a connection of its own, past a proxy; None when there is no answer within `timeout`
        seconds."""
        try:
            connection = LineConnection(self.listen, timeout, Settings().peer_frame_bytes)
            with contextlib.closing(connection):
                return decode_object(connection.request(encode_object(message), timeout))
        except (OSError, ProtocolError):
            return None

    def status(self, timeout: float = 1.0) -> dict[str, Any] | None:
        """What it knows of itself and the cluster; None when it does not answer."""
        if not self.is_running or self.is_paused:
            return None
        answer = self.ask({"type": "status"}, timeout)
        return None if answer is None else answer["data"]

    def client(self, timeout: float = 10.0) -> Client:
        """A client of this node alone."""
        return Client(self.address, timeout=timeout)

    def read(
        self, keys: Iterable[str], namespace: str = DEFAULT_NAMESPACE, consistency: str = "linearizable"
    ) -> dict[str, Any]:
        """The values of many keys through this node, fast: the requests overlap on one connection. What is not there
        is left out. Raises a RequestError for an answer that is an error, and OSError when there is none."""
        found: dict[str, Any] = {}
        common = {"type": "get", "namespace": namespace, "consistency": consistency}
        with (
            socket.create_connection(parse_address(self.address), PATIENCE_S) as connection,
            connection.makefile("rwb") as stream,
        ):
            for part in _parts(keys, _OVERLAPPING):
                stream.write(b"".join(encode_object({**common, "key": key, "id": key}) for key in part))
                stream.flush()
                for _ in part:
                    record = _answered(stream.readline(), self.address)
                    if record["version"]:
                        found[record["key"]] = record["value"]
        return found

    def await_answer(self, timeout: float = PATIENCE_S) -> dict[str, Any]:
        """Wait until it answers; its status. Fails at once when the process has ended."""

        def answer() -> dict[str, Any] | None:
            if not self.is_running:
                raise Impossible("the process has ended")
            return self.status()

        return wait_until(answer, f"{self.name} answers", timeout, self.describe)

    def inspect(self, *command: str) -> list[dict[str, Any]]:
        """`raftnode-inspect` on its directory, whether it runs or not; see `inspect`."""
        return inspect(self.volume, *command)

    # --- its log ---

    def mark(self) -> int:
        """A place in its log, for `events(since=...)`: the present end."""
        return self.log_file.stat().st_size if self.log_file.exists() else 0

    def log_text(self, since: int = 0) -> str:
        """What it has printed since a `mark`."""
        return self.log_file.read_bytes()[since:].decode(errors="replace") if self.log_file.exists() else ""

    def events(self, event: str | None = None, since: int = 0) -> list[dict[str, Any]]:
        """The lines of its log as dicts, of one kind or of all; a line that is no JSON is {"event": its text}."""
        found = [_as_event(line) for line in self.log_text(since).splitlines()]
        return [line for line in found if event is None or line.get("event") == event]

    def await_event(self, event: str, since: int = 0, timeout: float = PATIENCE_S, **facts: Any) -> dict[str, Any]:
        """Wait for a line in its log with these facts."""

        def logged() -> dict[str, Any] | None:
            lines = self.events(event, since)
            return next((line for line in lines if all(line.get(name) == fact for name, fact in facts.items())), None)

        return wait_until(logged, f"{self.name} logs {event} {facts or ''}", timeout, self.describe)

    def describe(self) -> str:
        """Its state and the end of its log, for a failure's message."""
        lines = self.log_text().splitlines()[-_LOG_TAIL:]
        return "\n".join([f"--- {self.name}: {self._state()}; the end of {self.log_file}:", *lines])


def _parts(keys: Iterable[str], size: int) -> Iterator[list[str]]:
    rest = iter(keys)
    while part := list(itertools.islice(rest, size)):
        yield part


def _answered(line: bytes, address: str) -> dict[str, Any]:
    """What a get was answered with."""
    if not line:
        raise ConnectionResetError(f"{address} closed the connection")
    answer = decode_object(line)
    if detail := answer.get("error"):
        raise error_for(detail["code"], detail["message"])
    data: dict[str, Any] = answer["data"]
    return data


def _as_event(line: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found = json.loads(line)
        if isinstance(found, dict):
            return found
    return {"event": line}


class ClusterOfProcesses:
    """Nodes on loopback that are each other's members. As a context manager it starts them all, and ends them.

    With `proxied` there is a `proxy` between them, and between them and their clients: see `raftnode.testing.proxy`.
    """

    def __init__(
        self,
        size: int = 3,
        directory: Path | None = None,
        environment: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        proxied: bool = False,
        spares: int = 0,
    ) -> None:
        """`directory`: where data and logs go and stay; None: a temporary one. `environment` and `options`: for every
        node, see `NodeProcess`. `spares`: so many nodes more may come later (`newcomer`) when there is a proxy, which
        has to know their addresses from the beginning. Nothing is started yet, but a proxy."""
        self._temporary = None if directory else tempfile.TemporaryDirectory(prefix="raftnode-cluster-")
        self.directory = Path(directory or self._temporary.name)  # type: ignore[union-attr]
        count = size + spares
        found = free_addresses(2 * count if proxied else size)
        listens = dict(zip(found[:count], found[-count:], strict=True)) if proxied else {each: each for each in found}
        self.addresses = found[:size]
        self.nodes = [
            NodeProcess(address, self.addresses, self.directory, environment, options, listens[address])
            for address in self.addresses
        ]
        self._proxy = Proxy(listens) if proxied else None
        self._given = (environment, options)
        self._left: list[NodeProcess] = []
        self._listens = listens
        self._spares = dict.fromkeys(found[size:count], 1) if proxied else {}  # and its next disk

    def newcomer(self, *via: NodeProcess) -> NodeProcess:
        """A node with an empty directory that is going to join, asking these members (default: all). It counts as one
        of the cluster's from now on; not started yet."""
        assert self._proxy is None or self._spares, "a proxy knows its nodes from the beginning"
        environment, options = self._given
        address = next(iter(self._spares), None) or free_address()
        disk = self._spares.pop(address, 1)
        listen = self._listens.get(address)
        asked = [node.address for node in via or self.nodes]
        node = NodeProcess(address, [], self.directory, environment, options, listen, asked, disk)
        self.nodes.append(node)
        self.addresses.append(address)
        return node

    def let_go(self, node: NodeProcess) -> None:
        """The node is not one of the cluster's any more. Its process goes on, and is ended with the others."""
        self.nodes.remove(node)
        self.addresses.remove(node.address)
        self._left.append(node)

    def reuse(self, node: NodeProcess) -> None:
        """The address of a node that was let go, and has ended, is free for a newcomer with an empty disk."""
        assert not node.is_running, f"{node.name} has the address still"
        self._left.remove(node)
        self._spares[node.address] = node.disk + 1

    @property
    def spares(self) -> int:
        """How many more may come while there is a proxy."""
        return len(self._spares)

    def __getitem__(self, index: int) -> NodeProcess:
        return self.nodes[index]

    def __iter__(self) -> Iterator[NodeProcess]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def __enter__(self) -> Self:
        atexit.register(self.close)
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- its life ---

    @property
    def proxy(self) -> Proxy:
        """The network between the nodes, when it is `proxied`."""
        assert self._proxy is not None, "this cluster has no proxy"
        return self._proxy

    @property
    def running(self) -> list[NodeProcess]:
        """The nodes that have a process that is not paused."""
        return [node for node in self.nodes if node.is_running and not node.is_paused]

    def others(self, *besides: NodeProcess) -> list[NodeProcess]:
        """All nodes but these."""
        return [node for node in self.nodes if node not in besides]

    def start(self) -> Self:
        """Start every node that does not run, and wait until each answers."""
        for node in self.nodes:
            if not node.is_running:
                node.start()
        for node in self.nodes:
            node.await_answer()
        return self

    def heal(self) -> Self:
        """Open every road, resume what is paused, start what does not run, and wait until there is a leader and all
        have caught up."""
        if self._proxy is not None:
            self._proxy.heal()
        for node in self.nodes:
            if node.is_running and node.is_paused:
                node.resume()
        self.start()
        self.await_caught_up()
        return self

    def kill(self, nodes: Iterable[NodeProcess] | None = None) -> None:
        """kill -9 to these (default: all) at once; returns once they are dead."""
        running = [node for node in (self.nodes if nodes is None else nodes) if node.is_running]
        for node in running:
            os.kill(node.pid, signal.SIGKILL)
        for node in running:
            node.kill()

    def terminate(self, timeout: float = PATIENCE_S) -> list[int]:
        """SIGTERM to all that run, at once; their exit statuses."""
        running = [node for node in self.nodes if node.is_running]
        for node in running:
            os.kill(node.pid, signal.SIGTERM)
        return [node.await_exit(timeout) for node in running]

    def close(self) -> None:
        """End every process, and remove a temporary directory. May be called again."""
        self.kill([*self.nodes, *self._left])
        if self._proxy is not None:
            self._proxy.close()
        if self._temporary is not None:
            self._temporary.cleanup()
        atexit.unregister(self.close)

    # --- asking it ---

    def client(self, first: int = 0, timeout: float = 10.0) -> Client:
        """A client that begins at the node of that index and may go on to the others."""
        return Client([*self.addresses[first:], *self.addresses[:first]], timeout=timeout)

    def leader(self) -> NodeProcess | None:
        """The node that a majority of the voters, by its own word, takes for the leader of one term; None when there is
        none now."""
        statuses = {node.address: node.status() for node in self.running}
        for node in self.running:
            own = statuses[node.address]
            if own is None or own["role"] != "leader":
                continue
            belief = (node.address, own["term"])
            voters = [address for address, member in own["members"].items() if member["voter"]]
            believers = [status for voter in voters if (status := statuses.get(voter)) and _belief(status) == belief]
            if len(believers) > len(voters) // 2:
                return node
        return None

    def await_leader(self, timeout: float = PATIENCE_S) -> NodeProcess:
        """Wait until a majority agrees who leads."""
        return wait_until(self.leader, "a majority agrees on a leader", timeout, self.describe)

    def await_caught_up(
        self, commit_id: int | None = None, nodes: Iterable[NodeProcess] | None = None, timeout: float = PATIENCE_S
    ) -> int:
        """Wait until these nodes (default: all) have committed up to `commit_id` (default: what the leader has
        committed now); returns it."""
        upto = self._committed(timeout) if commit_id is None else commit_id
        for node in self.nodes if nodes is None else nodes:
            self._await_commit(node, upto, timeout)
        return upto

    def _committed(self, timeout: float) -> int:
        found: dict[str, Any] = self.await_leader(timeout).await_answer(timeout)
        commit_id: int = found["commit_id"]
        return commit_id

    def _await_commit(self, node: NodeProcess, upto: int, timeout: float) -> None:
        def has_it() -> bool:
            if not node.is_running:
                raise Impossible("the process has ended")
            status = node.status()
            return status is not None and status["commit_id"] >= upto

        wait_until(has_it, f"{node.name} has committed {upto}", timeout, self.describe)

    def await_written(self, commit_id: int, nodes: Iterable[NodeProcess] | None = None) -> None:
        """Wait until what the disks of these nodes (default: all) call committed goes up to `commit_id`, and the values
        are as of then. They follow a moment after the commit: an acknowledged write is on a majority's disks as an
        entry of the log."""
        directories = [node.volume for node in (self.nodes if nodes is None else nodes)]

        def are_written() -> bool:
            for directory in directories:
                with Directory(directory, 1 << 36) as opened:
                    if (opened.committed or 0) < commit_id or opened.behind is not None:
                        return False
            return True

        wait_until(are_written, f"the disks have {commit_id} as committed", explain=self.describe)

    def term(self) -> int:
        """The highest term that any node is in; 0 when none answers."""
        return max((status["term"] for node in self.running if (status := node.status())), default=0)

    def elections(self) -> int:
        """How often a node of this cluster became leader, by the logs."""
        return sum(line.get("role") == "leader" for node in self.nodes for line in node.events("role"))

    def describe(self) -> str:
        """The state of every node and the end of its log, for a failure's message."""
        return "\n".join(node.describe() for node in self.nodes)


def _belief(status: dict[str, Any]) -> tuple[str | None, int]:
    return status["leader"], status["term"]


class WriteRecord(NamedTuple):
    """What a writer is to write."""

    key: str
    value: Any
    namespace: str = DEFAULT_NAMESPACE


class Acknowledged(NamedTuple):
    """A record that the cluster has taken. `at`: monotonic seconds when its answer came."""

    record: WriteRecord
    commit_id: int
    at: float


class Writers:
    """Clients that write at once, each with a thread and a connection of its own, and what became of every record.

    Each record ends in exactly one of these lists, all in order of time:

    `acknowledged`  its put was answered with a commit_id
    `found`         its put had an open outcome, and reading it back showed that it had happened
    `open`          its put had an open outcome, and nobody looked (`resolve=False`, or `stop` came first)
    `refused`       it surely was not written within `timeout` (only with `resolve=False`, or at `stop`)

    Counts: `open_outcomes`, how many puts ended so in all; `not_executed`, how many surely did nothing; `repeated`, how
    many were tried again after one of the two.
    """

    def __init__(
        self,
        nodes: Sequence[str],
        records: Iterable[WriteRecord],
        clients: int = 4,
        timeout: float = 10.0,
        resolve: bool = True,
    ) -> None:
        """`nodes`: the clients begin at one each, in turn, and go on to another when it fails. `records`: taken one by
        one by whoever is free; may be endless. `timeout`: seconds for one put. `resolve`: read an open outcome back
        before the put is repeated, and repeat until it is written; else leave it, and go on."""
        self.acknowledged: list[Acknowledged] = []
        self.found: list[WriteRecord] = []
        self.open: list[WriteRecord] = []
        self.refused: list[WriteRecord] = []
        self.open_outcomes = 0
        self.not_executed = 0
        self.repeated = 0
        self._nodes = list(nodes)
        self._records = iter(records)
        self._timeout = timeout
        self._resolves = resolve
        self._lock = threading.Lock()
        self._feed_lock = threading.Lock()
        self._stopping = threading.Event()
        self._failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(clients)]

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        if error is None:
            self.join()

    def start(self) -> Self:
        """Begin to write."""
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> Self:
        """Finish what is under way and write no more."""
        self._stopping.set()
        return self.join()

    def join(self, timeout: float = 2 * PATIENCE_S) -> Self:
        """Wait until every record has been dealt with. Raises what went wrong in a writer, or NotReached."""
        wait_until(lambda: not self.is_writing, "the writers have written", timeout, self._describe)
        for failure in self._failures:
            raise failure
        return self

    @property
    def is_writing(self) -> bool:
        """True while some writer has something to do."""
        return any(thread.is_alive() for thread in self._threads)

    @property
    def written(self) -> list[WriteRecord]:
        """All records that surely are in the cluster: acknowledged, or found when read back."""
        return [done.record for done in self.acknowledged] + self.found

    def await_acknowledged(self, count: int, timeout: float = PATIENCE_S, explain: Callable[[], str] = str) -> None:
        """Wait until this many records have been acknowledged."""

        def enough() -> bool:
            if self._failures or not self.is_writing:
                if len(self.acknowledged) < count:
                    raise Impossible(f"the writers have ended: {self._failures or 'nothing more to write'}")
                return True
            return len(self.acknowledged) >= count

        wait_until(enough, f"{count} records are acknowledged", timeout, lambda: f"{self._describe()}\n{explain()}")

    def await_more(self, count: int = 1, timeout: float = PATIENCE_S, explain: Callable[[], str] = str) -> None:
        """Wait until this many more records than now have been acknowledged."""
        self.await_acknowledged(len(self.acknowledged) + count, timeout, explain)

    def longest_gap(self, since: float, until: float | None = None) -> float:
        """Seconds between the two neighbouring acknowledgements, of those from `since` to `until` (monotonic seconds),
        that are furthest apart."""
        end = time.monotonic() if until is None else until
        moments = [since, *sorted(done.at for done in self.acknowledged if since < done.at < end), end]
        return max(later - sooner for sooner, later in itertools.pairwise(moments))

    def _describe(self) -> str:
        lists = {name: len(getattr(self, name)) for name in ("acknowledged", "found", "open", "refused")}
        return f"--- writers: {lists}, open outcomes {self.open_outcomes}, not executed {self.not_executed}"

    # --- in a writer's thread ---

    def _run(self, number: int) -> None:
        first = number % len(self._nodes)
        nodes = [*self._nodes[first:], *self._nodes[:first]]
        try:
            with Client(nodes, timeout=self._timeout, name=f"writer-{number}") as client:
                while (record := self._next()) is not None:
                    self._write(client, record)
        except BaseException as failure:  # for `join` to raise
            self._failures.append(failure)
            self._stopping.set()

    def _next(self) -> WriteRecord | None:
        with self._feed_lock:
            return None if self._stopping.is_set() else next(self._records, None)

    def _write(self, client: Client, record: WriteRecord) -> None:
        """Write one record, and note what became of it."""
        is_open = False
        while True:
            try:
                commit_id = client.put(record.key, record.value, record.namespace)["commit_id"]
            except NotCommitted:
                is_open = True
                self._count("open_outcomes")
            except Unavailable:
                self._count("not_executed")
            else:
                self.acknowledged.append(Acknowledged(record, commit_id, time.monotonic()))
                return
            if is_open and self._resolves and self._is_there(client, record):
                self.found.append(record)
                return
            if not self._resolves or self._stopping.is_set():
                (self.open if is_open else self.refused).append(record)
                return
            self._count("repeated")

    def _is_there(self, client: Client, record: WriteRecord) -> bool:
        """Read back a record with an open outcome. False when it has not happened so far, or `stop` came."""
        while not self._stopping.is_set():
            with contextlib.suppress(Unavailable):
                read = client.get_record(record.key, record.namespace)
                if read["version"] and read["value"] != record.value:
                    raise AssertionError(f"{record.key!r} in {record.namespace!r} holds what nobody wrote: {read}")
                return bool(read["version"])
        return False

    def _count(self, what: str) -> None:
        with self._lock:
            setattr(self, what, getattr(self, what) + 1)
