"""`raftnode-inspect`: what it says of directories that a real store made, live, dead, copied and damaged.

The expected answers come from what was put and from the store's own view, never from the inspector.
"""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest
from click.testing import CliRunner, Result
from msgspec import Raw

from raftnode import inspector, records
from raftnode.config import Settings
from raftnode.consensus.ballot import Ballot
from raftnode.consensus.journal import Mark
from raftnode.inspection import Directory
from raftnode.messages import EntryId, MembersCommand, Noop, PutCommand, chain, encode_command
from raftnode.store import Store
from raftnode.testing.processes import wait_until

ADDRESS = "127.0.0.1:5001"
TIME = 1_700_000_000_000
"""2023-11-14T22:13:20Z"""
LONG = "long " * 100
ROOT = Path(inspector.__file__).parents[1]


class Alone:
    """A transport without peers: what the store's own replication needs, and nobody answers."""

    def __init__(self) -> None:
        self.my_ip = ADDRESS
        self.peers: list[str] = []

    def send_data(self, *_arguments: object, **_named: object) -> None:
        pass

    def identify(self, cluster: str, node: str) -> None:
        pass


def new_store(path: Path) -> Store:
    """A founded store of a node that leads in term 3."""
    store = Store("database", path)
    store.found(ADDRESS, [])
    store.write(Ballot(3, ADDRESS))
    return store


def put(store: Store, key: str, value: object, majority: int = 1, **more: Any) -> None:
    assert store.put(3, {"key": key, "value": value, **more}, Alone(), majority) is (majority == 1)


def fill(store: Store, count: int, filler: str = "x" * 40) -> None:
    """Many entries in two transactions."""
    for n in range(count):
        command = PutCommand(namespace="default", key=f"k{n:05}", value=Raw(f'"{filler}"'.encode()))
        store.journal.append(3, TIME + n, encode_command(command))
    store.write()
    store.commit("default")


def make_story(path: Path) -> None:
    """Seven committed entries of every kind, in three namespaces, and two staged ones."""
    store = new_store(path)
    store.journal.append(3, TIME, encode_command(Noop()))
    store.journal.append(3, TIME + 1, encode_command(MembersCommand(voters={ADDRESS: store.node_id})))
    put(store, "city", "Zürich", client="ann")
    put(store, "city", {"name": "Basel", "size": 1.50})
    put(store, "text", LONG, namespace="notes")
    put(store, "city\n\x1b[31m", [], namespace="odd")
    put(store, "text", None, namespace="notes", type="delete", client="bob")
    put(store, "city", "Bern", majority=2)
    put(store, "late", 1, majority=2)
    store.close()


