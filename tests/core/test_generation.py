"""Generation: with and without cache, sampling, and where answers end."""

from inspect import signature
from itertools import count

import pytest
import torch
from torch.testing import assert_close

import himap_ref.cache
import himap_ref.generation
from himap_ref import Llava, Stage, image_to_image, text_to_image
from himap_ref.commands.ask import parse_args
from himap_ref.generation import clock, generate
from himap_ref.sampling import Sampling, choose, probabilities

STAGES = Stage(1, 7, text_to_image), Stage(3, 3, image_to_image)
SPAN = (4, 16)


def test_defaults(monkeypatch):
    """Answers of another length from the decoder, the assistant and the command."""
    monkeypatch.setattr("sys.argv", ["himap"])
    limits = [signature(ask).parameters["max_new_tokens"].default for ask in (generate, Llava.generate)]
    assert [*limits, parse_args().max_new_tokens] == [128] * 3


def test_cached_is_uncached(tiny_decoder, embeddings):
    """A cache that loses, doubles or misplaces tokens."""
    decoder, x = tiny_decoder(num_key_value_heads=2), embeddings(2, 22)
    cached, uncached = generate(decoder, x, SPAN, (), 12), generate(decoder, x, SPAN, (), 12, reprune=True)
    assert cached.token_ids == uncached.token_ids
    assert_close(cached.first_logits, uncached.first_logits)
    assert len({len(ids) for ids in cached.token_ids}) == 1 and len(set(cached.token_ids[0])) > 3
    assert generate(decoder, x, max_new_tokens=12).token_ids == cached.token_ids  # a span alone changes nothing


@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("room", [1, 2, 128])
def test_step_logits_do_not_depend_on_the_cache(tiny_decoder, embeddings, monkeypatch, room, B):
    """Small differences of decode steps that greedy tokens hide; a token lost when the cache's buffers grow."""
    monkeypatch.setattr(himap_ref.cache, "ROOM", room)
    decoder, x = tiny_decoder(), embeddings(B, 26)
    with torch.no_grad():
        out = decoder(x[:, :20])
        for step in range(20, 26):
            out = decoder(x[:, step : step + 1], positions=torch.full((B, 1), step), cache=out.cache)
            assert_close(out.logits, decoder(x[:, : step + 1]).logits, rtol=1e-4, atol=5e-5)


def test_first_token_is_the_same_with_reprune(tiny_decoder, embeddings):
    """The prefill doing something else when later tokens are to be ranked anew."""
    decoder, x = tiny_decoder(), embeddings(2, 22)
    cached, again = generate(decoder, x, SPAN, STAGES, 4), generate(decoder, x, SPAN, STAGES, 4, reprune=True)
    assert torch.equal(cached.first_logits, again.first_logits)
    assert [trace.layers[0].entered for trace in cached.traces] == [22, 1, 1, 1]
    assert [trace.layers[0].entered for trace in again.traces] == [22, 23, 24, 25]
    assert [len(trace.stages) for trace in (*cached.traces, *again.traces)] == [2, 0, 0, 0, 2, 2, 2, 2]


@pytest.mark.parametrize("reprune", [False, True])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.3, 0.95, seed=5)], ids=["greedy", "sampled"])
def test_batch_is_one_by_one(tiny_decoder, embeddings, sampling, reprune):
    """Items of a batch that share random numbers, a choice of tokens, or an end; EOS ids that the first uses up."""
    decoder, x = tiny_decoder(), embeddings(3, 22)
    options = {"sampling": sampling, "reprune": reprune}
    stops = generate(decoder, x[1:2], SPAN, STAGES, 6, **options).token_ids[0][2:3]
    batch = generate(decoder, x, SPAN, STAGES, 6, eos_token_ids=iter(stops), **options)
    alone = [generate(decoder, x[b : b + 1], SPAN, STAGES, 6, eos_token_ids=stops, **options) for b in range(3)]
    assert batch.token_ids == [one.token_ids[0] for one in alone]
    assert batch.finish == [one.finish[0] for one in alone]
    assert len({tuple(ids) for ids in batch.token_ids}) > 1 and "eos" in batch.finish and "length" in batch.finish


