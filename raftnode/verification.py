"""Is everything in a data directory as it must be? Layer 5. Nothing is printed and nothing is written.

What is looked at, and the word by which a `Problem` names it:

    pages    every page of LMDB, from the outside, by lmdb's own verifier
    facts    the node's facts: there, whole, and in agreement with each other, with the log and with the lock file
    entry    each log entry: there, whole by the chain of checksums, and a command that this version understands
    order    terms never fall along the log
    value    each committed value by its own checksum
    replay   each committed value is what the log makes of nothing; this needs a whole log that begins at 1. While a
             flush is under way (`namespaces`), each is looked at as it is on disk, and as of what it should be as of
    promise  the node keeps what it was reminded of: else the directory is an old copy (`consensus.witness`)

**A live node.** A look holds back the reuse of pages, so the long walk over the committed entries takes many of them.
That is sound: none of these entries ever changes, and what has been seen whole stays so. What must agree at one
commit_id is read in one look, the last: the facts, the entries whose effects are not all on disk, the staged ones,
which may be cut any time, and the committed values, against the replay up to that look's commit_id. Pages can be
checked only while nobody writes; `pages_checked` says whether that succeeded.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Final

from msgspec import Struct

from raftnode import records
from raftnode.consensus.journal import Mark
from raftnode.consensus.membership import Membership, cluster_id
from raftnode.consensus.witness import History, Witness
from raftnode.environment import check_structure, open_reader
from raftnode.errors import ProtocolError, StoreDamaged
from raftnode.inspection import Directory, Facts, LogRecord, StoredValue
from raftnode.messages import GENESIS, Entry, EntryId, MembersCommand, decode_command, decode_effect
from raftnode.replay import Replay, Written

_PAGE_TRIES: Final = 3
_STEP: Final = 2000
_MEMBERS: Final = b'{"kind":"members"'


class Problem(Struct, frozen=True, kw_only=True):
    """Something that must not be. See the module's docstring for `check`."""

    check: str
    reason: str
    commit_id: int | None = None
    to: int | None = None
    """With `commit_id`: the last of a row of positions."""
    namespace: str | None = None
    key: str | None = None


class Verified(Struct, kw_only=True):
    """What was looked at, and how much of it was wrong."""

    path: Path
    facts: Facts
    first: int
    last: int
    entries: int = 0
    """Log entries read."""
    values: int = 0
    """Committed values read."""
    replayed_to: int | None = None
    """The values were held against the log up to here; None when the log does not tell all."""
    why_not_replayed: str = ""
    pages_checked: bool = False
    problems: int = 0
    first_bad: int | None = None
    """The first position of the log at which something is wrong."""

    @property
    def is_whole(self) -> bool:
        return not self.problems


Found = Callable[[Problem], object]
Advance = Callable[[int], object]


def verify(path: Path, map_bytes: int, found: Found, advance: Advance) -> Verified:
    """Walk everything in a directory. `found` gets each problem as it is met, `advance` the number of records read
    since it was last called. Raises a StoreError when nothing at all can be read."""
    return _Verification(path, map_bytes, found, advance).run()


def records_in(path: Path, map_bytes: int) -> int:
    """About how many records `verify` will read."""
    with Directory(path, map_bytes) as opened:
        return opened.kept + opened.keys_on_disk


