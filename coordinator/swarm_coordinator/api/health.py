"""For whoever watches the process: is it up, is it of use, and its metrics."""

from __future__ import annotations

import asyncio
import shutil

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from swarm_coordinator.api.access import served
from swarm_coordinator.api.limits import TheDesk, address_of
from swarm_coordinator.api.metrics import Metrics
from swarm_coordinator.api.models import Health
from swarm_coordinator.api.problems import LimitedError, documented
from swarm_coordinator.service import Service
from swarm_protocol.errors import RefusedError

MAX_TICK_AGE_S = 5.0
DATABASE_S = 2.0
RETRY_S = 5.0

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="Is the coordinator up?")
async def health() -> Health:
    return Health()


@router.get(
    "/readyz",
    summary="Is the coordinator of use?",
    description="503 with the reason where its database does not answer, its clock stands still, its disk is full, or it "
    "stops.",
    responses=documented(503),
)
async def ready(request: Request, desk: TheDesk) -> Health:
    for service in served(request):
        reason = await _unready(service, desk.limits.min_free_bytes)
        if reason is not None:
            raise LimitedError(reason, status=503, code="not-ready", retry_after_s=RETRY_S)
    return Health()


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    description="To this machine alone, unless the run owner made them public.",
    response_class=Response,
    responses={
        200: {"description": "the metrics", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **documented(403),
    },
)
async def metrics(request: Request, desk: TheDesk) -> Response:
    host = request.client.host if request.client else None
    if not request.app.state.metrics_public and address_of(host) is not None:
        raise RefusedError("metrics are for the coordinator's own machine", status=403, code="not-public")
    found = request.app.state.metrics
    assert isinstance(found, Metrics)
    return Response(await found.scrape(served(request), desk), media_type=CONTENT_TYPE_LATEST)


async def _unready(service: Service, min_free_bytes: int) -> str | None:
    """Why the coordinator is of no use now, or None."""
    if service.stopping:
        return "the coordinator is stopping"
    if service.tick_age_s > MAX_TICK_AGE_S:
        return f"the run's clock has not ticked for {service.tick_age_s:.0f} s"
    try:
        async with asyncio.timeout(DATABASE_S):
            await service.read(lambda archive: archive.session.execute(text("SELECT 1")).scalar_one())
    except (SQLAlchemyError, TimeoutError):
        return "the database does not answer"
    if service.store.folder is None:
        return None
    try:
        free_bytes = (await asyncio.to_thread(shutil.disk_usage, service.store.folder)).free
    except OSError as error:
        return f"the object store cannot be looked at: {error.strerror}"
    if free_bytes < min_free_bytes:
        return f"the disk is full: {free_bytes >> 20} MiB are free, at least {min_free_bytes >> 20} are needed"
    return None
