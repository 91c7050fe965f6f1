"""What a log makes of empty namespaces, entry by entry: the rule of `namespaces`, over a state that keeps no values.
Layer 1, pure.

Whoever checks committed values against the log (verification, repair) needs every key at once, but only the checksum of
its value: so a million keys take some hundred bytes each, however large the values are.

A disk that is behind with some keys (`namespaces.Behind`) has them as of an earlier commit_id. As an entry touches one
key only, that is what the same entries make, those left out that came later and touch such a key.
"""

from __future__ import annotations

from typing import Final

from msgspec import Raw, Struct

from raftnode.messages import Entry, decode_effect
from raftnode.namespaces import Behind, Namespaces
from raftnode.records import Record, pack_record

_NO_VALUE: Final = Raw(b"null")


class Written(Struct, frozen=True, gc=False):
    """What the log says of a key: what wrote its value, and how the record on disk begins."""

    created: int
    modified: int
    version: int
    checksum: bytes
    """The first bytes of the record on disk: its checksum over the key, the numbers above and the value."""

    @property
    def without_value(self) -> Record:
        return Record(self.created, self.modified, self.version, 0, _NO_VALUE)


class Replay:
    """The namespaces as the entries given so far have left them; with `behind`, as a disk has them that is behind so.
    `state` is by store key."""

    def __init__(self, behind: Behind | None = None) -> None:
        self.state: dict[bytes, Written] = {}
        self.behind = behind
        """May be told later, before an entry that it may concern."""
        self._namespaces = Namespaces()

    def apply(self, entry: Entry) -> None:
        """Carry out the next committed entry. Raises ProtocolError for one that no version of ours wrote."""
        effect = decode_effect(entry.command)
        if self.behind is not None and self.behind.lacks(entry.commit_id, effect):
            return
        self._namespaces.apply(entry, self._find, effect=effect)
        changes = self._namespaces.changes
        for key, record in changes.items():
            if record is None:
                del self.state[key]
            else:
                checksum = pack_record(key, record)[:4]
                self.state[key] = Written(record.created, record.modified, record.version, checksum)
        changes.clear()

    def _find(self, key: bytes) -> Record | None:
        written = self.state.get(key)
        return None if written is None else written.without_value
