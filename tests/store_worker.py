"""Programs that the tests of the store run in a process of their own: to be killed, or to meet failing system calls.

    python store_worker.py PROGRAM DIRECTORY [ARGUMENT]

Each says what it has done one line at a time, unbuffered, so that what was said before a kill is known.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

from msgspec import Raw

from raftnode.config import GIB, Settings
from raftnode.environment import open_reader
from raftnode.errors import StoreError
from raftnode.messages import DeleteCommand, Entry, Noop, PutCommand, chain, encode_command
from raftnode.store import Store

ADDRESS = "127.0.0.1:5001"
MEMBERS = ["127.0.0.1:5001", "127.0.0.1:5002", "127.0.0.1:5003"]


def say(*words: object) -> None:
    os.write(1, (" ".join(str(word) for word in words) + "\n").encode())


def state_of(store: Store, keys: int | None = None) -> str:
    """Everything that one transaction of so many changed values moves together, in a word."""
    last = store.journal.last
    begins_flush = keys is None or (keys > 0 and store.behind is None)
    commit_id = store.commit_id if begins_flush else store.commit_id_on_disk
    return (
        f"{store.ballot.term}/{store.ballot.voted_for}/{commit_id}/"
        f"{last.id.term}/{last.id.commit_id}/{last.checksum:08x}"
    )


def random_command(chance: random.Random, number: int) -> Raw:
    """A put, now and then a delete, of one of a few keys; some values need LMDB pages of their own."""
    key = f"key-{chance.randrange(8)}"
    kind = chance.random()
    if kind < 0.05:
        return encode_command(Noop())
    if kind < 0.2:
        return encode_command(DeleteCommand(namespace="default", key=key))
    filler = "x" * chance.choice((0, 10, 200, 6000))
    return encode_command(PutCommand(namespace="default", key=key, value=Raw(f'"{number}-{filler}"'.encode())))


def offer(store: Store, chance: random.Random, term: int) -> None:
    """What a new leader sends: entries that replace this log's staged suffix from some point on."""
    journal = store.journal
    at = chance.randint(store.commit_id, journal.last.id.commit_id)
    previous = journal.id_at(at)
    checksum = journal.entries(at, at, 0)[0].checksum if at > journal.base.id.commit_id else journal.base.checksum
    entries = []
    for commit_id in range(at + 1, at + 1 + chance.randint(1, 3)):
        command = random_command(chance, commit_id)
        checksum = chain(checksum, term, commit_id, 7, command)
        entries.append(Entry(term, commit_id, 7, checksum, command))
    journal.accept(previous, entries, store.commit_id)


def one_turn(store: Store, chance: random.Random) -> None:
    """One transaction's worth of everything: a ballot, a cut, entries, all effects or some, and commit_id. `try` says
    what the disk will hold if the transaction happens, `ack` that it did."""
    ballot = store.ballot
    if ballot.term == 0 or chance.random() < 0.3:
        ballot = ballot.in_term(ballot.term + 1).vote(chance.choice(MEMBERS))
        offer(store, chance, ballot.term)
    else:
        for number in range(chance.randint(1, 4)):
            store.journal.append(ballot.term, number, random_command(chance, number))
    upto = chance.randint(store.commit_id, store.journal.last.id.commit_id)
    if upto > store.commit_id:
        store.apply(store.journal.entries(store.commit_id + 1, upto, GIB))
    store.ballot = ballot
    keys = chance.choice((None, 0, 1, 3))
    state = state_of(store, keys)
    say("try", state)
    store.write(ballot, keys=keys)
    say("ack", state)


def write(directory: Path, argument: str) -> None:
    """Write for ever: `seed`, or `seed,log_entries,log_bytes` for a short log."""
    seed, *limits = argument.split(",")
    chance = random.Random(seed)
    store = Store("database", directory, settings=short(*limits))
    store.found(ADDRESS, MEMBERS)
    say("open", state_of(store))
    while True:
        one_turn(store, chance)


