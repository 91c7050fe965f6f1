"""Judges what clients saw. Two checks that share no idea, so that a fault in one is seen by the other.

    check         per key: is there an order of the operations, in accord with real time, in which a single register
                  gives just these answers? A black box: it asks for *some* order (linearizability).
    check_order   over all keys: trusts commit_id as *the* order, and asks whether times, `replaced`, `version`,
                  `modified`, values and local reads agree with it.
    judge         both.

What both take as given: no key holds anything when the history begins; no two puts write the same value, and none
writes null; an operation that was invoked at the very time at which another one returned overlaps with it. An
operation that is `open` may have happened at any time after its invocation, or never: a `returned` that is noted with
it means nothing. A commit_id noted with an open write (from the log, afterwards) is where it happened, if it did. Of
an answer, None is "not known", with two exceptions: a put's `version` comes with its `replaced`, and a delete's
`commit_id` comes with its `replaced`; then None is what it says, that there was nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from math import inf
from typing import Final, Literal, NamedTuple

import msgspec
from msgspec import Struct

from raftnode.testing.history import Operation

MAX_STEPS: Final = 400_000
"""States of one key that the search may visit: about half a minute. Past it the key is undecided."""

_SHOWN: Final = 12  # operations of a prefix that a violation shows
_PRINTED: Final = 20  # violations that a verdict prints

ViolationKind = Literal[
    "not_linearizable",
    "failed_put_read",
    "value_nobody_wrote",
    "read_before_its_put",
    "commit_id_used_twice",
    "order_against_time",
    "wrong_replaced",
    "wrong_version",
    "wrong_modified",
    "wrong_state",
]


class Violation(Struct, frozen=True):
    """One thing that must not be, with what a person needs to see it. `str()` is a few readable lines."""

    kind: ViolationKind
    namespace: str
    key: str
    reason: str
    """What is wrong, in one sentence."""
    operations: tuple[Operation, ...]
    """Those concerned; for `not_linearizable`, those of which none could follow."""
    prefix: tuple[Operation, ...] = ()
    """For `not_linearizable`: the longest order that could be found, from its beginning."""
    obstacles: tuple[str, ...] = ()
    """For `not_linearizable`: why each of `operations` could not follow."""

    def __str__(self) -> str:
        lines = [f"{self.kind}: key {self.key!r} in namespace {self.namespace!r}: {self.reason}"]
        if self.kind == "not_linearizable":
            hidden = max(len(self.prefix) - _SHOWN, 0)
            if self.prefix:
                lines.append(f"  in order{f', after {hidden} others' if hidden else ''}:")
            lines += [f"    {describe(operation)}" for operation in self.prefix[hidden:]]
            lines.append(f"  {'and none of these could follow' if self.prefix else 'none of these could come first'}:")
        for operation, obstacle in zip_longest(self.operations, self.obstacles):
            lines.append(f"    {describe(operation)}")
            if obstacle is not None:
                lines.append(f"      because {obstacle}")
        return "\n".join(lines)


class Verdict(Struct, frozen=True):
    """What a check found. `str()` is what to print."""

    violations: tuple[Violation, ...] = ()
    undecided: tuple[tuple[str, str], ...] = ()
    """(namespace, key) of those for which the work was cut off: neither good nor bad."""
    operations: int = 0
    keys: int = 0
    steps: int = 0
    """States that the search visited, over all keys."""

    @property
    def word(self) -> Literal["good", "bad", "undecided"]:
        """One word. A violation anywhere outweighs what is undecided elsewhere."""
        if self.violations:
            return "bad"
        return "undecided" if self.undecided else "good"

    @property
    def is_good(self) -> bool:
        """True only when everything was decided, and nothing is wrong."""
        return self.word == "good"

    def __str__(self) -> str:
        lines = [f"{self.word}: {self.operations} operations on {self.keys} keys, {self.steps} steps"]
        lines += [f"undecided: key {key!r} in namespace {namespace!r}" for namespace, key in self.undecided]
        lines += map(str, self.violations[:_PRINTED])
        if len(self.violations) > _PRINTED:
            lines.append(f"and {len(self.violations) - _PRINTED} violations more")
        return "\n".join(lines)


def describe(operation: Operation) -> str:
    """One operation on one line."""
    parts = [f"{operation.kind} {operation.key}"]
    if operation.kind == "put":
        parts.append(f"= {_shorten(operation.value)}")
    elif operation.kind == "get" and operation.outcome == "ok":
        parts.append(f"-> {'nothing' if operation.value is None else _shorten(operation.value)}")
    parts.append(f"by {operation.client or '?'}{f' at {operation.node}' if operation.node else ''},")
    returned = "" if operation.returned is None else f"{operation.returned:.6f}"
    parts.append(f"{operation.invoked:.6f}..{returned}")
    parts.append(operation.outcome + (f" ({operation.code})" if operation.code else ""))
    if operation.is_local:
        parts.append("local")
    numbers = {name: getattr(operation, name) for name in ("commit_id", "modified", "version", "replaced")}
    return " ".join([*parts, *(f"{name}={number}" for name, number in numbers.items() if number is not None)])


def judge(history: Iterable[Operation], max_steps: int = MAX_STEPS) -> Verdict:
    """Both checks, in one verdict."""
    operations = list(history)
    search, order = check(operations, max_steps), check_order(operations)
    return Verdict(
        (*search.violations, *order.violations), search.undecided, search.operations, search.keys, search.steps
    )


def check(history: Iterable[Operation], max_steps: int = MAX_STEPS) -> Verdict:
    """Is each key linearizable? `max_steps` bounds the work for one key. Local reads are left to `check_order`.

    Raises ValueError for a history that can't be judged: a value put twice, a put of null, an answer without its time.
    """
    violations: list[Violation] = []
    undecided: list[tuple[str, str]] = []
    steps = count = 0
    keys = _by_key(history)
    for (namespace, key), operations in keys.items():
        count += len(operations)
        impossible = _impossible_reads(operation for operation in operations if not operation.is_local)
        if impossible:
            violations += impossible
            continue
        search = _Search(operations, max_steps)
        is_linearizable = search.run()
        steps += search.steps
        if is_linearizable is None:
            undecided.append((namespace, key))
        elif not is_linearizable:
            violations.append(search.explain())
    return Verdict(tuple(violations), tuple(undecided), count, len(keys), steps)


def _by_key(history: Iterable[Operation]) -> dict[tuple[str, str], list[Operation]]:
    """The operations of each (namespace, key), in the order of their invocation."""
    keys: dict[tuple[str, str], list[Operation]] = defaultdict(list)
    values: set[bytes] = set()
    for operation in sorted(history, key=lambda operation: operation.invoked):
        if operation.outcome == "ok" and (operation.returned is None or operation.returned < operation.invoked):
            raise ValueError(f"an answered operation has the time of its answer, after its invocation: {operation}")
        if operation.kind == "put":
            value = _identity(operation.value)
            if operation.value is None or value in values:
                raise ValueError(f"each put of a history writes a value of its own, and not null: {operation}")
            values.add(value)
        keys[operation.namespace, operation.key].append(operation)
    return keys


def _identity(value: object) -> bytes:
    """The value as something that can be compared and hashed; 1, 1.0 and true differ."""
    return msgspec.json.encode(value, order="deterministic")


def _shorten(value: object) -> str:
    text = _identity(value).decode()
    return text if len(text) <= 40 else f"{text[:37]}..."


def _impossible_reads(operations: Iterable[Operation]) -> list[Violation]:
    """Reads of one key that no order can explain: of what was never written, or not yet."""
    puts, gets = dict[bytes, Operation](), list[Operation]()
    for operation in operations:
        if operation.kind == "put":
            puts[_identity(operation.value)] = operation
        elif _is_answered_get(operation) and operation.value is not None:
            gets.append(operation)
    violations = []
    for get in gets:
        put = puts.get(_identity(get.value))
        if put is None:
            violations.append(_violation("value_nobody_wrote", "a value was read that nobody wrote here", get))
        elif put.outcome == "failed":
            reason = "a put that was answered as not executed was read"
            violations.append(_violation("failed_put_read", reason, put, get))
        elif _time(get) < put.invoked:
            reason = "a value was read before anybody asked to write it"
            violations.append(_violation("read_before_its_put", reason, put, get))
    return violations


def _violation(kind: ViolationKind, reason: str, *operations: Operation) -> Violation:
    return Violation(kind, operations[-1].namespace, operations[-1].key, reason, operations)


def _is_answered_get(operation: Operation) -> bool:
    return operation.kind == "get" and operation.outcome == "ok"


def _tells_replaced(write: Operation) -> bool:
    """True when None in `replaced` of an answered write says that there was nothing, instead of nothing at all."""
    return write.replaced is not None or (write.version if write.kind == "put" else write.commit_id) is not None


def _time(operation: Operation) -> float:
    """When an answered operation returned."""
    assert operation.returned is not None, "an answered operation has the time of its answer"
    return operation.returned


# --- some order ---

_NOTHING: Final = -1  # in place of the index of a put: the key holds nothing
_NEVER: Final = -2  # ... : no put of this key


class _Item(Struct):
    """An operation that the search has to place, with what its answer demands of its place."""

    operation: Operation
    invoked: float
    returned: float
    """Before this it must have its place, if it is required; infinite else."""
    is_required: bool
    commit_id: int | None
    order: tuple[int, bool] | None
    """By commit_id, a write before the reads that show it; None where it is not known."""
    version: int | None
    reads: int | None = None
    """Of a get: the index of the put that it read, or _NOTHING."""
    replaces: int | None = None
    """Of a write: the index of the put that it replaced, or _NOTHING, or _NEVER; None when it does not tell, or tells
    only a commit_id that no put is known to have: `stranger`."""
    stranger: int | None = None
    is_contradictory: bool = False
    """Its answer contradicts itself, or others' answers about the same put: it fits nowhere."""


