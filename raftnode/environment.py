"""The data directory: who may have it, and the LMDB environment in it. Layer 2.

    <data_dir>/raftnode.mdb        the environment: one file, no sub-directory
    <data_dir>/raftnode.tail       the newest log entries, until LMDB has them (`tail`)
    <data_dir>/raftnode.mdb-lock   LMDB's table of readers; never deleted by hand while a process lives
    <data_dir>/raftnode.mdb-new    a copy that `raftnode compact` makes; what a kill leaves of one is removed at a start
    <data_dir>/raftnode.lock       held with flock by the one node that writes; its text is the id of that node

LMDB would let two processes write (they would take turns, and ruin the log between them), so a lock of our own keeps
the second out; the kernel drops it however the holder dies. The text in it outlives the data file: a directory whose
data file is gone is not taken for a new one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import lmdb
from lmdb.verify import VerifyError, verify

from raftnode import records
from raftnode.config import Settings
from raftnode.errors import StoreClosed, StoreDamaged, StoreError, StoreFailed, StoreForeign, StoreInUse, StoreTooNew

RESTORE = "Put back a copy of the directory made after the node stopped; an older one has forgotten what it promised"
"""What helps where nothing can be repaired."""
_MAX_READERS = 126
_LOOSE_PAGES = 16
"""More than this many pages are never missing from the end of a sound file; see `check_length`."""


class _Reading:
    """A read transaction as a context. Written out, as a generator made into one costs several times as much, and a
    turn that has only one read to answer feels that."""

    __slots__ = ("_env", "_file", "_txn")

    def __init__(self, env: lmdb.Environment, file: Path) -> None:
        self._env = env
        self._file = file

    def __enter__(self) -> lmdb.Transaction:
        try:
            self._txn = self._env.begin()
        except lmdb.Error as error:
            raise self._damaged(error) from error
        return self._txn

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._txn.abort()
        if isinstance(error, lmdb.Error):
            raise self._damaged(error) from error

    def _damaged(self, error: lmdb.Error) -> StoreDamaged:
        return StoreDamaged(f"{self._file} is damaged: {error}. {RESTORE}")


class _Writing:
    """The write transaction as a context: committed and synced when the block ends without an error."""

    __slots__ = ("_env", "_fail", "_txn")

    def __init__(self, env: lmdb.Environment, fail: Callable[[BaseException], None]) -> None:
        self._env = env
        self._fail = fail

    def __enter__(self) -> lmdb.Transaction:
        try:
            self._txn = self._env.begin(write=True)
        except BaseException as error:
            self._fail(error)
            raise
        return self._txn

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._txn.abort()
            self._fail(error)
            return
        try:
            self._txn.commit()
        except BaseException as failure:
            self._fail(failure)
            raise


class Environment:
    """An open data directory. Invariant: after the first failed commit or sync, every use raises StoreFailed."""

    def __init__(
        self, data_dir: Path, settings: Settings, durable: bool, first_facts: Callable[[], dict[bytes, bytes]] | None
    ) -> None:
        """Open, or create with `first_facts` in `meta`; the fact `node` names the node. Raises a StoreError that says
        what is wrong with the directory and what to do.

        Without `first_facts`, for a repair: nothing is created, and every page is looked at from the outside before
        LMDB, which a damaged one may kill, reads any."""
        if first_facts is None and not any((data_dir / n).exists() for n in (records.DATA_FILE, records.LOCK_FILE)):
            raise StoreForeign(f"{data_dir} holds no node: there is no {records.DATA_FILE} in it")
        self.path = data_dir
        self._data_file = data_dir / records.DATA_FILE
        self._settings = settings
        self._durable = durable
        self._failure: StoreFailed | None = None
        self._env: lmdb.Environment | None = None
        self._lock_fd = _take_lock(data_dir)
        try:
            (data_dir / records.COPY_FILE).unlink(missing_ok=True)
            self._check_files()
            if first_facts is None:
                check_structure(data_dir)
            self._env = self._open()
            self._dbs = self._open_databases(first_facts)
            self._settle()
        except lmdb.Error as error:
            self.close()
            raise explain_open_error(data_dir, error) from error
        except OSError as error:
            self.close()
            raise StoreFailed(f"{data_dir} can't be made durable: {error}. Check the disk, then start again") from error
        except BaseException:
            self.close()
            raise

    # --- opening ---

    @property
    def held_node(self) -> str:
        """The node that this directory has held so far, by the lock file; "" for none."""
        return os.pread(self._lock_fd, 64, 0).decode(errors="replace").strip()

    def _check_files(self) -> None:
        """Refuse a directory that held a node and has lost its data file."""
        if self.held_node and not (self._data_file.exists() and self._data_file.stat().st_size > 0):
            raise self._lost_data("is gone or empty")

    def _lost_data(self, what: str) -> StoreDamaged:
        return StoreDamaged(
            f"{self.path} held node {self.held_node}, but {records.DATA_FILE} {what}: put the right file back, or, if "
            "it is lost, empty the whole directory to start as a new node"
        )

    def _open(self) -> lmdb.Environment:
        env = lmdb.open(
            str(self._data_file),
            subdir=False,
            map_size=self._settings.map_bytes,
            max_dbs=16,
            max_readers=_MAX_READERS,
            sync=self._durable,
            metasync=self._durable,
        )
        try:
            check_length(self.path, env, may_verify=True)
        except BaseException:
            env.close()
            raise
        return env

    def _open_databases(self, first_facts: Callable[[], dict[bytes, bytes]] | None) -> dict[bytes, lmdb._Database]:
        """The databases; in a blank file they are made together with the first facts, in one transaction, so that a
        crash leaves either nothing or a whole node."""
        assert self._env is not None
        if not _is_blank(self._env):
            check_ours(self.path, self._env)
            return open_databases(self._env, may_create=first_facts is not None)
        if self.held_node:
            raise self._lost_data("is blank")
        if first_facts is None:
            raise StoreForeign(f"{self.path} holds no node yet: its first start was not finished")
        with self._env.begin(write=True) as txn:
            dbs = {name: self._env.open_db(name, txn=txn) for name in records.DATABASES}
            for name, fact in first_facts().items():
                txn.put(name, fact, db=dbs[records.META])
        return dbs

    def _settle(self) -> None:
        """What is visible must be durable before anything is said (TRAPS 40): LMDB syncs neither the first pages
        of a new file nor its directory."""
        if self._durable:
            assert self._env is not None
            self._env.sync(True)
            for directory in (self.path, self.path.resolve().parent):
                sync_directory(directory)

    def claim(self, node: str) -> None:
        """Check that the lock file names `node`, or write it there the first time. Raises StoreDamaged, StoreFailed."""
        if self.held_node == node:
            return
        if self.held_node:
            raise self._lost_data(f"is of node {node}")
        try:
            os.pwrite(self._lock_fd, f"{node}\n".encode(), 0)
            if self._durable:
                os.fsync(self._lock_fd)
        except OSError as error:
            raise StoreFailed(f"{self.path / records.LOCK_FILE} can't be written: {error}") from error

    # --- use ---

    def read(self) -> _Reading:
        """A read transaction: one consistent snapshot. Keep it short, it holds back the reuse of pages. Raises
        StoreDamaged when LMDB finds its own pages damaged."""
        return _Reading(self._usable(), self._data_file)

    def write(self) -> _Writing:
        """The one write transaction, committed and synced when the block ends. An error of any kind, in the block or
        on the way to the disk, closes the environment to further use; those of the disk become StoreFailed."""
        return _Writing(self._usable(), self.fail)

    @property
    def databases(self) -> tuple[bytes, ...]:
        """The names of all databases."""
        return tuple(self._dbs)

    def db(self, name: bytes) -> lmdb._Database:
        return self._dbs[name]

    def replace_by(self, copy: Path) -> None:
        """Let a file in this directory, which is synced, take the place of the data file; this environment is closed to
        further use. A kill leaves the old file or the new one. Raises OSError.

        LMDB's table of readers goes first: one who still reads the old file must not be taken for a reader of the new
        one, whose transactions are numbered anew."""
        if self._env is not None:
            self._env.close()
            self._env = None
        Path(f"{self._data_file}-lock").unlink(missing_ok=True)
        copy.rename(self._data_file)
        sync_directory(self.path)

    def fail(self, error: BaseException, file: str = records.DATA_FILE) -> None:
        """Writing to a file has failed: nothing is read or written any more. What is on disk is not known, and trying
        again proves nothing: after a failed fsync the kernel has dropped the pages (TRAPS, LMDB). Raises StoreFailed
        for what the disk has done; other errors are for the caller to raise again."""
        self._failure = StoreFailed(
            f"writing to {self.path / file} failed: {error}. Nothing that depends on this write was acknowledged. "
            "Check the disk (free space, kernel log), then start the node again: it continues from its last good write"
        )
        if isinstance(error, lmdb.Error | OSError):
            raise self._failure from error

    def check(self) -> None:
        """Raises StoreFailed after a write that failed, and StoreClosed when it is closed."""
        self._usable()

    def _usable(self) -> lmdb.Environment:
        if self._failure is not None:
            raise StoreFailed(str(self._failure))
        if self._env is None:
            raise StoreClosed(f"the store in {self.path} is closed")
        return self._env

    # --- room ---

    def sizes(self) -> dict[str, int]:
        """Bytes: `map`, `file`, `used` (pages that hold data), `disk_free`, and `room`: what can still be written.
        Raises StoreFailed when the directory can't be looked at."""
        env = self._usable()
        info, page = env.info(), env.stat()["psize"]
        with env.begin() as txn:
            used = sum(
                stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
                for stat in (txn.stat(db) for db in self._dbs.values())
            )
        file, used_bytes = (info["last_pgno"] + 1) * page, used * page
        try:
            disk = os.statvfs(self.path)
        except OSError as error:
            raise StoreFailed(
                f"{self.path} can't be looked at: {error}. If it was moved or deleted, put it back as it was, then "
                "start the node again"
            ) from error
        disk_free = disk.f_bavail * disk.f_frsize
        room = min(info["map_size"] - used_bytes, disk_free + max(0, file - used_bytes))
        return {"map": info["map_size"], "file": file, "used": used_bytes, "disk_free": disk_free, "room": room}

    def clear_dead_readers(self) -> int:
        """Free the slots of readers that died: pages that they saw would never be used again (TRAPS, LMDB)."""
        return int(self._usable().reader_check())

    def close(self) -> None:
        """Close; may be called twice."""
        if self._env is not None:
            self._env.close()
            self._env = None
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


