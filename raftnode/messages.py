"""The schema: what goes over the wire and into the log, the limits of both, and the codec. Layer 0.

One JSON object a message, UTF-8, ended by a newline (`framing` cuts the stream). `decode_request` and `decode_answer`
return a valid typed message or raise one ProtocolError, nothing between. Fields that a message does not know are
ignored, so that newer clients can speak to older nodes.

Three families:

* requests of clients: `put get delete peers status ping entries backup add_peer remove_peer`;
* requests of members to each other: `hello` first, then `vote_request heartbeat data snapshot`;
* answers, which carry the `type` of their request. A failure has `"data": false` (null for a read) and an
  `error` with one of `CODES`.

A *command* is what an entry of the log makes every node do; its JSON is stored and sent as it is, never re-encoded,
so its bytes and with them the rolling checksum are the same on every node.
"""

from __future__ import annotations

import gc
import itertools
import math
import re
import struct
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType
from zlib_ng.zlib_ng import crc32

from raftnode.config import DEFAULT_NAMESPACE, Settings
from raftnode.errors import ProtocolError

PROTOCOL_VERSION: Final = 1
"""Raised when members of different versions could misunderstand each other."""

LMDB_KEY_BYTES: Final = 511
NAMESPACE_CHARACTERS: Final = 64

CODES: Final = {
    # not executed, and useless to repeat
    "bad_request": "not JSON, not an object, or a field is missing or of the wrong type",
    "unknown_type": "no message has this type",
    "too_large": "the message is longer than a node takes",
    "key_too_long": "namespace and key together are longer than the store takes",
    "unsupported": "this version does not offer it",
    # not executed; may work later, or elsewhere
    "no_leader": "no leader is known, or it could not be reached or confirmed in time",
    "overloaded": "a limit of the node is reached",
    "storage_full": "disk or map have no room left for writes",
    "shutting_down": "the node is stopping",
    # open
    "not_committed": "appended, but not known to be committed: it may still happen",
    # the node's own trouble
    "damaged": "a stored record does not match its checksum",
    "internal": "a defect of the node; its log tells more",
    # changes of the members: not executed
    "change_under_way": "the change of the members before this one is not finished",
    "no_live_majority": "too few of the voters that would be left answer",
    "last_voter": "a cluster has at least one voter",
    "no_such_member": "no member has this address",
    "not_voter": "a learner can't lead",
    "no_successor": "nobody who could take over answers",
    "not_transferred": "the new leader did not take over in time; the old one goes on",
    # between members
    "wrong_cluster": "the other node belongs to another cluster",
    "wrong_node": "the address is known with another node id",
    "wrong_protocol": "the other node speaks another version",
    "not_member": "the node is not in the membership, or not any more",
    "old_copy": "the node has forgotten what it promised: its data directory is an older copy",
}
"""Every code that an answer can carry. The words are a published interface."""

Id: TypeAlias = int | str | UnsetType
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""A term, a commit_id, a time or a size: what fits the store's 8 bytes."""
Crc: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]


Name: TypeAlias = Annotated[str, msgspec.Meta(max_length=255)]
"""An address, an id or a name that others choose."""


class EntryId(Struct, frozen=True, order=True, gc=False):
    """Where an entry stands and who put it there: ordered by term, then position, so that "at least as up to
    date" (thesis 3.6.1) is a plain `>=`.

    Two logs that hold the same EntryId hold the same entries up to it (Log Matching, thesis 3.5).
    """

    term: Count
    commit_id: Count


GENESIS: Final = EntryId(0, 0)
"""The id before the first entry."""


class Entry(Struct, frozen=True, gc=False):  # no part of any cycle: the collector need not look at thousands of them
    """One entry of the log, as members send it. `checksum` is rolling: `chain(previous.checksum, ...)`."""

    term: Count
    commit_id: Count
    time: Count
    """The leader's wall clock when it appended the entry, in ms since 1970. Told to people, used by no rule."""
    checksum: Crc
    command: Raw

    @property
    def id(self) -> EntryId:
        return EntryId(self.term, self.commit_id)

    @property
    def size(self) -> int:
        """Bytes of the command."""
        return len(self.command)


_chained = struct.Struct(">QQQ").pack


