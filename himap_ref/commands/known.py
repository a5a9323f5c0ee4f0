"""What a small model was trained on, as its himap.json says, and the line for whoever asks it anything else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from reprlib import repr as short

import torch
from PIL import Image

from ..assistant import Llava
from ..assistant.llava import listed
from ..errors import HimapError

PALE = 204  # a drawn background's darkest level, less what JPEG takes away; pure white is the paper of other pictures
JITTER = 28  # of a palette's colour, per channel: drawn 8 either way, then JPEG's
OUTLINES = 0.08  # pixels neither pale nor of the palette: the things' edges, more of them after JPEG


def note_on(model: Llava, image: Image.Image | Sequence[Image.Image] | None, question: str) -> str | None:
    """What to tell who asks: nothing if the model was trained on the like, or does not say what it was trained on.

    himap.json says it: "note" for people, "palette" and "questions" for `looks_drawn` and `is_known`. A model with a
    palette has always seen a picture. Raises HimapError for a faulty palette.
    """
    settings, strange, pictures = model.settings, list[str](), listed(image)
    if "note" not in settings:
        return None
    if "palette" in settings:
        vision = model.config.vision_config
        grid = vision.image_size // vision.patch_size
        if len(pictures) != 1:
            strange.append("several pictures" if pictures else "no picture")
        elif not looks_drawn(pictures[0], settings["palette"], grid, vision.patch_size):
            strange.append("a strange picture")
    if "questions" in settings and not is_known(question, settings["questions"]):
        strange.append("a strange question")
    return f"{' and '.join(strange)}: {settings['note']}" if strange else None


def is_known(question: str, forms: str) -> bool:
    """Whether a form words it so, blanks around it aside. A capital in place of a small letter is another token.

    forms: with blank lines between them; "Where is the {circle|star}?" stands for two questions.
    """
    return any(re.fullmatch(_pattern(form), question.strip()) for form in forms.split("\n\n"))


def _pattern(form: str) -> str:
    """Nothing of the form is a pattern but its braces: it comes from a file."""
    parts = re.split(r"\{(.*?)\}", form)  # every second one stood in braces
    parts[::2] = map(re.escape, parts[::2])
    parts[1::2] = [f"(?:{'|'.join(map(re.escape, words.split('|')))})" for words in parts[1::2]]
    return "".join(parts)


def looks_drawn(image: Image.Image, palette: str, grid: int, patch: int) -> bool:
    """Whether it is a square, pale but for things of the palette ("#de2020 #2050e0 ...") in up to a third of its
    grid x grid patches: no photograph, screen, page of text or empty picture."""
    if not re.fullmatch(r"#[0-9a-fA-F]{6}(\s+#[0-9a-fA-F]{6})*", palette):
        raise HimapError(f"palette {short(palette)}: expected colours such as #de2020, with spaces between them")
    colors = torch.tensor([tuple(bytes.fromhex(color[1:])) for color in palette.split()])
    raw = image.resize((grid * patch, grid * patch), Image.Resampling.NEAREST).tobytes()
    pixels = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, 1, 3).int()
    thing = ((pixels - colors).abs().amax(-1) < JITTER).any(-1)
    lowest = pixels.amin(-1).flatten()
    pale = (lowest >= PALE) & (lowest < 255)
    shown = int(thing.view(grid, patch, grid, patch).any(3).any(1).sum())  # patches with a thing
    is_like_it = pale.float().mean() >= 0.85 and (pale | thing).float().mean() >= 1 - OUTLINES
    return image.width == image.height and 0 < shown <= grid * grid / 3 and bool(is_like_it)
