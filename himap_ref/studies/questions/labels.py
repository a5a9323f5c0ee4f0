"""Right answers and options as question files write them: texts, numbers, letters, indices."""

from __future__ import annotations

import math
import re
import string
from reprlib import repr as short
from typing import Any

from ...errors import HimapError

LETTERS = string.ascii_uppercase
INDEX = ("correct_choice_idx", "answer_index", "answer_idx")
MARK = r"\(?([A-Z])[.):]"  # "A." as LLaVA's files have it, "A)", "(A)", "A:"
LISTED = (  # an option a line, or all on one: "(A) red (B) blue"
    re.compile(rf"^[ \t]*{MARK}[ \t]+(\S.*?)[ \t]*$", re.MULTILINE),
    re.compile(r"\(([A-Z])\)[ \t]*([^\s(][^(\n]*?)[ \t]*(?=\([A-Z]\)|$)", re.MULTILINE),
)

# ---------------------------------------------------------------- options


def options_of(question: str) -> tuple[str, ...]:
    """What A, B, ... stand for in a multiple-choice question; empty for any other."""
    for pattern in LISTED:
        found = pattern.findall(question)
        if len(found) > 1 and LETTERS.startswith("".join(letter for letter, _ in found)):
            return tuple(text for _, text in found)
    return ()


def with_options(question: str, options: object) -> str:
    """The options below it as LLaVA's ScienceQA file has them, unless the question lists them already."""
    if options in (None, [], {}, ""):
        return question
    if isinstance(options, dict) and LETTERS.startswith("".join(options)):  # {"A": "red", "B": "blue"}
        options = [*options.values()]
    if not isinstance(options, list) or not 1 < len(options) <= len(LETTERS):
        raise HimapError(f"`options`: expected a list of 2 to {len(LETTERS)} texts, not {short(options)}")
    lines = []
    for letter, option in zip(LETTERS, options, strict=False):
        text = " ".join(_label(option, "option").split())
        own = re.match(MARK + " ", text)  # its letter may stand there already
        lines.append(f"{letter}. {text[own.end() :] if own and own[1] == letter else text}")
    listed = len(options_of(question))
    if listed not in (0, len(lines)):
        raise HimapError(f"the question lists {listed} options, `options` {len(lines)}: correct one of both")
    return question if listed else "\n".join([question, *lines])


# ---------------------------------------------------------------- answers


def answers_of(entry: dict, reply: object, options: tuple[str, ...]) -> tuple[str, ...]:
    """`answers` if there are any, else the single one; () for none. VQA's ten may hold blanks, which count among them.

    A whole number is an index where there are options: ScienceQA's and A-OKVQA's count from 0.
    """
    given = next((each for each in (entry.get("answers"), reply) if each not in (None, "", [])), None)
    if isinstance(given, list):
        texts: list[Any] = [each.get("answer") if isinstance(each, dict) else each for each in given]
        if any(not isinstance(text, str) and _whole(text) is None for text in texts):
            raise HimapError('`answers`: expected a list of texts or whole numbers, or of {"answer": text}')
        answers = tuple(text if isinstance(text, str) else _label(text, "answer") for text in texts)
        return answers if any(map(str.strip, answers)) else ()
    if given is None or isinstance(given, str) and not given.strip():
        index = first_of(entry, *INDEX)
        return () if index is None else (_letter(index, options),)
    if not options or given in options:
        return (_label(given, "answer"),)
    number = _whole(given)
    if str(number) in options or isinstance(given, str) and given.strip().isdecimal():
        raise HimapError(f"answer {short(given)}: an index, or an option? Write the option's letter, or all its text")
    return (_label(given, "answer") if number is None else _letter(given, options),)


def _letter(index: object, options: tuple[str, ...]) -> str:
    number = _whole(index)
    if number is None or not 0 <= number < len(options):
        raise HimapError(f"answer {short(index)}: expected an index from 0 on, of one of {len(options)} options")
    return LETTERS[number]


def _whole(value: object) -> int | None:
    """3 and 3.0, which is how tables write a column with gaps; None for all else."""
    if type(value) is float and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def _label(value: object, what: str) -> str:
    """Text, or a number as text: 3.0 is "3"."""
    if type(value) in (int, float) and math.isfinite(value):  # type: ignore[arg-type]
        return str(value).removesuffix(".0")
    if isinstance(value, bool):  # yes, true, A?
        raise HimapError(f'no {what}: {str(value).lower()} may mean several: write what is to be said, such as "yes"')
    return text_of(value, what)


# ---------------------------------------------------------------- values


def first_of(entry: dict, *names: str) -> object:
    return next((entry[name] for name in names if entry.get(name) is not None), None)


def text_of(value: object, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        found = "blank text" if isinstance(value, str) else type_of(value)
        raise HimapError(f"no {what}: expected text, found {found}: add it, or remove the entry")
    return value


def type_of(value: object) -> str:
    return "nothing" if value is None else type(value).__name__
