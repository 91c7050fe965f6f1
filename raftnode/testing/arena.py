"""What there is to be broken in a cluster of processes, and who of it is hit by which fault.

A node belongs to one fault at a time, and so does a road between two of them: faults may overlap, but none undoes
another. While members come and go, the arena also knows who comes, who has been removed, and whose disk was lost; who
is a member it knows from the nodes alone (`roll`).

The promise that nothing is lost holds while a majority of the disks is kept. So at most one disk is lost at a time, and
only when the other voters can commit without it; until the cluster has made up for it (`wound`), nobody else is taken
out.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Final, NamedTuple

from raftnode.config import Settings
from raftnode.messages import Members
from raftnode.testing.judge import Problem
from raftnode.testing.processes import ClusterOfProcesses, NodeProcess
from raftnode.testing.proxy import both_ways
from raftnode.testing.roll import Roll

WATCH_S: Final = 0.1

_LOOK_S: Final = 0.25
_AGAIN_S: Final = 2.0
_NOT_TAKEN: Final = (2, 3, 4)
"""Exit statuses of a node that no member has taken in time, by why not: another node is known at its address, nobody
answered, the outcome is open."""

Road = tuple[str, str]


class NotNow(Exception):
    """A fault can't be done at this moment: what it would hit is hit already, or there is no leader."""


class Wound(NamedTuple):
    """A voter's disk is lost. It is healed once the node with the new disk has the vote."""

    lost: NodeProcess
    """The node whose disk it was."""
    by: NodeProcess
    """Who is to have its vote: the same address with another disk, or another one in its place."""


