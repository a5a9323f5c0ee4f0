"""A folder's JSON becomes dataclasses, whatever the layout; values are held against types and limits before that."""

import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any

from ..anyres import AnyresProcessor
from ..config import VIT_L_14_336, LlavaConfig, TextConfig, VisionConfig
from ..errors import HimapError
from ..image import ImageProcessor
from .files import read_json, section

LIMITS = {  # inclusive, of a field or else of its type; no product of sizes that makes a tensor overflows
    "int": (1, 2**19), "float": (1e-12, 1e12), "num_hidden_layers": (1, 1000), "num_channels": (3, 3),
    "image_size": (1, 2**13), "max_position_embeddings": (1, 2**31), "original_max_position_embeddings": (1, 2**31),
    "image_token_index": (0, 2**31), "vision_feature_layer": (-1001, 1000), "size": (1, 2**13), "resample": (0, 5),
    "shortest_edge": (1, 2**13), "crop_size": (1, 2**13), "image_mean": (-1000, 1000), "image_std": (1e-6, 1e6),
    "image_grid_pinpoints": (1, 2**13),
}  # fmt: skip
ENTRIES: dict[str, tuple] = {  # that can make it another model or prompt: the values that do not
    "image_aspect_ratio": (None, "square", "pad"), "mm_patch_merge_type": (None, "flat"), "mm_resampler_type": (None,),
    "mm_projector_type": ("linear", "mlp2x_gelu"), "mm_vision_select_feature": (None, "patch", "cls_patch"),
    "mm_use_im_start_end": (None, False), "s2": (None, False), "transformers_weights": (None,),
}  # fmt: skip
TOWERS = {"clip-vit-large-patch14-336": VIT_L_14_336, "clip-vit-large-patch14": replace(VIT_L_14_336, image_size=224)}
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # transformers' for LLaVA-NeXT
QUANTISED = "quantised weights are not read: use the repository without quantisation, or save them dequantised"
ROPE: dict[str, tuple] = {  # the types that are computed, and the settings that each needs
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}  # fmt: skip
MISTRAL = {  # what its files leave out
    "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 2**17, "sliding_window": 4096,
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
        numbers = [x for x in _leaves(value) if isinstance(x, (int, float))]
        fits = _kinds(value) & {*kinds} or value is field.default is None
        fits = fits or isinstance(value, str) and repr(value) in kinds[0]  # Literal['a', 'b']
        if not fits or not all(low <= x <= high for x in numbers):
            limits = "" if math.isinf(high) else f", {low:g} to {high:g}"
            raise HimapError(f"{cls.__name__}.{field.name} {short(value)}: expected {field.type}{limits}")
    return cls(**values)


def _leaves(value: object) -> list:
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, tuple) else [value]


def _kinds(value: object) -> set[str]:
    """How it may be annotated: an int (an enum's, too) as "int" or "float"; a tuple by its length or as of any."""
    if isinstance(value, tuple):
        each = set.intersection(*map(_kinds, value)) if value else set()
        return {f"tuple[{', '.join(kinds)}]" for x in each for kinds in ([x] * len(value), [x, "..."])}
    name = type(value).__name__.removesuffix("Type")  # NoneType
    return {"int", "float"} if isinstance(value, int) and name != "bool" else {name}


