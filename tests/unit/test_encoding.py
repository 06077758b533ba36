"""One value has one encoding, and nothing else is read."""

from __future__ import annotations

import math
import struct
import tracemalloc
from collections.abc import Callable

import cbor2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from swarm_protocol import encoding
from swarm_protocol.errors import EncodingError

# RFC 8949, appendix A: the examples whose values have a place in records, all of them in the preferred encoding.
RFC_EXAMPLES: list[tuple[object, str]] = [
    (0, "00"),
    (1, "01"),
    (10, "0a"),
    (23, "17"),
    (24, "1818"),
    (25, "1819"),
    (100, "1864"),
    (1000, "1903e8"),
    (1000000, "1a000f4240"),
    (1000000000000, "1b000000e8d4a51000"),
    (18446744073709551615, "1bffffffffffffffff"),
    (-18446744073709551616, "3bffffffffffffffff"),
    (-1, "20"),
    (-10, "29"),
    (-100, "3863"),
    (-1000, "3903e7"),
    (0.0, "f90000"),
    (-0.0, "f98000"),
    (1.0, "f93c00"),
    (1.1, "fb3ff199999999999a"),
    (1.5, "f93e00"),
    (65504.0, "f97bff"),
    (100000.0, "fa47c35000"),
    (3.4028234663852886e38, "fa7f7fffff"),
    (1.0e300, "fb7e37e43c8800759c"),
    (5.960464477539063e-8, "f90001"),
    (0.00006103515625, "f90400"),
    (-4.0, "f9c400"),
    (-4.1, "fbc010666666666666"),
    (False, "f4"),
    (True, "f5"),
    (None, "f6"),
    (b"", "40"),
    (bytes.fromhex("01020304"), "4401020304"),
    ("", "60"),
    ("a", "6161"),
    ("IETF", "6449455446"),
    ('"\\', "62225c"),
    ("ü", "62c3bc"),
    ("水", "63e6b0b4"),
    ("\U00010151", "64f0908591"),
    ([], "80"),
    ([1, 2, 3], "83010203"),
    ([1, [2, 3], [4, 5]], "8301820203820405"),
    (list(range(1, 26)), "98190102030405060708090a0b0c0d0e0f101112131415161718181819"),
    ({}, "a0"),
    ({"a": 1, "b": [2, 3]}, "a26161016162820203"),
    (["a", {"b": "c"}], "826161a161626163"),
    ({"a": "A", "b": "B", "c": "C", "d": "D", "e": "E"}, "a56161614161626142616361436164614461656145"),
]

# RFC 8949, appendix A, again: well-formed, and refused.
RFC_REFUSED = {
    "bignum": "c249010000000000000000",
    "negative bignum": "c349010000000000000000",
    "undefined": "f7",
    "simple(16)": "f0",
    "simple(255)": "f8ff",
    "tag": "c074323031332d30332d32315432303a30343a30305a",
    "half infinity": "f97c00",
    "half minus infinity": "f9fc00",
    "half NaN": "f97e00",
    "single infinity": "fa7f800000",
    "single NaN": "fa7fc00000",
    "double infinity": "fb7ff0000000000000",
    "double NaN": "fb7ff8000000000000",
    "integer keys": "a201020304",
    "indefinite bytes": "5f42010243030405ff",
    "indefinite text": "7f657374726561646d696e67ff",
    "indefinite list": "9fff",
    "indefinite map": "bf61610161629f0203ffff",
}

