"""Imports only go down, and the consensus has no clock, thread, socket, file or randomness of its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import raftnode

PACKAGE = Path(raftnode.__file__).parent

LAYERS: dict[str, set[str]] = {
    "0 facts": {"config", "errors", "messages", "version"},
    "1 pure": {"cache", "consensus", "framing", "mailbox", "namespaces", "records", "replay"},
    "2 store": {"compaction", "environment", "primary", "states", "store", "tail"},
    "2 transport": {"blocking", "connections", "passes", "streams", "transport"},
    "2 log": {"log"},
    "3 driver": {"backups", "election", "flushing", "handshake", "members", "requests", "snapshots"},
    "4 node": {"client", "joining", "raftnode"},
    "5 faces": {
        "__main__",
        "about",
        "archive",
        "chronology",
        "cli",
        "comparing",
        "comparison",
        "inspection",
        "inspector",
        "lines",
        "output",
        "overlay",
        "past",
        "recover",
        "repair",
        "selection",
        "shrink",
        "supervised",
        "survey",
        "table",
        "upkeep",
        "verification",
    },
}
BESIDE = "testing"

PURE = {"cache", "consensus", "framing", "namespaces", "records", "replay"}
PURE_IMPORTS = {
    "__future__",
    "bisect",
    "collections",
    "dataclasses",
    "hashlib",
    "itertools",
    "msgspec",
    "random",
    "re",
    "struct",
    "typing",
    "zlib_ng",
}
"""What a pure module may import from outside; `random` only for the name of the type that is passed in."""


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name != "__pycache__")


def top_name(path: Path) -> str:
    """`consensus` for raftnode/consensus/raft.py, `store` for raftnode/store.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layer_of(name: str) -> str:
    found = [layer for layer, names in LAYERS.items() if name in names]
    assert len(found) == 1, f"raftnode.{name} is in no layer: give it its place in the table above and in the map"
    return found[0]


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted module, line) of each import that happens when the program runs."""
    tree = ast.parse(path.read_text())
    for_types = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            assert node.module is not None
            if node.module == "raftnode":
                yield from ((f"raftnode.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_go_down(path: Path) -> None:
    """A module imports its own group or a lower layer; the three groups of layer 2 do not know each other; nothing of
    the product imports `testing` (package docstring)."""
    own = top_name(path)
    if own in (BESIDE, "__init__"):
        return
    for module, line in imports(path):
        if not module.startswith("raftnode."):
            continue
        other = module.split(".")[1]
        assert other != BESIDE, f"{path.name}:{line}: the product does not import raftnode.testing"
        mine, theirs = layer_of(own), layer_of(other)
        assert mine == theirs or theirs[0] < mine[0], f"{path.name}:{line}: {own} ({mine}) imports {other} ({theirs})"


@pytest.mark.parametrize(
    "path",
    [p for p in modules() if top_name(p) in PURE],
    ids=lambda p: p.stem,
)
def test_pure_modules_have_no_effects(path: Path) -> None:
    """Time and chance are passed in: a pure module imports nothing that has them, opens no file, and names of `random`
    only the type of its argument (rule 11)."""
    for module, line in imports(path):
        outside = module.split(".")[0]
        assert outside == "raftnode" or outside in PURE_IMPORTS, f"{path.name}:{line} imports {module}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "random":
            assert node.attr == "Random", f"{path.name}:{node.lineno} uses random.{node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"open", "input", "print", "hash", "id"}, f"{path.name}:{node.lineno}"


def test_every_module_is_on_the_map() -> None:
    """The package docstring names each module, so that a newcomer finds it there."""
    text = raftnode.__doc__ or ""
    for path in modules():
        name = top_name(path)
        if name not in {"__init__", "__main__", "version"}:
            assert name in text, f"raftnode.{name} is not on the map in raftnode/__init__.py"
