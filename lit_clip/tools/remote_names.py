"""Names that a hub, a store or a listing gives, which are checked before they become a path."""

import re

from lit_clip.errors import UNPRINTABLE, require
from lit_clip.tools.untrusted import shortened

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
TAG = re.compile(r"[\w+=:~-][\w.+=:~-]{0,199}", re.ASCII)  # an ETag as huggingface_hub names a file after it
LONGEST_PART = 200  # bytes of a file's name, which other names are made from


def checked_commit(value: object) -> str:
    """Return the hash of a commit."""
    known = isinstance(value, str) and COMMIT.fullmatch(value) is not None
    require(known, f"the hub's commit {shortened(value)} is not a hash of 40 digits")
    return str(value)


def checked_relative(value: object) -> str:
    """Return the name of a file that stays below any folder, with ``/`` between its parts."""
    require(is_relative(value), f"the file name {shortened(value)} is not a plain one inside its folder")
    return str(value)


def is_relative(value: object) -> bool:
    """Return whether a value is the name of a file below any folder, see :func:`checked_relative`."""
    if not isinstance(value, str) or "\\" in value or UNPRINTABLE.search(value) or "\n" in value or "\t" in value:
        return False
    return all(part not in ("", ".", "..") and len(part.encode()) <= LONGEST_PART for part in value.split("/"))
