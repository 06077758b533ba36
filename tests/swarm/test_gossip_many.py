"""Twenty processes: every record reaches everybody, and nothing grows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gossip.py"

pytestmark = [pytest.mark.swarm, pytest.mark.alone]


def test_every_record_reaches_everybody_and_memory_and_tasks_stay_flat() -> None:
    options = ["--nodes", "20", "--messages", "300", "--per-s", "6", "--no-observe", "--json"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(done.stdout.splitlines()[-1])["swarms"]
    assert found["missing"] == 0
    assert found["deliveries"] == 19 * 300
    assert found["restarts"] == 0
    assert not {"blamed", "dropped_peers", "over_rate", "invalid", "undelivered"} & set(found["counters"])
    (memory, memory_after), (tasks, tasks_after) = found["memory_mb"], found["tasks"]
    assert memory_after < memory + 20
    assert tasks_after < 1.2 * tasks + 20
