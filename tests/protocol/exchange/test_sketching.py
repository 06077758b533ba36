"""Sketches among real peers: what they select is averaged, and what is forged, late or signed twice gets nowhere.

`geometric_median` needs sketches among however few slots; multi-Krum leaves somebody out from seven slots on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from swarm_node.claims import Claims, TwoSketchesError
from swarm_node.faults import Action, Fault, Faults, Point
from swarm_protocol import chunks, merkle, parts, sketch, sketching
from swarm_protocol.errors import RefusedError
from swarm_protocol.records import (
    MAX_SLOTS,
    Envelope,
    Sketches,
    SketchFault,
    SketchObjection,
    SketchSet,
    SlotFault,
    SlotWeight,
)

# hivemind's ways; see test_peers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

Begin = Callable[..., Any]

NODES = 3
CROWD = 8
PARTS = 3
ROUND = 2
FORGING = Faults((Fault(Action.GARBAGE, Point.SKETCHING, ROUND),))


def start(begin: Begin, exchange_s: float = 5.0) -> Any:
    return begin(exchange_s=exchange_s, aggregator="geometric_median")


def signed(round: Any, slot: int, sketches: list[bytes] | None = None) -> tuple[Envelope, Sketches, list[bytes]]:
    """What a slot's holder signs of its sketches: those of its parts, or others."""
    node, closing = round.nodes[slot], round.commitments.closing.hash
    if sketches is None:
        sketches = sketching.of_parts(round.spec, closing, [node.mine.part(part) for part in range(PARTS)])
    record = Sketches(
        run=round.spec.run_id,
        round=ROUND,
        sequence=slot,
        commitment_set=closing,
        commitment=round.commitments.by_slot[slot].hash,
        slot=slot,
        root=sketch.root(sketches),
        blob=chunks.content_hash(b"".join(sketches)),
    )
    return Envelope.sign(node.plane.identity, record), record, sketches


def finish(round: Any, published: Any, slot: int) -> bytes:
    return round.swarm.run(round.nodes[slot].exchange().averages.finish(round.sealed(published))).tobytes()


async def closed(round: Any) -> SketchSet:
    """The sketch set, once it is posted."""
    async with asyncio.timeout(20), round.coordinator.news:
        await round.coordinator.news.wait_for(lambda: bool(round.coordinator.sketch_sets))
    return round.sketch_set


# The selection


def test_an_average_is_of_what_the_sketches_select_with_their_weights(begin: Begin) -> None:
    round = start(begin)
    published = round.go(*range(NODES), until=lambda: round.published(PARTS), worker=True)
    weights = [one.weight for one in round.sketch_set.selected]
    assert [one.slot for one in round.sketch_set.selected] == [0, 1, 2]
    assert weights != [round.plan.roster[slot].weight for slot in range(NODES)]
    for part, (_, record) in published.items():
        assert record.slots == (0, 1, 2)
        assert record.result == chunks.content_hash(round.selected_mean(part))
    assert len({finish(round, published, slot) for slot in range(NODES)}) == 1


def test_a_receipt_names_the_sketches_that_it_was_given_for(begin: Begin) -> None:
    round = start(begin)
    published = round.go(*range(NODES), until=lambda: round.published(PARTS), worker=True)
    counted = {one.slot: one.hash for one in round.sketch_set.counted}
    receipts = [receipt for node in round.nodes for receipt in node.receipts()]
    assert receipts
    for receipt in receipts:
        assert receipt.sketches == counted[receipt.slot]
        assert not receipt.broken_by(published[receipt.part][1], round.sketch_set)


def test_multi_krum_leaves_an_outlier_out_and_everybody_ends_with_the_same_bytes(begin_crowded: Begin) -> None:
    round = begin_crowded(exchange_s=12.0)
    liar = round.nodes[5]
    common = np.random.default_rng(99).standard_normal(round.spec.model.num_parameters, dtype=np.float32)
    for node in round.nodes:
        noise = np.random.default_rng(node.slot).standard_normal(common.size, dtype=np.float32)
        node.commit_to(np.float32(-10 if node is liar else 1) * (common + noise))
    published = round.go(*range(CROWD), until=lambda: round.published(PARTS), worker=True)
    honest = tuple(slot for slot in range(CROWD) if slot != liar.slot)
    assert not round.sketch_set.excluded
    for part, (_, record) in published.items():
        assert record.slots == honest
        assert record.result == chunks.content_hash(round.selected_mean(part))
    assert len({finish(round, published, slot) for slot in range(CROWD)}) == 1
    # It has done what was asked of a sender, and nobody who left it out has broken a promise.
    receipts = liar.receipts()
    assert receipts
    assert all(not receipt.broken_by(published[receipt.part][1], round.sketch_set) for receipt in receipts)


