"""Nodes that come and go, as real processes: join, remove, replace, hand over, and a disk that was lost, while clients
write (rule 8; issue, part 3)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from raftnode.errors import BadRequest, RequestError, Unavailable
from raftnode.testing.processes import (
    FAST,
    PATIENCE_S,
    ClusterOfProcesses,
    NodeProcess,
    WriteRecord,
    Writers,
    command_environment,
    free_address,
    wait_until,
)

HIGH_S = int(FAST["HIGH_TIMEOUT"]) / 1000


@pytest.fixture
def three() -> Iterator[ClusterOfProcesses]:
    with ClusterOfProcesses(3, environment=FAST, options=["--timeout", "5"]) as cluster:
        cluster.await_leader()
        yield cluster


def records(prefix: str = "key") -> Iterator[WriteRecord]:
    """Records without end, each with a key of its own."""
    n = 0
    while True:
        yield WriteRecord(f"{prefix}-{n}", {"n": n, "text": "x" * 200})
        n += 1


def shell(node: NodeProcess, *words: str) -> subprocess.CompletedProcess[str]:
    """`raftnode COMMAND` asked of a node."""
    command = [sys.executable, "-m", "raftnode", *words, "--node", node.address]
    return subprocess.run(command, env=command_environment(), capture_output=True, text=True, timeout=60)


def voters(cluster: ClusterOfProcesses) -> set[str]:
    """By the leader's membership; nobody while there is no leader."""
    leader = cluster.leader()
    status = None if leader is None else leader.status()
    members = {} if status is None else status["members"]
    return {address for address, member in members.items() if member["voter"]}


def await_voters(cluster: ClusterOfProcesses, *nodes: NodeProcess) -> None:
    wanted = {node.address for node in nodes}
    wait_until(lambda: voters(cluster) == wanted, f"the voters are {sorted(wanted)}", PATIENCE_S, cluster.describe)


def assert_kept(writers: Writers, *nodes: NodeProcess) -> None:
    """Every acknowledged write is there, read through each of these nodes."""
    keys = [done.record.key for done in writers.acknowledged]
    for node in nodes:
        found = node.read(keys)
        lost = [done.record.key for done in writers.acknowledged if found.get(done.record.key) != done.record.value]
        assert not lost, f"{len(lost)} of {len(keys)} acknowledged writes are lost, by {node}: {lost[:5]}"


# --- joining --------------------------------------------------------------------------------------------------------


def test_node_joins_while_clients_write(three: ClusterOfProcesses) -> None:
    """An empty directory, `serve --join` through a follower: it gets the whole log, then a vote, by itself. No write is
    lost or refused for it; with all four, one may die."""
    leader = three.await_leader()
    follower = three.others(leader)[0]
    with Writers(three.addresses, records(), clients=4) as writers:
        writers.await_acknowledged(200)
        newcomer = three.newcomer(follower).start()
        newcomer.await_answer()
        await_voters(three, *three)
        writers.await_more(200)
        three.await_leader().kill()
        writers.await_more(200)
    three.heal()
    assert_kept(writers, *three)
    roles = shell(newcomer, "peers").stdout
    assert all(node.address in roles for node in three), roles


def test_joining_again_is_just_a_start(three: ClusterOfProcesses) -> None:
    """The same command on the directory of a member starts it; also when nobody else can be reached."""
    newcomer = three.newcomer().start()
    newcomer.await_answer()
    await_voters(three, *three)
    node = newcomer.await_answer()["node"]
    newcomer.restart()
    assert newcomer.await_answer()["node"] == node
    three.await_caught_up()
    three.kill()
    newcomer.start()
    assert newcomer.await_answer()["node"] == node


def test_joining_twice_with_the_answer_lost(three: ClusterOfProcesses) -> None:
    """A node that dies after it was taken, and before it knew: the same question gets the same answer."""
    newcomer = three.newcomer()
    with three.client() as client:
        first = client.add_peer(newcomer.address, "0123456789abcdef")
        again = client.add_peer(newcomer.address, "0123456789abcdef")
        assert again["membership"] == first["membership"]
        assert first["membership"]["learners"] == {newcomer.address: "0123456789abcdef"}
        assert first["cluster"] == three[0].await_answer()["cluster"]
        client.remove_peer(newcomer.address)
    three.let_go(newcomer)


