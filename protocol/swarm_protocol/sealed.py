"""Which checkpoint a run has sealed: its root by the coordinator's signature, or by the spec, never by its word alone."""

from __future__ import annotations

from dataclasses import dataclass

from swarm_protocol import data
from swarm_protocol.client import CoordinatorClient
from swarm_protocol.errors import ConfigurationError, InvalidDataError


@dataclass(frozen=True)
class Sealed:
    """What round `round` of a run starts from, or would; `tokens` is what the rounds before it were given to train on."""

    round: int
    root: bytes
    tokens: int


async def sealed(client: CoordinatorClient, round_number: int | None = None) -> Sealed:
    """The newest checkpoint, or the one that a round starts from.

    Raises:
        ConfigurationError: that round is not there yet.
        UnreachableError, RefusedError, InvalidDataError
    """
    newest, root = await client.latest_checkpoint()
    number = newest if round_number is None else round_number
    if not 0 <= number <= newest:
        raise ConfigurationError(f"the run has checkpoints 0 to {newest}; there is no checkpoint {number} yet")
    if number == 0:
        return Sealed(0, bytes.fromhex(client.spec.checkpoint), 0)
    plan = await client.plan(number - 1)
    sealing = None if plan is None else await client.manifest(plan)
    if plan is None or sealing is None:
        raise InvalidDataError(f"the coordinator does not have the manifest that seals checkpoint {number}")
    if number == newest and sealing.manifest.root != root:
        raise InvalidDataError("the coordinator's newest checkpoint is not the one that its manifest seals")
    windows = plan.cursor + data.windows_used(client.spec, plan)
    return Sealed(number, sealing.manifest.root, windows * client.spec.model.max_position_embeddings)
