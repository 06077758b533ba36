"""The audit of a reducer: honest is accepted, each lie has its own verdict, and what is not served accuses nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from swarm_protocol import chunks, codec, collecting, encoding, evidence, merkle, parts, reduction, reduction_audit
from swarm_protocol.client import Commitments, CoordinatorClient
from swarm_protocol.errors import InvalidDataError, RefusedError
from swarm_protocol.identity import Identity
from swarm_protocol.peers import PeerPlane
from swarm_protocol.records import (
    Commitment,
    CommitmentSet,
    Envelope,
    Outcome,
    PartReceipt,
    PartRecord,
    RoundPlan,
    Seat,
    SketchSet,
    SlotHash,
    SlotWeight,
)
from swarm_protocol.reduction_audit import Input, ReductionOutcome, ReductionVerdict
from swarm_protocol.reduction_gathering import Reductions
from swarm_protocol.spec import (
    AuditSpec,
    DataSpec,
    ExchangeSpec,
    ModelSpec,
    OuterSpec,
    RoundsSpec,
    RunSpec,
    TrainingSpec,
)

ZERO = "0" * 64
PARTS, PART, ROUND = 3, 1, 4
NODES = [Identity.from_seed(bytes([number]) * 32) for number in range(1, 5)]
REDUCER = NODES[2]


class Case:
    """A round of four slots whose part 1 was reduced by slot 2; tests change one thing."""

    def __init__(self, codec_name: codec.Name = "int4", aggregator: str = "mean") -> None:
        self.spec = RunSpec(
            name="test", seed=1, numerics="native", coordinator=ZERO, checkpoint=ZERO, beacon=ZERO,
            model=ModelSpec(vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=1),
            data=DataSpec(root=ZERO, tokenizer="bytes", train_tokens=1, held_out_windows=1), training=TrainingSpec(),
            exchange=ExchangeSpec.model_validate({"parts": PARTS, "codec": codec_name, "aggregator": aggregator}),
            outer=OuterSpec(), rounds=RoundsSpec(), audit=AuditSpec(),
        )  # fmt: skip
        self.plan = RoundPlan(
            run=self.spec.run_id, round=ROUND, base=bytes(32), cursor=0, commit_by_ms=0, exchange_by_ms=0,
            roster=tuple(
                Seat(peer=node.public_key, steps=1, weight=1000 >> slot, reducer=slot != 0)
                for slot, node in enumerate(NODES)
            ),
            previous_beacon=bytes(32), log_size=0, log_root=bytes(32),
        )  # fmt: skip
        self.inputs: dict[int, Input] = {}
        self.commitments: dict[int, Commitment] = {}
        for slot in range(len(NODES)):
            vector = np.random.default_rng(slot).standard_normal(self.spec.model.num_parameters, dtype=np.float32)
            self.commit(slot, [codec.get(codec_name).encode(vector[where]) for where in parts.slices(self.spec)])
        self.receipts = [self.receipt(slot) for slot in (0, 1, 3)]

    def commit(self, slot: int, encoded: list[bytes]) -> None:
        hashes = parts.part_hashes(encoded)
        self.inputs[slot] = Input(encoded[PART], merkle.proof(hashes, PART))
        self.commitments[slot] = Commitment(
            run=self.spec.run_id, round=ROUND, plan=self.plan.hash, slot=slot, tokens=1, trace_root=bytes(32),
            parts_root=parts.parts_root(hashes), nonce_hash=bytes(32), fingerprint=bytes(32), train_loss=1.0,
        )  # fmt: skip

    def receipt(self, slot: int, signer: Identity = REDUCER, part: int = PART) -> Envelope:
        record = PartReceipt(
            run=self.spec.run_id, round=ROUND, commitment=self.commitments[slot].hash, part=part, slot=slot,
            part_hash=chunks.content_hash(self.inputs[slot].data),
        )  # fmt: skip
        return Envelope.sign(signer, record)

    def published(self, *slots: int, over: tuple[int, ...] = (), signer: Identity = REDUCER) -> Envelope:
        """The record of an average that claims these slots, and is made of those in `over` where that is given."""
        weights = {slot: self.plan.roster[slot].weight for slot in range(len(NODES))}
        inputs = {slot: self.inputs[slot].data for slot in over or slots}
        average = reduction.average(self.spec, PART, inputs, weights)
        record = PartRecord(
            run=self.spec.run_id, round=ROUND, sequence=PART, part=PART, commitment_set=bytes(32),
            result=chunks.content_hash(average), size_bytes=len(average), slots=slots,
        )  # fmt: skip
        return Envelope.sign(signer, record)

    def judge(self, published: Envelope, **options: Any) -> ReductionVerdict:
        return reduction_audit.judge(
            self.spec, self.plan, self.commitments, published, self.inputs, self.receipts, **options
        )


@pytest.mark.parametrize("codec_name", ["none", "int8", "int4"])
@pytest.mark.parametrize("aggregator", ["mean", "median", "trimmed_mean"])
def test_an_honest_average_is_accepted(codec_name: codec.Name, aggregator: str) -> None:
    case = Case(codec_name, aggregator)
    verdict = case.judge(case.published(0, 1, 2, 3))
    assert (verdict.outcome, verdict.slots) == (ReductionOutcome.ACCEPTED, (0, 1, 2, 3))


def test_an_average_over_other_slots_than_it_claims_is_wrong() -> None:
    case = Case()
    assert case.judge(case.published(0, 1, 2, 3, over=(1, 2, 3))).outcome is ReductionOutcome.WRONG_AVERAGE


def test_a_sender_with_a_receipt_must_not_be_left_out() -> None:
    case = Case()
    verdict = case.judge(case.published(0, 2, 3))
    assert (verdict.outcome, verdict.slots) == (ReductionOutcome.LEFT_OUT, (1,))


def test_receipts_accuse_even_where_inputs_are_not_served() -> None:
    case = Case()
    published = case.published(0, 2, 3)
    case.inputs.clear()
    assert case.judge(published).outcome is ReductionOutcome.LEFT_OUT


def test_a_sender_without_a_receipt_may_be_missing() -> None:
    case = Case()
    case.receipts = [case.receipt(0), case.receipt(3)]
    assert case.judge(case.published(0, 2, 3)).outcome is ReductionOutcome.ACCEPTED


@pytest.mark.parametrize("forged", ["by somebody else", "of another part", "of another commitment"])
def test_a_receipt_that_is_not_this_reducers_for_this_part_accuses_nobody(forged: str) -> None:
    case = Case()
    honest = case.published(0, 2, 3)
    by, part = (NODES[1] if forged == "by somebody else" else REDUCER), (0 if forged == "of another part" else PART)
    if forged == "of another commitment":
        case.commitments[1], held = case.commitments[0], case.commitments[1]
        case.receipts = [case.receipt(1)]
        case.commitments[1] = held
    else:
        case.receipts = [case.receipt(1, by, part)]
    assert case.judge(honest).outcome is ReductionOutcome.ACCEPTED


@pytest.mark.parametrize("fault", ["nothing", "other bytes", "another proof"])
def test_an_input_that_is_not_served_accuses_nobody(fault: str) -> None:
    case = Case()
    published, served = case.published(0, 1, 2, 3), case.inputs[3]
    match fault:
        case "nothing":
            del case.inputs[3]
        case "other bytes":
            case.inputs[3] = Input(case.inputs[2].data, served.proof)
        case _:
            case.inputs[3] = Input(served.data, served.proof[:-1])
    verdict = case.judge(published)
    assert (verdict.outcome, verdict.slots) == (ReductionOutcome.UNAVAILABLE, (3,))


def test_an_average_with_a_committed_input_that_is_not_sound_is_wrong() -> None:
    case = Case("none")
    published = case.published(0, 1, 2, 3)
    noise = [np.full(where.stop - where.start, np.nan, np.float32).tobytes() for where in parts.slices(case.spec)]
    case.commit(3, noise)
    case.receipts = []
    verdict = case.judge(published)
    assert verdict.outcome is ReductionOutcome.WRONG_AVERAGE
    assert "no average" in verdict.reason


def test_where_slots_are_selected_only_those_count() -> None:
    case = Case()
    counted = tuple(SlotHash(slot=slot, hash=bytes([slot]) * 32) for slot in range(4))
    selected = tuple(SlotWeight(slot=slot, weight=case.plan.roster[slot].weight) for slot in (0, 2))
    closing = SketchSet(
        run=case.spec.run_id, round=ROUND, commitment_set=bytes(32), counted=counted, excluded=(), selected=selected
    )
    assert case.judge(case.published(0, 2), closing=closing).outcome is ReductionOutcome.ACCEPTED
    stranger = case.judge(case.published(0, 2, 3), closing=closing)
    assert (stranger.outcome, stranger.slots) == (ReductionOutcome.WRONG_AVERAGE, (3,))


def test_a_record_that_is_none_of_this_round_is_not_judged() -> None:
    case = Case()
    with pytest.raises(InvalidDataError, match="nobody who reduces"):
        case.judge(case.published(1, 2, signer=NODES[0]))
    published = case.published(0, 1, 2)
    del case.commitments[0]
    with pytest.raises(InvalidDataError, match="does not have"):
        case.judge(published)


def test_each_outcome_is_one_that_a_signed_verdict_has() -> None:
    assert {outcome: outcome.vote for outcome in ReductionOutcome} == {
        ReductionOutcome.ACCEPTED: Outcome.ACCEPTED,
        ReductionOutcome.WRONG_AVERAGE: Outcome.REJECTED,
        ReductionOutcome.LEFT_OUT: Outcome.REJECTED,
        ReductionOutcome.WITHHELD: Outcome.UNAVAILABLE,
        ReductionOutcome.UNAVAILABLE: Outcome.INCONCLUSIVE,
    }


def test_a_rejection_names_the_part_and_the_round() -> None:
    case = Case()
    wrong = case.judge(case.published(0, 1, 2, 3, over=(1, 2, 3)))
    assert wrong.reason.startswith("wrong average of part 1 in round 4:")
    left_out = case.judge(case.published(0, 2, 3))
    assert left_out.reason.startswith("receipted sender left out of part 1 in round 4:")


Serve = Callable[[int, dict[str, Any]], bytes | None]
"""What the holder of a slot answers to a header; None where it refuses."""


def honest(case: Case, slot: int, header: dict[str, Any]) -> bytes | None:
    """What an honest node serves: its own input and, as the reducer, everybody's; its receipt; bytes by their hash."""
    mine = {one: case.inputs[one] for one in case.inputs if slot in (one, NODES.index(REDUCER))}
    match header["op"]:
        case "inputs":
            named = [[one, chunks.content_hash(given.data), list(given.proof)] for one, given in mine.items()]
            return encoding.encode(named)
        case "receipts":
            held = [
                one.encode() for one in case.receipts if one.open_as(PartReceipt, run=case.spec.run_id).slot == slot
            ]
            return encoding.encode(held)
        case _:
            return next((one.data for one in mine.values() if chunks.content_hash(one.data) == header["hash"]), None)


