"""The published interface (published interface): names, signatures, types and words that others rely on. A change here
is a breaking change."""

from __future__ import annotations

import importlib
import inspect
import re
import tomllib
import typing
from pathlib import Path
from typing import Any

import msgspec
import pytest

import raftnode
from raftnode import errors, messages
from raftnode.client import Client
from raftnode.election import Election
from raftnode.errors import BadRequest, NodeDamaged, NotCommitted, RaftnodeError, RequestError, Unavailable, error_for
from raftnode.raftnode import RaftNode
from raftnode.store import Store
from raftnode.transport import Transport

# --- names and signatures -------------------------------------------------------------------------------------

EMPTY = inspect.Parameter.empty
POSITIONAL, VAR_KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_KEYWORD

ANY = object()
"""The published interface gives no annotation."""

Wanted = list[tuple[str, Any, Any]]
"""Name, default and annotation of each parameter; an annotation is a type, or a pattern of its words."""

CONSTRUCTORS: dict[type, Wanted] = {
    RaftNode: [
        ("my_ip", EMPTY, "str"),
        ("peers", EMPTY, r"list\b.*"),
        ("timeout", EMPTY, "int"),
        ("**kwargs", EMPTY, ANY),
    ],
    Election: [("transport", EMPTY, "Transport"), ("store", EMPTY, "Store"), ("queue", EMPTY, r"queue\.Queue\b.*")],
    Store: [("store_type", "memory", "str"), ("data_dir", "data", r"str\b.*")],
    Transport: [("my_ip", EMPTY, "str"), ("timeout", EMPTY, "int"), ("queue", EMPTY, r"queue\.Queue\b.*")],
}

METHODS: dict[tuple[type, str], tuple[Wanted, str | None]] = {
    (Election, "ask_for_vote"): ([], None),
    (Election, "send_vote_request"): ([("voter", EMPTY, "str"), ("term", EMPTY, "int")], None),
    (Election, "decide_vote"): (
        [("term", EMPTY, "int"), ("commit_id", EMPTY, "int"), ("staged", EMPTY, r"dict\b.*")],
        "bool",
    ),
    (Election, "handle_put"): ([("payload", EMPTY, r"dict\b.*")], "bool"),
    (Election, "handle_get"): ([("payload", EMPTY, r"dict\b.*")], r"dict\b.*"),
    (Election, "heartbeat_handler"): ([("message", EMPTY, r"dict\b.*")], r"tuple\b.*"),
    (Election, "init_timeout"): ([], None),
    (Election, "send_heartbeat"): ([("peer", EMPTY, "str")], None),
    (Election, "start_heartbeat"): ([], None),
    (Store, "action_handler"): ([("message", EMPTY, r"dict\b.*")], None),
    (Store, "commit"): ([("namespace", EMPTY, "str"), ("delete", False, "bool"), ("**kwargs", EMPTY, ANY)], None),
    (Store, "get"): ([("payload", EMPTY, r"dict\b.*")], r"dict\b.*"),
    (Store, "put"): (
        [
            ("term", EMPTY, "int"),
            ("payload", EMPTY, r"dict\b.*"),
            ("transport", EMPTY, ANY),
            ("majority", EMPTY, "int"),
        ],
        "bool",
    ),
    (Store, "send_data"): (
        [("message", EMPTY, r"dict\b.*"), ("transport", EMPTY, ANY), ("confirmations", None, r"list\b.*\| None")],
        None,
    ),
    (Transport, "add_peer"): ([("message", EMPTY, r"dict\b.*")], None),
    (Transport, "req_add_peer"): ([("addr", EMPTY, "str")], None),
    (Transport, "decode_json"): ([("msg", EMPTY, ANY)], None),
    (Transport, "encode_json"): ([("msg", EMPTY, r"dict\b.*")], "bytes"),
    (Transport, "echo"): ([("peer", EMPTY, ANY)], None),
    (Transport, "ping"): ([("timeout", EMPTY, "float")], None),
    (Transport, "heartbeat"): (
        [("peer", EMPTY, "str"), ("message", None, r"dict\b.*\| None")],
        r"dict\b.*",
    ),
    (Transport, "send_data"): ([("peer", None, ANY), ("message", None, ANY)], None),
    (Transport, "vote_request"): ([("peer", EMPTY, "str"), ("message", None, ANY)], r"dict\b.*"),
    (Transport, "reconnect"): ([("addr", EMPTY, "str")], None),
    (Transport, "redirect_to_leader"): ([("message", EMPTY, r"dict\b.*")], None),
    (Transport, "serve"): ([], None),
}


