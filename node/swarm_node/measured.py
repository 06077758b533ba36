"""What the exchange measures of itself, over all rounds since this process started; `status.json` shows it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from swarm_protocol.calls import Traffic
from swarm_protocol.identity import peer_id


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
    reduction  adding up a part of which everything is here, encoding and signing the average
    fetch      from asking for an average until it is checked and decoded
    waiting    from our last delivery of a round until the last average is here
    """

    delivery: Latency = field(default_factory=Latency)
    reduction: Latency = field(default_factory=Latency)
    fetch: Latency = field(default_factory=Latency)
    waiting: Latency = field(default_factory=Latency)
    receipts: int = 0
    delivery_retries: int = 0
    deliveries_to_backups: int = 0
    deliveries_refused: int = 0
    fetch_retries: int = 0
    other_bytes: list[str] = field(default_factory=list)

    def served_other_bytes(self, peer: bytes) -> None:
        """Note a peer that answered with other bytes than those of the hash; the last hundred are kept."""
        self.other_bytes = [*self.other_bytes, peer_id(peer)][-100:]

    def describe(self, traffic: Traffic) -> dict[str, Any]:
        """For JSON: latencies, counts, and bytes by peer and by plane."""
        return {
            **{name: getattr(self, name).describe() for name in ("delivery", "reduction", "fetch", "waiting")},
            "receipts": self.receipts,
            "delivery_retries": self.delivery_retries,
            "deliveries_to_backups": self.deliveries_to_backups,
            "deliveries_refused": self.deliveries_refused,
            "fetch_retries": self.fetch_retries,
            "other_bytes": self.other_bytes,
            "bytes": {
                plane: {
                    "sent": sum(sent for (_, path), (sent, _) in traffic.by_peer.items() if path == plane),
                    "received": sum(received for (_, path), (_, received) in traffic.by_peer.items() if path == plane),
                }
                for plane in ("daemon", "direct")
            },
            "bytes_by_peer": {
                peer: {"sent": sent, "received": received}
                for peer, (sent, received) in sorted(_by_peer(traffic).items())
            },
        }


def _by_peer(traffic: Traffic) -> dict[str, tuple[int, int]]:
    sums: dict[str, tuple[int, int]] = {}
    for (peer, _), (sent, received) in traffic.by_peer.items():
        before = sums.get(peer_id(peer), (0, 0))
        sums[peer_id(peer)] = (before[0] + sent, before[1] + received)
    return sums
