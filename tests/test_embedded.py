"""The trained model in weights/shapes answers, as its model card says."""

from collections import defaultdict

import pytest

from himap_ref.studies.evaluate import answer_all
from himap_ref.studies.methods import parse_method
from himap_ref.studies.metrics import exact
from himap_ref.studies.questions import scene_examples
from himap_ref.studies.scenes import KINDS


@pytest.mark.parametrize("method", ["none", "himap"])
def test_answers(shapes, method):
    """Damaged or mismatched weights, template, pixels or tokenizer: any of them brings the answers down to chance."""
    hits = defaultdict(list)
    for example, (answer, _) in answer_all(shapes, scene_examples(30), parse_method(method, shapes), 8, batch=64):
        hits[example.kind].append(exact(answer.text, example))
    assert set(hits) == set(KINDS)
    for kind, right in hits.items():
        assert sum(right) >= 0.8 * len(right), kind
