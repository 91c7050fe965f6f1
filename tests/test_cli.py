"""The command `raftnode`: what it prints, its exit statuses, and what is left when it has ended.

Most commands run in this process against one real node; where it matters that it is a process (signals, the terminal,
what is left behind), they run as one. Exit statuses: 0 done, 1 no such key, 2 wrong usage or request, 3 not executed or
a directory that can't be used, 4 an open outcome, 5 a damaged record.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import lmdb
import pytest
from click.testing import CliRunner, Result

from raftnode import Client, __version__, records
from raftnode.cli import cli
from raftnode.config import DEFAULT_ADDRESS, DEFAULT_NAMESPACE, ENVIRONMENT
from raftnode.testing.processes import (
    FAST,
    PATIENCE_S,
    ClusterOfProcesses,
    NodeProcess,
    command_environment,
    free_addresses,
    inspect,
    wait_until,
)

SECRET = "a-word-that-no-log-may-hold"


# --- running it -----------------------------------------------------------------------------------------------


class Shell:
    """A shell in which `raftnode` is typed: `node` is in RAFTNODE_NODE, and nothing else is set."""

    def __init__(self, node: str) -> None:
        self.node = node

    def __call__(self, *words: str, stdin: str | bytes | None = None, **environment: str) -> Result:
        unset: dict[str, str | None] = {
            name: None for name in os.environ if name.startswith("RAFTNODE_") or name in ENVIRONMENT
        }
        settings = {**unset, "RAFTNODE_NODE": self.node, **environment}
        return CliRunner().invoke(cli, words, input=stdin, env=settings, prog_name="raftnode")

    def json(self, *words: str, status: int = 0, **more: Any) -> Any:
        """What a command prints with --json: one object on one line, and nothing on stderr."""
        ran = self(*words, "--json", **more)
        assert ran.exit_code == status, ran.output
        assert ran.stderr == ""
        assert ran.stdout.count("\n") == 1
        return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A cluster of one, which logs all that it can."""
    options = ["--log-level", "debug", "--timeout", "1"]
    with ClusterOfProcesses(1, tmp_path_factory.mktemp("node"), FAST, options) as cluster:
        cluster.await_leader()
        yield cluster[0]


@pytest.fixture
def shell(node: NodeProcess) -> Shell:
    return Shell(node.address)


def failed(ran: Result, status: int, words: str) -> None:
    """It ended so, with one line on stderr that says why, and nothing on stdout."""
    assert ran.exit_code == status, ran.output
    assert ran.stdout == ""
    assert words in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert ran.stderr.startswith("raftnode: ")


def misused(ran: Result, words: str) -> None:
    """Status 2, how it is used, and what was wrong."""
    assert ran.exit_code == 2, ran.output
    assert ran.stdout == ""
    assert ran.stderr.startswith("Usage: raftnode")
    assert words in ran.stderr


def processes_with(word: str) -> set[int]:
    """The processes that have this in their command line."""
    found = set()
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            with contextlib.suppress(OSError):
                if word.encode() in (process / "cmdline").read_bytes():
                    found.add(int(process.name))
    return found


# --- put, get, delete -----------------------------------------------------------------------------------------


def test_put_get_delete(shell: Shell) -> None:
    """What is put is what is got, until it is deleted; each command says what it did, for people and as JSON, and its
    status tells whether there was something. One key goes through its life twice."""
    ran = shell("put", "name", "John Doe")
    assert ran.exit_code == 0
    said = re.fullmatch(r"committed as (\d+), version 1\n", ran.stdout)
    assert said
    first = int(said[1])
    assert shell("get", "name").stdout == "John Doe\n"
    put = shell.json("put", "name", "Jane Doe")
    assert (put["version"], put["replaced"]) == (2, first)
    assert put["commit_id"] > first
    assert shell.json("get", "name") == {
        "key": "name", "namespace": DEFAULT_NAMESPACE, "value": "Jane Doe",
        "created": first, "modified": put["commit_id"], "version": 2,
    }  # fmt: skip
    ran = shell("delete", "name")
    assert ran.exit_code == 0
    assert re.fullmatch(r"deleted by \d+\n", ran.stdout)

    for command in ("get", "delete"):
        failed(shell(command, "name"), 1, "no key 'name' in namespace 'default'")
    gone = shell.json("get", "name", status=1)
    assert (gone["key"], gone["value"], gone["version"]) == ("name", None, 0)
    assert shell.json("delete", "name", status=1)["replaced"] is None
    again = shell.json("put", "name", "John Doe")
    assert (again["version"], again["replaced"]) == (1, None)
    assert shell.json("delete", "name")["replaced"] == again["commit_id"]


