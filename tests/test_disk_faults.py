"""Disks that fail under real nodes: what a node says, that nothing unsafe is acknowledged, that the others go on, and
how the node comes back (README, "When a disk fails").

Clusters of three processes, with clients that write all the time. The faults are real ones: strace makes system calls
of a live node fail or hang, small file systems fill up, an ext4 file system is aborted as by a bad block, bytes of data
files change. Each node but the damaged ones has its directory on a real disk. Every write that was acknowledged in any
test is in the book of its cluster; in the end the *directories* must hold it, on a majority at the least.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import lmdb
import pytest
from test_processes import Book, numbered, seeded

from raftnode import records
from raftnode.config import KIB, MIB
from raftnode.inspection import Directory
from raftnode.messages import Entry, decode_command
from raftnode.testing.processes import (
    FAST,
    PATIENCE_S,
    ClusterOfProcesses,
    NodeProcess,
    Writers,
    command_environment,
    wait_until,
)

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace, which injects the fault, is missing")
needs_mounts = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount the file system that fails")
needs_ext4 = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mkfs.ext4") is None, reason="root and mkfs.ext4 make the file system that fails"
)
long = pytest.mark.long

_REQUEST_TIMEOUT_S: Final = 1
_META_BYTES: Final = 120
"""LMDB writes so many bytes to commit: its meta page, on a file descriptor of its own, with O_DSYNC."""


# --- what must hold after every fault -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def book() -> Book:
    """What the shared cluster has acknowledged, in all tests."""
    return Book()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterOfProcesses]:
    options = ["--timeout", str(_REQUEST_TIMEOUT_S)]
    with ClusterOfProcesses(3, tmp_path_factory.mktemp("disks"), FAST, options) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared: ClusterOfProcesses) -> ClusterOfProcesses:
    """Three nodes, all of them up, with a leader, and caught up."""
    return shared.heal()


@contextlib.contextmanager
def load(cluster: ClusterOfProcesses, book: Book, name: str, largest: int = 2000) -> Iterator[Writers]:
    """Two clients that write through all nodes without a pause; what becomes of it goes into the book."""
    feed = numbered(name, seeded(sum(name.encode())), largest)
    with Writers(cluster.addresses, feed, clients=2, timeout=5, resolve=False) as writers:
        writers.await_more(10, explain=cluster.describe)
        yield writers
        writers.await_more(10, explain=cluster.describe)
    book.add(writers)


def one_of(cluster: ClusterOfProcesses, role: str) -> NodeProcess:
    leader = cluster.await_leader()
    return leader if role == "leader" else cluster.others(leader)[0]


def last_words(node: NodeProcess, since: int) -> str:
    """The one line that a node says to people when it ends, by itself and with status 3; there is no traceback."""
    assert node.await_exit() == 3, node.describe()
    return said(node, since)


def said(node: NodeProcess, since: int) -> str:
    text = node.log_text(since)
    assert "Traceback" not in text
    [line] = [line for line in text.splitlines() if line.startswith("raftnode: ")]
    return line


def check_directories(cluster: ClusterOfProcesses, book: Book) -> None:
    """With all nodes killed: each acknowledged write is in the logs of a majority of the directories at the place that
    was told, every entry matches its checksum, and the logs are one history as far as something was acknowledged."""
    cluster.kill()
    logs = [log_of(node) for node in cluster]
    newest = max(commit_id for _, commit_id in book.acknowledged.values())
    for one, other in itertools.combinations(logs, 2):
        shared = min(len(one), len(other), newest)
        assert [entry.checksum for entry in one[:shared]] == [entry.checksum for entry in other[:shared]]
    keys = [[getattr(decode_command(entry.command), "key", None) for entry in log] for log in logs]
    for key, (_, commit_id) in book.acknowledged.items():
        holders = sum(len(each) >= commit_id and each[commit_id - 1] == key for each in keys)
        assert holders >= len(cluster) // 2 + 1, f"{key}, acknowledged as {commit_id}, is in {holders} directories"


def log_of(node: NodeProcess) -> list[Entry]:
    """The log in a stopped node's directory, every entry checked."""
    with Directory(node.volume, 1 << 36) as directory:
        found = list(directory.entries())
    assert [record.commit_id for record in found] == list(range(1, len(found) + 1))
    assert not [record.damage for record in found if record.damage]
    return [record.entry for record in found if record.entry is not None]


