"""Watch what Python does on behalf of a file: modules imported, files opened, programs started, addresses asked for."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "socket.getaddrinfo")
_watches: list["Watch"] = []
_hooked: list[bool] = []


class Watch:
    """A list of the events that a bait caused.

    Args:
        folder: every file opened below it counts, but for ``allowed``.
        allowed: names of files that may be opened.
        module: the module whose import counts.
    """

    def __init__(self, folder: Path, allowed: tuple[str, ...], module: str) -> None:
        self.folder, self.allowed, self.module = str(folder), allowed, module
        self.events: list[str] = []

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Note an audit event if a bait caused it."""
        first = str(arguments[0]) if arguments else ""
        bait = event == "import" and first.partition(".")[0] == self.module
        opened = event == "open" and (first.startswith(self.folder) or not first.startswith(("/", "<")))
        strange = opened and not first.isdigit() and Path(first).name not in self.allowed and "__pycache__" not in first
        if bait or strange or event in FORBIDDEN:
            self.events.append(f"{event} {first}")


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for watch in _watches:
        watch.see(event, arguments)


@contextmanager
def watching(folder: Path, allowed: tuple[str, ...], module: str) -> Iterator[list[str]]:
    """Yield the list of events, which grows in the body; see :class:`Watch`."""
    if not _hooked:  # a hook cannot be removed
        sys.addaudithook(_hook)
        _hooked.append(True)
    watch = Watch(folder, allowed, module)
    _watches.append(watch)
    try:
        yield watch.events
    finally:
        _watches.remove(watch)
