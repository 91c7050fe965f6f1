"""Load for a server that takes our put and get messages: what is sent when, and what counts. Without sockets, and
without a clock of its own; `generator` is the process that carries it out.

Two ways to offer load:

* **closed loop** (`rate=0`): every connection keeps `in_flight` requests under way, and sends the next when an answer
  comes. Shows the most that the server does. A server that stalls is offered less meanwhile, so latencies of a closed
  loop leave out what others would have waited.
* **open loop** (`rate=N`): request number n is due at n/N seconds, whatever the server does. Its latency counts from
  when it was due, not from when a connection was free for it: nothing that waited is left out (no "coordinated
  omission").

Every request that was due in the measured time has one outcome: answered, or a failure under its code. Besides the
codes of the nodes (`messages.CODES`) there are `connection_lost`, `unanswered` (within `patience_s` after the end) and
`not_sent` (open loop: it was due, and no connection was free for it until then).
"""

from __future__ import annotations

import random
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Literal, Protocol, TypeAlias

from msgspec import Struct

Workload: TypeAlias = Literal["put", "get", "get-local", "mixed", "delete", "fill"]
Kind: TypeAlias = Literal["put", "get", "delete"]

KEY_DIGITS: Final = 10
"""Each key ends in a number of so many digits."""
NAMESPACE: Final = "bench"

PAUSE_S: Final = 0.01
"""After a failure, before the next request."""
_STEP: Final = 2_654_435_761  # a prime: so number * step % keys visits every key once, far from the one before

Clock: TypeAlias = Callable[[], float]
Later: TypeAlias = Callable[[float, Callable[[], None]], object]
"""Call a function after so many seconds."""


# --- what is told ---------------------------------------------------------------------------------------------


class Plan(Struct, frozen=True, kw_only=True):
    """What a generator is to do."""

    addresses: list[str]
    """Connections are spread over these in turn; one that is lost goes on to the next."""
    workload: Workload
    """`get` is linearizable. `mixed` is puts and linearizable gets. `fill` puts each key once, until all are there."""
    connections: int = 1
    in_flight: int = 1
    """Requests under way at a time, on each connection."""
    keys: int = 1000
    """Keys are numbered from 0 up to this, and drawn evenly; deletes take each once before one comes again."""
    first: int = 0
    """`fill` begins at this number."""
    new_keys: bool = False
    """Puts draw from numbers above `keys` instead: nearly each makes a new key, at a random place among the others."""
    key_bytes: int = 240
    value_bytes: int = 1024
    reads: float = 0.5
    """The share of gets in `mixed`."""
    rate: float = 0.0
    """Requests a second that are due; 0: closed loop."""
    warm_up_s: float = 0.0
    """Load before the measured time."""
    seconds: float | None = None
    """The measured time; None: until it is told to stop, or everything is filled."""
    patience_s: float = 10.0
    """How long answers are awaited after the end."""
    seed: int = 1
    note_times: bool = False
    """The report lists when each answer came."""
    tell_s: float = 0.5
    """Progress is told so often."""
    number: int = 0
    """Of several generators with one plan, which one this is; it takes every `of`-th key and request."""
    of: int = 1

    def __post_init__(self) -> None:
        if self.key_bytes < KEY_DIGITS:
            raise ValueError(f"keys of {self.key_bytes} bytes: they must have at least {KEY_DIGITS}")


class Ready(Struct, tag="ready"):
    """All connections are open."""


class Progress(Struct, tag="progress"):
    """So far, warm-up and all. `last`: monotonic seconds of the newest answer, 0 when there was none."""

    answered: int
    failed: int
    last: float


class Tally(Struct):
    """The outcomes of one kind of request. A request counts when it was sent (closed loop) or due (open loop) in the
    measured time."""

    kind: Kind
    latencies: bytes = b""
    """Seconds, as doubles of this machine, of the requests that were answered without an error; see `as_seconds`."""
    finished: int = 0
    """Answers without an error that came in the measured time: what throughput counts."""
    failures: dict[str, int] = {}
    """By code."""
    longest_failure_s: float = 0.0
    """The longest time that a failed request took until its failure was known."""
    absent: int = 0
    """Answered requests that met no value: a get of a key that is not there, a delete of nothing."""


