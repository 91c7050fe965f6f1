"""The repair of a stopped node's directory, from itself and from the other members. Layer 5.

Everything is walked: the pages of LMDB from the outside, every fact of the node, every entry of the log, in LMDB and in
the `tail`, in the chain of its checksums, every committed value, and, when the log reaches back to entry 1, whether the
committed values are what the log makes of nothing: up to the node's commit_id or, where a flush was under way and had
not come to a key, up to the one before it (`namespaces`). What is damaged is put right from what can be proved to be
the same; else nothing is changed. A flush is not ended here: the values are to be what they were, and the next start
goes on with it.

**What may be put right, and what proves it**:

* an entry, by itself: only the byte of its format or its own checksum is wrong, and the entry after it follows from
  what is left (or, for the format, its own checksum does);
* entries from a member, in a row: the first follows from the intact entry before them (rolling checksum, position,
  term), each of the others from the one before it, and the row leads to something of ours that is left: to the entry
  after it, which must follow from its last one, or to the checksum or the contents of an entry that it replaces. That
  proves that they are what was here, as far as CRC-32 proves anything: against damage and mistakes, not against a
  member that forges;
* entries from a member that lead to nothing of ours, since they reach to the end of our log. There is no proof that
  they are what was here, and none is needed: the member has *committed* them, so no other entry will ever be committed
  in their places (thesis 3.6.3), and a leader would put them here. They are taken if the member is who it should be
  (cluster and node id), every other member that answers says the same, and nothing of ours that is whole contradicts
  them: a whole entry of ours is only ever replaced where it was staged and has another term, which is the conflict
  rule of every follower (thesis 3.5). They may have a higher term than this node has heard of: then the ballot becomes
  that term's, with the vote free, as with any message of that term;
* a committed value: the log, whole by then, says what it was, as of the commit_id that it should be as of.

**An end that is not known.** When the last record of the tail is damaged, or its file is gone or was cut off, nothing
here tells how many entries were in it, if any; and this node may have acknowledged them. All of them came under the
ballot that LMDB has, as another one would have ended the generation; say it is of term T. So they are those of the
leader of term T, or this node led itself. The log goes to where nothing that was lost can count any more, as said by
one member:

* it leads in term T, and its log has ended before: then there never was anything to lose. Else, to that end;
* or it has committed an entry of a later term: the leader of that term was elected without this node's vote, so all
  that was committed in T is before this entry in its log (Leader Completeness). The ballot is raised to its term;
* or it has committed more entries, up to one of term T, than the tail has room for.

What is between comes from members, as above: it is committed there. If no member says any of this, nothing is changed.

**What is never done**: to cut the log or leave it shorter, even by a staged entry that nobody seems to have. This node
may have acknowledged it, and with its acknowledgement it may have been committed. Such an entry stays, and so does the
refusal, until a member has committed something in its place. Nor are a ballot, a node id or any other fact made up:
what this node has promised only its own disk knows.

All changes go in one synced transaction, and with them into LMDB all that is sound in the tail, whose file is out of
use from then on. The transaction is checked as a whole before it is committed and once more after: a kill at any moment
leaves the directory as it was, or repaired. Where nothing is damaged, nothing is written.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import lmdb
import msgspec
from msgspec import UNSET, Struct

from raftnode import records, tail
from raftnode.blocking import LineConnection
from raftnode.config import Role, Settings
from raftnode.consensus.ballot import Ballot
from raftnode.consensus.journal import Mark
from raftnode.consensus.membership import Membership
from raftnode.environment import Environment
from raftnode.errors import ProtocolError, StoreDamaged, StoreError, StoreFailed, StoreTooNew
from raftnode.inspection import check_entry
from raftnode.messages import (
    GENESIS,
    LMDB_KEY_BYTES,
    Answer,
    Entries,
    EntriesAnswer,
    Entry,
    MembersCommand,
    PutCommand,
    Request,
    Status,
    StatusAnswer,
    chain,
    decode_answer,
    decode_command,
    encode,
)
from raftnode.namespaces import Behind
from raftnode.replay import Replay, Written
from raftnode.tail import TailFact

_FACTS: Final[dict[bytes, Any]] = {
    b"format": int,
    b"node": str,
    b"cluster": str,
    b"address": str,
    b"ballot": Ballot,
    b"commit_id": int,
    b"behind": Behind | None,
    b"base": Mark,
    b"memberships": list[Membership],
    b"tail": TailFact,
    records.STATE_FACT: str,
}
_OF_EVERY_NODE: Final = ("format", "node")
_OF_A_MEMBER: Final = (*_OF_EVERY_NODE, "cluster", "address", "ballot", "commit_id", "memberships")
_MISMATCH: Final = "does not match its checksum"
_LEAST_BYTES: Final = records.ENTRY_HEAD_BYTES
"""An entry takes more in the tail."""
_LOOKS: Final = 20
_BETWEEN_LOOKS_S: Final = 0.05
"""So often and with such pauses a leader is asked whether it has committed the end of its log."""
_ANY: Final = 2**63 - 1
"""A last entry that nobody has."""

LOST: Final = (
    "Nothing was changed. The other members can't know this: what a node has promised is on its own disk alone. If "
    "there is a copy of the directory from after the node stopped, put that back; never an older one, which has "
    "forgotten votes and acknowledgements. If there is none, this member is lost: keep its directory as it is, and run "
    "the others, which go on as long as they are a majority"
)

Tell = Callable[[str], object]


class Unproved(StoreError):
    """Why what one member has can't be taken; another member's may do."""


def repair(
    data_dir: Path,
    nodes: Sequence[str] = (),
    *,
    tell: Tell,
    is_dry: bool = False,
    timeout: float = 10.0,
    settings: Settings | None = None,
) -> bool:
    """Find what is damaged in the directory of a stopped node, and put it right from itself and from `nodes`, addresses
    of members (default: all others). `tell` gets a line for each thing found or done. `is_dry`: only say what would be
    done. `timeout`: seconds that a member may take for one answer.

    True when the directory is whole in the end; False only with `is_dry`. Raises a StoreError when it can't be made
    whole, with the reason and what to do; nothing has changed then.
    """
    settings = settings or Settings()
    with contextlib.ExitStack() as stack:
        env = _open(data_dir, settings)
        stack.callback(env.close)
        with env.read() as txn:
            facts = _read_facts(env, txn)
            if facts is None:
                tell(f"{data_dir}: node {env.held_node} was never founded: there is nothing to repair")
                return True
            log = _Log(env, txn, facts)
            log.examine(tell)
            members = [_Member(node, facts, timeout, settings) for node in nodes or facts.others]
            for member in members:
                stack.callback(member.close)
            done = _settle_end(log, members) + _mend(log, members, tell)
            values = _wrong_values(env, txn, log, tell)
            ballot = _ballot_for(log)
        checked = f"node {facts.node} at {facts.address}: log up to entry {log.last}, {facts.commit_id} committed"
        if ballot != facts.ballot:
            done.append(f"the term: {ballot.term}, that of entry {log.last}, not {facts.ballot.term}; no vote is cast")
        done += [f"{_shown(key)}: " + ("deleted" if value is None else "by the log") for key, value in values.items()]
        for line in done:
            tell(f"{'would repair' if is_dry else 'repairing'}: {line}")
        if done and not is_dry:
            _carry_out(env, log, values, ballot)
    tell(f"{checked}: {'whole' if not done else 'damaged, and can be repaired' if is_dry else 'repaired, and whole'}")
    return not (done and is_dry)


def _open(data_dir: Path, settings: Settings) -> Environment:
    try:
        return Environment(data_dir, settings, True, None)
    except StoreDamaged as error:
        raise StoreDamaged(f"{error}. {LOST}") from error


def _carry_out(env: Environment, log: _Log, values: dict[bytes, bytes | None], ballot: Ballot) -> None:
    """All changes, in one transaction, which is given up when it does not make the directory whole."""
    try:
        with env.write() as txn:
            _change(env, txn, log, values, ballot)
            _verify(env, txn, LOST)
    except StoreFailed as failure:
        if isinstance(failure.__cause__, lmdb.CorruptedError | lmdb.PageNotFoundError | lmdb.BadValsizeError):
            raise StoreDamaged(
                f"{env.path}: the pages of LMDB itself are damaged: {failure.__cause__}. {LOST}"
            ) from failure
        raise
    with env.read() as txn:
        _verify(env, txn, "It did before they were synced: check this machine's memory and disk")


def _change(
    env: Environment, txn: lmdb.Transaction, log: _Log, values: dict[bytes, bytes | None], ballot: Ballot
) -> None:
    for key in log.strays:
        txn.delete(key, db=env.db(records.LOG))
    mended = {commit_id: records.pack_entry(entry) for commit_id, entry in log.mended.items()}
    for commit_id, record in (log.from_tail | mended).items():
        txn.put(records.log_key(commit_id), record, db=env.db(records.LOG))
    if log.facts.tail.bytes:
        txn.put(b"tail", records.pack_meta(b"tail", log.facts.tail.retired), db=env.db(records.META))
    for key, value in values.items():
        if value is None:
            txn.delete(key, db=_state(env, txn))
        else:
            txn.put(key, value, db=_state(env, txn))
    if ballot != log.facts.ballot:
        txn.put(b"ballot", records.pack_meta(b"ballot", ballot), db=env.db(records.META))


def _verify(env: Environment, txn: lmdb.Transaction, advice: str) -> None:
    """Walk everything again. Raises StoreDamaged when something is still wrong."""
    problems: list[str] = []
    facts = _read_facts(env, txn)
    assert facts is not None, "a repair does not unfound a node"
    log = _Log(env, txn, facts)
    log.examine(problems.append)
    if not problems:
        _mend(log, (), problems.append)
        _wrong_values(env, txn, log, problems.append)
    if problems or _ballot_for(log) != facts.ballot:
        wrong = "; ".join(problems) or "the ballot"
        raise StoreDamaged(f"{env.path} is not whole with all changes made: {wrong}. {advice}")


# --- the facts ------------------------------------------------------------------------------------------------


class Facts(Struct, frozen=True, kw_only=True):
    """The facts of a founded node, each checked."""

    node: str
    cluster: str
    address: str
    ballot: Ballot
    commit_id: int
    memberships: list[Membership]
    behind: Behind | None = None
    base: Mark = Mark(GENESIS, 0)
    tail: TailFact = TailFact()

    @property
    def contradictions(self) -> list[str]:
        """What can't be true together, in words."""
        base, committed, behind = self.base.id.commit_id, self.commit_id, self.behind
        if base > committed:
            return [f"{committed} is committed, but the log begins after {base}"]
        wrong = "" if behind is None else behind.contradiction(base, committed)
        return [wrong] if wrong else []

    @property
    def others(self) -> list[str]:
        """The other members' addresses."""
        return [address for address in self.memberships[-1].addresses if address != self.address]


