"""Where one message ends and the next begins. Bytes in, frames out; no socket. Layer 1, pure.

A newline ends a message. For one-shot clients a whole object is also taken when no newline has come yet. So that the
same bytes mean the same messages however the network cuts them, a line may hold several objects: `next_part` parts
them, and whoever gets a line that is not one message calls it.
"""

from __future__ import annotations

import re
from typing import Final

_IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_BLANKS = re.compile(rb"\s*+")
_OUTSIDE = re.compile(rb'[^"{}]*+')
_QUOTE, _OPEN = b'"{'


class TooLong:
    """Stands for a message over the limit; the rest of its line is passed over."""


TOO_LONG: Final = TooLong()
Frame = bytes | TooLong


class _Scanner:
    """Finds the end of the object that begins at a position. It goes on where it stopped, so each byte is read once."""

    __slots__ = ("_at", "_depth", "_in_string")

    def __init__(self, start: int) -> None:
        self._at = start
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

    def move(self, by: int) -> None:
        """So many bytes were taken from the front of the buffer."""
        self._at -= by


def next_part(line: bytes, start: int) -> tuple[bytes, int]:
    """The message at `start` of a line that is not one message: the object that begins there, or all that is left. With
    it, where the next begins: the length of the line when there is none."""
    start = _after_blanks(line, start)
    end = _Scanner(start).end(line) if line[start : start + 1] == b"{" else None
    if end is None:
        return line[start:].rstrip(), len(line)
    return line[start:end], _after_blanks(line, end)


def _take_objects(line: bytes) -> tuple[list[bytes], int]:
    """The whole objects at the beginning of a line, and where what follows them begins, after blanks."""
    parts = []
    start = _after_blanks(line, 0)
    while line[start : start + 1] == b"{" and (end := _Scanner(start).end(line)) is not None:
        parts.append(line[start:end])
        start = _after_blanks(line, end)
    return parts, start


def _after_blanks(buffer: bytes | bytearray, start: int) -> int:
    found = _BLANKS.match(buffer, start)
    assert found is not None, "the pattern matches the empty string"
    return found.end()


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
        self._scanner: _Scanner | None = None  # at work on the object that `pending` begins with

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
        parts, start = _take_objects(line)
        rest = line[start:]
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
        """Take the whole objects that `pending` begins with, and the blanks in front."""
        start = 0
        while True:
            if self._scanner is None:
                start = _after_blanks(self.pending, start)
                if self.pending[start : start + 1] != b"{":
                    break
                self._scanner = _Scanner(start)
            end = self._scanner.end(self.pending)
            if end is None:
                break
            self._scanner = None
            if end - start > self.limit:
                self._skip(frames)
                return
            frames.append(bytes(self.pending[start:end]))
            start = end
        del self.pending[:start]
        if self._scanner is not None:
            self._scanner.move(start)

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
        self._scanner = None