def test_joining_with_another_clusters_data_is_refused(three: ClusterOfProcesses) -> None:
    """It has data of its own: it must not be mixed in, and it is said why. Nothing is changed."""
    with ClusterOfProcesses(1, environment=FAST) as other:
        other.await_leader()
        stranger = other[0]
        stranger.terminate()
        stranger.join = [three[0].address]
        mark = stranger.mark()
        stranger.start()
        assert stranger.await_exit() == 3
        assert "holds data of cluster" in stranger.log_text(mark)
        assert "empty directory" in stranger.log_text(mark)
        with three.client() as client, pytest.raises(BadRequest) as refused:
            client._call({"type": "add_peer", "address": stranger.address, "node": "x", "cluster": "another"})
        assert refused.value.code == "wrong_cluster"
    assert voters(three) == set(three.addresses)


def test_joining_a_dead_address(three: ClusterOfProcesses) -> None:
    """Nobody is there: after its time-out it says so, and ends with status 3. It has left nothing that would stand in
    the way of the next try."""
    newcomer = three.newcomer()
    alive, newcomer.join = newcomer.join, [free_address()]
    newcomer.options = ["--timeout", "1"]
    newcomer.start()
    assert newcomer.await_exit() == 3
    assert "can't be reached" in newcomer.log_text()
    newcomer.join = alive
    newcomer.start().await_answer()
    await_voters(three, *three)


def test_joining_at_the_address_of_a_member_that_answers_is_refused(three: ClusterOfProcesses) -> None:
    """Another node can't be at the address of a member."""
    with three.client() as client:
        assert client.add_peer(three[0].address)["membership"]["voters"].keys() == set(three.addresses)
        with pytest.raises(BadRequest) as refused:
            client.add_peer(three[0].address, "another")
    assert refused.value.code == "wrong_node"
    stranger = NodeProcess(three[0].address, [], three[0].volume.parent / "stranger", FAST, ["--timeout", "1"])
    stranger.listen, stranger.join = free_address(), [three[1].address]
    assert stranger.start().await_exit() == 2
    assert "stop the old one" in stranger.log_text()


# --- leaving --------------------------------------------------------------------------------------------------------


def test_removed_follower_is_told_and_disturbs_nobody(three: ClusterOfProcesses) -> None:
    """It was away while it was removed. It comes back, is told so, stands aside, and tells its clients; no election
    comes of it. Added again, it serves again."""
    leader = three.await_leader()
    victim, other = three.others(leader)
    victim.kill()
    told = shell(other, "remove-peer", victim.address)
    assert told.returncode == 0, told.stderr
    assert "2 voters" in told.stdout
    three.let_go(victim)
    await_voters(three, leader, other)
    term = three.term()
    victim.start()
    victim.await_event("not_member")
    time.sleep(3 * HIGH_S)  # nothing is awaited: in this time it would have disturbed, if it did
    assert three.term() == term
    with victim.client(timeout=1) as client, pytest.raises(Unavailable) as refused:
        client.put("key", 1)
    assert refused.value.code == "not_member"
    with three.client() as client:
        client.add_peer(victim.address)
    wait_until(lambda: victim.address in voters(three), "it is a voter again", PATIENCE_S, three.describe)
    with victim.client() as client:
        client.put("key", 2)


def test_removed_leader_hands_over(three: ClusterOfProcesses) -> None:
    """While clients write, the leader is taken out. It answers, hands over, and the others go on sooner than an
    election timeout; no write is lost."""
    leader = three.await_leader()
    others = three.others(leader)
    with Writers([node.address for node in others], records(), clients=4) as writers:
        writers.await_acknowledged(100)
        began = time.monotonic()
        with others[0].client() as client:
            client.remove_peer(leader.address)
        three.let_go(leader)
        await_voters(three, *others)
        writers.await_more(200)
        ended = time.monotonic()
    wait_until(lambda: leader.await_answer()["role"] == "follower", "it leads no more", PATIENCE_S, leader.describe)
    assert_kept(writers, *others)
    assert writers.longest_gap(began, ended) < PATIENCE_S


def test_what_may_not_be_changed_is_refused_with_a_reason(three: ClusterOfProcesses) -> None:
    """Each refusal has its word and its exit status, and says what to do."""
    leader = three.await_leader()
    first, second = three.others(leader)
    told = shell(first, "remove-peer", "127.0.0.1:1")
    assert (told.returncode, "no_such_member" in told.stderr) == (2, True)
    first.kill()
    with leader.client() as client:
        wait_until(lambda: _code(lambda: client.transfer_leader(first.address)) == "no_successor", "one is missed")
        assert _code(lambda: client.remove_peer(second.address)) == "no_live_majority"
        told = shell(leader, "remove-peer", second.address)
        assert told.returncode == 3
        assert "force" in told.stderr
        told = shell(leader, "transfer-leader", "--to", first.address)
        assert (told.returncode, "no_successor" in told.stderr) == (3, True)
        client.remove_peer(first.address)
        three.let_go(first)


