"""The commands of raftnode-inspect that look at directories as a whole, and at several together. Layer 5.

What they print; what is computed is in `verification` (verify), `survey` and `comparison` (diff, best) and `chronology`
(timeline). The records of their `--json`, besides those in `inspector`; the help of each command has the fields:

    problem, verified                                      verify
    member, pair, key, compared                            diff
    candidate, holding, loss, lost_key, elsewhere, best    best
    term, pause, clock                                     timeline
    unreadable                                             a directory that can't be read, of several
    contradiction                                          what can't be in a cluster that works as it should
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from raftnode import records
from raftnode.chronology import Term, TermTally, chronicle
from raftnode.comparison import (
    Candidate,
    Evidence,
    Holding,
    Loss,
    Parting,
    Seen,
    StoredMarks,
    Touched,
    Verdict,
    compare,
    key_differences,
    needs_scan,
    part,
    touched,
)
from raftnode.config import Settings
from raftnode.errors import StoreDamaged, StoreError
from raftnode.inspection import Directory
from raftnode.output import (
    EPILOG,
    EXIT_DAMAGED,
    EXIT_UNUSABLE,
    Output,
    many_directories,
    one_directory,
    options,
    or_dash,
    print_table,
    progress,
    report_damage,
    utc,
)
from raftnode.survey import Marks, Survey, SurveyApart, Tally
from raftnode.table import Column, escape
from raftnode.verification import Problem, Verified, records_in
from raftnode.verification import verify as verify_directory

EXIT_USAGE: Final = 2
EXIT_CONTRADICTION: Final = 5
EXIT_UNRELATED: Final = 6
_KEYS_SHOWN: Final = 5

EPILOG_OF_MANY: Final = (
    f"{EPILOG} Of several directories, status 3 goes before 4, and what the others tell is printed all the same. "
    "5 the directories contradict each other in what is committed; 6 they are of different clusters."
)


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


# --- several directories --------------------------------------------------------------------------------------


class UnreadableLine(Struct, tag_field="record", tag="unreadable", kw_only=True):
    """A directory that can't be read."""

    directory: str
    damaged: bool
    reason: str


class ContradictionLine(Struct, tag_field="record", tag="contradiction", kw_only=True):
    """What can't be in a cluster that works as it should."""

    reason: str


def _end(output: Output, words: str, status: int) -> NoReturn:
    output.complain(words)
    _exit(output, status)


def _exit(output: Output, status: int) -> NoReturn:
    """End with a status of our own, after all that was printed."""
    output.spool.flush()
    raise click.exceptions.Exit(status)


def _check_distinct(output: Output, directories: Sequence[Path]) -> None:
    """The same directory twice would speak twice."""
    seen: dict[tuple[int, int], Path] = {}
    for directory in directories:
        with contextlib.suppress(OSError):
            stat = (directory / records.DATA_FILE).stat()
            first = seen.setdefault((stat.st_dev, stat.st_ino), directory)
            if first is not directory:
                _end(output, f"{first} and {directory} are the same directory: give each once", EXIT_USAGE)


def _check_one_cluster(output: Output, clusters: Sequence[tuple[Path, str | None]]) -> None:
    """Those that were never founded belong to none."""
    found: dict[str, Path] = {}
    for directory, cluster in clusters:
        if cluster is not None:
            found.setdefault(cluster, directory)
    if len(found) > 1:
        whose = ", ".join(f"{directory} of {cluster}" for cluster, directory in found.items())
        words = f"these are directories of different clusters, which have nothing in common: {whose}"
        _end(output, words, EXIT_UNRELATED)


def _survey_all(
    output: Output, directories: Sequence[Path], as_json: bool, label: str, tally: Callable[[], Tally | None]
) -> list[Survey]:
    """Read every directory, each in a process of its own, and print what is wrong with each."""
    _check_distinct(output, directories)
    surveys = []
    for directory in directories:
        reading = SurveyApart(directory, Settings().map_bytes, tally())
        with progress(reading.length, f"{label} {directory}") as advance:
            surveys.append(reading.result(advance))
    _check_one_cluster(output, [(found.path, found.known.cluster) for found in surveys if found.is_readable])
    for found in surveys:
        _tell_damage(output, found, as_json)
    if not any(found.is_readable for found in surveys):
        _exit(output, _failed(output, surveys) or EXIT_DAMAGED)
    return surveys


def _tell_damage(output: Output, found: Survey, as_json: bool) -> None:
    reasons = [found.failure] if found.failure else [*(found.facts.damage if found.facts else ())]
    reasons += [damage.reason for damage in found.damage]
    is_damage = found.is_damaged or not found.failure
    for reason in reasons:
        output.damage += is_damage
        if as_json:
            output.json(UnreadableLine(directory=str(found.path), damaged=is_damage, reason=reason))
        else:
            words = reason if str(found.path) in reason else f"{found.path}: {reason}"
            style = output.style(fg="red") or str
            output.text(style(f"{'DAMAGED' if is_damage else 'UNREADABLE'}: {escape(words)}"))


