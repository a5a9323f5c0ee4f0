"""Broken files by the thousand: whatever a file holds, reading it ends in a result or in a HimapError.

    python -m himap_ref.studies.fuzz --cases 20000 --seed 0

Whole files of a small random model, pictures and questions are damaged, in their bytes or in their JSON, and used as
run.py and the studies use them. A failure is any other exception, a process that dies, takes longer than SECONDS or
more than BYTES, a tensor that is not bit for bit what stands at the place that the file's header names, a size or an
answer that is not the file's, and whatever reaches beyond the folder: a file opened elsewhere, a program started, a
connection, a function that is not ours. Whether a header tells the truth cannot be known: with two tensors of one shape
exchanged it is another file, not a broken one.

A case follows from the seed and its number. Those that fail are printed and, with --keep, written to a file that
tests/test_fuzz.py reads.
"""

from __future__ import annotations

import argparse
import base64
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import is_dataclass
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from ..assistant import Llava
from ..checkpoint.config import read_config
from ..checkpoint.files import read_json, tensor_files
from ..checkpoint.load import rename
from ..commands.manners import run_command
from ..commands.options import EMBEDDED
from ..config import LlavaConfig
from ..errors import HimapError
from ..image import ImageProcessor
from ..methods.schedules import parse_method
from .examples import Example
from .labels import LETTERS
from .question_files import parse_questions
from .scenes import TEST, draw, make_scene

SECONDS, BYTES = 20, 2**30  # what one case may take
PICTURE_BYTES = 5 * 2**29  # 150 million pixels, each as four bytes, and what is made of them
COPIED = ("generation_config.json", "tokenizer.json", "preprocessor_config.json")  # from the embedded model
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
PICTURES = {  # name: Pillow's mode
    "x.png": "RGB", "x.jpg": "RGB", "x.gif": "P", "x.webp": "RGB", "x.bmp": "RGB", "x.tiff": "RGB", "grey.png": "I;16",
    "palette.png": "P", "alpha.webp": "RGBA", "x.ppm": "RGB", "x.jp2": "RGB", "x.avif": "RGB",
}  # fmt: skip
PICTURES = {  # an older Pillow cannot write all of them: other cases there under the same numbers
    name: mode for name, mode in PICTURES.items() if Image.registered_extensions()[Path(name).suffix] in Image.SAVE
}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FILES = (  # each as likely as the others
    *(f"model/{name}" for name in ("config.json", "himap.json", WEIGHTS, WEIGHTS, *COPIED)),
    "original/config.json", "newer/processor_config.json", f"sharded/{INDEX}", f"sharded/{SHARDS[0]}",
    *(f"pictures/{name}" for name in PICTURES), "questions.json", "questions.jsonl",
)  # fmt: skip

# ---------------------------------------------------------------- whole files

CONFIG: dict[str, Any] = {
    "model_type": "llava", "image_token_index": 3, "vision_feature_layer": -2, "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_config": {"model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 12, "patch_size": 14,
                      "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "hidden_act": "quick_gelu"},
    "text_config": {"model_type": "llama", "vocab_size": 460, "hidden_size": 8, "intermediate_size": 12,
                    "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
                    "max_position_embeddings": 200, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}  # fmt: skip
ORIGINAL = {
    "model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
    "image_aspect_ratio": "pad", **{k: v for k, v in CONFIG["text_config"].items() if k != "model_type"},
}  # fmt: skip
SIZES = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
TURNS = [{"from": "human", "value": "<image>\nWhich is it?\nA. red\nB. blue"}, {"from": "gpt", "value": "B"}]
QUESTIONS = [
    {"id": "1", "image": "x.png", "conversations": TURNS, "top5_res": [1, 2, 3, 4, 5]},
    {"question_id": 2, "image": "x.jpg", "text": "Is there a star?", "label": "yes", "category": "star"},
    {"question_id": 3, "image": "x.gif", "text": "What?", "answers": [{"answer": "red"}, {"answer": "a star"}]},
    {"id": 4, "image": None, "question": "Which?", "choices": ["red", "blue"], "answer": 1},
    {"id": 4, "images": ["x.png"], "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]},
        {"role": "assistant", "content": "B"}]},
    {"id": 5, "image": ["x.png", "x.gif"], "text": "Which one?", "label": 3.0},
]


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], dtype: str = "F32") -> None:
    """By hand, because the library's own writer needs NumPy."""
    header, body = {}, b""
    for name, tensor in tensors.items():
        data = bytes(tensor.to(DTYPES[dtype]).contiguous().view(torch.uint8).flatten().tolist())
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    path.write_bytes(join_safetensors(header, body))


