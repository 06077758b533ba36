"""The run's transparency log: an append-only Merkle log as in RFC 6962, section 2.1, and RFC 9162, section 2.1.

SHA-256; a leaf is hashed under the prefix 0x00, an inner node under 0x01. Appending costs O(log n), a root of any earlier
size and a proof O(log^2 n). Standard library only, so that a verifier needs nothing else.

What it promises: a proof that verifies shows that the entry is in the log under that root (inclusion), or that nothing
before the older root was changed or removed (consistency). It does not show that two parties see the same root: that is
what gossip is for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256

from swarm_protocol.errors import HashMismatchError

HASH_BYTES = 32
EMPTY_ROOT = sha256(b"").digest()


def leaf_hash(entry: bytes) -> bytes:
    """SHA-256(0x00 || entry), 32 bytes."""
    return sha256(b"\x00" + entry).digest()


class Log:
    """The hashes of a log: of every leaf and every complete subtree, 64 bytes per leaf. Entries are kept elsewhere."""

    def __init__(self, leaf_hashes: Iterable[bytes] = ()) -> None:
        self._levels: list[bytearray] = [bytearray()]  # _levels[k]: the hashes of the subtrees of 2^k leaves
        for digest in leaf_hashes:
            self.append(digest)

    @property
    def size(self) -> int:
        """The number of leaves."""
        return len(self._levels[0]) // HASH_BYTES

    def append(self, leaf_hash: bytes) -> int:
        """Append the hash of an entry; returns its index."""
        if len(leaf_hash) != HASH_BYTES:
            raise ValueError(f"a leaf hash has {HASH_BYTES} bytes, not {len(leaf_hash)}")
        index = self.size
        node, level = leaf_hash, 0
        self._levels[0] += node
        while index >> level & 1:
            node = _node(self._complete(level, (index >> level) - 1), node)
            level += 1
            if level == len(self._levels):
                self._levels.append(bytearray())
            self._levels[level] += node
        return index

    def leaf(self, index: int) -> bytes:
        """The hash of leaf `index`."""
        if not 0 <= index < self.size:
            raise IndexError(f"leaf {index} of {self.size}")
        return self._complete(0, index)

    def root(self, size: int | None = None) -> bytes:
        """The root, 32 bytes, now or when the log had `size` leaves.

        Raises:
            IndexError: the log is not that long.
        """
        size = self._checked(size)
        return self._subtree(0, size) if size else EMPTY_ROOT

    def inclusion_proof(self, index: int, size: int | None = None) -> tuple[bytes, ...]:
        """The audit path of leaf `index` in the log of `size` leaves (RFC 9162, section 2.1.3.1), lowest first.

        Raises:
            IndexError: the log is not that long, or has no such leaf.
        """
        size = self._checked(size)
        if not 0 <= index < size:
            raise IndexError(f"leaf {index} of {size}")
        path = []
        start, end = 0, size
        while end - start > 1:
            middle = start + _split(end - start)
            if index < middle:
                path.append(self._subtree(middle, end))
                end = middle
            else:
                path.append(self._subtree(start, middle))
                start = middle
        return tuple(reversed(path))

    def consistency_proof(self, old_size: int, size: int | None = None) -> tuple[bytes, ...]:
        """Shows that the log of `size` leaves extends that of `old_size` (RFC 9162, section 2.1.4.1).

        Empty where one of the two trees is empty or both are the same.

        Raises:
            IndexError: the log is not that long, or `old_size` is beyond `size`.
        """
        size = self._checked(size)
        if not 0 <= old_size <= size:
            raise IndexError(f"an older size {old_size} beyond {size}")
        if old_size in (0, size):
            return ()
        path = []
        start, end = 0, size
        while end != old_size:
            middle = start + _split(end - start)
            if old_size <= middle:
                path.append(self._subtree(middle, end))
                end = middle
            else:
                path.append(self._subtree(start, middle))
                start = middle
        if start:  # otherwise the old tree is a subtree on its own, and the verifier knows its root
            path.append(self._subtree(start, end))
        return tuple(reversed(path))

    def _checked(self, size: int | None) -> int:
        if size is None:
            return self.size
        if not 0 <= size <= self.size:
            raise IndexError(f"the log has {self.size} leaves, not {size}")
        return size

    def _complete(self, level: int, index: int) -> bytes:
        return bytes(self._levels[level][index * HASH_BYTES : (index + 1) * HASH_BYTES])

    def _subtree(self, start: int, end: int) -> bytes:
        """The hash of the leaves [start, end), which are a node of some tree of this log."""
        width = end - start
        if width & (width - 1) == 0:
            level = width.bit_length() - 1
            return self._complete(level, start >> level)
        middle = start + _split(width)
        return _node(self._subtree(start, middle), self._subtree(middle, end))


def verify_inclusion(leaf_hash: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Check that the log of `size` leaves under `root` has this leaf at `index` (RFC 9162, section 2.1.3.2).

    Raises:
        HashMismatchError: the proof does not show it.
    """
    if not 0 <= index < size:
        raise HashMismatchError(f"an inclusion proof for leaf {index} of a log of {size}")
    _check_digests(leaf_hash, root, *proof)
    number, last = index, size - 1
    node = leaf_hash
    for sibling in proof:
        if not last:
            raise HashMismatchError("the inclusion proof is too long")
        if number & 1 or number == last:
            node = _node(sibling, node)
            while not number & 1 and number:
                number, last = number >> 1, last >> 1
        else:
            node = _node(node, sibling)
        number, last = number >> 1, last >> 1
    if last or node != root:
        raise HashMismatchError(f"the proof does not show that the log of {size} has this leaf at {index}")


def verify_consistency(old_size: int, size: int, proof: Sequence[bytes], old_root: bytes, root: bytes) -> None:
    """Check that the log of `size` leaves under `root` extends that of `old_size` under `old_root`.

    RFC 9162, section 2.1.4.2; every log extends the empty one.

    Raises:
        HashMismatchError: the proof does not show it: somebody may have rewritten the log.
    """
    if not 0 <= old_size <= size:
        raise HashMismatchError(f"a consistency proof from {old_size} to {size} leaves")
    _check_digests(old_root, root, *proof)
    failed = HashMismatchError(f"the proof does not show that the log of {size} leaves extends that of {old_size}")
    if old_size in (0, size):
        expected = root if old_size == size else EMPTY_ROOT
        if proof or old_root != expected or (not size and root != EMPTY_ROOT):
            raise failed
        return
    path = list(proof) if old_size & (old_size - 1) else [old_root, *proof]
    if not path:
        raise failed
    number, last = old_size - 1, size - 1
    while number & 1:
        number, last = number >> 1, last >> 1
    old_node = new_node = path[0]
    for sibling in path[1:]:
        if not last:
            raise failed
        if number & 1 or number == last:
            old_node, new_node = _node(sibling, old_node), _node(sibling, new_node)
            while not number & 1 and number:
                number, last = number >> 1, last >> 1
        else:
            new_node = _node(new_node, sibling)
        number, last = number >> 1, last >> 1
    if last or old_node != old_root or new_node != root:
        raise failed


def _split(width: int) -> int:
    """The largest power of two below `width`, which is at least 2."""
    return 1 << (width - 1).bit_length() - 1


def _node(left: bytes, right: bytes) -> bytes:
    return sha256(b"\x01" + left + right).digest()


def _check_digests(*digests: bytes) -> None:
    if any(len(digest) != HASH_BYTES for digest in digests):
        raise HashMismatchError(f"hashes of a log have {HASH_BYTES} bytes")
