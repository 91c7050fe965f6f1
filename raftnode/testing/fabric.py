"""The simulated network: paths between members that lose, delay, reorder and repeat, and over them the links and
connections that a production `Election` sees, through the production `Transport` with its sockets replaced.

Messages are encoded and decoded by the production codec. What a real TCP connection rules out can happen here as well,
as long as the consensus must bear it: a lost or a doubled message on a link that goes on, an answer that comes after
its link was cut. What clients send is not doubled: without sessions nobody could tell that from two requests.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

from msgspec import UNSET

from raftnode.connections import Link
from raftnode.mailbox import Arrival, Cut, Greeting, Letter, MemberEnd, Reply
from raftnode.messages import (
    Answer,
    ClientRequest,
    Data,
    DataAnswer,
    Heartbeat,
    HeartbeatAnswer,
    Hello,
    HelloAnswer,
    PeerAnswer,
    PeerRequest,
    Snapshot,
    SnapshotAnswer,
    TimeoutNow,
    TimeoutNowAnswer,
    VoteAnswer,
    VoteRequest,
    decode_answer,
    decode_request,
    encode,
)
from raftnode.testing.world import Action, World
from raftnode.transport import Transport

if TYPE_CHECKING:
    from raftnode.testing.simulated import SimulatedNode

_REQUESTS = (VoteRequest, Heartbeat, Data, TimeoutNow, Snapshot)
CONSENSUS = (*_REQUESTS, VoteAnswer, HeartbeatAnswer, DataAnswer, TimeoutNowAnswer, SnapshotAnswer)
"""Messages that may be lost, doubled or late at any time: Raft asks nothing of its network."""
LATEST = 20
"""So many times the usual jitter is that of a message that comes late."""


@dataclass(slots=True)
class Path:
    """One direction between two members, and what is wrong with it now."""

    cut: bool = False
    held: list[Action] | None = None
    """Not None while cut: what was sent meanwhile and comes when the cut is healed. None while cut: it is lost."""
    extra_delay: float = 0.0
    """Seconds that a slow link adds."""
    loses_entries: bool = False
    """Large packets are lost, and small ones are not, as where the path's MTU is wrong."""
    last_arrival: float = 0.0


@dataclass(slots=True)
class Weather:
    """How well the network works all the time, besides cuts. Probabilities are per message."""

    delay: float = 0.001
    """Seconds on the way, at the least."""
    jitter: float = 0.001
    """Seconds more, at the most, usually."""
    loss: float = 0.0
    repeat: float = 0.0
    echo: float = 0.0
    """Seconds, at the most, after which a message may come a second time: leaders may have come and gone since."""
    reorder: float = 0.0
    """Probability that a message may be overtaken."""
    stray: float = 0.0
    """Probability that an answer arrives although its link is gone."""


class Fabric:
    """All paths between members, and between clients and members (which always work)."""

    def __init__(self, world: World, weather: Weather) -> None:
        self.world = world
        self.weather = weather
        self.chance = world.chance_for("fabric")
        self.transports: dict[str, SimulatedTransport] = {}
        """Of the members that are up."""
        self.lost = 0
        self.repeated = 0
        self._paths: dict[tuple[str, str], Path] = {}

    def path(self, source: str, target: str) -> Path:
        """The direction from one to the other."""
        return self._paths.setdefault((source, target), Path())

    def cut(self, source: str, target: str, holds: bool) -> None:
        """Nothing comes through from now on; with `holds` it comes later, without it is lost."""
        path = self.path(source, target)
        path.cut = True
        if holds and path.held is None:
            path.held = []

    def heal(self, source: str, target: str) -> None:
        """Everything comes through again, what was held first."""
        path = self.path(source, target)
        held, path.cut, path.held = path.held or [], False, None
        for arrive in held:
            self._plan(path, arrive)

    def heal_all(self) -> None:
        """Every path works as well as it can."""
        for source, target in list(self._paths):
            self.heal(source, target)
            path = self.path(source, target)
            path.extra_delay, path.loses_entries = 0.0, False
        self.weather.loss = self.weather.repeat = self.weather.reorder = self.weather.stray = 0.0
        for transport in list(self.transports.values()):
            transport.end_half_open()

    def works(self, source: str, target: str) -> bool:
        """True when both directions are open: a connection can be made."""
        return not self.path(source, target).cut and not self.path(target, source).cut

    def delay(self) -> float:
        """Seconds that a message takes on a path that is well."""
        weather = self.weather
        late = LATEST * weather.jitter if self.chance.random() < 0.01 else weather.jitter
        return weather.delay + self.chance.random() * late

    def carry(self, source: str, target: str, arrive: Action, is_consensus: bool) -> None:
        """Take something from one member to another, if this is one of the good days."""
        path, weather = self.path(source, target), self.weather
        if is_consensus and self.chance.random() < weather.loss:
            self.lose(source, target)
            return
        if path.cut:
            if path.held is None:
                self.lost += 1
            else:
                path.held.append(arrive)
            return
        self._plan(path, arrive)
        if is_consensus and self.chance.random() < weather.repeat:
            self.repeated += 1
            if self.chance.random() < 0.5:
                self._plan(path, arrive)
            else:
                self.world.after(self.delay() + weather.echo * self.chance.random(), arrive)

    def lose(self, source: str, target: str) -> None:
        """A message is gone."""
        self.lost += 1
        self.world.tell(f"lost      {source} -> {target}")

    def _plan(self, path: Path, arrive: Action) -> None:
        """In order with what went before on this path, unless it may be overtaken."""
        time = self.world.now + self.delay() + path.extra_delay * self.chance.random()
        if self.chance.random() >= self.weather.reorder:
            time = path.last_arrival = max(time, path.last_arrival)
        self.world.at(time, arrive)


