"""The client: `Client(nodes).put/get/delete/peers/status/ping`, with fail-over between nodes. Layer 4.

A request goes to the node that served last, over a connection that is kept. What surely was not executed (no connection
could be made; the node said `no_leader`, `overloaded`, `shutting_down`) is tried at the next node until the time is up.
A write whose answer was lost raises NotCommitted and is never sent again by itself: it may have happened.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Final, Self

from raftnode.blocking import ConnectFailed, LineConnection
from raftnode.config import DEFAULT_ADDRESS, DEFAULT_NAMESPACE, Settings, canonical_address
from raftnode.errors import ConfigError, NotCommitted, ProtocolError, RequestError, Unavailable, error_for
from raftnode.messages import decode_object, encode_object

_TRY_AGAIN: Final = ("no_leader", "overloaded", "shutting_down", "not_member", "old_copy")
_PAUSE_S: Final = 0.05
_WRITES: Final = ("put", "delete", "add_peer", "remove_peer", "replace_peer", "transfer_leader")


class Client:
    """A client of a cluster. May be used by several threads; they take turns (make one each for more speed)."""

    def __init__(self, nodes: str | Iterable[str] = DEFAULT_ADDRESS, *, timeout: float = 10.0, name: str = "") -> None:
        """`nodes`: one or more `host:port` (a string may hold several, with commas); one is enough, the others are for
        when it is down. `timeout`: seconds that a call may take in all. `name`: who writes, recorded in the log with
        each write. Connects with the first call. Raises ConfigError."""
        given = nodes.split(",") if isinstance(nodes, str) else list(nodes)
        self.nodes = [canonical_address(node) for node in given if node.strip()]
        if not self.nodes:
            raise ConfigError(f"no node is given; for example Client({DEFAULT_ADDRESS!r})")
        self.timeout = timeout
        self.name = name
        self._limit = Settings().peer_frame_bytes
        self._lock = threading.Lock()
        self._connection: LineConnection | None = None
        self._at = 0

    def put(self, key: str, value: Any, namespace: str = DEFAULT_NAMESPACE) -> dict[str, Any]:
        """Write any JSON value. Returns `commit_id`, `version` and `replaced` (commit_id of the value before, or None)
        once a majority has it on disk. Raises BadRequest, Unavailable, NotCommitted."""
        return self._write({"type": "put", "key": key, "value": value, "namespace": namespace})

    def delete(self, key: str, namespace: str = DEFAULT_NAMESPACE) -> dict[str, Any]:
        """Delete. Returns `commit_id` and `replaced` (None when there was nothing). Raises as `put` does."""
        return self._write({"type": "delete", "key": key, "namespace": namespace})

    def get(self, key: str, namespace: str = DEFAULT_NAMESPACE, default: Any = None) -> Any:
        """The newest committed value; `default` when there is none. Raises BadRequest, Unavailable, NodeDamaged."""
        record = self.get_record(key, namespace)
        return record["value"] if record["version"] else default

    def get_record(
        self, key: str, namespace: str = DEFAULT_NAMESPACE, *, consistency: str = "linearizable"
    ) -> dict[str, Any]:
        """The value with what is known of it: `value`, `created`, `modified` (commit_ids), `version` (0: there is
        none). `consistency="local"` asks the connected node alone: faster, maybe old."""
        request = {"type": "get", "key": key, "namespace": namespace, "consistency": consistency}
        data: dict[str, Any] = self._call(request)["data"]
        return data

    def peers(self) -> dict[str, Any]:
        """`peers` (all members), `leader` (None while there is none), `live` (who answers the asked node), and
        `learners` (those of the members who have no vote yet, if there are any)."""
        answer = self._call({"type": "peers"})
        return {name: answer[name] for name in ("peers", "leader", "live", "learners") if name in answer}

    def add_peer(self, address: str, node: str = "") -> dict[str, Any]:
        """Take the node at `address` as a learner, which becomes a voter by itself; `node` is its id, if that is known.
        Usually a node asks for that itself (`serve --join`). Returns `commit_id`, `cluster` and `membership` once it is
        committed. Raises BadRequest, Unavailable (with `code`, for example `change_under_way`), NotCommitted."""
        return self._change({"type": "add_peer", "address": address, "node": node})

    def remove_peer(self, address: str, *, force: bool = False) -> dict[str, Any]:
        """Take a member out. With `force` also when too few of the others answer to go on. Returns and raises as
        `add_peer` does."""
        return self._change({"type": "remove_peer", "address": address, "force": force})

    def replace_peer(self, old: str, new: str, node: str = "") -> dict[str, Any]:
        """Take the node at `new` as a learner, and `old` out by itself as soon as the new one votes. Returns and raises
        as `add_peer` does, when the first step is committed."""
        return self._change({"type": "replace_peer", "old": old, "new": new, "node": node})

    def transfer_leader(self, to: str = "") -> str:
        """Let the voter `to` lead, or, without, whichever has most of the log. Returns who leads then. Raises
        Unavailable: `no_successor` when nobody could take over, `not_transferred` when it did not in time."""
        return str(self._call({"type": "transfer_leader", "to": to})["leader"])

    def status(self) -> dict[str, Any]:
        """What the asked node knows of itself and the cluster."""
        data: dict[str, Any] = self._call({"type": "status"})["data"]
        return data

    def ping(self) -> float:
        """Seconds that a node took to answer."""
        began = time.monotonic()
        self._call({"type": "ping"})
        return time.monotonic() - began

    def close(self) -> None:
        """Close the connection; the next call opens a new one."""
        with self._lock:
            self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- one call ---

    def _write(self, message: dict[str, Any]) -> dict[str, Any]:
        if self.name:
            message["client"] = self.name
        answer = self._call(message)
        return {name: answer[name] for name in ("commit_id", "version", "replaced") if name in answer}

    def _change(self, message: dict[str, Any]) -> dict[str, Any]:
        answer = self._call(message)
        return {name: answer[name] for name in ("commit_id", "cluster", "membership") if name in answer}

    def _call(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            line = encode_object(message)
        except ProtocolError as error:
            raise error_for(error.code, str(error)) from error
        deadline = time.monotonic() + self.timeout
        with self._lock:
            failure: RequestError = Unavailable("no_leader", "no node was tried")
            for tries in itertools.count(1):
                began = time.monotonic()
                try:
                    return self._try(line, message["type"], deadline)
                except Unavailable as unavailable:
                    failure = unavailable
                # A try that is cut off by the end of the time leaves a write open: do not begin one that must end so.
                needed = time.monotonic() - began if message["type"] in _WRITES else 0.0
                if failure.code not in _TRY_AGAIN or time.monotonic() + _PAUSE_S + needed >= deadline:
                    raise failure
                self._move_on()
                if tries % len(self.nodes) == 0:
                    time.sleep(_PAUSE_S)
        raise AssertionError("the loop ends by return or raise")

    def _try(self, line: bytes, kind: str, deadline: float) -> dict[str, Any]:
        """One request at one node. Raises a RequestError; Unavailable when it surely was not executed."""
        left = max(deadline - time.monotonic(), 0.001)
        if kind not in _WRITES and len(self.nodes) > 1:
            left /= 2  # a read that a node does not answer can still be had from another
        try:
            connection = self._connect(left)
        except ConnectFailed as error:
            raise Unavailable("no_leader", f"no connection to {error}; is a node running there?") from error
        try:
            answer = decode_object(connection.request(line, left))
            _check_answer(kind, answer)
        except (OSError, ProtocolError) as error:
            self._drop()
            lost = f"the answer of {connection.address} was lost ({error})"
            if kind in _WRITES:
                raise NotCommitted("not_committed", f"{lost}; read before you repeat it") from error
            raise Unavailable("no_leader", lost) from error
        except RequestError:
            raise
        except BaseException:
            self._drop()  # interrupted: an answer may still come
            raise
        return answer

    def _connect(self, timeout: float) -> LineConnection:
        """The kept connection, or a new one; one that the node closed meanwhile is not used."""
        if self._connection is not None and self._connection.is_stale():
            self._drop()
        if self._connection is None:
            self._connection = LineConnection(self.nodes[self._at], timeout, self._limit)
        return self._connection

    def _move_on(self) -> None:
        self._drop()
        self._at = (self._at + 1) % len(self.nodes)

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _check_answer(kind: str, answer: dict[str, Any]) -> None:
    """Raise the typed error of a failure, ProtocolError for what is no answer to such a request."""
    detail = answer.get("error")
    if isinstance(detail, dict) and isinstance(detail.get("code"), str):
        raise error_for(detail["code"], str(detail.get("message", "")))
    data = answer.get("data")
    if kind == "get":
        is_answer = isinstance(data, dict) and "value" in data and isinstance(data.get("version"), int)
    elif kind == "status":
        is_answer = isinstance(data, dict)
    else:
        is_answer = data is True
    if answer.get("type") != kind or not is_answer:
        raise ProtocolError("bad_request", f"that is no answer to a {kind}")
