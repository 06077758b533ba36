"""The demo: one command, a real swarm, and an answer that a program can read."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

MARK = "SWARM_TEST_MARK"


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """For a demo's processes: a mark that all of them inherit, so that afterwards none of them may be left."""
    mark = uuid.uuid4().hex
    yield {**os.environ, MARK: mark}
    assert not left_behind(mark)


def left_behind(mark: str) -> list[list[str]]:
    """Command lines of living processes that bear the mark, wherever they hang in the tree."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.cmdline())
    return found


def demo(environment: dict[str, str], *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "swarm_node", "demo", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_demo_trains_exchanges_and_replays(environment: dict[str, str]) -> None:
    result = demo(environment, "--nodes", "2", "--rounds", "2")
    assert result["val_loss"][-1] < result["val_loss"][0]
    assert len(set(result["checkpoint_roots"].values())) == 1
    assert set(result["checkpoint_roots"]) == {"node-1", "node-2", "coordinator"}
    assert result["contributions"] == 4
    assert result["audits"]["accepted"] >= 2
    assert sum(result["audits"].values()) == result["audits"]["accepted"]
    for measured in result["exchange"].values():
        assert all(measured[step]["count"] > 0 for step in ("delivery", "inputs", "reduction", "fetch", "waiting"))
        assert measured["bytes"]["direct"]["sent"] > 0
        assert measured["bytes"]["control"]["received"] > 0


@pytest.mark.swarm
@pytest.mark.alone
def test_three_nodes_learn_in_four_rounds(environment: dict[str, str]) -> None:
    result = demo(environment, "--nodes", "3", "--rounds", "4")
    losses = result["val_loss"]
    assert losses[0] < math.log(256) * 1.02
    assert losses[-1] < math.log(256) * 2 / 3
    assert len(result["checkpoint_roots"]) == 4
    assert len(set(result["checkpoint_roots"].values())) == 1
    assert result["contributions"] == 12
    assert result["audits"]["rejected"] == result["audits"]["inconclusive"] == result["audits"]["unavailable"] == 0
    assert result["wall_s"] < 180


@pytest.mark.swarm
@pytest.mark.alone
def test_a_cheater_is_rejected_and_nobody_else_is(environment: dict[str, str]) -> None:
    result = demo(environment, "--nodes", "2", "--rounds", "4", "--cheaters", "1")
    assert {entry["node"] for entry in result["rejected"]} == {"cheater-1"}
    assert result["audits"]["inconclusive"] == result["audits"]["unavailable"] == 0
    assert len(set(result["checkpoint_roots"].values())) == 1


@pytest.mark.swarm
@pytest.mark.alone
def test_ctrl_c_ends_the_demo_and_everything_that_it_started(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "swarm_node", "demo", "--nodes", "2", "--rounds", "50"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("Checkpoint 1"):
                break
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=40)
    assert process.returncode == 130


@pytest.mark.swarm
@pytest.mark.alone
@pytest.mark.parametrize("cheat", ["learning-rate-slight", "flipped-bit"])
def test_exact_training_is_equal_on_any_kernels_and_the_slightest_cheat_is_not(
    environment: dict[str, str], cheat: str
) -> None:
    options = ("--numerics", "exact", "--mixed-kernels", "--nodes", "2", "--rounds", "1", "--cheaters", "1")
    result = demo(environment, *options, "--cheat", cheat)
    assert {entry["node"] for entry in result["rejected"]} == {"cheater-1"}
    assert result["audits"]["accepted"] == 2
    assert result["comparisons"]["equal"] >= 2  # some audits are done twice
    assert result["comparisons"]["within"] == result["comparisons"]["outside"] == 0
    assert len(set(result["checkpoint_roots"].values())) == 1
