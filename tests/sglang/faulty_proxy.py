"""A proxy before a real server, for what a real one cannot be made to do: be slow, fail, refuse, vanish."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Reply:
    """Instead of the server's."""

    status: int
    body: str


# what to do with a request to a route: a reply of the proxy's own, "hang", or None to let the server answer
Fault = Callable[[str], Reply | str | None]


def no_fault(route: str) -> None:
    return None


class FaultyProxy:
    """Listens on a port of its own. `fault` may be set at any time, and is asked once a request.

    `latency_s` is added to every response of /generate.
    """

    def __init__(self, url: str, *, latency_s: float = 0.0) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname, parts.port)
        self._latency_s = latency_s
        self.fault: Fault = no_fault
        self.routes: list[str] = []  # as they were asked for
        self._connections: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self._port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30.0)

    def cut(self) -> None:
        """Nobody listens any more, and every connection is broken."""
        self._run(self._cut())

    async def _cut(self) -> None:
        self._server.close()
        for writer in list(self._connections):
            writer.transport.abort()

    def mend(self) -> None:
        """The same port again."""
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", self._port))

    def close(self) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                await self._answer(reader, writer)
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request a connection."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        request, *headers = head.split("\r\n")[:-2]
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in headers)}
        body = await reader.readexactly(int(fields.get("content-length", "0")))
        route = request.split()[1]
        self.routes.append(route)
        action = self.fault(route)
        if action == "hang":
            await asyncio.sleep(3600.0)
        if isinstance(action, Reply):
            await self._reply(action, writer)
            return
        if route == "/generate":
            await asyncio.sleep(self._latency_s)
        await self._pass_on(request, headers, body, writer)

    async def _reply(self, reply: Reply, writer: asyncio.StreamWriter) -> None:
        content = reply.body.encode()
        writer.write(f"HTTP/1.1 {reply.status} -\r\ncontent-length: {len(content)}\r\n".encode())
        writer.write(b"content-type: application/json\r\nconnection: close\r\n\r\n" + content)
        await writer.drain()

    async def _pass_on(self, request: str, headers: list[str], body: bytes, writer: asyncio.StreamWriter) -> None:
        kept = [line for line in headers if not line.lower().startswith("connection:")]
        upstream_reader, upstream = await asyncio.open_connection(*self._target)
        try:
            upstream.write("\r\n".join([request, *kept, "connection: close", "", ""]).encode("latin-1") + body)
            while piece := await upstream_reader.read(1 << 16):
                writer.write(piece)
                await writer.drain()
        finally:
            upstream.close()
