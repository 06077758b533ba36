"""Which arithmetic computes on this machine: chosen by a measurement, falling back by itself. No choice changes a bit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from swarm_protocol.exact import eager
from swarm_protocol.exact.passes import Passes
from swarm_protocol.exact.products import Multiply, multiply_float, multiply_int8

_MEASURED = (256, 512, 512)  # M, K, N of the product that is timed: about a millisecond


@dataclass(frozen=True)
class Backend:
    """How limbs are multiplied, and what runs between the products."""

    multiply: Multiply
    passes: Passes

    @property
    def name(self) -> str:
        return f"{self.multiply.__name__.removeprefix('multiply_')} products, {self.passes.name} passes"


def candidates(device: str) -> Iterator[Backend]:
    """What could compute on `device`, the fastest first."""
    kinds: list[Passes] = [eager]
    own = {"cpu": _compiled, "cuda": _fused}.get(torch.device(device).type, lambda: None)()
    if own is not None:
        kinds.insert(0, own)
    for passes in kinds:
        for multiply in sorted((multiply_int8, multiply_float), key=lambda kind: _seconds(kind, device)):
            yield Backend(multiply, passes)


def multiplies_exactly(multiply: Multiply, device: str) -> bool:
    """Whether products are right for limbs of every value, and where the largest meet and 16-bit sums would saturate."""
    for m, k, n in (
        (48, 1040, 64),
        (130, 2304, 200),
        (200, 3, 130),
        (130, 200, 3),
        (3, 130, 200),
    ):  # the last: adapters
        rows, columns = (torch.arange(m)[:, None] * torch.arange(k), torch.arange(k)[:, None] * torch.arange(n))
        every = rows * 37 % 129 - 64, columns * 53 % 129 - 64
        largest = torch.where(rows % 7 < 4, 64, -64), torch.where(columns % 5 < 3, 64, -64)
        for a, b in (every, largest):
            out = torch.empty(m, n, dtype=torch.int32, device=device)
            multiply(a.to(device, torch.int8), b.to(device, torch.int8), out)
            if not torch.equal(out.cpu().double(), a.double() @ b.double()):
                return False
    return True


def _compiled() -> Passes | None:
    """The numba kernels where numba is installed."""
    try:
        from swarm_protocol.exact import compiled
    except ImportError:
        return None
    return compiled


def _fused() -> Passes | None:
    """The Triton kernels where Triton is installed, as it is with torch's builds for NVIDIA's GPUs."""
    if torch.version.cuda is None:  # on others "cuda" is AMD's, for which nobody has read the machine code
        return None
    try:
        from swarm_protocol.exact import fused
    except ImportError:
        return None
    return fused


def _seconds(multiply: Multiply, device: str) -> float:
    """The best of five times; infinite where the kernel does not exist."""
    m, k, n = _MEASURED
    a, b = (torch.ones(shape, dtype=torch.int8, device=device) for shape in ((m, k), (k, n)))
    out = torch.empty(m, n, dtype=torch.int32, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        try:
            multiply(a, b, out)
            int(out[0, 0])  # waits for a device
        except (RuntimeError, NotImplementedError):
            return float("inf")
        best = min(best, time.perf_counter() - start)
    return best