# --- system calls that fail -----------------------------------------------------------------------------------


@contextlib.contextmanager
def failing(node: NodeProcess, *faults: str, file: str = "") -> Iterator[Path]:
    """strace, attached to a live node, makes its calls fail: `call:error=EIO:when=1`, for example; only those that
    concern a `file` of its directory, if one is named. Gives the file with the calls; detached in the end, if the node
    still lives then."""
    trace = node.volume.with_suffix(".trace")
    calls = ",".join(fault.partition(":")[0] for fault in faults)
    options = [word for fault in faults for word in ("-e", f"inject={fault}")]
    options += ["-P", str(node.volume / file)] if file else []
    command = ["strace", "-f", "-o", str(trace), "-e", f"trace={calls}", *options, "-p", str(node.pid)]
    strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert strace.stderr is not None
        line = strace.stderr.readline()
        assert "attached" in line, line
        yield trace
    finally:
        if node.is_running:
            strace.terminate()  # else it ends by itself, with everything written down
        strace.communicate(timeout=PATIENCE_S)


class UnderStrace(NodeProcess):
    """A node that is started by strace, which makes its calls fail from the first on."""

    faults: tuple[str, ...] = ()

    @classmethod
    def of(cls, node: NodeProcess, *faults: str) -> UnderStrace:
        """The same node, with its directory and its log."""
        found = cls(node.address, node.members, node.volume.parent, node.environment, node.options)
        found.volume, found.log_file, found.faults = node.volume, node.log_file, faults
        return found

    @property
    def command(self) -> list[str]:
        calls = ",".join(fault.partition(":")[0] for fault in self.faults)
        options = [word for fault in self.faults for word in ("-e", f"inject={fault}")]
        return ["strace", "-f", "-o", os.devnull, "-e", f"trace={calls}", *options, *super().command]


def strike(cluster: ClusterOfProcesses, writers: Writers, role: str, file: str, fault: str) -> str:
    """One call of a node fails that concerns a file: it ends, the others go on, and it comes back by a plain start.
    Returns the call."""
    node = one_of(cluster, role)
    mark = node.mark()
    with failing(node, fault, file=file) as trace:
        words = last_words(node, mark)
    by_whom = "mdb_txn_commit: " if file == records.DATA_FILE else "[Errno "
    assert f"writing to {node.volume / file} failed: {by_whom}" in words
    assert ("Input/output error" if "EIO" in fault else "No space left on device") in words
    assert "Nothing that depends on this write was acknowledged" in words
    assert "start the node again" in words
    writers.await_more(10, explain=cluster.describe)
    node.start()
    cluster.await_caught_up(nodes=[node])
    [call] = [line for line in trace.read_text().splitlines() if "INJECTED" in line]
    return call


def strike_meta_page(cluster: ClusterOfProcesses, writers: Writers, role: str, error: str) -> None:
    """The write that commits fails: the last of a transaction, after the sync. How many data pages are written one by
    one before it differs."""
    for when in range(2, 32):
        call = strike(cluster, writers, role, records.DATA_FILE, f"pwrite64:error={error}:when={1 + when % 5}")
        if f", {_META_BYTES}, " in call:
            return
    pytest.fail("the write of the meta page was never hit")


EVERY_CALL: Final = [
    f"{role} {call} {error}"
    for role in ("leader", "follower")
    for call in ("fdatasync", "pwrite64", "meta", "tail")
    for error in ("EIO", "ENOSPC")
]


