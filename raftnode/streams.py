"""Sockets on the node's loop: what asyncio's transports are, for those that are read and written all the time. Layer 2.

Each read costs asyncio a handle, a context and a callback, besides the socket's own work. Here the selector of the loop
(`passes`) reads the streams that it finds ready itself. With 100 clients that gives 5 % more reads and 7 % more puts,
with one 9 % more puts, and the end of a pass needs no book of what was read.

A `Stream` has the interface of asyncio's transports, calls its protocol as they do, and is like them where something
ends: `connection_lost` comes once, and never from inside of a call to the stream. `tests/test_streams.py` asks both.
What it does besides is to ask the protocol before it reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import selectors
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final

from raftnode.passes import PassSelector

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
_NOT_NOW: Final = (BlockingIOError, InterruptedError)
_HIGH: Final = 64 * 1024
"""Bytes that may be unsent, unless the protocol says otherwise; as asyncio has it."""
_ACCEPT_AGAIN_S: Final = 1.0
"""After the system had nothing left to accept a connection with, an open file say."""


class StreamProtocol(asyncio.Protocol):
    """Whom a stream calls: asyncio's protocol, which is asked besides whether it takes anything now."""

    def may_read(self) -> bool:
        """Asked when something has come, before it is read. What it says no to stays with the system: it pauses reading
        then, and later resumes it and calls `Stream.read_now`."""
        return True


