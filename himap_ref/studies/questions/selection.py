"""Which questions a study asks: about drawn scenes, or those of a file (question_files.py)."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from ...errors import HimapError
from .examples import Example
from .question_files import parse_questions
from .scenes import CHOICE_HINT, KINDS, TEST, Question, Scene, make_questions, make_scene

HINTS = {  # the line that LLaVA-1.5 was trained to see below such questions; the official files come without it
    "letter": CHOICE_HINT,
    "short": "Answer the question using a single word or phrase.",
}


FORMATS = """a JSON list or JSON lines, with or without pictures and answers: LLaVA's
{"id": 1, "image": "a.png", "conversations": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "B"}]},
chats {"id": 1, "image": "a.png", "messages": [{"role": "user", "content": "Which?"}]} (content: text, or parts),
POPE's {"question_id": 1, "image": "a.png", "text": "Is it?", "label": "yes"},
VQA's {"question_id": 1, "image": "a.png", "question": "Which?", "answers": ["B", "b"]},
ScienceQA's {"id": 1, "image": null, "question": "Which?", "choices": ["red", "blue"], "answer": 1}"""


def add_question_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--questions", type=Path, metavar="FILE", help=f"ask these, not about scenes: {FORMATS}")
    parser.add_argument("--image-folder", type=Path, metavar="DIR", help="where the paths in FILE start")
    parser.add_argument("--hint", choices=HINTS, help="put LLaVA's line for such answers below every question of FILE; "
                        "the official HiMAP runs ask with `letter`")  # fmt: skip
    parser.add_argument("--scenes", type=int, help="without FILE: how many drawn scenes; default: 100")
    parser.add_argument("--first-seed", type=int, help=f"the first scene; default: {TEST}, never trained on")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")


def load_examples(args: argparse.Namespace, needs_picture: bool = False) -> tuple[list[Example], dict]:
    """The examples, and the settings by which a results file recognises what they are taken from.

    Those that cannot be asked stay among them, with their `problem`: by number and reason they are told here.
    needs_picture: those without one are left out, too. A question file is recognised by its contents. How many are
    asked is no setting: more can be asked later.
    """
    if args.limit is not None and args.limit < 1:
        raise HimapError(f"--limit {args.limit}: must be at least 1")
    if args.questions is None:
        if args.image_folder or args.hint:
            raise HimapError("--image-folder and --hint go with --questions: give its file, or leave them out")
        count, first = 100 if args.scenes is None else args.scenes, TEST if args.first_seed is None else args.first_seed
        return scene_examples(count, first)[: args.limit], {"questions": "scenes"}
    if args.scenes is not None or args.first_seed is not None:
        raise HimapError("--scenes and --first-seed go without --questions: ask about scenes or ask the file's")
    if args.image_folder is None:
        raise HimapError("--questions needs --image-folder: the folder where the paths of its pictures start")
    try:
        data = args.questions.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise HimapError(f"{args.questions}: cannot be read ({error})") from None
    examples = parse_questions(data, args.image_folder, str(args.questions), args.limit, HINTS.get(args.hint, ""))
    if needs_picture:
        no_picture = "no picture, which this study looks into"
        examples = [e if e.source or e.problem else replace(e, problem=no_picture) for e in examples]
    left_out = Counter(example.problem for example in examples if example.problem)
    for problem, count in left_out.items():
        print(f"{args.questions}: {count} of {len(examples)} questions left out: {problem}", file=sys.stderr)
    if left_out.total() == len(examples):
        raise HimapError(f"{args.questions}: none of {len(examples)} questions can be asked: {'; '.join(left_out)}")
    folder = str(args.image_folder.resolve())
    return examples, {"questions": sha256(data).hexdigest(), "hint": args.hint, "image_folder": folder}


# --- Scenes ----------------------------------------------------------------------------------------------------------


def scene_examples(count: int, first: int = TEST) -> list[Example]:
    """One question of every kind that each of `count` scenes allows."""
    if count < 1 or first < 0:
        raise HimapError(f"{count} scenes from seed {first}: need at least 1, from a seed that is not negative")
    examples = []
    for seed in range(first, first + count):
        scene = make_scene(seed)
        by_kind = {question.kind: question for question in reversed(make_questions(scene, 60))}  # the first one stays
        examples += [scene_example(scene, by_kind[kind]) for kind in KINDS if kind in by_kind]
    return examples


def scene_example(scene: Scene, question: Question) -> Example:
    about, kind = question.about, question.kind
    size, place = (len(about.patches), about.place) if about else (0, "")
    return Example(f"{scene.seed}-{kind}", question.text, (question.answer,), kind, scene,
                   targets=question.targets, size=size, place=place)  # fmt: skip
