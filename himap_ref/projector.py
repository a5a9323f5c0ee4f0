"""Projector: from the encoder's width to the decoder's (source: `LlavaMultiModalProjector`); one layer in LLaVA v1."""

from torch import Tensor, nn

from .config import LlavaConfig
from .vision import ACTIVATIONS


class Projector(nn.Module):
    """(B, N, vision hidden size, of several layers as often) -> (B, N, text hidden size)."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        d, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.act = ACTIVATIONS[config.projector_hidden_act]
        self.linear_1 = nn.Linear(config.vision_config.hidden_size * len(config.feature_layers), d, bias=bias)
        self.linear_2 = nn.Linear(d, d, bias=bias) if config.projector_type == "mlp2x_gelu" else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear_1(x)
        return x if self.linear_2 is None else self.linear_2(self.act(x))
