"""Directories whose newest entries are only in the tail of the log: their repair, and what else is done with a stopped
node's directory (`tail`, `repair`; TRAPS 37: never as if the log were shorter).

One cluster of three makes them. The *patient* is a follower that was killed with a tail in use, `left` is its
directory; the two others run on in the same term, have committed all that it has and more, and are asked. Each record
of the tail has one entry, and takes one block of the file.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
from msgspec import Raw
from test_repair import (
    Contents,
    Made,
    Said,
    change_facts,
    contents,
    contents_of_members,
    damage,
    fill,
    flip,
    instead_of_entries,
    key_of,
    member_that,
    mend,
    needs_strace,
    raw,
    refused,
    remove,
    replace_identity,
    together,
    value,
    write_history,
)

from raftnode import archive, records, tail
from raftnode.consensus.ballot import Ballot
from raftnode.errors import StoreDamaged, StoreForeign
from raftnode.messages import PutCommand, encode_command
from raftnode.recover import plan, recover
from raftnode.shrink import shrink
from raftnode.store import Store
from raftnode.tail import BLOCK, TailFact
from raftnode.testing.processes import (
    PATIENCE_S,
    ClusterOfProcesses,
    NodeProcess,
    command_environment,
    free_address,
    inspect,
    wait_until,
)

CALM: Final = {"HB_TIME": "50", "LOW_TIMEOUT": "1500", "HIGH_TIMEOUT": "3000", "RAFTNODE_FLUSH_DELAY_MS": "600000"}
"""No election that nobody asks for, and no transaction for the effects alone: it would take in the tail."""
LEAST: Final = 10
"""So many records the tail of a killed node should have."""


# --- the directories ------------------------------------------------------------------------------------------


class Tail(NamedTuple):
    """What a directory has in its tail, and where."""

    fact: TailFact
    after: int
    records: dict[int, bytes]

    @property
    def last(self) -> int:
        return max([self.after, *self.records])


def fact_of(found: Contents) -> TailFact:
    fact: TailFact = records.unpack_meta(b"tail", found.meta[b"tail"], TailFact)
    return fact


def tail_of(path: Path) -> Tail:
    """Of a directory in which nothing is damaged."""
    found = contents(path)
    fact = fact_of(found)
    assert fact.bytes
    after = len(found.log)
    held = tail.look(path, fact, after)
    assert held.damage == ()
    return Tail(fact, after, held.records)


def kill_with_a_tail(cluster: ClusterOfProcesses, node: NodeProcess) -> None:
    """kill -9 while the tail has some records, of one entry each, and after a start that has all before in LMDB, with
    its effects. A transaction that has another reason may have come between."""
    for _ in range(20):
        if node.is_running:
            assert node.terminate() == 0
        node.start().await_answer()
        with cluster.client() as client:
            for n in range(2 * LEAST):
                await_entry(node, client.put(f"key-{n}", {"in": "the tail", "n": n})["commit_id"])
        cluster.await_caught_up()
        node.kill()
        if len(tail_of(node.volume).records) >= LEAST:
            return
    raise AssertionError("there was always something else to write")


def await_entry(node: NodeProcess, commit_id: int) -> None:
    """Wait until the node has an entry."""

    def has_it() -> bool:
        status = node.status()
        return status is not None and status["last"]["commit_id"] >= commit_id

    wait_until(has_it, f"{node.name} has entry {commit_id}", explain=node.describe)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    path = tmp_path_factory.mktemp("tail")
    with ClusterOfProcesses(3, path / "cluster", CALM) as cluster:
        patient = cluster.others(cluster.await_leader())[0]
        write_history(cluster)
        kill_with_a_tail(cluster, patient)
        left = Path(shutil.copytree(patient.volume, path / "left"))
        with cluster.client() as client:
            client.put("after", 1)
        yield Made(cluster, patient, left, left, left)


@pytest.fixture
def left(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.level, tmp_path / "left"))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ClusterOfProcesses]:
    """For what changes it."""
    with ClusterOfProcesses(3, tmp_path / "cluster", CALM) as cluster:
        yield cluster


def leader_first(made: Made) -> tuple[str, str]:
    """Of the two members that run: the one that leads, still in the patient's term, and the one that follows."""
    leader = made.cluster.leader()
    assert leader is not None
    [follower] = made.cluster.others(made.patient, leader)
    return leader.address, follower.address