@needs_strace
@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(["leader fdatasync ENOSPC", "follower meta EIO", "leader tail EIO"], id="some"),
        *(pytest.param([fault], marks=[long, pytest.mark.timeout(300)], id=fault) for fault in EVERY_CALL),
    ],
)
def test_a_call_that_fails_once(cluster: ClusterOfProcesses, book: Book, faults: list[str]) -> None:
    """After a failed write or sync nobody knows what is on the disk, and asking again proves nothing (TRAPS, LMDB): one
    failure, of the sync, of a data page, of the page that commits or of the tail of the log, ends a live node with
    status 3 and one line with what to do. The cluster goes on under load; started again, the node continues and catches
    up."""
    with load(cluster, book, "once") as writers:
        for fault in faults:
            role, call, error = fault.split()
            if call == "meta":
                strike_meta_page(cluster, writers, role, error)
            elif call == "tail":
                strike(cluster, writers, role, records.TAIL_FILE, f"pwrite64:error={error}:when=1")
            else:
                strike(cluster, writers, role, records.DATA_FILE, f"{call}:error={error}:when=1")


@needs_strace
def test_a_disk_that_never_syncs_again(cluster: ClusterOfProcesses, book: Book) -> None:
    """A disk that stays bad: the leader ends at its first sync, and at each start again with status 3 and words,
    whether the file or the directory can't be synced: what is visible must be durable before anything is said (TRAPS
    40). Nothing is acknowledged through it, the others go on; when the disk is well again, a plain start is enough."""
    with load(cluster, book, "never") as writers:
        node = one_of(cluster, "leader")
        mark = node.mark()
        with failing(node, "fdatasync:error=EIO", "fsync:error=EIO", "msync:error=EIO"):
            assert "mdb_txn_commit: Input/output error" in last_words(node, mark)
        for fault, what in (
            ("fdatasync:error=EIO", "can't be opened"),
            ("fsync:error=ENOSPC", "can't be made durable"),
        ):
            bad = UnderStrace.of(node, fault)
            mark = bad.mark()
            words = last_words(bad.start(), mark)
            assert what in words
            assert "Check the disk" in words
            assert not bad.events("starting", since=mark)
        writers.await_more(10, explain=cluster.describe)
        node.start()
        cluster.await_caught_up(nodes=[node])


@needs_strace
@pytest.mark.parametrize("call", ["fdatasync", "tail"])
def test_a_sync_that_hangs(cluster: ClusterOfProcesses, book: Book, call: str) -> None:
    """A disk that hangs for longer than the election timeout is a gray failure (TRAPS 19). On a follower nobody
    notices: no new term. On the leader: the others elect another one and writes go on while it hangs; when its sync
    returns, it steps down before it says anything, says that the sync was slow, and follows. No process ends."""
    hang_s = 1.5
    with load(cluster, book, "hangs") as writers:
        for role in ("follower", "leader"):
            node, term = one_of(cluster, role), cluster.term()
            mark = node.mark()
            name, file = ("pwrite64", records.TAIL_FILE) if call == "tail" else (call, records.DATA_FILE)
            with failing(node, f"{name}:delay_enter={int(hang_s * 1e6)}:when=1", file=file):
                others = cluster.others(node)
                if role == "leader":
                    wait_until(
                        lambda others=others, term=term: [s for o in others if (s := o.status()) and s["term"] > term],
                        "the others have another leader", explain=cluster.describe,
                    )  # fmt: skip
                    writers.await_more(10, explain=cluster.describe)
                slow = node.await_event("slow_sync", since=mark)
            assert slow["took_ms"] >= hang_s * 1000
            if role == "leader":
                first = node.await_event("role", since=mark)
                assert first["role"] == "follower", "it steps down before anything else"
            else:
                assert cluster.term() == term
            cluster.await_caught_up(nodes=[node])
            assert node.is_running


# --- file systems and maps that are full ----------------------------------------------------------------------