def _read_facts(env: Environment, txn: lmdb.Transaction) -> Facts | None:
    """Every fact, checked; None when the node was never founded. Raises StoreDamaged, StoreTooNew."""
    found: dict[str, Any] = {}
    problems: list[str] = []
    with txn.cursor(env.db(records.META)) as cursor:
        for name, stored in _pairs(cursor):
            try:
                found[name.decode()] = records.unpack_meta(name, stored, _FACTS.get(name, Any))
            except (StoreDamaged, UnicodeDecodeError) as error:
                problems.append(str(error))
    if found.get("format", 0) > records.FORMAT:
        raise StoreTooNew(f"{env.path} was written in format {found['format']}: repair it with the newer raftnode")
    is_empty = all(txn.stat(env.db(name))["entries"] == 0 for name in (records.LOG, records.COMMITTED))
    needed: tuple[str, ...] = _OF_EVERY_NODE if is_empty and "cluster" not in found else _OF_A_MEMBER
    if needed is _OF_A_MEMBER and found.get("format", 0) >= tail.SINCE_FORMAT:
        needed = (*needed, "tail")
    problems += [f"the record {name!r} of the node is missing" for name in needed if name not in found and not problems]
    if not problems and env.held_node not in ("", found["node"]):
        problems.append(f"{records.DATA_FILE} is of node {found['node']}, the directory of node {env.held_node}")
    facts = None
    if not problems and needed is not _OF_EVERY_NODE:
        facts = Facts(**{name: found[name] for name in Facts.__struct_fields__ if name in found})
        problems += facts.contradictions
    if problems:
        raise StoreDamaged(f"{env.path} can't be repaired: {'; '.join(problems)}. {LOST}")
    return facts


