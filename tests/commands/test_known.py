"""Whoever asks the small model what it was not trained on is told so; whoever asks what it was is not."""

import io
import sys

import pytest
import torch
from PIL import Image, ImageDraw, ImageOps
from toys import noise, write_json

from himap_ref import HimapError, Llava
from himap_ref.checkpoint.config import read_settings
from himap_ref.checkpoint.files import read_tokenizer
from himap_ref.commands.known import is_known, note_on
from himap_ref.commands.options import EMBEDDED
from himap_ref.studies.questions.drawing import draw
from himap_ref.studies.questions.scenes import CHOICE_HINT, KINDS, TEST, make_questions, make_scene, question_forms
from himap_ref.studies.weights import train

QUESTION = "What color is the star?"
RESAMPLED = Image.Resampling.NEAREST, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS


@pytest.fixture(scope="module")
def model():
    """All but the weights of a trained one."""
    with torch.device("meta"):
        model = Llava(train.shapes_config(512, 3))
    model.settings = train.settings()
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As training writes it, with random weights, and a scene."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), read_tokenizer(EMBEDDED)
    model = Llava(train.shapes_config(tokenizer.get_vocab_size(), tokenizer.token_to_id("<image>")))
    model.tokenizer = tokenizer
    train.export(model.requires_grad_(False), folder)
    return folder


def test_all_that_scenes_ask_is_known():
    """A new wording, colour or kind that himap.json does not know; a form that nobody asks any more."""
    forms, asked = question_forms(), {kind: set() for kind in KINDS}
    for seed in range(TEST, TEST + 300):
        for question in make_questions(make_scene(seed), 60):
            asked[question.kind].add(question.text)
    assert forms.keys() == asked.keys()
    for kind, texts in asked.items():
        assert [text for text in texts if not is_known(text, "\n\n".join(forms[kind]))] == []
        assert all(any(is_known(text, form) for text in texts) for form in forms[kind])


OPTIONS = "\nA. red\nB. blue\nC. green\nD. cyan\n"
NEAR_MISSES = [
    "", " ", "?", "what is this", "hello", "What is in the picture?", "Welche Farbe hat der Stern?", "什么颜色?",
    "What colour is the star?", "what color is the star?", "WHAT COLOR IS THE STAR?", "What color is the star",
    "What color is the star??", "What color  is the star?", "What color is the dog?", "What color is the red star?",
    "What color is the thing at the middle?", "What shape is the pink thing?", "Where is the pink star?",
    "Where is the red?", "How many dogs are there?", "How many red stars are there?", "How many star are there?",
    "Is there a orange star?", "Is there a dog?", "Is there anything at the top?", "What is beside the red star?",
    "What is left of the star?", "What number is this?", "What pattern is the star?",
    "Are there more red things than blue things?", f"{QUESTION} {QUESTION}", f"{QUESTION}\nIs there a star?",
    f"{QUESTION}{OPTIONS}", f"{QUESTION}{OPTIONS.replace('cyan', 'pink')}{CHOICE_HINT}",
    f"What shape is the red thing?{OPTIONS}{CHOICE_HINT}", f"What number is written?{OPTIONS}{CHOICE_HINT}",
]  # fmt: skip


@pytest.mark.parametrize("question", NEAR_MISSES)
def test_near_misses(model, scene_picture, question):
    """The model's guess at what it has never been asked, given without a word."""
    note = note_on(model, scene_picture, question)
    assert note.startswith("a strange question: this small model knows only drawn scenes and these kinds of question")
    assert "Where is the " in note and "--weights llava-1.5-7b --image FILE --prompt QUESTION" in note
    assert "\n" not in note


def test_known_questions(model, scene_picture):
    """A folder's file whose full stop, or whose bracket, means something else than itself."""
    for question in (QUESTION, f" {QUESTION}\n", f"{QUESTION}{OPTIONS}{CHOICE_HINT}"):
        assert note_on(model, scene_picture, question) is None
    assert is_known("a.c (d", "x\n\na.c ({d|e.}") and not is_known("abc (d", "a.c ({d|e.}")
    assert not is_known("a.c (eX", "a.c ({d|e.}") and is_known("{x", "{x")


def jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


DRAWN = {
    "as it is": lambda image: image,
    "JPEG 90": lambda image: jpeg(image, 90),
    "JPEG 75": lambda image: jpeg(image, 75),
    **{f"336, {way.name}": lambda image, way=way: image.resize((336, 336), way) for way in RESAMPLED},
    "336, JPEG 90": lambda image: jpeg(image.resize((336, 336), Image.Resampling.LANCZOS), 90),
    "small": lambda image: image.resize((100, 100), Image.Resampling.BICUBIC),
}