class Limited(NodeProcess):
    """A node with settings that the command line does not have, and a directory where it is told."""

    settings: dict[str, int]

    @property
    def command(self) -> list[str]:
        python, _, _, *words = super().command
        limits = ", ".join(f"{name}={number}" for name, number in self.settings.items())
        patch = (
            f"from functools import partial; from raftnode import cli; cli.RaftNode = partial(cli.RaftNode, {limits})"
        )
        return [python, "-c", f"{patch}; cli.main()", *words]


@contextlib.contextmanager
def limited_cluster(
    directory: Path, volumes: Sequence[Path | None], settings: Sequence[dict[str, int]]
) -> Iterator[ClusterOfProcesses]:
    """Three nodes, each with its volume (None: its own) and its settings."""
    cluster = ClusterOfProcesses(3, directory, FAST, ["--timeout", str(_REQUEST_TIMEOUT_S)])
    nodes = []
    for node, volume, limits in zip(cluster, volumes, settings, strict=True):
        limited = Limited(node.address, node.members, directory, node.environment, node.options)
        limited.volume, limited.settings = volume or node.volume, limits
        nodes.append(limited)
    cluster.nodes[:] = nodes
    with cluster:
        cluster.await_leader()
        yield cluster


def mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def small_file_system(path: Path, size: int) -> Iterator[Path]:
    """A file system of a few MiB; what is in it is gone in the end. A directory for a volume in it."""
    path.mkdir()
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path))
    try:
        yield path / "volume"
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def make_lead(cluster: ClusterOfProcesses, node: NodeProcess, role: str) -> None:
    """Bring it about that a node leads, or does not: whoever should not lead stands still until another one does."""
    while ((leader := cluster.await_leader()) is node) is not (role == "leader"):
        leader.pause()
        wait_until(lambda: cluster.leader() is not None, "another one leads", explain=cluster.describe)
        leader.resume()


NO_RESERVE: Final = {"reserve_bytes": 1}
"""So that a disk or a map gets really full."""


@needs_mounts
@pytest.mark.parametrize("role", ["follower", pytest.param("leader", marks=long)])
def test_a_file_system_that_is_really_full(tmp_path: Path, role: str) -> None:
    """Without a reserve a disk fills up until a write fails. The node ends with status 3 and says so; no write that it
    could not store is acknowledged by it, the others go on. It can't go on as long as the disk is full, and says the
    same at the next write; with room made, a plain start is enough: it catches up, and has lost nothing."""
    book = Book()
    with small_file_system(tmp_path / "small", 3 * MIB) as volume:
        settings = [{**NO_RESERVE}, {}, {}]
        with limited_cluster(tmp_path / "nodes", [volume, None, None], settings) as cluster:
            node = cluster[0]
            make_lead(cluster, node, role)
            mark = node.mark()
            with load(cluster, book, f"full-{role}", 40 * KIB) as writers:
                words = last_words(node, mark)
                assert re.search("failed: .*(Input/output error|No space left on device)", words)
                writers.await_more(10, explain=cluster.describe)
                mark = node.mark()
                assert "failed: " in last_words(node.start(), mark)
                mount("-o", f"remount,size={256 * MIB}", str(volume.parent))
                node.start()
                cluster.await_caught_up(nodes=[node])
            cluster.await_caught_up()
            book.check(*cluster)
            check_directories(cluster, book)


