"""Pruning against an independent decoder that never drops a token, and the parts of a stage one by one."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

import himap_ref.decoder
from himap_ref import HimapError, Stage, image_to_image, text_to_image
from himap_ref.methods.scores import all_to_image, last_to_image, random
from himap_ref.pruning import keep_highest

NEAR = {"rtol": 1e-4, "atol": 5e-5}
SPAN = (4, 16)


def brute_score(A, rows, columns):
    """Sum over the rows of what each attends to each column, one number at a time."""
    return {v: sum(A[i, v].item() for i in rows) for v in columns}


def image_tokens(span):
    """Positions in (start, stop), of several pictures (start, stop, start, stop, ...)."""
    return [i for start, stop in zip(span[::2], span[1::2], strict=True) for i in range(start, stop)]


def slow_decoder(decoder, x, span, stages=(), prompt=None, masks=None, bump=None):
    """One prompt (n, d), fp64. From layer K on, the image tokens that lost are masked as keys; every row is computed.

    `prompt`: rows from there on are answers, which do not rank. `masks`: {layer: what its rows see}. `bump`: (layer,
    head, row, column, what is added to that one number of the attention). Returns the hidden states after the final
    norm, all rows' logits, the kept and the scores of each stage (as positions), and each layer's attention (heads, n,
    n).
    """
    w = {name: p.double() for name, p in decoder.named_parameters()}
    config, n, x = decoder.config, len(x), x.double()
    h, g, c = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    angle = torch.arange(n)[:, None] * config.rope_theta ** (-2.0 * torch.arange(c // 2) / c)
    turn = torch.polar(torch.ones(n, c // 2, dtype=torch.float64), angle.double())

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    def spin(x):  # (n, heads, c): channel j and channel j + c/2 are one complex number
        z = torch.complex(x[..., : c // 2], x[..., c // 2 :]) * turn[:, None]
        return torch.cat((z.real, z.imag), dim=-1)

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    visible, alive = torch.ones(n, n).tril().bool(), image_tokens(span)
    kept, scores, attention = [], [], []
    for i in range(config.num_hidden_layers):
        for stage in stages:
            if stage.layer == i:
                rows = {text_to_image: range(span[-1], prompt or n), image_to_image: alive, None: ()}[stage.score]
                score = brute_score(attention[-1].mean(0), rows, alive)
                winners = sorted(sorted(alive, key=lambda v: (-score[v], v))[: stage.keep])
                visible[:, [v for v in alive if v not in winners]] = False
                visible |= torch.eye(n).bool()  # only so that no row is empty: nobody looks at the losers' rows
                alive = winners
                kept.append(winners)
                scores.append(list(score.values()))
        name = f"layers.{i}."
        y = norm(x, w[name + "input_layernorm.weight"])
        q = spin(linear(y, name + "self_attn.q_proj").view(n, h, c))
        k = spin(linear(y, name + "self_attn.k_proj").view(n, g, c))
        v = linear(y, name + "self_attn.v_proj").view(n, g, c)
        heads = []
        for head in range(h):
            dots = q[:, head] @ k[:, head * g // h].T / c**0.5
            heads.append(torch.where((masks or {}).get(i, visible), dots, -torch.inf).softmax(-1))
            if bump and bump[:2] == (i, head):
                heads[-1][bump[2:4]] += bump[4]
        attention.append(torch.stack(heads))
        mixed = torch.cat([a @ v[:, head * g // h] for head, a in enumerate(heads)], dim=-1)
        x = x + linear(mixed, name + "self_attn.o_proj")
        y = norm(x, w[name + "post_attention_layernorm.weight"])
        gate, up = linear(y, name + "mlp.gate_proj"), linear(y, name + "mlp.up_proj")
        x = x + linear(gate * torch.sigmoid(gate) * up, name + "mlp.down_proj")
    x = norm(x, w["norm.weight"])
    return x, x @ w.get("lm_head.weight", w["embed_tokens.weight"]).T, kept, scores, attention


TWO = Stage(1, 7, text_to_image), Stage(3, 3, image_to_image)
SCHEDULES = {
    "two stages": TWO,
    "two layers running": (Stage(2, 7, text_to_image), Stage(3, 3, image_to_image)),
    "swapped": (Stage(1, 7, image_to_image), Stage(4, 2, text_to_image)),
    "last layer": (Stage(4, 1, image_to_image),),
    "three stages": (Stage(1, 9, text_to_image), Stage(2, 5, image_to_image), Stage(4, 3, text_to_image)),
    "the whole picture": (Stage(1, 7, text_to_image), Stage(3, 0, None)),
}
CASES = {  # the decoder's changes, image span, tokens, stages
    **{f"{name}, {heads} key heads": ({"num_key_value_heads": heads}, SPAN, 22, stages)
       for name, stages in SCHEDULES.items() for heads in (4, 2, 1)},
    "no system": ({}, (0, 12), 18, TWO),
    "one text token": ({}, (3, 15), 16, TWO),
    "tied embeddings": ({"tie_word_embeddings": True}, SPAN, 22, TWO),
    "another epsilon": ({"rms_norm_eps": 0.3}, SPAN, 22, TWO),  # at 1e-5 torch's own would be too close to see
    "biases of the attention": ({"attention_bias": True}, SPAN, 22, TWO),
    "biases of the MLP": ({"mlp_bias": True}, SPAN, 22, TWO),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_dropping_is_hiding(tiny_decoder, embeddings, case):
    """Anything by which dropping tokens differs from hiding them: positions, masks, the wrong layer, heads mixed up."""
    changes, span, n, stages = CASES[case]
    decoder, x = tiny_decoder(**changes), embeddings(1, n)
    hidden, logits, kept, scores, _ = slow_decoder(decoder, x[0], span, stages)
    out = decoder(x, span, stages, all_rows=True)
    for stage, want_kept, want_scores in zip(out.trace.stages, kept, scores, strict=True):
        assert (stage.kept[0] + span[0]).tolist() == want_kept
        assert_close(stage.scores[0].double(), torch.tensor(want_scores, dtype=torch.float64), **NEAR)
    rows = [*range(span[0]), *kept[-1], *range(span[1], n)]
    assert_close(out.hidden[0].double(), hidden[rows], **NEAR)
    assert_close(out.logits[0].double(), logits[-1], **NEAR)
    assert_close(decoder(x, span, stages).logits[0].double(), logits[-1], **NEAR)


@pytest.mark.parametrize("part, names", [("attention", "qkvo"), ("mlp", ["gate", "up", "down"])])
def test_biases(tiny_decoder, part, names):
    """Biases of a checkpoint that has them left out, or put into the other half of a layer."""
    biases = {key for key in tiny_decoder(**{f"{part}_bias": True}).state_dict() if key.endswith("bias")}
    place = "self_attn" if part == "attention" else "mlp"
    assert biases == {f"layers.{i}.{place}.{name}_proj.bias" for i in range(5) for name in names}


def test_a_whole_prompt_needs_no_mask(tiny_decoder, embeddings, monkeypatch):
    """A mask of n x n written out where the attention kernel knows it: the same, and slower."""
    monkeypatch.setattr(himap_ref.decoder, "causal_mask", None)
    assert tiny_decoder()(embeddings(1, 22), SPAN, all_rows=True).hidden.shape == (1, 22, 32)


def test_keeping_all_is_vanilla(tiny_decoder, embeddings):
    """A stage that disturbs tokens which it does not drop."""
    decoder, x = tiny_decoder(), embeddings(2, 22)
    stages = Stage(1, 12, text_to_image), Stage(3, 1.0, image_to_image)
    vanilla, out = decoder(x, SPAN, all_rows=True), decoder(x, SPAN, stages, all_rows=True)
    assert [stage.kept.tolist() for stage in out.trace.stages] == [[list(range(12))] * 2] * 2
    assert_close(out.hidden, vanilla.hidden, rtol=0, atol=1e-6)
    assert not torch.allclose(decoder(x, SPAN, TWO).logits, vanilla.logits, atol=1e-2)


def test_batch_is_one_by_one(tiny_decoder, embeddings):
    """One item's choice used for all, as in the official code."""
    decoder, x, stages = tiny_decoder(num_key_value_heads=2), embeddings(3, 22), SCHEDULES["three stages"]
    batch = decoder(x, SPAN, stages, all_rows=True)
    assert len({tuple(kept) for kept in batch.trace.stages[-1].kept.tolist()}) == 3  # the items do differ
    for b in range(3):
        alone, of_batch = decoder(x[b : b + 1], SPAN, stages, all_rows=True), batch.trace.item(b)
        for stage, other in zip(alone.trace.stages, of_batch.stages, strict=True):
            assert stage.kept[0].tolist() == other.kept.tolist()
            assert_close(stage.scores[0], other.scores)
        assert_close(batch.hidden[b], alone.hidden[0], **NEAR)
        assert_close(batch.logits[b], alone.logits[0], **NEAR)
        assert of_batch.layers == alone.trace.item(0).layers == alone.trace.layers


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_score_functions(tiny_decoder, embeddings, kv_heads):
    """Wrong rows or columns, a head left out, softmax over part of the keys, no causal mask."""
    decoder, x, n = tiny_decoder(num_key_value_heads=kv_heads), embeddings(1, 22), 22
    A = slow_decoder(decoder, x[0], SPAN)[-1][1].mean(0)  # layer 1
    image, text = range(*SPAN), range(SPAN[1], n)
    want = {
        text_to_image: brute_score(A, text, image),
        image_to_image: brute_score(A, image, image),
        last_to_image: brute_score(A, [n - 1], image),
        all_to_image: {v: s / n for v, s in brute_score(A, range(n), image).items()},
    }
    for score, values in want.items():
        (stage,) = decoder(x, SPAN, (Stage(2, 3, score),)).trace.stages
        assert_close(stage.scores[0].double(), torch.tensor(list(values.values()), dtype=torch.float64), **NEAR)
        assert stage.scores.dtype == torch.float32 and stage.score == score.__name__


