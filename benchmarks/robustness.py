"""What 3 attackers among 16 do to a real small run, under each aggregator: `python benchmarks/robustness.py [--json]`.

The run is DiLoCo in one process on the Python standard library's sources: `training` on every slot's own batches, parts
encoded by int4, sketches, selection, aggregation and the outer step by the code that a swarm uses. Attackers know what
every honest slot found. `clean` is the final held-out loss of the plain mean with nobody attacking; the figure that
matters is `default_within_percent`, how far above it the default aggregator ends under the worst attack. With `--quick`
the run is so short that its losses mean little; it shows that the script works.

    sign flip x10       -10 times an honest contribution
    random x3           noise of 3 times the honest norm
    alie                mean - z · standard deviation (A Little Is Enough; Baruch et al. 2019)
    inner product -0.5  -0.5 times the honest mean (Xie et al. 2019), and -5 times
    nan                 scales that are not numbers
    forged sketch       sign flip x10 under the sketches of the honest mean
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from swarm_protocol import aggregate, checkpoint, codec, corpus, data, parts, sketch, training
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.chunks import content_hash
from swarm_protocol.errors import InvalidDataError, SwarmError
from swarm_protocol.model import llama
from swarm_protocol.records import RoundPlan, Seat
from swarm_protocol.spec import DataSpec, RunConfig, RunSpec

Float32 = npt.NDArray[np.float32]

DEFAULT = "multi_krum"
SLOTS = 16
ATTACKERS = (3, 8, 13)
ZERO = bytes(32)
CACHED = 2000
"""Trainings that are kept, of 400 KB each."""

RUN = """
name = "robustness"
numerics = "native"
[model]
hidden_size = 64
intermediate_size = 160
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 64
[training]
batch_sequences = 4
micro_sequences = 4
[training.optimizer]
lr = 0.01
"""


@dataclass(frozen=True)
class Attack:
    """`craft(honest, rng)` makes an attacker's pseudo-gradient from the honest ones, float32[n, numel]."""

    craft: Callable[[Float32, np.random.Generator], Float32]
    breaks_scales: bool = False
    forges_sketches: bool = False


def _times(values: Float32, factor: float) -> Float32:
    return np.asarray(values * factor, np.float32)


def _alie(honest: Float32, _: np.random.Generator) -> Float32:
    supporters = SLOTS // 2 + 1 - len(ATTACKERS)
    z = NormalDist().inv_cdf((len(honest) - supporters) / len(honest))
    return _times(honest.mean(axis=0) - z * honest.std(axis=0), 1)


def _random(honest: Float32, rng: np.random.Generator) -> Float32:
    noise = np.asarray(rng.standard_normal(honest.shape[1]), np.float32)
    return _times(noise, float(3 * np.mean(np.linalg.norm(honest, axis=1)) / np.linalg.norm(noise)))


def _flip(honest: Float32, rng: np.random.Generator) -> Float32:
    return _times(honest[rng.integers(len(honest))], -10)


ATTACKS: dict[str, Attack | None] = {
    "none": None,
    "sign flip x10": Attack(_flip),
    "random x3": Attack(_random),
    "alie": Attack(_alie),
    "inner product -0.5": Attack(lambda honest, _: _times(honest.mean(axis=0), -0.5)),
    "inner product -5": Attack(lambda honest, _: _times(honest.mean(axis=0), -5)),
    "nan": Attack(lambda honest, _: honest[0], breaks_scales=True),
    "forged sketch": Attack(_flip, forges_sketches=True),
}


@dataclass
class Bench:
    """The run's spec, data and trainer, shared by all cells of the table."""

    spec: RunSpec
    dataset: data.Dataset
    trainer: training.Trainer
    start: Checkpoint
    projections: dict[tuple[int, int], sketch.Projection] = field(default_factory=dict)
    trained: dict[tuple[bytes, int, int], Float32] = field(default_factory=dict)

    def projection(self, round_number: int, part: int) -> sketch.Projection:
        """That of a made-up commitment set per round: its hash is all that counts."""
        key = (round_number, part)
        if key not in self.projections:
            where = parts.slices(self.spec)[part]
            closing = content_hash(str(round_number).encode())
            self.projections[key] = sketch.projection(closing, part, where.stop - where.start)
        return self.projections[key]

    def train(self, plan: RoundPlan, slot: int, here: Checkpoint) -> Float32:
        """A slot's parameters after its inner steps. Cells that come to the same checkpoint share them."""
        key = (here.root, plan.round, slot)
        if key not in self.trained:
            start = training.TrainState.initial(self.spec, here.parameters)
            final = self.trainer.run(
                start, lambda step: data.batch(self.spec, plan, slot, step, self.dataset), plan.roster[slot].steps
            )
            if len(self.trained) >= CACHED:
                del self.trained[next(iter(self.trained))]
            self.trained[key] = final.parameters
        return self.trained[key]


