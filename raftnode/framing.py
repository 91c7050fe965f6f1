"""Where one message ends and the next begins. Bytes in, frames out; no socket. Layer 1, pure.

A newline ends a message. For one-shot clients a whole object is also taken when no newline has come yet. So that the
same bytes mean the same messages however the network cuts them, a line may hold several objects: `split_line` parts
them, and whoever gets a line that is not one message calls it.
"""

from __future__ import annotations

import re
from typing import Final

_IN_STRING = re.compile(rb'(?:[^"\\]|\\.)*+', re.DOTALL)
_OUTSIDE = re.compile(rb'[^"{}]*+')
_QUOTE, _OPEN = b'"{'


class TooLong:
    """Stands for a message over the limit; the rest of its line is passed over."""


TOO_LONG: Final = TooLong()
Frame = bytes | TooLong


class _Scanner:
    """Finds the end of the object that a buffer begins with. It goes on where it stopped, so each byte is read once."""

    __slots__ = ("_at", "_depth", "_in_string")

    def __init__(self) -> None:
        self._at = 0
        self._depth = 0
        self._in_string = False

    def end(self, buffer: bytes | bytearray) -> int | None:
        """Position after the object's closing brace; None while it is not there."""
        while self._at < len(buffer):
            pattern = _IN_STRING if self._in_string else _OUTSIDE
            found = pattern.match(buffer, self._at)
            assert found is not None, "both patterns match the empty string"
            self._at = found.end()
            if self._at == len(buffer):
                return None
            byte = buffer[self._at]
            if self._in_string and byte != _QUOTE:
                return None  # a backslash is the last byte: what it escapes has not come yet
            self._at += 1
            if byte == _QUOTE:
                self._in_string = not self._in_string
            else:
                self._depth += 1 if byte == _OPEN else -1
                if self._depth == 0:
                    return self._at
        return None


def split_line(line: bytes) -> list[bytes]:
    """The messages in one line: each whole object at its beginning, and what is left, if it is not blank."""
    parts, rest = _take_objects(line)
    rest = rest.rstrip()
    return [*parts, rest] if rest else parts


def _take_objects(line: bytes) -> tuple[list[bytes], bytes]:
    """The whole objects at the beginning of a line, and what follows them, without blanks in front."""
    parts = []
    line = line.lstrip()
    while line.startswith(b"{") and (end := _Scanner().end(line)) is not None:
        parts.append(line[:end])
        line = line[end:].lstrip()
    return parts, line


class Framer:
    """Cuts one direction of one connection into frames.

    Invariant: `pending` never holds more than the limit plus what one `feed` brought.
    """

    def __init__(self, limit: int) -> None:
        """`limit`: the longest message in bytes."""
        self.limit = limit
        self.lines_only = False
        """True between members, which always send the newline: no search for bare objects."""
        self.pending = bytearray()
        self._skipping = False
        self._scanner = _Scanner()

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that these bytes complete, in order. A frame may be any bytes: it is for the codec to judge."""
        *lines, rest = data.split(b"\n")
        frames: list[Frame] = []
        for line in lines:
            self._end_line(line, frames)
        if rest and not self._skipping:
            self.pending += rest
            if not self.lines_only and rest.rstrip().endswith(b"}"):
                self._take_bare(frames)
            self._check_pending(frames)
        return frames

    @property
    def is_mid_message(self) -> bool:
        """True while a message has begun and not ended."""
        return bool(self.pending) or self._skipping

    def at_end(self) -> list[Frame]:
        """The stream has ended: what is left is a frame too, however broken."""
        frames: list[Frame] = []
        self._end_line(b"", frames)
        return frames

    def _end_line(self, line: bytes, frames: list[Frame]) -> None:
        if self._skipping:
            self._skipping = False
            return
        if self.pending:
            line = bytes(self.pending) + line
            self._clear()
        if len(line) > self.limit:
            self._end_long_line(line, frames)
        elif line and not line.isspace():
            frames.append(line)

    def _end_long_line(self, line: bytes, frames: list[Frame]) -> None:
        """A line over the limit may begin with messages that are not; after the first that is, nothing is taken."""
        parts, rest = _take_objects(line)
        for part in parts:
            if len(part) > self.limit:
                frames.append(TOO_LONG)
                return
            frames.append(part)
        if len(rest) > self.limit:
            frames.append(TOO_LONG)
        elif rest and not rest.isspace():
            frames.append(rest)

    def _take_bare(self, frames: list[Frame]) -> None:
        while True:
            blank = len(self.pending) - len(self.pending.lstrip())
            if blank:
                del self.pending[:blank]
                self._scanner = _Scanner()
            if not self.pending.startswith(b"{"):
                return
            end = self._scanner.end(self.pending)
            if end is None:
                return
            part = bytes(self.pending[:end])
            del self.pending[:end]
            self._scanner = _Scanner()
            if len(part) > self.limit:
                self._skip(frames)
                return
            frames.append(part)

    def _check_pending(self, frames: list[Frame]) -> None:
        if len(self.pending) > self.limit and not self.lines_only:
            self._take_bare(frames)  # this also drops blanks in front
        if len(self.pending) > self.limit:
            self._skip(frames)

    def _skip(self, frames: list[Frame]) -> None:
        frames.append(TOO_LONG)
        self._skipping = True
        self._clear()

    def _clear(self) -> None:
        self.pending = bytearray()
        self._scanner = _Scanner()
