"""The gossip plane: a run's signed announcements, carried from node to node.

py-libp2p runs in a process of its own (`python -m swarm_protocol.gossip`), because it cannot be loaded beside hivemind. Only
that process imports it: `process`, `transport`, `mesh`, `fetching` and `serving` belong to it. Everybody else drives it with
`client.GossipClient`, over a Unix socket, and keeps it alive with `supervisor.GossipSupervisor`. What is believed and passed
on is decided by `validation`, which does no I/O. Nothing here has to be believed: every record is signed by whom it is from.
"""

from __future__ import annotations