class End(Protocol):
    """Something to which a node has a message to send."""

    def transmit(self, frame: bytes, message: Any) -> None:
        """Send it now."""
        ...


class SimulatedLink:
    """Our end of a connection to another member: requests out, answers in (as `connections.Link`)."""

    writable = True

    def __init__(self, owner: SimulatedTransport, peer: str) -> None:
        self.owner = owner
        self.peer = peer
        self.is_open = True
        self.is_ready = False
        self.opened_at = owner.world.now
        self.other: SimulatedConnection | None = None
        self.node = ""
        """Which node is at the other end. No answer outlives it: the connection was to that one."""
        self._next_id = 0
        self._waiting: dict[int, tuple[float, Arrival | None]] = {}

    def admit(self) -> None:
        """As `connections.Link.admit`."""
        if self.is_open:
            self.is_ready = True
            self.owner.live.add(self.peer)

    def post(self, message: PeerRequest) -> None:
        """As `connections.Link.post`."""
        if self.is_ready:
            self.request(message)

    def forward(self, request: ClientRequest, arrival: Arrival) -> None:
        """As `connections.Link.forward`."""
        self.request(request, arrival)

    def request(self, message: PeerRequest | ClientRequest | Hello, arrival: Arrival | None = None) -> None:
        """Put it out for the next flush."""
        self._next_id += 1
        message.id = self._next_id
        self._waiting[self._next_id] = (self.owner.world.now, arrival)
        self.owner.outbox.append((self, message))

    def transmit(self, frame: bytes, message: Any) -> None:
        """To the other end, if it is still there when this arrives."""

        def arrive() -> None:
            if self.other is not None and self.other.is_open:
                self.other.take(frame)
            elif self.is_open:
                self._plan_end()

        fabric, source = self.owner.fabric, self.owner.my_ip
        is_large = isinstance(message, Snapshot) or (isinstance(message, Data) and bool(message.entries))
        if is_large and fabric.path(source, self.peer).loses_entries:
            fabric.lose(source, self.peer)
        else:
            fabric.carry(source, self.peer, arrive, isinstance(message, CONSENSUS))

    def _plan_end(self) -> None:
        """Nobody is at the other end any more: it says so, if that comes through."""
        self.owner.fabric.carry(self.peer, self.owner.my_ip, self.lose, is_consensus=False)

    def take(self, frame: bytes, is_stray: bool = False) -> None:
        """An answer arrives. One that is repeated, or that its link did not live to see, reaches the consensus too."""
        if self.other is not None and self.other.owner.node.new_id != self.node:
            return
        answer = decode_answer(frame)
        _, arrival = self._waiting.pop(cast(int, answer.id), (0.0, None))
        if isinstance(answer, HelloAnswer):
            if not is_stray:
                self.owner.receive([Greeting(self, answer)], limited=False)
        elif arrival is not None or isinstance(answer, CONSENSUS):
            self.owner.receive([Reply(self.peer, answer, arrival)], limited=False)

    def oldest_wait(self) -> float | None:
        """As `connections.Link.oldest_wait`."""
        return next((sent for sent, _ in self._waiting.values()), None)

    def cut(self) -> None:
        """End it from this side; the other notices when that comes through."""
        if self.is_open:
            self.lose()
            if (other := self.other) is not None:
                self.owner.fabric.carry(self.owner.my_ip, self.peer, other.lose, is_consensus=False)

    def lose(self) -> None:
        """It has ended; this node is told."""
        if not self.is_open:
            return
        self.is_open = self.is_ready = False
        if self.owner.links.get(self.peer) is cast(Link, self):
            del self.owner.links[self.peer]
            self.owner.live.discard(self.peer)
        forwarded = [arrival for _, arrival in self._waiting.values() if arrival is not None]
        self._waiting.clear()
        self.owner.receive([Cut(self.peer, self, forwarded=forwarded)], limited=False)
        self.owner.plan_reconnect(self)


