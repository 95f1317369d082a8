"""A running ``lit-clip demo``, and the HTTP that its page and others speak to it."""

import io
import json
import os
import re
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.helpers import forks

SERVED = re.compile(r"^demo: http://\S+:(\d+) \(Ctrl-C ends it\)$", re.MULTILINE)
Answer = tuple[int, bytes, dict[str, str]]


def skip_without_starlette() -> None:
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        pytest.skip("the extra demo is not installed")


@contextmanager
def running(checkpoint: Path, folder: Path, *options: str) -> Iterator[tuple[int, list[str]]]:
    """Run a demo; give its port and what it printed until it served. At its end it has printed no traceback."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "IN_THE_ENVIRONMENT": "a secret"}
    environment |= {f"{name}_PROXY": "http://127.0.0.1:9" for name in ("HTTP", "HTTPS", "ALL")}  # nothing is fetched
    words = ["lit-clip", "demo", "--model", str(checkpoint), "--port", "0", *options]
    with TemporaryDirectory() as output:
        out, err = Path(output, "out"), Path(output, "err")
        with forks.running(forks.Program(forks.command, words, Path.cwd(), environment), out, err) as process:
            served, limit = None, time.monotonic() + 120
            while served is None and process.is_alive() and time.monotonic() < limit:
                time.sleep(0.05)
                served = SERVED.search(err.read_text()) if err.exists() else None
            assert served is not None, err.read_text()
            yield int(served[1]), err.read_text().splitlines()
            process.terminate()
            process.join(60)
            assert "Traceback" not in err.read_text(), err.read_text()
            assert process.exitcode == 0


def ask(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
    connection = HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request(method, path, body, {"Host": f"127.0.0.1:{port}", **headers})
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.getheaders())


def get(port: int, path: str, host: str = "127.0.0.1") -> Answer:
    return ask(port, "GET", path, Host=f"{host}:{port}")


def form(fields: dict[str, Any], name: str = "a.png") -> tuple[bytes, dict[str, str]]:
    """Return the body and headers of a form; bytes are files."""
    parts = []
    for key, value in fields.items():
        is_file = isinstance(value, bytes)
        content = value if is_file else str(value).encode()
        file = f'; filename="{name}"' if is_file else ""
        parts.append(f'--x\r\nContent-Disposition: form-data; name="{key}"{file}\r\n\r\n'.encode() + content)
    return b"\r\n".join([*parts, b"--x--\r\n"]), {"Content-Type": "multipart/form-data; boundary=x"}


def post(port: int, path: str, fields: dict[str, Any], name: str = "a.png", **headers: str) -> tuple[int, Any]:
    """Send a form; return the status and the JSON of the answer."""
    body, kind = form(fields, name)
    status, answer, _ = ask(port, "POST", f"/{path}", body, **kind, **headers)
    return status, json.loads(answer)


def png(width: int, height: int) -> bytes:
    """Return a picture that is all zeros and much smaller than its pixels."""
    file = io.BytesIO()
    Image.new("1", (1, 1)).save(file, "png")
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = file.getvalue()
    return data[:8] + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + data[33:]
