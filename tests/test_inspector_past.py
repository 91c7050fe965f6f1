"""`raftnode-inspect log` with its filters, `history` and `state --at`, on a log made by a store from a seed.

The expected answers are computed here from what was appended: by looking at every entry, and by carrying out the puts
and deletes on a dict.
"""

from __future__ import annotations

import random
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from msgspec import Raw, Struct
from test_inspector import ADDRESS, TIME, change, damaged_ids, flip, inspect, lines, new_store
from test_processes import seeded

from raftnode import past, records, selection
from raftnode.config import Settings
from raftnode.consensus.ballot import Ballot
from raftnode.consensus.journal import Mark
from raftnode.inspection import Directory, LogRecord
from raftnode.messages import (
    AnyCommand,
    DeleteCommand,
    Entry,
    EntryId,
    MembersCommand,
    Noop,
    PutCommand,
    encode_command,
)
from raftnode.past import Change
from raftnode.store import Store

COUNT = 1200
COMMITTED = 1150
SEED = 4
KEYS = ["a", "ab", "b", "Zürich", 'quo"te\n', "0"]
SPACES = ["default", "web", "we"]


class Made(Struct):
    """An entry as it was appended."""

    commit_id: int
    term: int
    time: int
    command: AnyCommand

    @property
    def where(self) -> tuple[str, str] | None:
        command = self.command
        return (command.namespace, command.key) if isinstance(command, PutCommand | DeleteCommand) else None

    @property
    def kind(self) -> str:
        return str(type(self.command).__struct_config__.tag)


def random_command(chance: random.Random, number: int) -> AnyCommand:
    """Mostly puts, each with a value of its own; the first entry of a term is a no-op."""
    where = {"namespace": chance.choice(SPACES), "key": chance.choice(KEYS)}
    client = chance.choice(["ann", "bob", "10.0.0.7:43211"])
    kind = chance.random()
    if kind < 0.02:
        return MembersCommand(voters={ADDRESS: "0123456789abcdef"})
    if kind < 0.25:
        return DeleteCommand(**where, client=client)
    return PutCommand(**where, value=value_of(number), client=client)


def value_of(number: int) -> Raw:
    """A value as a client may write it, on two lines."""
    return Raw(f'{{"n": {number},\n "t": "a b"}}'.encode())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Made]]:
    """A log of twelve terms, some of which have left no entry, and of leaders whose clocks are minutes apart."""
    path = tmp_path_factory.mktemp("made") / "random"
    chance = seeded(SEED)
    store = new_store(path)
    entries: list[Made] = []
    term, clock = 3, TIME
    for number in range(1, COUNT + 1):
        is_first = number == 1 or chance.random() < 0.01
        if is_first:
            term += chance.choice((1, 1, 2))
            clock = TIME + 100 * number + chance.randrange(-200_000, 200_000)
            store.write(Ballot(term, ADDRESS))
        clock += chance.randrange(0, 200)
        command = Noop() if is_first else random_command(chance, number)
        if number == COMMITTED:
            command = PutCommand(namespace="default", key="a", value=value_of(number), client="ann")
        store.journal.append(term, clock, encode_command(command))
        entries.append(Made(number, term, clock, command))
        if number == COMMITTED:
            store.write()
            store.commit("default")
    store.write()
    store.close()
    return path, entries


