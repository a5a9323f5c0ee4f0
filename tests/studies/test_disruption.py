"""The disruption study: its blocks against the official results and against a slow attention written out here."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_pruning import slow_decoder
from torch.testing import assert_close

from himap_ref import HimapError, generation
from himap_ref.assistant.picture import load_image
from himap_ref.studies.paper import disruption
from himap_ref.studies.paper.disruption import KINDS, READINGS, Block, blocked, disrupt, draw_rows, summarize, visible
from himap_ref.studies.questions.examples import Example

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "disruption_cases.json").read_text())["cases"]
RECORDED = load_file(GOLDEN / "disruption_cases.safetensors")
SPAN, N_TOKENS, SEEDS = (3, 12), 17, ("a", "b")  # 3 system, 9 image, 5 text tokens


def may_see(block, i, j, drawn, span=SPAN):
    """Whether row i sees key j, from the words of the definition."""
    start, stop = span
    rows = {"img2txt": i >= stop, "img2img": start <= i < stop, "random": i in drawn}
    blocked = rows[block.kind] and start <= j < stop and not (block.keep_diagonal and i == j)
    return j <= i and not blocked


def slow(decoder, x, block, drawn):
    """(1, n, d) -> (vocab,): every layer for every row, attention written out head by head in fp64."""
    n, T = x.shape[1], len(decoder.layers)
    layers = {"only": [block.layer], "from": range(block.layer, T), "upto": range(block.layer + 1)}[block.reading]
    disrupted = torch.tensor([[may_see(block, i, j, drawn) for j in range(n)] for i in range(n)])
    return slow_decoder(decoder, x[0], SPAN, masks=dict.fromkeys(layers, disrupted))[1][-1]


@pytest.fixture
def x(embeddings):
    return embeddings(2, N_TOKENS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_official(official, case):
    """Another reading of "isolate layer", other rows or columns, a diagonal left open: anything but the official."""
    span = case["sys_length"], case["sys_length"] + case["img_length"]
    x = RECORDED[case["inputs_embeds"]]
    kind, layer = case["isolate_modality"], case["isolate_layer"]
    blocks = {"official_inplace": Block(kind, "from", layer), "cloned_single_layer": Block(kind, "only", layer)}
    for name, block in {**blocks, "vanilla": None}.items():
        logits = disrupt(official, x, span, block, ["unused"], 1).first_logits[0]
        assert_close(logits, RECORDED[f"{case['id']}.{name}_logits_last"], rtol=0, atol=2e-4)
        assert logits.topk(5).indices.tolist() == case["top5"][name.split("_")[0]]


def test_slow_attention(decoder, x):
    """A wrong row, column, layer or diagonal; a block that stays when it is over; items mixed up."""
    for block in itertools.starmap(Block, itertools.product(KINDS, READINGS, range(5), [False, True])):
        got = disrupt(decoder, x, SPAN, block, SEEDS, 1).first_logits
        for b, seed in enumerate(SEEDS):
            want = slow(decoder, x[b : b + 1], block, draw_rows(N_TOKENS, slice(*SPAN), seed))
            assert_close(got[b].double(), want, rtol=0, atol=5e-5, msg=lambda text, block=block: f"{block}: {text}")


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_new_tokens(decoder, x, kind, reading):
    """New tokens that see in the cache what the text must not see, or that miss what the image rows alone must not."""
    block, ids = Block(kind, reading, 2), torch.tensor([[5, 9, 40], [70, 2, 2]])
    mask, cache = visible(block, N_TOKENS, slice(*SPAN), SEEDS, 3), None
    for step in range(3):
        position = torch.full((2, 1), N_TOKENS + step)
        with blocked(decoder, block.layers(5), mask):
            cache = decoder(x).cache if cache is None else cache
            out = decoder(decoder.embed_tokens(ids[:, step : step + 1]), positions=position, cache=cache)
        cache = out.cache
        for b, seed in enumerate(SEEDS):
            longer = torch.cat((x[b], decoder.embed_tokens(ids[b, : step + 1])))[None]
            drawn = draw_rows(N_TOKENS, slice(*SPAN), seed)  # of the prompt: new tokens are never drawn
            assert_close(out.logits[b].double(), slow(decoder, longer, block, drawn), rtol=0, atol=5e-5)


def test_generate(decoder, x):
    """Without a block another answer than the core's; a block that is in place for the next answer, too."""
    want, block = generation.generate(decoder, x, SPAN, max_new_tokens=6), Block("img2txt", "from", 1)
    first = want.token_ids[0][0]
    disrupted, out, again = (disrupt(decoder, x, SPAN, which, SEEDS, 6) for which in (block, None, block))
    assert out.token_ids == want.token_ids and out.first_logits.equal(want.first_logits)
    assert disrupted.token_ids == again.token_ids != want.token_ids
    assert disrupt(decoder, x, SPAN, None, SEEDS, 6, (first,)).token_ids[0] == [first]


def test_last_layer(decoder, x):
    """A block that reaches rows it does not name: the last layer's image rows lead nowhere, its text rows do."""
    plain, images, text = (
        disrupt(decoder, x, SPAN, block, SEEDS, 1).first_logits
        for block in (None, Block("img2img", "from", 4), Block("img2txt", "from", 4))
    )
    assert_close(images, plain, rtol=0, atol=1e-6)
    assert (text - plain).abs().max() > 0.01


