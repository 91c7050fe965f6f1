"""The tail of the log: what was written there is read back whole, torn writes are dropped, damage is told.

A power cut leaves any of the sectors of the last write new and the others old; a disk that fails changes bytes of what
was written long ago. The two must never be taken for each other (TRAPS 37).
"""

from __future__ import annotations

import fcntl
import itertools
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import lmdb
import pytest
from msgspec import Raw

from raftnode import records, tail
from raftnode.config import GIB, KIB, TAIL_BYTES_MAX, Settings
from raftnode.consensus.journal import Journal
from raftnode.errors import StoreDamaged, StoreFailed
from raftnode.messages import GENESIS, Entry, EntryId, PutCommand, chain, encode_command
from raftnode.store import Store
from raftnode.tail import BLOCK, SECTOR, Tail, TailFact, pack, read

ADDRESS, OTHERS = "127.0.0.1:7100", ["127.0.0.1:7101", "127.0.0.1:7102"]
SIZES = (20, 300, 20, 1100, 5000, 440, 9000)
FILE_BYTES = 64 * KIB


def put(key: object, size: int) -> Raw:
    return encode_command(PutCommand(namespace="default", key=f"key-{key}", value=Raw(b'"%s"' % (b"x" * size))))


def some_entries(first: int, sizes: Sequence[int], term: int = 1) -> list[Entry]:
    """Entries of puts with values of these sizes."""
    made, checksum = [], 0
    for commit_id, size in enumerate(sizes, first):
        command = put(commit_id, size)
        checksum = chain(checksum, term, commit_id, 0, command)
        made.append(Entry(term, commit_id, 0, checksum, command))
    return made


