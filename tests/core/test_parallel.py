"""Tensor parallelism (torchrun, gloo on CPUs): N processes with a part of the decoder each answer as one with all."""

import json
import os
import re
from shutil import copy
from types import SimpleNamespace

import pytest
from conftest import tiny_text_config
from launch import ROOT, launch
from toys import changed, noise, random_llava, tensors_of, write_folder

from himap_ref import HimapError, LlamaDecoder
from himap_ref.checkpoint.config import read_config
from himap_ref.commands.options import EMBEDDED
from himap_ref.commands.ranks import LOST
from himap_ref.parallel import split

SIZES = {
    "vocab_size": 504, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
VARIANTS = {"plain": {}, "tied": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}}
EVERY = "HIMAP_KILLS" in os.environ  # all of it of all: see tests/studies/test_distributed.py, too
QUESTIONS = ["How many things are there?", "Where?", "What color is the star, and what is beside the star?"]

WORKER = """
import json, sys
sys.path.insert(0, "TESTS")
import torch
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from himap_ref import Llava, Stage, image_to_image, parallel
from himap_ref.commands import ranks
from himap_ref.methods.scores import SCORES

class Stored:  # a tensor in a file, and how much of it is read
    read = 0
    def __init__(self, stored):
        self.stored = stored
    def __getitem__(self, place):
        Stored.read += self.stored[place].numel()
        return self.stored[place]

def differences(whole, part):
    for ours, theirs in zip(whole, part, strict=True):
        kept = [[stage.kept.tolist() for stage in answer.trace.stages] for answer in (ours, theirs)]
        far = (ours.first_logits - theirs.first_logits).abs().max().item()
        same = ours.token_ids == theirs.token_ids and ours.flops == theirs.flops and kept[0] == kept[1]
        if far > 1e-4 or not same or ours.traces[-1].layers != theirs.traces[-1].layers:
            yield f"{far:.1e} {kept} {ours.token_ids} {theirs.token_ids} {ours.flops} {theirs.flops}"

def asked(model, every):
    picture, told = Image.open("PICTURE"), {}
    def ask(name, image, prompt, *stages, tokens=3, **more):
        told[name] = model.generate(image, prompt, stages, tokens, **more)
    stages = Stage(1, 0.5, SCORES["text_to_image"]), Stage(2, 0.5, image_to_image)
    ask("ragged", picture, QUESTIONS, *stages)
    for name, score in SCORES.items() if every else ():
        ask(name, picture, QUESTIONS[:1], Stage(2, 5, score), tokens=1)
    if every:
        ask("reprune", picture, QUESTIONS, *stages, reprune=True)
        ask("sampled", picture, QUESTIONS, *stages, temperature=2.0, seed=3)
    ask("prefix", picture, QUESTIONS, *stages, past=model.prefix())
    ask("turn", None, QUESTIONS[1:2], past=told["ragged"][2].past)
    return told

def lots(view):  # drawn otherwise by each process
    return torch.rand(view.positions[:, view.image].shape, generator=torch.Generator().manual_seed(ranks.rank()))

with ranks.joined():
    real, result = parallel.own_part, {}
    parallel.own_part = lambda stored, *rest: real(Stored(stored), *rest)
    for name in VARIANTS:
        Stored.read = 0
        mesh = init_device_mesh("cpu", (ranks.size(),))
        part = Llava.from_pretrained(f"FOLDER/{name}", mesh=mesh)
        own = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in part.parameters())
        drawn = part.generate("PICTURE", "Where?", (Stage(1, 5, lots),), 1).trace.stages[0].kept.tolist()
        every = EVERY or (ranks.size(), name) == (2, "plain")
        whole, part = (asked(model, every) for model in (Llava.from_pretrained(f"FOLDER/{name}"), part))
        wrong = {what: told for what in whole if (told := list(differences(whole[what], part[what])))}
        ids = {what: [answer.token_ids for answer in answers] for what, answers in part.items()}
        result[name] = {"read": Stored.read, "own": own, "wrong": wrong, "ids": ids, "drawn": drawn}
    with open(f"RESULT{ranks.rank()}", "w") as file:
        json.dump(result, file)
"""


