"""HiMAP in a self-contained PyTorch LLaVA. Start with `decoder.py`: the pruning stands in its layer loop."""

import warnings

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch says so; we need none

from .assistant import Answer, Llava, Past
from .config import LLAVA_1_5_7B, LLAVA_1_5_13B, LlavaConfig, TextConfig, VisionConfig
from .decoder import LlamaDecoder
from .errors import HimapError
from .model import LlavaModel
from .pruning import HIMAP, HIMAP_CAPTION, LayerView, Stage, image_to_image, text_to_image

__all__ = [
    "HIMAP", "HIMAP_CAPTION", "LLAVA_1_5_13B", "LLAVA_1_5_7B", "Answer", "HimapError", "LayerView", "LlamaDecoder",
    "Llava", "LlavaConfig", "LlavaModel", "Past", "Stage", "TextConfig", "VisionConfig", "image_to_image",
    "text_to_image",
]  # fmt: skip
