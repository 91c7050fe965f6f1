"""The command `raftnode`: serve a node, try a cluster, and talk to one from the shell. Layer 5.

Exit statuses: 0 done; 1 the key is not there, or an unexpected failure; 2 wrong usage or a wrong request; 3 not
executed (no node reached, no leader, no room) or, for a node, a data directory that can't be used; 4 the outcome of a
write is open; 5 a damaged record.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from raftnode import log
from raftnode.client import Client
from raftnode.config import (
    DEFAULT_ADDRESS,
    DEFAULT_DATA_DIR,
    DEFAULT_NAMESPACE,
    DEFAULT_TIMEOUT_S,
    Settings,
    parse_address,
)
from raftnode.errors import BadRequest, ConfigError, NodeDamaged, NotCommitted, RaftnodeError, StoreError, Unavailable
from raftnode.raftnode import RaftNode
from raftnode.store import STORE_TYPES
from raftnode.upkeep import COMMANDS as UPKEEP
from raftnode.version import __version__

_OTHER_FILES = 256
"""Open files that are no client's: the store, the log, links to members, surplus connections."""

_STATUSES: tuple[tuple[type[RaftnodeError], int], ...] = (
    (BadRequest, 2),
    (ConfigError, 2),
    (Unavailable, 3),
    (StoreError, 3),
    (NotCommitted, 4),
    (NodeDamaged, 5),
)


def _fail(error: RaftnodeError) -> NoReturn:
    click.echo(f"raftnode: {error}", err=True)
    raise SystemExit(next((status for kind, status in _STATUSES if isinstance(error, kind)), 1))


