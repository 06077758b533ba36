"""The checkpoint worker serves what is in the object store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from swarm_coordinator.serving import KNOWN, StoredStates
from swarm_coordinator.store import Store
from swarm_protocol.chunks import CHUNK_BYTES


def test_a_stored_checkpoint_is_served_a_chunk_at_a_time(tmp_path: Path) -> None:
    store, state = Store(tmp_path), np.random.default_rng(1).bytes(2 * CHUNK_BYTES + 9)
    states = StoredStates(store)
    manifest = store.put_state(state)
    found = states.find(manifest.root)
    assert found is not None
    assert found.manifest == manifest
    assert found.have.all()
    assert [found.view(index, 8) for index in range(3)] == [state[:CHUNK_BYTES], state[CHUNK_BYTES:-9], state[-9:]]


def test_what_is_stored_later_is_found_later(tmp_path: Path) -> None:
    store = Store(tmp_path)
    states = StoredStates(store)
    roots = [store.put_state(bytes([number]) * 10).root for number in range(2 * KNOWN)]
    assert all(states.find(root) is not None for root in roots)
    assert len(states._known) == KNOWN
    assert states.find(bytes(32)) is None
    state = b"later"
    assert states.find(store.put_state(state).root) is not None


def test_a_chunk_that_the_store_has_lost_is_an_error(tmp_path: Path) -> None:
    store = Store(tmp_path)
    manifest = store.put_state(b"state")
    (tmp_path / "chunks" / manifest.hashes[0].hex()).unlink()
    found = StoredStates(store).find(manifest.root)
    assert found is not None
    with pytest.raises(OSError, match="lost a chunk"):
        found.view(0, 1)
