"""Whether audits tell honest work from cheats: the distances, who is accused, what is caught, and what an audit costs.

    python benchmarks/replay.py [--json] [--quick]

Contributions to a small warmed-up model (on the Python standard library's sources) are made under several kernels, thread
counts and micro-batches, and audited whole by two runtimes: native with float32 products, native with bfloat16 products, and
exact. Every runtime is a process of its own. Cheats are the node's own red team.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swarm_node import contribution as contributions
from swarm_node.cheats import Kind
from swarm_node.cheats.kinds import KINDS
from swarm_node.conduct import Conduct
from swarm_node.contribution import Progress
from swarm_protocol import audit, corpus, data, deviations, parts, tolerances, training
from swarm_protocol.audit import Claims, Subject
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.chunks import content_hash
from swarm_protocol.data import Dataset, DatasetManifest
from swarm_protocol.fingerprint import fingerprint_hash, runtime_fingerprint
from swarm_protocol.model.llama import initial_parameters
from swarm_protocol.records import Outcome, RoundPlan, Seat
from swarm_protocol.spec import (
    AuditSpec,
    DataConfig,
    DataSpec,
    ExchangeSpec,
    ModelSpec,
    OptimizerSpec,
    OuterSpec,
    RoundsSpec,
    RunSpec,
    TrainingSpec,
)
from swarm_protocol.tolerances import Pair, Precision, Tolerances
from swarm_protocol.training import TrainState

ZERO = "0" * 64
WARM_UP_STEPS = 100
BASES = 4
"""Checkpoints that contributions begin from, 20 steps apart."""

ALONE = 4
"""Contributions of each kind whose segments are also audited one by one, and all again by a second auditor."""

UNMEASURED = {Kind.OTHER_PARTS, Kind.FORGED_STATES}
"""Kinds that are found without a distance."""

UNSERVED = {Kind.REFUSES_EVIDENCE, Kind.FORGED_EVIDENCE, Kind.LYING_REDUCER}
"""Kinds whose training is honest: what they do, they do on the network."""

SLIGHT = {Kind(name) for name in deviations.SLIGHT}
UNPROMISED = {
    "float32": SLIGHT,
    "bfloat16": {*SLIGHT, Kind.LEARNING_RATE, Kind.FLIPPED_BIT, Kind.SCALED},
    "exact": set(),
}
"""Kinds that are too near to honest noise for an audit to tell, by mode."""


@dataclass(frozen=True)
class Runtime:
    """How a process computes; `micro` sequences are in a micro-batch."""

    threads: int = 1
    micro: int = 8
    environment: dict[str, str] = field(default_factory=dict)


RUNTIMES = {
    "as it comes": Runtime(),
    "2 threads": Runtime(threads=2),
    "ATEN default, MKL COMPATIBLE": Runtime(environment={"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}),
    "ATEN avx2, oneDNN AVX2": Runtime(environment={"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "ATEN avx512": Runtime(environment={"ATEN_CPU_CAPABILITY": "avx512"}),
    "oneDNN SSE41, MKL AVX2": Runtime(environment={"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "AVX2"}),
    "micro-batches of 4": Runtime(micro=4),
    "micro-batches of 2, 2 threads": Runtime(threads=2, micro=2),
}
AUDITORS = ("as it comes", "ATEN avx2, oneDNN AVX2")
MODES = ("float32", "bfloat16", "exact")
SIZES = {"float32": (26, 13), "bfloat16": (6, 4), "exact": (26, 13)}
"""Honest contributions per runtime, and cheating ones per kind."""

BOUNDS = {"bfloat16": (0.12, 0.36)}
"""Accept and reject where they are not the spec's: twice the worst that honest work was measured at, and three times that."""

COSTS = 7
"""Contributions of which each is made and audited, for the cost."""


def spec_model() -> ModelSpec:
    return ModelSpec(hidden_size=96, intermediate_size=256, num_hidden_layers=2, max_position_embeddings=64)


