"""Pictures without transformers: every kind of file becomes upright RGB, and the pixel formula is LLaVA's."""

from __future__ import annotations

import io
import random
import struct
import zlib

import pytest
import torch
from PIL import Image
from toys import noise

from himap_ref import HimapError
from himap_ref.assistant.picture import load_image
from himap_ref.checkpoint.config import image_processor
from himap_ref.image import ImageProcessor

RED, GREEN, BLUE, WHITE = (250, 10, 10), (10, 250, 10), (10, 10, 250), (250, 250, 250)


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """Top left, top right, bottom left, bottom right, rounded so that JPEG's losses do not show."""
    w, h = image.size
    places = ((4, 4), (w - 5, 4), (4, h - 5), (w - 5, h - 5))
    return [tuple(250 if level > 128 else 10 for level in image.getpixel(place)) for place in places]


def four_colours() -> Image.Image:
    image = Image.new("RGB", (64, 32))
    for place, colour in zip(((0, 0), (32, 0), (0, 16), (32, 16)), (RED, GREEN, BLUE, WHITE), strict=True):
        image.paste(colour, (*place, place[0] + 32, place[1] + 16))
    return image


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("orientation, expected", [
    (1, [RED, GREEN, BLUE, WHITE]), (2, [GREEN, RED, WHITE, BLUE]), (3, [WHITE, BLUE, GREEN, RED]),
    (6, [BLUE, RED, WHITE, GREEN]),  # a phone held upright: turn by 90 degrees clockwise
    (8, [GREEN, WHITE, RED, BLUE]),
])  # fmt: skip
def test_exif_orientation(tmp_path, orientation, expected, opened):
    """Phone photographs would be shown to the model lying on their side."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.jpg"
    four_colours().save(path, exif=exif, quality=95, subsampling=0)
    image = load_image(Image.open(path) if opened else path)
    assert image.mode == "RGB"
    assert image.size == ((32, 64) if orientation > 4 else (64, 32))
    assert corners(image) == expected
    again = load_image(image)  # as a command does, which draws on what it asks about
    assert again.size == image.size and corners(again) == expected


@pytest.mark.parametrize("mode, colour, expected", [
    ("RGB", (200, 100, 50), (200, 100, 50)), ("RGBA", (200, 100, 50, 255), (200, 100, 50)),
    ("RGBA", (200, 100, 50, 0), (255, 255, 255)),  # what is transparent shows the white below
    ("L", 90, (90, 90, 90)), ("LA", (90, 255), (90, 90, 90)), ("1", 1, (255, 255, 255)),
    ("CMYK", (0, 255, 255, 0), (255, 0, 0)), ("P", 1, (12, 200, 34)),
    *(("I;16", level, (level >> 8,) * 3) for level in range(17, 2**16, 4096)), ("I;16", 0xFFFF, (255, 255, 255)),
    ("I;16", 0x01FF, (1, 1, 1)), ("I", 0x4000, (64, 64, 64)),
])  # fmt: skip
def test_modes(tmp_path, mode, colour, expected):
    """Bytes of a mode misread: a palette's indices as levels, 16 bits clipped to white (as Pillow does to X-rays)."""
    image = Image.new(mode, (6, 5), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, 12, 200, 34])
    path = tmp_path / f"picture.{'tiff' if mode in ('CMYK', 'I') else 'png'}"
    image.save(path)
    for source in (path, str(path), image):
        loaded = load_image(source)
        assert (loaded.mode, loaded.size) == ("RGB", (6, 5))
        assert loaded.getpixel((2, 3)) == expected


