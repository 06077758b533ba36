"""What a reducer makes of a part is the aggregate of the whole vectors, in pieces or not."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from swarm_protocol import aggregate, codec, parts, reduction
from swarm_protocol.errors import InvalidDataError
from swarm_protocol.spec import ExchangeSpec, ModelSpec, RunSpec

WEIGHTS = {0: 5, 2: 1, 3: 7, 8: 2}


def spec_of(run_spec: RunSpec, codec_name: codec.Name, aggregator: aggregate.Name) -> RunSpec:
    model = ModelSpec(vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    exchange = ExchangeSpec(parts=1, codec=codec_name, aggregator=aggregator)
    return run_spec.model_copy(update={"model": model, "exchange": exchange})


def inputs_of(spec: RunSpec) -> dict[int, bytes]:
    numel = spec.model.num_parameters
    values = np.random.default_rng(3).standard_normal((len(WEIGHTS), numel)).astype(np.float32)
    values[0, :300] = 0.0
    encode = codec.get(spec.exchange.codec).encode
    return {slot: encode(row) for slot, row in zip(WEIGHTS, values, strict=True)}


@pytest.mark.parametrize("aggregator", get_args(aggregate.Name))
@pytest.mark.parametrize("name", get_args(codec.Name))
def test_an_average_is_the_encoded_aggregate_of_the_decoded_inputs(
    name: codec.Name, aggregator: aggregate.Name, run_spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(run_spec, name, aggregator)
    inputs, entry, numel = inputs_of(spec), codec.get(name), spec.model.num_parameters
    assert numel % codec.PIECE_ELEMENTS, "the last piece ends within a block"
    whole = aggregate.start(aggregator, WEIGHTS, numel)
    for slot in WEIGHTS:
        whole.add(slot, entry.decode(inputs[slot], numel))
    expected = entry.encode(whole.result())
    for piece_elements in (codec.PIECE_ELEMENTS, 4096, 1 << 20):
        monkeypatch.setattr(reduction, "_PIECE_ELEMENTS", piece_elements)
        # In whatever order inputs came, and wherever they lie.
        given = {slot: memoryview(inputs[slot]) for slot in reversed(inputs)}
        assert reduction.average(spec, 0, given, WEIGHTS) == expected


def test_an_input_that_is_not_canonical_makes_no_average(run_spec: RunSpec) -> None:
    spec = spec_of(run_spec, "int8", "mean")
    inputs = inputs_of(spec)
    inputs[3] = inputs[3][:-1] + b"\x80"
    with pytest.raises(InvalidDataError, match="-128"):
        reduction.average(spec, 0, inputs, WEIGHTS)
    assert len(parts.slices(spec)) == 1