def spec_of(mode: str, manifest: DatasetManifest, micro: int = 8) -> RunSpec:
    return RunSpec(
        name="benchmark",
        seed=1,
        numerics="exact" if mode == "exact" else "native",
        coordinator=ZERO,
        checkpoint=ZERO,
        beacon=ZERO,
        model=spec_model(),
        data=DataSpec(
            root=manifest.root.hex(), tokenizer="bytes", train_tokens=manifest.train_tokens, held_out_windows=1
        ),
        training=TrainingSpec(
            batch_sequences=8,
            micro_sequences=micro,
            steps=6,
            segment_steps=2,
            optimizer=OptimizerSpec(warmup_steps=2),
        ),
        exchange=ExchangeSpec(),
        outer=OuterSpec(),
        rounds=RoundsSpec(count=1000),
        audit=AuditSpec(),
    )


def plan_of(spec: RunSpec, base: int, number: int) -> RoundPlan:
    """A round of one slot, whose windows no other number has."""
    seat = Seat(peer=bytes(32), steps=spec.training.steps, weight=1, reducer=True)
    return RoundPlan(
        run=spec.run_id, round=base, base=bytes(32), roster=(seat,),
        cursor=10_000 + number * spec.training.steps * spec.training.batch_sequences,
        commit_by_ms=0, exchange_by_ms=0, previous_beacon=bytes(32), log_size=0, log_root=bytes(32),
    )  # fmt: skip


def bounds_for(spec: RunSpec, mode: str, node: bytes, auditor: bytes) -> Tolerances:
    """The bounds that audits go by here, as a file that has them for this pair of runtimes."""
    accept, reject = BOUNDS.get(mode, (spec.audit.accept, spec.audit.reject))
    names = tuple(sorted((node.hex(), auditor.hex())))
    pair = Pair(runtimes=names, worst_honest=0.0, accept=accept, reject=reject)
    measured = Precision(worst_honest=0.0, mildest_cheat=1.0, margin_orders=0.0, honest={}, cheats={}, pairs=(pair,))
    return Tolerances(
        model=spec.model, training=spec.training, contributions=1, runtimes={}, precisions={"float32": measured}
    )


# --- A worker: one runtime, one mode


