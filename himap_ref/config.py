"""Shapes of a LLaVA: plain dataclasses whose fields bear the names of a checkpoint's `config.json`.

The defaults are transformers', not LLaVA-1.5's: llava-hf's files store only what differs from them. Checked here is
what the mathematics needs; values from files are checked where they are read (`checkpoint/config.py`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from .errors import HimapError


@dataclass(frozen=True)
class VisionConfig:
    """CLIP vision encoder (source: `CLIPVisionConfig`)."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224  # pixels a side
    patch_size: int = 32  # pixels a side
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads or self.image_size < self.patch_size:
            sizes = f"{self.num_attention_heads} heads, hidden size {self.hidden_size}, image {self.image_size}"
            raise HimapError(f"{sizes}, patch {self.patch_size}: the encoder's sizes do not divide")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TextConfig:
    """LLaMA decoder (source: `LlamaConfig`)."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = None  # type: ignore[assignment]  # None: one key/value head per query head
    head_dim: int = None  # type: ignore[assignment]  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_type: Literal["default", "linear", "llama3"] = "default"  # the others: for a longer context than the first,
    factor: float = 1.0  # all channels ("linear") or the slow ones ("llama3") turn so many times slower
    low_freq_factor: float = 1.0  # slow: at most so many turns in the first context; between slow and fast: a mixture
    high_freq_factor: float = 4.0  # fast, unchanged: at least so many
    original_max_position_embeddings: int = 8192  # the first context
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self):
        heads, head_dim = self.num_attention_heads, self.head_dim or self.hidden_size / self.num_attention_heads
        if head_dim % 2:
            raise HimapError(f"hidden_size {self.hidden_size}, {heads} heads of {head_dim:g}: RoPE needs an even size")
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or heads)
        object.__setattr__(self, "head_dim", int(head_dim))
        if heads % self.num_key_value_heads:
            raise HimapError(f"{heads} attention heads do not divide into {self.num_key_value_heads} key/value heads")


@dataclass(frozen=True)
class LlavaConfig:
    """A whole LLaVA: encoder, decoder and how they are joined (source: `LlavaConfig`)."""

    vision_config: VisionConfig
    text_config: TextConfig
    image_token_index: int = 32000
    vision_feature_layer: int | tuple[int, ...] = -2  # into (embeddings, layer 1, ..., layer L); several: side by side
    vision_feature_select_strategy: Literal["default", "full"] = "default"  # "default" drops the class token
    projector_type: Literal["mlp2x_gelu", "linear"] = "mlp2x_gelu"  # "linear": LLaVA v1
    projector_hidden_act: Literal["gelu", "quick_gelu"] = "gelu"
    multimodal_projector_bias: bool = True
    image_grid_pinpoints: tuple[tuple[int, int], ...] | None = None  # LLaVA-NeXT: sizes to cut into tiles (anyres.py)

    def __post_init__(self):
        _ = self.feature_layers  # raises what does not fit

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """`vision_feature_layer`, counted from 0."""
        layers, states = self.vision_feature_layer, self.vision_config.num_hidden_layers + 1
        layers = layers if isinstance(layers, tuple) else (layers,)
        if not layers or not all(-states <= layer < states for layer in layers):
            raise HimapError(f"vision_feature_layer {self.vision_feature_layer}: expected indices into {states} states")
        return tuple(layer % states for layer in layers)

    @property
    def vision_layers_used(self) -> int:
        """Encoder layers that the features depend on; the later ones are neither built nor run."""
        return max(self.feature_layers)

    @property
    def num_image_tokens(self) -> int:
        """Image tokens that enter the decoder per picture (576 for LLaVA-1.5); LLaVA-NeXT: per look at it."""
        return self.vision_config.num_patches + (self.vision_feature_select_strategy == "full")


VIT_L_14_336 = VisionConfig(1024, 4096, 24, 16, image_size=336, patch_size=14)
VICUNA_7B = TextConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5)
VICUNA_13B = replace(VICUNA_7B, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                     num_attention_heads=40, num_key_value_heads=40)  # fmt: skip
LLAVA_1_5_7B, LLAVA_1_5_13B = (LlavaConfig(VIT_L_14_336, text) for text in (VICUNA_7B, VICUNA_13B))
