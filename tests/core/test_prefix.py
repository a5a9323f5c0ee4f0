"""A prefix: what stands before the picture, computed once. Same results, fewer FLOPs; never the wrong one."""

import json
from copy import deepcopy

import pytest
import torch
from test_flops import counted
from tokenizers import Tokenizer
from torch.testing import assert_close

from himap_ref import HIMAP, HimapError, Stage, image_to_image, text_to_image
from himap_ref.flops import pass_flops
from himap_ref.generation import generate
from himap_ref.methods.plan import plan_prefill
from himap_ref.methods.reducers import ClsAttention
from himap_ref.methods.scores import all_to_image, image_to_image_mean, image_to_image_relative, last_to_image, random

SPAN, N = (6, 20), 27
QUESTION = "How many things are there?"
NEAR = {"rtol": 1e-4, "atol": 5e-5}


def by_everything(view):
    """A score that reads all that a view offers, the prefix's keys included."""
    keys = view.k.sum(dim=(1, 2, 3)) + view.v.sum(dim=(1, 2, 3)) + view.key_positions.sum(dim=1)
    own = view.hidden[:, view.image].sum(dim=2) + view.q[:, view.image].sum(dim=(2, 3)) + view.positions[:, view.image]
    system = view.maps(view.text)[..., :3].sum(dim=(1, 2, 3))
    return view.attention(view.all).sum(dim=1) + own + (keys + system)[:, None]


SCHEDULES = {
    "none": (),
    "two": (Stage(1, 7, text_to_image), Stage(3, 3, image_to_image)),
    "layers 1 and 4": (Stage(1, 9, all_to_image), Stage(4, 0.5, last_to_image)),
    "relative": (Stage(1, 9, image_to_image_mean), Stage(3, 0.5, image_to_image_relative)),
    "chance": (Stage(2, 9, random),),
    "own score": (Stage(2, 5, by_everything),),
    "the whole picture": (Stage(2, 0, None),),
}


def prompts(embeddings, p):
    """Two prompts that begin with the same p tokens."""
    x = embeddings(2, N)
    x[1, :p] = x[0, :p]
    return x


def rest(x, p, cache):
    """Arguments for what stands behind p cached tokens."""
    return {"inputs_embeds": x[:, p:], "positions": torch.arange(p, x.shape[1]).expand(len(x), -1), "cache": cache}


@pytest.mark.parametrize("p", [1, 4, 6])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_same_as_without(tiny_decoder, embeddings, schedule, p):
    """Rows, positions, masks or keys that shift by the prefix; a score that does not see its keys."""
    decoder, x, stages = tiny_decoder(num_key_value_heads=2), prompts(embeddings, p), SCHEDULES[schedule]
    cache = decoder(x[:1, :p]).cache
    want = decoder(x, SPAN, stages, all_rows=True)
    got = decoder(image_span=SPAN, stages=stages, all_rows=True, **rest(x, p, cache))
    assert_close(got.hidden, want.hidden[:, p:], **NEAR)
    for ours, theirs in zip(got.trace.stages, want.trace.stages, strict=True):
        assert torch.equal(ours.kept, theirs.kept) and torch.equal(ours.candidates, theirs.candidates)
        rows = {"all_to_image": N / (N - p)}.get(ours.score, 1)  # a mean, and the prefix's rows are not among these
        assert_close(ours.scores, theirs.scores * rows, **NEAR)
    for ours, theirs in zip(got.cache, want.cache, strict=True):
        assert_close(ours.k, theirs.k, **NEAR)
        assert_close(ours.v, theirs.v, **NEAR)
        assert torch.equal(ours.positions, theirs.positions)
    assert_close(decoder(image_span=SPAN, stages=stages, **rest(x, p, cache)).logits, want.logits, **NEAR)


@pytest.mark.parametrize("reprune", [False, True])
def test_generates_the_same(tiny_decoder, embeddings, reprune):
    """Decode steps that start from a cache without the prefix, or at a position short of it; a prefix used up once."""
    decoder, x, stages = tiny_decoder(), prompts(embeddings, 6), SCHEDULES["two"]
    cache = decoder(x[:1, :6]).cache
    before = [deepcopy((layer.k, layer.v, layer.positions)) for layer in cache]
    want = generate(decoder, x, SPAN, stages, 8, reprune=reprune)
    for _ in range(2):
        got = generate(decoder, x[:, 6:], SPAN, stages, 8, reprune=reprune, cache=cache, start=6)
        assert got.token_ids == want.token_ids
    for layer, old in zip(cache, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip((layer.k, layer.v, layer.positions), old, strict=True))