class SimulatedConnection:
    """The end of a connection that another member opened (as `connections.Connection`)."""

    is_full = False

    def __init__(self, owner: SimulatedTransport, other: SimulatedLink) -> None:
        self.owner = owner
        self.other = other
        self.peer: str | None = None
        self.is_link = False
        self.client = other.owner.my_ip
        self.is_open = True
        self._is_closing = False

    def take(self, frame: bytes) -> None:
        """A request arrives."""
        if not self._is_closing:
            self.owner.receive([Arrival(decode_request(frame), self, len(frame))], limited=self.peer is None)

    def answer(self, arrival: Arrival, answer: Answer) -> None:
        """Put it out for the next flush."""
        if self.is_open:
            answer.id = arrival.id
            self.owner.outbox.append((self, answer))

    def defer(self, arrival: Arrival) -> None:  # noqa: ARG002 - the signature of an origin
        """Never asked for: members take all that they are sent."""
        raise AssertionError("a member is never full")

    def transmit(self, frame: bytes, message: Any) -> None:
        """To the link at the other end; an answer may also outlive its link, at a chance."""
        fabric = self.owner.fabric

        def arrive() -> None:
            if self.other.is_open:
                self.other.take(frame)
            elif not self.other.owner.is_dead and fabric.chance.random() < fabric.weather.stray:
                self.other.take(frame, is_stray=True)
            else:
                fabric.carry(self.other.owner.my_ip, self.owner.my_ip, self.lose, is_consensus=False)

        fabric.carry(self.owner.my_ip, self.other.owner.my_ip, arrive, isinstance(message, CONSENSUS))
        if self._is_closing:
            self.cut()

    def become_link_of(self, peer: str, is_link: bool) -> None:
        """As `connections.Connection.become_link_of`."""
        self.peer, self.is_link = peer, is_link

    def close_after_answer(self) -> None:
        """As `connections.Connection.close_after_answer`."""
        self._is_closing = True

    def cut(self) -> None:
        """End it from this side; the other notices when that comes through."""
        if self.is_open:
            self.lose()
            self.owner.fabric.carry(self.owner.my_ip, self.client, self.other.lose, is_consensus=False)

    def lose(self) -> None:
        """It has ended; this node is told if it was the last link from that member."""
        if not self.is_open:
            return
        self.is_open = False
        self.owner.connections.remove(self)
        if self.is_link and not any(c.is_link and c.peer == self.peer for c in self.owner.connections):
            assert self.peer is not None, "a link is a member's"
            self.owner.receive([Cut(self.peer, end=self)], limited=False)


@dataclass(slots=True)
class Session:
    """One request of one client at one node: the origin that the node answers."""

    client: str
    owner: SimulatedTransport
    take: Callable[[bytes], object]
    """Called with the answer when it arrives at the client."""
    end: Callable[[], None]
    """Called when the connection ended before that."""
    peer: str | None = None
    is_full: bool = False
    """The client does not take its answers at the moment."""
    answers: int = 0
    waiting: list[Arrival] = field(default_factory=list)

    def answer(self, arrival: Arrival, answer: Answer) -> None:
        """Put it out for the next flush."""
        self.answers += 1
        answer.id = arrival.id
        self.owner.outbox.append((self, answer))

    def defer(self, arrival: Arrival) -> None:
        """Keep it until the client takes answers again."""
        self.waiting.append(arrival)

    def take_again(self) -> None:
        """The client takes its answers again."""
        self.is_full = False
        waiting, self.waiting = self.waiting, []
        if waiting and not self.owner.is_dead:
            self.owner.receive(waiting, limited=True)

    def transmit(self, frame: bytes, message: Any) -> None:  # noqa: ARG002 - the signature of an end
        """To the client, whose network is well."""
        self.owner.sessions.remove(self)
        self.owner.world.after(self.owner.fabric.delay(), lambda: self.take(frame))


