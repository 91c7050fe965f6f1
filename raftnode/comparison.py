"""Where the logs of several members part, what of them is committed for certain, and what each choice among them would
lose. Layer 5. Nothing is printed.

**Where two logs part.** The checksums are rolling: equal (term, checksum) at one position mean equal histories up to
there, and different ones mean that they part there or before. So the place is found by halving, some twenty looks for a
million entries. That compares what was *written*: a record damaged since keeps its checksum beside it, and only reading
it tells. So the entries at which the search decides are checked, and when one of them is damaged, or the log has a
hole, all is read.

**What is committed for certain**, by what is on these disks:

* what a directory calls committed: its node had it from a leader that had counted a majority;
* an entry that another member remembers as committed (`consensus.witness`, the floor);
* an entry of term T that a majority of the voters holds, if each of them is still in term T, or if all voters are here
  and none has an entry of a later term: then they have it from the leader of T itself, which commits by that (thesis
  3.6.2). That a majority holds it is not enough by itself: of an older term, it may have come by a later leader, and
  yet be overwritten by another (thesis, figure 3.7). Such an entry is *held by a majority*, and not more.

Everything that was acknowledged to a client is committed, but not the other way round: of a committed entry, and of
one that is not known to be, the answer may or may not have reached its client.

**Which directory to keep**: the one that would win an election, with the highest (term, commit_id) at the end of its
log. If directories of a majority of the voters are here, each as its node left it, every committed entry is in at least
one of them, and by the rule of elections in that one (thesis 3.6.3). Of fewer, nobody can say what the missing ones
have committed; nor if one of them is an older copy, which is noticed only when another one remembers more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import merge
from itertools import chain, groupby, pairwise
from pathlib import Path

from msgspec import Struct

from raftnode import records
from raftnode.consensus.membership import Membership
from raftnode.consensus.witness import Witness
from raftnode.errors import ProtocolError, StoreDamaged
from raftnode.inspection import Directory, StoredValue
from raftnode.messages import GENESIS, DeleteCommand, Entry, EntryId, PutCommand, decode_command
from raftnode.survey import EntryMark, Marks, Survey
from raftnode.verification import forgotten

_STEP = 2000


# --- where two logs part --------------------------------------------------------------------------------------


class Parting(Struct, frozen=True):
    """How far two logs are known to be equal, and where they differ. Positions between the two are damaged."""

    equal_to: int
    differ_at: int | None
    """None: nothing differs as far as both go."""


def part(one: Marks, other: Marks) -> Parting:
    """Where two logs part, by halving. Entries before the first that both keep were committed, and count as equal."""
    low, high = max(one.first, other.first) - 1, min(one.last, other.last) + 1
    if high <= low:  # one ends before the other begins
        return Parting(high - 1, None)
    marks = [mark for mark in (one.mark(low), other.mark(low)) if mark is not None]
    if len(marks) == 2 and marks[0] != marks[1]:
        return Parting(low - 1, low)
    end = high
    while high - low > 1:
        position = _readable_near((low + high) // 2, low, high, one, other)
        if position is None:
            break
        if one.mark(position) == other.mark(position):
            low = position
        else:
            high = position
    return Parting(low, None if high == end else high)


def _readable_near(middle: int, low: int, high: int, one: Marks, other: Marks) -> int | None:
    """A position between the two, the middle if possible, that can be read in both logs."""
    for position in chain(range(middle, high), range(middle - 1, low, -1)):
        if one.mark(position) is not None and other.mark(position) is not None:
            return position
    return None


# --- what is here ---------------------------------------------------------------------------------------------


class Candidate(Struct, kw_only=True):
    """A directory, and what speaks for and against keeping it."""

    survey: Survey
    voter: str | None
    """Its address, when it is that of a voter, and the node is the one that the members know there."""
    copy_of: Path | None = None
    """A directory of the same node that is newer: a node counts once."""
    lacks: list[str] = []
    """What others remember that its node promised, and it does not keep: it is an old copy."""
    losses: list[Loss] = []
    """What would be lost by keeping this one and none of the others."""

    @property
    def counts(self) -> bool:
        """True when it speaks for a voter: as what it holds was held, whether it is an old copy or not."""
        return self.voter is not None and self.copy_of is None and self.survey.is_readable


class Loss(Struct, frozen=True):
    """A row of entries of another directory that a choice lacks."""

    source: Path
    first: int
    last: int
    certain_to: int
    """Up to here they are committed for certain; below `first` when none is."""

    @property
    def entries(self) -> int:
        """How many."""
        return self.last - self.first + 1

    @property
    def certain(self) -> int:
        """How many of them are committed for certain."""
        return max(0, min(self.certain_to, self.last) - self.first + 1)


class Holding(Struct, frozen=True):
    """A row of entries, and who has them."""

    first: int
    last: int
    source: Path
    """The directory whose history they are of."""
    holders: list[Path]
    voters: int
    """How many voters are among them."""
    is_majority: bool
    is_certain: bool
    """Committed for certain."""


class Evidence(Struct, frozen=True):
    """Why everything up to an entry is committed."""

    id: EntryId
    words: str


class Verdict(Struct, kw_only=True):
    """What several directories tell together."""

    candidates: list[Candidate]
    membership: Membership | None
    best: Candidate | None
    sound: list[str]
    """Voters of which a whole directory is here that keeps all that the others remember."""
    is_majority: bool
    """They are a majority. What nobody here remembers is not seen: two older copies of a majority look as sound."""
    missing: list[str]
    """Voters of which no directory is here that can be read."""
    certain: int
    """Committed for certain up to here, in the history of the best one."""
    evidence: list[Evidence]
    holdings: list[Holding]
    elsewhere: list[Evidence]
    """Entries that are known to have been, and are in none of these directories; the committed ones are lost."""
    contradictions: list[str]
    """What can't be in a cluster that works as it should."""