def _failed(output: Output, surveys: Sequence[Survey]) -> int:
    """The exit status, when directories could not be read."""
    failed = [found for found in surveys if found.failure and not found.is_damaged]
    for found in failed:
        output.complain(found.failure)
    return EXIT_UNUSABLE if failed else 0


def _finish(output: Output, surveys: Sequence[Survey], contradictions: bool) -> None:
    """End with the status that fits; damage alone is seen to by who runs the commands."""
    for found in surveys:
        if found.is_readable and not found.is_whole:
            output.complain(
                f"{found.path} is damaged, marked above: with the node stopped, see what `raftnode repair {found.path} "
                "--dry-run` says"
            )
    status = _failed(output, surveys)
    if contradictions:
        _exit(output, EXIT_CONTRADICTION)
    if status:
        _exit(output, status)


def _contradict(output: Output, as_json: bool, reasons: Sequence[str]) -> None:
    for reason in reasons:
        if as_json:
            output.json(ContradictionLine(reason=reason))
        else:
            output.text((output.style(fg="red", bold=True) or str)(f"CONTRADICTION: {escape(reason)}"))


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


# --- diff -----------------------------------------------------------------------------------------------------


class MemberLine(Struct, tag_field="record", tag="member", kw_only=True):
    """How far a directory goes."""

    directory: str
    node: str | None
    address: str | None
    first: int
    last: int
    commit_id: int | None
    staged: int | None
    agrees_with: list[str]
    same_node: list[str]


class Side(Struct):
    """What one of the two has where they part."""

    term: int
    checksum: str
    committed: bool


class PairLine(Struct, tag_field="record", tag="pair", kw_only=True):
    """How far two logs are equal."""

    one: str
    other: str
    equal_to: int
    differ_at: int | None
    differ_in: str | None
    one_has: Side | None
    other_has: Side | None


class KeyLine(Struct, tag_field="record", tag="key", kw_only=True):
    """A key whose values differ."""

    namespace: str
    key: str
    values: dict[str, dict[str, Any] | None]
    damaged: bool | UnsetType = UNSET


class ComparedLine(Struct, tag_field="record", tag="compared", kw_only=True):
    """The last line: how it was compared."""

    by: str
    why: str | None
    commit_id: int | None
    differ_at: int | None
    keys: int | None
    contradiction: bool


_PROOF: Final = (
    "Logs are compared by their rolling checksums: equal ones mean equal histories as written. What was damaged since, "
    "`verify` finds, or --scan."
)


@click.command(
    help=f"""Where members differ: from which entry on, who agrees with whom, and in which keys.

    {_PROOF} Without --scan the place is found by halving; when an entry that decides is damaged, or the log has a hole,
    all is read, and the last line says so.

    Staged entries may differ, that is no fault; committed ones never: then the exit status is 5.

    Values are compared at the commit_id that all have reached; what a member has changed since then is left out, unless
    its log differs before.

    Lines: "member" for each directory: node, address, first, last, commit_id, staged, agrees_with (directories whose
    logs are equal as far as both go), same_node (directories of the same node: copies). "pair": one, other, equal_to,
    differ_at (null: nowhere), differ_in (term or checksum), one_has and other_has (term, checksum, committed). "key":
    namespace, key, values (by directory: modified, version, and with --values the value; null for none; directories
    that can't tell are left out). The last line is "compared": by (checksums or scan), why (it was scanned), commit_id
    (of the values), differ_at (the first of all), keys (how many differ; null with --no-keys), contradiction.
    """,
    epilog=EPILOG_OF_MANY,
)
@many_directories
@options(
    click.option("--scan", is_flag=True, help="Read all entries and check them, however long it takes."),
    click.option("--no-keys", is_flag=True, help="Compare the logs only."),
    click.option("--values", is_flag=True, help="Show the values that differ."),
)
def diff(output: Output, directories: tuple[Path, ...], as_json: bool, scan: bool, no_keys: bool, values: bool) -> None:
    if len(directories) < 2:
        raise click.UsageError("to differ takes two: give several directories")
    _check_distinct(output, directories)
    with contextlib.ExitStack() as stack:
        opened, failures = _open_all(output, directories, as_json, stack)
        _check_one_cluster(output, [(one.path, one.facts.cluster) for one in opened])
        why = "asked for" if scan else _why_scan(opened)
        marks: list[Marks] = [StoredMarks(one) for one in opened]
        if why is not None:
            paths = [one.path for one in opened]
            stack.close()  # LMDB refuses a child process what its parent has open
            marks = _scanned(output, paths, as_json)
            opened = [_open_held(path, stack) for path in paths]
        partings = {(one, other): part(marks[one], marks[other]) for one, other in combinations(range(len(opened)), 2)}
        pairs = [_pair_line(opened, marks, which, parting) for which, parting in partings.items()]
        _print_logs(output, as_json, opened, pairs)
        compared = ComparedLine(
            by="checksums" if why is None else "scan",
            why=why,
            commit_id=None,
            differ_at=min((pair.differ_at for pair in pairs if pair.differ_at is not None), default=None),
            keys=None,
            contradiction=False,
        )
        if not no_keys and opened and all(one.facts.commit_id is not None for one in opened):
            compared.commit_id = min(one.facts.commit_id or 0 for one in opened)
            _print_keys(output, as_json, values, opened, partings, compared)
        reasons = _pair_contradictions(pairs)
        if compared.keys:
            reasons.append(f"{compared.keys} keys have other values at commit_id {compared.commit_id}")
        compared.contradiction = bool(reasons)
        _contradict(output, as_json, reasons)
        if as_json:
            output.json(compared)
        else:
            output.text(_compared_text(compared))
    for failure in failures:
        output.complain(str(failure))
    if compared.contradiction:
        _exit(output, EXIT_CONTRADICTION)
    if any(not isinstance(failure, StoreDamaged) for failure in failures):
        _exit(output, EXIT_UNUSABLE)


