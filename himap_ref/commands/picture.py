"""Pictures drawn with the patches that are left after each stage."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import takewhile

from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps

from ..assistant import Answer, Llava
from ..errors import HimapError
from ..methods.reducers import ImageReducer, check_grid
from .report import amount

PANEL, GAP = 432, 12  # pixels: a panel's side, about (36 to each of 12 x 12 patches, 18 of 24 x 24); between panels
INK, DIM, EDGE = "#1b1b1f", "#63636e", "#00c8ff"
INFERNO = ("#000004", "#420a68", "#932667", "#dd513a", "#fca50a", "#fcffa4")  # matplotlib's, in steps of a fifth
DRAWN = "pictures and pages of what was kept", "--json and --trace tell it"
FONTS = ("DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf", "NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc")


# ---------------------------------------------------------------- which image tokens are left


@dataclass(frozen=True)
class Choice:
    """Image tokens dropped on entry to a layer: by a stage or, if that is 0, before the decoder."""

    layer: int
    score: str  # "none": nothing was ranked, the whole picture goes
    scores: dict[int, float]  # of all tokens that were there
    kept: list[int]

    @property
    def is_ranked(self) -> bool:
        return self.score != "none"


@dataclass(frozen=True)
class ImageTokens:
    """The image tokens of an answer by their places in the picture, side x side squares row by row; class token: -1."""

    frame: Image.Image  # what the encoder looks at
    side: int
    all: list[int]
    choices: list[Choice]

    def left(self, layer: int) -> list[int]:
        """Those that enter a layer."""
        return [self.all, *(choice.kept for choice in self.choices if choice.layer <= layer)][-1]


def look(model: Llava, image: Image.Image) -> Image.Image:
    """What the encoder looks at: no pixels beyond the last whole patch."""
    vision = model.config.vision_config
    seen = vision.image_size // vision.patch_size * vision.patch_size
    return model.image_processor.frame(image).crop((0, 0, seen, seen))


def follow(model: Llava, image: Image.Image, answer: Answer, reducer: ImageReducer | None = None) -> ImageTokens:
    """What became of the picture's tokens; the reducer is asked once more what it chose. Raises HimapError."""
    if answer.image_span is None:
        raise HimapError("the answer is to text only: there are no patches to draw")
    check_grid(model.config, *DRAWN)
    before = reducer.chosen(model, model.preprocess(image)) if reducer else None
    N = reducer.num_image_tokens(model.config) if reducer and not before else model.config.num_image_tokens
    side = math.isqrt(N)
    names = list(range(side**2 - N, side**2))  # place of each token, as the decoder counts them
    tokens = ImageTokens(look(model, image), side, names, choices := list[Choice]())
    for stage in [*([before] if before else []), *answer.trace.stages]:
        scores = zip((names[i] for i in stage.candidates.tolist()), stage.scores.tolist(), strict=True)
        choices.append(Choice(stage.layer, stage.score, dict(scores), [names[i] for i in stage.kept.tolist()]))
        names = choices[0].kept if before else names  # behind a reducer the decoder knows only what that has kept
    return tokens


# ---------------------------------------------------------------- one panel


def enlarge(frame: Image.Image, side: int, panel: int = PANEL) -> Image.Image:
    """To about `panel` pixels a side, a whole number of them to each square of the grid."""
    size = side * max(1, round(panel / side))
    return frame.resize((size, size), Image.Resampling.LANCZOS)


def squares(side: int, values: Mapping[int, Sequence[int]], other: Sequence[int], size: tuple[int, int]) -> Image.Image:
    """Squares of one colour (red, green, blue) or shade (one number) each; `other` where there is no value."""
    data = b"".join(bytes(values.get(place, other)) for place in range(side**2))
    return Image.frombytes("L" if len(other) == 1 else "RGB", (side, side), data).resize(size, Image.Resampling.NEAREST)


def kept_panel(frame: Image.Image, side: int, kept: Collection[int]) -> Image.Image:
    """The picture under its grid; squares that are not kept are darkened, so that they can still be made out."""
    mask = squares(side, dict.fromkeys(kept, (255,)), (0,), frame.size)
    panel, step = Image.composite(frame, darkened(frame), mask), frame.width // side
    grid = panel.copy()
    for at in (*range(step - 1, panel.width - 1, step), *range(step, panel.width, step)):
        for line in ((at, 0, at, panel.height), (0, at, panel.width, at)):
            ImageDraw.Draw(grid).line(line, "white" if at % step else "black")  # one of them shows on any colour
    return outline(Image.blend(panel, grid, 0.3), side, kept)


