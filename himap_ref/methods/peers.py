"""The field's other ways to enter the decoder with fewer image tokens: by diversity, by merging, by a smaller picture.

Each follows its published rule at HiMAP's seam (`ImageReducer`), so all are asked and counted alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from ..config import LlavaConfig
from ..errors import HimapError
from ..flops import StageTrace, projector_flops, vision_flops
from ..model import LlavaModel
from .reducers import check_patches, drawn, last_layer


@dataclass(frozen=True)
class DivPrune:
    """Keeps `keep` image tokens as unlike each other as can be: next comes always the one farthest from all chosen.

    Source: arXiv 2503.02175, as its code has it: cosine distance of projected tokens; the first is the token whose
    nearest neighbour is farthest.
    """

    keep: int

    def num_image_tokens(self, config: LlavaConfig) -> int:
        if not 1 <= self.keep <= config.num_image_tokens:
            N = config.num_image_tokens
            raise HimapError(f"divprune:{self.keep}: the picture has {N} image tokens: keep 1 to {N}")
        return self.keep

    def __call__(self, model: LlavaModel, pixel_values: Tensor) -> Tensor:
        self.num_image_tokens(model.config)  # raises what does not suit
        x = model.embed_image(pixel_values)
        return x.take_along_dim(self.choose(x).sort(dim=1).values[..., None], dim=1)

    def choose(self, x: Tensor) -> Tensor:
        """(B, N, d) tokens -> (B, keep) places, in the order in which they are chosen."""
        unit = F.normalize(x.float(), dim=-1)
        distance = 1 - unit @ unit.mT  # (B, N, N)
        distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        chosen: list[Tensor] = []
        nearest = distance.amin(dim=1)  # (B, N): to any other token; from now on to a chosen one
        for _ in range(self.keep):
            farthest = nearest.argmax(dim=1, keepdim=True)  # (B, 1)
            to_it = distance.take_along_dim(farthest[..., None], dim=1)[:, 0]
            nearest = (to_it if not chosen else nearest.minimum(to_it)).scatter(1, farthest, -torch.inf)
            chosen.append(farthest)
        return torch.cat(chosen, dim=1)

    @torch.no_grad()
    def chosen(self, model: LlavaModel, pixel_values: Tensor) -> StageTrace:
        """The earlier chosen, the higher the score."""
        places = self.choose(model.embed_image(pixel_values))[0].cpu()
        scores = torch.zeros(model.config.num_image_tokens).scatter(0, places, torch.arange(len(places), 0, -1.0))
        return drawn("unlike_the_chosen", scores, self.keep)

    def flops(self, config: LlavaConfig) -> tuple[int, int]:
        """The projector's with all cosines of pairs."""
        N, d = config.num_image_tokens, config.text_config.hidden_size
        return vision_flops(config), projector_flops(config) + 2 * N * N * d


