"""The state machine's states and events as CBOR, for the database. Snapshots of thousands of nodes take milliseconds."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args

import cbor2
from immutables import Map
from pydantic import TypeAdapter, ValidationError

from swarm_coordinator.round_events import Event
from swarm_coordinator.rounds import Average, Node, Offer, Phase, Policy, State, with_counts
from swarm_protocol.errors import EncodingError
from swarm_protocol.records import Seat

_EVENTS: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(Event)}
_READERS: dict[str, TypeAdapter[Event]] = {name: TypeAdapter(kind) for name, kind in _EVENTS.items()}
_DERIVED = ("slots", "offered", "newcomers", "awaited", "gone")
_NEWER = EncodingError("the database holds a state or an event that this version does not know; upgrade swarm-node")


def encode_state(state: State) -> bytes:
    plain = {one.name: getattr(state, one.name) for one in fields(state) if one.name not in _DERIVED}
    plain |= {
        "policy": _plain(state.policy),
        "phase": state.phase.value,
        "nodes": [_plain(node) | {"offer": node.offer and _plain(node.offer)} for node in state.nodes.values()],
        "ended": sorted(state.ended),
        "previous": sorted(state.previous),
        "roster": [dict(seat) for seat in state.roster],
        "commitments": sorted(state.commitments.items()),
        "averages": [_plain(average) for average in state.averages],
        "openings": sorted(state.openings.items()),
        "served": sorted(state.served.items()),
    }
    return cbor2.dumps(plain)


def decode_state(data: bytes) -> State:
    """Raises `EncodingError` for a state that this version does not know."""
    try:
        plain = cbor2.loads(data)
        nodes = (Node(one["peer"], one["seen_ms"], one["offer"] and Offer(**one["offer"])) for one in plain["nodes"])
        plain |= {
            "policy": Policy(**plain["policy"]),
            "phase": Phase(plain["phase"]),
            "nodes": Map({node.peer: node for node in nodes}),
            "ended": frozenset(plain["ended"]),
            "previous": frozenset(plain["previous"]),
            "roster": tuple(Seat(**seat) for seat in plain["roster"]),
            "commitments": Map(dict(plain["commitments"])),
            "selected": tuple(plain["selected"]),
            "averages": tuple(Average(**{**one, "slots": tuple(one["slots"])}) for one in plain["averages"]),
            "parts": tuple(plain["parts"]),
            "openings": Map(dict(plain["openings"])),
            "served": Map(dict(plain.get("served", []))),
        }
        return with_counts(State(**plain))
    except (cbor2.CBORDecodeError, KeyError, TypeError, ValueError) as error:
        raise _NEWER from error


def encode_event(event: Event) -> bytes:
    return cbor2.dumps({type(event).__name__: _plain(event)})


def decode_event(data: bytes) -> Event:
    """Raises `EncodingError` for an event that this version does not know."""
    try:
        ((name, values),) = cbor2.loads(data).items()
        return _READERS[name].validate_python(values)
    except (cbor2.CBORDecodeError, AttributeError, KeyError, ValueError, ValidationError) as error:
        raise _NEWER from error


def _plain(value: Any) -> dict[str, Any]:
    return {one.name: getattr(value, one.name) for one in fields(value)}
