"""Raft, pure (layer 1): no clock, thread, socket, file or randomness of its own. Time and chance are passed in.

    ballot      (term, voted_for): one value, because a crash between the two would let a node vote twice
    journal     the log: what is staged, written and committed, and the rule for entries that conflict
    progress    what a leader knows of one other member, and what to send it next
    membership  who the members are, and what a majority of them has reached
    changes     what a change of the members may be, and which step comes next
    handover    a leader that lets another member lead
    reads       rounds in which a leader confirms that it still leads, shared by the reads that wait
    transfer    how far a snapshot has come in, and which chunk comes next
    witness     what each member remembers of the promises of the others, so that an old copy of a directory is noticed
    raft        the state machine that joins them

The way in is `Raft.step` (a message), `Raft.tick` (time), `Raft.propose` and `Raft.read`; the way out is `Raft.ready`,
after which the driver says `Raft.written`. Nothing here has an effect: the driver (`raftnode.election`) posts, writes
and answers, in that order.

**The rules.** Each has a test that fails when it is broken ("paper tests"), and docstrings refer to their numbers.

 1. Ballot (term, voted_for) is one value, written in one transaction, before any message that depends on it.
 2. Vote only for a candidate whose last (term, commit_id) is at least ours; one vote a term.
 3. Pre-vote before every campaign; a node that hears a leader refuses pre-votes. A leader that has not heard from a
    majority for an election timeout steps down (check-quorum).
 4. Entries are refused unless the entry before them matches; a conflicting uncommitted suffix is cut, a committed entry
    never is; the refusal carries a hint, so that a follower catches up in a few rounds.
 5. Only entries of the leader's own term commit by counting; older ones commit with them. A new leader's no-op goes
    first.
 6. A follower commits at most up to the last entry that it has matched with this leader.
 7. A linearizable read notes commit_id, has a majority confirm leadership in a round started after it arrived, waits
    until that is applied, and is answered from one snapshot; not before the leader's no-op has committed. No leases.
 8. The membership changes one node at a time, through the log, in force when appended; the next change waits until
    this one is committed, and the first of a leader until its no-op is. Who joins is a learner, without a vote, until
    it has caught up. A leader that is taken out leads until that is committed, not counting itself. Who was removed
    disturbs nobody, and is told.
 9. Members are known by address and node id; every link starts with cluster id, node id and protocol version, and with
    what the other has promised before: who has forgotten any of it takes part in nothing. A node that lost its disk is
    another one, and a learner first.
10. (Not yet.) A write may carry `client` and `seq`; its outcome is kept, so that a retry is not applied twice.
11. Time is passed in, chance is an injected `random.Random`, iteration over sets is sorted: one seed, one trace.
12. An answer is "failed" only if the command was never appended; after a time-out, a lost leadership or a cut
    connection it is open. When a staged suffix is cut, its waiting clients, its membership and its caches go with it.

**Departures** from Ongaro's thesis, each with its reason:

* Pre-vote (9.6) and check-quorum (6.2) are always on, and together: each without the other can stall a cluster.
* A voter that heard a leader within the least election timeout ignores vote requests without raising its term (4.2.3).
* A refused `data` carries a hint with a term (etcd's form of 5.3's), so a follower is found in a few rounds.
* A follower commits by heartbeat only up to what it matched with this very leader, whatever the leader says.
* Entries carry a rolling checksum; a follower refuses entries that do not continue its own history.
* A node that finds that it was stopped for an election timeout starts its timers anew, and steps down if it led.

* A snapshot (chapter 5) is no file that is kept: it is the state itself, read in chunks while it changes; what changed
  is sent again, until one last chunk makes it the state as of one commit_id (`raftnode.snapshots`). It is sent where a
  member lacks the entry before the leader's log, and installed where its log does not hold the snapshot's last entry.
* Changes are of single members, never joint (4.3): a leader makes the steps of a replacement one after the other.
* A learner has caught up by the rounds of 4.2.1, and is made a voter by the leader itself, whoever that is by then.
* A learner campaigns, without a vote of its own, if a candidate that lags has asked it for its vote: who has that entry
  alone can't win without it, and with another voter gone for good nobody else could (cf. 4.2.2).
* A leader hands over (3.10) only when all of its log is committed, so that no client is left in doubt.

Not yet here: sessions (6.3; commands have a kind, so an outcome can be kept). Known limit: a node that was never met by
some member can't be told by that one from another node at its address, so start a new cluster's members together, and
lose no disk before all have met.
Known limit: with one-way or partial partitions that chain, Raft can go without a leader (TRAPS 17).
"""
