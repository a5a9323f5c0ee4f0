"""Asking many questions: in batches of whatever lengths, under a progress bar, each result recorded at once.

Under torchrun the batches are shared out; see `record_each`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ...commands import ranks
from ...errors import HimapError
from ..questions.examples import Example
from .records import Records

Ask = Callable[[list[Example], list], list]  # questions and their pictures, or None for each -> a result each


def turn(example: Example) -> tuple:
    """By which questions are sorted: what cannot be asked, then those with a picture, then those without, each from
    the shortest on."""
    return (False,) if example.problem else (True, example.source is None, len(example.question))


def ask_each(
    examples: Sequence[Example], size: int, ask: Ask, rank: int = 0, number: int = 1
) -> Iterator[tuple[Example, Any]]:
    """(example, what `ask` makes of it), in batches of at most `size`, short questions first: less padding.

    First those with a picture, then those without: no batch holds both. A question that has a problem, or whose picture
    cannot be read, comes with its HimapError. A batch for which `ask` raises one is asked again one by one, so that the
    error stands beside the question it belongs to. Of all batches this process asks every `number`-th.
    """
    ordered = sorted(examples, key=turn)
    problems = [example for example in ordered if example.problem]
    yield from ((example, HimapError(example.problem)) for example in problems[rank::number])
    for with_picture in (True, False):
        group = [e for e in ordered if not e.problem and (e.source is not None) is with_picture]
        for start in range(rank * size, len(group), number * size):
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


def record_each(
    examples: Sequence[Example], path: Path, settings: dict, size: int, ask: Ask, title: str
) -> dict[str, dict]:  # fmt: skip
    """Asks what the results file does not hold yet, or holds an error for; returns each example's row by its key.

    `ask` returns rows; errors become rows too, and are told at once but for those that were known before. Of several
    processes each asks its share and records it in a part of its own, and the first takes the parts into the file: at
    the end, or when the next run begins, of however many processes.
    """
    order, parts = [example.key for example in sorted(examples, key=turn)], path.with_name(f"{path.name}.parts")
    rank, number = ranks.rank(), ranks.size()
    file: Any = Records(path, settings) if rank == 0 else nullcontext()  # held to the end: no second run may write it

    def all_rows() -> dict[str, dict]:
        return ranks.from_first(lambda: file.take_in(parts, order))

    with file:
        known = all_rows()
        todo = [example for example in examples if "error" in known.get(example.key, {"error": "not asked yet"})]
        part = Records(parts / f"{rank}.jsonl", settings) if number > 1 else nullcontext(file)
        progress = tqdm(total=len(examples), initial=len(examples) - len(todo), desc=title, unit="question")
        with part as own, progress:
            for example, row in ask_each(todo, size, ask, rank, number):
                if isinstance(row, HimapError):
                    row = {"error": str(row)}
                    _tell(example, row)
                own.add(example.key, row)
                progress.update(min(number, len(examples) - progress.n))  # the others are about as far
        rows = all_rows()
    if lost := [key for key in order if key not in rows]:
        raise HimapError(
            f"{path}: lacks {lost[0]!r}, recorded by another machine: --out must be where all write"
        )
    for example in todo:
        if example.key not in own.rows:  # another process's
            _tell(example, rows[example.key])
    return {example.key: rows[example.key] for example in examples}


def _tell(example: Example, row: dict) -> None:
    """An error, above the progress bar, but of none that the entry itself has: those are counted elsewhere."""
    if "error" in row and not example.problem:
        tqdm.write(str(HimapError(f"{example.key}: {row['error']}")), file=sys.stderr)  # the id is the file's
