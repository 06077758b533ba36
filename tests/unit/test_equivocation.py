"""Two records under one name prove what their signer did; nothing else proves anything."""

from __future__ import annotations

import dataclasses

import pytest

from swarm_protocol import equivocation
from swarm_protocol.errors import InvalidDataError
from swarm_protocol.identity import Identity
from swarm_protocol.records import Envelope, Equivocation, PartRecord, Ready, Record, parse

RUN = bytes([1]) * 32
LIAR = Identity.from_seed(bytes([2]) * 32)
OTHER = Identity.from_seed(bytes([3]) * 32)


def part_record(**changes: object) -> PartRecord:
    fields = {
        "run": RUN, "round": 4, "sequence": 7, "part": 7, "commitment_set": bytes(32), "result": bytes(32),
        "size_bytes": 10, "slots": (0, 1),
    }  # fmt: skip
    return PartRecord.model_validate(fields | changes)


def signed(record: Record, identity: Identity = LIAR) -> Envelope:
    return Envelope.sign(identity, record)


FIRST = signed(part_record())


@pytest.mark.parametrize("change", [{"result": b"x" * 32}, {"slots": (0,)}, {"commitment_set": b"x" * 32}])
def test_two_different_part_records_of_one_part_prove_an_equivocation(change: dict[str, object]) -> None:
    proved = equivocation.prove(FIRST, signed(part_record(**change)), run=RUN)
    assert (proved.key, proved.kind, proved.round, proved.sequence) == (LIAR.public_key, "part-record", 4, 7)
    assert proved.what == "signed two different records of kind part-record for round 4, sequence 7"


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (FIRST, "same record"),
        (signed(part_record(result=b"x" * 32), OTHER), "different signers"),
        (signed(part_record(round=5)), "different names"),
        (signed(part_record(sequence=8)), "different names"),
        (signed(part_record(run=b"x" * 32)), "another run"),
    ],
)
def test_anything_else_proves_nothing(second: Envelope, reason: str) -> None:
    with pytest.raises(InvalidDataError, match=reason):
        equivocation.prove(FIRST, second, run=RUN)


def test_a_forged_signature_proves_nothing() -> None:
    forged = dataclasses.replace(signed(part_record(result=b"x" * 32), OTHER), key=LIAR.public_key)
    with pytest.raises(InvalidDataError, match="signature"):
        equivocation.prove(FIRST, forged, run=RUN)


def test_a_heartbeat_may_be_signed_anew() -> None:
    def ready(tokens_per_s: float) -> Envelope:
        record = Ready(
            run=RUN, round=1, base=bytes(32), tokens_per_s=tokens_per_s, can_reduce=True, upload_bytes_per_s=0
        )
        return signed(record)

    with pytest.raises(InvalidDataError, match="may be signed anew"):
        equivocation.prove(ready(1.0), ready(2.0), run=RUN)


def test_a_report_carries_its_proof_whoever_signs_it() -> None:
    second = signed(part_record(slots=(1,)))
    report = Equivocation(run=RUN, round=4, first=FIRST.encode(), second=second.encode())
    again = parse(signed(report, OTHER).body)
    assert isinstance(again, Equivocation)
    assert equivocation.proved_by(again).key == LIAR.public_key
    with pytest.raises(InvalidDataError, match="another round"):
        equivocation.proved_by(report.model_copy(update={"round": 5}))
    with pytest.raises(InvalidDataError):
        equivocation.proved_by(report.model_copy(update={"first": b"nothing"}))
