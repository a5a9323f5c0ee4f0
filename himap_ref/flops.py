"""FLOPs, exact. One definition: a multiply-add is 2 FLOPs; every matrix product is counted, nothing else.

So `2 * rows * in * out` for each linear layer (the patch convolution is one), `2 * rows * keys * c` per head for the
scores and as much for the weighted sum. A causal mask saves nothing: masked products are computed too. Not counted:
biases, norms, softmax, activations, RoPE, embedding look-ups, sorting; and what a score function of one's own
multiplies beyond `LayerView.attention`. Equal to torch's FlopCounterMode (math attention backend) to the last FLOP.

Papers use other definitions; `studies/literature.py` reproduces their numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .config import LlavaConfig, TextConfig
from .pruning import LayerTrace


def vision_flops(config: LlavaConfig) -> int:
    """One picture through the layers that are run."""
    v = config.vision_config
    tokens, d = v.num_patches + 1, v.hidden_size
    patches = 2 * v.num_patches * v.num_channels * v.patch_size**2 * d
    layer = 2 * tokens * d * (4 * d + 2 * v.intermediate_size) + 4 * tokens**2 * d
    return patches + config.vision_layers_used * layer


def projector_flops(config: LlavaConfig, tokens: int | None = None) -> int:
    """One picture, of which `tokens` (default: all) are projected."""
    d_vision, d = config.vision_config.hidden_size, config.text_config.hidden_size
    tokens = config.num_image_tokens if tokens is None else tokens
    return 2 * tokens * (d_vision * d + (d * d if config.projector_type == "mlp2x_gelu" else 0))


def layer_flops(config: TextConfig, layer: LayerTrace) -> dict[str, int]:
    """One decoder layer and prompt, by part. `ranking` is the attention made explicit for a stage's scores."""
    d, c = config.hidden_size, config.head_dim
    width, kv_width = config.num_attention_heads * c, config.num_key_value_heads * c
    return {
        "q_proj": 2 * layer.q * d * width,
        "k_proj": 2 * layer.kv * d * kv_width,
        "v_proj": 2 * layer.kv * d * kv_width,
        "ranking": 2 * layer.score_rows * layer.keys * width,
        "scores": 2 * layer.rows * layer.keys * width,
        "weighted_sum": 2 * layer.rows * layer.keys * width,
        "o_proj": 2 * layer.rows * width * d,
        "mlp": 6 * layer.rows * d * config.intermediate_size,
    }


def pass_flops(config: TextConfig, layers: Sequence[LayerTrace]) -> int:
    """All layers of a prefill or of one decode step, and the lm_head of its one row."""
    return prefix_flops(config, layers) + lm_head_flops(config)


def prefix_flops(config: TextConfig, layers: Sequence[LayerTrace]) -> int:
    """All layers, without lm_head: computing a `Prefix`, once."""
    return sum(sum(layer_flops(config, layer).values()) for layer in layers)


def lm_head_flops(config: TextConfig, rows: int = 1) -> int:
    return 2 * rows * config.hidden_size * config.vocab_size


def vanilla_prefill(config: TextConfig, n: int) -> list[LayerTrace]:
    """What `LlamaDecoder.forward` does with n tokens and no stages."""
    return [LayerTrace(n, n, 0, n, n)] * (config.num_hidden_layers - 1) + [LayerTrace(n, 1, 0, 1, n)]


def decode_steps(prefill: Sequence[LayerTrace], steps: int) -> list[list[LayerTrace]]:
    """The cached steps after a prefill: each layer's cache grows by one a step."""
    return [[LayerTrace(1, 1, 0, 1, layer.keys + step) for layer in prefill] for step in range(1, steps + 1)]


@dataclass(frozen=True)
class Flops:
    """Of one answer. decode: per step after the first token."""

    vision: int
    projector: int
    prefill: int
    decode: tuple[int, ...]
    vanilla: Flops | None = None  # same prompt and number of steps, cached, nothing pruned; None: it is that itself

    @property
    def decoder(self) -> int:
        return self.prefill + sum(self.decode)

    @property
    def total(self) -> int:
        return self.vision + self.projector + self.decoder

    @property
    def macs(self) -> int:
        """Multiply-accumulates: half of `total`."""
        return self.total // 2

    @property
    def ratio(self) -> float:
        return self.total / (self.vanilla or self).total

    @property
    def decoder_ratio(self) -> float:
        """Prefill and decode only: the part that pruning in the decoder can touch."""
        return self.decoder / (self.vanilla or self).decoder


def count_flops(
    config: LlavaConfig,
    n: int,
    span: tuple[int, int] | None,
    prefill: Sequence[LayerTrace],
    decode: Sequence[Sequence[LayerTrace]],
    image: tuple[int, int] | None = None,
) -> Flops:
    """From the traces of a run on a prompt of n tokens; `span` is None without a picture.

    image: (encoder, projector) FLOPs of the picture where they are not the model's own (`model.ImageReducer`).
    """
    text, own, vanilla_n = config.text_config, (0, 0), n
    if span:
        own = vision_flops(config), projector_flops(config)
        vanilla_n = n - (span[1] - span[0]) + config.num_image_tokens
    vanilla = vanilla_prefill(text, vanilla_n)
    steps = decode_steps(vanilla, len(decode))
    return Flops(
        *(image or own), pass_flops(text, prefill), tuple(pass_flops(text, layers) for layers in decode),
        vanilla=Flops(*own, pass_flops(text, vanilla), tuple(pass_flops(text, layers) for layers in steps)),
    )  # fmt: skip


def kv_cache_bytes(config: TextConfig, layers: Sequence[LayerTrace], bytes_per_number: int = 2) -> int:
    """Keys and values cached after a prefill (or after the decode step) that `layers` describes; bf16 by default."""
    return 2 * config.num_key_value_heads * config.head_dim * bytes_per_number * sum(layer.keys for layer in layers)
