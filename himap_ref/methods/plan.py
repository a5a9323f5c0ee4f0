"""What a schedule will do, without running it: the trace that `LlamaDecoder.forward` would leave, tokens by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import TextConfig
from ..errors import HimapError
from ..pruning import LayerTrace, LayerView, Stage, stages_by_layer


def plan_prefill(
    config: TextConfig, span: tuple[int, int], n: int, stages: Sequence[Stage] = (), prefix: int = 0
) -> list[LayerTrace]:
    """What `LlamaDecoder.forward` will do with n tokens, image tokens at `span`, without running it.

    prefix: how many tokens at the start are taken from a `Prefix`.
    """
    stage_at, (start, stop), layers = stages_by_layer(stages, config.num_hidden_layers), span, []
    for i in range(config.num_hidden_layers - 1):
        rows, q_rows, score_rows = n, n - prefix, 0
        if stage := stage_at.get(i + 1):
            kept = stage.count(stop - start)
            q_rows, score_rows = _ranking_rows(config, stage, slice(start, stop), n, kept, prefix)
            rows, stop = n - (stop - start) + kept, start + kept
        layers.append(LayerTrace(kv=n - prefix, q=q_rows, score_rows=score_rows, rows=rows - prefix, keys=n))
        n = rows
    return [*layers, LayerTrace(kv=n - prefix, q=1, score_rows=0, rows=1, keys=n)]


def tokens_per_layer(stages: Sequence[Stage], num_image_tokens: int, num_layers: int) -> list[int]:
    """Image tokens in each layer in the papers' order: a stage at K takes effect on entry to layer K."""
    stage_at, tokens, n = stages_by_layer(stages, num_layers), [], num_image_tokens
    for layer in range(num_layers):
        n = stage_at[layer].count(n) if layer in stage_at else n
        tokens.append(n)
    return tokens


def _ranking_rows(
    config: TextConfig, stage: Stage, image: slice, n: int, kept: int, prefix: int
) -> tuple[int, int]:  # fmt: skip
    """Rows whose queries are made, and rows whose attention is: asks the score function, on tensors without data."""

    def make_queries(rows: Tensor) -> Tensor:
        return torch.empty(1, config.num_attention_heads, rows.shape[1], config.head_dim, device="meta")

    with torch.device("meta"):
        k = torch.empty(1, config.num_key_value_heads, n, config.head_dim)
        view = LayerView(make_queries, k, k, torch.empty(1, n), torch.empty(1, n, config.hidden_size), image)
        places = torch.empty(1, kept, dtype=torch.long)
    try:
        stage.evaluate(view)
    except HimapError:
        raise
    except Exception as error:  # a user's function may fail in any way without data
        raise HimapError(f"score {stage.name!r} needs data: its FLOPs are known only after a run ({error})") from error
    view.queries_left(places, prefix)
    return view.q_rows, view.score_rows
