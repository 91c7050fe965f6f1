"""Framing: whatever the network does to the stream, the same bytes mean the same messages (README, messages).

Frames are compared after `split_line`, as the receiver reads them. Tests with chance in them are derandomized
(`fixed`): a failure prints the bytes and how they were cut.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raftnode import framing
from raftnode.framing import TOO_LONG, Frame, Framer, Parting, TooLong

fixed = settings(derandomize=True, database=None, deadline=None, max_examples=600)

BIG = 1 << 30
LONG = "<too long>"

# --- helpers --------------------------------------------------------------------------------------------------


def split_line(line: bytes) -> list[bytes]:
    """The messages in one line, as the receiver takes them one by one."""
    parts, parting = [], Parting(line)
    while not parting.is_over:
        if part := parting.next():
            parts.append(part)
    return parts


def shown(frames: Iterable[Frame]) -> list[bytes | str]:
    """The messages in frames, blanks around them apart."""
    messages: list[bytes | str] = []
    for frame in frames:
        if isinstance(frame, TooLong):
            messages.append(LONG)
        else:
            messages += [part.strip() for part in split_line(frame)]
    return messages


def received(pieces: Iterable[bytes], limit: int = BIG) -> list[bytes | str]:
    """What a connection that brings these pieces and then ends has said."""
    framer = Framer(limit)
    frames: list[Frame] = []
    for piece in pieces:
        frames += framer.feed(piece)
        assert len(framer.pending) <= limit
    frames += framer.at_end()
    assert not framer.pending
    for frame in frames:
        assert isinstance(frame, TooLong) or len(frame) <= limit
    return shown(frames)


def cut(stream: bytes, places: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted({place % (len(stream) + 1) for place in places}), len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(edges)]


def end_of_object(line: bytes) -> int | None:
    """Where the object ends that a line begins with, found one byte at a time."""
    depth, in_string, escaped = 0, False, False
    for at, byte in enumerate(line):
        char = chr(byte)
        if in_string:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == '"':
                in_string = False
        elif char == '"':
            in_string = True
        elif char in "{}":
            depth += 1 if char == "{" else -1
            if depth == 0:
                return at + 1
    return None


def meant(stream: bytes, limit: int = BIG) -> list[bytes | str]:
    """The rule a second time, as plainly as can be, on the whole stream: a line is objects and then a rest; from the
    first part over the limit on, a line is passed over."""
    messages: list[bytes | str] = []
    for line in stream.split(b"\n"):
        rest = line.lstrip()
        while rest.startswith(b"{") and (end := end_of_object(rest)) is not None and end <= limit:
            messages.append(rest[:end])
            rest = rest[end:].lstrip()
        if rest.startswith(b"{") and end_of_object(rest) is not None:
            messages.append(LONG)  # an object that is too long
        elif rest and (len(rest) > limit and len(line) > limit):
            messages.append(LONG)
        elif rest:
            messages.append(rest.strip())
    return messages


tokens = [b"{", b"}", b'"', b"\\", b"\n", b"\r\n", b" ", b"a", b"{}", b"[1]", b"null", b"\\\\", b"\xff"]
tokens += [b'{"a":1}', b'{"}":"{\\"}"}']
pieces_of_json = st.sampled_from(tokens)
streams = st.lists(pieces_of_json, max_size=25).map(b"".join)
texts = st.text(alphabet='ab"\\{}[]\n\r /\u00e9\u2028', max_size=8)
places = st.lists(st.integers(0, 200), max_size=12)
limits = st.integers(1, 40)

# --- the same messages however they come ----------------------------------------------------------------------


@fixed
@given(stream=streams, places=places)
@example(stream=b'{"a":"\\"}"}', places=[6])
@example(stream=b'{"a":"\\\\"}{}', places=[6, 7, 8])
@example(stream=b' {"a":1} ', places=[1, 8])
def test_any_cut_gives_the_same_messages(stream: bytes, places: list[int]) -> None:
    """The network may cut the stream anywhere, also inside an escape, and bring pieces that end with a brace: what is
    taken is what the plain rule takes from the whole stream (published interface, "one message may be larger than one
    recv")."""
    wanted = meant(stream)
    assert received([stream]) == wanted
    assert received(cut(stream, places)) == wanted
    assert received(stream[n : n + 1] for n in range(len(stream))) == wanted


@fixed
@given(stream=streams, places=places, limit=limits)
@example(stream=b'{"a":1}xxxxxxxx\n{}', places=[7], limit=8)
@example(stream=b'{"a":1}\r\n', places=[8], limit=7)
@example(stream=b"x" * 9 + b"{}\n{}", places=[9, 11], limit=8)
@example(stream=b"        {}", places=[3, 9], limit=4)
@example(stream=b'{}{}{}{}{"a":"\\"}"}', places=[15], limit=11)
def test_any_cut_gives_the_same_messages_under_any_limit(stream: bytes, places: list[int], limit: int) -> None:
    """The same with limits smaller than the messages: what is taken and what is too long does not depend on the cut
    either, and no frame is longer than the limit (TRAPS 38)."""
    wanted = meant(stream, limit)
    assert received([stream], limit) == wanted
    assert received(cut(stream, places), limit) == wanted
    assert received((stream[n : n + 1] for n in range(len(stream))), limit) == wanted


@fixed
@given(stream=st.binary(max_size=60), places=places, limit=limits)
def test_any_bytes_are_framed(stream: bytes, places: list[int], limit: int) -> None:
    """Bytes that are no JSON at all are still framed, in any cut alike, without an error: to judge them is for the
    codec."""
    assert received(cut(stream, places), limit) == meant(stream, limit)


@fixed
@given(st.lists(st.binary(max_size=6).map(lambda b: b.replace(b"\n", b"")), min_size=1, max_size=8), st.integers(0, 8))
def test_long_lines_are_cut_where_short_ones_are(lines: list[bytes], long: int) -> None:
    """They are cut in another way, for speed, from a length on that is moved down to theirs here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(framing, "_LONG", long)
        framer = Framer(BIG)
        framer.lines_only = True
        found = framer.feed(b"\n".join([*lines, b""]))
    assert found == [line for line in lines if line.strip()]
    assert not framer.pending


@fixed
@given(
    objects=st.lists(st.dictionaries(texts, texts | st.lists(texts, max_size=3), max_size=3), max_size=6),
    ends=st.lists(st.sampled_from([b"\n", b"\r\n", b"", b" ", b"\n\n"]), min_size=6, max_size=6),
    places=places,
)
def test_real_json_comes_out_as_it_went_in(objects: list[dict[str, Any]], ends: list[bytes], places: list[int]) -> None:
    """Any objects, each ended by a newline, CRLF, blank lines or nothing, come out one by one, in order, byte for
    byte: braces, quotes and escapes in their strings mislead nobody."""
    texts = [json.dumps(found, ensure_ascii=len(found) % 2 == 0).encode() for found in objects]
    stream = b"".join(text + end for text, end in zip(texts, ends, strict=False))
    assert received(cut(stream, places)) == texts


# --- by example -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "frames"),
    [
        (b'{"a":1}\n', [b'{"a":1}']),
        (b'{"a":1}', [b'{"a":1}']),
        (b'{"a":1}\r\n', [b'{"a":1}']),
        (b'{"a":1}{"b":2} {"c":3}\n', [b'{"a":1}', b'{"b":2}', b'{"c":3}']),
        (b'\n \r\n\t\n{"a":1}\n\n', [b'{"a":1}']),
        (b'{"a":"}"}', [b'{"a":"}"}']),
        (b'{"a":"\\"}"}', [b'{"a":"\\"}"}']),
        (b'{"a":"\\\\"}{"b":2}', [b'{"a":"\\\\"}', b'{"b":2}']),
        (b'{"a":{"b":{}}}', [b'{"a":{"b":{}}}']),
        (b"[1,2]\nnull\n7\n", [b"[1,2]", b"null", b"7"]),
        (b'{"a":1} trailing\n{"b":2}\n', [b'{"a":1}', b"trailing", b'{"b":2}']),
        (b"}{\n", [b"}{"]),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", [b"GET / HTTP/1.1", b"Host: x"]),
        (b"", []),
        (b"\n\n\n", []),
    ],
)
def test_what_is_a_message(stream: bytes, frames: list[bytes]) -> None:
    """The table of what ends a message: a newline, with or without CR, or the object's own closing brace; blank
    lines are nothing; what is no object needs its newline (README, messages)."""
    assert received([stream]) == frames
    assert meant(stream) == frames


def test_a_bare_object_is_taken_at_once_and_a_line_with_its_newline() -> None:
    """A one-shot client sends an object without a newline and waits: it is taken as soon as its brace is there, not
    when the stream ends. Anything else waits for its newline."""
    framer = Framer(100)
    assert framer.feed(b'{"a":') == []
    assert framer.feed(b'{"b":1}') == []
    assert framer.feed(b"}") == [b'{"a":{"b":1}}']
    assert framer.feed(b"\n") == [], "the newline that comes late is no message of its own"
    assert framer.feed(b"[1]") == []
    assert framer.feed(b"\n") == [b"[1]"]
    assert framer.feed(b'{"a":1}  ') == [b'{"a":1}']
    assert framer.feed(b'{"half":') == []
    assert framer.at_end() == [b'{"half":'], "the end of the stream ends a message, however broken"
    assert framer.at_end() == []


def test_after_a_line_that_is_too_long_the_next_is_taken() -> None:
    """A too long message is noted once, the rest of its line is passed over in whatever pieces it comes, and the next
    line is read again: the connection can go on (README, messages, "a bad message never ends ...")."""
    framer = Framer(20)
    assert framer.feed(b"x" * 21) == [TOO_LONG]
    assert not framer.pending
    for _ in range(5):
        assert framer.feed(b'{"not":"looked at"}') == []
        assert not framer.pending
    assert framer.feed(b'still that line\n{"a":1}\n') == [b'{"a":1}']
    assert framer.feed(b'{"a":"' + b"x" * 30 + b'"}{"b":2}\n{"c":3}') == [TOO_LONG, b'{"c":3}']
    assert framer.feed(b"y" * 21) == [TOO_LONG]
    assert framer.at_end() == [], "a stream that ends in the rest of a long line has nothing more to say"


def test_a_message_of_exactly_the_limit_is_taken() -> None:
    """The limit is the longest message, not the longest line: neither CRLF nor blanks nor a second object count."""
    text = b'{"a":"' + b"x" * 12 + b'"}'
    for stream in (text, text + b"\n", text + b"\r\n", b"   " + text + b"  \n", text + text + b"\r\n"):
        count = stream.count(text)
        assert received([stream], len(text)) == [text] * count, stream
        assert received([stream], len(text) - 1) == [LONG], stream
        assert received(cut(stream, range(100)), len(text)) == [text] * count, stream


def test_between_members_only_lines_count() -> None:
    """Members always send the newline, so a link looks for nothing else: a bare object waits, and nothing in it is
    scanned; a frame is a line, however many objects it has."""
    framer = Framer(30)
    framer.lines_only = True
    assert framer.feed(b'{"a":1}') == []
    assert framer.feed(b'{"b":2}\n{"c":3}\n{"d"') == [b'{"a":1}{"b":2}', b'{"c":3}']
    assert framer.feed(b":" + b"4" * 30) == [TOO_LONG]
    assert framer.feed(b'5}\n{"e":5}\n') == [b'{"e":5}']


@fixed
@given(
    lines=st.lists(st.binary(min_size=1, max_size=12).map(lambda b: b.replace(b"\n", b"}")), max_size=8), places=places
)
def test_between_members_any_cut_gives_the_same_lines(lines: list[bytes], places: list[int]) -> None:
    """On a link, too, the cut changes nothing: the frames are the lines that are not blank."""
    framer = Framer(12)
    framer.lines_only = True
    stream = b"".join(line + b"\n" for line in lines)
    frames = [frame for piece in cut(stream, places) for frame in framer.feed(piece)]
    assert frames == [line for line in lines if line.strip()]
    assert framer.at_end() == []


# --- bounds ---------------------------------------------------------------------------------------------------


class Watched(bytearray):
    """A buffer that notes how large it has been, and how many bytes are copied from it to look at them."""

    high = 0
    copied = 0

    def __iadd__(self, other: Any) -> Watched:  # type: ignore[override,misc]
        found = super().__iadd__(other)
        self.high = max(self.high, len(self))
        return found

    def lstrip(self, *what: Any) -> bytearray:
        found = super().lstrip(*what)
        self.copied += len(found)
        return found

    def strip(self, *what: Any) -> bytearray:
        found = super().strip(*what)
        self.copied += len(found)
        return found


@fixed
@given(stream=streams, places=places, limit=limits)
def test_what_is_kept_is_bounded(stream: bytes, places: list[int], limit: int) -> None:
    """A peer that never ends its message costs the limit and one piece, not more, at any moment, also within a feed
    (package docstring, "nothing grows without bound")."""
    framer = Framer(limit)
    for piece in cut(stream, places):
        watched = framer.pending = Watched(framer.pending)
        framer.feed(piece)
        assert watched.high <= limit + len(piece)
        assert len(framer.pending) <= limit


class Counting:
    """Stands for a pattern, and counts the bytes that it is asked to look at; too many fail at once."""

    MOST = 4 << 20

    def __init__(self, pattern: re.Pattern[bytes]) -> None:
        self.pattern = pattern
        self.seen = 0

    def match(self, buffer: bytes, at: int) -> re.Match[bytes] | None:
        found = self.pattern.match(buffer, at)
        self.seen += 1 + (found.end() - at if found else 0)
        assert self.seen <= self.MOST, "bytes are looked at again and again"
        return found


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[Counting]:
    counting = []
    for name in ("_IN_STRING", "_OUTSIDE", "_BLANKS"):
        counting.append(Counting(getattr(framing, name)))
        monkeypatch.setattr(framing, name, counting[-1])
    return counting


SHAPES = {
    "braces in a string": b'{"a":"' + b"x" * 63 + (b"}" + b"x" * 63) * (1 << 14) + b'"}',
    "objects in an object": b'{"a":[' + b'{"b":"0123456789"},' * (1 << 16) + b"{}]}",
    "escapes": b'{"a":"' + b'\\"}' * (1 << 18) + b'"}',
    "braces alone": b"{" * (1 << 19) + b"}" * (1 << 19),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_long_message_is_scanned_once(shape: str, scanned: list[Counting]) -> None:
    """A message of 1 MB that comes in small pieces, each ending with a brace so that each is looked at, costs a look
    at each byte and not at all bytes so far each time: counted in the scanner. (Twice the length leaves room for the
    look at the byte where a pattern stopped.)"""
    text = SHAPES[shape]
    framer, frames, at = Framer(2 << 20), [], 0
    while at < len(text):
        end = text.find(b"}", at + 500) + 1 or len(text)
        frames += framer.feed(text[at:end])
        at = end
    assert frames == [text]
    assert 0 < sum(counting.seen for counting in scanned) <= 2 * len(text) + 10


def test_a_long_message_is_not_copied_for_each_look() -> None:
    """A message of 512 KB in pieces that each end with a brace, and what is copied of the buffer to look at it: at
    most a few times its length. Else a client that sends many such pieces keeps the node busy with copying."""
    framer, piece, count = Framer(1 << 20), b"x" * 63 + b"}", 1 << 13
    watched = framer.pending = Watched()
    framer.feed(b'{"a":"')
    for _ in range(count):
        framer.feed(piece)
    assert framer.pending is watched
    assert len(watched) == 6 + count * len(piece)
    assert watched.copied <= 4 * len(watched), f"copied {watched.copied / len(watched):.0f} times its length"


def test_blanks_and_what_is_no_object_are_looked_at_once(scanned: list[Counting]) -> None:
    """Half a megabyte of blanks, then a line that is no object in pieces that end with a brace: each byte is looked at
    once, not again with each piece."""
    framer = Framer(1 << 20)
    assert framer.feed(b" " * (1 << 19)) == []
    for _ in range(1000):
        assert framer.feed(b"xxxxxx}") == []
    assert sum(counting.seen for counting in scanned) <= (1 << 19) + 10_000
    assert framer.feed(b"\n") == [b"xxxxxx}" * 1000]


class Line(bytes):
    """A line that counts the bytes copied out of it and out of what was cut from it."""

    copied = 0

    def __getitem__(self, which: Any) -> Any:
        found = super().__getitem__(which)
        return self._count(found) if isinstance(found, bytes) else found

    def lstrip(self, *what: Any) -> bytes:
        return self._count(super().lstrip(*what))

    @staticmethod
    def _count(found: bytes) -> Line:
        Line.copied += len(found)
        return Line(found)


def test_a_line_of_many_objects_is_parted_in_linear_time() -> None:
    """One line may hold very many small objects (8 MB of `{}` are four million). Parting it copies each byte a few
    times, not all that follows once for each object: that would keep a node from its work for minutes, for one
    message of one client (TRAPS 19)."""
    count = 3000
    Line.copied = 0
    line = Line(b"{} " * count)
    assert split_line(line) == [b"{}"] * count
    assert Line.copied <= 10 * len(line), f"copied {Line.copied / len(line):.0f} times its length"


def test_many_objects_without_a_newline_are_taken_in_linear_time(scanned: list[Counting]) -> None:
    """The same for bare objects in one piece, and for a line over the limit that begins with many messages."""
    count = 3000
    framer = Framer(100)
    watched = framer.pending = Watched()
    assert framer.feed(b"{}" * count) == [b"{}"] * count
    assert watched.copied <= 10 * 2 * count, f"copied {watched.copied / (2 * count):.0f} times its length"
    assert Framer(100).feed(b"{}" * count + b"\n") == [b"{}"] * count
    assert sum(counting.seen for counting in scanned) <= 10 * count


@pytest.mark.parametrize("text", [b'{"a",' * 10, b'{{"a":{"b":{}}}}', b"{{{}}}" * 2, b'{"a\\"}{","b":{{{}}}}'])
def test_a_long_line_is_parted_in_bounded_steps(text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parting a line of megabytes of braces takes seconds, and a leader may not be away from its work for so long
    (TRAPS 19): it is done a number of steps at a time, with the same parts as in one go."""
    line, whole = text * 50, split_line(text * 50)
    monkeypatch.setattr(framing, "_STEPS", 1)
    parting, parts, looks = Parting(line), [], 0
    while not parting.is_over:
        looks += 1
        if part := parting.next():
            parts.append(part)
    assert parts == whole
    assert looks > len(whole)


def test_a_line_that_is_passed_over_leaves_nothing() -> None:
    """The owner may drop a message that is not whole, when memory is short: the rest of its line is dropped, too, and
    the next line is taken."""
    framer = Framer(1000)
    assert framer.feed(b'{"a":"' + b"x" * 500) == []
    framer.pass_over()
    assert not framer.pending
    assert framer.feed(b'xxx"}') == []
    assert framer.feed(b'}\n{"b":1}\n') == [b'{"b":1}']
