"""The blind floor: what a guess gets right that never sees the picture."""

from himap_ref.studies.accuracy import blind
from himap_ref.studies.accuracy.blind import best_guesses, num_answers, table
from himap_ref.studies.questions.examples import Example
from himap_ref.studies.questions.selection import scene_examples

STAR, HEART = "What color is the star?", "What color is the heart?"
HINT = "Answer with the option's letter from the given choices directly."


def example(question, answer, kind="color"):
    return Example("1", question, (answer,), kind, None)


def choice(question, answer, *options):
    lines = [question, *(f"{letter}. {text}" for letter, text in zip("ABCD", options, strict=True)), HINT]
    return example("\n".join(lines), answer, "choice")


def test_best_guess_by_hand():
    """Answers to another text or of another kind; a letter that was often right, whatever it stood for."""
    others = [
        *(example(STAR, color) for color in ("red", "blue", "blue", "cyan")),
        *(example(HEART, color) for color in ("red", "red", "red", "red")),
        choice(STAR, "A", "green", "red", "blue", "cyan"), choice(STAR, "A", "green", "red", "blue", "black"),
        choice(STAR, "A", "cyan", "red", "blue", "black"), choice(STAR, "B", "blue", "red", "cyan", "black"),
        *(choice(HEART, "A", "purple", "red", "blue", "black") for _ in range(5)),
    ]  # fmt: skip
    examples = [
        example(STAR, "blue"), example(STAR, "red"), example(HEART, "red"),
        example("What color is the cross?", "red"),  # nobody else asked: the kind's commonest
        choice(STAR, "C", "red", "cyan", "green", "purple"),  # green twice, red and cyan once
        choice(STAR, "A", "black", "orange", "purple", "yellow"),  # none of them ever: the first
        choice("What color is the cross?", "D", "red", "green", "blue", "purple"),
    ]  # fmt: skip
    guesses = best_guesses(examples, others)
    assert guesses == ["blue", "blue", "red", "red", "C", "A", "D"]
    answers = ["blue", "red", "", "none", "C", "B", "green"]
    assert table(examples, guesses, answers).splitlines()[2:] == [
        "| color | 4 | 12.5% | 75.0% | 50.0% |", "| choice | 3 | 25.0% | 100.0% | 33.3% |",
        "| all | 7 | 17.9% | 85.7% | 42.9% |",
    ]  # fmt: skip


def test_as_many_answers_as_there_are():
    """A chance level of a kind that has other answers."""
    seen = {}
    for each in scene_examples(400, first=0):
        about = each.question.split()[0] if each.kind == "whole" else ""  # which pattern, or which of two colours
        seen.setdefault((each.kind, num_answers(each), about), set()).add(each.answers[0])
    assert {kind: n for kind, n, _ in seen}.keys() == {*blind.KINDS}
    for (kind, n, about), answers in seen.items():
        assert kind == "reading" or about == "Are" or len(answers) == n, kind


def test_the_model_is_asked_without_the_picture(study, tmp_path):
    """The picture beside the question after all; a run that starts anew."""
    file, count = tmp_path / "a.jsonl", len(scene_examples(2))
    usual = "--scenes", 2, "--others", 3, "--batch", 7, "--out", file
    status, out, _ = study(blind, *usual)
    whole = file.read_text()
    assert status == 0 and f"| all | {count} |" in out and whole.count('"kept": []') == whole.count("\n") - 1 == count
    assert study(blind, *usual)[1] == out and file.read_text() == whole
