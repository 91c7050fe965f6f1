"""The log ends somewhere (`raftnode.compaction`): it levels off, what is left of it is still checked, and a node that
dies at any point goes on. And `raftnode compact` gives the space back."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import store_worker
import test_store
from click.testing import CliRunner
from test_store import (
    ADDRESS,
    MEMBERS,
    ROOT,
    OnDisk,
    change,
    commit,
    end,
    flip,
    hear,
    kill,
    position,
    put_command,
    stage,
    start,
    state_of,
)

from raftnode import records
from raftnode.cli import cli
from raftnode.comparison import Parting, part
from raftnode.config import GIB, KIB
from raftnode.environment import open_reader
from raftnode.errors import StoreDamaged, StoreFailed, StoreInUse
from raftnode.inspection import Directory, LogReading
from raftnode.messages import GENESIS, EntryId
from raftnode.shrink import shrink
from raftnode.store import Store
from raftnode.survey import survey
from raftnode.verification import verify

Opened = Callable[..., Store]
opened = test_store.opened
_PAGE = 4 * KIB


def write_one_by_one(store: Store, count: int, size: int = 10) -> None:
    """So many committed puts of a few keys, each staged in one transaction and applied in the next."""
    for _ in range(count):
        number = store.journal.last.id.commit_id + 1
        stage(store, put_command(f"key-{number % 7}", f"{number}-" + "x" * size))
        store.apply(store.journal.entries(store.commit_id + 1, number, GIB))
        store.journal.forget(store.commit_id, 1, 1)
    store.write()


def commands_of(store: Store) -> list[int]:
    """The sizes of the commands behind commit_id, read from the disk."""
    first = store.journal.first
    return [entry.size for entry in store.read_entries(first, store.commit_id, GIB)] if first <= store.commit_id else []


@pytest.mark.parametrize("limit", [1, 2, 10])
def test_the_log_levels_off_at_its_number_of_entries(tmp_path: Path, opened: Opened, limit: int) -> None:
    """Down to one entry: the log keeps exactly as many entries behind commit_id as it may, and knows where it begins,
    in memory as after a restart."""
    store = opened(tmp_path, log_entries=limit)
    store.found(ADDRESS, MEMBERS)
    write_one_by_one(store, 60)
    assert (store.commit_id, store.journal.first) == (60, 61 - limit)
    assert len(commands_of(store)) == limit
    with pytest.raises(StoreDamaged):
        store.read_entries(60 - limit, 60, GIB)
    last = store.journal.last
    store.close()
    again = opened(tmp_path, log_entries=limit)
    assert (again.journal.base.id, again.journal.last) == (EntryId(1, 60 - limit), last)
    write_one_by_one(again, 5)
    assert (again.commit_id, again.journal.first) == (65, 66 - limit)
    assert {f"key-{n}" for n in range(7)} == {name for _, name in _values(again)}


def _values(store: Store) -> list[tuple[str, str]]:
    store.close()
    return list(OnDisk(store.data_dir).values)


def pages_of_the_log(directory: Path) -> int:
    """What the log takes of the file, in bytes."""
    with closing(open_reader(directory, GIB)) as env, env.begin() as txn:
        log = txn.stat(env.open_db(records.LOG, txn=txn, create=False))
    return int(log["psize"] * (log["leaf_pages"] + log["branch_pages"] + log["overflow_pages"]))


@pytest.mark.parametrize("size", [10, 500, 1500, 5000])
def test_the_log_levels_off_at_its_size(tmp_path: Path, opened: Opened, size: int) -> None:
    """The size that counts is that of its pages in the file: entries of 1.5 KB go two to a page of 4 KiB, those of 5 KB
    have two pages of their own. It needs no book, so it is known after a restart too."""
    store = opened(tmp_path, log_bytes=80 * KIB)
    store.found(ADDRESS, MEMBERS)
    write_one_by_one(store, 1000, size=size)
    kept = len(commands_of(store))
    store.close()
    assert 80 * KIB - 3 * _PAGE < pages_of_the_log(tmp_path) <= 80 * KIB
    again = opened(tmp_path, log_bytes=80 * KIB)
    write_one_by_one(again, 10, size=size)
    assert abs(len(commands_of(again)) - kept) <= _PAGE // size + 1


def test_what_is_not_committed_does_not_count(tmp_path: Path, opened: Opened) -> None:
    """Entries that wait for their commit, however many, drive none of those out that members may still lack. (The size
    is shared out by number: much larger ones do drive some out.)"""
    store = opened(tmp_path, log_bytes=80 * KIB)
    store.found(ADDRESS, MEMBERS)
    write_one_by_one(store, 100, size=500)
    first = store.journal.first
    stage(store, *(put_command(f"key-{n}", "x" * 500) for n in range(1000)))
    for _ in range(10):
        store.write()
    assert store.journal.first == first
    store.close()
    assert pages_of_the_log(tmp_path) > 400 * KIB


def test_one_entry_that_is_larger_than_the_limit_is_kept(tmp_path: Path, opened: Opened) -> None:
    """However small the limit, the newest committed entry stays."""
    store = opened(tmp_path, log_bytes=1)
    store.found(ADDRESS, MEMBERS)
    write_one_by_one(store, 5, size=5000)
    assert store.journal.first == store.commit_id == 5


def test_what_is_staged_or_not_applied_on_disk_stays(tmp_path: Path, opened: Opened) -> None:
    """A restart needs the entries whose effects are not on disk yet: they don't count, and are never deleted."""
    store = opened(tmp_path, log_entries=1)
    store.found(ADDRESS, MEMBERS)
    stage(store, *(put_command(f"key-{n}", "staged") for n in range(20)))
    assert store.journal.first == 1
    store.apply(store.journal.entries(1, 5, GIB))
    assert store.journal.first == 1, "in memory only"
    store.close()
    assert OnDisk(tmp_path).commit_id == 0
    again = opened(tmp_path, log_entries=1)
    commit(again, 5)
    assert (again.journal.first, again.journal.last.id.commit_id) == (5, 20)


