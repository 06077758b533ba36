"""The demo: one command, a real swarm, and an answer that a program can read."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from typing import Any

import psutil
import pytest


def demo(*options: str, timeout_s: float = 280.0) -> dict[str, Any]:
    command = [sys.executable, "-m", "swarm_node", "demo", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def left_behind() -> list[list[str]]:
    """Command lines of processes that belong to a swarm, wherever they hang in the tree."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []
        ours = any(name in " ".join(line) for name in ("swarm_node", "swarm_coordinator", "hivemind_cli/p2pd"))
        if ours and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(line)
    return found


def test_the_demo_trains_exchanges_and_replays() -> None:
    result = demo("--nodes", "2", "--rounds", "2")
    assert result["val_loss"][-1] < result["val_loss"][0]
    assert len(set(result["checkpoint_roots"].values())) == 1
    assert set(result["checkpoint_roots"]) == {"node-1", "node-2", "coordinator"}
    assert result["contributions"] == 4
    assert result["audits"]["accepted"] >= 2
    assert sum(result["audits"].values()) == result["audits"]["accepted"]
    assert not left_behind()


@pytest.mark.swarm
def test_three_nodes_learn_in_four_rounds() -> None:
    result = demo("--nodes", "3", "--rounds", "4")
    losses = result["val_loss"]
    assert losses[0] < math.log(256) * 1.02
    assert losses[-1] < math.log(256) * 2 / 3
    assert len(result["checkpoint_roots"]) == 4
    assert len(set(result["checkpoint_roots"].values())) == 1
    assert result["contributions"] == 12
    assert result["audits"]["rejected"] == result["audits"]["inconclusive"] == result["audits"]["unavailable"] == 0
    assert result["wall_s"] < 180


@pytest.mark.swarm
def test_a_cheater_is_rejected_left_out_and_nobody_else_is() -> None:
    result = demo("--nodes", "2", "--rounds", "4", "--cheaters", "1")
    assert {entry["node"] for entry in result["rejected"]} == {"cheater-1"}
    assert result["audits"]["inconclusive"] == result["audits"]["unavailable"] == 0
    # Left out once rejected: three contributions a round before that, two afterwards.
    assert result["contributions"] < 12
    assert len(set(result["checkpoint_roots"].values())) == 1


@pytest.mark.swarm
def test_ctrl_c_ends_the_demo_and_everything_that_it_started() -> None:
    command = [sys.executable, "-m", "swarm_node", "demo", "--nodes", "2", "--rounds", "50"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("Checkpoint 1"):
                break
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=40)
    assert process.returncode == 130
    assert not left_behind()


@pytest.mark.swarm
@pytest.mark.parametrize("cheat", ["learning-rate", "flipped-bit"])
def test_exact_training_is_equal_on_any_kernels_and_the_slightest_cheat_is_not(cheat: str) -> None:
    options = ("--numerics", "exact", "--mixed-kernels", "--nodes", "2", "--rounds", "1", "--cheaters", "1")
    result = demo(*options, "--cheat", cheat)
    assert {entry["node"] for entry in result["rejected"]} == {"cheater-1"}
    assert result["audits"]["accepted"] == result["comparisons"]["equal"] == 2
    assert result["comparisons"]["within"] == result["comparisons"]["outside"] == 0
    assert len(set(result["checkpoint_roots"].values())) == 1
