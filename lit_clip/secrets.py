"""Keep secrets out of messages and files: passwords in addresses, and values of environment variables."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import quote

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
_VARIABLE = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY)$", re.IGNORECASE)
# Names of variables and settings that hold secrets; "key" alone, as "caption_key" names a column.
_SECRET_NAME = re.compile(
    r"(?:^|[_-])(?:tokens?|secrets?|passwords?|passwd|passphrase|pass|pwd|pw|credentials?|auth|signature|sas|"
    r"(?:api|access|secret|private|account)[_-]?key|(?-i:KEYS?)|(?<![_-])key(?=$))(?:[_-]|\d*$)",
    re.IGNORECASE,
)
_OPENS = {"architecture", "pretrained", "freeze", "lora", "class_path"}  # settings that open a checkpoint
SHORTEST = 5  # characters; shorter values, such as "gpu" or "true", are words of every message
_WHOLE_WORD = 8  # characters below which a value within a longer word is another word
_WINDOW, _EDGE = 20_000, 5_000  # characters of a long text's ends that are read, and of their edges
_known: dict[str, tuple[re.Pattern[str], str]] = {}  # a secret -> its forms, and what stands for it


def remember(value: str | None, instead: str = HIDDEN) -> None:
    """Hide a value in all messages of this process from now on; ``instead``, such as ``${oc.env:KEY}``, stands for it.

    Short values, numbers and names of existing files are no secrets.
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


def is_secret(name: str, value: str) -> bool:
    """Return whether the value of a variable or a setting is a secret: its name says so, or it looks random."""
    return _SECRET_NAME.search(name) is not None or any(
        len(word) >= 12 and len(re.findall(r"\d+|[A-Za-z]+", word)) >= 5 for word in re.split(r"[\W_]+", value)
    )


def is_secret_in_address(value: str, text: str) -> bool:
    """Return whether a text has a value in an address's login or query."""
    if "://" not in text or value not in text:
        return False
    return value in text.partition("?")[2] or value not in without_passwords(text)


def reference(variable: str) -> str:
    """Return what stands for a variable of the environment in a configuration."""
    return f"${{oc.env:{variable}}}"


def without_secrets(text: str) -> str:
    """Return text with ``***`` in place of passwords in addresses, and with the names of variables for their values."""
    for forms, instead in _known.values():
        text = forms.sub(lambda _, instead=instead: instead, text)
    return without_passwords(text)


def ends_without_secrets(text: str) -> str:
    """Return text as :func:`without_secrets` does; of a long text only its beginning and its end."""
    if len(text) <= 2 * _WINDOW:
        return without_secrets(text)
    return f"{without_secrets(text[:_WINDOW])[:-_EDGE]} ... {without_secrets(text[-_WINDOW:])[_EDGE:]}"


def without_passwords(text: str) -> str:
    """Return text with ``***`` in place of passwords, tokens and signatures in addresses and headers.

    References to variables (``${...}``) stay.
    """
    if ":/" in text:
        text = _ADDRESS.sub(_without_login, text)
    if "=" in text:
        text = _ARGUMENT.sub(lambda found: found[0] if "${" in found[0] else f"{found[1]}={HIDDEN}", text)
        text = _COOKIE.sub(rf"\1{HIDDEN}", text)
    return _HEADER.sub(rf"\1{HIDDEN}", _HUB_TOKEN.sub(f"hf_{HIDDEN}", text))


def _without_login(found: re.Match[str]) -> str:
    """Hide the user's part of an address; a password may hold "/" and "@", and ends at the last "@"."""
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
    """Return whether a text is one in which :func:`without_passwords` has hidden something."""
    return HIDDEN in text and re.search(r"://[^\s/]*\*\*\*@|=\*\*\*(?:[&#]|$)", text) is not None


def plain_without_secrets(value: Any, opens: bool = False, name: str = "", within: bool = False) -> Any:
    """Return settings for a checkpoint or a logger: ``***`` in place of secrets, at any depth.

    Settings that a checkpoint is opened or resumed by are never changed within a word. Of them only passwords in
    addresses are hidden, and arguments of classes that are a secret as a whole.

    Args:
        value: the settings.
        opens: whether all of them are compared when training resumes.
        name: of a setting within others.
        within: whether it is an argument of a class.
    """
    if isinstance(value, Mapping):
        within = within or name == "init_args"
        compared = {key: opens or key in _OPENS for key in value}
        return {key: plain_without_secrets(each, compared[key], str(key), within) for key, each in value.items()}
    if isinstance(value, list | tuple):
        kept = [plain_without_secrets(each, opens, name, within) for each in value]
        return type(value)(kept) if type(value) in (list, tuple) else value
    if not isinstance(value, str):
        return value
    if opens:
        secret = within and value in _known and (is_secret(name, "") or not value.replace("_", "").isalpha())
        return HIDDEN if secret and name != "class_path" else without_passwords(value)
    for forms, _ in _known.values():
        value = forms.sub(HIDDEN, value)
    return without_passwords(value)


def _is_number(text: str) -> bool:
    with suppress(ValueError):
        return float(text) is not None and len(text) < _WHOLE_WORD
    return False


def _exists(text: str) -> bool:
    with suppress(ValueError):  # a zero byte
        return os.path.exists(text)
    return False
