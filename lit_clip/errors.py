"""The one exception for what a user can mend."""


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line that names it (file, row or key) and says what to do.

    The command line prints the message alone and exits with code 2; from Python it is an ordinary ``ValueError``.
    """
