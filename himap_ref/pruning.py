"""Pruning of image tokens: what a stage is, how tokens are scored, and which are kept.

A *stage* (layer K, keep, score) removes image tokens on the way from layer K-1 into layer K, ranked by what layer K-1's
attention says: HiMAP (arXiv 2503.13108) is two stages. `LlamaDecoder.forward` in decoder.py is the loop with them.

Kept tokens stay in order and keep their original positions. With BOS, six image tokens and two text tokens:

    tokens            bos  v0  v1  v2  v3  v4  v5  t0  t1
    positions           0   1   2   3   4   5   6   7   8
    stage 1 keeps 3 of 6, scores rank v1, v4, v5 highest:
    going (of rows)     0       2           5   6   7   8      <- the other rows stop in layer K1 - 1
    positions           0       2           5   6   7   8      <- gaps stay: RoPE sees the picture as it was
    kept (of image)             1           4   5              <- positions less the picture's first: v1, v4, v5
    stage 2 keeps 2 of 3, ranked among the three that are left; v1 and v5 win, at places 0 and 2:
    going (of rows)     0       1               3   4   5      <- of the six rows that were left
    positions           0       2               6   7   8
    kept (of image)             1               5              <- always indices 0..5 of the whole picture

Shapes: B prompts, n rows that entered the layer, N image tokens among them, m keys, h query heads, g key/value heads, c
head size. A is the attention, query rows x key columns: A[i, v] says how much row i attends to image token v."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import PADDING, LayerCache, causal_mask, last_rows, take
from .errors import HimapError


def attention_map(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """A of each head, (B, h, r, m): (B, r, h, c) queries over (B, m, g, c) keys; softmax in fp32 (official: half)."""
    (B, r, h, c), (_, m, g, _) = q.shape, k.shape
    q = (q * c**-0.5).unflatten(2, (g, h // g)).permute(0, 2, 3, 1, 4)  # (B, g, h / g, r, c): these heads share a key
    dots = q.reshape(B, g, h // g * r, c) @ k.permute(0, 2, 3, 1)  # (B, g, h / g * r, m)
    return dots.view(B, h, r, m).float().masked_fill(~mask, float("-inf")).softmax(dim=-1)


class LayerView:
    """Layer K-1 in the middle of its work, as a score function sees it. Its tensors are copies: nothing can be spoiled.

    Of the n rows that entered: q (B, n, h, c), with RoPE; hidden (B, n, d), the layer's input; positions (B, n).
    Of the m keys that they see, a cached prefix's first: k (with RoPE) and v (B, m, g, c), key_positions (B, m).
    system, image, text, all: slices of the rows; text is all that follows the image, generated tokens included. Several
    pictures are one image, in their order; text follows the last of them, and what stands between is among the system.
    last (B, 1): each prompt's last row. real (B, n): False for the padding of a shorter prompt.
    ranking: rows of attention asked for so far; own_ranking (B,): without padding. For the FLOPs.
    """

    def __init__(self, q: Tensor, cache: LayerCache, hidden: Tensor, positions: Tensor, image: slice):
        self.q, self.hidden, self.positions = q.clone(), hidden.clone(), positions.clone()
        self.k, self.v, self.key_positions = cache.k.clone(), cache.v.clone(), cache.positions.clone()
        n = q.shape[1]
        self.system, self.image, self.text, self.all = slice(0, image.start), image, slice(image.stop, n), slice(0, n)
        self.real, self.last = positions < PADDING, last_rows(positions)
        self.ranking, self.own_ranking = 0, torch.zeros_like(positions[:, 0])

    def attention(self, rows: slice | Tensor) -> Tensor:
        """A[rows, image], (B, r, N), mean over heads. rows: a slice, or (B, r) indices."""
        cached = self.k.shape[1] - self.q.shape[1]
        return self.maps(rows)[..., cached + self.image.start : cached + self.image.stop].mean(dim=1)

    def maps(self, rows: slice | Tensor) -> Tensor:
        """A[rows] of each head, over all m keys: (B, h, r, m), softmax in fp32; 0 from padding."""
        q, real = take(self.q, rows), take(self.real, rows)
        self.ranking, self.own_ranking = self.ranking + q.shape[1], self.own_ranking + real.sum(dim=1)
        A = attention_map(q, self.k, causal_mask(take(self.positions, rows), self.key_positions))
        return A * real[:, None, :, None]


# ---------------------------------------------------------------- score functions: who attends to whom
Score = Callable[[LayerView], Tensor]  # -> (B, N), higher is kept. To try a criterion of your own, write one of these.


def text_to_image(view: LayerView) -> Tensor:
    """Stage 1: phi_sh(v) = sum of A[i, v] over the text rows i."""
    return view.attention(view.text).sum(dim=1)


def image_to_image(view: LayerView) -> Tensor:
    """Stage 2: phi_dp(v) = sum of A[i, v] over the image rows i that are left, v's own included."""
    return view.attention(view.image).sum(dim=1)