def _code(call: Callable[[], object]) -> str:
    """With what a call is refused; it must not succeed here."""
    try:
        call()
    except RequestError as refused:
        return refused.code
    raise AssertionError("it was to be refused")


def test_last_voter_stays() -> None:
    with ClusterOfProcesses(1, environment=FAST) as cluster:
        cluster.await_leader()
        told = shell(cluster[0], "remove-peer", cluster[0].address, "--force")
        assert told.returncode == 2
        assert "last_voter" in told.stderr


def test_two_changes_at_once(three: ClusterOfProcesses) -> None:
    """While a follower is stopped and the other is cut off by that, no change can commit: the second is refused."""
    leader = three.await_leader()
    for node in three.others(leader):
        node.pause()
    with leader.client(timeout=2) as client:
        answers: list[Any] = [
            leader.ask({"type": "add_peer", "address": free_address(), "id": n}, timeout=0.05) for n in range(2)
        ]
        with pytest.raises(RequestError) as refused:
            client.add_peer(free_address())
    assert answers == [None, None] or answers[1]["error"]["code"] == "change_under_way"
    assert refused.value.code in ("change_under_way", "no_leader", "not_committed")
    for node in three.others(leader):
        node.resume()
    three.await_leader()


# --- replacing ------------------------------------------------------------------------------------------------------


def test_dead_node_is_replaced_in_one_step(three: ClusterOfProcesses) -> None:
    """One of three is dead for good. `replace-peer` once, the new node started: it gets the data, then the vote, and
    the dead one is out. Clients write all the while."""
    dead = three.others(three.await_leader())[0]
    dead.kill()
    alive = three.others(dead)
    with Writers([node.address for node in alive], records(), clients=2) as writers:
        writers.await_acknowledged(100)
        newcomer = three.newcomer(*alive)
        told = shell(alive[0], "replace-peer", dead.address, newcomer.address)
        assert told.returncode == 0, told.stderr
        assert f"{newcomer.address} takes the place of {dead.address}" in told.stdout
        newcomer.start()
        three.let_go(dead)
        await_voters(three, *three)
        writers.await_more(50)
    assert_kept(writers, *three)


def test_replacement_goes_on_after_kill_9_of_the_leader(three: ClusterOfProcesses) -> None:
    """The leader that began it dies before the new node is there; the next one carries it to its end."""
    first = three.await_leader()
    old = three.others(first)[0]
    newcomer = three.newcomer(*three.others(first))
    with three.client() as client:
        client.replace_peer(old.address, newcomer.address)
    first.kill()
    newcomer.start()
    three.let_go(old)
    wait_until(
        lambda: old.address not in voters(three) and newcomer.address in voters(three),
        "the old one is out, the new one in",
        PATIENCE_S,
        three.describe,
    )
    first.start()
    await_voters(three, *three)


# --- handing over ---------------------------------------------------------------------------------------------------


def test_leadership_is_handed_over_and_no_write_is_lost(three: ClusterOfProcesses) -> None:
    """Again and again while clients write: each write is answered once and rightly, and none waits for an election."""
    with Writers(three.addresses, records(), clients=8) as writers:
        writers.await_acknowledged(50)
        for _ in range(5):
            leader = three.await_leader()
            told = shell(leader, "transfer-leader", "--json")
            assert told.returncode == 0, told.stderr
            assert json.loads(told.stdout)["leader"] != leader.address
            writers.await_more(50)
        target = three.others(three.await_leader())[0]
        told = shell(three[0], "transfer-leader", "--to", target.address)
        assert told.stdout == f"{target.address} leads\n", told.stderr
    assert not writers.open_outcomes, "an old leader finishes what it has begun before it hands over"
    assert_kept(writers, *three)


def test_leader_goes_on_when_its_successor_is_dead() -> None:
    """The successor is stopped, and nobody knows it yet: after an election timeout the old leader takes writes again;
    the one that waited meanwhile is carried out."""
    slow = {"HB_TIME": "100", "LOW_TIMEOUT": "1000", "HIGH_TIMEOUT": "2000"}
    with ClusterOfProcesses(3, environment=slow) as cluster:
        leader = cluster.await_leader()
        term = cluster.term()
        target = cluster.others(leader)[0]
        target.pause()
        with leader.client() as client:
            with pytest.raises(Unavailable) as refused:
                client.transfer_leader(target.address)
            assert refused.value.code in ("not_transferred", "no_successor")
            client.put("key", "after")
        assert cluster.term() == term
        target.resume()


