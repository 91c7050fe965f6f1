"""`raftnode-inspect` and the tail: entries that are nowhere but there are seen as if LMDB had them, on dead directories
and beside nodes that write; what is lost of it is told.

The expected answers come from the store that wrote, or from what clients were told.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import lmdb
import pytest
from msgspec import Raw
from test_inspector import ROOT, TIME, change, fill, flip, inspect, lines, new_store
from test_processes import numbered, seeded

from raftnode import records, tail
from raftnode.config import GIB, Settings
from raftnode.errors import StoreDamaged
from raftnode.inspection import Directory, LogReading
from raftnode.messages import Entry, PutCommand, encode_command
from raftnode.store import Store
from raftnode.tail import BLOCK, SECTOR
from raftnode.testing.processes import NodeProcess, Writers, free_address, wait_until

IN_LMDB: Final = 20
BATCHES: Final = ((30,), (1500, 30), (30,), (5000,), (30, 600))
"""Sizes of the values of the entries that go to the tail, record by record."""
STARTS: Final = (0, BLOCK, 2 * BLOCK, 3 * BLOCK, 5 * BLOCK)
"""Where each of these records stands in the file."""
IN_TAIL: Final = ((21,), (22, 23), (24,), (25,), (26, 27))
"""The entries of each."""
LAST: Final = 27
WHOLE: Final = range(1, LAST + 1)


def key_of(commit_id: int) -> str:
    """Of the entries in the tail: some change what is in LMDB, and some are new."""
    return f"k{commit_id % 23:05}"


def append(store: Store, commit_id: int, size: int) -> None:
    command = PutCommand(namespace="default", key=key_of(commit_id), value=Raw(b'"%s"' % (b"t" * size)))
    assert store.journal.append(3, TIME + commit_id, encode_command(command)).commit_id == commit_id


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Entry]]:
    """A directory as a crash leaves it, with its newest entries only in the tail, and all entries, by the store."""
    path = tmp_path_factory.mktemp("made") / "d"
    store = new_store(path)
    fill(store, IN_LMDB)
    for commit_ids, sizes in zip(IN_TAIL, BATCHES, strict=True):
        for commit_id, size in zip(commit_ids, sizes, strict=True):
            append(store, commit_id, size)
        assert store.extend_tail()
    entries = store.journal.entries(1, LAST, GIB)
    store.close()
    assert in_lmdb(path) == list(range(1, IN_LMDB + 1))
    return path, list(entries)


@pytest.fixture
def crashed(made: tuple[Path, list[Entry]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "d"))


def in_lmdb(path: Path) -> list[int]:
    """The positions that LMDB's log has."""
    with (
        lmdb.open(str(path / records.DATA_FILE), subdir=False, readonly=True, max_dbs=16, lock=False) as env,
        env.begin(db=env.open_db(records.LOG, create=False)) as txn,
    ):
        return [records.position_of(key) for key in txn.cursor().iternext(values=False)]


def opened(path: Path) -> Directory:
    return Directory(path, Settings().map_bytes)


def read(path: Path) -> tuple[list[int], dict[int, str]]:
    """The entries that can be read, and what is wrong with the others."""
    with opened(path) as directory:
        found = list(directory.entries())
        assert directory.kept == sum(record.entry is not None for record in found)
    sound = [record.commit_id for record in found if not record.damage]
    lost = {
        commit_id: record.damage
        for record in found
        if record.damage
        for commit_id in range(record.commit_id, (record.to or record.commit_id) + 1)
    }
    return sound, lost


def damage(path: Path, at: int, content: bytes | None = None) -> None:
    """Write into the tail past the store; by default, flip one bit."""
    file = bytearray((path / records.TAIL_FILE).read_bytes())
    new = bytes([file[at] ^ 1]) if content is None else content
    file[at : at + len(new)] = new
    (path / records.TAIL_FILE).write_bytes(file)


# --- as if they were in LMDB ----------------------------------------------------------------------------------


