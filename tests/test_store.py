"""The store: what is on disk after opening, closing, killing, failing and damaging it (store docstring, TRAPS,
LMDB)."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import pytest
import store_worker
from msgspec import Raw
from store_worker import ADDRESS, MEMBERS, state_of

from raftnode import records
from raftnode.config import GIB, KIB, MIB, Settings
from raftnode.consensus.ballot import Ballot
from raftnode.errors import (
    ConfigError,
    ProtocolError,
    StoreClosed,
    StoreDamaged,
    StoreError,
    StoreFailed,
    StoreForeign,
    StoreInUse,
    StoreTooNew,
)
from raftnode.messages import (
    GENESIS,
    DeleteCommand,
    Entry,
    EntryId,
    MembersCommand,
    Noop,
    PutCommand,
    encode_command,
    store_key,
)
from raftnode.store import Store

WORKER = str(Path(store_worker.__file__).resolve())
ROOT = Path(WORKER).parents[1]
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace, which injects the fault, is missing")

# --- helpers --------------------------------------------------------------------------------------------------


@pytest.fixture
def opened() -> Iterator[Callable[..., Store]]:
    """Opens stores, and closes at the end of the test those that are still open."""
    stores: list[Store] = []

    def open_store(directory: Path, **settings: int) -> Store:
        stores.append(Store("database", directory, settings=Settings(**settings)))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def put_command(key: str, value: str) -> Raw:
    return encode_command(PutCommand(namespace="default", key=key, value=Raw(json.dumps(value).encode())))


def stage(store: Store, *commands: Raw, term: int = 1) -> list[Entry]:
    """Append and write, as a leader of `term`."""
    entries = [store.journal.append(term, 1_700_000_000_000 + n, command) for n, command in enumerate(commands)]
    store.write(store.ballot if store.ballot.term == term else store.ballot.in_term(term).vote(ADDRESS))
    return entries


def commit(store: Store, upto: int) -> None:
    """Apply and write."""
    while store.commit_id < upto:
        store.apply(store.journal.entries(store.commit_id + 1, upto, GIB))
    store.write()


def a_store_with(directory: Path, committed: int, staged: int) -> None:
    """A closed store: `committed` puts of key-N = value-N and then `staged` more."""
    store = Store("database", directory)
    store.found(ADDRESS, MEMBERS)
    stage(store, *(put_command(f"key-{n}", f"value-{n}") for n in range(1, committed + staged + 1)))
    if committed:
        commit(store, committed)
    store.close()


@contextmanager
def raw(directory: Path, readonly: bool = False) -> Iterator[lmdb.Environment]:
    """The file of a closed store, without any of our code over it."""
    env = lmdb.open(
        str(directory / "raftnode.mdb"), subdir=False, map_size=64 * GIB, max_dbs=16, readonly=readonly, create=False
    )
    try:
        yield env
    finally:
        env.close()


def change(directory: Path, database: bytes, key: bytes, change_to: Callable[[bytes], bytes | None]) -> None:
    """Replace one stored record, or delete it, behind the store's back; the pages of LMDB stay in order."""
    with raw(directory) as env:
        db = env.open_db(database, create=False)
        with env.begin(write=True) as txn:
            before = txn.get(key, db=db)
            assert before is not None, f"there is no {key!r} to change"
            after = change_to(bytes(before))
            if after is None:
                txn.delete(key, db=db)
            else:
                assert after != before
                txn.put(key, after, db=db)


def flip(offset: int, bit: int = 0) -> Callable[[bytes], bytes]:
    """Change one bit of a record."""

    def flipped(record: bytes) -> bytes:
        record_bytes = bytearray(record)
        record_bytes[offset] ^= 1 << bit
        return bytes(record_bytes)

    return flipped


def position(commit_id: int) -> bytes:
    return struct.pack(">Q", commit_id)


class OnDisk:
    """The directory read with nothing but LMDB, struct, zlib and json: a second opinion on the format (store
    docstring)."""

    def __init__(self, directory: Path) -> None:
        with raw(directory, readonly=True) as env, env.begin() as txn:
            tables = {
                name: [(bytes(k), bytes(v)) for k, v in txn.cursor(env.open_db(name, txn=txn, create=False))]
                for name in (b"log", b"committed", b"meta")
            }
        self.meta: dict[str, Any] = {}
        for key, record in tables[b"meta"]:
            assert struct.unpack(">I", record[:4])[0] == zlib.crc32(key + record[4:])
            self.meta[key.decode()] = json.loads(record[4:])
        self.log: list[tuple[int, bytes]] = []
        """(term, command) of commit_id `first`, `first` + 1, ..."""
        base = self.meta.get("base", {"id": {"term": 0, "commit_id": 0}, "checksum": 0})
        self.first = base["id"]["commit_id"] + 1
        checksum, self.term = base["checksum"], base["id"]["term"]
        for expected, (key, record) in enumerate(tables[b"log"], start=self.first):
            (commit_id,) = struct.unpack(">Q", key)
            assert commit_id == expected, f"a hole: {commit_id} where {expected} belongs"
            version, term, when, stored = struct.unpack(">BQQI", record[:21])
            checksum = zlib.crc32(struct.pack(">QQQ", term, commit_id, when) + record[21:], checksum)
            assert (version, stored) == (1, checksum), f"entry {commit_id} does not continue the history"
            self.log.append((term, record[21:]))
            self.term = term
        self.checksum = checksum
        self.values: dict[tuple[str, str], tuple[int, int, int, str]] = {}
        """(namespace, key) -> (created, modified, version, the value as its JSON text)"""
        for key, record in tables[b"committed"]:
            crc, created, modified, version, lease = struct.unpack(">IQQQQ", record[:36])
            assert crc == zlib.crc32(key + record[4:])
            assert lease == 0
            namespace, name = key.decode().split("\0", 1)
            self.values[namespace, name] = (created, modified, version, record[36:].decode())

    @property
    def commit_id(self) -> int:
        return int(self.meta.get("commit_id", 0))

    def expected(self) -> dict[tuple[str, str], tuple[int, int, int, str]]:
        """The values that the whole log makes: as of commit_id, but for the keys that the disk is behind with."""
        behind = self.meta.get("behind") or {"after": self.commit_id, "key": ""}
        place, _, name = behind["key"].partition("\0")
        before, now = replay(self.log[: behind["after"]]), replay(self.log[: self.commit_id])
        kept = {where: value for where, value in before.items() if where >= (place, name)}
        return {where: value for where, value in now.items() if where < (place, name)} | kept

    def state(self) -> str:
        ballot = self.meta.get("ballot", {"term": 0, "voted_for": None})
        last = self.first - 1 + len(self.log)
        return f"{ballot['term']}/{ballot['voted_for']}/{self.commit_id}/{self.term}/{last}/{self.checksum:08x}"


def replay(log: list[tuple[int, bytes]]) -> dict[tuple[str, str], tuple[int, int, int, str]]:
    """What the entries make of empty namespaces, written down a second time and as plainly as can be."""
    values: dict[tuple[str, str], tuple[int, int, int, str]] = {}
    for commit_id, (_, text) in enumerate(log, start=1):
        command = json.loads(text)
        if command["kind"] == "put":
            where = command["namespace"], command["key"]
            created, _, version, _ = values.get(where, (commit_id, 0, 0, ""))
            value = re.search(rb'"value":(.*?)(,"client":"[^"]*")?}$', text, re.S)
            assert value is not None
            values[where] = (created, commit_id, version + 1, value[1].decode())
        elif command["kind"] == "delete":
            values.pop((command["namespace"], command["key"]), None)
    return values


