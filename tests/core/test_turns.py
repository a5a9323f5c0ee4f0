"""Turn by turn and chunk by chunk: equal to all at once, with what was dropped hidden; and only new tokens computed."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from test_flops import counted
from test_pruning import slow_decoder
from torch.testing import assert_close

import himap_ref.cache
from himap_ref import HIMAP, HimapError, Stage, image_to_image, text_to_image
from himap_ref.cache import LayerCache
from himap_ref.flops import pass_flops
from himap_ref.generation import generate

NEAR = {"rtol": 1e-4, "atol": 1e-4}
SPAN, N = (4, 16), 30
STAGES = Stage(1, 7, text_to_image), Stage(3, 3, image_to_image)
FIRST, SECOND, THIRD = "How many things are there?", "What color is the star?", "And is there a circle?"


def run(decoder, x, first, last, cache, **options):
    """Tokens first..last-1 of x behind a cache of those before."""
    positions = torch.arange(first, last).expand(len(x), -1)
    return decoder(x[:, first:last], positions=positions, cache=cache, **options)


# ---------------------------------------------------------------- the decoder


@pytest.mark.parametrize("cuts", [(1,), (4,), (13, 21), (5, 6, 7, 29), tuple(range(1, N))], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_chunks_are_the_whole(tiny_decoder, embeddings, cuts, kv_heads):
    """Several new tokens behind a cache: masked by their row instead of their position, or not among themselves."""
    decoder, x = tiny_decoder(num_key_value_heads=kv_heads), embeddings(2, N)
    want, cache, hidden = decoder(x, all_rows=True), None, []
    for first, last in zip((0, *cuts), (*cuts, N), strict=True):
        out = run(decoder, x, first, last, cache, all_rows=True)
        cache, hidden = out.cache, [*hidden, out.hidden]
        assert [layer.entered for layer in out.trace.layers] == [last - first] * 5
    assert_close(torch.cat(hidden, dim=1), want.hidden, **NEAR)
    assert_close(out.logits, want.logits, **NEAR)
    for ours, theirs in zip(cache, want.cache, strict=True):
        assert torch.equal(ours.positions, theirs.positions)
        assert_close(ours.k, theirs.k, **NEAR)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (4,), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("stages", [(), STAGES, (Stage(2, 5, text_to_image), Stage(4, 0, None))], ids=len)
def test_turns_are_hiding(tiny_decoder, embeddings, stages, sizes, kv_heads):
    """A later turn or token that sees what was pruned, or that misses what was not; two at once under a wrong mask."""
    decoder, x = tiny_decoder(num_key_value_heads=kv_heads), embeddings(1, N)
    _, logits, kept, _, _ = slow_decoder(decoder, x[0], SPAN, stages, prompt=22)
    out = decoder(x[:, :22], SPAN, stages)
    assert [(stage.kept[0] + SPAN[0]).tolist() for stage in out.trace.stages] == kept
    first = 22
    for size in sizes:
        out = run(decoder, x, first, first + size, out.cache)
        first += size
        assert_close(out.logits[0].double(), logits[first - 1], **NEAR)


def test_one_cache_for_many_turns(tiny_decoder, embeddings):
    """A turn that writes into the cache another one goes on from."""
    decoder, x, others = tiny_decoder(), embeddings(1, N), embeddings(3, N, seed=5)
    start = decoder(x[:, :20], SPAN, STAGES)
    with torch.no_grad():
        base = run(decoder, x, 20, 21, start.cache)  # from here on there is room behind the tokens
        wants = [run(decoder, other[None], 21, 24, deepcopy(base.cache)).logits for other in others]
        begun = [run(decoder, other[None], 21, 23, base.cache) for other in others]  # all, before one goes on
        for other, first, want in zip(others, begun, wants, strict=True):
            assert_close(run(decoder, other[None], 23, 24, first.cache).logits, want, **NEAR)
    many = run(decoder, others, 21, 24, base.cache)  # and a cache of one prompt serves three
    assert_close(many.logits, torch.cat(wants), **NEAR)


def test_steps_copy_nothing(tiny_decoder, embeddings):
    """All keys and values copied for every token, though there is room: right, and slower with every token."""
    decoder, x = tiny_decoder(), embeddings(1, N)
    with torch.no_grad():
        out, places = decoder(x[:, :20]), []
        for step in range(20, 24):
            out = run(decoder, x, step, step + 1, out.cache)
            places.append([t.data_ptr() for layer in out.cache for t in (layer.k, layer.v)])
    assert places[0] == places[1] == places[2] == places[3]


def test_tokens_that_do_not_fit_the_room(tiny_decoder, embeddings, monkeypatch):
    """More tokens than the buffers have room for, or more prompts, written into them all the same."""
    monkeypatch.setattr(himap_ref.cache, "ROOM", 2)
    decoder, x, others = tiny_decoder(), embeddings(1, N), embeddings(3, N, seed=5)
    with torch.no_grad():
        base = run(decoder, x, 20, 21, decoder(x[:, :20]).cache)
        assert_close(run(decoder, x, 21, 24, base.cache).logits, decoder(x[:, :24]).logits, **NEAR)
        whole = torch.cat((x[:, :21].expand(3, -1, -1), others[:, 21:22]), dim=1)
        assert_close(run(decoder, others, 21, 22, base.cache).logits, decoder(whole).logits, **NEAR)


def test_an_edited_cache(tiny_decoder, embeddings):
    """A cache made from another one whose buffers go on holding what was replaced."""
    decoder, x = tiny_decoder(), embeddings(1, N)
    with torch.no_grad():
        cache = run(decoder, x, 19, 20, decoder(x[:, :19]).cache).cache
        edited = [replace(layer, v=layer.v * 0) for layer in cache]
        fresh = [LayerCache(layer.k, layer.v * 0, layer.positions) for layer in cache]
        got, want = (run(decoder, x, 20, 22, each) for each in (edited, fresh))
    assert torch.equal(got.logits, want.logits)


def test_backward_through_steps(tiny_decoder, embeddings):
    """Keys written in place into what autograd remembers of an earlier step."""
    decoder, x = tiny_decoder(), embeddings(1, N).requires_grad_()
    out = decoder(x[:, :20], SPAN, STAGES)
    for step in range(20, 24):
        out = run(decoder, x, step, step + 1, out.cache)
    (got,) = torch.autograd.grad(out.logits[0, 5], x)
    whole = run(decoder, x, 20, 24, decoder(x[:, :20], SPAN, STAGES).cache)
    (want,) = torch.autograd.grad(whole.logits[0, 5], x)
    assert_close(got, want, **NEAR)
    assert got[0, 20:24].abs().min() > 0


def test_generation_goes_on_from_a_generation(tiny_decoder, embeddings):
    """A next turn that forgets the last token of the answer, or counts it twice."""
    decoder, x, turn = tiny_decoder(), embeddings(1, 22), embeddings(1, 3, seed=9)
    first = generate(decoder, x, SPAN, STAGES, 5)
    said = decoder.embed_tokens(torch.tensor(first.token_ids))
    second = generate(decoder, torch.cat((said[:, -1:], turn), 1), max_new_tokens=4, cache=first.cache, start=26)
    answer = decoder.embed_tokens(torch.tensor(second.token_ids))
    _, logits, *_ = slow_decoder(decoder, torch.cat((x, said, turn, answer), 1)[0], SPAN, STAGES, prompt=22)
    assert logits[29:33].argmax(-1).tolist() == second.token_ids[0]
    assert_close(second.first_logits[0].double(), logits[29], **NEAR)


# ---------------------------------------------------------------- a conversation


@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 1}, {"reprune": True}], ids=str)
@pytest.mark.parametrize("with_prefix", [False, True])
def test_conversation_is_hiding(shapes, scene_picture, options, with_prefix):
    """A second question that prunes anew, sees the dropped tokens, or pays for the first one again."""
    stages, decoder = (Stage(2, 40, text_to_image), Stage(6, 12, image_to_image)), shapes.language_model
    picture = shapes.embed_image(shapes.preprocess(scene_picture))[0]
    answer = shapes.generate(scene_picture, FIRST, stages, past=shapes.prefix() if with_prefix else None, **options)
    said = len(answer.prompt_ids)
    ranking = said + (len(answer.token_ids) - 1 if options.get("reprune") else 0)  # tokens when it was ranked last
    for question in (SECOND, THIRD):
        before, spoken = answer.past, answer.token_ids
        answer = shapes.generate(None, question, past=before)
        assert answer.prompt_ids[: len(before.ids)] == before.ids and before.length == len(before.ids) - 1
        _, logits, *_ = slow_decoder(
            decoder, shapes.embed(answer.prompt_ids, picture), answer.image_span, stages, ranking
        )
        assert_close(answer.first_logits.double(), logits[-1], **NEAR)
        new = len(answer.prompt_ids) - before.length
        assert [layer.entered for layer in answer.trace.layers] == [new] * 12 and answer.trace.stages == []
        text = shapes.tokenizer.decode(answer.prompt_ids[len(before.ids) :], skip_special_tokens=False)
        ended = spoken[-1] in shapes.eos_token_ids
        assert text == f"{'' if ended else '</s>'}USER: {question} ASSISTANT:"
        assert len(answer.prompt_ids) > said + len(spoken)
        said = len(answer.prompt_ids)


def test_conversations_of_a_batch(shapes, scene_picture):
    """Another item's cache, its padding, or the tokens of its longer answer, taken into a conversation."""
    questions = [FIRST, SECOND, "Which shape is at the bottom right of this picture, if there is any at all?"]
    batch = shapes.generate(scene_picture, questions, HIMAP)
    for question, answer in zip(questions, batch, strict=True):
        alone = shapes.generate(scene_picture, question, HIMAP)
        got, want = (shapes.generate(None, THIRD, past=one.past) for one in (answer, alone))
        assert got.token_ids == want.token_ids and got.prompt_ids == want.prompt_ids and got.flops == want.flops
        assert_close(got.first_logits, want.first_logits, **NEAR)


