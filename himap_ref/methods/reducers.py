"""Methods that prune before the decoder: fewer image tokens enter it.

The tokens that remain stand next to each other in the prompt, positions included, as these methods' own code has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import LlavaConfig
from ..errors import HimapError
from ..flops import StageTrace, projector_flops, vision_flops
from ..model import LlavaModel
from ..pruning import keep_highest
from ..vision import EncoderLayer


class ImageReducer(Protocol):
    """The seam for these methods: image tokens are made in the model's place, all else stays."""

    def __call__(self, model: LlavaModel, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, N', d)."""

    def num_image_tokens(self, config: LlavaConfig) -> int:
        """N', for plans. Raises HimapError if the model does not suit."""

    def flops(self, config: LlavaConfig) -> tuple[int, int]:
        """Encoder and projector, per picture, as the call runs them."""

    def chosen(self, model: LlavaModel, pixel_values: Tensor) -> StageTrace | None:
        """Of one picture, to be drawn: which patches make the tokens, by what scores, as if by a stage at layer 0.

        None: all do, averaged over side x side squares.
        """


def check_grid(config: LlavaConfig, what: str, instead: str) -> None:
    """Raises HimapError for LLaVA-NeXT, with what it is that needs one grid of patches."""
    if config.image_grid_pinpoints:
        raise HimapError(f"{what}: of LLaVA-1.5's one grid of patches only; LLaVA-NeXT has tiles beside it: {instead}")


def check_patches(config: LlavaConfig, method: str) -> int:
    """How many patches there are to rank; raises HimapError if the model does not suit a method that ranks them."""
    if config.vision_feature_select_strategy != "default":
        raise HimapError(f"{method} ranks patches; this model keeps the class token among them")
    if config.vision_layers_used == 0:
        raise HimapError(f"{method} needs an encoder layer to rank by; this model uses none")
    return config.vision_config.num_patches


def last_layer(model: LlavaModel, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The features (B, T, d), class token included; and of the encoder's last used layer, mean over heads, how much the
    class token attends to each patch (B, P), and the keys (B, T, c)."""
    tower = model.vision_tower
    states = [*tower.hidden_states(pixel_values)]
    last = cast(EncoderLayer, tower.layers[-1])  # the elements of an nn.ModuleList have no type
    h, attn = last.layer_norm1(states[-2]), last.self_attn
    q, k = attn.heads(attn.q_proj(h[:, :1])), attn.heads(attn.k_proj(h))  # (B, h, 1, c), (B, h, T, c)
    attention = ((q * q.shape[-1] ** -0.5) @ k.mT).float().softmax(dim=-1).mean(dim=1)[:, 0, 1:]
    return torch.cat([states[i] for i in tower.taken], dim=-1), attention, k.mean(dim=1)


def drawn(score: str, scores: Tensor, keep: int) -> StageTrace:
    """(N,) scores of one picture's tokens and how many of the highest stay, as `ImageReducer.chosen` gives them."""
    kept = keep_highest(scores[None], keep)[0]
    return StageTrace(0, score, torch.arange(len(scores)), scores, kept, torch.tensor(1))


@dataclass(frozen=True)
class ClsAttention:
    """Keeps the `keep` patches that the class token attends to most, mean over heads, in the encoder's last used layer.

    Source: FasterVLM (arXiv 2412.01818). Only the kept patches go through the projector.
    """

    keep: int

    def num_image_tokens(self, config: LlavaConfig) -> int:
        patches = check_patches(config, "CLS attention")
        if not 1 <= self.keep <= patches:
            raise HimapError(f"cls:{self.keep}: the picture has {patches} image tokens: keep 1 to {patches}")
        return self.keep

    def __call__(self, model: LlavaModel, pixel_values: Tensor) -> Tensor:
        self.num_image_tokens(model.config)  # raises what does not suit
        features, attention, _ = last_layer(model, pixel_values)
        kept = keep_highest(attention, self.keep)
        return model.multi_modal_projector(features[:, 1:].take_along_dim(kept[..., None], dim=1))

    @torch.no_grad()
    def chosen(self, model: LlavaModel, pixel_values: Tensor) -> StageTrace:
        """Ranked once more, by the same function."""
        return drawn("class_to_image", last_layer(model, pixel_values)[1][0], self.keep)

    def flops(self, config: LlavaConfig) -> tuple[int, int]:
        """The class token's query, its scores, and keys once more (the layer makes its own)."""
        d, tokens = config.vision_config.hidden_size, config.vision_config.num_patches + 1
        ranking = 2 * d * d + 2 * tokens * d * d + 2 * tokens * d
        return vision_flops(config) + ranking, projector_flops(config, self.num_image_tokens(config))


@dataclass(frozen=True)
class AveragePool:
    """Averages the projected tokens over the patch grid down to side x side (adaptive where it does not divide)."""

    side: int

    def num_image_tokens(self, config: LlavaConfig) -> int:
        grid = config.vision_config.image_size // config.vision_config.patch_size
        if config.vision_feature_select_strategy != "default":
            raise HimapError("average pooling needs a grid of patches; this model keeps the class token among them")
        if not 1 <= self.side <= grid:
            raise HimapError(f"pool:{self.side}: the picture has {grid} x {grid} image tokens: a side of 1 to {grid}")
        return self.side**2

    def __call__(self, model: LlavaModel, pixel_values: Tensor) -> Tensor:
        self.num_image_tokens(model.config)  # raises what does not suit
        x = model.embed_image(pixel_values)  # (B, N, d)
        grid = x.mT.unflatten(2, (round(x.shape[1] ** 0.5), -1))  # (B, d, rows, columns)
        return F.adaptive_avg_pool2d(grid, self.side).flatten(2).mT

    def flops(self, config: LlavaConfig) -> tuple[int, int]:
        """The model's own: averaging multiplies no matrices."""
        return vision_flops(config), projector_flops(config)

    def chosen(self, model: LlavaModel, pixel_values: Tensor) -> None:
        """None is left out."""