# --- the log --------------------------------------------------------------------------------------------------


class _Log:
    """The log in one transaction, with what only the tail has, and over it the entries that are to replace its damaged
    ones.

    Public facts: `first` and `last`, where it begins and ends by its count, as any single key may be damaged;
    `damaged`, the positions whose entry is certainly damaged or missing; `strays`, keys past the end of LMDB's part;
    `from_tail`, the records that LMDB is to get from the tail, by position; `mended`, what is to be written besides, by
    position; `adopted`, from where on it is what a member has committed, without a proof that it was here before (0:
    nowhere); `has_open_end`, true while nothing tells how many entries are lost from `last` on, if any.
    """

    def __init__(self, env: Environment, txn: lmdb.Transaction, facts: Facts) -> None:
        """Raises StoreDamaged when the tail says that LMDB's file is an older one."""
        self.path = env.path
        self.facts = facts
        self._txn = txn
        self._db = env.db(records.LOG)
        self.first = facts.base.id.commit_id + 1
        self._in_lmdb = self._count()
        found = _read_tail(self.path, facts.tail, self._in_lmdb)
        self.from_tail = {at: record for at, record in found.records.items() if record and self._in_file(at) is None}
        self.last = max([self._in_lmdb, *found.records])
        self.has_open_end = self.last > self._in_lmdb and not found.records[self.last]
        self._tail_damage = found.damage
        self.damaged = {at for at, record in found.records.items() if not record and self._in_file(at) is None}
        self.strays: list[bytes] = []
        self.mended: dict[int, Entry] = {}
        self.adopted = 0

    def _count(self) -> int:
        """Where LMDB's part ends: by its count, but not before what follows that without a gap."""
        last = max(self.first - 1 + self._txn.stat(self._db)["entries"], self.facts.commit_id)
        while self._txn.get(records.log_key(last + 1), db=self._db) is not None:
            last += 1
        return last

    def _in_file(self, commit_id: int) -> bytes | None:
        """What LMDB has at a position of its part."""
        stored = self._txn.get(records.log_key(commit_id), db=self._db) if commit_id <= self._in_lmdb else None
        return None if stored is None else bytes(stored)

    def _stored(self, commit_id: int) -> bytes | None:
        """What LMDB has at a position, or else the tail."""
        return self.from_tail.get(commit_id) or self._in_file(commit_id)

    def end_at(self, last: int) -> None:
        """It is known where it ends."""
        self.last, self.has_open_end = last, False
        self.damaged = {commit_id for commit_id in self.damaged if commit_id <= last}

    def examine(self, tell: Tell) -> None:
        """Find what is certainly damaged: every such entry, not only the first. After a damaged one, the next is held
        against the checksum that is stored there and against the one computed of what is there; one that fits neither
        may be damaged itself, or not: `_mend` sees when it knows what was before it."""
        for problem in self._tail_damage:
            tell(f"found: {problem}")
        seeds: tuple[int, ...] = (self.facts.base.checksum,)
        is_certain = True
        for commit_id in range(self.first, self.last + 1):
            stored = self._stored(commit_id)
            if stored is None:
                self.note(commit_id, f"entry {commit_id} is not in the log", tell)
                seeds, is_certain = (), False
                continue
            record, after = check_entry(commit_id, stored, seeds)
            if not record.damage:
                seeds, is_certain = after, bool(seeds)
            elif is_certain or not self.is_readable(commit_id):
                self.note(commit_id, record.damage, tell)
                seeds, is_certain = after, False
            else:
                seeds = after[:1]
        with self._txn.cursor(self._db) as cursor:
            if cursor.set_range(records.log_key(self._in_lmdb + 1)):
                self.strays = [key for key, _ in _pairs(cursor)]
        for key in self.strays:
            tell(f"found: the log should end at {self._in_lmdb}, but has a record under the key {key.hex()}")

    def note(self, commit_id: int, problem: str, tell: Tell) -> None:
        """An entry is damaged for certain."""
        if commit_id not in self.damaged:
            self.damaged.add(commit_id)
            tell(f"found: {problem}")

    def is_readable(self, commit_id: int) -> bool:
        """True when the record at a position has the form of one, whatever its checksum says."""
        stored = self._stored(commit_id)
        return stored is not None and not check_entry(commit_id, stored, ())[0].damage

    def contents(self, commit_id: int) -> Entry | None:
        """What is stored at a position, whatever its checks say; None when nothing can be made of it."""
        stored = self._stored(commit_id)
        return None if stored is None else check_entry(commit_id, stored, ())[0].entry

    def entry(self, commit_id: int) -> Entry:
        """An entry as it will be. All up to there must be whole or mended."""
        found = self.mended.get(commit_id) or self.contents(commit_id)
        assert found is not None, f"entry {commit_id} is neither whole nor mended"
        return found

    def before(self, commit_id: int) -> Mark:
        """The point in the history before an entry. All up to there must be whole or mended."""
        if commit_id == self.first:
            return self.facts.base
        entry = self.entry(commit_id - 1)
        return Mark(entry.id, entry.checksum)


