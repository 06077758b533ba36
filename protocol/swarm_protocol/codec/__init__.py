"""How a vector of float32 travels: named codecs, `none`, `int8` and `int4`.

A codec belongs to the exact domain. `encode` gives the same bytes on every machine, `decode` the same float32 bits, both
by single float32 operations. Bits without a meaning (a code or a sign that no encoder writes, padding) are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from swarm_protocol.codec import blockwise, raw

Float32 = npt.NDArray[np.float32]
Name = Literal["none", "int8", "int4"]


@dataclass(frozen=True)
class Codec:
    """An entry of the registry.

    `encoded_bytes(numel)` is the exact length of the encoding of that many elements.
    `encode(values)` takes float32[numel]. It raises `InvalidDataError` where a value is not finite.
    `decode(data, numel)` returns float32[numel], all finite. It raises `InvalidDataError` where the length is wrong, which
    it looks at before it allocates, and where the bytes are not canonical.
    """

    name: Name
    encoded_bytes: Callable[[int], int]
    encode: Callable[[Float32], bytes]
    decode: Callable[[bytes | bytearray | memoryview, int], Float32]


_CODECS: dict[Name, Codec] = {
    "none": Codec("none", raw.encoded_bytes, raw.encode, raw.decode),
    "int8": Codec("int8", blockwise.INT8.encoded_bytes, blockwise.INT8.encode, blockwise.INT8.decode),
    "int4": Codec("int4", blockwise.INT4.encoded_bytes, blockwise.INT4.encode, blockwise.INT4.decode),
}


def get(name: Name) -> Codec:
    """The codec that a run's spec names."""
    return _CODECS[name]
