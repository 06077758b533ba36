"""The codec `none`: the values themselves, little-endian float32."""

from __future__ import annotations

import math

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


def decode(data: bytes | bytearray | memoryview, numel: int, out: Float32 | None = None) -> Float32:
    """Raises `InvalidDataError` where the length is wrong or a value is not finite."""
    values = _view(data, numel)
    if not np.isfinite(values).all():
        raise InvalidDataError("a value is not finite")
    if out is None:
        return values.astype(np.float32)
    out[:] = values
    return out


def peak(data: bytes | bytearray | memoryview, numel: int) -> float:
    """The largest magnitude. Raises as `decode` does."""
    values = _view(data, numel)
    largest = max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)))
    if not math.isfinite(largest):
        raise InvalidDataError("a value is not finite")
    return largest


def _view(data: bytes | bytearray | memoryview, numel: int) -> Float32:
    if len(data) != encoded_bytes(numel):
        raise InvalidDataError(f"{len(data)} bytes where {numel} values take {encoded_bytes(numel)}")
    return np.frombuffer(data, "<f4")
