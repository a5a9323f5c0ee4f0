"""The sweep's columns that hold a criterion against chance, target patches and a smaller picture."""

import pytest

from himap_ref.studies import sweep
from himap_ref.studies.entries import CHANCE, SMALLER
from himap_ref.studies.examples import Example
from himap_ref.studies.metrics import bootstrap, holm


def example(key, *targets):
    return Example(key, "?", ("x",), "", None, targets=targets)


def kept(*stages):
    return {"kept_tokens": [list(stage) for stage in stages], "kept": [9, *map(len, stages)], "correct": 1.0}


def test_recall():
    """Targets of another question, the first stage's choice for the last one's, questions without targets as lost."""
    examples = [example("a", 1, 2), example("b", 7), example("none")]
    runs = [{"a": kept([1, 2, 3, 4], [2, 3]), "b": kept([1, 2, 3], [1]), "none": kept([0, 8, 7], [0])}]
    assert sweep.recall_of(runs, examples) == (pytest.approx(0.25), pytest.approx((2 / 9 + 1 / 9) / 2))
    assert sweep.recall_of(runs, examples, stage=0) == (pytest.approx(0.5), pytest.approx((4 / 9 + 3 / 9) / 2))
    assert sweep.recall_of(runs, [example("none")]) is None  # nothing to find
    assert sweep.recall_of([{"a": {"kept_tokens": [], "kept": [9]}}], examples[:1]) is None  # no stage


def test_holm():
    """Every p times the number of tests, or one that falls below a smaller one's."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0] and holm([]) == []


def line(group, label, p=None):
    return {"group": group, "label": label, "p": p, "judged": 4}


def test_compare():
    """Chance at another budget, differences of means over other questions, hard questions that the method fails."""
    lines = [line("", "vanilla", 1.0), line("g", "HiMAP", 0.01), line("g", CHANCE), line("g", SMALLER, 0.02)]
    lines += [line("h", "HiMAP", 0.03)]
    himap, chance = {"a": 1.0, "b": 0.0, "c": 1.0}, {"a": 0.5, "b": 0.5, "c": 0.0, "d": 1.0}
    scores = [{"a": 1.0}, himap, chance, {"a": 0.0, "b": 0.0, "c": 1.0}, {"a": 0.0}]
    sweep.compare(lines, scores)
    assert lines[1]["over_chance"] == (pytest.approx(1 / 3), *bootstrap([0.5, -0.5, 1.0]))
    assert [each["over_chance"] is None for each in lines] == [True, False, True, False, True]
    assert lines[1]["hard"] == (0.5, 2) and lines[2]["hard"] == (0.5, 2) and lines[4]["hard"] is None
    assert [each.get("p_holm") for each in lines] == [None, 0.03, None, 0.04, 0.04]


SAID = [(0.01, 0.09, "better"), (-0.2, -0.1, "worse"), (-0.1, 0.1, "cannot be told")]


@pytest.mark.parametrize("low, high, said", SAID)
def test_verdict(low, high, said):
    """A difference within the noise told as a gain, or a loss told as nothing."""
    text = sweep.verdict({**line("own", "mine"), "over_chance": ((low + high) / 2, low, high)})
    assert f"mine: {said}" in text and f"below about {100 * (high - low) / 2:.0f} points" in text
