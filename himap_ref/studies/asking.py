"""Asking many questions: in batches of whatever lengths, under a progress bar, each result recorded at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image
from tqdm import tqdm

from ..errors import HimapError
from .questions import Example
from .records import Records

Ask = Callable[[list[Example], list[Image.Image]], list]  # questions, their pictures -> a result each


def ask_each(examples: Sequence[Example], size: int, ask: Ask) -> Iterator[tuple[Example, Any]]:
    """(example, what `ask` makes of it), in batches of at most `size`, short questions first: less padding.

    A question whose picture cannot be read comes with its HimapError. A batch for which `ask` raises one is asked again
    one by one, so that the error stands beside the question it belongs to.
    """
    examples = sorted(examples, key=lambda example: len(example.question))
    for start in range(0, len(examples), size):
        readable = []
        for example in examples[start : start + size]:
            try:
                readable.append((example, example.picture()))
            except HimapError as error:
                yield example, error
        yield from _ask(readable, ask)


def _ask(pairs: list[tuple[Example, Image.Image]], ask: Ask) -> Iterator[tuple[Example, Any]]:
    examples, pictures = [example for example, _ in pairs], [picture for _, picture in pairs]
    try:
        yield from zip(examples, ask(examples, pictures) if pairs else [], strict=True)
    except HimapError as error:
        if len(pairs) == 1:
            yield examples[0], error
        else:
            for pair in pairs:
                yield from _ask([pair], ask)


def record_each(examples: Sequence[Example], records: Records, size: int, ask: Ask, title: str) -> None:
    """Asks what `records` does not hold yet, or holds an error for. `ask` returns rows; errors become rows too."""
    todo = [example for example in examples if "error" in records.rows.get(example.id, {"error": "not asked yet"})]
    with tqdm(total=len(examples), initial=len(examples) - len(todo), desc=title, unit="question") as progress:
        for example, row in ask_each(todo, size, ask):
            if isinstance(row, HimapError):
                progress.write(str(HimapError(f"{example.id}: {row}")), file=sys.stderr)  # the id is the file's
                row = {"error": str(row)}
            records.add(example.id, row)
            progress.update()
