"""The coordinator's web application: one run, behind `/v1/runs/{run_id}`. Loads neither torch nor hivemind."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.routing import APIRoute

from swarm_coordinator.api import admission, ledger, objects, problems, rounds, runs
from swarm_coordinator.service import Service
from swarm_protocol import __version__

_TAGS = [
    {"name": "health", "description": "For whoever watches the process."},
    {"name": "runs", "description": "What is trained here, and how far it is."},
    {"name": "records", "description": "Signed records: canonical CBOR, accepted once, never changed."},
    {"name": "rounds", "description": "What nodes and the checkpoint worker follow, in the order of a round."},
    {"name": "audits", "description": "What auditors follow."},
    {"name": "credit", "description": "The ledger: verified work, in megaflops, and signed certificates of it."},
    {"name": "objects", "description": "Bytes by their hash."},
    {"name": "log", "description": "The append-only Merkle log of the run's records (RFC 6962)."},
]


def create_app(service: Service) -> FastAPI:
    """The application that serves one run. The caller runs the service's clock."""
    app = FastAPI(
        title="swarm-node coordinator",
        version=__version__,
        description="Orders the records of a training run, holds its manifests, and serves its bytes as a last source.",
        openapi_tags=_TAGS,
        generate_unique_id_function=_operation,
    )
    app.state.service = service
    for module in (runs, rounds, objects, ledger, admission):
        app.include_router(module.router)
    problems.install(app)
    return app


def _operation(route: APIRoute) -> str:
    return f"{route.endpoint.__module__.rpartition('.')[2]}_{route.name}"
