"""The way back: a LLaVA as the files of a folder in llava-hf's layout on the hub, which every transformers reads."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save
from torch import Tensor

from ...checkpoint.config import PAIR, ROPE
from ...config import LlavaConfig


def hub_name(name: str) -> str:
    """One of our tensor names in llava-hf's."""
    part, _, leaf = name.partition(".")
    if part == "vision_tower":
        return f"vision_tower.vision_model.{'encoder.' if leaf.startswith('layers.') else ''}{leaf}"
    if part == "language_model" and not leaf.startswith("lm_head"):
        return f"language_model.model.{leaf}"
    return name


def config_json(config: LlavaConfig, tokens: dict[str, int]) -> dict:
    """`read_config`'s counterpart. tokens: such as {"eos_token_id": 2}."""
    data = asdict(config)
    vision, text = data["vision_config"], data["text_config"]
    del data["projector_type"]  # the original LLaVA's key
    kind, name = ("llava_next", "LlavaNext") if config.image_grid_pinpoints else ("llava", "Llava")
    if kind == "llava":
        del data["image_grid_pinpoints"]
    rope = {name: text.pop(name) for name in ("rope_type", *ROPE["llama3"])}
    if rope["rope_type"] != "default":
        text["rope_scaling"] = {name: rope[name] for name in ("rope_type", *ROPE[rope["rope_type"]])}
    return {
        "architectures": [f"{name}ForConditionalGeneration"], "model_type": kind, **data, **tokens,
        "image_seq_length": config.num_image_tokens, "tie_word_embeddings": text["tie_word_embeddings"],
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": vision["hidden_size"], **vision},
        "text_config": {"model_type": "llama", **text, **tokens},
    }  # fmt: skip


def folder_files(
    model: Any, tokens: dict[str, int], more: dict[str, dict], data: Callable[[str, Tensor], Tensor], shard: int
) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a folder that `from_pretrained` reads. model: an `assistant.Llava`, perhaps without data.

    more: other JSON files, names without the ending. data: hub's name and tensor to its values. shard: bytes of a file.
    """
    pixels, norm = model.image_processor, model.vision_tower.pre_layrnorm
    tensors = {hub_name(name): tensor for name, tensor in model.state_dict().items()}
    tensors["vision_tower.vision_model.post_layernorm.weight"] = torch.ones_like(norm.weight)  # in every CLIP file,
    tensors["vision_tower.vision_model.post_layernorm.bias"] = torch.zeros_like(norm.bias)  # and read by no LLaVA
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard)
    for file, names in split.filename_to_tensors.items():
        yield file, save({name: data(name, tensors[name]) for name in names}, {"format": "pt"})
    points = model.config.image_grid_pinpoints
    contents = {
        "config": {**config_json(model.config, tokens), "torch_dtype": str(norm.weight.dtype).removeprefix("torch.")},
        "generation_config": tokens, **({"himap": model.settings} if model.settings else {}), **more,
        "preprocessor_config": {
            "image_processor_type": f"{'LlavaNext' if points else 'CLIP'}ImageProcessor",
            "size": {"shortest_edge": pixels.shortest_edge},
            "crop_size": dict(zip(PAIR, pixels.crop_size or (), strict=True)), "resample": pixels.resample,
            "image_mean": pixels.image_mean, "image_std": pixels.image_std, "rescale_factor": pixels.rescale_factor,
            **({"image_grid_pinpoints": points} if points else {}),
        },
    }  # fmt: skip
    if split.is_sharded:
        contents["model.safetensors.index"] = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    for name, content in contents.items():
        yield f"{name}.json", (json.dumps(content, indent=2) + "\n").encode()
    yield "tokenizer.json", model.tokenizer.to_str(pretty=True).encode()