def test_animation_gives_first_frame(tmp_path):
    """Another frame than the first would be described."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:], duration=50)
    assert Image.open(tmp_path / "moving.gif").n_frames == 3
    assert load_image(tmp_path / "moving.gif").getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (10, 128, 250)])
def test_pixel_formula(colour):
    """Wrong constants, their order, or BGR instead of RGB."""
    pixels = ImageProcessor()(Image.new("RGB", (50, 40), colour))
    assert pixels.shape == (1, 3, 336, 336) and pixels.dtype == torch.float32
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    expected = [(level / 255 - m) / s for level, m, s in zip(colour, mean, std, strict=True)]
    assert pixels[0].amin((1, 2)).tolist() == pytest.approx(expected, abs=1e-6)
    assert pixels[0].amax((1, 2)).tolist() == pytest.approx(expected, abs=1e-6)


def test_rows_and_columns_stay_in_place():
    """Height and width exchanged, or a mirrored picture."""
    raw = {"rescale_factor": 1.0, "image_mean": (0,) * 3, "image_std": (1,) * 3}
    processor = ImageProcessor(shortest_edge=None, crop_size=None, **raw)
    image = noise(5, 3)
    want = [[image.getpixel((x, y)) for x in range(5)] for y in range(3)]
    assert torch.equal(processor(image), torch.tensor(want).float().permute(2, 0, 1)[None])


@pytest.mark.parametrize("size", [(300, 100), (100, 300)])
def test_crop_takes_the_middle(size):
    """The picture's start instead of its middle, or squeezing instead of cropping."""
    image = Image.new("RGB", size, (255, 0, 0))
    image.paste((0, 0, 255), (100, 0, 200, 100) if size[0] > size[1] else (0, 100, 100, 200))  # the middle third
    frame = ImageProcessor(shortest_edge=100, crop_size=(100, 100)).frame(image)
    assert frame.size == (100, 100)
    assert {frame.getpixel(place) for place in ((0, 0), (99, 99), (50, 50))} == {(0, 0, 255)}


@pytest.mark.parametrize(("size", "corner"), [((20, 11), (0, 4)), ((11, 20), (4, 0)), ((7, 7), (0, 0))])
def test_pad_to_square(size, corner):
    """A picture put into a corner of the square, or padded with black instead of the encoder's mean colour."""
    image = noise(*size)
    mean_colour = (122, 116, 104)
    processor = ImageProcessor(shortest_edge=None, crop_size=None, do_pad=True)
    square, side = processor.frame(image), max(size)
    assert square.size == (side, side)
    box = (*corner, corner[0] + size[0], corner[1] + size[1])
    assert square.crop(box).tobytes() == image.tobytes()
    square.paste(mean_colour, box)
    assert square.getcolors() == [(side**2, mean_colour)]


def test_crop_larger_than_the_picture():
    """A picture smaller than the crop would shift by a pixel or wrap around."""
    processor = ImageProcessor(shortest_edge=None, crop_size=(8, 8))
    framed, want = processor.frame(Image.new("RGB", (3, 4), WHITE)), Image.new("RGB", (8, 8))
    want.paste(WHITE, (3, 2, 6, 6))
    assert framed.tobytes() == want.tobytes()


def test_settings_of_the_file():
    """One of the spellings of preprocessor_config.json would give another size, or a switched-off step would run."""
    read = image_processor
    long_form = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    assert read({"size": 28, "crop_size": 28}) == read(long_form)
    assert read({"size": 28, "crop_size": 28}).shortest_edge == 28
    assert read({"size": 336, "crop_size": 336}) == ImageProcessor()
    assert read({"size": {"height": 30, "width": 40}, "do_center_crop": False}).frame(noise(9, 9)).size == (40, 30)
    assert read({"do_resize": False, "do_center_crop": False}).frame(noise(9, 5)).size == (9, 5)
    white = Image.new("RGB", (8, 8), (255, 255, 255))
    assert read({"do_normalize": False})(white).max().item() == 1.0
    assert read({"do_normalize": False, "do_rescale": False})(white).max().item() == 255.0
    assert read({"image_mean": [0.5] * 3, "image_std": [0.25] * 3})(white).max().item() == pytest.approx(2.0)
    assert read({"do_pad": True}).do_pad
    assert not read({}).do_pad


# ---------------------------------------------------------------- what people give as a picture


def png(*chunks: tuple[bytes, bytes], behind: bool = False, crc: int = 0) -> bytes:
    """A picture of 64 x 32 with chunks of metadata before or behind its pixels."""
    data = saved("PNG")
    place = data.index(b"IEND" if behind else b"IDAT") - 4
    more = [struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body) ^ crc)
            for name, body in chunks]  # fmt: skip
    return data[:place] + b"".join(more) + data[place:]


def jpeg(*segments: tuple[int, bytes]) -> bytes:
    data = saved("JPEG")
    more = [bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body for marker, body in segments]
    return data[:2] + b"".join(more) + data[2:]


