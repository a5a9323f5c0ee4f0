"""The one error type that a user can cause: its message is a single line that says what is wrong and what to do."""


class HimapError(ValueError):
    """Bad input (a file, a number, a name). `run.py` and the studies print the message and exit with status 2."""
