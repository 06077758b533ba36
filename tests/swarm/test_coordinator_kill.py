"""A coordinator that is killed with SIGKILL at random moments of a live run forgets nothing that it told anybody.

SWARM_KILLS says how often (5), SWARM_SEED repeats the moments of an earlier run as far as a machine's timing allows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "coordinator_kill.py"
KILLS = int(os.environ.get("SWARM_KILLS", "5"))
BASE_S = 180.0
PER_KILL_S = 20.0

pytestmark = [pytest.mark.swarm, pytest.mark.alone, pytest.mark.timeout(BASE_S + PER_KILL_S * KILLS)]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What a run with its kills showed (see the script)."""
    command = [sys.executable, str(SCRIPT), "--kills", str(KILLS), "--json"]
    if "SWARM_SEED" in os.environ:
        command += ["--seed", os.environ["SWARM_SEED"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BASE_S + PER_KILL_S * KILLS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_the_run_ends(found: dict[str, Any]) -> None:
    assert found["kills"] == KILLS
    assert found["ended"]
    assert not found["server_errors"]


def test_every_acknowledged_record_is_in_the_log_at_its_leaf(found: dict[str, Any]) -> None:
    assert found["acknowledged"] > 0
    assert not found["lost"]
    assert not found["twice"]
    assert not found["contradictions"]


def test_no_signature_was_remade(found: dict[str, Any]) -> None:
    assert found["signed"] > 0
    assert not found["remade"]
    assert not found["vanished"]


def test_the_log_is_consistent_with_every_head_that_was_ever_seen(found: dict[str, Any]) -> None:
    assert found["heads"] > 0
    assert not found["broken_heads"]


def test_the_ledger_balances(found: dict[str, Any]) -> None:
    assert not found["ledger_faults"]
