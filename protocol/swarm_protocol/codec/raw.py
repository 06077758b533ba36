"""The codec `none`: the values themselves, little-endian float32."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from swarm_protocol.errors import InvalidDataError

Float32 = npt.NDArray[np.float32]


def encoded_bytes(numel: int) -> int:
    return 4 * numel


def encode(values: Float32) -> bytes:
    """Raises `InvalidDataError` where a value is not finite."""
    if not np.isfinite(values).all():
        raise InvalidDataError("a value to be encoded is not finite")
    return values.astype("<f4", copy=False).tobytes()


def decode(data: bytes | bytearray | memoryview, numel: int) -> Float32:
    """Raises `InvalidDataError` where the length is wrong or a value is not finite."""
    if len(data) != encoded_bytes(numel):
        raise InvalidDataError(f"{len(data)} bytes where {numel} values take {encoded_bytes(numel)}")
    values = np.frombuffer(data, "<f4").astype(np.float32)
    if not np.isfinite(values).all():
        raise InvalidDataError("a value is not finite")
    return values
