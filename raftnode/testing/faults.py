"""What goes wrong in a simulation, and when: each kind of fault is a method of `Faults`, with its weight in `KINDS` or
`TAIL_KINDS`."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from raftnode.testing.churn import KINDS as CHURN
from raftnode.testing.churn import Churn
from raftnode.testing.fabric import Fabric
from raftnode.testing.network import CrashPoint
from raftnode.testing.simulated import AMPLE, SimulatedNode, WriteFault
from raftnode.testing.world import World

KINDS: Final[dict[str, float]] = {
    "crash": 1.0,
    "crash_before_write": 3.0,
    "crash_after_write": 3.0,
    "crash_all": 0.3,
    "stop": 0.5,
    "write_fails": 0.5,
    "pause": 2.0,
    "cut": 2.0,
    "cut_one_way": 2.0,
    "isolate": 2.0,
    "split": 1.0,
    "succession": 1.5,
    "deposition": 2.0,
    "lone_copy": 1.0,
    "reset_link": 1.0,
    "slow_link": 1.0,
    "lost_entries": 1.0,
    "slow_disk": 1.0,
    "hung_disk": 0.5,
    "full_disk": 0.5,
    "clock_jump": 1.0,
    "clock_rate": 0.5,
    "wall_clock_jump": 0.5,
}
"""How often each kind happens, against the others."""
TAIL_KINDS: Final[dict[str, float]] = {
    "crash_in_tail": 3.0,
    "crash_in_start": 1.0,
    "tail_fails": 1.0,
    "oversleep": 2.0,
}
"""The same for what meets the tail of the log, which came later."""


class Faults:
    """Lets faults of some kinds happen, one after the other, several at a time, until `end`."""

    def __init__(
        self,
        world: World,
        fabric: Fabric,
        nodes: Mapping[str, SimulatedNode],
        weights: Mapping[str, float],
        pause: float,
        span: float,
        churn: Churn,
    ) -> None:
        """`weights`: by kind; a kind that is missing does not happen. `pause`: seconds between two faults, on average;
        `span`: seconds that one lasts, on average. `churn` does what changes the members."""
        self._churn = churn
        self.counts: Counter[str] = Counter()
        self._world = world
        self._fabric = fabric
        self._nodes = nodes
        self._weights = dict(weights)
        self._pause = pause
        self._span = span
        self._chance = world.chance_for("faults")
        self._has_ended = False

    def begin(self) -> None:
        """Plan the first."""
        self._world.after(self._chance.expovariate(1 / self._pause), self._next)

    def end(self) -> None:
        """All is mended: everybody runs, hears everybody, and has a disk and a clock that work."""
        self._has_ended = True
        self._world.tell("--- all is mended")
        self._fabric.heal_all()
        for node in self._nodes.values():
            node.slow_disk, node.room = 0.0, AMPLE
            node.crash_at, node.tears, node.dies_in_start = None, False, False
            node.write_fault = node.tail_fault = None
            node.set_clock_rate(1.0)
            if not node.is_up:
                node.start()
            elif node.is_paused:
                node.resume()

    def _next(self) -> None:
        if self._has_ended:
            return
        kind = self._chance.choices(list(self._weights), list(self._weights.values()))[0]
        self.counts[kind] += 1
        self._world.mark(b"fault " + kind.encode())
        self._world.tell(f"--- {kind}")
        getattr(self._churn if kind in CHURN else self, kind)()
        self._world.after(self._chance.expovariate(1 / self._pause), self._next)

    def _later(self, undo: Callable[[], object]) -> None:
        """Undo a fault after its span, unless all has been mended by then."""

        def act() -> None:
            if not self._has_ended:
                undo()

        self._world.after(self._chance.expovariate(1 / self._span), act)

    def _victim(self) -> SimulatedNode | None:
        """A node that is up, every second time the leader of the highest term; None when all are down."""
        up = [node for node in self._nodes.values() if node.is_up]
        leaders = [node for node in up if node.raft.is_leader]
        if leaders and self._chance.random() < 0.5:
            return max(leaders, key=lambda node: node.raft.term)
        return self._chance.choice(up) if up else None

    def _start_later(self, node: SimulatedNode, then: Callable[[], object] = lambda: None) -> None:
        def start() -> None:
            if not node.is_up and not node.is_uninvited:
                node.start()
                if node.is_up:
                    then()
                else:
                    self._start_later(node, then)

        self._later(start)

    def _await_death(
        self, node: SimulatedNode, is_due: Callable[[], object], then: Callable[[], object] = lambda: None
    ) -> None:
        """The node dies at its next write, while that is due; it is started again some time after that."""

        def look() -> None:
            if not node.is_up:
                self._start_later(node, then)
            elif is_due() and not self._has_ended:
                self._world.after(self._span / 4, look)

        look()

    # --- processes ---

    def crash(self) -> None:
        """kill -9 between two turns."""
        if node := self._victim():
            node.crash()
            self._start_later(node)

    def crash_before_write(self) -> None:
        """kill -9 in a turn, before its write: what may go out before it has gone out."""
        self._crash_at(CrashPoint.BEFORE_WRITE)

    def crash_after_write(self) -> None:
        """kill -9 in a turn, after its write: nobody has been told."""
        self._crash_at(CrashPoint.AFTER_WRITE)

    def _crash_at(self, point: CrashPoint) -> None:
        """The node dies at its next write; it is started again some time after that."""
        node = self._victim()
        if node is None:
            return
        node.crash_at = point
        self._await_death(node, lambda: node.crash_at)

    def crash_in_tail(self) -> None:
        """The power fails in the middle of a write to the tail; every second time once more after the restart, when
        what is left of the first write may stand where the next one goes."""
        if node := self._victim():
            again = self._chance.random() < 0.5
            self._tear(node, lambda: self._tear(node) if again else None)

    def _tear(self, node: SimulatedNode, then: Callable[[], object] = lambda: None) -> None:
        node.tears = True
        self._await_death(node, lambda: node.tears, then)

    def crash_in_start(self) -> None:
        """The power fails, and again in the start, which would have to take a tail over and make it anew."""
        node = self._victim()
        if node is not None and not node.store.has_tail:
            node = next((node for node in self._nodes.values() if node.is_up and node.store.has_tail), node)
        if node is not None:
            node.crash()
            node.dies_in_start = True
            self._start_later(node)

    def crash_all(self) -> None:
        """The power fails everywhere."""
        for node in self._nodes.values():
            if node.is_up:
                node.crash()
            self._start_later(node)

    def stop(self) -> None:
        """A clean stop."""
        if node := self._victim():
            node.stop()
            self._start_later(node)

    def write_fails(self) -> None:
        """A transaction fails with an error; what is on disk then is one of two things, and the node can't know."""
        if node := self._victim():
            node.write_fault = self._chance.choice(list(WriteFault))
            self._await_death(node, lambda: node.write_fault)

    def tail_fails(self) -> None:
        """The same with a write to the tail."""
        if node := self._victim():
            node.tail_fault = self._chance.choice(list(WriteFault))
            self._await_death(node, lambda: node.tail_fault)

    def pause(self) -> None:
        """SIGSTOP, and SIGCONT later."""
        node = self._victim()
        if node and not node.is_paused:
            node.pause()
            self._later(lambda: node.resume() if node.is_up and node.is_paused else None)

    def oversleep(self) -> None:
        """The leader has entries that only it has, and is stopped until another one leads. What it was sent meanwhile
        is taken in one turn: the new term, and entries in the place of those that are in its tail."""
        if (old := self._leader()) is None:
            return
        self._lose_entries(old.name, True)

        def stop() -> None:
            if self._has_ended:
                return
            self._lose_entries(old.name, False)
            if old.is_up and not old.is_paused:
                old.pause()
                elections = old.settings.election_high_ms / 1000
                self._world.after(elections * self._chance.uniform(1, 3), go_on)

        def go_on() -> None:
            if not self._has_ended and old.is_up and old.is_paused:
                old.resume()

        self._world.after(2 * old.settings.heartbeat_ms / 1000 * self._chance.random(), stop)

    # --- paths ---

    def _cut(self, pairs: Sequence[tuple[str, str]]) -> None:
        holds = self._chance.random() < 0.5
        for source, target in pairs:
            self._fabric.cut(source, target, holds)
        self._world.tell(f"cut {' '.join(f'{a}->{b}' for a, b in pairs)}{', held' if holds else ''}")

        def heal() -> None:
            for source, target in pairs:
                self._fabric.heal(source, target)
            self._world.tell(f"healed {' '.join(f'{a}->{b}' for a, b in pairs)}")

        self._later(heal)

    def _pair(self) -> tuple[str, str] | None:
        node = self._victim()
        others = [name for name in self._nodes if node is not None and name != node.name]
        return (node.name, self._chance.choice(others)) if node and others else None

    def cut(self) -> None:
        """Two members can't hear each other."""
        if pair := self._pair():
            self._cut([pair, pair[::-1]])

    def cut_one_way(self) -> None:
        """One member can't hear another one."""
        if pair := self._pair():
            self._cut([pair if self._chance.random() < 0.5 else pair[::-1]])

    def isolate(self) -> None:
        """One member hears nobody, or nobody hears it, or both."""
        if node := self._victim():
            others = [name for name in self._nodes if name != node.name]
            out, back = self._chance.choice([(True, True), (True, False), (False, True)])
            pairs = [(node.name, name) for name in others if out] + [(name, node.name) for name in others if back]
            self._cut(pairs)

    def split(self) -> None:
        """The members fall into two halves."""
        names = sorted(self._nodes)
        self._chance.shuffle(names)
        half = self._chance.randrange(1, len(names)) if len(names) > 1 else 0
        here, there = names[:half], names[half:]
        self._cut([(a, b) for a in here for b in there] + [(b, a) for a in here for b in there])

    def succession(self) -> None:
        """The leader piles up entries that only it has, and is cut off. When another one leads and has committed its
        first entry, that one dies, and the old one is heard again: the longer log is not the one that counts."""
        if (old := self._leader()) is None:
            return
        self._lose_entries(old.name, True)

        def cut() -> None:
            if not self._has_ended:
                self._lose_entries(old.name, False)
                self._succeed(old)

        self._world.after(self._chance.choice([0, self._span]), cut)

    def _succeed(self, old: SimulatedNode) -> None:
        elections = 4 * old.settings.election_high_ms / 1000
        term, until = old.disk.ballot.term, self._world.now + 4 * self._span + elections
        self._cut_off(old)

        def look() -> None:
            if self._has_ended:
                return
            serving = [node for node in self._nodes.values() if node.is_up and node.raft.may_serve_reads]
            new = [node for node in serving if node.raft.term > term]
            if not new and self._world.now < until:
                self._world.after(old.settings.heartbeat_ms / 20_000, look)
                return
            for node in new:
                node.crash()
                self._world.after(elections, functools.partial(self._start_later, node))
            self._hear_again(old)

        look()

    def deposition(self) -> None:
        """The others lose the leader, and are told so: they elect another one at once, while it still believes that it
        leads. What they had said to it before is slow, and comes in the middle of that."""
        if (old := self._leader()) is None:
            return
        heartbeat = old.settings.heartbeat_ms / 1000
        for name in self._nodes:
            self._fabric.path(name, old.name).extra_delay = 10 * heartbeat * self._chance.random()

        def cut() -> None:
            if self._has_ended:
                return
            for node in self._nodes.values():
                self._fabric.path(node.name, old.name).extra_delay = 0.0
                if node.is_up:
                    node.transport.lose_connections_of(old.name)
            self._cut_off(old)
            self._later(lambda: self._hear_again(old))

        self._world.after(3 * heartbeat * self._chance.random(), cut)

    def lone_copy(self) -> None:
        """One follower alone gets the last entries of a leader, which is cut off then. Of the next leader that follower
        hears, but gets no entries for a while."""
        if (old := self._leader()) is None:
            return
        names = [name for name in self._nodes if name != old.name]
        lone = self._chance.choice(names)
        for name in names:
            self._fabric.path(old.name, name).loses_entries = name != lone

        def cut() -> None:
            if self._has_ended:
                return
            for name in self._nodes:
                self._fabric.path(old.name, name).loses_entries = False
                self._fabric.path(name, lone).loses_entries = True
            self._cut_off(old)
            self._world.after(4 * old.settings.election_high_ms / 1000, lambda: self._later(mend))

        def mend() -> None:
            for name in self._nodes:
                self._fabric.path(name, lone).loses_entries = False
            self._hear_again(old)

        self._later(cut)

    def _leader(self) -> SimulatedNode | None:
        """Who leads, where others could."""
        leaders = [node for node in self._nodes.values() if node.is_up and node.raft.is_leader]
        return max(leaders, key=lambda node: node.raft.term) if leaders and len(self._nodes) > 2 else None

    def _cut_off(self, node: SimulatedNode) -> None:
        for name in self._nodes:
            if name != node.name:
                self._fabric.cut(node.name, name, holds=False)
                self._fabric.cut(name, node.name, holds=False)
        self._world.tell(f"cut off {node.name}")

    def _hear_again(self, node: SimulatedNode) -> None:
        for name in self._nodes:
            if name != node.name:
                self._fabric.heal(node.name, name)
                self._fabric.heal(name, node.name)
        self._world.tell(f"healed {node.name}")

    def reset_link(self) -> None:
        """A connection breaks."""
        if pair := self._pair():
            self._nodes[pair[0]].transport.reset(pair[1])

    def slow_link(self) -> None:
        """A path becomes slow."""
        if pair := self._pair():
            path = self._fabric.path(*pair)
            path.extra_delay = self._span * self._chance.random()
            self._later(lambda: setattr(path, "extra_delay", 0.0))

    def lost_entries(self) -> None:
        """Nobody gets the entries of one member, while its heartbeats come through."""
        if node := self._victim():
            self._lose_entries(node.name, True)
            self._later(lambda: self._lose_entries(node.name, False))

    def _lose_entries(self, source: str, are_lost: bool) -> None:
        for name in self._nodes:
            if name != source:
                self._fabric.path(source, name).loses_entries = are_lost

    # --- disks ---

    def slow_disk(self) -> None:
        """Every write takes a while."""
        if node := self._victim():
            node.slow_disk = self._span / 10 * self._chance.random()
            self._later(lambda: setattr(node, "slow_disk", 0.0))

    def hung_disk(self) -> None:
        """Writes take longer than an election."""
        if node := self._victim():
            node.slow_disk = 2 * self._span
            self._later(lambda: setattr(node, "slow_disk", 0.0))

    def full_disk(self) -> None:
        """There is no room, or just enough for a follower to go on."""
        if node := self._victim():
            node.room = self._chance.choice([0, node.settings.reserve_bytes * 3 // 4])
            self._later(lambda: setattr(node, "room", AMPLE))

    # --- clocks ---

    def clock_jump(self) -> None:
        """A node's monotonic clock jumps ahead."""
        if node := self._victim():
            node.jump(2 * self._span * self._chance.random())

    def clock_rate(self) -> None:
        """A node's clock runs too fast or too slow."""
        if node := self._victim():
            node.set_clock_rate(self._chance.uniform(0.7, 1.5))
            self._later(lambda: node.set_clock_rate(1.0))

    def wall_clock_jump(self) -> None:
        """Somebody sets a node's wall clock, also back."""
        if node := self._victim():
            node.jump_wall(self._chance.uniform(-1e6, 1e6))
