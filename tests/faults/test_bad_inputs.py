"""The table of bad inputs: what comes in, and the one line that answers it, exactly.

For every row of REFUSALS: exit status 2, nothing on standard output, no traceback, nothing written.
"""

import io
import json
import os
import re
import struct
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from fuzz import ORIGINAL
from PIL import Image
from safetensors.torch import load_file, save_file
from toys import join_safetensors, noise, split_safetensors, write_json

from himap_ref import HimapError, Llava, LlavaConfig, TextConfig, VisionConfig
from himap_ref.assistant.device import find_device
from himap_ref.assistant.picture import load_image
from himap_ref.checkpoint.config import LIMITS
from himap_ref.checkpoint.load import rename
from himap_ref.image import ImageProcessor
from himap_ref.studies import __main__ as every_study

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
LAYERS, VISION = "language_model.model.layers", "vision_tower.vision_model"
QUERY, OUTPUT = (f"{LAYERS}.0.self_attn.{name}_proj.weight" for name in "qo")
HEAD, PIPE = "language_model.lm_head.weight", "pipe.safetensors"
pytestmark = pytest.mark.usefixtures("no_hang")
STUDIES = {*every_study.studies()}
WITH_WEIGHTS = STUDIES - {"literature", "scenes", "train", "bench"}

# ---------------------------------------------------------------- damage


def encoded(format: str) -> bytes:
    noise(64, 64).save(file := io.BytesIO(), format)
    return file.getvalue()


def to(target):
    """A link, as a file's contents in `put`."""
    return lambda path: path.symlink_to(target)


def locked(path):
    path.touch(0)
    if os.access(path, os.R_OK):
        pytest.skip("root reads every file")


def put(path, value):
    """Makes it the file's contents: text or bytes, nothing (None: no such file), or what a function makes there."""
    path.unlink(missing_ok=True)
    if callable(value):
        value(path)
    elif value is not None:
        path.write_bytes(value if isinstance(value, bytes) else value.encode())


def set_entry(path, keys, value):
    """In a JSON file, or a tensor of a safetensors file; there, None takes it out."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        tensors.pop(keys[0], None)
        save_file(tensors if value is None else tensors | {keys[0]: value}, path)
        return
    data = inner = json.loads(path.read_bytes())
    for key in keys[:-1]:
        inner = inner[int(key) if isinstance(inner, list) else key]
    inner[keys[-1]] = value
    write_json(path, data)


def header(folder, change):
    """What no library writes: change(header, body) -> None, or another body."""
    header, body = split_safetensors((folder / WEIGHTS).read_bytes())
    del header["__metadata__"]  # which is no tensor
    body = change(header, body) or body
    (folder / WEIGHTS).write_bytes(join_safetensors(header, body))


def bytes_of(folder, change):
    put(folder / WEIGHTS, change((folder / WEIGHTS).read_bytes()))


def tensors(folder, change):
    """change(all tensors by name) -> others."""
    changed = change(load_file(folder / WEIGHTS))
    save_file({name: tensor.clone() for name, tensor in changed.items()}, folder / WEIGHTS)


def added(folder, name):
    """A tensor that has no place."""
    set_entry(folder / WEIGHTS, [name], torch.zeros(8))


def without(folder, name):
    """No tensor whose name begins so."""
    tensors(folder, lambda all: {other: tensor for other, tensor in all.items() if not other.startswith(name)})


def files(folder, names):
    """These instead of model.safetensors: the weights, or pickles."""
    (folder / WEIGHTS).rename(folder / "weights")
    for name in names:
        pickle = b"cos\nsystem\n(S'exit 1'\ntR."
        (folder / name).write_bytes((folder / "weights").read_bytes() if name.endswith(".safetensors") else pickle)


def index(folder, weight_map):
    """Beside 1.safetensors and zzz.safetensors, which hold all tensors both, and a pipe."""
    files(folder, ["1.safetensors", "zzz.safetensors"])  # beside model.safetensors an index would not be read
    os.mkfifo(folder / PIPE)
    write_json(folder / INDEX, {"weight_map": weight_map})


def astray(folder, name):
    """A tensor that one shard has, and the index looks for in another one."""
    index(folder, {name: "zzz.safetensors", OUTPUT: "1.safetensors"})
    set_entry(folder / "zzz.safetensors", [name], None)


def adapter(folder, gone):
    put(folder / "adapter_config.json", "{}")
    for name in gone:
        (folder / name).unlink()


def original(folder, entries):
    """A config.json of the original LLaVA's layout: refused before any other file is read."""
    data = {name: value for name, value in (ORIGINAL | entries).items() if value is not ...}
    write_json(folder / "config.json", data)
    put(folder / WEIGHTS, b"never read")
    put(folder / "tokenizer.json", None)


def image_processor(folder, value):
    put(folder / "preprocessor_config.json", None)
    write_json(folder / "processor_config.json", {"image_processor": value})


def narrow(folder, picture):
    """Blown up to 28 x 11 million pixels, or padded to 1.6 gigapixels."""
    width, height, *pad = picture
    put(folder / "x.pgm", b"P5 %d %d 255\n" % (width, height) + bytes(width * height))
    return ["--image", folder / "x.pgm", *pad]


def several(folder, more):
    noise(9, 9).save(folder / "p.png")
    return ["--image", folder / "p.png", folder / "p.png", *more]


def own(folder, name):
    """A score of one's own, in the current folder."""
    for module, text in {"own": OWN, "broken": "def f(:", "fails": "{}['x']"}.items():
        put(folder.parent / f"{module}.py", text)
    return ["--stages", f"1:2:{name}"]


OWN = """
import torch
def shape(view): return torch.ones(1, 3)
def nan(view): return torch.full((1, 4), float("nan"))
def number(view): return 7
def complex(view): return torch.ones(1, 4, dtype=torch.complex64)
def fails(view):
    return 1 / 0
value = 3
def infinite(view): return torch.full((1, 4), float("inf"))
"""
ENTRY = {"id": 1, "image": "b.png", "text": "Why?", "label": "x"}


def questions(folder, data):
    """A file of them, or its only entry's changes; with a folder of pictures."""
    if isinstance(data, dict):
        data = [ENTRY | data]
    put(folder / "questions.json", (data if isinstance(data, str) else json.dumps(data)).encode("latin-1"))
    noise(40, 30).save(folder / "b.png")
    (folder / "link").symlink_to("/etc/hostname")
    os.mkfifo(folder / "pipe")
    return ["evaluate", "--questions", folder / "questions.json", "--image-folder", folder]


