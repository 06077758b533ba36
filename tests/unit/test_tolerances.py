"""Tolerance files: what they say of a pair of runtimes, and what is not taken for one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_coordinator.init import Options, initialise
from swarm_coordinator.run_directory import RunDirectory
from swarm_coordinator.store import Store
from swarm_protocol import tolerances
from swarm_protocol.errors import ConfigurationError, InvalidDataError
from swarm_protocol.spec import AuditSpec, ModelSpec, RunConfig, TrainingSpec
from swarm_protocol.tolerances import Bounds, Pair, Precision, Tolerances

A, B, C = (bytes([number]) * 32 for number in (1, 2, 3))


def file(model: ModelSpec | None = None, training: TrainingSpec | None = None) -> Tolerances:
    pairs = (
        Pair(runtimes=(A.hex(), A.hex()), worst_honest=0.0, accept=1e-5, reject=1e-4),
        Pair(runtimes=(A.hex(), B.hex()), worst_honest=5e-6, accept=6e-5, reject=8e-4),
    )
    return Tolerances(
        model=model or ModelSpec(),
        training=training or TrainingSpec(),
        contributions=3,
        runtimes={A.hex(): {"threads": 1, "cpu": "this"}, B.hex(): {"threads": 2, "cpu": "this"}},
        precisions={
            "float32": Precision(
                worst_honest=5e-6,
                mildest_cheat=1e-2,
                margin_orders=3.3,
                honest={"1 thread": 5e-6},
                cheats={"learning-rate": 1e-2},
                pairs=pairs,
            )
        },
    )


def test_a_file_says_the_same_after_a_trip_through_its_bytes() -> None:
    encoded = file().encode()
    assert Tolerances.decode(encoded) == file()
    assert encoded == json.dumps(json.loads(encoded), sort_keys=True, indent=1).encode() + b"\n"


def test_a_pair_is_found_in_either_order_and_others_are_not_calibrated() -> None:
    assert file().bounds("float32", A, B) == file().bounds("float32", B, A) == Bounds(6e-5, 8e-4)
    assert file().bounds("float32", A, A) == Bounds(1e-5, 1e-4)
    assert file().bounds("float32", B, C) is None
    assert file().bounds("bfloat16", A, B) is None


def changed(value: dict[str, Any], *path: str | int, to: object) -> dict[str, Any]:
    inner: Any = value
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = to
    return value


PAIR = ("precisions", "float32", "pairs", 1)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda value: changed(value, "version", to=2),
        lambda value: changed(value, "contributions", to=0),
        lambda value: changed(value, "surprise", to=1),
        lambda value: changed(value, *PAIR, "accept", to="6e-5"),
        lambda value: changed(value, *PAIR, "accept", to=1e-3),
        lambda value: changed(value, *PAIR, "worst_honest", to=1e-4),
        lambda value: changed(value, *PAIR, "reject", to=2e-2),
        lambda value: changed(value, *PAIR, "runtimes", to=[B.hex(), A.hex()]),
        lambda value: changed(value, *PAIR, "runtimes", to=[A.hex()]),
        lambda value: changed(value, *PAIR, "runtimes", to=[A.hex(), "b"]),
        lambda value: changed(value, "precisions", to={}),
        lambda value: changed(value, "precisions", to={"float8": value["precisions"]["float32"]}),
    ],
    ids=range(12),
)
def test_what_breaks_a_rule_is_refused(break_it: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    broken = break_it(json.loads(file().encode()))
    with pytest.raises(InvalidDataError, match="tolerance file"):
        Tolerances.decode(json.dumps(broken, sort_keys=True, indent=1).encode() + b"\n")


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"\xff", b"null", b" " * (tolerances.MAX_BYTES + 1), file().encode()[:-1], file().encode() + b"\n"],
    ids=["empty", "no fields", "no text", "null", "too long", "one byte less", "one byte more"],
)
def test_bytes_that_are_no_canonical_file_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidDataError, match="tolerance file"):
        Tolerances.decode(data)


@given(st.floats(1e-12, 1e-2), st.floats(1.0, 6.0), st.floats(0.0, 1.0))
def test_bounds_lie_between_noise_and_cheats(worst: float, orders: float, quiet: float) -> None:
    mildest = worst * 10**orders
    bounds = tolerances.place(worst * quiet, mildest, least=worst)
    assert worst < bounds.accept < bounds.reject < mildest


@pytest.mark.parametrize(
    ("worst", "mildest"), [(1e-2, 1e-2), (1e-2, 2e-2), (1e-2, 1e-3), (1e-2, 0.0), (float("inf"), 1.0)]
)
def test_noise_that_reaches_the_cheats_gives_no_bounds(worst: float, mildest: float) -> None:
    with pytest.raises(ConfigurationError, match="too close"):
        tolerances.place(worst, mildest, least=1e-6)


def config(**audit: Any) -> RunConfig:
    model = ModelSpec(hidden_size=16, intermediate_size=16, num_hidden_layers=1, max_position_embeddings=16)
    return RunConfig(numerics="native", model=model, audit=AuditSpec(**audit))


def make(tmp_path: Path, config: RunConfig, content: bytes | None) -> Any:
    text, path = tmp_path / "text", tmp_path / "tolerances.json"
    text.write_bytes(b"the quick brown fox " * 2000)
    if content is not None:
        path.write_bytes(content)
    return initialise(Options(tmp_path / "run", config, [text], tolerances=None if content is None else path))


def test_a_run_seals_the_hash_and_serves_the_file(tmp_path: Path) -> None:
    content = file(config().model, config().training).encode()
    spec = make(tmp_path, config(), content)
    digest = bytes.fromhex(spec.audit.tolerance_file)
    assert Store(RunDirectory(tmp_path / "run").objects).get(digest) == content


def test_a_file_for_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="another model"):
        make(tmp_path, config(), file().encode())
    other = config().training.model_copy(update={"steps": 7})
    with pytest.raises(ConfigurationError, match=r"another training \(steps"):
        make(tmp_path, config(), file(config().model, other).encode())


def test_a_file_that_is_none_or_is_not_given_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="not valid"):
        make(tmp_path, config(), b"{}")
    with pytest.raises(ConfigurationError, match="--tolerances"):
        make(tmp_path, config(tolerance_file="1" * 64), None)
    with pytest.raises(ConfigurationError, match="another file"):
        make(tmp_path, config(tolerance_file="1" * 64), file(config().model, config().training).encode())


def test_exact_runs_have_no_tolerances(tmp_path: Path) -> None:
    exact = config().model_copy(update={"numerics": "exact"})
    with pytest.raises(ConfigurationError, match="compare hashes"):
        make(tmp_path, exact, file(exact.model, exact.training).encode())
