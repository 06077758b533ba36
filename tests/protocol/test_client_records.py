"""Records that a coordinator hands out are read as they were signed; forged sets and manifests are refused."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import httpx
import pytest

from swarm_protocol import encoding
from swarm_protocol.client import Commitments, CoordinatorClient, SealedRound
from swarm_protocol.errors import EncodingError, HashMismatchError, InvalidDataError, SignatureError
from swarm_protocol.identity import Identity
from swarm_protocol.layout import checkpoint_manifest
from swarm_protocol.records import (
    BeaconReveal,
    Commitment,
    CommitmentSet,
    Envelope,
    PartHeld,
    PartRecord,
    Record,
    RoundManifest,
    RoundPlan,
    Seat,
    SlotHash,
    encode_list,
)
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

T = TypeVar("T")
Ask = Callable[[CoordinatorClient], Awaitable[T]]

OWNER, ALICE, BOB, EVE = (Identity.from_seed(bytes([number]) * 32) for number in range(1, 5))
ZERO = "0" * 64
SPEC = RunSpec(
    name="test",
    seed=1,
    numerics="native",
    coordinator=OWNER.public_key.hex(),
    checkpoint=ZERO,
    beacon=ZERO,
    model=ModelSpec(vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=1),
    data=DataSpec(root=ZERO, tokenizer="bytes", train_tokens=1, held_out_windows=1),
    training=TrainingSpec(),
    exchange=ExchangeSpec(parts=2),
    outer=OuterSpec(),
    rounds=RoundsSpec(),
    audit=AuditSpec(),
)
RUN = SPEC.run_id


def answer(path: str, raw: bytes | None, ask: Ask[T]) -> T:
    """What a client makes of `raw` at `path` of its run; None is the answer that nothing is there yet."""

    def respond(request: httpx.Request) -> httpx.Response:
        assert request.url.path == f"/v1/runs/{RUN.hex()}{path}"
        return httpx.Response(204 if raw is None else 200, stream=httpx.ByteStream(raw or b""))

    async def main() -> T:
        http = httpx.AsyncClient(transport=httpx.MockTransport(respond))
        async with CoordinatorClient(http, "http://coordinator", SPEC, None) as client:
            return await ask(client)

    return asyncio.run(main())


def envelope(signer: Identity, kind: type[Record], **fields: Any) -> Envelope:
    return Envelope.sign(signer, kind(**{"run": RUN, **fields}))


def seat(node: Identity, *, reducer: bool = True) -> Seat:
    return Seat(peer=node.public_key, steps=1, weight=1, reducer=reducer)


PLAN_FIELDS: dict[str, Any] = {
    "round": 4,
    "base": b"b" * 32,
    "roster": (seat(ALICE), seat(BOB, reducer=False)),
    "cursor": 0,
    "commit_by_ms": 1,
    "exchange_by_ms": 2,
    "previous_beacon": bytes(32),
    "log_size": 0,
    "log_root": bytes(32),
}
PLAN = RoundPlan(run=RUN, **PLAN_FIELDS)


def test_a_plan_is_the_owners_for_this_run_and_round() -> None:
    def plan(raw: bytes) -> RoundPlan | None:
        return answer("/rounds/4/plan", raw, lambda client: client.plan(4))

    assert plan(Envelope.sign(OWNER, PLAN).encode()) == PLAN
    for forged, error in (
        (Envelope.sign(EVE, PLAN), SignatureError),
        (Envelope(PLAN.body, OWNER.public_key, EVE.sign(PLAN.hash)), SignatureError),
        (envelope(OWNER, RoundPlan, **PLAN_FIELDS | {"round": 5}), InvalidDataError),
        (envelope(OWNER, RoundPlan, **PLAN_FIELDS | {"run": bytes(32)}), InvalidDataError),
        (envelope(OWNER, PartHeld, round=4, part_record=bytes(32)), InvalidDataError),
    ):
        with pytest.raises(error):
            plan(forged.encode())
    with pytest.raises(EncodingError):
        plan(b"\0" * 100)


NOT_THERE_YET: dict[str, Ask[object]] = {
    "plan": lambda client: client.plan(4),
    "commitments": lambda client: client.commitments(PLAN),
    "part-records": lambda client: client.part_records(4, after=3),
    "sealing": lambda client: client.sealing(4),
    "manifest": lambda client: client.manifest(PLAN),
    "beacon": lambda client: client.beacon(4),
}


@pytest.mark.parametrize("name", NOT_THERE_YET)
def test_what_is_not_there_yet_is_none(name: str) -> None:
    assert answer(f"/rounds/4/{name}", None, NOT_THERE_YET[name]) is None


def test_a_beacon_value_is_the_owners() -> None:
    def beacon(raw: bytes) -> BeaconReveal | None:
        return answer("/rounds/4/beacon", raw, lambda client: client.beacon(4))

    fields: dict[str, Any] = {"round": 4, "value": bytes(32), "manifest": bytes(32), "openings": ()}
    assert beacon(envelope(OWNER, BeaconReveal, **fields).encode()) == BeaconReveal(run=RUN, **fields)
    with pytest.raises(SignatureError):
        beacon(envelope(EVE, BeaconReveal, **fields).encode())


def test_a_record_is_the_one_asked_for() -> None:
    def record(served: Envelope) -> Envelope:
        return answer(f"/records/{PLAN.hash.hex()}", served.encode(), lambda client: client.record(PLAN.hash))

    assert record(Envelope.sign(OWNER, PLAN)).open() == PLAN
    with pytest.raises(HashMismatchError):
        record(envelope(OWNER, RoundPlan, **PLAN_FIELDS | {"cursor": 1}))
    with pytest.raises(SignatureError):
        record(Envelope(PLAN.body, OWNER.public_key, bytes(64)))


def commitment(slot: int, signer: Identity, **changes: Any) -> Envelope:
    fields: dict[str, Any] = {
        "round": 4,
        "plan": PLAN.hash,
        "slot": slot,
        "tokens": 1,
        "trace_root": bytes(32),
        "parts_root": bytes(32),
        "nonce_hash": bytes(32),
        "fingerprint": bytes(32),
        "train_loss": 1.0,
    }
    return envelope(signer, Commitment, **fields | changes)


def closing(*entries: tuple[int, Envelope], signer: Identity = OWNER, plan: bytes = PLAN.hash) -> Envelope:
    named = tuple(SlotHash(slot=slot, hash=entry.open().hash) for slot, entry in entries)
    return envelope(signer, CommitmentSet, round=4, plan=plan, commitments=named)


OF_ALICE, OF_BOB = commitment(0, ALICE), commitment(1, BOB)
BOTH = closing((0, OF_ALICE), (1, OF_BOB))
FORGED_COMMITMENTS = {
    "nothing at all": [],
    "a set by somebody else": [closing((0, OF_ALICE), (1, OF_BOB), signer=EVE), OF_ALICE, OF_BOB],
    "a set for another plan": [closing((0, OF_ALICE), (1, OF_BOB), plan=bytes(32)), OF_ALICE, OF_BOB],
    "no set": [OF_ALICE, OF_BOB],
    "one commitment too few": [BOTH, OF_ALICE],
    "one commitment too many": [BOTH, OF_ALICE, OF_BOB, OF_BOB],
    "in another order": [BOTH, OF_BOB, OF_ALICE],
    "by another key": [closing((0, commitment(0, EVE))), commitment(0, EVE)],
    "by the holder of another slot": [closing((0, commitment(0, BOB))), commitment(0, BOB)],
    "for another slot": [closing((0, commitment(1, ALICE))), commitment(1, ALICE)],
    "for a slot beyond the roster": [closing((2, commitment(2, EVE))), commitment(2, EVE)],
    "for another plan": [closing((0, commitment(0, ALICE, plan=bytes(32)))), commitment(0, ALICE, plan=bytes(32))],
    "of another round": [closing((0, commitment(0, ALICE, round=5))), commitment(0, ALICE, round=5)],
    "of another run": [closing((0, commitment(0, ALICE, run=bytes(32)))), commitment(0, ALICE, run=bytes(32))],
    "not the one that is named": [BOTH, commitment(0, ALICE, tokens=2), OF_BOB],
    "one slot twice": [closing((0, OF_ALICE), (0, OF_ALICE)), OF_ALICE, OF_ALICE],
}


def read_commitments(served: list[Envelope]) -> Commitments | None:
    return answer("/rounds/4/commitments", encode_list(served), lambda client: client.commitments(PLAN))


def test_the_commitments_of_a_round_are_read_by_slot() -> None:
    found = read_commitments([BOTH, OF_ALICE, OF_BOB])
    assert found is not None
    assert found.closing == BOTH.open()
    assert found.by_slot == {0: OF_ALICE.open(), 1: OF_BOB.open()}


@pytest.mark.parametrize("forged", FORGED_COMMITMENTS.values(), ids=FORGED_COMMITMENTS.keys())
def test_a_forged_commitment_set_is_refused(forged: list[Envelope]) -> None:
    with pytest.raises(InvalidDataError):
        read_commitments(forged)


def part_record(part: int, signer: Identity, **changes: Any) -> Envelope:
    fields: dict[str, Any] = {
        "round": 4,
        "sequence": part,
        "part": part,
        "commitment_set": BOTH.open().hash,
        "result": bytes(32),
        "size_bytes": 10,
        "slots": (0, 1),
    }
    return envelope(signer, PartRecord, **fields | changes)


def manifest(*parts: Envelope | None, signer: Identity = OWNER, **changes: Any) -> Envelope:
    fields: dict[str, Any] = {
        "round": 4,
        "plan": PLAN.hash,
        "commitment_set": BOTH.open().hash,
        "parts": tuple(None if part is None else part.open().hash for part in parts),
        "base": PLAN.base,
        "root": bytes(32),
    }
    return envelope(signer, RoundManifest, **fields | changes)


FIRST, SECOND = part_record(0, ALICE), part_record(1, ALICE)
FORGED_MANIFESTS = {
    "nothing at all": [],
    "by somebody else": [manifest(FIRST, SECOND, signer=EVE), FIRST, SECOND],
    "for another plan": [manifest(FIRST, SECOND, plan=bytes(32)), FIRST, SECOND],
    "from another base": [manifest(FIRST, SECOND, base=bytes(32)), FIRST, SECOND],
    "of another round": [manifest(FIRST, SECOND, round=5), FIRST, SECOND],
    "a part record that is not there": [manifest(FIRST, SECOND), FIRST],
    "a part record at the place of another": [manifest(SECOND, FIRST), FIRST, SECOND],
    "a part record by a node that does not reduce": [manifest(None, part_record(1, BOB)), part_record(1, BOB)],
    "a part record by a stranger": [manifest(None, part_record(1, EVE)), part_record(1, EVE)],
    "a part record of another round": [
        manifest(None, part_record(1, ALICE, round=3)),
        part_record(1, ALICE, round=3),
    ],
    "a part record with a false signature": [
        manifest(FIRST, None),
        Envelope(FIRST.body, FIRST.key, EVE.sign(FIRST.open().hash)),
    ],
    "too few parts": [manifest(FIRST), FIRST],
    "too many parts": [manifest(FIRST, SECOND, None), FIRST, SECOND],
}


FOLLOWING = Envelope.sign(OWNER, checkpoint_manifest(SPEC, 5, bytes(32), PLAN.base))


def read_manifest(served: list[Envelope], following: Envelope = FOLLOWING) -> SealedRound | None:
    """What the client makes of these, with the manifest of the following checkpoint in the second place."""
    raw = encode_list([*served[:1], following, *served[1:]] if served else [])
    return answer("/rounds/4/manifest", raw, lambda client: client.manifest(PLAN))


def test_a_manifest_names_its_part_records_and_their_reducers() -> None:
    sealed = read_manifest([manifest(FIRST, None), FIRST])
    assert sealed is not None
    assert sealed.checkpoint == FOLLOWING.open()
    assert sealed.manifest == manifest(FIRST, None).open()
    assert sealed.part_records == {FIRST.open().hash: (FIRST.open(), ALICE.public_key)}


@pytest.mark.parametrize(
    "forged",
    [
        Envelope.sign(EVE, FOLLOWING.open()),
        Envelope.sign(OWNER, checkpoint_manifest(SPEC, 4, bytes(32), PLAN.base)),
        FIRST,
    ],
    ids=["by somebody else", "of another round", "none"],
)
def test_a_forged_manifest_of_the_checkpoint_is_refused(forged: Envelope) -> None:
    with pytest.raises(InvalidDataError):
        read_manifest([manifest(FIRST, None), FIRST], forged)


@pytest.mark.parametrize("forged", FORGED_MANIFESTS.values(), ids=FORGED_MANIFESTS.keys())
def test_a_forged_manifest_is_refused(forged: list[Envelope]) -> None:
    with pytest.raises(InvalidDataError):
        read_manifest(forged)


def test_what_will_be_sealed_is_a_list_of_hashes_and_gaps() -> None:
    def sealing(value: object) -> list[bytes | None] | None:
        return answer("/rounds/4/sealing", encoding.encode(value), lambda client: client.sealing(4))

    assert sealing([bytes(32), None]) == [bytes(32), None]
    for wrong in ({"a": 1}, ["text"], [1], None):
        with pytest.raises(EncodingError):
            sealing(wrong)


def test_all_part_records_of_a_round_come_in_order() -> None:
    raw = encode_list([SECOND, FIRST])
    assert answer("/rounds/4/part-records", raw, lambda client: client.part_records(4)) == [SECOND, FIRST]
