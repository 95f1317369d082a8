"""What a user can mend is raised as one exception."""


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line that names it (file, row or key) and says what to do.

    The command line prints the message alone and exits with code 2; from Python it is an ordinary ``ValueError``.
    """


def require(condition: bool, message: str) -> None:
    """Raise :class:`InputError` with ``message`` unless the condition holds (NaN never does)."""
    if not condition:
        raise InputError(message)
