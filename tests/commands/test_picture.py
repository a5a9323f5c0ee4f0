"""What is drawn of an answer: the right patches, dark or bright, and words that fit."""

import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageStat

from himap_ref import HimapError
from himap_ref.commands.html_report import draw_report
from himap_ref.commands.picture import draw_kept, follow, font_for, heat_panel, kept_panel, wrap
from himap_ref.methods.schedules import parse_method
from himap_ref.studies.paper import flow
from himap_ref.studies.questions.selection import scene_examples

QUESTION = "What color is the star?"


@pytest.fixture
def asked(shapes, scene_picture):
    """A method's name -> the answer, its reducer, and what became of the image tokens."""

    def ask(name, question=QUESTION):
        method = parse_method(name, shapes)
        answer = shapes.generate(scene_picture, question, method.stages, 8, reducer=method.reducer)
        return answer, method.reducer, follow(shapes, scene_picture, answer, method.reducer)

    return ask


def brightness(panel):
    """Of each of 4 x 4 patches, without its edges."""
    step = panel.width // 4
    corners = [(x * step, y * step) for y in range(4) for x in range(4)]
    return [sum(ImageStat.Stat(panel.crop((x + 4, y + 4, x + step - 4, y + step - 4))).mean) for x, y in corners]


def test_dropped_patches_are_dark_and_can_be_made_out():
    """Patches transposed; dropped ones painted over, so that nobody sees what went."""
    frame = Image.new("RGB", (128, 128), "white")
    frame.paste("red", (64, 0, 128, 128))
    light = brightness(kept_panel(frame, 4, {6}))  # row 1, column 2
    assert light[6] == 255 and max(light[:6] + light[7:]) < 350 < brightness(frame)[0]
    assert light[0] > light[3] + 100  # white and red, in the dark


@pytest.mark.parametrize("class_token", [{}, {-1: 9.0}])
def test_heat(class_token):
    """Scores at other patches than they are of, or all in one colour for the class token's, which has no square."""
    frame = Image.new("RGB", (128, 128), "white")
    light = brightness(heat_panel(frame, 4, {5: -2.0, 6: 2.0, 7: 0.0, **class_token}))
    assert light[5] < 20 and light[6] > 600 and 250 < light[7] < 500 and len({*light[:5], *light[8:]}) == 1


def test_follow_stages(asked):
    """A layer that shows what leaves at the next one; a heat map of nothing; fewer tokens shown on the patch grid."""
    answer, _, tokens = asked("himap-paper")
    stages = answer.trace.stages
    assert tokens.left(1) == tokens.all == list(range(144)) and tokens.side == 12
    assert tokens.left(2) == tokens.left(7) == stages[0].kept.tolist() and tokens.left(8) == stages[1].kept.tolist()
    assert tokens.choices[1].scores == dict(zip(tokens.left(2), stages[1].scores.tolist(), strict=True))
    assert asked("none")[2].choices == []
    (all_go,) = asked("vtw")[2].choices
    assert (all_go.kept, all_go.is_ranked) == ([], False)
    pooled = asked("pool:6")[2]
    assert (pooled.side, pooled.all, pooled.choices) == (6, list(range(36)), [])


def test_follow_reducer(shapes, scene_picture, asked):
    """Other patches drawn than the decoder was given; a stage behind a reducer at the decoder's count of the tokens."""
    _, reducer, tokens = asked("cls:20")
    pixels = shapes.preprocess(scene_picture)
    torch.testing.assert_close(reducer(shapes, pixels), shapes.embed_image(pixels)[:, tokens.left(0)])
    (choice,) = tokens.choices
    lowest = min(choice.scores[place] for place in choice.kept)
    assert all(score <= lowest for place, score in choice.scores.items() if place not in choice.kept)
    answer = shapes.generate(scene_picture, QUESTION, "fastv", 1, reducer=reducer)
    first, second = follow(shapes, scene_picture, answer, reducer).choices
    assert set(second.kept) < set(second.scores) == set(first.kept) and len(second.kept) == 10


