"""`swarm-node demo`: a whole swarm on this machine, each part a real process that talks over loopback.

It starts a coordinator (with its checkpoint worker and two auditors) and volunteers, watches the run through the public
API and the nodes' own status files, waits for every verdict, and says whether all of it holds together. Everything that it
started is gone when it ends.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from swarm_node.cheats import Kind
from swarm_node.demo_screen import Screen, show_result
from swarm_node.swarm import Child, Swarm
from swarm_protocol.client import CoordinatorClient
from swarm_protocol.errors import ConfigurationError, SwarmError, UnreachableError
from swarm_protocol.http import persist

START_S = 120.0
ROUND_S = 120.0
VERDICTS_S = 180.0
POLL_S = 0.25


@dataclass(frozen=True)
class Kernels:
    """Which CPU kernels a process uses: environment variables of torch and its libraries, and a number of threads."""

    threads: int = 1
    environment: dict[str, str] = field(default_factory=dict)


PLAIN = Kernels()
KERNELS = (
    Kernels(threads=1),
    Kernels(threads=2, environment={"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
    Kernels(threads=1, environment={"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}),
)
AUDITORS_KERNELS = Kernels(environment={"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX2"})


@dataclass(frozen=True)
class Options:
    nodes: int
    rounds: int
    cheaters: int
    cheat: str
    numerics: str
    mixed_kernels: bool
    corpus: list[Path]
    as_json: bool
    keep: Path | None


class DemoError(SwarmError):
    """The demo did not get to its end."""


@dataclass
class _Demo:
    options: Options
    folder: Path
    swarm: Swarm
    screen: Screen
    nodes: dict[str, Child] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)


def run(options: Options) -> int:
    """Run the demo; returns the exit code: 0 if roots agree, the loss fell, and nobody honest was rejected."""
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("swarm_coordinator") is None:
        raise ConfigurationError("the demo needs a coordinator: pip install 'swarm-node[coordinator]'")
    if options.keep is not None and options.keep.exists():
        raise ConfigurationError(f"{options.keep} exists; choose a new folder for --keep")
    folder = options.keep or Path(tempfile.mkdtemp(prefix="swarm-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=options.as_json)
    swarm = Swarm(folder / "logs")
    keep = options.keep is not None
    try:
        with Screen(console) as screen:
            result = asyncio.run(_run(_Demo(options, folder, swarm, screen)))
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 130
    except SwarmError:
        keep = True
        console.print(f"The logs of all processes are in {folder / 'logs'}")
        raise
    finally:
        swarm.stop()
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    show_result(console, result)
    if options.as_json:
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
    return 0 if holds(result, options) else 1


def holds(result: dict[str, Any], options: Options) -> bool:
    """Whether the swarm did what it promises."""
    losses, rejected = result["val_loss"], {entry["node"] for entry in result["rejected"]}
    return (
        len(set(result["checkpoint_roots"].values())) == 1
        and len(losses) == result["rounds"] + 1
        and losses[-1] < losses[0]
        and all(name.startswith("cheater-") for name in rejected)
        and len(rejected) == (0 if tolerated(options) else options.cheaters)
    )


def tolerated(options: Options) -> bool:
    """Whether what the cheaters do gets nobody rejected: showing no evidence, or where none is needed, false evidence."""
    harmless = {Kind.REFUSES_EVIDENCE} | ({Kind.FORGED_EVIDENCE} if options.numerics == "exact" else set())
    return options.cheat in harmless


async def _run(demo: _Demo) -> dict[str, Any]:
    url = await _start_coordinator(demo)
    client = await persist(
        lambda: _connect(demo, url),
        deadline_s=START_S,
        longest_pause_s=0.5,
    )
    async with client:
        names = [f"node-{number}" for number in range(1, demo.options.nodes + 1)]
        cheaters = [f"cheater-{number}" for number in range(1, demo.options.cheaters + 1)]
        for name in names + cheaters:
            kernels = KERNELS[len(demo.nodes) % len(KERNELS)] if demo.options.mixed_kernels else PLAIN
            demo.nodes[name] = _start_node(demo, url, name, kernels, cheat=name in cheaters)
        status = await _watch(demo, client, names)
        roots = {name: _node_status(demo, name)["checkpoint"]["root"] for name in names}
        return {
            "rounds": demo.options.rounds,
            "val_loss": [entry["loss"] for entry in sorted(status["evaluations"], key=lambda e: int(e["round"]))],
            "checkpoint_roots": {**roots, "coordinator": status["checkpoint"]["root"]},
            "contributions": sum(entry["committed"] for entry in status["history"]),
            "audits": _outcomes(status["audits"]),
            "part_audits": _outcomes(status["part_audits"]),
            "comparisons": status["audits"]["comparisons"],
            "rejected": [
                {"node": entry["name"], "round": entry["round"], "reason": entry["reason"]}
                for entry in status["rejected"]
            ],
            "missing_parts": sum(entry["missing_parts"] for entry in status["history"]),
            "exchange": {name: _node_status(demo, name).get("exchange", {}) for name in demo.nodes},
            "bytes_sent": {name: _node_status(demo, name)["bytes_sent"] for name in demo.nodes},
            "wall_s": round(time.monotonic() - demo.started, 1),
        }


def _outcomes(counts: dict[str, Any]) -> dict[str, int]:
    return {outcome: counts[outcome] for outcome in ("accepted", "rejected", "inconclusive", "unavailable")}


async def _start_coordinator(demo: _Demo) -> str:
    demo.screen.say("Preparing the corpus and checkpoint 0")
    home, config = demo.folder / "coordinator", demo.folder / "run.toml"
    config.write_text(run_toml(demo.options))
    corpus = [argument for path in demo.options.corpus for argument in ("--corpus", str(path))]
    coordinator = [sys.executable, "-m", "swarm_coordinator"]
    init = demo.swarm.start("init", [*coordinator, "init", str(home), "--spec", str(config), *corpus])
    if await asyncio.to_thread(init.wait, START_S) != 0:
        raise DemoError(f"the run cannot be prepared:\n{init.last_lines()}")
    port = free_port()
    demo.screen.say("Starting the coordinator, its checkpoint worker and two auditors")
    kernels = AUDITORS_KERNELS if demo.options.mixed_kernels else PLAIN
    command = [*coordinator, "serve", str(home), "--port", str(port)]
    demo.swarm.start("coordinator", command, kernels.environment)
    return f"http://127.0.0.1:{port}"


async def _connect(demo: _Demo, url: str) -> CoordinatorClient:
    demo.swarm.check("coordinator")
    return await CoordinatorClient.connect(url)


def _start_node(demo: _Demo, url: str, name: str, kernels: Kernels, *, cheat: bool) -> Child:
    command = [sys.executable, "-m", "swarm_node", "join", url, "--name", name, "--device", "cpu"]
    command += ["--threads", str(kernels.threads), "--data-dir", str(demo.folder / name)]
    command += ["--cheat", demo.options.cheat] if cheat else []
    return demo.swarm.start(name, command, kernels.environment)


async def _watch(demo: _Demo, client: CoordinatorClient, honest: list[str]) -> dict[str, Any]:
    """Follow the run to its end: finished, every drawn verdict in, the last checkpoint evaluated, all nodes done."""
    status: dict[str, Any] = {}

    def complete() -> bool:
        done = status.get("phase") == "finished" and _pending(status) == 0
        return done and len(status["evaluations"]) == demo.options.rounds + 1

    progress = _Deadline(START_S + ROUND_S)
    while not complete():
        try:
            status = await client.status()
        except UnreachableError:
            demo.swarm.check("coordinator")
        progress.note((status.get("round"), status.get("phase"), status and _pending(status)))
        demo.screen.update(status, {name: _node_status(demo, name) for name in demo.nodes})
        for name in honest:
            if demo.nodes[name].ended_badly():
                raise DemoError(f"{name} has failed:\n{demo.nodes[name].last_lines()}")
        if progress.over():
            raise DemoError(
                f"nothing has moved for {progress.limit_s:.0f} s: round {status.get('round')}, {status.get('phase')}"
            )
        await asyncio.sleep(POLL_S)
    last = status["checkpoint"]["round"]
    end = _Deadline(VERDICTS_S)
    while not all(_holds_checkpoint(demo, name, last) and not demo.nodes[name].running() for name in honest):
        if end.over():
            raise DemoError("not every node has come to the end of the run")
        demo.screen.update(status, {name: _node_status(demo, name) for name in demo.nodes})
        await asyncio.sleep(POLL_S)
    return await client.status()


class _Deadline:
    """Runs out when nothing new was noted for `limit_s`."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._noted: object = None
        self._since = time.monotonic()

    def note(self, what: object) -> None:
        if what != self._noted:
            self._noted, self._since = what, time.monotonic()

    def over(self) -> bool:
        return time.monotonic() - self._since > self.limit_s


def _pending(status: dict[str, Any]) -> int:
    return int(status["audits"]["pending"] + status["part_audits"]["pending"])


def _holds_checkpoint(demo: _Demo, name: str, round_number: int) -> bool:
    return bool(_node_status(demo, name).get("checkpoint", {}).get("round") == round_number)


def _node_status(demo: _Demo, name: str) -> dict[str, Any]:
    """What a node says of itself in its data directory."""
    try:
        value = json.loads((demo.folder / name / "status.json").read_text())
    except (OSError, ValueError):
        return {"state": "starting", "bytes_sent": 0, "checkpoint": {}}
    return value if isinstance(value, dict) else {}


def run_toml(options: Options) -> str:
    """The demo's run: a small byte-level model, every volunteer in every round."""
    return f"""\
name = "demo"
seed = 1
numerics = "{options.numerics}"

[rounds]
count = {options.rounds}
min_nodes = {options.nodes}
max_nodes = {options.nodes + options.cheaters}
assemble_s = 20.0
train_s = 120.0
exchange_s = 30.0
open_s = 10.0
keep_rounds = 16

[audit]
probation = {4 if options.cheaters else 1}
floor = 0.25
"""


def free_port() -> int:
    """A TCP port on loopback that nobody uses right now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
