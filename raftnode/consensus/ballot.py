"""The ballot: the term that a node is in and whom it voted for there."""

from __future__ import annotations

from msgspec import Struct


class Ballot(Struct, frozen=True):
    """One value, written in one transaction, before any message that depends on it (thesis 3.4, table "State").

    Invariants: `term` never falls; within one term `voted_for` is set at most once and then stays.
    """

    term: int = 0
    voted_for: str | None = None
    """Address of the candidate; None while the vote is free."""

    def in_term(self, term: int) -> Ballot:
        """The ballot of a node that has learned of a higher term: the vote is free again."""
        assert term > self.term, f"the term may only rise: {self.term} to {term}"
        return Ballot(term, None)

    def may_vote_for(self, candidate: str) -> bool:
        """True when the vote is free or was already for `candidate`: a lost answer may be asked for again."""
        return self.voted_for is None or self.voted_for == candidate

    def vote(self, candidate: str) -> Ballot:
        """The ballot with the vote cast."""
        assert self.may_vote_for(candidate), f"one vote a term: {self.term} is {self.voted_for}'s, not {candidate}'s"
        return Ballot(self.term, candidate)
