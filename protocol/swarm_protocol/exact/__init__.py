"""Exact training: the same bits on any machine (docs/numerics.md). Numbers become small integers, products are exact.

Read `rule` (constants), `reference` and `reference_step` (the definition as slow numpy), then `decoder`, `optimizer` and
`segment` (the fast path), whose passes between products are `eager` (torch), `compiled` (numba) or `fused` (Triton). `passes`
is their interface, `products` the limb products, `backend` the choice.
"""

from swarm_protocol.exact.segment import Trainer, run_segment, trusted_backend

__all__ = ["Trainer", "run_segment", "trusted_backend"]
