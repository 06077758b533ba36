"""Every error as a problem detail (RFC 9457): `{type, title, status, detail, code}`, as `application/problem+json`."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from swarm_protocol.errors import InvalidDataError, RefusedError, SignatureError

MEDIA_TYPE = "application/problem+json"
CODES = {404: "not-found", 405: "method-not-allowed", 413: "too-long"}
ANYWHERE = (429, 500, 503)
"""What any route may answer."""


class Problem(BaseModel):
    """A problem detail (RFC 9457)."""

    type: str = Field(description="a URI that names the kind of problem", examples=["urn:swarm-node:problem:closed"])
    title: str = Field(description="the HTTP status in words", examples=["Conflict"])
    status: int = Field(examples=[409])
    detail: str = Field(description="what is wrong, and what to do about it")
    code: str = Field(description="the last word of `type`, for programs", examples=["closed"])


class LimitedError(RefusedError):
    """Refused without a look at what was sent: too much, too slow, too often. `close` ends the connection."""

    def __init__(
        self, reason: str, *, status: int, code: str, retry_after_s: float | None = None, close: bool = False
    ) -> None:
        super().__init__(reason, status=status, code=code)
        self.headers = {} if retry_after_s is None else {"retry-after": str(max(1, math.ceil(retry_after_s)))}
        if close:
            self.headers["connection"] = "close"


def answer(error: RefusedError) -> Response:
    """A refusal as a response."""
    headers = error.headers if isinstance(error, LimitedError) else None
    return problem(error.status or 400, error.code, error.reason, headers)


def problem(status: int, code: str, detail: str, headers: dict[str, str] | None = None) -> Response:
    """A problem as a response."""
    body = Problem(
        type=f"urn:swarm-node:problem:{code}", title=HTTPStatus(status).phrase, status=status, detail=detail, code=code
    )
    return Response(body.model_dump_json(), status, headers, MEDIA_TYPE)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route's `responses` say about its problems."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": {MEDIA_TYPE: {"schema": schema}}}
        for status in statuses
    }


def install(app: FastAPI) -> None:
    """Answer every error of the app with a problem. Faults are the business of `watching`."""

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> Response:
        return answer(error)

    @app.exception_handler(InvalidDataError)
    async def invalid(_: Request, error: InvalidDataError) -> Response:
        if isinstance(error, SignatureError):
            return problem(403, "bad-signature", str(error))
        return problem(400, "bad-record", str(error))

    @app.exception_handler(RequestValidationError)
    async def unprocessable(_: Request, error: RequestValidationError) -> Response:
        found = "; ".join(f"{'.'.join(str(step) for step in item['loc'])}: {item['msg']}" for item in error.errors())
        return problem(422, "bad-request", found)

    @app.exception_handler(HTTPException)
    async def known(_: Request, error: HTTPException) -> Response:
        headers = dict(error.headers) if error.headers else None
        return problem(error.status_code, CODES.get(error.status_code, "http"), error.detail, headers)


def internal() -> Response:
    """The answer where the coordinator has a fault."""
    return problem(500, "internal", "the coordinator has a fault; its log says more. Try again later")
