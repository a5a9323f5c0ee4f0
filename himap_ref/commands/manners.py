"""How a command ends: bad input, a full disk or memory with one line on standard error, never with a traceback."""

import io
import os
import sys
from collections.abc import Callable

from ..errors import HimapError


def run_command(main: Callable[[], None]) -> None:
    """Runs a command-line tool: bad input, a full disk or memory end it with one line and status 2, Ctrl-C with 130."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us: what is printed must not end up in the other one
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack a letter of an answer
    try:
        main()
        sys.stdout.flush()
        return
    except KeyboardInterrupt:
        sys.exit(130)
    except (HimapError, OSError) as error:
        reason = str(error)
    except (MemoryError, RuntimeError) as error:
        if not any(sign in repr(error) for sign in ("MemoryError", "out of memory", "can't allocate memory")):
            raise  # a bug of ours
        reason = "out of memory: fewer questions at a time, --dtype bfloat16 or a smaller model need less"
    try:
        print(f"error: {HimapError(reason)}", file=sys.stderr)
        sys.stdout.flush()
    except OSError:  # a full disk, a closed pipe: Python would say so once more on its way out
        sys.stdout = sys.stderr = None
    sys.exit(2)
