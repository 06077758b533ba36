"""What travels between the gossip process and who drives it, and between gossip processes besides messages: plain values.

Frames are a length of four bytes and canonical CBOR. Shared by both sides; no I/O.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from swarm_protocol import encoding
from swarm_protocol.errors import EncodingError

MAX_FETCH_BYTES = 4 << 20
MAX_CONTROL_BYTES = MAX_FETCH_BYTES + (1 << 16)
MAX_REQUEST_BYTES = 1024
MAX_HELLO_BYTES = 16 << 10
MAX_ADDRESSES = 8
MAX_PEERS_TOLD = 16
MAX_ADDRESS_LENGTH = 256
MAX_ENTRIES = 4096


def topic_of(run: bytes) -> str:
    """The run's one topic."""
    return f"swarm/{run.hex()}"


@dataclass(frozen=True)
class Joining:
    """What the gossip process needs to take part in a run.

    `seed` is the transport key's, `certificate` the envelope of its `TransportKey` by the node's identity, `spec` the run's
    encoded RunSpec; `listen` and `bootstrap` are multiaddrs, the latter with PeerIDs. `target` is how many
    neighbours it looks for.
    """

    seed: bytes
    certificate: bytes
    spec: bytes
    listen: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    bootstrap: tuple[str, ...] = ()
    announce: tuple[str, ...] = ()
    target: int = 8

    def encode(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def decode(cls, value: dict[str, Any]) -> Joining:
        lists = {name: tuple(str(one) for one in value[name]) for name in ("listen", "bootstrap", "announce")}
        return cls(
            seed=bytes(value["seed"]),
            certificate=bytes(value["certificate"]),
            spec=bytes(value["spec"]),
            target=int(value["target"]),
            **lists,
        )


@dataclass(frozen=True)
class Wanted:
    """What one gossip process asks of another: the spec, what is newest, one record, or entries of the log.

    For entries: those from `first` on, at most `count`, with the proof that as many leaves as they end with are extended by
    the log of `size`.
    """

    what: str
    hash: bytes = b""
    first: int = 0
    count: int = 0
    size: int = 0

    def encode(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def decode(cls, value: object) -> Wanted:
        """Raises `EncodingError`."""
        if not isinstance(value, dict) or set(value) != {"what", "hash", "first", "count", "size"}:
            raise EncodingError("a request is a map of what, hash, first, count and size")
        what, digest = value["what"], value["hash"]
        numbers = value["first"], value["count"], value["size"]
        if what not in ("spec", "newest", "record", "log") or not isinstance(digest, bytes) or len(digest) > 32:
            raise EncodingError("a request for something unknown")
        if not all(isinstance(number, int) and 0 <= number < 1 << 62 for number in numbers):
            raise EncodingError("a request with numbers out of bounds")
        return cls(what, digest, *numbers)


def text_list(value: object, limit: int) -> list[str]:
    """A bounded list of short texts that came from outside.

    Raises:
        EncodingError: it is something else.
    """
    if not isinstance(value, list) or len(value) > limit:
        raise EncodingError(f"a list of at most {limit} was expected")
    found = []
    for one in value:
        if not isinstance(one, str) or len(one) > MAX_ADDRESS_LENGTH:
            raise EncodingError("a list of short texts was expected")
        found.append(one)
    return found


def bytes_list(value: object, limit: int = MAX_ENTRIES) -> list[bytes]:
    """A bounded list of byte strings that came from outside; raises `EncodingError` if it is something else."""
    if not isinstance(value, list) or len(value) > limit:
        raise EncodingError(f"a list of at most {limit} was expected")
    found = []
    for one in value:
        if not isinstance(one, bytes):
            raise EncodingError("a list of byte strings was expected")
        found.append(one)
    return found


def decoded_map(data: bytes, max_bytes: int) -> dict[str, Any]:
    """A map that came from outside; raises `EncodingError`."""
    value = encoding.decode(data, max_bytes=max_bytes, max_depth=4)
    if not isinstance(value, dict):
        raise EncodingError("a map was expected")
    return dict(value)
