"""`raftnode compact`: what a stopped node's file has room for and does not use goes back to the file system. Layer 5.

Compaction deletes old entries while a node runs, and LMDB uses their pages again; but its file never gets smaller. Here
all that is in use is written to a new file, page after page without gaps. When that is synced and was checked, it takes
the place of the old one by a rename, which is atomic: a kill at any moment leaves the old file or the new one. The
`tail` of the log stays as it is: what LMDB says of it is copied with all the rest.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import lmdb

from raftnode import records
from raftnode.config import MIB, Settings
from raftnode.environment import Environment, explain_open_error
from raftnode.errors import StoreDamaged, StoreFailed
from raftnode.output import progress

_PART_BYTES: Final = 16 * MIB
"""So much goes into one transaction of the copy, and is in memory meanwhile."""
_SLACK_BYTES: Final = 4 * MIB


def shrink(data_dir: Path, settings: Settings | None = None) -> tuple[int, int]:
    """Make the data file of a stopped node as small as what it holds. Returns its size before and after, in bytes.

    Raises a StoreError when the directory can't be used, is in use or is damaged, or when there is no room for the
    copy; nothing has changed then.
    """
    settings = settings or Settings()
    file, copy = data_dir / records.DATA_FILE, data_dir / records.COPY_FILE
    with contextlib.closing(Environment(data_dir, settings, True, None)) as env:
        before = file.stat().st_size
        _check_room(env, data_dir)
        try:
            counts = _write_copy(env, copy, settings)
            _check_copy(copy, counts, settings)
            env.replace_by(copy)
        except OSError as error:
            raise StoreFailed(f"{copy} can't be written: {error}. {file} is as it was") from error
        except lmdb.Error as error:
            raise explain_open_error(data_dir, error) from error
        finally:
            copy.unlink(missing_ok=True)
        return before, file.stat().st_size


def _check_room(env: Environment, data_dir: Path) -> None:
    needed, free = env.sizes()["used"] + _SLACK_BYTES, shutil.disk_usage(data_dir).free
    if free < needed:
        raise StoreFailed(f"{data_dir} has {free} bytes of room; {needed} are needed for the new file. Make room first")


def _write_copy(env: Environment, copy: Path, settings: Settings) -> dict[bytes, int]:
    """Everything, to a new file, synced. Returns how many records each database has."""
    counts = {}
    with contextlib.closing(_open(copy, settings)) as target, env.read() as source:
        names = env.databases
        total = sum(source.stat(env.db(name))["entries"] for name in names)
        with progress(max(1, total), "compacting") as advance:
            for name in names:
                with source.cursor(env.db(name)) as cursor:
                    counts[name] = _copy_database(target, name, cursor, advance)
        target.sync(True)
    fd = os.open(copy, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    return counts


def _copy_database(target: lmdb.Environment, name: bytes, cursor: lmdb.Cursor, advance: Callable[[int], None]) -> int:
    """All records of one database, in order, so that the new pages are full."""
    db, count = target.open_db(name), 0
    for part in _parts(cursor):
        try:
            with target.begin(write=True) as txn:
                for key, value in part:
                    txn.put(key, value, db=db, append=True)
        except lmdb.Error as error:  # of the new file, not of the one that is read
            raise OSError(str(error)) from error
        count += len(part)
        advance(len(part))
    return count


def _parts(cursor: lmdb.Cursor) -> Iterator[list[tuple[bytes, bytes]]]:
    part: list[tuple[bytes, bytes]] = []
    size = 0
    for key, value in cursor:
        part.append((bytes(key), bytes(value)))
        size += len(value)
        if size > _PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _check_copy(copy: Path, counts: dict[bytes, int], settings: Settings) -> None:
    """Look at the new file with fresh eyes. Raises StoreDamaged."""
    with contextlib.closing(_open(copy, settings)) as env, env.begin() as txn:
        found = {name: txn.stat(env.open_db(name, txn=txn, create=False))["entries"] for name in counts}
    if found != counts:
        raise StoreDamaged(f"{copy} does not hold what was written to it: check this machine's memory and disk")


def _open(file: Path, settings: Settings) -> lmdb.Environment:
    return lmdb.open(
        str(file), subdir=False, map_size=settings.map_bytes, max_dbs=16, sync=False, metasync=False, lock=False
    )
