"""Recovery after the majority is lost: a new cluster, founded on what one stopped node still has. Layer 5.

A cluster that has lost the directories of a majority of its voters never commits again, and that is right: what the
lost ones had acknowledged is not known here. Somebody has to decide to go on without it. `plan` tells what that means,
`recover` does it, in one transaction:

* the cluster gets a new id. Members of the old one, and copies of this very directory, are refused by it from then on,
  whatever they hold: two histories never mix;
* the log stays as it is, and gets one entry more: the membership, with this node as the only voter. So it is in force
  from then on (thesis 4.1), and who joins later finds in the log what happened. The entry is of a new term, in which
  this node has voted for itself;
* what was staged becomes committed with that entry, when the node starts. That is the safer of the two: of a staged
  entry nobody can tell whether it was acknowledged;
* what this node remembers of the old members' promises is forgotten: it will not meet them again.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from raftnode.comparison import Touched, compare, touched
from raftnode.config import Settings
from raftnode.errors import StoreDamaged, StoreError, StoreForeign
from raftnode.inspection import Directory
from raftnode.messages import EntryId, MembersCommand
from raftnode.store import Store
from raftnode.survey import survey


class Plan(Struct, frozen=True, kw_only=True):
    """What a recovery of a directory would mean."""

    directory: Path
    node: str
    address: str
    cluster: str
    """The old cluster's id."""
    voters: list[str]
    """Of the old cluster."""
    last: EntryId
    """The end of the log: all up to here is kept."""
    committed: int
    """Committed for certain up to here."""
    staged: list[Touched]
    """The keys that entries after `committed` change: whether these were acknowledged is not known."""
    missing: list[str]
    """Entries, in words, that this node knows to have been, and does not have."""


def plan(directory: Path, settings: Settings | None = None) -> Plan:
    """Look at a stopped node's directory. Raises StoreError when it can't be read, or is damaged; when it was never
    founded; when it is a cluster of one already."""
    map_bytes = (settings or Settings()).map_bytes
    found = survey(directory, map_bytes, lambda _: None)
    if not found.is_readable:
        raise (StoreDamaged if found.is_damaged else StoreForeign)(found.failure)
    facts = found.known
    if facts.cluster is None or facts.node is None or facts.address is None or not facts.memberships:
        raise StoreForeign(f"{directory} holds a node that never was in a cluster: there is nothing to recover")
    if not found.is_whole:
        raise StoreDamaged(f"{directory} is damaged: run `raftnode repair {directory}` first")
    voters = sorted(facts.memberships[-1].voters)
    if voters == [facts.address]:
        raise StoreForeign(f"{directory} is of a cluster in which {facts.address} is the only voter: just start it")
    verdict = compare([found])
    with Directory(directory, map_bytes) as opened:
        staged = list(touched(opened, verdict.certain + 1, found.last).values())
    return Plan(
        directory=directory,
        node=facts.node,
        address=facts.address,
        cluster=facts.cluster,
        voters=voters,
        last=found.newest,
        committed=verdict.certain,
        staged=staged,
        missing=[f"entry {lost.id.commit_id} of term {lost.id.term}: {lost.words}" for lost in verdict.elsewhere],
    )


def recover(agreed: Plan, learners: Sequence[str] = (), settings: Settings | None = None) -> str:
    """Carry out a plan that somebody has agreed to; returns the new cluster's id. `learners`: addresses of further
    members, who start with empty directories; each becomes a voter once it has caught up.

    Raises StoreError when the directory is in use, or is no more as it was when the plan was made.
    """
    store = Store("database", agreed.directory, settings=settings)
    try:
        if (store.node_id, store.cluster_id, store.journal.last.id) != (agreed.node, agreed.cluster, agreed.last):
            raise StoreError(f"{agreed.directory} has changed meanwhile: look at the plan again")
        others = dict.fromkeys(sorted(set(learners) - {agreed.address}), "")
        members = MembersCommand(voters={agreed.address: agreed.node}, learners=others)
        cluster = secrets.token_hex(8)
        store.found_anew(cluster, members, int(time.time() * 1000))
    finally:
        store.close()
    return cluster
