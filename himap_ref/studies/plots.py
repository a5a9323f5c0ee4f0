"""Pictures of the studies' numbers. matplotlib is asked for only when a picture is (extra "plots").

Call `check_picture` before the computing and `figure` after it:

    check_picture(args.plot)
    ...
    with figure(args.plot, panels=2, size=(10, 4)) as (left, right):
        left.bar(...)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ..commands.files import check_writable, write_whole
from ..errors import HimapError


def check_picture(path: Path) -> None:
    """Raises HimapError now, rather than after hours, if no figure can be drawn or none be written to `path`."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise HimapError(f"{path}: drawing it needs matplotlib: pip install 'himap-ref[plots]'") from None
    check_writable(path, FigureCanvasBase.get_supported_filetypes())


@contextmanager
def figure(path: Path, panels: int, size: tuple[float, float]) -> Iterator[list]:
    """Yields `panels` matplotlib axes side by side, `size` inches in all; saves them to `path` if all went well."""
    from matplotlib.figure import Figure  # not pyplot: no window, no display, nothing global

    sheet = Figure(size, layout="constrained")
    yield list(sheet.subplots(1, panels, squeeze=False)[0])
    write_whole(path, partial(sheet.savefig, dpi=150))
