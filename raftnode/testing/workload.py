"""Clients of real nodes that read and write at random and note every operation in a `History`.

    load = Load(cluster, clients=8, keys=8, seed=1)
    load.start()
    ...
    load.stop()
    load.history.save(file)

Each operation is tried once, so that its outcome is exact, by the rules of raftnode/errors.py: an answer that says so
makes it ok or failed; every other answer, a time-out and a connection that was cut leave a write open. The name that an
operation has in the history is one of its own, and is what the log records with a write: so each entry of the log can
be matched with the operation that asked for it.

Few keys are in use at a time, so that clients meet at them; each collects no more operations than a checker can decide.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Iterable
from functools import partial
from typing import Any, Final

from raftnode.blocking import LineConnection
from raftnode.config import DEFAULT_NAMESPACE, Settings
from raftnode.errors import BadRequest, ProtocolError, Unavailable, error_for
from raftnode.messages import decode_object, encode_object
from raftnode.testing.history import History, Kind, Operation
from raftnode.testing.processes import ClusterOfProcesses, wait_until

NAMESPACES: Final = (DEFAULT_NAMESPACE, "chaos")
OPERATIONS_PER_KEY: Final = 1500
"""After so many a key is given up for a new one."""
PATIENCE_S: Final = 60.0
"""How long a healed cluster may take to serve: far more than it needs, on a machine that is busy."""

_LIMIT: Final = Settings().peer_frame_bytes
_THINK_S: Final = 0.004
_MOVES_ON: Final = 0.2
"""How likely it is that who was told that it asks no member asks another node next: the others look at what it says."""


class Window:
    """The keys that are in use: a few at a time, so that clients meet at them, and each only for a while."""

    def __init__(self, size: int) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._keys = [self._new() for _ in range(size)]
        self.used: list[tuple[str, str]] = []
        """(namespace, key) of every key that was ever taken."""

    def _new(self) -> list[int]:
        return [next(self._numbers), 0]

    def take(self, chance: random.Random) -> tuple[str, str]:
        """Namespace and key for one operation."""
        with self._lock:
            at = chance.randrange(len(self._keys))
            number, count = self._keys[at]
            if count == OPERATIONS_PER_KEY:
                self._keys[at] = self._new()
                number, count = self._keys[at]
            self._keys[at][1] += 1
            found = NAMESPACES[number % len(NAMESPACES)], f"key-{number}"
            if not count:
                self.used.append(found)
            return found


class ChaosClient:
    """One client: one operation at a time, each tried once, over a connection that was seen to work before."""

    def __init__(self, name: str, cluster: ClusterOfProcesses, window: Window, history: History, seed: str) -> None:
        self.name = name
        self._addresses = cluster.addresses
        self._window = window
        self._history = history
        self._chance = random.Random(seed)
        self._count = 0
        self._connection: LineConnection | None = None

    def run(self, stopping: threading.Event) -> None:
        """Operations until `stopping` is set, with short pauses."""
        with contextlib.closing(self):
            while not stopping.wait(self._chance.uniform(0, 2 * _THINK_S)):
                if self._connection is None or self._chance.random() < 0.05:
                    self._connect(self._chance.choice(tuple(self._addresses)))  # nodes may come and go
                if self._connection is not None:
                    code = self.request(self._invent()).code
                    if code == "not_member" and self._chance.random() < _MOVES_ON:
                        self.close()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def read(self, address: str, places: Iterable[tuple[str, str]]) -> None:
        """Read these at one node, each until there is an answer."""
        for namespace, key in places:
            wait_until(partial(self._read_one, address, namespace, key), f"{key} is read at {address}", PATIENCE_S)

    def fill(self, address: str, count: int, size: int) -> None:
        """Write so many values of about `size` bytes, so that a snapshot has something to send."""
        for number in range(count):
            put = Operation(client="", kind="put", namespace=NAMESPACES[1], key=f"weight-{number}", invoked=0.0)
            put.value = "w" * size
            if self._connection is None:
                self._connect(address)
            if self._connection is not None:
                self.request(put)

    def _read_one(self, address: str, namespace: str, key: str) -> bool:
        if self._connection is None:
            self._connect(address)
        get = Operation(client="", kind="get", namespace=namespace, key=key, invoked=0.0)
        return self._connection is not None and self.request(get).outcome == "ok"

    def _connect(self, address: str) -> None:
        """A new connection that works, or none: an operation that surely can't be sent is not begun."""
        self.close()
        with contextlib.suppress(OSError, ProtocolError):
            connection = LineConnection(address, 1.0, _LIMIT)
            try:
                connection.request(encode_object({"type": "ping"}), 1.0)
            except BaseException:
                connection.close()
                raise
            self._connection = connection

    def _invent(self) -> Operation:
        chance = self._chance
        namespace, key = self._window.take(chance)
        kind: Kind = chance.choices(("put", "delete", "get"), (4, 1, 5))[0]
        is_local = kind == "get" and chance.random() < 0.2
        return Operation(client="", kind=kind, namespace=namespace, key=key, invoked=0.0, is_local=is_local)

    def _size(self) -> int:
        """Of a value: mostly small, now and then one that no single packet holds."""
        return self._chance.randrange(30_000) if self._chance.random() < 0.01 else self._chance.randrange(60)

    def request(self, operation: Operation) -> Operation:
        """Carry it out, and note it."""
        assert self._connection is not None, "there is a connection before there is a request"
        self._count += 1
        operation.client = f"{self.name}.{self._count}"
        operation.node = self._connection.address
        if operation.kind == "put":
            operation.value = f"{operation.client} {operation.value or 'x' * self._size()}"
        line = encode_object(_message(operation))
        timeout = self._chance.choice((0.2, 2.0, 2.0, 2.0, 6.0))
        operation.invoked = time.monotonic()
        self._history.add(operation)
        try:
            answer = decode_object(self._connection.request(line, timeout))
        except (OSError, ProtocolError) as error:
            operation.code = type(error).__name__
            self.close()
            return operation
        _note_answer(operation, answer, time.monotonic())
        return operation


