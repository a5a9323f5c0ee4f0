"""lmms-eval, run for real on a task of its own kind (scenes.yaml), gets the answers that `Llava.generate` gives."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import Instance  # noqa: E402

from himap_ref import HimapError, Llava  # noqa: E402
from himap_ref.methods.schedules import parse_stages  # noqa: E402
from himap_ref.studies.accuracy.lmms_eval_model import HimapRef, Sampling, cut, read_sampling  # noqa: E402
from himap_ref.studies.questions.drawing import draw  # noqa: E402
from himap_ref.studies.questions.scenes import make_questions, make_scene  # noqa: E402

SEED = 1_001_000_000  # the first in seeds.jsonl
STAGES = "2:6:text_to_image,8:0.25:image_to_image"  # harsh, so that answers show that it was obeyed


@pytest.fixture(scope="module")
def model():
    return Llava.from_pretrained("weights/shapes")


@pytest.fixture(scope="module")
def plugin():
    """Documents are lists of visuals."""
    plugin = HimapRef(method=STAGES.replace(",", "+"), batch_size="3")
    pictures = [draw(make_scene(SEED + i)) for i in range(4)]
    plugin.task_dict["task"] = {"test": [*([p] for p in pictures), [], None, pictures[:2], ["film.mp4"]]}
    return plugin


def ask(plugin, *asked):
    """(document, text, generation_kwargs) each -> what lmms-eval would get."""
    metadata = {"task": "task", "doc_id": 0, "repeats": 1}
    return plugin.generate_until([
        Instance("generate_until", (text, options, lambda visuals: visuals, document, "task", "test"), 0, metadata)
        for document, text, options in asked
    ])  # fmt: skip


def test_a_real_run(model, tmp_path):
    """A plug-in that lmms-eval does not find; a method, picture or question that does not reach the model; answers in
    the batches' order instead of the questions'; FLOPs of something else."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "himap_ref", "--tasks", "himap_scenes", "--limit", "12"]
    command += ["--model_args", f"weights=weights/shapes,method={STAGES.replace(',', '+')}", "--batch_size", "4"]
    command += ["--include_path", "tests/lmms", "--output_path", str(tmp_path), "--log_samples"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    results = [json.loads(path.read_text()) for path in tmp_path.glob("*_results.json")]
    assert results, run.stdout + run.stderr  # lmms-eval ends with status 0 even after an error

    asked = [(draw(scene), q) for scene in map(make_scene, (SEED, SEED + 1)) for q in make_questions(scene, 6)]
    ours = [model.generate(picture, q.text, parse_stages(STAGES)) for picture, q in asked]
    (samples,) = tmp_path.glob("*_samples_himap_scenes.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    assert [row["filtered_resps"] for row in rows] == [answer.text for answer in ours]
    assert [answer.text for answer in ours] != [model.generate(p, q.text).text for p, q in asked]  # it shows
    right = sum(answer.text == q.answer for answer, (_, q) in zip(ours, asked, strict=True))
    assert results[0]["results"]["himap_scenes"]["exact_match,none"] == pytest.approx(right / 12)
    ratio = sum(a.flops.total for a in ours) / sum(a.flops.vanilla.total for a in ours)
    assert results[0]["throughput"]["avg_flops_ratio_himap_scenes"] == pytest.approx(ratio)


def test_batches(model, plugin):
    """Prompts of other lengths, other options or no picture in one batch; placeholders left in the question."""
    asked = [
        (0, "<image>\nWhat shape is at the middle center?", {"max_new_tokens": 8}),
        (4, "How many objects are there?", {"max_new_tokens": 8}),
        (1, "How many objects are there?", {"max_new_tokens": 8}),
        (5, "How many objects are there? <image>", {"max_new_tokens": 8}),
        (2, "How many objects are there?", {"max_new_tokens": 1}),
        (3, "How many objects are there?", {"max_new_tokens": 8}),
    ]
    for (document, text, options), result in zip(asked, ask(plugin, *asked), strict=True):
        image = (plugin.task_dict["task"]["test"][document] or [None])[0]
        answer = model.generate(image, text.replace("<image>", "").strip(), parse_stages(STAGES), **options)
        assert result.text == answer.text
        assert result.token_counts.to_dict() == {
            "input_tokens": len(answer.prompt_ids), "output_tokens": len(answer.token_ids)
        }  # fmt: skip


def test_repeats_differ(model, plugin):
    """--repeats that ask with one seed: k equal samples would pass for a stable model."""
    options = {"temperature": 3.0, "max_new_tokens": 4}
    texts = [result.text for result in ask(plugin, *[(0, "Where is the star?", options)] * 3)]
    image = plugin.task_dict["task"]["test"][0][0]
    assert texts == [
        model.generate(image, "Where is the star?", parse_stages(STAGES), 4, temperature=3.0, seed=seed).text
        for seed in range(3)
    ]
    assert len(set(texts)) > 1


@pytest.mark.parametrize(("options", "expected"), [
    ({}, Sampling(1024, 0.0, 1.0, 0)),
    ({"temperature": 0, "top_p": 0, "num_beams": 1, "image_aspect_ratio": "original"}, Sampling(1024, 0.0, 1.0, 0)),
    ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, Sampling(1024, 0.0, 1.0, 0)),
    ({"do_sample": True, "top_p": None}, Sampling(1024, 1.0, 1.0, 0)),
    ({"max_new_tokens": 16, "temperature": 0.2, "top_p": 0.9}, Sampling(16, 0.2, 0.9, 0)),
])  # fmt: skip
def test_sampling(options, expected):
    """Greedy tasks that are sampled, sampled ones that are greedy, top_p 0 refused where it means nothing."""
    assert read_sampling(options) == expected


@pytest.mark.parametrize(
    ("until", "expected"),
    [("b", "a "), (["c", "b", ""], "a "), (["x"], "a b\n\nc"), ([], "a b\n\nc"), (None, "a b\n\nc"),
     (["\n\n"], "a b\n\nc"), (["\n\n", "</s>"], "a b")],
)  # fmt: skip
def test_stop_strings(until, expected):
    """Stop strings ignored; the filler where a task sets none obeyed, which would cut long answers."""
    assert cut("a b\n\nc", until) == expected


@pytest.mark.parametrize(("asked", "message"), [
    ((6, "What?", {}), "task task, document 6 has 2 pictures"), ((7, "What?", {}), "task task, document 7 has a str"),
    ((0, "<image>", {}), "task task, document 0: the prompt is empty"),
    ((0, "What?", {"top_k": 50}), "task task, document 0: generation option top_k=50"),
    ((0, "What?", {"num_beams": 5}), "task task, document 0: generation option num_beams=5"),
])  # fmt: skip
def test_what_it_cannot_ask(plugin, asked, message):
    """All but the first picture dropped, or options ignored, in silence."""
    with pytest.raises(HimapError, match=message):
        ask(plugin, asked)


def test_the_question_at_fault_is_named(plugin):
    """An error told of the first question of its batch, which was sound: prompts of any lengths share a batch."""
    asked = [(0, "How many objects are there?", {}), (1, "many objects " * 400, {}), (2, "Where is the star?", {})]
    with pytest.raises(HimapError, match="task task, document 1: the prompt has .* the model's context"):
        ask(plugin, *asked)


@pytest.mark.parametrize(
    "arguments", [{"dtype": "half"}, {"batch_size": "auto"}, {"batch_size": 0}, {"method": "mine"}, {"weights": "mine"}]
)
def test_bad_arguments(arguments):
    """Errors from deep inside torch, or none."""
    with pytest.raises(HimapError):
        HimapRef(**arguments)


@pytest.mark.parametrize("ask_otherwise", ["loglikelihood", "generate_until_multi_round"])
def test_other_requests(plugin, ask_otherwise):
    """Likelihoods of the wrong sign: lmms-eval 0.7 takes the *lowest*, whatever its documentation says."""
    with pytest.raises(NotImplementedError, match="generate_until"):
        getattr(plugin, ask_otherwise)([])