def join_safetensors(header: dict, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def split_safetensors(data: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def build_model(folder: Path) -> dict[str, torch.Tensor]:
    """A random model of the embedded one's kind: 460 tokens, 4 image tokens, 3 layers. Returns its tensors as named."""
    folder.mkdir(parents=True)
    for name in COPIED:
        (folder / name).write_bytes((EMBEDDED / name).read_bytes())
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "himap.json", {"stages": "1:0.5:text_to_image,2:1:image_to_image", "note": "random"})
    write_json(folder / COPIED[2], json.loads((folder / COPIED[2]).read_bytes()) | SIZES)
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, like in Llava(read_config(CONFIG)).state_dict().items():
        name = "lm_head.weight" if "lm_head" in name else f"model.{name}"
        tensors[name] = torch.randint(-9, 10, like.shape, generator=generator) / 64  # kept cases compress well
    write_tensors(folder / WEIGHTS, tensors)
    return tensors


def build(root: Path) -> None:
    """Every file of `FILES` and what is needed beside it, whole."""
    for name in ("model", "sharded", "newer"):
        tensors = build_model(root / name)
    (root / "sharded" / WEIGHTS).unlink()
    shard_of = {name: SHARDS[number % 2] for number, name in enumerate(tensors)}
    write_json(root / "sharded" / INDEX, {"metadata": {}, "weight_map": shard_of})
    for shard, dtype in zip(SHARDS, ("F16", "BF16"), strict=True):
        here = {name: tensor for name, tensor in tensors.items() if shard_of[name] == shard}
        write_tensors(root / "sharded" / shard, here, dtype)
    processor = (root / "newer" / COPIED[2]).rename(root / "newer" / "processor_config.json")
    write_json(processor, {"image_processor": json.loads(processor.read_bytes())})
    (root / "original").mkdir()
    write_json(root / "original" / "config.json", ORIGINAL)

    (root / "pictures").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # the picture lies on its side
    for name, mode in PICTURES.items():
        image = draw(make_scene(TEST)).resize((45, 30)).convert("I" if mode == "I;16" else mode).convert(mode)
        image.save(root / "pictures" / name, exif=exif, compression="tiff_lzw" if "tiff" in name else None)
    write_json(root / "questions.json", QUESTIONS)
    (root / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- using a file


class Wrong(Exception):
    """Read without an error, and not what the file says; or more was taken than a case may take."""


class Workspace:
    """Whole files in a new folder, of which one at a time is replaced and used."""

    def __init__(self, root: Path):
        self.root = root.resolve()
        build(self.root)
        _listen()
        self.model = Llava.from_pretrained(self.root / "model")

    def use(self, name: str, data: bytes) -> str:
        """Returns "fine" or "refused"; every other exception goes through."""
        path, whole = self.root / name, (self.root / name).read_bytes()
        path.write_bytes(data)
        try:
            with watched(self.root) as seen:
                self._use(path)
            outcome = "fine"
        except HimapError as error:
            if "\n" in str(error) or isinstance(error.__context__, MemoryError):
                raise Wrong(repr(error)) from error
            outcome = "refused"
        finally:
            path.write_bytes(whole)
        if seen:
            raise Wrong(f"reached {seen[0]}")
        return outcome

    def _use(self, path: Path) -> None:
        if path.parent.name == "pictures":
            self.model.preprocess(path)
        elif path.parent == self.root:
            examples = parse_questions(path.read_bytes(), self.root / "pictures", path.name)
            check_questions(examples, path.read_text("utf-8-sig"))
            for example in examples:
                self.model.encode(example.question, 0 if example.source is None else None)
                if example.source is not None:
                    example.picture()
        else:
            if any(file.parent != path.parent for file in tensor_files(path.parent)):
                raise Wrong("a shard in another folder")
            model = Llava.from_pretrained(path.parent)
            check_faithful(model, path.parent)
            check_config(model.config, read_json(path.parent / "config.json"))
            check_processor(model.image_processor, path.parent)
            stages = parse_method("himap", model).stages
            if any(getattr(stage.score, "func", stage.score).__module__ not in OURS for stage in stages):
                raise Wrong("a score that is not one of ours")
            answer: Any = model.generate(self.root / "pictures" / "x.png", "What color is the star?", stages, 2)
            if answer.image_span[1] - answer.image_span[0] != 4:
                raise Wrong(f"image tokens at {answer.image_span}")


def check_faithful(model: Llava, folder: Path) -> None:
    """Raises Wrong unless each parameter is, bit for bit, one tensor of one file, and no two share bytes."""
    loaded, seen = model.state_dict(), Counter[str]()
    for path in tensor_files(folder):
        header, body = split_safetensors(path.read_bytes())
        used = {name: entry for name, entry in header.items() if rename(name) in loaded}
        places = sorted(entry["data_offsets"] for entry in used.values())
        if any(stop > start for (_, stop), (start, _) in zip(places, places[1:], strict=False)):
            raise Wrong(f"{path.name}: two tensors share bytes")
        for theirs, entry in used.items():
            ours, (start, stop) = loaded[rename(theirs)], entry["data_offsets"]
            data = torch.tensor(list(body[start:stop]), dtype=torch.uint8).view(DTYPES[entry["dtype"]])
            expected = data.view(entry["shape"]).to(ours.dtype)
            if ours.shape != expected.shape or not torch.equal(ours.view(torch.int32), expected.view(torch.int32)):
                raise Wrong(f"{theirs} is not what {path.name} holds")
            seen[rename(theirs)] += 1
    if seen != Counter(dict.fromkeys(loaded, 1)):
        raise Wrong(f"parameters not read once: {[name for name in loaded if seen[name] != 1]}")


def check_config(config: LlavaConfig, data: dict) -> None:
    """Raises Wrong unless each field that the file names has the file's value."""
    text = data.get("text_config") or {}
    text = {**text, **(text.get("rope_parameters") or {})}
    vision = data.get("vision_config") or {}
    for part, said in ((config, data), (config.vision_config, vision), (config.text_config, text)):
        for name, value in vars(part).items():
            if name in ("tie_word_embeddings", "rope_type", "vision_feature_layer"):
                continue  # more than this entry decides them: see tests/test_folders.py
            if not is_dataclass(value) and said.get(name) not in (None, value):
                raise Wrong(f"{name} is {value!r}, the file says {said[name]!r}")


def check_processor(processor: ImageProcessor, folder: Path) -> None:
    """Raises Wrong unless the pixels become numbers as the file says."""
    own = folder / "preprocessor_config.json"
    data = read_json(own) if own.exists() else read_json(folder / "processor_config.json").get("image_processor") or {}
    steps = {"image_mean": "do_normalize", "image_std": "do_normalize", "rescale_factor": "do_rescale"}
    for name in ("resample", *steps):
        said, ours = data.get(name), getattr(processor, name)
        said = tuple(said) if isinstance(said, list) else said
        if data.get(steps.get(name)) is not False and said not in (None, ours):
            raise Wrong(f"{name} is {ours!r}, the file says {said!r}")


def check_questions(examples: list[Example], text: str) -> None:
    """Raises Wrong unless every entry of the file is there, in its place, with its own id and answers."""
    lines = [text] if text.lstrip().startswith("[") else [line for line in text.split("\n") if line.strip()]
    entries = [json.loads(line) for line in lines]
    entries = entries[0] if text.lstrip().startswith("[") else entries
    rest = iter(entries)
    for example in examples:  # copies of an entry may stand between two others
        if not any({example.id, *example.answers} <= {text for leaf in leaves(entry) for text in texts(leaf)}
                   for entry in rest):  # fmt: skip
            raise Wrong(f"entry {example.id!r} is not what the file holds")
    if (asked := sum(example.copies for example in examples)) != len(entries):
        raise Wrong(f"{asked} of {len(entries)} entries are there")


def texts(leaf: object) -> set[str]:
    """As what a value may be read: a number as text, or as the index of a letter."""
    index = int(leaf) if isinstance(leaf, int | float) and 0 <= leaf < len(LETTERS) else None
    return {str(leaf), str(leaf).removesuffix(".0")} | ({LETTERS[index]} if index is not None else set())


def leaves(tree: object) -> Iterator:
    """All that is in a JSON value and is neither an object nor a list."""
    inside = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else None
    if inside is None:
        yield tree
    for each in inside or ():
        yield from leaves(each)


# ---------------------------------------------------------------- beyond the folder

OURS = ("himap_ref.pruning", "himap_ref.methods.scores")
REACHING = {  # events of the interpreter (PEP 578); what a library does by itself, in C, it does not hear of
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "socket.getaddrinfo",
    "pickle.find_class",
}  # fmt: skip
_watching: tuple[tuple[str, ...], list[str]] | None = None  # folders that may be read, and what else was reached


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """Yields a list of what is reached outside `folder` and Python's own files, to read afterwards."""
    global _watching
    own: tuple = (folder, Path(__file__).parents[2], sys.prefix, sys.base_prefix, *sys.path, "/proc/self", os.devnull)
    _watching = tuple(os.path.realpath(place) + os.sep for place in own if place), []
    try:
        yield _watching[1]
    finally:
        _watching = None


def _hear(event: str, args: tuple) -> None:
    if _watching is None or event != "open" and event not in REACHING:
        return
    folders, seen = _watching
    path = args[0] if args else ""
    inside = event == "open" and (isinstance(path, int) or (os.path.realpath(path) + os.sep).startswith(folders))
    if not inside:
        seen.append(f"{event} {path!r}")


@cache
def _listen() -> None:
    """Once: no hook is ever taken away again."""
    sys.addaudithook(_hear)


# ---------------------------------------------------------------- damage

NUMBERS = (
    0, 1, -1, 2, 3, 7, 255, 256, 1000, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64,
)  # fmt: skip
DEEP = "deep inside"  # stands for lists nested too deeply to be built
VALUES: tuple[Any, ...] = (
    None, True, False, *NUMBERS, 0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), 10**40, DEEP, "", "x", "0",
    "\x00", "\ud800", "../x.png", "/etc/hostname", "<image>", "a" * 3000, "\n\x1b[31m", [], {}, [[]], [None],
    {"": None}, [1, 2, 3], {"shortest_edge": 28}, {"height": 28, "width": 28}, {"type": "ByteLevel"}, "F16", "BF16",
    "I32", "U8", "F8_E4M3", "F4", "gelu", "linear", "pad", "1:0.5:text_to_image", "os:system", "1:2:os:getcwd",
)  # fmt: skip


def mutate(name: str, data: bytes, rng: random.Random) -> bytes:
    """One to four damages, to the bytes or (where it is one) to the JSON; a safetensors file's header is JSON, too."""
    times = rng.choice((1, 1, 1, 2, 4))
    if name.endswith(".safetensors"):
        header, body = split_safetensors(data)
        front = data[: len(data) - len(body)]
        match rng.randrange(7):
            case 0 | 1 | 2 as kind:
                tree = [header]
                for _ in range(times):
                    mutate_json(tree, rng) if kind == 0 else mutate_tensors(header, rng)
                text = _dump(tree[0], rng)
                size = len(text) if rng.random() < 0.95 else rng.choice(NUMBERS) % 2**64
                return size.to_bytes(8, "little") + text + body
            case 3 | 4:
                return front + (mutate_bytes(body, rng, times) + bytes(len(body)))[: len(body)]
            case 5:
                return mutate_bytes(front, rng, times) + body
    elif name.endswith((".json", ".jsonl")) and rng.random() < 0.75:
        tree = [json.loads(line) for line in (data.splitlines() if name.endswith("l") else [data])]
        for _ in range(times):
            mutate_json(tree, rng)
        return b"\n".join(_dump(line, rng) for line in tree)
    data = mutate_bytes(data, rng, times)
    return mend_png(data) if name.endswith(".png") and rng.random() < 0.8 else data


def mutate_bytes(whole: bytes, rng: random.Random, times: int) -> bytes:
    data = bytearray(whole)
    for _ in range(times):
        place = rng.randrange(min(len(data), rng.choice((64, 512, 10**9))) or 1)  # headers stand in front
        length = min(rng.choice((1, 1, 2, 4, 8, 40, 1000)), max(1, len(data) - place))
        match rng.randrange(8):
            case 0 if data:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                data[place : place + length] = rng.randbytes(length)
            case 2:
                del data[place : place + length]
            case 3:
                data[place:place] = rng.randbytes(length)
            case 4:
                data[place:place] = data[place : place + length] * rng.choice((1, 2, 50))
            case 5:
                del data[rng.randrange(len(data) + 1) :]
            case 6:
                width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
                data[place : place + width] = (rng.choice(NUMBERS) % 256**width).to_bytes(width, order)
            case 7:
                data[place : place + length] = bytes(length)
    return bytes(data)


def mend_png(data: bytes) -> bytes:
    """Right checksums, as far as the chunks go: else nothing behind them would ever be read."""
    whole, place = data[:8], 8
    while place + 12 <= len(data):
        stop = place + 8 + int.from_bytes(data[place : place + 4], "big")
        whole += data[place:stop] + zlib.crc32(data[place + 4 : stop]).to_bytes(4, "big")
        place = stop + 4
    return whole + data[place:]


def mutate_tensors(header: dict, rng: random.Random) -> None:
    """What only a safetensors header has: places, shapes, dtypes and names, changed so that sizes may still fit."""
    a, b = rng.sample(sorted(header), 2)
    first, second = header[a], header[b]
    match rng.randrange(7):
        case 0:
            first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]
        case 1:
            first["data_offsets"] = list(second["data_offsets"])
        case 2:
            first["shape"].reverse()
        case 3:
            first["dtype"], first["shape"] = "F16", [*first["shape"][:-1], 2 * first["shape"][-1]]
        case 4:
            shift = rng.choice((-4, -1, 1, 4, 2**40, 2**63))
            first["data_offsets"] = [place + shift for place in first["data_offsets"]]
        case 5:
            first["dtype"] = rng.choice(("F64", "F16", "BF16", "I32", "U32", "F8_E5M2", "F4", "C64", "BOOL"))
        case 6:
            names = b, f"x.{a}", a.removeprefix("model."), f"{a}\n", "vision_tower.layers", "vision_tower.layers.\xb2."
            header[rng.choice(names)] = header.pop(a)


