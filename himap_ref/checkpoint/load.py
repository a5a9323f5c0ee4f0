"""Three layouts of tensor names become one, and a model is filled, of whose weights none may be missing, unknown or
misshapen. Only safetensors are read, never pickles."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import LlavaConfig
from ..errors import HimapError
from ..model import LlavaModel
from .config import QUANTISED
from .files import read_index, tensor_files

# (checkpoint, ours): the first prefix that fits is replaced.
PREFIXES = (
    ("model.language_model.", "language_model."),  # transformers >= 4.52
    ("language_model.model.", "language_model."),  # llava-hf's files on the hub
    ("language_model.lm_head.", "language_model.lm_head."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.vision_tower.", "vision_tower."),  # the original LLaVA
    ("model.vision_tower.", "vision_tower."),
    ("vision_tower.", "vision_tower."),
    ("model.image_newline", "image_newline"),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("multi_modal_projector.", "multi_modal_projector."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),  # the original LLaVA
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.mm_projector.", "multi_modal_projector.linear_1."),  # ... v1, a single linear layer
    ("model.", "language_model."),  # the original LLaVA
)
BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")  # stored by old versions, computed here
WRAPPERS = re.compile(r"\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # torch's: only names
FOREIGN = {  # in a tensor's name, for which there is no place here: why
    r"^base_model\.|\.lora_|\.base_layer\.|\.modules_to_save\.": "PEFT's, with a LoRA adapter: merge it into its model "
    "(merge_and_unload, then save_pretrained)",
    r"\.(qweight|qzeros|g_idx|biases|SCB|weight_format|\w*(scales?|scale_inv|zero_point|packed|absmax|quant_\w+))\b":
    QUANTISED,
    "": "config.json describes no such part",
}  # fmt: skip
APART = {  # a part of LLaVA: where it may be if it is not in the files
    "vision_tower": "the original LLaVA takes it from a repository of its own (config.json: mm_vision_tower)",
    "multi_modal_projector": "LLaVA's training leaves it in a file of its own (mm_projector.bin)",
    "language_model": "the files hold what was trained, not what it was trained for",
}
Found = list[tuple[str, Path, Any]]  # of each tensor its name, the path of its file and that file, open
HEAD, EMBEDDINGS = "language_model.lm_head.weight", "language_model.embed_tokens.weight"


def rename(name: str) -> str:
    """A checkpoint's tensor name in ours; one that no layout has stays as it is."""
    name = WRAPPERS.sub("", name)
    for theirs, ours in PREFIXES:
        if name.startswith(theirs):
            leaf = name.removeprefix(theirs)
            if ours == "vision_tower.":
                leaf = leaf.removeprefix("vision_model.").removeprefix("encoder.")
            return ours + leaf
    return name


def is_unused(name: str, config: LlavaConfig) -> bool:
    """Tensors that a checkpoint rightly holds and this model never needs."""
    if name.endswith(BUFFERS) or name.startswith("vision_tower.post_layernorm."):
        return True
    layer = re.match(r"vision_tower\.layers\.([0-9]{1,9})\.", name)
    return layer is not None and config.vision_layers_used <= int(layer[1]) < config.vision_config.num_hidden_layers


def find_tensors(folder: Path) -> Found:
    """All that the model's files hold; of a tensor that several shards hold that one which the index names."""
    index, found = read_index(folder), []
    for path in tensor_files(folder):
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise HimapError(f"{path}: not a readable safetensors file ({error})") from None
        names = {*file.keys()}
        found += [(name, path, file) for name in sorted(names) if index.get(name, path.name) == path.name]
        listed = {name for name, shard in index.items() if shard == path.name and not name.endswith(BUFFERS)}
        if lost := sorted(listed - names):
            raise HimapError(f"{path}: tensor {lost[0]!r} is not in it, though the index says so: download both again")
    return found


def settle_head(config: LlavaConfig, found: Found) -> LlavaConfig:
    """The flag does not decide it: where a head is stored beside the embeddings, they are not tied."""
    apart = {HEAD, EMBEDDINGS} <= {rename(name) for name, _, _ in found}
    text = replace(config.text_config, tie_word_embeddings=config.text_config.tie_word_embeddings and not apart)
    return replace(config, text_config=text)


def load_weights(
    model: LlavaModel, folder: Path, found: Found, dtype: torch.dtype, device: torch.device,
    read: Callable[[Any, Tensor, torch.device, torch.dtype], Tensor] | None = None,
) -> None:  # fmt: skip
    """Fills `model`, built on the meta device. Tensors that need neither cast nor move stay mapped from the file.

    read: what a parameter takes of a stored tensor (safetensors' slice), if not all of it: `parallel.own_part`.
    """
    config, expected, weights = model.config, model.state_dict(), {}
    for theirs, path, file in found:
        name, what = rename(theirs), f"{path}: tensor {theirs!r}"
        if is_unused(name, config):
            continue
        if name == HEAD and config.text_config.tie_word_embeddings:
            name = EMBEDDINGS  # stored under this name alone
        if name not in expected:
            why = next(why for pattern, why in FOREIGN.items() if re.search(pattern, theirs))
            raise HimapError(f"{what} is unexpected: {why}")
        if name in weights:
            raise HimapError(f"{what} appears twice")
        header, shape = file.get_slice(theirs), list(expected[name].shape)
        if header.get_dtype() not in ("BF16", "F16", "F32", "F64"):
            raise HimapError(f"{what} holds {header.get_dtype()}, not floats of 16 bits or more: {QUANTISED}")
        if header.get_shape() != shape:
            empty = " (left empty by DeepSpeed ZeRO-3: see its zero_to_fp32.py)" if header.get_shape() == [0] else ""
            raise HimapError(f"{what} has shape {header.get_shape()}, config.json asks for {shape}{empty}")
        take = partial(read, header, expected[name]) if read else file.get_tensor(theirs).to
        weights[name] = take(device, dtype)
    for part, where in APART.items():
        if not any(name.startswith(f"{part}.") for name in weights):
            raise HimapError(f"{folder}: no {part} in it: {where}: use a folder that holds all, such as llava-hf's")
    if missing := [name for name in expected if name not in weights]:
        raise HimapError(f"{folder}: tensor {missing[0]!r} is missing ({len(missing)} in all): not a complete LLaVA")
    model.load_state_dict(weights, strict=True, assign=True)
    model.requires_grad_(False)
