"""Pictures of the studies' numbers. matplotlib is asked for only when a picture is (extra "plots").

Call `check_picture` before the computing and `figure` after it:

    check_picture(args.plot)
    ...
    with figure(args.plot, panels=2, size=(10, 4)) as (left, right):
        left.bar(...)

`label_ends` names the lines of a panel where they end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

from ...commands.files import check_writable, write_whole
from ...errors import HimapError

# eight that colour-blind readers, too, tell apart on white (Okabe and Ito's, darker)
COLORS = ("#d55e00", "#0072b2", "#7f7f7f", "#009e73", "#cc79a7", "#56b4e9", "#b8860b", "#000000")


def check_picture(path: Path) -> None:
    """Raises HimapError now, rather than after hours, if no figure can be drawn or none be written to `path`."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise HimapError(f"{path}: drawing it needs matplotlib: pip install 'himap-ref[plots]'") from None
    check_writable(path, FigureCanvasBase.get_supported_filetypes())


@contextmanager
def figure(path: Path, panels: int, size: tuple[float, float], across: int = 0) -> Iterator[list]:
    """Yields matplotlib axes, `across` (default: all) beside each other, `size` inches in all; saves them to `path` if
    all went well."""
    from matplotlib.figure import Figure  # not pyplot: no window, no display, nothing global

    sheet = Figure(size, layout="constrained")
    across = across or panels
    axes = list(sheet.subplots(-(-panels // across), across, squeeze=False).flat)
    for unused in axes[panels:]:
        unused.set_axis_off()
    yield axes[:panels]
    write_whole(path, partial(sheet.savefig, dpi=150))


def spread(heights: Sequence[float], gap: float, top: float = inf) -> list[float]:
    """The heights, in their order, moved apart until neighbours are `gap` apart: pairs that are too close push each
    other away, each half of the way; then all that stand above `top` or crowd below it come down."""
    moved, order = list(heights), sorted(range(len(heights)), key=heights.__getitem__)
    for _ in range(500):
        for below, above in pairwise(order):
            push = max(0.0, gap - (moved[above] - moved[below])) / 2
            moved[below], moved[above] = moved[below] - push, moved[above] + push
    for i in reversed(order):
        moved[i] = min(moved[i], top)
        top = moved[i] - gap
    return moved


def label_ends(axis: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes each line's name right of the panel, as high as the line's end if others leave room.

    ends: (x, y, name, colour); the panel's limits must be final.
    """
    low, high = axis.get_ylim()
    heights = spread([y for _, y, _, _ in ends], 0.055 * (high - low), top=high)
    for (x, y, name, color), height in zip(ends, heights, strict=True):
        axis.annotate(name, (x, y), (1.03, height), textcoords=axis.get_yaxis_transform(), va="center", fontsize=8,
                      color=color, arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5})  # fmt: skip
