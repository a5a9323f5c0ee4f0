"""Pictures of the studies' numbers. matplotlib is asked for only when a picture is (extra "plots").

Call `check_picture` before the computing and `figure` after it:

    check_picture(args.plot)
    ...
    with figure(args.plot, panels=2, size=(10, 4)) as (left, right):
        left.bar(...)
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from ..errors import HimapError


def check_picture(path: Path) -> None:
    """Raises HimapError now, rather than after hours, if no figure can be drawn or none be written to `path`."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise HimapError(f"{path}: drawing it needs matplotlib: pip install 'himap-ref[plots]'") from None
    check_writable(path, FigureCanvasBase.get_supported_filetypes())


def check_writable(path: Path, kinds: Container[str] = ("png",)) -> None:
    """Makes the folder and tries to write there; the file is left as it was. Raises HimapError, also for its ending."""
    if path.suffix[1:].lower() not in kinds:
        raise HimapError(f"{path}: this kind of picture cannot be written: end its name in .png")
    _write_beside(path, lambda new: new.touch()).unlink()


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """`write` gets a name beside `path` and the file is renamed: after a full disk or a kill it is the old one or new.

    A link is replaced, not followed: it may have come with somebody's archive. Raises HimapError.
    """
    _write_beside(path, write).replace(path)


def write_text(path: Path, text: str) -> None:
    """See `write_whole`."""
    write_whole(path, lambda new: new.write_text(text, encoding="utf-8"))


def _write_beside(path: Path, write: Callable[[Path], object]) -> Path:
    new = path.with_name(f".new-{path.name}")  # the ending stays: by it writers choose a format
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        new.unlink(missing_ok=True)  # which may be a link, too
        write(new)
        return new
    except OSError as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise HimapError(f"{path}: cannot be written ({error.strerror or error}): choose another file") from None


@contextmanager
def figure(path: Path, panels: int, size: tuple[float, float]) -> Iterator[list]:
    """Yields `panels` matplotlib axes side by side, `size` inches in all; saves them to `path` if all went well."""
    from matplotlib.figure import Figure  # not pyplot: no window, no display, nothing global

    sheet = Figure(size, layout="constrained")
    yield list(sheet.subplots(1, panels, squeeze=False)[0])
    write_whole(path, partial(sheet.savefig, dpi=150))
