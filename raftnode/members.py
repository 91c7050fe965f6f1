"""Changes of the members, as the driver makes them (layer 3). What a change may be is in `consensus.changes`.

On the leader: the requests `add_peer`, `remove_peer`, `replace_peer` and `transfer_leader`, answered once they are
committed; and what it does of its own: a learner that has caught up becomes a voter, who has been replaced goes, and a
member that came back with an empty disk (another node id, while the old one is silent) is taken as a learner. Every
such step is one entry, and the next begins when it is committed. A leader that follows finds all it needs in the
membership, so nothing stops half-way when one dies.

Neither ping nor who answers has a part in this: they decide nothing about the members.
"""

from __future__ import annotations

from typing import Any

import msgspec

from raftnode.config import canonical_address
from raftnode.consensus.changes import ChangeRefused, added, readmitted, removed, replaced
from raftnode.consensus.raft import Raft
from raftnode.errors import ConfigError
from raftnode.handshake import Handshake
from raftnode.mailbox import Arrival
from raftnode.messages import (
    AddPeer,
    AddPeerAnswer,
    ChangeAnswer,
    Members,
    MembersCommand,
    RemovePeer,
    RemovePeerAnswer,
    ReplacePeer,
    ReplacePeerAnswer,
    TransferLeader,
    TransferLeaderAnswer,
)
from raftnode.requests import STOPPING, Requests
from raftnode.store import Store


class MemberChanges:
    """Who asks for changes, and the steps that a leader makes of its own.

    Invariant: each arrival is answered once; those that wait for a commit are kept by `Requests`.
    """

    def __init__(self, me: str, raft: Raft, store: Store, requests: Requests, handshake: Handshake, log: Any) -> None:
        self._me = me
        self._raft = raft
        self._store = store
        self._requests = requests
        self._handshake = handshake
        self._log = log
        self._transfers: list[Arrival] = []
        requests.carry_out_change = self._take
        requests.answer_to_change = self._answer_to

    @property
    def count(self) -> int:
        """How many wait for a new leader."""
        return len(self._transfers)

    # --- what is asked for ---

    def _take(self, arrival: Arrival) -> None:
        """A change of the members, or of the leader, asked of this leader."""
        message = arrival.message
        try:
            if isinstance(message, TransferLeader):
                self._transfer(arrival, message)
            else:
                self._change(arrival)
        except ChangeRefused as refusal:
            arrival.refuse(refusal.code, str(refusal))
        except ConfigError as error:
            arrival.refuse("bad_request", str(error))

    def _change(self, arrival: Arrival) -> None:
        raft, message = self._raft, arrival.message
        self._raft.check_may_change()
        command: MembersCommand | None
        force = False
        match message:
            case AddPeer():
                command = self._added(message)
            case RemovePeer():
                command, force = removed(raft.membership, canonical_address(message.address)), message.force
            case _:
                assert isinstance(message, ReplacePeer), "these are the changes that there are"
                old, new = canonical_address(message.old), canonical_address(message.new)
                command = replaced(raft.membership, old, new, message.node)
        if command is None:
            arrival.answer(self._answer_to(arrival, raft.membership.commit_id))
        else:
            self._requests.await_commit(self._append(command, f"{arrival.origin.client} asked", force), arrival)

    def _added(self, message: AddPeer) -> MembersCommand | None:
        if message.cluster and message.cluster != self._store.cluster_id:
            raise ChangeRefused(
                "wrong_cluster",
                f"{message.address} holds data of cluster {message.cluster}, and this is cluster "
                f"{self._store.cluster_id}: to join, a node begins with an empty directory",
            )
        address = canonical_address(message.address)
        return added(self._raft.membership, address, message.node, self._raft.is_silent(address))

    def _append(self, command: MembersCommand, why: str, force: bool = False) -> int:
        commit_id = self._raft.change(command, force)
        facts = {"voters": list(command.voters), "learners": list(command.learners), "replaces": command.replaces}
        self._log.info("members_change", commit_id=commit_id, why=why, **facts)
        return commit_id

    def _answer_to(self, arrival: Arrival, commit_id: int) -> ChangeAnswer:
        """What to answer when entry `commit_id`, which made the change, is committed."""
        membership = msgspec.convert(self.committed(), Members)  # not the one in force: a next change may be appended
        kinds = {AddPeer: AddPeerAnswer, RemovePeer: RemovePeerAnswer, ReplacePeer: ReplacePeerAnswer}
        kind = kinds[type(arrival.message)]
        return kind(data=True, commit_id=commit_id, cluster=str(self._store.cluster_id), membership=membership)

    def committed(self) -> dict[str, Any]:
        """The newest membership that is committed, as far as this node knows. The first one is, whatever the log has:
        a node that has joined begins with it."""
        first, *rest = self._raft.journal.memberships
        return msgspec.structs.asdict([first, *(m for m in rest if m.commit_id <= self._raft.commit_id)][-1])

    # --- handing over ---

    def _transfer(self, arrival: Arrival, message: TransferLeader) -> None:
        to = canonical_address(message.to) if message.to else None
        if to == self._me:
            arrival.answer(TransferLeaderAnswer(data=True, leader=self._me))
            return
        self._raft.hand_over(to)
        self._transfers.append(arrival)

    def settle(self, now: float) -> None:
        """Answer those who wait for another leader, once there is one or this one goes on."""
        if not self._transfers or self._raft.is_handing_over:
            return
        leader = self._raft.leader
        for arrival in list(self._transfers):
            if leader not in (None, self._me):
                arrival.answer(TransferLeaderAnswer(data=True, leader=leader or ""))
            elif leader == self._me:
                arrival.refuse("not_transferred", f"the new leader did not take over in time; {self._me} goes on")
            elif arrival.deadline <= now:
                arrival.refuse("not_transferred", "it is not known yet who leads")
            else:
                continue
            self._transfers.remove(arrival)

    # --- what the leader does of its own ---

    def step(self) -> None:
        """The next step of a change, when its time has come; said after all letters of a turn were taken, so that no
        answer of a node that was a member before is taken for that of the node which takes its place."""
        returned = self._handshake.take_returned()
        if not self._raft.is_leader:
            return
        for address, node in returned.items():
            self._readmit(address, node)
        if (command := self._raft.next_change()) is not None:
            self._append(command, "a learner has caught up" if len(command.voters) > self._voters else "replaced")

    @property
    def _voters(self) -> int:
        return len(self._raft.membership.voters)

    def _readmit(self, address: str, node: str) -> None:
        """A member is back with an empty disk. It tries again and again: what is not possible now may be then."""
        members = self._raft.membership
        if members.node_of(address) in (None, "", node) or not self._raft.is_silent(address):
            return
        try:
            self._raft.check_may_change()
            self._append(readmitted(members, address, node), f"{address} has lost its disk: it is node {node} now")
        except ChangeRefused as refusal:
            self._log.info("not_readmitted", peer=address, node=node, why=str(refusal))

    def end(self) -> None:
        """There are no more turns."""
        for arrival in self._transfers:
            arrival.refuse("shutting_down", STOPPING)
        self._transfers.clear()
