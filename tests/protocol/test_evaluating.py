"""Checkpoints are evaluated by a process of its own, and what it finds is kept with the round."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swarm_coordinator import evaluations
from swarm_coordinator.evaluating import (
    MARK,
    PROMPT_TOKENS,
    EvaluationError,
    Evaluator,
    Measured,
    printable,
    wants_sample,
)
from swarm_coordinator.init import Options, initialise
from swarm_coordinator.journal import Journal
from swarm_protocol.records import MAX_SAMPLE_CHARACTERS, Role
from swarm_protocol.spec import RunConfig

TEXT = "All that is gold does not glitter.\n"
TOML = """
name = "tiny"
[model]
hidden_size = 8
intermediate_size = 8
num_hidden_layers = 1
num_attention_heads = 1
num_key_value_heads = 1
max_position_embeddings = 16
"""


def test_the_process_measures_the_loss_and_writes_the_same_sample_every_time(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(TEXT * 400)
    spec = initialise(Options(tmp_path / "run", RunConfig.from_toml(TOML), [corpus], token=None, auditors=1))
    root = bytes.fromhex(spec.checkpoint)

    async def scenario() -> tuple[list[Measured], str]:
        evaluator = Evaluator(tmp_path / "run")
        try:
            found = [await evaluator.measure(root, sample=wanted) for wanted in (True, True, False)]
            with pytest.raises(EvaluationError) as refused:
                await evaluator.measure(bytes(32), sample=False)
            found.append(await evaluator.measure(root, sample=False))
        finally:
            await evaluator.close()
        found.append(await evaluator.measure(root, sample=False))
        await evaluator.close()
        return found, str(refused.value)

    found, refusal = asyncio.run(scenario())
    assert found[0] == found[1]
    assert {one.loss for one in found} == {found[0].loss}
    assert found[0].loss == pytest.approx(math.log(256), rel=0.1)  # nothing is learnt yet
    assert found[0].sample is not None
    prompt, _, written = found[0].sample.partition(MARK)
    assert prompt in TEXT * 2
    assert 0 < len(prompt) <= PROMPT_TOKENS
    assert written
    assert found[2].sample is None
    assert "not in the object store" in refusal


def test_samples_come_at_intervals_and_at_the_end() -> None:
    assert [number for number in range(26) if wants_sample(number, 25, every=10)] == [0, 10, 20, 25]
    assert not any(wants_sample(number, 25, every=0) for number in range(26))


def test_a_sample_is_fit_to_be_stored_and_shown() -> None:
    assert printable("a\x00b\x1b[31m\n\tc\ud800") == "a\ufffdb\ufffd[31m\n\tc\ufffd"
    assert len(printable("x" * 10_000)) == MAX_SAMPLE_CHARACTERS


def test_an_accepted_evaluation_is_kept_with_its_round(make_cast: Callable[..., Any]) -> None:
    cast = make_cast()
    journal = Journal.open(cast.home, cast.now_ms)
    journal.appoint(Role.CHECKPOINT_WORKER, cast.worker.public_key, cast.now_ms)
    envelope = cast.evaluation(0, journal.state.base, sample="All that is ‖ gold")
    for _ in range(2):
        journal.submit(envelope, envelope.open(), None, cast.now_ms)
    rows = journal.read(lambda archive: evaluations.newest(archive.session, archive.run, 10))
    assert [(row.round, row.root, row.loss, row.sample) for row in rows] == [
        (0, journal.state.base, 5.4, "All that is ‖ gold")
    ]
    journal.close()