# ---------------------------------------------------------------- the table

NINES = "9" * 5000  # more digits than Python makes a number of
WORDS = {  # that stand in braces in the lines below, and may hold {folder} themselves
    "unicode": "the prompt cannot be tokenised: is it valid Unicode? (...)",
    "template": "it must hold <image> once and, after it, {{question}}, or be a name: vicuna_v1, llava-hf, "
    "llama-3, ...",
    "form": "expected LAYER:KEEP:SCORE, such as 2:0.5:text_to_image",
    "keep": "expected a count of at least 1 or a share in (0, 1]",
    "scores": "expected text_to_image, image_to_image, ... or module:function",
    "methods": "is unknown: expected ..., cls:TOKENS, pool:SIDE or stages",
    "zero": "must be 0 (greedy) or more, and finite",
    "nowhere": "no such folder, hub id (owner/name) or short name (llava-1.5-7b, llava-1.5-13b)",
    "picture": "{folder}/x.png: cannot be read as a picture",
    "formats": "expected AVIF, BMP, GIF, JPEG, JPEG2000, PNG, PPM, TIFF, WEBP",
    "config": "{folder}/config.json: cannot be read as JSON",
    "tokenizer": "{folder}/tokenizer.json: not a readable tokenizer",
    "file": "{folder}/model.safetensors",
    "unreadable": "{folder}/model.safetensors: not a readable safetensors file",
    "index": "{folder}/model.safetensors.index.json",
    "query": QUERY,
    "quantised": "quantised weights are not read: use the repository without quantisation, or save them dequantised",
    "not_finite": "at layer 1 gave NaN or infinite values...",
    "no_image": "the tokenizer has no added token",
    "size": "expected int, 1 to 524288",
    "pair": "expected tuple[int, int] | None, 1 to 8192",
    "pixels": "the image processor does not make pictures of",
    "json": "{folder}/questions.json: expected a JSON list, or one JSON object a line",
    "questions": "{folder}/questions.json",
    "first": "no question could be asked; the first:",
    "float": "expected float, 1e-12 to 1e+12",
    "peft": "PEFT's, with a LoRA adapter: merge it into its model (merge_and_unload, then save_pretrained)",
    "whole_one": "use a folder that holds all, such as llava-hf's",
    "write": "cannot be written (...)",
    "grid": "of LLaVA-1.5's one grid of patches only; LLaVA-NeXT has tiles beside it",
    "points": "{folder}: image_grid_pinpoints of the image processor are not those of config.json",
}

ONES, SHAPES = torch.ones(8, 8), ((8, 7), (4, 8), (4, 16), (64,), (1, 8, 8), ())
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE = [  # settings, line; of an otherwise fit config.json
    ({"dynamic": {"type": "dynamic", "factor": 2.0}, "longrope": {"rope_type": "longrope", "factor": 1.0}},
     "RoPE of type {name!r} is not supported: expected default, linear, llama3, or a factor of 1"),
    ([{"rope_type": "yarn"}, {"rope_type": "yarn", "factor": 4.0},
      {"rope_type": "yarn", "factor": 1.0, "attention_factor": 0.5}], "RoPE of type 'yarn' is not supported: ..."),
    ([{"type": ["linear"]}], "RoPE of type ['linear'] is not supported: ..."),
    ({"None": {"type": "linear"}, "0": {"type": "linear", "factor": 0}, "'4'": {"type": "linear", "factor": "4"},
      "True": LLAMA3 | {"factor": True}}, "TextConfig.factor {name}: {float}"),
    ([LLAMA3 | {"low_freq_factor": None}], "TextConfig.low_freq_factor None: {float}"),
    ([LLAMA3 | {"high_freq_factor": 1.0}], "RoPE: low_freq_factor 1.0 is not below high_freq_factor"),
    ([LLAMA3 | {"original_max_position_embeddings": 0}], "TextConfig.original_max_position_embeddings 0: ..."),
    (["yarn"], "{key} 'yarn': expected a JSON object"),
]  # fmt: skip

