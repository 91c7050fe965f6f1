"""What the kernel tells of this machine and of a process on it: for measurements, and for what has to say where it ran.

Everything comes from /proc and /sys, so it costs the process that is looked at nothing.
"""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
IN_MEMORY: Final = ("tmpfs", "ramfs")
"""File systems that are no disk."""
_SECTOR_BYTES: Final = 512


class NoDisk(Exception):
    """There is no directory on a disk that can be written."""


def file_system_of(path: Path) -> str:
    """The type of the file system that holds a path, as the kernel calls it."""
    at, best = str(path.resolve()), ("", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split(" ")
        where = where.replace("\\040", " ")
        if Path(at).is_relative_to(where) and len(where) >= len(best[0]):
            best = (where, kind)
    return best[1]


def new_directory_on_disk(prefix: str, directory: Path | None = None) -> Path:
    """A new directory below `directory` (which is made if need be), else below one for temporary files, or here; on a
    disk: what is kept in memory only tests no disk, and measures none. Raises NoDisk."""
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    parents = [directory] if directory else [Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd()]
    for parent in parents:
        if parent.is_dir() and os.access(parent, os.W_OK) and file_system_of(parent) not in IN_MEMORY:
            return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    where = " or ".join(map(str, parents))
    raise NoDisk(f"{where}: not on a disk (a tmpfs is none), or can't be written: choose another --directory")


def cpu_seconds(pid: int) -> float:
    """CPU time that the process has taken so far, user and system, all threads; good to 1/TICKS_PER_S. Raises OSError
    when there is none of that id."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def written_bytes(pid: int) -> int:
    """Bytes that the process has handed to the kernel by write calls so far: its files and its log, not what it sends
    (by `send`). Raises OSError when there is none of that id.

    The kernel's own count of bytes for the disk, `write_bytes`, is of no use here: a page that gets dirty counts as the
    whole folio that it is in, and on ext4 that gave 14 times what the disk was given.
    """
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        name, _, number = line.partition(": ")
        if name == "wchar":
            return int(number)
    return 0


def disk_written_bytes(path: Path) -> int | None:
    """Bytes written so far to the disk that holds this path, by everything on the machine, with what the file system
    adds for itself; None where the file system is not on one disk that the kernel knows."""
    device = path.stat().st_dev
    with contextlib.suppress(OSError):
        fields = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()
        return _SECTOR_BYTES * int(fields[6])
    return None


def machine_busy_seconds() -> float:
    """CPU time that all processes have taken since the machine started, the kernel's own work with it."""
    user, nice, system, _, _, irq, soft_irq, *_ = _numbers(Path("/proc/stat").read_text().splitlines()[0].split()[1:])
    return (user + nice + system + irq + soft_irq) / TICKS_PER_S


def _numbers(words: Iterable[str]) -> list[int]:
    return [int(word) for word in words]


def cpu_model() -> str:
    """What the CPU calls itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, words = line.partition(":")
        if name.strip() == "model name":
            return words.strip()
    return platform.machine()


def memory_bytes() -> int:
    """Of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