def compare(surveys: Sequence[Survey]) -> Verdict:
    """Weigh the directories of one cluster against each other."""
    candidates = [Candidate(survey=survey, voter=None) for survey in surveys]
    readable = [candidate for candidate in candidates if candidate.survey.is_readable]
    _mark_copies(readable)
    best = max(readable, key=_precedence, default=None)
    membership = None
    if best is not None:
        memberships = best.survey.known.memberships
        membership = memberships[-1] if memberships else None
    for candidate in readable:
        candidate.voter = _voter(candidate.survey, membership)
        candidate.lacks = _forgotten(candidate, readable) if candidate.voter else []
    verdict = Verdict(
        candidates=candidates,
        membership=membership,
        best=best,
        sound=[],
        is_majority=False,
        missing=[],
        certain=0,
        evidence=[],
        holdings=[],
        elsewhere=[],
        contradictions=[],
    )
    if best is not None:
        _weigh(verdict, best, readable)
    return verdict


def _precedence(candidate: Candidate) -> tuple[bool, EntryId, int, str]:
    """The rule of elections; of equal logs, the one that knows more of them as committed. A whole log goes before a
    damaged one: its end is certain."""
    survey = candidate.survey
    return candidate.copy_of is None and survey.is_whole, survey.newest, survey.committed, str(survey.path)


def _mark_copies(candidates: Sequence[Candidate]) -> None:
    """Of several directories of one node the newest counts."""
    newest: dict[str, Candidate] = {}
    for candidate in sorted(candidates, key=_age):
        node = candidate.survey.known.node
        if node is None:
            continue
        if node in newest:
            newest[node].copy_of = candidate.survey.path
        newest[node] = candidate
    for candidate in candidates:
        if candidate.copy_of is not None:
            candidate.copy_of = newest[candidate.survey.known.node or ""].survey.path


def _age(candidate: Candidate) -> tuple[int, EntryId, int]:
    """Later states of one node have a higher term, then a longer log, then more committed."""
    survey = candidate.survey
    ballot = survey.known.ballot
    return ballot.term if ballot is not None else 0, survey.newest, survey.committed


def _voter(survey: Survey, membership: Membership | None) -> str | None:
    address = survey.known.address
    if membership is None or address is None or membership.voters.get(address) not in ("", survey.known.node):
        return None
    return address


