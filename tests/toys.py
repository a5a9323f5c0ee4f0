"""What tests share, made without a network: three tokenizers, random pictures, tiny models' files."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from himap_ref import Llava, LlavaConfig
from himap_ref.anyres import AnyresProcessor
from himap_ref.checkpoint.config import read_config
from himap_ref.checkpoint.files import read_tokenizer
from himap_ref.commands.options import EMBEDDED
from himap_ref.image import ImageProcessor
from himap_ref.studies.weights.hub_layout import folder_files, hub_name

SENTENCES = [
    "A chat between a curious human and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the human's questions.",
    "USER: \nWhat is in the picture? ASSISTANT: a small image of two red circles, <b>bold</b> and {blue}.",
    "How many cats are there, and what colour is the largest of them? Answer with one word.",
]
SPECIAL = ["<unk>", "<s>", "</s>"]
IMAGE_TOKEN = "<image>"
TOKENIZERS = ("byte-level", "llama-prepend", "llama-first")


def make_tokenizer(style: str, image_is_special: bool = True) -> Tokenizer:
    """byte-level: GPT-2's kind. llama-prepend: LLaMA's as in llava-hf's tokenizer.json, where every piece of text
    gets a leading "▁". llama-first: the newer conversion (legacy=False), where only the text's start does."""
    return Tokenizer.from_str(_trained(style, image_is_special))


@cache
def _trained(style: str, image_is_special: bool) -> str:
    """Training takes longer than most tests."""
    tokenizer = _byte_level() if style == "byte-level" else _llama(prepend=style == "llama-prepend")
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    image = AddedToken(IMAGE_TOKEN, special=image_is_special, normalized=False)
    (tokenizer.add_special_tokens if image_is_special else tokenizer.add_tokens)([image])
    tokenizer.add_special_tokens([AddedToken("<pad>", special=True, normalized=False)])
    return tokenizer.to_str()


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(
        vocab_size=360, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))  # fmt: skip
    return tokenizer


def _llama(prepend: bool) -> Tokenizer:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=130, show_progress=False))
    data = json.loads(trained.to_str())["model"]
    learnt = sorted(data["vocab"], key=data["vocab"].get)
    vocab = {token: id for id, token in enumerate([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *learnt])}
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in data["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prepend:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A picture of random bytes."""
    bands = len(mode) if mode != "P" else 1
    image = Image.frombytes(mode, (width, height), random.Random(seed).randbytes(width * height * bands))
    if mode == "P":
        image.putpalette(random.Random(seed + 1).randbytes(768))
    return image


def random_weights(module: Any, seed: int = 0) -> Any:
    """Random weights under which every part matters: norms away from 1, biases away from 0, attention far from flat."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.data = 1 + 0.3 * noise
        elif parameter.dim() == 1:
            parameter.data = 0.2 * noise
        else:
            gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
            parameter.data = gain * noise / parameter[0].numel() ** 0.5
    return module.requires_grad_(False).eval()


def random_llava(config: LlavaConfig, seed: int = 0) -> Llava:
    return random_weights(Llava(config), seed)


TINY_CONFIG = {
    "model_type": "llava",
    "image_token_index": 8,
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    },
    "text_config": {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")


def changed(**sections: Any) -> dict:
    """TINY_CONFIG with some entries set: changed(text_config={"vocab_size": 5}, image_token_index=3)."""
    data = deepcopy(TINY_CONFIG)
    for name, value in sections.items():
        data[name] = {**data[name], **value} if isinstance(value, dict) else value
    return data


def tensors_of(model: Llava) -> dict[str, torch.Tensor]:
    return {hub_name(name): tensor.clone() for name, tensor in model.state_dict().items()}


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], data: dict = TINY_CONFIG) -> Path:
    """No more than a model's folder must have."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", data)
    make_tokenizer("byte-level").save(str(folder / "tokenizer.json"))
    save_file(tensors, folder / "model.safetensors")
    return folder


SMALL_CONFIG: dict[str, Any] = {  # with the embedded model's tokenizer: 502 tokens, 4 of the image, 3 decoder layers
    "model_type": "llava", "image_token_index": 3, "vision_feature_layer": -2, "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_config": {"model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 12, "patch_size": 14,
                      "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "hidden_act": "quick_gelu"},
    "text_config": {"model_type": "llama", "vocab_size": 502, "hidden_size": 8, "intermediate_size": 12,
                    "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
                    "max_position_embeddings": 200, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}  # fmt: skip


def write_small_model(
    folder: Path, dtypes: tuple[torch.dtype, ...] = (torch.float32,), shard: int = 2**30, side: int = 28,
    pinpoints: tuple = (),
) -> None:  # fmt: skip
    """A whole folder that answers, by the project's own writer. Tensors take turns with `dtypes`; side: in pixels;
    pinpoints: of a LLaVA-NeXT."""
    config = SMALL_CONFIG | {"vision_config": SMALL_CONFIG["vision_config"] | {"image_size": side}}
    if pinpoints:
        config |= {"model_type": "llava_next", "image_grid_pinpoints": [*map(list, pinpoints)]}
    if side > 28:  # more image tokens need more room
        config["text_config"] = SMALL_CONFIG["text_config"] | {"max_position_embeddings": 400}
    model, generator, turn = Llava(read_config(config)), torch.Generator().manual_seed(0), cycle(dtypes)
    model.tokenizer = read_tokenizer(EMBEDDED)
    model.image_processor = ImageProcessor(side, crop_size=(side, side), image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    if pinpoints:
        model.image_processor = AnyresProcessor(**vars(model.image_processor), image_grid_pinpoints=pinpoints)
    model.settings = {"stages": "1:0.5:text_to_image,2:1:image_to_image", "note": "random"}
    tokens = json.loads((EMBEDDED / "generation_config.json").read_bytes())

    def data(name: str, like: torch.Tensor) -> torch.Tensor:
        return (torch.randint(-9, 10, like.shape, generator=generator) / 64).to(next(turn))

    folder.mkdir(parents=True)
    for name, content in folder_files(model, tokens, {}, data, shard):
        (folder / name).write_bytes(content)


def split_safetensors(data: bytes) -> tuple[dict, bytes]:
    """A file's header and what follows it; `join_safetensors` is the way back, for headers that no library writes."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join_safetensors(header: dict, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body
