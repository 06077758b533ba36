"""What the exchange measures of itself, over all rounds since this process started; `status.json` shows it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from swarm_protocol.calls import Path, Traffic
from swarm_protocol.identity import peer_id

PLANES: tuple[Path, ...] = ("daemon", "direct")


@dataclass
class Latency:
    """How long something took: how often it happened, seconds in all, the longest."""

    count: int = 0
    total_s: float = 0.0
    longest_s: float = 0.0

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Time what happens inside, unless it raises."""
        started = time.monotonic()
        yield
        self.add(time.monotonic() - started)

    def add(self, seconds: float) -> None:
        self.count += 1
        self.total_s += seconds
        self.longest_s = max(self.longest_s, seconds)

    def describe(self) -> dict[str, Any]:
        mean = self.total_s / self.count if self.count else 0.0
        return {"count": self.count, "mean_s": round(mean, 4), "longest_s": round(self.longest_s, 4)}


@dataclass
class Measured:
    """Counters of one node's exchange.

    delivery   from the first byte of a part until its receipt is here
    inputs     from a part's first input until everything of it is here, or its time is over
    reduction  adding up a part of which everything is here, encoding and signing the average
    fetch      from asking for an average until it is checked and decoded
    waiting    from our last delivery of a round until the last average is here
    """

    delivery: Latency = field(default_factory=Latency)
    inputs: Latency = field(default_factory=Latency)
    reduction: Latency = field(default_factory=Latency)
    fetch: Latency = field(default_factory=Latency)
    waiting: Latency = field(default_factory=Latency)
    uploaded_bytes: int = 0
    uploading_s: float = 0.0
    receipts: int = 0
    delivery_retries: int = 0
    deliveries_to_backups: int = 0
    deliveries_refused: int = 0
    fetch_retries: int = 0
    other_bytes: list[str] = field(default_factory=list)
    equivocations: list[str] = field(default_factory=list)
    _under_way: int = 0
    _since: float = 0.0

    @property
    def upload_bytes_per_s(self) -> int:
        """How fast parts went out while any were on their way, receivers' checks included; 0 before the first round."""
        return int(self.uploaded_bytes / self.uploading_s) if self.uploading_s else 0

    @contextmanager
    def uploading(self, size_bytes: int) -> Iterator[None]:
        """Time one delivery of a part, unless it raises; several may be under way."""
        now = time.monotonic()
        if not self._under_way:
            self._since = now
        self._under_way += 1
        try:
            with self.delivery.measure():
                yield
            self.uploaded_bytes += size_bytes
        finally:
            self._under_way -= 1
            if not self._under_way:
                self.uploading_s += time.monotonic() - self._since

    def served_other_bytes(self, peer: bytes) -> None:
        """Note a peer that answered with other bytes than those of the hash; the last hundred are kept."""
        self.other_bytes = [*self.other_bytes, peer_id(peer)][-100:]

    def describe(self, traffic: Traffic, control: Traffic) -> dict[str, Any]:
        """For JSON: latencies, counts, and bytes by plane and by peer; `control` is what the coordinator's client counts."""
        return {
            **{
                name: getattr(self, name).describe() for name in ("delivery", "inputs", "reduction", "fetch", "waiting")
            },
            "upload_bytes_per_s": self.upload_bytes_per_s,
            "receipts": self.receipts,
            "delivery_retries": self.delivery_retries,
            "deliveries_to_backups": self.deliveries_to_backups,
            "deliveries_refused": self.deliveries_refused,
            "fetch_retries": self.fetch_retries,
            "other_bytes": self.other_bytes,
            "equivocations": self.equivocations,
            "bytes": {
                **{
                    plane: _sums(entry for (_, path), entry in traffic.by_peer.items() if path == plane)
                    for plane in PLANES
                },
                "control": {"sent": control.sent, "received": control.received},
            },
            "bytes_by_peer": {
                peer_id(peer): {
                    plane: _sums([traffic.by_peer[peer, plane]]) for plane in PLANES if (peer, plane) in traffic.by_peer
                }
                for peer in sorted({peer for peer, _ in traffic.by_peer}, key=peer_id)
            },
        }


def _sums(entries: Iterable[list[int]]) -> dict[str, int]:
    listed = list(entries)
    return {"sent": sum(sent for sent, _ in listed), "received": sum(received for _, received in listed)}
