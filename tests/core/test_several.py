"""Several pictures in one prompt: in the decoder their tokens are moved together, and nothing may change."""

import json
from functools import partial

import pytest
import torch
from test_flops import counted
from test_pruning import SCHEDULES, image_tokens, slow_decoder
from tokenizers import Tokenizer
from torch.testing import assert_close
from toys import make_tokenizer, noise

from himap_ref import HimapError, Stage, image_to_image, text_to_image
from himap_ref.cache import LayerCache
from himap_ref.flops import pass_flops, vision_flops
from himap_ref.generation import generate
from himap_ref.methods.plan import plan_prefill
from himap_ref.methods.reducers import ClsAttention
from himap_ref.methods.scores import SCORES, image_to_image_relative
from himap_ref.prompt import encode_prompt
from himap_ref.pruning import LayerView
from himap_ref.studies.questions.drawing import draw
from himap_ref.studies.questions.scenes import UNSEEN, make_scene

SPANS = {  # of 20 tokens
    "two": (3, 9, 11, 18), "no word before": (0, 5, 6, 12), "three": (2, 4, 5, 6, 9, 17), "far apart": (1, 6, 13, 18),
}  # fmt: skip
NEAR = {"atol": 2e-5, "rtol": 1e-4}
TWO = Stage(1, 0.5, text_to_image), Stage(3, 3, image_to_image)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("span", SPANS.values(), ids=SPANS)
def test_dropping_is_hiding(tiny_decoder, embeddings, span, schedule):
    """Each picture ranked alone, words between them pruned or made to rank, rotated by their new places, or seen by
    what stands before them."""
    decoder, x, stages = tiny_decoder(num_key_value_heads=2), embeddings(1, 20), SCHEDULES[schedule]
    hidden, logits, kept, scores, _ = slow_decoder(decoder, x[0], span, stages)
    out = decoder(x, span, stages, all_rows=True)
    own, left = image_tokens(span), [i for i in range(20) if i not in image_tokens(span) or i in kept[-1]]
    assert [[own[i] for i in stage.kept[0]] for stage in out.trace.stages] == kept
    for stage, slow in zip(out.trace.stages, scores, strict=True):
        if stage.score != "none":
            assert_close(stage.scores[0], torch.tensor(slow), **NEAR)
    assert_close(out.hidden[0].double(), hidden[left], **NEAR)  # in the prompt's order
    assert_close(out.logits[0].double(), logits[-1], **NEAR)
    assert_close(decoder(x, span, stages).logits, out.logits, **NEAR)


@pytest.mark.parametrize("span", SPANS.values(), ids=SPANS)
def test_without_stages(tiny_decoder, embeddings, span):
    """A prompt that is answered otherwise once the decoder knows where its pictures are."""
    decoder, x = tiny_decoder(), embeddings(2, 20)
    out, plain = decoder(x, span, all_rows=True), decoder(x, all_rows=True)
    assert_close(out.hidden, plain.hidden, **NEAR)
    assert_close(out.logits, plain.logits, **NEAR)


@pytest.mark.parametrize("reprune", [False, True])
def test_batch_prefix_and_answers(tiny_decoder, embeddings, reprune):
    """Padding, a cached beginning or generated tokens that end up between or before the pictures."""
    decoder, span = tiny_decoder(), SPANS["two"]
    prompts = [embeddings(1, n, seed=n)[0] for n in (20, 25, 22)]
    ask = partial(generate, decoder, image_span=span, stages=TWO, max_new_tokens=6, reprune=reprune)
    together = ask(prompts)
    for b, prompt in enumerate(prompts):
        alone = ask([prompt])
        assert together.token_ids[b] == alone.token_ids[0]
        kept = [[stage.kept[at].tolist() for stage in out.traces[-1 if reprune else 0].stages]
                for out, at in ((together, b), (alone, 0))]  # fmt: skip
        assert kept[0] == kept[1] and len(kept[0][0]) == 7
    if not reprune:
        begun = decoder(prompts[0][None, :3]).cache
        rest = generate(decoder, [prompts[0][3:]], span, TWO, 6, cache=begun, start=3)
        assert rest.token_ids[0] == together.token_ids[0]
        _, logits, _, _, _ = slow_decoder(decoder, prompts[0], span, [Stage(1, 7, text_to_image), TWO[1]])
        assert_close(together.first_logits[0].double(), logits[-1], **NEAR)


@pytest.mark.parametrize("span", [(3, 9, 11), (3, 9, 9, 12), (11, 15, 3, 9), (3, 9, 8, 12), (3, 9, 11, 21), (3, 3)])
def test_refused(tiny_decoder, embeddings, span):
    """An end without a beginning, pictures out of order or one within another: other tokens taken for image tokens."""
    with pytest.raises(HimapError, match="does not lie within the 20 tokens of the prompt"):
        tiny_decoder()(embeddings(1, 20), span, TWO)
    with pytest.raises(HimapError, match="no text follows the image"):
        tiny_decoder()(embeddings(1, 20), (3, 9, 11, 20), TWO)


@pytest.mark.parametrize("score", SCORES)
def test_every_score(tiny_decoder, embeddings, score):
    """A criterion that counts rows where it means positions; FLOPs of rows that are not there."""
    decoder, span, x = tiny_decoder(), (3, 9, 11, 17), embeddings(2, 20)
    stages = Stage(1, 6, SCORES[score]), Stage(3, 2, SCORES[score])
    flops, out = counted(decoder, x, span, stages)
    if score != "dart":  # whose own products count as rows of attention
        assert flops == 2 * pass_flops(decoder.config, out.trace.layers)
    assert plan_prefill(decoder.config, (5, 17), 20, stages) == out.trace.layers  # as if the words stood before


