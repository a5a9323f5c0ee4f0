"""Evaluations: what is recorded, what survives a kill, and what the summary says of it."""

import json
import linecache
import re
import sys
from dataclasses import replace
from statistics import mean

import pytest
import torch
from test_flops import counted
from toys import make_tokenizer

from himap_ref import LLAVA_1_5_7B, HimapError, Llava
from himap_ref.flops import projector_flops, vision_flops
from himap_ref.methods.schedules import Method, parse_method
from himap_ref.studies.accuracy import bias, entries, evaluate, precision, sweep
from himap_ref.studies.accuracy.evaluate import Evaluation, answer
from himap_ref.studies.accuracy.metrics import METRICS, bootstrap, wilson
from himap_ref.studies.common.asking import ask_each
from himap_ref.studies.paper import disruption, flow
from himap_ref.studies.questions.drawing import draw
from himap_ref.studies.questions.examples import Example
from himap_ref.studies.questions.scenes import TEST, make_scene

HOW_MANY = "How many things are there?"
SCENES = [Example(f"{scene.seed}", HOW_MANY, (str(len(scene.things)),), "count", scene)
          for scene in map(make_scene, range(TEST, TEST + 4))]  # fmt: skip
COLOR = Example("color", "What color is the circle?", ("?",), "color", SCENES[0].source)
LONG = Example("long", "How many things are there beside the red circle?", ("?",), "count", SCENES[1].source)


@pytest.fixture
def asked(shapes, tmp_path):
    """Factory: examples, a method, a batch's size and more of the evaluation -> summary and rows."""

    def call(examples, method="none", batch=1, name="a.jsonl", with_kept=False, **more):
        evaluation = Evaluation(shapes, examples, METRICS["exact"], 8, batch, {"test": 1}, **more)
        return evaluation.run(parse_method(method, shapes), tmp_path / name, with_kept)

    return call


def plain(path):
    """{id: row without seconds and memory}: what must be the same in every run. Fails on a line twice."""
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: {key: row[key] for key in row if key not in ("seconds", "peak_bytes")} for row in rows}


def test_row(shapes, asked):
    """A figure recorded under another one's name, or of another question."""
    method = "2:40:text_to_image,8:10:image_to_image"
    _, rows = asked(SCENES[:2], method, with_kept=True)
    for example in SCENES[:2]:
        stages = parse_method(method, shapes).stages
        answer, row = shapes.generate(example.picture(), example.question, stages, 8), rows[example.id]
        assert (row["answer"], row["label"], row["kind"]) == (answer.text, list(example.answers), "count")
        assert row["correct"] == (answer.text in example.answers) and row["kept"] == [144, 40, 10]
        assert row["kept_tokens"] == [stage.kept.tolist() for stage in answer.trace.stages]
        for name, flops in (("flops", answer.flops), ("vanilla_flops", answer.flops.vanilla)):
            assert row[name] == {"total": flops.total, "decoder": flops.decoder}
        assert row["batch_flops"] == answer.flops.decoder and {*row["seconds"]} == {"vision", "prefill", "decode"}
        assert (row["prompt_tokens"], row["new_tokens"]) == (len(answer.prompt_ids), len(answer.token_ids))


def test_batches_answer_alike(shapes):
    """A batch that mixes up its questions, of unequal lengths among them, or leaves the last ones out."""
    examples = [*SCENES, COLOR, LONG]
    assert len({len(shapes.encode(example.question)) for example in examples[3:]}) > 1

    alone, together = (
        {e.id: a.token_ids for e, a in ask_each(examples, size, lambda *some: answer(shapes, *some, Method("none"), 8))}
        for size in (1, 3)
    )
    assert alone == together and set(alone) == {e.id for e in examples}


def test_a_batch_costs_more(shapes, asked):
    """Padding and waiting for the longest answer left out of the FLOPs, or counted for each of the batch's answers."""
    examples, config = [SCENES[0], LONG, replace(LONG, id="longer", question=f"{LONG.question}?")], shapes.config
    for batch in (1, 2):
        flops, (summary, rows) = counted(asked, examples, "himap", batch, f"{batch}.jsonl")
        alone = sum(row["flops"]["decoder"] for row in rows.values())
        executed = flops - len(examples) * (vision_flops(config) + projector_flops(config))
        assert summary["executed"] == pytest.approx(executed / alone, rel=1e-12)
        assert (executed > alone) is ("more: padding" in evaluate.table(summary)) is (batch > 1)