def chain(previous: int, term: int, commit_id: int, time: int, command: bytes | Raw) -> int:
    """The rolling CRC-32 of an entry, seeded with the checksum of the entry before it.

    Equal checksums at one commit_id on two nodes mean equal histories up to there.
    """
    return crc32(command, crc32(_chained(term, commit_id, time), previous))


# --- commands: what the log holds -----------------------------------------------------------------------------


class Command(Struct, tag_field="kind", omit_defaults=True):
    """What an entry makes every node do. Applied in the order of the log, with nothing but the log as input."""


class Noop(Command, tag="noop"):
    """A new leader's first entry: commits what older terms left (thesis 3.6.2, 6.4)."""


class PutCommand(Command, tag="put"):
    namespace: str
    key: str
    value: Raw
    client: str = ""
    """Who asked: the name that the client gave, else its address."""


class DeleteCommand(Command, tag="delete"):
    namespace: str
    key: str
    client: str = ""


class MembersCommand(Command, tag="members"):
    """A membership, in force from the moment it is appended (thesis 4.1). Values are node ids, "" while unknown."""

    voters: dict[str, str]
    learners: dict[str, str] = {}
    replaces: dict[str, str] = {}
    """New member -> the one whose place it takes. That one leaves as soon as the new one votes, whoever leads then."""


AnyCommand: TypeAlias = Noop | PutCommand | DeleteCommand | MembersCommand

_decode_command: Callable[[bytes | Raw], AnyCommand] = msgspec.json.Decoder(AnyCommand).decode
_encoder = msgspec.json.Encoder()
_encode, _encode_lines = _encoder.encode, _encoder.encode_lines


class Change(Struct, frozen=True, gc=False):
    """What a put or a delete does: from now on `value` stands under this store key, or nothing (None)."""

    key: bytes
    value: Raw | None


Effect: TypeAlias = Change | MembersCommand | Noop
"""What an entry does when it is carried out: only a `Change` touches the namespaces."""


def effect_of(command: AnyCommand, made: bytes = b"") -> Effect:
    """What a command does. `made`: the store key of what it changes, if that was made before. Raises ProtocolError for
    a command that no node could carry out."""
    if isinstance(command, PutCommand):
        return Change(made or store_key(command.namespace, command.key), command.value)
    if isinstance(command, DeleteCommand):
        return Change(made or store_key(command.namespace, command.key), None)
    if isinstance(command, MembersCommand) and (not command.voters or command.voters.keys() & command.learners.keys()):
        raise ProtocolError("bad_request", "a membership without voters, or with one who is a learner too")
    return command


def decode_effect(command: bytes | Raw) -> Effect:
    """What the command of an entry does. Raises ProtocolError for one that this node could not carry out: it must not
    be acknowledged."""
    return effect_of(decode_command(command))


def decode_command(command: bytes | Raw) -> AnyCommand:
    """The command of an entry. Raises ProtocolError: an entry that no version of ours wrote."""
    try:
        return _decode_command(command)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("bad_request", f"log entry that this version does not understand: {error}") from error


def encode_command(command: AnyCommand) -> Raw:
    """The one JSON form of a command."""
    return Raw(_encode(command))


# --- requests of clients --------------------------------------------------------------------------------------


class Request(Struct, tag_field="type", omit_defaults=True, kw_only=True):
    """Any message that asks for an answer. With an `id`, requests of one connection may overlap."""

    name: ClassVar[str]
    id: Id = UNSET


class ClientRequest(Request, kw_only=True):
    forwarded: bool = False
    """Passed on by a member that is not the leader: whoever gets it answers, and never passes it on again."""
    client: Name = ""


class Put(ClientRequest, tag="put", kw_only=True):
    name: ClassVar[str] = "put"
    key: str
    value: Raw
    namespace: str = DEFAULT_NAMESPACE


class Delete(ClientRequest, tag="delete", kw_only=True):
    name: ClassVar[str] = "delete"
    key: str
    namespace: str = DEFAULT_NAMESPACE


class Get(ClientRequest, tag="get", kw_only=True):
    name: ClassVar[str] = "get"
    key: str
    namespace: str = DEFAULT_NAMESPACE
    consistency: Literal["linearizable", "local"] = "linearizable"


