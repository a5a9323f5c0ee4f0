"""Tiny LLaVAs of transformers' own making, with random weights, and their folders in every layout of names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from toys import IMAGE_TOKEN, make_tokenizer

transformers = pytest.importorskip("transformers")

PATCH = 7
PARTS = "language_model", "vision_tower", "multi_modal_projector", "lm_head"


def make_processor(style: str = "byte-level", strategy: str = "default", image_size: int = 28):
    """A LlavaProcessor with Pillow's image processor and a small tokenizer."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(style), bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=[IMAGE_TOKEN],
    )  # fmt: skip
    image_processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    return transformers.LlavaProcessor(
        image_processor, tokenizer, patch_size=PATCH, vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
    )  # fmt: skip


def make_model(processor, text: dict, vision: dict, top: dict, seed: int = 0):
    """A random LlavaForConditionalGeneration whose greedy answers vary."""
    text = {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "vocab_size": len(processor.tokenizer) + 5, "max_position_embeddings": 512, **text,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28,
        "patch_size": PATCH, **vision,
    }  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text), vision_config=transformers.CLIPVisionConfig(**vision),
        image_token_index=processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), **top,
    )  # fmt: skip
    return randomised(transformers.LlavaForConditionalGeneration, config, seed)


def randomised(model_class, config, seed: int = 0):
    """A model whose greedy answers vary."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.normal_(parameter, 1.0, 0.2)
        elif "lm_head" in name or "embed_tokens" in name:
            torch.nn.init.normal_(parameter, std=1.0)
        else:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = None  # an answer has all the tokens asked for
    return model


def save(folder: Path, model, processor, layout: str = "as saved", **options) -> None:
    """The folder as transformers writes it; another layout's names replace those in it."""
    model.save_pretrained(folder, **options)
    processor.save_pretrained(folder)
    if layout != "as saved":
        for path in folder.glob("model*.safetensors*"):
            path.unlink()
        save_file(renamed(model, layout), folder / "model.safetensors")


def parts(model):
    """(part, name within it, tensor) of all weights, whatever the names of this version of transformers."""
    state = model.state_dict()
    for name, tensor in state.items():
        if "lm_head." in name:
            if not model.config.text_config.tie_word_embeddings:
                yield "lm_head", "weight", tensor.contiguous()
            continue
        for part in PARTS[:3]:
            if f"{part}." in name:
                leaf = name.split(f"{part}.")[-1].removeprefix("model.").removeprefix("vision_model.")
                yield part, leaf, tensor.clone()


LAYOUTS = {  # what PARTS are called
    # llava-hf's files on the hub
    "hub": ("language_model.model.", "vision_tower.vision_model.", "multi_modal_projector.", "language_model.lm_head."),
    # transformers 4.52 and later
    "nested": ("model.language_model.", "model.vision_tower.vision_model.", "model.multi_modal_projector.", "lm_head."),
    # the original LLaVA's
    "original": ("model.", "model.vision_tower.vision_tower.vision_model.", "model.mm_projector.", "lm_head."),
}


def renamed(model, layout: str) -> dict:
    """The weights by a layout's names; in the older ones with the buffers that old versions of transformers stored."""
    prefix = dict(zip(PARTS, LAYOUTS[layout], strict=True))
    tensors = {}
    for part, leaf, tensor in parts(model):
        if layout == "original" and part == "multi_modal_projector":
            leaf = leaf.replace("linear_1", "0").replace("linear_2", "2")
        tensors[prefix[part] + leaf] = tensor
    if layout != "nested":
        tensors[prefix["language_model"] + "layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
        tensors[prefix["vision_tower"] + "embeddings.position_ids"] = torch.arange(17)[None]
    return tensors


def edit_config(folder: Path, change) -> None:
    """Applies `change` to the object in config.json."""
    path = folder / "config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
