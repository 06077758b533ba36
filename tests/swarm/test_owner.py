"""The run owner's commands, as real volunteers live through them: a queue, a pause, and the end of the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.swarm, pytest.mark.alone]

QUEUED = "1st in the queue: this run audits newcomers whole and has room for 1 at a time"
PAUSED = "the run owner has paused the run"


def test_volunteers_are_told_what_they_wait_for_and_end_well_with_the_run(start_run: Callable[..., Any]) -> None:
    run = start_run(rounds=50, min_nodes=1, max_nodes=3, budget=0.3, probation=40, assemble_s=2.0)
    run.serve()
    run.join("first")
    run.reaches(0, "training")
    run.join("second")
    run.until(lambda: run.node("second").get("place") == QUEUED, what="the second volunteer is told that it queues")
    run.owner("pause", str(run.home))
    for name in ("first", "second"):
        run.until(lambda name=name: run.node(name).get("place") == PAUSED, what=f"{name} is told of the pause")
    status = run.status()
    assert (status["paused"], status["phase"]) == (True, "assembling")
    run.owner("resume", str(run.home))
    run.reaches(status["round"], "training")
    run.owner("stop", str(run.home), "--yes")
    assert len(run.roots("first", "second")) == 1
    end = run.status()
    assert (end["phase"], end["ended"]) == ("finished", "stopped by the run owner")
    assert 0 < end["round"] < end["rounds"]
    assert "stopped by the run owner" in run.nodes["second"].last_lines()
    assert f"Waiting: {QUEUED}." in run.nodes["second"].last_lines(200)
