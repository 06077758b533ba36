"""The processes of `join.py`: seeders and a joiner with our peer plane, and hivemind's two averagers."""

from __future__ import annotations

import asyncio
import os
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from exchange_rivals import cpu_s

from swarm_protocol import processes
from swarm_protocol.chunks import StateManifest, manifest_of
from swarm_protocol.download import ChunkDesk, Download, InMemory, Partial, PeerSource, StateFile
from swarm_protocol.identity import Identity
from swarm_protocol.peers import PeerPlane

RUN = bytes(32)
TENSORS = 32


def seeder(pipe: Connection, parent: int, folder: Path, state: Path, bootstrap: list[str]) -> None:
    """Serves the state in a file. A message is an upload limit in bytes per second, or 0; it is answered by the CPU time."""
    processes.die_with_parent(parent)
    folder.mkdir()
    asyncio.run(_seed(pipe, folder, state, bootstrap))


async def _seed(pipe: Connection, folder: Path, state: Path, bootstrap: list[str]) -> None:
    identity = Identity.load_or_create(folder / "identity")
    plane = await PeerPlane.start(folder / "identity", RUN, initial_peers=bootstrap)
    held = StateFile.open(state)

    def backlog_s() -> float:
        return 0.0 if plane.upload is None else plane.upload.backlog_s()

    await plane.serve(ChunkDesk(lambda root: held if root == held.manifest.root else None, backlog_s).handlers)
    pipe.send((identity.public_key, await plane.addresses(), held.manifest.root))
    while (limit := await asyncio.to_thread(pipe.recv)) is not None:
        if limit:
            plane.limit_upload(limit)
        else:
            plane._direct.upload = None
        pipe.send(cpu_s())
    await plane.close()


def joiner(pipe: Connection, parent: int, folder: Path, root: bytes, size_bytes: int, bootstrap: list[str]) -> None:
    """Downloads the state from the peers that a message names, onto the disk or into memory; answers with what it took."""
    processes.die_with_parent(parent)
    folder.mkdir()
    asyncio.run(_join(pipe, folder, root, size_bytes, bootstrap))


async def _join(pipe: Connection, folder: Path, root: bytes, size_bytes: int, bootstrap: list[str]) -> None:
    Identity.load_or_create(folder / "identity")
    plane = await PeerPlane.start(folder / "identity", RUN, initial_peers=bootstrap)

    def begin(manifest: StateManifest) -> Partial:
        return Partial(manifest, folder / "state.part")

    pipe.send(None)
    while (message := await asyncio.to_thread(pipe.recv)) is not None:
        keys, in_memory = message
        sources, cpu = [PeerSource(plane, key) for key in keys], cpu_s()
        start = time.monotonic()
        download: Download[Any] = Download(root, size_bytes, sources, InMemory if in_memory else begin)
        sink = await download.run()
        verified = time.monotonic()
        if not in_memory:
            await asyncio.to_thread(sink.finish, folder / "state")
        end = time.monotonic()
        cpu = cpu_s() - cpu
        hashing = time.monotonic()
        assert (await asyncio.to_thread(manifest_of, sink.data)).root == root
        pipe.send(
            {
                "wall_s": end - start,
                "until_verified_s": verified - start,
                "cpu_s": cpu,
                "hashing_again_s": time.monotonic() - hashing,
                "shares": sorted(download.bytes_by_source.values()),
            }
        )
        if not in_memory:
            sink.close()
            (folder / "state").unlink()
    await plane.close()


def hivemind(pipe: Connection, parent: int, size_bytes: int, seeds: bool) -> None:
    """One of hivemind's averagers with a state of this size, or without one, which downloads it at each message.

    The first message is a list of addresses, None for the first peer, and is answered with our own.
    """
    processes.die_with_parent(parent)
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "CRITICAL")
    warnings.simplefilter("ignore")
    import multiprocessing

    multiprocessing.set_start_method("fork", force=True)
    import torch
    from hivemind import DHT
    from hivemind.averaging import DecentralizedAverager

    torch.set_num_threads(1)
    values = np.random.default_rng(1).standard_normal(size_bytes // 4, dtype=np.float32)
    tensors = [torch.from_numpy(one.copy()) for one in np.array_split(values, TENSORS)]
    dht = DHT(initial_peers=pipe.recv(), host_maddrs=["/ip4/127.0.0.1/tcp/0"], start=True)
    averager = DecentralizedAverager(
        tensors, dht, start=True, prefix="join", target_group_size=2, min_group_size=2, allow_state_sharing=seeds
    )
    pipe.send([str(address) for address in dht.get_visible_maddrs()])
    while pipe.recv() is not None:
        cpu, start = cpu_s(), time.monotonic()
        found = averager.load_state_from_peers(timeout=240)
        wall_s = time.monotonic() - start
        whole = found is not None and sum(tensor.numel() for tensor in found[1]) == len(values)
        same = whole and bool(np.array_equal(found[1][0].numpy(), tensors[0].numpy()))
        pipe.send({"wall_s": wall_s if same else None, "cpu_s": cpu_s() - cpu})
    averager.shutdown()
    dht.shutdown()
