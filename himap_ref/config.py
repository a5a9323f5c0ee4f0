"""Shapes of a LLaVA, read from a checkpoint's `config.json`; fields bear the names of the file.

A key that the file leaves out takes transformers' default (llava-hf files store only what differs from it), so the
defaults of `TextConfig` are LlamaConfig's, not those of LLaVA-1.5.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

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
    hidden_act: str = "quick_gelu"  # or "gelu"
    layer_norm_eps: float = 1e-5

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
        heads = self.num_attention_heads
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // heads)
        if heads % self.num_key_value_heads:
            raise HimapError(f"{heads} attention heads do not divide into {self.num_key_value_heads} key/value heads")
        if self.hidden_act != "silu":
            raise HimapError(f"decoder hidden_act {self.hidden_act!r} is not supported: only LLaMA's 'silu' is")


@dataclass(frozen=True)
class LlavaConfig:
    """A whole LLaVA: encoder, decoder and how they are joined (source: `LlavaConfig`)."""

    vision_config: VisionConfig
    text_config: TextConfig
    image_token_index: int = 32000
    vision_feature_layer: int = -2  # index into (embeddings, layer 1, ..., layer L)
    vision_feature_select_strategy: str = "default"  # "default" drops the class token, "full" keeps it
    projector_type: str = "mlp2x_gelu"  # or "linear" (LLaVA v1)
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True

    def __post_init__(self):
        layer, states = self.vision_feature_layer, self.vision_config.num_hidden_layers + 1
        if not isinstance(layer, int) or not -states <= layer < states:
            raise HimapError(f"vision_feature_layer {layer}: expected one index into {states} hidden states")
        if self.vision_feature_select_strategy not in ("default", "full"):
            raise HimapError(f"vision_feature_select_strategy {self.vision_feature_select_strategy!r} is not supported")

    @property
    def vision_layers_used(self) -> int:
        """Encoder layers that the features depend on; the later ones are neither built nor run."""
        return self.vision_feature_layer % (self.vision_config.num_hidden_layers + 1)

    @property
    def num_image_tokens(self) -> int:
        """Image tokens that enter the decoder per picture (576 for LLaVA-1.5)."""
        return self.vision_config.num_patches + (self.vision_feature_select_strategy == "full")

    @classmethod
    def from_dict(cls, data: dict) -> LlavaConfig:
        """From llava-hf's layout or the original LLaVA's (`mm_hidden_size`, ...). HimapError for other models."""
        _check_type(data, "", "llava", "llava_llama")
        if "mm_hidden_size" in data or "mm_vision_tower" in data:
            return cls(VIT_L_14_336, _text_config(data), **_original_fields(data))
        vision, text = data.get("vision_config"), dict(data.get("text_config") or {})
        if data.get("tie_word_embeddings"):  # transformers 5 writes it beside text_config
            text["tie_word_embeddings"] = True
        known = _known(cls, data) | {"text_config": _text_config(text), "vision_config": VIT_L_14_336}
        if vision is not None:
            _check_type(vision, "vision_config.", "clip_vision_model")
            known["vision_config"] = VisionConfig(**_known(VisionConfig, vision))
        if "image_token_id" in data:
            known["image_token_index"] = data["image_token_id"]
        return cls(**known)


def read_json(path: Path) -> dict:
    """A JSON object from a file; raises HimapError that names the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HimapError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(data, dict):
        raise HimapError(f"{path}: expected a JSON object")
    return data


def _known(cls, data: dict) -> dict:
    """The entries of `data` that are fields of `cls`; a config.json holds many more (dropout, dates, ...)."""
    return {field.name: data[field.name] for field in fields(cls) if field.name in data}


def _check_type(data: dict, where: str, *supported: str) -> None:
    if data.get("model_type", supported[0]) not in supported:
        raise HimapError(f"{where}model_type {data['model_type']!r} is not supported: expected {supported[0]!r}")


def _text_config(data: dict) -> TextConfig:
    _check_type(data, "text_config.", "llama", "llava", "llava_llama")
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise HimapError(f"RoPE of type {rope_type!r} is not supported: only 'default' is")
    return TextConfig(**_known(TextConfig, data) | _known(TextConfig, rope))  # rope_theta stands in either


def _original_fields(data: dict) -> dict:
    """The original LLaVA's keys (`llava/model/llava_arch.py`) under llava-hf's names."""
    strategy = {"patch": "default", "cls_patch": "full"}
    return {
        "vision_feature_layer": data.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": strategy.get(data.get("mm_vision_select_feature", "patch"), "unknown"),
        "projector_type": data.get("mm_projector_type", "linear"),
    }


VIT_L_14_336 = VisionConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
    patch_size=14,
)  # fmt: skip
LLAVA_1_5_7B = LlavaConfig(VIT_L_14_336, TextConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5))
LLAVA_1_5_13B = LlavaConfig(
    VIT_L_14_336,
    replace(LLAVA_1_5_7B.text_config, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
            num_attention_heads=40, num_key_value_heads=40),
)  # fmt: skip
