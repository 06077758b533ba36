"""What each kind of cheater does, as a `Conduct`. Some remember earlier rounds, so each node needs one of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from swarm_node.cheats import Kind
from swarm_node.conduct import Conduct, Handlers
from swarm_node.contribution import Progress, Train, Trained, train
from swarm_node.faults import Action, Fault, Faults, Point
from swarm_protocol import data, deviations, parts, training
from swarm_protocol.calls import Answer, Call
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.data import Dataset
from swarm_protocol.deviations import Batch, Deviation
from swarm_protocol.errors import InvalidDataError, RefusedError
from swarm_protocol.records import RoundPlan
from swarm_protocol.spec import RunSpec
from swarm_protocol.training import TrainState

Float32 = npt.NDArray[np.float32]

INVENTED_LOSS = 3.0
SLEEPS_FOR = 2
"""Contributions of a sleeper before it starts to cheat."""

LIES = Fault(Action.MISREPORT, Point.REDUCING, 0, onwards=True)
"""What a lying reducer does: its averages are of fewer slots than its records say."""


def deviating(deviation: Deviation) -> Train:
    """A training that deviates, reported as an honest one would be."""

    def way(
        spec: RunSpec, plan: RoundPlan, slot: int, checkpoint: Checkpoint, dataset: Dataset, progress: Progress
    ) -> Trained:
        losses: list[float] = []

        def on_step(step: int, loss: float) -> None:
            losses.append(loss)
            progress.step(step, loss)

        def run(spec: RunSpec, state: TrainState, batch: Batch, stop: int) -> TrainState:
            return training.run_segment(
                spec, state, batch, stop, progress.trunk,
                device=progress.device, on_step=on_step, cancelled=progress.cancelled,
            )  # fmt: skip

        def batch(step: int) -> training.Tokens:
            return data.batch(spec, plan, slot, step, dataset)

        state = start = TrainState.initial(spec, checkpoint.parameters)
        for state in deviation(spec, start, batch, plan.roster[slot].steps, run):
            progress.segment_end(state)
        return Trained(state, sum(losses) / len(losses) if losses else INVENTED_LOSS)

    return way


def wrong_shard(
    spec: RunSpec, plan: RoundPlan, slot: int, checkpoint: Checkpoint, dataset: Dataset, progress: Progress
) -> Trained:
    """Trains on the first windows of a shard that is at hand, one after the other, whatever the plan assigns."""
    manifest, length = dataset.manifest, spec.model.max_position_embeddings
    shard = data.shards_of(spec, plan, slot, manifest)[0]
    windows = data.count_windows(manifest.train[shard : shard + 1], length)
    count = spec.training.batch_sequences

    def batch(step: int) -> training.Tokens:
        chosen = np.arange(step * count, (step + 1) * count) % windows
        return dataset.windows(manifest.train, np.full(count, shard), chosen, length)

    return train(spec, plan, slot, checkpoint, dataset, progress, batch=batch)


def stale_checkpoint() -> Conduct:
    """Starts from the checkpoint of the round before, and claims that it began from the current one."""
    held: dict[int, Checkpoint] = {}

    def way(
        spec: RunSpec, plan: RoundPlan, slot: int, checkpoint: Checkpoint, dataset: Dataset, progress: Progress
    ) -> Trained:
        start = held.get(checkpoint.round - 1, checkpoint)
        held.clear()
        held[checkpoint.round] = checkpoint
        return train(spec, plan, slot, start, dataset, progress)

    return Conduct(way)


def copied(
    spec: RunSpec, plan: RoundPlan, slot: int, checkpoint: Checkpoint, dataset: Dataset, progress: Progress
) -> Trained:
    """Another node's pseudo-gradient: what was sent to this one as a reducer a round ago, else averages of all."""
    taken = _stolen(spec, progress.folder.parent / f"round-{plan.round - 1}") if progress.folder else None
    if taken is None:
        return train(spec, plan, slot, checkpoint, dataset, progress)
    state, steps = TrainState.initial(spec, checkpoint.parameters), plan.roster[slot].steps
    for _, stop in spec.segments(steps):
        share = np.float32(stop / steps)
        state = dataclasses.replace(state, step=stop, parameters=checkpoint.parameters - share * taken)
        progress.segment_end(state)
    return Trained(state, INVENTED_LOSS)


