"""Shows that our checks can find something: plants known faults into copies of the product, and sees who notices.

    python tools/planted.py                          # all of tests/planted_faults.toml, and the unbroken product
    python tools/planted.py --only read-on-belief    # one fault; may be given more than once
    python tools/planted.py --search 300             # which seed finds each, from seed 0 on; the recorded ones aside

Each fault is a small edit of the product's source. It is applied to a copy of the tree in a temporary directory; there
the simulator runs the recorded seed, and pytest the named test. When the recorded seed does not find it any more, as
the product has changed since, seeds from 0 on are tried, and the new one is told. An edit that does not match exactly
once, and one that makes nonsense of the code instead of a fault, is an error: the list is out of date.

The exit status is 1 when nothing finds a fault, or when the unbroken copy does not hold under the same seeds and tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import click
import msgspec
from msgspec import Struct

TREE: Final = Path(__file__).resolve().parent.parent
LIST: Final = TREE / "tests" / "planted_faults.toml"
PATIENCE_S: Final = 900.0
"""For one search or one test; a fault may also make the code run for ever, which is not finding it."""
_COPIED: Final = ("raftnode", "tools", "tests", "pyproject.toml")
_NONSENSE: Final = re.compile(r"\b(NameError|UnboundLocalError|SyntaxError|IndentationError|ImportError|TypeError)\b")
_SHOWN: Final = 70


class Edit(Struct, forbid_unknown_fields=True):
    """A change of the source. `old` is there exactly once."""

    file: str
    old: str
    new: str


class Fault(Struct, forbid_unknown_fields=True):
    """An entry of the list. Invariant: it has a seed, or a reason why no seed finds it and a test that does."""

    name: str
    breaks: str
    harm: str
    edits: list[Edit]
    seed: int | None = None
    why: str = ""
    test: str = ""


class Finding(Struct):
    """What became of a fault: which of the two noticed it, and what they said."""

    fault: Fault
    seed: int | None = None
    """A seed that finds it."""
    said: str = ""
    failed_test: str = ""
    trouble: str = ""
    """Why the entry proves nothing, as it stands."""

    @property
    def is_found(self) -> bool:
        return not self.trouble and (self.seed is not None or bool(self.failed_test))


class Unproven(Exception):
    """An entry of the list proves nothing as it stands: it does not fit the source, or its test does not run."""


def load() -> list[Fault]:
    """The list."""
    faults = msgspec.convert(tomllib.loads(LIST.read_text())["fault"], list[Fault])
    names = [fault.name for fault in faults]
    assert len(set(names)) == len(names), "each fault has a name of its own"
    return faults


def check(fault: Fault) -> None:
    """Raises Unproven when the fault does not fit the source as it is."""
    for edit in fault.edits:
        _edited(fault, edit, (TREE / edit.file).read_text())


def _edited(fault: Fault, edit: Edit, text: str) -> str:
    count = text.count(edit.old)
    if count != 1:
        raise Unproven(f"{fault.name}: in {edit.file} this is there {count} times, not once:\n{edit.old}")
    return text.replace(edit.old, edit.new)


class Copy:
    """A copy of the tree, in which the product may be broken. Everything runs there in processes of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in _COPIED:
            source = TREE / name
            if source.is_dir():
                shutil.copytree(source, directory / name, ignore=shutil.ignore_patterns(".*"))
            else:
                shutil.copy2(source, directory / name)
        imported = self._run([sys.executable, "-c", "import raftnode; print(raftnode.__file__)"]).stdout.strip()
        assert Path(imported).is_relative_to(directory), f"the copy is what is tested, not {imported}"

    def plant(self, fault: Fault) -> None:
        """Break it."""
        for edit in fault.edits:
            file = self.directory / edit.file
            file.write_text(_edited(fault, edit, file.read_text()))

    def simulate(self, first: int, seeds: int) -> tuple[int, str] | None:
        """The first of these seeds that fails, and what it said; None when all hold."""
        arguments = ["--first", str(first), "--seeds", str(seeds), "--jobs", "1", "--stop"]
        run = self._run([sys.executable, str(self.directory / "tools" / "simulate.py"), *arguments])
        if run.returncode == 0:
            return None
        found = [(int(seed), said) for seed, said in re.findall(r"^seed (\d+): (.*)$", run.stdout, re.MULTILINE)]
        assert found, f"the simulator failed and tells no seed:\n{run.stdout}{run.stderr}"
        return min(found)

    def test(self, name: str) -> str | None:
        """What a test says when it fails; None when it passes."""
        run = self._run([sys.executable, "-m", "pytest", "-n", "0", "-x", "-p", "no:cacheprovider", name])
        if run.returncode == 0 and " passed" in run.stdout:
            return None
        if run.returncode != 1:
            raise Unproven(f"{name} was not run: {run.stdout}{run.stderr}")
        said = re.search(r"^E +(.*)$", run.stdout, re.MULTILINE)
        return said[1] if said else run.stdout.strip().splitlines()[-1]

    def _run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(self.directory), "PYTHONHASHSEED": "0"}
        return subprocess.run(
            command,
            cwd=self.directory,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )


def find(fault: Fault, search: int, is_fresh: bool) -> Finding:
    """Plant a fault and see who notices. `search`: so many seeds are tried when the recorded one does not find it;
    `is_fresh`: as if none was recorded."""
    finding = Finding(fault)
    with tempfile.TemporaryDirectory(prefix="raftnode-planted-") as directory:
        try:
            check(fault)
            copy = Copy(Path(directory).resolve())
            copy.plant(fault)
            found = None if fault.seed is None or is_fresh else copy.simulate(fault.seed, 1)
            if found is None and not fault.why:
                found = copy.simulate(0, search)
            if found is not None:
                finding.seed, finding.said = found
            if fault.test:
                finding.failed_test = copy.test(fault.test) or ""
        except Unproven as error:
            finding.trouble = str(error)
        except subprocess.TimeoutExpired as error:
            finding.trouble = f"no end within {error.timeout:.0f} s"
    if _NONSENSE.search(f"{finding.said} {finding.failed_test}"):
        finding.trouble = f"the edit makes nonsense: {finding.said} {finding.failed_test}"
    return finding


def control(faults: Sequence[Fault]) -> list[str]:
    """What fails without any fault, under the same seeds and tests: nothing may."""
    with tempfile.TemporaryDirectory(prefix="raftnode-planted-") as directory:
        copy = Copy(Path(directory).resolve())
        seeds = sorted({fault.seed for fault in faults if fault.seed is not None})
        tests = sorted({fault.test for fault in faults if fault.test})
        found = [copy.simulate(seed, 1) for seed in seeds]
        said = [(test, copy.test(test)) for test in tests]
    return [
        *(f"seed {failure[0]}: {failure[1]}" for failure in found if failure is not None),
        *(f"{test}: {words}" for test, words in said if words is not None),
    ]


def _short(said: str) -> str:
    """The first words of a failure, without its place in the code."""
    words = re.sub(r"^\w+ at \S+:\d+: |\S*/raftnode-simulation-\w+/", "", said)
    return textwrap.shorten(words, _SHOWN, placeholder=" ...")


def _line(finding: Finding) -> str:
    fault = finding.fault
    if finding.trouble:
        return f"| {fault.name} | {fault.breaks} | ERROR: {_short(finding.trouble)} | |"
    seed = f"{finding.seed}: {_short(finding.said)}" if finding.seed is not None else f"no: {fault.why or 'NOT FOUND'}"
    if fault.seed is not None and finding.seed != fault.seed:
        seed += f" (recorded: {fault.seed})"
    test = "" if not fault.test else fault.test.removeprefix("tests/") if finding.failed_test else "NOT FOUND"
    return f"| {fault.name} | {fault.breaks} | {seed} | {test} |"


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", multiple=True, metavar="NAME", help="This fault only; may be given more than once.")
@click.option("--search", type=click.IntRange(1), help="Look for seeds anew, among so many.")
@click.option("--jobs", type=click.IntRange(1), default=os.cpu_count() or 1, show_default=True, help="Side by side.")
def main(only: tuple[str, ...], search: int | None, jobs: int) -> None:
    faults = [fault for fault in load() if not only or fault.name in only]
    if unknown := set(only) - {fault.name for fault in faults}:
        raise click.BadParameter(f"no fault is called {', '.join(sorted(unknown))}")
    click.echo("| fault | breaks | found by the simulator at seed | found by the test |\n|---|---|---|---|")
    with ThreadPoolExecutor(jobs) as pool:
        unbroken = pool.submit(control, faults)
        findings = []
        for finding in pool.map(lambda fault: find(fault, search or 300, search is not None), faults):
            findings.append(finding)
            click.echo(_line(finding))
    missed = [finding.fault.name for finding in findings if not finding.is_found]
    for failure in unbroken.result():
        click.echo(f"WITHOUT ANY FAULT: {failure}")
    by_simulator = sum(finding.seed is not None for finding in findings)
    click.echo(
        f"{len(findings)} faults, {by_simulator} found by the simulator, "
        f"{sum(bool(finding.failed_test) for finding in findings)} by a test; not found: {', '.join(missed) or 'none'}"
    )
    sys.exit(1 if missed or unbroken.result() else 0)


if __name__ == "__main__":
    main()