# What is wrong: an option of run.py; a study; a file of a weights folder (config.json, if none is named), and an entry
# or tensor in it; or a damage from above. Then values of it (a list, or a dictionary with names for them), and the
# line, in which `...` stands for a library's words, which change with its version, or for what another row has in full;
# {} for the value, {name} for its name, {entry} for the first entry of a value that is a dictionary.
REFUSALS = [
    # ------------------------------------------------ options
    ("--prompt", ["", " \n", [" ", "--image", "none"]], "the prompt is empty: ask something"),
    ("--prompt", ["what \ud800?", "caf\udce9"], "{unicode}"),  # a byte that is no UTF-8, as Python hands it over
    ("--prompt", ["word " * 300], "the prompt has 1313 tokens, the model's context 200: shorten the prompt"),
    ("--template", ["", "vicuna", "<image>", "{question}<image>", "<image><image>{question}",
                    "<image>{question}{answer}"], "template {!r}: {template}"),
    ("--stages", ["", " \n"], "stages: none are given: expected LAYER:KEEP:SCORE,...; to prune nothing: --method none"),
    ("--stages", [",", "1:1:random,"], "stage '': {form}"),
    ("--stages", ["x:1:random", "1:half:random", "1:nan:random", "1:1e999:random", "2", "2::text_to_image", "1:0.5"],
     "stage {!r}: {form}"),
    ("--stages", [f"{NINES}:1:random"], "stage '999...:1:random': {form}"),
    ("--stages", {layer: f"{layer}:0.5:text_to_image" for layer in (3, 99)},
     "stage layer {name} does not exist: the decoder's layers are 0..2"),
    ("--stages", ["0:0.5:text_to_image"], "stage layer 0: expected a whole number from 1 (layer K-1 ranks)"),
    ("--stages", {first: f"{first}:1:random,1:1:random" for first in (2, 1)},
     "stage layers [{name}, 1] must ascend, each layer once"),
    ("--stages", {keep: f"1:{keep}:random" for keep in ("0", "0.0")},
     "stage keep {name}: {keep} (0 drops the whole picture: only with no score)"),
    ("--stages", {"-2": "1:-2:random", "1.5": "1:1.5:random", "inf": "1:1.e999:random"}, "stage keep {name}: {keep}"),
    ("--stages", ["2:500:text_to_image"], "stage at layer 2 is to keep 500 image tokens, only 4 enter it"),
    ("--stages", ["1:5:random"], "stage at layer 1 is to keep 5 image tokens, only 4 enter it"),
    ("--stages", ["1:2:random,2:3:random"], "stage at layer 2 is to keep 3 image tokens, only 2 enter it"),
    ("--stages", [f"1:1:random{NINES}"], "score 'random999...' is unknown: {scores}"),
    ("--stages", ["2:0.5:"], "score '' is unknown: {scores}"),
    ("--stages", ["1:1:nonsense"], "score 'nonsense' is unknown: {scores}"),
    ("--stages", ["1:1:none"], "stage score None: expected a function from LayerView to (B, N) scores"),
    ("--method", ["nonsense", ""], "method {!r} {methods}"),
    ("--method", [f"random{NINES}"], "method 'random999...' {methods}"),
    ("--method", ["himap-paper"], "method 'himap-paper' does not fit this model (stage layer 8 does not exist: the "
     "decoder's layers are 0..2): choose ... none or own stages"),
    ("--method", ["cls:0"], "cls:0: the picture has 4 image tokens: keep 1 to 4"),
    ("--method", ["cls:x"], "method 'cls:x': expected cls:NUMBER, such as cls:9"),
    ("--method", [f"cls:{NINES}"], "method 'cls:999...': expected cls:NUMBER, such as cls:9"),
    ("--method", ["pool:3"], "pool:3: the picture has 2 x 2 image tokens: a side of 1 to 2"),
    ("--temperature", {"-1.0": "-1", "inf": "1e999", "nan": "nan"}, "temperature {name}: {zero}"),
    ("--temperature=-1e999", [[]], "temperature -inf: {zero}"),
    ("--top-p", {"0.0": "0", "inf": "1e999", "nan": "nan"}, "top_p {name}: must be in (0, 1]"),
    ("--max-new-tokens", ["0"], "max_new_tokens 0: must be a whole number of at least 1"),
    ("--seed", [2**64, "-1"], "seed {}: must be in [0, 2^63)"),
    ("--device", ["", "cuda:99", "meta", "hpu", "nonsense"],
     "device {!r}: not available for torch.bfloat16 (...); there is cpu..."),
    ("--weights", ["/no/such", "x" * 300], "weights {!r}: {nowhere}"),
    ("--revision", ["v1"], "revision 'v1': '{whole}' is a folder, which has no other: leave it out"),
    ("--show", ["no/such/x.png", "x.zzz"],
     "--show {}: needs a picture to draw on, and a .png file in a folder that exists"),
    (several, {what: [f"--{what}", f"x.{kind}"] for what, kind in (("show", "png"), ("report", "html"))},
     "--{name} x...: draws on one picture, not on 2: leave it out"),
    (several, [["none"]], "none: cannot be read as a picture (...)"),
    (own, ["nowhere:f"], "score {!r} cannot be imported (ModuleNotFoundError: No module named 'nowhere')"),
    (own, [":f"], "score {!r} cannot be imported (ValueError: Empty module name)"),
    (own, [".own:f"], "score {!r} cannot be imported (TypeError: ...)"),
    (own, ["own:nothing"], "score {!r} cannot be imported (AttributeError: module 'own' has no attribute 'nothing')"),
    (own, ["broken:f"], "score {!r} cannot be imported (SyntaxError: ...)"),
    (own, ["fails:f"], "score {!r} cannot be imported (KeyError: 'x')"),
    (own, ["own:value"], "stage score 3: expected a function from LayerView to (B, N) scores"),
    (own, ["own:fails"], "score {!r} failed at own.py, line 8 (ZeroDivisionError: division by zero)"),
    (own, ["own:shape"], "score 'shape' at layer 1 returned torch.float32 [1, 3], not (B, N) = [1, 4]"),
    (own, ["own:complex"], "score 'complex' at layer 1 returned torch.complex64 [1, 4], not (B, N) = [1, 4]"),
    (own, ["own:number"], "score 'number' at layer 1 returned int, not (B, N) = [1, 4]"),
    (own, {name: f"own:{name}" for name in ("nan", "infinite")}, "score {name!r} {not_finite}"),
    (own, ["os:getcwd"], "score {!r} failed at ... (TypeError: ...)"),
    # ------------------------------------------------ pictures
    ("x.png", {
        "text": b"not a picture", "empty": b"", "width 0": encoded("BMP")[:18] + bytes(4) + encoded("BMP")[22:],
        "size 0": b"P6 0 0 255\n", "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "PostScript, which is a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
     }, "{picture} ({formats})"),
    ("x.png", {
        "truncated png": encoded("PNG")[:2000], "truncated jpeg": encoded("JPEG")[:900],
        "broken in the middle": encoded("PNG")[:60] + bytes(90) + encoded("PNG")[150:],
     }, "{picture} (...)"),
    ("x.png", {"decompression bomb": b"P6 50000 50000 255\n"},
     "{picture} (Image size (2500000000 pixels) exceeds limit ...)"),
    ("x.png", {"bomb that Pillow lets in": b"P6 12500 12500 255\n"},
     "{picture} (12500 x 12500 pixels: expected 1 to 150000000)"),
    ("x.png", {"nowhere": None}, "{picture} ([Errno 2] No such file or directory: '{folder}/x.png')"),
    ("x.png", {"a folder": Path.mkdir}, "{picture} ([Errno 21] Is a directory: '{folder}/x.png')"),
    ("x.png", {"what not even root can read": to("/proc/self/mem")}, "{picture} ([Errno 5] Input/output error)"),
    ("x.png", {"loop": to("x.png")}, "{picture} ([Errno 40] Too many levels of symbolic links: '{folder}/x.png')"),
    ("x.png", {"a pipe": os.mkfifo, "endless": to("/dev/zero")}, "{picture} (a pipe or a device, not a file)"),
    ("x.png", {"locked": locked}, "{picture} ([Errno 13] Permission denied: '{folder}/x.png')"),
    (narrow, [(1, 400_000), (1, 200_000), (200_000, 1), (1, 40_000, "--pad")],
     "a picture of {0[0]} x {0[1]} pixels is too narrow: crop it first"),
    # ------------------------------------------------ the folder's files
    ("config.json", {"gone": None}, "{config} ([Errno 2] No such file ...)"),
    ("config.json", {"a folder": Path.mkdir}, "{config} ([Errno 21] Is a directory: ...)"),
    ("config.json", {"unreadable": to("/proc/self/mem")}, "{config} ([Errno 5] Input/output error)"),
    ("config.json", {"endless": to("/dev/zero"), "binary": b"\xff\xfe\x00"}, "{config} (...)"),
    ("config.json", {"a pipe": os.mkfifo}, "{config} (a pipe or a device, not a file)"),
    ("config.json", {"cut": '{"model_ty'}, "{config} (Unterminated string ...)"),
    ("config.json", {"too deep": "[" * 100_000}, "{config} (...recursion...)"),
    ("config.json", ["[]", "null"], "{folder}/config.json: expected a JSON object"),
    ("tokenizer.json", {"gone": None}, "{tokenizer} ([Errno 2] No such file ...)"),
    ("tokenizer.json", {"a pipe": os.mkfifo, "endless": to("/dev/zero")},
     "{tokenizer} (a pipe or a device, not a file)"),
    ("tokenizer.json", {"none": "{}", "binary": b"\xff"}, "{tokenizer} (...)"),
    ("tokenizer.json post_processor single 0 SpecialToken id", ["0"], "{tokenizer} (no entry found for key)"),  # panics
    ("tokenizer.json added_tokens", [[]], "{no_image} 3 (image_token_index): add <image> to it"),
    ("tokenizer.json model vocab ?", [502], "the tokenizer gives id 502, the weights know 502: not of one model"),
    ("tokenizer.json normalizer", [{"type": "Replace", "pattern": {"Regex": r"[\s\S]"}, "content": ""}],
     "no text follows the image: stages need text rows after it to rank by"),  # no word is left
    ("generation_config.json eos_token_id", [{"x": 1}, [1, "2"]],
     "{folder}/generation_config.json: eos_token_id {!r}: expected an id or a list of ids"),
    ("himap.json template", [5], "{folder}/himap.json: template is not text"),
    ("himap.json stages", ["1:0.5:os:getcwd"], "score 'os:getcwd' is unknown: {scores}"),  # which would run code
    ("himap.json palette", ["red blue"],
     "palette 'red blue': expected colours such as #de2020, with spaces between them"),
    (adapter, [[], ["config.json"], ["config.json", WEIGHTS]],
     "{folder}: adapter_config.json: a LoRA adapter, which is not applied here: merge it into its model (peft: "
     "merge_and_unload, then save_pretrained), or remove that file where this is done"),
    (files, [[]], "{folder}: no .safetensors file (a repository of .bin files must be converted first)"),
    (WEIGHTS, {"a folder": Path.mkdir, "a pipe": os.mkfifo},
     "{folder}: no .safetensors file (a repository of .bin files must be converted first)"),
    (files, [["pytorch_model.bin"], ["model.pt"], ["consolidated.00.pth"],
             ["pytorch_model.bin", "consolidated.safetensors"],
             ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "consolidated.safetensors"]],
     "{folder}: {0[0]} is a pickle, which can run code when it is read; convert it to safetensors first (transformers: "
     "from_pretrained(....).save_pretrained(folder)) or use a llava-hf repository"),
    (files, [["mm_projector.bin"]],
     "{folder}: holds a projector alone, in mm_projector.bin: a whole LLaVA is needed"),
    (files, [["a.safetensors", "b.safetensors"], ["model-00001-of-00001.safetensors", SHARDS[0]],
             ["adapter_model.safetensors", *SHARDS]],
     "{folder}: {0[0]} or {0[1]}? Rename what is the model to model.safetensors"),
    (files, {SHARDS[0]: [SHARDS[1]], SHARDS[1]: [SHARDS[0]]}, "{folder}: shard {name} is missing: download it again"),
    (index, {path: {"a": path} for path in ("../x.safetensors", "/x.safetensors", "sub/x.safetensors")},
     "{index}: shard {name!r} lies outside the folder"),
    (index, {path: {QUERY: "1.safetensors", "b": path} for path in ("..", "x" * 300, "2.safetensors", PIPE)},
     "{folder}: shard {name} is missing: download it again"),
    (index, [{"a": "a\0b"}], "{folder}: shard a\\x00b is missing: download it again"),
    (index, [None, [], {"a": None}, {"a": 1}, {}], "{index}: not a shard index (no weight_map)"),
    (index, [{"a": "1.safetensors"}],
     "{folder}/1.safetensors: tensor 'a' is not in it, though the index says so: download both again"),
    (astray, [QUERY], "{folder}/zzz.safetensors: tensor {!r} is not in it, though the index says so: ..."),
    (index, [{QUERY: "1.safetensors", OUTPUT: "zzz.safetensors"}],  # and all others of both, which it does not name
     "{folder}/zzz.safetensors: tensor ... appears twice"),
    (WEIGHTS, {"a pickle": b"cos\nsystem\n(S'exit 1'\ntR.", "empty": b"",
               "a Git LFS pointer": "version https://git-lfs.github.com/spec/v1\n",
               "header longer than the file": struct.pack("<Q", 2**40) + b"{}"}, "{unreadable} (...)"),
    (bytes_of, {"cut": lambda data: data[:-9], "header cut": lambda data: data[:5000],
                "more behind the last tensor": lambda data: data + b"more"}, "{unreadable} (...)"),
    (header, {"beyond the file": lambda header, _: header[OUTPUT].update(data_offsets=[2**40, 2**40 + 256])},
     "{unreadable} (...)"),
    (header, {"an overlap": lambda header, _: header[OUTPUT].update(data_offsets=header[QUERY]["data_offsets"])},
     "{unreadable} (...invalid offset...)"),
    # ------------------------------------------------ tensors
    (f"{WEIGHTS} {QUERY}", {str([*shape]): torch.zeros(shape) for shape in SHAPES},
     "{file}: tensor '{query}' has shape {name}, config.json asks for [8, 8]"),
    (f"{WEIGHTS} {QUERY}", {"empty": torch.zeros(0)}, "{file}: tensor '{query}' has shape [0], config.json asks for "
     "[8, 8] (left empty by DeepSpeed ZeRO-3: see its zero_to_fp32.py)"),
    (f"{WEIGHTS} {HEAD}", {"transposed": torch.zeros(8, 502)},
     f"{{file}}: tensor '{HEAD}' has shape [8, 502], config.json asks for [502, 8]"),
    (f"{WEIGHTS} {QUERY}", {
        "U8": torch.zeros(32, 1).byte(), "I8": ONES.char(), "I32": ONES.int(), "I64": ONES.long(), "BOOL": ONES.bool(),
        "F8_E4M3": ONES.to(torch.float8_e4m3fn),
     }, "{file}: tensor '{query}' holds {name}, not floats of 16 bits or more: {quantised}"),
    (f"{WEIGHTS} {QUERY}", {"NaN": ONES * torch.nan, "infinite": ONES * torch.inf},
     "score 'text_to_image' {not_finite}"),
    (f"{WEIGHTS} {HEAD}", {  # where no score sees it
        "NaN": torch.full((502, 8), torch.nan), "too large for the dtype": torch.full((502, 8), 3.4e38),
     }, "the model's logits are NaN or infinite: damaged weights, or a dtype too narrow for them"),
    (added, ["model.norm.weight"], "{file}: tensor {!r} appears twice"),  # in two layouts
    (added, [f"{LAYERS}.3.mlp.up_proj.weight", f"{LAYERS}.0.self_attn.q_proj.bias", "optimizer.step", "image_newline",
             "model.image_newline", "multi_modal_projector.linear_3.weight", f"{VISION}.head.weight",
             f"{VISION}.encoder.layers.2.mlp.fc1.bias",  # one more layer than config.json says
             "\n\x1b[31mx.y", "vision_tower.layers.\xb2.x"],  # a terminal's colour; a number that is none
     "{file}: tensor {!r} is unexpected: config.json describes no such part"),
    (added, [QUERY.replace("weight", name) for name in (
        "weight_scale_inv", "weight_packed", "weight.quant_state.bitsandbytes__nf4", "weight.nested_absmax", "SCB",
        "biases", "qweight", "qzeros",
     )], "{file}: tensor {!r} is unexpected: {quantised}"),
    (added, [QUERY.replace("weight", name) for name in ("lora_A.weight", "lora_B.default.weight", "base_layer.weight")],
     "{file}: tensor {!r} is unexpected: {peft}"),
    (tensors, {"PEFT": lambda all: {f"base_model.model.{name}": tensor for name, tensor in all.items()}},
     "{file}: tensor ... is unexpected: {peft}"),
    (without, [QUERY, "multi_modal_projector.linear_2.bias", f"{VISION}.pre_layrnorm.weight",
               f"{VISION}.encoder.layers.0.mlp.fc2.weight", "language_model.model.norm.weight",
               HEAD],  # for which the embeddings would silently stand in
     "{folder}: tensor {ours!r} is missing (1 in all): not a complete LLaVA"),
    (without, ["vision_tower", ("vision_tower", "multi_modal_projector")],
     "{folder}: no vision_tower in it: the original LLaVA takes it from a repository of its own (config.json: "
     "mm_vision_tower): {whole_one}"),
    (without, ["multi_modal_projector"], "{folder}: no multi_modal_projector in it: LLaVA's training leaves it in a "
     "file of its own (mm_projector.bin): {whole_one}"),
    (without, ["language_model"],
     "{folder}: no language_model in it: the files hold what was trained, not what it was trained for: {whole_one}"),
    # ------------------------------------------------ entries of config.json
    ("text_config hidden_size", [None, True, 8.0, "8", 2**62], "TextConfig.hidden_size {!r}: {size}"),
    ("text_config hidden_size", [[8] * 99], "TextConfig.hidden_size [8, 8, 8, 8, 8, 8, ....]: {size}"),
    ("text_config num_attention_heads", [0], "TextConfig.num_attention_heads 0: {size}"),
    ("text_config num_attention_heads", [3], "hidden_size 8, 3 heads of 2.66667: RoPE needs an even size"),
    ("text_config head_dim", [3], "hidden_size 8, 2 heads of 3: RoPE needs an even size"),
    ("text_config num_key_value_heads", [3], "2 attention heads do not divide into 3 key/value heads"),
    ("text_config num_key_value_heads", [0], "TextConfig.num_key_value_heads 0: {size}"),
    ("text_config num_hidden_layers", [10**9], "TextConfig.num_hidden_layers {}: expected int, 1 to 1000"),
    ("text_config vocab_size", [100],
     f"{{file}}: tensor '{HEAD}' has shape [502, 8], config.json asks for [100, 8]"),
    ("text_config max_position_embeddings", [0], "TextConfig.max_position_embeddings 0: expected int, ..."),
    ("text_config rms_norm_eps", ["1e-5", float("nan")], "TextConfig.rms_norm_eps {!r}: {float}"),
    ("text_config attention_bias", [1], "TextConfig.attention_bias 1: expected bool"),
    ("text_config hidden_act", ["gelu"], "TextConfig.hidden_act 'gelu': expected Literal['silu']"),
    ("text_config model_type", ["qwen2"], "text_config.model_type {!r} is not supported: expected 'llama'"),
    ("text_config model_type", ["mistral"], "sliding_window 4096 is not supported: expected null: ..."),
    *((f"text_config {key}", settings, line.replace("{key}", key))
      for key in ("rope_scaling", "rope_parameters") for settings, line in ROPE),
    ("vision_config patch_size", [0], "VisionConfig.patch_size 0: {size}"),
    ("vision_config num_attention_heads", [0], "VisionConfig.num_attention_heads 0: {size}"),
    ("vision_config num_attention_heads", [3],
     "3 heads, hidden size 8, image 28, patch 14: the encoder's sizes do not divide"),
    ("vision_config image_size", [10],
     "2 heads, hidden size 8, image 10, patch 14: the encoder's sizes do not divide"),
    ("vision_config image_size", [2**30], "VisionConfig.image_size {}: expected int, 1 to 8192"),
    ("vision_config num_channels", [4], "VisionConfig.num_channels 4: expected int, 3 to 3"),
    ("vision_config hidden_act", ["relu"],
     "VisionConfig.hidden_act 'relu': expected Literal['quick_gelu', 'gelu']"),
    ("vision_config model_type", ["siglip_vision_model"],
     "vision_config.model_type {!r} is not supported: expected 'clip_vision_model'"),
    ("model.safetensors image_newline", [torch.zeros(8)],
     "{file}: tensor 'image_newline' is unexpected: config.json describes no such part"),
    ("model_type", ["llava_next"],
     "{folder}: image_processor_type 'CLIPImageProcessor' is not supported: expected LlavaNextImageProcessor"),
    ("model_type", ["qwen2_vl", ["llava"]],
     "model_type {!r} is not supported: expected 'llava'"),
    ("text_config", ["x"], "text_config 'x': expected a JSON object"),
    ("vision_config", [[]], "vision_config []: expected a JSON object"),
    ("vision_config", [{}], "{folder}: {pixels} 224 pixels a side"),
    ("image_token_index", [None, "3", -3], "LlavaConfig.image_token_index {!r}: expected int, 0 to ..."),
    ("image_token_index", [36, 400, 10**6], "{no_image} {} (image_token_index): ..."),  # 36 is "A"
    ("vision_feature_layer", {"3": 3, "-4": -4, "-5": [-5], "(-2, -5)": [-2, -5], "(-2, 4)": [-2, 4]},
     "vision_feature_layer {name}: expected indices into 3 states"),
    ("vision_feature_layer", [[], [True], [-2.0], ["-2"], [[-2]], "-2", [None, -2]],
     "LlavaConfig.vision_feature_layer ...: expected int | tuple[int, ...], -1001 to 1000"),
    ("vision_feature_select_strategy", ["cls"],
     "LlavaConfig.vision_feature_select_strategy 'cls': expected Literal['default', 'full']"),
    ("projector_hidden_act", [5, "tanh"],
     "LlavaConfig.projector_hidden_act {!r}: expected Literal['gelu', 'quick_gelu']"),
    ("projector_type", ["resampler"], "LlavaConfig.projector_type 'resampler': expected Literal[...]"),
    *((f"{section}quantization_config", [{"quant_method": "bitsandbytes", "load_in_4bit": True}],
       "quantization_config: {quantised}") for section in ("", "text_config ", "vision_config ")),
    (original, [{"quantization_config": {"quant_method": "gptq"}}], "quantization_config: {quantised}"),
    (original, [
        {"mm_use_im_start_end": True}, {"image_aspect_ratio": "anyres"}, {"image_aspect_ratio": "anyres_max_9"},
        {"image_aspect_ratio": ["pad"]}, {"mm_patch_merge_type": "spatial_unpad"}, {"mm_patch_merge_type": "spatial"},
        {"mm_projector_type": "mlp3x_gelu"}, {"mm_projector_type": "identity"}, {"mm_projector_type": None},
        {"mm_vision_select_feature": "cls"}, {"mm_resampler_type": "spatial_pool"}, {"s2": True},
        {"transformers_weights": "other.safetensors"}, {"mm_vision_tower": None}, {"mm_vision_tower": ["x"]},
        {"mm_vision_tower": "google/siglip-so400m-patch14-384"}, {"mm_vision_tower": "eva_clip_g"},
        {"mm_vision_tower": "openai/clip-vit-base-patch16"}, {"mm_vision_tower": "./checkpoints/my-tower"},
        {"mm_vision_tower": "laion/CLIP-ViT-L-14-laion2B-s32B-b82K"},
        {"mm_vision_tower": "openai/clip-vit-large-patch14-336-tuned"},
     ], "{entry} is not supported: expected ..."),
    (original, [{"mm_vision_tower": ...}],  # not llava-hf's layout, in which all sections may be absent
     "mm_vision_tower None is not supported: expected openai/..."),
    (original, [{"mm_vision_select_layer": layer} for layer in (25, [-2], "-2")],
     "{entry}: expected one index into 25 hidden states"),
    (original, [{"mm_hidden_size": 1152}, {"mm_hidden_size": "1024"}],
     "{entry}: mm_vision_tower 'openai/clip-vit-large-patch14-336' is 1024 wide"),
    (original, [{"image_token_index": -1}], "LlavaConfig.{entry}: expected int, 0 to ..."),
    # ------------------------------------------------ the image processor's
    (image_processor, [[1]], "image_processor [1]: expected a JSON object"),
    ("preprocessor_config.json crop_size", [{"shortest_edge": 28}], "ImageProcessor.crop_size (None, None): {pair}"),
    ("preprocessor_config.json crop_size", [336], "{folder}: {pixels} 28 pixels a side"),
    ("preprocessor_config.json size", [{}, {"longest_edge": 28}], "ImageProcessor.size (None, None): {pair}"),
    ("preprocessor_config.json size", [{"shortest_edge": 28, "longest_edge": 56}],
     "image processor: size with a longest_edge beside shortest_edge is not supported: remove it"),
    ("preprocessor_config.json size", [{"height": 28}], "ImageProcessor.size (28, None): {pair}"),
    ("preprocessor_config.json size", [0, 10**9, True],
     "ImageProcessor.shortest_edge {}: expected int | None, 1 to 8192"),
    ("preprocessor_config.json resample", [17, "bicubic"], "ImageProcessor.resample {!r}: expected int, 0 to 5"),
    ("preprocessor_config.json rescale_factor", [float("nan")], "ImageProcessor.rescale_factor nan: {float}"),
    ("preprocessor_config.json image_mean", {"(0.5,)": [0.5], "0.5": 0.5},
     "ImageProcessor.image_mean {name}: expected tuple[float, float, float], -1000 to 1000"),
    ("preprocessor_config.json image_std", [[0, 1, 1]],
     "ImageProcessor.image_std (0, 1, 1): expected tuple[float, float, float], 1e-06 to 1e+06"),
    ("preprocessor_config.json do_resize", ["no"], "image processor: do_resize is neither true nor false"),
    ("preprocessor_config.json do_center_crop", [False], "{folder}: {pixels} 28 pixels a side"),
    # ------------------------------------------------ question files
    (questions, {"empty": "", "no entries": []}, "{questions}: holds no questions"),
    (questions, {"cut": "[1", "binary": "\xff"}, "{json} (...)"),
    (questions, {"too deep": "[" * 100_000}, "{json} (...recursion...)"),
    (questions, [{"text": " "}], "{questions}: entry 1: no question: expected text, found blank text: ..."),
    (questions, {"answers that contradict": [ENTRY, ENTRY | {"label": "y"}]},
     "{questions}: entry 2: id '1' asks this a second time with another answer: correct one of both"),
    (questions, [{"image": ["b.png", "b.png"]}],
     "{questions}: none of 1 questions can be asked: several pictures in one entry: the model takes one"),
    (questions, [{"image": "https://a.b/c.png"}],
     "{questions}: entry 1: {entry} is elsewhere: put it into the image folder, ..."),
    (questions, [{"image": "../b.png"}, {"image": "/b.png"}],
     "{questions}: entry 1: {entry} leads out of the image folder: choose a folder that it is in"),
    (questions, [{"image": "a\0"}], "{questions}: entry 1: {entry} is not a path: correct it, or remove the entry"),
    (questions, [{"image": "link"}], "{first} {folder}/link: cannot be read as a picture (...)"),
    (questions, [{"image": "pipe"}], "{first} {folder}/pipe: cannot be read as a picture (a pipe ...)"),
    (questions, [{"image": "."}], "{first} {folder}: cannot be read as a picture ([Errno 21] ...)"),
    (questions, [{"image": "a.png"}], "{first} {folder}/a.png: ..."),
    (questions, [{"text": "a\ud800?"}], "{first} {unicode}"),
    (questions, [{"category": "a\n\x1b[31m"}],
     "{questions}: entry 1: `category`: expected a line of text, not 'a\\n\\x1b[31m'"),
    # ------------------------------------------------ studies: what nobody looks at before it is deep inside, hours on
    ("literature", [["--image", 0], ["--text", 10**30]],
     "--system from 0, --image and --text from 1, together at most 2^20 tokens"),
    ("scenes --seed", [-1], "--seed -1: must be 0 or more"),
    ("scenes --out", ["x.zzz"], "x.zzz: this kind of file cannot be written: end its name in .png"),
    ("scenes --out", ["/dev/full/x.png"], "{}: {write}: choose another file"),
    ("train", [["--lr", "nan"], ["--steps", 10**30]],
     "--lr: above 0 and at most 1; --steps and --align-steps: 0 to 1000000"),
    ("train --seed", [2**63], "--seed {}: must be in [0, 2^63)"),
    ("train --state", ["junk", "pickle"], "{}: no state of a training (...): remove it, or choose another --state"),
    ("flow --show", ["x.zzz", "x"], "{}: this kind of file cannot be written: end its name in .png"),
    ("flow --show", ["junk/x.png"], "junk/x.png: {write}: choose another file"),
    ("flow --scenes", [0], "0 scenes from seed ...: need at least 1, from a seed that is not negative"),
    ("disruption", [["--batch", 0], ["--max-new-tokens", 0]], "--batch and --max-new-tokens: must be at least 1"),
    ("disruption --layers", [3, 10**30], "layer {} does not exist: the decoder's layers are 0..2"),
    ("bias --schedule", ["2"], "--schedule '2': expected K1:KEEP1,K2:KEEP2, such as 2:0.5,8:0.25"),
    ("sweep --budgets", ["nan"], "--budgets [nan]: expected shares of vanilla's FLOPs, above 0 and at most 1"),
    ("sweep --methods none", ["x"], "method 'x' {methods}"),
    ("bench --methods", ["none+cache"], "method {!r}: only +prefix and +reprune can be added to a method"),
    ("bench --methods", ["vwt"], "method 'vwt' {methods}"),
    ("bench", [["--layers", 13], ["--write", "x"]], "--layers and --write: --shape must be 7b or 13b"),
    ("bench --shape 7b --write x --layers", [0, 33], "--layers {}: the decoder has 32"),
    ("bench --shape 7b --layers 1 --write", ["/dev/null/x"], "/dev/null/x: {write}"),
    ("bench --rounds", [0], "--rounds 0: must be at least 1"),
    ("bench --new-tokens", [0], "--new-tokens 0: must be at least 1"),
    ("bench --new-tokens 8 --rounds 1 --text-tokens", [390],
     "569 tokens and 8 new ones do not fit the model's context of 512"),
    ("bench --shape", ["nowhere"], "weights 'nowhere': {nowhere}"),
    ("evaluate --limit", [0], "--limit 0: must be at least 1"),
    ("evaluate --out", ["/dev/full/x.jsonl"], "/dev/full/x.jsonl: {write}"),
    ("evaluate --revision", ["v1"], "revision 'v1': '{whole}' is a folder, which has no other: leave it out"),
    ("evaluate", [["--batch", 0], ["--max-new-tokens", 0]], "--batch and --max-new-tokens: must be at least 1"),
    ("evaluate --method", ["x"], "method 'x' {methods}"),
    ("evaluate --scenes 1 --metric", ["pope"], "pope: the right answer of ... is '...', not yes or no: ..."),
]  # fmt: skip


