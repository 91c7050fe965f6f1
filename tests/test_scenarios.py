"""Replays `scenarios/*.txt` and compares: each is a story of the protocol, with everything that was said in it.

After a change that is meant to alter them, record them anew and review the difference:

    RAFTNODE_RECORD=1 pytest tests/test_scenarios.py; git diff tests/scenarios
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import pytest

from raftnode.testing.scenario import ScenarioError, parse, run

SCENARIOS = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))


@pytest.mark.parametrize("path", SCENARIOS, ids=[path.stem for path in SCENARIOS])
def test_scenario_plays_as_recorded(path: Path) -> None:
    """The commands of the file produce the transcript in the file. (Each file names its source.)"""
    recorded = path.read_text()
    played = run(recorded)
    if os.environ.get("RAFTNODE_RECORD"):
        path.write_text(played)
    elif played != recorded:
        lines = difflib.unified_diff(
            recorded.splitlines(), played.splitlines(), f"{path.name} as recorded", "as played now", lineterm=""
        )
        pytest.fail("\n".join(["the transcript differs; if it should: RAFTNODE_RECORD=1", *lines]), pytrace=False)


def test_scenarios_are_there() -> None:
    """A wrong path would let all of them pass."""
    assert len(SCENARIOS) >= 7


def test_playing_keeps_the_text_around_the_transcripts() -> None:
    """Comments, commands and their order stay; what stood as transcript is replaced. (The file format.)"""
    text = "# A story.\nadd-nodes 1\n----\nwrong\nlines\n\n# One is enough.\n\ntick\n\nstatus\n# The end.\n"
    with pytest.raises(ScenarioError, match="line 12"):
        run(text)
    played = run(text.replace("status\n", "status\n\n"))
    assert played == run(played)
    assert played.startswith("# A story.\nadd-nodes 1\n----\nok\n\n# One is enough.\n\ntick\n----\n")
    assert played.endswith("\n# The end.\n")
    assert [step.command for step in parse(played)[0]] == ["add-nodes 1", "tick", "status"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tick\n", "line 1: tick: add-nodes comes first"),
        ("add-nodes 3\n\nfly 1\n", "line 3: fly 1: no command is called 'fly'"),
        ("add-nodes 3\n\n# who?\ncampaign 9\n", "line 4: campaign 9"),
        ("add-nodes 3\n\ncampaign\n", "line 3: campaign: wrong arguments"),
        ("add-nodes three\n", "line 1: add-nodes three"),
    ],
)
def test_wrong_command_is_told_with_its_line(text: str, message: str) -> None:
    """Who writes a scenario is told where it is wrong. (The file format.)"""
    with pytest.raises(ScenarioError, match=message):
        run(text)
