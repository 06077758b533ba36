"""What peers tell each other through the DHT: where each can be dialled, and who has which checkpoint.

Values are small, because hivemind's DHT hangs on large ones, and signed, because anybody can store anything. Addresses are
one value per peer. Who has a checkpoint is a dictionary under (run, root, bucket), with peers' keys as subkeys, in a few
buckets: a peer whose bucket is full of others does not add itself, so none grows beyond what the DHT carries. `Guard` runs
in every peer's DHT process: what is too large, unsigned, or too much is neither stored nor passed on.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Mapping
from typing import Any

from blake3 import blake3

from swarm_protocol.calls import MAX_HEADER_BYTES
from swarm_protocol.errors import InvalidDataError, UnreachableError
from swarm_protocol.identity import peer_id
from swarm_protocol.records import Addresses, Envelope, Holding

log = logging.getLogger(__name__)

TTL_S = 600.0
HOLDING_TTL_S = 300.0
BUCKETS = 8
ENOUGH = 24
"""Peers in a bucket after which further ones stay out."""

MAX_VALUE_BYTES = 1 << 14
MAX_SIGNED_BYTES = 512
MAX_SUBKEYS = 32
MAX_TTL_S = 3600.0
_NO_SUBKEY = b"\xc0"


class Directory:
    """One peer's way into the DHT of a run."""

    def __init__(self, dht: Any, run: bytes, key: bytes) -> None:
        self._dht = dht
        self._run = run
        self._key = key

    async def announce(self, envelope: Envelope, timeout_s: float = 10.0) -> None:
        """Store our signed `Addresses`. Raises `UnreachableError`."""
        await self._store(self.addresses_key(self._key), envelope.encode(), TTL_S, timeout_s)

    async def lookup(self, peer: bytes, timeout_s: float = 5.0) -> list[str]:
        """The addresses that this peer announced and signed, or none."""
        value = await self._get(self.addresses_key(peer), timeout_s)
        if not isinstance(value, bytes) or len(value) > MAX_HEADER_BYTES:
            return []
        try:
            record = Envelope.decode(value).open_as(Addresses, run=self._run, key=peer)
        except InvalidDataError as error:
            log.warning("the DHT holds addresses of %s that are not its own: %s", peer_id(peer), error)
            return []
        return list(record.multiaddrs)

    async def hold(self, root: bytes, envelope: Envelope, timeout_s: float = 10.0) -> bool:
        """Store our signed `Holding` of this root, unless enough others are in our bucket.

        Raises:
            UnreachableError
        """
        bucket = self.bucket(root, self._key)
        others = await self._holders(root, bucket, timeout_s)
        if len(others - {self._key}) >= ENOUGH:
            return False
        await self._store(self.holders_key(root, bucket), envelope.encode(), HOLDING_TTL_S, timeout_s, self._key)
        return True

    async def holders(self, root: bytes, count: int, timeout_s: float = 5.0) -> list[bytes]:
        """Keys of up to `count` other peers, at random, who say that they have this checkpoint."""
        found = await asyncio.gather(*(self._holders(root, bucket, timeout_s) for bucket in range(BUCKETS)))
        keys = set().union(*found) - {self._key}
        return random.sample(sorted(keys), min(count, len(keys)))

    async def _holders(self, root: bytes, bucket: int, timeout_s: float) -> set[bytes]:
        """Who is in a bucket by a signature of its own; anything else in it is ignored."""
        value = await self._get(self.holders_key(root, bucket), timeout_s)
        keys: set[bytes] = set()
        for key, entry in list(value.items())[: 2 * MAX_SUBKEYS] if isinstance(value, Mapping) else ():
            signed = getattr(entry, "value", None)
            if not isinstance(key, bytes) or not isinstance(signed, bytes) or len(signed) > MAX_SIGNED_BYTES:
                continue
            try:
                record = Envelope.decode(signed).open_as(Holding, run=self._run, key=key)
            except InvalidDataError as error:
                log.info("an entry of the DHT is no holding: %s", error)
                continue
            if record.root == root and self.bucket(root, key) == bucket:
                keys.add(key)
        return keys

    async def _store(self, key: str, value: bytes, ttl_s: float, timeout_s: float, subkey: bytes | None = None) -> None:
        future = self._dht.store(key, value, time.time() + ttl_s, subkey=subkey, return_future=True)
        try:
            await asyncio.to_thread(future.result, timeout_s)
        except Exception as error:
            raise UnreachableError(f"the DHT does not store what we announce: {error}") from error

    async def _get(self, key: str, timeout_s: float) -> object:
        future = self._dht.get(key, latest=True, return_future=True)
        try:
            found = await asyncio.to_thread(future.result, timeout_s)
        except Exception as error:  # noqa: BLE001  # whatever the DHT process raised
            log.debug("the DHT does not answer: %s", error)
            return None
        return None if found is None else found.value

    def addresses_key(self, peer: bytes) -> str:
        return f"swarm-node/{self._run.hex()[:16]}/addresses/{peer_id(peer)}"

    def holders_key(self, root: bytes, bucket: int) -> str:
        return f"swarm-node/{self._run.hex()[:16]}/holders/{root.hex()}/{bucket}"

    def bucket(self, root: bytes, peer: bytes) -> int:
        return blake3(root + peer).digest()[0] % BUCKETS


class Guard:
    """Which records a peer's DHT process stores and passes on (hivemind's `RecordValidatorBase`, by its methods).

    A value under a subkey is a `Holding` of this run, signed by the subkey's key; a dictionary has up to `MAX_SUBKEYS`; other
    values have up to `MAX_VALUE_BYTES`; nothing outlives `MAX_TTL_S`.
    """

    priority = 0

    def __init__(self, run: bytes, unpack: Any) -> None:
        self._run = run
        self._unpack = unpack
        self._seen: dict[bytes, dict[bytes, float]] = {}

    def validate(self, record: Any) -> bool:
        if len(record.value) > MAX_VALUE_BYTES or record.expiration_time > time.time() + MAX_TTL_S:
            return False
        if record.subkey == _NO_SUBKEY:
            return True
        if len(record.value) > MAX_SIGNED_BYTES:
            return False
        try:
            subkey, value = self._unpack(record.subkey), self._unpack(record.value)
            if not isinstance(subkey, bytes) or not isinstance(value, bytes):
                return False
            Envelope.decode(value).open_as(Holding, run=self._run, key=subkey)
        except Exception:  # noqa: BLE001  # whatever somebody stored
            return False
        return self._has_room(record.key, subkey, record.expiration_time)

    def _has_room(self, key: bytes, subkey: bytes, expiration_time: float) -> bool:
        now = time.time()
        if key not in self._seen:
            self._seen = {one: those for one, those in self._seen.items() if max(those.values()) > now}
        seen = {one: until for one, until in self._seen.get(key, {}).items() if until > now}
        if subkey not in seen and len(seen) >= MAX_SUBKEYS:
            return False
        seen[subkey] = max(expiration_time, seen.get(subkey, 0.0))
        self._seen[key] = seen
        return True

    def sign_value(self, record: Any) -> bytes:
        return bytes(record.value)

    def strip_value(self, record: Any) -> bytes:
        return bytes(record.value)

    def merge_with(self, other: object) -> bool:
        return False