class SimulatedTransport(Transport):
    """The production transport with its sockets, its loop and its clock replaced.

    What arrives is kept as a kernel would, in `_arrived`, while the node is paused or busy, and comes into the mailbox
    when its next turn begins.
    """

    def __init__(self, node: SimulatedNode, fabric: Fabric) -> None:
        super().__init__(node.name, 1, queue.Queue(node.settings.mailbox_batches))
        self.node = node
        self.fabric = fabric
        self.world = fabric.world
        self.now = node.clock
        self.is_dead = False
        """The process is gone: nothing comes in or goes out any more."""
        self.outbox: list[tuple[SimulatedLink | SimulatedConnection | Session, Any]] = []
        self.connections: list[SimulatedConnection] = []
        self.sessions: list[Session] = []
        self._pauses: dict[str, float] = {}
        self._is_linking = False
        self._kept: set[str] = set()  # whom this node tries to connect to, or has a link to
        fabric.transports[self.my_ip] = self

    # --- in ---

    def receive(self, letters: Iterable[Letter], limited: bool) -> None:
        """Something arrives at the sockets of this node."""
        if self.is_dead:
            return
        if limited:
            self.deliver_on_loop(list(letters), limited)
        else:
            self.deliver_from_link(list(letters))

    def wake(self) -> None:
        """As `Transport.wake`."""
        self.node.want_turn()

    def _schedule(self) -> None:
        self.node.want_turn()

    def flush_soon(self) -> None:
        """As `Transport.flush_soon`."""
        self.world.after(0.0, self.flush)

    # --- out ---

    def flush(self) -> None:
        """Everything that was put out leaves the node."""
        outbox, self.outbox = self.outbox, []
        if self.is_dead:
            return
        for end, message in outbox:
            frame = encode(message)
            target = end.peer if isinstance(end, SimulatedLink) else end.client
            self.node.sends(target, message, frame)
            self.world.at(self.node.local_now, _Transmission(end, frame, message))

    # --- links ---

    def set_peers(self, peers: list[str]) -> None:
        """As `Transport.set_peers`; links are made once the node is up."""
        self.peers = peers
        if self._is_linking:
            self._link_to_peers()

    def open_links(self) -> None:
        """The node is up: connect to the others, and look after the links from now on."""
        self._is_linking = True
        self._link_to_peers()
        self.world.after(1.0, self._sweep_links)

    def _link_to_peers(self) -> None:
        for peer in self.peers:
            if peer not in self._kept:
                self._kept.add(peer)
                self._connect(peer)
        for link in cast(list[SimulatedLink], list(self.links.values())):
            if link.peer not in self.peers:
                link.cut()

    def _connect(self, peer: str) -> None:
        """One try to connect; it takes a round trip."""
        if peer not in self.peers:
            self._kept.discard(peer)
            return

        def connected() -> None:
            other = self.fabric.transports.get(peer)
            if self.is_dead or peer in self.links:
                return
            if peer not in self.peers:
                self._kept.discard(peer)
                return
            if other is None or self.node.is_paused or not self.fabric.works(self.my_ip, peer):
                self._connect_later(peer)
                return
            link = SimulatedLink(self, peer)
            link.other = SimulatedConnection(other, link)
            link.node = other.node.new_id
            other.connections.append(link.other)
            self.links[peer] = cast(Link, link)
            link.request(self.hello(peer))
            self.flush()

        self.world.after(2 * self.fabric.delay(), connected)

    def _connect_later(self, peer: str) -> None:
        low, high = self.settings.reconnect_ms / 1000, self.settings.reconnect_high_ms / 1000
        pause = self._pauses.get(peer, low)
        self._pauses[peer] = min(2 * pause, high)
        self.world.after(pause, lambda: self._connect(peer))

    def plan_reconnect(self, link: SimulatedLink) -> None:
        """A link has ended: try again, at once if it lived for a while."""
        if not self.is_dead:
            if self.world.now - link.opened_at > self.settings.reconnect_high_ms / 1000:
                self._pauses.pop(link.peer, None)
            self._connect_later(link.peer)

    def _sweep_links(self) -> None:
        """As `Transport._sweep`: end the links on which nobody answers."""
        if self.is_dead:
            return
        self.world.after(1.0, self._sweep_links)
        if not self.node.is_paused:
            for link in cast(list[SimulatedLink], list(self.links.values())):
                oldest = link.oldest_wait()
                if oldest is not None and self.world.now - oldest > self.settings.stall_timeout_ms / 1000:
                    link.cut()

    def oldest_waits(self) -> list[float | None]:
        """Of each link that is in use: when its oldest unanswered request was sent."""
        links = cast(list[SimulatedLink], list(self.links.values()))
        return [link.oldest_wait() for link in links if link.is_ready]

    def replace_connection(self, connection: MemberEnd, peer: str) -> None:
        """As `Transport.replace_connection`."""
        for other in list(self.connections):
            if other.peer == peer and other.is_link and other is not cast(Any, connection):
                other.cut()

    def reset(self, peer: str) -> None:
        """The link to `peer` breaks: both ends are told, each when it hears of it."""
        link = cast(SimulatedLink | None, self.links.get(peer))
        if link is not None and link.other is not None:
            self.world.after(self.fabric.delay(), link.lose)
            self.world.after(self.fabric.delay(), link.other.lose)

    def lose_connections_of(self, peer: str) -> None:
        """The links that `peer` has to this node end at this side; the other side is not told."""
        for connection in list(self.connections):
            if connection.client == peer:
                connection.lose()

    def end_half_open(self) -> None:
        """What the other side has ended ends here too: keep-alive would find it out, where nothing is ever sent."""
        for link in cast(list[SimulatedLink], list(self.links.values())):
            if link.other is None or not link.other.is_open:
                link.lose()
        for connection in list(self.connections):
            if not connection.other.is_open:
                connection.lose()

    def die(self) -> None:
        """The process is gone. The other ends hear of it if that comes through; clients do."""
        self.is_dead = True
        del self.fabric.transports[self.my_ip]
        for link in cast(list[SimulatedLink], list(self.links.values())):
            link.is_open = False
            if link.other is not None:
                self.fabric.carry(self.my_ip, link.peer, link.other.lose, is_consensus=False)
        for connection in self.connections:
            connection.is_open = False
            self.fabric.carry(self.my_ip, connection.client, connection.other.lose, is_consensus=False)
        for session in self.sessions:
            self.world.after(self.fabric.delay(), session.end)


