"""Files that are written whole or not at all: checked before the computing, replaced after it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from ..errors import HimapError
from . import ranks


def check_writable(path: Path, kinds: Collection[str] = ("png",)) -> None:
    """Makes the folder and tries to write there; the file is left as it was. Raises HimapError, also for its ending."""
    if path.suffix[1:].lower() not in kinds:
        kind = "png" if "png" in kinds else min(kinds)
        raise HimapError(f"{path}: this kind of file cannot be written: end its name in .{kind}")
    if ranks.rank() == 0:
        _write_beside(path, lambda new: new.touch()).unlink()


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """`write` gets a name beside `path` and the file is renamed: after a full disk or a kill it is the old one or new.

    A link is replaced, not followed: it may have come with somebody's archive. Of several processes the first writes.
    Raises HimapError.
    """
    if ranks.rank() == 0:
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
