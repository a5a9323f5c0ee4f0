"""Drawn scenes of coloured shapes, and questions about them, to train and evaluate a tiny LLaVA.

A scene is one to five shapes in distinct cells of a 3x3 grid over a pale background. Everything follows from the
scene's integer seed: the layout, every pixel of the picture and (unless told otherwise) the questions, each from its
own random stream, so that asking more questions never changes the picture. Training uses seeds below `UNSEEN`;
seeds from `UNSEEN` up are kept for evaluation and never trained on.

    python -m himap_ref.studies.scenes --seed 3 --out scene.png
"""

from __future__ import annotations

import argparse
import math
import random
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from ..commands.files import check_writable, write_whole
from ..commands.manners import run_command
from ..errors import HimapError

SIZE = 126  # pixels a side
PATCH = 14  # pixels a side of one vision patch: 9 x 9 patches a picture, 3 x 3 a grid cell
CELL = SIZE // 3
SMALLEST, LARGEST = 24, 36  # pixels a side of a thing
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
COLOR_JITTER = 8  # RGB units either way: too little to turn one colour into another
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
BACKGROUNDS = ("plain", "gradient", "noise", "stripes", "grid")

LETTERS = ("A", "B", "C", "D")
CHOICE_HINT = "Answer with the option's letter from the given choices directly."

Box = tuple[int, int, int, int]
Color = tuple[int, int, int]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Thing:
    """One coloured shape; `box` is its bounding box (x0, y0, x1, y1) in pixels, x1 and y1 excluded."""

    shape: str
    color: str
    row: str
    column: str
    box: Box

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def place(self) -> str:
        return f"{self.row} {self.column}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows; the things are in reading order."""

    seed: int
    things: tuple[Thing, ...]
    background: str


@dataclass(frozen=True)
class Question:
    """A question with its one right answer; `options` holds what A, B, C and D stand for in a multiple choice."""

    kind: str
    text: str
    answer: str
    options: tuple[str, ...] = ()


# --- Scenes ----------------------------------------------------------------------------------------------------------


def make_scene(seed: int, max_things: int = 5, min_things: int = 1) -> Scene:
    """The scene of this seed, with a number of things uniform in min_things..max_things."""
    if seed < 0:
        raise ValueError("seed must not be negative: random.Random ignores the sign")
    if not 1 <= min_things <= max_things <= len(PLACES):
        raise ValueError(f"need 1 <= min_things <= max_things <= {len(PLACES)}")
    rng = random.Random(seed)
    count = rng.randint(min_things, max_things)
    cells = sorted(rng.sample(range(len(PLACES)), count))
    shapes = _pick_names(rng, SHAPES, count)
    colors = _pick_names(rng, tuple(COLORS), count)
    things = tuple(_make_thing(rng, *looks) for looks in zip(shapes, colors, cells, strict=True))
    return Scene(seed, things, rng.choice(BACKGROUNDS))


def _pick_names(rng: random.Random, names: Sequence[str], count: int) -> list[str]:
    """All different half of the time (unambiguous questions), else from a pool of two or three (counts above one)."""
    if count <= len(names) and rng.random() < 0.5:
        return rng.sample(names, count)
    return rng.choices(rng.sample(names, rng.randint(2, 3)), k=count)


def _make_thing(rng: random.Random, shape: str, color: str, cell: int) -> Thing:
    row, column = divmod(cell, len(COLUMNS))
    size = rng.randint(SMALLEST, LARGEST)
    x = column * CELL + rng.randint(0, CELL - size)
    y = row * CELL + rng.randint(0, CELL - size)
    return Thing(shape, color, ROWS[row], COLUMNS[column], (x, y, x + size, y + size))


# --- Pictures --------------------------------------------------------------------------------------------------------


def draw(scene: Scene) -> Image.Image:
    """The scene as a SIZE x SIZE RGB picture."""
    rng = random.Random(f"picture {scene.seed}")
    picture = _draw_background(rng, scene.background)
    for thing in scene.things:
        x0, _, x1, _ = thing.box
        picture.paste(_jitter(rng, COLORS[thing.color]), thing.box, _mask(thing.shape, x1 - x0))
    return picture


