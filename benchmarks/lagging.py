"""What it costs a node to catch up: `python benchmarks/lagging.py [--json]`.

A chain of rounds of a model of some 13 M parameters, with really encoded averages and signed records, once per codec. A node
that missed 1, 5 or 20 rounds takes each round's plan, manifest, part records and averages, and applies them until its root is
that of the last manifest; the other way is the checkpoint whole, with its list of chunks. `chosen` is what a node takes.
Bytes are those of bodies; `apply_s` is the time to check and apply the deltas, without the network.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from swarm_protocol import checkpoint as checkpoints
from swarm_protocol import codec, deltas, parts
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.chunks import content_hash
from swarm_protocol.deltas import Link
from swarm_protocol.identity import Identity
from swarm_protocol.layout import checkpoint_manifest
from swarm_protocol.records import Envelope, PartRecord, RoundManifest, RoundPlan, Seat, decode_list, encode_list
from swarm_protocol.spec import (
    AuditSpec,
    DataSpec,
    ExchangeSpec,
    ModelSpec,
    OuterSpec,
    RoundsSpec,
    RunSpec,
    TrainingSpec,
)

ZERO = "0" * 64
MODEL = ModelSpec(
    vocab_size=4096,
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=7,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=1024,
)


@dataclass(frozen=True)
class Round:
    """A sealed round as a node receives it: the plan's bytes, the answer with the manifest, the encoded averages."""

    plan: bytes
    sealed: bytes
    averages: list[bytes]

    @property
    def size_bytes(self) -> int:
        return len(self.plan) + len(self.sealed) + sum(map(len, self.averages))


def run_spec(name: codec.Name, owner: Identity, first: Checkpoint) -> RunSpec:
    return RunSpec(
        name="lagging", seed=1, numerics="exact", coordinator=owner.public_key.hex(), checkpoint=first.root.hex(),
        beacon=ZERO, model=MODEL, data=DataSpec(root=ZERO, tokenizer="bytes", train_tokens=1, held_out_windows=1),
        training=TrainingSpec(), outer=OuterSpec(), rounds=RoundsSpec(), audit=AuditSpec(),
        exchange=ExchangeSpec(codec=name, parts=parts.suggested_parts(MODEL.num_parameters, name)),
    )  # fmt: skip


def seal(spec: RunSpec, owner: Identity, nodes: list[Identity], base: Checkpoint, d: Any) -> tuple[Round, Checkpoint]:
    """A round whose averages are `d`, encoded."""
    encode, number = codec.get(spec.exchange.codec).encode, base.round
    averages = [encode(d[where]) for where in parts.slices(spec)]
    following = checkpoints.advance(spec, base, averages)
    seats = tuple(Seat(peer=node.public_key, steps=20, weight=1 << 14, reducer=True) for node in nodes)
    plan = RoundPlan(
        run=spec.run_id, round=number, base=base.root, roster=seats, cursor=number, commit_by_ms=1, exchange_by_ms=2,
        previous_beacon=bytes(32), log_size=0, log_root=bytes(32),
    )  # fmt: skip
    records = [
        PartRecord(
            run=spec.run_id, round=number, sequence=part, part=part, commitment_set=bytes(32),
            result=content_hash(one), size_bytes=len(one), slots=tuple(range(len(nodes))),
        )
        for part, one in enumerate(averages)
    ]  # fmt: skip
    manifest = RoundManifest(
        run=spec.run_id, round=number, plan=plan.hash, commitment_set=bytes(32), base=base.root, root=following.root,
        parts=tuple(record.hash for record in records),
    )  # fmt: skip
    signed = [
        Envelope.sign(owner, one)
        for one in (manifest, checkpoint_manifest(spec, number + 1, following.root, base.root))
    ]
    signed += [Envelope.sign(nodes[record.part % len(nodes)], record) for record in records]
    return Round(Envelope.sign(owner, plan).encode(), encode_list(signed), averages), following


def catch_up(spec: RunSpec, held: Checkpoint, rounds: list[Round]) -> Checkpoint:
    """What a node does with these rounds; each ends at its manifest's root, or this raises."""
    for one in rounds:
        signed = decode_list(one.sealed, max_bytes=len(one.sealed))
        manifest = signed[0].open_as(RoundManifest, run=spec.run_id, round=held.round)
        pseudo_gradient = np.zeros(spec.num_trainable, np.float32)
        for part, average in enumerate(one.averages):
            deltas.decode(spec, part, average, pseudo_gradient)
        held = deltas.applied(spec, held, manifest, pseudo_gradient)
    return held


def measure(name: codec.Name, first: Checkpoint, missed: list[int], slots: int) -> dict[str, Any]:
    """One codec."""
    owner, *nodes = (Identity.from_seed(bytes([number]) * 32) for number in range(1, slots + 2))
    spec = run_spec(name, owner, first)
    d = np.random.default_rng(1).standard_normal(spec.num_trainable, np.float32) * np.float32(1e-3)
    rounds, last = [], first
    for number in range(max(missed)):
        one, last = seal(spec, owner, nodes, last, d / np.float32(number + 1))
        rounds.append(one)
    whole = last.manifest.size_bytes + len(last.manifest.encode())
    rows = []
    for count in missed:
        held = catch_up(spec, first, rounds[: max(missed) - count]) if count < max(missed) else first
        started = time.perf_counter()
        found = catch_up(spec, held, rounds[-count:])
        apply_s = time.perf_counter() - started
        assert found.root == last.root
        start, size = max(missed) - count, last.manifest.size_bytes
        chain = [Link(start, held.root, size, False, None)]
        chain += [
            Link(number + 1, bytes(32), size, number + 1 == len(rounds), sum(map(len, rounds[number].averages)))
            for number in range(start, len(rounds))
        ]
        way = deltas.ways(chain, {start: held.root}, deltas.round_bytes(spec))[0]
        rows.append(
            {
                "missed": count,
                "delta_bytes": sum(one.size_bytes for one in rounds[-count:]),
                "apply_s": round(apply_s, 2),
                "chosen": "deltas" if way.held else "whole",
            }
        )
    return {"whole_bytes": whole, "parts": parts.part_count(spec), "missed": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    parser.add_argument("--missed", default="1,5,20", help="numbers of missed rounds (1,5,20)")
    parser.add_argument("--slots", type=int, default=8, help="nodes in a round (8)")
    options = parser.parse_args()
    missed = sorted(int(one) for one in options.missed.split(","))
    first = Checkpoint.initial(np.random.default_rng(0).standard_normal(MODEL.num_parameters, np.float32))
    result: dict[str, Any] = {"parameters": MODEL.num_parameters, "slots": options.slots, "codecs": {}}
    for name in get_args(codec.Name):
        found = result["codecs"][name] = measure(name, first, missed, options.slots)
        print(f"{name:>5}  whole {found['whole_bytes'] / 1e6:8.2f} MB", file=sys.stderr)
        for row in found["missed"]:
            print(
                f"       {row['missed']:>3} missed: {row['delta_bytes'] / 1e6:8.2f} MB of deltas, applied in "
                f"{row['apply_s']:.2f} s; a node takes {row['chosen']}",
                file=sys.stderr,
            )
    if options.json:
        result["machine"] = {
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
