"""What every party of a run must compute identically: records, seeds, data order, training, codecs, aggregation, replay.

This package imports neither `swarm_node` nor `swarm_coordinator`. Importing it, or its records and log, loads neither
torch nor hivemind.
"""

__version__ = "0.1.0"

PROTOCOL_VERSION = 1
"""Bumped by every change of the exact domain (see docs/protocol.md). Nodes of another version are refused."""
