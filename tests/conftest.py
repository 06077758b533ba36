"""Fixtures that every test may use."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

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

_GOLDEN = Path(__file__).parent / "fixtures" / "golden"

# Examples run beside other work on small machines, where a deadline per example says nothing about the code.
settings.register_profile("swarm", deadline=None)
settings.load_profile("swarm")


@pytest.fixture
def golden() -> Callable[[str, dict[str, object]], None]:
    """`golden(name, vectors)` asserts that `vectors` are those of fixtures/golden/<name>.json, and names any that differ.

    With SWARM_WRITE_GOLDEN=1 it merges them into the file instead, so that several tests may share one. A vector of the
    exact domain that changes is a new protocol version.
    """

    def check(name: str, vectors: dict[str, object]) -> None:
        found = json.loads(json.dumps(vectors))
        path = _GOLDEN / f"{name}.json"
        pinned = json.loads(path.read_text()) if path.exists() else {}
        if os.environ.get("SWARM_WRITE_GOLDEN") == "1":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(pinned | found, indent=1, sort_keys=True) + "\n")
            return
        wrong = {key: value for key, value in found.items() if key not in pinned or pinned[key] != value}
        assert not wrong, f"{path.name}: these vectors changed (a new protocol version?) or were never pinned: {wrong}"

    return check


@pytest.fixture(scope="session")
def run_spec() -> RunSpec:
    """A sealed run of a tiny model, with everything else as it comes."""
    zero = "0" * 64
    return RunSpec(
        name="test",
        seed=1,
        numerics="native",
        coordinator=zero,
        checkpoint=zero,
        beacon=zero,
        model=ModelSpec(vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=1),
        data=DataSpec(root=zero, tokenizer="bytes", train_tokens=1, held_out_windows=1),
        training=TrainingSpec(),
        exchange=ExchangeSpec(),
        outer=OuterSpec(),
        rounds=RoundsSpec(),
        audit=AuditSpec(),
    )
