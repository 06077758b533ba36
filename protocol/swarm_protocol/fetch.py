"""Getting what a round starts from: checkpoints, the trunk, data shards, by hash, each piece verified before it is used."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from swarm_protocol import checkpoint as checkpoints
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.chunks import StateManifest, manifest_of
from swarm_protocol.client import MAX_CHUNK_BYTES, CoordinatorClient
from swarm_protocol.data import Dataset, DatasetManifest
from swarm_protocol.download import CoordinatorSource, Download, InMemory, Partial
from swarm_protocol.errors import HashMismatchError, RefusedError, UnreachableError
from swarm_protocol.files import write_atomic
from swarm_protocol.spec import RunSpec
from swarm_protocol.tolerances import MAX_BYTES, Tolerances

LOST_S = 5.0

Float32 = npt.NDArray[np.float32]


async def checkpoint(client: CoordinatorClient, round_number: int, root: bytes) -> Checkpoint:
    """Download a checkpoint by its root into memory, from the coordinator alone.

    Raises:
        UnreachableError, RefusedError, HashMismatchError
    """
    sources = [CoordinatorSource(client)]
    whole = await Download(root, checkpoints.size_bytes(client.spec), sources, InMemory).run()
    return Checkpoint.from_verified(client.spec, round_number, whole.data, whole.manifest)


_trunks: WeakValueDictionary[str, Float32] = WeakValueDictionary()
"""Trunks that something in this process uses, by root: a node that also audits holds one, not two."""

_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
"""By root: whoever asks for a trunk that is being fetched waits for it."""


async def trunk(
    client: CoordinatorClient, folder: Path, download: Callable[[bytes, int, Path], Awaitable[object]] | None = None
) -> Float32 | None:
    """The frozen model's parameters, float32[num_parameters], from `folder` or downloaded into it; None where all is trained.

    They are mapped from the file, read-only. `download` has a state of known root and size put into a file; without it the
    coordinator alone is asked.

    Raises:
        UnreachableError, RefusedError, HashMismatchError
    """
    name = client.spec.trunk
    if name is None:
        return None
    path, size_bytes = trunk_path(client.spec, folder), 4 * client.spec.model.num_parameters
    lock = _locks.setdefault(name, asyncio.Lock())
    async with lock:
        found = _trunks.get(name)
        if found is None:
            found = await asyncio.to_thread(_read_trunk, path, name)
        if found is None:
            await (download or partial(_to_file, client))(bytes.fromhex(name), size_bytes, path)
            found = await asyncio.to_thread(_read_trunk, path, name)
            if found is None:
                raise HashMismatchError(f"{path} has other bytes than were written to it; check the disk")
        _trunks[name] = found
        return found


def trunk_path(spec: RunSpec, folder: Path) -> Path:
    """Where the trunk lies in a folder."""
    return folder / f"trunk-{spec.trunk}"


def _read_trunk(path: Path, root: str) -> Float32 | None:
    """What is in the file; None where it is not there, or damaged."""
    try:
        values = np.asarray(np.memmap(path, "<f4", "r"))
    except (FileNotFoundError, ValueError):  # ValueError: not a whole number of floats, or none
        return None
    return values if manifest_of(values).root.hex() == root else None


async def _to_file(client: CoordinatorClient, root: bytes, size_bytes: int, path: Path) -> None:
    """Download a state by its root into a file, going on where an earlier process was, or repairing what is there."""

    def begin(manifest: StateManifest) -> Partial:
        unfinished = path.with_name(f"{path.name}.part")
        with contextlib.suppress(FileNotFoundError):
            path.replace(unfinished)  # it is damaged: what is right in it need not be fetched again
        return Partial(manifest, unfinished)

    download = Download(root, size_bytes, [CoordinatorSource(client)], begin)
    try:
        await asyncio.to_thread((await download.run()).finish, path)
    finally:
        if download.sink is not None:
            download.sink.close()


async def tolerances(client: CoordinatorClient) -> Tolerances | None:
    """The tolerances that the run's spec seals, if it does.

    Raises:
        UnreachableError, RefusedError
        InvalidDataError: the file is not what was sealed, or no tolerances.
    """
    digest = client.spec.audit.tolerance_file
    return None if digest is None else Tolerances.decode(await client.chunk(bytes.fromhex(digest), max_bytes=MAX_BYTES))


class Shards:
    """The run's data on this disk, as far as it was needed."""

    def __init__(self, client: CoordinatorClient, folder: Path, manifest: DatasetManifest) -> None:
        self._client = client
        self._folder = folder
        self.manifest = manifest
        self.dataset = Dataset.from_directory(manifest, folder)

    @classmethod
    async def open(cls, client: CoordinatorClient, folder: Path) -> Shards:
        """Fetch the dataset's manifest, if it is not on disk yet."""
        root = client.spec.data.root
        path = folder / f"manifest-{root}"
        if not path.exists():
            write_atomic(path, await _data(client, bytes.fromhex(root)))
        manifest = DatasetManifest.decode(path.read_bytes())
        if manifest.root.hex() != root:
            path.unlink()
            raise HashMismatchError(f"{path} was damaged and has been removed; start again")
        return cls(client, folder, manifest)

    async def ensure(self, shards: Iterable[int]) -> None:
        """Have these shards of the training split on disk."""
        await self._ensure(self.manifest.train[shard][0] for shard in shards)

    async def ensure_held_out(self) -> None:
        """Have the held-out split on disk."""
        await self._ensure(digest for digest, _ in self.manifest.held_out)

    async def _ensure(self, digests: Iterable[bytes]) -> None:
        for digest in digests:
            path = self._folder / digest.hex()
            if not path.exists():
                write_atomic(path, await _data(self._client, digest))


async def _data(client: CoordinatorClient, digest: bytes) -> bytes:
    """A piece of the corpus. One that the coordinator does not have, it has lost: it may get it back from somebody."""
    try:
        return await client.chunk(digest, max_bytes=MAX_CHUNK_BYTES)
    except RefusedError as error:
        if error.status != 404:
            raise
        raise UnreachableError(f"the data {digest.hex()[:12]} is not to be had now", retry_after_s=LOST_S) from error