def ids(*arguments: object) -> list[int]:
    result = inspect(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return [line["commit_id"] for line in lines(result.stdout, "entry")]


# --- filters --------------------------------------------------------------------------------------------------


def filters(entries: list[Made]) -> list[tuple[list[object], Callable[[Made], bool]]]:
    """Options, and what they mean."""
    terms = sorted({entry.term for entry in entries})
    gap = next(term for term in range(terms[0], terms[-1]) if term not in terms)
    middle = entries[COUNT // 2].time
    after, before = "2023-11-14T22:14:20", "2023-11-14T23:15:20+01:00"
    return [
        (["--term", terms[3]], lambda e: e.term == terms[3]),
        (["--term", terms[-1]], lambda e: e.term == terms[-1]),
        (["--term", gap], lambda _: False),
        (["--term", 0], lambda _: False),
        (["--term", 10**6], lambda _: False),
        (["--kind", "delete"], lambda e: e.kind == "delete"),
        (["--kind", "members", "--kind", "noop"], lambda e: e.kind in ("members", "noop")),
        (["--namespace", "we"], lambda e: e.where is not None and e.where[0] == "we"),
        (["--key", "a"], lambda e: e.where is not None and e.where[1] == "a"),
        (["--key", 'quo"te\n'], lambda e: e.where is not None and e.where[1] == 'quo"te\n'),
        (["--key", "Zürich", "--namespace", "web", "--kind", "put"],
         lambda e: e.where == ("web", "Zürich") and e.kind == "put"),
        (["--prefix", "a"], lambda e: e.where is not None and e.where[1].startswith("a")),
        (["--prefix", ""], lambda e: e.where is not None),
        (["--key", "none"], lambda _: False),
        (["--since", middle], lambda e: e.time >= middle),
        (["--until", middle], lambda e: e.time < middle),
        (["--since", after, "--until", before], lambda e: TIME + 60_000 <= e.time < TIME + 120_000),
        (["--staged"], lambda e: e.commit_id > COMMITTED),
        (["--staged", "--kind", "put", "--from", 1170], lambda e: e.commit_id >= 1170 and e.kind == "put"),
        (["--from", 300, "--to", 900, "--term", terms[2], "--key", "b"],
         lambda e: 300 <= e.commit_id <= 900 and e.term == terms[2] and e.where is not None and e.where[1] == "b"),
    ]  # fmt: skip


def test_filters(made: tuple[Path, list[Made]]) -> None:
    """Each filter, and several at once, show exactly the entries that a look at every one finds; with --tail, the
    newest of those, however many there are, or fewer; and `commits` the committed ones among them."""
    path, entries = made
    for options, is_wanted in filters(entries):
        wanted = [entry.commit_id for entry in entries if is_wanted(entry)]
        assert ids("log", path, *options) == wanted, options
        for tail in (1, 7, 10_000):
            assert ids("log", path, *options, "--tail", tail) == wanted[-tail:], (options, tail)
        if "--staged" not in options:
            assert ids("commits", path, *options) == [found for found in wanted if found <= COMMITTED], options


def test_tail_of_a_filter_looks_back_block_by_block(
    made: tuple[Path, list[Made]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With blocks of 10 entries, so that what is wanted lies in many of them, the same entries are found; and of a
    key that was written lately only the end of the log is looked at."""
    path, entries = made
    monkeypatch.setattr(selection, "_BLOCK", 10)
    wanted = [entry.commit_id for entry in entries if entry.where is not None and entry.where[1] == "b"]
    for tail in range(1, len(wanted) + 5, 13):
        assert ids("log", path, "--key", "b", "--tail", tail) == wanted[-tail:]
    looked_up: list[int] = []
    look_up = Directory.look_up

    def counted(self: Directory, commit_id: int) -> tuple[bytes | None, str]:
        looked_up.append(commit_id)
        return look_up(self, commit_id)

    monkeypatch.setattr(Directory, "look_up", counted)
    assert ids("log", path, "--key", "b", "--tail", 1) == wanted[-1:]
    assert min(looked_up) >= wanted[-1] - 12


def test_a_term_is_sought(made: tuple[Path, list[Made]], monkeypatch: pytest.MonkeyPatch) -> None:
    """--term halves its way to the term: of a log of 1,200 entries it looks at those of the term and some forty more.
    When it meets damage on the way it scans instead, and finds the same."""
    path, entries = made
    term = entries[COUNT // 3].term
    wanted = [entry.commit_id for entry in entries if entry.term == term]
    looked_up: list[int] = []
    look_up = Directory.look_up

    def counted(self: Directory, commit_id: int) -> tuple[bytes | None, str]:
        looked_up.append(commit_id)
        return look_up(self, commit_id)

    with monkeypatch.context() as patched:
        patched.setattr(Directory, "look_up", counted)
        assert ids("log", path, "--term", term) == wanted
    assert len(looked_up) < len(wanted) + 2 * 11 * 3 + 5


def test_damage_is_always_shown(made: tuple[Path, list[Made]], tmp_path: Path) -> None:
    """A damaged entry may be the one that is searched for, so no filter hides it: also in the middle, where the
    search for a term meets it first."""
    path, entries = made
    copy = Path(shutil.copytree(path, tmp_path / "copy"))
    flip(copy, records.LOG, records.log_key(COUNT // 2), 8)
    change(copy, records.LOG, lambda txn, db: txn.put(records.log_key(COUNT // 2 + 1), b"cut off", db=db))
    damaged = [COUNT // 2, COUNT // 2 + 1]
    assert damaged_ids(copy) == damaged
    assert damaged_ids(copy, "--key", "none") == damaged
    assert damaged_ids(copy, "--kind", "members", "--since", TIME + 10**9) == damaged
    term = entries[10].term
    found = lines(inspect("log", copy, "--json", "--term", term).stdout, "entry")
    wanted = [entry.commit_id for entry in entries if entry.term == term]
    assert [line["commit_id"] for line in found if "damaged" not in line] == wanted
    found = lines(inspect("log", copy, "--json", "--term", term, "--tail", 2).stdout)
    assert [line["commit_id"] for line in found] == wanted[-2:] + damaged


@pytest.mark.parametrize("when", ["yesterday", "2023-13-01", "5", "15 m"])
def test_no_time(made: tuple[Path, list[Made]], when: str) -> None:
    """What is no time is wrong usage, told with what would be one."""
    result = inspect("log", made[0], "--since", when)
    assert result.exit_code == 2
    assert "15m (ago)" in result.stderr


def test_times_ago(made: tuple[Path, list[Made]]) -> None:
    """All of the log was written more than an hour ago, and less than a hundred years."""
    path, entries = made
    assert ids("log", path, "--since", "1h") == ids("log", path, "--until", "36500d") == []
    assert len(ids("log", path, "--since", "36500d", "--until", "90s")) == len(entries)


# --- history --------------------------------------------------------------------------------------------------


def replayed(entries: list[Made], upto: int) -> dict[tuple[str, str], dict[str, Any]]:
    """The state after the entries up to a commit_id."""
    state: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in entries[:upto]:
        command, where = entry.command, entry.where
        if isinstance(command, DeleteCommand):
            state.pop(where or ("", ""), None)
        elif isinstance(command, PutCommand):
            assert where is not None
            old = state.get(where)
            state[where] = {
                "value": {"n": entry.commit_id, "t": "a b"},
                "created": old["created"] if old else entry.commit_id,
                "modified": entry.commit_id,
                "version": old["version"] + 1 if old else 1,
            }
    return state


def test_history(made: tuple[Path, list[Made]]) -> None:
    """Each put and delete of a key, in order: who made it and when, what was there before and after, and the numbers
    that the client was told. What is not committed is marked as staged."""
    path, entries = made
    for where in [(space, key) for space in SPACES for key in KEYS]:
        result = inspect("history", path, where[1], "--namespace", where[0], "--json")
        assert result.exit_code == 0
        found = lines(result.stdout, "change")
        wanted = [entry for entry in entries if entry.where == where]
        assert [line["commit_id"] for line in found] == [entry.commit_id for entry in wanted]
        for line, entry in zip(found, wanted, strict=True):
            before = replayed(entries, entry.commit_id - 1).get(where)
            after = replayed(entries, entry.commit_id).get(where)
            assert (line["term"], line["time"], line["kind"]) == (entry.term, entry.time, entry.kind)
            assert (line["namespace"], line["key"]) == where
            assert isinstance(entry.command, PutCommand | DeleteCommand)
            assert line["client"] == entry.command.client
            assert line["state"] == ("committed" if entry.commit_id <= COMMITTED else "staged")
            assert line.get("before") == (before and before["value"])
            assert line.get("value") == (after and after["value"])
            assert line["replaced"] == (before and before["modified"])
            assert (line["created"], line["version"]) == ((after or {}).get("created"), (after or {}).get("version"))
            assert ("before" in line, "value" in line) == (before is not None, after is not None)


def test_history_as_a_table(made: tuple[Path, list[Made]]) -> None:
    """One row for each change, with the values before and after it, no wider than the terminal."""
    path, entries = made
    table = inspect("history", path, "a", columns=90).stdout.splitlines()
    assert len(table) == 1 + sum(entry.where == ("default", "a") for entry in entries)
    assert table[0].split()[0] == "commit_id"
    assert table[0].split()[-2:] == ["before", "after"]
    assert max(map(len, table)) <= 90


class CutMeanwhile:
    """A directory in which a staged entry is cut while its log is read, and another stands in its place."""

    committed = 1

    def entries(self, on_cut: Callable[[int], None]) -> Iterator[LogRecord]:
        yield self.record(1, "first")
        yield self.record(2, "was cut")
        yield self.record(3, "was cut, too")
        on_cut(2)
        yield self.record(2, "second")

    def record(self, commit_id: int, value: str) -> LogRecord:
        command = PutCommand(namespace="default", key="k", value=encode(value))
        return LogRecord(commit_id, Entry(3, commit_id, TIME, 0, encode_command(command)))


def test_history_without_what_was_cut() -> None:
    """Changes that were cut while the history was read are not in it, nor in what later ones tell of the one before."""
    directory = cast(Directory, CutMeanwhile())
    found = list(past.changes(past.records_of_key(directory, "default", "k"), "default", "k", from_start=True))
    told = [(change.entry.commit_id, change.before, change.replaced) for change in found if isinstance(change, Change)]
    assert told == [(1, None, None), (2, encode("first"), 1)]


def encode(value: str) -> Raw:
    return Raw(f'"{value}"'.encode())


def test_history_of_nothing(made: tuple[Path, list[Made]]) -> None:
    """A key that nobody wrote has no history; one that can't be a key is wrong usage."""
    assert inspect("history", made[0], "none", "--json").stdout == ""
    assert inspect("history", made[0], "x" * 600).exit_code == 2
    assert inspect("history", made[0], "").exit_code == 2


def test_history_shows_damage(made: tuple[Path, list[Made]], tmp_path: Path) -> None:
    """An entry that can't be read may have been a change of the key, so it is in the history of each; status 4."""
    copy = Path(shutil.copytree(made[0], tmp_path / "copy"))
    change(copy, records.LOG, lambda txn, db: txn.put(records.log_key(100), b"cut off", db=db))
    result = inspect("history", copy, "none", "--json")
    assert result.exit_code == 4
    assert [(line["record"], line["commit_id"]) for line in lines(result.stdout)] == [("damage", 100)]


def compacted(path: Path, upto: int) -> None:
    """Take the first entries away, as compaction will do it."""
    entry = lines(inspect("log", path, "--json", "--from", upto, "--to", upto).stdout)[0]

    def compact(txn: Any, db: Any) -> None:
        for commit_id in range(1, upto + 1):
            txn.delete(records.log_key(commit_id), db=db)

    base = Mark(EntryId(entry["term"], upto), int(entry["checksum"], 16))
    change(path, records.LOG, compact)
    change(path, records.META, lambda txn, db: txn.put(b"base", records.pack_meta(b"base", base), db=db))


def test_history_in_a_log_that_begins_later(made: tuple[Path, list[Made]], tmp_path: Path) -> None:
    """What the log does not tell any more is left out, not guessed: the first value before, and the versions until the
    key was deleted once. All else is as in the whole log."""
    copy = Path(shutil.copytree(made[0], tmp_path / "copy"))
    later = [(entry.where, entry.kind) for entry in made[1][300:]]
    for where in [(space, key) for space in SPACES for key in KEYS]:
        kinds = [kind for found, kind in later if found == where]
        if kinds[:3] == ["put", "put", "put"]:
            break
    else:
        raise AssertionError("no key is put three times before it is deleted: take another seed")
    command = ["history", copy, where[1], "--namespace", where[0], "--json"]
    whole = [line for line in lines(inspect(*command).stdout) if line["commit_id"] > 300]
    compacted(copy, 300)
    found = lines(inspect(*command).stdout)
    deleted = kinds.index("delete")
    assert found[deleted + 1 :] == whole[deleted + 1 :]
    assert "before" not in found[0]
    assert found[0]["replaced"] is None
    assert all(line["created"] is line["version"] is None for line in found[: deleted + 1])
    assert [line.get("value") for line in found] == [line.get("value") for line in whole]
    assert [line.get("before") for line in found[1:]] == [line.get("before") for line in whole[1:]]


# --- state --at -----------------------------------------------------------------------------------------------


def test_state_at(made: tuple[Path, list[Made]]) -> None:
    """The state as it was at any commit_id is what the puts and deletes up to there make of nothing; at the newest, it
    is what `state` shows; filters and --keys-only work as there."""
    path, entries = made
    for at in (0, 1, 2, 57, 600, 1149, COMMITTED):
        found = lines(inspect("state", path, "--at", at, "--json").stdout)
        state = replayed(entries, at)
        assert {(line["namespace"], line["key"]): line for line in found} == {
            where: {"record": "value", "namespace": where[0], "key": where[1], **value}
            for where, value in state.items()
        }
        assert [(line["namespace"], line["key"]) for line in found] == sorted(
            state, key=lambda where: f"{where[0]}\0{where[1]}".encode()
        )
    for options in (
        [],
        ["--namespace", "we"],
        ["--prefix", "a"],
        ["--namespace", "web", "--prefix", "a", "--keys-only"],
    ):
        now = inspect("state", path, "--json", *options).stdout
        assert now
        assert inspect("state", path, "--at", COMMITTED, "--json", *options).stdout == now
    assert inspect("state", path, "--at", COMMITTED).stdout == inspect("state", path).stdout


def test_state_at_what_can_not_be_told(made: tuple[Path, list[Made]], tmp_path: Path) -> None:
    """A commit_id that is only staged, or not there, and a log that does not begin at 1, are refused in one line that
    says so, with status 3 and nothing on standard output."""
    copy = Path(shutil.copytree(made[0], tmp_path / "copy"))
    seen = [inspect("state", copy, "--at", at) for at in (COMMITTED + 1, 10**9)]
    compacted(copy, 300)
    seen.append(inspect("state", copy, "--at", 500))
    for result, words in zip(seen, ("is not committed here", "is not committed here", "begins at 301"), strict=True):
        assert (result.exit_code, result.stdout) == (3, "")
        assert words in result.stderr
        assert result.stderr.count("\n") == 1


def test_state_at_of_a_damaged_log(made: tuple[Path, list[Made]], tmp_path: Path) -> None:
    """With an entry gone and a bit of a value flipped, the state is still rebuilt from what can be read; that some of
    it may be wrong is told before it, and the value that was read in spite of its checksum is marked. Status 4."""
    path, entries = made
    copy = Path(shutil.copytree(path, tmp_path / "copy"))
    state = replayed(entries, COMMITTED)
    newest = max(state.values(), key=lambda value: value["modified"])["modified"]
    flip(copy, records.LOG, records.log_key(newest), -12)
    change(copy, records.LOG, lambda txn, db: txn.delete(records.log_key(100), db=db))
    result = inspect("state", copy, "--at", COMMITTED, "--json", "--keys-only")
    assert result.exit_code == 4
    damage, values = lines(result.stdout, "damage"), lines(result.stdout, "value")
    assert [line["commit_id"] for line in damage] == [100, newest]
    assert all("may be missing or wrong below" in line["reason"] for line in damage)
    assert [line["modified"] for line in values if line.get("damaged")] == [newest]
    assert {(line["namespace"], line["key"]) for line in values} == set(state)


def test_state_at_with_a_command_of_a_newer_version(tmp_path: Path) -> None:
    """An entry that matches its checksum, but that this version can't carry out: what it did may be missing, which is
    told; the rest is shown. Status 4."""
    store = new_store(tmp_path)
    store.journal.append(3, TIME, encode_command(PutCommand(namespace="default", key="k", value=Raw(b"1"))))
    store.journal.append(3, TIME, Raw(b'{"kind":"lease","ttl":5}'), Noop())  # that version knows what it does
    store.write()
    store.close()
    change(tmp_path, records.META, lambda txn, db: txn.put(b"commit_id", records.pack_meta(b"commit_id", 2), db=db))
    result = inspect("state", tmp_path, "--at", 2, "--json")
    assert result.exit_code == 4
    damage, value = lines(result.stdout)
    assert (damage["record"], damage["commit_id"], value["key"], value["value"]) == ("damage", 2, "k", 1)


def test_the_past_needs_no_memory_for_the_log(tmp_path: Path) -> None:
    """Two thousand puts of a kilobyte each to ten keys: the state before the last, and the history of a key, are found
    in memory that would hold a hundred of them."""
    store = new_store(tmp_path)
    for n in range(2000):
        value = Raw(f'"{n}{"x" * 1000}"'.encode())
        store.journal.append(
            3, TIME + n, encode_command(PutCommand(namespace="default", key=f"k{n % 10}", value=value))
        )
    store.write()
    store.commit("default")
    store.close()
    with Directory(tmp_path, Settings().map_bytes) as directory:
        tracemalloc.start()
        state = past.rebuild(directory, 1999, lambda _: None, lambda _: None)
        found = [value.record.modified for value in past.values(directory, state, None, "") if value.record]
        entries = past.records_of_key(directory, "default", "k3")
        seen = sum(1 for _ in past.changes(entries, "default", "k3", from_start=True))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert found == [1991, 1992, 1993, 1994, 1995, 1996, 1997, 1998, 1999, 1990]
    assert seen == 200
    assert peak < 100_000


def test_filtering_needs_no_memory_for_what_is_found(tmp_path: Path) -> None:
    """--tail with a filter that matches every entry keeps none of them."""
    store = Store("database", tmp_path)
    store.found(ADDRESS, [])
    store.write(Ballot(3, ADDRESS))
    for n in range(2000):
        value = Raw(f'"{"x" * 1000}"'.encode())
        store.journal.append(3, TIME + n, encode_command(PutCommand(namespace="default", key="k", value=value)))
    store.write()
    store.close()
    with Directory(tmp_path, Settings().map_bytes) as directory:
        tracemalloc.start()
        wanted = selection.Filter(key="k")
        first, last = selection.window(directory, wanted, None, None, 1900, staged=False)
        seen = sum(map(wanted.test(), directory.entries(first, last)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (first, seen) == (101, 1900)
    assert peak < 200_000