def _stolen(spec: RunSpec, folder: Path) -> Float32 | None:
    """A pseudo-gradient made of what lies in an earlier round's folder; None where there is nothing."""
    found: list[Float32 | None] = [None] * parts.part_count(spec)
    for path in sorted(folder.glob("average-*")) + sorted(folder.glob("input-*")):
        data = path.read_bytes()
        _, *fields = path.name.split("-")
        for part in [int(fields[0])] if len(fields) == 3 else range(len(found)):
            try:
                found[part] = parts.decode_part(spec, part, data)
            except InvalidDataError:
                continue
    return None if all(values is None for values in found) else parts.assemble(spec, found)


def sleeper() -> Conduct:
    """Honest until it is trusted, then made up."""
    made: set[int] = set()
    awake = deviating(deviations.made_up)

    def way(
        spec: RunSpec, plan: RoundPlan, slot: int, checkpoint: Checkpoint, dataset: Dataset, progress: Progress
    ) -> Trained:
        made.add(plan.round)
        how = train if len(made) <= SLEEPS_FOR else awake
        return how(spec, plan, slot, checkpoint, dataset, progress)

    return Conduct(way)


def other_parts(spec: RunSpec, start: Float32, final: Float32) -> list[bytes]:
    """Parts that undo what the training did."""
    return parts.encode_parts(spec, final, start)


def without_evidence(handlers: Handlers) -> Handlers:
    """Neither trace nor states; averages still, which others need to go on."""

    async def refuse(_: Call) -> Answer:
        raise RefusedError("not now")

    return {**handlers, "trace": refuse, "state": refuse}


def with_forged_chunks() -> Conduct:
    """Honest work, but pieces of its states are served with other bytes."""
    chunks: set[bytes] = set()

    def evidence(handlers: Handlers) -> Handlers:
        async def get(call: Call) -> Answer:
            answer = await handlers["get"](call)
            return Answer(body=_other(bytes(answer.body))) if call.header["hash"] in chunks else answer

        return {**handlers, "get": get}

    def way(
        spec: RunSpec, plan: RoundPlan, slot: int, checkpoint: Checkpoint, dataset: Dataset, progress: Progress
    ) -> Trained:
        def segment_end(state: TrainState) -> None:
            chunks.update(state.manifest().hashes)
            progress.segment_end(state)

        return train(spec, plan, slot, checkpoint, dataset, dataclasses.replace(progress, segment_end=segment_end))

    return Conduct(way, evidence=evidence)


def _other(body: bytes) -> bytes:
    return bytes([body[0] ^ 1]) + body[1:]


def forged_states(
    spec: RunSpec, start: TrainState, batch: Batch, steps: int, run: deviations.Run
) -> Iterator[TrainState]:
    """Honest parts, and a trace of the final state over and over: it hides what lies between."""
    states = list(deviations.honest(spec, start, batch, steps, run))
    yield from [states[-1]] * len(states)


KINDS: dict[Kind, Callable[[], Conduct]] = {
    **{Kind(name): partial(Conduct, deviating(one)) for name, one in deviations.KINDS.items()},
    Kind.WRONG_SHARD: partial(Conduct, wrong_shard),
    Kind.STALE_CHECKPOINT: stale_checkpoint,
    Kind.COPIED: partial(Conduct, copied),
    Kind.OTHER_PARTS: partial(Conduct, encode=other_parts),
    Kind.SLEEPER: sleeper,
    Kind.REFUSES_EVIDENCE: partial(Conduct, evidence=without_evidence),
    Kind.FORGED_EVIDENCE: with_forged_chunks,
    Kind.FORGED_STATES: partial(Conduct, deviating(forged_states)),
    Kind.LYING_REDUCER: partial(Conduct, faults=Faults((LIES,))),
}


def conduct(name: str | None) -> Conduct:
    """The conduct that goes by this name; honest without one. A new one each time: some have a memory."""
    return Conduct() if name is None else KINDS[Kind(name)]()
