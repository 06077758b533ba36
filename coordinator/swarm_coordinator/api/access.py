"""What routes share: the run that a path names, hashes in paths, waiting, caching, and the media types of answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Header, Path, Request, Response

from swarm_coordinator.api.limits import waiting
from swarm_coordinator.api.problems import documented
from swarm_coordinator.db.archive import Archive
from swarm_coordinator.service import Service
from swarm_protocol.chunks import content_hash
from swarm_protocol.errors import RefusedError
from swarm_protocol.spec import RunSpec

CBOR = "application/cbor"
OCTETS = "application/octet-stream"
UNCHANGING = "public, max-age=31536000, immutable"

T = TypeVar("T")
Route = TypeVar("Route", bound=Callable[..., Any])

Hash = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$", description="32 bytes in lower-case hex")]
RoundNumber = Annotated[int, Path(ge=0, lt=1 << 31)]
Wait = Annotated[float, Depends(waiting)]
IfNoneMatch = Annotated[str | None, Header(description="ETags of what the client has")]


def the_run(request: Request, run_id: Annotated[str, Path(description="the run's id, in lower-case hex")]) -> Service:
    """The service of the run that the path names.

    Raises:
        RefusedError: another run.
    """
    found = next((service for service in served(request) if service.spec.run_id.hex() == run_id), None)
    if found is None:
        runs = ", ".join(service.spec.run_id.hex() for service in served(request))
        raise RefusedError(f"there is no run {run_id} here, only {runs}", status=404, code="no-such-run")
    return found


def served(request: Request) -> list[Service]:
    """The services of all runs that are served here."""
    return list(request.app.state.services)


TheRun = Annotated[Service, Depends(the_run)]


def binary(
    media_type: str, description: str, *problems: int, may_be_empty: bool = False, unchanging: bool = False
) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers with bytes."""
    schema = {"type": "string", "format": "binary"}
    responses: dict[int | str, dict[str, Any]] = {
        200: {"description": description, "content": {media_type: {"schema": schema}}},
        **documented(404, 422, *problems),
    }
    if may_be_empty:
        responses[204] = {"description": "not there within wait_s; ask again"}
    if unchanging:
        responses[304] = {"description": "the client has it, by its ETag"}
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


def get_and_head(router: APIRouter, path: str, **options: Any) -> Callable[[Route], Route]:
    """A route that answers to GET, and to HEAD without the body."""

    def add(route: Route) -> Route:
        # One route answers, so that a refusal's Allow names both; two describe it, each with a name of its own.
        router.add_api_route(path, route, methods=["GET", "HEAD"], include_in_schema=False, **options)
        router.add_api_route(path, route, methods=["GET"], **options)
        router.add_api_route(path, route, methods=["HEAD"], **options)
        return route

    return add


def unchanging(content: bytes, if_none_match: str | None, digest: bytes, media_type: str = CBOR) -> Response:
    """An answer that is the same for ever, under the ETag of its hash; 304 without it where the client has it."""
    headers = {"etag": f'"{digest.hex()}"', "cache-control": UNCHANGING}
    if has_it(if_none_match, digest):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=media_type)


def has_it(if_none_match: str | None, digest: bytes) -> bool:
    """Whether the client's If-None-Match (RFC 9110, section 13.1.2) names this hash."""
    names = [name.strip().removeprefix("W/") for name in (if_none_match or "").split(",")]
    return "*" in names or f'"{digest.hex()}"' in names


async def polled(
    service: Service, topic: str, query: Callable[[Archive], bytes | None], wait_s: float, media_type: str = CBOR
) -> Response:
    """What a query finds that never changes once it is there, or 204 if it finds nothing within `wait_s`."""
    found = await service.lasting(topic, query, wait_s)
    return Response(status_code=204) if found is None else Response(found, media_type=media_type)


async def polled_once(
    service: Service,
    topic: str,
    query: Callable[[Archive], bytes | None],
    wait_s: float,
    if_none_match: str | None,
) -> Response:
    """As `polled`, with an ETag and headers for caches."""
    found = await service.lasting(topic, query, wait_s)
    if found is None:
        return Response(status_code=204)
    return unchanging(found, if_none_match, _hash(found))


_hash = lru_cache(maxsize=64)(content_hash)
"""Thousands ask for the same answer; its bytes know their own hash code, so that only the first one is hashed."""