def _open_all(
    output: Output, directories: Sequence[Path], as_json: bool, stack: contextlib.ExitStack
) -> tuple[list[Directory], list[StoreError]]:
    """Open what can be opened, each in one look, and print what is wrong with the facts."""
    opened: list[Directory] = []
    failures: list[StoreError] = []
    for directory in directories:
        try:
            one = _open_held(directory, stack)
        except StoreError as error:
            failures.append(error)
            found = Survey(path=directory, failure=str(error), is_damaged=isinstance(error, StoreDamaged))
            _tell_damage(output, found, as_json)
            continue
        opened.append(one)
        _tell_damage(output, Survey(path=directory, facts=one.facts), as_json)
    if len(opened) < 2:
        for failure in failures:
            output.complain(str(failure))
        _end(output, "fewer than two directories can be read: there is nothing to compare", _status_of(failures))
    return opened, failures


def _open_held(directory: Path, stack: contextlib.ExitStack) -> Directory:
    """Open for as long as `stack` lasts, in one look: all that is compared must be of one commit_id."""
    one = stack.enter_context(Directory(directory, Settings().map_bytes))
    one.hold_s = math.inf
    return one


def _status_of(failures: Sequence[StoreError]) -> int:
    return EXIT_DAMAGED if all(isinstance(failure, StoreDamaged) for failure in failures) else EXIT_UNUSABLE


def _why_scan(opened: Sequence[Directory]) -> str | None:
    """The reason for which halving can't be trusted; None when it can."""
    marks = [StoredMarks(one) for one in opened]
    for (n, one), (m, other) in combinations(enumerate(opened), 2):
        parting = part(marks[n], marks[m])
        for side in (one, other):
            if needs_scan(side, parting):
                return f"{side.path} is damaged"
    return None


def _scanned(output: Output, paths: Sequence[Path], as_json: bool) -> list[Marks]:
    """Read whole logs, and print what is wrong with them."""
    surveys = []
    for path in paths:
        reading = SurveyApart(path, Settings().map_bytes)
        with progress(reading.length, f"reading {path}") as advance:
            found = reading.result(advance)
        if not found.is_readable:
            raise StoreDamaged(found.failure)
        _tell_damage(
            output,
            Survey(path=path, facts=msgspec.structs.replace(found.known, damage=[]), damage=found.damage),
            as_json,
        )
        surveys.append(found)
    return list(surveys)


def _pair_line(
    opened: Sequence[Directory], marks: Sequence[Marks], which: tuple[int, int], parting: Parting
) -> PairLine:
    one, other = which
    sides: list[Side] = []
    if parting.differ_at is not None:
        for n in which:
            mark, committed = marks[n].mark(parting.differ_at), opened[n].facts.commit_id or 0
            assert mark is not None, "where two logs differ, both can be read"
            sides.append(Side(mark.term, f"{mark.checksum:08x}", parting.differ_at <= committed))
    return PairLine(
        one=str(opened[one].path),
        other=str(opened[other].path),
        equal_to=parting.equal_to,
        differ_at=parting.differ_at,
        differ_in=None if not sides else "term" if sides[0].term != sides[1].term else "checksum",
        one_has=sides[0] if sides else None,
        other_has=sides[1] if sides else None,
    )