def heat_panel(frame: Image.Image, side: int, scores: Mapping[int, float], kept: Collection[int] = ()) -> Image.Image:
    """Scores as colours, lowest to highest by the square root; through them the picture shines in grey.

    Kept squares are framed; those without a score are the darkened picture.
    """
    colors = heat_colors(scores)
    grey = ImageOps.grayscale(frame).point(lambda level: 150 + level * 105 // 255).convert("RGB")
    heat = ImageChops.multiply(squares(side, colors, (0, 0, 0), frame.size), grey)
    mask = squares(side, dict.fromkeys(scores, (255,)), (0,), frame.size)
    return outline(Image.composite(heat, darkened(frame), mask), side, kept)


def darkened(frame: Image.Image) -> Image.Image:
    return Image.blend(frame, Image.new("RGB", frame.size, "#0b0b14"), 0.65)


def heat_colors(scores: Mapping[int, float]) -> dict[int, tuple[int, ...]]:
    """Of each token; the class token has no square, so the scale is without it."""
    shown = [score for place, score in scores.items() if place >= 0] or [0.0]
    low, width = min(shown), (max(shown) - min(shown)) or 1
    return {place: heat_color(min(1, max(0, (score - low) / width)) ** 0.5) for place, score in scores.items()}


def heat_color(share: float) -> tuple[int, ...]:
    """A share in [0, 1] -> red, green, blue."""
    place = share * (len(INFERNO) - 1)
    i = min(int(place), len(INFERNO) - 2)
    low, high = (bytes.fromhex(color[1:]) for color in INFERNO[i : i + 2])
    return tuple(round(a + (b - a) * (place - i)) for a, b in zip(low, high, strict=True))


def outline(panel: Image.Image, side: int, kept: Collection[int]) -> Image.Image:
    """A line between kept squares and dropped ones."""
    pen, step = ImageDraw.Draw(panel), panel.width // side
    wide = max(2, step // 12)
    for y in range(side):
        for x in range(side):
            here, left, right, top, bottom = y * side + x in kept, x * step, (x + 1) * step, y * step, (y + 1) * step
            if x + 1 < side and here != (y * side + x + 1 in kept):
                pen.line((right, top, right, bottom), EDGE, wide)
            if y + 1 < side and here != ((y + 1) * side + x in kept):
                pen.line((left, bottom, right, bottom), EDGE, wide)
    return panel


# ---------------------------------------------------------------- sheets of panels

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@cache
def fonts(size: int) -> list[Font]:
    """Pillow's own, which has few letters beyond ASCII, and those of `FONTS` that this machine has."""
    found: list[Font] = [ImageFont.load_default(size)]
    for name in FONTS:
        with suppress(OSError):
            found.append(ImageFont.truetype(name, size))
    return found


def font_for(text: str, size: int) -> Font:
    """The first that has all letters; if none has, the last."""
    return next((font for font in fonts(size) if has_letters(font, text)), fonts(size)[-1])


def has_letters(font: Font, text: str) -> bool:
    blank = bytes(font.getmask("\uffff"))  # what a font shows for a letter that it lacks
    return all(letter.isspace() or bytes(font.getmask(letter)) != blank for letter in set(text))


def wrap(text: str, font: Font, width: int, limit: int) -> list[str]:
    """At most `limit` lines, broken between words where that is possible; three dots for what is left out."""
    lines: list[str] = []
    for line in text[:4000].split("\n"):
        while line and len(lines) <= limit:
            widths = (font.getlength(line[:n]) for n in range(2, len(line) + 1))
            fits = 1 + sum(1 for _ in takewhile(lambda wide: wide <= width, widths))
            space = line.rfind(" ", 1, fits + 1) if fits < len(line) else -1
            cut = space if space > 0 else fits
            lines, line = [*lines, line[:cut]], line[cut:].lstrip()
    return lines if len(lines) <= limit else [*lines[: limit - 1], lines[limit - 1][:-3].rstrip() + "..."]


def sheet(
    rows: Sequence[Sequence[tuple[str, Image.Image]]], size: int, title: Sequence[tuple[str, str]] = ()
) -> Image.Image:
    """Panels with a caption above each, and above all (text, colour) in larger type. size: of the captions' type."""
    side, high = max(panel.width for row in rows for _, panel in row), size * 7 // 4
    width = max(map(len, rows)) * (side + GAP) + GAP
    lines = [(line, font, color) for text, color in title for font in [font_for(text, size * 4 // 3)]
             for line in wrap(text, font, width - 2 * GAP, 4)]  # fmt: skip
    top = GAP // 2 + len(lines) * high
    page = Image.new("RGB", (width, top + len(rows) * (high + side + GAP // 2) + GAP // 2), "white")
    pen = ImageDraw.Draw(page)
    for i, (line, font, color) in enumerate(lines):
        pen.text((GAP, GAP // 2 + (i + 0.5) * high), line, color, font, anchor="lm")
    for y, row in enumerate(rows):
        for x, (caption, panel) in enumerate(row):
            left, upper, font = GAP + x * (side + GAP), top + y * (high + side + GAP // 2), font_for(caption, size)
            pen.text((left, upper + high // 2), "".join(wrap(caption, font, side, 1)), INK, font, anchor="lm")
            page.paste(panel, (left, upper + high))
    return page


def draw_kept(
    model: Llava, image: Image.Image, question: str, answer: Answer, reducer: ImageReducer | None = None
) -> Image.Image:
    """Question and answer; the picture and what is left of it, choice by choice; below that the scores, if any."""
    tokens = follow(model, image, answer, reducer)
    side, frame, N = tokens.side, enlarge(tokens.frame, tokens.side), len(tokens.all)
    means = ", each a mean of patches" if side**2 < model.config.vision_config.num_patches else ""
    left = [(f"{N} image tokens{means}", kept_panel(frame, side, range(side**2)))]
    scores = [("", legend(frame.width, model, tokens, answer))]
    for choice in tokens.choices:
        where = f"from layer {choice.layer} on" if choice.layer else "before the decoder"
        caption = f"{where}: {len(choice.kept)} of {len(choice.scores)} tokens"
        left.append((caption, kept_panel(frame, side, choice.kept)))
        if choice.is_ranked:
            where = f", in layer {choice.layer - 1}" if choice.layer else ""
            scores.append((choice.score + where, heat_panel(frame, side, choice.scores, choice.kept)))
        else:
            scores.append(("dropped without ranking", Image.new("RGB", frame.size, "white")))
    rows = [row[i : i + 4] for i in range(0, len(left), 4) for row in (left, scores)]
    if not any(choice.is_ranked for choice in tokens.choices):
        rows = [[*left, scores[0]]]
    return sheet(rows, 20, [(question, DIM), (answer.text or "(an empty answer)", INK)])


def legend(side: int, model: Llava, tokens: ImageTokens, answer: Answer) -> Image.Image:
    """Image tokens by layer, FLOPs, what the colours mean."""
    starts = sorted({0, *(choice.layer for choice in tokens.choices)})
    ends = [*starts[1:], model.config.text_config.num_hidden_layers]
    spans = [(a, f"layer {a}" if b == a + 1 else f"layers {a} to {b - 1}") for a, b in zip(starts, ends, strict=True)]
    lines = [f"{span}: {len(tokens.left(a))} tokens" for a, span in spans]
    flops = answer.flops
    lines += ["", f"{amount(flops.total)}FLOPs, {flops.ratio:.1%} of vanilla", f"(decoder {flops.decoder_ratio:.1%})"]
    page = Image.new("RGB", (side, side), "white")
    size = min(20, side * 2 // (3 * len(lines) + 9))  # of the type: many stages are many lines
    pen, font, step = ImageDraw.Draw(page), ImageFont.load_default(size), size * 3 // 2
    if any(choice.is_ranked for choice in tokens.choices):
        lines += ["", "lowest to highest score, by its square root"]
        for x in range(side // 2):
            pen.line((x, len(lines) * step + 4, x, len(lines) * step + size), heat_color(2 * x / side))
    for i, line in enumerate(lines):
        pen.text((0, i * step), line, INK, font)
    return page