def test_relative_score_of_flat_attention():
    """The words between two pictures counted as keys of the first one: it would be worth more than the second."""
    q, k, hidden = torch.zeros(1, 12, 2, 4), torch.zeros(1, 12, 2, 4), torch.zeros(1, 12, 8)
    positions = torch.tensor([[0, 5, 6, 1, 2, 3, 4, 7, 8, 9, 10, 11]])  # pictures at 1 to 4 and at 7 to 9
    view = LayerView(q, LayerCache(k, k, positions), hidden, positions, slice(3, 10))
    assert_close(image_to_image_relative(view), torch.ones(1, 7))


# ---------------------------------------------------------------- pictures and words


QUESTION = "What color is the star?"


@pytest.fixture(scope="module")
def pictures():
    return [draw(make_scene(UNSEEN + 3861)), noise(90, 120)]


def test_asked_together(shapes, pictures):
    """A batch whose prompts share their pictures, exchange them or count one's FLOPs for all."""
    exchanged = pictures[::-1]
    both = shapes.generate([pictures, tuple(exchanged)], [QUESTION, "Where is the star?"], "himap", max_new_tokens=3)
    alone = [shapes.generate(pictures, QUESTION, "himap", 3),
             shapes.generate(exchanged, "Where is the star?", "himap", 3)]  # fmt: skip
    for one, other in zip(both, alone, strict=True):
        assert one.token_ids == other.token_ids and one.flops == other.flops and one.image_span == (11, 155, 156, 300)
        assert [s.kept.tolist() for s in one.trace.stages] == [s.kept.tolist() for s in other.trace.stages]
        assert [len(stage.kept) for stage in one.trace.stages] == [144, 36] and max(one.trace.stages[0].kept) > 143
    assert alone[0].prompt_ids != alone[1].prompt_ids and not torch.equal(alone[0].first_logits, alone[1].first_logits)
    flops, _ = counted(lambda: shapes.generate(pictures, QUESTION, "himap", 3))
    assert flops == alone[0].flops.total and alone[0].flops.vision == 2 * vision_flops(shapes.config)
    single = shapes.generate([pictures[0]], QUESTION, "himap", 3)
    assert single.flops == shapes.generate(pictures[0], QUESTION, "himap", 3).flops  # a list of one is one


def test_first_of_all():
    """Two pictures at the very start taken for a template's and a tokenizer's BOS, one of them too many."""
    tokenizer = Tokenizer.from_str(
        json.dumps(json.loads(make_tokenizer("byte-level").to_str()) | {"post_processor": None})
    )
    image = tokenizer.token_to_id("<image>")  # and no BOS before it
    assert encode_prompt(tokenizer, "Why?", "<image>{question}", image, (2, 3)).count(image) == 5


def test_embed(shapes):
    """Image tokens in another order, or words in their places."""
    image, d = shapes.config.image_token_index, shapes.config.text_config.hidden_size
    tokens = torch.arange(3.0)[:, None].expand(3, d)
    x = shapes.embed([1, image, image, 5, image, 7], tokens)
    assert torch.equal(x[[1, 2, 4]], tokens)
    assert torch.equal(x[[0, 3, 5]], shapes.language_model.embed_tokens.weight[[1, 5, 7]])
    with pytest.raises(HimapError, match="the prompt has 2 image tokens, the picture 3"):
        shapes.embed([1, image, 5, image], tokens)


def test_prefix_turns_and_reducers(shapes, pictures):
    """A cached beginning that loses its place before several pictures; a second turn that begins behind the first one;
    an unpruned run of one picture held against two."""
    first = shapes.generate(pictures, QUESTION, "himap", 3)
    assert shapes.generate(pictures, QUESTION, "himap", 3, past=shapes.prefix()).token_ids == first.token_ids
    plain = shapes.generate(pictures, QUESTION, max_new_tokens=3)
    second = shapes.generate(None, "Where is it?", past=plain.past, max_new_tokens=2)
    pixels = torch.cat([shapes.preprocess(picture) for picture in pictures])
    whole = shapes(torch.tensor([second.prompt_ids]), pixels)
    assert second.image_span == plain.image_span and len(plain.image_span) == 4
    assert_close(second.first_logits[None], whole.logits, atol=1e-4, rtol=0)
    reduced = shapes.generate(pictures, QUESTION, reducer=ClsAttention(20), max_new_tokens=3)
    assert reduced.image_span == (11, 31, 32, 52) and reduced.flops.vanilla == plain.flops.vanilla
    assert reduced.flops.vision == 2 * ClsAttention(20).flops(shapes.config)[0]
    assert len(reduced.token_ids) == len(plain.token_ids)
    later = shapes.generate(None, "Where is it?", past=reduced.past, max_new_tokens=2)
    assert len(later.token_ids) == len(second.token_ids) and later.flops.vanilla == second.flops.vanilla


def test_refused_lists(shapes, pictures):
    """Two pictures of one question taken for a batch, or one question's for another's."""
    for images, asked in (
        (pictures, [QUESTION]), ([pictures, None], [QUESTION] * 2), ([pictures, []], [QUESTION] * 2), ([], [QUESTION]),
    ):  # fmt: skip
        with pytest.raises(HimapError, match=f"a batch of {len(asked)} questions needs as many pictures, or None"):
            shapes.generate(images, asked)
    with pytest.raises(HimapError, match="equally many image tokens, not 144 and 288: ask one by one"):
        shapes.generate([pictures, pictures[:1]], [QUESTION] * 2)
    with pytest.raises(HimapError, match="NoneType: cannot be read as a picture"):
        shapes.generate([pictures[0], None], QUESTION)
