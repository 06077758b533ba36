"""Messages between peers: whatever bytes come, they are a message within its bounds or an error."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_protocol import encoding
from swarm_protocol.calls import (
    LENGTHS,
    MAX_HEADER_BYTES,
    MAX_PEERS_COUNTED,
    Traffic,
    pack,
    unpack_header,
    unpack_lengths,
)
from swarm_protocol.direct import MAX_ADDRESSES, parse_addresses
from swarm_protocol.errors import EncodingError, InvalidDataError

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 63) - 1) | st.text(max_size=8) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
headers = st.dictionaries(st.text(max_size=8), values, max_size=5)


@given(header=headers, size=st.integers(0, (1 << 64) - 1))
def test_a_header_arrives_as_it_was_sent(header: dict[str, encoding.Value], size: int) -> None:
    raw = pack(header, size)
    length, declared = unpack_lengths(raw[: LENGTHS.size])
    assert declared == size
    assert length == len(raw) - LENGTHS.size
    assert unpack_header(raw[LENGTHS.size :]) == header


@given(raw=st.binary(max_size=20))
def test_any_bytes_are_lengths_within_bounds_or_an_error(raw: bytes) -> None:
    try:
        length, size = unpack_lengths(raw)
    except EncodingError:
        assert len(raw) != LENGTHS.size or int.from_bytes(raw[:4], "little") > MAX_HEADER_BYTES
    else:
        assert LENGTHS.pack(length, size) == raw


@given(raw=st.binary(max_size=200) | values.map(encoding.encode))
def test_any_bytes_are_a_canonical_header_or_an_error(raw: bytes) -> None:
    try:
        header = unpack_header(raw)
    except EncodingError:
        return
    assert encoding.encode(header) == raw


@given(header=headers, flip=st.integers(0, 10_000))
def test_a_changed_bit_is_never_the_same_header(header: dict[str, encoding.Value], flip: int) -> None:
    raw = bytearray(pack(header, 0)[LENGTHS.size :])
    raw[flip // 8 % len(raw)] ^= 1 << flip % 8
    with contextlib.suppress(EncodingError):
        assert unpack_header(raw) != header


def test_a_header_beyond_its_bound_is_not_sent() -> None:
    with pytest.raises(EncodingError, match="at most 65536"):
        pack({"text": "x" * MAX_HEADER_BYTES}, 0)


@given(value=values)
def test_any_value_is_a_list_of_addresses_or_an_error(value: encoding.Value) -> None:
    try:
        found = parse_addresses(value)
    except InvalidDataError:
        return
    assert len(found) <= MAX_ADDRESSES
    assert all(0 < port < 1 << 16 for _, port in found)


def test_addresses_are_ip_addresses_and_ports() -> None:
    assert parse_addresses([["127.0.0.1", 80], ["::1", 65535]]) == [("127.0.0.1", 80), ("::1", 65535)]
    for wrong in (["localhost", 80], ["127.0.0.1", 0], ["127.0.0.1", 65536], ["127.0.0.1"], "127.0.0.1", 7):
        with pytest.raises(InvalidDataError, match="address"):
            parse_addresses([wrong])
    with pytest.raises(InvalidDataError, match="up to 8"):
        parse_addresses([["127.0.0.1", 80]] * 9)


def test_traffic_is_counted_by_peer_and_by_path_within_bounds() -> None:
    traffic = Traffic()
    traffic.note(b"a", "direct", sent=3)
    traffic.note(b"a", "direct", received=4)
    traffic.note(b"a", "daemon", sent=5)
    assert traffic.by_peer == {(b"a", "direct"): [3, 4], (b"a", "daemon"): [5, 0]}
    for number in range(2 * MAX_PEERS_COUNTED):
        traffic.note(number.to_bytes(4, "little"), "direct", sent=1)
    assert len(traffic.by_peer) == MAX_PEERS_COUNTED
    assert (traffic.sent, traffic.received) == (8 + 2 * MAX_PEERS_COUNTED, 4)
