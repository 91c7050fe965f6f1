"""A whole cluster in one process, from one seed: production election, requests, handshake, consensus and store, over
simulated time, network and disks (`world`, `fabric`, `simulated`), with clients and faults.

A run has two phases, as TigerBeetle's simulator has. First `faults` of every kind that the seed has chosen happen
while clients work, and after every turn of every node all that must always hold is looked at (`invariants`, over what
is on the disks). Then all is mended, and the cluster must come to rest: one leader, one log everywhere, every client
answered, writes and reads that succeed at once. In between one member alone is made deaf, or cut off: a follower must
not disturb the others, and a leader must give up. At last the history of the clients is judged: by the checks of
`linearizability`, and against the log.

`tools/simulate.py` runs seeds, and replays one with its transcript:

    Simulation(Options.draw(seed=7)).run()
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from raftnode.config import KIB, MIB, Settings
from raftnode.messages import DeleteCommand, PutCommand, decode_command, decode_object
from raftnode.testing.churn import KINDS as CHURN
from raftnode.testing.churn import Churn
from raftnode.testing.clients import SimulatedClient
from raftnode.testing.fabric import LATEST, Fabric, SimulatedTransport, Weather
from raftnode.testing.faults import KINDS, TAIL_KINDS, Faults
from raftnode.testing.history import History, Kind, Operation
from raftnode.testing.invariants import Invariants
from raftnode.testing.linearizability import judge
from raftnode.testing.simulated import SimulatedNode
from raftnode.testing.world import World

_FIRST_CHANGING: Final = 100
"""Below this seed the members stay: planted faults are recorded with seeds of that sort."""
_SHARED_MEMORY: Final = Path("/dev/shm")


class Options(Struct, frozen=True, kw_only=True):
    """Everything that a seed has chosen, and all that it decides besides chance itself."""

    seed: int
    nodes: int
    clients: int
    keys: int
    elections: float
    """Length of the first phase, in longest election timeouts."""
    settings: Settings
    delay_ms: float
    jitter_ms: float
    turn_delay_ms: float
    loss: float
    repeat: float
    reorder: float
    stray: float
    operations: int
    """Of all clients together, about."""
    client_timeout_ms: float
    value_size: int
    local_share: float
    fault_pause: float
    """Mean time between two faults, in longest election timeouts; and how long one lasts."""
    fault_span: float
    faults: dict[str, float]
    """The kinds that happen, with their weights."""

    @classmethod
    def draw(cls, seed: int) -> Options:
        """The options of a seed: each limit is, now and then, as small as it can be, and not every kind of fault takes
        part in every run, as a rare one would not show beside the others."""
        chance = random.Random(f"options {seed}")
        pick = chance.choice
        heartbeat = pick([20, 50, 100])
        low = heartbeat * pick([3, 5, 10])
        calm = chance.random() < 0.3
        kinds = {kind: weight for kind, weight in KINDS.items() if chance.random() < 0.6} or dict(KINDS)
        kinds |= cls._draw_tail_faults(seed) | cls._draw_churn(seed)
        return cls(
            seed=seed,
            nodes=pick([1, 2, 3, 3, 3, 3, 4, 5, 5]),
            clients=pick([1, 3, 6, 12]),
            keys=pick([1, 2, 5]),
            elections=pick([10, 20]),
            settings=cls._draw_settings(seed, pick, heartbeat, low),
            delay_ms=pick([0.05, 0.5, 3]),
            jitter_ms=pick([0.1, 1, 5]),
            turn_delay_ms=pick([0, 0.2, 2]),
            loss=0 if calm else pick([0, 0.01, 0.1]),
            repeat=0 if calm else pick([0, 0.01, 0.1]),
            reorder=0 if calm else pick([0, 0.05, 0.5]),
            stray=pick([0, 1]),
            operations=pick([100, 300, 1000]),
            client_timeout_ms=low * pick([2, 5, 30]),
            value_size=pick([1, 700, 2000]),
            local_share=pick([0, 0.2]),
            fault_pause=pick([0.3, 1, 3]),
            fault_span=pick([0.3, 1, 3]),
            faults=kinds,
        )

    @staticmethod
    def _draw_settings(seed: int, pick: Callable[[list[int]], int], heartbeat: int, low: int) -> Settings:
        """`low`: the least election timeout. What came later is drawn by chances of its own, so that older seeds draw
        what they drew."""
        short = random.Random(f"short logs {seed}").choice
        cached = random.Random(f"cache {seed}").choice
        stepped = random.Random(f"flush step {seed}").choice
        tailed = random.Random(f"tail {seed}").choice
        return Settings(
            heartbeat_ms=heartbeat,
            election_low_ms=low,
            election_high_ms=2 * low,
            request_timeout_ms=low * pick([2, 5, 20]),
            stop_grace_ms=low,
            mailbox_batches=pick([1, 4, 4096, 4096]),
            waiting_requests=pick([1, 3, 20_000, 20_000]),
            uncommitted_bytes=pick([1, 500, 64 * MIB, 64 * MIB]),
            batch_entries=pick([1, 2, 5, 1024, 1024]),
            batch_bytes=pick([1, 500, MIB, MIB]),
            window_batches=pick([1, 1, 2, 8]),
            kept_entries=pick([1, 5, 20_000]),
            kept_bytes=pick([1, 500, 32 * MIB]),
            flush_delay_ms=pick([1, 50, 200]),
            flush_entries=pick([1, 3, 512]),
            flush_bytes=pick([1, 500, 4 * MIB]),
            flush_step=stepped([1, 2, 16]),
            stall_timeout_ms=low * pick([2, 5]),
            reconnect_ms=pick([1, 20, 100]),
            reconnect_high_ms=pick([20, 100, 500]),
            reader_check_ms=pick([1, 5000]),
            log_entries=short([1, 2, 5, 30, 100_000]),
            log_bytes=short([1, 5000, 20_000, 96 * MIB]),
            compaction_step=short([1, 64]),
            compaction_bytes=short([1, MIB]),
            sweep_keys=short([1, 1000]),
            snapshot_chunk_bytes=short([1, 100, 256 * KIB]),
            snapshot_bytes_per_s=short([10_000, 32 * MIB]),
            snapshot_tracked_keys=short([1, 3, 200_000]),
            tail_bytes=tailed([1, 8 * KIB, 16 * KIB]),
            tail_write_bytes=tailed([1, 300, 16 * KIB, 16 * KIB]),
            map_bytes=256 * MIB,
            reserve_bytes=64 * KIB,
            cache_bytes=cached([1, 10_000, 32 * MIB]),
        )

    @staticmethod
    def _draw_tail_faults(seed: int) -> dict[str, float]:
        chance = random.Random(f"tearing {seed}")
        return {kind: weight for kind, weight in TAIL_KINDS.items() if chance.random() < 0.6}

    @staticmethod
    def _draw_churn(seed: int) -> dict[str, float]:
        """In two thirds of the seeds members come and go."""
        chance = random.Random(f"churn {seed}")
        if seed < _FIRST_CHANGING or chance.random() < 1 / 3:
            return {}
        factor = chance.choice([1.0, 4.0])
        return {kind: factor * weight for kind, weight in CHURN.items() if chance.random() < 0.7}

    def lines(self) -> list[str]:
        """For people: each option, settings only where they differ from the defaults."""
        plain = {name: getattr(self, name) for name in self.__struct_fields__ if name not in ("settings", "faults")}
        usual = Settings()
        fields = self.settings.__struct_fields__
        changed = {
            name: getattr(self.settings, name)
            for name in fields
            if getattr(self.settings, name) != getattr(usual, name)
        }
        return [
            "  ".join(f"{name}={value}" for name, value in plain.items()),
            "  ".join(f"{name}={value}" for name, value in changed.items()),
            f"faults: {', '.join(self.faults)}",
        ]


class Report(Struct, kw_only=True):
    """What a run was."""

    seed: int
    digest: str
    """Equal for equal runs."""
    seconds: float
    """Simulated."""
    events: int
    elections: int
    """Terms that had a leader."""
    committed: int
    operations: Counter[str]
    """By outcome."""
    faults: Counter[str]
    """By kind."""
    starts: int
    snapshots: int
    """Installed."""
    happened: Counter[str]
    """What the disks have seen, by kind."""


class Unsafe(AssertionError):
    """A run has broken something. The message tells what; the seed brings it back."""


class Simulation:
    """One run."""

    def __init__(self, options: Options, tell: Callable[[str], object] | None = None) -> None:
        """`tell` gets the lines of the transcript."""
        self.options = options
        self.world = World(options.seed, tell)
        self.fabric = Fabric(
            self.world,
            Weather(
                delay=options.delay_ms / 1000,
                jitter=options.jitter_ms / 1000,
                loss=options.loss,
                repeat=options.repeat,
                echo=5 * options.settings.election_high_ms / 1000,
                reorder=options.reorder,
                stray=options.stray,
            ),
        )
        self.history = History()
        self.nodes: dict[str, SimulatedNode] = {}
        self.invariants: Invariants
        self._election_s = options.settings.election_high_ms / 1000
        self._mended_at = 0.0
        self._clients: list[SimulatedClient] = []
        self._directory = Path()
        self._names: list[str] = []  # of the nodes that clients know
        chance = random.Random(f"churn of {options.seed}")  # its own, so that it moves nothing where members stay
        patience = 2 * options.settings.request_timeout_ms / 1000
        self._churn = Churn(self.world, self.nodes, self._new_node, self._election_s, patience, chance)

    def run(self) -> Report:
        """Both phases and the judgement. Raises AssertionError, or whatever the product raised."""
        for line in self.options.lines():
            self.world.tell(line)
        parent = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
        directory = Path(tempfile.mkdtemp(prefix="raftnode-simulation-", dir=parent))
        try:
            self._found(directory)
            faults = self._let_faults_happen()
            self._come_to_rest()
            self._judge()
            return self._report(faults)
        finally:
            for node in self.nodes.values():
                if node.is_up:
                    node.store.close()
            shutil.rmtree(directory, ignore_errors=True)

    def _found(self, directory: Path) -> None:
        """Make the nodes and the clients."""
        options = self.options
        self._directory = directory
        names = self._names = [f"n{number + 1}:1" for number in range(options.nodes)]
        founders = list(names)
        for name in names:
            self.nodes[name] = SimulatedNode(
                name, founders, directory, options.settings, self.world, self.fabric, options.turn_delay_ms / 1000
            )
        self.invariants = Invariants(self.nodes)
        for node in self.nodes.values():
            node.watch(self.invariants)
            node.start()
        keys = [f"k{number}" for number in range(options.keys)]
        self._clients = [
            SimulatedClient(
                f"c{number + 1}",
                self.world,
                names,
                self._locate,
                self.history,
                keys,
                timeout=options.client_timeout_ms / 1000,
                think=options.elections * self._election_s * options.clients / options.operations,
                value_size=options.value_size,
                local_share=options.local_share,
                committed=lambda: len(self.invariants.chosen),
            )
            for number in range(options.clients)
        ]

    def _new_node(self, name: str) -> SimulatedNode:
        """A node with an empty disk, which is going to join."""
        options = self.options
        node = SimulatedNode(
            name,
            [name],
            self._directory,
            options.settings,
            self.world,
            self.fabric,
            options.turn_delay_ms / 1000,
            is_guest=True,
        )
        self.nodes[name] = node
        node.watch(self.invariants)
        self.invariants.joined(node)
        self._names.append(name)
        return node

    @property
    def members(self) -> list[SimulatedNode]:
        """The nodes that are members now, by the leader's log."""
        membership = self._churn.membership
        return [] if membership is None else [self.nodes[name] for name in membership.addresses]

    def _locate(self, name: str) -> SimulatedTransport | None:
        node = self.nodes[name]
        return node.transport if node.is_up else None

    # --- the two phases ---

    def _let_faults_happen(self) -> Faults:
        options = self.options
        faults = Faults(
            self.world,
            self.fabric,
            self.nodes,
            options.faults,
            pause=options.fault_pause * self._election_s,
            span=options.fault_span * self._election_s,
            churn=self._churn,
        )
        length = options.elections * self._election_s
        self.world.run(2 * self._election_s)  # some runs begin with a leader
        for client in self._clients:
            client.work(length)
        faults.begin()
        self.world.run(length)
        faults.end()
        return faults

    def _come_to_rest(self) -> None:
        """Liveness: what the healed cluster must come to within a time that is long against all its time limits."""
        settings, self._mended_at = self.options.settings, self.world.now
        patience = (
            30 * self._election_s
            + 2 * settings.stall_timeout_ms / 1000
            + 2 * settings.reconnect_high_ms / 1000
            + settings.request_timeout_ms / 1000
            + self.options.client_timeout_ms / 1000
        )
        self._await("every client has ended", patience, lambda: all(client.is_done for client in self._clients))
        self._await("nobody waits for an answer", patience, self._nobody_waits)
        self._await("every change of the members is finished", 2 * patience, lambda: self._churn.is_done)
        self._await("no link waits for what was lost", patience, self._links_are_well)
        self._await("who was removed knows it", patience, self._outsiders_know)
        self._calm_down()
        self._await("one leader, and one log everywhere", patience, self._agreed)
        if len(self.members) > 2:
            self._try_out(patience)
        for number, node in enumerate(self.members):
            self._serve(self._clients[number % len(self._clients)], node.name)
        self._await("one leader, and one log everywhere", patience, self._agreed)
        self._await("all effects are on disk", patience, self._all_on_disk)
        for node in self.members:
            node.store.compare()

    def _calm_down(self) -> None:
        """From now on nothing comes late by chance: that alone can cost a leader its office."""
        weather = self.fabric.weather
        latest, weather.jitter = LATEST * weather.jitter, min(weather.jitter, 0.0001)
        self.world.run(latest)

    def _try_out(self, patience: float) -> None:
        """One member alone hears nobody, or nobody hears it either. Is it a follower, its leader stays in office, then
        and when it is back (rule 3; TRAPS 13, 14); is it the leader, another one takes over (TRAPS 15)."""
        chance = self.world.chance_for("trial")
        leader = next(node for node in self.members if node.raft.is_leader)
        term, others = leader.raft.term, [node for node in self.members if node is not leader]
        victim = chance.choice([leader, chance.choice(others)])
        is_heard = chance.random() < 0.5
        self.world.tell(f"--- {victim.name} hears nobody{'' if is_heard else ', and nobody hears it'}")
        for name in self.nodes:
            if name != victim.name:
                self.fabric.cut(name, victim.name, holds=False)
                if not is_heard:
                    self.fabric.cut(victim.name, name, holds=False)
        if victim is leader:
            self._await(
                "who can't hear does not lead, and another one does",
                patience,
                lambda: not leader.raft.is_leader and any(node.raft.is_leader for node in others),
            )
        else:
            self.world.run(4 * self._election_s)
        self._mended_at = self.world.now
        self.fabric.heal_all()
        self.world.tell("--- all is mended")
        self._await("no link waits for what was lost", patience, self._links_are_well)
        self._await("one leader, and one log everywhere", patience, self._agreed)
        assert victim is leader or (leader.raft.is_leader and leader.raft.term == term), (
            f"who hears nobody deposes nobody: {leader.name} led term {term}, until {victim.name} was cut off. "
            f"{self._describe()}"
        )

    def _await(self, what: str, patience: float, is_so: Callable[[], bool]) -> None:
        every = self.options.settings.heartbeat_ms / 1000
        if not self.world.run_until(is_so, patience, every):
            raise Unsafe(f"liveness: all is well for {patience:.1f} s, but not: {what}. {self._describe()}")

    def _describe(self) -> str:
        def state(node: SimulatedNode) -> str:
            if not node.is_up:
                return f"{node.name} is down"
            raft, last = node.raft, node.raft.journal.last.id
            waits = len(node.transport.sessions)
            return (
                f"{node.name} {raft.role} of term {raft.term}, leader {raft.leader}, log up to {last}, commit "
                f"{raft.commit_id}, links {sorted(node.transport.live)}, {waits} clients wait"
            )

        return "; ".join(state(node) for node in self.nodes.values())

    def _nobody_waits(self) -> bool:
        return not any(node.transport.sessions for node in self.nodes.values() if node.is_up)

    def _links_are_well(self) -> bool:
        """Everybody is linked to everybody, by links on which nothing was lost that they could still end over."""
        members = self.members
        waits = [node.transport.oldest_waits() for node in members if node.is_up]
        return len(waits) == len(members) > 0 and all(
            len(of_node) == len(members) - 1 and all(since is None or since > self._mended_at for since in of_node)
            for of_node in waits
        )

    def _agreed(self) -> bool:
        """One leader, whom all follow, and whose whole log all have applied."""
        leaders = [node.raft for node in self.nodes.values() if node.is_up and node.raft.is_leader]
        members = self.members
        if len(leaders) != 1 or not all(node.is_up for node in members):
            return False
        rafts = [node.raft for node in members]
        last = leaders[0].journal.last
        return all(
            raft.leader == leaders[0].me and raft.journal.last == last and raft.applied == last.id.commit_id
            for raft in rafts
        )

    def _outsiders_know(self) -> bool:
        """Who is no member any more takes part in nothing, and tells its clients, if anybody is left to tell it."""
        members = {node.name for node in self.members}
        outside = [node for name, node in self.nodes.items() if name not in members and node.is_up]
        return bool(members) and all(
            node.raft.is_outside or not members & set(node.raft.membership.addresses) for node in outside
        )

    def _all_on_disk(self) -> bool:
        return all(node.disk.commit_id == len(self.invariants.chosen) for node in self.members)

    def _serve(self, client: SimulatedClient, name: str) -> None:
        """A write and a read through a node succeed, and the read sees the write."""
        write = self._succeed(client, "put", name)
        read = self._succeed(client, "get", name)
        assert read.value == write.value, f"at rest {name} read {read.value}, not {write.value}"

    def _succeed(self, client: SimulatedClient, kind: Kind, name: str) -> Operation:
        """One operation, at the first try, unless the node's limits are so small that it is busy with itself."""
        while True:
            operation = client.ask(kind, "rest", name)
            self._await(f"{client.name} goes on", 10 * self._election_s, lambda: client.is_done)
            if operation.code != "overloaded":
                break
        assert operation.outcome == "ok", f"liveness: a {kind} through {name} at rest was answered {operation.code}"
        return operation

    # --- the judgement ---

    def _judge(self) -> None:
        """The clients' history, first as nobody who knows the log would see it, then against the log."""
        verdict = judge(self.history)
        if not verdict.is_good:
            raise Unsafe(f"linearizability: {verdict}")
        Log(self).judge(self.history)

    def _report(self, faults: Faults) -> Report:
        return Report(
            seed=self.options.seed,
            digest=self.world.digest,
            seconds=self.world.now,
            events=self.world.events,
            elections=self.invariants.elections,
            committed=len(self.invariants.chosen),
            operations=Counter(operation.outcome for operation in self.history),
            faults=faults.counts,
            starts=sum(node.starts for node in self.nodes.values()),
            snapshots=sum(node.installed for node in self.nodes.values()),
            happened=sum([node.happened for node in self.nodes.values()], Counter()),
        )