def images(path: Path) -> tuple[bytes, bytes | None]:
    """The bytes of both files."""
    file = path / records.TAIL_FILE
    return (path / records.DATA_FILE).read_bytes(), file.read_bytes() if file.exists() else None


def planned(path: Path, members: list[str]) -> Said:
    """What a dry run says; it writes nothing."""
    before = images(path)
    said = mend(path, members, is_dry=True)
    assert images(path) == before
    return said


def refused_untouched(path: Path, members: list[str]) -> tuple[str, Said]:
    """Why a repair is refused, or a dry run; neither writes anything."""
    before = images(path)
    found = refused(path, members)
    with pytest.raises(StoreDamaged) as why:
        mend(path, members, is_dry=True)
    assert str(why.value) == found[0]
    assert images(path) == before
    return found


def entries_at_start(path: Path) -> dict[bytes, bytes]:
    """The log records that a node has when it starts on a directory, each checked."""
    with contextlib.closing(Store("database", path)) as store:
        entries = store.journal.entries(1, store.journal.last.id.commit_id, 1 << 30)
    return {key_of(entry.commit_id): records.pack_entry(entry) for entry in entries}


# --- damage of the file ---------------------------------------------------------------------------------------


Change = Callable[[bytearray, int], object]
"""What happens to the content of a tail of so many records."""


def change_tail(path: Path, change: Change, count: int = 0) -> None:
    file = path / records.TAIL_FILE
    content = bytearray(file.read_bytes())
    change(content, count)
    file.write_bytes(content)


def bit(number: int, byte: int) -> Change:
    """A bit of a record; negative numbers count from the end."""

    def change(content: bytearray, count: int) -> None:
        content[number % count * BLOCK + byte] ^= 4

    return change


def zeros(number: int) -> Change:
    """Nothing is left of a record."""

    def change(content: bytearray, _: int) -> None:
        content[number * BLOCK : (number + 1) * BLOCK] = bytes(BLOCK)

    return change


def both(*changes: Change) -> Change:
    def change(content: bytearray, count: int) -> None:
        for each in changes:
            each(content, count)

    return change


def nothing(_content: bytearray, _count: int) -> None:
    """No damage."""


WITHIN: dict[str, tuple[Change, list[int]]] = {
    "a command": (bit(4, 70), [4]),
    "a checksum of a sector": (bit(4, 1), [4]),
    "a generation": (bit(4, 11), [4]),
    "the length of a record": (bit(4, 17), [4]),
    "nothing left of a record": (zeros(4), [4]),
    "the first record": (bit(0, 70), [0]),
    "three in a row": (both(bit(3, 70), zeros(4), bit(5, 2)), [3, 4, 5]),
    "here and there": (both(bit(1, 70), bit(3, 3), zeros(6), zeros(7)), [1, 3, 6, 7]),
    "the last but one": (bit(-2, 70), [-2]),
}
"""Damage before a record that is sound, and which records are lost by it."""


@pytest.mark.parametrize("kind", WITHIN)
@pytest.mark.parametrize("is_lmdb_damaged", [False, True])
def test_what_is_damaged_within_the_tail_comes_from_the_members(
    made: Made, left: Path, kind: str, is_lmdb_damaged: bool
) -> None:
    """Records of the tail are damaged that others follow, so it is known which entries were there. A start is refused;
    a dry run says what would be done and writes nothing. The repair takes exactly these from the members, and puts all
    of the tail into LMDB: each record is what it was. No other fact changes; the tail's file is as it was, and out of
    use. So it is with entries in LMDB damaged besides, and values. The next start has the whole log."""
    was, whole = tail_of(left), contents(left)
    change, lost = WITHIN[kind]
    change_tail(left, change, len(was.records))
    if is_lmdb_damaged:
        damage(left, together(flip(40, -2), fill(was.after - 1, was.after), value(lambda _, __: None, every=2)))
    with pytest.raises(StoreDamaged, match="run: raftnode repair"):
        Store("database", left)
    would = planned(left, made.members)
    tail_image = images(left)[1]
    said = mend(left, made.members)
    assert said.about("repairing") == would.about("would repair")
    assert said.about("found") == would.about("found")
    positions = [was.after + 1 + number % len(was.records) for number in lost]
    told = " ".join(line for line in said.about("found") if records.TAIL_FILE in line)
    assert all(f"entry {at} is lost" in told or "entries" in told for at in positions)
    expected = whole.log | {key_of(at): record for at, record in was.records.items()}
    assert contents(left) == whole.repaired._replace(log=expected)
    assert images(left)[1] == tail_image
    assert expected == contents_of_members(made, was.last)
    assert mend(left, [free_address()])[-1].endswith("committed: whole")
    assert entries_at_start(left) == expected


