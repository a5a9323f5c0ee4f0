"""Question files: a JSON list, or JSON lines, as LLaVA, POPE, VQA and chat data write them -> examples.

    {"id": "5", "image": "5/image.png", "conversations": [{"from": "human", "value": "<image>\\nWhich is it?\\nA. ..."},
                                                          {"from": "gpt", "value": "B"}]}
    {"question_id": 1, "image": "000000016631.jpg", "text": "Is there a person in the image?", "label": "yes"}

The first is that of the official HiMAP's files (some with `top5_res`), the second POPE's. Of each the same is read:

id          `id`, `question_id`. One id may stand over several questions.
question    the first turn of `conversations` or `messages`, by human or user (`from` or `role`; `value` or `content`,
            which may be a list of text and image parts); else `text`, `question`, `prompt`. Later turns do not count.
picture     `image`, `images`, or an image part: a path under --image-folder. None: asked as text. Several: left out.
options     `options`, `choices`: put below the question as "A. ...", if it does not list them itself.
answer      `answers`, a list of strings or of {"answer": "..."}, such as VQA's ten or a picture's captions; else what
            gpt or assistant says next; else `label`, `answer`. Without any, the question is asked, and not judged.
            Of a question with options a whole number is an index, from 0, as is `correct_choice_idx`, `answer_index`.
kind        `category`
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from reprlib import repr as short

from ...errors import HimapError
from .examples import Example
from .labels import LETTERS, answers_of, first_of, options_of, text_of, type_of, with_options

USER, ASSISTANT = ("human", "user"), ("gpt", "assistant", "model", "bot", "chatgpt")
SEVERAL = "several pictures in one entry: the model takes one"
SHOWS = re.compile("image|img|picture|photo|video|audio|file_?name|file_?path|^(file|path|url)$", re.IGNORECASE)
ELSEWHERE = re.compile(r"[a-z]:|[a-z][a-z0-9+.-]+://|(data|file):", re.IGNORECASE)  # C:\..., https://..., the bytes


def parse_questions(data: bytes, folder: Path, name: str, limit: int | None = None, hint: str = "") -> list[Example]:
    """A question file's contents -> examples of its first `limit` entries, `hint` below each question.

    Raises HimapError that names the file and the entry at fault. Pictures are not opened, but paths that lead out of
    the folder are refused: a file from somewhere else must not choose what is read on this machine. Links in the
    folder are the user's own, and followed.
    """
    if not os.path.isdir(folder):
        raise HimapError(f"--image-folder {folder}: there is no such folder")
    folder, found = Path(os.path.abspath(folder)), _Found()
    for number, entry in enumerate(_entries(data, name)[:limit], start=1):
        try:
            found.add(_parse_entry(entry, folder, hint), number)
        except HimapError as error:
            raise HimapError(f"{name}: entry {number}: {error}") from None
    return [*found.examples.values()]


class _Found:
    """Examples so far, each under a key of its own. What comes later changes no key: more may be asked another time."""

    def __init__(self) -> None:
        self.examples: dict[tuple, Example] = {}
        self.keys: set[str] = set()
        self.numbers = Counter[str]()  # by id

    def add(self, example: Example, entry: int) -> None:
        same = (example.id, example.question, example.kind, entry if example.problem else example.source)
        if before := self.examples.get(same):
            if replace(before, number=1, copies=1) != example:
                raise HimapError(f"id {example.id!r} asks this a second time with another answer: correct one of both")
            self.examples[same] = replace(before, copies=before.copies + 1)
            return
        number = self.numbers[example.id] + 1
        while (example := replace(example, number=number)).key in self.keys:  # somebody's id ends in " #2"
            number += 1
        self.numbers[example.id] = number
        self.keys.add(example.key)
        self.examples[same] = example


# ---------------------------------------------------------------- entries


def _entries(data: bytes, name: str) -> list:
    """The entries of a JSON list or of JSON lines, whichever it is; anything may stand in them."""
    try:
        text = data.decode("utf-8-sig")
        entries = json.loads(text) if text.lstrip().startswith("[") else list(_json_lines(text))
    except (ValueError, RecursionError) as error:
        raise HimapError(f"{name}: expected a JSON list, or one JSON object a line ({error})") from None
    if not entries:
        raise HimapError(f"{name}: holds no questions")
    one = entries[0] if len(entries) == 1 and isinstance(entries[0], dict) else {"id": ""}
    if not {"id", "question_id", "conversations"} & {*one} and any(isinstance(x, list | dict) for x in one.values()):
        raise HimapError(f"{name}: one object, not a list of entries or one a line: write what is in it as a list")
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
        raise HimapError(f"expected an object with id, image and conversations or text, not {type_of(entry)}")
    id = first_of(entry, "id", "question_id")
    if type(id) not in (str, int) or id == "":  # a bool is an int
        raise HimapError(f"`id` (or `question_id`): expected text or a whole number, not {type_of(id)}")
    said, reply = _first_turns(entry)
    said, shown = _content(said)
    pictures = _pictures(entry, said, shown)
    question = text_of(said, "question").replace("<image>", "")  # as the official code has it
    lettered = [entry[letter] for letter in takewhile(entry.get, LETTERS)]  # MMBench's: a field for each option
    options = first_of(entry, "options", "choices") or (lettered if len(lettered) > 1 else None)
    question = with_options(text_of(question, "question").strip(), options)
    if context := entry.get("hint"):  # ScienceQA's, where LLaVA asks with it
        question = f"Context: {text_of(context, 'hint').strip()}\n{question}"
    answers = answers_of(entry, reply, options_of(question))
    top5 = entry.get("top5_res") or []
    if not isinstance(top5, list) or any(type(token) is not int for token in top5):
        raise HimapError("`top5_res`: expected a list of token ids")
    kind = entry.get("category") or ""
    if not isinstance(kind, str) or not kind.isprintable():  # it heads a column
        raise HimapError(f"`category`: expected a line of text, not {short(kind)}")
    problem = SEVERAL if max(len(pictures), str(said).count("<image>") if pictures else 0) > 1 else ""
    source = _inside(folder, pictures[0]) if pictures and not problem else None
    question = f"{question}\n{hint}" if hint else question
    return Example(str(id), question, answers, kind, source, tuple(top5), problem=problem)


def _first_turns(entry: dict) -> tuple[object, object]:
    """The question and the single answer as they stand there; None for what is missing."""
    reply = first_of(entry, "label", "answer")
    if entry.get("answer") is not None and entry["answer"] != reply:
        raise HimapError(f"label {short(reply)} and answer {short(entry['answer'])}: which of them is right?")
    name = next((name for name in ("conversations", "messages", "conversation") if name in entry), None)
    if name is None:
        return first_of(entry, "text", "question", "prompt"), reply
    turns = entry[name]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise HimapError(f"`{name}`: expected a list of objects with `from` and `value`, or `role` and `content`")
    speakers = [str(first_of(turn, "from", "role")).lower() for turn in turns]
    said = [first_of(turn, "value", "content") for turn in turns]
    start = next((i for i, speaker in enumerate(speakers) if speaker in USER), len(turns))
    if speakers[start + 1 : start + 2] and speakers[start + 1] in ASSISTANT:
        answer, shown = _content(said[start + 1])
        if shown:
            raise HimapError("the answer holds a picture: expected text")
        reply = reply if answer in (None, "") else answer
    return next(iter(said[start:]), None), reply


def _content(content: object) -> tuple[object, list]:
    """What a turn says, and the pictures that it names; a list of parts becomes text with an <image> for each."""
    if not isinstance(content, list):
        return content, []
    texts, shown = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "input_text"):
            texts.append(text_of(part.get("text"), "text"))
        elif kind in ("image", "image_url", "input_image"):
            shown.append(first_of(part, "image", "image_url", "url", "path"))
        else:
            raise HimapError(f"`content`: expected text, or parts whose `type` is text or image, found {short(part)}")
    return "<image>" * len(shown) + "\n".join(texts), shown


# ---------------------------------------------------------------- pictures


def _pictures(entry: dict, said: object, shown: list) -> list[str]:
    """The paths of an entry's pictures, by whichever field. Raises HimapError if one is meant and none named."""
    sources = [names for names in map(_names, (entry.get("image"), entry.get("images"), shown)) if names]
    pictures = sources[0] if sources else []
    if any(names != pictures for names in sources):
        pictures = [name for names in sources for name in names]
    if not pictures:
        if isinstance(said, str) and "<image>" in said:
            raise HimapError("no image, but the question has <image>: name the picture in `image`, or take it out")
        for field, value in entry.items():
            if value and field not in ("image", "images") and SHOWS.search(field):  # asked blindly, it would look fine
                raise HimapError(f"no image, but `{field}`: name the picture in `image`, or remove the field")
    return pictures


def _names(value: object) -> list[str]:
    """One path or a list; {"path": ...} and {"url": ...} as data sets and chats write it; blank ones are none."""
    names = []
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, dict):  # with something else in it, such as the picture's bytes, it is no path
            each = first_of(each, "path", "url", "file_name") or (each if any(each.values()) else None)
        if not isinstance(each, str | None):
            raise HimapError(f"no image: expected a path, found {type_of(each)}: correct it, or remove the entry")
        if each and each.strip():
            names.append(each)
    return names


def _inside(folder: Path, name: str) -> Path:
    """folder/name. Decided by what is written, either way round of slashes, before any link is followed."""
    if ELSEWHERE.match(name):
        raise HimapError(f"image {name[:99]!r} is elsewhere: put it into the image folder, and write its path in there")
    path = os.path.normpath(os.path.join(folder, name.replace("\\", "/")))
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # half a surrogate pair
        path = "\0"
    if "\0" in path:
        raise HimapError(f"image {name!r} is not a path: correct it, or remove the entry")
    if not any(Path(path).is_relative_to(start) for start in (folder, folder.resolve())):
        raise HimapError(f"image {name!r} leads out of the image folder: choose a folder that it is in")
    return Path(path)
