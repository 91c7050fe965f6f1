"""What must hold of the members of a run in which they came and went. Part of `judge`.

* at the end all nodes have the membership of the last committed change; they are its voters, and nothing is left to be
  done: no learner, no member that is to be replaced;
* the log makes the memberships one voter at a time;
* nobody came or went whom no change names that may have been made;
* a node that was removed answers no read with the newest value and acknowledges no write.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, Final, NamedTuple

from raftnode.messages import Members
from raftnode.testing.history import Operation
from raftnode.testing.known_log import KnownLog
from raftnode.testing.roll import Change, Seen

GRACE_S: Final = 10.0
"""After a removal is committed, what the removed node has passed on to the leader may still be answered; and a leader
that has just been elected may take what it passes on, until it knows that the removal is committed."""

_REFUSALS: Final = ("peer_refused", "stranger_refused")

Found = tuple[str, str, str]
"""Kind, where, words: see `judge.Problem`."""


class End(NamedTuple):
    """What a final member has on disk."""

    name: str
    address: str | None
    node: str | None
    membership: dict[str, Any] | None


def check_members(
    ends: list[End], known: KnownLog, history: Iterable[Operation], seen: list[Seen], changes: list[Change]
) -> Iterator[Found]:
    """Everything that the module's text tells."""
    yield from _check_ends(ends, known, seen[-1].members)
    yield from _check_steps(known)
    yield from _check_asked(seen, changes)
    yield from _check_removed(history, seen)


def _check_ends(ends: list[End], known: KnownLog, last: Members) -> Iterator[Found]:
    for end in ends:
        members = end.membership or {}
        if members.get("commit_id") != last.commit_id or members.get("voters", {}).keys() != last.voters.keys():
            words = f"it has {members}; the newest that was committed is {last}"
            yield "membership_differs", end.name, words
        elif members.get("learners") or members.get("replaces"):
            yield "change_not_finished", end.name, f"members are still on their way in or out: {members}"
        elif members["voters"].get(end.address) != end.node:
            yield "membership_differs", end.name, f"node {end.node} at {end.address} is not a voter of {members}"
    made = [line for line in known if line.kind == "members"]
    if made and (made[-1].commit_id or 0) > last.commit_id:
        words = f"entry {made[-1].commit_id} made {made[-1].voters}; the newest that was seen is {last}"
        yield "membership_differs", "log", words
    if (line := known.at(last.commit_id)) is not None and line.kind != "members":
        yield "membership_differs", "log", f"entry {last.commit_id} made no membership, but is {line}"
    if {end.address for end in ends} != last.voters.keys():
        yield "membership_differs", "cluster", f"the voters are {list(last.voters)}, the nodes {ends}"


def _check_steps(known: KnownLog) -> Iterator[Found]:
    """One voter at a time (thesis 4.1)."""
    unknown = known.unknown
    made = [line for line in known if line.voters is not None]
    for before, after in pairwise(made):
        assert before.voters is not None and after.voters is not None and before.commit_id and after.commit_id  # noqa: PT018
        if any(before.commit_id < position < after.commit_id for position in unknown):
            continue  # there may be another one between them
        changed = {
            address
            for address in before.voters.keys() | after.voters.keys()
            if (address in before.voters) != (address in after.voters)
            or (before.voters[address] not in ("", after.voters[address]))
        }
        if len(changed) > 1:
            words = f"entries {before.commit_id} and {after.commit_id} differ in the votes of {sorted(changed)}"
            yield "two_at_once", "log", words


def _check_asked(seen: list[Seen], changes: list[Change]) -> Iterator[Found]:
    """Who comes or goes is named by a change that was not refused, and that was asked for before."""
    for before, after in pairwise(seen):
        old, new = _ids(before.members), _ids(after.members)
        for address in sorted(old.keys() | new.keys()):
            if address in old and address in new and old[address] in ("", new[address]):
                continue
            named = (c for c in changes if address in c.addresses and c.began < after.first and c.outcome != "refused")
            if next(named, None) is None:
                words = f"{address} has come, gone or changed with entry {after.members.commit_id}: {after.members}"
                yield "nobody_asked", "members", words


def _ids(members: Members) -> dict[str, str]:
    return {**members.voters, **members.learners}


def _check_removed(history: Iterable[Operation], seen: list[Seen]) -> Iterator[Found]:
    """`seen` and the history have one clock."""
    out = list(_times_out(seen))
    for operation in history:
        if operation.outcome != "ok" or operation.is_local:
            continue
        for address, begin, end in out:
            if operation.node == address and begin + GRACE_S < operation.invoked and (operation.returned or 0.0) < end:
                words = f"{address}, which was removed {operation.invoked - begin:.1f} s before, answered {operation}"
                yield "served_by_removed", "history", words


def _times_out(seen: list[Seen]) -> Iterator[tuple[str, float, float]]:
    """(address, from, to): when who had been a member was surely none."""
    since: dict[str, float] = {}
    for before, after in pairwise(seen):
        old, new = _ids(before.members), _ids(after.members)
        since.update(dict.fromkeys(old.keys() - new.keys(), after.first))
        for address in new.keys() & since.keys():
            yield address, since.pop(address), before.last
    for address, begin in since.items():
        yield address, begin, float("inf")


def is_expected(event: dict[str, Any], node: str, seen: list[Seen]) -> bool:
    """True for an error that a node has to log because of a change of the members."""
    if len(seen) < 2:
        return False
    if event.get("event") == "disk_was_lost":
        return "." in node
    if event.get("event") in _REFUSALS:
        return event.get("code") in ("not_member", "wrong_node")
    port = node.partition(".")[0].removeprefix("node-")
    was_out = any(not any(a.endswith(f":{port}") for a in _ids(known.members)) for known in seen)
    return event.get("event") == "not_member" and was_out
