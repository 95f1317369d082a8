"""A store is asked for files in known ways, which arrive as they are stored."""

import asyncio
import gzip
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

import aiohttp
import pytest
from fsspec import AbstractFileSystem
from PIL import Image

from datamodules.loading.store import StoreFolder
from datamodules.open_source import open_source
from lit_clip.errors import InputError
from lit_clip.tools.hub_client import PROTOCOLS, store_of
from lit_clip.weights.load import open_checkpoint

MB = 1 << 20


class Handler(BaseHTTPRequestHandler):
    """Answers GET with ``body``, and HEAD with the size ``told``."""

    protocol_version = "HTTP/1.1"
    body, told, encoding = b"", 1000, ""
    accepted: set[str | None] = set()  # encodings that were asked for

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(self.told))
        self.end_headers()

    def do_GET(self) -> None:
        self.accepted.add(self.headers["Accept-Encoding"])
        self.send_response(200)
        if self.encoding:
            self.send_header("Content-Encoding", self.encoding)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Handler]]]:
    """The address of a server, and its state."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    handler = type("ServerHandler", (Handler,), {"accepted": set()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        httpd.daemon_threads = True
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}", handler
        httpd.shutdown()


def test_a_table_of_another_size_than_the_server_told_is_not_kept(
    server: tuple[str, type[Handler]], tmp_path: Path
) -> None:
    server[1].body = b"image,caption\n" * 10
    with pytest.raises(InputError, match=r"t.csv: received 140 bytes instead of 1000; did it change\? start again"):
        open_source(f"{server[0]}/t.csv")
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size] == []


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip", "GZIP", "x"])
def test_a_compressed_answer_is_not_unpacked(server: tuple[str, type[Handler]], encoding: str) -> None:
    """As the size that the server tells is that of the file, and an archive may be called compressed."""
    address, handler = server
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "png")
    handler.body, handler.encoding = gzip.compress(file.getvalue()), encoding
    assert StoreFolder(address).read(f"{address}/a.png", "row 2") == handler.body
    assert handler.accepted == {"identity"}


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
        assert asyncio.run(fetched()) == handler.body
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
        open_checkpoint("ftp://host/last.ckpt")


def test_every_protocol_is_one_of_fsspecs() -> None:
    from fsspec.registry import known_implementations

    assert set(PROTOCOLS) <= {*known_implementations, "memory"}
    assert store_of("memory://a/b")[1] == "/a/b"