class Peers(Request, tag="peers", kw_only=True):
    name: ClassVar[str] = "peers"


class Status(Request, tag="status", kw_only=True):
    name: ClassVar[str] = "status"


class Ping(Request, tag="ping", kw_only=True):
    name: ClassVar[str] = "ping"


class Entries(Request, tag="entries", kw_only=True):
    """For the repair of a member's log: the committed entries from `first` to `last`, which is `from` to `to`."""

    name: ClassVar[str] = "entries"
    first: Count = msgspec.field(name="from")
    last: Count = msgspec.field(name="to")


class Backup(Request, tag="backup", kw_only=True):
    """The next chunk of the whole state."""

    name: ClassVar[str] = "backup"
    transfer: Count = 0
    """The number that the first answer gives; 0 to begin."""
    seq: Count = 1
    """Of the chunk that is wanted: 1, then one after the other."""
    at_least: Count = 0
    """Wait until the node has applied this commit_id."""


class AddPeer(ClientRequest, tag="add_peer", kw_only=True):
    """Take a node as a learner, which becomes a voter by itself. A node that asks for itself says which one it is."""

    name: ClassVar[str] = "add_peer"
    address: Name
    node: Name = ""
    """Its node id; "" when that is not known: then it is the first one that comes with this address."""
    cluster: Name = ""
    """The cluster that it holds data of; "" for none."""


class RemovePeer(ClientRequest, tag="remove_peer", kw_only=True):
    name: ClassVar[str] = "remove_peer"
    address: Name
    force: bool = False
    """Also when the voters that are left and answer are no majority."""


class ReplacePeer(ClientRequest, tag="replace_peer", kw_only=True):
    """Take `new` as a learner, and take `old` out as soon as that one is a voter."""

    name: ClassVar[str] = "replace_peer"
    old: Name
    new: Name
    node: Name = ""
    """The node id of `new`, as in `add_peer`."""


class TransferLeader(ClientRequest, tag="transfer_leader", kw_only=True):
    """Let `to` lead, or, when that is "", the voter that has most of the log."""

    name: ClassVar[str] = "transfer_leader"
    to: Name = ""


ChangeRequest: TypeAlias = AddPeer | RemovePeer | ReplacePeer | TransferLeader


# --- requests of members --------------------------------------------------------------------------------------


class Reminder(Struct, kw_only=True):
    """What the sender remembers of whom it greets; who does not keep that has an old copy of its directory (see
    `consensus.witness`)."""

    node: Name
    """The node that is meant: another one at its address has promised nothing of this."""
    term: Count = 0
    """It has spoken in this term."""
    held: EntryId = GENESIS
    """It has acknowledged this entry in that term."""
    floor: EntryId = GENESIS
    """It holds this entry, which is committed."""
    vote: Name = ""
    """It has voted for this member in that term; "" when that is not known."""


class Hello(Request, tag="hello", kw_only=True):
    """The first message of every link between members (rule 9)."""

    name: ClassVar[str] = "hello"
    cluster: Name
    node: Name
    address: Name
    protocol: Count = PROTOCOL_VERSION
    link: bool = True
    """This is the member's one link, in place of an older one; false for a single request from another thread."""
    reminder: Reminder | UnsetType = UNSET
    membership: EntryId = GENESIS
    """The entry with the newest membership that the sender has."""


class Staged(Struct, kw_only=True):
    """Who asks for a vote, and its newest log entry, staged or committed."""

    address: Name
    term: Count
    commit_id: Count

    @property
    def last(self) -> EntryId:
        return EntryId(self.term, self.commit_id)


class VoteRequest(Request, tag="vote_request", kw_only=True):
    name: ClassVar[str] = "vote_request"
    term: Count
    commit_id: Count
    """What the candidate knows as committed. For people: the rule looks at `staged` alone."""
    staged: Staged
    pre_vote: bool = False
    transfer: bool = False
    """The leader has asked for this campaign: voters that hear it still need not keep to it."""


class Heartbeat(Request, tag="heartbeat", kw_only=True):
    name: ClassVar[str] = "heartbeat"
    term: Count
    leader: Name
    commit_id: Count
    round: Count = 0
    """The leader's read round (rule 7): an answer with this number came after the round began."""


