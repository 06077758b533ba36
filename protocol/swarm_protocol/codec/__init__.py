"""How a vector of float32 travels: named codecs, `none`, `int8` and `int4`.

A codec belongs to the exact domain. `encode` gives the same bytes on every machine, `decode` the same float32 bits, both
by single float32 operations. Bits without a meaning (a code or a sign that no encoder writes, padding) are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from swarm_protocol.codec import raw
from swarm_protocol.codec.blockwise import INT4, INT8

Float32 = npt.NDArray[np.float32]
Name = Literal["none", "int8", "int4"]


Bytes = bytes | bytearray | memoryview


class Decode(Protocol):
    def __call__(self, data: Bytes, numel: int, out: Float32 | None = None) -> Float32: ...


class Reading(Protocol):
    """An encoding whose length and outer form were looked at, to be decoded piece by piece."""

    def values(self, start: int, out: Float32) -> None:
        """Decode the elements from `start` on, a multiple of `PIECE_ELEMENTS`, as many as `out` has: a multiple, or the rest.

        Raises:
            InvalidDataError: these elements are not canonical, or not finite.
        """


class Writing(Protocol):
    """An encoding that is made piece by piece."""

    def put(self, start: int, values: Float32) -> None:
        """Encode the elements from `start` on, sized as those of `Reading.values`. Raises as `Codec.encode` does."""

    def result(self) -> bytearray:
        """The encoding, once every element was put."""


@dataclass(frozen=True)
class Codec:
    """An entry of the registry.

    `encoded_bytes(numel)` is the exact length of the encoding of that many elements.
    `encode(values)` takes float32[numel]. It raises `InvalidDataError` where a value is not finite.
    `decode(data, numel, out)` returns float32[numel], all finite, in `out` where that is given. It raises `InvalidDataError`
    where the length is wrong, which it looks at before it allocates, and where the bytes are not canonical.
    `read(data, numel)` and `write(numel)` do the same piece by piece.
    `peak(data, numel)` is an upper bound of the magnitudes that `decode` would give, for a fraction of its cost. It raises
    exactly where `decode` does.
    """

    name: Name
    encoded_bytes: Callable[[int], int]
    encode: Callable[[Float32], bytes]
    decode: Decode
    peak: Callable[[Bytes, int], float]
    read: Callable[[Bytes, int], Reading]
    write: Callable[[int], Writing]


PIECE_ELEMENTS = 256
"""A multiple of every codec's block, so that a piece of this many elements is encoded by itself."""

_CODECS: dict[Name, Codec] = {
    "none": Codec("none", raw.encoded_bytes, raw.encode, raw.decode, raw.peak, raw.Reading, raw.Writing),
    "int8": Codec("int8", INT8.encoded_bytes, INT8.encode, INT8.decode, INT8.peak, INT8.read, INT8.write),
    "int4": Codec("int4", INT4.encoded_bytes, INT4.encode, INT4.decode, INT4.peak, INT4.read, INT4.write),
}


def get(name: Name) -> Codec:
    """The codec that a run's spec names."""
    return _CODECS[name]
