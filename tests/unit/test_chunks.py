"""Content addresses and state roots."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from swarm_protocol import chunks, merkle
from swarm_protocol.chunks import CHUNK_BYTES, StateManifest
from swarm_protocol.errors import EncodingError, HashMismatchError


def _state(size_bytes: int) -> np.ndarray:
    return (np.arange(size_bytes, dtype=np.uint32) * 2654435761 >> 13).astype(np.uint8)


_STATE = _state(2 * CHUNK_BYTES + 1000)
_STATE_HASHES = chunks.chunk_hashes(_STATE)


def test_state_roots_are_pinned(golden: Callable[[str, dict[str, object]], None]) -> None:
    golden(
        "hashing",
        {
            "content hash of 'abc'": chunks.content_hash(b"abc").hex(),
            **{
                f"state root of {size} bytes": chunks.manifest_of(_state(size)).root.hex()
                for size in (0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 12345)
            },
            "state manifest of 5 bytes": chunks.manifest_of(b"state").encode().hex(),
        },
    )


def test_a_state_root_is_what_the_protocol_says() -> None:
    data = _state(2 * CHUNK_BYTES + 77).tobytes()
    hashes = [blake3(data[start : start + CHUNK_BYTES]).digest() for start in range(0, len(data), CHUNK_BYTES)]
    manifest = chunks.manifest_of(data)
    assert manifest.hashes == tuple(hashes)
    assert manifest.root == blake3(b"\x02" + struct.pack("<Q", len(data)) + merkle.root(hashes)).digest()
    assert manifest.root == chunks.state_root(hashes, len(data))


@given(cuts=st.lists(st.integers(0, 2 * CHUNK_BYTES + 1000), max_size=6))
def test_how_a_state_is_spread_over_buffers_does_not_matter(cuts: list[int]) -> None:
    whole = _STATE
    edges = [0, *sorted(cuts), whole.size]
    buffers: list[Any] = [whole[start:end] for start, end in itertools.pairwise(edges)]
    buffers[::2] = [buffer.tobytes() for buffer in buffers[::2]]
    assert chunks.chunk_hashes(*buffers) == _STATE_HASHES


def test_chunks_are_the_bytes_that_were_hashed() -> None:
    first, second = _state(CHUNK_BYTES + 5), np.arange(300_000, dtype="<f4").reshape(300, 1000)
    pieces = list(chunks.chunks(first, second, memoryview(b"tail"), bytearray(b"end")))
    assert b"".join(pieces) == first.tobytes() + second.tobytes() + b"tailend"
    assert [len(piece) for piece in pieces[:-1]] == [CHUNK_BYTES] * (len(pieces) - 1)
    assert [chunks.content_hash(piece) for piece in pieces] == chunks.chunk_hashes(first, second, b"tailend")


def test_two_states_of_one_tree_but_different_size_have_different_roots() -> None:
    digest = chunks.content_hash(b"x")
    assert chunks.state_root([digest], 1) != chunks.state_root([digest], 2)


def test_empty_buffers_and_scalars_are_buffers_too() -> None:
    assert chunks.manifest_of().root == chunks.manifest_of(b"", np.zeros((0, 3), dtype=np.float32)).root
    assert chunks.manifest_of(np.array(1, dtype="<i8")).root == chunks.manifest_of(struct.pack("<q", 1)).root


def test_buffers_whose_bytes_would_depend_on_layout_or_machine_are_refused() -> None:
    with pytest.raises(ValueError, match="C-contiguous"):
        chunks.manifest_of(np.zeros((4, 4), dtype=np.float32).T[1:])
    with pytest.raises(ValueError, match="C-contiguous"):
        chunks.content_hash(memoryview(b"abcdef")[::2])
    with pytest.raises(ValueError, match="little-endian"):
        chunks.manifest_of(np.zeros(4, dtype=">f4"))


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_a_manifest_survives_the_wire(size: int) -> None:
    manifest = chunks.manifest_of(_state(size))
    assert StateManifest.decode(manifest.encode(), max_size_bytes=size) == manifest


def test_a_manifest_of_too_large_a_state_is_refused_before_its_hashes_are_read() -> None:
    head = b"SWSTATE1" + struct.pack("<Q", 1 << 49)
    with pytest.raises(EncodingError, match="at most 1000"):
        StateManifest.decode(head, max_size_bytes=1000)


@given(data=st.binary(max_size=100))
def test_bytes_that_are_no_manifest_are_refused(data: bytes) -> None:
    with pytest.raises(EncodingError):
        StateManifest.decode(data, max_size_bytes=1 << 40)


def test_a_manifest_has_exactly_the_hashes_of_its_chunks() -> None:
    good = chunks.manifest_of(_state(CHUNK_BYTES + 1)).encode()
    for bad in (good[:-1], good[:-32], good + b"\x00", good + bytes(32), b"x" + good[1:]):
        with pytest.raises(EncodingError):
            StateManifest.decode(bad, max_size_bytes=1 << 40)
    with pytest.raises(EncodingError):
        StateManifest(1, ())
    with pytest.raises(EncodingError):
        StateManifest(1, (b"short",))
    with pytest.raises(EncodingError):
        StateManifest(-1, ())


def test_a_chunk_is_checked_before_it_is_used() -> None:
    data = _state(CHUNK_BYTES + 10).tobytes()
    manifest = chunks.manifest_of(data)
    assert [manifest.chunk_size(index) for index in range(2)] == [CHUNK_BYTES, 10]
    manifest.verify_chunk(1, data[CHUNK_BYTES:])
    with pytest.raises(HashMismatchError, match="hash"):
        manifest.verify_chunk(1, b"0123456789")
    with pytest.raises(HashMismatchError, match="10 bytes"):
        manifest.verify_chunk(1, data[CHUNK_BYTES:] + b"x")
    with pytest.raises(IndexError):
        manifest.verify_chunk(2, b"")
