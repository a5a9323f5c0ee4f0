"""The sweep's columns that hold a criterion against chance, target patches and a smaller picture."""

import json
from itertools import pairwise

import pytest
import torch

from himap_ref import LLAVA_1_5_7B, Llava
from himap_ref.methods.schedules import parse_method
from himap_ref.studies.accuracy import sweep
from himap_ref.studies.accuracy.controls import ORACLE, POSITIONS
from himap_ref.studies.accuracy.entries import CHANCE, SMALLER, families
from himap_ref.studies.accuracy.evaluate import answer
from himap_ref.studies.accuracy.metrics import bootstrap, holm
from himap_ref.studies.common.plots import spread
from himap_ref.studies.questions.selection import scene_examples


def line(group, label, p=None):
    return {"group": group, "label": label, "p": p, "judged": 4}


def test_compare():
    """Chance at another budget, means over other questions, hard ones that the method fails; p corrected all alike."""
    lines = [line("", "vanilla", 1.0), line("g", "HiMAP", 0.01), line("g", CHANCE), line("g", SMALLER, 0.02)]
    lines += [line("h", "HiMAP", 0.03)]
    himap, chance = {"a": 1.0, "b": 0.0, "c": 1.0}, {"a": 0.5, "b": 0.5, "c": 0.0, "d": 1.0}
    scores = [{"a": 1.0}, himap, chance, {"a": 0.0, "b": 0.0, "c": 1.0}, {"a": 0.0}]
    sweep.compare(lines, scores)
    assert lines[1]["over_chance"] == (pytest.approx(1 / 3), *bootstrap([0.5, -0.5, 1.0]))
    assert [each["over_chance"] is None for each in lines] == [True, False, True, False, True]
    assert lines[1]["hard"] == (0.5, 2) and lines[2]["hard"] == (0.5, 2) and lines[4]["hard"] is None
    assert [each.get("p_holm") for each in lines] == [None, 0.03, None, 0.04, 0.04]
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0] and holm([]) == []


def test_verdict():
    """A difference within the noise told as a gain, or a loss told as nothing."""
    for low, high, said in ((0.01, 0.09, "better"), (-0.2, -0.1, "worse"), (-0.1, 0.1, "cannot be told")):
        text = sweep.verdict({**line("own", "mine"), "over_chance": ((low + high) / 2, low, high)})
        assert f"mine: {said}" in text and f"below about {100 * (high - low) / 2:.0f} points" in text


FAMILIES = ("none", "himap", "vtw", "1:20:random3,2:5:dart", f"1:20:{ORACLE},2:1:last_to_image", "2:0:none", "cls:7",
            "divprune:7", "visionzip:7", "pool:5", "down:4")  # fmt: skip


@pytest.mark.parametrize("text", FAMILIES)
def test_positions_of_every_family(small, text):
    """One that another prompt's length, or tokens made before the decoder, upset; a switch that renumbers nothing."""
    model = Llava.from_pretrained(small)
    examples = scene_examples(1)[:3]
    method, pictures = parse_method(text, model), [example.picture() for example in examples]
    plain, packed, stretched = (
        torch.stack([each.first_logits for each in answer(model, examples, pictures, method, 2, positions=how)])
        for how in POSITIONS
    )
    left = [stage.count(144) for stage in method.stages]
    assert packed.equal(plain) is (not left)
    assert stretched.equal(plain) is (not any(left))  # without an image token there is nothing to stretch


def test_command(study, small, tmp_path):
    """Vanilla's answers for those without the picture; FLOPs, recall or a p of theirs; a table too wide to be read."""
    methods = "--methods", "1:20:text_to_image", "fastv", "random"
    status, out, err = study(sweep, "--weights", small, "--scenes", 1, *methods, "--out", tmp_path)
    assert status == 0 and max(map(len, out.splitlines())) <= 120, err
    vanilla, blind, own, _, chance = json.loads((tmp_path / "table.json").read_text())
    assert blind["label"] == "no picture" and blind["kept"] == [] and blind["n"] == vanilla["n"] == own["n"]
    assert [blind[name] for name in sweep.RATIOS] == [None] * 3 and blind["recall"] is None and "p_holm" not in blind
    assert {*blind["kinds"]} == {*vanilla["kinds"]} and len([*tmp_path.glob("none-*.jsonl")]) == 2
    assert own["recall"][1] == pytest.approx(20 / 144) and "color" in own["recall_by_stage"][0]
    assert "| no picture | 8 |  |  |  |" in (tmp_path / "table.md").read_text().replace(f"| {blind['n']} |", "| 8 |")
    assert own["spread"] is None and len(chance["spread"]) == 2 and len([*tmp_path.glob("random*.jsonl")]) == 5


def test_spread():
    """Labels on top of each other, out of order, moved though there was room, or in the panel's title."""
    assert spread([0.0, 5.0, 9.0], 1) == [0.0, 5.0, 9.0]
    moved = spread([0.3, 0.1, 0.2, 5.0], 1)
    assert sorted(range(4), key=moved.__getitem__) == [1, 2, 0, 3] and moved[3] == 5.0
    assert min(b - a for a, b in pairwise(sorted(moved))) == pytest.approx(1, abs=1e-6)
    assert sum(moved[:3]) / 3 == pytest.approx(0.2)
    assert (
        spread([9.8, 9.9, 8.0], 1, top=10) == pytest.approx([9.0, 10.0, 8.0], abs=0.4)
        and max(spread([3, 3], 1, 3)) == 3
    )


def drawn(group, label, ratio, accuracy, recall=None):
    return {"group": group, "label": label, "ratio": ratio, "accuracy": accuracy, "recall": recall, "n": 9,
            "interval": (accuracy - 0.1, accuracy + 0.1)}  # fmt: skip


def test_draw(tmp_path, monkeypatch):
    """More than eight lines in a panel, a colour twice, a method in no panel, a crash after all was computed."""
    pytest.importorskip("matplotlib")
    panels, real = [], sweep.label_ends
    monkeypatch.setattr(sweep, "label_ends", lambda axis, ends: (panels.append(ends), real(axis, ends)))
    names = [*families(LLAVA_1_5_7B)]
    lines = [drawn("", "vanilla", 1, 0.9), drawn("", "no picture", None, 0.2), drawn("K1", "K1 = 2", 0.5, 0.5)]
    lines += [drawn(f"equal FLOPs, {b}", name, b, 0.6, (0.5, 0.4)) for name in names for b in (0.7, 0.5)]
    lines += [drawn("criteria", "text, text", 0.5, 0.6), drawn("own", "mine", 0.5, 0.6)]
    sweep.draw(lines, tmp_path / "a.png")
    curves = [[end for end in ends if end[2] not in ("vanilla", "no picture")] for ends in panels]
    assert [len(ends) for ends in curves] == [8, 8, 8, 1]
    assert all(len({color for *_, color in ends}) == len(ends) for ends in curves)
    assert {name for ends in curves for _, _, name, _ in ends} == {*names, "K1"}
    assert all(x == 0.7 for ends in curves[:3] for x, *_ in ends)
    assert (tmp_path / "a.png").stat().st_size > 10000
    sweep.draw(lines[:1], tmp_path / "b.png")
