"""How a node conducts itself where it could be dishonest: how it trains and reduces, what it sends and shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from swarm_node.contribution import Encode, Train, train
from swarm_node.faults import NONE, Faults
from swarm_protocol import parts
from swarm_protocol.calls import Handler

Handlers = dict[str, Handler]


@dataclass(frozen=True)
class Conduct:
    """`encode` makes the parts that are committed to and sent; `evidence` turns honest handlers of evidence into its own;
    `faults` are lies in the exchange."""

    train: Train = train
    encode: Encode = parts.encode_parts
    evidence: Callable[[Handlers], Handlers] = lambda handlers: handlers
    faults: Faults = NONE


HONEST = Conduct()
