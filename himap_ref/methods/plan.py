"""What a schedule will do, without running it: the trace that `LlamaDecoder.forward` would leave, tokens by layer."""

from __future__ import annotations

import torch

from ..cache import LayerCache
from ..config import TextConfig
from ..errors import HimapError
from ..flops import LayerTrace
from ..pruning import LayerView, Stage, Stages, stages_by_layer


def plan_prefill(
    config: TextConfig, span: tuple[int, int], n: int, stages: Stages = (), cached: int = 0
) -> list[LayerTrace]:
    """What `LlamaDecoder.forward` will do with a prompt of n tokens, image tokens at `span`, without running it.

    cached: how many tokens at its start come from a cache.
    """
    stage_at, (start, stop), layers = stages_by_layer(stages, config.num_hidden_layers), span, []
    for i in range(config.num_hidden_layers - 1):
        left, ranking = n, 0
        if stage := stage_at.get(i + 1):
            ranking = _ranking_rows(config, stage, slice(start - cached, stop - cached), n, cached)
            kept = stage.count(stop - start)
            left, stop = n - (stop - start) + kept, start + kept
        layers.append(LayerTrace(n - cached, ranking, left - cached, n))
        n = left
    return [*layers, LayerTrace(n - cached, 0, 1, n)]


def tokens_per_layer(stages: Stages, num_image_tokens: int, num_layers: int) -> list[int]:
    """Image tokens in each layer in the papers' order: a stage at K takes effect on entry to layer K."""
    stage_at, tokens, n = stages_by_layer(stages, num_layers), [], num_image_tokens
    for layer in range(num_layers):
        n = stage_at[layer].count(n) if layer in stage_at else n
        tokens.append(n)
    return tokens


def _ranking_rows(config: TextConfig, stage: Stage, image: slice, n: int, cached: int) -> int:
    """Rows whose attention the score function asks for; it is called on tensors without data."""
    with torch.device("meta"):
        k = torch.empty(1, n, config.num_key_value_heads, config.head_dim)
        q = torch.empty(1, n - cached, config.num_attention_heads, config.head_dim)
        positions, hidden = torch.empty(1, n, dtype=torch.long), torch.empty(1, n - cached, config.hidden_size)
    view = LayerView(q, LayerCache(k, k, positions), hidden, positions[:, cached:], image)
    try:
        if stage.score:
            stage.score(view)
    except HimapError:
        raise
    except Exception as error:  # a user's function may fail in any way without data
        raise HimapError(f"score {stage.name!r} needs data: its FLOPs are known only after a run ({error})") from error
    return view.ranking
