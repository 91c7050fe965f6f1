"""How far a snapshot has come in at the member that needs it (thesis 5.3), and which chunk comes next.

A leader sends the state in chunks, one at a time; the next one goes when the one before is on the other's disk. So the
receiver needs to know only the newest that it has taken, of which transfer, and keeps that on its disk: after a restart
it goes on from there. Transfers are ordered by the leader's term and its number: a newer one takes the place of an
older, of which nothing is taken any more, however late its chunks come.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec
from msgspec import Struct

Verdict: TypeAlias = Literal["take", "again", "restart"]


class Incoming(Struct, frozen=True):
    """The newest transfer of which anything was taken. (`term`, `transfer`) never falls; within one, `seq` only
    rises."""

    term: int = 0
    transfer: int = 0
    seq: int = 0
    """Everything up to this chunk is on disk."""
    is_over: bool = True
    """It was installed, or given up: no more of it is taken, and what was taken is of no use."""

    def judge(self, term: int, transfer: int, seq: int) -> Verdict:
        """What to do with a chunk: take it, acknowledge it again, or have the leader begin anew."""
        if (term, transfer) == (self.term, self.transfer):
            if self.is_over or seq > self.seq + 1:
                return "restart"
            return "take" if seq == self.seq + 1 else "again"
        return "take" if (term, transfer) > (self.term, self.transfer) and seq == 1 else "restart"

    def over(self) -> Incoming:
        """Nothing more comes of it."""
        return self if self.is_over else msgspec.structs.replace(self, is_over=True)