def test_follow_ups_of_one_conversation(shapes, scene_picture):
    """Several questions to the same conversation that disturb each other, alone or as a batch."""
    past = shapes.generate(scene_picture, FIRST, HIMAP).past
    batch = shapes.generate(None, [SECOND, THIRD], past=past)
    for _ in range(2):
        for question, of_batch in zip((SECOND, THIRD), batch, strict=True):
            alone = shapes.generate(None, question, past=past)
            assert alone.token_ids == of_batch.token_ids
            assert_close(alone.first_logits, of_batch.first_logits, **NEAR)


def test_flops_of_a_turn(shapes, scene_picture):
    """A turn that counts the picture again, or a vanilla conversation that has pruned."""
    config, first = shapes.config, shapes.generate(scene_picture, FIRST, HIMAP)
    past, plain = first.past, shapes.generate(scene_picture, FIRST)
    flops, answer = counted(lambda: shapes.generate(None, SECOND, past=past))
    assert answer.flops.total == flops == answer.flops.decoder and answer.flops.vision == 0
    vanilla = shapes.generate(None, SECOND, past=plain.past, max_new_tokens=len(answer.token_ids))
    if first.token_ids == plain.token_ids and len(vanilla.token_ids) == len(answer.token_ids):
        assert vanilla.flops.total == answer.flops.vanilla.total
    steps = [trace.layers for trace in vanilla.traces]
    assert vanilla.flops.decoder == sum(pass_flops(config.text_config, layers) for layers in steps)
    assert vanilla.flops.ratio == 1 > answer.flops.ratio