def test_errors_are_counted(asked, tmp_path):
    """A question without a picture, or too long a one, silently skipped, or the whole run lost with it."""
    draw(SCENES[0].source).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    questions = {"good": ("good.png", HOW_MANY), "missing": ("none.png", HOW_MANY), "bad": ("bad.png", HOW_MANY),
                 "long": ("good.png", "many things " * 400), "empty": ("good.png", " ")}  # fmt: skip
    examples = [Example(id, text, ("3",), "", tmp_path / name) for id, (name, text) in questions.items()]
    summary, rows = asked(examples, batch=4)
    assert (summary["n"], summary["errors"]) == (1, 4)
    assert {id for id, row in rows.items() if "error" in row} == {"missing", "bad", "long", "empty"}
    assert "none.png" in rows["missing"]["error"] and "context" in rows["long"]["error"]
    with pytest.raises(HimapError, match="no question could be asked"):
        asked(examples[1:], name="bad.jsonl")


TEXT = Example("text", "What color is the star?", ("yellow",), "", None)


def test_without_a_picture(shapes, asked):
    """Questions without one refused in a batch, shown another's picture, counted with it, or asked behind a prefix."""
    examples = [SCENES[0], TEXT, replace(LONG, source=None), *SCENES[1:]]
    alone = {e.key: shapes.generate(e.source and e.picture(), e.question, "himap", 8).text for e in examples}
    flops = shapes.generate(None, TEXT.question, (), 8).flops.total
    for batch, prefix in ((1, None), (4, None), (2, shapes.prefix())):
        summary, rows = asked(examples, "himap", batch, f"{batch}.jsonl", prefix=prefix)
        assert {key: row["answer"] for key, row in rows.items()} == alone and rows["text"]["flops"]["total"] == flops
        kept = [144, 72, 18]
        assert [rows[e.key]["kept"] for e in examples[:3]] == [kept, [], []] and summary["kept"] == kept
        parts = [(SCENES, summary["with_picture"]), (examples[1:3], summary["text_only"]), (examples, summary)]
        for some, part in parts:
            assert (part["asked"], part["labelled"]) == (len(some), len(some))
            assert part["metrics"]["accuracy"] == mean(rows[e.key]["correct"] for e in some)
    shown = evaluate.table(summary)
    assert "2 of those answered have no picture" in shown and "text only, accuracy" in shown
    summary, _ = asked([TEXT], "himap", name="text.jsonl")
    assert summary["kept"] == [] and "no question has a picture" in evaluate.table(summary)


@pytest.mark.parametrize("labelled", [0, 2])
def test_without_labels(asked, labelled):
    """A test set refused; one of its answers lost, judged wrong, or part of the accuracy; n of all beside it."""
    examples = [replace(e, answers=e.answers if i < labelled else ()) for i, e in enumerate(SCENES)]
    summary, rows = asked(examples, batch=4)
    right = [float(rows[e.key]["answer"] in e.answers) for e in examples[:labelled]]
    assert [rows[e.key]["correct"] for e in examples] == right + [None] * (4 - labelled)
    assert all(rows[e.key]["answer"] and rows[e.key]["question"] == e.question for e in examples)
    assert summary["metrics"] == ({"accuracy": mean(right)} if right else {})
    told = f"(n = {labelled}, 2 more have no label)" if labelled else "no labels for 4 answers"
    assert told in evaluate.table(summary) and (summary["interval"] is None) is (not labelled)
    line = sweep.line_of(X, [(summary, rows)], rows)
    assert (line["n"], line["judged"], line["same_answer"]) == (4, labelled, 1.0)
    assert (line["accuracy"], line["lost"]) == ((mean(right), 0) if right else (None, None))
    assert ("no labels" in sweep.table([line])) is (not labelled)


def entry(id, **more):
    return {"id": id, "image": "a.png", "text": "What color is the star?", "label": "yellow", **more}


