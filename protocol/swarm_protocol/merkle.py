"""Merkle trees of 32-byte digests with BLAKE3: the shape of RFC 6962, section 2.1, with other hashing.

A leaf is `BLAKE3(0x00 || digest)`, an inner node `BLAKE3(0x01 || left || right)`; a tree of n > 1 leaves splits at the
largest power of two below n; the empty tree is `BLAKE3("")`. The prefixes keep leaves and nodes apart. A root does not
fix the number of leaves, so whoever relies on it binds the count as well (`chunks.state_root` does).
"""

from __future__ import annotations

from collections.abc import Sequence

from blake3 import blake3

from swarm_protocol.errors import HashMismatchError

DIGEST_BYTES = 32


def root(leaves: Sequence[bytes]) -> bytes:
    """The root over `leaves`, digests of 32 bytes each."""
    level = [_leaf(digest) for digest in leaves]
    if not level:
        return blake3(b"").digest()
    while len(level) > 1:
        level = _above(level)
    return level[0]


def proof(leaves: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """The siblings on the way from leaf `index` to the root, lowest first.

    Raises:
        IndexError: there is no such leaf.
    """
    if not 0 <= index < len(leaves):
        raise IndexError(f"leaf {index} of {len(leaves)}")
    level = [_leaf(digest) for digest in leaves]
    siblings = []
    while len(level) > 1:
        if index ^ 1 < len(level):
            siblings.append(level[index ^ 1])
        level = _above(level)
        index >>= 1
    return tuple(siblings)


def root_from_proof(leaf: bytes, index: int, count: int, proof: Sequence[bytes]) -> bytes:
    """The root of the tree of `count` leaves that has the digest `leaf` at `index`, if `proof` is right.

    Raises:
        HashMismatchError: the proof cannot be one for this place: an index outside the tree, a wrong length.
    """
    if not 0 <= index < count:
        raise HashMismatchError(f"a Merkle proof for leaf {index} of {count}")
    siblings = iter(proof)
    node, last = _leaf(leaf), count - 1
    try:
        while last:
            if index & 1:
                node = _node(next(siblings), node)
            elif index < last:
                node = _node(node, next(siblings))
            index, last = index >> 1, last >> 1
    except StopIteration:
        raise HashMismatchError(f"a Merkle proof of {len(proof)} digests is too short for {count} leaves") from None
    if next(siblings, None) is not None:
        raise HashMismatchError(f"a Merkle proof of {len(proof)} digests is too long for {count} leaves")
    return node


def verify(root: bytes, leaf: bytes, index: int, count: int, proof: Sequence[bytes]) -> None:
    """Check that the tree of `count` leaves under `root` has the digest `leaf` at `index`.

    Raises:
        HashMismatchError: it does not, or the proof does not show it.
    """
    if root_from_proof(leaf, index, count, proof) != root:
        raise HashMismatchError(f"the Merkle proof of leaf {index} leads to another root")


def _above(level: list[bytes]) -> list[bytes]:
    # A node without a sibling moves up unchanged: that is the split at the largest power of two, seen from below.
    above = [_node(left, right) for left, right in zip(level[::2], level[1::2], strict=False)]
    return above + level[-1:] if len(level) % 2 else above


def _leaf(digest: bytes) -> bytes:
    if len(digest) != DIGEST_BYTES:
        raise HashMismatchError(f"a leaf of {len(digest)} bytes where a digest of {DIGEST_BYTES} was expected")
    return blake3(b"\x00" + digest).digest()


def _node(left: bytes, right: bytes) -> bytes:
    if len(left) != DIGEST_BYTES or len(right) != DIGEST_BYTES:
        raise HashMismatchError(f"a Merkle proof consists of digests of {DIGEST_BYTES} bytes")
    return blake3(b"\x01" + left + right).digest()
