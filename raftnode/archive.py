"""Backups of a live cluster, and new clusters from them. Layer 5.

**The file** is lines of JSON, so that it can be read, searched and compared without raftnode:

    {"record":"backup", ...}    the first: of which cluster, from which node, when
    {"record":"value", ...}     a committed value, with created, modified, version and its checksum
    {"record":"gone", ...}      a key of which a value stands above, and which was deleted while the backup was taken
    {"record":"end", ...}       the last: commit_id, term and rolling checksum of the entry that it is as of, the number
                                of keys, and a CRC-32 of all lines above

The state changes while it is copied (see `snapshots`), so a key may stand in it twice: the later line counts. With the
end, all is exactly as of its commit_id, which includes every write that was acknowledged before the backup began. A
backup without an end is none: it is written beside, synced, and gets its name when it is whole.

**A restore** makes a directory of it: a new node, the only voter of a new cluster, whose log begins after the backup's
commit_id; so commit_ids go on from there, and values keep theirs. The cluster has a new id: nodes of the one that the
backup is from never mix with it. The values are put where a snapshot comes in; only the last transaction makes a node
of them, so a restore that is killed leaves a directory that refuses to start, and can be done again.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

import msgspec
from msgspec import UNSET, Raw, Struct
from zlib_ng.zlib_ng import crc32

from raftnode import records
from raftnode.blocking import ConnectFailed, LineConnection
from raftnode.config import Settings
from raftnode.consensus.membership import Membership
from raftnode.environment import sync_directory
from raftnode.errors import ProtocolError, StoreDamaged, StoreError, StoreFailed, StoreForeign, Unavailable, error_for
from raftnode.messages import (
    LMDB_KEY_BYTES,
    Answer,
    Backup,
    BackupAnswer,
    EntryId,
    Get,
    GetAnswer,
    Request,
    Snapshot,
    SnapshotEnd,
    SnapshotRecord,
    decode_answer,
    encode,
    store_key,
)
from raftnode.store import Store

FORMAT: Final = 1
_CHUNK_BYTES: Final = 1 << 20
_LINE_BYTES: Final = 512
"""Of a line besides its value, at the most, about."""

Advance = Callable[[int, int], object]
"""Told how many keys or bytes are done, of how many."""


class Header(Struct, tag_field="record", tag="backup", kw_only=True):
    """The first line."""

    format: int
    cluster: str
    node: str
    """Address of the node that it was taken from."""
    begun: int
    """When, in ms since 1970."""


class Value(Struct, tag_field="record", tag="value", kw_only=True):
    """A committed value."""

    namespace: str
    key: str
    created: int
    modified: int
    version: int
    lease: int
    checksum: int
    """CRC-32 over the key, the numbers and the value, as it is stored."""
    value: Raw


class Gone(Struct, tag_field="record", tag="gone", kw_only=True):
    """A key whose value, given above, is no more."""

    namespace: str
    key: str


class End(Struct, tag_field="record", tag="end", kw_only=True):
    """The last line."""

    commit_id: int
    term: int
    checksum: int
    """The rolling checksum of that entry: two backups with the same are of one history."""
    keys: int
    lines: int
    """How many stand above."""
    crc: int
    """CRC-32 of them, with their ends."""


Line = Header | Value | Gone | End
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Line).decode


# --- taking a backup ------------------------------------------------------------------------------------------


def take(node: str, file: Path, *, timeout: float, advance: Advance, settings: Settings | None = None) -> End:
    """Take a backup from the live node at `node` into `file`, which must not exist yet. `timeout`: seconds for each
    answer. `advance` is told keys.

    Raises StoreForeign when the file is there, StoreFailed when it can't be written, RequestError when the node can't
    be reached, refuses or is lost: then there is no file.
    """
    if file.exists():
        raise StoreForeign(f"{file} is there already: name another file, or remove it")
    limit = (settings or Settings()).peer_frame_bytes
    try:
        with (
            contextlib.closing(LineConnection(node, timeout, limit)) as connection,
            _beside(file) as out,
        ):
            return _take(connection, _Writer(out), timeout, advance)
    except ConnectFailed as error:
        raise Unavailable("no_leader", f"no connection to {error}; is a node running there?") from error
    except ProtocolError as error:
        raise Unavailable(error.code, f"{node}: {error}") from error


def _take(connection: LineConnection, writer: _Writer, timeout: float, advance: Advance) -> End:
    newest = _ask(connection, Get(key="raftnode"), timeout)
    assert isinstance(newest, GetAnswer), "it answers a get"
    begun = int(time.time() * 1000)
    message, keys = Backup(at_least=newest.commit_id or 0), 0
    while True:
        answer = _ask(connection, message, timeout)
        assert isinstance(answer, BackupAnswer), "it answers a backup"
        if message.transfer == 0:
            writer.write(Header(format=FORMAT, cluster=answer.cluster, node=answer.node, begun=begun))
        for record in answer.records:
            writer.write(Value(**{name: getattr(record, name) for name in record.__struct_fields__}))
        for namespace, key in answer.gone:
            writer.write(Gone(namespace=namespace, key=key))
        keys += len(answer.records)
        advance(min(keys, answer.keys), answer.keys)
        if answer.end is not UNSET:
            return writer.end(answer.end)
        message = Backup(transfer=answer.transfer, seq=answer.seq + 1)


def _ask(connection: LineConnection, request: Request, timeout: float) -> Answer:
    """Raises RequestError when the node refuses or is lost."""
    try:
        answer = decode_answer(connection.request(encode(request), timeout))
    except OSError as error:
        raise Unavailable("no_leader", f"the answer of {connection.address} was lost ({error})") from error
    if answer.error is not UNSET:
        raise error_for(answer.error.code, answer.error.message)
    if answer.__struct_config__.tag != request.name:
        raise ProtocolError("bad_request", f"that is no answer to a {request.name}")
    return answer


@contextlib.contextmanager
def _beside(file: Path) -> Iterator[BinaryIO]:
    """A new file that takes its name only when all was written and synced. Raises StoreFailed."""
    partial = file.with_name(f"{file.name}.partial")
    try:
        with partial.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        partial.rename(file)
        sync_directory(file.resolve().parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StoreFailed(f"{file} can't be written: {error.strerror or error}") from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


class _Writer:
    """Writes lines, and keeps their CRC."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._lines = 0
        self._crc = 0

    def write(self, line: Line) -> None:
        text = _encode(line) + b"\n"
        self._crc = crc32(text, self._crc)
        self._lines += 1
        self._out.write(text)

    def end(self, end: SnapshotEnd) -> End:
        """The last line."""
        line = End(
            commit_id=end.id.commit_id,
            term=end.id.term,
            checksum=end.checksum,
            keys=end.keys,
            lines=self._lines,
            crc=self._crc,
        )
        self.write(line)
        return line


