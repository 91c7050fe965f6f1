"""Tools to test raftnode, and programs that embed it: shipped, but never imported by the product.

network     a cluster of pure consensus members over simulated disks and a network with faults, from one seed
invariants  what must hold after every step of it, over memory and disks
scenario    scripts of such a cluster, with the transcript that they produce (`tests/scenarios`)
proxy       a network between real nodes that can be cut, slowed and broken
workload    clients of real nodes that note every operation
chaos       faults of real nodes and of their network, at random (`tools/chaos.py`)
judge       what is left of a run with faults: every answer against the logs, and the logs against each other
processes   real nodes, started by the command line, to be killed, stopped and asked; writers that keep books
"""
