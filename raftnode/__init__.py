"""raftnode: a persistent, replicated key-value store.

TODO map
"""

if not __debug__:
    raise ImportError("raftnode checks itself with assert statements: do not run it under python -O")

from raftnode.client import Client
from raftnode.raftnode import Node, RaftNode
from raftnode.version import __version__

__all__ = ["Client", "Node", "RaftNode", "__version__"]
