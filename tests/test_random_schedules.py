"""Random schedules over the consensus core: every fault at any moment, then healing and convergence.

Each case is one seed; it is in the name of the test and printed first, and it decides everything: the size of the
cluster, the limits (down to 1), and each step.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from raftnode.config import Settings
from raftnode.messages import Data
from raftnode.testing.network import CrashPoint, Envelope, Network

SEEDS = range(120)
STEPS = 1000


class Chaos:
    """One random schedule. Phase one breaks things, phase two mends them all and waits for agreement."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        size = self.random.choice([1, 2, 3, 3, 3, 4, 5, 5])
        settings = Settings(
            window_batches=self.random.choice([1, 1, 2, 8]),
            batch_entries=self.random.choice([1, 2, 1024]),
            batch_bytes=self.random.choice([1, 200, 1 << 20]),
            kept_entries=self.random.choice([1, 3, 1000]),
        )
        limits = (
            f"{settings.window_batches=} {settings.batch_entries=} {settings.batch_bytes=} {settings.kept_entries=}"
        )
        print(f"seed {seed}: {size} members, {limits}")  # noqa: T201 - shown when the test fails
        self.network = Network(size, seed, settings)
        self.asked = 0
        self.late: list[Envelope] = []
        self.loss = self.random.choice([0.0, 0.02, 0.2])
        self.fault = self.random.choice([0.0, 0.02, 0.1, 0.3])
        self.actions: list[tuple[Callable[[], None], float]] = [
            (self.deliver, 12),
            (self.pass_time, 2),
            (self.propose, 2),
            (self.read, 1),
            (self.lose, 12 * self.loss),
            (self.repeat, 12 * self.loss),
            (self.delay, 6 * self.loss),
            (self.arrive_late, 2 * self.loss),
            (self.crash, self.fault),
            (self.restart, 3 * self.fault),
            (self.cut, self.fault),
            (self.heal, self.fault),
            (self.pause, self.fault),
            (self.resume, 2 * self.fault),
            (self.lose_link, self.fault),
            (self.depose, self.random.choice([0.0, 0.1, 0.3, 0.6])),
            (self.sleep_through_a_change, 2 * self.fault),
        ]

    def step(self) -> None:
        actions, weights = zip(*self.actions, strict=True)
        self.random.choices(actions, weights)[0]()

    def any_member(self, *, running: bool = True) -> str | None:
        names = [name for name, member in self.network.members.items() if member.takes_turns or not running]
        return self.random.choice(names) if names else None

    def deliver(self) -> None:
        if indexes := self.network.deliverable():
            early = indexes[:3] if self.random.random() < 0.9 else indexes
            self.network.deliver_one(self.random.choice(early))

    def pass_time(self) -> None:
        self.network.advance(self.random.choice([0.01, 0.05, 0.2]))

    def propose(self) -> None:
        if self.network.leaders and not self.network[leader := self.random.choice(self.network.leaders)].paused:
            self.asked += 1
            keys = [f"k{self.asked}-{n}" for n in range(self.random.choice([1, 1, 5]))]
            self.network.propose(leader, *keys)

    def read(self) -> None:
        for leader in self.network.leaders:
            if self.network[leader].raft.may_serve_reads and self.network[leader].takes_turns:
                self.asked += 1
                self.network.read(leader, f"r{self.asked}")
                return

    def lose(self) -> None:
        if self.network.in_flight:
            del self.network.in_flight[self.random.randrange(len(self.network.in_flight))]

    def repeat(self) -> None:
        if self.network.in_flight:
            self.network.duplicate(self.random.choice(self.network.in_flight))

    def delay(self) -> None:
        """A message is held up on its way: it may arrive in another term, or never."""
        if self.network.in_flight:
            place = self.random.randrange(len(self.network.in_flight))
            self.late.append(self.network.in_flight.pop(place))

    def arrive_late(self) -> None:
        if self.late:
            self.network.in_flight.insert(0, self.late.pop(self.random.randrange(len(self.late))))

    def crash(self) -> None:
        if name := self.any_member():
            self.network.crash(name, self.random.choice(list(CrashPoint)))

    def restart(self) -> None:
        down = [name for name, member in self.network.members.items() if not member.is_up]
        if down:
            self.network.restart(self.random.choice(down))

    def cut(self) -> None:
        source, target = self.any_member(running=False), self.any_member(running=False)
        assert source
        assert target
        if source != target:
            self.network.cut(source, target, both=self.random.random() < 0.6)

    def heal(self) -> None:
        self.network.heal()

    def pause(self) -> None:
        if name := self.any_member():
            self.network.pause(name)

    def resume(self) -> None:
        paused = [name for name, member in self.network.members.items() if member.is_up and member.paused]
        if paused:
            self.network.resume(self.random.choice(paused))

    def lose_link(self) -> None:
        """Both ends notice that their connection was cut, and what was under way is gone."""
        source, target = self.any_member(), self.any_member()
        if source and target and source != target:
            self.network.drop(source, target)
            self.network.drop(target, source)
            self.network.turn(source, lambda raft: raft.unreachable(target))
            if self.network[target].takes_turns:
                self.network.turn(target, lambda raft: raft.suspect(source))

    def depose(self) -> None:
        """Somebody's election timer runs out early, mostly when the others have lost their leader as well: elections
        far more often than time alone would bring, of members that are behind too."""
        name = self.any_member()
        if name and not self.network[name].raft.is_leader:
            if self.random.random() < 0.8:
                self.network.lose_leaders()
            self.network.turn(name, lambda raft: raft.suspect(raft.leader or ""), lambda raft: raft.campaign())

    def sleep_through_a_change(self) -> None:
        """A follower takes an entry, sleeps while its leader loses that entry or its office, and wakes when one that it
        has followed leads again, with another entry in that place; then a heartbeat may come before the data."""
        network = self.network
        follower = self.any_member()
        if not network.leaders or follower in (None, network.leader) or network[network.leader].paused:
            return
        assert follower is not None
        old = network.leader
        network.deliver(100)
        network.in_flight.clear()
        if old not in network.leaders or not network[follower].takes_turns:
            return
        if self.random.random() < 0.5:
            network.crash(old, CrashPoint.BEFORE_WRITE)
        self.asked += 1
        network.propose(old, f"k{self.asked}")
        for envelope in network.select(old, follower):
            network.deliver_one(network.in_flight.index(envelope))
        network.pause(follower)
        network.in_flight.clear()
        if not network[old].is_up:
            network.restart(old)
        for name in [*self.random.sample(sorted(network.members), self.random.randrange(2)), old]:
            if network[name].takes_turns and not network[name].raft.is_leader:
                network.lose_leaders()
                network.campaign(name)
                network.deliver(100)
        if network.leaders and network[network.leader].takes_turns:
            network.propose(network.leader, f"k{self.asked}-instead")
            network.deliver(100)
        network.in_flight.clear()
        network.resume(follower)
        network.advance(0.15)
        network.drop(target=follower, kind=Data)
        network.deliver(20)

    def mend(self) -> None:
        self.network.heal()
        for name, member in self.network.members.items():
            member.crash_at = None
            if not member.is_up:
                self.network.restart(name)
            self.network.resume(name)

    def agreed(self) -> bool:
        """One leader, and the whole log of that leader is applied everywhere."""
        network = self.network
        if len(network.leaders) != 1:
            return False
        last = network[network.leader].raft.journal.last
        return all(
            member.raft.applied == last.id.commit_id and member.raft.journal.last == last
            for member in network.members.values()
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_any_schedule_is_safe_and_converges_once_faults_end(seed: int) -> None:
    """Whatever is lost, repeated, reordered, cut, paused or crashed, the invariants hold after every turn; and when
    all is mended, one leader brings every member to one log, writes commit again, and no read is left without an
    outcome. (Thesis 3.5-3.8, 6.4; TRAPS.)"""
    chaos = Chaos(seed)
    for _ in range(STEPS):
        chaos.step()
    chaos.mend()
    network = chaos.network
    network.deliver()
    network.run_until(chaos.agreed)
    network.propose(network.leader, "after")
    network.run_until(chaos.agreed)
    network.read(network.leader, "last read")
    network.run(0.2)
    assert "last read" in network[network.leader].reads.answered
    for member in network.members.values():
        assert member.keys[-1] == "after"
        assert member.keys == network[network.leader].keys
        assert not member.reads.waiting, f"{member.name}: reads without an outcome"


def test_one_seed_gives_one_trace() -> None:
    """The same seed sends the same bytes in the same order, so a failure can be repeated. (rule 11.)"""

    def trace() -> list[tuple[str, bytes]]:
        chaos, seen = Chaos(11), list[tuple[str, bytes]]()
        chaos.network.watch = lambda event, envelope: seen.append((f"{event} {envelope.target}", envelope.frame))
        for _ in range(STEPS):
            chaos.step()
        return seen

    assert trace() == trace()
