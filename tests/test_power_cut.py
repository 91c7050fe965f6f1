"""Power cuts on a real file system: what was acknowledged is there when the machine comes back.

kill -9 leaves what the kernel has not written yet; a power cut does not. Here the nodes keep their directories on an
ext4 of their own, in a file, which is shut down under them with what is not synced thrown away (FS_IOC_SHUTDOWN without
a flush of its journal): the file system takes nothing more and forgets what it had not written. It is mounted again,
its journal is replayed, and the nodes are started on what is left. All nodes share the one disk, so every cut takes
all of them at once: nothing but their own syncs can have saved a write.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from raftnode.testing.processes import ClusterOfProcesses, WriteRecord, Writers, inspect

EXT4_SHUTDOWN = 0x8004587D
WITHOUT_FLUSH = 2
IMAGE_BYTES = 384 << 20

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mkfs.ext4") is None or not Path("/dev/loop-control").exists(),
    reason="root, mkfs.ext4 and loop devices make the disk whose power is cut",
)


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


class Disk:
    """An ext4 in a file, whose power can be cut."""

    def __init__(self, directory: Path) -> None:
        self.image, self.where = directory / "image", directory / "disk"
        with self.image.open("wb") as image:
            image.truncate(IMAGE_BYTES)
        run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0", str(self.image))
        self.where.mkdir()

    def mount(self) -> None:
        """Power on: the journal is replayed."""
        run("mount", "-o", "loop", str(self.image), str(self.where))

    def unmount(self) -> None:
        run("umount", str(self.where))

    def cut_power(self) -> None:
        """From now on nothing is written any more, and what was not synced is forgotten."""
        fd = os.open(self.where, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, EXT4_SHUTDOWN, struct.pack("I", WITHOUT_FLUSH))
        finally:
            os.close(fd)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path)
    try:
        made.mount()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no loop device can be mounted here: {error.stderr.decode().strip()}")
    try:
        yield made
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            run("umount", "--lazy", str(made.where))


def test_the_power_cut_is_real(disk: Disk) -> None:
    """What was only written is lost by such a cut, and what was synced is not: else the tests below would show
    nothing."""
    synced, written = disk.where / "synced", disk.where / "written"
    for file, is_synced in ((synced, True), (written, False)):
        fd = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.write(fd, b"x" * 4096)
        if is_synced:
            os.fsync(fd)
        os.close(fd)
    disk.cut_power()
    disk.unmount()
    disk.mount()
    assert synced.read_bytes() == b"x" * 4096
    assert not written.exists() or written.read_bytes() != b"x" * 4096


def cut_again_and_again(disk: Disk, size: int, cuts: int, seed: int) -> int:
    """Writers write until the power goes, at a moment of chance, `cuts` times. After each, everything acknowledged so
    far is there. Returns how many writes that were."""
    chance = random.Random(seed)
    records = (WriteRecord(f"key-{number}", "x" * chance.randrange(2000)) for number in itertools.count())
    acknowledged: dict[str, str] = {}
    cluster = ClusterOfProcesses(size, disk.where)
    with contextlib.closing(cluster):
        for _ in range(cuts):
            cluster.start().await_leader()
            writers = Writers(cluster.addresses, records, clients=4, timeout=1.0, resolve=False).start()
            writers.await_acknowledged(chance.randrange(50, 400), explain=cluster.describe)
            disk.cut_power()
            writers.stop()
            acknowledged |= {done.record.key: done.record.value for done in writers.acknowledged}
            cluster.kill()
            disk.unmount()
            disk.mount()
            assert_there(cluster, acknowledged)
        for node in cluster:
            assert inspect(node.volume, "info")
    return len(acknowledged)


def assert_there(cluster: ClusterOfProcesses, acknowledged: dict[str, str]) -> None:
    """The cluster comes back by itself, with all that it has ever acknowledged, through every node."""
    cluster.start().await_caught_up()
    for node in cluster:
        found = node.read(acknowledged)
        lost = [key for key, value in acknowledged.items() if found.get(key) != value]
        assert not lost, f"{len(lost)} of {len(acknowledged)} acknowledged writes are lost: {lost[:5]}"


@pytest.mark.parametrize("size", [1, 3])
def test_acknowledged_writes_survive_power_cuts(disk: Disk, size: int) -> None:
    """Every acknowledged write is there after each of three power cuts under load, with one node and with three whose
    disks all fail at the same moment (README, promise 1; TRAPS 1, 2, 40)."""
    assert cut_again_and_again(disk, size, cuts=3, seed=size) > 150


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", [1, 3])
def test_acknowledged_writes_survive_many_power_cuts(disk: Disk, size: int) -> None:
    """The same, forty times."""
    assert cut_again_and_again(disk, size, cuts=40, seed=10 + size) > 2000
