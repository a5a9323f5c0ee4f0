"""Edges of the core that adversarial use found: what was accepted silently, spoiled, or ended in torch's own words."""

import math
from dataclasses import replace
from functools import partial
from itertools import count

import pytest
import torch
from test_flops import counted
from torch.testing import assert_close

import himap_ref.generation
from himap_ref import HimapError, Stage, TextConfig, image_to_image, text_to_image
from himap_ref.cache import LayerCache
from himap_ref.decoder import rope
from himap_ref.flops import projector_flops, vision_flops
from himap_ref.generation import clock, generate
from himap_ref.methods.reducers import AveragePool, ClsAttention
from himap_ref.methods.scores import random
from himap_ref.pruning import METHODS
from himap_ref.sampling import Sampling, probabilities

SPAN = (4, 16)


@pytest.mark.parametrize("rows", ["system", slice(3, 3), torch.zeros(2, 0, dtype=torch.long)], ids=str)
def test_attention_of_no_rows(tiny_decoder, embeddings, rows):
    """A picture at the very start and `view.system`: a bare RuntimeError instead of a sum of 0."""
    seen = []

    def score(view):
        seen.append(view.attention(view.system if rows == "system" else rows))
        return text_to_image(view) + seen[-1].sum(dim=1)

    got = tiny_decoder()(embeddings(2, 18), (0, 12), (Stage(2, 5, score),))
    want = tiny_decoder()(embeddings(2, 18), (0, 12), (Stage(2, 5, text_to_image),))
    assert seen[0].shape == (2, 0, 12)
    assert torch.equal(got.trace.stages[0].kept, want.trace.stages[0].kept) and torch.equal(got.logits, want.logits)


def test_a_score_function_spoils_nothing(tiny_decoder, embeddings):
    """In-place work in a score function that changes the logits, the cache, or the caller's embeddings."""

    def vandal(view):
        scores = text_to_image(view)
        for tensor in (view.q, view.k, view.v, view.hidden, view.positions, view.key_positions, view.real, view.last):
            tensor.zero_()
        return scores

    decoder, x = tiny_decoder(num_key_value_heads=2), embeddings(2, 22)
    before = x.clone()
    for K in (1, 3):  # at K = 1 the layer's input is the caller's own tensor
        got, want = (decoder(x, SPAN, (Stage(K, 5, score),)) for score in (vandal, text_to_image))
        assert torch.equal(x, before) and torch.equal(got.logits, want.logits)
        assert torch.equal(got.trace.stages[0].kept, want.trace.stages[0].kept)
        for ours, theirs in zip(got.cache, want.cache, strict=True):
            assert torch.equal(ours.k, theirs.k) and torch.equal(ours.positions, theirs.positions)


def test_eos_as_an_iterator(tiny_decoder, embeddings):
    """EOS ids that are used up after the first prompt."""
    decoder, x = tiny_decoder(), embeddings(3, 22)
    eos = [ids[1] for ids in generate(decoder, x, max_new_tokens=3).token_ids]
    want, got = (generate(decoder, x, max_new_tokens=6, eos_token_ids=ids) for ids in (eos, iter(eos)))
    assert got.token_ids == want.token_ids and set(want.finish) == {"eos"}


@pytest.mark.parametrize("count", [True, 2.0, "3", None, -1, 0])
def test_max_new_tokens_is_a_count(tiny_decoder, embeddings, count):
    """True taken for one token; no token asked for."""
    with pytest.raises(HimapError, match=f"max_new_tokens {count}"):
        generate(tiny_decoder(), embeddings(1, 22), max_new_tokens=count)


def test_prefill_and_decode_seconds(tiny_decoder, embeddings, monkeypatch):
    """Decode seconds that include the prefill, or a prefill that includes later tokens."""
    ticks = count(7000, 1000)
    monkeypatch.setattr(himap_ref.generation, "clock", lambda device: float(next(ticks)))
    assert generate(tiny_decoder(), embeddings(1, 22), max_new_tokens=5).seconds == {"prefill": 1000, "decode": 1000}


def test_clock_waits_for_its_device(monkeypatch):
    """Seconds of a GPU taken when its work was only queued, or another GPU waited for."""
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    for name in ("cpu", "cuda:1"):
        clock(torch.device(name))
    assert waited == [torch.device("cuda:1")]


