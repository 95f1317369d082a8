"""Files of other machines: transfers that go on where they were interrupted, compared with their checksums.

Unlike huggingface_hub's client this keeps what arrived before a connection broke, joins no two versions of a file, and
stores an archive as the server has it, whatever encoding the server's headers call it.
"""

import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from hashlib import file_digest, sha1
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from lit_clip.errors import InputError, require
from lit_clip.tools.console import progress, size_in_bytes

CHUNK, ATTEMPTS, TIMEOUT = 1 << 20, 5, 60  # bytes; tries; seconds without an answer


class RemoteFile(NamedTuple):
    """A file to download: its checksum is SHA-256, or git's SHA-1; torchvision compares its own files with theirs."""

    url: str
    name: str  # in the set's folder
    size: int | None
    checksum: str = ""
    headers: Mapping[str, str] = {}  # of a login, which go to no other host


def part_of(path: Path) -> Path:
    """Return where a file is while it is transferred."""
    return path.with_name(f"{path.name}.part")


def size_on_server(url: str) -> int | None:
    """Ask for the size of a file; None: the server does not say."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT) as response:
            return int(response.headers["Content-Length"]) or None
    except (OSError, TypeError, ValueError):
        return None


def transfer(file: RemoteFile, path: Path) -> None:
    """Download a file; what an earlier call has left of it is not asked for again."""
    part = part_of(path)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _continue(file, part)
            break
        except (OSError, ValueError, HTTPException) as error:  # ValueError: no such kind of address, or another size
            refused = isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500 and error.code != 416
            if refused or isinstance(error, ValueError) or attempt == ATTEMPTS:
                hint = "run the same command again to resume"
                raise InputError(f"{file.url}: cannot be downloaded ({error}); {hint}") from error
            time.sleep(2**attempt / 10)
    if file.checksum:
        git = sha1(f"blob {part.stat().st_size}\0".encode(), usedforsecurity=False)
        with part.open("rb") as whole:
            digest = file_digest(whole, "sha256" if len(file.checksum) == 64 else lambda: git).hexdigest()
        if digest != file.checksum:
            part.unlink()
        require(digest == file.checksum, f"{file.url}: its checksum is {digest} instead of {file.checksum}; not kept")
    part.replace(path)


def _continue(file: RemoteFile, part: Path) -> None:
    """Append to ``part`` what is lacking; another size than the file's is a ``ValueError``."""
    request = urllib.request.Request(file.url, headers={"User-Agent": "lit-clip"})
    for name, value in file.headers.items():
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
        start = start if getattr(response, "status", None) == 206 else 0
        length = response.headers["Content-Length"]
        expected = start + int(length) if length else file.size
        if file.size not in (None, expected):  # such as the page of a login, instead of the file
            raise ValueError(f"the server sends {expected:,} bytes instead of {file.size:,}")
        named = response.headers["ETag"] or response.headers["Last-Modified"]
        usable = named and named.isprintable()  # it becomes a header
        version.write_text(named, encoding="utf-8") if usable else version.unlink(missing_ok=True)
        title = f"{Path(file.name).name} ({size_in_bytes(expected)})" if expected is not None else Path(file.name).name
        with part.open("ab" if start else "wb") as out, progress(title, (expected or 0) // CHUNK) as advance:
            advance(start // CHUNK)
            while chunk := response.read(CHUNK):
                out.write(chunk)
                advance(len(chunk) / CHUNK)
    size = part.stat().st_size
    if expected is not None and size != expected:
        raise OSError(f"it ended after {size:,} of {expected:,} bytes")
    version.unlink(missing_ok=True)
