"""The trained model in weights/shapes answers, as its model card says."""

from collections import defaultdict

import pytest
from toys import noise

from himap_ref.assistant.picture import load_image
from himap_ref.commands.ask import EXAMPLE
from himap_ref.commands.known import note_on
from himap_ref.methods.schedules import parse_method
from himap_ref.studies.accuracy.evaluate import answer
from himap_ref.studies.accuracy.metrics import exact
from himap_ref.studies.common.asking import ask_each
from himap_ref.studies.questions.scenes import KINDS
from himap_ref.studies.questions.selection import scene_examples


@pytest.mark.parametrize("method", ["none", "himap"])
def test_answers(shapes, method):
    """Damaged or mismatched weights, template, pixels or tokenizer: any of them brings the answers down to chance."""
    hits, method = defaultdict(list), parse_method(method, shapes)
    for example, got in ask_each(scene_examples(10), 64, lambda *asked: answer(shapes, *asked, method, 8)):
        hits[example.kind].append(exact(got.text, example))
    assert set(hits) == set(KINDS)
    for kind, right in hits.items():
        assert sum(right) >= 0.8 * len(right), kind


def test_the_example_needs_its_picture(shapes):
    """A first answer that shows nothing, or under a note; nonsense about a photograph given without a word."""
    picture, question = load_image(EXAMPLE[0]), EXAMPLE[1]
    with_it, without = shapes.generate(picture, question).text, shapes.generate(None, question).text
    assert with_it == "yellow" != without and note_on(shapes, picture, question) is None
    assert note_on(shapes, noise(200, 150), "What is it?").startswith("a strange picture and a strange question: this")
