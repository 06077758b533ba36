"""The object store, in a folder and in a bucket of a real S3 protocol."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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
        yield "s3://swarm/a run"
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
