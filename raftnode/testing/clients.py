"""Simulated clients: each does one operation after the other through any node, and notes what it was told."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Final

from msgspec import UNSET, Raw, UnsetType

from raftnode.errors import BadRequest, NotCommitted, Unavailable, error_for
from raftnode.mailbox import Arrival
from raftnode.messages import (
    Delete,
    DeleteAnswer,
    Get,
    GetAnswer,
    Put,
    PutAnswer,
    decode_answer,
    decode_object,
    decode_request,
    encode,
)
from raftnode.testing.fabric import Session, SimulatedTransport
from raftnode.testing.history import History, Kind, Operation
from raftnode.testing.world import World

Locate = Callable[[str], SimulatedTransport | None]
"""The transport of a node that is up, by its name."""
_PATIENCE_S: Final = 60.0
"""How long a client waits for an answer that must come."""


class SimulatedClient:
    """One client. Invariant: at most one operation is under way."""

    def __init__(
        self,
        name: str,
        world: World,
        nodes: Sequence[str],
        locate: Locate,
        history: History,
        keys: Sequence[str],
        timeout: float,
        think: float,
        value_size: int,
        local_share: float,
        committed: Callable[[], int],
    ) -> None:
        """`timeout` and `think` (the pause between two operations, on average) in seconds; `value_size`: characters of
        the largest value; `local_share`: how many of the reads are local. `committed`: how many entries any node has
        applied by now."""
        self.name = name
        self.is_done = True
        self._world = world
        self._nodes = nodes
        self._locate = locate
        self._history = history
        self._keys = keys
        self._timeout = timeout
        self._think = think
        self._value_size = value_size
        self._local_share = local_share
        self._committed = committed
        self._floor = 0  # what was committed when the operation began
        self._chance: random.Random = world.chance_for(name)
        self._number = 0
        self._until = 0.0
        self._is_waiting = False

    def work(self, seconds: float) -> None:
        """Begin operations for so long; `is_done` once the last of them has ended."""
        self._until = self._world.now + seconds
        self.is_done = False
        self._begin_later()

    def ask(self, kind: Kind, key: str, node: str) -> Operation:
        """Do one operation now, at `node`; returns what becomes of it."""
        assert not self._is_waiting, f"{self.name} does one thing at a time"
        self._until = self._world.now
        self.is_done = False
        return self._invoke(kind, key, node, is_local=False, timeout=_PATIENCE_S)

    # --- one operation ---

    def _begin(self) -> None:
        if self._world.now >= self._until:
            self.is_done = True
            return
        kind: Kind = self._chance.choices(("put", "get", "delete"), (5, 4, 1))[0]
        is_local = kind == "get" and self._chance.random() < self._local_share
        self._invoke(kind, self._chance.choice(self._keys), self._chance.choice(self._nodes), is_local, self._timeout)

    def _invoke(self, kind: Kind, key: str, node: str, is_local: bool, timeout: float) -> Operation:
        self._number += 1
        operation = self._history.add(
            Operation(client=self.name, kind=kind, key=key, node=node, invoked=self._world.now, is_local=is_local)
        )
        if kind == "put":
            padding = "." * self._chance.randrange(self._value_size)
            operation.value = f"{self.name}-{self._number}{padding}"
        self._is_waiting = True
        self._floor = self._committed()
        self._world.tell(f"{self.name} -> {node}: {kind} {key} {operation.value or ''}")
        frame = self._encode(operation)
        self._world.after(0.0005 * self._chance.random(), lambda: self._arrive(operation, frame))
        self._world.after(timeout, lambda: self._end(operation, "timeout"))
        return operation

    def _encode(self, operation: Operation) -> bytes:
        message: Put | Delete | Get
        if operation.kind == "put":
            message = Put(key=operation.key, value=Raw(b'"%s"' % operation.value.encode()), client=self.name)
        elif operation.kind == "delete":
            message = Delete(key=operation.key, client=self.name)
        else:
            message = Get(key=operation.key, consistency="local" if operation.is_local else "linearizable")
        message.id = self._number
        return encode(message)

    def _arrive(self, operation: Operation, frame: bytes) -> None:
        """The request arrives at its node, if that is up."""
        transport = self._locate(operation.node)
        if transport is None:
            self._finish(operation, "failed", "refused")
            return
        session = Session(
            self.name,
            transport,
            take=lambda answer: self._answered(operation, answer),
            end=lambda: self._end(operation, "connection lost"),
        )
        if self._world.now < self._until and self._chance.random() < 0.02:
            session.is_full = True
            self._world.after(0.2 * self._chance.random(), session.take_again)
        transport.sessions.append(session)
        transport.receive([Arrival(decode_request(frame), session, len(frame))], limited=True)

    # --- its end ---

    def _end(self, operation: Operation, why: str) -> None:
        """No answer came: the outcome is open."""
        if operation.returned is None and operation.code == "":
            self._finish(operation, "open", why)

    def _answered(self, operation: Operation, frame: bytes) -> None:
        answer: Any = decode_answer(frame)
        if operation.code or operation.returned is not None:
            return  # too late: the client has gone on
        assert answer.id is not UNSET, "an answer repeats the id of its request"
        if answer.error is not UNSET:
            error = error_for(answer.error.code, answer.error.message)
            assert isinstance(error, Unavailable | BadRequest | NotCommitted), f"{self.name} got {error}"
            self._finish(operation, "open" if isinstance(error, NotCommitted) else "failed", error.code)
            return
        if isinstance(answer, GetAnswer):
            assert answer.data is not None, "a read without an error has found something or nothing"
            found = decode_object(b'{"value":%s}' % bytes(answer.data.value))
            operation.value, operation.modified = found["value"], answer.data.modified
            operation.version = answer.data.version
        else:
            assert isinstance(answer, PutAnswer | DeleteAnswer), f"{self.name} asked for no {answer}"
            operation.replaced = _known(answer.replaced)
            operation.version = _known(answer.version)
        assert answer.commit_id is not UNSET, "a success has a commit_id"
        operation.commit_id = answer.commit_id
        self._finish(operation, "ok", "")
        self._check_floor(operation)

    def _check_floor(self, operation: Operation) -> None:
        """A read shows all that was committed anywhere when it began, whether its key has changed or not; a write comes
        after that."""
        shown = operation.commit_id
        assert shown is not None, "a success has a commit_id"
        if operation.kind == "get":
            assert operation.is_local or shown >= self._floor, (
                f"linearizable reads: {operation} shows {shown}, {self._floor} was committed before it"
            )
        else:
            assert shown > self._floor, f"writes in real time: {operation}, {self._floor} was committed before it"

    def _finish(self, operation: Operation, outcome: Any, code: str) -> None:
        if operation.returned is not None or operation.code:
            return
        operation.outcome, operation.code = outcome, code
        if outcome != "open":
            operation.returned = self._world.now
        if self._world.is_told:
            shown = f"{code or operation.commit_id} {operation.value or ''}" if operation.kind == "get" else code
            self._world.tell(f"{self.name}: {operation.kind} {operation.key} {outcome} {shown or operation.commit_id}")
        self._world.mark(f"{self.name} {outcome} {code} {operation.commit_id}".encode())
        self._is_waiting = False
        self.is_done = self._world.now >= self._until
        if not self.is_done:
            self._begin_later()

    def _begin_later(self) -> None:
        """Clients come in bursts: mostly at once again, and then not for a while."""
        pause = self._chance.expovariate(0.2 / self._think) if self._chance.random() < 0.2 else 0.0
        self._world.at(min(self._world.now + pause, self._until), self._begin)


def _known(number: int | UnsetType | None) -> int | None:
    """A number of an answer; None when it is not in it, or says that there is none."""
    return None if isinstance(number, UnsetType) else number
