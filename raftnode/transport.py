"""Sockets: who is connected, and the loop on which a node lives. Layer 2.

`serve` runs one asyncio loop in the calling thread. It reads what has arrived, puts it into the mailbox, and then lets
the driver (the election) take one turn, which drains the mailbox, writes, and answers. While LMDB syncs inside that
turn, the kernel's buffers collect the next batch.

A plain `Transport` has no driver: it only fills its queue, for whoever drains it. Other threads use the one-request
methods (`heartbeat`, `send_data`, `vote_request`, `echo`), which have blocking connections of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from msgspec import UNSET, UnsetType

from raftnode.blocking import Caller, ConnectFailed
from raftnode.config import KIB, Settings, canonical_address, parse_address
from raftnode.connections import Connection, Link, Wire
from raftnode.errors import ConfigError, NotCommitted, ProtocolError, Unavailable
from raftnode.mailbox import Arrival, Cut, Letter, Mailbox, MemberEnd, insert
from raftnode.messages import (
    GENESIS,
    Answer,
    ClientRequest,
    EntryId,
    Get,
    Hello,
    PeerRequest,
    Reminder,
    decode_object,
    encode,
    encode_object,
)
from raftnode.passes import PassSelector
from raftnode.streams import Listener, Stream, connect, listen

RECONNECT_TRIES = 20
_SWEEP_S = 1.0
_READ_BYTES = 256 * KIB
_ACCEPTED_AT_ONCE = 16
"""Each is an open file until it is seen that there are too many, so they are taken a few at a time."""
_WAITING_TO_BE_ACCEPTED = 1024
"""Meanwhile the kernel keeps so many."""
_SURPLUS = 64
"""Connections over the limit that may stay until it is seen whether they are members'."""


class Driver(Protocol):
    """Who takes the turns: the election."""

    def cycle(self, now: float | None = None) -> float:
        """One turn; returns when the next is due at the latest (monotonic seconds)."""
        ...

    def may_wait(self, letters: Sequence[Letter]) -> bool:
        """True when these need no turn of their own: the next one, which comes in any case, takes them along."""
        ...

    def answer_at_once(self, message: Get) -> Answer | None:
        """The answer to a local read, between two turns; None when that needs a turn all the same."""
        ...

    def begin_stop(self) -> None:
        """Take nothing new, finish what is under way; `is_idle` tells when."""
        ...

    @property
    def is_idle(self) -> bool:
        """True when nobody waits for an answer."""
        ...

    def end(self) -> None:
        """There are no more turns: whoever still waits is told."""
        ...


