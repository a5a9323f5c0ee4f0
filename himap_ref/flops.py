"""What a run did, and its FLOPs: a multiply-add is 2; every matrix product is counted, nothing else.

So `2 * rows * in * out` for each linear layer (the patch convolution is one), `2 * rows * keys * c` per head for the
scores and as much for the weighted sum. A causal mask saves nothing: masked products are computed too. Not counted:
biases, norms, softmax, activations, RoPE, embedding look-ups, sorting; and what a score function of one's own
multiplies beyond `LayerView.attention`. Equal to torch's FlopCounterMode (math attention backend) to the last FLOP.
Papers use other definitions: see `studies/accuracy/literature.py`."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from .config import LlavaConfig, TextConfig


@dataclass
class StageTrace:
    """One stage as it happened. Tensors have the batch in front; `Trace.item` drops it."""

    layer: int
    score: str
    candidates: Tensor = field(repr=False)  # (B, N) image tokens that entered: indices among all of the prompt's
    scores: Tensor = field(repr=False)  # (B, N) one per candidate, fp32
    kept: Tensor = field(repr=False)  # (B, N') those kept: likewise, ascending
    ranking: Tensor = field(repr=False)  # (B,) like `LayerTrace.ranking`, padding left out


@dataclass
class LayerTrace:
    """How many tokens of each prompt, padding included, took which part in a layer: all that its FLOPs depend on."""

    entered: int  # q_proj, k_proj, v_proj
    ranking: int  # rows of attention made explicit for a stage, each over `keys` keys
    rows: int  # that went on: the attention proper, o_proj, MLP
    keys: int  # attended to, cached ones included


@dataclass
class Trace:
    """Of one pass through the decoder: a prefill, a new turn, one token."""

    stages: list[StageTrace]
    layers: list[LayerTrace] = field(repr=False)
    padding: Tensor = field(repr=False)  # (B, 2): how many of each prompt's rows, and of its keys, are padding

    def item(self, b: int) -> "Trace":
        """Prompt `b` as it would be alone: tensors one-dimensional, layers without padding."""
        stages = [StageTrace(s.layer, s.score, *(t[b] for t in (s.candidates, s.scores, s.kept, s.ranking)))
                  for s in self.stages]  # fmt: skip
        ranking, (rows, keys) = {s.layer - 1: int(s.ranking) for s in stages}, self.padding[b].tolist()
        layers = [LayerTrace(x.entered - rows, ranking.get(i, 0), max(1, x.rows - rows), x.keys - keys)
                  for i, x in enumerate(self.layers)]  # fmt: skip  # max: where only the last row goes on
        return Trace(stages, layers, self.padding[b] * 0)


def vision_flops(config: LlavaConfig) -> int:
    """One picture through the layers that are run."""
    v = config.vision_config
    tokens, d = v.num_patches + 1, v.hidden_size
    patches = 2 * v.num_patches * v.num_channels * v.patch_size**2 * d
    layer = 2 * tokens * d * (4 * d + 2 * v.intermediate_size) + 4 * tokens**2 * d
    return patches + config.vision_layers_used * layer


def projector_flops(config: LlavaConfig, tokens: int | None = None) -> int:
    """One picture, of which `tokens` (default: all) are projected."""
    d_vision, d = config.vision_config.hidden_size * len(config.feature_layers), config.text_config.hidden_size
    tokens = config.num_image_tokens if tokens is None else tokens
    return 2 * tokens * (d_vision * d + (d * d if config.projector_type == "mlp2x_gelu" else 0))


def layer_flops(config: TextConfig, layer: LayerTrace) -> dict[str, int]:
    """One decoder layer and prompt, by part. `ranking` is the attention made explicit for a stage's scores."""
    d, c = config.hidden_size, config.head_dim
    width, kv_width = config.num_attention_heads * c, config.num_key_value_heads * c
    return {
        "q_proj": 2 * layer.entered * d * width,
        "k_proj": 2 * layer.entered * d * kv_width,
        "v_proj": 2 * layer.entered * d * kv_width,
        "ranking": 2 * layer.ranking * layer.keys * width,
        "scores": 2 * layer.rows * layer.keys * width,
        "weighted_sum": 2 * layer.rows * layer.keys * width,
        "o_proj": 2 * layer.rows * width * d,
        "mlp": 6 * layer.rows * d * config.intermediate_size,
    }


def pass_flops(config: TextConfig, layers: Iterable[LayerTrace]) -> int:
    """All layers of a pass, and the lm_head of its one row."""
    inner = sum(sum(layer_flops(config, layer).values()) for layer in layers)
    return inner + 2 * config.hidden_size * config.vocab_size
