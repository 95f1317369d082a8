"""Check names from a hub, a store or a listing before they become a path."""

import re

from lit_clip.errors import UNPRINTABLE, require
from lit_clip.tools.untrusted import shortened

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
TAG = re.compile(r"[\w+=:~-][\w.+=:~-]{0,199}", re.ASCII)  # an ETag as huggingface_hub names a file after it
LONGEST_PART = 200  # bytes of a file's name, which other names are made from


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
