"""Saliency: the official code's, that of finite differences, in the right direction, one layer's maps at a time."""

import json
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_pruning import slow_decoder
from torch.nn import functional as F
from torch.testing import assert_close
from toys import TOKENIZERS, make_tokenizer

from himap_ref import HimapError, Llava
from himap_ref.commands.options import EMBEDDED
from himap_ref.studies.common.plots import check_picture, figure
from himap_ref.studies.paper import flow
from himap_ref.studies.questions.selection import scene_examples

GOLDEN = Path(__file__).parents[1] / "golden"
EXAMPLE = scene_examples(1)[0]
RECORDED = load_file(GOLDEN / "saliency_cases.safetensors")
(CASE,) = json.loads((GOLDEN / "saliency_cases.json").read_text())["cases"]
PLAIN, OFFICIAL = map(flow.DEFINITIONS.index, ("plain", "official"))
near = {"rtol": 1e-3, "atol": 1e-7}


def saliency(run, label):
    """(layers, 2, n, n), the first layer first."""
    return torch.stack(list(run.saliency(label))[::-1])


def recorded(name):
    return RECORDED[f"{CASE['id']}.{name}"]


@pytest.fixture(scope="module")
def official_run(official):
    return flow.ForwardPass(official, recorded("inputs_embeds"))


def test_official_sums(official_run):
    """Another forward pass or loss; heads averaged before the absolute value, A once, rows for columns, last first."""
    assert_close(official_run.logits, recorded("logits_last"), rtol=0, atol=2e-4)
    loss = F.cross_entropy(official_run.logits[None], torch.tensor([CASE["label"]]))
    assert_close(loss.item(), CASE["loss"], rtol=1e-4, atol=0)
    S = saliency(official_run, CASE["label"])[:, OFFICIAL]
    assert_close(S.sum(dim=2), recorded("row_sum"), **near)
    assert_close(S.sum(dim=1), recorded("col_sum"), **near)
    assert not S[-1, :-1].any() and S[-1, -1].any()  # in the last layer only the last row matters


def test_official_figures(official_run):
    """The "props for all" by key column or undivided, those for image divided, or text->image for image->text."""
    groups = flow.groups_of((CASE["sys_length"], CASE["sys_length"] + CASE["img_length"]), CASE["n"])
    layers = [flow.flows(S, groups) for S in saliency(official_run, CASE["label"])]
    tokens = {group: place.stop - place.start for group, place in groups.items()}
    assert list(tokens.values()) == [CASE["sys_length"], CASE["img_length"], CASE["txt_length"]]
    row = {"tokens": tokens, "official": {name: [layer[name][OFFICIAL] for layer in layers] for name in layers[0]}}
    shown = flow.by_layer(row, "official")
    props4all = torch.tensor([shown[f"into {group}"] for group in ("system", "image", "text")]).T
    props4img = torch.tensor([shown["image->image"], shown["image->text"]]).T
    assert_close(props4all, recorded("props4all"), **near)
    assert_close(props4img, recorded("props4img"), **near)
    assert not any(shown["text->image"]) and props4all[-1, :2].tolist() == [0, 0] and props4img[-1, 0] == 0


def slow_loss(decoder, x, label, *bump):
    """The loss in float64; bump: layer, head, row, column and what is added to the attention there."""
    return -slow_decoder(decoder, x[0], (1, 2), bump=bump)[1][-1].log_softmax(dim=-1)[label]


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
def test_finite_differences(tiny_decoder, embeddings, kv_heads):
    """A gradient through something else than the attention that the model computes with; heads served by wrong ones."""
    decoder = tiny_decoder(num_hidden_layers=2, num_key_value_heads=kv_heads).double()
    x, label, n, step = embeddings(1, 5).double(), 5, 5, 1e-5
    run = flow.ForwardPass(decoder, x)
    got = saliency(run, label)
    want = torch.zeros_like(got, dtype=torch.float64)
    for i in range(2):
        A = flow.run_layer(decoder.layers[i], run.states[i], run.cos_sin)[1][0]
        for head in range(4):
            for row, column in torch.ones(n, n).tril().nonzero().tolist():
                up, down = (slow_loss(decoder, x, label, i, head, row, column, s) for s in (step, -step))
                slope, a = (up - down) / (2 * step), A[head, row, column]
                want[i, PLAIN, row, column] += (a * slope).abs() / 4
                want[i, OFFICIAL, row, column] += (a * a * slope).abs() / 4
    assert_close(got.double(), want, rtol=1e-3, atol=1e-6 * want.max().item())