def start(program: str, directory: Path, argument: object = "", under: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    """A program of store_worker, in a process of its own."""
    return subprocess.Popen(
        [*under, sys.executable, WORKER, program, str(directory), str(argument)],
        bufsize=0,  # `communicate` would not see what `readline` has read ahead
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def end(process: subprocess.Popen[bytes]) -> list[str]:
    """The lines that it has said and not been heard yet; waits for its end."""
    out, complaints = process.communicate(timeout=30)
    assert b"Traceback" not in complaints, complaints.decode()
    return out.decode().splitlines()


def kill(process: subprocess.Popen[bytes]) -> list[str]:
    process.send_signal(signal.SIGKILL)
    return end(process)


def hear(process: subprocess.Popen[bytes]) -> str:
    """The next line; waits for it."""
    assert process.stdout is not None
    line = process.stdout.readline().decode()
    if not line:
        pytest.fail(f"it ended: {end(process)}")
    return line.strip()


def inject(fault: str, trace: Path) -> tuple[str, ...]:
    """strace with one fault: `syscall:what:when=N`, where N counts calls of that name."""
    syscall = fault.partition(":")[0]
    quick = ("--seccomp-bpf",) if "signal=" not in fault else ()  # with it, strace 6.1 loses the signal
    return ("strace", "-f", *quick, "-o", str(trace), "-e", f"trace={syscall}", "-e", f"inject={fault}")


# --- creation and reopening -----------------------------------------------------------------------------------


def test_a_new_directory_gets_an_id_and_keeps_everything(tmp_path: Path, opened: Callable[..., Store]) -> None:
    """What a node must not forget is there after a restart: its id, its cluster, the ballot, commit_id, values,
    memberships, and staged entries still staged (store docstring, "Restart")."""
    directory = tmp_path / "deep" / "node"
    store = opened(directory)
    assert re.fullmatch("[0-9a-f]{16}", store.node_id)
    assert (store.cluster_id, store.address, store.commit_id, store.ballot) == (None, None, 0, Ballot())
    assert store.journal.last.id == GENESIS
    store.found(ADDRESS, MEMBERS)
    learner = MembersCommand(voters=dict.fromkeys(MEMBERS, ""), learners={"127.0.0.1:5004": "abc"})
    stage(store, put_command("a", "one"), encode_command(Noop()), put_command("a", "two"), term=3)
    stage(store, encode_command(learner), term=3)
    commit(store, 2)
    store.bind("127.0.0.1:5002", "node-two")
    store.write(Ballot(4, "127.0.0.1:5002"))
    facts = ("node_id", "cluster_id", "address", "ballot", "commit_id")
    before = {name: getattr(store, name) for name in facts}
    journal = store.journal
    store.close()

    again = opened(directory)

    assert {name: getattr(again, name) for name in facts} == before
    assert before["ballot"] == Ballot(4, "127.0.0.1:5002")
    assert (again.journal.base, again.journal.last) == (journal.base, journal.last)
    assert again.journal.memberships == journal.memberships
    assert again.journal.membership.learners == {"127.0.0.1:5004": "abc"}
    assert again.journal.memberships[0].voters["127.0.0.1:5002"] == "node-two"
    assert again.journal.memberships[0].voters[ADDRESS] == again.node_id
    assert again.journal.written == 4
    assert not again.journal.has_unwritten
    assert not again.has_effects
    assert again.get({"key": "a"}) == {
        "key": "a", "namespace": "default", "value": "one", "created": 1, "modified": 1, "version": 1,
    }  # fmt: skip
    commit(again, 4)
    assert again.get({"key": "a"})["value"] == "two"


def test_effects_may_stay_behind(tmp_path: Path, opened: Callable[..., Store]) -> None:
    """A transaction without effects has the entries, and neither values nor commit_id of what was applied since the
    last one that had: a restart carries those entries out again, with the same outcomes. Reads see them all the while.
    The log is not shortened past what is applied on disk."""
    store = opened(tmp_path, log_entries=3)
    store.found(ADDRESS, MEMBERS)
    stage(store, *(put_command(f"key-{n % 2}", f"{n}") for n in range(1, 5)))
    commit(store, 4)
    first = store.journal.first
    stage(store, *(put_command(f"key-{n % 2}", f"{n}") for n in range(5, 21)))
    outcomes = store.apply(store.journal.entries(5, 20, GIB))
    store.write(keys=0)
    assert store.has_effects
    assert store.journal.first == first
    assert store.get({"key": "key-0"})["value"] == "20"
    store.close()

    again = opened(tmp_path, log_entries=3)
    assert (again.commit_id, again.journal.last.id.commit_id, again.journal.first) == (4, 20, first)
    assert again.get({"key": "key-0"})["value"] == "4"
    assert again.apply(again.journal.entries(5, 20, GIB)) == outcomes
    again.write()
    assert not again.has_effects
    assert again.journal.first == 18
    again.close()
    after = opened(tmp_path, log_entries=3)
    assert (after.commit_id, after.get({"key": "key-0"})["version"]) == (20, 10)


@pytest.mark.parametrize("written", range(8))
def test_a_flush_goes_on_after_a_restart(tmp_path: Path, opened: Callable[..., Store], written: int) -> None:
    """Seven values leave for the disk one by one, in the order of their keys; meanwhile all seven change again. The
    node ends after some of them: what is on disk is as of two commit_ids, and the log, which is not shortened past the
    first of them, has the rest. A restart finds every value, with its version, as if all had been written at once, and
    goes on; reads see the newest all the while."""
    store = opened(tmp_path, log_entries=1)
    store.found(ADDRESS, MEMBERS)
    stage(store, *(put_command(f"key-{n}", value) for value in ("first", "second", "third") for n in range(7)))
    commit(store, 7)
    store.apply(store.journal.entries(8, 14, GIB))
    for number in range(written):
        store.write(keys=1)
        if not number:
            store.apply(store.journal.entries(15, 21, GIB))
        assert {store.get({"key": f"key-{n}"})["value"] for n in range(7)} == {"third"}
        assert store.journal.base.id.commit_id == (13 if store.behind is None else 7)
    assert (store.behind is not None) == (0 < written < 7)
    store.close()

    disk = OnDisk(tmp_path)
    assert disk.commit_id == (14 if written else 7)
    assert [disk.values["default", f"key-{n}"][2] for n in range(7)] == [2] * written + [1] * (7 - written)
    again = opened(tmp_path, log_entries=1)
    value, version = ("second", 2) if written else ("first", 1)
    for n in range(7):
        found = again.get({"key": f"key-{n}"})
        assert (found["value"], found["version"]) == (value, version)
    while again.behind is not None:
        again.write(keys=2)
    assert (again.commit_id, again.commit_id_on_disk) == (disk.commit_id, disk.commit_id)
    assert {again.get({"key": f"key-{n}"})["version"] for n in range(7)} == {version}
    again.apply(again.journal.entries(again.commit_id + 1, 21, GIB))
    again.write()
    assert again.journal.first == 21
    again.close()
    assert [value[2] for value in OnDisk(tmp_path).values.values()] == [3] * 7


def test_what_is_found_is_the_newest_before_and_after_a_transaction(
    opened: Callable[..., Store], tmp_path: Path
) -> None:
    """All that is looked up between two transactions shares one view of the disk, and what was found there is kept in
    memory. What is applied lies over it; a transaction, which takes that away, ends the view, and what has changed is
    looked up anew."""
    store = opened(tmp_path)
    store.found(ADDRESS, MEMBERS)
    key = store_key("default", "k")
    assert store.find(key) is None
    for number in range(1, 4):
        stage(store, put_command("k", str(number)))
        store.apply(store.journal.entries(number, number, GIB))
        found = store.find(key)
        assert found is not None
        assert (found.version, bytes(found.value)) == (number, json.dumps(str(number)).encode())
        store.write()
        assert not store.namespaces.changes
        assert [store.find(key) for _ in range(3)] == [found] * 3
        assert len(store._cache) == 1


def test_what_was_not_written_is_not_there(tmp_path: Path, opened: Callable[..., Store]) -> None:
    """Only `write` makes a thing durable: entries and effects that are in memory alone are gone after a close, and
    nobody was told of them (TRAPS 2)."""
    store = opened(tmp_path)
    store.found(ADDRESS, MEMBERS)
    stage(store, put_command("a", "one"))
    store.apply(store.journal.entries(1, 1, 0))
    store.journal.append(1, 0, put_command("a", "two"))
    assert store.has_effects
    assert store.get({"key": "a"})["value"] == "one"
    store.close()
    again = opened(tmp_path)
    assert (again.commit_id, again.journal.last.id) == (0, EntryId(1, 1))
    assert again.get({"key": "a"})["value"] is None


def test_an_unknown_type_of_store_is_refused() -> None:
    """A wrong word is an error that names the right ones (published interface)."""
    with pytest.raises(ConfigError, match="memory and database"):
        Store("databse")


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    """Use after close is StoreClosed, not an error of LMDB or a crash; a second close does nothing."""
    store = Store("database", tmp_path)
    store.found(ADDRESS, MEMBERS)
    stage(store, put_command("a", "one"))
    commit(store, 1)
    key = store_key("default", "a")
    assert store.find(key) == store.find(key)  # and it is in memory now
    assert len(store._cache) == 1
    store.close()
    store.close()
    uses = (store.write, store.sizes, store.clear_dead_readers, lambda: store.get({"key": "a"}))
    for use in (*uses, lambda: store.find(key)):
        with pytest.raises(StoreClosed):
            use()


def test_a_memory_store_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory store is the same code over a throw-away directory: it works, two do not meet, and nothing is left
    of them, nor of one that could not be opened (published interface)."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, second = Store(), Store("memory", tmp_path / "ignored")
    for store, value in ((first, "one"), (second, "two")):
        store.found(ADDRESS, MEMBERS)
        stage(store, put_command("a", value))
        commit(store, 1)
    assert [store.get({"key": "a"})["value"] for store in (first, second)] == ["one", "two"]
    assert first.node_id != second.node_id
    assert len(list(tmp_path.iterdir())) == 2
    first.close()
    second.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StoreError):
        Store("memory", settings=Settings(map_bytes=1))
    assert list(tmp_path.iterdir()) == []


# --- one node a directory -------------------------------------------------------------------------------------


def test_a_second_store_of_this_process_is_refused(tmp_path: Path, opened: Callable[..., Store]) -> None:
    """LMDB would let two write in turns, which ruins the log between them (TRAPS, LMDB, "second process opens"); the
    first is not disturbed, and after its close the directory is free."""
    first = opened(tmp_path)
    with pytest.raises(StoreInUse, match="in use"):
        Store("database", tmp_path)
    first.found(ADDRESS, MEMBERS)
    node = first.node_id
    first.close()
    assert opened(tmp_path).node_id == node


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path, opened: Callable[..., Store]) -> None:
    """The lock is the kernel's: it goes with its holder, however that dies, and nobody has to delete a file."""
    holder = start("hold", tmp_path)
    hear(holder)
    with pytest.raises(StoreInUse):
        Store("database", tmp_path)
    kill(holder)
    opened(tmp_path)