ENTRIES = [entry(1), entry(1, text="How many things are there?", label=3), entry(1), entry(2, image=["a.png"] * 2),
           entry(3, image=None), entry(4, label=None), entry(5, image="none.png")]  # fmt: skip


@pytest.fixture
def asked_from(study, small, tmp_path):
    """Factory: runs a study on `ENTRIES`."""
    draw(SCENES[0].source).save(tmp_path / "a.png")
    (tmp_path / "q.json").write_text(json.dumps(ENTRIES))
    usual = "--weights", small, "--questions", tmp_path / "q.json", "--image-folder", tmp_path
    return lambda module, *options: study(module, *usual, *options)


def test_file_of_every_kind(asked_from, tmp_path):
    """An entry lost or counted twice; a figure not told; a second start that asks again, or by another method."""
    file = tmp_path / "a.jsonl"
    command = evaluate, "--batch", 8, "--metric", "exact", "--out", file, "--method"
    _, out, err = asked_from(*command, "cls:20")
    for told in ("4 answered, 2 could not be asked", "1: several pictures in one entry", "1, copies of entries before",
                 "exact: equal to a right answer", "accuracy", "image tokens", "FLOPs", "decoder", "prefill",
                 "KV cache", "peak memory"):  # fmt: skip
        assert told in out, told
    assert "1 of 6 questions left out: several pictures" in err
    assert list(plain(file)) == ["2", "5", "1", "4", "1 #2", "3"]  # with a picture first, the shortest first
    before = file.read_bytes().replace(b'"question": "', b'"earlier": "')
    file.write_bytes(before)
    assert asked_from(*command, "cls:20")[1] == out and file.read_bytes() == before
    status, _, err = asked_from(*command, "cls:21")
    assert status == 2 and err.splitlines()[-1].startswith("error: ") and err.count("\n") == 2


def test_file_without_labels(asked_from, tmp_path):
    """POPE's own question file, whose answers are in another, refused by a metric that wants "yes" or "no"."""
    (tmp_path / "q.json").write_text(json.dumps([entry(1, label=None)]))
    _, out, err = asked_from(evaluate, "--metric", "pope", "--out", tmp_path / "a.jsonl")
    assert "no labels for 1 answers" in out and plain(tmp_path / "a.jsonl")["1"]["answer"], err


@pytest.mark.parametrize("module, options", [
    (bias, ("--schedule", "1:0.5,2:0.25")), (precision, ("--methods", "himap", "--dtype", "float16")),
    (flow, ("--label", "greedy")), (disruption, ("--layers", 0)),
])  # fmt: skip
def test_studies_of_pictures(asked_from, tmp_path, module, options):
    """A study that looks into the picture, ended by a question without one or without an answer, or at its very end."""
    status, out, err = asked_from(module, *options, "--out", tmp_path / "out")
    assert status == 0 and "1 of 6 questions left out: no picture" in err, err
    assert module is flow or out.count("|") > 20
    assert module is not bias or (tmp_path / "out" / "table.json").stat().st_size > 100
    assert re.search(r"n = 3, 3 left out|mean of 3 examples.*3 could not|3 questions, 3 more could not", out)


def test_summary(asked):
    """A mean of ratios in the ratio's place, a wrong denominator, a prefill counted as decode."""
    summary, rows = asked([*SCENES, COLOR], "himap-paper")
    rows = rows.values()
    assert summary["metrics"]["accuracy"] == mean(row["correct"] for row in rows)
    assert summary["flops"] == mean(row["flops"]["total"] for row in rows)
    for name, part in (("ratio", "total"), ("decoder_ratio", "decoder")):
        assert summary[name] == sum(r["flops"][part] for r in rows) / sum(r["vanilla_flops"][part] for r in rows)
    tokens = [144] * 2 + [72] * 6 + [18] * 4  # the paper's order: a stage takes effect on entry to its layer
    cost = [4 * n * 128**2 + 2 * n * n * 128 + 2 * n * 128 * 256 for n in tokens]
    assert summary["image_only_ratio"] == pytest.approx(sum(cost) / (12 * cost[0]))
    assert summary["kept"] == [144, 72, 18] and summary["kv_cache_bytes"] == mean(r["kv_cache_bytes"] for r in rows)
    summary, rows = asked(SCENES[:1], "himap-paper", name="b.jsonl")
    (row,), seconds = rows.values(), summary["seconds"]
    assert seconds["prefill"] == row["seconds"]["prefill"]
    assert seconds["decode_step"] == row["seconds"]["decode"] / (row["new_tokens"] - 1)


