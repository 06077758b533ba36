"""Deterministic CBOR (RFC 8949, section 4.2.1): one value, one byte string.

The values are those that records are made of: None, booleans, integers of up to 64 bits, finite floats, text, bytes,
lists, and maps with text keys. Everything else in CBOR (tags, indefinite lengths, other simple values) is refused, and so
is any encoding of an allowed value but the canonical one. Declared lengths are checked against the bytes that are there
before anything is allocated, so decoding costs at most a small multiple of its input.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence

from swarm_protocol.errors import EncodingError

Value = None | bool | int | float | str | bytes | Sequence["Value"] | Mapping[str, "Value"]

MAX_BYTES = 1 << 20
MAX_DEPTH = 16

_UINT, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _MAP, _TAG, _SIMPLE = range(8)
_FALSE, _TRUE, _NULL, _F16, _F32, _F64 = 20, 21, 22, 25, 26, 27


def encode(value: object) -> bytes:
    """Encode a value canonically.

    Raises:
        EncodingError: the value holds something that records cannot hold.
    """
    out = bytearray()
    _write(out, value, MAX_DEPTH)
    return bytes(out)


def decode(data: bytes, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH) -> Value:
    """Decode exactly one value that fills `data`.

    Raises:
        EncodingError: too long, too deep, truncated, with bytes left over, or not canonical.
    """
    if len(data) > max_bytes:
        raise EncodingError(f"{len(data)} bytes where at most {max_bytes} are allowed")
    value, end = _read(data, 0, max_depth)
    if end != len(data):
        raise EncodingError(f"{len(data) - end} bytes left over after the value")
    return value


def _head(out: bytearray, major: int, argument: int) -> None:
    if argument < 24:
        out.append(major << 5 | argument)
    elif argument < 1 << 8:
        out += struct.pack(">BB", major << 5 | 24, argument)
    elif argument < 1 << 16:
        out += struct.pack(">BH", major << 5 | 25, argument)
    elif argument < 1 << 32:
        out += struct.pack(">BI", major << 5 | 26, argument)
    else:
        out += struct.pack(">BQ", major << 5 | 27, argument)


def _write(out: bytearray, value: object, depth: int) -> None:
    if depth < 0:
        raise EncodingError(f"nested deeper than {MAX_DEPTH}")
    if value is None:
        out.append(_SIMPLE << 5 | _NULL)
    elif isinstance(value, bool):
        out.append(_SIMPLE << 5 | (_TRUE if value else _FALSE))
    elif isinstance(value, int):
        if not -(1 << 64) <= value < 1 << 64:
            raise EncodingError(f"integer {value} does not fit 64 bits")
        _head(out, _UINT, value) if value >= 0 else _head(out, _NEGATIVE, -1 - value)
    elif isinstance(value, float):
        out += _float_bytes(value)
    elif isinstance(value, bytes | bytearray | memoryview):
        raw = bytes(value)  # a memoryview counts items, not bytes
        _head(out, _BYTES, len(raw))
        out += raw
    elif isinstance(value, str):
        raw = _utf8(value)
        _head(out, _TEXT, len(raw))
        out += raw
    elif isinstance(value, list | tuple):
        _head(out, _ARRAY, len(value))
        for item in value:
            _write(out, item, depth - 1)
    elif isinstance(value, Mapping):
        _head(out, _MAP, len(value))
        for key in value:
            if not isinstance(key, str):
                raise EncodingError(f"map key {key!r} is not text")
        # Among text keys, the bytewise order of the encodings is: shorter first, then by bytes.
        for key in sorted(value, key=lambda k: (len(_utf8(k)), _utf8(k))):
            _write(out, key, depth - 1)
            _write(out, value[key], depth - 1)
    else:
        raise EncodingError(f"{type(value).__name__} has no place in a record")


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise EncodingError("text with a lone surrogate") from error


def _float_bytes(value: float) -> bytes:
    if not math.isfinite(value):
        raise EncodingError("floats in records are finite")
    for code, fmt in ((_F16, ">e"), (_F32, ">f")):
        try:
            packed = struct.pack(fmt, value)
        except OverflowError:
            continue
        if struct.unpack(fmt, packed)[0] == value:
            return bytes([_SIMPLE << 5 | code]) + packed
    return bytes([_SIMPLE << 5 | _F64]) + struct.pack(">d", value)


def _argument(data: bytes, at: int, info: int) -> tuple[int, int]:
    """The argument of a head whose low five bits are `info`, and where the next byte is; shortest form only."""
    if info < 24:
        return info, at
    if info > 27:
        raise EncodingError("indefinite lengths and reserved heads are not canonical")
    width = 1 << (info - 24)
    if at + width > len(data):
        raise EncodingError("truncated")
    value = int.from_bytes(data[at : at + width], "big")
    if value < (24 if width == 1 else 1 << (4 * width)):
        raise EncodingError("not the shortest form of a number")
    return value, at + width


def _read(data: bytes, at: int, depth: int) -> tuple[Value, int]:
    if depth < 0:
        raise EncodingError("nested too deeply")
    if at >= len(data):
        raise EncodingError("truncated")
    major, info = data[at] >> 5, data[at] & 31
    at += 1
    if major == _SIMPLE:
        return _read_simple(data, at, info)
    if major == _TAG:
        raise EncodingError("tags have no place in a record")
    argument, at = _argument(data, at, info)
    if major == _UINT:
        return argument, at
    if major == _NEGATIVE:
        return -1 - argument, at
    # Every item takes at least a byte, so a count beyond what is left is a lie.
    if argument * (2 if major == _MAP else 1) > len(data) - at:
        raise EncodingError("a length beyond the end of the data")
    if major == _BYTES:
        return data[at : at + argument], at + argument
    if major == _TEXT:
        try:
            return data[at : at + argument].decode(), at + argument
        except UnicodeDecodeError as error:
            raise EncodingError("text that is not UTF-8") from error
    if major == _ARRAY:
        items: list[Value] = []
        for _ in range(argument):
            item, at = _read(data, at, depth - 1)
            items.append(item)
        return items, at
    return _read_map(data, at, argument, depth)


def _read_simple(data: bytes, at: int, info: int) -> tuple[Value, int]:
    if info in (_FALSE, _TRUE):
        return info == _TRUE, at
    if info == _NULL:
        return None, at
    formats = {_F16: (">e", 2), _F32: (">f", 4), _F64: (">d", 8)}
    if info not in formats:
        raise EncodingError("a simple value that has no place in a record")
    fmt, width = formats[info]
    if at + width > len(data):
        raise EncodingError("truncated")
    value = float(struct.unpack(fmt, data[at : at + width])[0])
    if _float_bytes(value) != data[at - 1 : at + width]:
        raise EncodingError("not the shortest form of a float")
    return value, at + width


def _read_map(data: bytes, at: int, count: int, depth: int) -> tuple[Value, int]:
    items: dict[str, Value] = {}
    previous = b""
    for index in range(count):
        start = at
        key, at = _read(data, at, depth - 1)
        if not isinstance(key, str):
            raise EncodingError("a map key that is not text")
        if index and data[start:at] <= previous:
            raise EncodingError("map keys out of order, or twice")
        previous = data[start:at]
        items[key], at = _read(data, at, depth - 1)
    return items, at
