"""Files of other machines: transfers that go on where they were interrupted, compared with their checksums."""

import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from hashlib import md5, sha1, sha256
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from lit_clip.errors import InputError
from lit_clip.tools.console import progress, size_in_bytes

CHUNK = 1 << 20  # bytes
ATTEMPTS = 5
TIMEOUT = 60  # seconds without an answer
RESUME = "run the same command again to resume"


class Checksum(NamedTuple):
    """A file's digest: ``md5``, ``sha256``, or ``git``, which is the SHA-1 of git's header and the file."""

    kind: str
    digest: str


class Transfer(NamedTuple):
    """A file to download.

    Attributes:
        url: where from.
        path: where to.
        size: in bytes; None: unknown.
        checksum: None: there is none.
        archive: whether it is only there to be unpacked.
        headers: of the request, which are not sent to a host that it is redirected to.
    """

    url: str
    path: Path
    size: int | None
    checksum: Checksum | None
    archive: bool = False
    headers: Mapping[str, str] = {}


def size_on_server(url: str) -> int | None:
    """Ask for the size of a file; None: the server does not say."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT) as response:
            return int(response.headers["Content-Length"]) or None
    except (OSError, TypeError, ValueError):
        return None


def lacking(kept: Path, size: int) -> int:
    """Return how many bytes of a file are still to be transferred by :func:`fetch`."""
    have = [path.stat().st_size for path in (kept, _part(kept)) if path.exists()]
    return max(0, size - sum(have))


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def fetch(transfer: Transfer, path: Path) -> None:
    """Download a file to ``path``, unless it is there; what an earlier call has left of it is not asked for again."""
    if path.exists():
        if transfer.size in (None, path.stat().st_size):
            return
        path.unlink()
    part = _part(path)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _continue(transfer, part)
            break
        except (OSError, ValueError, HTTPException) as error:  # ValueError: no such kind of address, or another size
            refused = isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500 and error.code != 416
            if refused or isinstance(error, ValueError) or attempt == ATTEMPTS:
                raise InputError(f"{transfer.url}: cannot be downloaded ({error}); {RESUME}") from error
            time.sleep(2**attempt / 10)
    if transfer.checksum is not None and (found := _digest(part, transfer.checksum.kind)) != transfer.checksum.digest:
        part.unlink()
        what = f"its {transfer.checksum.kind} checksum is {found} instead of {transfer.checksum.digest}"
        raise InputError(f"{transfer.url}: {what}, so it is not kept")
    part.replace(path)


def _continue(transfer: Transfer, part: Path) -> None:
    """Append to ``part`` what is lacking.

    Raises:
        OSError: the transfer ended early.
        ValueError: the server's file has another size than ``transfer``.
    """
    request = urllib.request.Request(transfer.url, headers={"User-Agent": "lit-clip"})
    for name, value in transfer.headers.items():
        request.add_unredirected_header(name, value)
    version = part.with_name(f"{part.name}.version")  # of the file on the server, as it calls it
    start = part.stat().st_size if part.exists() and version.exists() else 0
    if start:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", version.read_text(encoding="utf-8"))
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # there is nothing after what we have: start again
            part.unlink(missing_ok=True)
        raise
    with response:
        if getattr(response, "status", None) != 206:
            start = 0
        length = response.headers["Content-Length"]
        expected = start + int(length) if length else transfer.size
        if transfer.size not in (None, expected):  # such as the page of a login, instead of the file
            raise ValueError(f"the server sends {expected:,} bytes instead of {transfer.size:,}")
        named = response.headers["ETag"] or response.headers["Last-Modified"]
        usable = named and named.isprintable()  # it becomes a header
        version.write_text(named, encoding="utf-8") if usable else version.unlink(missing_ok=True)
        title = f"{transfer.path.name} ({size_in_bytes(expected)})" if expected is not None else transfer.path.name
        with part.open("ab" if start else "wb") as file, progress(title, (expected or 0) // CHUNK) as advance:
            advance(start // CHUNK)
            while chunk := response.read(CHUNK):
                if expected is not None and file.tell() + len(chunk) > expected:
                    raise ValueError(f"the server sends more than {expected:,} bytes")
                file.write(chunk)
                advance(len(chunk) / CHUNK)
    size = part.stat().st_size
    if expected is not None and size != expected:
        raise OSError(f"it ended after {size:,} of {expected:,} bytes")
    version.unlink(missing_ok=True)


def _digest(path: Path, kind: str) -> str:
    if kind == "git":
        digest = sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    else:
        digest = sha256() if kind == "sha256" else md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
