"""Numerics: half precision without NaN, scores in fp32, weights that give NaN, and what repeats bit by bit."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from himap_ref import HIMAP, HimapError, Llava, Stage
from himap_ref.cache import take
from himap_ref.methods import reducers
from himap_ref.methods.schedules import Method, parse_method
from himap_ref.methods.scores import SCORES
from himap_ref.studies.accuracy import evaluate
from himap_ref.studies.accuracy.precision import digest, threads
from himap_ref.studies.common.asking import ask_each
from himap_ref.studies.paper import disruption, flow
from himap_ref.studies.questions.selection import scene_examples

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "weights" / "shapes"
DTYPES, HALVES = (torch.float32, torch.bfloat16, torch.float16), (torch.bfloat16, torch.float16)
EVERY_SCORE = ",".join(f"{layer}:0.9:{name}" for layer, name in enumerate(SCORES, start=2))
EXAMPLES = [example for example in scene_examples(6) if example.kind == "color"][-3:]
EXAMPLE = WEIGHTS / "example.png", "What color is the star?"
NAN = float("nan")
SAMPLED = {"temperature": 5.0, "seed": 4}  # so hot that nearly every token is drawn


@pytest.fixture(scope="session")
def at():
    """The embedded model in a dtype."""
    return {dtype: Llava.from_pretrained(WEIGHTS, dtype) for dtype in DTYPES}.get


def ask(model, method, examples=EXAMPLES, **options):
    """A batch's answers. method: a name, or stages."""
    method = parse_method(method, model) if isinstance(method, str) else Method("", method)
    pictures, questions = [e.picture() for e in examples], [e.question for e in examples]
    return model.generate(pictures, questions, method.stages, 8, reducer=method.reducer, **options)


# ---------------------------------------------------------------- half precision


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_nan(at, dtype):
    """A mask, a norm or a product that leaves a dtype's range somewhere inside, where the answer hides it."""
    model, seen = at(dtype), set()

    def look(module, _, output):
        seen.add(module)
        assert not isinstance(output, torch.Tensor) or output.isfinite().all(), type(module)

    handles = [module.register_forward_hook(look) for module in model.modules()]
    asked = [(method, EXAMPLES[:1], {}) for method in ("none", "vtw", "cls:20", "pool:4", EVERY_SCORE)]
    for method, examples, options in [*asked, ("himap", EXAMPLES[:2], {"reprune": True})]:
        for got in ask(model, method, examples, **options):
            assert got.first_logits.isfinite().all() and got.first_logits.dtype == dtype
    [handle.remove() for handle in handles]
    kinds = nn.Linear, nn.RMSNorm, nn.LayerNorm
    assert {module for module in model.modules() if isinstance(module, kinds)} <= seen


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_scores_are_fp32(at, dtype):
    """A softmax, a head mean or a sum in half precision, where neighbours tie; a user's half scores kept as such."""
    seen = {}

    def spy(view, name):
        scores, rows = SCORES[name](view), view.maps(view.all).sum(dim=-1)
        assert_close(rows, view.real[:, None].float().expand_as(rows), rtol=0, atol=1e-5)  # padding looks at nothing
        attention = view.maps(view.all).double().mean(dim=1)[..., view.image] * view.real[..., None]
        view.attention = lambda rows: take(attention, rows)
        assert_close(scores, SCORES[name](view).float(), rtol=1e-5, atol=1e-7)
        seen[name] = scores
        return scores

    names = [name for name in SCORES if name != "dart"]  # whose scores are ranks
    stages = [Stage(layer, 0.9, partial(spy, name=name)) for layer, name in enumerate(names, start=2)]
    halved = Stage(10, 7, lambda view: SCORES["text_to_image"](view).to(dtype))
    for got in ask(at(dtype), (*stages, halved), EXAMPLES[:2]):
        assert {stage.scores.dtype for stage in got.trace.stages} == {torch.float32}
        assert [*seen] == names and len(got.trace.stages[-1].kept) == 7
    for scores in seen.values():
        assert scores.dtype == torch.float32 and (scores != scores.to(dtype).float()).float().mean() > 0.9


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_reducer_ranks_in_fp32(at, dtype, monkeypatch):
    """CLS attention averaged over the heads in half precision."""
    seen, keep_highest = [], reducers.keep_highest
    monkeypatch.setattr(reducers, "keep_highest", lambda *args: seen.append(args[0]) or keep_highest(*args))
    ask(at(dtype), "cls:20", EXAMPLES[:1])
    (scores,) = seen
    assert scores.dtype == torch.float32 and (scores != scores.to(dtype).float()).float().mean() > 0.9


# ---------------------------------------------------------------- weights that give NaN

LATER = EXAMPLES[-1]  # its first token's embedding is only looked at when the second token is made


def damaged(model, where):
    """A copy of it with NaN in one tensor's row."""
    model = deepcopy(model)
    name, _, row = where.partition(":")
    model.get_parameter(name).data[int(row) if row else 0] = NAN
    return model


def first_token(model, example):
    return ask(model, "himap", [example])[0].token_ids[0]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"reprune": True}], ids=str)
