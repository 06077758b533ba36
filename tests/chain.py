"""A chain of checkpoints with real averages, and a coordinator in memory that keeps as much of it as it is told to."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from swarm_protocol import checkpoint as checkpoints
from swarm_protocol import chunks, parts
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.chunks import StateManifest, content_hash
from swarm_protocol.client import SealedRound
from swarm_protocol.codec import get
from swarm_protocol.errors import RefusedError, UnreachableError
from swarm_protocol.layout import checkpoint_manifest
from swarm_protocol.records import PartRecord, RoundManifest, RoundPlan, Seat
from swarm_protocol.spec import RunSpec

REDUCER, OTHER = b"R" * 32, b"O" * 32


@dataclass
class Chain:
    """Round after round; `whole` are the roots whose chunks can be had, `blobs` everything by its hash.

    As a client it answers as a `CoordinatorClient` does; `asked` are the hashes of the blobs that it was asked for.
    """

    spec: RunSpec
    checkpoints: list[Checkpoint]
    rounds: list[tuple[RoundPlan, SealedRound]] = field(default_factory=list)
    blobs: dict[bytes, bytes] = field(default_factory=dict)
    whole: set[bytes] = field(default_factory=set)
    asked: list[bytes] = field(default_factory=list)
    away_after: int | None = None

    @classmethod
    def begin(cls, spec: RunSpec) -> Chain:
        rng = np.random.default_rng(0)
        first = Checkpoint.initial(rng.standard_normal(spec.num_trainable, dtype=np.float32))
        spec = spec.model_copy(update={"checkpoint": first.root.hex()})
        chain = cls(spec, [first])
        chain.keep(0)
        return chain

    def seal(self, missing: Collection[int] = (), seed: int = 0) -> Checkpoint:
        """Another round; of the parts in `missing` there is no average."""
        base, number, spec = self.checkpoints[-1], len(self.rounds), self.spec
        rng = np.random.default_rng([number, seed])
        d = rng.standard_normal(spec.num_trainable, dtype=np.float32)
        averages = [
            None if part in missing else get(spec.exchange.codec).encode(d[where])
            for part, where in enumerate(parts.slices(spec))
        ]
        self.blobs |= {content_hash(one): one for one in averages if one is not None}
        following = checkpoints.advance(spec, base, averages)
        plan = RoundPlan(
            run=spec.run_id, round=number, base=base.root, cursor=0, commit_by_ms=1, exchange_by_ms=2,
            roster=tuple(Seat(peer=peer, steps=1, weight=1, reducer=True) for peer in (REDUCER, OTHER)),
            previous_beacon=bytes(32), log_size=0, log_root=bytes(32),
        )  # fmt: skip
        records = {
            part: PartRecord(
                run=spec.run_id,
                round=number,
                sequence=part,
                part=part,
                commitment_set=bytes(32),
                result=content_hash(one),
                size_bytes=len(one),
                slots=(0, 1),
            )
            for part, one in enumerate(averages)
            if one is not None
        }
        manifest = RoundManifest(
            run=spec.run_id, round=number, plan=plan.hash, commitment_set=bytes(32), base=base.root, root=following.root,
            parts=tuple(records[part].hash if part in records else None for part in range(len(averages))),
        )  # fmt: skip
        named = {record.hash: (record, REDUCER) for record in records.values()}
        signed = checkpoint_manifest(spec, number + 1, following.root, base.root)
        self.rounds.append((plan, SealedRound(manifest, named, signed)))
        self.checkpoints.append(following)
        return following

    def keep(self, number: int) -> None:
        """Have the chunks of a checkpoint."""
        one = self.checkpoints[number]
        self.blobs |= dict(zip(one.manifest.hashes, chunks.chunks(*one.buffers), strict=True))
        self.whole.add(one.root)

    def results(self, number: int) -> list[bytes]:
        """The hashes of the averages that a round is sealed with."""
        return [record.result for record, _ in self.rounds[number][1].part_records.values()]

    # As a client

    async def json(self, path: str, before: int, limit: int) -> dict[str, Any]:
        assert path == "/checkpoints"
        return {"checkpoints": [self._entry(number) for number in reversed(range(len(self.checkpoints)))
                                if number < before][:limit], "next": None}  # fmt: skip

    def _entry(self, number: int) -> dict[str, Any]:
        one, size = self.checkpoints[number], parts.encoded_part_bytes
        named = self.rounds[number - 1][1].manifest.parts if number else ()
        return {
            "round": number,
            "root": one.root.hex(),
            "size_bytes": one.manifest.size_bytes,
            "whole": one.root in self.whole,
            "delta_bytes": sum(size(self.spec, part) for part, name in enumerate(named) if name) if number else None,
        }

    async def plan(self, number: int) -> RoundPlan | None:
        return self.rounds[number][0] if number < len(self.rounds) else None

    async def manifest(self, plan: RoundPlan) -> SealedRound:
        return self.rounds[plan.round][1]

    async def state_manifest(self, root: bytes) -> StateManifest:
        if root not in self.whole:
            raise RefusedError("it is not kept whole any more", status=404, code="not-whole")
        return next(one.manifest for one in self.checkpoints if one.root == root)

    async def chunk(self, digest: bytes, *, max_bytes: int = chunks.CHUNK_BYTES, timeout_s: float = 0.0) -> bytes:
        if self.away_after is not None and len(self.asked) >= self.away_after:
            raise UnreachableError("the coordinator is away")
        self.asked.append(digest)
        if digest not in self.blobs:
            raise RefusedError("there is no such blob here", status=404, code="not-found")
        assert len(self.blobs[digest]) <= max_bytes
        return self.blobs[digest]