@pytest.fixture(scope="module")
def scenes():
    """Of a hundred the emptiest ten and the thirty most crowded."""
    every = sorted(map(make_scene, range(TEST, TEST + 100)), key=lambda s: sum(len(t.patches) for t in s.things))
    return {scene.seed: draw(scene) for scene in (*every[:10], *every[-30:])}


@pytest.mark.parametrize("change", DRAWN.values(), ids=DRAWN)
def test_drawn(model, scenes, change):
    """A scene that somebody has saved or scaled, taken for a photograph, as crowded or noisy ones may be."""
    assert [seed for seed, scene in scenes.items() if note_on(model, change(scene), QUESTION) is not None] == []


def page(side, paper):
    image = Image.new("RGB", (side, side), paper)
    for y in range(8, side - 16, 18):
        ImageDraw.Draw(image).text((8, y), "The quick brown fox jumps over it." * (side // 160), "#141414")
    return image


SCENE = draw(make_scene(TEST))
STRANGE = {
    "noise": noise(168, 168),
    "photograph": noise(9, 9).resize((336, 336), Image.Resampling.BICUBIC),
    "pale photograph": ImageOps.colorize(noise(9, 9, "L").resize((168, 168)), "#8090a0", "#f4f6f8"),
    "white": Image.new("RGB", (168, 168), "white"),
    "pale": Image.new("RGB", (168, 168), "#f0f0f0"),
    "one colour": Image.new("RGB", (168, 168), "#de2020"),
    "page": page(168, "white"),
    "page of another paper": page(168, "#f4f4f0"),
    "large page": page(640, "#f4f4f0"),
    "a screen": ImageOps.expand(SCENE, (200, 40), "#f0f0f0"),
    "a scene on white": ImageOps.expand(SCENE, 168, "white"),
    "a scene's half": SCENE.crop((0, 0, 168, 84)),
    "inverted": ImageOps.invert(SCENE),
    "dark": SCENE.point(lambda level: level * 2 // 3),
    "one pixel": Image.new("RGB", (1, 1), "#de2020"),
    "none": None,
}


@pytest.mark.parametrize("image", STRANGE.values(), ids=STRANGE)
def test_strange_pictures(model, image):
    """Anything with some of the palette's colours, or pale, taken for a scene."""
    strange = "a strange picture" if image else "no picture"
    assert note_on(model, image, QUESTION).startswith(f"{strange}: this small model knows")
    assert note_on(model, image, "What?").startswith(f"{strange} and a strange question: this")


@pytest.mark.parametrize("left", [(), ("note",), ("palette", "questions"), ("note", "palette"), ("note", "questions")])
def test_a_folder_says_what_it_knows(model, monkeypatch, left):
    """A note for models that say nothing, or the check of a setting that is not there."""
    monkeypatch.setattr(model, "settings", {name: model.settings[name] for name in left})
    note = note_on(model, STRANGE["noise"], "What?")
    assert note is None or note.startswith(("a strange question: ", "a strange picture: ")["palette" in left])
    assert (note is None) == (len(left) < 2 or "note" not in left)


@pytest.mark.parametrize("questions", [5, None, [QUESTION], {QUESTION: 1}])
def test_questions_of_another_type(tmp_path, questions):
    write_json(tmp_path / "himap.json", {"questions": questions})
    with pytest.raises(HimapError, match="himap.json: questions is not text"):
        read_settings(tmp_path)


def test_command(run, folder, tmp_path, monkeypatch):
    """A note among the answers, one for the first question of a conversation alone, or one without need."""
    known, strange = folder / "example.png", tmp_path / "x.png"
    noise(50, 50).save(strange)
    ask = "--weights", folder, "--dtype", "float32", "--max-new-tokens", 1, "--image"
    for image, question, said in (
        (known, QUESTION, ""), (known, "What?", "a strange question"), (strange, QUESTION, "a strange picture"),
        ("none", QUESTION, "no picture"),
    ):  # fmt: skip
        status, out, err = run(*ask, image, "--prompt", question)
        assert status == 0 and "knows only" not in out and err.count("knows only") == bool(said)
        assert f"note: {said}" in err
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"Why?\n{QUESTION}\nWho?\n"))
    status, _, err = run(*ask, known, "--chat", "--prompt", QUESTION)
    assert status == 0 and err.count("note: a strange question: this small model knows") == 2


def test_page(folder, monkeypatch):
    """The page's warning, for a question, too."""
    pytest.importorskip("gradio")
    from himap_ref.demo import page

    said = []
    monkeypatch.setattr(page.gr, "Warning", said.append)
    model = Llava.from_pretrained(folder)
    for question in (QUESTION, "Why?"):
        page.answer_as_html(model, str(folder / "example.png"), question, page.Method("none"), 1)
    assert len(said) == 1 and said[0].startswith("a strange question: this small model knows")
