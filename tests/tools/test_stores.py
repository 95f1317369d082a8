"""A store is asked for files in known ways, and no more is taken from it than was asked for."""

import asyncio
import gzip
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

import aiohttp
import pytest
from fsspec import AbstractFileSystem
from PIL import Image

from datamodules.loading import store
from datamodules.loading.store import StoreFolder
from datamodules.open_source import open_source
from datamodules.shards.pairs import ShardOptions
from lit_clip.errors import BadSample, InputError
from lit_clip.tools import store_answers
from lit_clip.tools.stores import PROTOCOLS, store_of
from lit_clip.weights.load import check_before_loading

MB = 1 << 20
ENDLESS = 300  # MB that the server sends if nobody stops it


class Handler(BaseHTTPRequestHandler):
    """Answers GET with ``endless`` MB in chunks or ``body``, and HEAD with the size ``told``."""

    protocol_version = "HTTP/1.1"
    body, told, encoding, first, sent = b"", 1000, "", b"", 0
    status = 200

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(self.told))
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(self.status)
        if self.encoding:
            self.send_header("Content-Encoding", self.encoding)
        if self.body:
            self.send_header("Content-Length", str(len(self.body)))
            self.end_headers()
            self.wfile.write(self.body)
            return
        self.send_header("Content-Type", "text/html")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        block = self.first + bytes(MB - len(self.first))
        with suppress(OSError):
            for _ in range(ENDLESS):
                self.wfile.write(b"%x\r\n%b\r\n" % (MB, block))
                type(self).sent += 1
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Handler]]]:
    """The address of a server, and its state."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    handler = type("ServerHandler", (Handler,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        httpd.daemon_threads = True
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}", handler
        httpd.shutdown()


def read_image(url: str) -> object:
    return StoreFolder(url).read(f"{url}/a.png", "row 2")


def read_checkpoint(url: str) -> object:
    return check_before_loading(f"{url}/a.ckpt")


@pytest.mark.parametrize("status", [200, 206])
def test_an_image_without_an_end_is_read_as_far_as_the_limit(
    server: tuple[str, type[Handler]], monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(store, "MAX_IMAGE_BYTES", 2 * MB)
    server[1].status = status
    with pytest.raises(BadSample, match="image .*a.png has more than 2 MB; make it smaller or remove the row"):
        read_image(server[0])
    assert server[1].sent < 50


def test_a_table_without_an_end_is_downloaded_as_far_as_its_size(
    server: tuple[str, type[Handler]], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"t.csv: received more than its 1000 bytes; did it change\? start again"):
        open_source(f"{server[0]}/t.csv")
    assert server[1].sent < 50
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size] == []


def test_a_shard_without_an_end_is_read_as_far_as_its_size(server: tuple[str, type[Handler]]) -> None:
    """Its index, too, which is looked for first."""
    options = ShardOptions(index_workers=0)
    with pytest.raises(InputError, match="x.tar"):
        open_source(f"{server[0]}/x.tar", shards=options)
    assert server[1].sent < 250


def test_a_list_of_shards_without_an_end_is_not_held(
    server: tuple[str, type[Handler]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_answers, "MOST", 2 * MB)
    with pytest.raises(InputError, match="the server sends more than 2,097,152 bytes"):
        open_source(f"{server[0]}/shards/")
    assert server[1].sent < 50


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip", "GZIP", "x"])
@pytest.mark.parametrize("read", [read_image, lambda url: open_source(f"{url}/t.csv"), read_checkpoint])
def test_a_compressed_answer_is_not_unpacked(
    server: tuple[str, type[Handler]], encoding: str, read: Callable[[str], object]
) -> None:
    """A megabyte could become gigabytes."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "png")
    server[1].body, server[1].encoding = gzip.compress(file.getvalue()), encoding
    server[1].told = len(server[1].body)
    with pytest.raises(InputError, match=r"127.0.0.1.*the server sends it compressed \('.*'\); have it sent as it is"):
        read(server[0])


def test_google_cloud_storage_unpacks_nothing_either(server: tuple[str, type[Handler]]) -> None:
    """gcsfs itself is not installed here; it makes its session with the option that stands below."""
    address, handler = server
    handler.body, handler.encoding = gzip.compress(bytes(MB)), "gzip"
    made: list[dict[str, Any]] = []

    class Recorded(AbstractFileSystem):
        cachable = False

        def __init__(self, session_kwargs: dict[str, Any]) -> None:
            made.append(session_kwargs)

    async def fetched() -> bytes:
        async with aiohttp.ClientSession(**made[0]) as session, session.get(address) as answer:
            return await answer.read()

    for protocol in ("gs", "gcs"):
        with patch.dict("fsspec.registry._registry", {protocol: Recorded}):
            store_of(f"{protocol}://bucket/a.png")
        with pytest.raises(InputError, match=r"the server sends it compressed \('gzip'\)"):
            asyncio.run(fetched())
        made.clear()


@pytest.mark.parametrize(
    "address",
    [
        "ftp://host/{}",
        "reference://x/{}",
        "jlab://host/{}",
        "github://a:b@main/{}",
        "simplecache::https://host/{}",
        "dir::s3://bucket/{}",
        "sftp://host/{}",
        "nonesuch://host/{}",
    ],
)
@pytest.mark.parametrize("name", ["t.csv", "x.tar", "shards/", "x.parquet"])
def test_other_protocols_are_one_line(address: str, name: str) -> None:
    with pytest.raises(InputError, match="files are read from s3://, .* alone; copy it there") as caught:
        open_source(address.format(name))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(address.format(name).split("::")[0][:10])


def test_a_checkpoint_of_another_protocol_is_one_line() -> None:
    with pytest.raises(InputError, match="files are read from s3://, .* alone"):
        check_before_loading("ftp://host/last.ckpt")


def test_every_protocol_is_one_of_fsspecs() -> None:
    from fsspec.registry import known_implementations

    assert set(PROTOCOLS) <= {*known_implementations, "memory"}
    assert store_of("memory://a/b")[1] == "/a/b"
