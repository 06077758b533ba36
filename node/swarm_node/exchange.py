"""The exchange of one round: parts to their reducers, averages back, every byte checked against a signed record.

Everything happens at once: our parts go out (`sending`), others' come in and are averaged (`reducing`), and averages are
fetched as they are published (`averages`). Every wait has a deadline inside the round's exchange time E:

    0        each part is delivered to its first reducer; if that one fails, to the next
    0.35 E   where the aggregator needs sketches, they are closed at the latest, and reducers learn which slots to average
    0.5 E    a part's first reducer goes on without those who have not delivered
    0.65 E   a part whose average is nowhere to be had is delivered to its second reducer, at 0.8 E to its third,
    0.8 E    who go on with what they have at 0.8 E and 0.9 E
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from swarm_node.averages import Averages
from swarm_node.contribution import Contribution
from swarm_node.evidence import Evidence
from swarm_node.faults import NONE, Faults, Point
from swarm_node.folder import RunFolder
from swarm_node.measured import Measured
from swarm_node.reducing import Reducer
from swarm_node.sending import Sender
from swarm_node.sketching import Sketching
from swarm_protocol import parts, sketching
from swarm_protocol.calls import Answer, Call, Handler
from swarm_protocol.client import Commitments, CoordinatorClient
from swarm_protocol.errors import InvalidDataError, RefusedError, UnreachableError
from swarm_protocol.http import persist
from swarm_protocol.peers import PeerPlane
from swarm_protocol.records import Envelope, Equivocation, PartRecord, RoundPlan
from swarm_protocol.signing import SigningLedger
from swarm_protocol.spec import RunSpec

log = logging.getLogger(__name__)

EARLY_S = 8.0
"""How long a delivery may come before our exchange of its round is open."""

BACKUP_SHARES = (0.65, 0.8)
POLL_S = 15.0
QUIET_S = 0.5


class Exchange:
    """One node's share in the exchange of one round. Averages are decoded into `vector`, which rounds may share."""

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
        vector: npt.NDArray[np.float32] | None = None,
        measured: Measured | None = None,
        faults: Faults = NONE,
    ) -> None:
        self.plan = plan
        self._spec = spec
        self._commitments = commitments
        self._plane = plane
        self._client = client
        self._ledger = ledger
        self._evidence = evidence
        self._reports: set[asyncio.Task[None]] = set()
        self._folder = folder
        self._started = time.monotonic()
        self._measured = measured or Measured()
        self._faults = faults
        self.orders = parts.planned_reducers(spec, plan, commitments.by_slot)
        self.averages = Averages(
            spec, plan, plane=plane, client=client, folder=folder, evidence=evidence, measured=self._measured,
            vector=np.empty(spec.num_trainable, np.float32) if vector is None else vector, report=self._expose,
        )  # fmt: skip
        self.sketching: Sketching | None = None
        if sketching.needed(spec.exchange.aggregator, plan.roster, commitments.by_slot):
            self.sketching = Sketching(
                spec, plan, commitments, plane=plane, client=client, ledger=ledger, folder=folder, evidence=evidence,
                faults=faults,
            )  # fmt: skip
        self.reducer = Reducer(
            spec, plan, commitments, self.orders, ledger=ledger, folder=folder, evidence=evidence,
            measured=self._measured, faults=faults, publish=self._publish, rival=self.averages.slots_of,
            sketching=self.sketching, report=self._report,
        )  # fmt: skip

    async def run(self, mine: Contribution | None) -> None:
        """Deliver our parts, reduce what is sent to us, and fetch what is published, until cancelled."""
        try:
            await self._faults.at(Point.OPENING, self.plan.round)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch())
                tasks.create_task(self.reducer.restore())
                if self.sketching is not None:
                    tasks.create_task(self.sketching.follow())
                if mine is not None and mine.slot in self._commitments.by_slot:
                    tasks.create_task(self._send(mine))
                await asyncio.Event().wait()  # others may still deliver to us
        finally:
            await self.stop()

    async def receive(self, call: Call) -> Answer:
        """A delivery to us as a reducer. Raises `RefusedError`, as `Reducer.receive` does."""
        try:
            return await self.reducer.receive(call)
        except RefusedError:
            self._measured.deliveries_refused += 1
            raise

    async def stop(self) -> None:
        """End all sending, reducing and fetching; what was fetched stays for `averages.finish`."""
        await self.reducer.stop()
        await self.averages.stop()
        await asyncio.gather(*self._reports, return_exceptions=True)

    async def _send(self, mine: Contribution) -> None:
        async def take_own(part: int, slot: int) -> None:
            await self.reducer.take_own(part, slot, mine.part_hashes[part])

        own = None
        if self.sketching is not None:
            await self._faults.at(Point.SKETCHING, self.plan.round)
            own = await asyncio.to_thread(self.sketching.sign, mine)
            if own is None:
                return
        sender = Sender(
            self._spec, self.plan, mine, self.orders, self._plane, self._folder, self._measured, self._faults, take_own,
            own,
        )  # fmt: skip
        stages: list[Callable[[], Awaitable[object]]] = [
            self._wait_for_averages,
            *(partial(self._until, share) for share in BACKUP_SHARES[1:]),
        ]
        async with asyncio.TaskGroup() as tasks:
            if self.sketching is not None and own is not None:
                tasks.create_task(self.sketching.publish(own))
            tasks.create_task(sender.run(self.averages.missing, stages))

    async def _wait_for_averages(self) -> None:
        """Until everything is here, or the first backups are due."""
        with self._measured.waiting.measure(), contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._left(BACKUP_SHARES[0])):
                await self.averages.complete.wait()

    async def _until(self, share: float) -> None:
        await asyncio.sleep(self._left(share))

    def _left(self, share: float) -> float:
        """Seconds until this share of the exchange time is over."""
        return max(0.0, self._started + share * self._spec.rounds.exchange_s - time.monotonic())

    async def _publish(self, envelope: Envelope, record: PartRecord) -> None:
        self.averages.note(record, envelope)
        self._evidence.vouch(record, self._faults.vouched(envelope, record, self._ledger.identity))
        try:
            await persist(lambda: self._client.post(envelope), deadline_s=self._spec.rounds.exchange_s)
            for lie in self._faults.published(record, self._ledger.identity):
                await self._client.post(lie)
        except (RefusedError, UnreachableError) as error:  # as a rule the exchange has closed without it
            log.info("part %d of round %d is not published: %s", record.part, record.round, error)

    async def _report(self, envelope: Envelope) -> None:
        """Hand in what we signed, or somebody else did, about somebody's sketches."""
        try:
            await persist(lambda: self._client.post(envelope), deadline_s=self._spec.rounds.exchange_s)
        except (RefusedError, UnreachableError) as error:
            log.warning("round %d: %s", self.plan.round, error)

    def _expose(self, first: Envelope, second: Envelope) -> None:
        """Hand in the proof that a reducer signed two records of one part, without anybody waiting for it."""

        def report(sequence: int) -> Equivocation:
            return Equivocation(
                run=self._spec.run_id, round=self.plan.round, sequence=sequence,
                first=first.encode(), second=second.encode(),
            )  # fmt: skip

        async def hand_in() -> None:
            envelope = await asyncio.to_thread(self._ledger.sign_next, report)
            try:
                await persist(lambda: self._client.post(envelope), deadline_s=self._spec.rounds.exchange_s)
            except (RefusedError, UnreachableError) as error:  # somebody else was first
                log.info("an equivocation is not taken: %s", error)

        self._measured.equivocations.append(first.peer)
        task = asyncio.create_task(hand_in())
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)

    async def _watch(self) -> None:
        """Take note of part records as they are published."""
        count, reducers = 0, {seat.peer for seat in self.plan.roster if seat.reducer}
        while True:
            try:
                found = await self._client.part_records(self.plan.round, after=count, wait_s=POLL_S)
            except (UnreachableError, RefusedError, InvalidDataError) as error:
                log.info("part records of round %d: %s", self.plan.round, error)
                found = None
            for envelope in found or []:
                try:
                    record = envelope.open_as(PartRecord, run=self._spec.run_id, round=self.plan.round)
                    if envelope.key not in reducers or record.part >= len(self.orders):
                        raise InvalidDataError("a part record that is not of this round")
                    if record.commitment_set != self._commitments.closing.hash:
                        raise InvalidDataError("a part record over other commitments")
                    self.averages.note(record, envelope)
                except InvalidDataError as error:
                    log.warning("round %d: %s", self.plan.round, error)
            count += len(found or [])
            if not found:
                await asyncio.sleep(QUIET_S)  # the coordinator is away, or the exchange closed and it does not wait


class ExchangeDesk:
    """Takes deliveries for whichever round is open, and lets early ones wait a little."""

    def __init__(self) -> None:
        self._open: Exchange | None = None
        self._changed = asyncio.Condition()

    @property
    def handlers(self) -> dict[str, Handler]:
        return {"deliver": self._deliver}

    async def open(self, exchange: Exchange | None) -> None:
        async with self._changed:
            self._open = exchange
            self._changed.notify_all()

    async def _deliver(self, call: Call) -> Answer:
        wanted = int(call.header["round"])
        async with self._changed:
            try:
                async with asyncio.timeout(EARLY_S):
                    await self._changed.wait_for(lambda: self._open is not None and self._open.plan.round >= wanted)
            except TimeoutError:
                raise RefusedError("the exchange of that round is not open here") from None
            exchange = self._open
        if exchange is None or exchange.plan.round != wanted:
            raise RefusedError("the exchange of that round is over")
        return await exchange.receive(call)
