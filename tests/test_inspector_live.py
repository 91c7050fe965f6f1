"""`raftnode-inspect` beside nodes that write: it is right about what clients were told, follows what happens, and costs
the node nothing however slowly it is read.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from msgspec import Raw, Struct
from test_inspector import ADDRESS, TIME, fill, inspect, lines, new_store, run, start
from test_processes import numbered, seeded

from raftnode import inspector, output, records
from raftnode.about import NamespaceLine, NodeLine
from raftnode.client import Client
from raftnode.consensus.ballot import Ballot
from raftnode.lines import EntryLine, ValueLine
from raftnode.messages import Entry, PutCommand, chain, encode_command
from raftnode.store import Store
from raftnode.testing.processes import ClusterOfProcesses, NodeProcess, Writers, free_address, wait_until


class Following:
    """A `raftnode-inspect` that runs on, and the lines of JSON that it has printed so far."""

    def __init__(self, *arguments: object) -> None:
        self.lines: list[dict[str, Any]] = []
        self.process = start(*arguments, "--json", start_new_session=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(json.loads(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()

    def of(self, record: str) -> list[dict[str, Any]]:
        return [line for line in list(self.lines) if line["record"] == record]

    def await_entry(self, commit_id: int, state: str | None = None) -> dict[str, Any]:
        """Wait until an entry was listed; the last time that it was."""

        def listed() -> dict[str, Any] | None:
            assert self.process.poll() is None, "it runs on"
            found = [line for line in self.of("entry") if line["commit_id"] == commit_id]
            return found[-1] if found and state in (None, found[-1]["state"]) else None

        return wait_until(listed, f"entry {commit_id} is listed", explain=lambda: str(self.lines[-5:]))

    def interrupt(self) -> tuple[int, bytes]:
        """Ctrl-C; the exit status, and what was said on standard error."""
        os.killpg(self.process.pid, signal.SIGINT)
        status = self.process.wait()
        assert self.process.stderr is not None
        return status, self.process.stderr.read()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    """One node, serving."""
    address = free_address()
    running = NodeProcess(address, [address], tmp_path)
    running.start().await_answer()
    yield running
    running.kill()


# --- what clients were told -----------------------------------------------------------------------------------


def test_what_clients_were_told_is_in_the_past(tmp_path: Path) -> None:
    """Clients put and delete a few keys again and again on three nodes, one of which is killed and started again
    meanwhile; each answer is noted. Afterwards, by each of the directories, two of them killed: every acknowledged
    change stands in its key's history at its commit_id, by the client that made it, with the version and the replaced
    value that it was told; and after each, the state as of that commit_id has what was written."""
    told: list[dict[str, Any]] = []
    chance = seeded(41)
    with ClusterOfProcesses(3, tmp_path) as cluster:
        leader = cluster.await_leader()
        for number in range(60):
            if number == 20:
                leader.kill()
            if number == 40:
                leader.start()
                cluster.await_caught_up()
            name, key = chance.choice(["ann", "bob"]), chance.choice(["a", "b", "c"])
            others = [one.address for one in cluster.running]
            with Client(others, timeout=20, name=name) as client:
                if chance.random() < 0.3:
                    answer, kind, value = client.delete(key), "delete", None
                else:
                    value = {"n": number}
                    answer, kind = client.put(key, value), "put"
            told.append({**answer, "client": name, "key": key, "kind": kind, "value": value})
        cluster.await_caught_up(told[-1]["commit_id"])
        directories = [one.volume for one in cluster]
        cluster.await_written(told[-1]["commit_id"])
        cluster.kill(list(cluster)[1:])
        for directory in directories:
            check_told(directory, told)
        nodes = {line["directory"]: line for line in lines(inspect("info", *directories, "--json").stdout, "node")}
        assert [nodes[str(one.volume)]["address"] for one in cluster] == cluster.addresses
        assert len({line["cluster"] for line in nodes.values()}) == 1
        assert all(line["witnesses"] for line in nodes.values())


def check_told(directory: Path, told: list[dict[str, Any]]) -> None:
    """A directory against the answers that clients got, in order."""
    found = {
        line["commit_id"]: line
        for key in ("a", "b", "c")
        for line in lines(inspect("history", directory, key, "--json").stdout, "change")
    }
    assert set(found) == {answer["commit_id"] for answer in told}
    assert lines(inspect("info", directory, "--json").stdout)[0]["commit_id"] >= told[-1]["commit_id"]
    state: dict[str, Any] = {}
    for answer in told:
        line = found[answer["commit_id"]]
        assert {name: line[name] for name in ("kind", "key", "client", "replaced")} == {
            name: answer[name] for name in ("kind", "key", "client", "replaced")
        }
        assert line.get("value") == answer["value"]
        assert line.get("before") == state.get(answer["key"])
        assert line["version"] == answer.get("version")
        state[answer["key"]] = answer["value"]
        past = lines(inspect("state", directory, "--at", answer["commit_id"], "--json").stdout, "value")
        assert {value["key"]: value["value"] for value in past} == {k: v for k, v in state.items() if v is not None}


# --- following ------------------------------------------------------------------------------------------------


def test_follow_over_a_restart(node: NodeProcess) -> None:
    """`log --follow --tail 1` lists what a node commits while it runs, and goes on after a kill -9 and a restart; each
    entry once, in order, without a gap, with what the clients were told. Those that were listed as staged are told to
    have committed. Ctrl-C ends it quietly."""
    with node.client() as client:
        first = client.put("before", 0)["commit_id"]
    with Following("log", node.volume, "--follow", "--tail", 1) as following:
        following.await_entry(first)
        told = {}
        for part in range(3):
            with node.client() as client:
                for number in range(20):
                    key = f"{part}-{number}"
                    told[client.put(key, number)["commit_id"]] = key
            following.await_entry(max(told))
            node.restart().await_answer()
        with node.client() as client:
            last = client.put("after", 1)["commit_id"]
        following.await_entry(last)

        def all_committed() -> bool:
            staged = [line["commit_id"] for line in following.of("entry") if line["state"] == "staged"]
            committed = [line["commit_id"] for line in following.of("committed")]
            return not staged or max(staged) <= max(committed, default=0)

        wait_until(all_committed, "what was staged is told to have committed", explain=lambda: str(following.lines))
        assert following.interrupt() == (130, b"")
        listed = following.of("entry")
        assert [line["commit_id"] for line in listed] == list(range(first, last + 1))
        assert {line["commit_id"]: line["key"] for line in listed if line["commit_id"] in told} == told
        assert following.of("cut") == following.of("damage") == []


def test_follow_ends_when_nobody_reads(node: NodeProcess) -> None:
    """`log --follow | head -1` on a node where nothing happens: it ends as soon as head has, with status 0, not at the
    next write."""
    process = start("log", node.volume, "--follow", "--json")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 0
    assert process.stderr.read() == b""
    process.stderr.close()


def test_follow_ends_with_the_process_that_was_started(node: NodeProcess) -> None:
    """kill -9 leaves nothing behind that would follow the log for ever: the pipe is closed."""
    process = start("log", node.volume, "--follow", "--json")
    assert process.stdout is not None
    assert process.stdout.readline()
    process.kill()
    process.communicate()


def test_follow_up_to_a_commit_id(node: NodeProcess) -> None:
    """With --to it ends once that entry was listed, and with a filter it lists only what is wanted."""
    with node.client() as client:
        last = client.put("one", 1)["commit_id"] + 3
        with Following("log", node.volume, "--follow", "--to", last, "--key", "wanted") as following:
            for key in ("wanted", "other", "wanted", "wanted"):
                client.put(key, 1)
            assert following.process.wait() == 0
    assert [line["commit_id"] for line in following.of("entry")] == [last - 2, last]


def replace_staged(store: Store, first: int, term: int, key: str) -> None:
    """What the leader of a later term does to this log: its own entry, in place of all from `first` on."""
    previous = store.journal.id_at(first - 1)
    checksum = store.journal.entries(first - 1, first - 1, 0)[0].checksum
    command = encode_command(PutCommand(namespace="default", key=key, value=Raw(b"1")))
    store.write(Ballot(term, ADDRESS))
    entry = Entry(term, first, TIME, chain(checksum, term, first, TIME, command), command)
    store.journal.accept(previous, [entry], store.commit_id)
    store.write()


def stage(store: Store, term: int, *keys: str) -> None:
    for key in keys:
        store.journal.append(term, TIME, encode_command(PutCommand(namespace="default", key=key, value=Raw(b"0"))))
    store.write()


def test_follow_tells_of_a_cut(tmp_path: Path) -> None:
    """Three entries are staged and listed as such; then a leader of a later term replaces the last two by one of its
    own. That is told with the first one that was cut, and the new entry follows; when all has committed, that is told.
    As a table it is told in words, in the same places."""
    store = new_store(tmp_path / "d")
    fill(store, 10)
    with Following("log", tmp_path / "d", "--follow", "--from", 10) as following:
        following.await_entry(10, "committed")
        stage(store, 3, "x", "y", "z")
        following.await_entry(13, "staged")
        replace_staged(store, 12, 4, "new")
        wait_until(lambda: following.of("cut"), "the cut is told", explain=lambda: str(following.lines))
        wait_until(lambda: following.lines[-1].get("key") == "new", "the new entry is listed")
        store.commit("default")
        wait_until(lambda: following.of("committed"), "what has committed is told")
        store.close()
        assert following.interrupt() == (130, b"")
    shown = [(line["record"], line["commit_id"], line.get("key"), line.get("state")) for line in following.lines]
    assert shown == [
        ("entry", 10, "k00009", "committed"),
        ("entry", 11, "x", "staged"),
        ("entry", 12, "y", "staged"),
        ("entry", 13, "z", "staged"),
        ("cut", 12, None, None),
        ("entry", 12, "new", "staged"),
        ("committed", 12, None, None),
    ]


def test_follow_as_a_table(tmp_path: Path) -> None:
    """The table of --follow comes row by row, not when enough rows are there to settle its widths; a cut is told in
    words."""
    store = new_store(tmp_path / "d")
    fill(store, 1)
    process = start("log", tmp_path / "d", "--follow")
    assert process.stdout is not None
    rows = [process.stdout.readline().decode() for _ in range(2)]
    stage(store, 3, "x")
    rows.append(process.stdout.readline().decode())
    replace_staged(store, 2, 4, "new")
    rows += [process.stdout.readline().decode() for _ in range(2)]
    process.kill()
    process.communicate()
    store.close()
    assert [row.split()[0] for row in rows[:3]] == ["commit_id", "1", "2"]
    assert rows[3] == ("the staged entries from 2 on, listed above, were cut: another leader has replaced them\n")
    assert " new " in rows[4]


def test_another_copy_in_its_place(tmp_path: Path) -> None:
    """The data file is replaced while it is followed: by a later copy of the same node's it goes on; by one in which
    other entries are committed it ends with one line and status 3, also if it has listed those as staged before."""
    store = new_store(tmp_path / "d")
    fill(store, 3)
    file = tmp_path / "d" / records.DATA_FILE

    def replace(count: int, prefix: str) -> None:
        aside = tmp_path / prefix
        aside.mkdir()
        for name in (records.DATA_FILE, records.TAIL_FILE):
            (aside / name).write_bytes((tmp_path / "d" / name).read_bytes())
        store = Store("database", aside)
        stage(store, 3, *(f"{prefix}{n}" for n in range(count)))
        store.commit("default")
        store.close()
        (aside / records.DATA_FILE).replace(file)

    with Following("log", tmp_path / "d", "--follow") as following:
        following.await_entry(3)
        stage(store, 3, "staged")
        following.await_entry(4, "staged")
        original = file.read_bytes()
        store.commit("default")
        store.close()
        wait_until(lambda: following.of("committed"), "it is told to have committed")
        replace(2, "later")
        following.await_entry(6, "committed")
        (tmp_path / "old").write_bytes(original)
        (tmp_path / "old").replace(file)
        replace(5, "other")
        status = following.process.wait()
        assert following.process.stderr is not None
        words = following.process.stderr.read().decode()
    assert status == 3
    assert words.count("\n") == 1
    assert "was replaced by another copy" in words


# --- slow readers ---------------------------------------------------------------------------------------------


def free_bytes(path: Path) -> int:
    return int(lines(run("info", path, "--json")[1])[0]["sizes"]["free"])


def test_paused_readers_do_not_make_the_file_grow(tmp_path: Path) -> None:
    """Five people pause their listings in a pager: the output is not read on. Meanwhile the node commits 120
    times, each of which leaves some pages to be used again. Nearly all of them are, as if nobody were there.
    That the measure sees it: with a snapshot held open, the same writes leave many times as many pages unused."""
    store = new_store(tmp_path / "d")
    fill(store, 2000, "y" * 300)

    def free_after_writes() -> int:
        for n in range(60):
            put_one(store, f"k{n:05}", n)
            put_one(store, "k01999", f"{n}{'y' * 900}")
        return free_bytes(tmp_path / "d")

    quiet = free_after_writes()
    listings: list[list[object]] = [
        ["log", tmp_path / "d", "--values"],
        ["log", tmp_path / "d", "--values", "--follow"],
        ["commits", tmp_path / "d", "--values"],
        ["state", tmp_path / "d"],
        ["history", tmp_path / "d", "k01999"],
    ]
    processes = [start(*words, "--json", bufsize=0) for words in listings]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.read(1)
    wait_until(lambda: holds_nothing(tmp_path / "d", *processes), "the listings hold no snapshot")
    paused = free_after_writes()
    for process in processes:
        process.kill()
        process.communicate()
    with holder(tmp_path / "d") as held:
        pinned = free_after_writes()
        held.kill()
    store.close()
    sys.stdout.write(f"free: {quiet=} {paused=} {pinned=}\n")
    assert pinned - paused > 1000 * 4096, "the measure would have seen it"
    assert paused - quiet < 100 * 4096


def put_one(store: Store, key: str, value: object) -> None:
    command = PutCommand(namespace="default", key=key, value=Raw(json.dumps(value).encode()))
    store.journal.append(3, TIME, encode_command(command))
    store.write()
    store.commit("default")
    store.write()


def holds_nothing(path: Path, *processes: subprocess.Popen[bytes]) -> bool:
    readers = lines(run("info", path, "--json")[1])[0]["readers"]
    assert all(process.poll() is None for process in processes), "they wait for their readers"
    return all(reader["txn"] is None for reader in readers)


def holder(path: Path) -> subprocess.Popen[bytes]:
    """A process that holds a snapshot; returns once it does."""
    program = (
        "import lmdb, sys\n"
        f"env = lmdb.open({str(path / records.DATA_FILE)!r}, subdir=False, readonly=True, map_size=1 << 36)\n"
        "txn = env.begin()\nprint('held', flush=True)\nsys.stdin.read()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_state_that_went_on_later_says_so(tmp_path: Path) -> None:
    """`state` waits for its reader while the node commits more. The line between the values tells as of which commit_id
    the later ones are: none above it is newer than that, and none below it misses what was committed until then. With
    --at, the same listing is one state."""
    store = new_store(tmp_path / "d")
    fill(store, 2000, "y" * 300)
    process = start("state", tmp_path / "d", "--json", bufsize=0)
    assert process.stdout is not None
    begin = process.stdout.read(1)
    wait_until(lambda: holds_nothing(tmp_path / "d", process), "the listing holds no snapshot")
    for n in (1, 1999):
        put_one(store, f"k{n:05}", n)
    at_2001 = start("state", tmp_path / "d", "--at", 2001, "--json", bufsize=0)
    assert at_2001.stdout is not None
    begin_at = at_2001.stdout.read(1)
    put_one(store, "k01999", 5)
    rest, err = process.communicate()
    found = lines((begin + rest).decode())
    rest_at = at_2001.communicate()[0]
    store.close()
    assert (process.returncode, err) == (0, b"")
    places = [n for n, line in enumerate(found) if line["record"] == "renewed"]
    assert [found[n]["commit_id"] for n in places] == [2003]
    assert all(line["modified"] <= 2000 for line in found[: places[0]])
    assert (found[-1]["modified"], found[-1]["value"]) == (2003, 5)
    assert [line["key"] for line in found if line["record"] == "value"] == [f"k{n:05}" for n in range(2000)]
    values = {line["key"]: line["modified"] for line in lines((begin_at + rest_at).decode())}
    assert values == {f"k{n:05}": n + 1 for n in range(2000)} | {"k00001": 2001}


def test_under_full_load(node: NodeProcess) -> None:
    """While ten clients write as fast as they can, a follower lists every entry once and in order, and each other
    command has status 0, nothing damaged, and of the log a beginning of what there is in the end."""
    writers = Writers([node.address], numbered("load", seeded(42)), 10, timeout=20)
    with Following("log", node.volume, "--follow") as following, writers:
        writers.await_more(200, explain=node.describe)
        wait_until(lambda: len(node.inspect("commits")) > 10, "the disk says that something is committed")
        logs = [node.inspect("log"), node.inspect("commits")[:-1], node.inspect("log", "--tail", "20", "--kind", "put")]
        key = writers.acknowledged[10].record.key
        assert [line["client"] for line in node.inspect("history", key)] == [logs_client(logs[0], key)]
        middle = logs[1][-1]["commit_id"] // 2
        replayed = [line["key"] for line in node.inspect("state", "--at", str(middle))]
        assert sorted(replayed) == sorted(line["key"] for line in logs[1][:middle] if line["kind"] == "put")
        assert sum(line["keys"] for line in node.inspect("info") if line["record"] == "namespace") > 0
        writers.await_more(200, explain=node.describe)
        writers.stop()
        last = max(done.commit_id for done in writers.acknowledged)
        following.await_entry(last)
        assert following.interrupt() == (130, b"")
    final = node.inspect("log")
    by_id = {line["commit_id"]: (line["term"], line["checksum"]) for line in final}
    followed = following.of("entry")
    for log in [*logs, followed]:
        assert all(by_id[line["commit_id"]] == (line["term"], line["checksum"]) for line in log)
    assert [line["commit_id"] for line in followed] == list(range(1, len(followed) + 1))
    assert following.of("cut") == following.of("damage") == []
    told = {done.record.key: done.commit_id for done in writers.acknowledged}
    assert {line["key"]: line["commit_id"] for line in final if line["key"] in told} == told


def logs_client(log: list[dict[str, Any]], key: str) -> str:
    return next(str(line["client"]) for line in log if line["key"] == key)


# --- several directories --------------------------------------------------------------------------------------


def test_info_side_by_side(tmp_path: Path) -> None:
    """Two directories and one that is none: the two are shown side by side, a column each, with their namespaces; the
    third is complained of in one line, and the status is that of the failure."""
    for name, count in (("one", 3), ("two", 5)):
        store = new_store(tmp_path / name)
        fill(store, count)
        store.put(3, {"key": "k", "value": 1, "namespace": "web"}, _Alone(), 1)
        store.close()
    paths = [tmp_path / "one", tmp_path / "two", tmp_path / "none"]
    result = inspect("info", *paths, "--json")
    assert result.exit_code == 3
    assert result.stderr.count("\n") == 1
    found = lines(result.stdout, "node")
    assert [(line["directory"], line["commit_id"]) for line in found] == [(str(paths[0]), 4), (str(paths[1]), 6)]
    sizes = [
        (Path(line["directory"]).name, line["namespace"], line["keys"]) for line in lines(result.stdout, "namespace")
    ]
    assert sizes == [("one", "default", 3), ("one", "web", 1), ("two", "default", 5), ("two", "web", 1)]
    value = len(records.pack_record(b"web\0k", records.Record(4, 4, 1, 0, Raw(b"1"))))
    assert lines(result.stdout, "namespace")[1]["bytes"] == len("k") + value
    table = inspect("info", *paths[:2], columns=200).stdout.splitlines()
    row = next(line for line in table if line.startswith("commit_id"))
    assert row.split()[1:] == ["4", "committed", "on", "disk", "6", "committed", "on", "disk"]
    assert max(map(len, table)) <= 200


class _Alone:
    """A transport without peers."""

    my_ip = ADDRESS
    peers: list[str] = []

    def send_data(self, *_arguments: object, **_named: object) -> None:
        pass

    def identify(self, cluster: str, node: str) -> None:
        pass


def test_info_of_a_damaged_page(tmp_path: Path) -> None:
    """A page of committed values is overwritten by zeros, on which LMDB ends the process: what `info` says of the node
    was printed before it looked at the values, and status 4 and one line tell the rest."""
    store = new_store(tmp_path)
    fill(store, 600)
    store.close()
    file = tmp_path / records.DATA_FILE
    data = bytearray(file.read_bytes())
    for page in range(0, len(data), 4096):
        if b"default\0k00300" in data[page : page + 4096] and data[page + 10] == 2:
            data[page : page + 4096] = bytes(4096)
    file.write_bytes(data)
    status, out, err = run("info", tmp_path, "--json")
    assert status == 4
    assert lines(out, "node")[0]["commit_id"] == 600
    assert len([line for line in err.splitlines() if line.startswith("raftnode-inspect: ")]) == 1


# --- progress -------------------------------------------------------------------------------------------------


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_people_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar is drawn on standard error when that is a terminal and the work takes longer than a second (here: no time
    at all), ends on a line of its own, and is not drawn otherwise."""

    def drawn(stream: io.StringIO, patience: float) -> str:
        monkeypatch.setattr(output, "_PATIENCE_S", patience)
        monkeypatch.setattr(sys, "stderr", stream)
        with output.progress(1000, "rebuilding") as advance:
            for _ in range(10):
                advance(100)
        return stream.getvalue()

    bar = drawn(_Terminal(), -1)
    assert "rebuilding" in bar
    assert "100%" in bar
    assert bar.endswith("\n")
    assert drawn(_Terminal(), 1000) == ""
    assert drawn(io.StringIO(), -1) == ""


