"""LLaMA decoder with pruning written into its layer loop (source: `LlamaForCausalLM`; names are its checkpoint's).

Differs from a textbook LLaMA:
- every token bears its position in the whole prompt, never 0..n-1: others may leave, and it keeps its place; of
  several pictures the tokens are moved together, so that image tokens are always one block of rows;
- each layer has its own key/value cache, as long as what pruning let through to it;
- rows can stop inside a layer, after its q, k, v and (in layer K-1) its ranking: the losers of a stage, and in the last
  layer all rows but each prompt's last. Their keys and values stay in its cache; attention output, o_proj and MLP are
  not computed. The official code lets losers finish layer K-1: same result, nobody reads what they become there.

Shapes: B prompts, n tokens, d hidden size, h query heads, g key/value heads, c head size, m keys."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cache import PADDING, LayerCache, causal_mask, last_rows, take
from .config import TextConfig
from .errors import HimapError
from .flops import LayerTrace, StageTrace, Trace
from .pruning import LayerView, Stages, keep_highest, rows_left, stages_by_layer

# Rotary positions. The checkpoint pairs channel j with channel j + c/2 ("half-split"), not with its neighbour:
#     channel   0    1    2    3  |  4    5    6    7        (c = 8)
#     angle     a0   a1   a2   a3 |  a0   a1   a2   a3       a_j = position * theta^(-2j/c)
#     rotated (x0, x4) by a0, (x1, x5) by a1, ...


def rope(positions: Tensor, config: TextConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles at (B, n) positions, each (B, n, 1, c); computed in fp32."""
    channels = torch.arange(0, config.head_dim, 2, device=positions.device).float()
    inv_freq = 1.0 / config.rope_theta ** (channels / config.head_dim)  # (c/2,)
    if config.rope_type != "default":
        turns = config.original_max_position_embeddings * inv_freq / (2 * torch.pi)  # within the first context
        slow, fast = config.low_freq_factor, config.high_freq_factor
        stays = ((turns - slow) / (fast - slow)).clamp(0, 1) if config.rope_type == "llama3" else 0.0  # (c/2,): a share
        inv_freq = stays * inv_freq + (1 - stays) * inv_freq / config.factor
    angles = positions[:, :, None, None].float() * inv_freq  # elementwise: no matrix product
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies RoPE to (B, n, heads, c)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        d, self.head_dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(d, width, bias=bias)
        self.k_proj = nn.Linear(d, kv_width, bias=bias)
        self.v_proj = nn.Linear(d, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, d, bias=bias)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, n, d) -> queries (B, n, h, c), keys and values (B, n, g, c); queries and keys rotated."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, r, h, c) over (B, m, g, c) -> (B, r, d). No mask: row i is key i (nothing cached or dropped), causal."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TextConfig):
        super().__init__()
        d, wide, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(d, wide, bias=bias)
        self.up_proj = nn.Linear(d, wide, bias=bias)
        self.down_proj = nn.Linear(wide, d, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Holds the parts; the decoder's loop calls them, because tokens may stop between them."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)


@dataclass
class DecoderOutput:
    logits: Tensor = field(repr=False)  # (B, vocab) of each prompt's last row
    hidden: Tensor = field(repr=False)  # (B, rows, d) after the final norm; rows = 1, with all_rows all that are left
    trace: Trace
    cache: list[LayerCache] = field(repr=False)  # one per layer; lengths differ once a stage has pruned


class LlamaDecoder(nn.Module):
    """State-dict names: the checkpoint's, without "model."; with tied embeddings there is no `lm_head`."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        vocabulary = torch.zeros(config.vocab_size, config.hidden_size)  # by hand: see the encoder's Embeddings
        self.embed_tokens = nn.Embedding.from_pretrained(vocabulary, freeze=False)
        layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.layers: list[DecoderLayer] = layers  # type: ignore[assignment]  # its elements have no type
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d) after the final norm -> (..., vocab)."""
        return F.linear(hidden, self.embed_tokens.weight) if self.config.tie_word_embeddings else self.lm_head(hidden)

    def forward(
        self, inputs_embeds: Tensor, image_span: tuple[int, ...] | None = None, stages: Stages = (),
        all_rows: bool = False, positions: Tensor | None = None, cache: Sequence[LayerCache] | None = None,
    ) -> DecoderOutput:  # fmt: skip
        """Some tokens through all layers: a whole prompt, a part of one, a new turn, or one generated token.

        inputs_embeds: (B, n, d), image tokens in place. image_span: positions (start, stop) of the image tokens if they
        are among these, the same for all prompts; (start, stop, start, stop, ...) of several pictures, which are ranked
        together. stages: prune them, ranked by these rows; "himap" is HIMAP. all_rows: the last layer for every row
        left, not only for each prompt's last. positions: (B, n) in the whole prompt, ascending, PADDING behind a
        shorter one; without a cache 0..n-1. cache: of all tokens before (B = 1: shared by all prompts); it stays as it
        is. Raises HimapError for what does not fit the decoder or each other.
        """
        x, stage_at = inputs_embeds, stages_by_layer(stages, len(self.layers))
        if positions is None:  # behind a cache the caller must know them
            positions = torch.arange(0 if cache else x.shape[1], device=x.device).expand(len(x), -1)
        image, order = self._check(x, positions, image_span, stage_at, cache)
        if order is not None:  # several pictures: their tokens become one block; positions say where they stand
            x, positions = x[:, order], positions[:, order]
        candidates = torch.arange(image.stop - image.start, device=x.device).expand(len(x), -1)  # (B, N) image tokens
        cos, sin = rope(positions, self.config, x.dtype)
        out_cache, stage_traces, layer_traces = [], [], []

        for i, layer in enumerate(self.layers):
            q, k, v = layer.self_attn.qkv(layer.input_layernorm(x), cos, sin)  # of all rows that entered
            before = cache[i] if cache else LayerCache(k[:, :0], v[:, :0], positions[:, :0])
            seen = before.then(k, v, positions)  # all that ever entered this layer
            out_cache.append(seen)
            entered, ranking, going = x.shape[1], 0, None  # ranking: rows of A that a score read; going: None, if all

            if stage := stage_at.get(i + 1):  # HiMAP: stage 1 on entry to layer K1, stage 2 on entry to K2
                view = LayerView(q, seen, x, positions, image)
                scores = stage.evaluate(view)  # (B, N): phi of each image token, from this layer's attention
                places = keep_highest(scores, stage.count(scores.shape[1]))  # (B, N') among these N
                kept = take(candidates, places)
                stage_traces.append(StageTrace(stage.layer, stage.name, candidates, scores, kept, view.own_ranking))
                going, ranking = rows_left(places, image, entered), view.ranking
                image, candidates = slice(image.start, image.start + kept.shape[1]), kept
            elif i + 1 == len(self.layers) and not all_rows:  # only the last row's logits are asked for
                going = last_rows(positions)
            if going is not None:  # the others stop here; their keys and values stay in this layer's cache
                x, q, positions, cos, sin = (take(t, going) for t in (x, q, positions, cos, sin))

            mask = None if order is None and x.shape[1] == seen.k.shape[1] else causal_mask(positions, seen.positions)
            x = x + layer.self_attn.attend(q, seen.k, seen.v, mask)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            layer_traces.append(LayerTrace(entered, ranking, x.shape[1], seen.k.shape[1]))

        hidden, padded = self.norm(x), out_cache[0].positions == PADDING  # padded (B, m): of cached keys, then of rows
        padding = torch.stack((padded[:, -inputs_embeds.shape[1] :].sum(dim=1), padded.sum(dim=1)), dim=1)
        logits = self.logits(take(hidden, last_rows(positions))[:, 0])
        hidden = hidden if order is None else take(hidden, positions.argsort(dim=1))
        return DecoderOutput(logits, hidden, Trace(stage_traces, layer_traces, padding), out_cache)

    def _check(self, x: Tensor, positions: Tensor, span: tuple | None, stages: dict, cache: Sequence | None) -> tuple:
        """The rows of the image tokens, and the order of all rows that makes one block of them, None if they are one:
        what stands between pictures goes before it. Raises HimapError for what does not fit."""
        (B, n), context = x.shape[:2], self.config.max_position_embeddings
        if positions.shape != (B, n) or not B * n:
            raise HimapError(f"{B} prompts of {n} tokens: expected at least one, each with its position behind a cache")
        real, past = positions < PADDING, positions.new_tensor([[-1]]) if cache is None else cache[0].positions
        if ((past >= positions[:, :1]) & (past < PADDING)).any() or not ((positions.diff() > 0) | ~real[:, 1:]).all():
            raise HimapError("positions must ascend, from 0 or behind those in the cache, with all padding at the end")
        if (length := 1 + int(positions.masked_fill(~real, 0).max())) > context:
            raise HimapError(f"the prompt has {length} tokens, the model's context {context}: shorten the prompt")
        if not span:
            if stages:
                raise HimapError("stages prune image tokens, but the prompt has no image: pass image_span or no stages")
            return slice(n, n), None
        edges = torch.tensor(span, device=x.device) - positions[0, 0]
        first, stop = int(edges[0]), int(edges[-1])
        inside = first >= 0 and stop <= n and len(edges) % 2 == 0 and bool((edges.diff() > 0).all())
        if not inside or (positions[:, first:stop] != torch.arange(span[0], span[-1], device=x.device)).any():
            raise HimapError(f"image_span {span} does not lie within the {n} tokens of the prompt")
        if stages and (real.sum(dim=1) <= stop).any():
            raise HimapError("no text follows the image: stages need text rows after it to rank by")
        row = torch.arange(n, device=x.device)
        is_image = torch.bucketize(row, edges, right=True) % 2 == 1
        order = torch.cat((row[~is_image & (row < stop)], row[is_image], row[stop:]))
        return slice(stop - int(is_image.sum()), stop), order if len(span) > 2 else None