class Arena:
    """See the module's text."""

    def __init__(self, cluster: ClusterOfProcesses) -> None:
        self.cluster = cluster
        self.proxy = cluster.proxy
        self.began = time.monotonic()
        self.roll = Roll(cluster)
        self.size = len(cluster)
        """How many voters there are, give or take one or two."""
        self.hit_nodes: set[NodeProcess] = set()
        self.hit_roads: set[Road] = set()
        self.down: set[NodeProcess] = set()
        """Nodes that were hit and have not answered since."""
        self.joining: set[NodeProcess] = set()
        """Nodes with an empty disk that have never answered."""
        self.removed: set[NodeProcess] = set()
        """Nodes that were members and are none any more, and go on running."""
        self.wound: Wound | None = None
        self.left: list[str] = []
        """Names of the nodes that were let go, and of those whose disk was lost."""
        self.healthy: list[tuple[float, bool]] = []
        """(seconds, is a majority unharmed): each time when that changed."""
        self.problems: list[Problem] = []
        self._lock = threading.Lock()
        self._were_members: set[NodeProcess] = set()
        self._looked_at = float("-inf")
        self.note_health()

    def seconds(self) -> float:
        return time.monotonic() - self.began

    # --- who is there ---

    @property
    def whole(self) -> list[NodeProcess]:
        """The nodes whose processes no fault has hit."""
        return [node for node in list(self.cluster) if node not in self.hit_nodes]

    @property
    def members(self) -> list[NodeProcess]:
        """The nodes that are members, learners too, by what was seen last."""
        known = self.roll.members
        return [node for node in list(self.cluster) if node.address in known.voters or node.address in known.learners]

    @property
    def voters(self) -> list[NodeProcess]:
        known = self.roll.members
        return [node for node in self.members if node.address in known.voters]

    @property
    def newcomers(self) -> list[NodeProcess]:
        """Nodes that ask to be taken, or have no vote yet."""
        known = self.roll.members
        return [node for node in list(self.cluster) if node in self.joining or node.address in known.learners]

    def at(self, address: str) -> NodeProcess:
        """The node at an address. Raises NotNow."""
        return next((node for node in list(self.cluster) if node.address == address), None) or _not_now()

    def any_node(self, chance: random.Random) -> NodeProcess:
        """A node that is unharmed."""
        return choose(chance, self.whole)

    def any_member(self, chance: random.Random) -> NodeProcess:
        """A member that is unharmed."""
        return choose(chance, [node for node in self.members if node not in self.hit_nodes])

    def leader(self) -> NodeProcess:
        """Who leads, in the highest term that anybody leads in. Raises NotNow."""
        led = {}
        for node in self.whole:
            status = node.status(0.3)
            if status is not None and status["role"] == "leader":
                led[status["term"]] = node
        if not led:
            raise NotNow
        return led[max(led)]

    def others(self, node: NodeProcess) -> list[str]:
        return [other.address for other in list(self.cluster) if other is not node]

    # --- what belongs to a fault ---

    @contextmanager
    def hitting(self, *nodes: NodeProcess) -> Iterator[None]:
        """These processes belong to one fault. Raises NotNow."""
        with self._lock:
            if any(node in self.hit_nodes for node in nodes):
                raise NotNow
            self.hit_nodes.update(nodes)
        self.down.update(nodes)
        self.note_health()
        try:
            yield
        finally:
            self.hit_nodes.difference_update(nodes)

    @contextmanager
    def roads(self, roads: Iterable[Road]) -> Iterator[list[Road]]:
        """These roads belong to one fault, and are open at its end. Raises NotNow."""
        given = list(roads)
        if self.hit_roads.intersection(given):
            raise NotNow
        self.hit_roads.update(given)
        self.note_health()
        try:
            yield given
        finally:
            self.proxy.open(given)
            self.hit_roads.difference_update(given)
            self.note_health()

    # --- members that come and go ---

    def newcomer(self, chance: random.Random) -> NodeProcess:
        """A node with an empty directory, which asks some members to be taken. It is to be started; then it tries until
        it is taken. Raises NotNow when there are enough."""
        if not self.voters or not self.cluster.spares or len(self.members) + len(self.joining) > self.size + 1:
            raise NotNow
        asked = chance.sample(self.voters, min(len(self.voters), chance.randint(1, 3)))
        node = self.cluster.newcomer(*asked)
        self.joining.add(node)
        self.roll.note("join", {"address": node.address})
        return node

    def may_shrink(self, by: int = 1) -> None:
        """Raises NotNow unless so many voters may be taken out: enough are left, and no disk has to be made up for."""
        if self.wound or not self.roll.is_quiet("remove", "replace") or len(self.voters) - by < max(2, self.size - 1):
            raise NotNow

    def may_lose(self, node: NodeProcess) -> None:
        """Raises NotNow unless the disk of this node may be lost: all voters are well, agree on the membership and
        have nothing to do about it."""
        known = self.roll.members
        agree = [self._agrees(voter, known) for voter in self.voters]
        if (
            self.wound
            or self.joining
            or known.learners
            or known.replaces
            or not self.roll.is_quiet()
            or len(known.voters) < 3
            or len(agree) < len(known.voters)
            or not all(agree)
            or node not in self.voters
        ):
            raise NotNow

    def _agrees(self, voter: NodeProcess, known: Members) -> bool:
        status = None if voter in self.down else voter.status(0.3)
        if status is None or status["membership"]["commit_id"] != known.commit_id:
            return False
        in_force = {address for address, member in status["members"].items() if member["voter"]}
        return in_force == known.voters.keys() and status["node"] == known.voters[voter.address]

    def exchange_disk(self, node: NodeProcess) -> None:
        """The disk of a node is lost. It is to be started again with an empty one."""
        self.left.append(node.exchange_disk())
        self.roll.note("wipe", {"address": node.address})
        self._were_members.discard(node)
        if node.join:
            node.join = [other.address for other in self.voters if other is not node]
            self.joining.add(node)

    def let_go(self, node: NodeProcess) -> None:
        """This node, which has ended, never comes back; `cluster.reuse` makes its address free."""
        self.left.append(node.name)
        for nodes in (self.joining, self.removed, self.down, self._were_members):
            nodes.discard(node)
        self.cluster.let_go(node)

    # --- watching ---

    def note_problem(self, kind: str, where: str, words: str) -> None:
        self.problems.append(Problem(kind, where, words))

    def note_health(self) -> None:
        """Note it when a majority that no fault touches has come or gone."""
        lost = self.wound.by if self.wound else None  # it answers long before it has the vote of the lost disk
        sound = [node.address for node in self.voters if node not in self.down and node is not lost]
        majority = len(self.roll.members.voters) // 2 + 1
        is_healthy = any(
            not self.hit_roads.intersection(both_ways(some, some)) for some in itertools.combinations(sound, majority)
        )
        if not self.healthy or self.healthy[-1][1] is not is_healthy:
            self.healthy.append((self.seconds(), is_healthy))

    def watch(self, stopping: threading.Event) -> None:
        """See which nodes answer again, and that none ends by itself; and who is a member."""
        ended: set[NodeProcess] = set()
        while not stopping.wait(WATCH_S):
            for node in self.whole:
                has_ended = node.was_started and not node.is_running
                if has_ended and node not in self.hit_nodes | ended and node in list(self.cluster):
                    self._note_end(node, ended)
                elif node in self.down and node.status(0.5) is not None and node not in self.hit_nodes:
                    self.down.discard(node)
                    self.note_health()
            if self.seconds() - self._looked_at > _LOOK_S:
                self._looked_at = self.seconds()
                self._look()

    def _note_end(self, node: NodeProcess, ended: set[NodeProcess]) -> None:
        """A node has ended by itself. One that nobody takes does: whoever supervises it starts it again."""
        if node in self.joining and node.await_exit() in _NOT_TAKEN:
            with suppress(NotNow), self.hitting(node):
                node.start()
        else:
            ended.add(node)
            self.problems.append(Problem("ended", node.name, f"the process ended by itself: {node}"))

    def _look(self) -> None:
        """Who has come and gone since the last look."""
        self.roll.look()
        self.joining -= {node for node in list(self.joining) if node.name in self.roll.answered}
        members = set(self.members)
        self.removed |= self._were_members - members
        self.removed -= members
        self._were_members |= members
        self._tend_wound()
        self._take_out_learners_without_node()
        self.note_health()

    def _tend_wound(self) -> None:
        """A vote that was lost with its disk: nothing is left to be done, or ask again."""
        if (wound := self.wound) is None:
            return
        known, status = self.roll.members, self.roll.statuses.get(wound.by)
        is_new = wound.by.name in self.roll.answered  # else the answer is that of the lost disk
        is_voter = is_new and status is not None and known.voters.get(wound.by.address) == status["node"]
        is_other = wound.lost is not wound.by
        is_gone = not is_other or wound.lost.address not in {**known.voters, **known.learners}
        if is_voter and is_gone:
            self.wound = None
            if is_other:
                self.cluster.reuse(wound.lost)
        elif not is_gone and wound.by.address not in known.replaces and self.roll.is_idle(_AGAIN_S):
            request = {"type": "replace_peer", "old": wound.lost.address, "new": wound.by.address}
            for node in [node for node in self.voters if node in self.roll.statuses][:1]:
                self.roll.ask("replace", request, node)

    def _take_out_learners_without_node(self) -> None:
        """A newcomer that was let go may have been taken nevertheless: it asked before."""
        known = {node.address for node in list(self.cluster)}
        for address in sorted(self.roll.members.learners.keys() - known):
            live = [node for node in self.voters if node in self.roll.statuses]
            if live and self.roll.is_idle(_AGAIN_S):
                self.roll.ask("remove", {"type": "remove_peer", "address": address}, live[0])

    @property
    def is_settled(self) -> bool:
        """Every change has come to its end: all members vote, all are here, and all know it."""
        known = self.roll.members
        here = {node.address: status for node, status in self.roll.statuses.items()}
        return (
            not (known.learners or known.replaces or self.joining or self.wound)
            and known.voters.keys() <= here.keys()
            and all(here[voter]["node"] == node for voter, node in known.voters.items())
            and all(here[voter]["membership"]["commit_id"] == known.commit_id for voter in known.voters)
        )


