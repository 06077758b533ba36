"""What is seen of every request: its id, its time, and the fault that it ran into, if it did.

The id is the client's `x-request-id`, or a new one; it is in every line that is logged on the way, and in the answer. An
answer that says nothing about caching is not to be stored, and one to HEAD has no body.
"""

from __future__ import annotations

import itertools
import logging
import re
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from swarm_coordinator.api.metrics import Metrics
from swarm_coordinator.api.problems import internal

log = logging.getLogger(__name__)

_PROCESS = secrets.token_hex(6).encode()
_COUNT = itertools.count()
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
# Others are counted as one, so that nobody can make new ones up; a status is `none` where the client left before.
METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE")


class Watch:
    """ASGI middleware; the outermost, so that it sees all there is."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s, status, stream = time.perf_counter(), 0, False
        request_id = _request_id(scope)

        async def watched(message: Message) -> None:
            nonlocal status, stream
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", []))
                names = dict(headers)
                status, stream = message["status"], names.get(b"content-type", b"").startswith(b"text/event-stream")
                headers.append((b"x-request-id", request_id))
                if b"cache-control" not in names:
                    headers.append((b"cache-control", b"no-store"))
                message = {**message, "headers": headers}
            elif message["type"] == "http.response.body" and scope["method"] == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        with bound_contextvars(request_id=request_id.decode()):
            try:
                await self._app(scope, receive, watched)
            except Exception:
                log.exception("%s %s failed", scope["method"], scope["path"])
                if status:
                    raise
                await internal()(scope, receive, watched)
            finally:
                duration_s = time.perf_counter() - started_s
                method = scope["method"] if scope["method"] in METHODS else "other"
                if not stream:
                    self._metrics.requests.labels(_template(scope), method, str(status or "none")).observe(duration_s)
                log.debug("%s %s %d %.1f ms", scope["method"], scope["path"], status, 1000 * duration_s)


def _request_id(scope: Scope) -> bytes:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given if REQUEST_ID.fullmatch(given) else b"%s-%x" % (_PROCESS, next(_COUNT))


def _template(scope: Scope) -> str:
    """The path of the route, not of the request: there are only so many of those."""
    return str(getattr(scope.get("route"), "path", "none"))
