"""What exact training costs beside native training, whether its bits hold, and whether it learns as well.

    python benchmarks/exact.py [--json] [--quick] [--optimizer adamw|muon] [--threads N] [--profile]
    python benchmarks/exact.py --device cuda [--json] [--quick] [--optimizer adamw|muon]

Cost: medians of inner steps of 2,048 tokens, exact and native float32 in turns in one process, both on N threads. Bits: state
hashes after 20 steps of a small model under other kernels, thread counts and micro-batches, and by the numpy reference.
Loss: held-out loss after 500 steps on the Python standard library's sources, over 3 seeds, exact minus native, beside a
control (native from initial weights off by 1e-3) and the spread of native's own seeds.

With --device: what a step of 150 million parameters costs there, with every kind of products and passes and in native
float32, beside native training with products in bfloat16; and hashes of the states, of which the exact ones must be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from swarm_protocol import fingerprint, seeds, training
from swarm_protocol.deviations import bfloat16_products
from swarm_protocol.exact import Trainer, reference_step, segment, trusted_backend
from swarm_protocol.exact.backend import Backend, candidates
from swarm_protocol.model import llama
from swarm_protocol.spec import ModelSpec, OptimizerSpec, RunSpec
from swarm_protocol.training import Tokens, TrainState

TOKENS = 2048
WIDTHS = {
    "256": ModelSpec(
        hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
    ),
    "1024": ModelSpec(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=8
    ),
}
PARAMETERS_150M = ModelSpec(
    vocab_size=32_000,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=20,
    num_attention_heads=12,
    num_key_value_heads=4,
    max_position_embeddings=1024,
)
OPTIMIZERS = {"muon": OptimizerSpec(), "adamw": OptimizerSpec(name="adamw", lr=1e-3)}
ENVIRONMENTS: dict[str, tuple[dict[str, str], dict[str, int]]] = {
    "as it comes": ({}, {}),
    "another process": ({}, {}),
    "2 threads": ({}, {"threads": 2}),
    "3 threads": ({}, {"threads": 3}),
    "compiled passes of every size on 3 threads": ({}, {"threads": 3, "share_all": 1}),
    "micro-batch of 4 grains": ({}, {"micro": 4}),
    "ATEN_CPU_CAPABILITY=default": ({"ATEN_CPU_CAPABILITY": "default"}, {}),
    "ATEN_CPU_CAPABILITY=avx2, MKL_CBWR=COMPATIBLE": ({"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE"}, {}),
    "ONEDNN_MAX_CPU_ISA=AVX2": ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, {}),
    "ONEDNN_MAX_CPU_ISA=SSE41, 2 threads": ({"ONEDNN_MAX_CPU_ISA": "SSE41"}, {"threads": 2}),
    "torch passes": ({}, {"eager": 1}),
    "numpy reference": ({}, {"reference": 1}),
}


def spec_of(model: ModelSpec, sequences: int, optimizer: OptimizerSpec) -> RunSpec:
    recipe = {"batch_sequences": sequences, "micro_sequences": sequences, "steps": 10_000, "optimizer": optimizer}
    spec = segment.self_test_spec()
    return spec.model_copy(update={"model": model, "training": spec.training.model_copy(update=recipe)})


def corpus() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Bytes to train on and to hold out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)
    cut = len(text) * 19 // 20
    return text[:cut], text[cut:]


def windows(text: npt.NDArray[np.uint8], spec: RunSpec, seed: int) -> Callable[[int], Tokens]:
    """Random windows, one batch for each step."""
    length, count = spec.model.max_position_embeddings + 1, spec.training.batch_sequences

    def batch(step: int) -> Tokens:
        starts = seeds.raw(seed, "benchmark", 0, 0, step, count) % np.uint64(len(text) - length)
        return np.stack([text[at : at + length] for at in starts.astype(np.int64)]).astype(np.int64)

    return batch


# --- Cost


def step_seconds(
    trainer: Any, state: TrainState, batch: Callable[[int], Tokens], steps: int
) -> tuple[TrainState, list[float]]:
    """The state after some steps, and how long each but the first took: that one also loads the state."""
    marks: list[float] = []
    end = trainer.run(state, batch, state.step + steps, on_step=lambda _step, _loss: marks.append(time.perf_counter()))
    return end, list(np.diff(marks))


def cost(width: str, optimizer: OptimizerSpec, turns: int, backend: Backend) -> dict[str, float]:
    model = WIDTHS[width]
    spec = spec_of(model, TOKENS // model.max_position_embeddings, optimizer)
    batch = windows(corpus()[0], spec, 0)
    trainers = {"native": training.Trainer(spec), "exact": Trainer(spec, backend=backend)}
    states = dict.fromkeys(trainers, TrainState.initial(spec, llama.initial_parameters(model, 0)))
    seconds: dict[str, list[float]] = defaultdict(list)
    for turn in range(turns + 1):
        for name, trainer in trainers.items():
            states[name], found = step_seconds(trainer, states[name], batch, 3)
            if turn:  # the first turn warms up
                seconds[name] += found
    medians = {name: float(statistics.median(values)) for name, values in seconds.items()}
    return {
        "native_s": round(medians["native"], 4),
        "exact_s": round(medians["exact"], 4),
        "ratio": round(medians["exact"] / medians["native"], 3),
    }


def profile(width: str, optimizer: OptimizerSpec, backend: Backend) -> dict[str, float]:
    """Share of an exact step by pass; what is left is Python, torch's bookkeeping and copies."""
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            spent[name] += time.perf_counter() - start
            return result

        return call

    class TimedPasses:
        def __getattr__(self, name: str) -> Any:
            return timed(name, getattr(backend.passes, name))

    model = WIDTHS[width]
    spec = spec_of(model, TOKENS // model.max_position_embeddings, optimizer)
    trainer = Trainer(spec, backend=Backend(timed("int8 products", backend.multiply), TimedPasses()))
    batch, state = windows(corpus()[0], spec, 0), TrainState.initial(spec, llama.initial_parameters(model, 0))
    state, _ = step_seconds(trainer, state, batch, 2)
    spent.clear()
    start = time.perf_counter()
    step_seconds(trainer, state, batch, 2)
    total = time.perf_counter() - start
    shares = {name: round(value / total, 3) for name, value in sorted(spent.items(), key=lambda item: -item[1])}
    return shares | {"rest": round(1 - sum(spent.values()) / total, 3)}


def device_costs(
    device: str, model: ModelSpec, sequences: int, optimizer: OptimizerSpec, steps: int
) -> dict[str, dict[str, Any]]:
    """Median seconds of a step by arithmetic, and the hash of its last state."""
    spec = spec_of(model, sequences, optimizer)
    batch, start = windows(corpus()[0], spec, 0), TrainState.initial(spec, llama.initial_parameters(model, 0))
    kinds: dict[str, tuple[Callable[[], Any], Any]] = {
        "native, bfloat16 products": (lambda: training.Trainer(spec, device=device), bfloat16_products),
        "native, float32": (lambda: training.Trainer(spec, device=device), nullcontext),
    }
    for one in candidates(device):
        kinds[f"exact, {one.name}"] = (lambda one=one: Trainer(spec, device=device, backend=one)), nullcontext
    found: dict[str, dict[str, Any]] = {}
    for name, (make, context) in kinds.items():
        with context():
            try:
                trainer = make()
                end, seconds = step_seconds(trainer, start, batch, steps + 2)  # of which two warm up
            except (RuntimeError, NotImplementedError) as error:
                found[name] = {"error": str(error)}
                continue
        found[name] = {"seconds": float(statistics.median(seconds[1:])), "state": segment.hash_of_states(end)}
        del trainer  # before the next one allocates
    return found


# --- Bits


def small() -> RunSpec:
    model = ModelSpec(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return spec_of(model, 8, OptimizerSpec(weight_decay=0.1))


def state_hash(*, threads: int = 1, micro: int = 1, eager: int = 0, reference: int = 0, share_all: int = 0) -> str:
    """Of the state after 20 steps, with grains of one sequence."""
    torch.set_num_threads(threads)
    if share_all:
        from swarm_protocol.exact.compiled import team

        team.WORTH_SHARING = 1
    spec = small()
    batch, state = windows(corpus()[0], spec, 0), TrainState.initial(spec, llama.initial_parameters(spec.model, 0))
    if reference:
        parameters, moments = state.parameters, state.moments
        for step in range(20):
            parameters, moments, _ = reference_step.step(
                spec, parameters, moments, step, batch(step), grain_sequences=1
            )
        return segment.hash_of_states(TrainState(20, parameters, moments))
    backend = trusted_backend("cpu")
    if eager:
        from swarm_protocol.exact import eager as passes

        backend = Backend(backend.multiply, passes)
    trainer = Trainer(spec, grain_sequences=1, micro_sequences=micro, backend=backend)
    return segment.hash_of_states(trainer.run(state, batch, 20))


def hashes() -> Iterator[tuple[str, str]]:
    for name, (environment, options) in ENVIRONMENTS.items():
        command = [sys.executable, __file__, "--state-hash", json.dumps(options)]
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"} | environment
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        yield name, found.stdout.strip()


# --- Loss


def losses(optimizer: OptimizerSpec, marks: list[int], seed: int, backend: Backend) -> dict[str, list[float]]:
    """Held-out loss in nats per byte after these many steps, by numerics.

    The control is native from initial weights that are off by 1e-3 of each: how far apart two runs end that differ in nothing
    that matters.
    """
    model = ModelSpec(hidden_size=128, intermediate_size=352, num_hidden_layers=4, max_position_embeddings=128)
    spec = spec_of(model, 8, optimizer)
    train, held_out = corpus()
    state = TrainState.initial(spec, llama.initial_parameters(model, seed))
    evaluation = [windows(held_out, spec, 0)(step) for step in range(16)]
    noise = np.random.default_rng(seed).standard_normal(state.parameters.size, dtype=np.float32)
    nudged = TrainState.initial(spec, state.parameters * (1 + np.float32(1e-3) * noise))
    found = {}
    for name, trainer, start in (
        ("native", training.Trainer(spec), state),
        ("control", training.Trainer(spec), nudged),
        ("exact", Trainer(spec, backend=backend), state),
    ):
        found[name] = []
        for stop in marks:
            start = trainer.run(start, windows(train, spec, seed), stop)
            found[name].append(training.evaluate(spec, start.parameters, evaluation))
    return found


def long_run(optimizer: OptimizerSpec, steps: int, backend: Backend, say: Callable[[str], None]) -> dict[str, Any]:
    """One seed, for many steps: whether exact training drifts away from native."""
    marks = [steps * eighth // 8 for eighth in range(1, 9)]
    found = losses(optimizer, marks, 0, backend)
    for place, mark in enumerate(marks):
        say(f"after {mark:6} steps: " + ", ".join(f"{name} {values[place]:.4f}" for name, values in found.items()))
    return {"steps": marks, "loss": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="one seed, 60 steps, few repetitions")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="muon")
    parser.add_argument("--threads", type=int, default=1, help="of native and of exact training, for the cost (1)")
    parser.add_argument("--cost-only", action="store_true", help="neither bits nor losses")
    parser.add_argument("--profile", action="store_true", help="also where an exact step's time goes")
    parser.add_argument("--long", type=int, metavar="STEPS", help="only the losses of one run of so many steps")
    parser.add_argument("--device", help="only the cost of 150 million parameters there")
    parser.add_argument("--state-hash", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.state_hash is not None:
        print(state_hash(**json.loads(arguments.state_hash)))
        return

    def say(text: str) -> None:
        print(text, flush=True)

    if arguments.device is not None:
        costs = device_costs(
            arguments.device, PARAMETERS_150M, 8, OPTIMIZERS[arguments.optimizer], 3 if arguments.quick else 20
        )
        bfloat16 = costs["native, bfloat16 products"].get("seconds", float("nan"))
        for name, one in costs.items():
            say(
                f"{name}: {one['error']}"
                if "error" in one
                else f"{name}: {one['seconds']:.4f} s a step, {one['seconds'] / bfloat16:.2f} times; {one['state'][:16]}"
            )
        if arguments.json:
            print(json.dumps({"machine": fingerprint.runtime_fingerprint(arguments.device, 1), "costs": costs}))
        return

    training.configure(arguments.threads)
    backend, optimizer = trusted_backend("cpu"), OPTIMIZERS[arguments.optimizer]
    machine = fingerprint.runtime_fingerprint("cpu", arguments.threads)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{machine['cpu']}; torch {torch.__version__}, Python {platform.python_version()}",
        "threads": arguments.threads,
        "backend": backend.name,
        "optimizer": arguments.optimizer,
    }
    say(f"{result['machine']}\n{backend.name}, {arguments.optimizer}, {arguments.threads} threads")
    if arguments.long is not None:
        result |= long_run(optimizer, arguments.long, backend, say)
        if arguments.json:
            print(json.dumps(result))
        return
    costs = {}
    for width in WIDTHS:
        costs[width] = cost(width, optimizer, 2 if arguments.quick else 5, backend)
        say("width {}: native {native_s} s, exact {exact_s} s a step, {ratio} times".format(width, **costs[width]))
    result |= {"cost_vs_native": {width: found["ratio"] for width, found in costs.items()}, "seconds": costs}
    if arguments.profile:
        result["profile"] = {width: profile(width, optimizer, backend) for width in WIDTHS}
        for width, shares in result["profile"].items():
            say(f"width {width}: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    if arguments.cost_only:
        if arguments.json:
            print(json.dumps(result))
        return
    training.configure(1)
    found = {}
    for name, digest in hashes():
        found[name] = digest
        say(f"{digest[:16]}  {name}")
    result |= {"bit_equal": len(set(found.values())) == 1, "environments": list(found)}
    say("all states equal" if result["bit_equal"] else "STATES DIFFER")
    steps, runs = (60, 1) if arguments.quick else (500, 3)
    by_seed = [losses(optimizer, [steps], seed, backend) for seed in range(runs)]
    native, control, exact = ([one[name][-1] for one in by_seed] for name in ("native", "control", "exact"))
    result |= {
        "loss": {"native": native, "control": control, "exact": exact},
        "loss_gap": round(statistics.mean(exact) - statistics.mean(native), 5),
        "control_gap": round(statistics.mean(control) - statistics.mean(native), 5),
        "native_seed_spread": round(statistics.stdev(native), 5) if runs > 1 else None,
    }
    say(
        f"loss after {steps} steps, {runs} seeds: native {statistics.mean(native):.4f}, exact {statistics.mean(exact):.4f}, "
        f"gap {result['loss_gap']:+.4f} (native from nudged weights {result['control_gap']:+.4f}, its seeds differ by"
        f" {result['native_seed_spread']})"
    )
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
