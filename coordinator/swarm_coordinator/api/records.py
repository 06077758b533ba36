"""The route by which signed records come in. Whatever limit refuses one, nothing was decided about it: send it again."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Request, Response

from swarm_coordinator.api.access import CBOR, TheRun
from swarm_coordinator.api.limits import TheDesk, bounded_body
from swarm_coordinator.api.metrics import Metrics
from swarm_coordinator.api.models import ReceiptModel
from swarm_coordinator.api.openapi import record_examples
from swarm_coordinator.api.problems import LimitedError, documented
from swarm_protocol.records import Envelope, Ready, Record

router = APIRouter(prefix="/v1/runs/{run_id}", tags=["records"])


@router.post(
    "/records",
    summary="Hand in a signed record",
    description="An encoded Envelope of at most 1 MiB. 201 for a new record; 200, with the same receipt, for one that was "
    "accepted before; 409 with the code `equivocation` for another one under the same name. Heartbeats are not kept, and are "
    "always new. A registration carries the run's token, if it has one, as a bearer token.",
    status_code=201,
    responses={
        200: {"model": ReceiptModel, "description": "It had been accepted before"},
        **documented(400, 401, 403, 404, 408, 409, 410, 413, 422, 426),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {CBOR: {"schema": {"type": "string", "format": "binary"}, "examples": record_examples()}},
        }
    },
)
async def submit(
    run: TheRun,
    desk: TheDesk,
    request: Request,
    response: Response,
    authorization: Annotated[str | None, Header()] = None,
) -> ReceiptModel:
    metrics = request.app.state.metrics
    assert isinstance(metrics, Metrics)
    scheme, _, token = (authorization or "").partition(" ")
    kind, result = "none", "refused"
    opened: tuple[bytes, Record] | None = None

    def checked(envelope: Envelope, record: Record) -> None:
        nonlocal kind, opened
        kind = record.kind
        desk.check_identity(envelope.key)
        opened = (envelope.key, record)

    try:
        body = await bounded_body(request, desk.limits)
        receipt = await run.submit(body, token.strip() if scheme.lower() == "bearer" else None, checked)
        result = "accepted" if receipt.new else "repeated"
    except LimitedError:
        result = "limited"
        raise
    finally:
        metrics.records.labels(kind, result).inc()
        if opened is not None and (result != "repeated" or kind == Ready.kind):
            desk.charge_identity(*opened, accepted=result == "accepted")
    response.status_code = 201 if receipt.new else 200
    signed = None if receipt.signed is None else receipt.signed.hex()
    return ReceiptModel(hash=receipt.hash.hex(), kind=receipt.kind, leaf=receipt.leaf, receipt=signed)
