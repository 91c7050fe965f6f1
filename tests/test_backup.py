"""`raftnode backup` and `raftnode restore` (archive docstring): what is in a backup, against what clients were told and
what the log says; and a new cluster made of it.

In the tests that pull a backup by hand, chunks are so small that each has one value, and writes come between them: at
the cursor, before it and after it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import lmdb
import pytest
from click.testing import CliRunner, Result

from raftnode import records
from raftnode.archive import End, Header, check, restore, take
from raftnode.cli import cli
from raftnode.client import Client
from raftnode.errors import NodeDamaged, StoreDamaged, StoreForeign, Unavailable
from raftnode.namespaces import Behind
from raftnode.store import Store
from raftnode.testing.processes import (
    FAST,
    PATIENCE_S,
    ClusterOfProcesses,
    NodeProcess,
    WriteRecord,
    Writers,
    command_environment,
    free_address,
    inspect,
    wait_until,
)

SMALL: Final = {**FAST, "RAFTNODE_SNAPSHOT_CHUNK_BYTES": "1", "RAFTNODE_SNAPSHOT_BYTES_PER_S": "100000000"}
SEED = 23
Contents = dict[tuple[str, str], dict[str, Any]]


def silent(done: int, total: int) -> None:
    assert 0 <= done <= total or total == 0


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@contextlib.contextmanager
def running(address: str, volume: Path, environment: dict[str, str] = FAST) -> Iterator[NodeProcess]:
    """A node of a cluster of one, on that very directory."""
    node = NodeProcess(address, [], volume.parent / "logs", environment, ["--timeout", "1"])
    node.volume = volume
    try:
        node.start().await_answer()
        wait_until(lambda: (node.status() or {}).get("role") == "leader", "it leads", explain=node.describe)
        yield node
    finally:
        node.kill()


def contents(file: Path) -> Contents:
    """What a backup says: the last line of each key counts."""
    found: Contents = {}
    for text in file.read_text().splitlines():
        line = json.loads(text)
        if line.pop("record") not in ("value", "gone"):
            continue
        at = (line["namespace"], line["key"])
        found.pop(at, None)
        if "value" in line:
            found[at] = line
    return found


def state(directory: Path, *options: str) -> Contents:
    """What the inspector says of the committed values."""
    return {(line["namespace"], line["key"]): line for line in inspect(directory, "state", *options)}


def assert_same(found: Contents, expected: Contents) -> None:
    fields = ("value", "created", "modified", "version")
    assert found.keys() == expected.keys()
    for at, line in found.items():
        assert [line[name] for name in fields] == [expected[at][name] for name in fields], at


# --- what is in it --------------------------------------------------------------------------------------------


def test_it_has_all_that_was_acknowledged_before_it_began(tmp_path: Path) -> None:
    """Taken from a follower while clients write, overwrite and delete: it is exactly what the log makes of nothing up
    to its commit_id, and that includes every write that was acknowledged before the command began."""
    chance = random.Random(SEED)
    print(f"seed {SEED}")  # noqa: T201 - shown when a test fails
    endless = (WriteRecord(f"key-{chance.randrange(400)}", "x" * chance.randrange(2000)) for _ in itertools.count())
    environment = {**FAST, "RAFTNODE_SNAPSHOT_CHUNK_BYTES": "3000"}
    with ClusterOfProcesses(3, tmp_path / "cluster", environment) as cluster:
        leader = cluster.await_leader()
        follower = cluster.others(leader)[0]
        with Writers(cluster.addresses, endless, clients=4) as writers:
            writers.await_acknowledged(300, explain=cluster.describe)
            known = max(done.commit_id for done in list(writers.acknowledged))
            result = run("backup", tmp_path / "file", "--node", follower.address)
            writers.stop()
        assert result.exit_code == 0, result.output
        cluster.terminate()
        header, end = check(tmp_path / "file", advance=silent)
        assert end.commit_id >= known
        assert header.node == follower.address
        assert f"{end.keys} keys as of commit_id {end.commit_id}" in result.output
        assert_same(contents(tmp_path / "file"), state(leader.volume, "--at", str(end.commit_id)))
        log = {entry["commit_id"]: entry for entry in inspect(leader.volume, "log", "--from", str(end.commit_id))}
        assert log[end.commit_id]["checksum"] == f"{end.checksum:08x}"


class Pulled:
    """A backup that is pulled by hand: each `next` asks for one chunk."""

    def __init__(self, node: NodeProcess) -> None:
        self._client = node.client()
        self.transfer = self.seq = 0
        self.values: Contents = {}
        self.end: dict[str, Any] | None = None

    def ask(self, **changed: int) -> dict[str, Any]:
        message = {"type": "backup", "transfer": self.transfer, "seq": self.seq + 1}
        return self._client._call({**message, **changed})

    def next(self) -> list[str]:
        """The keys of the chunk."""
        answer = self.ask()
        self.transfer, self.seq, self.end = answer["transfer"], answer["seq"], answer.get("end")
        names = ("namespace", "key", "created", "modified", "version", "lease", "checksum", "value")
        for record in answer.get("records", []):
            self.values[record[0], record[1]] = dict(zip(names, record, strict=True))
        for namespace, key in answer.get("gone", []):
            self.values.pop((namespace, key), None)
        return [record[1] for record in answer.get("records", [])] + [key for _, key in answer.get("gone", [])]

    def close(self) -> None:
        self._client.close()


def test_progress_counts_what_is_not_on_disk_yet(tmp_path: Path) -> None:
    """What was put a moment ago may be in the log and in memory only: it is in the backup, and counted from the first
    chunk on, so that whoever waits sees how much there is."""
    slow = {**FAST, "RAFTNODE_FLUSH_DELAY_MS": "100000", "RAFTNODE_SNAPSHOT_CHUNK_BYTES": "500"}
    with running(free_address(), tmp_path / "node", slow) as node, node.client() as client:
        for n in range(20):
            client.put(f"key-{n}", "x" * 100)
        client.delete("key-3")
        told: list[tuple[int, int]] = []
        take(node.address, tmp_path / "file", timeout=PATIENCE_S, advance=lambda *so_far: told.append(so_far))
    assert {total for _, total in told} == {19}
    assert len(contents(tmp_path / "file")) == 19


def test_it_has_what_a_flush_has_not_taken_to_the_disk(tmp_path: Path) -> None:
    """A node has begun to write to its disk what sixty puts and a delete did, one key with each further put, when the
    backup is taken; then it is killed, and its disk is still in the middle of that. The backup has every value with its
    numbers, those that are on disk and those that are not, and counts them right; a directory that is restored from it
    is in the middle of nothing."""
    slow = {**FAST, "RAFTNODE_FLUSH_DELAY_MS": "100000", "RAFTNODE_FLUSH_ENTRIES": "60", "RAFTNODE_FLUSH_STEP": "1"}
    slow["RAFTNODE_TAIL_WRITE_BYTES"] = "1"  # each put has a transaction, which takes a key along
    address, told = free_address(), Told()
    with running(address, tmp_path / "node", {**slow, "RAFTNODE_SNAPSHOT_CHUNK_BYTES": "300"}) as node:
        with node.client() as client:
            for n in range(58):
                told.put(client, f"key-{n % 40:02}", n)
            told.delete(client, "key-30")
            for n in range(6):
                told.put(client, f"key-{7 * n:02}", "new")
        end = take(address, tmp_path / "file", timeout=PATIENCE_S, advance=silent)
        node.kill()
    assert behind(tmp_path / "node") is not None
    assert_same(contents(tmp_path / "file"), told.values)
    assert end.keys == len(told.values)
    assert run("restore", tmp_path / "file", tmp_path / "new", "--ip", address).exit_code == 0
    assert behind(tmp_path / "new") is None
    assert_same(state(tmp_path / "new"), told.values)
    assert inspect(tmp_path / "new", "verify")[-1]["problems"] == 0


class Told:
    """What a client was told of its writes, and what follows from that for each key."""

    def __init__(self) -> None:
        self.values: Contents = {}

    def put(self, client: Client, key: str, value: object) -> None:
        at, modified = ("default", key), client.put(key, value)["commit_id"]
        before = self.values.get(at, {"created": modified, "version": 0})
        line = {"value": value, "modified": modified, "created": before["created"], "version": before["version"] + 1}
        self.values[at] = line

    def delete(self, client: Client, key: str) -> None:
        client.delete(key)
        del self.values["default", key]


def behind(directory: Path) -> Behind | None:
    """Where a flush had come to that is under way on this disk."""
    with contextlib.closing(Store("database", directory)) as store:
        return store.behind


def test_writes_between_the_chunks_are_all_in_it(tmp_path: Path) -> None:
    """Between two chunks, keys are written, overwritten, deleted, and made anew, on both sides of the cursor; many
    times. Each time what comes is the state as of the commit_id in the end, with every number of every value."""
    chance = random.Random(SEED)
    print(f"seed {SEED}")  # noqa: T201 - shown when a test fails
    with running(free_address(), tmp_path / "node", SMALL) as node, node.client() as client:
        ends = []
        for _ in range(12):
            pulled = Pulled(node)
            while pulled.end is None:
                pulled.next()
                for _ in range(chance.choice((0, 0, 1, 2)) if pulled.seq < 40 else 0):
                    key = f"key-{chance.randrange(12):02}"
                    if chance.random() < 0.4:
                        client.delete(key)
                    else:
                        client.put(key, chance.randrange(1000))
            pulled.close()
            ends.append((pulled.end, pulled.values))
        assert node.terminate() == 0
    assert any(values for _, values in ends)
    for end, values in ends:
        commit_id = end["id"]["commit_id"]
        assert end["keys"] == len(values)
        assert_same(values, state(node.volume, "--at", str(commit_id)))


def test_a_client_that_asks_wrongly_is_told(tmp_path: Path) -> None:
    """A number that is none, a chunk out of turn, another connection's backup: each is refused, and the backup that it
    concerns goes on."""
    with running(free_address(), tmp_path / "node", SMALL) as node, node.client() as client:
        for n in range(5):
            client.put(f"key-{n}", n)
        mine, other = Pulled(node), Pulled(node)
        mine.next()
        refused: list[dict[str, int]] = [{"seq": 1}, {"seq": 3}, {"transfer": 77}]
        for wrong in refused:
            with pytest.raises(Exception, match=r"comes next|no backup"):
                mine.ask(**wrong)
        with pytest.raises(Exception, match="no backup"):
            other.ask(transfer=mine.transfer, seq=2)
        while mine.end is None:
            mine.next()
        assert len(mine.values) == 5
        mine.close()
        other.close()


def test_there_are_only_so_many_at_a_time(tmp_path: Path) -> None:
    """Past the limit a backup is refused; one that nobody goes on with ends by itself, and makes room."""
    environment = {**SMALL, "RAFTNODE_BACKUPS": "1", "RAFTNODE_STALL_TIMEOUT_MS": "300"}
    with running(free_address(), tmp_path / "node", environment) as node, node.client() as client:
        for n in range(5):
            client.put(f"key-{n}", n)
        first, second = Pulled(node), Pulled(node)
        second._client.timeout = 0.05
        first.next()
        with pytest.raises(Unavailable, match="backups at a time"):
            second.next()

        def has_room() -> bool:
            with contextlib.suppress(Unavailable):
                second.next()
            return second.seq > 0

        wait_until(has_room, "the first one was given up", explain=node.describe)
        with pytest.raises(Exception, match="no backup"):
            first.next()
        first.close()
        second.close()


def test_what_the_node_does_not_have_yet_is_waited_for(tmp_path: Path) -> None:
    """A backup that must include a commit_id begins when the node has applied it; when that does not come within the
    time limit, it is refused."""
    with running(free_address(), tmp_path / "node", SMALL) as node:
        answer = node.ask({"type": "backup", "at_least": 10**9}, PATIENCE_S)
        assert answer is not None
        assert answer["data"] is False
        assert answer["error"]["code"] == "no_leader"
        assert "what is committed" in answer["error"]["message"]


def test_a_node_that_is_killed_leaves_no_file(tmp_path: Path) -> None:
    """Lost in the middle: an error, status 3, and neither a file nor a part of one."""
    address = free_address()
    environment = {**SMALL, "RAFTNODE_SNAPSHOT_BYTES_PER_S": "1000"}
    with running(address, tmp_path / "node", environment) as node, node.client() as client:
        for n in range(50):
            client.put(f"key-{n}", "x" * 200)

        def kill_in_the_middle(done: int, total: int) -> None:
            if 0 < done < total:
                node.kill()

        with pytest.raises(Unavailable, match="lost"):
            take(address, tmp_path / "file", timeout=PATIENCE_S, advance=kill_in_the_middle)
    assert not list(tmp_path.glob("file*"))
    assert run("backup", tmp_path / "file", "--node", address).exit_code == 3


def test_a_damaged_value_ends_the_backup(tmp_path: Path) -> None:
    """What does not match its checksum is not copied: the backup fails, and says which key."""
    address = free_address()
    with running(address, tmp_path / "node") as node, node.client() as client:
        client.put("sound", 1)
        client.put("broken", "value")
        assert node.terminate() == 0
    with lmdb.open(str(tmp_path / "node" / records.DATA_FILE), subdir=False, max_dbs=16, map_size=1 << 30) as env:
        db = env.open_db(records.COMMITTED, create=False)
        with env.begin(write=True) as txn:
            stored = bytearray(txn.get(b"default\0broken", db=db))
            stored[-2] ^= 1
            txn.put(b"default\0broken", bytes(stored), db=db)
    with (
        running(address, tmp_path / "node"),
        pytest.raises(NodeDamaged, match="broken"),
    ):
        take(address, tmp_path / "file", timeout=PATIENCE_S, advance=silent)
    assert not list(tmp_path.glob("file*"))


def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    """A file that can't be written to its end is not left there; nor is one that was there before touched."""
    address = free_address()
    with running(address, tmp_path / "node") as node, node.client() as client:
        for n in range(20):
            client.put(f"key-{n}", "x" * 1000)
        command = [sys.executable, "-m", "raftnode", "backup", str(tmp_path / "file"), "--node", address]

        def limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

        done = subprocess.run(
            command, env=command_environment(), preexec_fn=limit, capture_output=True, text=True, check=False
        )
        assert (done.returncode, "can't be written" in done.stderr) == (3, True), done.stderr
        assert not list(tmp_path.glob("file*"))
        (tmp_path / "file").write_text("mine")
        assert run("backup", tmp_path / "file", "--node", address).exit_code == 3
        assert (tmp_path / "file").read_text() == "mine"


