"""The store: everything that a node must not forget, in one LMDB environment and the tail of its log. Layer 2.

**On disk** (`records` has the bytes, `environment` the files): `log` holds every entry under its commit_id; those
above the stored commit_id are *staged*. `committed` holds the namespaces as of exactly that commit_id; of the keys from
one on, while the fact `behind` says so, as of an earlier one (`namespaces`). `meta` holds the format, the node's id and
address, the cluster's id, the ballot, the commit_id, where the kept log begins, the memberships, and what this node
remembers of the promises of the others (`consensus.witness`). The newest entries may be in a file beside it instead of
in `log`, until the next transaction (`tail`): nothing else was written since then.

**Who uses it**: one thread writes, the one that runs `Election.cycle` (or, without an election, the caller of `put`).
Once a node is made, `write` is the only transaction: ballot, cut and new entries, with those of the tail; and effects
of what has committed with commit_id and the fact `behind`, together, so that no crash can part them. `extend_tail` is
the other way to the disk, for new entries when there are few of them and nothing else. Effects are applied in memory
first (`apply`). They wait until many have collected, so that a page that several of them change is written once; they
lose nothing by waiting, as they are in the log of a majority, and a restart carries out again what the disk is behind
with and, once it is known to be committed, what is above the commit_id on disk.

**Recovery** needs nobody: take the directory's lock, sync (what is visible must be durable before anything is said of
it), check the format, whose node it is, that the log has no hole and that its end matches its checksums, load the
ballot and the memberships, take over what the tail has, and go on. Entries above commit_id are still staged; a leader
commits them or cuts them. What does not match its checksum is reported and never passed over: the node does not start,
rather than vote with a shorter log, and says the command that repairs it from the other members (`repair`).
"""

from __future__ import annotations

import contextlib
import secrets
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import lmdb
import msgspec
from msgspec import UNSET

from raftnode import primary, records, tail
from raftnode.cache import Cache
from raftnode.compaction import Retention
from raftnode.config import Settings
from raftnode.consensus.ballot import Ballot
from raftnode.consensus.journal import Journal, Mark
from raftnode.consensus.membership import Membership, cluster_id
from raftnode.consensus.transfer import Incoming
from raftnode.consensus.witness import Witness
from raftnode.environment import RESTORE, Environment, MemoryDirectory
from raftnode.errors import ConfigError, StoreDamaged, StoreFailed, StoreForeign, StoreOwned, StoreTooNew
from raftnode.messages import (
    GENESIS,
    Entry,
    EntryId,
    Found,
    Get,
    MembersCommand,
    Snapshot,
    chain,
    decode_object,
    encode,
    encode_command,
    store_key,
    to_request,
)
from raftnode.namespaces import Behind, Changes, Namespaces, Outcome
from raftnode.primary import PrimaryTransport
from raftnode.states import States

Finder: TypeAlias = Callable[[bytes], records.Record | None]
STORE_TYPES: Final = ("memory", "database")
_NO_FURTHER: Final = "This node does not go on, as it might vote or acknowledge on a wrong log"


def _first_facts(node_id: str | None) -> dict[bytes, bytes]:
    """What a new node knows of itself: from its first transaction on it has an id, and will never be another."""
    facts: dict[bytes, object] = {b"format": records.FORMAT, b"node": node_id or secrets.token_hex(8)}
    return {name: records.pack_meta(name, fact) for name, fact in facts.items()}


