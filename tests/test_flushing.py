"""When the effects of committed entries go to the disk, and how many at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import pytest

from raftnode.config import Settings
from raftnode.flushing import Flushing
from raftnode.namespaces import Behind, Namespaces
from raftnode.store import Store


@dataclass
class Effects:
    """As much of a store as the decision depends on."""

    commit_id: int = 0
    commit_id_on_disk: int = 0
    waiting_bytes: int = 0
    has_leftover: bool = False
    entries_in_tail: int = 0
    behind: Behind | None = None
    namespaces: Namespaces = field(default_factory=Namespaces)

    @property
    def has_effects(self) -> bool:
        return self.behind is not None or self.commit_id != self.commit_id_on_disk

    def apply(self, count: int = 1, size: int = 10, keys: int = 1 << 30) -> None:
        for _ in range(count):
            self.commit_id += 1
            self.namespaces.changes[b"%09d" % (self.commit_id % keys)] = None
            self.waiting_bytes += size

    def write(self, keys: int) -> None:
        if not keys or not self.has_effects:
            return
        if self.behind is None:
            self.namespaces.begin_flush()
            self.commit_id_on_disk, self.waiting_bytes = self.commit_id, 0
        changes, following = self.namespaces.next(keys)
        self.namespaces.written(changes)
        self.behind = None if following is None else Behind(0, following.decode())


def flushing(store: Effects, **settings: int) -> Flushing:
    return Flushing(cast(Store, store), Settings(**settings))


def test_they_wait_until_many_have_collected() -> None:
    """Until then none goes along; then some do, until all that there were have gone."""
    store = Effects()
    found = flushing(store, flush_entries=100, flush_step=16)
    went = []
    for _ in range(100):
        went.append(found.along(now=0))
        store.write(went[-1])
        store.apply()
    assert set(went) == {0}
    while (keys := found.along(now=0)) or store.behind:
        store.write(keys)
        went.append(keys)
    assert went[100:] == [16] * 7
    assert not store.has_effects


@pytest.mark.parametrize("batch", [1, 10, 100, 1000])
def test_no_transaction_takes_many_and_none_are_left_when_as_many_have_come(batch: int) -> None:
    """At full speed they go as fast as others come, so a transaction takes about as many along as it has entries, and
    the next flush finds the one before done."""
    store = Effects()
    found = flushing(store, flush_entries=10_000, flush_step=16)
    begun: list[int] = []
    largest, waiting = 0, 0
    for _ in range(60_000 // batch):
        is_under_way = store.behind is not None
        keys = found.along(now=0)
        store.write(keys)
        if keys and not is_under_way:
            begun.append(store.commit_id)
        largest, waiting = max(largest, keys), max(waiting, len(store.namespaces.waiting()))
        store.apply(batch)
    assert begun == list(range(10_000, 60_000, 10_000))
    assert largest <= 1.25 * batch + 16
    assert waiting <= 20_000


def test_they_keep_up_with_what_comes_by_the_tail() -> None:
    """A slow client's entries go to the tail, and there is a transaction for 64 of them only: its effects are on disk
    before as many entries have come again, and do not wait for the many that `flush_entries` allows."""
    store = Effects()
    found = flushing(store, flush_delay_ms=50, flush_step=16)
    store.apply(1000)
    found.due(now=0)
    assert found.along(now=0.9) == 0, "they may wait for a second"
    store.entries_in_tail, transactions = 64, 0
    while not transactions or store.behind:
        keys = found.along(now=1.1)
        assert keys == 80
        store.write(keys)
        store.apply(64)
        transactions += 1
    assert transactions * 64 <= 1000


def test_many_bytes_do_not_wait() -> None:
    """There must be room for them: `flush_bytes`, or an eighth of the reserve, is all that may collect; and when as
    many have come while the others were leaving, all of these go at once."""
    for settings in ({"flush_bytes": 1000}, {"reserve_bytes": 8000}):
        store = Effects()
        found = flushing(store, flush_step=1, **settings)
        store.apply(99)
        assert not found.along(now=0)
        store.apply()
        assert found.along(now=0) == 1
        store.write(1)
        store.apply(size=400)
        assert found.along(now=0) == 50 - 1, "four tenths have come, so half should be gone"
        store.apply(size=600)
        assert found.along(now=0) == 99


def test_one_key_that_changes_all_the_time_is_flushed_now_and_then() -> None:
    """A restart carries out again what the disk lacks, so it is entries that are counted, and not keys."""
    store = Effects()
    found = flushing(store, flush_entries=100)
    on_disk = set()
    for _ in range(1000):
        store.apply(keys=1)
        store.write(found.along(now=0))
        on_disk.add(store.commit_id_on_disk)
    assert sorted(on_disk) == list(range(0, 1001, 100))


def test_few_wait_only_for_a_moment() -> None:
    """Who looks at the directory of a node that has little to do sees what was committed a moment ago: when nothing
    more has come for `flush_delay_ms`, they have transactions of their own, one after the other."""
    store = Effects()
    found = flushing(store, flush_delay_ms=100, flush_step=1)
    assert found.due(now=10) == float("inf")
    store.apply(40)
    assert found.alone(now=10) == 0
    store.apply(40)
    assert found.due(now=10.05) == pytest.approx(10.15)
    assert found.alone(now=10.149) == 0
    for _ in range(3):
        assert found.along(now=10.16) <= 1, "those that go alone are no reason for more to go along"
        assert found.due(now=10.16) <= 10.16
        assert found.alone(now=10.16) == 32
        store.write(32)
        found.written_alone()
    assert not store.has_effects
    assert found.due(now=11) == float("inf")
    assert found.alone(now=20) == 0


def test_those_that_come_slowly_wait_a_little_longer() -> None:
    """While entries follow each other, their effects have no transaction of their own, and after twenty times
    `flush_delay_ms` they go along with an entry; those that come after them wait as long again."""
    store = Effects()
    found = flushing(store, flush_delay_ms=100)
    went = []
    for turn in range(120):
        now = turn * 0.05
        keys = found.along(now)
        store.write(keys)
        if keys:
            went.append(now)
        store.apply()
        assert not found.alone(now)
    assert went[0] == pytest.approx(2.0)
    assert went[-1] == pytest.approx(4.1, abs=0.2)


def test_what_is_left_of_an_old_state_is_swept_now_and_then() -> None:
    """It goes in steps, with transactions that have nothing else to do if need be."""
    store = Effects(has_leftover=True)
    found = flushing(store, flush_delay_ms=100)
    assert not found.alone(now=1)
    assert found.due(now=1) == pytest.approx(1.1)
    assert found.alone(now=1.11)
    found.written_alone()
    assert not found.alone(now=1.12)
    assert found.due(now=1.12) == pytest.approx(1.22)