class _TerminalBytes(io.BytesIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_makes_way_for_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the listing goes to a terminal as well, the bar is over with the first line that is printed, and does not
    come back; where it goes to a file, the bar goes on to the end."""
    monkeypatch.setattr(output, "_PATIENCE_S", -1)
    for stream, ends_at in ((_TerminalBytes(), "20%"), (io.BytesIO(), "100%")):
        monkeypatch.setattr(sys, "stderr", _Terminal())
        printed = output.Output(stream)
        with output.progress(1000, "looking", printed) as advance:
            advance(100)
            advance(100)
            printed.text("found")
            advance(800)
        printed.text("more")
        printed.spool.flush()
        bar = sys.stderr.getvalue()
        assert ends_at in bar
        assert ("100%" in bar) is (ends_at == "100%")
        assert stream.getvalue() == b"found\nmore\n"


# --- the published interface ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "kinds"),
    [
        ("log", [EntryLine, inspector.CutLine, inspector.CommittedLine]),
        ("commits", [inspector.CommittedLine]),
        ("state", [ValueLine, inspector.RenewedLine]),
        ("history", [inspector.ChangeLine]),
        ("info", [NodeLine, NamespaceLine]),
    ],
)
def test_every_field_is_documented(command: str, kinds: list[type[Struct]]) -> None:
    """The help of each command names every field of the lines that it prints with --json, and so does the docstring of
    the module, where each line stands under its `record`."""
    words = set(re.findall(r"\w+", inspect(command, "--help").stdout))
    map_ = inspector.__doc__ or ""
    for kind in kinds:
        tag = str(kind.__struct_config__.tag)
        described = re.search(rf"^    {tag} +(.*?)(?=^    \w|^$)", map_, re.MULTILINE | re.DOTALL)
        assert described, tag
        fields = set(kind.__struct_fields__)
        assert fields - words <= {"raw"}
        assert fields - set(re.findall(r"\w+", described[1])) <= {"raw", "damaged", "reason"}
    assert "raw" in map_
