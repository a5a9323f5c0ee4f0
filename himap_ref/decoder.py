"""LLaMA decoder with pruning written into its layer loop (source: `LlamaForCausalLM`; names are its checkpoint's).

Differs from a textbook LLaMA:
- positions are explicit, so that tokens can leave while the others keep their place (RoPE is never 0..n-1 by habit);
- each layer has its own key/value cache, whose length depends on what was pruned before it;
- a ranked layer (the one before a stage) drops tokens as soon as their scores are known: they skip the rest of it;
- the last layer is computed only for the rows whose logits are asked for.

Shapes: B prompts, n tokens, d hidden size, h query heads, g key/value heads, c head size, N image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import TextConfig
from .errors import HimapError
from .pruning import (
    LayerTrace,
    LayerView,
    Stage,
    StageTrace,
    Trace,
    causal_mask,
    keep_highest,
    rows_of,
    stages_by_layer,
)

# ---------------------------------------------------------------- rotary positions
# The checkpoint pairs channel j with channel j + c/2 ("half-split"), not with its neighbour:
#     channel   0    1    2    3  |  4    5    6    7        (c = 8)
#     angle     a0   a1   a2   a3 |  a0   a1   a2   a3       a_j = position * theta^(-2j/c)
#     rotated (x0, x4) by a0, (x1, x5) by a1, ...


def rope(positions: Tensor, config: TextConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles at (B, n) positions, each (B, 1, n, c); computed in fp32."""
    c = config.head_dim
    inv_freq = 1.0 / config.rope_theta ** (torch.arange(0, c, 2, device=positions.device).float() / c)  # (c/2,)
    angles = positions[:, None, :, None].float() * inv_freq  # elementwise: no matrix product
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies RoPE to (B, heads, n, c)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


# ---------------------------------------------------------------- one layer


# How fast `torch.mv` reads bf16 weights beside `F.linear`, for one row: 1.6 times on a CPU that only emulates bf16, 1.2
# times with matrix units (AMX), 0.6 times where vector units multiply bf16 (AVX512-BF16 alone). In fp32 and fp16 they
# are alike; GPUs were not measured. See RESULTS.md.
MV_IS_FASTER = torch.cpu._is_amx_tile_supported() or not torch.cpu._is_avx512_bf16_supported()


