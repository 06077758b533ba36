"""As little HTTP/1.1 as it takes to speak with a coordinator, over one connection; for thousands of nodes at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    began_s: float
    ended_s: float


class _IdleClosedError(EOFError):
    """The server had closed a connection that was used before, and read nothing of the request."""


class Connection:
    """One keep-alive connection; opened at the first request, and again after it was lost."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.bytes_in = 0

    async def request(self, method: str, path: str, body: bytes, timeout_s: float, want: Callable[[], bool]) -> Answer:
        """One request; of a body that is not wanted by the time it comes only the length is looked at.

        A server may close a connection that was idle just as it is used again; then a new one is opened, once.

        Raises:
            OSError, EOFError, TimeoutError, ValueError: no answer, or none that is HTTP.
        """
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                try:
                    status, content = await self._exchange(method, path, body, want)
                except _IdleClosedError:
                    self.close()
                    status, content = await self._exchange(method, path, body, want)
        except BaseException:
            self.close()
            raise
        return Answer(status, content, began_s, time.monotonic())

    async def _exchange(self, method: str, path: str, body: bytes, want: Callable[[], bool]) -> tuple[int, bytes]:
        reused = self._streams is not None and not self._streams[0].at_eof()
        if self._streams is None or not reused:
            self.close()
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        head = f"{method} {path} HTTP/1.1\r\nhost: c\r\ncontent-type: application/cbor\r\ncontent-length: {len(body)}"
        writer.write(head.encode() + b"\r\n\r\n" + body)
        try:
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        except asyncio.IncompleteReadError as error:
            raise (_IdleClosedError() if reused and not error.partial else error) from error
        except ConnectionResetError as error:
            raise (_IdleClosedError() if reused else error) from error
        status, content = int(answer[9:12]), b""
        self.bytes_in += len(answer)
        if status != 204:
            size_bytes = int(answer.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
            self.bytes_in += size_bytes
            content = await _body(reader, size_bytes, wanted=status != 200 or want())
        if b"connection: close" in answer:
            self.close()
        return status, content

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _body(reader: asyncio.StreamReader, size_bytes: int, *, wanted: bool) -> bytes:
    if wanted:
        return await reader.readexactly(size_bytes)
    while size_bytes:
        piece = await reader.read(min(size_bytes, 1 << 18))
        if not piece:
            raise EOFError("the answer ends early")
        size_bytes -= len(piece)
    return b""