def fail(directory: Path, argument: str) -> None:
    """Open, write until the store fails, and then try what else it takes."""
    chance = random.Random(argument)
    try:
        store = Store("database", directory)
    except StoreError as error:
        say("failed", type(error).__name__)
        return
    say("open", state_of(store))
    try:
        for _ in range(20):
            one_turn(store, chance)
        say("never failed")
    except StoreError as error:
        say("failed", type(error).__name__, "said what to do" if "disk" in str(error) else str(error))
    else:
        return
    uses = {
        "write": store.write,
        "apply": lambda: store.apply([Entry(1, store.commit_id + 1, 0, 0, encode_command(Noop()))]),
        "get": lambda: store.get({"key": "key-1"}),
        "read": lambda: store.read_entries(1, 1, 0),
        "room": store.sizes,
        "readers": store.clear_dead_readers,
    }
    for name, use in uses.items():
        try:
            use()
            say("used", name, "fine")
        except Exception as error:  # whatever it is, the test judges it
            say("used", name, type(error).__name__)
    store.close()
    say("closed")


def found(directory: Path, argument: str) -> None:  # noqa: ARG001
    """Make a node and its first write, and stop."""
    store = Store("database", directory)
    say("open", store.node_id)
    store.found(ADDRESS, [ADDRESS])
    say("founded", store.cluster_id)
    store.close()


def hold(directory: Path, argument: str) -> None:  # noqa: ARG001
    """Keep the directory."""
    store = Store("database", directory)
    say("open", state_of(store))
    signal.pause()
    store.close()


def obey(directory: Path, argument: str) -> None:
    """Write as many committed entries as each line of standard input says, and tell where the log begins then."""
    store = Store("database", directory, settings=short(*argument.split(",")))
    store.found(ADDRESS, MEMBERS)
    for line in sys.stdin:
        for _ in range(int(line)):
            number = store.journal.last.id.commit_id + 1
            command = PutCommand(namespace="default", key=f"key-{number % 7}", value=Raw(b"%d" % number))
            store.journal.append(1, number, encode_command(command))
            store.write(store.ballot if store.ballot.term else store.ballot.in_term(1).vote(ADDRESS))
            store.apply(store.journal.entries(number, number, GIB))
        store.write()
        say(store.journal.first)
    store.close()


def short(*limits: str) -> Settings:
    """Settings with a log of so many entries and bytes."""
    if not limits:
        return Settings()
    entries, size = map(int, limits)
    return Settings(log_entries=entries, log_bytes=size, compaction_step=1)


def read(directory: Path, argument: str) -> None:
    """Hold a read transaction open, as an inspector that has stopped."""
    env = open_reader(directory, int(argument))
    with env.begin() as txn:
        say("reading", txn.id())
        signal.pause()


def check(directory: Path, argument: str) -> None:  # noqa: ARG001
    """Open and read all that there is; say how it ends."""
    try:
        store = Store("database", directory)
        try:
            say("fine", state_of(store), read_everything(store))
        finally:
            store.close()
    except StoreError as error:
        say("refused", type(error).__name__, getattr(error, "commit_id", None))
    except Exception as error:  # whatever it is, the test judges it
        say("leaked", type(error).__name__, error)


def read_everything(store: Store) -> str:
    """The checksum of the newest entry and all values, read from disk."""
    last = store.journal.last.id.commit_id
    entries = store.read_entries(store.journal.first, last, GIB) if last >= store.journal.first else []
    values = [store.get({"key": f"key-{n}"}) for n in range(8)]
    return f"{entries[-1].checksum if entries else 0} {values}"


def main() -> None:
    program, directory, *argument = sys.argv[1:]
    programs = {"write": write, "fail": fail, "found": found, "hold": hold, "read": read, "check": check, "obey": obey}
    programs[program](Path(directory), argument[0] if argument else "")


if __name__ == "__main__":
    main()