KINDS = ["noop", "members", "put", "put", "put", "put", "delete", "put", "put"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directories that tests copy: `story` and `many`, 600 entries."""
    path = tmp_path_factory.mktemp("made")
    make_story(path / "story")
    store = new_store(path / "many")
    fill(store, 600)
    store.close()
    return path


@pytest.fixture
def story(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "story", tmp_path / "story"))


@pytest.fixture
def many(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "many", tmp_path / "many"))


def inspect(*arguments: object, columns: int = 200) -> Result:
    """Run in this process. An exception that comes out is a failure of the test."""
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(
        inspector.main, [str(argument) for argument in arguments], catch_exceptions=False
    )


def start(*arguments: object, **more: Any) -> subprocess.Popen[bytes]:
    """Run as people do, in a process of its own."""
    command = [sys.executable, "-m", "raftnode.inspector", *(str(argument) for argument in arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "", "COLUMNS": "200"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment | more.pop("env", {}), **pipes | more)


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a process of its own."""
    process = start(*arguments)
    out, err = process.communicate()
    return process.returncode, out.decode(), err.decode()


def lines(output: str, record: str | None = None) -> list[dict[str, Any]]:
    """The JSON lines of an output; with `record`, of that kind."""
    found = [json.loads(line) for line in output.splitlines()]
    return [line for line in found if record in (None, line["record"])]


def change(path: Path, name: bytes, edit: Callable[[lmdb.Transaction, Any], object]) -> None:
    """Write to a database of a directory past the store, as a failing disk would."""
    env = lmdb.open(str(path / records.DATA_FILE), subdir=False, map_size=1 << 30, max_dbs=16)
    db = env.open_db(name, create=False)
    with env.begin(write=True) as txn:
        edit(txn, db)
    env.close()


def flip(path: Path, name: bytes, key: bytes, byte: int) -> None:
    """Change the lowest bit of one byte of a stored value."""

    def edit(txn: lmdb.Transaction, db: Any) -> None:
        stored = bytearray(txn.get(key, db=db) or b"")
        stored[byte] ^= 1
        txn.put(key, bytes(stored), db=db)

    change(path, name, edit)


# --- what it shows --------------------------------------------------------------------------------------------


def test_log_tells_every_entry(story: Path) -> None:
    """Every entry, staged and committed, with what was put; and the checksums are those that two nodes with equal
    histories share: computed again here, from the first entry on, they come out the same."""
    result = inspect("log", story, "--json", "--values")
    found = lines(result.stdout)
    assert result.exit_code == 0
    assert [line["record"] for line in found] == ["entry"] * 9
    assert [line["commit_id"] for line in found] == list(range(1, 10))
    assert [line["kind"] for line in found] == KINDS
    assert [line["state"] for line in found] == ["committed"] * 7 + ["staged"] * 2
    assert {line["term"] for line in found} == {3}
    assert found[0]["time"] == TIME
    assert found[0]["namespace"] is found[0]["key"] is found[0]["client"] is None
    assert list(found[1]["voters"]) == [ADDRESS]
    assert (found[2]["namespace"], found[2]["key"], found[2]["value"]) == ("default", "city", "Zürich")
    assert (found[2]["client"], found[3]["client"], found[6]["client"]) == ("ann", None, "bob")
    assert found[4]["value"] == LONG
    assert not any("damaged" in line for line in found)

    checksum = 0
    with Directory(story, Settings().map_bytes) as directory:
        for line, record in zip(found, directory.entries(), strict=True):
            assert record.entry is not None
            checksum = chain(checksum, 3, line["commit_id"], line["time"], record.entry.command)
            assert (line["checksum"], line["size"]) == (f"{checksum:08x}", record.entry.size)


def test_log_shows_no_values_unless_asked(story: Path) -> None:
    """Values may be secret or large: `log` has them only with --values, as JSON and as a table."""
    assert "Zürich" not in inspect("log", story, "--json").stdout + inspect("log", story).stdout
    assert "Zürich" in inspect("log", story, "--values").stdout


def test_ranges(story: Path) -> None:
    """--from, --to and --tail choose by commit_id; the tail is that of the range; `commits` counts from its own end."""

    def ids(*arguments: object) -> list[int]:
        return [line["commit_id"] for line in lines(inspect(*arguments, "--json").stdout, "entry")]

    assert ids("log", story, "--from", 3, "--to", 5) == [3, 4, 5]
    assert ids("log", story, "--from", 8) == [8, 9]
    assert ids("log", story, "--to", 0) == []
    assert ids("log", story, "--tail", 2) == [8, 9]
    assert ids("log", story, "--to", 5, "--tail", 2) == [4, 5]
    assert ids("log", story, "--from", 7, "--tail", 100) == [7, 8, 9]
    assert ids("log", story, "--from", 100) == []
    assert ids("commits", story, "--tail", 2) == [6, 7]
    assert ids("commits", story, "--to", 100) == list(range(1, 8))


def test_ranges_seek(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tail of a long log looks up its own entries and at most two before them (for the checksum), not 600."""
    looked_up: list[int] = []
    look_up = Directory.look_up

    def counted(self: Directory, commit_id: int) -> tuple[bytes | None, str]:
        looked_up.append(commit_id)
        return look_up(self, commit_id)

    monkeypatch.setattr(Directory, "look_up", counted)
    assert len(lines(inspect("log", many, "--tail", 3, "--json").stdout)) == 3
    assert sorted(looked_up) == [596, 597, 598, 599, 600]


def test_commits_end_with_what_is_on_disk(story: Path) -> None:
    """`commits` has the committed entries alone, then the commit_id of the directory: two entries are staged."""
    found = lines(inspect("commits", story, "--json").stdout)
    assert [line["commit_id"] for line in found[:-1]] == list(range(1, 8))
    assert found[-1] == {"record": "committed", "commit_id": 7, "staged": 2}
    table = inspect("commits", story).stdout.splitlines()
    assert table[-1] == "committed on disk: commit_id 7; staged after it: 2"
    assert len(table) == 1 + 7 + 1


def test_state(story: Path) -> None:
    """The committed values as of commit_id 7: the newest put of each key, the deleted one gone, nothing staged."""
    found = lines(inspect("state", story, "--json").stdout)
    assert found == [
        {"record": "value", "namespace": "default", "key": "city", "value": {"name": "Basel", "size": 1.5},
         "created": 3, "modified": 4, "version": 2},
        {"record": "value", "namespace": "odd", "key": "city\n\x1b[31m", "value": [], "created": 6, "modified": 6,
         "version": 1},
    ]  # fmt: skip


def test_state_filters(many: Path) -> None:
    """A namespace, a prefix, both, or a prefix in whatever namespace; without values if they are not wanted."""
    store = Store("database", many)
    put(store, "k00001", 1, namespace="default2")
    put(store, "other", 2, namespace="a")
    store.close()

    def keys(*arguments: str) -> list[tuple[str, str]]:
        result = inspect("state", many, "--json", "--keys-only", *arguments)
        assert all("value" not in line for line in lines(result.stdout))
        return [(line["namespace"], line["key"]) for line in lines(result.stdout)]

    assert len(keys()) == 602
    assert keys("--namespace", "default2") == [("default2", "k00001")]
    assert keys("--namespace", "default", "--prefix", "k0059") == [("default", f"k0059{n}") for n in range(10)]
    assert keys("--prefix", "k00001") == [("default", "k00001"), ("default2", "k00001")]
    assert keys("--namespace", "none") == keys("--prefix", "none") == []


def test_info(story: Path) -> None:
    """Who the node is and where it stands: equal to what the store itself says when it is opened afterwards."""
    line = lines(inspect("info", story, "--json").stdout)[0]
    table = inspect("info", story).stdout
    store = Store("database", story)
    last = store.journal.last
    assert (line["node"], line["cluster"]) == (store.node_id, store.cluster_id)
    assert (line["address"], line["format"]) == (ADDRESS, records.FORMAT)
    assert (line["term"], line["voted_for"]) == (3, ADDRESS)
    assert (line["commit_id"], line["staged"], line["entries"], line["keys"]) == (7, 2, 9, 2)
    assert line["first_kept"]["commit_id"] == 1
    assert (line["last"]["commit_id"], line["last"]["checksum"]) == (last.id.commit_id, f"{last.checksum:08x}")
    members = {"voters": {ADDRESS: store.node_id}, "learners": {}, "replaces": {}}
    assert line["membership"] == {"term": store.journal.membership.term, "commit_id": 2, **members}
    assert line["sizes"]["file"] == (story / records.DATA_FILE).stat().st_size
    assert line["sizes"]["used"] <= line["sizes"]["file"] < line["sizes"]["map"]
    assert line["readers"] == []
    assert all(text in table for text in (store.node_id, ADDRESS, "7 committed on disk", f"{last.checksum:08x}"))
    store.close()


def test_a_node_that_was_not_founded(tmp_path: Path) -> None:
    """A store that was opened and never joined anything has an id, and nothing else: that is told, without a fault."""
    Store("database", tmp_path / "new").close()
    line = lines(inspect("info", tmp_path / "new", "--json").stdout)[0]
    assert line["node"]
    assert line["address"] is line["cluster"] is line["first_kept"] is line["last"] is line["membership"] is None
    assert inspect("info", tmp_path / "new").exit_code == 0
    assert inspect("log", tmp_path / "new", "--json").stdout == ""
    assert inspect("state", tmp_path / "new", "--json").stdout == ""


def test_a_log_that_begins_later(many: Path) -> None:
    """When old entries have been compacted away the kept log begins after its base, and its first entry is checked
    against the checksum of the base. Here the first hundred are taken away, as compaction will do it."""
    entry = lines(inspect("log", many, "--json", "--from", 100, "--to", 100).stdout)[0]

    def compact(txn: lmdb.Transaction, db: Any) -> None:
        for commit_id in range(1, 101):
            txn.delete(records.log_key(commit_id), db=db)

    base = Mark(EntryId(entry["term"], 100), int(entry["checksum"], 16))
    change(many, records.LOG, compact)
    change(many, records.META, lambda txn, db: txn.put(b"base", records.pack_meta(b"base", base), db=db))
    result = inspect("log", many, "--json")
    assert result.exit_code == 0
    assert [line["commit_id"] for line in lines(result.stdout)] == list(range(101, 601))
    assert lines(inspect("info", many, "--json").stdout)[0]["first_kept"]["commit_id"] == 101


def test_json_is_one_line_each(tmp_path: Path) -> None:
    """A value is stored as the client wrote it, line breaks too. In the output it is on one line, and its numbers are
    still written as they were."""
    store = new_store(tmp_path)
    value = b'{"a":\r\n 12345678901234567890123.50,\n "b": "x y"}'
    store.journal.append(3, TIME, encode_command(PutCommand(namespace="default", key="k", value=Raw(value))))
    store.write()
    store.commit("default")
    store.close()
    for arguments in (("log", tmp_path, "--values"), ("state", tmp_path)):
        output = inspect(*arguments, "--json").stdout
        assert output.count("\n") == 1
        assert '"value":{"a":12345678901234567890123.50,"b":"x y"}' in output


# --- the table ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_table_fits_the_terminal(story: Path, columns: int) -> None:
    """No line is wider than the terminal, columns are aligned, and what was shortened ends with an ellipsis. Columns
    that had no room are named on standard error."""
    result = inspect("log", story, "--values", columns=columns)
    table = result.stdout.splitlines()
    assert len(table) == 10
    assert max(map(len, table)) <= columns
    term = table[0].index("term") + len("term")
    assert {line[term - 1] for line in table[1:]} == {"3"}
    kind = table[0].index("kind")
    assert [line[kind:].split()[0] for line in table[1:]] == KINDS
    assert ("2023-11-14T22:13:20Z" in table[1]) is (columns > 80)
    assert "…" in table[5]
    assert ("no room for client, size, checksum" in result.stderr) is (columns == 80)


def test_table_can_not_move_the_cursor(story: Path) -> None:
    """A key may hold a line break or a terminal's escape code; the table shows them as text."""
    output = inspect("state", story).stdout
    assert "\x1b" not in output
    assert r"city\n\u001b[31m" in output


def test_table_is_aligned_past_its_sample(many: Path) -> None:
    """The widths are settled on the first rows; the later ones, with longer numbers, stay in line."""
    table = inspect("log", many).stdout.splitlines()
    assert len(table) == 601
    assert len(set(map(len, table))) <= 2  # "put" rows and the header
    assert {line.index("default") for line in table[1:]} == {table[0].index("namespace")}


def test_colour_only_on_a_terminal(story: Path) -> None:
    """On a terminal the heading is bold; through a pipe, or with NO_COLOR, there is not one escape code."""

    def on_terminal(**env: str) -> bytes:
        ours, theirs = pty.openpty()
        process = start("log", story, stdout=theirs, env=env)
        os.close(theirs)
        output = b""
        try:
            while part := os.read(ours, 65536):
                output += part
        except OSError:  # Linux: the other end is closed
            pass
        os.close(ours)
        process.communicate()
        return output

    assert b"\x1b[1m" in on_terminal()
    assert b"\x1b" not in on_terminal(NO_COLOR="1")
    assert "\x1b" not in run("log", story)[1]


# --- live, dead, copied ---------------------------------------------------------------------------------------


def test_live_directory(story: Path) -> None:
    """While a store has the directory open, the inspector in another process sees each commit, and the store goes on
    writing as if nobody were there."""
    store = Store("database", story)
    put(store, "live", "one", client="me")
    status, out, err = run("log", story, "--json", "--tail", 1)
    assert (status, err) == (0, "")
    assert (lines(out)[0]["key"], lines(out)[0]["state"]) == ("live", "committed")
    put(store, "live", "two")
    assert lines(run("state", story, "--json", "--prefix", "live")[1])[0]["value"] == "two"
    store.close()


def test_a_listing_that_waits_for_its_reader_holds_nothing(many: Path) -> None:
    """A listing has begun and waits for its reader; meanwhile the node commits more, in transactions that reuse pages.
    `info` shows that the listing holds no snapshot meanwhile. It goes on to where the log ended when it began, every
    checksum right; the next one has the rest."""
    store = Store("database", many)
    fill(store, 300, "y" * 1000)
    process = start("log", many, "--json", "--values", bufsize=0)
    assert process.stdout is not None
    first = process.stdout.readline()
    fill(store, 300)
    wait_until(lambda: not lines(run("info", many, "--json")[1])[0]["readers"], "the listing holds no snapshot")
    rest, err = process.communicate()
    found = lines((first + rest).decode())
    assert (process.returncode, err) == (0, b"")
    assert [line["commit_id"] for line in found] == list(range(1, 901))
    assert not any("damaged" in line for line in found)
    assert lines(run("log", many, "--json", "--tail", 1)[1])[0]["commit_id"] == 1200
    store.close()


def test_nothing_is_written(story: Path) -> None:
    """All commands leave the data file and the node's lock file byte for byte as they were, and add no file."""
    before = {path.name: path.read_bytes() for path in story.iterdir() if not path.name.endswith("-lock")}
    for command in ("log", "commits", "state", "info"):
        assert inspect(command, story).exit_code == 0
    assert {path.name: path.read_bytes() for path in story.iterdir() if not path.name.endswith("-lock")} == before


def test_read_only_copy(story: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the data file and its tail alone, in a directory where this user may write nothing: everything can be
    read, and not even LMDB's table of readers appears beside them. Root is let in everywhere, so root is told no in its
    place."""
    (story / "raftnode.mdb-lock").unlink()
    (story / records.LOCK_FILE).unlink()
    (story / records.DATA_FILE).chmod(0o400)
    (story / records.TAIL_FILE).chmod(0o400)
    story.chmod(0o500)
    if os.geteuid() == 0:
        monkeypatch.setattr(os, "access", lambda *_arguments, **_named: False)
    for command in ("log", "commits", "state", "info"):
        assert inspect(command, story).exit_code == 0
    assert {path.name for path in story.iterdir()} == {records.DATA_FILE, records.TAIL_FILE}
    story.chmod(0o700)


def test_head_ends_quietly(many: Path) -> None:
    """The reader of the output goes away after one line (`| head -1`): no message, and status 0."""
    process = start("log", many, "--json", "--values")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
    process.stderr.close()


def test_nobody_reads(story: Path) -> None:
    """The same when the reader was gone before the first line: also what Python flushes at its end stays quiet."""
    ours, theirs = os.pipe()
    os.close(ours)
    process = start("log", story, stdout=theirs)
    os.close(theirs)
    assert (process.communicate()[1], process.returncode) == (b"", 0)


def test_head_of_a_damaged_log(many: Path) -> None:
    """The same when damage was met before: quiet but for the exit status, which tells."""
    flip(many, records.LOG, records.log_key(1), -3)
    process = start("log", many, "--json", "--values")
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    _, err = process.communicate()
    assert (process.returncode, b"Traceback" in err) == (4, False)


def test_output_that_can_not_be_written(story: Path) -> None:
    """The disk that the output goes to is full: one line, status 1. And with standard output closed from the start the
    data file, opened next, does not take its place: nothing is written to it, nor to LMDB's table of readers."""
    with Path("/dev/full").open("wb") as full:
        process = start("log", story, stdout=full)
    assert process.communicate()[1] == b"raftnode-inspect: the output can't be written: No space left on device\n"
    assert process.returncode == 1
    before = (story / records.DATA_FILE).read_bytes()
    command = f'"{sys.executable}" -m raftnode.inspector log "{story}" >&- 2>&-'
    subprocess.run(["sh", "-c", command], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    assert (story / records.DATA_FILE).read_bytes() == before
    assert b"commit_id" not in (story / f"{records.DATA_FILE}-lock").read_bytes()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(many: Path, number: signal.Signals, status: int) -> None:
    """Ctrl-C goes to all processes of the terminal, SIGTERM to the one that was started: both end it at once, quietly,
    with the shell's status for that signal, and no process stays behind (its end of the pipe is closed)."""
    store = Store("database", many)
    fill(store, 300, "y" * 1000)
    store.close()
    process = start("log", many, "--json", "--values", bufsize=0, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline()
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    assert process.wait() == status
    out, err = process.communicate()
    assert err == b""
    assert b'"commit_id":900,' not in out


def test_memory_does_not_grow(many: Path) -> None:
    """Six hundred entries of a kilobyte each are listed in memory that would not hold a third of them."""
    store = Store("database", many)
    fill(store, 600, "y" * 1000)
    store.close()
    with Directory(many, Settings().map_bytes) as directory:
        tracemalloc.start()
        seen = sum(1 for record in directory.entries(601) if record.entry)
        seen += sum(1 for value in directory.values() if value.record)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert seen == 1200
    assert peak < 200_000


# --- what can't be read ---------------------------------------------------------------------------------------


def missing(path: Path) -> Path:
    return path / "nowhere"


def a_file(path: Path) -> Path:
    (path / "file").write_text("hello")
    return path / "file"


def empty(path: Path) -> Path:
    return path


def garbage(path: Path) -> Path:
    (path / records.DATA_FILE).write_bytes(b"garbage " * 4096)
    return path


def foreign(path: Path) -> Path:
    env = lmdb.open(str(path / records.DATA_FILE), subdir=False, max_dbs=2)
    with env.begin(write=True) as txn:
        txn.put(b"someone", b"else")
    env.close()
    return path


def half_made(path: Path) -> Path:
    env = lmdb.open(str(path / records.DATA_FILE), subdir=False, max_dbs=4)
    for name in records.DATABASES:
        env.open_db(name)
    env.close()
    return path


def newer(path: Path) -> Path:
    make_story(path / "new")
    newer_format = records.pack_meta(b"format", records.FORMAT + 1)
    change(path / "new", records.META, lambda txn, db: txn.put(b"format", newer_format, db=db))
    return path / "new"


def cut_off(path: Path) -> Path:
    store = new_store(path / "cut")
    fill(store, 600)
    store.close()
    with (path / "cut" / records.DATA_FILE).open("r+b") as file:
        file.truncate(5 * 4096)
    return path / "cut"


@pytest.mark.parametrize(
    ("make", "status", "words"),
    [
        (missing, 3, "no such directory"),
        (a_file, 3, "is a file"),
        (empty, 3, "holds no node"),
        (garbage, 3, "is not a file of ours"),
        (foreign, 3, "another program"),
        (half_made, 3, "holds no node yet"),
        (newer, 3, f"written in format {records.FORMAT + 1}"),
        (cut_off, 4, "is cut off"),
    ],
)
def test_unusable(make: Callable[[Path], Path], status: int, words: str, tmp_path: Path) -> None:
    """Each thing that is no readable directory gets one line that names it and says what is wrong, nothing on standard
    output, and its exit status; from every command, and for two of them in a process of its own as well."""
    path = make(tmp_path)
    results = [inspect(command, path, "--json") for command in ("log", "commits", "state", "info")]
    seen = [(result.exit_code, result.stdout, result.stderr) for result in results]
    if make in (missing, cut_off):
        seen.append(run("log", path))
    for exit_status, out, err in seen:
        assert (exit_status, out) == (status, "")
        assert err.startswith("raftnode-inspect: ")
        assert words in err
        assert str(path) in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [(), ("log",), ("nonsense", "."), ("log", ".", "--tail", "0"), ("log", ".", "--from", "x"), ("state", "a", "b")],
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    """Wrong usage has status 2 and says what is wrong on standard error."""
    result = inspect(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr


def test_range_that_ends_before_it_begins(story: Path) -> None:
    """--from after --to is a slip, and is told as one."""
    assert inspect("log", story, "--from", 5, "--to", 3).exit_code == 2


def test_a_defect_is_one_line(story: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the inspector itself be wrong somewhere, that is one line with the place, and status 1."""

    def broken(*_arguments: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(Directory, "sizes", broken)
    result = inspect("info", story)
    assert result.exit_code == 1
    assert result.stderr.startswith("raftnode-inspect: unexpected ZeroDivisionError: oh (at test_inspector.py:")
    assert result.stderr.count("\n") == 1


# --- damage ---------------------------------------------------------------------------------------------------


def damaged_ids(path: Path, *arguments: object) -> list[int]:
    """commit_ids marked in `log`, after a check that the run ended with status 4 and one line, and that as a table it
    has as many marks."""
    result = inspect("log", path, "--json", *arguments)
    found = [line for line in lines(result.stdout) if line.get("damaged")]
    assert all(line["reason"] for line in found)
    table = inspect("log", path, *arguments)
    assert result.exit_code == table.exit_code == (4 if found else 0)
    assert result.stderr.count("\n") == (1 if found else 0)
    assert table.stdout.count("DAMAGED: ") == len(found)
    return [line["commit_id"] for line in found]


@pytest.mark.parametrize("byte", [8, 16, 20, -3], ids=["term", "time", "checksum", "command"])
@pytest.mark.parametrize("commit_id", [1, 300, 600])
def test_flipped_byte_in_the_log(many: Path, commit_id: int, byte: int) -> None:
    """One bit of one entry is flipped: that entry is marked and no other, though each checksum is seeded with the one
    before; also when the listing begins at the entry, or right after it. All other entries are printed."""
    flip(many, records.LOG, records.log_key(commit_id), byte)
    assert damaged_ids(many) == [commit_id]
    assert damaged_ids(many, "--from", commit_id) == [commit_id]
    assert damaged_ids(many, "--from", commit_id + 1) == []
    assert len(lines(inspect("log", many, "--json").stdout, "entry")) == 600


def test_unreadable_entries(many: Path) -> None:
    """One record is cut off in its header, one in its command, one has a record format that does not exist. All are
    marked; of the last two what can be read is shown. The neighbours are sound."""

    def edit(txn: lmdb.Transaction, db: Any) -> None:
        for commit_id, length in ((100, 9), (200, 70)):
            txn.put(records.log_key(commit_id), (txn.get(records.log_key(commit_id), db=db) or b"")[:length], db=db)

    change(many, records.LOG, edit)
    flip(many, records.LOG, records.log_key(400), 0)
    assert damaged_ids(many) == [100, 200, 400]
    found = {line["commit_id"]: line for line in lines(inspect("log", many, "--json", "--values").stdout)}
    assert found[100] == {"record": "damage", "commit_id": 100, "to": 100, "namespace": None, "key": None,
                          "damaged": True, "reason": found[100]["reason"]}  # fmt: skip
    assert "cut off" in found[100]["reason"]
    assert (found[200]["kind"], found[200]["namespace"], found[200]["key"]) == ("put", "default", None)
    assert found[200]["raw"].startswith('{"kind":"put"')
    assert (found[400]["key"], found[400]["value"]) == ("k00399", "x" * 40)


def test_holes(many: Path) -> None:
    """Entries are gone from the middle and from the end. Each hole is one mark that tells its ends, and the entries
    around it are shown."""

    def edit(txn: lmdb.Transaction, db: Any) -> None:
        for commit_id in (*range(200, 210), 599, 600):
            txn.delete(records.log_key(commit_id), db=db)

    change(many, records.LOG, edit)
    assert damaged_ids(many) == [200, 599]
    found = lines(inspect("log", many, "--json").stdout)
    assert [(line["commit_id"], line["to"]) for line in found if line["record"] == "damage"] == [(200, 209), (599, 600)]
    assert [line["commit_id"] for line in found if line["record"] == "entry"] == [*range(1, 200), *range(210, 599)]


def test_entry_in_the_wrong_place(story: Path) -> None:
    """The key of an entry was changed, so that it stands far past the end: its own place is reported as missing, and
    the entry as out of place."""

    def edit(txn: lmdb.Transaction, db: Any) -> None:
        stored = txn.pop(records.log_key(5), db=db)
        txn.put(records.log_key(5 + 2**56), stored or b"", db=db)

    change(story, records.LOG, edit)
    assert damaged_ids(story) == [5, 5 + 2**56]


def test_command_of_a_newer_version(tmp_path: Path) -> None:
    """An entry that matches its checksum, but whose command this version does not know, is shown as far as it goes."""
    store = new_store(tmp_path)
    store.journal.append(3, TIME, Raw(b'{"kind":"lease","ttl":5}'), Noop())  # that version knows what it does
    store.write()
    store.close()
    result = inspect("log", tmp_path, "--json", "--values")
    line = lines(result.stdout)[0]
    assert result.exit_code == 4
    assert (line["kind"], line["raw"], line["damaged"]) == ("lease", '{"kind":"lease","ttl":5}', True)
    assert "does not understand" in line["reason"]


def test_flipped_byte_in_a_value(many: Path) -> None:
    """One bit of a committed value is flipped, then another's JSON is broken, then a third is cut short. Each is
    marked, with what can be read of it; the other 597 are sound."""
    flip(many, records.COMMITTED, b"default\0k00010", -5)
    flip(many, records.COMMITTED, b"default\0k00020", -1)
    change(many, records.COMMITTED, lambda txn, db: txn.put(b"default\0k00030", b"short", db=db))
    result = inspect("state", many, "--json")
    found = lines(result.stdout)
    marked = {line["key"]: line for line in found if line.get("damaged")}
    assert result.exit_code == inspect("state", many).exit_code == 4
    assert len(found) == 600
    assert list(marked) == ["k00010", "k00020", "k00030"]
    assert all("does not match its checksum" in line["reason"] for line in marked.values())
    assert marked["k00010"]["value"] == "x" * 36 + "y" + "x" * 3
    assert marked["k00020"]["raw"] == '"' + "x" * 40 + "#"
    assert marked["k00030"]["record"] == "damage"
    assert inspect("state", many).stdout.count("DAMAGED: ") == 3
    assert lines(inspect("state", many, "--json", "--prefix", "k0004").stdout)[0]["key"] == "k00040"


@pytest.mark.parametrize("fact", [b"format", b"commit_id", b"ballot", b"memberships"])
def test_damaged_fact(story: Path, fact: bytes) -> None:
    """A record about the node itself is damaged: `info` marks it and tells the rest, and the log is listed. Only what
    is committed can't be told when that is the record."""
    flip(story, records.META, fact, -1)
    result = inspect("info", story, "--json")
    line = lines(result.stdout)[0]
    assert (result.exit_code, line["damaged"], line["node"] is not None) == (4, True, True)
    assert repr(fact.decode()) in line["reason"]
    assert "DAMAGED" in inspect("info", story).stdout
    log = inspect("log", story, "--json")
    assert log.exit_code == 4
    assert len(lines(log.stdout, "entry")) == 9
    assert {entry["state"] for entry in lines(log.stdout, "entry")} == (
        {None} if fact == b"commit_id" else {"committed", "staged"}
    )
    commits = inspect("commits", story, "--json")
    assert commits.exit_code == 4
    assert bool(lines(commits.stdout, "entry")) == (fact != b"commit_id")


def leaves(data: bytes, text: bytes) -> list[int]:
    """The leaf pages (flag 2 at byte 10) of a data file that hold a text."""
    pages = range(0, len(data), 4096)
    return [page for page in pages if text in data[page : page + 4096] and data[page + 10] == 2]


@pytest.mark.parametrize(("filling", "rest_is_read"), [(b"\xff", True), (b"\0", False)])
def test_lost_page_of_values(many: Path, filling: bytes, rest_is_read: bool) -> None:
    """A page of committed values is overwritten. LMDB refuses one of ones, and the values after it are shown; at a page
    of zeros it ends the process from within, and then what came before is printed all the same. Either way: status 4,
    our one line, no traceback."""
    file = many / records.DATA_FILE
    data = bytearray(file.read_bytes())
    for page in leaves(bytes(data), b"default\0k00300"):
        data[page : page + 4096] = filling * 4096
    file.write_bytes(data)
    status, out, err = run("state", many, "--json", "--keys-only")
    keys = [line["key"] for line in lines(out, "value")]
    assert status == 4
    assert len([line for line in err.splitlines() if line.startswith("raftnode-inspect: ")]) == 1
    assert "Traceback" not in err
    assert keys[:200] == [f"k{n:05}" for n in range(200)]
    assert "k00300" not in keys
    assert ("k00599" in keys) is rest_is_read
    assert keys == sorted(set(keys))


@pytest.mark.parametrize("filling", [b"\xff", b"\0"])
def test_lost_page_of_the_log(many: Path, filling: bytes) -> None:
    """A page of the log is overwritten: the entries on it are one hole, and those before and after it are shown."""
    file = many / records.DATA_FILE
    data = bytearray(file.read_bytes())
    for page in leaves(bytes(data), b'"key":"k00300"'):
        data[page : page + 4096] = filling * 4096
    file.write_bytes(data)
    status, out, _ = run("log", many, "--json")
    holes, entries = lines(out, "damage"), lines(out, "entry")
    assert status == 4
    assert len(holes) == 1
    assert holes[0]["commit_id"] <= 301 <= holes[0]["to"]
    assert len(entries) == 600 - (holes[0]["to"] - holes[0]["commit_id"] + 1)
    assert "can't be read" in holes[0]["reason"]
    assert not any(entry.get("damaged") for entry in entries)