def prepare(folder: Path, *, rounds: int, steps: int) -> Bench:
    """The corpus as shards in `folder`, a spec with a seat for everybody, and checkpoint 0."""
    config = RunConfig.from_toml(RUN)
    manifest = corpus.write_dataset(
        config.data, config.model, corpus.stdlib_corpus(), lambda blob: _write(folder / content_hash(blob).hex(), blob)
    )
    sealed = config.model_dump() | {
        "coordinator": ZERO.hex(),
        "checkpoint": ZERO.hex(),
        "beacon": ZERO.hex(),
        "data": DataSpec(root=manifest.root.hex(), tokenizer="bytes", train_tokens=manifest.train_tokens,
                         held_out_windows=256).model_dump(),
        "training": config.training.model_dump() | {"steps": steps},
        "rounds": config.rounds.model_dump() | {"count": rounds},
    }  # fmt: skip
    spec = RunSpec.model_validate(sealed)
    start = Checkpoint.initial(llama.initial_parameters(spec.model, spec.seed))
    return Bench(spec, data.Dataset.from_directory(manifest, folder), training.Trainer(spec), start)


def _write(path: Path, blob: bytes) -> None:
    path.write_bytes(blob)


@dataclass(frozen=True)
class Outcome:
    """Held-out loss in nats per token after all rounds, infinite where the run left the finite numbers; and the share of
    the weight that attackers had in the aggregates, on average over the rounds."""

    loss: float
    attackers_share: float


def play(bench: Bench, name: aggregate.Name, attack: Attack | None) -> Outcome:
    """All rounds of one cell of the table."""
    here = bench.start
    cursor = 0
    shares: list[float] = []
    try:
        for round_number in range(bench.spec.rounds.count):
            plan = plan_of(bench.spec, round_number, cursor)
            cursor += data.windows_used(bench.spec, plan)
            encoded, forged = _contributions(bench, plan, here, attack)
            chosen, averages = exchange(bench, plan, name, encoded, forged)
            shares.append(sum(chosen.get(slot, 0) for slot in ATTACKERS if attack) / sum(chosen.values()))
            here = checkpoint.advance(bench.spec, here, averages)
        loss = bench.trainer.evaluate(here.parameters, data.held_out_batches(bench.spec, bench.dataset))
    except SwarmError:
        loss = math.inf
    return Outcome(loss, round(sum(shares) / len(shares), 4))


def plan_of(spec: RunSpec, round_number: int, cursor: int) -> RoundPlan:
    steps = spec.training.steps
    seat = Seat(peer=ZERO, steps=steps, weight=min(steps * spec.tokens_per_step, 1 << 24), reducer=True)
    return RoundPlan(
        run=spec.run_id, round=round_number, base=ZERO, roster=(seat,) * SLOTS, cursor=cursor, commit_by_ms=0,
        exchange_by_ms=0, previous_beacon=ZERO, log_size=0, log_root=ZERO,
    )  # fmt: skip


def _contributions(
    bench: Bench, plan: RoundPlan, here: Checkpoint, attack: Attack | None
) -> tuple[dict[int, list[bytes]], dict[int, list[bytes]]]:
    """Every slot's encoded parts, and the parts that forgers make their sketches of instead."""
    liars = ATTACKERS if attack is not None else ()
    finals = {slot: bench.train(plan, slot, here) for slot in range(SLOTS) if slot not in liars}
    encoded = {slot: parts.encode_parts(bench.spec, here.parameters, final) for slot, final in finals.items()}
    forged: dict[int, list[bytes]] = {}
    if attack is not None:
        honest = here.parameters - np.array(list(finals.values()))
        encode = codec.get(bench.spec.exchange.codec).encode
        where = parts.slices(bench.spec)
        for slot in liars:
            crafted = attack.craft(honest, np.random.default_rng([plan.round, slot]))
            encoded[slot] = [encode(crafted[part]) for part in where]
            if attack.breaks_scales:
                encoded[slot] = [np.float32(math.nan).tobytes() + part[4:] for part in encoded[slot]]
            if attack.forges_sketches:
                forged[slot] = [encode(honest.mean(axis=0)[part]) for part in where]
    return encoded, forged


