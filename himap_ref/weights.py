"""Weights: a folder or hub id becomes tensors under this package's names. Only safetensors are read, never pickles.

Checkpoints come in three layouts of names; `PREFIXES` maps each to the module tree of `Llava`. A name that it does not
know, a missing tensor and a shape that differs are errors that name the tensor.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .config import LlavaConfig, read_json
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
    folder = Path(source)
    if folder.is_dir():
        return folder
    name = SHORT_NAMES.get(str(source), str(source))
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        names = ", ".join(SHORT_NAMES)
        raise HimapError(f"weights {str(source)!r}: no such folder, hub id (owner/name) or short name ({names})")
    from huggingface_hub import snapshot_download  # slow to import, and not needed for a local folder

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=NEEDED_FILES))
    except (OSError, ValueError) as error:  # what huggingface-hub raises: HTTP errors, no connection, bad ids
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HimapError(f"weights {name!r}: cannot be downloaded ({reason})") from None


def find_device(name: str | torch.device) -> torch.device:
    """The device, or a HimapError if this machine or this build of torch does not have it."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise HimapError(f"device {str(name)!r}: not available ({str(error).splitlines()[0]})") from None


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
            if not (folder / name).is_file():
                raise HimapError(f"{folder}: shard {name} is missing: download it again")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if files:
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
    parts = name.split(".")
    return parts[:2] == ["vision_tower", "layers"] and parts[2].isdigit() and (
        config.vision_layers_used <= int(parts[2]) < config.vision_config.num_hidden_layers
    )  # fmt: skip


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
            tensor, shape = file.get_tensor(theirs), expected[name].shape
            if tensor.shape != shape:
                raise HimapError(f"{what} has shape {list(tensor.shape)}, config.json asks for {list(shape)}")
            if not tensor.is_floating_point():
                raise HimapError(f"{what} holds {tensor.dtype}, not floating-point numbers")
            found[name] = tensor.to(device, dtype)
    if missing := [name for name in expected if name not in found]:
        raise HimapError(f"{folder}: tensor {missing[0]!r} is missing ({len(missing)} in all): not a complete LLaVA")
    model.load_state_dict(found, strict=True, assign=True)
    model.requires_grad_(False)


def read_eos(folder: Path) -> tuple[int, ...]:
    """Ids that end an answer: from generation_config.json, else config.json, else LLaMA's 2."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        data = read_json(path) if path.exists() else {}
        own, texts = data.get("eos_token_id"), (data.get("text_config") or {}).get("eos_token_id")
        if (eos := texts if own is None else own) is not None:
            return tuple(eos) if isinstance(eos, list) else (eos,)
    return (2,)
