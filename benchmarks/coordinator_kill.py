"""kill -9 of the coordinator at random moments of a live run, and what has to hold afterwards.

    python benchmarks/coordinator_kill.py [--kills N] [--seed S] [--nodes N] [--json] [--database URL]

Synthetic parties (`coordinator_parties`) take part and try again until they are answered. One kill in four comes while the
coordinator starts. At the end the log is read from the API and compared with everything that anybody was ever told:
`lost` acknowledged records that are not in the log at their leaf with the same bytes, `remade` names under which the
coordinator signed two things, `broken_heads` heads that are not those of the final log, `ledger_faults`, and `ended`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import secrets
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvloop
from coordinator_parties import Node, Party, Shape, Swarm, key, make_run, play
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from swarm_coordinator.db.engine import open_database
from swarm_coordinator.db.tables import CreditRow, LedgerRow, NodeRow, RecordRow, RoundRow
from swarm_coordinator.run_directory import RunDirectory
from swarm_protocol.log import Log, leaf_hash
from swarm_protocol.records import Envelope, LogHead, Receipt, decode_list, parse

ACCOUNTS = ("pending", "settled", "forfeited")
START_S = 60.0
RUN_S = 120.0
PER_KILL_S = 20.0


class Witness:
    """Everything that the coordinator ever told anybody."""

    def __init__(self, coordinator: bytes) -> None:
        self._coordinator = coordinator
        self.acknowledged: dict[tuple[str, int, int, bytes], tuple[int | None, bytes]] = {}
        self.signed: dict[tuple[str, int, int], bytes] = {}
        self.heads: dict[int, str] = {}
        self.remade: set[tuple[str, int, int]] = set()
        self.contradictions: list[str] = []

    def take_receipt(self, envelope: Envelope, answer: dict[str, Any]) -> None:
        record = parse(envelope.body)
        name = (record.kind, record.round, record.sequence, envelope.key)
        found = (answer["leaf"], envelope.encode())
        if self.acknowledged.setdefault(name, found) != found or answer["hash"] != record.hash.hex():
            self.contradictions.append(f"{name[:3]} was acknowledged as two things")
        self.take_signed(answer.get("receipt"))

    def take_signed(self, envelope: str | None) -> None:
        """A receipt or a head, where the coordinator signs these: an encoded Envelope in hex."""
        if envelope is not None:
            self.take_records([Envelope.decode(bytes.fromhex(envelope))])

    def take_records(self, envelopes: list[Envelope]) -> None:
        for envelope in envelopes:
            if envelope.key == self._coordinator:
                record = envelope.open()
                name = (record.kind, record.round, record.sequence)
                if self.signed.setdefault(name, envelope.encode()) != envelope.encode():
                    self.remade.add(name)

    def take_head(self, size: int, root: str) -> None:
        if self.heads.setdefault(size, root) != root:
            self.contradictions.append(f"two roots of size {size}")


class Victim:
    """The coordinator's process, on one port for ever."""

    def __init__(self, folder: Path, port: int) -> None:
        self._written = folder / "serve.log"
        self._log = self._written.open("ab")
        self._command = [sys.executable, "-m", "swarm_coordinator", "serve", str(folder), "--no-workers"]
        self._command += ["--port", str(port)]
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(*self._command, stdout=pipe, stderr=self._log)

    async def serves(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        async with asyncio.timeout(START_S):
            line = await self._process.stdout.readline()
        if b"serving run" not in line:
            raise SystemExit(f"the coordinator did not start:\n{self.last_words()}")

    def last_words(self) -> str:
        return self._written.read_text()[-2000:]

    async def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        await self._process.wait()

    async def stop(self) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.terminate()
            try:
                async with asyncio.timeout(10):
                    await self._process.wait()
            except TimeoutError:
                await self.kill()
        self._log.close()


async def trial(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    chance = random.Random(options.seed)
    shape = Shape(
        nodes=options.nodes,
        slots=options.nodes,
        rounds=3 + options.kills // 3,
        parts=4,
        presence_s=3.0,
        assemble_s=1.0,
        train_s=1.0,
        exchange_s=1.0,
        open_s=1.0,
        audited=1.0,
    )
    spec = make_run(folder, shape, options.database)
    port = free_port()
    swarm = Swarm(spec, shape, "127.0.0.1", port, persistent=True)
    witness = Witness(bytes.fromhex(spec.coordinator))
    swarm.acknowledged, swarm.received = witness.take_receipt, witness.take_records
    victim = Victim(folder, port)
    await victim.start()
    await victim.serves()
    killed: list[str] = []

    async def kill_at_random() -> None:
        for _ in range(options.kills):
            alive_s = chance.uniform(0.05, 2.0)
            await asyncio.sleep(alive_s)
            await victim.kill()
            killed.append(f"round {sum(name.startswith('beacon') for name in swarm.documents)} after {alive_s:.2f} s")
            await victim.start()
            if chance.random() < 0.25:
                await asyncio.sleep(chance.uniform(0.0, 1.5))
                await victim.kill()
                await victim.start()
            await victim.serves()

    watcher = Party(swarm, key("watcher"))

    async def watch_log() -> None:
        while True:
            await look_at_log(watcher, witness)
            await asyncio.sleep(0.05)

    began_s = time.monotonic()
    killing = asyncio.create_task(kill_at_random())
    try:
        ended = True
        try:
            nodes = [Node(swarm, number) for number in range(shape.nodes)]
            await play(swarm, nodes, watch_log(), timeout_s=RUN_S + PER_KILL_S * options.kills)
            async with asyncio.timeout(PER_KILL_S * (1 + options.kills)):
                await killing
                while (await watcher.ask("", "status"))["phase"] != "finished":  # noqa: ASYNC110  # another process's
                    await asyncio.sleep(0.1)
        except TimeoutError:
            ended = False
        entries = [entry async for entry in whole_log(watcher)]
        await look_at_log(watcher, witness)
    finally:
        killing.cancel()
        await asyncio.gather(killing, return_exceptions=True)
        await victim.stop()
    return {
        "kills": len(killed),
        "moments": killed,
        "ended": ended,
        "rounds": shape.rounds,
        "acknowledged": len(witness.acknowledged),
        **compared(entries, witness),
        **ledger(RunDirectory(folder).database_url(), spec.run_id),
        "server_errors": [kind for kind in swarm.meter.errors if " 5" in kind],
        "refusals": dict(swarm.meter.errors),
        "wall_s": round(time.monotonic() - began_s, 1),
    }


async def look_at_log(watcher: Party, witness: Witness) -> None:
    head = await watcher.ask("/log/head", "log head")
    if head is not None:
        witness.take_head(head["size"], head["root"])
        witness.take_signed(head.get("signed"))
        answer = await watcher.call("GET", f"/log/entries?start={max(0, head['size'] - 32)}&count=32")
        if answer is not None and answer.status == 200:
            witness.take_records(decode_list(answer.body, max_bytes=1 << 26))


async def whole_log(watcher: Party) -> Any:
    start = 0
    while True:
        answer = await watcher.call("GET", f"/log/entries?start={start}")
        assert answer is not None
        assert answer.status == 200, answer
        envelopes = decode_list(answer.body, max_bytes=1 << 26)
        if not envelopes:
            return
        for envelope in envelopes:
            yield envelope
        start += len(envelopes)


def compared(entries: list[Envelope], witness: Witness) -> dict[str, Any]:
    """What of all that was told does not hold in the final log."""
    witness.take_records(entries)
    at_leaf = {leaf: envelope.encode() for leaf, envelope in enumerate(entries)}
    log = Log(leaf_hash(entry) for entry in at_leaf.values())
    logged = {name: found for name, found in witness.acknowledged.items() if found[0] is not None}
    ours = Counter((parse(one.body).kind, parse(one.body).round, parse(one.body).sequence, one.key) for one in entries)
    in_log = set(at_leaf.values())
    for data in witness.signed.values():
        record = Envelope.decode(data).open()
        if isinstance(record, LogHead):
            witness.take_head(record.sequence, record.root.hex())
    return {
        "leaves": log.size,
        "lost": [str(name[:3]) for name, (leaf, data) in logged.items() if leaf is None or at_leaf.get(leaf) != data],
        "twice": [str(name[:3]) for name, count in ours.items() if count > 1],
        "signed": len(witness.signed),
        "remade": [str(name) for name in witness.remade],
        "vanished": [str(name) for name, data in witness.signed.items() if not _kept(data, log, in_log)],
        "heads": len(witness.heads),
        "broken_heads": [
            size for size, root in witness.heads.items() if size > log.size or log.root(size).hex() != root
        ],
        "contradictions": witness.contradictions,
    }


def _kept(data: bytes, log: Log, entries: set[bytes]) -> bool:
    """Whether what the coordinator signed holds: a leaf of the log, or a promise about one that was kept."""
    record = Envelope.decode(data).open()
    if isinstance(record, Receipt):
        return record.sequence < log.size and log.leaf(record.sequence) == record.leaf_hash
    return isinstance(record, LogHead) or data in entries


def ledger(database: str, run: bytes) -> dict[str, Any]:
    """What does not add up in the tables: the ledger's entries, the sums kept with the nodes, and the contributions."""
    engine = open_database(database)
    try:
        with Session(engine) as session:
            entries = session.scalar(select(func.count()).select_from(LedgerRow).filter_by(run=run))
            return {"ledger_entries": entries, "ledger_faults": list(_faults(session, run))}
    finally:
        engine.dispose()


def _faults(session: Session, run: bytes) -> Iterator[str]:
    accounts: Counter[tuple[bytes, str]] = Counter()
    for row in session.scalars(select(LedgerRow).filter_by(run=run).order_by(LedgerRow.seq)):
        accounts[_account(row.peer, row.debit)] -= row.megaflops
        accounts[_account(row.peer, row.credit)] += row.megaflops
        cause = session.scalar(select(RecordRow.hash).filter_by(run=run, leaf=row.leaf))
        if cause != row.cause:
            yield f"entry {row.seq} follows from something else than leaf {row.leaf}"
        if row.debit != "run" and accounts[_account(row.peer, row.debit)] < 0:
            yield f"entry {row.seq} overdraws {row.debit}"
    if sum(accounts.values()):
        yield f"the accounts sum to {sum(accounts.values())}"
    for node in session.scalars(select(NodeRow).filter_by(run=run)):
        for name in ACCOUNTS:
            kept, found = getattr(node, name), accounts[_account(node.key, name)]
            if kept != found:
                yield f"{node.name} has {kept} {name}, its entries say {found}"
    credited = session.scalar(select(func.count()).select_from(CreditRow).filter_by(run=run)) or 0
    counted = select(func.sum(RoundRow.committed)).where(RoundRow.run == run, RoundRow.manifest.is_not(None))
    committed = int(session.scalar(counted) or 0)
    if credited != committed:
        yield f"{committed} contributions counted, and {credited} were credited"


def _account(peer: bytes, name: str) -> tuple[bytes, str]:
    return (b"", "run") if name == "run" else (peer, name)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--database", help="the URL of the coordinator's database (default: SQLite)")
    options = parser.parse_args()
    if options.seed is None:
        options.seed = secrets.randbelow(1 << 32)
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="coordinator-kill-") as folder:
        result = {"seed": options.seed, **uvloop.run(trial(Path(folder) / "run", options))}
    for name, value in result.items():
        print(f"  {name:15} {value}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
