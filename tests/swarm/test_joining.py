"""Who joins in mid-run gets the right checkpoint, whoever serves it, and does not start over when it is killed."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swarm_protocol.chunks import CHUNK_BYTES

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(400)]

Start = Callable[..., Any]


def begun(folder: Path) -> list[int]:
    """The chunks that a download has brought so far."""
    for path in folder.glob("runs/*/download-*"):
        state = path.read_bytes()
        return [start for start in range(0, len(state), CHUNK_BYTES) if any(state[start : start + 64])]
    return []


def test_a_node_joins_past_a_corrupt_a_dying_and_a_frozen_seeder_and_its_own_death(start_run: Start) -> None:
    run = start_run(
        rounds=3, min_nodes=2, max_nodes=5, train_s=60.0, assemble_s=4.0, hidden_size=128, intermediate_size=2048
    )
    run.serve()
    run.join("honest")
    run.join("corrupt", "--fault", "garbage:seeding:1")
    run.join("dying", "--fault", "kill:seeding:1")
    run.join("frozen")
    run.reaches(1, "training", timeout_s=200)
    run.nodes["frozen"].signal(signal.SIGSTOP)  # which also lets the round wait

    run.join("late", "--download-limit", "8")
    caught = f"{run.node('corrupt')['peer']} serves wrong bytes"
    run.until(lambda: caught in run.nodes["late"].last_lines(100), what="the corrupt one is caught")
    assert run.nodes["dying"].wait(20) == -signal.SIGKILL
    first = run.until(lambda: found if len(found := begun(run.folder / "late")) >= 2 else None, what="late has chunks")
    run.nodes["late"].signal(signal.SIGKILL)
    run.nodes["late"].wait(10)
    assert "Fetched" not in run.nodes["late"].last_lines(100)
    assert set(first) <= set(begun(run.folder / "late")), "what it had is still there"

    run.join("late")
    run.until(lambda: "Fetched checkpoint 1" in run.nodes["late"].last_lines(100), what="late has the checkpoint")
    assert not begun(run.folder / "late")

    run.nodes["frozen"].signal(signal.SIGCONT)
    status = run.ends()
    assert run.roots("honest", "corrupt", "frozen", "late") == {status["checkpoint"]["root"]}
    assert not status["rejected"]
