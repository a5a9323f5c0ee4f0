"""Weights: a folder or hub id becomes tensors under this package's names. Only safetensors are read, never pickles.

Checkpoints come in three layouts of names; `PREFIXES` maps each to the module tree of `Llava`. A name that it does not
know, a missing tensor and a shape that differs are errors that name the tensor.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from reprlib import repr as short

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .config import LlavaConfig, read_json, section
from .errors import HimapError

SHORT_NAMES = {"llava-1.5-7b": "llava-hf/llava-1.5-7b-hf", "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf"}
NEEDED_FILES = ["*.json", "*.safetensors"]  # of a hub repository; the tokenizer is in tokenizer.json

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


def find_folder(source: str | Path, revision: str | None = None) -> Path:
    """A local folder, or one downloaded from the hub (resumable, with a progress bar)."""
    if os.path.isdir(source):
        if revision is not None:
            raise HimapError(f"revision {revision!r}: {str(source)!r} is a folder, which has no other: leave it out")
        return Path(source)
    name = SHORT_NAMES.get(str(source), str(source))
    if os.path.exists(source) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        names = ", ".join(SHORT_NAMES)
        raise HimapError(f"weights {str(source)!r}: no such folder, hub id (owner/name) or short name ({names})")
    from huggingface_hub import snapshot_download  # slow to import, and not needed for a local folder

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=NEEDED_FILES))
    except Exception as error:  # the hub's own errors, those of the HTTP library of its version, OSError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise HimapError(f"weights {name!r}: cannot be downloaded ({reason})") from None


def find_device(name: str | torch.device, dtype: torch.dtype = torch.float32) -> torch.device:
    """The device, or a HimapError if this machine or this build of torch does not have it, or it not the dtype."""
    try:
        one = torch.ones(1, 1, device=name, dtype=dtype)
        (one @ one).softmax(dim=-1).item()
        return one.device
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        reason = re.split(r"\. |\n", str(error))[0]  # the first sentence of many
        raise HimapError(f"device {str(name)!r}: not available for {dtype} ({reason})") from None


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, from its index if it has one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise HimapError(f"{index}: not a shard index (no weight_map)")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise HimapError(f"{index}: shard {name!r} lies outside the folder")
            if not os.path.isfile(folder / name):
                raise HimapError(f"{folder}: shard {name} is missing: download it again")
        return [folder / name for name in names]
    if files := sorted(path for path in folder.glob("*.safetensors") if path.is_file()):
        return files
    if pickles := sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)):
        raise HimapError(
            f"{folder}: {pickles[0]} is a pickle, which can run code when it is read; convert it to safetensors first "
            "(transformers: from_pretrained(...).save_pretrained(folder)) or use a llava-hf repository"
        )
    raise HimapError(f"{folder}: no .safetensors file (a repository of .bin files must be converted first)")


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
    if name.endswith(BUFFERS) or name.startswith("vision_tower.post_layernorm."):
        return True
    if name == "language_model.lm_head.weight" and config.text_config.tie_word_embeddings:
        return True
    layer = re.match(r"vision_tower\.layers\.([0-9]{1,9})\.", name)
    return layer is not None and config.vision_layers_used <= int(layer[1]) < config.vision_config.num_hidden_layers


def load_weights(model: nn.Module, config: LlavaConfig, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Fills `model`, built on the meta device. Tensors that need neither cast nor move stay mapped from the file."""
    expected, found = model.state_dict(), {}
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
