"""The same bits in processes that use other instructions and other numbers of threads."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

NUMPY_DISPATCH: list[str] = np._core._multiarray_umath.__cpu_dispatch__  # type: ignore[attr-defined]
"""The levels of instructions that numpy chooses among, oldest first."""

SCRIPT = """
import hashlib
import sys
from typing import get_args

import numpy as np

from swarm_protocol import aggregate, codec, outer, sketch
from swarm_protocol.spec import OuterSpec

digest = hashlib.sha256()
index = np.arange(70_001, dtype=np.int64)
rows = {
    slot: ((index * (slot * 2 + 7) % 4001 - 2000) * np.float32(2.0 ** (slot % 5 - 12)) / np.float32(3)).astype(np.float32)
    for slot in range(17)
}
# Sums of products of float32 that a fused multiplication would round otherwise, zeros of both signs, the very small.
rows[4] = -rows[4]
rows[5][::7] *= np.float32(1e-38)
where = sketch.projection(bytes(range(32)), 1, index.size)
sketches = {slot: [sketch.of(where, row)] for slot, row in rows.items()}
for found in sketches.values():
    digest.update(sketch.encode(found[0]))
digest.update(sketch.squared_distances(sketches).tobytes())
parameters = np.ones(index.size, np.float32)
momentum = np.zeros(index.size, np.float32)
for name in get_args(aggregate.Name):
    chosen = aggregate.select(name, {slot: 1000 + slot for slot in rows}, sketches)
    digest.update(repr(chosen).encode())
    under_way = aggregate.start(name, chosen, index.size)
    for slot in chosen:
        under_way.add(slot, rows[slot])
    found = under_way.result()
    digest.update(found.tobytes())
    for codec_name in ("int4", "int8"):
        digest.update(codec.get(codec_name).encode(found))
    digest.update(np.float64(aggregate.sum_of_squares(found)).tobytes())
    parameters, momentum = outer.outer_step(OuterSpec(), parameters, momentum, found)
    digest.update(parameters.tobytes() + momentum.tobytes())
assert "torch" not in sys.modules, "the exact domain computes with numpy alone"
print(digest.hexdigest())
"""


def bits(**environment: str) -> str:
    """The digest of everything that the script does under these variables."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def expected() -> str:
    return bits(OMP_NUM_THREADS="1", ATEN_CPU_CAPABILITY="default", NPY_DISABLE_CPU_FEATURES=" ".join(NUMPY_DISPATCH))


@pytest.mark.parametrize(
    ("capability", "threads", "numpy_levels"), [("avx2", 1, 1), ("avx512", 2, len(NUMPY_DISPATCH)), ("default", 2, 2)]
)
def test_neither_instructions_nor_threads_change_a_bit(
    capability: str, threads: int, numpy_levels: int, expected: str
) -> None:
    found = bits(
        OMP_NUM_THREADS=str(threads),
        OPENBLAS_NUM_THREADS=str(threads),
        ATEN_CPU_CAPABILITY=capability,
        NPY_DISABLE_CPU_FEATURES=" ".join(NUMPY_DISPATCH[numpy_levels:]),
    )
    assert found == expected