def mutate_json(tree: list, rng: random.Random) -> None:
    """One node below `tree`, near or far from the root, replaced, removed, renamed or exchanged for another."""
    (holder, key), (other, other_key) = _place(tree, rng), _place(tree, rng)
    match rng.randrange(7):
        case 0 | 1:
            holder[key] = deepcopy(rng.choice(VALUES))
        case 2 if holder is not tree:
            del holder[key]
        case 3:
            holder[key], other[other_key] = deepcopy(other[other_key]), deepcopy(holder[key])
        case 4 if isinstance(holder, dict):
            name = rng.choice((key + "x", "", "a\nb", "type", *holder))
            holder[name] = holder.pop(key)
        case 5 if type(holder[key]) in (int, float):
            number = holder[key]
            holder[key] = rng.choice((-number, number + 1, number - 1, number * 1000, number / 2, str(number)))
        case 6:
            holder[key] = [holder[key]]


def _place(holder: list | dict, rng: random.Random) -> tuple[Any, Any]:
    """A node, by a walk from the root: in a tokenizer most nodes are tokens, and most meaning is elsewhere."""
    while True:
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        inside = holder[key]
        if not isinstance(inside, dict | list) or not inside or rng.random() < 0.2:
            return holder, key
        holder = inside


def _dump(tree: object, rng: random.Random) -> bytes:
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.9)
    text = text.replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)
    if rng.random() < 0.03:  # a key twice
        text = text.replace("{", '{"dtype": "F16", "model_type": "llava", ', 1)
    return text.encode("utf-8", "surrogatepass")