NOT_CANONICAL = {
    "0 in two bytes": "1800",
    "23 in two bytes": "1817",
    "255 in three bytes": "1900ff",
    "65535 in five bytes": "1a0000ffff",
    "2^32-1 in nine bytes": "1b00000000ffffffff",
    "-1 in two bytes": "3800",
    "-24 in two bytes": "3817",
    "a long length of bytes": "580101",
    "a long length of text": "780161",
    "a long length of a list": "980101",
    "a long length of a map": "b801616101",
    "0.0 as single": "fa00000000",
    "1.5 as double": "fb3ff8000000000000",
    "100000.0 as double": "fb40f86a0000000000",
    "keys out of order": "a2616201616102",
    "a shorter key second": "a262616101616202",
    "a key twice": "a2616101616102",
    "bytes as key": "a1416101",
    "a list as key": "a18001",
    "null as key": "a1f601",
    "bytes left over": "0000",
    "nothing": "",
    "a head cut off": "19",
    "an argument cut off": "1903",
    "bytes cut off": "4401",
    "a list cut off": "8201",
    "a map cut off": "a16161",
    "a float cut off": "f93c",
    "text that is not UTF-8": "61ff",
    "text with an encoded surrogate": "63eda080",
    "text with an overlong slash": "62c0af",
    "a reserved head": "1c",
    "a reserved length": "5d",
    "a lone break": "ff",
    "false in two bytes": "f814",
    "a list of 2^64-1": "9bffffffffffffffff",
    "a map of 2^63": "bb8000000000000000",
}

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 64), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.floats(allow_nan=False, allow_infinity=False, width=16)
    | st.text(max_size=40)
    | st.binary(max_size=300)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=30) | st.dictionaries(st.text(max_size=30), inner, max_size=10),
    max_leaves=30,
)