@needs_mounts
@pytest.mark.parametrize("role", ["leader", pytest.param("follower", marks=long)])
def test_the_reserve_keeps_a_full_disk_from_hurting(tmp_path: Path, role: str) -> None:
    """The normal case: writes end before the room does. On a leader puts are refused with `storage_full`, not executed,
    while reads and deletes go on; a follower takes no more entries, and the two others go on without it. No process
    ends, and with room made all goes on by itself."""
    book = Book()
    with small_file_system(tmp_path / "small", 6 * MIB) as volume:
        settings: list[dict[str, int]] = [{"reserve_bytes": 2 * MIB}, {}, {}]
        with limited_cluster(tmp_path / "nodes", [volume, None, None], settings) as cluster:
            node = cluster[0]
            make_lead(cluster, node, role)
            with node.client() as client:
                client.put("kept", ["kept"])
                with Writers(
                    cluster.addresses, numbered("reserve", seeded(7), 40 * KIB), timeout=3, resolve=False
                ) as w:
                    status = wait_until(
                        lambda: (s := node.status()) and s["storage"]["full"] and s, "the disk is short of room",
                        explain=cluster.describe,
                    )  # fmt: skip
                    if role == "leader":
                        w.stop()
                        answer = node.ask({"type": "put", "key": "no", "value": "x" * 1000}, PATIENCE_S)
                        assert answer is not None
                        assert answer["error"]["code"] == "storage_full"
                        assert "writes go on by themselves" in answer["error"]["message"]
                        assert client.get("kept") == ["kept"]
                        assert client.delete("kept")["replaced"] is not None
                    else:
                        w.await_more(100, explain=cluster.describe)
                        w.stop()
                book.add(w)
                assert status["storage"]["room"] < 2 * MIB
                assert node.is_running
                mount("-o", f"remount,size={256 * MIB}", str(volume.parent))
                wait_until(lambda: (s := node.status()) and not s["storage"]["full"], "it has seen the room")
                book.note("again", ["again"], client.put("again", ["again"])["commit_id"])
            cluster.await_caught_up()
            assert not node.events("ended")
            assert node.read(["no"]) == {}
            book.check(*cluster)
            check_directories(cluster, book)


@pytest.mark.parametrize("role", ["follower", pytest.param("leader", marks=long)])
def test_a_map_that_is_full(tmp_path: Path, role: str) -> None:
    """The bound of the data file is reached: the node ends with status 3, the others go on. It can't go on within that
    bound; with a larger one it starts and catches up."""
    book = Book()
    settings: list[dict[str, int]] = [{**NO_RESERVE, "map_bytes": 1 * MIB}, {}, {}]
    with limited_cluster(tmp_path, [None, None, None], settings) as cluster:
        node = cluster[0]
        assert isinstance(node, Limited)
        make_lead(cluster, node, role)
        mark = node.mark()
        with load(cluster, book, f"map-{role}", 20 * KIB) as writers:
            assert "MDB_MAP_FULL" in last_words(node, mark)
            writers.await_more(10, explain=cluster.describe)
            mark = node.mark()
            assert "MDB_MAP_FULL" in last_words(node.start(), mark)
            node.settings = {}
            node.start()
            cluster.await_caught_up(nodes=[node])
        cluster.await_caught_up()
        book.check(*cluster)
        check_directories(cluster, book)


# --- read-only ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ext4(path: Path) -> Iterator[tuple[Path, Path]]:
    """A file system of its own, in a file: its image and where it is mounted."""
    image, where = path / "image", path / "mounted"
    path.mkdir()
    where.mkdir()
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    mount("-o", "loop", str(image), str(where))
    try:
        yield image, where
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=False)


@needs_ext4
def test_a_file_system_that_turns_read_only(tmp_path: Path) -> None:
    """What ext4 does at a bad block: it aborts its journal and turns read-only under the open files (here by its own
    `abort`, made for tests). The leader on it ends with status 3 and words; so does each start while it is read-only;
    the others go on. Mounted anew, which replays its journal, the node starts and has lost nothing."""
    book = Book()
    settings: list[dict[str, int]] = [{"reserve_bytes": 1 * MIB}, {}, {}]
    with (
        ext4(tmp_path / "fs") as (image, where),
        limited_cluster(tmp_path / "nodes", [where / "volume", None, None], settings) as cluster,
    ):
        node = cluster[0]
        make_lead(cluster, node, "leader")
        mark = node.mark()
        with load(cluster, book, "read-only") as writers:
            mount("-o", "remount,abort", str(where))
            words = last_words(node, mark)
            assert re.search(rf"writing to {node.volume}/raftnode\.(mdb|tail) failed: ", words)
            writers.await_more(10, explain=cluster.describe)
            mark = node.mark()
            words = last_words(node.start(), mark)
            assert "Read-only file system" in words or "Input/output error" in words
            subprocess.run(["umount", str(where)], check=True)
            mount("-o", "loop", str(image), str(where))
            mount("-o", "remount,ro", str(where))
            mark = node.mark()
            assert "Read-only file system" in last_words(node.start(), mark)
            mount("-o", "remount,rw", str(where))
            node.start()
            cluster.await_caught_up(nodes=[node])
        cluster.await_caught_up()
        book.check(*cluster)
        check_directories(cluster, book)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write where nobody may")
