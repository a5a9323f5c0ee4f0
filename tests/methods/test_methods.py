"""Baselines by name: scores and schedules in the decoder, reducers before it."""

import math
from functools import partial

import pytest
import torch
from test_flops import counted
from torch.testing import assert_close

from himap_ref import HIMAP, HIMAP_CAPTION, HimapError, LayerView, Stage, image_to_image, text_to_image
from himap_ref.cache import LayerCache
from himap_ref.flops import projector_flops, vision_flops
from himap_ref.generation import generate
from himap_ref.methods.peers import DivPrune, Downsample, VisionZip
from himap_ref.methods.reducers import AveragePool, ClsAttention
from himap_ref.methods.schedules import FASTV, METHODS, parse_method, parse_stages
from himap_ref.methods.scores import SCORES, last_to_image
from himap_ref.studies.questions.drawing import draw
from himap_ref.studies.questions.scenes import UNSEEN, make_scene


@pytest.fixture
def view(embeddings):
    hidden, positions = embeddings(2, 9, 8, seed=4), torch.arange(9).expand(2, -1)
    q, k = hidden[:, :, None], embeddings(2, 9, 8, seed=5)[:, :, None]  # one head
    return LayerView(q, LayerCache(k, k, positions), hidden, positions, slice(2, 7))


def test_image_mean_counts_the_rows_that_see_a_token(view):
    """Normalising by all image rows, or by text rows too: the bias of the sum would stay."""
    attention = view.maps(view.all).mean(dim=1)
    want = torch.stack([
        torch.stack([attention[b, [i for i in range(2, 7) if i >= v], v].mean() for v in range(2, 7)]) for b in range(2)
    ])  # fmt: skip
    assert_close(SCORES["image_to_image_mean"](view), want)
    assert not torch.equal(want.argsort(), image_to_image(view).argsort())


@pytest.mark.parametrize("cached", [0, 1])
def test_bias_where_attention_is_flat(cached):
    """The bias itself: of the sum by a token's place, of the mean still, if less; a cached prefix's keys uncounted."""
    zero, positions = torch.zeros(1, 9, 1, 8), torch.arange(9)[None]
    rows, cache = zero[:, cached:], LayerCache(zero, zero, positions)
    view = LayerView(rows, cache, rows[:, :, 0], positions[:, cached:], slice(1 - cached, 9 - cached))
    summed, averaged, relative = (SCORES[f"image_to_image{name}"](view)[0] for name in ("", "_mean", "_relative"))
    harmonic = [sum(1 / (i + 1) for i in range(v, 9)) for v in range(1, 9)]  # row i sees i + 1 keys, 1 / (i + 1) each
    assert_close(summed, torch.tensor(harmonic))
    assert_close(averaged, torch.tensor([h / (9 - v) for v, h in enumerate(harmonic, start=1)]))
    assert summed[0] / summed[-1] > 10 > averaged[0] / averaged[-1] > 1.5
    assert_close(relative, torch.ones(8))


def test_published_schedules():
    """A layer or share that is not the paper's (HiMAP's K1=2, half; K2=8 or 15, a quarter), at 32 layers or at 12."""
    first = Stage(2, 0.5, text_to_image)
    assert list(HIMAP) == [first, Stage(8, 0.25, image_to_image)]
    assert list(HIMAP_CAPTION) == [first, Stage(15, 0.25, image_to_image)]
    assert METHODS["himap"](12) == METHODS["himap-paper"](40) == HIMAP and METHODS["himap-caption"](32) == HIMAP_CAPTION
    assert METHODS["fastv"](32) == FASTV == (Stage(2, 0.5, last_to_image),)
    pyramid = [Stage(layer, 0.5, last_to_image) for layer in (8, 16, 24)]
    assert list(METHODS["pyramiddrop"](32)) == pyramid and [s.layer for s in METHODS["pyramiddrop"](12)] == [3, 6, 9]
    assert METHODS["vtw"](32) == (Stage(15, 0, None),)


def test_parse_stages():
    """A share read as a count, or the other way round; names bound to the wrong function."""
    want = Stage(2, 0.5, text_to_image), Stage(8, 72, image_to_image)
    assert parse_stages("2:0.5:text_to_image, 8:72:image_to_image") == want
    assert [type(parse_stages(f"2:{keep}:text_to_image")[0].keep) for keep in ("1", "1.0")] == [int, float]
    assert parse_stages("3:0:none") == (Stage(3, 0, None),)
    for name, score in SCORES.items():
        (stage,) = parse_stages(f"3:.5:{name}")
        assert stage.name == name == score.__name__ and stage.score is score