class _State(NamedTuple):
    """How far a search has come: what has its place, and what the register then is."""

    first: int = 0
    """The items before this one have their place (or were passed over for good)."""
    placed: int = 0
    """Of those from `first` on, a bit for each that has its place."""
    puts_used: int = 0
    deletes_used: int = 0
    """How many bare puts and deletes (see _Search) have their place."""
    ordered: int = 0
    """How many of the required items with a known commit_id have their place."""
    current: int = _NOTHING
    version: int = 0
    mark: int = 0
    """The least commit_id that the last write can have, or the highest that an answer showed."""
    low: int = 0
    high: float = 0
    """Between these is the commit_id of the current value."""


class _Search:
    """Looks for an order of one key's operations, as Wing and Gong did, with the memory that Lowe added: no state is
    visited twice. The register's answers are the constraints, and these cuts keep it fast; each only leaves out what
    can't succeed, or what succeeds only if what is kept does.

    *Bare writes.* An open write whose value nobody read, and of which no commit_id is known, leaves no trace but that
    it may come between two others. Bare puts differ only in their invocation, and nothing ends their interval. So if
    an order uses one of them and not an earlier invoked one, or uses that one later, the two can change places:
    it is enough to know *how many* are used, the earliest invoked first. The same holds of bare deletes. A run of bare
    writes that ends an order can be left out; what follows one else is an operation that has its place in the search,
    and before the last delete of a run everything can be left out. So bare writes are placed only as a prelude to
    another operation: at most one delete, then some puts. How many puts is given by the version that follows; where no
    version is known it does not matter, and one is used only to be the stranger that a `replaced` names. A bare write
    that no prelude needs is thereby dropped.

    *Awaited values.* Values are unique, so that a put whose value is still to be read by an operation without a place
    can't be followed by a write: a put and its reads are one piece. It must have its place before the first of its
    reads returns, and can't have it while something else has to come before the last of them begins.

    *Pieces at once.* Where answers tell only values, and the key holds a value or will never again be found empty, a
    piece that fits now can come now. For in any order that goes on from here, a write comes next, which does not care
    what was there; and at the piece's old place a write follows, which does not either.

    *Commit ids.* They rise along the order, so that an operation has to wait for each required one with a lower one.

    *Reads at once.* A read that fits now and changes nothing can come now: the rest fits as before.
    """

    def __init__(self, operations: list[Operation], max_steps: int) -> None:
        self.steps = 0
        self._max_steps = max_steps
        self._items: list[_Item] = []
        self._bare_puts: list[Operation] = []
        self._bare_deletes: list[Operation] = []
        self._best: list[tuple[_State, int]] = []
        self._collect(operations)
        self._counts = any(item.version for item in self._items)
        self._required = _bits(index for index, item in enumerate(self._items) if item.is_required)
        self._readers = defaultdict[int, int](int)  # by the index of a put: the reads of it, as bits
        self._reach: dict[int, float] = {}  # by the index of a put: when the last read of it was invoked
        for index, item in enumerate(self._items):
            if item.reads is not None:
                self._readers[item.reads] |= 1 << index
                self._reach[item.reads] = item.invoked
        self._empty_reads = self._readers.pop(_NOTHING, 0)
        self._only_values = not self._counts and all(
            item.order is None and item.replaces is None and item.stranger is None for item in self._items
        )
        self._orders = sorted(item.order for item in self._items if item.is_required and item.order is not None)
        optional = sorted(
            (item.commit_id, index)
            for index, item in enumerate(self._items)
            if not item.is_required and item.commit_id is not None
        )
        self._optional = [commit_id for commit_id, _ in optional]
        self._passed = [0]  # by how many of the optional writes are passed by: those, as bits
        for _, index in optional:
            self._passed.append(self._passed[-1] | 1 << index)
        self._ranks = [
            (0, *item.order, item.returned) if item.order is not None else (1, 0, False, item.returned)
            for item in self._items
        ]

    # --- the question ---

    def _collect(self, operations: list[Operation]) -> None:
        """Sort out what has to have a place, and what its answer demands."""
        gets = [get for get in operations if _is_answered_get(get) and not get.is_local]
        writes = [write for write in operations if write.kind != "get" and write.outcome != "failed"]
        readers: dict[bytes, list[Operation]] = defaultdict(list)
        for get in gets:
            if get.value is not None:
                readers[_identity(get.value)].append(get)
        told = {write.replaced for write in writes if write.outcome == "ok" and write.replaced is not None}
        for write in writes:
            self._collect_write(write, readers[_identity(write.value)] if write.kind == "put" else [], told)
        self._items += map(self._as_item, gets)
        self._items.sort(key=lambda item: item.invoked)
        puts: dict[bytes, int] = {}
        places: dict[int, int] = {}  # by commit_id: the index of the put that has it, or _NEVER
        for index, item in enumerate(self._items):
            is_put = item.operation.kind == "put"
            if is_put:
                puts[_identity(item.operation.value)] = index
            if item.operation.kind != "get" and item.commit_id is not None:
                places[item.commit_id] = index if is_put else _NEVER
        for item in self._items:
            if item.operation.kind == "get":
                self._tie_get(item, puts)
            elif item.operation.outcome == "ok":
                _tie_write(item, places)

    def _collect_write(self, write: Operation, readers: list[Operation], told: set[int]) -> None:
        """Its reads tell of a put what its own answer did not, and that it happened."""
        is_ok = write.outcome == "ok"
        commit_id = write.commit_id
        version = write.version if is_ok and write.kind == "put" else None
        for get in readers:
            commit_id = get.modified if commit_id is None else commit_id
            version = get.version if version is None else version
        if not is_ok and commit_id is None and not readers:
            (self._bare_puts if write.kind == "put" else self._bare_deletes).append(write)
            return
        item = self._as_item(write)
        item.commit_id, item.version = commit_id, version
        item.is_required = is_ok or bool(readers) or commit_id in told
        item.returned = min([_time(write) if is_ok else inf, *map(_time, readers)])
        item.order = None if commit_id is None else (commit_id, False)
        self._items.append(item)

    @staticmethod
    def _as_item(operation: Operation) -> _Item:
        returned = inf if operation.returned is None else operation.returned
        order = None if operation.commit_id is None else (operation.commit_id, True)
        return _Item(operation, operation.invoked, returned, True, operation.commit_id, order, operation.version)

    def _tie_get(self, item: _Item, puts: dict[bytes, int]) -> None:
        """Which put a get read."""
        get = item.operation
        if get.value is None:
            item.reads = _NOTHING
            item.is_contradictory = bool(get.version) or get.modified is not None
        else:
            item.reads = puts[_identity(get.value)]
            put = self._items[item.reads]
            item.is_contradictory = get.version == 0 or (
                (get.modified is not None and get.modified != put.commit_id)
                or (get.version is not None and get.version != put.version)
            )

    # --- the search ---

    def run(self) -> bool | None:
        """True when there is an order, False when there is none, None when the work was cut off."""
        start = self._settle(_State())
        if self._is_complete(start):
            return True
        seen = {start}
        path: list[tuple[_State, int]] = [(start, -1)]
        branches = [self._successors(start)]
        while branches:
            for state, index in branches[-1]:
                if state in seen:
                    continue
                self.steps += 1
                if self.steps > self._max_steps:
                    return None
                seen.add(state)
                path.append((state, index))
                if self._is_complete(state):
                    return True
                branches.append(self._successors(state))
                break
            else:
                if len(path) > len(self._best):
                    self._best = list(path)
                branches.pop()
                path.pop()
        return False

    def _is_complete(self, state: _State) -> bool:
        return not (self._required >> state.first) & ~state.placed

    def _successors(self, state: _State) -> Iterator[tuple[_State, int]]:
        """Every state that one more item leads to, with its index; the likely ones first."""
        enabled, deadline = self._enabled(state)
        enabled.sort(key=self._ranks.__getitem__)
        found: list[tuple[_State, int]] = []
        for index in enabled:
            item = self._items[index]
            if self._must_wait(state, item) is not None:
                continue
            if item.reads is None:
                written = [(after, index) for after in self._write(state, index, item, deadline)]
                if written and item.operation.kind == "put" and self._needs_no_choice(state):
                    return iter(written)  # pieces at once
                found += written
                continue
            read = self._read(state, index, item, deadline)
            if read is not None:
                if read.mark == state.mark and read.current == state.current:
                    return iter([(read, index)])  # reads at once
                found.append((read, index))
        return iter(found)

    def _enabled(self, state: _State) -> tuple[list[int], float]:
        """The items that may come next by their times, and the time at which the next must have happened."""
        deadline, index, placed = inf, state.first, state.placed
        found = []
        while index < len(self._items) and self._items[index].invoked <= deadline:
            if not placed & 1:
                found.append(index)
                deadline = min(deadline, self._items[index].returned)
            placed >>= 1
            index += 1
        return found, deadline

    def _must_wait(self, state: _State, item: _Item) -> tuple[int, bool] | None:
        """The order of a required operation that has to come first, by its commit_id."""
        if item.order is None or state.ordered == len(self._orders) or item.order <= self._orders[state.ordered]:
            return None
        return self._orders[state.ordered]

    def _is_awaited(self, state: _State) -> bool:
        """True while the current value is still to be read."""
        return bool((self._readers.get(state.current, 0) >> state.first) & ~state.placed)

    def _needs_no_choice(self, state: _State) -> bool:
        """True when a put that fits may as well come now."""
        if not self._only_values:
            return False
        return state.current != _NOTHING or not (self._empty_reads >> state.first) & ~state.placed

    def _is_cut_off(self, state: _State, index: int) -> Operation | None:
        """What must come before the last read of a put begins, and thus between the put and that read."""
        reach = self._reach.get(index, -inf)
        placed = (state.placed | self._readers.get(index, 0) >> state.first) | 1 << (index - state.first)
        position = state.first
        while position < len(self._items) and self._items[position].invoked < reach:
            if not placed & 1 and self._items[position].returned < reach:
                return self._items[position].operation
            placed >>= 1
            position += 1
        return None

    def _read(self, state: _State, index: int, item: _Item, deadline: float) -> _State | None:
        """The state after a get, None where it does not fit."""
        if item.is_contradictory:
            return None
        deletes = 0
        if state.current != item.reads:
            if item.reads != _NOTHING or self._is_awaited(state) or not self._free_deletes(state, deadline):
                return None
            deletes = 1
        mark = state.mark + deletes
        if item.commit_id is not None:
            if item.commit_id < mark:
                return None
            mark = item.commit_id
        version, low, high = (0, 0, 0.0) if deletes else (state.version, state.low, state.high)
        if item.commit_id is not None and state.current != _NOTHING and not deletes:
            high = min(high, item.commit_id)
        return self._settle(
            state._replace(
                placed=state.placed | 1 << (index - state.first),
                deletes_used=state.deletes_used + deletes,
                ordered=state.ordered + (item.order is not None),
                current=_NOTHING if deletes else state.current,
                version=version,
                mark=mark,
                low=low,
                high=high,
            )
        )

    def _write(self, state: _State, index: int, item: _Item, deadline: float) -> Iterator[_State]:
        """The states after a write, one for each prelude with which it fits."""
        if item.is_contradictory or self._is_awaited(state):
            return
        if self._reach.get(index, -inf) > deadline and self._is_cut_off(state, index) is not None:
            return
        is_put = item.operation.kind == "put"
        for deletes, puts in self._preludes(state, item, deadline):
            before = puts + (0 if deletes or state.current == _NOTHING else state.version)
            mark = state.mark + deletes + puts
            if item.stranger is not None:
                if puts and mark > item.stranger:
                    continue
                mark = max(mark, item.stranger)
            if item.commit_id is not None and item.commit_id <= mark:
                continue
            commit_id = mark + 1 if item.commit_id is None else item.commit_id
            yield self._settle(
                state._replace(
                    placed=state.placed | 1 << (index - state.first),
                    puts_used=state.puts_used + puts,
                    deletes_used=state.deletes_used + deletes,
                    ordered=state.ordered + (item.is_required and item.order is not None),
                    current=index if is_put else _NOTHING,
                    version=(before + 1 if self._counts else 1) if is_put else 0,
                    mark=commit_id,
                    low=commit_id if is_put else 0,
                    high=(inf if item.commit_id is None else commit_id) if is_put else 0,
                )
            )

    def _preludes(self, state: _State, item: _Item, deadline: float) -> Iterator[tuple[int, int]]:
        """How many bare deletes and puts may come just before a write, so that its answer fits."""
        may_delete = state.current != _NOTHING and self._free_deletes(state, deadline)
        if item.replaces == _NOTHING:
            if state.current == _NOTHING:
                yield 0, 0
            elif may_delete:
                yield 1, 0
            return
        if item.replaces is not None:
            if state.current == item.replaces and item.version in (None, state.version + 1):
                yield 0, 0
            return
        is_counted = self._counts and item.operation.kind == "put"
        free = bisect_right(self._bare_puts, deadline, key=lambda put: put.invoked) - state.puts_used
        for deletes in (0, 1) if may_delete and is_counted else (0,):
            version = 0 if deletes or state.current == _NOTHING else state.version
            least = 0
            if item.stranger is not None:
                is_stranger = not deletes and self._is_unknown(state) and state.low <= item.stranger <= state.high
                least = 0 if is_stranger else 1
            if item.version is not None:
                amounts = range(item.version - 1 - version, item.version - version)
            else:
                amounts = range(least, (free if is_counted else least) + 1)
            yield from ((deletes, puts) for puts in amounts if least <= puts <= free)

    def _is_unknown(self, state: _State) -> bool:
        """True when there is a value whose commit_id is not known."""
        return state.current != _NOTHING and self._items[state.current].commit_id is None

    def _free_deletes(self, state: _State, deadline: float) -> bool:
        deletes = self._bare_deletes
        return state.deletes_used < len(deletes) and deletes[state.deletes_used].invoked <= deadline

    def _settle(self, state: _State) -> _State:
        """The one form of a state: what can't have a place any more counts as placed, and the full beginning is cut."""
        placed = state.placed | self._passed[bisect_right(self._optional, state.mark)] >> state.first
        full = (~placed & (placed + 1)).bit_length() - 1
        return state._replace(first=state.first + full, placed=placed >> full)

    # --- the answer ---

    def explain(self) -> Violation:
        """The longest order that was found, and why nothing could follow."""
        prefix: list[Operation] = []
        for (before, _), (after, index) in zip(self._best, self._best[1:], strict=False):
            prefix += self._bare_deletes[before.deletes_used : after.deletes_used]
            prefix += self._bare_puts[before.puts_used : after.puts_used]
            prefix.append(self._items[index].operation)
        state = self._best[-1][0]
        enabled, _ = self._enabled(state)
        stuck = [self._items[index] for index in enabled]
        stuck.sort(key=lambda item: (item.returned, item.invoked))
        return Violation(
            "not_linearizable",
            self._items[0].operation.namespace,
            self._items[0].operation.key,
            f"no order explains the answers; after {_count(len(prefix))} {self._tell(state)}",
            tuple(item.operation for item in stuck),
            tuple(prefix),
            tuple(self._why(state, item) for item in stuck),
        )

    def _tell(self, state: _State) -> str:
        if state.current == _NOTHING:
            return "there is no value"
        version = f", version {state.version}" if self._counts else ""
        commit_id = self._items[state.current].commit_id
        place = "" if commit_id is None else f", commit_id {commit_id}"
        return f"the value is {_shorten(self._items[state.current].operation.value)}{version}{place}"

    def _why(self, state: _State, item: _Item) -> str:
        """What keeps an operation from coming next; in words, for a person."""
        operation = item.operation
        blocker = self._must_wait(state, item)
        if item.is_contradictory:
            return "what it was told contradicts itself, or what others were told of the same put"
        if any(self._items[index] is item for _, index in self._successors(state)):
            return "it could follow, but leads only to what was tried in another order"
        if blocker is not None:
            first = next(other.operation for other in self._items if other.is_required and other.order == blocker)
            return f"its commit_id is {item.commit_id}, and one with a lower has to come first: {describe(first)}"
        if item.reads is not None and item.reads != state.current:
            return f"it read {'nothing' if operation.value is None else _shorten(operation.value)}"
        if item.commit_id is not None and item.commit_id < state.mark + (item.reads is None):
            return f"its commit_id is {item.commit_id}, and {state.mark} came before"
        if self._is_awaited(state):
            reader = (self._readers[state.current] >> state.first) & ~state.placed
            first = self._items[state.first + (reader & -reader).bit_length() - 1].operation
            return f"the value before it is still to be read: {describe(first)}"
        between = self._is_cut_off(state, self._items.index(item))
        if between is not None:
            last = self._items[self._readers[self._items.index(item)].bit_length() - 1].operation
            return f"it is read by {describe(last)}; between the two has to come {describe(between)}"
        return f"it was told version {operation.version}, replaced {operation.replaced}"


