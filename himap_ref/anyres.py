"""LLaVA-NeXT (LLaVA-1.6, "anyres"): the encoder looks at the whole picture, then at tiles of it, enlarged.

The picture is fitted into the best size of `image_grid_pinpoints`, with black around it, and cut into tiles of the
encoder's size. Their patches, laid out as in the picture, are a grid; its rows or columns in the black go, and
`image_newline`, one trained vector, ends each row. With 2 x 2 patches to a look, a flat picture and 2 x 2 tiles:

    the whole      tiles                  image tokens
    w0 w1          .  . | .  .            w0 w1 w2 w3             the whole picture, row by row
    w2 w3          a  b | c  d            a b c d newline         what is left of the grid
                   -----+-----            e f g h newline
                   e  f | g  h
                   .  . | .  .            (a look is 336 pixels and 24 patches a side in the real models)

Sizes are (height, width). Choice, rounding and order are transformers' (source: `LlavaNextImageProcessor`,
`LlavaNextModel.pack_image_features`): where an odd number of rows is black, one of them stays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from .config import LlavaConfig
from .errors import HimapError
from .image import ImageProcessor

Size = tuple[int, int]  # (height, width), in pixels or patches


def best_size(image: Size, pinpoints: Sequence[Size]) -> Size:
    """The one in which most of the picture's pixels find room (to enlarge it adds none), the smallest of such."""

    def room(point: Size) -> tuple[int, int]:
        scale = min(point[0] / image[0], point[1] / image[1])
        fitted = int(image[0] * scale) * int(image[1] * scale)
        return min(fitted, image[0] * image[1]), -point[0] * point[1]

    return max(pinpoints, key=room)  # the first of equals


@dataclass(frozen=True)
class AnyresProcessor(ImageProcessor):
    """A picture as several of the encoder's size, each of which becomes pixels as in LLaVA-1.5."""

    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()

    def looks(self, image: Image.Image) -> list[Image.Image]:
        """The RGB picture squeezed into a square, then the tiles, row by row."""
        side = (self.crop_size or self.size or (0, 0))[0]
        height, width = best_size((image.height, image.width), self.image_grid_pinpoints)
        tall, wide = height / image.height, width / image.width
        fitted = (
            (width, min(height, math.ceil(image.height * wide))) if wide < tall else
            (min(width, math.ceil(image.width * tall)), height)
        )  # fmt: skip
        page = Image.new("RGB", (width, height))
        page.paste(image.resize(fitted, self.resample), ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
        corners = [(x, y) for y in range(0, height, side) for x in range(0, width, side)]
        return [image.resize((side, side), self.resample), *(page.crop((x, y, x + side, y + side)) for x, y in corners)]

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB picture -> (looks, 3, S, S) fp32."""
        return torch.cat([super(AnyresProcessor, self).__call__(look) for look in self.looks(image)])


def tile_grid(image: Size, config: LlavaConfig) -> Size:
    """Patches of all tiles together."""
    vision = config.vision_config
    height, width = best_size(image, config.image_grid_pinpoints or ())
    side = vision.image_size // vision.patch_size
    return height // vision.image_size * side, width // vision.image_size * side


def unpadded(image: Size, grid: Size) -> tuple[slice, slice]:
    """The rows and columns of the grid that are not black."""
    (height, width), (rows, columns) = image, grid
    if width / height > columns / rows:
        black = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(black, rows - black), slice(0, columns)
    black = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(black, columns - black)


def num_image_tokens(image: Size, config: LlavaConfig) -> int:
    """Of one picture; in LLaVA-1.5 of any, in LLaVA-NeXT's models 576 of the whole and up to 2352 of the tiles."""
    if not config.image_grid_pinpoints:
        return config.num_image_tokens
    rows, columns = unpadded(image, tile_grid(image, config))
    return config.num_image_tokens + (rows.stop - rows.start) * (columns.stop - columns.start + 1)


def most_image_tokens(config: LlavaConfig) -> int:
    """Of a picture that has the most: one of a size that there are tiles for, so that no patch is black."""
    return max(num_image_tokens(size, config) for size in config.image_grid_pinpoints or [(1, 1)])


def pack(looks: Tensor, images: Sequence[Size], config: LlavaConfig, image_newline: Tensor) -> Tensor:
    """(looks, P, d) tokens of the looks at all pictures, and the pictures' sizes -> (N of all pictures, d).

    Raises HimapError if they do not fit each other.
    """
    side = config.vision_config.image_size // config.vision_config.patch_size
    grids = [tile_grid(image, config) for image in images]
    numbers = [1 + rows * columns // side**2 for rows, columns in grids]
    if sum(numbers) != len(looks):
        sizes = f"image_sizes {list(images)}" if images else "no image_sizes"
        raise HimapError(f"LLaVA-NeXT: {len(looks)} looks at pictures and {sizes}: they do not belong together")
    packed = []
    for image, (rows, columns), (whole, *tiles) in zip(images, grids, looks.split(numbers), strict=True):
        grid = torch.stack(tiles).view(rows // side, columns // side, side, side, -1)  # tiles, then patches within each
        grid = grid.transpose(1, 2).reshape(rows, columns, -1)[unpadded(image, (rows, columns))]
        newlines = image_newline.to(grid).expand(len(grid), 1, -1)
        packed += [whole, torch.cat((grid, newlines), dim=1).flatten(0, 1)]
    return torch.cat(packed)
