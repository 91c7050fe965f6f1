"""How entries get from the leader to the others, and when they are committed."""

from __future__ import annotations

from raftnode.messages import Data
from raftnode.testing.network import Network


def test_heartbeat_of_a_later_term_commits_nothing_that_this_leader_has_not_checked() -> None:
    """A member stops (SIGSTOP) while "1" leads; its newest entry, never committed, is replaced under another leader,
    and "1" is elected anew. When the member wakes, a heartbeat of "1" overtakes its data: what matched in the old term
    says nothing of the new one, so nothing may be committed by it. (Thesis 3.5; FACTS 1.7; DESIGN 5, rule 6.)"""
    network = Network(5)
    network.elect("1")
    network.run(0.5)
    network.isolate("1", "5")
    (lost,) = network.propose("1", "lost")
    network.deliver()
    assert network["5"].log[-1].commit_id == lost, "staged at 5, on no majority"
    network.pause("5")

    network.elect("2")
    network.propose("2", "chosen")
    network.deliver()
    network.heal()
    network.run(2.0)
    network.elect("1")
    network.run(0.3)
    assert network["1"].keys == ["chosen"], "1 leads again, with the log of 2"

    network.in_flight.clear()
    network.resume("5")
    network.advance(0.2)
    network.drop("1", "5", Data)
    network.deliver()
    network.run(1.0)
    assert network["5"].keys == ["chosen"]
