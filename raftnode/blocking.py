"""A blocking connection that carries one request at a time: for the client and for other threads. Layer 2."""

from __future__ import annotations

import socket
import time

from raftnode.config import parse_address
from raftnode.errors import ProtocolError


class ConnectFailed(OSError):
    """No connection could be made: nothing was sent."""


class LineConnection:
    """A socket that speaks lines. After any failure it is closed, so that a late answer is never taken for another's."""

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
        self._socket.setblocking(False)
        try:
            return self._socket.recv(1, socket.MSG_PEEK) is not None
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        self._socket.close()
