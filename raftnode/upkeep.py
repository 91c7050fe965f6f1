"""The commands of `raftnode` that work on the directory of a stopped node. Layer 5. What they do is in the modules that
they are called like."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from raftnode.config import canonical_address
from raftnode.errors import ConfigError
from raftnode.recover import Plan, plan
from raftnode.recover import recover as recover_directory

_KEYS_SHOWN = 10


def addresses(text: str) -> list[str]:
    """The addresses in an option, each in its one spelling. Raises ConfigError."""
    return [canonical_address(address) for address in text.split(",") if address.strip()]


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


COMMANDS = [recover]