def reductions(case: Case, serve: Serve) -> Reductions:
    """What somebody has to judge by who has nothing but what the nodes of the round serve."""
    closing = CommitmentSet(run=case.spec.run_id, round=ROUND, plan=case.plan.hash, commitments=())

    async def plan(_: int) -> RoundPlan:
        return case.plan

    async def commitments(_: RoundPlan) -> Commitments:
        return Commitments(closing, case.commitments)

    async def call(peer: bytes, header: dict[str, Any], **_: Any) -> tuple[dict[str, Any], bytes]:
        body = serve([node.public_key for node in NODES].index(peer), header)
        if body is None:
            raise RefusedError("not now")
        return {}, body

    async def chunk(_: bytes, **__: Any) -> bytes:
        raise RefusedError("the coordinator does not have it")

    client = SimpleNamespace(spec=case.spec, plan=plan, commitments=commitments, chunk=chunk)
    plane = SimpleNamespace(call=call)
    return Reductions(cast(CoordinatorClient, client), cast(PeerPlane, plane))


def gathered(case: Case, published: Envelope, serve: Serve) -> ReductionVerdict:
    return asyncio.run(reductions(case, serve).judge(published))


def test_what_honest_nodes_serve_is_enough_for_a_verdict() -> None:
    case = Case()
    assert gathered(case, case.published(0, 1, 2, 3), lambda *asked: honest(case, *asked)).outcome == "accepted"
    left_out = gathered(case, case.published(0, 2, 3), lambda *asked: honest(case, *asked))
    assert (left_out.outcome, left_out.slots) == (ReductionOutcome.LEFT_OUT, (1,))