NEXT = [  # the same of a LLaVA-NeXT
    ("image_grid_pinpoints",
     {"()": [], "(28, 56)": [28, 56], "((28,), (56, 28))": [[28], [56, 28]], "((0, 28),)": [[0, 28]],
      "((28, -28),)": [[28, -28]], "((28, 28000000000),)": [[28, 28 * 10**9]], "((28.0, 28),)": [[28.0, 28]],
      "((True, 28),)": [[True, 28]], "'(1x1),...,(6x6)'": "(1x1),...,(6x6)", "{'28': 56}": {"28": 56}},
     "LlavaConfig.image_grid_pinpoints {name}: expected tuple[tuple[int, int], ...] | None, 1 to 8192"),
    ("image_grid_pinpoints", [[[28, 56], [30, 56]]],
     "image_grid_pinpoints [30, 56]: not in tiles of the encoder's 28 pixels a side"),
    ("image_grid_pinpoints", [[[28, 28]]], "{points}"),
    ("preprocessor_config.json image_grid_pinpoints", [[[56, 28], [28, 56]], None], "{points}"),
    ("preprocessor_config.json size", [{"shortest_edge": 56}], "{folder}: {pixels} 28 pixels a side"),
    ("preprocessor_config.json image_processor_type", ["CLIPImageProcessor"],
     "{folder}: image_processor_type {!r} is not supported: expected LlavaNextImageProcessor"),
    ("model_type", ["llava"],
     "{folder}: image_processor_type 'LlavaNextImageProcessor' is not supported: expected CLIPImageProcessor"),
    ("vision_feature_select_strategy", ["full"],
     "vision_feature_select_strategy 'full': tiles have no class token: expected 'default'"),
    ("model.safetensors image_newline", [None], "{folder}: tensor 'image_newline' is missing (1 in all): ..."),
    ("model.safetensors image_newline", {"[9]": torch.zeros(9), "[1, 8]": torch.zeros(1, 8)},
     "{file}: tensor 'image_newline' has shape {name}, config.json asks for [8]"),
    ("--show", ["x.png"], "pictures and pages of what was kept: {grid}: --json and --trace tell it"),
    ("--report", ["x.html"], "pictures and pages of what was kept: {grid}: --json and --trace tell it"),
    ("--pad", [[]], "--pad: LLaVA-NeXT looks at whole pictures as it is: leave it out"),
    ("--method", ["cls:2"], "method 'cls:2': {grid}: take stages"),
    ("--stages", ["1:25:text_to_image"], "stage at layer 1 is to keep 25 image tokens, only 24 enter it"),
    *((study, [[]], study.split()[0] + ": {grid}: take a LLaVA-1.5...")
      for study in ("flow", "disruption", "bias", "sweep --quick")),
]  # fmt: skip