def test_too_few_slots_for_multi_krum_exchange_no_sketches(begin: Begin) -> None:
    round = begin(aggregator="multi_krum")
    published = round.exchange_everything()
    assert not round.coordinator.sketches
    assert all(receipt.sketches is None for node in round.nodes for receipt in node.receipts())
    assert all(
        record.result == chunks.content_hash(round.mean(part, 0, 1, 2)) for part, (_, record) in published.items()
    )


def test_a_selection_that_the_sketches_do_not_give_is_not_followed(begin: Begin) -> None:
    round = start(begin, exchange_s=2.0)

    async def ended() -> None:
        honest = await closed(round)
        assert len(honest.selected) == NODES
        await asyncio.sleep(1.2)  # well beyond the share of the time at which averages are made

    original = round.coordinator.post

    async def altered(envelope: Envelope) -> None:
        record = envelope.open()
        if isinstance(record, SketchSet):
            fields = {**record.model_dump(), "selected": (*record.selected[:2], SlotWeight(slot=2, weight=1))}
            envelope = Envelope.sign(round.swarm.worker.identity, SketchSet(**fields))
        await original(envelope)

    round.coordinator.post = altered
    round.go(*range(NODES), until=ended, worker=True)
    assert not round.posted


# What does not count


def test_a_forged_sketch_is_objected_to_and_its_slot_left_out(begin: Begin) -> None:
    round = start(begin)
    round.nodes[1].faults = FORGING
    published = round.go(*range(NODES), until=lambda: round.published(PARTS), worker=True)
    assert round.sketch_set.excluded == (SlotFault(slot=1, fault=SketchFault.FORGED),)
    assert {record.slots for _, record in published.values()} == {(0, 2)}
    objections = [one.open() for one in round.coordinator.sketches if one.open().kind == SketchObjection.kind]
    assert objections
    assert {objection.slot for objection in objections} == {1}
    assert not round.nodes[1].receipts()


def test_a_forged_sketch_that_nobody_objects_to_still_gets_nothing_into_an_average(begin: Begin) -> None:
    round = start(begin)
    round.nodes[1].faults = FORGING
    round.coordinator.deaf_to = {(SketchObjection.kind, node.key) for node in round.nodes}
    published = round.go(*range(NODES), until=lambda: round.published(PARTS), worker=True)
    assert [one.slot for one in round.sketch_set.counted] == [0, 1, 2]
    for part, (_, record) in published.items():
        assert 1 not in record.slots
        assert record.result == chunks.content_hash(round.selected_mean(part, 1))


def test_an_objection_without_ground_changes_nothing(begin: Begin) -> None:
    round = start(begin)
    _, record, _ = signed(round, 1)
    mine = round.nodes[1].mine

    def objection(part_hash: bytes, part: int) -> Envelope:
        fields = SketchObjection(
            run=round.spec.run_id,
            round=ROUND,
            sequence=part * MAX_SLOTS + 1,
            part=part,
            slot=1,
            sketches=record.hash,
            part_hash=part_hash,
            proof=mine.proof(part),
        )
        return Envelope.sign(round.nodes[2].plane.identity, fields)

    async def objected() -> SketchSet:
        await round.coordinator.post(objection(mine.part_hashes[0], 0))
        await round.coordinator.post(objection(bytes(32), 1))  # a part that nobody committed to
        return await closed(round)

    found = round.go(*range(NODES), until=objected, worker=True)
    assert not found.excluded
    assert [one.slot for one in found.counted] == [0, 1, 2]


def test_who_signs_no_sketches_in_time_is_left_out(begin: Begin) -> None:
    round = start(begin)
    late = round.nodes[1]
    round.coordinator.deaf_to = {(Sketches.kind, late.key)}
    published = round.go(*range(NODES), until=lambda: round.published(PARTS), worker=True)
    assert round.sketch_set.excluded == (SlotFault(slot=1, fault=SketchFault.MISSING),)
    assert {record.slots for _, record in published.values()} == {(0, 2)}
    assert late.receipts()
    assert all(not receipt.broken_by(published[receipt.part][1], round.sketch_set) for receipt in late.receipts())


def test_sketches_that_nobody_serves_do_not_count(begin: Begin) -> None:
    round = start(begin, exchange_s=4.0)

    async def unavailable() -> SketchSet:
        envelope, _, _ = signed(round, 1)
        await round.coordinator.post(envelope)
        return await closed(round)

    found = round.go(0, 2, until=unavailable, worker=True)
    assert found.excluded == (SlotFault(slot=1, fault=SketchFault.UNAVAILABLE),)


