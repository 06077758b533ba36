"""A model that a swarm trained is taken home, another swarm starts from it, and that one's model writes."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swarm_node import downloads
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.client import CoordinatorClient

pytestmark = pytest.mark.swarm

ALONE = {"rounds": 1, "min_nodes": 1, "max_nodes": 1, "assemble_s": 0.0}


def node(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "swarm_node", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


async def held(url: str, cache: Path, round_number: int) -> Checkpoint:
    """A checkpoint, from the cache or downloaded into it."""
    async with await CoordinatorClient.connect(url) as client:
        return (await downloads.download(client, cache, round_number)).checkpoint


def trained(run: Any) -> dict[str, Any]:
    """The run's status when one volunteer has gone through it; its coordinator goes on."""
    run.serve()
    run.join("alone")
    return run.ends()


def test_a_run_goes_on_from_what_another_one_gave(start_run: Callable[..., Any], tmp_path: Path) -> None:
    first = start_run(**ALONE)
    before = trained(first)
    model = tmp_path / "model"
    assert asyncio.run(held(first.url, tmp_path / "cache", 0)).round == 0  # what follows is made from it
    shown = node("export", first.url, model, "--cache", tmp_path / "cache")
    assert before["checkpoint"]["root"] in shown
    first.stop()
    assert "round | 1 of 1" in (model / "README.md").read_text()

    second = start_run(**ALONE, origin=["--from-hf", str(model)])
    after = trained(second)
    assert after["evaluations"][0]["loss"] == before["evaluations"][1]["loss"] < before["evaluations"][0]["loss"]
    assert after["evaluations"][1]["loss"] < after["evaluations"][0]["loss"]

    sampling = (
        "sample",
        second.url,
        "--prompt",
        "def ",
        "--tokens",
        "40",
        "--cache",
        tmp_path / "cache",
        "--seed",
        "1",
    )
    answer = json.loads(node(*sampling, "--json"))
    assert (answer["root"], answer["round"]) == (after["checkpoint"]["root"], 1)
    assert 0 < len(answer["tokens"]) <= 40

    third = start_run(**ALONE, origin=["--parent", second.url, "--parent-round", "1"])
    (parent,) = json.loads(third.owner("status", str(third.home), "--json"))["run"]["ancestors"]
    assert (parent["run_id"], parent["round"], parent["root"]) == (after["run_id"], 1, after["checkpoint"]["root"])
