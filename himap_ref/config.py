"""Shapes of a LLaVA, read from a checkpoint's `config.json`.

Fields bear the names of the file. A key that the file leaves out takes the default of transformers, because llava-hf
files store only what differs from it; so the defaults of `TextConfig` are LlamaConfig's, not those of LLaVA-1.5.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

from .errors import HimapError


def read_json(path: Path) -> dict:
    """A JSON object from a file; raises HimapError that names the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HimapError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise HimapError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, dict):
        raise HimapError(f"{path}: expected a JSON object")
    return data


@dataclass(frozen=True)
class VisionConfig:
    """CLIP vision encoder (source: `CLIPVisionConfig`)."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224  # pixels, square
    patch_size: int = 32  # pixels, square
    hidden_act: str = "quick_gelu"  # or "gelu"
    layer_norm_eps: float = 1e-5

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TextConfig:
    """LLaMA decoder (source: `LlamaConfig`). `None` fields are derived from the others, as transformers does."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: one key/value head per query head
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self):
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise HimapError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads}): correct config.json"
            )
        if self.hidden_act != "silu":
            raise HimapError(f"hidden_act {self.hidden_act!r} is not a LLaMA decoder's: only 'silu' is implemented")


@dataclass(frozen=True)
class LlavaConfig:
    """A whole LLaVA: encoder, projector, decoder and how they are joined (source: `LlavaConfig`)."""

    vision_config: VisionConfig
    text_config: TextConfig
    image_token_index: int = 32000
    vision_feature_layer: int = -2  # index into (embeddings, layer 1, ..., layer L)
    vision_feature_select_strategy: str = "default"  # "default" drops the class token, "full" keeps it
    projector_type: str = "mlp2x_gelu"  # or "linear" (LLaVA v1)
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True

    def __post_init__(self):
        if not isinstance(self.vision_feature_layer, int):
            raise HimapError(f"vision_feature_layer {self.vision_feature_layer}: only a single layer is supported")
        if not -self.num_hidden_states <= self.vision_feature_layer < self.num_hidden_states:
            raise HimapError(
                f"vision_feature_layer {self.vision_feature_layer} does not exist: the encoder has "
                f"{self.vision_config.num_hidden_layers} layers"
            )
        if self.vision_feature_select_strategy not in ("default", "full"):
            raise HimapError(
                f"vision_feature_select_strategy {self.vision_feature_select_strategy!r}: expected 'default' or 'full'"
            )

    @property
    def num_hidden_states(self) -> int:
        return self.vision_config.num_hidden_layers + 1

    @property
    def vision_layers_used(self) -> int:
        """Encoder layers that the features depend on; the later ones are neither built nor run."""
        return self.vision_feature_layer % self.num_hidden_states

    @property
    def num_image_tokens(self) -> int:
        """Image tokens that enter the decoder per picture (576 for LLaVA-1.5)."""
        return self.vision_config.num_patches + (self.vision_feature_select_strategy == "full")

    @classmethod
    def from_file(cls, path: Path) -> LlavaConfig:
        """Reads `config.json` in llava-hf's layout or in the original LLaVA's (`mm_vision_tower`, ...)."""
        return cls.from_dict(read_json(path))

    @classmethod
    def from_dict(cls, data: dict) -> LlavaConfig:
        if "mm_vision_tower" in data or "mm_hidden_size" in data:
            return cls(vision_config=VIT_L_14_336, text_config=_text_config(data), **_original_fields(data))
        if data.get("model_type", "llava") != "llava":
            raise HimapError(f"model_type {data['model_type']!r} is not supported: this is a LLaVA (1.0, 1.5) only")
        vision, text = data.get("vision_config"), data.get("text_config") or {}
        if "tie_word_embeddings" in data:  # transformers 5 writes it beside text_config; either place ties
            text = {**text, "tie_word_embeddings": data["tie_word_embeddings"] or text.get("tie_word_embeddings", False)}
        image_token = data.get("image_token_id", data.get("image_token_index", cls.image_token_index))
        known = _known(cls, data, leave=("vision_config", "text_config", "image_token_index"))
        return cls(
            vision_config=VIT_L_14_336 if vision is None else _vision_config(vision),
            text_config=_text_config(text),
            image_token_index=image_token,
            **known,
        )


def _known(cls, data: dict, leave: tuple[str, ...] = ()) -> dict:
    """The entries of `data` that are fields of `cls`; a config.json holds many more (dropout, dates, ...)."""
    names = {field.name for field in fields(cls)} - set(leave)
    return {name: data[name] for name in names & data.keys()}


def _vision_config(data: dict) -> VisionConfig:
    if data.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise HimapError(f"vision_config.model_type {data['model_type']!r} is not supported: only CLIP's encoder is")
    return VisionConfig(**_known(VisionConfig, data))


def _text_config(data: dict) -> TextConfig:
    if data.get("model_type", "llama") not in ("llama", "llava", "llava_llama"):
        raise HimapError(f"text_config.model_type {data['model_type']!r} is not supported: only LLaMA decoders are")
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise HimapError(f"RoPE of type {rope.get('rope_type', rope.get('type'))!r} is not supported: only 'default' is")
    known = _known(TextConfig, data)
    return TextConfig(**known | {key: rope[key] for key in ("rope_theta",) if key in rope})


def _original_fields(data: dict) -> dict:
    """The original LLaVA's keys (`llava/model/llava_arch.py`) under llava-hf's names."""
    features = {"patch": "default", "cls_patch": "full"}
    return {
        "vision_feature_layer": data.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": features.get(data.get("mm_vision_select_feature", "patch"), "unknown"),
        "projector_type": data.get("mm_projector_type", "linear"),
    }


VIT_L_14_336 = VisionConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
)
VICUNA_7B = TextConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5)
VICUNA_13B = TextConfig(
    vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5,
    hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
)  # fmt: skip
LLAVA_1_5_7B = LlavaConfig(VIT_L_14_336, VICUNA_7B)
LLAVA_1_5_13B = LlavaConfig(VIT_L_14_336, VICUNA_13B)