def says(message, line):
    """Whether a line is this error, in which `...` stands for anything."""
    return re.fullmatch(re.escape(f"error: {message}").replace(re.escape("..."), ".*"), line)


def rows(table):
    for what, values, line in table:
        for name, value in values.items() if isinstance(values, dict) else ((str(value), value) for value in values):
            yield pytest.param(what, name, value, line, id=f"{getattr(what, '__name__', what)} {name!r:.60}")


def arrange(what, value, folder, whole):
    """Makes what is wrong; returns the words of the command that meets it."""
    if callable(what):
        return what(folder, value) or ["--weights", folder]
    first, *rest = what.split()
    if first.startswith("--") or first in STUDIES:
        model = ["--weights", whole, "--scenes", 1] if first in WITH_WEIGHTS else []
        return [first, *model, *rest, *(value if isinstance(value, list) else [value])]
    path, *keys = [folder / first, *rest] if "." in first else [folder / "config.json", first, *rest]
    set_entry(path, keys, value) if keys else put(path, value)
    return ["--image", path] if path.suffix == ".png" else ["--weights", folder]


@pytest.fixture
def refused(ask, study, monkeypatch):
    """A row, whole weights and a copy to damage: asserts what stands above."""
    return partial(check, ask, study, monkeypatch)


def check(ask, study, monkeypatch, whole, folder, what, name, value, line):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.chdir(folder.parent)
    Path("junk").write_bytes(b"junk")
    Path("pickle").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    words, before = arrange(what, value, folder, whole), sorted(folder.parent.rglob("*"))
    if what is questions:
        words += ["--weights", whole, "--out", whole.parent / "answers"]
    status, out, err = study(every_study, *words) if words[0] in STUDIES else ask("--weights", whole, *words)
    entry = "{} {!r}".format(*next(iter(value.items()))) if isinstance(value, dict) and value else ""
    told = {word: text.format(folder=folder) for word, text in WORDS.items()}
    told |= {"folder": folder, "whole": whole, "name": name, "entry": entry, "ours": rename(str(value))}
    *others, last = err.splitlines()
    assert err.endswith("\n") and says(line.format(value, **told), last), err
    assert (status, out.strip()) == (2, "") and "Traceback" not in err
    assert what is questions or not others  # those of questions come after a progress bar
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize("what, name, value, line", [*rows(REFUSALS)])
def test_refused(refused, whole, folder, what, name, value, line):
    """A fault that goes through, or is told by a traceback, by a library, or as another one; a file left behind."""
    refused(whole, folder, what, name, value, line)


