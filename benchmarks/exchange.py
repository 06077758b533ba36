"""What the exchange costs: 4 peers, 100 MB of float32 each, on loopback, against hivemind and gloo in the same run.

    python benchmarks/exchange.py [--json] [--repeats 5] [--peers 4] [--megabytes 100] [--parts N] [--scaling]

One of our rounds is: encode, commit, deliver, check each part against its commitment, receipt, add, encode the average,
sign, fetch, check, decode; everybody ends with the same bytes, which is asserted. hivemind's is timed without matchmaking.
A time is that from the last peer's start to the last peer's end; the measurements take turns, and medians are reported.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import secrets
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import exchange_peers
import exchange_rivals

from swarm_node.demonstration import free_port
from swarm_protocol.identity import peer_id
from swarm_protocol.records import Commitment, Envelope, PartRecord, RoundPlan, Seat

CODECS = ("none", "int8")
START_S = 120.0
ROUND_S = 240.0


class Peers:
    """Processes with a pipe to each."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self._processes: list[Any] = []

    def start(self, target: Callable[..., None], *arguments: Any) -> Connection:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=target, args=(theirs, os.getpid(), *arguments))
        process.start()
        theirs.close()
        self.pipes.append(ours)
        self._processes.append(process)
        return ours

    def tell(self, message: Any) -> None:
        for pipe in self.pipes:
            pipe.send(message)

    def hear(self, timeout_s: float = ROUND_S) -> list[Any]:
        """One message from each."""
        return [_receive(pipe, timeout_s) for pipe in self.pipes]

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(20)
            if process.is_alive():
                process.kill()


def _receive(pipe: Connection, timeout_s: float) -> Any:
    if not pipe.poll(timeout_s):
        raise TimeoutError("a peer does not answer")
    return pipe.recv()


class Ours:
    """Our peers, and the coordinator's part of a round."""

    def __init__(self, folder: Path, peers: int, *, direct: bool = True) -> None:
        self.peers = Peers()
        self._round = 0
        bootstrap: list[str] = []
        self._keys = []
        for number in range(peers):
            pipe = self.peers.start(exchange_peers.peer, number, folder / f"peer-{number}", bootstrap, direct)
            key, addresses = _receive(pipe, START_S)
            self._keys.append(key)
            bootstrap = bootstrap or addresses

    def measure(self, numel: int, codec_name: str, parts: int) -> dict[str, Any]:
        spec = exchange_peers.run_spec(numel, codec_name, parts)
        self._round += 1
        keys = sorted(self._keys, key=peer_id)
        plan = RoundPlan(
            run=spec.run_id,
            round=self._round,
            base=bytes(32),
            roster=tuple(Seat(peer=key, steps=1, weight=1, reducer=True) for key in keys),
            cursor=0,
            commit_by_ms=0,
            exchange_by_ms=0,
            previous_beacon=secrets.token_bytes(32),
            log_size=0,
            log_root=bytes(32),
        )
        self.peers.tell((spec, plan))
        self.peers.hear()
        self.peers.tell("go")
        commitments: dict[int, Commitment] = {record.slot: record for record in self.peers.hear()}
        self.peers.tell((exchange_peers.close(plan, commitments), commitments))
        records: dict[int, bytes] = {}
        while len(records) < exchange_peers.parts.part_count(spec):
            for pipe in wait(self.peers.pipes, ROUND_S):
                raw = pipe.recv()  # type: ignore[union-attr]
                record = Envelope.decode(raw).open_as(PartRecord, run=spec.run_id)
                assert record.slots == tuple(range(len(keys)))
                records[record.part] = raw
                self.peers.tell(raw)
        self.peers.tell(None)
        return _summary(self.peers.hear())


def _summary(answers: list[Any]) -> dict[str, Any]:
    assert len({answer[2] for answer in answers}) == 1, "peers end with different bytes"
    wall = max(answer[1] for answer in answers) - max(answer[0] for answer in answers)
    return {
        "wall_s": wall,
        "peak_bytes": max(answer[3] for answer in answers),
        "cpu_s": sum(answer[4] for answer in answers),
        "stages_s": {name: max(answer[5][name] for answer in answers) for name in answers[0][5]},
    }


class Hivemind:
    def __init__(self, peers: int, numel: int) -> None:
        self.peers = Peers()
        self._count = peers
        bootstrap: list[str] | None = None
        for number in range(peers):
            pipe = self.peers.start(exchange_rivals.hivemind, number, peers, numel)
            pipe.send(bootstrap)
            bootstrap = _receive(pipe, START_S) if bootstrap is None else bootstrap
        for pipe in self.peers.pipes[1:]:
            _receive(pipe, START_S)

    def measure(self) -> dict[str, float] | None:
        """Seconds, or None where matchmaking split the group or the result is not the average."""
        self.peers.tell("go")
        answers = self.peers.hear()
        if any(size != self._count or error > 1e-6 for _, _, size, error, _ in answers):
            return None
        wall_s = max(answer[1] for answer in answers) - max(answer[0] for answer in answers)
        return {"wall_s": wall_s, "cpu_s": sum(answer[4] for answer in answers)}