FLOPS = [
    *((schedule, {"num_key_value_heads": 1}) for schedule in SCHEDULES),
    ("two", {}),
    ("none", {"num_hidden_layers": 1}),
]


@pytest.mark.parametrize("schedule, changes", FLOPS, ids=str)
def test_flops(tiny_decoder, embeddings, schedule, changes):
    """Work on the prefix that is counted though it is not done, or done and not counted; a plan that is not the run."""
    decoder, stages = tiny_decoder(**changes), SCHEDULES[schedule]
    x, config = prompts(embeddings, 6)[:1], decoder.config
    flops, prefix = counted(decoder, x[:, :6])
    assert flops == pass_flops(config, prefix.trace.layers)
    flops, out = counted(lambda: decoder(image_span=SPAN, stages=stages, **rest(x, 6, prefix.cache)))
    assert out.trace.layers == plan_prefill(config, SPAN, N, stages, cached=6)
    assert flops == pass_flops(config, out.trace.layers) < pass_flops(config, plan_prefill(config, SPAN, N, stages))


# ---------------------------------------------------------------- of a whole model


@pytest.mark.parametrize("reducer", [None, ClsAttention(9)], ids=str)
def test_answers_are_the_same(shapes, scene_picture, reducer):
    """A prefix that changes answers or kept tokens, saves nothing or forgets it, or that fewer image tokens shift."""
    config, prefix, stages = shapes.config.text_config, shapes.prefix(), () if reducer else HIMAP
    got = shapes.generate([scene_picture] * 2, [QUESTION] * 2, stages, past=prefix, reducer=reducer)[1]
    want = shapes.generate(scene_picture, QUESTION, stages, reducer=reducer)
    assert got.token_ids == want.token_ids and got.prompt_ids == want.prompt_ids
    assert [stage.kept.tolist() for stage in got.trace.stages] == [stage.kept.tolist() for stage in want.trace.stages]
    assert_close(got.first_logits, want.first_logits, rtol=0, atol=1e-4)
    assert got.flops.vanilla == want.flops.vanilla and got.flops.decode == want.flops.decode
    plan = plan_prefill(config, want.image_span, len(want.prompt_ids), stages, cached=11)
    assert got.flops.prefill == pass_flops(config, plan) < want.flops.prefill


@pytest.fixture
def own(shapes):
    """A copy of the embedded model, to be changed."""
    return deepcopy(shapes)


def test_another_prompt_is_refused(own, scene_picture):
    """The prefix of one template put before the question of another."""
    prefix = own.prefix()
    assert own.generate(None, QUESTION, past=prefix, max_new_tokens=1).prompt_ids[: len(prefix.ids)] == prefix.ids
    own.template = "USER: <image>\n{question} ASSISTANT:"
    with pytest.raises(HimapError, match="does not begin with the prefix"):
        own.generate(scene_picture, QUESTION, past=prefix)


CHANGES = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "load_state_dict": lambda model: model.load_state_dict(deepcopy(model.state_dict())),
    "assigned": lambda model: model.load_state_dict(deepcopy(model.state_dict()), assign=True),
    "in place": lambda model: model.language_model.layers[3].mlp.up_proj.weight.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_weights_are_refused(own, scene_picture, change):
    """An old prefix used with new weights: silently another answer; with another dtype: torch's own error."""
    prefix = own.prefix()
    CHANGES[change](own)
    with pytest.raises(HimapError, match="other weights"):
        own.generate(scene_picture, QUESTION, past=prefix)
    assert own.generate(scene_picture, QUESTION, past=own.prefix()).text


def test_nothing_stands_before_the_picture(own):
    """A prefix of no tokens: torch's own error."""
    settings = json.loads(own.tokenizer.to_str())
    own.tokenizer = Tokenizer.from_str(json.dumps(settings | {"post_processor": None}))  # no BOS
    own.template = "<image>\n{question} ASSISTANT:"
    with pytest.raises(HimapError, match="there is no prefix"):
        own.prefix()