def _forgotten(candidate: Candidate, all_: Iterable[Candidate]) -> list[str]:
    """What the others remember of a node, and its directory does not keep."""
    survey = candidate.survey
    promised = Witness()
    for other in all_:
        promised = promised.joined(other.survey.known.witnesses.get(survey.known.address or "", Witness()))
    return forgotten(survey.known, survey, promised)


def _weigh(verdict: Verdict, best: Candidate, readable: Sequence[Candidate]) -> None:
    membership = verdict.membership
    counted = {candidate.voter: candidate for candidate in readable if candidate.counts and candidate.voter}
    if membership is not None:
        verdict.missing = [address for address in membership.voters if address not in counted]
        verdict.sound = [voter for voter, it in counted.items() if it.survey.is_whole and not it.lacks]
        verdict.is_majority = membership.is_majority(verdict.sound)
    partings = {candidate.survey.path: part(best.survey, candidate.survey) for candidate in readable}
    shared = {path: parting.equal_to for path, parting in partings.items()}
    shared[best.survey.path] = best.survey.last
    verdict.evidence = sorted(_evidence(best, counted, shared, readable, membership), key=lambda found: found.id)
    verdict.certain = max(
        (found.id.commit_id for found in verdict.evidence if best.survey.holds(found.id)), default=best.survey.first - 1
    )
    verdict.elsewhere = _elsewhere(readable)
    verdict.contradictions = list(_contradictions(readable, partings, best))
    verdict.holdings = _holdings(best, readable, shared, verdict)
    for candidate in readable:
        candidate.losses = _losses(candidate, best, readable, shared, verdict.certain)


def _evidence(
    best: Candidate,
    counted: dict[str, Candidate],
    shared: dict[Path, int],
    readable: Sequence[Candidate],
    membership: Membership | None,
) -> Iterator[Evidence]:
    """All that proves something committed, of whatever history."""
    for candidate in readable:
        survey = candidate.survey
        if survey.committed and (mark := survey.mark(survey.committed)) is not None:
            yield Evidence(EntryId(mark.term, survey.committed), f"{survey.path} has it as committed")
        for address, witness in survey.known.witnesses.items():
            if witness.floor != GENESIS:
                yield Evidence(witness.floor, f"{survey.path} remembers it as committed, and held by {address}")
    if membership is None:
        return
    reached = {voter: shared[candidate.survey.path] for voter, candidate in counted.items()}
    agreed = membership.agreed(reached)
    mark = best.survey.mark(agreed)
    if mark is None:
        return
    holders = [candidate for voter, candidate in counted.items() if reached[voter] >= agreed]
    in_term = [c for c in holders if c.survey.known.ballot is not None and c.survey.known.ballot.term == mark.term]
    if membership.is_majority([c.voter or "" for c in in_term]):
        words = f"a majority of the voters, {_paths(in_term)}, holds it and is in term {mark.term} still"
        yield Evidence(EntryId(mark.term, agreed), words)
    elif counted.keys() == membership.voters.keys() and all(
        c.survey.is_whole and c.survey.newest.term <= mark.term for c in counted.values()
    ):
        words = f"a majority of the voters, {_paths(holders)}, holds it, and no voter has an entry of a later term"
        yield Evidence(EntryId(mark.term, agreed), words)


def _elsewhere(readable: Sequence[Candidate]) -> list[Evidence]:
    """What somebody remembers another to have held, and none of these directories holds."""
    found: dict[EntryId, Evidence] = {}
    for candidate in readable:
        for address, witness in candidate.survey.known.witnesses.items():
            if witness.held != GENESIS:
                words = f"{candidate.survey.path} remembers that {address} held it"
                found.setdefault(witness.held, Evidence(witness.held, words))
            if witness.floor != GENESIS:
                words = f"{candidate.survey.path} remembers it as committed, and held by {address}"
                found[witness.floor] = Evidence(witness.floor, words)
    return [found[id] for id in sorted(found) if not any(candidate.survey.holds(id) for candidate in readable)]