class Report(Struct, tag="report"):
    """What a generator has seen."""

    tallies: list[Tally]
    began: float
    """Monotonic seconds of the measured time's begin, and of its end."""
    ended: float
    cpu_s: float
    """CPU time that the generator itself took in the measured time."""
    late: bytes
    """Open loop: by how many seconds the generator was late with requests for which a connection was free; doubles. It
    is part of the latencies."""
    uvloop: bool
    unasked: dict[str, int] = {}
    """Errors that belong to no request, by code: a connection was refused, say."""
    lost_connections: int = 0
    times: bytes = b""
    """With `note_times`: monotonic seconds at which answers without an error came, in order; doubles."""


def as_seconds(packed: bytes) -> array[float]:
    """The times of a report as numbers."""
    found = array("d")
    found.frombytes(packed)
    return found


# --- requests, prepared ---------------------------------------------------------------------------------------


class Requests(Protocol):
    """Makes the requests of a plan."""

    def take(self, request_id: int) -> tuple[Kind, int, bytes] | None:
        """Kind, number of the key, and the line to send; None when there are no more."""

    def failed(self, number: int) -> None:
        """The request for this key has failed."""

    def has_more(self) -> bool:
        """`take` has something to give."""


def key_of(number: int, size: int) -> str:
    """The key of a number: `size` bytes."""
    return f"{'k' * (size - KEY_DIGITS)}{number:0{KEY_DIGITS}d}"


class _Lines:
    """The lines, in two halves between which the key's number goes."""

    def __init__(self, plan: Plan) -> None:
        pad = "k" * (plan.key_bytes - KEY_DIGITS)
        start = f'","namespace":"{NAMESPACE}","key":"{pad}'.encode()
        consistency = b'"local"' if plan.workload == "get-local" else b'"linearizable"'
        self._heads = {kind: b'{"type":"' + kind.encode() + start for kind in ("put", "get", "delete")}
        self._tails = {
            "put": b'","value":"' + b"v" * plan.value_bytes + b'","id":',
            "get": b'","consistency":' + consistency + b',"id":',
            "delete": b'","id":',
        }

    def line(self, kind: Kind, number: int, request_id: int) -> bytes:
        return b"%b%010d%b%d}\n" % (self._heads[kind], number, self._tails[kind], request_id)


class Drawn:
    """Requests without end, for keys drawn by the plan's seed."""

    def __init__(self, plan: Plan) -> None:
        self._line = _Lines(plan).line
        self._chance = random.Random(f"{plan.seed} {plan.number}").random
        self._keys = plan.keys
        self._first, self._span = (plan.keys, 10**KEY_DIGITS - plan.keys) if plan.new_keys else (0, plan.keys)
        self._kind: Kind = "get" if plan.workload in ("get", "get-local") else "put"
        self._reads = plan.reads if plan.workload == "mixed" else 0.0

    def take(self, request_id: int) -> tuple[Kind, int, bytes]:
        kind = self._kind
        if self._reads and self._chance() < self._reads:
            kind = "get"
        if kind == "get":
            number = int(self._chance() * self._keys)
        else:
            number = self._first + int(self._chance() * self._span)
        return kind, number, self._line(kind, number, request_id)

    def failed(self, number: int) -> None:
        """There are always more."""

    def has_more(self) -> bool:
        return True


class Deletes:
    """Deletes of each key once, in scattered order, and then again."""

    def __init__(self, plan: Plan) -> None:
        self._line = _Lines(plan).line
        self._next, self._of, self._keys = plan.number, plan.of, plan.keys

    def take(self, request_id: int) -> tuple[Kind, int, bytes]:
        number = self._next * _STEP % self._keys
        self._next += self._of
        return "delete", number, self._line("delete", number, request_id)

    def failed(self, number: int) -> None:
        """It is not tried again."""

    def has_more(self) -> bool:
        return True