class Log:
    """The log that all agree on at the end, replayed: the truth against which what clients were told is held."""

    def __init__(self, simulation: Simulation) -> None:
        node = next(iter(simulation.members))
        self._commands = [decode_command(entry.command) for entry in node.disk.entries]
        self._states: dict[str, list[tuple[int, Any]]] = {}
        self._puts: dict[Any, int] = {}
        for commit_id, command in enumerate(self._commands, start=1):
            if isinstance(command, PutCommand):
                value = decode_object(b'{"value":%s}' % bytes(command.value))["value"]
                assert value not in self._puts, f"applied once: {value!r} is in the log twice"
                self._puts[value] = commit_id
                self._states.setdefault(command.key, []).append((commit_id, value))
            elif isinstance(command, DeleteCommand):
                self._states.setdefault(command.key, []).append((commit_id, None))

    def judge(self, history: History) -> None:
        """Nothing acknowledged is lost, nothing refused is there, and every read is of a state that was."""
        invoked = {operation.value for operation in history if operation.kind == "put"}
        strangers = self._puts.keys() - invoked
        assert not strangers, f"nobody wrote what is in the log: {sorted(strangers)}"
        for operation in history:
            if operation.kind == "get":
                self._judge_read(operation)
            elif operation.outcome == "ok":
                self._judge_write(operation)
            elif operation.outcome == "failed" and operation.kind == "put":
                assert operation.value not in self._puts, f"failed, but in the log: {operation}"
        self._judge_deletes(history)

    def _judge_write(self, operation: Operation) -> None:
        commit_id = operation.commit_id
        assert commit_id is not None, "an acknowledged write has a commit_id"
        assert commit_id <= len(self._commands), f"acknowledged, but lost: {operation}"
        command = self._commands[commit_id - 1]
        kind = PutCommand if operation.kind == "put" else DeleteCommand
        assert isinstance(command, kind), f"acknowledged, but another entry is there: {operation}, {command}"
        assert (command.key, command.client) == (operation.key, operation.client), (
            f"acknowledged, but another entry is there: {operation}, {command}"
        )
        if operation.kind == "put":
            assert self._puts.get(operation.value) == commit_id, f"acknowledged, but another value: {operation}"

    def _judge_read(self, operation: Operation) -> None:
        if operation.outcome != "ok":
            return
        assert operation.commit_id is not None, "an answered read says what it shows"
        value = None
        for commit_id, written in self._states.get(operation.key, []):
            if commit_id <= operation.commit_id:
                value = written
        assert operation.value == value, f"a read of a state that never was: {operation}, the log has {value!r}"

    def _judge_deletes(self, history: History) -> None:
        """As many deletes as could have happened: those acknowledged, and some of the open ones."""
        found = Counter((c.client, c.key) for c in self._commands if isinstance(c, DeleteCommand))
        possible = Counter(
            (operation.client, operation.key)
            for operation in history
            if operation.kind == "delete" and operation.outcome != "failed"
        )
        assert found <= possible, f"deletes that nobody asked for: {found - possible}"


def run(seed: int, tell: Callable[[str], object] | None = None) -> Report:
    """One run of one seed."""
    return Simulation(Options.draw(seed), tell).run()


def as_json(report: Report) -> bytes:
    """A report as one line."""
    return msgspec.json.encode(report)
