"""A node's share in the sketches of a round: ours signed and served, and the selection that everybody comes to alike.

Only in rounds that need them (`swarm_protocol.sketching`). Once the checkpoint worker has closed the sketches, those that
count are fetched by their hashes and the selection is computed here as well: what the worker signed is compared with it,
not believed. Without a set, or with one that is wrong, there is no selection, and nothing is reduced.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from functools import cached_property

from swarm_node.contribution import Contribution
from swarm_node.evidence import Evidence
from swarm_node.faults import Faults, Point
from swarm_node.folder import RunFolder
from swarm_protocol import chunks, merkle, parts, sketch, sketching
from swarm_protocol.calls import Header
from swarm_protocol.client import Commitments, CoordinatorClient, CountedSketches
from swarm_protocol.errors import InvalidDataError, RefusedError, UnreachableError
from swarm_protocol.http import persist
from swarm_protocol.peers import PeerPlane
from swarm_protocol.records import Envelope, RoundPlan, Sketches
from swarm_protocol.signing import SigningLedger
from swarm_protocol.spec import RunSpec

log = logging.getLogger(__name__)

ATTEMPT_SHARE = 0.1
"""Of the exchange time: how long one fetch may take."""

FETCHES_AT_ONCE = 8
POLL_S = 15.0
RETRY_S = 0.5


@dataclass(frozen=True)
class OwnSketches:
    """What we signed, and the encoded sketches behind it, in the order of parts."""

    envelope: Envelope
    record_hash: bytes
    sketches: tuple[bytes, ...]

    def header(self, part: int) -> Header:
        """What a delivery of this part carries beside it: at most 6 KiB."""
        return {
            "sketch": self.sketches[part],
            "sketch_proof": list(merkle.proof(self._hashes, part)),
            "sketches": self.envelope.encode(),
        }

    @cached_property
    def _hashes(self) -> list[bytes]:
        return [chunks.content_hash(one) for one in self.sketches]


@dataclass(frozen=True)
class Selection:
    """The slots that averages are made of, {slot: weight}, and the hash of the Sketches by which each was selected."""

    weights: dict[int, int]
    sketches: dict[int, bytes]


class Sketching:
    """One node's sketches and selection in one round. `selection` is there once `ready` is set."""

    def __init__(
        self,
        spec: RunSpec,
        plan: RoundPlan,
        commitments: Commitments,
        *,
        plane: PeerPlane,
        client: CoordinatorClient,
        ledger: SigningLedger,
        folder: RunFolder,
        evidence: Evidence,
        faults: Faults,
    ) -> None:
        self._spec = spec
        self._plan = plan
        self._commitments = commitments
        self._plane = plane
        self._client = client
        self._ledger = ledger
        self._folder = folder
        self._evidence = evidence
        self._faults = faults
        self._blobs: dict[int, bytes] = {}
        self.selection: Selection | None = None
        self.ready = asyncio.Event()

    def sign(self, mine: Contribution) -> OwnSketches | None:
        """Sketch our parts, have the bytes where others can get them, and sign. Blocking.

        None if a part of ours is not sound: nobody would take it.
        """
        closing = self._commitments.closing.hash
        encoded = (mine.part(part) for part in range(parts.part_count(self._spec)))
        try:
            sketches = sketching.of_parts(self._spec, closing, encoded)
        except InvalidDataError as error:
            log.warning("our parts of round %d have no sketches: %s", self._plan.round, error)
            return None
        sketches = [bytes(self._faults.tamper(Point.SKETCHING, self._plan.round, one)) for one in sketches]
        blob = b"".join(sketches)
        digest = chunks.content_hash(blob)
        self._keep(digest, blob)
        record = Sketches(
            run=self._spec.run_id,
            round=self._plan.round,
            sequence=mine.slot,
            commitment_set=closing,
            commitment=self._commitments.by_slot[mine.slot].hash,
            slot=mine.slot,
            root=sketch.root(sketches),
            blob=digest,
        )
        return OwnSketches(self._ledger.sign(record), record.hash, tuple(sketches))

    async def publish(self, own: OwnSketches) -> None:
        """Hand our signed sketches in at the coordinator's."""
        try:
            await persist(lambda: self._client.post(own.envelope), deadline_s=self._spec.rounds.exchange_s)
        except (RefusedError, UnreachableError) as error:  # as a rule they were closed without us
            log.info("our sketches of round %d do not count: %s", self._plan.round, error)

    async def follow(self) -> None:
        """Wait for the sketch set, fetch what counts by it, and select."""
        counted = await self._closed()
        gate = asyncio.Semaphore(FETCHES_AT_ONCE)

        async def take(slot: int, record: Sketches) -> None:
            async with gate:
                await self._take(slot, record)

        await asyncio.gather(*(take(slot, record) for slot, record in counted.by_slot.items()))
        found = await asyncio.to_thread(self._select, counted)
        signed = {one.slot: one.weight for one in counted.closing.selected}
        if found != signed:
            log.error(
                "round %d: the checkpoint worker signed the selection %s where the sketches that count give %s;"
                " this node reduces nothing",
                self._plan.round, signed, found,
            )  # fmt: skip
            return
        left_out = sorted(self._commitments.by_slot.keys() - found.keys())
        log.info("round %d: %d slots are selected, not %s", self._plan.round, len(found), left_out)
        self.selection = Selection(found, {slot: record.hash for slot, record in counted.by_slot.items()})
        self.ready.set()

    def claimed(self, slot: int, part: int) -> bytes:
        """The sketch of a slot's part by the Sketches that count. Blocking.

        Raises:
            RefusedError: it is no longer here.
        """
        blob = self._evidence.find(self._blobs[slot])
        if blob is None:
            raise RefusedError("sketches are no longer here")
        return bytes(blob[part * sketch.SIZE_BYTES : (part + 1) * sketch.SIZE_BYTES])

    async def _closed(self) -> CountedSketches:
        while True:
            try:
                found = await self._client.sketch_set(self._plan, self._commitments, wait_s=POLL_S)
            except (UnreachableError, RefusedError, InvalidDataError) as error:
                log.info("the sketch set of round %d: %s", self._plan.round, error)
                found = None
            if found is not None:
                return found
            await asyncio.sleep(RETRY_S)

    async def _take(self, slot: int, record: Sketches) -> None:
        """Have the bytes of a slot's sketches, checked: from here, from its sender, or from the coordinator's store."""
        while True:
            blob: bytes | bytearray | None = await asyncio.to_thread(self._evidence.find, record.blob)
            if blob is None:
                blob = await self._fetch(slot, record)
            if blob is not None:
                try:
                    sketching.decode(self._spec, record, blob)
                    break
                except InvalidDataError as error:
                    log.warning("sketches of slot %d in round %d: %s", slot, self._plan.round, error)
            await asyncio.sleep(RETRY_S)
        if self._evidence.find(record.blob) is None:
            await asyncio.to_thread(self._keep, record.blob, blob)
        self._blobs[slot] = record.blob

    async def _fetch(self, slot: int, record: Sketches) -> bytes | None:
        size_bytes = sketching.blob_bytes(self._spec)
        try:
            _, found = await self._plane.call(
                self._plan.roster[slot].peer,
                {"op": "get", "hash": record.blob},
                max_answer_bytes=size_bytes,
                timeout_s=max(1.0, ATTEMPT_SHARE * self._spec.rounds.exchange_s),
            )
            if chunks.content_hash(found) == record.blob:
                return bytes(found)
            log.warning("slot %d serves other bytes than its signed sketches", slot)
        except (UnreachableError, RefusedError, InvalidDataError) as error:
            log.info("sketches of slot %d in round %d: %s", slot, self._plan.round, error)
        try:
            return await self._client.chunk(record.blob, max_bytes=size_bytes)
        except (UnreachableError, RefusedError, InvalidDataError) as error:
            log.info("sketches of slot %d in round %d: %s", slot, self._plan.round, error)
        return None

    def _select(self, counted: CountedSketches) -> dict[int, int]:
        decoded = {}
        for slot, record in counted.by_slot.items():
            blob = self._evidence.find(record.blob)
            assert blob is not None
            decoded[slot] = sketching.decode(self._spec, record, blob)
        return sketching.select(self._spec, self._plan.roster, self._commitments.by_slot, decoded)

    def _keep(self, digest: bytes, blob: bytes | bytearray) -> None:
        path = self._folder.work(self._plan.round) / f"sketches-{digest.hex()}"
        self._evidence.keep(self._plan.round, digest, blob, path)