def test_a_directory_that_is_read_only(tmp_path: Path) -> None:
    """A directory that this user may not write to: status 3, with the directory and the reason."""
    with ClusterOfProcesses(1, tmp_path, FAST) as cluster:
        [node] = cluster
        assert node.terminate() == 0
        for path in (*node.volume.iterdir(), node.volume):
            path.chmod(0o500)
        try:
            mark = node.mark()
            assert "Permission denied" in last_words(node.start(), mark)
        finally:
            node.volume.chmod(0o700)
            for path in node.volume.iterdir():
                path.chmod(0o600)
        node.start().await_answer()


# --- data files that are damaged ------------------------------------------------------------------------------


def stored(volume: Path, name: bytes, pick: Callable[[Any], bool]) -> bytes:
    """The bytes of a record."""
    file = str(volume / records.DATA_FILE)
    with lmdb.open(file, subdir=False, readonly=True, map_size=1 << 36, max_dbs=16, lock=False) as env:
        db = env.open_db(name, create=False)
        with env.begin() as txn, txn.cursor(db) as cursor:
            assert pick(cursor)
            return bytes(cursor.value())


def flip_record(name: bytes, pick: Callable[[Any], bool], byte: int) -> Callable[[Path], None]:
    """One bit of a record, in each of its copies in the file, past LMDB."""

    def damage(volume: Path) -> None:
        record = stored(volume, name, pick)
        damaged = bytearray(record)
        damaged[byte] ^= 4
        file = volume / records.DATA_FILE
        whole = file.read_bytes()
        assert record in whole
        file.write_bytes(whole.replace(record, bytes(damaged)))

    return damage


def cut_file(length: Callable[[int], int]) -> Callable[[Path], None]:
    def damage(volume: Path) -> None:
        file = volume / records.DATA_FILE
        os.truncate(file, length(file.stat().st_size))

    return damage


def zeros_in_the_middle(volume: Path) -> None:
    """All but the first two pages, which say where the others are, and the last one."""
    file = volume / records.DATA_FILE
    whole = bytearray(file.read_bytes())
    whole[2 * 4096 : -4096] = bytes(len(whole) - 3 * 4096)
    file.write_bytes(whole)


def flip_page_headers(volume: Path) -> None:
    file = volume / records.DATA_FILE
    whole = bytearray(file.read_bytes())
    for page in range(2 * 4096, len(whole), 4096):
        whole[page + 10] ^= 16
    file.write_bytes(whole)


def remove_file(volume: Path) -> None:
    (volume / records.DATA_FILE).unlink()


def newest(cursor: Any) -> bool:
    return bool(cursor.last())


def second_newest(cursor: Any) -> bool:
    return bool(cursor.last() and cursor.prev())


