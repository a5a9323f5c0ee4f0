"""Finding a folder and reading its files, of which nothing is believed."""

import json
import os
import re
from pathlib import Path
from reprlib import repr as short

from tokenizers import Tokenizer

from ..errors import HimapError
from ..image import read_bytes

SHORT_NAMES = {"llava-1.5-7b": "llava-hf/llava-1.5-7b-hf", "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf"}
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
FOLDERS = re.compile(
    r"(?i)(weights?|models?|checkpoints?|ckpts?|outputs?|results?|runs?|data)/.*|.*/(checkpoint|ckpt).?\d*"
)
SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.safetensors")


def find_folder(source: str | Path, revision: str | None = None) -> Path:
    """A local folder, or one downloaded from the hub (resumable, with a progress bar), of a whole model."""
    if os.path.isdir(source):
        if revision is not None:
            raise HimapError(f"revision {revision!r}: {str(source)!r} is a folder, which has no other: leave it out")
        folder = Path(source)
    else:
        folder = _download(SHORT_NAMES.get(str(source), source), revision)
    if (folder / "adapter_config.json").is_file():
        raise HimapError(
            f"{folder}: adapter_config.json: a LoRA adapter, which is not applied here: merge it into its model (peft: "
            "merge_and_unload, then save_pretrained), or remove that file where this is done"
        )
    return folder


def _download(name: str | Path, revision: str | None) -> Path:
    """A hub repository. A name that may be meant for a folder is never asked for: the hub could have it, too."""
    if isinstance(name, Path) or os.path.exists(name) or not HUB_ID.fullmatch(name):
        names = ", ".join(SHORT_NAMES)
        raise HimapError(f"weights {str(name)!r}: no such folder, hub id (owner/name) or short name ({names})")
    owner = name.split("/")[0]
    if name not in SHORT_NAMES.values() and (os.path.exists(owner) or FOLDERS.fullmatch(name)):
        raise HimapError(
            f"weights {name!r}: no such folder here; if a repository of the hub is meant, download it first: "
            f"hf download {name} --local-dir FOLDER"
        )
    from huggingface_hub import snapshot_download  # slow to import, and not needed for a local folder

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.jinja", "*.safetensors"]))
    except Exception as error:  # the hub's own errors, those of the HTTP library of its version, OSError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise HimapError(f"weights {name!r}: no such folder here, nor can the hub's be downloaded ({reason})") from None


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


def read_index(folder: Path) -> dict[str, str]:
    """The file that each tensor is in; {} without an index, and beside a model.safetensors, which goes before it."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return {}
    weight_map = read_json(index).get("weight_map")
    if not (weight_map and isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())):
        raise HimapError(f"{index}: not a shard index (no weight_map)")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise HimapError(f"{index}: shard {name!r} lies outside the folder")
        if not os.path.isfile(folder / name):
            raise HimapError(f"{folder}: shard {name} is missing: download it again")
    return weight_map


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files that are the model: those that transformers takes, else the only set or file there is."""
    files = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    if "model.safetensors" in files:
        return [folder / "model.safetensors"]
    if index := read_index(folder):
        return [folder / name for name in sorted(set(index.values()))]
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles == ["mm_projector.bin"] and not files:
        raise HimapError(f"{folder}: holds a projector alone, in mm_projector.bin: a whole LLaVA is needed")
    if pickles and (not files or any(name.startswith("pytorch_model") for name in pickles)):
        raise HimapError(
            f"{folder}: {pickles[0]} is a pickle, which can run code when it is read; convert it to safetensors first "
            "(transformers: from_pretrained(...).save_pretrained(folder)) or use a llava-hf repository"
        )
    if not files:
        raise HimapError(f"{folder}: no .safetensors file (a repository of .bin files must be converted first)")
    shard = SHARD.fullmatch(files[0])
    numbers = range(1, int(shard[3]) + 1) if shard else ()
    whole = [f"{shard[1]}-{i:05}-of-{shard[3]}.safetensors" for i in numbers] if shard else files[:1]
    if others := sorted({*files} - {*whole}):
        raise HimapError(f"{folder}: {files[0]} or {others[0]}? Rename what is the model to model.safetensors")
    if missing := [name for name in whole if name not in files]:
        raise HimapError(f"{folder}: shard {missing[0]} is missing: download it again")
    return [folder / name for name in whole]


def read_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json, the one file of the fast tokenizer; raises HimapError if it is not there or not one."""
    if not (folder / "tokenizer.json").exists() and (folder / "tokenizer.model").exists():
        raise HimapError(
            f"{folder}: tokenizer.model without a tokenizer.json: let transformers make it, "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder), with <image> among its tokens"
        )
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
