"""run.py as a user meets it, on the embedded model: what goes to which stream, and what the numbers say."""

import io
import json
import re
import sys
from itertools import pairwise

import pytest
from PIL import Image
from toys import noise, write_small_model

from himap_ref.commands.ask import EXAMPLE

PICTURE, QUESTION = EXAMPLE
MISTRAL = "{{ '[INST] ' + m[0]['content'] + ' [/INST]' }}{% if x %}{{ m[1]['content'] + '</s>' }}{% endif %}"
TWO = "2:40:text_to_image,8:0.25:image_to_image"


def told(data):
    return [(stage["layer"], stage["score"], len(stage["kept"])) for stage in data["stages"]]


def test_json(run):
    """A key that scripts rely on gone or of another meaning; anything but the object on standard output."""
    status, out, err = run("--json", "--stages", TWO, "--compare")
    data = json.loads(out)
    assert status == 0 and out.count("\n") == 1
    assert data["answer"] == "yellow" and len(data["token_ids"]) == 2
    assert data["prompt_tokens"] == 164 and data["image_span"] == [11, 155]
    assert told(data) == [(2, "text_to_image", 40), (8, "image_to_image", 10)]
    assert set(data["stages"][1]["kept"]) <= set(data["stages"][0]["kept"]) <= set(range(144))
    assert [layer["layer"] for layer in data["layers"]] == list(range(12))
    assert [layer["tokens_in"] for layer in data["layers"]] == [164] * 2 + [60] * 6 + [30] * 4
    f, lm_head = data["flops"], 2 * 128 * 502
    assert f["prefill"] == sum(layer["flops"] for layer in data["layers"]) + lm_head
    assert f["total"] == f["vision"] + f["projector"] + f["prefill"] + f["decode"] == 2 * f["total_macs"]
    assert f["ratio"] == f["total"] / f["vanilla_total"] < 1
    assert set(data["seconds"]) == {"load", "vision", "prefill", "decode"}
    assert data["vanilla"]["answer"] == "yellow" and data["agree"] is True
    assert all(layer["flops"] == sum(layer["parts"].values()) for layer in data["layers"])
    numbers = sum(layer["keys"] for layer in data["layers"]) * 2 * 4 * 32  # keys and values, 4 heads of 32
    assert data["kv_cache_bytes"] == 4 * numbers  # fp32
    data = json.loads(run("--json", "--image", "none", "--prompt", "hello")[1])
    assert data["image_span"] is None and data["stages"] == [] and data["flops"]["vision"] == 0


def test_methods(run):
    """A method that is another one under its name."""
    for method, kept in {"none": [], "fastv": [(2, "last_to_image", 72)], "random": [(2, "random", 72)]}.items():
        assert told(json.loads(run("--json", "--method", method)[1])) == kept
    first, again, other = (json.loads(run("--json", "--method", "random", "--seed", s)[1]) for s in (1, 1, 2))
    assert first["stages"] == again["stages"] != other["stages"]


def test_show_and_trace(run, tmp_path):
    """A picture whose panels do not show what was kept; a table that lacks a stage."""
    shown, report = tmp_path / "kept.png", tmp_path / "report.html"
    status, out, err = run("--show", shown, "--report", report, "--trace", "--stages", TWO)
    assert (status, out) == (0, "yellow\n")
    assert "40 image tokens kept by text_to_image" in err and "10 image tokens kept by image_to_image" in err
    assert Image.open(shown).width == 3 * (432 + 12) + 12
    assert '"answer": "yellow", "vanilla": "yellow"' in report.read_text()


def test_own_score(run, tmp_path, monkeypatch):
    """A criterion of one's own that --stages cannot reach."""
    (tmp_path / "mine.py").write_text("def first(view):\n    return -view.positions[:, view.image].float()\n")
    monkeypatch.chdir(tmp_path)
    data = json.loads(run("--json", "--stages", "3:5:mine:first")[1])
    assert data["stages"] == [{"layer": 3, "score": "first", "kept": [0, 1, 2, 3, 4]}]


