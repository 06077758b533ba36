"""From an older checkpoint to a newer one: by the averages of the rounds between, or by fetching it whole. Pure, no I/O.

A sealed round's averages are the delta from its base to the next checkpoint. Whoever lags takes as many of them as it has
missed, or a checkpoint that is kept whole and those after it, whichever is fewer bytes. Nothing here is believed: a delta
ends at the root that the round's signed manifest names, or it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from swarm_protocol import checkpoint as checkpoints
from swarm_protocol import parts
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.errors import HashMismatchError, InvalidDataError
from swarm_protocol.records import RoundManifest
from swarm_protocol.spec import RunSpec

F32 = checkpoints.F32

RECORD_BYTES = 512
"""What a signed record is taken for: a delta is its plan, its manifest, and a record per part, besides the averages."""


@dataclass(frozen=True)
class Link:
    """A checkpoint of the chain, what round `round` starts from.

    `whole` says whether all its bytes are to be had; `delta_bytes` is the size of the averages that make it from the
    checkpoint before it, None for the first.
    """

    round: int
    root: bytes
    size_bytes: int
    whole: bool
    delta_bytes: int | None

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> Link:
        """One from the API's `CheckpointEntry`.

        Raises:
            InvalidDataError: it is none.
        """
        try:
            delta = entry["delta_bytes"]
            link = cls(
                int(entry["round"]),
                bytes.fromhex(entry["root"]),
                int(entry["size_bytes"]),
                bool(entry["whole"]),
                None if delta is None else int(delta),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidDataError("the coordinator's list of checkpoints has something else in it") from error
        if min(link.round, link.size_bytes, link.delta_bytes or 0) < 0 or len(link.root) != 32:
            raise InvalidDataError("the coordinator's list of checkpoints has an impossible one in it")
        return link


@dataclass(frozen=True)
class Way:
    """Begin with the checkpoint `start`, which has to be fetched whole unless it is `held`, and apply so many deltas."""

    start: Link
    held: bool
    deltas: int
    size_bytes: int

    def __str__(self) -> str:
        deltas = f"{self.deltas} delta{'s' if self.deltas != 1 else ''}"
        if self.held:
            return f"{deltas} from checkpoint {self.start.round} on"
        return f"checkpoint {self.start.round} whole" + (f" and {deltas}" if self.deltas else "")


def round_bytes(spec: RunSpec) -> int:
    """About how many bytes a delta takes besides its averages."""
    return RECORD_BYTES * (parts.part_count(spec) + 2)


def ways(chain: Sequence[Link], held: Mapping[int, bytes], round_bytes: int) -> list[Way]:
    """The ways to the last checkpoint of a chain, cheapest first; of equals the one with fewer deltas.

    Args:
        chain: checkpoints of rounds that follow each other, oldest first.
        held: roots of the checkpoints that we have, by round. One that is not in the chain is of no use.
        round_bytes: what a delta costs besides its averages.
    """
    found: list[Way] = []
    after = 0
    for deltas, link in enumerate(reversed(chain)):
        mine = held.get(link.round) == link.root
        if mine or link.whole:
            found.append(Way(link, mine, deltas, after + (0 if mine else link.size_bytes)))
        if link.delta_bytes is None:
            break
        after += link.delta_bytes + round_bytes
    return sorted(found, key=lambda way: (way.size_bytes, way.deltas))


def far_enough(chain: Sequence[Link], held: Mapping[int, bytes], round_bytes: int) -> bool:
    """Whether older checkpoints than those of a chain, oldest first, could begin no cheaper way to its last one."""
    if not chain or chain[0].delta_bytes is None:
        return bool(chain)
    if held.get(chain[0].round) == chain[0].root:
        return True
    found = ways(chain, held, round_bytes)
    least = sum((link.delta_bytes or 0) + round_bytes for link in chain)
    if min(held, default=chain[0].round) >= chain[0].round:
        least += chain[0].size_bytes  # whatever they begin with has to be fetched
    return bool(found) and found[0].size_bytes <= least


def applied(spec: RunSpec, base: Checkpoint, manifest: RoundManifest, pseudo_gradient: F32) -> Checkpoint:
    """The checkpoint after a round, from the one before it and the round's averages (`decode` fills them in).

    Raises:
        HashMismatchError: the round starts from another checkpoint, or ends at another than its manifest names.
    """
    if (manifest.round, manifest.base) != (base.round, base.root):
        raise HashMismatchError(f"round {manifest.round} starts from another checkpoint than the one that is held")
    following = checkpoints.step(spec, base, pseudo_gradient)
    if following.root != manifest.root:
        raise HashMismatchError(
            f"the averages of round {manifest.round} do not lead to the root that its manifest names"
        )
    return following


def decode(spec: RunSpec, part: int, average: bytes | bytearray, pseudo_gradient: F32) -> None:
    """Fill a part of a round's averaged pseudo-gradient in; one that is not sound is by rule missing, +0."""
    where = pseudo_gradient[parts.slices(spec)[part]]
    try:
        checkpoints.decode_average(spec, part, average, where)
    except InvalidDataError:
        where[:] = np.float32(0)