# ---------------------------------------------------------------- sampling


def brute_probabilities(logits, temperature, top_p):
    weights = {i: torch.exp(torch.tensor(v / temperature, dtype=torch.float64)).item() for i, v in enumerate(logits)}
    total, kept, reached = sum(weights.values()), {}, 0.0
    for i in sorted(weights, key=lambda i: (-weights[i], i)):
        kept[i] = weights[i]
        reached += weights[i] / total
        if reached >= top_p:
            break
    return [kept.get(i, 0.0) / sum(kept.values()) for i in weights]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_probabilities(temperature, top_p):
    """The token that crosses top_p left out, the cut made before the temperature, or no renormalising."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2
    want = brute_probabilities(logits.tolist(), temperature, top_p)
    got = probabilities(logits, Sampling(temperature, top_p))
    assert_close(got, torch.tensor(want), rtol=1e-4, atol=1e-6)
    if top_p < 1:
        assert (got > 0).tolist() == [p > 0 for p in want]


@pytest.mark.parametrize("top_p, kept", [(0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4), (0.6, 3)])
def test_edge_of_top_p(top_p, kept):
    """A token beyond the nucleus kept where the likelier ones reach top_p exactly; of equals not those of lower id."""
    assert probabilities(torch.zeros(4), Sampling(1.0, top_p)).nonzero().flatten().tolist() == [*range(kept)]
    equals = probabilities(torch.zeros(64), Sampling(1.0, 0.07))  # so many that the order of a sort shows
    assert equals.nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


def test_whole_vocabulary_at_top_p_1():
    """A running sum that rounds to 1 early and cuts the tail of a large vocabulary."""
    logits = torch.randn(32064, generator=torch.Generator().manual_seed(3)) * 2  # the sum is 1 before the last 28
    assert (probabilities(logits, Sampling(1.0, 1.0)) > 0).all()


def test_tiny_temperature():
    """inf - inf on the way to the softmax, and a crash instead of the likeliest token."""
    for scale in (1, 1e9):
        assert probabilities(scale * torch.tensor([1.0, 3.0, 2.0]), Sampling(1e-40)).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("temperature", [0.8, 1.0])
def test_draws_follow_the_probabilities(temperature):
    """Draws from other probabilities than those computed, or the same draw every time."""
    logits, sampling = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5]]), Sampling(temperature, 0.9)
    generator = torch.Generator().manual_seed(0)
    draws = choose(logits.expand(1000, 5), sampling, [generator] * 1000)
    assert_close(draws.bincount(minlength=5) / 1000, probabilities(logits[0], sampling), rtol=0, atol=0.03)


def test_greedy_unless_asked():
    """Another default: an answer drawn from fewer tokens than the caller thinks, or by chance."""
    assert Sampling() == Sampling(temperature=0.0, top_p=1.0, seed=0)


def test_each_prompt_draws_for_itself():
    """Prompts without a generator left out of the answer."""
    with pytest.raises(ValueError):
        choose(torch.zeros(2, 5), Sampling(1.0), [torch.Generator()])


def test_seed(tiny_decoder, embeddings):
    """Sampling that cannot be repeated, or that ignores its seed."""
    decoder, x = tiny_decoder(), embeddings(1, 22)
    a, b, c = (generate(decoder, x, SPAN, STAGES, 8, sampling=Sampling(1.5, 1.0, seed)).token_ids for seed in (1, 1, 2))
    assert a == b != c


def test_low_temperature_is_greedy(tiny_decoder, embeddings):
    """Logits multiplied by the temperature instead of divided."""
    decoder, x = tiny_decoder(), embeddings(2, 22)
    greedy = generate(decoder, x, SPAN, STAGES, 5).token_ids
    assert generate(decoder, x, SPAN, STAGES, 5, sampling=Sampling(1e-4)).token_ids == greedy
    assert generate(decoder, x, SPAN, STAGES, 5, sampling=Sampling(5.0, 1e-6)).token_ids == greedy


# ---------------------------------------------------------------- ends


@pytest.mark.parametrize("reprune", [False, True])
def test_finish(tiny_decoder, embeddings, reprune):
    """An end off by one, or under a wrong name."""
    decoder, x = tiny_decoder(), embeddings(1, 22)
    free = generate(decoder, x, SPAN, STAGES, 6, reprune=reprune)
    ids = free.token_ids[0]
    assert (len(ids), free.finish) == (6, ["length"])
    end = next(i for i, id in enumerate(ids) if i > 1 and id not in ids[:i])
    stopped = generate(decoder, x, SPAN, STAGES, 6, eos_token_ids=(96, ids[end]), reprune=reprune)
    assert (stopped.token_ids, stopped.finish) == ([ids[: end + 1]], ["eos"])
    assert len(stopped.traces) == end + 1  # nothing is computed after the end


@pytest.mark.parametrize("reprune", [False, True])
@pytest.mark.parametrize("room", [0, 3])
def test_context(tiny_decoder, embeddings, room, reprune):
    """A position beyond the model's context, or a last possible token not given."""
    decoder, x = tiny_decoder(max_position_embeddings=22 + room), embeddings(1, 22)
    out = generate(decoder, x, SPAN, STAGES, 50, reprune=reprune)
    want = generate(tiny_decoder(), x, SPAN, STAGES, room + 1, reprune=reprune)
    assert (out.token_ids, out.finish, want.finish) == (want.token_ids, ["context"], ["length"])
    as_asked = generate(decoder, x, SPAN, STAGES, room + 1, reprune=reprune)
    assert as_asked.finish == ["length"]  # no more was asked for, so the context is not what stopped it


