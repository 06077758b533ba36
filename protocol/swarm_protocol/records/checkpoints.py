"""The record that names a checkpoint: its root, the one that it was made from, and how its bytes are to be read."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from swarm_protocol.records.base import Bytes32, Record


class CheckpointManifest(Record):
    """What round `round` starts from. Everybody who did the outer step derives this body (`layout.checkpoint_manifest`).

    `parent` is the root of the checkpoint before it, the last of the parent run for checkpoint 0, None where there is
    none. `layout` is the hash of the document that names its tensors; its chunks are those of its `StateManifest`.
    """

    kind: ClassVar[str] = "checkpoint"
    parent: Bytes32 | None
    root: Bytes32
    size_bytes: Annotated[int, Field(ge=1, lt=1 << 50)]
    chunk_bytes: Annotated[int, Field(ge=1, lt=1 << 40)]
    layout: Bytes32
