"""How a node asks to be taken (raftnode.joining), with members that answer from a script."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raftnode import joining
from raftnode.errors import BadRequest, Unavailable
from raftnode.store import Store

ME, MEMBER, OTHER = "127.0.0.1:5009", "127.0.0.1:5001", "127.0.0.1:5002"
TAKEN = {
    "type": "add_peer",
    "data": True,
    "cluster": "c",
    "membership": {"voters": {MEMBER: "a"}, "learners": {ME: "b"}},
}


class _Members:
    """A transport: every member gives the answers of one script, in turn."""

    my_ip = ME

    def __init__(self, *answers: Any, timeout: float = 5.0) -> None:
        self.timeout = timeout
        self._answers = iter(answers)
        self.asked: list[str] = []

    def ask_as_client(self, member: str, message: dict[str, Any]) -> Any:
        assert message["type"] == "add_peer"
        self.asked.append(member)
        return next(self._answers, None)


def refusal(code: str) -> dict[str, Any]:
    return {"type": "add_peer", "data": False, "error": {"code": code, "message": "why"}}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setattr(joining, "_PAUSE_S", 0.0)
    opened = Store("database", tmp_path / "data")
    yield opened
    opened.close()


@pytest.mark.parametrize("code", ["not_committed", "wrong_node", "no_leader", "change_under_way", "not_member"])
def test_it_asks_again(store: Store, code: str) -> None:
    """The leader was lost before it had committed the change, so the outcome is open; or the node that was at this
    address, with the disk that was lost, has been heard a moment ago; or nobody leads: the same question later, or to
    another member, is answered. A node that ends instead is a node that does not come back by itself."""
    members = _Members(refusal(code), TAKEN)
    joining.join(store, members, [MEMBER, OTHER])  # type: ignore[arg-type]
    assert members.asked == [MEMBER, OTHER]
    assert store.cluster_id == "c"


def test_a_refusal_for_good_is_told_at_once(store: Store) -> None:
    """Asking again would be no use."""
    members = _Members(refusal("wrong_cluster"), TAKEN)
    with pytest.raises(BadRequest):
        joining.join(store, members, [MEMBER, OTHER])  # type: ignore[arg-type]
    assert members.asked == [MEMBER]


def test_it_gives_up_in_time(store: Store) -> None:
    """Nobody answers: it says so after its time-out, and the directory is as empty as before."""
    with pytest.raises(Unavailable, match="can't be reached"):
        joining.join(store, _Members(timeout=0.0), [MEMBER])  # type: ignore[arg-type]
    assert store.cluster_id is None
