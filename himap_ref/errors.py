"""The one error type that a user can cause: its message is a single line that says what is wrong and what to do."""


class HimapError(ValueError):
    """Bad input: a file, a number, a name."""

    def __init__(self, message: str):  # which may quote a file: no line breaks, terminal codes or pages of it
        message = message if len(message) <= 1000 else f"{message[:500]} ... {message[-500:]}"
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))