def _computed(before: Mark, entry: Entry) -> int:
    """The checksum that an entry's contents have after `before`."""
    return chain(before.checksum, entry.term, entry.commit_id, entry.time, entry.command)


def _follows(before: Mark, entry: Entry | None) -> bool:
    """True when an entry is whole and continues the history."""
    return (
        entry is not None
        and entry.commit_id == before.id.commit_id + 1
        and entry.term >= before.id.term
        and entry.checksum == _computed(before, entry)
    )


def _ballot_for(log: _Log) -> Ballot:
    """The ballot with which this log can be had: entries that were not this node's before, of a higher term than it has
    heard of, raise it, as any message of that term would. Its own of a higher term tell that its ballot was lost."""
    ballot = log.facts.ballot
    own, newest = log.before(log.adopted or log.last + 1).id, log.before(log.last + 1).id
    if own.term > ballot.term:
        raise StoreDamaged(
            f"{log.path} can't be repaired: entry {own.commit_id} has term {own.term}, but the ballot only "
            f"{ballot.term}. {LOST}"
        )
    return ballot.in_term(newest.term) if newest.term > ballot.term else ballot


def _read_tail(path: Path, fact: TailFact, after: int) -> tail.Found:
    """What the tail has besides LMDB. Raises StoreDamaged when LMDB's file is older than it, StoreFailed."""
    try:
        found = tail.look(path, fact, after)
    except OSError as error:
        raise StoreFailed(f"{path / records.TAIL_FILE} can't be read: {error}. Check the disk") from error
    if found.is_newer:
        raise StoreDamaged(f"{path} can't be repaired: {'; '.join(found.damage)}. {LOST}")
    return found


