"""Scores beside HiMAP's own two: who attends to a token decides what it is worth. All by name in `SCORES`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cache import causal_mask
from ..pruning import LayerView, Score, image_to_image, text_to_image


def last_to_image(view: LayerView) -> Tensor:
    """FastV (arXiv 2403.06764) as its code has it, and PyramidDrop: the attention of the last row alone."""
    return view.attention(view.last).sum(dim=1)


def all_to_image(view: LayerView) -> Tensor:
    """FastV as its paper has it: attention averaged over all rows."""
    return view.attention(view.all).sum(dim=1) / view.real.sum(dim=1, keepdim=True)


def image_to_image_mean(view: LayerView) -> Tensor:
    """HiMAP's stage 2, count-normalised: the mean over the image rows that can see v, not their sum.

    That takes one half of the sum's bias out. The other stays: earlier rows have fewer keys to share their attention
    among, so each key has more of it.
    """
    scores = image_to_image(view)
    return scores / torch.arange(scores.shape[1], 0, -1, device=scores.device)  # v is seen by itself and all after it


def image_to_image_relative(view: LayerView) -> Tensor:
    """HiMAP's stage 2 with both halves out: that mean, of A[i, v] relative to 1 / keys that row i sees.

    The same for every v where attention is flat.
    """
    attention = view.attention(view.image)
    keys = causal_mask(view.positions[:, view.image], view.key_positions)[:, 0].sum(dim=2, keepdim=True)  # (B, N, 1)
    scores = (attention * keys).sum(dim=1)
    return scores / torch.arange(scores.shape[1], 0, -1, device=scores.device)


def dart(view: LayerView, pivots: int = 4) -> Tensor:
    """DART (arXiv 2502.11494): image tokens unlike a few pivots, which are those of the image and of the text with the
    largest keys (L1 norm, heads side by side).

    Each pivot ranks all by how little they are like it (cosine), and a token has the best of its places. In DART's code
    the pivots choose one after the other, each its part of the count, by the states behind the ranking layer, not
    before it. Its products count as one row of attention per pivot.
    """
    hidden, size = F.normalize(view.hidden.float(), dim=-1), view.k[:, -view.q.shape[1] :].float().abs().sum(dim=(2, 3))
    image = size[:, view.image].topk(min(pivots, view.image.stop - view.image.start), dim=1).indices
    text = size[:, view.text].masked_fill(~view.real[:, view.text], -1)  # padding is chosen last, and told apart below
    words = text.topk(min(pivots, text.shape[1]), dim=1).indices + view.text.start
    chosen = torch.cat((image + view.image.start, words), dim=1)  # (B, P) rows
    real = view.real.take_along_dim(chosen, dim=1)
    view.ranking, view.own_ranking = view.ranking + chosen.shape[1], view.own_ranking + real.sum(dim=1)
    likeness = hidden.take_along_dim(chosen[..., None], dim=1) @ hidden[:, view.image].mT  # (B, P, N)
    place = likeness.argsort(dim=2, stable=True).argsort(dim=2).masked_fill(~real[..., None], likeness.shape[2])
    place = place * 2 * pivots + torch.arange(likeness.shape[1], device=place.device)[:, None]  # ties: the first pivot
    return -place.amin(dim=1).float().scatter(1, image, -1.0)


def random(view: LayerView, seed: int | Sequence[int] = 0) -> Tensor:
    """Chance, the baseline to beat. With one seed every prompt draws the same numbers, in a batch as alone; a sequence
    holds one for each prompt. The stages differ."""
    N, seeds = view.image.stop - view.image.start, [seed] if isinstance(seed, int) else seed
    generators = [torch.Generator().manual_seed((1000 * each + N) % 2**63) for each in seeds]
    draws = [torch.rand(N, generator=generator, device="cpu") for generator in generators]
    return torch.stack(draws).to(view.k.device).expand(len(view.k), -1)


SCORES: dict[str, Score] = {
    score.__name__: score
    for score in (
        text_to_image, image_to_image, image_to_image_mean, image_to_image_relative, last_to_image, all_to_image,
        dart, random,
    )
}  # fmt: skip
