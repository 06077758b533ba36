"""Processes die, come back and come late; the run goes on, and everybody ends with the same checkpoint."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from typing import Any

import pytest

from swarm_protocol import chunks

pytestmark = [pytest.mark.swarm, pytest.mark.alone]

Start = Callable[..., Any]


def test_a_run_goes_on_without_a_volunteer_that_was_killed(start_run: Start) -> None:
    run = start_run(rounds=4, min_nodes=2, max_nodes=3, train_s=15.0)
    run.serve()
    for name in ("a", "b", "c"):
        run.join(name)
    run.reaches(1, "training")
    run.nodes["c"].signal(signal.SIGKILL)
    status = run.ends()
    assert status["history"][0]["slots"] == 3
    assert status["history"][-1]["slots"] == 2
    assert run.roots("a", "b") == {status["checkpoint"]["root"]}
    assert not status["rejected"]


def test_a_killed_volunteer_comes_back_as_itself(start_run: Start) -> None:
    run = start_run(rounds=5, min_nodes=2, max_nodes=3, train_s=15.0)
    run.serve()
    for name in ("a", "b", "c"):
        run.join(name)
    run.reaches(1, "training")
    peer = run.node("c")["peer"]
    run.nodes["c"].signal(signal.SIGKILL)
    run.nodes["c"].wait(10)
    run.join("c")
    status = run.ends()
    assert run.roots("a", "b", "c") == {status["checkpoint"]["root"]}
    assert run.node("c")["peer"] == peer
    assert len(status["nodes"]) == 3
    assert status["history"][-1]["committed"] == 3
    assert not status["rejected"]


def test_a_killed_coordinator_continues_where_it_was(start_run: Start) -> None:
    run = start_run(rounds=4)
    coordinator = run.serve()
    for name in ("a", "b", "c"):
        run.join(name)
    before = run.reaches(1, "training")
    coordinator.signal(signal.SIGKILL)
    coordinator.wait(10)
    run.serve()
    status = run.ends()
    assert status["run_id"] == before["run_id"]
    assert status["history"][0] == before["history"][0]
    assert run.roots("a", "b", "c") == {status["checkpoint"]["root"]}
    assert not status["rejected"]


def test_a_fourth_node_joins_at_round_two(start_run: Start) -> None:
    run = start_run(rounds=8, min_nodes=3, max_nodes=4, assemble_s=5.0, train_s=60.0)
    run.serve()
    for name in ("a", "b", "c"):
        run.join(name)
    run.reaches(2, "training")
    # The round waits for c until the fourth is there, so that no machine is too slow for it.
    run.nodes["c"].signal(signal.SIGSTOP)
    run.join("d")
    there = {"following the round", "waiting for the round to start", "training"}
    run.until(lambda: run.node("d").get("state") in there, what="d has the checkpoint")
    run.nodes["c"].signal(signal.SIGCONT)
    status = run.ends()
    assert run.roots("a", "b", "c", "d") == {status["checkpoint"]["root"]}
    assert status["history"][0]["slots"] == 3
    assert status["history"][-1]["slots"] == 4


def test_the_same_run_twice_gives_the_same_bytes(start_run: Start) -> None:
    first, second = start_run(rounds=2), start_run(rounds=2)
    # The same sealed run: spec, keys and data; and volunteers with the same keys, hence the same roster.
    shutil.rmtree(second.home)
    shutil.copytree(first.home, second.home)
    ends = []
    for run in (first, second):
        run.serve()
        for name in ("a", "b", "c"):
            (run.folder / name).mkdir(exist_ok=True)
            if run is second:
                shutil.copy(first.folder / name / "identity", run.folder / name / "identity")
            run.join(name)
        status = run.ends()
        assert run.roots("a", "b", "c") == {status["checkpoint"]["root"]}
        ends.append(status)
        run.stop()
    assert ends[0]["run_id"] == ends[1]["run_id"]
    assert [entry["root"] for entry in ends[0]["history"]] == [entry["root"] for entry in ends[1]["history"]]
    assert [entry["loss"] for entry in ends[0]["evaluations"]] == [entry["loss"] for entry in ends[1]["evaluations"]]


def test_ctrl_c_finishes_the_contribution_and_loses_nothing(start_run: Start) -> None:
    run = start_run(rounds=6, min_nodes=2, max_nodes=3)
    run.serve()
    for name in ("a", "b", "c"):
        run.join(name)
    run.until(lambda: run.node("c").get("state") == "training", what="c trains")
    started = run.node("c")["round"]
    run.nodes["c"].signal(signal.SIGINT)
    assert run.nodes["c"].wait(60) == 0
    entry = run.reaches(started + 1)["history"][started]
    assert entry["committed"] == 3
    status = run.ends()
    left = next(node for node in status["nodes"] if node["name"] == "c")
    assert left["standing"] == "good"
    assert left["contributions"] == started + 1
    assert not status["audits"]["unavailable"]
    assert run.roots("a", "b") == {status["checkpoint"]["root"]}


def test_a_node_whose_checkpoint_differs_fetches_the_right_one_and_says_so(start_run: Start) -> None:
    run = start_run(rounds=4, min_nodes=2, max_nodes=2, presence_s=4.0)
    run.serve()
    for name in ("a", "b"):
        run.join(name)
    run.reaches(1)
    run.nodes["b"].signal(signal.SIGKILL)
    run.nodes["b"].wait(10)
    # Another checkpoint of the same round, whole in itself: only the coordinator's root tells that it is wrong.
    folder = next((run.folder / "b" / "runs").iterdir())
    pointer = json.loads((folder / "checkpoint.json").read_text())
    state = bytearray((folder / f"checkpoint-{pointer['root']}").read_bytes())
    state[0] ^= 1
    pointer["root"] = chunks.manifest_of(bytes(state)).root.hex()
    (folder / f"checkpoint-{pointer['root']}").write_bytes(state)
    (folder / "checkpoint.json").write_text(json.dumps(pointer))
    run.join("b")
    status = run.ends()
    assert run.roots("a", "b") == {status["checkpoint"]["root"]}
    assert "every chunk verified" in run.nodes["b"].last_lines(100).split("Joined", 2)[-1]


def test_a_second_ctrl_c_stops_at_once(start_run: Start) -> None:
    run = start_run(rounds=50, min_nodes=1, max_nodes=1)
    run.serve()
    run.join("a")
    run.until(lambda: run.node("a").get("state") == "training", what="a trains")
    run.nodes["a"].signal(signal.SIGINT)
    run.until(lambda: "press Ctrl-C again" in run.nodes["a"].last_lines(), what="a has heard the first")
    run.nodes["a"].signal(signal.SIGINT)
    assert run.nodes["a"].wait(10) == 0
