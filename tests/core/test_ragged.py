"""Batches of unequal prompts: every item is what it would be alone: kept tokens, ids, ends, logits, trace, FLOPs."""

import random
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from test_flops import counted
from test_pruning import slow_decoder
from torch.testing import assert_close

from himap_ref import Llava, Stage, image_to_image, text_to_image
from himap_ref.cache import PADDING
from himap_ref.flops import pass_flops
from himap_ref.generation import generate
from himap_ref.methods.scores import SCORES
from himap_ref.sampling import Sampling

NEAR = {"rtol": 1e-4, "atol": 1e-4}
D, SEEDS = 32, 80
WEIGHTS = Path(__file__).parents[2] / "weights" / "shapes"


def draw(seed):
    """A decoder's changes, prompts of unequal lengths with one image span, stages, and how to generate."""
    r = random.Random(seed)
    layers, heads = r.randint(1, 6), r.choice([2, 4])
    changes = {
        "num_hidden_layers": layers, "num_attention_heads": heads, "attention_bias": r.random() < 0.3,
        "num_key_value_heads": r.choice([g for g in (1, 2, 4) if heads % g == 0]), "max_position_embeddings": 60,
    }  # fmt: skip
    start = r.randint(0, 6)
    stop = start + r.randint(2, 14)
    lengths = [stop + r.randint(1, 12) for _ in range(r.randint(2, 4))]
    at, left, stages = sorted(r.sample(range(1, layers), min(layers - 1, r.choice([0, 1, 2, 2, 3])))), stop - start, []
    for layer in at:
        left = r.randint(1, left)
        stages.append(Stage(layer, left, r.choice([SCORES[name] for name in SCORES])))
    options = {
        "max_new_tokens": r.randint(1, 6), "eos_token_ids": r.sample(range(97), 12), "reprune": r.random() < 0.4,
        "sampling": Sampling(1.5, 0.9, seed) if r.random() < 0.3 else Sampling(),
    }  # fmt: skip
    cached = r.randint(1, start) if start and r.random() < 0.5 else 0
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randn(n, D, generator=generator) for n in lengths]
    for prompt in prompts:
        prompt[:cached] = prompts[0][:cached]
    return changes, prompts, (start, stop), stages, options, cached


@pytest.mark.parametrize("seed", range(SEEDS))
def test_ragged_is_one_by_one(tiny_decoder, seed):
    """Padding that ranks, is seen, or stands for a prompt's last row; an end, a position or a draw of another item."""
    changes, prompts, span, stages, options, cached = draw(seed)
    decoder = tiny_decoder(seed, **changes)
    if cached:
        options |= {"cache": decoder(prompts[0][None, :cached]).cache, "start": cached}
        prompts = [prompt[cached:] for prompt in prompts]
    batch = generate(decoder, prompts, span, stages, **options)
    for b, prompt in enumerate(prompts):
        alone = generate(decoder, [prompt], span, stages, **options)
        assert (batch.token_ids[b], batch.finish[b]) == (alone.token_ids[0], alone.finish[0])
        assert_close(batch.first_logits[b], alone.first_logits[0], **NEAR)
        for step, want in enumerate(trace.item(0) for trace in alone.traces):
            got = batch.traces[step].item(b)
            assert got.layers == want.layers == alone.traces[step].layers
            for ours, theirs in zip(got.stages, want.stages, strict=True):
                assert ours.kept.tolist() == theirs.kept.tolist()
                assert ours.candidates.tolist() == theirs.candidates.tolist()
                assert_close(ours.scores, theirs.scores, **NEAR)
        for ours, theirs in zip(batch.cache, alone.cache, strict=True):  # where a next turn goes on
            ours, theirs = ours.item(b), theirs.item(0)
            assert torch.equal(ours.positions, theirs.positions)
            assert_close(ours.k, theirs.k, **NEAR)
            assert_close(ours.v, theirs.v, **NEAR)


def test_the_draws_cover_what_they_should():
    """Batches that are all alike: of one length, without a prefix, pruning or chance."""
    drawn = [draw(seed) for seed in range(SEEDS)]
    assert sum(len({*map(len, prompts)}) > 1 for _, prompts, *_ in drawn) > SEEDS * 3 / 4
    assert SEEDS / 5 < sum(options["reprune"] for *_, options, _ in drawn) < SEEDS * 4 / 5
    assert sum(options["sampling"] != Sampling() for *_, options, _ in drawn) > SEEDS / 5
    assert sum(cached > 0 for *_, cached in drawn) > SEEDS / 5
    assert sum(len(stages) > 1 for _, _, _, stages, *_ in drawn) > SEEDS / 4


