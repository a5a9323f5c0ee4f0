"""Questions with their right answers and pictures: about drawn scenes, or read from a file.

A file is a JSON list, or JSON lines, in either of LLaVA's layouts:

    {"id": "5", "image": "5/image.png", "conversations": [{"from": "human", "value": "<image>\\nWhich is it?\\nA. ..."},
                                                          {"from": "gpt", "value": "B"}]}
    {"question_id": 1, "image": "000000016631.jpg", "text": "Is there a person in the image?", "label": "yes"}

The first is that of the official HiMAP's files (some with `top5_res`), the second POPE's (`answer` will do for `label`,
`category` is the kind). In both, `answers` goes before the single answer: a list of strings or of {"answer": "..."},
such as VQA's ten or a picture's captions. Of a longer conversation only the first question and its answer count.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from reprlib import repr as short
from typing import Any

from PIL import Image

from ..errors import HimapError
from ..image import load_image
from .scenes import CHOICE_HINT, KINDS, TEST, Scene, draw, make_questions, make_scene

HINTS = {  # the line that LLaVA-1.5 was trained to see below such questions; the official files come without it
    "letter": CHOICE_HINT,
    "short": "Answer the question using a single word or phrase.",
}


@dataclass(frozen=True)
class Example:
    """One thing to ask. kind: the group it is reported in, "" for none; top5: the official file's `top5_res`."""

    id: str
    question: str
    answers: tuple[str, ...]
    kind: str
    source: Path | Scene
    top5: tuple[int, ...] = ()

    def picture(self) -> Image.Image:
        """RGB; raises HimapError if the file is not there or broken, which nothing has looked at before."""
        return draw(self.source) if isinstance(self.source, Scene) else load_image(self.source)


def add_question_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--questions", type=Path, metavar="FILE", help="ask these, not about scenes (JSON, JSON lines)")
    parser.add_argument("--image-folder", type=Path, metavar="DIR", help="where the paths in FILE start")
    parser.add_argument("--hint", choices=HINTS, help="put LLaVA's line for such answers below every question of FILE; "
                        "the official HiMAP runs ask with `letter`")  # fmt: skip
    parser.add_argument("--scenes", type=int, help="without FILE: how many drawn scenes; default: 100")
    parser.add_argument("--first-seed", type=int, help=f"the first scene; default: {TEST}, never trained on")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")