class Data(Request, tag="data", kw_only=True):
    """`log`: stage these entries after `previous`. `commit`: everything up to `commit_id` is committed."""

    name: ClassVar[str] = "data"
    action: Literal["log", "commit"]
    term: Count
    leader: Name
    previous: EntryId
    entries: list[Entry] = []
    commit_id: Count = 0


class TimeoutNow(Request, tag="timeout_now", kw_only=True):
    """The leader asks its follower to campaign at once, and so to take over (thesis 3.10)."""

    name: ClassVar[str] = "timeout_now"
    term: Count
    leader: Name


class SnapshotRecord(Struct, array_like=True, frozen=True):
    """A committed value, as the sender has it stored."""

    namespace: str
    key: str
    created: Count
    modified: Count
    version: Count
    lease: Count
    checksum: Crc
    """Of the record on disk: over the key, the numbers and the value."""
    value: Raw


class SnapshotEnd(Struct, kw_only=True):
    """Of the last chunk: what the state is with it."""

    id: EntryId
    """The state is that of exactly this committed entry."""
    checksum: Crc
    """The rolling checksum of that entry: the log goes on from there."""
    keys: Count
    """How many values there are."""
    membership: Raw
    """The newest committed one as of that entry, as JSON."""


class Snapshot(Request, tag="snapshot", kw_only=True):
    """One chunk of the whole state, for a member that lacks entries which the leader no longer has (thesis 5.3)."""

    name: ClassVar[str] = "snapshot"
    term: Count
    leader: Name
    transfer: Count
    """Numbers the leader's transfers in this term: a newer one takes the place of an older."""
    seq: Count
    """Numbers the chunks from 1; each is sent when the one before was taken."""
    records: list[SnapshotRecord] = []
    gone: list[tuple[str, str]] = []
    """(namespace, key) of values that were sent before, perhaps among these `records`, and are no more."""
    end: SnapshotEnd | UnsetType = UNSET


PeerRequest: TypeAlias = VoteRequest | Heartbeat | Data | TimeoutNow | Snapshot
AnyRequest: TypeAlias = (
    Put | Get | Delete | Peers | Status | Ping | Entries | Backup | ChangeRequest
    | Hello | VoteRequest | Heartbeat | Data | TimeoutNow | Snapshot
)  # fmt: skip
REQUEST_TYPES: Final = tuple(
    t.name
    for t in (Put, Get, Delete, Peers, Status, Ping, Entries, Backup, AddPeer, RemovePeer, ReplacePeer, TransferLeader)
)
PEER_TYPES: Final = tuple(t.name for t in (Hello, VoteRequest, Heartbeat, Data, TimeoutNow, Snapshot))


# --- answers --------------------------------------------------------------------------------------------------


class ErrorDetail(Struct):
    code: str
    message: str


class Answer(Struct, tag_field="type", kw_only=True):
    """`id` and `error` are there only when the request had an id, or failed."""

    id: Id = UNSET
    error: ErrorDetail | UnsetType = UNSET


class WriteAnswer(Answer, kw_only=True):
    data: bool
    commit_id: int | UnsetType = UNSET
    version: int | UnsetType = UNSET
    """Puts since the key was last created; 1 for the first. A delete has none."""
    replaced: int | UnsetType | None = UNSET
    """commit_id of the value before, None when there was none."""


class PutAnswer(WriteAnswer, tag="put", kw_only=True):
    pass


class DeleteAnswer(WriteAnswer, tag="delete", kw_only=True):
    pass


class Found(Struct, kw_only=True):
    """What a read found. A key that is not there has `value` null and `version` 0."""

    key: str
    namespace: str
    value: Raw = Raw(b"null")
    created: int | None = None
    modified: int | None = None
    version: int = 0


class GetAnswer(Answer, tag="get", kw_only=True):
    data: Found | None = None
    commit_id: int | UnsetType = UNSET
    """The state that was read includes everything up to here, and nothing later."""
    consistency: str | UnsetType = UNSET
    """There when the read was only local."""


class PeersAnswer(Answer, tag="peers", kw_only=True):
    data: bool = True
    peers: list[str] = []
    leader: str | None = None
    live: list[str] = []
    """Members that answer this node now. Says nothing of the membership."""
    learners: list[str] | UnsetType = UNSET
    """Those of the members who have no vote, if there are any."""


