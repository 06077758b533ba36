"""Sketches, objections and the sketch set at the coordinator: who may sign them, when, and what follows for the round."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from swarm_coordinator.app import create_app
from swarm_coordinator.rounds import Phase
from swarm_coordinator.service import Service, open_service
from swarm_protocol import merkle
from swarm_protocol.client import Commitments, CoordinatorClient
from swarm_protocol.errors import InvalidDataError, RefusedError
from swarm_protocol.records import (
    MAX_SLOTS,
    CheckpointReport,
    Envelope,
    Equivocation,
    PartRecord,
    RoundPlan,
    Sketches,
    SketchFault,
    SketchObjection,
    SketchSet,
    SlotFault,
    SlotHash,
    SlotWeight,
)

MakeCast = Callable[..., Any]
HASHES = [bytes([50 + part]) * 32 for part in range(2)]
"""Of every slot's encoded parts."""


class Stage:
    """A round whose contributions are closed, as its coordinator's clients see it."""

    def __init__(self, cast: Any, client: CoordinatorClient, service: Service) -> None:
        self.cast, self.client, self.service = cast, client, service
        self.plan: RoundPlan
        self.commitments: Commitments

    async def begin(self) -> None:
        for node in self.cast.nodes:
            await self.client.post(self.cast.registration(node))
        _, base = await self.client.latest_checkpoint()
        for node in self.cast.nodes:
            await self.client.post(self.cast.ready(node, 0, base))
        plan = await self.client.plan(0)
        assert plan is not None
        self.plan = plan
        for slot in range(len(plan.roster)):
            await self.client.post(self.cast.commitment(plan, slot, parts_root=merkle.root(HASHES)))
        commitments = await self.client.commitments(plan)
        assert commitments is not None
        self.commitments = commitments

    def sketches(self, slot: int, /, **changes: Any) -> Envelope:
        record = Sketches(
            run=self.cast.run,
            round=0,
            sequence=slot,
            commitment_set=self.commitments.closing.hash,
            commitment=self.commitments.by_slot[slot].hash,
            slot=slot,
            root=bytes([slot]) * 32,
            blob=bytes([slot]) * 32,
        )
        return self.cast.changed(self.cast.holder(self.plan, slot), record, **changes)

    def objection(self, by: int, about: int, **changes: Any) -> Envelope:
        record = SketchObjection(
            run=self.cast.run,
            round=0,
            sequence=MAX_SLOTS + about,
            part=1,
            slot=about,
            sketches=self.sketches(about).open().hash,
            part_hash=HASHES[1],
            proof=merkle.proof(HASHES, 1),
        )
        return self.cast.changed(self.cast.holder(self.plan, by), record, **changes)

    def sketch_set(self, **changes: Any) -> Envelope:
        """Slot 0 counts and is selected, slot 1 was forged, slot 2 counts and is not selected."""
        record = SketchSet(
            run=self.cast.run,
            round=0,
            commitment_set=self.commitments.closing.hash,
            counted=tuple(SlotHash(slot=slot, hash=self.sketches(slot).open().hash) for slot in (0, 2)),
            excluded=(SlotFault(slot=1, fault=SketchFault.FORGED),),
            selected=(SlotWeight(slot=0, weight=7),),
        )
        return self.cast.changed(self.cast.worker, record, **changes)

    def part_record(self, part: int, *slots: int) -> Envelope:
        record = self.cast.part_record(self.plan, self.commitments.closing, part).open_as(PartRecord, run=self.cast.run)
        return self.cast.changed(self.cast.holder(self.plan, 0), record, slots=slots)

    async def refuse(self, envelope: Envelope, code: str) -> None:
        with pytest.raises(RefusedError) as found:
            await self.client.post(envelope)
        assert found.value.code == code


def play(cast: Any, script: Callable[[Stage], Awaitable[None]]) -> None:
    @asynccontextmanager
    async def stage() -> AsyncIterator[Stage]:
        async with open_service(cast.home, cast.clock) as service:
            http = httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)))
            async with CoordinatorClient(http, "http://coordinator", cast.spec, None) as client:
                made = Stage(cast, client, service)
                await made.begin()
                yield made

    async def run() -> None:
        async with asyncio.timeout(30), stage() as made:
            await script(made)

    asyncio.run(run())


