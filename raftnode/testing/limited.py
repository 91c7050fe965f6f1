"""Nodes with other limits than the command line gives them, each in a process of its own, and what they use.

    with cluster_with_limits(3, {"frame_bytes": 65_536, "connections": 50}) as cluster:
        before = usage(cluster[0].pid)

`python -m raftnode.testing.limited` is such a process: a node as `raftnode serve` makes it, but for its settings.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from raftnode import log
from raftnode.config import DEFAULT_TIMEOUT_S, Settings
from raftnode.raftnode import RaftNode
from raftnode.testing.processes import ClusterOfProcesses, NodeProcess

_LOOK_S: Final = 0.02
_CONNECTION_BYTES: Final = 10 << 10
_IN_PASSING: Final = 1000
_OBJECTS: Final = 60


class LimitedNode(NodeProcess):
    """A node whose settings are given by their names in `config.Settings`."""

    def __init__(self, address: str, members: Sequence[str], directory: Path, settings: Mapping[str, int]) -> None:
        super().__init__(address, members, directory)
        self.settings = dict(settings)

    @property
    def command(self) -> list[str]:
        peers = ",".join(member for member in self.members if member != self.address)
        module = [sys.executable, "-m", "raftnode.testing.limited"]
        return [*module, self.address, peers, str(self.volume), json.dumps(self.settings)]


def cluster_with_limits(size: int, settings: Mapping[str, int], directory: Path | None = None) -> ClusterOfProcesses:
    """A cluster whose nodes all have these settings; nothing is started yet."""
    cluster = ClusterOfProcesses(size, directory)
    cluster.nodes = [LimitedNode(a, cluster.addresses, cluster.directory, settings) for a in cluster.addresses]
    return cluster


def allow_files() -> None:
    """Raise this process's limit of open files as far as it may."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def memory_bound(settings: Settings, members: int) -> int:
    """The most bytes that clients may make a node hold, beside what it holds at rest. By what holds them:

    * what clients have begun, what waits to be looked at, and the answers that they have not taken: `client_bytes`,
      and what one turn collects before it is written, an eighth of that. Buffers that grow are copied, and what they
      leave is not all of use to others: as much again;
    * requests under way: `in_flight_bytes`, each as the message that came, and again as the command made of it;
    * the log in memory: `kept_bytes`, and above it what is not committed, `uncommitted_bytes` and one message;
    * each link to and from a member: its buffer, the message that it sends and the one that it takes;
    * each open connection, and those that are on their way in or out: some Python objects;
    * the one message that is looked at now, as Python objects: at most some sixty times its size.
    """
    clients = 2 * (settings.client_bytes + settings.client_bytes // 8)
    requests = 2 * settings.in_flight_bytes
    log = settings.kept_bytes + settings.uncommitted_bytes + settings.frame_bytes
    links = 2 * (members - 1) * (settings.send_buffer_bytes + 2 * settings.peer_frame_bytes)
    connections = (settings.connections + _IN_PASSING) * _CONNECTION_BYTES
    return clients + requests + log + links + connections + _OBJECTS * settings.frame_bytes


class Usage(NamedTuple):
    """What a process uses. Sizes in bytes. `rss` counts the pages of LMDB's file too, which belong to the kernel's
    cache; `anonymous` is what the program itself holds."""

    rss: int
    anonymous: int
    files: int


def usage(pid: int) -> Usage:
    """What the process uses now. Raises OSError when there is none of that id."""
    sizes = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, size, *_ = line.split()
        sizes[name.rstrip(":")] = int(size) * 1024
    return Usage(sizes["Rss"], sizes["Anonymous"], len(os.listdir(f"/proc/{pid}/fd")))  # noqa: PTH208 - names only


class Watch:
    """Looks at a process again and again while its block lasts: `before`, the most of each (`peak`), and `after`."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.before = self.peak = self.after = usage(pid)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        with contextlib.suppress(OSError):  # the process has ended, which others find out
            while not self._done.wait(_LOOK_S):
                self.after = usage(self._pid)
                self.peak = Usage(*map(max, self.peak, self.after))


def main() -> None:
    """Serve until SIGTERM."""
    address, peers, volume, settings = sys.argv[1:]
    log.setup(as_json=True)
    allow_files()
    RaftNode(address, peers.split(","), DEFAULT_TIMEOUT_S, data_dir=Path(volume), **json.loads(settings)).serve()


if __name__ == "__main__":
    main()
