"""`raftnode-inspect verify`, `diff`, `best` and `timeline`, on directories that real nodes made, against what clients
were told.

One cluster of three makes them, with a network between its nodes that can be cut. It is written to while nodes are
killed; a follower's directory is copied; more is written; then the leader is cut off, is written to alone, and has in
the end staged what nobody else has, while the others have committed other entries in those places. So there are three
newest directories (`loner`, `first` and `second`), an old copy (`old`) and one of a node that started anew in place of
another (`wiped`).
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import pytest
from click.testing import CliRunner, Result

from raftnode import inspector, records
from raftnode.client import Client
from raftnode.config import parse_address
from raftnode.consensus.ballot import Ballot
from raftnode.consensus.membership import Membership
from raftnode.consensus.witness import Witness
from raftnode.inspection import Directory
from raftnode.messages import Entry, EntryId, Noop, chain, encode_command
from raftnode.store import Store
from raftnode.testing.processes import (
    FAST,
    PATIENCE_S,
    ClusterOfProcesses,
    NodeProcess,
    WriteRecord,
    Writers,
    command_environment,
    inspect_lines,
    wait_until,
)

SEED = 11


# --- the directories ------------------------------------------------------------------------------------------


class Made(NamedTuple):
    """What the tests look at. The directories are called as they are in the module's text."""

    path: Path
    addresses: dict[str, str]
    """Of which member each directory is."""
    acknowledged: dict[int, str]
    """Keys of the writes that clients were told of, by commit_id."""
    alone: list[str]
    """Keys that were written to the leader that was cut off."""
    meanwhile: list[str]
    """Keys that were acknowledged by the others at that time."""
    leaders: dict[int, str]
    """Who led each term, as the nodes logged it."""

    @property
    def three(self) -> list[Path]:
        return [self.path / name for name in ("loner", "first", "second")]


def put_alone(leader: NodeProcess, keys: list[str]) -> None:
    """Put to a leader that nobody hears: it appends, and can't commit."""
    with (
        socket.create_connection(parse_address(leader.listen), PATIENCE_S) as connection,
        connection.makefile("rwb") as stream,
    ):
        for key in keys:
            stream.write(json.dumps({"type": "put", "key": key, "value": "z", "id": key}).encode() + b"\n")
        stream.flush()
        answers = [json.loads(stream.readline()) for _ in keys]
    assert {answer["error"]["code"] for answer in answers} == {"not_committed"}


def keep(node: NodeProcess, target: Path) -> None:
    shutil.copytree(node.volume, target)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    path = tmp_path_factory.mktemp("comparison")
    chance = random.Random(SEED)
    print(f"seed {SEED}")  # noqa: T201 - shown when a test fails
    endless = (WriteRecord(f"key-{n % 300}", "x" * (n % 400)) for n in itertools.count())
    acknowledged: dict[int, str] = {}
    alone, meanwhile = [f"alone-{n}" for n in range(4)], [f"meanwhile-{n}" for n in range(3)]
    with ClusterOfProcesses(3, path / "cluster", FAST, ["--timeout", "1"], proxied=True) as cluster:
        with Writers(cluster.addresses, endless, clients=4, resolve=False, timeout=5.0) as writers:
            for _ in range(3):
                cluster.await_leader()
                writers.await_more(chance.randrange(50, 150), explain=cluster.describe)
                victim = cluster.await_leader()
                victim.kill()
                writers.await_more(5, explain=cluster.describe)
                victim.start()
            writers.stop()
        acknowledged |= {done.commit_id: done.record.key for done in writers.acknowledged}
        cluster.heal()
        leader = cluster.await_leader()
        first, second = cluster.others(leader)
        second.kill()
        keep(second, path / "old")
        second.start()
        cluster.heal()
        with cluster.client() as client:
            for n in range(20):
                acknowledged[client.put(f"later-{n}", n)["commit_id"]] = f"later-{n}"
            cluster.await_caught_up()
            leader = cluster.await_leader()
            others = cluster.others(leader)
            newest = max(acknowledged)

            def is_remembered() -> bool:  # what it knows of others goes to disk with another write, once a second
                acknowledged[client.put("more", 1)["commit_id"]] = "more"
                with Directory(leader.volume, 1 << 36) as opened:
                    return all(opened.facts.witnesses[n.address].floor.commit_id > newest for n in others)

            wait_until(is_remembered, "the leader remembers what the others hold", explain=cluster.describe)
            cluster.await_caught_up(max(acknowledged))
        first, second = others if others[1].address == second.address else others[::-1]
        cluster.proxy.isolate(leader.address)
        put_alone(leader, alone)
        wait_until(lambda: any((s := n.status()) and s["role"] == "leader" for n in others), "another one leads")
        with Client([node.address for node in others], timeout=PATIENCE_S, name="meanwhile") as client:
            for key in meanwhile:
                acknowledged[client.put(key, 1)["commit_id"]] = key
        cluster.await_caught_up(max(acknowledged), others)
        cluster.await_written(max(acknowledged), others)
        cluster.kill()
        addresses = {"loner": leader.address, "first": first.address, "second": second.address}
        for name, node in (("loner", leader), ("first", first), ("second", second)):
            keep(node, path / name)
        roles = [role for node in cluster for role in node.events("role") if role["role"] == "leader"]
        leaders = {role["term"]: role["node"] for role in roles}
        shutil.rmtree(first.volume)
        first.start().await_answer()
        first.kill()
        keep(first, path / "wiped")
    return Made(path, addresses, acknowledged, alone, meanwhile, leaders)