@pytest.mark.parametrize("reprune", [False, True])
def test_context_of_each(tiny_decoder, reprune):
    """The longest prompt's end of the context put on all of them, or a position beyond it."""
    decoder, r = tiny_decoder(max_position_embeddings=24), torch.Generator().manual_seed(3)
    prompts = [torch.randn(n, D, generator=r) for n in (24, 22, 17)]
    out = generate(decoder, prompts, (4, 12), (Stage(2, 5, text_to_image),), 6, reprune=reprune)
    assert [len(ids) for ids in out.token_ids] == [1, 3, 6] and out.finish == ["context", "context", "length"]


def ragged(lengths, seed=0, padding=1.0):
    """(B, longest, d) whose padding is not zero, and positions."""
    x = torch.randn(len(lengths), max(lengths), D, generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(max(lengths)).expand(len(lengths), -1)
    real = positions < torch.tensor(lengths)[:, None]
    return torch.where(real[..., None], x, padding * 3), positions.masked_fill(~real, PADDING)


def heads_apart(view):
    """A criterion that reads each head for itself."""
    return view.maps(view.text).amax(dim=1)[..., view.image].sum(dim=1)


@pytest.mark.parametrize("score", [*SCORES.values(), heads_apart])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_padding_does_not_rank(tiny_decoder, K, score):
    """Padding among the text rows, the last row or the mean: at K >= 2 it looks at every image token differently."""
    decoder, lengths, span = tiny_decoder(), (18, 25, 21), (3, 15)
    stages = (Stage(K, 5, score), Stage(4, 2, score))
    outs = [decoder(x, span, stages, positions=positions)
            for x, positions in (ragged(lengths, padding=1.0), ragged(lengths, padding=-2.0))]  # fmt: skip
    for b, n in enumerate(lengths):
        x, positions = ragged(lengths)
        alone = decoder(x[b : b + 1, :n], span, stages)
        for out in outs:
            assert_close(out.logits[b], alone.logits[0], **NEAR)
            for ours, theirs in zip(out.trace.item(b).stages, alone.trace.stages, strict=True):
                assert ours.kept.tolist() == theirs.kept[0].tolist()
                assert_close(ours.scores, theirs.scores[0], **NEAR)


def test_against_the_slow_decoder(tiny_decoder):
    """Alone and in a batch wrong in the same way."""
    decoder, lengths, span = tiny_decoder(num_key_value_heads=2), (18, 25), (3, 15)
    stages, (x, positions) = (Stage(2, 6, text_to_image), Stage(4, 3, image_to_image)), ragged(lengths)
    out = decoder(x, span, stages, positions=positions)
    for b, n in enumerate(lengths):
        _, logits, kept, _, _ = slow_decoder(decoder, x[b, :n], span, stages)
        assert [(stage.kept[b] + span[0]).tolist() for stage in out.trace.stages] == kept
        assert_close(out.logits[b].double(), logits[-1], **NEAR)


@pytest.mark.parametrize("reprune", [False, True])
def test_flops_of_the_batch(tiny_decoder, reprune):
    """Padding that is computed and not counted; an item's own count with the padding in it."""
    decoder, r = tiny_decoder(num_key_value_heads=2), torch.Generator().manual_seed(3)
    prompts = [torch.randn(n, D, generator=r) for n in (20, 25)]
    stages, options = (Stage(1, 8, text_to_image), Stage(3, 2, image_to_image)), {"reprune": reprune}
    flops, batch = counted(lambda: generate(decoder, prompts, (4, 16), stages, 3, **options))
    assert flops == len(prompts) * sum(pass_flops(decoder.config, trace.layers) for trace in batch.traces)
    for b, prompt in enumerate(prompts):
        alone, _ = counted(lambda prompt=prompt: generate(decoder, [prompt], (4, 16), stages, 3, **options))
        own = sum(pass_flops(decoder.config, trace.item(b).layers) for trace in batch.traces)
        assert alone == own and (own < flops / 2) == (len(prompt) < 25)
        assert batch.traces[0].item(b).padding.tolist() == [0, 0]


def test_a_prompt_of_one_token(tiny_decoder):
    """The padding behind a prompt's only token taken for its last row, or for a token that needs a position."""
    decoder, (x, positions) = tiny_decoder(), ragged((1, 4))
    assert_close(decoder(x, positions=positions).logits[0], decoder(x[:1, :1]).logits[0], **NEAR)
    short = tiny_decoder(max_position_embeddings=1)
    assert_close(short(x[:1], positions=positions[:1]).logits, short(x[:1, :1]).logits, **NEAR)
    later, cache = torch.where(positions < PADDING, positions + 3, PADDING), decoder(x[1:, 1:]).cache
    turn, alone = decoder(x, positions=later, cache=cache), decoder(x[:1, :1], positions=later[:1, :1], cache=cache)
    assert_close(turn.logits[0], alone.logits[0], **NEAR)


def test_far_positions_are_no_padding(tiny_decoder):
    """The tokens of a long conversation taken for padding, and seen by nobody."""
    decoder, (x, _) = tiny_decoder(max_position_embeddings=2**20), ragged((4,))
    out = decoder(x, positions=torch.arange(2**20 - 4, 2**20)[None])
    assert out.trace.padding.tolist() == [[0, 0]]
    assert_close(out.logits, decoder(x).logits, rtol=0, atol=0.05)  # RoPE is relative; far angles are coarse in fp32


def test_more_tokens_behind_a_ragged_cache(tiny_decoder):
    """Padding of the cache taken for padding of the new rows: seen by them, or subtracted from their count."""
    decoder, lengths, span = tiny_decoder(), (18, 25, 21), (3, 15)
    x, positions = ragged(lengths)
    new = torch.randn(3, 4, D, generator=torch.Generator().manual_seed(8))
    out = decoder(x, span, (Stage(2, 6, text_to_image),), positions=positions)
    places = torch.tensor(lengths)[:, None] + torch.arange(4)
    places[0, 3] = PADDING  # and the first prompt has only three
    out = decoder(new, positions=places, cache=out.cache)
    for b, (n, size) in enumerate(zip(lengths, (3, 4, 4), strict=True)):
        alone = decoder(x[b : b + 1, :n], span, (Stage(2, 6, text_to_image),))
        alone = decoder(new[b : b + 1, :size], positions=torch.arange(n, n + size)[None], cache=alone.cache)
        assert_close(out.logits[b], alone.logits[0], **NEAR)
        assert out.trace.item(b).layers == alone.trace.layers


# ---------------------------------------------------------------- of a whole model

QUESTIONS = [
    "What color is the star?", "What is in the top left?",
    "Which shape is at the bottom right of this picture, if there is any at all? Answer with one word.",
]  # fmt: skip


@pytest.mark.parametrize("stages", ["himap", "fastv", "random", "none", "vtw"])
@pytest.mark.parametrize("options", [{}, {"reprune": True}, {"temperature": 2.0, "seed": 3}], ids=str)
def test_questions_of_any_lengths(shapes, scene_picture, stages, options):
    """A list of questions refused, or answered otherwise than one by one, for their lengths."""
    batch = shapes.generate(scene_picture, QUESTIONS, stages, 4, **options)
    assert len({len(answer.prompt_ids) for answer in batch}) > 2
    executed, B = batch[0].batch_flops, len(batch)
    for question, got in zip(QUESTIONS, batch, strict=True):
        want = shapes.generate(scene_picture, question, stages, 4, **options)
        assert (got.token_ids, got.finish, got.text) == (want.token_ids, want.finish, want.text)
        assert got.flops == want.flops and want.batch_flops == want.flops.decoder
        assert [s.kept.tolist() for s in got.trace.stages] == [s.kept.tolist() for s in want.trace.stages]
        assert_close(got.first_logits, want.first_logits, rtol=0, atol=1e-4)
    assert executed > sum(answer.flops.decoder for answer in batch) and executed % B == 0


def test_nan_of_an_ended_answer(shapes, scene_picture):
    """A batch that fails where each of its prompts alone does not: an ended answer's last token is never looked up."""
    model = deepcopy(shapes)
    free = [model.generate(scene_picture, question, "himap", 6) for question in QUESTIONS]
    rest = [i for answer in free for i in (*answer.prompt_ids, *answer.token_ids[:-1])]
    last = next(answer.token_ids[-1] for answer in free if answer.token_ids[-1] not in rest)
    model.language_model.embed_tokens.weight[last] = float("nan")
    for options in ({}, {"reprune": True}):
        batch = model.generate(scene_picture, QUESTIONS, "himap", 6, **options)
        assert [answer.token_ids for answer in batch] == [answer.token_ids for answer in free]


def test_loaded_in_inference_mode(scene_picture):
    """Weights without a version counter, by which a prefix is recognised: torch's own error."""
    with torch.inference_mode():
        model = Llava.from_pretrained(WEIGHTS)
        prefix = model.prefix()
        assert model.generate(scene_picture, QUESTIONS[0], "himap", past=prefix).text == "yellow"