@pytest.mark.parametrize("missing", [1, 3, 5])
def test_a_hole_among_the_oldest_is_not_passed_over(tmp_path: Path, opened: Opened, missing: int) -> None:
    """An entry among those that should go is not there, as no raftnode leaves it: the last one of them stands elsewhere
    than it should. Nothing is deleted, and the node has to stop."""
    store = opened(tmp_path)
    store.found(ADDRESS, MEMBERS)
    write_one_by_one(store, 20)
    store.close()
    again = opened(tmp_path, log_entries=10, compaction_step=5)
    with again._env.write() as txn:
        assert txn.delete(records.log_key(missing), db=again._log)
    with pytest.raises(StoreDamaged, match=r"should have entry 5 here, but it has 6") as raised:
        again.write()
    assert raised.value.commit_id == 5
    again.close()
    with pytest.raises(StoreDamaged, match="has a hole: 19 entries between 1 and 20"):
        opened(tmp_path)


def test_old_entries_go_in_small_steps(tmp_path: Path, opened: Opened) -> None:
    """A log that is far too long, as after its limit was lowered, shrinks by a few entries in each transaction, more of
    them the more this writes, until it has its length."""
    store = opened(tmp_path)
    store.found(ADDRESS, MEMBERS)
    stage(store, *(put_command(f"key-{n % 7}", "old") for n in range(1000)))
    commit(store, 1000)
    store.close()
    again = opened(tmp_path, log_entries=10, compaction_step=5)
    again.write()
    assert again.journal.first == 6
    stage(again, *(put_command(f"key-{n % 7}", "new") for n in range(50)))
    assert again.journal.first == 106
    commit(again, 1050)
    assert again.journal.first == 120
    for _ in range(200):
        again.write()
    assert again.journal.first == 1041


def test_nothing_is_deleted_below_the_limit(tmp_path: Path, opened: Opened) -> None:
    store = opened(tmp_path, log_entries=60)
    store.found(ADDRESS, MEMBERS)
    write_one_by_one(store, 60)
    assert (store.journal.first, store.journal.base.id) == (1, GENESIS)


@pytest.mark.parametrize("offset", [3, 12, 18, 40])
def test_a_damaged_first_kept_entry_is_found(tmp_path: Path, opened: Opened, offset: int) -> None:
    """Nothing before it is left, but the base tells the checksum that it must continue."""
    store = opened(tmp_path, log_entries=3)
    store.found(ADDRESS, MEMBERS)
    write_one_by_one(store, 20)
    first = store.journal.first
    store.close()
    change(tmp_path, records.LOG, position(first), flip(offset))
    damaged = opened(tmp_path, log_entries=3)
    with pytest.raises(StoreDamaged) as found:
        damaged.read_entries(first, first, 0)
    assert found.value.commit_id == first