# --- founding -------------------------------------------------------------------------------------------------


def test_founding_fixes_membership_and_address(tmp_path: Path, opened: Callable[..., Store]) -> None:
    """The membership of the first start stays, whatever later starts are given; the directory of one node does not
    open at another address (rule 9)."""
    store = opened(tmp_path)
    store.found(ADDRESS, MEMBERS)
    assert store.journal.membership.voters == {**dict.fromkeys(MEMBERS, ""), ADDRESS: store.node_id}
    cluster = store.cluster_id
    store.close()
    again = opened(tmp_path)
    again.found(ADDRESS, [ADDRESS])
    assert again.journal.membership.addresses == tuple(MEMBERS)
    assert again.cluster_id == cluster
    with pytest.raises(StoreForeign, match=r"127\.0\.0\.1:5001.*127\.0\.0\.1:5009"):
        again.found("127.0.0.1:5009", MEMBERS)
    assert again.address == ADDRESS


def test_founding_needs_no_own_address_among_the_members(tmp_path: Path, opened: Callable[..., Store]) -> None:
    """`members` with or without the own address, in any order, make the same cluster; another set makes another, so
    that nodes started with different lists refuse each other (TRAPS 35)."""
    given = [MEMBERS, MEMBERS[1:], MEMBERS[::-1], MEMBERS[:2], [], [*MEMBERS, "127.0.0.1:5004"]]
    ids = []
    for n, members in enumerate(given):
        store = opened(tmp_path / str(n))
        store.found(ADDRESS, members)
        ids.append(store.cluster_id)
    assert ids[0] == ids[1] == ids[2]
    assert len(set(ids)) == 4


# --- directories that are not ours, or not whole --------------------------------------------------------------


def test_a_lost_data_file_is_not_a_new_node(tmp_path: Path, opened: Callable[..., Store]) -> None:
    """A node that forgot its votes must not vote under its old directory (TRAPS 34): data file gone, or emptied.
    An emptied directory is a new node with a new id."""
    a_store_with(tmp_path, 2, 1)
    file = tmp_path / "raftnode.mdb"
    node = (tmp_path / "raftnode.lock").read_text().strip()
    saved = file.read_bytes()
    for lose in (file.unlink, lambda: file.write_bytes(b"")):
        lose()
        with pytest.raises(StoreDamaged, match=node):
            Store("database", tmp_path)
    file.write_bytes(saved)
    whole = opened(tmp_path)
    assert whole.node_id == node
    whole.close()
    for left in tmp_path.iterdir():
        left.unlink()
    assert opened(tmp_path).node_id != node


def test_a_data_file_that_was_swapped_for_a_blank_one_is_not_a_new_node(tmp_path: Path) -> None:
    """The same loss in another dress: the lock file still names the node, and the data file is an LMDB environment
    with nothing in it (TRAPS 34)."""
    a_store_with(tmp_path, 2, 1)
    (tmp_path / "raftnode.mdb").unlink()
    lmdb.open(str(tmp_path / "raftnode.mdb"), subdir=False, max_dbs=16).close()
    with pytest.raises(StoreError):
        Store("database", tmp_path).close()


