"""The two kinds of connection on the node's loop: a `Connection`, which others opened, and a `Link`, which we did.
Layer 2.

Both only move messages between socket and mailbox. Answers and requests collect in `_out` and go out in one write when
the cycle flushes, which is one system call for a whole batch.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from msgspec import UNSET

from raftnode.errors import ProtocolError
from raftnode.framing import Frame, Framer, Parting, TooLong
from raftnode.mailbox import Arrival, Cut, Greeting, Letter, Reply
from raftnode.messages import (
    Answer,
    AnyRequest,
    ClientRequest,
    Get,
    Hello,
    HelloAnswer,
    Id,
    Malformed,
    PeerRequest,
    Put,
    check_value,
    decode_answer,
    decode_request,
    encode,
    failure,
)
from raftnode.streams import Stream, StreamProtocol

_MOST_AT_ONCE: Final = 1024
"""Frames of one connection that are decoded before others have their turn."""
_BAD_COUNTS: Final = 8
"""A frame that is no request costs about as much as so many that are: it is looked at again to say why."""
_FRAME_BYTES: Final = 48
"""What a frame that waits takes besides its text."""

if TYPE_CHECKING:
    from raftnode.transport import Transport


class Wire(StreamProtocol):
    """What both ends share: framing in, batched writes out."""

    transport: Stream

    def __init__(self, owner: Transport, limit: int) -> None:
        self.owner = owner
        self.is_members = False
        """Another member is at the other end: its batch goes out first."""
        self.framer = Framer(limit)
        self.is_open = False
        self.writable = True
        """False while the other end does not take what it was sent."""
        self.blocked_since: float | None = None
        self._out: list[bytes] = []
        self._out_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(Stream, transport)
        self.transport.set_write_buffer_limits(high=self.owner.settings.send_buffer_bytes)
        self.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        """Take what has come."""
        raise NotImplementedError

    def send(self, message: Answer | PeerRequest | ClientRequest | Hello) -> None:
        """Put a message into the batch that goes out with the next flush."""
        line = encode(message)
        self._out.append(line)
        self._out_bytes += len(line)
        (self.owner.unflushed_members if self.is_members else self.owner.unflushed).add(self)
        self.owner.unflushed_bytes += len(line)

    def flush(self) -> None:
        """Write the batch."""
        out, self._out = self._out, []
        if self.is_open and out:
            self.transport.write(out[0] if len(out) == 1 else b"".join(out))
        self._out_bytes = 0

    def pause_writing(self) -> None:
        self.writable = False
        self.blocked_since = self.owner.now()

    def resume_writing(self) -> None:
        self.writable = True
        self.blocked_since = None

    def cut(self) -> None:
        """End the connection at once."""
        if self.is_open:
            self.transport.abort()


@dataclass(slots=True)
class _Refused:
    """An answer that waits for its turn: to a message that never became a request."""

    answer: Answer

    @property
    def id(self) -> Id:
        return self.answer.id


@dataclass(slots=True)
class _Line:
    """What is left of a line that is not one message."""

    parting: Parting
    refusal: _Refused | None
    """The answer to the whole line, until it is known whether it has several parts."""


_UNOPENED: Final = (bytes, _Line, TooLong)
"""What was not looked at yet: most of a backlog, and asked for as that, since a miss takes isinstance four times as
long as a hit."""


class Connection(Wire):
    """A connection that a client or another member opened.

    Requests with an id may overlap. Those without are carried out one after the other, so their answers keep the order
    of the requests. Invariant: at most `pipeline_requests` are under way; the rest waits in `_backlog`, and while there
    is a backlog, or the other end does not take its answers, nothing more is read.
    """

    def __init__(self, owner: Transport) -> None:
        super().__init__(owner, owner.settings.frame_bytes)
        self.peer: str | None = None
        self.is_link = False
        """True for a member's one link; it may have further connections for single requests."""
        self.client = ""
        self.last_frame_at = owner.now()
        """When the last whole message came, or the connection."""
        self.begun_at: float | None = None
        """When the message began that is not whole yet, and for which this node waits: it must be so within
        `stall_timeout_ms`."""
        self.is_surplus = False
        """Over the limit: only a member may stay."""
        self.held = 0
        """Bytes that this connection keeps at the node, besides requests under way, when it was looked at last."""
        self._backlog: deque[Frame | _Line | Arrival | _Refused] = deque()
        self._backlog_bytes = 0  # what has come into the backlog since it was empty
        self._is_late = False  # something has come when there was no time: it is read when others have had their turn
        self._under_way = 0
        self._under_way_bytes = 0
        self._in_order = False  # a request without id is under way
        self._is_greeting = False  # a hello is under way: nothing that follows it is taken before it is answered
        self._is_paused = False
        self._is_closing = False  # nothing more is taken; what is under way is still answered
        self._has_heard_all = False  # the other end will say no more
        self.lingers_since: float | None = None
        """When this node had said all, to somebody who may still be talking: see `_close_when_done`."""

    # --- asyncio's side ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        address = self.transport.get_extra_info("peername")
        self.client = f"{address[0]}:{address[1]}" if address else "?"
        self.owner.admit_connection(self)

    def may_read(self) -> bool:
        """What comes when there is no time for it waits with the system, where it is no burden to this node."""
        if self._is_closing or self._has_time():
            return True
        self._is_late = True
        self._read_on(False)
        self._pump_soon()
        return False

    def data_received(self, data: bytes) -> None:
        if self._is_closing:
            return  # a stranger that was refused goes on talking
        now, frames = self.owner.now(), self.framer.feed(data)
        if frames:
            self.last_frame_at = now
            self._backlog.extend(frames)
            self._backlog_bytes += len(data) + _FRAME_BYTES * len(frames)
        if not self.framer.is_mid_message:
            self.begun_at = None
        elif frames or self.begun_at is None:
            self.begun_at = now
        self._pump()

    def _has_time(self) -> bool:
        """What members say does not wait for its turn behind clients; their windows bound it."""
        return self.peer is not None or self.owner.has_time()

    def eof_received(self) -> bool:
        """The other end has said all; it still gets its answers (`printf ... | nc`)."""
        if not self._is_closing:
            self._backlog.extend(self.framer.at_end())
        self._is_closing = self._has_heard_all = True
        self.begun_at = None
        self._pump()
        self._close_when_done()
        return True

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - how it ended makes no difference
        self.is_open = False
        self._backlog.clear()
        self.owner.forget_connection(self)

    # --- in ---

    def _pump(self) -> None:
        """From the backlog to the mailbox, as far as order and limits let. While some must wait, nothing is read.

        Frames are decoded only here, and only so many at a time and while there is time, so that no client takes the
        loop for itself.
        """
        ready: list[Letter] = []
        owner, backlog, limit, decoded = self.owner, self._backlog, self.owner.settings.pipeline_requests, 0
        while backlog and not self._is_greeting and not self.is_full and self._under_way < limit:
            item = backlog.popleft()
            if isinstance(item, _UNOPENED):
                if decoded and (decoded >= _MOST_AT_ONCE or not self._has_time()):
                    backlog.appendleft(item)
                    self._pump_soon()
                    break
                opened, cost = self._open(item)
                decoded += cost
                if opened is None:
                    continue  # what came of it is at the front of the backlog
                item = opened
            if self._in_order and item.id is UNSET:
                backlog.appendleft(item)
                break
            if isinstance(item, _Refused):
                self.send(item.answer)
            elif (answer := self._answer_at_once(item.message)) is not None:
                self.send(answer)
            elif owner.has_memory_for(item.size, self._under_way_bytes) or self._may_not_be_refused(item):
                self._begin(item)
                ready.append(item)
            else:
                self.send(failure(item.message.name, "overloaded", "too much waits at this node", item.id))
        if backlog and owner.is_full:
            self._pump_soon()
        if ready:
            owner.deliver_on_loop(ready, limited=self.peer is None)
        else:
            owner.end_pass_soon()
        may_read = not backlog
        if self._is_paused is may_read:
            self._read_on(may_read)
        if self.held or backlog or self.framer.pending:
            self._note_held()

    def _answer_at_once(self, message: AnyRequest) -> Answer | None:
        """The driver's answer to a local read; None for all else."""
        if type(message) is Get and message.consistency == "local":
            if (answer := self.owner.answer_at_once(message)) is not None:
                answer.id = message.id
            return answer
        return None

    def _may_not_be_refused(self, arrival: Arrival) -> bool:
        """What members say of the consensus is bounded by their windows, and a hello is short. If they could be
        refused, the clients of a busy node could end the rule of a leader, or keep a member out."""
        is_members = self.peer is not None and not isinstance(arrival.message, ClientRequest)
        return is_members or isinstance(arrival.message, Hello)

    def _pump_soon(self) -> None:
        """Go on when others have had their turn."""
        self.owner.go_on_later(self)

    def go_on(self) -> None:
        """Others have had their turn."""
        if self.is_open:
            self._pump()
            if self._is_late and not self._is_paused:
                self._is_late = False
                self.transport.read_now()

    def _open(self, item: Frame | _Line) -> tuple[Arrival | _Refused | None, int]:
        """What a frame holds: a request, or a refusal. None when it may be several, or more has to be looked at first:
        what is left of it stands at the front of the backlog then. And what that has cost, in frames."""
        if isinstance(item, bytes):
            return self._decode(item, self.framer.lines_only)
        if isinstance(item, _Line):
            return self._part(item)
        why = f"a message of more than {self.framer.limit} bytes; the rest of its line is dropped"
        return _Refused(failure("error", "too_large", why)), 1

    def _part(self, item: _Line) -> tuple[Arrival | _Refused | None, int]:
        part = item.parting.next()
        if part is None:
            self._backlog.appendleft(item)  # go on when others have had their turn
            return None, _MOST_AT_ONCE
        if item.refusal is not None and item.parting.is_over:
            return item.refusal, _BAD_COUNTS
        item.refusal = None
        if not item.parting.is_over:
            self._backlog.appendleft(item)
        return self._decode(part, is_part=True)

    def _decode(self, frame: bytes, is_part: bool) -> tuple[Arrival | _Refused | None, int]:
        try:
            message = decode_request(frame)
            if isinstance(message, Put):
                check_value(message.value, self.owner.settings)
        except Malformed as error:
            refusal = _Refused(error.answer())
            if is_part or error.is_object:
                return refusal, _BAD_COUNTS
            self._backlog.appendleft(_Line(Parting(frame), refusal))
            return None, _BAD_COUNTS
        except ProtocolError as error:
            return _Refused(failure(message.name, error.code, str(error), message.id)), _BAD_COUNTS
        if self.is_surplus and not isinstance(message, Hello):
            self.refuse_surplus()
            return None, 1
        return Arrival(message, self, len(frame), is_checked=True), 1

    def _begin(self, arrival: Arrival) -> None:
        self._under_way += 1
        self._under_way_bytes += arrival.size
        self.owner.in_flight_bytes += arrival.size
        if arrival.message.id is UNSET:
            self._in_order = True
        if type(arrival.message) is Hello:
            self._is_greeting = True

    def _finish(self, arrival: Arrival) -> None:
        self._under_way -= 1
        self._under_way_bytes -= arrival.size
        self.owner.in_flight_bytes -= arrival.size
        if arrival.message.id is UNSET:
            self._in_order = False
        if type(arrival.message) is Hello:
            self._is_greeting = False

    def _read_on(self, may_read: bool) -> None:
        may_read = may_read or self._is_closing  # what comes after all was taken is dropped
        if self._is_paused is not may_read or not self.is_open or self._has_heard_all:
            return
        self._is_paused = not may_read
        if may_read:
            self.transport.resume_reading()
            self.begun_at = self.owner.now() if self.framer.is_mid_message else None
        else:
            self.transport.pause_reading()
            self.begun_at = None  # the time that this node takes does not count

    # --- what it keeps here ---

    def _note_held(self) -> None:
        """Tell the owner what this connection keeps at the node, besides requests under way. Those whose requests come
        and are answered keep nothing, and mostly need not be looked at: it is done when they do, or did."""
        if not self._backlog:
            self._backlog_bytes = 0
        held = len(self.framer.pending) + self._backlog_bytes + self._out_bytes
        if self.is_open:
            held += self.transport.get_write_buffer_size()
        if held != self.held:
            self.owner.note_held(self, held)

    def let_go(self) -> None:
        """Others need the memory. A message that is not whole is refused; who keeps more than that is cut off."""
        begun = len(self.framer.pending)
        if 2 * begun > self.held and self.is_open:
            self.framer.pass_over()
            self.begun_at = None
            why = "too much waits at this node; the rest of this line is dropped"
            self._backlog.append(_Refused(failure("error", "overloaded", why)))
            self._pump_soon()
            self.owner.note_held(self, self.held - begun)
        else:
            self._is_closing = True
            self.cut()
            self.owner.note_held(self, 0)

    # --- out ---

    @property
    def is_full(self) -> bool:
        """True also when nobody is there any more: reading values for them would be in vain, and many may wait."""
        if not self.is_open or not self.writable:
            return True
        owner = self.owner
        return self._out_bytes > owner.settings.send_buffer_bytes or owner.unflushed_bytes > owner.unflushed_high

    @property
    def is_idle(self) -> bool:
        """True when nothing is under way and nothing half received."""
        return self._under_way == 0 and not self._backlog and not self.framer.is_mid_message

    def answer(self, arrival: Arrival, answer: Answer) -> None:
        self._finish(arrival)
        if self.is_open:
            answer.id = arrival.message.id
            self.send(answer)

    def defer(self, arrival: Arrival) -> None:
        self._finish(arrival)
        if self.is_open:
            self._backlog.appendleft(arrival)
            self._pump_soon()

    def flush(self) -> None:
        super().flush()
        if self._backlog:
            self._pump_soon()
        if self._is_closing:
            self._close_when_done()
        if self.held or self._backlog or self.framer.pending or self.transport.get_write_buffer_size():
            self._note_held()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._pump_soon()
        self._note_held()

    def _close_when_done(self) -> None:
        """End the connection once all is answered. If the other end still talks, only this side is ended, and what
        comes is dropped until it has seen that (or for `stall_timeout_ms`): to close a socket with something unread in
        it is a reset, which drops the answers that are on their way."""
        has_answered = self._under_way == 0 and not self._backlog and not self._out
        if not (self._is_closing and has_answered and self.is_open):
            return
        if self._has_heard_all:
            self.transport.close()
        elif self.lingers_since is None:
            self.lingers_since = self.owner.now()
            self.transport.write_eof()
            self._read_on(True)

    def refuse_surplus(self) -> None:
        """This node has as many connections as it takes."""
        why = "this node has as many connections as it takes; try another node"
        self.send(failure("error", "overloaded", why))
        self.owner.end_pass_soon()
        self.is_surplus = False
        self.close_after_answer()
        self._has_heard_all = True  # nobody lingers in a storm

    def close_after_answer(self) -> None:
        """Send what is due, then end the connection: somebody who was refused. Of what waits only requests are due that
        were taken before, and put back; what came later is dropped."""
        taken = [item for item in self._backlog if isinstance(item, Arrival)]
        self._backlog.clear()
        self._backlog.extend(taken)
        self._is_closing = True
        self.begun_at = None

    def become_link_of(self, peer: str, is_link: bool) -> None:
        """The other end is a member: it may send whole batches, and always ends its lines."""
        self.peer, self.is_link, self.is_surplus = peer, is_link, False
        self.is_members = True
        self.framer.limit = self.owner.settings.peer_frame_bytes
        self.framer.lines_only = True


