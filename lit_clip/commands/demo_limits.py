"""Requests that ``lit-clip demo`` passes on to gradio: those of its own page, made anew from checked values.

Which files gradio opens, which addresses it fetches and which routes it has differs between its versions. Here every
request that is not one of the page is refused, uploads are checked and stored, and a file is named only by the path
that storing it returned.
"""

import asyncio
import ipaddress
import json
import os
import re
import shutil
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode

from lit_clip.errors import InputError, require
from lit_clip.tools.images import SUFFIXES, image_size

MOST_BYTES, MOST_PIXELS = 32 * 2**20, 64_000_000  # of an uploaded image
MOST_JSON = 2**20  # bytes of any other request
MOST_FILES, MOST_STORED = 2_000, 2**30  # uploads and images found that are kept, and their bytes
MOST_SECONDS = 120  # for a body to arrive
MOST_UPLOADS = 16  # that arrive at once
MOST_IMAGES = 200  # that a search shows
EVERYWHERE = ("", "0", "0.0.0.0", "::")  # noqa: S104  # addresses to listen on that stand for all of a machine
API = "/gradio_api"
PAGE = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/(?:assets|static)(?:/[\w@-][\w.@-]*)+"
    rf"|{API}/(?:info|app_id|startup-events|heartbeat/[\w-]{{1,64}}|queue/data|call/\w{{1,64}}/[\w-]{{1,64}})",
    re.ASCII,
)
CALL = re.compile(rf"{API}/(?:queue/join|call/(\w{{1,64}}))", re.ASCII)
OF_PROXIES = (b"forwarded", b"x-forwarded-", b"x-gradio-")  # headers that give the page another address
WORD = re.compile(r"[\w-]{1,80}", re.ASCII)

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


class Refused(Exception):  # noqa: N818
    """A request that is not answered, with a status of HTTP and what is wrong with it."""

    def __init__(self, status: int, problem: str) -> None:
        super().__init__(problem)
        self.status = status


class Limits:
    """An ASGI application that checks requests and passes those of the page on to another, gradio's.

    Both store files in ``uploads``. ``numbered`` and ``named`` give the number of inputs of each function of the page,
    by its number and by the name of its route.
    """

    def __init__(
        self, app: Application, uploads: Path, host: str, numbered: Mapping[int, int], named: Mapping[str, int]
    ) -> None:
        self.app, self.uploads, self.host, self.numbered, self.named = app, uploads, host, numbered, named
        self._bodies = asyncio.Semaphore(MOST_UPLOADS)
        self._stored = re.compile(rf"{re.escape(str(uploads))}/[0-9a-f]{{16,64}}/\w[\w.-]{{0,80}}", re.ASCII)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            try:
                await self._answer(scope, receive, send)
            except Refused as refused:
                await _send_json(send, refused.status, {"detail": str(refused)})

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        _check_names(scope["headers"], self.host)
        method, path = scope["method"], scope["path"]
        headers = [pair for pair in scope["headers"] if not pair[0].startswith(OF_PROXIES)]
        scope = {**scope, "query_string": _known(scope["query_string"]), "headers": headers}
        if method in ("GET", "HEAD"):
            if not (PAGE.fullmatch(path) or self._is_stored(path.removeprefix(f"{API}/file="))):
                raise Refused(404, "no such page")
            await self._pass_on(scope, receive, send)
        elif method == "POST" and path == f"{API}/upload":
            await _send_json(send, 200, [await self._upload(scope, receive)])
        elif method == "POST" and (called := CALL.fullmatch(path)):
            body = self._call(await _body(receive, MOST_JSON), called[1])
            await asyncio.to_thread(self._remove_oldest)
            kept = [pair for pair in scope["headers"] if pair[0] not in (b"content-length", b"content-type")]
            kept += [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
            await self._pass_on({**scope, "headers": kept}, _received(body, receive), send)
        else:
            raise Refused(405, "no such page")

    async def _pass_on(self, scope: Message, receive: Receive, send: Send) -> None:
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except (Exception, asyncio.CancelledError):
            if not started:
                raise
            # Of a stream: gradio begins one for a call that nobody made, and the demo may end while a page is open.
            with suppress(RuntimeError):  # it has ended already
                await send({"type": "http.response.body"})

    async def _upload(self, scope: Message, receive: Receive) -> str:
        """Store the image of a form; return its path."""
        starlette = import_module("starlette.requests")  # part of gradio, which may not be installed
        async with self._bodies:
            body = await _body(receive, MOST_BYTES + MOST_JSON)
            try:
                async with starlette.Request(scope, _received(body)).form(max_files=1, max_fields=0) as form:
                    file = form["files"]
                    content, name = await file.read(), file.filename or ""
            except Exception as error:  # of starlette or its parser, or there is no such file
                raise Refused(400, "an upload is a form with one file") from error
            try:
                return await asyncio.to_thread(self._store, content, name)
            except InputError as error:
                raise Refused(400, str(error)) from error
            except OSError as error:
                raise Refused(507, f"the image cannot be stored ({error.strerror})") from error

    def _store(self, content: bytes, name: str) -> str:
        require(len(content) <= MOST_BYTES, f"the image: {len(content):,} bytes; at most {MOST_BYTES:,}")
        width, height = image_size(BytesIO(content), "the image")
        require(width * height <= MOST_PIXELS, f"the image: {width} x {height} pixels; at most {MOST_PIXELS:,}")
        stem = re.sub(r"\W+", "_", Path(name).stem, flags=re.ASCII)[:60] or "image"
        suffix = Path(name).suffix.lower()
        path = self.uploads / sha256(name.encode("utf-8", "replace") + b"\0" + content).hexdigest() / stem
        path.parent.mkdir(exist_ok=True)
        path = path.with_suffix(suffix if suffix in SUFFIXES else ".png")
        path.write_bytes(content)
        os.utime(path.parent)  # uploaded again, it is the newest
        self._remove_oldest()
        return str(path)

    def _remove_oldest(self) -> None:
        """Remove the folders of the files stored first while there are too many, or too many bytes."""
        stored: list[tuple[float, int, Path]] = []
        for folder in self.uploads.iterdir():
            with suppress(OSError):  # removed meanwhile
                stored.append((folder.stat().st_mtime, sum(file.stat().st_size for file in folder.iterdir()), folder))
        count, size = len(stored), sum(each for _, each, _ in stored)
        for _, each, folder in sorted(stored):
            if count <= MOST_FILES and size <= MOST_STORED:
                break
            shutil.rmtree(folder, ignore_errors=True)
            count, size = count - 1, size - each

    def _is_stored(self, path: Any) -> bool:
        """Whether a path is one that storing a file returned; others are not even looked up."""
        return isinstance(path, str) and bool(self._stored.fullmatch(path)) and Path(path).is_file()

    def _call(self, body: bytes, function: str | None) -> bytes:
        """Return the body of a call made anew from JSON, with each input checked, for a function or that it names."""
        try:
            typed = json.loads(body)
            called: dict[str, Any] = {"data": self._inputs(typed["data"])}
            if function is None:
                called |= {"fn_index": typed["fn_index"], "session_hash": typed["session_hash"]}
                require(bool(WORD.fullmatch(called["session_hash"])), "no session")
            wanted = self.numbered[called["fn_index"]] if function is None else self.named[function]
            require(len(called["data"]) == wanted, "inputs of another function")
            return json.dumps(called, ensure_ascii=False).encode()  # no surrogate is text
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise Refused(400, "not a request of this page, or its image is no longer kept; upload it again") from error

    def _image(self, image: Any) -> dict[str, Any] | None:
        if image is None:
            return None
        path = image["path"]
        require(self._is_stored(path), "no image that is kept")
        return {"path": path, "orig_name": Path(path).name, "meta": {"_type": "gradio.FileData"}}

    def _inputs(self, data: Any) -> list[Any]:
        match data:
            case [None | {"path": _} as image, *texts] if len(texts) in (0, 2) and _are_texts(texts):
                return [self._image(image), *(text or "" for text in texts)]
            case [None | str() as text, None | int() | float() as count]:
                return [text or "", max(1, min(int(count or 1), MOST_IMAGES))]  # gradio raises for others
            case _:
                raise InputError("inputs of no function")


def _are_texts(values: Sequence[Any]) -> bool:
    return all(value is None or isinstance(value, str) for value in values)


def is_accepted(header: str, host: str) -> bool:
    """Return whether a Host header names the address that is listened on, so that no other name can point here.

    Accepted are ``localhost``, ``127.0.0.1``, ``[::1]`` and the host itself. Where every address of this machine is
    listened on, also any address, which no name server can redirect, and the machine's own name.
    """
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([\w.-]+))(?::\d{1,5})?", header, re.ASCII)
    if found is None:
        return False
    (name, is_address), own = _normal(found[1] or found[2]), socket.gethostname()
    if host not in EVERYWHERE:
        return name in ("localhost", "127.0.0.1", "::1", _normal(host)[0])
    return is_address or name in ("localhost", _normal(own)[0], _normal(f"{own}.local")[0])


