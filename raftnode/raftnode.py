"""The node: assembles transport, store and election, and owns their life. Layer 4."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from raftnode import joining
from raftnode.config import DEFAULT_DATA_DIR, DEFAULT_NAMESPACE, canonical_address, from_environment
from raftnode.election import Election
from raftnode.errors import ConfigError, error_for
from raftnode.log import get_logger
from raftnode.mailbox import Letter
from raftnode.store import Store
from raftnode.transport import Transport
from raftnode.version import __version__


class RaftNode(Transport):
    """One member of a cluster, or a cluster of one.

    `serve()` runs it in this thread until a signal or `stop()`; `start()` runs it in a thread of its own, for programs
    that embed it, which then use `put`, `get`, `delete` and `status`, from any thread. A node shares its GIL with the
    program around it: a node that matters is its own process.

        with RaftNode("127.0.0.1:5001", [], 5, data_dir="state") as node:
            node.put("name", "John Doe")
            node.get("name")["value"]
    """

    def __init__(self, my_ip: str, peers: list[str], timeout: int, **kwargs: Any) -> None:
        """Open the store and get ready; nothing is sent or listened to yet.

        `my_ip`: `host:port`, to be known by and to listen on. `peers`: the other members (a list, or one string with
        commas); they count when the store is empty, later starts take the membership from it. `timeout`: seconds that
        a request may take before it is answered with an error.

        Keywords: `data_dir` (default "data"), `store_type` ('database', durable, or 'memory', for trials), `listen`
        (`host:port` to listen on where that is not the address to be known by, as behind NAT or in a container), and
        any field of `config.Settings`, for example `heartbeat_ms=50`. `join`: members of a cluster that goes on already
        (as `peers`); they are asked, here and within `timeout`, to take this node, if its directory is empty.

        Raises ConfigError or a StoreError, each saying what to do; with `join` a RequestError, when it was not taken.
        """
        store_type = kwargs.pop("store_type", "database")
        data_dir = kwargs.pop("data_dir", DEFAULT_DATA_DIR)
        listen = kwargs.pop("listen", None)
        join = kwargs.pop("join", None)
        if timeout < 1:
            raise ConfigError(f"timeout is {timeout}: it must be at least 1 second")
        settings = from_environment(**{"request_timeout_ms": timeout * 1000, **kwargs})
        mailbox: queue.Queue[list[Letter]] = queue.Queue(settings.mailbox_batches)
        super().__init__(my_ip, timeout, mailbox)
        if listen is not None:
            self.listen = canonical_address(listen)
        self.peers = _others(self.my_ip, peers)
        helpers = _others(self.my_ip, join or [])
        if join and not helpers:
            raise ConfigError(f"join: {self.my_ip} can't join itself; give the address of a member")
        self.store = Store(store_type, Path(data_dir), settings=settings)
        try:
            if helpers:
                joining.join(self.store, self, helpers)
            self._warn_of_other_peers()
            self.election = Election(self, self.store, mailbox)
        except BaseException:
            self.store.close()
            raise
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def _warn_of_other_peers(self) -> None:
        """A store that has members keeps them, whatever it is started with: say so when that differs."""
        if self.store.cluster_id is None or not self.peers:
            return
        members = set(self.store.journal.membership.addresses)
        if members != {self.my_ip, *self.peers}:
            get_logger("node", node=self.my_ip).warning(
                "peers_ignored", given=self.peers, members=sorted(members), why="the membership is in the store"
            )

    def serve(self) -> None:
        """Run until `stop()`, SIGTERM or SIGINT, then finish what is under way and close the store. Raises ConfigError
        when the address can't be listened on, StoreFailed or StoreDamaged when the node had to stop."""
        log = get_logger("node", node=self.my_ip)
        try:
            log.info("starting", **self._facts())
            self.election.init_timeout()
            super().serve()
            self.election.close()
            log.info("stopped", commit_id=self.store.commit_id)
        except ConfigError:
            raise  # it never ran; whoever started it is told
        except Exception as error:
            log.error("ended", why=str(error) or type(error).__name__)
            raise
        finally:
            self.store.close()

    def _facts(self) -> dict[str, Any]:
        """What a log should begin with."""
        store = self.store
        return {
            "version": __version__,
            "id": store.node_id,
            "cluster": store.cluster_id,
            "members": list(store.journal.membership.addresses),
            "data_dir": str(store.data_dir) if store.is_durable else "(memory)",
            "term": store.ballot.term,
            "commit_id": store.commit_id,
            "staged": store.journal.last.id.commit_id - store.commit_id,
        }

    def start(self) -> Self:
        """Run in a thread of its own; returns once it listens. Raises what `serve` raises."""
        if self._thread is not None:
            raise ConfigError("this node has been started already; make a new RaftNode")
        self._thread = threading.Thread(target=self._serve_in_thread, name=f"raftnode {self.my_ip}", daemon=True)
        self._thread.start()
        while not self._serving.wait(0.05):
            if self._error is not None or not self._thread.is_alive():
                self.join()
                break
        return self

    def _serve_in_thread(self) -> None:
        try:
            self.serve()
        except BaseException as error:
            self._error = error

    def join(self, timeout: float | None = None) -> None:
        """Wait for a started node to end, at most `timeout` seconds; raises what ended it, unless that was `stop()`."""
        if self._thread is not None:
            self._thread.join(timeout)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stop cleanly and wait for the end; a node that was never started only closes its store."""
        super().close()
        if self._thread is None:
            if not self.is_serving:
                self.store.close()
        else:
            self.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- for programs that embed a node ---

    def put(self, key: str, value: Any, namespace: str = DEFAULT_NAMESPACE) -> dict[str, Any]:
        """Write any JSON value; returns `commit_id`, `version` and `replaced` once it is committed. Raises BadRequest,
        Unavailable (not executed) or NotCommitted (outcome open)."""
        return self._checked({"type": "put", "key": key, "value": value, "namespace": namespace})

    def get(self, key: str, namespace: str = DEFAULT_NAMESPACE, *, consistency: str = "linearizable") -> dict[str, Any]:
        """A dict with `value` (None when there is none), `created`, `modified`, `version`. Raises RequestError."""
        return self.election.handle_get({"key": key, "namespace": namespace, "consistency": consistency})

    def delete(self, key: str, namespace: str = DEFAULT_NAMESPACE) -> dict[str, Any]:
        """Delete; returns `commit_id` and `replaced` (None when there was nothing). Raises as `put` does."""
        return self._checked({"type": "delete", "key": key, "namespace": namespace})

    def status(self) -> dict[str, Any]:
        """What this node knows of itself and the cluster."""
        data: dict[str, Any] = self._checked({"type": "status"})["data"]
        return data

    def _checked(self, message: dict[str, Any]) -> dict[str, Any]:
        answer = self.election.request(message)
        if detail := answer.get("error"):
            raise error_for(detail["code"], detail["message"])
        return answer


Node = RaftNode


def _others(me: str, peers: list[str] | str) -> list[str]:
    """The other members' addresses in their one spelling, sorted. Raises ConfigError."""
    given = peers.split(",") if isinstance(peers, str) else peers
    return sorted({canonical_address(peer) for peer in given if peer.strip()} - {me})
