"""Who the members are, and what a majority of them has reached.

A majority is counted over the members, never over who happens to answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import TypeVar

import msgspec
from msgspec import Struct

from raftnode.messages import EntryId, MembersCommand

N = TypeVar("N", int, float)


def cluster_id(addresses: Collection[str]) -> str:
    """The id of the cluster founded by these members: nodes that were given other sets refuse each other by it."""
    return hashlib.sha256(",".join(sorted(set(addresses))).encode()).hexdigest()[:16]


class Membership(Struct, frozen=True, kw_only=True):
    """The members as of one entry of the log. Keys are addresses, values node ids ("" until the node was met).

    Invariants: there is at least one voter; nobody is both voter and learner.
    """

    term: int = 0
    commit_id: int = 0
    """The entry that made it so, with its term; 0 for the founding set."""
    voters: dict[str, str]
    learners: dict[str, str] = {}
    replaces: dict[str, str] = {}
    """New member -> the one whose place it takes: that one leaves when the new one votes."""

    def __post_init__(self) -> None:
        assert self.voters, "a cluster has at least one voter"
        assert not self.voters.keys() & self.learners.keys(), "nobody is both voter and learner"

    @classmethod
    def founding(cls, addresses: Collection[str]) -> Membership:
        """The first membership: the sorted set of the addresses that a node was started with."""
        return cls(voters=dict.fromkeys(sorted(set(addresses)), ""))

    @classmethod
    def of(cls, id: EntryId, command: MembersCommand) -> Membership:
        """What an entry of the log makes."""
        return cls(
            term=id.term,
            commit_id=id.commit_id,
            voters=command.voters,
            learners=command.learners,
            replaces=command.replaces,
        )

    @property
    def id(self) -> EntryId:
        """The entry that made it so. Of two memberships that members have, the one with the greater id is the newer
        (terms never fall along a log); what is newer here was not committed and cut elsewhere, or will be known there.
        """
        return EntryId(self.term, self.commit_id)

    @property
    def addresses(self) -> tuple[str, ...]:
        """All members, sorted."""
        return tuple(sorted((*self.voters, *self.learners)))

    @property
    def majority(self) -> int:
        """How many voters make a majority."""
        return len(self.voters) // 2 + 1

    def node_of(self, address: str) -> str | None:
        """The node id known for an address; "" while unknown, None when it is no member's."""
        return self.voters.get(address, self.learners.get(address))

    def bind(self, address: str, node: str) -> Membership:
        """With the node id of a member written down. It is never overwritten: another id is another node."""
        assert self.node_of(address) == "", f"{address} is bound to {self.node_of(address)}, not free for {node}"
        return self.with_node(address, node)

    def with_node(self, address: str, node: str) -> Membership:
        """With another node id written down for a member."""
        if address in self.voters:
            return msgspec.structs.replace(self, voters={**self.voters, address: node})
        return msgspec.structs.replace(self, learners={**self.learners, address: node})

    def knowing(self, known: Membership) -> Membership:
        """With the node ids that this one lacks and `known`, the membership before it, has: whoever appended it had not
        met those members yet."""
        found = self
        for address in self.addresses:
            if self.node_of(address) == "" and (node := known.node_of(address)):
                found = found.with_node(address, node)
        return found

    def is_majority(self, who: Collection[str]) -> bool:
        """True when a majority of the voters is among `who`."""
        return len(self.voters.keys() & set(who)) >= self.majority

    def agreed(self, reached: Mapping[str, N]) -> N:
        """The highest number that a majority of the voters has reached; one that is missing counts as 0."""
        numbers = sorted([reached.get(voter, 0) for voter in self.voters])
        return numbers[-self.majority]
