"""Pictures: an RGB picture becomes the normalised pixels that the encoder was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .errors import HimapError

MAX_PIXELS = 150_000_000  # of a file, or of what is made of it: padded, a 1 x 40000 picture has 1.6 gigapixels


def read_bytes(path: Path, size: int = -1) -> bytes:
    """Of a file. An archive may hold pipes and links to devices: one is waited for, the other read, for ever."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError("a pipe or a device, not a file")
    with path.open("rb") as file:
        return file.read(size)


@dataclass(frozen=True)
class ImageProcessor:
    """Equal to transformers' CLIP and LLaVA processors (Pillow backend). The defaults are those of llava-hf's files."""

    shortest_edge: int | None = 336
    size: tuple[int, int] | None = None  # (height, width): resize to exactly this, where there is no shortest_edge
    crop_size: tuple[int, int] | None = (336, 336)  # (height, width)
    do_pad: bool = False  # pad to a square first (the original LLaVA's "pad" aspect ratio)
    resample: int = 3  # Pillow's code: bicubic
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def frame(self, image: Image.Image) -> Image.Image:
        """The RGB picture padded, resized and cropped: what the model looks at, in 8-bit pixels."""
        short, long = sorted(image.size)
        if (long**2 if self.do_pad else (self.shortest_edge or 0) ** 2 * long / short) > MAX_PIXELS:
            raise HimapError(f"a picture of {' x '.join(map(str, image.size))} pixels is too narrow: crop it first")
        if self.do_pad:
            square = Image.new("RGB", (long, long), tuple(int(x * 255) for x in self.image_mean))
            square.paste(image, ((long - image.width) // 2, (long - image.height) // 2))
            image = square
        if edge := self.shortest_edge:
            image = image.resize([int(edge * side / min(image.size)) for side in image.size], self.resample)
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
