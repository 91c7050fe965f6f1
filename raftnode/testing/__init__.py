"""Tools to test raftnode, and programs that embed it: shipped, but never imported by the product.

network     a cluster of pure consensus members over simulated disks and a network with faults, from one seed
invariants  what must hold after every step of it, over memory and disks
scenario    scripts of such a cluster, with the transcript that they produce (`tests/scenarios`)
simulator   whole clusters of production code in simulated time, from one seed: two phases, and the judgement. Its parts
            are world (time, chance, the trace), fabric (network and sockets), simulated (a node, its disk, its clock),
            clients and faults
proxy       a network between real nodes that can be cut, slowed and broken
workload    clients of real nodes that note every operation
chaos       faults of real nodes and of their network, at random (`tools/chaos.py`); turnover: members that come and go,
            and disks that are lost; arena: what there is to be hit, and who is a member (roll: by the nodes' own word)
history     what clients did and what they were told
linearizability   judges it: is there an order that explains the answers, and is it that of the commit_ids
judge       what is left of a run with faults: every answer against the logs, and the logs against each other
            (known_log: as one log, whose beginning may be gone; judge_members: what must hold of the members)
attacks     what bad clients do to a real node (with limited: nodes whose limits are low, and what they use; steady: a
            well-behaved client beside them; fuzz: broken messages from a seed)
load        load for a server: closed and open loop, and what counts (generator: the process that offers it)
measuring   measures real nodes (`tools/bench.py`); results are its records and their arithmetic, shown by tables and
            pictures; machine is what the kernel tells
processes   real nodes, started by the command line, to be killed, stopped and asked; writers that keep books
"""
