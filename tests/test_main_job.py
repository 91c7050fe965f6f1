"""The main job on real input, smaller: `tools/load_packages.py`, run as a test."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from raftnode.testing.processes import WriteRecord


def _load_tool(name: str) -> ModuleType:
    file = Path(__file__).resolve().parents[1] / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


tool = _load_tool("load_packages")

STATUS = """\
Package: adduser
Status: install ok installed
Architecture: all
Multi-Arch: foreign
Description: add and remove users
 A paragraph of its own, with a line that is .
 .
 empty.

Package: libc6
Architecture: amd64
Multi-Arch: same
Description: GNU C Library

Package: libc6
Architecture: i386
Multi-Arch: same
"""

SERVICES = """\
# a comment
ssh\t\t22/tcp\t\t\t# SSH Remote Login Protocol
discard\t9/udp\tsink null

not a service
"""


def _sample_records(count: int) -> list[WriteRecord]:
    """What stands for the machine's files where there are none: as many, and one of many KB."""
    packages = [
        WriteRecord(f"package-{n}", f"Package: package-{n}\n" + "x" * (n * 37), "packages") for n in range(count)
    ]
    services = [WriteRecord(f"service-{n}/{n}/tcp", {"port": n}, "services") for n in range(count // 2)]
    return tool.choose(packages, services, count)


def _records(count: int) -> list[WriteRecord]:
    try:
        packages, services = tool.read_packages(Path("/var/lib/dpkg/status")), tool.read_services(Path("/etc/services"))
    except tool.BadInput:
        return _sample_records(count)
    return tool.choose(packages, services, count) if len(packages) > count else _sample_records(count)


def test_main_job(tmp_path: Path) -> None:
    """Nothing that was acknowledged is lost, and all nodes have one log, whatever is killed. 120 records of the
    machine's own tables go through three real nodes by six clients; the leader is killed with -9 in the midst and
    restarted, then all three are. Seen: every record reads back equal through each node; the leader that was restarted
    had an older log and fetched the rest; an election for each kill; the logs of the three directories end in one
    checksum, and hold each acknowledged write where its answer said."""
    account = tool.load(_records(120), nodes=3, clients=6, volume=tmp_path)

    sys.stdout.write("\n".join(tool.tell(account)) + "\n")
    assert account.problems == []
    assert account.acknowledged + account.found == account.records == 120
    assert account.repeated <= account.open_outcomes + account.not_executed
    assert set(account.read_back.values()) == {120}
    assert len(account.read_back) == 3
    assert [kill.acknowledged < 120 for kill in account.kills] == [True, True]
    [restarted] = account.catch_ups
    assert restarted.fetched > 0
    assert restarted.upto > restarted.committed + restarted.staged >= 30 - 6
    assert len(account.left_on_disk) == 3
    assert account.elections >= 3
    assert account.terms[1] > account.terms[0]
    [end] = set(account.log_ends.values())
    assert end[0] >= 120 + account.elections - 1


def test_packages_and_services_are_read(tmp_path: Path) -> None:
    """A package is known by the name that dpkg prints, so that two architectures are two records, and its value is its
    paragraph to the letter; a service by name, port and protocol. Brought about with small files of both kinds."""
    (tmp_path / "status").write_text(STATUS)
    (tmp_path / "services").write_text(SERVICES)

    packages = {record.key: record.value for record in tool.read_packages(tmp_path / "status")}
    services = {record.key: record.value for record in tool.read_services(tmp_path / "services")}

    assert list(packages) == ["adduser", "libc6:amd64", "libc6:i386"]
    assert packages["adduser"] == STATUS.split("\n\n", maxsplit=1)[0]
    assert list(services) == ["ssh/22/tcp", "discard/9/udp"]
    assert services["discard/9/udp"] == {
        "name": "discard", "port": 9, "protocol": "udp", "aliases": ["sink", "null"], "comment": "",
    }  # fmt: skip
    assert services["ssh/22/tcp"]["comment"] == "SSH Remote Login Protocol"


@pytest.mark.parametrize(("option", "content"), [("--status-file", None), ("--services-file", "nothing here\n")])
def test_a_file_that_can_not_be_loaded_is_named(tmp_path: Path, option: str, content: str | None) -> None:
    """Without its input the tool says which file it misses and what to give instead, and exits with 2. Brought about
    with a file that is not there, and with one that holds no service."""
    file = tmp_path / "input"
    (tmp_path / "status").write_text(STATUS)
    if content is not None:
        file.write_text(content)
    files = ["--status-file", str(tmp_path / "status"), option, str(file)]

    ran = CliRunner().invoke(tool.main, files)

    assert ran.exit_code == 2
    assert str(file) in ran.output
    assert f"with {option}" in ran.output


def test_a_difference_is_told() -> None:
    """What differs is named, and the last line says so: two logs that part, one that is longer."""
    log = [{"commit_id": n, "term": 1, "checksum": f"{n:08x}"} for n in (1, 2, 3)]
    forked = [*log[:1], {**log[1], "checksum": "ffffffff"}, log[2]]

    assert list(tool._differences(("a", log), ("b", log))) == []
    [parted] = tool._differences(("a", log), ("b", forked))
    assert "part at 2" in parted
    [longer] = tool._differences(("a", log), ("b", log[:2]))
    assert "has 3 entries, that of b 2" in longer
    account = tool.account_for(_sample_records(60))
    assert tool.conclude(account).startswith("the same")
    account.problems = [parted] * 7
    assert tool.conclude(account).startswith("DIFFERENT: 7 problems")
    assert tool.conclude(account).endswith("and 2 more")
