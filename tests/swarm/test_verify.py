"""Anyone replays a run at home: `swarm-node verify`, against a coordinator and nodes that are really there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.swarm

Start = Callable[..., Any]


def verify(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "swarm_node", "verify", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env=os.environ | environment)


def replayed(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["contributions"]
    return found


def drawn(run: Any) -> dict[str, Any]:
    """What follows from the log of a run that is over; the coordinator says the same."""
    done = verify("draws", run.url, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert [one["drawn"] for one in found["rounds"]] == [True] * run.status()["rounds"]
    return found


def earned_by_all_is_certified(run: Any, folder: Path) -> None:
    """The log of a run that is over gives everybody's credit, twice; each can show its own to somebody else, offline."""
    for seen_before in (False, True):
        done = verify("log", run.url, "--json", "--data-dir", folder / "verifier")
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert (found["seen_before"] is not None) is seen_before
    assert found["ended"] == "all rounds are done"
    assert found["credit"]["pending"] == 0
    base = f"{run.url}/v1/runs/{run.status()['run_id']}/contributors"
    settled = 0
    for one in httpx.get(base, timeout=10).json()["contributors"]:
        certificate = folder / f"{one['name']}.json"
        certificate.write_bytes(httpx.get(f"{base}/{one['peer']}/certificate", timeout=10).content)
        done = verify("certificate", certificate, "--checkpoint", found["checkpoint"]["root"])
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{one['settled']:,} megaflops" in done.stdout
        settled += one["settled"]
    assert settled == found["credit"]["settled"] > 0
    done = verify("certificate", certificate, "--checkpoint", "00" * 32)
    assert done.returncode == 1
    assert done.stderr.startswith("swarm-node: the certificate is for checkpoint")


def test_an_exact_run_is_verified_by_anyone_and_a_cheat_is_seen_by_all(start_run: Start, tmp_path: Path) -> None:
    run = start_run(numerics="exact", rounds=2, min_nodes=3)
    run.serve()
    for name in ("a", "b"):
        run.join(name)
    run.join("c", "--cheat", "flipped-bit")
    run.ends()
    slots = run.round(0)["slots"]

    honest = verify("run", run.url, "--round", 0, "--slot", slots["a"], "--json", ATEN_CPU_CAPABILITY="default")
    assert honest.returncode == 0, honest.stdout + honest.stderr
    assert [one["comparison"] for one in replayed(honest)] == ["equal"]

    everybody = verify("run", run.url, "--round", 0, "--json", "--threads", 2)
    assert everybody.returncode == 1
    outcomes = {one["name"]: one["outcome"] for one in replayed(everybody)}
    assert outcomes == {"a": "accepted", "b": "accepted", "c": "rejected"}

    audited = {one["slot"]: one["outcome"] for one in drawn(run)["rounds"][0]["contributions"]}
    assert audited == {slots["a"]: "accepted", slots["b"]: "accepted", slots["c"]: audited[slots["c"]]}
    assert audited[slots["c"]] in ("rejected", "moot")

    traces = [tmp_path / name for name in ("one.trace", "two.trace")]
    for path, capability in zip(traces, ("default", "avx2"), strict=True):
        traced = verify(
            "trace", run.url, "--round", 0, "--slot", slots["a"], "--out", path, ATEN_CPU_CAPABILITY=capability
        )
        assert traced.returncode == 0, traced.stdout + traced.stderr
        assert "equal to what the node committed to" in " ".join(traced.stdout.split())
    same = verify("bisect", *traces)
    assert same.returncode == 0, same.stdout + same.stderr
    assert "equal in all" in same.stdout


def test_a_native_run_is_verified_while_its_nodes_keep_their_states(start_run: Start, tmp_path: Path) -> None:
    run = start_run(rounds=2, min_nodes=2)
    run.serve()
    for name in ("a", "b"):
        run.join(name)
    run.ends()
    found = verify("run", run.url, "--sample", 2, "--json", "--threads", 1)
    assert drawn(run)["agree"]
    earned_by_all_is_certified(run, tmp_path)
    # The nodes are gone: equal bits are all that could vouch for them, and on this machine they are equal.
    assert found.returncode == 0, found.stdout + found.stderr
    assert {one["outcome"] for one in replayed(found)} == {"accepted"}
    elsewhere = verify("run", run.url, "--sample", 1, "--json", ATEN_CPU_CAPABILITY="default")
    assert elsewhere.returncode == 1
    assert "expired" in replayed(elsewhere)[0]["reason"]