@pytest.mark.parametrize("kind", ["an entry", "entries removed", "a value", "past the end", "past it, moved"])
def test_a_sound_tail_is_kept_when_lmdb_is_damaged(made: Made, left: Path, kind: str) -> None:
    """Only LMDB is damaged, before or behind what is in the tail: an entry, the newest ones that LMDB has (they are not
    taken for the end of the log, as the tail goes on), a value, or a record more where the tail's entries belong, or
    one that belongs elsewhere. All of it is as it was, and the tail's entries are in LMDB with the same transaction."""
    was, whole = tail_of(left), contents(left)

    def put_past_the_end(txn: Any, log: Any, _: Any) -> None:
        txn.put(key_of(was.last), b"?" * 40, db=log)

    def move_past_the_end(txn: Any, log: Any, committed: Any) -> None:
        put_past_the_end(txn, log, committed)
        txn.delete(key_of(30), db=log)

    kinds = {
        "an entry": flip(40, -2),
        "entries removed": remove(was.after - 1, was.after),
        "a value": value(lambda _, __: None),
        "past the end": put_past_the_end,
        "past it, moved": move_past_the_end,
    }
    damage(left, kinds[kind])
    would = planned(left, made.members)
    said = mend(left, made.members)
    assert said.about("repairing") == would.about("would repair") != []
    expected = whole.log | {key_of(at): record for at, record in was.records.items()}
    assert contents(left) == whole.repaired._replace(log=expected)
    assert entries_at_start(left) == expected == contents_of_members(made, was.last)


def test_staged_entries_after_a_hole_are_kept(made: Made, left: Path) -> None:
    """All is in LMDB, some of it staged, and an entry is gone from the middle. By their number there is one entry less,
    but the staged one at the end is no stray: nobody may cut it."""
    Store("database", left).close()
    whole = contents(left)
    assert whole.log == contents_of_members(made, len(whole.log))
    damage(left, remove(40, 40))
    said = mend(left, made.members)
    assert said.about("found") == ["entry 40 is not in the log"]
    assert contents(left) == whole.repaired


def test_a_killed_node_needs_no_repair(made: Made, left: Path) -> None:
    """kill -9 with a tail in use is no damage: the directory is whole, by what LMDB and the tail have together; nobody
    is asked and nothing is written. Nor is a record damage that a crash has cut off, or a bit where nothing counts."""
    was = tail_of(left)
    count = len(was.records)

    def torn(content: bytearray, _: int) -> None:
        stored = [records.pack_entry(entry(was.last + 1, 3000))]
        record = tail.pack(was.fact.generation, was.last + 1, stored, count * BLOCK)
        content[count * BLOCK : count * BLOCK + 1024] = record[:1024]

    def elsewhere(content: bytearray, _: int) -> None:
        content[-1] ^= 1

    for change in (nothing, torn, elsewhere):
        change_tail(left, change, count)
        before = images(left)
        [line] = mend(left, [free_address()])
        assert f"log up to entry {was.last}, " in line
        assert line.endswith("committed: whole")
        assert images(left) == before
    assert entries_at_start(left) == contents_of_members(made, was.last)


def entry(commit_id: int, size: int) -> Any:
    """Some entry, which follows nothing."""
    command = encode_command(PutCommand(namespace="default", key="torn", value=Raw(b"1" * size)))
    return records.unpack_entry(commit_id, b"\1" + bytes(20) + command)


# --- an end that is not known ---------------------------------------------------------------------------------


def every_bit(content: bytearray, count: int) -> None:
    """A bit of each record."""
    both(*(bit(number, 70) for number in range(count)))(content, count)


def cut_off(content: bytearray, _: int) -> None:
    del content[5 * BLOCK :]


def remove_file(path: Path, _count: int = 0) -> None:
    (path / records.TAIL_FILE).unlink()


def of_content(change: Change) -> Callable[[Path, int], None]:
    return lambda path, count: change_tail(path, change, count)


OPEN: dict[str, Callable[[Path, int], object]] = {
    "the newest record": of_content(bit(-1, 70)),
    "the three newest records": of_content(both(bit(-1, 70), bit(-2, 1), bit(-3, 30))),
    "the newest record, and one of the middle": of_content(both(bit(-1, 70), bit(2, 70))),
    "all records": of_content(every_bit),
    "the file is gone": remove_file,
    "the file is empty": lambda path, _: (path / records.TAIL_FILE).write_bytes(b""),
    "the file is cut off": of_content(cut_off),
}
"""Damage after which nothing here tells how many entries are lost."""