class StatusAnswer(Answer, tag="status", kw_only=True):
    data: dict[str, Any] | None = None


class PingAnswer(Answer, tag="ping", kw_only=True):
    data: bool = True
    node: str = ""


class EntriesAnswer(Answer, tag="entries", kw_only=True):
    data: bool = True
    entries: list[Entry] = []
    """As many of those asked for as are committed and go into one message, from the first on; may be none."""
    commit_id: Count = 0
    """What the node knows as committed."""


class BackupAnswer(Answer, tag="backup", kw_only=True):
    """A chunk of the state. Later values take the place of earlier ones; with the `end`, all is as of its commit_id."""

    data: bool = True
    cluster: str = ""
    node: str = ""
    transfer: Count = 0
    seq: Count = 0
    keys: Count = 0
    """How many values the node has now: for a progress bar."""
    records: list[SnapshotRecord] = []
    gone: list[tuple[str, str]] = []
    end: SnapshotEnd | UnsetType = UNSET


class Members(Struct, omit_defaults=True, kw_only=True):
    """A membership, as answers tell it: see `MembersCommand`."""

    term: int = 0
    commit_id: int = 0
    """The entry that made it so."""
    voters: dict[str, str]
    learners: dict[str, str] = {}
    replaces: dict[str, str] = {}


class ChangeAnswer(Answer, kw_only=True):
    """True: the change is committed."""

    data: bool
    commit_id: int | UnsetType = UNSET
    """The entry that made it; that of the present membership when nothing had to be changed."""
    cluster: str | UnsetType = UNSET
    membership: Members | UnsetType = UNSET


class AddPeerAnswer(ChangeAnswer, tag="add_peer", kw_only=True):
    pass


class RemovePeerAnswer(ChangeAnswer, tag="remove_peer", kw_only=True):
    pass


class ReplacePeerAnswer(ChangeAnswer, tag="replace_peer", kw_only=True):
    pass


class TransferLeaderAnswer(Answer, tag="transfer_leader", kw_only=True):
    data: bool
    leader: str | UnsetType = UNSET
    """Who leads now."""


class HelloAnswer(Answer, tag="hello", kw_only=True):
    data: bool = True
    cluster: str = ""
    node: str = ""
    address: str = ""
    reminder: Reminder | UnsetType = UNSET
    membership: EntryId = GENESIS
    """The entry with the newest membership that this node has; in a refusal, the one that the refusal rests on."""
    known_as: str = ""
    """In a refusal as `wrong_node`: the node that is the member at this address."""


class VoteAnswer(Answer, tag="vote_request", kw_only=True):
    data: bool
    """True: granted."""
    term: Count
    """A granted pre-vote carries the term that was asked for, all else the voter's own (TRAPS 13)."""
    pre_vote: bool = False


class HeartbeatAnswer(Answer, tag="heartbeat", kw_only=True):
    data: bool = True
    term: Count
    commit_id: Count
    round: Count = 0


Reason: TypeAlias = Literal["", "gap", "stale_term", "two_leaders", "checksum", "unknown_command", "storage_full"]


class DataAnswer(Answer, tag="data", kw_only=True):
    """True: this log holds the leader's entries up to `match`, durably. False: see `reason` and the hint."""

    data: bool
    term: Count
    commit_id: Count = 0
    match: Count = 0
    asked: Count = 0
    """On a refusal: the position before the refused entries."""
    last: EntryId = GENESIS
    """On a refusal: the newest entry at or before `asked` whose term could still match. A hint only (TRAPS 12)."""
    reason: Reason = ""


class TimeoutNowAnswer(Answer, tag="timeout_now", kw_only=True):
    """True: it campaigns, in `term`."""

    data: bool
    term: Count


SnapshotReason: TypeAlias = Literal["", "stale_term", "two_leaders", "restart", "busy", "storage_full", "checksum"]


class SnapshotAnswer(Answer, tag="snapshot", kw_only=True):
    """True: this chunk, and all before it, are on disk. False: see `reason`."""

    data: bool
    term: Count
    transfer: Count = 0
    """Of the chunk that is answered."""
    seq: Count = 0
    """Of the chunk that is answered, too."""
    match: Count = 0
    """Not 0: the state is installed, or was not needed; the log goes on from this entry, durably."""
    reason: SnapshotReason = ""


