"""Broken files: whatever a file holds, reading it ends in a result or in a HimapError. test_fuzz.py runs it.

Whole files of a small random model, pictures and questions are damaged, in their bytes or in their JSON, and used as
run.py and the studies use them; hypothesis draws which file and which damage. A failure is any other exception, a
process that dies, takes longer than SECONDS or more than BYTES, a tensor that is not bit for bit what stands at the
place that the file's header names, a size or an answer that is not the file's, and whatever reaches beyond the folder:
a file opened elsewhere, a program started, a connection, a function that is not ours. Whether a header tells the truth
cannot be known: with two tensors of one shape exchanged it is another file, not a broken one.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import resource
import signal
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from dataclasses import is_dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from hypothesis import strategies as st
from PIL import Image
from toys import SMALL_CONFIG, split_safetensors, write_json, write_small_model

from himap_ref import HimapError, Llava
from himap_ref.checkpoint.files import read_json, tensor_files
from himap_ref.checkpoint.load import rename
from himap_ref.methods.schedules import parse_method
from himap_ref.studies.questions.drawing import draw
from himap_ref.studies.questions.examples import Example
from himap_ref.studies.questions.labels import LETTERS
from himap_ref.studies.questions.question_files import parse_questions
from himap_ref.studies.questions.scenes import TEST, make_scene
from himap_ref.studies.speed.timing import peak

CPU = torch.device("cpu")
SECONDS, BYTES = 20, 2**30  # what one case may take
PICTURE_BYTES = 5 * 2**29  # 150 million pixels, each as four bytes, and what is made of them
INDEX, SHARD = "sharded/model.safetensors.index.json", "sharded/model-00001-of-00002.safetensors"
MODES = {"grey.png": "I;16", "palette.png": "P", "alpha.webp": "RGBA"}  # Pillow's; all others are RGB
PICTURES = [*MODES, *(f"x.{kind}" for kind in ("png", "jpg", "gif", "webp", "bmp", "tiff", "ppm", "jp2", "avif"))]
PICTURES = [name for name in PICTURES if Image.registered_extensions()[Path(name).suffix] in Image.SAVE]  # old Pillow
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ORIGINAL = {
    "model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
    "image_aspect_ratio": "pad", **{k: v for k, v in SMALL_CONFIG["text_config"].items() if k != "model_type"},
}  # fmt: skip
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
FILES = (  # each as likely as the others
    *(f"model/{name}.json" for name in ("config", "himap", "generation_config", "tokenizer", "preprocessor_config")),
    *("model/model.safetensors",) * 2, "original/config.json", "newer/processor_config.json", "sharded/config.json",
    INDEX, SHARD, *(f"pictures/{name}" for name in PICTURES), "questions.json", "questions.jsonl",
)  # fmt: skip


def build(root: Path) -> dict[str, bytes]:
    """Writes every file of `FILES` and what is needed beside it, whole; returns their contents."""
    write_small_model(root / "model")
    write_json(root / "model" / "config.json", SMALL_CONFIG)
    write_small_model(root / "sharded", (torch.float16, torch.bfloat16), shard=39_000)
    write_small_model(root / "newer")
    processor = (root / "newer" / "preprocessor_config.json").rename(root / "newer" / "processor_config.json")
    write_json(processor, {"image_processor": json.loads(processor.read_bytes())})
    for name in ("original", "pictures"):
        (root / name).mkdir()
    write_json(root / "original" / "config.json", ORIGINAL)
    exif = Image.Exif()
    exif[0x0112] = 6  # the picture lies on its side
    for name in PICTURES:
        image = draw(make_scene(TEST)).resize((45, 30))
        if mode := MODES.get(name):
            image = image.convert(mode[0] if ";" in mode else mode).convert(mode)
        image.save(root / "pictures" / name, exif=exif, compression="tiff_lzw" if "tiff" in name else None)
    write_json(root / "questions.json", QUESTIONS)
    (root / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n", encoding="utf-8")
    return {name: (root / name).read_bytes() for name in FILES}


# ---------------------------------------------------------------- using a file


class Wrong(Exception):
    """Read without an error, and not what the file says; or more was taken than a case may take."""


OURS = ("himap_ref.pruning", "himap_ref.methods.scores")
REACHING = {  # events of the interpreter (PEP 578); what a library does by itself, in C, it does not hear of
    "open", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect",
    "socket.getaddrinfo", "pickle.find_class",
}  # fmt: skip


class Workspace:
    """Whole files in a new folder, of which one at a time is replaced and used."""

    def __init__(self, root: Path):
        self.root = root.resolve()
        self.whole = build(self.root)
        self.model = Llava.from_pretrained(self.root / "model")
        own = self.root, Path(__file__).parents[2], sys.prefix, sys.base_prefix, *sys.path, "/proc/self", os.devnull
        self.own = tuple(os.path.realpath(place) + os.sep for place in own if place)  # what may be opened
        self.watching, self.reached = False, []
        sys.addaudithook(self._hear)  # for good: no hook is ever taken away

    def _hear(self, event: str, args: tuple) -> None:
        if not self.watching or event not in REACHING:
            return
        file = args[0] if args else ""
        if event == "open" and (isinstance(file, int) or (os.path.realpath(file) + os.sep).startswith(self.own)):
            return
        self.reached.append(f"{event} {file!r}")

    def attempt(self, name: str, data: bytes) -> str:
        """Returns "fine", "refused", or what went wrong."""
        path, held, most = self.root / name, peak(CPU, reset=True), PICTURE_BYTES if "pictures" in name else BYTES
        path.write_bytes(data)
        try:
            outcome = self._outcome(path)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of a library written in Rust is no Exception
            return f"{type(error).__name__}: {error}"
        finally:
            path.write_bytes(self.whole[name])
        taken = peak(CPU) - held
        return outcome if taken <= most else f"took {taken / 2**20:.0f} MiB"

    def _outcome(self, path: Path) -> str:
        self.reached, self.watching = [], True
        try:
            self._use(path)
            outcome = "fine"
        except HimapError as error:
            if "\n" in str(error) or isinstance(error.__context__, MemoryError):
                raise Wrong(repr(error)) from error
            outcome = "refused"
        finally:
            self.watching = False
        return f"reached {self.reached[0]}" if self.reached else outcome

    def _use(self, path: Path) -> None:
        folder = path.parent
        if folder.name == "pictures":
            self.model.preprocess(path)
        elif folder == self.root:
            examples = parse_questions(path.read_bytes(), self.root / "pictures", path.name)
            check_questions(examples, path.read_text("utf-8-sig"))
            for example in examples:
                self.model.encode(example.question, 0 if example.source is None else None)
                if example.source is not None:
                    example.picture()
        else:
            if any(file.parent != folder for file in tensor_files(folder)):
                raise Wrong("a shard in another folder")
            model = Llava.from_pretrained(folder)
            check_faithful(model, folder)
            check_settings(model, folder)
            stages = parse_method("himap", model).stages
            if any(getattr(stage.score, "func", stage.score).__module__ not in OURS for stage in stages):
                raise Wrong("a score that is not one of ours")
            answer = model.generate(self.root / "pictures" / "x.png", "What color is the star?", stages, 2)
            if answer.image_span[1] - answer.image_span[0] != 4:
                raise Wrong(f"image tokens at {answer.image_span}")


def check_faithful(model: Llava, folder: Path) -> None:
    """Raises Wrong unless each parameter is, bit for bit, one tensor of one file, and no two share bytes."""
    loaded, seen = model.state_dict(), Counter()
    for path in tensor_files(folder):
        header, body = split_safetensors(path.read_bytes())
        used = {name: entry for name, entry in header.items() if rename(name) in loaded}
        places = sorted(entry["data_offsets"] for entry in used.values())
        if any(stop > start for (_, stop), (start, _) in zip(places, places[1:], strict=False)):
            raise Wrong(f"{path.name}: two tensors share bytes")
        for theirs, entry in used.items():
            ours, (start, stop) = loaded[rename(theirs)], entry["data_offsets"]
            data = torch.frombuffer(bytearray(body[start:stop]), dtype=DTYPES[entry["dtype"]])
            expected = data.view(entry["shape"]).to(ours.dtype)
            if ours.shape != expected.shape or not torch.equal(ours.view(torch.int32), expected.view(torch.int32)):
                raise Wrong(f"{theirs} is not what {path.name} holds")
            seen[rename(theirs)] += 1
    if seen != Counter(dict.fromkeys(loaded, 1)):
        raise Wrong(f"parameters not read once: {[name for name in loaded if seen[name] != 1]}")


STEPS = {"image_mean": "do_normalize", "image_std": "do_normalize", "rescale_factor": "do_rescale", "resample": None}


def check_settings(model: Llava, folder: Path) -> None:
    """Raises Wrong unless each field that the JSON files name has the file's value."""
    data, own = read_json(folder / "config.json"), folder / "preprocessor_config.json"
    text, vision = data.get("text_config") or {}, data.get("vision_config") or {}
    text = text | (text.get("rope_parameters") or {})
    pixels = read_json(own) if own.exists() else read_json(folder / "processor_config.json").get("image_processor")
    pixels = {name: (pixels or {}).get(name) for name, step in STEPS.items() if (pixels or {}).get(step) is not False}
    config = model.config
    parts = config, config.vision_config, config.text_config, model.image_processor
    for part, said in zip(parts, (data, vision, text, pixels), strict=True):
        for name, value in vars(part).items():
            if name in ("tie_word_embeddings", "rope_type", "vision_feature_layer"):
                continue  # more than this entry decides them: see test_folders.py
            told = tuple(said[name]) if isinstance(said.get(name), list) else said.get(name)
            if not is_dataclass(value) and told not in (None, value):
                raise Wrong(f"{name} is {value!r}, the file says {told!r}")