class Transport:
    """The sockets of one node.

    Public facts: `my_ip` (host:port, its name in the cluster), `listen` (host:port to listen on; the same, unless it
    was set to another before `serve`), `timeout` (seconds for one request of a caller's thread), `queue`, `peers` (the
    other members), `live` (those that answer now; says nothing of the membership).
    """

    def __init__(self, my_ip: str, timeout: int, queue: queue.Queue[list[Letter]]) -> None:
        """`my_ip`: address by which the other members know it, and to listen on. Raises ConfigError for a bad one."""
        self.my_ip = canonical_address(my_ip)
        self.listen = self.my_ip
        self.timeout = timeout
        self.queue: Mailbox = queue
        self.peers: list[str] = []
        self.live: set[str] = set()
        self.settings = Settings()
        self.log = logging.getLogger("raftnode.transport")
        self.unflushed: set[Wire] = set()
        """Whose batches of answers have collected: clients."""
        self.unflushed_members: set[Wire] = set()
        """... and members."""
        self.unflushed_bytes = 0
        """Size of what has collected and was not written yet."""
        self.unflushed_high = self.settings.client_bytes // 8
        """Past this, large answers wait until those that have collected are written."""
        self.in_flight_bytes = 0
        """Size of the requests that are not answered yet."""
        self.client_bytes = 0
        """What clients keep here besides those."""
        self.now = time.monotonic
        self.reminder_for: Callable[[str], Reminder | UnsetType] = lambda _peer: UNSET
        """What our hello reminds a member of; the handshake knows."""
        self.membership_id: Callable[[], EntryId] = lambda: GENESIS
        """The entry that made this node's membership, for hello; the handshake knows."""
        self._identity: tuple[str, str] | None = None
        self._driver: Driver | None = None
        self.answer_at_once: Callable[[Get], Answer | None] = lambda _message: None
        """The driver's: see there."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread = 0
        self._read_buffer = memoryview(bytearray(_READ_BYTES))  # what a stream has read last, until it has taken it
        self._connections: set[Connection] = set()
        self.passes: PassSelector
        """Of the loop that runs, or ran last: has read what was ready, and calls `_end_pass`."""
        self.links: dict[str, Link] = {}
        """The open links by member; a link enters itself when it is connected and leaves when it ends."""
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._callers: dict[str, Caller] = {}
        self._arrived: list[Letter] = []  # since the last turn, on the loop's thread, with a driver
        self._arrived_batches = 0  # of clients
        self._turn_due = False
        self._round_began: float | None = None
        self._later: dict[Connection, None] = {}  # a set that keeps its order
        self._let_go = 0
        self._timer: asyncio.TimerHandle | None = None
        self._stopped: asyncio.Event | None = None
        self._failure: BaseException | None = None
        self._stopping = threading.Event()
        self._serving = threading.Event()

    # --- set-up ---

    def identify(self, cluster: str, node: str) -> None:
        """Say which cluster and node this is: what hello tells other members."""
        self._identity = (cluster, node)

    def attach(self, driver: Driver, settings: Settings) -> None:
        """Let `driver` take the turns."""
        self._driver, self.answer_at_once = driver, driver.answer_at_once
        self.settings = settings
        self.unflushed_high = settings.client_bytes // 8

    def hello(self, peer: str | None = None) -> Hello:
        """What a link to the member `peer` begins with; without one, a connection for single requests. Raises
        ConfigError before `identify`."""
        if self._identity is None:
            raise ConfigError("this transport belongs to no node yet: other members would refuse it")
        cluster, node = self._identity
        reminder = UNSET if peer is None else self.reminder_for(peer)
        return Hello(cluster=cluster, node=node, address=self.my_ip, reminder=reminder, membership=self.membership_id())

    def set_peers(self, peers: list[str]) -> None:
        """The other members are these; links to them are kept from now on, links to others are ended."""
        self.peers = peers
        if self._loop is not None:
            self._keep_links()

    # --- the loop ---

    @property
    def is_serving(self) -> bool:
        """True while a loop runs in some thread."""
        return self._serving.is_set()

    def serve(self) -> None:
        """Listen until `stop` is called, or SIGTERM or SIGINT comes (in the main thread); then finish what is under
        way and return. Raises ConfigError when the address can't be listened on, and whatever ended the driver
        (StoreFailed, StoreDamaged): then the node must not go on."""
        with asyncio.Runner(loop_factory=self._new_loop) as runner:
            runner.run(self._serve())
        if self._failure is not None:
            raise self._failure

    def _new_loop(self) -> asyncio.AbstractEventLoop:
        self.passes = PassSelector(self._end_pass, self.settings.poll_us / 1_000_000)
        return asyncio.SelectorEventLoop(self.passes)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._stopped = asyncio.Event()
        server = await self._listen()
        sweeper = self._loop.create_task(self._sweep())
        self._keep_links()
        self._catch_signals()
        self._serving.set()
        self.log.info("listening", extra={"address": self.my_ip, "listen": self.listen})
        try:
            if self._stopping.is_set():
                self._begin_stop()
            self._schedule()
            await self._stopped.wait()
        finally:
            self._serving.clear()
            server.close()
            sweeper.cancel()
            self.fill_mailbox()
            if self._driver is not None:
                self._driver.end()
            try:
                await self._close_all()
            finally:
                self._loop = None

    async def _listen(self) -> Listener:
        host, port = parse_address(self.listen)
        try:
            listening = await listen(host, port, _WAITING_TO_BE_ACCEPTED)
        except OSError as error:
            why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
            raise ConfigError(
                f"can't listen on {self.listen}: {why}. Is another node running there, or is it not an address of this "
                "machine?"
            ) from error
        return Listener(listening, lambda connected: self._open(connected, Connection(self)), _ACCEPTED_AT_ONCE)

    def _open(self, connected: socket.socket, wire: Wire) -> None:
        """A connection begins, on a socket that is connected."""
        Stream(connected, wire, self.passes, self._read_buffer)

    def _catch_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():
            assert self._loop is not None
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, self.stop)

    def stop(self) -> None:
        """Ask the node to stop cleanly; returns at once. From any thread, any number of times."""
        self._stopping.set()
        if (loop := self._loop) is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended in this moment
                loop.call_soon_threadsafe(self._begin_stop)

    def close_callers(self) -> None:
        """Close the blocking connections; the next request opens a new one."""
        for caller in self._callers.values():
            caller.close()

    def close(self) -> None:
        """Stop, and close the blocking connections."""
        self.stop()
        self.close_callers()

    def _begin_stop(self) -> None:
        if self._driver is None:
            self._end(None)
            return
        self._driver.begin_stop()
        self._schedule()

    def _end(self, failure: BaseException | None) -> None:
        assert self._stopped is not None
        self._failure = self._failure or failure
        self._stopped.set()

    async def _close_all(self) -> None:
        """Let what was answered reach the clients, then end every connection."""
        for keeper in self._keepers.values():
            keeper.cancel()
        self._keepers.clear()
        wires: list[Wire] = [*self._connections, *self.links.values()]
        try:
            self.flush()
            for wire in wires:
                if wire.is_open:
                    wire.transport.close()
            for _ in range(20):
                if not any(wire.is_open for wire in wires):
                    break
                await asyncio.sleep(0.01)
        finally:
            for wire in wires:
                wire.cut()
            self.close_callers()

    # --- turns ---

    def deliver(self, letters: list[Letter], limited: bool = True) -> None:
        """Put what was received into the mailbox, and see that a turn follows. From any thread. The list is given
        away."""
        if not letters:
            return
        if insert(self.queue, letters, limited):
            self.wake()
        else:
            self._refuse(letters)

    def deliver_on_loop(self, letters: list[Letter], limited: bool) -> None:
        """As `deliver`, on the loop's thread, before the end of a pass, in which what has collected is written: for a
        driver, what comes between two turns is put into the mailbox together, when the turn begins."""
        if self._driver is None:
            self.deliver(letters, limited)
            self.end_pass_soon()
        elif limited and 0 < self.queue.maxsize <= self._arrived_batches:
            self._refuse(letters)
        else:
            self._arrived_batches += limited
            self._arrived += letters
            if not self._turn_due:
                self._schedule()

    def deliver_from_link(self, letters: list[Letter]) -> None:
        """As `deliver_on_loop`, for what our link to a member brings. If the driver can wait for it, it gets it with
        the next turn, which comes in any case."""
        if self._driver is not None and self._driver.may_wait(letters):
            self._arrived += letters
        elif letters:
            self.deliver_on_loop(letters, limited=False)

    def fill_mailbox(self) -> None:
        """A turn begins: what has arrived on the loop's thread since the last one comes into the mailbox."""
        if self._arrived:
            insert(self.queue, self._arrived, limited=False)
            self._arrived, self._arrived_batches = [], 0

    def _refuse(self, letters: list[Letter]) -> None:
        for letter in letters:
            assert isinstance(letter, Arrival), "only requests can be refused"
            letter.refuse("overloaded", "the mailbox of this node is full; try again later, or another node")
        self.end_pass_soon()

    def wake(self) -> None:
        """See that a turn follows soon. From any thread."""
        loop = self._loop
        if loop is None or self._turn_due:
            return
        if threading.get_ident() == self._loop_thread:
            self._schedule()
            return
        with contextlib.suppress(RuntimeError):  # the loop has ended in this moment
            loop.call_soon_threadsafe(self._schedule)

    def _schedule(self) -> None:
        if self._driver is not None and not self._turn_due and self._loop is not None:
            self._turn_due = True
            self.passes.end_soon()

    def _end_pass(self) -> None:
        """All that was ready has been read: take a turn if there is something for it, write the answers that needed
        none, and let connections go on that had to wait."""
        if self._turn_due:
            self._turn()
        elif self.unflushed or self.unflushed_members:
            self.flush()
        self._round_began = None
        if self._later:
            self._let_go_on()

    def _turn(self) -> None:
        """One turn of the driver; whatever it raises ends the node, as its state can't be trusted any more."""
        self._turn_due = False
        if self._stopped is None or self._stopped.is_set():
            return
        assert self._driver is not None
        assert self._loop is not None
        self.fill_mailbox()
        try:
            due = self._driver.cycle()
        except BaseException as failure:
            self._end(failure)
            return
        if self._stopping.is_set() and self._driver.is_idle:
            self._end(None)
            return
        if self._timer is None or self._timer.cancelled() or self._timer.when() > due:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(due, self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer = None
        self._schedule()

    def end_pass_soon(self) -> None:
        """See that what has collected is written, and that there is time again, when all that is ready has been read:
        for what is not followed by a turn. On the loop's thread; nothing happens while there is no loop."""
        if self._loop is not None:
            self.passes.end_soon()

    def flush(self) -> None:
        """Write every batch that has collected. Those for members come first: their disks have work to do while clients
        get their answers, each with a system call of its own."""
        self.unflushed_bytes = 0
        while self.unflushed_members:
            self.unflushed_members.pop().flush()
        while self.unflushed:
            self.unflushed.pop().flush()

    def has_time(self) -> bool:
        """False once half a heartbeat has gone by since the first that clients have sent in this pass. The rest is for
        later, so that turns come between, whatever clients send."""
        now = self.now()
        if self._round_began is None:
            self._round_began = now
        return now - self._round_began < self.settings.heartbeat_ms / 2000

    def go_on_later(self, connection: Connection) -> None:
        """Let a connection go on at the end of the pass; first come, first served."""
        self._later[connection] = None
        self.passes.end_soon()

    def _let_go_on(self) -> None:
        for connection in list(self._later):
            if not self.has_time():
                break
            del self._later[connection]
            connection.go_on()
        if self._later:
            self.passes.end_soon()

    async def _sweep(self) -> None:
        """Once a second: end connections that stall, are idle for too long, or links that nobody answers on."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = self.now()
            for connection in list(self._connections):
                if connection.is_surplus:
                    connection.refuse_surplus()
                elif self._is_overdue(connection, now):
                    connection.cut()
            if self._let_go:
                self.log.warning("clients_let_go", extra={"times": self._let_go, "limit": self.settings.client_bytes})
                self._let_go = 0
            for link in list(self.links.values()):
                oldest = link.oldest_wait()
                if oldest is not None and now - oldest > self.settings.stall_timeout_ms / 1000:
                    link.cut()

    def _is_overdue(self, connection: Connection, now: float) -> bool:
        stall, idle = self.settings.stall_timeout_ms / 1000, self.settings.idle_timeout_ms / 1000
        stuck_at = (connection.blocked_since, connection.begun_at, connection.lingers_since)
        stuck_since = [since for since in stuck_at if since is not None]
        if stuck_since:
            return now - min(stuck_since) > stall
        return connection.peer is None and connection.is_idle and now - connection.last_frame_at > idle

    # --- connections and links ---

    def admit_connection(self, connection: Connection) -> None:
        """Take a new connection. A few more than the limit may stay for as long as they may turn out to be members."""
        clients = sum(1 for other in self._connections if other.peer is None) if self._is_crowded else 0
        connection.is_surplus = clients >= self.settings.connections
        self._connections.add(connection)
        if clients >= self.settings.connections + _SURPLUS:
            connection.refuse_surplus()

    @property
    def _is_crowded(self) -> bool:
        return len(self._connections) >= self.settings.connections

    def has_memory_for(self, size: int, under_way: int) -> bool:
        """True when a request of so many bytes may be taken, beside those of its connection (`under_way`, in bytes) and
        of all others. Half of the memory is for who comes first; of the other half each connection has an equal share,
        so that who asks for little is served beside those who ask for all that they can."""
        half = self.settings.in_flight_bytes // 2
        return self.in_flight_bytes + size <= half or under_way + size <= half // max(1, len(self._connections))

    @property
    def is_full(self) -> bool:
        """True when more large answers must wait until those that have collected are written."""
        return self.unflushed_bytes > self.unflushed_high

    def note_held(self, connection: Connection, held: int) -> None:
        """A connection keeps so many bytes here now."""
        self.client_bytes += held - connection.held
        connection.held = held
        if self.client_bytes > self.settings.client_bytes:
            self._make_room()

    def _make_room(self) -> None:
        """Clients keep too much here: let go of whoever keeps most, until it is not too much any more."""
        limit = self.settings.client_bytes
        clients = sorted((c for c in self._connections if c.peer is None), key=lambda c: c.held)
        while clients and self.client_bytes > limit:
            self._let_go += 1
            clients.pop().let_go()

    def forget_connection(self, connection: Connection) -> None:
        """A connection has ended."""
        self._connections.discard(connection)
        self._later.pop(connection, None)
        self.note_held(connection, 0)
        if connection.is_link and not any(c.is_link and c.peer == connection.peer for c in self._connections):
            assert connection.peer is not None, "a link is a member's"
            self.deliver_on_loop([Cut(connection.peer, end=connection)], limited=False)

    def replace_connection(self, connection: MemberEnd, peer: str) -> None:
        """A member has opened a new link: an older one of its is closed first (TRAPS 36)."""
        for other in list(self._connections):
            if other.peer == peer and other.is_link and other is not connection:
                other.cut()

    def _keep_links(self) -> None:
        assert self._loop is not None
        for peer in self.peers:
            if peer not in self._keepers:
                self._keepers[peer] = self._loop.create_task(self._keep_linked(peer))
        for peer in set(self._keepers) - set(self.peers):
            self._keepers.pop(peer).cancel()
            if (link := self.links.get(peer)) is not None:
                link.cut()

    async def _keep_linked(self, peer: str) -> None:
        """Connect to `peer`, and again whenever the link ends, with growing pauses while it does not answer."""
        low, high = self.settings.reconnect_ms / 1000, self.settings.reconnect_high_ms / 1000
        pause, host_port = low, parse_address(peer)
        assert self._loop is not None
        while True:
            try:
                connected = await asyncio.wait_for(connect(*host_port), self.settings.stall_timeout_ms / 1000)
            except OSError:  # TimeoutError too
                await asyncio.sleep(pause)
                pause = min(2 * pause, high)
                continue
            started, link = self.now(), Link(self, peer)
            self._open(connected, link)
            await link.ended
            pause = low if self.now() - started > high else min(2 * pause, high)
            await asyncio.sleep(pause)

    def post(self, peer: str, message: PeerRequest) -> None:
        """Send a request of the consensus over the link to `peer`; nothing happens while there is none."""
        if (link := self.links.get(peer)) is not None:
            link.post(message)

    def can_forward(self, peer: str) -> bool:
        """True when a client's request can be passed on to `peer` now."""
        link = self.links.get(peer)
        return link is not None and link.is_ready and link.writable

    def forward(self, peer: str, request: ClientRequest, arrival: Arrival) -> None:
        """Pass a client's request on to `peer`; see `can_forward`."""
        self.links[peer].forward(request, arrival)

    @property
    def connection_count(self) -> int:
        return len(self._connections)

    # --- the codec, as dicts ---

    def decode_json(self, msg: bytes | str) -> dict[str, Any]:
        """One JSON object as a dict. Raises ProtocolError (`bad_request`, `too_large`) for everything else."""
        if len(msg) > self.settings.peer_frame_bytes:
            raise ProtocolError("too_large", f"a message of {len(msg)} bytes; at most {self.settings.peer_frame_bytes}")
        return decode_object(msg)

    def encode_json(self, msg: dict[str, Any]) -> bytes:
        """A dict as one line of JSON, newline included. Raises ProtocolError for what JSON can't hold."""
        return encode_object(msg)

    # --- one request from the caller's thread, over a blocking connection of its own ---

    def echo(self, peer: str) -> dict[str, Any] | None:
        """Ping `peer` and note in `live` whether it answered; its answer, or None."""
        answer = self._exchange(peer, {"type": "ping"})
        if answer is None:
            self.live.discard(peer)
        else:
            self.live.add(peer)
        return answer

    def ping(self, timeout: float) -> None:
        """Ping all peers every `timeout` seconds, until `stop`. Keeps `live`; the membership is not touched."""
        while not self._stopping.is_set():
            for peer in list(self.peers):
                self.echo(peer)
            self._stopping.wait(timeout)

    def heartbeat(self, peer: str, message: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """Send one heartbeat to the member `peer` and return its answer; None when it could not be had. Without a
        message it is one of term 0, which changes nothing and tells the peer's term and commit_id."""
        probe = {"term": 0, "leader": self.my_ip, "commit_id": 0}
        return self._exchange(peer, {"type": "heartbeat", **(message or probe)})

    def vote_request(self, peer: str, message: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """Send one vote request and return the answer; None when it could not be had. Without a message it is a
        pre-vote of term 0, which is always refused and tells the peer's term."""
        staged = {"address": self.my_ip, "term": 0, "commit_id": 0}
        probe = {"term": 0, "commit_id": 0, "staged": staged, "pre_vote": True}
        return self._exchange(peer, {"type": "vote_request", **(message or probe)})

    def send_data(self, peer: str | None = None, message: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """Send one data message to `peer` and return its answer; None when it could not be had. Without a peer: to all
        of them, and the answers come by peer. Without a message it is one of term 0, which changes nothing."""
        if peer is None:
            return {each: self.send_data(each, message) for each in list(self.peers)}
        probe = {"action": "commit", "term": 0, "leader": self.my_ip, "previous": {"term": 0, "commit_id": 0}}
        return self._exchange(peer, {"type": "data", **(message or probe)})

    def redirect_to_leader(self, message: dict[str, Any]) -> dict[str, Any]:
        """Pass a client's request on to the leader, by way of whichever member can be reached, and return its answer.
        Raises Unavailable (`no_leader`) when nobody could be reached, NotCommitted when a write was sent and its
        answer lost: it is not sent again."""
        for address in [*self.peers, self.my_ip]:
            try:
                return self._caller(address).exchange(message)
            except ConnectFailed:
                continue
            except (OSError, ProtocolError) as error:
                if message.get("type") in ("put", "delete"):
                    raise NotCommitted(
                        "not_committed", f"sent to {address}, but its answer was lost: {error}"
                    ) from error
        raise Unavailable("no_leader", "no member of the cluster could be reached")

    def reconnect(self, addr: str) -> bool:
        """Open the blocking connection to `addr` anew, in up to 20 tries; False when it could not be had."""
        for _ in range(RECONNECT_TRIES):
            try:
                self._caller(addr).reconnect()
            except (OSError, ProtocolError):
                if self._stopping.wait(self.settings.reconnect_ms / 1000):
                    return False
            else:
                return True
        return False

    def add_peer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Take the node at `message["address"]` as a member, as an `add_peer` request does, and return the leader's
        answer: true once that is committed, with the `cluster` and the `membership`. It is a learner first, and becomes
        a voter by itself. `node`: its node id, if that is known."""
        return self.redirect_to_leader({**message, "type": "add_peer"})

    def req_add_peer(self, addr: str) -> bool:
        """Ask the node at `addr` to take this one as a member; True when it is one."""
        cluster, node = self._identity or ("", "")
        message = {"type": "add_peer", "address": self.my_ip, "node": node, "cluster": cluster}
        answer = self.ask_as_client(addr, message)
        return answer is not None and answer.get("data") is True

    def ask_as_client(self, addr: str, message: dict[str, Any]) -> dict[str, Any] | None:
        """One request of a client to the node at `addr`, over a connection of its own, and its answer; None when it
        could not be had. This node need not be a member."""
        caller = Caller(addr, self.timeout, self.settings.peer_frame_bytes, lambda: None)
        try:
            return caller.exchange(message)
        except (OSError, ProtocolError) as error:
            self.log.info("no_answer", extra={"peer": addr, "why": str(error)})
            return None
        finally:
            caller.close()

    def _exchange(self, peer: str, message: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return self._caller(peer).exchange(message)
        except (OSError, ProtocolError) as error:
            self.log.info("no_answer", extra={"peer": peer, "why": str(error)})
            return None

    def _caller(self, peer: str) -> Caller:
        if peer not in self._callers:
            self._callers[peer] = Caller(peer, self.timeout, self.settings.peer_frame_bytes, self._greeting)
        return self._callers[peer]

    def _greeting(self) -> bytes | None:
        """What a blocking connection begins with, so that members take our requests; a plain transport has no name."""
        if self._identity is None:
            return None
        hello = self.hello()
        hello.link = False
        return encode(hello)