class Worker:
    """Makes and audits contributions under `folder`, in the runtime that this process was given."""

    def __init__(self, folder: Path, mode: str, runtime: str) -> None:
        self.folder, self.mode, self.name = folder, mode, runtime
        self.runtime = RUNTIMES[runtime]
        training.configure(self.runtime.threads)
        manifest = DatasetManifest.decode((folder / "manifest").read_bytes())
        self.dataset = Dataset.from_directory(manifest, folder / "shards")
        self.spec = spec_of(mode, manifest)
        self.fingerprint = fingerprint_hash(runtime_fingerprint("cpu", self.runtime.threads))
        bases = np.load(folder / "bases.npy")
        (folder / f"fingerprint-{runtime}").write_bytes(self.fingerprint)
        self.bases = [Checkpoint(number, vector, np.zeros_like(vector)) for number, vector in enumerate(bases)]

    def products(self) -> Any:
        return deviations.bfloat16_products() if self.mode == "bfloat16" else nullcontext()

    def make(self, kind: Kind | None, numbers: Iterable[int]) -> None:
        """Contributions of one kind, honest ones for None."""
        own = self.spec.training.model_copy(update={"micro_sequences": self.runtime.micro})
        spec = self.spec if kind else self.spec.model_copy(update={"training": own})
        for number in numbers:
            base = 1 + number % (BASES - 1)
            conduct = KINDS[kind]() if kind else Conduct()
            where = self.folder / self.mode / f"{kind or 'honest'}-{self.name}-{number}" / f"round-{base}"
            plan = plan_of(self.spec, base, number)
            progress = Progress(lambda _step, _loss: None, lambda: False)
            with self.products():
                self._before(kind, conduct, where, base, number)
                started = time.perf_counter()
                contributions.make(
                    spec, plan, 0, self.bases[base], self.dataset, where, progress, conduct.train, conduct.encode
                )
            seconds = time.perf_counter() - started
            note = {"number": number, "base": base, "kind": kind or "honest", "runtime": self.name, "seconds": seconds}
            (where / "note.json").write_text(json.dumps(note))

    def _before(self, kind: Kind | None, conduct: Conduct, where: Path, base: int, number: int) -> None:
        """The earlier rounds that some kinds need."""
        progress = Progress(lambda _step, _loss: None, lambda: False)
        where.mkdir(parents=True)
        if kind is Kind.STALE_CHECKPOINT:
            plan = plan_of(self.spec, base - 1, number + 5000)
            conduct.train(self.spec, plan, 0, self.bases[base - 1], self.dataset, progress)
        elif kind is Kind.SLEEPER:
            for earlier in (100, 101):
                plan = plan_of(self.spec, earlier, number)
                conduct.train(self.spec, plan, 0, self.bases[base], self.dataset, progress)
        elif kind is Kind.COPIED:
            earlier_folder = where.parent / f"round-{base - 1}"
            earlier_folder.mkdir()
            plan = plan_of(self.spec, base - 1, number + 5000)
            trained = contributions.train(self.spec, plan, 0, self.bases[base - 1], self.dataset, progress)
            for part, encoded in enumerate(
                parts.encode_parts(self.spec, self.bases[base - 1].parameters, trained.final.parameters)
            ):
                (earlier_folder / f"input-{part}-1-00").write_bytes(encoded)

    def audit(self) -> list[dict[str, Any]]:
        """Every contribution of this mode, whole."""
        found = []
        for path in sorted((self.folder / self.mode).glob("*/*/note.json")):
            note = json.loads(path.read_text())
            if self.name != AUDITORS[0] and note["kind"] != "honest" and note["number"] >= ALONE:
                continue
            alone = (
                self.name == AUDITORS[0]
                and note["number"] < ALONE
                and (note["kind"] != "honest" or note["runtime"] == self.name)
            )
            found.append(note | {"auditor": self.name} | self._audited(path.parent, note, alone=alone))
        return found

    def cost(self) -> dict[str, float]:
        """What an audit takes beside making the contribution, one after the other in this process: medians of the ratios."""
        whole, one = [], []
        for number in range(9000, 9001 + COSTS):
            self.make(None, [number])
            (path,) = (self.folder / self.mode).glob(f"honest-{self.name}-{number}/*/note.json")
            note = json.loads(path.read_text())
            found = self._audited(path.parent, note, alone=True)
            whole.append(found["whole_s"] / note["seconds"])
            one.append(found["one_s"] / note["seconds"])
        return {"whole": statistics.median(whole[1:]), "one_segment": statistics.median(one[1:])}  # the first warms up

    def _audited(self, where: Path, note: dict[str, Any], *, alone: bool) -> dict[str, Any]:
        plan = plan_of(self.spec, note["base"], note["number"])
        contribution = contributions.load(self.spec, where)
        assert contribution is not None
        commitment = contribution.commitment(
            self.spec, plan, (self.folder / f"fingerprint-{note['runtime']}").read_bytes()
        )
        subject = Subject(self.spec, plan, 0, commitment, self.bases[note["base"]].parameters)
        calibrated = bounds_for(self.spec, self.mode, commitment.fingerprint, self.fingerprint)
        states = {
            index: TrainState.from_bytes(self.spec, contribution.state_path(index).read_bytes())
            for index in range(len(contribution.states))
        }
        claims = Claims(contribution.state_roots, states)
        everything = range(len(subject.segments))

        def examine(drawn: Iterable[int], claims: Claims | None) -> tuple[audit.Finding, float]:
            started = time.perf_counter()
            with self.products():
                finding = audit.examine(
                    subject,
                    list(drawn),
                    claims,
                    lambda step: data.batch(self.spec, plan, 0, step, self.dataset),
                    fingerprint=self.fingerprint,
                    tolerances=calibrated,
                )
            return finding, time.perf_counter() - started

        finding, whole_s = examine(everything, None if self.mode == "exact" else claims)
        one_s = None
        by_segment: dict[int, str] = {}
        for index in everything if alone else ():
            single, one_s = examine([index], claims)
            by_segment[index] = single.judgement.outcome.value
        return {
            "outcome": finding.judgement.outcome.value,
            "reason": finding.judgement.reason,
            "statistics": {
                str(index): compared.statistic if math.isfinite(compared.statistic) else None
                for index, compared in finding.compared.items()
            },
            "equal": all(compared.comparison == "equal" for compared in finding.compared.values()),
            "alone": by_segment,
            "whole_s": whole_s,
            "one_s": one_s,
        }