class Fill:
    """Puts of each key once; of one that failed, again."""

    def __init__(self, plan: Plan) -> None:
        self._line = _Lines(plan).line
        self._rest = deque(range(plan.first + plan.number, plan.keys, plan.of))

    def take(self, request_id: int) -> tuple[Kind, int, bytes] | None:
        if not self._rest:
            return None
        number = self._rest.popleft()
        return "put", number, self._line("put", number, request_id)

    def failed(self, number: int) -> None:
        self._rest.append(number)

    def has_more(self) -> bool:
        return bool(self._rest)


def requests_of(plan: Plan) -> Requests:
    """Who makes the requests of this plan."""
    match plan.workload:
        case "fill":
            return Fill(plan)
        case "delete":
            return Deletes(plan)
    return Drawn(plan)


# --- the core: what is sent when, and what counts. No socket and no clock of its own --------------------------


class Sink(Protocol):
    """A connection, as the core sees it."""

    def send(self, line: bytes) -> None:
        """Send this line, now or with the next `flush`."""

    def flush(self) -> None: ...


class Slot:
    """One place for a request on one connection: its number there is the request's id. Used again after each answer."""

    __slots__ = ("began", "id", "kind", "number", "sink")

    def __init__(self, sink: Sink, request_id: int) -> None:
        self.sink = sink
        self.id = request_id
        self.kind: Kind | None = None
        """None: it is free."""
        self.number = 0
        self.began = 0.0
        """Closed loop: when its request was sent. Open loop: when it was due."""


class _Outcomes:
    """A `Tally` in the making."""

    def __init__(self, kind: Kind) -> None:
        self.kind: Kind = kind
        self.latencies = array("d")
        self.finished = 0
        self.failures: Counter[str] = Counter()
        self.longest_failure_s = 0.0
        self.absent = 0

    def tally(self) -> Tally:
        return Tally(
            self.kind,
            self.latencies.tobytes(),
            self.finished,
            dict(self.failures),
            self.longest_failure_s,
            self.absent,
        )


