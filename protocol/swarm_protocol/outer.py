"""The outer step: Nesterov momentum on the averaged pseudo-gradient, in the exact domain.

    momentum   <- mu · momentum + d
    parameters <- parameters - lr · (d + mu · momentum)

Every multiplication, addition and subtraction is rounded to float32 on its own, in this order, so any machine gets the
same checkpoint. A missing part of `d` is +0, and its momentum runs on. Source: DiLoCo (Douillard et al. 2023), section 2.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from swarm_protocol.errors import InvalidDataError
from swarm_protocol.spec import OuterSpec

Float32 = npt.NDArray[np.float32]

_SLAB_ELEMENTS = 1 << 15
"""Elements that are worked on at a time, so that temporaries stay in the cache. Changes no bit."""


def outer_step(
    spec: OuterSpec, parameters: Float32, momentum: Float32, pseudo_gradient: Float32
) -> tuple[Float32, Float32]:
    """The next checkpoint's (parameters, momentum), new vectors; all are float32[num_trainable].

    Raises:
        InvalidDataError: types or lengths differ, or the result is not finite.
    """
    for vector in (parameters, momentum, pseudo_gradient):
        if vector.dtype != np.float32 or vector.ndim != 1 or vector.size != parameters.size:
            raise InvalidDataError(f"an outer step takes three float32[{parameters.size}], not {vector.dtype}")
    mu, lr = np.float32(spec.momentum), np.float32(spec.lr)
    next_parameters, next_momentum = np.empty_like(parameters), np.empty_like(momentum)
    scratch = np.empty(min(_SLAB_ELEMENTS, parameters.size), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # checked below
        for start in range(0, parameters.size, _SLAB_ELEMENTS):
            slab = slice(start, start + _SLAB_ELEMENTS)
            d, v = pseudo_gradient[slab], next_momentum[slab]
            x = scratch[: d.size]
            np.multiply(momentum[slab], mu, out=v)
            np.add(v, d, out=v)
            np.multiply(v, mu, out=x)
            np.add(d, x, out=x)
            np.multiply(x, lr, out=x)
            np.subtract(parameters[slab], x, out=next_parameters[slab])
    if not (np.isfinite(next_parameters).all() and np.isfinite(next_momentum).all()):
        raise InvalidDataError("the outer step left the finite numbers; the averages of this round cannot be right")
    return next_parameters, next_momentum