REPAIRED: Final[dict[str, Callable[[Path], None]]] = {
    "newest entry": flip_record(records.LOG, newest, -3),
    "newest entry, its checksum": flip_record(records.LOG, newest, 20),
    "the one before it": flip_record(records.LOG, second_newest, -3),
}
REFUSED: Final[dict[str, tuple[Callable[[Path], None], str]]] = {
    "ballot": (flip_record(records.META, lambda c: c.set_key(b"ballot"), -2), "'ballot' of the node does not match"),
    "commit_id": (flip_record(records.META, lambda c: c.set_key(b"commit_id"), -1), "'commit_id' of the node"),
    "page headers": (flip_page_headers, "is damaged: "),
    "zeros in the middle": (zeros_in_the_middle, ""),
    "cut at a page": (cut_file(lambda size: size // 8192 * 4096), "is cut off"),
    "cut within a page": (cut_file(lambda size: size // 8192 * 4096 + 1234), "is cut off"),
    "cut to nothing": (cut_file(lambda _: 0), "is gone or empty"),
    "missing": (remove_file, "is gone or empty"),
}


def repair_command(words: str) -> list[str]:
    """The command that a node says when it stops over damage, as it has to be typed."""
    found = re.search(r"With this node stopped, run: (raftnode repair .*)$", words)
    assert found, words
    return [sys.executable, "-m", *shlex.split(found[1])]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, env=command_environment(), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def await_newest_is_a_put(cluster: ClusterOfProcesses, book: Book) -> None:
    """The newest entries are puts, so that there are bytes to damage."""
    with cluster.client() as client:
        for n in range(3):
            book.note(f"newest-{n}", [n], client.put(f"newest-{n}", [n])["commit_id"])
    cluster.await_caught_up()


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param(["newest entry"], id="some"),
        *(pytest.param([kind], marks=long, id=kind) for kind in REPAIRED),
    ],
)
def test_damage_that_a_command_repairs(cluster: ClusterOfProcesses, book: Book, kinds: list[str]) -> None:
    """Bytes of log entries change in the file of a killed node: it ends at the start with status 3, names the entry and
    says a command (TRAPS 37). Run while clients write through the others, as soon as those have committed the entry,
    that command repairs the directory, and the node starts and catches up."""
    await_newest_is_a_put(cluster, book)
    for n, kind in enumerate(kinds):
        with load(cluster, book, f"repaired-{n}") as writers:
            node = one_of(cluster, ("leader", "follower")[n % 2])
            node.kill()
            REPAIRED[kind](node.volume)
            mark = node.mark()
            words = last_words(node.start(), mark)
            assert re.search(rf"log entry \d+ in {node.volume} is damaged", words), kind
            writers.await_more(10, explain=cluster.describe)
            command = repair_command(words)
            done = wait_until(
                lambda command=command: (done := run(command)).returncode == 0 and done,
                "the others have committed what is damaged", explain=cluster.describe,
            )  # fmt: skip
            assert "repairing: entr" in done.stdout
            node.start()
            cluster.await_caught_up(nodes=[node])


def test_damage_in_the_middle_is_not_passed_on(cluster: ClusterOfProcesses, book: Book) -> None:
    """Older entries are checked when they are read. A leader with one damaged in the middle starts and serves; when a
    follower comes back that lacks this entry, the leader ends with status 3 rather than send it, names it, and says the
    command. The other one, which has it, is elected, brings the follower up to date, and takes writes; and the command
    repairs the old leader's directory from the two."""
    leader = cluster.await_leader()
    behind, third = cluster.others(leader)
    behind.kill()
    with load(cluster, book, "middle", largest=100) as writers:
        writers.await_more(60, explain=cluster.describe)
    damaged = book.acknowledged["middle-30"][1]
    cluster.await_written(damaged + 1, [leader])  # else its start, which reads from there, finds the damage
    leader.kill()
    flip_record(records.LOG, lambda cursor: cursor.set_key(records.log_key(damaged)), -3)(leader.volume)
    leader.start()
    while cluster.await_leader() is not leader:  # of two nodes, the one that stays up is sooner or later elected
        third.restart().await_answer()
    mark = leader.mark()
    behind.start()
    words = last_words(leader, mark)
    assert f"log entry {damaged} in {leader.volume} is damaged" in words
    assert cluster.await_leader() is third
    with load(cluster, book, "middle-after"):
        done = run(repair_command(words))
        assert done.returncode == 0, done.stderr
        assert f"repairing: entry {damaged}: from " in done.stdout
        leader.start()
        cluster.await_caught_up()


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param(["ballot", "zeros in the middle"], id="some"),
        *(pytest.param([kind], marks=long, id=kind) for kind in REFUSED),
    ],
)
def test_damage_that_nothing_repairs(cluster: ClusterOfProcesses, book: Book, tmp_path: Path, kinds: list[str]) -> None:
    """What a node has promised only its own disk knows. Its facts, the pages of LMDB, or the file itself are damaged or
    lost while it is down: it ends with status 3 and says what (over pages of zeros LMDB may end it from within); the
    repair refuses in words, and changes nothing. The others go on. With a copy made after it stopped it comes back."""
    with load(cluster, book, "refused") as writers:
        for kind in kinds:
            damage, what = REFUSED[kind]
            node = one_of(cluster, "follower")
            node.kill()
            copy = Path(shutil.copytree(node.volume, tmp_path / kind))
            damage(node.volume)
            mark = node.mark()
            if what:
                assert what in last_words(node.start(), mark), kind
            else:  # LMDB may end the process itself, over pages that it can't make out
                assert node.start().await_exit() != 0, kind
                assert "Traceback" not in node.log_text(since=mark)
            file = node.volume / records.DATA_FILE
            before = file.read_bytes() if file.exists() else None
            done = run([sys.executable, "-m", "raftnode", "repair", str(node.volume)])
            assert done.returncode == 3, kind
            assert "never an older one" in done.stderr, kind
            assert (file.read_bytes() if file.exists() else None) == before, kind
            writers.await_more(10, explain=cluster.describe)
            shutil.rmtree(node.volume)
            copy.rename(node.volume)
            node.start()
            cluster.await_caught_up(nodes=[node])


