"""Pictures of the studies' numbers. matplotlib is asked for only when a picture is (extra "plots").

Call `check_picture` before the computing and `figure` after it:

    check_picture(args.plot)
    ...
    with figure(args.plot, panels=2, size=(10, 4)) as (left, right):
        left.bar(...)
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
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
    """Makes the folder and tries to open the file, which is left as it was. Raises HimapError, also for its ending."""
    if path.suffix[1:].lower() not in kinds:
        raise HimapError(f"{path}: this kind of picture cannot be written: end its name in .png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as error:
        raise HimapError(f"{path}: cannot be written ({error.strerror}): choose another file") from None


@contextmanager
def figure(path: Path, panels: int, size: tuple[float, float]) -> Iterator[list]:
    """Yields `panels` matplotlib axes side by side, `size` inches in all; saves them to `path` if all went well."""
    from matplotlib.figure import Figure  # not pyplot: no window, no display, nothing global

    sheet = Figure(size, layout="constrained")
    yield list(sheet.subplots(1, panels, squeeze=False)[0])
    try:
        sheet.savefig(path, dpi=150)
    except OSError as error:
        raise HimapError(f"{path}: cannot be written ({error.strerror}): choose another file") from None