def test_a_base_that_nothing_continues_is_never_written(tmp_path: Path, opened: Opened) -> None:
    """The entry whose checksum would become the base's is damaged: the node ends, and the log keeps it."""
    store = opened(tmp_path)
    store.found(ADDRESS, MEMBERS)
    write_one_by_one(store, 20)
    store.close()
    change(tmp_path, records.LOG, position(10), flip(18))
    damaged = opened(tmp_path, log_entries=10)
    with pytest.raises(StoreDamaged) as found:
        damaged.write()
    assert found.value.commit_id == 11
    damaged.close()
    again = opened(tmp_path)
    assert again.journal.first == 1


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=pytest.mark.long) for n in (2, 3))])
def test_kill_9_in_the_middle_of_compaction_loses_nothing(tmp_path: Path, seed: int) -> None:
    """A store that keeps very few entries is killed at random moments, again and again: what it finds is what its last
    transaction or the one under way has left, with a log that continues its base."""
    chance = random.Random(seed)
    limits = chance.choice([(1, GIB), (3, GIB), (100, 12_000)])
    for round in range(6):
        process = start("write", tmp_path, f"{seed}{round},{limits[0]},{limits[1]}")
        for _ in range(chance.randrange(1, 120)):
            hear(process)
        said = kill(process)
        found = OnDisk(tmp_path)
        for line in said:
            word, _, state = line.partition(" ")
            if word == "ack":
                acknowledged = state
                assert found.commit_id >= int(acknowledged.split("/")[2])
        process = start("check", tmp_path)
        assert end(process)[0].startswith("fine")
    assert found.first > 1, "the log was compacted"


def test_disk_use_levels_off_over_twenty_times_what_is_kept(tmp_path: Path, opened: Opened) -> None:
    """Endless overwrites of a few keys: pages that were freed are used again, so the pages in use and the file stop
    growing long before 20 times the kept volume was written."""
    store = opened(tmp_path, log_bytes=500 * KIB)
    store.found(ADDRESS, MEMBERS)
    sizes = []
    for _ in range(22):
        written = 0
        while written < 500 * KIB:
            number = store.journal.last.id.commit_id
            entries = stage(store, *(put_command(f"key-{(number + n) % 50}", "x" * 2000) for n in range(20)))
            store.apply(entries)
            store.journal.forget(store.commit_id, 1, 1)
            written += sum(entry.size for entry in entries)
        sizes.append((store.sizes()["used"], store.sizes()["file"]))
    early, late = sizes[2:7], sizes[7:]
    for kind in (0, 1):
        assert max(size[kind] for size in late) <= 1.05 * max(size[kind] for size in early)


# --- raftnode compact -----------------------------------------------------------------------------------------


def reopened(directory: Path) -> str:
    """The state that a start finds; it must be what is on the disk by a second opinion."""
    store = Store("database", directory)
    state = state_of(store)
    store.close()
    assert state == OnDisk(directory).state()
    return state


def grown(directory: Path, keys: int = 400) -> str:
    """A closed store whose file has much more room than it needs, and its state."""
    store = Store("database", directory)
    store.found(ADDRESS, MEMBERS)
    stage(store, *(put_command(f"key-{n}", "x" * 3000) for n in range(keys)))
    commit(store, keys)
    store.close()
    store = Store("database", directory, settings=store_worker.short("5", str(GIB)))
    while store.journal.first < keys - 5:
        store.write()
    state = state_of(store)
    store.close()
    return state