def _count(operations: int) -> str:
    return f"{operations} operation{'' if operations == 1 else 's'}"


def _tie_write(item: _Item, places: dict[int, int]) -> None:
    """What an answered write tells of the value that it replaced."""
    write = item.operation
    if write.replaced is not None:
        item.replaces = places.get(write.replaced)
        item.stranger = write.replaced if item.replaces is None else None
    elif _tells_replaced(write):
        item.replaces = _NOTHING
        item.is_contradictory = write.kind == "put" and write.version != 1
    if item.version is not None and item.version < 1:
        item.is_contradictory = True


def _bits(indices: Iterable[int]) -> int:
    return sum(1 << index for index in indices)


# --- the order of the commit_ids ---


def check_order(history: Iterable[Operation]) -> Verdict:
    """Do all answers agree with the order of the commit_ids? In n log n, over all keys; never undecided.

    A commit_id belongs to one write. What was invoked after an answer returned has a higher commit_id than that answer
    showed if it is a write, and no lower one if it is a linearizable get. In the sequence of a key's writes whose
    commit_id is known, each replaced the one before it, with the next version; only writes with an open outcome can
    have come between. A get, local or not, shows the state at its commit_id, as far as those writes determine it.

    Raises ValueError as `check` does.
    """
    operations = list(history)
    keys = _by_key(operations)
    violations: list[Violation] = []
    order = _Order()
    for of_key in keys.values():
        impossible = _impossible_reads(of_key)
        violations += impossible
        wrong = {id(violation.operations[-1]) for violation in impossible}
        order.add_key([operation for operation in of_key if id(operation) not in wrong])
    violations += order.check_ids()
    violations += order.check_times(operations)
    for sequence in order.sequences:
        violations += sequence.check(order.owners)
    return Verdict(tuple(violations), (), len(operations), len(keys))


