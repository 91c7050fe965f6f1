"""Settings, the environment and addresses: a value is right, or there is one ConfigError that names it (package
docstring)."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raftnode.config import (
    DEFAULT_ADDRESS,
    TAIL_BYTES_MAX,
    Settings,
    canonical_address,
    from_environment,
    parse_address,
)
from raftnode.errors import ConfigError, RaftnodeError

fixed = settings(derandomize=True, database=None, deadline=None, max_examples=300)
DEFAULTS = Settings()

# --- settings -------------------------------------------------------------------------------------------------


def test_the_defaults_fit_together() -> None:
    """The defaults are a valid value, and the heartbeat leaves room for a few to be lost before an election."""
    assert from_environment({}) == DEFAULTS
    assert 3 * DEFAULTS.heartbeat_ms <= DEFAULTS.election_low_ms < DEFAULTS.election_high_ms
    assert DEFAULTS.peer_frame_bytes >= DEFAULTS.frame_bytes + DEFAULTS.batch_bytes, "an entry of a full frame must go"
    assert DEFAULTS.reserve_bytes < DEFAULTS.map_bytes


def test_settings_are_made_once() -> None:
    """A Settings value can't be changed behind the back of what runs with it."""
    with pytest.raises(AttributeError):
        DEFAULTS.heartbeat_ms = 5  # type: ignore[misc]


@pytest.mark.parametrize("name", Settings.__struct_fields__)
@pytest.mark.parametrize("value", [0, -1])
def test_every_setting_is_at_least_one(name: str, value: int) -> None:
    """None of the limits and times makes sense at nothing or less; the error names the setting and the value."""
    with pytest.raises(ConfigError, match=rf"{name} is {value}\b"):
        Settings(**{name: value})


def test_the_tail_has_a_limit() -> None:
    """It is written at once when it is made, and a record of it has at most 65,536 sectors."""
    assert Settings(tail_bytes=TAIL_BYTES_MAX).tail_bytes == TAIL_BYTES_MAX
    with pytest.raises(ConfigError, match=f"tail_bytes is {TAIL_BYTES_MAX + 1}: it must be at most {TAIL_BYTES_MAX}"):
        Settings(tail_bytes=TAIL_BYTES_MAX + 1)


@pytest.mark.parametrize(
    ("heartbeat", "low", "high", "is_fine"),
    [
        (1, 2, 2, True),
        (100, 101, 101, True),
        (100, 100, 200, False),
        (100, 50, 200, False),
        (10, 200, 199, False),
        (10, 200, 200, True),
    ],
)
def test_the_three_times_must_fit_together(heartbeat: int, low: int, high: int, is_fine: bool) -> None:
    """A heartbeat that is not shorter than the election time-out makes a cluster that never settles, and a range
    that is upside down has no time to draw from: both are refused at the start (thesis 9.3)."""
    times = {"heartbeat_ms": heartbeat, "election_low_ms": low, "election_high_ms": high}
    if is_fine:
        assert from_environment({}, **times) == Settings(**times)
    else:
        with pytest.raises(ConfigError, match="LOW_TIMEOUT"):
            Settings(**times)


# --- the environment ------------------------------------------------------------------------------------------


def test_the_environment_sets_the_three_times_and_arguments_win() -> None:
    """HB_TIME, LOW_TIMEOUT and HIGH_TIMEOUT are in ms; what the program itself says counts more; other variables and
    blank ones count nothing."""
    environ = {"HB_TIME": " 20 ", "LOW_TIMEOUT": "300", "HIGH_TIMEOUT": "0700", "heartbeat_ms": "7", "PATH": "/bin"}
    found = from_environment(environ, election_high_ms=900, frame_bytes=1000)
    assert (found.heartbeat_ms, found.election_low_ms, found.election_high_ms) == (20, 300, 900)
    assert found.frame_bytes == 1000
    others = set(Settings.__struct_fields__) - {"heartbeat_ms", "election_low_ms", "election_high_ms", "frame_bytes"}
    assert all(getattr(found, name) == getattr(DEFAULTS, name) for name in others)
    assert from_environment({"HB_TIME": "", "LOW_TIMEOUT": "  "}) == DEFAULTS
    assert from_environment(environ, heartbeat_ms=33).heartbeat_ms == 33


