"""raftnode: a persistent, replicated key-value store."""
