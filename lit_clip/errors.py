"""What a user can fix is raised as one exception."""

from difflib import get_close_matches
from pathlib import Path


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line that names it (file, row or key) and says what to do.

    The command line prints the message alone and exits with code 2; from Python it is an ordinary ``ValueError``.
    """


def require(condition: bool, message: str) -> None:
    """Raise :class:`InputError` with ``message`` unless the condition holds (NaN never does)."""
    if not condition:
        raise InputError(message)


def no_such_file(path: str | Path) -> InputError:
    """The error to raise for a file that is not there, with the name beside it that was probably meant."""
    path = Path(path)
    near = get_close_matches(path.stem, [file.stem for file in path.parent.glob(f"*{path.suffix}")], n=1)
    hint = f"; did you mean {path.with_stem(near[0])}?" if near else ""
    return InputError(f"{path}: there is no such file{hint}")


class BadSample(InputError):  # noqa: N818  # as what it is about is called: a sample
    """A sample that cannot be used.

    Args:
        where: how the user knows it: file and row, or shard and key.
        reason: what is wrong in a few words that other samples share; skipped ones are counted by it.
        detail: the rest of the line: what exactly, and what to do.
    """

    def __init__(self, where: str, reason: str = "", detail: str = "") -> None:
        # A data loader raises what a worker raised anew, from the message alone.
        super().__init__(": ".join(part for part in (where, detail or reason) if part))
        self.where, self.reason, self.detail = where, reason, detail

    def __reduce__(self) -> tuple[type["BadSample"], tuple[str, str, str]]:
        return type(self), (self.where, self.reason, self.detail)
