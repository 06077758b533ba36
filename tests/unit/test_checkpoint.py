"""The same averages turn the same checkpoint into the same next one; what is not sound counts as missing."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_protocol import chunks, codec, parts
from swarm_protocol.checkpoint import Checkpoint, advance, decode_average
from swarm_protocol.errors import HashMismatchError, InvalidDataError
from swarm_protocol.outer import outer_step
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
PARTS = 3
F32 = npt.NDArray[np.float32]


def run_spec(codec_name: codec.Name = "int4", max_norm: float = 1e4) -> RunSpec:
    return RunSpec(
        name="test",
        seed=1,
        numerics="native",
        coordinator=ZERO,
        checkpoint=ZERO,
        beacon=ZERO,
        model=ModelSpec(vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=1),
        data=DataSpec(root=ZERO, tokenizer="bytes", train_tokens=1, held_out_windows=1),
        training=TrainingSpec(),
        exchange=ExchangeSpec(parts=PARTS, codec=codec_name, max_norm=max_norm),
        outer=OuterSpec(lr=0.7, momentum=0.9),
        rounds=RoundsSpec(),
        audit=AuditSpec(),
    )


SPEC = run_spec()
NUMEL = SPEC.model.num_parameters
SLICES = parts.slices(SPEC)


def vector(seed: int) -> F32:
    return np.random.default_rng(seed).standard_normal(NUMEL, dtype=np.float32)


START = Checkpoint(5, vector(1), vector(2))


def averages(spec: RunSpec = SPEC, seed: int = 3) -> list[bytes]:
    encode = codec.get(spec.exchange.codec).encode
    return [encode(vector(seed)[where]) for where in SLICES]


def expected(pseudo_gradient: F32) -> tuple[bytes, bytes]:
    parameters, momentum = outer_step(SPEC.outer, START.parameters, START.momentum, pseudo_gradient)
    return parameters.tobytes(), momentum.tobytes()


def as_bytes(checkpoint: Checkpoint) -> tuple[bytes, bytes]:
    return checkpoint.parameters.tobytes(), checkpoint.momentum.tobytes()


@pytest.mark.parametrize("name", ["none", "int8", "int4"])
def test_with_all_parts_the_outer_step_is_taken_on_the_decoded_averages(name: codec.Name) -> None:
    spec = run_spec(name)
    encoded = averages(spec)
    pseudo_gradient = np.concatenate([parts.decode_part(spec, part, data) for part, data in enumerate(encoded)])
    after = advance(spec, START, encoded)
    assert after.round == 6
    assert as_bytes(after) == expected(pseudo_gradient)


def test_without_any_part_the_momentum_runs_on() -> None:
    after = advance(SPEC, START, [None] * PARTS)
    assert after.round == 6
    assert as_bytes(after) == expected(np.zeros(NUMEL, np.float32))
    assert after.root != START.root


@given(missing=st.sets(st.integers(0, PARTS - 1)))
def test_a_missing_part_is_a_zero_pseudo_gradient_there_and_changes_nothing_elsewhere(missing: set[int]) -> None:
    encoded = averages()
    pseudo_gradient = np.zeros(NUMEL, np.float32)
    for part in set(range(PARTS)) - missing:
        pseudo_gradient[SLICES[part]] = parts.decode_part(SPEC, part, encoded[part])
    given_parts = [None if part in missing else data for part, data in enumerate(encoded)]
    assert as_bytes(advance(SPEC, START, given_parts)) == expected(pseudo_gradient)


def not_sound(spec: RunSpec) -> dict[str, bytes]:
    size = SLICES[1].stop - SLICES[1].start
    huge, nan = np.full(size, 1e6, np.float32), np.zeros(size, np.float32)
    nan[7] = np.nan
    good = averages(spec)[1]
    return {
        "empty": b"",
        "short": good[:-1],
        "long": good + b"\0",
        "of another part": averages(spec)[0] + b"\0" * 64,
        "not finite": nan.tobytes() + good[nan.nbytes :],
        "beyond the norm bound": codec.get(spec.exchange.codec).encode(huge),
    }


@pytest.mark.parametrize("codec_name", ["none", "int4"])
@pytest.mark.parametrize("fault", not_sound(SPEC))
def test_an_average_that_is_not_sound_counts_as_missing(fault: str, codec_name: codec.Name) -> None:
    spec = run_spec(codec_name)
    encoded = averages(spec)
    bad = not_sound(spec)[fault]
    with pytest.raises(InvalidDataError):
        decode_average(spec, 1, bad)
    with_bad = advance(spec, START, [encoded[0], bad, encoded[2]])
    assert with_bad.root == advance(spec, START, [encoded[0], None, encoded[2]]).root


def test_an_average_exactly_at_the_norm_bound_is_sound() -> None:
    values = np.zeros(SLICES[0].stop - SLICES[0].start, np.float32)
    values[:2] = 3.0, 4.0
    assert decode_average(run_spec("none", max_norm=5.0), 0, values.tobytes()).tobytes() == values.tobytes()
    values[2] = np.float32(1e-3)
    with pytest.raises(InvalidDataError, match=r"norm bound 5\.0"):
        decode_average(run_spec("none", max_norm=5.0), 0, values.tobytes())


@pytest.mark.parametrize("count", [0, PARTS - 1, PARTS + 1])
def test_another_number_of_parts_is_refused(count: int) -> None:
    for data in (None, b"bytes"):
        with pytest.raises(InvalidDataError, match=f"{count} averages where this run has {PARTS} parts"):
            advance(SPEC, START, [data] * count)


def test_a_step_that_leaves_the_finite_numbers_is_refused() -> None:
    edge = Checkpoint(0, np.full(NUMEL, np.finfo(np.float32).max, np.float32), vector(2) * 0 - np.float32(1e38))
    with pytest.raises(InvalidDataError, match="finite"):
        advance(SPEC, edge, [None] * PARTS)


def test_everybody_gets_the_same_root_and_the_old_checkpoint_stays() -> None:
    before = as_bytes(START)
    assert advance(SPEC, START, averages()).root == advance(SPEC, START, averages()).root
    assert as_bytes(START) == before


def test_the_root_is_that_of_parameters_then_momentum() -> None:
    whole = START.parameters.tobytes() + START.momentum.tobytes()
    assert START.root == chunks.manifest_of(whole).root == START.manifest.root
    assert Checkpoint(5, START.momentum, START.parameters).root != START.root
    assert Checkpoint(6, *START.buffers).root == START.root


def test_a_checkpoint_comes_back_from_its_bytes() -> None:
    whole = b"".join(buffer.tobytes() for buffer in START.buffers)
    for data in (whole, bytearray(whole), memoryview(whole)):
        back = Checkpoint.from_bytes(SPEC, 5, data, START.root)
        assert (back.round, as_bytes(back)) == (5, as_bytes(START))


def test_the_first_checkpoint_has_no_momentum() -> None:
    initial = Checkpoint.initial(vector(1))
    assert (initial.round, initial.momentum.tobytes()) == (0, bytes(4 * NUMEL))


@pytest.mark.parametrize("change", [-8, -1, 1, 8])
def test_bytes_of_another_length_are_no_checkpoint(change: int) -> None:
    data: Any = bytes(8 * NUMEL + change)
    with pytest.raises(HashMismatchError, match=f"{8 * NUMEL} bytes"):
        Checkpoint.from_bytes(SPEC, 0, data, chunks.manifest_of(data).root)


def test_bytes_of_another_root_are_not_the_checkpoint() -> None:
    whole = bytearray(b"".join(buffer.tobytes() for buffer in START.buffers))
    whole[-1] ^= 1
    with pytest.raises(HashMismatchError, match="root"):
        Checkpoint.from_bytes(SPEC, 5, whole, START.root)
