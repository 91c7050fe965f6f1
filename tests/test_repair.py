"""Repair of a stopped node's directory: directories that real nodes made, damaged in every way, and put right from real
members, or refused (repair docstring; TRAPS 37: never as if the log were shorter).

One cluster of three makes them. The *patient* is a node that was stopped; the two others run on and are asked. Three
copies of its directory are kept: `level`, all of it committed and on disk; `behind`, the same, but the node ended while
a flush was under way, and of what the second half of the log does only some keys are on disk; and `ahead`, in which the
last three entries are staged, have been put through the patient while it was alone, and are what nobody else has.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import lmdb
import pytest
from msgspec import Raw

from raftnode import records
from raftnode.config import Settings, parse_address
from raftnode.consensus.ballot import Ballot
from raftnode.errors import StoreDamaged, StoreError, StoreForeign, StoreInUse, StoreTooNew
from raftnode.messages import Entry, PutCommand, chain, encode_command
from raftnode.namespaces import Behind
from raftnode.repair import repair
from raftnode.shrink import shrink
from raftnode.store import Store
from raftnode.tail import TailFact
from raftnode.testing.processes import (
    FAST,
    PATIENCE_S,
    ClusterOfProcesses,
    NodeProcess,
    command_environment,
    free_address,
    inspect,
)

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace, which kills the repair, is missing")
MAP_BYTES: Final = 1 << 36
Damage = Callable[[lmdb.Transaction, Any, Any], object]
"""What a damage does to the log and the committed values."""


# --- the directories ------------------------------------------------------------------------------------------


class Made(NamedTuple):
    """What the tests work with."""

    cluster: ClusterOfProcesses
    patient: NodeProcess
    level: Path
    behind: Path
    ahead: Path

    @property
    def members(self) -> list[str]:
        return [node.address for node in self.cluster.others(self.patient)]


def write_history(cluster: ClusterOfProcesses) -> None:
    """Puts, overwrites and deletes in three namespaces, and values from 1 byte to some pages."""
    chance = random.Random(5)
    with cluster.client() as client:
        for n in range(120):
            key, namespace = f"key-{chance.randrange(30)}", chance.choice(["default", "web", "états"])
            if chance.random() < 0.15:
                client.delete(key, namespace)
            else:
                client.put(key, {"n": n, "text": "x" * chance.choice([0, 10, 300, 9000])}, namespace)


def put_alone(leader: NodeProcess) -> None:
    """Three puts at once to a leader without followers, which appends them before it steps down."""
    puts = [{"type": "put", "key": f"alone-{n}", "value": "z" * 50, "id": n} for n in range(3)]
    with (
        socket.create_connection(parse_address(leader.address), PATIENCE_S) as connection,
        connection.makefile("rwb") as stream,
    ):
        stream.write(b"".join(compact(put) + b"\n" for put in puts))
        stream.flush()
        answers = [json.loads(stream.readline()) for _ in puts]
    assert {answer["error"]["code"] for answer in answers} == {"not_committed"}


def carry_out_anew(path: Path, *, is_flushed: bool) -> None:
    """Make the committed values anew from the log, with a store: up to the middle of it, as one transaction; and then,
    unless all is to end there, up to its end, of which only some keys get to the disk."""

    def forget(txn: lmdb.Transaction, _: Any, committed: Any) -> None:
        txn.drop(committed, delete=False)

    damage(path, forget)
    change_facts(path, commit_id=0)
    with contextlib.closing(Store("database", path)) as store:
        last = store.journal.last.id.commit_id
        store.apply(store.journal.entries(1, last // 2, 1 << 30))
        store.write()
        if not is_flushed:
            store.apply(store.journal.entries(last // 2 + 1, last, 1 << 30))
            for _ in range(3):
                store.write(keys=5)
            assert store.behind is not None
            assert store.behind.after == last // 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    path = tmp_path_factory.mktemp("repair")
    with ClusterOfProcesses(3, path / "cluster", FAST, ["--timeout", "1"]) as cluster:
        cluster.await_leader()
        write_history(cluster)
        patient = cluster.await_leader()
        cluster.await_caught_up()
        cluster.kill(cluster.others(patient))
        put_alone(patient)
        patient.kill()
        assert patient.inspect("info")[0]["staged"] >= 3
        ahead = Path(shutil.copytree(patient.volume, path / "ahead"))
        Store("database", ahead).close()  # all of the log is in LMDB then, where it is damaged
        others = cluster.others(patient)
        for node in others:
            node.start().await_answer()
        cluster.await_caught_up(
            nodes=others
        )  # they have committed something else in the places of what is staged there
        with cluster.client() as client:
            client.put("after", 1)
        patient.start()
        cluster.await_caught_up()
        assert patient.terminate() == 0
        assert patient.inspect("info")[0]["staged"] == 0
        level = Path(shutil.copytree(patient.volume, path / "level"))
        behind = Path(shutil.copytree(level, path / "behind"))
        carry_out_anew(behind, is_flushed=False)
        cluster.await_leader()
        yield Made(cluster, patient, level, behind, ahead)


@pytest.fixture
def level(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.level, tmp_path / "level"))


@pytest.fixture
def behind(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.behind, tmp_path / "behind"))


@pytest.fixture(params=["level", "behind"])
def either(made: Made, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """All of it is committed; all is on disk, or a flush was under way."""
    return Path(shutil.copytree(getattr(made, request.param), tmp_path / request.param))


@pytest.fixture
def ahead(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.ahead, tmp_path / "ahead"))


@contextlib.contextmanager
def raw(path: Path) -> Iterator[lmdb.Environment]:
    with lmdb.open(str(path / records.DATA_FILE), subdir=False, map_size=MAP_BYTES, max_dbs=16) as env:
        yield env


def damage(path: Path, change: Damage) -> None:
    """Change records behind the store's back; the pages of LMDB stay in order."""
    with raw(path) as env:
        log, committed = (env.open_db(name, create=False) for name in (records.LOG, records.COMMITTED))
        with env.begin(write=True) as txn:
            change(txn, log, committed)


def change_facts(path: Path, **facts: object) -> None:
    """Other facts of the node, whole as records."""
    with raw(path) as env:
        meta = env.open_db(records.META, create=False)
        with env.begin(write=True) as txn:
            for name, fact in facts.items():
                txn.put(name.encode(), records.pack_meta(name.encode(), fact), db=meta)


