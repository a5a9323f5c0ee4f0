"""A folder's JSON becomes dataclasses, whatever the layout; values are held against types and limits before that."""

import math
from dataclasses import fields
from pathlib import Path
from reprlib import repr as short
from typing import Any

from ..config import VIT_L_14_336, LlavaConfig, TextConfig, VisionConfig
from ..errors import HimapError
from ..image import ImageProcessor
from .files import read_json, section

LIMITS = {  # inclusive, of a field or else of its type; no product of sizes that makes a tensor overflows
    "int": (1, 2**19), "float": (1e-12, 1e12), "num_hidden_layers": (1, 1000), "num_channels": (3, 3),
    "image_size": (1, 2**13), "max_position_embeddings": (1, 2**31), "image_token_index": (0, 2**31),
    "vision_feature_layer": (-1001, 1000), "shortest_edge": (1, 2**13), "size": (1, 2**13), "crop_size": (1, 2**13),
    "resample": (0, 5), "image_mean": (-1000, 1000), "image_std": (1e-6, 1e6),
}  # fmt: skip
PAIR = ("height", "width")
WITHOUT: dict[str, dict] = {  # what a step of the preprocessing amounts to that is switched off
    "do_resize": {"size": {"shortest_edge": None}}, "do_center_crop": {"crop_size": {}},
    "do_rescale": {"rescale_factor": 1.0}, "do_normalize": {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3},
}  # fmt: skip


def build(cls: Any, data: dict) -> Any:
    """A dataclass from those entries that are its fields, each as annotated (ints will do for floats), in `LIMITS`."""
    values = {field.name: data[field.name] for field in fields(cls) if field.name in data}
    for field in fields(cls):
        value, kinds = values.get(field.name, field.default), str(field.type).split(" | ")
        low, high = LIMITS.get(field.name, LIMITS.get(kinds[0], (-math.inf, math.inf)))
        numbers = [x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, (int, float))]
        fits = {_kind(value), _kind(value).replace("int", "float")} & {*kinds} or value is field.default is None
        fits = fits or isinstance(value, str) and repr(value) in kinds[0]  # Literal['a', 'b']
        if not fits or not all(low <= x <= high for x in numbers):
            limits = "" if math.isinf(high) else f", {low:g} to {high:g}"
            raise HimapError(f"{cls.__name__}.{field.name} {short(value)}: expected {field.type}{limits}")
    return cls(**values)


def _kind(value: object) -> str:
    """As it is annotated: "int" (an enum's, too), "None", "tuple[float, float]"."""
    if isinstance(value, tuple):
        return f"tuple[{', '.join(map(_kind, value))}]"
    name = type(value).__name__.removesuffix("Type")
    return "int" if isinstance(value, int) and name != "bool" else name


def read_config(data: dict) -> LlavaConfig:
    """From llava-hf's layout or the original LLaVA's (`mm_hidden_size`, ...). HimapError for other models."""
    _check_type(data, "", "llava", "llava_llama")
    if "mm_hidden_size" in data or "mm_vision_tower" in data:  # the original's keys: llava/model/llava_arch.py
        strategy = {"patch": "default", "cls_patch": "full"}.get(str(data.get("mm_vision_select_feature", "patch")))
        return build(LlavaConfig, {
            "vision_config": VIT_L_14_336, "text_config": _text_config(data),
            "vision_feature_layer": data.get("mm_vision_select_layer", -2),
            "vision_feature_select_strategy": strategy or "unknown",
            "projector_type": data.get("mm_projector_type", "linear"),
        })  # fmt: skip
    vision, text = section(data, "vision_config"), section(data, "text_config") or {}
    if data.get("tie_word_embeddings"):  # transformers 5 writes it beside text_config
        text = {**text, "tie_word_embeddings": data["tie_word_embeddings"]}
    values = {**data, "text_config": _text_config(text)}
    _check_type(vision or {}, "vision_config.", "clip_vision_model")
    values["vision_config"] = VIT_L_14_336 if vision is None else build(VisionConfig, vision)
    if "image_token_id" in data:
        values["image_token_index"] = data["image_token_id"]
    return build(LlavaConfig, values)


def _text_config(data: dict) -> TextConfig:
    _check_type(data, "text_config.", "llama", "llava", "llava_llama")
    rope = section(data, "rope_parameters") or section(data, "rope_scaling") or {}
    if (rope_type := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise HimapError(f"RoPE of type {short(rope_type)} is not supported: only 'default' is")
    return build(TextConfig, data | rope)  # rope_theta stands in either


def _check_type(data: dict, where: str, *supported: str) -> None:
    if data.get("model_type", supported[0]) not in supported:
        raise HimapError(f"{where}model_type {short(data['model_type'])} is not supported: expected {supported[0]!r}")


def read_image_processor(folder: Path, image_size: int) -> ImageProcessor:
    """From preprocessor_config.json or, as transformers 5 may write it, from within processor_config.json."""
    data = {"do_pad": read_json(folder / "config.json").get("image_aspect_ratio") == "pad"}  # the original LLaVA's
    if (path := folder / "preprocessor_config.json").exists():
        data |= read_json(path)
    elif (path := folder / "processor_config.json").exists():
        data |= section(read_json(path), "image_processor") or {}
    processor = image_processor(data, image_size)
    if (processor.crop_size or processor.size) != (image_size, image_size):
        raise HimapError(f"{folder}: the image processor does not make pictures of {image_size} pixels a side")
    return processor


def image_processor(data: dict, image_size: int = 224) -> ImageProcessor:
    """`do_*: false` switches a step off; sizes are an int, {"shortest_edge"} or {"height", "width"}."""
    data = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items() if v is not None}
    data = {"size": image_size, "crop_size": image_size, **data}
    for step, without in WITHOUT.items():
        if not isinstance(data.get(step, True), bool):
            raise HimapError(f"image processor: {step} is neither true nor false")
        data |= {} if data.get(step, True) else without
    size = data["size"] if isinstance(data["size"], dict) else {"shortest_edge": data["size"]}
    crop = data["crop_size"] if isinstance(data["crop_size"], dict) else dict.fromkeys(PAIR, data["crop_size"])
    data["shortest_edge"] = size.get("shortest_edge")
    data["size"] = None if "shortest_edge" in size else tuple(map(size.get, PAIR))
    data["crop_size"] = tuple(map(crop.get, PAIR)) if crop else None
    return build(ImageProcessor, data)


def read_eos(folder: Path) -> tuple[int, ...]:
    """Ids that end an answer: from generation_config.json, else config.json, else LLaMA's 2."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        data = read_json(path) if path.exists() else {}
        own, texts = data.get("eos_token_id"), (section(data, "text_config") or {}).get("eos_token_id")
        if (eos := texts if own is None else own) is not None:
            ids = tuple(eos) if isinstance(eos, list) else (eos,)
            if any(type(id) is not int for id in ids):
                raise HimapError(f"{path}: eos_token_id {short(eos)}: expected an id or a list of ids")
            return ids
    return (2,)


def read_settings(folder: Path) -> dict[str, str]:
    """himap.json, if the folder has one: what our own models say beyond their configuration (see `Llava.settings`)."""
    settings = read_json(folder / "himap.json") if (folder / "himap.json").exists() else {}
    if wrong := [name for name, value in settings.items() if not isinstance(value, str)]:
        raise HimapError(f"{folder / 'himap.json'}: {wrong[0]} is not text")
    return settings
