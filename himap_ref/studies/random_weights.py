"""A LLaVA of any shape with random weights, for measuring: in memory, or as a folder in llava-hf's layout.

The numbers repeat one block of normal ones, scaled so that activations keep their size and logits stay finite in fp16:
7B are filled at the speed of copying. Speed depends on values only where they are denormal or all alike (a GPU's power
draw), and these are neither.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from ..config import LlavaConfig
from ..errors import HimapError
from ..image import ImageProcessor
from ..model import Llava
from ..weights import find_device
from .train import hub_name

PERIOD = 1_000_003  # prime, so that no two rows of a matrix are the same piece of the block
SHARD = 2**30  # bytes of one file, and about the memory that writing takes
BOS, EOS = 1, 2  # as LLaMA has them


def meta_model(config: LlavaConfig, dtype: torch.dtype) -> Llava:
    """Names, shapes and dtype of all weights, without data."""
    with torch.device("meta"):
        return Llava(config).to(dtype).requires_grad_(False).eval()


def random_model(config: LlavaConfig, dtype: torch.dtype, device: str | torch.device = "cpu") -> Llava:
    """Takes the memory of its weights and no more. It has no tokenizer: `Llava.embed` and the decoder work on ids."""
    model = meta_model(config, dtype).to_empty(device=find_device(str(device)))
    for seed, (name, weight) in enumerate(model.named_parameters()):
        fill(weight, name, seed)
    return model


def fill(weight: Tensor, name: str, seed: int = 0) -> None:
    """Norms become 1, biases 0, matrices normal numbers of variance 1 / inputs; in place, deterministic."""
    if weight.ndim == 1:
        weight.fill_(float("norm" in name and name.endswith("weight")))
        return
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(min(PERIOD, weight.numel()), generator=generator) * weight[0].numel() ** -0.5
    block = block.to(weight.device, weight.dtype)
    for piece in weight.view(-1).split(len(block)):
        piece.copy_(block[: len(piece)])


# ---------------------------------------------------------------- a folder


def write(config: LlavaConfig, dtype: torch.dtype, folder: Path, shard: int = SHARD) -> int:
    """The folder as llava-hf publishes one: shards with the hub's tensor names, index, config, a tokenizer of bytes.

    Written shard by shard, `shard` bytes of weights each (one larger tensor is a shard of its own); returns their sum.
    Raises HimapError if the folder cannot be written, or holds weights already.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob("*.safetensors*")):
            raise HimapError(f"{folder}: holds weights already: choose another folder")
        weight_map, total = _write_shards(config, dtype, folder, shard)
        files = {
            "model.safetensors.index": {"metadata": {"total_size": total}, "weight_map": weight_map},
            "config": {**hub_config(config), "torch_dtype": str(dtype).removeprefix("torch.")},
            "generation_config": {"bos_token_id": BOS, "eos_token_id": EOS},
            "preprocessor_config": pixels_config(config.vision_config.image_size),
        }
        for name, data in files.items():
            (folder / f"{name}.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        byte_tokenizer(config.image_token_index).save(str(folder / "tokenizer.json"))
        return total
    except ImportError:
        raise HimapError("writing safetensors files needs NumPy: pip install 'himap-ref[train]'") from None
    except OSError as error:
        raise HimapError(f"{folder}: cannot be written ({error.strerror or error})") from None


def _write_shards(config: LlavaConfig, dtype: torch.dtype, folder: Path, shard: int) -> tuple[dict[str, str], int]:
    """-> {tensor: file}, bytes of all tensors."""
    groups, total = list(_groups(_published(config, dtype), shard)), 0
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        tensors = {}
        for name, weight in group.items():
            tensors[name] = torch.empty_like(weight, device="cpu")
            fill(tensors[name], name, seed=len(weight_map) + len(tensors))
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    return weight_map, total


def _published(config: LlavaConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of a published file, on the meta device: also what a LLaVA never reads of its encoder."""
    model = meta_model(replace(config, vision_feature_layer=-1), dtype)
    tensors = {hub_name(name): weight for name, weight in model.state_dict().items()}
    for leaf in ("weight", "bias"):
        name = f"vision_tower.vision_model.post_layernorm.{leaf}"
        tensors[name] = torch.empty(config.vision_config.hidden_size, dtype=dtype, device="meta")
    return tensors


def _groups(tensors: dict[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """Neighbours together, as many as stay within `limit` bytes."""
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if group and size + tensor.nbytes > limit:
            yield group
            group, size = {}, 0
        group[name], size = tensor, size + tensor.nbytes
    yield group


def hub_config(config: LlavaConfig) -> dict:
    """`LlavaConfig.from_dict`'s counterpart: the object in a config.json that transformers reads, too."""
    vision, text = asdict(config.vision_config), asdict(config.text_config)
    fields = {key: value for key, value in asdict(config).items() if key not in ("vision_config", "text_config")}
    fields.pop("projector_type")  # the original LLaVA's key
    tied = {"tie_word_embeddings": text["tie_word_embeddings"]}
    return {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", **fields, **tied,
        "image_seq_length": config.num_image_tokens,
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": vision["hidden_size"], **vision},
        "text_config": {"model_type": "llama", **text, "bos_token_id": BOS, "eos_token_id": EOS},
    }  # fmt: skip


def pixels_config(size: int) -> dict:
    """preprocessor_config.json for pictures of `size` pixels a side."""
    default = ImageProcessor()
    return {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": size}, "resample": default.resample,
        "crop_size": {"height": size, "width": size}, "image_mean": default.image_mean, "image_std": default.image_std,
    }  # fmt: skip


def byte_tokenizer(image_token: int) -> Tokenizer:
    """A token for each byte, BOS and EOS as LLaMA has them, and <image> where the model expects it."""
    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ids = [id for id in range(len(words) + 1) if id != image_token][: len(words)]
    vocabulary = dict(zip(words, ids, strict=True)) | {"<image>": image_token}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<image>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer
