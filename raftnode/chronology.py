"""What the logs of several members tell of the past: terms, who led them, pauses, clocks. Layer 5. Nothing is printed.

**Terms.** One leader at most appends in a term (thesis 3.4), so the entries of a term are one row of positions, of
which each log holds a beginning: the longest that is here tells most. Of a term without entries nothing is known but
votes.

**Who led.** An entry does not say who appended it. Evidence is what is left on the disks, and nothing else counts:

* a member that remembers what another has acknowledged *to it* in a term has led that term (`consensus.witness`,
  `held` is only known to leaders);
* one for whom a majority of the voters have voted in a term was elected in it. Votes are in the ballots, which keep
  those of the newest term only, and in the witnesses.

So the leader of an old term is mostly not known, and that is what is said then.

**Time** is the clock of the leader of the moment: within a term one clock, between two terms perhaps two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct

from raftnode.consensus.membership import Membership
from raftnode.errors import ProtocolError
from raftnode.messages import GENESIS, DeleteCommand, Entry, PutCommand, decode_command
from raftnode.survey import Survey

_MOST_CLIENTS: Final = 1000
"""A client without a name is its address, and each connection has its own: the rest is counted together."""


class Pause(Struct):
    """Time without an entry, before `commit_id`."""

    commit_id: int
    since: int
    until: int


class Setback(Struct):
    """The clock showed an earlier time at `commit_id` than at the entry before."""

    commit_id: int
    since: int
    until: int


class TermRow(Struct):
    """The entries of one term in one log."""

    term: int
    first: int
    last: int
    since: int
    """The time of the first entry; `until` is that of the last."""
    until: int
    entries: int = 0
    checksum: int = 0
    """Of the first entry: of whom the term is, two logs agree by it."""
    kinds: dict[str, int] = {}
    clients: dict[str, int] = {}
    other_clients: int = 0
    """Writes of clients for which there was no room in `clients`."""
    pauses: list[Pause] = []
    setbacks: list[Setback] = []


class TermTally:
    """Counts the entries of a log by term, as a survey reads them."""

    def __init__(self, pause_ms: int) -> None:
        self.rows: list[TermRow] = []
        self._pause_ms = pause_ms

    def add(self, entry: Entry) -> None:
        """The next entry."""
        rows = self.rows
        if rows and rows[-1].term == entry.term:
            row = rows[-1]
            if entry.time - row.until >= self._pause_ms:
                row.pauses.append(Pause(entry.commit_id, row.until, entry.time))
            elif entry.time < row.until:
                row.setbacks.append(Setback(entry.commit_id, row.until, entry.time))
        else:
            row = TermRow(entry.term, entry.commit_id, entry.commit_id, entry.time, entry.time)
            row.checksum = entry.checksum
            rows.append(row)
        row.last, row.until = entry.commit_id, entry.time
        row.entries += 1
        self._count(row, entry)

    @staticmethod
    def _count(row: TermRow, entry: Entry) -> None:
        try:
            command = decode_command(entry.command)
        except ProtocolError:
            row.kinds["?"] = row.kinds.get("?", 0) + 1
            return
        kind = str(command.__struct_config__.tag)
        row.kinds[kind] = row.kinds.get(kind, 0) + 1
        if isinstance(command, PutCommand | DeleteCommand):
            client = command.client or "-"
            if client in row.clients or len(row.clients) < _MOST_CLIENTS:
                row.clients[client] = row.clients.get(client, 0) + 1
            else:
                row.other_clients += 1


class Leader(Struct, frozen=True):
    """Who led a term, and how that is known."""

    address: str
    words: str


class Term(Struct, kw_only=True):
    """One term as all directories together tell it; without a `row` no entry of it is here."""

    term: int
    row: TermRow | None
    committed: int = 0
    """How many of its entries somebody has as committed."""
    silence: Pause | None = None
    """From the newest entry of an earlier term to its first."""
    leader: Leader | None = None
    votes: dict[str, list[str]] = {}
    """Known votes: by candidate, the voters."""
    held: dict[Path, int] = {}
    """How many of its entries each directory has."""
    contradiction: str = ""


def chronicle(surveys: Sequence[Survey], membership: Membership | None) -> Iterator[Term]:
    """Every term of which something is known, in order. The surveys were made with a `TermTally`."""
    readable = [survey for survey in surveys if survey.is_readable]
    rows: dict[int, list[tuple[Survey, TermRow]]] = {}
    for survey in readable:
        tally = survey.tally
        assert isinstance(tally, TermTally), "surveys for a chronicle count terms"
        for row in tally.rows:
            rows.setdefault(row.term, []).append((survey, row))
    votes = _votes(readable)
    leaders = _leaders(readable, votes, membership)
    before: TermRow | None = None
    for term in sorted({*rows, *votes, *leaders}):
        found = Term(term=term, row=None, leader=leaders.get(term), votes=_by_candidate(votes.get(term, {})))
        if term in rows:
            before = _fill(found, rows[term], before)
        yield found


def _fill(found: Term, rows: Sequence[tuple[Survey, TermRow]], before: TermRow | None) -> TermRow:
    """What the logs tell of a term: the one that has most of it, and the others in comparison."""
    _, row = max(rows, key=lambda pair: pair[1].entries)
    found.row = row
    found.held = {survey.path: of.entries for survey, of in rows}
    found.committed = max(max(0, min(of.last, survey.committed) - of.first + 1) for survey, of in rows)
    others = [survey for survey, of in rows if (of.first, of.checksum) != (row.first, row.checksum)]
    if any(survey.is_whole for survey in others):
        names = ", ".join(str(survey.path) for survey in others)
        found.contradiction = f"the entries of term {row.term} in {names} are others: only one leader has a term"
    if before is not None:
        found.silence = Pause(row.first, before.until, row.since)
    return row


def _votes(readable: Sequence[Survey]) -> dict[int, dict[str, str]]:
    """Known votes: by term and voter, the candidate."""
    found: dict[int, dict[str, str]] = {}
    for survey in readable:
        ballot, address = survey.known.ballot, survey.known.address
        if ballot is not None and ballot.voted_for is not None and address is not None:
            found.setdefault(ballot.term, {})[address] = ballot.voted_for
        for member, witness in survey.known.witnesses.items():
            if witness.vote:
                found.setdefault(witness.term, {})[member] = witness.vote
    return found


def _by_candidate(votes: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for voter, candidate in sorted(votes.items()):
        found.setdefault(candidate, []).append(voter)
    return found


def _leaders(
    readable: Sequence[Survey], votes: Mapping[int, Mapping[str, str]], membership: Membership | None
) -> dict[int, Leader]:
    """Who certainly led which term."""
    found: dict[int, Leader] = {}
    for term, by_voter in votes.items():
        for candidate, voters in _by_candidate(by_voter).items():
            if membership is not None and membership.is_majority(voters):
                found[term] = Leader(candidate, f"elected by {', '.join(voters)}")
    for survey in readable:
        address = survey.known.address
        for member, witness in survey.known.witnesses.items():
            if address is not None and member != address and witness.held != GENESIS:
                found[witness.term] = Leader(address, f"remembers what {member} acknowledged to it")
    return found
