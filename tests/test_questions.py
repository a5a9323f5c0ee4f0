"""What is asked: drawn scenes and question files, and everything that can be wrong with a file."""

import argparse
import json

import pytest
from toys import noise

from himap_ref import HimapError
from himap_ref.studies.questions import Example, add_question_arguments, load_examples, scene_examples
from himap_ref.studies.scenes import CHOICE_HINT, KINDS, TEST, draw, make_questions, make_scene

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
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        path.write_bytes(data)
        return load("--questions", path, "--image-folder", folder, *options)[0]

    return call


# ---------------------------------------------------------------- scenes


def test_scenes_ask_what_the_published_table_asked():
    """Other questions, or another of a kind: the README's figures would belong to another set."""
    examples, settings = load("--scenes", 4)
    assert settings == {"questions": "scenes"}
    expected = []
    for seed in range(TEST, TEST + 4):
        scene = make_scene(seed)
        first = {}
        for question in make_questions(scene, 30):
            first.setdefault(question.kind, (seed, question.kind, question.text, (question.answer,), scene))
        expected += [first[kind] for kind in KINDS if kind in first]
    assert [(int(e.id.split("-")[0]), e.kind, e.question, e.answers, e.source) for e in examples] == expected
    assert examples[0].id == f"{TEST}-color" and examples[0].question == "What color is the star?"
    assert len({e.id for e in examples}) == len(examples)
    assert examples[0].picture().tobytes() == draw(examples[0].source).tobytes()


def test_limit_and_first_seed():
    """The first N questions, not scenes; another seed not asked; a longer run that could not go on from a shorter."""
    examples, settings = load("--scenes", 3, "--first-seed", 12, "--limit", 2)
    assert examples == scene_examples(3, 12)[:2] and settings == load("--scenes", 5)[1]


# ---------------------------------------------------------------- files


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


def test_several_answers(ask):
    """VQA's ten cut down to the different or non-blank ones, or the single answer taken instead."""
    ten = ["red"] * 6 + ["Red", "", "dark red", "red"]
    objects = [{"answer": answer, "answer_id": i} for i, answer in enumerate(ten)]
    for entry in ({**OFFICIAL, "answers": ten}, {**PLAIN, "answers": objects}):
        assert ask([entry])[0].answers == tuple(ten)
    assert ask([{**PLAIN, "label": None, "answer": "x", "answers": None}])[0].answers == ("x",)  # null: not there


def test_the_first_question_counts(ask):
    """A later turn asked, or a greeting taken for the answer."""
    said = [{"from": "system", "value": "s"}, {"from": "gpt", "value": "Hi"}, *turns("q1", "a1", "q2", "a2")]
    (example,) = ask([{**OFFICIAL, "conversations": said}])
    assert (example.question, example.answers) == ("q1", ("a1",))


def test_settings_know_the_contents(tmp_path, folder):
    """Results of another file, other hints or pictures continued as if they were these; or of a moved file not."""
    settings = []
    for name, text in ("x.json", [PLAIN]), ("y.json", [PLAIN]), ("x.json", [{**PLAIN, "text": "Else?"}]):
        (tmp_path / name).write_text(json.dumps(text))
        settings.append(load("--questions", tmp_path / name, "--image-folder", folder, "--limit", 3)[1])
    assert settings[0] == settings[1] != settings[2]
    assert settings[0]["hint"] is None and settings[0]["image_folder"] == str(folder.resolve())
    assert load("--questions", tmp_path / "y.json", "--image-folder", tmp_path)[1] != settings[0]


def test_limit_reads_no_further(ask):
    """A broken entry beyond the limit in the way."""
    assert len(ask([PLAIN, OFFICIAL, {}], "--limit", 2)) == 2


@pytest.mark.parametrize("name", ["gone.png", "broken.png", "."])
def test_picture_missing_or_broken(ask, folder, name):
    """One bad picture of thousands refused at the start, or a traceback in the middle."""
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (example,) = ask([{**PLAIN, "image": name}])
    with pytest.raises(HimapError, match="cannot be read as a picture"):
        example.picture()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "name",
    ["../secret.png", "b/../../secret.png", "../pictures2/x.png", "link.png", "up/secret.png", "{tmp}/secret.png"],
)
def test_pictures_stay_in_the_folder(ask, tmp_path, folder, name):
    """A question file from somewhere else chooses what is read on this machine."""
    noise(4, 4).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    with pytest.raises(HimapError, match="entry 2: image .* leads out of the image folder"):
        ask([OFFICIAL, {**PLAIN, "image": name.format(tmp=tmp_path)}])


