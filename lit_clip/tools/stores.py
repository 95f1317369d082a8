"""Stores that files are read from: which ones, and how much of an answer is taken."""

from typing import Any

import fsspec
from fsspec.callbacks import Callback

from lit_clip.errors import InputError, require
from lit_clip.tools.hub_client import guard_hub

# Others of fsspec's protocols read what a file names, unpack archives, or log in somewhere.
PROTOCOLS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "hf", "http", "https", "memory", "file")
# the option of each store's client that its web session is made with; the clients of the others unpack nothing
SESSIONS = {"http": "client_kwargs", "https": "client_kwargs", "gs": "session_kwargs", "gcs": "session_kwargs"}
SILENT_SECONDS = 60.0  # after which a web server that sends nothing counts as one that does not answer


def store_of(url: str) -> tuple[Any, str]:
    """Return the store and the path in it; fsspec keeps one store of each kind per process."""
    protocol = url.partition("://")[0]
    known = protocol in PROTOCOLS and "::" not in url
    require(known, f"{url}: files are read from s3://, gs://, az://, abfs://, hf:// and https:// alone; copy it there")
    options: dict[str, Any] = {}
    if protocol in SESSIONS:
        from lit_clip.tools.store_answers import client_options  # imports aiohttp

        options[SESSIONS[protocol]] = client_options(SILENT_SECONDS)
    if protocol == "hf":
        guard_hub()
    try:
        return fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise InputError(f"{url}: {' '.join(str(error).split())}") from error


class AtMost(Callback):
    """Ends a download that has more bytes than the file, whose size is given."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.most = size

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        require(self.value <= self.most, f"received more than its {self.most} bytes; did it change? start again")
