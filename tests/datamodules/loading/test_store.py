"""A web server that fails: only one that says so has no such shard; the others are tried again, and end the run."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from datamodules.loading.store import StoreFolder
from datamodules.pairs.source import ShardOptions
from datamodules.shards.pairs import TarPairs
from lit_clip.errors import BadSample, InputError
from tests.helpers.tar_shards import numbered, write_tar

Answer = Callable[["Handler", int], object]  # with the number of the request, from 1
Serve = Callable[[Answer], AbstractContextManager[str]]


class Handler(BaseHTTPRequestHandler):
    content = b""
    answer: Answer
    requests = 0

    def log_message(self, format: str, *args: object) -> None:
        pass

    def status(self, code: int, **headers: str) -> None:
        self.send_response(code)
        for name, value in ({"Content_Length": "0"} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def whole(self, length: str | None = None) -> None:
        self.status(200, Content_Length=length or str(len(self.content)))
        if self.command == "GET":
            self.wfile.write(self.content)

    def do_GET(self) -> None:  # noqa: N802  # http.server's name
        if "index" in self.path:
            self.status(404)
            return
        type(self).requests += 1
        type(self).answer(self, self.requests)

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr("datamodules.loading.store.time.sleep", waited.append)
    monkeypatch.setattr("lit_clip.tools.hub_client.SILENT_SECONDS", 0.5)
    return waited


@pytest.fixture
def serve(tmp_path: Path, waits: list[float]) -> Serve:
    write_tar(tmp_path / "x.tar", numbered(3))

    @contextmanager
    def serving(answer: Answer) -> Iterator[str]:
        members = {"content": (tmp_path / "x.tar").read_bytes(), "answer": answer, "requests": 0}
        with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), members)) as server:
            server.daemon_threads = True
            server.block_on_close = False
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}/x.tar"
            server.shutdown()

    return serving


def opened(url: str, folder: Path) -> TarPairs:
    """Open the shard at a URL and one on disk, of which one is enough under ``skip``."""
    other = folder / "other.tar"
    write_tar(other, numbered(2, 50))
    options = ShardOptions(index_workers=0, cache_folder=str(folder / "cache"))
    source = TarPairs([url, str(other)], options, on_error="skip")
    for index in range(len(source)):
        source.load(index, None)
    return source


def cut(handler: Handler, number: int) -> None:
    handler.status(200, Content_Length=str(len(handler.content)))
    if handler.command == "GET":
        handler.wfile.write(handler.content[:1000])


def stuck(handler: Handler, number: int) -> None:
    threading.Event().wait(5)


FAILURES: dict[str, Answer] = {
    **{f"HTTP {code}": lambda handler, _, code=code: handler.status(code) for code in (400, 401, 403, 429, 500, 503)},
    "closed": lambda handler, _: handler.connection.close(),
    "silent": stuck,
    "no HTTP": lambda handler, _: handler.wfile.write(b"\xff\x00 garbage\r\n\r\n"),
    "truncated": cut,
    "redirected to a file": lambda handler, _: handler.status(302, Location="file:///etc/passwd"),
    "redirected in a circle": lambda handler, _: handler.status(302, Location="/x.tar"),
    "length is no number": lambda handler, _: handler.whole("many"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_shard_that_a_server_cannot_send_now_ends_the_run_even_where_missing_ones_are_skipped(
    tmp_path: Path, serve: Serve, name: str
) -> None:
    with serve(FAILURES[name]) as url, pytest.raises(InputError, match="cannot be fetched .*; tried 3 times"):
        opened(url, tmp_path)


@pytest.mark.parametrize("code", [404, 410])
def test_shard_that_a_server_says_is_absent_is_skipped_and_counted(tmp_path: Path, serve: Serve, code: int) -> None:
    with serve(lambda handler, _: handler.status(code)) as url:
        source = opened(url, tmp_path)
    assert (len(source), source.left_out.counts["missing shard"]) == (2, 1)


@pytest.mark.parametrize(
    ("asked", "waited"), [(None, 1.0), ("7", 7.0), ("99999", 60.0), ("-3", 1.0), ("soon", 1.0), ("nan", 1.0)]
)
def test_overloaded_server_is_given_the_time_that_it_asks_for(
    tmp_path: Path, serve: Serve, waits: list[float], asked: str | None, waited: float
) -> None:
    headers = {} if asked is None else {"Retry_After": asked}
    # fsspec asks in two ways before it gives up
    answer = lambda handler, number: handler.status(503, **headers) if number <= 2 else handler.whole()  # noqa: E731
    with serve(answer) as url:
        assert len(opened(url, tmp_path)) == 5
    assert waits == [waited]


def test_refused_connection_is_no_missing_shard(tmp_path: Path, waits: list[float]) -> None:
    with pytest.raises(InputError, match="127.0.0.1:1/x.tar: cannot be fetched"):
        opened("http://127.0.0.1:1/x.tar", tmp_path)
    assert waits == [1.0, 2.0]


@pytest.mark.parametrize(
    "name",
    ["http://127.0.0.1/x.png", "file:///etc/passwd", "pipe://cat x", "simplecache::http://h/x", "s3://b/x::file:///etc"]
    + ["x::http://127.0.0.1/y", "s3://b@evil/x", "S4://b/x"],
)
def test_table_cannot_choose_where_its_images_are_fetched_from(name: str) -> None:
    with pytest.raises(BadSample, match="row 1: "):
        StoreFolder("s3://b/folder").locate(name, "t.csv row 1")