def test_garbage_is_not_taken_for_ours(tmp_path: Path) -> None:
    """A file that is no LMDB environment is refused and left as it is."""
    file = tmp_path / "raftnode.mdb"
    file.write_bytes(b"this is no database" * 1000)
    for _ in range(2):
        with pytest.raises(StoreForeign, match="not a file of ours"):
            Store("database", tmp_path)
    assert file.read_bytes() == b"this is no database" * 1000


@pytest.mark.parametrize("named", [True, False])
def test_an_lmdb_file_of_another_program_is_refused(tmp_path: Path, named: bool) -> None:
    """Nothing is written to somebody else's database, with or without sub-databases in it; asking again says the same
    (an environment that was left open would be refused as "already open")."""
    file = tmp_path / "raftnode.mdb"
    env = lmdb.open(str(file), subdir=False, max_dbs=4)
    db = env.open_db(b"users") if named else None
    with env.begin(write=True) as txn:
        txn.put(b"someone", b"else", db=db)
    env.close()
    before = file.read_bytes()
    seen = []
    for _ in range(2):
        with pytest.raises(StoreForeign, match="another program") as refused:
            Store("database", tmp_path)
        seen.append(refused)
    assert file.read_bytes() == before


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    """The message says what is wrong instead of an OSError."""
    (tmp_path / "data").write_text("")
    for directory in (tmp_path / "data", tmp_path / "data" / "below"):
        with pytest.raises(StoreForeign, match="is a file, not a directory"):
            Store("database", directory)
    (tmp_path / "odd" / "raftnode.mdb").mkdir(parents=True)
    with pytest.raises(StoreError):
        Store("database", tmp_path / "odd")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    """An older raftnode must not misread what a newer one wrote."""
    a_store_with(tmp_path, 1, 0)
    change(tmp_path, b"meta", b"format", lambda _: records.pack_meta(b"format", records.FORMAT + 1))
    with pytest.raises(StoreTooNew, match=f"format {records.FORMAT + 1}"):
        Store("database", tmp_path)


def test_an_older_format_is_taken_up(tmp_path: Path, opened: Callable[..., Store]) -> None:
    """A directory of format 2, which knew of no flush in parts, goes on as it is, and is of the newest format from its
    first transaction on: an older raftnode must not read it after that."""
    a_store_with(tmp_path, 3, 2)
    change(tmp_path, b"meta", b"format", lambda _: records.pack_meta(b"format", 2))
    store = opened(tmp_path)
    assert (store.commit_id, store.behind) == (3, None)
    store.write()
    store.close()
    disk = OnDisk(tmp_path)
    assert disk.meta["format"] == records.FORMAT
    assert disk.values == disk.expected()


def test_a_file_that_was_cut_off_never_kills_the_process(tmp_path: Path) -> None:
    """A page that is not there is a SIGBUS when it is read, which no except clause sees. However many pages are
    missing at the end, opening and reading everything in a process of its own either works or is refused with words
    (TRAPS, LMDB: LMDB checks nothing)."""
    store = Store("database", tmp_path / "whole")
    store.found(ADDRESS, MEMBERS)
    for n in range(60):
        stage(store, *(put_command(f"key-{k}", f"{n}" * 400) for k in range(3)))
        commit(store, store.journal.last.id.commit_id)
    store.close()
    file = tmp_path / "whole" / "raftnode.mdb"
    size = file.stat().st_size
    cuts = [1, 2, 3, 5, 8, 16, 17, 18, 40]
    running = []
    for pages in cuts:
        directory = tmp_path / f"without {pages}"
        shutil.copytree(tmp_path / "whole", directory)
        os.truncate(directory / "raftnode.mdb", size - pages * 4096 + (100 if pages % 2 else 0))
        running.append(start("check", directory))
    whole = end(start("check", tmp_path / "whole"))
    assert whole[0].startswith("fine")
    ends = {pages: (end(process), process.returncode) for pages, process in zip(cuts, running, strict=True)}
    bad = {
        pages: (said, code)
        for pages, (said, code) in ends.items()
        if code != 0 or not (said == whole or said[0].startswith("refused StoreDamaged"))
    }
    assert not bad, f"missing pages -> what was said, exit code: {bad}"


@pytest.mark.parametrize("committed", [0, 1, 5])
def test_a_flipped_bit_in_the_newest_entries_is_found_at_the_start(tmp_path: Path, committed: int) -> None:
    """The tail, from the newest committed entry through all staged ones, is what votes and acknowledgements rest on:
    a node with a damaged one does not start, and names it (TRAPS 37: never a shorter log)."""
    a_store_with(tmp_path / "whole", committed, 3)
    chance = random.Random(f"tail {committed}")
    for commit_id in range(max(1, committed), committed + 4):
        directory = tmp_path / str(commit_id)
        shutil.copytree(tmp_path / "whole", directory)
        offset, bit = chance.randrange(70), chance.randrange(8)
        change(directory, b"log", position(commit_id), flip(offset, bit))
        with pytest.raises(StoreDamaged, match=f"log entry {commit_id} ") as damage:
            Store("database", directory)
        assert damage.value.commit_id == commit_id, f"byte {offset}, bit {bit}"


def test_a_flipped_bit_in_an_older_entry_is_found_when_it_is_read(tmp_path: Path, opened: Callable[..., Store]) -> None:
    """The middle of the log is not read at the start. Wherever the bit is (format, term, time, checksum, command),
    reading the entries names the damaged one, and the entries before it are still given."""
    a_store_with(tmp_path / "whole", 9, 1)
    for offset in (0, 1, 8, 9, 16, 17, 20, 21, 45, -1):
        directory = tmp_path / f"byte {offset}"
        shutil.copytree(tmp_path / "whole", directory)
        change(directory, b"log", position(4), flip(offset, 1))
        store = opened(directory)
        assert [entry.commit_id for entry in store.read_entries(1, 3, GIB)] == [1, 2, 3]
        with pytest.raises(StoreDamaged, match="entry 4") as damage:
            store.read_entries(1, 9, GIB)
        assert damage.value.commit_id == 4
        with pytest.raises(StoreDamaged) as damage:
            store.read_entries(5, 9, GIB) if 17 <= offset <= 20 else store.read_entries(4, 4, 0)
        assert damage.value.commit_id in (4, 5), "a bad checksum in the record shows at the entry or at the next"


def test_the_id_of_a_damaged_entry_is_not_taken_for_good(tmp_path: Path, opened: Callable[..., Store]) -> None:
    """`read_id` feeds the consistency check of AppendEntries and the conflict rule: with a flipped term, a follower
    would see a conflict in a committed entry, and a leader would offer a history that nobody has. Nothing is used
    without its check (`records`, TRAPS, LMDB)."""
    a_store_with(tmp_path, 9, 1)
    change(tmp_path, b"log", position(4), flip(8, 2))
    store = opened(tmp_path)
    assert store.read_id(3) == EntryId(1, 3)
    with pytest.raises(StoreDamaged) as damage:
        store.read_id(4)
    assert damage.value.commit_id == 4