def same(left: object, right: object) -> bool:
    """Equal in type too, and -0.0 is not 0.0."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float) and isinstance(right, float):
        return struct.pack(">d", left) == struct.pack(">d", right)
    return type(left) is type(right) and left == right


@pytest.mark.parametrize(("value", "encoded"), RFC_EXAMPLES)
def test_values_have_the_encodings_of_the_rfc(value: object, encoded: str) -> None:
    assert encoding.encode(value).hex() == encoded
    assert same(encoding.decode(bytes.fromhex(encoded)), value)


def test_the_encoding_is_pinned(golden: Callable[[str, dict[str, object]], None]) -> None:
    value = {
        "text": "θ × 水",
        "zz": [None, False, True, 0, 23, 24, 255, 256, 65535, 65536, 2**32, 2**64 - 1, -1, -24, -25, -(2**64)],
        "floats": [0.0, -0.0, 0.1, 1e-4, 3e-4, 0.95, 65504.0, 65505.0, 2.0**-24, 2.0**-149, 5e-324],
        "bytes": bytes(range(32)),
        "a": {"b": {"aa": 1, "c": 2, "": 3}},
    }
    golden("encoding", {"a nested value": encoding.encode(value).hex()})


@given(values)
def test_every_value_comes_back_as_it_was(value: object) -> None:
    assert same(encoding.decode(encoding.encode(value)), value)


@given(values)
def test_the_encoding_is_that_of_another_canonical_encoder(value: object) -> None:
    assert encoding.encode(value) == cbor2.dumps(value, canonical=True)


@given(st.dictionaries(st.text(max_size=10), st.integers(0, 9)), st.randoms())
def test_the_order_in_which_a_map_was_built_does_not_matter(value: dict[str, int], random: object) -> None:
    keys = list(value)
    random.shuffle(keys)  # type: ignore[attr-defined]
    assert encoding.encode({key: value[key] for key in keys}) == encoding.encode(value)


def test_tuples_are_lists_and_any_buffer_is_bytes() -> None:
    assert encoding.encode((1, (2,))) == encoding.encode([1, [2]])
    raw = struct.pack("<2f", 1.0, 2.0)
    for buffer in (bytearray(raw), memoryview(raw), memoryview(raw).cast("f")):
        assert encoding.encode(buffer) == encoding.encode(raw)


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        1 << 64,
        -(1 << 64) - 1,
        {1: 2},
        {b"a": 1},
        {None: 1},
        {"a": {1, 2}},
        object(),
        1j,
        "\ud800",
        {"\ud800": 1},
    ],
    ids=lambda value: type(value).__name__ if type(value) is object else repr(value),
)
def test_what_has_no_place_in_a_record_is_not_encoded(value: object) -> None:
    with pytest.raises(EncodingError):
        encoding.encode(value)


@pytest.mark.parametrize("encoded", (RFC_REFUSED | NOT_CANONICAL).values(), ids=(RFC_REFUSED | NOT_CANONICAL).keys())
def test_every_other_encoding_is_refused(encoded: str) -> None:
    with pytest.raises(EncodingError):
        encoding.decode(bytes.fromhex(encoded))


@given(st.binary(max_size=200))
@example(b"\xa2\x61\x61\x01\x61\x61\x02")
@example(b"\xfa\x7f\xc0\x00\x00")
def test_any_bytes_are_refused_or_the_one_encoding_of_their_value(data: bytes) -> None:
    try:
        value = encoding.decode(data)
    except EncodingError:
        return
    assert encoding.encode(value) == data


@given(values, st.data())
def test_a_changed_byte_never_makes_a_second_encoding_of_the_same_value(value: object, data: st.DataObject) -> None:
    encoded = bytearray(encoding.encode(value))
    position = data.draw(st.integers(0, len(encoded) - 1))
    encoded[position] ^= data.draw(st.integers(1, 255))
    try:
        changed = encoding.decode(bytes(encoded))
    except EncodingError:
        return
    assert encoding.encode(changed) == encoded
    assert not same(changed, value)


@given(values, st.binary(min_size=1, max_size=4))
def test_bytes_before_the_end_or_beyond_it_are_refused(value: object, more: bytes) -> None:
    encoded = encoding.encode(value)
    for wrong in (encoded[:-1], encoded + more):
        with pytest.raises(EncodingError):
            encoding.decode(wrong)


def nested(levels: int) -> list[object]:
    value: list[object] = []
    for _ in range(levels):
        value = [value]
    return value


def test_depth_is_bounded_on_both_sides() -> None:
    deepest = encoding.encode(nested(encoding.MAX_DEPTH))
    assert encoding.decode(deepest) == nested(encoding.MAX_DEPTH)
    with pytest.raises(EncodingError, match="deep"):
        encoding.encode(nested(encoding.MAX_DEPTH + 1))
    with pytest.raises(EncodingError, match="deep"):
        encoding.decode(b"\x81" + deepest)
    with pytest.raises(EncodingError, match="deep"):
        encoding.decode(b"\x81" * 100_000 + b"\x80")
    with pytest.raises(EncodingError, match="deep"):
        encoding.decode(encoding.encode([[1]]), max_depth=1)


def test_size_is_bounded() -> None:
    largest = encoding.encode(bytes(100))
    assert encoding.decode(largest, max_bytes=len(largest)) == bytes(100)
    with pytest.raises(EncodingError, match="at most 101"):
        encoding.decode(largest, max_bytes=101)
    with pytest.raises(EncodingError, match="at most"):
        encoding.decode(bytes(encoding.MAX_BYTES + 1))


@pytest.mark.parametrize("head", ["5a7fffffff", "7a7fffffff", "9a7fffffff", "ba7fffffff", "9b00000fffffffffff"])
def test_a_length_that_is_a_lie_allocates_nothing(head: str) -> None:
    data = bytes.fromhex(head) + bytes(1000)
    tracemalloc.start()
    try:
        with pytest.raises(EncodingError, match="beyond the end"):
            encoding.decode(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50_000


@pytest.mark.parametrize("data", [b"\x99\xff\xff" + bytes(0xFFFF), b"\x99\xff\xff" + b"\x80" * 0xFFFF])
def test_decoding_costs_a_small_multiple_of_its_input(data: bytes) -> None:
    tracemalloc.start()
    try:
        encoding.decode(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100 * len(data)
