"""Messages as no program of ours sends them: valid ones of every type, and what a seed makes of them.

fuzzer = Fuzzer(random.Random(7), Facts.of(status))
fuzzer.line()           # some bytes for a client's connection: a message or what is left of one, however ended
    fuzzer.peer_line(who)   # a well-formed message of a member, with terms and entries from the likely to the absurd
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Self

from raftnode.config import parse_address
from raftnode.messages import PROTOCOL_VERSION, chain

NAMESPACES: Final = ("fuzz", "fuzz-2")
"""Valid puts go here, unless a mutation leads them elsewhere."""
_NUMBERS: Final = (0, 1, 2, 3, -1, 2**31, 2**32 - 1, 2**32, 2**53 - 1, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400)
_LITERALS: Final = (
    *(b"NaN", b"Infinity", b"-Infinity", b"1e400", b"-1e-400", b"1E+2", b"0x10", b"01", b"1.", b".5", b"-", b"-0"),
    *(b"true", b"null", b'""', b'"\\ud800"', b'"\\udc00\\ud800"', b'"\\u0000"', b'"\xff"', b'"\xed\xa0\x80"', b'"\\x"'),
    *(b"[]", b"{}", b"[" * 200, b"[" * 100 + b"]" * 100, b'{"a":' * 130 + b"1" + b"}" * 130, b'"', b"\\", b"{", b"}"),
)
_PIECES: Final = (
    b"\x00",
    b"\n",
    b"\r\n",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\xff\xfe",
    b"\xc3",
    b"  ",
    b"}{",
)
_SMALL: Final = 4


class Facts(NamedTuple):
    """What a stranger can learn of a cluster by asking for its status."""

    cluster: str
    members: dict[str, str]
    """Node ids by address."""
    term: int
    commit_id: int
    last: tuple[int, int, int] = (0, 0, 0)
    """Term, commit_id and checksum of the newest entry."""

    @classmethod
    def of(cls, status: dict[str, Any]) -> Self:
        members = {address: member["node"] for address, member in status["members"].items()}
        last = status["last"]
        mark = (last["term"], last["commit_id"], int(last["checksum"], 16))
        return cls(status["cluster"], members, status["term"], status["commit_id"], mark)


class Fuzzer:
    """One seed's messages."""

    def __init__(self, chance: random.Random, facts: Facts, highest: int = 2**63 - 1) -> None:
        """`highest`: no term, commit_id or round of a message between members is above that."""
        self.chance = chance
        self.facts = facts
        self._highest = highest
        self._makers: tuple[Callable[[], dict[str, Any]], ...] = (
            *(self._put, self._put, self._delete, self._get, self._plain, self._entries_wanted),
            *(self._address, self._replace_peer),
            *(self._hello, self._heartbeat, self._data, self._vote_request, self._answer),
        )

    # --- bytes for a client's connection ---

    def line(self) -> bytes:
        """A message, most often broken in some way, and most often with its newline."""
        text = self._encoded(self.chance.choice(self._makers)())
        for _ in range(self.chance.choice((0, 1, 1, 1, 2, 5))):
            text = self.chance.choice(self._MUTATIONS)(self, text)
        if self._removes_member(text):
            text = self._encoded(self._plain())
        return text + self.chance.choice((b"\n", b"\n", b"\n", b"\r\n", b"", b" ", b"\n\n", b"}\n"))

    def _removes_member(self, text: bytes) -> bool:
        """It might well be carried out, and then that node would be gone; the last voter can't be removed."""
        members = self.facts.members if len(self.facts.members) > 1 else ()
        return b"remove_peer" in text and any(member.encode() in text for member in members)

    def _encoded(self, message: dict[str, Any]) -> bytes:
        text = json.dumps(message, ensure_ascii=self.chance.random() < 0.5, separators=self._separators())
        return text.encode(errors="surrogatepass")

    def _separators(self) -> tuple[str, str]:
        return self.chance.choice(((",", ":"), (", ", ": "), (" ,\t", " :")))

    def _flip(self, text: bytes) -> bytes:
        changed = bytearray(text)
        for _ in range(self.chance.choice((1, 1, 2, 8)) if changed else 0):
            changed[self.chance.randrange(len(changed))] ^= 1 << self.chance.randrange(8)
        return bytes(changed)

    def _cut(self, text: bytes) -> bytes:
        first, last = sorted(self.chance.randrange(len(text) + 1) for _ in range(2))
        return self.chance.choice((text[:first], text[first:], text[:first] + text[last:]))

    def _double(self, text: bytes) -> bytes:
        first, last = sorted(self.chance.randrange(len(text) + 1) for _ in range(2))
        return text[:last] + text[first:last] * self.chance.choice((1, 1, 3, 50)) + text[last:]

    def _splice(self, text: bytes) -> bytes:
        other = self._encoded(self.chance.choice(self._makers)())
        return text[: self.chance.randrange(len(text) + 1)] + other[self.chance.randrange(len(other)) :]

    def _insert(self, text: bytes) -> bytes:
        at = self.chance.randrange(len(text) + 1)
        return text[:at] + self.chance.choice((*_PIECES, *_LITERALS)) + text[at:]

    def _replace(self, text: bytes) -> bytes:
        """A value by another one, a number by an extreme one."""
        at = text.find(b":", self.chance.randrange(len(text) + 1)) + 1
        end = min((found for found in (text.find(mark, at) for mark in (b",", b"}")) if found > 0), default=len(text))
        number = str(self.chance.choice(_NUMBERS)).encode()
        return text[:at] + self.chance.choice((*_LITERALS, *[number] * 20)) + text[end:]

    def _repeat_key(self, text: bytes) -> bytes:
        """A field twice: what counts must be the same for all readers of the message."""
        other = self._encoded(self.chance.choice(self._makers)())
        return text[:-1] + b"," + other[1:]

    def _several(self, text: bytes) -> bytes:
        other = self._encoded(self.chance.choice(self._makers)())
        return text + self.chance.choice((b"", b" ", b",", b"\x00")) + other

    def _lengthen(self, text: bytes) -> bytes:
        at = self.chance.randrange(len(text) + 1)
        return (
            text[:at]
            + self.chance.choice((b"x", b" ", b"{", b"9", b"\\", b'"')) * self.chance.choice((600, 70_000))
            + text[at:]
        )

    def _noise(self, text: bytes) -> bytes:
        return self.chance.randbytes(len(text))

    _MUTATIONS = (
        *(_flip, _cut, _double, _splice, _insert, _insert, _replace, _replace, _replace),
        *(_repeat_key, _several, _lengthen, _noise),
    )  # fmt: skip

    # --- messages of clients ---

    def _with_id(self, message: dict[str, Any]) -> dict[str, Any]:
        if self.chance.random() < 0.7:
            message["id"] = self.chance.choice((self.chance.randrange(1000), f"x{self.chance.randrange(1000)}", 2**70))
        return message

    def _key(self) -> dict[str, Any]:
        return {"namespace": self.chance.choice(NAMESPACES), "key": f"k{self.chance.randrange(20)}"}

    def _value(self, depth: int = 0) -> Any:
        kind = self.chance.randrange(8 if depth < _SMALL else 5)
        if kind < 5:
            return self.chance.choice(
                (None, True, self.chance.random(), self.chance.choice(_NUMBERS[:-1]), "ä€\U0001f600\n")
            )
        if kind < 7:
            return [self._value(depth + 1) for _ in range(self.chance.randrange(_SMALL))]
        return {f"f{n}": self._value(depth + 1) for n in range(self.chance.randrange(_SMALL))}

    def _put(self) -> dict[str, Any]:
        return self._with_id({"type": "put", **self._key(), "value": self._value(), "client": "fuzz"})

    def _delete(self) -> dict[str, Any]:
        return self._with_id({"type": "delete", **self._key()})

    def _get(self) -> dict[str, Any]:
        consistency = self.chance.choice(("linearizable", "local"))
        return self._with_id({"type": "get", **self._key(), "consistency": consistency})

    def _plain(self) -> dict[str, Any]:
        return self._with_id({"type": self.chance.choice(("ping", "peers", "status"))})

    def _address(self) -> dict[str, Any]:
        address = self.chance.choice(("h:1", "", "[::1]:5", *self.facts.members))
        return self._with_id({"type": self.chance.choice(("add_peer", "remove_peer")), "address": address})

    def _replace_peer(self) -> dict[str, Any]:
        """By a node that will never come, so nobody is removed."""
        old, new = self.chance.choice(("h:1", *self.facts.members)), self.chance.choice(("h:1", "[::1]:5"))
        return self._with_id({"type": "replace_peer", "old": old, "new": new})

    def _entries_wanted(self) -> dict[str, Any]:
        return self._with_id({"type": "entries", "from": self._number(), "to": self._number()})

    def _answer(self) -> dict[str, Any]:
        """An answer where a request belongs."""
        kind = self.chance.choice(("put", "get", "hello", "heartbeat", "data", "vote_request", "error"))
        return self._with_id({"type": kind, "data": True, "term": self._number(), "commit_id": self._number()})

    # --- messages of members ---

    def _number(self, near: int = 0) -> int:
        """Likely, or absurd."""
        if self.chance.random() < 0.6:
            return min(max(0, near + self.chance.randrange(-2, 4)), self._highest)
        return self.chance.choice([number for number in _NUMBERS if 0 <= number <= self._highest])

    def _member(self) -> str:
        return self.chance.choice((*self.facts.members, "127.0.0.1:9"))

    def hello(self, member: str, /, **changes: Any) -> dict[str, Any]:
        """What a member says first, right but for `changes`."""
        facts = {"cluster": self.facts.cluster, "node": self.facts.members[member], "address": member}
        return {"type": "hello", **facts, "protocol": PROTOCOL_VERSION, "link": True, "id": 0, **changes}

    def _hello(self) -> dict[str, Any]:
        """A stranger's: something in it is always wrong."""
        wrong = self.chance.choice(
            ({"cluster": "0" * 16}, {"node": "f" * 16}, {"protocol": 2}, {"address": "127.0.0.1:9"})
        )
        return self._with_id(self.hello(self.chance.choice(tuple(self.facts.members)), **wrong))

    def _heartbeat(self) -> dict[str, Any]:
        return self._with_id(self._heartbeat_of(self._member()))

    def _data(self) -> dict[str, Any]:
        return self._with_id(self._data_of(self._member()))

    def _vote_request(self) -> dict[str, Any]:
        return self._with_id(self._vote_request_of(self._member()))

    def peer_line(self, member: str) -> bytes:
        """A well-formed request of a member that says it is `member`."""
        make = self.chance.choice((self._heartbeat_of, self._data_of, self._data_of, self._vote_request_of))
        return json.dumps(self._with_id(make(member)), separators=(",", ":")).encode() + b"\n"

    def _heartbeat_of(self, member: str) -> dict[str, Any]:
        term, commit_id = self._number(self.facts.term), self._number(self.facts.commit_id)
        return {"type": "heartbeat", "term": term, "leader": member, "commit_id": commit_id, "round": self._number()}

    def _vote_request_of(self, member: str) -> dict[str, Any]:
        term = self._number(self.facts.term)
        staged = {
            "address": member,
            "term": self._number(self.facts.term),
            "commit_id": self._number(self.facts.commit_id),
        }
        pre_vote = self.chance.random() < 0.5
        return {"type": "vote_request", "term": term, "commit_id": 0, "staged": staged, "pre_vote": pre_vote}

    def _data_of(self, member: str) -> dict[str, Any]:
        term = self._number(self.facts.term)
        previous = {"term": self._number(self.facts.term), "commit_id": self._number(self.facts.commit_id)}
        if fits := self.chance.random() < 0.5:
            previous = {"term": self.facts.last[0], "commit_id": self.facts.last[1]}
        data = {"type": "data", "action": self.chance.choice(("log", "commit")), "term": term, "leader": member}
        return data | {
            "previous": previous,
            "entries": self._entries(previous, fits),
            "commit_id": self._number(self.facts.commit_id),
        }

    def _entries(self, previous: dict[str, int], fits: bool) -> list[dict[str, Any]]:
        """Some that follow, some that do not; commands that are some, and that are none."""
        entries: list[dict[str, Any]] = []
        checksum = self.facts.last[2] if fits else self.chance.randrange(2**32)
        at = previous["commit_id"]
        for _ in range(self.chance.choice((0, 0, 1, 2, 5))):
            at = at + 1 if self.chance.random() < 0.9 else self._number(at)
            term = previous["term"] if self.chance.random() < 0.6 else self._number(previous["term"])
            at, term = min(at, 2**63 - 1), min(term, 2**63 - 1)
            command = self.chance.choice(
                (
                    {"kind": "noop"},
                    {"kind": "put", **self._key(), "value": self._value()},
                    {"kind": "delete", **self._key()},
                    {"kind": "members", "voters": {}},
                    {"kind": "members", "voters": {"127.0.0.1:9": ""}, "learners": {"127.0.0.1:9": ""}},
                    {"kind": "put", "namespace": "", "key": "", "value": 1},
                    {"kind": "something"},
                    [1],
                )
            )
            checksum = chain(checksum, term, at, 0, json.dumps(command, separators=(",", ":")).encode())
            entries.append({"term": term, "commit_id": at, "time": 0, "checksum": checksum, "command": command})
        return entries


# --- a conversation -------------------------------------------------------------------------------------------


def say(address: str, text: bytes, patience: float = 30.0) -> list[dict[str, Any]]:
    """Say all of it on one connection and end it from this side: every answer that the node has for it, also when it
    refused to hear all (it never resets a connection with answers on their way)."""
    received = b""
    with socket.create_connection(parse_address(address), patience) as connection:
        sender = threading.Thread(target=_send, args=(connection, text))
        sender.start()
        while part := connection.recv(1 << 18):
            received += part
        sender.join()
    return [json.loads(line) for line in received.split(b"\n") if line]


def _send(connection: socket.socket, text: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