def check_questions(examples: list[Example], text: str) -> None:
    """Raises Wrong unless every entry of the file is there, in its place, with its own id and answers."""
    is_list = text.lstrip().startswith("[")
    entries = json.loads(text) if is_list else [json.loads(line) for line in text.split("\n") if line.strip()]
    rest = iter(entries)
    for example in examples:  # copies of an entry may stand between two others
        if not any({example.id, *example.answers} <= leaves(entry) for entry in rest):
            raise Wrong(f"entry {example.id!r} is not what the file holds")
    if (asked := sum(example.copies for example in examples)) != len(entries):
        raise Wrong(f"{asked} of {len(entries)} entries are there")


def leaves(tree: object) -> set[str]:
    """All that is in a JSON value and is neither an object nor a list; a number also as the index of a letter."""
    if isinstance(tree, dict | list):
        return set().union(*map(leaves, tree.values() if isinstance(tree, dict) else tree))
    letter = LETTERS[int(tree)] if isinstance(tree, int | float) and 0 <= tree < len(LETTERS) else ""
    return {str(tree), str(tree).removesuffix(".0"), letter}


# ---------------------------------------------------------------- a process that may die

workspace: Workspace  # the process's own


class Worker:
    """Tries cases in a process of its own, which may die or hang: then in another one."""

    def __init__(self, new_folder: Callable[[], Path], start: str = "spawn"):
        self.new_folder, self.context, self.pool = new_folder, get_context(start), None

    def attempt(self, name: str, data: bytes) -> str:
        self.pool = self.pool or ProcessPoolExecutor(1, self.context, prepare, (self.new_folder() / "files", SECONDS))
        try:
            return self.pool.submit(attempt, name, data).result()
        except BrokenProcessPool:
            self.pool = None
            return f"the process died, or was ended after {SECONDS} s"


