"""The bytes on disk: how each record is written and checked. Layer 1, pure.

All numbers are big-endian, so that LMDB's order of keys is the order of positions.

    database     key                       value
    log          commit_id u64             format u8, term u64, leader's time ms u64, checksum u32, command JSON
    committed    namespace 00 key (UTF-8)  checksum u32, created u64, modified u64, version u64, lease u64, value JSON
    committed-2  as committed: one of the two is the state, the fact `state` says which; the other is empty, or on its
                 way in or out (see `states`)
    meta         name                      checksum u32, JSON

The checksum of a log record is the rolling one of `messages.chain`: it needs the checksum of the entry before to be
checked. The others are CRC-32 over the key and all that follows the checksum. LMDB itself has none: of 300 flipped bits
280 were read back as wrong values in silence (TRAPS, LMDB), so nothing is used here without its check.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import msgspec
from msgspec import Raw, Struct
from zlib_ng.zlib_ng import crc32

from raftnode.errors import StoreDamaged
from raftnode.messages import Entry

FORMAT: Final = 4
"""Format of the whole directory, in `meta`; raised when an older version could misread a newer directory.
1: one state database, called `committed`. 2: two, and the fact `state`. 3: the fact `behind` (see `namespaces`).
4: the tail, and the fact of that name (see `tail`)."""

DATA_FILE: Final = "raftnode.mdb"
TAIL_FILE: Final = "raftnode.tail"
LOCK_FILE: Final = "raftnode.lock"
COPY_FILE: Final = "raftnode.mdb-new"
"""What is to take the place of the data file, while it is made (`raftnode compact`); of no use to anybody else."""

LOG: Final = b"log"
COMMITTED: Final = b"committed"
SECOND: Final = b"committed-2"
STATES: Final = (COMMITTED, SECOND)
META: Final = b"meta"
DATABASES: Final = (LOG, COMMITTED, META, SECOND)
STATE_FACT: Final = b"state"

_position = struct.Struct(">Q")
_log_header = struct.Struct(">BQQI")
_value_header = struct.Struct(">QQQQ")
_checksum = struct.Struct(">I")
_stored_header = struct.Struct(">IQQQQ")  # those two, before a value
_ENTRY_FORMAT: Final = 1
ENTRY_HEAD_BYTES: Final = _log_header.size
"""What a log record has besides the command."""

log_key = _position.pack


def position_of(key: bytes) -> int:
    """The commit_id of a key in the log."""
    if len(key) != _position.size:
        raise StoreDamaged(f"the log has a key of {len(key)} bytes; a commit_id has 8")
    found: int = _position.unpack(key)[0]
    return found


def pack_entry(entry: Entry) -> bytes:
    """An entry as a log record."""
    header = _log_header.pack(_ENTRY_FORMAT, entry.term, entry.time, entry.checksum)
    return b"".join((header, entry.command))


def unpack_entry(commit_id: int, record: bytes) -> Entry:
    """The entry in a log record; its rolling checksum is not checked here. Raises StoreDamaged."""
    if len(record) <= _log_header.size:
        raise StoreDamaged(f"log entry {commit_id} is cut off after {len(record)} bytes", commit_id)
    version, term, time, checksum = _log_header.unpack_from(record)
    if version != _ENTRY_FORMAT:
        raise StoreDamaged(f"log entry {commit_id} has record format {version}, which does not exist", commit_id)
    return Entry(term, commit_id, time, checksum, Raw(record[_log_header.size :]))


class Record(Struct, frozen=True, gc=False):
    """One committed value. Invariant: created <= modified."""

    created: int
    """commit_id of the put that created the key (anew after a delete)."""
    modified: int
    """commit_id of the put that wrote this value."""
    version: int
    """Puts since it was created; the first makes 1."""
    lease: int
    """The lease that it ends with; 0 for none."""
    value: Raw


def pack_record(key: bytes, record: Record) -> bytes:
    """A committed value as it is stored under `key`."""
    header = _value_header.pack(record.created, record.modified, record.version, record.lease)
    checksum = crc32(record.value, crc32(header, crc32(key)))
    return b"".join((_checksum.pack(checksum), header, record.value))


def unpack_record(key: bytes, stored: bytes) -> Record:
    """The committed value stored under `key`. Raises StoreDamaged."""
    if len(stored) > _stored_header.size:
        checksum, created, modified, version, lease = _stored_header.unpack_from(stored)
        if checksum == crc32(memoryview(stored)[_checksum.size :], crc32(key)):
            return Record(created, modified, version, lease, Raw(stored[_stored_header.size :]))
    namespace, _, name = key.partition(b"\0")
    shown = f"{name.decode(errors='replace')!r} in namespace {namespace.decode(errors='replace')!r}"
    raise StoreDamaged(f"the value of key {shown} does not match its checksum")


def state_named(stored: bytes | None) -> bytes:
    """Which database is the state, by the fact of that name; in format 1 there was none. Raises StoreDamaged."""
    name: bytes = COMMITTED if stored is None else unpack_meta(STATE_FACT, stored, str).encode()
    if name not in STATES:
        raise StoreDamaged(f"the record 'state' of the node names {name.decode()!r}, which does not exist")
    return name


def pack_meta(name: bytes, fact: object) -> bytes:
    """A fact about the node, as JSON behind its checksum."""
    body = msgspec.json.encode(fact)
    return _checksum.pack(crc32(body, crc32(name))) + body


def unpack_meta(name: bytes, stored: bytes, type: Any) -> Any:
    """The fact stored under `name`. Raises StoreDamaged."""
    body = stored[_checksum.size :]
    if len(stored) <= _checksum.size or _checksum.unpack_from(stored)[0] != crc32(body, crc32(name)):
        raise StoreDamaged(f"the record {name.decode(errors='replace')!r} of the node does not match its checksum")
    try:
        return msgspec.json.decode(body, type=type)
    except ValueError as error:
        raise StoreDamaged(
            f"the record {name.decode(errors='replace')!r} of the node can't be read: {error}"
        ) from error
