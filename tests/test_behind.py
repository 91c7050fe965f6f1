"""Reading a directory while a flush is under way: on disk the values are of two times, and what is shown is of one.

The truth is a plain replay of what was put and deleted, kept here beside the store. The directories are as a node
leaves them that is killed after each number of written values.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import lmdb
import pytest
from msgspec import Raw
from test_inspector import ADDRESS, TIME, change, flip, inspect, lines

from raftnode import inspection, overlay, records, verification
from raftnode.config import GIB, Settings
from raftnode.consensus.ballot import Ballot
from raftnode.inspection import Directory, StoredValue
from raftnode.messages import DeleteCommand, PutCommand, encode_command
from raftnode.namespaces import Behind
from raftnode.records import Record
from raftnode.store import Store
from raftnode.verification import Problem, Verified, verify

BEFORE: Final = 60
"""So many entries are on disk for all keys ..."""
AFTER: Final = 120
"""... and so many are committed when the flush begins. The last ones are staged."""
LAST: Final = 125
SPACES: Final = ("a", "b", "new", "z")
HEADER: Final = 36
"""Bytes before a value on disk."""

State = dict[tuple[str, str], tuple[int, int, int, str]]
"""By namespace and key: created, modified, version and value."""


# --- the directories, and the truth ---------------------------------------------------------------------------


def make_changes() -> list[tuple[str, str, str | None]]:
    """Puts and, with None, deletes. A namespace comes with the flush, and one goes."""
    chance = random.Random(7)
    found: list[tuple[str, str, str | None]] = []
    for number in range(1, LAST + 1):
        spaces = ("a", "b", "z") if number <= BEFORE else ("a", "b", "new")
        value = None if chance.random() < 0.3 else json.dumps(f"{number}{'x' * chance.randrange(40)}")
        found.append((chance.choice(spaces), f"{chance.choice('kl')}{chance.randrange(12)}", value))
    gone = [("z", key, None) for space, key in replay(found, BEFORE) if space == "z"]
    found[BEFORE : BEFORE + len(gone)] = gone
    return found


def replay(changes: list[tuple[str, str, str | None]], upto: int) -> State:
    state: State = {}
    for commit_id, (space, key, value) in enumerate(changes[:upto], 1):
        if value is None:
            state.pop((space, key), None)
        else:
            created, _, version, _ = state.get((space, key), (commit_id, 0, 0, ""))
            state[space, key] = created, commit_id, version + 1, value
    return state


CHANGES: Final = make_changes()


def append(store: Store, changes: list[tuple[str, str, str | None]]) -> None:
    for number, (space, key, value) in enumerate(changes):
        put = PutCommand(namespace=space, key=key, value=Raw((value or "").encode()))
        command = DeleteCommand(namespace=space, key=key) if value is None else put
        store.journal.append(3, TIME + number, encode_command(command))
    store.write(keys=0)


def flush(store: Store, upto: int, written: int) -> None:
    """Carry out what is committed, and write so many values."""
    store.apply(store.journal.entries(store.commit_id + 1, upto, GIB))
    for _ in range(written):
        store.write(keys=1)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory before the flush begins."""
    path = tmp_path_factory.mktemp("made") / "before"
    store = Store("database", path)
    store.found(ADDRESS, [])
    store.write(Ballot(3, ADDRESS))
    append(store, CHANGES)
    store.apply(store.journal.entries(1, BEFORE, GIB))
    store.write()
    store.close()
    return path


def leaving() -> int:
    """How many values the flush writes."""
    then = replay(CHANGES, BEFORE)
    return len({(space, key) for space, key, value in CHANGES[BEFORE:AFTER] if value or (space, key) in then})


@pytest.fixture
def behind(before: Path, tmp_path: Path) -> Callable[[int], Path]:
    """Makes a directory of which so many values are written."""

    def make(written: int) -> Path:
        path = tmp_path / f"written-{written}"
        shutil.copytree(before, path)
        store = Store("database", path)
        flush(store, AFTER, written)
        store.close()
        return path

    return make


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Directory]:
    with Directory(path, Settings().map_bytes) as directory:
        yield directory


