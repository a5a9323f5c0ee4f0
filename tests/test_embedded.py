"""The trained model in weights/shapes answers, as its model card says."""

from collections import defaultdict

import pytest

from himap_ref import Llava
from himap_ref.studies.methods import parse_stages
from himap_ref.studies.scenes import KINDS
from himap_ref.studies.sweep import answer_all, ask_all


@pytest.fixture(scope="module")
def shapes():
    return Llava.from_pretrained("weights/shapes")


@pytest.mark.parametrize("pruned", [False, True])
def test_answers(shapes, pruned):
    """Damaged or mismatched weights, template, pixels or tokenizer: any of them brings the answers down to chance."""
    asked = ask_all(30)
    stages = parse_stages(shapes.settings["stages"]) if pruned else ()
    hits = defaultdict(list)
    for (_, question), (text, _, _) in zip(asked, answer_all(shapes, asked, stages), strict=True):
        hits[question.kind].append(text == question.answer)
    assert set(hits) == set(KINDS)
    for kind, right in hits.items():
        assert sum(right) >= 0.8 * len(right), kind
