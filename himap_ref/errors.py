"""The one error type that a user can cause: its message is a single line that says what is wrong and what to do."""

import sys
from collections.abc import Callable


class HimapError(ValueError):
    """Bad input: a file, a number, a name."""


def run_command(main: Callable[[], None]) -> None:
    """Runs a command-line tool: bad input ends it with one line and status 2, Ctrl-C with 130."""
    try:
        main()
    except HimapError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
