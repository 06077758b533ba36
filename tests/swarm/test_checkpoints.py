"""Checkpoints outlive what happens to whoever holds them: nodes that lag, stores that are lost, swarms that are gone."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(900)]

Start = Callable[..., Any]

QUICK = {"min_nodes": 2, "max_nodes": 3, "assemble_s": 1.0, "presence_s": 3.0, "evidence_s": 5.0, "parts": 4}
UNAUDITED = {"probation": 0, "floor": 0.0, "reductions": 0.0}


def kill(run: Any, *names: str) -> None:
    """End these at once, the coordinator with everything that it has started."""
    for name in names:
        process = psutil.Process(run.swarm._children[name]._process.pid)
        family = [process, *process.children(recursive=True)]
        for one in family:
            one.send_signal(signal.SIGKILL)
        psutil.wait_procs(family[1:], timeout=20)
        assert run.swarm._children[name].wait(20) is not None


def log_of(run: Any, name: str) -> str:
    return (run.folder / "logs" / f"{name}.log").read_text()


def chain(run: Any) -> dict[int, dict[str, Any]]:
    """The checkpoints that the coordinator lists, by round."""
    page = httpx.get(f"{run.url}/v1/runs/{run.status()['run_id']}/checkpoints", timeout=10).json()
    return {one["round"]: one for one in page["checkpoints"]}


def test_who_lags_takes_deltas_and_what_the_store_lost_comes_back_from_volunteers(start_run: Start) -> None:
    run = start_run(rounds=1000, keep_rounds=2, snapshot_every=4, **QUICK, **UNAUDITED)
    run.serve()
    for name in "abc":
        run.join(name)
    run.reaches(1, timeout_s=300)
    held = run.until(lambda: run.node("c")["checkpoint"].get("round"), what="c holds a checkpoint of its own making")
    kill(run, "c")
    held = run.node("c")["checkpoint"]["round"]
    run.reaches(held + 3)
    run.owner("pause", str(run.home))
    newest = run.until(lambda: (one := run.status())["paused"] and one["phase"] == "assembling" and one["round"],
                       what="the run rests")  # fmt: skip

    run.join("c")
    caught_up = re.compile(
        rf"Fetched checkpoint {newest} .*: by (\d+) deltas from checkpoint {held} on, about ([\d,]+) bytes; whole it has "
        r"([\d,]+)"
    )
    found = run.until(lambda: caught_up.search(log_of(run, "c")), what="c has caught up")
    deltas, taken, whole = (int(one.replace(",", "")) for one in found.groups())
    assert deltas == newest - held
    assert taken < whole
    run.owner("resume", str(run.home))
    # c takes part from there, which it may only with the exact checkpoint.
    run.until(lambda: (run.node("c").get("contributions") or 0) > 0, what="c takes part again")

    # What is not a snapshot, nor among the newest, is no longer kept whole, and is listed with its delta.
    listed = run.until(lambda: (found := chain(run)) and len(found) > 6 and not found[1]["whole"] and found,
                       what="an old checkpoint has gone")  # fmt: skip
    assert listed[0]["whole"]
    assert listed[4]["whole"]
    assert all(0 < one["delta_bytes"] < one["size_bytes"] for number, one in listed.items() if number)
    gone = httpx.get(f"{run.url}/v1/runs/{run.status()['run_id']}/checkpoints/{listed[1]['root']}", timeout=10)
    assert (gone.status_code, gone.json()["code"]) == (404, "not-whole")

    kill(run, "coordinator")
    shutil.rmtree(run.home / "objects")
    run.serve()
    lost = run.until(lambda: re.search(r"checkpoint (\d+) \((\w+)\) is whole in the object store again",
                                       log_of(run, "coordinator")), what="the newest checkpoint is back")  # fmt: skip
    assert "is not in the object store; asking volunteers" in log_of(run, "coordinator")
    newest, root = int(lost[1]), lost[2]
    back = chain(run)[newest]
    assert back["whole"]
    assert back["root"].startswith(root)
    run.reaches(newest + 2)
    # Somebody new gets everything from what was stored again.
    run.join("d")
    run.until(lambda: "Fetched checkpoint" in log_of(run, "d"), what="a newcomer has the checkpoint")


def test_a_run_goes_on_from_the_coordinators_disk_alone(start_run: Start) -> None:
    run = start_run(rounds=4, snapshot_every=2, **QUICK, **UNAUDITED)
    run.serve()
    for name in "ab":
        run.join(name)
    run.reaches(1, "training", timeout_s=300)
    run.reaches(2)
    before = run.status()
    kill(run, "coordinator", "a", "b")
    for name in "ab":
        shutil.rmtree(run.folder / name)

    run.serve()
    for name in "ef":
        run.join(name)
    status = run.reaches(4, timeout_s=300)
    assert (status["phase"], status["round"]) == ("finished", 4)
    assert run.roots("e", "f") == {status["checkpoint"]["root"]}
    assert status["history"][: len(before["history"])] == before["history"]