def _pair_contradictions(pairs: Sequence[PairLine]) -> list[str]:
    """Two members never have different entries committed at one position."""
    return [
        f"{pair.one} and {pair.other} have both committed entry {pair.differ_at}, and it is not the same"
        for pair in pairs
        if pair.one_has is not None
        and pair.other_has is not None
        and pair.one_has.committed
        and pair.other_has.committed
    ]


_MEMBER_COLUMNS = [
    Column("directory", least=12),
    Column("address", least=9, rank=1),
    Column("first", right=True, rank=2),
    Column("last", right=True),
    Column("committed", right=True),
    Column("staged", right=True),
    Column("agrees with", least=12),
]


def _print_logs(output: Output, as_json: bool, opened: Sequence[Directory], pairs: Sequence[PairLine]) -> None:
    members = []
    for one in opened:
        name, facts = str(one.path), one.facts
        agrees = [
            pair.other if pair.one == name else pair.one
            for pair in pairs
            if name in (pair.one, pair.other) and pair.differ_at is None
        ]
        same = [str(other.path) for other in opened if other is not one and other.facts.node == facts.node]
        members.append(
            MemberLine(
                directory=name,
                node=facts.node,
                address=facts.address,
                first=one.first,
                last=one.last,
                commit_id=facts.commit_id,
                staged=None if facts.commit_id is None else max(0, one.last - facts.commit_id),
                agrees_with=agrees,
                same_node=[] if facts.node is None else same,
            )
        )
    if as_json:
        for line in (*members, *pairs):
            output.json(line)
        return
    print_table(
        output, _MEMBER_COLUMNS, [_Shown(_member_cells(m, len(opened))) for m in members], lambda s: s.cells, None
    )
    output.text("")
    for member in members:
        if member.same_node:
            output.text(escape(f"{member.directory} is of the same node as {', '.join(member.same_node)}: copies"))
    for pair in pairs:
        output.text(escape(_pair_text(pair)))


def _member_cells(line: MemberLine, count: int) -> list[str]:
    agrees = "all" if len(line.agrees_with) == count - 1 else ", ".join(line.agrees_with) or "none"
    return [
        line.directory,
        line.address or "-",
        str(line.first),
        str(line.last),
        or_dash(line.commit_id),
        or_dash(line.staged),
        agrees,
    ]


def _pair_text(pair: PairLine) -> str:
    words = f"{pair.one} and {pair.other} are equal up to entry {pair.equal_to}"
    if pair.differ_at is None or pair.one_has is None or pair.other_has is None:
        return words
    sides = [
        f"term {side.term}, {side.checksum}, {'committed' if side.committed else 'staged'}"
        for side in (pair.one_has, pair.other_has)
    ]
    return f"{words}, and differ from entry {pair.differ_at} on: {sides[0]} against {sides[1]}"


_KEY_COLUMNS = [
    Column("namespace", least=9),
    Column("key", least=12),
    Column("directory", least=12),
    Column("modified", right=True),
    Column("version", right=True),
]


def _print_keys(
    output: Output,
    as_json: bool,
    values: bool,
    opened: Sequence[Directory],
    partings: dict[tuple[int, int], Parting],
    compared: ComparedLine,
) -> None:
    """The keys that differ; their number goes to the last line."""
    assert compared.commit_id is not None, "who compares values has one"
    starts = [compared.commit_id + 1] * len(opened)
    for (one, other), parting in partings.items():
        if parting.differ_at is not None:
            for n in (one, other):
                starts[n] = min(starts[n], parting.differ_at)

    def doubtful(path: Path, reason: str) -> None:
        _tell_damage(output, Survey(path=path, failure=reason, is_damaged=True), as_json)

    compared.keys = 0
    columns = [*_KEY_COLUMNS, Column("value", least=16)] if values else _KEY_COLUMNS
    table = None if as_json else output.table(columns)
    with progress(sum(one.keys for one in opened), "comparing keys") as advance:
        for found in key_differences(opened, compared.commit_id, starts, advance, doubtful):
            compared.keys += 1
            damaged = any(seen.damage for seen in found.seen.values())
            output.damage += damaged
            if table is None:
                told = {str(path): _seen_object(seen, values) for path, seen in found.seen.items()}
                output.json(
                    KeyLine(namespace=found.namespace, key=found.key, values=told, damaged=True if damaged else UNSET)
                )
                continue
            for path, seen in found.seen.items():
                table.add([found.namespace, found.key, str(path), *_seen_cells(seen, values)], seen.damage)
    if table is not None and compared.keys:
        output.text("")
        table.finish()


def _seen_object(seen: Seen, values: bool) -> dict[str, Any] | None:
    if seen.record is None:
        return {"damaged": True, "reason": seen.damage} if seen.damage else None
    told: dict[str, Any] = {"modified": seen.record.modified, "version": seen.record.version or None}
    if values:
        told["value"] = _json_value(seen.record.value)
    return told | ({"damaged": True, "reason": seen.damage} if seen.damage else {})