def test_what_a_view_shows(tiny_decoder, embeddings):
    """Queries or keys mixed up among rows, columns, items or heads; rows of attention that are not counted."""
    decoder, x, seen = tiny_decoder(num_key_value_heads=2), embeddings(2, 22), []

    def score(view):
        maps = view.maps(view.all)
        seen.append((maps, view.attention(view.text), view.ranking))
        dots = (view.k[:, :, 1] @ view.q[:, -1, 3, :, None])[..., 0]  # heads 2 and 3 share key head 1
        assert_close(maps[:, 3, -1], (dots / 8**0.5).softmax(-1), rtol=1e-4, atol=1e-6)
        return view.attention(view.last).sum(1)

    decoder(x, SPAN, (Stage(3, 3, score),))
    ((full, part, rows),) = seen
    for b in range(2):
        assert_close(full[b].double(), slow_decoder(decoder, x[b], SPAN)[-1][2], **NEAR)
    assert_close(part, full.mean(1)[:, 16:, 4:16])
    assert rows == 22 + 6


@pytest.mark.parametrize("rows", ["system", slice(3, 3), torch.zeros(2, 0, dtype=torch.long)], ids=str)
def test_attention_of_no_rows(tiny_decoder, embeddings, rows):
    """A picture at the very start and `view.system`: a bare RuntimeError instead of a sum of 0."""
    seen = []

    def score(view):
        seen.append(view.attention(view.system if rows == "system" else rows))
        return text_to_image(view) + seen[-1].sum(dim=1)

    got, want = (tiny_decoder()(embeddings(2, 18), (0, 12), (Stage(2, 5, s),)) for s in (score, text_to_image))
    assert seen[0].shape == (2, 0, 12)
    assert torch.equal(got.trace.stages[0].kept, want.trace.stages[0].kept) and torch.equal(got.logits, want.logits)