class Contents(NamedTuple):
    """Everything in a directory, read with LMDB alone."""

    log: dict[bytes, bytes]
    committed: dict[bytes, bytes]
    meta: dict[bytes, bytes]
    second: dict[bytes, bytes]

    @property
    def behind(self) -> Behind | None:
        found: Behind | None = records.unpack_meta(b"behind", self.meta[b"behind"], Behind | None)
        return found

    @property
    def repaired(self) -> Contents:
        """The same after a repair that has changed anything: the tail of the log, of which nothing is needed here, is
        out of use then (`test_repair_tail` has those of which something is)."""
        fact = records.unpack_meta(b"tail", self.meta[b"tail"], TailFact)
        return self._replace(meta=self.meta | {b"tail": records.pack_meta(b"tail", fact.retired)})


def contents(path: Path) -> Contents:
    with raw(path) as env, env.begin() as txn:
        tables = (env.open_db(name, txn=txn, create=False) for name in records.DATABASES)
        return Contents(*({bytes(k): bytes(v) for k, v in txn.cursor(db)} for db in tables))


def last_of(path: Path) -> int:
    return len(contents(path).log)


class Said(list[str]):
    """What a repair told."""

    def about(self, word: str) -> list[str]:
        return [line.removeprefix(f"{word}: ") for line in self if line.startswith(f"{word}: ")]


def mend(path: Path, members: list[str], **options: Any) -> Said:
    """Repair in this process."""
    said = Said()
    assert repair(path, members, tell=said.append, timeout=5, **options) is not options.get("is_dry", False) or not any(
        said.about("would repair")
    )
    return said


def refused(path: Path, members: list[str], kind: type[StoreError] = StoreDamaged) -> tuple[str, Said]:
    """Why a repair is refused; nothing has changed then."""
    before = (path / records.DATA_FILE).read_bytes()
    said = Said()
    with pytest.raises(kind) as why:
        repair(path, members, tell=said.append, timeout=5)
    assert (path / records.DATA_FILE).read_bytes() == before, "a refused repair changes nothing"
    assert not said.about("repairing")
    return str(why.value), said


# --- every kind of damage -------------------------------------------------------------------------------------


def key_of(commit_id: int) -> bytes:
    return records.log_key(commit_id)


def at(commit_id: int, last: int) -> int:
    """A position; negative ones count from the end, as in a list."""
    return commit_id if commit_id > 0 else last + 1 + commit_id


def flip(commit_id: int, byte: int, bit: int = 2) -> Damage:
    """One bit of an entry."""

    def change(txn: lmdb.Transaction, log: Any, _: Any) -> None:
        key = key_of(at(commit_id, txn.stat(log)["entries"]))
        record = bytearray(txn.get(key, db=log))
        record[byte] ^= 1 << bit
        txn.put(key, bytes(record), db=log)

    return change


def fill(first: int, last: int, filler: bytes = b"\0") -> Damage:
    """Entries of nothing but one byte."""

    def change(txn: lmdb.Transaction, log: Any, _: Any) -> None:
        end = txn.stat(log)["entries"]
        for commit_id in range(at(first, end), at(last, end) + 1):
            key = key_of(commit_id)
            txn.put(key, filler * len(txn.get(key, db=log)), db=log)

    return change


def remove(first: int, last: int) -> Damage:
    def change(txn: lmdb.Transaction, log: Any, _: Any) -> None:
        end = txn.stat(log)["entries"]
        for commit_id in range(at(first, end), at(last, end) + 1):
            assert txn.delete(key_of(commit_id), db=log)

    return change


def move(commit_id: int, to: int) -> Damage:
    """An entry under another key."""

    def change(txn: lmdb.Transaction, log: Any, _: Any) -> None:
        key = key_of(at(commit_id, txn.stat(log)["entries"]))
        record = txn.pop(key, db=log)
        txn.put(key_of(to), record, db=log)

    return change


def swap(one: int, two: int) -> Damage:
    """Two entries in each other's place, whole as records."""

    def change(txn: lmdb.Transaction, log: Any, _: Any) -> None:
        first, second = (bytes(txn.get(key_of(n), db=log)) for n in (one, two))
        txn.put(key_of(one), second, db=log)
        txn.put(key_of(two), first, db=log)

    return change


def shorten(commit_id: int, length: int) -> Damage:
    def change(txn: lmdb.Transaction, log: Any, _: Any) -> None:
        key = key_of(commit_id)
        txn.put(key, bytes(txn.get(key, db=log))[:length], db=log)

    return change


def value(change_to: Callable[[bytes, bytes], bytes | None], every: int = 1000) -> Damage:
    """The first value of each `every`, by (key, stored); None removes it."""

    def change(txn: lmdb.Transaction, _: Any, committed: Any) -> None:
        pairs = [(bytes(key), bytes(stored)) for key, stored in txn.cursor(committed)]
        for key, stored in pairs[3::every]:
            after = change_to(key, stored)
            if after is None:
                txn.delete(key, db=committed)
            else:
                txn.put(key, after, db=committed)

    return change


def value_of(key: bytes, stored: bytes | None) -> Damage:
    """Another value, or none, under one key."""

    def change(txn: lmdb.Transaction, _: Any, committed: Any) -> None:
        if stored is None:
            txn.delete(key, db=committed)
        else:
            txn.put(key, stored, db=committed)

    return change


def as_it_was_never(key: bytes, stored: bytes) -> bytes:
    """A whole record, but not the one that the log makes."""
    record = records.unpack_record(key, stored)
    return records.pack_record(
        key, records.Record(record.created, record.modified, record.version + 1, 0, record.value)
    )


def extra(txn: lmdb.Transaction, _: Any, committed: Any) -> None:
    """A whole record of a key that nobody put."""
    key = b"default\0nobody"
    txn.put(key, records.pack_record(key, records.Record(1, 1, 1, 0, Raw(b"1"))), db=committed)


def together(*damages: Damage) -> Damage:
    def change(txn: lmdb.Transaction, log: Any, committed: Any) -> None:
        for each in damages:
            each(txn, log, committed)

    return change