@pytest.mark.parametrize("name", Settings.__struct_fields__)
def test_the_environment_sets_every_setting(name: str) -> None:
    """`RAFTNODE_` and the name of a setting, so that every limit of a served node can be changed; of a time that has
    two variables, the older name counts."""
    assert getattr(from_environment({f"RAFTNODE_{name.upper()}": "790"}), name) == 790
    with pytest.raises(ConfigError, match=f"RAFTNODE_{name.upper()}"):
        from_environment({f"RAFTNODE_{name.upper()}": "much"})
    assert from_environment({"RAFTNODE_HEARTBEAT_MS": "20", "HB_TIME": "30"}).heartbeat_ms == 30


def test_the_environment_is_the_process_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mapping, the variables of this process are read."""
    monkeypatch.setenv("HB_TIME", "77")
    assert from_environment().heartbeat_ms == 77


@pytest.mark.parametrize(
    ("environ", "low", "high"),
    [
        ({"LOW_TIMEOUT": "1000"}, 1000, 1600),
        ({"LOW_TIMEOUT": "1600"}, 1600, 1600),
        ({"LOW_TIMEOUT": "1601"}, 1601, 3202),
        ({"LOW_TIMEOUT": "5000"}, 5000, 10000),
        ({"LOW_TIMEOUT": "200"}, 200, 1600),
        ({"HIGH_TIMEOUT": "5000"}, 800, 5000),
        ({"HIGH_TIMEOUT": "800"}, 800, 800),
        ({"HIGH_TIMEOUT": "700"}, 350, 700),
        ({"LOW_TIMEOUT": "900", "HIGH_TIMEOUT": "1000"}, 900, 1000),
    ],
)
def test_one_end_of_the_range_alone(environ: dict[str, str], low: int, high: int) -> None:
    """Someone who sets one end only gets the other's default, or, when that would turn the range upside down, twice
    the low one, half the high one."""
    found = from_environment(environ)
    assert (found.election_low_ms, found.election_high_ms) == (low, high)


@pytest.mark.parametrize(
    "text",
    [
        "²",
        "٣",
        "1.5",
        "1e3",
        "-5",
        "+5",
        "0x10",
        "1_000",
        "ten",
        "5 5",
        "5ms",
        "9" * 5000,
        "9" * 30,
        "\0",
        "0",
        "\uff10",
    ],
)
@pytest.mark.parametrize("variable", ["HB_TIME", "LOW_TIMEOUT", "HIGH_TIMEOUT"])
def test_a_bad_variable_is_named(variable: str, text: str) -> None:
    """A variable that is no positive whole number (also "²", which `isdigit` takes and `int` does not, and 5000
    digits, which `int` refuses) is a ConfigError, never another error and never taken for something else."""
    with pytest.raises(ConfigError):
        from_environment({variable: text})


@pytest.mark.parametrize("value", [1.0, "5", None, True, [1], -(10**20)])
def test_a_bad_argument_is_named(value: object) -> None:
    """The same for what the program passes: a whole number, at least one, and no boolean."""
    with pytest.raises(ConfigError):
        from_environment({}, batch_bytes=value)  # type: ignore[arg-type]


def test_an_unknown_setting_is_refused_with_the_known_ones() -> None:
    """A misspelt setting is not passed over; the error tells the right names."""
    with pytest.raises(ConfigError, match=r"'hart_beat_ms'.*heartbeat_ms"):
        from_environment({}, hart_beat_ms=5)


@fixed
@given(
    environ=st.dictionaries(
        st.sampled_from(["HB_TIME", "LOW_TIMEOUT", "HIGH_TIMEOUT"]),
        st.integers(-5, 3000).map(str) | st.text(max_size=6),
    )
)
def test_any_environment_gives_settings_or_a_config_error(environ: dict[str, str]) -> None:
    """Whatever the variables hold, there are valid settings, or one ConfigError; nothing else comes out."""
    try:
        found = from_environment(environ)
    except ConfigError:
        return
    assert 0 < found.heartbeat_ms < found.election_low_ms <= found.election_high_ms
    for variable, name in (
        ("HB_TIME", found.heartbeat_ms),
        ("LOW_TIMEOUT", found.election_low_ms),
        ("HIGH_TIMEOUT", found.election_high_ms),
    ):
        if environ.get(variable, "").strip():
            assert int(environ[variable]) == name


# --- addresses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host", "port", "canonical"),
    [
        (DEFAULT_ADDRESS, "127.0.0.1", 5001, "127.0.0.1:5001"),
        (" localhost:1 ", "localhost", 1, "localhost:1"),
        ("Node-1.Example.COM:65535", "Node-1.Example.COM", 65535, "node-1.example.com:65535"),
        ("host:05001", "host", 5001, "host:5001"),
        ("[::1]:5001", "::1", 5001, "[::1]:5001"),
        ("[0:0:0::0001]:5001", "::1", 5001, "[::1]:5001"),
        ("[FE80::A]:5", "fe80::a", 5, "[fe80::a]:5"),
        ("[fe80::1%eth0]:5", "fe80::1%eth0", 5, "[fe80::1%eth0]:5"),
        ("under_score:7", "under_score", 7, "under_score:7"),
    ],
)
def test_an_address_has_one_spelling(text: str, host: str, port: int, canonical: str) -> None:
    """Members compare addresses as text, so all spellings of one must become one; an IPv6 host stands in brackets."""
    assert parse_address(text) == (host, port)
    assert canonical_address(text) == canonical
    assert canonical_address(canonical) == canonical


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "host", ":5001", "host:", "host:0", "host:65536", "host:-1", "host:+1", "host:1.0", "host:²", "host:٣",
        "host:" + "9" * 5000, "host:000000005001", "host:5001x", "host: 5001", "[]:1", "[[::1]]:1", "a]b:1", "[a:1",
        "a]:1", "[::1:1", "::1:5001", "::1", "[::1]", "[::1]5001", "[host]:1", "[127.0.0.1]:1", "a\0b:1", "\0:1",
        "a b:1", "a\nb:1", "a,b:1", "http://host:1", "host/path:1", '"host":1', "a\x7f:1", "a\x1b[31m:1", "[::1\0]:1",
        "[:.5:1]:5", "[::1::2]:5", "[1:2:3]:5",
    ],
)  # fmt: skip
def test_a_bad_address_is_a_config_error(text: str) -> None:
    """What no connection could ever be made to, or what has two meanings, is refused where it is given, in words that
    show it: not by an error of the resolver later, or by a member that nobody can reach."""
    for use in (parse_address, canonical_address):
        with pytest.raises(ConfigError, match="address"):
            use(text)
    assert issubclass(ConfigError, RaftnodeError)
    assert issubclass(ConfigError, ValueError)


@fixed
@given(
    text=st.text(alphabet="[]:0159aF.%- \0²,/\"'é", max_size=12) | st.text(max_size=8).map(lambda host: f"{host}:5001")
)
@example(text="[[]]:1")
@example(text="[:1")
def test_any_text_is_an_address_or_a_config_error(text: str) -> None:
    """Whatever is given, there is a host and a port, with one canonical spelling that means the same, or one
    ConfigError."""
    try:
        host, port = parse_address(text)
    except ConfigError:
        with pytest.raises(ConfigError):
            canonical_address(text)
        return
    assert host
    assert 1 <= port <= 65535
    assert not set(host) & set('[]\0,/ "\n')
    canonical = canonical_address(text)
    again = parse_address(canonical)
    assert again == (host.lower(), port)
    assert canonical_address(canonical) == canonical


def test_settings_are_plain_numbers() -> None:
    """Every setting is a whole number, so that a file or a command line can carry any of them."""
    assert {type(value) for value in msgspec.structs.asdict(DEFAULTS).values()} == {int}
