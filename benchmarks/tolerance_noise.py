"""What liars inside a tolerance can do to a real small run: `python benchmarks/tolerance_noise.py [--json] [--quick]`.

The run is that of `robustness.py`. Liars train honestly and know the held-out loss and its gradient. Then each moves its raw
pseudo-gradient by at most `tolerance` times its norm, so that an audit accepts it, to where it raises the loss most:

    straight   along the gradient; parts travel as they are (codec `none`)
    codes      each element just across the border of its int4 code, the most gain for the distance first. A small step
               then moves what is decoded by a whole code: the codec makes more of the noise than it was
    random     no liar: the same distance in a random direction, with int4

`excess_percent` is how far above the honest run's final held-out loss a run ends; honest runs that differ by such a random
step are the noise to hold it against.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import robustness
import torch

from swarm_protocol import checkpoint, data, parts, training
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.codec.blockwise import INT4
from swarm_protocol.model import llama

Float32 = npt.NDArray[np.float32]
Lie = Callable[[robustness.Bench, Float32, Float32, float, int], Float32]

TOLERANCES = (1e-4, 3e-4, 5e-3)
"""Where float32 audits accept and where they reject; and of the size that bfloat16 needs."""

LIARS = {"3 of 16": robustness.ATTACKERS, "16 of 16": tuple(range(robustness.SLOTS))}


def loss_gradient(bench: robustness.Bench, parameters: Float32) -> Float32:
    """Of the held-out loss, on some of its windows, float32[numel]."""
    model = llama.build(bench.spec.model, device="cpu")
    llama.load_flat(model, parameters)
    flat = torch.zeros_like(model.flat)
    named = dict(model.named_parameters())
    for name, gradient in zip(
        llama.parameter_shapes(bench.spec.model), llama.views(bench.spec.model, flat), strict=True
    ):
        named[name].grad = gradient
    for batch in islice(data.held_out_batches(bench.spec, bench.dataset), 8):
        llama.loss(model, torch.from_numpy(np.asarray(batch, np.int64))).backward()
    return np.array(flat.numpy())


def straight(_: robustness.Bench, honest: Float32, gradient: Float32, tolerance: float, __: int) -> Float32:
    step = np.float32(tolerance * np.linalg.norm(honest) / np.linalg.norm(gradient))
    return np.asarray(honest - step * gradient, np.float32)


def at_random(_: robustness.Bench, honest: Float32, __: Float32, tolerance: float, seed: int) -> Float32:
    noise = np.asarray(np.random.default_rng(seed).standard_normal(honest.size), np.float32)
    return np.asarray(
        honest + noise * np.float32(tolerance * np.linalg.norm(honest) / np.linalg.norm(noise)), np.float32
    )


def codes(bench: robustness.Bench, honest: Float32, gradient: Float32, tolerance: float, _: int) -> Float32:
    """Across the borders of codes, as far as the tolerance goes. A block's largest value stays, and its scale with it."""
    lied = honest.astype(np.float64)
    scale, largest = np.zeros(honest.size), np.zeros(honest.size, bool)
    for where in parts.slices(bench.spec):
        for start in range(where.start, where.stop, INT4.block):
            block = slice(start, min(start + INT4.block, where.stop))
            peak = np.abs(honest[block]).max()
            scale[block] = peak / INT4.largest_code
            largest[block] = np.abs(honest[block]) == peak
    with np.errstate(divide="ignore", invalid="ignore"):
        position = lied / scale
        towards = -np.sign(gradient)  # a smaller pseudo-gradient leaves larger parameters
        border = np.rint(position) + 0.5 * towards
        distance = np.abs(border - position) * scale * (1 + 1e-3) + 1e-6 * scale
        gain = np.abs(gradient) * scale / distance**2
    usable = ~largest & (scale > 0) & (gradient != 0) & (np.abs(border) < INT4.largest_code)
    order = np.argsort(np.where(usable, -gain, np.inf))[: int(usable.sum())]
    spent = np.sqrt(np.cumsum(distance[order] ** 2))
    moved = order[: int(np.searchsorted(spent, 0.999 * tolerance * np.linalg.norm(honest)))]
    lied[moved] += towards[moved] * distance[moved]
    return np.asarray(lied, np.float32)


