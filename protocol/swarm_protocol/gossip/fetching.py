"""Fetching between gossip peers: a request, then an answer in frames of at most 512 KB. Others check it.

Whoever asks too often, or while `AT_ONCE` others are served, gets nothing and may ask again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from swarm_protocol import encoding
from swarm_protocol.errors import EncodingError, RefusedError, SwarmError, UnreachableError
from swarm_protocol.gossip import wire
from swarm_protocol.gossip.transport import StreamHandler, end, guarded, read_frame, write_frame

PROTOCOL = "/swarm-node/gossip-fetch/1"
PIECE_BYTES = 512 << 10
FETCH_S = 20.0
AT_ONCE = 4

Answer = Callable[[str, wire.Wanted], Awaitable[bytes]]


def serving(answer: Answer) -> StreamHandler:
    """The handler of `PROTOCOL`; `answer` gets the asker's PeerID and raises a `SwarmError` for what it does not have."""
    free = trio.CapacityLimiter(AT_ONCE)

    async def handle(stream: Any) -> None:
        raw = await read_frame(stream, wire.MAX_REQUEST_BYTES)
        wanted = wire.Wanted.decode(wire.decoded_map(raw, wire.MAX_REQUEST_BYTES))
        payload, reason = b"", ""
        try:
            free.acquire_nowait()
        except trio.WouldBlock:
            reason = "busy"
        else:
            try:
                payload = await answer(str(stream.muxed_conn.peer_id), wanted)
            except SwarmError as error:
                reason = str(error)[:200] or "refused"
            finally:
                free.release()
        if len(payload) > wire.MAX_FETCH_BYTES:
            payload, reason = b"", "that is too much at once"
        await write_frame(stream, encoding.encode({"bytes": len(payload), "refused": reason}))
        for start in range(0, len(payload), PIECE_BYTES):
            await write_frame(stream, payload[start : start + PIECE_BYTES])
        await stream.close()

    return guarded(handle, deadline_s=FETCH_S)


async def fetch(host: Any, peer_id: Any, wanted: wire.Wanted) -> bytes:
    """What a connected peer answers, unchecked, at most `wire.MAX_FETCH_BYTES`.

    Raises:
        UnreachableError: no answer in time.
        RefusedError: it says no.
        EncodingError: it does not keep to the protocol.
    """
    stream = None
    try:
        with trio.fail_after(FETCH_S):
            stream = await host.new_stream(peer_id, [PROTOCOL])
            await write_frame(stream, encoding.encode(wanted.encode()))
            head = wire.decoded_map(await read_frame(stream, wire.MAX_REQUEST_BYTES), wire.MAX_REQUEST_BYTES)
            size, refused = head.get("bytes"), head.get("refused")
            if not isinstance(size, int) or not 0 <= size <= wire.MAX_FETCH_BYTES or not isinstance(refused, str):
                raise EncodingError("an answer that announces nothing, or too much")
            if refused:
                raise RefusedError(refused)
            data = bytearray()
            while len(data) < size:
                piece = await read_frame(stream, PIECE_BYTES)
                if not piece or len(data) + len(piece) > size:
                    raise EncodingError("an answer in pieces that do not add up")
                data += piece
            return bytes(data)
    except SwarmError:
        raise
    except Exception as error:
        raise UnreachableError(f"{peer_id} does not answer: {error!r:.200}") from error
    finally:
        if stream is not None:
            await end(stream)