def test_parse_method(tiny_llava):
    """A name bound to another method; the schedule that the weights recommend ignored, or used under another name."""
    model = tiny_llava(text={"num_hidden_layers": 12})
    assert parse_method("himap", model).stages == HIMAP
    model.himap = parse_stages("4:0.5:text_to_image")
    assert [stage.layer for stage in parse_method("himap", model).stages] == [4]
    assert parse_method("himap-paper", model).stages == HIMAP
    assert parse_method("random7", model).stages[0].score.keywords == {"seed": 7}
    assert parse_method("2:0.5:random7", model).stages[0].score.keywords == {"seed": 7}
    assert parse_method("cls:5", model).reducer == ClsAttention(5) and parse_method("pool:2", model).stages == ()
    assert parse_method("none", model).stages == ()
    assert parse_method("cls:5", model).tokens_per_layer(model.config) == [5] * 12
    assert parse_method("vtw", model).tokens_per_layer(model.config) == [16] * 5 + [0] * 7


@pytest.mark.parametrize("name", [name for name in METHODS if name != "himap-caption"])  # K2 = 15 lies beyond 12 layers
def test_stages_by_name(shapes, scene_picture, name):
    """A name unknown to decoder, generator, model or assistant, or another method to it; a folder's own not read."""
    stages = parse_method(name, shapes).stages
    answer, named = (shapes.generate(scene_picture, "What color is the star?", s, 2) for s in (stages, name))
    assert named.token_ids == answer.token_ids
    ids, pixels = torch.tensor([answer.prompt_ids]), shapes.preprocess(scene_picture)
    traces = [named.trace, shapes(ids, pixels, name).trace.item(0)]
    if name == "himap":
        assert [(stage.layer, stage.name) for stage in stages] == [(1, "text_to_image"), (11, "image_to_image")]
    else:
        assert stages == tuple(METHODS[name](12))
    decoder, x = shapes.language_model, shapes.embed(answer.prompt_ids, shapes.embed_image(pixels)[0])[None]
    for known in {"himap": (), "himap-paper": (name, "himap")}.get(name, (name,)):  # by the decoder: no recommendation
        outs = decoder(x, answer.image_span, known).trace, generate(decoder, x, answer.image_span, known, 1).traces[0]
        traces += [trace.item(0) for trace in outs]
    want = [stage.kept.tolist() for stage in answer.trace.stages]
    assert all([stage.kept.tolist() for stage in trace.stages] == want for trace in traces)


BAD = ["himapp", "", "cls", "cls:", "cls:0", "cls:17", "cls:-1", "pool:5", "pool:2.0", "vtw:3", "random-1"]
BAD += ["13:0.5:text_to_image", "2:99:text_to_image", "2:0:none,3:1:none", "2:0:text_to_image", "himap-caption"]
BAD += ["divprune:0", "divprune:17", "visionzip:2", "visionzip:17", "down:0", "down:5", "down"]


@pytest.mark.parametrize("text", BAD)
def test_parse_method_errors(tiny_llava, text):
    """A traceback, or an error only after the model has been busy for hours: more tokens than there are, or none."""
    with pytest.raises(HimapError):
        parse_method(text, tiny_llava(text={"num_hidden_layers": 12}))


BOGUS = [("bogus", "unknown"), ("himap-caption", "does not exist"), ((Stage(99, 1, text_to_image),), "does not exist")]


@pytest.mark.parametrize("stages, message", BOGUS, ids=str)
def test_stages_are_checked_without_a_picture(shapes, stages, message):
    """A mistake that shows only with the first picture."""
    first = shapes.generate(None, "What is it?", max_new_tokens=1)
    for options in ({}, {"past": first.past}):
        with pytest.raises(HimapError, match=message):
            shapes.generate(None, "What is it?", stages, 1, **options)


# ---------------------------------------------------------------- before the decoder


def slow_cls_attention(model, pixels):
    """(B, P): attention of the class token in the last used layer, head by head and number by number."""
    seen = []
    last = model.vision_tower.layers[-1]
    hook = last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.vision_tower(pixels)
    hook.remove()
    h = last.layer_norm1(seen[0])
    q, k, heads = last.self_attn.q_proj(h), last.self_attn.k_proj(h), last.self_attn.num_heads
    c = q.shape[-1] // heads
    attention = torch.zeros(len(q), q.shape[1])
    for head in range(heads):
        part = slice(head * c, (head + 1) * c)
        for b in range(len(q)):
            weights = [math.exp(sum(q[b, 0, part] * key[part]) / math.sqrt(c)) for key in k[b]]
            attention[b] += torch.tensor(weights) / sum(weights) / heads
    return attention[:, 1:]