@pytest.mark.parametrize("trick", ["serves nothing of the others", "names other inputs", "serves other bytes"])
def test_a_liar_cannot_hide_inputs_that_their_senders_serve(trick: str) -> None:
    case = Case()
    own = chunks.content_hash(case.inputs[2].data)

    def serve(slot: int, header: dict[str, Any]) -> bytes | None:
        if NODES[slot] is not REDUCER:
            return honest(case, slot, header)
        if header["op"] == "inputs":
            named = [[2, own, list(case.inputs[2].proof)]]
            if trick == "names other inputs":
                named = [[one, own, list(case.inputs[one].proof)] for one in case.inputs]
            return honest(case, slot, header) if trick == "serves other bytes" else encoding.encode(named)
        if header["op"] == "get" and header["hash"] == own:
            return case.inputs[2].data
        return b"other bytes" if trick == "serves other bytes" else None

    verdict = gathered(case, case.published(0, 1, 2, 3, over=(1, 2, 3)), serve)
    assert verdict.outcome is ReductionOutcome.WRONG_AVERAGE


def test_a_reducer_that_does_not_serve_its_own_input_withholds_it() -> None:
    case = Case()
    published = case.published(0, 1, 2, 3, over=(1, 2, 3))
    verdict = gathered(case, published, lambda slot, header: None if slot == 2 else honest(case, slot, header))
    assert (verdict.outcome, verdict.slots) == (ReductionOutcome.WITHHELD, (2,))
    verdict = gathered(case, published, lambda slot, header: None if slot in (2, 3) else honest(case, slot, header))
    assert (verdict.outcome, verdict.slots) == (ReductionOutcome.UNAVAILABLE, (2, 3)), "that may be the sender's fault"