def _jitter(rng: random.Random, color: Color) -> Color:
    red, green, blue = (min(255, max(0, c + rng.randint(-COLOR_JITTER, COLOR_JITTER))) for c in color)
    return red, green, blue


def _draw_background(rng: random.Random, background: str) -> Image.Image:
    """Two pale tones, blended by a pattern; always paler than any thing, so that no shape drowns in it."""
    light, dark = _pale(rng, 236, 252), _pale(rng, 212, 230)
    if background == "plain":
        return Image.new("RGB", (SIZE, SIZE), rng.choice((light, dark)))
    if background == "gradient":
        pattern = Image.linear_gradient("L").resize((SIZE, SIZE))
    elif background == "noise":
        pattern = Image.frombytes("L", (SIZE, SIZE), rng.randbytes(SIZE * SIZE))
    else:
        pattern = _lines(rng, crossed=background == "grid")
    return ImageOps.colorize(pattern, light, dark)


def _pale(rng: random.Random, low: int, high: int) -> Color:
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def _lines(rng: random.Random, crossed: bool) -> Image.Image:
    """Thin crossed lines (a grid), or broad upright or level stripes."""
    pattern = Image.new("L", (SIZE, SIZE), 0)
    pen = ImageDraw.Draw(pattern)
    step = rng.randint(10, 24)
    width = 1 if crossed else step // 2
    upright = rng.random() < 0.5
    for start in range(rng.randrange(step) - step, SIZE, step):
        if crossed or upright:
            pen.rectangle((start, 0, start + width - 1, SIZE), fill=255)
        if crossed or not upright:
            pen.rectangle((0, start, SIZE, start + width - 1), fill=255)
    return pattern


@cache  # a pure function of 6 shapes x 13 sizes: a few hundred kilobytes at most
def _mask(shape: str, size: int) -> Image.Image:
    """The shape's coverage, drawn four times too large and averaged down for smooth edges."""
    large = Image.new("L", (4 * size, 4 * size), 0)
    last = 4 * size - 1
    ImageDraw.Draw(large).polygon([(x * last, y * last) for x, y in _outline(shape)], fill=255)
    return large.reduce(4)


def _outline(shape: str) -> Points:
    """The shape's corners, stretched to touch all four sides of the unit square (y points down)."""
    turns = [2 * math.pi * i / 60 for i in range(60)]
    if shape == "circle":
        points = [(math.cos(t), math.sin(t)) for t in turns]
    elif shape == "square":
        points = [(0, 0), (1, 0), (1, 1), (0, 1)]
    elif shape == "triangle":
        points = [(0.5, 0), (1, 1), (0, 1)]
    elif shape == "star":  # outer and inner corners in turn, the first one up
        radii = [1.0 if i % 2 == 0 else 0.42 for i in range(10)]
        points = [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii)]
    elif shape == "cross":
        a, b = 1 / 3, 2 / 3
        points = [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
    elif shape == "heart":
        points = [(16 * math.sin(t) ** 3, _heart_height(t)) for t in turns]
    else:
        raise ValueError(f"no such shape: {shape}")
    return _stretch(points)


def _heart_height(t: float) -> float:
    return -13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t)


def _stretch(points: Points) -> Points:
    xs, ys = zip(*points, strict=True)
    left, top = min(xs), min(ys)
    width, height = max(xs) - left, max(ys) - top
    return [((x - left) / width, (y - top) / height) for x, y in points]


# --- Questions -------------------------------------------------------------------------------------------------------


def make_questions(scene: Scene, count: int, seed: int | None = None) -> list[Question]:
    """Up to `count` different questions, their kinds uniform among those the scene allows.

    Fewer come back only when the scene has no more to ask, as a scene with one thing may for a large count.
    """
    rng = random.Random(f"questions {scene.seed if seed is None else seed}")
    kinds = list(KINDS)
    questions: dict[tuple[str, str], Question] = {}
    while kinds and len(questions) < count:
        kind = rng.choice(kinds)
        fresh = _ask_afresh(kind, scene, rng, questions)
        if fresh is None:
            kinds.remove(kind)
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
    if not things:
        return None
    thing = rng.choice(things)
    return Question("color", f"What color is the {thing.shape}?", thing.color)