class _Order:
    """The writes of all keys at their commit_ids."""

    def __init__(self) -> None:
        self.sequences: list[_Sequence] = []
        self.owners: dict[int, Operation] = {}
        """By commit_id: the write that has it."""
        self._commit_ids: dict[int, int] = {}  # by id() of a write

    def add_key(self, operations: list[Operation]) -> None:
        """The operations of one key, without reads of what was never written."""
        sequence = _Sequence(operations)
        self.sequences.append(sequence)
        for commit_id, write in sequence.writes:
            self._commit_ids[id(write)] = commit_id

    def check_ids(self) -> Iterator[Violation]:
        """Each commit_id belongs to one write."""
        for sequence in self.sequences:
            for commit_id, write in sequence.writes:
                other = self.owners.setdefault(commit_id, write)
                if other is not write:
                    reason = f"two writes have the commit_id {commit_id}"
                    yield _violation("commit_id_used_twice", reason, other, write)

    def check_times(self, operations: list[Operation]) -> Iterator[Violation]:
        """Commit_ids rise with time: what an answer showed is below every write that was invoked later."""
        shown = [op for op in operations if op.outcome == "ok" and op.commit_id is not None]
        shown.sort(key=_time)
        highest: Operation | None = None
        at = 0
        for operation in sorted(operations, key=lambda operation: operation.invoked):
            while at < len(shown) and _time(shown[at]) < operation.invoked:
                if highest is None or (shown[at].commit_id or 0) > (highest.commit_id or 0):
                    highest = shown[at]
                at += 1
            is_get = operation.kind == "get"
            if is_get and (operation.is_local or operation.outcome != "ok"):
                continue
            commit_id = operation.commit_id if is_get else self._commit_ids.get(id(operation))
            if commit_id is None or highest is None or highest.commit_id is None:
                continue
            if commit_id < highest.commit_id + (not is_get):
                reason = f"commit_id {highest.commit_id} was shown before this {operation.kind} with {commit_id} began"
                yield _violation("order_against_time", reason, highest, operation)