def test_without_a_sketch_set_all_parts_are_missing_and_nobody_hangs(begin: Begin) -> None:
    round = start(begin, exchange_s=1.0)

    async def over() -> list[bool]:
        exchanges = [node.desk._open for node in round.nodes]
        async with asyncio.timeout(20):
            while any(len(one.reducer.tasks) == 0 for one in exchanges):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            for one in exchanges:
                await asyncio.gather(*one.reducer.tasks.values())
        return [one.sketching.ready.is_set() for one in exchanges]

    assert round.go(*range(NODES), until=over) == [False] * NODES
    assert not round.posted


def test_the_worker_closes_the_sketches_of_a_round_once(begin: Begin) -> None:
    round = start(begin)
    round.go(*range(NODES), until=lambda: closed(round), worker=True)
    again = round.swarm.run(round.worker().close())
    assert again == round.coordinator.sketch_sets[0].open()
    assert round.coordinator.sketch_sets[1:] == [round.coordinator.sketch_sets[0]]


def test_an_input_that_came_with_other_sketches_than_those_that_count_is_looked_at_again(begin: Begin) -> None:
    round = start(begin, exchange_s=4.0)
    forger, honest_too = round.nodes[1], round.nodes[2]

    async def fooled() -> Any:
        # What counts was posted first, by somebody who delivers with something else: the forger's is a lie, the other's
        # is true of its parts, only signed twice.
        lie, _, sketches = signed(round, 1, [bytes(sketch.SIZE_BYTES)] * PARTS)
        forger.evidence.keep(ROUND, chunks.content_hash(b"".join(sketches)), b"".join(sketches), round._folder / "lie")
        await round.coordinator.post(lie)
        _, record, true = signed(round, 2)
        blob = b"".join(true)
        honest_too.evidence.keep(ROUND, record.blob, blob, round._folder / "true")
        await round.coordinator.post(Envelope.sign(honest_too.plane.identity, record))
        return await round.published(PARTS)

    published = round.go(*range(NODES), until=fooled, worker=True)
    assert {record.slots for _, record in published.values()} == {(0, 2)}


def test_a_reducer_that_comes_back_checks_its_inputs_against_the_sketches_that_count(begin: Begin) -> None:
    round = start(begin, exchange_s=4.0)
    reducer, sender = round.nodes[0], round.nodes[1]
    part = next(part for part, order in enumerate(reducer.exchange().orders) if order[0] == reducer.key)
    digest = sender.mine.part_hashes[part]
    path = reducer._folder.work(ROUND) / f"input-{part}-1-{digest.hex()}"
    path.write_bytes(sender.mine.part(part))
    reducer.ledger.close()
    reducer.start()
    stale = reducer._folder.work(ROUND) / f"input-{part}-2-{digest.hex()}"  # not what slot 2 committed to
    stale.write_bytes(sender.mine.part(part))
    published = round.go(0, 1, until=lambda: round.published(PARTS), worker=True)
    assert published[part][1].slots == (0, 1)


# Deliveries


class Delivery:
    """A delivery from slot 1 to the reducer at slot 0 with its sketch; every test spoils one thing."""

    def __init__(self, round: Any, sketches: list[bytes] | None = None) -> None:
        self.round = round
        self.sender = round.nodes[1]
        self.envelope, self.record, self.sketches = signed(round, 1, sketches)
        self.header: dict[str, Any] = {
            "op": "deliver",
            "round": ROUND,
            "part": 1,
            "slot": 1,
            "proof": list(self.sender.mine.proof(1)),
            "sketch": self.sketches[1],
            "sketch_proof": list(merkle.proof([chunks.content_hash(one) for one in self.sketches], 1)),
            "sketches": self.envelope.encode(),
        }

    def resign(self, signer: int = 1, **changes: object) -> None:
        record = Sketches(**{**self.record.model_dump(), **changes})
        self.header["sketches"] = Envelope.sign(self.round.nodes[signer].plane.identity, record).encode()

    async def send(self) -> None:
        key, body = self.round.nodes[0].key, self.sender.mine.part(1)
        await self.sender.plane.call(key, self.header, body, max_answer_bytes=0, timeout_s=10)


def deliver(round: Any, *deliveries: Delivery) -> list[int]:
    """Send these one after the other to one exchange; returns the parts that it began to reduce."""
    reducer = round.nodes[0]

    async def main() -> list[int]:
        exchange = reducer.exchange()
        await reducer.desk.open(exchange)
        try:
            for delivery in deliveries:
                await delivery.send()
        finally:
            taken = list(exchange.reducer.tasks)
            await asyncio.gather(*exchange.reducer._reports)
            await exchange.stop()
            await reducer.desk.open(None)
        return taken

    return round.swarm.run(main())


