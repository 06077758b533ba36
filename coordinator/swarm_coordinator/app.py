"""The coordinator's web application: runs, each behind `/v1/runs/{run_id}`. Loads neither torch nor hivemind."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.routing import APIRoute

from swarm_coordinator.api import (
    admission,
    checkpoints,
    events,
    evidence,
    health,
    ledger,
    objects,
    openapi,
    pages,
    problems,
    records,
    rounds,
    runs,
)
from swarm_coordinator.api.limits import Desk, Limits, RateLimit
from swarm_coordinator.api.metrics import Metrics
from swarm_coordinator.api.watching import Watch
from swarm_coordinator.service import Service
from swarm_protocol import __version__

_TAGS = [
    {"name": "health", "description": "For whoever watches the process."},
    {"name": "runs", "description": "What is trained here, and how far it is."},
    {"name": "records", "description": "Signed records: canonical CBOR, accepted once, never changed."},
    {"name": "rounds", "description": "What nodes and the checkpoint worker follow, in the order of a round."},
    {"name": "nodes", "description": "Who takes part."},
    {"name": "audits", "description": "What auditors follow."},
    {"name": "credit", "description": "The ledger: verified work, in megaflops, and signed certificates of it."},
    {"name": "objects", "description": "Bytes by their hash."},
    {"name": "log", "description": "The append-only Merkle log of the run's records (RFC 6962)."},
]


def create_app(*services: Service, limits: Limits | None = None, metrics_public: bool = False) -> FastAPI:
    """The application that serves these runs. The caller runs their services' clocks."""
    app = FastAPI(
        title="swarm-node coordinator",
        version=__version__,
        description="Orders the records of a training run, holds its manifests, and serves its bytes as a last source.",
        openapi_tags=_TAGS,
        generate_unique_id_function=_operation,
    )
    desk, metrics = Desk(limits or Limits()), Metrics()
    for service in services:
        service.on_commit = metrics.commits.observe
    app.state.services = services
    app.state.desk = desk
    app.state.metrics, app.state.metrics_public = metrics, metrics_public
    for module in (health, runs, records, pages, rounds, checkpoints, objects, evidence, events, ledger, admission):
        app.include_router(module.router)
    problems.install(app)
    openapi.install(app)
    app.add_middleware(RateLimit, desk=desk)
    app.add_middleware(Watch, metrics=metrics)
    return app


def _operation(route: APIRoute) -> str:
    head = "_head" if route.methods == {"HEAD"} else ""
    return f"{route.endpoint.__module__.rpartition('.')[2]}_{route.name}{head}"