def saved(format: str, **options) -> bytes:
    file = io.BytesIO()
    four_colours().save(file, format, **options)
    return file.getvalue()


def exif(*entries: tuple[int, int, int, bytes], orientation: int = 6) -> bytes:
    """Of orientation and other tags: (tag, type, count, value), by hand. All values lie within their entry."""
    entries = ((0x112, 3, 1, struct.pack("<H", orientation)), *entries)
    tags = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3].ljust(4, b"\0")[:4] for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + tags + bytes(4)


def tiff_tag(number: int, data: bytes = b"\xff\xff\xff\xff\xff\xff") -> bytes:
    """A TIFF with orientation 6 in whose entry for a tag type and count are rubbish."""
    whole = saved("TIFF", tiffinfo={270: "a text", 274: 6, 282: 72.0, 283: 72.0, 34675: b"profile", 700: b"xmp"})
    order = "<" if whole[:2] == b"II" else ">"
    place = struct.unpack(f"{order}I", whole[4:8])[0] + 2
    while whole[place : place + 2] != struct.pack(f"{order}H", number):
        place += 12
    return whole[: place + 2] + data + whole[place + 2 + len(data) :]


BOMB = zlib.compress(bytes(5 * 2**20))
LYING, UPRIGHT = (64, 32), (32, 64)
FAULTY = {  # metadata at fault: (the file, the picture's size)
    "png text too large": (png((b"zTXt", b"k\0\0" + BOMB)), LYING),
    "png text too large, behind": (png((b"iTXt", b"k\0\1\0\0\0" + BOMB), behind=True), LYING),
    "png too much text": (png(*[(b"tEXt", b"k%d\0" % i + bytes(10**6)) for i in range(68)]), LYING),
    "png profile too large": (png((b"iCCP", b"k\0\0" + BOMB)), LYING),
    "png profile of another kind": (png((b"iCCP", b"abc\0def")), LYING),
    "png short sizes": (png((b"pHYs", b"12")), LYING),
    "png wrong checksum": (png((b"tEXt", b"a\0b"), crc=1), LYING),
    "png exif without byte order": (png((b"eXIf", b"\0\0\0\x08\0\x02\x01\x12\0\x03")), LYING),
    "png exif, wrong checksum": (png((b"eXIf", exif()[6:]), crc=1), UPRIGHT),
    "png exif beside a large text": (png((b"zTXt", b"k\0\0" + BOMB), (b"eXIf", exif()[6:])), UPRIGHT),
    "png exif as hexadecimal text": (png((b"tEXt", b"Raw profile type exif\0\nexif\n   8\nzz")), LYING),
    **{f"jpeg orientation {n}": (jpeg((0xE1, exif(orientation=n))), LYING) for n in (0, 9, 77)},
    "jpeg resolution -1/0": (jpeg((0xE1, exif((0x11A, 10, 1, bytes(4))))), UPRIGHT),
    "jpeg a text as a rational": (jpeg((0xE1, exif((0x8298, 5, 1, bytes(4))))), UPRIGHT),
    "jpeg a type that is none": (jpeg((0xE1, exif((0x10F, 99, 2**31, b"abcd")))), UPRIGHT),
    "jpeg orientation as text": (jpeg((0xE1, exif().replace(b"\x12\1\3\0", b"\x12\1\2\0"))), LYING),
    "jpeg exif cut": (jpeg((0xE1, exif()[:17])), LYING),
    "jpeg short profile": (jpeg((0xE2, b"ICC_PROFILE\0")), LYING),
    "jpeg short profile beside exif": (jpeg((0xE2, b"ICC_PROFILE\0\1"), (0xE1, exif())), UPRIGHT),
    "jpeg short JFIF": (jpeg((0xE0, b"JFIF\0")), LYING),
    "jpeg bad XMP": (jpeg((0xE1, b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation=\"\xff\0")), LYING),
    "webp exif is rubbish": (saved("WEBP", exif=b"Exif\0\0rubbish!"), LYING),
    "webp resolution 0/0": (saved("WEBP", exif=exif((0x11A, 5, 1, bytes(4)))), UPRIGHT),
    "webp profile is rubbish": (saved("WEBP", icc_profile=b"no profile"), LYING),
    "tiff profile": (tiff_tag(34675), UPRIGHT),
    "tiff resolution": (tiff_tag(282), UPRIGHT),
    "tiff resolution, text": (tiff_tag(282, b"\2\0"), UPRIGHT),
    "tiff description": (tiff_tag(270), UPRIGHT),
    "tiff XMP": (tiff_tag(700), UPRIGHT),
    "tiff orientation": (tiff_tag(274), LYING),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("data, size", FAULTY.values(), ids=FAULTY)
def test_faulty_metadata(data, size):
    """A good picture refused, or left lying on its side, for what a camera or an editor wrote beside its pixels."""
    image = load_image(data)
    assert image.size == size
    assert corners(image) == ([RED, GREEN, BLUE, WHITE] if size == LYING else [BLUE, RED, WHITE, GREEN])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_random_metadata(format):
    """A fault that nobody has thought of: bytes of EXIF replaced at random."""
    draw = random.Random(0)
    for _ in range(150):
        block = bytearray(exif((0x10F, 2, 4, b"abc\0"), (0x11A, 5, 1, bytes(4)), (0x8769, 4, 1, b"\x1a\0\0\0")))
        for _ in range(draw.randint(1, 6)):
            block[draw.randrange(6, len(block))] = draw.randrange(256)
        block = bytes(block[: draw.choice((len(block), draw.randrange(8, len(block))))])
        if format == "TIFF":
            data = tiff_tag(draw.choice((270, 282, 283, 34675, 700)), draw.randbytes(6))
        else:
            data = {"PNG": lambda b: png((b"eXIf", b[6:])), "JPEG": lambda b: jpeg((0xE1, b)),
                    "WEBP": lambda b: saved("WEBP", exif=b)}[format](block)  # fmt: skip
        assert load_image(data).size in (LYING, UPRIGHT)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP", "GIF"])
def test_pixels_that_are_missing(format):
    """Half a picture read with the rest black or grey, now that faults in metadata are let pass."""
    data = io.BytesIO()
    noise(64, 64).save(data, format)
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(HimapError, match="cannot be read"):
            load_image(data.getvalue()[: int(share * len(data.getvalue()))])


def test_kinds_of_picture(tmp_path):
    """A file's bytes, an open file or an array taken for a path."""
    path, data = tmp_path / "a.png", saved("PNG")
    path.write_bytes(data)
    numpy = pytest.importorskip("numpy")
    array = numpy.array(four_colours())
    read = io.BytesIO(data)
    read.read()
    with path.open("rb") as file:
        for source in (path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), read, file, array):
            assert load_image(source).tobytes() == four_colours().tobytes()
    assert load_image(array[..., 0]).getpixel((0, 0)) == (250,) * 3
    assert load_image(numpy.dstack([array, array[..., :1] * 0])).getpixel((0, 0)) == (255,) * 3