def test_layers_alone_equal_one_graph(tiny_decoder, embeddings):
    """A backward pass that loses or doubles part of the gradient on its way from layer to layer."""
    decoder, x = tiny_decoder(), embeddings(1, 12)
    run, maps, state = flow.ForwardPass(decoder, x), [], x.clone().requires_grad_()
    for layer in decoder.layers:
        state, A = flow.run_layer(layer, state, run.cos_sin)
        maps.append(A)
    loss = F.cross_entropy(decoder.logits(decoder.norm(state[:, -1])), torch.tensor([3]))
    slopes = torch.autograd.grad(loss, maps)
    for A, slope, S in zip(reversed(maps), reversed(slopes), run.saliency(3), strict=True):
        assert_close(S[PLAIN], (A * slope).abs().mean(dim=1)[0], rtol=1e-4, atol=1e-9)


def test_one_layers_maps_at_a_time(tiny_decoder, embeddings, monkeypatch):
    """Maps of earlier layers still held when the next layer's are computed: at 7B's size gigabytes."""
    attention_map, alive, made = flow.attention_map, [], []

    def counting(*given):
        alive.append(sum(reference() is not None for reference in made))
        A = attention_map(*given)
        made.append(weakref.ref(A.untyped_storage()))  # not of A, of which an alias or a graph could outlive it
        return A

    monkeypatch.setattr(flow, "attention_map", counting)
    run = flow.ForwardPass(tiny_decoder(), embeddings(1, 12))
    for S in run.saliency(3):
        assert S.shape == (2, 12, 12)
    assert len(made) == 10 and not any(alive)


def test_fp16_of_a_sure_answer(shapes):
    """Gradients that half precision rounds to 0: image->image then seems not to flow at all."""
    half = Llava.from_pretrained(EMBEDDED, torch.float16)
    want, got = (flow.measure(model, EXAMPLE, "answer") for model in (shapes, half))
    assert want["loss"] < 1e-4
    for name in ("image->text", "image->image"):
        assert_close(torch.tensor(got["plain"][name]), torch.tensor(want["plain"][name]), rtol=0.05, atol=0)


def test_fp16_of_large_states(tiny_decoder, embeddings):
    """Gradients that become too small on the way, as behind LLaMA's few huge activations."""
    decoder, x = tiny_decoder().half(), 4000 * embeddings(1, 12).half()
    got = saliency(flow.ForwardPass(decoder, x), 3)
    want = saliency(flow.ForwardPass(decoder.float(), x.float()), 3)
    others = slice(0, 11)  # the rows before the last: their gradients have gone through a layer of attention
    assert_close(got[:, :, others].sum(dim=(2, 3)), want[:, :, others].sum(dim=(2, 3)), rtol=0.05, atol=0)


def test_directions():
    """Source and target exchanged, a group's border off by one; a mean over pairs that no causal model can see."""
    S = torch.zeros(2, 6, 6)  # 1 system, 3 image, 2 text tokens
    S[PLAIN, 4, 3], S[PLAIN, 2, 0], S[PLAIN, 5, 4], S[OFFICIAL, 3, 1] = 1.0, 2.0, 4.0, 8.0
    sums = flow.flows(S, flow.groups_of((1, 4), 6))
    wanted = {"image->text": 1.0, "system->image": 2.0, "text->text": 4.0}
    assert {name: value[PLAIN] for name, value in sums.items()} == dict.fromkeys(flow.DIRECTIONS, 0.0) | wanted
    assert sums["image->image"][OFFICIAL] == 8.0
    seen, tokens = torch.ones(2, 9, 9).tril(), {"system": 2, "image": 3, "text": 4}
    for name, (pairs, _) in flow.flows(seen, flow.groups_of((2, 5), 9)).items():
        assert flow.visible_pairs(name, tokens) == pairs, name


def test_by_layer():
    """Into and out of exchanged, a division by the wrong group's tokens, or an example that is not scaled to 1."""
    sums = {name: [0.0] for name in flow.DIRECTIONS} | {"image->text": [6.0], "image->image": [2.0]}
    row = {"tokens": {"system": 1, "image": 2, "text": 3}, "plain": sums}
    shown = flow.by_layer(row, "plain")
    into, out = ([shown[f"{way} {group}"][0] for group in flow.GROUPS] for way in ("into", "out of"))
    assert into == [0, 1, 2] and out == [0, 4, 0] and shown["to text"] == [0.75]
    assert shown["mean image->text"] == [1.0] and shown["mean image->image"] == [2 / 3]
    assert "mean text->image" not in shown
    louder = {**row, "plain": {name: [1000 * value for value in layers] for name, layers in sums.items()}}
    assert flow.mean_by_layer([row, louder], "plain")["image->text"] == [3003.0]
    assert flow.mean_by_layer([row, louder], "plain", equal=True)["image->text"] == [0.75]


def test_label_is_what_the_model_says(shapes):
    """The answer tokenised without the space that the model was trained to say it with: a token that it never says."""
    for example in scene_examples(1):
        said = shapes.generate(example.picture(), example.question, max_new_tokens=8)
        assert said.text == example.answers[0] and flow.answer_label(shapes, example) == said.token_ids[0]