def deviating_segments(kind: str, segments: int) -> set[int]:
    """Those that a kind changes; any other is honest, if it begins from the state that is claimed."""
    match kind:
        case Kind.FEWER_STEPS:
            return set(range(segments // 2, segments))
        case Kind.SKIPPED_STEP:
            return {segments // 2}
        case Kind.FLIPPED_BIT:
            return {segments - 1}
        case Kind.STALE_CHECKPOINT:
            return {0}
        case _:
            return set(range(segments))


# --- The table


def summary(found: list[dict[str, Any]], mode: str) -> dict[str, Any]:
    """Of one mode's audits: the distances by kind, who was accused, what was caught."""
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in found:
        kinds[one["kind"]].append(one)
    rows = {}
    for kind, audits in sorted(kinds.items()):
        deviating = deviating_segments(kind, 3)
        worst = [
            max(distances)
            for one in audits
            if (distances := [v for k, v in one["statistics"].items() if int(k) in deviating and v is not None])
        ]
        seen = [one["alone"][str(index)] for one in audits for index in deviating if str(index) in one["alone"]]
        rows[kind] = {
            "contributions": len({(one["runtime"], one["number"]) for one in audits}),
            "audits": len(audits),
            "distance": [min(worst), statistics.median(worst), max(worst)] if worst and mode != "exact" else None,
            "equal": sum(one["equal"] and one["outcome"] == Outcome.ACCEPTED for one in audits),
            "outcomes": {str(o): n for o in Outcome if (n := sum(one["outcome"] == o for one in audits))},
            "segment_audits": len(seen),
            "segments_caught": sum(outcome == Outcome.REJECTED for outcome in seen),
        }
    honest = kinds["honest"]
    cheats = {kind: row for kind, row in rows.items() if kind != "honest"}
    promised = {k: row for k, row in cheats.items() if k not in UNPROMISED[mode]}
    result: dict[str, Any] = {
        "kinds": rows,
        "honest_contributions": rows["honest"]["contributions"],
        "cheating_contributions": sum(row["contributions"] for row in cheats.values()),
        "false_accusations": sum(one["outcome"] == Outcome.REJECTED for one in honest),
        "honest_not_accepted": sum(one["outcome"] != Outcome.ACCEPTED for one in honest),
        "not_caught": sorted(
            kind
            for kind, row in promised.items()
            if row["outcomes"] != {"rejected": row["audits"]} or row["segments_caught"] != row["segment_audits"]
        ),
    }
    if mode == "exact":
        result["honest_equal"] = rows["honest"]["equal"] == rows["honest"]["audits"]
    else:
        measured = {k: row["distance"][0] for k, row in promised.items() if row["distance"]}
        mildest = min(measured, key=lambda kind: measured[kind] if kind not in UNMEASURED else math.inf)
        worst_honest = rows["honest"]["distance"][2]
        result |= {
            "worst_honest": worst_honest,
            "mildest_cheat": {"kind": mildest, "distance": measured[mildest]},
            "margin_orders": round(tolerances.margin_orders(worst_honest, measured[mildest]), 2),
            "honest_by_runtime": {
                name: max(v for one in honest if one["runtime"] == name for v in one["statistics"].values())
                for name in sorted({one["runtime"] for one in honest})
            },
        }
    return result


def show(mode: str, result: dict[str, Any], say: Callable[[str], None]) -> None:
    say(
        f"\n{mode}: {'kind':22} {'made':>5} {'least':>9} {'median':>9} {'most':>9}  segments caught, outcomes of whole audits"
    )
    for kind, row in result["kinds"].items():
        distance = row["distance"] or []
        shown = " ".join(f"{value:9.1e}" for value in distance) or " " * 29
        outcomes = ", ".join(f"{count} {name}" for name, count in row["outcomes"].items())
        caught = "" if kind == "honest" else f"{row['segments_caught']}/{row['segment_audits']}, "
        say(f"{'':{len(mode) + 2}}{kind:22} {row['contributions']:5} {shown}  {caught}{outcomes}")
    say(
        f"false accusations {result['false_accusations']}, honest not accepted {result['honest_not_accepted']}, "
        f"not caught {result['not_caught'] or 'none'}"
    )
    if "margin_orders" in result:
        mildest = result["mildest_cheat"]
        say(
            f"worst honest {result['worst_honest']:.1e}, mildest cheat {mildest['distance']:.1e} ({mildest['kind']}): "
            f"{result['margin_orders']} orders of magnitude"
        )


# --- All of it


def prepare(folder: Path) -> None:
    """The corpus, and the checkpoints that contributions begin from."""
    shards = folder / "shards"
    shards.mkdir()

    def put(blob: bytes) -> None:
        (shards / content_hash(blob).hex()).write_bytes(blob)

    model = spec_model()
    manifest = corpus.write_dataset(DataConfig(), model, corpus.stdlib_corpus()[:120], put)
    (folder / "manifest").write_bytes(manifest.encode())
    spec = spec_of("float32", manifest)
    recipe = spec.training.model_copy(update={"steps": 1000})
    warm = spec.model_copy(update={"training": recipe})
    dataset = Dataset.from_directory(manifest, shards)
    plan = plan_of(warm, 0, 0).model_copy(update={"cursor": 0})
    trainer, state, bases = training.Trainer(warm), TrainState.initial(warm, initial_parameters(model, 0)), []
    for stop in range(WARM_UP_STEPS, WARM_UP_STEPS + 20 * BASES, 20):
        state = trainer.run(state, lambda step: data.batch(warm, plan, 0, step, dataset), stop)
        bases.append(state.parameters)
    np.save(folder / "bases.npy", np.stack(bases))


def work(folder: Path, runtime: str, **task: Any) -> Any:
    """Have a process of this runtime do something."""
    quiet = {"OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, __file__, "--worker", json.dumps({"folder": str(folder), "runtime": runtime} | task)]
    environment = {**os.environ, **quiet, **RUNTIMES[runtime].environment}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def worker(
    folder: str, runtime: str, make: dict[str, list[tuple[str | None, int]]], audits: list[str], costs: list[str]
) -> dict[str, Any]:
    """The other side of `work`: make what is asked for, by mode, audit these modes, and measure the cost in those."""
    for mode, wanted in make.items():
        one = Worker(Path(folder), mode, runtime)
        for kind, count in wanted:
            one.make(None if kind is None else Kind(kind), range(count))
    return {mode: Worker(Path(folder), mode, runtime).audit() for mode in audits} | {
        f"{mode} cost": Worker(Path(folder), mode, runtime).cost() for mode in costs
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="two of each kind")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--cost-only", action="store_true", help="only what an audit costs")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        print(json.dumps(worker(**json.loads(arguments.worker))))
        return

    def say(text: str) -> None:
        print(text, flush=True)

    training.configure(1)
    sizes = dict.fromkeys(MODES, (2, 2)) if arguments.quick else SIZES
    kinds = [kind for kind in Kind if kind not in UNSERVED]
    machine = runtime_fingerprint("cpu", 1)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{machine['cpu']}; torch {torch.__version__}, Python {platform.python_version()}",
        "parameters": spec_model().num_parameters,
    }
    started = time.monotonic()
    say(f"{result['machine']}; {result['parameters']:,} parameters")
    with tempfile.TemporaryDirectory(prefix="swarm-replay-") as name:
        folder = Path(name)
        prepare(folder)
        audited = [] if arguments.cost_only else list(arguments.modes)
        for runtime in RUNTIMES if audited else ():
            make: dict[str, list[tuple[str | None, int]]] = {}
            for mode in arguments.modes:
                per_runtime, per_kind = sizes[mode]
                make[mode] = [(None, per_runtime)]
                if runtime == AUDITORS[0]:
                    left_out = {Kind.LOW_PRECISION} if mode == "bfloat16" else set()
                    make[mode] += [(kind.value, per_kind) for kind in kinds if kind not in left_out]
            work(folder, runtime, make=make, audits=[], costs=[])
        found = [work(folder, auditor, make={}, audits=audited, costs=[]) for auditor in AUDITORS]
        costs = work(folder, AUDITORS[0], make={}, audits=[], costs=list(arguments.modes))
        for mode in arguments.modes:
            result[mode] = {"cost": costs[f"{mode} cost"]}
            if audited:
                result[mode] |= summary([audit for one in found for audit in one[mode]], mode)
                show(mode, result[mode], say)
            cost = result[mode]["cost"]
            say(
                f"{mode}: an audit costs {cost['one_segment']:.0%} of the contribution for one segment of three, "
                f"{cost['whole']:.0%} whole"
            )
    result["wall_s"] = round(time.monotonic() - started, 1)
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