class Refusal(Answer, tag="error", kw_only=True):
    """The answer to a message whose type could not be made out."""

    data: bool = False


PeerAnswer: TypeAlias = VoteAnswer | HeartbeatAnswer | DataAnswer | TimeoutNowAnswer | SnapshotAnswer
AnyAnswer: TypeAlias = (
    PutAnswer | DeleteAnswer | GetAnswer | PeersAnswer | StatusAnswer | PingAnswer | EntriesAnswer | BackupAnswer
    | AddPeerAnswer | RemovePeerAnswer | ReplacePeerAnswer | TransferLeaderAnswer | HelloAnswer | VoteAnswer
    | HeartbeatAnswer | DataAnswer | TimeoutNowAnswer | SnapshotAnswer | Refusal
)  # fmt: skip


def failure(kind: str, code: str, message: str, id: Id = UNSET) -> Answer:
    """The answer of type `kind` that says a request failed. A kind that is none of ours becomes "error"."""
    assert code in CODES, f"{code} is no published code"
    error = ErrorDetail(code, message)
    match kind:
        case "put":
            return PutAnswer(data=False, error=error, id=id)
        case "delete":
            return DeleteAnswer(data=False, error=error, id=id)
        case "get":
            return GetAnswer(data=None, error=error, id=id)
        case "status":
            return StatusAnswer(data=None, error=error, id=id)
        case "peers":
            return PeersAnswer(data=False, error=error, id=id)
        case "ping":
            return PingAnswer(data=False, error=error, id=id)
        case "entries":
            return EntriesAnswer(data=False, error=error, id=id)
        case "backup":
            return BackupAnswer(data=False, error=error, id=id)
        case "add_peer":
            return AddPeerAnswer(data=False, error=error, id=id)
        case "remove_peer":
            return RemovePeerAnswer(data=False, error=error, id=id)
        case "replace_peer":
            return ReplacePeerAnswer(data=False, error=error, id=id)
        case "transfer_leader":
            return TransferLeaderAnswer(data=False, error=error, id=id)
        case "timeout_now":
            return TimeoutNowAnswer(data=False, term=0, error=error, id=id)
        case "hello":
            return HelloAnswer(data=False, error=error, id=id)
        case "vote_request":
            return VoteAnswer(data=False, term=0, error=error, id=id)
        case "heartbeat":
            return HeartbeatAnswer(data=False, term=0, commit_id=0, error=error, id=id)
        case "data":
            return DataAnswer(data=False, term=0, error=error, id=id)
        case "snapshot":
            return SnapshotAnswer(data=False, term=0, error=error, id=id)
        case _:
            return Refusal(error=error, id=id)


# --- the codec ------------------------------------------------------------------------------------------------

_decode_request: Callable[[bytes | memoryview], AnyRequest] = msgspec.json.Decoder(AnyRequest).decode
_decode_answer: Callable[[bytes | memoryview], AnyAnswer] = msgspec.json.Decoder(AnyAnswer).decode
_parse = msgspec.json.Decoder().decode
_LONG_NUMBER = re.compile(rb"[0-9]{309}")


def _decode_any(text: bytes | memoryview | str) -> Any:
    """Any JSON as Python objects. Millions of them may be made here, none of them in a cycle: the collector, which
    would look at each again and again, waits."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        return _parse(text)
    finally:
        if was_on:
            gc.enable()


class Malformed(ProtocolError):
    """A message that can't be taken, with what could be made out of it: so its answer finds its way."""

    is_object = False
    """True when it is a whole JSON object, though no message."""

    def __init__(self, code: str, message: str, kind: str = "error", id: Id = UNSET) -> None:
        super().__init__(code, message)
        self.kind = kind
        self.id = id

    def answer(self) -> Answer:
        return failure(self.kind, self.code, str(self), self.id)


def decode_request(frame: bytes | memoryview) -> AnyRequest:
    """The request in one frame. Raises Malformed, a ProtocolError, for everything else."""
    try:
        return _decode_request(frame)
    except (ValueError, RecursionError) as error:
        raise _diagnose(frame, error) from error