@pytest.mark.parametrize(
    ("typed", "value", "shown"),
    [
        ("5", 5, "5"),
        ("-5", -5, "-5"),
        ("1.50", 1.5, "1.5"),
        ("true", True, "true"),
        ("null", None, "null"),
        ('"5"', "5", "5"),
        ('{"a": [1, "ü"]}', {"a": [1, "ü"]}, '{"a": [1, "ü"]}'),
        ("John Doe", "John Doe", "John Doe"),
        ("05", "05", "05"),
        ("{", "{", "{"),
        ("NaN", "NaN", "NaN"),
        ("-Infinity", "-Infinity", "-Infinity"),
        ("", "", ""),
        ("zwei\nZeilen ü 🐟", "zwei\nZeilen ü 🐟", "zwei\nZeilen ü 🐟"),
        ("1180591620717411303424", 2**70, "1180591620717411303424"),
    ],
)
def test_a_value_is_json_or_text(shell: Shell, typed: str, value: Any, shown: str) -> None:
    """A value that is JSON is taken as such, anything else as text, and `--string` makes text of anything. Each is
    typed as an argument and piped into `-`; what comes back is of that very type. Text is printed as it is, all else
    as JSON."""
    for words, stdin in ((["typed", "--", typed], None), (["typed", "-"], typed)):
        if typed == "-":
            continue
        assert shell("put", words[0], *words[1:], stdin=stdin).exit_code == 0
        record = shell.json("get", "typed")
        assert record["value"] == value
        assert type(record["value"]) is type(value)
        assert shell("get", "typed").stdout == shown + "\n"
    assert shell("put", "--string", "typed", "--", typed).exit_code == 0
    assert shell.json("get", "typed")["value"] == typed


def test_a_value_from_standard_input(shell: Shell) -> None:
    """With `-` the value is what is piped in, to the last character, and of any size up to the limit; without, nothing
    is read. Text keeps its line ends, JSON does not mind them; with `--string` JSON stays text. A value of some
    megabytes, too long for a command line, comes back whole."""
    for stdin, options, value in (
        ("line\n", [], "line\n"),
        ('{"a": 1}\n', [], {"a": 1}),
        ('{"a": 1}\n', ["--string"], '{"a": 1}\n'),
        ("", [], ""),
        ("-", [], "-"),
    ):
        assert shell("put", "piped", "-", *options, stdin=stdin).exit_code == 0
        assert shell.json("get", "piped")["value"] == value
    assert shell("put", "piped", "typed", stdin="ignored").exit_code == 0
    assert shell("get", "piped").stdout == "typed\n"
    large = "0123456789abcdef" * (3 << 16)
    assert shell("put", "piped", "-", stdin=large).exit_code == 0
    assert shell("get", "piped").stdout == large + "\n"
    shell("put", "piped", "small")


def test_what_is_piped_in_and_is_no_text_is_refused(shell: Shell) -> None:
    """Bytes that are no text are refused in words, with the status for a wrong request, and nothing is written. A
    picture's first bytes are piped into `-`."""
    failed(shell("put", "picture", "-", stdin=b"\x89PNG\r\n\xff\xfe"), 2, "UTF-8")
    assert shell("get", "picture").exit_code == 1


def test_namespaces_are_apart(shell: Shell) -> None:
    """A key in one namespace is not that key in another. Two are put, one is deleted, the other stays."""
    for namespace in ("web", "db"):
        assert shell("put", "host", namespace, "--namespace", namespace).exit_code == 0
    assert shell.json("get", "host", "--namespace", "web")["namespace"] == "web"
    assert shell("delete", "host", "--namespace", "db").exit_code == 0
    assert shell("get", "host", "--namespace", "web").stdout == "web\n"
    failed(shell("get", "host", "--namespace", "db"), 1, "no key 'host' in namespace 'db'")
    failed(shell("get", "host"), 1, "'default'")


