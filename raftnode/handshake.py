"""Who is at the other end: the hello between members (rule 9). Part of the driver (layer 3).

Every link begins with cluster id, node id, address and protocol version, and each side checks the other's. Members are
known by address *and* node id: a node that lost its disk comes back with another id and is not taken for the old voter,
whose promises it has forgotten. An id met for the first time is written down before anything is exchanged with it.

Each side also reminds the other of what it has promised (`consensus.witness` has the argument). A node whose directory
was put back from an old copy learns so that it has forgotten, and from then on takes part in nothing: it refuses every
hello as `old_copy`, uses no link, and answers no request of a member.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from msgspec import UNSET, UnsetType

from raftnode.consensus.raft import Raft
from raftnode.consensus.witness import Witness
from raftnode.mailbox import Arrival, Cut, Greeting, LinkEnd, MemberEnd
from raftnode.messages import GENESIS, PROTOCOL_VERSION, Hello, HelloAnswer, Reminder, VoteRequest
from raftnode.store import Store
from raftnode.transport import Transport

_REMEMBERED: Final = 32
"""So many refused addresses are remembered."""


class Handshake:
    """Greets and refuses other nodes."""

    def __init__(self, me: str, raft: Raft, store: Store, transport: Transport, log: Any) -> None:
        self._me = me
        self._raft = raft
        self._store = store
        self._transport = transport
        self._log = log
        self._refusals: dict[str, str] = {}  # by address: what was said last
        self._strangers = 0
        self._welcomes: list[Callable[[], None]] = []
        self._links: dict[str, LinkEnd] = {}  # ours, by member, that were admitted
        self._links_to_us: dict[str, MemberEnd] = {}  # the newest of each member
        self._is_aside = False  # this node has forgotten, and that was said and written down
        transport.reminder_for = self._reminder_for
        if raft.has_forgotten:
            self._stand_aside()

    @property
    def needs_write(self) -> bool:
        """True when something was learned that must be on disk before it is acted on: a node id, or that this node has
        forgotten what it promised."""
        return bool(self._welcomes) or (self._raft.has_forgotten and not self._is_aside)

    def finish(self) -> None:
        """What was learned is on disk: answer."""
        if self._raft.has_forgotten and not self._is_aside:
            self._stand_aside()
        welcomes, self._welcomes = self._welcomes, []
        for welcome in welcomes:
            welcome()

    def on_hello(self, arrival: Arrival) -> None:
        """Another member, or a stranger, opens a link to us (rule 9)."""
        hello, connection = arrival.message, arrival.origin
        assert isinstance(hello, Hello)
        if not isinstance(connection, MemberEnd):
            arrival.refuse("bad_request", "hello begins a connection between members")
            return
        problem = self._problem_with(hello.cluster, hello.node, hello.address, hello.protocol)
        problem = problem or self._forgotten(hello.reminder)
        if problem is not None:
            self.note_refusal(hello.address, *problem)
            arrival.refuse(*problem)
            connection.close_after_answer()
            return

        def welcome() -> None:
            if hello.link:
                self._transport.replace_connection(connection, hello.address)
                self._links_to_us[hello.address] = connection
            connection.become_link_of(hello.address, hello.link)
            cluster = str(self._store.cluster_id)
            self._raft.remember()
            reminder = self._reminder_for(hello.address)
            arrival.answer(HelloAnswer(cluster=cluster, node=self._store.node_id, address=self._me, reminder=reminder))

        self._once_bound(hello.address, hello.node, welcome)

    def on_greeting(self, greeting: Greeting) -> None:
        """The other end of our link says who it is."""
        link, peer, answer = greeting.link, greeting.link.peer, greeting.answer
        if answer.error is not UNSET:
            problem: tuple[str, str] | None = (answer.error.code, answer.error.message)
        else:
            problem = self._problem_with(answer.cluster, answer.node, peer, PROTOCOL_VERSION)
            problem = problem or self._forgotten(answer.reminder)
        if problem is not None:
            self.note_refusal(peer, *problem)
            link.cut()
            return

        def admit() -> None:
            self._refusals.pop(peer, None)
            link.admit()
            self._links[peer] = link
            self._raft.unreachable(peer)  # what was posted while there was no link is lost
            self._log.info("peer_connected", peer=peer)

        self._once_bound(peer, answer.node, admit)

    def on_cut(self, cut: Cut) -> None:
        """A connection to or from a member has ended."""
        if cut.link is not None and self._links.get(cut.peer) is cut.link:
            del self._links[cut.peer]
            self._log.info("peer_lost", peer=cut.peer)

    def is_from_member(self, arrival: Arrival) -> bool:
        """Members say hello before anything else, and speak only for themselves."""
        origin, message = arrival.origin, arrival.message
        says = message.staged.address if isinstance(message, VoteRequest) else getattr(message, "leader", "")
        if origin.peer is None:
            arrival.refuse("wrong_cluster", "members say hello first; clients don't send this type")
        elif says != origin.peer:
            arrival.refuse("bad_request", f"{origin.peer} can't speak for {says}")
        else:
            return True
        return False

    def is_first_hand(self, arrival: Arrival) -> bool:
        """True for what came over a member's own link, which only its consensus uses."""
        peer = arrival.origin.peer
        return peer is not None and self._links_to_us.get(peer) is arrival.origin

    # --- promises (see `consensus.witness`) ---

    def _reminder_for(self, peer: str) -> Reminder | UnsetType:
        """What to tell `peer` of its promises; nothing while it is not known which node that is."""
        node, witness = self._raft.membership.node_of(peer), self._raft.witnesses.of(peer)
        if not node:
            return UNSET
        return Reminder(node=node, term=witness.term, held=witness.held, floor=witness.floor, vote=witness.vote)

    def _forgotten(self, reminder: Reminder | UnsetType) -> tuple[str, str] | None:
        """Take what another member remembers of this node: (code, words) when this node lacks any of it."""
        if reminder is not UNSET and reminder.node == self._store.node_id:
            self._raft.remind(Witness(reminder.term, reminder.held, reminder.floor, reminder.vote))
        return ("old_copy", self.why_aside) if self._raft.has_forgotten else None

    @property
    def why_aside(self) -> str:
        """What this node has forgotten, and what to do."""
        promised, last = self._raft.witnesses.of(self._me), self._store.journal.last.id
        held = max(promised.held, promised.floor, key=lambda id: id.commit_id)
        entry = f" and has acknowledged entry {held.commit_id} of term {held.term}" if held != GENESIS else ""
        return (
            f"the data directory of {self._me} is an older copy: the node has spoken in term {promised.term}{entry}, "
            f"but this directory has term {self._raft.term}, and its log ends with entry {last.commit_id} of term "
            f"{last.term}. The node takes part in nothing. Put its newest directory back; if that is lost, it can't "
            "come back as the node that it was (changing the members comes in a later version)"
        )

    def refuse_as_old_copy(self, arrival: Arrival) -> None:
        """Somebody wants a node that has forgotten to take part."""
        arrival.refuse("old_copy", self.why_aside)

    def _stand_aside(self) -> None:
        """It is on disk that this node has forgotten: say so, and end its links, in both directions."""
        self._is_aside = True
        self._log.error("old_copy", why=self.why_aside, data_dir=str(self._store.data_dir))
        for link in self._links.values():
            link.cut()
        for end in self._links_to_us.values():
            end.cut()
        self._links_to_us.clear()

    def _once_bound(self, peer: str, node: str, then: Callable[[], None]) -> None:
        """The id of a member met for the first time is on disk before anything is exchanged with it."""
        if self._raft.membership.node_of(peer) == "":
            self._store.bind(peer, node)
            self._welcomes.append(then)
        elif self._welcomes:
            self._welcomes.append(then)  # perhaps it was bound in this very turn
        else:
            then()

    def _problem_with(self, cluster: str, node: str, address: str, protocol: int) -> tuple[str, str] | None:
        """Why the node at the other end is not the member that it should be: (code, words), or None."""
        known = self._raft.membership.node_of(address)
        if protocol != PROTOCOL_VERSION:
            return (
                "wrong_protocol",
                f"{self._me} speaks protocol {PROTOCOL_VERSION}, {address} speaks {protocol}: upgrade",
            )
        if cluster != self._store.cluster_id:
            founders = ", ".join(sorted(self._raft.membership.voters))
            return "wrong_cluster", (
                f"{self._me} is of cluster {self._store.cluster_id} (members {founders}), {address} of cluster "
                f"{cluster}: start all nodes of a cluster with the same set of addresses, in --ip and --peers together"
            )
        if known is None or address == self._me:
            return "not_member", f"{address} is not another member of the cluster of {self._me}"
        if not node:
            return "wrong_node", f"{address} does not say which node it is"
        if known not in ("", node):
            return "wrong_node", (
                f"{address} is known to {self._me} as node {known}, but node {node} answers there: its data "
                "directory was lost or exchanged. Give it its own directory back"
            )
        return None

    def note_refusal(self, peer: str, code: str, message: str) -> None:
        """Say once why a node and this one do not work together; tries go on. There may be any number of strangers: of
        those past the first few, the 1st, 2nd, 4th, 8th ... refusal is told."""
        event = "peer_refused" if self._raft.membership.node_of(peer) is not None else "stranger_refused"
        if peer in self._refusals or len(self._refusals) < _REMEMBERED or event == "peer_refused":
            if self._refusals.get(peer) != message:
                self._refusals[peer] = message
                self._log.error(event, peer=peer, code=code, why=message)
            return
        self._strangers += 1
        if self._strangers & (self._strangers - 1) == 0:
            self._log.error(event, peer=peer, code=code, why=message, count=self._strangers)
