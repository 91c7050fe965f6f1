"""Tools to test raftnode, and programs that embed it: shipped, but never imported by the product.

network     a cluster of pure consensus members over simulated disks and a network with faults, from one seed
invariants  what must hold after every step of it, over memory and disks
scenario    scripts of such a cluster, with the transcript that they produce (`tests/scenarios`)
proxy       a network between real nodes that can be cut, slowed and broken
processes   real nodes, started by the command line, to be killed, stopped and asked; writers that keep books
"""
