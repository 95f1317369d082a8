"""Hostile servers without a network: transports below the clients of huggingface_hub, fsspec and urllib.

The clients are the real ones, with all that they make of headers, redirections, encodings and lengths. A server on this
machine would need sockets, which the guard forbids, and a redirection to another host would leave it.
"""

import asyncio
import io
import zlib
from collections.abc import Callable, Iterator
from http.client import HTTPMessage, HTTPResponse
from importlib import import_module
from itertools import islice
from typing import Any, NamedTuple, cast
from urllib.error import HTTPError

import aiohttp
from aiohttp.client_proto import ResponseHandler

BLOCK = 1 << 16  # bytes that arrive at once


class Answer(NamedTuple):
    """An answer as it is sent: HTTP's head is made of status and headers, whatever these are.

    Attributes:
        status: of three digits, if all is well.
        headers: names and values.
        body: content.
        times: how often the content is sent, in place of once.
        cut: bytes after which the connection ends; None: it ends with the content.
        packed: whether the content is compressed while it is sent.
    """

    status: Any = 200
    headers: tuple[tuple[Any, Any], ...] = ()
    body: bytes = b""
    times: int = 1
    cut: int | None = None
    packed: bool = False

    def content(self) -> Iterator[bytes]:
        """Yield the content in blocks."""
        packer = zlib.compressobj(9, zlib.DEFLATED, 31)
        for _ in range(self.times):
            for start in range(0, len(self.body), BLOCK):
                block = self.body[start : start + BLOCK]
                yield packer.compress(block) if self.packed else block
        if self.packed:
            yield packer.flush()

    def sent(self) -> Iterator[bytes]:
        """Yield the whole answer in blocks."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in self.headers)
        yield f"HTTP/1.1 {self.status} x\r\n{lines}\r\n".encode("utf-8", "surrogatepass")
        left = self.cut
        for block in self.content():
            yield block if left is None else block[: max(0, left)]
            left = None if left is None else left - len(block)
            if left is not None and left <= 0:
                return


Server = Callable[[str, str, str], Answer]  # of a method, an address and the part that is asked for


class _Wire(asyncio.Transport):
    """The connection of one request."""

    def __init__(self, protocol: ResponseHandler, server: Server, method: str, url: str, part: str) -> None:
        super().__init__()
        self.protocol, self.loop = protocol, asyncio.get_running_loop()
        self.blocks, self.paused, self.closed, self.asked = server(method, url, part).sent(), False, False, False

    def write(self, data: Any) -> None:
        if not self.asked:
            self.asked = True
            self.loop.call_soon(self._go_on)

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def _go_on(self) -> None:
        if self.paused or self.closed:
            return
        block = next(self.blocks, None)
        if block is None:
            self.close()
            return
        self.protocol.data_received(block)
        self.loop.call_soon(self._go_on)

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        if self.paused:
            self.paused = False
            self.loop.call_soon(self._go_on)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.loop.call_soon(self.protocol.connection_lost, None)

    abort = close

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


class Connector(aiohttp.BaseConnector):
    """Connects aiohttp to a server in this process."""

    def __init__(self, server: Server) -> None:
        super().__init__(force_close=True)
        self.server = server

    async def _create_connection(self, req: Any, traces: Any, timeout: Any) -> ResponseHandler:
        protocol = ResponseHandler(loop=asyncio.get_running_loop())
        protocol.connection_made(_Wire(protocol, self.server, req.method, str(req.url), req.headers.get("Range", "")))
        return protocol


def hub_client(server: Server) -> Any:
    """Return a client of huggingface_hub that is connected to a server in this process."""
    from huggingface_hub.utils import _http

    client: Any = _http.default_client_factory()
    httpx = import_module(type(client).__module__.partition(".")[0])

    def handle(request: Any) -> Any:
        answer = server(request.method, str(request.url), "")
        headers = [
            (str(name).encode(errors="replace"), str(value).encode(errors="replace")) for name, value in answer.headers
        ]
        content = iter(()) if request.method == "HEAD" else islice(answer.content(), answer.cut)
        return httpx.Response(answer.status, headers=headers, content=content)

    client._transport, client._mounts = httpx.MockTransport(handle), {}
    return client


class _Socket:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def makefile(self, *_: Any, **__: Any) -> io.BytesIO:
        return io.BytesIO(self.data)


def opener(server: Server) -> Callable[..., Any]:
    """Return what ``urllib.request.urlopen`` does, connected to a server in this process."""

    def urlopen(request: Any, timeout: float = 0) -> Any:
        url, method = request.full_url, request.get_method()
        data = b"".join(server(method, url, "").sent())
        response = HTTPResponse(cast(Any, _Socket(data)), method=method)
        response.begin()
        if response.status >= 300:
            raise HTTPError(url, response.status, "x", cast(HTTPMessage, response.headers), None)
        return response

    return urlopen
