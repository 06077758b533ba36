"""Getting a state from many sources at once, every chunk verified, and serving the chunks that are here to others.

sources      whom chunks are asked of: a peer, or the coordinator
picking      which chunks to ask next, and of whom how many; decisions without I/O
downloading  the download itself
partial      a download on disk that a crash does not undo
serving      chunks to others, of what is whole and of what is under way
"""

from swarm_protocol.download.downloading import Download
from swarm_protocol.download.partial import InMemory, Partial
from swarm_protocol.download.serving import ChunkDesk, Held, StateFile
from swarm_protocol.download.sources import CoordinatorSource, PeerSource, Source

__all__ = [
    "ChunkDesk",
    "CoordinatorSource",
    "Download",
    "Held",
    "InMemory",
    "Partial",
    "PeerSource",
    "Source",
    "StateFile",
]