class Store:
    """One node's durable state.

    Public facts: `node_id`, `cluster_id` (None until founded), `address`, `ballot`, `journal`, `commit_id`.
    Invariant: after `write` returns, disk and memory are equal, but for effects that wait; if it raises, the store
    takes nothing more.
    """

    def __init__(
        self,
        store_type: str = "memory",
        data_dir: str | Path = "data",
        *,
        settings: Settings | None = None,
        new_id: str | None = None,
    ) -> None:
        """Open `data_dir` ('database'), making it if need be, or a throw-away directory without sync ('memory').
        `new_id`: for a simulator, the id of a node that is made here; else it is drawn at random.

        Raises ConfigError for another `store_type`; StoreInUse, StoreForeign, StoreTooNew, StoreDamaged or StoreFailed
        when the directory can't be used, each saying what to do.
        """
        if store_type not in STORE_TYPES:
            raise ConfigError(f"store type {store_type!r}: there are {' and '.join(STORE_TYPES)}")
        self.settings = settings or Settings()
        self.is_durable = store_type == "database"
        self._memory = None if self.is_durable else MemoryDirectory()
        directory = Path(data_dir) if self._memory is None else self._memory.path
        try:
            self._env = Environment(directory, self.settings, self.is_durable, lambda: _first_facts(new_id))
        except BaseException:
            if self._memory is not None:
                self._memory.remove()
            raise
        self.owner: object | None = None
        """The election that alone may write; None while the caller does."""
        self.namespaces = Namespaces()
        self._cache = Cache(self.settings.cache_bytes)
        self.syncs = 0
        """Times that something was written and synced since the start."""
        self.trackers: list[Callable[[bytes], object]] = []
        """Called with the store key of each value that `apply` changes: for what a snapshot has to send again."""
        self.has_leftover = False
        """True while an old state, or what came of a snapshot that was given up, is not deleted yet."""
        self._on_disk: dict[bytes, object] = {}
        self._log, self._meta = self._env.db(records.LOG), self._env.db(records.META)
        self._viewed: Finder | None = None  # see `_view`
        self._room = (float("inf"), 0)
        self._written_bytes = 0
        self._retention = Retention(self.settings, self._log)
        self._tail = tail.Tail(self._env.path, self.is_durable)
        self.waiting_bytes = 0
        """Size of the commands that were carried out since the last flush began."""
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    @property
    def data_dir(self) -> Path:
        return self._env.path

    # --- opening ---

    def _load(self) -> None:
        with self._env.read() as txn:
            self._check_format(txn)
            self._load_facts(txn)
            base, last = self._check_log(txn)
        entries = self._look_at_tail(last)
        if entries:
            last = Mark(entries[-1].id, entries[-1].checksum)
        self._check_term(last)
        self._env.claim(self.node_id)
        self._begin_tail(entries)
        self.journal = Journal(self, base, last, self._memberships)
        self._resume_flush()

    def _resume_flush(self) -> None:
        """Go on with a flush that was under way when the node ended."""
        behind, upto = self.behind, self.commit_id
        if behind is None:
            return
        with self._env.read() as txn:
            entries = list(self._scan(txn, self.journal.base, behind.after + 1, upto))
            self.namespaces.resume_flush(behind, entries, self._finder(txn))

    def _check_format(self, txn: lmdb.Transaction) -> None:
        format_version = self._fact(txn, b"format", int)
        if format_version is None:
            raise StoreDamaged(f"{self.data_dir} does not say in which format it is. {RESTORE}")
        if format_version > records.FORMAT:
            raise StoreTooNew(
                f"{self.data_dir} was written in format {format_version}; this raftnode reads up to {records.FORMAT}: "
                "start it with the newer raftnode"
            )

    def _load_facts(self, txn: lmdb.Transaction) -> None:
        node = self._fact(txn, b"node", str)
        if not node:
            raise StoreDamaged(f"{self.data_dir} does not say whose it is. {RESTORE}")
        self.node_id: str = node
        self.cluster_id: str | None = self._fact(txn, b"cluster", str)
        self.address: str | None = self._fact(txn, b"address", str)
        self.ballot: Ballot = self._fact(txn, b"ballot", Ballot) or Ballot()
        self.commit_id: int = self._fact(txn, b"commit_id", int) or 0
        self.commit_id_on_disk = self.commit_id  # what is above was applied in memory
        self.behind: Behind | None = self._fact(txn, b"behind", Behind | None)
        self._memberships: list[Membership] = self._fact(txn, b"memberships", list[Membership]) or []
        self._tail_fact = self._load_tail_fact(txn)
        self.incoming: Incoming | None = self._fact(txn, b"incoming", Incoming)
        self.states = States(self._env, self.settings, self._current_state(txn))
        self.has_leftover = self._find_leftover(txn)
        self.witnesses: dict[str, Witness] = self._fact(txn, b"witnesses", dict[str, Witness]) or {}

    def _load_tail_fact(self, txn: lmdb.Transaction) -> tail.TailFact:
        """What LMDB says of the tail: nothing before the node is a member, or if it was one in an older format."""
        found: tail.TailFact | None = self._fact(txn, b"tail", tail.TailFact)
        is_due = self.cluster_id is not None and self._fact(txn, b"format", int) >= tail.SINCE_FORMAT
        if found is None and is_due:
            raise StoreDamaged(f"{self.data_dir} does not say whether it has a tail. {RESTORE}")
        return found or tail.TailFact()

    def _current_state(self, txn: lmdb.Transaction) -> bytes:
        stored = txn.get(records.STATE_FACT, db=self._meta)
        if stored is not None:
            self._fact(txn, records.STATE_FACT, str)
        return records.state_named(None if stored is None else bytes(stored))

    def _find_leftover(self, txn: lmdb.Transaction) -> bool:
        self._incoming_seen = self.incoming
        return (self.incoming is None or self.incoming.is_over) and self.states.has_leftover(txn)

    def _check_log(self, txn: lmdb.Transaction) -> tuple[Mark, Mark]:
        """The ends of the log, after a look at its tail. The middle is checked when it is read."""
        base = self._fact(txn, b"base", Mark) or Mark(GENESIS, 0)
        db = self._log
        count = txn.stat(db)["entries"]
        with txn.cursor(db) as cursor:
            newest = records.position_of(bytes(cursor.key())) if cursor.last() else base.id.commit_id
        if newest - base.id.commit_id != count:
            raise StoreDamaged(
                f"the log in {self.data_dir} has a hole: {count} entries between {base.id.commit_id + 1} and {newest}. "
                f"{self._how_to_repair()}"
            )
        if not base.id.commit_id <= self.commit_id <= newest:
            raise StoreDamaged(
                f"the log in {self.data_dir} ends at {newest}, but {self.commit_id} was committed. "
                f"{self._how_to_repair()}",
                self.commit_id,
            )
        if self.behind is not None and (wrong := self.behind.contradiction(base.id.commit_id, self.commit_id)):
            raise StoreDamaged(f"{self.data_dir}: {wrong}. {RESTORE}")
        last = base
        for entry in self._scan(txn, base, max(base.id.commit_id + 1, self.commit_id), newest):
            last = Mark(entry.id, entry.checksum)
        return base, last

    def _look_at_tail(self, last: Mark) -> list[Entry]:
        """What was in the tail when the node ended, each entry checked: they follow `last`, the newest in LMDB."""
        try:
            found = tail.look(self.data_dir, self._tail_fact, last.id.commit_id)
        except OSError as error:
            raise StoreFailed(f"{self.data_dir / records.TAIL_FILE} can't be read: {error}. Check the disk") from error
        if found.damage:
            raise StoreDamaged(
                f"{self.data_dir}: {'; '.join(found.damage)}. {_NO_FURTHER}. {self._how_to_repair()}",
                last.id.commit_id + 1,
            )
        entries, checksum = [], last.checksum
        for commit_id, record in found.records.items():
            entry = self._unpack(commit_id, record)
            checksum = chain(checksum, entry.term, commit_id, entry.time, entry.command)
            if checksum != entry.checksum:
                raise self._damaged_entry(commit_id)
            entries.append(entry)
        return entries

    def _begin_tail(self, entries: Sequence[Entry]) -> None:
        """Take over the entries that are in the tail, and begin another generation of it; the file is made while LMDB
        says that it is not in use."""
        before = self._tail_fact
        fits = before.bytes == tail.file_size(self.settings.tail_bytes)
        fact = before.next if fits else before.retired
        if entries or (before.bytes and not fits):
            with self._env.write() as txn:
                self._append(txn, entries)
                txn.put(b"tail", records.pack_meta(b"tail", fact), db=self._meta)
            self._on_disk[b"tail"] = fact
        try:
            if fits:
                self._tail.go_on(fact)
            else:
                self._tail.make(self.settings.tail_bytes, fact.generation + 1)
        except OSError as error:
            self._env.fail(error, records.TAIL_FILE)

    def _check_term(self, last: Mark) -> None:
        commit_id, term = last.id.commit_id, last.id.term
        if term > self.ballot.term:
            raise StoreDamaged(f"entry {commit_id} has term {term}, but the ballot only {self.ballot.term}", commit_id)

    # --- founding ---

    def found(self, address: str, members: Sequence[str]) -> None:
        """Make an empty store a member of the cluster of `members`, or check that it is this node's already.

        The first membership is fixed here for good: later starts take it from the store, whatever they are given.
        Raises StoreForeign when the directory belongs to a node at another address, or waits for the rest of a backup.
        """
        if self.cluster_id is None and self.incoming is not None:
            raise StoreForeign(
                f"a restore into {self.data_dir} was not finished: run it again (`raftnode restore`), or empty the "
                "directory to start as a new node"
            )
        if self.cluster_id is None:
            membership = Membership.founding([address, *members]).bind(address, self.node_id)
            self.journal.found(membership)
            self.cluster_id, self.address = cluster_id(membership.voters), address
            self.write()
        elif self.address != address:
            raise StoreForeign(
                f"{self.data_dir} belongs to the node at {self.address}, not to {address}: give that address, or the "
                "directory of this node"
            )

    def found_anew(self, cluster: str, members: MembersCommand, time: int) -> None:
        """Make this store's node the first of a new cluster that goes on with this log: its membership is the next
        entry, of a new term, with `time` in ms since 1970 (see `recover`). Durable when it returns. Raises StoreOwned
        while an election runs."""
        self._check_unowned()
        assert self.address in members.voters, "a node founds a cluster that it votes in"
        ballot = self.ballot.in_term(self.ballot.term + 1).vote(self.address)
        self.journal.append(ballot.term, time, encode_command(members))
        self.cluster_id, self.witnesses = cluster, {}
        self.write(ballot)

    def adopt(self, address: str, cluster: str, membership: Membership) -> None:
        """Make an empty store a member of a cluster that goes on already: the membership is the one that took it."""
        assert self.cluster_id is None, "a store belongs to one cluster"
        self.journal.found(membership)
        self.cluster_id, self.address = cluster, address
        self.write()

    def take_restored(self, chunk: Snapshot) -> None:
        """Put away a part of a backup, in a store that is not founded (see `archive`). Durable when it returns."""
        assert self.cluster_id is None, "what a node has is never replaced by a backup"
        self.incoming = Incoming(chunk.term, chunk.transfer, chunk.seq, is_over=False)
        self.write(None, chunk)

    def found_restored(self, cluster: str, address: str, last: Snapshot) -> None:
        """With the `last` chunk, which has only an end, be the first node of a new cluster that begins with the backup,
        in one transaction. Raises StoreDamaged, and has changed nothing, when keys are missing or too many."""
        end = last.end
        assert end is not UNSET, "the last chunk has an end"
        with self._env.read() as txn:
            keys = self.states.count_incoming(txn)
        if keys != end.keys:
            raise StoreDamaged(f"the backup has {keys} keys, and says that it has {end.keys}")
        self.ballot = Ballot(end.id.term)
        self.journal.found(Membership.founding([address]).bind(address, self.node_id))
        self.cluster_id, self.address = cluster, address
        self.incoming = Incoming(last.term, last.transfer, last.seq)
        has_installed = self.write(None, last)
        assert has_installed, "its keys were counted"

    def bind(self, address: str, node: str) -> None:
        """Remember the node id of a member that was met for the first time; durable with the next `write`."""
        self.journal.bind(address, node)

    # --- the log, for the journal (LogReader) ---

    def read_id(self, commit_id: int) -> EntryId:
        """The id of an entry on disk, checked. Raises StoreDamaged."""
        return self.read_entries(commit_id, commit_id, 0)[0].id

    def read_entries(self, first: int, last: int, size: int) -> list[Entry]:
        """Entries from disk, checked against the rolling checksum; at least one, and no more than `size` bytes of
        commands after that. Raises StoreDamaged with the first bad commit_id."""
        found: list[Entry] = []
        with self._env.read() as txn:
            for entry in self._scan(txn, self.journal.base, first, last):
                size -= entry.size
                if found and size < 0:
                    break
                found.append(entry)
        return found

    def _scan(self, txn: lmdb.Transaction, base: Mark, first: int, last: int) -> Iterator[Entry]:
        """Entries in order, each checked: the chain is seeded with the entry before `first`."""
        if first > last:
            return
        if first <= base.id.commit_id:
            raise self._damaged_entry(first)
        before = base if first == base.id.commit_id + 1 else None
        checksum = before.checksum if before else self._entry(txn, first - 1).checksum
        for commit_id in range(first, last + 1):
            entry = self._entry(txn, commit_id)
            checksum = chain(checksum, entry.term, commit_id, entry.time, entry.command)
            if checksum != entry.checksum:
                raise self._damaged_entry(commit_id)
            yield entry

    def _entry(self, txn: lmdb.Transaction, commit_id: int) -> Entry:
        if (entry := self._tail.entry(commit_id)) is not None:
            return entry
        stored = txn.get(records.log_key(commit_id), db=self._log)
        if stored is None:
            raise self._damaged_entry(commit_id)
        return self._unpack(commit_id, bytes(stored))

    def _unpack(self, commit_id: int, record: bytes) -> Entry:
        try:
            return records.unpack_entry(commit_id, record)
        except StoreDamaged as error:
            raise self._damaged_entry(commit_id) from error

    def _damaged_entry(self, commit_id: int) -> StoreDamaged:
        """What to say of a log entry that does not match its checksum."""
        return StoreDamaged(
            f"log entry {commit_id} in {self.data_dir} is damaged: it does not match its checksum. "
            f"{_NO_FURTHER}. {self._how_to_repair()}",
            commit_id,
        )

    def _how_to_repair(self) -> str:
        """The command that takes what is damaged here from the other members, as it has to be typed."""
        memberships = self._on_disk.get(b"memberships")
        members = memberships[-1].addresses if isinstance(memberships, list | tuple) and memberships else ()
        others = ",".join(member for member in members if member != self.address)
        words = ["raftnode", "repair", str(self.data_dir.absolute()), *(["--node", others] if others else [])]
        return f"With this node stopped, run: {shlex.join(words)}"

    # --- the state ---

    def apply(self, entries: Sequence[Entry]) -> list[Outcome]:
        """Carry out committed entries, in order, in memory; `write` takes their effects to the disk."""
        if not entries:
            return []
        assert entries[0].commit_id == self.commit_id + 1, f"{entries[0].commit_id} can't follow {self.commit_id}"
        with self._env.read() as txn:
            on_disk, apply = self._finder(txn), self.namespaces.apply
            effects = self.journal.take_effects(entries)
            outcomes = [apply(entry, on_disk, self._changed, e) for entry, e in zip(entries, effects, strict=True)]
        self.commit_id = entries[-1].commit_id
        self.waiting_bytes += sum([len(entry.command) for entry in entries])
        return outcomes

    def _changed(self, key: bytes) -> None:
        self._cache.drop(key)
        for track in self.trackers:
            track(key)

    def find(self, key: bytes) -> records.Record | None:
        """The value under a store key, with everything applied; `end_view` follows. Raises StoreDamaged; StoreFailed
        and StoreClosed also for what is in memory."""
        self._env.check()
        return self.namespaces.find(key, self._read)

    def _read(self, key: bytes) -> records.Record | None:
        """What the disk has under a store key, from memory if it is read again and again."""
        record = self._cache.get(key)
        if record is None and (record := self._view()(key)) is not None:
            self._cache.keep(key, record)
        return record

    def _view(self) -> Finder:
        """One view of the disk for all that `find` looks up between two transactions: to make one takes as long as to
        look something up. It ends with the next `write`, and with each turn (`end_view`), as the pages that it sees are
        not used again meanwhile."""
        if self._viewed is None:
            self._reading = self._env.read()
            self._viewed = self._finder(self._reading.__enter__())
        return self._viewed

    def end_view(self) -> None:
        """Let go of the view that `find` has used."""
        if self._viewed is not None:
            self._viewed = None
            self._reading.__exit__(None, None, None)

    def view(self) -> contextlib.AbstractContextManager[lmdb.Transaction]:
        """One consistent view of the disk, for `States`; `namespaces.waiting` lies over it."""
        return self._env.read()

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[Finder]:
        """One consistent view of everything applied: a function from store key to value. It raises StoreDamaged."""
        with self._env.read() as txn:
            on_disk = self._finder(txn)
            yield lambda key: self.namespaces.find(key, on_disk)

    def _finder(self, txn: lmdb.Transaction) -> Finder:
        db, get, unpack = self.states.db, txn.get, records.unpack_record

        def on_disk(key: bytes) -> records.Record | None:
            try:
                stored = get(key, db=db)
            except lmdb.Error as error:
                raise StoreDamaged(f"pages of {self.data_dir} are damaged: {error}") from error
            try:
                return None if stored is None else unpack(key, bytes(stored))
            except StoreDamaged as error:
                raise StoreDamaged(f"{error}. {self._how_to_repair()}") from error

        return on_disk

    def get(self, payload: dict[str, Any]) -> dict[str, Any]:
        """The payload (`key`, and `namespace` if not the default) with `value`, `created`, `modified` and `version` of
        what this node has committed; `value` is None when there is none. Raises ProtocolError for a bad key."""
        request = to_request({**payload, "type": "get"})
        assert isinstance(request, Get)
        with self.snapshot() as find:
            record = find(store_key(request.namespace, request.key))
        return {**payload, **decode_object(encode(found(request.key, request.namespace, record)))}

    # --- the one transaction ---

    @property
    def has_effects(self) -> bool:
        """True when something applied is not in the committed namespaces on disk yet. It may wait."""
        return self.behind is not None or self.commit_id_on_disk != self.commit_id

    @property
    def _applied_on_disk(self) -> int:
        """Everything up to there is in the committed namespaces on disk, for every key."""
        return self.commit_id_on_disk if self.behind is None else self.behind.after

    def write(self, ballot: Ballot | None = None, chunk: Snapshot | None = None, keys: int | None = None) -> bool:
        """Make the disk equal to memory, in one synced transaction. Nothing that depends on it may be said before.

        With `keys` only so many changed values go along, of the flush that is under way or begins with them; none with
        0. The others are durable as entries of the log, and carried out again from there if this process ends now. All
        go along with a `chunk`.

        With a `chunk` of a snapshot, that goes in too, and with the last one the snapshot is installed, if it has as
        many keys as it should: then it is true that is returned, and log, state, commit_id and membership are those of
        the snapshot, on disk and in memory. Raises StoreFailed; the node must stop then.
        """
        if ballot is not None:
            self.ballot = ballot
        self.end_view()
        unwritten, entries = self.journal.unwritten(), self._tail.take()
        with self._env.write() as txn:
            if (cut_from := unwritten.cut_from) is not None:
                entries = [entry for entry in entries if entry.commit_id < cut_from]
                self._cut(txn, cut_from)
            entries += unwritten.entries
            size = self._append(txn, entries)
            changes = self._leave(None if chunk is not None else keys)
            self._put_effects(txn, changes)
            self._compact(txn, max(len(entries), len(changes)), size)
            has_installed = chunk is not None and self._take_chunk(txn, chunk)
            if self.has_leftover or chunk is not None or self.incoming is not self._incoming_seen:
                self.has_leftover = self._find_leftover(txn) and self.states.sweep(txn)
            facts = self._put_facts(txn)
        self.syncs += 1
        self._on_disk |= facts
        self.namespaces.written(changes)
        if has_installed:
            self._cache.clear()
        self.journal.mark_written()
        return has_installed

    @property
    def entries_in_tail(self) -> int:
        """How many entries the next transaction takes over from the tail."""
        return len(self._tail.entries)

    def extend_tail(self) -> bool:
        """Make the new entries durable in the tail, if they are few and all else is on disk as it is in memory, but for
        effects that may wait. False when it takes a transaction, and nothing was done. Raises StoreFailed; the node
        must stop then."""
        unwritten = self.journal.unwritten()
        entries = unwritten.entries
        if not entries or unwritten.cut_from is not None:
            return False
        size = records.ENTRY_HEAD_BYTES * len(entries) + sum([len(entry.command) for entry in entries])
        if size > self.settings.tail_write_bytes or not self._tail.has_room(size, len(entries)) or self._new_facts():
            return False
        self._env.check()
        try:
            self._tail.append(entries)
        except BaseException as error:
            self._env.fail(error, records.TAIL_FILE)
            raise
        self.syncs += 1
        self.journal.mark_written()
        return True

    def finish(self) -> None:
        """Before a clean end: bring all that waits into LMDB, and have it say that the tail is not in use, so that the
        data file alone has everything. What is appended after that takes a transaction. Raises StoreFailed."""
        self._tail.retire()
        if self.has_effects or self.journal.has_unwritten or self._new_facts():
            self.write()

    def _leave(self, keys: int | None) -> Changes:
        """The changes that go to the disk with this transaction, at most so many; `commit_id_on_disk` and `behind` are
        what they are with it from here on."""
        if keys is not None and (not keys or not self.has_effects):
            return {}
        after = self._applied_on_disk
        if keys is None or self.behind is None:
            self.namespaces.begin_flush()
            self.commit_id_on_disk = self.commit_id
            self.waiting_bytes = 0
        changes, following = self.namespaces.next(keys)
        self.behind = None if following is None else Behind(after, following.decode())
        return changes

    def _append(self, txn: lmdb.Transaction, entries: Sequence[Entry]) -> int:
        """Returns the size of their records in bytes."""
        if not entries:
            return 0
        rows = [(records.log_key(entry.commit_id), records.pack_entry(entry)) for entry in entries]
        size = sum([len(record) for _, record in rows])
        self._written_bytes += size
        with txn.cursor(self._log) as cursor:
            _, added = cursor.putmulti(rows, append=True)
        if added != len(rows):
            raise AssertionError(f"the log on disk already has an entry at or after {entries[added].commit_id}")
        return size

    def _cut(self, txn: lmdb.Transaction, first: int) -> None:
        assert first > self.commit_id_on_disk, f"a committed entry is never cut: {first}"
        with txn.cursor(self._log) as cursor:
            there = cursor.set_range(records.log_key(first))
            while there:
                there = cursor.delete()

    def _compact(self, txn: lmdb.Transaction, count: int, size: int) -> None:
        """Delete some of the oldest entries, when there are more than are to be kept. Their effects are on disk, at the
        latest with this very transaction, which has `count` entries or changes, and `size` bytes of entries: a restart
        needs none of them."""
        base = self.journal.base
        found = self._retention.shorten(txn, base, self._applied_on_disk, self.commit_id_on_disk, count, size)
        if found != base:
            next(self._scan(txn, found, found.id.commit_id + 1, found.id.commit_id + 1))
            self.journal.begin_after(found)

    def _take_chunk(self, txn: lmdb.Transaction, chunk: Snapshot) -> bool:
        """Put a chunk away; with the last one, install the snapshot: true if that was done."""
        self.states.take(txn, chunk)
        self._written_bytes += sum(len(memoryview(record.value)) for record in chunk.records)
        end = chunk.end
        if end is UNSET or not self.states.install(txn, end.keys):
            return False
        assert end.id.commit_id > self.commit_id, "what is committed here is never replaced by something older"
        txn.drop(self._log, delete=False)
        self.journal.begin_anew(Mark(end.id, end.checksum), msgspec.json.decode(end.membership, type=Membership))
        self.commit_id = self.commit_id_on_disk = end.id.commit_id
        return True

    def _put_effects(self, txn: lmdb.Transaction, changes: Changes) -> None:
        db = self.states.db
        rows: list[tuple[bytes, bytes]] = []
        for key, record in changes.items():
            if record is None:
                txn.delete(key, db=db)
            else:
                rows.append((key, records.pack_record(key, record)))
        if rows:
            self._written_bytes += sum([len(stored) for _, stored in rows])
            with txn.cursor(db) as cursor:
                cursor.putmulti(rows)

    def _put_facts(self, txn: lmdb.Transaction) -> dict[bytes, object]:
        """Write the facts that are not on disk as they are now; returns them."""
        changed, db = self._new_facts(), self._meta
        for name, fact in changed.items():
            txn.put(name, records.pack_meta(name, fact), db=db)
        return changed

    def _new_facts(self) -> dict[bytes, object]:
        """Those that are not on disk as they are now."""
        now: dict[bytes, object] = {
            b"format": records.FORMAT,
            b"node": self.node_id,
            b"cluster": self.cluster_id,
            b"address": self.address,
            b"ballot": self.ballot,
            b"commit_id": self.commit_id_on_disk,
            b"behind": self.behind,
            b"base": self.journal.base,
            b"memberships": self.journal.memberships,
            records.STATE_FACT: self.states.current.decode(),
            b"incoming": self.incoming,
            b"witnesses": self.witnesses,
            b"tail": self._tail.fact,
        }
        on_disk = self._on_disk.get
        return {name: fact for name, fact in now.items() if on_disk(name) != fact}

    def _fact(self, txn: lmdb.Transaction, name: bytes, type: Any) -> Any:
        """A fact from disk; None when there is none yet."""
        stored = txn.get(name, db=self._meta)
        if stored is None:
            return None
        self._on_disk[name] = fact = records.unpack_meta(name, bytes(stored), type)
        return fact

    # --- room, readers, the end ---

    def sizes(self) -> dict[str, int]:
        """Bytes: `map`, `file`, `used`, `disk_free`, and `room`, what can still be written."""
        return self._env.sizes()

    def room(self, now: float) -> int:
        """Bytes that can still be written, looked up at most every `room_check_ms`, and after much was written."""
        checked_at, room = self._room
        due = now - checked_at > self.settings.room_check_ms / 1000 or now < checked_at
        if due or self._written_bytes > self.settings.reserve_bytes // 8:
            room = self._env.sizes()["room"]
            self._room = (now, room)
            self._written_bytes = 0
        return room

    def clear_dead_readers(self) -> int:
        """Free the slots of readers that died; returns how many."""
        return self._env.clear_dead_readers()

    def close(self) -> None:
        """Close; a memory store is gone then. What was not written is not lost: nobody was told of it."""
        self.end_view()
        self._tail.close()
        self._env.close()
        if self._memory is not None:
            self._memory.remove()

    # --- a primary with followers, without elections: the caller leads, in its own thread (see `primary`) ---

    def put(self, term: int, payload: dict[str, Any], transport: PrimaryTransport, majority: int) -> bool:
        """Stage `payload` (a `put`, or a `delete` when its type says so) in `term`, send it to the peers of
        `transport`, and commit it once `majority` durable copies exist, this one counted.

        False when they did not confirm in time: the entry stays staged, its outcome is open. The caller vouches that
        nobody else leads in `term`. Raises StoreOwned when an election owns the store, ProtocolError for a bad payload
        or a term that is over.
        """
        self._check_unowned()
        return primary.put(self, term, payload, transport, majority)

    def send_data(
        self, message: dict[str, Any], transport: PrimaryTransport, confirmations: list[str] | None = None
    ) -> None:
        """Send one `data` message (log or commit) to every peer of `transport`, and note in `confirmations` who holds
        it durably. A peer that lacks earlier entries is brought up to date first. Raises StoreOwned."""
        self._check_unowned()
        for peer in transport.peers:
            if peer != transport.my_ip and primary.feed(self, peer, message, transport) and confirmations is not None:
                confirmations.append(peer)

    def commit(self, namespace: str, delete: bool = False, **kwargs: Any) -> int:
        """Move staged entries into the committed namespaces, and commit_id with them, in one synced transaction.

        The log commits in order: everything staged up to `commit_id=` (default: the newest staged entry) goes. That
        last entry must concern `namespace`, and be a delete exactly when `delete` says so; `key=` is checked too.
        Returns the new commit_id. Raises StoreOwned, or ProtocolError when nothing is staged that fits.
        """
        self._check_unowned()
        return primary.commit(self, namespace, delete, kwargs.get("commit_id"), kwargs.get("key"))

    def action_handler(self, message: dict[str, Any]) -> dict[str, Any]:
        """A follower's side: carry out a leader's `data` message (`log` stages, `commit` commits), by the very rules of
        a node. Returns the answer, which is true once it is on disk. Raises StoreOwned, ProtocolError."""
        self._check_unowned()
        return primary.follow(self, message)

    def _check_unowned(self) -> None:
        if self.owner is not None:
            raise StoreOwned("a running election owns this store: write through it (RaftNode, or a client)")


def found(key: str, namespace: str, record: records.Record | None) -> Found:
    """What a read tells of a record, or of there being none."""
    if record is None:
        return Found(key=key, namespace=namespace)
    return Found(
        key=key,
        namespace=namespace,
        value=record.value,
        created=record.created,
        modified=record.modified,
        version=record.version,
    )