def run(*arguments: object, columns: int = 160) -> Result:
    """In this process. An exception that comes out is a failure of the test."""
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(
        inspector.main, [str(argument) for argument in arguments], catch_exceptions=False
    )


def lines(result: Result, record: str | None = None) -> list[dict[str, Any]]:
    """The JSON lines, or those of one kind."""
    found = [json.loads(line) for line in result.stdout.splitlines()]
    return [line for line in found if record in (None, line["record"])]


def log_of(directory: Path) -> list[dict[str, Any]]:
    """What `log` prints of a directory, which other tests check."""
    return [json.loads(line) for line in inspect_lines(directory, "log")]


def keys_of(found: list[dict[str, Any]]) -> set[str]:
    return {line["key"] for line in found}


def copied(made: Made, tmp_path: Path, *names: str) -> list[Path]:
    return [Path(shutil.copytree(made.path / name, tmp_path / name)) for name in names]


def edit(path: Path, name: bytes, change: Callable[[lmdb.Transaction, Any], object]) -> None:
    """Write to one of the databases behind the store's back."""
    with lmdb.open(str(path / records.DATA_FILE), subdir=False, map_size=1 << 36, max_dbs=16) as env:
        db = env.open_db(name, create=False)
        with env.begin(write=True) as txn:
            change(txn, db)


def flip(path: Path, name: bytes, key: bytes, byte: int) -> None:
    """Change one bit of a stored value."""

    def change(txn: lmdb.Transaction, db: Any) -> None:
        stored = bytearray(txn.get(key, db=db) or b"")
        stored[byte] ^= 1
        txn.put(key, bytes(stored), db=db)

    edit(path, name, change)


def set_fact(path: Path, name: bytes, fact: object) -> None:
    edit(path, records.META, lambda txn, db: txn.put(name, records.pack_meta(name, fact), db=db))


def fact_of(path: Path, name: bytes, type: Any) -> Any:
    with (
        lmdb.open(str(path / records.DATA_FILE), subdir=False, map_size=1 << 36, max_dbs=16) as env,
        env.begin() as txn,
    ):
        stored = txn.get(name, db=env.open_db(records.META, txn=txn, create=False))
        return records.unpack_meta(name, bytes(stored), type)


def zero_pages(path: Path, text: bytes) -> None:
    """Overwrite the leaf pages (flag 2 at byte 10) that hold a text with zeros: LMDB ends the process that reads one.
    What a page holds begins where the two bytes at 14 say; before that there may be leftovers of other pages."""
    file = path / records.DATA_FILE
    data = bytearray(file.read_bytes())
    for page in range(0, len(data), 4096):
        held = page + int.from_bytes(data[page + 14 : page + 16], "little")
        if data[page + 10] == 2 and text in data[held : page + 4096]:
            data[page : page + 4096] = bytes(4096)
    file.write_bytes(data)


