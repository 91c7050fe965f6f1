"""Raft, pure (layer 1): no clock, thread, socket, file or randomness of its own. Time and chance are passed in.

    ballot      (term, voted_for): one value, because a crash between the two would let a node vote twice
    journal     the log: what is staged, written and committed, and the rule for entries that conflict
    progress    what a leader knows of one other member, and what to send it next
    membership  who the members are, and what a majority of them has reached
    reads       rounds in which a leader confirms that it still leads, shared by the reads that wait
    raft        the state machine that joins them

The way in is `Raft.step` (a message), `Raft.tick` (time), `Raft.propose` and `Raft.read`; the way out is `Raft.ready`,
after which the driver says `Raft.written`. Nothing here has an effect: the driver (`raftnode.election`) posts, writes
and answers, in that order.

Departures from Ongaro's thesis, each with its reason:

* Pre-vote (9.6) and check-quorum (6.2) are always on, and together: each without the other can stall a cluster.
* A voter that heard a leader within the least election timeout ignores vote requests without raising its term (4.2.3).
* A refused `data` carries a hint with a term (etcd's form of 5.3's), so a follower is found in a few rounds.
* A follower commits by heartbeat only up to what it matched with this very leader, whatever the leader says.
* Entries carry a rolling checksum; a follower refuses entries that do not continue its own history.
* A node that finds that it was stopped for an election timeout starts its timers anew, and steps down if it led.

Not yet here: changing the membership (chapter 4; the journal already takes it from the log), snapshots (chapter 5; the
journal already knows where the kept log begins), sessions (6.3; commands have a kind, so an outcome can be kept).
Known limit: with one-way or partial partitions that chain, Raft can go without a leader (FACTS 1.17).
"""
