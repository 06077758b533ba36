"""A coordinator under load: synthetic nodes with real keys and real signed records, on loopback.

    python benchmarks/coordinator_load.py [--nodes N] [--rounds R] [--json] [--slots S] [--pace X] [--database URL]

A real `swarm-coordinator serve --no-workers` process; nodes, checkpoint worker and auditors are tasks of this process, with
one connection each (`coordinator_parties`). A round takes about 60 s / pace: heartbeats every 10 s / pace and long-polls in
between, commitments spread over 30 s / pace, openings and the next round's first heartbeat spread over 5 s / pace (`--herd`:
all at once). The mean is the aggregator, so there are no sketches; audits draw 2 % of the contributions. `errors` are answers
that are no success, and requests without one. `p50_s` and `p99_s` are over all requests that do not wait; `wake` is the time
from the first answer to a long-poll to each other one. Latencies include what this process needs to read an answer, since it
shares the machine: `generator_lag_p99_s` says how late it was itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvloop
from coordinator_parties import Node, Party, Shape, Swarm, key, make_run, play

STOP_S = 15.0
TOP = 30


class Server:
    """The coordinator as a process, and what it costs."""

    def __init__(self, folder: Path, profile: Path | None) -> None:
        program = ["-m", "swarm_coordinator"]
        if profile is not None:
            program = [str(Path(__file__).with_name("coordinator_profiled.py")), str(profile)]
        command = [sys.executable, *program, "serve", str(folder), "--no-workers", "--port", "0"]
        self._log = (folder / "serve.log").open("wb")
        self._child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if "serving run" not in line:
            self._child.wait(10)
            raise SystemExit(f"the coordinator did not start:\n{(folder / 'serve.log').read_text()}")
        self.port = int(line.strip().rpartition(":")[2])
        self._process = psutil.Process(self._child.pid)

    def cpu_s(self) -> float:
        spent = self._process.cpu_times()
        return float(spent.user + spent.system)

    def peak_mb(self) -> float:
        status = Path(f"/proc/{self._child.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def stop(self) -> None:
        self._child.terminate()
        try:
            self._child.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._log.close()


async def measure(swarm: Swarm, nodes: list[Node], server: Server, timeout_s: float) -> dict[str, Any]:
    """Play the run, and report."""
    lags = array("d")

    async def watch_itself() -> None:
        while True:
            asked_s = time.monotonic()
            await asyncio.sleep(0.05)
            lags.append(time.monotonic() - asked_s - 0.05)

    async def watch_run() -> None:
        watcher = Party(swarm, key("watcher"))
        while True:
            await watcher.ask("", "status")
            await watcher.ask("/log/head", "log head")
            await asyncio.sleep(swarm.shape.heartbeat_s)

    async def say() -> None:
        said = ""
        while True:
            await asyncio.sleep(5)
            line = ", ".join(f"{name}: {count}" for name, count in swarm.progress.items())
            if line != said:
                print(f"  {line}; errors {sum(swarm.meter.errors.values())}", file=sys.stderr, flush=True)
            said = line

    server_s, own_s, began_s = server.cpu_s(), time.process_time(), time.monotonic()
    ended = True
    try:
        await play(swarm, nodes, watch_itself(), watch_run(), say(), timeout_s=timeout_s)
    except TimeoutError:
        ended = False
    took_s = time.monotonic() - began_s
    plans = [swarm.documents[f"plan:{n}"].first_s for n in range(swarm.shape.rounds) if f"plan:{n}" in swarm.documents]
    rounds = sum(f"beacon:{number}" in swarm.documents for number in range(swarm.shape.rounds))
    meter = swarm.meter
    return {
        "errors": sum(meter.errors.values()) + (0 if ended else 1),
        "error_kinds": dict(meter.errors) | ({} if ended else {"the run did not end in time": 1}),
        **quantiles(value for values in meter.answers.values() for value in values),
        **{f"wake_{name}": value for name, value in quantiles(v for vs in meter.wakes.values() for v in vs).items()},
        "rss_mb": round(server.peak_mb(), 1),
        "rounds": rounds,
        "round_s": round((plans[-1] - plans[0]) / (len(plans) - 1), 1) if len(plans) > 1 else None,
        "requests": meter.requests,
        "requests_per_s": round(meter.requests / took_s, 1),
        "megabytes_received": round(sum(node.connection.bytes_in for node in nodes) / 1e6, 1),
        "wall_s": round(took_s, 1),
        "server_cpu_s": round(server.cpu_s() - server_s, 1),
        "generator_cpu_s": round(time.process_time() - own_s, 1),
        "generator_lag_p99_s": quantiles(lags)["p99_s"],
        "expired_late_p99_s": quantiles(meter.expired)["p99_s"],
        "kinds": {kind: {"count": len(values), **quantiles(values)} for kind, values in sorted(meter.answers.items())},
        "wakes": {kind: {"count": len(values), **quantiles(values)} for kind, values in sorted(meter.wakes.items())},
    }


def quantiles(values: Iterable[float]) -> dict[str, float | None]:
    found = np.fromiter(values, dtype=np.float64)
    if not found.size:
        return {"p50_s": None, "p99_s": None}
    return {"p50_s": round(float(np.quantile(found, 0.5)), 4), "p99_s": round(float(np.quantile(found, 0.99)), 4)}


def top_functions(stacks: Path) -> list[dict[str, Any]]:
    """Our functions by the share of CPU time under them, then everybody's by what they took themselves (`own`)."""
    cumulative, own, total = Counter[str](), Counter[str](), 0
    for line in stacks.read_text().splitlines():
        stack, _, spent = line.rpartition(" ")
        frames = stack.split(";")
        total += int(spent)
        own[frames[-1]] += int(spent)
        for name in set(frames):
            cumulative[name] += int(spent)
    ours = [name for name, _ in cumulative.most_common() if name.startswith("swarm_")][:TOP]
    theirs = [name for name, _ in own.most_common(TOP) if name not in ours]
    return [
        {"function": name, "share": round(cumulative[name] / total, 4), "own": round(own[name] / total, 4)}
        for name in (*ours, *theirs)
    ]