def test_a_round_is_averaged_by_its_sketch_set_and_sealed_with_it(make_cast: MakeCast) -> None:
    async def script(stage: Stage) -> None:
        client, cast = stage.client, stage.cast
        assert await client.sketch_records(0) is None
        assert await client.sketch_set(stage.plan, stage.commitments) is None
        sent = [stage.sketches(0), stage.sketches(2), stage.objection(0, 1)]
        for envelope in sent:
            await client.post(envelope)
        assert await client.sketch_records(0) == sent
        assert await client.sketch_records(0, after=2) == sent[2:]
        await client.post(stage.sketch_set())
        found = await client.sketch_set(stage.plan, stage.commitments)
        assert found is not None
        assert found.closing == stage.sketch_set().open()
        assert found.by_slot == {slot: stage.sketches(slot).open() for slot in (0, 2)}

        url = f"http://coordinator/v1/runs/{cast.run.hex()}/rounds/0"
        roster = (await client._http.get(url)).json()["roster"]
        shown = [(slot["selected"], slot["sketch_fault"]) for slot in roster]
        assert shown == [(True, None), (False, "forged"), (False, None)]

        await stage.refuse(stage.part_record(0, 0, 2), "wrong-slots")
        records = [stage.part_record(part, 0) for part in range(2)]
        for envelope in records:
            await client.post(envelope)
            await client.post(cast.part_held(envelope))
        # All that was selected is averaged: the exchange is over before its time.
        assert stage.service.state.phase is Phase.SEALING
        chosen = tuple(envelope.open().hash for envelope in records)
        await client.post(cast.report(stage.plan, chosen, b"r" * 32))
        sealed = await client.manifest(stage.plan)
        assert sealed is not None
        assert sealed.manifest.sketches == found.closing.hash

    play(make_cast(3, aggregator="geometric_median"), script)


def test_without_a_sketch_set_no_average_is_taken_and_the_round_still_seals(make_cast: MakeCast) -> None:
    async def script(stage: Stage) -> None:
        await stage.client.post(stage.sketches(0))
        await stage.refuse(stage.part_record(0, 0), "early")
        stage.cast.now_ms += 60_001
        await stage.service.tick()
        report = CheckpointReport(run=stage.cast.run, round=0, base=stage.plan.base, parts=(None, None), root=b"r" * 32)
        await stage.client.post(Envelope.sign(stage.cast.worker, report))
        sealed = await stage.client.manifest(stage.plan)
        assert sealed is not None
        assert (sealed.manifest.sketches, sealed.manifest.parts) == (None, (None, None))
        await stage.refuse(stage.sketch_set(), "closed")

    play(make_cast(3, aggregator="geometric_median"), script)


def test_a_round_whose_sketches_select_nobody_does_not_wait_for_averages(make_cast: MakeCast) -> None:
    async def script(stage: Stage) -> None:
        missing = tuple(SlotFault(slot=slot, fault=SketchFault.MISSING) for slot in range(3))
        await stage.client.post(stage.sketch_set(counted=(), excluded=missing, selected=()))
        assert stage.service.state.phase is Phase.SEALING

    play(make_cast(3, aggregator="geometric_median"), script)


def test_too_few_slots_for_multi_krum_take_no_sketches(make_cast: MakeCast) -> None:
    async def script(stage: Stage) -> None:
        for envelope in (stage.sketches(0), stage.objection(0, 1), stage.sketch_set()):
            await stage.refuse(envelope, "no-sketches")
        await stage.client.post(stage.part_record(0, 0, 1, 2))

    play(make_cast(3), script)