# --- a new cluster of it --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backup of some hundred values, of which some were overwritten and deleted while it was taken."""
    path = tmp_path_factory.mktemp("backup")
    with running(free_address(), path / "node", {**FAST, "RAFTNODE_SNAPSHOT_CHUNK_BYTES": "2000"}) as node:
        with node.client() as client:
            for n in range(200):
                client.put(f"key-{n:03}", {"number": n, "text": "x" * 50}, namespace=f"space-{n % 3}")
            turns = itertools.count()

            def write_meanwhile(done: int, total: int) -> None:
                turn = next(turns)
                if turn < 10 and done < total:
                    client.delete(f"key-{turn:03}", namespace=f"space-{turn % 3}")
                    client.put(f"key-{turn + 20:03}", "new", namespace=f"space-{(turn + 20) % 3}")

            take(node.address, path / "file", timeout=PATIENCE_S, advance=write_meanwhile)
        assert node.terminate() == 0
    assert '"record":"gone"' in (path / "file").read_text()
    return path / "file"


def test_a_new_cluster_goes_on_from_it(taken: Path, tmp_path: Path) -> None:
    """A node on the restored directory has every value with its numbers, commit_ids go on, the cluster is another one,
    and nothing in the directory looks damaged."""
    address = free_address()
    result = run("restore", taken, tmp_path / "new", "--ip", address)
    assert result.exit_code == 0, result.output
    header, end = check(taken, advance=silent)
    expected = contents(taken)
    assert_same(state(tmp_path / "new"), expected)
    assert inspect(tmp_path / "new", "verify")[-1]["problems"] == 0
    with running(address, tmp_path / "new") as node, node.client() as client:
        for (namespace, key), line in expected.items():
            found = client.get_record(key, namespace)
            assert [found[n] for n in ("value", "created", "modified", "version")] == [
                line[n] for n in ("value", "created", "modified", "version")
            ]
        assert client.put("new", 1)["commit_id"] > end.commit_id
        status = client.status()
        assert status["cluster"] != header.cluster
        assert client.peers()["peers"] == [address]
        assert node.terminate() == 0
    assert inspect(tmp_path / "new", "verify")[-1]["problems"] == 0