def choose(chance: random.Random, nodes: Sequence[NodeProcess]) -> NodeProcess:
    """One of them. Raises NotNow when there is none."""
    return chance.choice(nodes) if nodes else _not_now()


def _not_now() -> NodeProcess:
    raise NotNow


# --- what a fault is ------------------------------------------------------------------------------------------

Act = Callable[[Arena, random.Random], AbstractContextManager[str]]


class Fault(NamedTuple):
    """One kind of fault: entered when it begins, left when it ends; what it yields says whom it hits."""

    act: Act
    least_s: float
    most_s: float
    weight: int = 2


def log_limits(seed: int) -> dict[str, str]:
    """How long the logs of a run are, and how fast a snapshot goes: from a log of one entry and a snapshot that takes
    many seconds to about as they are by default. As the environment of the nodes."""
    chance = random.Random(f"limits {seed}")
    return {
        "RAFTNODE_LOG_ENTRIES": str(chance.choice((1, 5, 20, 100, 1000))),
        "RAFTNODE_LOG_BYTES": str(chance.choice((8000, 40_000, Settings().log_bytes))),
        "RAFTNODE_SNAPSHOT_CHUNK_BYTES": str(chance.choice((1, 500, 5000, 50_000))),
        "RAFTNODE_SNAPSHOT_BYTES_PER_S": str(chance.choice((20_000, 50_000, 200_000))),
    }
