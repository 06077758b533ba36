"""Block-wise symmetric integers: `int8` (blocks of 256) and `int4` (blocks of 64).

Of each block, the scale is the largest magnitude divided by the largest code (127 or 7); a code is its value divided by
the scale, rounded half to even and clamped; it decodes to code times scale. Each of these is one IEEE float32 operation.
A block whose scale rounds to zero is all zeros. A product beyond float32 decodes to the largest finite value.

Layout: all scales, little-endian float32, the last one for a shorter block where there is one; then all codes in order,
in two's complement. Two int4 codes share a byte, the earlier one in its low half; a last half without a code is zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from swarm_protocol.errors import InvalidDataError

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_SLAB_ELEMENTS = 1 << 15
"""Elements that are worked on at a time, so that temporaries stay in the cache. A multiple of every block; changes no bit."""

_LARGEST = np.finfo(np.float32).max

_NIBBLE_PAIRS: Float32 = np.array(
    [[((byte >> shift & 15) ^ 8) - 8 for shift in (0, 4)] for byte in range(256)], np.float32
)
"""The two int4 codes of a byte, float32 [256, 2]."""


@dataclass(frozen=True)
class Blockwise:
    """The codec for codes of `bits` bits, 4 or 8, with one scale per `block` elements; see `codec.Codec`."""

    bits: int
    block: int

    @property
    def largest_code(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def encoded_bytes(self, numel: int) -> int:
        return 4 * _blocks(numel, self.block) + _ceil_div(numel * self.bits, 8)

    def encode(self, values: Float32) -> bytes:
        """Raises `InvalidDataError` where a value is not finite."""
        numel = values.size
        out = np.empty(self.encoded_bytes(numel), np.uint8)
        scales = out[: 4 * _blocks(numel, self.block)].view("<f4")
        codes = out[scales.nbytes :]
        whole = numel - numel % self.block
        for start in range(0, whole, _SLAB_ELEMENTS):
            stop = min(start + _SLAB_ELEMENTS, whole)
            self._encode_slab(
                values[start:stop],
                scales[start // self.block : stop // self.block],
                codes[start * self.bits // 8 : stop * self.bits // 8],
            )
        if whole < numel:
            padded = np.zeros(self.block, np.float32)
            padded[: numel - whole] = values[whole:]
            tail = np.empty(self.block * self.bits // 8, np.uint8)
            self._encode_slab(padded, scales[-1:], tail)
            codes[whole * self.bits // 8 :] = tail[: codes.size - whole * self.bits // 8]
        return out.tobytes()

    def decode(self, data: bytes | bytearray | memoryview, numel: int, out: Float32 | None = None) -> Float32:
        """Raises `InvalidDataError` where the length is wrong or the bytes are not canonical."""
        scales, codes = self._split(data, numel)
        values = np.empty(numel, np.float32) if out is None else out
        whole = numel - numel % self.block
        for start in range(0, whole, _SLAB_ELEMENTS):
            stop = min(start + _SLAB_ELEMENTS, whole)
            self._decode_slab(
                scales[start // self.block : stop // self.block],
                codes[start * self.bits // 8 : stop * self.bits // 8],
                values[start:stop],
            )
        if whole < numel:
            padded = np.empty(self.block, np.float32)
            tail = np.zeros(self.block * self.bits // 8, np.uint8)
            tail[: codes.size - whole * self.bits // 8] = codes[whole * self.bits // 8 :]
            self._decode_slab(scales[-1:], tail, padded)
            values[whole:] = padded[: numel - whole]
        return values

    def peak(self, data: bytes | bytearray | memoryview, numel: int) -> float:
        """The largest scale times the largest code. Raises as `decode` does."""
        scales, codes = self._split(data, numel)
        self._require_codes(codes)
        return float(scales.max(initial=0.0)) * self.largest_code

    def _split(self, data: bytes | bytearray | memoryview, numel: int) -> tuple[Float32, Bytes]:
        """Scales and codes, after a look at the length, the scales and the padding."""
        if len(data) != self.encoded_bytes(numel):
            raise InvalidDataError(f"{len(data)} bytes where {numel} values take {self.encoded_bytes(numel)}")
        raw = np.frombuffer(data, np.uint8)
        scales = raw[: 4 * _blocks(numel, self.block)].view("<f4").astype(np.float32)
        codes = raw[scales.nbytes :]
        # Not `scales < 0`: that lets -0 pass, a second spelling of zero.
        if not np.isfinite(scales).all() or np.signbit(scales).any():
            raise InvalidDataError("a scale is negative or not finite")
        if self.bits == 4 and numel % 2 and codes[-1] & 0xF0:
            raise InvalidDataError("the unused half of the last byte is not zero")
        return scales, codes

    def _require_codes(self, codes: Bytes) -> None:
        if self.bits == 8:
            if codes.view(np.int8).min(initial=0) == -128:
                raise InvalidDataError("code -128 is not used")
        elif ((codes & 0x0F) == 0x08).any() or ((codes & 0xF0) == 0x80).any():
            raise InvalidDataError("code -8 is not used")

    def _encode_slab(self, values: Float32, scales: Float32, codes: Bytes) -> None:
        x = values.reshape(-1, self.block)
        # The outer abs makes the peak of a block of zeros +0, whatever their signs.
        peaks = np.abs(np.maximum(x.max(axis=1), -x.min(axis=1)))
        if not np.isfinite(peaks).all():
            raise InvalidDataError("a value to be encoded is not finite")
        scale = peaks / np.float32(self.largest_code)
        scales[:] = scale
        scale[scale == 0] = 1  # every value of such a block is far below one half
        q = np.divide(x, scale[:, None])
        np.rint(q, out=q)
        np.clip(q, -self.largest_code, self.largest_code, out=q)  # beyond it only where the scale is subnormal
        _pack(q.astype(np.int8).reshape(-1), self.bits, codes)

    def _decode_slab(self, scales: Float32, codes: Bytes, values: Float32) -> None:
        self._require_codes(codes)
        if self.bits == 8:
            q = codes.view(np.int8).astype(np.float32)
        else:
            q = _NIBBLE_PAIRS.view(np.uint64).reshape(-1).take(codes).view(np.float32)
        out = values.reshape(-1, self.block)
        with np.errstate(over="ignore"):
            np.multiply(q.reshape(-1, self.block), scales[:, None], out=out)
        if scales.size and scales.max() > _LARGEST / 128:
            np.clip(out, -_LARGEST, _LARGEST, out=out)


INT8 = Blockwise(bits=8, block=256)
INT4 = Blockwise(bits=4, block=64)


def _pack(q: npt.NDArray[np.int8], bits: int, codes: Bytes) -> None:
    """Write whole bytes of codes."""
    if bits == 8:
        codes[:] = q.view(np.uint8)
        return
    pairs = q.view("<u2")
    np.bitwise_or(pairs & 0x0F, pairs >> 4 & 0xF0, out=codes, casting="unsafe")


def _blocks(numel: int, block: int) -> int:
    return _ceil_div(numel, block)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