@pytest.mark.parametrize("given", [("--prompt", "What number is written?"), ("--image", PICTURE), ()], ids=len)
def test_what_is_left_out(run, given):
    """Notes mixed into the answer; the example's picture or question in another one's place than was left out."""
    status, out, err = run(*given)
    assert (status, out) == (0, "707\n" if "--prompt" in given else "yellow\n")  # the example shows a yellow star
    assert "144 -> " in err and "FLOPs" in err and "knows only" not in err
    said = "What number is written?" if "--prompt" in given else QUESTION
    assert f"question  {said}" in err and "picture   " in err and "example.png" in err and "weights   " in err
    assert "method    himap: 144 image tokens; from layer 1 on 72, by text_to_image; from layer 11 on 18, by " in err


def test_several_pictures(run, tmp_path):
    """The last picture asked about alone, or tokens counted of one of them, or a stage's count held against one's."""
    noise(90, 90).save(tmp_path / "other.png")
    asked = ("--image", PICTURE, tmp_path / "other.png", "--prompt", "What color is the star?", "--max-new-tokens", 2)
    status, out, err = run(*asked, "--json")
    data = json.loads(out)
    assert (status, data["image_span"]) == (0, [11, 155, 156, 300]) and data["prompt_tokens"] == 309
    assert "example.png, " in err and "other.png\nmethod    himap: 288 image tokens; from layer 1 on 144" in err
    assert "of them image tokens 288 -> 144 -> 36;" in err and "note: several pictures: this small" in err
    alone = json.loads(run("--image", PICTURE, "--json", "--max-new-tokens", 2)[1])
    assert data["flops"]["vision"] == 2 * alone["flops"]["vision"]
    err = run(*asked, "--method", "cls:20")[2]
    assert "method    cls:20: 40 image tokens, made of the pictures' 288" in err
    assert "288 -> 200;" in run(*asked, "--stages", "2:200:text_to_image")[2]  # more than one picture has


def test_next(run, tmp_path):
    """LLaVA-NeXT's tokens told by the largest picture, not by the one that is asked about."""
    write_small_model(tmp_path / "m", pinpoints=((28, 56), (56, 28), (56, 56)))
    noise(20, 40).save(tmp_path / "tall.png")
    words = ("--weights", tmp_path / "m", "--image", tmp_path / "tall.png", "--prompt", "Why?", "--max-new-tokens", 2)
    status, _, err = run(*words, "--trace", "--compare", "--method", "none")
    assert status == 0 and "method    none: 16 image tokens, all of them in every layer" in err  # 4 + 4 x (2 + 1)
    assert "of them image tokens 16 -> 8 -> 1;" in run(*words)[2]


def test_chat(run, monkeypatch):
    """A turn that computes the conversation anew or forgets it, a note among the answers, an end without a word."""
    typed = "What color is the star?\n\n  How many things are there?\n" + "is " * 600 + "?\nIs there a circle?\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    status, out, err = run("--chat")
    assert status == 0 and out.splitlines()[0] == "yellow" and len(out.splitlines()) == 3
    turns = re.findall(r"\[turn (\d+): (\d+) new tokens of (\d+), answer (\d+), cached", err)
    turns = [[*map(int, turn)] for turn in turns]
    assert [turn for turn, *_ in turns] == [1, 2, 3] and turns[0][1:3] == [164, 164]
    for (_, _, n, answered), (_, new, total, _) in pairwise(turns):
        assert new == total - (n + answered) + 1 < 20  # the answer's last token, and the question
    assert err.count("note: the prompt has") == 1 and "shorten" in err  # and the conversation went on
    assert err.endswith("> \n")


