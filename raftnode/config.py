"""Settings: every limit and every time of a node, with its unit and its reason, and the roles.

Layer 0. A `Settings` value is immutable and made once, before anything runs; nothing reads the environment afterwards.
"""

from __future__ import annotations

import enum
import ipaddress
import os
from collections.abc import Mapping

import msgspec

from raftnode.errors import ConfigError

DEFAULT_ADDRESS = "127.0.0.1:5001"
DEFAULT_DATA_DIR = "data"
DEFAULT_NAMESPACE = "default"
DEFAULT_TIMEOUT_S = 5

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
TAIL_BYTES_MAX = 16 * MIB
"""The file for the tail is written as a whole when it is made, and read as a whole by who looks at it."""


class Role(enum.StrEnum):
    """What a member is doing at this moment (thesis 3.3; the pre-candidate is thesis 9.6)."""

    FOLLOWER = "follower"
    PRE_CANDIDATE = "pre-candidate"
    CANDIDATE = "candidate"
    LEADER = "leader"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Every limit and time of one node. Times end in their unit; sizes are bytes, counts are counts.

    Invariants are checked when the value is made: see `__post_init__`, which raises `ConfigError`.
    """

    # --- elections: HB_TIME, LOW_TIMEOUT and HIGH_TIMEOUT in the environment are these three, too ---
    heartbeat_ms: int = 100
    """A leader speaks to every member at least this often."""
    election_low_ms: int = 800
    """The least time without a leader after which a follower campaigns; also the time for which a voter that
    hears a leader refuses to help replace it, and within which a leader must hear from a majority."""
    election_high_ms: int = 1600
    """The most: each follower draws anew from [low, high] at every start of its timer."""

    # --- requests ---
    request_timeout_ms: int = DEFAULT_TIMEOUT_S * 1000
    """How long a request may wait for its commit, its read round or a leader before it is answered with an error."""
    stop_grace_ms: int = 1000
    """How long a clean stop waits for what is under way to commit."""
    mailbox_batches: int = 4096
    """What may wait for the next cycle: each entry is what one read from one socket gave."""
    waiting_requests: int = 20_000
    """Client requests that wait for a commit, a read round or a leader; past that: `overloaded`."""
    uncommitted_bytes: int = 64 * MIB
    """Staged by this leader and not yet committed; past that: `overloaded` (etcd's MaxUncommittedEntriesSize)."""

    # --- replication ---
    batch_entries: int = 1024
    """Most entries in one `data` message."""
    batch_bytes: int = 1 * MIB
    """A `data` message stops growing at this size; one larger entry goes alone."""
    window_batches: int = 1
    """`data` messages to one member that may be unanswered at a time. One is the group commit: what arrives
    while a follower syncs goes with the next."""
    kept_entries: int = 20_000
    """Log entries kept in memory so that members which keep up are fed without reading the disk."""
    kept_bytes: int = 32 * MIB
    """The same as a size."""

    # --- wire ---
    frame_bytes: int = 8 * MIB
    """The largest message from a client, and with that the largest value."""
    json_depth: int = 128
    """The deepest nesting of a value."""
    connections: int = 10_000
    """Open connections from clients; a further one is told `overloaded` and closed."""
    pipeline_requests: int = 1000
    """Requests of one connection that are not answered yet; past that the node stops reading from it."""
    in_flight_bytes: int = 256 * MIB
    """Size of all requests that are not answered yet. Half of it is for who comes first, half in equal shares for all
    connections; past that: `overloaded`."""
    client_bytes: int = 512 * MIB
    """What all clients together may keep at the node besides requests under way: messages that are not whole yet, and
    answers that were not taken. Past that the one that keeps most has its message refused, or is cut off."""
    send_buffer_bytes: int = 1 * MIB
    """Answers that a client has not taken yet; past that the node stops reading from it."""
    idle_timeout_ms: int = 3_600_000
    """A client connection with nothing under way is closed after this time of silence."""
    stall_timeout_ms: int = 30_000
    """A client that has begun a message and not finished it, or does not take its answers, is cut off after this."""
    reconnect_ms: int = 100
    """Pause between two tries to reach another member; grows to `reconnect_high_ms`."""
    reconnect_high_ms: int = 1000

    poll_us: int = 200
    """While messages follow each other faster than this, a node that waits for the next one does not sleep, but looks
    again and again. 1 turns it off: then a lone client's requests take longer."""

    # --- store ---
    map_bytes: int = 64 * GIB
    """LMDB's map: an upper bound of the file, reserved as addresses only. Readers of the file must use at least it."""
    reserve_bytes: int = 128 * MIB
    """Below this much room (map or disk) a leader answers writes with `storage_full`; a follower takes entries
    down to half of it."""
    room_check_ms: int = 200
    """How often room is looked at; it is looked at sooner when much has been written."""
    cache_bytes: int = 32 * MIB
    """Values that are read more than once are kept in memory, so many bytes of them: those that were read last."""
    flush_entries: int = 16_384
    """When so many entries have been carried out in memory, what they have changed begins to go to the disk, some of it
    with each of the next transactions, so that a page which several of them change is written once. They are durable as
    log entries before that. More is faster, takes more memory, and makes a start after a crash longer: that carries
    them out again."""
    flush_step: int = 16
    """So many changed values go along with a transaction at least, while there are some to go."""
    flush_bytes: int = 16 * MIB
    """... or when commands of this size have collected, or of an eighth of `reserve_bytes`: there must be room."""
    flush_delay_ms: int = 50
    """... or when nothing has come for so long, or the oldest has waited twenty times that."""
    tail_bytes: int = 256 * KIB
    """Size of the file for the tail of the log, at most 16 MiB. When it is full, a transaction takes what it holds into
    LMDB: a larger one gives up to 5 % more puts from a few connections, whose slowest then take longer."""
    tail_write_bytes: int = 16 * KIB
    """New entries of no more than this size together go to the tail, which is faster for a few, and not for many. 1
    turns it off."""
    slow_sync_ms: int = 500
    """A write to the disk that takes longer is logged."""
    log_entries: int = 100_000
    """The log keeps so many entries behind commit_id; older ones are deleted. A member that lacks more than these gets
    a snapshot of the whole state, so this should be some minutes of writing."""
    log_bytes: int = 96 * MIB
    """The same as a size, of the pages of the file that they are in; whichever is reached first. One entry is always
    kept."""
    compaction_step: int = 64
    """A transaction deletes at least so many old entries, if there are, or twice what it appends: so the log levels
    off, and no transaction is much longer for it."""
    compaction_bytes: int = 1 * MIB
    """The same as a size: of entries, or of what is left of an old state."""
    sweep_keys: int = 1000
    """A transaction deletes at most so many values of an old state, after a snapshot has taken its place."""
    snapshot_chunk_bytes: int = 256 * KIB
    """A snapshot is sent in chunks of this size, one at a time; up to `batch_bytes` when it does not come to an end."""
    snapshot_bytes_per_s: int = 32 * MIB
    """So fast at the most are snapshots sent, all together, so that clients do not notice; twice as fast with each pass
    over what was written meanwhile."""
    snapshot_tracked_keys: int = 200_000
    """Keys written while a snapshot is sent are remembered, to be sent again; past this many it begins anew."""
    backups: int = 4
    """Backups that clients take from this node at a time."""
    reader_check_ms: int = 5000
    """How often slots of dead readers are cleared (LMDB's file grows without end behind one)."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if not 1 <= getattr(self, name) < 1 << 53:
                raise ConfigError(f"setting {name} is {getattr(self, name)}: it must be at least 1, and below 2**53")
        if self.tail_bytes > TAIL_BYTES_MAX:
            raise ConfigError(f"setting tail_bytes is {self.tail_bytes}: it must be at most {TAIL_BYTES_MAX}")
        if not self.heartbeat_ms < self.election_low_ms <= self.election_high_ms:
            raise ConfigError(
                f"heartbeat {self.heartbeat_ms} ms, election {self.election_low_ms}..{self.election_high_ms} ms: "
                "the heartbeat (HB_TIME) must be shorter than LOW_TIMEOUT, and LOW_TIMEOUT at most HIGH_TIMEOUT"
            )

    @property
    def peer_frame_bytes(self) -> int:
        """The largest message between members: a full batch, or one entry made of the largest client message."""
        return 2 * self.frame_bytes + self.batch_bytes


_DEFAULTS = Settings()
_UNITS = {"ms": "milliseconds", "us": "microseconds", "bytes": "bytes"}
_TIMES = {"HB_TIME": "heartbeat_ms", "LOW_TIMEOUT": "election_low_ms", "HIGH_TIMEOUT": "election_high_ms"}
ENVIRONMENT = {**{f"RAFTNODE_{name.upper()}": name for name in Settings.__struct_fields__}, **_TIMES}
"""What sets which setting: `RAFTNODE_` and its name; and three older names, which count if both are there."""


def from_environment(environ: Mapping[str, str] = os.environ, **overrides: int) -> Settings:
    """Settings with the environment's (see `ENVIRONMENT`) over the defaults, and `overrides` over both.

    LOW_TIMEOUT alone above the default high timeout raises the high one to twice it, and so the other way round.
    Raises ConfigError for a name that is no setting or a value that is no positive whole number.
    """
    values: dict[str, int] = {}
    for variable, name in ENVIRONMENT.items():
        text = environ.get(variable, "").strip()
        if text:
            if not (text.isascii() and text.isdigit() and len(text) < 17):
                unit = _UNITS.get(name.rpartition("_")[2])
                raise ConfigError(f"{variable} is {text!r}: it must be a whole number{unit and f' of {unit}'}")
            values[name] = int(text)
    for name, value in overrides.items():
        if name not in Settings.__struct_fields__:
            raise ConfigError(f"no setting is called {name!r}; there are: {', '.join(Settings.__struct_fields__)}")
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"setting {name} is {value!r}: it must be a whole number")
        values[name] = value
    low, high = values.get("election_low_ms"), values.get("election_high_ms")
    if low is not None and high is None and low > _DEFAULTS.election_high_ms:
        values["election_high_ms"] = 2 * low
    if high is not None and low is None and high < _DEFAULTS.election_low_ms:
        values["election_low_ms"] = max(high // 2, 1)
    return Settings(**values)


def parse_address(text: str) -> tuple[str, int]:
    """`host:port` as (host, port); an IPv6 host stands in brackets. Raises ConfigError with what is wrong."""
    host, colon, port = text.strip().rpartition(":")
    if not colon or not host:
        raise ConfigError(f"address {text!r}: expected host:port, for example {DEFAULT_ADDRESS}")
    if not port.isascii() or not port.isdigit() or len(port) > 5 or not 0 < int(port) < 65536:
        raise ConfigError(f"address {text!r}: the port must be a number from 1 to 65535")
    bare = host.removeprefix("[").removesuffix("]")
    if (host != bare) != (":" in bare) or host not in (bare, f"[{bare}]"):
        raise ConfigError(f"address {text!r}: an IPv6 address, and nothing else, goes in brackets, as in [::1]:{port}")
    if not bare or any(c.isspace() or not c.isprintable() or c in ',/"[]' for c in bare):
        raise ConfigError(f"address {text!r}: the host holds a character that no host name has")
    return (_ipv6(bare, text) if ":" in bare else bare), int(port)


def _ipv6(host: str, address: str) -> str:
    """The one spelling of an IPv6 address. Raises ConfigError."""
    try:
        return str(ipaddress.IPv6Address(host))
    except ValueError as error:
        raise ConfigError(f"address {address!r}: what stands in brackets is no IPv6 address: {error}") from None


def canonical_address(text: str) -> str:
    """The one spelling of an address that members compare: lower-case host, no spaces, port without zeros in front."""
    host, port = parse_address(text)
    return f"[{host.lower()}]:{port}" if ":" in host else f"{host.lower()}:{port}"
