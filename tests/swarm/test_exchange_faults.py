"""Whoever fails in an exchange, and whenever: the round seals, the others have equal roots, and it is written who is missing.

Faults are put there on purpose (`swarm_node.faults`). Processes take long to start, so a run has one fault after another,
a round and a node for each; every node is the first reducer of some parts.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.swarm, pytest.mark.alone, pytest.mark.timeout(900)]

Start = Callable[..., Any]


def begin(start_run: Start, *faulty: str, rounds: int = 1, **settings: Any) -> Any:
    """A run of two honest nodes, a and b, and one node (c, d, ...) per fault; all of them are there in round 0."""
    count = 2 + len(faulty)
    run = start_run(
        **{
            "rounds": rounds, "min_nodes": 2, "max_nodes": count, "parts": 12, "assemble_s": 60.0, "train_s": 60.0,
            "exchange_s": 12.0, "evidence_s": 3.0, **settings,
        }
    )  # fmt: skip
    run.serve()
    for name in ("a", "b"):
        run.join(name)
    for name, fault in zip("cdef", faulty, strict=False):
        run.join(name, "--fault", fault)
    return run


def end(run: Any, *names: str) -> dict[str, Any]:
    """Let the run end; these nodes and the coordinator hold the same checkpoint. Returns its status."""
    status = run.ends(timeout_s=500)
    assert run.roots(*names) == {status["checkpoint"]["root"]}
    assert not status["rejected"]
    return status


def accounts(run: Any, status: dict[str, Any]) -> list[tuple[dict[str, int], list[set[int]]]]:
    """Per round, the slots by name, and those in the average of each part; none is missing."""
    found = []
    for number in range(status["rounds"]):
        account = run.round(number)
        assert None not in account["parts"]
        assert status["history"][number]["missing_parts"] == 0
        found.append((account["slots"], [set(slots) for slots in account["parts"]]))
    return found


def test_who_vanishes_before_delivering_is_in_no_average(start_run: Start) -> None:
    run = begin(start_run, "kill:delivering:0", "freeze:delivering:1", "kill:opening:2", rounds=3)
    for number, (slots, parts) in enumerate(accounts(run, end(run, "a", "b"))):
        alive = {slot for name, slot in slots.items() if name in "ab" + "de"[number:]}
        # The parts that it should have reduced went to the next in order.
        assert parts == [alive] * 12, f"round {number}"


def test_a_reducer_that_vanishes_is_replaced_and_costs_nobody_else_their_part(start_run: Start) -> None:
    faults = ("kill:receiving:0", "kill:reducing:1", "kill:published:2", "freeze:reducing:3")
    run = begin(start_run, *faults, rounds=4)
    for number, (slots, parts) in enumerate(accounts(run, end(run, "a", "b"))):
        alive = {slot for name, slot in slots.items() if name in "ab" + "def"[number:]}
        assert all(alive <= slots for slots in parts), f"round {number}"


def test_senders_that_are_slow_or_send_garbage_are_left_out(start_run: Start) -> None:
    run = begin(start_run, "slow:delivering:0", "garbage:delivering:0", parts=8)
    ((slots, parts),) = accounts(run, end(run, "a", "b", "d"))
    assert all({slots["a"], slots["b"]} <= part for part in parts)
    # What they reduce themselves needs no delivery: two parts each.
    assert sum(slots["c"] in part for part in parts) == sum(slots["d"] in part for part in parts) == 2


def test_a_peer_that_serves_other_bytes_is_passed_over_and_reported(start_run: Start) -> None:
    run = begin(start_run, "garbage:serving:0")
    status = end(run, "a", "b")
    ((slots, parts),) = accounts(run, status)
    # What it reduced is nowhere to be had, so its backups did it again.
    assert all({slots["a"], slots["b"]} <= part for part in parts)
    liar = run.node("c")["peer"]
    assert all(liar in run.node(name)["exchange"]["other_bytes"] for name in ("a", "b"))
    # Without a second signed record there is nothing to show to others.
    assert not status["equivocations"]


def test_reducers_that_sign_two_records_of_a_part_are_proved_to_and_left_out_of_later_plans(start_run: Start) -> None:
    run = begin(start_run, "equivocate:serving:0", "equivocate:published:0", rounds=2)
    status = end(run, "a", "b")
    proved = {entry["name"]: entry for entry in status["equivocations"]}
    assert set(proved) == {"c", "d"}
    assert {(entry["kind"], entry["round"]) for entry in proved.values()} == {("part-record", 0)}
    # What c told its peers they report; what d told the coordinator it has seen for itself.
    peers = {run.node(name)["peer"] for name in ("a", "b", "c", "d")}  # d may be the first to tell of c
    assert proved["c"]["reporter"] in peers
    assert proved["d"]["reporter"] not in peers
    assert {node["name"]: node["standing"] for node in status["nodes"]} == {
        "a": "good",
        "b": "good",
        "c": "ended",
        "d": "ended",
    }
    assert set(run.round(1)["slots"]) == {"a", "b"}
    for entry in proved.values():
        run.proof(entry["report"])


def test_whoever_audits_reducers_accepts_the_honest_and_rejects_each_lie(start_run: Start) -> None:
    # The run's own auditors look away, or the liars would soon be gone, and their inputs with them.
    lies = ("misreport:reducing:0", "leave-out:reducing:0")
    run = begin(start_run, *lies, parts=8, rounds=50, reductions=0.0)
    status = run.reaches(1, timeout_s=400)
    verdicts: dict[str, set[str]] = {}
    names = {node["peer"]: node["name"] for node in status["nodes"]}
    for entry in run.audit_reduction(0):
        verdicts.setdefault(names[entry["reducer"]], set()).add(entry["outcome"])
    assert verdicts["a"] == verdicts["b"] == {"accepted"}
    assert verdicts["c"] == {"rejected: wrong average"}
    assert verdicts["d"] == {"rejected: receipted sender left out"}


def test_a_reducer_that_comes_back_in_mid_round_goes_on_with_what_is_on_its_disk(start_run: Start) -> None:
    run = begin(start_run, "kill:published:0", rounds=3, exchange_s=12.0)
    run.until(lambda: run.nodes["c"].wait(0) == -signal.SIGKILL or None, what="c kills itself")
    run.join("c")
    for slots, parts in accounts(run, end(run, "a", "b", "c")):
        assert all({slots["a"], slots["b"]} <= part for part in parts)
