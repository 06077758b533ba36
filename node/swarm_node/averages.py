"""The averages of a round, as they come: fetched, checked against the record that names them, kept, and decoded.

An average is fetched as soon as its record is published, not when the round is sealed: from its reducer, or from any
other peer that has it, or, last, from the coordinator. Whoever serves other bytes than those of the hash is noted and
passed over; an average comes with the record that its reducer signed, and who signed two is reported with both. Each is
kept, so that we can serve it, and decoded into one vector; memory holds a few parts beside it. What the manifest names
decides in the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from swarm_node.evidence import Evidence
from swarm_node.folder import RunFolder
from swarm_node.measured import Measured
from swarm_protocol import chunks, parts
from swarm_protocol.calls import Bytes
from swarm_protocol.checkpoint import decode_average
from swarm_protocol.client import CoordinatorClient, SealedRound
from swarm_protocol.errors import InvalidDataError, RefusedError, UnreachableError
from swarm_protocol.peers import PeerPlane
from swarm_protocol.records import Envelope, PartRecord, RoundPlan, parse
from swarm_protocol.spec import RunSpec

log = logging.getLogger(__name__)

FETCHES_AT_ONCE = 4
ATTEMPT_SHARE = 0.2
OTHERS_ASKED = 3
RETRY_S = 1.0


class Averages:
    """One node's averages of one round, decoded into `vector`, float32[num_trainable], whatever that held before.

    `report` is told of two part records that one reducer signed for one part.
    """

    def __init__(
        self,
        spec: RunSpec,
        plan: RoundPlan,
        *,
        plane: PeerPlane,
        client: CoordinatorClient,
        folder: RunFolder,
        evidence: Evidence,
        measured: Measured,
        vector: npt.NDArray[np.float32],
        report: Callable[[Envelope, Envelope], None],
    ) -> None:
        self._spec = spec
        self._plan = plan
        self._plane = plane
        self._client = client
        self._folder = folder
        self._evidence = evidence
        self._measured = measured
        self._slices = parts.slices(spec)
        self._vector = vector
        self._best: dict[int, PartRecord] = {}
        self._reducers: dict[bytes, list[bytes]] = defaultdict(list)
        self._decoded: dict[int, bytes] = {}
        self._gate = asyncio.Semaphore(FETCHES_AT_ONCE)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._decoding: dict[int, asyncio.Future[None]] = {}
        self._seen: dict[tuple[bytes, int], Envelope] = {}
        self._exposed: set[bytes] = set()
        self._report = report
        self.complete = asyncio.Event()

    def note(self, record: PartRecord, envelope: Envelope) -> None:
        """A record was published; if it is the best one of its part so far, its average is fetched."""
        reducers, reducer = self._reducers[record.hash], envelope.key
        self._compare(envelope)
        if reducer not in reducers:  # a backup may come to the same average, and sign the same record
            reducers.append(reducer)
        before = self._best.get(record.part)
        if before is not None and _rank(before) <= _rank(record):
            return
        self._best[record.part] = record
        if record.part in self._tasks:
            self._tasks[record.part].cancel()
        self._tasks[record.part] = asyncio.create_task(self._prefetch(record))

    def slots_of(self, part: int) -> int:
        """How many slots are in the best average of this part that is here so far."""
        best = self._best.get(part)
        return len(best.slots) if best is not None and self._decoded.get(part) == best.result else 0

    def missing(self) -> list[int]:
        """The parts of which nobody could give us an average so far."""
        return [part for part in range(len(self._slices)) if part not in self._decoded]

    async def finish(self, sealed: SealedRound) -> npt.NDArray[np.float32]:
        """The averaged pseudo-gradient that the manifest means, float32[num_trainable]; +0 where a part is missing.

        Raises:
            UnreachableError: an average is nowhere to be had.
        """
        await self.stop()

        async def settle(part: int, name: bytes | None) -> None:
            if name is None:
                self._vector[self._slices[part]] = 0
                return
            record, reducer = sealed.part_records[name]
            if self._decoded.get(part) != record.result:
                if reducer not in self._reducers[record.hash]:
                    self._reducers[record.hash].append(reducer)
                await self._take(record, last=True)

        await asyncio.gather(*(settle(part, name) for part, name in enumerate(sealed.manifest.parts)))
        return self._vector

    async def stop(self) -> None:
        """End all fetching. When this returns nothing writes to the vector any more."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), *self._decoding.values(), return_exceptions=True)
        self._tasks.clear()

    async def _prefetch(self, record: PartRecord) -> None:
        if record.size_bytes != parts.encoded_part_bytes(self._spec, record.part):
            return
        while True:
            try:
                await self._take(record, last=False)
                break
            except UnreachableError:
                await asyncio.sleep(RETRY_S)
        if len(self._decoded) == len(self._slices):
            self.complete.set()

    async def _take(self, record: PartRecord, *, last: bool) -> None:
        """Have one average decoded in the vector."""
        async with self._gate:
            started = time.monotonic()
            data = await asyncio.to_thread(self._evidence.find, record.result)
            if data is None:
                data = await self._fetch(record, last=last)
            # A thread cannot be cancelled: whoever comes next for this part waits until it is out.
            if record.part in self._decoding:
                await asyncio.wait({self._decoding[record.part]})
            decoding = asyncio.ensure_future(asyncio.to_thread(self._decode, record, data))
            self._decoding[record.part] = decoding
            await asyncio.shield(decoding)
            self._measured.fetch.add(time.monotonic() - started)

    def _decode(self, record: PartRecord, data: Bytes) -> None:
        """Keep an average, and decode it into the vector. Blocking."""
        path = self._folder.work(record.round) / f"average-{record.result.hex()}"
        decoded = self._vector[self._slices[record.part]]
        self._decoded.pop(record.part, None)
        lies_there = self._spec.exchange.codec == "none"
        try:
            decode_average(self._spec, record.part, data, decoded)
        except InvalidDataError as error:  # by rule, missing
            log.warning("the average of part %d of round %d is not sound: %s", record.part, record.round, error)
            decoded[:] = 0
            lies_there = False
        if not self._evidence.has(record.result):
            if lies_there:
                self._evidence.borrow(record.round, record.result, decoded.data.cast("B"), path)
            else:
                self._evidence.keep(record.round, record.result, data, path)
        self._decoded[record.part] = record.result

    async def _fetch(self, record: PartRecord, *, last: bool) -> Bytes:
        """An average's bytes, from whoever has them.

        Raises:
            UnreachableError
        """
        for source in self._sources(record):
            try:
                answer, data = await self._plane.call(
                    source,
                    {"op": "get", "hash": record.result},
                    max_answer_bytes=record.size_bytes,
                    timeout_s=max(1.0, ATTEMPT_SHARE * self._spec.rounds.exchange_s),
                )
                self._look_at(answer.get("record"))
                if await asyncio.to_thread(chunks.content_hash, data) == record.result:
                    return data
                self._measured.served_other_bytes(source)
                log.warning("a peer serves other bytes for part %d than its record names", record.part)
            except (UnreachableError, RefusedError, InvalidDataError) as error:
                log.info("part %d of round %d is not had from a peer (%s)", record.part, record.round, error)
            self._measured.fetch_retries += 1
        if last:
            with contextlib.suppress(RefusedError, InvalidDataError):
                return await self._client.chunk(record.result, max_bytes=record.size_bytes)
        raise UnreachableError(f"nobody has the average of part {record.part}")

    def _look_at(self, raw: object) -> None:
        """The part record with which an average came, by whoever signed it. Anything else there says nothing."""
        try:
            envelope = Envelope.decode(raw) if isinstance(raw, bytes) else None
            if envelope is not None and envelope not in self._seen.values():
                envelope.open_as(PartRecord, run=self._spec.run_id, round=self._plan.round)
                self._compare(envelope)
        except InvalidDataError as error:
            log.info("an average came with something that is no part record: %s", error)

    def _compare(self, envelope: Envelope) -> None:
        """Report a reducer that signs two records of one part; the envelope's signature was checked."""
        record = parse(envelope.body)
        assert isinstance(record, PartRecord)
        if all(seat.peer != envelope.key for seat in self._plan.roster):
            return
        known = self._seen.setdefault((envelope.key, record.sequence), envelope)
        if known.body != envelope.body and envelope.key not in self._exposed:
            self._exposed.add(envelope.key)
            log.warning("%s signed two different records of part %d", envelope.peer, record.part)
            self._report(known, envelope)

    def _sources(self, record: PartRecord) -> list[bytes]:
        """Its reducers, then a few others, everybody asking others first, so that nobody is asked by all."""
        here, reducers = self._plane.identity.public_key, self._reducers[record.hash]
        others = [seat.peer for seat in self._plan.roster if seat.peer not in (*reducers, here)]
        turn = (record.part + (self._plan.slot_of(here) or 0)) % max(1, len(others))
        asked = [*others[turn:], *others[:turn]][:OTHERS_ASKED]
        return [source for source in [*reducers, *asked] if source != here]


def _rank(record: PartRecord) -> tuple[int, bytes]:
    """As the coordinator chooses: the one over the most slots; of equals, the lowest hash."""
    return -len(record.slots), record.hash
