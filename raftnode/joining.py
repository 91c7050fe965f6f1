"""How a node becomes a member of a cluster that goes on already: it asks a member to be taken. Layer 4.

It asks before it has any part in the cluster, with the id that its empty directory has, and is told the cluster's id
and the membership that it is in, which is committed. With these its directory is founded, and from then on it is a
member like any other; the log comes by itself. If it dies in between, the same question gets the same answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from raftnode.consensus.membership import Membership
from raftnode.errors import NotCommitted, RequestError, StoreForeign, Unavailable, error_for
from raftnode.messages import Members
from raftnode.store import Store
from raftnode.transport import Transport

_PAUSE_S: Final = 0.2
_LATER: Final = (
    *("no_leader", "overloaded", "shutting_down", "change_under_way", "not_member", "old_copy"),
    "wrong_node",  # the node at this address may have died a moment ago, with its disk: it counts as answering yet
)
"""Another try, or another member, may work."""


def join(store: Store, transport: Transport, members: Sequence[str]) -> None:
    """Make the node of an empty `store` a member of the cluster of `members`, which are asked in turn; a node that is a
    member already is left as it is.

    Takes at most `transport.timeout` seconds. Raises a RequestError when it was refused, or nobody took it by then, and
    StoreForeign when the store holds data of another cluster.
    """
    if store.cluster_id is not None:
        _check_cluster(store, transport, members)
        return
    answer = _ask(store, transport, members)
    membership = msgspec.convert(answer["membership"], Members)
    facts = msgspec.structs.asdict(membership)
    store.adopt(transport.my_ip, answer["cluster"], Membership(**facts))


def _ask(store: Store, transport: Transport, members: Sequence[str]) -> dict[str, Any]:
    deadline = time.monotonic() + transport.timeout
    request = {"type": "add_peer", "address": transport.my_ip, "node": store.node_id}
    while True:
        failures: list[RequestError] = []
        for member in members:
            answer = transport.ask_as_client(member, request)
            failure = _failure(member, answer)
            if failure is None:
                assert answer is not None, "no failure: there is an answer"
                return answer
            if failure.code not in _LATER and not isinstance(failure, NotCommitted):
                raise failure  # to an open outcome the same question gets the answer: it is taken, or is taken now
            failures.append(failure)
        if time.monotonic() + _PAUSE_S >= deadline:
            why = "; ".join(str(failure) for failure in failures)
            raise error_for(failures[-1].code, f"no member has taken {transport.my_ip}: {why}")
        time.sleep(_PAUSE_S)


def _failure(member: str, answer: dict[str, Any] | None) -> RequestError | None:
    if answer is None:
        return Unavailable("no_leader", f"{member} can't be reached, or did not answer; is a node running there?")
    if isinstance(detail := answer.get("error"), dict):
        return error_for(str(detail.get("code")), f"{member}: {detail.get('message')}")
    if answer.get("data") is not True or not isinstance(answer.get("membership"), dict):
        return Unavailable("unsupported", f"{member} does not know how to take a member: is it an older version?")
    return None


def _check_cluster(store: Store, transport: Transport, members: Sequence[str]) -> None:
    """A member just starts, whoever else is down: this is the same command as the first time. But what holds data of
    another cluster is not what was meant."""
    for member in members:
        answer = transport.ask_as_client(member, {"type": "status"}) or {}
        cluster = (answer.get("data") or {}).get("cluster")
        if cluster not in (None, store.cluster_id):
            raise StoreForeign(
                f"{store.data_dir} holds data of cluster {store.cluster_id}, but {member} is of cluster {cluster}: to "
                "join that one, begin with an empty directory"
            )
        if cluster is not None:
            return