def assert_signature(function: Any, wanted: Wanted, returns: str | None, optional_more: bool = False) -> None:
    """The parameters are these, in this order; further ones may only be keywords with a default."""
    signature = inspect.signature(function)
    found = [p for p in signature.parameters.values() if p.name != "self"]
    more = [p for p in found if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert not more or optional_more, f"{function.__qualname__} has more parameters: {more}"
    assert all(p.default is not EMPTY for p in more), f"{function.__qualname__} wants more than is published"
    found = [p for p in found if p not in more]
    assert [("**" if p.kind is VAR_KEYWORD else "") + p.name for p in found] == [name for name, _, _ in wanted]
    for parameter, (name, default, annotation) in zip(found, wanted, strict=True):
        assert parameter.default == default or parameter.default is default, name
        if annotation is not ANY:
            assert re.fullmatch(annotation, str(parameter.annotation)), f"{name}: {parameter.annotation}"
        if parameter.kind is not VAR_KEYWORD:
            assert parameter.kind is POSITIONAL, f"{name} can't be given by place or name"
    if returns is not None:
        assert re.fullmatch(returns, str(signature.return_annotation)), signature.return_annotation


@pytest.mark.parametrize("published", CONSTRUCTORS, ids=lambda c: c.__name__)
def test_constructors(published: type) -> None:
    """published interface: the four classes are made with these arguments, by place or by name. What a later version
    adds is a keyword with a default (the store takes `settings` so)."""
    assert_signature(published.__init__, CONSTRUCTORS[published], None, optional_more=True)


@pytest.mark.parametrize(("owner", "method"), METHODS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_methods(owner: type, method: str) -> None:
    """published interface: every published method, with names, order and defaults of its parameters, and the types that
    are given there."""
    wanted, returns = METHODS[owner, method]
    assert_signature(getattr(owner, method), wanted, returns)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("raftnode", ["RaftNode", "Node", "Client", "__version__"]),
        ("raftnode.raftnode", ["RaftNode", "Node"]),
        ("raftnode.election", ["Election"]),
        ("raftnode.store", ["Store"]),
        ("raftnode.transport", ["Transport"]),
        ("raftnode.client", ["Client"]),
        ("raftnode.cli", ["main"]),
        ("raftnode.inspector", ["main"]),
        ("raftnode.config", ["Settings", "Role"]),
        ("raftnode.log", ["setup", "get_logger"]),
    ],
)
def test_names(module: str, names: list[str]) -> None:
    """published interface: every name is importable from the module that it is published in, and the module is
    documented."""
    found = importlib.import_module(module)
    assert (found.__doc__ or "").strip()
    for name in names:
        assert hasattr(found, name), f"{module}.{name}"


def test_kinship() -> None:
    """A RaftNode is a Transport, and Node is another name of the same class; the package exports just these."""
    assert RaftNode.__bases__ == (Transport,)
    assert raftnode.Node is raftnode.RaftNode is RaftNode
    assert raftnode.Client is Client
    assert sorted(raftnode.__all__) == ["Client", "Node", "RaftNode", "__version__"]


