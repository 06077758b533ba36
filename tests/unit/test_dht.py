"""What a peer's DHT process lets in, and what is read out of it."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from typing import Any, NamedTuple

import msgpack
import pytest

from swarm_protocol import dht
from swarm_protocol.dht import Directory, Guard
from swarm_protocol.identity import Identity
from swarm_protocol.records import Addresses, Envelope, Holding

RUN, ROOT = bytes([1]) * 32, bytes([2]) * 32
ALICE = Identity.from_seed(bytes([3]) * 32)


class Record(NamedTuple):
    """As hivemind's `DHTRecord`."""

    key: bytes
    subkey: bytes
    value: bytes
    expiration_time: float


class Entry(NamedTuple):
    value: object
    expiration_time: float


class Values:
    """hivemind's DHT, with these values by key."""

    def __init__(self, values: dict[str, object]) -> None:
        self.values = values
        self.stored: list[tuple[str, object]] = []

    def get(self, key: str, **_: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(Entry(self.values[key], 0.0) if key in self.values else None)
        return done

    def store(self, key: str, value: object, expiration: float, *, subkey: object, return_future: bool) -> Future[bool]:
        self.stored.append((key, subkey))
        done: Future[bool] = Future()
        done.set_result(True)
        return done


def holding(identity: Identity, *, run: bytes = RUN, root: bytes = ROOT) -> bytes:
    return Envelope.sign(identity, Holding(run=run, round=3, sequence=1 << 40, root=root)).encode()


def identities(count: int) -> list[Identity]:
    return [Identity.from_seed(number.to_bytes(32, "big")) for number in range(count)]


def entered(value: object, *, subkey: object = ALICE.public_key, key: bytes = b"key", ttl_s: float = 60.0) -> bool:
    """Whether a new guard lets this in."""
    return admitted(Guard(RUN, msgpack.loads), value, subkey=subkey, key=key, ttl_s=ttl_s)


def admitted(guard: Guard, value: object, *, subkey: object, key: bytes = b"key", ttl_s: float = 60.0) -> bool:
    return guard.validate(Record(key, msgpack.dumps(subkey), msgpack.dumps(value), time.time() + ttl_s))


def test_a_holding_that_its_subkey_signed_is_let_in() -> None:
    assert entered(holding(ALICE))


@pytest.mark.parametrize(
    "value",
    [
        holding(Identity.generate()),
        holding(ALICE, run=bytes(32)),
        holding(ALICE)[:-1] + bytes([holding(ALICE)[-1] ^ 1]),
        Envelope.sign(ALICE, Addresses(run=RUN, round=0, multiaddrs=("/ip4/127.0.0.1/tcp/1",))).encode(),
        b"",
        b"garbage" * 40,
        b"x" * 600,
        "text",
        7,
        {"a": 1},
    ],
)
def test_anything_else_under_a_subkey_is_not(value: object) -> None:
    assert not entered(value)


def test_subkeys_are_keys() -> None:
    assert not any(entered(holding(ALICE), subkey=subkey) for subkey in (b"", "text", 7, bytes(32)))


def test_plain_values_are_let_in_up_to_a_size() -> None:
    assert entered(b"x" * 1000, subkey=None)
    assert not entered(b"x" * dht.MAX_VALUE_BYTES, subkey=None)


def test_nothing_stays_for_ever() -> None:
    assert not entered(holding(ALICE), ttl_s=2 * dht.MAX_TTL_S)
    assert not entered(b"x", subkey=None, ttl_s=2 * dht.MAX_TTL_S)


def test_a_dictionary_does_not_grow_beyond_what_the_dht_carries() -> None:
    guard, crowd = Guard(RUN, msgpack.loads), identities(dht.MAX_SUBKEYS + 1)
    inside = [admitted(guard, holding(one), subkey=one.public_key) for one in crowd]
    assert inside == [True] * dht.MAX_SUBKEYS + [False]
    assert admitted(guard, holding(crowd[0]), subkey=crowd[0].public_key), "who is inside may stay"
    assert admitted(guard, holding(crowd[-1]), subkey=crowd[-1].public_key, key=b"another key")
    assert dht.MAX_SUBKEYS * (len(holding(ALICE)) + 60) < 16_000


def test_room_is_free_again_when_entries_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    guard, crowd = Guard(RUN, msgpack.loads), identities(dht.MAX_SUBKEYS + 1)
    for one in crowd[:-1]:
        assert admitted(guard, holding(one), subkey=one.public_key, ttl_s=60)
    later = time.time() + 61
    monkeypatch.setattr(time, "time", lambda: later)
    assert admitted(guard, holding(crowd[-1]), subkey=crowd[-1].public_key)


def directory(identity: Identity, values: dict[str, object]) -> tuple[Directory, Values]:
    kept = Values(values)
    return Directory(kept, RUN, identity.public_key), kept


def bucketed(*peers: Identity) -> dict[str, object]:
    """The dictionaries that these peers would have made."""
    reader, _ = directory(ALICE, {})
    found: dict[str, Any] = {}
    for one in peers:
        key = reader.holders_key(ROOT, reader.bucket(ROOT, one.public_key))
        found.setdefault(key, {})[one.public_key] = Entry(holding(one), 0.0)
    return found


def test_holders_are_a_few_at_random_and_never_ourselves() -> None:
    crowd = identities(40)
    reader, _ = directory(crowd[0], bucketed(*crowd))
    found = [asyncio.run(reader.holders(ROOT, 8)) for _ in range(20)]
    assert all(len(set(keys)) == 8 for keys in found)
    everybody = set().union(*found)
    assert len(everybody) > 25
    assert crowd[0].public_key not in everybody
    assert len(asyncio.run(reader.holders(ROOT, 100))) == 39


def test_entries_that_are_forged_or_garbage_are_ignored() -> None:
    honest, forger = identities(2)
    values = bucketed(honest)
    [(key, entries)] = values.items()
    assert isinstance(entries, dict)
    victim = Identity.generate().public_key
    entries |= {
        victim: Entry(holding(forger), 0.0),
        forger.public_key: Entry(holding(forger, root=bytes(32)), 0.0),
        b"short": Entry(b"garbage", 0.0),
        "text": Entry(holding(forger), 0.0),
        7: 8,
        b"big": Entry(bytes(1 << 20), 0.0),
    }
    reader, _ = directory(ALICE, values)
    assert asyncio.run(reader.holders(ROOT, 8)) == [honest.public_key]
    for garbage in (b"value", "text", 7, None, [1]):
        reader, _ = directory(ALICE, {key: garbage})
        assert asyncio.run(reader.holders(ROOT, 8)) == []


def test_a_peer_stays_out_where_enough_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dht, "ENOUGH", 2)
    crowd = identities(60)
    full, kept = directory(crowd[0], bucketed(*crowd[1:]))
    assert not asyncio.run(full.hold(ROOT, Envelope.decode(holding(crowd[0]))))
    assert not kept.stored
    free, kept = directory(crowd[0], bucketed(crowd[0]))
    assert asyncio.run(free.hold(ROOT, Envelope.decode(holding(crowd[0]))))
    assert kept.stored == [(free.holders_key(ROOT, free.bucket(ROOT, crowd[0].public_key)), crowd[0].public_key)]