def _message(operation: Operation) -> dict[str, Any]:
    message: dict[str, Any] = {"type": operation.kind, "key": operation.key, "namespace": operation.namespace}
    if operation.kind == "get":
        return {**message, "consistency": "local" if operation.is_local else "linearizable"}
    if operation.kind == "put":
        message["value"] = operation.value
    return {**message, "client": operation.client}


def _note_answer(operation: Operation, answer: dict[str, Any], now: float) -> None:
    """Put what it was answered into the operation, the outcome last."""
    if detail := answer.get("error"):
        operation.code = detail["code"]
        if isinstance(error_for(detail["code"], ""), Unavailable | BadRequest):
            operation.returned, operation.outcome = now, "failed"
        return
    operation.commit_id = answer["commit_id"]
    if operation.kind == "get":
        found = answer["data"]
        operation.value, operation.version = found["value"], found["version"]
        operation.modified = found["modified"] or None
    else:
        operation.version, operation.replaced = answer.get("version"), answer["replaced"]
    operation.returned, operation.outcome = now, "ok"


class Load:
    """The clients, each in a thread."""

    def __init__(self, cluster: ClusterOfProcesses, clients: int, keys: int, seed: int) -> None:
        self.history = History()
        self.window = Window(keys)
        self._stopping = threading.Event()
        self._failures: list[BaseException] = []
        names = [f"c{n}" for n in range(1, clients + 1)]
        made = [ChaosClient(name, cluster, self.window, self.history, f"{seed} {name}") for name in names]
        self._threads = [threading.Thread(target=self._run, args=(client,), daemon=True) for client in made]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let each finish what it does. Raises what went wrong in one."""
        self._stopping.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(PATIENCE_S)
        for failure in self._failures:
            raise failure

    def await_progress(self) -> None:
        """Wait until writes that begin now are acknowledged."""
        count = len(self.history)

        def goes_on() -> bool:
            return any(is_acknowledged(operation) for operation in self.history.operations[count:])

        wait_until(goes_on, "the healed cluster takes writes", PATIENCE_S)

    def _run(self, client: ChaosClient) -> None:
        try:
            client.run(self._stopping)
        except BaseException as failure:  # for `stop` to raise
            self._failures.append(failure)


def is_acknowledged(operation: Operation) -> bool:
    return operation.outcome == "ok" and operation.kind != "get"