@dataclass(slots=True)
class _Transmission:
    """A message that leaves its node at a planned time: after the node's slow disk, for example."""

    end: End
    frame: bytes
    message: Any

    def __call__(self) -> None:
        self.end.transmit(self.frame, self.message)


def describe(message: PeerRequest | PeerAnswer | Any) -> str:
    """A message in one short line, for transcripts."""
    match message:
        case Data():
            span = f"{message.entries[0].commit_id}..{message.entries[-1].commit_id}" if message.entries else "nothing"
            previous = f"{message.previous.term}/{message.previous.commit_id}"
            return f"data      term {message.term}, after {previous}: {span}, commit {message.commit_id}"
        case Heartbeat():
            return f"heartbeat term {message.term}, commit {message.commit_id}, round {message.round}"
        case VoteRequest():
            kind = "pre-vote?" if message.pre_vote else "vote?    "
            return f"{kind} term {message.term}, last {message.staged.term}/{message.staged.commit_id}"
        case VoteAnswer():
            kind = "pre-vote " if message.pre_vote else "vote     "
            return f"{kind} {'yes' if message.data else 'no'}, term {message.term}"
        case HeartbeatAnswer():
            return f"heard     term {message.term}, commit {message.commit_id}, round {message.round}"
        case DataAnswer() if message.data:
            return f"holds     {message.match}, term {message.term}, commit {message.commit_id}"
        case DataAnswer():
            return f"refuses   after {message.asked} ({message.reason}), term {message.term}, hint {message.last}"
        case Snapshot():
            what = f"chunk {message.seq} of {message.transfer}: {len(message.records)} and {len(message.gone)} gone"
            end = "" if message.end is UNSET else f", the state as of {message.end.id}, {message.end.keys} keys"
            return f"snapshot  term {message.term}, {what}{end}"
        case SnapshotAnswer():
            what = f"chunk {message.seq} of {message.transfer}, match {message.match}"
            return f"{'has      ' if message.data else 'refuses  '} {what} {message.reason}, term {message.term}"
        case _:
            return encode(message).decode().rstrip()