def run_apart(*arguments: object) -> tuple[int, str, str]:
    """As people run it, in a process of its own: exit status, standard output and standard error."""
    command = [sys.executable, "-m", "raftnode.inspector", *(str(argument) for argument in arguments)]
    done = subprocess.run(command, env=command_environment({"COLUMNS": "160"}), capture_output=True, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


# --- verify ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["loner", "first", "second", "old", "wiped"])
def test_what_real_nodes_left_is_whole(made: Made, name: str) -> None:
    """Killed at any moment, cut off, an old copy, started anew: a directory as a node left it has no problem. As many
    entries are read as the log lists, and the values are held against the log up to what is committed."""
    directory = made.path / name
    log = log_of(directory)
    result = run("verify", directory, "--json")
    assert result.exit_code == 0, result.output
    (found,) = lines(result)
    committed = max((line["commit_id"] for line in log if line["state"] == "committed"), default=0)
    assert (found["record"], found["problems"], found["first_bad"]) == ("verified", 0, None)
    assert (found["entries"], found["last"], found["replayed_to"]) == (len(log), len(log), committed)
    assert found["values"] == len(list(inspect_lines(directory, "state")))
    assert found["pages_checked"]


def replace_value(path: Path) -> None:
    """A committed value that no entry has put, with a right checksum."""

    def change(txn: lmdb.Transaction, db: Any) -> None:
        key = b"default\0later-0"
        record = records.unpack_record(key, bytes(txn.get(key, db=db) or b""))
        txn.put(
            key, records.pack_record(key, record.__class__(record.created, record.modified, 9, 0, record.value)), db=db
        )

    edit(path, records.COMMITTED, change)


def add_value(path: Path) -> None:
    """A committed value of a key that was never put."""
    key, record = b"default\0nobody", records.Record(3, 3, 1, 0, encode_command(Noop()))
    edit(path, records.COMMITTED, lambda txn, db: txn.put(key, records.pack_record(key, record), db=db))


def fall(path: Path) -> None:
    """The last entry has an earlier term than the one before, with a right checksum."""

    def change(txn: lmdb.Transaction, db: Any) -> None:
        count = txn.stat(db)["entries"]
        before, last = (
            records.unpack_entry(n, bytes(txn.get(records.log_key(n), db=db) or b"")) for n in (count - 1, count)
        )
        checksum = chain(before.checksum, 0, count, last.time, last.command)
        txn.put(records.log_key(count), records.pack_entry(Entry(0, count, last.time, checksum, last.command)), db=db)

    edit(path, records.LOG, change)


def raise_terms(path: Path) -> None:
    """The ballot is of an earlier term than the log."""
    set_fact(path, b"ballot", Ballot(0))


def other_members(path: Path) -> None:
    """The kept membership is of an entry that is none."""
    kept = fact_of(path, b"memberships", list[Membership])
    set_fact(path, b"memberships", [Membership(commit_id=7, voters=kept[0].voters)])


def other_cluster(path: Path) -> None:
    set_fact(path, b"cluster", "0" * 16)


def other_node(path: Path) -> None:
    (path / records.LOCK_FILE).write_text("f" * 16)


def forget(path: Path) -> None:
    """The node was reminded of what it does not have."""
    address = fact_of(path, b"address", str)
    set_fact(path, b"witnesses", {address: Witness(1, floor=EntryId(1, 10_000))})


KEY = b"default\0later-0"
DAMAGES: dict[str, tuple[Callable[[Path], object], set[str], int | None]] = {
    "a bit of a command": (lambda path: flip(path, records.LOG, records.log_key(50), 60), {"entry"}, 50),
    "a bit of a term": (lambda path: flip(path, records.LOG, records.log_key(50), 8), {"entry"}, 50),
    "a bit of a checksum": (lambda path: flip(path, records.LOG, records.log_key(50), 20), {"entry"}, 50),
    "a byte of a format": (lambda path: flip(path, records.LOG, records.log_key(50), 0), {"entry"}, 50),
    "an entry is gone": (
        lambda path: edit(path, records.LOG, lambda txn, db: txn.delete(records.log_key(50), db=db)),
        {"entry"},
        50,
    ),
    "the newest entry": (lambda path: flip(path, records.LOG, records.log_key(len(log_of(path))), 30), {"entry"}, -1),
    "terms fall": (fall, {"order"}, -1),
    "a bit of a value": (lambda path: flip(path, records.COMMITTED, KEY, -1), {"value"}, None),
    "a value that was never put": (replace_value, {"replay"}, None),
    "a key that was never put": (add_value, {"replay"}, None),
    "a value is gone": (
        lambda path: edit(path, records.COMMITTED, lambda txn, db: txn.delete(KEY, db=db)),
        {"replay"},
        None,
    ),
    "a bit of a fact": (lambda path: flip(path, records.META, b"ballot", -1), {"facts"}, None),
    "a fact is gone": (
        lambda path: edit(path, records.META, lambda txn, db: txn.delete(b"cluster", db=db)),
        {"facts"},
        None,
    ),
    "the ballot": (raise_terms, {"facts"}, None),
    "the members": (other_members, {"facts"}, None),
    "the cluster": (other_cluster, {"facts"}, None),
    "the node": (other_node, {"facts"}, None),
    "a promise": (forget, {"promise"}, None),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_verify_finds_every_kind_of_damage(made: Made, tmp_path: Path, what: str) -> None:
    """One thing at a time is made wrong in a directory that was whole. It is found by the check that is for it and by
    no other, the first bad entry is named, and the exit status is 4; nothing in the directory has changed."""
    damage, checks, first_bad = DAMAGES[what]
    (path,) = copied(made, tmp_path, "loner")
    Store("database", path).close()  # LMDB has the newest entries then (those in the tail: `test_inspector_tail`)
    last = len(log_of(path))
    damage(path)
    before = (path / records.DATA_FILE).read_bytes()
    result = run("verify", path, "--json")
    assert result.exit_code == 4, result.output
    *problems, found = lines(result)
    assert {problem["check"] for problem in problems} == checks, problems
    assert found["problems"] == len(problems)
    assert found["first_bad"] == (last if first_bad == -1 else first_bad)
    assert (path / records.DATA_FILE).read_bytes() == before
    text = run("verify", path)
    assert (text.exit_code, text.stdout.count("DAMAGED")) == (4, len(problems))


def test_verify_sees_pages_from_the_outside(made: Made, tmp_path: Path) -> None:
    """A page of zeros ends who reads it through LMDB. It is found before that, in words, and what LMDB does then is
    told as well."""
    (path,) = copied(made, tmp_path, "second")
    zero_pages(path, b"default\0later-0")
    status, out, err = run_apart("verify", path, "--json")
    assert status == 4
    assert json.loads(out.splitlines()[0])["check"] == "pages"
    assert "ended the reader" in err
    assert "Traceback" not in err


def test_verify_beside_a_node_under_load(tmp_path: Path) -> None:
    """A node takes puts as fast as it can, and is verified again and again: it is always whole, and what was
    acknowledged before has been seen."""
    endless = (WriteRecord(f"key-{n % 100}", n) for n in itertools.count())
    with (
        ClusterOfProcesses(1, tmp_path / "cluster", FAST) as cluster,
        Writers(cluster.addresses, endless, clients=4) as writers,
    ):
        writers.await_acknowledged(200)
        for _ in range(4):
            told = len(writers.acknowledged)
            status, out, err = run_apart("verify", cluster[0].volume, "--json")
            assert (status, err) == (0, "")
            found = json.loads(out.splitlines()[-1])
            assert found["replayed_to"] == found["commit_id"]
            assert found["last"] >= max(done.commit_id for done in writers.acknowledged[:told])
            writers.await_more(50)


# --- diff -----------------------------------------------------------------------------------------------------


def brute_force(one: Path, other: Path) -> tuple[int, int | None]:
    """How far two logs are equal, and where they differ, entry by entry."""
    pairs = zip(log_of(one), log_of(other), strict=False)
    equal_to = 0
    for mine, theirs in pairs:
        if (mine["term"], mine["checksum"]) != (theirs["term"], theirs["checksum"]):
            return equal_to, mine["commit_id"]
        equal_to = mine["commit_id"]
    return equal_to, None


@pytest.mark.parametrize("scan", [[], ["--scan"]])
def test_diff_finds_where_logs_part(made: Made, scan: list[str]) -> None:
    """All directories against each other: where each two part is what comparing entry by entry gives, by halving and by
    reading all. Staged entries that differ are no contradiction, and no key differs where all have arrived."""
    directories = [made.path / name for name in ("loner", "first", "second", "old")]
    result = run("diff", *directories, "--json", *scan)
    assert result.exit_code == 0, result.output
    pairs = lines(result, "pair")
    assert len(pairs) == 6
    for pair in pairs:
        assert (pair["equal_to"], pair["differ_at"]) == brute_force(Path(pair["one"]), Path(pair["other"]))
    members = {Path(line["directory"]).name: line for line in lines(result, "member")}
    assert {Path(name).name for name in members["first"]["agrees_with"]} == {"second", "old"}
    assert [Path(name).name for name in members["loner"]["agrees_with"]] == ["old"]
    assert [Path(name).name for name in members["old"]["same_node"]] == ["second"]
    (compared,) = lines(result, "compared")
    assert compared["by"] == ("scan" if scan else "checksums")
    assert (compared["keys"], compared["contradiction"]) == (0, False)
    assert compared["differ_at"] == brute_force(*made.three[:2])[1]


def test_diff_names_the_keys(made: Made, tmp_path: Path) -> None:
    """A value that was changed in one directory, with a right checksum, is the only key that differs; the status is 5.
    The values are shown only when asked for."""
    first, second = copied(made, tmp_path, "first", "second")
    replace_value(second)
    result = run("diff", first, second, "--json", "--values")
    assert result.exit_code == 5
    (key,) = lines(result, "key")
    assert (key["namespace"], key["key"]) == ("default", "later-0")
    assert [value["version"] for value in key["values"].values()] == [1, 9]
    assert [value["value"] for value in key["values"].values()] == [0, 0]
    assert "value" not in lines(run("diff", first, second, "--json"), "key")[0]["values"][str(first)]
    assert run("diff", first, second, "--json", "--no-keys").exit_code == 0


def test_committed_entries_that_differ_are_a_contradiction(made: Made, tmp_path: Path) -> None:
    """The loner's directory is made to call its lone entries committed. That can't be: diff and best say so, with
    status 5."""
    loner, first = copied(made, tmp_path, "loner", "first")
    set_fact(loner, b"commit_id", len(log_of(loner)))
    for command in ("diff", "best"):
        result = run(command, loner, first, "--json")
        assert result.exit_code == 5
        assert lines(result, "contradiction")


def test_diff_reads_all_where_halving_can_not_tell(made: Made, tmp_path: Path) -> None:
    """The entry where two logs part is damaged in one of them: then all is read, it is told, and the place is named as
    far as the damage lets it."""
    loner, first = copied(made, tmp_path, "loner", "first")
    equal_to, differ_at = brute_force(loner, first)
    assert differ_at is not None
    flip(first, records.LOG, records.log_key(differ_at), 10)
    result = run("diff", loner, first, "--json", "--no-keys")
    assert result.exit_code == 4
    (compared,), (pair,) = lines(result, "compared"), lines(result, "pair")
    assert (compared["by"], compared["why"]) == ("scan", f"{first} is damaged")
    assert (pair["equal_to"], pair["differ_at"]) == (equal_to, differ_at + 1)


# --- best -----------------------------------------------------------------------------------------------------


def best(*directories: Path) -> tuple[dict[str, Any], Result]:
    """The last line, and all."""
    result = run("best", *directories, "--json")
    assert result.exit_code == 0, result.output
    (found,) = lines(result, "best")
    return found, result


def test_best_of_all_three(made: Made) -> None:
    """With all directories there: the loner is not the one to keep, though its log is as long. Keeping it would lose
    exactly the keys that the others had acknowledged meanwhile; keeping one of the others loses nothing that was
    acknowledged, only what was written to the loner alone. All that was acknowledged is committed for certain."""
    found, result = best(*made.three)
    assert Path(found["directory"]).name in ("first", "second")
    assert found["majority"]
    assert found["missing"] == []
    assert found["committed_to"] >= max(made.acknowledged)
    lost = lines(result, "lost_key")
    assert {line["key"] for line in lost if line["directory"].endswith("loner")} == set(made.meanwhile)
    assert all(line["committed"] for line in lost if line["directory"].endswith("loner"))
    by_best = [line for line in lost if line["directory"] == found["directory"]]
    assert keys_of(by_best) <= set(made.alone)
    assert keys_of(by_best)
    assert not any(line["committed"] for line in by_best)
    assert f"Keep {found['directory']}" in run("best", *made.three).stdout


def test_best_of_what_two_lost_disks_left(made: Made) -> None:
    """One directory of three: what its node knew as committed is certain, what it has after that is not, and nobody can
    say what the two others have committed since: it says so, and does not call anything complete."""
    found, result = best(made.path / "loner")
    committed = [line["commit_id"] for line in log_of(made.path / "loner") if line["state"] == "committed"]
    assert not found["majority"]
    assert sorted(found["missing"]) == sorted(made.addresses[name] for name in ("first", "second"))
    assert found["committed_to"] == committed[-1]
    uncertain = [line for line in lines(result, "holding") if not line["committed"]]
    assert [(line["first"], line["voters"]) for line in uncertain] == [(committed[-1] + 1, 1)]
    assert "is not known" in found["says"][2]


def test_an_old_copy_is_known_by_what_others_remember(made: Made) -> None:
    """The leader remembers what its follower had acknowledged: the copy made before is told to be old, is no sound
    directory, and the leader's is the one to keep, with all acknowledged up to there committed for certain."""
    found, result = best(made.path / "old", made.path / "loner")
    assert Path(found["directory"]).name == "loner"
    assert not found["majority"]
    candidates = {Path(line["directory"]).name: line for line in lines(result, "candidate")}
    assert candidates["old"]["old_copy"]
    assert not candidates["loner"]["old_copy"]
    before = {key for commit_id, key in made.acknowledged.items() if commit_id <= found["committed_to"]}
    lost = {
        line["key"] for line in lines(result, "lost_key") if line["directory"].endswith("old") and line["committed"]
    }
    assert {f"later-{n}" for n in range(20)} <= lost <= before


def test_copies_of_one_node_speak_once(made: Made) -> None:
    """The old and the newest directory of one node are one voter, the newest; a node that was started anew at the
    address of another is none."""
    found, result = best(made.path / "old", made.path / "second", made.path / "wiped")
    candidates = {Path(line["directory"]).name: line for line in lines(result, "candidate")}
    assert Path(found["directory"]).name == "second"
    assert candidates["old"]["copy_of"] == str(made.path / "second")
    assert (candidates["second"]["voter"], candidates["wiped"]["voter"]) == (True, False)
    assert max(line["voters"] for line in lines(result, "holding")) == 1
    assert not found["majority"]


def test_a_damaged_directory_is_not_the_one_to_keep(made: Made, tmp_path: Path) -> None:
    """Of two equal ones the damaged one is not chosen, and it is said to repair it; of one with a page that ends its
    reader, the others are told all the same, with status 4."""
    first, second, loner = copied(made, tmp_path, "first", "second", "loner")
    flip(second, records.LOG, records.log_key(50), 60)
    result = run("best", first, second, loner, "--json")
    assert result.exit_code == 4
    assert lines(result, "best")[0]["directory"] == str(first)
    assert f"raftnode repair {second}" in lines(result, "best")[0]["says"][-1]
    zero_pages(loner, b'"key":"later-0"')
    zero_pages(first, b'"key":"later-0"')
    status, out, err = run_apart("best", first, second, loner, "--json")
    assert status == 4
    assert "Traceback" not in err
    found = [json.loads(line) for line in out.splitlines()]
    assert found[-1]["record"] == "best"


# --- best, of directories made for it -------------------------------------------------------------------------

VOTERS = [f"127.0.0.1:{port}" for port in (7001, 7002, 7003)]
TIME = 1_700_000_000_000


def build(
    path: Path, address: str, ballot: int, terms: list[int], times: list[int] | None = None, **facts: Any
) -> Path:
    """A directory with entries of these terms, none of them committed."""
    store = Store("database", path)
    store.found(address, VOTERS)
    for n, term in enumerate(terms):
        time = TIME + n if times is None else TIME + times[n]
        store.journal.append(term, time, encode_command(Noop()))
    for name, fact in facts.items():
        setattr(store, name, fact)
    store.write(Ballot(ballot))
    store.close()
    return path


@pytest.mark.parametrize(
    ("ballots", "third", "certain"),
    [
        ([4, 4, 3], [1, 3], 0),
        ([2, 2, 2], [1], 2),
        ([4, 4, 4], [1], 2),
        ([4, 4, 4], [1, 3], 0),
        ([4, 4], None, 0),
        ([2, 2], None, 2),
    ],
)
def test_a_majority_alone_is_no_proof(
    tmp_path: Path, ballots: list[int], third: list[int] | None, certain: int
) -> None:
    """Figure 3.7 of the thesis: two of three hold entry 2 of term 2. That is committed if both are still in term 2, or
    if all are there and nobody has a later term; else a leader of term 3 may yet overwrite it, and it is said to be
    held by a majority, and no more."""
    logs = [[1, 2], [1, 2], third]
    paths = [
        build(tmp_path / str(n), VOTERS[n], ballot, terms)
        for n, (ballot, terms) in enumerate(zip(ballots, logs, strict=False))
        if terms is not None
    ]
    _, result = best(*paths)
    held = [line for line in lines(result, "holding") if line["source"] in map(str, paths[:2])]
    assert max((line["last"] for line in held if line["committed"]), default=0) == certain
    assert [line["majority"] for line in held if line["first"] <= 2 <= line["last"]] == [True]


def test_what_is_remembered_and_nowhere_is_missing(tmp_path: Path) -> None:
    """A node remembers of another an entry that was committed, and neither has it: it is known to be missing."""
    witnesses = {VOTERS[1]: Witness(2, EntryId(2, 9), EntryId(2, 7))}
    first = build(tmp_path / "0", VOTERS[0], 2, [1, 2], witnesses=witnesses)
    found, result = best(first)
    assert {(line["commit_id"], line["term"]) for line in lines(result, "elsewhere")} == {(7, 2), (9, 2)}
    assert any("entry 7 of term 2" in words and "committed" in words for words in found["says"])


# --- timeline -------------------------------------------------------------------------------------------------


def test_timeline_tells_terms_and_leaders(made: Made) -> None:
    """Every term of the logs, with its entries counted as `log` lists them; who led, where it is told, is who the nodes
    logged as leader, and of the newest term it is told."""
    result = run("timeline", *made.three, "--json")
    assert result.exit_code == 0, result.output
    terms = {line["term"]: line for line in lines(result, "term")}
    logs = [log_of(directory) for directory in made.three]
    for term, line in terms.items():
        row = max(([entry for entry in log if entry["term"] == term] for log in logs), key=len)
        assert line["entries"] == len(row)
        if row:
            assert (line["first"], line["last"]) == (row[0]["commit_id"], row[-1]["commit_id"])
            assert (line["from_time"], line["to_time"]) == (row[0]["time"], row[-1]["time"])
            assert line["kinds"] == {kind: sum(e["kind"] == kind for e in row) for kind in {e["kind"] for e in row}}
            clients = [entry["client"] for entry in row if entry["client"]]
            assert line["clients"] == {client: clients.count(client) for client in clients}
        assert line["leader"] in (None, made.leaders.get(term))
    assert {entry["term"] for log in logs for entry in log} <= terms.keys()
    assert len(terms) > 3
    assert terms[max(terms)]["leader"] == made.leaders[max(terms)]
    assert str(made.path) in run("timeline", *made.three, "--json").stdout
    assert made.leaders[max(terms)] in run("timeline", *made.three).stdout


def test_timeline_tells_pauses_and_clocks(tmp_path: Path) -> None:
    """Times without an entry as long as asked for, a clock that goes back within a term, and two leaders whose clocks
    differ; a term of which nothing is left but a vote is told as well."""
    path = build(tmp_path / "0", VOTERS[0], 5, [1, 1, 1, 2, 2], [0, 5000, 4000, 3000, 3001])
    set_fact(path, b"ballot", Ballot(5, VOTERS[1]))
    result = run("timeline", path, "--json", "--pause", "5")
    found = lines(result)
    told = [(line["record"], line["term"], line.get("commit_id"), line.get("ms")) for line in found]
    assert told == [
        ("term", 1, None, None),
        ("pause", 1, 2, 5000),
        ("clock", 1, 3, 1000),
        ("term", 2, None, None),
        ("clock", 2, 4, 1000),
        ("term", 5, None, None),
    ]
    assert [line["same_leader"] for line in found if line["record"] == "clock"] == [True, False]
    assert (found[-1]["entries"], found[-1]["votes"], found[-1]["leader"]) == (0, {VOTERS[1]: [VOTERS[0]]}, None)


# --- what can't be compared -----------------------------------------------------------------------------------


def too_new(path: Path) -> Path:
    set_fact(path, b"format", records.FORMAT + 1)
    return path


@pytest.mark.parametrize("command", ["diff", "best", "timeline"])
def test_what_can_not_be_read_is_told_and_the_rest_is_shown(made: Made, tmp_path: Path, command: str) -> None:
    """A directory that is not there, one of another program, one of a newer format: one line each and status 3, and the
    others are compared all the same. None that can be read: status 3 too. No traceback."""
    first, newer = copied(made, tmp_path, "first", "old")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / records.DATA_FILE).write_text("not ours" * 2000)
    for bad in (tmp_path / "nowhere", foreign, too_new(newer)):
        status, out, err = run_apart(command, made.path / "loner", first, bad, "--json")
        assert status == 3
        assert [json.loads(line)["record"] for line in out.splitlines()].count("unreadable") == 1
        assert len(out.splitlines()) > 2
        assert len(err.splitlines()) == 1, err
        status, out, err = run_apart(command, bad, tmp_path / "nor-here")
        assert status == 3
        assert "Traceback" not in err


@pytest.mark.parametrize("command", ["diff", "best", "timeline"])
def test_what_has_nothing_in_common_is_refused(made: Made, tmp_path: Path, command: str) -> None:
    """The same directory twice is wrong usage (2), whatever it is called; directories of two clusters have nothing to
    be compared (6)."""
    loner = made.path / "loner"
    link = tmp_path / "link"
    link.symlink_to(loner)
    assert run(command, loner, link).exit_code == 2
    other = build(tmp_path / "other", VOTERS[0], 1, [1])
    result = run(command, loner, other)
    assert result.exit_code == 6
    assert str(other) in result.stderr


@pytest.mark.parametrize("command", ["verify", "diff", "best", "timeline"])
def test_nothing_is_written(made: Made, tmp_path: Path, command: str) -> None:
    """Files, their contents and their times are the same afterwards; a copy without LMDB's table of readers stays
    without."""
    paths = copied(made, tmp_path, "loner", "first")
    for path in paths:
        (path / f"{records.DATA_FILE}-lock").unlink()

    def state() -> dict[str, tuple[int, bytes]]:
        files = (file for path in paths for file in sorted(path.iterdir()))
        return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}

    before = state()
    assert run(command, *(paths[:1] if command == "verify" else paths)).exit_code == 0
    assert state() == before


def test_the_output_may_end_early(made: Made) -> None:
    """`| head`: whoever reads no more ends the listing quietly."""
    words = (
        f"{sys.executable} -m raftnode.inspector best {made.path / 'loner'} {made.path / 'first'} --json | head -n 1"
    )
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", words], env=command_environment(), capture_output=True, check=True
    )
    assert (len(done.stdout.splitlines()), done.stderr) == (1, b"")
