"""HTTP as every client of the coordinator uses it: each request has a deadline, each answer a bound, each failure a meaning.

`UnreachableError` means that trying again later may help, and `persist` does; `RefusedError` that the other side understood
and said no.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import httpx

from swarm_protocol.errors import ConfigurationError, InvalidDataError, RefusedError, UnreachableError

TIMEOUT_S = 20.0
MAX_RETRY_AFTER_S = 60.0
ASKED_TO_WAIT = (408, 429, 503)
"""Too slow, too often, too busy: nothing was decided about what we sent."""

T = TypeVar("T")


async def request(
    http: httpx.AsyncClient, method: str, url: str, max_bytes: int, *, timeout_s: float = TIMEOUT_S, **options: Any
) -> httpx.Response:
    """One request within a deadline, its answer bounded while it is read."""
    try:
        async with asyncio.timeout(timeout_s), http.stream(method, url, timeout=timeout_s, **options) as response:
            content = bytearray()
            async for piece in response.aiter_raw():
                content += piece
                if len(content) > max_bytes:
                    raise InvalidDataError(f"{url} answers with more than {max_bytes} bytes")
    except (httpx.HTTPError, TimeoutError) as error:
        raise UnreachableError(
            f"the coordinator at {http_root(url)} does not answer ({str(error) or 'timed out'})"
        ) from error
    except httpx.InvalidURL as error:
        raise ConfigurationError(f"{url} is not a URL: {error}") from error
    whole = httpx.Response(response.status_code, headers=_plain(response.headers), content=bytes(content))
    if whole.is_redirect:
        elsewhere = response.headers.get("location", "another address")
        raise UnreachableError(f"{http_root(url)} sends us on to {elsewhere:.200}; give that address instead")
    if whole.status_code in ASKED_TO_WAIT:
        raise UnreachableError(
            f"the coordinator at {http_root(url)} asks us to wait: {_refusal(whole).reason}",
            retry_after_s=_retry_after_s(response.headers),
        )
    if whole.status_code >= 500:
        raise UnreachableError(f"the coordinator at {http_root(url)} has a fault (HTTP {whole.status_code})")
    if whole.status_code >= 400:
        raise _refusal(whole)
    return whole


def _retry_after_s(headers: httpx.Headers) -> float:
    """Seconds that an answer asks us to wait, at most a minute; 0 where it does not say, or gives a date."""
    value = headers.get("retry-after", "")
    return min(float(value), MAX_RETRY_AFTER_S) if value.isascii() and value.isdigit() else 0.0


def _plain(headers: httpx.Headers) -> dict[str, str]:
    return {key: value for key, value in headers.items() if key.lower() in ("content-type", "etag")}


def json_of(response: httpx.Response) -> Any:
    """The JSON in an answer; `InvalidDataError` if there is none."""
    try:
        return response.json()
    except ValueError as error:
        raise InvalidDataError("the answer is not JSON; is the URL that of a coordinator?") from error


def _refusal(response: httpx.Response) -> RefusedError:
    """The problem detail (RFC 9457) of a refusal."""
    try:
        problem = response.json()
        reason, code = str(problem["detail"]), str(problem.get("code", "refused"))
    except (ValueError, KeyError, TypeError):
        reason, code = f"HTTP {response.status_code}", "refused"
    return RefusedError(reason[:1000], status=response.status_code, code=code)


def http_root(url: str) -> str:
    """Scheme, host and port of a URL, for messages."""
    return url.partition("/v1/")[0]


async def persist(
    attempt: Callable[[], Awaitable[T]],
    *,
    deadline_s: float,
    waiting: Callable[[str], None] | None = None,
    first_pause_s: float = 0.25,
    longest_pause_s: float = 5.0,
) -> T:
    """Repeat `attempt` with growing pauses while it raises `UnreachableError`, for at most `deadline_s`.

    Pauses are at least as long as the other side asks for.
    """
    loop = asyncio.get_running_loop()
    end, pause_s = loop.time() + deadline_s, first_pause_s
    while True:
        try:
            return await attempt()
        except UnreachableError as error:
            wait_s = max(pause_s, error.retry_after_s)
            if loop.time() + wait_s > end:
                raise
            if waiting is not None:
                waiting(str(error))
        await asyncio.sleep(wait_s)
        pause_s = min(pause_s * 1.6, longest_pause_s)