@pytest.mark.parametrize("where", [
    "language_model.lm_head.weight:5", "language_model.norm.weight", "language_model.layers.11.mlp.down_proj.weight",
    "language_model.layers.0.self_attn.k_proj.weight", "vision_tower.layers.0.mlp.fc1.weight", "later",
])  # fmt: skip
def test_nan_is_an_error(shapes, where, options):
    """NaN logits answered with token 0 for ever: in one row of lm_head, in the prefill, in a later step alone."""
    if later := where == "later":
        where = f"language_model.embed_tokens.weight:{first_token(shapes, LATER)}"
    model = damaged(shapes, where)
    for method, examples in (("himap", EXAMPLES[-2:]), ("none", [LATER])):
        with pytest.raises(HimapError, match="NaN"):
            ask(model, method, examples, **options)
    if later:  # the first token was sound
        assert model.generate(LATER.picture(), LATER.question, HIMAP, 1, **options).finish == "length"


def test_nan_costs_only_its_own_question(shapes):
    """A whole batch lost with the one prompt whose answer runs into NaN."""
    bad = first_token(shapes, LATER)
    model, sound = damaged(shapes, f"language_model.embed_tokens.weight:{bad}"), parse_method("himap", shapes)

    def answers(model):
        return {e.id: got for e, got in ask_each(
            EXAMPLES, 8, lambda *asked: evaluate.answer(model, *asked, sound, 8))}  # fmt: skip

    before, after = answers(shapes), answers(model)
    hit = {id for id, got in before.items() if bad in got.token_ids}
    assert LATER.id in hit and len(hit) < len(EXAMPLES)
    for id, got in after.items():
        assert isinstance(got, HimapError) if id in hit else got.token_ids == before[id].token_ids


@pytest.fixture
def folder(shapes_folder, shapes):
    """The embedded model with NaN where only a later step of the answer about its example sees it."""
    tensors = load_file(shapes_folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[name][shapes.generate(*EXAMPLE, HIMAP, 1).token_ids[0]] = NAN
    save_file(tensors, shapes_folder / "model.safetensors")
    return shapes_folder


def test_command_ends_at_nan(run, folder):
    """An endless answer, a traceback, or status 0."""
    status, _, err = run("--weights", folder, "--image", EXAMPLE[0], "--prompt", EXAMPLE[1])
    *said, line = err.splitlines()
    assert status == 2 and len(said) == 4 and line.startswith("error: ") and "NaN or infinite" in line


@pytest.mark.parametrize("module", [evaluate, flow, disruption], ids=lambda module: module.__name__)
def test_study_ends_at_nan(study, folder, tmp_path, module):
    """A table made of NaN."""
    tensors = load_file(folder / "model.safetensors")
    tensors[next(name for name in tensors if name.endswith("lm_head.weight"))][7] = NAN
    save_file(tensors, folder / "model.safetensors")
    few = ["--layers", 2, "--kinds", "img2img"] if module is disruption else []
    usual = "--weights", folder, "--dtype", "float32", "--limit", 2
    status, _, err = study(module, *usual, *few, "--out", tmp_path / "out")
    assert status == 2 and "NaN or infinite" in err.splitlines()[-1]


# ---------------------------------------------------------------- the same answers again
# Bit by bit: the same questions in the same batches on the same number of threads. With another number of threads, or
# in another batch, matrix products add up in another order: fp32 still keeps the same tokens, half precision need not.


def facts(model, **options):
    """All of a batch's answers, to the last bit."""
    with torch.no_grad():
        return [
            [got.token_ids, [stage.kept.tolist() for stage in got.trace.stages],
             digest([stage.scores for stage in got.trace.stages]), digest([got.first_logits])]
            for got in ask(model, "himap-paper", **options)
        ]  # fmt: skip


def every_fact(at):
    return {str(dtype): [facts(at(dtype), **options) for options in ({}, SAMPLED)] for dtype in DTYPES}


def test_run_to_run(at):
    """Answers that depend on the process: an unseeded draw, a set's order, uninitialised memory."""
    code = (
        "import json, sys, torch; sys.path += ['tests', 'tests/core']; import test_numerics as t\n"
        "models = {d: t.Llava.from_pretrained(t.WEIGHTS, d) for d in t.DTYPES}\n"
        "torch.manual_seed(5); torch.set_num_threads(1); print(json.dumps(t.every_fact(models.get)))"
    )
    env = os.environ | {"PYTHONHASHSEED": "7"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=-1, cwd=ROOT, env=env) as other, threads(1):
        here = every_fact(at)
        assert json.load(other.stdout) == here


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_batch_change_no_answer(at, dtype):
    """Answers, or in fp32 kept tokens, that differ with the machine: by more than the order of a sum explains."""
    model = at(dtype)
    for options in ({}, SAMPLED) if dtype == torch.float32 else ({},):  # a draw may fall between two halves' roundings
        with threads(1):
            want = facts(model, **options)
            alone = [facts(model, examples=[example], **options)[0] for example in EXAMPLES]
        with threads(2):
            on_two = facts(model, **options)
        for got in (alone, on_two):
            assert [ids for ids, *_ in got] == [ids for ids, *_ in want]
            if dtype == torch.float32:
                assert [kept for _, kept, *_ in got] == [kept for _, kept, *_ in want]
