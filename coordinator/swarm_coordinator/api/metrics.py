"""The metrics of one application, in Prometheus' text format; units are in their names.

Counters and histograms are kept as things happen; what describes the run is read when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from sqlalchemy import func, select

from swarm_coordinator.api.limits import Desk
from swarm_coordinator.db.archive import Archive, opened
from swarm_coordinator.db.tables import CreditStatus, NodeRow
from swarm_coordinator.service import Service
from swarm_protocol.records import Evaluation

PREFIX = "swarm_coordinator"
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0)


@dataclass(frozen=True)
class _Reading:
    """What the database says of the run: counts by outcome, nats per token, megaflops by status."""

    audits: dict[str, int]
    loss_nats: float | None
    credit: dict[str, int]


class Metrics:
    """`requests`, `records` and `commits` are for whoever does them; the rest is read by `scrape`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=registry)
        self.requests = Histogram(
            f"{PREFIX}_request_duration_seconds",
            "From the first byte of a request to the last one of its answer, waiting included; events are left out.",
            ["route", "method", "status"],
            buckets=BUCKETS_S,
            registry=registry,
        )
        self.records = Counter(
            f"{PREFIX}_records", "Records that were handed in.", ["kind", "result"], registry=registry
        )
        self.commits = Histogram(
            f"{PREFIX}_commit_duration_seconds", "Transactions of the writer.", buckets=BUCKETS_S, registry=registry
        )
        self._leaves = self._gauge("log_leaves", "Size of the run's log.", "run")
        self._round = self._gauge("round", "The current round.", "run")
        self._present = self._gauge("nodes_present", "Nodes in good standing that were heard of lately.", "run")
        self._polls = self._gauge("long_polls", "Requests that wait for something.")
        self._listeners = self._gauge("event_listeners", "Who follows the events.")
        self._tick_age = self._gauge("clock_age_seconds", "Since the run's clock ticked last.", "run")
        self._audits = self._gauge("audits", "Audits of contributions and averages.", "run", "outcome")
        self._loss = self._gauge("checkpoint_loss_nats", "Held-out loss of the newest evaluated checkpoint.", "run")
        self._credit = self._gauge("credit_megaflops", "Credit of all identities.", "run", "status")

    async def scrape(self, services: Iterable[Service], desk: Desk) -> bytes:
        """All of it as text; runs are told apart by the first half of their id."""
        self._polls.set(desk.waiting.total())
        self._listeners.set(desk.listening.total())
        for service in services:
            run, reading = service.spec.run_id.hex()[:32], await service.read(_read)
            self._leaves.labels(run).set(service.log_head[0])
            self._round.labels(run).set(service.state.round)
            self._present.labels(run).set(len(service.state.nodes))
            self._tick_age.labels(run).set(service.tick_age_s)
            for outcome, count in reading.audits.items():
                self._audits.labels(run, outcome).set(count)
            if reading.loss_nats is not None:
                self._loss.labels(run).set(reading.loss_nats)
            for status, megaflops in reading.credit.items():
                self._credit.labels(run, status).set(megaflops)
        return generate_latest(self.registry)

    def _gauge(self, name: str, says: str, *labels: str) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", says, labels, registry=self.registry)


def _read(archive: Archive) -> _Reading:
    audits = dict.fromkeys(("pending", "accepted", "rejected", "inconclusive", "unavailable", "moot"), 0)
    for averages in (False, True):
        for outcome, count in archive.count_audits(averages=averages).items():
            audits[outcome or "pending"] += count
    newest = archive.newest(Evaluation.kind, 1)
    evaluation = opened(newest[0]) if newest else None
    sums = select(func.sum(NodeRow.pending), func.sum(NodeRow.settled), func.sum(NodeRow.forfeited))
    pending, settled, forfeited = archive.session.execute(sums.filter(NodeRow.run == archive.run)).one()
    return _Reading(
        audits,
        evaluation.loss if isinstance(evaluation, Evaluation) else None,
        {
            CreditStatus.PENDING: int(pending or 0),
            CreditStatus.SETTLED: int(settled or 0),
            CreditStatus.FORFEITED: int(forfeited or 0),
        },
    )