class Link(Wire):
    """Our connection to another member: requests out, answers in. Not used before the election has admitted it."""

    def __init__(self, owner: Transport, peer: str) -> None:
        super().__init__(owner, owner.settings.peer_frame_bytes)
        self.peer = peer
        self.is_members = True
        self.framer.lines_only = True
        self.is_ready = False
        """True once both sides have said hello and agreed."""
        self.ended = asyncio.get_running_loop().create_future()
        self._next_id = 0
        self._waiting: dict[int, tuple[float, Arrival | None]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.owner.links[self.peer] = self
        self._request(self.owner.hello(self.peer))
        self.flush()

    def admit(self) -> None:
        """The election has checked who answers at the other end: the link may be used."""
        if self.is_open:
            self.is_ready = True
            self.owner.live.add(self.peer)

    def post(self, message: PeerRequest) -> None:
        """Send a request of the consensus; its answer comes by the mailbox. One link's requests keep their order."""
        if self.is_ready and self.writable:
            self._request(message)

    def forward(self, request: ClientRequest, arrival: Arrival) -> None:
        """Pass on a client's request; the answer comes by the mailbox, with `arrival`."""
        self._request(request, arrival)

    def _request(self, message: PeerRequest | ClientRequest | Hello, arrival: Arrival | None = None) -> None:
        self._next_id += 1
        message.id = self._next_id
        self._waiting[self._next_id] = (self.owner.now(), arrival)
        self.send(message)

    def oldest_wait(self) -> float | None:
        """When the oldest unanswered request was sent."""
        return next((sent for sent, _ in self._waiting.values()), None)

    def data_received(self, data: bytes) -> None:
        letters: list[Letter] = []
        try:
            for frame in self.framer.feed(data):
                self._take_frame(frame, letters)
        except ProtocolError as error:
            self.owner.log.warning("link_broken", extra={"peer": self.peer, "why": str(error)})
            self.cut()
        self.owner.deliver_from_link(letters)

    def _take_frame(self, frame: Frame, letters: list[Letter]) -> None:
        if isinstance(frame, TooLong):
            raise ProtocolError("too_large", "an answer over the limit")
        answer = decode_answer(frame)
        if not isinstance(answer.id, int) or answer.id not in self._waiting:
            detail = "" if answer.error is UNSET else f": {answer.error.message}"
            raise ProtocolError("bad_request", f"an answer to nothing that was asked{detail}")
        _, arrival = self._waiting.pop(answer.id)
        if isinstance(answer, HelloAnswer):
            letters.append(Greeting(self, answer))
        else:
            letters.append(Reply(self.peer, answer, arrival))

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - how it ended makes no difference
        self.is_open = self.is_ready = False
        if self.owner.links.get(self.peer) is self:
            del self.owner.links[self.peer]
            self.owner.live.discard(self.peer)
        forwarded = [arrival for _, arrival in self._waiting.values() if arrival is not None]
        self._waiting.clear()
        self.owner.deliver_from_link([Cut(self.peer, self, forwarded=forwarded)])
        if not self.ended.done():
            self.ended.set_result(None)
