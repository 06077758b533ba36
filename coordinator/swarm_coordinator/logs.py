"""What the coordinator writes to stderr: a short line for people, or a JSON object for programs; never a secret.

Modules log through `logging`. Lines of one request have its `request_id`.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import TextIO

import structlog
from structlog.typing import EventDict, WrappedLogger

from swarm_coordinator.config import Log

SECRET = re.compile(r"(?i)(bearer\s+|(?:token|password|secret|seed)\s*[=:]\s*|//[^/\s:@]*:(?=[^/\s]*@))[^\s,;&'\"@/]+")
SECRET_NAMES = frozenset({"authorization", "token", "password", "secret", "seed"})


def configure(settings: Log, stream: TextIO | None = None) -> None:
    """Send this process's log to a stream, by default stderr."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
    ]
    if settings.format == "json":
        shared += [
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
        ]
        last: list[structlog.typing.Processor] = [_without_secrets, structlog.processors.JSONRenderer()]
    else:
        shared += [structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False), structlog.processors.format_exc_info]
        last = [_without_secrets, _line]
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
        )
    )
    logging.basicConfig(level=settings.level, handlers=[handler], force=True)
    for name in ("uvicorn", "httpx", "httpcore", "asyncio", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _line(_: WrappedLogger, __: str, event: EventDict) -> str:
    """`12:00:00 WARNING what happened [request_id=...]`, with the traceback of a fault below."""
    traceback = event.pop("exception", None)
    head = f"{event.pop('timestamp')} {str(event.pop('level')).upper()} {event.pop('event')}"
    more = " ".join(f"{name}={value}" for name, value in sorted(event.items()))
    return head + (f" [{more}]" if more else "") + (f"\n{traceback}" if traceback else "")


def _without_secrets(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    for name, value in event.items():
        if name.lower() in SECRET_NAMES:
            event[name] = "***"
        elif isinstance(value, str):
            event[name] = SECRET.sub(r"\1***", value)
    return event