def _json_value(value: Raw) -> Any:
    """A value on one line; as text when it is no JSON any more."""
    try:
        return msgspec.json.decode(value)
    except (ValueError, RecursionError):
        return bytes(value).decode(errors="backslashreplace")


def _seen_cells(seen: Seen, values: bool) -> list[str]:
    record = seen.record
    if record is None:
        return ["none", "-", *(["-"] if values else [])]
    text = bytes(memoryview(record.value)[:400]).decode(errors="ignore")
    return [str(record.modified), str(record.version or "?"), *([text] if values else [])]


def _compared_text(compared: ComparedLine) -> str:
    how = "by checksums" if compared.why is None else f"by reading all ({compared.why})"
    if compared.keys is None:
        keys = "the keys were not compared"
    elif compared.keys:
        keys = f"{compared.keys} keys differ at commit_id {compared.commit_id}"
    else:
        keys = f"no key differs at commit_id {compared.commit_id}"
    where = (
        "the logs are equal as far as they go" if compared.differ_at is None else f"they part at {compared.differ_at}"
    )
    return f"compared {how}: {where}; {keys}"


# --- best -----------------------------------------------------------------------------------------------------


class Last(Struct):
    """The end of a log: what elections compare."""

    term: int
    commit_id: int


class CandidateLine(Struct, tag_field="record", tag="candidate", kw_only=True):
    """A directory that may be kept."""

    directory: str
    node: str | None
    address: str | None
    voter: bool
    copy_of: str | None
    old_copy: list[str]
    last: Last
    commit_id: int | None
    term: int | None
    loses: int
    loses_committed: int
    best: bool
    damaged: bool


class HoldingLine(Struct, tag_field="record", tag="holding", kw_only=True):
    """A row of entries, and who has them."""

    first: int
    last: int
    source: str
    directories: list[str]
    voters: int
    majority: bool
    committed: bool
    damaged: bool = False


class LossLine(Struct, tag_field="record", tag="loss", kw_only=True):
    """What is lost when one directory is kept, and another is not."""

    directory: str
    source: str
    first: int
    last: int
    entries: int
    committed: int
    keys: int


class LostKeyLine(Struct, tag_field="record", tag="lost_key", kw_only=True):
    """A key that a loss concerns."""

    directory: str
    source: str
    namespace: str
    key: str
    commit_id: int
    committed: bool


class ElsewhereLine(Struct, tag_field="record", tag="elsewhere", kw_only=True):
    """An entry that is known to have been, and is in none of the directories."""

    commit_id: int
    term: int
    reason: str


class BestLine(Struct, tag_field="record", tag="best", kw_only=True):
    """The last line: what all of them tell together."""

    directory: str
    voters: dict[str, str] | None
    missing: list[str]
    sound: list[str]
    majority: bool
    committed_to: int
    because: list[str]
    says: list[str]


@click.command(
    help="""What is committed for certain, what only some hold, and which directory to keep.

    Give all directories that are left, of stopped nodes best. What counts as proof is in the text of
    raftnode/comparison.py. Everything acknowledged is committed; of an entry that is not known to be committed, nobody
    can tell from the disks whether it was acknowledged.

    Lines: "candidate" for each directory: node, address, voter (it is the node that the members know there), copy_of
    (a newer directory of the same node), old_copy (what others remember, and it does not keep), last (term and
    commit_id of its last entry), commit_id, term, loses and loses_committed (entries of the others that it lacks),
    best, damaged. "holding": the entries first to last as they stand in source: directories that have them, voters (how
    many), majority, committed (for certain). "loss": what is lost by keeping directory and not source; "lost_key": the
    keys that it concerns, with the last entry that changes each. "elsewhere": entries that a node remembers of another,
    and that are in none of these. The last line is "best": directory, voters, missing (voters without a directory
    here), sound (voters with a directory that is whole, and no old copy as far as the others remember), majority (of
    the voters are sound: nothing that was acknowledged is missing, if none is an old copy), committed_to, because,
    says.
    """,
    epilog=EPILOG_OF_MANY,
)
@many_directories
def best(output: Output, directories: tuple[Path, ...], as_json: bool) -> None:
    surveys = _survey_all(output, directories, as_json, "reading", lambda: None)
    verdict = compare(surveys)
    candidates = [candidate for candidate in verdict.candidates if candidate.survey.is_readable]
    lost = {(loss.source, loss.first, loss.last): _lost_keys(loss) for c in candidates for loss in c.losses}
    assert verdict.best is not None, "one can be read"
    says = list(_says(verdict, verdict.best))
    if as_json:
        for candidate in candidates:
            output.json(_candidate_line(candidate, verdict))
        for holding in verdict.holdings:
            output.json(_holding_line(holding))
        for candidate in candidates:
            for loss in candidate.losses:
                _print_loss_json(output, candidate, loss, lost[loss.source, loss.first, loss.last])
        for found in verdict.elsewhere:
            output.json(ElsewhereLine(commit_id=found.id.commit_id, term=found.id.term, reason=found.words))
    else:
        _print_candidates(output, candidates, verdict)
        _print_holdings(output, verdict)
        _print_losses(output, candidates, lost)
    _contradict(output, as_json, verdict.contradictions)
    if as_json:
        output.json(
            BestLine(
                directory=str(verdict.best.survey.path),
                voters=None if verdict.membership is None else verdict.membership.voters,
                missing=verdict.missing,
                sound=verdict.sound,
                majority=verdict.is_majority,
                committed_to=verdict.certain,
                because=[_because(found) for found in verdict.evidence],
                says=says,
            )
        )
    else:
        output.text("")
        for line in says:
            output.text(escape(line))
    _finish(output, surveys, bool(verdict.contradictions))


