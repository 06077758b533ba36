"""The coordinator's log: lines for people, objects for programs, and no secret in either."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from structlog.contextvars import bound_contextvars

from swarm_coordinator import logs
from swarm_coordinator.config import Log


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def written(*, as_json: bool, fault: bool = False, message: str = "round %d is planned") -> str:
    stream = io.StringIO()
    logs.configure(Log(format="json" if as_json else "text"), stream)
    log = logging.getLogger("swarm_coordinator.tests")
    with bound_contextvars(request_id="r7"):
        if fault:
            try:
                raise ZeroDivisionError("by zero")
            except ZeroDivisionError:
                log.exception("a fault")
        else:
            log.warning(message, 3) if "%d" in message else log.warning(message)
    return stream.getvalue()


def test_a_line_for_people_is_short() -> None:
    line = written(as_json=False)
    assert line[2] == line[5] == ":"
    assert line[8:] == " WARNING round 3 is planned [request_id=r7]\n"


def test_a_line_for_programs_is_an_object() -> None:
    entry = json.loads(written(as_json=True))
    assert entry.pop("timestamp").endswith("Z")
    assert entry == {
        "event": "round 3 is planned",
        "level": "warning",
        "logger": "swarm_coordinator.tests",
        "request_id": "r7",
    }


def test_a_fault_comes_with_its_traceback() -> None:
    assert "ZeroDivisionError: by zero" in json.loads(written(as_json=True, fault=True))["exception"]
    first, *rest = written(as_json=False, fault=True).splitlines()
    assert first.endswith("ERROR a fault [request_id=r7]")
    assert rest[-1] == "ZeroDivisionError: by zero"


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    "message",
    [
        "authorization: Bearer sesame",
        "token=sesame&x=1",
        "password: sesame",
        "postgresql://owner:sesame@db/run is away",
    ],
)
def test_secrets_are_left_out(message: str, as_json: bool) -> None:
    line = written(as_json=as_json, message=message)
    assert "sesame" not in line
    assert "***" in line


def test_addresses_and_names_are_no_secrets() -> None:
    line = written(as_json=False, message="the coordinator at http://127.0.0.1:8470 does not answer to node-3")
    assert "http://127.0.0.1:8470 does not answer" in line
