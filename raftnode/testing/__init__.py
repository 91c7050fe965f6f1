"""Tools to test raftnode, and programs that embed it: shipped, but never imported by the product."""
