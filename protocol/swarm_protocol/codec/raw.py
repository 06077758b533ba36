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
    if not math.isfinite(_largest(values)):
        raise InvalidDataError("a value to be encoded is not finite")
    return values.astype("<f4", copy=False).tobytes()


def decode(data: bytes | bytearray | memoryview, numel: int, out: Float32 | None = None) -> Float32:
    """Raises `InvalidDataError` where the length is wrong or a value is not finite."""
    values = _view(data, numel)
    _require_finite(values)
    if out is None:
        return values.astype(np.float32)
    out[:] = values
    return out


def peak(data: bytes | bytearray | memoryview, numel: int) -> float:
    """The largest magnitude. Raises as `decode` does."""
    return _require_finite(_view(data, numel))


class Reading:
    """See `codec.Reading`."""

    def __init__(self, data: bytes | bytearray | memoryview, numel: int) -> None:
        self._values = _view(data, numel)

    def values(self, start: int, out: Float32) -> None:
        piece = self._values[start : start + out.size]
        _require_finite(piece)
        out[:] = piece


class Writing:
    """See `codec.Writing`."""

    def __init__(self, numel: int) -> None:
        self._out = bytearray(encoded_bytes(numel))
        self._values = np.frombuffer(self._out, "<f4")

    def put(self, start: int, values: Float32) -> None:
        if not math.isfinite(_largest(values)):
            raise InvalidDataError("a value to be encoded is not finite")
        self._values[start : start + values.size] = values

    def result(self) -> bytearray:
        return self._out


def _largest(values: Float32) -> float:
    """The largest magnitude, in two passes without temporaries; a NaN is passed on."""
    return max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)))


def _require_finite(values: Float32) -> float:
    largest = _largest(values)
    if not math.isfinite(largest):
        raise InvalidDataError("a value is not finite")
    return largest


def _view(data: bytes | bytearray | memoryview, numel: int) -> Float32:
    if len(data) != encoded_bytes(numel):
        raise InvalidDataError(f"{len(data)} bytes where {numel} values take {encoded_bytes(numel)}")
    return np.frombuffer(data, "<f4")
