"""What a call from one peer to another is, and how it travels on whatever carries it.

A message is: header length (u32), body length (u64), both little-endian, header, body; the answer has the same form. The
header is a canonical map; `op` in it names the operation, and `refused` in an answer's says why the peer will not. Lengths
are looked at before anything of that length is read or allocated.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from swarm_protocol import encoding
from swarm_protocol.errors import EncodingError, RefusedError

LENGTHS = struct.Struct("<IQ")
MAX_HEADER_BYTES = 1 << 16
MAX_PEERS_COUNTED = 1 << 10
WRITE_BYTES = 1 << 18

Header = Mapping[str, encoding.Value]
Path = Literal["daemon", "direct"]
Bytes = bytes | bytearray
T = TypeVar("T")


@dataclass
class Traffic:
    """Bytes of calls in both directions, headers included, without what the transport adds."""

    sent: int = 0
    received: int = 0
    by_peer: dict[tuple[bytes, Path], list[int]] = field(default_factory=dict)

    def note(self, peer: bytes, path: Path, *, sent: int = 0, received: int = 0) -> None:
        """Count bytes to or from a peer; beyond a thousand peers they count in the sums alone."""
        self.sent += sent
        self.received += received
        if len(self.by_peer) < MAX_PEERS_COUNTED or (peer, path) in self.by_peer:
            counted = self.by_peer.setdefault((peer, path), [0, 0])
            counted[0] += sent
            counted[1] += received


@dataclass
class Call:
    """A call as its handler sees it: who calls, what for, and how large the body is that has not been read yet."""

    caller: bytes
    header: dict[str, Any]
    size_bytes: int
    _receive: Callable[[Callable[[Bytes], Any]], Awaitable[Any]]

    async def body(self, max_bytes: int) -> bytes:
        """Read the body.

        Raises:
            RefusedError: it was declared larger than `max_bytes`.
        """
        return await self.body_into(bytes, max_bytes)

    async def body_into(self, use: Callable[[Bytes], T], max_bytes: int) -> T:
        """Read the body and return what `use` makes of it in a thread. Raises as `body` and `use` do."""
        if self.size_bytes > max_bytes:
            raise RefusedError(f"a body of {self.size_bytes} bytes where at most {max_bytes} are allowed")
        result: T = await self._receive(use)
        return result


@dataclass(frozen=True)
class Answer:
    """What a handler says. Where uploads are limited, answers that are not `urgent` go after everything that is."""

    header: Header = field(default_factory=dict)
    body: Bytes | memoryview = b""
    urgent: bool = True


Handler = Callable[[Call], Awaitable[Answer]]


def pack(header: Header, size_bytes: int) -> bytes:
    """What goes before a body of `size_bytes`."""
    head = encoding.encode(header)
    if len(head) > MAX_HEADER_BYTES:
        raise EncodingError(f"a header of {len(head)} bytes; at most {MAX_HEADER_BYTES} are allowed")
    return LENGTHS.pack(len(head), size_bytes) + head


def pieces_of(head: bytes, body: Bytes | memoryview) -> list[Bytes | memoryview]:
    """A message in pieces of up to `WRITE_BYTES`, the head first; nothing is copied."""
    view = memoryview(body)
    return [head, *(view[start : start + WRITE_BYTES] for start in range(0, len(view), WRITE_BYTES))]


def unpack_lengths(raw: Bytes) -> tuple[int, int]:
    """The lengths of header and body, from the first 12 bytes.

    Raises:
        EncodingError: not 12 bytes, or a header beyond its bound.
    """
    if len(raw) != LENGTHS.size:
        raise EncodingError(f"a message starts with {LENGTHS.size} bytes of lengths")
    length, size_bytes = LENGTHS.unpack(raw)
    if length > MAX_HEADER_BYTES:
        raise EncodingError("a header beyond its bound")
    return length, size_bytes


def unpack_header(raw: Bytes) -> dict[str, Any]:
    """The header.

    Raises:
        EncodingError: not the canonical encoding of a map.
    """
    header = encoding.decode(bytes(raw), max_bytes=MAX_HEADER_BYTES)
    if not isinstance(header, dict):
        raise EncodingError("a header is a map")
    return header