# --- mending the log ------------------------------------------------------------------------------------------


def _settle_end(log: _Log, members: Sequence[_Member]) -> list[str]:
    """Find where the log must go to, if that is not known; see the module's text. Returns what to say of it when it is
    known to have lost nothing. Raises StoreDamaged when no member tells."""
    if not log.has_open_end:
        return []
    reasons = []
    for member in members:
        try:
            last = _end_by(log, member)
        except Unproved as why:
            reasons.append(f"{member.address}: {why}")
            continue
        if last < log.last:
            log.end_at(log.last - 1)
            return [
                f"the end of the log: entry {log.last}, as by {member.address}, which leads in term "
                f"{log.facts.ballot.term}, there was none after it"
            ]
        log.end_at(last)
        return []
    told = "; ".join(reasons) or "there is no other member to ask"
    raise StoreDamaged(
        f"{log.path} can't be repaired now, and nothing was changed: how many entries are lost from {log.last} on is "
        f"not known, and this node may have acknowledged them: the log is never cut ({told}). Start the other members, "
        f"see that one of them leads and has committed entry {log.last} (raftnode status; write something), and run "
        f"this again. If that does not help, let another member lead (raftnode transfer-leader)"
    )


def _end_by(log: _Log, member: _Member) -> int:
    """Where the log must go to by what one member says; before `log.last`, when there was nothing to lose. Raises
    Unproved."""
    term, fact = log.facts.ballot.term, log.facts.tail
    enough = log.last + fact.bytes // _LEAST_BYTES
    if (last := member.last_as_leader(term)) is not None:
        if last < log.last:
            return last
        enough = min(enough, last)
    at = log.last
    try:
        for entry in member.entries(log.last, _ANY):
            at = entry.commit_id
            if entry.term > term or (entry.term == term and at >= enough):
                return at
    except Unproved as why:
        raise Unproved(f"{why}, and none up to there is of a term after {term}") from why
    raise AssertionError("it gives entries until it has none")