def report(result: dict[str, Any], shape: Shape, pace: float) -> None:
    print(
        f"{shape.nodes} nodes, {shape.slots} slots, {result['rounds']} of {shape.rounds} rounds, pace {pace:g} "
        f"(a round of 60 s in {60 / pace:g} s; measured {result['round_s']} s)"
    )
    print(f"  errors {result['errors']} {result['error_kinds'] or ''}")
    for name in ("", "wake_"):
        print(f"  {name or 'answer_'}p50 {result[f'{name}p50_s']} s, {name or 'answer_'}p99 {result[f'{name}p99_s']} s")
    print(
        f"  {result['requests_per_s']} requests/s over {result['wall_s']} s, {result['megabytes_received']} MB to nodes\n"
        f"  server {result['server_cpu_s']} CPU s, peak {result['rss_mb']} MB; generator {result['generator_cpu_s']} CPU s, "
        f"p99 of its own lag {result['generator_lag_p99_s']} s"
    )
    for title, group in (("answers", result["kinds"]), ("wake-ups", result["wakes"])):
        for kind, found in group.items():
            print(f"  {title:8} {kind:16} {found['count']:8}  p50 {found['p50_s']:8.4f}  p99 {found['p99_s']:8.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slots", type=int, help="in a round (default: all nodes)")
    parser.add_argument("--pace", type=float, default=1.0, help="how much faster than rounds of 60 s")
    parser.add_argument("--database", help="the URL of the coordinator's database (default: SQLite)")
    parser.add_argument("--herd", action="store_true", help="openings and first heartbeats all at once")
    parser.add_argument("--joins-per-s", type=float, default=200.0, help="registrations a second")
    parser.add_argument("--timeout", type=float, help="stop after this many seconds, and report as an error")
    parser.add_argument("--profile", action="store_true", help="where the server's CPU time goes")
    parser.add_argument("--stacks", type=Path, help="keep the profile's stacks here, for a flame graph")
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = options.nodes + 256
    if soft < wanted:
        if hard < wanted:
            raise SystemExit(
                f"{options.nodes} nodes need {wanted} open files; the limit is {hard}: raise it (ulimit -n)"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    pace = options.pace
    shape = Shape(
        nodes=options.nodes,
        slots=min(options.slots or options.nodes, options.nodes),
        rounds=options.rounds,
        presence_s=30 / pace,
        assemble_s=5 / pace,
        train_s=40 / pace,
        exchange_s=10 / pace,
        open_s=10 / pace,
        spread=0.0 if options.herd else 0.5,
        joins_per_s=options.joins_per_s,
    )
    with tempfile.TemporaryDirectory(prefix="coordinator-load-") as folder:
        spec = make_run(Path(folder) / "run", shape, options.database)
        stacks = (options.stacks or Path(folder) / "stacks") if options.profile else None
        server = Server(Path(folder) / "run", stacks)
        try:
            swarm = Swarm(spec, shape, "127.0.0.1", server.port)
            print(f"signing ahead for {shape.nodes} nodes", file=sys.stderr, flush=True)
            nodes = [Node(swarm, number) for number in range(shape.nodes)]
            timeout_s = options.timeout or 60 + shape.nodes / shape.joins_per_s + 4 * shape.rounds * 60 / pace
            result = uvloop.run(measure(swarm, nodes, server, timeout_s))
        finally:
            server.stop()
        if stacks is not None:
            result["profile"] = top_functions(stacks)
    result |= {"nodes": shape.nodes, "slots": shape.slots, "pace": pace, "herd": options.herd}
    processor = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    result["machine"] = {"processor": processor, "cores": len(os.sched_getaffinity(0))}
    report(result, shape, pace)
    for one in result.get("profile", []):
        print(f"  {one['share']:7.1%} {one['own']:7.1%}  {one['function']}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
