"""Serve the page of ``lit-clip demo`` and its requests over HTTP.

A request brings the image that it asks about as bytes. Nothing that a client sends is stored under a name, opened as a
path or fetched as an address.
"""

import asyncio
import ipaddress
import re
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import uvicorn
from python_multipart.exceptions import FormParserError
from starlette.applications import Starlette
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lit_clip.commands.demo_trial import MOST_BYTES, MOST_IMAGES, SHOWN, Trial
from lit_clip.errors import InputError
from lit_clip.tools.console import plural
from lit_clip.tools.html import render, thumbnail

TABS = {"locate": "lit_clip.commands.demo_locate"}  # more of the page, by the room that answers
TEMPLATES = Path(__file__).parent / "templates"
MOST_TEXT = 2**20  # bytes of a field of a form
MOST_SECONDS = 120  # for a form to arrive
OPEN, WORKING = 16, 4  # requests that are received, and that the model answers, at once; others wait
MOST_CONNECTIONS = 256
EVERYWHERE = ("", "0", "0.0.0.0", "::")  # noqa: S104  # addresses to listen on that stand for all of a machine
HEADERS = [  # the browser loads nothing from elsewhere and is shown in no other page
    ("Content-Security-Policy", "default-src 'self'; img-src data: blob:; style-src 'unsafe-inline'; "
     "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"),
    ("X-Content-Type-Options", "nosniff"),
]  # fmt: skip


def web_app(trial: Trial, name: str, host: str = "127.0.0.1") -> Starlette:
    """Return the app of a model's page and its requests: ``/classify``, ``/locate``, ``/search`` and ``/own_classes``.

    A request is a form whose fields are the arguments of the method of that name; an answer is JSON.
    """
    folder = trial.searched
    answers: dict[str, Callable[..., Any]] = {"classify": trial.classify}
    answers |= {name: import_module(room).Tab(trial.model) for name, room in TABS.items()}
    if folder:
        answers["search"] = trial.search
    if trial.headed:
        answers["own_classes"] = trial.own_classes
    parameters = sum(parameter.numel() for parameter in trial.model.parameters())
    more = f", {plural(len(folder.names), 'image')}" if folder else ""
    values: dict[str, Any] = {"title": name, "facts": f"{parameters / 1e6:,.1f} M parameters{more}"}
    values |= {"tabs": list(answers), "most_images": MOST_IMAGES}
    page = render(TEMPLATES / "demo.html", **values, alone=trial.model.logit_bias is not None)
    received, working = asyncio.Semaphore(OPEN), asyncio.Semaphore(WORKING)

    async def show(request: Request) -> Response:
        return HTMLResponse(page)

    async def script(request: Request) -> Response:
        return FileResponse(TEMPLATES / "demo.js", media_type="text/javascript")

    async def answer(request: Request) -> Response:
        function = answers.get(request.path_params["name"])
        if function is None:
            raise HTTPException(404, "no such page")
        async with received:
            try:
                async with asyncio.timeout(MOST_SECONDS):
                    form = await request.form(max_files=1, max_fields=4, max_part_size=MOST_TEXT)
            except TimeoutError as error:
                raise _closing(408, f"took more than {MOST_SECONDS} seconds") from error
            try:
                async with working:
                    found = await asyncio.to_thread(lambda: _plain(function(**_arguments(function, form))))
            finally:
                await form.close()
        return JSONResponse(found)

    async def refuse(request: Request, error: Exception) -> Response:
        status, problem = (error.status_code, error.detail) if isinstance(error, HTTPException) else (400, str(error))
        return JSONResponse({"detail": problem}, status, getattr(error, "headers", None))

    app = Starlette(
        routes=[Route("/", show), Route("/demo.js", script), Route("/{name}", answer, methods=["POST"])],
        middleware=[Middleware(OwnPage, host=host)],
        exception_handlers=dict.fromkeys((HTTPException, InputError, ClientDisconnect, FormParserError), refuse),
    )
    app.router.redirect_slashes = False
    return app


def _arguments(function: Callable[..., Any], form: FormData) -> dict[str, Any]:
    """Return the arguments of a method from a form: a file for ``image``, texts for the others."""
    arguments: dict[str, Any] = {}
    for name in signature(function).parameters:
        typed = form.get(name)
        if name == "image":
            arguments[name] = typed.file if isinstance(typed, UploadFile) and typed.size else None
        elif isinstance(typed, str):
            arguments[name] = typed
    return arguments


def _plain(found: Any) -> Any:
    if isinstance(found, dict):
        return found
    return [{"image": thumbnail(image, 2 * SHOWN), "caption": caption} for image, caption in found]


class OwnPage:
    """Middleware that refuses other host names, pages of other sites, and bodies that are too long."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app, self.host = app, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refused := self._refused(Headers(scope=scope))):
            await refused(scope, receive, send)
        else:
            with suppress(asyncio.CancelledError):  # of a request that the end of the demo interrupts
                await self.app(scope, _bounded(receive), send)

    def _refused(self, headers: Headers) -> Response | None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not is_accepted(hosts[0], self.host):
            problem = "this page does not have that name; use the address that lit-clip demo printed"
            return JSONResponse({"detail": problem}, 400)
        if any(each.lower().partition("://")[2] != hosts[0].lower() for each in headers.getlist("origin")):
            return JSONResponse({"detail": "sent by a page of another site"}, 403)
        return None


def _bounded(receive: Receive) -> Receive:
    size, most = 0, MOST_BYTES + 4 * MOST_TEXT

    async def receive_bounded() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > most:
            raise _closing(413, f"more than {most:,} bytes")
        return message

    return receive_bounded


def _closing(status: int, problem: str) -> HTTPException:
    return HTTPException(status, problem, {"Connection": "close"})  # the rest of the body is not waited for


def is_accepted(header: str, host: str) -> bool:
    """Return whether a Host header names the address we listen on, so that no other name can point here.

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


def serve(app: ASGIApp, listening: socket.socket) -> None:
    """Serve requests until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options: dict[str, Any] = {"limit_concurrency": MOST_CONNECTIONS, "timeout_graceful_shutdown": 1, "ws": "none"}
    config = uvicorn.Config(app, log_level="warning", headers=HEADERS, proxy_headers=False, **options)
    with suppress(KeyboardInterrupt):  # uvicorn raises it again after it has ended
        uvicorn.Server(config).run(sockets=[listening])