class MemoryDirectory:
    """A throw-away directory for `store_type='memory'`: the same code without sync."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="raftnode-memory-"))

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def open_reader(data_dir: Path, map_bytes: int) -> lmdb.Environment:
    """The environment of a live or dead node's directory, for reading only: nothing is written to it. The caller
    closes it.

    Where LMDB's table of readers is not there, or is not this user's to write, it is left alone: fine while no node
    runs on the directory. Raises StoreError.
    """
    file = data_dir / records.DATA_FILE
    lock = Path(f"{file}-lock")
    try:
        if not data_dir.is_dir():
            raise StoreForeign(f"{data_dir}: " + ("not a directory" if data_dir.exists() else "no such directory"))
        if not file.is_file() or file.stat().st_size == 0:
            raise StoreForeign(f"{data_dir} holds no node: there is no {records.DATA_FILE} in it")
        may_lock = lock.exists() and os.access(lock, os.W_OK)
        env = lmdb.open(
            str(file),
            subdir=False,
            readonly=True,
            map_size=map_bytes,
            max_dbs=16,
            lock=may_lock,
            max_readers=_MAX_READERS,
        )
    except lmdb.Error as error:
        raise explain_open_error(data_dir, error) from error
    except OSError as error:
        raise StoreForeign(f"{data_dir} can't be read: {error.strerror or error}") from error
    try:
        check_length(data_dir, env, may_verify=False)
        if _is_blank(env):
            raise StoreForeign(f"{data_dir} holds no node yet: its first start was not finished")
        check_ours(data_dir, env)
    except lmdb.Error as error:
        env.close()
        raise explain_open_error(data_dir, error) from error
    except BaseException:
        env.close()
        raise
    return env


def open_databases(env: lmdb.Environment, may_create: bool) -> dict[bytes, lmdb._Database]:
    """The databases of a node. Directories of format 1 have no second state: it is made, or left out."""
    found = {name: env.open_db(name, create=False) for name in records.DATABASES if name != records.SECOND}
    try:
        found[records.SECOND] = env.open_db(records.SECOND, create=may_create)
    except (lmdb.NotFoundError, lmdb.ReadonlyError):
        assert not may_create, "a writer may make it"
    return found


def _is_blank(env: lmdb.Environment) -> bool:
    """True for an environment in which nothing was ever made."""
    with env.begin() as txn:
        return int(txn.stat()["entries"]) == 0


def explain_open_error(data_dir: Path, error: lmdb.Error) -> StoreError:
    """What LMDB's refusal means for the person at the keyboard."""
    file = data_dir / records.DATA_FILE
    if isinstance(error, lmdb.InvalidError):
        return StoreForeign(
            f"{file} is not a file of ours: it is no LMDB environment, or its first pages are damaged. Choose another "
            "directory, or put back a copy made after the node stopped"
        )
    if isinstance(error, lmdb.VersionMismatchError):
        return StoreTooNew(f"{file} was written by another major version of LMDB: use the raftnode that wrote it")
    if isinstance(error, lmdb.CorruptedError | lmdb.PageNotFoundError):
        return StoreDamaged(f"{file} is damaged: {error}. {RESTORE}")
    if isinstance(error, lmdb.ReadonlyError):
        return StoreForeign(f"{file} can't be opened: {error}. Check who owns it")
    return StoreFailed(f"{file} can't be opened: {error}. Check the disk (free space, kernel log), then start again")


