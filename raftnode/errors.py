"""Every error that raftnode raises, in one tree. Layer 0.

    RaftnodeError
    +-- ConfigError              a setting, an address or an option is wrong; nothing has started
    +-- StoreError               the data directory; each message says what to do
    |   +-- StoreInUse           another process (or Store) holds the directory
    |   +-- StoreForeign         the directory or file is not ours
    |   +-- StoreTooNew          written by a newer format
    |   +-- StoreDamaged         a record does not match its checksum, or the log has a hole
    |   +-- StoreFailed          a transaction or a sync failed; the store is closed to further use
    |   +-- StoreOwned           an election owns this store: write through it
    |   +-- StoreClosed          used after close()
    +-- ProtocolError            the other side sent something wrong; carries the `code` it is answered with
    +-- RequestError             (client) a request was answered with an error; carries `code`
        +-- BadRequest           the request itself is wrong: repeating it is useless; it was not executed
        +-- Unavailable          not executed; another try, or another node, may work
        +-- NotCommitted         the outcome is open: the write may or may not happen
        +-- NodeDamaged          the node found a damaged record

Local mistakes (ConfigError, StoreError) and remote ones (ProtocolError) are different types: the first stop us, the
second never do.
"""

from __future__ import annotations

from typing import Final


class RaftnodeError(Exception):
    """The root of the tree."""


class ConfigError(RaftnodeError, ValueError):
    """A setting, an address or an option is wrong."""


class StoreError(RaftnodeError):
    """Something is wrong with the data directory."""


class StoreInUse(StoreError):
    """Another process, or another Store of this one, holds the directory."""


class StoreForeign(StoreError):
    """The directory or the file in it was not made by raftnode, or belongs to other members."""


class StoreTooNew(StoreError):
    """The directory was written by a newer format."""


class StoreDamaged(StoreError):
    """A record does not match its checksum, or the log has a hole. `commit_id` says where, when it is a log entry."""

    def __init__(self, message: str, commit_id: int | None = None) -> None:
        super().__init__(message)
        self.commit_id = commit_id


class StoreFailed(StoreError):
    """A transaction or a sync failed: what is on disk is not known, so the store takes nothing more (TRAPS, LMDB)."""


class StoreOwned(StoreError):
    """A running election owns this store; writes go through it."""


class StoreClosed(StoreError):
    """The store was used after close()."""


class ProtocolError(RaftnodeError):
    """The other side sent something that can't be taken; `code` is the word that the answer carries."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class RequestError(RaftnodeError):
    """A request was answered with an error, or not at all. `code` is the word of the wire (`messages.CODES`)."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{message} ({code})")
        self.code = code


class BadRequest(RequestError):
    """The request is wrong as it stands; it was not executed, and repeating it gives the same answer."""


class Unavailable(RequestError):
    """The request was not executed; another try later, or at another node, may work."""


class NotCommitted(RequestError):
    """The outcome is open: the write may have happened, may happen yet, or may never happen. Read before repeating."""


class NodeDamaged(RequestError):
    """The node found a damaged record and says so rather than answer with it."""


_USELESS: Final = (
    *("bad_request", "unknown_type", "too_large", "key_too_long", "unsupported"),
    *("last_voter", "no_such_member", "not_voter", "wrong_cluster", "wrong_node"),
)
_NOT_EXECUTED: Final = (
    *("no_leader", "overloaded", "storage_full", "shutting_down", "not_member", "old_copy"),
    *("change_under_way", "no_live_majority", "no_successor", "not_transferred"),
)


def error_for(code: str, message: str) -> RequestError:
    """The typed error for a code of the wire. A code of a newer version counts as an open outcome: the safe reading."""
    if code in _USELESS:
        return BadRequest(code, message)
    if code in _NOT_EXECUTED:
        return Unavailable(code, message)
    if code == "damaged":
        return NodeDamaged(code, message)
    return NotCommitted(code, message)
