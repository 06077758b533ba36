"""A node believes a receipt only if it is the coordinator's, of its own record; and notices one that is not kept."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import pytest

from swarm_protocol.errors import InvalidDataError, UnreachableError
from swarm_protocol.identity import Identity
from swarm_protocol.log import Log, leaf_hash
from swarm_protocol.receipts import MAX_KEPT, Receipts
from swarm_protocol.records import Commitment, Envelope, Ready, Receipt, Record, RoundPlan, Seat
from swarm_protocol.spec import RunSpec

OWNER, NODE = Identity.from_seed(bytes(32)), Identity.from_seed(b"n" * 32)
HASH = b"h" * 32


@pytest.fixture
def spec(run_spec: RunSpec) -> RunSpec:
    return run_spec.model_copy(update={"coordinator": OWNER.public_key.hex()})


def commitment(spec: RunSpec, number: int = 0) -> Envelope:
    record = Commitment(
        run=spec.run_id, round=number, plan=HASH, slot=0, tokens=1, trace_root=HASH, parts_root=HASH, nonce_hash=HASH,
        fingerprint=HASH, train_loss=1.0,
    )  # fmt: skip
    return Envelope.sign(NODE, record)


def receipt(spec: RunSpec, posted: Envelope, leaf: int, *, signer: Identity = OWNER, **changes: object) -> str:
    fields = {
        "run": spec.run_id,
        "round": posted.open().round + 1,
        "sequence": leaf,
        "record": posted.open().hash,
        "leaf_hash": leaf_hash(posted.encode()),
        **changes,
    }
    return Envelope.sign(signer, Receipt.model_validate(fields)).encode().hex()


def plan(spec: RunSpec, number: int, log: Log) -> RoundPlan:
    seat = Seat(peer=NODE.public_key, steps=1, weight=1, reducer=False)
    return RoundPlan(
        run=spec.run_id, round=number, base=HASH, roster=(seat,), cursor=0, commit_by_ms=0, exchange_by_ms=0,
        previous_beacon=HASH, log_size=log.size, log_root=log.root(),
    )  # fmt: skip


def logged(*envelopes: Envelope) -> Log:
    return Log(leaf_hash(envelope.encode()) for envelope in envelopes)


def broken(receipts: Receipts, plan: RoundPlan, served: Log) -> list[int]:
    """The leaves of the receipts that are not kept, by the proofs that a log gives."""

    async def prove(leaf: int, size: int) -> Sequence[bytes]:
        return served.inclusion_proof(leaf, size)

    return [one.sequence for one in asyncio.run(receipts.check(plan, prove))]


def test_a_receipt_that_is_kept_is_checked_once_and_forgotten(spec: RunSpec) -> None:
    other, mine = commitment(spec, 7), commitment(spec)
    log, receipts = logged(other, mine), Receipts(spec)
    receipts.note(mine, receipt(spec, mine, 1))
    receipts.note(mine, receipt(spec, mine, 1))
    assert broken(receipts, plan(spec, 0, logged()), logged()) == []
    assert broken(receipts, plan(spec, 1, log), log) == []
    assert broken(receipts, plan(spec, 2, logged()), logged()) == []


def test_a_record_that_the_plan_leaves_out_is_loud(spec: RunSpec, caplog: pytest.LogCaptureFixture) -> None:
    mine, other = commitment(spec), commitment(spec, 7)
    for log in (logged(), logged(other), logged(other, other)):
        receipts = Receipts(spec)
        receipts.note(mine, receipt(spec, mine, 0))
        caplog.clear()
        with caplog.at_level(logging.ERROR):
            assert broken(receipts, plan(spec, 1, log), log) == [0]
        assert "THE COORDINATOR BREAKS ITS RECEIPT" in caplog.text
        assert mine.open().hash.hex() in caplog.text


def test_what_is_no_receipt_of_this_record_is_refused(spec: RunSpec) -> None:
    mine, other = commitment(spec), commitment(spec, 7)
    receipts = Receipts(spec)
    for bad in (
        receipt(spec, other, 0),
        receipt(spec, mine, 0, signer=NODE),
        receipt(spec, mine, 0, run=HASH),
        receipt(spec, mine, 0, leaf_hash=HASH),
        mine.encode().hex(),
        "zz",
        "",
        17,
    ):
        with pytest.raises(InvalidDataError):
            receipts.note(mine, bad)
    assert broken(receipts, plan(spec, 9, logged()), logged()) == []


def test_without_an_answer_receipts_wait_for_the_next_plan(spec: RunSpec) -> None:
    mine = commitment(spec)
    log, receipts = logged(mine), Receipts(spec)
    receipts.note(mine, receipt(spec, mine, 0))

    async def gone(leaf: int, size: int) -> Sequence[bytes]:
        raise UnreachableError("nobody there")

    with pytest.raises(UnreachableError):
        asyncio.run(receipts.check(plan(spec, 1, log), gone))
    assert broken(receipts, plan(spec, 2, logged()), logged()) == [0]


def test_only_commitments_are_followed_and_only_so_many(spec: RunSpec) -> None:
    receipts = Receipts(spec)
    ready: Record = Ready(run=spec.run_id, round=0, base=HASH, tokens_per_s=1.0, can_reduce=False, upload_bytes_per_s=0)
    posted = Envelope.sign(NODE, ready)
    receipts.note(posted, receipt(spec, posted, 3))
    for number in range(MAX_KEPT + 1):
        mine = commitment(spec, number)
        receipts.note(mine, receipt(spec, mine, 10 + number))
    assert broken(receipts, plan(spec, MAX_KEPT + 2, logged()), logged()) == list(range(11, 11 + MAX_KEPT))
