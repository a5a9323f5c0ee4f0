"""A LLaVA of any shape with random weights, for measuring: in memory, or as a folder in llava-hf's layout.

The numbers repeat one block of normal ones, scaled so that activations keep their size and logits stay finite in fp16:
7B are filled at the speed of copying. Speed depends on values only where they are denormal or all alike (a GPU's power
draw), and these are neither.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from ...assistant import Llava
from ...assistant.device import find_device
from ...config import LlavaConfig
from ...errors import HimapError
from ...image import ImageProcessor
from .hub_layout import folder_files

PERIOD = 1_000_003  # prime, so that no two rows of a matrix are the same piece of the block
SHARD = 2**30  # bytes of one file; writing takes twice that in memory
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
    """The folder as llava-hf publishes one, with a tokenizer of bytes; returns the bytes of its weights.

    Written shard by shard, `shard` bytes of weights each (one larger tensor is a shard of its own).
    Raises HimapError if the folder cannot be written, or holds weights already.
    """
    size, model = config.vision_config.image_size, meta_model(replace(config, vision_feature_layer=-1), dtype)
    model.config = config  # but with all of the encoder's layers: those that no LLaVA reads are published, too
    model.tokenizer = byte_tokenizer(config.image_token_index)
    model.image_processor = ImageProcessor(shortest_edge=size, crop_size=(size, size))
    sizes: list[int] = []

    def data(name: str, like: Tensor) -> Tensor:
        weight = torch.empty_like(like, device="cpu")
        sizes.append(weight.nbytes)
        fill(weight, name, seed=len(sizes))
        return weight

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob("*.safetensors*")):
            raise HimapError(f"{folder}: holds weights already: choose another folder")
        for name, content in folder_files(model, {"bos_token_id": BOS, "eos_token_id": EOS}, {}, data, shard):
            (folder / name).write_bytes(content)
        return sum(sizes)
    except ImportError:
        raise HimapError("writing safetensors files needs NumPy: pip install 'himap-ref[train]'") from None
    except OSError as error:
        raise HimapError(f"{folder}: cannot be written ({error.strerror or error})") from None


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
