"""Finding a folder and a device for it, and reading its files, of which nothing is believed."""

import json
import os
import re
from pathlib import Path
from reprlib import repr as short

import torch
from tokenizers import Tokenizer

from ..errors import HimapError
from ..image import read_bytes

SHORT_NAMES = {"llava-1.5-7b": "llava-hf/llava-1.5-7b-hf", "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf"}


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
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
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


def read_json(path: Path) -> dict:
    """A JSON object from a file; raises HimapError that names the file."""
    try:
        data = json.loads(read_bytes(path, 2**25))  # cut where it is longer, which is no JSON then
    except (OSError, ValueError, RecursionError) as error:
        raise HimapError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(data, dict):
        raise HimapError(f"{path}: expected a JSON object")
    return data


def section(data: dict, name: str) -> dict | None:
    """An object within one; None if it is not there or null."""
    if not isinstance(inner := data.get(name), dict | None):
        raise HimapError(f"{name} {short(inner)}: expected a JSON object")
    return inner


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


def read_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json, the one file of the fast tokenizer; raises HimapError if it is not there or not one."""
    try:
        tokenizer = Tokenizer.from_buffer(read_bytes(folder / "tokenizer.json"))
        tokenizer.no_padding()  # a file may carry the settings of somebody's training run
        tokenizer.no_truncation()
        tokenizer.decode(tokenizer.encode("A <b>?").ids)  # parts that do not fit each other are found only in use
        return tokenizer
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the library raises bare Exception, and panics that are not even that
        raise HimapError(f"{folder / 'tokenizer.json'}: not a readable tokenizer ({error})") from None