def test_compact_gives_the_space_back(tmp_path: Path) -> None:
    """The command says how large the file was and is; every record is as before, and the node goes on from there."""
    directory = tmp_path / "data"
    state = grown(directory)
    before = OnDisk(directory)
    size = (directory / records.DATA_FILE).stat().st_size
    result = CliRunner().invoke(cli, ["compact", str(directory)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    now = (directory / records.DATA_FILE).stat().st_size
    assert result.output == f"{directory}: {size} bytes before, {now} after\n"
    assert now < 0.7 * size
    after = OnDisk(directory)
    assert (after.meta, after.log, after.values) == (before.meta, before.log, before.values)
    assert not (directory / records.COPY_FILE).exists()
    assert reopened(directory) == state


def test_compact_is_refused_where_a_node_runs_or_there_is_no_room(
    tmp_path: Path,
    opened: Opened,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing has changed then."""
    grown(tmp_path)
    running = opened(tmp_path)
    with pytest.raises(StoreInUse):
        shrink(tmp_path)
    running.close()
    monkeypatch.setattr("raftnode.shrink.shutil.disk_usage", lambda _: _Usage)
    content = (tmp_path / records.DATA_FILE).read_bytes()
    with pytest.raises(StoreFailed, match="bytes of room"):
        shrink(tmp_path)
    assert (tmp_path / records.DATA_FILE).read_bytes() == content


class _Usage:
    free = 1000


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2))])
def test_kill_9_leaves_the_old_file_or_the_new_one(tmp_path: Path, seed: int) -> None:
    """`raftnode compact` is killed at random moments; the node then starts with all that it had, and a rest of the copy
    is removed."""
    chance = random.Random(seed)
    directory = tmp_path / "data"
    state = grown(directory, keys=1500)
    sizes = {(directory / records.DATA_FILE).stat().st_size}
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-m", "raftnode", "compact", str(directory)],
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        copy = directory / records.COPY_FILE
        while process.poll() is None and not copy.exists():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.06))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert reopened(directory) == state
        assert not copy.exists()
        sizes.add((directory / records.DATA_FILE).stat().st_size)
    assert len(OnDisk(directory).values) == 1500


# --- reading meanwhile ----------------------------------------------------------------------------------------


class Elsewhere:
    """A store in another process, which keeps ten entries of its log."""

    def __init__(self, directory: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(store_worker.__file__)), "obey", str(directory), f"10,{GIB}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def write(self, count: int) -> int:
        """Have so many entries written; where the log begins then."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"%d\n" % count)
        self._process.stdin.flush()
        return int(hear(self._process))

    def close(self) -> None:
        self._process.communicate(timeout=30)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Elsewhere]:
    other = Elsewhere(tmp_path)
    yield other
    other.close()


@pytest.mark.parametrize("written", [30, 6, 3, 1])
def test_a_reader_goes_on_where_the_log_begins(tmp_path: Path, elsewhere: Elsewhere, written: int) -> None:
    """Entries are deleted while somebody reads the log: they are neither damage nor waited for. What comes next is the
    first that is kept, checked against the base."""
    elsewhere.write(50)
    with Directory(tmp_path, GIB) as directory:
        seen, first = [], 41
        for record in LogReading(directory, 1).upto(10**6):
            assert not record.damage
            seen.append(record.commit_id)
            if len(seen) == 3:
                first = elsewhere.write(written)
                directory.release()
        assert first == 41 + written
        assert seen == [41, 42, 43, *range(max(44, first), 51 + written)]


def test_a_comparison_knows_where_logs_begin(tmp_path: Path, elsewhere: Elsewhere) -> None:
    """Two copies of one node: the older ends before the newer begins, and parts from it nowhere; the newer holds all
    that the older has committed."""
    elsewhere.write(50)
    older = Path(shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-older"))
    elsewhere.write(100)
    elsewhere.close()
    ours, theirs = (survey(path, GIB, lambda _: None) for path in (tmp_path, older))
    assert (ours.first, ours.last, theirs.first, theirs.last) == (141, 150, 41, 50)
    for one, other in ((ours, theirs), (theirs, ours)):
        assert part(one, other) == Parting(50, None)
    base = ours.mark(140)
    assert base is not None
    assert (base.term, base.checksum) == (1, ours.base.checksum)
    assert ours.holds(EntryId(1, 30))
    assert not theirs.holds(EntryId(1, 100))


def test_verification_says_what_a_log_that_begins_late_can_not_tell(tmp_path: Path, elsewhere: Elsewhere) -> None:
    """The values are held against their own checksums, not against a log that does not tell all."""
    elsewhere.write(50)
    problems: list[object] = []
    verified = verify(tmp_path, GIB, problems.append, lambda _: None)
    assert (problems, verified.replayed_to, verified.values) == ([], None, 7)
    assert "begins at 41" in verified.why_not_replayed