# --- reading one ----------------------------------------------------------------------------------------------


def check(file: Path, *, advance: Advance, settings: Settings | None = None) -> tuple[Header, End]:
    """Read a whole backup and check everything that it says of itself. `advance` is told bytes. Raises StoreForeign for
    a file that is none, StoreDamaged for one that is not whole."""
    header: Header | None = None
    end: End | None = None
    crc = lines = done = 0
    with _opened(file) as source:
        total = os.fstat(source.fileno()).st_size
        for text, line in _lines(file, source, settings):
            if header is None and not isinstance(line, Header):
                raise StoreForeign(f"{file} is no backup of raftnode: it does not begin as one")
            if header is not None and (isinstance(line, Header) or end is not None):
                raise StoreDamaged(f"{file} is damaged: line {lines + 1} can't stand there")
            if isinstance(line, Header):
                header = line
                if line.format > FORMAT:
                    raise StoreForeign(f"{file} is a backup of format {line.format}: restore it with a newer raftnode")
            elif isinstance(line, End):
                end = line
                if (line.crc, line.lines) != (crc, lines):
                    raise StoreDamaged(f"{file} is damaged: its lines do not match the checksum in its last one")
            elif isinstance(line, Value):
                _check_value(file, line)
            crc, lines, done = crc32(text, crc), lines + 1, done + len(text)
            advance(done, total)
    if header is None:
        raise StoreForeign(f"{file} is no backup of raftnode: it is empty")
    if end is None:
        raise StoreDamaged(f"{file} is not whole: it has no end. Use another backup")
    return header, end


def _check_value(file: Path, line: Value) -> None:
    record = records.Record(line.created, line.modified, line.version, line.lease, line.value)
    stored = records.pack_record(store_key(line.namespace, line.key), record)
    if int.from_bytes(stored[:4]) != line.checksum:
        raise StoreDamaged(f"{file} is damaged: the value of key {line.key!r} does not match its checksum")


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    try:
        with file.open("rb") as source:
            yield source
    except OSError as error:
        raise StoreForeign(f"{file} can't be read: {error.strerror or error}") from error