class Stream(asyncio.Transport):
    """One connected socket. All of it on the loop's thread.

    Invariants: the selector watches it for exactly what it waits for; while something is unsent, nothing overtakes it.
    """

    def __init__(
        self, connected: socket.socket, protocol: StreamProtocol, passes: PassSelector, buffer: memoryview
    ) -> None:
        """Take the socket over, which does not block, and begin. `buffer` is where it puts what it reads next; all can
        share one, as what came is copied out at once: one made for each read costs three system calls."""
        super().__init__({"socket": connected, "peername": _peer_of(connected)})
        self._socket = connected
        self._protocol = protocol
        self._passes = passes
        self._buffer = buffer
        self._loop = asyncio.get_running_loop()
        self._unsent = bytearray()
        self._watched = 0
        self._is_reading = True
        self._is_held_up = False
        """The protocol was told that too much is unsent."""
        self._is_closing = False
        self._is_over = False
        """The protocol hears of its end next."""
        self._ends_sending = False
        self.set_write_buffer_limits()
        try:
            protocol.connection_made(self)
        except Exception as error:
            self._fail(error)
        self._watch()

    # --- what the selector finds ---

    def _ready(self, events: int) -> None:
        """It can be read or written, as the system says."""
        try:
            if events & self._watched & READ and self._protocol.may_read():
                self._read()
            if events & self._watched & WRITE:
                self._send_more()
        except Exception as error:
            self._fail(error)

    def read_now(self) -> None:
        """Read what has come, if this stream is reading: the protocol's turn has come, and it is not asked again."""
        try:
            if self._watched & READ:
                self._read()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """A defect of its protocol ends this stream alone, and is told."""
        self._loop.call_exception_handler({"message": "a connection has failed", "exception": error, "transport": self})
        self._break(error)

    def _read(self) -> None:
        try:
            count = self._socket.recv_into(self._buffer)
        except _NOT_NOW:
            return
        except OSError as error:
            self._break(error)
            return
        if count:
            self._protocol.data_received(bytes(self._buffer[:count]))
        else:
            stays_open = self._protocol.eof_received()
            self.pause_reading()
            if not stays_open:
                self.close()

    def _send_more(self) -> None:
        try:
            sent = self._socket.send(self._unsent)
        except _NOT_NOW:
            return
        except OSError as error:
            self._break(error)
            return
        del self._unsent[:sent]
        if self._is_held_up and len(self._unsent) <= self._low:
            self._is_held_up = False
            self._protocol.resume_writing()
        if not self._unsent:
            self._watch()
            if self._is_closing:
                self._end_soon(None)
            elif self._ends_sending:
                self._shut()

    def _watch(self) -> None:
        """Have the selector look for what this stream waits for."""
        wanted = (READ if self._is_reading else 0) | (WRITE if self._unsent else 0)
        if wanted == self._watched:
            return
        if not self._watched:
            self._passes.register(self._socket, wanted, self._ready)
        elif wanted:
            self._passes.modify(self._socket, wanted, self._ready)
        else:
            self._passes.unregister(self._socket)
        self._watched = wanted

    # --- asyncio.Transport ---

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send it, or as much as the system takes now; the rest follows by itself."""
        if self._is_over:
            return
        if not self._unsent:
            try:
                sent = self._socket.send(data)
            except _NOT_NOW:
                sent = 0
            except OSError as error:
                self._break(error)
                return
            if sent == len(data):
                return
            data = memoryview(data)[sent:]
        self._unsent += data
        self._watch()
        if len(self._unsent) > self._high and not self._is_held_up:
            self._is_held_up = True
            self._protocol.pause_writing()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """The protocol is told when more than `high` bytes are unsent, and when not more than `low` are any more."""
        self._high = _HIGH if high is None else high
        self._low = self._high // 4 if low is None else low

    def get_write_buffer_size(self) -> int:
        """Bytes that are unsent."""
        return len(self._unsent)

    def is_reading(self) -> bool:
        return self._is_reading

    def pause_reading(self) -> None:
        self._is_reading = False
        self._watch()

    def resume_reading(self) -> None:
        if not self._is_closing:
            self._is_reading = True
            self._watch()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        """Tell the other end, behind what is unsent, that nothing more will come."""
        self._ends_sending = True
        if not self._unsent:
            self._shut()

    def _shut(self) -> None:
        with contextlib.suppress(OSError):  # the other end is gone: reading tells
            self._socket.shutdown(socket.SHUT_WR)

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        """Read no more; end when all is sent."""
        self._is_closing = True
        self.pause_reading()
        if not self._unsent:
            self._end_soon(None)

    def abort(self) -> None:
        """End at once; what is unsent is dropped."""
        self._break(None)

    # --- the end ---

    def _break(self, error: Exception | None) -> None:
        self._is_closing = True
        self._unsent.clear()
        self.pause_reading()
        self._end_soon(error)

    def _end_soon(self, error: Exception | None) -> None:
        if not self._is_over:
            self._is_over = True
            self._loop.call_soon(self._end, error)

    def _end(self, error: Exception | None) -> None:
        try:
            self._protocol.connection_lost(error)
        finally:
            self._socket.close()
            del self._protocol  # which knows this stream: what it keeps would wait for the collector of cycles


def _peer_of(connected: socket.socket) -> Any:
    """The address at the other end; None when that has gone already, as the first read will tell."""
    try:
        return connected.getpeername()
    except OSError:
        return None


class Listener:
    """Listens, and hands out the connections that come, a few at a time."""

    def __init__(
        self, listening: list[socket.socket], accepted: Callable[[socket.socket], object], at_once: int
    ) -> None:
        """`accepted` is given each new socket, which does not block; at most `at_once` before others have a turn."""
        self._listening = listening
        self._accepted = accepted
        self._at_once = at_once
        self._loop = asyncio.get_running_loop()
        self._log = logging.getLogger("raftnode.transport")
        for one in listening:
            one.setblocking(False)
            self._loop.add_reader(one, self._accept, one)

    def _accept(self, one: socket.socket) -> None:
        for _ in range(self._at_once):
            try:
                connected, _ = one.accept()
                connected.setblocking(False)
            except (*_NOT_NOW, ConnectionAbortedError):
                return
            except OSError as error:
                self._log.warning("accept_failed", extra={"why": str(error)})
                self._loop.remove_reader(one)
                self._loop.call_later(_ACCEPT_AGAIN_S, self._accept_again, one)
                return
            self._accepted(connected)

    def _accept_again(self, one: socket.socket) -> None:
        if one in self._listening:
            self._loop.add_reader(one, self._accept, one)

    def close(self) -> None:
        """Listen no more."""
        for one in self._listening:
            self._loop.remove_reader(one)
            one.close()
        self._listening.clear()


async def listen(host: str, port: int, backlog: int) -> list[socket.socket]:
    """A listening socket for each address that `host` has, of those kinds that this system knows; the kernel keeps
    `backlog` connections that wait to be accepted. Raises OSError."""
    listening: list[socket.socket] = []
    unknown = OSError(f"{host} has no address")
    try:
        for family, _, _, _, address in await _addresses(host, port):
            try:
                listening.append(socket.create_server(address, family=family, backlog=backlog))
            except OSError as error:
                if error.errno != errno.EAFNOSUPPORT:
                    raise
                unknown = error  # a name such as localhost has an IPv6 address, and the system has no IPv6
    except BaseException:
        for one in listening:
            one.close()
        raise
    if not listening:
        raise unknown
    return listening


async def connect(host: str, port: int) -> socket.socket:
    """A socket that is connected, by the first address that takes it, and does not block. Raises OSError."""
    loop, failure = asyncio.get_running_loop(), OSError(f"{host} has no address")
    for family, kind, protocol, _, address in await _addresses(host, port):
        one = socket.socket(family, kind, protocol)
        try:
            one.setblocking(False)
            await loop.sock_connect(one, address)
        except OSError as error:
            one.close()
            failure = error
        except BaseException:
            one.close()
            raise
        else:
            return one
    raise failure


async def _addresses(host: str, port: int) -> list[tuple[Any, ...]]:
    """What `host` stands for, each address once: a name may be told with one of them twice. What is an address itself
    needs no thread to be looked up."""
    found: Sequence[tuple[Any, ...]]
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(found))
