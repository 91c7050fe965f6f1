"""The replicated state: what commands do to it, and that nothing but the log decides (store docstring; TRAPS 26)."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from msgspec import Raw

from raftnode.errors import ProtocolError
from raftnode.messages import (
    AnyCommand,
    DeleteCommand,
    Entry,
    MembersCommand,
    Noop,
    PutCommand,
    decode_effect,
    effect_of,
    encode_command,
    store_key,
)
from raftnode.namespaces import Namespaces, Outcome
from raftnode.records import Record

# --- helpers --------------------------------------------------------------------------------------------------


def put(key: str, value: bytes = b"1", namespace: str = "default") -> PutCommand:
    return PutCommand(namespace=namespace, key=key, value=Raw(value))


def delete(key: str, namespace: str = "default") -> DeleteCommand:
    return DeleteCommand(namespace=namespace, key=key)


def entry(commit_id: int, command: AnyCommand) -> Entry:
    return Entry(1, commit_id, 0, 0, encode_command(command))


class State:
    """Namespaces over a disk that is a dict, and what takes the changes there."""

    def __init__(self) -> None:
        self.namespaces = Namespaces()
        self.disk: dict[bytes, Record] = {}
        self.commit_id = 0
        self.looked_up: list[bytes] = []

    def on_disk(self, key: bytes) -> Record | None:
        self.looked_up.append(key)
        return self.disk.get(key)

    def apply(self, command: AnyCommand) -> Outcome:
        self.commit_id += 1
        return self.namespaces.apply(entry(self.commit_id, command), self.on_disk)

    def write(self) -> None:
        for key, record in self.namespaces.changes.items():
            if record is None:
                self.disk.pop(key, None)
            else:
                self.disk[key] = record
        self.namespaces.changes.clear()

    def find(self, key: str, namespace: str = "default") -> Record | None:
        return self.namespaces.find(store_key(namespace, key), self.on_disk)


def plain(record: Record | None) -> tuple[int, int, int, bytes] | None:
    return None if record is None else (record.created, record.modified, record.version, bytes(record.value))


# --- the rules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [False, True], ids=["in memory", "on disk"])
def test_version_created_and_replaced(written: bool) -> None:
    """A key's life: put, overwritten, deleted, made anew. `version` counts the puts since it was created, `replaced` is
    the commit_id of the value before, `created` stays while it lives. It makes no difference whether the value before
    is on disk already or only in memory."""
    state = State()

    def apply(command: AnyCommand) -> Outcome:
        outcome = state.apply(command)
        if written:
            state.write()
        return outcome

    assert apply(put("a", b'"one"')) == Outcome(1, version=1, replaced=None)
    assert apply(put("b")) == Outcome(2, version=1, replaced=None)
    assert apply(put("a", b'"two"')) == Outcome(3, version=2, replaced=1)
    assert plain(state.find("a")) == (1, 3, 2, b'"two"')
    assert apply(delete("a")) == Outcome(4, version=0, replaced=3)
    assert state.find("a") is None
    assert apply(delete("a")) == Outcome(5, version=0, replaced=None)
    assert apply(put("a", b'"three"')) == Outcome(6, version=1, replaced=None)
    assert plain(state.find("a")) == (6, 6, 1, b'"three"')
    assert plain(state.find("b")) == (2, 2, 1, b"1"), "another key is not touched"


def test_the_same_value_again_is_a_write_of_its_own() -> None:
    """To put what is there already gives a new version and commit_id: the log has it, so has the state."""
    state = State()
    state.apply(put("a"))
    assert state.apply(put("a")) == Outcome(2, version=2, replaced=1)
    assert plain(state.find("a")) == (1, 2, 2, b"1")


def test_namespaces_do_not_meet() -> None:
    """One key in two namespaces is two keys, also where the names run into each other."""
    state = State()
    for commit_id, (namespace, key) in enumerate((("a", "bc"), ("ab", "c"), ("a", "b"), ("a", "b\0c")), start=1):
        assert state.apply(put(key, b"%d" % commit_id, namespace)) == Outcome(commit_id, 1, None)
    assert [plain(state.find(k, n)) for n, k in (("a", "bc"), ("ab", "c"), ("a", "b"), ("a", "b\0c"))] == [
        (n, n, 1, b"%d" % n) for n in (1, 2, 3, 4)
    ]
    state.apply(delete("bc", "a"))
    assert state.find("bc", "a") is None
    assert state.find("c", "ab") is not None


@pytest.mark.parametrize("command", [Noop(), MembersCommand(voters={"a:1": ""})])
def test_entries_that_are_no_writes_change_nothing(command: AnyCommand) -> None:
    """A no-op or a membership has a commit_id, and that is all that the namespaces see of it."""
    state = State()
    assert state.apply(command) == Outcome(1)
    assert not state.namespaces.changes


@pytest.mark.parametrize(
    "value", [b"1.10", b"1E5", b"1e+5", b"-0", b"123456789012345678901234567890", b'"\\u0061"', b"[ 1 ]"]
)
def test_a_value_keeps_its_spelling(value: bytes) -> None:
    """Values are bytes here: what JSON can write in two ways stays as it was written."""
    state = State()
    state.apply(put("a", value))
    found = state.find("a")
    assert found is not None
    assert bytes(found.value) == value


def test_a_change_hides_the_disk() -> None:
    """Until the next transaction, what was applied is what is read, a delete as well; the disk is asked only for keys
    without a change (an acknowledged write is always seen, store docstring)."""
    state = State()
    state.apply(put("a", b"1"))
    state.apply(put("b", b"2"))
    state.write()
    state.apply(put("a", b"3"))
    state.apply(delete("b"))
    state.looked_up.clear()
    found = state.find("a")
    assert found is not None
    assert bytes(found.value) == b"3"
    assert state.find("b") is None
    assert state.looked_up == []
    assert state.find("c") is None
    assert state.looked_up == [store_key("default", "c")]


def test_an_entry_that_nobody_understands_is_an_error() -> None:
    """A command of no known kind stops the node rather than being passed over: states must not part (TRAPS 26)."""
    namespaces = Namespaces()
    for command in (b'{"kind":"swap"}', b'{"kind":"put"}', b"", b"[]", b"\xff"):
        with pytest.raises(ProtocolError):
            namespaces.apply(Entry(1, 1, 0, 0, Raw(command)), lambda _: None)
    assert not namespaces.changes


@pytest.mark.parametrize(
    "command",
    [
        put("a", b'{"b": [1.50, "\\u00e4"]}'),
        put("\u00e4 \U0001f600", b"null", "other"),
        delete("a", "other"),
        Noop(),
        MembersCommand(voters={"1": "a"}, learners={"2": ""}),
    ],
)
def test_a_leader_does_what_its_followers_read(command: AnyCommand) -> None:
    """A leader knows what it proposes, and does not decode it; the others do. It is the same."""
    assert effect_of(command) == decode_effect(encode_command(command))


@pytest.mark.parametrize("seed", range(5))
def test_any_log_gives_one_state(seed: int) -> None:
    """The same log on three nodes that write to disk at different times (always, never, at random) and restart in
    between gives the same outcomes and the same state, and both are those of a plain model: nothing but the log has
    a say (TRAPS 26)."""
    chance = random.Random(seed)
    nodes = [State(), State(), State()]
    model: dict[tuple[str, str], list[Any]] = {}
    for commit_id in range(1, 300):
        namespace, key = chance.choice(("default", "other")), f"key-{chance.randrange(6)}"
        kind = chance.choices(("put", "delete", "noop"), weights=(6, 3, 1))[0]
        before = model.get((namespace, key))
        if kind == "put":
            value = json.dumps(chance.random()).encode()
            command: AnyCommand = put(key, value, namespace)
            created, version = (before[0], before[2] + 1) if before else (commit_id, 1)
            expected = Outcome(commit_id, version, before[1] if before else None)
            model[namespace, key] = [created, commit_id, version, value]
        elif kind == "delete":
            command = delete(key, namespace)
            expected = Outcome(commit_id, 0, before[1] if before else None)
            model.pop((namespace, key), None)
        else:
            command, expected = Noop(), Outcome(commit_id)
        assert [node.apply(command) for node in nodes] == [expected] * 3
        nodes[0].write()
        if chance.random() < 0.2:
            nodes[2].write()
    for node in nodes:
        for namespace in ("default", "other"):
            for n in range(6):
                where = namespace, f"key-{n}"
                wanted = tuple(model[where]) if where in model else None
                assert plain(node.find(f"key-{n}", namespace)) == wanted
        node.write()
    disks = [{key: plain(record) for key, record in node.disk.items()} for node in nodes]
    assert disks[0] == disks[1] == disks[2]