def _lines(file: Path, source: BinaryIO, settings: Settings | None) -> Iterator[tuple[bytes, Line]]:
    """Each line, as it is and what it says. Raises StoreDamaged, StoreForeign."""
    limit = (settings or Settings()).frame_bytes + 6 * LMDB_KEY_BYTES + _LINE_BYTES
    number = 0
    while text := source.readline(limit + 1):
        number += 1
        try:
            if not text.endswith(b"\n"):
                raise ValueError("it is cut off, or too long")
            line = _decode(text)
        except (ValueError, RecursionError) as error:
            if number == 1:
                raise StoreForeign(f"{file} is no backup of raftnode: it does not begin as one") from error
            raise StoreDamaged(f"{file} is damaged: line {number}: {error}. Use another backup") from error
        yield text, line


# --- restoring one --------------------------------------------------------------------------------------------


def restore(
    file: Path, directory: Path, address: str, *, advance: Advance, settings: Settings | None = None
) -> tuple[str, End]:
    """Make `directory` the data directory of a new node at `address`, the only one of a new cluster that begins with
    what is in `file`; returns the cluster's id, and what the backup is as of. `advance` is told bytes, of twice the
    file: it is checked first.

    Raises StoreForeign when there is a node in the directory, or the file is no backup; StoreDamaged when the file is
    not whole; StoreFailed when the directory can't be written, and what else `Store` raises.
    """
    _, end = check(file, advance=lambda done, total: advance(done, 2 * total), settings=settings)
    _check_free(directory)
    store = Store("database", directory, settings=settings)
    try:
        if store.cluster_id is not None:
            raise _has_node(directory)
        seq = 0
        with _opened(file) as source:
            total = os.fstat(source.fileno()).st_size
            for seq, chunk in enumerate(_chunks(file, source, address, settings), 1):  # noqa: B007 - used after it
                store.take_restored(chunk)
                advance(total + source.tell(), 2 * total)
        cluster = secrets.token_hex(8)
        id = EntryId(end.term, end.commit_id)
        members = Membership(commit_id=end.commit_id, voters={address: store.node_id})
        told = SnapshotEnd(id=id, checksum=end.checksum, keys=end.keys, membership=Raw(msgspec.json.encode(members)))
        last = Snapshot(term=0, leader=address, transfer=1, seq=seq + 1, end=told)
        store.found_restored(cluster, address, last)
    finally:
        store.close()
    return cluster, end


def _check_free(directory: Path) -> None:
    """A directory in which something else stands is left alone."""
    try:
        found = {path.name for path in directory.iterdir()} if directory.exists() else set()
    except OSError as error:
        raise StoreForeign(f"{directory} can't be used: {error.strerror or error}") from error
    ours = {records.DATA_FILE, records.TAIL_FILE, records.LOCK_FILE, f"{records.DATA_FILE}-lock"}
    if found - ours:
        raise StoreForeign(f"{directory} is not empty: name another directory for the new node")


def _has_node(directory: Path) -> StoreError:
    return StoreForeign(f"{directory} holds a node already: name another directory for the new one")


def _chunks(file: Path, source: BinaryIO, address: str, settings: Settings | None) -> Iterator[Snapshot]:
    """What is in a backup that was checked, in parts of about a megabyte; at least one, as the first empties what an
    earlier try has left. Of several lines of one key in a part the last one counts."""
    seq, size = 1, 0
    found: dict[tuple[str, str], Value | None] = {}
    for text, line in _lines(file, source, settings):
        if isinstance(line, Value | Gone):
            found[line.namespace, line.key] = line if isinstance(line, Value) else None
            size += len(text)
        if size >= _CHUNK_BYTES:
            yield _chunk(address, seq, found)
            seq, size = seq + 1, 0
            found.clear()
    yield _chunk(address, seq, found)


def _chunk(address: str, seq: int, found: dict[tuple[str, str], Value | None]) -> Snapshot:
    values = [value for value in found.values() if value is not None]
    return Snapshot(
        term=0,
        leader=address,
        transfer=1,
        seq=seq,
        records=[SnapshotRecord(**{n: getattr(v, n) for n in SnapshotRecord.__struct_fields__}) for v in values],
        gone=[key for key, value in found.items() if value is None],
    )
