"""Shapes of a LLaVA, read from a checkpoint's `config.json`; fields bear the names of the file.

A key that the file leaves out takes transformers' default (llava-hf files store only what differs from it), so the
defaults of `TextConfig` are LlamaConfig's, not those of LLaVA-1.5. Anybody may have written the file, so every field is
checked against its annotation and its limits before anything is built.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal

from .errors import HimapError

LIMITS = {  # inclusive, of a field or else of its type; no product of sizes that makes a tensor overflows
    "int": (1, 2**19), "float": (1e-12, 1e12), "num_hidden_layers": (1, 1000), "num_channels": (3, 3),
    "image_size": (1, 2**13), "max_position_embeddings": (1, 2**31), "image_token_index": (0, 2**31),
    "vision_feature_layer": (-1001, 1000), "shortest_edge": (1, 2**13), "size": (1, 2**13), "crop_size": (1, 2**13),
    "resample": (0, 5), "image_mean": (-1000, 1000), "image_std": (1e-6, 1e6),
}  # fmt: skip


def check_fields(config: Any) -> None:
    """HimapError for a field of a dataclass that is not as annotated (ints will do for floats) or beyond `LIMITS`."""
    for field in fields(config):
        value, kinds = getattr(config, field.name), field.type.split(" | ")
        low, high = LIMITS.get(field.name, LIMITS.get(kinds[0], (-math.inf, math.inf)))
        numbers = [x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, (int, float))]
        fits = bool({_kind(value), _kind(value).replace("int", "float")} & {*kinds}) or value is field.default is None
        if field.type.startswith("Literal"):
            fits = isinstance(value, str) and repr(value) in field.type
        if not fits or not all(low <= x <= high for x in numbers):
            limits = "" if math.isinf(high) else f", {low:g} to {high:g}"
            raise HimapError(f"{type(config).__name__}.{field.name} {short(value)}: expected {field.type}{limits}")


def _kind(value: object) -> str:
    """As it is annotated: "int" (an enum's, too), "None", "tuple[float, float]"."""
    if isinstance(value, tuple):
        return f"tuple[{', '.join(map(_kind, value))}]"
    whole = isinstance(value, int) and not isinstance(value, bool)
    return "int" if whole else type(value).__name__.removesuffix("Type")


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
        check_fields(self)
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
    num_key_value_heads: int = None  # type: ignore[assignment]  # null: one key/value head per query head
    head_dim: int = None  # type: ignore[assignment]  # null: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self):
        check_fields(self)
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
    vision_feature_layer: int = -2  # index into (embeddings, layer 1, ..., layer L)
    vision_feature_select_strategy: Literal["default", "full"] = "default"  # "default" drops the class token
    projector_type: Literal["mlp2x_gelu", "linear"] = "mlp2x_gelu"  # "linear": LLaVA v1
    projector_hidden_act: Literal["gelu", "quick_gelu"] = "gelu"
    multimodal_projector_bias: bool = True

    def __post_init__(self):
        check_fields(self)
        layer, states = self.vision_feature_layer, self.vision_config.num_hidden_layers + 1
        if not -states <= layer < states:
            raise HimapError(f"vision_feature_layer {layer}: expected one index into {states} hidden states")

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
        vision, text = section(data, "vision_config"), section(data, "text_config") or {}
        if data.get("tie_word_embeddings"):  # transformers 5 writes it beside text_config
            text = {**text, "tie_word_embeddings": data["tie_word_embeddings"]}
        values = known(cls, data) | {"text_config": _text_config(text), "vision_config": VIT_L_14_336}
        if vision is not None:
            _check_type(vision, "vision_config.", "clip_vision_model")
            values["vision_config"] = VisionConfig(**known(VisionConfig, vision))
        if "image_token_id" in data:
            values["image_token_index"] = data["image_token_id"]
        return cls(**values)


def read_bytes(path: Path, size: int = -1) -> bytes:
    """Of a file. An archive may hold pipes and links to devices: one is waited for, the other read, for ever."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError("a pipe or a device, not a file")
    with path.open("rb") as file:
        return file.read(size)


def read_json(path: Path) -> dict:
    """A JSON object from a file; raises HimapError that names the file."""
    try:
        data = json.loads(read_bytes(path, 2**25))  # cut where it is longer, which is no JSON then
    except (OSError, ValueError, RecursionError) as error:
        raise HimapError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(data, dict):
        raise HimapError(f"{path}: expected a JSON object")
    return data


def section(data: dict, name: str) -> dict | None:
    """An object within one; None if it is not there or null."""
    if not isinstance(inner := data.get(name), dict | None):
        raise HimapError(f"{name} {short(inner)}: expected a JSON object")
    return inner


def known(cls: Any, data: dict) -> dict:
    """The entries of `data` that are fields of `cls`; a config.json holds many more (dropout, dates, ...)."""
    return {field.name: data[field.name] for field in fields(cls) if field.name in data}


def _check_type(data: dict, where: str, *supported: str) -> None:
    if data.get("model_type", supported[0]) not in supported:
        raise HimapError(f"{where}model_type {short(data['model_type'])} is not supported: expected {supported[0]!r}")


def _text_config(data: dict) -> TextConfig:
    _check_type(data, "text_config.", "llama", "llava", "llava_llama")
    rope = section(data, "rope_parameters") or section(data, "rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise HimapError(f"RoPE of type {short(rope_type)} is not supported: only 'default' is")
    return TextConfig(**known(TextConfig, data) | known(TextConfig, rope))  # rope_theta stands in either


def _original_fields(data: dict) -> dict:
    """The original LLaVA's keys (`llava/model/llava_arch.py`) under llava-hf's names."""
    strategy = {"patch": "default", "cls_patch": "full"}
    return {
        "vision_feature_layer": data.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": strategy.get(str(data.get("mm_vision_select_feature", "patch")), "unknown"),
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
