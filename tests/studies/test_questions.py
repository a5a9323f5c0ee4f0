"""What is asked: drawn scenes and question files, and everything that can be wrong with a file."""

import argparse
import json
import re
from pathlib import Path

import pytest
from toys import noise

from himap_ref import HimapError
from himap_ref.studies.questions.drawing import draw
from himap_ref.studies.questions.examples import Example
from himap_ref.studies.questions.question_files import SEVERAL
from himap_ref.studies.questions.scenes import CHOICE_HINT, KINDS, TEST, make_questions, make_scene
from himap_ref.studies.questions.selection import FORMATS, add_question_arguments, load_examples, scene_examples

PLAIN = {"question_id": 7, "image": "a.png", "text": "Is there a cat?", "label": "yes"}


def turns(*values):
    """What is said in turn, by the human first."""
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


OFFICIAL = {"id": "5", "image": "a.png", "conversations": turns("<image>\nWhich?\nA. red\nB. blue", "B")}


def load(*words):
    parser = argparse.ArgumentParser()
    add_question_arguments(parser)
    return load_examples(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "pictures"
    path.mkdir()
    noise(8, 6).save(path / "a.png")
    return path


@pytest.fixture
def ask(tmp_path, folder):
    """Factory: entries, or the file's text, and more options -> examples."""

    def call(content, *options):
        path = tmp_path / "questions.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return load("--questions", path, "--image-folder", folder, *options)[0]

    return call


def test_scenes_ask_what_the_published_table_asked():
    """Other questions, or another of a kind: the README's figures would belong to another set."""
    examples, settings = load("--scenes", 4)
    assert settings == {"questions": "scenes"}
    expected = []
    for scene in map(make_scene, range(TEST, TEST + 4)):
        first = {}
        for question in make_questions(scene, 30):
            row = f"{scene.seed}-{question.kind}", question.kind, question.text, (question.answer,), scene
            first.setdefault(question.kind, row)
        expected += [first[kind] for kind in KINDS if kind in first]
    assert [(e.id, e.kind, e.question, e.answers, e.source) for e in examples] == expected
    assert examples[0].id == f"{TEST}-color" and examples[0].question == "What color is the thing at the middle center?"
    assert len({e.id for e in examples}) == len(examples)
    assert examples[0].picture().tobytes() == draw(examples[0].source).tobytes()


def test_limit_and_first_seed(ask):
    """N scenes; another seed not asked; a longer run that cannot go on; a broken entry beyond the limit in the way."""
    examples, settings = load("--scenes", 3, "--first-seed", 12, "--limit", 2)
    assert examples == scene_examples(3, 12)[:2] and settings == load("--scenes", 5)[1]
    assert len(ask([PLAIN, OFFICIAL, {}], "--limit", 2)) == 2


def test_official_layout(ask, folder):
    """Another question than the official code asks (it removes `<image>` and strips), a lost label or top5."""
    (example,) = ask([{**OFFICIAL, "top5_res": [350, 360, 319, 315, 383]}])
    question = "Which?\nA. red\nB. blue"
    assert example == Example("5", question, ("B",), "", folder / "a.png", (350, 360, 319, 315, 383))
    assert example.picture().tobytes() == noise(8, 6).tobytes()
    assert ask([OFFICIAL], "--hint", "letter")[0].question == f"{question}\n{CHOICE_HINT}"


def test_evaluation_lines(ask, folder):
    """POPE's lines not read: whole-number ids, blank lines, a byte-order mark, U+2028 within a string."""
    more = {**PLAIN, "question_id": 0, "text": "One\u2028two?", "label": "no", "category": "popular"}
    text = "\ufeff" + json.dumps(PLAIN) + "\r\n\n" + json.dumps(more, ensure_ascii=False)
    assert ask(text.encode()) == [
        Example("7", "Is there a cat?", ("yes",), "", folder / "a.png"),
        Example("0", "One\u2028two?", ("no",), "popular", folder / "a.png"),
    ]
    assert ask(json.dumps(PLAIN).encode()) == ask([PLAIN])  # one line alone is no list


CHOICES = {"question_id": 7, "image": "a.png", "question": "Which?", "choices": ["red", "blue"]}
CAT, LISTED, LINE = PLAIN["text"], "Which?\nA. red\nB. blue", "Which? (A) dark red (B) blue"
PARTS = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Which?"}]


def chat(content, answer="B", **more):
    said = [{"role": "system", "content": "s"}, {"role": "user", "content": content}]
    return {"id": 7, "messages": [*said, {"role": "assistant", "content": answer}], **more}


READ = {  # what stands there: (entry, question, answers, name of the picture)
    "one picture in a list": ({**PLAIN, "image": ["a.png"]}, CAT, "yes", "a.png"),
    "images": ({**PLAIN, "image": None, "images": ["a.png"]}, CAT, "yes", "a.png"),
    "images, the same twice": ({**PLAIN, "images": ["a.png"]}, CAT, "yes", "a.png"),
    "an object with a path": ({**PLAIN, "image": {"path": "a.png", "bytes": None}}, CAT, "yes", "a.png"),
    "Windows' slashes": ({**PLAIN, "image": "b\\a.png"}, CAT, "yes", "b/a.png"),
    "no picture": ({**PLAIN, "image": None}, CAT, "yes", None),
    "blank picture": ({**PLAIN, "image": " "}, CAT, "yes", None),
    "empty list": ({**PLAIN, "image": [], "images": [None, ""]}, CAT, "yes", None),
    "fields about no picture": ({**PLAIN, "image": "", "image_id": None, "has_image": False}, CAT, "yes", None),
    "roles": (chat("<image>\nWhich?", image="a.png"), "Which?", "B", "a.png"),
    "roles, from and value": ({"id": 7, "conversations": [{"from": "user", "value": "Which?"},
                                                          {"from": "assistant", "value": "B"}]}, "Which?", "B", None),
    "parts": (chat(PARTS), "Which?", "B", "a.png"), "parts after the text": (chat(PARTS[::-1]), "Which?", "B", "a.png"),
    "parts, named beside": (chat([{"type": "image"}, PARTS[1]], images=["a.png"]), "Which?", "B", "a.png"),
    "parts, named twice": (chat(PARTS, image="a.png"), "Which?", "B", "a.png"),
    "OpenAI's parts": (chat([PARTS[1], {"type": "image_url", "image_url": {"url": "a.png"}}]), "Which?", "B", "a.png"),
    "an answer in parts": (chat(PARTS, [{"type": "text", "text": "B"}]), "Which?", "B", "a.png"),
    "other roles": ({"id": 7, "conversation": [{"role": "Human", "content": "Which?"},
                                               {"role": "Bot", "content": "B"}]}, "Which?", "B", None),
    "whole number": ({**PLAIN, "label": 3}, CAT, "3", "a.png"), "zero": ({**PLAIN, "label": 0}, CAT, "0", "a.png"),
    "number": ({**PLAIN, "label": 2.5}, CAT, "2.5", "a.png"),
    "whole number of a table": ({**PLAIN, "label": 3.0}, CAT, "3", "a.png"),
    "options": ({**CHOICES, "answer": "B"}, LISTED, "B", "a.png"),
    "options by letter": ({**CHOICES, "choices": {"A": "red", "B": "blue"}, "answer": "B"}, LISTED, "B", "a.png"),
    "options with letters": ({**CHOICES, "choices": ["A. red", "(B) blue"], "answer": "B"}, LISTED, "B", "a.png"),
    "options there already": ({**CHOICES, "question": LISTED, "answer": "B"}, LISTED, "B", "a.png"),
    "index": ({**CHOICES, "answer": 1}, LISTED, "B", "a.png"),
    "index of listed options": ({**PLAIN, "text": LISTED, "label": 0.0}, LISTED, "A", "a.png"),
    "index, options on a line": ({**PLAIN, "text": LINE, "label": 0}, LINE, "A", "a.png"),
    "index by name": ({**CHOICES, "correct_choice_idx": 0}, LISTED, "A", "a.png"),
    "number that is an option": ({**CHOICES, "choices": [2, 1], "answer": "1"}, "Which?\nA. 2\nB. 1", "1", "a.png"),
    "no options": ({**CHOICES, "choices": [], "answer": 1}, "Which?", "1", "a.png"),
    "an object without a path": ({**PLAIN, "image": {"path": None}}, CAT, "yes", None),
    "options as fields": ({**PLAIN, "text": "Which?", "A": "red", "B": "blue", "label": "B"}, LISTED, "B", "a.png"),
    "a hint": ({**CHOICES, "hint": "Look.", "answer": 1}, f"Context: Look.\n{LISTED}", "B", "a.png"),
    "option's text": ({**CHOICES, "answer": "blue"}, LISTED, "blue", "a.png"),
    "a list of answers": ({**PLAIN, "label": ["yes"]}, CAT, "yes", "a.png"),
    "no label": ({"id": 7, "image": "a.png", "text": CAT}, CAT, None, "a.png"),
    "label null": ({**PLAIN, "label": None, "answers": []}, CAT, None, "a.png"),
    "label blank": ({**PLAIN, "label": " ", "answers": ["", " "]}, CAT, None, "a.png"),
    "nobody answers": ({"id": 7, "image": "a.png", "conversations": turns("Which?")}, "Which?", None, "a.png"),
    "blank answer beside a label": ({"id": 7, "messages": turns("Which?", ""), "answer": "B"}, "Which?", "B", None),
}  # fmt: skip


@pytest.mark.parametrize(("entry", "question", "answer", "picture"), READ.values(), ids=READ)
def test_as_people_write_it(ask, folder, entry, question, answer, picture):
    """A file of the field refused for its spelling, asked without its picture, or judged by another answer."""
    answers, source = (answer,) if answer is not None else (), folder / picture if picture else None
    assert ask([entry]) == [Example("7", question, answers, "", source)]


@pytest.mark.parametrize("text", [FORMATS, (Path(__file__).parents[2] / "README.md").read_text("utf-8")])
def test_documented_formats(ask, text):
    """An example that is not read as written."""
    texts = [text[found.start() :].replace("\n", " ") for found in re.finditer(r'\{"(question_)?id":', text)]
    entries = [json.JSONDecoder().raw_decode(text)[0] for text in texts]
    examples = [ask([entry])[0] for entry in entries]  # they share ids
    assert len(examples) == 5 and examples[-1].question.endswith("\nA. red\nB. blue")
    pictures = [entry.get("image") or "".join(entry.get("images", [])) for entry in entries]
    assert [bool(e.source) for e in examples] == list(map(bool, pictures)) == [True] * 4 + [False]
    assert examples[0].answers == examples[-1].answers == ("B",)


def test_several_pictures_are_left_out(ask):
    """One such entry that ends the file, that is asked with one of its pictures, or that goes uncounted."""
    two = ["a.png", "b.png"]
    entries = [{**PLAIN, "image": two}, {**PLAIN, "images": two}, {**PLAIN, "images": ["b.png"]},
               chat([*PARTS, {"type": "image", "image": "b.png"}]), {**PLAIN, "image": two},
               {**PLAIN, "text": "<image><image>Which is larger?"}]  # fmt: skip
    *left_out, good = ask([*entries, OFFICIAL])
    assert [(e.problem, e.source) for e in left_out] == [(SEVERAL, None)] * len(entries)
    assert good.problem == "" and good.source and len({e.key for e in (*left_out, good)}) == len(entries) + 1
    with pytest.raises(HimapError, match=SEVERAL):
        left_out[0].picture()


def test_one_id_over_several_questions(ask):
    """Several questions of one id refused or mixed up; a key that changes; a copy asked twice, or that contradicts."""
    other, third = {**PLAIN, "text": "Is there a dog?"}, {**PLAIN, "image": None}
    entries = [PLAIN, other, {**PLAIN, "question_id": "7 #2"}, third, {**PLAIN, "category": "k"}]
    examples = ask(entries)
    assert [e.key for e in examples] == ["7", "7 #2", "7 #2 #2", "7 #3", "7 #4"] and {e.copies for e in examples} == {1}
    assert [e.question for e in examples[:2]] == ["Is there a cat?", "Is there a dog?"]
    assert all(ask(entries, "--limit", n) == examples[:n] for n in range(1, 6))
    assert [e.key for e in ask([{**PLAIN, "question_id": "7 #2"}, PLAIN, other])] == ["7 #2", "7", "7 #3"]
    examples = ask([PLAIN, OFFICIAL, {**PLAIN, "question_id": "7"}, {**PLAIN, "more": 1}])
    assert [(e.key, e.copies) for e in examples] == [("7", 3), ("5", 1)]
    with pytest.raises(HimapError, match="entry 2: id '7' asks this a second time with another answer"):
        ask([PLAIN, {**PLAIN, "label": "no"}])


def test_several_answers(ask):
    """VQA's ten cut down to the different or non-blank ones; a later turn asked, or a greeting taken for the answer."""
    ten = ["red"] * 6 + ["Red", "", "dark red", "red"]
    objects = [{"answer": answer, "answer_id": i} for i, answer in enumerate(ten)]
    for entry in ({**OFFICIAL, "answers": ten}, {**PLAIN, "answers": objects}):
        assert ask([entry])[0].answers == tuple(ten)
    assert ask([{**PLAIN, "label": None, "answer": "x", "answers": None}])[0].answers == ("x",)  # null: not there
    greeted = [{"from": "system", "value": "s"}, {"from": "gpt", "value": "Hi"}, *turns("q1", "a1", "q2", "a2")]
    (example,) = ask([{**OFFICIAL, "conversations": greeted}])
    assert (example.question, example.answers) == ("q1", ("a1",))


def test_settings_know_the_contents(tmp_path, folder):
    """Results of another file, other hints or pictures continued as if they were these; or of a moved file not."""

    def settings(name, entry, folder=folder):
        (tmp_path / name).write_text(json.dumps([entry]))
        return load("--questions", tmp_path / name, "--image-folder", folder, "--limit", 3)[1]

    first, moved = (settings(name, PLAIN) for name in ("x.json", "y.json"))
    assert first == moved and first["hint"] is None and first["image_folder"] == str(folder.resolve())
    assert first not in (settings("x.json", {**PLAIN, "text": "Else?"}), settings("y.json", PLAIN, tmp_path))


@pytest.mark.parametrize("name", ["gone.png", "broken.png", "."])
def test_picture_missing_or_broken(ask, folder, name):
    """One bad picture of thousands refused at the start, or a traceback in the middle."""
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (example,) = ask([{**PLAIN, "image": name}])
    with pytest.raises(HimapError, match="cannot be read as a picture"):
        example.picture()


OUTSIDE = {
    "leads out": ["../secret.png", "b/../../secret.png", "../pictures2/x.png", "b/..\\..\\secret.png", "..\\secret.png",
                  "{tmp}/secret.png", "up/../../secret.png", "\\\\host\\share\\a.png", "//host/a.png"],
    "is elsewhere": ["C:\\a.png", "c:/a.png", "C:a.png", "https://example.com/a.png", "file:///etc/hostname",
                     "file:/etc/hostname", "data:image/png;base64,AAAA"],
}  # fmt: skip


@pytest.mark.parametrize("message, name", [(message, name) for message, names in OUTSIDE.items() for name in names])
def test_pictures_stay_in_the_folder(ask, tmp_path, folder, message, name):
    """A question file from somewhere else chooses what is read on this machine, or what is fetched."""
    noise(4, 4).save(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    for change in ({"image": name.format(tmp=tmp_path)}, {"images": [name.format(tmp=tmp_path)], "image": None}):
        with pytest.raises(HimapError, match=f"entry 2: image .* {message}"):
            ask([OFFICIAL, {**PLAIN, **change}])


def test_links_and_dots_within_the_folder(ask, tmp_path, folder):
    """Data sets in the hub's cache, or linked into one folder, refused; all where the folder's own name is a link."""
    (tmp_path / "blobs").mkdir()
    noise(5, 5).save(tmp_path / "blobs" / "0a1b", "png")
    (folder / "b").mkdir()
    for link, target in {folder / "hub.jpg": "../blobs/0a1b", folder / "coco": tmp_path / "blobs",
                         folder / "b" / "link.png": folder / "a.png", tmp_path / "set": folder}.items():  # fmt: skip
        link.symlink_to(target)
    for name in ("hub.jpg", "coco/0a1b"):
        assert ask([{**PLAIN, "image": name}])[0].picture().size == (5, 5)
    for name in ("b/../a.png", "b\\link.png", "coco/../a.png", str(folder / "a.png")):
        assert ask([{**PLAIN, "image": name}])[0].picture().size == (8, 6)
    for name in ("a.png", str(tmp_path / "set" / "a.png"), str(folder / "a.png")):
        (example,) = ask([{**PLAIN, "image": name}], "--image-folder", tmp_path / "set")
        assert example.picture().size == (8, 6)


def said(*values):
    return {"conversations": turns(*values)}


ODD = [  # what an entry has instead, and the message
    ({"id": None}, "`id`.*not nothing"), ({"id": True}, "`id`.*not bool"), ({"id": ["5"]}, "`id`.*not list"),
    ({"image": None}, "no image, but the question has <image>"), ({"image": 3}, "no image.*found int"),
    ({"image": float("nan")}, "no image.*found float"), ({"image": [["a.png"]]}, "no image.*found list"),
    ({"image": {"bytes": "iVBORw0", "path": None}}, "no image.*found dict"),
    ({"image": None, **said("Which?"), "image_id": 9}, "no image, but `image_id`"),
    ({"image": "", **said("Which?"), "image_1": "a.png"}, "no image, but `image_1`"),
    ({"image": [], **said("Which?"), "file_name": "a.png"}, "no image, but `file_name`"),
    ({"image": None, **said([{"type": "image"}, {"type": "text", "text": "?"}])}, "has <image>"),
    ({"image": "a\0.png"}, "is not a path"), ({"image": "\ud800.png"}, "is not a path"),
    (said([{"type": "video", "video": "a"}]), "`content`: expected text, or parts"),
    (said(["Which?"]), "`content`: expected text, or parts"),
    (said("Which?", [{"type": "image", "image": "a.png"}]), "the answer holds a picture"),
    ({"messages": "Which?", "conversations": None}, "`conversations`"), ({"conversations": None}, "`conversations`"),
    ({"conversations": ["Which?", "B"]}, "`conversations`"), ({"conversations": []}, "no question"),
    (said("<image>\n", "B"), "no question.*blank"), (said(3, "B"), "no question.*found int"),
    ({"conversations": [{"from": ["human"], "value": "Which?"}]}, "no question"),
    (said("Which?", {"a": 1}), "no answer.*found dict"), (said("Which?", float("nan")), "no answer.*found float"),
    (said("Which?", True), "no answer: true may mean several"),
    (said(LISTED, 2), "answer 2: expected an index from 0 on, of one of 2 options"),
    (said(LISTED, -1), "answer -1: expected an index"), (said(LISTED, "1"), "answer '1': an index, or an option?"),
    ({**said(LISTED), "answer_index": "1"}, "answer '1': expected an index"),
    ({**said("Which?"), "answer_index": 1}, "answer 1: expected an index"),
    (said("How many?\nA. 2\nB. 1", 1), "answer 1: an index, or an option?"),
    ({"options": "red, blue"}, "`options`: expected a list"), ({"options": ["red"]}, "`options`: expected a list"),
    ({"options": {"A": "red", "C": "blue"}}, "`options`: expected a list"), ({"options": ["red", None]}, "no option"),
    ({"options": ["red", "blue", "green"]}, "lists 2 options, `options` 3"),
    ({"answers": {"a": 1}}, "no answer.*found dict"), ({"answers": ["B", None]}, "`answers`"),
    ({"answers": ["B", 2.5]}, "`answers`"), ({"answers": [{"text": "B"}]}, "`answers`"),
    ({"top5_res": [1, "2"]}, "`top5_res`"), ({"top5_res": 3}, "`top5_res`"), ({"category": 3}, "`category`"),
]  # fmt: skip


BAD = [([PLAIN, {**OFFICIAL, **change}], f"entry 2: .*{message}") for change, message in ODD] + [
    (b"", "holds no questions"), (b"[]", "holds no questions"), (b"{", "line 1"), (b'\n{"a": 1}\n{', "line 3"),
    (b"[1, 2", "expected a JSON list"), (b"\xff\xfe", "expected a JSON list"), (b"[" * 100_000, "expected a JSON list"),
    (b"[null]", "entry 1: expected an object"), (b'"text"', "entry 1: expected an object"),
    (b'{"questions": [{"id": 1}]}', "one object, not a list"),
    (b'{"1": {"question": "Which?"}, "2": {"question": "Why?"}}', "one object, not a list"),
]  # fmt: skip


@pytest.mark.parametrize("content, message", BAD, ids=range(len(BAD)))
def test_bad_files(ask, content, message):
    """A traceback, also for what is something else altogether, or a message that leaves one to search the file."""
    with pytest.raises(HimapError, match=rf"questions\.json.*{message}") as error:
        ask(content)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words, message", [
    ("--questions {tmp}/q.json", "needs --image-folder"),
    ("--questions {tmp}/gone.json --image-folder {tmp}", "cannot be read"),
    ("--questions {tmp} --image-folder {tmp}", "cannot be read"),
    ("--questions {tmp}/q.json --image-folder {tmp}/gone", "no such folder"),
    ("--image-folder {tmp}", "go with --questions"), ("--hint short", "go with --questions"),
    ("--limit 0", "--limit 0"), ("--scenes 0", "at least 1"), ("--first-seed -1", "not negative"),
])  # fmt: skip
def test_bad_options(tmp_path, words, message):
    """An option that does nothing, or a traceback."""
    (tmp_path / "q.json").write_text(json.dumps([PLAIN]))
    with pytest.raises(HimapError, match=message):
        load(*words.format(tmp=tmp_path).split())