@pytest.mark.parametrize("seed, number", [(None, 12), (7, 7012), (2**63 - 1, 2**63 - 988)])
def test_random(tiny_decoder, embeddings, seed, number):
    """Other draws than the recorded results', than an item alone, beyond torch's seeds, or the same at both stages."""
    score = random if seed is None else partial(random, seed=seed)
    first, second = tiny_decoder()(embeddings(2, 22), SPAN, (Stage(2, 5, score), Stage(3, 4, score))).trace.stages
    for stage, N in ((first, 12), (second, 5)):
        draws = torch.rand(N, generator=torch.Generator().manual_seed(number - 12 + N))
        assert torch.equal(stage.scores, draws.expand(2, N)) and stage.score == "random"


def test_custom_score(tiny_decoder, embeddings):
    """A score of the user's own that is ignored, or that does not see the documented tensors and rows."""
    decoder, x, shapes = tiny_decoder(num_key_value_heads=2), embeddings(2, 22), []

    class Rightmost:
        def __call__(self, view):
            shapes.append([tuple(t.shape) for t in (view.q, view.k, view.v, view.positions, view.hidden)])
            shapes.append([view.system, view.image, view.text, view.all, view.last.tolist()])
            return view.positions[:, view.image].float()

    stages = Stage(1, 6, text_to_image), Stage(3, 2, Rightmost())
    first, second = decoder(x, SPAN, stages).trace.stages
    assert second.kept.tolist() == first.kept[:, -2:].tolist()
    assert second.scores.tolist() == (first.kept + 4).tolist()  # of the prompt, not of the cut sequence
    tensors = [(2, 16, 4, 8), (2, 16, 2, 8), (2, 16, 2, 8), (2, 16), (2, 16, 32)]
    assert shapes == [tensors, [slice(0, 4), slice(4, 10), slice(10, 16), slice(0, 16), [[15]] * 2]]


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


