"""Time, chance and the record of what happened, for a simulation: everything that could differ between two runs.

Nothing in a simulation looks at a real clock or draws from another source. Events happen in the order of their times,
and in the order in which they were planned when their times are equal, so one seed gives one trace; `World.digest`
tells whether two runs were the same.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections.abc import Callable

Action = Callable[[], object]


class World:
    """Simulated time, in seconds from 0, and what is planned.

    Invariant: `now` never falls.
    """

    def __init__(self, seed: int, tell: Callable[[str], object] | None = None) -> None:
        """`seed` decides everything. `tell` gets each line of the transcript; None: nobody reads one."""
        self.now = 0.0
        self.chance = random.Random(seed)
        self.events = 0
        """How many have happened."""
        self._tell = tell
        self._planned: list[tuple[float, int, Action]] = []
        self._numbers = itertools.count()
        self._trace = hashlib.sha256()

    @property
    def is_told(self) -> bool:
        """True when somebody reads the transcript, so that it is worth the making of its lines."""
        return self._tell is not None

    def tell(self, line: str) -> None:
        """A line of the transcript, with its time before it."""
        if self._tell is not None:
            self._tell(f"{self.now:10.6f}  {line}")

    def mark(self, what: bytes) -> None:
        """Something happened that a second run with the same seed must repeat."""
        self._trace.update(b"%.9f " % self.now)
        self._trace.update(what)

    @property
    def digest(self) -> str:
        """Equal for equal traces."""
        return self._trace.hexdigest()[:16]

    def chance_for(self, what: str) -> random.Random:
        """A source of chance of its own, so that what one part draws does not move what another draws."""
        return random.Random(f"{what} {self.chance.getrandbits(64)}")

    def at(self, time: float, action: Action) -> None:
        """Plan `action` for `time`, or for now when that has passed."""
        heapq.heappush(self._planned, (max(time, self.now), next(self._numbers), action))

    def after(self, delay: float, action: Action) -> None:
        """Plan `action` for `delay` seconds from now."""
        self.at(self.now + delay, action)

    def step(self, until: float) -> bool:
        """Let the next event happen; False when there is none up to `until`, and then it is that time."""
        if not self._planned or self._planned[0][0] > until:
            self.now = max(self.now, until)
            return False
        self.now, _, action = heapq.heappop(self._planned)
        self.events += 1
        action()
        return True

    def run(self, seconds: float) -> None:
        """Let everything happen that is due within `seconds`."""
        until = self.now + seconds
        while self.step(until):
            pass

    def run_until(self, is_so: Callable[[], bool], seconds: float, every: float) -> bool:
        """Run until `is_so`, which is looked at `every` so many seconds; False when it is not so within `seconds`."""
        until = self.now + seconds
        while not is_so():
            if self.now >= until:
                return False
            self.run(every)
        return True