def test_a_delivery_with_its_sketch_is_taken(begin: Begin) -> None:
    round = start(begin)
    assert deliver(round, Delivery(round)) == [1]


SPOILED: dict[str, tuple[str, Callable[[Delivery], object]]] = {
    "no sketch": ("sketch", lambda d: d.header.pop("sketch")),
    "no signed sketches": ("sketches", lambda d: d.header.pop("sketches")),
    "no proof": ("sketch_proof", lambda d: d.header.pop("sketch_proof")),
    "a sketch that is text": ("are bytes", lambda d: d.header.update(sketch="x")),
    "a proof that is text": ("list of digests", lambda d: d.header.update(sketch_proof=["x"])),
    "a sketch too short": ("sketch of", lambda d: d.header.update(sketch=d.sketches[1][:-4])),
    "a sketch that is not finite": ("not finite", lambda d: d.header.update(sketch=b"\xff" * sketch.SIZE_BYTES)),
    "another part's sketch": ("another root", lambda d: d.header.update(sketch=d.sketches[0])),
    "another part's proof": ("root", lambda d: d.header.update(sketch_proof=[bytes(32)] * 2)),
    "garbage for a record": ("end of the data", lambda d: d.header.update(sketches=b"garbage")),
    "signed by another": ("signed by", lambda d: d.resign(signer=2)),
    "of another round": ("round", lambda d: d.resign(round=ROUND + 1)),
    "of another commitment set": ("do not belong", lambda d: d.resign(commitment_set=bytes(32))),
    "of another commitment": ("do not belong", lambda d: d.resign(commitment=bytes(32))),
    "of another slot": ("do not belong", lambda d: d.resign(slot=2)),
    "of another sequence": ("do not belong", lambda d: d.resign(sequence=0)),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_a_delivery_whose_sketch_has_a_fault_is_refused(begin: Begin, fault: str) -> None:
    reason, spoil = SPOILED[fault]
    round = start(begin)
    delivery = Delivery(round)
    spoil(delivery)
    with pytest.raises(RefusedError, match=reason):
        deliver(round, delivery)
    assert not round.coordinator.sketches


def test_a_signed_sketch_of_other_values_is_refused_and_objected_to(begin: Begin) -> None:
    round = start(begin)
    forged = [bytes(sketch.SIZE_BYTES)] * PARTS
    delivery = Delivery(round, forged)
    with pytest.raises(RefusedError, match="not that of the part"):
        deliver(round, delivery)
    (objection,) = [envelope.open() for envelope in round.coordinator.sketches]
    assert isinstance(objection, SketchObjection)
    assert (objection.part, objection.slot, objection.sketches) == (1, 1, delivery.record.hash)
    sketching.require_committed(round.spec, objection, round.commitments.by_slot[1])
    assert round.nodes[0].evidence.find(objection.part_hash) == round.nodes[1].mine.part(1)


def test_two_different_signed_sketches_of_a_slot_are_refused_and_both_handed_in(
    begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    round = start(begin)
    right, other = Delivery(round), Delivery(round)
    other.resign(blob=bytes(32))
    with pytest.raises(RefusedError, match="signed before"):
        deliver(round, right, other)
    assert [envelope.encode() for envelope in round.coordinator.sketches] == [right.header["sketches"]]
    assert [envelope.encode() for envelope in round.coordinator.refused] == [other.header["sketches"]]
    (said,) = [one.getMessage() for one in caplog.records if "equivocates" in one.getMessage()]
    assert right.header["sketches"].hex() in said
    assert other.header["sketches"].hex() in said


def test_an_equivocation_is_shown_once(begin: Begin) -> None:
    round = start(begin)
    claims = Claims(round.spec, round.plan, round.commitments, round.nodes[0].ledger)
    right, other = Delivery(round), Delivery(round)
    other.resign(blob=bytes(32))
    claims.read(right.header, 1, 1)
    for shown in (2, 0, 0):
        with pytest.raises(TwoSketchesError) as found:
            claims.read(other.header, 1, 1)
        assert len(found.value.both) == shown
    assert claims.read(right.header, 1, 1).record == right.record


def test_a_part_that_is_not_sound_has_no_true_sketch(begin: Begin) -> None:
    round = start(begin)
    claims = Claims(round.spec, round.plan, round.commitments, round.nodes[0].ledger)
    unsound = b"\xff" * parts.encoded_part_bytes(round.spec, 0)
    assert not claims.holds(0, unsound, bytes(sketch.SIZE_BYTES))