def _ask_shape(scene: Scene, rng: random.Random) -> Question | None:
    things = _alone(scene, lambda thing: thing.color)
    if things and rng.random() < 0.5:
        thing = rng.choice(things)
        return Question("shape", f"What shape is the {thing.color} object?", thing.shape)
    thing = rng.choice(scene.things)  # a place holds at most one thing, so this is always unambiguous
    return Question("shape", f"What shape is at the {thing.place}?", thing.shape)


def _ask_place(scene: Scene, rng: random.Random) -> Question | None:
    by_shape = [(thing.shape, thing) for thing in _alone(scene, lambda thing: thing.shape)]
    by_name = [(thing.name, thing) for thing in _alone(scene, lambda thing: thing.name)]
    if not by_name:  # a unique shape has a unique name too, so there is nothing by shape either
        return None
    name, thing = rng.choice(by_shape if by_shape and rng.random() < 0.5 else by_name)
    return Question("place", f"Where is the {name}?", thing.place)


def _ask_count(scene: Scene, rng: random.Random) -> Question | None:
    about = rng.choice(("objects", "color", "shape"))
    if about == "objects":
        return Question("count", "How many objects are there?", str(len(scene.things)))
    if about == "color":
        name, number = _pick_counted(rng, COLORS, [thing.color for thing in scene.things])
        return Question("count", f"How many {name} objects are there?", str(number))
    name, number = _pick_counted(rng, SHAPES, [thing.shape for thing in scene.things])
    return Question("count", f"How many {_plural(name)} are there?", str(number))


def _pick_counted(rng: random.Random, names: Iterable[str], present: list[str]) -> tuple[str, int]:
    """A name and how often it is present: seldom zero times, and otherwise the more often the likelier.

    Left to chance, nearly all answers would be one: many names are present once, few are present often.
    """
    counts = Counter(present)
    absent = [name for name in names if name not in counts]
    if absent and rng.random() < 0.2:
        return rng.choice(absent), 0
    numbers = sorted(set(counts.values()))
    number = rng.choices(numbers, weights=[n * n for n in numbers])[0]
    return rng.choice([name for name in counts if counts[name] == number]), number


def _ask_yesno(scene: Scene, rng: random.Random) -> Question | None:
    """The form is picked before the answer, so that no form of question gives its answer away."""
    about = rng.choice(("name", "shape", "place"))
    yes = rng.random() < 0.5
    present = {getattr(thing, about) for thing in scene.things}
    if about == "name":
        candidates = sorted(present) if yes else _absent_names(scene, hard=rng.random() < 0.5)
    else:
        everything = SHAPES if about == "shape" else PLACES
        candidates = [name for name in everything if (name in present) == yes]
    if not candidates:  # only crowded scenes: every shape is there, or no cell is free
        return None
    name = rng.choice(candidates)
    text = f"Is there anything at the {name}?" if about == "place" else f"Is there {_with_article(name)}?"
    return Question("yesno", text, "yes" if yes else "no")


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
    asks = [_ask_color, _ask_shape]
    rng.shuffle(asks)
    plain = asks[0](scene, rng) or asks[1](scene, rng)
    if plain is None:
        return None
    in_scene = {getattr(thing, plain.kind) for thing in scene.things}
    names = COLORS if plain.kind == "color" else SHAPES
    options = _pick_options(rng, names, plain.answer, in_scene if rng.random() < 0.5 else set())
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)]
    text = "\n".join([plain.text, *lines, CHOICE_HINT])
    return Question("choice", text, LETTERS[options.index(plain.answer)], options)


def _pick_options(rng: random.Random, names: Iterable[str], answer: str, preferred: set[str]) -> tuple[str, ...]:
    """The answer among three wrong options, in random order; preferred wrong options come before others."""
    wrong = [name for name in names if name != answer]
    rng.shuffle(wrong)
    wrong.sort(key=lambda name: name not in preferred)  # a stable sort keeps the random order within each half
    options = [answer, *wrong[: len(LETTERS) - 1]]
    rng.shuffle(options)
    return tuple(options)


def _alone(scene: Scene, key: Callable[[Thing], str]) -> list[Thing]:
    """The things whose key no other thing of the scene has."""
    counts = Counter(map(key, scene.things))
    return [thing for thing in scene.things if counts[key(thing)] == 1]


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
}
KINDS = tuple(_ASK)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the scene of a seed and print questions about it.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=8, help="how many questions to ask")
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