@pytest.mark.parametrize("kind", OPEN)
def test_an_end_that_is_lost_goes_as_far_as_the_leader_goes(made: Made, left: Path, kind: str) -> None:
    """Nothing tells how many entries this node has had, and acknowledged to the leader of its term. A member that only
    follows in that term can't tell either, whatever it has committed: refused, and nothing is written. The leader
    knows: what it has sent ends where its log does. The log is the members' up to there then, and no other fact has
    changed; so nothing that this node has acknowledged can be missing in it."""
    was, whole = tail_of(left), contents(left)
    OPEN[kind](left, len(was.records))
    leader, follower = leader_first(made)
    for members in ([follower], [free_address()]):
        why, said = refused_untouched(left, members)
        assert "how many entries are lost from" in why
        assert "the log is never cut" in why
        assert [line for line in said.about("found") if records.TAIL_FILE in line]
    assert f"of a term after {ballot_of(whole).term}" in refused_untouched(left, [follower])[0]
    would = planned(left, [follower, leader])
    said = mend(left, [follower, leader])
    assert said.about("repairing") == would.about("would repair") != []
    end = inspect_status(made, leader)["last"]["commit_id"]
    assert end > was.last
    theirs = contents_of_members(made, end)
    assert contents(left) == whole.repaired._replace(log=theirs)
    assert said.about("repairing")[-1].endswith("where it is committed")
    assert mend(left, [free_address()])[-1].endswith("committed: whole")
    assert entries_at_start(left) == theirs


def ballot_of(found: Contents) -> Ballot:
    ballot: Ballot = records.unpack_meta(b"ballot", found.meta[b"ballot"], Ballot)
    return ballot


def inspect_status(made: Made, address: str) -> dict[str, Any]:
    [node] = [node for node in made.cluster if node.address == address]
    return node.await_answer()


@pytest.mark.parametrize(
    ("lie", "why"),
    [
        (replace_identity(cluster="0" * 16), "no other member of ours"),
        (replace_identity(last=None), "its status can't be read"),
        (replace_identity(term=1 << 20), "it has committed only up to"),
        (instead_of_entries({"type": "ping", "data": True, "node": ""}), "answered with PingAnswer"),
    ],
)
def test_who_can_not_be_believed_does_not_say_where_the_log_ends(made: Made, left: Path, lie: Any, why: str) -> None:
    """Not a member, one whose answer makes no sense, or one that leads in another term than this node's."""
    change_tail(left, bit(-1, 70), len(tail_of(left).records))
    leader = leader_first(made)[0]
    behind = [node.address for node in made.cluster.others(made.patient)].index(leader)
    with member_that(made, lie, behind) as liar:
        words, _ = refused_untouched(left, [liar])
    assert f"{liar}: " in words
    assert why in words


def test_more_entries_than_the_tail_has_room_for_are_enough(made: Made, left: Path) -> None:
    """Nobody who leads in the term of this node is asked. But a member has committed so many entries of that term that
    whatever was in the tail is among them."""
    was, whole = tail_of(left), contents(left)
    remove_file(left)
    change_facts(left, tail=TailFact(was.fact.generation, BLOCK))
    follower = leader_first(made)[1]
    room = BLOCK // 21
    with made.cluster.client() as client:
        while client.put("more", 1)["commit_id"] < was.after + room + 10:
            pass
    made.cluster.await_caught_up(nodes=made.cluster.others(made.patient))
    mend(left, [follower])
    found = contents(left)
    assert len(found.log) >= was.after + room
    assert found == whole.repaired._replace(log=contents_of_members(made, len(found.log)))


def test_a_tail_that_is_newer_than_lmdb_is_not_taken(made: Made, left: Path) -> None:
    """The data file was put back from an older copy, beside the newest tail: what LMDB has forgotten, votes too, nobody
    can give back. Refused, with the words for that."""
    was = tail_of(left)

    def newer(content: bytearray, _: int) -> None:
        record = tail.pack(was.fact.generation + 1, was.last + 1, [was.records[was.last]], 0)
        content[: len(record)] = record

    change_tail(left, newer)
    why, said = refused_untouched(left, made.members)
    assert "which is a copy made before" in why
    assert "never an older one" in why
    assert not said.about("would repair")