class Linear(nn.Linear):
    """Sends a single row, which decoding is made of, the faster way."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() != self.in_features or self.bias is not None or not MV_IS_FASTER:
            return super().forward(x)
        return torch.mv(self.weight, x.flatten()).view(*x.shape[:-1], -1)


class Attention(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        d, self.head_dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = Linear(d, width, bias=bias)
        self.k_proj = Linear(d, kv_width, bias=bias)
        self.v_proj = Linear(d, kv_width, bias=bias)
        self.o_proj = Linear(width, d, bias=bias)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, n, h * c) -> (B, h, n, c)

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, n, d) -> (B, h, n, c), rotated."""
        return rotate(self.heads(self.q_proj(x)), cos, sin)

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n, d) -> keys (rotated) and values, each (B, g, n, c)."""
        return rotate(self.heads(self.k_proj(x)), cos, sin), self.heads(self.v_proj(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, h, r, c) over (B, g, n, c) -> (B, r, d). Without a mask: causal if r = n; a single row sees every key."""
        causal, gqa = mask is None and q.shape[2] > 1, q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=gqa)
        return self.project(out)

    def project(self, out: Tensor) -> Tensor:
        """(B, h, r, c) -> (B, r, d)."""
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TextConfig):
        super().__init__()
        d, m, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(d, m, bias=bias)
        self.up_proj = Linear(d, m, bias=bias)
        self.down_proj = Linear(m, d, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Holds the parts; the decoder's loop calls them, because tokens may leave between them."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)


class LayerCache:
    """Keys and values of one layer, (B, g, length, c) each: the filled part of two buffers with room for more."""

    ROOM = 128  # tokens; copying the whole cache for every token would cost as much as attending to it

    def __init__(self):
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.buffers: list[Tensor] = []

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds tokens behind the cached ones and returns all."""
        if self.k is None or self.v is None:  # the prompt's, as they are: an answer of one token never needs a buffer
            self.k, self.v = k, v
            return k, v
        start, stop = self.k.shape[2], self.k.shape[2] + k.shape[2]
        if not self.buffers or self.buffers[0].shape[2] < stop:
            self.buffers = [F.pad(x, (0, 0, 0, k.shape[2] + self.ROOM)) for x in (self.k, self.v)]
        for buffer, new in zip(self.buffers, (k, v), strict=True):
            buffer[:, :, start:stop] = new
        self.k, self.v = (buffer[:, :, :stop] for buffer in self.buffers)
        return self.k, self.v


@dataclass
class Prefix:
    """The tokens that begin every prompt, computed once: attention is causal, so no picture or question changes them.

    Per layer, for p tokens: what entered it (1, p, d), keys and values (1, g, p, c).
    """

    x: list[Tensor]  # only a score function asks for it
    k: list[Tensor]
    v: list[Tensor]
    trace: list[LayerTrace]  # what computing it took

    def __len__(self) -> int:
        return self.k[0].shape[2]


def in_front(first: Tensor, rest: Tensor, dim: int) -> Tensor:
    """(1, ...) before (B, ...)."""
    return torch.cat((first.expand(len(rest), *first.shape[1:]), rest), dim)


@dataclass
class DecoderOutput:
    logits: Tensor  # (B, vocab) of the last row
    hidden: Tensor  # (B, rows, d) after the final norm; rows = 1, or all that are left with all_rows=True
    trace: Trace
    cache: list[LayerCache]  # one per layer; lengths differ once a stage has pruned


# ---------------------------------------------------------------- the decoder


class LlamaDecoder(nn.Module):
    """State-dict names: the checkpoint's, without "model." (`layers.0.self_attn.q_proj.weight`, `lm_head.weight`).

    With tied embeddings there is no `lm_head`.
    """

    layers: list[DecoderLayer]  # an nn.ModuleList, whose elements have no type

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        vocabulary = torch.zeros(config.vocab_size, config.hidden_size)  # by hand: see the encoder's Embeddings
        self.embed_tokens = nn.Embedding.from_pretrained(vocabulary, freeze=False)
        layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.layers = layers  # type: ignore[assignment]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d) after the final norm -> (..., vocab)."""
        if self.config.tie_word_embeddings:
            return F.linear(hidden, self.embed_tokens.weight)
        return self.lm_head(hidden)

    def forward(
        self,
        inputs_embeds: Tensor,
        image_span: tuple[int, int] | None = None,
        stages: Sequence[Stage] = (),
        all_rows: bool = False,
        prefix: Prefix | None = None,
    ) -> DecoderOutput:
        """The prefill: a whole prompt, pruned on its way up.

        inputs_embeds: (B, n, d), image tokens in place. image_span: [start, stop) of the image tokens, same for all
        items. all_rows: compute the last layer for every row that is left, not only for the last one. prefix: of the
        first tokens of `inputs_embeds`, which are not computed again. The trace's tensors have the batch in front:
        `trace.stages[0].kept` is (B, N'); `trace.item(b)` is one prompt's.
        Raises HimapError for stages that do not fit the decoder, the image or the text.
        """
        stage_at = stages_by_layer(stages, len(self.layers))
        B, n, _ = inputs_embeds.shape
        p = len(prefix) if prefix else 0
        image = _image_slice(image_span, n, p, stages)
        x = inputs_embeds[:, p:]  # (B, n - p, d): the rows to compute; `positions` and `image` tell of all n tokens
        positions = torch.arange(n, device=x.device).expand(B, n)
        candidates = torch.arange(image.stop - image.start, device=x.device).expand(B, -1)
        cos_sin = rope(positions[:, p:], self.config, x.dtype)
        cache, trace = [LayerCache() for _ in self.layers], Trace()

        for i, layer in enumerate(self.layers):
            h = layer.input_layernorm(x)
            k, v = layer.self_attn.keys_values(h, *cos_sin)
            if prefix:
                k, v = in_front(prefix.k[i], k, dim=2), in_front(prefix.v[i], v, dim=2)
            cache[i].append(k, v)  # of every token that entered: (B, g, n, c)
            entered, kv_rows = positions, x.shape[1]
            if i == len(self.layers) - 1 and not all_rows:  # the last layer: only the last row's logits are asked for
                x, h = x[:, -1:], h[:, -1:]
                cos_sin = rope(positions[:, -1:], self.config, x.dtype)

            if stage := stage_at.get(i + 1):  # HiMAP: stage 1 on entry to layer K1, stage 2 on entry to K2
                hidden = in_front(prefix.x[i], x, dim=1) if prefix else x  # (B, n, d)
                view = LayerView(partial(self.queries_at, layer, hidden, positions), k, v, positions, hidden, image)
                scores = stage.evaluate(view)  # (B, N): phi of each image token, from this layer's attention
                places = keep_highest(scores, stage.count(candidates.shape[1]))  # (B, N') among the candidates
                kept = candidates.gather(1, places)  # the same as indices of the whole picture
                trace.stages.append(StageTrace(stage.layer, stage.name, candidates, scores, kept))
                left = rows_of(places, image, positions.shape[1])  # (B, n'): system, kept image tokens, text
                # Early drop: the others go no further; their k and v stay in this layer's cache.
                x, q = hidden.take_along_dim(left[:, p:, None], dim=1), view.queries_left(places, p)
                positions = positions.gather(1, left)
                cos_sin = rope(positions[:, p:], self.config, x.dtype)
                candidates, image = kept, slice(image.start, image.start + kept.shape[1])
                q_rows, score_rows = view.q_rows, view.score_rows
            else:
                q, q_rows, score_rows = layer.self_attn.queries(h, *cos_sin), h.shape[1], 0  # (B, h, n - p, c)

            rows, keys = x.shape[1], k.shape[2]
            mask = None if rows in (1, keys) else causal_mask(positions[:, -rows:], entered)  # SDPA cannot tell which
            x = x + layer.self_attn.attend(q, k, v, mask)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            trace.layers.append(LayerTrace(kv_rows, q_rows, score_rows, rows, keys))

        trace.check_scores()
        hidden = self.norm(x)
        return DecoderOutput(self.logits(hidden[:, -1]), hidden, trace, cache)

    def queries_at(self, layer: DecoderLayer, x: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """(B, n, d) that entered `layer`, at (B, n) positions -> the queries of (B, r) rows of them, (B, h, r, c)."""
        h = layer.input_layernorm(x.take_along_dim(rows[..., None], dim=1))
        return layer.self_attn.queries(h, *rope(positions.gather(1, rows), self.config, x.dtype))

    def compute_prefix(self, inputs_embeds: Tensor) -> Prefix:
        """(1, p, d): the tokens that begin every prompt -> what `forward` needs of them."""
        x, p, prefix = inputs_embeds, inputs_embeds.shape[1], Prefix([], [], [], [])
        cos_sin = rope(torch.arange(p, device=x.device)[None], self.config, x.dtype)
        for layer in self.layers:
            h = layer.input_layernorm(x)
            k, v = layer.self_attn.keys_values(h, *cos_sin)
            for kept, new in ((prefix.x, x), (prefix.k, k), (prefix.v, v)):
                kept.append(new)
            if len(prefix.k) == len(self.layers):  # nothing comes after the last layer's keys and values
                prefix.trace.append(LayerTrace(kv=p, q=0, score_rows=0, rows=0, keys=p))
                break
            x = x + layer.self_attn.attend(layer.self_attn.queries(h, *cos_sin), k, v)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            prefix.trace.append(LayerTrace(kv=p, q=p, score_rows=0, rows=p, keys=p))
        return prefix

    def decode(self, inputs_embeds: Tensor, position: int, cache: list[LayerCache]) -> tuple[Tensor, list[LayerTrace]]:
        """One step of generation: (B, 1, d) at `position` of the unpruned sequence -> (B, vocab) logits.

        Position, cache length and tokens seen are three numbers, equal only without pruning. Extends `cache`.
        """
        x, trace = inputs_embeds, []
        cos_sin = rope(torch.full((1, 1), position, device=x.device), self.config, x.dtype)
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            h = layer.input_layernorm(x)
            k, v = layer_cache.append(*layer.self_attn.keys_values(h, *cos_sin))
            q = layer.self_attn.queries(h, *cos_sin)
            x = x + layer.self_attn.attend(q, k, v)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            trace.append(LayerTrace(kv=1, q=1, score_rows=0, rows=1, keys=k.shape[2]))
        return self.logits(self.norm(x)[:, -1]), trace


def _image_slice(image_span: tuple[int, int] | None, n: int, p: int, stages: Sequence[Stage]) -> slice:
    if p and p > (image_span[0] if image_span else n - 1):
        raise HimapError(f"a prefix of {p} tokens must end before the image and before the last token")
    if image_span is None:
        if stages:
            raise HimapError("stages prune image tokens, but the prompt has no image: pass image_span, or no stages")
        return slice(n, n)
    start, stop = image_span
    if not 0 <= start < stop <= n:
        raise HimapError(f"image_span ({start}, {stop}) does not lie within the {n} tokens of the prompt")
    if stages and stop == n:
        raise HimapError("no text follows the image: stages need text rows after it to rank by")
    return slice(start, stop)
