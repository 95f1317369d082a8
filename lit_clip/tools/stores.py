"""Stores from which files are read."""

from typing import Any

import fsspec

from lit_clip.errors import InputError, require
from lit_clip.tools.hub_client import guard_hub

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
