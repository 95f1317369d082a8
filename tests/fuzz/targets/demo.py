"""Requests to the page of ``lit-clip demo``: its whole application, in this process."""

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from lit_clip.commands.demo_trial import Source, Trial
from lit_clip.commands.search import Searched
from lit_clip.embedding.index import nearest
from tests.fuzz.inputs import Input, Inputs, Target, edited_json, texts
from tests.fuzz.samples import whole_images
from tests.fuzz.targets.weights import tiny_model
from tests.helpers.demo import form

FOLDER, IMAGE = "@folder@", "@image@"  # in an input: the working folder, and the bytes of an image
SECRET = b"what nobody uploaded"
FILES = (f"{FOLDER}/secret.txt", f"{FOLDER}/a.png/../secret.txt", f"file://{FOLDER}/secret.txt", "secret.txt")
DEVICES = ("/proc/self/environ", "/dev/zero")  # which the oracle lets be read
LIMIT = 15.0  # seconds in which a request has to be answered
Message = dict[str, Any]

opened: list[str] = []  # by whatever is asked


class Leaky(Trial):
    """The page of a model that would open what is typed."""

    def classify(self, image: Source = None, names: str = "", templates: str = "") -> dict[str, float]:
        for name in filter(os.path.isfile, names.splitlines()):
            with open(name, "rb") as file:
                return {file.read(1000).decode("latin-1"): 1.0}
        return super().classify(image, names)


def requests() -> dict[str, Any]:
    """Return requests of the page, one after another."""
    post = {"method": "POST", "headers": {"host": "127.0.0.1:7860"}, "path": "/classify"}
    classify = {**post, "fields": {"image": IMAGE, "names": "a, b", "templates": "a {}"}}
    locate = {**post, "path": "/locate", "fields": {"image": IMAGE, "texts": "a cat\na dog", "background": ""}}
    search = {**post, "path": "/search", "fields": {"text": "a cat", "count": "2"}}
    get = {**post, "method": "GET", "fields": {}}
    paths = ("/", "/demo.js", "/classify", *FILES)
    return {
        "forms": [classify, search, locate],
        "image": [{**classify, "fields": {**classify["fields"], "image": path}} for path in FILES],
        "page": [{**get, "path": path} for path in paths],
        "body": [{**post, "body": "image=a", "headers": {"host": "127.0.0.1", "content-type": "multipart/form-data"}}],
    }


def hostile() -> tuple[Any, ...]:
    """Return values that name what was not uploaded, wherever in a request they come."""
    return (*FILES, *DEVICES, "http://127.0.0.1:9/a.png", "somewhere.example", "../a", "3e9", "a" * 2**20, "a\r\n\r\nb")


def inputs() -> Inputs:
    """Return lists of requests in which values were changed."""
    sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
    words = texts("words").map(lambda made: made.data.decode("utf-8", "replace"))
    fields = st.tuples(words, words).map(lambda two: {"image": IMAGE, "names": two[0], "templates": two[1]})
    typed = fields.map(lambda each: [{**requests()["forms"][0], "fields": each}])
    made = typed.map(lambda each: Input("typed", json.dumps(each).encode()))
    return st.one_of(edited_json(requests, hostile()), edited_json(requests, hostile()), made)


@cache
def page(folder: Path, kind: type[Trial]) -> Any:
    from lit_clip.commands.demo_server import web_app

    model, names = tiny_model(), ["a.png", "b.png"]
    features = np.eye(2, model.config.embed_dim, dtype=np.float32)
    return web_app(kind(model, Searched(names, partial(nearest, features), [folder / name for name in names])), "a")


async def answer(app: Any, request: dict[str, Any]) -> tuple[int, bytes]:
    """Return the status and body of an answer."""
    image = whole_images()["rgb.png"]
    filled = {key: image if value == IMAGE else value for key, value in request.get("fields", {}).items()}
    body, kind = form(filled)
    body = request["body"].encode("utf-8", "replace") if isinstance(request.get("body"), str) else body
    given, sent = [{"type": "http.request", "body": body, "more_body": False}], list[Message]()

    async def receive() -> Message:
        return given.pop() if given else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = {"content-type": kind["Content-Type"], **request["headers"]}
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "root_path": ""}
    scope |= {
        "client": ("127.0.0.1", 9),
        "server": ("127.0.0.1", 7860),
        "method": request["method"],
        "query_string": b"",
    }
    scope |= {"path": request["path"], "raw_path": request["path"].encode("utf-8", "replace")}
    scope["headers"] = [
        (key.lower().encode("latin-1", "replace"), value.encode("latin-1", "replace")) for key, value in headers.items()
    ]
    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


def _is_request(value: Any) -> bool:
    """Whether a web server would pass it on."""
    kinds = {"method": str, "path": str, "headers": dict}
    if not isinstance(value, dict) or not all(isinstance(value.get(key), kind) for key, kind in kinds.items()):
        return False
    texts = isinstance(value.get("fields", {}), dict) and all(
        isinstance(each, str) for each in value["headers"].values()
    )
    return texts and value["path"].startswith("/")


def ask(folder: Path, given: Input, kind: type[Trial] = Trial) -> Iterator[str]:
    """Send requests; check what their answers and opened files give away."""
    (folder / "secret.txt").write_bytes(SECRET)
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(whole_images()["rgb.png"])
    app = page(folder, kind)
    asked = json.loads(given.data.replace(FOLDER.encode(), str(folder).encode()))
    opened.clear()
    for request in asked if isinstance(asked, list) else [asked]:
        if not _is_request(request):
            yield "skipped"
            continue
        status, body = asyncio.run(asyncio.wait_for(answer(app, request), LIMIT))
        _check(status, body, folder)
        yield "used" if status == 200 else "skipped"


def _check(status: int, body: bytes, folder: Path) -> None:
    assert status < 500, (status, body[:300])
    assert SECRET not in body, "a file of this machine in an answer"
    own = [str(folder / name) for name in ("a.png", "b.png")]  # which a search shows
    for path in opened:
        hidden = path in DEVICES or (path.startswith(f"{folder}{os.sep}") and not path.startswith(tuple(own)))
        assert not hidden, f"{path} was opened"


demo = Target(inputs, ask, named=False)
leaky = demo._replace(run=partial(ask, kind=Leaky))
