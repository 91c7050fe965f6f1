"""A leader that hands its office to another member (thesis 3.10, leadership transfer)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Handover:
    """One attempt. It ends when this leader follows another, or at the deadline: then it goes on leading."""

    to: str
    deadline: float
    """Monotonic seconds: an election timeout after the beginning, so clients wait no longer than for an election."""
    is_asked: bool = False
    """The successor has everything, and was told to campaign now."""