def test_a_flipped_bit_in_a_value_is_found_when_it_is_read(tmp_path: Path, opened: Callable[..., Store]) -> None:
    """A damaged value is an error that names its key, never an answer and never "no such key"; other keys are served
    (store docstring: 280 of 300 flipped bits read back as wrong values)."""
    a_store_with(tmp_path / "whole", 3, 0)
    chance = random.Random("value")
    for _ in range(6):
        directory = tmp_path / str(chance.random())
        shutil.copytree(tmp_path / "whole", directory)
        change(directory, b"committed", b"default\0key-2", flip(chance.randrange(45), chance.randrange(8)))
        store = opened(directory)
        with pytest.raises(StoreDamaged, match=r"'key-2' in namespace 'default'"):
            store.get({"key": "key-2"})
        assert store.get({"key": "key-3"})["value"] == "value-3"
        stage(store, put_command("key-2", "new"))
        with pytest.raises(StoreDamaged):  # its version can't be told from what is there
            store.apply(store.journal.entries(4, 4, 0))
        store.close()


@pytest.mark.parametrize("name", ["format", "node", "cluster", "address", "ballot", "commit_id", "memberships"])
def test_a_flipped_bit_in_the_facts_of_the_node_is_found_at_the_start(tmp_path: Path, name: str) -> None:
    """A wrong ballot votes twice, a wrong commit_id loses writes: every fact is checked when the node starts."""
    a_store_with(tmp_path / "whole", 3, 1)
    with raw(tmp_path / "whole", readonly=True) as env, env.begin() as txn:
        length = len(txn.get(name.encode(), db=env.open_db(b"meta", txn=txn, create=False)))
    chance = random.Random(name)
    for offset in (0, 3, 4, length - 1, chance.randrange(length)):
        directory = tmp_path / f"byte {offset}"
        shutil.copytree(tmp_path / "whole", directory, dirs_exist_ok=True)
        change(directory, b"meta", name.encode(), flip(offset, chance.randrange(8)))
        with pytest.raises(StoreDamaged, match=f"{name!r} of the node"):
            Store("database", directory)


@pytest.mark.parametrize("name", ["format", "node"])
def test_a_lost_fact_of_the_node_is_found_at_the_start(tmp_path: Path, name: str) -> None:
    """A directory with data in it is never taken for a new one."""
    a_store_with(tmp_path, 3, 1)
    change(tmp_path, b"meta", name.encode(), lambda _: None)
    with pytest.raises(StoreDamaged):
        Store("database", tmp_path)


@pytest.mark.parametrize(("missing", "newest"), [(1, 5), (2, 5), (4, 5), (3, 3)])
def test_a_hole_in_the_log_is_found_at_the_start(tmp_path: Path, missing: int, newest: int) -> None:
    """Positions have no holes (TRAPS 40): one lost entry, old or staged, or the newest committed one, and the node
    does not start as if its log were shorter (TRAPS 37)."""
    a_store_with(tmp_path, 3, newest - 3)
    change(tmp_path, b"log", position(missing), lambda _: None)
    with pytest.raises(StoreDamaged, match=r"has a hole|ends at 2, but 3 was committed"):
        Store("database", tmp_path)


def test_a_ballot_behind_the_log_is_found_at_the_start(tmp_path: Path) -> None:
    """Term and entries go in one transaction, so a ballot below the newest entry's term was rolled back by somebody:
    this node would vote again in a term in which it has voted (TRAPS 1)."""
    store = Store("database", tmp_path)
    store.found(ADDRESS, MEMBERS)
    stage(store, put_command("a", "one"), term=5)
    store.close()
    change(tmp_path, b"meta", b"ballot", lambda _: records.pack_meta(b"ballot", Ballot(4, None)))
    with pytest.raises(StoreDamaged, match="term 5, but the ballot only 4") as damage:
        Store("database", tmp_path)
    assert damage.value.commit_id == 1


def test_a_commit_id_behind_its_effects_is_found_or_harmless(tmp_path: Path) -> None:
    """Records swapped for valid ones of another time: a whole record of another key does not pass for this one's, as
    the key is in the checksum."""
    a_store_with(tmp_path, 3, 0)
    stolen = {}
    with raw(tmp_path, readonly=True) as env, env.begin() as txn:
        stolen["value"] = bytes(txn.get(b"default\0key-1", db=env.open_db(b"committed", txn=txn, create=False)))
        stolen["log"] = bytes(txn.get(position(2), db=env.open_db(b"log", txn=txn, create=False)))
    change(tmp_path, b"committed", b"default\0key-2", lambda _: stolen["value"])
    change(tmp_path, b"log", position(3), lambda _: stolen["log"])
    with pytest.raises(StoreDamaged, match="log entry 3"):
        Store("database", tmp_path)


def damaged_copies(whole: Path, where: list[tuple[int, int]]) -> dict[tuple[int, int], tuple[int, list[str]]]:
    """For each (byte, bit) of the file: exit code and words of a process that opens and reads a copy with that bit
    flipped."""
    image = (whole / "raftnode.mdb").read_bytes()
    ends = {}
    for first in range(0, len(where), 6):
        running = []
        for byte, bit in where[first : first + 6]:
            directory = whole.parent / f"{byte}-{bit}"
            directory.mkdir()
            damaged = bytearray(image)
            damaged[byte] ^= 1 << bit
            (directory / "raftnode.mdb").write_bytes(damaged)
            running.append((byte, bit, start("check", directory)))
        for byte, bit, process in running:
            words = end(process)
            ends[byte, bit] = (process.returncode, words)
    return ends


def test_a_bit_flipped_in_a_record_of_the_file_is_refused(tmp_path: Path) -> None:
    """The same damage where it really happens, in the bytes of the file: wherever the newest copies of a value, of a
    log entry or of the ballot are hit, the node says StoreDamaged (store docstring)."""
    whole = tmp_path / "whole"
    a_store_with(whole, 9, 2)
    image = (whole / "raftnode.mdb").read_bytes()
    chance = random.Random("records")
    where = []
    for text in (b'"value-3"', b'"key":"key-5"', b'"key":"key-11"', b'"voted_for":"127.0.0.1:5001"'):
        places = [found.start() for found in re.finditer(re.escape(text), image)]
        assert places
        # old pages keep copies that nobody reads any more: hit all, and ask that the living one is noticed
        where.append([(place + chance.randrange(len(text)), chance.randrange(8)) for place in places])
    for places in where:
        ends = damaged_copies(whole, places)
        assert any(words[0].startswith("refused StoreDamaged") for _, words in ends.values()), ends
        said = {words[0].partition(" ")[0] for _, words in ends.values()}
        assert said <= {"fine", "refused"}, ends


def test_damage_to_the_pages_of_lmdb_is_an_error_of_ours(tmp_path: Path) -> None:
    """LMDB's own pages have no checksum; what it notices of a damaged one it says in errors of its own, which nobody
    above the store knows. They become a StoreError, so that the node stops with words. (What it does not notice we
    can't: a damaged pointer may hide a key, or even end the process; see `records`. So this looks only at the errors.)
    Sixty bits chosen by a seed, in page headers and the pointers behind them."""
    whole = tmp_path / "whole"
    a_store_with(whole, 40, 4)
    pages = (whole / "raftnode.mdb").stat().st_size // 4096
    chance = random.Random("structure")
    where = [(chance.randrange(pages) * 4096 + chance.randrange(10, 60), chance.randrange(8)) for _ in range(60)]
    ends = damaged_copies(whole, where)
    leaked = {place: words for place, (_, words) in ends.items() if words and words[0].startswith("leaked")}
    assert not leaked, leaked
    assert sum(words[:1] != [] and words[0].startswith("refused") for _, words in ends.values()) > 5


