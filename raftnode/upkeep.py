"""The commands of `raftnode` that an operator needs now and then: on the directory of a stopped node, and for backups.
Layer 5. What they do is in `repair`, `shrink`, `recover` and `archive`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from raftnode.archive import restore as restore_file
from raftnode.archive import take
from raftnode.config import DEFAULT_ADDRESS, canonical_address
from raftnode.errors import ConfigError
from raftnode.output import progress
from raftnode.recover import Plan, plan
from raftnode.recover import recover as recover_directory
from raftnode.repair import repair as repair_directory
from raftnode.shrink import shrink

_KEYS_SHOWN = 10
_STEPS = 1000
"""Of a progress bar."""


def addresses(text: str) -> list[str]:
    """The addresses in an option, each in its one spelling. Raises ConfigError."""
    return [canonical_address(address) for address in text.split(",") if address.strip()]


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--node", default="", metavar="HOST:PORT,...", envvar="RAFTNODE_NODE",
              help="Members to take entries from, in turn.  [default: all others]")  # fmt: skip
@click.option("--timeout", default=10.0, show_default=True, type=click.FloatRange(0.001), metavar="SECONDS",
              help="Longest time for one answer of a member.")  # fmt: skip
@click.option("--dry-run", "is_dry", is_flag=True, help="Say what would be done. Status 5 when something is damaged.")
def repair(directory: Path, node: str, timeout: float, is_dry: bool) -> None:
    """Put right what is damaged in DIR, the data directory of a stopped node.

    Every record is checked. Damaged log entries are taken from the members, and only where what is left of the log
    proves them; committed values are made anew from the log. What can't be proved is refused (status 3), with the
    reason and what to do, and nothing is changed. Nothing is ever cut off.
    """
    if not repair_directory(directory, addresses(node), tell=click.echo, is_dry=is_dry, timeout=timeout):
        raise SystemExit(5)


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
def compact(directory: Path) -> None:
    """Give the free space in DIR, the data directory of a stopped node, back to the file system.

    A node uses the space of what was deleted again, but its file never shrinks by itself. This writes what is in use to
    a new file, which then takes the place of the old one; a kill at any moment leaves one or the other, whole.
    """
    before, after = shrink(directory)
    click.echo(f"{directory}: {before} bytes before, {after} after")


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--members", default="", metavar="HOST:PORT,...",
              help="Further members of the new cluster, which start with --join and empty directories.")  # fmt: skip
@click.option("--yes", is_flag=True, help="Don't ask.")
def recover(directory: Path, members: str, yes: bool) -> None:
    """Found a new cluster on DIR, the data directory of a stopped node, after the majority of the old one is lost.

    First it says what is kept, and what is or may be lost; then it asks. The node is the new cluster's only voter;
    others join it with empty directories. Members of the old cluster can never mix with it again.

    With several directories left, let `raftnode-inspect best DIR...` say which one to take.
    """
    agreed, others = plan(directory), addresses(members)
    for line in _told(agreed):
        click.echo(line)
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError("not done: nobody is there to ask. Say --yes if you agree")
        click.confirm(f"Make {agreed.address} a new cluster, with what it has?", abort=True)
    cluster = recover_directory(agreed, others)
    click.echo(f"Done: cluster {cluster}, with {agreed.address} as its only voter. Start it with the same --volume.")
    joining = ", ".join(others) or "more"
    click.echo(
        f"For {joining}: `raftnode serve --join {agreed.address}`, each with its own --ip and an empty --volume."
    )


def _told(agreed: Plan) -> Iterator[str]:
    """A plan in words."""
    last = agreed.last
    yield f"{agreed.directory}: node {agreed.node} at {agreed.address}, of the cluster of {', '.join(agreed.voters)}"
    yield f"Kept: everything up to entry {last.commit_id} of term {last.term}, the last one in its log."
    if last.commit_id > agreed.committed:
        shown = ", ".join(f"{change.namespace}/{change.key}" for change in agreed.staged[:_KEYS_SHOWN])
        more = f" and {len(agreed.staged) - _KEYS_SHOWN} keys more" if len(agreed.staged) > _KEYS_SHOWN else ""
        yield (
            f"Of the entries after {agreed.committed} it is not known whether they were committed; they will be"
            + (f": {shown}{more}" if shown else "")
        )
    yield (
        f"Lost: what the others have committed after entry {last.commit_id}. Nothing here can tell what that was, or "
        "whether there was any."
    )
    for words in agreed.missing:
        yield f"Lost for certain: {words}"
    yield (
        "If directories of a majority of the voters are left, do not go on: start those nodes instead, and nothing "
        "that was acknowledged is lost."
    )


@click.command()
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--node", default=DEFAULT_ADDRESS, show_default=True, metavar="HOST:PORT", envvar="RAFTNODE_NODE",
              help="Node to take it from: any member.")  # fmt: skip
@click.option("--timeout", default=10.0, show_default=True, type=click.FloatRange(0.001), metavar="SECONDS",
              help="Longest time for one answer of the node.")  # fmt: skip
def backup(file: Path, node: str, timeout: float) -> None:
    """Take a backup of a live cluster into FILE: all values, as of one commit_id.

    It has every write that was acknowledged before the command began. The nodes go on serving meanwhile. FILE is lines
    of JSON, with a checksum for each value and one for all; it gets its name when it is whole.
    """
    with _progress("backup") as advance:
        end = take(canonical_address(node.split(",")[0]), file, timeout=timeout, advance=advance)
    size = file.stat().st_size
    click.echo(f"{file}: {end.keys} keys as of commit_id {end.commit_id} (term {end.term}), {size} bytes")


@click.command()
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--ip", default=DEFAULT_ADDRESS, show_default=True, metavar="HOST:PORT", envvar="RAFTNODE_IP",
              help="Address of the new node, as `raftnode serve` will be given it.")  # fmt: skip
def restore(file: Path, directory: Path, ip: str) -> None:
    """Make DIR, which must be empty, the data directory of a new node with what is in the backup FILE.

    The node is the only one of a new cluster; others join it with --join. The whole file is checked first. A restore
    that is cut off can be run again.
    """
    address = canonical_address(ip)
    with _progress("restore") as advance:
        cluster, end = restore_file(file, directory, address, advance=advance)
    click.echo(f"{directory}: node at {address}, cluster {cluster}: {end.keys} keys as of commit_id {end.commit_id}")


@contextlib.contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, if that is a terminal; told how much is done, of how much."""
    shown = 0
    with progress(_STEPS, label) as advance:

        def go_on(done: int, total: int) -> None:
            nonlocal shown
            steps = _STEPS * done // max(total, 1)
            advance(max(0, steps - shown))
            shown = max(shown, steps)

        yield go_on


COMMANDS = [repair, compact, recover, backup, restore]