def one_is(bad):
    return lambda scores: scores.masked_scatter(torch.arange(24).view(2, 12) == 15, torch.tensor([bad]))


OF_ANOTHER_SHAPE = r"spoilt.* at layer 2 returned .*, not \(B, N\) = \[2, 12\]"
NOT_NUMBERS = "spoilt.* at layer 2 gave NaN.*: a fault of its own, .* them$"


@pytest.mark.parametrize("change, message", [
    (lambda s: s[:, :-4], OF_ANOTHER_SHAPE), (lambda s: s[:1], OF_ANOTHER_SHAPE), (lambda s: s[0], OF_ANOTHER_SHAPE),
    (lambda s: s[:, None], OF_ANOTHER_SHAPE), (lambda s: s.tolist(), OF_ANOTHER_SHAPE), (id, OF_ANOTHER_SHAPE),
    (lambda s: s * (1 + 1j), OF_ANOTHER_SHAPE), (one_is(torch.nan), NOT_NUMBERS), (one_is(torch.inf), NOT_NUMBERS),
])  # fmt: skip
def test_scores_that_are_none(tiny_decoder, embeddings, change, message):
    """Scores of some tokens ranked for all, one item's used for its batch, imaginary parts dropped, NaN sorted."""

    def spoilt(view):
        return change(text_to_image(view))

    with pytest.raises(HimapError, match=message):
        tiny_decoder()(embeddings(2, 22), SPAN, (Stage(2, 5, spoilt),))


# ---------------------------------------------------------------- what is kept


def test_ties_go_to_the_lower_place(tiny_decoder, embeddings):
    """Of equal scores another one kept on each device."""
    assert keep_highest(torch.tensor([[1.0, 2, 2, 2, 0], [0, 0, 3, 0, 0]]), 2).tolist() == [[1, 2], [0, 2]]
    assert keep_highest(torch.zeros(1, 5000), 300).tolist() == [list(range(300))]
    (stage,) = tiny_decoder()(embeddings(1, 22), SPAN, (Stage(2, 5, lambda view: torch.ones(1, 12)),)).trace.stages
    assert stage.kept.tolist() == [[0, 1, 2, 3, 4]]


def test_trace(tiny_decoder, embeddings):
    """A trace that tells another story than what was computed."""
    decoder, x, stages = tiny_decoder(), embeddings(2, 22), (Stage(2, 0.5, text_to_image), Stage(4, 2, image_to_image))
    out = decoder(x, SPAN, stages)
    first, second = out.trace.stages
    assert (first.layer, second.layer) == (2, 4)
    assert (first.score, second.score) == ("text_to_image", "image_to_image")
    assert first.candidates.tolist() == [list(range(12))] * 2
    assert torch.equal(second.candidates, first.kept) and first.kept.shape == (2, 6) and second.kept.shape == (2, 2)
    for stage in (first, second):
        for candidates, scores, kept in zip(stage.candidates, stage.scores, stage.kept, strict=True):
            best = candidates[scores.topk(len(kept)).indices]
            assert kept.tolist() == sorted(best.tolist())
    layers = out.trace.layers
    assert [layer.entered for layer in layers] == [layer.keys for layer in layers] == [22, 22, 16, 16, 12]
    assert [layer.rows for layer in layers] == [22, 16, 16, 12, 1]  # losers skip the rest of the layer that ranks
    assert [layer.ranking for layer in layers] == [0, 6, 0, 6, 0]
    assert [(cache.k.shape[1], cache.v.shape[1]) for cache in out.cache] == [(n, n) for n in (22, 22, 16, 16, 12)]
    assert [layer.rows for layer in decoder(x, SPAN, stages, all_rows=True).trace.layers] == [22, 16, 16, 12, 12]


@pytest.mark.parametrize(
    "keep, entering, count",
    [(0.5, 576, 288), (0.25, 288, 72), (0.5, 7, 4), (0.5, 5, 3), (0.25, 5, 1), (0.25, 6, 2), (0.3, 4, 1), (0.01, 10, 1)]
    + [(1.0, 9, 9), (1, 9, 1), (9, 9, 9)],
)
def test_keep_count(keep, entering, count):
    """Shares rounded down, to even, or to nothing; 1 taken for 100 %."""
    assert Stage(2, keep, text_to_image).count(entering) == count
