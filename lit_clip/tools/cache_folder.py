"""The default cache folder."""

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """Return ``$XDG_CACHE_HOME/lit-clip`` or ``~/.cache/lit-clip``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lit-clip"