def test_a_local_read_needs_nobody_else(shell: Shell, tmp_path: Path) -> None:
    """`get --local` answers from the node alone. On a node whose peers never came, a plain get is not executed, and a
    local one says that there is no such key; on a healthy node both give the value."""
    shell("put", "near", "by")
    assert shell("get", "near", "--local").stdout == "by\n"
    lonely = NodeProcess(*_lonely(tmp_path))
    try:
        lonely.start().await_answer()
        failed(shell("get", "near", "--node", lonely.address, "--timeout", "1.2"), 3, "no_leader")
        failed(shell("get", "near", "--node", lonely.address, "--local"), 1, "no key 'near'")
    finally:
        lonely.kill()


def test_a_write_that_no_node_could_take_is_not_called_open(shell: Shell, tmp_path: Path) -> None:
    """A put to a cluster without a majority did surely nothing, and the status says so: 3. The one node of three
    answers `no_leader` after its second; the command, which has time left, asks again, and its time is up before the
    node's second answer. What a node has never appended must not be reported as open for that."""
    lonely = NodeProcess(*_lonely(tmp_path))
    try:
        lonely.start().await_answer()
        failed(shell("put", "near", "by", "--node", lonely.address, "--timeout", "1.7"), 3, "no_leader")
    finally:
        lonely.kill()


def _lonely(directory: Path) -> tuple[str, list[str], Path, dict[str, str], list[str]]:
    """A node of three, of which the other two are not there."""
    address, *others = free_addresses(3)
    return address, others, directory, FAST, ["--timeout", "1"]


# --- peers, status, ping --------------------------------------------------------------------------------------


def test_peers_status_ping(shell: Shell, node: NodeProcess) -> None:
    """What a node knows of its cluster and itself, for people and as JSON. Asked of a cluster of one."""
    assert shell("peers").stdout == f"{node.address}  leader\n"
    assert shell.json("peers") == {"peers": [node.address], "leader": node.address, "live": [node.address]}
    status = shell.json("status")
    assert (status["address"], status["role"], status["version"]) == (node.address, "leader", __version__)
    assert status["members"][node.address]["live"] is True
    told = shell("status").stdout
    assert f"cluster      {status['cluster']}\n" in told
    assert "role         leader\n" in told
    assert f"member       {node.address} (node {status['node']}): answers" in told
    assert re.fullmatch(r"\d+\.\d\d ms\n", shell("ping").stdout)
    assert shell.json("ping")["ms"] >= 0


def test_peers_that_do_not_answer_are_shown(shell: Shell, tmp_path: Path) -> None:
    """`peers` and `status` show who does not answer. Asked of a node of three whose peers never came: there is no
    leader, and the two others are marked."""
    lonely = NodeProcess(*_lonely(tmp_path))
    try:
        lonely.start().await_answer()
        at = ["--node", lonely.address]
        others = [member for member in lonely.members if member != lonely.address]
        assert sorted(shell("peers", *at).stdout.splitlines()) == sorted(
            [lonely.address, *(f"{other}  not answering" for other in others)]
        )
        assert shell.json("peers", *at) == {"peers": lonely.members, "leader": None, "live": [lonely.address]}
        told = shell("status", *at).stdout
        for other in others:
            assert f"{other} (node unknown): not answering\n" in told
    finally:
        lonely.kill()


# --- which node -----------------------------------------------------------------------------------------------


def test_which_node_is_asked(shell: Shell, node: NodeProcess) -> None:
    """`--node` says whom to ask, before RAFTNODE_NODE; with several, the next is tried when one is not there. What is
    set for a node that serves (RAFTNODE_IP and so on) does not disturb commands that ask one. Brought about with an
    address where nobody listens."""
    [nobody] = free_addresses(1)
    failed(shell("ping", "--timeout", "0.2", RAFTNODE_NODE=nobody), 3, nobody)
    assert shell("ping", "--node", node.address, RAFTNODE_NODE=nobody).exit_code == 0
    assert shell("ping", "--node", f"{nobody}, {node.address}").exit_code == 0
    assert shell("put", "several", "1", RAFTNODE_NODE=f"{nobody},{node.address}").exit_code == 0
    serving = {"IP": nobody, "PEERS": nobody, "VOLUME": "/nowhere", "STORE": "memory", "TIMEOUT": "1"}
    for command in (["get", "several"], ["peers"], ["status"], ["ping"], ["delete", "several"]):
        assert shell(*command, **{f"RAFTNODE_{name}": text for name, text in serving.items()}).exit_code == 0