def told(values: Iterator[StoredValue]) -> State:
    """What was shown, in which nothing may be damaged, out of order or shown twice."""
    found = list(values)
    assert [value.damage for value in found if value.damage] == []
    where = [(value.namespace or "", value.key or "") for value in found]
    assert where == sorted(set(where))
    return {at: as_told(value.record) for at, value in zip(where, found, strict=True)}


def as_told(record: Record | None) -> tuple[int, int, int, str]:
    assert record is not None
    return record.created, record.modified, record.version, bytes(record.value).decode()


def sizes(state: State) -> list[tuple[str, int, int]]:
    """What each namespace holds: name, keys, bytes."""
    of = {space: [at for at in state if at[0] == space] for space in sorted({space for space, _ in state})}
    size = {at: len(at[1]) + HEADER + len(value[3]) for at, value in state.items()}
    return [(space, len(keys), sum(size[at] for at in keys)) for space, keys in of.items()]


def verified(path: Path) -> tuple[list[Problem], Verified]:
    found: list[Problem] = []
    return found, verify(path, Settings().map_bytes, found.append, lambda _: None)


# --- one state ------------------------------------------------------------------------------------------------


def test_one_state_is_shown_wherever_the_flush_stands(behind: Callable[[int], Path]) -> None:
    """After each number of written values: all values, those of a namespace, of a prefix in it and in all, the number
    of keys, and the size of each namespace are those of a plain replay up to the commit_id on disk, with creation and
    version. Some of them are not on disk so, and the verification, which looks at what is, finds nothing wrong."""
    count = leaving()
    assert count > 30
    for written in range(count + 1):
        path = behind(written)
        truth = replay(CHANGES, AFTER if written else BEFORE)
        with opened(path) as directory:
            assert (directory.facts.behind is not None) == (0 < written < count)
            assert directory.committed == (AFTER if written else BEFORE)
            assert told(directory.values()) == truth
            assert directory.keys == len(truth)
            for space in SPACES:
                of_space = {at: value for at, value in truth.items() if at[0] == space}
                assert told(directory.values(space)) == of_space
                assert told(directory.values(space, "k1")) == {
                    at: value for at, value in of_space.items() if at[1].startswith("k1")
                }
            assert told(directory.values(prefix="l")) == {
                at: value for at, value in truth.items() if at[1].startswith("l")
            }
            found = directory.namespaces(lambda _: None)
            assert [(size.namespace, size.keys, size.bytes) for size in found] == sizes(truth)
        with opened(path) as directory:
            directory.as_on_disk = True
            assert (told(directory.values()) != truth) == (0 < written < count)
        problems, result = verified(path)
        assert (problems, result.replayed_to) == ([], directory.committed)