def test_random_rows():
    """Rows that change from run to run or not with the seed, that are too few, twice the same or before the image."""
    image = slice(35, 611)
    rows = draw_rows(651, image, "0 question")
    assert rows == draw_rows(651, image, "0 question") != draw_rows(651, image, "1 question")
    assert len(set(rows)) == 651 - 611 and min(rows) >= 35 and max(rows) < 651
    drawn = {row for seed in range(200) for row in draw_rows(20, slice(4, 15), str(seed))}
    assert drawn == set(range(4, 20))  # image and text, the first and the last row too


def test_refused(decoder, x):
    """A row that sees nothing giving NaN; a layer or a name that is not there taken for another."""
    with pytest.raises(HimapError, match="keep the diagonal"):
        disrupt(decoder, x, (0, 9), Block("img2img", "only", 1), SEEDS, 1)
    for block in (Block("img2img", "only", 1, keep_diagonal=True), Block("img2txt", "from", 0)):
        assert disrupt(decoder, x, (0, 9), block, SEEDS, 1).first_logits.isfinite().all()
    for layer in (-1, 5):
        with pytest.raises(HimapError, match=r"the decoder's layers are 0\.\.4"):
            disrupt(decoder, x, (0, 9), Block("img2txt", "only", layer), SEEDS, 1)
    for kind, reading in (("txt2img", "only"), ("img2txt", "after")):
        with pytest.raises(HimapError, match="is unknown"):
            Block(kind, reading, 0)


def test_figures():
    """Label consistency by equality or by blank labels, a Jaccard index over 5, or one that compares with the label."""
    block = Block("img2txt", "only", 0)

    def row(label, plain, answer, top5):
        said = {"undisrupted": (plain, [1, 2, 3, 4, 5]), block.name: (answer, top5)}
        return {"label": label, "results": {name: {"answer": a, "top5": ids} for name, (a, ids) in said.items()}}

    rows = [row(["B", " "], "B", "B. Rhode Island", [5, 4, 3, 2, 6]), row(["B"], "A", "A", [1, 2, 3, 4, 5]),
            row(["C", ""], "C", "no idea", [6, 7, 8, 9, 10])]  # fmt: skip
    figures = summarize(rows, [block])
    assert figures[None]["label"] == pytest.approx(2 / 3) and figures[None]["top5"] == figures[None]["same"] == 1
    f = figures[block]
    assert f["label"] == f["same"] == pytest.approx(1 / 3) and f["top5"] == pytest.approx((4 / 6 + 1 + 0) / 3)
    assert f["interval"] == pytest.approx((0.0615, 0.7923), abs=1e-4)  # Wilson's for 1 of 3
    unlabelled = rows[0] | {"label": []}
    assert summarize([*rows, unlabelled], [block])[block]["interval"] == f["interval"]
    assert summarize([unlabelled], [block])[block]["interval"] is None


@pytest.fixture
def lines(study, small, tmp_path):
    """Runs it with one scene and two layers; returns what it printed and the results file's lines."""
    usual = "--weights", small, "--scenes", 1, "--layers", 0, 2, "--out"

    def run(*options, name="out.jsonl"):
        status, shown, err = study(disruption, *usual, tmp_path / name, *options)
        if status:
            raise HimapError(err)
        return shown, (tmp_path / name).read_text().splitlines()

    return run


def test_settings(lines):
    """A seed that does nothing, or whose results are mixed with another's."""
    usual = "--kinds", "random", "--readings", "only"
    _, whole = lines(*usual)
    assert lines(*usual, "--seed", 1, name="other.jsonl")[1][1:] != whole[1:]
    with pytest.raises(HimapError, match="holds results with seed"):
        lines(*usual, "--seed", 1)


def test_table_and_plot(lines, tmp_path):
    """A column under another kind's name, a line left out, no numbers without a picture, a picture not drawn."""
    pytest.importorskip("matplotlib")
    shown, (_, *rows) = lines("--readings", "only", "upto", "--plot", tmp_path / "curves.png")
    shown, results = shown.splitlines(), [json.loads(row)["results"] for row in rows]
    assert [line.split("|")[1].strip() for line in shown[2:-1]] == ["nothing", "only 0", "only 2", "upto 0", "upto 2"]
    for place, kind in enumerate(KINDS):
        assert kind in shown[0].split("|")[2 + 3 * place]
        same = sum(r[f"{kind} upto 2"]["answer"] == r["undisrupted"]["answer"] for r in results) / len(results)
        assert shown[6].split("|")[3 + 3 * place].strip() == f"{same:.1%}"
    assert shown[-1] == f"{len(results)} questions, 0 more could not be asked"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_no_picture_at_all(lines, monkeypatch):
    """A table of nothing, or a traceback."""
    monkeypatch.setattr(Example, "picture", lambda example: load_image("gone.png"))
    with pytest.raises(HimapError, match="none of 8 questions could be asked; the first: gone.png: cannot be read"):
        lines("--kinds", "img2img")