@pytest.mark.parametrize("what, name, value, line", [*rows(NEXT)])
def test_refused_of_next(refused, next_folder, what, name, value, line):
    """Settings of tiles that do not fit the encoder or each other; what is of one grid, done with tiles."""
    refused(next_folder, next_folder, what, name, value, line)


def test_the_usual_question_works(ask):
    """Every row above refused for the same other reason."""
    status, _, err = ask()
    assert status == 0 and "image tokens 4 -> 2 -> 1" in err


@pytest.mark.parametrize("args", [
    ["--max-new-tokens", "1e3"], ["--max-new-tokens", NINES], ["--seed", "0.5"], ["--temperature", "warm"],
    ["--dtype", "int8"], ["--no-such-option"],
], ids=lambda args: args[-1][:10])  # fmt: skip
def test_what_is_no_number(ask, args):
    """A traceback out of the conversion. Python's own reader of arguments says how they are meant, then the error."""
    status, out, err = ask(*args)
    assert (status, out) == (2, "") and err.splitlines()[-1].startswith("run.py: error: ") and "Traceback" not in err


@pytest.mark.parametrize("prompt", ["What is <image>?", "<s></s><pad>", "a\0b", "{question} {} %s ${x}", "\u200b"])
def test_odd_prompts_are_text(ask, prompt):
    """A second picture, the end of the prompt, a format field or the end of a C string seen in what is only text."""
    assert ask("--prompt", prompt)[0] == 0


