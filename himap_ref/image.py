"""Pictures: a file of any usual format becomes the normalised pixels that the encoder was trained on.

Equal to transformers' CLIP and LLaVA image processors (Pillow backend): resize the shortest side (bicubic), centre
crop, or first pad to a square of the mean colour; then rescale and normalise.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .config import check_fields, known, read_bytes, read_json, section
from .errors import HimapError

MAX_PIXELS = 150_000_000  # of a file, or of what is made of it: padded, a 1 x 40000 picture has 1.6 gigapixels
# Not all that Pillow knows: for EPS it would start Ghostscript, and rarely used readers are rarely checked.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

WITHOUT: dict[str, dict] = {  # what a step amounts to that is switched off
    "do_resize": {"size": {"shortest_edge": None}},
    "do_center_crop": {"crop_size": {}},
    "do_rescale": {"rescale_factor": 1.0},
    "do_normalize": {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)},
}


def load_image(source: str | Path | Image.Image) -> Image.Image:
    """A file or a picture, turned upright (EXIF) and made RGB. First frame of an animation."""
    Image.init()  # fills Image.OPEN
    formats = [name for name in FORMATS if name in Image.OPEN]  # an older Pillow has no AVIF
    try:
        if isinstance(source, Image.Image):
            image = source
        else:  # bytes at hand: no part of a file claims more memory than the file has
            image = Image.open(io.BytesIO(read_bytes(Path(source))), formats=formats)
        if not 0 < image.width * image.height <= MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels: expected 1 to {MAX_PIXELS}")
        return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's readers let anything through: struct.error, IndexError, EOFError, ...
        unknown = isinstance(error, UnidentifiedImageError) and f"expected {', '.join(FORMATS)}"
        reason = unknown or str(error) or type(error).__name__
        raise HimapError(f"{source}: cannot be read as a picture ({reason})") from None


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


@dataclass(frozen=True)
class ImageProcessor:
    """What `preprocessor_config.json` says. The defaults are LLaVA-1.5's as llava-hf publishes it."""

    shortest_edge: int | None = 336
    size: tuple[int, int] | None = None  # (height, width): resize to exactly this, where there is no shortest_edge
    crop_size: tuple[int, int] | None = (336, 336)  # (height, width)
    do_pad: bool = False  # pad to a square first (the original LLaVA's "pad" aspect ratio)
    resample: int = 3  # Pillow's code: bicubic
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        check_fields(self)

    @classmethod
    def from_folder(cls, folder: Path, image_size: int) -> ImageProcessor:
        """From preprocessor_config.json or, as transformers 5 may write it, from within processor_config.json.

        The original LLaVA says in config.json whether to pad.
        """
        data = {"do_pad": read_json(folder / "config.json").get("image_aspect_ratio") == "pad"}
        if (path := folder / "preprocessor_config.json").exists():
            data |= read_json(path)
        elif (path := folder / "processor_config.json").exists():
            data |= section(read_json(path), "image_processor") or {}
        processor = cls.from_dict(data, image_size)
        if (processor.crop_size or processor.size) != (image_size, image_size):
            raise HimapError(f"{folder}: the image processor does not make pictures of {image_size} pixels a side")
        return processor

    @classmethod
    def from_dict(cls, data: dict, image_size: int = 224) -> ImageProcessor:
        """`do_*: false` switches a step off; sizes are an int, {"shortest_edge"} or {"height", "width"}."""
        data = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items() if v is not None}
        data = {"size": image_size, "crop_size": image_size, **data}
        for step, without in WITHOUT.items():
            if not isinstance(data.get(step, True), bool):
                raise HimapError(f"image processor: {step} is neither true nor false")
            data |= {} if data.get(step, True) else without
        size, crop = data["size"], data["crop_size"]
        size = size if isinstance(size, dict) else {"shortest_edge": size}
        crop = crop if isinstance(crop, dict) else {"height": crop, "width": crop}
        sizes = {
            "shortest_edge": size.get("shortest_edge"),
            "size": None if "shortest_edge" in size else (size.get("height"), size.get("width")),
            "crop_size": (crop.get("height"), crop.get("width")) if crop else None,
        }
        return cls(**known(cls, data) | sizes)

    def frame(self, image: Image.Image) -> Image.Image:
        """The RGB picture padded, resized and cropped: what the model looks at, in 8-bit pixels."""
        short, long = sorted(image.size)
        if (long**2 if self.do_pad else (self.shortest_edge or 0) ** 2 * long / short) > MAX_PIXELS:
            raise HimapError(f"a picture of {' x '.join(map(str, image.size))} pixels is too narrow: crop it first")
        if self.do_pad:
            image = pad_to_square(image, tuple(int(x * 255) for x in self.image_mean))
        if edge := self.shortest_edge:
            width, height = (int(edge * side / min(image.size)) for side in image.size)
            image = image.resize((width, height), self.resample)
        elif self.size:
            image = image.resize(self.size[::-1], self.resample)
        if self.crop_size:  # centre crop; what lies outside a smaller picture is black
            height, width = self.crop_size
            top, left = (image.height - height) // 2, (image.width - width) // 2
            image = image.crop((left, top, left + width, top + height))
        return image

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB picture -> (1, 3, height, width) fp32."""
        image = self.frame(image)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
        pixels = (pixels.double() * self.rescale_factor).float()
        pixels = (pixels - torch.tensor(self.image_mean)) / torch.tensor(self.image_std)
        return pixels.permute(2, 0, 1)[None].contiguous()


def pad_to_square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """The picture centred on a square of its longer side."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
