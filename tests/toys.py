"""What tests share: three tokenizers, random pictures and a tiny model's configuration, made without a network."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

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
    tokenizer = _byte_level() if style == "byte-level" else _llama(prepend=style == "llama-prepend")
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    image = AddedToken(IMAGE_TOKEN, special=image_is_special, normalized=False)
    (tokenizer.add_special_tokens if image_is_special else tokenizer.add_tokens)([image])
    tokenizer.add_special_tokens([AddedToken("<pad>", special=True, normalized=False)])
    return tokenizer


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


def write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")
