"""Calibrated tolerances of native numerics: how far two honest runtimes may be apart, and beyond what nobody honest is.

`swarm-coordinator calibrate` measures them and writes a file for people to read: canonical JSON, whose BLAKE3 hash a RunSpec
seals. Auditors fetch it by that hash. A pair of runtimes that is not in it is not calibrated, and earns nothing but equality.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from swarm_protocol.errors import ConfigurationError, InvalidDataError
from swarm_protocol.spec import Hash, ModelSpec, RunSpec, TrainableSpec, TrainingSpec, explain

MAX_BYTES = 1 << 22
MAX_RUNTIMES = 256
MAX_PAIRS = MAX_RUNTIMES * (MAX_RUNTIMES + 1) // 2
LEAST_MARGIN_ORDERS = 0.5
"""Worst honest noise and mildest cheat have to be this far apart, in orders of magnitude, or nothing is written."""

MAX_DISTANCE = 1e6
Distance = Annotated[float, Field(ge=0.0, le=MAX_DISTANCE, allow_inf_nan=False)]
Fact = Annotated[str, Field(max_length=500)] | int


@dataclass(frozen=True)
class Bounds:
    """Relative L2 distances: a replay agrees up to `accept`, and disagrees above `reject`."""

    accept: float
    reject: float

    def __str__(self) -> str:
        return f"accepted up to {self.accept:.1e}, rejected above {self.reject:.1e}"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class Pair(_Section):
    """Two runtimes, by fingerprint hash in ascending order; either may be the node's."""

    runtimes: Annotated[tuple[Hash, Hash], Field(strict=False)]
    worst_honest: Distance
    accept: Annotated[float, Field(gt=0.0, lt=1.0)]
    reject: Annotated[float, Field(gt=0.0, lt=10.0)]

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.runtimes[0] > self.runtimes[1]:
            raise ValueError("the runtimes of a pair are in ascending order")
        if not self.worst_honest <= self.accept <= self.reject:
            raise ValueError("worst_honest, accept and reject have to ascend")
        return self


class Precision(_Section):
    """What was measured in one precision of the inner steps. `cheats` are the least distances that were seen, by kind."""

    worst_honest: Distance
    mildest_cheat: Distance
    margin_orders: Annotated[float, Field(description="orders of magnitude between the two")]
    honest: Annotated[dict[str, Distance], Field(max_length=1000, description="worst distance by how it was made")]
    cheats: Annotated[dict[str, Distance], Field(max_length=1000)]
    pairs: Annotated[tuple[Pair, ...], Field(strict=False, max_length=MAX_PAIRS)]

    @model_validator(mode="after")
    def _apart(self) -> Self:
        for pair in self.pairs:
            if pair.reject >= self.mildest_cheat:
                raise ValueError(f"reject {pair.reject:.1e} is not below the mildest cheat ({self.mildest_cheat:.1e})")
        return self


class Tolerances(_Section):
    """The whole file. `runtimes` says what the fingerprint hashes stand for."""

    version: Literal[1] = 1
    model: ModelSpec
    training: TrainingSpec
    trainable: TrainableSpec = TrainableSpec()
    contributions: Annotated[int, Field(ge=1)]
    runtimes: Annotated[dict[Hash, dict[str, Fact]], Field(max_length=MAX_RUNTIMES)]
    precisions: Annotated[dict[Literal["float32"], Precision], Field(min_length=1)]

    def encode(self) -> bytes:
        """Canonical: JSON with sorted keys, indented by one space, and a newline at the end; no `trainable` if it is all."""
        default = {"trainable"} if self.trainable == TrainableSpec() else None
        return (json.dumps(self.model_dump(mode="json", exclude=default), sort_keys=True, indent=1) + "\n").encode()

    @classmethod
    def decode(cls, data: bytes) -> Tolerances:
        """Parse a file.

        Raises:
            InvalidDataError: too long, no tolerances, or not canonical.
        """
        if len(data) > MAX_BYTES:
            raise InvalidDataError(f"a tolerance file of {len(data)} bytes; at most {MAX_BYTES} are allowed")
        try:
            found = cls.model_validate_json(data)
        except ValidationError as error:
            raise InvalidDataError(explain(error, "the tolerance file")) from error
        if found.encode() != data:
            raise InvalidDataError("the tolerance file is not canonical; make it anew: swarm-coordinator calibrate")
        return found

    def bounds(self, precision: str, one: bytes, other: bytes) -> Bounds | None:
        """The bounds for a pair of fingerprint hashes, in either order; None where the pair is not calibrated."""
        wanted = tuple(sorted((one.hex(), other.hex())))
        for name, measured in self.precisions.items():
            for pair in measured.pairs if name == precision else ():
                if pair.runtimes == wanted:
                    return Bounds(pair.accept, pair.reject)
        return None

    def require_fit(self, model: ModelSpec, training: TrainingSpec, trainable: TrainableSpec) -> None:
        """Check that this was measured for what a run trains.

        Raises:
            ConfigurationError
        """
        for name, ours, theirs in (
            ("model", self.model, model),
            ("training", self.training, training),
            ("part of the model", self.trainable, trainable),
        ):
            differing = [key for key, value in _flat(ours).items() if _flat(theirs)[key] != value]
            if differing:
                raise ConfigurationError(
                    f"the tolerance file was made for another {name} ({', '.join(differing)} differ);"
                    " calibrate with the run's own TOML"
                )


def bounds_of(spec: RunSpec, tolerances: Tolerances | None, node: bytes, auditor: bytes) -> Bounds | None:
    """What holds between a node's and an auditor's runtime (fingerprint hashes); None where they are not calibrated.

    Of runtimes that are the same, and not in the file or without one, the spec's own bounds hold.
    """
    found = None if tolerances is None else tolerances.bounds(spec.training.precision, node, auditor)
    if found is None and node == auditor:
        return Bounds(spec.audit.accept, spec.audit.reject)
    return found


def place(worst_honest: float, mildest_cheat: float, *, least: float) -> Bounds:
    """Bounds between honest noise and cheats: a third, and two thirds, of the way from one to the other in logarithms.

    `least` stands in for a pair that happened to be quieter than that.

    Raises:
        ConfigurationError: they are less than `LEAST_MARGIN_ORDERS` apart.
    """
    low = max(worst_honest, least)
    if low <= 0.0 or margin_orders(low, mildest_cheat) < LEAST_MARGIN_ORDERS:
        raise ConfigurationError(
            f"honest noise of {low:.1e} and the mildest cheat at {mildest_cheat:.1e} are too close to be told apart;"
            ' use numerics = "exact", or settings that make less noise (a larger eps, fewer threads)'
        )
    ratio = mildest_cheat / low
    return Bounds(low * ratio ** (1 / 3), low * ratio ** (2 / 3))


def margin_orders(worst_honest: float, mildest_cheat: float) -> float:
    """Orders of magnitude between the two; infinite where honest runtimes did not differ at all."""
    if mildest_cheat <= 0.0 or not math.isfinite(worst_honest):
        return -math.inf
    return math.log10(mildest_cheat / worst_honest) if worst_honest else math.inf


def _flat(section: BaseModel) -> dict[str, Any]:
    return section.model_dump(mode="json")
