"""Pruning against an independent decoder that never drops a token, and the parts of a stage one by one."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

import himap_ref.decoder
from himap_ref import HIMAP, HIMAP_CAPTION, HimapError, Stage, image_to_image, text_to_image
from himap_ref.cache import LayerCache
from himap_ref.methods.schedules import FASTV, parse_stages
from himap_ref.methods.scores import SCORES, all_to_image, last_to_image, random
from himap_ref.pruning import LayerView, keep_highest

near = {"rtol": 1e-4, "atol": 5e-5}


# ---------------------------------------------------------------- a slow decoder that hides instead of dropping


def brute_score(A, rows, columns):
    """Sum over the rows of what each attends to each column, one number at a time."""
    return {v: sum(A[i, v].item() for i in rows) for v in columns}


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

    visible, alive = torch.ones(n, n).tril().bool(), list(range(*span))
    kept, scores, attention = [], [], []
    for i in range(config.num_hidden_layers):
        for stage in stages:
            if stage.layer == i:
                rows = {text_to_image: range(span[1], prompt or n), image_to_image: alive, None: ()}[stage.score]
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


SCHEDULES = {
    "two stages": (Stage(1, 7, text_to_image), Stage(3, 3, image_to_image)),
    "two layers running": (Stage(2, 7, text_to_image), Stage(3, 3, image_to_image)),
    "swapped": (Stage(1, 7, image_to_image), Stage(4, 2, text_to_image)),
    "last layer": (Stage(4, 1, image_to_image),),
    "three stages": (Stage(1, 9, text_to_image), Stage(2, 5, image_to_image), Stage(4, 3, text_to_image)),
    "the whole picture": (Stage(1, 7, text_to_image), Stage(3, 0, None)),
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_dropping_is_hiding(tiny_decoder, embeddings, schedule, kv_heads):
    """Anything by which dropping tokens differs from hiding them: positions, masks, the wrong layer, heads mixed up."""
    decoder, x, span = tiny_decoder(num_key_value_heads=kv_heads), embeddings(1, 22), (4, 16)
    stages = SCHEDULES[schedule]
    hidden, logits, kept, scores, _ = slow_decoder(decoder, x[0], span, stages)
    out = decoder(x, span, stages, all_rows=True)
    for stage, want_kept, want_scores in zip(out.trace.stages, kept, scores, strict=True):
        assert (stage.kept[0] + span[0]).tolist() == want_kept
        assert_close(stage.scores[0].double(), torch.tensor(want_scores, dtype=torch.float64), **near)
    rows = [*range(span[0]), *kept[-1], *range(span[1], 22)]
    assert_close(out.hidden[0].double(), hidden[rows], **near)
    assert_close(out.logits[0].double(), logits[-1], **near)
    assert_close(decoder(x, span, stages).logits[0].double(), logits[-1], **near)


@pytest.mark.parametrize("span, n", [((0, 12), 18), ((3, 15), 16)], ids=["no system", "one text token"])
def test_spans_at_the_edges(tiny_decoder, embeddings, span, n):
    """Slices that are wrong when nothing stands before the image, or one token behind it."""
    decoder, x, stages = tiny_decoder(), embeddings(1, n), SCHEDULES["two stages"]
    _, logits, kept, _, _ = slow_decoder(decoder, x[0], span, stages)
    out = decoder(x, span, stages)
    assert [(stage.kept[0] + span[0]).tolist() for stage in out.trace.stages] == kept
    assert_close(out.logits[0].double(), logits[-1], **near)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_decoding_after_pruning_is_hiding(tiny_decoder, embeddings, kv_heads):
    """Decode steps at a wrong position, or over keys that a stage had dropped."""
    decoder, x, span = tiny_decoder(num_key_value_heads=kv_heads), embeddings(1, 26), (4, 16)
    stages = SCHEDULES["two stages"]
    _, logits, _, _, _ = slow_decoder(decoder, x[0], span, stages, prompt=22)
    out = decoder(x[:, :22], span, stages)
    for step in range(22, 26):
        out = decoder(x[:, step : step + 1], positions=torch.tensor([[step]]), cache=out.cache)
        assert_close(out.logits[0].double(), logits[step], **near)


def test_tied_embeddings(tiny_decoder, embeddings):
    """Tied embeddings for which logits come from another matrix."""
    decoder, x = tiny_decoder(tie_word_embeddings=True), embeddings(1, 9)
    _, logits, _, _, _ = slow_decoder(decoder, x[0], (1, 5))
    assert_close(decoder(x).logits[0].double(), logits[-1], **near)


def test_epsilon_of_the_norms(tiny_decoder, embeddings):
    """torch's own epsilon in the place of the checkpoint's: too close to see at 1e-5."""
    decoder, x = tiny_decoder(rms_norm_eps=0.3), embeddings(1, 9)
    _, logits, _, _, _ = slow_decoder(decoder, x[0], (1, 5))
    assert_close(decoder(x).logits[0].double(), logits[-1], **near)


@pytest.mark.parametrize("part, names", [("attention", "qkvo"), ("mlp", ["gate", "up", "down"])])
def test_biases(tiny_decoder, embeddings, part, names):
    """Biases of a checkpoint that has them left out, or put into the other half of a layer."""
    decoder, x = tiny_decoder(**{f"{part}_bias": True}), embeddings(1, 22)
    biases = {key for key in decoder.state_dict() if key.endswith("bias")}
    place = "self_attn" if part == "attention" else "mlp"
    assert biases == {f"layers.{i}.{place}.{name}_proj.bias" for i in range(5) for name in names}
    _, logits, kept, _, _ = slow_decoder(decoder, x[0], (4, 16), SCHEDULES["two stages"])
    out = decoder(x, (4, 16), SCHEDULES["two stages"])
    assert [(stage.kept[0] + 4).tolist() for stage in out.trace.stages] == kept
    assert_close(out.logits[0].double(), logits[-1], **near)


def test_a_whole_prompt_needs_no_mask(tiny_decoder, embeddings, monkeypatch):
    """A mask of n x n written out where the attention kernel knows it: the same, and slower."""
    monkeypatch.setattr(himap_ref.decoder, "causal_mask", None)
    assert tiny_decoder()(embeddings(1, 22), (4, 16), all_rows=True).hidden.shape == (1, 22, 32)


def test_keeping_all_is_vanilla(tiny_decoder, embeddings):
    """A stage that disturbs tokens which it does not drop."""
    decoder, x, span = tiny_decoder(), embeddings(2, 22), (4, 16)
    stages = Stage(1, 12, text_to_image), Stage(3, 1.0, image_to_image)
    vanilla, out = decoder(x, span, all_rows=True), decoder(x, span, stages, all_rows=True)
    assert [stage.kept.tolist() for stage in out.trace.stages] == [[list(range(12))] * 2] * 2
    assert_close(out.hidden, vanilla.hidden, rtol=0, atol=1e-6)
    assert not torch.allclose(decoder(x, span, SCHEDULES["two stages"]).logits, vanilla.logits, atol=1e-2)


def test_batch_is_one_by_one(tiny_decoder, embeddings):
    """One item's choice used for all, as in the official code."""
    decoder, x, span = tiny_decoder(num_key_value_heads=2), embeddings(3, 22), (4, 16)
    stages = SCHEDULES["three stages"]
    batch = decoder(x, span, stages, all_rows=True)
    assert len({tuple(kept) for kept in batch.trace.stages[-1].kept.tolist()}) == 3  # the items do differ
    for b in range(3):
        alone, of_batch = decoder(x[b : b + 1], span, stages, all_rows=True), batch.trace.item(b)
        for stage, other in zip(alone.trace.stages, of_batch.stages, strict=True):
            assert stage.kept[0].tolist() == other.kept.tolist()
            assert_close(stage.scores[0], other.scores)
        assert_close(batch.hidden[b], alone.hidden[0], **near)
        assert_close(batch.logits[b], alone.logits[0], **near)
        assert of_batch.layers == alone.trace.item(0).layers == alone.trace.layers


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_score_functions(tiny_decoder, embeddings, kv_heads):
    """Wrong rows or columns, a head left out, softmax over part of the keys, no causal mask."""
    decoder, x, span, n = tiny_decoder(num_key_value_heads=kv_heads), embeddings(1, 22), (4, 16), 22
    A = slow_decoder(decoder, x[0], span)[-1][1].mean(0)  # layer 1
    image, text = range(*span), range(span[1], n)
    want = {
        text_to_image: brute_score(A, text, image),
        image_to_image: brute_score(A, image, image),
        last_to_image: brute_score(A, [n - 1], image),
        all_to_image: {v: s / n for v, s in brute_score(A, range(n), image).items()},
    }
    for score, values in want.items():
        (stage,) = decoder(x, span, (Stage(2, 3, score),)).trace.stages
        assert_close(stage.scores[0].double(), torch.tensor(list(values.values()), dtype=torch.float64), **near)
        assert stage.scores.dtype == torch.float32 and stage.score == score.__name__