def test_errors_are_asked_again(asked, tmp_path):
    """A question lost because its picture came late; its error counted beside it; others asked one by one for it."""
    out, picture = tmp_path / "a.jsonl", tmp_path / "late.png"
    examples = [SCENES[0], Example("late", HOW_MANY, ("3",), "", picture), *SCENES[1:]]
    summary, rows = asked(examples, batch=8)
    assert summary["errors"] == 1 and [rows[example.id]["batch"] for example in SCENES] == [4] * 4
    before = out.read_bytes()
    assert asked(examples)[0]["errors"] == 1 and out.read_bytes() == before
    draw(SCENES[0].source).save(picture)
    summary, rows = asked(examples)
    assert (summary["errors"], summary["n"]) == (0, 5) and "error" not in rows["late"]
    assert out.read_bytes().startswith(before) and out.read_bytes().count(b"\n") == before.count(b"\n") + 1


def test_an_edited_criterion_is_another(shapes, tmp_path, monkeypatch):
    """Old answers shown for a score function that was changed since: the loop in which a new idea is tried."""
    monkeypatch.syspath_prepend(tmp_path)
    settings = []
    for sign in ("", "-"):
        (tmp_path / "edited.py").write_text(f"def mine(view):\n    return {sign}view.positions[:, view.image] * 1.0\n")
        sys.modules.pop("edited", None)
        linecache.clearcache()
        settings.append(parse_method("2:0.5:edited:mine", shapes).settings())
    assert settings[0] != settings[1]
    assert parse_method("himap-paper", shapes).settings()["stages"][0] == [2, 0.5, "text_to_image", None]


def test_prefix(study, small, tmp_path):
    """A switch that changes answers, or whose work is counted in every answer or in none."""
    usual = "--weights", small, "--scenes", 1, "--max-new-tokens", 3, "--out"
    told = [study(evaluate, *usual, tmp_path / f"{len(more)}.jsonl", *more)[1] for more in ((), ("--prefix",))]
    assert ["once for all answers" in out for out in told] == ["once for" in out for out in told] == [False, True]
    a, b = (plain(tmp_path / name) for name in ("0.jsonl", "1.jsonl"))
    for id, got in b.items():
        assert got["answer"] == a[id]["answer"] and got["flops"]["decoder"] < a[id]["flops"]["decoder"]
        assert got["vanilla_flops"] == a[id]["vanilla_flops"]


def test_equal_flops_are_equal(shapes):
    """Methods compared at budgets that they do not have; the encoder's share forgotten for those before the decoder; a
    smaller picture at no budget, or one that costs more."""
    found = entries.equal_flops(shapes, [*SCENES, COLOR], [0.75, 0.65])
    labels = {entry.label for entry in found}
    assert {"HiMAP", "chance on HiMAP's layers", "FastV, last row", "PyramidDrop", "VTW", "CLS attention"} <= labels
    assert [entry.methods for entry in found if entry.label == entries.SMALLER] == [("down:9",), ("down:10",)]
    plain, *measured = (answer(shapes, SCENES[:1], [SCENES[0].picture()], parse_method(name, shapes), 1)[0].flops.total
                        for name in ("none", *(entry.methods[0] for entry in found)))  # fmt: skip
    for entry, flops in zip(found, measured, strict=True):
        budget = 0.75 if "75" in entry.group else 0.65
        allowed = 0.1 if entry.label == entries.SMALLER else entries.NEAR
        assert abs(flops / plain - budget) < allowed + 0.005, entry
        assert len(entry.methods) == (entries.SEEDS if "chance" in entry.label else 1)


def test_equal_flops_at_llavas_shape():
    """Budgets made for the small model, at which LLaVA's HiMAP is missing or has its first stage switched off."""
    with torch.device("meta"):  # without numbers: enough to plan with
        model = Llava(LLAVA_1_5_7B)
    model.tokenizer = tokenizer = make_tokenizer("byte-level")
    model.config = replace(LLAVA_1_5_7B, image_token_index=tokenizer.token_to_id("<image>"))
    found = entries.equal_flops(model, [COLOR], None)
    himap = [entry for entry in found if entry.label == "HiMAP"]
    assert len({entry.group for entry in found}) == len(himap) == 4
    counts = [int(entry.methods[0].split(":")[1]) for entry in himap]
    assert counts == sorted(counts) and abs(counts[1] - 288) <= 3 and counts[-1] < 576


