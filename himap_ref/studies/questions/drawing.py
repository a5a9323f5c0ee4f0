"""Pixels of a scene: shapes and digits on a pale background."""

from __future__ import annotations

import math
import random
from functools import cache

from PIL import Image, ImageDraw, ImageOps

from .scenes import COLORS, DIGIT_HEIGHT, DIGIT_PITCH, DIGIT_WIDTH, SIZE, Scene

COLOR_JITTER = 8  # RGB units either way: too little to turn one colour into another
INK = (70, 60, 50)  # of numbers: no colour that a thing has

DIGITS = (  # 5 x 7, a row a number in base 32, the highest bit to the left
    (14, 17, 19, 21, 25, 17, 14), (4, 12, 4, 4, 4, 4, 14), (14, 17, 1, 2, 4, 8, 31), (31, 2, 4, 2, 1, 17, 14),
    (2, 6, 10, 18, 31, 2, 2), (31, 16, 30, 1, 1, 17, 14), (6, 8, 16, 30, 17, 17, 14), (31, 1, 2, 4, 8, 8, 8),
    (14, 17, 17, 14, 17, 17, 14), (14, 17, 17, 15, 1, 2, 12),
)  # fmt: skip

Color = tuple[int, int, int]
Points = list[tuple[float, float]]


def draw(scene: Scene) -> Image.Image:
    """The scene as a SIZE x SIZE RGB picture."""
    rng = random.Random(f"picture {scene.seed}")
    picture = _draw_background(rng, scene.background)
    for thing in scene.things:
        x0, _, x1, _ = thing.box
        picture.paste(_jitter(rng, COLORS[thing.color]), thing.box, _mask(thing.shape, x1 - x0))
    if scene.number:
        left, top, _, _ = scene.number.box
        for i, digit in enumerate(scene.number.digits):
            picture.paste(INK, (left + i * DIGIT_PITCH, top), _digit(int(digit)))
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


@cache
def _digit(digit: int) -> Image.Image:
    bits = "".join(f"{row:05b}" for row in DIGITS[digit])
    small = Image.frombytes("L", (5, 7), bytes(255 * int(bit) for bit in bits))
    return small.resize((DIGIT_WIDTH, DIGIT_HEIGHT), Image.Resampling.NEAREST)


@cache  # of 6 shapes in 8 sizes: a few kilobytes
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
