"""How long aggregation takes on one core: `python benchmarks/aggregate.py [--json]`.

`aggregate_s` is one reducer's work for a whole model of 10M values from 16 slots, in parts of 1M, decoded already;
`sketch_s` one sender's sketches of such a model, `check_s` a reducer's check of the sketches of one part of 16 slots, and
`select_s` the selection that everybody makes from the sketches of all parts.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import get_args

import numpy as np
import numpy.typing as npt

from swarm_protocol import aggregate, sketch

Float32 = npt.NDArray[np.float32]

PARTS = 10
CLOSING = bytes(range(32))


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The best time of a few runs: what else the machine does is no part of it."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return round(min(times), 4)


def reduce(name: aggregate.Name, rows: list[Float32]) -> None:
    """Every part of the model: the same values each time, since no value takes longer than another."""
    for _ in range(PARTS):
        under_way = aggregate.start(name, dict.fromkeys(range(len(rows)), 100), rows[0].size)
        for slot, row in enumerate(rows):
            under_way.add(slot, row)
        under_way.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    parser.add_argument("--elements", type=int, default=10_000_000, help="values of the model (10,000,000)")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    numel = max(1, options.elements // PARTS)
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal(numel, np.float32) for _ in range(options.slots)]
    maps = [sketch.projection(CLOSING, part, numel) for part in range(PARTS)]
    sketches = {slot: [sketch.of(where, row) for where in maps] for slot, row in enumerate(rows)}
    weights = dict.fromkeys(range(options.slots), 100)
    claims = [sketch.encode(sketches[slot][0]) for slot in weights]
    names: tuple[aggregate.Name, ...] = get_args(aggregate.Name)
    by_distance = [name for name in names if aggregate.needs_sketches(name)]
    result = {
        "elements": numel * PARTS,
        "slots": options.slots,
        "aggregate_s": {
            name: seconds(partial(reduce, name, rows), options.repeats) for name in names if name not in by_distance
        },
        "sketch_s": seconds(
            lambda: [sketch.of(sketch.projection(CLOSING, part, numel), rows[0]) for part in range(PARTS)],
            options.repeats,
        ),
        "check_s": seconds(
            lambda: [sketch.matches(maps[0], row, claim) for row, claim in zip(rows, claims, strict=True)],
            options.repeats,
        ),
        "select_s": {
            name: seconds(partial(aggregate.select, name, weights, sketches), options.repeats) for name in by_distance
        },
        "sketch_bytes_per_sender": PARTS * sketch.SIZE_BYTES,
        "machine": f"{platform.machine()}, numpy {np.__version__}",
    }
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        sys.stdout.write(f"{name}: {value}\n")
    sys.stdout.write(f"{', '.join(by_distance)} reduce as the mean does, with the weights selected.\n")


if __name__ == "__main__":
    main()
