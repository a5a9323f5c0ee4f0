"""What a schedule will do, without running it: the trace that `LlamaDecoder.forward` would leave, tokens by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
        rows, score_rows = n, 0
        if stage := stage_at.get(i + 1):
            score_rows = _score_rows(config, stage, slice(start, stop), n)
            dropped = stop - start - stage.count(stop - start)
            rows, stop = n - dropped, stop - dropped
        layers.append(LayerTrace(kv=n - prefix, q=n - prefix, score_rows=score_rows, rows=rows - prefix, keys=n))
        n = rows
    return [*layers, LayerTrace(kv=n - prefix, q=1, score_rows=0, rows=1, keys=n)]


def tokens_per_layer(stages: Sequence[Stage], num_image_tokens: int, num_layers: int) -> list[int]:
    """Image tokens in each layer in the papers' order: a stage at K takes effect on entry to layer K."""
    stage_at, tokens, n = stages_by_layer(stages, num_layers), [], num_image_tokens
    for layer in range(num_layers):
        n = stage_at[layer].count(n) if layer in stage_at else n
        tokens.append(n)
    return tokens


def _score_rows(config: TextConfig, stage: Stage, image: slice, n: int) -> int:
    """Asks the score function itself which rows it makes explicit, on tensors without data."""
    with torch.device("meta"):
        q = torch.empty(1, config.num_attention_heads, n, config.head_dim)
        k = torch.empty(1, config.num_key_value_heads, n, config.head_dim)
        view = LayerView(q, k, k, torch.empty(1, n), torch.empty(1, n, config.hidden_size), image)
    try:
        stage.evaluate(view)
    except HimapError:
        raise
    except Exception as error:  # a user's function may fail in any way without data
        raise HimapError(f"score {stage.name!r} needs data: its FLOPs are known only after a run ({error})") from error
    return view.score_rows
