"""Content addresses, and the one function that makes every state root.

A state is a string of bytes: canonically ordered little-endian tensors, one after the other (a checkpoint: parameters,
outer momentum; a trace entry: parameters, optimizer moments, step). It is cut into chunks of 1 MiB, the last one being
shorter; its root binds the size and, through a Merkle tree, every chunk. Hashing streams over the tensors and copies
none of them. Chunks travel on their own, and each is checked before it is used.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from swarm_protocol import merkle
from swarm_protocol.errors import EncodingError, HashMismatchError

CHUNK_BYTES = 1 << 20
MAX_STATE_BYTES = 1 << 50

Buffer = bytes | bytearray | memoryview | npt.NDArray[Any]
"""C-contiguous; arrays of several bytes per element are little-endian."""

_HEAD = struct.Struct("<8sQ")
_MAGIC = b"SWSTATE1"


def content_hash(data: Buffer) -> bytes:
    """What names a blob: its plain BLAKE3 hash, 32 bytes."""
    return blake3(_bytes_of(data)).digest()


def chunk_hashes(*buffers: Buffer) -> list[bytes]:
    """The content hashes of the chunks of the concatenated buffers.

    Raises:
        ValueError: a buffer is not C-contiguous, or not little-endian.
    """
    hashes = []
    for pieces in _pieces(buffers):
        hasher = blake3()
        for piece in pieces:
            hasher.update(piece)
        hashes.append(hasher.digest())
    return hashes


def chunks(*buffers: Buffer) -> Iterator[bytes]:
    """The chunks of the concatenated buffers, copied one at a time. Raises like `chunk_hashes`."""
    for pieces in _pieces(buffers):
        yield b"".join(pieces)


def state_root(hashes: Sequence[bytes], size_bytes: int) -> bytes:
    """`BLAKE3(0x02 || size as u64, little-endian || Merkle root of the chunk hashes)`, 32 bytes."""
    return blake3(b"\x02" + struct.pack("<Q", size_bytes) + merkle.root(hashes)).digest()


@dataclass(frozen=True)
class StateManifest:
    """The chunks that a state consists of. As bytes: magic, size as u64 little-endian, then 32 bytes per chunk.

    Raises:
        EncodingError: as many hashes as the size has chunks are needed, of 32 bytes each.
    """

    size_bytes: int
    hashes: tuple[bytes, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.size_bytes <= MAX_STATE_BYTES:
            raise EncodingError(f"a state of {self.size_bytes} bytes; at most {MAX_STATE_BYTES} are allowed")
        if len(self.hashes) != _chunk_count(self.size_bytes):
            raise EncodingError(f"{len(self.hashes)} chunk hashes for a state of {self.size_bytes} bytes")
        if any(len(digest) != merkle.DIGEST_BYTES for digest in self.hashes):
            raise EncodingError("a chunk hash has 32 bytes")

    @cached_property
    def root(self) -> bytes:
        return state_root(self.hashes, self.size_bytes)

    def encode(self) -> bytes:
        return _HEAD.pack(_MAGIC, self.size_bytes) + b"".join(self.hashes)

    @staticmethod
    def encoded_bytes(size_bytes: int) -> int:
        """Bytes of the encoded manifest of a state of `size_bytes`."""
        return _HEAD.size + merkle.DIGEST_BYTES * _chunk_count(size_bytes)

    @classmethod
    def decode(cls, data: bytes, *, max_size_bytes: int) -> StateManifest:
        """Read a manifest of a state of at most `max_size_bytes`. Whose it is, only its root tells.

        Raises:
            EncodingError: not a manifest, of too large a state, or not exactly as many hashes as it has chunks.
        """
        if len(data) < _HEAD.size:
            raise EncodingError("a state manifest of fewer than 16 bytes")
        magic, size_bytes = _HEAD.unpack_from(data)
        if magic != _MAGIC:
            raise EncodingError("these bytes are no state manifest")
        if size_bytes > max_size_bytes:
            raise EncodingError(f"a state of {size_bytes} bytes where at most {max_size_bytes} are expected")
        if len(data) != cls.encoded_bytes(size_bytes):
            raise EncodingError(f"{len(data)} bytes are no manifest of a state of {size_bytes} bytes")
        starts = range(_HEAD.size, len(data), merkle.DIGEST_BYTES)
        return cls(size_bytes, tuple(bytes(data[start : start + merkle.DIGEST_BYTES]) for start in starts))

    def chunk_size(self, index: int) -> int:
        """Bytes of chunk `index`.

        Raises:
            IndexError: there is no such chunk.
        """
        if not 0 <= index < len(self.hashes):
            raise IndexError(f"chunk {index} of {len(self.hashes)}")
        return min(CHUNK_BYTES, self.size_bytes - index * CHUNK_BYTES)

    def verify_chunk(self, index: int, data: Buffer) -> None:
        """Check that `data` is chunk `index`.

        Raises:
            HashMismatchError: it is not.
            IndexError: there is no such chunk.
        """
        view = _bytes_of(data)
        if len(view) != self.chunk_size(index):
            raise HashMismatchError(f"chunk {index} has {self.chunk_size(index)} bytes, not {len(view)}")
        if blake3(view).digest() != self.hashes[index]:
            raise HashMismatchError(f"chunk {index} does not have the hash that its manifest names")


def manifest_of(*buffers: Buffer) -> StateManifest:
    """The manifest of the state that consists of these buffers. Raises like `chunk_hashes`."""
    return StateManifest(sum(len(_bytes_of(buffer)) for buffer in buffers), tuple(chunk_hashes(*buffers)))


def _chunk_count(size_bytes: int) -> int:
    return -(-size_bytes // CHUNK_BYTES)


def _bytes_of(buffer: Buffer) -> memoryview:
    if not isinstance(buffer, np.ndarray):
        view = memoryview(buffer)
        if not view.c_contiguous:
            raise ValueError("a buffer to be hashed must be C-contiguous")
        return view.cast("B")
    if not buffer.flags.c_contiguous:
        raise ValueError("an array to be hashed must be C-contiguous; see numpy.ascontiguousarray")
    if buffer.dtype.byteorder == ">" or (sys.byteorder == "big" and buffer.dtype.byteorder == "="):
        raise ValueError(f"an array to be hashed must be little-endian, not {buffer.dtype.str}")
    return buffer.reshape(-1).view(np.uint8).data


def _pieces(buffers: Sequence[Buffer]) -> Iterator[list[memoryview]]:
    """Per chunk, the stretches of the buffers that it consists of."""
    pieces: list[memoryview] = []
    missing = CHUNK_BYTES
    for buffer in buffers:
        view = _bytes_of(buffer)
        at = 0
        while at < len(view):
            piece = view[at : at + missing]
            pieces.append(piece)
            at += len(piece)
            missing -= len(piece)
            if not missing:
                yield pieces
                pieces, missing = [], CHUNK_BYTES
    if pieces:
        yield pieces
