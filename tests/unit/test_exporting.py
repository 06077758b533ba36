"""Exported figures are those of the round, and every round is exported once."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from swarm_coordinator import exporting
from swarm_coordinator.exporting import RoundMetrics, TensorBoard, WeightsAndBiases, metrics
from swarm_protocol.errors import ConfigurationError, UnreachableError
from swarm_protocol.parts import part_count
from swarm_protocol.spec import RunSpec


class Sink:
    """Remembers what was written, and in which order."""

    def __init__(self, next_round: int = 0) -> None:
        self.next_round = next_round
        self.written: list[RoundMetrics] = []
        self.closed = False

    def write(self, metrics: RoundMetrics) -> None:
        self.written.append(metrics)

    def close(self) -> None:
        self.closed = True


class Client:
    """A coordinator whose run is one round farther each time that it is asked, and is once away."""

    def __init__(self, spec: RunSpec, rounds: int, *, round: int, unevaluated: frozenset[int] = frozenset()) -> None:
        self.spec = spec
        self.rounds, self.round, self.unevaluated = rounds, round, unevaluated
        self.away = False

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def status(self) -> dict[str, Any]:
        if self.away:
            self.away = False
            raise UnreachableError("nobody there")
        answer = {
            "round": self.round,
            "phase": "finished" if self.round == self.rounds else "training",
            "evaluations": [found for found in map(self._evaluation, range(self.round + 1)) if found][-2:],
        }
        self.round = min(self.rounds, self.round + 1)
        return answer

    async def round_detail(self, number: int) -> dict[str, Any]:
        return detail(number) | {"evaluation": self._evaluation(number)}

    def _evaluation(self, number: int) -> dict[str, Any] | None:
        return None if number in self.unevaluated else {"round": number, "loss": 5.0 - number, "sample": None}


def detail(number: int) -> dict[str, Any]:
    def slot(audit: str | None, loss: float | None) -> dict[str, Any]:
        return {"steps": 2, "commitment": None if loss is None else "c", "train_loss": loss, "audit": audit}

    return {
        "round": number,
        "roster": [slot("accepted", 4.0), slot("rejected", 6.0), slot(None, None)],
        "part_records": [
            {"part": 0, "counted": True, "audit": "pending"},
            {"part": 1, "counted": False, "audit": None},
        ],
        "evaluation": None,
    }


def export(monkeypatch: pytest.MonkeyPatch, client: Client, sink: Sink, *, follow: bool = False) -> int:
    async def connect(_: str) -> Client:
        return client

    monkeypatch.setattr(exporting.CoordinatorClient, "connect", connect)
    monkeypatch.setattr(exporting, "FOLLOW_S", 0.0)
    return asyncio.run(exporting.run("http://coordinator", lambda _: sink, follow=follow))


def test_the_figures_of_a_round(run_spec: RunSpec) -> None:
    found = metrics(run_spec, detail(3), {"round": 4, "loss": 3.5, "sample": "All that is ‖ gold"})
    assert found == RoundMetrics(
        3,
        {
            "round/nodes": 2.0,
            "round/tokens": 4.0 * run_spec.tokens_per_step,
            "round/missing_parts": part_count(run_spec) - 1.0,
            "audits/drawn": 3.0,
            "audits/rejected": 1.0,
            "loss/train_claimed": 5.0,
            "loss/held_out": 3.5,
        },
        {"sample": "All that is ‖ gold"},
    )


def test_a_round_in_which_nobody_committed_has_no_training_loss(run_spec: RunSpec) -> None:
    empty = detail(3) | {"roster": []}
    assert not any(name.startswith("loss/") for name in metrics(run_spec, empty, None).figures)


def test_it_goes_on_after_what_is_there(run_spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = Sink(next_round=2)
    assert export(monkeypatch, Client(run_spec, 9, round=5), sink) == 3
    assert [one.round for one in sink.written] == [2, 3, 4]
    assert [one.figures["loss/held_out"] for one in sink.written] == [2.0, 1.0, 0.0]
    assert sink.closed


def test_a_round_waits_for_its_loss_but_not_for_ever(run_spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = Sink()
    assert export(monkeypatch, Client(run_spec, 9, round=3, unevaluated=frozenset({2})), sink) == 1
    sink = Sink()
    assert export(monkeypatch, Client(run_spec, 9, round=5, unevaluated=frozenset({2})), sink) == 5
    assert "loss/held_out" not in sink.written[1].figures


def test_it_follows_to_the_end_whatever_the_coordinator_does(
    run_spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, sink = Client(run_spec, 4, round=0), Sink()
    client.away = True
    assert export(monkeypatch, client, sink, follow=True) == 4
    assert [one.round for one in sink.written] == [0, 1, 2, 3]


@pytest.mark.parametrize(("package", "sink"), [("torch.utils.tensorboard", TensorBoard), ("wandb", WeightsAndBiases)])
def test_a_missing_package_is_named_with_the_command(
    run_spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, sink: Any
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigurationError, match=r"pip install 'swarm-node\[coordinator,metrics\]'"):
        sink(run_spec, tmp_path)


def test_weights_and_biases_says_itself_where_to_go_on(run_spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[dict[str, Any], int]] = []
    started: list[dict[str, Any]] = []

    def init(**options: Any) -> SimpleNamespace:
        started.append(options)
        return SimpleNamespace(step=7, log=lambda values, step, commit: logged.append((values, step)))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    sink = WeightsAndBiases(run_spec, "swarm")
    assert sink.next_round == 7
    assert (started[0]["project"], started[0]["resume"]) == ("swarm", "allow")
    assert run_spec.run_id.hex().startswith(started[0]["id"])
    sink.write(RoundMetrics(7, {"loss/held_out": 3.5}, {"sample": "gold"}))
    assert logged == [({"loss/held_out": 3.5, "sample": "gold"}, 7)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_every_round_once(run_spec: RunSpec, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for rounds in ((0, 1), (2,)):
        sink = TensorBoard(run_spec, tmp_path)
        assert sink.next_round == rounds[0]
        for number in rounds:
            sink.write(RoundMetrics(number, {"loss/held_out": 5.0 - number}, {"sample": "gold"}))
        sink.close()
    shown = EventAccumulator(str(tmp_path))
    shown.Reload()
    assert [(event.step, event.value) for event in shown.Scalars("loss/held_out")] == [(0, 5.0), (1, 4.0), (2, 3.0)]
    other = run_spec.model_copy(update={"seed": 2})
    with pytest.raises(ConfigurationError, match="another folder"):
        TensorBoard(RunSpec.decode(other.encode()), tmp_path)
