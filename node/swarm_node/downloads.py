"""Checkpoints that were downloaded to be used, not trained on: kept in a cache, checked each time they are read.

    DIR/RUN/checkpoint-ROOT     a checkpoint's parameters and momentum
    DIR/RUN/trunk-ROOT          the frozen parameters of a run that does not train all of its model
    DIR/RUN/tokenizer-HASH      its tokenizer.json

Everything in it can be fetched again, so it may be deleted at any time. The `KEPT` checkpoints of a run that were used
last stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from swarm_protocol import fetch
from swarm_protocol.catching_up import CatchUp
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.chunks import content_hash
from swarm_protocol.client import MAX_CHUNK_BYTES, CoordinatorClient
from swarm_protocol.errors import ConfigurationError, HashMismatchError
from swarm_protocol.fetch import Float32
from swarm_protocol.files import remove_leftovers, write_atomic
from swarm_protocol.sealed import Sealed, sealed
from swarm_protocol.spec import RunSpec

KEPT = 2


@dataclass(frozen=True)
class Download:
    """A sealed checkpoint on this disk, with what goes with it. `cached` says that it was there already.

    `trunk` is float32[num_parameters], None where all is trained; `tokenizer` a tokenizer.json, None for `bytes`.
    """

    spec: RunSpec
    sealed: Sealed
    checkpoint: Checkpoint
    trunk: Float32 | None
    tokenizer: bytes | None
    cached: bool

    def full_parameters(self) -> Float32:
        """All parameters of the model, float32[num_parameters]: with adapters merged, where that is what is trained."""
        from swarm_protocol import adapters

        return adapters.full_parameters(self.spec, self.checkpoint.parameters, self.trunk)


def default_cache() -> Path:
    """The XDG place for what can be fetched again."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "swarm-node"


async def download(client: CoordinatorClient, cache: Path, round_number: int | None) -> Download:
    """The newest checkpoint of a run, or the one that a round starts from, with its tokenizer.

    The parameters are mapped from the file, read-only.

    Raises:
        ConfigurationError, UnreachableError, RefusedError, InvalidDataError
    """
    wanted = await sealed(client, round_number)
    folder = cache / client.spec.run_id.hex()
    path = folder / f"checkpoint-{wanted.root.hex()}"
    checkpoint = await asyncio.to_thread(_read, client.spec, path, wanted)
    cached = checkpoint is not None
    with _alone(folder):
        if checkpoint is None:
            remove_leftovers(folder)
            fetched = await CatchUp(client).checkpoint(wanted.round, wanted.root)
            await asyncio.to_thread(write_atomic, path, *fetched.buffers)
            del fetched
            checkpoint = await asyncio.to_thread(_read, client.spec, path, wanted)
            if checkpoint is None:
                raise HashMismatchError(f"{path} is not what was written to it; is the disk broken?")
        _forget(folder, path)
        trunk = await fetch.trunk(client, folder)
        return Download(client.spec, wanted, checkpoint, trunk, await _tokenizer(client, folder), cached)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A run's cache for us alone.

    Raises:
        ConfigurationError: somebody else is at it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigurationError(
            f"the cache {folder} cannot be used: {error.strerror}; choose another --cache"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigurationError(
                f"another swarm-node downloads into {folder}; wait for it, or choose another --cache"
            ) from error
        yield
    finally:
        os.close(lock)


def _read(spec: RunSpec, path: Path, wanted: Sealed) -> Checkpoint | None:
    """The checkpoint in a file, mapped and checked; None where it is not there, or damaged and now removed."""
    try:
        return Checkpoint.from_bytes(spec, wanted.round, np.memmap(path, dtype=np.uint8, mode="r"), wanted.root)
    except FileNotFoundError:
        return None
    except (HashMismatchError, ValueError):  # ValueError: it is empty
        path.unlink()
        return None


def _forget(folder: Path, used: Path) -> None:
    """Delete all checkpoints but those used last."""
    os.utime(used)
    there = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in there[KEPT:]:
        path.unlink(missing_ok=True)


async def _tokenizer(client: CoordinatorClient, folder: Path) -> bytes | None:
    """The run's tokenizer.json; None for `bytes`."""
    name = client.spec.data.tokenizer
    if name == "bytes":
        return None
    path = folder / f"tokenizer-{bytes.fromhex(name).hex()}"
    with contextlib.suppress(FileNotFoundError):
        blob = path.read_bytes()
        if content_hash(blob) == bytes.fromhex(name):
            return blob
    blob = await client.chunk(bytes.fromhex(name), max_bytes=MAX_CHUNK_BYTES)
    write_atomic(path, blob)
    return blob