def check_ours(data_dir: Path, env: lmdb.Environment) -> None:
    """Refuse an LMDB file of some other program, before anything is written to it."""
    try:
        env.open_db(records.META, create=False)
    except (lmdb.NotFoundError, lmdb.IncompatibleError) as error:
        raise StoreForeign(
            f"{data_dir / records.DATA_FILE} is an LMDB file of another program: choose another data directory"
        ) from error


def check_length(data_dir: Path, env: lmdb.Environment, may_verify: bool) -> None:
    """Refuse a file that was cut off: reading a page that is not there would kill the process (SIGBUS).

    LMDB does not write the last pages of a file when they were freed in the transaction that took them, so a few may
    be missing from a sound file: then every page is looked at, from the outside, if nobody writes (`may_verify`).
    """
    file = data_dir / records.DATA_FILE
    needed, page = env.info()["last_pgno"] + 1, env.stat()["psize"]
    size = file.stat().st_size  # after LMDB's own figure: a live node's file only grows
    missing = needed - size // page
    if missing > _LOOSE_PAGES or (missing > 0 and may_verify and not _is_sound(file)):
        raise StoreDamaged(
            f"{file} is cut off: {size} bytes, {missing} pages of {page} bytes are missing at its end. {RESTORE}"
        )


def check_structure(data_dir: Path) -> None:
    """Refuse a file whose pages LMDB could not rely on: it has no checksums, and does not look before it follows a
    pointer. Nobody may write meanwhile. Raises StoreDamaged, StoreForeign, StoreFailed."""
    file = data_dir / records.DATA_FILE
    try:
        problems = verify(str(file), subdir=False)  # type: ignore[no-untyped-call]
    except VerifyError as error:
        raise StoreDamaged(f"{file}: the pages of LMDB itself are damaged: {error}") from error
    except FileNotFoundError as error:
        raise StoreForeign(f"{data_dir} holds no node: there is no {records.DATA_FILE} in it") from error
    except OSError as error:
        raise StoreFailed(f"{file} can't be read: {error}. Check the disk") from error
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise StoreDamaged(f"{file}: the pages of LMDB itself are damaged: {problems[0]}{more}")


def _is_sound(file: Path) -> bool:
    try:
        return not verify(str(file), subdir=False)  # type: ignore[no-untyped-call]
    except VerifyError:
        return False


def _take_lock(data_dir: Path) -> int:
    """Make the directory if need be and hold its lock; the file descriptor is the lock."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(data_dir / records.LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except (FileExistsError, NotADirectoryError) as error:
        raise StoreForeign(f"{data_dir} is a file, not a directory: choose another data directory") from error
    except OSError as error:
        raise StoreForeign(f"{data_dir} can't be used as data directory: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise StoreInUse(
            f"{data_dir} is in use by another node: stop that one first, or choose another data directory"
        ) from error
    return fd


def sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