class _Verification:
    def __init__(self, path: Path, map_bytes: int, found: Found, advance: Advance) -> None:
        self._path = path
        self._map_bytes = map_bytes
        self._found = found
        self._advance = advance
        self._steps = 0
        self._replay: Replay | None = Replay()
        self._next = 1
        """The position after those that were read."""
        self._newest: Entry | EntryId = GENESIS
        """The entry that has the highest term so far, the last of these."""
        self._memberships: list[tuple[int, MembersCommand]] = []

    def run(self) -> Verified:
        with Directory(self._path, self._map_bytes) as opened:
            self._verified = Verified(path=self._path, facts=opened.facts, first=opened.first, last=opened.last)
            if opened.first != 1:
                self._end_replay(f"the log begins at {opened.first}")
            elif opened.facts.commit_id is None:
                self._end_replay("what is committed can't be told")
        self._verified.pages_checked = self._check_pages()
        with Directory(self._path, self._map_bytes) as opened:
            committed = opened.facts.commit_id or 0
            written = committed if opened.behind is None else min(opened.behind.after, committed)
            for record in opened.entries(opened.first, written):
                self._check_entry(record, committed)
        with Directory(self._path, self._map_bytes) as opened:
            opened.hold_s, opened.as_on_disk = math.inf, True
            newest = opened.facts.commit_id or 0
            if self._replay is not None:
                self._replay.behind = opened.behind  # it concerns no entry of the look before
            for record in opened.entries(max(opened.first, written + 1)):
                self._check_entry(record, newest)
            self._check_facts(opened)
            self._check_values(opened, newest)
        self._advance(self._steps)
        return self._verified

    def _tell(self, problem: Problem) -> None:
        verified = self._verified
        verified.problems += 1
        if problem.commit_id is not None:
            verified.first_bad = min(problem.commit_id, verified.first_bad or problem.commit_id)
        self._found(problem)

    def _step(self) -> None:
        self._steps += 1
        if self._steps == _STEP:
            self._advance(self._steps)
            self._steps = 0

    def _end_replay(self, reason: str) -> None:
        if self._replay is not None:
            self._replay = None
            self._verified.why_not_replayed = reason

    # --- the pages ---

    def _check_pages(self) -> bool:
        """False when a node wrote all the time: the file at rest is what can be checked."""
        for _ in range(_PAGE_TRIES):
            before = self._transaction()
            problem = ""
            try:
                check_structure(self._path)
            except StoreDamaged as error:
                problem = str(error)
            if self._transaction() == before:
                if problem:
                    self._tell(Problem(check="pages", reason=problem))
                return True
        return False

    def _transaction(self) -> int:
        """The newest transaction in the file."""
        with contextlib.closing(open_reader(self._path, self._map_bytes)) as env:
            return int(env.info()["last_txnid"])

    # --- the log ---

    def _check_entry(self, record: LogRecord, committed: int) -> None:
        self._step()
        entry, commit_id = record.entry, record.commit_id
        if commit_id > self._next:
            self._end_replay(f"entries up to {commit_id - 1} were deleted while the log was read")
        self._next = (record.to or commit_id) + 1
        if record.damage:
            self._tell(Problem(check="entry", reason=record.damage, commit_id=commit_id, to=record.to))
            if commit_id <= committed:
                self._end_replay(f"entry {commit_id} is damaged")
        if entry is None or record.damage:
            return
        self._verified.entries += 1
        if entry.term < self._newest.term:
            reason = f"entry {commit_id} has term {entry.term}, and entry {self._newest.commit_id} {self._newest.term}"
            self._tell(Problem(check="order", reason=reason, commit_id=commit_id))
        else:
            self._newest = entry
        self._carry_out(entry, committed)

    def _carry_out(self, entry: Entry, committed: int) -> None:
        try:
            if self._replay is not None and entry.commit_id <= committed:
                self._replay.apply(entry)
            else:
                decode_effect(entry.command)
            if bytes(memoryview(entry.command)[: len(_MEMBERS)]) == _MEMBERS:
                command = decode_command(entry.command)
                assert isinstance(command, MembersCommand), "its kind says so"
                self._memberships.append((entry.commit_id, command))
        except ProtocolError as error:
            reason = f"entry {entry.commit_id}: {error}"
            self._tell(Problem(check="entry", reason=reason, commit_id=entry.commit_id))
            self._end_replay(reason)

    # --- the facts ---

    def _check_facts(self, opened: Directory) -> None:
        facts = self._verified.facts = opened.facts
        self._verified.first, self._verified.last = opened.first, opened.last
        for reason in [*facts.damage, *_wrong_facts(facts, opened, self._newest), *self._wrong_memberships(facts)]:
            self._tell(Problem(check="facts", reason=reason))
        history = _History(opened, facts.base or Mark(GENESIS, 0))
        lost = forgotten(facts, history, facts.witnesses.get(facts.address or "", Witness()))
        if lost:
            reason = f"this is an old copy of the node's directory: the other members remember that {', '.join(lost)}"
            self._tell(Problem(check="promise", reason=reason))

    def _wrong_memberships(self, facts: Facts) -> list[str]:
        """The memberships that are kept are the newest committed one and the staged ones after it, as the log says."""
        if facts.commit_id is None or not facts.memberships or self._verified.first_bad is not None:
            return []
        kept = {membership.commit_id: membership for membership in facts.memberships}
        in_log = [at for at, _ in self._memberships]
        before_log = min(facts.memberships[0].commit_id, self._verified.first - 1)  # or the founding one
        newest = max((at for at in in_log if at <= facts.commit_id), default=before_log)
        newest = max(newest, before_log)
        staged = [at for at in in_log if at > facts.commit_id]
        expected = [newest, *staged]
        if list(kept) != expected:
            return [f"the memberships of the entries {list(kept)} are kept; by the log those of {expected} are in use"]
        return [
            f"the members as kept are not those of entry {at}"
            for at, command in self._memberships
            if at in kept and not _is_bound(kept[at], command)
        ]

    # --- the committed values ---

    def _check_values(self, opened: Directory, committed: int) -> None:
        for doubt in opened.overlay().damage:
            self._end_replay(doubt)
        expected = None if self._replay is None else self._replay.state
        self._verified.replayed_to = None if expected is None else committed
        for value in opened.values():
            self._step()
            self._verified.values += 1
            if value.damage:
                self._tell(Problem(check="value", reason=value.damage, namespace=value.namespace, key=value.key))
            if expected is not None:
                self._compare(value, expected)
        for key in sorted(expected or ()):
            namespace, _, name = key.decode(errors="backslashreplace").partition("\0")
            reason = f"the value of key {name!r} in namespace {namespace!r} is missing: entry "
            reason += f"{(expected or {})[key].modified} put it"
            self._tell(Problem(check="replay", reason=reason, namespace=namespace, key=name))

    def _compare(self, value: StoredValue, expected: dict[bytes, Written]) -> None:
        """Hold one value against the replay, and strike it out there."""
        record, namespace, name = value.record, value.namespace, value.key
        if namespace is None or name is None:
            return
        key = f"{namespace}\0{name}".encode(errors="surrogateescape")
        wanted = expected.pop(key, None)
        if record is None or value.damage:
            return
        shown = f"the value of key {name!r} in namespace {namespace!r}"
        if wanted is None:
            reason = f"{shown} should not be there: by the log there is none"
        elif not records.pack_record(key, record).startswith(wanted.checksum):
            reason = f"{shown} is not what the log says: that is what entry {wanted.modified} put"
        else:
            return
        self._tell(Problem(check="replay", reason=reason, namespace=namespace, key=name))