# --- crashes --------------------------------------------------------------------------------------------------


def check_recovered(directory: Path, allowed: list[str]) -> None:
    """After a crash: the disk holds exactly the state before or after the transaction that was under way; the log has
    no holes and continues its checksums; and the namespaces are what the log makes of them up to commit_id."""
    store = Store("database", directory)
    recovered = state_of(store)
    store.close()
    disk = OnDisk(directory)
    assert recovered == disk.state()
    assert recovered in allowed
    assert disk.values == disk.expected()


@pytest.mark.parametrize("seed", [20261])
def test_kill_9_at_random_moments_loses_nothing_that_was_acknowledged(tmp_path: Path, seed: int) -> None:
    """A writer prints `ack` with its state after each write returned, and is killed at a moment drawn from a seed, ten
    times on the same directory, on a real file system (TRAPS, etcd). What was acknowledged is there; what was under way
    is there entirely or not at all: ballot, cut, entries, effects and commit_id go together (TRAPS 25)."""
    chance = random.Random(seed)
    caught_in_the_middle = 0
    for round_number in range(10):
        writer = start("write", tmp_path, f"{seed}-{round_number}")
        said = [hear(writer)]
        acks = chance.randrange(25)
        while acks:
            said.append(hear(writer))
            acks -= said[-1].startswith("ack")
        time.sleep(chance.uniform(0, 0.003))  # the moment of death: somewhere within the next few transactions
        said += kill(writer)
        assert writer.returncode == -signal.SIGKILL
        words = [line.split() for line in said]
        allowed = [next(state for word, state in reversed(words) if word != "try")]
        if words[-1][0] == "try":
            allowed.append(words[-1][1])
            caught_in_the_middle += 1
        check_recovered(tmp_path, allowed)
    assert OnDisk(tmp_path).commit_id > 20, "the rounds have to get somewhere to prove anything"
    assert caught_in_the_middle > 0


@needs_strace
def test_a_node_killed_while_it_is_made_starts_by_itself(tmp_path: Path) -> None:
    """SIGKILL keeps what the kernel has, so the states that a kill can leave are the ones between two writes. The
    making of a node and its founding is cut off before each write to the data file and each change of a file's length
    in turn; the next start always succeeds, with the same id once an id was told (README, promise 3)."""
    faults = [f"pwrite64:signal=KILL:when={n}" for n in range(1, 10)]
    faults += [f"ftruncate:signal=KILL:when={n}" for n in (1, 2)]
    killed, bad = 0, {}
    for pair in zip(faults[::2], [*faults[1::2], None], strict=True):
        running = []
        for fault in filter(None, pair):
            directory = tmp_path / fault
            running.append((fault, directory, start("found", directory, under=inject(fault, tmp_path / "trace"))))
        for fault, directory, process in running:
            said = end(process)
            killed += process.returncode != 0
            try:
                store = Store("database", directory)
            except StoreError as error:
                bad[fault] = f"{type(error).__name__}: {error}"
                continue
            if said and said[0] != f"open {store.node_id}":
                bad[fault] = f"{said} became {store.node_id}"
            store.found(ADDRESS, [ADDRESS])
            store.close()
    assert not bad, bad
    assert killed >= 5, "too few of the faults hit anything"


# --- errors of the disk ---------------------------------------------------------------------------------------

WRITES_FIVE_TIMES = """
import os, sys
from raftnode.consensus.ballot import Ballot
from raftnode.store import Store
store = Store("database", sys.argv[1])
store.found("127.0.0.1:1", [])
for term in range(1, 6):
    os.write(1, b"begin")
    store.write(Ballot(term))
    os.write(1, b"end")
"""