@dataclass(frozen=True)
class Stage:
    """On entry to `layer` (0-based), keep the image tokens that `score` ranks highest in the layer before.

    keep: an int is a count; a float in (0, 1] a share of the image tokens that enter, to the nearest, at least 1.
    keep 0 with no score drops the whole picture, which ranks nothing.
    """

    layer: int
    keep: int | float
    score: Score | None

    def __post_init__(self):
        if type(self.layer) is not int or self.layer < 1:
            raise HimapError(f"stage layer {self.layer!r}: expected a whole number from 1 (layer K-1 ranks)")
        no_picture = type(self.keep) is int and self.keep == 0 and self.score is None
        share, count = type(self.keep) is float and 0 < self.keep <= 1, type(self.keep) is int and self.keep >= 1
        if not (share or count or no_picture):
            hint = " (0 drops the whole picture: only with no score)" if self.keep == 0 else ""
            raise HimapError(f"stage keep {self.keep!r}: expected a count of at least 1 or a share in (0, 1]{hint}")
        if not (no_picture or callable(self.score)):
            raise HimapError(f"stage score {self.score!r}: expected a function from LayerView to (B, N) scores")

    @property
    def name(self) -> str:
        function = getattr(self.score, "func", self.score)  # func: of a functools.partial
        return "none" if function is None else getattr(function, "__name__", type(function).__name__)

    def evaluate(self, view: LayerView) -> Tensor:
        """(B, N) scores in fp32 by the score function; raises HimapError if it returns anything else."""
        expected, where = view.positions[:, view.image].shape, f"score {self.name!r} at layer {self.layer}"
        scores = torch.zeros_like(view.hidden[:, view.image, 0]) if self.score is None else self.score(view)
        if not isinstance(scores, Tensor) or scores.shape != expected or scores.is_complex():
            got = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise HimapError(f"{where} returned {got}, not (B, N) = {list(expected)}")
        if not (scores := scores.float()).isfinite().all():
            reason = "a fault of its own, damaged weights, or a dtype too narrow for them"
            raise HimapError(f"{where} gave NaN or infinite values: {reason}")
        return scores

    def count(self, entering: int) -> int:
        """How many of `entering` image tokens stay."""
        keep = self.keep if isinstance(self.keep, int) else max(1, int(self.keep * entering + 0.5))
        if keep > entering:
            raise HimapError(f"stage at layer {self.layer} is to keep {keep} image tokens, only {entering} enter it")
        return keep


Stages = Sequence[Stage] | str  # or the name of a method
METHODS: dict[str, Callable[[int], Sequence[Stage]]] = {}  # name -> stages by depth: methods/schedules.py fills it
HIMAP = (Stage(2, 0.5, text_to_image), Stage(8, 0.25, image_to_image))  # question answering: 576 -> 288 -> 72
HIMAP_CAPTION = (Stage(2, 0.5, text_to_image), Stage(15, 0.25, image_to_image))  # captions and free answers


def stages_by_layer(stages: Stages, num_layers: int) -> dict[int, Stage]:
    """{layer: stage}; raises HimapError if they are out of order, doubled, or beyond the last layer."""
    if isinstance(stages, str):
        if stages not in METHODS:
            raise HimapError(f"method {stages!r} is unknown: expected {', '.join(METHODS)}, or stages")
        stages = METHODS[stages](num_layers)
    layers = [stage.layer for stage in stages]
    if any(b <= a for a, b in zip(layers, layers[1:], strict=False)):
        raise HimapError(f"stage layers {layers} must ascend, each layer once")
    if layers and layers[-1] >= num_layers:
        raise HimapError(f"stage layer {layers[-1]} does not exist: the decoder's layers are 0..{num_layers - 1}")
    return dict(zip(layers, stages, strict=True))


def keep_highest(scores: Tensor, count: int) -> Tensor:
    """Places of the `count` highest of (B, N) scores, ascending, (B, count). Of equal scores the lower place wins."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices  # topk leaves ties to the device
    return order[:, :count].sort(dim=-1).values


def rows_left(places: Tensor, image: slice, n: int) -> Tensor:
    """(B, N') places within the image -> (B, n - N + N') of the n rows: system, those, text."""
    row = torch.arange(n, device=places.device).expand(len(places), -1)
    return torch.cat((row[:, : image.start], places + image.start, row[:, image.stop :]), dim=1)
