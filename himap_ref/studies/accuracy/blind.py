"""What can be answered without the picture: the floor below which an accuracy says nothing.

    python -m himap_ref.studies blind --scenes 300

For each kind of question about drawn scenes that were never trained on, the share right of

1 / answers      an answer drawn by lot among all of its kind (of its text, for questions about the whole)
best guess       the answer that other scenes most often gave to the same text; in a multiple choice, that of its four
                 options which other scenes most often gave to the same question, whatever their options were
without picture  what the model itself says when it is asked as text only
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from ...commands.manners import run_command
from ...commands.options import add_model_arguments
from ...commands.report import markdown
from ...errors import HimapError
from ...methods.schedules import Method
from ..common.records import load_recorded
from ..questions.examples import Example
from ..questions.labels import options_of
from ..questions.scenes import BACKGROUNDS, COLORS, KINDS, LETTERS, NUMBER_LENGTH, PLACES, SHAPES
from ..questions.selection import scene_examples
from .evaluate import Evaluation
from .metrics import METRICS, exact

ANSWERS = {
    "color": len(COLORS), "shape": len(SHAPES), "place": len(PLACES), "count": len(PLACES) + 1, "yesno": 2,
    "choice": len(LETTERS), "relation": len(COLORS) * len(SHAPES), "reading": 10**NUMBER_LENGTH,
}  # fmt: skip


def num_answers(example: Example) -> int:
    two_colors = example.question.startswith("Are there more")
    return ANSWERS.get(example.kind) or (2 if two_colors else len(BACKGROUNDS))


def said(example: Example) -> str:
    """The right answer; of a multiple choice, what its letter stands for."""
    options = options_of(example.question)
    return options[LETTERS.index(example.answers[0])] if options else example.answers[0]


def best_guesses(examples: Sequence[Example], others: Sequence[Example]) -> list[str]:
    """An answer for each example, from the answers to `others` alone; to a text not among them, from all of its kind.

    Among the equally frequent the first one counts: in a multiple choice of the options.
    """
    by_text: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for other in others:
        for group in (_text(other), (other.kind,)):
            by_text[group][said(other)] += 1
    guesses = []
    for example in examples:
        counts = by_text.get(_text(example)) or by_text[example.kind,]
        options = options_of(example.question)
        best = max(options or counts or [""], key=lambda answer: counts[answer])
        guesses.append(LETTERS[options.index(best)] if options else best)
    return guesses


def _text(example: Example) -> tuple[str, str]:
    return example.kind, example.question.split("\n")[0]  # without the options, which hardly ever come back


def table(examples: Sequence[Example], guesses: Sequence[str], answers: Sequence[str]) -> str:
    """A row for each kind, and one for all; guesses, answers: one each."""
    rows = []
    for kind in (*KINDS, "all"):
        own = [row for row in zip(examples, guesses, answers, strict=True) if kind in (row[0].kind, "all")]
        if own:
            by_lot = mean(1 / num_answers(e) for e, _, _ in own)
            guessed = mean(guess in e.answers for e, guess, _ in own)
            answered = mean(exact(answer, e) for e, _, answer in own)
            rows.append([kind, str(len(own)), *(f"{share:.1%}" for share in (by_lot, guessed, answered))])
    return markdown(["kind", "n", "1 / answers", "best guess", "without picture"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model_arguments(parser)
    parser.add_argument("--scenes", type=int, default=100, help="how many are asked about")
    parser.add_argument("--others", type=int, default=4000, help="how many the best guess is taken from")
    parser.add_argument("--batch", type=int, default=64, help="questions at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/blind"), help="a file, or a folder for one")
    args = parser.parse_args()
    if args.batch < 1:
        raise HimapError(f"--batch {args.batch}: must be at least 1")
    examples, others = scene_examples(args.scenes), scene_examples(args.others, first=0)
    examples = [replace(example, source=None) for example in examples]
    model, settings = load_recorded(args)
    settings |= {"questions": "scenes, without their pictures", "max_new_tokens": 16}
    evaluation = Evaluation(model, examples, METRICS["exact"], 16, args.batch, settings)
    _, rows = evaluation.run(Method("none"), args.out)
    answers = [rows[example.key].get("answer", "") for example in examples]  # one that could not be asked is wrong
    print(table(examples, best_guesses(examples, others), answers))


if __name__ == "__main__":
    run_command(main)