def test_entries_that_are_only_in_the_tail(made: tuple[Path, list[Entry]]) -> None:
    """Seven entries are in five records of the tail, and LMDB's log ends before them. `log` lists them with all that
    the store says of them, as staged; `info` counts them and has the last of them as the end of the log; `verify` reads
    them and finds nothing wrong; nothing is written by that."""
    path, entries = made
    before = {file.name: file.read_bytes() for file in path.iterdir() if file.name != f"{records.DATA_FILE}-lock"}
    listed = lines(inspect("log", path, "--json", "--values").stdout, "entry")
    shown = [(line["commit_id"], line["term"], line["time"], line["state"]) for line in listed]
    committed = dict.fromkeys(range(1, IN_LMDB + 1), "committed")
    assert shown == [(e.commit_id, e.term, e.time, committed.get(e.commit_id, "staged")) for e in entries]
    sizes = itertools.chain(*BATCHES)
    assert {line["commit_id"]: (line["key"], line["value"]) for line in listed[IN_LMDB:]} == {
        commit_id: (key_of(commit_id), "t" * size)
        for commit_id, size in zip(itertools.chain(*IN_TAIL), sizes, strict=True)
    }
    info = lines(inspect("info", path, "--json").stdout)[0]
    assert (info["entries"], info["staged"], info["commit_id"]) == (LAST, LAST - IN_LMDB, IN_LMDB)
    last = entries[-1]
    assert info["last"] == {"commit_id": LAST, "term": 3, "time": last.time, "checksum": f"{last.checksum:08x}"}
    assert "damaged" not in info
    result = inspect("verify", path, "--json")
    verified = lines(result.stdout, "verified")[0]
    assert result.exit_code == 0
    assert (verified["entries"], verified["last"], verified["problems"]) == (LAST, LAST, 0)
    assert verified["replayed_to"] == IN_LMDB
    table = inspect("log", path, "--staged").stdout.splitlines()
    assert [row.split()[0] for row in table] == ["commit_id", *map(str, range(IN_LMDB + 1, LAST + 1))]
    assert before == {
        file.name: file.read_bytes() for file in path.iterdir() if file.name != f"{records.DATA_FILE}-lock"
    }


