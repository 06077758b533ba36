"""Codecs: the same bytes everywhere, small errors, and no bytes without a meaning."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from blake3 import blake3
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from swarm_protocol import codec
from swarm_protocol.codec import blockwise
from swarm_protocol.errors import InvalidDataError

Float32 = npt.NDArray[np.float32]
LARGEST = np.finfo(np.float32).max
NAMES: tuple[codec.Name, ...] = ("none", "int8", "int4")
BLOCKS: dict[codec.Name, tuple[int, int]] = {"int8": (256, 127), "int4": (64, 7)}

every_codec = pytest.mark.parametrize("name", NAMES)
lossy = pytest.mark.parametrize("name", BLOCKS)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
vectors = hnp.arrays(np.float32, st.integers(0, 700), elements=finite, fill=st.just(0.0))


def by_definition(values: Float32, block: int, largest: int) -> tuple[list[np.float32], list[int]]:
    """Scales and codes, one scalar at a time."""
    scales, codes = [], []
    for at in range(0, values.size, block):
        part = values[at : at + block]
        scale = np.float32(max(abs(x) for x in part)) / np.float32(largest)
        scales.append(scale)
        for x in part:
            code = int(np.rint(x / scale)) if scale else 0
            codes.append(max(-largest, min(largest, code)))
    return scales, codes


@lossy
@given(values=vectors)
def test_bytes_are_those_of_the_definition(name: codec.Name, values: Float32) -> None:
    block, largest = BLOCKS[name]
    scales, codes = by_definition(values, block, largest)
    expected = np.array(scales, "<f4").tobytes()
    if name == "int8":
        expected += np.array(codes, np.int8).tobytes()
    else:
        codes += [0] * (len(codes) % 2)
        expected += bytes(low & 15 | (high & 15) << 4 for low, high in zip(codes[::2], codes[1::2], strict=True))
    assert codec.get(name).encode(values) == expected


@every_codec
@given(values=vectors)
def test_what_is_encoded_decodes_finite_and_near(name: codec.Name, values: Float32) -> None:
    chosen = codec.get(name)
    data = chosen.encode(values)
    assert len(data) == chosen.encoded_bytes(values.size)
    decoded = chosen.decode(data, values.size)
    assert decoded.dtype == np.float32
    assert np.isfinite(decoded).all()
    if name == "none":
        assert decoded.tobytes() == values.tobytes()
        return
    block, largest = BLOCKS[name]
    for at in range(0, values.size, block):
        part = values[at : at + block].astype(np.float64)
        half_step = np.abs(part).max() / largest / 2
        smallest = float(np.finfo(np.float32).smallest_subnormal)
        error = np.abs(part - decoded[at : at + block]).max()
        assert error <= half_step * (1 + 1e-5) + largest * smallest


@lossy
def test_rounding_is_half_to_even(name: codec.Name) -> None:
    largest = BLOCKS[name][1]
    values = np.array([largest, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5], np.float32)
    decoded = codec.get(name).decode(codec.get(name).encode(values), values.size)
    assert decoded.tolist() == [largest, 0, 2, 2, 0, -2, -2]


@every_codec
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 255, 257, (1 << 15) + 1, 100_003])
def test_any_length_goes_there_and_back(name: codec.Name, size: int) -> None:
    values = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    chosen = codec.get(name)
    decoded = chosen.decode(chosen.encode(values), size)
    assert decoded.shape == (size,)
    np.testing.assert_allclose(decoded, values, atol=0 if name == "none" else 0.5)


@lossy
def test_extreme_magnitudes_stay_finite(name: codec.Name) -> None:
    chosen = codec.get(name)
    for peak in (
        LARGEST,
        np.nextafter(LARGEST, np.float32(0)),
        np.float32(1e-45),
        np.float32(1e-44),
        np.float32(1e-38),
    ):
        values = np.array([peak, -peak, peak / 2, 0.0, -0.0], np.float32)
        decoded = chosen.decode(chosen.encode(values), 5)
        assert np.abs(decoded.astype(np.float64)).max() <= LARGEST
        assert decoded[0] == -decoded[1]


@lossy
def test_zeros_of_either_sign_encode_as_zero_bytes(name: codec.Name) -> None:
    chosen = codec.get(name)
    for pattern in ([0.0], [-0.0], [0.0, -0.0], [-0.0, 0.0]):
        values = np.array(pattern * (600 // len(pattern)), np.float32)
        assert not any(chosen.encode(values))


@every_codec
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 70, 299])
def test_what_is_not_finite_is_not_encoded(name: codec.Name, bad: float, at: int) -> None:
    values = np.ones(300, np.float32)
    values[at] = bad
    with pytest.raises(InvalidDataError, match="not finite"):
        codec.get(name).encode(values)


@every_codec
@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_length_is_refused_before_anything_is_allocated(name: codec.Name, change: int) -> None:
    chosen = codec.get(name)
    with pytest.raises(InvalidDataError, match="bytes where"):
        chosen.decode(bytes(chosen.encoded_bytes(100) + change), 100)
    with pytest.raises(InvalidDataError, match="bytes where"):
        chosen.decode(b"", 1 << 60)


@lossy
@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0, -0.0])
def test_a_scale_that_no_encoder_writes_is_refused(name: codec.Name, scale: float) -> None:
    chosen = codec.get(name)
    data = bytearray(chosen.encoded_bytes(10))
    data[:4] = np.array([scale], "<f4").tobytes()
    with pytest.raises(InvalidDataError, match="scale"):
        chosen.decode(bytes(data), 10)


@pytest.mark.parametrize(("name", "byte"), [("int8", 0x80), ("int4", 0x08), ("int4", 0x80)])
@pytest.mark.parametrize("size", [4096, 5])
def test_the_code_without_a_positive_twin_is_refused(name: codec.Name, byte: int, size: int) -> None:
    chosen = codec.get(name)
    data = bytearray(chosen.encoded_bytes(size))
    data[4 * -(-size // BLOCKS[name][0]) + 1] = byte
    with pytest.raises(InvalidDataError, match="not used"):
        chosen.decode(bytes(data), size)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_padding_must_be_zero(scale: float) -> None:
    int4 = codec.get("int4")
    data = bytearray(np.array([scale], "<f4").tobytes() + bytes([0x11, 0x21]))
    with pytest.raises(InvalidDataError, match="unused half"):
        int4.decode(bytes(data), 3)
    data[-1] = 0x02
    assert int4.decode(bytes(data), 3).tolist() == [scale, scale, 2 * scale]


@every_codec
def test_decoding_an_encoding_and_encoding_it_again_changes_no_value(name: codec.Name) -> None:
    chosen = codec.get(name)
    values = np.random.default_rng(5).standard_normal(1000).astype(np.float32)
    once = chosen.decode(chosen.encode(values), 1000)
    twice = chosen.decode(chosen.encode(once), 1000)
    np.testing.assert_allclose(twice, once, rtol=1e-6)


@lossy
def test_slabs_change_no_bit(name: codec.Name, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(6).standard_normal(5000).astype(np.float32)
    data = codec.get(name).encode(values)
    decoded = codec.get(name).decode(data, 5000)
    monkeypatch.setattr(blockwise, "_SLAB_ELEMENTS", 512)
    assert codec.get(name).encode(values) == data
    assert codec.get(name).decode(data, 5000).tobytes() == decoded.tobytes()


def test_the_bytes_are_pinned(golden: Callable[[str, dict[str, object]], None]) -> None:
    small = np.array([0.1, -0.25, 3.5, -7.0, 0.5, 1e-3, -1e-3, 6.9], np.float32)
    ramp = ((np.arange(1000, dtype=np.int64) * 7919 % 2003 - 1001) * np.float32(2.0**-12)).astype(np.float32)
    found: dict[str, object] = {}
    for name in NAMES:
        chosen = codec.get(name)
        data = chosen.encode(ramp)
        found[name] = {
            "small": chosen.encode(small).hex(),
            "ramp encoded, blake3": blake3(data).hexdigest(),
            "ramp decoded, blake3": blake3(chosen.decode(data, 1000).astype("<f4").tobytes()).hexdigest(),
        }
    golden("codec", found)


@every_codec
@given(values=vectors, cuts=st.sets(st.integers(1, 2)))
def test_pieces_give_the_bytes_and_values_of_the_whole(name: codec.Name, values: Float32, cuts: set[int]) -> None:
    entry = codec.get(name)
    starts = sorted({0, *(cut * codec.PIECE_ELEMENTS for cut in cuts if cut * codec.PIECE_ELEMENTS < values.size)})
    pieces = list(zip(starts, [*starts[1:], values.size], strict=True))
    writing, whole = entry.write(values.size), entry.encode(values)
    for start, stop in pieces:
        writing.put(start, values[start:stop])
    assert writing.result() == whole
    out = np.full(values.size, 7, np.float32)
    reading = entry.read(whole, values.size)
    for start, stop in reversed(pieces):
        reading.values(start, out[start:stop])
    assert out.tobytes() == entry.decode(whole, values.size).tobytes()


@example(data=b"\x01\x00\x00\x01\x07", numel=1, name="int4")
@given(data=st.binary(max_size=700), numel=st.integers(0, 600), name=st.sampled_from(["none", "int8", "int4"]))
def test_a_peak_is_refused_exactly_where_decoding_is_and_bounds_what_is_decoded(
    data: bytes, numel: int, name: codec.Name
) -> None:
    entry = codec.get(name)
    data = data.ljust(entry.encoded_bytes(numel), b"\x01")[: entry.encoded_bytes(numel)]
    try:
        decoded = entry.decode(data, numel)
    except InvalidDataError:
        with pytest.raises(InvalidDataError):
            entry.peak(data, numel)
        return
    assert float(np.abs(decoded).max(initial=0.0)) <= entry.peak(data, numel)
    out = np.full(numel, 7, np.float32)
    assert entry.decode(data, numel, out) is out
    assert out.tobytes() == decoded.tobytes()