def _lost_keys(loss: Loss) -> list[Touched]:
    with Directory(loss.source, Settings().map_bytes) as opened:
        return sorted(touched(opened, loss.first, loss.last).values(), key=lambda change: change.commit_id)


def _lost_entries(candidate: Candidate) -> tuple[int, int]:
    """How many entries a choice loses, and how many of them are committed for certain."""
    losses = candidate.losses
    return sum(loss.entries for loss in losses), sum(loss.certain for loss in losses)


def _candidate_line(candidate: Candidate, verdict: Verdict) -> CandidateLine:
    found, (loses, committed) = candidate.survey, _lost_entries(candidate)
    facts = found.known
    return CandidateLine(
        directory=str(found.path),
        node=facts.node,
        address=facts.address,
        voter=candidate.voter is not None,
        copy_of=None if candidate.copy_of is None else str(candidate.copy_of),
        old_copy=candidate.lacks,
        last=Last(found.newest.term, found.newest.commit_id),
        commit_id=facts.commit_id,
        term=None if facts.ballot is None else facts.ballot.term,
        loses=loses,
        loses_committed=committed,
        best=candidate is verdict.best,
        damaged=not found.is_whole,
    )


def _holding_line(holding: Holding) -> HoldingLine:
    return HoldingLine(
        first=holding.first,
        last=holding.last,
        source=str(holding.source),
        directories=[str(path) for path in holding.holders],
        voters=holding.voters,
        majority=holding.is_majority,
        committed=holding.is_certain,
    )


def _print_loss_json(output: Output, candidate: Candidate, loss: Loss, keys: Sequence[Touched]) -> None:
    directory, source = str(candidate.survey.path), str(loss.source)
    output.json(
        LossLine(
            directory=directory,
            source=source,
            first=loss.first,
            last=loss.last,
            entries=loss.entries,
            committed=loss.certain,
            keys=len(keys),
        )
    )
    for change in keys:
        output.json(
            LostKeyLine(
                directory=directory,
                source=source,
                namespace=change.namespace,
                key=change.key,
                commit_id=change.commit_id,
                committed=change.commit_id <= loss.certain_to,
            )
        )


_CANDIDATE_COLUMNS = [
    Column("directory", least=12),
    Column("address", least=9, rank=1),
    Column("last entry", right=True),
    Column("of term", right=True),
    Column("committed", right=True),
    Column("loses", right=True),
    Column("what it is", least=20),
]
_HOLDING_COLUMNS = [
    Column("entries", right=True),
    Column("held by", least=12),
    Column("voters", right=True),
    Column("committed"),
]


def _print_candidates(output: Output, candidates: Sequence[Candidate], verdict: Verdict) -> None:
    lines = [_candidate_line(candidate, verdict) for candidate in candidates]
    damage = output.damage
    print_table(output, _CANDIDATE_COLUMNS, [_Shown(_candidate_cells(line)) for line in lines], lambda s: s.cells, None)
    assert output.damage == damage, "what is damaged was counted before"


class _Shown(Struct):
    """A row of a table."""

    cells: list[str]
    damaged: bool = False


def _candidate_cells(line: CandidateLine) -> list[str]:
    what = ["the one to keep"] if line.best else []
    if line.damaged:
        what.append("damaged")
    if line.copy_of is not None:
        what.append(f"no newer than {line.copy_of}, of the same node")
    if line.old_copy:
        what.append("an old copy")
    if not line.voter:
        what.append("no voter: the members know another node there")
    return [
        line.directory,
        line.address or "-",
        str(line.last.commit_id),
        str(line.last.term),
        "?" if line.commit_id is None else str(line.commit_id),
        str(line.loses),
        "; ".join(what) or "-",
    ]