COMMANDS: Final = {
    "log": ("log", "--values"),
    "the end of the log": ("log", "--tail", "3"),
    "from the end of LMDB on": ("log", "--from", str(IN_LMDB), "--to", str(IN_LMDB + 2)),
    "a term": ("log", "--term", "3", "--tail", "2"),
    "a key": ("log", "--key", key_of(LAST)),
    "commits": ("commits",),
    "state": ("state",),
    "history": ("history", key_of(LAST)),
    "info": ("info",),
    "verify": ("verify",),
    "timeline": ("timeline",),
    "best": ("best",),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_command_says_what_it_says_when_lmdb_has_them(crashed: Path, command: tuple[str, ...]) -> None:
    """The same directory before and after a store has started on it, which takes the tail into LMDB: each command says
    the same, as JSON and as a table; but for the sizes in `info`."""

    def said() -> tuple[int, list[dict[str, Any]], list[str]]:
        results = [inspect(command[0], crashed, *command[1:], *more) for more in (["--json"], [])]
        found = lines(results[0].stdout)
        for line in found:
            line.pop("sizes", None)
        return results[0].exit_code, found, [] if command == ("info",) else results[1].stdout.splitlines()

    before = said()
    Store("database", crashed).close()
    assert in_lmdb(crashed) == list(WHOLE)
    assert said() == before


def test_a_directory_that_has_them_in_lmdb_is_no_different(crashed: Path, tmp_path: Path) -> None:
    """`diff` of the directory and of a copy on which a store has started: the logs are equal to the end."""
    copy = shutil.copytree(crashed, tmp_path / "copy")
    Store("database", copy).close()
    result = inspect("diff", crashed, copy, "--json")
    pair = lines(result.stdout, "pair")[0]
    assert (pair["equal_to"], pair["differ_at"]) == (LAST, None)
    assert {line["last"] for line in lines(result.stdout, "member")} == {LAST}
    assert result.exit_code == 0


def test_what_an_older_generation_left_is_not_shown(tmp_path: Path) -> None:
    """Entries were taken over into LMDB, and one of them was cut: what is still to be read of it in the tail's file is
    no entry any more."""
    store = new_store(tmp_path / "d")
    fill(store, 3)
    append(store, 4, 30)
    append(store, 5, 30)
    assert store.extend_tail()
    kept = store.journal.mark_at(4)
    append(store, 6, 30)
    assert store.extend_tail()
    store.write(keys=0)
    assert kept.id.commit_id == 4
    store.close()
    change(tmp_path / "d", records.LOG, lambda txn, db: [txn.delete(records.log_key(n), db=db) for n in (5, 6)])
    assert b'"key":"k00006"' in (tmp_path / "d" / records.TAIL_FILE).read_bytes()
    assert read(tmp_path / "d") == ([1, 2, 3, 4], {})


# --- damage ---------------------------------------------------------------------------------------------------


def check_told(path: Path, words: str, lost: list[int], unknown: frozenset[int] = frozenset()) -> None:
    """What is lost is told by `verify`, `info` and `log`, with status 4, and all else is read. `unknown`: entries
    behind the last one that is told as lost, of which nothing can be known."""
    sound, told = read(path)
    assert list(told) == lost
    assert all(words in reason for reason in told.values())
    assert sound == [commit_id for commit_id in WHOLE if commit_id not in lost and commit_id not in unknown]
    verify = inspect("verify", path, "--json")
    problems = lines(verify.stdout, "problem")
    assert verify.exit_code == 4
    found = [line for line in problems if line["check"] == "entry"]
    assert [n for line in found for n in range(line["commit_id"], line["to"] + 1)] == lost
    assert all(words in line["reason"] for line in found)
    assert all(line["check"] in ("entry", "facts") for line in problems)
    assert lines(verify.stdout, "verified")[0]["first_bad"] == lost[0]
    info = inspect("info", path, "--json")
    line = lines(info.stdout)[0]
    assert (info.exit_code, line["damaged"], line["entries"]) == (4, True, len(sound))
    assert line["reason"].count(words) == 1, line["reason"]
    assert f"entry {lost[-1]}" in line["reason"] or f" {lost[-1]} are lost" in line["reason"]
    assert words in inspect("info", path).stdout
    log = inspect("log", path, "--json")
    assert log.exit_code == 4
    assert [one["commit_id"] for one in lines(log.stdout, "entry")] == sound
    assert words in inspect("log", path).stdout


@pytest.mark.parametrize("number", range(len(STARTS)))
@pytest.mark.parametrize("sector", ["first", "last"])
def test_a_flipped_bit(crashed: Path, number: int, sector: str) -> None:
    """A bit is wrong in the first or last sector of one record of the tail. Its entries are told as lost, with the
    place in the file; how many the last record had can't be known, so there it is one at least. All others are read."""
    start = STARTS[number]
    size = sum(BATCHES[number]) + 40 * len(BATCHES[number])
    damage(crashed, start + 100 + (size // SECTOR * SECTOR if sector == "last" else 0))
    lost, unknown = list(IN_TAIL[number]), frozenset[int]()
    if number == len(STARTS) - 1:
        lost, unknown = lost[:1], frozenset(lost[1:])
    words = f"raftnode.tail: what stands at byte {start} does not match its checksum"
    check_told(crashed, words, lost, unknown)


def test_two_damaged_records(crashed: Path) -> None:
    """The second and the fourth record are damaged: each lost entry is told with the place that it was lost at."""
    damage(crashed, STARTS[1] + 20)
    damage(crashed, STARTS[3] + 20)
    sound, told = read(crashed)
    assert sound == [commit_id for commit_id in WHOLE if commit_id not in (22, 23, 25)]
    assert {commit_id: f"at byte {STARTS[1 if commit_id < 25 else 3]} " in told[commit_id] for commit_id in told} == {
        22: True,
        23: True,
        25: True,
    }
    reason = lines(inspect("info", crashed, "--json").stdout)[0]["reason"]
    assert "entries 22 to 23 are lost" in reason
    assert "entry 25 is lost" in reason


def test_a_file_that_is_gone_or_cut_off(crashed: Path) -> None:
    """Without the file, and with a part of it, nothing of it can be read: what LMDB has is shown, and that there may
    have been more is told, at the position that would be the next."""
    file, rest = crashed / records.TAIL_FILE, frozenset(range(IN_LMDB + 2, LAST + 1))
    content = file.read_bytes()
    file.write_bytes(content[: 3 * BLOCK])
    check_told(crashed, f"raftnode.tail has {3 * BLOCK} of {len(content)} bytes", [IN_LMDB + 1], rest)
    file.unlink()
    check_told(crashed, "raftnode.tail is gone or empty", [IN_LMDB + 1], rest)


def test_a_file_that_cannot_be_read(crashed: Path) -> None:
    """The system refuses to read the file (a directory stands in its place): told, and what LMDB has is shown."""
    (crashed / records.TAIL_FILE).unlink()
    (crashed / records.TAIL_FILE).mkdir()
    words = "raftnode.tail can't be read: Is a directory"
    check_told(crashed, words, [IN_LMDB + 1], frozenset(range(IN_LMDB + 2, LAST + 1)))


def test_a_damaged_fact(crashed: Path) -> None:
    """LMDB's record of the tail is damaged, so nothing can be told of the file: both are said, the record as one of the
    node's, and the next position as one that may be lost."""
    flip(crashed, records.META, b"tail", -1)
    words = "the record 'tail' of the node is damaged or missing: raftnode.tail may hold entry 21 and later ones"
    check_told(crashed, words, [IN_LMDB + 1], frozenset(range(IN_LMDB + 2, LAST + 1)))
    facts = [
        line["reason"] for line in lines(inspect("verify", crashed, "--json").stdout) if line.get("check") == "facts"
    ]
    assert facts == ["the record 'tail' of the node does not match its checksum"]


def test_a_missing_fact(crashed: Path) -> None:
    """The record is gone: the same, as a node does not start on such a directory."""
    change(crashed, records.META, lambda txn, db: txn.delete(b"tail", db=db))
    words = "the record 'tail' of the node is damaged or missing: raftnode.tail may hold entry 21 and later ones"
    check_told(crashed, words, [IN_LMDB + 1], frozenset(range(IN_LMDB + 2, LAST + 1)))
    facts = [
        line["reason"] for line in lines(inspect("verify", crashed, "--json").stdout) if line.get("check") == "facts"
    ]
    assert facts == ["the record 'tail' of the node is missing"]
    with pytest.raises(StoreDamaged, match="does not say whether it has a tail"):
        Store("database", crashed)


def test_a_torn_record_is_no_damage(crashed: Path) -> None:
    """The last sectors of the last record are zeros again, as a power cut leaves a write under way: its entries were
    never acknowledged, are not shown, and nothing is told as damaged."""
    size = sum(BATCHES[-1]) + 40 * len(BATCHES[-1])
    start = STARTS[-1] + size // SECTOR * SECTOR
    damage(crashed, start, bytes(SECTOR))
    kept = list(range(1, IN_TAIL[-1][0]))
    assert read(crashed) == (kept, {})
    info = inspect("info", crashed, "--json")
    assert (info.exit_code, lines(info.stdout)[0]["entries"], lines(info.stdout)[0]["last"]["commit_id"]) == (0, 25, 25)
    verify = inspect("verify", crashed, "--json")
    assert (verify.exit_code, lines(verify.stdout, "verified")[0]["last"]) == (0, 25)


def test_a_hole_in_lmdb_is_not_one_of_the_tail(tmp_path: Path) -> None:
    """A staged entry in the middle of LMDB's log is gone. Those in the tail follow the newest one in LMDB all the same:
    only the hole is told, and nothing of the tail."""
    store = new_store(tmp_path / "d")
    fill(store, 5)
    for commit_id in range(6, 11):
        append(store, commit_id, 30)
    store.write(keys=0)
    append(store, 11, 30)
    assert store.extend_tail()
    store.close()
    change(tmp_path / "d", records.LOG, lambda txn, db: txn.delete(records.log_key(8), db=db))
    with opened(tmp_path / "d") as directory:
        assert directory.tail_damage == ()
    assert read(tmp_path / "d") == ([1, 2, 3, 4, 5, 6, 7, 9, 10, 11], {8: "entry 8: not in the log"})


def test_damage_for_a_moment_is_none(crashed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that is being written at this moment may look damaged to who reads it: what is not there any more when
    it is read again is not told."""
    looks, whole = iter(range(100)), (crashed / records.TAIL_FILE).read_bytes()
    damage(crashed, STARTS[-1] + 20)
    look = tail.look

    def until_it_is_written(*arguments: Any) -> tail.Found:
        if next(looks) == 2:
            (crashed / records.TAIL_FILE).write_bytes(whole)
        return look(*arguments)

    monkeypatch.setattr(tail, "look", until_it_is_written)
    assert read(crashed) == (list(WHOLE), {})


# --- beside a writer ------------------------------------------------------------------------------------------

WRITER: Final = """
import sys
from test_inspector_tail import append
from raftnode.config import Settings
from raftnode.store import Store
store = Store("database", sys.argv[1], settings=Settings(tail_bytes=8192))
store.write()
for line in sys.stdin:
    for word in line.split():
        if word == "write":
            store.write(keys=0)
        else:
            append(store, store.journal.last.id.commit_id + 1, 30)
            store.extend_tail() or store.write(keys=0)
    print(store.journal.last.id.commit_id, flush=True)
store.close()
"""


class Writer:
    """A store in a process of its own, which writes what it is told: `tail` for an entry to the tail, or in a
    transaction once two are there, `write` for a transaction. Public facts: `last`, the newest entry, which is durable.
    """

    def __init__(self, path: Path) -> None:
        search = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
        self._process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": search},
        )
        self.last = 0
        self("")

    def __call__(self, words: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{words}\n")
        self._process.stdin.flush()
        self.last = int(self._process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    """A store on a directory with five entries."""
    store = new_store(tmp_path / "d")
    fill(store, 5)
    store.close()
    with Writer(tmp_path / "d") as running:
        yield running


def test_each_look_sees_what_is_in_the_tail_by_then(writer: Writer, tmp_path: Path) -> None:
    """The tail grows without a transaction: each look of an open directory sees it, and a reading goes on over the end
    of the tail, into LMDB and into the next tail, each entry once."""
    with opened(tmp_path / "d") as directory:
        reading, found = LogReading(directory, 1, lambda _: pytest.fail("nothing was cut")), []
        for words in ("tail", "", "tail", "write tail", "write", "", "tail tail write tail"):
            writer(words)
            directory.release()
            found += list(reading.upto(GIB))
            assert directory.last == writer.last == directory.kept
    assert [record.commit_id for record in found] == list(range(1, writer.last + 1))
    assert not any(record.damage for record in found)


@pytest.mark.parametrize("times", [1, 5, 1000])
@pytest.mark.parametrize("words", ["write tail", "write tail tail", "write"])
def test_a_tail_that_is_taken_over_while_it_is_read(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, words: str
) -> None:
    """Right before the file is read, and after LMDB's side of the look was, the node takes the tail over and overwrites
    it: once, a few times, and however often the look is taken anew. What was durable before the look is seen each time,
    and nothing is told as damaged or cut; nor when the look after that one is undisturbed, and so on by turns."""
    look, left = tail.look, 0

    def hurried(*arguments: Any) -> tail.Found:
        nonlocal left
        if left:
            left -= 1
            writer("tail " + words if words == "write" else words)
        return look(*arguments)

    writer("tail tail")
    monkeypatch.setattr(tail, "look", hurried)
    left = times
    with opened(tmp_path / "d") as directory:
        reading, found, last = LogReading(directory, 1, lambda _: pytest.fail("nothing was cut")), [], 0
        for number in range(6):
            assert directory.last >= max(last, 7)
            last, durable, left = directory.last, writer.last, times * (number % 2)
            directory.release()
            found += list(reading.upto(GIB))
            assert directory.last >= max(last, durable)
            assert directory.kept == directory.last
            assert directory.tail_damage == ()
    assert [record.commit_id for record in found] == list(range(1, len(found) + 1))
    assert not any(record.damage for record in found)


@pytest.mark.parametrize("is_kept", [False, True], ids=["opened anew", "kept open"])
def test_a_node_under_writes(tmp_path: Path, is_kept: bool) -> None:
    """A node writes for several clients, and its tail is so small that it takes it over again and again. Whoever opens
    the directory finds all that was acknowledged by then, and so does each new look of one that is kept open; the end
    of the log never falls. Each entry is read once, and is what its client has put."""
    address = free_address()
    node = NodeProcess(address, [address], tmp_path, {"RAFTNODE_TAIL_BYTES": "8192"})
    node.start().await_answer()
    found: dict[int, Entry] = {}
    generations: set[int] = set()
    in_tail = last = 0

    def look(directory: Directory, told: int) -> None:
        nonlocal in_tail, last
        for record in LogReading(directory, max(1, last)).upto(directory.last):
            assert record.entry is not None, record.damage
            assert not record.damage
            assert found.setdefault(record.commit_id, record.entry) == record.entry
        assert directory.last >= max(last, told)
        assert directory.tail_damage == ()
        last = directory.last
        assert directory._tail_fact is not None
        generations.add(directory._tail_fact.generation)
        in_tail += bool(directory._tail.records)

    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(opened(node.volume)) if is_kept else None
        writers = stack.enter_context(Writers([address], numbered("w", seeded(5), largest=300)))

        def look_again() -> bool:
            told = max((done.commit_id for done in list(writers.acknowledged)), default=0)
            if kept is None:
                with opened(node.volume) as fresh:
                    look(fresh, told)
            else:
                kept.look_again()
                assert kept.look_up(max(1, told))[0] is not None
                look(kept, told)
            return len(generations) > 100 and in_tail > 20

        wait_until(look_again, "many generations", explain=lambda: f"{len(generations)}, {in_tail} with entries")
        writers.stop()
        look_again()
        acknowledged = list(writers.acknowledged)
    node.kill()
    assert list(found) == list(range(1, last + 1))
    assert {done.commit_id: (done.record.key, done.record.value) for done in acknowledged} == {
        done.commit_id: put_by(found[done.commit_id]) for done in acknowledged
    }


def put_by(entry: Entry) -> tuple[str, object]:
    command = json.loads(bytes(memoryview(entry.command)))
    return command["key"], command["value"]
