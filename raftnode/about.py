"""What a directory says of its node: the lines of `raftnode-inspect info`, and their table, one column a directory.
Layer 5."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from raftnode.inspection import Directory, NamespaceSize
from raftnode.namespaces import Behind
from raftnode.output import Output, Point, human, or_dash, utc
from raftnode.table import Column, escape

_TITLE_WIDTH = 16


class NodeLine(Struct, tag_field="record", tag="node", kw_only=True):
    """The node that a directory belongs to."""

    directory: str
    node: str | None
    address: str | None
    cluster: str | None
    format: int | None
    term: int | None
    voted_for: str | None
    commit_id: int | None
    behind: dict[str, Any] | None
    entries: int
    staged: int | None
    first_kept: Point | None
    last: Point | None
    membership: dict[str, Any] | None
    witnesses: dict[str, Any]
    keys: int
    sizes: dict[str, int]
    readers: list[dict[str, Any]]
    damaged: bool | UnsetType = UNSET
    reason: str | UnsetType = UNSET


class NamespaceLine(Struct, tag_field="record", tag="namespace", kw_only=True):
    """How much a namespace of a directory holds."""

    directory: str
    namespace: str
    keys: int
    bytes: int


def node_line(opened: Directory) -> NodeLine:
    """What an open directory says of its node."""
    facts, damage = opened.facts, list(opened.facts.damage)
    membership = facts.memberships[-1] if facts.memberships else None
    line = NodeLine(
        directory=str(opened.path),
        node=facts.node,
        address=facts.address,
        cluster=facts.cluster,
        format=facts.format,
        term=None if facts.ballot is None else facts.ballot.term,
        voted_for=None if facts.ballot is None else facts.ballot.voted_for,
        commit_id=facts.commit_id,
        behind=None if facts.behind is None else _split(facts.behind),
        entries=opened.kept,
        staged=None if facts.commit_id is None else max(0, opened.last - facts.commit_id),
        first_kept=_point(opened, opened.first, damage),
        last=_point(opened, opened.last, damage),
        membership=None if membership is None else msgspec.structs.asdict(membership),
        witnesses={address: msgspec.to_builtins(witness) for address, witness in sorted(facts.witnesses.items())},
        keys=opened.keys,
        sizes=opened.sizes(),
        readers=[
            {"pid": reader.pid, "thread": reader.thread, "txn": reader.transaction}
            for reader in opened.readers()
            if reader.pid != os.getpid()
        ],
    )
    damage += [problem for problem in opened.tail_damage if not any(problem in told for told in damage)]
    if damage:
        line.damaged, line.reason = True, "; ".join(dict.fromkeys(damage))
    return line


def _split(behind: Behind) -> dict[str, Any]:
    namespace, _, key = behind.key.partition("\0")
    return {"after": behind.after, "namespace": namespace, "key": key}


def namespace_line(path: Path, size: NamespaceSize) -> NamespaceLine:
    """How much a namespace holds."""
    return NamespaceLine(directory=str(path), namespace=size.namespace, keys=size.keys, bytes=size.bytes)


def _point(opened: Directory, commit_id: int, damage: list[str]) -> Point | None:
    """One end of the kept log; notes what is wrong with it."""
    if opened.first > opened.last:
        return None
    record = next(opened.entries(commit_id, commit_id))
    if record.damage:
        damage.append(record.damage)
    entry = record.entry
    return None if entry is None else Point(entry.commit_id, entry.term, entry.time, f"{entry.checksum:08x}")


# --- as a table -----------------------------------------------------------------------------------------------


def print_nodes(output: Output, lines: list[NodeLine]) -> None:
    """One directory as titles and texts; several side by side."""
    rows = _side_by_side([_grouped(line) for line in lines])
    if len(lines) == 1:
        heading = output.style(bold=True) or str
        for title, texts in rows:
            output.text(f"{heading(f'{title:<{_TITLE_WIDTH}}')}{escape(texts[0])}".rstrip())
    else:
        table = output.table([Column(""), *(Column(line.directory, least=16) for line in lines)])
        for title, texts in rows:
            table.add([title, *texts])
        table.finish()
    red = output.style(fg="red") or str
    for line in lines:
        if isinstance(line.reason, str):
            output.text(red(f"DAMAGED: {escape(line.reason)}"))


def _grouped(line: NodeLine) -> dict[str, list[str]]:
    """The texts of a directory by their title."""
    found: dict[str, list[str]] = {}
    for title, text in _rows(line):
        found.setdefault(title, []).append(text)
    return found


def _side_by_side(nodes: list[dict[str, list[str]]]) -> Iterator[tuple[str, list[str]]]:
    """Rows of a title and one text a directory; a title that several texts have is said once."""
    for title in dict.fromkeys(title for node in nodes for title in node):
        texts = [node.get(title, []) for node in nodes]
        for n in range(max(map(len, texts))):
            yield "" if n else title, [text[n] if n < len(text) else "" for text in texts]


def _rows(line: NodeLine) -> Iterator[tuple[str, str]]:
    yield "node", line.node or "-"
    yield "address", line.address or "- (not founded yet)"
    yield "cluster", line.cluster or "-"
    yield "format", or_dash(line.format)
    yield "term", or_dash(line.term)
    yield "voted for", line.voted_for or "- (the vote is free)"
    yield "commit_id", f"{or_dash(line.commit_id)} committed on disk"
    yield "flush", "none under way" if line.behind is None else _flush_text(line.behind)
    yield "staged", f"{or_dash(line.staged)} entries"
    yield "log", f"{line.entries} entries kept"
    for title, point in (("first kept", line.first_kept), ("last", line.last)):
        yield title, "-" if point is None else f"commit_id {point.commit_id}, term {point.term}"
        yield f"{title} made", "-" if point is None else f"{utc(point.time)}, checksum {point.checksum}"
    yield from _member_rows(line.membership or {})
    for address, witness in line.witnesses.items():
        yield "remembers", f"{address}: {_witness_text(witness)}"
    yield "keys", str(line.keys)
    for name, size in line.sizes.items():
        yield name, f"{human(size)} ({size} bytes)"
    if not line.readers:
        yield "readers", "none besides this one"
    for reader in line.readers:
        holds = "idle" if reader["txn"] is None else f"reads snapshot {reader['txn']}"
        yield "readers", f"process {reader['pid']}, {holds}"


def _flush_text(behind: dict[str, Any]) -> str:
    """How far the values have come on disk."""
    where = f"{behind['key']!r} in namespace {behind['namespace']!r}"
    return f"under way: on disk the values from {where} on are as of commit_id {behind['after']}"


def _member_rows(membership: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for title, members in (("voters", membership.get("voters")), ("learners", membership.get("learners"))):
        for address, node in (members or {}).items():
            yield title, f"{address}  {node or '(not met yet)'}"
        if not members:
            yield title, "none"
    for new, old in (membership.get("replaces") or {}).items():
        yield "replaces", f"{new} takes the place of {old}"


def _witness_text(witness: dict[str, Any]) -> str:
    """What is remembered of a member's promises."""
    parts = [f"term {witness['term']}"]
    if witness["vote"]:
        parts.append(f"voted for {witness['vote']}")
    for name, id in (("held", witness["held"]), ("committed", witness["floor"])):
        if id["commit_id"]:
            parts.append(f"{name} {id['commit_id']} of term {id['term']}")
    return ", ".join(parts)


def print_namespaces(output: Output, lines: list[NamespaceLine], several: bool) -> None:
    """How much each namespace holds, a line each."""
    columns = [Column("namespace", least=16), Column("keys", right=True), Column("bytes", right=True)]
    table = output.table([*([Column("directory", least=16)] if several else []), *columns])
    for line in lines:
        table.add([*([line.directory] if several else []), line.namespace, str(line.keys), str(line.bytes)])
    table.finish()