def config_of(changes):
    return changed(image_token_index=3, text_config=SIZES | changes, vision_config={"image_size": 56}, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a random model's folders, by variant, and a picture."""
    folder = tmp_path_factory.mktemp("models")
    for name, changes in VARIANTS.items():
        data = config_of(changes)
        write_folder(folder / name, tensors_of(random_llava(read_config(data))), data)
        copy(EMBEDDED / "tokenizer.json", folder / name)
    noise(60, 60).save(folder / "a.png")
    return folder


@pytest.mark.parametrize("number", [2, 4])
def test_as_one(folder, tmp_path, number):
    """A ranking by this process's heads alone, heads beside others' keys, a sum of partial results left out or taken
    twice, a slice of another process, a FLOP count of one process, a token or a choice of its own in each."""
    places = {"TESTS": ROOT / "tests", "FOLDER": folder, "PICTURE": folder / "a.png", "RESULT": tmp_path / "result"}
    variants = [*VARIANTS] if EVERY or number == 2 else ["plain"]
    constants = f"VARIANTS, QUESTIONS, EVERY = {variants}, {QUESTIONS}, {EVERY}\n"
    (tmp_path / "worker.py").write_text(constants + re.sub("|".join(places), lambda m: str(places[m[0]]), WORKER))
    statuses, _, errors = launch(number, tmp_path, tmp_path / "worker.py")
    assert statuses == [0] * number, errors
    results = [json.loads((tmp_path / f"result{rank}").read_text()) for rank in range(number)]
    for name in variants:
        each = [result[name] for result in results]
        assert [result["wrong"] for result in each] == [{}] * number
        assert all(result["drawn"] == each[0]["drawn"] for result in each)
        assert all(result["ids"] == each[0]["ids"] for result in each) and any(each[0]["ids"]["ragged"])
        decoder = random_llava(read_config(config_of(VARIANTS[name]))).language_model
        parts = [
            n for n, _ in decoder.named_parameters() if "norm" not in n and not re.search(r"(o|down)_proj.bias", n)
        ]
        less = sum(decoder.get_parameter(n).numel() for n in parts) * (number - 1) // number
        every = sum(p.numel() for p in random_llava(read_config(config_of(VARIANTS[name]))).parameters())
        assert [(result["own"], result["read"]) for result in each] == [(every - less,) * 2] * number


def test_what_does_not_divide():
    """Heads, channels or tokens that no process has, or two; a number of processes told that does not do, either."""
    sizes = {"vocab_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 44}
    for number, changes, what in (
        (3, {}, "4 key/value heads do not divide among 3 processes: --nproc-per-node may be 1, 2, 4"),
        (4, {"intermediate_size": 42}, "42 MLP channels do not divide among 4 processes: --nproc-per-node may be 1, 2"),
        (2, {"vocab_size": 97}, "97 tokens of vocabulary do not divide among 2 processes: --nproc-per-node may be 1"),
    ):
        decoder = LlamaDecoder(tiny_text_config(**sizes | changes))
        with pytest.raises(HimapError, match=f"^{what}$"):
            split(decoder, SimpleNamespace(size=lambda number=number: number))
        assert type(decoder) is LlamaDecoder


def test_run(folder, tmp_path, run):
    """`run.py` that prints twice, torch's own warnings in it, another answer; a chat whose lines go to either process;
    outputs written by both."""
    options = ("--weights", folder / "plain", "--image", folder / "a.png", "--dtype", "float32", "--max-new-tokens", 4)
    options = (*options, "--stages", "1:0.5:text_to_image,2:3:image_to_image", "--temperature", 1)
    asked = (*options, "--prompt", "Where?")
    shown = tmp_path / "kept.png"
    statuses, outs, errors = launch(2, tmp_path, ROOT / "run.py", *asked, "--json", "--show", shown)
    assert statuses == [0, 0] and outs[1] == errors[1] == "" and errors[0].splitlines()[-1] == f"wrote {shown}"
    assert "Warning" not in errors[0] and shown.exists()
    ours, theirs = json.loads(outs[0]), json.loads(run(*asked, "--json")[1])
    del ours["seconds"], theirs["seconds"]
    assert ours == theirs

    (tmp_path / "said").write_text("\n".join(QUESTIONS))
    before = f"if rank == 0: sys.stdin = open({str(tmp_path / 'said')!r})"
    statuses, outs, errors = launch(2, tmp_path, ROOT / "run.py", *options, "--chat", before=before)
    assert statuses == [0, 0] and outs[1] == errors[1] == "" and len(re.findall(r"\[turn \d", errors[0])) == 3


def test_death(folder, tmp_path):
    """One that dies in the middle of an answer, for which the other waits for ever, or which it shows as a trace."""
    before = """
import himap_ref.generation as generation
def choose(*args, real=generation.choose, steps=[]):
    steps.append(args)
    if rank == 1 and len(steps) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
generation.choose = choose
"""
    options = ("--weights", folder / "plain", "--image", folder / "a.png", "--prompt", "Where?", "--method", "none")
    statuses, outs, errors = launch(2, tmp_path, ROOT / "run.py", *options, before=before)
    assert statuses == [2, -9] and outs[1] == "" and errors[0].endswith(f"error: {LOST}\n")
    assert "Traceback" not in errors[0]


def test_bad_input(tmp_path):
    """An error told by every process."""
    statuses, _, errors = launch(2, tmp_path, ROOT / "run.py", "--weights", tmp_path / "none")
    assert statuses == [2, 2] and "".join(errors).count("error: ") == 1
