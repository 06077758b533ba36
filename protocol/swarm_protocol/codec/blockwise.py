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
_SMALLEST_NORMAL = np.finfo(np.float32).tiny

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
        writing = self.write(values.size)
        for start in range(0, values.size, _SLAB_ELEMENTS):
            writing.put(start, values[start : start + _SLAB_ELEMENTS])
        return bytes(writing.result())

    def decode(self, data: bytes | bytearray | memoryview, numel: int, out: Float32 | None = None) -> Float32:
        """Raises `InvalidDataError` where the length is wrong or the bytes are not canonical."""
        reading = self.read(data, numel)
        values = np.empty(numel, np.float32) if out is None else out
        for start in range(0, numel, _SLAB_ELEMENTS):
            reading.values(start, values[start : start + _SLAB_ELEMENTS])
        return values

    def read(self, data: bytes | bytearray | memoryview, numel: int) -> Reading:
        """See `codec.Reading`. Raises as `decode` does for what the length, the scales and the padding show."""
        return Reading(self, *self._split(data, numel))

    def write(self, numel: int) -> Writing:
        """See `codec.Writing`."""
        return Writing(self, numel)

    def peak(self, data: bytes | bytearray | memoryview, numel: int) -> float:
        """The largest scale times the largest code, rounded as `decode` rounds. Raises as it does."""
        scales, codes = self._split(data, numel)
        self._require_codes(codes)
        with np.errstate(over="ignore"):
            return float(min(scales.max(initial=0.0) * np.float32(self.largest_code), _LARGEST))

    def _split(self, data: bytes | bytearray | memoryview, numel: int) -> tuple[Float32, Bytes]:
        """Scales and codes, after a look at the length, the scales and the padding."""
        if len(data) != self.encoded_bytes(numel):
            raise InvalidDataError(f"{len(data)} bytes where {numel} values take {self.encoded_bytes(numel)}")
        raw = np.frombuffer(data, np.uint8)
        scales = raw[: 4 * _blocks(numel, self.block)].view("<f4").astype(np.float32, copy=False)
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

    def encode_slab(self, values: Float32, scales: Float32, codes: Bytes) -> None:
        """Encode whole blocks."""
        magnitudes = np.bitwise_and(values.view(np.int32), 0x7FFFFFFF)
        # As integers they are in the order of the numbers, and the largest is found faster.
        peaks = magnitudes.reshape(-1, self.block).max(axis=1).view(np.float32)
        if not np.isfinite(peaks).all():
            raise InvalidDataError("a value to be encoded is not finite")
        scale = peaks / np.float32(self.largest_code)
        scales[:] = scale
        smallest = scale.min(initial=1.0)
        if smallest == 0:
            scale[scale == 0] = 1  # every value of such a block is far below one half
        q = magnitudes.view(np.float32)
        np.divide(values.reshape(-1, self.block), scale[:, None], out=q.reshape(-1, self.block))
        np.rint(q, out=q)
        if smallest < _SMALLEST_NORMAL:  # rounded down so far that a code is beyond the largest one
            np.clip(q, -self.largest_code, self.largest_code, out=q)
        _pack(q, self.bits, codes)

    def decode_slab(self, scales: Float32, codes: Bytes, values: Float32) -> None:
        """Decode whole blocks. Raises `InvalidDataError` where a code is not used."""
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


class Reading:
    """See `codec.Reading`."""

    def __init__(self, codec: Blockwise, scales: Float32, codes: Bytes) -> None:
        self._codec = codec
        self._scales = scales
        self._codes = codes

    def values(self, start: int, out: Float32) -> None:
        codec, rest = self._codec, out.size % self._codec.block
        stop = start + out.size - rest
        scales = self._scales[start // codec.block : stop // codec.block]
        codec.decode_slab(scales, self._codes[start * codec.bits // 8 : stop * codec.bits // 8], out[: out.size - rest])
        if rest:
            padded = np.empty(codec.block, np.float32)
            tail = np.zeros(codec.block * codec.bits // 8, np.uint8)
            left = self._codes[stop * codec.bits // 8 :]
            tail[: left.size] = left
            codec.decode_slab(self._scales[-1:], tail, padded)
            out[out.size - rest :] = padded[:rest]


class Writing:
    """See `codec.Writing`."""

    def __init__(self, codec: Blockwise, numel: int) -> None:
        self._codec = codec
        self._out = bytearray(codec.encoded_bytes(numel))
        whole = np.frombuffer(self._out, np.uint8)
        self._scales = whole[: 4 * _blocks(numel, codec.block)].view("<f4")
        self._codes = whole[self._scales.nbytes :]

    def put(self, start: int, values: Float32) -> None:
        codec, rest = self._codec, values.size % self._codec.block
        stop = start + values.size - rest
        scales = self._scales[start // codec.block : stop // codec.block]
        codes = self._codes[start * codec.bits // 8 : stop * codec.bits // 8]
        codec.encode_slab(values[: values.size - rest], scales, codes)
        if rest:
            padded = np.zeros(codec.block, np.float32)
            padded[:rest] = values[values.size - rest :]
            tail = np.empty(codec.block * codec.bits // 8, np.uint8)
            codec.encode_slab(padded, self._scales[-1:], tail)
            left = self._codes[stop * codec.bits // 8 :]
            left[:] = tail[: left.size]

    def result(self) -> bytearray:
        return self._out


def _pack(q: Float32, bits: int, codes: Bytes) -> None:
    """Write whole bytes of codes, which are integers in float32."""
    if bits == 8:
        np.copyto(codes.view(np.int8), q, casting="unsafe")
        return
    pairs = q.astype(np.int8).view("<u2")
    np.bitwise_or(pairs & 0x0F, pairs >> 4 & 0xF0, out=codes, casting="unsafe")


def _blocks(numel: int, block: int) -> int:
    return _ceil_div(numel, block)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


INT8 = Blockwise(bits=8, block=256)
INT4 = Blockwise(bits=4, block=64)
