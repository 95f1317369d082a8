"""The client of huggingface_hub, which checks what a hub answers before that library makes a path of it.

huggingface_hub 2.4 names files in its cache after the ETag and the commit that a server sends, unchecked, and holds any
answer that is no download. transformers, timm, open_clip and fsspec's ``hf://`` use the same client.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from lit_clip.errors import InputError, require
from lit_clip.tools.reading import LONGEST_REASON
from lit_clip.tools.remote_names import SHA256, TAG, checked_commit
from lit_clip.tools.untrusted import shortened

MOST = 256 << 20  # bytes of an answer that is held: a listing, or a part of a file


def guard_hub() -> None:
    """Have huggingface_hub's client, also one that the user has set, check its answers; call this before any use."""
    from huggingface_hub import set_client_factory  # takes seconds
    from huggingface_hub.utils import _http

    make = _http._GLOBAL_CLIENT_FACTORY
    if getattr(make, "func", None) is not _client:
        set_client_factory(partial(_client, make))


def first_line(error: Exception) -> str:
    """Return why huggingface_hub failed, without the advice in its further lines."""
    return str(error).strip().partition("\n")[0][:LONGEST_REASON] or type(error).__name__


def _client(make: Callable[[], Any]) -> Any:
    client = make()
    client.headers["Accept-Encoding"] = "identity"
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "response": [*hooks.get("response", []), _check_answer]}
    client.send = partial(_send, client.send)
    return client


def _send(send: Callable[..., Any], request: Any, *, stream: bool = False, **options: Any) -> Any:
    """Send a request as httpx does, but read no more of its answer than ``MOST``."""
    response = send(request, stream=True, **options)
    if not stream:
        try:
            _read(response)
            if request.method == "GET":
                _check_listing(response.content)
        except BaseException:
            response.close()
            raise
    return response


def _check_answer(response: Any) -> None:
    """Check the headers that become paths, and read the body of a redirection, which httpx would hold whole."""
    headers = response.headers
    encoding = headers.get("Content-Encoding", "identity").strip().lower()  # nested ones unpack to anything at once
    require(encoding in ("", "identity", "gzip"), f"the hub's answer is encoded as {shortened(encoding)}")
    if "X-Repo-Commit" in headers:
        checked_commit(headers["X-Repo-Commit"])
    tag = headers.get("X-Linked-Etag") or headers.get("ETag") or ""
    named = tag.lstrip("W/").strip('"')  # as in huggingface_hub
    if tag and response.request.method == "HEAD" and not TAG.fullmatch(named):
        # huggingface_hub follows some redirections, whose ETag may be any, and stops at others, whose ETag it uses.
        require(response.has_redirect_location, f"the hub's ETag {shortened(tag)} is none that can name a file")
        for name in ("X-Linked-Etag", "ETag"):
            headers.pop(name, None)
    if response.has_redirect_location:
        _read(response)


def _read(response: Any) -> None:
    """Read an answer, unpacked, as far as ``MOST``; like ``response.read()`` otherwise."""
    chunks, size = [], 0
    for chunk in response.iter_bytes():
        chunks.append(chunk)
        size += len(chunk)
        if size > MOST:
            chunks.clear()  # which the error's traceback would keep
            raise InputError(f"the hub's answer has more than {MOST >> 20} MB")
    response._content = b"".join(chunks)


def _check_listing(content: bytes) -> None:
    """Check what becomes a path in a repository's description or in a list of its files."""
    values: Any = None
    with suppress(ValueError, RecursionError):  # which huggingface_hub will say
        values = json.loads(content)
    if isinstance(values, dict) and "sha" in values:
        checked_commit(values["sha"])
    for each in values if isinstance(values, list) else []:
        lfs = each.get("lfs") if isinstance(each, dict) else None
        oid = lfs.get("oid") if isinstance(lfs, dict) else None
        require(oid is None or bool(SHA256.fullmatch(str(oid))), f"the hub's checksum {shortened(oid)} is none")