def test_the_commands_show_it(behind: Callable[[int], Path]) -> None:
    """`state` and `info` tell what `state --at` makes of the log, which looks at no value; `info` tells that a flush is
    under way, and from which key on, and with `diff` the node differs in nothing from itself after the flush."""
    half, whole = behind(leaving() // 2), behind(leaving())
    at = lines(inspect("state", half, "--at", AFTER, "--json").stdout)
    assert lines(inspect("state", half, "--json").stdout) == at
    node, *spaces = lines(inspect("info", half, "--json").stdout)
    assert node["keys"] == len(at) == sum(space["keys"] for space in spaces)
    with opened(half) as directory:
        assert directory.facts.behind is not None
        space, key = directory.facts.behind.key.split("\0")
    assert node["behind"] == {"after": BEFORE, "namespace": space, "key": key}
    assert f"from {key!r} in namespace {space!r} on are as of commit_id {BEFORE}" in inspect("info", half).stdout
    assert lines(inspect("info", whole, "--json").stdout)[0]["behind"] is None
    result = inspect("diff", half, whole, "--json")
    assert result.exit_code == 0
    assert lines(result.stdout)[-1]["keys"] == 0


def count_overlays(monkeypatch: pytest.MonkeyPatch) -> list[Behind]:
    """How far the disk was behind, each time that entries were carried out."""
    made: list[Behind] = []

    def counted(behind: Behind, *more: Any) -> overlay.Overlay:
        made.append(behind)
        return overlay.carry_out(behind, *more)

    monkeypatch.setattr(inspection, "carry_out", counted)
    return made


def test_who_reads_the_log_does_not_pay(behind: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies over the values is made once for a listing, and by no command that shows none."""
    path, made = behind(10), count_overlays(monkeypatch)
    for words in (["log"], ["commits"], ["history", "k1", "--namespace", "a"], ["state", "--at", 100], ["verify"]):
        assert inspect(words[0], path, *words[1:]).exit_code == 0
    assert not made
    with opened(path) as directory:
        for _ in directory.values(prefix="k"):
            directory.release()
        assert directory.keys
    assert len(made) == 1


# --- damage ---------------------------------------------------------------------------------------------------


def test_a_damaged_entry_that_is_needed_is_told(behind: Callable[[int], Path]) -> None:
    """One of the entries that are not in place on disk is damaged: `state` says which, and which values may be wrong
    for it, shows all the others, and ends with the status of damage; `info` and `diff` say so, too. A listing of what
    the entry can't concern, as it is all below, says nothing."""
    path = behind(20)
    whole = shutil.copytree(path, path.parent / "whole")
    flip(path, records.LOG, records.log_key(AFTER - 5), 30)
    with opened(path) as directory:
        assert directory.behind is not None
        space, key = directory.behind.key.split("\0")
        assert space == "b"
        damage = [value.damage for value in directory.values() if value.damage]
        assert list(directory.values("a")) == [value for value in directory.values() if value.namespace == "a"]
    assert damage == [
        f"entry {AFTER - 5} does not match its checksum; values from {key!r} in namespace {space!r} on may be older "
        f"than commit_id {AFTER}, or wrong"
    ]
    result = inspect("state", path, "--json")
    found = lines(result.stdout)
    assert result.exit_code == 4
    assert [line["reason"] for line in found if "reason" in line] == damage
    assert len(found) >= len(replay(CHANGES, AFTER))
    for words in (["info", path], ["diff", path, whole]):
        assert damage[0] in inspect(*words, "--json").stdout


@pytest.mark.parametrize("missing", [1, 3])
def test_missing_entries_that_are_needed_are_told(behind: Callable[[int], Path], missing: int) -> None:
    """The same for entries that are not there: the others are carried out."""
    path = behind(20)
    first = BEFORE + 20

    def lose(txn: lmdb.Transaction, db: Any) -> None:
        for commit_id in range(first, first + missing):
            txn.delete(records.log_key(commit_id), db=db)

    change(path, records.LOG, lose)
    with opened(path) as directory:
        found = list(directory.values())
    damage = [value.damage for value in found if value.damage]
    which = f"entry {first}:" if missing == 1 else f"entries {first} to {first + missing - 1}:"
    assert len(damage) == 1
    assert damage[0].startswith(f"{which} not in the log; values from ")
    lost = {(space, key) for space, key, _ in CHANGES[first - 1 : first - 1 + missing]}
    truth = replay(CHANGES, AFTER)
    shown = {(value.namespace, value.key): as_told(value.record) for value in found if value.record}
    assert {at: value for at, value in truth.items() if at not in lost} == {
        at: value for at, value in shown.items() if at not in lost
    }


def test_entries_before_the_kept_log_are_missing(behind: Callable[[int], Path]) -> None:
    """A record that says that values are as of a time before the kept log can't be right: the values say so, and the
    verification."""
    path = behind(20)
    wrong = records.pack_meta(b"behind", Behind(BEFORE, "b\0k"))
    with opened(path) as directory:
        base = next(directory.entries(BEFORE + 10, BEFORE + 10)).entry
    assert base is not None

    def shorten(txn: lmdb.Transaction, db: Any) -> None:
        for commit_id in range(1, base.commit_id + 1):
            txn.delete(records.log_key(commit_id), db=db)

    mark = {"id": {"term": base.term, "commit_id": base.commit_id}, "checksum": base.checksum}
    change(path, records.LOG, shorten)
    change(path, records.META, lambda txn, db: txn.put(b"base", records.pack_meta(b"base", mark), db=db))
    change(path, records.META, lambda txn, db: txn.put(b"behind", wrong, db=db))
    with opened(path) as directory:
        damage = [value.damage for value in directory.values() if value.damage]
    assert [text.partition(";")[0] for text in damage] == [f"entries {BEFORE + 1} to {BEFORE + 10}: not in the log"]
    assert [problem.check for problem in verified(path)[0]] == ["facts"]


def test_a_damaged_record_of_the_flush_is_told(behind: Callable[[int], Path]) -> None:
    """Without it nobody knows which values are old: it is told as every damaged fact, and of the values as well."""
    path = behind(20)
    flip(path, records.META, b"behind", 8)
    result = inspect("state", path, "--json")
    reasons = [line["reason"] for line in lines(result.stdout) if "reason" in line]
    assert result.exit_code == 4
    assert reasons == [
        "the record 'behind' of the node does not match its checksum",
        f"which values are older than commit_id {AFTER} can't be told: the record 'behind' is damaged",
    ]
    node = lines(inspect("info", path, "--json").stdout)[0]
    assert (node["behind"], node["damaged"]) == (None, True)
    problems, found = verified(path)
    assert {problem.check for problem in problems} == {"facts", "value"}
    assert found.why_not_replayed == reasons[1]


def stored_behind(path: Path, is_deleted: bool) -> tuple[str, str, bytes]:
    """A key that is on disk as it was before the flush, and that the flush changes, or deletes: namespace, key, store
    key."""
    then, now = replay(CHANGES, BEFORE), replay(CHANGES, AFTER)
    touched = {(space, key) for space, key, _ in CHANGES[BEFORE:AFTER]}
    with opened(path) as directory:
        assert directory.behind is not None
        start = directory.behind.store_key
    for space, key in sorted(touched & set(then)):
        full = f"{space}\0{key}".encode()
        if full >= start and ((space, key) not in now) == is_deleted:
            return space, key, full
    raise AssertionError("there is none")


@pytest.mark.parametrize("is_deleted", [False, True])
def test_a_damaged_value_below_is_told_once(behind: Callable[[int], Path], is_deleted: bool) -> None:
    """A value does not match its checksum that the log has replaced or deleted since. It is told, once, with what is
    right now; one that was deleted does not count as a key."""
    path = behind(5)
    space, key, full = stored_behind(path, is_deleted)
    flip(path, records.COMMITTED, full, HEADER)
    truth = replay(CHANGES, AFTER)
    with opened(path) as directory:
        found = list(directory.values())
        assert directory.keys == len(truth)
    bad = [value for value in found if value.damage]
    assert [(value.namespace, value.key, value.is_gone) for value in bad] == [(space, key, is_deleted)]
    assert f"the value of key {key!r} in namespace {space!r} does not match its checksum: it is on disk as of" in (
        bad[0].damage
    )
    shown = {(value.namespace, value.key): as_told(value.record) for value in found if value.record}
    assert shown == truth
    assert [(problem.check, problem.key) for problem in verified(path)[0]] == [("value", key)]
    assert inspect("state", path).exit_code == 4


@pytest.mark.parametrize("is_deleted", [False, True])
@pytest.mark.parametrize("what", ["stale", "missing", "too new"])
def test_verification_finds_what_is_wrong_below(behind: Callable[[int], Path], is_deleted: bool, what: str) -> None:
    """A value that the flush has not come to is not what it was at that commit_id: another with a right checksum, none,
    or already what the flush will make of it. One problem tells the key, also when it was deleted since."""
    path = behind(5)
    space, key, full = stored_behind(path, is_deleted)
    now = replay(CHANGES, AFTER).get((space, key))
    wrong = Record(1, 1, 1, 0, Raw(b'"stale"'))
    if what == "too new" and now is not None:
        wrong = Record(*now[:3], 0, Raw(now[3].encode()))
    is_put = what == "stale" or (what == "too new" and not is_deleted)

    def edit(txn: lmdb.Transaction, db: Any) -> None:
        if is_put:
            txn.put(full, records.pack_record(full, wrong), db=db)
        else:
            txn.delete(full, db=db)

    change(path, records.COMMITTED, edit)
    problems, _ = verified(path)
    assert [(problem.check, problem.namespace, problem.key) for problem in problems] == [("replay", space, key)]


@pytest.mark.parametrize("after", [AFTER, AFTER + 1])
def test_verification_finds_a_wrong_record_of_the_flush(behind: Callable[[int], Path], after: int) -> None:
    """Values can't be behind with nothing, or with what is not committed."""
    path = behind(leaving() // 2)
    wrong = records.pack_meta(b"behind", Behind(after, "zz\0"))
    change(path, records.META, lambda txn, db: txn.put(b"behind", wrong, db=db))
    facts = [problem.reason for problem in verified(path)[0] if problem.check == "facts"]
    assert facts == [
        f"values are as of {after} still, by the record 'behind' of the node, but the log begins after 0, and {AFTER} "
        "is committed"
    ]


def test_past_a_page_that_can_not_be_read(tmp_path: Path) -> None:
    """A page of values is lost in the middle of a flush. What it had is told as lost; of the keys that the entries put
    since, the newest values are shown all the same, and nothing is shown twice."""
    path = tmp_path / "paged"
    store = Store("database", path)
    store.found(ADDRESS, [])
    store.write(Ballot(3, ADDRESS))
    first = [("a", f"k{n:03}", json.dumps("y" * 500)) for n in range(60)]
    second: list[tuple[str, str, str | None]] = [("a", f"k{n:03}", json.dumps("new")) for n in range(0, 60, 3)]
    append(store, [*first, *second, ("a", "k0301", "1"), ("a", "k0021", "1")])
    store.apply(store.journal.entries(1, 60, GIB))
    store.write()
    flush(store, 82, 3)
    store.close()
    file = path / records.DATA_FILE
    data = bytearray(file.read_bytes())
    for page in range(0, len(data), 4096):
        if b"a\0k030" in data[page : page + 4096] and data[page + 10] == 2:
            data[page : page + 4096] = b"\xff" * 4096
    file.write_bytes(data)
    with opened(path) as directory:
        found = list(directory.values())
    keys = [value.key for value in found if value.key is not None]
    assert keys == sorted(set(keys))
    lost = {f"k{n:03}" for n in range(60)} - set(keys)
    assert 1 <= len(lost) < 20
    assert not lost & {f"k{n:03}" for n in range(0, 60, 3)}
    assert any("can't be read" in value.damage for value in found if value.key is None)
    newest = {value.key: bytes(value.record.value) for value in found if value.record}
    assert all(newest[key] == b'"new"' for _, key, _ in second)
    assert newest["k0021"] == newest["k0301"] == b"1"
    assert inspect("state", path).exit_code == 4


# --- live -----------------------------------------------------------------------------------------------------

_PROGRAM = """
import sys
from pathlib import Path
from raftnode.config import GIB
from raftnode.store import Store

store = Store("database", Path(sys.argv[1]))
print("open", flush=True)
for line in sys.stdin:
    upto, keys = map(int, line.split())
    if upto > store.commit_id and store.behind is None:
        store.apply(store.journal.entries(store.commit_id + 1, upto, GIB))
    store.write(keys=keys)
    print(store.commit_id_on_disk, flush=True)
store.close()
"""


class Flushing:
    """A node in another process that writes some values each time that it is told to."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-c", _PROGRAM, str(path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._read() == "open"

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def write(self, upto: int, keys: int) -> int:
        """Write so many of a flush, that up to `upto` if none is under way; returns the commit_id on disk."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{upto} {keys}\n")
        self._process.stdin.flush()
        return int(self._read())

    def write_one(self, _: object = None) -> None:
        """One of the flush that is under way."""
        self.write(0, 1)

    def close(self) -> None:
        self._process.communicate(timeout=30)


@pytest.fixture
def node(before: Path, tmp_path: Path) -> Iterator[tuple[Path, Flushing]]:
    path = Path(shutil.copytree(before, tmp_path / "live"))
    flushing = Flushing(path)
    yield path, flushing
    flushing.close()


def test_a_listing_while_a_flush_goes_on(node: tuple[Path, Flushing], monkeypatch: pytest.MonkeyPatch) -> None:
    """With each value that is read the node writes one more, and the reader takes a new look: it overtakes the flush,
    or is overtaken, and shows one state all the same. That counts the keys, and the namespaces, for each of which there
    is a new look, too."""
    path, flushing = node
    made = count_overlays(monkeypatch)
    truth = replay(CHANGES, AFTER)
    flushing.write(AFTER, 1)
    with opened(path) as directory:
        found = []
        for number, value in enumerate(directory.values()):
            found.append(value)
            assert directory.keys == len(truth)
            directory.release()
            if number % 3 == 0:
                flushing.write_one()
        assert told(iter(found)) == truth
        assert directory.behind is not None
        monkeypatch.setattr(inspection, "_COUNTED_AT_ONCE", 2)
        counted = directory.namespaces(flushing.write_one)
        assert [(size.namespace, size.keys, size.bytes) for size in counted] == sizes(truth)
    assert len(made) == 1, "what the flush has come to only goes from what lies over the values"


@pytest.mark.parametrize("ahead", [2, 3])
def test_a_listing_while_one_flush_follows_the_other(node: tuple[Path, Flushing], ahead: int) -> None:
    """The same when the next flushes begin meanwhile: the reader is told as of which commit_id the values are from then
    on, and each of them is."""
    path, flushing = node
    uptos = iter(range(BEFORE + 20, LAST + 1, 15))
    upto = next(uptos)
    flushing.write(upto, 1)
    renewed: list[int] = []
    with opened(path) as directory:
        directory.on_new_look = lambda: renewed.append(directory.committed or 0)
        seen: list[tuple[str, str]] = []
        for value in directory.values():
            committed = directory.committed or 0
            assert not value.damage
            at = value.namespace or "", value.key or ""
            assert as_told(value.record) == replay(CHANGES, committed)[at]
            seen.append(at)
            directory.release()
            if flushing.write(upto, ahead) == upto:
                upto = next(uptos, upto)
        states = [replay(CHANGES, commit_id) for commit_id in range(BEFORE + 20, (directory.committed or 0) + 1)]
    assert seen == sorted(set(seen))
    assert set.intersection(*(set(state) for state in states)) <= set(seen)
    assert renewed == sorted(set(renewed))
    assert renewed


def test_verification_while_flushes_follow_each_other(
    node: tuple[Path, Flushing], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every third record that is looked at the node writes a value, and begins a new flush when one is over:
    nothing is wrong, and the values were held against the log up to a flush that was under way in the end, another than
    in the beginning."""
    path, flushing = node
    monkeypatch.setattr(verification, "_STEP", 1)
    uptos = iter(range(BEFORE + 20, LAST + 1, 15))
    upto = next(uptos)

    looked_at = itertools.count(1)

    def advance(_: int) -> None:
        nonlocal upto
        if next(looked_at) % 3 == 0 and flushing.write(upto, 1) == upto:
            upto = next(uptos, upto)

    flushing.write(upto, 1)
    problems: list[Problem] = []
    result = verify(path, Settings().map_bytes, problems.append, advance)
    assert problems == []
    assert result.facts.behind is not None
    assert BEFORE < result.facts.behind.after < (result.replayed_to or 0)