def prepare(folder: Path, seconds: float) -> None:
    global workspace, SECONDS
    SECONDS = seconds
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with tests that were killed
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # the matrices are tiny: on a busy machine threads wait for each other, ten times as long
    workspace = Workspace(folder)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff and panics have their say there
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 3 * BYTES,) * 2)


def attempt(name: str, data: bytes) -> str:
    faulthandler.dump_traceback_later(SECONDS, exit=True)  # a thread in C, whatever the others do
    try:
        return workspace.attempt(name, data)
    finally:
        faulthandler.cancel_dump_traceback_later()


# ---------------------------------------------------------------- damage

NUMBERS = (
    0, 1, -1, 2, 3, 7, 255, 256, 1000, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64,
)  # fmt: skip
DEEP = "deep inside"  # stands for lists nested too deeply to be built
VALUES = (
    None, True, False, *NUMBERS, 0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), 10**40, "", "x", "0",
    "\x00", "\ud800", "../x.png", "<image>", "a" * 3000, [], {}, [[]], [None], {"": None}, [1, 2, 3],
    {"shortest_edge": 28}, {"height": 28, "width": 28}, {"type": "ByteLevel"}, "F16", "BF16", "I32", "U8", "F8_E4M3",
    "F4", "gelu", "linear", "pad", "1:0.5:text_to_image", "os:system",
)  # fmt: skip
LURES = ("../model/model.safetensors", "/etc/hostname", "1:2:os:getcwd", "a\n\x1b[31m", DEEP)
ODD = st.one_of(*[st.sampled_from(VALUES), st.sampled_from(LURES)] * 2, st.integers(), st.floats(), st.text(max_size=9))