def test_links_and_dots_within_the_folder(ask, folder):
    """Paths refused that lead nowhere else."""
    (folder / "b").mkdir()
    (folder / "b" / "link.png").symlink_to(folder / "a.png")
    for name in ("b/../a.png", "b/link.png", str(folder / "a.png")):
        assert ask([{**PLAIN, "image": name}])[0].picture().size == (8, 6)


def test_the_folder_may_be_a_link(tmp_path, folder):
    """Everything refused because the folder's own name leads elsewhere."""
    (tmp_path / "set").symlink_to(folder)
    (tmp_path / "q.json").write_text(json.dumps([PLAIN]))
    (example,), _ = load("--questions", tmp_path / "q.json", "--image-folder", tmp_path / "set")
    assert example.picture().size == (8, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "`id`.*not nothing"),
        ({"id": True}, "`id`.*not bool"),
        ({"id": ["5"]}, "`id`.*not list"),
        ({"id": "7"}, "'7' was there before"),  # 7 in the entry before
        ({"image": None}, "no image"),
        ({"image": ["a.png"]}, "no image.*found list"),
        ({"image": " "}, "no image.*blank"),
        ({"image": "a\0.png"}, "is not a path"),
        ({"image": "\ud800.png"}, "is not a path"),
        ({"conversations": None}, "`conversations`"),
        ({"conversations": ["Which?", "B"]}, "`conversations`"),
        ({"conversations": []}, "no question"),
        ({"conversations": turns("<image>\n", "B")}, "no question.*blank"),
        ({"conversations": turns(3, "B")}, "no question.*found int"),
        ({"conversations": [{"from": ["human"], "value": "Which?"}]}, "no question"),
        ({"conversations": turns("Which?")}, "no answer"),
        ({"conversations": turns("Which?") * 2}, "no answer"),
        ({"conversations": turns("Which?", None)}, "no answer"),
        ({"conversations": turns("Which?", ["B"])}, "no answer.*found list"),
        ({"answers": "B"}, "`answers`"),
        ({"answers": []}, "`answers`"),
        ({"answers": ["", " "]}, "`answers`"),
        ({"answers": ["B", 3]}, "`answers`"),
        ({"answers": [{"text": "B"}]}, "`answers`"),
        ({"top5_res": [1, "2"]}, "`top5_res`"),
        ({"top5_res": 3}, "`top5_res`"),
        ({"category": 3}, "`category`"),
    ],
)
def test_bad_entries(ask, change, message):
    """A traceback, or a message that leaves one to search thousands of entries."""
    with pytest.raises(HimapError, match=rf"questions\.json: entry 2: .*{message}") as error:
        ask([PLAIN, {**OFFICIAL, **change}])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds no questions"),
        (b"[]", "holds no questions"),
        (b"{", "line 1"),
        (b'\n{"a": 1}\n{', "line 3"),
        (b"[1, 2", "expected a JSON list"),
        (b"\xff\xfe", "expected a JSON list"),
        (b"[" * 100_000, "expected a JSON list"),
        (b"[null]", "entry 1: expected an object"),
        (b'"text"', "entry 1: expected an object"),
    ],
)
def test_bad_files(ask, data, message):
    """A traceback for a file that is something else altogether."""
    with pytest.raises(HimapError, match=message):
        ask(data)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--questions", "{tmp}/q.json"], "needs --image-folder"),
        (["--questions", "{tmp}/gone.json", "--image-folder", "{tmp}"], "cannot be read"),
        (["--questions", "{tmp}", "--image-folder", "{tmp}"], "cannot be read"),
        (["--questions", "{tmp}/q.json", "--image-folder", "{tmp}/gone"], "no such folder"),
        (["--image-folder", "{tmp}"], "go with --questions"),
        (["--hint", "short"], "go with --questions"),
        (["--limit", "0"], "--limit 0"),
        (["--scenes", "0"], "at least 1"),
        (["--first-seed", "-1"], "not negative"),
    ],
)
def test_bad_options(tmp_path, words, message):
    """An option that does nothing, or a traceback."""
    (tmp_path / "q.json").write_text(json.dumps([PLAIN]))
    with pytest.raises(HimapError, match=message):
        load(*(word.format(tmp=tmp_path) for word in words))
