"""Pictures as a command sees them: drawn with the patches that each stage kept, and told apart from photographs."""

from __future__ import annotations

import re
from reprlib import repr as short

from PIL import Image, ImageDraw

from ..assistant import Llava
from ..errors import HimapError
from ..flops import Trace

PANEL = 336  # pixels a side of each panel of `draw_kept`


def draw_kept(model: Llava, image: Image.Image, trace: Trace) -> Image.Image:
    """Panels side by side: the picture as the model sees it, then after each stage, dropped patches faded out."""
    config, frame = model.config, model.image_processor.frame(image).resize((PANEL, PANEL), Image.Resampling.NEAREST)
    grid = config.vision_config.image_size // config.vision_config.patch_size
    first = config.num_image_tokens - grid * grid  # 1 if the class token is image token 0
    panels = [frame]
    for stage in trace.stages:
        mask = Image.new("1", (grid, grid), 1)
        for token in stage.kept.tolist():
            if token >= first:
                mask.putpixel(((token - first) % grid, (token - first) // grid), 0)
        panel = frame.copy()
        panel.paste(Image.blend(frame, Image.new("RGB", frame.size, "gray"), 0.85), mask=mask.resize(frame.size))
        panels.append(panel)
    sheet = Image.new("RGB", (len(panels) * (PANEL + 8) - 8, PANEL + 18), "white")
    pen = ImageDraw.Draw(sheet)
    captions = ["all image tokens", *(f"layer {s.layer}: {len(s.kept)} by {s.score}" for s in trace.stages)]
    for i, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        sheet.paste(panel, (i * (PANEL + 8), 18))
        pen.text((i * (PANEL + 8) + 2, 3), caption, fill="black")
    return sheet


def looks_drawn(image: Image.Image, palette: str) -> bool:
    """Whether nearly all pixels are pale or of the palette ("#de2020 #2050e0 ..."), as in no photograph."""
    if not re.fullmatch(r"#[0-9a-fA-F]{6}(\s+#[0-9a-fA-F]{6})*", palette):
        raise HimapError(f"palette {short(palette)}: expected colours such as #de2020, with spaces between them")
    colors = [tuple(bytes.fromhex(color[1:])) for color in palette.split()]
    raw = image.resize((64, 64), Image.Resampling.NEAREST).tobytes()
    pixels = list(zip(raw[0::3], raw[1::3], raw[2::3], strict=True))
    return sum(_is_drawn(pixel, colors) for pixel in pixels) > 0.9 * len(pixels)


def _is_drawn(pixel: tuple[int, int, int], colors: list[tuple[int, ...]]) -> bool:
    return min(pixel) > 190 or any(max(abs(a - b) for a, b in zip(pixel, c, strict=True)) < 24 for c in colors)