def test_turns_that_do_not_fit(shapes, scene_picture):
    """A second picture taken for the first, other weights' conversation, a turn beyond the context: silently."""
    past = shapes.generate(scene_picture, FIRST, HIMAP).past
    with pytest.raises(HimapError, match="give None"):
        shapes.generate(scene_picture, SECOND, past=past)
    with pytest.raises(HimapError, match="other weights"):
        deepcopy(shapes).generate(None, SECOND, past=past)
    room = shapes.config.text_config.max_position_embeddings
    with pytest.raises(HimapError, match=f"context {room}"):
        shapes.generate(None, "and " * room + "?", past=past)


def test_an_answer_that_ends_in_the_image_token(shapes, scene_picture):
    """The word of that id, said by the model, taken for a second picture in the next turn."""
    first = shapes.generate(scene_picture, FIRST, HIMAP, 2).past
    past = replace(first, ids=[*first.ids[:-1], shapes.config.image_token_index])
    answer = shapes.generate(None, SECOND, past=past, max_new_tokens=1)
    assert answer.image_span == first.image_span and answer.prompt_ids[: len(past.ids)] == past.ids


def test_text_only_conversation(shapes):
    """A conversation without a picture taken for a prefix."""
    first = shapes.generate(None, FIRST, max_new_tokens=3)
    second = shapes.generate(None, SECOND, past=first.past, max_new_tokens=3)
    assert second.image_span is None and second.prompt_ids[: len(first.past.ids)] == first.past.ids
    embeds = shapes.embed(second.prompt_ids, None)
    _, logits, *_ = slow_decoder(shapes.language_model, embeds, (1, 2))
    assert_close(second.first_logits.double(), logits[-1], **NEAR)


def test_short_repr(shapes, scene_picture):
    """print(out) in 150 lines of numbers."""
    answer = shapes.generate(scene_picture, FIRST, HIMAP)
    shown = [repr(answer), repr(answer.trace), repr(answer.past), repr(shapes.prefix())]
    shown.append(repr(shapes(torch.tensor([answer.prompt_ids]), shapes.preprocess(scene_picture), HIMAP)))
    shown.append(repr(generate(shapes.language_model, torch.randn(2, 5, 128), max_new_tokens=3)))
    assert all(len(text) < 700 and "tensor(" not in text for text in shown), shown
    assert repr(answer.text) in shown[0] and "text_to_image" in shown[1]