class Gloo:
    def __init__(self, peers: int, numel: int) -> None:
        self.peers = Peers()
        port = free_port()
        for number in range(peers):
            self.peers.start(exchange_rivals.gloo, number, peers, numel, port)
        self.peers.hear(START_S)

    def measure(self) -> dict[str, float]:
        self.peers.tell("go")
        answers = self.peers.hear()
        return {"wall_s": max(end for _, end in answers) - max(start for start, _ in answers)}


def compare(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything for one number of peers and one size; the measurements take turns."""
    numel = int(options.megabytes * 1e6 / 4)
    folder = Path(tempfile.mkdtemp(prefix="exchange-"))
    ours = Ours(folder, options.peers, direct=not options.daemon)
    hivemind = None if options.ours_only else Hivemind(options.peers, numel)
    gloo = None if options.ours_only else Gloo(options.peers, numel)
    times: dict[str, list[Any]] = {name: [] for name in (*CODECS, "hivemind", "gloo")}
    try:
        for turn in range(options.repeats + 1):  # the first one warms up
            found: dict[str, Any] = {
                name: ours.measure(numel, name, options.parts or _parts(options, name)) for name in options.codecs
            }
            found["hivemind"] = None if hivemind is None else hivemind.measure()
            found["gloo"] = None if gloo is None else gloo.measure()
            for name, value in found.items():
                if turn and value is not None:
                    times[name].append(value)
            say("  ".join(f"{name} {_seconds(value)}" for name, value in found.items()))
    finally:
        for group in (ours, hivemind, gloo):
            if group is not None:
                group.peers.stop()
        shutil.rmtree(folder, ignore_errors=True)
    return _report(options, times)


def _parts(options: argparse.Namespace, codec_name: str) -> int:
    """As many parts as are some 4 MB each when they are encoded, and the same number for each peer."""
    encoded_bytes = options.megabytes * 1e6 / (1 if codec_name == "none" else 4)
    return int(max(1, round(encoded_bytes / options.peers / 4e6))) * options.peers


def _seconds(value: Any) -> str:
    return "failed" if value is None else f"{value['wall_s']:.3f} s"


def _report(options: argparse.Namespace, times: dict[str, list[Any]]) -> dict[str, Any]:
    median = statistics.median
    wall = {name: median(entry["wall_s"] for entry in times[name]) for name in options.codecs}
    report: dict[str, Any] = {
        "peers": options.peers,
        "megabytes": options.megabytes,
        "parts": {name: options.parts or _parts(options, name) for name in options.codecs},
        "wall_s": {name: round(value, 3) for name, value in wall.items()},
        "cpu_s": {name: round(median(entry["cpu_s"] for entry in times[name]), 2) for name in options.codecs},
        "stages_s": {
            name: {
                stage: round(median(entry["stages_s"][stage] for entry in times[name]), 3)
                for stage in times[name][0]["stages_s"]
            }
            for name in options.codecs
        },
        "peak_over_tensor": {
            name: round(max(entry["peak_bytes"] for entry in times[name]) / (options.megabytes * 1e6), 2)
            for name in options.codecs
        },
    }
    for rival in ("hivemind", "gloo"):
        if times[rival]:
            wall_s = median(entry["wall_s"] for entry in times[rival])
            report["wall_s"][rival] = round(wall_s, 3)
            report[f"speedup_vs_{rival}"] = {name: round(wall_s / wall[name], 2) for name in options.codecs}
    if times["hivemind"]:
        report["cpu_s"]["hivemind, with matchmaking"] = round(median(entry["cpu_s"] for entry in times["hivemind"]), 2)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--megabytes", type=float, default=100.0)
    parser.add_argument("--parts", type=int, help="default: some 4 MB each, encoded")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ours-only", action="store_true", help="leave hivemind and gloo out")
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), choices=CODECS)
    parser.add_argument("--daemon", action="store_true", help="everything through the daemon, nothing directly")
    parser.add_argument("--scaling", action="store_true", help="also 2, 4, 8, 16 peers and 1, 10, 100 MB")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    options = parser.parse_args()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    result = compare(options, say)
    result["machine"] = {"processor": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
    if options.scaling:
        result["scaling"] = []
        for peers in (2, 4, 8, 16):
            for megabytes in (1.0, 10.0, 100.0):
                sized = argparse.Namespace(**{**vars(options), "peers": peers, "megabytes": megabytes})
                say(f"{peers} peers, {megabytes:.0f} MB")
                result["scaling"].append(compare(sized, say))
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
