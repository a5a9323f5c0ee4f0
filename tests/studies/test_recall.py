"""Target recall: hand-made rows of what stages left."""

import pytest
from toys import write_small_model

from himap_ref.studies.accuracy import recall
from himap_ref.studies.questions.examples import Example
from himap_ref.studies.questions.scenes import SIZE


def example(key, kind, *targets, size=0, place=""):
    return Example(key, "?", ("x",), kind, None, targets=targets, size=size, place=place)


def kept(*stages):
    return {"kept_tokens": [list(stage) for stage in stages], "kept": [9, *map(len, stages)]}


EXAMPLES = [example("a", "color", 1, 2, size=2, place="top left"), example("b", "reading", 5, 6, 7, size=6),
            example("none", "whole"), example("lost", "color", 1, size=1, place="top left")]  # fmt: skip
ROWS = {"a": kept([1, 2, 3, 4], [2, 3]), "b": kept([1, 5, 6, 8], [1, 3]), "none": kept([0, 8, 7, 6], [0, 8]),
        "lost": {"error": "too long"}}  # fmt: skip


def test_stages():
    """The first stage's choice for the last one's; questions without targets, or unanswered, as lost; the last seed."""
    first, last = (figures["all"] for figures in recall.recalls([ROWS], EXAMPLES))
    assert (first["n"], first["recall"], first["hit"]) == (2, pytest.approx((1 + 2 / 3) / 2), 1.0)
    assert (last["recall"], last["hit"]) == (pytest.approx((1 / 2 + 0) / 2), 0.5)
    seeds = recall.recalls([ROWS, {**ROWS, "a": kept([1, 3, 4, 5], [3, 4])}], EXAMPLES)[-1]["color"]
    assert (seeds["n"], seeds["recall"]) == (1, 0.25)


def test_groups():
    """A question counted in another's kind, size or place; a number in a size of its own; targets as the weight."""
    _, last = recall.recalls([ROWS], EXAMPLES)
    found = {group: (figures["n"], figures["recall"]) for group, figures in last.items()}
    half = (1, 0.5)
    assert found == {"all": (2, 0.25), "color": half, "reading": (1, 0), "2": half, "4+": (1, 0), "top left": half}
    assert list(last) == ["all", "color", "reading", "2", "4+", "top left"]
    groups = [recall.groups_of(example("a", "count", 1, size=size, place="x"))[2:] for size in (0, 1, 3, 4, 7)]
    assert groups == [(), ("1 patch", "x"), ("3", "x"), ("4+", "x"), ("4+", "x")]


def test_chance():
    """Chance by the picture's 144 patches, not by the tokens that entered; by those that entered the stage; a hit by
    chance as likely as one patch is, or as if patches were drawn with replacement."""
    first, last = (figures["color"] for figures in recall.recalls([ROWS], EXAMPLES))
    assert (first["chance"], last["chance"]) == (pytest.approx(4 / 9), pytest.approx(2 / 9))
    assert first["hit_chance"] == pytest.approx(1 - 5 / 9 * 4 / 8)  # no target among the five of nine that went
    assert recall.of_question((0, 1), range(8), 9)["hit_chance"] == 1  # two targets, one token gone
    assert recall.of_question((0,), (), 9) == {"recall": 0, "chance": 0, "hit": False, "hit_chance": 0}


def test_nothing_to_tell():
    """A crash, or 0 %, where there are no targets or no stages."""
    assert recall.recalls([ROWS], EXAMPLES[2:3]) == []
    assert recall.recalls([{"a": {"kept_tokens": [], "kept": [9]}}], EXAMPLES[:1]) == []


def test_table():
    """A stage's row under another layer, headings beside other figures."""
    text = recall.table({"m": ((2, 8), recall.recalls([ROWS], EXAMPLES))})
    header, _, first, last = text.splitlines()[:4]
    assert [cell.strip() for cell in header.split("|")[3:6]] == ["all (2)", "color (1)", "reading (1)"]
    assert first.startswith("| m | 2 | 83.3% | 100.0% | 66.7% |")
    assert last.startswith("| m | 8 | 25.0% | 50.0% | 0.0% |")
    assert header.endswith("| chance | hit | hit by chance |") and last.count("|") == header.count("|")


@pytest.mark.parametrize("side, method, reason", [
    (28, "1:2:text_to_image", "no target patches"), (SIZE, "pool:3", "has no stages"),
    (SIZE, "1:20:text_to_image,2:5:random", ""),
])  # fmt: skip
def test_command(study, small, tmp_path, side, method, reason):
    """Targets looked for among another model's four patches; a reducer's empty table; more than one token said."""
    if side != SIZE:
        write_small_model(small := tmp_path / "m", side=side)
    out = tmp_path / "out"
    status, shown, err = study(recall, "--weights", small, "--scenes", 1, "--methods", method, "--out", out)
    if reason:
        assert status == 2 and reason in err
        return
    shown, (file, *others) = shown.splitlines(), [*out.glob("*.jsonl")]
    assert len(shown) == 6 and "| 1 | " in shown[2] and "| 2 | " in shown[3] and "13.9%" in shown[2]
    assert len(others) == 4 and '"new_tokens": 1,' in file.read_text()
