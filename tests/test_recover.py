"""`raftnode recover`: a new cluster on what one node has, after the majority is lost (recover docstring).

One cluster of three is made by real nodes. `left` is the directory of a follower that was killed with a staged entry in
its log and did not see the last writes: these are lost with the two other disks.
"""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import lmdb
import pytest
from click.testing import CliRunner, Result
from msgspec import Raw

from raftnode import records
from raftnode.cli import cli
from raftnode.consensus.ballot import Ballot
from raftnode.errors import StoreDamaged, StoreError, StoreForeign, StoreInUse
from raftnode.messages import DeleteCommand, PutCommand, encode_command
from raftnode.recover import plan, recover
from raftnode.store import Store
from raftnode.testing.processes import (
    FAST,
    PATIENCE_S,
    ClusterOfProcesses,
    NodeProcess,
    command_environment,
    free_address,
    inspect,
)


class Made(NamedTuple):
    left: Path
    other: Path
    """The directory of one of the two lost members, for whoever does not believe that it is lost."""
    addresses: dict[Path, str]
    kept: dict[str, int]
    """What clients were told of, and `left` has."""
    lost: dict[str, int]
    """What clients were told of after the node was killed."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    path = tmp_path_factory.mktemp("recover")
    kept, lost = {f"kept-{n}": n for n in range(20)}, {f"lost-{n}": n for n in range(5)}
    with ClusterOfProcesses(3, path / "cluster", FAST) as cluster:
        leader = cluster.await_leader()
        one, other = cluster.others(leader)
        with cluster.client() as client:
            for key, value in kept.items():
                client.put(key, value)
            cluster.await_caught_up()
            one.kill()
            for key, value in lost.items():
                client.put(key, value)
        cluster.terminate()
        shutil.copytree(one.volume, path / "left")
        shutil.copytree(other.volume, path / "other")
        addresses = {path / "left": one.address, path / "other": other.address}
    return Made(path / "left", path / "other", addresses, kept, lost)


@pytest.fixture
def left(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.left, tmp_path / "left"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@contextlib.contextmanager
def running(address: str, directory: Path, members: Sequence[str] = ()) -> Iterator[NodeProcess]:
    """A node on that very directory."""
    node = NodeProcess(address, members, directory.parent / "logs", FAST)
    node.volume = directory
    try:
        yield node.start()
    finally:
        node.kill()


def contents(directory: Path) -> list[dict[str, object]]:
    return inspect(directory, "log") + inspect(directory, "info")


def test_it_goes_on_alone_with_all_that_it_has(made: Made, left: Path) -> None:
    """All that the directory holds is there after the recovery, and nothing else; the node serves by itself; nothing in
    it looks damaged, and the log says what happened."""
    result = run("recover", left, "--yes")
    assert result.exit_code == 0, result.output
    address = made.addresses[made.left]
    with running(address, left) as node, node.client() as client:
        assert {key: client.get(key) for key in made.kept} == made.kept
        assert all(client.get(key) is None for key in made.lost)
        client.put("new", 1)
        assert client.peers()["peers"] == [address]
        assert node.terminate() == 0
    assert inspect(left, "verify")[-1]["problems"] == 0
    (change,) = [entry for entry in inspect(left, "log") if entry["kind"] == "members"]
    assert change["state"] == "committed"


def test_the_plan_tells_what_is_kept_and_what_may_be_lost(made: Made, left: Path) -> None:
    """Before anything is done: the end of the log, the keys of what is staged, and that the rest can't be told."""
    facts = inspect(left, "info")[0]
    agreed = plan(left)
    assert agreed.address == made.addresses[made.left]
    assert agreed.last.commit_id == inspect(left, "log", "--tail", "1")[0]["commit_id"]
    staged = {entry["key"] for entry in inspect(left, "log", "--staged") if entry["kind"] == "put"}
    assert {change.key for change in agreed.staged} == staged
    assert agreed.committed >= facts["commit_id"]
    result = run("recover", left)
    assert f"up to entry {agreed.last.commit_id} of term {agreed.last.term}" in result.output
    assert f"after entry {agreed.last.commit_id}" in result.output
    assert "majority of the voters are left, do not go on" in result.output


