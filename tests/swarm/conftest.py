"""Real swarms for tests: a coordinator and volunteers as processes on loopback, with a run that is quick to train."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest

from swarm_node.demonstration import free_port
from swarm_node.swarm import Child, Swarm
from swarm_protocol import equivocation
from swarm_protocol.records import Envelope, Equivocation

T = TypeVar("T")

RUN = """\
name = "test"
numerics = "{numerics}"
seed = 7
trainable = {trainable}

[model]
hidden_size = {hidden_size}
intermediate_size = {intermediate_size}
num_hidden_layers = 2
max_position_embeddings = 64

[data]
held_out_windows = 16

[training]
batch_sequences = 8
micro_sequences = 8
steps = 6
segment_steps = 2

[training.optimizer]
name = "{optimizer}"
warmup_steps = 2

[exchange]
parts = {parts}

[rounds]
count = {rounds}
min_nodes = {min_nodes}
max_nodes = {max_nodes}
presence_s = {presence_s}
assemble_s = {assemble_s}
train_s = {train_s}
exchange_s = {exchange_s}
open_s = 5.0
keep_rounds = {keep_rounds}
snapshot_every = {snapshot_every}

[audit]
probation = {probation}
floor = {floor}
reductions = {reductions}
evidence_s = {evidence_s}
budget = {budget}
"""

RUN_PARTS = re.compile(r"^parts = (\d+)", re.MULTILINE)

DEFAULTS: dict[str, Any] = {
    "numerics": "native",
    "trainable": '"all"',
    "optimizer": "muon",
    "hidden_size": 64,
    "intermediate_size": 128,
    "rounds": 3,
    "min_nodes": 3,
    "max_nodes": 3,
    "presence_s": 6.0,
    "assemble_s": 5.0,
    "train_s": 30.0,
    "exchange_s": 10.0,
    "keep_rounds": 16,
    "snapshot_every": 10,
    "parts": 4,
    "evidence_s": 20.0,
    "probation": 1,
    "floor": 0.25,
    "reductions": 0.25,
    "budget": 1.0,
}


class Run:
    """One run: its directory, its coordinator, its volunteers."""

    def __init__(self, folder: Path, corpus: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.home = folder / "coordinator"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.swarm = Swarm(folder / "logs")
        self.nodes: dict[str, Child] = {}
        config = folder / "run.toml"
        calibrated, origin = settings.pop("calibrated", False), settings.pop("origin", [])
        config.write_text(RUN.format(**{**DEFAULTS, **settings}))
        tolerances = folder / "tolerances.json"
        if calibrated:
            self.owner("calibrate", str(config), "--quick", "--out", str(tolerances))
        extra = [*origin, *(["--tolerances", str(tolerances)] if calibrated else [])]
        self.owner("init", str(self.home), "--spec", str(config), "--corpus", str(corpus), *extra)

    def owner(self, *arguments: str) -> str:
        """What a command of the run owner prints; it has to succeed."""
        command = [sys.executable, "-m", "swarm_coordinator", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def serve(self, host: str = "127.0.0.1") -> Child:
        command = [sys.executable, "-m", "swarm_coordinator", "serve", str(self.home), "--port", str(self.port)]
        command += ["--host", host]
        child = self.swarm.start("coordinator", command)
        self.until(lambda: self.status() or None, what="the coordinator answers")
        return child

    def join(self, name: str, *extra: str, namespace: str | None = None, host: str = "127.0.0.1") -> Child:
        """Start a volunteer, in a network namespace if one is named; `host` is the coordinator's address there."""
        command = ["ip", "netns", "exec", namespace] if namespace else []
        url = f"http://{host}:{self.port}"
        command += [sys.executable, "-m", "swarm_node", "join", url, "--name", name, "--device", "cpu"]
        command += ["--threads", "1", "--data-dir", str(self.folder / name), *extra]
        self.nodes[name] = self.swarm.start(name, command)
        return self.nodes[name]

    def status(self) -> dict[str, Any]:
        """The coordinator's status, or nothing while it does not answer."""
        try:
            runs = httpx.get(f"{self.url}/v1/runs", timeout=10).json()
            return httpx.get(f"{self.url}/v1/runs/{runs[0]['run_id']}", timeout=10).json()
        except (httpx.HTTPError, ValueError):
            return {}

    def round(self, number: int) -> dict[str, Any]:
        """A sealed round: `slots` by node name, and `parts`, per part the slots in its average, or None."""
        run_id = self.status()["run_id"]
        detail = httpx.get(f"{self.url}/v1/runs/{run_id}/rounds/{number}", timeout=10).json()
        parts = {record["part"]: record["slots"] for record in detail["part_records"] if record["counted"]}
        count = int(RUN_PARTS.search((self.folder / "run.toml").read_text())[1])
        return {
            "slots": {seat["name"]: seat["slot"] for seat in detail["roster"]},
            "parts": [parts.get(part) for part in range(count)],
        }

    def audit_reduction(self, number: int) -> list[dict[str, Any]]:
        """What `swarm-coordinator audit-reduction` says of a round's part records."""
        command = [sys.executable, "-m", "swarm_coordinator", "audit-reduction", self.url, "--round", str(number)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return json.loads(done.stdout)["records"]

    def proof(self, report: str) -> equivocation.Proved:
        """What the stored report of an equivocation proves, to anybody who asks for it."""
        run_id = self.status()["run_id"]
        raw = httpx.get(f"{self.url}/v1/runs/{run_id}/records/{report}", timeout=10).content
        return equivocation.proved_by(Envelope.decode(raw).open_as(Equivocation, run=bytes.fromhex(run_id)))

    def node(self, name: str) -> dict[str, Any]:
        """What a node says of itself."""
        try:
            return json.loads((self.folder / name / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def until(self, condition: Callable[[], T | None], *, what: str, timeout_s: float = 120.0) -> T:
        """Wait until `condition` returns something; fail with the logs if it never does."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            found = condition()
            if found is not None and found is not False:
                return found
            time.sleep(0.05)  # the condition is polled over process borders: there is no event to await
        raise AssertionError(f"never came true: {what}\n{self.logs()}")

    def reaches(self, round_number: int, phase: str | None = None, timeout_s: float = 120.0) -> dict[str, Any]:
        """Wait until the run is in this round (and phase), or beyond."""

        def there() -> dict[str, Any] | None:
            status = self.status()
            if not status:
                return None
            beyond = status["round"] > round_number or status["phase"] == "finished"
            here = status["round"] == round_number and phase in (None, status["phase"])
            return status if beyond or here else None

        return self.until(there, what=f"round {round_number}, {phase}", timeout_s=timeout_s)

    def ends(self, timeout_s: float = 180.0) -> dict[str, Any]:
        """Wait until the run is finished and every audit has its outcome."""

        def ended() -> dict[str, Any] | None:
            status = self.status()
            done = status.get("phase") == "finished" and status["audits"]["pending"] == 0
            done = done and status["part_audits"]["pending"] == 0
            return status if done and len(status["evaluations"]) == status["rounds"] + 1 else None

        return self.until(ended, what="the run ends", timeout_s=timeout_s)

    def roots(self, *names: str) -> set[str]:
        """The checkpoint roots that these nodes hold when they have ended by themselves."""
        for name in names:
            assert self.nodes[name].wait(60) == 0, f"{name} did not end well\n{self.logs()}"
        return {self.node(name)["checkpoint"]["root"] for name in names}

    def logs(self) -> str:
        pieces = [
            f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted((self.folder / "logs").glob("*.log"))
        ]
        return "\n".join([*pieces, json.dumps(self.status())[:3000]])

    def stop(self) -> None:
        self.swarm.stop()


def descendants() -> list[psutil.Process]:
    """Living processes below this one; zombies do not count."""
    return [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some hundred kilobytes of real text: the sources of a few modules of the standard library."""
    folder = tmp_path_factory.mktemp("corpus")
    for path in sorted(Path(os.__file__).parent.glob("*.py"))[:40]:
        shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture
def start_run(tmp_path: Path, corpus: Path) -> Iterator[Callable[..., Run]]:
    """Makes runs; stops everything that they started, and checks that it is gone."""
    before = {process.pid for process in descendants()}
    runs: list[Run] = []

    def start(**settings: Any) -> Run:
        folder = tmp_path / f"run-{len(runs)}"
        folder.mkdir()
        runs.append(Run(folder, corpus, settings))
        return runs[-1]

    yield start
    for run in runs:
        run.stop()
    _, alive = psutil.wait_procs([p for p in descendants() if p.pid not in before], timeout=10)
    for process in alive:
        process.send_signal(signal.SIGKILL)
    assert not alive, f"left behind: {[process.cmdline() for process in alive]}"
