"""What one address and one identity may ask for: generous to honest nodes, bounded for everybody else.

An address is charged before anything is read of a request; an identity once its signature was checked, and once for a
record: anybody may hand it in again, whether it was accepted or not. Whoever is refused is told when to come back, and
nothing was decided about what it sent. The machine's own addresses are not limited by address: a proxy there has to pass on
the client's with X-Forwarded-For.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Annotated

from fastapi import Depends, Query, Request
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from swarm_coordinator.api.problems import LimitedError, answer
from swarm_protocol.errors import ConfigurationError, RefusedError
from swarm_protocol.records import (
    MAX_RECORD_BYTES,
    Addresses,
    CheckpointReport,
    Evaluation,
    Evidence,
    PartHeld,
    PartVerdict,
    Ready,
    Record,
    SketchSet,
    Verdict,
)

MAX_WAIT_S = 30.0
BUSY_S = 5.0
OFFICIAL = (Addresses, CheckpointReport, Evaluation, Evidence, PartHeld, PartVerdict, SketchSet, Verdict)
"""Records that only the checkpoint worker, or only an auditor, may sign."""


@dataclass(frozen=True)
class Limits:
    """Rates are per second, with bursts of so many at once.

    An honest node sends a heartbeat every ten seconds, some twenty records and as many long-polls a round, a record more for
    each part that it reduces, and fetches a checkpoint of some hundred chunks when it joins; many nodes may share an address.
    The checkpoint worker and the auditors, whose records grow with the run, are not limited by identity.
    """

    max_body_bytes: int = MAX_RECORD_BYTES
    body_s: float = 20.0
    address_per_s: float = 200.0
    address_burst: float = 4000.0
    identity_per_s: float = 20.0
    identity_burst: float = 1000.0
    remembered: int = 1 << 16
    waiting_per_address: int = 1000
    listeners: int = 200
    listeners_per_address: int = 20
    min_free_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ConfigurationError(f"the limit {name} is {value}; it has to be above 0")
        if self.max_body_bytes > MAX_RECORD_BYTES:
            raise ConfigurationError(f"the limit max_body_bytes is above the {MAX_RECORD_BYTES} bytes of a record")
        if min(self.address_burst, self.identity_burst) < 1:
            raise ConfigurationError("a burst is of 1 request at least")


class Buckets:
    """A token bucket per key. Whoever was not seen for longest is forgotten first, which is to say filled up."""

    def __init__(
        self, per_s: float, burst: float, remembered: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_s = per_s
        self._burst = burst
        self._remembered = remembered
        self._clock = clock
        self._levels: OrderedDict[str | bytes, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._levels)

    def wait_s(self, key: str | bytes) -> float:
        """How long until there is a token; 0 if there is one."""
        return max(0.0, (1.0 - self._level(key)) / self._per_s)

    def spend(self, key: str | bytes) -> None:
        """Take a token, also one that is not there yet."""
        self._levels[key] = (self._level(key) - 1.0, self._clock())
        self._levels.move_to_end(key)
        if len(self._levels) > self._remembered:
            self._levels.popitem(last=False)

    def _level(self, key: str | bytes) -> float:
        tokens, at_s = self._levels.get(key, (self._burst, 0.0))
        return min(self._burst, tokens + (self._clock() - at_s) * self._per_s)


class Desk:
    """Who has asked for how much of late, and who is waiting. One event loop's; not thread-safe."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.addresses = Buckets(limits.address_per_s, limits.address_burst, limits.remembered)
        self.identities = Buckets(limits.identity_per_s, limits.identity_burst, limits.remembered)
        self._officers: set[bytes] = set()
        self._charged: OrderedDict[bytes, None] = OrderedDict()
        self.waiting: Counter[str] = Counter()
        self.listening: Counter[str] = Counter()

    def check_identity(self, key: bytes) -> None:
        """Raises `LimitedError` where an identity has used up its tokens."""
        wait_s = 0.0 if key in self._officers else self.identities.wait_s(key)
        if wait_s:
            raise too_many("this identity has sent too many records; send them again later", wait_s)

    def charge_identity(self, key: bytes, record: Record, *, accepted: bool) -> None:
        """Charge an identity for a record of its own. Heartbeats, which only their signer has, count every time.

        Whoever had a record accepted that takes an office has it.
        """
        if accepted and isinstance(record, OFFICIAL):
            self._officers.add(key)
        name = key + record.hash
        if name in self._charged and not isinstance(record, Ready):
            return
        self.identities.spend(key)
        self._charged[name] = None
        if len(self._charged) > self.limits.remembered:
            self._charged.popitem(last=False)

    @contextmanager
    def long_poll(self, host: str | None) -> Iterator[None]:
        """A place for one long-poll. Raises `LimitedError` where the address holds too many."""
        address = address_of(host)
        if address is not None and self.waiting[address] >= self.limits.waiting_per_address:
            raise too_many("this address has too many requests waiting", BUSY_S)
        with _counted(self.waiting, address or ""):
            yield

    @contextmanager
    def listener(self, host: str | None) -> Iterator[None]:
        """A place for one listener to events. Raises `LimitedError` where there is none."""
        address = address_of(host)
        if self.listening.total() >= self.limits.listeners:
            reason = "too many are listening to events; come back later, or read the log's entries"
            raise LimitedError(reason, status=503, code="busy", retry_after_s=BUSY_S)
        if address is not None and self.listening[address] >= self.limits.listeners_per_address:
            raise too_many("this address listens too many times", BUSY_S)
        with _counted(self.listening, address or ""):
            yield


