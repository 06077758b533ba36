"""Parts to their reducers and averages back: everybody ends with the same bytes, whoever is missing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from swarm_protocol import chunks, codec, parts
from swarm_protocol.client import SealedRound
from swarm_protocol.errors import RefusedError, UnreachableError
from swarm_protocol.identity import Identity
from swarm_protocol.peers import Answer, Call
from swarm_protocol.records import MAX_SLOTS, Envelope, PartReceipt, PartRecord

# hivemind's ways; see test_peers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

Begin = Callable[..., Any]

NODES = 3
PARTS = 3
ROUND = 2


def finish(round: Any, sealed: SealedRound, slot: int = 0) -> bytes:
    """The averaged pseudo-gradient that a node comes to which holds nothing but what is on its disk."""
    return round.swarm.run(round.nodes[slot].exchange().averages.finish(sealed)).tobytes()


def assembled(round: Any, averages: list[bytes | None]) -> bytes:
    decoded = [
        None if data is None else parts.decode_part(round.spec, part, data) for part, data in enumerate(averages)
    ]
    return parts.assemble(round.spec, decoded).tobytes()


# The exchange as it should be


@pytest.mark.parametrize("codec_name", ["none", "int4"])
def test_everybody_ends_with_the_bytes_that_one_would_compute_alone(begin: Begin, codec_name: codec.Name) -> None:
    round = begin(codec_name)
    published = round.exchange_everything()
    everyone = tuple(range(NODES))
    averages = [round.mean(part, *everyone) for part in range(PARTS)]
    for part, (_, record) in published.items():
        assert (record.slots, record.sequence, record.round) == (everyone, part, ROUND)
        assert record.commitment_set == round.commitments.closing.hash
        assert record.result == chunks.content_hash(averages[part])
        assert record.size_bytes == len(averages[part])
    for slot in everyone:
        assert finish(round, round.sealed(published), slot) == assembled(round, averages)
    assert len(round.posted) == PARTS


def test_a_part_is_reduced_by_the_first_in_its_rendezvous_order(begin: Begin) -> None:
    round = begin()
    keys = [seat.peer for seat in round.plan.roster]
    expected = [keys[parts.rendezvous(round.plan.previous_beacon, part, keys)[0]] for part in range(PARTS)]
    assert [order[0] for order in round.nodes[0].exchange().orders] == expected
    assert {part: key for part, (key, _) in round.exchange_everything().items()} == dict(enumerate(expected))


def test_a_slot_that_did_not_commit_or_may_not_reduce_is_no_reducer(begin: Begin) -> None:
    round = begin()
    silent = round.nodes[1]
    del round.commitments.by_slot[silent.slot]
    assert silent.plane.identity.public_key not in round.nodes[0].exchange().orders[0]
    seats = [seat.model_copy(update={"reducer": slot != 2}) for slot, seat in enumerate(round.plan.roster)]
    round.plan = round.plan.model_copy(update={"roster": tuple(seats)})
    assert round.nodes[0].exchange().orders[0] == [round.nodes[0].plane.identity.public_key]


# Somebody is missing


def test_a_sender_that_is_missing_is_left_out_after_half_of_the_time(begin: Begin) -> None:
    round = begin(exchange_s=2.0)
    started = time.monotonic()
    published = round.go(0, 2, until=lambda: round.published(PARTS))
    assert 0.9 < time.monotonic() - started < 10
    for part, (_, record) in published.items():
        assert record.slots == (0, 2)
        assert record.result == chunks.content_hash(round.mean(part, 0, 2))


def test_a_reducer_that_is_gone_is_replaced_by_the_next_one(begin: Begin) -> None:
    round = begin(exchange_s=2.0, ghost=True)
    orders = round.nodes[0].exchange().orders
    ghost = round.plan.roster[NODES].peer
    orphaned = [part for part in range(PARTS) if orders[part][0] == ghost]
    assert orphaned
    published = round.go(0, 1, 2, until=lambda: round.published(PARTS))
    for part, (key, record) in published.items():
        assert key == orders[part][1 if part in orphaned else 0]
        assert record.slots == (0, 1, 2)
        assert record.result == chunks.content_hash(round.mean(part, 0, 1, 2))


def test_every_sender_has_a_receipt_for_every_part_that_it_delivered(begin: Begin) -> None:
    round = begin()

    async def receipted() -> dict[int, tuple[bytes, PartRecord]]:
        published = await round.published(PARTS)
        async with asyncio.timeout(20):  # an average may be out before its last sender has read the receipt
            while sum(len(node.receipts()) for node in round.nodes) < PARTS * (NODES - 1):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return published

    published = round.go(*range(NODES), until=receipted)
    for node in round.nodes:
        receipts = {receipt.part: receipt for receipt in node.receipts()}
        own = {part for part, (key, _) in published.items() if key == node.plane.identity.public_key}
        assert receipts.keys() == set(range(PARTS)) - own
        for part, receipt in receipts.items():
            assert (receipt.slot, receipt.part_hash) == (node.slot, node.mine.part_hashes[part])
            assert receipt.commitment == round.commitments.by_slot[node.slot].hash
            assert not receipt.broken_by(published[part][1])
            assert receipt.broken_by(published[part][1].model_copy(update={"slots": ()}))


def test_a_delivery_without_a_valid_receipt_counts_for_nothing(begin: Begin) -> None:
    round = begin(exchange_s=3.0)
    liar = round.nodes[1]

    async def forged(call: Call) -> Answer:
        await call.body(1 << 24)
        record = PartReceipt(
            run=round.spec.run_id,
            round=ROUND,
            commitment=bytes(32),
            part=int(call.header["part"]),
            slot=int(call.header["slot"]),
            part_hash=bytes(32),
        )
        return Answer({"receipt": Envelope.sign(liar.plane.identity, record).encode()})

    round.swarm.served[liar.plane.identity.public_key]["deliver"] = forged
    orders = round.nodes[0].exchange().orders
    abused = next(part for part in range(PARTS) if orders[part][0] == liar.plane.identity.public_key)

    async def replaced() -> PartRecord:
        while True:
            await asyncio.sleep(0.05)  # until the backup has published, which comes after the liar's own record
            for envelope in round.posted:
                record = envelope.open_as(PartRecord, run=round.spec.run_id)
                if record.part == abused and envelope.key == orders[abused][1]:
                    return record

    record = round.go(0, 1, 2, until=replaced)
    assert {0, 2} <= set(record.slots)


def test_a_part_whose_average_nobody_serves_is_reduced_again_by_the_next_one(begin: Begin) -> None:
    round = begin(exchange_s=3.0, ghost=True)
    orders = round.nodes[0].exchange().orders
    ghost = Identity.from_seed(bytes([99]) * 32)
    part = next(part for part in range(PARTS) if orders[part][0] == ghost.public_key)
    average = round.mean(part, 0, 1, 2)
    record = PartRecord(
        run=round.spec.run_id,
        round=ROUND,
        sequence=part,
        part=part,
        commitment_set=round.commitments.closing.hash,
        result=chunks.content_hash(average),
        size_bytes=len(average),
        slots=(0, 1, 2),
    )

    async def go_on() -> dict[int, tuple[bytes, PartRecord]]:
        await round.coordinator.post(Envelope.sign(ghost, record))  # published, and gone
        return await round.published(PARTS + 1)

    key, again = round.go(0, 1, 2, until=go_on)[part]
    assert key == orders[part][1]
    assert again == record


def test_a_reducer_that_lost_receipted_inputs_leaves_the_part_to_the_next_one(begin: Begin) -> None:
    round = begin(exchange_s=2.0)
    reducer = round.nodes[0]
    orders = reducer.exchange().orders
    part = next(number for number, order in enumerate(orders) if order[0] == reducer.key)
    lost = PartReceipt(
        run=round.spec.run_id,
        round=ROUND,
        sequence=part * MAX_SLOTS + 2,
        commitment=round.commitments.by_slot[2].hash,
        part=part,
        slot=2,
        part_hash=round.nodes[2].mine.part_hashes[part],
    )
    reducer.ledger.sign(lost)
    published = round.go(0, 1, until=lambda: round.published(PARTS))
    assert published[part][0] == orders[part][1]
    assert published[part][1].slots == (0, 1)


@pytest.mark.parametrize("spoiled", ["not a number", "beyond the norm bound"])
def test_a_committed_part_that_is_not_sound_is_left_out_at_once(begin: Begin, spoiled: str) -> None:
    round = begin("none")
    liar = round.nodes[1]
    value = np.nan if spoiled == "not a number" else 1e30
    noise = np.full(parts.encoded_part_bytes(round.spec, 0) // 4, value, np.float32).tobytes()
    liar.spoil(0, noise)
    published = round.exchange_everything()
    assert published[0][1].slots == (0, 2)
    assert published[0][1].result == chunks.content_hash(round.mean(0, 0, 2))
    assert published[1][1].slots == (0, 1, 2)


def direct_bytes(round: Any) -> int:
    counted = [node.plane.traffic.by_peer.items() for node in round.nodes]
    return sum(sum(entry) for items in counted for (_, path), entry in items if path == "direct")


def settled_direct_bytes(round: Any) -> int:
    """The count once calls that earlier rounds broke off have ended, which is counted late."""

    async def settle() -> int:
        count = -1
        while count != (count := direct_bytes(round)):  # noqa: ASYNC110  # there is no event to await
            await asyncio.sleep(0.3)
        return count

    return round.swarm.run(settle())


def test_everything_goes_through_the_daemon_where_there_are_no_direct_connections(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    round = begin()
    before = settled_direct_bytes(round)
    for node in round.nodes:
        monkeypatch.setattr(node.plane, "_direct_wanted", False)
    published = round.exchange_everything()
    averages = [round.mean(part, 0, 1, 2) for part in range(PARTS)]
    assert finish(round, round.sealed(published), 2) == assembled(round, averages)
    assert direct_bytes(round) == before


# After a crash


def test_a_restarted_reducer_publishes_what_it_signed_and_makes_nothing_anew(begin: Begin) -> None:
    round = begin()
    published = round.exchange_everything()
    before = sorted(envelope.encode() for envelope in round.posted)
    averages = [round.mean(part, 0, 1, 2) for part in range(PARTS)]
    for node in round.nodes:
        node.ledger.close()
        node.start()
    round.posted.clear()

    async def settled() -> None:
        await round.published(PARTS)
        await asyncio.sleep(0.3)  # a delivery to a closed part leaves no trace to wait for

    # Deliveries come again; over fewer senders, a second average would be another one.
    round.go(0, 1, until=settled)
    assert sorted(envelope.encode() for envelope in round.posted) == before
    assert finish(round, round.sealed(published)) == assembled(round, averages)


# Fetching the averages


def test_a_missing_part_is_fetched_from_nobody(begin: Begin) -> None:
    round = begin()
    published = round.exchange_everything()
    del published[1]
    averages = [round.mean(0, 0, 1, 2), None, round.mean(2, 0, 1, 2)]
    assert finish(round, round.sealed(published)) == assembled(round, averages)
    assert round.coordinator.asked == 0


@pytest.mark.parametrize("fault", ["gone", "other bytes", "too many bytes", "refuses"])
def test_an_average_comes_from_the_coordinator_where_its_reducer_fails(begin: Begin, fault: str) -> None:
    round = begin()
    average = round.mean(0, 0, 1, 2)
    record = PartRecord(
        run=round.spec.run_id,
        round=ROUND,
        part=0,
        commitment_set=bytes(32),
        result=chunks.content_hash(average),
        size_bytes=len(average),
        slots=(0, 1, 2),
    )
    reducer = Identity.generate().public_key if fault == "gone" else round.nodes[1].plane.identity.public_key

    async def get(call: Call) -> Answer:
        if fault == "refuses":
            raise RefusedError("nothing of that hash is kept here")
        return Answer({}, bytes(len(average) + (fault == "too many bytes")))

    round.swarm.served[round.nodes[1].plane.identity.public_key]["get"] = get
    sealed = round.sealed({0: (reducer, record)})
    with pytest.raises(UnreachableError):
        finish(round, sealed)
    round.coordinator.blobs[record.result] = average
    assert finish(round, sealed) == assembled(round, [average, None, None])
    assert round.coordinator.asked == 2
