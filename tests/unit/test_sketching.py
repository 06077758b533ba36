"""Who publishes sketches in a round, what one sender's have to be, and what they select."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from swarm_protocol import chunks, merkle, parts, sketch, sketching
from swarm_protocol.errors import InvalidDataError
from swarm_protocol.records import Commitment, Seat, Sketches, SketchObjection
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
CLOSING = bytes(range(32))
SPEC = RunSpec(
    name="test",
    seed=1,
    numerics="native",
    coordinator=ZERO,
    checkpoint=ZERO,
    beacon=ZERO,
    model=ModelSpec(vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=1),
    data=DataSpec(root=ZERO, tokenizer="bytes", train_tokens=1, held_out_windows=1),
    training=TrainingSpec(),
    exchange=ExchangeSpec(parts=3),
    outer=OuterSpec(),
    rounds=RoundsSpec(),
    audit=AuditSpec(),
)


def roster(*weights: int) -> list[Seat]:
    return [Seat(peer=bytes([slot]) * 32, steps=1, weight=weight, reducer=True) for slot, weight in enumerate(weights)]


def encoded(number: int, scale: float = 1.0) -> list[bytes]:
    start = np.zeros(SPEC.model.num_parameters, np.float32)
    rng = np.random.default_rng(number)
    return parts.encode_parts(SPEC, start, np.float32(scale) * rng.standard_normal(start.size, dtype=np.float32))


def commitment(**changes: Any) -> Commitment:
    fields: dict[str, Any] = {
        "run": SPEC.run_id, "round": 3, "plan": bytes(32), "slot": 1, "tokens": 1, "trace_root": bytes(32),
        "parts_root": parts.parts_root(parts.part_hashes(encoded(1))), "nonce_hash": bytes(32),
        "fingerprint": bytes(32), "train_loss": 1.0,
    }  # fmt: skip
    return Commitment(**(fields | changes))


def signed(made: list[bytes], **changes: Any) -> Sketches:
    fields: dict[str, Any] = {
        "run": SPEC.run_id, "round": 3, "sequence": 1, "commitment_set": CLOSING, "commitment": commitment().hash,
        "slot": 1, "root": sketch.root(made), "blob": chunks.content_hash(b"".join(made)),
    }  # fmt: skip
    return Sketches(**(fields | changes))


def test_only_slots_with_weight_count_for_whether_sketches_are_needed() -> None:
    assert sketching.candidates(roster(5, 0, 3), [2, 0, 1]) == {0: 5, 2: 3}
    assert sketching.needed("multi_krum", roster(*[1] * 8), range(7))
    assert not sketching.needed("multi_krum", roster(*[1] * 8), range(6))
    assert not sketching.needed("multi_krum", roster(0, 0, *[1] * 6), range(8))
    assert sketching.needed("centered_clip", roster(1), [0])
    assert not sketching.needed("centered_clip", roster(0), [0])
    assert not sketching.needed("mean", roster(*[1] * 8), range(8))


def test_ones_sketches_come_back_from_their_bytes() -> None:
    made = sketching.of_parts(SPEC, CLOSING, encoded(1))
    decoded = sketching.decode(SPEC, signed(made), b"".join(made))
    assert [sketch.encode(one) for one in decoded] == sketching.split(b"".join(made)) == made
    assert len(b"".join(made)) == sketching.blob_bytes(SPEC)
    for part, data in enumerate(encoded(1)):
        where = sketching.projection(SPEC, CLOSING, part)
        assert sketching.part_matches(SPEC, where, part, data, made[part])
        assert not sketching.part_matches(SPEC, where, part, data, made[part - 1])
        proof = merkle.proof([chunks.content_hash(one) for one in made], part)
        sketching.require_sketch(SPEC, signed(made), part, made[part], proof)


def test_bytes_that_were_not_signed_are_no_sketches() -> None:
    made = sketching.of_parts(SPEC, CLOSING, encoded(1))
    blob = b"".join(made)
    for wrong in (b"", blob[:-4], blob + bytes(4), blob[sketch.SIZE_BYTES :] + made[0]):
        with pytest.raises(InvalidDataError):
            sketching.decode(SPEC, signed(made), wrong)
    with pytest.raises(InvalidDataError, match="root"):
        sketching.decode(SPEC, signed(made, root=bytes(32)), blob)
    nan = [b"\xff" * sketch.SIZE_BYTES, *made[1:]]
    with pytest.raises(InvalidDataError, match="not finite"):
        sketching.decode(SPEC, signed(nan), b"".join(nan))


@pytest.mark.parametrize(
    "changes",
    [{"round": 4}, {"sequence": 0}, {"slot": 2}, {"commitment_set": bytes(32)}, {"commitment": bytes(32)}],
    ids=str,
)
def test_sketches_belong_to_one_commitment_of_one_set(changes: dict[str, Any]) -> None:
    made = sketching.of_parts(SPEC, CLOSING, encoded(1))
    sketching.require_for(signed(made), CLOSING, commitment())
    with pytest.raises(InvalidDataError, match="do not belong"):
        sketching.require_for(signed(made, **changes), CLOSING, commitment())


def test_an_objection_is_about_a_part_that_was_committed_to() -> None:
    hashes = parts.part_hashes(encoded(1))
    fields: dict[str, Any] = {"run": SPEC.run_id, "round": 3, "slot": 1, "sketches": bytes(32)}
    right = SketchObjection(**fields, part=2, part_hash=hashes[2], proof=merkle.proof(hashes, 2))
    sketching.require_committed(SPEC, right, commitment())
    for wrong in ({"part": 1}, {"part": 3}, {"part_hash": hashes[1]}, {"proof": ()}):
        with pytest.raises(InvalidDataError):
            sketching.require_committed(SPEC, right.model_copy(update=wrong), commitment())


def test_an_unsound_part_matches_no_sketch() -> None:
    where = sketching.projection(SPEC, CLOSING, 0)
    assert not sketching.part_matches(SPEC, where, 0, b"", bytes(sketch.SIZE_BYTES))


def test_the_outlier_and_who_has_no_sketches_are_not_selected() -> None:
    sketches = {
        slot: [sketch.decode(one) for one in sketching.of_parts(SPEC, CLOSING, encoded(slot, -10 if slot == 3 else 1))]
        for slot in range(9)
    }
    seats = roster(*range(10, 19))
    everybody = {slot: 10 + slot for slot in range(9) if slot != 3}
    assert sketching.select(SPEC, seats, range(9), sketches) == everybody
    del sketches[8]
    assert sketching.select(SPEC, seats, range(9), sketches) == {slot: 10 + slot for slot in (0, 1, 2, 4, 5, 6, 7)}
    assert sketching.select(SPEC, seats, range(9), {}) == {}