def decode_answer(frame: bytes | memoryview) -> AnyAnswer:
    """The answer in one frame. Raises ProtocolError for everything else."""
    try:
        return _decode_answer(frame)
    except (ValueError, RecursionError) as error:
        raise _diagnose(frame, error) from error


def encode(message: Struct) -> bytes:
    """One message as one line."""
    return _encode_lines([message])  # a list: of a tuple, msgspec (0.22) does not give back the memory


def decode_object(frame: bytes | memoryview | str) -> dict[str, Any]:
    """A JSON object as a dict, whatever its type. Raises Malformed."""
    try:
        found = _decode_any(frame)
    except (ValueError, RecursionError) as error:
        raise Malformed("bad_request", _in_words(error, frame)) from error
    if not isinstance(found, dict):
        raise Malformed("bad_request", f"expected a JSON object, got {_json_name(found)}")
    return found


def _diagnose(frame: bytes | memoryview, error: Exception) -> Malformed:
    """Why a frame is no message. Slow, as only bad input comes here."""
    id = _readable_id(frame)
    try:
        found = decode_object(frame)
    except Malformed as malformed:
        malformed.id = id
        raise
    why = _why_no_message(found, _in_words(error, frame), id)
    why.is_object = True
    return why


def _why_no_message(found: dict[str, Any], words: str, id: Id) -> Malformed:
    kind = found.get("type")
    if kind is None:
        return Malformed("bad_request", 'the message has no "type"', id=id)
    if not isinstance(kind, str):
        return Malformed("bad_request", f'"type" must be a string, got {_json_name(kind)}', id=id)
    if kind not in REQUEST_TYPES and kind not in PEER_TYPES:
        known = ", ".join(REQUEST_TYPES)
        return Malformed("unknown_type", f"no message has the type {kind[:64]!r}; there are: {known}", id=id)
    return Malformed("bad_request", f"{kind}: {words}", kind, id)


class _OnlyId(Struct):
    id: Id = UNSET


_decode_id: Callable[[bytes | memoryview], _OnlyId] = msgspec.json.Decoder(_OnlyId).decode


def _readable_id(frame: bytes | memoryview) -> Id:
    """The id of a message that is wrong elsewhere, so that its answer finds its way; UNSET when it can't be read."""
    try:
        return _decode_id(frame).id
    except (ValueError, RecursionError):
        return UNSET


def _in_words(error: Exception, text: bytes | memoryview | str) -> str:
    """What is wrong with a text that could not be decoded, for the person who reads the answer."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    why = str(error)
    if isinstance(error, UnicodeDecodeError) or why.startswith("Invalid UTF-8"):  # msgspec to 0.22, and from 0.23 on
        return _not_utf8(text)
    if why.startswith("Number out of range"):
        return "a number is out of the range of a double (about 1.8e308)"
    if isinstance(error, msgspec.ValidationError):
        return why
    if why == "Input data was truncated":
        return "not JSON: it ends too early, or an escape of a surrogate (\\ud800 to \\udfff) lacks its other half"
    return f"not JSON: {why.removeprefix('JSON is malformed: ')}"


def _not_utf8(text: bytes | memoryview | str) -> str:
    """That a text is not UTF-8, in words, with the first byte that can't be where it is."""
    try:
        (text.encode() if isinstance(text, str) else bytes(text)).decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8: byte 0x{error.object[error.start]:02x} in a string"
    return "not UTF-8"


def _json_name(value: object) -> str:
    names = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null")


