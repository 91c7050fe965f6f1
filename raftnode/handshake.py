"""Who is at the other end: the hello between members (rule 9). Part of the driver (layer 3).

Every link begins with cluster id, node id, address and protocol version, and each side checks the other's. Members are
known by address *and* node id: a node that lost its disk comes back with another id and is not taken for the old voter,
whose promises it has forgotten. An id met for the first time is written down before anything is exchanged with it.

A member that lags does not know yet who was added, and so who may lead by now; a node that was removed does not know
that. So each side says which entry made its membership: who is unknown here is taken as a member if its membership is
the newer one, and else told that it is none, and by which entry. A node that is told stands aside until a leader speaks
to it. One whose disk was wiped is told that its address is another node's, and has no vote from then on; its leader
takes it as a learner (`members`).

Each side also reminds the other of what it has promised (`consensus.witness` has the argument). A node whose directory
was put back from an old copy learns so that it has forgotten, and from then on takes part in nothing: it refuses every
hello as `old_copy`, uses no link, and answers no request of a member.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from msgspec import UNSET, UnsetType

from raftnode.consensus.raft import Raft
from raftnode.consensus.witness import Witness
from raftnode.mailbox import Arrival, Cut, Greeting, LinkEnd, MemberEnd
from raftnode.messages import (
    GENESIS,
    PROTOCOL_VERSION,
    EntryId,
    ErrorDetail,
    Hello,
    HelloAnswer,
    Reminder,
    VoteRequest,
)
from raftnode.store import Store
from raftnode.transport import Transport

_WIPED: Final = (
    "this directory is new, but the other members know another node at this address: its disk was lost or exchanged. "
    "The node has no vote until the leader has taken it as a new member and it has caught up"
)
_REMEMBERED: Final = 32
"""So many refused addresses are remembered."""


class _Guest(NamedTuple):
    """A member's link to us, and what it said of itself."""

    end: MemberEnd
    node: str
    membership: EntryId


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
        self._links: dict[str, tuple[LinkEnd, str]] = {}  # ours, by member, that were admitted, with its node id
        self._links_to_us: dict[str, _Guest] = {}  # the newest of each member
        self._returned: dict[str, str] = {}  # members that came as another node in this turn
        self._is_told_out = False
        self._is_corrected = False
        self._is_aside = False  # this node has forgotten, and that was said and written down
        transport.reminder_for = self._reminder_for
        transport.membership_id = lambda: raft.membership.id
        if raft.has_forgotten:
            self._stand_aside()

    @property
    def needs_write(self) -> bool:
        """True when something was learned that must be on disk before it is acted on: a node id, or that this node has
        forgotten what it promised, or is not the one that its address belongs to."""
        return bool(self._welcomes) or (self._raft.has_forgotten and not self._is_aside) or self._is_corrected

    def finish(self) -> None:
        """What was learned is on disk: answer."""
        self._is_corrected = False
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
        if problem := self._problem_with_guest(hello):
            self._refuse(arrival, connection, hello, *problem)
            return

        def welcome() -> None:
            connection.become_link_of(hello.address, hello.link)
            if hello.link:
                self._transport.replace_connection(connection, hello.address)
                self._links_to_us[hello.address] = _Guest(connection, hello.node, hello.membership)
            cluster = str(self._store.cluster_id)
            self._raft.remember()
            reminder = self._reminder_for(hello.address)
            arrival.answer(
                HelloAnswer(
                    cluster=cluster,
                    node=self._store.node_id,
                    address=self._me,
                    reminder=reminder,
                    membership=self._raft.membership.id,
                )
            )

        self._once_bound(hello.address, hello.node, welcome)

    def _problem_with_guest(self, hello: Hello) -> tuple[str, str] | None:
        """Why who says hello is not welcome: (code, words), or None."""
        problem = self._problem_with(hello.cluster, hello.address, hello.node, hello.protocol)
        if problem is None and not self._is_welcome(hello.address, hello.node, hello.membership):
            problem = self._why_not_welcome(hello.address, hello.node)
        if problem is None and (reminder := hello.reminder) is not UNSET and reminder.node != self._store.node_id:
            self._note_told("wrong_node", hello.address, hello.membership, reminder.node)
            if hello.membership >= self._raft.membership.id:
                problem = "wrong_node", f"{hello.address} takes {self._me} for node {reminder.node}, which it is not"
        return problem or self._forgotten(hello.reminder)

    def _refuse(self, arrival: Arrival, connection: MemberEnd, hello: Hello, code: str, why: str) -> None:
        """Tell a guest why, and what that rests on: it may be the one that is right."""
        self.note_refusal(hello.address, code, why)
        members = self._raft.journal.memberships[0]
        known = members.node_of(hello.address)
        if code == "wrong_node" and known:
            self._returned[hello.address] = hello.node
        error = ErrorDetail(code, why)
        node, known = self._store.node_id, known or ""
        answer = HelloAnswer(data=False, error=error, node=node, membership=members.id, known_as=known)
        arrival.answer(answer)
        connection.close_after_answer()

    def on_greeting(self, greeting: Greeting) -> None:
        """The other end of our link says who it is."""
        link, peer, answer = greeting.link, greeting.link.peer, greeting.answer
        known = self._raft.membership.node_of(peer)
        if answer.error is not UNSET:
            problem: tuple[str, str] | None = (answer.error.code, answer.error.message)
            self._note_told(answer.error.code, peer, answer.membership, answer.known_as)
            has_returned = answer.error.code == "wrong_node"  # it need not know us, and so would not come by itself
        else:
            problem = self._problem_with(answer.cluster, peer, answer.node, PROTOCOL_VERSION)
            has_returned = problem is None  # nor would one that goes by its readmission, which was cut elsewhere
            if problem is None and known not in ("", answer.node):
                problem = self._why_not_welcome(peer, answer.node)
            problem = problem or self._forgotten(answer.reminder)
        if has_returned and answer.node and known not in (None, "", answer.node):
            self._returned[peer] = answer.node
        if problem is not None:
            self.note_refusal(peer, *problem)
            link.cut()
            return

        def admit() -> None:
            self._refusals.pop(peer, None)
            link.admit()
            self._links[peer] = (link, answer.node)
            self._raft.unreachable(peer)  # what was posted while there was no link is lost
            self._log.info("peer_connected", peer=peer)

        self._once_bound(peer, answer.node, admit)

    def on_cut(self, cut: Cut) -> None:
        """A connection to or from a member has ended."""
        if cut.link is None:
            if cut.peer in self._links_to_us and self._links_to_us[cut.peer].end is cut.end:
                del self._links_to_us[cut.peer]
        elif cut.peer in self._links and self._links[cut.peer][0] is cut.link:
            del self._links[cut.peer]
            self._log.info("peer_lost", peer=cut.peer)

    # --- who is welcome, and who is told that it is not ---

    def _is_welcome(self, address: str, node: str, membership: EntryId) -> bool:
        """A member, by what is committed or by what is staged, which may be cut again; or one that knows more."""
        memberships = self._raft.journal.memberships
        known = [members.node_of(address) for members in memberships]
        return node in known or "" in known or membership > memberships[0].id

    def _why_not_welcome(self, address: str, node: str) -> tuple[str, str]:
        known = self._raft.membership.node_of(address)
        if known is None:
            made = self._raft.membership.commit_id
            words = f"entry {made} made its membership" if made else "its membership is that of its founders"
            return "not_member", f"{address} is not another member of the cluster of {self._me}: {words}"
        return "wrong_node", (
            f"{address} is known to {self._me} as node {known}, but node {node} answers there: its data directory was "
            "lost or exchanged. Give it its own directory back; else it is taken as a new member, if its directory is "
            "empty and the other members still are a majority"
        )

    def _note_told(self, code: str, peer: str, membership: EntryId, known_as: str) -> None:
        """`peer` does not take this node for a member, or for another one. Who knows less is not believed."""
        mine, raft = self._raft.membership, self._raft
        if code not in ("not_member", "wrong_node"):
            return
        knows_already = code == "wrong_node" and mine.node_of(self._me) not in (None, "", self._store.node_id)
        is_new = raft.has_promised_nothing and mine.node_of(self._me) == self._store.node_id
        if code == "wrong_node" and is_new and known_as not in ("", self._store.node_id) and membership >= mine.id:
            raft.give_up_identity(known_as)
            self._is_corrected = True
            self._log.error("disk_was_lost", peer=peer, node=self._store.node_id, known_as=known_as, why=_WIPED)
        elif (membership > mine.id and not knows_already) or (membership == mine.id and code == "not_member"):
            raft.stand_outside()  # what the other goes by is committed, though this node may not have known that
            if raft.is_outside and not self._is_told_out:
                self._is_told_out = True
                self._log.error("not_member", peer=peer, why=self._why_outside(membership.commit_id))

    def _why_outside(self, commit_id: int) -> str:
        return (
            f"{self._me} was removed by entry {commit_id} or before. It takes part in nothing, unless it is added "
            "again; else stop it, and delete its directory"
        )

    def take_returned(self) -> dict[str, str]:
        """Members that have come as another node in this turn, with its id."""
        returned, self._returned = self._returned, {}
        return returned

    def after_change(self) -> None:
        """The membership has changed: end the links of who is not a member any more, so that it asks again and is told,
        and the links to a node whose place another one has."""
        members = self._raft.membership
        for peer, (link, node) in list(self._links.items()):
            if members.node_of(peer) not in (None, "", node):
                link.cut()
        for peer, guest in list(self._links_to_us.items()):
            if not self._is_welcome(peer, guest.node, guest.membership):
                guest.end.cut()
        if not self._raft.is_outside:
            self._is_told_out = False

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
        """True for what came over a member's own link, which only its consensus uses. One that knows more than this
        node may be another node than the member at its address is here, and speaks for itself only."""
        peer = arrival.origin.peer
        if peer is None or peer not in self._links_to_us:
            return False
        guest = self._links_to_us[peer]
        return guest.end is arrival.origin and guest.node == self._raft.membership.node_of(peer)

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
            "come back as the node that it was: empty its directory, and it comes back as a new member"
        )

    def refuse_as_old_copy(self, arrival: Arrival) -> None:
        """Somebody wants a node that has forgotten to take part."""
        arrival.refuse("old_copy", self.why_aside)

    def _stand_aside(self) -> None:
        """It is on disk that this node has forgotten: say so, and end its links, in both directions."""
        self._is_aside = True
        self._log.error("old_copy", why=self.why_aside, data_dir=str(self._store.data_dir))
        for link, _ in self._links.values():
            link.cut()
        for guest in self._links_to_us.values():
            guest.end.cut()
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

    def _problem_with(self, cluster: str, address: str, node: str, protocol: int) -> tuple[str, str] | None:
        """Why the node at the other end can't be any member: (code, words), or None."""
        if protocol != PROTOCOL_VERSION:
            return (
                "wrong_protocol",
                f"{self._me} speaks protocol {PROTOCOL_VERSION}, {address} speaks {protocol}: upgrade",
            )
        if cluster != self._store.cluster_id:
            members = ", ".join(sorted(self._raft.membership.voters))
            return "wrong_cluster", (
                f"{self._me} is of cluster {self._store.cluster_id} (members {members}), {address} of cluster "
                f"{cluster}: start all nodes of a cluster with the same set of addresses, in --ip and --peers together"
            )
        if address == self._me:
            return "not_member", f"{address} is not another member of the cluster of {self._me}"
        if not node:
            return "wrong_node", f"{address} does not say which node it is"
        return None

    def note_refusal(self, peer: str, code: str, message: str) -> None:
        """Say once why a node and this one do not work together; tries go on. There may be any number of strangers: of
        those past the first few, the 1st, 2nd, 4th, 8th ... refusal is told."""
        if code == "shutting_down":
            self._log.info("peer_stopping", peer=peer)
            return
        event = "peer_refused" if self._raft.membership.node_of(peer) is not None else "stranger_refused"
        if peer in self._refusals or len(self._refusals) < _REMEMBERED or event == "peer_refused":
            if self._refusals.get(peer) != message:
                self._refusals[peer] = message
                self._log.error(event, peer=peer, code=code, why=message)
            return
        self._strangers += 1
        if self._strangers & (self._strangers - 1) == 0:
            self._log.error(event, peer=peer, code=code, why=message, count=self._strangers)