def test_attention_by_row_and_column(tiny_decoder, embeddings):
    """Queries or keys mixed up among rows, columns or items when only a part is asked for."""
    decoder, x, span, seen = tiny_decoder(num_key_value_heads=2), embeddings(2, 22), (4, 16), []

    def score(view):
        seen.append((view.maps(view.all).mean(1), view.attention(view.text), view.ranking))
        return view.attention(view.last).sum(1)

    decoder(x, span, (Stage(3, 3, score),))
    ((full, part, rows),) = seen
    for b in range(2):
        assert_close(full[b].double(), slow_decoder(decoder, x[b], span)[-1][2].mean(0), **near)
    assert_close(part, full[:, 16:, 4:16])
    assert rows == 22 + 6


def test_random_is_seeded_and_equal_in_a_batch(tiny_decoder, embeddings):
    """A random baseline that changes between runs, or with the batch."""
    decoder, x, stages = tiny_decoder(), embeddings(2, 22), (Stage(2, 4, random),)
    kept = [decoder(x, (4, 16), stages).trace.stages[0].kept.tolist() for _ in range(2)]
    assert kept[0] == kept[1] and kept[0][0] == kept[0][1]
    assert kept[0] != [[0, 1, 2, 3]] * 2

    (stage,) = decoder(x, (4, 16), (Stage(2, 4, partial(random, seed=7)),)).trace.stages
    assert stage.kept.tolist() != kept[0] and stage.score == "random"


