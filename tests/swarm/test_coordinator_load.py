"""The load benchmark runs: a few synthetic nodes get through a round, and nothing that they ask for is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "coordinator_load.py"

pytestmark = [pytest.mark.swarm, pytest.mark.alone]


def test_a_few_nodes_get_through_a_round_without_an_error() -> None:
    options = ["--nodes", "6", "--slots", "5", "--rounds", "2", "--pace", "10", "--profile", "--json"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["errors"] == 0, found["error_kinds"]
    assert found["rounds"] == 2
    assert 0 < found["p50_s"] <= found["p99_s"]
    assert found["rss_mb"] > 0
    assert found["kinds"]["commitment"]["count"] == 2 * 5
    assert any(one["function"].startswith("swarm_coordinator/journal.py") for one in found["profile"])
