"""Where a run comes from: the specs of the runs before it, each named by the next one's id. Checked by hashing them.

Only the names of things are read in an ancestor's spec, so that one of an older protocol is an ancestor all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swarm_protocol import encoding
from swarm_protocol.errors import InvalidDataError
from swarm_protocol.spec import MAX_SPEC_BYTES, ParentSpec, RunSpec, run_id_of

MAX_ANCESTORS = 64
MAX_BYTES = 16 + MAX_ANCESTORS * (MAX_SPEC_BYTES + 16)


@dataclass(frozen=True)
class Ancestor:
    """A run, and which of its checkpoints the next one began with: that of round `round`, of root `root`."""

    spec: bytes
    name: str
    run: bytes
    round: int
    root: bytes


def chain(parent: ParentSpec | None, specs: Sequence[bytes]) -> tuple[Ancestor, ...]:
    """The ancestors of a run that has this parent, nearest first, from the encoded specs of all of them.

    Raises:
        InvalidDataError: a spec is not the one that is named, one is missing or left over, or there are too many.
    """
    found: list[Ancestor] = []
    for data in specs:
        if parent is None or len(found) == MAX_ANCESTORS:
            raise InvalidDataError("more specs than the run has ancestors, or than are allowed")
        if run_id_of(data).hex() != parent.run:
            raise InvalidDataError(f"the spec of ancestor {parent.run} does not hash to its id")
        value = encoding.decode(data, max_bytes=MAX_SPEC_BYTES)
        if not isinstance(value, dict):
            raise InvalidDataError(f"the spec of ancestor {parent.run} is no map")
        name = value.get("name")
        run, root = bytes.fromhex(parent.run), bytes.fromhex(parent.root)
        found.append(Ancestor(data, name if isinstance(name, str) else "", run, parent.round, root))
        parent = _parent(value.get("parent"))
    if parent is not None:
        raise InvalidDataError(f"the spec of ancestor {parent.run} is missing")
    return tuple(found)


def of(spec: RunSpec, data: bytes) -> tuple[Ancestor, ...]:
    """The ancestors of a run from the canonical list of their specs. Raises like `chain`."""
    value = encoding.decode(data, max_bytes=MAX_BYTES)
    if not isinstance(value, list) or not all(isinstance(item, bytes) for item in value):
        raise InvalidDataError("the specs of ancestors are a list of bytes")
    return chain(spec.parent, [item for item in value if isinstance(item, bytes)])


def encode(ancestors: Sequence[Ancestor]) -> bytes:
    """What `of` reads."""
    specs: list[encoding.Value] = [ancestor.spec for ancestor in ancestors]
    return encoding.encode(specs)


def _parent(value: object) -> ParentSpec | None:
    if value is None:
        return None
    try:
        return ParentSpec.model_validate(value)
    except ValueError as error:
        raise InvalidDataError(f"an ancestor's spec names no parent that can be followed: {error}") from error
