"""What bad clients do to a node: each attack is a function of an `Attack`, goes on until its time is over, and returns
how much it did. None of them needs the node's help to come to an end.
"""

from __future__ import annotations

import contextlib
import json
import random
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from raftnode.config import Settings, parse_address

_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER: the connection ends by RST, whatever is still on its way."""
_MOMENT_S: Final = 0.005
BIG_KEY: Final = "big"
"""A large value that attacks ask for; `store_big` puts it there."""


def line(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Attack:
    """One attacker's target, time and chance; its sockets are closed when the block ends."""

    def __init__(self, address: str, settings: Settings, seconds: float, seed: int) -> None:
        self.address = address
        self.settings = settings
        self.chance = random.Random(seed)
        self.sockets: set[socket.socket] = set()
        self._end = time.monotonic() + seconds

    def __enter__(self) -> Attack:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.sockets:
            each.close()
        self.sockets.clear()

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self._end

    def connect(self) -> socket.socket:
        """A new connection, without waiting for anything after that."""
        connected = socket.create_connection(parse_address(self.address), 10)
        connected.setblocking(False)
        self.sockets.add(connected)
        return connected

    def connect_many(self, count: int) -> list[socket.socket]:
        return [self.connect() for _ in range(count)]

    def close(self, ended: socket.socket) -> None:
        ended.close()
        self.sockets.discard(ended)

    def send_all(self, payloads: dict[socket.socket, Iterator[bytes]], reads: bool) -> int:
        """Send to many at once, each its own pieces, as fast as the node takes them, until the time is over or all has
        been sent. With `reads`, answers are taken and dropped. Who is cut off is done. Returns the bytes sent."""
        sent = 0
        with selectors.DefaultSelector() as selector:
            events = selectors.EVENT_WRITE | (selectors.EVENT_READ if reads else 0)
            rest = dict.fromkeys(payloads, b"")
            for one in payloads:
                selector.register(one, events, one)
            while self.goes_on and selector.get_map():
                for key, ready in selector.select(_MOMENT_S):
                    each: socket.socket = key.data
                    try:
                        if ready & selectors.EVENT_READ and not each.recv(1 << 18):
                            raise ConnectionResetError
                        if ready & selectors.EVENT_WRITE:
                            piece = rest[each] or next(payloads[each], b"")
                            if piece:
                                done = each.send(piece)
                                sent += done
                                rest[each] = piece[done:]
                            elif reads:
                                selector.modify(each, selectors.EVENT_READ, each)
                            else:
                                selector.unregister(each)
                    except BlockingIOError:
                        continue
                    except OSError:
                        selector.unregister(each)
        return sent

    def wait(self) -> None:
        """Do nothing more until the time is over."""
        time.sleep(max(0.0, self._end - time.monotonic()))


def store_big(address: str, size: int) -> int:
    """Put the large value; returns its commit_id."""
    with socket.create_connection(parse_address(address), 10) as connection, connection.makefile("rwb") as stream:
        stream.write(line({"type": "put", "namespace": "big", "key": BIG_KEY, "value": "x" * size}))
        stream.flush()
        commit_id: int = json.loads(stream.readline())["commit_id"]
        return commit_id


def _get_big(number: int) -> bytes:
    return line({"type": "get", "namespace": "big", "key": BIG_KEY, "id": number, "consistency": "local"})


def _forever(make: Callable[[int], bytes]) -> Iterator[bytes]:
    number = 0
    while True:
        yield make(number)
        number += 1


# --- the attacks ----------------------------------------------------------------------------------------------


def random_bytes(attack: Attack) -> str:
    """Noise on eight connections, with a newline here and there."""
    noise = {each: _forever(lambda _: attack.chance.randbytes(4096)) for each in attack.connect_many(8)}
    return f"{attack.send_all(noise, reads=True)} bytes of noise"


def slow_drip(attack: Attack) -> str:
    """Two hundred messages at once, a byte at a time, so slowly that none is ever whole."""
    message = line({"type": "put", "namespace": "never", "key": "drip", "value": "x" * 10_000})
    dripping = attack.connect_many(200)
    at = 0
    while attack.goes_on and at < 5000:
        for each in dripping:
            with contextlib.suppress(OSError):
                each.send(message[at : at + 1])
        at += 1
        time.sleep(_MOMENT_S)
    return f"{len(dripping)} connections, {at} bytes each"


def half_closed(attack: Attack) -> str:
    """Says a request or half of one, ends its side, and does not take the answer."""
    count = 0
    while attack.goes_on:
        each = attack.connect()
        with contextlib.suppress(OSError):
            each.send(attack.chance.choice([_get_big(0), _get_big(0)[:20], b"", b'{"type":"ping"}', b"{" * 100]))
            each.shutdown(socket.SHUT_WR)
        count += 1
        if len(attack.sockets) > 60:
            attack.close(next(iter(attack.sockets)))
    return f"{count} connections"