def _mend(log: _Log, members: Sequence[_Member], tell: Tell) -> list[str]:
    """Follow the history from its beginning, and find proved entries where ours do not continue it. Returns what to say
    of them. Raises StoreDamaged when one can't be had."""
    done = [f"the record under the key {key.hex()}: deleted" for key in log.strays]
    first, before = log.first, log.facts.base
    while first <= log.last:
        ours = log.contents(first)
        if ours is not None and _follows(before, ours) and log.is_readable(first):
            first, before = first + 1, Mark(ours.id, ours.checksum)
            continue
        log.note(first, f"entry {first} does not match its checksum", tell)
        entries, source = _replacements(log, first, before, members)
        log.mended |= {entry.commit_id: entry for entry in entries}
        first, last = entries[0].commit_id, entries[-1].commit_id
        done.append((f"entry {first}" if first == last else f"entries {first} to {last}") + f": {source}")
        first, before = last + 1, Mark(entries[-1].id, entries[-1].checksum)
    return done


def _replacements(log: _Log, first: int, before: Mark, members: Sequence[_Member]) -> tuple[list[Entry], str]:
    """Proved entries from `first` on, as many as it takes, and what proves them."""
    reasons = []
    if (entry := _proved_by_itself(log, first, before)) is not None:
        return [entry], "its contents are intact, as what follows shows"
    for member in members:
        try:
            return _from_member(log, first, before, member, members)
        except Unproved as why:
            reasons.append(f"{member.address}: {why}")
    told = "; ".join(reasons) or "there is no other member to ask"
    raise StoreDamaged(
        f"{log.path} can't be repaired now, and nothing was changed: entry {first} could not be had ({told}). "
        + _advice(log, first)
    )


def _advice(log: _Log, first: int) -> str:
    """What helps when no member gave an entry."""
    if first <= log.facts.commit_id:
        return "Give the addresses of members that run and have the entry, with --node, and run this again"
    return (
        f"Entry {first} is staged here, and this node may have acknowledged it: it is never cut. Start the other "
        f"members, write something until one of them has committed entry {log.last} (see raftnode status), and run "
        "this again"
    )


def _proved_by_itself(log: _Log, first: int, before: Mark) -> Entry | None:
    """An entry of which only the record's format or its checksum is damaged."""
    entry = log.contents(first)
    if entry is None or entry.term < before.id.term:
        return None
    intact = msgspec.structs.replace(entry, checksum=_computed(before, entry))
    is_proved = entry.checksum == intact.checksum or _follows(Mark(intact.id, intact.checksum), log.contents(first + 1))
    return intact if is_proved else None


def _from_member(
    log: _Log, first: int, before: Mark, member: _Member, members: Sequence[_Member]
) -> tuple[list[Entry], str]:
    """A row of entries that one member has committed, and what proves it; see the module's text. Raises Unproved."""
    entries: list[Entry] = []
    conflict = 0
    first, before = _fork(log, first, before, member)
    for entry in member.entries(first, log.last):
        if not _follows(before, entry):
            raise Unproved(f"its entry {entry.commit_id} does not follow our entry {before.id.commit_id}")
        entries.append(entry)
        ours = log.contents(entry.commit_id)
        if ours is not None and entry.checksum in (ours.checksum, _computed(before, ours)):
            return entries, f"from {member.address}, and it is what was here by what is left of it"
        if ours is not None and not _gives_way(log, ours, entry):
            conflict = conflict or entry.commit_id
        before = Mark(entry.id, entry.checksum)
        if entry.commit_id < log.last and _follows(before, log.contents(entry.commit_id + 1)):
            return entries, f"from {member.address}, and entry {entry.commit_id + 1} here follows from it"
    if conflict:
        raise Unproved(f"its entries do not lead to our entry {conflict}: one of the two histories is wrong")
    agreed = _agree(log, entries, [other for other in members if other is not member])
    log.adopted = first
    return entries, f"from {', '.join([member.address, *agreed])}, where it is committed"