class _Sequence:
    """The writes of one key whose commit_id is known, in its order; and those that can be anywhere between."""

    def __init__(self, operations: list[Operation]) -> None:
        self._gets = [operation for operation in operations if _is_answered_get(operation)]
        self._puts: dict[bytes, Operation] = {}
        self._commit_ids: dict[int, int] = {}  # by id() of a write: its own, or what the first to read it was told
        self._versions: dict[int, int] = {}  # likewise, of a put
        self._loose: dict[str, list[float]] = {"put": [], "delete": []}  # when those were invoked that can be anywhere
        self.writes: list[tuple[int, Operation]] = []
        """(commit_id, write), in the order of the commit_ids."""
        writes = [write for write in operations if write.kind != "get" and write.outcome != "failed"]
        self._learn(writes)
        for write in writes:
            commit_id = self._commit_ids.get(id(write))
            if commit_id is None:
                self._loose[write.kind].append(write.invoked)
            else:
                self.writes.append((commit_id, write))
        self.writes.sort(key=lambda each: each[0])
        self._positions = [commit_id for commit_id, _ in self.writes]

    def _learn(self, writes: list[Operation]) -> None:
        for write in writes:
            if write.kind == "put":
                self._puts[_identity(write.value)] = write
            if write.commit_id is not None:
                self._commit_ids[id(write)] = write.commit_id
            if write.kind == "put" and write.outcome == "ok" and write.version is not None:
                self._versions[id(write)] = write.version
        for get in self._gets:
            if get.value is not None:
                put = self._puts[_identity(get.value)]
                if get.modified is not None:
                    self._commit_ids.setdefault(id(put), get.modified)
                if get.version is not None:
                    self._versions.setdefault(id(put), get.version)

    def check(self, owners: dict[int, Operation]) -> Iterator[Violation]:
        """Every answer against the sequence. `owners`: which write has which commit_id, over all keys."""
        before: tuple[int, Operation] | None = None
        for commit_id, write in self.writes:
            if write.outcome == "ok" and _tells_replaced(write):
                yield from self._check_write(commit_id, write, before, owners)
            before = commit_id, write
        for get in self._gets:
            yield from self._check_get(get)

    def _check_write(
        self, commit_id: int, write: Operation, before: tuple[int, Operation] | None, owners: dict[int, Operation]
    ) -> Iterator[Violation]:
        """What a write was told that it replaced, and the version that follows from it."""
        position, previous = before or (0, None)
        known = () if previous is None else (previous,)
        room = max(commit_id - position - 1, 0)  # how many writes can lie between
        puts = min(self._count_loose("put", _time(write)), room)
        deletes = min(self._count_loose("delete", _time(write)), room)
        current = previous if previous is not None and previous.kind == "put" else None
        version = 0 if current is None else self._versions.get(id(current))
        least, most = (1, 1) if write.replaced is None else (2, inf if version is None else version + puts + 1)
        if write.replaced is None:
            if current is not None and not deletes:
                yield _violation("wrong_replaced", "it was told that it replaced nothing", *known, write)
        elif write.replaced in owners:
            owner = owners[write.replaced]
            if owner is not current:
                reason = f"it was told that it replaced {write.replaced}, which was not the value before it"
                others = (owner, *known) if owner is not previous else known
                yield _violation("wrong_replaced", reason, *others, write)
            elif version is not None:
                least = most = version + 1
        elif not position < write.replaced < commit_id or not puts:
            reason = f"it was told that it replaced {write.replaced}, which nobody can have written"
            yield _violation("wrong_replaced", reason, *known, write)
        elif not deletes and version is not None:
            least = version + 2
        if write.kind == "put" and write.version is not None and not least <= write.version <= most:
            reason = f"its version is {write.version}; the writes before it make it {_between(least, most)}"
            yield _violation("wrong_version", reason, *known, write)

    def _check_get(self, get: Operation) -> Iterator[Violation]:
        """What a get was told, against the put that it read and the state at its commit_id."""
        put = None if get.value is None else self._puts[_identity(get.value)]
        modified = None if put is None else self._commit_ids.get(id(put))
        known = () if put is None else (put,)
        if get.modified not in (None, modified):
            yield _violation("wrong_modified", f"what it read was written as {modified}", *known, get)
        version = 0 if put is None else self._versions.get(id(put))
        if get.version not in (None, version) or (put is not None and version is not None and version < 1):
            yield _violation("wrong_version", f"the version of what it read is {version}", *known, get)
        if get.commit_id is not None:
            yield from self._check_state(get, get.commit_id, put, modified)

    def _check_state(
        self, get: Operation, commit_id: int, put: Operation | None, modified: int | None
    ) -> Iterator[Violation]:
        count = bisect_right(self._positions, commit_id)
        position, last = self.writes[count - 1] if count else (0, None)
        if modified is not None and modified > commit_id:
            assert put is not None, "only a put has a position"
            reason = f"it shows the state at commit_id {commit_id}, but the value was written later, as {modified}"
            yield _violation("wrong_state", reason, put, get)
        elif put is not None and modified is not None:
            if last is not put:
                assert last is not None, "at least the put itself is at or below the commit_id"
                reason = f"it shows the state at commit_id {commit_id}, but {position} had replaced what it read"
                yield _violation("wrong_state", reason, put, last, get)
        elif put is None and (last is None or last.kind == "delete"):
            return
        elif commit_id == position or (put is None and not self._count_loose("delete", _time(get))):
            reason = f"it shows the state at commit_id {commit_id}, where the last write is that of {position}"
            yield _violation("wrong_state", reason, *(() if last is None else (last,)), get)

    def _count_loose(self, kind: str, until: float) -> int:
        """How many writes of an unknown commit_id were invoked until then."""
        return bisect_right(self._loose[kind], until)


def _between(least: float, most: float) -> str:
    return str(least) if least == most else f"{least} to {'any' if most == inf else most}"
