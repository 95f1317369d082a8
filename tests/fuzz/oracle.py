"""What a hostile input may lead to: success, a counted skip, or one line that names the file; and nothing else."""

import os
import sys
import sysconfig
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb
from types import TracebackType
from typing import Any, NamedTuple

from datamodules.evaluation.annotation_files import MAT_PROGRAM
from lit_clip.errors import InputError, printable
from lit_clip.models.registry import list_models
from lit_clip.tools.messages import one_line
from tests.fuzz.inputs import CANARY, SECRET

ROOT = Path(__file__).parents[2]
LONGEST_MESSAGE = 500
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
READER = [sys.executable, "-I", str(MAT_PROGRAM)]  # the one program that reading a file may start
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pty.spawn")
REACHES = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname")
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.symlink", "os.link", "os.chmod")


class Finding(NamedTuple):
    """What an input led to and should not have.

    Attributes:
        kind: such as ``KeyError``, ``hang`` or ``import``.
        place: file, line and function of ours that was reached last.
        message: in short.
        traceback: the whole story.
    """

    kind: str
    place: str
    message: str
    traceback: str

    @property
    def signature(self) -> str:
        """Findings of one cause have the same; the line is left out, but for a wrong result."""
        if self.kind == AssertionError.__name__:
            return f"{self.kind} in {self.place}"
        file, _, function = self.place.partition(" ")
        return f"{self.kind} in {file.partition(':')[0]} {function}"


class ForbiddenError(Exception):
    """Raised in place of what an input must not lead to."""


def our_place(traceback: TracebackType | None) -> str:
    """Return the last place of ours in a traceback."""
    frames = extract_tb(traceback)
    ours = [frame for frame in frames if is_ours(frame.filename)]
    ours = ours or [frame for frame in frames if frame.filename.startswith(f"{ROOT}/tests/")]
    if not ours:
        return "? ?"
    return f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno} {ours[-1].name}"


def is_ours(file: str) -> bool:
    """Whether a file belongs to the packages."""
    return any(file.startswith(f"{ROOT / package}/") for package in ("lit_clip", "callbacks", "datamodules"))


def wrong_message(error: InputError, names: tuple[str, ...]) -> str:
    """Return what is wrong with a refusal; empty: nothing.

    Args:
        error: the refusal.
        names: one of which it must contain; empty: any message will do.
    """
    line = one_line(error)
    control = next((character for character in line if unicodedata.category(character) in ("Cc", "Cs")), "")
    if "\n" in str(error):
        return "message of several lines"
    if len(line.replace(", ".join(list_models()), "")) > LONGEST_MESSAGE:  # our own list is long for a reason
        return f"message longer than {LONGEST_MESSAGE} characters"
    if SECRET in printable(line):
        return "secret in a message"
    if control:
        return "control character in a message"
    if not any(character.isalnum() for character in line):
        return "empty message"
    return "message names no file" if names and not any(name in line for name in names) else ""


class Guard:
    """Forbids imports beside the input, processes, the network, and files elsewhere; an audit hook for good."""

    def __init__(self) -> None:
        self.folder: Path | None = None  # watched now
        self.broken: list[tuple[str, str]] = []  # rule, and what broke it
        paths = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), str(ROOT)}
        self.readable = tuple({os.path.realpath(path) for path in paths} | paths | {"/proc", "/sys", "/dev", "/usr"})
        self.readable += ("/etc", "/lib", "/opt", "/var/lib", "/run/systemd")
        sys.addaudithook(self._hook)

    @contextmanager
    def watching(self, folder: Path) -> Iterator[None]:
        """Within this context the rules hold."""
        self.folder, self.broken = folder, []
        try:
            yield
        finally:
            self.folder = None

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        broken = self._broken(event, arguments)
        if broken is not None:
            self.broken.append(broken)
            raise ForbiddenError(": ".join(broken))

    def _broken(self, event: str, arguments: tuple[Any, ...]) -> tuple[str, str] | None:
        """Return the rule that an event breaks, and what breaks it."""
        if event == "subprocess.Popen" and arguments[1][:3] == READER:
            return None
        if event in STARTS or event in REACHES:
            return event, str(arguments)[:200]
        if event == "os.symlink":  # its target is relative to the link's folder
            target, link = map(os.fsdecode, arguments[:2])
            arguments = (os.path.join(os.path.dirname(link), target), link)
        if event in CHANGES:
            names = arguments[:2] if event in ("os.rename", "os.symlink", "os.link") else arguments[:1]
            return next(filter(None, (self._elsewhere(name, writing=True) for name in names)), None)
        if event != "open":
            return None
        path, mode, flags = (*arguments, None, None)[:3]
        writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool((flags or 0) & WRITING)
        return self._elsewhere(path, writes)

    def _elsewhere(self, path: Any, writing: bool) -> tuple[str, str] | None:
        if not isinstance(path, str | bytes | os.PathLike):  # a descriptor
            return None
        whole = os.path.abspath(os.fsdecode(path))
        if os.path.basename(whole).partition(".")[0] == CANARY:  # importlib raises no event of its own
            return "import", whole
        if whole.startswith(f"{self.folder}{os.sep}") or whole in (str(self.folder), os.devnull) or "\0" in whole:
            return None
        if not writing and whole.startswith(self.readable):
            return None
        return "file elsewhere", f"{whole} for {'writing' if writing else 'reading'}"
