"""Nodes that come and go in a simulation, and disks that are lost: what administrators do, at the worst of times.

Each kind is a method of `Churn`, with its weight in `KINDS`. What is asked for may be refused, or its answer lost, as
anything may in a simulation; a node that wants to join asks until it is taken. One disk is lost at a time: the next one
only when the node of the last is a voter again, as Raft promises nothing once a majority of the disks is gone. For the
same reason no other member is taken out before every leader has noticed, and refuses by itself what can't be survived.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Final

from msgspec import UNSET

from raftnode.consensus.membership import Membership
from raftnode.messages import GENESIS, AddPeer, AddPeerAnswer, AnyRequest, RemovePeer, ReplacePeer, TransferLeader
from raftnode.testing.simulated import SimulatedNode
from raftnode.testing.world import World

KINDS: Final[dict[str, float]] = {
    "add_member": 1.0,
    "remove_member": 1.0,
    "replace_member": 1.0,
    "transfer_leader": 1.5,
    "wipe": 1.0,
}
"""How often each kind happens, against the faults."""
_NOTICED: Final = 5
"""Election timeouts after which no leader takes a lost node for alive any more: what it said is three late at the most
(`faults.Faults.slow_link`), and counts for one, on a clock that may be slow."""
_MOST: Final = 8
"""Nodes of one simulation, those that were removed too."""


class Churn:
    """Changes the members of one simulated cluster."""

    def __init__(
        self,
        world: World,
        nodes: dict[str, SimulatedNode],
        new_node: Callable[[str], SimulatedNode],
        election_s: float,
        patience: float,
        chance: random.Random,
    ) -> None:
        """`new_node` makes a node with an empty disk, and puts it into `nodes`. `election_s`: the longest election
        timeout, and the pause before something that was refused is asked for again. `patience`: seconds after which
        what was asked for is certainly not begun any more."""
        self._world = world
        self._nodes = nodes
        self._new_node = new_node
        self._election_s = election_s
        self._patience = patience
        self._chance = chance
        self._lost: str | None = None  # whose disk was lost last
        self._lost_at = 0.0
        self._removals: set[object] = set()  # that were asked for, and may be begun yet

    @property
    def membership(self) -> Membership | None:
        """That of the leader of the highest term; None while nobody leads."""
        leaders = [node for node in self._nodes.values() if node.is_up and node.raft.is_leader]
        return max(leaders, key=lambda node: node.raft.term).raft.membership if leaders else None

    @property
    def is_done(self) -> bool:
        """Nobody waits any more to be taken, or for its vote, or to take the place of another, and all voters know; and
        none of them has lost its disk without that being noticed."""
        members = self.membership
        if members is None or members.learners or members.replaces or not self._is_committed(members):
            return False
        is_missed = any(id not in ("", self._nodes[voter].new_id) for voter, id in members.voters.items())
        return not is_missed and all(node.is_up or not node.is_guest for node in self._nodes.values())

    # --- the kinds ---

    def add_member(self) -> None:
        """A node that was removed comes back, or a new one comes."""
        members = self.membership
        outside = [] if members is None else [name for name in self._nodes if members.node_of(name) is None]
        outside = [name for name in outside if not self._nodes[name].is_uninvited]
        if outside and self._chance.random() < 0.5:
            name = self._chance.choice(outside)
            self._ask(AddPeer(address=name, node=self._nodes[name].new_id))
        elif (guest := self._guest()) is not None:
            self.invite(guest)

    def remove_member(self) -> None:
        """Any member, the leader too; what the cluster would not survive is refused."""
        name = self._member()
        if name is not None and self._may_go(name):
            self._ask_removal(RemovePeer(address=name))

    def replace_member(self) -> None:
        """A new node takes the place of a member."""
        name = self._member()
        if name is not None and self._may_go(name) and (guest := self._guest()) is not None:
            self._ask_removal(ReplacePeer(old=name, new=guest.name, node=guest.new_id))
            self.invite(guest)

    def transfer_leader(self) -> None:
        """Another one is to lead."""
        name = self._member() if self._chance.random() < 0.5 else ""
        self._ask(TransferLeader(to=name or ""))

    def wipe(self) -> None:
        """A disk is lost, and with it the node: another one starts in its place, with an empty directory."""
        members = self.membership
        if members is None or len(members.voters) < 3 or not self._is_whole(members):
            return
        name = self._chance.choice(sorted(members.voters))
        node = self._nodes[name]
        everyone = [other.disk.membership.node_of(name) for other in self._nodes.values() if not other.is_uninvited]
        if "" in everyone or node.is_uninvited:
            return  # who has never met it could not tell the new one from the old
        if self._removals or not all(_survives(known, name) for known in self._memberships()):
            return
        self._lost, self._lost_at = name, self._world.now
        node.wipe()
        self._world.after(self._election_s * self._chance.random(), lambda: self._come_back(node))

    def _come_back(self, node: SimulatedNode) -> None:
        if not node.is_up:
            if node.is_guest:
                self.invite(node)
            else:
                node.start()

    def _is_whole(self, members: Membership) -> bool:
        """The node that lost its disk last is a voter again, and that is committed everywhere where it matters."""
        if self._lost is None:
            return True
        node = self._nodes[self._lost]
        return members.voters.get(self._lost) == node.new_id and self._is_committed(members)

    def _is_committed(self, members: Membership) -> bool:
        """Every voter runs, and knows that this membership is committed."""
        voters = [node for node in self._nodes.values() if node.name in members.voters]
        return all(node.is_up and node.raft.journal.memberships[0].id == members.id for node in voters)

    def _memberships(self) -> list[Membership]:
        """All that are in force anywhere, or may come into force: what is staged may yet be committed."""
        committed, known = GENESIS, list[Membership]()
        for node in self._nodes.values():
            if node.is_up:
                committed = max(committed, node.raft.journal.memberships[0].id)
                known += node.raft.journal.memberships
            elif not node.is_uninvited:
                known.append(node.disk.membership)
        return [members for members in known if members.id >= committed]

    def _may_go(self, name: str) -> bool:
        """No vote of a lost disk is missed, or that is noticed, or it is the one that is to go."""
        if self._lost in (None, name) or self._world.now - self._lost_at > _NOTICED * self._election_s:
            return True
        new_id = self._nodes[self._lost].new_id
        return all(members.voters.get(self._lost) in (None, new_id) for members in self._memberships())

    # --- asking ---

    def invite(self, guest: SimulatedNode) -> None:
        """A node with an empty disk asks to be taken, again and again until it is."""
        if not guest.is_uninvited:
            return

        def take(answer: Any) -> None:
            if isinstance(answer, AddPeerAnswer) and answer.data and guest.is_uninvited and not guest.is_up:
                assert answer.membership is not UNSET, "a success tells the members"
                members = answer.membership
                if members.voters.get(guest.name, members.learners.get(guest.name)) == guest.new_id:
                    told = Membership(
                        term=members.term,
                        commit_id=members.commit_id,
                        voters=members.voters,
                        learners=members.learners,
                        replaces=members.replaces,
                    )
                    assert answer.cluster is not UNSET, "a success tells the cluster"
                    guest.join(answer.cluster, told)

        self._ask(AddPeer(address=guest.name, node=guest.new_id), take)
        self._world.after(self._election_s, lambda: self.invite(guest))

    def _ask(self, message: AnyRequest, take: Callable[[Any], object] = lambda _answer: None) -> None:
        """Ask one of the nodes that run."""
        up = [node for node in self._nodes.values() if node.is_up]
        if up:
            self._world.tell(f"--- asked for: {message}")
            self._chance.choice(up).ask(message, take)

    def _ask_removal(self, message: AnyRequest) -> None:
        """Ask for what will take a member out."""
        removal = object()
        self._removals.add(removal)
        self._ask(message, lambda _answer: self._removals.discard(removal))
        self._world.after(self._patience, lambda: self._removals.discard(removal))

    def _member(self) -> str | None:
        members = self.membership
        return self._chance.choice(members.addresses) if members else None

    def _guest(self) -> SimulatedNode | None:
        """A new node, if there are not too many already."""
        if len(self._nodes) >= _MOST:
            return None
        return self._new_node(f"n{len(self._nodes) + 1}:1")


def _survives(members: Membership, lost: str) -> bool:
    """A majority of the voters keep their disks without that of `lost`; also once those are out who are replaced."""
    kept = members.voters.keys() - {lost}
    after = Membership(voters={voter: "" for voter in members.voters if voter not in members.replaces.values()})
    return members.is_majority(kept) and after.is_majority(kept)
