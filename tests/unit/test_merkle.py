"""The BLAKE3 Merkle tree under state roots and part roots."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from swarm_protocol import merkle
from swarm_protocol.errors import HashMismatchError


def _leaves(count: int) -> list[bytes]:
    return [blake3(number.to_bytes(4, "little")).digest() for number in range(count)]


def _reference_root(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, word for word."""
    if not leaves:
        return blake3(b"").digest()
    if len(leaves) == 1:
        return blake3(b"\x00" + leaves[0]).digest()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return blake3(b"\x01" + _reference_root(leaves[:split]) + _reference_root(leaves[split:])).digest()


def test_roots_are_pinned(golden: Callable[[str, dict[str, object]], None]) -> None:
    golden("hashing", {f"merkle root of {n} leaves": merkle.root(_leaves(n)).hex() for n in (0, 1, 2, 3, 5, 8, 13)})


@pytest.mark.parametrize("count", range(34))
def test_the_tree_has_the_shape_of_rfc_6962(count: int) -> None:
    assert merkle.root(_leaves(count)) == _reference_root(_leaves(count))


@given(count=st.integers(1, 70), data=st.data())
def test_every_leaf_can_be_proven(count: int, data: st.DataObject) -> None:
    leaves = _leaves(count)
    index = data.draw(st.integers(0, count - 1))
    proof = merkle.proof(leaves, index)
    assert merkle.root_from_proof(leaves[index], index, count, proof) == merkle.root(leaves)
    merkle.verify(merkle.root(leaves), leaves[index], index, count, proof)


@given(count=st.integers(2, 40), data=st.data())
def test_a_leaf_is_proven_at_its_own_place_only(count: int, data: st.DataObject) -> None:
    leaves = _leaves(count)
    index = data.draw(st.integers(0, count - 1))
    elsewhere = data.draw(st.integers(0, count - 1).filter(lambda other: other != index))
    with pytest.raises(HashMismatchError):
        merkle.verify(merkle.root(leaves), leaves[index], elsewhere, count, merkle.proof(leaves, index))
    with pytest.raises(HashMismatchError):
        merkle.verify(merkle.root(leaves), leaves[elsewhere], index, count, merkle.proof(leaves, index))


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_a_proof_of_the_wrong_length_is_refused(count: int) -> None:
    leaves = _leaves(count)
    proof = merkle.proof(leaves, 0)
    with pytest.raises(HashMismatchError, match="too long"):
        merkle.root_from_proof(leaves[0], 0, count, [*proof, leaves[0]])
    if proof:
        with pytest.raises(HashMismatchError, match="too short"):
            merkle.root_from_proof(leaves[0], 0, count, proof[:-1])


@pytest.mark.parametrize(("index", "count"), [(-1, 4), (4, 4), (0, 0)])
def test_a_place_outside_the_tree_is_refused(index: int, count: int) -> None:
    with pytest.raises(HashMismatchError):
        merkle.root_from_proof(_leaves(1)[0], index, count, ())
    with pytest.raises(IndexError):
        merkle.proof(_leaves(count), index)


def test_only_digests_of_32_bytes_are_hashed() -> None:
    with pytest.raises(HashMismatchError):
        merkle.root([b"short"])
    with pytest.raises(HashMismatchError):
        merkle.root_from_proof(_leaves(1)[0], 0, 2, [b"short"])


def test_an_inner_node_cannot_pass_for_a_leaf() -> None:
    leaves = _leaves(4)
    nodes = [blake3(b"\x01" + leaves[i] + leaves[i + 1]).digest() for i in (0, 2)]
    assert merkle.root(nodes) != merkle.root(leaves)
