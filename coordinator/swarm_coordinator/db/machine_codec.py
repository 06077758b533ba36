"""The state machine's states and events as canonical bytes, for the database."""

from __future__ import annotations

from typing import get_args

from pydantic import TypeAdapter

from swarm_coordinator.round_events import Event
from swarm_coordinator.rounds import State
from swarm_protocol import encoding
from swarm_protocol.errors import EncodingError

MAX_STATE_BYTES = 1 << 28

_STATE: TypeAdapter[State] = TypeAdapter(State)
_EVENTS: dict[str, TypeAdapter[Event]] = {kind.__name__: TypeAdapter(kind) for kind in get_args(Event)}


def encode_state(state: State) -> bytes:
    return encoding.encode(_STATE.dump_python(state))


def decode_state(data: bytes) -> State:
    return _STATE.validate_python(encoding.decode(data, max_bytes=MAX_STATE_BYTES))


def encode_event(event: Event) -> bytes:
    name = type(event).__name__
    return encoding.encode({name: _EVENTS[name].dump_python(event)})


def decode_event(data: bytes) -> Event:
    """Raises `EncodingError` for an event that this version does not know."""
    value = encoding.decode(data)
    if isinstance(value, dict):
        for name, fields in value.items():
            if name in _EVENTS:
                return _EVENTS[name].validate_python(fields)
    raise EncodingError("the database holds an event that this version does not know; upgrade swarm-node")