def place(file: bytearray, generation: int, entries: Sequence[Entry], offset: int) -> range:
    """Write a record into a tail; returns its sectors."""
    record = pack(generation, entries[0].commit_id, [records.pack_entry(entry) for entry in entries], offset)
    file[offset : offset + len(record)] = record
    return range(offset // SECTOR, (offset + len(record)) // SECTOR)


def filled(generation: int, first: int, batches: Sequence[Sequence[int]], file: bytearray) -> list[range]:
    """Write one record for each batch; returns the sectors of each."""
    offset, places = 0, []
    for sizes in batches:
        places.append(place(file, generation, some_entries(first, sizes), offset))
        first += len(sizes)
        offset = tail.file_size(places[-1].stop * SECTOR)
    return places


# --- the bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_what_was_written_is_read(seed: int) -> None:
    """Records of any number of entries of any size, one behind the other, over what an older generation has left."""
    chance = random.Random(seed)
    file, batches = bytearray(FILE_BYTES), [chance.choices(SIZES, k=chance.randrange(1, 4)) for _ in range(3)]
    filled(6, 1, [chance.choices(SIZES, k=chance.randrange(1, 4)) for _ in range(3)], file)
    filled(7, 31, batches, file)
    found = read(bytes(file), 7, 30)
    entries = [
        entry for at, sizes in zip(starts(31, batches), batches, strict=True) for entry in some_entries(at, sizes)
    ]
    assert found.records == {entry.commit_id: records.pack_entry(entry) for entry in entries}
    assert not found.damage
    assert read(bytes(file), 8, 30) == tail.NOTHING, "the next generation has nothing"


def starts(first: int, batches: Sequence[Sequence[int]]) -> list[int]:
    return list(itertools.accumulate([first, *map(len, batches[:-1])]))


@pytest.mark.parametrize("before", ["blank", "older"])
@pytest.mark.parametrize("sizes", [(20,), (300, 20), (1100,), (440, 440, 1100), (5000,)], ids=str)
def test_a_torn_record_is_dropped(before: str, sizes: Sequence[int]) -> None:
    """The power goes in the middle of a write: of the sectors of the last record any may be new and any as they were
    before, be that zeros or records of an older generation. It is there only when all of them are; what was
    acknowledged before is there in any case, and nothing is taken for damage."""
    file = bytearray(FILE_BYTES)
    if before == "older":
        filled(6, 1, [(5000,), (20,), (1100, 300)], file)
    filled(7, 10, [(300,), (5000,)], file)
    acknowledged = read(bytes(file), 7, 9)
    assert list(acknowledged.records) == [10, 11]
    after = bytearray(file)
    sectors = place(after, 7, some_entries(12, sizes), 3 * BLOCK)
    whole = read(bytes(after), 7, 9)
    assert list(whole.records) == [10, 11, *range(12, 12 + len(sizes))]
    for news in itertools.product([False, True], repeat=len(sectors)):
        torn = bytearray(file)
        for sector, is_new in zip(sectors, news, strict=True):
            if is_new:
                torn[sector * SECTOR : (sector + 1) * SECTOR] = after[sector * SECTOR : (sector + 1) * SECTOR]
        found = read(bytes(torn), 7, 9)
        assert (found.records, found.damage) == ((whole if all(news) else acknowledged).records, ()), news


@pytest.mark.parametrize("before", ["blank", "older"])
def test_each_changed_byte_is_told(before: str) -> None:
    """One bit is wrong in any byte of any record, also of the last: which entries are lost is told, and all others are
    read. Bytes between the records are nobody's."""
    file = bytearray(FILE_BYTES)
    if before == "older":
        filled(6, 1, [SIZES], file)
    batches = [(300,), (20, 440), (5000,), (20,), (1100, 20)]
    places = filled(7, 10, batches, file)
    whole, chance = read(bytes(file), 7, 9).records, random.Random(7)
    for sectors, first, sizes in zip(places, starts(10, batches), batches, strict=True):
        is_last = first + len(sizes) == 10 + len(whole)
        for at in range(sectors.start * SECTOR, sectors.stop * SECTOR):
            damaged = bytearray(file)
            damaged[at] ^= 1 << chance.randrange(8)
            found, lost = read(bytes(damaged), 7, 9), range(first, first + (1 if is_last else len(sizes)))
            kept = {n: record for n, record in whole.items() if not first <= n < first + len(sizes)}
            assert found.records == {**kept, **dict.fromkeys(lost, b"")}, f"byte {at}"
            words = f"entry {first} is" if len(lost) == 1 else f"entries {first} to {lost[-1]} are"
            assert found.damage == (
                f"raftnode.tail: what stands at byte {sectors.start * SECTOR} does not match its checksum, so that "
                f"{words} lost{', and maybe later ones' if is_last else ''}",
            ), f"byte {at}"
        for at in range(sectors.stop * SECTOR, tail.file_size(sectors.stop * SECTOR)):
            damaged = bytearray(file)
            damaged[at] ^= 1 << chance.randrange(8)
            assert read(bytes(damaged), 7, 9).records == whole, f"byte {at} is between two records"


def test_a_write_that_got_lost_is_told() -> None:
    """The disk has said that it wrote a record, and has the old sectors instead: a later record shows that."""
    file, lost = bytearray(FILE_BYTES), bytearray(FILE_BYTES)
    places = filled(7, 10, [(300,), (300, 20), (20,)], file)
    lost[:] = file
    lost[places[1].start * SECTOR : places[1].stop * SECTOR] = bytes(len(places[1]) * SECTOR)
    found = read(bytes(lost), 7, 9)
    assert [n for n, record in found.records.items() if record == b""] == [11, 12]
    assert len(found.records) == 4
    assert "entries 11 to 12 are lost" in found.damage[0]


def test_a_sector_in_another_place_does_not_count() -> None:
    """A sector that the disk has written to the wrong place, or given from there, is damage."""
    for index in (0, 1):
        file, to, come = bytearray(FILE_BYTES), index * SECTOR, BLOCK + index * SECTOR
        filled(7, 10, [(1100,), (1100,)], file)
        file[to : to + SECTOR] = file[come : come + SECTOR]
        found = read(bytes(file), 7, 9)
        assert (found.records[10], len(found.damage)) == (b"", 1)


def test_a_tail_that_is_newer_than_its_directory_is_told() -> None:
    """raftnode.mdb is an older copy than the tail beside it: what is missing between them can't be known."""
    file = bytearray(FILE_BYTES)
    filled(8, 20, [(300,)], file)
    found = read(bytes(file), 7, 9)
    assert found.records == {10: b""}
    assert "newer than raftnode.mdb" in found.damage[0]


# --- the file -------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Tail]:
    """A new tail of four blocks."""
    one = Tail(tmp_path, is_durable=True)
    one.make(3 * BLOCK + 1, generation=1)
    yield one
    one.close()


def test_a_new_file_has_all_its_blocks(made: Tail, tmp_path: Path) -> None:
    """Nothing but data has to be written later: the file has its size, and no holes."""
    stat = (tmp_path / records.TAIL_FILE).stat()
    assert stat.st_size == 4 * BLOCK
    assert stat.st_blocks * 512 >= 4 * BLOCK
    assert made.fact == TailFact(1, 4 * BLOCK)
    assert stat.st_mode & 0o777 == 0o600


@pytest.mark.parametrize("is_durable", [True, False])
def test_a_write_is_synced(tmp_path: Path, is_durable: bool) -> None:
    """The system call that writes to the tail of a durable store returns when the disk has it (O_DSYNC)."""
    store = Store("database" if is_durable else "memory", tmp_path)
    try:
        flags = fcntl.fcntl(store._tail._fd, fcntl.F_GETFL)
        assert (flags & os.O_DSYNC == os.O_DSYNC) is is_durable
    finally:
        store.close()


@pytest.mark.parametrize("seed", range(5))
def test_room_is_known_before(made: Tail, tmp_path: Path, seed: int) -> None:
    """What has room is written within the file, and what has none would not be; each block is used once."""
    chance, at = random.Random(seed), 1
    for _ in range(100):
        batch = some_entries(at, chance.choices(SIZES, k=chance.randrange(1, 3)))
        size = sum(len(records.pack_entry(entry)) for entry in batch)
        before = made._offset
        length = len(pack(1, at, [records.pack_entry(entry) for entry in batch], before))
        has_room = made.has_room(size, len(batch))
        assert has_room is (before + length <= 4 * BLOCK)
        if not has_room:
            made.take()
            continue
        made.append(batch)
        at += len(batch)
        assert (tmp_path / records.TAIL_FILE).stat().st_size == 4 * BLOCK
        found = tail.look(tmp_path, made.fact, made.entries[0].commit_id - 1)
        assert list(found.records) == [entry.commit_id for entry in made.entries]
        assert found.damage == ()


def test_the_largest_record_is_read(tmp_path: Path) -> None:
    """One that fills the largest file that the settings allow."""
    one = Tail(tmp_path, is_durable=False)
    one.make(TAIL_BYTES_MAX, generation=1)
    [entry] = some_entries(1, (TAIL_BYTES_MAX * 97 // 100,))
    assert one.has_room(len(records.pack_entry(entry)), 1)
    one.append([entry])
    one.close()
    assert tail.look(tmp_path, one.fact, 0).records == {1: records.pack_entry(entry)}


@pytest.mark.parametrize("change", ["gone", "empty", "cut off", "longer"])
def test_a_file_that_is_not_whole_is_told(made: Tail, tmp_path: Path, change: str) -> None:
    """The tail is missing, or has another size than LMDB says: it may have held something."""
    file = tmp_path / records.TAIL_FILE
    if change == "gone":
        file.unlink()
    else:
        os.truncate(file, {"empty": 0, "cut off": BLOCK, "longer": 5 * BLOCK}[change])
    found = tail.look(tmp_path, made.fact, 9)
    assert found.records == {10: b""}
    expected = {"gone": "is gone or empty", "empty": "is gone or empty"}.get(change, "of 16384 bytes")
    assert expected in found.damage[0]
    assert "entry 10 and later ones" in found.damage[0]
    assert tail.look(tmp_path, TailFact(1, 0), 9) == tail.NOTHING, "it is not in use"


# --- the store ------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """Opens the store in `tmp_path/node`, and closes at the end what is still open."""
    stores: list[Store] = []

    def open_store(name: str = "node", **settings: int) -> Store:
        stores.append(Store("database", tmp_path / name, settings=Settings(**settings)))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def founded(store: Store, term: int = 1) -> Store:
    """A member whose facts are on disk."""
    store.found(ADDRESS, OTHERS)
    store.write(store.ballot.in_term(term).vote(ADDRESS))
    return store


def stage(store: Store, *sizes: int) -> list[Entry]:
    """Append puts, as a leader; they are not on disk yet."""
    last = store.journal.last.id.commit_id
    return [store.journal.append(store.ballot.term, 0, put(last + n, size)) for n, size in enumerate(sizes, 1)]


def in_lmdb(store: Store) -> list[int]:
    """The positions of the log in LMDB."""
    with store.view() as txn:
        return [records.position_of(bytes(key)) for key in txn.cursor(store._log).iternext(values=False)]


def whole_log(journal: Journal) -> list[Entry]:
    found: list[Entry] = []
    while journal.first + len(found) <= journal.last.id.commit_id:
        found += journal.entries(journal.first + len(found), journal.last.id.commit_id, GIB)
    return found


def test_few_entries_go_to_the_tail_and_are_there_after_a_crash(opened: Callable[..., Store], tmp_path: Path) -> None:
    """Three writes to the tail, none to LMDB; the directory as a crash leaves it then starts with all of the entries,
    in LMDB, with nothing left in the tail."""
    store = founded(opened())
    for sizes in ((20,), (300, 20), (1100,)):
        stage(store, *sizes)
        assert store.extend_tail()
        assert not store.journal.has_unwritten
    written = whole_log(store.journal)
    assert in_lmdb(store) == []
    shutil.copytree(tmp_path / "node", tmp_path / "crashed")
    again = opened("crashed")
    assert whole_log(again.journal) == written
    assert in_lmdb(again) == [1, 2, 3, 4]
    assert again._tail.entries == []
    stage(again, 20)
    again.write(again.ballot)
    stage(again, 20)
    assert again.extend_tail(), "the new tail is in use after the first transaction"


def test_entries_in_the_tail_can_be_read(opened: Callable[..., Store]) -> None:
    """The store reads its log on behalf of members that are behind, be it in LMDB or in the tail, and across both."""
    store = founded(opened())
    stage(store, 20, 20)
    store.write()
    stage(store, 20, 300)
    assert store.extend_tail()
    written = whole_log(store.journal)
    assert store.read_entries(1, 4, GIB) == written
    assert store.read_entries(3, 4, GIB) == written[2:]
    assert store.read_id(4) == EntryId(1, 4)


def test_the_next_transaction_takes_all_over(opened: Callable[..., Store], tmp_path: Path) -> None:
    """A transaction, for whatever reason, has the entries of the tail with it, and ends their generation."""
    store = founded(opened())
    stage(store, 20)
    assert store.extend_tail()
    fact = store._tail.fact
    stage(store, 20)
    store.write()
    assert in_lmdb(store) == [1, 2]
    assert store._tail.fact == TailFact(fact.generation + 1, fact.bytes)
    assert tail.look(tmp_path / "node", store._tail.fact, 2).records == {}


def a_ballot(store: Store) -> None:
    store.ballot = store.ballot.in_term(2)


def a_bound_member(store: Store) -> None:
    store.bind(OTHERS[0], "0123456789abcdef")


def a_cut(store: Store) -> None:
    other = some_entries(1, (20,), term=2)
    store.ballot = store.ballot.in_term(2)
    store.write(store.ballot)
    store.journal.accept(GENESIS, other, 0)


@pytest.mark.parametrize("change", [a_ballot, a_bound_member, a_cut])
def test_whatever_else_is_new_takes_a_transaction(
    opened: Callable[..., Store], change: Callable[[Store], None]
) -> None:
    """The tail has entries and nothing else: with a fact that is not on disk, or a cut, it is not used."""
    store = founded(opened())
    stage(store, 20)
    store.write()
    change(store)
    stage(store, 20)
    assert not store.extend_tail()
    assert store.journal.has_unwritten, "nothing was done"
    store.write()
    stage(store, 20)
    assert store.extend_tail()


def test_many_large_or_no_entries_take_a_transaction(opened: Callable[..., Store]) -> None:
    """The tail is for little; `tail_write_bytes` is the limit, and 1 turns it off."""
    store = founded(opened(tail_write_bytes=2000))
    assert not store.extend_tail(), "nothing is new"
    stage(store, 2000)
    assert not store.extend_tail()
    store.write()
    stage(store, *([20] * 100))
    assert not store.extend_tail()
    store.write()
    stage(store, 1000)
    assert store.extend_tail()
    store.close()
    off = opened(tail_write_bytes=1)
    off.write(off.ballot.in_term(3))
    stage(off, 1)
    assert not off.extend_tail()


def test_a_full_tail_takes_a_transaction(opened: Callable[..., Store]) -> None:
    """When there is no room, the next transaction makes room again."""
    store = founded(opened(tail_bytes=3 * BLOCK))
    for _ in range(3):
        for _ in range(3):
            stage(store, 20)
            assert store.extend_tail()
        stage(store, 20)
        assert not store.extend_tail()
        store.write()
    assert in_lmdb(store) == list(range(1, 13))


def test_a_cut_takes_what_is_in_the_tail_with_it(opened: Callable[..., Store], tmp_path: Path) -> None:
    """A new leader has other entries than some of those in the tail: these are gone, also after a crash, and those
    before them are kept."""
    store = founded(opened())
    stage(store, 20, 20)
    store.write()
    stage(store, 20)
    assert store.extend_tail()
    stage(store, 20, 20)
    assert store.extend_tail()
    ballot = store.ballot.in_term(2)
    command, before = put("other", 20), store.journal.mark_at(3)
    other = Entry(2, 4, 0, chain(before.checksum, 2, 4, 0, command), command)
    store.journal.accept(before.id, [other], 0)
    store.write(ballot)
    expected = whole_log(store.journal)
    assert [entry.term for entry in expected] == [1, 1, 1, 2]
    shutil.copytree(tmp_path / "node", tmp_path / "crashed")
    assert whole_log(opened("crashed").journal) == expected


def test_a_write_that_fails_ends_the_store(opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error nobody knows what is on disk: the store says so and takes nothing more (TRAPS, LMDB)."""
    store = founded(opened())
    stage(store, 20)

    def fails(fd: int, data: bytes, offset: int) -> int:  # noqa: ARG001 - as the system's
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", fails)
        with pytest.raises(StoreFailed, match=r"raftnode\.tail failed: .*Input/output error"):
            store.extend_tail()
    assert store.journal.has_unwritten
    for use in (store.extend_tail, store.write, lambda: store.read_entries(1, 1, 0)):
        with pytest.raises(StoreFailed):
            use()


def test_half_a_write_ends_the_store(opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """The system has taken a part only, as on a full disk."""
    store = founded(opened())
    stage(store, 20)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", lambda fd, data, offset: SECTOR - 1)  # noqa: ARG005 - as the system's
        with pytest.raises(StoreFailed, match="only a part was written"):
            store.extend_tail()


def crashed_with_a_tail(opened: Callable[..., Store], tmp_path: Path) -> Path:
    """A directory whose entries 1 and 2 are in LMDB, and 3 to 5 in three records of the tail."""
    store = founded(opened())
    stage(store, 20, 20)
    store.write()
    for _ in range(3):
        stage(store, 300)
        assert store.extend_tail()
    return Path(shutil.copytree(tmp_path / "node", tmp_path / "crashed"))


@pytest.mark.parametrize(
    ("place", "lost"),
    [
        (0, "entry 3 is lost"),
        (BLOCK + SECTOR - 1, "entry 4 is lost"),
        (2 * BLOCK + 100, "entry 5 is lost, and maybe later ones"),
    ],
)
def test_a_start_with_a_damaged_tail_is_refused(
    opened: Callable[..., Store], tmp_path: Path, place: int, lost: str
) -> None:
    """... with the entry, the file, and the command that helps; nothing is changed by the try."""
    directory = crashed_with_a_tail(opened, tmp_path)
    file = directory / records.TAIL_FILE
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)
    for _ in range(2):
        with pytest.raises(StoreDamaged, match=rf"{lost}\. .*raftnode repair") as damage:
            opened("crashed")
        assert str(directory) in str(damage.value)
    assert file.read_bytes() == content
    content[place] ^= 4
    file.write_bytes(content)
    assert opened("crashed").journal.last.id == EntryId(1, 5)


@pytest.mark.parametrize("is_used", [True, False])
def test_a_start_without_the_tail_is_refused(opened: Callable[..., Store], tmp_path: Path, is_used: bool) -> None:
    """The file was left out when the directory was copied: whether it held anything can't be known."""
    directory = crashed_with_a_tail(opened, tmp_path)
    if not is_used:
        store = opened("crashed")
        store.write(store.ballot.in_term(2))  # the new tail is in use from here on
        store.close()
    (directory / records.TAIL_FILE).unlink()
    last = 2 if is_used else 5
    with pytest.raises(StoreDamaged, match=rf"raftnode\.tail is gone or empty.*entry {last + 1}.*raftnode repair"):
        opened("crashed")


def test_after_a_clean_end_the_data_file_has_everything(opened: Callable[..., Store], tmp_path: Path) -> None:
    """A node that has ended as it should can be moved with its data file alone; the next start makes a new tail."""
    store = founded(opened())
    stage(store, 20)
    assert store.extend_tail()
    store.finish()
    stage(store, 20)
    assert not store.extend_tail(), "nothing goes there any more"
    store.write()
    store.close()
    (tmp_path / "moved").mkdir()
    shutil.copy(tmp_path / "node" / records.DATA_FILE, tmp_path / "moved")
    again = opened("moved")
    assert again.journal.last.id == EntryId(1, 2)
    again.write(again.ballot.in_term(2))
    stage(again, 20)
    assert again.extend_tail()


def test_a_torn_write_is_forgotten_by_a_start(opened: Callable[..., Store], tmp_path: Path) -> None:
    """The only record of the tail was torn, and all of it but its first sector is there: a start drops it. The record
    that is written over it later is torn as well, and only its first sector is there: the two are not taken for one,
    whatever else has happened in between."""
    store = founded(opened())
    file = tmp_path / "node" / records.TAIL_FILE
    for sectors, value in ((slice(0, SECTOR), 600), (slice(SECTOR, BLOCK), 600)):
        before = file.read_bytes()
        stage(store, value)
        assert store.extend_tail()
        content = bytearray(file.read_bytes())
        content[sectors] = before[sectors]
        file.write_bytes(content)
        store.close()
        store = opened()
        assert store.journal.last.id == GENESIS
        store.write(store.ballot.in_term(store.ballot.term + 1))
    stage(store, 300)
    assert store.extend_tail()


def test_another_size_is_taken_at_a_start(opened: Callable[..., Store], tmp_path: Path) -> None:
    """The setting has changed: what is there is taken over first."""
    crashed_with_a_tail(opened, tmp_path)
    store = opened("crashed", tail_bytes=5 * BLOCK)
    assert store.journal.last.id == EntryId(1, 5)
    assert (tmp_path / "crashed" / records.TAIL_FILE).stat().st_size == 5 * BLOCK
    store.write(store.ballot.in_term(2))
    store.close()
    assert opened("crashed", tail_bytes=8 * BLOCK).journal.last.id == EntryId(1, 5), "also when nothing is there"
    assert (tmp_path / "crashed" / records.TAIL_FILE).stat().st_size == 8 * BLOCK


def test_a_directory_of_format_3_goes_on(opened: Callable[..., Store], tmp_path: Path) -> None:
    """It has no tail, and no fact of that name: both come with the first start, and the format with the first
    transaction, before anything is in the tail."""
    store = founded(opened(tail_write_bytes=1))
    stage(store, 20)
    store.write()
    store.close()
    directory = tmp_path / "node"
    (directory / records.TAIL_FILE).unlink()
    with lmdb.open(str(directory / records.DATA_FILE), subdir=False, max_dbs=16, map_size=GIB) as env:
        meta = env.open_db(records.META, create=False)
        with env.begin(write=True) as txn:
            txn.delete(b"tail", db=meta)
            txn.put(b"format", records.pack_meta(b"format", 3), db=meta)
    again = opened()
    stage(again, 20)
    assert not again.extend_tail(), "an older raftnode would not see it"
    again.write()
    stage(again, 20)
    assert again.extend_tail()
    again.close()
    assert opened().journal.last.id == EntryId(1, 3)


def test_a_directory_that_does_not_say_what_its_tail_is_is_refused(
    opened: Callable[..., Store], tmp_path: Path
) -> None:
    """The record is missing: the tail may have entries that were acknowledged."""
    founded(opened()).close()
    with lmdb.open(str(tmp_path / "node" / records.DATA_FILE), subdir=False, max_dbs=16, map_size=GIB) as env:
        meta = env.open_db(records.META, create=False)
        with env.begin(write=True) as txn:
            txn.delete(b"tail", db=meta)
    with pytest.raises(StoreDamaged, match="does not say whether it has a tail"):
        opened()


@pytest.mark.parametrize("seed", range(30))
def test_any_history_is_kept(opened: Callable[..., Store], tmp_path: Path, seed: int) -> None:
    """Entries of chance, cuts of chance, writes of either kind, and crashes of chance, some in the middle of a write to
    the tail: the log is always what was written."""
    chance, runs = random.Random(seed), itertools.count()
    name = f"run-{next(runs)}"
    store = founded(opened(name, tail_bytes=4 * BLOCK))
    written: list[Entry] = []
    kinds = {"tail": 0, "transaction": 0, "cut": 0, "crash": 0, "torn": 0}
    for _ in range(60):
        dice = chance.random()
        if dice < 0.1 and len(written) > 1:
            at = chance.randrange(1, len(written))
            store.ballot = store.ballot.in_term(store.ballot.term + 1)
            before, command = store.journal.mark_at(at), put(f"other-{at}", 20)
            checksum = chain(before.checksum, store.ballot.term, at + 1, 0, command)
            store.journal.accept(before.id, [Entry(store.ballot.term, at + 1, 0, checksum, command)], 0)
            kinds["cut"] += 1
        else:
            stage(store, *chance.choices(SIZES, k=chance.randrange(1, 3)))
        file = tmp_path / name / records.TAIL_FILE
        content = file.read_bytes()
        if store.extend_tail():
            kinds["tail"] += 1
            if chance.random() < 0.2:
                tear(file, content, chance)
                store.close()
                kinds["torn"] += 1
                store = opened(name, tail_bytes=4 * BLOCK)
                assert whole_log(store.journal)[: len(written)] == written
                written = whole_log(store.journal)
                continue
        else:
            store.write()
            kinds["transaction"] += 1
        written = whole_log(store.journal)
        if chance.random() < 0.15:
            crashed = f"run-{next(runs)}"
            shutil.copytree(tmp_path / name, tmp_path / crashed)
            store.close()
            name, store = crashed, opened(crashed, tail_bytes=4 * BLOCK)
            kinds["crash"] += 1
        assert whole_log(store.journal) == written
        assert store.read_entries(1, len(written), GIB) == written
    assert all(kinds.values()), f"everything has happened: {kinds}"


def tear(file: Path, before: bytes, chance: random.Random) -> None:
    """Put some of the sectors back that the last write has changed."""
    content = bytearray(file.read_bytes())
    changed = [at for at in range(0, len(content), SECTOR) if content[at : at + SECTOR] != before[at : at + SECTOR]]
    for at in chance.sample(changed, chance.randrange(1, len(changed) + 1)):
        content[at : at + SECTOR] = before[at : at + SECTOR]
    file.write_bytes(content)


def test_the_docstring_is_right_about_the_bytes() -> None:
    """Sizes that the module's text tells."""
    text = tail.__doc__ or ""
    assert re.search(rf"sector    {SECTOR} bytes", text)
    assert f"multiple of {BLOCK} bytes" in text
    assert f"{SECTOR - 14} bytes of a record" in text
