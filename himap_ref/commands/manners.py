"""How a command ends: bad input, a full disk or memory with one line on standard error, never with a traceback."""

import io
import os
import sys
from collections.abc import Callable

from ..errors import HimapError
from . import ranks


def tell(*lines: str) -> None:
    """Lines for standard error. A reader of it that has gone away costs no answer."""
    try:
        print(*lines, sep="\n", file=sys.stderr, flush=True)
    except BrokenPipeError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process


def told(error: BaseException) -> str | None:
    """What the user is told of it; None for a bug of ours."""
    if ranks.is_lost(error):
        return ranks.LOST
    if isinstance(error, HimapError | OSError):
        return str(error)
    signs = ("MemoryError", "out of memory", "can't allocate memory")
    if isinstance(error, MemoryError | RuntimeError) and any(sign in repr(error) for sign in signs):
        return "out of memory: fewer questions at a time, --dtype bfloat16 or a smaller model need less"
    return None


def run_command(main: Callable[[], None]) -> None:
    """Runs a command-line tool: bad input, a full disk or memory end it with one line and status 2, Ctrl-C with 130,
    a reader that has gone away without a word and with 141. Of torchrun's processes the first prints, and one error is
    told once."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us: what is printed must not end up in the other one
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack a letter of an answer
    try:
        try:
            with ranks.joined():
                main()
        finally:  # after --help, too: Python's own flush on its way out is a traceback where it fails
            sys.stdout.flush()
        return
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head` has read enough: what the shell says of any program that this ends
        sys.stdout = sys.stderr = None
        sys.exit(141)
    except (Exception, ranks.Ended) as error:
        if (reason := told(error)) is None:
            raise
    try:
        print(f"error: {HimapError(reason)}", file=sys.stderr)
        sys.stdout.flush()
    except OSError:  # a full disk or a closed pipe, again: Python would say so once more on its way out
        sys.stdout = sys.stderr = None
    sys.exit(2)
