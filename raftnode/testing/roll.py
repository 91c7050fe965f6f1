"""Who the members of a cluster of processes are, by what its nodes have committed; and what became of the changes.

    roll = Roll(cluster)
    roll.ask("remove", {"type": "remove_peer", "address": "127.0.0.1:5002"}, via=cluster[0])
    roll.look()
    roll.members.voters

Whoever asks for a change may get no answer, and then it is open: it may be made at any time until nobody has it any
more. So the roll never believes that a change was made because it was asked for: it asks the nodes.

It also keeps every committed entry that it sees at any of them (`entries`). Logs end, and what was in them is not on
any disk when the run is over; but what a node has once told as committed must never un-happen.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from raftnode.blocking import LineConnection
from raftnode.config import Settings
from raftnode.errors import BadRequest, ProtocolError, Unavailable, error_for
from raftnode.messages import Members, decode_object, encode_object
from raftnode.testing.processes import ClusterOfProcesses, NodeProcess

CHANGE_S: Final = 7.0
"""Who asks for a change waits so long for an answer: more than a node, which answers within its time-out of 5 s."""
OPEN_S: Final = 20.0
"""A request without an answer may still be on its way for so long: at a node that is stopped, and then on a link that
is cut, and then waiting for a leader."""

_ANSWER_S: Final = 0.4
_PORTION: Final = 4000


class Change(Struct, kw_only=True):
    """A change of the members, or of the leader, and what became of it. Times are monotonic seconds."""

    kind: str
    asked: dict[str, Any]
    """The request; of a node that asks by itself to be taken, or whose disk was lost, only what is known of it."""
    via: str = ""
    """The node that was asked."""
    began: float = 0.0
    ended: float | None = None
    outcome: Literal["done", "refused", "open"] = "open"
    code: str = ""
    commit_id: int | None = None

    @property
    def addresses(self) -> set[str]:
        """Who may come or go by it."""
        return {str(self.asked[name]) for name in ("address", "old", "new") if name in self.asked}


class Seen(Struct):
    """A committed membership, and when it was seen first and last at any node: monotonic seconds."""

    first: float
    last: float
    members: Members


class Roll:
    """See the module's text. `look` is called by one thread, `ask` by any."""

    def __init__(self, cluster: ClusterOfProcesses) -> None:
        self._cluster = cluster
        self.statuses: dict[NodeProcess, dict[str, Any]] = {}
        """The answers to the newest `look`."""
        self.answered: set[str] = set()
        """Names of the nodes that have ever answered: with another disk a node has another name."""
        self.seen: list[Seen] = []
        self.changes: list[Change] = []
        self.entries: dict[int, dict[str, Any]] = {}
        self._upto = 0  # of what is kept; older ones that are missing are looked for once
        self._threads: list[threading.Thread] = []
        self._connections: dict[NodeProcess, tuple[int, LineConnection]] = {}

    @property
    def members(self) -> Members:
        """The newest committed membership that was seen."""
        return self.seen[-1].members if self.seen else Members(voters=dict.fromkeys(self._cluster.addresses, ""))

    # --- asking the nodes ---

    def look(self) -> None:
        """Ask every node that runs what it knows, and keep what it has committed."""
        self.statuses = {node: status for node in list(self._cluster) if (status := self._status(node)) is not None}
        for status in self.statuses.values():
            self._note(msgspec.convert(status["membership"], Members))
        self._keep_entries()

    def _status(self, node: NodeProcess) -> dict[str, Any] | None:
        if not node.is_running or node.is_paused:
            return None
        name = node.name  # it may lose its disk meanwhile
        answer = self._request(node, {"type": "status"})
        if answer is None:
            return None
        self.answered.add(name)
        status: dict[str, Any] = answer["data"]
        return status

    def _request(self, node: NodeProcess, message: dict[str, Any]) -> dict[str, Any] | None:
        """Over a connection that is kept, past the proxy; None without an answer."""
        pid, connection = self._connections.get(node, (0, None))
        if connection is not None and (pid != node.pid or connection.is_stale()):
            connection.close()
            connection = None
        try:
            if connection is None:
                connection = LineConnection(node.listen, _ANSWER_S, Settings().peer_frame_bytes)
            self._connections[node] = node.pid, connection
            return decode_object(connection.request(encode_object(message), _ANSWER_S))
        except (OSError, ProtocolError):
            self._connections.pop(node, None)  # a request that fails has closed it
            return None

    def _note(self, members: Members) -> None:
        now = time.monotonic()
        if not self.seen or (members.term, members.commit_id) > (self.members.term, self.members.commit_id):
            self.seen.append(Seen(now, now, members))
        elif members.commit_id == self.members.commit_id:
            self.seen[-1].last = now
            self.seen[-1].members = members  # with node ids that were not known before

    def _keep_entries(self) -> None:
        """What has been committed since the last look, from whoever has most of it."""
        for node, status in sorted(self.statuses.items(), key=lambda item: item[1]["first"]):
            while status["commit_id"] > self._upto:
                first = max(self._upto + 1, status["first"])
                answer = self._request(node, {"type": "entries", "from": first, "to": first + _PORTION})
                entries: list[dict[str, Any]] = (answer or {}).get("entries") or []
                if not entries:
                    break  # it was restarted, or its log begins later by now
                for entry in entries:
                    self.entries.setdefault(entry["commit_id"], _as_line(entry, node.name))
                self._upto = entries[-1]["commit_id"]

    # --- asking for changes ---

    def ask(self, kind: str, message: dict[str, Any], via: NodeProcess) -> Change:
        """Ask for a change, and go on: the outcome is filled in later."""
        change = self.note(kind, {name: fact for name, fact in message.items() if name != "type"}, via.name)
        thread = threading.Thread(target=self._carry_out, args=(change, message, via), daemon=True)
        self._threads.append(thread)
        thread.start()
        return change

    def note(self, kind: str, facts: dict[str, Any], via: str = "") -> Change:
        """A change that comes about without a request of ours. Its outcome is seen in the membership."""
        change = Change(kind=kind, asked=facts, via=via, began=time.monotonic())
        self.changes.append(change)
        return change

    def _carry_out(self, change: Change, message: dict[str, Any], via: NodeProcess) -> None:
        """As a client would, through the proxy."""
        answer: dict[str, Any] = {}
        try:
            with contextlib.closing(LineConnection(via.address, 1.0, Settings().peer_frame_bytes)) as connection:
                answer = decode_object(connection.request(encode_object(message), CHANGE_S))
        except (OSError, ProtocolError) as error:
            change.code = type(error).__name__
        if detail := answer.get("error"):
            change.code = detail["code"]
            is_refused = isinstance(error_for(change.code, ""), Unavailable | BadRequest)
            change.outcome = "refused" if is_refused else "open"
        elif answer:
            change.commit_id, change.outcome = answer.get("commit_id"), "done"
        change.ended = time.monotonic()

    def is_quiet(self, *kinds: str) -> bool:
        """True when no change (of these kinds; default: any that was asked for) can still be on its way to a log."""
        asked = [change for change in self.changes if change.via and (not kinds or change.kind in kinds)]
        now = time.monotonic()
        return all(c.ended is not None and (c.outcome != "open" or now > c.began + OPEN_S) for c in asked)

    def is_idle(self, seconds: float) -> bool:
        """True when nobody waits for an answer, nor has got one within so many seconds."""
        now = time.monotonic()
        return all(c.ended is not None and now > c.ended + seconds for c in self.changes if c.via)

    def end(self) -> None:
        """Every change that was asked for has its outcome."""
        deadline = time.monotonic() + 2 * CHANGE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Nobody looks any more."""
        for _, connection in self._connections.values():
            connection.close()
        self._connections.clear()


def _as_line(entry: dict[str, Any], node: str) -> dict[str, Any]:
    """An entry that a node has told, as `raftnode-inspect log --json --values` would print it."""
    facts = {"record": "entry", "state": "committed", "node": node, "checksum": f"{entry['checksum']:08x}"}
    return {**facts, "commit_id": entry["commit_id"], "term": entry["term"], **entry["command"]}