@pytest.mark.parametrize("seed, number", [(None, 12), (7, 7012), (2**63 - 1, 2**63 - 988)])
def test_random_draws_what_was_recorded(tiny_decoder, embeddings, seed, number):
    """Other draws than those behind the recorded results; a seed beyond torch's."""
    score = random if seed is None else partial(random, seed=seed)
    (stage,) = tiny_decoder()(embeddings(1, 22), (4, 16), (Stage(2, 4, score),)).trace.stages
    assert torch.equal(stage.scores[0], torch.rand(12, generator=torch.Generator().manual_seed(number)))


def test_custom_score(tiny_decoder, embeddings):
    """A score of the user's own that is ignored, or that does not see the documented tensors."""
    decoder, x, shapes = tiny_decoder(num_key_value_heads=2), embeddings(2, 22), []

    class Rightmost:
        def __call__(self, view):
            shapes.append([tuple(t.shape) for t in (view.q, view.k, view.v, view.positions, view.hidden)])
            shapes.append([view.system, view.image, view.text])
            return view.positions[:, view.image].float()

    stages = Stage(1, 6, text_to_image), Stage(3, 2, Rightmost())
    first, second = decoder(x, (4, 16), stages).trace.stages
    assert second.kept.tolist() == first.kept[:, -2:].tolist()
    assert second.scores.tolist() == (first.kept + 4).tolist()  # of the prompt, not of the cut sequence
    tensors = [(2, 16, 4, 8), (2, 16, 2, 8), (2, 16, 2, 8), (2, 16), (2, 16, 32)]
    assert shapes == [tensors, [slice(0, 4), slice(4, 10), slice(10, 16)]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_numbers(tiny_decoder, embeddings, bad):
    """NaN in the scores of one item of a batch, sorted to somewhere and never noticed."""

    def broken(view):
        scores = text_to_image(view)
        scores[1, 3] = bad
        return scores

    with pytest.raises(HimapError, match="broken.*layer 2.*NaN.*: a fault of its own, .* them$"):
        tiny_decoder()(embeddings(2, 22), (4, 16), (Stage(2, 5, broken),))


CUTS = [
    lambda s: s[:, :-4], lambda s: s[:1], lambda s: s[0], lambda s: s[:, None], lambda s: s.tolist(), id,
    lambda s: s * (1 + 1j),
]  # fmt: skip


@pytest.mark.parametrize("cut", CUTS)
def test_scores_of_another_shape(tiny_decoder, embeddings, cut):
    """Scores of fewer tokens ranked as if they were of all, or one item's choice used for its whole batch; complex ones
    whose imaginary part is dropped."""
    with pytest.raises(HimapError, match=r"layer 2 returned .*, not \(B, N\) = \[2, 12\]"):
        tiny_decoder()(embeddings(2, 22), (4, 16), (Stage(2, 5, lambda view: cut(text_to_image(view))),))


# ---------------------------------------------------------------- what is kept


def test_ties_go_to_the_lower_place(tiny_decoder, embeddings):
    """Of equal scores another one kept on each device."""
    assert keep_highest(torch.tensor([[1.0, 2, 2, 2, 0], [0, 0, 3, 0, 0]]), 2).tolist() == [[1, 2], [0, 2]]
    assert keep_highest(torch.zeros(1, 5000), 300).tolist() == [list(range(300))]

    def constant(view):
        return torch.ones(len(view.k), view.image.stop - view.image.start)

    (stage,) = tiny_decoder()(embeddings(1, 22), (4, 16), (Stage(2, 5, constant),)).trace.stages
    assert stage.kept.tolist() == [[0, 1, 2, 3, 4]]


def test_trace(tiny_decoder, embeddings):
    """A trace that tells another story than what was computed."""
    decoder, x, stages = tiny_decoder(), embeddings(2, 22), (Stage(2, 0.5, text_to_image), Stage(4, 2, image_to_image))
    out = decoder(x, (4, 16), stages)
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
    assert [layer.rows for layer in decoder(x, (4, 16), stages, all_rows=True).trace.layers] == [22, 16, 16, 12, 12]


# ---------------------------------------------------------------- stages


@pytest.mark.parametrize(
    "keep, entering, count",
    [(0.5, 576, 288), (0.25, 288, 72), (0.5, 7, 4), (0.5, 5, 3), (0.25, 5, 1), (0.25, 6, 2), (0.3, 4, 1), (0.01, 10, 1)]
    + [(1.0, 9, 9), (1, 9, 1), (9, 9, 9)],
)
def test_keep_count(keep, entering, count):
    """Shares rounded down, to even, or to nothing; 1 taken for 100 %."""
    assert Stage(2, keep, text_to_image).count(entering) == count


def test_keeping_more_than_there_are(tiny_decoder, embeddings):
    """A second stage that asks for more than the first left."""
    stages = Stage(1, 5, text_to_image), Stage(3, 6, image_to_image)
    with pytest.raises(HimapError, match="layer 3 is to keep 6 image tokens, only 5 enter"):
        tiny_decoder()(embeddings(1, 22), (4, 16), stages)


@pytest.mark.parametrize("layer", [0, -1, 2.0, True, "2"])
def test_stage_layer_is_checked(layer):
    """Layer 0 accepted, though no layer stands before it to rank."""
    with pytest.raises(HimapError, match="stage layer"):
        Stage(layer, 0.5, text_to_image)


@pytest.mark.parametrize("keep", [0, -3, 0.0, 1.5, -0.5, float("nan"), True, "0.5", None])
def test_stage_keep_is_checked(keep):
    """A count or share that cannot be meant; advice for keep 0 given for another number, or none."""
    hint = r" \(0 drops the whole picture: only with no score\)" if keep == 0 else ""
    with pytest.raises(HimapError, match=rf"^stage keep .*: expected a count .* in \(0, 1\]{hint}$"):
        Stage(2, keep, text_to_image)


@pytest.mark.parametrize("layers, message", [((3, 1), "ascend"), ((2, 2), "ascend"), ((2, 5), "does not exist")])
def test_schedule_is_checked(tiny_decoder, embeddings, layers, message):
    """Stages that are silently skipped or re-ordered."""
    stages = [Stage(layer, 0.5, text_to_image) for layer in layers]
    with pytest.raises(HimapError, match=message):
        tiny_decoder()(embeddings(1, 22), (4, 16), stages)


@pytest.mark.parametrize(
    "span, message",
    [(None, "no image"), ((4, 22), "no text")]
    + [(span, "does not lie within") for span in ((4, 23), (9, 4), (9, 9), (-1, 4))],
)
def test_span_is_checked(tiny_decoder, embeddings, span, message):
    """A wrong image span taken at its word: other tokens would be pruned."""
    with pytest.raises(HimapError, match=message):
        tiny_decoder()(embeddings(1, 22), span, SCHEDULES["two stages"])


def test_published_schedules():
    """A constant that is not the paper's (K1=2, half; K2=8 or 15, a quarter of those)."""
    assert list(HIMAP) == [Stage(2, 0.5, text_to_image), Stage(8, 0.25, image_to_image)]
    assert list(HIMAP_CAPTION) == [Stage(2, 0.5, text_to_image), Stage(15, 0.25, image_to_image)]
    assert list(FASTV) == [Stage(2, 0.5, last_to_image)]


def test_parse_stages():
    """A share read as a count, or the other way round; names bound to the wrong function."""
    assert parse_stages("2:0.5:text_to_image, 8:72:image_to_image") == (
        Stage(2, 0.5, text_to_image),
        Stage(8, 72, image_to_image),
    )
    assert type(parse_stages("2:1:text_to_image")[0].keep) is int
    assert type(parse_stages("2:1.0:text_to_image")[0].keep) is float
    for name in ("text_to_image", "image_to_image", "last_to_image", "all_to_image", "random"):
        (stage,) = parse_stages(f"3:.5:{name}")
        assert stage.name == name and stage.score is SCORES[name]


def test_view_rows_are_slices_of_the_prompt(embeddings):
    """Text rows that lose their first or last token."""
    q, positions = embeddings(1, 10, 4)[:, :, None], torch.arange(10)[None]
    view = LayerView(q, LayerCache(q, q, positions), q[:, :, 0], positions, slice(3, 7))
    rows = list(range(10))
    assert (rows[view.system], rows[view.image], rows[view.text]) == ([0, 1, 2], [3, 4, 5, 6], [7, 8, 9])
    assert rows[view.all] == rows and view.last.tolist() == [[9]]