def test_version_and_commands() -> None:
    """The version has the form that installers understand; the two console scripts name functions that exist; the
    package tells type checkers that it is typed."""
    assert re.fullmatch(r"\d+(\.\d+)*((a|b|rc|\.dev)\d+)?", raftnode.__version__)
    package = Path(raftnode.__file__).parent
    assert (package / "py.typed").exists()
    project = tomllib.loads((package.parent / "pyproject.toml").read_text())["project"]
    assert project["scripts"].keys() == {"raftnode", "raftnode-inspect"}
    for target in project["scripts"].values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("published", [owner.__init__ for owner in CONSTRUCTORS], ids=lambda f: f.__qualname__)
def test_constructors_are_documented(published: Any) -> None:
    """What can go wrong is said where a user looks: each constructor says what it raises, or that it raises nothing but
    what an address can be wrong about."""
    assert "Raises" in (published.__doc__ or "")


def test_published_methods_are_documented() -> None:
    """Every method of published interface has a docstring of more than a word."""
    for owner, method in METHODS:
        text = inspect.getdoc(getattr(owner, method)) or ""
        assert len(text.split()) > 5, f"{owner.__name__}.{method}"


@pytest.mark.parametrize("published", [RaftNode, Election, Store, Transport, Client], ids=lambda c: c.__name__)
def test_all_that_is_public_is_documented(published: type) -> None:
    """The classes themselves, and whatever else of them has no underscore."""
    assert (published.__doc__ or "").strip()
    for name, member in inspect.getmembers(published, inspect.isfunction):
        if not name.startswith("_"):
            assert (member.__doc__ or "").strip(), f"{published.__name__}.{name}"


def test_annotations_are_complete() -> None:
    """The package is typed: every parameter and result of a published method has an annotation."""
    for owner, method in METHODS:
        signature = inspect.signature(getattr(owner, method))
        assert signature.return_annotation is not EMPTY, method
        assert all(p.annotation is not EMPTY for p in signature.parameters.values() if p.name != "self"), method


# --- errors ---------------------------------------------------------------------------------------------------


def _drawn_tree() -> dict[str, str]:
    """Child and parent, as drawn at the top of errors.py."""
    parents: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"^( {4}[ |+-]*)([A-Z][A-Za-z]+)\b", line):
            depth, name = len(found[1]), found[2]
            above = [(d, n) for d, n in above if d < depth]
            if above:
                parents[name] = above[-1][1]
            above.append((depth, name))
    return parents


def test_one_tree_of_errors() -> None:
    """Every error derives from RaftnodeError, and the tree that errors.py draws is the one that is there: no class is
    missing, none is only drawn."""
    classes = {
        name: each
        for name, each in vars(errors).items()
        if inspect.isclass(each) and issubclass(each, BaseException) and each.__module__ == errors.__name__
    }
    assert all(issubclass(each, RaftnodeError) for each in classes.values())
    parents = {name: each.__bases__[0].__name__ for name, each in classes.items() if each is not RaftnodeError}
    assert _drawn_tree() == parents
    assert all((each.__doc__ or "").strip() for each in classes.values())


def test_no_error_outside_the_tree() -> None:
    """Modules that raise errors of their own take them from the tree, but for those that never leave their layer."""
    inner = {"ConnectFailed", "OutputFailed", "Overflow"}
    package = Path(raftnode.__file__).parent
    for path in sorted(package.glob("*.py")):
        if path.stem == "__main__":
            continue
        module = importlib.import_module("raftnode" if path.stem == "__init__" else f"raftnode.{path.stem}")
        for name, each in vars(module).items():
            if inspect.isclass(each) and issubclass(each, Exception) and each.__module__ == module.__name__:
                assert issubclass(each, RaftnodeError) or name in inner, f"{module.__name__}.{name}"


