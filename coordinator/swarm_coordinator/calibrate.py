"""Calibration of native numerics: how far apart honest runtimes are on this machine, how far cheats, and the bounds between.

Each runtime (threads, kernels) is a process of its own (`measure`). Each trains the same contributions from a warmed-up
checkpoint, and replays every segment that the others claim. Nothing is written where noise and cheats are too close.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swarm_coordinator.measure import Made, Prepared, Task
from swarm_protocol import deviations, tolerances, training
from swarm_protocol.errors import ConfigurationError, SwarmError
from swarm_protocol.files import write_atomic
from swarm_protocol.fingerprint import fingerprint_hash
from swarm_protocol.spec import RunConfig
from swarm_protocol.tolerances import Pair, Precision, Tolerances

QUIET = 0.1
"""A pair of runtimes is taken to be at least this share as noisy as the noisiest: few contributions were measured."""


class CalibrationError(SwarmError):
    """A runtime could not be measured."""


@dataclass(frozen=True)
class Runtime:
    """How a process computes."""

    name: str
    threads: int = 1
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    contributions: int
    warm_up_steps: int
    runtimes: int
    micro_batches: int


THOROUGH = Effort(contributions=3, warm_up_steps=100, runtimes=100, micro_batches=2)
QUICK = Effort(contributions=1, warm_up_steps=30, runtimes=3, micro_batches=1)


def runtimes() -> Iterator[Runtime]:
    """What this machine can pretend to be, the most telling ones first."""
    yield Runtime("1 thread")
    yield Runtime("AVX2 kernels", environment={"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"})
    cores = len(os.sched_getaffinity(0))
    for threads in sorted({2, cores} - {1}):
        if threads <= cores:
            yield Runtime(f"{threads} threads", threads)
    yield Runtime("ATEN_CPU_CAPABILITY=default", environment={"ATEN_CPU_CAPABILITY": "default"})
    yield Runtime("ATEN_CPU_CAPABILITY=avx2", environment={"ATEN_CPU_CAPABILITY": "avx2"})
    yield Runtime("ATEN_CPU_CAPABILITY=avx512", environment={"ATEN_CPU_CAPABILITY": "avx512"})
    yield Runtime("MKL_CBWR=COMPATIBLE", environment={"MKL_CBWR": "COMPATIBLE"})
    yield Runtime("ONEDNN_MAX_CPU_ISA=AVX2", environment={"ONEDNN_MAX_CPU_ISA": "AVX2"})


def calibrate(config: RunConfig, out: Path, effort: Effort, say: Callable[[str], None]) -> Tolerances:
    """Measure, and write the tolerance file.

    Raises:
        ConfigurationError: exact numerics, no room on the disk, or honest noise and cheats cannot be told apart.
        CalibrationError: a measuring process failed.
    """
    if config.numerics == "exact":
        raise ConfigurationError("exact runs compare hashes and need no tolerances; there is nothing to calibrate")
    with tempfile.TemporaryDirectory(prefix="swarm-calibrate-") as name:
        folder = Path(name)
        training.configure(1)
        say(f"warming up {config.model.num_trainable(config.trainable):,} parameters")
        chosen = list(runtimes())[: effort.runtimes]
        micros = _micro_batches(config)[: effort.micro_batches]
        prepared = Prepared.make(folder, config, effort.warm_up_steps)
        deviating = [kind for kind in deviations.KINDS if kind not in deviations.SLIGHT]
        made = (len(chosen) + len(micros) + len(deviating)) * effort.contributions
        needed = made * len(prepared.spec.segments(config.training.steps)) * training.size_bytes(prepared.spec)
        if shutil.disk_usage(folder).free < 2 * needed:
            raise ConfigurationError(
                f"calibration needs {2 * needed >> 20} MiB under {folder.parent}; make room, or set TMPDIR"
            )
        for runtime in chosen:
            say(f"training: {runtime.name}")
            own = [Made("honest", config.training.micro_sequences)]
            if runtime is chosen[0]:
                own += [Made("honest", micro) for micro in micros]
                own += [Made(kind, config.training.micro_sequences) for kind in deviating]
            _run(folder, runtime, Task(runtime.name, runtime.threads, effort.contributions, make=own))
        found: list[dict[str, Any]] = []
        for runtime in chosen:
            say(f"replaying: {runtime.name}")
            task = Task(runtime.name, runtime.threads, effort.contributions, with_cheats=runtime is chosen[0])
            found += _run(folder, runtime, task)
        result = _tolerances(config, effort, folder, found)
    write_atomic(out, result.encode())
    return result


def _micro_batches(config: RunConfig) -> list[int]:
    """Other sizes that divide the batch: stand-ins for machines that this one cannot pretend to be."""
    batch = config.training.batch_sequences
    return [size for size in range(batch, 0, -1) if batch % size == 0 and size != config.training.micro_sequences]


def _run(folder: Path, runtime: Runtime, task: Task) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "swarm_coordinator.measure", str(folder), json.dumps(task.to_json())]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **runtime.environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise CalibrationError(f"the runtime {runtime.name!r} cannot be measured:\n{done.stderr[-2000:]}")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def _tolerances(config: RunConfig, effort: Effort, folder: Path, found: list[dict[str, Any]]) -> Tolerances:
    """The file, from what the runtimes said: maker, kind, micro, auditor, and the distance of each segment."""
    names = {path.stem: json.loads(path.read_text()) for path in (folder / "runtimes").glob("*.json")}
    hashes = {name: fingerprint_hash(facts).hex() for name, facts in names.items()}
    honest, cheats = defaultdict(list), defaultdict(list)
    pairs: dict[tuple[str, str], float] = defaultdict(float)
    for one in found:
        distances = [min(distance, tolerances.MAX_DISTANCE) for distance in one["distances"]]
        if one["kind"] != "honest":
            partial = one["kind"] in deviations.PARTIAL
            cheats[one["kind"]].append(max(distances) if partial else min(distances))
        elif one["micro"] != config.training.micro_sequences:
            honest[f"micro-batches of {one['micro']}"].append(max(distances))
        else:
            honest[one["runtime"]].append(max(distances))
            first, second = sorted((hashes[one["runtime"]], hashes[one["auditor"]]))
            pairs[first, second] = max(pairs[first, second], *distances)
    worst = max(max(values) for values in honest.values())
    mildest = min(min(values) for values in cheats.values())
    least = worst * QUIET if worst else 1e-9
    tolerances.place(worst, mildest, least=least)  # refuses before a quieter pair could pass
    return Tolerances(
        model=config.model,
        training=config.training,
        trainable=config.trainable,
        contributions=effort.contributions,
        runtimes={hashes[name]: facts for name, facts in names.items()},
        precisions={
            config.training.precision: Precision(
                worst_honest=worst,
                mildest_cheat=mildest,
                margin_orders=round(tolerances.margin_orders(worst or least, mildest), 2),
                honest={name: max(values) for name, values in honest.items()},
                cheats={name: min(values) for name, values in cheats.items()},
                pairs=tuple(_pairs(pairs.items(), mildest, least)),
            )
        },
    )


def _pairs(worst: Iterable[tuple[tuple[str, str], float]], mildest: float, least: float) -> Iterator[Pair]:
    for (first, second), distance in sorted(worst):
        bounds = tolerances.place(distance, mildest, least=least)
        yield Pair(
            runtimes=(first, second), worst_honest=distance, accept=float(bounds.accept), reject=float(bounds.reject)
        )
