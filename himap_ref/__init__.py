"""HiMAP (CVPR 2025) in a self-contained PyTorch LLaVA. Start with `decoder.py`: the pruning stands in its layer loop."""

from .config import LLAVA_1_5_7B, LLAVA_1_5_13B, LlavaConfig, TextConfig, VisionConfig
from .decoder import LlamaDecoder
from .errors import HimapError
from .model import Answer, Llava
from .pruning import (
    FASTV,
    HIMAP,
    HIMAP_CAPTION,
    METHODS,
    LayerView,
    Stage,
    all_to_image,
    image_to_image,
    last_to_image,
    parse_stages,
    random,
    text_to_image,
)

__all__ = [
    "FASTV", "HIMAP", "HIMAP_CAPTION", "LLAVA_1_5_13B", "LLAVA_1_5_7B", "METHODS",
    "Answer", "HimapError", "LayerView", "LlamaDecoder", "Llava", "LlavaConfig", "Stage", "TextConfig", "VisionConfig",
    "all_to_image", "image_to_image", "last_to_image", "parse_stages", "random", "text_to_image",
]  # fmt: skip
