"""What training a part of a model saves and costs beside training all of it, and whether it learns.

    python benchmarks/adapters.py [--json] [--quick] [--threads N] [--only bytes|cost|loss]

Bytes: of a model of 135 million parameters, what one slot sends, a checkpoint, an auditor's state, and the trunk, by
arithmetic. Cost: medians of inner steps of 2,048 tokens at width 256 and 1,024, the parts in turns in one process. Loss: a
model of 3 million parameters learns the modules of Python's standard library, and is then fine-tuned on its tables of
character sets; held-out loss on these before and after, of one seed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sysconfig
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from swarm_protocol import adapters, codec, fingerprint, seeds, training
from swarm_protocol.exact import Trainer, segment
from swarm_protocol.model import llama
from swarm_protocol.spec import ModelSpec, OptimizerSpec, RunSpec, TrainableSpec
from swarm_protocol.training import Float32, Tokens, TrainState

TOKENS = 2048
ALL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PARTS = {
    "all": TrainableSpec(),
    "lora 8, q and v": TrainableSpec(kind="lora"),
    "lora 16, all matrices": TrainableSpec(kind="lora", r=16, alpha=32, targets=ALL_TARGETS),
    "norms": TrainableSpec(kind="norms"),
}
LEARNING_RATES = {"all": 1e-3, "lora": 3e-3, "norms": 1e-2}
PARAMETERS_135M = ModelSpec(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=2048,
)
WIDTHS = {
    "256": ModelSpec(
        hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
    ),
    "1024": ModelSpec(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=8
    ),
}


def spec_of(model: ModelSpec, trainable: TrainableSpec, numerics: str = "native") -> RunSpec:
    sequences = max(1, TOKENS // model.max_position_embeddings)
    optimizer = OptimizerSpec(name="adamw", lr=LEARNING_RATES[trainable.kind])
    recipe = {"batch_sequences": sequences, "micro_sequences": sequences, "steps": 10_000, "optimizer": optimizer}
    spec = segment.self_test_spec()
    return spec.model_copy(
        update={
            "numerics": numerics,
            "model": model,
            "trainable": trainable,
            "trunk": None if trainable.kind == "all" else "0" * 64,
            "training": spec.training.model_copy(update=recipe),
        }
    )


def sizes(trainable: TrainableSpec) -> dict[str, float]:
    """In megabytes."""
    spec = spec_of(PARAMETERS_135M, trainable)
    found = {
        "sent (int4)": codec.get("int4").encoded_bytes(spec.num_trainable),
        "checkpoint": 8 * spec.num_trainable,
        "state": training.size_bytes(spec),
        "trunk, once": 0 if spec.trunk is None else 4 * spec.model.num_parameters,
    }
    return {"trained": spec.num_trainable} | {name: round(size / 1e6, 2) for name, size in found.items()}


def cost(width: str, numerics: str, turns: int) -> dict[str, float]:
    """Seconds of a step, by part."""
    model = WIDTHS[width]
    trunk = llama.initial_parameters(model, 0)
    batch = windows(text("*.py"), model, 0)
    trainers: dict[str, tuple[Any, TrainState, Float32 | None]] = {}
    for name, trainable in PARTS.items():
        spec = spec_of(model, trainable, numerics)
        start = TrainState.initial(spec, adapters.initial(model, trainable, 0, trunk))
        trainer = Trainer(spec) if numerics == "exact" else training.Trainer(spec)
        trainers[name] = trainer, start, None if spec.trunk is None else trunk
    seconds: dict[str, list[float]] = defaultdict(list)
    for turn in range(turns + 1):
        for name, (trainer, start, frozen) in trainers.items():
            marks: list[float] = []
            trainer.run(start, batch, 3, frozen, on_step=lambda _s, _l, marks=marks: marks.append(time.perf_counter()))
            if turn:  # the first turn warms up
                seconds[name] += list(np.diff(marks))
    return {name: round(float(statistics.median(values)), 4) for name, values in seconds.items()}


def losses(base_steps: int, steps: int) -> dict[str, float]:
    """Held-out loss in nats per byte on what is fine-tuned to."""
    model = WIDTHS["256"]
    whole = spec_of(model, PARTS["all"])
    start = TrainState.initial(whole, llama.initial_parameters(model, 0))
    base = training.run_segment(whole, start, windows(text("*.py"), model, 0), base_steps).parameters
    tables = text("encodings/*.py")
    cut = len(tables) * 9 // 10
    held_out = [windows(tables[cut:], model, 1)(step) for step in range(8)]
    found = {"before": training.evaluate(whole, base, held_out)}
    for name, trainable in PARTS.items():
        spec = spec_of(model, trainable)
        trunk = None if spec.trunk is None else base
        state = TrainState.initial(spec, adapters.initial(model, trainable, 0, base))
        end = training.run_segment(spec, state, windows(tables[:cut], model, 0), steps, trunk)
        found[name] = training.evaluate(spec, end.parameters, held_out, trunk)
    return {name: round(loss, 3) for name, loss in found.items()}


def text(pattern: str) -> npt.NDArray[np.uint8]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob(pattern))
    return np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)


def windows(data: npt.NDArray[np.uint8], model: ModelSpec, seed: int) -> Any:
    """Random windows, one batch for each step."""
    length, count = model.max_position_embeddings + 1, TOKENS // model.max_position_embeddings

    def batch(step: int) -> Tokens:
        starts = seeds.raw(seed, "benchmark", 0, 0, step, count) % np.uint64(len(data) - length)
        return np.stack([data[at : at + length] for at in starts.astype(np.int64)]).astype(np.int64)

    return batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="few steps at width 256 alone: to see that it works")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("bytes", "cost", "loss"))
    options = parser.parse_args()
    training.configure(options.threads)
    facts = fingerprint.runtime_fingerprint("cpu", options.threads)
    found: dict[str, Any] = {
        "machine": {"cpu": facts["cpu"], "torch": facts["torch"], "python": platform.python_version()},
        "threads": options.threads,
    }
    if options.only in (None, "bytes"):
        found["megabytes"] = {name: sizes(trainable) for name, trainable in PARTS.items()}
    if options.only in (None, "cost"):
        found["step_s"] = {
            f"{numerics}, width {width}": cost(width, numerics, 1 if options.quick else 10)
            for width in (["256"] if options.quick else WIDTHS)
            for numerics in ("native", "exact")
        }
    if options.only in (None, "loss"):
        found["loss"] = losses(*((6, 3) if options.quick else (100, 50)))
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for title, values in found.items():
        print(title, values) if not isinstance(values, dict) else print(f"\n{title}")
        for name, value in values.items() if isinstance(values, dict) else ():
            print(f"  {name:24}{value}")


if __name__ == "__main__":
    main()
