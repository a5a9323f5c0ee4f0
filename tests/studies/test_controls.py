"""Chance, oracle and renumbered positions: what the sweep holds a criterion against."""

from contextlib import nullcontext

import pytest
import torch
from torch.testing import assert_close

from himap_ref import HIMAP, HimapError
from himap_ref.decoder import rope
from himap_ref.generation import generate
from himap_ref.methods.schedules import parse_stages
from himap_ref.pruning import Stage, image_to_image, text_to_image
from himap_ref.studies.accuracy.controls import ORACLE, for_questions, renumbered
from himap_ref.studies.questions.examples import Example

SPAN = (3, 12)  # 3 system, 9 image, 5 text tokens


def asked(id, *targets):
    return Example(id, "?", ("a",), "", None, targets=targets)


def kept(decoder, x, text, examples):
    stages = for_questions(parse_stages(text), examples)
    return [stage.kept.tolist() for stage in decoder(x, SPAN, stages).trace.stages]


def test_oracle(decoder, embeddings):
    """Targets counted from another place, lost at stage 2, or another prompt's; others kept where targets abound."""
    examples = [asked("a", 8), asked("b", 0, 5), asked("c"), asked("d", 1, 2, 3, 6, 7)]
    first, second = kept(decoder, embeddings(4, 17), f"1:4:{ORACLE},3:2:{ORACLE}", examples)
    assert {*second[3]} < {*first[3]} < {1, 2, 3, 6, 7}
    for b, targets in enumerate(({8}, {0, 5}, set())):
        assert targets <= {*first[b]} and targets <= {*second[b]} <= {*first[b]}
    with pytest.raises(HimapError, match="target patches"):
        decoder(embeddings(1, 17), SPAN, parse_stages(f"1:4:{ORACLE}"))


def test_chance(decoder, embeddings):
    """One mask for all questions, or another one for the same question in another batch."""
    x = embeddings(1, 17).expand(3, -1, -1)
    text, examples = "1:4:random,3:2:random", [asked("a"), asked("b"), asked("c")]
    together = kept(decoder, x, text, examples)
    assert len({tuple(one) for one in together[0]}) > 1
    for b, example in enumerate(examples):
        assert [stage[0] for stage in kept(decoder, x[:1], text, [example])] == [stage[b] for stage in together]
    assert kept(decoder, x, "1:4:random7,3:2:random7", examples) != together
    (many,) = kept(decoder, x[:1].expand(300, -1, -1), "1:3:random", [asked(str(i)) for i in range(300)])
    often = torch.tensor(many).flatten().bincount(minlength=9) / 300
    assert (often - 1 / 3).abs().max() < 0.12  # 4.4 standard deviations


def slow(decoder, x, kept_by_layer, how):
    """(n, d) -> the last row's logits: each layer's tokens numbered anew, attention written out head by head."""
    start, stop = SPAN
    rows = list(range(len(x)))
    for i, layer in enumerate(decoder.layers):
        if i in kept_by_layer:
            left = [start + v for v in kept_by_layer[i]]
            stay = [j for j in rows if not start <= j < stop or j in left]
            x, rows = x[[rows.index(j) for j in stay]], stay
        image = [j for j in rows if start <= j < stop]
        numbers = list(range(len(rows)))
        if how == "stretched":
            spread = torch.linspace(start, stop - 1, len(image)).tolist() if len(image) > 1 else [start]
            numbers = [spread[image.index(j)] if j in image else j for j in rows]
        h = layer.input_layernorm(x)[None]
        q, k, v = layer.self_attn.qkv(h, *rope(torch.tensor(numbers)[None], decoder.config, x.dtype))
        causal = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
        heads = []
        for head in range(q.shape[2]):
            group = head * k.shape[2] // q.shape[2]
            scores = q[0, :, head] @ k[0, :, group].T / q.shape[-1] ** 0.5
            heads.append(scores.masked_fill(~causal, -torch.inf).softmax(-1) @ v[0, :, group])
        x = x + layer.self_attn.o_proj(torch.cat(heads, dim=-1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return decoder.logits(decoder.norm(x)[-1])


@pytest.mark.parametrize("how", ["packed", "stretched"])
def test_positions(decoder, embeddings, how):
    """New tokens that go on from the old numbers, a layer with another's numbers, the losers' layer renumbered."""
    prompts = [embeddings(1, n, seed=n)[0] for n in (17, 15)]
    stages = [Stage(1, 5, text_to_image), Stage(3, 2, image_to_image)]
    with renumbered(decoder, SPAN, how):
        out = generate(decoder, prompts, SPAN, stages, max_new_tokens=4)
    for b, prompt in enumerate(prompts):
        kept_by_layer = {stage.layer: stage.kept.tolist() for stage in out.traces[0].item(b).stages}
        for step in range(4):
            new = decoder.embed_tokens(torch.tensor(out.token_ids[b][:step], dtype=torch.long))
            want = slow(decoder, torch.cat((prompt, new)), kept_by_layer, how)
            assert int(want.argmax()) == out.token_ids[b][step]
            if step == 0:
                assert_close(out.first_logits[b], want, rtol=0, atol=5e-5)


def test_positions_kept(decoder, embeddings):
    """A switch that changes something where it should not: HiMAP's own positions, or after it was in use."""
    outs = []
    for how in (nullcontext(), renumbered(decoder, SPAN, "packed"), renumbered(decoder, SPAN, "kept"), nullcontext()):
        with how:
            outs.append(generate(decoder, embeddings(2, 17), SPAN, HIMAP[:1], max_new_tokens=3))
    plain, other, same, after = outs
    assert same.first_logits.equal(plain.first_logits) and not other.first_logits.equal(plain.first_logits)
    assert after.token_ids == plain.token_ids
    with pytest.raises(HimapError, match="kept, packed, stretched"), renumbered(decoder, SPAN, "other"):
        pass