def pick(draw: Callable, *choices):
    return draw(st.sampled_from(choices))


@st.composite
def damaged(draw: Callable, workspace: Workspace) -> tuple[str, bytes]:
    """A file with one to four damages, to the bytes or (where it is one) to the JSON."""
    name = pick(draw, *FILES)
    data, times = workspace.whole[name], range(pick(draw, 1, 1, 1, 2, 4))
    if name.endswith(".safetensors"):
        return name, damaged_tensors(draw, data, times)
    if name.endswith((".json", ".jsonl")) and pick(draw, True, True, True, False):
        tree = [json.loads(line) for line in (data.splitlines() if name.endswith("l") else [data])]
        for _ in times:
            edit(draw, tree)
        return name, b"\n".join(dump(draw, line) for line in tree)
    data = damaged_bytes(draw, data, times)
    return name, mend_png(data) if name.endswith(".png") and pick(draw, *[True] * 4, False) else data


def damaged_tensors(draw: Callable, data: bytes, times: range) -> bytes:
    """Of a safetensors file the header (it is JSON, too), the numbers behind it, or any bytes."""
    header, body = split_safetensors(data)
    front, part = data[: len(data) - len(body)], pick(draw, "json", "header", "header", "body", "body", "front", "all")
    if part in ("json", "header"):
        tree = [header]
        for _ in times:
            edit(draw, tree) if part == "json" else edit_header(draw, header)
        text = dump(draw, tree[0])
        size = pick(draw, *[len(text)] * 19, pick(draw, *NUMBERS) % 2**64)
        return size.to_bytes(8, "little") + text + body
    if part == "body":
        return front + (damaged_bytes(draw, body, times) + bytes(len(body)))[: len(body)]
    return damaged_bytes(draw, front, times) + body if part == "front" else damaged_bytes(draw, data, times)


def damaged_bytes(draw: Callable, data: bytes, times: range) -> bytes:
    """Pieces overwritten, replaced or moved apart by nothing, zeros, noise, a number, themselves many times; a cut."""
    for _ in times:
        place = draw(st.integers(0, min(len(data), pick(draw, 64, 512, 10**9))))  # headers stand in front
        size, width = pick(draw, 1, 1, 2, 4, 8, 40, 1000), pick(draw, 1, 2, 4, 8)
        number = (pick(draw, *NUMBERS) % 256**width).to_bytes(width, pick(draw, "little", "big"))
        again = data[place : place + size] * pick(draw, 1, 2, 50)
        noise = st.binary(min_size=size, max_size=size)
        new = draw(st.sampled_from((b"", bytes(size), number, again)) | noise | noise)
        data = data[:place] + new + data[place + pick(draw, *[len(new)] * 4, size, 0, len(data)) :]
    return data