def load_examples(args: argparse.Namespace) -> tuple[list[Example], dict]:
    """The examples, and the settings by which a results file recognises what they are taken from.

    A question file is recognised by its contents. How many are asked is no setting: more can be asked later.
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
    data = _read_bytes(args.questions)
    examples = parse_questions(data, args.image_folder, str(args.questions), args.limit, HINTS.get(args.hint, ""))
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
        by_kind = {question.kind: question for question in reversed(make_questions(scene, 30))}  # the first one stays
        asked = [by_kind[kind] for kind in KINDS if kind in by_kind]
        examples += [Example(f"{seed}-{q.kind}", q.text, (q.answer,), q.kind, scene) for q in asked]
    return examples


# --- Files -----------------------------------------------------------------------------------------------------------


def parse_questions(data: bytes, folder: Path, name: str, limit: int | None = None, hint: str = "") -> list[Example]:
    """A question file's contents -> its first `limit` examples, `hint` below each question, pictures under `folder`.

    Raises HimapError that names the file and the entry at fault. Pictures are not opened, but paths that lead out of
    the folder are refused: a file from somewhere else must not choose what is read on this machine.
    """
    if not os.path.isdir(folder):
        raise HimapError(f"--image-folder {folder}: there is no such folder")
    folder, examples = folder.resolve(), {}
    for number, entry in enumerate(_entries(data, name)[:limit], start=1):
        try:
            example = _parse_entry(entry, folder, hint)
            if example.id in examples:
                raise HimapError(f"id {example.id!r} was there before: give every entry its own")
        except HimapError as error:
            raise HimapError(f"{name}: entry {number}: {error}") from None
        examples[example.id] = example
    return list(examples.values())


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise HimapError(f"{path}: cannot be read ({error})") from None


def _entries(data: bytes, name: str) -> list:
    """The entries of a JSON list or of JSON lines, whichever it is; anything may stand in them."""
    try:
        text = data.decode("utf-8-sig")
        entries = json.loads(text) if text.lstrip().startswith("[") else list(_json_lines(text))
    except (ValueError, RecursionError) as error:
        raise HimapError(f"{name}: expected a JSON list, or one JSON object a line ({error})") from None
    if not entries:
        raise HimapError(f"{name}: holds no questions")
    return entries


def _json_lines(text: str) -> Iterator:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would also split at a U+2028 in a string
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None


def _parse_entry(entry: object, folder: Path, hint: str) -> Example:
    if not isinstance(entry, dict):
        raise HimapError(f"expected an object with id, image and conversations or text, not {_type(entry)}")
    id = _first(entry, "id", "question_id")
    if type(id) not in (str, int) or id == "":  # a bool is an int
        raise HimapError(f"`id` (or `question_id`): expected text or a whole number, not {_type(id)}")
    said, reply = _first_turns(entry)
    question = _text(_text(said, "question").replace("<image>", ""), "question").strip()  # as the official code has it
    top5 = entry.get("top5_res") or []
    if not isinstance(top5, list) or any(type(token) is not int for token in top5):
        raise HimapError("`top5_res`: expected a list of token ids")
    kind = entry.get("category") or ""
    if not isinstance(kind, str) or not kind.isprintable():  # it heads a column
        raise HimapError(f"`category`: expected a line of text, not {short(kind)}")
    source = _inside(folder, _text(entry.get("image"), "image"))
    question = f"{question}\n{hint}" if hint else question
    return Example(str(id), question, _answers(entry, reply), kind, source, tuple(top5))


def _first_turns(entry: dict) -> tuple[object, object]:
    """The question and the single answer as they stand there; None for what is missing."""
    reply = _first(entry, "label", "answer")
    if "conversations" not in entry:
        return entry.get("text"), reply
    turns = entry["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise HimapError("`conversations`: expected a list of objects with `from` and `value`")
    speakers = [turn.get("from") for turn in turns]
    start = speakers.index("human") if "human" in speakers else len(turns)
    human, gpt = [*turns[start : start + 2], {}, {}][:2]
    return human.get("value"), gpt.get("value") if gpt.get("from") == "gpt" else reply


def _first(entry: dict, *names: str) -> object:
    return next((entry[name] for name in names if entry.get(name) is not None), None)


def _answers(entry: dict, reply: object) -> tuple[str, ...]:
    """`answers` if there are any, else the single one. VQA's ten may hold blanks: they count among the ten."""
    given = entry.get("answers")
    if given is None:
        return (_text(reply, "answer"),)
    given = given if isinstance(given, list) else []
    texts: list[Any] = [each.get("answer") if isinstance(each, dict) else each for each in given]
    if not all(isinstance(text, str) for text in texts) or not any(map(str.strip, texts)):
        raise HimapError('`answers`: expected a list of strings or of {"answer": string}, not all blank')
    return tuple(texts)


def _inside(folder: Path, name: str) -> Path:
    """folder/name with links followed, so that what is checked here is what is opened later. `folder` is resolved."""
    try:
        path = (folder / name).resolve()
    except (OSError, ValueError, RuntimeError):  # a NUL, half a surrogate pair, links in a circle
        raise HimapError(f"image {name!r} is not a path: correct it, or remove the entry") from None
    if not path.is_relative_to(folder):
        raise HimapError(f"image {name!r} leads out of the image folder: choose a folder that it is in")
    return path


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        found = "blank text" if isinstance(value, str) else _type(value)
        raise HimapError(f"no {what}: expected text, found {found}: add it, or remove the entry")
    return value


def _type(value: object) -> str:
    return "nothing" if value is None else type(value).__name__
