"""The two all-reduces that `exchange.py` measures ours against, as one process per peer, on the same tensors.

hivemind: `DecentralizedAverager` without compression and with its defaults, timed from the moment that its group is formed.
gloo: `torch.distributed.all_reduce`, which checks nothing and survives nothing: the floor.
"""

from __future__ import annotations

import functools
import os
import time
import warnings
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from swarm_protocol import processes


@functools.lru_cache(maxsize=1)
def values(peer: int, numel: int) -> npt.NDArray[np.float32]:
    """The tensor of one peer: float32[numel], like a pseudo-gradient."""
    return np.random.default_rng(peer).standard_normal(numel, dtype=np.float32) * np.float32(1e-3)


def cpu_s() -> float:
    """Processor time of this process and all below it."""
    times = [process.cpu_times() for process in (psutil.Process(), *psutil.Process().children(recursive=True))]
    return sum(time.user + time.system for time in times)


def gloo(pipe: Connection, parent: int, peer: int, peers: int, numel: int, port: int) -> None:
    """Answers each message with (start, end) of an all-reduce."""
    processes.die_with_parent(parent)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=peer, world_size=peers)
    mine = torch.from_numpy(values(peer, numel))
    pipe.send("ready")
    while pipe.recv() is not None:
        whole = mine.clone()
        distributed.barrier()
        start = time.monotonic()
        distributed.all_reduce(whole)
        whole /= peers
        pipe.send((start, time.monotonic()))
    distributed.destroy_process_group()


def hivemind(pipe: Connection, parent: int, peer: int, peers: int, numel: int) -> None:
    """Answers each message with (start, end) of an all-reduce, without matchmaking, and the largest error of its result.

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
    times = multiprocessing.Array("d", 2)

    class Timed(DecentralizedAverager):  # type: ignore[misc]
        async def _aggregate_with_group(self, *args: Any, **kwargs: Any) -> Any:
            times[0] = time.monotonic()
            try:
                return await super()._aggregate_with_group(*args, **kwargs)
            finally:
                times[1] = time.monotonic()

    dht = DHT(initial_peers=pipe.recv(), host_maddrs=["/ip4/127.0.0.1/tcp/0"], start=True)
    tensor = torch.from_numpy(values(peer, numel).copy())
    averager = Timed(
        [tensor], dht, start=True, prefix="exchange", target_group_size=peers, min_group_size=peers,
        min_matchmaking_time=3.0, request_timeout=2.0,
    )  # fmt: skip
    pipe.send([str(address) for address in dht.get_visible_maddrs()])
    # The same sum on every peer: what the result has to be close to.
    sample = slice(0, min(numel, 1 << 20))
    expected = np.zeros(sample.stop, np.float32)
    for other in range(peers):
        expected += values(other, numel)[sample]
    expected /= peers
    while pipe.recv() is not None:
        cpu = cpu_s()
        with averager.get_tensors() as tensors:
            tensors[0].copy_(torch.from_numpy(values(peer, numel)))
        outcome = averager.step(timeout=60)
        with averager.get_tensors() as tensors:
            error = float(np.abs(tensors[0].numpy()[sample] - expected).max())
        pipe.send((times[0], times[1], len(outcome or ()), error, cpu_s() - cpu))
    averager.shutdown()
    dht.shutdown()