def _contradictions(readable: Sequence[Candidate], partings: dict[Path, Parting], best: Candidate) -> Iterator[str]:
    for candidate in readable:
        survey, parting = candidate.survey, partings[candidate.survey.path]
        differ_at = parting.differ_at
        if differ_at is not None and differ_at <= survey.committed:
            yield (
                f"{survey.path} has entry {differ_at} as committed, and {best.survey.path}, which would win an "
                "election, has another one there: one of the two is damaged, forged, or of another cluster"
            )


def _holdings(
    best: Candidate, readable: Sequence[Candidate], shared: dict[Path, int], verdict: Verdict
) -> list[Holding]:
    """The history of the best directory, and those that leave it, in rows that the same ones hold."""
    rows = list(_rows(best, best.survey.first, readable, shared, verdict, verdict.certain))
    for candidate, first in _branches(best, readable, shared):
        inside = {
            other.survey.path: part(candidate.survey, other.survey).equal_to
            for other in readable
            if other is not candidate
        }
        inside[candidate.survey.path] = candidate.survey.last
        rows += _rows(candidate, first, readable, inside, verdict, candidate.survey.committed)
    return rows


def _branches(
    trunk: Candidate, readable: Sequence[Candidate], shared: dict[Path, int]
) -> Iterator[tuple[Candidate, int]]:
    """Those whose log leaves the trunk's, each from where it has something that was not told before."""
    told: list[Candidate] = []
    for candidate in sorted(readable, key=lambda c: c.survey.last, reverse=True):
        survey = candidate.survey
        known = max([shared[survey.path], *(part(survey, other.survey).equal_to for other in told)])
        if candidate is not trunk and known < survey.newest.commit_id:
            yield candidate, known + 1
            told.append(candidate)


def _rows(
    owner: Candidate,
    first: int,
    readable: Sequence[Candidate],
    shared: dict[Path, int],
    verdict: Verdict,
    certain: int,
) -> Iterator[Holding]:
    """The entries of one log from `first` on, cut where somebody's copy ends, and where certainty does."""
    newest = owner.survey.newest.commit_id
    ends = sorted(end for end in {*shared.values(), certain, newest} if first <= end <= newest)
    for last in ends:
        holders = [candidate for candidate in readable if shared[candidate.survey.path] >= last]
        voters = {candidate.voter for candidate in holders if candidate.counts and candidate.voter}
        is_majority = verdict.membership is not None and verdict.membership.is_majority(voters)
        paths = [candidate.survey.path for candidate in holders]
        yield Holding(first, last, owner.survey.path, paths, len(voters), is_majority, last <= certain)
        first = last + 1


def _losses(
    choice: Candidate, best: Candidate, readable: Sequence[Candidate], shared: dict[Path, int], certain: int
) -> list[Loss]:
    """What the others have and `choice` has not."""
    known = {candidate.survey.path: part(choice.survey, candidate.survey).equal_to for candidate in readable}
    losses = []
    newest = best.survey.newest.commit_id
    if choice is not best and known[best.survey.path] < newest:
        losses.append(Loss(best.survey.path, known[best.survey.path] + 1, newest, certain))
    for candidate, start in _branches(best, readable, shared):
        survey = candidate.survey
        first, newest = max(start, known[survey.path] + 1), survey.newest.commit_id
        if candidate is not choice and first <= newest:
            losses.append(Loss(survey.path, first, newest, survey.committed))
    return losses


def _paths(candidates: Iterable[Candidate]) -> str:
    return ", ".join(str(candidate.survey.path) for candidate in candidates)


# --- without reading all --------------------------------------------------------------------------------------


class StoredMarks:
    """The log of an open directory, by what stands in its records: their contents are not read."""

    def __init__(self, opened: Directory) -> None:
        self.first, self.last = opened.first, opened.last
        self._opened = opened

    def mark(self, commit_id: int) -> EntryMark | None:
        base = self._opened.base
        if base is not None and commit_id == base.id.commit_id > 0:
            return EntryMark(base.id.term, base.checksum)
        stored, _ = self._opened.look_up(commit_id)
        if stored is None:
            return None
        try:
            entry = records.unpack_entry(commit_id, bytes(stored))
        except StoreDamaged:
            return None
        return EntryMark(entry.term, entry.checksum)


