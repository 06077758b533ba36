"""What calibration makes of measured distances. That it measures is a test with real processes (`tests/swarm`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from swarm_coordinator import calibrate
from swarm_coordinator.measure import Made, Task
from swarm_protocol.errors import ConfigurationError
from swarm_protocol.fingerprint import fingerprint_hash
from swarm_protocol.spec import RunConfig
from swarm_protocol.tolerances import Tolerances

CONFIG = RunConfig(numerics="native")
FACTS = {"one": {"threads": 1}, "two": {"threads": 2}}
ONE, TWO = (fingerprint_hash(facts) for facts in FACTS.values())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "runtimes").mkdir()
    for name, facts in FACTS.items():
        (tmp_path / "runtimes" / f"{name}.json").write_text(json.dumps(facts))
    return tmp_path


def measured(runtime: str, auditor: str, *distances: float, kind: str = "honest", micro: int = 8) -> dict[str, Any]:
    return {"runtime": runtime, "auditor": auditor, "kind": kind, "micro": micro, "distances": list(distances)}


def made_of(folder: Path, *found: dict[str, Any]) -> Tolerances:
    return calibrate._tolerances(CONFIG, calibrate.QUICK, folder, list(found))


def test_a_pair_has_the_worst_of_both_directions_and_cheats_their_mildest(folder: Path) -> None:
    found = made_of(
        folder,
        measured("one", "one", 0.0, 0.0),
        measured("one", "two", 1e-6, 2e-6),
        measured("two", "one", 4e-6, 3e-6),
        measured("one", "one", 5e-6, micro=4),
        measured("one", "one", 2e-2, 1e-2, kind="learning-rate"),
        measured("one", "one", 0.0, 0.6, kind="skipped-step"),
    )
    assert Tolerances.decode(found.encode()) == found
    precision = found.precisions["float32"]
    assert {pair.worst_honest for pair in precision.pairs} == {0.0, 4e-6}
    assert precision.worst_honest == 5e-6
    assert precision.mildest_cheat == 1e-2
    assert precision.cheats == {"learning-rate": 1e-2, "skipped-step": 0.6}
    assert precision.margin_orders == 3.3
    different, same = found.bounds("float32", ONE, TWO), found.bounds("float32", ONE, ONE)
    assert different is not None
    assert same is not None
    assert 4e-6 < different.accept < different.reject < 1e-2
    assert 5e-7 < same.accept < different.accept  # a quiet pair leaves less room


def test_nothing_is_written_where_noise_reaches_the_cheats(folder: Path) -> None:
    noisy = measured("one", "two", 5e-3)
    with pytest.raises(ConfigurationError, match="too close to be told apart"):
        made_of(folder, noisy, measured("one", "one", 1e-2, kind="learning-rate"))


def test_exact_runs_have_nothing_to_calibrate(tmp_path: Path) -> None:
    exact = CONFIG.model_copy(update={"numerics": "exact"})
    with pytest.raises(ConfigurationError, match="nothing to calibrate"):
        calibrate.calibrate(exact, tmp_path / "out.json", calibrate.QUICK, print)
    assert not (tmp_path / "out.json").exists()


def test_a_task_is_the_same_after_a_trip_to_another_process() -> None:
    task = Task("one", 2, 3, [Made("honest", 4)], with_cheats=True)
    assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task


def test_the_runtimes_that_a_machine_can_be_have_names_of_their_own() -> None:
    names = [runtime.name for runtime in calibrate.runtimes()]
    assert len(set(names)) == len(names) >= 3
