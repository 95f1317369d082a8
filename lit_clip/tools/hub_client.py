"""Guard huggingface_hub's client: check what a hub answers before the library turns it into a path.

huggingface_hub 2.4 names files in its cache after the ETag and the commit that a server sends, unchecked. transformers,
timm, open_clip and fsspec's ``hf://`` use the same client.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from lit_clip.errors import require
from lit_clip.tools.remote_names import SHA256, TAG, checked_commit
from lit_clip.tools.untrusted import shortened


def guard_hub() -> None:
    """Make huggingface_hub's client, also one set by the user, check answers; call this before any use."""
    from huggingface_hub import set_client_factory  # takes seconds
    from huggingface_hub.utils import _http

    make = _http._GLOBAL_CLIENT_FACTORY
    if getattr(make, "func", None) is not _client:
        set_client_factory(partial(_client, make))


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