@pytest.mark.parametrize("code", messages.CODES)
def test_every_code_has_its_error(code: str) -> None:
    """README, messages: codes are stable words. Each becomes a typed error that carries it, and tells it in its
    text."""
    error = error_for(code, "in words")
    assert isinstance(error, RequestError)
    assert type(error) is not RequestError
    assert error.code == code
    assert "in words" in str(error)
    assert code in str(error)


def test_codes_by_meaning() -> None:
    """Rule 12: which codes say "useless to repeat", "not executed", "open". What a version does not know counts as
    open, which is the safe reading; so does a defect of the node."""
    by_kind: dict[type[RequestError], set[str]] = {}
    for code in messages.CODES:
        by_kind.setdefault(type(error_for(code, "")), set()).add(code)
    assert by_kind == {
        BadRequest: {
            *("bad_request", "unknown_type", "too_large", "key_too_long", "unsupported"),
            *("last_voter", "no_such_member", "not_voter", "wrong_cluster", "wrong_node"),
        },
        Unavailable: {
            *("no_leader", "overloaded", "storage_full", "shutting_down", "not_member", "old_copy"),
            *("change_under_way", "no_live_majority", "no_successor", "not_transferred"),
        },
        NodeDamaged: {"damaged"},
        NotCommitted: {
            "not_committed",
            "internal",
            "wrong_protocol",
        },
    }
    assert type(error_for("a_word_of_tomorrow", "")) is NotCommitted


# --- message types --------------------------------------------------------------------------------------------

MESSAGES: dict[str, dict[str, Any]] = {
    "add_peer": {"address": "127.0.0.1:1"},
    "heartbeat": {"term": 1, "leader": "a:1", "commit_id": 0},
    "vote_request": {"term": 1, "commit_id": 0, "staged": {"address": "a:1", "term": 0, "commit_id": 0}},
    "ping": {},
    "put": {"key": "k", "value": None},
    "get": {"key": "k"},
    "data": {"action": "log", "term": 1, "leader": "a:1", "previous": {"term": 0, "commit_id": 0}},
    "delete": {"key": "k"},
    "peers": {},
    "remove_peer": {"address": "127.0.0.1:1"},
    "replace_peer": {"old": "127.0.0.1:1", "new": "127.0.0.1:2"},
    "transfer_leader": {},
    "timeout_now": {"term": 1, "leader": "a:1"},
    "status": {},
    "entries": {"from": 1, "to": 1},
    "backup": {},
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_message_types(kind: str) -> None:
    """published interface lists the message types: each is a request with these fields and no others required, has an
    answer of the same type, and a failure of it says `"data": false` (or null) with the error's code and words."""
    request = messages.to_request({"type": kind, **MESSAGES[kind]})
    assert request.name == kind
    for field in MESSAGES[kind]:
        less = {name: value for name, value in MESSAGES[kind].items() if name != field}
        with pytest.raises(errors.ProtocolError) as refused:
            messages.to_request({"type": kind, **less})
        assert refused.value.code == "bad_request"
    answer = messages.decode_object(messages.encode(messages.failure(kind, "overloaded", "words", 7)))
    assert (answer["type"], answer["id"]) == (kind, 7)
    assert answer["error"] == {"code": "overloaded", "message": "words"}
    assert answer.get("data") is (None if kind in ("get", "status") else False)
    assert type(
        messages.decode_answer(messages.encode(messages.failure(kind, "overloaded", "words")))
    ) in typing.get_args(messages.AnyAnswer)


def test_all_types_are_listed() -> None:
    """The schema has the types of published interface, `hello` and `snapshot`, once each, split into those of clients
    and of members."""
    assert {*messages.REQUEST_TYPES, *messages.PEER_TYPES} == {*MESSAGES, "hello", "snapshot"}
    assert not set(messages.REQUEST_TYPES) & set(messages.PEER_TYPES)
    tags = [msgspec.inspect.type_info(each).tag for each in typing.get_args(messages.AnyRequest)]  # type: ignore
    assert sorted(tags) == sorted([*MESSAGES, "hello", "snapshot"])