# ---------------------------------------------------------------- numbers that a mutant changed and no test saw


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_angles_in_half_precision(tiny_decoder, dtype):
    """Angles of positions rounded to the weights' dtype: at n = 600 in bf16 a sixth of the kept tokens changes."""
    config, positions = tiny_decoder().config, torch.arange(600, 4096)
    channels = torch.arange(config.head_dim // 2, dtype=torch.float64)
    exact = positions[:, None].double() * 10000.0 ** (-2 * channels / config.head_dim)
    for got, want in zip(rope(positions[None], config, dtype), (exact.cos(), exact.sin()), strict=True):
        want = torch.cat((want, want), dim=-1)[None, :, None]
        assert got.dtype == dtype
        assert_close(got.double(), want.to(dtype).double(), rtol=0, atol=2 * torch.finfo(dtype).eps + 3e-4)


@pytest.mark.parametrize("top_p, kept", [(0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4), (0.6, 3)])
def test_edge_of_top_p(top_p, kept):
    """A token beyond the nucleus kept where the likelier ones reach top_p exactly."""
    assert (probabilities(torch.zeros(4), Sampling(1.0, top_p)) > 0).sum() == kept


def test_chance_draws_anew_at_each_stage(tiny_decoder, embeddings):
    """The same numbers at both stages: the second keeps what the first ranked highest, and is no draw of its own."""
    first, second = tiny_decoder()(embeddings(1, 40), (4, 34), (Stage(1, 15, random), Stage(3, 5, random))).trace.stages
    again = first.scores[0].gather(0, first.kept[0]).topk(5).indices.sort().values
    assert second.kept[0].tolist() != first.kept[0][again].tolist()
    assert not torch.equal(first.scores[0][:15], second.scores[0])


@pytest.mark.parametrize("reducer", [ClsAttention(9), AveragePool(4)], ids=repr)
def test_flops_of_a_reducer(shapes, scene_picture, reducer):
    """The model's own FLOPs put in the place of the reducer's, in an answer or in what it is compared with."""
    flops, answer = counted(partial(shapes.generate, scene_picture, "What color is the star?", reducer=reducer))
    assert answer.flops.total == flops
    assert (answer.flops.vision, answer.flops.projector) == reducer.flops(shapes.config)
    own = vision_flops(shapes.config), projector_flops(shapes.config)
    assert (answer.flops.vanilla.vision, answer.flops.vanilla.projector) == own
    plain = shapes.generate(scene_picture, "What color is the star?", max_new_tokens=len(answer.token_ids))
    if len(plain.token_ids) == len(answer.token_ids):
        assert answer.flops.vanilla.total == plain.flops.total


# ---------------------------------------------------------------- methods by name


@pytest.mark.parametrize("name", [name for name in METHODS if name != "himap-caption"])
def test_names_for_stages(shapes, scene_picture, name):
    """A name that the decoder, the model or the generator does not know, or takes for another method."""
    question, text = "What color is the star?", shapes.config.text_config
    stages = METHODS[name](text.num_hidden_layers)
    answer = shapes.generate(scene_picture, question, stages, 2)
    ids, pixels = torch.tensor([answer.prompt_ids]), shapes.preprocess(scene_picture)
    x = shapes.embed(answer.prompt_ids, shapes.embed_image(pixels)[0])[None]
    span, want = answer.image_span, [stage.kept.tolist() for stage in answer.trace.stages]
    outs = [shapes.language_model(x, span, name), generate(shapes.language_model, x, span, name, 1).traces[0]]
    traces = [outs[0].trace, outs[1]]
    if name != "himap":  # there it is what the weights recommend
        traces.append(shapes(ids, pixels, name).trace)
        assert shapes.generate(scene_picture, question, name, 2).token_ids == answer.token_ids
    for trace in traces:
        assert [stage.kept[0].tolist() for stage in trace.stages] == want


def test_himap_is_what_the_weights_recommend(shapes, scene_picture):
    """The paper's schedule under the name that run.py gives to the recommended one."""
    answer = shapes.generate(scene_picture, "What is it?", "himap", 1)
    out = shapes(torch.tensor([answer.prompt_ids]), shapes.preprocess(scene_picture), "himap")
    for got in (answer, out):
        assert [(stage.layer, stage.score) for stage in got.trace.stages] == [
            (1, "text_to_image"), (11, "image_to_image")
        ]  # fmt: skip


def test_unknown_name(tiny_decoder, embeddings):
    """A name read letter by letter."""
    with pytest.raises(HimapError, match="'hymap' is unknown: expected himap"):
        tiny_decoder()(embeddings(1, 22), SPAN, "hymap")


def test_score_functions_that_read_heads(tiny_decoder, embeddings):
    """Heads in another order than the weights', keys of another head, or rows of attention that are not counted."""
    decoder, x = tiny_decoder(num_key_value_heads=2), embeddings(2, 22)

    def one_head(view):
        q, k = view.q[:, -1, 3], view.k[:, :, 1]  # heads 2 and 3 share key head 1
        logits = (k @ q[:, :, None])[..., 0] / 8**0.5
        assert_close(view.maps(view.last)[:, 3, 0], logits.softmax(-1), rtol=1e-4, atol=1e-6)
        return image_to_image(view)

    decoder(x, SPAN, (Stage(2, 5, one_head),))


# ---------------------------------------------------------------- found by a reader of the loop


def test_positions_that_the_cache_holds_already(tiny_decoder, embeddings):
    """A cache whose length nobody told the generator: its tokens' positions given out twice, logits off by 5."""
    decoder, x = tiny_decoder(), embeddings(1, 22)
    cache = decoder(x[:, :8]).cache
    for start in (0, 7):
        with pytest.raises(HimapError, match="behind those in the cache"):
            generate(decoder, x[:, 8:], max_new_tokens=2, cache=cache, start=start)
    assert generate(decoder, x[:, 8:], max_new_tokens=2, cache=cache, start=8).token_ids


def test_maps_of_padding(tiny_decoder, embeddings):
    """Padding that ranks in a criterion that reads the heads apart."""

    def heads(view):
        return view.maps(view.text).amax(dim=1)[..., view.image].sum(dim=1)

    decoder, prompts = tiny_decoder(), [embeddings(1, n, seed=n)[0] for n in (22, 18, 27)]
    stages = (Stage(3, 5, heads),)
    batch = generate(decoder, prompts, SPAN, stages, 1).traces[0]
    for b, prompt in enumerate(prompts):
        (alone,) = generate(decoder, [prompt], SPAN, stages, 1).traces[0].stages
        assert batch.stages[0].kept[b].tolist() == alone.kept[0].tolist()


def test_an_edited_cache(tiny_decoder, embeddings):
    """A cache made from another one whose buffers go on holding what was replaced."""
    decoder, x = tiny_decoder(), embeddings(1, 22)
    with torch.no_grad():
        out = decoder(x[:, 19:20], positions=torch.tensor([[19]]), cache=decoder(x[:, :19]).cache)
        edited = [replace(layer, v=layer.v * 0) for layer in out.cache]
        fresh = [LayerCache(layer.k, layer.v * 0, layer.positions) for layer in out.cache]
        got, want = (decoder(x[:, 20:], positions=torch.tensor([[20, 21]]), cache=cache) for cache in (edited, fresh))
    assert torch.equal(got.logits, want.logits)


@pytest.mark.parametrize("stages, message", [("bogus", "unknown"), ((Stage(99, 1, text_to_image),), "does not exist")])
def test_stages_are_checked_without_a_picture(shapes, stages, message):
    """A mistake that shows only with the first picture."""
    first = shapes.generate(None, "What is it?", max_new_tokens=1)
    for options in ({}, {"past": first.past}):
        with pytest.raises(HimapError, match=message):
            shapes.generate(None, "What is it?", stages, 1, **options)


def test_an_answer_that_ends_in_the_image_token(shapes, scene_picture):
    """The word of that id, said by the model, taken for a second picture in the next turn."""
    first = shapes.generate(scene_picture, "What is it?", "himap", 2).past
    past = replace(first, ids=[*first.ids[:-1], shapes.config.image_token_index])
    answer = shapes.generate(None, "And then?", past=past, max_new_tokens=1)
    assert answer.image_span == first.image_span and answer.prompt_ids[: len(past.ids)] == past.ids


def test_a_prompt_of_image_tokens_alone(tiny_llava):
    """No words to look up: torch's own error about their type."""
    model = tiny_llava()
    assert model(torch.full((1, 16), 96), torch.zeros(1, 3, 20, 20)).logits.shape == (1, 97)


def turned(position, channel, config):
    """The angle of a channel at a position, by the words of the published rules, a number at a time."""
    angle = position * config.rope_theta ** (-2 * channel / config.head_dim)
    if config.rope_type == "default":
        return angle
    if config.rope_type == "linear":
        return angle / config.factor
    wavelength = 2 * math.pi * config.rope_theta ** (2 * channel / config.head_dim)  # LLaMA-3.1's
    turns = config.original_max_position_embeddings / wavelength
    if turns >= config.high_freq_factor:
        return angle
    if turns <= config.low_freq_factor:
        return angle / config.factor
    smooth = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    return (1 - smooth) * angle / config.factor + smooth * angle


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_longer_contexts(kind):
    """Channels that turn faster for a longer context, not slower; slow ones taken for fast ones; no mixture between."""
    config = TextConfig(
        hidden_size=64, num_attention_heads=1, rope_type=kind, factor=8.0, original_max_position_embeddings=200,
    )  # fmt: skip
    cos, sin = rope(torch.tensor([[0, 1, 7, 300]]), config, torch.float32)
    for i, position in enumerate((0, 1, 7, 300)):
        for channel in range(32):
            angle = turned(position, channel, config)
            for half in (channel, channel + 32):
                assert float(cos[0, i, 0, half]) == pytest.approx(math.cos(angle), abs=1e-4)
                assert float(sin[0, i, 0, half]) == pytest.approx(math.sin(angle), abs=1e-4)
