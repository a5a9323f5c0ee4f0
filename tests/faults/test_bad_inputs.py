"""The table of bad inputs: what comes in, and the one line that answers it, exactly.

For every row: exit status 2, nothing on standard output, no traceback, nothing written. `...` in a line stands for the
words of a library, which change with its version.
"""

import copy
import importlib
import io
import json
import os
import pkgutil
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from toys import SMALL_CONFIG, join_safetensors, make_tokenizer, noise, split_safetensors, write_json, write_small_model

from himap_ref import HimapError, Llava, LlavaConfig, TextConfig, VisionConfig
from himap_ref.assistant import llava
from himap_ref.assistant.device import find_device
from himap_ref.assistant.picture import load_image
from himap_ref.checkpoint.config import LIMITS
from himap_ref.checkpoint.files import find_folder
from himap_ref.commands.files import check_writable, write_text, write_whole
from himap_ref.commands.manners import run_command
from himap_ref.commands.options import revision_of
from himap_ref.image import ImageProcessor
from himap_ref.studies.__main__ import studies
from himap_ref.studies.accuracy import evaluate
from himap_ref.studies.common.records import Records
from himap_ref.studies.weights.train import save_state

ROOT = Path(__file__).parents[2]
WEIGHTS, SHARD = "model.safetensors", "1.safetensors"
QUERY = "language_model.model.layers.0.self_attn.q_proj.weight"
OUTPUT = "language_model.model.layers.0.self_attn.o_proj.weight"
HEAD = "language_model.lm_head.weight"


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A whole folder of weights: 4 image tokens, 3 decoder layers, a context of 200."""
    write_small_model(folder := tmp_path_factory.mktemp("weights") / "whole")
    return folder


@pytest.fixture(autouse=True)
def no_hang():
    """To wait for ever, such as for the other side of a pipe, is one failure and not the end of all tests."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def ask(run, whole, tmp_path):
    """A question that works, unless the arguments change it: (arguments) -> (status, output, errors)."""
    noise(40, 30).save(tmp_path / "whole.png")

    def call(*args):
        usual = ("--weights", whole, "--image", tmp_path / "whole.png", "--prompt", "Why?", "--max-new-tokens", 2)
        return run(*usual, *args)

    return call


SAID = re.compile(r"\Aweights   .*\npicture   .*\nmethod    .*\nquestion  .*\n")  # what is asked, said beforehand


def says(message, line):
    """Whether a line is this error, in which `...` stands for anything."""
    return re.fullmatch(re.escape(f"error: {message}").replace(re.escape("..."), ".*"), line)


@pytest.fixture
def refused(ask, tmp_path):
    """Asserts that arguments (after the usual ones) end as every row of the table must."""

    def check(message, *args):
        before = sorted(tmp_path.rglob("*"))
        status, out, err = ask(*args)
        assert err.endswith("\n") and says(message, SAID.sub("", err)[:-1]), err
        assert (status, out.strip()) == (2, "")
        assert sorted(tmp_path.rglob("*")) == before

    return check


def test_the_usual_question_works(ask):
    """Every row of the tables below refused for the same other reason."""
    status, out, err = ask()
    assert status == 0 and "image tokens 4 -> 2 -> 1" in err


# ---------------------------------------------------------------- pictures


def encoded(format: str) -> bytes:
    file = io.BytesIO()
    noise(64, 64).save(file, format)
    return file.getvalue()


def without_width(format: str, place: slice) -> bytes:
    data = bytearray(encoded(format))
    data[place] = bytes(len(data[place]))
    return bytes(data)


FORMATS = "expected AVIF, BMP, GIF, JPEG, JPEG2000, PNG, PPM, TIFF, WEBP"
PICTURES = {  # contents, and the reason
    "text": (b"not a picture", FORMATS),
    "empty": (b"", FORMATS),
    "truncated png": (encoded("PNG")[:2000], "..."),
    "truncated jpeg": (encoded("JPEG")[:900], "..."),
    "broken in the middle": (encoded("PNG")[:60] + bytes(90) + encoded("PNG")[150:], "..."),
    "decompression bomb": (b"P6 50000 50000 255\n", "Image size (2500000000 pixels) exceeds limit ..."),
    "bomb that Pillow lets in": (b"P6 12500 12500 255\n", "12500 x 12500 pixels: expected 1 to 150000000"),
    "width 0": (without_width("BMP", slice(18, 22)), FORMATS),
    "size 0": (b"P6 0 0 255\n", FORMATS),
    "PostScript, which is a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", FORMATS),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', FORMATS),
}


@pytest.mark.parametrize("data, reason", PICTURES.values(), ids=PICTURES)
def test_picture(refused, tmp_path, data, reason):
    (tmp_path / "x.png").write_bytes(data)
    refused(f"{tmp_path}/x.png: cannot be read as a picture ({reason})", "--image", tmp_path / "x.png")


@pytest.mark.parametrize("path, reason", [
    ("nowhere.png", "[Errno 2] No such file or directory: '{path}'"),
    (".", "[Errno 21] Is a directory: '{path}'"),
    ("/proc/self/mem", "[Errno 5] Input/output error"),  # which not even root can read
    ("link", "[Errno 40] Too many levels of symbolic links: '{path}'"),
    ("pipe", "a pipe or a device, not a file"),
    ("/dev/zero", "a pipe or a device, not a file"),
    ("locked.png", "[Errno 13] Permission denied: '{path}'"),
])  # fmt: skip
def test_picture_path(refused, tmp_path, path, reason):
    (tmp_path / "link").symlink_to(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "locked.png").write_bytes(encoded("PNG"))
    (tmp_path / "locked.png").chmod(0)
    path = tmp_path / path
    if path.name == "locked.png" and os.access(path, os.R_OK):
        pytest.skip("root reads every file")
    refused(f"{path}: cannot be read as a picture ({reason.format(path=path)})", "--image", path)


@pytest.mark.parametrize("width, height, pad", [
    (1, 400_000, []), (1, 40_000, ["--pad"]), (1, 200_000, []), (200_000, 1, []),
])  # fmt: skip
def test_narrow_picture(refused, tmp_path, width, height, pad):
    """Blown up to 28 x 11 million pixels, or padded to 1.6 gigapixels."""
    (tmp_path / "x.pgm").write_bytes(b"P5 %d %d 255\n" % (width, height) + bytes(width * height))
    message = f"a picture of {width} x {height} pixels is too narrow: crop it first"
    refused(message, "--image", tmp_path / "x.pgm", *pad)