@dataclass(frozen=True)
class VisionZip:
    """`keep` tokens: the class token and the patches it attends to most, and what is left merged into a few.

    Source: arXiv 2412.04467, as its code has it: 10 of 64 are merged ones. Every so-manieth of the patches left is a
    target, to which the mean of those is added whose key (mean over heads) is most like its key.
    """

    keep: int

    @property
    def merged(self) -> int:
        return max(1, round(self.keep * 10 / 64))

    def num_image_tokens(self, config: LlavaConfig) -> int:
        patches = check_patches(config, "VisionZip")
        if not 3 <= self.keep <= patches:
            raise HimapError(f"visionzip:{self.keep}: the picture has {patches} image tokens: keep 3 to {patches}")
        return self.keep

    def __call__(self, model: LlavaModel, pixel_values: Tensor) -> Tensor:
        self.num_image_tokens(model.config)  # raises what does not suit
        features, attention, keys = last_layer(model, pixel_values)  # (B, T, d), (B, P), (B, T, c)
        order = attention.argsort(dim=1, descending=True, stable=True) + 1  # places in T
        dominant = order[:, : self.keep - self.merged - 1].sort(dim=1).values
        left = order[:, self.keep - self.merged - 1 :].sort(dim=1).values  # (B, R)
        step = max(1, left.shape[1] // self.merged)
        is_target = torch.zeros(left.shape[1], dtype=torch.bool, device=left.device)
        is_target[: step * self.merged : step] = True
        unit = F.normalize(keys.take_along_dim(left[..., None], dim=1), dim=-1)
        best = (unit[:, ~is_target] @ unit[:, is_target].mT).argmax(dim=2)  # (B, R - M): the target of each other one
        x = features.take_along_dim(left[..., None], dim=1)
        members = F.one_hot(best, self.merged).to(x.dtype).mT  # (B, M, R - M)
        mean = members @ x[:, ~is_target] / members.sum(dim=2, keepdim=True).clamp(min=1)
        kept = torch.cat((features[:, :1], features.take_along_dim(dominant[..., None], dim=1)), dim=1)
        return model.multi_modal_projector(torch.cat((kept, x[:, is_target] + mean), dim=1))

    @torch.no_grad()
    def chosen(self, model: LlavaModel, pixel_values: Tensor) -> StageTrace:
        """The patches kept as they are; the others are in the merged tokens."""
        attention = last_layer(model, pixel_values)[1][0]
        return drawn("class_to_image", attention, self.keep - self.merged - 1)

    def flops(self, config: LlavaConfig) -> tuple[int, int]:
        """With the class token's query and its scores, keys once more, key likeness, and the merging product."""
        d, tokens = config.vision_config.hidden_size, config.vision_config.num_patches + 1
        c, left = d // config.vision_config.num_attention_heads, tokens - self.keep + self.merged
        ranking = 2 * d * d + 2 * tokens * d * d + 2 * tokens * d
        merging = 2 * (left - self.merged) * self.merged * (c + d * len(config.feature_layers))
        return vision_flops(config) + ranking + merging, projector_flops(config, self.num_image_tokens(config))


@dataclass(frozen=True)
class Downsample:
    """The control: no choice at all, but a smaller picture of `side` x `side` patches (as VTC-Bench has it).

    The encoder's position embeddings are interpolated as in transformers (`interpolate_pos_encoding`).
    """

    side: int

    def _config(self, config: LlavaConfig) -> LlavaConfig:
        vision = config.vision_config
        if not 1 <= self.side <= vision.image_size // vision.patch_size:
            most = vision.image_size // vision.patch_size
            raise HimapError(f"down:{self.side}: the picture has {most} x {most} patches: a side of 1 to {most}")
        return replace(config, vision_config=replace(vision, image_size=self.side * vision.patch_size))

    def num_image_tokens(self, config: LlavaConfig) -> int:
        return self._config(config).num_image_tokens

    def __call__(self, model: LlavaModel, pixel_values: Tensor) -> Tensor:
        size, weight = self._config(model.config).vision_config.image_size, model.multi_modal_projector.linear_1.weight
        small = F.interpolate(pixel_values.float(), (size, size), mode="bicubic", antialias=True)
        positions = model.vision_tower.embeddings.position_embedding.weight  # (P + 1, d), the class token's first
        grid = positions[None, 1:].float().mT.unflatten(2, (round((len(positions) - 1) ** 0.5), -1))  # rows, columns
        grid = F.interpolate(grid, (self.side, self.side), mode="bicubic").flatten(2)[0].mT
        named = {"embeddings.position_embedding.weight": torch.cat((positions[:1], grid.to(weight.dtype)))}
        features = functional_call(model.vision_tower, named, small)
        return model.multi_modal_projector(features)

    def chosen(self, model: LlavaModel, pixel_values: Tensor) -> None:
        """Every token is of the whole, smaller picture."""

    def flops(self, config: LlavaConfig) -> tuple[int, int]:
        smaller = self._config(config)
        return vision_flops(smaller), projector_flops(smaller)