# --- what goes wrong ------------------------------------------------------------------------------------------


def test_wrong_requests_have_status_2(shell: Shell) -> None:
    """A request that can't be carried out as it stands gives status 2 and one line that says what is wrong; the node
    stays well."""
    failed(shell("put", "", "1"), 2, "at least 1 byte")
    failed(shell("put", "k" * 600, "1"), 2, "key_too_long")
    failed(shell("put", "key", "1", "--namespace", ""), 2, "1 to 64 characters")
    failed(shell("put", "key", "1", "--namespace", "n" * 65), 2, "1 to 64 characters")
    failed(shell("put", "key", "1e400"), 2, "no JSON number")
    failed(shell("put", "key", '"\\ud800"'), 2, "surrogates")
    failed(shell("put", "key", "[" * 200 + "]" * 200), 2, "nested deeper")
    failed(shell("put", "key", "-", stdin="x" * (9 << 20)), 2, "too_large")
    failed(shell("ping", "--node", "nonsense"), 2, "expected host:port")
    failed(shell("ping", "--node", " , "), 2, "no node is given")
    assert shell("ping").exit_code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["put", "key"], "Missing argument 'VALUE'"),
        (["get"], "Missing argument 'KEY'"),
        (["get", "one", "two"], "unexpected extra argument"),
        (["get", "key", "--colour"], "--colour"),
        (["get", "key", "--timeout", "0"], "--timeout"),
        (["get", "key", "--timeout", "soon"], "--timeout"),
        (["--ip", "127.0.0.1:1", "ping"], "--ip: give options after the command"),
        (["serve", "--timeout", "0"], "--timeout"),
        (["serve", "--store", "paper"], "--store"),
        (["serve", "--log-level", "loud"], "--log-level"),
        (["--store", "paper"], "--store"),
        (["local", "--nodes", "0"], "--nodes"),
        (["local", "--port", "70000"], "--port"),
    ],
)
def test_wrong_usage_has_status_2(shell: Shell, words: list[str], said: str) -> None:
    """Words and options that do not exist, are missing, or are out of range are told with how the command is used."""
    misused(shell(*words), said)


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--ip", "nonsense"], {}, "expected host:port"),
        (["--ip", "127.0.0.1:0"], {}, "port"),
        (["--peers", "10.0.0.1"], {}, "expected host:port"),
        (["--ip", "192.0.2.1:5001"], {}, "can't listen on 192.0.2.1:5001"),
        (["--listen", "192.0.2.1:5001"], {}, "can't listen on 192.0.2.1:5001"),
        (["--listen", "5001"], {}, "expected host:port"),
        ([], {"RAFTNODE_LISTEN": "nonsense"}, "expected host:port"),
        ([], {"HB_TIME": "fast"}, "HB_TIME"),
        ([], {"HB_TIME": "500", "LOW_TIMEOUT": "400"}, "HB_TIME"),
    ],
)
def test_serve_with_wrong_settings_has_status_2(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], said: str
) -> None:
    """A node with a setting that can't be does not start: status 2, and words that name it. Addresses that are none, an
    address of no machine of ours, and times that do not fit together."""
    ran = _serve("serve", "--volume", str(tmp_path / "data"), *arguments, **environment)
    assert ran.returncode == 2, ran.stderr
    assert said in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr


def _serve(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A node of which it is expected that it does not start."""
    return subprocess.run(
        [sys.executable, "-m", "raftnode", *arguments],
        env=command_environment(environment),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def test_serve_on_a_directory_that_can_not_be_used_has_status_3(tmp_path: Path) -> None:
    """A data directory that is not a node's is left alone: status 3, and words that say what is in the way. A file
    where the directory should be; a data file that is none of ours, which is the same afterwards."""
    (tmp_path / "file").write_text("something else")
    [address] = free_addresses(1)
    ran = _serve("serve", "--ip", address, "--volume", str(tmp_path / "file"))
    assert ran.returncode == 3
    assert f"{tmp_path / 'file'} is a file, not a directory" in ran.stderr
    foreign = tmp_path / "foreign" / records.DATA_FILE
    foreign.parent.mkdir()
    foreign.write_bytes(b"of another program\n" * 1000)
    ran = _serve("serve", "--ip", address, "--volume", str(foreign.parent))
    assert ran.returncode == 3
    assert f"{foreign} is not a file of ours" in ran.stderr
    assert foreign.read_bytes() == b"of another program\n" * 1000


@contextlib.contextmanager
def server_that(*answers: bytes) -> Iterator[str]:
    """The address of a server that reads one line, answers so, and closes; one connection for each answer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE_S)

        def serve() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                with connection, connection.makefile("rb") as stream:
                    stream.readline()
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "not all answers were asked for"


def test_an_open_outcome_has_status_4(shell: Shell) -> None:
    """A write that may have happened is told apart from one that surely did not: status 4, and it is not tried again. A
    server takes the request and closes, answers what is no JSON, or says `not_committed`; a read in the same place was
    simply not executed: 3."""
    open_answer = b'{"type":"put","data":false,"error":{"code":"not_committed","message":"no majority"}}\n'
    for answer in (b"", b"\xff\n", open_answer):
        for write in (["put", "key", "1"], ["delete", "key"]):
            with server_that(answer) as address:
                failed(shell(*write, "--node", address, "--timeout", "5"), 4, "not_committed")
    with server_that(b"") as address:
        failed(shell("get", "key", "--node", address, "--timeout", "0.04"), 3, "no_leader")


def test_what_was_not_executed_has_status_3(shell: Shell) -> None:
    """No room and no leader are said as such, with status 3; what may pass (`overloaded`) is tried again until the
    time is up, and then carried out."""
    full = b'{"type":"put","data":false,"error":{"code":"storage_full","message":"no room"}}\n'
    busy = b'{"type":"put","data":false,"error":{"code":"overloaded","message":"busy"}}\n'
    done = b'{"type":"put","data":true,"commit_id":7,"version":1,"replaced":null}\n'
    with server_that(full) as address:
        failed(shell("put", "key", "1", "--node", address), 3, "storage_full")
    with server_that(busy, busy, done) as address:
        assert shell("put", "key", "1", "--node", address).stdout == "committed as 7, version 1\n"


def test_a_damaged_record_has_status_5(shell: Shell, tmp_path: Path) -> None:
    """A value that does not match its checksum is never printed: status 5, with the key in the words. A node is stopped
    after a put, one bit of the value is flipped in its data file, and it is started again; other keys are well. To
    overwrite it the node would need what it held: it stops, with status 3, rather than come to another state than the
    other nodes (TRAPS 26), and the outcome is open."""
    with ClusterOfProcesses(1, tmp_path, FAST) as cluster:
        [node] = cluster
        cluster.await_leader()
        at = ["--node", node.address]
        for key in ("spoilt", "sound"):
            assert shell("put", key, "a value", *at).exit_code == 0
        assert node.terminate() == 0
        _flip(node.volume / records.DATA_FILE, f"{DEFAULT_NAMESPACE}\0spoilt".encode())
        cluster.start()
        cluster.await_leader()
        failed(shell("get", "spoilt", *at), 5, "'spoilt' in namespace 'default' does not match its checksum")
        assert shell("get", "sound", *at).stdout == "a value\n"
        mark = node.mark()
        failed(shell("put", "spoilt", "anew", *at), 4, "not_committed")
        assert node.await_exit() == 3
        assert "'spoilt' in namespace 'default' does not match its checksum" in node.log_text(since=mark)


def _flip(file: Path, key: bytes) -> None:
    """One bit of a committed value, in each of its copies in the file."""
    with lmdb.open(str(file), subdir=False, readonly=True, map_size=1 << 36, max_dbs=16, lock=False) as env:
        committed = env.open_db(records.COMMITTED, create=False)
        with env.begin() as txn:
            stored = bytes(txn.get(key, db=committed))
    whole = file.read_bytes()
    assert stored in whole
    file.write_bytes(whole.replace(stored, stored[:-2] + bytes([stored[-2] ^ 1]) + stored[-1:]))


