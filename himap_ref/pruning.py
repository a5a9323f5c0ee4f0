"""Pruning of image tokens: what a stage is, how tokens are scored, which are kept, and the trace of what happened.

A *stage* (layer K, keep, score) removes image tokens on the way from layer K-1 into layer K, ranked by what layer K-1's
attention says. HiMAP (arXiv 2503.13108) is two stages, FastV one (studies/methods.py), "none" zero. The loop that
applies them is `LlamaDecoder.forward` in decoder.py.

Kept tokens stay in order and keep their original positions. With BOS, six image tokens and two text tokens:

    tokens            bos  v0  v1  v2  v3  v4  v5  t0  t1
    positions           0   1   2   3   4   5   6   7   8
    stage 1 keeps 3 of 6, scores rank v1, v4, v5 highest:
    kept (of image)                 1   4   5
    rows (of tokens)    0           2   5   6   7   8      <- gathered from x, the rest goes no further
    positions           0           2   5   6   7   8      <- gaps stay: RoPE sees the picture as it was
    stage 2 keeps 2 of 3, ranked among the three that are left; v1 and v5 win at places 0 and 2:
    kept (of image)                 1       5              <- kept = kept[places]: always indices 0..N-1 of the picture
    positions           0           2       6   7   8
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import HimapError


def causal_mask(q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """(B, r), (B, n) -> (B, 1, r, n), True where the key stands at or before the row in the full sequence."""
    return (q_positions[:, :, None] >= k_positions[:, None, :])[:, None]


QueriesAt = Callable[[Tensor], Tensor]


class LayerView:
    """Layer K-1 in the middle of its work, as a score function sees it.

    B prompts, h query heads, g key/value heads, c head size; n tokens entered the layer, N image tokens among them.
    k and v (B, g, n, c), k with RoPE. positions (B, n): original. hidden (B, n, d): the input.
    system, image, text, all, last: slices of 0..n-1; text is all that follows the image, generated tokens included.
    Any other slice without a step will do for rows.
    make_queries: (B, r) rows -> their queries (B, h, r, c).
    q_rows, score_rows: queries made and attention rows made explicit so far, for the FLOPs accounting.
    """

    def __init__(
        self, make_queries: QueriesAt, k: Tensor, v: Tensor, positions: Tensor, hidden: Tensor, image: slice
    ):  # fmt: skip
        self.k, self.v, self.positions, self.hidden = k, v, positions, hidden
        self.q_rows = self.score_rows = 0
        n = k.shape[2]
        self.system, self.image, self.text = slice(0, image.start), image, slice(image.stop, n)
        self.all, self.last = slice(0, n), slice(n - 1, n)
        self._make_queries = make_queries
        self._made: list[tuple[int, Tensor]] = []  # pieces: first row, its and the next rows' queries

    def queries(self, rows: slice) -> Tensor:
        """(B, h, rows, c), with RoPE; made when asked for, since most of the dropped tokens never need theirs."""
        start, stop, step = rows.indices(self.k.shape[2])
        if step != 1 or stop < start:
            raise HimapError(f"rows {rows}: expected a slice that ascends without a step")
        if (q := self._known(start, stop)) is None:
            q = self._queries_at(torch.arange(start, stop, device=self.k.device).expand(len(self.k), -1))
            self._made.append((start, q))
        return q

    def queries_left(self, places: Tensor, first: int = 0) -> Tensor:
        """Of the rows that stay, from row `first` on: system, the image tokens at (B, N') places, text."""
        image = self._known(self.image.start, self.image.stop)
        if image is None:
            image = self._queries_at(places + self.image.start)
        else:
            image = image.take_along_dim(places[:, None, :, None], dim=2)
        return torch.cat((self.queries(slice(first, self.image.start)), image, self.queries(self.text)), dim=2)

    def _known(self, start: int, stop: int) -> Tensor | None:
        for first, q in self._made:
            if first <= start and stop <= first + q.shape[2]:
                return q[:, :, start - first : stop - first]
        return None

    def _queries_at(self, rows: Tensor) -> Tensor:
        self.q_rows += rows.shape[1]
        return self._make_queries(rows)

    def attention(self, rows: slice, columns: slice) -> Tensor:
        """A[rows, columns], (B, rows, columns): how much the rows attend to the columns, mean over heads."""
        return self.maps(rows)[..., columns].mean(dim=1)

    def maps(self, rows: slice) -> Tensor:
        """A[rows] of each head, (B, h, rows, n): softmax in fp32 over all n keys, of these rows alone."""
        q, k = self.queries(rows), self.k
        self.score_rows += q.shape[2]
        B, h, r, c = q.shape
        scores = (q * c**-0.5).reshape(B, k.shape[1], -1, c) @ k.mT  # (B, g, h / g * r, n)
        visible = causal_mask(self.positions[:, rows], self.positions)
        scores = scores.view(B, h, r, -1).float().masked_fill(~visible, float("-inf"))
        return scores.softmax(dim=-1)


# ---------------------------------------------------------------- score functions: who attends to whom
# LayerView -> (B, N), higher is kept. To try a criterion of your own, write one of these.


def text_to_image(view: LayerView) -> Tensor:
    """Stage 1: phi_sh(v) = sum of A[i, v] over the text rows i."""
    return view.attention(view.text, view.image).sum(dim=1)


def image_to_image(view: LayerView) -> Tensor:
    """Stage 2: phi_dp(v) = sum of A[i, v] over the image rows i that are left, v's own included."""
    return view.attention(view.image, view.image).sum(dim=1)


# ---------------------------------------------------------------- stages

Score = Callable[[LayerView], Tensor]


@dataclass(frozen=True)
class Stage:
    """On entry to `layer` (0-based), keep the image tokens that `score` ranks highest in the layer before.

    keep: an int is a count; a float in (0, 1] is a share of the image tokens that enter the stage, rounded to nearest.
    keep 0 with no score drops the whole picture, which ranks nothing.
    """

    layer: int
    keep: int | float
    score: Score | None

    def __post_init__(self):
        if type(self.layer) is not int or self.layer < 1:
            raise HimapError(f"stage layer {self.layer!r}: expected a whole number from 1 (layer K-1 ranks)")
        if type(self.keep) is int and self.keep == 0 and self.score is None:
            return
        share, count = type(self.keep) is float and 0 < self.keep <= 1, type(self.keep) is int and self.keep >= 1
        if not (share or count):
            hint = " (0 drops the whole picture: only with no score)" if self.keep == 0 else ""
            raise HimapError(f"stage keep {self.keep!r}: expected a count of at least 1 or a share in (0, 1]{hint}")
        if not callable(self.score):
            raise HimapError(f"stage score {self.score!r}: expected a function from LayerView to (B, N) scores")

    @property
    def name(self) -> str:
        function = getattr(self.score, "func", self.score)  # func: of a functools.partial
        return "none" if function is None else getattr(function, "__name__", type(function).__name__)

    def evaluate(self, view: LayerView) -> Tensor:
        """(B, N) scores in fp32 by the score function; raises HimapError if it returns anything else."""
        expected = len(view.k), view.image.stop - view.image.start
        scores = view.hidden.new_zeros(expected) if self.score is None else self.score(view)
        if not isinstance(scores, Tensor) or scores.shape != expected:
            got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise HimapError(f"score {self.name!r} at layer {self.layer} returned {got}, not (B, N) = {list(expected)}")
        return scores.float()

    def count(self, entering: int) -> int:
        """How many of `entering` image tokens stay."""
        keep = self.keep if isinstance(self.keep, int) else max(1, int(self.keep * entering + 0.5))
        if keep > entering:
            raise HimapError(f"stage at layer {self.layer} is to keep {keep} image tokens, only {entering} enter it")
        return keep


HIMAP = (Stage(2, 0.5, text_to_image), Stage(8, 0.25, image_to_image))  # question answering: 576 -> 288 -> 72
HIMAP_CAPTION = (Stage(2, 0.5, text_to_image), Stage(15, 0.25, image_to_image))  # captions and free answers


def stages_by_layer(stages: Sequence[Stage], num_layers: int) -> dict[int, Stage]:
    """{layer: stage}; raises HimapError if they are out of order, doubled, or beyond the last layer."""
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


def rows_of(places: Tensor, image: slice, n: int) -> Tensor:
    """(B, N') places within the image -> (B, n - N + N') rows of the sequence: system, those, text."""
    row = torch.arange(n, device=places.device).expand(len(places), -1)
    return torch.cat((row[:, : image.start], places + image.start, row[:, image.stop :]), dim=1)


# ---------------------------------------------------------------- trace


@dataclass
class StageTrace:
    """One stage as it happened. Tensors have the batch in front; `Trace.item` drops it."""

    layer: int
    score: str
    candidates: Tensor  # (B, N) image tokens that entered, indices 0..N-1 of the whole picture, ascending
    scores: Tensor  # (B, N) one per candidate, fp32
    kept: Tensor  # (B, N') those kept, indices of the whole picture, ascending


@dataclass
class LayerTrace:
    """How many tokens entered each part of a layer: all that its FLOPs depend on."""

    kv: int  # k_proj, v_proj: the tokens that entered the layer
    q: int  # q_proj; where a stage ranks: the rows asked for and those that stay (twice, if asked for in part before)
    score_rows: int  # rows of attention made explicit for a stage, each over `keys` keys
    rows: int  # query rows of the attention proper, o_proj, MLP
    keys: int  # keys and values attended to, cached ones included


@dataclass
class Trace:
    stages: list[StageTrace] = field(default_factory=list)
    layers: list[LayerTrace] = field(default_factory=list)

    def item(self, b: int) -> Trace:
        """The trace of prompt `b` alone, its tensors one-dimensional."""
        stages = [StageTrace(s.layer, s.score, s.candidates[b], s.scores[b], s.kept[b]) for s in self.stages]
        return Trace(stages, self.layers)

    def check_scores(self) -> None:
        """After the loop, so that a GPU need not stop inside it."""
        finite = torch.stack([stage.scores.isfinite().all() for stage in self.stages]).tolist() if self.stages else []
        for stage, is_finite in zip(self.stages, finite, strict=True):
            if not is_finite:
                reason = "a fault of its own, damaged weights, or a dtype too narrow for them"
                raise HimapError(f"score {stage.score!r} at layer {stage.layer} gave NaN or infinite values: {reason}")
