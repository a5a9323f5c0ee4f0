"""Pixels against transformers' image processors (Pillow backend)."""

from __future__ import annotations

import pytest
import torch
from toys import noise

from himap_ref.assistant.picture import load_image
from himap_ref.checkpoint.config import image_processor
from himap_ref.image import ImageProcessor

transformers = pytest.importorskip("transformers")

SIZES = [
    (1, 1), (1, 40), (40, 1), (2, 3), (3, 200), (17, 5), (64, 64), (224, 224), (335, 335), (335, 337), (337, 335),
    (336, 336), (336, 337), (337, 337), (336, 1000), (341, 511), (640, 480), (641, 480), (1023, 77), (2000, 1500),
]  # fmt: skip


def pixels(processor, image) -> torch.Tensor:
    return processor(image, return_tensors="pt").pixel_values


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def clip():
    """LLaVA-1.5's settings as llava-hf publishes them."""
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})


PADDED_SIZES = [(1, 1), (1, 40), (40, 1), (5, 4), (335, 336), (640, 481), (480, 643), (1200, 900)]


@pytest.mark.parametrize("size, do_pad", [*((s, False) for s in SIZES), *((s, True) for s in PADDED_SIZES)], ids=str)
def test_sizes(clip, size, do_pad):
    """A size rounded, not cut off (641 x 480, 341 x 511); a crop or padding shifted by one pixel; filter or colour."""
    padded = transformers.LlavaImageProcessorPil(do_pad=True, size=clip.size, crop_size=clip.crop_size)
    image = noise(*size)
    assert_equal(ImageProcessor(do_pad=do_pad)(image), pixels(padded if do_pad else clip, image))


SETTINGS = {
    "crop beyond the picture": {"size": {"shortest_edge": 224}, "crop_size": {"height": 301, "width": 336}},
    "exact size": {"size": {"height": 50, "width": 70}, "do_center_crop": False},
    "an int for both sides": {"size": 30, "default_to_square": True, "crop_size": 25},
    "no crop": {"size": {"shortest_edge": 50}, "do_center_crop": False},
    "no resize": {"do_resize": False, "crop_size": {"height": 60, "width": 50}},
    "no normalisation": {"size": {"shortest_edge": 30}, "crop_size": 30, "do_normalize": False},
    "no rescaling": {"size": {"shortest_edge": 30}, "crop_size": 30, "do_rescale": False},
    "bilinear": {"size": {"shortest_edge": 30}, "crop_size": 30, "resample": 2},
    "own mean": {"size": {"shortest_edge": 30}, "crop_size": 30, "image_mean": [0.5] * 3, "image_std": [0.2, 0.3, 0.4]},
    "own scale": {"size": {"shortest_edge": 30}, "crop_size": 30, "rescale_factor": 1 / 127.5},
    "defaults": {},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings(settings):
    """A key of preprocessor_config.json that is overlooked or misread."""
    image = noise(91, 73)
    theirs = transformers.CLIPImageProcessorPil(**settings)
    assert_equal(image_processor(settings)(image), pixels(theirs, image))
    assert_equal(image_processor(theirs.to_dict())(image), pixels(theirs, image))


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "RGBA", "CMYK"])
def test_modes(clip, mode):
    """Another conversion to RGB than transformers': palette, ink or transparency ignored."""
    image = noise(60, 40, mode)
    assert_equal(ImageProcessor()(load_image(image)), pixels(clip, image))
