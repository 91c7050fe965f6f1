"""Members that come and go, as events of a chaos run: the table `TURNOVER`, beside the faults of `chaos.FAULTS`.

An event asks for a change, and goes on without waiting for it; often the leader or the newcomer is killed or cut off a
moment later (`_meddling`), and other faults may be in force as well. A request may be refused or get no answer: what
has become of it is seen in the membership (`roll`). What a disk that is lost asks for is in `arena`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any, Final

from raftnode.testing import chaos
from raftnode.testing.arena import Arena, Fault, NotNow, Wound, choose
from raftnode.testing.processes import NodeProcess, NotReached
from raftnode.testing.proxy import both_ways

Way = tuple[str, Callable[[], AbstractContextManager[str]]]

# --- coming ---------------------------------------------------------------------------------------------------


@contextmanager
def add(arena: Arena, chance: random.Random) -> Iterator[str]:
    """A node with an empty directory asks to be taken."""
    node = arena.newcomer(chance).start()
    with _meddling(arena, chance, node) as words:
        yield f"{node.name}{words}"


@contextmanager
def add_two(arena: Arena, chance: random.Random) -> Iterator[str]:
    """Two at once, through different members."""
    first = arena.newcomer(chance)
    try:
        second = arena.newcomer(chance)
    finally:
        first.start()  # one is as many as there may be
    second.start()
    with _meddling(arena, chance, first) as words:
        yield f"{first.name} and {second.name}{words}"


def take_back(arena: Arena, chance: random.Random) -> AbstractContextManager[str]:
    """A node that was removed and goes on running is added again, with the disk that it has."""
    node = choose(chance, sorted(arena.removed - arena.hit_nodes, key=str))
    status = node.status(0.3)
    if status is None or len(arena.members) > arena.size + 1:
        raise NotNow
    _ask(arena, chance, "add", type="add_peer", address=node.address, node=status["node"])
    return _meddling_named(arena, chance, node, node.name)


# --- going ----------------------------------------------------------------------------------------------------


def remove(arena: Arena, chance: random.Random) -> AbstractContextManager[str]:
    """A member is taken out, often the leader. It goes on running."""
    arena.may_shrink()
    node = arena.leader() if chance.random() < 0.4 else arena.any_member(chance)
    _ask(arena, chance, "remove", type="remove_peer", address=node.address)
    return _meddling_named(arena, chance, None, node.name)


@contextmanager
def remove_absent(arena: Arena, chance: random.Random) -> Iterator[str]:
    """A member is taken out while it is dead, stopped or cut off, and comes back later."""
    arena.may_shrink()
    node = arena.any_member(chance)
    ways: list[Way] = [
        ("killed", lambda: chaos.kill_nodes(arena, [node])),
        ("stopped", lambda: chaos.stop_node(arena, node)),
        ("cut off", lambda: chaos.cut_roads(arena, both_ways([node.address], arena.others(node)), "")),
    ]
    way, away = chance.choice(ways)
    with away():
        time.sleep(chance.choice((0.0, 1.0)))  # the leader misses it, or does not yet
        via = choose(chance, [other for other in arena.voters if other not in arena.hit_nodes and other is not node])
        arena.roll.ask("remove", {"type": "remove_peer", "address": node.address}, via)
        yield f"{node.name}, {way}"


@contextmanager
def retire(arena: Arena, chance: random.Random) -> Iterator[str]:
    """A node that was removed is stopped for good, and its address is free again."""
    node = choose(chance, sorted(arena.removed - arena.hit_nodes, key=str))
    if not arena.roll.is_quiet("add"):
        raise NotNow
    with arena.hitting(node):
        if chance.random() < 0.5:
            _terminate(arena, node)
        node.kill()
        arena.let_go(node)
        arena.cluster.reuse(node)
    yield node.name


def _terminate(arena: Arena, node: NodeProcess) -> None:
    try:
        if status := node.terminate():
            arena.note_problem("bad_exit", node.name, f"SIGTERM: the node, which was removed, ended with {status}")
    except NotReached as failure:
        arena.note_problem("bad_exit", node.name, str(failure))


# --- one for another ------------------------------------------------------------------------------------------


@contextmanager
def replace(arena: Arena, chance: random.Random) -> Iterator[str]:
    """A member that lives makes room for a newcomer, which is started before or after."""
    arena.may_shrink()
    old = arena.leader() if chance.random() < 0.3 else arena.any_member(chance)
    via, new = arena.any_member(chance), arena.newcomer(chance)
    if is_started := chance.random() < 0.5:
        new.start()
    arena.roll.ask("replace", {"type": "replace_peer", "old": old.address, "new": new.address}, via)
    if not is_started:
        new.start()
    with _meddling(arena, chance, new) as words:
        yield f"{old.name} by {new.name}{words}"


@contextmanager
def replace_lost(arena: Arena, chance: random.Random) -> Iterator[str]:
    """A member dies, and its disk with it; a newcomer takes its place."""
    old = arena.any_member(chance)
    arena.may_lose(old)
    with arena.hitting(old):
        via = choose(chance, [node for node in arena.voters if node not in arena.hit_nodes])
        new = arena.newcomer(chance)
        new.join = [node.address for node in arena.voters if node is not old]
        old.kill()
        arena.let_go(old)
        arena.wound = Wound(old, new)
        arena.roll.ask("replace", {"type": "replace_peer", "old": old.address, "new": new.address}, via)
        new.start()
    with _meddling(arena, chance, new) as words:
        yield f"{old.name} by {new.name}{words}"


@contextmanager
def wipe(arena: Arena, chance: random.Random) -> Iterator[str]:
    """A voter dies, its disk is lost, and the same command starts it again."""
    node = arena.any_member(chance)
    arena.may_lose(node)
    with arena.hitting(node):
        name = node.name
        arena.exchange_disk(node)
        arena.wound = Wound(node, node)
        time.sleep(chance.choice((0.0, 0.0, 0.5, 2.0)))
        node.start()
    with _meddling(arena, chance, node) as words:
        yield f"{name}, now {node.name}{words}"


# --- who leads, and changes that meet -------------------------------------------------------------------------


def transfer(arena: Arena, chance: random.Random) -> AbstractContextManager[str]:
    """The leader is asked to hand over, to one that is named or to anybody."""
    to = arena.any_member(chance) if chance.random() < 0.5 else None
    _ask(arena, chance, "transfer", type="transfer_leader", **({"to": to.address} if to else {}))
    return nullcontext(to.name if to else "to anybody")


@contextmanager
def two_changes(arena: Arena, chance: random.Random) -> Iterator[str]:
    """Two changes are asked for at once, through different nodes."""
    arena.may_shrink(by=2)
    first, second = chance.sample(arena.members, 2)
    ways = [node for node in arena.voters if node not in arena.hit_nodes]
    if len(ways) < 2:
        raise NotNow
    new = arena.newcomer(chance)
    requests: list[tuple[str, dict[str, Any]]] = [
        ("remove", {"type": "remove_peer", "address": first.address}),
        chance.choice(
            [
                ("remove", {"type": "remove_peer", "address": second.address}),
                ("transfer", {"type": "transfer_leader", "to": first.address}),
                ("replace", {"type": "replace_peer", "old": first.address, "new": new.address}),
                ("replace", {"type": "replace_peer", "old": second.address, "new": new.address}),
            ]
        ),
    ]
    for (kind, message), via in zip(requests, chance.sample(ways, 2), strict=True):
        arena.roll.ask(kind, message, via)
    new.start()
    with _meddling(arena, chance, new) as words:
        yield f"{', '.join(kind for kind, _ in requests)}, {new.name}{words}"


# --- who is about to come -------------------------------------------------------------------------------------


def kill_newcomer(arena: Arena, chance: random.Random) -> AbstractContextManager[str]:
    """kill -9 of a node that has no vote yet."""
    return chaos.kill_nodes(arena, [_newcomer(arena, chance)])


def cut_newcomer(arena: Arena, chance: random.Random) -> AbstractContextManager[str]:
    """A node that has no vote yet, from all others or from the leader alone."""
    node = _newcomer(arena, chance)
    others = arena.others(node) if chance.random() < 0.5 else [arena.leader().address]
    return chaos.cut_roads(arena, both_ways([node.address], set(others) - {node.address}), node.name)


def _newcomer(arena: Arena, chance: random.Random) -> NodeProcess:
    return choose(chance, [node for node in arena.newcomers if node not in arena.hit_nodes])


@contextmanager
def break_snapshot(arena: Arena, chance: random.Random) -> Iterator[str]:
    """While a snapshot is sent: the sender or the receiver is killed or stopped, or the link between them is cut."""
    sender = arena.leader()
    sending = (sender.status(0.3) or {}).get("snapshots") or {}
    receivers = [node for node in arena.whole if node.address in sending]
    receiver = choose(chance, receivers)
    roads = both_ways([sender.address], [receiver.address])
    ways: list[Way] = [
        ("the receiver killed", lambda: chaos.kill_nodes(arena, [receiver])),
        ("the receiver killed", lambda: chaos.kill_nodes(arena, [receiver])),
        ("the sender killed", lambda: chaos.kill_nodes(arena, [sender])),
        ("the receiver stopped", lambda: chaos.stop_node(arena, receiver)),
        ("cut", lambda: chaos.cut_roads(arena, roads, "")),
        ("cut one way", lambda: chaos.cut_roads(arena, roads[:1], "")),
    ]
    way, act = chance.choice(ways)
    with act():
        yield f"from {sender.name} to {receiver.name}: {way}"


# --- what they share ------------------------------------------------------------------------------------------


def _ask(arena: Arena, chance: random.Random, kind: str, **message: Any) -> None:
    """Ask for a change at any member that is well."""
    arena.roll.ask(kind, message, arena.any_member(chance))


@contextmanager
def _meddling(arena: Arena, chance: random.Random, newcomer: NodeProcess | None) -> Iterator[str]:
    """Often, within a moment, the leader or the newcomer is killed or cut off, for as long as the event lasts."""
    kinds: list[Way] = [
        ("kill-leader", lambda: chaos.kill_leader(arena, chance)),
        ("stop-leader", lambda: chaos.stop_leader(arena, chance)),
        ("isolate-leader", lambda: chaos.isolate_leader(arena, chance)),
        ("refuse-leader", lambda: chaos.refuse_leader(arena, chance)),
    ]
    if newcomer is not None:
        roads = both_ways([newcomer.address], arena.others(newcomer))
        kinds += [
            ("kill-newcomer", lambda: chaos.kill_nodes(arena, [newcomer])),
            ("kill-newcomer", lambda: chaos.kill_nodes(arena, [newcomer])),
            ("cut-newcomer", lambda: chaos.cut_roads(arena, roads, newcomer.name)),
        ]
    words = ""
    with ExitStack() as stack:
        if chance.random() < 0.6:
            time.sleep(chance.uniform(0.0, 1.5))
            name, act = chance.choice(kinds)
            with suppress(NotNow):
                words = f", and {name} {stack.enter_context(act())}"
        yield words


@contextmanager
def _meddling_named(arena: Arena, chance: random.Random, newcomer: NodeProcess | None, name: str) -> Iterator[str]:
    with _meddling(arena, chance, newcomer) as words:
        yield name + words


TURNOVER: Final = {
    "add": Fault(add, 0.5, 4.0, 8),
    "add-two": Fault(add_two, 0.5, 4.0, 3),
    "take-back": Fault(take_back, 0.5, 4.0, 5),
    "remove": Fault(remove, 0.5, 4.0, 10),
    "remove-absent": Fault(remove_absent, 1.0, 5.0, 7),
    "retire": Fault(retire, 0.0, 0.0, 6),
    "replace": Fault(replace, 0.5, 4.0, 8),
    "replace-lost": Fault(replace_lost, 0.5, 4.0, 9),
    "wipe": Fault(wipe, 0.5, 4.0, 12),
    "transfer": Fault(transfer, 0.0, 0.0, 6),
    "two-changes": Fault(two_changes, 0.5, 4.0, 8),
    "kill-newcomer": Fault(kill_newcomer, 0.0, 3.0, 4),
    "cut-newcomer": Fault(cut_newcomer, 0.5, 4.0, 4),
    "break-snapshot": Fault(break_snapshot, 0.2, 3.0, 9),
}
"""Every event with members that a run may bring about."""