@pytest.mark.parametrize("is_lost", [False, True])
def test_what_the_tail_is_only_the_node_says(made: Made, left: Path, is_lost: bool) -> None:
    """Without the fact `tail`, or with a damaged one, it is not known whether entries are in the file: that is refused,
    and not taken for a directory of an older format, which has none. In such a one the file has no meaning."""
    with raw(left) as env:
        meta = env.open_db(records.META, create=False)
        with env.begin(write=True) as txn:
            stored = txn.pop(b"tail", db=meta) or b""
            if not is_lost:
                txn.put(b"tail", stored[:-1] + b"?", db=meta)
    why, _ = refused_untouched(left, made.members)
    assert "the record 'tail' of the node " + ("is missing" if is_lost else "does not match") in why
    if is_lost:
        change_facts(left, format=3)
        after = len(contents(left).log)
        assert f"log up to entry {after}, " in mend(left, [])[-1]
        damage(left, flip(40, -2))
        mend(left, made.members)
        assert b"tail" not in contents(left).meta


# --- the whole way, with a node that starts again -------------------------------------------------------------


def is_a_member_again(cluster: ClusterOfProcesses, node: NodeProcess) -> None:
    """It starts, is not taken for an old copy, catches up, and its copy counts."""
    mark = node.mark()
    node.start().await_answer()
    cluster.await_caught_up()
    third = next(each for each in cluster.others(node) if each is not cluster.await_leader())
    third.kill()
    with cluster.client() as client:
        written = client.put("counted", node.address)["commit_id"]
    cluster.await_caught_up(written, [node])
    third.start().await_answer()
    cluster.await_caught_up()
    assert not node.events("old_copy", mark)
    assert not [line for each in cluster for line in each.events("peer_refused", mark if each is node else 0)]


def test_a_file_that_is_gone_and_was_not_needed(cluster: ClusterOfProcesses) -> None:
    """A follower ended with nothing in its tail, and the file is deleted; nothing is written meanwhile. After a clean
    stop LMDB says that it is not in use: it is not missed. After a kill it may have held anything: the node does not
    start. But the leader's log ends where its own does, so there was nothing to lose: repaired it is a member as
    before."""
    leader = cluster.await_leader()
    node = cluster.others(leader)[0]
    with cluster.client() as client:
        for n in range(5):
            client.put("key", n)
    cluster.await_caught_up()
    assert node.terminate() == 0
    assert not fact_of(contents(node.volume)).bytes
    remove_file(node.volume)
    assert mend(node.volume, [free_address()])[-1].endswith("committed: whole")
    with contextlib.closing(Store("database", node.volume)) as store:
        store.write()  # and is killed
    whole = contents(node.volume)
    assert tail_of(node.volume).records == {}
    remove_file(node.volume)
    assert node.start().await_exit() == 3
    others = [each.address for each in cluster.others(node)]
    assert planned(node.volume, others).about("would repair") == [
        f"the end of the log: entry {len(whole.log)}, as by {leader.address}, which leads in term "
        f"{ballot_of(whole).term}, there was none after it"
    ]
    assert mend(node.volume, [])[-1].endswith("repaired, and whole")
    assert contents(node.volume) == whole.repaired
    is_a_member_again(cluster, node)


def test_after_an_election_any_member_will_do(cluster: ClusterOfProcesses, tmp_path: Path) -> None:
    """A follower is killed with a tail in use, and the newest record is damaged. Another member leads then, in a later
    term, for which this node has not voted: so what it had acknowledged and others count on is before the first entry
    of that term in the log of any member. With that entry the end is known; the ballot has its term, and no vote.

    In a copy three entries more are in the tail, which nobody else has, as if this node had led in its term. They are
    whole but for the newest; those that the members have committed in their places take them."""
    old = cluster.await_leader()
    node, other = cluster.others(old)
    kill_with_a_tail(cluster, node)
    ahead = Path(shutil.copytree(node.volume, tmp_path / "ahead"))
    with contextlib.closing(Store("database", ahead)) as store:
        store.write()
        for n in range(3):
            command = encode_command(PutCommand(namespace="default", key=f"alone-{n}", value=Raw(b"1")))
            store.journal.append(store.ballot.term, 1_700_000_000_000, command)
            assert store.extend_tail()
    was, whole = tail_of(node.volume), contents(node.volume)
    change_tail(node.volume, bit(-1, 70), len(was.records))
    change_tail(ahead, bit(-1, 70), 3)
    term = ballot_of(whole).term
    for path in (node.volume, ahead):
        assert "how many entries are lost" in refused_untouched(path, [other.address])[0]
    with cluster.client() as client:
        client.transfer_leader(other.address)
        for n in range(5):
            client.put("later", n)
    cluster.await_caught_up(nodes=[old, other])
    theirs = contents_of_members(Made(cluster, node, ahead, ahead, ahead), was.last + 5)
    for path in (node.volume, ahead):
        before = contents(path)
        mend(path, [old.address])
        found = contents(path)
        newest = records.unpack_entry(len(found.log), found.log[key_of(len(found.log))])
        assert newest.term > term
        assert ballot_of(found) == Ballot(newest.term, None)
        assert found.log.items() <= theirs.items()
        assert len(found.log) >= was.last + (1 if path == node.volume else 3)
        assert found.committed == before.committed
        changed = {name for name in found.meta if found.meta[name] != before.meta[name]}
        assert changed == {b"ballot", b"tail"}
        assert not fact_of(found).bytes
    is_a_member_again(cluster, node)


