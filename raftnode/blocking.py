"""Blocking connections, one request at a time: for the client, and for threads beside the loop. Layer 2."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from raftnode.config import parse_address
from raftnode.errors import ProtocolError
from raftnode.messages import decode_object, encode_object


class ConnectFailed(OSError):
    """No connection could be made: nothing was sent."""


class LineConnection:
    """A socket that speaks lines. After a failure it is closed, so that a late answer is never taken for another's."""

    def __init__(self, address: str, timeout: float, limit: int) -> None:
        """Connect to `host:port` within `timeout` seconds. `limit`: longest answer in bytes. Raises ConnectFailed."""
        self.address = address
        self._limit = limit
        self._rest = b""
        try:
            self._socket = socket.create_connection(parse_address(address), timeout)
        except OSError as error:
            raise ConnectFailed(f"{address}: {error.strerror or error}") from error
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def request(self, line: bytes, timeout: float) -> bytes:
        """Send one line and return the line that answers it. Raises OSError (TimeoutError after `timeout` seconds):
        the request may have been taken. Raises ProtocolError for an answer over the limit."""
        deadline = time.monotonic() + timeout
        try:
            self._socket.settimeout(timeout)
            self._socket.sendall(line)
            return self._read_line(deadline)
        except BaseException:
            self.close()
            raise

    def _read_line(self, deadline: float) -> bytes:
        parts, size = [self._rest], len(self._rest)
        while b"\n" not in parts[-1]:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no answer from {self.address} in time")
            self._socket.settimeout(left)
            part = self._socket.recv(1 << 18)
            if not part:
                raise ConnectionResetError(f"{self.address} closed the connection")
            parts.append(part)
            size += len(part)
            if size > self._limit:
                raise ProtocolError("too_large", f"the answer of {self.address} is longer than {self._limit} bytes")
        line, _, self._rest = b"".join(parts).partition(b"\n")
        return line

    def is_stale(self) -> bool:
        """True when the other end has closed, or sent what nobody asked for: do not use it for another request."""
        if self._rest:
            return True
        try:
            self._socket.setblocking(False)
            return self._socket.recv(1, socket.MSG_PEEK) is not None
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        self._socket.close()


class Caller:
    """A connection to one address that is opened when needed and kept; any thread may call, one at a time."""

    def __init__(self, address: str, timeout: float, limit: int, greeting: Callable[[], bytes | None]) -> None:
        """`greeting` gives the line that a new connection begins with, None for none."""
        self.address = address
        self._timeout = timeout
        self._limit = limit
        self._greeting = greeting
        self._lock = threading.Lock()
        self._connection: LineConnection | None = None

    def exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        """One request and its answer. Raises ConnectFailed when nothing was sent, ProtocolError when the other side
        refused the greeting or answered what is no JSON, OSError when the request may have been taken."""
        line = encode_object(message)
        with self._lock:
            if self._connection is not None and self._connection.is_stale():
                self._close()
            connection = self._connection or self._open()
            try:
                return decode_object(connection.request(line, self._timeout))
            except BaseException:
                self._close()
                raise

    def reconnect(self) -> None:
        """A new connection in place of the old. Raises ConnectFailed or ProtocolError."""
        with self._lock:
            self._close()
            self._open()

    def close(self) -> None:
        with self._lock:
            self._close()

    def _open(self) -> LineConnection:
        connection = LineConnection(self.address, self._timeout, self._limit)
        greeting = self._greeting()
        if greeting is not None:
            try:
                self._greet(connection, greeting)
            except BaseException:
                connection.close()
                raise
        self._connection = connection
        return connection

    def _greet(self, connection: LineConnection, greeting: bytes) -> None:
        try:
            answer = decode_object(connection.request(greeting, self._timeout))
        except OSError as error:
            raise ConnectFailed(f"{self.address}: {error}") from error
        if answer.get("data") is not True:
            detail = answer.get("error")
            code, words = (detail.get("code"), detail.get("message")) if isinstance(detail, dict) else (None, None)
            raise ProtocolError(str(code or "bad_request"), f"{self.address} refused us: {words or answer}")

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