def _wrong_facts(facts: Facts, opened: Directory, newest: Entry | EntryId) -> list[str]:
    """What is missing, or contradicts another fact or the log."""
    wrong = []
    if not facts.damage:
        if facts.node is None:
            wrong.append("the record 'node' of the node is missing")
        if opened.last >= opened.first or facts.cluster is not None:
            needed = {"cluster": facts.cluster, "address": facts.address, "memberships": facts.memberships or None}
            wrong += [f"the record {name!r} of the node is missing" for name, fact in needed.items() if fact is None]
    if facts.ballot is not None and newest.term > facts.ballot.term:
        wrong.append(
            f"entry {newest.commit_id} has term {newest.term}, but the ballot only {facts.ballot.term}: "
            "a vote may be forgotten"
        )
    if facts.commit_id is not None and facts.base is not None and facts.commit_id < facts.base.id.commit_id:
        wrong.append(f"{facts.commit_id} is committed, but the log begins after {facts.base.id.commit_id}")
    wrong += _wrong_behind(facts)
    wrong += _wrong_names(facts)
    with contextlib.suppress(OSError):
        held = (opened.path / records.LOCK_FILE).read_text(errors="replace").strip()
        if held and facts.node is not None and held != facts.node:
            wrong.append(f"{records.DATA_FILE} is of node {facts.node}, the directory of node {held}")
    return wrong


def _wrong_behind(facts: Facts) -> list[str]:
    """While a flush is under way, the log has every entry that is not on disk for all keys."""
    if facts.behind is None or facts.commit_id is None or facts.base is None:
        return []
    wrong = facts.behind.contradiction(facts.base.id.commit_id, facts.commit_id)
    return [wrong] if wrong else []


def _wrong_names(facts: Facts) -> list[str]:
    """Who the node is, by its membership and its cluster."""
    wrong = []
    for membership in facts.memberships:
        bound = None if facts.address is None else membership.node_of(facts.address)
        if bound and facts.node is not None and bound != facts.node:
            wrong.append(f"the member at {facts.address} is node {bound}, but this is node {facts.node}")
        is_founding = membership is facts.memberships[-1] and membership.commit_id == 0  # else see `recover`
        if is_founding and facts.cluster not in (None, cluster_id(membership.voters)):
            wrong.append(f"cluster {facts.cluster} was not founded by {', '.join(membership.voters)}")
    return wrong


def _is_bound(kept: Membership, command: MembersCommand) -> bool:
    """True when a membership is the one of an entry, whatever node ids have been learned since."""
    pairs = ((kept.voters, command.voters), (kept.learners, command.learners))
    return all(
        ours.keys() == theirs.keys() and all(not node or ours[address] == node for address, node in theirs.items())
        for ours, theirs in pairs
    )


class _History(Struct, frozen=True):
    """The log of a directory, for `Witness.is_kept`."""

    opened: Directory
    base: Mark

    def holds(self, id: EntryId) -> bool:
        return holds(self.opened, id)


def forgotten(facts: Facts, history: History, promised: Witness) -> list[str]:
    """What of a promise its node's directory does not keep, in words; nothing when all is kept or can't be told."""
    if facts.ballot is None or facts.base is None:
        return []
    term = promised.term
    parts = {f"it was in term {term}": Witness(term)}
    if facts.ballot.term == term:
        parts |= {
            f"it voted for {promised.vote} in term {term}": Witness(term, vote=promised.vote),
            f"it held entry {promised.held.commit_id} of term {promised.held.term}": Witness(term, held=promised.held),
        }
    floor = promised.floor
    parts[f"it held entry {floor.commit_id} of term {floor.term}, which is committed"] = Witness(floor=floor)
    return [words for words, part in parts.items() if not part.is_kept(facts.ballot, history)]


def holds(opened: Directory, id: EntryId) -> bool:
    """True when the log has this very entry, and so every entry before it; what is before the log was committed."""
    if id.commit_id < opened.first:
        return True
    if id.commit_id > opened.last:
        return False
    entry = next(opened.entries(id.commit_id, id.commit_id)).entry
    return entry is not None and entry.id == id
