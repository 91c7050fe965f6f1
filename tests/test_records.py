"""Records: what is written is what is read, and no flipped bit goes unnoticed (store docstring; TRAPS, LMDB: LMDB has
no checksums, and 280 of 300 flipped bits came back as wrong values in silence)."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw

from raftnode import records
from raftnode.consensus.ballot import Ballot
from raftnode.consensus.journal import Mark
from raftnode.consensus.membership import Membership
from raftnode.errors import StoreDamaged
from raftnode.messages import Entry, EntryId, Noop, PutCommand, chain, encode_command, store_key
from raftnode.records import Record

fixed = settings(derandomize=True, database=None, deadline=None, max_examples=200)

u64 = st.integers(0, 2**63 - 1) | st.sampled_from([0, 1, 255, 256, 2**32, 2**63 - 1])
commands = st.binary(min_size=1, max_size=80)
keys = st.tuples(st.text(min_size=1, max_size=8).filter(lambda t: "\0" not in t), st.text(min_size=1, max_size=20)).map(
    lambda names: store_key(*names)
)
values = st.binary(min_size=1, max_size=60)
stored_records = st.builds(Record, created=u64, modified=u64, version=u64, lease=u64, value=values.map(Raw))

# --- helpers --------------------------------------------------------------------------------------------------


def entry(term: int, commit_id: int, time: int, command: bytes, previous: int = 0) -> Entry:
    return Entry(term, commit_id, time, chain(previous, term, commit_id, time, command), Raw(command))


def flipped_each(stored: bytes) -> list[bytes]:
    """The record with each of its bits flipped, one at a time."""
    found = []
    for at in range(8 * len(stored)):
        copy = bytearray(stored)
        copy[at // 8] ^= 1 << at % 8
        found.append(bytes(copy))
    return found


def matches(found: Entry, previous: int) -> bool:
    """The check that every reader of the log makes."""
    return chain(previous, found.term, found.commit_id, found.time, found.command) == found.checksum


def plain(record: Record) -> tuple[int, int, int, int, bytes]:
    return record.created, record.modified, record.version, record.lease, bytes(record.value)


# --- positions ------------------------------------------------------------------------------------------------


@fixed
@given(a=u64, b=u64)
def test_positions_keep_their_order(a: int, b: int) -> None:
    """LMDB orders keys as bytes: a later commit_id must be a larger key, and reads back as itself."""
    assert (records.log_key(a) < records.log_key(b)) == (a < b)
    assert records.position_of(records.log_key(a)) == a


@pytest.mark.parametrize("key", [b"", b"1234567", b"123456789"])
def test_a_key_that_is_no_position_is_damage(key: bytes) -> None:
    """A key of another length can't be a commit_id: said, not guessed."""
    with pytest.raises(StoreDamaged, match=f"{len(key)} bytes"):
        records.position_of(key)


# --- log entries ----------------------------------------------------------------------------------------------


@fixed
@given(term=u64, commit_id=u64, time=u64, command=commands, previous=st.integers(0, 2**32 - 1))
def test_an_entry_comes_back(term: int, commit_id: int, time: int, command: bytes, previous: int) -> None:
    """Any entry, with whatever bytes for a command, reads back as it was, and its checksum holds."""
    written = entry(term, commit_id, time, command, previous)
    found = records.unpack_entry(commit_id, records.pack_entry(written))
    assert found == written
    assert bytes(found.command) == command
    assert matches(found, previous)


def test_the_bytes_of_an_entry_are_fixed() -> None:
    """The format is what the documentation says, so that files of older versions stay readable."""
    command = b'{"kind":"noop"}'
    written = entry(3, 7, 1_700_000_000_123, command, previous=0xDEADBEEF)
    checksum = zlib.crc32(struct.pack(">QQQ", 3, 7, 1_700_000_000_123) + command, 0xDEADBEEF)
    assert written.checksum == checksum
    assert records.pack_entry(written) == struct.pack(">BQQI", 1, 3, 1_700_000_000_123, checksum) + command


