"""Fixtures that every test may use."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
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

# A shell that starts the tests in the background lets them ignore Ctrl-C, and everything that they start would as well.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

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


def _beside(name: str) -> Any:
    """The module in the file of this name beside this one."""
    specification = importlib.util.spec_from_file_location(f"tests_{name}", Path(__file__).with_name(f"{name}.py"))
    assert specification is not None
    assert specification.loader is not None
    module = sys.modules[specification.name] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def make_chain(run_spec: RunSpec) -> Callable[..., Any]:
    """`make_chain(codec="int8", keep_rounds=4, snapshot_every=10)`: a chain of checkpoints of a tiny model (`chain.py`)."""
    chain = _beside("chain")

    def make(codec: str = "int8", **rounds: int) -> Any:
        changes = {
            "exchange": run_spec.exchange.model_copy(update={"codec": codec, "parts": 3}),
            "rounds": run_spec.rounds.model_copy(update={"count": 1000, **rounds}),
        }
        return chain.Chain.begin(run_spec.model_copy(update=changes))

    return make


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """A PostgreSQL server (see `postgres.py`); skips where there is none."""
    with _beside("postgres").server() as found:
        yield found


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.swarm)])
def database_url(request: pytest.FixtureRequest) -> str | None:
    """The URL of a database for a run, of every kind that there is; None for the run's own."""
    return None if request.param == "sqlite" else str(request.getfixturevalue("postgres").database())


_FUSED = "swarm_protocol.exact.fused"


@pytest.fixture(scope="session")
def fused_for_gpus() -> Any:
    """A copy of `exact.fused` whose kernels are compiled."""
    return _copy_of_fused(interpreted=False)


@pytest.fixture(scope="session")
def fused_interpreted() -> Iterator[Any]:
    """A copy of `exact.fused` whose kernels are numpy, operation by operation, on the CPU."""
    fused = _copy_of_fused(interpreted=True)
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def launch(*arguments: Any, **constants: Any) -> None:
        with np.errstate(all="ignore"):
            fused.rows.launch(*arguments, **constants)

    def sum_of(reduction: Any, x: Any) -> Any:
        """The interpreter's own sum starts from +0, and loses the sign of -0 + -0."""
        data = np.moveaxis(x.handle.data, reduction.axis, 0)
        if x.dtype.is_floating():
            assert len(data) == 2, "a sum of floats whose order is not the rule's"
            return reduction.to_tensor(data[0] + data[1], x.dtype)
        return reduction.to_tensor(data.sum(axis=0), x.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "launch", launch)
        patch.setattr(interpreter.ReduceOps, "sum", sum_of)
        yield fused


def _copy_of_fused(*, interpreted: bool) -> Any:
    """A fresh import, since Triton decides at a kernel's definition whether it is interpreted."""
    if not (os.environ.get("CI") and sys.platform == "linux" and os.uname().machine == "x86_64"):
        pytest.importorskip("triton", reason="there is no Triton here")
    importlib.import_module("triton")  # whose own functions are not interpreted

    def forget() -> None:
        for name in [name for name in sys.modules if name == _FUSED or name.startswith(f"{_FUSED}.")]:
            del sys.modules[name]
        vars(importlib.import_module("swarm_protocol.exact")).pop("fused", None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", str(int(interpreted)))
        forget()
        fused = importlib.import_module(_FUSED)
        forget()
    return fused