def _fork(log: _Log, first: int, before: Mark, member: _Member) -> tuple[int, Mark]:
    """Where what a member has committed leaves our log: at the damaged entry, or before it where ours are staged."""
    staged = log.facts.commit_id + 1
    if staged < first:
        for entry in member.entries(staged, first - 1):
            if entry != log.entry(entry.commit_id):
                return entry.commit_id, log.before(entry.commit_id)
    return first, before


def _gives_way(log: _Log, ours: Entry, entry: Entry) -> bool:
    """True when an entry of ours may be replaced by one to which nothing of ours leads: it is certainly damaged, or
    staged and of another term, as a leader would have it."""
    at = entry.commit_id
    return at in log.damaged or (at > log.facts.commit_id and ours.term != entry.term)


def _agree(log: _Log, entries: Sequence[Entry], others: Sequence[_Member]) -> list[str]:
    """Nothing of ours proves these entries: no other member may have committed anything else in their place. Returns
    who else has committed them."""
    if log.facts.memberships[-1].commit_id >= entries[0].commit_id or any(
        isinstance(_command(entry), MembersCommand) for entry in entries
    ):
        raise Unproved("among its entries is a change of the members, and nothing here proves that it was known here")
    agreed = []
    for other in others:
        try:
            found = next(other.entries(log.last, log.last))
        except Unproved:
            continue  # it does not run, or has not come so far: it says nothing else
        if (found.id, found.checksum) != (entries[-1].id, entries[-1].checksum):
            raise Unproved(f"{other.address} has committed another entry {log.last}")
        agreed.append(other.address)
    return agreed


def _command(entry: Entry) -> object:
    try:
        return decode_command(entry.command)
    except ProtocolError as error:
        raise Unproved(f"entry {entry.commit_id}: {error}") from error


class _Member:
    """Another member, asked for what it has committed. Connects with the first question."""

    def __init__(self, address: str, facts: Facts, timeout: float, settings: Settings) -> None:
        self.address = address
        self._facts = facts
        self._timeout = timeout
        self._limit = settings.peer_frame_bytes
        self._connection: LineConnection | None = None

    def close(self) -> None:
        """May be called again; the next question opens a new connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def last_as_leader(self, term: int) -> int | None:
        """The end of its log now, if it leads in this term; waits a moment until it has committed that. Raises
        Unproved."""
        end: int | None = None
        for _ in range(_LOOKS):
            answer = self._ask(Status())
            says = answer.data if isinstance(answer, StatusAnswer) and answer.data is not None else {}
            if (says.get("role"), says.get("term")) != (Role.LEADER, term):
                break
            try:
                end = int(says["last"]["commit_id"]) if end is None else end
                if int(says["commit_id"]) >= end:
                    break
            except (KeyError, TypeError, ValueError) as error:
                raise Unproved(f"its status can't be read: {error!r}") from error
            time.sleep(_BETWEEN_LOOKS_S)
        return end

    def entries(self, first: int, last: int) -> Iterator[Entry]:
        """The entries from `first` to `last`, in order. Raises Unproved where it can't give the next."""
        while first <= last:
            answer = self._ask(Entries(first=first, last=last))
            if not isinstance(answer, EntriesAnswer):
                raise Unproved(f"it answered with {type(answer).__name__}")
            if not answer.entries:
                raise Unproved(f"it has committed only up to {answer.commit_id}, not yet entry {first}")
            for entry in answer.entries:
                if entry.commit_id != first:
                    raise Unproved(f"it sent entry {entry.commit_id} where {first} was asked for")
                yield entry
                first += 1

    def _ask(self, request: Request) -> Answer:
        try:
            if self._connection is None:
                self._connection = LineConnection(self.address, self._timeout, self._limit)
                self._check_identity()
            answer = decode_answer(self._connection.request(encode(request), self._timeout))
        except (OSError, ProtocolError) as error:
            self.close()
            raise Unproved(f"no answer: {error}") from error
        if answer.error is not UNSET:
            raise Unproved(f"{answer.error.message} ({answer.error.code})")
        return answer

    def _check_identity(self) -> None:
        """Only a member of this cluster, with the id under which this node knows it, says what is committed."""
        assert self._connection is not None
        answer = decode_answer(self._connection.request(encode(Status()), self._timeout))
        says = answer.data if isinstance(answer, StatusAnswer) and answer.data is not None else {}
        facts, who, node = self._facts, str(says.get("address")), says.get("node")
        known = facts.memberships[-1].node_of(who)
        if says.get("cluster") != facts.cluster or known is None or who == facts.address or known not in ("", node):
            self.close()
            raise Unproved(f"there is {who}, node {node} of cluster {says.get('cluster')}: no other member of ours")


