"""The prefix cache: what stands before the picture, computed once. Same results, fewer FLOPs, counted exactly."""

import pytest
import torch
from test_flops import counted
from torch.testing import assert_close

from himap_ref import HIMAP, HimapError, Stage, image_to_image, text_to_image
from himap_ref.flops import pass_flops, prefix_flops
from himap_ref.generation import generate
from himap_ref.methods.plan import plan_prefill
from himap_ref.methods.reducers import ClsAttention
from himap_ref.methods.scores import all_to_image, last_to_image

SPAN, N = (6, 20), 27
QUESTION = "How many objects are there?"


def by_everything(view):
    """A score that reads all that a view offers, the prefix's share of it included."""
    system = view.attention(view.system, view.system).sum(dim=(1, 2))[:, None]
    return view.attention(view.all, view.image).sum(dim=1) + system + view.hidden.sum(dim=(1, 2))[:, None]


SCHEDULES = {
    "none": (),
    "two": (Stage(1, 7, text_to_image), Stage(3, 3, image_to_image)),
    "layers 1 and 4": (Stage(1, 9, all_to_image), Stage(4, 0.5, last_to_image)),
    "own score": (Stage(2, 5, by_everything),),
    "the whole picture": (Stage(2, 0, None),),
}


def prompts(embeddings, p):
    """Two prompts that begin with the same p tokens."""
    x = embeddings(2, N)
    x[1, :p] = x[0, :p]
    return x


@pytest.mark.parametrize("p", [1, 4, 6])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_same_as_without(tiny_decoder, embeddings, schedule, p):
    """Rows, positions, masks or keys that shift by the prefix; a score that does not see it."""
    decoder, x, stages = tiny_decoder(num_key_value_heads=2), prompts(embeddings, p), SCHEDULES[schedule]
    prefix = decoder.compute_prefix(x[:1, :p])
    want, got = (decoder(x, SPAN, stages, all_rows=True, **given) for given in ({}, {"prefix": prefix}))
    near = {"rtol": 1e-4, "atol": 5e-5}
    assert_close(got.hidden, want.hidden[:, p:], **near)
    for ours, theirs in zip(got.trace.stages, want.trace.stages, strict=True):
        assert torch.equal(ours.kept, theirs.kept) and torch.equal(ours.candidates, theirs.candidates)
        assert_close(ours.scores, theirs.scores, **near)
    for ours, theirs in zip(got.cache, want.cache, strict=True):
        assert_close(ours.k, theirs.k, **near)
        assert_close(ours.v, theirs.v, **near)
    assert_close(decoder(x, SPAN, stages, prefix=prefix).logits, want.logits, **near)


@pytest.mark.parametrize("reprune", [False, True])
def test_generates_the_same(tiny_decoder, embeddings, reprune):
    """Decode steps that start from a cache without the prefix, or at a position short of it; a prefix used up once."""
    decoder, x, stages = tiny_decoder(), prompts(embeddings, 6), SCHEDULES["two"]
    prefix = decoder.compute_prefix(x[:1, :6])
    before = [k.clone() for k in prefix.k]
    want = generate(decoder, x, SPAN, stages, 8, reprune=reprune)
    for _ in range(2):
        assert generate(decoder, x, SPAN, stages, 8, reprune=reprune, prefix=prefix).token_ids == want.token_ids
    assert all(torch.equal(a, b) for a, b in zip(before, prefix.k, strict=True))


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1}, {"num_hidden_layers": 1}], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_flops(tiny_decoder, embeddings, schedule, changes):
    """Work on the prefix that is counted though it is not done, or done and not counted; a plan that is not the run."""
    decoder = tiny_decoder(**changes)
    x, config = prompts(embeddings, 6)[:1], decoder.config
    stages = [stage for stage in SCHEDULES[schedule] if stage.layer < config.num_hidden_layers]
    flops, prefix = counted(decoder.compute_prefix, x[:, :6])
    assert flops == prefix_flops(config, prefix.trace)
    flops, out = counted(lambda: decoder(x, SPAN, stages, prefix=prefix))
    assert out.trace.layers == plan_prefill(config, SPAN, N, stages, prefix=6)
    assert flops == pass_flops(config, out.trace.layers) < counted(decoder, x, SPAN, stages)[0]


def test_prefix_must_end_before_the_image(tiny_decoder, embeddings):
    """Image tokens of another picture taken from a cache."""
    decoder, x = tiny_decoder(), embeddings(1, N)
    for p, span in ((7, SPAN), (N, None)):
        with pytest.raises(HimapError, match="prefix"):
            decoder(x, span, prefix=decoder.compute_prefix(x[:, :p]))


@pytest.fixture
def cached(shapes):
    """The embedded model with its prefix cached, and the FLOPs that took."""
    yield shapes, shapes.cache_prefix()
    shapes.prefix = None


def test_answers_are_the_same(cached, scene_picture):
    """A switch that changes answers or kept tokens, does nothing, or forgets what it saves."""
    model, spent = cached
    got = model.generate([scene_picture] * 2, [QUESTION] * 2, HIMAP)[1]
    model.prefix = None
    want = model.generate(scene_picture, QUESTION, HIMAP)
    assert got.token_ids == want.token_ids
    assert [stage.kept.tolist() for stage in got.trace.stages] == [stage.kept.tolist() for stage in want.trace.stages]
    assert_close(got.first_logits, want.first_logits, rtol=0, atol=1e-4)
    assert got.flops.vanilla == want.flops.vanilla and got.flops.decode == want.flops.decode
    plan = plan_prefill(model.config.text_config, want.image_span, len(want.prompt_ids), HIMAP, prefix=11)
    assert got.flops.prefill == pass_flops(model.config.text_config, plan) < want.flops.prefill and spent > 0


def test_other_prompts_do_not_use_it(cached, scene_picture):
    """The prefix of one template put before the question of another; fewer image tokens that shift it."""
    model, _ = cached
    template, prefix = model.template, model.prefix
    ways = (
        {"template": "USER: <image>\n{question} ASSISTANT:"},
        {"template": template, "image": None},
        {"template": template, "reducer": ClsAttention(9)},
    )
    for way in ways:
        model.template, got = way["template"], []
        for model.prefix in (prefix, None):
            image = way.get("image", scene_picture)
            got.append(model.generate(image, QUESTION, max_new_tokens=4, reducer=way.get("reducer")))
        model.template = template
        assert got[0].token_ids == got[1].token_ids
        assert_close(got[0].first_logits, got[1].first_logits, rtol=0, atol=1e-4)
        assert (got[0].flops.prefill < got[1].flops.prefill) == ("reducer" in way)