def check_value(value: Raw, settings: Settings) -> None:
    """A value must be JSON that everyone can read back: UTF-8, numbers that a double holds, not nested too deep.

    The decoder passes over a Raw value without looking inside; this looks. Raises ProtocolError("bad_request").
    """
    text = bytes(value)
    is_text = text.startswith(b'"')
    try:
        _parse(text) if is_text else _decode_any(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("bad_request", f"value: {_in_words(error, text)}") from error
    if is_text:
        return  # one string: no numbers in it, and nothing nested
    if _LONG_NUMBER.search(text):
        _check_numbers(_decode_any(text))
    if text.count(b"[") + text.count(b"{") > settings.json_depth and _depth(text) > settings.json_depth:
        raise ProtocolError("bad_request", f"value: nested deeper than {settings.json_depth} levels")


def _check_numbers(value: object) -> None:
    """Raise for a whole number that no double comes near; the decoder itself refuses such fractions."""
    for part in _walk(value):
        if isinstance(part, int) and abs(part) >= 2**1024 - 2**970:
            raise ProtocolError("bad_request", "value: a number is out of the range of a double (about 1.8e308)")


def _walk(value: object) -> list[object]:
    """The value and everything in it."""
    parts = [value]
    for part in parts:
        if isinstance(part, dict):
            parts.extend(part.values())
        elif isinstance(part, list | tuple):
            parts.extend(part)
    return parts


_STRINGS = re.compile(rb'(?:"(?:[^"\\]++|\\.)*+"[,:\s]*+)++', re.DOTALL)
_NO_BRACKETS: Final = bytes(byte for byte in range(256) if byte not in b"[]{}")
_STEPS: Final = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
"""Each bracket as what it adds to the depth, in a signed byte."""


def _depth(text: bytes) -> int:
    """How deep valid JSON is nested. Counted on the brackets alone, as a value may have millions of parts."""
    steps = _STRINGS.sub(b"", text).translate(_STEPS, _NO_BRACKETS)
    return max(itertools.accumulate(memoryview(steps).cast("b")), default=0)


def store_key(namespace: str, key: str) -> bytes:
    """The key under which the store keeps a value: namespace, NUL, key.

    Raises ProtocolError: `bad_request` for an empty key or a bad namespace, `key_too_long` past what LMDB takes.
    """
    if not key:
        raise ProtocolError("bad_request", "the key is empty: a key has at least 1 byte")
    if not 0 < len(namespace) <= NAMESPACE_CHARACTERS or "\0" in namespace:
        raise ProtocolError("bad_request", f"a namespace has 1 to {NAMESPACE_CHARACTERS} characters, none of them NUL")
    try:
        full = f"{namespace}\0{key}".encode()
    except UnicodeEncodeError as error:  # only from Python callers: the wire can't carry it
        raise ProtocolError("bad_request", f"not UTF-8: {error.reason}") from error
    if len(full) > LMDB_KEY_BYTES:
        most = LMDB_KEY_BYTES - len(namespace.encode()) - 1
        raise ProtocolError(
            "key_too_long", f"the key has {len(full) - (LMDB_KEY_BYTES - most)} bytes; in this namespace {most} fit"
        )
    return full


def to_request(message: dict[str, Any]) -> AnyRequest:
    """A request given as a dict, checked like one from the wire. Raises ProtocolError."""
    return decode_request(encode_object(message))


def encode_object(message: dict[str, Any]) -> bytes:
    """A dict as one line of JSON. Raises ProtocolError("bad_request") for what JSON can't hold: it is never changed
    into something that it can."""
    try:
        line = _encode(message) + b"\n"
        _refuse_what_is_not_json(message)
        if b"\n" in line[:-1]:
            raise ValueError("a raw value has to be one line")
    except (TypeError, ValueError, RecursionError) as error:
        raise ProtocolError("bad_request", f"can't be written as JSON: {error}") from error
    return line


def _refuse_what_is_not_json(message: object) -> None:
    """The encoder writes NaN as null, a set as a list, bytes as text; nobody would get back what they put."""
    for part in _walk(message):
        if isinstance(part, float) and not math.isfinite(part):
            raise ValueError(f"{part} is no JSON number")
        if not isinstance(part, dict | list | tuple | str | int | float | Raw | Struct | None):
            raise TypeError(f"{type(part).__name__} is no JSON type")
        if isinstance(part, dict) and not all(isinstance(key, str) for key in part):
            raise TypeError("the keys of an object are strings")


def data_object(data: Data) -> dict[str, Any]:
    """A `data` message as a dict. Commands stay as the bytes they are: decoding and encoding them again could write a
    number in another way, and the checksum would not match."""
    fields = msgspec.structs.asdict(data)
    fields |= {"type": data.name, "entries": [msgspec.structs.asdict(entry) for entry in data.entries]}
    return {name: value for name, value in fields.items() if value is not UNSET}