def archived(case: Case, published: Envelope) -> dict[str, bytes]:
    """What an auditor has archived of an average, by name."""

    async def collect() -> evidence.Collected:
        seen = reductions(case, lambda *asked: honest(case, *asked))
        return await collecting.average(seen, published, await seen.examine(published))

    collected = asyncio.run(collect())
    assert sum(item.size_bytes for item in collected.items) <= evidence.max_bytes(case.spec, len(NODES), PART)
    pieces = dict(collected.pieces())
    return {item.name: b"".join(pieces[one] for one in item.chunks) for item in collected.items}


@pytest.mark.parametrize(
    ("slots", "over", "outcome"),
    [((0, 1, 2, 3), (1, 2, 3), ReductionOutcome.WRONG_AVERAGE), ((0, 2, 3), (), ReductionOutcome.LEFT_OUT)],
    ids=["wrong average", "left out"],
)
def test_what_is_archived_of_an_average_is_enough_to_reject_it_again(
    slots: tuple[int, ...], over: tuple[int, ...], outcome: ReductionOutcome
) -> None:
    case = Case()
    published = case.published(*slots, over=over)
    found = archived(case, published)
    inputs, receipts = evidence.inputs_of(found, "input"), evidence.receipts_of(found)
    assert (set(inputs), len(receipts)) == (set(slots), 3)
    again = reduction_audit.judge(case.spec, case.plan, case.commitments, published, inputs, receipts)
    assert again.outcome is outcome
    assert again == case.judge(published)


@pytest.mark.parametrize("proofs", [b"", b"\xa0", encoding.encode([[1]]), encoding.encode([[1, [b"short"]]])])
def test_proofs_that_are_none_are_refused(proofs: bytes) -> None:
    with pytest.raises(InvalidDataError):
        evidence.inputs_of({"input-1": b"an input", "proofs": proofs}, "input")