def test_clean_stop_hands_over(three: ClusterOfProcesses) -> None:
    """SIGTERM to the leader: another one leads before anybody's election timer has run out."""
    for _ in range(3):
        leader = three.await_leader()
        three.await_caught_up()
        term = three.term()
        assert leader.terminate() == 0
        successor = three.await_leader()
        assert three.term() == term + 1, "one vote, without a failed one before"
        roles = [line["role"] for line in successor.events("role")]
        assert roles[-2:] == ["candidate", "leader"] or "pre-candidate" not in roles[-2:]
        leader.start()
        three.heal()


def test_lagging_follower_accepts_a_leader_that_it_does_not_know(three: ClusterOfProcesses) -> None:
    """While one of three is down, a fourth joins and becomes the leader. The one that was down has never heard of it,
    and follows it nevertheless: its membership is the newer one. (Issue; rule 9.)"""
    lagging = three.others(three.await_leader())[0]
    lagging.kill()
    newcomer = three.newcomer(*three.others(lagging)).start()
    newcomer.await_answer()
    await_voters(three, *three)
    with three.client(1 if three[0] is lagging else 0) as client:
        assert client.transfer_leader(newcomer.address) == newcomer.address
        written = client.put("key", "value")
    lagging.start()
    three.await_caught_up(written["commit_id"], [lagging])
    assert lagging.await_answer()["leader"] == newcomer.address


# --- lost disks -----------------------------------------------------------------------------------------------------


def test_wiped_disk_comes_back_by_itself(three: ClusterOfProcesses) -> None:
    """The directory of one of three is gone. The same command starts it again: it has no vote until the leader has
    taken it as a new member and it has everything; the two others serve all the while."""
    leader = three.await_leader()
    with Writers(three.addresses, records(), clients=2) as writers:
        writers.await_acknowledged(200)
        for victim in three.others(leader):
            before = victim.await_answer()["node"]
            victim.wipe()
            writers.await_more(50)
            victim.start()

            def is_back(victim: NodeProcess = victim, before: str = before) -> bool:
                member = (leader.status() or {"members": {}})["members"].get(victim.address, {})
                return member.get("voter") is True and member["node"] not in ("", before)

            wait_until(is_back, "it is a voter again, as another node", PATIENCE_S, three.describe)
            assert not victim.events("not_member"), "nobody has removed it"
            writers.await_more(50)
    three.await_caught_up()
    assert_kept(writers, *three)


def test_wiped_disk_of_one_that_had_joined_comes_back_at_once() -> None:
    """The same, of a member that was started with --join: the same command, an instant after its death, while the
    others still take it for alive. They have to learn that it died; it waits for that."""
    slow = {"HB_TIME": "50", "LOW_TIMEOUT": "1500", "HIGH_TIMEOUT": "2000"}
    with ClusterOfProcesses(3, environment=slow) as cluster:
        cluster.await_leader()
        newcomer = cluster.newcomer().start()
        before = newcomer.await_answer()["node"]
        await_voters(cluster, *cluster)
        newcomer.wipe()
        newcomer.start()
        assert newcomer.await_answer()["node"] != before
        await_voters(cluster, *cluster)


def test_wiped_leader_comes_back_by_itself(three: ClusterOfProcesses) -> None:
    """The others elect another one; what only the lost disk had promised is gone, and it does not pretend otherwise."""
    victim = three.await_leader()
    with three.client() as client:
        client.put("key", "value")
    three.await_caught_up()
    victim.wipe()
    victim.start()
    await_voters(three, *three)
    three.await_caught_up()
    assert victim.read(["key"]) == {"key": "value"}


def test_two_wiped_disks_of_three_are_no_cluster(three: ClusterOfProcesses) -> None:
    """A majority of the disks is lost: the two empty ones do not elect each other, and nothing that was acknowledged
    un-happens behind the back of the third. (The first promise: as long as a majority of the disks survives.)"""
    leader = three.await_leader()
    with three.client() as client:
        client.put("key", "value")
    three.await_caught_up()
    victims = three.others(leader)
    for victim in victims:
        victim.kill()
    for victim in victims:
        shutil.rmtree(victim.volume)
        victim.start()
    for victim in victims:
        victim.await_event("disk_was_lost")
    time.sleep(3 * HIGH_S)  # nothing is awaited: in this time they would have elected one, if they did
    assert three.leader() is None
    assert leader.await_answer()["last"]["commit_id"] >= 2
