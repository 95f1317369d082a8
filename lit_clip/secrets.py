"""Keep secrets out of messages and files: passwords, tokens and signatures in addresses.

Settings that refer to the environment (``${oc.env:NAME}``) are saved as they are typed.
"""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
# An address, also as a path writes it, with one slash; a quote belongs to it if a password goes on behind it.
_ADDRESS = re.compile(r"(?:://|(?<=[A-Za-z0-9]{2}):/(?!/))(?:[^\s'\"]|['\"](?=[\w@]))+")
# Before a password, or before "@" alone; ":80/" is a port, and "[" begins a host.
_USER = re.compile(r"://(?:([^\s/?#@:'\"\[]*):(?!\d{1,5}(?:[/?#,]|$))|[^\s/?#@:'\"\[]+@)")
# Arguments of signed addresses: of S3, Google and Azure, and tokens and keys by their names.
_ARGUMENT = re.compile(
    r"(?<=[?&;#])([\w.%-]*(?:token|secret|passw(?:or)?d|signature|credential|api[_-]?key|access[_-]?key(?:id)?)|"
    r"sig|pass|pwd|pw|key|auth|code|jwt)=[^&#\s'\"<>\\]*[^&#\s'\"<>\\:,;)]",
    re.IGNORECASE,
)
_HEADER = re.compile(
    r"((?:authorization|(?<![\w-])x-(?:[a-z]+-){0,3}(?:key|token|secret))['\"]?\s*[:=]\s*['\"]?"
    r"(?:(?:bearer|basic|token|apikey)\s+)?)[\w.~+/=-]+",
    re.IGNORECASE,
)
_COOKIE = re.compile(r"(\bCookie: ?|['\"][Cc]ookie['\"]: ?['\"])[\w.-]+=[^\r\n'\"]+")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_WINDOW, _EDGE = 20_000, 5_000  # characters of a long text's ends that are read, and of their edges


def without_secrets(text: str) -> str:
    """Return text with ``***`` instead of passwords, tokens and signatures in addresses and headers.

    References to variables (``${...}``) stay.
    """
    if ":/" in text:
        text = _ADDRESS.sub(_without_login, text)
    if "=" in text:
        text = _ARGUMENT.sub(lambda found: found[0] if "${" in found[0] else f"{found[1]}={HIDDEN}", text)
        text = _COOKIE.sub(rf"\1{HIDDEN}", text)
    return _HEADER.sub(rf"\1{HIDDEN}", _HUB_TOKEN.sub(f"hf_{HIDDEN}", text))


def ends_without_secrets(text: str) -> str:
    """Return text as :func:`without_secrets` does; a long text is cut to its beginning and end."""
    if len(text) <= 2 * _WINDOW:
        return without_secrets(text)
    return f"{without_secrets(text[:_WINDOW])[:-_EDGE]} ... {without_secrets(text[-_WINDOW:])[_EDGE:]}"


def _without_login(found: re.Match[str]) -> str:
    """Hide the login part of an address; a password may contain "/" and "@", and ends at the last "@"."""
    text = found[0] if found[0].startswith("://") else f":/{found[0][1:]}"
    last = text.rfind("@")
    parts, done = [], 0
    for user in _USER.finditer(text):
        if user.end() > last + 1:
            break
        end = user.end() if user[1] is None else last + 1
        login = text[user.start() : end]
        hidden = f"://{HIDDEN}@" if user[1] is None else f"://{user[1]}:{HIDDEN}@"
        parts += [text[done : user.start()], login if "${" in login else hidden]
        done = end
        if user[1] is not None:
            break
    return "".join([*parts, text[done:]]) if done else found[0]


def is_hidden(text: str) -> bool:
    """Return whether :func:`without_secrets` has hidden something in a text."""
    return HIDDEN in text and re.search(r"://[^\s/]*\*\*\*@|=\*\*\*(?:[&#]|$)", text) is not None


def plain_without_secrets(value: Any) -> Any:
    """Return settings for a checkpoint or a logger as :func:`without_secrets` does, at any depth."""
    if isinstance(value, Mapping):
        return {key: plain_without_secrets(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain_without_secrets(each) for each in value)
    return without_secrets(value) if isinstance(value, str) else value
