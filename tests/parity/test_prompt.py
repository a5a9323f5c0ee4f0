"""Token ids against transformers' LlavaProcessor."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from toys import IMAGE_TOKEN, TOKENIZERS, noise

from himap_ref.prompt import TEMPLATES, encode_prompt

from .tiny import make_processor

transformers = pytest.importorskip("transformers")

QUESTIONS = [
    "What is in the picture?", "Was ist 🦊 und 猫 à côté? \u0130\u00df", "  leading and trailing  ",
    "line\nbreaks\n\nand\ttabs\r\n", "braces {} {question} {0} {{image}} %s", "< image > <img> <IMAGE> [INST]",
    "\n?\n", "x" * 300,
]  # fmt: skip
PAIRS = [(style, strategy) for style in TOKENIZERS for strategy in ("default", "full")]


@pytest.fixture(scope="module", params=PAIRS, ids=str)
def pair(request, tmp_path_factory):
    """(transformers' processor, the tokenizer that it saves, image tokens)."""
    style, strategy = request.param
    folder = tmp_path_factory.mktemp("processor")
    processor = make_processor(style, strategy)
    processor.save_pretrained(folder)
    return processor, Tokenizer.from_file(str(folder / "tokenizer.json")), 16 + (strategy == "full")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("question", QUESTIONS)
def test_ids_equal(pair, template, question):
    """A space or line break too many around the image, or a question that the template mangles."""
    processor, tokenizer, count = pair
    text = template.partition("{answer}")[0].replace("{question}", question)
    expected = processor(images=noise(28, 28), text=text).input_ids
    expected = expected[0] if isinstance(expected[0], list) else expected
    ids = encode_prompt(tokenizer, question, template, tokenizer.token_to_id(IMAGE_TOKEN), count)
    assert ids == list(expected)
    assert expected.count(tokenizer.token_to_id(IMAGE_TOKEN)) == count


def test_styles_differ():
    """Three tokenizers that give the same ids would be one test run three times."""
    text = TEMPLATES["vicuna_v1"]
    ids = [make_processor(style).tokenizer(text).input_ids for style in TOKENIZERS]
    assert ids[0] != ids[1] != ids[2] != ids[0]