# --- serving --------------------------------------------------------------------------------------------------


class GroupNode(NodeProcess):
    """A node that is started without the word `serve`."""

    @property
    def command(self) -> list[str]:
        return [word for word in super().command if word != "serve"]


def test_without_a_command_it_serves(shell: Shell, tmp_path: Path) -> None:
    """`raftnode --ip ... --peers ... --volume ...` is a node, as `raftnode serve` is. Three are started so; they
    elect a leader and take a write through each. Two are started again from the environment alone (RAFTNODE_IP,
    RAFTNODE_VOLUME; the peers are in the store), one with `serve` and one without, and have the data."""
    with ClusterOfProcesses(3, tmp_path, FAST) as cluster:
        cluster.kill()
        addresses = cluster.addresses
        cluster.nodes[:] = [GroupNode(address, addresses, tmp_path / "group", FAST) for address in addresses]
        cluster.start()
        cluster.await_leader()
        for n, address in enumerate(cluster.addresses):
            assert "serve" not in cluster[n].command
            assert shell("put", f"group-{n}", str(n), "--node", address).exit_code == 0
        assert cluster.terminate() == [0, 0, 0]
        words = (["serve"], [])
        started = [
            _Foreground(
                *extra, RAFTNODE_IP=node.address, RAFTNODE_VOLUME=str(node.volume), RAFTNODE_LOG_LEVEL="warning", **FAST
            )
            for node, extra in zip(cluster.nodes[:2], words, strict=True)
        ]
        try:
            for address in cluster.addresses[:2]:
                ran = wait_until(lambda at=address: _got(shell, "group-1", at), "a node serves again")
                assert ran == "1\n"
            for process in started:
                assert process.interrupt() == 0
        finally:
            for process in started:
                process.kill()


def _got(shell: Shell, key: str, address: str) -> str | None:
    ran = shell("get", key, "--node", address, "--timeout", "1")
    return ran.stdout if ran.exit_code == 0 else None