def test_without_a_yes_nothing_is_done(left: Path) -> None:
    """Where nobody can be asked: status 2, and the directory is as it was."""
    before = contents(left)
    result = run("recover", left)
    assert result.exit_code != 0
    assert contents(left) == before


@pytest.mark.parametrize(("answer", "is_done"), [("y", True), ("n", False), ("", False)])
def test_it_asks_at_a_terminal(left: Path, answer: str, is_done: bool) -> None:
    """Anything but yes leaves all as it was."""
    before = contents(left)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "raftnode", "recover", str(left)]
    with subprocess.Popen(
        command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=command_environment()
    ) as process:
        os.write(ours, f"{answer}\n".encode())
        output, _ = process.communicate(timeout=PATIENCE_S)
    os.close(ours)
    os.close(theirs)
    assert (process.returncode == 0) == is_done, output
    assert (contents(left) == before) != is_done


def test_the_old_members_never_mix_with_the_new_cluster(made: Made, left: Path, tmp_path: Path) -> None:
    """The two disks were not lost after all: their node is started again, and so is a copy of the directory from before
    the recovery. Both are refused, and neither cluster takes anything from the other."""
    assert run("recover", left, "--yes").exit_code == 0
    address, other = made.addresses[made.left], made.addresses[made.other]
    founders = [address, other]
    with (
        running(address, left) as node,
        running(other, Path(shutil.copytree(made.other, tmp_path / "other")), founders) as old,
        node.client() as client,
    ):
        old.await_event("peer_refused", code="wrong_cluster")
        client.put("new", 1)
        status = old.await_answer()
        assert status["leader"] is None
        assert status["last"]["commit_id"] > 0
        assert client.peers()["peers"] == [address]
        log = old.inspect("log")
    assert not [entry for entry in log if entry.get("key") == "new"]


def test_a_kill_at_any_moment_leaves_the_old_cluster_or_the_new_one(left: Path, tmp_path: Path) -> None:
    """Killed at each of its system calls that write or sync, in turn: the directory is whole, and says either the one
    or the other."""
    if shutil.which("strace") is None:
        pytest.skip("strace, which kills it, is missing")
    before = plan(left)
    outcomes = set()
    for call in range(1, 8):
        directory = Path(shutil.copytree(left, tmp_path / f"killed-{call}"))
        command = ["strace", "-f", "-qq", "-o", "/dev/null"]
        calls = "pwrite64,pwritev,fdatasync,fsync,msync,write"
        command += ["-P", str(directory / "raftnode.mdb"), "-e", f"trace={calls}"]
        command += ["-e", f"inject={calls}:signal=KILL:when={call}"]
        command += [sys.executable, "-m", "raftnode", "recover", str(directory), "--yes"]
        done = subprocess.run(command, capture_output=True, env=command_environment(), timeout=PATIENCE_S, check=False)
        assert done.returncode in (0, -signal.SIGKILL, 128 + signal.SIGKILL), done.stderr
        facts = inspect(directory, "info")[0]
        assert inspect(directory, "verify")[-1]["problems"] == 0
        is_old = facts["cluster"] == before.cluster
        assert is_old == (sorted(facts["membership"]["voters"]) == before.voters)
        outcomes.add((is_old, done.returncode == 0))
    assert outcomes >= {(True, False), (False, True)}, "killed before and never"


# --- a flush that was under way -------------------------------------------------------------------------------


def put(key: str, value: int) -> Raw:
    return encode_command(PutCommand(namespace="default", key=key, value=Raw(str(value).encode())))


