"""Values that are read again and again (`raftnode.cache`): never more than the limit, what was used last stays, and
what has changed is gone."""

from __future__ import annotations

import random

import pytest
from msgspec import Raw

from raftnode.cache import Cache
from raftnode.config import KIB
from raftnode.records import Record


def record(number: int, size: int = 10) -> Record:
    return Record(number, number, 1, 0, Raw(b'"' + b"x" * size + b'"'))


def read_twice(cache: Cache, key: bytes, value: Record) -> None:
    for _ in range(2):
        cache.keep(key, value)


def test_what_is_read_once_drives_nothing_out() -> None:
    """A few keys are read again and again, and beside them very many others, each once: those few stay. What is
    remembered of the others is bounded, too."""
    cache = Cache(10 * KIB)
    for n in range(10):
        read_twice(cache, b"%d" % n, record(n))
    for n in range(100, 10_000):
        cache.keep(b"%d" % n, record(n))
        assert len(cache._seen) <= 2
    assert [n for n in range(10_000) if cache.get(b"%d" % n) is not None] == list(range(10))


def test_what_was_not_used_for_longest_goes_first() -> None:
    """Room for about twenty values. The first of a hundred is asked for all the time, and stays; of the others the
    last ones are there."""
    cache = Cache(10 * KIB)
    for n in range(100):
        read_twice(cache, b"%d" % n, record(n))
        assert cache.get(b"0") == record(0)
    here = [n for n in range(100) if cache.get(b"%d" % n) is not None]
    assert here == [0, *range(101 - len(cache), 100)]
    assert 15 < len(here) < 25


def test_a_large_value_does_not_drive_the_others_out() -> None:
    """It is not kept itself, and neither is the small one that was there under its key."""
    cache = Cache(100 * KIB)
    for n in range(10):
        read_twice(cache, b"%d" % n, record(n))
    read_twice(cache, b"large", record(10))
    cache.keep(b"large", record(11, 50 * KIB))
    assert cache.get(b"large") is None
    assert len(cache) == 10


def test_a_value_that_was_kept_is_replaced_by_a_newer_one() -> None:
    """And is counted once."""
    cache = Cache(100 * KIB)
    read_twice(cache, b"k", record(1, 1000))
    size = cache.size
    cache.keep(b"k", record(2, 1000))
    assert (cache.get(b"k"), cache.size, len(cache)) == (record(2, 1000), size, 1)


@pytest.mark.parametrize("seed", range(5))
def test_only_what_was_kept_and_not_dropped_is_there(seed: int) -> None:
    """Random use against a dict that forgets nothing: what is there is right, and never too much. In the end, when all
    was dropped, nothing is counted any more."""
    chance = random.Random(seed)
    limit = chance.choice([1, 5 * KIB, 50 * KIB])
    cache, kept = Cache(limit), dict[bytes, Record]()
    for n in range(3000):
        key = b"%d" % chance.randrange(60)
        what = chance.random()
        if what < 0.5:
            kept[key] = record(n, chance.choice([1, 100, 3000]))
            cache.keep(key, kept[key])
        elif what < 0.6:
            kept.pop(key, None)
            cache.drop(key)
        elif what > 0.999:
            kept.clear()
            cache.clear()
        assert cache.get(key) in (None, kept.get(key))
        assert cache.size <= limit
    for n in range(60):
        cache.drop(b"%d" % n)
    assert (cache.size, len(cache)) == (0, 0)
