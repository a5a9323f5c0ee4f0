"""Methods by name: HiMAP beside its baselines, and schedules as text ("2:0.5:text_to_image,8:72:image_to_image").

A baseline is a score function like HiMAP's own two, so it runs through the same loop and is counted the same way.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..errors import HimapError
from ..pruning import HIMAP, LayerView, Score, Stage, image_to_image, text_to_image


def last_to_image(view: LayerView) -> Tensor:
    """FastV (arXiv 2403.06764) as its code has it: the attention of the last row alone."""
    return view.attention(view.last, view.image).sum(dim=1)


def all_to_image(view: LayerView) -> Tensor:
    """FastV as its paper has it: attention averaged over all rows."""
    return view.attention(view.all, view.image).mean(dim=1)


def random(view: LayerView, seed: int = 0) -> Tensor:
    """Chance, the baseline to beat. Every picture draws the same numbers, in a batch as alone; the stages differ."""
    N = view.image.stop - view.image.start
    scores = torch.rand(N, generator=torch.Generator().manual_seed(1000 * seed + N))
    return scores.to(view.q.device).expand(len(view.q), -1)


SCORES = {score.__name__: score for score in (text_to_image, image_to_image, last_to_image, all_to_image, random)}
FASTV = (Stage(2, 0.5, last_to_image),)
RANDOM = (Stage(2, 0.5, random),)
METHODS: dict[str, tuple[Stage, ...]] = {"himap": HIMAP, "fastv": FASTV, "random": RANDOM, "none": ()}


def parse_stages(text: str, trusted: bool = True) -> tuple[Stage, ...]:
    """LAYER:KEEP:SCORE, comma-separated, to stages; a keep with a point is a share, without one a count.

    A score is a name of `SCORES` or, if `trusted` (typed by the user, not read from a file), `module:function`.
    Raises HimapError that quotes the stage at fault.
    """
    stages = []
    for part in text.split(",") if text.strip() else ():
        try:
            layer, keep, score = part.split(":", 2)
            layer, keep = int(layer), float(keep) if "." in keep else int(keep)
        except ValueError:
            raise HimapError(f"stage {part!r}: expected LAYER:KEEP:SCORE, such as 2:0.5:text_to_image") from None
        stages.append(Stage(layer, keep, _find_score(score.strip(), trusted)))
    return tuple(stages)


def _find_score(name: str, trusted: bool) -> Score:
    module, colon, function = name.partition(":")
    if name not in SCORES and not (trusted and colon):
        raise HimapError(f"score {name!r} is unknown: expected {', '.join(SCORES)} or module:function")
    try:
        return SCORES[name] if name in SCORES else getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise HimapError(f"score {name!r} cannot be imported ({error})") from None