def ended_in_a_flush(directory: Path, address: str) -> int:
    """The directory of a member of three that ended in the middle of a flush. The first ten of twenty keys were put,
    and that is on disk. Then all twenty were put, and the last deleted: of these, five are on disk. One put more is
    staged. Returns what is committed."""
    with contextlib.closing(Store("database", directory)) as store:
        store.found(address, [free_address(), free_address()])
        delete = encode_command(DeleteCommand(namespace="default", key="key-19"))
        commands = [put(f"key-{n:02}", n) for n in range(10)]
        commands += [*(put(f"key-{n:02}", n + 100) for n in range(20)), delete, put("key-05", 7)]
        entries = [store.journal.append(1, 1_700_000_000_000, command) for command in commands]
        store.write(Ballot(1, address))
        store.apply(entries[:10])
        store.write()
        store.apply(entries[10:-1])
        store.write(keys=3)
        store.write(keys=2)
        assert store.behind is not None
        assert (store.behind.after, store.behind.key) == (10, "default\0key-05")
        return store.commit_id


def test_a_node_that_ended_in_a_flush_keeps_all_of_its_log(tmp_path: Path) -> None:
    """Of what is committed, some is only in the log. The plan goes by the log; with the recovery all of it is on disk;
    and the new cluster has every value, with the numbers that its history gives it, the staged one too."""
    address, left = free_address(), tmp_path / "left"
    committed = ended_in_a_flush(left, address)
    agreed = plan(left)
    assert (agreed.committed, agreed.last.commit_id) == (committed, committed + 1)
    assert [change.key for change in agreed.staged] == ["key-05"]
    assert agreed.missing == []
    assert run("recover", left, "--yes").exit_code == 0
    found = {line["key"]: line for line in inspect(left, "state")}
    assert {key: line["value"] for key, line in found.items()} == {f"key-{n:02}": n + 100 for n in range(19)}
    assert [line["version"] for line in found.values()] == [2] * 10 + [1] * 9
    assert inspect(left, "verify")[-1]["problems"] == 0
    with running(address, left) as node, node.client() as client:
        assert [client.get(f"key-{n:02}") for n in (4, 5, 18, 19)] == [104, 7, 118, None]
        record = client.get_record("key-05")
        assert [record[name] for name in ("created", "modified", "version")] == [6, committed + 1, 3]
        assert node.terminate() == 0
    assert inspect(left, "verify")[-1]["problems"] == 0


# --- what is refused ------------------------------------------------------------------------------------------


def test_a_running_node_is_not_recovered(left: Path) -> None:
    """Its directory is locked: the plan can be looked at, and is not carried out."""
    agreed = plan(left)
    store = Store("database", left)
    with pytest.raises(StoreInUse):
        recover(agreed)
    store.close()


def test_a_plan_that_is_no_more_true_is_refused(left: Path) -> None:
    """Between the question and the answer the directory was recovered by somebody else."""
    agreed = plan(left)
    recover(agreed)
    with pytest.raises(StoreError, match="changed meanwhile"):
        recover(agreed)


def test_there_must_be_something_to_recover(left: Path, tmp_path: Path) -> None:
    """A cluster of one just starts; a directory without a node has nothing; a damaged one is repaired first, as its
    end is not known."""
    recover(plan(left))
    with pytest.raises(StoreForeign, match="only voter"):
        plan(left)
    with pytest.raises(StoreForeign, match="no such directory"):
        plan(tmp_path / "none")
    Store("database", tmp_path / "new").close()
    with pytest.raises(StoreForeign, match="never was in a cluster"):
        plan(tmp_path / "new")


def test_a_damaged_directory_is_repaired_first(left: Path) -> None:
    """A flipped byte in the newest entry: recovering would found a cluster on it."""
    newest = inspect(left, "log", "--tail", "1")[0]["commit_id"]
    Store("database", left).close()  # LMDB has it then, and not the tail (that: `test_repair_tail`)
    with lmdb.open(str(left / records.DATA_FILE), subdir=False, max_dbs=16, map_size=1 << 30) as env:
        log = env.open_db(records.LOG, create=False)
        with env.begin(write=True) as txn:
            stored = bytearray(txn.get(records.log_key(newest), db=log))
            stored[-1] ^= 1
            txn.put(records.log_key(newest), bytes(stored), db=log)
    with pytest.raises(StoreDamaged, match="raftnode repair"):
        plan(left)
    assert run("recover", left, "--yes").exit_code == 3