def test_a_directory_or_file_of_another_node(cluster: ClusterOfProcesses, book: Book, tmp_path: Path) -> None:
    """Two nodes must never speak as one. A node is started on a copy of the directory of another member: it says whose
    it is, by the address. It is started with the other's data file in its own directory: it says that its own is not
    there. It is started on the other's directory itself: in use. Status 3 each time, and the others go on; with its own
    directory it is a member again. The repair refuses the wrong file, too."""
    with load(cluster, book, "another") as writers:
        node, other = cluster.others(cluster.await_leader())
        node.kill()
        own, theirs = tmp_path / "own", tmp_path / "theirs"
        node.volume.rename(own)
        other.kill()
        shutil.copytree(other.volume, theirs)
        other.start()
        shutil.copytree(theirs, node.volume)
        mark = node.mark()
        assert f"belongs to the node at {other.address}, not to {node.address}" in last_words(node.start(), mark)
        shutil.rmtree(node.volume)
        shutil.copytree(own, node.volume)
        shutil.copy(theirs / records.DATA_FILE, node.volume / records.DATA_FILE)
        mark = node.mark()
        words = last_words(node.start(), mark)
        assert re.search(rf"{node.volume} held node \w+, but {records.DATA_FILE} is of node \w+", words)
        done = run([sys.executable, "-m", "raftnode", "repair", str(node.volume)])
        assert done.returncode == 3
        assert "the directory of node" in done.stderr
        shutil.rmtree(node.volume)
        node.volume.symlink_to(other.volume)
        mark = node.mark()
        other.await_answer()
        assert "is in use by another node" in last_words(node.start(), mark)
        node.volume.unlink()
        own.rename(node.volume)
        writers.await_more(10, explain=cluster.describe)
        node.start()
        cluster.await_caught_up(nodes=[node])


# --- the end --------------------------------------------------------------------------------------------------


def test_the_directories_hold_all_that_was_acknowledged(cluster: ClusterOfProcesses, book: Book) -> None:
    """After all of the above, in whatever order: through each node everything that was ever acknowledged is there, what
    was refused is not; and the three directories hold it, with nobody left to answer."""
    with cluster.client() as client:
        book.note("the end", ["the end"], client.put("the end", ["the end"])["commit_id"])
    cluster.await_caught_up()
    book.check(*cluster)
    check_directories(cluster, book)
