"""LLaVA: picture -> encoder -> projector -> decoder <- embeddings <- ids. This class is the diagram."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .anyres import Size, pack
from .config import LlavaConfig
from .decoder import DecoderOutput, LlamaDecoder
from .errors import HimapError
from .projector import Projector
from .pruning import HIMAP, Stage, Stages
from .vision import VisionTower


def find_image_span(ids: Sequence[int], image_token: int) -> tuple[int, ...] | None:
    """(start, stop) of the image tokens, of several pictures (start, stop, start, stop, ...); None without any."""
    is_image = [False, *(id == image_token for id in ids), False]
    return tuple(i for i, (before, here) in enumerate(pairwise(is_image)) if before != here) or None


class LlavaModel(nn.Module):
    """Works on pixels and ids; `assistant.Llava` on pictures and words. The module tree bears llava-hf's names."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.himap: Sequence[Stage] = HIMAP  # what "himap" means here: weights may recommend a schedule of their own
        self.vision_tower = VisionTower(config)
        self.multi_modal_projector = Projector(config)
        self.language_model = LlamaDecoder(config.text_config)
        if config.image_grid_pinpoints:  # LLaVA-NeXT
            self.image_newline = nn.Parameter(torch.zeros(config.text_config.hidden_size))

    def embed_image(self, pixel_values: Tensor, image_sizes: Sequence[Size] = ()) -> Tensor:
        """(B, 3, S, S) -> (B, N, d) image tokens. LLaVA-NeXT: (looks, 3, S, S) and B sizes -> (1, all pictures', d)."""
        x = self.multi_modal_projector(self.vision_tower(pixel_values))
        return pack(x, image_sizes, self.config, self.image_newline)[None] if self.config.image_grid_pinpoints else x

    def image_span(self, prompts: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
        """Where all prompts of a batch have their image tokens; raises HimapError if they do not agree."""
        spans = {find_image_span(ids, self.config.image_token_index) for ids in prompts}
        if len(spans) != 1:
            raise HimapError("the prompts of a batch must have their image tokens at the same places")
        return spans.pop()

    def embed(self, ids: Sequence[int], image_embeds: Tensor | None) -> Tensor:
        """One prompt's n ids and (N, d) image tokens -> (n, d). Raises HimapError if it has not N places for them."""
        tokens, N = torch.tensor(ids, dtype=torch.long), 0 if image_embeds is None else len(image_embeds)
        is_image = tokens == self.config.image_token_index  # which is never looked up
        if (places := int(is_image.sum())) != N:
            raise HimapError(f"the prompt has {places} image tokens, the picture {N}")
        words = self.language_model.embed_tokens(tokens[~is_image].to(self.language_model.norm.weight.device))
        x = words.new_empty(len(ids), words.shape[1])
        x[~is_image], x[is_image] = words, words[:0] if image_embeds is None else image_embeds
        return x

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, stages: Stages = (), all_rows: bool = False,
        image_sizes: Sequence[Size] = (),
    ) -> DecoderOutput:  # fmt: skip
        """(B, n) ids, image tokens expanded, no padding, and (B, 3, S, S) -> the prefill: see `LlamaDecoder`."""
        prompts, stages = input_ids.tolist(), self.himap if stages == "himap" else stages
        ends = (input_ids == self.config.image_token_index).sum(dim=1).cumsum(dim=0)[:-1].cpu()
        every = None if pixel_values is None else self.embed_image(pixel_values, image_sizes).flatten(0, 1)
        images = [None] * len(prompts) if every is None else every.tensor_split(ends)
        x = torch.stack([self.embed(ids, image) for ids, image in zip(prompts, images, strict=True)])
        return self.language_model(x, self.image_span(prompts), stages, all_rows)
