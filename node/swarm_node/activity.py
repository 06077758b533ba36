"""What a node says of itself, as `status.json` shows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Activity:
    """What the node is doing. `place` is the coordinator's sentence about where it stands on its way to a slot."""

    name: str
    peer: str
    run: str
    state: str = "starting"
    round: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None
    contributions: int = 0
    place: str = ""
    team: str = ""
    checkpoint: dict[str, Any] = field(default_factory=dict)
    bytes_sent: int = 0
    bytes_received: int = 0
    exchange: dict[str, Any] = field(default_factory=dict)
