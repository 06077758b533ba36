"""Every random choice of a run: keyed, counter-based, and recomputable by anybody from public numbers.

A draw is a function of (run seed, purpose, round, slot, step) and of nothing else: no state, no order of calls. The run
seed and the purpose, a named string, are hashed into the key of a Philox 4x64-10 generator (Salmon et al. 2011); round,
slot and step are three of its four counter words and the fourth counts blocks, so no two streams overlap. All of it is
integer arithmetic, or float32 steps without rounding: bit-identical everywhere.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

MAX_PERMUTATION = 1 << 62

_FEISTEL_ROUNDS = 6
_SLICE = 1 << 14  # indices per pass of the permutation: its temporaries then stay in the cache
_WORD = (1 << 64) - 1
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # SplitMix64's multipliers
_SHIFT = np.uint64(32)

Integers = npt.NDArray[np.integer[Any]]


def key(run_seed: int, purpose: str) -> tuple[int, int]:
    """The two 64-bit words that key the Philox generator of one purpose in one run."""
    if not 0 <= run_seed <= _WORD:
        raise ValueError(f"a run seed has 64 bits, not {run_seed}")
    digest = blake3(struct.pack("<Q", run_seed) + purpose.encode(), derive_key_context="swarm-node 2026 seeds").digest(
        16
    )
    first, second = struct.unpack("<QQ", digest)
    return first, second


def raw(run_seed: int, purpose: str, round: int, slot: int, step: int, n: int) -> npt.NDArray[np.uint64]:
    """The first `n` words of the stream of (run seed, purpose, round, slot, step): uint64 [n].

    Where a purpose knows no round, slot or step, its own small numbers (an epoch, a tensor) take their place.

    Raises:
        ValueError: a number does not fit 64 bits.
    """
    for word in (round, slot, step):
        if not 0 <= word <= _WORD:
            raise ValueError(f"round, slot and step have 64 bits each, not {word}")
    generator = np.random.Philox(
        key=np.array(key(run_seed, purpose), dtype=np.uint64),
        counter=np.array([0, round, slot, step], dtype=np.uint64),
    )
    return generator.random_raw(n)


def uniform_f32(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float32]:
    """Exact uniforms in [-0.5, 0.5): float32, the shape of `words`. The upper 24 bits of each word; nothing is rounded."""
    return (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24) - np.float32(0.5)


class Permutation:
    """A keyed bijection of [0, n), 1 <= n <= 2^62, evaluated at any index in O(1) with nothing stored.

    Six rounds of an alternating, unbalanced Feistel network over the fewest bits that hold n - 1; a value that falls
    outside [0, n) goes through the network again until it is inside (cycle walking; Black and Rogaway 2002), fewer than
    two passes on average. It shuffles data well; it is no cipher.
    """

    def __init__(
        self,
        n: int,
        run_seed: int,
        purpose: str,
        round: int = 0,
        slot: int = 0,
        step: int = 0,
    ) -> None:
        if not 1 <= n <= MAX_PERMUTATION:
            raise ValueError(f"a permutation has from 1 to 2^62 elements, not {n}")
        self.n = n
        bits = (n - 1).bit_length()
        self._low_bits = (bits + 1) // 2
        self._high_bits = bits - self._low_bits
        self._round_keys = raw(run_seed, purpose, round, slot, step, _FEISTEL_ROUNDS)

    def __call__(self, indices: Integers) -> npt.NDArray[np.int64]:
        """Where the elements at `indices` go: int64, the shape of `indices`.

        Raises:
            ValueError: an index is not in [0, n).
        """
        return self._evaluate(indices, range(_FEISTEL_ROUNDS))

    def inverse(self, values: Integers) -> npt.NDArray[np.int64]:
        """The indices whose elements went to `values`; otherwise like a call."""
        return self._evaluate(values, range(_FEISTEL_ROUNDS - 1, -1, -1))

    def _evaluate(self, indices: Integers, rounds: range) -> npt.NDArray[np.int64]:
        flat = np.asarray(indices).reshape(-1)
        if flat.size and not (int(flat.min()) >= 0 and int(flat.max()) < self.n):
            raise ValueError(f"an index is outside [0, {self.n})")
        out = flat.astype(np.uint64)
        for start in range(0, out.size, _SLICE):
            part = out[start : start + _SLICE]
            self._network(part, rounds)
            walking = np.flatnonzero(part >= np.uint64(self.n))
            while walking.size:
                values = part[walking]
                self._network(values, rounds)
                part[walking] = values
                walking = walking[values >= np.uint64(self.n)]
        return out.astype(np.int64).reshape(np.shape(indices))

    def _network(self, x: npt.NDArray[np.uint64], rounds: range) -> None:
        """One pass of the network, in place. Even rounds change the low bits, odd rounds the high ones."""
        if not self._high_bits:  # n is 1 or 2: a Feistel network needs two halves
            if self._low_bits:
                x ^= self._round_keys[:1] & np.uint64(1)
            return
        low_bits = np.uint64(self._low_bits)
        low_mask = np.uint64((1 << self._low_bits) - 1)
        for number in rounds:
            if number % 2:
                mixed = _mix(x & low_mask, self._round_keys[number], self._high_bits)
                mixed <<= low_bits
            else:
                mixed = _mix(x >> low_bits, self._round_keys[number], self._low_bits)
            x ^= mixed


def _mix(half: npt.NDArray[np.uint64], round_key: np.uint64, bits: int) -> npt.NDArray[np.uint64]:
    """`bits` bits that depend on every bit of `half` and of the round's key; overwrites `half`."""
    half ^= round_key
    half *= _MIX_1
    half ^= half >> _SHIFT
    half *= _MIX_2
    half >>= np.uint64(64 - bits)
    return half