def needs_scan(opened: Directory, parting: Parting) -> bool:
    """True when the place where the log parts from another can't be told by halving: a fact is damaged, there is a hole
    in the log, or an entry at that place does not match its checksum."""
    if opened.facts.damage or opened.kept != opened.last - opened.first + 1:
        return True
    first = max(parting.equal_to, opened.first)
    return any(record.damage for record in opened.entries(first, min(first + 1, opened.last)))


# --- which keys -----------------------------------------------------------------------------------------------


class Touched(Struct, frozen=True):
    """The last of a row of entries that changes a key."""

    namespace: str
    key: str
    commit_id: int
    command: bytes


def touched(opened: Directory, first: int, last: int) -> dict[tuple[str, str], Touched]:
    """The keys that the entries from `first` to `last` change, and the last change of each. Damaged entries are left
    out: they are told elsewhere."""
    found: dict[tuple[str, str], Touched] = {}
    for record in opened.entries(first, last):
        if record.entry is None or record.damage:
            continue
        change = _change(record.entry)
        if change is not None:
            found[change.namespace, change.key] = change
    return found


def _change(entry: Entry) -> Touched | None:
    try:
        command = decode_command(entry.command)
    except ProtocolError:
        return None
    if isinstance(command, PutCommand | DeleteCommand):
        return Touched(command.namespace, command.key, entry.commit_id, bytes(entry.command))
    return None


class Seen(Struct, frozen=True):
    """What a directory has of a key; without a `record`, nothing."""

    record: records.Record | None
    damage: str = ""


class KeyDifference(Struct, frozen=True):
    """A key of which not all directories have the same at one commit_id."""

    namespace: str
    key: str
    seen: dict[Path, Seen]
    """Of those for which it can be told."""


def key_differences(
    opened: Sequence[Directory],
    commit_id: int,
    partings: Sequence[int],
    advance: Callable[[int], object],
    doubtful: Callable[[Path, str], object],
) -> Iterator[KeyDifference]:
    """The keys whose values differ as of `commit_id`, which all have reached. `partings`: for each directory the first
    entry in which its log may differ from the first one's. `doubtful` is told what is wrong with more values than one.

    A directory that has gone on says nothing of the keys that it has changed since, unless its log differs from the
    first one's before: then the value is taken from the log. Where logs are equal, so was what they made of the key.
    """
    later = [set(touched(one, commit_id + 1, one.committed or 0)) for one in opened]
    before = [touched(one, start, commit_id) for one, start in zip(opened, partings, strict=True)]
    streams = [_stream(number, one, doubtful) for number, one in enumerate(opened)]
    steps = 0
    for (namespace, key), group in groupby(merge(*streams, key=lambda item: item[:2]), key=lambda item: item[:2]):
        values = {number: value for _, _, number, value in group}
        steps += len(values)
        if steps >= _STEP:
            advance(steps)
            steps = 0
        seen = {}
        for number, one in enumerate(opened):
            if (namespace, key) not in later[number]:
                value = values.get(number)
                seen[one.path] = Seen(None) if value is None else Seen(value.record, value.damage)
            elif (change := before[number].get((namespace, key))) is not None:
                seen[one.path] = _as_seen(change)
        if any(not _is_same(one, other) for one, other in pairwise(seen.values())):
            yield KeyDifference(namespace, key, seen)
    advance(steps)


def _stream(
    number: int, opened: Directory, doubtful: Callable[[Path, str], object]
) -> Iterator[tuple[str, str, int, StoredValue]]:
    for value in opened.values():
        if value.namespace is None or value.key is None:
            doubtful(opened.path, value.damage)
        else:
            yield value.namespace, value.key, number, value


def _as_seen(change: Touched) -> Seen:
    command = decode_command(change.command)
    if isinstance(command, PutCommand):
        return Seen(records.Record(0, change.commit_id, 0, 0, command.value))
    return Seen(None)


def _is_same(one: Seen, other: Seen) -> bool:
    if one.record is None or other.record is None or one.damage or other.damage:
        return one.record is other.record and not one.damage and not other.damage
    is_same = one.record.modified == other.record.modified and bytes(one.record.value) == bytes(other.record.value)
    from_log = not one.record.version or not other.record.version
    return is_same and (from_log or one.record.version == other.record.version)