def _serve_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option("--ip", default=DEFAULT_ADDRESS, show_default=True, metavar="HOST:PORT", envvar="RAFTNODE_IP",
                     help="Address by which the members know this node; it listens there, too."),
        click.option("--listen", metavar="HOST:PORT", envvar="RAFTNODE_LISTEN",
                     help="Address to listen on, where that is another (NAT, containers).  [default: as --ip]"),
        click.option("--peers", default="", metavar="HOST:PORT,...", envvar="RAFTNODE_PEERS",
                     help="The other members. None: a cluster of one. Counts when the store is empty."),
        click.option("--join", default="", metavar="HOST:PORT,...", envvar="RAFTNODE_JOIN",
                     help="Join a cluster that goes on already: members to ask. Counts when the store is empty."),
        click.option("--volume", default=DEFAULT_DATA_DIR, show_default=True, metavar="DIR", envvar="RAFTNODE_VOLUME",
                     type=click.Path(path_type=Path), help="Data directory; made if need be."),
        click.option("--timeout", default=DEFAULT_TIMEOUT_S, show_default=True, type=click.IntRange(1),
                     metavar="SECONDS", envvar="RAFTNODE_TIMEOUT",
                     help="Longest time that a request waits for its answer."),
        click.option("--store", type=click.Choice(STORE_TYPES), default="database", show_default=True,
                     envvar="RAFTNODE_STORE", help="'database' is durable; 'memory' is for trials, and forgets."),
        click.option("--log-level", type=click.Choice(log.LEVELS), default="info", show_default=True,
                     envvar="RAFTNODE_LOG_LEVEL", help="What is logged."),
        click.option("--log-json/--log-text", default=None, help="Default: text on a terminal, JSON elsewhere."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _client_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option("--node", default=DEFAULT_ADDRESS, show_default=True, metavar="HOST:PORT,...",
                     envvar="RAFTNODE_NODE", help="Node to ask; several with commas are tried in turn."),
        click.option("--timeout", default=10.0, show_default=True, type=click.FloatRange(0.001), metavar="SECONDS",
                     help="Longest time for the whole command."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


_namespace = click.option("--namespace", default=DEFAULT_NAMESPACE, show_default=True, help="Namespace of the key.")


class _Commands(click.Group):
    """Errors of ours become a line on stderr and the exit status."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except RaftnodeError as error:
            _fail(error)


@click.group(cls=_Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="raftnode")
@_serve_options
@click.pass_context
def cli(context: click.Context, /, **options: Any) -> None:
    """A persistent, replicated key-value store.

    Without a command it serves, as `raftnode serve` does.
    """
    typed = click.core.ParameterSource.COMMANDLINE
    given = [name for name in options if context.get_parameter_source(name) is typed]
    if context.invoked_subcommand is None:
        _serve(**options)
    elif given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(
            f"{flags}: give options after the command, as in `raftnode {context.invoked_subcommand} ...`"
        )


@cli.command()
@_serve_options
def serve(**options: Any) -> None:
    """Run a node until SIGTERM or Ctrl-C.

    On three servers, each with the same set of addresses:

        raftnode serve --ip 10.0.0.1:5001 --peers 10.0.0.2:5001,10.0.0.3:5001 --volume /var/lib/raftnode

    A fourth one, later, begins with an empty directory:

        raftnode serve --ip 10.0.0.4:5001 --join 10.0.0.1:5001,10.0.0.2:5001 --volume /var/lib/raftnode
    """
    _serve(**options)


def _serve(
    ip: str,
    listen: str | None,
    peers: str,
    join: str,
    volume: Path,
    timeout: int,
    store: str,
    log_level: str,
    log_json: bool | None,
) -> None:
    log.setup(log_level, as_json=log_json)
    if peers.strip() and join.strip():
        raise ConfigError("give --peers to found a cluster, or --join to join one that goes on already: not both")
    options = {
        "listen": listen,
        "data_dir": volume,
        "store_type": store,
        "connections": _room_for_connections(),
        "join": join.split(",") if join.strip() else None,
    }
    RaftNode(ip, peers.split(","), timeout, **options).serve()


def _room_for_connections() -> int:
    """Every connection is an open file: ask for as many as this process may have, and take no more clients than fit,
    so that there are always some left for the store and the other members."""
    wanted = Settings().connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted + _OTHER_FILES if hard == resource.RLIM_INFINITY else min(hard, wanted + _OTHER_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return max(1, min(wanted, limit - _OTHER_FILES))


@cli.command(context_settings={"ignore_unknown_options": True})  # a value may be -5
@click.argument("key")
@click.argument("value")
@click.option("--string", "as_string", is_flag=True, help="Take VALUE as text even where it is JSON.")
@_namespace
@_client_options
def put(key: str, value: str, as_string: bool, namespace: str, node: str, timeout: float, as_json: bool) -> None:
    """Write VALUE under KEY and wait until a majority has it on disk.

    A VALUE that is JSON is taken as such (5, true, {"a": 1}), anything else as text. With - it is read from standard
    input.
    """
    text = _read_text() if value == "-" else value
    with Client(node, timeout=timeout) as client:
        done = client.put(key, text if as_string else _json_or_text(text), namespace)
    click.echo(json.dumps(done) if as_json else f"committed as {done['commit_id']}, version {done['version']}")


def _read_text() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        _fail(ConfigError(f"standard input is not UTF-8: {error.reason} at byte {error.start}"))


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return text


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


@cli.command()
@click.argument("key")
@click.option("--local", is_flag=True, help="Read what this node has, which may be old, without asking the others.")
@_namespace
@_client_options
def get(key: str, local: bool, namespace: str, node: str, timeout: float, as_json: bool) -> None:
    """Print the value of KEY: text as it is, anything else as JSON. Status 1 when there is none."""
    with Client(node, timeout=timeout) as client:
        record = client.get_record(key, namespace, consistency="local" if local else "linearizable")
    value = record["value"]
    if as_json:
        click.echo(json.dumps(record, ensure_ascii=False))
    elif record["version"]:
        click.echo(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    if not record["version"]:
        if not as_json:
            click.echo(f"raftnode: no key {key!r} in namespace {namespace!r}", err=True)
        raise SystemExit(1)


@cli.command()
@click.argument("key")
@_namespace
@_client_options
def delete(key: str, namespace: str, node: str, timeout: float, as_json: bool) -> None:
    """Delete KEY. Status 1 when there was none."""
    with Client(node, timeout=timeout) as client:
        done = client.delete(key, namespace)
    if as_json:
        click.echo(json.dumps(done))
    elif done["replaced"] is not None:
        click.echo(f"deleted by {done['commit_id']}")
    if done["replaced"] is None:
        if not as_json:
            click.echo(f"raftnode: no key {key!r} in namespace {namespace!r}", err=True)
        raise SystemExit(1)


@cli.command()
@_client_options
def peers(node: str, timeout: float, as_json: bool) -> None:
    """List the members, who leads, and who answers the asked node."""
    with Client(node, timeout=timeout) as client:
        found = client.peers()
    if as_json:
        click.echo(json.dumps(found))
        return
    for peer in found["peers"]:
        role = "leader" if peer == found["leader"] else "learner" if peer in found.get("learners", ()) else ""
        words = [peer, role, "" if peer in found["live"] else "not answering"]
        click.echo("  ".join(word for word in words if word))


@cli.command("remove-peer")
@click.argument("address", metavar="HOST:PORT")
@click.option(
    "--force", is_flag=True, help="Also when too few of the others answer: nothing can be written until they do."
)
@_client_options
def remove_peer(address: str, force: bool, node: str, timeout: float, as_json: bool) -> None:
    """Take a member out of the cluster. Its node stands aside from then on; stop it, and delete its directory."""
    with Client(node, timeout=timeout) as client:
        _tell_change(client.remove_peer(address, force=force), as_json)


@cli.command("replace-peer")
@click.argument("old", metavar="OLD")
@click.argument("new", metavar="NEW")
@_client_options
def replace_peer(old: str, new: str, node: str, timeout: float, as_json: bool) -> None:
    """Let the node at NEW take the place of OLD, which may be dead.

    Start the new one with `raftnode serve --ip NEW --join ...`, before this or after it. It gets the data, then a vote,
    and then OLD is taken out, all by itself.
    """
    with Client(node, timeout=timeout) as client:
        _tell_change(client.replace_peer(old, new), as_json)


@cli.command("transfer-leader")
@click.option("--to", default="", metavar="HOST:PORT", help="Who is to lead.  [default: who has most of the log]")
@_client_options
def transfer_leader(to: str, node: str, timeout: float, as_json: bool) -> None:
    """Let another voter lead. No write is lost: those that come meanwhile wait, for an election timeout at most."""
    with Client(node, timeout=timeout) as client:
        leader = client.transfer_leader(to)
    click.echo(json.dumps({"leader": leader}) if as_json else f"{leader} leads")


def _tell_change(done: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(done))
        return
    members = done["membership"]
    words = [f"{len(members['voters'])} voters: {', '.join(members['voters'])}"]
    if learners := members.get("learners"):
        words.append(f"learners: {', '.join(learners)}")
    words += [f"{new} takes the place of {old}" for new, old in members.get("replaces", {}).items()]
    click.echo(f"committed as {done['commit_id']}; " + "; ".join(words))


@cli.command()
@_client_options
def status(node: str, timeout: float, as_json: bool) -> None:
    """Show what the asked node knows of itself and the cluster."""
    with Client(node, timeout=timeout) as client:
        found = client.status()
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, fact in found.items():
        if name == "members":
            for address, member in fact.items():
                state = "answers" if member["live"] else "not answering"
                match = "" if member["match"] is None else f", holds the log up to {member['match']}"
                role = "" if member["voter"] else ", learner"
                click.echo(f"{'member':12} {address} (node {member['node'] or 'unknown'}){role}: {state}{match}")
        elif name == "storage":
            sizes = ", ".join(f"{key} {_size(value)}" for key, value in fact.items() if key != "full")
            click.echo(f"{name:12} {sizes}" + ("; FULL: writes are refused" if fact["full"] else ""))
        elif name == "snapshots":
            for address, sent in fact.items():
                size = f"{sent['keys']} keys, {_size(sent['bytes'])} so far"
                click.echo(f"{'snapshot':12} on its way to {address}: {size}")
        elif isinstance(fact, dict):
            click.echo(f"{name:12} " + ", ".join(f"{key} {value}" for key, value in fact.items()))
        else:
            click.echo(f"{name:12} {fact}")


def _size(count: float) -> str:
    """Bytes, for people."""
    units = ["B", "KB", "MB", "GB", "TB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        units.pop(0)
    return f"{count:.0f} {units[0]}" if count >= 100 or units[0] == "B" else f"{count:.1f} {units[0]}"


@cli.command()
@_client_options
def ping(node: str, timeout: float, as_json: bool) -> None:
    """Ask a node whether it answers, and how fast."""
    with Client(node, timeout=timeout) as client:
        client.ping()  # opens the connection
        took_ms = client.ping() * 1000
    click.echo(json.dumps({"ms": round(took_ms, 3)}) if as_json else f"{took_ms:.2f} ms")


@cli.command()
@click.option("--nodes", default=3, show_default=True, type=click.IntRange(1, 9), help="How many nodes.")
@click.option("--port", default=5001, show_default=True, type=click.IntRange(1, 65527), help="Port of the first.")
@click.option("--volume", type=click.Path(path_type=Path), metavar="DIR",
              help="Keep the data here. Default: a temporary directory, removed at the end.")  # fmt: skip
@click.option("--log-level", type=click.Choice(log.LEVELS), default="info", show_default=True,
              help="What is logged.")  # fmt: skip
def local(nodes: int, port: int, volume: Path | None, log_level: str) -> None:
    """Run a trial cluster on this machine until Ctrl-C: one process a node, on loopback."""
    addresses = [f"127.0.0.1:{port + n}" for n in range(nodes)]
    asked_to_end = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # a flag, not an exception: none may come between fork and append
        signal.signal(number, lambda *_: asked_to_end.set())
    processes: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        root = volume or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raftnode-local-")))
        stack.callback(_stop_all, processes)
        processes.extend(_spawn(address, addresses, root, log_level) for address in addresses)
        click.echo(f"{nodes} nodes on {', '.join(addresses)}; data in {root}; Ctrl-C ends them", err=True)
        while not asked_to_end.wait(0.1):
            ended = [a for a, process in zip(addresses, processes, strict=True) if process.poll() is not None]
            if ended:
                click.echo(f"raftnode: {', '.join(ended)} ended; stopping the others", err=True)
                raise SystemExit(1)


def _spawn(address: str, addresses: list[str], root: Path, log_level: str) -> subprocess.Popen[bytes]:
    others = ",".join(other for other in addresses if other != address)
    volume = root / f"node-{parse_address(address)[1]}"
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "raftnode", "serve", "--ip", address, "--peers", others),
            *("--volume", str(volume), "--log-level", log_level),
        ],
        start_new_session=True,  # Ctrl-C reaches them through us, once
    )


def _stop_all(processes: list[subprocess.Popen[bytes]]) -> None:
    """End every node: none may be left behind."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


for _command in UPKEEP:
    cli.add_command(_command)


def main() -> None:
    """Entry point of the console script."""
    cli()


if __name__ == "__main__":
    main()