DAMAGES: dict[str, Damage] = {
    "format of an entry": flip(40, 0),
    "term of an entry": flip(40, 8),
    "time of an entry": flip(40, 16),
    "checksum of an entry": flip(40, 18),
    "command of an entry": flip(40, -2),
    "first entry": flip(1, -1),
    "newest entry, its command": flip(-1, -2),
    "newest entry, its checksum": flip(-1, 19),
    "newest entry, its format": flip(-1, 0),
    "newest entry, nothing left": fill(-1, -1),
    "newest entry, removed": remove(-1, -1),
    "three newest entries, nothing left": fill(-3, -1, b"\xff"),
    "three newest entries, removed": remove(-3, -1),
    "an entry, nothing left": fill(50, 50),
    "entries in a row": fill(50, 60),
    "entries in a row, removed": remove(50, 60),
    "checksum, and the command after it": together(flip(40, 18), flip(41, -2)),
    "nothing left, and the command after it": together(fill(40, 40), flip(41, -2)),
    "here and there": together(flip(10, -1), fill(20, 21), remove(30, 30), flip(31, 18), flip(-2, 3)),
    "all entries": fill(1, -1),
    "all entries removed": remove(1, -1),
    "an entry far from its place": move(-1, 1 << 40),
    "an entry of the middle past the end": move(60, 5000),
    "two entries swapped": swap(70, 71),
    "an entry cut short": shorten(33, 30),
    "an entry cut to its header": shorten(33, 21),
    "a value, flipped": value(lambda _, stored: stored[:-2] + bytes([stored[-2] ^ 4]) + stored[-1:]),
    "a value, cut short": value(lambda _, stored: stored[:20]),
    "a value, nothing left": value(lambda _, stored: bytes(len(stored))),
    "a value, removed": value(lambda _, __: None),
    "a value, whole but wrong": value(as_it_was_never),
    "a value that nobody put": extra,
    "all values": value(lambda _, stored: b"x" * len(stored), every=1),
    "all values removed": value(lambda _, __: None, every=1),
    "every other value, whole but wrong": value(as_it_was_never, every=2),
    "all entries and all values": together(fill(1, -1), value(lambda _, __: None, every=1)),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_is_damaged_is_as_it_was(made: Made, either: Path, kind: str) -> None:
    """Whatever is damaged in the log and the committed values, after the repair each record is byte for byte what it
    was before, which is what the members have, and no fact of the node has changed; also where a flush was under way,
    and values were of two times. A dry run finds the same and changes nothing; after the repair a second one finds
    nothing."""
    whole = contents(either)
    damage(either, DAMAGES[kind])
    before = (either / records.DATA_FILE).read_bytes()
    planned = mend(either, made.members, is_dry=True)
    assert (either / records.DATA_FILE).read_bytes() == before
    said = mend(either, made.members)
    assert said.about("repairing") == planned.about("would repair") != []
    assert said.about("found") == planned.about("found") != []
    assert contents(either) == whole.repaired
    assert said[-1].endswith("repaired, and whole")
    again = mend(either, made.members)
    assert again == [said[-1].replace("repaired, and whole", "whole")]


def test_the_members_hold_what_was_repaired(made: Made, level: Path) -> None:
    """The copies that the tests compare with are what the members have: one history."""
    damage(level, DAMAGES["all entries and all values"])
    mend(level, made.members[:1])
    ours = {line["commit_id"]: (line["term"], line["checksum"]) for line in inspect(level, "log")}
    for node in made.cluster.others(made.patient):
        theirs = {line["commit_id"]: (line["term"], line["checksum"]) for line in node.inspect("log")}
        assert ours.items() <= theirs.items()


def test_what_is_intact_is_told_and_needs_nobody(made: Made, level: Path) -> None:
    """A whole directory is told to be whole, without asking anybody; so are the values and what an entry proves by
    itself (its format, its checksum) repaired, with members that do not answer."""
    nobody = [free_address()]
    size = (level / records.DATA_FILE).stat().st_size
    said = mend(level, nobody)
    assert len(said) == 1
    assert said[0].endswith("committed: whole")
    assert (level / records.DATA_FILE).stat().st_size == size
    whole = contents(level)
    damage(level, together(flip(40, 0), flip(50, 18), value(lambda _, __: None, every=1)))
    mend(level, nobody)
    assert contents(level) == whole.repaired
    damage(level, flip(40, -2))
    why, _ = refused(level, nobody)
    assert f"entry 40 could not be had ({nobody[0]}: no answer" in why
    assert "--node" in why
    mend(level, [*nobody, *made.members])
    assert contents(level) == whole.repaired


def test_without_a_list_the_members_are_asked(level: Path) -> None:
    """The directory knows who the members are."""
    whole = contents(level)
    damage(level, fill(50, 52))
    mend(level, [])
    assert contents(level) == whole.repaired


# --- a flush that was under way -------------------------------------------------------------------------------


def state_at_start(path: Path) -> dict[bytes, bytes]:
    """The committed values as a start finds them, once all that it goes on with is on disk."""
    with contextlib.closing(Store("database", path)) as store:
        store.write()
        assert store.behind is None
    return contents(path).committed


def test_a_flush_that_was_under_way_goes_on_after_the_repair(made: Made, behind: Path) -> None:
    """What a flush has not written yet is no damage: the directory is whole, and stays as it is. With entries and
    values damaged on both sides of where it had come to, they are as before; and the next start ends it: then the
    values are those of a node that wrote them all."""
    whole = contents(behind)
    assert whole.committed != contents(made.level).committed
    said = mend(behind, [free_address()])
    assert len(said) == 1
    assert said[0].endswith("committed: whole")
    damage(behind, together(fill(50, 90), flip(-1, -2), value(lambda _, __: None, every=2)))
    mend(behind, made.members)
    assert contents(behind) == whole.repaired
    assert state_at_start(behind) == contents(made.level).committed


def test_each_value_is_as_of_its_own_time(made: Made, behind: Path, tmp_path: Path) -> None:
    """A whole value of the wrong time is a wrong value. Of the keys that the second half of the log changes: one that
    was written is as before the flush, or one that was not is as after it. Each is found, and is what it was; so it is
    with a key that is not there at one of the times."""
    before = Path(shutil.copytree(made.level, tmp_path / "before"))
    carry_out_anew(before, is_flushed=True)
    whole, old, new = contents(behind), contents(before).committed, contents(made.level).committed
    assert whole.behind is not None
    changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    written = [key for key in changed if key < whole.behind.store_key]
    assert len(written) > 5
    assert len(changed) - len(written) > 10
    for key in changed:
        wrong, right = (old, new) if key in written else (new, old)
        assert whole.committed.get(key) == right.get(key)
        damage(behind, value_of(key, wrong.get(key)))
        said = mend(behind, [])
        assert len(said.about("repairing")) == 1, said
        assert contents(behind) == whole.repaired, key
    assert any(key not in old for key in changed)
    assert any(key not in new for key in changed)


def test_what_a_flush_leaves_is_not_made_up(made: Made, behind: Path) -> None:
    """Which values are of which time only the node's own fact says: damaged, of another form, or in contradiction to
    what is committed it is refused, by name, and nothing changes. So it is where the log begins later, and the values
    are said to be as of an entry before that: nobody could carry out again what is between. Such a log does not tell
    what a damaged value was, on either side of the flush; but its entries come back from the members."""
    now = contents(behind).behind
    assert now is not None
    last = last_of(behind)
    for fact, why in [
        ({"after": "1", "key": now.key}, "the record 'behind' of the node can't be read"),
        (Behind(last, now.key), f"values are as of {last} still, by the record 'behind' of the node"),
        (Behind(last + 1, now.key), "but the log begins after 0"),
        (Behind(-1, now.key), "but the log begins after 0"),
    ]:
        change_facts(behind, behind=fact)
        assert why in refused(behind, made.members)[0]
    with raw(behind) as env:
        meta = env.open_db(records.META, create=False)
        with env.begin(write=True) as txn:
            stored = records.pack_meta(b"behind", now)
            txn.put(b"behind", stored[:-1] + b"?", db=meta)
    assert "the record 'behind' of the node does not match its checksum" in refused(behind, made.members)[0]

    change_facts(behind, behind=now)
    with contextlib.closing(
        Store("database", behind, settings=Settings(log_entries=10, compaction_step=last))
    ) as store:
        store.write(keys=0)
        assert store.behind == now
        assert store.journal.base.id.commit_id == now.after, "the flush needs all that follows"
    whole = contents(behind)
    damage(behind, together(flip(now.after + 1, -2), fill(now.after + 5, last)))
    mend(behind, made.members)
    assert contents(behind) == whole.repaired
    for key in (max(whole.committed), min(whole.committed)):
        damage(behind, value_of(key, b"?" * 50))
        assert "does not tell what it was" in refused(behind, made.members)[0]
        damage(behind, value_of(key, whole.committed[key]))
    change_facts(behind, behind=Behind(now.after - 1, now.key))
    assert f"but the log begins after {now.after}, and {last} is committed" in refused(behind, made.members)[0]
    change_facts(behind, behind=None, commit_id=now.after - 1)
    assert f"{now.after - 1} is committed, but the log begins after {now.after}" in refused(behind, made.members)[0]


def test_compact_keeps_a_flush_where_it_is(made: Made, behind: Path) -> None:
    """`raftnode compact` copies what there is: the values of both times, and the fact that tells them apart. The next
    start goes on."""
    whole = contents(behind)
    shrink(behind)
    assert contents(behind) == whole
    assert state_at_start(behind) == contents(made.level).committed


# --- a node that was repaired ---------------------------------------------------------------------------------


def flip_in_the_file(node: NodeProcess, commit_id: int) -> None:
    damage(node.volume, flip(commit_id, -2))


def said_command(text: str) -> list[str]:
    """The command that a node says when it stops over damage."""
    found = re.findall(r"^raftnode: .*With this node stopped, run: (raftnode repair .*)$", text, re.M)
    assert found, text
    program, *words = shlex.split(found[-1])
    assert program == "raftnode"
    return [sys.executable, "-m", "raftnode", *words]


def run(command: list[str], under: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*under, *command], env=command_environment(), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done


def test_a_repaired_node_is_a_member_as_before(made: Made) -> None:
    """From the damage to the vote. The newest entry, one of the middle and a value of a stopped node are damaged. It
    does not start: status 3, and its last words are a command; that very command repairs it. It starts, catches up with
    what was written meanwhile, its log is the others', and it votes: with one of the others killed, it and the last one
    elect a leader and take writes, and reading through it gives them. Then its value is damaged alone: it starts, stops
    over a put on that key, at each start anew, says the command, and is repaired by it."""
    cluster, node = made.cluster, made.patient
    damage(node.volume, together(flip(33, -2), flip(-1, -2), value(lambda _, s: s[:-1] + b"?")))
    with cluster.others(node)[0].client() as client:
        client.put("while it was down", [1])
    for _ in range(2):
        mark = node.mark()
        assert node.start().await_exit() == 3
        words = node.log_text(since=mark)
        assert "Traceback" not in words
        assert "is damaged: it does not match its checksum" in words
    done = run(said_command(words))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("repairing: ") == 3
    node.start()
    cluster.await_caught_up()
    other = next(each for each in cluster.others(node) if each is not cluster.await_leader())
    leader_or_not = cluster.await_leader()
    killed = leader_or_not if leader_or_not is not node else other
    killed.kill()
    cluster.await_leader()
    with node.client() as client:
        client.put("voted", ["by", "both"])
        assert client.get("voted") == ["by", "both"]
        assert client.get("while it was down") == [1]
    cluster.heal()

    assert node.terminate() == 0
    damage(node.volume, value(lambda _, s: s[:-1] + b"?"))
    spoilt = next(line for line in run_inspect(node) if line.get("damaged"))
    node.start()
    cluster.await_caught_up()
    mark = node.mark()
    with cluster.others(node)[0].client() as client:
        client.put(spoilt["key"], "anew", spoilt["namespace"])
    assert node.await_exit() == 3
    assert node.start().await_exit() == 3
    words = node.log_text(since=mark)
    done = run(said_command(words))
    assert (done.returncode, done.stderr) == (0, "")
    node.start()
    cluster.await_caught_up()
    assert node.read([spoilt["key"]], spoilt["namespace"], "local") == {spoilt["key"]: "anew"}
    logs = [[(line["commit_id"], line["term"], line["checksum"]) for line in each.inspect("log")] for each in cluster]
    shortest = min(map(len, logs))
    assert logs[0][:shortest] == logs[1][:shortest] == logs[2][:shortest]
    assert node.terminate() == 0


def run_inspect(node: NodeProcess) -> list[dict[str, Any]]:
    """The state as the inspector prints it, with what is damaged in it."""
    command = [sys.executable, "-m", "raftnode.inspector", "state", str(node.volume), "--json"]
    return [json.loads(line) for line in run(command).stdout.splitlines()]


# --- staged entries -------------------------------------------------------------------------------------------


def commit_until(cluster: ClusterOfProcesses, commit_id: int) -> None:
    """Write until the cluster has committed this entry."""
    with cluster.client() as client:
        while client.put("more", 1)["commit_id"] < commit_id:
            pass


@pytest.mark.parametrize("which", [-1, -3])
@pytest.mark.parametrize("is_legible", [False, True])
def test_a_staged_entry_is_never_cut(made: Made, ahead: Path, which: int, is_legible: bool) -> None:
    """A damaged staged entry may have been acknowledged by this node: it is not cut, nor replaced by what is not
    committed (TRAPS 37). The members that are asked have committed less than our log: no repair, and the words say what
    helps. Once one has committed as far as our log goes, its entries take the place of ours, also of the whole staged
    ones that are in conflict with them; nothing else changes but the term, which is that of the new entries, with no
    vote cast. What is left of the entry makes no difference, nor which of the staged ones it is."""
    before = contents(ahead).repaired
    last = last_of(ahead)
    damage(ahead, flip(which, -2) if is_legible else fill(which, which))
    with slow_member(made, upto=last - 1) as member:
        why, said = refused(ahead, [member])
    assert f"it has committed only up to {last - 1}" in why
    assert f"Entry {last + 1 + which} is staged here" in why
    assert "never cut" in why
    assert len(said.about("found")) == 1
    commit_until(made.cluster, last)
    made.cluster.await_caught_up(last, made.cluster.others(made.patient))
    mend(ahead, made.members)
    after = contents(ahead)
    theirs = contents_of_members(made, last)
    assert after.log == theirs
    assert len(after.log) == len(before.log)
    assert after.committed == before.committed
    ballot = records.unpack_meta(b"ballot", after.meta[b"ballot"], Ballot)
    newest = records.unpack_entry(last, theirs[key_of(last)])
    assert ballot == Ballot(newest.term, None)
    assert {name for name in after.meta if after.meta[name] != before.meta[name]} == {b"ballot"}


def contents_of_members(made: Made, upto: int) -> dict[bytes, bytes]:
    """The log records of a member, up to there, over the wire."""
    found: dict[bytes, bytes] = {}
    node = made.cluster.others(made.patient)[0]
    while len(found) < upto:
        answer = node.ask({"type": "entries", "from": len(found) + 1, "to": upto}, PATIENCE_S)
        assert answer is not None
        assert answer["entries"], answer
        for each in answer["entries"]:
            command = Raw(compact(each["command"]))
            entry = Entry(each["term"], each["commit_id"], each["time"], each["checksum"], command)
            found[key_of(entry.commit_id)] = records.pack_entry(entry)
    return found


def test_whole_staged_entries_are_left_alone(ahead: Path, made: Made) -> None:
    """An older entry is damaged in a directory with staged ones: only that one is replaced. The staged ones, which are
    in conflict with what the members have committed, are for a leader to cut."""
    before = contents(ahead).repaired
    damage(ahead, together(flip(40, -2), value(lambda _, __: None)))
    mend(ahead, made.members)
    assert contents(ahead) == before


# --- members that can't be believed ---------------------------------------------------------------------------


def compact(found: object) -> bytes:
    """JSON as a node writes it: the commands keep their bytes."""
    return json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode()


Answers = Callable[[dict[str, Any], dict[str, Any]], object]
"""From a request and the true answer to what is sent: a dict, bytes as they are, or None to close."""


@contextlib.contextmanager
def member_that(made: Made, says: Answers, behind: int = 0) -> Iterator[str]:
    """Somebody who stands before a real member and changes its answers; its address."""
    real = made.cluster.others(made.patient)[behind]
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection, connection.makefile("rwb") as stream:
                    for line in stream:
                        request = json.loads(line)
                        answer = says(request, real.ask(request, PATIENCE_S) or {})
                        if answer is None:
                            break
                        stream.write(answer if isinstance(answer, bytes) else compact(answer) + b"\n")
                        stream.flush()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.getsockname()[1]}"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(PATIENCE_S)


