"""Faults of real nodes and of the network between them, at random: what `tools/chaos.py` does to a cluster.

    arena = Arena(cluster)                                # a ClusterOfProcesses, proxied and running
    monkey = Monkey(arena, list(FAULTS), seed=1)
    monkey.run(seconds=60)

`FAULTS` is the table of all kinds; a new kind is a function and an entry there. A fault is a context manager: it is
done when it is entered, undone when it is left, and yields words that say whom it hits. It takes what it hits from the
`Arena`, so that several may be in force at a time and none undoes another. Members that come and go are in `turnover`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import MappingProxyType
from typing import Any, Final

from raftnode.testing.arena import WATCH_S, Arena, Fault, NotNow, Road
from raftnode.testing.processes import NodeProcess
from raftnode.testing.proxy import CLIENTS, both_ways

# --- the faults -----------------------------------------------------------------------------------------------


@contextmanager
def kill_nodes(arena: Arena, nodes: Sequence[NodeProcess]) -> Iterator[str]:
    """kill -9 to these at once; started again at the end."""
    with arena.hitting(*nodes):
        arena.cluster.kill(nodes)
        yield _names(nodes)
        for node in nodes:
            node.start()


def kill(arena: Arena, chance: random.Random) -> AbstractContextManager[str]:
    """kill -9 of one node."""
    return kill_nodes(arena, [arena.any_node(chance)])


def kill_leader(arena: Arena, chance: random.Random) -> AbstractContextManager[str]:  # noqa: ARG001
    """kill -9 of the leader."""
    return kill_nodes(arena, [arena.leader()])


def kill_minority(arena: Arena, chance: random.Random) -> AbstractContextManager[str]:
    """kill -9 of as many nodes as may be down, at once."""
    count = (len(arena.roll.members.voters) - 1) // 2
    whole = [node for node in arena.voters if node not in arena.hit_nodes]
    if not 0 < count <= len(whole):
        raise NotNow
    return kill_nodes(arena, chance.sample(whole, count))


@contextmanager
def kill_all(arena: Arena, chance: random.Random) -> Iterator[str]:
    """kill -9 of all nodes at once; each comes back after a pause of its own."""
    nodes = list(arena.cluster)
    with arena.hitting(*nodes):
        arena.cluster.kill(nodes)
        yield _names(nodes)
        chance.shuffle(nodes)
        for node in nodes:
            node.start()
            time.sleep(chance.choice((0.0, 0.0, 0.1, 0.5, 1.5)))


@contextmanager
def kill_in_start(arena: Arena, chance: random.Random) -> Iterator[str]:
    """kill -9 of a node, and again while it starts, up to three times."""
    node = arena.any_node(chance)
    times = chance.randint(1, 3)
    with arena.hitting(node):
        node.kill()
        for _ in range(times):
            node.start()
            time.sleep(chance.uniform(0.0, 1.0))
            node.kill()
        yield f"{node.name}, {times} times in its start"
        node.start()


@contextmanager
def stop_node(arena: Arena, node: NodeProcess) -> Iterator[str]:
    """SIGSTOP; SIGCONT at the end. Its connections stay, and what comes meanwhile waits for it."""
    with arena.hitting(node):
        node.pause()
        yield node.name
        node.resume()


def stop(arena: Arena, chance: random.Random) -> AbstractContextManager[str]:
    """SIGSTOP of one node."""
    return stop_node(arena, arena.any_node(chance))


def stop_leader(arena: Arena, chance: random.Random) -> AbstractContextManager[str]:  # noqa: ARG001
    """SIGSTOP of the leader: it wakes up and believes that it leads."""
    return stop_node(arena, arena.leader())


@contextmanager
def cut_roads(arena: Arena, roads: Iterable[Road], words: str) -> Iterator[str]:
    """Nothing goes along these; `words` say whom that hits."""
    with arena.roads(roads) as held:
        for a, b in held:
            arena.proxy.cut_one_way(a, b)
        yield words


def cut(arena: Arena, chance: random.Random) -> AbstractContextManager[str]:
    """The link between two nodes, both ways; a third one still reaches both."""
    a, b = _two(arena, chance)
    return cut_roads(arena, [(a, b), (b, a)], f"between {a} and {b}")


def cut_one_way(arena: Arena, chance: random.Random) -> AbstractContextManager[str]:
    """What goes from one node to another."""
    a, b = _two(arena, chance)
    return cut_roads(arena, [(a, b)], f"from {a} to {b}")


def mute(arena: Arena, chance: random.Random) -> AbstractContextManager[str]:
    """Everything that one node sends to the others, or everything that they send to it; often the leader."""
    node = _often_leader(arena, chance)
    others = arena.others(node)
    if chance.random() < 0.5:
        return cut_roads(arena, [(node.address, other) for other in others], f"{node.name} is not heard")
    return cut_roads(arena, [(other, node.address) for other in others], f"{node.name} hears nobody")


def isolate(arena: Arena, chance: random.Random) -> AbstractContextManager[str]:
    """One node from all others."""
    node = arena.any_node(chance)
    return cut_roads(arena, both_ways([node.address], arena.others(node)), node.name)


def isolate_leader(arena: Arena, chance: random.Random) -> AbstractContextManager[str]:  # noqa: ARG001
    """The leader from all others, while clients reach it."""
    node = arena.leader()
    return cut_roads(arena, both_ways([node.address], arena.others(node)), node.name)


def split(arena: Arena, chance: random.Random) -> AbstractContextManager[str]:
    """The cluster in two groups; one of them may be no more than a node."""
    addresses = _all(arena, chance)
    at = chance.randint(1, len(addresses) // 2)
    return cut_roads(arena, both_ways(addresses[:at], addresses[at:]), f"{addresses[:at]} from {addresses[at:]}")


def bridge(arena: Arena, chance: random.Random) -> AbstractContextManager[str]:
    """Two groups that see each other only through one node that both reach."""
    addresses = _all(arena, chance)
    middle, rest = addresses[0], addresses[1:]
    half = len(rest) // 2
    return cut_roads(arena, both_ways(rest[:half], rest[half:]), f"only {middle} reaches all")


@contextmanager
def slow(arena: Arena, chance: random.Random) -> Iterator[str]:
    """All links of one node are late, or narrow, or both."""
    node = _often_leader(arena, chance)
    delay_ms = chance.choice((2.0, 20.0, 100.0, 300.0))
    rate = chance.choice((None, 20_000, 200_000))
    with arena.roads(both_ways([node.address], arena.others(node))) as roads:
        for a, b in roads:
            arena.proxy.slow(a, b, delay_ms, rate)
        yield f"{node.name}, {delay_ms:g} ms, {rate or 'any number of'} bytes/s"


@contextmanager
def slow_clients(arena: Arena, chance: random.Random) -> Iterator[str]:
    """What one node and its clients say to each other is late."""
    node = arena.any_node(chance)
    delay_ms = chance.choice((20.0, 200.0, 1000.0))
    with arena.roads(both_ways([node.address], [CLIENTS])) as roads:
        for a, b in roads:
            arena.proxy.slow(a, b, delay_ms)
        yield f"{node.name}, {delay_ms:g} ms"


def cut_clients(arena: Arena, chance: random.Random) -> AbstractContextManager[str]:
    """No answer of one node reaches its clients: what they ask it is done, and they are not told."""
    node = arena.any_node(chance)
    return cut_roads(arena, [(node.address, CLIENTS)], node.name)


@contextmanager
def reset(arena: Arena, chance: random.Random) -> Iterator[str]:
    """The connections of one node with the others and with its clients, some times."""
    node = _often_leader(arena, chance)
    times = chance.randint(1, 5)
    for _ in range(times):
        for other in [*arena.others(node), CLIENTS]:
            if chance.random() < 0.7:
                arena.proxy.reset(node.address, other)
        time.sleep(chance.uniform(0.0, 0.3))
    yield f"{node.name}, {times} times"


@contextmanager
def refuse(arena: Arena, chance: random.Random) -> Iterator[str]:
    """Between two nodes every connection is reset, and each new one."""
    a, b = _two(arena, chance)
    with arena.roads([(a, b), (b, a)]):
        arena.proxy.refuse(a, b)
        yield f"between {a} and {b}"


@contextmanager
def refuse_leader(arena: Arena, chance: random.Random) -> Iterator[str]:  # noqa: ARG001
    """Between the leader and all others every connection is reset, and each new one: they notice at once and elect
    another, and it may believe for a while that it still leads."""
    node = arena.leader()
    with arena.roads(both_ways([node.address], arena.others(node))):
        for other in arena.others(node):
            arena.proxy.refuse(node.address, other)
        yield node.name


@contextmanager
def outlive(arena: Arena, chance: random.Random) -> Iterator[str]:
    """The answers to the leader are late, and then it is not heard any more: another one leads already while the old
    one still gets answers."""
    node, delay_ms = arena.leader(), chance.choice((200.0, 500.0, 1000.0))
    with arena.roads(both_ways([node.address], arena.others(node))):
        for other in arena.others(node):
            arena.proxy.slow(other, node.address, delay_ms)
        time.sleep(2 * delay_ms / 1000)
        for other in arena.others(node):
            arena.proxy.cut_one_way(node.address, other)
        yield f"{node.name}, answers {delay_ms:g} ms late"


@contextmanager
def wake_alone(arena: Arena, chance: random.Random) -> Iterator[str]:
    """SIGSTOP of the leader; when it wakes up it is cut off from the others, and from what they have said meanwhile."""
    node = arena.leader()
    with cut_roads(arena, both_ways([node.address], arena.others(node)), node.name) as words, arena.hitting(node):
        node.pause()
        time.sleep(chance.uniform(0.3, 4.0))
        node.resume()
        yield words


def _often_leader(arena: Arena, chance: random.Random) -> NodeProcess:
    return arena.leader() if chance.random() < 0.5 else arena.any_node(chance)


def _all(arena: Arena, chance: random.Random) -> list[str]:
    """The addresses of all nodes, in any order."""
    addresses = list(arena.cluster.addresses)
    chance.shuffle(addresses)
    return addresses


def _two(arena: Arena, chance: random.Random) -> list[str]:
    """The addresses of two members."""
    nodes = arena.members
    if len(nodes) < 2:
        raise NotNow
    return [node.address for node in chance.sample(nodes, 2)]


def _names(nodes: Iterable[NodeProcess]) -> str:
    return ", ".join(node.name for node in nodes)


FAULTS: Final = {
    "kill": Fault(kill, 0.0, 5.0),
    "kill-leader": Fault(kill_leader, 0.0, 5.0, 3),
    "kill-minority": Fault(kill_minority, 0.0, 5.0),
    "kill-all": Fault(kill_all, 0.0, 2.0),
    "kill-in-start": Fault(kill_in_start, 0.0, 1.0),
    "stop": Fault(stop, 0.2, 6.0),
    "stop-leader": Fault(stop_leader, 0.2, 6.0, 4),
    "cut": Fault(cut, 0.5, 6.0),
    "cut-one-way": Fault(cut_one_way, 0.5, 6.0),
    "mute": Fault(mute, 0.5, 6.0),
    "isolate": Fault(isolate, 0.5, 6.0),
    "isolate-leader": Fault(isolate_leader, 0.5, 6.0, 3),
    "split": Fault(split, 0.5, 6.0),
    "bridge": Fault(bridge, 0.5, 6.0),
    "slow": Fault(slow, 1.0, 6.0),
    "slow-clients": Fault(slow_clients, 0.5, 3.0, 1),
    "cut-clients": Fault(cut_clients, 0.5, 3.0, 1),
    "reset": Fault(reset, 0.0, 0.0),
    "refuse": Fault(refuse, 0.5, 4.0, 1),
    "refuse-leader": Fault(refuse_leader, 0.5, 4.0, 4),
    "outlive": Fault(outlive, 1.0, 3.0, 3),
    "wake-alone": Fault(wake_alone, 0.5, 3.0),
}
"""Every fault that a run may do, with how long it lasts and how often it comes beside the others."""


class Monkey:
    """Does faults at random: episodes of one to three at once, and quiet moments between them."""

    def __init__(
        self,
        arena: Arena,
        names: Sequence[str],
        seed: int,
        tick: Callable[[], None] = lambda: None,
        more: Mapping[str, Fault] = MappingProxyType({}),
    ) -> None:
        """`names`: of the faults to do. `tick`: called often while it runs. `more`: faults besides `FAULTS`."""
        self._arena = arena
        self._names = list(names)
        self._faults = {**FAULTS, **more}
        self._chance = random.Random(seed)
        self._tick = tick
        self.schedule: list[dict[str, Any]] = []
        """What was done: name, what it hit, and the seconds at which it began and ended."""
        self.ended_at = 0.0
        """The seconds at which the last fault had ended."""
        self._active: list[tuple[float, ExitStack, dict[str, Any]]] = []

    def run(self, seconds: float) -> None:
        """Faults for so long; all of them have ended when it returns."""
        end = self._arena.seconds() + seconds
        try:
            while self._arena.seconds() < end:
                for _ in range(self._chance.choice((1, 1, 1, 2, 2, 3))):
                    self._begin()
                    self._wait(self._chance.uniform(0.0, 1.5))
                while self._active:
                    self._wait(WATCH_S)
                self._wait(self._chance.uniform(0.3, 2.5))
        finally:
            self._end(everything=True)
            self.ended_at = self._arena.seconds()

    @property
    def now(self) -> str:
        """What is in force."""
        return "; ".join(f"{entry['fault']} {entry['hit']}" for _, _, entry in self._active) or "quiet"

    def _begin(self) -> None:
        """One fault. What the seed gives does not depend on whom it hits."""
        name = self._chance.choices(self._names, [self._faults[name].weight for name in self._names])[0]
        fault = self._faults[name]
        lasts = self._chance.uniform(fault.least_s, fault.most_s)
        chance = random.Random(self._chance.getrandbits(64))
        entry: dict[str, Any] = {"fault": name, "began": round(self._arena.seconds(), 3)}
        stack = ExitStack()
        try:
            entry["hit"] = stack.enter_context(fault.act(self._arena, chance))
        except NotNow:
            return
        entry["in_force"] = round(self._arena.seconds(), 3)
        self.schedule.append(entry)
        self._active.append((self._arena.seconds() + lasts, stack, entry))

    def _wait(self, seconds: float) -> None:
        """Let time pass, and end the faults whose time is over."""
        until = self._arena.seconds() + seconds
        while True:
            self._end()
            self._tick()
            left = until - self._arena.seconds()
            if left <= 0:
                return
            time.sleep(min(left, WATCH_S / 2))

    def _end(self, everything: bool = False) -> None:
        now = self._arena.seconds()
        for fault in list(self._active):
            due, stack, entry = fault
            if everything or due <= now:
                self._active.remove(fault)
                stack.close()
                entry["ended"] = round(self._arena.seconds(), 3)
