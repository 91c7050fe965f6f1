"""raftnode: a persistent, replicated key-value store. This text is the map: read it first.

**Layers**, from the bottom up; imports only go down, and a test enforces it.

    0  facts        config (settings, roles), errors (one tree), messages (wire and log schema, limits, codec)
    1  pure         consensus/ (Raft: no clock, thread, socket, file or randomness of its own), framing (bytes to
                    messages), records (bytes on disk), namespaces (what a command does; replay: what a log does),
                    cache (values that are read again), mailbox (what the queue holds)
    2  effects      store (with environment: files and LMDB, tail: the newest entries on their way to LMDB, compaction:
                    where the log begins, states: where a snapshot comes in, primary: a given leader) | transport (with
                    connections: the loop's two kinds, streams: their sockets, passes: of the loop, blocking: for other
                    threads) | log. None of the three knows another.
    3  driver       election (the turn, and the published interface), requests (clients that wait), handshake (who is at
                    the other end of a link), members (changes of the members, asked for and of the leader's own),
                    snapshots (the state on its way to a member that lacks entries), backups (to a
                    client), flushing (when effects go to the disk)
    4  node         raftnode (assembles, owns the life of a node), joining (how it becomes a member), client
    5  faces        cli, inspector (reading: inspection, overlay, selection, past; printing: output, lines, about,
                    table, supervised; comparing: its commands about whole directories, with verification, survey,
                    comparison, chronology); upkeep of a stopped node's directory: repair, recover,
                    shrink, archive (backups)
    beside          testing/: for our tests and for those of programs that embed a node; the product never imports it

**Who owns which fact.** Each has one owner; everyone else asks or is told.

    term and vote           consensus.Raft.ballot; on disk before any message that depends on it
    the log                 consensus.journal.Journal: what is staged, written, committed; the store keeps its bytes
    commit_id               consensus.Raft decides it; Store.commit_id is how far it has been applied
    the namespaces          Store: LMDB, and over it the effects that are applied but not in a transaction yet; what it
                            keeps of LMDB in memory is only what has not changed since
    the membership          the log (Journal.membership); never who answers. Transport.live is only who answers
    who a member is         address and node id together; the ids are bound by the handshake, kept in the membership
    what others promised    consensus.witness; kept in the store, told in the handshake
    where the log begins    Journal.base: id and checksum of the newest entry that compaction has deleted; on disk
    what a member lacks     consensus.progress; how far its snapshot has come in: consensus.transfer, on its own disk
    who waits for what      requests.Requests; each arrival gets exactly one answer
    room, format, node id   the store and its directory

**In what order effects happen.** One thread, one mailbox, one writer: the loop reads what has arrived, then
`Election.cycle` takes one turn: take every letter into the consensus; send what promises nothing that is not on disk,
and answer clients whose entries a majority holds; one write to the disk, synced; send what promises that something is
on disk. The write is an LMDB transaction with ballot and entries; or, if there is nothing to write but a few entries,
one to the `tail` of the log, from where the next transaction takes them. While the disk syncs, the kernel's buffers
collect the next batch: that is the group commit. A leader's entries wait for it until they are sent to somebody, as
their copies are written side by side. The effects of what has committed, and commit_id with them, begin to go to the
disk when many have collected, some with each transaction (`flushing` tells when and how many): until then the log has
them, and reads see them in memory. Local reads need no turn.

**The way of a put**: `connections.Connection` frames and decodes it, `mailbox` carries it, `requests.Requests` checks
and proposes it, `consensus.Raft` appends it to the journal, `connections.Link` sends it to the followers,
`Store.extend_tail` or `Store.write` makes it durable, the followers' answers commit it, `Namespaces.apply` carries it
out, and `Connection.answer` tells the client.

**Where to put the next feature**: a new message or command kind begins in `messages` (what a command does is an
`Effect` there); how that changes the state in `namespaces`; a consensus rule in `consensus`, with its paper test; what
a client may ask in `requests`; a record on disk in `records`. Sessions have their place in `namespaces`, beside the
effects.

**How the members change**: `consensus.changes` says what a change may be and what comes next, `consensus.raft` when one
may be made, `consensus.journal` takes it from the log (in force when appended, gone when cut), `members` carries out
what is asked for and what a leader does by itself, `handshake` tells who was removed and notices who lost its disk, and
`joining` is how an empty directory becomes a member.
"""

if not __debug__:
    raise ImportError("raftnode checks itself with assert statements: do not run it under python -O")

from raftnode.client import Client
from raftnode.raftnode import Node, RaftNode
from raftnode.version import __version__

__all__ = ["Client", "Node", "RaftNode", "__version__"]