def idle_connections(attack: Attack) -> str:
    """As many connections as the node takes, and a good deal more; nobody says anything."""
    wanted = attack.settings.connections * 2
    count = 0
    with contextlib.suppress(OSError):
        while attack.goes_on and count < wanted:
            attack.connect()
            count += 1
    attack.wait()
    return f"{count} connections"


def storm(attack: Attack) -> str:
    """Connections opened and closed at once, by FIN or by RST, some with a request."""
    count = 0
    while attack.goes_on:
        with contextlib.suppress(OSError):
            each = attack.connect()
            count += 1
            if attack.chance.random() < 0.3:
                each.send(b'{"type":"ping"}\n')
            if attack.chance.random() < 0.5:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            attack.close(each)
    return f"{count} connections"


def reset_in_answer(attack: Attack) -> str:
    """Asks for large values and resets the connection when the first bytes of an answer have come."""
    count = 0
    while attack.goes_on:
        with contextlib.suppress(OSError):
            each = attack.connect()
            each.setblocking(True)
            each.send(b"".join(_get_big(number) for number in range(20)))
            each.recv(100)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            attack.close(each)
            count += 1
    return f"{count} resets"


def never_reads(attack: Attack) -> str:
    """Many ask for large values, each as often as the node lets it, and take none."""
    asking = attack.connect_many(attack.settings.connections - 20)
    sent = attack.send_all({each: _forever(_get_big) for each in asking}, reads=False)
    return f"{len(asking)} connections, {sent // len(_get_big(0))} gets of a large value"


def endless_pipeline(attack: Attack) -> str:
    """Requests of every kind without end, and no answer is taken."""
    kinds: list[dict[str, Any]] = [
        {"type": "ping"},
        {"type": "status"},
        {"type": "peers"},
        {"type": "get", "key": "none"},
        {"type": "get", "key": "none", "consistency": "local"},
        {"type": "delete", "namespace": "none", "key": "none"},
    ]
    block = b"".join(line(kinds[n % 6] | ({"id": n} if n % 7 else {})) for n in range(600))
    asking = attack.connect_many(attack.settings.connections // 4)
    sent = attack.send_all({each: _forever(lambda _: block) for each in asking}, reads=False)
    return f"{len(asking)} connections, {600 * sent // len(block)} requests"


def garbage_unread(attack: Attack) -> str:
    """The smallest bad messages there are, in blocks, and no answer is taken: each byte makes the node say much."""
    block = b"x\n" * 100_000
    asking = attack.connect_many(attack.settings.connections // 2)
    sent = attack.send_all({each: _forever(lambda _: block) for each in asking}, reads=False)
    return f"{len(asking)} connections, {sent // 2} bad messages"


def begun(attack: Attack) -> str:
    """As many as there are places each send nearly all of the largest message, and stop."""
    head = b'{"type":"put","namespace":"never","key":"begun","value":"'
    part = head + b"x" * (attack.settings.frame_bytes - len(head) - 10)
    sending = attack.connect_many(attack.settings.connections - 20)
    sent = attack.send_all({each: iter([part]) for each in sending}, reads=False)
    attack.wait()
    return f"{len(sending)} connections, {sent} bytes"


def no_newline(attack: Attack) -> str:
    """Several send without end, and never a newline."""
    sending = attack.connect_many(10)
    sent = attack.send_all({each: _forever(lambda _: b'{"a":[' * 10_000) for each in sending}, reads=True)
    return f"{len(sending)} connections, {sent} bytes"


def costly(attack: Attack) -> str:
    """Messages near the limit that cost much to look at: a great many small values, deep nesting, wrong types."""
    room = attack.settings.frame_bytes - 100
    units = [b"[],", b"{},", b"[" * 100 + b"]" * 100 + b",", b'{"a":1},', b"9" * 308 + b",", b'"",', b'"\\u0041",']
    values = [b"[" + unit * (room // len(unit)) + b"0]" for unit in units]
    heads = [b'{"type":"putt","value":', b'{"type":"put","key":5,"value":', b'{"type":"get","value":']
    messages = [attack.chance.choice(heads) + value + b"}\n" for value in values]
    deep = b"[" * 129 + b"]" * 129 + b","
    messages += [b'{"type":"put","namespace":"never","key":"a","value":[' + deep * (room // len(deep)) + b"0]}\n"]
    sending = attack.connect_many(6)
    sent = attack.send_all({each: _forever(lambda _: attack.chance.choice(messages)) for each in sending}, reads=True)
    return f"{len(sending)} connections, {sent // attack.settings.frame_bytes} messages near the limit"


ATTACKS: Final[tuple[Callable[[Attack], str], ...]] = (
    random_bytes,
    slow_drip,
    half_closed,
    idle_connections,
    storm,
    reset_in_answer,
    never_reads,
    endless_pipeline,
    garbage_unread,
    begun,
    no_newline,
    costly,
)
