"""A swarm trains adapters: the trunk is fetched once, and everything else that moves is of the adapters alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from swarm_protocol import chunks, codec, training
from swarm_protocol.spec import RunSpec

pytestmark = pytest.mark.swarm

Start = Callable[..., Any]


def test_adapters_are_trained_exchanged_and_audited_alone(start_run: Start) -> None:
    run = start_run(
        numerics="exact", rounds=2, min_nodes=2, probation=2, optimizer="adamw",
        trainable='{ kind = "lora", r = 2, alpha = 4, targets = ["q_proj", "down_proj"] }',
    )  # fmt: skip
    run.serve()
    for name in ("a", "b"):
        run.join(name)
    status = run.ends()
    assert run.roots("a", "b") == {status["checkpoint"]["root"]}
    assert (status["audits"]["drawn"], status["audits"]["accepted"]) == (4, 4)
    assert {name for name, count in status["audits"]["comparisons"].items() if count} == {"equal"}
    assert len({one["loss"] for one in status["evaluations"]}) == 3

    spec = RunSpec.decode((run.home / "spec.cbor").read_bytes())
    trained, whole = spec.num_trainable, spec.model.num_parameters
    assert trained < whole / 20
    encoded = codec.get(spec.exchange.codec).encoded_bytes(trained)
    for name in ("a", "b"):
        (folder,) = (run.folder / name / "runs").iterdir()
        (trunk,) = folder.glob("trunk-*")
        assert chunks.manifest_of(trunk.read_bytes()).root.hex() == spec.trunk
        assert {path.stat().st_size for path in folder.glob("checkpoint-*")} == {8 * trained}
        for number in range(2):
            work = folder / f"round-{number}"
            assert sum(path.stat().st_size for path in work.glob("part-*")) == encoded
            assert {path.stat().st_size for path in work.glob("state-*")} <= {training.size_bytes(spec)}
        moved = run.node(name)["exchange"]["bytes"]["direct"]
        traffic = moved["sent"] + moved["received"]
        beside_the_trunk = traffic - 4 * whole if traffic > 4 * whole else traffic  # one may have it from the other
        assert beside_the_trunk < codec.get(spec.exchange.codec).encoded_bytes(whole)
