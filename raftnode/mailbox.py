"""What the queue between transport and election carries. Layer 1: plain values, and the one drain.

An item is a list of letters: what one read from one socket gave. The queue's size is a limit (`mailbox_batches`); past
it the transport answers `overloaded` itself.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from msgspec import Struct

from raftnode.messages import Answer, AnyAnswer, AnyRequest, HelloAnswer, Id, failure


class Origin(Protocol):
    """Where a request came from, and where its answer goes."""

    peer: str | None
    """The member at the other end, once it has said hello; None for clients."""
    client: str
    """Who asks, for the log: an address."""

    def answer(self, arrival: Arrival, answer: Answer) -> None:
        """Send the answer; each arrival gets exactly one."""
        ...

    @property
    def is_full(self) -> bool:
        """True while the other end has not taken what it was sent: more must wait."""
        ...

    def defer(self, arrival: Arrival) -> None:
        """Bring this request again when there is room for its answer."""
        ...


@runtime_checkable
class MemberEnd(Origin, Protocol):
    """An origin on which another member may introduce itself: a connection."""

    def become_link_of(self, peer: str, is_link: bool) -> None:
        """The other end is the member `peer`; with `is_link` this is its one link."""
        ...

    def close_after_answer(self) -> None:
        """Take nothing more, and end once it has its answer."""
        ...

    def cut(self) -> None:
        """End it at once."""
        ...


class Arrival(Struct, eq=False):
    """A request, and the way back."""

    message: AnyRequest
    origin: Origin
    size: int = 0
    """Bytes that it took on the wire."""
    deadline: float = 0.0
    """Monotonic seconds; set by the election when it takes the request."""
    done: bool = False
    is_checked: bool = False
    """Its value has been looked at: see `messages.check_value`."""
    store_key: bytes = b""
    """Under which the store keeps what it is about; set by the election when it takes the request."""

    @property
    def id(self) -> Id:
        return self.message.id

    def answer(self, answer: Answer) -> None:
        """Answer once; what comes later (a forwarded request whose time was up) is dropped."""
        if not self.done:
            self.done = True
            self.origin.answer(self, answer)

    def refuse(self, code: str, message: str) -> None:
        """Answer with an error of the request's own type."""
        self.answer(failure(self.message.name, code, message))


class Reply(Struct):
    """A member's answer to a request of ours. `forwarded` is the client's request that was passed on to it."""

    peer: str
    answer: AnyAnswer
    forwarded: Arrival | None = None


class LinkEnd(Protocol):
    """Our end of a link to another member."""

    peer: str

    def admit(self) -> None:
        """Who answers there has been checked: the link may be used."""
        ...

    def cut(self) -> None:
        """End it."""
        ...


class Greeting(Struct):
    """A member's answer to our hello: the link is not used before the election has checked it."""

    link: LinkEnd
    answer: HelloAnswer


class Cut(Struct):
    """A connection to or from a member has ended."""

    peer: str
    link: LinkEnd | None = None
    """The link, when it was ours."""
    end: MemberEnd | None = None
    """The connection, when it was the member's link to us."""
    forwarded: list[Arrival] = []
    """Requests of clients that were under way on it."""


class Task(Struct):
    """Something that another thread wants done on the election's."""

    run: Callable[[], Any]
    give_up: Callable[[], Any] = lambda: None
    """Instead of `run`, when the node has ended."""


Letter = Arrival | Reply | Greeting | Cut | Task
Mailbox = queue.Queue[list[Letter]]


def insert(mailbox: Mailbox, letters: list[Letter], limited: bool) -> bool:
    """Put letters in; False when it is full. What members and other threads say is not limited: it can't be refused,
    and there is little of it, as they wait for answers."""
    with mailbox.mutex:
        if limited and 0 < mailbox.maxsize <= len(mailbox.queue):
            return False
        mailbox.queue.append(letters)
        mailbox.not_empty.notify()
    return True


def drain(mailbox: Mailbox) -> list[Letter]:
    """Everything in the mailbox now, in order, under one lock. Nobody waits for room in it, see `insert`."""
    with mailbox.mutex:
        batches: list[list[Letter]] = list(mailbox.queue)
        mailbox.queue.clear()
    return batches[0] if len(batches) == 1 else [letter for batch in batches for letter in batch]