# ---------------------------------------------------------------- many cases


class Hang(BaseException):
    """So that no `except Exception` takes it."""


@contextmanager
def limits(seconds: float, size: int) -> Iterator[None]:
    """Raises Hang after so many seconds, Wrong if it took them all the same or so many bytes more than before."""

    def stop(*_):
        raise Hang(f"more than {seconds} s")

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start, held = time.monotonic(), _peak()
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    took, grown = time.monotonic() - start, _peak() - held
    if took > seconds or grown > size:
        raise Wrong(f"took {took:.1f} s and {grown / 2**20:.0f} MiB")


def _peak() -> int:
    """Bytes this process has held at most since the peak was cleared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def case(workspace: Workspace, seed: int, number: int) -> tuple[str, bytes]:
    """(file, its contents)."""
    rng = random.Random(f"{seed}-{number}")
    name = rng.choice(FILES)
    return name, mutate(name, (workspace.root / name).read_bytes(), rng)


def attempt(workspace: Workspace, name: str, data: bytes) -> str:
    """Returns "fine", "refused", or what went wrong."""
    try:
        with limits(SECONDS, PICTURE_BYTES if name.startswith("pictures") else BYTES):
            return workspace.use(name, data)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a library written in Rust is no Exception
        return f"{type(error).__name__}: {error}"


def _work(seed: int, numbers: range, results: Connection) -> None:
    """A process of its own: sends (number, None, None) before a case, (number, file, outcome) after it."""
    import resource  # not on Windows

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff and panics have their say there
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder) / "files")
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 3 * BYTES,) * 2)
        for number in numbers:
            results.send((number, None, None))
            name, data = case(workspace, seed, number)
            results.send((number, name, attempt(workspace, name, data)))


def run(seed: int, cases: int, jobs: int) -> Iterator[tuple[int, str, str]]:
    """(number, file, outcome) of every case, in processes that may die or hang."""
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, list] = {}

    def start(numbers: range) -> None:
        if numbers:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(seed, numbers, theirs), daemon=True)
            process.start()
            theirs.close()
            workers[ours] = [process, None, time.monotonic() + 60]  # ..., the case it is at, its end at the latest

    for first in range(jobs):
        start(range(first, cases, jobs))
    while workers:
        for pipe in cast(list[Connection], wait(list(workers), timeout=1)):
            try:
                number, name, outcome = pipe.recv()
            except EOFError:
                process, number, _ = workers.pop(pipe)
                process.join()
                if number is not None:
                    yield number, "?", f"the process ended with {process.exitcode}"
                    start(range(number + jobs, cases, jobs))
                continue
            workers[pipe][1:] = [number if outcome is None else None, time.monotonic() + 3 * SECONDS]
            if outcome is not None:
                yield number, name, outcome
        for process, _, end in workers.values():
            if time.monotonic() > end:
                process.kill()


def pack(data: bytes) -> str:
    return base64.b85encode(zlib.compress(data, 9)).decode()


def unpack(text: str) -> bytes:
    return zlib.decompress(base64.b85decode(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="append the cases that fail to this file")
    args = parser.parse_args()
    start, failed = time.perf_counter(), {}
    outcomes: dict[str, Counter[str]] = {}
    for number, name, outcome in run(args.seed, args.cases, args.jobs):
        outcomes.setdefault(name, Counter())[outcome if outcome in ("fine", "refused") else "failed"] += 1
        if outcome not in ("fine", "refused"):
            failed[number] = outcome
            print(f"case {number}: {name}: {outcome}", flush=True)
    for name, counts in sorted(outcomes.items()):
        print(f"{name:42} {counts['fine']:6} fine {counts['refused']:6} refused {counts['failed']:4} failed")
    print(f"{args.cases} cases, {len(failed)} failed, {time.perf_counter() - start:.0f} s")
    if failed and args.keep:
        with tempfile.TemporaryDirectory() as folder, args.keep.open("a", encoding="utf-8") as file:
            workspace = Workspace(Path(folder) / "files")
            for number, outcome in failed.items():
                name, data = case(workspace, args.seed, number)
                file.write(json.dumps({"file": name, "was": outcome[:120], "data": pack(data)}) + "\n")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