def read_config(data: dict, image_token: int | None = None) -> LlavaConfig:
    """From llava-hf's layout, of LLaVA-NeXT, too, or the original LLaVA's (`mm_vision_tower`, ...). HimapError for
    other models.

    image_token: the tokenizer's id of <image>, which the original's config.json need not say.
    """
    vision, text = section(data, "vision_config"), section(data, "text_config")
    _check_type(data, "", "llava", "llava_next", "llava_llama")
    _check_type(vision or {}, "vision_config.", "clip_vision_model")
    for name, allowed in ENTRIES.items():
        if name in data and data[name] not in allowed:
            hint = "; of LLaVA-NeXT take llava-hf's" if "anyres" in str(data[name]) else ""
            raise HimapError(f"{name} {data[name]!r} is not supported: expected {json.dumps(allowed)[1:-1]}{hint}")
    if any(part.get("quantization_config") for part in (data, vision or {}, text or {})):
        raise HimapError(f"quantization_config: {QUANTISED}")
    if is_original(data):
        return build(LlavaConfig, _original(data, image_token))
    text = text or {}
    tied = data.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)  # newer files: here
    layers = data.get("vision_feature_layer", -2)
    if isinstance(layers, list):
        layers = layers[0] if len(layers) == 1 else tuple(layers)
    config = build(LlavaConfig, {
        **data, "image_grid_pinpoints": _pinpoints(data) if data.get("model_type") == "llava_next" else None,
        "image_token_index": data.get("image_token_id", data.get("image_token_index", 32000)),
        "vision_feature_layer": layers,
        "vision_config": VIT_L_14_336 if vision is None else build(VisionConfig, vision),
        "text_config": _text_config({**text, "tie_word_embeddings": tied}),
    })  # fmt: skip
    points, side = config.image_grid_pinpoints or (), config.vision_config.image_size
    if wrong := [point for point in points if point[0] % side or point[1] % side]:
        raise HimapError(f"image_grid_pinpoints {list(wrong[0])}: not in tiles of the encoder's {side} pixels a side")
    if points and config.vision_feature_select_strategy != "default":
        raise HimapError("vision_feature_select_strategy 'full': tiles have no class token: expected 'default'")
    return config


def _pinpoints(data: dict) -> object:
    """With tuples for JSON's lists; what transformers has where a LLaVA-NeXT's file has none."""
    points = data.get("image_grid_pinpoints")
    if isinstance(points, list):
        return tuple(tuple(size) if isinstance(size, list) else size for size in points)
    return PINPOINTS if points is None else points


def is_original(data: dict) -> bool:
    """Whether a config.json is of the original LLaVA's layout; sections go before entries left over from it."""
    sections = data.get("vision_config"), data.get("text_config")
    return sections == (None, None) and ("mm_vision_tower" in data or data.get("model_type") == "llava_llama")


def _original(data: dict, image_token: int | None) -> dict:
    """The fields of `LlavaConfig` from the original's entries (its `llava/model/llava_arch.py`)."""
    name, width, layer = (data.get(f"mm_{key}") for key in ("vision_tower", "hidden_size", "vision_select_layer"))
    tower = TOWERS.get(str(name).rstrip("/").split("/")[-1])  # openai/..., or somebody's folder
    if tower is None:
        raise HimapError(f"mm_vision_tower {name!r} is not supported: expected openai/{' or openai/'.join(TOWERS)}")
    if width not in (None, tower.hidden_size):
        raise HimapError(f"mm_hidden_size {short(width)}: mm_vision_tower {name!r} is {tower.hidden_size} wide")
    if layer not in (None, *range(-25, 25)):
        raise HimapError(f"mm_vision_select_layer {short(layer)}: expected one index into 25 hidden states")
    values = {"vision_config": tower, "text_config": _text_config(data)}
    index = data.get("image_token_id", data.get("image_token_index"))
    if (index := image_token if index in (None, -200) else index) is not None:  # -200: within the original's code
        values["image_token_index"] = index
    return values | {
        "vision_feature_layer": -2 if layer is None else layer,
        "vision_feature_select_strategy": "full" if data.get("mm_vision_select_feature") == "cls_patch" else "default",
        "projector_type": data.get("mm_projector_type", "linear"),
    }


