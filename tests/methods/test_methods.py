"""Baselines by name: scores and schedules in the decoder, reducers before it."""

import math

import pytest
import torch
from test_flops import counted
from torch.testing import assert_close

from himap_ref import HIMAP, HimapError, LayerView, Stage, image_to_image
from himap_ref.cache import LayerCache
from himap_ref.flops import projector_flops, vision_flops
from himap_ref.methods.reducers import AveragePool, ClsAttention
from himap_ref.methods.schedules import METHODS, parse_method, parse_stages
from himap_ref.methods.scores import SCORES, last_to_image
from himap_ref.studies.questions.drawing import draw
from himap_ref.studies.questions.scenes import UNSEEN, make_scene


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(3))


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
    """The bias itself: under the sum, flat attention ranks v by its place; under the mean still, if less. Keys of a
    cached prefix, which a row sees too, forgotten in the count."""
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
    """A baseline at other layers or shares than published, for LLaVA-1.5-7B's 32 layers and the small model's 12."""
    pyramid = [Stage(layer, 0.5, last_to_image) for layer in (8, 16, 24)]
    assert list(METHODS["pyramiddrop"](32)) == pyramid and [s.layer for s in METHODS["pyramiddrop"](12)] == [3, 6, 9]
    assert METHODS["vtw"](32) == (Stage(15, 0, None),)
    assert METHODS["himap"](12) == METHODS["himap-paper"](40) == HIMAP


def test_stage_without_score_drops_the_picture():
    """A schedule that drops the whole picture by a typing mistake, or pays for a ranking that decides nothing."""
    assert parse_stages("3:0:none") == (Stage(3, 0, None),) and Stage(3, 0, None).name == "none"
    for layer, keep, score in ((3, 0, image_to_image), (3, 4, None), (3, 0.0, None), (3, 0.5, None)):
        with pytest.raises(HimapError):
            Stage(layer, keep, score)


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


@pytest.mark.parametrize("name", ["himap", "himap-paper", "fastv", "none"])
def test_stages_by_name(shapes, scene_picture, name):
    """What a folder recommends not read from it; a name that means other stages to the model than to the command."""
    stages = parse_method(name, shapes).stages
    assert (stages == HIMAP) is (name == "himap-paper")  # weights/shapes recommends one of its own
    by_name, by_stages = (shapes.generate(scene_picture, "Why?", given, 1) for given in (name, stages))
    kept = [[stage.kept.tolist() for stage in answer.trace.stages] for answer in (by_name, by_stages)]
    assert kept[0] == kept[1] and len(kept[0]) == len(stages)


BAD = ["himapp", "", "cls", "cls:", "cls:0", "cls:17", "cls:-1", "pool:5", "pool:2.0", "vtw:3", "random-1"]
BAD += ["13:0.5:text_to_image", "2:99:text_to_image", "2:0:none,3:1:none", "2:0:text_to_image"]


@pytest.mark.parametrize("text", BAD)
def test_parse_method_errors(tiny_llava, text):
    """A traceback, or an error only after the model has been busy for hours."""
    with pytest.raises(HimapError):
        parse_method(text, tiny_llava(text={"num_hidden_layers": 12}))


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
    """Another row, layer or head than meant; the class token counted as a patch; tokens out of order; one layer's
    features where the model takes several."""
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


@pytest.mark.parametrize("reducer", [ClsAttention(5), ClsAttention(16), AveragePool(3)], ids=str)
@pytest.mark.parametrize("changes", [
    {}, {"projector_type": "linear"}, {"vision_feature_layer": -1}, {"vision_feature_layer": (-2, 0, 1)},
], ids=str)  # fmt: skip
def test_reducers_count_themselves(tiny_llava, pixels, reducer, changes):
    """FLOPs that a method spends before the decoder and does not own up to."""
    model = tiny_llava(**changes)
    flops, _ = counted(reducer, model, pixels[:1])
    assert flops == sum(reducer.flops(model.config))


def test_reducers_need_patches(tiny_llava):
    """The class token pooled or ranked as if it were a patch; no layer to take the attention from."""
    for reducer in (ClsAttention(3), AveragePool(2)):
        with pytest.raises(HimapError, match="class token"):
            reducer.num_image_tokens(tiny_llava(vision_feature_select_strategy="full").config)
    with pytest.raises(HimapError, match="layer"):
        ClsAttention(3).num_image_tokens(tiny_llava(vision_feature_layer=0).config)


@pytest.mark.parametrize("reducer, tokens", [(ClsAttention(20), 20), (AveragePool(4), 16)], ids=str)
def test_answer_with_reducer(shapes, scene_picture, reducer, tokens):
    """A prompt that keeps places for dropped tokens; a ratio against a vanilla that was reduced too."""
    answer = shapes.generate(scene_picture, "How many things are there?", reducer=reducer)
    plain = shapes.generate(scene_picture, "How many things are there?")
    start, stop = answer.image_span
    assert stop - start == tokens and len(plain.prompt_ids) - len(answer.prompt_ids) == 144 - tokens
    assert answer.flops.vanilla.prefill == plain.flops.prefill and answer.flops.vanilla.vision == plain.flops.vision
    assert (answer.flops.vision, answer.flops.projector) == reducer.flops(shapes.config)
    assert plain.flops.vision == vision_flops(shapes.config) and plain.flops.projector == projector_flops(shapes.config)
    assert answer.flops.prefill < plain.flops.prefill
    blind = shapes.generate(None, "How many things are there?", reducer=reducer)
    assert blind.flops.vision == 0 and blind.image_span is None


def test_reducers_in_a_batch(shapes):
    """Item 0's choice of tokens used for every item."""
    pictures, question = [draw(make_scene(UNSEEN + seed)) for seed in (1, 2)], "How many things are there?"
    batch = shapes.generate(pictures, [question] * 2, reducer=ClsAttention(9))
    for picture, together in zip(pictures, batch, strict=True):
        alone = shapes.generate(picture, question, reducer=ClsAttention(9))
        assert alone.token_ids == together.token_ids
        assert_close(alone.first_logits, together.first_logits, rtol=0, atol=1e-4)
