"""Getting back what the object store has lost: from volunteers, who hold the newest checkpoint, recent averages and data.

Everything is asked for by its hash and checked before it is stored. What nobody has is said; the run goes on as far as it can
without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable

from swarm_coordinator.store import Store
from swarm_protocol.catching_up import CatchUp
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.chunks import CHUNK_BYTES, StateManifest, content_hash
from swarm_protocol.client import MAX_CHUNK_BYTES, CoordinatorClient
from swarm_protocol.data import DatasetManifest
from swarm_protocol.errors import InvalidDataError, RefusedError, SwarmError, UnreachableError
from swarm_protocol.identity import public_key_of
from swarm_protocol.layout import checkpoint_bytes, layout
from swarm_protocol.peers import PeerPlane

log = logging.getLogger(__name__)

CALL_S = 30.0
RETRY_S = 2.0
LONGEST_RETRY_S = 30.0
ATTEMPTS = 40
ASKED = 64
AT_ONCE = 4


class Restoring:
    """One run's objects, put back by the checkpoint worker. Who holds `storing` may store checkpoints."""

    def __init__(
        self, client: CoordinatorClient, plane: PeerPlane, store: Store, storing: asyncio.Lock | None = None
    ) -> None:
        self._client = client
        self._spec = client.spec
        self._plane = plane
        self._store = store
        self._storing = asyncio.Lock() if storing is None else storing
        self._catching_up = CatchUp(client, plane, whole=self._whole, find=store.get)
        self._peers: list[bytes] = []
        self._intact = b""
        self._missed: set[bytes] = set()

    async def checkpoint(self, round_number: int, root: bytes) -> Checkpoint:
        """A checkpoint, from the store, from what it can be made of, or from volunteers; it is whole in the store then.

        Where nobody who is here has it, this waits for somebody who does.
        """
        pause_s = RETRY_S
        while True:
            await self._find_peers(round_number)
            try:
                found = await self._catching_up.checkpoint(round_number, root)
                break
            except UnreachableError as error:
                log.info("checkpoint %d: %s", round_number, error)
            except (RefusedError, InvalidDataError) as error:
                log.error(
                    "checkpoint %d (%s) is not in the object store, and none of %d volunteers has it; asking again: %s",
                    round_number, root.hex()[:12], len(self._peers), error,
                )  # fmt: skip
            await asyncio.sleep(pause_s)
            pause_s = min(LONGEST_RETRY_S, 1.5 * pause_s)
        if self._intact != root:
            await self._put(found)
        return found

    async def _put(self, checkpoint: Checkpoint) -> None:
        async with self._storing:
            await asyncio.to_thread(self._store.put_state, *checkpoint.buffers)
        root = checkpoint.root.hex()[:12]
        log.warning("checkpoint %d (%s) is whole in the object store again", checkpoint.round, root)

    async def rest(self, round_number: int) -> None:
        """Put back what else is missing, as far as somebody comes who has it.

        That is the layout, the data, recent averages, and the checkpoint before this one: audits of the last round need it.
        """
        document = layout(self._spec)
        await asyncio.to_thread(self._store.put, content_hash(document), document)
        pause_s, said = RETRY_S, 0
        for _ in range(ATTEMPTS):
            try:
                await self._find_peers(round_number)
                missing = await self._restore(round_number)
            except SwarmError as error:
                log.info("what the object store lacks is not known yet: %s", error)
            else:
                if not missing:
                    return
                if len(missing) != said:
                    log.error(
                        "the object store lacks %d blobs that no volunteer has: %s", len(missing), _named(missing)
                    )
                    said = len(missing)
            await asyncio.sleep(pause_s)
            pause_s = min(LONGEST_RETRY_S, 1.5 * pause_s)
        log.error("what the object store lacks is asked for no more; restore it from a backup, or start again later")

    async def _restore(self, round_number: int) -> dict[bytes, str]:
        """One attempt; what is still missing, with what it is."""
        await self._restore_before(round_number)
        there = set(await asyncio.to_thread(self._store.listed))
        missing: dict[bytes, str] = {}
        for digest, what in (*self._data(), *(await self._averages(round_number))):
            if digest not in there and not await self._fetched(digest, what):
                missing[digest] = what
        root = bytes.fromhex(self._spec.data.root)
        if root in missing:
            return missing
        raw = await asyncio.to_thread(self._store.get, root)
        assert raw is not None
        dataset = DatasetManifest.decode(raw)
        shards = [(shard.hash, "a shard") for shard in (*dataset.train, *dataset.held_out)]
        gate = asyncio.Semaphore(AT_ONCE)

        async def shard(digest: bytes, what: str) -> None:
            async with gate:
                if digest not in there and not await self._fetched(digest, what):
                    missing[digest] = what

        await asyncio.gather(*(shard(*one) for one in shards))
        return missing

    async def _restore_before(self, round_number: int) -> None:
        """The checkpoint before this one, if it is lost and a volunteer still keeps it."""
        plan = await self._client.plan(round_number - 1) if round_number else None
        if plan is None or plan.base in await asyncio.to_thread(self._store.states):
            return
        try:
            before = await self._whole(plan.round, plan.base)
        except (RefusedError, InvalidDataError) as error:
            log.info("checkpoint %d does not come back: %s", plan.round, error)
        else:
            await self._put(before)

    def _data(self) -> list[tuple[bytes, str]]:
        """What the spec names by hash."""
        data, tolerances = self._spec.data, self._spec.audit.tolerance_file
        found = [(bytes.fromhex(data.root), "the dataset's manifest")]
        if data.tokenizer != "bytes":
            found.append((bytes.fromhex(data.tokenizer), "the tokenizer"))
        if tolerances is not None:
            found.append((bytes.fromhex(tolerances), "the tolerances"))
        return found

    async def _averages(self, round_number: int) -> list[tuple[bytes, str]]:
        """The averages of the rounds that volunteers keep."""
        found = []
        for number in range(max(0, round_number - self._spec.rounds.keep_rounds), round_number):
            plan = await self._client.plan(number)
            sealed = None if plan is None else await self._client.manifest(plan)
            if sealed is not None:
                found += [(one.result, f"an average of round {number}") for one, _ in sealed.part_records.values()]
        return found

    async def _fetched(self, digest: bytes, what: str) -> bool:
        """Have a blob in the store, if any volunteer has it."""
        data = await self._ask(digest, MAX_CHUNK_BYTES)
        if data is None:
            return False
        await asyncio.to_thread(self._store.put, digest, data)
        log.warning("%s, %s, is in the object store again", what, digest.hex()[:12])
        return True

    # Checkpoints

    async def _whole(self, round_number: int, root: bytes) -> Checkpoint:
        """A checkpoint from the store, with what is missing or damaged there from volunteers.

        Raises:
            RefusedError: nobody has all of it.
        """
        raw = await asyncio.to_thread(self._store.get_checkpoint, root)
        manifest = None if raw is None else self._checked(raw, root)
        if manifest is None:
            if root not in self._missed:
                log.error(
                    "checkpoint %d (%s) is not in the object store; asking volunteers", round_number, root.hex()[:12]
                )
            self._missed.add(root)
            manifest = await self._manifest(root)
        pieces = await asyncio.gather(*(asyncio.to_thread(self._stored, one) for one in manifest.hashes))
        lost = sum(piece is None for piece in pieces)
        if lost and raw is not None:
            log.error(
                "the object store lacks %d of %d chunks of checkpoint %d; asking volunteers",
                lost, len(pieces), round_number,
            )  # fmt: skip
        for index, piece in enumerate(pieces):
            if piece is None:
                pieces[index] = await self._ask(manifest.hashes[index], CHUNK_BYTES)
                if pieces[index] is None:
                    raise RefusedError(f"nobody has chunk {index} of checkpoint {round_number}", code="not-found")
        data = b"".join(piece for piece in pieces if piece is not None)
        if raw is not None and not lost:
            self._intact = root
        return await asyncio.to_thread(Checkpoint.from_bytes, self._spec, round_number, data, root)

    def _stored(self, digest: bytes) -> bytes | None:
        """A chunk from the store; one that is damaged is deleted, to be put again. Blocking."""
        data = self._store.get(digest)
        if data is not None and content_hash(data) != digest:
            log.error("the chunk %s in the object store is damaged", digest.hex())
            self._store.discard(digest)
            return None
        return data

    async def _manifest(self, root: bytes) -> StateManifest:
        bound = StateManifest.encoded_bytes(checkpoint_bytes(self._spec))
        for peer in list(self._peers):
            raw = await self._call(peer, {"op": "state", "root": root}, bound)
            manifest = None if raw is None else self._checked(raw, root)
            if manifest is not None:
                return manifest
        raise RefusedError(f"nobody has checkpoint {root.hex()[:12]}", code="not-found")

    def _checked(self, raw: bytes, root: bytes) -> StateManifest | None:
        size_bytes = checkpoint_bytes(self._spec)
        with contextlib.suppress(InvalidDataError):
            manifest = StateManifest.decode(raw, max_size_bytes=size_bytes)
            if (manifest.root, manifest.size_bytes) == (root, size_bytes):
                return manifest
        return None

    # Volunteers

    async def _find_peers(self, round_number: int) -> None:
        """Whom to ask: who was heard of lately, and who had a slot in the last rounds."""
        status = await self._client.status()
        keys: list[bytes] = []
        seen = sorted(status.get("nodes", ()), key=lambda node: -int(node.get("last_seen_ms", 0)))
        for node in seen:
            with contextlib.suppress(InvalidDataError, KeyError, ValueError):
                keys.append(public_key_of(str(node["peer"])))
        for number in range(round_number, max(-1, round_number - self._spec.rounds.keep_rounds - 1), -1):
            with contextlib.suppress(RefusedError):
                plan = await self._client.plan(number)
                keys += [] if plan is None else [seat.peer for seat in plan.roster]
        self._peers = list(dict.fromkeys(keys))[:ASKED]

    async def _ask(self, digest: bytes, max_bytes: int) -> bytes | None:
        """The bytes of a hash, from the first volunteer who has them."""
        for peer in list(self._peers):
            data = await self._call(peer, {"op": "get", "hash": digest}, max_bytes)
            if data is not None and await asyncio.to_thread(content_hash, data) == digest:
                if self._peers[0] != peer and peer in self._peers:  # who had this may have more
                    self._peers.remove(peer)
                    self._peers.insert(0, peer)
                return data
        return None

    async def _call(self, peer: bytes, header: dict[str, bytes | str], max_bytes: int) -> bytes | None:
        try:
            _, data = await self._plane.call(peer, header, max_answer_bytes=max_bytes, timeout_s=CALL_S)
        except UnreachableError as error:
            log.info("a volunteer is not asked any more: %s", error)
            with contextlib.suppress(ValueError):
                self._peers.remove(peer)
        except (RefusedError, InvalidDataError) as error:
            log.debug("a volunteer does not have it: %s", error)
        else:
            return bytes(data)
        return None


def _named(missing: dict[bytes, str]) -> str:
    """The first few, for a message."""
    return ", ".join(_first(f"{what} {digest.hex()}" for digest, what in missing.items()))


def _first(names: Iterable[str], count: int = 3) -> list[str]:
    found = list(names)
    return found[:count] + (["..."] if len(found) > count else [])
