"""What a node serves to those who audit reducers: which inputs it averaged, with their proofs, and the receipts it holds.

inputs   {round, part}   per slot the hash of the encoded part and its Merkle proof: our own part, and as a reducer those
                         that we took; the bytes come by `get`
receipts {round, part}   as a sender: the receipts that reducers signed for our part

They lie on disk in the round's folder, one JSON line each, for as long as the round is kept.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from swarm_node import contribution as contributions
from swarm_node.folder import RunFolder
from swarm_protocol import encoding
from swarm_protocol.calls import Answer, Call, Handler
from swarm_protocol.errors import RefusedError
from swarm_protocol.spec import RunSpec

INPUTS, RECEIPTS = "inputs.jsonl", "receipts.jsonl"


def note_input(work: Path, part: int, slot: int, digest: bytes, proof: Sequence[bytes]) -> None:
    """Keep the proof of an input that we took. Blocking."""
    line = json.dumps([part, slot, digest.hex(), [step.hex() for step in proof]])
    with (work / INPUTS).open("a") as file:
        file.write(line + "\n")


def note_receipt(work: Path, part: int, envelope: bytes) -> None:
    """Keep a receipt that a reducer signed for our part. Blocking."""
    with (work / RECEIPTS).open("a") as file:
        file.write(json.dumps([part, envelope.hex()]) + "\n")


def receipts(work: Path, part: int | None = None) -> list[bytes]:
    """The encoded receipts for one part, or for all."""
    return [bytes.fromhex(raw) for number, raw in _lines(work / RECEIPTS) if part in (None, number)]


def handlers(spec: RunSpec, folder: RunFolder) -> dict[str, Handler]:
    """The operations, over everything that lies in a run's folder."""

    async def serve_inputs(call: Call) -> Answer:
        work, part = _where(folder, call)

        def read() -> bytes:
            found = {
                slot: (bytes.fromhex(digest), tuple(map(bytes.fromhex, proof)))
                for number, slot, digest, proof in _lines(work / INPUTS)
                if number == part
            }
            mine = contributions.load(spec, work)
            if mine is not None and 0 <= part < len(mine.part_hashes):
                found[mine.slot] = mine.part_hashes[part], mine.proof(part)
            return encoding.encode([[slot, digest, list(proof)] for slot, (digest, proof) in sorted(found.items())])

        return Answer(body=await asyncio.to_thread(read))

    async def serve_receipts(call: Call) -> Answer:
        work, part = _where(folder, call)
        return Answer(body=encoding.encode(list(await asyncio.to_thread(receipts, work, part))))

    return {"inputs": serve_inputs, "receipts": serve_receipts}


def _where(folder: RunFolder, call: Call) -> tuple[Path, int]:
    number = int(call.header["round"])
    if number not in folder.rounds():
        raise RefusedError("nothing of that round is kept here")
    return folder.work(number), int(call.header["part"])


def _lines(path: Path) -> Iterator[list[Any]]:
    """What was written whole; the last line may not have been."""
    if not path.exists():
        return
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)