# --- what else is done with a stopped node's directory --------------------------------------------------------


def test_compact_leaves_the_tail_as_it_is(made: Made, left: Path) -> None:
    """The copy says the same of the tail, and the file is the same: nothing is lost, and a repair finds it whole."""
    was, whole, image = tail_of(left), contents(left), images(left)[1]
    shrink(left)
    assert contents(left) == whole
    assert images(left)[1] == image
    assert f"log up to entry {was.last}, " in mend(left, [free_address()])[-1]
    assert entries_at_start(left) == contents_of_members(made, was.last)


def test_a_new_cluster_begins_with_what_is_in_the_tail(made: Made, left: Path) -> None:
    """`raftnode recover`: the plan goes to the newest entry in the tail, and names what is staged there; the new
    cluster has all of it. A damaged tail is repaired first, as its end would be that of the cluster's log."""
    was = tail_of(left)
    change_tail(left, bit(-1, 70), len(was.records))
    with pytest.raises(StoreDamaged, match="raftnode repair"):
        plan(left)
    change_tail(left, bit(-1, 70), len(was.records))
    agreed = plan(left)
    assert agreed.last.commit_id == was.last
    assert {change.key for change in agreed.staged} >= {f"key-{n}" for n in range(LEAST, 2 * LEAST)}
    recover(agreed)
    found = entries_at_start(left)
    assert {key: found[key] for key in sorted(found)[:-1]} == contents_of_members(made, was.last)
    assert inspect(left, "verify")[-1]["problems"] == 0
    with pytest.raises(StoreForeign, match="only voter"):
        plan(left)


@needs_strace
def test_a_restore_that_is_killed_while_it_makes_the_tail_can_be_run_again(made: Made, tmp_path: Path) -> None:
    """Killed as it first writes to the tail's file, as it syncs it, and later: the file is there, whole or not, and
    LMDB says nothing of it or that it is in use. The restore is run again, and the node has every value."""
    backup = tmp_path / "backup"
    taken = archive.take(made.members[0], backup, timeout=PATIENCE_S, advance=lambda *_: None)
    outcomes = set()
    for name, call, when in [
        (records.TAIL_FILE, "ftruncate", 1),
        (records.TAIL_FILE, "pwrite64", 1),
        (records.TAIL_FILE, "fsync", 1),
        (records.DATA_FILE, "fdatasync", 2),
        (records.DATA_FILE, "fdatasync", 3),
    ]:
        directory, address = tmp_path / f"{name}-{call}-{when}", free_address()
        command = [sys.executable, "-m", "raftnode", "restore", str(backup), str(directory), "--ip", address]
        trace = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", str(directory / name)]
        trace += ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={when}"]
        done = subprocess.run(
            [*trace, *command], env=command_environment(), capture_output=True, timeout=PATIENCE_S, check=False
        )
        assert done.returncode in (0, -signal.SIGKILL, 128 + signal.SIGKILL), done.stderr
        outcomes.add((done.returncode == 0, (directory / records.TAIL_FILE).exists()))
        with contextlib.suppress(StoreForeign):  # it holds a node already: the kill came after all was done
            archive.restore(backup, directory, address, advance=lambda *_: None)
        with contextlib.closing(Store("database", directory)) as store:
            assert (store.address, store.commit_id) == (address, taken.commit_id)
        assert len(inspect(directory, "state")) == taken.keys
        assert inspect(directory, "verify")[-1]["problems"] == 0
    assert (False, True) in outcomes