def test_what_does_not_fit_is_left_out(tiny_llava, capsys):
    """A shallow model that cannot be swept at all; a line that vanishes without a word."""
    model = tiny_llava(text={"num_hidden_layers": 6})
    swept = entries.criteria() + entries.ablations([1, 9], [4], [], [])
    kept = entries.fitting(swept, model)
    assert [entry.label for entry in kept] == ["stage 1 alone", "K2 = 4"]
    assert capsys.readouterr().err.count("left out: ") == len(swept) - 2
    assert entries.seeded("2:0.5:random,4:3:mine:random_patch")[1] == "2:0.5:random1,4:3:mine:random_patch"
    assert entries.seeded("random")[4] == "random4" and entries.seeded("2:0.5:mine:random") == ("2:0.5:mine:random",)


def row(answer, correct, **more):
    return {"answer": answer, "correct": float(correct), **more}


X = entries.Entry("", "x", ("x",))
SUMMARY = {"decoder_ratio": 0.5, "ratio": 0.6, "image_only_ratio": 0.4, "kept": [144]}


def test_line_pairs_questions():
    """Wins and losses exchanged, or questions compared with others' answers."""
    vanilla = {"a": row("1", 1), "b": row("2", 1), "c": row("3", 0), "d": row("4", 0)}
    pruned = {"d": row("4", 0), "c": row("5", 1), "b": row("2", 1), "a": row("9", 0)}
    line = sweep.line_of(X, [(SUMMARY, pruned)], vanilla)
    assert (line["lost"], line["won"], line["same_answer"], line["accuracy"], line["p"]) == (1, 1, 0.5, 0.5, 1.0)
    assert line["spread"] is None and line["interval"] == wilson(2, 4)
    line = sweep.line_of(entries.Entry("", "x", ("x", "y")), [(SUMMARY, pruned), (SUMMARY, vanilla)], vanilla)
    assert (line["lost"], line["won"], line["spread"]) == (0.5, 0.5, (0.5, 0.5))
    assert line["interval"] == bootstrap([0.5, 1, 0.5, 0]), "over questions, not over seeds"


def test_line_leaves_errors_out_on_both_sides():
    """Accuracies over different questions side by side; a crash after everything was computed."""
    vanilla = {"a": row("1", 1, kind="k"), "b": {"error": "long", "kind": "lost"}, "c": row("3", 0), "d": row("4", 0)}
    pruned = {"a": row("1", 1, kind="k"), "b": row("2", 1), "c": {"error": "no picture"}, "d": row("5", 1)}
    line = sweep.line_of(X, [(SUMMARY, pruned)], vanilla)
    assert (line["n"], line["left_out"], line["accuracy"], line["kinds"]) == (2, 2, 1.0, {"k": 1.0})
    with pytest.raises(HimapError, match="no question"):
        sweep.line_of(X, [(SUMMARY, {"a": {"error": ""}})], {"a": row("1", 1)})


def test_position_figures():
    """The bias measured among all image tokens instead of those that entered, or upside down."""
    rows = [{"kept_tokens": [[0, 1, 2, 3, 76, 77, 78, 79], [0, 1, 2, 76]]}]
    first, second = (bias.position_figures(rows, stage, 80) for stage in (0, 1))
    assert first["first_half"] == 0.5 and first["survival"] == [0.5] + [0] * 8 + [0.5]
    assert first["often"] == [1.0] * 4 + [0] * 72 + [1.0] * 4
    assert second["first_half"] == 0.75 and second["mean_place"] == pytest.approx((0.5 + 1.5 + 2.5 + 4.5) / 4 / 8)
    few = bias.position_figures([{"kept_tokens": [[3, 4], [4]]}], 1, 80)
    assert few["survival"] == [None, None, 0.0, None, None, None, None, 1.0, None, None] and few["first_half"] == 0