class Core:
    """Decides what is sent when, and counts what comes back.

    Invariant: a slot is either under way (`under_way` counts these), or in `_free`, or on its way there (`later`).
    """

    def __init__(self, plan: Plan, clock: Clock, later: Later) -> None:
        self.plan = plan
        self.answered = self.failed = self.under_way = self.lost_connections = 0
        self.last = 0.0
        self.began = self.ended = float("inf")
        self.late = array("d")
        self.times = array("d")
        self.unasked: Counter[str] = Counter()
        self._clock = clock
        self._later = later
        self._requests = requests_of(plan)
        self._outcomes: dict[Kind, _Outcomes] = {kind: _Outcomes(kind) for kind in ("put", "get", "delete")}
        self._free: dict[Sink, deque[Slot]] = {}
        self._turns: deque[Sink] = deque()  # connections with free slots; each has its turn, so that all get as many
        self._gone: set[Sink] = set()
        self._start = float("inf")
        self._sent = 0  # open loop: number of the next request that is due

    # --- its course ---

    def begin(self, at: float) -> None:
        """Load from `at` on, monotonic seconds."""
        self._start = at
        self.began = at + self.plan.warm_up_s
        if self.plan.seconds is not None:
            self.ended = self.began + self.plan.seconds
        self.tick()

    def stop(self) -> None:
        """The measured time ends now."""
        self.ended = min(self.ended, self._clock())

    def is_done(self) -> bool:
        """Nothing is under way, and nothing will be."""
        is_over = self._clock() >= self.ended or not self._requests.has_more()
        return is_over and not self.under_way and not self._waits()

    def tick(self) -> None:
        """Send what may be sent now. The open loop needs this call as often as something gets due: what it finds due
        while connections are free is late by so much."""
        self._send_what_is_due(self.late)

    def _send_what_is_due(self, late: array[float] | None = None) -> None:
        now = self._clock()
        touched: dict[Sink, None] = {}
        while self._turns and now >= self._start:
            sink = self._turns[0]
            slots = self._free[sink]
            slot = slots[0]
            if sink not in self._gone and not self._use(slot, now):
                break
            self._turns.popleft()
            if sink in self._gone:
                del self._free[sink]
                continue
            slots.popleft()
            if slots:
                self._turns.append(sink)
            touched[sink] = None
            if late is not None and self.plan.rate:
                late.append(now - slot.began)
        for sink in touched:
            sink.flush()

    def _is_free(self, slot: Slot) -> None:
        """A slot can take a request again."""
        slots = self._free.setdefault(slot.sink, deque())
        if not slots:
            self._turns.append(slot.sink)
        slots.append(slot)

    def _use(self, slot: Slot, now: float) -> bool:
        """Send the next request from this slot; False when there is none now."""
        began = now
        if self.plan.rate:
            began = self._due()
            if began > now or began >= self.ended:
                return False
            self._sent += 1
        elif now >= self.ended:
            return False
        made = self._requests.take(slot.id)
        if made is None:
            return False
        slot.kind, slot.number, line = made
        slot.began = began
        self.under_way += 1
        slot.sink.send(line)
        return True

    def _due(self) -> float:
        """When the next request of the open loop is due."""
        return self._start + (self.plan.number + self._sent * self.plan.of) / self.plan.rate

    def _waits(self) -> bool:
        """Open loop: a request was due before the end, and waits for a free slot."""
        return bool(self.plan.rate) and self._due() < min(self.ended, self._clock())

    # --- what comes back ---

    def connected(self, slots: Iterable[Slot]) -> None:
        """These are free."""
        for slot in slots:
            self._is_free(slot)
        self._send_what_is_due()

    def ended_well(self, slot: Slot, now: float, is_absent: bool) -> None:
        """The request of this slot was answered without an error. The caller flushes."""
        outcomes = self._outcome_of(slot)
        if self.began <= now < self.ended:
            outcomes.finished += 1
        if self.began <= slot.began < self.ended:
            outcomes.latencies.append(now - slot.began)
            outcomes.absent += is_absent
        if self.plan.note_times:
            self.times.append(now)
        self.answered += 1
        self.last = now
        if not self._use(slot, now):
            self._is_free(slot)

    def ended_badly(self, slot: Slot, now: float, code: str) -> None:
        """It was answered with an error, or never will be."""
        self._count_failure(slot, now, code)
        self._requests.failed(slot.number)
        if slot.sink not in self._gone:
            self._later(PAUSE_S, lambda: self.connected([slot]))

    def lost(self, sink: Sink, slots: Sequence[Slot], now: float) -> None:
        """The connection is gone, and with it all that was under way on it."""
        self._gone.add(sink)
        self.lost_connections += 1
        for slot in slots:
            if slot.kind is not None:
                self.ended_badly(slot, now, "connection_lost")

    def _outcome_of(self, slot: Slot) -> _Outcomes:
        """Take the request off its slot; where its outcome is counted."""
        assert slot.kind is not None, "an answer ends a request that was under way"
        outcomes = self._outcomes[slot.kind]
        slot.kind = None
        self.under_way -= 1
        return outcomes

    def _count_failure(self, slot: Slot, now: float, code: str) -> None:
        outcomes = self._outcome_of(slot)
        self.failed += 1
        if self.began <= slot.began < self.ended:
            outcomes.failures[code] += 1
            outcomes.longest_failure_s = max(outcomes.longest_failure_s, now - slot.began)

    def close(self, slots: Iterable[Slot]) -> None:
        """Count what is left without an outcome."""
        now = self._clock()
        for slot in slots:
            if slot.kind is not None:
                self._count_failure(slot, now, "unanswered")
        while self._waits():
            began, self._sent = self._due(), self._sent + 1
            made = self._requests.take(0)
            if began >= self.began and made is not None:
                outcomes = self._outcomes[made[0]]
                outcomes.failures["not_sent"] += 1
                outcomes.longest_failure_s = max(outcomes.longest_failure_s, now - began)

    def tallies(self) -> list[Tally]:
        """Of each kind that there was."""
        return [each.tally() for each in self._outcomes.values() if each.latencies or each.failures or each.finished]