@contextlib.contextmanager
def slow_member(made: Made, upto: int) -> Iterator[str]:
    """A member that has committed only so far."""

    def says(request: dict[str, Any], answer: dict[str, Any]) -> object:
        if request["type"] == "entries":
            answer["entries"] = [entry for entry in answer["entries"] if entry["commit_id"] <= upto]
            answer["commit_id"] = upto
        return answer

    with member_that(made, says) as address:
        yield address


def of_entries(change: Callable[[list[dict[str, Any]]], object]) -> Answers:
    """Changes only the entries."""

    def says(request: dict[str, Any], answer: dict[str, Any]) -> object:
        if request["type"] == "entries":
            change(answer["entries"])
        return answer

    return says


def instead_of_entries(other: dict[str, Any]) -> Answers:
    return lambda request, answer: other if request["type"] == "entries" else answer


class Forger:
    """Another history, whole in itself: every checksum fits, from the first entry that is asked for on."""

    def __init__(self) -> None:
        self.checksums: dict[int, int] = {}

    def begin(self, path: Path, first: int) -> None:
        """The history is to leave that of a directory at this entry."""
        stored = contents(path).log[key_of(first - 1)]
        self.checksums = {first - 1: records.unpack_entry(first - 1, stored).checksum}

    def __call__(self, entries: list[dict[str, Any]]) -> None:
        command = encode_command(PutCommand(namespace="default", key="forged", value=Raw(b"1")))
        for entry in entries:
            before, at = self.checksums[entry["commit_id"] - 1], entry["commit_id"]
            self.checksums[at] = chain(before, entry["term"], at, entry["time"], command)
            entry |= {"command": json.loads(bytes(command)), "checksum": self.checksums[at]}