def test_a_node_listens_where_it_is_told_to(tmp_path: Path) -> None:
    """Behind NAT the members know a node by an address that its machine does not have: `--listen`, or RAFTNODE_LISTEN,
    says where it listens, and its name stays what `--ip` says, in its log, its answers and its directory. Brought about
    with an address of no machine of ours, and seen for each way of saying it; an empty variable says nothing."""
    known_as, [listen] = "192.0.2.1:5001", free_addresses(1)
    command = [sys.executable, "-m", "raftnode", "serve", "--ip", known_as, "--volume", str(tmp_path)]
    for words, environment in (
        (["--listen", listen], {"RAFTNODE_LISTEN": known_as}),
        ([], {"RAFTNODE_LISTEN": listen}),
    ):
        environment = command_environment(environment)
        with subprocess.Popen([*command, *words], env=environment, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stderr is not None
                lines = (json.loads(line) for line in process.stderr)
                listening = next(line for line in lines if line["event"] == "listening")
                assert (listening["address"], listening["listen"]) == (known_as, listen)
                with Client(listen) as client:
                    client.put("name", "John Doe")
                    assert client.peers()["peers"] == [known_as]
            finally:
                process.kill()
    info = inspect(tmp_path, "info")[0]
    assert info["address"] == known_as
    ran = _serve("serve", "--ip", known_as, "--volume", str(tmp_path), RAFTNODE_LISTEN="")
    assert f"can't listen on {known_as}" in ran.stderr.splitlines()[-1]


class _Foreground:
    """A `raftnode` that runs until it is interrupted."""

    def __init__(self, *words: str, directory: Path | None = None, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "raftnode", *words],
            env=command_environment(environment),
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.pid = self._process.pid

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> int:
        """Ctrl-C, and the exit status."""
        self._process.send_signal(number)
        return self._process.wait(PATIENCE_S)

    def children(self) -> set[int]:
        try:
            return {int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()}
        except OSError:
            return set()

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def test_plain_serve_is_a_durable_node_in_data(shell: Shell, tmp_path: Path) -> None:
    """`raftnode serve`, with nothing said, is one durable node that keeps its data in ./data. It is started so in an
    empty directory (only its address is given, as others may use the default one), ended with Ctrl-C, and started
    again: it exits with 0 and has kept what it was given. With `--store memory` it leaves nothing behind."""
    [ip] = [option for option in cli.commands["serve"].params if option.name == "ip"]
    assert ip.default == DEFAULT_ADDRESS
    [address] = free_addresses(1)
    for turn in range(2):
        process = _Foreground("serve", directory=tmp_path, RAFTNODE_IP=address)
        try:
            wait_until(lambda: shell("ping", "--node", address).exit_code == 0, "the node answers")
            if turn == 0:
                assert shell("put", "kept", "yes", "--node", address).exit_code == 0
            assert shell("get", "kept", "--node", address).stdout == "yes\n"
            assert process.interrupt() == 0
        finally:
            process.kill()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert (tmp_path / "data" / records.DATA_FILE).exists()

    [address] = free_addresses(1)
    (tmp_path / "memory").mkdir()
    (tmp_path / "tmp").mkdir()
    process = _Foreground(
        "serve", "--store", "memory", "--ip", address, directory=tmp_path / "memory", TMPDIR=str(tmp_path / "tmp")
    )
    try:
        wait_until(
            lambda: shell("put", "k", "v", "--node", address, "--timeout", "1").exit_code == 0, "the node answers"
        )
        assert process.interrupt() == 0
    finally:
        process.kill()
    assert list((tmp_path / "memory").iterdir()) == []
    assert list((tmp_path / "tmp").iterdir()) == []


# --- a trial cluster ------------------------------------------------------------------------------------------


def _neighbouring_ports(count: int) -> int:
    """The first of so many ports, one after the other, on which nothing listens."""
    while True:
        first = int(free_addresses(1)[0].rpartition(":")[2])
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


def test_local_runs_a_cluster_until_ctrl_c(shell: Shell, tmp_path: Path) -> None:
    """`raftnode local --nodes 3` is a cluster of three on this machine, and Ctrl-C is the end of it: status 0, no
    process and no temporary directory is left. Seen from outside: three children; a write through one node is read
    through another; then SIGINT."""
    port = _neighbouring_ports(3)
    nodes = [f"127.0.0.1:{port + n}" for n in range(3)]
    process = _Foreground("local", "--nodes", "3", "--port", str(port), TMPDIR=str(tmp_path), **FAST)
    try:
        for address in nodes:
            wait_until(lambda at=address: shell("ping", "--node", at).exit_code == 0, f"{address} answers")
        assert shell("put", "trial", "runs", "--node", nodes[0]).exit_code == 0
        assert shell("get", "trial", "--node", nodes[2]).stdout == "runs\n"
        assert shell.json("peers", "--node", nodes[1])["peers"] == sorted(nodes)
        children = process.children()
        assert len(children) == 3
        [root] = tmp_path.iterdir()
        assert processes_with(str(root)) == children
        assert process.interrupt() == 0
        assert processes_with(str(root)) == set()
        assert list(tmp_path.iterdir()) == []
    finally:
        process.kill()
        _end(processes_with(str(tmp_path)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_local_that_is_interrupted_at_its_start_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C or SIGTERM while `raftnode local` still starts its nodes leaves no process and no directory either. The
    signal is sent as soon as the first node's process is there."""
    process = _Foreground("local", "--port", str(_neighbouring_ports(3)), TMPDIR=str(tmp_path), **FAST)
    try:
        while not process.children():
            assert process.is_running
        process.interrupt(number)
        wait_until(lambda: not processes_with(str(tmp_path)), "no node is left", timeout=5)
        assert list(tmp_path.iterdir()) == []
    finally:
        process.kill()
        _end(processes_with(str(tmp_path)))


def _end(pids: set[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_local_ends_when_a_node_does(tmp_path: Path) -> None:
    """A trial cluster that is not whole says so and ends, with status 1, and keeps the directory that it was given. One
    of its ports is taken."""
    port = _neighbouring_ports(3)
    with socket.create_server(("127.0.0.1", port + 1)):
        ran = _serve("local", "--port", str(port), "--volume", str(tmp_path / "kept"), **FAST)
    assert ran.returncode == 1
    assert f"can't listen on 127.0.0.1:{port + 1}" in ran.stderr
    assert f"127.0.0.1:{port + 1} ended; stopping the others" in ran.stderr
    assert processes_with(str(tmp_path)) == set()
    assert (tmp_path / "kept").is_dir()


# --- logs -----------------------------------------------------------------------------------------------------


def test_the_log_is_json_and_holds_no_keys_or_values(shell: Shell, node: NodeProcess) -> None:
    """Logs go to places where data must not: even at the level `debug` they hold neither keys nor values nor
    namespaces, not even those of requests that were refused. A word is put, read, deleted, and sent in every kind of
    wrong request to a node that logs all it can. Its log, which is no terminal, is JSON to the last line, each with a
    time, a level and an event."""
    for command in (
        ["put", SECRET, SECRET, "--namespace", SECRET], ["get", SECRET, "--namespace", SECRET], ["get", SECRET],
        ["delete", SECRET, "--namespace", SECRET], ["delete", SECRET], ["put", SECRET * 30, "1"],
        ["put", "k", SECRET, "--namespace", SECRET * 9], ["put", "k", f'["{SECRET}", ' + "[" * 200 + "]" * 201],
    ):  # fmt: skip
        shell(*command)
    host, port = node.address.split(":")
    for bad in (
        f'{{"type":"put","key":["{SECRET}"],"value":1}}', f'{{"type":"{SECRET}"}}', f'"{SECRET}"', SECRET,
        f'{{"type":"put","key":"{SECRET}","value":', f'{{"type":"hello","cluster":"{SECRET}"}}',
    ):  # fmt: skip
        with socket.create_connection((host, int(port)), PATIENCE_S) as connection:
            connection.sendall(bad.encode() + b"\n")
            assert b"error" in connection.recv(1 << 16)
    assert shell("ping").exit_code == 0
    assert SECRET not in node.log_text()
    lines = [json.loads(line) for line in node.log_text().splitlines()]
    assert {"starting", "listening", "role"} <= {line["event"] for line in lines}
    assert all({"timestamp", "level", "event"} <= line.keys() for line in lines)


def test_the_log_is_text_on_a_terminal(shell: Shell, tmp_path: Path) -> None:
    """People read the log on a terminal, programs elsewhere: `serve` on a pseudo-terminal writes readable lines, and
    with `--log-json` JSON there too."""
    for options in ([], ["--log-json"]):
        [address] = free_addresses(1)
        lead, terminal = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "raftnode", "serve", "--ip", address, "--volume", str(tmp_path / address), *options],
            env=command_environment({"TERM": "xterm"}),
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
        try:
            wait_until(lambda at=address: shell("ping", "--node", at).exit_code == 0, "the node answers")
        finally:
            process.terminate()
            assert process.wait(PATIENCE_S) == 0
            os.close(terminal)
        printed = _all_of(lead)
        assert address in printed
        for line in filter(None, map(str.strip, printed.splitlines())):
            assert line.startswith("{") == bool(options), line


def _all_of(lead: int) -> str:
    parts = []
    with contextlib.closing(os.fdopen(lead, "rb", buffering=0)) as stream, contextlib.suppress(OSError):
        while part := stream.read(1 << 16):
            parts.append(part)
    return b"".join(parts).decode()


# --- help -----------------------------------------------------------------------------------------------------


def test_everything_has_a_help_text(shell: Shell) -> None:
    """Who types `--help` learns what each command does and what each option means, and with the version, which it is.
    Every command is asked, and every option looked up in its help."""
    for flag in ("--help", "-h"):
        ran = shell(flag)
        assert ran.exit_code == 0
        for name in ("serve", "put", "get", "delete", "peers", "status", "ping", "local"):
            assert re.search(rf"^  {name} +\w", ran.stdout, re.MULTILINE), f"{name} has no help"
    assert shell("--version").stdout == f"raftnode, version {__version__}\n"
    silent = []
    for name, command in cli.commands.items():
        assert command.help
        told = shell(name, "--help").stdout
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.opts[0] in told
                silent += [] if option.help else [f"{name} {option.opts[0]}"]
    assert silent == []
