"""Asking many questions: in batches of whatever lengths, under a progress bar, each result recorded at once."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image
from tqdm import tqdm

from ..errors import HimapError
from .examples import Example
from .records import Records

Ask = Callable[[list[Example], list], list]  # questions and their pictures, or None for each -> a result each
NO_PICTURE = "no picture, which this study looks into"


class LeftOut(HimapError):
    """Known before it is asked, and told once for all questions of the kind."""


def ask_each(
    examples: Sequence[Example], size: int, ask: Ask, needs_picture: bool = False
) -> Iterator[tuple[Example, Any]]:
    """(example, what `ask` makes of it), in batches of at most `size`, short questions first: less padding.

    First those with a picture, then those without: no batch holds both. A question whose picture cannot be read comes
    with its HimapError. A batch for which `ask` raises one is asked again one by one, so that the error stands beside
    the question it belongs to.
    """
    askable: dict[bool, list[Example]] = {True: [], False: []}  # with a picture, without
    for example in examples:
        has_picture = example.source is not None
        if reason := example.problem or ("" if has_picture or not needs_picture else NO_PICTURE):
            yield example, LeftOut(reason)
        else:
            askable[has_picture].append(example)
    for group in askable.values():
        group.sort(key=lambda example: len(example.question))
        for start in range(0, len(group), size):
            yield from _ask_batch(group[start : start + size], ask)


def _ask_batch(examples: list[Example], ask: Ask) -> Iterator[tuple[Example, Any]]:
    readable = []
    for example in examples:
        try:
            readable.append((example, example.picture() if example.source is not None else None))
        except HimapError as error:
            yield example, error
    yield from _ask(readable, ask)


def _ask(pairs: list[tuple[Example, Image.Image | None]], ask: Ask) -> Iterator[tuple[Example, Any]]:
    examples, pictures = [example for example, _ in pairs], [picture for _, picture in pairs]
    try:
        yield from zip(examples, ask(examples, pictures) if pairs else [], strict=True)
    except HimapError as error:
        if len(pairs) == 1:
            yield examples[0], error
        else:
            for pair in pairs:
                yield from _ask([pair], ask)


def record_each(
    examples: Sequence[Example], records: Records, size: int, ask: Ask, title: str, needs_picture: bool = False
) -> dict[str, dict]:
    """Asks what `records` does not hold yet, or holds an error for; returns each example's row by its key.

    `ask` returns rows; errors become rows too. What is left out is counted on standard error, a line for each reason.
    """
    todo = [example for example in examples if "error" in records.rows.get(example.key, {"error": "not asked yet"})]
    left_out = Counter[str]()
    with tqdm(total=len(examples), initial=len(examples) - len(todo), desc=title, unit="question") as progress:
        for example, row in ask_each(todo, size, ask, needs_picture):
            if isinstance(row, HimapError):
                if isinstance(row, LeftOut):
                    left_out[str(row)] += 1
                else:
                    progress.write(str(HimapError(f"{example.key}: {row}")), file=sys.stderr)  # the id is the file's
                row = {"error": str(row)}
            records.add(example.key, row)
            progress.update()
    for reason, count in left_out.items():
        print(f"{title}: {count} left out: {reason}", file=sys.stderr)
    return {example.key: records.rows[example.key] for example in examples}
