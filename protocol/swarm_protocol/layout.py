"""How the bytes of a checkpoint are to be read, and the record that names one. Exact domain; loads no torch.

The layout document is the canonical encoding of a list of [group, name, dtype, shape], in the order of the bytes: group
`parameters`, what is trained, and then group `momentum`, the outer momentum of each. Anybody derives it from the spec.
"""

from __future__ import annotations

from functools import lru_cache

from swarm_protocol import encoding
from swarm_protocol.chunks import CHUNK_BYTES, content_hash
from swarm_protocol.errors import InvalidDataError
from swarm_protocol.model.shapes import trainable_shapes
from swarm_protocol.records import CheckpointManifest
from swarm_protocol.spec import RunSpec

GROUPS = ("parameters", "momentum")
DTYPE = "float32"


def layout(spec: RunSpec) -> bytes:
    """The layout document of a run's checkpoints."""
    tensors = trainable_shapes(spec.model, spec.trainable).items()
    return encoding.encode([[group, name, DTYPE, list(shape)] for group in GROUPS for name, shape in tensors])


@lru_cache(maxsize=4)
def layout_hash(spec: RunSpec) -> bytes:
    """The content hash of the layout document, 32 bytes."""
    return content_hash(layout(spec))


def checkpoint_bytes(spec: RunSpec) -> int:
    """The size of each of a run's checkpoints: float32 parameters and as much momentum."""
    return 8 * spec.num_trainable


def parent_of_first(spec: RunSpec) -> bytes | None:
    """What checkpoint 0 was made from: a checkpoint of the parent run, if there is one."""
    return None if spec.parent is None else bytes.fromhex(spec.parent.root)


def checkpoint_manifest(spec: RunSpec, round_number: int, root: bytes, parent: bytes | None) -> CheckpointManifest:
    """The record of the checkpoint that a round starts from, which the coordinator signs when it seals the round before.

    `parent` is the root of the checkpoint before it; for checkpoint 0 see `parent_of_first`.
    """
    return CheckpointManifest(
        run=spec.run_id,
        round=round_number,
        parent=parent,
        root=root,
        size_bytes=checkpoint_bytes(spec),
        chunk_bytes=CHUNK_BYTES,
        layout=layout_hash(spec),
    )


def require_same(spec: RunSpec, signed: CheckpointManifest, root: bytes, parent: bytes) -> None:
    """Check that what the coordinator signed of a checkpoint is what we derive, who made it from `parent`.

    Raises:
        InvalidDataError: it is not.
    """
    ours = checkpoint_manifest(spec, signed.round, root, parent)
    if signed.hash != ours.hash:
        raise InvalidDataError(
            f"the coordinator signed another manifest of checkpoint {signed.round} than follows from the round: "
            f"record {signed.hash.hex()}, ours is {ours.hash.hex()}"
        )