def _print_holdings(output: Output, verdict: Verdict) -> None:
    voters = len(verdict.membership.voters) if verdict.membership is not None else 0
    output.text("")
    rows = []
    for holding in verdict.holdings:
        known = "perhaps: a majority holds it" if holding.is_majority else "not known"
        holders = ", ".join(str(path) for path in holding.holders)
        certainty = "for certain" if holding.is_certain else known
        rows.append(_Shown([_span(holding.first, holding.last), holders, f"{holding.voters} of {voters}", certainty]))
    print_table(output, _HOLDING_COLUMNS, rows, lambda shown: shown.cells, None)


def _print_losses(
    output: Output, candidates: Sequence[Candidate], lost: dict[tuple[Path, int, int], list[Touched]]
) -> None:
    output.text("")
    for candidate in candidates:
        path = candidate.survey.path
        if not candidate.losses:
            output.text(escape(f"Keeping {path} loses nothing that is in these directories."))
        for loss in candidate.losses:
            keys = lost[loss.source, loss.first, loss.last]
            span = _span(loss.first, loss.last)
            words = f"Keeping {path} loses {loss.entries} of the entries in {loss.source} ({span}), "
            words += f"{loss.certain or 'none'} of them committed for certain"
            if keys:
                words += ": " + ", ".join(f"{change.namespace}/{change.key}" for change in keys[:_KEYS_SHOWN])
                words += f" and {len(keys) - _KEYS_SHOWN} keys more" if len(keys) > _KEYS_SHOWN else ""
            output.text(escape(words))


def _because(found: Evidence) -> str:
    return f"entry {found.id.commit_id} of term {found.id.term}: {found.words}"


def _says(verdict: Verdict, best_one: Candidate) -> Iterator[str]:
    """The verdict in words."""
    voters = len(verdict.membership.voters) if verdict.membership is not None else 0
    path, newest = best_one.survey.path, best_one.survey.newest
    proofs = [found for found in verdict.evidence if found.id.commit_id == verdict.certain]
    if proofs:
        yield f"Committed for certain: everything up to entry {verdict.certain}. {_because(proofs[-1])}."
    else:
        yield "Nothing is committed for certain."
    yield f"Keep {path}: its last entry, {newest.commit_id} of term {newest.term}, would win an election among these."
    if verdict.is_majority:
        yield (
            f"Directories of a majority of the {voters} voters are here: if each is as its node left it, and no older "
            f"copy, nothing that was acknowledged is missing from {path}."
        )
    else:
        missing = f"; missing: {', '.join(verdict.missing)}" if verdict.missing else ""
        yield (
            f"Fewer than a majority of the {voters} voters are here with a sound directory ({len(verdict.sound)} of "
            f"{voters}{missing}): what the others committed after entry {newest.commit_id} is not known, and nothing "
            "here can tell."
        )
    for candidate in verdict.candidates:
        survey = candidate.survey
        if candidate.lacks:
            yield f"{survey.path} is an old copy: others remember that {', '.join(candidate.lacks)}."
        if survey.is_readable and not survey.is_whole:
            yield f"{survey.path} is damaged: repair it (`raftnode repair {survey.path} --dry-run`) and compare again."
    for found in verdict.elsewhere:
        yield f"Known to be missing: {_because(found)}, and none of these directories has it."


# --- timeline -------------------------------------------------------------------------------------------------


class TermLine(Struct, tag_field="record", tag="term", kw_only=True):
    """A term; without entries, `first` and all that tells of them are null."""

    term: int
    first: int | None
    last: int | None
    entries: int
    committed: int
    from_time: int | None
    to_time: int | None
    silence_ms: int | None
    leader: str | None
    leader_known_by: str | None
    votes: dict[str, list[str]]
    kinds: dict[str, int]
    clients: dict[str, int]
    other_clients: int
    directories: dict[str, int]


class PauseLine(Struct, tag_field="record", tag="pause", kw_only=True):
    """Time without an entry, within a term."""

    term: int
    commit_id: int
    from_time: int
    to_time: int
    ms: int


class ClockLine(Struct, tag_field="record", tag="clock", kw_only=True):
    """The clock showed an earlier time than at the entry before."""

    term: int
    commit_id: int
    from_time: int
    to_time: int
    ms: int
    same_leader: bool


