"""Every way to cheat is found, for its own reason, by real auditors; and nobody honest is accused.

Several kinds share a run, one node each. All contributions are on probation, so that all of them are audited whole.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from swarm_coordinator.run_directory import RunDirectory
from swarm_node.cheats import Kind
from swarm_protocol.ledger import megaflops

pytestmark = pytest.mark.swarm

Start = Callable[..., Any]

ELSEWHERE = r"the replay leads elsewhere \(distance \d.\d\de"
FAR = ELSEWHERE + r"[+-]0[01]"
REASONS = {
    Kind.WRONG_SHARD: FAR,
    Kind.HALF_BATCH: FAR,
    Kind.FEWER_STEPS: FAR,
    Kind.SKIPPED_STEP: FAR,
    Kind.STALE_CHECKPOINT: FAR,
    Kind.LEARNING_RATE: ELSEWHERE + "-0[12]",
    Kind.LOW_PRECISION: ELSEWHERE + "-0[12]",
    Kind.MADE_UP: FAR,
    Kind.SCALED: FAR,
    Kind.SIGN_FLIP: FAR,
    Kind.COPIED: FAR,
    Kind.SLEEPER: FAR,
    Kind.OTHER_PARTS: "the parts are not the encoding of the training",
    Kind.FORGED_EVIDENCE: "the evidence is not what was committed to: .* other bytes",
    Kind.FORGED_STATES: "the evidence is no state of this run: a state of step 6 where the plan has one of step 2",
}
"""The verdicts that native numerics give."""

ROUND_OF_FIRST_CHEAT = {Kind.STALE_CHECKPOINT: 1, Kind.COPIED: 1, Kind.SLEEPER: 2}
"""In the rounds before, these kinds are honest."""

EXACT = {
    Kind.LEARNING_RATE_SLIGHT: "the replay gives other bits",
    Kind.FLIPPED_BIT: "the replay gives other bits",
    Kind.OTHER_PARTS: "the parts are not the encoding of its training, which is right",
}


def finished(start_run: Start, *kinds: Kind, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run of two honest nodes and one cheater of each kind: its status at the end, and its nodes by name."""
    count = 2 + len(kinds)
    run = start_run(
        min_nodes=2, max_nodes=count, assemble_s=25.0, train_s=60.0, presence_s=20.0, probation=50, **settings
    )  # fmt: skip
    run.serve()
    for kind in kinds:
        run.join(kind.value, "--cheat", kind.value)
    for name in ("honest-1", "honest-2"):
        run.join(name)
    status = run.ends(timeout_s=280)
    nodes = {node["name"]: node for node in status["nodes"]}
    work = megaflops(RunDirectory(run.home).spec(), 6 * 8 * 64)
    for name in ("honest-1", "honest-2"):
        honest = nodes[name]
        assert (honest["standing"], honest["rejected"]) == ("good", 0)
        assert honest["accepted"] == honest["contributions"] == status["rounds"]
        assert honest["credit"]["settled"] == status["rounds"] * work
        assert honest["credit"]["forfeited"] == 0
    return status, nodes