def test_chat_fills_the_context(run, monkeypatch):
    """A conversation that ends in an error, or in silence, where the context is full."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("What color is the star? Say it.\n" * 50))
    status, out, err = run("--chat", "--prompt", "How many?", "--image", PICTURE)
    assert status == 0 and 15 < len(out.splitlines()) < 30 and "Traceback" not in err
    assert err.splitlines()[-1].endswith("it fills the model's context of 512 tokens")


NOTE = "note: the question holds"


@pytest.mark.parametrize("question, signs", [
    ("What color is the star?", None), ("USER: <image>\nWhat is it? ASSISTANT:", "USER:, <image>, ASSISTANT:"),
    ("user: what is it?", "USER:"), ("Is <image> a tag?", "<image>"), ("[INST] What? [/INST]", "[INST], [/INST]"),
    ("<|start_header_id|>user", "<|start_header_id|>"), ("Q: What is it?", "Q:"), ("The user asks: what?", None),
])  # fmt: skip
def test_roles_in_the_question(run, monkeypatch, question, signs):
    """A whole prompt pasted as the question: asked with its roles twice, without a word."""
    ask = "--prompt", question, "--image", PICTURE, "--max-new-tokens", 1
    status, _, err = run(*ask, "--template", "Q: <image>{question} A:" if question[:2] == "Q:" else "shapes")
    assert status == 0 and (f"{NOTE} {signs} and is asked so" in err if signs else NOTE not in err)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"Why?\n{question}\n"))
    assert signs is None or question[:2] == "Q:" or "\n" in question or f"{NOTE} {signs}" in run("--chat")[2]


@pytest.mark.parametrize("name, jinja, template", [
    ("chat_template.jinja", "{{ messages }}", None), ("chat_template.jinja", "{{ messages }}", "llava-hf"),
    ("chat_template.jinja", MISTRAL, None), ("himap.json", '{"template": "A <image>{question}"}', None),
    (None, None, None),
])  # fmt: skip
def test_note_of_the_chat_template(run, shapes_folder, name, jinja, template):
    """Vicuna's prompt for a model of another kind, without a word; or a word where all is well."""
    (shapes_folder / "himap.json").unlink()
    if name:
        (shapes_folder / "chat_template.jinja").write_text("{{ messages }}")
        (shapes_folder / name).write_text(jinja)
    ask = "--image", "none", "--prompt", "What is it?", "--max-new-tokens", 1, "--method", "none"
    status, _, err = run(*ask, "--weights", shapes_folder, *(("--template", template) if template else ()))
    expected = jinja == "{{ messages }}" and template is None
    assert status == 0 and ("is of no known family; used is vicuna_v1, unless --template names" in err) == expected
    assert err.count("note: ") == expected + err.count("note: the answer")


@pytest.mark.parametrize("args, without_output, without_errors", [  # exit statuses
    (["run.py"], 141, 0), (["run.py", "--json"], 141, 0),
    (["run.py", "--chat", "--prompt", "Why?"], 141, 0), (["run.py", "--help"], 141, 0),
    (["run.py", "--stages", "x"], 2, 2), (["himap_ref.studies.accuracy.bias", "--help"], 141, 0),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_closed_pipe(forked, args, without_output, without_errors, closed):
    """`run.py | head -0`: an error, Python's complaint on its way out, or a status of 1, as after a fault of ours."""
    done = forked(*args, **{closed: None})
    assert done.returncode == (without_output if closed == "stdout" else without_errors)
    assert done.returncode == 2 or "rror" not in done.stderr
    assert done.returncode == 2 or closed == "stdout" or "yellow" in done.stdout or {*args} & {"--chat", "--help"}


@pytest.mark.parametrize("args, message", [
    (["--weights", "some/model", "--image", "none"], "--prompt QUESTION is missing"),
    (["--weights", "no/such/folder"], "--image"),
    *((["--chat", other], "--chat goes without") for other in (  # options that would be passed over
        "--json", "--compare", "--reprune", "--trace", "--report=x.html", "--show=x.png")),
])  # fmt: skip
def test_errors(run, args, message):
    """What test_bad_inputs.py cannot ask, because its rows say all of it: a question without its picture or weights."""
    status, out, err = run(*args)
    assert (status, out.strip()) == (2, "") and err.count("\n") == 1
    assert err.startswith("error: ") and message in err