def test_streaming(tiny_decoder, embeddings):
    """Tokens of another prompt, or tokens after the end, sent to the reader."""
    decoder, x, seen = tiny_decoder(), embeddings(2, 22), []
    eos = generate(decoder, x, SPAN, STAGES, 3).token_ids[0][-1:]
    out = generate(decoder, x, SPAN, STAGES, 7, eos_token_ids=eos, on_token=seen.append)
    assert seen == out.token_ids[0]
    assert len(out.token_ids[0]) <= 3 < len(out.token_ids[1]) == 7


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


def test_generating_keeps_no_graph(tiny_decoder, embeddings):
    """Memory that grows with every token, because autograd remembers them all."""
    out = generate(tiny_decoder().requires_grad_(True), embeddings(1, 22), SPAN, STAGES, 3)
    assert not out.first_logits.requires_grad


@pytest.mark.parametrize("reprune", [False, True])
def test_bf16(tiny_decoder, embeddings, reprune):
    """Masks, angles or scores of another dtype than the weights; scores ranked in bf16, where they tie."""
    x = embeddings(2, 22)
    want = generate(tiny_decoder(), x, SPAN, STAGES, 1)
    out = generate(tiny_decoder().bfloat16(), x.bfloat16(), SPAN, STAGES, 5, sampling=Sampling(1.0), reprune=reprune)
    assert [len(ids) for ids in out.token_ids] == [5, 5] and out.first_logits.dtype == torch.bfloat16
    for stage, other in zip(out.traces[0].stages, want.traces[0].stages, strict=True):
        assert stage.scores.dtype == torch.float32
        assert len(set(stage.scores[0].tolist())) == stage.scores.shape[1]
        assert stage.kept.shape == other.kept.shape
    first, full = out.traces[0].stages[0], want.traces[0].stages[0]
    assert_close(first.scores, full.scores, rtol=0.1, atol=0.05)
