"""When the effects of committed entries go to the disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import pytest

from raftnode.config import Settings
from raftnode.flushing import Flushing
from raftnode.store import Store

MEMBERS = ("a:1", "b:1", "c:1")


@dataclass
class Effects:
    """As much of a store as the decision depends on."""

    commit_id: int = 0
    commit_id_on_disk: int = 0
    waiting_bytes: int = 0
    has_leftover: bool = False

    @property
    def has_effects(self) -> bool:
        return self.commit_id != self.commit_id_on_disk

    def apply(self, count: int = 1, size: int = 10) -> None:
        self.commit_id += count
        self.waiting_bytes += size * count

    def write(self) -> None:
        self.commit_id_on_disk, self.waiting_bytes = self.commit_id, 0


def flushing(
    store: Effects, me: str = "a:1", is_leader: bool = False, leader: str | None = "c:1", **settings: int
) -> Flushing:
    found = Flushing(cast(Store, store), Settings(**settings))
    found.take_turns(me, MEMBERS, leader=me if is_leader else leader)
    return found


def written_at(store: Effects, flushing: Flushing, is_asked: str, last: int) -> list[int]:
    """After which entries the effects are written, when one comes at a time and time stands still."""
    found = []
    while store.commit_id < last:
        store.apply()
        if flushing.goes_along() if is_asked == "goes along" else flushing.is_due(now=0):
            store.write()
            flushing.written()
            found.append(store.commit_id)
    return found


@pytest.mark.parametrize(
    ("me", "is_asked", "entries"),
    [
        ("c:1", "goes along", [64, 128, 192, 256, 320, 384, 448, 512]),
        ("a:1", "is due", [8, 264]),
        ("b:1", "is due", [136, 392]),
    ],
)
def test_members_take_turns(me: str, is_asked: str, entries: list[int]) -> None:
    """The leader does it once in so many entries. Nobody waits for a follower, so it saves more work: it collects four
    times as many, and begins a little after the leader, each follower at another time."""
    store = Effects()
    assert written_at(store, flushing(store, me, is_leader=me == "c:1", flush_entries=64), is_asked, 512) == entries


@pytest.mark.parametrize("count", range(2, 6))
def test_the_followers_of_larger_clusters_take_turns(count: int) -> None:
    """Up to four followers have a time each, whoever leads, and none has the leader's."""
    members = [f"{n}:1" for n in range(count)]
    for leader in members:
        found: list[int] = []
        for me in members:
            store = Effects()
            one = flushing(store, flush_entries=64)
            one.take_turns(me, members, leader)
            found += written_at(store, one, "goes along" if me == leader else "is due", 256)
        assert len(set(found)) == len(found)


def test_a_leaders_go_along_with_entries() -> None:
    """A leader has no transaction for them alone while others will come; a follower has nothing that they could go
    along with."""
    store = Effects()
    leader, follower = flushing(store, is_leader=True, flush_entries=5), flushing(store, flush_entries=5)
    store.apply(40)
    assert leader.goes_along()
    assert not leader.is_due(now=0)
    assert not follower.goes_along()
    assert follower.is_due(now=0)


@pytest.mark.parametrize("is_leader", [True, False])
def test_many_bytes_do_not_wait(is_leader: bool) -> None:
    """There must be room for them: `flush_bytes`, or an eighth of the reserve, is all that may collect."""
    for settings in ({"flush_bytes": 1000}, {"reserve_bytes": 8000}):
        store = Effects()
        found = flushing(store, is_leader=is_leader, **settings)
        store.apply(size=999)
        assert not found.is_due(now=0)
        store.apply(size=1)
        assert found.is_due(now=0)


@pytest.mark.parametrize("is_leader", [True, False])
@pytest.mark.parametrize(("count", "late_at"), [(8, 10.1), (9, 10.5)])
def test_few_wait_only_for_a_moment(is_leader: bool, count: int, late_at: float) -> None:
    """Who looks at the directory of a node that has little to do sees what was committed a moment ago. While many
    come, they wait for more; when they stop, not for long."""
    store = Effects()
    found = flushing(store, me="b:1", is_leader=is_leader, flush_entries=64, flush_delay_ms=100)
    assert found.due(now=10) == float("inf")
    store.apply(count)
    assert not found.is_due(now=10)
    assert found.due(now=10.05) == pytest.approx(late_at)
    assert not found.is_due(now=late_at - 0.001)
    assert found.is_due(now=late_at + 0.001)
    store.write()
    found.written()
    assert found.due(now=11) == float("inf")
    assert not found.is_due(now=20)


def test_what_is_left_of_an_old_state_is_swept_now_and_then() -> None:
    """It goes in steps, with transactions that have nothing else to do if need be."""
    store = Effects(has_leftover=True)
    found = flushing(store, flush_delay_ms=100)
    assert not found.is_due(now=1)
    assert found.due(now=1) == pytest.approx(1.1)
    assert found.is_due(now=1.11)
