"""Projector: from the encoder's width to the decoder's (source: `LlavaMultiModalProjector`).

LLaVA-1.5 uses two linear layers with a GELU between them, LLaVA v1 a single linear layer.
"""

from __future__ import annotations

from torch import Tensor, nn

from .config import LlavaConfig
from .errors import HimapError
from .vision import activation


class Projector(nn.Module):
    """(B, N, vision hidden size) -> (B, N, text hidden size)."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        d_vision, d_text = config.vision_config.hidden_size, config.text_config.hidden_size
        bias = config.multimodal_projector_bias
        self.linear_1 = nn.Linear(d_vision, d_text, bias=bias)
        if config.projector_type == "mlp2x_gelu":
            self.act = activation(config.projector_hidden_act)
            self.linear_2 = nn.Linear(d_text, d_text, bias=bias)
        elif config.projector_type == "linear":
            self.act = self.linear_2 = None
        else:
            raise HimapError(f"projector type {config.projector_type!r} is not supported: 'mlp2x_gelu' or 'linear'")

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear_1(x)
        return x if self.linear_2 is None else self.linear_2(self.act(x))
