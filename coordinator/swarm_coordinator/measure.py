"""One runtime of a calibration, as a process: trains contributions, or replays what others trained, and prints distances.

python -m swarm_coordinator.measure FOLDER TASK
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swarm_protocol import adapters, corpus, data, deviations, encoding, replay, training
from swarm_protocol.chunks import content_hash, manifest_of
from swarm_protocol.data import Dataset, DatasetManifest
from swarm_protocol.files import write_atomic
from swarm_protocol.fingerprint import runtime_fingerprint
from swarm_protocol.model.llama import initial_parameters
from swarm_protocol.records import RoundPlan, Seat
from swarm_protocol.spec import MAX_SPEC_BYTES, DataSpec, RunConfig, RunSpec
from swarm_protocol.training import Float32, Tokens, TrainState

NOBODY = "0" * 64


@dataclass(frozen=True)
class Made:
    """Contributions of one kind, `honest` or a deviation's name, made with micro-batches of `micro` sequences."""

    kind: str
    micro: int


@dataclass(frozen=True)
class Task:
    """What a process does: make contributions, or, if `make` is empty, replay all honest ones (and the cheats)."""

    runtime: str
    threads: int
    contributions: int
    make: list[Made] | None = None
    with_cheats: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Task:
        make = None if value["make"] is None else [Made(**one) for one in value["make"]]
        return cls(**{**value, "make": make})


@dataclass(frozen=True)
class Prepared:
    """What all runtimes share: the recipe, the data, a checkpoint of some training, and the trunk where there is one."""

    folder: Path
    spec: RunSpec
    dataset: Dataset
    start: TrainState
    trunk: Float32 | None

    @classmethod
    def make(cls, folder: Path, config: RunConfig, warm_up_steps: int) -> Prepared:
        """Cut the corpus (Python's standard library) and warm the model up."""
        for name in ("shards", "runtimes", "made"):
            (folder / name).mkdir()

        def put(blob: bytes) -> None:
            (folder / "shards" / content_hash(blob).hex()).write_bytes(blob)

        manifest = corpus.write_dataset(config.data, config.model, corpus.stdlib_corpus(), put)
        base = initial_parameters(config.model, config.seed)
        trunk = None if config.trainable.kind == "all" else base
        spec = RunSpec(
            name="calibration",
            seed=config.seed,
            numerics="native",
            coordinator=NOBODY,
            checkpoint=NOBODY,
            beacon=NOBODY,
            trunk=None if trunk is None else manifest_of(trunk).root.hex(),
            model=config.model,
            trainable=config.trainable,
            data=DataSpec(
                root=manifest.root.hex(),
                tokenizer=manifest.tokenizer,
                train_tokens=manifest.train_tokens,
                held_out_windows=1,
            ),
            training=config.training,
            exchange=config.exchange,
            outer=config.outer,
            rounds=config.rounds,
            audit=config.audit,
        )
        prepared = cls(
            folder,
            spec,
            Dataset.from_directory(manifest, folder / "shards"),
            TrainState.initial(spec, adapters.initial(config.model, config.trainable, config.seed, base)),
            trunk,
        )
        warm = prepared.run(spec, prepared.start, prepared.batch(0, warm_up_steps), warm_up_steps)
        np.save(folder / "checkpoint.npy", warm.parameters)
        if trunk is not None:
            np.save(folder / "trunk.npy", trunk)
        (folder / "spec").write_bytes(spec.encode())
        (folder / "manifest").write_bytes(manifest.encode())
        return prepared

    @classmethod
    def load(cls, folder: Path) -> Prepared:
        spec = RunSpec.decode((folder / "spec").read_bytes()[:MAX_SPEC_BYTES])
        dataset = Dataset.from_directory(DatasetManifest.decode((folder / "manifest").read_bytes()), folder / "shards")
        trunk = None if spec.trunk is None else np.load(folder / "trunk.npy")
        return cls(folder, spec, dataset, TrainState.initial(spec, np.load(folder / "checkpoint.npy")), trunk)

    def run(self, spec: RunSpec, state: TrainState, batch: deviations.Batch, stop: int) -> TrainState:
        """Training itself: a `deviations.Run`."""
        return training.run_segment(spec, state, batch, stop, self.trunk)

    def batch(self, number: int, steps: int | None = None) -> deviations.Batch:
        """The batches of contribution `number`; 0 is the warm-up's."""
        per_round = (steps or self.spec.training.steps) * self.spec.training.batch_sequences
        seat = Seat(peer=bytes(32), steps=steps or self.spec.training.steps, weight=1, reducer=True)
        plan = RoundPlan(
            run=self.spec.run_id, round=0, base=bytes(32), roster=(seat,), cursor=number * max(per_round, 1 << 12),
            commit_by_ms=0, exchange_by_ms=0, previous_beacon=bytes(32), log_size=0, log_root=bytes(32),
        )  # fmt: skip

        def batch(step: int) -> Tokens:
            return data.batch(self.spec, plan, 0, step, self.dataset)

        return batch

    def with_micro(self, micro: int) -> RunSpec:
        recipe = self.spec.training.model_copy(update={"micro_sequences": micro})
        return self.spec.model_copy(update={"training": recipe})


def main(folder: Path, task: Task) -> list[dict[str, Any]]:
    """Do it. Returns the distances, one entry per contribution that was replayed."""
    training.configure(task.threads)
    prepared = Prepared.load(folder)
    facts = runtime_fingerprint("cpu", task.threads)
    (folder / "runtimes" / f"{task.runtime}.json").write_text(json.dumps(facts))
    for one in task.make or []:
        for number in range(task.contributions):
            _make(prepared, task.runtime, one, number)
    return [] if task.make else list(_replay(prepared, task))


def _make(prepared: Prepared, runtime: str, one: Made, number: int) -> None:
    way = deviations.honest if one.kind == "honest" else deviations.KINDS[one.kind]
    spec, where = (
        prepared.with_micro(one.micro),
        prepared.folder / "made" / f"{runtime}-{one.kind}-{one.micro}-{number}",
    )
    where.mkdir()
    steps = spec.training.steps
    for index, state in enumerate(way(spec, prepared.start, prepared.batch(number + 1), steps, prepared.run)):
        write_atomic(where / f"state-{index}", *state.buffers(), durable=False)
    note: dict[str, encoding.Value] = {"runtime": runtime, "kind": one.kind, "micro": one.micro, "number": number}
    (where / "note").write_bytes(encoding.encode(note))


def _replay(prepared: Prepared, task: Task) -> Iterator[dict[str, Any]]:
    spec = prepared.spec
    for path in sorted((prepared.folder / "made").glob("*/note")):
        note: Any = encoding.decode(path.read_bytes(), max_bytes=1 << 12)
        special = note["kind"] != "honest" or note["micro"] != spec.training.micro_sequences
        if special and not task.with_cheats:
            continue
        batch, start, distances = prepared.batch(note["number"] + 1), prepared.start, []
        for index, (_, stop) in enumerate(spec.segments(spec.training.steps)):
            claimed = TrainState.from_bytes(spec, (path.parent / f"state-{index}").read_bytes())
            replayed = prepared.run(spec, start, batch, stop)
            distances.append(replay.compare(spec, start, claimed, replayed, bounds=None).statistic)
            start = claimed
        yield note | {"auditor": task.runtime, "distances": distances}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Task.from_json(json.loads(sys.argv[2])))))