def test_two_different_sketches_of_one_slot_are_an_equivocation_and_loudly_so(
    make_cast: MakeCast, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(stage: Stage) -> None:
        first, second = stage.sketches(1), stage.sketches(1, root=b"x" * 32)
        await stage.client.post(first)
        await stage.refuse(second, "equivocation")
        assert "signed two different records of kind sketches" in caplog.text
        (proof,) = (await stage.client.status())["equivocations"]
        record = (await stage.client.record(bytes.fromhex(proof["report"]))).open()
        assert isinstance(record, Equivocation)
        assert (record.first, record.second) == (first.encode(), second.encode())
        assert await stage.client.sketch_records(0) == [first]

    play(make_cast(3, aggregator="geometric_median"), script)


WRONG: dict[str, tuple[str, Callable[[Stage], Envelope]]] = {
    "sketches of another's slot": ("not-your-slot", lambda s: s.sketches(1, slot=2, sequence=2)),
    "sketches under another number": ("wrong-sketches", lambda s: s.sketches(1, sequence=5)),
    "sketches of another commitment set": ("wrong-sketches", lambda s: s.sketches(1, commitment_set=bytes(32))),
    "sketches of another commitment": ("wrong-sketches", lambda s: s.sketches(1, commitment=bytes(32))),
    "an objection under another number": ("wrong-part", lambda s: s.objection(0, 1, sequence=1)),
    "an objection to a part that is not there": (
        "wrong-part",
        lambda s: s.objection(0, 1, part=2, sequence=2 * MAX_SLOTS + 1),
    ),
    "an objection to a slot that is not there": (
        "not-committed",
        lambda s: s.objection(0, 1, slot=9, sequence=MAX_SLOTS + 9),
    ),
    "an objection about other bytes": ("wrong-part", lambda s: s.objection(0, 1, part_hash=bytes(32))),
    "a set by a node": ("not-appointed", lambda s: s.cast.changed(s.cast.nodes[0], s.sketch_set().open())),
    "a set of other commitments": ("wrong-commitment-set", lambda s: s.sketch_set(commitment_set=bytes(32))),
    "a set that is silent on a slot": ("wrong-slots", lambda s: s.sketch_set(excluded=())),
    "a set that names a slot twice": (
        "wrong-slots",
        lambda s: s.sketch_set(excluded=(SlotFault(slot=0, fault="forged"), SlotFault(slot=1, fault="forged"))),
    ),
    "a set that selects who does not count": (
        "wrong-slots",
        lambda s: s.sketch_set(selected=(SlotWeight(slot=1, weight=1),)),
    ),
    "a set out of order": (
        "wrong-slots",
        lambda s: s.sketch_set(selected=(SlotWeight(slot=2, weight=1), SlotWeight(slot=0, weight=1))),
    ),
    "a set of sketches that nobody signed": (
        "unknown-record",
        lambda s: s.sketch_set(counted=(SlotHash(slot=0, hash=bytes(32)), SlotHash(slot=2, hash=bytes(32)))),
    ),
    "a set under another number": ("closed", lambda s: s.sketch_set(sequence=1)),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_with_sketches_is_refused(make_cast: MakeCast, fault: str) -> None:
    code, make = WRONG[fault]

    async def script(stage: Stage) -> None:
        for slot in (0, 2):
            await stage.client.post(stage.sketches(slot))
        await stage.refuse(make(stage), code)
        assert stage.service.state.sketch_set is None

    play(make_cast(3, aggregator="geometric_median"), script)


def test_sketches_that_come_after_the_set_are_refused(make_cast: MakeCast) -> None:
    async def script(stage: Stage) -> None:
        for slot in (0, 2):
            await stage.client.post(stage.sketches(slot))
        await stage.client.post(stage.sketch_set())
        await stage.refuse(stage.sketches(1), "closed")
        await stage.refuse(stage.sketch_set(selected=()), "equivocation")

    play(make_cast(3, aggregator="geometric_median"), script)


def test_a_sketch_set_by_anybody_but_the_appointed_worker_is_not_believed(make_cast: MakeCast) -> None:
    async def script(stage: Stage) -> None:
        for slot in (0, 2):
            await stage.client.post(stage.sketches(slot))
        await stage.client.post(stage.sketch_set())
        stage.client._owner = stage.cast.nodes[0].public_key
        with pytest.raises(InvalidDataError, match="signed by"):
            await stage.client.sketch_set(stage.plan, stage.commitments)

    play(make_cast(3, aggregator="geometric_median"), script)