def mend_png(data: bytes) -> bytes:
    """Right checksums, as far as the chunks go: else nothing behind them would ever be read."""
    whole, place = data[:8], 8
    while place + 12 <= len(data):
        stop = place + 8 + int.from_bytes(data[place : place + 4], "big")
        whole += data[place:stop] + zlib.crc32(data[place + 4 : stop]).to_bytes(4, "big")
        place = stop + 4
    return whole + data[place:]


SAME_SIZE = {"F32": ("I32", "U32"), "F16": ("BF16", "I16", "U16"), "BF16": ("F16", "I16", "U16")}


def edit_header(draw: Callable, header: dict) -> None:
    """What only a safetensors header has: places, shapes, dtypes and names, changed so that sizes may still fit."""
    names = sorted(header.keys() - {"__metadata__"})
    a, b = pick(draw, *names), pick(draw, *names)
    first, second, shift = header[a], header[b], pick(draw, -4, -1, 1, 4, 2**40, 2**63)
    if (kind := pick(draw, "name", "name", "exchange", "entry", "entry", "entry", "entry", "entry")) == "name":
        other = f"model.{b.removeprefix('language_model.model.')}"  # b in another layout's words
        names = b, other, f"x.{a}", f"{a}\n", a.removeprefix("language_model."), "vision_tower.layers"
        header[pick(draw, *names, "vision_tower.layers.\xb2.")] = header.pop(a)
    elif kind == "exchange":
        first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]
    else:
        header[a] = first | pick(
            draw, {"data_offsets": second["data_offsets"]}, {"shape": first["shape"][::-1]},
            {"data_offsets": [place + shift for place in first["data_offsets"]]},
            {"dtype": "F16", "shape": [*first["shape"][:-1], 2 * first["shape"][-1]]},
            {"dtype": pick(draw, *SAME_SIZE.get(first["dtype"], ()), "F64", "F8_E5M2", "F4", "C64", "BOOL")},
        )  # fmt: skip


def edit(draw: Callable, tree: list) -> None:
    """One node below `tree`, near or far from the root, replaced, removed, renamed or exchanged for another."""
    (holder, key), (other, other_key) = place(draw, tree), place(draw, tree)
    match pick(draw, "replace", "replace", "remove", "exchange", "rename", "count", "wrap", "lure"):
        case "replace":
            holder[key] = deepcopy(draw(ODD))
        case "remove" if holder is not tree:
            del holder[key]
        case "exchange":
            holder[key], other[other_key] = deepcopy(other[other_key]), deepcopy(holder[key])
        case "rename" if isinstance(holder, dict):
            holder[pick(draw, f"{key}x", "", "a\nb", "type", *holder)] = holder.pop(key)
        case "count" if type(holder[key]) in (int, float):
            number = holder[key]
            holder[key] = pick(draw, -number, number + 1, number - 1, number * 1000, number / 2, str(number))
        case "wrap":
            holder[key] = [holder[key]]
        case "lure" if isinstance(holder[key], str):
            holder[key] = pick(draw, *LURES)


def place(draw: Callable, holder: list | dict) -> tuple:
    """A node, by a walk from the root: in a tokenizer most nodes are tokens, and most meaning is elsewhere."""
    while True:
        key = pick(draw, *(holder if isinstance(holder, dict) else range(len(holder))))
        inside = holder[key]
        if not isinstance(inside, dict | list) or not inside or pick(draw, True, *[False] * 4):
            return holder, key
        holder = inside


def dump(draw: Callable, tree: object) -> bytes:
    text = json.dumps(tree, ensure_ascii=pick(draw, *[True] * 9, False))
    text = text.replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)
    if pick(draw, *[False] * 30, True):  # a key twice
        text = text.replace("{", '{"dtype": "F16", "model_type": "llava", ', 1)
    return text.encode("utf-8", "surrogatepass")