def judged_again(run: Any, rejected: dict[str, Any]) -> list[dict[str, Any]]:
    """What anybody finds who judges a rejection again by the evidence in the archive; it stands."""
    command = [sys.executable, "-m", "swarm_node", "verify", "evidence", run.url, "--json"]
    command += ["--round", str(rejected["round"]), "--slot", str(rejected["slot"])]
    command += [] if rejected["part"] is None else ["--part", str(rejected["part"])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["stands"]
    return list(found["verdicts"])


def test_whoever_is_rejected_is_in_no_later_plan(start_run: Start) -> None:
    run = start_run(rounds=500, min_nodes=2, max_nodes=3, assemble_s=10.0)
    run.serve()
    for name in ("a", "b"):
        run.join(name)
    run.join("cheater", "--cheat", Kind.MADE_UP.value)
    rejected = run.until(lambda: run.status().get("rejected") or None, what="the cheater is rejected")
    assert {entry["name"] for entry in rejected} == {"cheater"}
    run.nodes["cheater"].signal(signal.SIGKILL)
    verdicts = judged_again(run, rejected[0])
    assert len(verdicts) == 2
    assert all(one["evidence"] and one["again_reason"] == one["reason"] for one in verdicts)
    later = run.status()["round"] + 1
    run.reaches(later + 1)
    assert set(run.round(later)["slots"]) == {"a", "b"}


@pytest.mark.parametrize(
    ("kinds", "rounds"),
    [
        ((Kind.WRONG_SHARD, Kind.HALF_BATCH, Kind.FEWER_STEPS, Kind.SKIPPED_STEP, Kind.LEARNING_RATE), 1),
        ((Kind.LOW_PRECISION, Kind.MADE_UP, Kind.SCALED, Kind.SIGN_FLIP, Kind.FORGED_STATES), 1),
        ((Kind.STALE_CHECKPOINT, Kind.COPIED, Kind.OTHER_PARTS, Kind.FORGED_EVIDENCE, Kind.SLEEPER), 3),
    ],
    ids=["other training", "other results", "other rounds, parts and evidence"],
)
def test_each_kind_is_rejected_for_its_own_reason(start_run: Start, kinds: tuple[Kind, ...], rounds: int) -> None:
    status, nodes = finished(start_run, *kinds, rounds=rounds)
    rejected = {entry["name"]: entry for entry in status["rejected"]}
    for kind in kinds:
        assert re.search(REASONS[kind], rejected[kind.value]["reason"]), (kind, rejected[kind.value]["reason"])
        assert rejected[kind.value]["round"] == ROUND_OF_FIRST_CHEAT.get(kind, 0)
        assert nodes[kind.value]["standing"] == "ended"
        assert nodes[kind.value]["credit"]["pending"] == nodes[kind.value]["credit"]["settled"] == 0
    assert set(rejected) == {kind.value for kind in kinds}


def test_whoever_shows_no_evidence_is_unavailable_and_in_the_end_out(start_run: Start) -> None:
    status, nodes = finished(start_run, Kind.REFUSES_EVIDENCE, rounds=4, evidence_s=2.0)
    silent = nodes[Kind.REFUSES_EVIDENCE.value]
    assert not status["rejected"]
    assert silent["rejected"] == silent["accepted"] == silent["credit"]["settled"] == 0
    assert status["audits"]["unavailable"] >= 3
    assert silent["standing"] == "ended"
    assert silent["reason"].startswith("its evidence was unavailable in 3 audits")


def test_a_lying_reducer_is_rejected_for_its_averages_and_nobody_else_loses_anything(start_run: Start) -> None:
    run = start_run(rounds=1, parts=12, assemble_s=25.0, presence_s=20.0, reductions=1.0)
    run.serve()
    liar = Kind.LYING_REDUCER.value
    run.join(liar, "--cheat", liar)
    for name in ("honest-1", "honest-2"):
        run.join(name)
    status = run.ends()
    nodes = {node["name"]: node for node in status["nodes"]}
    work = megaflops(RunDirectory(run.home).spec(), 6 * 8 * 64)
    assert {entry["name"] for entry in status["rejected"]} == {liar}
    for entry in status["rejected"]:
        assert entry["reason"].startswith(f"wrong average of part {entry['part']} in round 0:")
    assert all(one["evidence"] for one in judged_again(run, status["rejected"][0]))
    assert nodes[liar]["standing"] == "ended"
    assert nodes[liar]["reason"] == status["rejected"][0]["reason"]
    assert nodes[liar]["credit"] == {"pending": 0, "settled": 0, "forfeited": work}
    assert status["part_audits"]["accepted"] == 8  # each is the first reducer of four parts
    for name in ("honest-1", "honest-2"):
        assert (nodes[name]["standing"], nodes[name]["rejected"], nodes[name]["accepted"]) == ("good", 0, 1)
        assert nodes[name]["credit"] == {"pending": 0, "settled": work, "forfeited": 0}


def test_exact_audits_need_no_evidence_and_see_one_flipped_bit(start_run: Start) -> None:
    harmless = (Kind.REFUSES_EVIDENCE, Kind.FORGED_EVIDENCE)
    status, nodes = finished(start_run, *EXACT, *harmless, rounds=1, numerics="exact")
    rejected = {entry["name"]: entry["reason"] for entry in status["rejected"]}
    assert {name: reason[: len(EXACT[Kind(name)])] for name, reason in rejected.items()} == {
        kind.value: reason for kind, reason in EXACT.items()
    }
    for kind in harmless:
        assert nodes[kind.value]["accepted"] == 1
        assert nodes[kind.value]["credit"]["forfeited"] == 0


def test_calibrated_runtimes_are_judged_by_their_tolerances(start_run: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start_run(rounds=1, min_nodes=3, max_nodes=3, train_s=60.0, presence_s=20.0, calibrated=True)
    run.serve()
    run.join("honest")
    run.join("cheater", "--cheat", Kind.LEARNING_RATE)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    run.join("other-kernels")
    status = run.ends(timeout_s=240)
    nodes = {node["name"]: node for node in status["nodes"]}
    assert nodes["honest"]["accepted"] == nodes["other-kernels"]["accepted"] == 1
    assert status["audits"]["comparisons"]["within"] >= 1
    assert [entry["name"] for entry in status["rejected"]] == ["cheater"]
