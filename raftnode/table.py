"""A table on a terminal: aligned, as wide as the terminal, and streamed. Layer 5.

Rows come one by one and may be a million, so the widths of the columns are settled on the first few hundred. When those
do not fit, columns of text give way down to a least width, and then whole columns are left out, those first that can be
missed most; numbers are never shortened. What was shortened ends with an ellipsis.
"""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Callable, Sequence

import msgspec
from msgspec import Struct

_SAMPLE_ROWS = 300
_WITHOUT_TERMINAL = 120

Style = Callable[[str], str]


class Column(Struct, frozen=True):
    """One column. Without `least` it is never shortened."""

    title: str
    right: bool = False
    least: int | None = None
    """Text that may be shortened, to this width."""
    rank: int = 0
    """Columns with a rank may be left out of a narrow table, the highest rank first."""
    expect: int = 0
    """A width that cells after the sample are known to reach."""


class _Row(Struct, frozen=True):
    cells: Sequence[str] | None
    """None: there is only a remark, or a note."""
    remark: str
    style: Style | None
    is_note: bool = False


class Table:
    """Rows under a header, written line by line. `left_out` names the columns for which there was no room."""

    def __init__(
        self, columns: Sequence[Column], width: int, write: Callable[[str], None], heading: Style | None
    ) -> None:
        self._columns = columns
        self._width = width
        self._write = write
        self._heading = heading
        self._sample: list[_Row] | None = []
        self._shown: list[tuple[int, int]] = []
        self._gap = "  "
        self.left_out: list[str] = []

    def add(self, cells: Sequence[str], remark: str = "", style: Style | None = None) -> None:
        """One row; a remark about damage goes under it, whole."""
        self._take(_Row(cells, remark, style))

    def remark(self, remark: str, style: Style | None = None) -> None:
        """Damage that left no row."""
        self._take(_Row(None, remark, style))

    def note(self, text: str) -> None:
        """A line that is no row."""
        self._take(_Row(None, text, None, is_note=True))

    def _take(self, row: _Row) -> None:
        if self._sample is None:
            self._write_row(row)
            return
        self._sample.append(row)
        if len(self._sample) == _SAMPLE_ROWS:
            self._settle(grow=True)

    def settle(self) -> None:
        """Write what waits, though more rows will come."""
        if self._sample is not None:
            self._settle(grow=True)

    def finish(self) -> None:
        """Write what still waits."""
        if self._sample is not None:
            self._settle(grow=False)

    def _settle(self, grow: bool) -> None:
        rows, self._sample = self._sample or [], None
        sample = [row.cells for row in rows if row.cells is not None]
        wanted = [
            max([text_width(column.title), column.expect, *(text_width(escape(cells[n])) for cells in sample)])
            for n, column in enumerate(self._columns)
        ]
        self._shown = self._fit(wanted, grow)
        title = self._line([column.title for column in self._columns])
        self._write(self._heading(title) if self._heading else title)
        for row in rows:
            self._write_row(row)

    def _fit(self, wanted: list[int], grow: bool) -> list[tuple[int, int]]:
        """Which columns to show and how wide each."""
        shown = list(range(len(self._columns)))
        while True:
            least = sum(self._least(n, wanted[n]) for n in shown) + len(shown) - 1
            ranked = [n for n in shown if self._columns[n].rank]
            if least <= self._width or not ranked:
                break
            out = max(ranked, key=lambda n: self._columns[n].rank)
            shown.remove(out)
            self.left_out.append(self._columns[out].title)
        widths = {n: wanted[n] for n in shown}
        if sum(widths.values()) + 2 * (len(shown) - 1) > self._width:
            self._gap = " "
        room = self._width - sum(widths.values()) - len(self._gap) * (len(shown) - 1)
        texts = [n for n in shown if self._columns[n].least is not None]
        self._shrink(widths, texts, -room)
        if grow and texts and room > 0:
            widths[texts[-1]] += room
        return list(widths.items())

    def _least(self, n: int, wanted: int) -> int:
        least = self._columns[n].least
        return wanted if least is None else min(wanted, least)

    def _shrink(self, widths: dict[int, int], texts: Sequence[int], excess: int) -> None:
        """Take `excess` from the widest texts, one character at a time, none below its least width."""
        for _ in range(max(0, excess)):
            able = [n for n in texts if widths[n] > self._least(n, widths[n])]
            if not able:
                return
            widths[max(able, key=lambda n: widths[n])] -= 1

    def _write_row(self, row: _Row) -> None:
        lines = [] if row.cells is None else [self._line(row.cells)]
        if row.is_note:
            lines.append(escape(row.remark))
        elif row.remark:
            lines.append(f"{'  ^ ' if lines else ''}DAMAGED: {escape(row.remark)}")
        for line in lines:
            self._write(row.style(line) if row.style else line)

    def _line(self, cells: Sequence[str]) -> str:
        parts = []
        for n, width in self._shown:
            column, text = self._columns[n], cells[n]
            if len(text) <= width and text.isascii() and text.isprintable():  # nearly all
                parts.append(text.rjust(width) if column.right else text.ljust(width))
                continue
            text = escape(text)
            if column.least is not None:
                text = shorten(text, width)
            blank = " " * (width - text_width(text))
            parts.append(blank + text if column.right else text + blank)
        return self._gap.join(parts).rstrip()


def terminal_width() -> int:
    """The width of the terminal that will show the output, also when it goes there through a pipe."""
    for fd in (1, 2):
        try:
            fallback = os.get_terminal_size(fd).columns
            break
        except OSError:
            fallback = _WITHOUT_TERMINAL
    return shutil.get_terminal_size((fallback or _WITHOUT_TERMINAL, 24)).columns


def escape(text: str) -> str:
    """Text that can't move the cursor: what is not printable is written as in a JSON string."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    text = msgspec.json.encode(character).decode()[1:-1]
    return text if text.isprintable() else f"\\u{ord(character):04x}"


def shorten(text: str, width: int) -> str:
    """At most `width` columns of a text, with an ellipsis where something is missing."""
    if text_width(text) <= width:
        return text
    if text.isascii():
        return text[: width - 1] + "…"
    room, kept = width - 1, 0
    for kept, character in enumerate(text):  # noqa: B007
        room -= text_width(character)
        if room < 0:
            break
    return text[:kept] + "…"


def text_width(text: str) -> int:
    """Columns that a terminal takes for a text: two for wide characters, none for combining ones."""
    if text.isascii():
        return len(text)
    return sum(_character_width(c) for c in text)


def _character_width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