@pytest.mark.parametrize(
    "numbers", [(1, 3, 8, 60), pytest.param((*range(1, 30), 60), marks=pytest.mark.long)], ids=["some", "many"]
)
@pytest.mark.timeout(300)
def test_a_restore_that_is_killed_can_be_done_again(taken: Path, tmp_path: Path, numbers: Iterable[int]) -> None:
    """Killed at any of its system calls that write or sync: the directory is a new node that has everything, or it
    holds none: then a node does not start on it as if it were new, and the restore can be run again."""
    if shutil.which("strace") is None:
        pytest.skip("strace, which kills it, is missing")
    calls, outcomes = "pwrite64,pwritev,fdatasync,fsync,msync,write", set()
    for number in numbers:
        directory = tmp_path / f"killed-{number}"
        address = free_address()
        command = [sys.executable, "-m", "raftnode", "restore", str(taken), str(directory), "--ip", address]
        trace = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", str(directory / records.DATA_FILE)]
        trace += ["-e", f"trace={calls}", "-e", f"inject={calls}:signal=KILL:when={number}"]
        done = subprocess.run(
            [*trace, *command], env=command_environment(), capture_output=True, timeout=PATIENCE_S, check=False
        )
        if done.returncode != 0:
            assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), done.stderr
        outcomes.add(done.returncode == 0)
        if not is_founded(directory):
            refuse_to_start(directory, address)
            assert run("restore", taken, directory, "--ip", address).exit_code == 0
        assert_same(state(directory), contents(taken))
        assert inspect(directory, "verify")[-1]["problems"] == 0
    assert outcomes == {True, False}, "killed, and not"


