"""Read files from stores (s3://, gs://, https://, hf://, ...) with retries."""

import os
import posixpath
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

from lit_clip.errors import BadSample, InputError, require
from lit_clip.tools import hub_client
from lit_clip.tools.hub_client import store_of

T = TypeVar("T")

ATTEMPTS = 3  # to reach a store that does not answer
LONGEST_WAIT = 60.0  # seconds between attempts, even if the server asks for more
ABSENT = (404, 410)  # HTTP statuses that say that there is no such file; others say nothing about it
VERSIONS = ("ETag", "etag", "blob_id", "LastModified", "Last-Modified", "last_modified", "mtime", "updated", "created")


class Stamp(NamedTuple):
    """Identify a version of a file by its size in bytes and its modification time or the store's tag."""

    size: int
    version: str


def is_remote(url: str) -> bool:
    """Return whether fsspec opens a URL; ``file://`` is local."""
    return "://" in url


def retry(url: str, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Call a store up to ``ATTEMPTS`` times, with growing waits or the waits that the store requests.

    Only a store that says so has no such file, and raises :class:`FileNotFoundError` here.
    """
    for attempt in range(ATTEMPTS):
        try:
            return function(*arguments, **options)
        except Exception as error:  # every store has its own exceptions
            causes = list(_causes(error))
            for refusal in causes:
                if isinstance(refusal, InputError):
                    raise InputError(f"{url}: {refusal}") from error
            statuses = [status for cause in causes if (status := getattr(cause, "status", None)) is not None]
            absent = [status in ABSENT for status in statuses] or [isinstance(causes[-1], FileNotFoundError)]
            if all(absent):
                raise FileNotFoundError(url) from error
            if attempt == ATTEMPTS - 1:
                raise InputError(f"{url}: cannot be fetched ({_reason(causes[-1])}); tried {ATTEMPTS} times") from error
            time.sleep(max(2.0**attempt, *map(_wanted_wait, causes)))
    raise AssertionError("unreachable")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes: fsspec reports any web server's refusal as a missing file."""
    while error is not None:
        yield error
        error = error.__cause__


def _reason(error: BaseException) -> str:
    status, words = getattr(error, "status", None), " ".join(str(getattr(error, "message", "") or error).split())
    if isinstance(error, TimeoutError):
        return f"no answer for {hub_client.SILENT_SECONDS:.0f} s"
    return " ".join(filter(None, (f"HTTP {status}" if status else "", words[:200]))) or type(error).__name__


def _wanted_wait(error: BaseException) -> float:
    """Return the seconds that a server asks to wait, up to ``LONGEST_WAIT``; 0 if it asks for none."""
    asked = (getattr(error, "headers", None) or {}).get("Retry-After", "0")
    try:
        seconds = float(asked)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(asked).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(LONGEST_WAIT, max(0.0, seconds))  # 0 for NaN


def stamp_of(url: str) -> Stamp:
    """Return a stamp that changes with the file; :class:`FileNotFoundError` if it does not exist."""
    if not is_remote(url):
        try:
            status = os.stat(url)
        except OSError as error:  # such as a link to itself
            if isinstance(error, FileNotFoundError):
                raise
            raise InputError(f"{url}: cannot be read ({error.strerror})") from error
        require(os.path.isfile(url), f"{url}: not a file")
        return Stamp(status.st_size, str(status.st_mtime_ns))
    store, path = store_of(url)
    info = retry(url, store.info, path)
    if info.get("size") is None:
        raise InputError(f"{url}: the server does not report its size; download it and name the file")
    return Stamp(info["size"], str(next((info[key] for key in VERSIONS if info.get(key)), "")))


def fetch(url: str, stamp: Stamp, path: Path, before: Callable[[], None] = lambda: None) -> None:
    """Download a whole file, unless it exists; one process downloads it for all that ask.

    ``before`` is called before a download, to make room for it.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists():
            return
        before()
        part = path.with_suffix(".part")  # always the same name, so that a killed run leaves one at most
        store, remote = store_of(url)
        try:
            retry(url, store.get_file, remote, str(part))
            received = part.stat().st_size
            require(
                received == stamp.size,
                f"{url}: received {received} bytes instead of {stamp.size}; did it change? start again",
            )
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


class StoreFolder:
    """A folder in a store; a table's relative image paths start from it."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") if not url.endswith("://") else url

    def __str__(self) -> str:
        return self.url

    def locate(self, name: str, where: str) -> "Path | str":
        """Return an image's address: a URL in this store, or the path of a local file if ``name`` is absolute.

        A table is data: it may name files of its own store, and neither a store of its choice nor, after two colons,
        one of fsspec's ways to unpack or fetch a file.
        """
        if "::" in name:
            raise BadSample(where, "image in another store", f"{name} chains stores; copy the image to {self.url}")
        if is_remote(name):
            if urlsplit(name)[:2] == urlsplit(self.url)[:2]:
                return name
            ours = urlunsplit((*urlsplit(self.url)[:2], "", "", ""))
            raise BadSample(where, "image in another store", f"{name} is not in {ours}; copy it there")
        if os.path.isabs(name):
            return Path(name)
        parts = urlsplit(self.url)
        if parts.scheme in ("http", "https"):
            name = quote(name)
        path = posixpath.normpath(f"/{parts.path}/{name}").lstrip("/")
        return f"{parts.scheme}://{parts.netloc}/{path}"

    def read(self, url: str, where: str) -> bytes:
        """Return the content of an image file."""
        store, path = store_of(url)
        try:
            return retry(url, store.cat_file, path)
        except FileNotFoundError as error:
            raise BadSample(where, "missing image", f"no such image file: {url}") from error
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