forge = Forger()


def replace_identity(**facts: object) -> Answers:
    def says(request: dict[str, Any], answer: dict[str, Any]) -> object:
        if request["type"] == "status":
            answer["data"] |= facts
        return answer

    return says


LIES: dict[str, tuple[Answers, str]] = {
    "another command": (of_entries(lambda e: e[0]["command"].update(client="liar")), "does not follow our entry"),
    "another checksum": (of_entries(lambda e: e[0].update(checksum=1)), "does not follow our entry"),
    "another term": (of_entries(lambda e: e[0].update(term=0)), "does not follow our entry"),
    "another history": (of_entries(forge), "do not lead to our entry 41: one of the two histories is wrong"),
    "another place": (of_entries(lambda e: e.pop(0)), "where 40 was asked for"),
    "nothing": (of_entries(list.clear), "it has committed only up to"),
    "another cluster": (replace_identity(cluster="0" * 16), "no other member of ours"),
    "another node": (replace_identity(node="0" * 16), "no other member of ours"),
    "no member": (replace_identity(address="127.0.0.1:1"), "no other member of ours"),
    "an error": (
        instead_of_entries({"type": "entries", "data": False, "error": {"code": "damaged", "message": "mine too"}}),
        "mine too (damaged)",
    ),
    "another answer": (instead_of_entries({"type": "ping", "data": True, "node": ""}), "answered with PingAnswer"),
    "no JSON": (lambda _, __: b"hello?\n", "no answer"),
    "a wrong type": (lambda _, __: {"type": "ping", "data": True, "node": ""}, "no other member of ours"),
    "no line": (lambda _, __: None, "no answer"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_what_can_not_be_proved_is_not_taken(made: Made, level: Path, lie: str) -> None:
    """A member whose entries do not fit, or that is not who it should be, is not believed: the reason is told, nothing
    changes, and with a true member asked as well the entry is repaired from that one."""
    whole = contents(level)
    forge.begin(level, 40)
    damage(level, flip(40, -2))
    says, words = LIES[lie]
    with member_that(made, says) as liar:
        why, _ = refused(level, [liar])
        assert f"{liar}: " in why
        assert words in why
        said = mend(level, [liar, made.members[1]])
    assert said.about("repairing")[0].startswith(f"entry 40: from {made.members[1]}")
    assert contents(level) == whole.repaired


def test_at_the_end_of_the_log_the_members_must_agree(made: Made, level: Path) -> None:
    """Of the newest entry nothing is left, so nothing here can tell a forged one: it is taken because it is committed,
    from members that say the same. Two that differ: no repair, whichever is asked first. The true ones alone: done."""
    whole = contents(level)
    last = len(whole.log)
    forge.begin(level, last)
    damage(level, fill(-1, -1))
    with member_that(made, of_entries(forge)) as liar:
        for members in ([liar, made.members[1]], [made.members[1], liar]):
            why, _ = refused(level, members)
            assert f"has committed another entry {last}" in why
    said = mend(level, made.members)
    assert said.about("repairing") == [f"entry {last}: from {', '.join(made.members)}, where it is committed"]
    assert contents(level) == whole.repaired


# --- what can't be repaired -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["format", "node", "cluster", "address", "ballot", "commit_id", "memberships", "tail"])
@pytest.mark.parametrize("is_lost", [False, True])
def test_facts_of_the_node_are_not_made_up(made: Made, level: Path, name: str, is_lost: bool) -> None:
    """What a node has promised only its own disk knows: a damaged or missing fact is refused, by name, with the words
    that an older copy is no remedy; nothing changes, though an entry that could be repaired is damaged as well."""
    damage(level, flip(40, -2))
    with raw(level) as env:
        meta = env.open_db(records.META, create=False)
        with env.begin(write=True) as txn:
            fact = bytearray(txn.pop(name.encode(), db=meta))
            fact[-1] ^= 1
            if not is_lost:
                txn.put(name.encode(), bytes(fact), db=meta)
    why, _ = refused(level, made.members)
    assert f"the record {name!r} of the node " + ("is missing" if is_lost else "does not match its checksum") in why
    assert "never an older one" in why


def why_refused(path: Path, members: list[str]) -> str:
    """Why a repair is refused; "" when it is not."""
    try:
        repair(path, members, tell=lambda _: None, timeout=5)
    except StoreDamaged as error:
        return str(error)
    return ""


def test_pages_of_lmdb_are_not_guessed(made: Made, level: Path) -> None:
    """A page of LMDB that is not in order is found from the outside, before LMDB follows its pointers: page headers
    with a flipped bit, pages of zeros, and a file that is cut, at a page's end or within one. Each is refused, or the
    damaged page was a free one, and all is as it was; and this process lives. So is a key of a size that LMDB does not
    take, or it is only another key, and repaired."""
    whole = contents(level)
    file = level / records.DATA_FILE
    image = file.read_bytes()
    chance = random.Random(3)
    for n in range(24):
        damaged = bytearray(image)
        page = chance.randrange(2, len(image) // 4096) * 4096
        if n % 3 == 0:
            damaged[page + chance.randrange(16)] ^= 1 << chance.randrange(8)
        elif n % 3 == 1:
            damaged[page : page + 4096] = bytes(4096)
        else:
            del damaged[chance.choice([4096 * 3, len(image) // 8192 * 4096, len(image) // 2 + 1000]) :]
        file.write_bytes(damaged)
        why = why_refused(level, made.members)
        assert "never an older one" in why if why else contents(level) in (whole, whole.repaired)
    first = min(whole.committed)
    found = len(first).to_bytes(2, sys.byteorder) + first  # the size of a key stands before it
    for size in (0, 3, len(first) + 1, 600):
        file.write_bytes(image.replace(found, size.to_bytes(2, sys.byteorder) + first))
        assert file.read_bytes() != image
        why = why_refused(level, made.members)
        assert "never an older one" in why if why else contents(level) in (whole, whole.repaired)
    file.write_bytes(b"")
    assert "is gone or empty" in refused(level, made.members)[0]
    file.unlink()
    with pytest.raises(StoreDamaged, match="is gone or empty"):
        repair(level, made.members, tell=lambda _: None)


def test_directories_that_are_not_for_repair(made: Made, level: Path, ahead: Path, tmp_path: Path) -> None:
    """A node that runs, a directory without a node, no directory, a newer format, and another node's file: each is
    refused in words, and nothing is made where nothing was."""
    running = made.cluster.others(made.patient)[0]
    with pytest.raises(StoreInUse, match="in use by another node"):
        repair(running.volume, [], tell=lambda _: None)
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StoreForeign, match="holds no node"):
            repair(path, [], tell=lambda _: None)
    assert not (tmp_path / "nowhere").exists()
    assert not (tmp_path / records.LOCK_FILE).exists()
    (level / records.LOCK_FILE).write_text("0123456789abcdef\n")
    assert "the directory of node 0123456789abcdef" in refused(level, [])[0]
    with raw(ahead) as env:
        meta = env.open_db(records.META, create=False)
        with env.begin(write=True) as txn:
            txn.put(b"format", records.pack_meta(b"format", records.FORMAT + 1), db=meta)
    refused(ahead, [], StoreTooNew)


@pytest.mark.parametrize("newest", ["whole", "damaged", "damaged and staged"])
def test_a_ballot_behind_the_log_is_not_guessed(made: Made, level: Path, ahead: Path, newest: str) -> None:
    """A log of a higher term than the ballot: the ballot was lost, and with it a vote (TRAPS 1). It is not raised to
    fit, though it is where a member's entries of a higher term take the place of staged ones: here the term is that of
    entries that were this node's own, also where its newest entry is repaired to be what it was."""
    path = ahead if "staged" in newest else level
    with raw(path) as env:
        meta = env.open_db(records.META, create=False)
        with env.begin(write=True) as txn:
            txn.put(b"ballot", records.pack_meta(b"ballot", Ballot(0, None)), db=meta)
    if newest != "whole":
        damage(path, flip(-1, -2))
        commit_until(made.cluster, last_of(path))
        made.cluster.await_caught_up(last_of(path), made.cluster.others(made.patient))
    why, _ = refused(path, made.members)
    assert "but the ballot only 0" in why


# --- any byte -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, *(pytest.param(n, marks=pytest.mark.long) for n in range(2, 12))])
def test_any_flipped_byte_is_repaired_or_refused(made: Made, either: Path, seed: int) -> None:
    """Forty bytes anywhere in the values of the log and of the committed namespaces, one after the other, in records
    and at places drawn by the seed: each is found and repaired to be what it was."""
    sys.stdout.write(f"seed {seed}\n")
    chance = random.Random(seed)
    whole = contents(either)
    for _ in range(40):
        name = chance.choice([records.LOG, records.COMMITTED])
        table = whole.log if name == records.LOG else whole.committed
        key = chance.choice(sorted(table))
        record = bytearray(table[key])
        place = chance.choice([chance.randrange(len(record)), chance.randrange(min(36, len(record)))])
        record[place] ^= chance.randrange(1, 256)
        with raw(either) as env:
            db = env.open_db(name, create=False)
            with env.begin(write=True) as txn:
                txn.put(key, bytes(record), db=db)
        said = mend(either, made.members)
        assert len(said.about("repairing")) == 1, f"{name!r} {key!r} byte {place}: {said}"
        assert contents(either) == whole.repaired, f"{name!r} {key!r} byte {place}"


def test_any_flipped_byte_of_the_file_is_repaired_or_refused(made: Made, either: Path) -> None:
    """The same in the bytes of the file, where a disk does it: a hundred places anywhere. Each is repaired, or was no
    part of any record, or is refused; never is the directory another one."""
    whole = contents(either)
    file = either / records.DATA_FILE
    image = file.read_bytes()
    chance = random.Random(9)
    outcomes: dict[str, int] = {}
    for _ in range(100):
        damaged = bytearray(image)
        place = chance.randrange(len(image))
        damaged[place] ^= chance.randrange(1, 256)
        file.write_bytes(damaged)
        try:
            said = mend(either, made.members)
        except (StoreDamaged, StoreForeign):
            outcomes["refused"] = outcomes.get("refused", 0) + 1
            continue
        assert contents(either) in (whole, whole.repaired), f"byte {place}: {said}"
        kind = "repaired" if said.about("repairing") else "whole"
        outcomes[kind] = outcomes.get(kind, 0) + 1
    assert min(outcomes.get("repaired", 0), outcomes.get("whole", 0)) > 3, outcomes


# --- a kill, and a disk that fails ----------------------------------------------------------------------------


@needs_strace
def test_kill_9_at_any_moment(made: Made, level: Path, tmp_path: Path) -> None:
    """The repair is one transaction: a kill at any of its writes and syncs leaves the directory damaged as it was, or
    repaired, and never anything between; the next repair finishes it. Killed by strace as it enters its first and last
    calls of pwrite64, pwritev and fdatasync, one in the middle, and as it ends."""
    whole = contents(level)
    damage(level, together(fill(40, 44), flip(-1, -2), value(lambda _, __: None, every=2)))
    damaged = contents(level)
    image = (level / records.DATA_FILE).read_bytes()
    command = [sys.executable, "-m", "raftnode", "repair", str(level), "--node", ",".join(made.members)]
    calls = ("pwrite64", "pwritev", "fdatasync", "exit_group")
    under = ("strace", "-f", "-o", str(tmp_path / "trace"), "-e", f"trace={','.join(calls)}")
    assert run(command, under).returncode == 0
    trace = (tmp_path / "trace").read_text()
    ends = []
    for call in calls:
        count = len(re.findall(rf"\b{call}\(", trace))
        for when in sorted({1, 2, count // 2, count - 1, count} & set(range(1, count + 1))):
            (level / records.DATA_FILE).write_bytes(image)
            done = run(command, (*under, "-e", f"inject={call}:signal=KILL:when={when}"))
            assert done.returncode == -signal.SIGKILL, done.stderr
            now = contents(level)
            assert now in (damaged, whole.repaired), f"{call} {when} of {count}"
            ends.append(now == whole.repaired)
            mend(level, made.members)
            assert contents(level) == whole.repaired
    assert len(ends) >= 6, "too few of the kills hit"
    assert set(ends) == {True, False}, "before and after the commit"


@needs_strace
@pytest.mark.parametrize("fault", ["fdatasync:error=EIO:when=2", "pwrite64:error=EIO:when=2", "fdatasync:error=EIO"])
def test_a_disk_that_fails_during_the_repair(made: Made, level: Path, tmp_path: Path, fault: str) -> None:
    """A sync or a write that fails ends the repair with status 3 and words; when the disk is well again, the same
    command repairs."""
    whole = contents(level)
    damage(level, together(fill(40, 44), value(lambda _, __: None, every=2)))
    command = [sys.executable, "-m", "raftnode", "repair", str(level), "--node", ",".join(made.members)]
    call = fault.partition(":")[0]
    under = ("strace", "-f", "-o", str(tmp_path / "trace"), "-e", f"trace={call}", "-e", f"inject={fault}")
    done = run(command, under)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "INJECTED" in (tmp_path / "trace").read_text()
    assert "Input/output error" in done.stderr
    assert "Check the disk" in done.stderr
    assert run(command).returncode == 0
    assert contents(level) == whole.repaired


# --- the command ----------------------------------------------------------------------------------------------


def test_the_command(made: Made, level: Path) -> None:
    """Exit statuses (README): 5 for a dry run that found damage, 0 repaired, 0 whole, 3 refused, 2 wrong usage."""
    whole = contents(level)
    damage(level, together(fill(40, 44), flip(-1, -2)))
    command = [sys.executable, "-m", "raftnode", "repair", str(level), "--node", ",".join(made.members)]
    dry = run([*command, "--dry-run"])
    assert (dry.returncode, dry.stderr) == (5, "")
    assert "would repair: entries 40 to 44: from" in dry.stdout
    refusal = run([*command[:-1], free_address()])
    assert refusal.returncode == 3
    assert "entry 40 could not be had" in refusal.stderr
    done = run(command)
    assert (done.returncode, done.stderr) == (0, "")
    assert "repairing: entries 40 to 44: from" in done.stdout
    assert contents(level) == whole.repaired
    assert run([*command, "--dry-run"]).returncode == 0
    assert run([*command[:-1], "nonsense"]).returncode == 2
    assert run(command[:-3]).returncode == 2


def test_a_directory_whose_name_has_a_space(tmp_path: Path) -> None:
    """The command that a node says can be typed as it is said. A node alone has nobody to name: its values and what an
    entry proves by itself come back, anything else of an entry does not."""
    address = free_address()
    with ClusterOfProcesses(1, tmp_path / "a cluster", FAST) as cluster:
        [node] = cluster
        assert node.address != address
        cluster.await_leader()
        with cluster.client() as client:
            for n in range(5):
                client.put("key", n)
        assert node.terminate() == 0
        whole = contents(node.volume)
        damage(node.volume, together(flip(-1, 0), value(lambda _, s: s[:-1] + b"?"), flip(-2, 18)))
        mark = node.mark()
        assert node.start().await_exit() == 3
        command = said_command(node.log_text(since=mark))
        assert "--node" not in command
        assert run(command).returncode == 0
        assert contents(node.volume) == whole.repaired
        damage(node.volume, flip(-1, -2))
        done = run(command)
        assert done.returncode == 3
        assert "there is no other member to ask" in done.stderr


# --- the request `entries` ------------------------------------------------------------------------------------


def test_entries_are_the_committed_ones(made: Made) -> None:
    """README, messages: any node answers `entries` with what it has committed of a range, in order, with the fields of
    a `data` message's entries, and at most batch_bytes at a time; past its commit_id there are none, and its commit_id
    says so; position 0 is no entry."""
    first, second = made.cluster.others(made.patient)

    def ask(node: NodeProcess, start: int, end: int) -> dict[str, Any]:
        answer = node.ask({"type": "entries", "from": start, "to": end}, PATIENCE_S)
        assert answer is not None
        return answer

    one, two = ask(first, 3, 9), ask(second, 3, 9)
    assert one["entries"] == two["entries"]
    assert [entry["commit_id"] for entry in one["entries"]] == list(range(3, 10))
    assert set(one["entries"][0]) == {"term", "commit_id", "time", "checksum", "command"}
    last = one["commit_id"]
    assert ask(first, last, 2**63 - 1)["entries"][0]["commit_id"] == last
    assert ask(first, last + 1000, last + 2000) | {"commit_id": 0} == {
        "type": "entries", "data": True, "entries": [], "commit_id": 0,
    }  # fmt: skip
    assert ask(first, 9, 3)["entries"] == []
    assert ask(first, 0, 3)["error"]["code"] == "bad_request"
    with made.cluster.client() as client:
        big = [client.put("big", "x" * 700_000)["commit_id"] for _ in range(3)]
    made.cluster.await_caught_up(big[-1], made.cluster.others(made.patient))
    assert [entry["commit_id"] for entry in ask(second, big[0], big[-1])["entries"]] == [big[0]]


def test_entries_of_a_damaged_member(tmp_path: Path) -> None:
    """A member that finds its own entry damaged says so, goes on, and others can be asked."""
    with ClusterOfProcesses(1, tmp_path, FAST) as cluster:
        [node] = cluster
        cluster.await_leader()
        with cluster.client() as client:
            for n in range(6):
                client.put("key", n)
        assert node.terminate() == 0
        damage(node.volume, flip(3, -2))
        cluster.start()
        cluster.await_leader()
        answer = node.ask({"type": "entries", "from": 1, "to": 6}, PATIENCE_S)
        assert answer is not None
        assert answer["error"]["code"] == "damaged"
        assert "log entry 3 in" in answer["error"]["message"]
        assert node.events("damaged_entry")
        with cluster.client() as client:
            assert client.get("key") == 5


def test_who_asks_for_entries_and_takes_none_costs_no_memory(made: Made) -> None:
    """A client asks for large entries many times over on one connection and reads nothing: the node gives no more than
    goes into the buffers (TRAPS 38), serves others meanwhile, and when the client reads, every answer comes."""
    node, count = made.cluster.others(made.patient)[0], 100
    with made.cluster.client() as client:
        big = client.put("large", "x" * 700_000)["commit_id"]
    made.cluster.await_caught_up(big, [node])

    def memory() -> int:
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{node.pid}/status").read_text())
        assert found
        return int(found[1]) * 1024

    before = memory()
    with socket.create_connection(parse_address(node.address), PATIENCE_S) as connection:
        asked = [{"type": "entries", "from": big, "to": big, "id": n} for n in range(count)]
        connection.sendall(b"".join(compact(request) + b"\n" for request in asked))
        for _ in range(5):
            assert node.ask({"type": "ping"}, PATIENCE_S)
        assert memory() - before < 30_000_000
        with connection.makefile("rb") as stream:
            answers = [json.loads(stream.readline()) for _ in range(count)]
    assert sorted(answer["id"] for answer in answers) == list(range(count))
    assert all(answer["entries"][0]["commit_id"] == big for answer in answers)