@click.command(
    help="""Terms, leaders, elections, pauses and clocks over time, merged from several members.

    Who led a term is told only where it is known: a log entry does not say who appended it, and votes of old terms are
    forgotten. Restarts leave no trace. Times are those of the leaders' clocks.

    Lines: "term": term, first and last (commit_ids; null for a term of which no entry is here: an election without a
    leader, or one that left nothing), entries, committed, from_time, to_time (ms since 1970), silence_ms (since the
    last entry of an earlier term), leader, leader_known_by, votes (known ones: by candidate, the voters), kinds,
    clients (writes by each; other_clients counts those beyond a thousand), directories (how many of the entries
    each has). "pause": nothing was written for --pause seconds before commit_id. "clock": at commit_id the leader's
    clock showed an earlier time than before, by ms; same_leader is false where a new term began: then two clocks may
    differ.
    """,
    epilog=EPILOG_OF_MANY,
)
@many_directories
@click.option(
    "--pause",
    type=click.FloatRange(min=0.001),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Tell of times without an entry that are as long.",
)
def timeline(output: Output, directories: tuple[Path, ...], as_json: bool, pause: float) -> None:
    pause_ms = math.ceil(1000 * pause)
    surveys = _survey_all(output, directories, as_json, "reading", lambda: TermTally(pause_ms))
    readable = [found for found in surveys if found.is_readable]
    newest = max(readable, key=lambda found: found.newest)
    memberships = newest.known.memberships
    terms = list(chronicle(readable, memberships[-1] if memberships else None))
    if as_json:
        for term in terms:
            for line in _term_lines(term):
                output.json(line)
    else:
        rows = (_Shown(cells) for term in terms for line in _term_lines(term) for cells in [_line_cells(line)])
        print_table(output, _TIMELINE_COLUMNS, rows, lambda shown: shown.cells, None)
    contradictions = [term.contradiction for term in terms if term.contradiction]
    _contradict(output, as_json, contradictions)
    _finish(output, surveys, bool(contradictions))


_TIMELINE_COLUMNS = [
    Column("time"),
    Column("term", right=True),
    Column("commit_ids", right=True),
    Column("leader", least=9),
    Column("what", least=24),
]


def _term_lines(term: Term) -> Iterator[TermLine | PauseLine | ClockLine]:
    row, silence = term.row, term.silence
    yield TermLine(
        term=term.term,
        first=None if row is None else row.first,
        last=None if row is None else row.last,
        entries=0 if row is None else row.entries,
        committed=term.committed,
        from_time=None if row is None else row.since,
        to_time=None if row is None else row.until,
        silence_ms=None if silence is None else silence.until - silence.since,
        leader=None if term.leader is None else term.leader.address,
        leader_known_by=None if term.leader is None else term.leader.words,
        votes=term.votes,
        kinds={} if row is None else row.kinds,
        clients={} if row is None else row.clients,
        other_clients=0 if row is None else row.other_clients,
        directories={str(path): count for path, count in term.held.items()},
    )
    events: list[PauseLine | ClockLine] = []
    if row is not None:
        for found in row.pauses:
            ms = found.until - found.since
            events.append(
                PauseLine(term=term.term, commit_id=found.commit_id, from_time=found.since, to_time=found.until, ms=ms)
            )
        jumps = [(found.commit_id, found.since, found.until, True) for found in row.setbacks]
        if silence is not None and silence.until < silence.since:
            jumps.append((silence.commit_id, silence.since, silence.until, False))
        for commit_id, since, until, is_same in jumps:
            events.append(
                ClockLine(
                    term=term.term,
                    commit_id=commit_id,
                    from_time=since,
                    to_time=until,
                    ms=since - until,
                    same_leader=is_same,
                )
            )
    yield from sorted(events, key=lambda line: line.commit_id)


def _line_cells(line: TermLine | PauseLine | ClockLine) -> list[str]:
    if isinstance(line, PauseLine):
        what = f"nothing was written for {_seconds(line.ms)} before this"
        return [utc(line.to_time), str(line.term), str(line.commit_id), "", what]
    if isinstance(line, ClockLine):
        whose = "the leader's clock went" if line.same_leader else "this leader's clock, or a new one, is"
        return [utc(line.to_time), str(line.term), str(line.commit_id), "", f"{whose} back by {_seconds(line.ms)}"]
    votes = ", ".join(f"{len(voters)} for {candidate}" for candidate, voters in line.votes.items())
    if line.first is None or line.last is None or line.from_time is None:
        return ["-", str(line.term), "-", line.leader or "?", f"no entry of it is here; known votes: {votes or 'none'}"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(line.kinds.items()))
    clients = f"{len(line.clients)} client{'' if len(line.clients) == 1 else 's'}"
    what = f"{kinds}; {clients}" + (" and more" if line.other_clients else "")
    if line.committed < line.entries:
        what += f"; {line.entries - line.committed} not known to be committed"
    if line.silence_ms is not None and line.silence_ms > 0:
        what += f"; {_seconds(line.silence_ms)} after the last entry before"
    return [utc(line.from_time), str(line.term), f"{line.first}-{line.last}", line.leader or "?", what]


def _seconds(ms: int) -> str:
    seconds = ms / 1000
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


COMMANDS = [verify, diff, best, timeline]
