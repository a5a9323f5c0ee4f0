"""Against the results of the official code, recorded in golden/ (see its README)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from himap_ref import Stage, image_to_image, text_to_image
from himap_ref.generation import generate

GOLDEN = Path(__file__).parents[1] / "golden"
PRUNE = json.loads((GOLDEN / "prune_cases.json").read_text())["cases"]
(GENERATE,) = json.loads((GOLDEN / "generate_cases.json").read_text())["cases"]
near = {"rtol": 0, "atol": 2e-4}


def tensors(name, case):
    recorded, start = load_file(GOLDEN / f"{name}.safetensors"), case["id"] + "."
    return {key.removeprefix(start): value for key, value in recorded.items() if key.startswith(start)}


def span_of(case):
    return case["sys_length"], case["sys_length"] + case["img_length"]


def stages_of(case):
    return Stage(case["K1"], case["rank1"], text_to_image), Stage(case["K2"], case["rank2"], image_to_image)


def positions(kept, span, n):
    """Image indices -> positions in the prompt, system and text included: how the official code records them."""
    return [*range(span[0]), *(span[0] + kept).tolist(), *range(span[1], n)]


@pytest.fixture(scope="module")
def recorded():
    return tensors("generate_cases", GENERATE)


@pytest.mark.parametrize("case", PRUNE, ids=lambda case: case["id"])
def test_prune_case(official, case):
    """Any departure from the official algorithm: layer, rows, heads, order, positions, masks, the last layer's row."""
    want, span = tensors("prune_cases", case), span_of(case)
    every, last = (official(want["inputs_embeds"], span, stages_of(case), all_rows=rows) for rows in (True, False))
    assert_close(every.hidden, want["last_hidden"], **near)
    assert_close(last.hidden, want["last_hidden"][:, -1:], **near)
    for out in (every, last):
        assert len(out.trace.stages) == 2 and case["stage2_ran"]
        for number, stage in enumerate(out.trace.stages, start=1):
            assert positions(stage.kept[0], span, case["n"]) == want[f"keep{number}"].tolist()
            assert_close(stage.scores[0], want[f"score{number}"], rtol=0, atol=5e-5)
        assert_close(out.logits[0], want["logits_last"], **near)


@pytest.mark.parametrize("case", PRUNE, ids=lambda case: case["id"])
def test_vanilla_case(official, case):
    """A decoder that is wrong even without pruning (RoPE layout, norm, mask)."""
    want = tensors("prune_cases", case)
    out = official(want["inputs_embeds"], span_of(case), all_rows=True)
    assert_close(out.hidden, want["vanilla_last_hidden"], **near)
    assert_close(out.logits[0], want["vanilla_logits_last"], **near)
    assert_close(official(want["inputs_embeds"]).logits[0], want["vanilla_logits_last"], **near)


def test_reprune_is_official(official, recorded):
    """Text rows without the generated tokens, a stale choice; logits that drift while greedy tokens agree."""
    span, x, count = span_of(GENERATE), recorded["inputs_embeds"], GENERATE["new_tokens"]
    out = generate(official, x, span, stages_of(GENERATE), count, reprune=True)
    assert out.token_ids == [recorded["tokens"].tolist()]
    assert_close(out.first_logits[0], recorded["step_logits"][0], **near)
    assert len(out.traces) == count
    tokens = official.embed_tokens(recorded["tokens"])[None]
    for step, (trace, logits) in enumerate(zip(out.traces, recorded["step_logits"], strict=True)):
        alone = official(torch.cat((x, tokens[:, :step]), dim=1), span, stages_of(GENERATE))
        assert_close(alone.logits[0], logits, **near)
        for number, stage in enumerate(trace.stages, start=1):
            want = recorded[f"keep{number}_step{step}"].tolist()
            assert positions(stage.kept[0], span, GENERATE["n"] + step) == want, f"stage {number}, step {step}"


def test_cached_is_the_reference(official, recorded):
    """Decoding at the cache's length instead of the original position, or from an unpruned cache; drifting logits."""
    x, span, count = recorded["inputs_embeds"], span_of(GENERATE), GENERATE["new_tokens"]
    generated = generate(official, x, span, stages_of(GENERATE), count)
    assert generated.token_ids == [recorded["ref_frozen_tokens"].tolist()]
    assert [len(trace.stages) for trace in generated.traces] == [2] + [0] * (count - 1)
    out = official(x, span, stages_of(GENERATE))
    for step, want in enumerate(recorded["ref_frozen_step_logits"]):
        assert_close(out.logits[0], want, **near)
        token = official.embed_tokens(recorded["ref_frozen_tokens"][step])[None, None]
        out = official(token, positions=torch.tensor([[GENERATE["n"] + step]]), cache=out.cache)


@pytest.mark.parametrize("reprune", [False, True], ids=["cached", "uncached"])
def test_vanilla_tokens(official, recorded, reprune):
    """Generation that is wrong even without pruning."""
    count = GENERATE["new_tokens"]
    out = generate(official, recorded["inputs_embeds"], span_of(GENERATE), (), count, reprune=reprune)
    assert out.token_ids == [recorded["vanilla_tokens"].tolist()]
    assert_close(out.first_logits[0], recorded["vanilla_step_logits"][0], **near)
