"""Asking many questions: in batches of whatever lengths, under a progress bar, each result recorded at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image
from tqdm import tqdm

from ...errors import HimapError
from ..questions.examples import Example
from .records import Records

Ask = Callable[[list[Example], list], list]  # questions and their pictures, or None for each -> a result each


def ask_each(examples: Sequence[Example], size: int, ask: Ask) -> Iterator[tuple[Example, Any]]:
    """(example, what `ask` makes of it), in batches of at most `size`, short questions first: less padding.

    First those with a picture, then those without: no batch holds both. A question that has a problem, or whose picture
    cannot be read, comes with its HimapError. A batch for which `ask` raises one is asked again one by one, so that the
    error stands beside the question it belongs to.
    """
    yield from ((example, HimapError(example.problem)) for example in examples if example.problem)
    askable = sorted((e for e in examples if not e.problem), key=lambda example: len(example.question))
    for with_picture in (True, False):
        group = [example for example in askable if (example.source is not None) is with_picture]
        for start in range(0, len(group), size):
            readable = []
            for example in group[start : start + size]:
                try:
                    readable.append((example, example.picture() if with_picture else None))
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


def record_each(examples: Sequence[Example], records: Records, size: int, ask: Ask, title: str) -> dict[str, dict]:
    """Asks what `records` does not hold yet, or holds an error for; returns each example's row by its key.

    `ask` returns rows; errors become rows too, and are told at once but for those that were known before.
    """
    todo = [example for example in examples if "error" in records.rows.get(example.key, {"error": "not asked yet"})]
    with tqdm(total=len(examples), initial=len(examples) - len(todo), desc=title, unit="question") as progress:
        for example, row in ask_each(todo, size, ask):
            if isinstance(row, HimapError):
                if not example.problem:
                    progress.write(str(HimapError(f"{example.key}: {row}")), file=sys.stderr)  # the id is the file's
                row = {"error": str(row)}
            records.add(example.key, row)
            progress.update()
    return {example.key: records.rows[example.key] for example in examples}