@pytest.mark.parametrize(
    "command",
    [encode_command(Noop()), encode_command(PutCommand(namespace="n", key="k", value=Raw(b'"' + b"v" * 200 + b'"')))],
    ids=["noop", "put"],
)
def test_every_flipped_bit_of_an_entry_is_noticed(command: Raw) -> None:
    """Each single bit of the record, flipped, breaks the format or the checksum; and so does the record put at another
    commit_id or behind another history (TRAPS 37)."""
    previous = 0x1234
    written = entry(5, 9, 1_700_000_000_000, bytes(command), previous)
    stored = records.pack_entry(written)
    for number, broken in enumerate(flipped_each(stored)):
        try:
            found = records.unpack_entry(9, broken)
        except StoreDamaged:
            assert number < 8, "only the format byte is judged by itself"
            continue
        assert not matches(found, previous), f"bit {number}"
    moved = records.unpack_entry(10, stored)
    assert not matches(moved, previous)
    for bit in range(32):
        assert not matches(records.unpack_entry(9, stored), previous ^ 1 << bit)


@fixed
@given(commands=st.lists(commands, min_size=2, max_size=6), data=st.data())
def test_a_change_is_seen_in_all_that_follows(commands: list[bytes], data: st.DataObject) -> None:
    """The checksum is rolling: when one bit of one entry differs, the checksums of that entry and of each later one
    differ, so equal checksums at one commit_id mean equal histories up to there (store docstring)."""
    at = data.draw(st.integers(0, len(commands) - 1))
    bit = data.draw(st.integers(0, 8 * len(commands[at]) - 1))
    changed = bytearray(commands[at])
    changed[bit // 8] ^= 1 << bit % 8
    others = [*commands[:at], bytes(changed), *commands[at + 1 :]]

    def checksums(history: list[bytes]) -> list[int]:
        checksum, found = 0, []
        for commit_id, command in enumerate(history, start=1):
            checksum = chain(checksum, 1, commit_id, 0, command)
            found.append(checksum)
        return found

    one, other = checksums(commands), checksums(others)
    assert one[:at] == other[:at]
    assert all(a != b for a, b in zip(one[at:], other[at:], strict=True))


@pytest.mark.parametrize("length", range(22))
def test_a_cut_off_entry_is_damage(length: int) -> None:
    """A record that ends before its command begins is said to be cut off, with its commit_id."""
    stored = records.pack_entry(entry(1, 4, 0, b"{}"))
    with pytest.raises(StoreDamaged) as damage:
        records.unpack_entry(4, stored[:length])
    assert damage.value.commit_id == 4


def test_a_command_cut_off_is_noticed() -> None:
    """Each shorter command breaks the checksum; so does a longer one."""
    command = b'{"kind":"put","namespace":"n","key":"k","value":"0000"}'
    stored = records.pack_entry(entry(1, 4, 0, command))
    for length in range(22, len(stored)):
        assert not matches(records.unpack_entry(4, stored[:length]), 0)
    assert not matches(records.unpack_entry(4, stored + b"\0"), 0)


# --- committed values -----------------------------------------------------------------------------------------


@fixed
@given(key=keys, record=stored_records)
def test_a_value_comes_back(key: bytes, record: Record) -> None:
    """Any value under any key reads back with its numbers and byte for byte."""
    assert plain(records.unpack_record(key, records.pack_record(key, record))) == plain(record)


def test_the_bytes_of_a_value_are_fixed() -> None:
    """The format is what the documentation says."""
    body = struct.pack(">QQQQ", 1, 2, 3, 4) + b'"v"'
    stored = struct.pack(">I", zlib.crc32(b"n\0k" + body)) + body
    assert records.pack_record(b"n\0k", Record(1, 2, 3, 4, Raw(b'"v"'))) == stored


def test_every_flipped_bit_of_a_value_is_noticed() -> None:
    """Each single bit of a committed value, flipped, is StoreDamaged, in words that name key and namespace; so is each
    flipped bit of its key, each shorter record, and a longer one."""
    key = store_key("names", "kéy\0")
    stored = records.pack_record(key, Record(3, 5, 2, 0, Raw(b'{"a":[1,2,3]}')))
    broken = [*flipped_each(stored), *(stored[:length] for length in range(len(stored))), stored + b" "]
    for bad in broken:
        with pytest.raises(StoreDamaged, match=r"kéy.*names"):
            records.unpack_record(key, bad)
    for other in flipped_each(key):
        with pytest.raises(StoreDamaged):
            records.unpack_record(other, stored)


# --- facts about the node -------------------------------------------------------------------------------------

addresses = st.dictionaries(st.text("ab:1é", max_size=4), st.text(max_size=8), max_size=3)
memberships = st.builds(
    lambda commit_id, voters, learners: Membership(
        commit_id=commit_id, voters=voters, learners={a: n for a, n in learners.items() if a not in voters}
    ),
    u64,
    addresses.filter(bool),
    addresses,
)
facts: st.SearchStrategy[tuple[Any, Any]] = st.one_of(
    st.tuples(u64, st.just(int)),
    st.tuples(st.text(max_size=20), st.just(str)),
    st.tuples(st.builds(Ballot, u64, st.none() | st.text(max_size=20)), st.just(Ballot)),
    st.tuples(st.builds(Mark, st.builds(EntryId, u64, u64), st.integers(0, 2**32 - 1)), st.just(Mark)),
    st.tuples(st.lists(memberships, max_size=3), st.just(list[Membership])),
)


@fixed
@given(name=st.sampled_from([b"ballot", b"node", b"commit_id", b""]), fact=facts)
def test_a_fact_comes_back(name: bytes, fact: tuple[Any, Any]) -> None:
    """Every fact that a node keeps of itself reads back as the same value of the same type."""
    value, type = fact
    found = records.unpack_meta(name, records.pack_meta(name, value), type)
    assert found == value


def test_every_flipped_bit_of_a_fact_is_noticed() -> None:
    """Each single bit of a ballot, flipped, is StoreDamaged in words that name the record: a node must not vote twice
    because of it (TRAPS 1). So is each shorter record, and a record of one name under another."""
    stored = records.pack_meta(b"ballot", Ballot(7, "127.0.0.1:5001"))
    for bad in [*flipped_each(stored), *(stored[:length] for length in range(len(stored))), stored + b" "]:
        with pytest.raises(StoreDamaged, match="'ballot'"):
            records.unpack_meta(b"ballot", bad, Ballot)
    with pytest.raises(StoreDamaged):
        records.unpack_meta(b"Ballot", stored, Ballot)


@pytest.mark.parametrize(
    ("body", "type"),
    [(b"nonsense", int), (b"{}", int), (b'"7"', int), (b"[]", Ballot), (b'{"term":"x"}', Ballot), (b"null", str)],
)
def test_a_fact_of_the_wrong_shape_is_damage(body: bytes, type: Any) -> None:
    """A checksum that holds over what is no such fact (a defect, or another program) is damage too, never a crash."""
    stored = struct.pack(">I", zlib.crc32(b"fact" + body)) + body
    with pytest.raises(StoreDamaged, match="'fact'"):
        records.unpack_meta(b"fact", stored, type)


def test_a_newer_fact_may_have_more_fields() -> None:
    """A field that this version does not know is passed over: an older version reads what a newer one wrote, as long
    as the format's number is the same."""
    body = msgspec.json.encode({"term": 3, "voted_for": None, "more": 1})
    stored = struct.pack(">I", zlib.crc32(b"ballot" + body)) + body
    assert records.unpack_meta(b"ballot", stored, Ballot) == Ballot(3, None)
