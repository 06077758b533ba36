"""Getting what a round starts from: checkpoints and data shards, by hash, each piece verified before it is used."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.client import MAX_CHUNK_BYTES, CoordinatorClient
from swarm_protocol.data import Dataset, DatasetManifest
from swarm_protocol.errors import HashMismatchError
from swarm_protocol.files import write_atomic
from swarm_protocol.tolerances import MAX_BYTES, Tolerances

PARALLEL = 4


async def checkpoint(client: CoordinatorClient, round_number: int, root: bytes) -> Checkpoint:
    """Download a checkpoint by its root, chunk by chunk.

    Raises:
        UnreachableError, RefusedError, HashMismatchError
    """
    manifest = await client.state_manifest(root)
    if manifest.size_bytes != 8 * client.spec.model.num_parameters:
        raise HashMismatchError("the checkpoint's size is not that of this run's model")
    gate = asyncio.Semaphore(PARALLEL)

    async def chunk(digest: bytes) -> bytes:
        async with gate:
            return await client.chunk(digest)

    pieces = await asyncio.gather(*(chunk(digest) for digest in manifest.hashes))
    return await asyncio.to_thread(Checkpoint.from_bytes, client.spec, round_number, b"".join(pieces), root)


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
            write_atomic(path, await client.chunk(bytes.fromhex(root), max_bytes=MAX_CHUNK_BYTES))
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
                write_atomic(path, await self._client.chunk(digest, max_bytes=MAX_CHUNK_BYTES))
