"""What a criterion is held against: chance that draws anew for every question, the target patches themselves, and
kept tokens that are numbered otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from ...decoder import LlamaDecoder, rope
from ...errors import HimapError
from ...methods.scores import random
from ...pruning import LayerView, Stage
from ..questions.examples import Example

POSITIONS = ("kept", "packed", "stretched")


def oracle(view: LayerView, targets: Sequence[Sequence[int]] | None = None, seed: int | Sequence[int] = 0) -> Tensor:
    """The target patches first, the others by chance: the most that any criterion could reach with so many tokens.

    targets: of each prompt, indices into the whole picture's tokens; `for_questions` fills them in.
    """
    if targets is None and view.k.is_meta:  # planning: chance ranks no less
        return random(view)
    if targets is None:
        raise HimapError("the oracle must know the question's target patches: it works on drawn scenes, in the sweep")
    scores = random(view, seed).clone()
    places = view.positions[:, view.image] - view.image.start  # in the whole picture; nothing stands in a cache here
    for b, patches in enumerate(targets):
        scores[b] += torch.isin(places[b].cpu(), torch.tensor(patches, dtype=torch.long)).to(scores.device)
    return scores


ORACLE = f"{__name__}:oracle"  # as a schedule names it


def for_questions(stages: Sequence[Stage], examples: Sequence[Example]) -> tuple[Stage, ...]:
    """Stages whose scores know which questions they rank for: chance draws anew for each, the oracle its targets."""
    bound = []
    for stage in stages:
        function: Any = getattr(stage.score, "func", getattr(stage.score, "__wrapped__", stage.score))
        seed = getattr(stage.score, "keywords", {}).get("seed", 0)
        known: dict[str, Any] = {}
        if function in (random, oracle):
            known = {"seed": [crc32(f"{seed} {example.key}".encode()) for example in examples]}
        if function is oracle:
            known["targets"] = [example.targets for example in examples]
        bound.append(replace(stage, score=partial(function, **known)) if known else stage)
    return tuple(bound)


@contextmanager
def renumbered(decoder: LlamaDecoder, image_span: tuple[int, ...], how: str) -> Iterator[None]:
    """Within it, each layer numbers the tokens that are left anew: keys are rotated, and later tokens go on, by these.

    packed: one after the other, without gaps; stretched: the image tokens evenly over the span of the whole picture;
    kept: as HiMAP has it. For prefills without a cached prefix.
    """
    (start, stop), given, dropped = image_span, [torch.empty(0)], [0] * len(decoder.layers)

    def qkv(plain: Callable, i: int, x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        positions = given[0]
        if positions.shape[1] > 1:  # the prefill
            dropped[i] = positions.shape[1] - x.shape[1]
            left = stop - start - dropped[i]
            step = 1 if how == "packed" else (stop - start - 1) / max(1, left - 1)
            image = (start + torch.arange(left, device=x.device) * step).expand(len(x), -1)
            text = positions[:, stop:] - (dropped[i] if how == "packed" else 0)
            positions = torch.cat((positions[:, :start], image, text), dim=1)
        elif how == "packed":
            positions = positions - dropped[i]
        return plain(x, *rope(positions, decoder.config, x.dtype))

    if how not in POSITIONS:
        raise HimapError(f"positions {how!r}: expected {', '.join(POSITIONS)}")
    attentions = [] if how == "kept" else [layer.self_attn for layer in decoder.layers]
    hook = decoder.register_forward_pre_hook(
        lambda _, args, kwargs: given.__setitem__(0, kwargs["positions"]), with_kwargs=True
    )
    for i, attention in enumerate(attentions):
        attention.qkv = partial(qkv, attention.qkv, i)  # type: ignore[method-assign]
    try:
        yield
    finally:
        hook.remove()
        for attention in attentions:
            del attention.qkv
