"""A primary with followers, without elections: replication for a leader that is *given*. Layer 2, part of the store.

The caller of `Store.put` leads, in its own thread, and vouches that nobody else does in that term. Everything else is
as in a node: the same journal and conflict rule, the same `Raft` on the follower's side, the same transaction, the same
`data` messages; a follower can't tell the difference.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from raftnode.config import Settings
from raftnode.consensus.raft import Raft
from raftnode.errors import ProtocolError
from raftnode.messages import (
    Data,
    DataAnswer,
    Delete,
    DeleteCommand,
    Put,
    PutCommand,
    check_value,
    data_object,
    decode_answer,
    decode_command,
    decode_object,
    encode,
    encode_command,
    encode_object,
    store_key,
    to_request,
)

if TYPE_CHECKING:
    from raftnode.store import Store


class PrimaryTransport(Protocol):
    """What a primary needs of a transport."""

    my_ip: str
    peers: list[str]

    def send_data(self, peer: str | None = None, message: dict[str, Any] | None = None) -> Any: ...
    def identify(self, cluster: str, node: str) -> None: ...


def put(store: Store, term: int, payload: dict[str, Any], transport: PrimaryTransport, majority: int) -> bool:
    """See `Store.put`."""
    command = _command_of({"type": "put", **payload}, store.settings)
    me, ballot = transport.my_ip, store.ballot
    if term < ballot.term or (term == ballot.term and not ballot.may_vote_for(me)):
        raise ProtocolError("no_leader", f"term {term} is over, or led by another: this store is at {ballot}")
    if store.cluster_id is None:
        store.found(me, transport.peers)
    transport.identify(str(store.cluster_id), store.node_id)
    previous = store.journal.last.id
    if term > ballot.term:
        ballot = ballot.in_term(term)
    entry = store.journal.append(term, int(time.time() * 1000), encode_command(command))
    store.write(ballot.vote(me))

    confirmations = [me]
    staged = Data(action="log", term=term, leader=me, previous=previous, entries=[entry], commit_id=store.commit_id)
    store.send_data(data_object(staged), transport, confirmations)
    if len(confirmations) < majority:
        return False
    store.commit(command.namespace, isinstance(command, DeleteCommand), commit_id=entry.commit_id)
    done = Data(action="commit", term=term, leader=me, previous=entry.id, commit_id=entry.commit_id)
    store.send_data(data_object(done), transport)
    return True


def feed(store: Store, peer: str, message: dict[str, Any], transport: PrimaryTransport) -> bool:
    """Send, and on a refusal go back to where the logs part, as a leader does. True once the peer confirms. Every
    answer must bring it nearer, so whatever the peer says, this ends."""
    wanted = _data_of(message)
    target = wanted.entries[-1].commit_id if wanted.entries else wanted.previous.commit_id
    start, sent = wanted.previous.commit_id, target
    goes_back = True
    while (reply := transport.send_data(peer, message)) is not None:
        answer = _answer_of(reply)
        if answer is None or answer.term != wanted.term:
            return False
        if answer.data:
            if answer.match >= target:
                return True
            if answer.match != sent or sent == start:
                return False
            start, goes_back = sent, False
        else:
            found = store.journal.find(answer.last, at_least=answer.commit_id)
            if answer.reason != "gap" or not goes_back or found >= start:
                return False
            start = found
        part = _part(store, wanted, start, target)
        sent = part.entries[-1].commit_id
        message = data_object(part)
    return False


def _part(store: Store, wanted: Data, start: int, target: int) -> Data:
    """As much of what follows `start`, up to `target`, as goes into one message."""
    last = min(target, start + store.settings.batch_entries)
    entries = store.journal.entries(start + 1, last, store.settings.batch_bytes)
    return msgspec.structs.replace(wanted, previous=store.journal.id_at(start), entries=entries, action="log")


def commit(store: Store, namespace: str, delete: bool, commit_id: int | None, key: str | None) -> int:
    """See `Store.commit`."""
    upto = store.journal.last.id.commit_id if commit_id is None else commit_id
    if not store.commit_id < upto <= store.journal.last.id.commit_id:
        raise ProtocolError("bad_request", f"nothing is staged at {upto}: committed is {store.commit_id}")
    command = decode_command(store.journal.entries(upto, upto, 0)[0].command)
    if (
        not isinstance(command, DeleteCommand if delete else PutCommand)
        or command.namespace != namespace
        or (key is not None and command.key != key)
    ):
        raise ProtocolError("bad_request", f"entry {upto} is not what was asked to commit in {namespace!r}")
    while store.commit_id < upto:
        store.apply(store.journal.entries(store.commit_id + 1, upto, store.settings.batch_bytes))
    store.write()
    _forget(store)
    return store.commit_id


def follow(store: Store, message: dict[str, Any]) -> dict[str, Any]:
    """See `Store.action_handler`."""
    data = _data_of(message)
    if store.cluster_id is None:
        raise ProtocolError("wrong_cluster", "this store belongs to no cluster yet: call found() first")
    me, no_chance = str(store.address), random.Random(0)
    follower = Raft(me, store.journal, store.ballot, store.commit_id, no_chance, store.settings, time.monotonic())
    follower.step(None, data)
    ready = follower.ready()
    store.apply(ready.committed)
    while follower.applied < follower.commit_id:
        store.apply(follower.ready().committed)
    store.write(ready.ballot)
    _forget(store)
    _, answer = (*ready.answers, *ready.promises)[0]
    return decode_object(encode(answer))


def _forget(store: Store) -> None:
    """Keep the part of the log that is in memory within its limits."""
    store.journal.forget(store.commit_id, store.settings.kept_entries, store.settings.kept_bytes)


def _command_of(payload: dict[str, Any], settings: Settings) -> PutCommand | DeleteCommand:
    """The command of a put or delete given as a dict, checked as one from the wire. Raises ProtocolError."""
    match to_request(payload):
        case Put() as put:
            check_value(put.value, settings)
            store_key(put.namespace, put.key)
            return PutCommand(namespace=put.namespace, key=put.key, value=put.value, client=put.client)
        case Delete() as delete:
            store_key(delete.namespace, delete.key)
            return DeleteCommand(namespace=delete.namespace, key=delete.key, client=delete.client)
        case other:
            raise ProtocolError("bad_request", f"a {other.name} writes nothing")


def _answer_of(reply: dict[str, Any]) -> DataAnswer | None:
    """A peer's answer; None for what is none: it confirms nothing."""
    try:
        answer = decode_answer(encode_object(reply))
    except ProtocolError:
        return None
    return answer if isinstance(answer, DataAnswer) else None


def _data_of(message: dict[str, Any]) -> Data:
    data = to_request({"type": "data", **message})
    if not isinstance(data, Data):
        raise ProtocolError("bad_request", f"expected a data message, got {data.name}")
    return data
