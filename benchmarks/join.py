"""How long a node takes to fetch a checkpoint from 1, 2 and 4 seeders, and how that compares with hivemind.

    python benchmarks/join.py [--json] [--megabytes 500] [--megabits 100] [--repeats 3]

500 MB is the checkpoint of a model of 62.5 million parameters. Every peer is a process with our peer plane, on loopback.
A time is that from knowing the root to the file that is verified, synced, and has its name. Seeders are first limited in
their uploads, as `swarm-node join --upload-limit` does it: `share_of_caps` is what came per second over the sum of the
limits. Then one seeder without a limit takes turns with hivemind's `load_state_from_peers` of as many bytes, which keeps them
in memory and verifies nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import join_peers
import numpy as np
from exchange import ROUND_S, START_S, Peers, _receive

SEEDERS = (1, 2, 4)
WAIT_S = 600.0


class Swarm:
    """Seeders of one state, and a joiner."""

    def __init__(self, folder: Path, size_bytes: int, seeders: int) -> None:
        self.peers = Peers()
        self.keys: list[bytes] = []
        self._seeders: list[Connection] = []
        state, bootstrap, root = folder / "state", list[str](), b""
        state.write_bytes(np.random.default_rng(1).bytes(size_bytes))
        for number in range(seeders):
            pipe = self.peers.start(join_peers.seeder, folder / f"seeder-{number}", state, bootstrap)
            key, addresses, root = _receive(pipe, START_S)
            self.keys.append(key)
            self._seeders.append(pipe)
            bootstrap = bootstrap or addresses
        self._joiner = self.peers.start(join_peers.joiner, folder / "joiner", root, size_bytes, bootstrap)
        _receive(self._joiner, START_S)

    def limit(self, bytes_per_s: float) -> float:
        """Limit the uploads of all seeders, 0 for not at all; returns the CPU time that they have taken so far."""
        for pipe in self._seeders:
            pipe.send(bytes_per_s)
        return float(sum(_receive(pipe, START_S) for pipe in self._seeders))

    def join(self, seeders: int, *, in_memory: bool = False) -> dict[str, Any]:
        self._joiner.send((self.keys[:seeders], in_memory))
        found: dict[str, Any] = _receive(self._joiner, WAIT_S)
        return found


class Hivemind:
    def __init__(self, size_bytes: int) -> None:
        self.peers = Peers()
        seeder = self.peers.start(join_peers.hivemind, size_bytes, True)
        seeder.send(None)
        bootstrap = _receive(seeder, START_S)
        self._joiner = self.peers.start(join_peers.hivemind, size_bytes, False)
        self._joiner.send(bootstrap)
        _receive(self._joiner, START_S)

    def join(self) -> dict[str, Any]:
        self._joiner.send("go")
        found: dict[str, Any] = _receive(self._joiner, ROUND_S)
        return found


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    size_bytes = int(options.megabytes * 1e6) // 8 * 8
    cap = options.megabits * 1e6 / 8
    folder = Path(tempfile.mkdtemp(prefix="join-"))
    swarm = Swarm(folder, size_bytes, max(SEEDERS))
    rival: Hivemind | None = None
    capped: dict[str, Any] = {}
    turns: dict[str, list[dict[str, Any]]] = {"ours": [], "ours, in memory": [], "hivemind": []}
    try:
        swarm.join(1)  # warms up, and connects
        for seeders in SEEDERS:
            swarm.limit(cap)
            found = capped[str(seeders)] = swarm.join(seeders)
            say(f"{seeders} seeders with {options.megabits:.0f} Mbit/s each: {found['wall_s']:.2f} s")
        seeding = swarm.limit(0)
        swarm.join(1)
        seeding = swarm.limit(0) - seeding
        rival = Hivemind(size_bytes)
        for turn in range(options.repeats + 1):  # the first one warms up
            found = {
                "ours": swarm.join(1),
                "ours, in memory": swarm.join(1, in_memory=True),
                "hivemind": rival.join(),
            }
            say("  ".join(f"{name} {one['wall_s'] or float('nan'):.2f} s" for name, one in found.items()))
            for name, one in found.items():
                if turn and one["wall_s"] is not None:
                    turns[name].append(one)
    finally:
        for group in (swarm, rival):
            if group is not None:
                group.peers.stop()
        shutil.rmtree(folder, ignore_errors=True)
    return _report(options, size_bytes, cap, capped, turns, seeding)


def _report(
    options: argparse.Namespace,
    size_bytes: int,
    cap: float,
    capped: dict[str, Any],
    turns: dict[str, list[dict[str, Any]]],
    seeding_s: float,
) -> dict[str, Any]:
    def median(name: str, field: str) -> float:
        return statistics.median(one[field] for one in turns[name])

    report: dict[str, Any] = {
        "megabytes": size_bytes / 1e6,
        "cap_megabits": options.megabits,
        "capped_wall_s": {name: round(one["wall_s"], 2) for name, one in capped.items()},
        "share_of_caps": {
            name: round(size_bytes / one["wall_s"] / (int(name) * cap), 3) for name, one in capped.items()
        },
        "shares_of_seeders": {
            name: [round(share / size_bytes, 2) for share in one["shares"]] for name, one in capped.items()
        },
        "uncapped_wall_s": {name: round(median(name, "wall_s"), 2) for name in turns if turns[name]},
        "cpu_s": {name: round(median(name, "cpu_s"), 2) for name in turns if turns[name]},
        "profile": {
            "until all is verified and written, wall": round(median("ours", "until_verified_s"), 2),
            "then until it is synced and named, wall": round(
                median("ours", "wall_s") - median("ours", "until_verified_s"), 2
            ),
            "hashing all of it once more, one thread": round(median("ours", "hashing_again_s"), 2),
            "CPU of the seeder": round(seeding_s, 2),
        },
    }
    if turns["hivemind"]:
        rival = median("hivemind", "wall_s")
        report["speedup_vs_hivemind"] = round(rival / median("ours", "wall_s"), 2)
        report["speedup_vs_hivemind_in_memory"] = round(rival / median("ours, in memory", "wall_s"), 2)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=500.0)
    parser.add_argument("--megabits", type=float, default=100.0, help="upload limit of a seeder, per second")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    options = parser.parse_args()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    result = measure(options, say)
    result["machine"] = {"processor": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
