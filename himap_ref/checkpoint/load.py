"""Three layouts of tensor names become one, and a model is filled, of whose weights none may be missing, unknown or
misshapen. Only safetensors are read, never pickles."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..config import LlavaConfig
from ..errors import HimapError
from ..model import LlavaModel
from .files import tensor_files

# (checkpoint, ours): the first prefix that fits is replaced.
PREFIXES = (
    ("model.language_model.", "language_model."),  # transformers >= 4.52
    ("language_model.model.", "language_model."),  # llava-hf's files on the hub
    ("language_model.lm_head.", "language_model.lm_head."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.vision_tower.", "vision_tower."),  # the original LLaVA
    ("model.vision_tower.", "vision_tower."),
    ("vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("multi_modal_projector.", "multi_modal_projector."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),  # the original LLaVA
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.mm_projector.", "multi_modal_projector.linear_1."),  # ... v1, a single linear layer
    ("model.", "language_model."),  # the original LLaVA
)
BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")  # stored by old versions, computed here


def rename(name: str) -> str:
    """A checkpoint's tensor name in ours; one that no layout has stays as it is."""
    for theirs, ours in PREFIXES:
        if name.startswith(theirs):
            leaf = name.removeprefix(theirs)
            if ours == "vision_tower.":
                leaf = leaf.removeprefix("vision_model.").removeprefix("encoder.")
            return ours + leaf
    return name


def is_unused(name: str, config: LlavaConfig) -> bool:
    """Tensors that a checkpoint rightly holds and this model never needs."""
    stale = name == "language_model.lm_head.weight" and config.text_config.tie_word_embeddings
    if stale or name.endswith(BUFFERS) or name.startswith("vision_tower.post_layernorm."):
        return True
    layer = re.match(r"vision_tower\.layers\.([0-9]{1,9})\.", name)
    return layer is not None and config.vision_layers_used <= int(layer[1]) < config.vision_config.num_hidden_layers


def load_weights(model: LlavaModel, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Fills `model`, built on the meta device. Tensors that need neither cast nor move stay mapped from the file."""
    config, expected, found = model.config, model.state_dict(), {}
    for path in tensor_files(folder):
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise HimapError(f"{path}: not a readable safetensors file ({error})") from None
        for theirs in file.keys():  # noqa: SIM118 - not a dict
            name, what = rename(theirs), f"{path}: tensor {theirs!r}"
            if is_unused(name, config):
                continue
            if name not in expected:
                raise HimapError(f"{what} is unexpected: config.json describes no such part")
            if name in found:
                raise HimapError(f"{what} appears twice")
            header, shape = file.get_slice(theirs), list(expected[name].shape)
            if header.get_shape() != shape:
                raise HimapError(f"{what} has shape {header.get_shape()}, config.json asks for {shape}")
            if header.get_dtype() not in ("BF16", "F16", "F32", "F64"):
                raise HimapError(f"{what} holds {header.get_dtype()}, not floating-point numbers of 16 bits or more")
            found[name] = file.get_tensor(theirs).to(device, dtype)
    if missing := [name for name in expected if name not in found]:
        raise HimapError(f"{folder}: tensor {missing[0]!r} is missing ({len(missing)} in all): not a complete LLaVA")
    model.load_state_dict(found, strict=True, assign=True)
    model.requires_grad_(False)
