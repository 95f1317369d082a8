"""Keep secrets out of messages and files: passwords in addresses, and values of environment variables."""

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

HIDDEN = "***"
# The user's part of an address; a password may hold "/" and "@", but ":80/" is a port.
_LOGIN = re.compile(r"(?<=://)(?:([^\s/?#@:'\"]*):(?!\d{1,5}/)[^\s'\"]*|[^\s/?#@:'\"]+)@")
# Arguments of signed addresses: of S3, Google and Azure, and tokens and keys by their names.
_ARGUMENT = re.compile(
    r"(?<=[?&;#])([\w.%-]*(?:token|secret|passw(?:or)?d|signature|credential|api[_-]?key|access[_-]?key(?:id)?)|"
    r"sig|pass|pwd|pw|key|auth|code|jwt)=[^&#\s'\"<>\\]*[^&#\s'\"<>\\:,;)]",
    re.IGNORECASE,
)
_HEADER = re.compile(r"(authorization['\"]?\s*[:=]\s*['\"]?(?:(?:bearer|basic|token)\s+)?)[\w.~+/=-]+", re.IGNORECASE)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_VARIABLE = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY)$", re.IGNORECASE)
SHORTEST = 5  # characters; shorter values, such as "gpu" or "true", are words of every message
_WHOLE_WORD = 8  # characters below which a value within a longer word is another word
_known: dict[str, tuple[re.Pattern[str], str]] = {}  # a secret -> its forms, and what stands for it


def remember(value: str | None, instead: str = HIDDEN) -> None:
    """Hide a value in all messages of this process from now on.

    Short values, numbers and names of existing files are no secrets.

    Args:
        value: the secret.
        instead: what stands for it, such as ``${oc.env:PASSWORD}``.
    """
    if value is None or len(value) < SHORTEST or value in _known or _is_number(value) or _exists(value):
        return
    forms = sorted({value, quote(value, safe=""), quote(value), repr(value)[1:-1]}, key=len, reverse=True)
    pattern = "|".join(map(re.escape, forms))
    if len(value) < _WHOLE_WORD:
        pattern = rf"(?<!\w)(?:{pattern})(?!\w)"
    _known[value] = re.compile(pattern), instead


def remember_environment() -> None:
    """Hide the environment's tokens and passwords, such as ``HF_TOKEN`` and ``AWS_SECRET_ACCESS_KEY``."""
    for name, value in os.environ.items():
        if _VARIABLE.search(name) and len(value) >= _WHOLE_WORD:
            remember(value, reference(name))


def reference(variable: str) -> str:
    """Return what stands for a variable of the environment in a configuration."""
    return f"${{oc.env:{variable}}}"


def without_secrets(text: str) -> str:
    """Return text with ``***`` in place of passwords in addresses, and with the names of variables for their values."""
    for forms, instead in _known.values():
        text = forms.sub(lambda _, instead=instead: instead, text)
    return without_passwords(text)


def without_passwords(text: str) -> str:
    """Return text with ``***`` in place of passwords, tokens and signatures in addresses and headers.

    References to variables (``${...}``) stay.
    """
    if "://" in text:
        text = _LOGIN.sub(_hidden_login, text)
    if "=" in text:
        text = _ARGUMENT.sub(lambda found: found[0] if "${" in found[0] else f"{found[1]}={HIDDEN}", text)
    return _HEADER.sub(rf"\1{HIDDEN}", _HUB_TOKEN.sub(f"hf_{HIDDEN}", text))


def _hidden_login(found: re.Match[str]) -> str:
    if "${" in found[0]:
        return found[0]
    return f"{HIDDEN}@" if found[1] is None else f"{found[1]}:{HIDDEN}@"


def is_hidden(text: str) -> bool:
    """Return whether a text is one in which :func:`without_passwords` has hidden something."""
    return HIDDEN in text and re.search(r"://[^\s/]*\*\*\*@|=\*\*\*(?:[&#]|$)", text) is not None


def plain_without_secrets(value: Any) -> Any:
    """Return settings for a checkpoint or a logger: ``***`` in place of secrets, at any depth.

    A checkpoint is opened by its architecture and, with a LoRA, by the name of its base: those keep the texts that came
    whole from a variable, but for arguments of one's own encoders.
    """
    return _without(value, named=False)


def _without(value: Any, named: bool) -> Any:
    if isinstance(value, Mapping):
        return {
            key: _without(item, key != "init_args" and (named or key in ("architecture", "pretrained")))
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)([_without(item, named) for item in value]) if type(value) in (list, tuple) else value
    if not isinstance(value, str) or (named and value in _known and "://" not in value):
        return value
    for forms, _ in _known.values():
        value = forms.sub(HIDDEN, value)
    return without_passwords(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return len(text) < _WHOLE_WORD


def _exists(text: str) -> bool:
    try:
        return os.path.exists(text)
    except ValueError:  # a zero byte
        return False