def test_memory_is_bounded_by_the_file(tmp_path):
    """A chunk that says of itself that it has 4 GB: as much memory asked for."""
    data = encoded("PNG")
    (tmp_path / "x.png").write_bytes(data[:33] + b"\xff\xff\xff\xffIDAT" + data[41:])
    done = python(
        "import resource; from pathlib import Path; from himap_ref.assistant.picture import load_image\n"
        "pages = int(Path('/proc/self/statm').read_text().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30,) * 2)\n"
        "print(load_image('x.png').size)", cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout == "(64, 64)\n", done.stderr


def test_pictures_in_memory():
    """The same faults in a picture that a caller has opened or made: a traceback, or black for 8-bit levels."""
    opened = Image.open(io.BytesIO(PICTURES["truncated png"][0]))
    for image in (opened, Image.new("RGB", (0, 5)), Image.new("RGB", (5, 0))):
        with pytest.raises(HimapError, match="cannot be read as a picture"):
            load_image(image)
    assert load_image(Image.new("La", (2, 2), (90, 255))).getpixel((0, 0)) == (90, 90, 90)
    assert load_image(Image.new("RGBa", (2, 2), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(Image.new("I", (2, 2), 200)).getpixel((0, 0)) == (200, 200, 200)
    assert load_image(Image.new("I", (2, 2), 200 * 256)).getpixel((0, 0)) == (200, 200, 200)


# ---------------------------------------------------------------- prompts and arguments

SCORES = "text_to_image, image_to_image, ... or module:function"
TEMPLATE = ": it must hold <image> once and, after it, {question}, or be a name: vicuna_v1, llava-hf, llama-3, ..."
NINES = "9" * 5000  # more digits than Python makes a number of
UNICODE = "the prompt cannot be tokenised: is it valid Unicode? (...)"
KEEP = "expected a count of at least 1 or a share in (0, 1]"
ARGUMENTS = [
    (["--prompt", ""], "the prompt is empty: ask something"),
    (["--prompt", " \n"], "the prompt is empty: ask something"),
    (["--prompt", " ", "--image", "none"], "the prompt is empty: ask something"),
    (["--prompt", "what \ud800?"], UNICODE),
    (["--prompt", "caf\udce9"], UNICODE),  # a byte that is no UTF-8, as Python hands it over
    (["--prompt", "word " * 300], "the prompt has 1313 tokens, the model's context 200: shorten the prompt"),
    (["--template", ""], f"template ''{TEMPLATE}"),
    (["--template", "vicuna"], f"template 'vicuna'{TEMPLATE}"),
    (["--template", "<image>"], f"template '<image>'{TEMPLATE}"),
    (["--template", "{question}<image>"], f"template '{{question}}<image>'{TEMPLATE}"),
    (["--template", "<image><image>{question}"], f"template '<image>...{{question}}'{TEMPLATE}"),
    (["--template", "<image>{question}{answer}"], f"template '<image>...{{answer}}'{TEMPLATE}"),
    (["--stages", ""], "stages: none are given: expected LAYER:KEEP:SCORE,...; to prune nothing: --method none"),
    (["--stages", " \n"], "stages: none are given: expected LAYER:KEEP:SCORE,...; to prune nothing: --method none"),
    (["--stages", ","], "stage '': expected LAYER:KEEP:SCORE, such as 2:0.5:text_to_image"),
    (["--stages", "99:0.5:text_to_image"], "stage layer 99 does not exist: the decoder's layers are 0..2"),
    (["--stages", "3:0.5:text_to_image"], "stage layer 3 does not exist: the decoder's layers are 0..2"),
    (["--stages", "0:0.5:text_to_image"], "stage layer 0: expected a whole number from 1 (layer K-1 ranks)"),
    (["--stages", "2:1:random,1:1:random"], "stage layers [2, 1] must ascend, each layer once"),
    (["--stages", "1:1:random,1:1:random"], "stage layers [1, 1] must ascend, each layer once"),
    (["--stages", "1:0:random"], f"stage keep 0: {KEEP} (0 drops the whole picture: only with no score)"),
    (["--stages", "1:0.0:random"], f"stage keep 0.0: {KEEP} (0 drops the whole picture: only with no score)"),
    (["--stages", "1:-2:random"], f"stage keep -2: {KEEP}"),
    (["--stages", "1:1.5:random"], f"stage keep 1.5: {KEEP}"),
    (["--stages", "2:500:text_to_image"], "stage at layer 2 is to keep 500 image tokens, only 4 enter it"),
    (["--stages", "1:5:random"], "stage at layer 1 is to keep 5 image tokens, only 4 enter it"),
    (["--stages", "1:2:random,2:3:random"], "stage at layer 2 is to keep 3 image tokens, only 2 enter it"),
    (["--stages", "x:1:random"], "stage 'x:1:random': expected LAYER:KEEP:SCORE, such as 2:0.5:text_to_image"),
    (["--stages", "1:half:random"], "stage '1:half:random': expected LAYER:KEEP:SCORE, such as 2:0.5:text_to_image"),
    (["--stages", "1:nan:random"], "stage '1:nan:random': expected LAYER:KEEP:SCORE, such as 2:0.5:text_to_image"),
    (["--stages", "1:1e999:random"], "stage '1:1e999:random': expected LAYER:KEEP:SCORE, such as 2:0.5:text_to_image"),
    (["--stages", "1:1.e999:random"], f"stage keep inf: {KEEP}"),
    (["--stages", f"{NINES}:1:random"], "stage '999...:1:random': expected LAYER:KEEP:SCORE, such as ..."),
    (["--stages", f"1:1:random{NINES}"], f"score 'random999...' is unknown: expected {SCORES}"),
    (["--stages", "2"], "stage '2': expected LAYER:KEEP:SCORE, such as 2:0.5:text_to_image"),
    (["--stages", "2:0.5:"], f"score '' is unknown: expected {SCORES}"),
    (["--stages", "2::text_to_image"], "stage '2::text_to_image': expected LAYER:KEEP:SCORE, such as ..."),
    (["--stages", "1:0.5"], "stage '1:0.5': expected LAYER:KEEP:SCORE, such as 2:0.5:text_to_image"),
    (["--stages", "1:1:random,"], "stage '': expected LAYER:KEEP:SCORE, such as 2:0.5:text_to_image"),
    (["--stages", "1:1:nonsense"], f"score 'nonsense' is unknown: expected {SCORES}"),
    (["--stages", "1:1:none"], "stage score None: expected a function from LayerView to (B, N) scores"),
    (["--method", "nonsense"], "method 'nonsense' is unknown: expected ..., cls:TOKENS, pool:SIDE or stages"),
    (["--method", ""], "method '' is unknown: expected ..., cls:TOKENS, pool:SIDE or stages"),
    (["--method", "himap-paper"], "method 'himap-paper' does not fit this model (stage layer 8 does not exist: the "
     "decoder's layers are 0..2): choose ... none or own stages"),
    (["--method", "cls:0"], "cls:0: the picture has 4 image tokens: keep 1 to 4"),
    (["--method", "cls:x"], "method 'cls:x': expected cls:NUMBER, such as cls:9"),
    (["--method", f"cls:{NINES}"], "method 'cls:999...': expected cls:NUMBER, such as cls:9"),
    (["--method", f"random{NINES}"], "method 'random999...' is unknown: expected ..., cls:TOKENS, pool:SIDE or stages"),
    (["--method", "pool:3"], "pool:3: the picture has 2 x 2 image tokens: a side of 1 to 2"),
    (["--temperature", "-1"], "temperature -1.0: must be 0 (greedy) or more, and finite"),
    (["--temperature=-1e999"], "temperature -inf: must be 0 (greedy) or more, and finite"),
    (["--temperature", "1e999"], "temperature inf: must be 0 (greedy) or more, and finite"),
    (["--temperature", "nan"], "temperature nan: must be 0 (greedy) or more, and finite"),
    (["--top-p", "0"], "top_p 0.0: must be in (0, 1]"),
    (["--top-p", "1e999"], "top_p inf: must be in (0, 1]"),
    (["--top-p", "nan"], "top_p nan: must be in (0, 1]"),
    (["--max-new-tokens", "0"], "max_new_tokens 0: must be a whole number of at least 1"),
    (["--seed", str(2**64)], f"seed {2**64}: must be in [0, 2^63)"),
    (["--seed", "-1"], "seed -1: must be in [0, 2^63)"),
    (["--device", ""], "device '': not available for torch.bfloat16 (...); there is cpu..."),
    (["--device", "cuda:99"], "device 'cuda:99': not available for torch.bfloat16 (...); there is cpu..."),
    (["--device", "meta"], "device 'meta': not available for torch.bfloat16 (...); there is cpu..."),
    (["--device", "hpu"], "device 'hpu': not available for torch.bfloat16 (...); there is cpu..."),
    (["--device", "nonsense"], "device 'nonsense': not available for torch.bfloat16 (...); there is cpu..."),
    (["--weights", "/no/such"], "weights '/no/such': no such folder, hub id (owner/name) or short name "
     "(llava-1.5-7b, llava-1.5-13b)"),
    (["--weights", "x" * 300], f"weights '{'x' * 300}': no such folder, hub id (owner/name) or short name "
     "(llava-1.5-7b, llava-1.5-13b)"),
    (["--show", "no/such/x.png"], "--show no/such/x.png: needs a picture to draw on, and a .png file in a folder that "
     "exists"),
    (["--show", "x.zzz"], "--show x.zzz: needs a picture to draw on, and a .png file in a folder that exists"),
]  # fmt: skip


@pytest.mark.parametrize("args, message", ARGUMENTS, ids=lambda value: None if isinstance(value, str) else value[0])
def test_argument(refused, args, message):
    refused(message, *args)


@pytest.mark.parametrize("args", [
    ["--max-new-tokens", "1e3"], ["--max-new-tokens", NINES], ["--seed", "0.5"], ["--temperature", "warm"],
    ["--dtype", "int8"], ["--no-such-option"],
], ids=lambda args: args[-1][:10])  # fmt: skip
def test_what_is_no_number(ask, args):
    """A traceback out of the conversion. Python's own reader of arguments says how they are meant, then the error."""
    status, out, err = ask(*args)
    assert (status, out) == (2, "") and err.splitlines()[-1].startswith("run.py: error: ") and "Traceback" not in err


def test_revision_of_a_folder(refused, whole):
    """A commit asked for, and whatever lies in a folder of that name used: pinned to nothing."""
    refused(f"revision 'v1': '{whole}' is a folder, which has no other: leave it out", "--revision", "v1")


@pytest.mark.parametrize("prompt", ["What is <image>?", "<s></s><pad>", "a\0b", "{question} {} %s ${x}", "\u200b"])
def test_odd_prompts_are_text(ask, prompt):
    """A second picture, the end of the prompt, a format field or the end of a C string seen in what is only text."""
    assert ask("--prompt", prompt)[0] == 0


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
OWN_SCORES = [
    ("nowhere:f", "score 'nowhere:f' cannot be imported (ModuleNotFoundError: No module named 'nowhere')"),
    (":f", "score ':f' cannot be imported (ValueError: Empty module name)"),
    (".own:f", "score '.own:f' cannot be imported (TypeError: ...)"),
    ("own:nothing", "score 'own:nothing' cannot be imported (AttributeError: module 'own' has no attribute 'nothing')"),
    ("broken:f", "score 'broken:f' cannot be imported (SyntaxError: ...)"),
    ("fails:f", "score 'fails:f' cannot be imported (KeyError: 'x')"),
    ("own:value", "stage score 3: expected a function from LayerView to (B, N) scores"),
    ("own:fails", "score 'own:fails' failed at own.py, line 8 (ZeroDivisionError: division by zero)"),
    ("own:shape", "score 'shape' at layer 1 returned torch.float32 [1, 3], not (B, N) = [1, 4]"),
    ("own:complex", "score 'complex' at layer 1 returned torch.complex64 [1, 4], not (B, N) = [1, 4]"),
    ("own:number", "score 'number' at layer 1 returned int, not (B, N) = [1, 4]"),
    ("own:nan", "score 'nan' at layer 1 gave NaN or infinite values..."),
    ("own:infinite", "score 'infinite' at layer 1 gave NaN or infinite values..."),
    ("os:getcwd", "score 'os:getcwd' failed at ... (TypeError: ...)"),
]


@pytest.mark.parametrize("name, message", OWN_SCORES, ids=[name for name, _ in OWN_SCORES])
def test_score_of_ones_own(refused, tmp_path, monkeypatch, name, message):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for module in ("own", "broken", "fails"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    for module, text in {"own": OWN, "broken": "def f(:", "fails": "{}['x']"}.items():
        (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    refused(message, "--stages", f"1:2:{name}")


def test_no_text_after_the_image(refused, folder):
    """Stage 1 has no rows to rank by: here the tokenizer swallows every word."""
    edit_json(folder / "tokenizer.json", normalizer={"type": "Replace", "pattern": {"Regex": r"[\s\S]"}, "content": ""})
    refused("no text follows the image: stages need text rows after it to rank by", "--weights", folder)


# ---------------------------------------------------------------- weights folders


def edit_json(path, **changes):
    write_json(path, {**json.loads(path.read_bytes()), **changes})


def edit_tensors(change):
    """A damage: change(header, body) -> None, or the file's whole new contents."""

    def damage(folder):
        header, body = split_safetensors((folder / WEIGHTS).read_bytes())
        del header["__metadata__"]  # which is no tensor
        data = change(header, body)
        (folder / WEIGHTS).write_bytes(data if isinstance(data, bytes) else join_safetensors(header, body))

    return damage


def fill(name, value):
    """A damage: a whole tensor of one value."""

    def change(header, body):
        start, stop = header[name]["data_offsets"]
        return join_safetensors(header, body[:start] + struct.pack("<f", value) * ((stop - start) // 4) + body[stop:])

    return edit_tensors(change)


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def index(weight_map):
    def damage(folder):
        write(f"{WEIGHTS}.index.json", json.dumps({"weight_map": weight_map}))(folder)
        (folder / WEIGHTS).rename(folder / SHARD)  # beside which an index would not be read

    return damage


def remove(name):
    return lambda folder: (folder / name).unlink()


def in_place(name, make):
    """A damage: something else under a file's name."""

    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def shard_that_is_a_pipe(folder):
    index({QUERY: SHARD, "b": "2.safetensors"})(folder)
    os.mkfifo(folder / "2.safetensors")


def tensors_in_two_shards(folder):
    """Two that the index names, and all others, which it does not."""
    index({QUERY: SHARD, OUTPUT: "zzz.safetensors"})(folder)
    shutil.copy(folder / SHARD, folder / "zzz.safetensors")


def two_models(folder):
    (folder / WEIGHTS).rename(folder / "b.safetensors")
    shutil.copy(folder / "b.safetensors", folder / "a.safetensors")


def shards_without_index(folder):
    (folder / WEIGHTS).rename(folder / "model-00002-of-00002.safetensors")


def projector_alone(folder):
    (folder / WEIGHTS).unlink()
    (folder / "mm_projector.bin").write_bytes(b"cos")


def cut(folder):
    os.truncate(folder / WEIGHTS, 5000)


def without_added_tokens(folder):
    edit_json(folder / "tokenizer.json", added_tokens=[])


def post_processor_of_another(folder):
    data = json.loads((folder / "tokenizer.json").read_bytes())
    data["post_processor"]["single"][0]["SpecialToken"]["id"] = "0"
    write_json(folder / "tokenizer.json", data)


def foreign_tokenizer(folder):
    """Whose tokens for "?" and the like lie beyond the weights' vocabulary."""
    data = json.loads((folder / "tokenizer.json").read_bytes())
    data["model"]["vocab"]["?"] = 502
    write_json(folder / "tokenizer.json", data)


def link(name, target):
    return in_place(name, lambda path: path.symlink_to(target))


def pickle(name):
    return lambda folder: (folder / WEIGHTS).rename(folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")


def image_processor_a_list(folder):
    (folder / "preprocessor_config.json").unlink()
    write_json(folder / "processor_config.json", {"image_processor": [1]})


def as_fp8(header, body):
    """A tensor stored in a byte a number, the others moved up: a file without a fault but that dtype."""
    start, stop = header[QUERY]["data_offsets"]
    count = (stop - start) // 4
    for entry in header.values():
        entry["data_offsets"] = [place - (stop - start - count) * (place >= stop) for place in entry["data_offsets"]]
    header[QUERY] |= {"dtype": "F8_E4M3", "data_offsets": [start, start + count]}
    return join_safetensors(header, body[:start] + bytes(count) + body[stop:])


def without_last(header, body):
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    end = header.pop(last)["data_offsets"][0]
    return join_safetensors(header, body[:end])


WORDS = {  # that stand in braces below
    "config": "{folder}/config.json: cannot be read as JSON",
    "tokenizer": "{folder}/tokenizer.json: not a readable tokenizer",
    "file": "{folder}/model.safetensors",
    "unreadable": "{folder}/model.safetensors: not a readable safetensors file",
    "index": "{folder}/model.safetensors.index.json",
    "query": QUERY,
    "head": HEAD,
    "scores": SCORES,
    "none": "{folder}: no .safetensors file (a repository of .bin files must be converted first)",
    "pickle": "is a pickle, which can run code when it is read; convert it to safetensors first (transformers: "
    "from_pretrained(....).save_pretrained(folder)) or use a llava-hf repository",
    "kinds": "not floats of 16 bits or more: quantised weights are not read: use the repository without quantisation, "
    "or save them dequantised",
    "nan": "score 'text_to_image' at layer 1 gave NaN or infinite values...",
    "logits": "the model's logits are NaN or infinite: damaged weights, or a dtype too narrow for them",
    "foreign": "the tokenizer gives id 502, the weights know 502: not of one model",
    "no_image": "the tokenizer has no added token 3 (image_token_index): add <image> to it",
}
FOLDERS = {  # what is wrong: (damage, line)
    "no config.json": (remove("config.json"), "{config} ([Errno 2] No such file ...)"),
    "config.json a folder": (in_place("config.json", Path.mkdir), "{config} ([Errno 21] Is a directory: ...)"),
    "config.json unreadable": (link("config.json", "/proc/self/mem"), "{config} ([Errno 5] Input/output error)"),
    "config.json endless": (link("config.json", "/dev/zero"), "{config} (...)"),
    "config.json a pipe": (in_place("config.json", os.mkfifo), "{config} (a pipe or a device, not a file)"),
    "config.json cut": (write("config.json", '{"model_ty'), "{config} (Unterminated string ...)"),
    "config.json a list": (write("config.json", "[]"), "{folder}/config.json: expected a JSON object"),
    "config.json null": (write("config.json", "null"), "{folder}/config.json: expected a JSON object"),
    "config.json binary": (write("config.json", b"\xff\xfe\x00"), "{config} (...)"),
    "config.json too deep": (write("config.json", "[" * 100_000), "{config} (...recursion...)"),
    "no tokenizer": (remove("tokenizer.json"), "{tokenizer} ([Errno 2] No such file ...)"),
    "tokenizer a pipe": (in_place("tokenizer.json", os.mkfifo), "{tokenizer} (a pipe or a device, not a file)"),
    "tokenizer endless": (link("tokenizer.json", "/dev/zero"), "{tokenizer} (a pipe or a device, not a file)"),
    "tokenizer is none": (write("tokenizer.json", "{}"), "{tokenizer} (...)"),
    "tokenizer binary": (write("tokenizer.json", b"\xff"), "{tokenizer} (...)"),
    "tokenizer without <image>": (without_added_tokens, "{no_image}"),
    "tokenizer of another model": (foreign_tokenizer, "{foreign}"),
    "no weights": (remove(WEIGHTS), "{none}"),
    "weights a folder": (in_place(WEIGHTS, Path.mkdir), "{none}"),
    "weights a pipe": (in_place(WEIGHTS, os.mkfifo), "{none}"),
    "pickle under another name": (write(WEIGHTS, b"cos\nsystem\n(S'exit 1'\ntR."), "{unreadable} (...)"),
    "pickle": (pickle("pytorch_model.bin"), "{folder}: pytorch_model.bin {pickle}"),
    "pickle .pt": (pickle("model.pt"), "{folder}: model.pt {pickle}"),
    "pickle .pth": (pickle("consolidated.00.pth"), "{folder}: consolidated.00.pth {pickle}"),
    "cut": (cut, "{unreadable} (...)"),
    "empty": (write(WEIGHTS, b""), "{unreadable} (...)"),
    "a Git LFS pointer": (write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), "{unreadable} (...)"),
    "header longer than the file": (write(WEIGHTS, struct.pack("<Q", 2**40) + b"{}"), "{unreadable} (...)"),
    "overlapping offsets": (
        edit_tensors(lambda header, _: header[OUTPUT].update(data_offsets=header[QUERY]["data_offsets"])),
        "{unreadable} (...invalid offset...)",
    ),
    "offsets beyond the file": (
        edit_tensors(lambda header, _: header[OUTPUT].update(data_offsets=[2**40, 2**40 + 256])), "{unreadable} (...)"
    ),
    "bytes behind the last tensor": (
        edit_tensors(lambda header, body: join_safetensors(header, body + b"more")), "{unreadable} (...)"
    ),
    "wrong shape": (
        edit_tensors(lambda header, _: header[QUERY].update(shape=[4, 16])),
        "{file}: tensor '{query}' has shape [4, 16], config.json asks for [8, 8]",
    ),
    "transposed": (
        edit_tensors(lambda header, _: header[HEAD]["shape"].reverse()),
        "{file}: tensor '{head}' has shape [8, 502], config.json asks for [502, 8]",
    ),
    "integers": (
        edit_tensors(lambda header, _: header[QUERY].update(dtype="I32")), "{file}: tensor '{query}' holds I32, {kinds}"
    ),
    "fp8 without its scales": (edit_tensors(as_fp8), "{file}: tensor '{query}' holds F8_E4M3, {kinds}"),
    "NaN": (fill(QUERY, float("nan")), "{nan}"),
    "infinite": (fill(QUERY, float("inf")), "{nan}"),
    "NaN where no score sees it": (fill(HEAD, float("nan")), "{logits}"),
    "numbers too large for the dtype": (fill(HEAD, 3.4e38), "{logits}"),
    "a tensor missing": (
        edit_tensors(without_last), "{folder}: tensor ... is missing (1 in all): not a complete LLaVA"
    ),
    "a tensor of another name": (
        edit_tensors(lambda header, _: header.update({"\n\x1b[31mx.y": header.pop(QUERY)})),
        "{file}: tensor '\\n\\x1b[31mx.y' is unexpected: config.json describes no such part",
    ),
    "a layer number that is no number": (
        edit_tensors(lambda header, _: header.update({"vision_tower.layers.\xb2.x": header.pop(QUERY)})),
        "{file}: tensor 'vision_tower.layers.\xb2.x' is unexpected: config.json describes no such part",
    ),
    "two models": (
        two_models, "{folder}: a.safetensors or b.safetensors? Rename what is the model to model.safetensors"
    ),
    "shards without an index": (
        shards_without_index, "{folder}: shard model-00001-of-00002.safetensors is missing: download it again"
    ),
    "a projector alone": (
        projector_alone, "{folder}: holds a projector alone, in mm_projector.bin: a whole LLaVA is needed"
    ),
    "an adapter": (
        write("adapter_config.json", "{}"), "{folder}: adapter_config.json: a LoRA adapter, which is not applied here: "
        "merge it into its model (peft: merge_and_unload, then save_pretrained), or remove that file where this is done"
    ),
    "a tensor in two shards": (tensors_in_two_shards, "{folder}/zzz.safetensors: tensor ... appears twice"),
    "a shard that is a pipe": (shard_that_is_a_pipe, "{folder}: shard 2.safetensors is missing: download it again"),
    "index ../": (index({"a": "../x.safetensors"}), "{index}: shard '../x.safetensors' lies outside the folder"),
    "index absolute": (index({"a": "/x.safetensors"}), "{index}: shard '/x.safetensors' lies outside the folder"),
    "index sub/": (index({"a": f"sub/{WEIGHTS}"}), "{index}: shard 'sub/model.safetensors' lies outside the folder"),
    "index ..": (index({"a": ".."}), "{folder}: shard .. is missing: download it again"),
    "index with a NUL": (index({"a": "a\0b"}), "{folder}: shard a\\x00b is missing: download it again"),
    "index with a long name": (index({"a": "x" * 300}), "{folder}: shard x... is missing: download it again"),
    "index of a missing shard": (
        index({"a": SHARD, "b": "2.safetensors"}), "{folder}: shard 2.safetensors is missing: download it again"
    ),
    "index without a map": (index(None), "{index}: not a shard index (no weight_map)"),
    "index of a list": (index([]), "{index}: not a shard index (no weight_map)"),
    "index of nulls": (index({"a": None}), "{index}: not a shard index (no weight_map)"),
    "index of numbers": (index({"a": 1}), "{index}: not a shard index (no weight_map)"),
    "index of nothing": (index({}), "{index}: not a shard index (no weight_map)"),
    "index of what is not there": (
        index({"a": SHARD}), "{folder}/1.safetensors: tensor 'a' is not in it, though the index says so: download both "
        "again"
    ),
    "eos of another type": (
        lambda folder: edit_json(folder / "generation_config.json", eos_token_id={"x": 1}),
        "{folder}/generation_config.json: eos_token_id {{'x': 1}}: expected an id or a list of ids",
    ),
    "eos list of text": (
        lambda folder: edit_json(folder / "generation_config.json", eos_token_id=[1, "2"]),
        "{folder}/generation_config.json: eos_token_id [1, '2']: expected an id or a list of ids",
    ),
    "himap.json of another type": (
        lambda folder: edit_json(folder / "himap.json", template=5), "{folder}/himap.json: template is not text"
    ),
    "himap.json that would run code": (
        lambda folder: edit_json(folder / "himap.json", stages="1:0.5:os:getcwd"),
        "score 'os:getcwd' is unknown: expected {scores}",
    ),
    "himap.json with a palette of words": (
        lambda folder: edit_json(folder / "himap.json", palette="red blue"),
        "palette 'red blue': expected colours such as #de2020, with spaces between them",
    ),
    "image_processor a list": (image_processor_a_list, "image_processor [1]: expected a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("damage, message", FOLDERS.values(), ids=FOLDERS)
def test_folder(refused, folder, damage, message):
    damage(folder)
    refused(message.format(**{name: text.format(folder=folder) for name, text in WORDS.items()}, folder=folder),
            "--weights", folder)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_tokenizer_that_panics(ask, folder):
    """A panic in Rust is no Exception: a traceback. The library itself writes its own lines to standard error."""
    post_processor_of_another(folder)
    status, out, err = ask("--weights", folder)
    assert (status, out) == (2, "")
    assert err.endswith(f"error: {folder}/tokenizer.json: not a readable tokenizer (no entry found for key)\n")


SIZE = "expected int, 1 to 524288"
CONFIGS = [  # section, its entry, the value, the line
    ("text_config", "num_attention_heads", 0, f"TextConfig.num_attention_heads 0: {SIZE}"),
    ("text_config", "num_attention_heads", 3, "hidden_size 8, 3 heads of 2.66667: RoPE needs an even size"),
    ("text_config", "head_dim", 3, "hidden_size 8, 2 heads of 3: RoPE needs an even size"),
    ("text_config", "num_key_value_heads", 3, "2 attention heads do not divide into 3 key/value heads"),
    ("text_config", "num_key_value_heads", 0, "TextConfig.num_key_value_heads 0: expected int, 1 to 524288"),
    ("text_config", "hidden_size", None, f"TextConfig.hidden_size None: {SIZE}"),
    ("text_config", "hidden_size", True, f"TextConfig.hidden_size True: {SIZE}"),
    ("text_config", "hidden_size", 8.0, f"TextConfig.hidden_size 8.0: {SIZE}"),
    ("text_config", "hidden_size", "8", f"TextConfig.hidden_size '8': {SIZE}"),
    ("text_config", "hidden_size", [8] * 99, f"TextConfig.hidden_size [8, 8, 8, 8, 8, 8, ....]: {SIZE}"),
    ("text_config", "hidden_size", 2**62, f"TextConfig.hidden_size {2**62}: {SIZE}"),
    ("text_config", "num_hidden_layers", 10**9, "TextConfig.num_hidden_layers 1000000000: expected int, 1 to 1000"),
    ("text_config", "vocab_size", 100, f"{{folder}}/model.safetensors: tensor '{HEAD}' has shape [502, 8], config.json "
     "asks for [100, 8]"),
    ("text_config", "max_position_embeddings", 0, "TextConfig.max_position_embeddings 0: expected int, 1 to ..."),
    ("text_config", "rms_norm_eps", "1e-5", "TextConfig.rms_norm_eps '1e-5': expected float, 1e-12 to 1e+12"),
    ("text_config", "rms_norm_eps", float("nan"), "TextConfig.rms_norm_eps nan: expected float, 1e-12 to 1e+12"),
    ("text_config", "attention_bias", 1, "TextConfig.attention_bias 1: expected bool"),
    ("text_config", "hidden_act", "gelu", "TextConfig.hidden_act 'gelu': expected Literal['silu']"),
    ("text_config", "model_type", "mistral", "text_config.model_type 'mistral' is not supported: expected 'llama'"),
    ("text_config", "rope_parameters", "yarn", "rope_parameters 'yarn': expected a JSON object"),
    ("text_config", "rope_parameters", {"rope_type": "yarn"}, "RoPE of type 'yarn' is not supported: ..."),
    ("vision_config", "patch_size", 0, f"VisionConfig.patch_size 0: {SIZE}"),
    ("vision_config", "num_attention_heads", 0, f"VisionConfig.num_attention_heads 0: {SIZE}"),
    ("vision_config", "num_attention_heads", 3, "3 heads, hidden size 8, image 28, patch 14: the encoder's sizes do "
     "not divide"),
    ("vision_config", "image_size", 10, "2 heads, hidden size 8, image 10, patch 14: the encoder's sizes do not "
     "divide"),
    ("vision_config", "image_size", 2**30, "VisionConfig.image_size 1073741824: expected int, 1 to 8192"),
    ("vision_config", "num_channels", 4, "VisionConfig.num_channels 4: expected int, 3 to 3"),
    ("vision_config", "hidden_act", "relu", "VisionConfig.hidden_act 'relu': expected Literal['quick_gelu', 'gelu']"),
    ("vision_config", "model_type", "siglip_vision_model", "vision_config.model_type 'siglip_vision_model' is not "
     "supported: expected 'clip_vision_model'"),
    (None, "model_type", "qwen2_vl", "model_type 'qwen2_vl' is not supported: expected 'llava'"),
    (None, "model_type", "llava_next", "model_type 'llava_next' is not supported: expected 'llava'"),
    (None, "model_type", ["llava"], "model_type ['llava'] is not supported: expected 'llava'"),
    (None, "text_config", "x", "text_config 'x': expected a JSON object"),
    (None, "vision_config", [], "vision_config []: expected a JSON object"),
    (None, "vision_config", {}, "{folder}: the image processor does not make pictures of 224 pixels a side"),
    (None, "image_token_index", None, "LlavaConfig.image_token_index None: expected int, 0 to ..."),
    (None, "image_token_index", "3", "LlavaConfig.image_token_index '3': expected int, 0 to ..."),
    (None, "image_token_index", -3, "LlavaConfig.image_token_index -3: expected int, 0 to ..."),
    (None, "image_token_index", 36, "the tokenizer has no added token 36 (image_token_index): ..."),  # it is "A"
    (None, "image_token_index", 400, "the tokenizer has no added token 400 (image_token_index): ..."),
    (None, "image_token_index", 10**6, "the tokenizer has no added token 1000000 (image_token_index): ..."),
    (None, "vision_feature_layer", 3, "vision_feature_layer 3: expected indices into 3 states"),
    (None, "vision_feature_layer", -4, "vision_feature_layer -4: expected indices into 3 states"),
    (None, "vision_feature_layer", [-2, -5], "vision_feature_layer (-2, -5): expected indices into 3 states"),
    (None, "vision_feature_select_strategy", "cls", "LlavaConfig.vision_feature_select_strategy 'cls': expected "
     "Literal['default', 'full']"),
    (None, "projector_hidden_act", 5, "LlavaConfig.projector_hidden_act 5: expected Literal['gelu', 'quick_gelu']"),
    (None, "projector_hidden_act", "tanh", "LlavaConfig.projector_hidden_act 'tanh': expected Literal['gelu', ...]"),
    (None, "projector_type", "resampler", "LlavaConfig.projector_type 'resampler': expected Literal[...]"),
]  # fmt: skip


@pytest.mark.parametrize("section, name, value, message", CONFIGS, ids=[f"{n}={v!s:.20}" for _, n, v, _ in CONFIGS])
def test_config(refused, folder, section, name, value, message):
    data = copy.deepcopy(SMALL_CONFIG)
    (data[section] if section else data)[name] = value
    write_json(folder / "config.json", data)
    refused(message.format(folder=folder), "--weights", folder)


PAIR = "expected tuple[int, int] | None, 1 to 8192"
TRIPLE = "expected tuple[float, float, float]"
PREPROCESSORS = [  # entry, the value, the line
    ("crop_size", {"shortest_edge": 28}, f"ImageProcessor.crop_size (None, None): {PAIR}"),
    ("crop_size", 336, "{folder}: the image processor does not make pictures of 28 pixels a side"),
    ("size", {}, f"ImageProcessor.size (None, None): {PAIR}"),
    ("size", {"longest_edge": 28}, f"ImageProcessor.size (None, None): {PAIR}"),
    ("size", {"shortest_edge": 28, "longest_edge": 56},
     "image processor: size with a longest_edge beside shortest_edge is not supported: remove it"),
    ("size", {"height": 28}, f"ImageProcessor.size (28, None): {PAIR}"),
    ("size", 0, "ImageProcessor.shortest_edge 0: expected int | None, 1 to 8192"),
    ("size", 10**9, "ImageProcessor.shortest_edge 1000000000: expected int | None, 1 to 8192"),
    ("size", True, "ImageProcessor.shortest_edge True: expected int | None, 1 to 8192"),
    ("resample", 17, "ImageProcessor.resample 17: expected int, 0 to 5"),
    ("resample", "bicubic", "ImageProcessor.resample 'bicubic': expected int, 0 to 5"),
    ("rescale_factor", float("nan"), "ImageProcessor.rescale_factor nan: expected float, 1e-12 to 1e+12"),
    ("image_mean", [0.5], f"ImageProcessor.image_mean (0.5,): {TRIPLE}, -1000 to 1000"),
    ("image_mean", 0.5, f"ImageProcessor.image_mean 0.5: {TRIPLE}, -1000 to 1000"),
    ("image_std", [0, 1, 1], f"ImageProcessor.image_std (0, 1, 1): {TRIPLE}, 1e-06 to 1e+06"),
    ("do_resize", "no", "image processor: do_resize is neither true nor false"),
    ("do_center_crop", False, "{folder}: the image processor does not make pictures of 28 pixels a side"),
]  # fmt: skip


@pytest.mark.parametrize("name, value, message", PREPROCESSORS, ids=[f"{n}={v!s:.20}" for n, v, _ in PREPROCESSORS])
def test_preprocessor(refused, folder, name, value, message):
    edit_json(folder / "preprocessor_config.json", **{name: value})
    refused(message.format(folder=folder), "--weights", folder)


def test_null_stands_for_what_is_not_said(folder):
    """A null in a preprocessor's file taken for a size or a mean."""
    usual = Llava.from_pretrained(folder).image_processor
    names = ("size", "crop_size", "resample", "do_resize", "do_pad", "rescale_factor")
    edit_json(folder / "preprocessor_config.json", **dict.fromkeys(names))
    assert Llava.from_pretrained(folder).image_processor == usual
    os.remove(folder / "preprocessor_config.json")
    write_json(folder / "processor_config.json", {"image_processor": None})
    processor = Llava.from_pretrained(folder).image_processor
    assert processor == ImageProcessor(shortest_edge=28, crop_size=(28, 28))


def test_limits():
    """A limit under a name that no field has; sizes within their limits whose product is too large for a tensor."""
    kinds = LlavaConfig, VisionConfig, TextConfig, ImageProcessor
    names = {name for kind in kinds for name in kind.__dataclass_fields__}
    assert set(LIMITS) - {"int", "float"} <= names
    top, layers = 2**19, 1
    vision = VisionConfig(top, top, layers, 1, image_size=2**13, patch_size=1)
    patches = VisionConfig(top, top, layers, 1, image_size=2**13, patch_size=2**13)
    text = TextConfig(top, top, top, layers, top, head_dim=top - 2)
    with torch.device("meta"):
        for config in (LlavaConfig(vision, text), LlavaConfig(patches, text)):
            Llava(config)


# ---------------------------------------------------------------- studies


@pytest.fixture
def evaluated(study, whole):
    """Arguments of the evaluation -> (exit status, standard output, standard error)."""
    return lambda *args: study(evaluate, "--weights", whole, "--max-new-tokens", 1, *args)


ENTRY = {"id": 1, "image": "b.png", "text": "Why?", "label": "x"}
LIST = "{file}: expected a JSON list, or one JSON object a line"
OUT = "leads out of the image folder: choose a folder that it is in"
NONE = "no question could be asked; the first: "
NO_PATH = "is not a path: correct it, or remove the entry"
QUESTIONS = {  # what is wrong: (the file's contents, or its entries, line)
    "empty": ("", "{file}: holds no questions"),
    "no entries": ([], "{file}: holds no questions"),
    "cut": ("[1", LIST + " (...)"),
    "binary": ("\xff", LIST + " (...)"),
    "too deep": ("[" * 100_000, LIST + " (...recursion...)"),
    "no question": ([ENTRY | {"text": " "}], "{file}: entry 1: no question: expected text, found blank text: ..."),
    "answers that contradict": (
        [ENTRY, ENTRY | {"label": "y"}],
        "{file}: entry 2: id '1' asks this a second time with another answer: correct one of both",
    ),
    "several pictures": (
        [ENTRY | {"image": ["b.png", "b.png"]}],
        "{file}: none of 1 questions can be asked: several pictures in one entry: the model takes one",
    ),
    "picture at an address": (
        [ENTRY | {"image": "https://a.b/c.png"}],
        "{file}: entry 1: image 'https://a.b/c.png' is elsewhere: put it into the image folder, ...",
    ),
    "picture ../": ([ENTRY | {"image": "../b.png"}], "{file}: entry 1: image '../b.png' " + OUT),
    "picture absolute": ([ENTRY | {"image": "/b.png"}], "{file}: entry 1: image '/b.png' " + OUT),
    "link to no picture": ([ENTRY | {"image": "link"}], NONE + "{folder}/link: cannot be read as a picture (...)"),
    "picture a pipe": ([ENTRY | {"image": "pipe"}], NONE + "{folder}/pipe: cannot be read as a picture (a pipe ...)"),
    "picture the folder": ([ENTRY | {"image": "."}], NONE + "{folder}: cannot be read as a picture ([Errno 21] ...)"),
    "kind of two lines": (
        [ENTRY | {"category": "a\n\x1b[31m"}],
        "{file}: entry 1: `category`: expected a line of text, not 'a\\n\\x1b[31m'",
    ),
    "picture with a NUL": ([ENTRY | {"image": "a\0"}], "{file}: entry 1: image 'a\\x00' " + NO_PATH),
    "no such picture": ([ENTRY | {"image": "a.png"}], NONE + "{folder}/a.png: ..."),
    "half a letter": ([ENTRY | {"text": "a\ud800?"}], NONE + UNICODE),
}  # fmt: skip


@pytest.mark.parametrize("data, message", QUESTIONS.values(), ids=QUESTIONS)
def test_question_file(evaluated, tmp_path, data, message):
    folder, file = tmp_path / "pictures", tmp_path / "questions.json"
    folder.mkdir()
    noise(40, 30).save(folder / "b.png")
    (folder / "link").symlink_to("/etc/hostname")
    os.mkfifo(folder / "pipe")
    file.write_bytes((data if isinstance(data, str) else json.dumps(data)).encode("latin-1"))
    status, out, err = evaluated("--questions", file, "--image-folder", folder, "--out", tmp_path / "a.jsonl")
    line = err.splitlines()[-1]  # before it the bar of the questions that were tried
    assert says(message.format(file=file, folder=folder), line), err
    assert (status, out) == (2, "") and "Traceback" not in err


def test_an_id_is_told_harmlessly(evaluated, tmp_path):
    """A terminal that obeys a question file: beside each question's error stands its id."""
    write_json(tmp_path / "questions.json", [ENTRY | {"id": "a\n\x1b[31m", "image": "no.png"}])
    asked = "--questions", tmp_path / "questions.json", "--image-folder", tmp_path
    status, _, err = evaluated(*asked, "--out", tmp_path)
    assert status == 2 and r"a\n\x1b[31m: " in err and "\x1b[31m" not in err


STUDIES = [  # study, its arguments, line
    ("literature", ["--image", 0], "--system from 0, --image and --text from 1, together at most 2^20 tokens"),
    ("literature", ["--text", 10**30], "--system from 0, --image and --text from 1, together at most 2^20 tokens"),
    ("scenes", ["--seed", -1], "--seed -1: must be 0 or more"),
    ("scenes", ["--out", "x.zzz"], "x.zzz: this kind of file cannot be written: end its name in .png"),
    ("scenes", ["--out", "/dev/full/x.png"], "/dev/full/x.png: cannot be written (...): choose another file"),
    ("train", ["--lr", "nan"], "--lr: above 0 and at most 1; --steps and --align-steps: 0 to 1000000"),
    ("train", ["--steps", 10**30], "--lr: above 0 and at most 1; --steps and --align-steps: 0 to 1000000"),
    ("train", ["--seed", 2**63], f"--seed {2**63}: must be in [0, 2^63)"),
    ("train", ["--state", "junk"], "junk: no state of a training (...): remove it, or choose another --state"),
    ("train", ["--state", "pickle"], "pickle: no state of a training (...): remove it, or choose another --state"),
    ("flow", ["--show", "x.zzz"], "x.zzz: this kind of file cannot be written: end its name in .png"),
    ("flow", ["--scenes", 0], "0 scenes from seed ...: need at least 1, from a seed that is not negative"),
    ("disruption", ["--batch", 0], "--batch and --max-new-tokens: must be at least 1"),
    ("disruption", ["--layers", 10**30], f"layer {10**30} does not exist: the decoder's layers are 0..11"),
    ("bias", ["--schedule", "2"], "--schedule '2': expected K1:KEEP1,K2:KEEP2, such as 2:0.5,8:0.25"),
    ("sweep", ["--budgets", "nan"], "--budgets [nan]: expected shares of vanilla's FLOPs, above 0 and at most 1"),
    ("sweep", ["--methods", "himap", "x"], "method 'x' is unknown: expected ..., cls:TOKENS, pool:SIDE or stages"),
    ("bench", ["--methods", "none+cache"], "method 'none+cache': only +prefix and +reprune can be added to a method"),
    ("bench", ["--layers", 13], "--layers and --write: --shape must be 7b or 13b"),
    ("bench", ["--write", "x"], "--layers and --write: --shape must be 7b or 13b"),
    ("bench", ["--shape", "7b", "--layers", 0, "--write", "x"], "--layers 0: the decoder has 32"),
    ("bench", ["--shape", "7b", "--layers", 33, "--write", "x"], "--layers 33: the decoder has 32"),
    ("bench", ["--shape", "7b", "--layers", 1, "--write", "/dev/null/x"], "/dev/null/x: cannot be written (...)"),
    ("bench", ["--rounds", 0], "--rounds 0: must be at least 1"),
    ("bench", ["--new-tokens", 0], "--new-tokens 0: must be at least 1"),
    ("bench", ["--methods", "vwt"], "method 'vwt' is unknown: expected ..., cls:TOKENS, pool:SIDE or stages"),
    ("bench", ["--text-tokens", 390, "--new-tokens", 8, "--rounds", 1],
     "569 tokens and 8 new ones do not fit the model's context of 512"),
    ("bench", ["--shape", "nowhere"], "weights 'nowhere': no such folder, hub id (owner/name) or short name (...)"),
    ("evaluate", ["--limit", 0], "--limit 0: must be at least 1"),
    ("evaluate", ["--out", "/dev/full/x.jsonl"], "/dev/full/x.jsonl: cannot be written (...)"),
    ("evaluate", ["--revision", "v1"], "revision 'v1': '...' is a folder, which has no other: leave it out"),
    ("evaluate", ["--batch", 0], "--batch and --max-new-tokens: must be at least 1"),
    ("evaluate", ["--max-new-tokens", 0], "--batch and --max-new-tokens: must be at least 1"),
    ("evaluate", ["--method", "x"], "method 'x' is unknown: expected ..., cls:TOKENS, pool:SIDE or stages"),
    ("evaluate", ["--scenes", 1, "--metric", "pope"], "pope: the right answer of ... is '...', not yes or no: ..."),
    ("disruption", ["--max-new-tokens", 0], "--batch and --max-new-tokens: must be at least 1"),
    ("disruption", ["--layers", 12], "layer 12 does not exist: the decoder's layers are 0..11"),
    ("flow", ["--show", "junk/x.png"], "junk/x.png: cannot be written (...): choose another file"),
    ("flow", ["--show", "x"], "x: this kind of file cannot be written: end its name in .png"),
]  # fmt: skip


@pytest.mark.parametrize("name, args, message", STUDIES, ids=[f"{row[0]} {row[1][0]} {row[1][-1]}" for row in STUDIES])
def test_study_arguments(study, monkeypatch, tmp_path, name, args, message):
    """An option that nobody looks at before it is deep inside, after hours."""
    (tmp_path / "junk").write_bytes(b"junk")
    (tmp_path / "pickle").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    monkeypatch.chdir(tmp_path)
    status, out, err = study(importlib.import_module(f"himap_ref.studies.{studies()[name].parent.name}.{name}"), *args)
    assert err.endswith("\n") and says(message, err[:-1]), err
    assert (status, out) == (2, "")
    assert {path.name for path in tmp_path.iterdir()} == {"junk", "pickle"}


# ---------------------------------------------------------------- the hub

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """A hub with one repository, owner/name, that holds a config.json of 5000 bytes, and with one fault."""

    protocol_version = "HTTP/1.1"
    fault = ""
    asked = []  # paths
    ERRORS = {
        "missing": (404, "RepoNotFound", "Repository not found"),
        "gated": (403, "GatedRepo", "Access to model owner/name is restricted."),
        "no such revision": (404, "RevisionNotFound", "Revision Not Found"),
        "broken": (500, "", ""),
    }
    FILES = {"reaches out": "../../../../out.json", "absolute": "/tmp/himap-absolute.json", "pickle": "model.bin"}

    def log_message(self, *_):
        pass

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", "5000" if body.startswith(b"{ ") else str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            self.wfile.flush()

    def do_GET(self):
        self.asked.append(self.path)
        if self.fault in self.ERRORS:
            status, code, message = self.ERRORS[self.fault]
            self.answer(status, b"{}", X_Error_Code=code, X_Error_Message=message)
        elif self.fault == "drops":
            self.connection.close()
            self.close_connection = True
        elif "/tree/" in self.path:
            file = {"type": "file", "path": self.FILES.get(self.fault, "config.json"), "size": 5000, "oid": "a" * 40}
            self.answer(200, json.dumps([file]).encode(), Content_Type="application/json")
        elif "/api/" in self.path:
            name = self.FILES.get(self.fault, "config.json")
            data = {"id": "owner/name", "sha": SHA, "siblings": [{"rfilename": name}]}
            self.answer(200, json.dumps(data).encode(), Content_Type="application/json")
        else:
            length = 100 if self.fault == "interrupted" else 5000
            self.answer(200, f"{'{ ':{length - 1}}}}".encode(), ETag=f'"{"a" * 40}"', X_Repo_Commit=SHA)
            if self.fault == "interrupted" and self.command == "GET":
                self.connection.shutdown(2)
                self.close_connection = True

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The fake hub in the place of the real one; its fault is set as `hub.fault`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # whatever the environment says
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between the client's retries
    yield Hub
    Hub.fault = ""
    Hub.asked.clear()
    server.shutdown()
    server.server_close()


HUB = [
    ("unreachable", "..."),
    ("offline", "..."),
    ("missing", "404 Client Error. Repository Not Found for url: ..."),
    ("gated", "403 Client Error. Cannot access gated repo for url ..."),
    ("no such revision", "404 Client Error. Revision Not Found for url: ..."),
    ("broken", "..."),
    ("drops", "..."),
    ("interrupted", "..."),
]


@pytest.mark.parametrize("fault, reason", HUB, ids=[fault for fault, _ in HUB])
def test_hub(ask, hub, monkeypatch, fault, reason):
    """A page of the client's words, or the exception of the HTTP library that it has come to use."""
    hub.fault = fault
    if fault == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", fault == "offline")
    status, out, err = ask("--weights", "owner/name")
    *progress, line = err.splitlines()  # the client's own, of a download that had begun
    assert says(f"weights 'owner/name': no such folder here, nor can the hub's be downloaded ({reason})", line), err
    assert (status, out) == (2, "") and (fault == "interrupted" or not progress)


def test_interrupted_download_goes_on(hub):
    """Half a file taken for the whole one at the next start; another revision than was asked for, or an untold one."""
    hub.fault = "interrupted"
    with pytest.raises(HimapError):
        find_folder("owner/name")
    hub.fault = ""
    for revision in (None, SHA):
        folder = find_folder("owner/name", revision)
        assert revision_of(folder) == SHA and (folder / "config.json").stat().st_size == 5000
    assert revision_of(ROOT) is None


@pytest.mark.parametrize("fault", Hub.FILES)
def test_repository_of_other_files(hub, tmp_path, fault):
    """A repository that writes outside the cache, by what it calls its files; a pickle downloaded."""
    hub.fault = fault
    with suppress(HimapError):
        find_folder("owner/name")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"] and not Path(Hub.FILES["absolute"]).exists()
    assert not {Path(name).name for name in Hub.FILES.values()} & {path.name for path in tmp_path.rglob("*")}


def test_revision_is_asked_for(hub):
    """--revision taken, and the newest commit downloaded."""
    find_folder("owner/name", "v1")
    assert any("/revision/v1" in path for path in hub.asked) and not any("/main" in path for path in hub.asked)


def test_the_commit_is_told(ask, evaluated, whole, tmp_path):
    """Results that nobody can repeat, because the repository has moved on."""
    folder = shutil.copytree(whole, tmp_path / "snapshots" / SHA)  # as it lies in the hub's cache
    assert json.loads(ask("--json", "--weights", folder)[1])["revision"] == SHA
    assert evaluated("--weights", folder, "--scenes", 1, "--out", tmp_path / "a.jsonl")[0] == 0
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])["settings"]["revision"] == SHA


# ---------------------------------------------------------------- the machine


def python(code, *args, **options):
    """Runs Python code in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    options = {"env": env, "capture_output": True, "text": True} | options
    return subprocess.run([sys.executable, *(["-c", code] if code else []), *map(str, args)], check=False, **options)


def test_disk_full_for_the_answer(forked):
    """A traceback from the interpreter on its way out, when the little that was printed is really written."""
    done = forked("run.py", stdout=Path("/dev/full"))
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, "error: [Errno 28] No space left on device")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_closed_streams(forked, whole, tmp_path, closed):
    """A traceback where a service has closed one of them (Python then has None), or notes among the answers."""
    close = f"os.close({('stdout', 'stderr').index(closed) + 1}); sys.{closed} = sys.__{closed}__ = None"
    args = "--weights", whole, "--image", "none", "--prompt", "Why?", "--max-new-tokens", 2
    done = forked("run.py", *args, before=close, cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert ("FLOPs" in done.stderr, "FLOPs" in done.stdout) == (closed == "stdout", False)


def test_disk_full_for_the_notes(forked, whole):
    """A status of 1, as after a fault of ours, or 120."""
    args = "--weights", whole, "--image", "none", "--prompt", "Why?", "--max-new-tokens", 2
    assert forked("run.py", *args, stderr=Path("/dev/full")).returncode == 2


def test_terminal_that_lacks_a_letter(ask, monkeypatch):
    """A traceback in the middle of an answer, or of a study's table."""
    monkeypatch.setattr(llava.Stream, "__call__", lambda stream, token: stream.on_text("\u732b"))
    monkeypatch.setattr(llava.Stream, "finish", lambda stream: None)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert ask()[0] == 0
    assert terminal.buffer.getvalue() == b"\\u732b\\u732b\n"
    monkeypatch.setattr(sys, "stdout", terminal := io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    run_command(lambda: print("d\xb2"))
    assert terminal.buffer.getvalue() == b"d\\xb2\n"


@pytest.mark.parametrize("there_before", [True, False])
def test_disk_full_for_the_picture(forked, whole, tmp_path, there_before):
    """Half a picture, or the one that was there lost. A limit on a file's size, which root has to heed, too."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"
    picture, before = tmp_path / "x.png", encoded("PNG") if there_before else None
    (tmp_path / "asked.png").write_bytes(encoded("PNG"))
    if there_before:
        picture.write_bytes(before)
    args = "--weights", whole, "--image", tmp_path / "asked.png", "--prompt", "Why?", "--max-new-tokens", 1
    done = forked("run.py", *args, "--show", picture, before=limit)
    message = f"error: {picture}: cannot be written (File too large): choose another file"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, message)
    assert (picture.read_bytes() if there_before else None) == before
    assert {path.name for path in tmp_path.iterdir()} == {"asked.png"} | ({"x.png"} if there_before else set())


@pytest.mark.parametrize("there_before", [True, False])
def test_disk_full_for_a_table(tmp_path, there_before):
    """The same of what the studies write when they are done."""
    if there_before:
        (tmp_path / "table.json").write_text("old")

    def half(path):
        path.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(HimapError, match=r"table.json: cannot be written \(No space left on device\): choose another"):
        write_whole(tmp_path / "table.json", half)
    assert [path.read_text() for path in tmp_path.iterdir()] == (["old"] if there_before else [])


def test_disk_full_for_a_training(tmp_path):
    """torch's traceback, of a kind of its own, and the state of hours ago lost."""
    (tmp_path / "state.pt").write_text("old")
    (tmp_path / "state.new").symlink_to("/dev/full")
    with pytest.raises(HimapError, match=r"state.pt: cannot be written \(.+\)"):
        model = torch.nn.Linear(100, 100)
        model.tokenizer = make_tokenizer("byte-level")
        save_state(tmp_path / "state.pt", "align", 1, model, [])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("state.pt", "old")]


def test_results_do_not_follow_links(ask, tmp_path):
    """A link that an archive brought along: somebody's file written to under the name of our results."""
    for name in ("evaluate.jsonl", "table.json", "x.png", ".new-x.png"):
        (tmp_path / name).symlink_to(tmp_path / "profile")
    with pytest.raises(HimapError, match="evaluate.jsonl: cannot be written"):
        Records(tmp_path / "evaluate.jsonl", {})
    write_text(tmp_path / "table.json", "{}")
    check_writable(tmp_path / "x.png")
    assert ask("--show", tmp_path / "x.png")[0] == 0
    assert not (tmp_path / "profile").exists()
    assert not (tmp_path / "table.json").is_symlink() and Image.open(tmp_path / "x.png").format == "PNG"


def test_the_current_folder_runs_nothing(tmp_path):
    """`python run.py --weights .` in somebody's folder: Pillow tries to import what it can do without, and finds it."""
    score = "def score(view): return view.hidden[:, view.image, 0]"
    for name in ("numpy", "olefile", "defusedxml", "cffi", "hf_xet", "brotli", "mine"):
        (tmp_path / f"{name}.py").write_text(f"open('ran-{name}', 'w')\n{score}")
    assert python("", ROOT / "run.py", "--stages", "2:9:mine:score", cwd=tmp_path).returncode == 0
    assert [path.name for path in tmp_path.glob("ran-*")] == ["ran-mine"]  # what was typed, and no more


OOM = "out of memory: fewer questions at a time, --dtype bfloat16 or a smaller model need less"


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.99 TiB."), MemoryError(), None,
])  # fmt: skip
def test_out_of_memory(refused, monkeypatch, error):
    """Of a GPU (as its error stands in torch), of Python, and of the CPU: for that one 4 EiB are really asked for."""

    def embed_image(*_):
        if error is not None:
            raise error
        torch.empty(2**60)

    monkeypatch.setattr(Llava, "embed_image", embed_image)
    refused(OOM)


def test_other_errors_keep_their_traceback(ask, monkeypatch):
    """A bug of ours told as if it were the user's."""
    monkeypatch.setattr(Llava, "embed_image", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError):
        ask()


def test_dtype_that_the_device_lacks():
    with pytest.raises(HimapError, match=r"device 'cpu': not available for torch.float8_e4m3fn \(.+\); there is cpu"):
        find_device("cpu", torch.float8_e4m3fn)


@pytest.mark.parametrize("where, call", [
    ("model.LlavaModel.embed_image", 1), ("assistant.llava.load_weights", 1), ("decoder.LlamaDecoder.forward", 1),
    ("decoder.LlamaDecoder.forward", 3),
])  # fmt: skip
def test_ctrl_c(ask, monkeypatch, where, call):
    """In the encoder, while loading, in the prefill and in a later token."""
    calls, whole = [], pkgutil.resolve_name(f"himap_ref.{where}")

    def interrupted(*args, **options):
        calls.append(where)
        if len(calls) == call:
            raise KeyboardInterrupt
        return whole(*args, **options)

    monkeypatch.setattr(f"himap_ref.{where}", interrupted)
    status, out, err = ask("--max-new-tokens", 5)
    assert status == 130 and SAID.sub("", err) == "" and out.count("\n") <= 1 and len(calls) == call


KEY = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit that it is ignored
class Key:
    def find_spec(self, name, *_):
        if name == sys.argv[-1]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Key())
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
MODULES = ["torch", "torch.nn", "tokenizers", "himap_ref.vision", "himap_ref.image"]


def test_ctrl_c_while_libraries_load():
    """A page of traceback for a key pressed in the first seconds: a signal comes when a module is about to load."""
    with ThreadPoolExecutor(2) as pool:
        done = [*pool.map(lambda module: python(KEY, ROOT / "run.py", "--template", module), MODULES)]
    assert [(one.returncode, one.stdout, one.stderr) for one in done] == [(130, "", "")] * len(MODULES)


def test_a_real_ctrl_c(tmp_path, whole):
    """A signal that torch or a library swallows, or turns into a traceback."""
    out = tmp_path / "a.jsonl"
    study = "-m", "himap_ref.studies", "evaluate"
    command = [sys.executable, *study, "--weights", whole, "--scenes", "500", "--out", out]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # in the background it is ignored
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, **options) as process:
        while process.poll() is None and not (out.exists() and out.stat().st_size > 3000):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "Traceback" not in err
    assert out.read_bytes().endswith(b"\n")


# ---------------------------------------------------------------- errors


def test_a_message_is_one_short_line():
    """A file that writes lines of its own, or colours, through a message that quotes it; a page of it."""
    error = HimapError("x.json: 'a\nb\r\x1b[31m\u2028\ud800\0' is wrong: do this")
    assert str(error) == r"x.json: 'a\nb\r\x1b[31m\u2028\ud800\x00' is wrong: do this"
    assert str(HimapError("café ▁ 猫")) == "café ▁ 猫"
    long = str(HimapError("start " + "x" * 10**6 + " end"))
    assert len(long) < 1100 and long.startswith("start x") and long.endswith("x end")


def test_printing_into_a_string():
    """A study that only works where standard output is a real file."""
    with redirect_stdout(io.StringIO()) as printed:
        run_command(lambda: print("answer"))
    assert printed.getvalue() == "answer\n"
