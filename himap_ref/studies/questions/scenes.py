"""Drawn scenes and questions about them, on which a pruning idea can fail: to train and evaluate a tiny LLaVA.

A scene is one to nine small things, and often a number, in distinct cells of a 3 x 3 grid over a pale background. A
thing covers one to four of the picture's 144 patches, the number about four; many things share their colour or shape,
so that it matters which of them is asked about. Every question knows its *target patches*: those that show what must
be seen to answer it.

    color     What color is the star? What color is the thing at the top left?
    shape     What shape is the red thing? What shape is at the top left?
    place     Where is the red star?
    count     How many things are there? How many red things are there? How many stars are there?
    yesno     Is there a red star? Is there a star? Is there anything at the top left?
    choice    a color or shape question with four options
    relation  What is left of the red star? (right of, above, below: the thing in the next cell)
    reading   What number is written?
    whole     What pattern is the background? Are there more red things or more blue things?

Everything follows from the scene's integer seed: the layout, every pixel (drawing.py) and, unless told otherwise, the
questions, each from its own random stream, so that asking more questions never changes the picture. Training uses
seeds below `UNSEEN`; seeds from `UNSEEN` up are kept for evaluation and never trained on.

    python -m himap_ref.studies scenes --seed 3 --out scene.png
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ...commands.files import check_writable, write_whole
from ...commands.manners import run_command
from ...errors import HimapError

SIZE = 168  # pixels a side
PATCH = 14  # pixels a side of one vision patch: 12 x 12 patches a picture, 4 x 4 a grid cell
GRID = SIZE // PATCH
CELL = SIZE // 3
SMALLEST, LARGEST = 11, 18  # pixels a side of a thing
DIGIT_WIDTH, DIGIT_HEIGHT, DIGIT_PITCH, NUMBER_LENGTH = 10, 14, 14, 3  # the first three in pixels
UNSEEN = 1_000_000_000  # seeds from here on are never trained on; up to TEST they check the training's progress
TEST = UNSEEN + 1_000_000  # seeds from here on are for reported numbers

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLORS = {
    "red": (222, 32, 32),
    "green": (28, 150, 52),
    "blue": (32, 68, 220),
    "yellow": (246, 214, 12),
    "orange": (250, 128, 8),
    "purple": (136, 32, 176),
    "cyan": (12, 196, 214),
    "black": (20, 20, 20),
}
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
BACKGROUNDS = ("plain", "gradient", "noise", "stripes", "grid")
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}  # (rows, columns) to the next cell

LETTERS = ("A", "B", "C", "D")
CHOICE_HINT = "Answer with the option's letter from the given choices directly."

Box = tuple[int, int, int, int]  # (x0, y0, x1, y1) in pixels, x1 and y1 excluded


@lru_cache(1000)
def patches_of(box: Box, least: float = 1 / 6) -> tuple[int, ...]:
    """The patches, row by row, that hold at least this share of the box: of a thing one to four."""
    x0, y0, x1, y1 = box
    found = []
    for row in range(y0 // PATCH, (y1 - 1) // PATCH + 1):
        for column in range(x0 // PATCH, (x1 - 1) // PATCH + 1):
            wide = min(x1, (column + 1) * PATCH) - max(x0, column * PATCH)
            high = min(y1, (row + 1) * PATCH) - max(y0, row * PATCH)
            if wide * high >= least * (x1 - x0) * (y1 - y0):
                found.append(row * GRID + column)
    return tuple(found)


@dataclass(frozen=True)
class Thing:
    """One coloured shape within its bounding box in a cell of the grid, counted row by row."""

    shape: str
    color: str
    cell: int
    box: Box

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def place(self) -> str:
        return PLACES[self.cell]

    @property
    def patches(self) -> tuple[int, ...]:
        return patches_of(self.box)


@dataclass(frozen=True)
class Number:
    """Digits within their bounding box in a cell."""

    digits: str
    cell: int
    box: Box

    @property
    def place(self) -> str:
        return PLACES[self.cell]

    @property
    def patches(self) -> tuple[int, ...]:
        """Those with at least a sixth of a digit."""
        return patches_of(self.box, 1 / 6 / NUMBER_LENGTH)


@dataclass(frozen=True)
class Scene:
    """What a picture shows; the things are in reading order."""

    seed: int
    things: tuple[Thing, ...]
    number: Number | None
    background: str


@dataclass(frozen=True)
class Question:
    """A question with its one right answer, and what must be seen for it.

    options: what A, B, C and D stand for in a multiple choice. targets: the patches that show what must be seen, ()
    where nothing in particular must (the background; what is not there). about: the one thing asked for, if there is
    one.
    """

    kind: str
    text: str
    answer: str
    options: tuple[str, ...] = ()
    targets: tuple[int, ...] = ()
    about: Thing | Number | None = None


# --- Scenes ----------------------------------------------------------------------------------------------------------


def make_scene(seed: int, max_things: int = 9, min_things: int = 1) -> Scene:
    """The scene of this seed, with a number of things uniform in min_things..max_things."""
    if seed < 0:
        raise ValueError("seed must not be negative: random.Random ignores the sign")
    if not 1 <= min_things <= max_things <= len(PLACES):
        raise ValueError(f"need 1 <= min_things <= max_things <= {len(PLACES)}")
    rng = random.Random(seed)
    count = rng.randint(min_things, max_things)
    cells = rng.sample(range(len(PLACES)), len(PLACES))
    shapes = _pick_names(rng, SHAPES, count)
    colors = _pick_names(rng, tuple(COLORS), count)
    things = tuple(_make_thing(rng, *looks) for looks in zip(shapes, colors, sorted(cells[:count]), strict=True))
    number = _make_number(rng, cells[count]) if count < len(PLACES) and rng.random() < 0.6 else None
    return Scene(seed, things, number, rng.choice(BACKGROUNDS))


def _pick_names(rng: random.Random, names: Sequence[str], count: int) -> list[str]:
    """All different half of the time (unambiguous questions), else from a pool of two or three (counts above one)."""
    if count <= len(names) and rng.random() < 0.5:
        return rng.sample(names, count)
    return rng.choices(rng.sample(names, rng.randint(2, 3)), k=count)


def _make_thing(rng: random.Random, shape: str, color: str, cell: int) -> Thing:
    size = rng.randint(SMALLEST, LARGEST)
    return Thing(shape, color, cell, _put(rng, cell, size, size))


def _make_number(rng: random.Random, cell: int) -> Number:
    digits = "".join(rng.choices("0123456789", k=NUMBER_LENGTH))
    width = (NUMBER_LENGTH - 1) * DIGIT_PITCH + DIGIT_WIDTH
    return Number(digits, cell, _put(rng, cell, width, DIGIT_HEIGHT))


def _put(rng: random.Random, cell: int, width: int, height: int) -> Box:
    """A box of this size somewhere in the cell."""
    row, column = divmod(cell, len(COLUMNS))
    x = column * CELL + rng.randint(0, CELL - width)
    y = row * CELL + rng.randint(0, CELL - height)
    return x, y, x + width, y + height


# --- Questions -------------------------------------------------------------------------------------------------------


def make_questions(scene: Scene, count: int, seed: int | None = None, kinds: Sequence[str] = ()) -> list[Question]:
    """Up to `count` different questions, their kinds uniform among those the scene allows.

    Fewer come back only when the scene has no more to ask, as a scene with one thing may for a large count.
    kinds: those to choose from, as often as they are named; default: each once.
    """
    rng = random.Random(f"questions {scene.seed if seed is None else seed}")
    kinds = list(kinds or KINDS)
    questions: dict[tuple[str, str], Question] = {}
    while kinds and len(questions) < count:
        kind = rng.choice(kinds)
        fresh = _ask_afresh(kind, scene, rng, questions)
        if fresh is None:
            kinds = [other for other in kinds if other != kind]
        else:
            questions[_essence(fresh)] = fresh
    return list(questions.values())


def _ask_afresh(kind: str, scene: Scene, rng: random.Random, asked: Container[tuple[str, str]]) -> Question | None:
    """A question of this kind not asked before, or None if the scene does not allow (more of) them."""
    for _ in range(12):
        question = _ASK[kind](scene, rng)
        if question is None:
            return None
        if _essence(question) not in asked:
            return question
    return None


def _essence(question: Question) -> tuple[str, str]:
    """What makes two questions the same: a multiple choice with reshuffled options is not a new one."""
    return question.kind, question.text.split("\n")[0]


def _ask_color(scene: Scene, rng: random.Random) -> Question | None:
    things = _alone(scene, lambda thing: thing.shape)
    if things and rng.random() < 0.5:
        thing = rng.choice(things)
        text = f"What color is the {thing.shape}?"
    else:  # a place holds at most one thing, so this is always unambiguous
        thing = rng.choice(scene.things)
        text = f"What color is the thing at the {thing.place}?"
    return _about(thing, "color", text, thing.color)


def _ask_shape(scene: Scene, rng: random.Random) -> Question | None:
    things = _alone(scene, lambda thing: thing.color)
    if things and rng.random() < 0.5:
        thing = rng.choice(things)
        text = f"What shape is the {thing.color} thing?"
    else:
        thing = rng.choice(scene.things)
        text = f"What shape is at the {thing.place}?"
    return _about(thing, "shape", text, thing.shape)


def _ask_place(scene: Scene, rng: random.Random) -> Question | None:
    by_shape = [(thing.shape, thing) for thing in _alone(scene, lambda thing: thing.shape)]
    by_name = [(thing.name, thing) for thing in _alone(scene, lambda thing: thing.name)]
    if not by_name:  # a unique shape has a unique name too, so there is nothing by shape either
        return None
    name, thing = rng.choice(by_shape if by_shape and rng.random() < 0.5 else by_name)
    return _about(thing, "place", f"Where is the {name}?", thing.place)


def _about(thing: Thing | Number, kind: str, text: str, answer: str) -> Question:
    return Question(kind, text, answer, targets=thing.patches, about=thing)


def _ask_count(scene: Scene, rng: random.Random) -> Question | None:
    """All things, or first the number is picked, the larger the likelier, and then what there are so many of.

    Picked by name, nearly all answers would be 0 or 1: many names are absent or present once, few are present often.
    """
    named = {f"{color} things": [thing for thing in scene.things if thing.color == color] for color in COLORS}
    named |= {_plural(shape): [thing for thing in scene.things if thing.shape == shape] for shape in SHAPES}
    numbers = sorted({len(things) for things in named.values()})
    weights = [number if number > 1 else 0.5 for number in numbers]
    number = rng.choices([*numbers, None], [*weights, len(scene.things)])[0]
    counted = {"things": [*scene.things]} if number is None else named
    what, things = rng.choice([(what, things) for what, things in counted.items() if number in (len(things), None)])
    return Question("count", f"How many {what} are there?", str(len(things)), targets=_patches(things))


def _ask_yesno(scene: Scene, rng: random.Random) -> Question | None:
    """The form is picked before the answer, so that no form of question gives its answer away."""
    about = rng.choice(("name", "shape", "place"))
    yes = rng.random() < 0.5
    present = {getattr(thing, about) for thing in scene.things}
    if about == "name":
        candidates = sorted(present) if yes else _absent_names(scene, hard=rng.random() < 0.5)
    elif about == "shape":
        candidates = [name for name in SHAPES if (name in present) == yes]
    else:  # a number is no thing, but it is something
        present |= {PLACES[scene.number.cell]} if scene.number else set()
        candidates = [name for name in PLACES if (name in present) == yes]
    if not candidates:  # only crowded scenes: every shape is there, or no cell is free
        return None
    name = rng.choice(candidates)
    text = f"Is there anything at the {name}?" if about == "place" else f"Is there {_with_article(name)}?"
    shown = [thing for thing in scene.things if getattr(thing, about) == name]
    targets = scene.number.patches if yes and not shown and scene.number else _patches(shown)
    return Question("yesno", text, "yes" if yes else "no", targets=targets)


def _absent_names(scene: Scene, hard: bool) -> list[str]:
    """Names of no thing here; the hard ones share their colour or shape with a thing, the others share nothing."""
    present = {thing.name for thing in scene.things}
    colors = {thing.color for thing in scene.things}
    shapes = {thing.shape for thing in scene.things}
    pairs = [(color, shape) for color in COLORS for shape in SHAPES]
    return [
        f"{color} {shape}"
        for color, shape in pairs
        if f"{color} {shape}" not in present and (color in colors or shape in shapes) == hard
    ]


def _ask_choice(scene: Scene, rng: random.Random) -> Question | None:
    """A colour or shape question with four options to choose from."""
    plain = rng.choice((_ask_color, _ask_shape))(scene, rng)
    if plain is None:
        return None
    in_scene = {getattr(thing, plain.kind) for thing in scene.things}
    names = COLORS if plain.kind == "color" else SHAPES
    options = _pick_options(rng, names, plain.answer, in_scene if rng.random() < 0.5 else set())
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)]
    text = "\n".join([plain.text, *lines, CHOICE_HINT])
    return Question("choice", text, LETTERS[options.index(plain.answer)], options, plain.targets, plain.about)


def _pick_options(rng: random.Random, names: Iterable[str], answer: str, preferred: set[str]) -> tuple[str, ...]:
    """The answer among three wrong options, in random order; preferred wrong options come before others."""
    wrong = [name for name in names if name != answer]
    rng.shuffle(wrong)
    wrong.sort(key=lambda name: name not in preferred)  # a stable sort keeps the random order within each half
    options = [answer, *wrong[: len(LETTERS) - 1]]
    rng.shuffle(options)
    return tuple(options)


def _ask_relation(scene: Scene, rng: random.Random) -> Question | None:
    """What is in the cell beside a thing whose name no other thing has."""
    at = {divmod(thing.cell, len(COLUMNS)): thing for thing in scene.things}
    pairs = []
    for anchor in _alone(scene, lambda thing: thing.name):
        row, column = divmod(anchor.cell, len(COLUMNS))
        for side, (down, right) in SIDES.items():
            if found := at.get((row + down, column + right)):
                pairs.append((anchor, side, found))
    if not pairs:
        return None
    anchor, side, found = rng.choice(pairs)
    text = f"What is {side} the {anchor.name}?"
    return Question("relation", text, found.name, targets=_patches([anchor, found]), about=found)


def _ask_reading(scene: Scene, rng: random.Random) -> Question | None:
    if scene.number is None:
        return None
    return _about(scene.number, "reading", "What number is written?", scene.number.digits)


def _ask_whole(scene: Scene, rng: random.Random) -> Question | None:
    counts = Counter(thing.color for thing in scene.things)
    pairs = [(a, b) for a in counts for b in counts if counts[a] > counts[b]]
    if pairs and rng.random() < 0.75:
        more, fewer = rng.choice(pairs)
        first, second = rng.sample((more, fewer), 2)
        text = f"Are there more {first} things or more {second} things?"
        compared = [thing for thing in scene.things if thing.color in (more, fewer)]
        return Question("whole", text, more, targets=_patches(compared))
    return Question("whole", "What pattern is the background?", scene.background)


def question_forms() -> dict[str, list[str]]:
    """How all questions of a kind are worded: "Where is the {circle|square}?" stands for two."""
    shape, color, place, side = map(_one_of, (SHAPES, COLORS, PLACES, SIDES))
    a_shape, a_color = (_one_of(map(_with_article, names)) for names in (SHAPES, COLORS))
    counted = _one_of(["things", *map(_plural, SHAPES)])
    colors = [f"What color is the {shape}?", f"What color is the thing at the {place}?"]
    shapes = [f"What shape is the {color} thing?", f"What shape is at the {place}?"]
    return {
        "color": colors,
        "shape": shapes,
        "place": [f"Where is the {color} {shape}?", f"Where is the {shape}?"],
        "count": [f"How many {color} things are there?", f"How many {counted} are there?"],
        "yesno": [f"Is there {a_color} {shape}?", f"Is there {a_shape}?", f"Is there anything at the {place}?"],
        "choice": [
            "\n".join([text, *(f"{letter}. {names}" for letter in LETTERS), CHOICE_HINT])
            for names, texts in ((color, colors), (shape, shapes))
            for text in texts
        ],
        "relation": [f"What is {side} the {color} {shape}?"],
        "reading": ["What number is written?"],
        "whole": [f"Are there more {color} things or more {color} things?", "What pattern is the background?"],
    }


def _one_of(words: Iterable[str]) -> str:
    return "{" + "|".join(words) + "}"


def _alone(scene: Scene, key: Callable[[Thing], str]) -> list[Thing]:
    """The things whose key no other thing of the scene has."""
    counts = Counter(map(key, scene.things))
    return [thing for thing in scene.things if counts[key(thing)] == 1]


def _patches(things: Sequence[Thing]) -> tuple[int, ...]:
    return tuple(sorted({patch for thing in things for patch in thing.patches}))


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


_ASK: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "color": _ask_color,
    "shape": _ask_shape,
    "place": _ask_place,
    "count": _ask_count,
    "yesno": _ask_yesno,
    "choice": _ask_choice,
    "relation": _ask_relation,
    "reading": _ask_reading,
    "whole": _ask_whole,
}
KINDS = tuple(_ASK)


def main() -> None:
    from .drawing import draw  # which needs this module

    parser = argparse.ArgumentParser(description="Draw the scene of a seed and print questions about it.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=12, help="how many questions to ask")
    parser.add_argument("--out", type=Path, default="scene.png", help="where to write the picture")
    args = parser.parse_args()
    if args.seed < 0:
        raise HimapError(f"--seed {args.seed}: must be 0 or more")
    check_writable(args.out)
    scene = make_scene(args.seed)
    write_whole(args.out, draw(scene).save)
    for question in make_questions(scene, args.count):
        print(f"[{question.kind}] {question.text} -> {question.answer}")


if __name__ == "__main__":
    run_command(main)