def exchange(
    bench: Bench,
    plan: RoundPlan,
    name: aggregate.Name,
    encoded: Mapping[int, list[bytes]],
    forged: Mapping[int, list[bytes]],
) -> tuple[dict[int, int], list[bytes | None]]:
    """The slots that are sound and selected, with their weights, and the encoded average of every part."""
    spec = bench.spec
    decoded: dict[int, list[Float32]] = {}
    for slot, blobs in sorted(encoded.items()):
        try:
            decoded[slot] = [parts.decode_part(spec, part, blob) for part, blob in enumerate(blobs)]
        except InvalidDataError:
            continue
    weights = {slot: plan.roster[slot].weight for slot in decoded}
    sketches: dict[int, list[Float32]] = {}
    if aggregate.needs_sketches(name, len(weights)):
        maps = [bench.projection(plan.round, part) for part in range(parts.part_count(spec))]
        for slot, values in decoded.items():
            shown = [parts.decode_part(spec, part, blob) for part, blob in enumerate(forged.get(slot, []))] or values
            claims = [sketch.encode(sketch.of(where, part)) for where, part in zip(maps, shown, strict=True)]
            if all(map(sketch.matches, maps, values, claims)):
                sketches[slot] = [sketch.decode(claim) for claim in claims]
    chosen = aggregate.select(name, weights, sketches, clip_radius=spec.exchange.clip_radius)
    averages: list[bytes | None] = []
    for part, where in enumerate(parts.slices(spec)):
        under_way = aggregate.start(name, chosen, where.stop - where.start, trim_fraction=spec.exchange.trim_fraction)
        for slot in chosen:
            under_way.add(slot, decoded[slot][part])
        averages.append(codec.get(spec.exchange.codec).encode(under_way.result()))
    return chosen, averages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    parser.add_argument("--quick", action="store_true", help="a very short run, to see that all of it works")
    parser.add_argument("--rounds", type=int, help="outer steps (10)")
    parser.add_argument("--steps", type=int, help="inner steps per round (15)")
    parser.add_argument("--aggregator", action="append", choices=get_args(aggregate.Name), help="only these")
    parser.add_argument("--attack", action="append", choices=list(ATTACKS), help="only these, and none")
    options = parser.parse_args()
    names: list[aggregate.Name] = options.aggregator or list(get_args(aggregate.Name))
    attacks = {name: a for name, a in ATTACKS.items() if name == "none" or name in (options.attack or ATTACKS)}
    began = time.perf_counter()
    training.configure(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(
            Path(folder),
            rounds=options.rounds or (2 if options.quick else 10),
            steps=options.steps or (3 if options.quick else 15),
        )
        out = sys.stderr if options.json else sys.stdout
        before = bench.trainer.evaluate(bench.start.parameters, data.held_out_batches(bench.spec, bench.dataset))
        print(
            f"{bench.spec.model.num_parameters:,} parameters, {SLOTS} slots, {bench.spec.rounds.count} rounds of"
            f" {bench.spec.training.steps} steps; loss before training {before:.3f}",
            file=out,
        )
        table: dict[str, dict[str, float | None]] = {}
        shares: dict[str, dict[str, float]] = {}
        unhindered = play(bench, "mean", None)
        clean = unhindered.loss
        for name in names:
            table[name], shares[name] = {}, {}
            for label, attack in attacks.items():
                if attack is not None and attack.forges_sketches and not aggregate.needs_sketches(name, SLOTS):
                    continue  # there is nothing to forge: it is the sign flip
                found = unhindered if (name, attack) == ("mean", None) else play(bench, name, attack)
                table[name][label] = found.loss if math.isfinite(found.loss) else None
                shares[name][label] = found.attackers_share
                percent = 100 * (found.loss / clean - 1)
                print(
                    f"{name:17} {label:19} {found.loss:8.4f} {percent:+9.2f} %  attackers {found.attackers_share:.3f}",
                    file=out,
                    flush=True,
                )
    result: dict[str, Any] = {
        "clean": clean,
        "before": before,
        "final_loss": table,
        "attackers_share": shares,
        "default": DEFAULT,
        "default_within_percent": _worst_percent(table.get(DEFAULT), clean),
        "wall_s": round(time.perf_counter() - began, 1),
        "cpu_s": round(time.process_time(), 1),
    }
    if options.json:
        print(json.dumps(result))
    else:
        print(f"{DEFAULT} ends within {result['default_within_percent']} % of the clean loss; {result['wall_s']} s")


def _worst_percent(row: Mapping[str, float | None] | None, clean: float) -> float | None:
    """None where the row is not there, or a run of it left the finite numbers."""
    losses = list(row.values()) if row else []
    finite = [loss for loss in losses if loss is not None]
    return round(max(100 * (loss / clean - 1) for loss in finite), 3) if finite and len(finite) == len(losses) else None


if __name__ == "__main__":
    main()
