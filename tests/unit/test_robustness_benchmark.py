"""The robustness benchmark runs, and even a very short run shows what it is for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "robustness.py"


def test_a_sign_flip_moves_the_mean_and_not_the_default_aggregator() -> None:
    options = ["--quick", "--json", "--attack", "sign flip x10", "--attack", "forged sketch"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options, "--aggregator", "mean", "--aggregator", "multi_krum"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["clean"] < found["before"]
    assert found["final_loss"]["mean"]["sign flip x10"] > 1.1 * found["clean"]
    assert set(found["final_loss"]["multi_krum"]) == {"none", "sign flip x10", "forged sketch"}
    assert found["default_within_percent"] < 1
