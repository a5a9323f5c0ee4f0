"""A picture as people have it (a file, its bytes, an array) becomes upright RGB. Faulty metadata costs no picture."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any
from zlib import crc32

from PIL import Image, UnidentifiedImageError
from PIL.Image import Transpose

from ..errors import HimapError
from ..image import MAX_PIXELS, read_bytes

Picture = Any  # what `load_image` takes
# Not all that Pillow knows: for EPS it would start Ghostscript, and rarely used readers are rarely checked.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
TURNS = {  # EXIF's orientation: what makes it upright
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}  # fmt: skip
TOLD = {269, 270, 271, 272, 282, 283, 285, 296, 305, 306, 315, 316}  # TIFF's: names, dates, dots per inch


def load_image(source: Picture) -> Image.Image:
    """A path, the bytes of a file or an open one, a PIL picture or a uint8 array (H, W, 3): upright (EXIF) and RGB.

    First frame of an animation. Raises HimapError that names the file, or the type.
    """
    name = source if isinstance(source, str | Path) else f"a picture of type {type(source).__name__}"
    if re.match(r"(https?|s3|gs|ftp|file|hf):/|data:", str(name), re.IGNORECASE):
        raise HimapError(f"{str(name)[:200]}: an address, not a file: download it first")
    try:
        image = to_rgb(_upright(_loaded(source) if isinstance(source, Image.Image) else _open(source)))
        image.info = {}  # what says that it lies on its side: whoever loads it once more would turn it once more
        return image
    except Exception as error:  # Pillow's readers let anything through: struct.error, IndexError, EOFError, ...
        why = f"expected {', '.join(FORMATS)}" if isinstance(error, UnidentifiedImageError) else str(error)
        raise HimapError(f"{name}: cannot be read as a picture ({why or type(error).__name__})") from None


def _open(source: Picture) -> Image.Image:
    if array := getattr(source, "__array_interface__", None):
        shape = array["shape"]
        if array["typestr"] != "|u1" or len(shape) not in (2, 3) or shape[2:] not in ((), (3,), (4,)):
            raise ValueError(f"{array['typestr']} {shape}: expected uint8 (H, W), (H, W, 3) or (H, W, 4)")
        return _loaded(Image.fromarray(source))
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    elif hasattr(source, "read"):
        if source.seekable():
            source.seek(0)
        data = source.read()
    elif isinstance(source, str | Path):
        data = read_bytes(Path(source))
    else:
        raise TypeError("expected a path, bytes, an open file, a PIL picture or a uint8 array")
    Image.init()  # fills Image.OPEN
    formats = [name for name in FORMATS if name in Image.OPEN]  # an older Pillow has no AVIF
    failed = []
    for cut in (lambda: data, lambda: without_metadata(data, True), lambda: without_metadata(data, False)):
        try:  # bytes at hand: no part of a file claims more memory than the file has
            return _loaded(Image.open(io.BytesIO(cut()), formats=formats))
        except Exception as error:
            failed.append(error)
    raise failed[0]


def _loaded(image: Image.Image) -> Image.Image:
    """With its pixels read, which a huge one must not begin with."""
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels: expected 1 to {MAX_PIXELS}")
    image.load()
    return image


def _upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says, if it can be read. (Pillow's `exif_transpose` fails on any fault, in other tags, too.)"""
    try:
        turn = image.getexif().get(0x0112)
    except Exception:
        turn = None
    return image.transpose(TURNS[turn]) if turn in TURNS else image


def without_metadata(data: bytes, upright: bool) -> bytes:
    """A PNG, JPEG or TIFF with nothing but what its pixels need, and what makes them upright; other data as it is."""
    at, kept = 8, [data[:8]]
    if data.startswith(b"\x89PNG"):  # chunks: size, name, data, checksum
        while at < len(data):
            size, name = 12 + int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
            chunk = data[at : at + size]
            if name == b"eXIf" and upright:  # its checksum may be at fault
                kept.append(chunk[:-4] + crc32(chunk[4:-4]).to_bytes(4, "big"))
            elif name[:1].isupper() or name == b"tRNS":
                kept.append(chunk)
            at += size
        return b"".join(kept)
    if data.startswith(b"\xff\xd8"):  # segments: marker, size, data; until the scan begins
        at, kept = 2, [data[:2]]
        while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":
            size = 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            left_out = (*range(0xE2 if upright else 0xE0, 0xEE), 0xEF, 0xFE)  # E1 is EXIF; EE, Adobe's colours, stays
            if data[at + 1] not in left_out:
                kept.append(data[at : at + size])
            at += size
        return b"".join(kept) + data[at:]
    if data[:4] in (b"II*\0", b"MM\0*"):  # a directory of tags of 12 bytes each, the data elsewhere
        order: Any = "little" if data[:1] == b"I" else "big"
        at = int.from_bytes(data[4:8], order)
        stop = at + 2 + 12 * int.from_bytes(data[at : at + 2], order)
        tags = [data[i : i + 12] for i in range(at + 2, stop, 12)]
        told = TOLD if upright else TOLD | {274}
        tags = [tag for tag in tags if (number := int.from_bytes(tag[:2], order)) < 700 and number not in told]
        directory = len(tags).to_bytes(2, order) + b"".join(tags) + bytes(4)  # and no second picture
        return data[:at] + directory.ljust(stop + 4 - at, b"\0") + data[stop + 4 :]
    return data


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB: transparency onto white, as transformers 5 has it; 16-bit levels scaled, not clipped."""
    if image.mode.startswith("I"):  # I;16 and variants; I holds 16 bits in files, or whatever a caller has put there
        scale = 1 if image.mode == "I" and image.getextrema()[1] < 256 else 1 / 256  # type: ignore[operator]
        image = image.convert("I").point(lambda level: level * scale).convert("L")
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.upper())
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
