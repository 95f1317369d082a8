"""Errors that the user can fix."""

from difflib import get_close_matches
from pathlib import Path


class InputError(ValueError):
    """An error in the user's input; the message is one line that names file, row or key and says what to do.

    The command line prints the message alone and exits with code 2; from Python it is an ordinary ``ValueError``.
    """

    def __init__(self, *args: object) -> None:
        # Names of files and columns need not be Unicode, but a message must be printable.
        super().__init__(
            *(arg.encode(errors="backslashreplace").decode() if isinstance(arg, str) else arg for arg in args)
        )


def require(condition: bool, message: str) -> None:
    """Raise :class:`InputError` with ``message`` unless the condition holds (NaN never does)."""
    if not condition:
        raise InputError(message)


def no_such_file(path: str | Path) -> InputError:
    """Return the error for a missing file, with a file of a similar name as a suggestion."""
    path = Path(path)
    near = get_close_matches(path.stem, [file.stem for file in path.parent.glob(f"*{path.suffix}")], n=1)
    hint = f"; did you mean {path.with_stem(near[0])}?" if near else ""
    return InputError(f"{path}: there is no such file{hint}")


class BadSample(InputError):  # noqa: N818  # named for the sample
    """A sample that cannot be used.

    Args:
        where: file and row, or shard and key.
        reason: what is wrong, in a few words that other samples share; skipped samples are counted by it.
        detail: what exactly is wrong, and what to do.
    """

    def __init__(self, where: str, reason: str = "", detail: str = "") -> None:
        # A data loader raises a worker's error again, from its message alone.
        super().__init__(": ".join(part for part in (where, detail or reason) if part))
        self.where, self.reason, self.detail = where, reason, detail

    def __reduce__(self) -> tuple[type["BadSample"], tuple[str, str, str]]:
        return type(self), (self.where, self.reason, self.detail)