@pytest.mark.parametrize("style", TOKENIZERS)
def test_label_with_any_tokenizer(tiny_llava, style):
    """A label cut at the wrong place: a piece of the prompt, or the space that some tokenizers put before all text."""
    tokenizer = make_tokenizer(style)
    model = tiny_llava({"vocab_size": tokenizer.get_vocab_size()})
    model.config = replace(model.config, image_token_index=tokenizer.token_to_id("<image>"))
    model.tokenizer = tokenizer
    label = flow.answer_label(model, replace(EXAMPLE, answers=("cats", "image", "", "image")))
    asked = model.template.replace("{question}", EXAMPLE.question)
    prompt, whole = (tokenizer.encode(text).ids for text in (asked, f"{asked} image"))
    assert label == whole[len(prompt)] and tokenizer.decode([label]).strip() in ("i", "im", "image")


def test_refused(shapes):
    """A caption without answers, or a label that is no token: a traceback; a prompt beyond the context: measured."""
    with pytest.raises(HimapError, match="--label greedy"):
        flow.answer_label(shapes, replace(EXAMPLE, answers=(" ",)))
    run, _, _ = flow.prepare(shapes, EXAMPLE, "greedy")
    with pytest.raises(HimapError, match="label 502 is no token"):
        next(run.saliency(502))
    with pytest.raises(HimapError, match="context"):
        flow.measure(shapes, replace(EXAMPLE, question="star " * 600), "greedy")


@pytest.fixture
def flows(study, small, tmp_path):
    """Runs the command on some questions; -> what it printed, and the lines of its results."""
    path = tmp_path / "flow.jsonl"

    def run(*arguments):
        status, out, err = study(flow, "--weights", small, "--out", path, *arguments)
        if status:
            raise HimapError(err)
        return out, path.read_text().splitlines()

    return run


def test_resume(flows, tmp_path, monkeypatch):
    """A table that differs after an interruption; layers recorded backwards; one of both definitions not recorded."""
    whole, lines = flows("--limit", 3)
    assert len(lines) == 1 + 3 and len(whole.splitlines()) == 2 + 3 + 2
    assert all(row[-1] == 0 < row[0] for row in (json.loads(line)["plain"]["image->image"] for line in lines[1:]))
    (tmp_path / "flow.jsonl").write_text("\n".join(lines[:2]) + f"\n{lines[2][:50]}")  # a kill in the second result
    resumed, again = flows("--limit", 3)
    assert again == lines and resumed.splitlines()[:-1] == whole.splitlines()[:-1]  # the last one: memory
    monkeypatch.delattr(flow, "measure")
    assert flows("--limit", 3, "--saliency", "official", "--equal")[1] == lines


def test_no_picture_at_all(flows, tmp_path):
    """A table of nothing, or a traceback."""
    (tmp_path / "q.json").write_text('[{"id": 1, "image": "a.png", "text": "How many things are there?"}]')
    with pytest.raises(HimapError, match="none of 1 examples could be used"):
        flows("--questions", tmp_path / "q.json", "--image-folder", tmp_path)


def test_show(flows, tmp_path):
    """A sheet that lacks panels."""
    flows("--weights", EMBEDDED, "--limit", 1, "--show", tmp_path / "new" / "tokens.png")
    with Image.open(tmp_path / "new" / "tokens.png") as sheet:  # the picture; 12 layers in 2 rows, twice
        assert sheet.size == (8 * (168 + 12) + 12, 5 * (168 + 24 + 6) + 12)  # panels of 12 x 14 pixels


def test_bars(flows, tmp_path):
    """A bar chart that does not draw; a check beforehand that empties or removes the picture of an earlier run."""
    pytest.importorskip("matplotlib")
    (tmp_path / "old.png").write_bytes(b"old")
    for name in ("old.png", "new.png"):
        check_picture(tmp_path / name)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
    flows("--limit", 1, "--plot", tmp_path / "new" / "flow.png")
    with Image.open(tmp_path / "new" / "flow.png") as picture:
        assert picture.size == (1800, 1200)
    (tmp_path / "x.png").mkdir()
    with pytest.raises(HimapError, match="cannot be written"), figure(tmp_path / "x.png", 1, (1, 1)):
        pass


def test_no_matplotlib(flows, tmp_path, monkeypatch):
    """The numbers need matplotlib, or its absence shows as a traceback, or late."""
    for name in ("matplotlib", "matplotlib.backend_bases", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(HimapError, match="plots"):
        flows("--plot", tmp_path / "x.png")
    assert not (tmp_path / "flow.jsonl").exists() and len(flows("--limit", 1)[1]) == 2