@needs_strace
def test_every_write_syncs_its_pages_and_then_its_meta_page(tmp_path: Path) -> None:
    """Each transaction syncs its pages, and then writes the meta page that makes them count through a descriptor that
    was opened with O_DSYNC. Without the first a power cut takes all away since the kernel last wrote by itself, without
    the second the last commit (TRAPS, LMDB: power cut). Seen in the system calls."""
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-o", str(trace), "-e", "trace=openat,pwrite64,fdatasync,write"]
    program = [sys.executable, "-c", WRITES_FIVE_TIMES, str(tmp_path / "node")]
    subprocess.run([*command, *program], check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    calls = trace.read_text()
    meta = re.search(r"openat\(.*raftnode\.mdb\", .*O_DSYNC.*\) = (\d+)", calls)
    assert meta is not None, calls
    writes = re.findall(r"write\(1, \"begin\"(.*?)write\(1, \"end\"", calls, re.DOTALL)
    assert len(writes) == 5
    for done in writes:
        assert re.search(rf"fdatasync\(\d+\) += 0\n.*pwrite64\({meta[1]}, ", done, re.DOTALL), done


@needs_strace
@pytest.mark.parametrize(
    "fault",
    [
        "fdatasync:error=EIO:when=3",
        "fdatasync:error=EIO:when=6",
        "fdatasync:error=ENOSPC:when=4",
        "pwrite64:error=EIO:when=2",
        "pwrite64:error=EIO:when=3",
        "pwrite64:error=ENOSPC:when=4",
        "pwrite64:error=ENOSPC:when=7",
    ],
)
def test_a_write_that_fails_is_final(tmp_path: Path, fault: str) -> None:
    """One sync, or one write of data or meta pages, fails. LMDB itself goes on as if nothing had happened (TRAPS, LMDB:
    "env stays usable"), but the store must not: the write raises StoreFailed, nothing after it is acknowledged, every
    later use raises StoreFailed too, also reads, and close works. A new start finds the state before."""
    a_store_with(tmp_path / "node", 2, 1)
    process = start("fail", tmp_path / "node", fault, under=inject(fault, tmp_path / "trace"))
    said = end(process)
    assert "INJECTED" in (tmp_path / "trace").read_text()
    words = [line.split() for line in said]
    kinds = [word[0] for word in words]
    assert "failed StoreFailed said what to do" in said
    at = kinds.index("failed")
    assert kinds[at - 1] == "try"
    assert "ack" not in kinds[at:]
    assert [word[2] for word in words if word[0] == "used"] == ["StoreFailed"] * 6, said
    assert said[-1] == "closed"
    before = next(word[1] for word in reversed(words[:at]) if word[0] in ("ack", "open"))
    check_recovered(tmp_path / "node", [before])


@needs_strace
@pytest.mark.parametrize(
    "fault",
    [
        "fdatasync:error=EIO:when=1",
        "fdatasync:error=EIO:when=2",
        "pwrite64:error=EIO:when=1",
        "pwrite64:error=ENOSPC:when=2",
        "fsync:error=EIO:when=1",
        "fsync:error=EIO:when=3",
        "ftruncate:error=ENOSPC:when=1",
    ],
)
def test_a_new_node_on_a_failing_disk_says_so(tmp_path: Path, fault: str) -> None:
    """The same while the node is made: one of our errors, not a bare error of LMDB or of the system; and when the disk
    is well again, the directory starts."""
    process = start("fail", tmp_path / "node", fault, under=inject(fault, tmp_path / "trace"))
    out, complaints = process.communicate(timeout=30)
    assert "INJECTED" in (tmp_path / "trace").read_text()
    assert b"Traceback" not in complaints, complaints.decode()[-400:]
    assert re.match("failed StoreFailed", out.decode())
    Store("database", tmp_path / "node").close()


def test_an_error_inside_a_write_leaves_nothing_half_done(
    tmp_path: Path, opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong between begin and commit, LMDB or a defect of ours, nothing of the transaction is on disk,
    and the store takes nothing more: its memory is ahead of its disk (Store: "if it raises, the store takes nothing
    more")."""
    store = opened(tmp_path)
    store.found(ADDRESS, MEMBERS)
    stage(store, put_command("a", "one"), put_command("b", "one"))
    commit(store, 1)
    before = state_of(store)
    read = store_key("default", "a")
    assert store.find(read) == store.find(read)  # and it is in memory now
    assert len(store._cache) == 1

    def defect(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(store, "_put_effects", defect)
    store.journal.append(1, 0, put_command("a", "two"))
    with pytest.raises((StoreFailed, RuntimeError)):
        store.write(Ballot(2, None))
    monkeypatch.undo()
    with pytest.raises(StoreFailed):
        store.write()
    with pytest.raises(StoreFailed):
        store.get({"key": "a"})
    with pytest.raises(StoreFailed):
        store.find(read)
    store.close()
    check_recovered(tmp_path, [before])


def test_a_full_map_is_final_and_loses_nothing(tmp_path: Path, opened: Callable[..., Store]) -> None:
    """With no room left in the map a write raises StoreFailed, the ones before it stay, and a restart continues with
    a larger map (TRAPS, LMDB, MAP_FULL)."""
    store = opened(tmp_path, map_bytes=1 * MIB)
    store.found(ADDRESS, MEMBERS)
    acknowledged = state_of(store)

    def fill() -> None:
        nonlocal acknowledged
        for n in range(1000):
            stage(store, put_command(f"key-{n}", "x" * 3000))
            commit(store, store.journal.last.id.commit_id)
            acknowledged = state_of(store)

    with pytest.raises(StoreFailed, match="MDB_MAP_FULL"):
        fill()
    assert store.syncs > 100
    with pytest.raises(StoreFailed):
        store.write()
    store.close()
    disk = OnDisk(tmp_path).state()
    check_recovered(tmp_path, [disk])
    assert disk.split("/")[2] == acknowledged.split("/")[2]
    again = opened(tmp_path, map_bytes=2 * MIB)
    stage(again, put_command("more", "y"))
    commit(again, again.journal.last.id.commit_id)
    assert again.get({"key": "more"})["value"] == "y"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_room_is_short_before_the_map_is_full(tmp_path: Path, opened: Callable[..., Store], seed: int) -> None:
    """`room` falls below the reserve while writes still work, so that a node can refuse them in time and go on with
    reads, votes and membership (store docstring). Values of any size, overwritten and deleted in random order; room is
    asked for before each write at one and the same time, as in a burst between two checks, and the writes that remain
    for the reserve still fit."""
    chance = random.Random(seed)
    reserve = 256 * KIB
    store = opened(tmp_path, map_bytes=4 * MIB, reserve_bytes=reserve)
    store.found(ADDRESS, MEMBERS)
    assert store.room(0.0) > 3 * MIB
    turns = 0
    while store.room(0.0) >= reserve:
        turns += 1
        assert turns < 2000, "room never fell"
        size = chance.choice((10, 500, 3000, 30_000))
        stage(store, put_command(f"key-{chance.randrange(12)}", "x" * chance.randrange(size)))
        if chance.random() < 0.2:
            gone = encode_command(DeleteCommand(namespace="default", key=f"key-{chance.randrange(12)}"))
            stage(store, gone)
        commit(store, store.journal.last.id.commit_id)
    sizes = store.sizes()
    assert sizes["room"] < reserve + 128 * KIB
    assert sizes["map"] == 4 * MIB
    assert sizes["used"] <= sizes["file"] <= sizes["map"]
    assert sizes["used"] > 3 * MIB
    for n in range(20):
        store.write(Ballot(2 + n, ADDRESS))
    stage(store, encode_command(Noop()), put_command("last", "x" * 10_000), term=99)
    commit(store, store.journal.last.id.commit_id)
    assert store.get({"key": "last"})["value"] == "x" * 10_000


def test_room_is_looked_up_in_time_and_not_always(
    tmp_path: Path, opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at the disk costs; it happens at the first question, after `room_check_ms`, and as soon as an eighth of
    the reserve was written since, whatever the clock says."""
    store = opened(tmp_path, room_check_ms=200, reserve_bytes=80 * KIB)
    store.found(ADDRESS, MEMBERS)
    looks = []
    sizes = store._env.sizes
    monkeypatch.setattr(store._env, "sizes", lambda: looks.append(1) or sizes())
    for now, expected in ((100.0, 1), (100.19, 1), (100.21, 2), (100.3, 2), (99.0, 3), (99.1, 3)):
        store.room(now)
        assert len(looks) == expected, f"at {now}"
    stage(store, put_command("a", "x" * 11 * KIB))
    store.room(99.1)
    assert len(looks) == 4


def test_a_directory_that_is_gone_is_a_failure_with_words(tmp_path: Path, opened: Callable[..., Store]) -> None:
    """Somebody has moved the directory of a running node: how much room there is can't be told any more."""
    store = opened(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(StoreFailed, match="put it back as it was"):
        store.room(0.0)


def test_dead_readers_are_cleared(tmp_path: Path, opened: Callable[..., Store]) -> None:
    """A reader that was killed in its transaction holds its pages for ever, and the file grows without end behind it;
    its slot is freed on request, once, and after that the file stops growing (TRAPS, LMDB, "SIGKILL of a reader")."""
    store = opened(tmp_path)
    store.found(ADDRESS, MEMBERS)

    def rewrite() -> int:
        for _ in range(8):
            store.namespaces.changes[b"default\0big"] = records.Record(1, 1, 1, 0, Raw(b'"' + b"x" * 100_000 + b'"'))
            store._on_disk.pop(b"commit_id", None)
            store.write()
        return store.sizes()["file"]

    settled = max(rewrite(), rewrite())
    reader = start("read", tmp_path, 64 * GIB)
    hear(reader)
    assert store.clear_dead_readers() == 0, "it is alive"
    kill(reader)
    grown = rewrite()
    assert grown >= settled + 500_000
    assert store.clear_dead_readers() == 1
    assert store.clear_dead_readers() == 0
    rewrite()
    assert rewrite() == rewrite()


# --- the one transaction --------------------------------------------------------------------------------------


def test_write_is_one_transaction(tmp_path: Path, opened: Callable[..., Store]) -> None:
    """Ballot, cut, new entries, effects and commit_id cost one transaction of LMDB, counted by LMDB itself, so that no
    crash can part them (TRAPS 25); with nothing to write there is none."""
    store = opened(tmp_path)

    def transactions() -> int:
        return int(store._env._env.info()["last_txnid"])

    store.found(ADDRESS, MEMBERS)
    stage(store, *(put_command("a", f"{n}") for n in range(5)))
    before = transactions()
    chance = random.Random(5)
    store.ballot = Ballot(2, ADDRESS)
    store.apply(store.journal.entries(1, 2, GIB))
    store_worker.offer(store, chance, 2)
    assert store.journal.unwritten().cut_from is not None
    assert store.has_effects
    store.write(Ballot(2, ADDRESS))
    assert transactions() == before + 1
    assert not store.has_effects
    assert not store.journal.has_unwritten
    store.write()
    store.write(store.ballot)
    assert transactions() == before + 1
    store.close()
    assert OnDisk(tmp_path).commit_id == 2
    check_recovered(tmp_path, [state_of(store)])


def test_entries_are_read_up_to_a_size_and_at_least_one(tmp_path: Path, opened: Callable[..., Store]) -> None:
    """A batch stops before it passes the limit, but one entry larger than the limit still goes (LogReader)."""
    store = opened(tmp_path)
    store.found(ADDRESS, MEMBERS)
    entries = stage(store, *(put_command("a", "x" * 100) for _ in range(10)))
    size = entries[0].size
    for limit, count in ((0, 1), (1, 1), (size, 1), (2 * size - 1, 1), (2 * size, 2), (5 * size + 1, 5), (GIB, 8)):
        assert store.read_entries(3, 10, limit) == entries[2 : 2 + count], f"limit {limit}"
    assert store.read_entries(3, 4, GIB) == entries[2:4]
    assert store.read_entries(1, 1, GIB) == entries[:1]
    assert [store.read_id(n) for n in (1, 10)] == [EntryId(1, 1), EntryId(1, 10)]
    for nowhere in (0, 11):
        with pytest.raises(StoreDamaged):
            store.read_id(nowhere)


def test_a_bad_key_is_an_error_of_the_request(tmp_path: Path, opened: Callable[..., Store]) -> None:
    """`get` checks its payload as a request from the wire is checked, and keeps the fields that it was given."""
    store = opened(tmp_path)
    for payload, code in (
        ({}, "bad_request"),
        ({"key": ""}, "bad_request"),
        ({"key": 5}, "bad_request"),
        ({"key": "a", "namespace": ""}, "bad_request"),
        ({"key": "a", "namespace": "x" * 65}, "bad_request"),
        ({"key": "\ud800"}, "bad_request"),
        ({"key": "x" * 504}, "key_too_long"),
    ):
        with pytest.raises(ProtocolError) as bad:
            store.get(payload)
        assert bad.value.code == code, payload
    answer = store.get({"key": "x" * 503, "mark": 1})
    assert (answer["mark"], answer["value"], answer["version"], answer["created"]) == (1, None, 0, None)


class Model:
    """What a store should hold: plain lists and dicts."""

    def __init__(self) -> None:
        self.log: list[tuple[int, bytes]] = []
        self.commit_id = 0
        self.ballot = Ballot()

    def copy(self) -> Model:
        other = Model()
        other.log, other.commit_id, other.ballot = list(self.log), self.commit_id, self.ballot
        return other


def agree(store: Store, model: Model) -> None:
    """The store, asked, says what the model says."""
    last = len(model.log)
    assert (store.commit_id, store.ballot) == (model.commit_id, model.ballot)
    assert store.journal.last.id == EntryId(model.log[-1][0] if last else 0, last)
    entries: list[Entry] = []
    while len(entries) < last:
        entries += store.journal.entries(len(entries) + 1, last, 2000)
    assert [(entry.term, bytes(entry.command)) for entry in entries] == model.log
    values = replay(model.log[: model.commit_id])
    for n in range(8):
        answer = store.get({"key": f"key-{n}"})
        where = "default", f"key-{n}"
        kept = store.find(store_key(*where))  # may come from memory
        assert answer["version"] == (0 if kept is None else kept.version)
        assert answer["value"] == (None if kept is None else json.loads(bytes(kept.value)))
        if where in values:
            created, modified, version, value = values[where]
            assert (answer["created"], answer["modified"], answer["version"]) == (created, modified, version)
            assert answer["value"] == json.loads(value)
        else:
            assert (answer["value"], answer["version"]) == (None, 0)


@pytest.mark.parametrize("seed", range(12))
def test_disk_equals_memory_through_any_history(tmp_path: Path, seed: int) -> None:
    """Random appends of a leader, entries of other leaders that are known already, continue or replace the staged
    suffix, commits, forgetting, writes of all effects or some, and restarts with and without a write before, against
    plain lists: after each write the disk, read without our code, is equal to memory; after a restart without one, to
    the last write."""
    chance = random.Random(seed)
    store, model, durable = Store("database", tmp_path), Model(), Model()
    store.found(ADDRESS, MEMBERS)
    done = dict.fromkeys(("append", "accept", "repeat", "apply", "forget", "write", "reopen"), 0)
    try:
        for turn in range(60):
            what = chance.choices(tuple(done), weights=(5, 3, 2, 4, 1, 4, 1))[0]
            done[what] += 1
            journal, last = store.journal, store.journal.last.id.commit_id
            if what == "append":
                for _ in range(chance.randint(1, 3)):
                    command = store_worker.random_command(chance, turn)
                    term = max(1, model.ballot.term)
                    journal.append(term, turn, command)
                    model.log.append((term, bytes(command)))
                model.ballot = store.ballot = max(model.ballot, Ballot(1, None), key=lambda b: b.term)
            elif what == "accept":
                term = model.ballot.term + 1
                store_worker.offer(store, chance, term)
                model.ballot = store.ballot = Ballot(term, chance.choice([None, *MEMBERS]))
                first = next(
                    n for n in range(1, journal.last.id.commit_id + 1) if journal.term_at(n) == term
                )  # the new leader's entries replace all from there on
                new = journal.entries(first, journal.last.id.commit_id, GIB)
                model.log[first - 1 :] = [(entry.term, bytes(entry.command)) for entry in new]
            elif what == "repeat" and last:
                known = journal.entries(chance.randint(1, last), last, GIB)[: chance.randint(1, 4)]
                before = known[0].commit_id - 1
                previous = journal.id_at(before)
                assert journal.accept(previous, known, store.commit_id) == known[-1].commit_id
            elif what == "apply" and last > store.commit_id:
                upto = chance.randint(store.commit_id + 1, last)
                store.apply([e for n in range(store.commit_id + 1, upto + 1) for e in journal.entries(n, n, 0)])
                model.commit_id = upto
            elif what == "forget":
                journal.forget(store.commit_id, 2, 500)
            elif what == "write":
                store.write(store.ballot if chance.random() < 0.5 else None, keys=chance.choice([None, 0, 1, 1, 1, 2]))
                durable = model.copy()
                durable.commit_id = store.commit_id_on_disk
            elif what == "reopen":
                if chance.random() < 0.5:
                    store.write()
                    durable = model.copy()
                store.close()
                disk = OnDisk(tmp_path)
                assert (disk.log, disk.commit_id) == (durable.log, durable.commit_id)
                assert disk.values == disk.expected()
                store, model = Store("database", tmp_path), durable.copy()
            agree(store, model)
        store.write()
        store.close()
        check_recovered(tmp_path, [state_of(store)])
        assert OnDisk(tmp_path).log == model.log
    finally:
        store.close()
