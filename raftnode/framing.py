"""Where one message ends and the next begins. Bytes in, frames out; no socket. Layer 1, pure.

A newline ends a message. For one-shot clients a whole object is also taken when no newline has come yet. So that the
same bytes mean the same messages however the network cuts them, a line may hold several objects: `Parting` parts them,
and whoever gets a line that is not one message uses it.
"""

from __future__ import annotations

import re
from typing import Final

_IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_BLANKS = re.compile(rb"\s*+")
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_FLAT = rb"\{(?:[^\"{}]++|%b)*+\}" % _STRING
_SHALLOW = rb"\{(?:[^\"{}]++|%b|%b)*+\}" % (_STRING, _FLAT)
_OUTSIDE = re.compile(rb"(?:[^\"{}]++|%b|%b)*+" % (_STRING, _SHALLOW), re.DOTALL)
"""All of an object that need not be looked at one by one: text, whole strings, and objects of at most two levels."""
_OPENING, _CLOSING = re.compile(rb"\{++"), re.compile(rb"\}++")
_QUOTE, _OPEN = b'"{'
_LOOK_AHEAD: Final = 1 << 18
"""A message longer than this is looked at while it comes, so that its end finds little left to do."""
_LONG: Final = 512
"""A line that begins without an end in so many bytes is likely to be followed by others like it: see `_split`."""
_ALL: Final = 1 << 62
_STEPS: Final = 50_000
"""How far a line is parted at a time: some ten milliseconds."""


class TooLong:
    """Stands for a message over the limit; the rest of its line is passed over."""


TOO_LONG: Final = TooLong()
Frame = bytes | TooLong


class _Scanner:
    """Finds the end of the object that begins at a position. It goes on where it stopped, so each byte is read once."""

    __slots__ = ("_at", "_depth", "_in_string", "_steps")

    def __init__(self, start: int, steps: int = _ALL) -> None:
        """`steps`: so far it looks in one call of `end`."""
        self._at = start
        self._depth = 0
        self._in_string = False
        self._steps = steps

    def end(self, buffer: bytes | bytearray) -> int | None:
        """Position after the object's closing brace; None while it was not reached."""
        steps = self._steps
        while self._at < len(buffer) and steps:
            steps -= 1
            if self._depth:
                pattern = _IN_STRING if self._in_string else _OUTSIDE
                found = pattern.match(buffer, self._at)
                assert found is not None, "both patterns match the empty string"
                self._at = found.end()
                if self._at == len(buffer):
                    return None
            byte = buffer[self._at]
            if byte == _QUOTE:
                self._in_string = not self._in_string
                self._at += 1
            elif self._in_string:
                return None  # a backslash is the last byte: what it escapes has not come yet
            elif self._count_braces(buffer, byte):
                return self._at
        return None

    def _count_braces(self, buffer: bytes | bytearray, byte: int) -> bool:
        """Step over the braces here; True when the last one ends the object."""
        braces = (_OPENING if byte == _OPEN else _CLOSING).match(buffer, self._at)
        assert braces is not None, "what is neither text nor a string here is a brace"
        count = braces.end() - self._at
        if byte != _OPEN:
            count = min(count, self._depth)
        self._at += count
        self._depth += count if byte == _OPEN else -count
        return self._depth == 0

    def is_through(self, buffer: bytes | bytearray) -> bool:
        """True when no more can be found in this buffer."""
        return self._at >= len(buffer) - self._in_string

    def move(self, by: int) -> None:
        """So many bytes were taken from the front of the buffer."""
        self._at -= by


class Parting:
    """A line that is not one message, and how far it has been parted: into the objects that it begins with, and all
    that is left. In bounded steps, as a line may be long."""

    def __init__(self, line: bytes) -> None:
        self._line = line
        self._start = _after_blanks(line, 0)
        self._scanner = _Scanner(self._start, _STEPS)

    @property
    def is_over(self) -> bool:
        """True when there is no further part."""
        return self._start == len(self._line)

    def next(self) -> bytes | None:
        """The next part; None when more has to be looked at first: ask again."""
        line, start = self._line, self._start
        end = self._scanner.end(line) if line[start : start + 1] == b"{" else None
        if end is not None:
            self._start = _after_blanks(line, end)
            self._scanner = _Scanner(self._start, _STEPS)
            return line[start:end]
        if line[start : start + 1] == b"{" and not self._scanner.is_through(line):
            return None
        self._start = len(line)
        return line[start:].rstrip()


def _after_blanks(buffer: bytes | bytearray, start: int) -> int:
    found = _BLANKS.match(buffer, start)
    assert found is not None, "the pattern matches the empty string"
    return found.end()


def _split(data: bytes) -> list[bytes]:
    """What stands before, between and after the newlines. `bytes.split` looks at one byte after the other; `find` at
    many at once, but has to be called for each line. With lines of 1.3 KB that takes half the time, and where a part of
    a long one has no newline a thirtieth; with lines of 60 bytes four times as long."""
    if data.find(b"\n", 0, _LONG) >= 0:
        return data.split(b"\n")
    lines, start = [], 0
    while (end := data.find(b"\n", start)) >= 0:
        lines.append(data[start:end])
        start = end + 1
    lines.append(data[start:])
    return lines


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
        lines = _split(data)
        rest = lines.pop()
        frames: list[Frame] = []
        if not self.pending and not self._skipping and len(data) <= self.limit:
            frames += [line for line in lines if line and not line.isspace()]
        else:
            for line in lines:
                self._end_line(line, frames)
        if rest and not self._skipping:
            self.pending += rest
            if not self.lines_only and (len(self.pending) > _LOOK_AHEAD or rest.rstrip().endswith(b"}")):
                self._take_bare(frames)
            self._check_pending(frames)
        return frames

    @property
    def is_mid_message(self) -> bool:
        """True while a message has begun and not ended."""
        return bool(self.pending) or self._skipping

    def pass_over(self) -> None:
        """Drop the message that is not whole, and the rest of its line."""
        self._skipping = True
        self._clear()

    def at_end(self) -> list[Frame]:
        """The stream has ended: what is left is a frame too, however broken."""
        frames: list[Frame] = []
        self._end_line(b"", frames)
        return frames

    def _end_line(self, line: bytes, frames: list[Frame]) -> None:
        if self._skipping:
            self._skipping = False
            return
        if len(self.pending) + len(line) > self.limit and not self.lines_only:
            self.pending += line
            self._take_bare(frames)  # a line over the limit may begin with messages that are not
            self._skipping = False
            line = b""
        if self.pending:
            line = b"".join((self.pending, line))
            self._clear()
        if len(line) > self.limit:
            frames.append(TOO_LONG)
        elif line and not line.isspace():
            frames.append(line)

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
        self.pass_over()

    def _clear(self) -> None:
        self.pending = bytearray()
        self._scanner = None
