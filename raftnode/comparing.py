"""The commands of raftnode-inspect that look at directories as a whole, and at several together. Layer 5.

What they print; what is computed is in `verification` (verify), `comparison` (diff, best) and `chronology` (timeline).
"""

from __future__ import annotations

from pathlib import Path

import click
from msgspec import Struct

from raftnode.config import Settings
from raftnode.output import EPILOG, Output, one_directory, progress, report_damage
from raftnode.table import escape
from raftnode.verification import Problem, Verified, records_in
from raftnode.verification import verify as verify_directory

# --- verify ---------------------------------------------------------------------------------------------------


class ProblemLine(Struct, tag_field="record", tag="problem", kw_only=True):
    """Something that must not be."""

    check: str
    commit_id: int | None
    to: int | None
    namespace: str | None
    key: str | None
    damaged: bool = True
    reason: str


class VerifiedLine(Struct, tag_field="record", tag="verified", kw_only=True):
    """The last line: what was looked at."""

    directory: str
    node: str | None
    address: str | None
    first: int
    last: int
    commit_id: int | None
    entries: int
    values: int
    replayed_to: int | None
    not_replayed: str | None
    pages_checked: bool
    problems: int
    first_bad: int | None


@click.command(
    help="""Read everything and check it: is this directory as a node must have left it?

    Every page of LMDB, every fact of the node against the log and each other, every entry in the chain of checksums,
    order and terms, every committed value by its own checksum and by a replay of the log (if the log begins at 1).
    Exit status 0 means that all of it is as it must be; 4 that something is not.

    Each finding is a line "problem": check (pages, facts, entry, order, value, replay, promise), commit_id, to,
    namespace, key, reason. The last line is "verified": directory, node, address, first, last, commit_id, entries and
    values (how many were read), replayed_to (the values were held against the log up to there; else null, and
    not_replayed says why), pages_checked (false if a node wrote all the time), problems, first_bad (the first bad
    commit_id).

    A running node is read in snapshots of a second, so that its file does not grow; its newest state in one.
    """,
    epilog=EPILOG,
)
@one_directory
def verify(output: Output, directory: Path, as_json: bool) -> None:
    red = output.style(fg="red") or str

    def found(problem: Problem) -> None:
        output.damage += 1
        if as_json:
            output.json(
                ProblemLine(
                    check=problem.check,
                    commit_id=problem.commit_id,
                    to=problem.to,
                    namespace=problem.namespace,
                    key=problem.key,
                    reason=problem.reason,
                )
            )
        else:
            output.text(red(f"DAMAGED: {escape(problem.reason)}"))

    map_bytes = Settings().map_bytes
    with progress(records_in(directory, map_bytes), "verifying") as advance:
        verified = verify_directory(directory, map_bytes, found, advance)
    if as_json:
        output.json(_verified_line(verified))
    else:
        for line in _verified_text(verified):
            output.text(line)
    report_damage(output, directory)


def _verified_line(verified: Verified) -> VerifiedLine:
    facts = verified.facts
    return VerifiedLine(
        directory=str(verified.path),
        node=facts.node,
        address=facts.address,
        first=verified.first,
        last=verified.last,
        commit_id=facts.commit_id,
        entries=verified.entries,
        values=verified.values,
        replayed_to=verified.replayed_to,
        not_replayed=verified.why_not_replayed or None,
        pages_checked=verified.pages_checked,
        problems=verified.problems,
        first_bad=verified.first_bad,
    )


def _verified_text(verified: Verified) -> list[str]:
    facts = verified.facts
    lines = [
        f"node {facts.node or '?'} at {facts.address or '?'}: {verified.entries} entries read "
        f"({verified.first} to {verified.last}), {verified.values} values"
    ]
    if verified.replayed_to is None:
        lines.append(f"the values were not held against the log: {verified.why_not_replayed}")
    if not verified.pages_checked:
        lines.append("the pages of LMDB were not looked at: a node writes to them all the time")
    if verified.is_whole:
        lines.append(f"whole: the values are what the log makes of nothing up to entry {verified.replayed_to}")
    elif verified.first_bad is None:
        lines.append(f"{verified.problems} problems; the log is whole")
    else:
        lines.append(f"{verified.problems} problems; the first bad entry is {verified.first_bad}")
    if verified.is_whole and verified.replayed_to is None:
        lines[-1] = "whole, as far as that can be told"
    return lines


COMMANDS = [verify]
