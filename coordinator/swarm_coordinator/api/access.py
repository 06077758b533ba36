"""What routes share: the run that a path names, hashes in paths, waiting, and the media types of answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Path, Query, Request, Response

from swarm_coordinator.api.problems import documented
from swarm_coordinator.db.archive import Archive
from swarm_coordinator.service import Service
from swarm_protocol.errors import RefusedError
from swarm_protocol.spec import RunSpec

CBOR = "application/cbor"
OCTETS = "application/octet-stream"
MAX_WAIT_S = 30.0

T = TypeVar("T")

Hash = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$", description="32 bytes in lower-case hex")]
RoundNumber = Annotated[int, Path(ge=0, lt=1 << 31)]
Wait = Annotated[float, Query(ge=0, le=MAX_WAIT_S, description="how long to wait, in seconds, if it is not there yet")]


def the_run(request: Request, run_id: Annotated[str, Path(description="the run's id, in lower-case hex")]) -> Service:
    """The service of the run that the path names.

    Raises:
        RefusedError: another run.
    """
    service = request.app.state.service
    assert isinstance(service, Service)
    if run_id != service.spec.run_id.hex():
        raise RefusedError(
            f"there is no run {run_id} here, only {service.spec.run_id.hex()}", status=404, code="no-such-run"
        )
    return service


TheRun = Annotated[Service, Depends(the_run)]


def binary(
    media_type: str, description: str, *problems: int, may_be_empty: bool = False
) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers with bytes."""
    schema = {"type": "string", "format": "binary"}
    responses: dict[int | str, dict[str, Any]] = {
        200: {"description": description, "content": {media_type: {"schema": schema}}},
        **documented(404, 422, *problems),
    }
    if may_be_empty:
        responses[204] = {"description": "not there within wait_s; ask again"}
    return responses


def check_round(spec: RunSpec, number: int) -> None:
    """Raises `RefusedError` for a round that the run never has."""
    if number >= spec.rounds.count:
        raise RefusedError(
            f"the run has rounds 0 to {spec.rounds.count - 1}; there is no round {number}",
            status=404,
            code="no-such-round",
        )


def missing(what: str) -> RefusedError:
    """The refusal of something that is not here."""
    return RefusedError(f"there is no {what} here", status=404, code="not-found")


async def polled(
    service: Service, topic: str, query: Callable[[Archive], bytes | None], wait_s: float, media_type: str = CBOR
) -> Response:
    """What a query finds that never changes once it is there, or 204 if it finds nothing within `wait_s`."""
    found = await service.lasting(topic, query, wait_s)
    return Response(status_code=204) if found is None else Response(found, media_type=media_type)