def test_class_token_and_pixels_that_nobody_sees(tiny_llava, shapes, scene_picture, monkeypatch):
    """Patches shifted by the class token, or stretched over the pixels beyond the last whole patch; also in `flow`."""
    model = tiny_llava(vision={"image_size": 23}, vision_feature_select_strategy="full", text={"vocab_size": 500})
    model.config = replace(model.config, image_token_index=shapes.config.image_token_index)
    model.tokenizer, model.template = shapes.tokenizer, shapes.template
    model.image_processor = type(model.image_processor)(shortest_edge=23, crop_size=(23, 23))
    answer = model.generate(scene_picture, "Why?", parse_method("2:9:text_to_image", model).stages, 1)
    tokens = follow(model, scene_picture, answer)
    assert (tokens.frame.size, tokens.side, tokens.all) == ((20, 20), 4, list(range(-1, 16)))
    assert tokens.choices[0].kept == [token - 1 for token in answer.trace.stages[0].kept.tolist()]
    draw_kept(model, scene_picture, "Why?", answer)
    drawn = []
    monkeypatch.setattr(flow, "heat_panel", lambda frame, side, scores: drawn.append([*scores]) or frame)
    flow.draw_tokens(model, scene_examples(1)[0], "greedy", "plain")
    assert drawn == [tokens.all] * 2 * 5  # two directions, five layers


MANY = ",".join(f"{layer}:0.9:text_to_image" for layer in range(1, 12))


@pytest.mark.parametrize("name, columns, rows", [
    ("himap", 3, 2), ("none", 2, 1), ("vtw", 3, 1), ("cls:9", 2, 2), ("pool:2", 2, 1), (MANY, 4, 6),
])  # fmt: skip
def test_sheet(shapes, scene_picture, asked, name, columns, rows):
    """A panel that is lost or drawn over, whatever the method; a question that pushes them out of the picture."""
    answer, reducer, tokens = asked(name)
    short, long = (draw_kept(shapes, scene_picture, text, answer, reducer) for text in ("?", "long, é or 日本 " * 99))
    side = tokens.side * round(432 / tokens.side)
    assert short.width == long.width == columns * (side + 12) + 12
    assert short.height + 3 * 35 == long.height == 6 + 5 * 35 + rows * (side + 35 + 6) + 6


def test_words_fit():
    """Words cut off at the edge, lines without end, or a word left out."""
    font = font_for("a", 20)
    lines = wrap("one two three\n" + "x" * 60, font, 100, 99)
    assert all(font.getlength(line) <= 100 for line in lines) and "".join(lines) == "one twothree" + "x" * 60
    assert wrap("one two three four five", font, 100, 2) == ["one two", "three f..."] and wrap("", font, 100, 2) == []


def test_report_is_one_inert_file(shapes, scene_picture, asked):
    """A question that ends the script it stands in; anything that a browser would fetch."""
    question = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \" ' & $DATA"
    answer, _, tokens = asked("himap", question)
    page = draw_report(shapes, scene_picture, question, answer, answer)
    assert page.count("<script") == page.count("</script>") == 2 and "<img" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)|https?://|url\(|@import', page.replace("data:image", ""))
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert (data["question"], data["all"]) == (question, tokens.all)
    assert [choice["kept"] for choice in data["choices"]] == [choice.kept for choice in tokens.choices]
    assert sum(layer["flops"] for layer in data["layers"]) == answer.flops.prefill - 2 * 128 * 502  # lm_head


def test_text_only(shapes, scene_picture):
    """A traceback where there is no picture."""
    answer = shapes.generate(None, QUESTION, max_new_tokens=1)
    with pytest.raises(HimapError, match="text only"):
        draw_kept(shapes, scene_picture, QUESTION, answer)