@pytest.mark.parametrize("layers", [-2, (1, -2), (3, 0, 2)], ids=str)
def test_cls_attention_keeps_the_highest_in_order(tiny_llava, pixels, layers):
    """Another row, layer or head; the class token as a patch; tokens out of order; one layer's features of several."""
    model = tiny_llava(vision_feature_layer=layers)
    attention, every = slow_cls_attention(model, pixels), model.embed_image(pixels)
    for keep in (1, 5, 16):
        kept = attention.topk(keep).indices.sort().values
        got = ClsAttention(keep)(model, pixels)
        assert_close(got, torch.stack([tokens[rows] for tokens, rows in zip(every, kept, strict=True)]))


def test_average_pool(tiny_llava, pixels):
    """Tokens averaged across the wrong axis of the grid."""
    model = tiny_llava()
    every = model.embed_image(pixels)  # a grid of 4 x 4
    pooled = AveragePool(2)(model, pixels)
    corners = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert_close(pooled, torch.stack([every[:, corner].mean(dim=1) for corner in corners], dim=1))
    assert_close(AveragePool(4)(model, pixels), every)
    assert AveragePool(3)(model, pixels).shape == (2, 9, 32)


@pytest.mark.parametrize("reducer", [
    ClsAttention(5), ClsAttention(16), AveragePool(3), DivPrune(5), VisionZip(6), Downsample(2),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("changes", [
    {}, {"projector_type": "linear"}, {"vision_feature_layer": -1}, {"vision_feature_layer": (-2, 0, 1)},
], ids=str)  # fmt: skip
def test_reducers_count_themselves(tiny_llava, pixels, reducer, changes):
    """FLOPs that a method spends before the decoder, or saves, and does not own up to; another number of tokens."""
    model = tiny_llava(**changes)
    flops, tokens = counted(reducer, model, pixels[:1])
    assert flops == sum(reducer.flops(model.config)) and tokens.shape[1] == reducer.num_image_tokens(model.config)


def test_reducers_need_patches(tiny_llava):
    """The class token pooled or ranked as if it were a patch; no layer to take the attention from."""
    for reducer in (ClsAttention(3), AveragePool(2)):
        with pytest.raises(HimapError, match="class token"):
            reducer.num_image_tokens(tiny_llava(vision_feature_select_strategy="full").config)
    with pytest.raises(HimapError, match="layer"):
        ClsAttention(3).num_image_tokens(tiny_llava(vision_feature_layer=0).config)


@pytest.mark.parametrize("reducer, tokens", [(ClsAttention(9), 9), (AveragePool(4), 16)], ids=str)
def test_answer_with_reducer(shapes, scene_picture, reducer, tokens):
    """Places kept for dropped tokens; the model's FLOPs in the place of the reducer's, or a vanilla that is reduced."""
    question, config = "How many things are there?", shapes.config
    flops, answer = counted(partial(shapes.generate, scene_picture, question, (), 2, reducer=reducer))
    plain = shapes.generate(scene_picture, question, (), 2)
    start, stop = answer.image_span
    assert stop - start == tokens and len(plain.prompt_ids) - len(answer.prompt_ids) == 144 - tokens
    assert answer.flops.total == flops and answer.flops.prefill < plain.flops.prefill
    assert (answer.flops.vision, answer.flops.projector) == reducer.flops(config)
    assert (plain.flops.vision, plain.flops.projector) == (vision_flops(config), projector_flops(config))
    assert answer.flops.vanilla == plain.flops.vanilla and answer.flops.vanilla.total == plain.flops.total
    blind = shapes.generate(None, question, reducer=reducer)
    assert blind.flops.vision == 0 and blind.image_span is None


def test_reducers_in_a_batch(shapes):
    """Item 0's choice of tokens used for every item."""
    pictures, question = [draw(make_scene(UNSEEN + seed)) for seed in (1, 2)], "How many things are there?"
    batch = shapes.generate(pictures, [question] * 2, reducer=ClsAttention(9))
    for picture, together in zip(pictures, batch, strict=True):
        alone = shapes.generate(picture, question, reducer=ClsAttention(9))
        assert alone.token_ids == together.token_ids
        assert_close(alone.first_logits, together.first_logits, rtol=0, atol=1e-4)
