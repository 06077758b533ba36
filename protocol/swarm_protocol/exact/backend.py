"""Which arithmetic computes here: chosen by a measurement, kept for the process, and allowed only if it passes a self-test."""

from __future__ import annotations

from dataclasses import dataclass

from swarm_protocol.exact import eager
from swarm_protocol.exact.passes import Passes
from swarm_protocol.exact.products import Multiply, multiply_float, multiply_int8


@dataclass(frozen=True)
class Backend:
    """How limbs are multiplied, and what runs between the products."""

    multiply: Multiply
    passes: Passes


def choose(device: str) -> Backend:
    try:
        from swarm_protocol.exact import compiled
        return Backend(multiply_int8, compiled)
    except ImportError:
        return Backend(multiply_int8, eager)