# --- the committed values -------------------------------------------------------------------------------------


def _wrong_values(env: Environment, txn: lmdb.Transaction, log: _Log, tell: Tell) -> dict[bytes, bytes | None]:
    """What has to be written so that the committed values are what the log makes of nothing, each up to where it had
    come: by store key, the packed value, or None where there should be none. Memory is needed for every key, but only
    for the values that are wrong.

    A log that begins later does not tell all: then each value's own checksum must do. Raises StoreDamaged.
    """
    expected = _replay(log) if log.first == 1 else None
    wrong: dict[bytes, bytes | None] = {}
    with txn.cursor(_state(env, txn)) as cursor:
        for key, stored in _pairs(cursor):
            is_sound = _is_sound(key, stored)
            if expected is None:
                if not is_sound:
                    raise StoreDamaged(
                        f"{env.path} can't be repaired: {_shown(key)} does not match its checksum, and the log, which "
                        f"begins at {log.first}, does not tell what it was. {LOST}"
                    )
                continue
            value = expected.pop(key, None)
            if value is None:
                tell(f"found: {_shown(key)} should not be there")
                wrong[key] = None
            elif not is_sound or not stored.startswith(value.checksum):
                tell(f"found: {_shown(key)} " + ("is not what the log says" if is_sound else _MISMATCH))
                wrong[key] = _rebuilt(log, key, value)
    for key, value in (expected or {}).items():
        tell(f"found: {_shown(key)} is missing")
        wrong[key] = _rebuilt(log, key, value)
    return wrong


def _replay(log: _Log) -> dict[bytes, Written]:
    """What all committed entries, from the first, make of empty namespaces, as far as it was written."""
    replay = Replay(log.facts.behind)
    for commit_id in range(log.first, log.facts.commit_id + 1):
        try:
            replay.apply(log.entry(commit_id))
        except ProtocolError as error:
            raise StoreDamaged(f"{log.path} can't be repaired: entry {commit_id}: {error}. {LOST}") from error
    return replay.state


def _rebuilt(log: _Log, key: bytes, value: Written) -> bytes:
    """The packed value, from the entry that wrote it."""
    command = decode_command(log.entry(value.modified).command)
    assert isinstance(command, PutCommand), f"entry {value.modified} wrote a value"
    packed = records.pack_record(key, msgspec.structs.replace(value.without_value, value=command.value))
    assert packed.startswith(value.checksum), "the log says the same each time"
    return packed


def _state(env: Environment, txn: lmdb.Transaction) -> lmdb._Database:
    """The database of the committed values."""
    stored = txn.get(records.STATE_FACT, db=env.db(records.META))
    return env.db(records.state_named(None if stored is None else bytes(stored)))


def _pairs(cursor: lmdb.Cursor) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values from where a cursor stands. Raises StoreDamaged for a key that LMDB could not have taken."""
    for key, value in cursor:
        if not 0 < len(key) <= LMDB_KEY_BYTES:
            raise StoreDamaged(f"the pages of LMDB itself are damaged: a key of {len(key)} bytes. {LOST}")
        yield bytes(key), bytes(value)


def _is_sound(key: bytes, stored: bytes) -> bool:
    try:
        records.unpack_record(key, stored)
    except StoreDamaged:
        return False
    return True


def _shown(key: bytes) -> str:
    namespace, _, name = key.partition(b"\0")
    return f"the value of key {name.decode(errors='replace')!r} in namespace {namespace.decode(errors='replace')!r}"
