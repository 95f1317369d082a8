"""Requests to the page of ``lit-clip demo``: its whole application, with gradio, in this process."""

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from hypothesis import strategies as st

from lit_clip.commands.demo import QUIET, Trial, web_app
from lit_clip.commands.search import Searched
from tests.fuzz.inputs import Input, Inputs, edited_json, texts
from tests.fuzz.samples import whole_images
from tests.fuzz.target import Target
from tests.fuzz.targets.weights import tiny_model

FOLDER, STORED = "@folder@", "@stored@"  # in an input: the working folder, and an image that was uploaded
SECRET, IMAGE = b"what nobody uploaded", "rgb.png"
FILES = (f"{FOLDER}/secret.txt", f"{STORED}/../../../secret.txt", f"{FOLDER}/uploads/../secret.txt", "secret.txt")
DEVICES = ("/proc/self/environ", "/dev/zero")  # which the oracle lets be read
FILE = {"path": STORED, "orig_name": "a.png", "url": "/a", "size": 3, "meta": {"_type": "gradio.FileData"}}
SOON, LIMIT = 1.0, 15.0  # seconds after which the browser leaves, and in which the page has to be done
Message = dict[str, Any]
Answer = tuple[int, bytes]

opened: list[str] = []  # by whatever is asked


def requests() -> dict[str, Any]:
    """Return requests of the page, one after another."""
    head = {"host": "127.0.0.1:7860", "content-type": "application/json"}
    get, post = ({"method": method, "headers": head, "query": {}, "path": "/"} for method in ("GET", "POST"))
    call = {**post, "path": "/gradio_api/call/classify", "body": {"data": [FILE, "a, b", "a {}"]}}
    where = {**call, "path": "/gradio_api/call/locate", "body": {"data": [FILE, "a cat\na dog", ""]}}
    search = {**post, "path": "/gradio_api/call/search", "body": {"data": ["a cat", 2]}}
    body = {**call["body"], "fn_index": 1, "trigger_id": 3, "session_hash": "a", "event_data": None}
    join = {**post, "path": "/gradio_api/queue/join", "body": body}
    form = {"host": "127.0.0.1", "content-type": "multipart/form-data; boundary=x"}
    sent = '--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nP1 1 1 1\r\n--x--\r\n'
    file = [{**get, "path": f"/gradio_api/file={path}"} for path in (STORED, *FILES)]
    return {
        "calls": [call, search, where],
        "page": [get, {**get, "path": "/config"}, {**get, "path": "/gradio_api/info"}, *file],
        "queue": [join, {**get, "path": "/gradio_api/queue/data", "query": {"session_hash": "a"}}],
        "upload": [{**post, "headers": form, "path": "/gradio_api/upload", "body": sent}],
        "other": [{**join, "path": f"/gradio_api/{route}"} for route in ("run/classify", "component_server", "reset")],
    }


def hostile() -> tuple[Any, ...]:
    """Return values that name what was not uploaded, wherever in a request they come."""
    paths = (*FILES, *DEVICES, "http://127.0.0.1:9/a.png", f"file://{FOLDER}/secret.txt")
    files = [{**FILE, **changed} for path in paths for changed in ({"path": path}, {"url": path}, {"orig_name": path})]
    routes = [f"/gradio_api/{route}{path}" for path in paths for route in ("file=", "file/", "proxy=", "stream/")]
    return (*paths, *files, *routes, "somewhere.example", {"_type": "gradio.FileData"}, "../a", 3e9, "a" * 2**20)


def inputs() -> Inputs:
    """Return lists of requests in which values were changed, and forms with other images."""
    os.environ.update(QUIET, GRADIO_TEMP_DIR=str(Path.home() / "work/uploads"))  # as the driver's working folder
    import_module("gradio")
    sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
    words = texts("words").map(lambda made: made.data.decode("utf-8", "surrogatepass"))
    typed = st.tuples(words, words).map(lambda two: [{**requests()["calls"][0], "body": {"data": [FILE, *two]}}])
    return st.one_of(
        edited_json(requests, hostile()),
        edited_json(requests, hostile()),
        typed.map(lambda made: Input("typed", json.dumps(made).encode())),
    )


