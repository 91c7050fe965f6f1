"""What clients did and what they were told: the input of `linearizability.check`, written by the simulator and by
`tools/chaos.py`, and kept as JSON lines so that a run that failed can be judged again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from raftnode.config import DEFAULT_NAMESPACE

Kind = Literal["put", "get", "delete"]
Outcome = Literal["ok", "open", "failed"]


class Operation(Struct, kw_only=True, omit_defaults=True):
    """One request of one client, from its invocation to its answer. Times are seconds of one clock, from any zero.

    Invariants: `returned` is None exactly while the outcome is not known yet or is open; `invoked <= returned`.
    """

    client: str
    kind: Kind
    key: str
    namespace: str = DEFAULT_NAMESPACE
    node: str = ""
    """The address that it was sent to."""
    value: Any = None
    """Of a put: what it writes, unlike any other put's; of a get: what it read, None when there was nothing."""
    invoked: float
    returned: float | None = None
    outcome: Outcome = "open"
    """`ok`: answered with success. `open`: a write that may have happened, or may happen at any later time; a read
    without an answer. `failed`: it was answered that it surely was not executed."""
    code: str = ""
    """The error's code, or the name of the exception, of what is not `ok`."""
    commit_id: int | None = None
    """Of a write that is `ok`: its position; of a get: the commit_id that the answer shows."""
    modified: int | None = None
    """Of a get that found something: the commit_id of the put that wrote it."""
    version: int | None = None
    replaced: int | None = None
    """Of a write that is `ok`: the commit_id of the value before it; None when there was none."""
    is_local: bool = False
    """A get that did not ask for the newest value: it may be old, but never of a state that was not."""


class History:
    """Operations in the order in which they were invoked. Threads may share one."""

    def __init__(self, operations: Iterable[Operation] = ()) -> None:
        self.operations = list(operations)
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Operation]:
        return iter(self.operations)

    def __len__(self) -> int:
        return len(self.operations)

    def add(self, operation: Operation) -> Operation:
        """Note an operation at its invocation; its outcome is filled in later, in place."""
        with self._lock:
            self.operations.append(operation)
        return operation

    def save(self, file: Path) -> None:
        """As JSON, one operation a line."""
        file.write_bytes(msgspec.json.Encoder().encode_lines(self.operations))

    @classmethod
    def load(cls, file: Path) -> History:
        """What `save` wrote."""
        return cls(msgspec.json.Decoder(Operation).decode_lines(file.read_bytes()))