def test_pictures_in_memory():
    """The same faults in a picture that a caller has opened or made: a traceback, or black for 8-bit levels."""
    opened = Image.open(io.BytesIO(encoded("PNG")[:2000]))
    for image in (opened, Image.new("RGB", (0, 5)), Image.new("RGB", (5, 0))):
        with pytest.raises(HimapError, match="cannot be read as a picture"):
            load_image(image)
    for mode, color, level in (
        ("La", (90, 255), 90), ("RGBa", (0, 0, 0, 0), 255), ("I", 200, 200), ("I", 200 * 256, 200)
    ):  # fmt: skip
        assert load_image(Image.new(mode, (2, 2), color)).getpixel((0, 0)) == (level,) * 3


def test_dtype_that_the_device_lacks():
    with pytest.raises(HimapError, match=r"device 'cpu': not available for torch.float8_e4m3fn \(.+\); there is cpu"):
        find_device("cpu", torch.float8_e4m3fn)


def test_limits():
    """A limit under a name that no field has; sizes within their limits whose product is too large for a tensor."""
    kinds = LlavaConfig, VisionConfig, TextConfig, ImageProcessor
    names = {name for kind in kinds for name in kind.__dataclass_fields__}
    assert set(LIMITS) - {"int", "float"} <= names
    top, side = 2**19, 2**13
    text = TextConfig(top, top, top, 1, top, head_dim=top - 2)
    with torch.device("meta"):
        for patch in (1, side):
            Llava(LlavaConfig(VisionConfig(top, top, 1, 1, image_size=side, patch_size=patch), text))


def test_an_id_is_told_harmlessly(study, whole, tmp_path):
    """A terminal that obeys a question file: beside each question's error stands its id."""
    write_json(tmp_path / "questions.json", [ENTRY | {"id": "a\n\x1b[31m", "image": "no.png"}])
    words = "--questions", tmp_path / "questions.json", "--image-folder", tmp_path, "--weights", whole
    status, _, err = study(every_study, "evaluate", *words, "--out", tmp_path)
    assert status == 2 and r"a\n\x1b[31m: " in err and "\x1b[31m" not in err


def test_a_message_is_one_short_line():
    """A file that writes lines of its own, or colours, through a message that quotes it; a page of it."""
    error = HimapError("x.json: 'a\nb\r\x1b[31m\u2028\ud800\0' is wrong: do this")
    assert str(error) == r"x.json: 'a\nb\r\x1b[31m\u2028\ud800\x00' is wrong: do this"
    assert str(HimapError("café ▁ 猫")) == "café ▁ 猫"
    long = str(HimapError("start " + "x" * 10**6 + " end"))
    assert len(long) < 1100 and long.startswith("start x") and long.endswith("x end")