def is_founded(directory: Path) -> bool:
    try:
        store = Store("database", directory)
    except StoreDamaged:
        return False
    with contextlib.closing(store):
        return store.cluster_id is not None


def refuse_to_start(directory: Path, address: str) -> None:
    """Only a directory into which nothing has come yet may become a new node."""
    with contextlib.closing(Store("database", directory)) as store:
        if store.incoming is None:
            return
        with pytest.raises(StoreForeign, match="restore"):
            store.found(address, [])


def test_a_directory_that_is_in_use_is_left_alone(taken: Path, tmp_path: Path) -> None:
    """Neither a node's directory nor one with other files is restored into; nothing in it changes."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    assert run("restore", taken, tmp_path / "full").exit_code == 3
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    assert run("restore", taken, tmp_path / "new", "--ip", "127.0.0.1:5001").exit_code == 0
    before = inspect(tmp_path / "new", "info")
    result = run("restore", taken, tmp_path / "new", "--ip", "127.0.0.1:5002")
    assert (result.exit_code, "holds a node already" in result.output) == (3, True)
    assert inspect(tmp_path / "new", "info") == before
    (tmp_path / "file").write_text("mine")
    assert run("restore", taken, tmp_path / "file").exit_code == 3


# --- files that are not whole ---------------------------------------------------------------------------------


def without_end(lines: list[bytes]) -> list[bytes]:
    return lines[:-1]


def with_flipped_value(lines: list[bytes]) -> list[bytes]:
    return [*lines[:5], lines[5].replace(b"xxxx", b"xyxx", 1), *lines[6:]]


def without_a_line(lines: list[bytes]) -> list[bytes]:
    return lines[:7] + lines[8:]


def with_a_line_twice(lines: list[bytes]) -> list[bytes]:
    return lines[:7] + lines[6:]


def cut_off(lines: list[bytes]) -> list[bytes]:
    return [*lines[:20], lines[20][:9]]


def with_two_ends(lines: list[bytes]) -> list[bytes]:
    return [*lines, lines[-1]]


def with_two_heads(lines: list[bytes]) -> list[bytes]:
    return [lines[0], *lines]


def with_a_strange_line(lines: list[bytes]) -> list[bytes]:
    return [*lines[:3], b'{"record":"else"}\n', *lines[3:]]


def with_other_keys(lines: list[bytes]) -> list[bytes]:
    """Whole as a file, and yet not what it says: one key less than in the end. It is one that was not changed or
    deleted meanwhile, of which there is one line."""
    names = [(line.get("namespace"), line.get("key")) for line in map(json.loads, lines)]
    lost = next(n for n, name in enumerate(names) if name[0] and names.count(name) == 1)
    body = lines[:lost] + lines[lost + 1 : -1]
    crc = 0
    for line in body:
        crc = zlib.crc32(line, crc)
    end = json.loads(lines[-1]) | {"crc": crc, "lines": len(body)}
    return [*body, json.dumps(end).encode() + b"\n"]


@pytest.mark.parametrize(
    "damage",
    [
        without_end,
        with_flipped_value,
        without_a_line,
        with_a_line_twice,
        cut_off,
        with_two_ends,
        with_two_heads,
        with_a_strange_line,
        with_other_keys,
    ],
)
def test_a_damaged_file_is_not_restored(
    taken: Path, tmp_path: Path, damage: Callable[[list[bytes]], list[bytes]]
) -> None:
    """Whatever is wrong with the file, the restore says so before there is a node."""
    lines = taken.read_bytes().splitlines(keepends=True)
    (tmp_path / "file").write_bytes(b"".join(damage(lines)))
    with pytest.raises(StoreDamaged):
        restore(tmp_path / "file", tmp_path / "new", "127.0.0.1:5001", advance=silent)
    assert run("restore", tmp_path / "file", tmp_path / "new").exit_code == 3
    if (tmp_path / "new").exists():
        assert not is_founded(tmp_path / "new")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "empty"),
        (b"something else\n", "no backup"),
        (b'{"record":"end","commit_id":1,"term":1,"checksum":1,"keys":0,"lines":0,"crc":0}\n', "no backup"),
        (b'{"record":"backup","format":2,"cluster":"c","node":"n","begun":1}\n', "newer raftnode"),
        (b"\xff" * 100, "no backup"),
    ],
)
def test_a_file_that_is_no_backup_is_refused(tmp_path: Path, text: bytes, words: str) -> None:
    """With the reason; so is one that is not there."""
    (tmp_path / "file").write_bytes(text)
    with pytest.raises(StoreForeign, match=words):
        check(tmp_path / "file", advance=silent)
    with pytest.raises(StoreForeign, match="can't be read"):
        check(tmp_path / "none", advance=silent)


def test_the_lines_are_what_the_text_says(taken: Path) -> None:
    """The file can be read without raftnode: a header, values and keys that are gone, and the end."""
    lines = [json.loads(line) for line in taken.read_text().splitlines()]
    assert set(lines[0]) == {"record", *Header.__struct_fields__}
    assert set(lines[-1]) == {"record", *End.__struct_fields__}
    assert {line["record"] for line in lines[1:-1]} == {"value", "gone"}
    assert lines[-1]["keys"] == len(contents(taken))
