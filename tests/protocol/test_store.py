"""The object store, in a folder and in a bucket of a real S3 protocol."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest

from swarm_coordinator.store import Store
from swarm_protocol.chunks import StateManifest, content_hash
from swarm_protocol.errors import ConfigurationError, HashMismatchError


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.swarm)])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "folder":
        yield (tmp_path / "ob jects").as_uri()
        return
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        import httpx

        assert httpx.put(f"http://{host}:{port}/swarm").status_code == 200
        yield f"s3://swarm/a run {uuid4().hex}"  # servers of one process share what is in them
    finally:
        server.stop()


def test_a_blob_comes_back_whole_and_in_pieces(url: str) -> None:
    store, blob = Store(url), bytes(range(256)) * 5000
    digest = content_hash(blob)
    assert (store.get(digest), store.size_bytes(digest), store.get_range(digest, 0, 1)) == (None, None, None)
    store.put(digest, blob)
    store.put(digest, blob)
    assert Store(url).get(digest) == blob
    assert store.size_bytes(digest) == len(blob)
    assert store.get_range(digest, 1000, 1010) == blob[1000:1010]


def test_bytes_under_another_hash_are_not_stored(url: str) -> None:
    store = Store(url)
    with pytest.raises(HashMismatchError):
        store.put(bytes(32), b"something")
    assert not store.exists(bytes(32))


def test_a_checkpoint_promises_its_chunks(url: str) -> None:
    store, state = Store(url), np.arange(700_000, dtype=np.float32)
    manifest = store.put_state(state)
    encoded = store.get_checkpoint(manifest.root)
    assert encoded is not None
    found = StateManifest.decode(encoded, max_size_bytes=state.nbytes)
    assert b"".join(store.get(digest) or b"" for digest in found.hashes) == state.tobytes()
    assert store.get_checkpoint(bytes(32)) is None


@pytest.mark.parametrize("where", ["ftp://somewhere/else", "s3://swarm"])
def test_a_store_that_cannot_be_opened_says_what_to_set(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with pytest.raises(ConfigurationError, match=r"file:///PATH|AWS_ENDPOINT_URL"):
        Store(where)


def test_what_is_there_is_listed_and_deleted_but_not_what_was_put_meanwhile(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarm_coordinator.store.DELETED_AT_ONCE", 16)
    store, blobs = Store(url), [number.to_bytes(2, "little") * 500 for number in range(40)]
    state = store.put_state(np.zeros(5, np.float32))
    for blob in blobs:
        store.put(content_hash(blob), blob)
    found = store.blobs()
    assert set(found) == {*map(content_hash, blobs), *state.hashes}
    assert {one.size_bytes for one in found.values()} == {1000, 20}
    assert all(abs(one.written_s - time.time()) < 600 for one in found.values())
    assert set(store.states()) == store.whole([state.root, bytes(32)]) == {state.root}
    store.put(content_hash(blobs[7]), blobs[7])
    assert store.delete_blobs([*map(content_hash, blobs), bytes(32)]) == 40
    assert set(store.blobs()) == {content_hash(blobs[7]), *state.hashes}
    store.delete_states([state.root, bytes(32)])
    assert not store.states()
    assert store.get(state.hashes[0]) == bytes(20)


def test_a_store_knows_whose_it_is(url: str) -> None:
    ours, theirs = b"o" * 32, b"t" * 32
    assert Store(url).claim(ours)
    assert Store(url).claim(ours)
    assert not Store(url).claim(theirs)
    assert not Store(url).claim(ours)
