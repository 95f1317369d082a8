"""Hostile servers without a network: transports below the clients of huggingface_hub and urllib.

The clients are the real ones, with all that they make of headers, redirections, encodings and lengths. A server on this
machine would need sockets, which the guard forbids, and a redirection to another host would leave it.
"""

import io
from collections.abc import Callable
from http.client import HTTPMessage, HTTPResponse
from importlib import import_module
from typing import Any, NamedTuple, cast
from urllib.error import HTTPError


class Answer(NamedTuple):
    """An answer as it is sent: HTTP's head is made of status and headers, whatever these are.

    Attributes:
        status: of three digits, if all is well.
        headers: names and values.
        body: content.
        cut: bytes after which the connection ends; None: it ends with the content.
    """

    status: Any = 200
    headers: tuple[tuple[Any, Any], ...] = ()
    body: bytes = b""
    cut: int | None = None

    def sent(self) -> bytes:
        """Return the whole answer."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in self.headers)
        head = f"HTTP/1.1 {self.status} x\r\n{lines}\r\n".encode("utf-8", "surrogatepass")
        return head + self.body[: self.cut]


Server = Callable[[str, str, str], Answer]  # of a method, an address and the part that is asked for


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
        content = iter([b"" if request.method == "HEAD" else answer.body[: answer.cut]])
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
        data = server(method, url, "").sent()
        response = HTTPResponse(cast(Any, _Socket(data)), method=method)
        response.begin()
        if response.status >= 300:
            raise HTTPError(url, response.status, "x", cast(HTTPMessage, response.headers), None)
        return response

    return urlopen
