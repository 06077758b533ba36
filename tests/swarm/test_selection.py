"""Eight volunteers as processes: what an outlier and a forger send is in no average, though audits come only afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.swarm

HONEST = ("a", "b", "c", "d", "e", "f")


def test_an_outlier_and_a_forged_sketch_are_in_no_average_and_the_honest_keep_their_credit(
    start_run: Callable[..., Any],
) -> None:
    # Objections have a tenth of the exchange to come, on a machine that eight nodes share. It ends early if all goes well.
    run = start_run(
        rounds=1, min_nodes=8, max_nodes=8, exchange_s=40.0, train_s=90.0, presence_s=15.0, evidence_s=30.0, parts=8,
        probation=10,
    )  # fmt: skip
    run.serve()
    for name in HONEST:
        run.join(name)
    run.join("outlier", "--cheat", "sign-flip")
    run.join("forger", "--fault", "garbage:sketching:0")
    status = run.ends(timeout_s=300)
    assert run.roots(*HONEST) == {status["checkpoint"]["root"]}
    account = run.round(0)
    # The objections took the forger out; of the seven that are left multi-Krum leaves out one, the outlier.
    assert [set(slots) for slots in account["parts"]] == [{account["slots"][name] for name in HONEST}] * 8
    nodes = {node["name"]: node for node in status["nodes"]}
    assert [(nodes[name]["standing"], nodes[name]["accepted"]) for name in HONEST] == [("good", 1)] * len(HONEST)
    reasons = {entry["name"]: entry["reason"] for entry in status["rejected"]}
    assert reasons.keys() == {"outlier", "forger"}
    assert "sketches" in reasons["forger"]