def _normal(name: str) -> tuple[str, bool]:
    """Return a name in its usual spelling, and whether it is an address."""
    name = name.partition("%")[0]
    try:
        return str(ipaddress.ip_address(name)), True
    except ValueError:
        return name.lower().rstrip("."), False


def _check_names(headers: Sequence[tuple[bytes, bytes]], host: str) -> None:
    """Raise :class:`Refused` if a request names another host, or a page of another site sends it."""
    hosts = [value.decode("latin-1") for key, value in headers if key == b"host"]
    if len(hosts) != 1 or not is_accepted(hosts[0], host):
        raise Refused(400, "this page does not have that name; use the address that lit-clip demo printed")
    for key, value in headers:
        if key == b"origin" and value.decode("latin-1").lower().partition("://")[2] != hosts[0].lower():
            raise Refused(403, "sent by a page of another site")


def _known(query: bytes) -> bytes:
    """Return the parameters of a query that the page uses."""
    with suppress(ValueError):
        given = parse_qs(query.decode("latin-1"), max_num_fields=10)
        known = {key: given[key][0] for key in ("session_hash", "__theme", "serialize", "v") if key in given}
        return urlencode({key: value for key, value in known.items() if WORD.fullmatch(value)}).encode()
    return b""


async def _body(receive: Receive, most: int) -> bytes:
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(MOST_SECONDS):
            while more:
                message = await receive()
                more = message.get("more_body", False)
                body += message.get("body", b"")
                if len(body) > most:
                    raise Refused(413, f"more than {most:,} bytes")
    except TimeoutError as error:
        raise Refused(408, f"took more than {MOST_SECONDS} seconds") from error
    return bytes(body)


def _received(body: bytes, then: Receive | None = None) -> Receive:
    """Return a channel that gives a body, and then what another gives."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return left.pop() if left or then is None else await then()

    return receive


async def _send_json(send: Send, status: int, value: Any) -> None:
    body = json.dumps(value).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status in (408, 413):
        headers += [(b"connection", b"close")]  # the rest of the body is not waited for
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