def play(bench: robustness.Bench, lie: Lie | None, liars: tuple[int, ...], tolerance: float) -> dict[str, float]:
    """A whole run; returns the final held-out loss, and how far liars moved what they sent and what arrived, relative."""
    here, cursor, sent, arrived = bench.start, 0, 0.0, 0.0
    for number in range(bench.spec.rounds.count):
        plan = robustness.plan_of(bench.spec, number, cursor)
        cursor += data.windows_used(bench.spec, plan)
        encoded = {}
        for slot in range(robustness.SLOTS):
            final = bench.train(plan, slot, here)
            honest = here.parameters - final
            vector = honest
            if lie is not None and slot in liars:
                vector = lie(bench, honest, loss_gradient(bench, final), tolerance, 1000 * number + slot)
                sent = max(sent, _apart(vector, honest))
            zero = np.zeros_like(vector)
            encoded[slot] = parts.encode_parts(bench.spec, vector, zero)
            if vector is not honest:
                expected = parts.encode_parts(bench.spec, honest, zero)
                arrived = max(arrived, _apart(_decoded(bench, encoded[slot]), _decoded(bench, expected)))
        _, averages = robustness.exchange(bench, plan, "multi_krum", encoded, {})
        here = checkpoint.advance(bench.spec, here, averages)
    assert lie is None or sent <= 1.001 * tolerance, "an audit would see this"
    return {"loss": _held_out(bench, here), "sent": sent, "arrived": arrived}


def _decoded(bench: robustness.Bench, blobs: list[bytes]) -> Float32:
    return np.concatenate([parts.decode_part(bench.spec, part, blob) for part, blob in enumerate(blobs)])


def _apart(found: Float32, expected: Float32) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))


def _held_out(bench: robustness.Bench, here: Checkpoint) -> float:
    return bench.trainer.evaluate(here.parameters, data.held_out_batches(bench.spec, bench.dataset))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    parser.add_argument("--quick", action="store_true", help="a very short run, to see that all of it works")
    options = parser.parse_args()
    out = sys.stderr if options.json else sys.stdout
    began, rows = time.perf_counter(), []
    training.configure(1)
    with tempfile.TemporaryDirectory() as folder:
        int4 = robustness.prepare(Path(folder), rounds=2 if options.quick else 10, steps=3 if options.quick else 15)
        none = _with_codec(int4, "none")
        lies: list[tuple[str, Lie, robustness.Bench]] = [
            ("straight", straight, none), ("codes", codes, int4), ("random", at_random, int4),
        ]  # fmt: skip
        clean = {bench.spec.exchange.codec: play(bench, None, (), 0.0)["loss"] for bench in (none, int4)}
        print(f"honest: {clean}", file=out)
        for name, lie, bench in lies:
            for tolerance in TOLERANCES[:1] if options.quick else TOLERANCES:
                for label, liars in LIARS.items():
                    found = play(bench, lie, liars, tolerance)
                    excess = 100 * (found["loss"] / clean[bench.spec.exchange.codec] - 1)
                    rows.append(
                        {"lie": name, "tolerance": tolerance, "liars": label, **found, "excess_percent": excess}
                    )
                    print(
                        f"{name:9} {tolerance:.0e}  {label:8}  loss {found['loss']:.4f} ({excess:+.2f} %)"
                        f"  sent {found['sent']:.1e}  arrived {found['arrived']:.1e}",
                        file=out, flush=True,
                    )  # fmt: skip
    result: dict[str, Any] = {"clean": clean, "rows": rows, "wall_s": round(time.perf_counter() - began, 1)}
    if options.json:
        print(json.dumps(result))


def _with_codec(bench: robustness.Bench, name: str) -> robustness.Bench:
    exchange = bench.spec.exchange.model_copy(update={"codec": name})
    spec = bench.spec.model_copy(update={"exchange": exchange})
    return robustness.Bench(spec, bench.dataset, bench.trainer, bench.start)


if __name__ == "__main__":
    main()