def _text_config(data: dict) -> TextConfig:
    _check_type(data, "text_config.", "llama", "mistral", "llava", "llava_llama")
    if data.get("model_type") == "mistral":
        data = MISTRAL | data
        if (window := data["sliding_window"]) is not None:
            raise HimapError(f"sliding_window {short(window)} is not supported: expected null: tokens see all before")
    rope = section(data, "rope_scaling") or section(data, "rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind in ("linear", "dynamic", "yarn") and rope.get("factor") == 1 and rope.get("attention_factor") in (None, 1):
        kind = "default"  # which they then amount to
    if kind not in [*ROPE]:
        raise HimapError(f"RoPE of type {short(kind)} is not supported: expected {', '.join(ROPE)}, or a factor of 1")
    context = "original_max_position_embeddings"  # stands beside the settings, else among them, else there is but one
    said = {context: data.get("max_position_embeddings", 2048), **rope, **{k: data[k] for k in [context] if k in data}}
    settings = {name: said.get(name) for name in ROPE[kind]}
    theta = rope.get("rope_theta", data.get("rope_theta", 10000.0))
    plain = {name: value for name, value in data.items() if name not in ROPE["llama3"]}
    text = build(TextConfig, {**plain, **settings, "rope_theta": theta, "rope_type": kind})
    if text.low_freq_factor >= text.high_freq_factor:
        raise HimapError(f"RoPE: low_freq_factor {text.low_freq_factor} is not below high_freq_factor")
    return text


def _check_type(data: dict, where: str, *supported: str) -> None:
    if data.get("model_type", supported[0]) not in supported:
        raise HimapError(f"{where}model_type {short(data['model_type'])} is not supported: expected {supported[0]!r}")


def read_image_processor(folder: Path, image_size: int, pinpoints: tuple | None = None) -> ImageProcessor:
    """From within processor_config.json, as transformers 5 writes it, else the whole of preprocessor_config.json.

    pinpoints: config.json's, of a LLaVA-NeXT.
    """
    older, newer = folder / "preprocessor_config.json", folder / "processor_config.json"
    data = section(read_json(newer), "image_processor") if newer.exists() else None
    if data is None:
        data = read_json(older) if older.exists() else {}
    kinds = ["LlavaNext"] if pinpoints else ["Llava", "CLIP"]
    kind = str(data.get("image_processor_type") or f"{kinds[0]}ImageProcessor")
    if not re.fullmatch(f"({'|'.join(kinds)})(ImageProcessor|FeatureExtractor)(Fast|Pil)?", kind):
        expected = f"expected {kinds[-1]}ImageProcessor"
        raise HimapError(f"{folder}: image_processor_type {short(kind)} is not supported: {expected}")
    if pinpoints:
        data["do_pad"] = False  # there it means a batch
    elif data.get("do_pad") is None or "Llava" not in kind:  # CLIP's never pads, but the original LLaVA does before it
        whole = read_json(folder / "config.json")
        data["do_pad"] = is_original(whole) and whole.get("image_aspect_ratio") == "pad"
    processor = image_processor(data, image_size)
    resized = {processor.shortest_edge, *(processor.size or ())} if pinpoints else set()  # a tile is as it is to be
    if (processor.crop_size or processor.size) != (image_size, image_size) or not resized <= {None, image_size}:
        raise HimapError(f"{folder}: the image processor does not make pictures of {image_size} pixels a side")
    if pinpoints and _pinpoints(data) != pinpoints:
        raise HimapError(f"{folder}: image_grid_pinpoints of the image processor are not those of config.json")
    return AnyresProcessor(**vars(processor), image_grid_pinpoints=pinpoints) if pinpoints else processor


def image_processor(data: dict, image_size: int = 224) -> ImageProcessor:
    """`do_*: false` switches a step off; sizes are an int (default_to_square: of both sides, else of the shorter one),
    {"shortest_edge"} or {"height", "width"}."""
    data = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items() if v is not None}
    data = {"size": image_size, "crop_size": image_size, **data}
    for step, without in WITHOUT.items():
        if not isinstance(data.get(step, True), bool):
            raise HimapError(f"image processor: {step} is neither true nor false")
        data |= {} if data.get(step, True) else without
    sides = PAIR if data.get("default_to_square") is True else ("shortest_edge",)
    size = data["size"] if isinstance(data["size"], dict) else dict.fromkeys(sides, data["size"])
    if "shortest_edge" in size and size.get("longest_edge"):
        raise HimapError("image processor: size with a longest_edge beside shortest_edge is not supported: remove it")
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