class Page:
    """The application and its event loop, for working folders of one path.

    Args:
        folder: the working folder.
        limited: whether requests are checked; otherwise gradio has them as they are.
    """

    def __init__(self, folder: Path, limited: bool) -> None:
        self.uploads = folder / "uploads"
        self.uploads.mkdir()
        assert os.environ["GRADIO_TEMP_DIR"] == str(self.uploads)
        model, names = tiny_model(), ["a.png", "b.png"]
        features = np.eye(2, model.config.embed_dim, dtype=np.float32)
        app = web_app(Trial(model, Searched(names, features, [folder / name for name in names])), "a", self.uploads)
        self.app: Any = app if limited else app.app
        self.loop = asyncio.new_event_loop()
        Thread(target=self.loop.run_forever, daemon=True).start()
        self.ready, self.end = asyncio.Event(), asyncio.Event()
        asyncio.run_coroutine_threadsafe(self._live(), self.loop)
        asyncio.run_coroutine_threadsafe(self.ready.wait(), self.loop).result(LIMIT)

    async def _live(self) -> None:
        start = [{"type": "lifespan.startup"}]

        async def receive() -> Message:
            if not start:
                await self.end.wait()
            return start.pop()

        async def send(message: Message) -> None:
            self.ready.set()

        await self.app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)

    def ask(self, request: dict[str, Any]) -> Answer:
        """Return the status and body of an answer, or as much of it as came before the browser left."""
        return asyncio.run_coroutine_threadsafe(self._ask(request), self.loop).result(LIMIT)

    async def _ask(self, request: dict[str, Any]) -> Answer:
        body, leaves = request.get("body", ""), self.loop.time() + SOON
        data = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else json.dumps(body).encode()
        given = [{"type": "http.request", "body": data, "more_body": False}]
        sent: list[Message] = []

        async def receive() -> Message:
            if given:
                return given.pop()
            await asyncio.sleep(leaves - self.loop.time())
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "root_path": ""}
        scope |= {"client": ("127.0.0.1", 9), "server": ("127.0.0.1", 7860), "state": {}, "method": request["method"]}
        query = "&".join(f"{key}={value}" for key, value in request["query"].items())
        headers = [(_latin(key).lower(), _latin(value)) for key, value in request["headers"].items()]
        scope |= {"path": request["path"], "query_string": _latin(query), "headers": headers}
        await self.app({**scope, "raw_path": _latin(request["path"])}, receive, send)
        return sent[0]["status"] if sent else 0, b"".join(message.get("body", b"") for message in sent)


def _latin(text: str) -> bytes:
    return text.encode("latin-1", "replace")


page = cache(Page)


def _is_request(value: Any) -> bool:
    """Whether a web server would pass it on."""
    kinds = {"method": str, "path": str, "query": dict, "headers": dict}
    if not isinstance(value, dict) or not all(isinstance(value.get(key), kind) for key, kind in kinds.items()):
        return False
    return all(isinstance(part, str) for key in ("query", "headers") for part in value[key].values())


def ask(folder: Path, given: Input, limited: bool = True) -> Iterator[str]:
    """Send requests, and ask for what came of the calls among them."""
    shown = page(folder, limited)
    shown.uploads.mkdir(exist_ok=True)
    (folder / "secret.txt").write_bytes(SECRET)
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(whole_images()[IMAGE])
    stored = shown.uploads / ("0" * 64) / "a.png"
    stored.parent.mkdir()
    stored.write_bytes(whole_images()[IMAGE])
    data = given.data.replace(STORED.encode(), str(stored).encode()).replace(FOLDER.encode(), str(folder).encode())
    try:
        asked = json.loads(data)
    except (ValueError, RecursionError):  # too deep
        asked = {**requests()["calls"][1], "body": data.decode()}
    opened.clear()
    for request in asked if isinstance(asked, list) else [asked]:
        if not _is_request(request):
            yield "skipped"
            continue
        status, body = shown.ask(request)
        _check(status, body, folder)
        if status == 200 and request["path"].startswith("/gradio_api/call/"):
            path = f"{request['path']}/{json.loads(body)['event_id']}"
            _check(*shown.ask({**request, "method": "GET", "path": path, "body": ""}), folder)
        yield "used" if status == 200 else "skipped"


def _check(status: int, body: bytes, folder: Path) -> None:
    assert status < 500, (status, body[:300])
    assert SECRET not in body, "a file of this machine in an answer"
    assert b"Traceback (most recent call last)" not in body, "a traceback in an answer"
    own = [str(folder / name) for name in ("uploads/", "a.png", "b.png")]
    for path in opened:
        hidden = path in DEVICES or (path.startswith(f"{folder}{os.sep}") and not path.startswith(tuple(own)))
        assert not hidden, f"{path} was opened"


demo = Target(inputs, ask, named=False)
unlimited = demo._replace(run=partial(ask, limited=False))
