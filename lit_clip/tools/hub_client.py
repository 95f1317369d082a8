"""Open stores; check names from one, a hub or a listing before they become a path; guard huggingface_hub's client.

huggingface_hub 2.4 names files in its cache after the ETag and the commit that a server sends, unchecked. transformers,
timm, open_clip and fsspec's ``hf://`` use the same client.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import fsspec

from lit_clip.errors import UNPRINTABLE, InputError, require
from lit_clip.tools.reading import first_line
from lit_clip.tools.untrusted import shortened

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
TAG = re.compile(r"[\w+=:~-][\w.+=:~-]{0,199}", re.ASCII)  # an ETag as huggingface_hub names a file after it
LONGEST_PART = 200  # bytes of a file's name, which other names are made from


def guard_hub() -> None:
    """Make huggingface_hub's client, also one set by the user, check answers; call this before any use."""
    from huggingface_hub import set_client_factory  # takes seconds
    from huggingface_hub.utils import _http

    make = _http._GLOBAL_CLIENT_FACTORY
    if getattr(make, "func", None) is not _client:
        set_client_factory(partial(_client, make))


@contextmanager
def hub_errors(where: str, ending: str = "") -> Iterator[None]:
    """Guard the hub's client, and turn any error of a library that uses the hub or its cache into one line.

    They raise anything: without a network, for an unknown name, and for damaged or foreign files. The line is
    ``where (reason)``, followed by ``ending``.
    """
    guard_hub()
    try:
        yield
    except Exception as error:
        raise InputError(f"{where} ({first_line(error)}){ending}") from error


@contextmanager
def without_bar() -> Iterator[None]:
    """Have transformers open a folder without a progress bar, which would be a line of every command's output."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _client(make: Callable[[], Any]) -> Any:
    client = make()
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "response": [*hooks.get("response", []), _check_answer]}
    return client


def _check_answer(response: Any) -> None:
    """Check answers that become paths: headers, a repository's description, and a list of its files."""
    headers = response.headers
    if "X-Repo-Commit" in headers:
        checked_commit(headers["X-Repo-Commit"])
    tag = headers.get("X-Linked-Etag") or headers.get("ETag") or ""
    named = tag.lstrip("W/").strip('"')  # as in huggingface_hub
    if tag and response.request.method == "HEAD" and not TAG.fullmatch(named):
        # huggingface_hub follows some redirections, whose ETag may be any, and stops at others, whose ETag it uses.
        require(response.has_redirect_location, f"the hub's ETag {shortened(tag)} is none that can name a file")
        for name in ("X-Linked-Etag", "ETag"):
            headers.pop(name, None)
    if response.request.method == "GET" and "/api/" in response.request.url.path:
        response.read()
        values: Any = None
        with suppress(ValueError, RecursionError):  # which huggingface_hub will say
            values = response.json()
        _check_listing(values)


def _check_listing(values: Any) -> None:
    if isinstance(values, dict) and "sha" in values:
        checked_commit(values["sha"])
    for each in values if isinstance(values, list) else []:
        lfs = each.get("lfs") if isinstance(each, dict) else None
        oid = lfs.get("oid") if isinstance(lfs, dict) else None
        require(oid is None or bool(SHA256.fullmatch(str(oid))), f"the hub's checksum {shortened(oid)} is none")


def checked_commit(value: object) -> str:
    """Return a commit's hash, after checking it."""
    known = isinstance(value, str) and COMMIT.fullmatch(value) is not None
    require(known, f"the hub's commit {shortened(value)} is not a hash of 40 digits")
    return str(value)


def checked_relative(value: object) -> str:
    """Return a checked file name that stays below any folder, with ``/`` between its parts."""
    require(is_relative(value), f"the file name {shortened(value)} is not a plain one inside its folder")
    return str(value)


def is_relative(value: object) -> bool:
    """Return whether a value is a file name that stays below any folder; see :func:`checked_relative`."""
    if not isinstance(value, str) or "\\" in value or UNPRINTABLE.search(value) or "\n" in value or "\t" in value:
        return False
    return all(part not in ("", ".", "..") and len(part.encode()) <= LONGEST_PART for part in value.split("/"))


# Others of fsspec's protocols read what a file names, unpack archives, or log in somewhere.
PROTOCOLS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "hf", "http", "https", "memory", "file")
# the option of each store's client that its web session is made with
SESSIONS = {"http": "client_kwargs", "https": "client_kwargs", "gs": "session_kwargs", "gcs": "session_kwargs"}
SILENT_SECONDS = 60.0  # after which a web server that sends nothing counts as one that does not answer


def store_of(url: str) -> tuple[Any, str]:
    """Return the store and the path in it; fsspec keeps one store of each kind per process."""
    protocol = url.partition("://")[0]
    known = protocol in PROTOCOLS and "::" not in url
    require(known, f"{url}: files are read from s3://, gs://, az://, abfs://, hf:// and https:// alone; copy it there")
    options: dict[str, Any] = {}
    if protocol in SESSIONS:
        options[SESSIONS[protocol]] = _session_options()
    if protocol == "hf":
        guard_hub()
    try:
        return fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise InputError(f"{url}: {' '.join(str(error).split())}") from error


def _session_options() -> dict[str, Any]:
    """Return options of a web session: files arrive as stored, without a time limit."""
    import aiohttp

    # aiohttp's own limit is on the whole transfer, and a shard may take longer than that.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENT_SECONDS, sock_read=SILENT_SECONDS)
    return {"timeout": timeout, "headers": {"Accept-Encoding": "identity"}, "auto_decompress": False}
