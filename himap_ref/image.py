"""Pictures: any file Pillow reads becomes the normalised pixels that the encoder was trained on.

Equal to transformers' CLIP and LLaVA image processors (Pillow backend): resize the shortest side (bicubic), centre
crop, or first pad to a square of the mean colour; then rescale and normalise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .config import read_json
from .errors import HimapError

MAX_RESIZED_PIXELS = 150_000_000  # a 1 x 40000 picture would otherwise be blown up to 4.5 gigapixels


def load_image(source: str | Path | Image.Image) -> Image.Image:
    """A file or a picture, turned upright (EXIF) and made RGB. First frame of an animation."""
    if isinstance(source, Image.Image):
        return to_rgb(ImageOps.exif_transpose(source))
    try:
        with Image.open(source) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all that Pillow raises
        reason = "no picture format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise HimapError(f"{source}: cannot be read as a picture ({reason})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB: transparency onto white, as transformers 5 has it; 16-bit levels scaled, not clipped."""
    if image.mode.startswith("I"):  # I;16 and variants, and I as 16-bit files are opened by older Pillow versions
        image = image.convert("I").point(lambda level: level * (1 / 256)).convert("L")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@dataclass(frozen=True)
class ImageProcessor:
    """What `preprocessor_config.json` says. The defaults are LLaVA-1.5's as llava-hf publishes it."""

    shortest_edge: int | None = 336
    size: tuple[int, int] | None = None  # (height, width): resize to exactly this, instead of shortest_edge
    crop_size: tuple[int, int] | None = (336, 336)  # (height, width)
    do_pad: bool = False  # pad to a square first (the original LLaVA's "pad" aspect ratio)
    resample: int = 3  # Pillow's code: bicubic
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_folder(cls, folder: Path, image_size: int) -> ImageProcessor:
        """From preprocessor_config.json or, as transformers 5 may write it, from within processor_config.json."""
        path, data = folder / "preprocessor_config.json", {}
        if path.exists():
            data = read_json(path)
        elif (folder / "processor_config.json").exists():
            data = read_json(folder / "processor_config.json").get("image_processor", {})
        processor = cls.from_dict({"size": image_size, "crop_size": image_size, **data})
        if (processor.crop_size or processor.size) != (image_size, image_size):
            raise HimapError(f"{folder}: the image processor does not make pictures of {image_size} pixels a side")
        return processor

    @classmethod
    def from_dict(cls, data: dict) -> ImageProcessor:
        """`do_*: false` switches a step off; sizes are an int, {"shortest_edge"} or {"height", "width"}."""
        size, crop = data.get("size", 224), data.get("crop_size", 224)
        size = {"shortest_edge": size} if isinstance(size, int) else size
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        if not data.get("do_resize", True):
            size = {}
        normalize = data.get("do_normalize", True)
        return cls(
            shortest_edge=size.get("shortest_edge"),
            size=(size["height"], size["width"]) if "height" in size else None,
            crop_size=(crop["height"], crop["width"]) if data.get("do_center_crop", True) else None,
            do_pad=bool(data.get("do_pad", False)),
            resample=data.get("resample", cls.resample),
            rescale_factor=data.get("rescale_factor", cls.rescale_factor) if data.get("do_rescale", True) else 1.0,
            image_mean=tuple(data.get("image_mean", cls.image_mean)) if normalize else (0.0, 0.0, 0.0),
            image_std=tuple(data.get("image_std", cls.image_std)) if normalize else (1.0, 1.0, 1.0),
        )

    def frame(self, image: Image.Image) -> Image.Image:
        """The RGB picture padded, resized and cropped: what the model looks at, in 8-bit pixels."""
        if self.do_pad:
            image = pad_to_square(image, tuple(int(x * 255) for x in self.image_mean))
        if self.size or self.shortest_edge:
            image = image.resize(self._resized(*image.size), Image.Resampling(self.resample))
        if self.crop_size:  # centre crop; what lies outside a smaller picture is black
            height, width = self.crop_size
            top, left = (image.height - height) // 2, (image.width - width) // 2
            image = image.crop((left, top, left + width, top + height))
        return image

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if self.size:
            return self.size[1], self.size[0]
        short, long = min(width, height), max(width, height)
        longer = int(self.shortest_edge * long / short)
        if self.shortest_edge * longer > MAX_RESIZED_PIXELS:
            raise HimapError(f"a picture of {width} x {height} pixels is too narrow to be used: crop it first")
        return (self.shortest_edge, longer) if width <= height else (longer, self.shortest_edge)

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
