"""Checkpoints of the object store, as the checkpoint worker serves them to peers who download one."""

from __future__ import annotations

import numpy as np

from swarm_coordinator.store import Store
from swarm_protocol.chunks import MAX_STATE_BYTES, StateManifest

KNOWN = 4


class StoredState:
    """A checkpoint whose chunks lie in the store; each answer has one."""

    def __init__(self, store: Store, manifest: StateManifest) -> None:
        self.manifest = manifest
        self.have = np.ones(len(manifest.hashes), np.bool_)
        self._store = store

    def view(self, first: int, count: int) -> bytes:
        """Chunk `first`. Raises `OSError` where the store has lost it."""
        data = self._store.get(self.manifest.hashes[first])
        if data is None:
            raise OSError("the store has lost a chunk")
        return data


class StoredStates:
    """The checkpoints of a store; the manifests of the last few that were asked for are kept."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[bytes, StoredState] = {}

    def find(self, root: bytes) -> StoredState | None:
        """The checkpoint with this root, if the store has it. Blocking; thread-safe."""
        known = self._known.get(root)
        raw = self._store.get_checkpoint(root) if known is None else None
        if raw is not None:
            known = StoredState(self._store, StateManifest.decode(raw, max_size_bytes=MAX_STATE_BYTES))
            self._known = {**dict(list(self._known.items())[1 - KNOWN :]), root: known}
        return known
