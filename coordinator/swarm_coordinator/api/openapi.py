"""The OpenAPI document: what FastAPI makes of the routes, with the problems that any of them may answer, and examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI

from swarm_coordinator.api.models import LogEvent
from swarm_coordinator.api.problems import ANYWHERE, Problem, documented
from swarm_protocol.identity import Identity
from swarm_protocol.records import Envelope, Ready

EVENTS = "/v1/runs/{run_id}/events"
HEX = "6c1f" * 16


def install(app: FastAPI) -> None:
    """Make `app.openapi()` the whole document. It is made once."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _completed(describe())
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def example_of(schema: Mapping[str, Any], components: Mapping[str, Any]) -> Any:
    """A value that fits a schema of ours: its own example where it has one, else one made of its parts."""
    if schema.get("examples"):
        return schema["examples"][0]
    if "$ref" in schema:
        return example_of(components[schema["$ref"].rpartition("/")[2]], components)
    if "default" in schema:
        return schema["default"]
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    if "anyOf" in schema:
        return example_of(schema["anyOf"][0], components)
    match schema.get("type"):
        case "object":
            return {name: example_of(part, components) for name, part in schema.get("properties", {}).items()}
        case "array":
            return [example_of(schema["items"], components)]
        case "integer":
            return schema.get("minimum", 3)
        case "number":
            return 0.5
        case "boolean":
            return True
        case "string":
            return HEX if "pattern" in schema else "text"
    return None


def record_examples() -> dict[str, Any]:
    """What the body of a record looks like, in hex."""
    record = Ready(
        run=bytes.fromhex(HEX),
        round=3,
        sequence=7,
        base=bytes(32),
        tokens_per_s=1200.0,
        can_reduce=True,
        upload_bytes_per_s=1_000_000,
    )
    envelope = Envelope.sign(Identity.from_seed(bytes(32)), record)
    description = "A node's heartbeat: the encoded Envelope of a Ready. Here in hex; it is sent as it is."
    return {"heartbeat": {"summary": "A heartbeat", "description": description, "value": envelope.encode().hex()}}


def _completed(document: dict[str, Any]) -> dict[str, Any]:
    components = document.setdefault("components", {}).setdefault("schemas", {})
    for model in (Problem, LogEvent):
        components[model.__name__] = model.model_json_schema()
    for name in ("HTTPValidationError", "ValidationError"):
        components.pop(name, None)
    for schema in components.values():
        if schema.get("type") == "object":
            schema["examples"] = [example_of(schema, components)]
    event = document["paths"][EVENTS]["get"]["responses"]["200"]["content"]["text/event-stream"]["itemSchema"]
    event["properties"]["data"] |= {
        "contentMediaType": "application/json",
        "contentSchema": {"$ref": "#/components/schemas/LogEvent"},
    }
    for operations in document["paths"].values():
        for operation in operations.values():
            for status, response in documented(*ANYWHERE).items():
                operation["responses"].setdefault(str(status), response)
            for status in ("429", "503"):
                operation["responses"][status]["headers"] = {
                    "Retry-After": {"description": "seconds to wait", "schema": {"type": "integer", "minimum": 1}}
                }
    return document