class RateLimit:
    """ASGI middleware: refuses what an address asks too often, and bodies beyond the bound, before they are read."""

    def __init__(self, app: ASGIApp, desk: Desk) -> None:
        self._app = app
        self._desk = desk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except LimitedError as error:
            await answer(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        client = scope.get("client")
        address = address_of(client[0] if client else None)
        if address is not None:
            wait_s = self._desk.addresses.wait_s(address)
            if wait_s:
                raise too_many("this address asks too often; come back later", wait_s)
            self._desk.addresses.spend(address)
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not declared.isdigit() or len(declared) > 20 or int(declared) > self._desk.limits.max_body_bytes:
            raise too_long(self._desk.limits)


def too_long(limits: Limits) -> LimitedError:
    """The refusal of a body beyond the bound."""
    reason = f"a record has at most {limits.max_body_bytes} bytes"
    return LimitedError(reason, status=413, code="too-long", close=True)


async def bounded_body(request: Request, limits: Limits) -> bytes:
    """The request's body, never more of it than a record may have, and not longer than `body_s`.

    Raises:
        RefusedError: too long, too slow, or cut off.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_s):
            async for piece in request.stream():
                body += piece
                if len(body) > limits.max_body_bytes:
                    raise too_long(limits)
    except TimeoutError as error:
        reason = f"the record did not come within {limits.body_s:g} s; send it again"
        raise LimitedError(reason, status=408, code="too-slow", retry_after_s=1.0, close=True) from error
    except ClientDisconnect as error:
        raise RefusedError("the record was cut off", status=400, code="cut-off") from error
    return bytes(body)


def too_many(reason: str, wait_s: float) -> LimitedError:
    """The refusal of whoever should come back later."""
    return LimitedError(reason, status=429, code="too-many-requests", retry_after_s=wait_s, close=wait_s > BUSY_S)


@lru_cache(maxsize=1 << 14)
def address_of(host: str | None) -> str | None:
    """What is limited as one address: an IPv4 address, or an IPv6 network of 64 bits; None for this machine's own."""
    try:
        address = ip_address((host or "").partition("%")[0])
    except ValueError:
        return host or "unknown"
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is None:
            return None if address.is_loopback else str(ip_network((address, 64), strict=False))
        address = address.ipv4_mapped
    return None if address.is_loopback else str(address)


def the_desk(request: Request) -> Desk:
    desk = request.app.state.desk
    assert isinstance(desk, Desk)
    return desk


TheDesk = Annotated[Desk, Depends(the_desk)]


async def waiting(
    request: Request,
    desk: TheDesk,
    wait_s: Annotated[
        float, Query(ge=0, le=MAX_WAIT_S, description="how long to wait, in seconds, if it is not there yet")
    ] = 0.0,
) -> AsyncIterator[float]:
    """How long the client wants to wait, and its place for as long as it does."""
    if not wait_s:
        yield 0.0
        return
    with desk.long_poll(request.client.host if request.client else None):
        yield wait_s


async def listening(request: Request, desk: TheDesk) -> AsyncIterator[None]:
    """A listener's place."""
    with desk.listener(request.client.host if request.client else None):
        yield


@contextmanager
def _counted(counts: Counter[str], name: str) -> Iterator[None]:
    counts[name] += 1
    try:
        yield
    finally:
        counts[name] -= 1
        if not counts[name]:
            del counts[name]
