"""`swarm-coordinator export-metrics`: a run's figures, by round, for TensorBoard or Weights & Biases.

It reads the public API, so it runs anywhere. A round is written once: it goes on after the last one that is there. A round
is ready when its audits are drawn and its checkpoint is evaluated, or when `LATE_ROUNDS` more are over without a loss.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from swarm_protocol.client import CoordinatorClient
from swarm_protocol.errors import ConfigurationError, UnreachableError
from swarm_protocol.files import write_atomic
from swarm_protocol.parts import part_count
from swarm_protocol.spec import RunSpec

log = logging.getLogger(__name__)

FOLLOW_S = 5.0
LATE_ROUNDS = 3
INSTALL = "pip install 'swarm-node[coordinator,metrics]'"

Json = dict[str, Any]


@dataclass(frozen=True)
class RoundMetrics:
    """One round's figures by name, and texts by name."""

    round: int
    figures: dict[str, float]
    texts: dict[str, str] = field(default_factory=dict)


class Sink(Protocol):
    """Where figures go. Rounds before `next_round` are there already."""

    next_round: int

    def write(self, metrics: RoundMetrics) -> None: ...

    def close(self) -> None: ...


async def run(url: str, make_sink: Callable[[RunSpec], Sink], *, follow: bool) -> int:
    """Write the rounds that are ready; with `follow`, until the run is over and written. Returns how many were written.

    Raises:
        ConfigurationError: the sink's package is not installed, or what is there is of another run.
        UnreachableError: no coordinator at this address.
    """
    async with await CoordinatorClient.connect(url) as client:
        sink = make_sink(client.spec)
        first = sink.next_round
        try:
            while True:
                try:
                    over = await _write_ready(client, sink)
                except UnreachableError as error:
                    if not follow:
                        raise
                    log.warning("the coordinator does not answer, and is asked again: %s", error)
                    over = False
                if over or not follow:
                    return sink.next_round - first
                await asyncio.sleep(FOLLOW_S)
        finally:
            sink.close()


async def _write_ready(client: CoordinatorClient, sink: Sink) -> bool:
    """Write what is ready; whether that was all that this run will ever have."""
    status = await client.status()
    while sink.next_round < status["round"]:
        number = sink.next_round
        evaluation = await _evaluation(client, status, number + 1)
        if evaluation is None and status["round"] - number <= LATE_ROUNDS:
            return False
        sink.write(metrics(client.spec, await client.round_detail(number), evaluation))
        sink.next_round = number + 1
    return bool(status["phase"] == "finished")


async def _evaluation(client: CoordinatorClient, status: Json, number: int) -> Json | None:
    """That of the checkpoint that a round starts from; the status has the newest ones."""
    known: dict[int, Json] = {one["round"]: one for one in status["evaluations"]}
    if number in known or number >= status["round"]:
        return known.get(number)
    found: Json | None = (await client.round_detail(number))["evaluation"]
    return found


def metrics(spec: RunSpec, detail: Json, evaluation: Json | None) -> RoundMetrics:
    """A sealed round's figures, from the API's account of it and the evaluation of the checkpoint that it made."""
    committed = [slot for slot in detail["roster"] if slot["commitment"] is not None]
    audits = [one["audit"] for one in (*detail["roster"], *detail["part_records"]) if one["audit"] is not None]
    averaged = {record["part"] for record in detail["part_records"] if record["counted"]}
    figures = {
        "round/nodes": float(len(committed)),
        "round/tokens": float(sum(slot["steps"] for slot in committed) * spec.tokens_per_step),
        "round/missing_parts": float(part_count(spec) - len(averaged)),
        "audits/drawn": float(len(audits)),
        "audits/rejected": float(audits.count("rejected")),
    }
    if committed:
        figures["loss/train_claimed"] = sum(slot["train_loss"] for slot in committed) / len(committed)
    texts = {}
    if evaluation is not None:
        figures["loss/held_out"] = evaluation["loss"]
        if evaluation["sample"]:
            texts["sample"] = evaluation["sample"]
    return RoundMetrics(detail["round"], figures, texts)


class TensorBoard:
    """Event files in a folder. A round that was under way when the export was killed is purged, and written again."""

    def __init__(self, spec: RunSpec, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigurationError(f"TensorBoard is not installed; run: {INSTALL}") from error
        self._state = folder / "swarm-export.json"
        self._run = spec.run_id.hex()
        self.next_round = self._written()
        self._writer: Any = SummaryWriter(str(folder), purge_step=self.next_round)

    def _written(self) -> int:
        try:
            state = json.loads(self._state.read_text())
            run, following = str(state["run"]), int(state["next_round"])
        except FileNotFoundError:
            return 0
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"{self._state} cannot be used ({error}); export into another folder") from error
        if run != self._run:
            raise ConfigurationError(f"{self._state.parent} has the figures of run {run}; export into another folder")
        return following

    def write(self, metrics: RoundMetrics) -> None:
        for name, value in metrics.figures.items():
            self._writer.add_scalar(name, value, metrics.round)
        for name, text in metrics.texts.items():
            self._writer.add_text(name, text, metrics.round)
        self._writer.flush()
        write_atomic(self._state, json.dumps({"run": self._run, "next_round": metrics.round + 1}).encode())

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of a project, under the swarm run's id; it knows itself what it has. A round is one step."""

    def __init__(self, spec: RunSpec, project: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigurationError(f"Weights & Biases is not installed; run: {INSTALL}") from error
        self._run = wandb.init(project=project, id=spec.run_id.hex()[:32], name=spec.name, resume="allow")
        self.next_round: int = self._run.step

    def write(self, metrics: RoundMetrics) -> None:
        self._run.log({**metrics.figures, **metrics.texts}, step=metrics.round, commit=True)

    def close(self) -> None:
        self._run.finish()