@pytest.mark.parametrize("source, said", [
    ("https://example.org/a//b.jpg", "^https://example.org/a//b.jpg: an address, not a file: download it first"),
    ("HTTP://example.org/b.jpg", "^HTTP://example.org/b.jpg: .*download it first"),
    ("s3://bucket/b.jpg", "download it first"), ("data:image/png;base64,iVBORw0KGgo=", "^data:image.*download"),
    (5, "type int.*expected a path, bytes"), (torch.zeros(3, 4, 4), "type Tensor.*uint8 array"),
    (io.StringIO("x"), "type StringIO.*not 'str'"), (b"", "type bytes"), ({}, "type dict"),
])  # fmt: skip
def test_kinds_that_are_no_picture(source, said):
    """An address with its slashes collapsed, "no such file", or an array printed in the place of a name."""
    with pytest.raises(HimapError, match=said):
        load_image(source)


@pytest.mark.parametrize("shape, kind", [
    ((3, 8, 8), "uint8"), ((8, 8, 3), "float32"), ((8, 8, 3), "int64"), ((1, 8, 8, 3), "uint8"), ((8,), "uint8"),
])  # fmt: skip
def test_arrays_that_are_no_picture(shape, kind):
    """Numbers from 0 to 1 taken for levels: a black picture."""
    numpy = pytest.importorskip("numpy")
    with pytest.raises(HimapError, match=r"type ndarray.*expected uint8 \(H, W\)"):
        load_image(numpy.zeros(shape, kind))
