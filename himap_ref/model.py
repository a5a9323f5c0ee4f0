"""LLaVA: picture -> encoder -> projector -> decoder <- embeddings <- prompt. This class is the diagram."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor, nn

from .config import LlavaConfig
from .decoder import DecoderOutput, LlamaDecoder, Prefix
from .errors import HimapError
from .flops import Flops, count_flops, prefix_flops
from .generation import Sampling, clock, generate
from .image import ImageProcessor, load_image
from .projector import Projector
from .prompt import TEMPLATES, Prompt, encode_prompt, find_image_span
from .pruning import Stage, Trace
from .vision import VisionTower

Picture = str | Path | Image.Image


@dataclass
class Answer:
    """What `Llava.generate` returns for one prompt."""

    text: str
    token_ids: list[int]  # generated, an EOS included
    prompt_ids: list[int]  # image tokens expanded
    image_span: tuple[int, int] | None  # [start, stop) in prompt_ids
    finish: str  # "eos", "length" (max_new_tokens) or "context" (no position left)
    first_logits: Tensor  # (vocab,)
    trace: Trace  # of the prefill
    traces: list[Trace]  # with reprune one per token, else only `trace`
    flops: Flops
    seconds: dict[str, float]  # vision, prefill, decode


class ImageReducer(Protocol):
    """The seam for methods that prune before the decoder: they make fewer image tokens, all else stays."""

    def num_image_tokens(self, config: LlavaConfig) -> int:
        """N', as many as `embed_image` makes."""

    def embed_image(self, model: Llava, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, N', d)."""

    def flops(self, config: LlavaConfig) -> tuple[int, int]:
        """Encoder and projector, per picture, as `embed_image` runs them."""


class Llava(nn.Module):
    """The module tree bears llava-hf's names. `from_pretrained` fills it and reads what else a checkpoint holds."""

    tokenizer: Tokenizer  # only a checkpoint has one
    from_pretrained: ClassVar[Callable[..., Llava]]  # the door's: checkpoint/load.py

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config)
        self.multi_modal_projector = Projector(config)
        self.language_model = LlamaDecoder(config.text_config)
        self.image_processor = ImageProcessor()
        self.eos_token_ids: tuple[int, ...] = ()
        self.template = TEMPLATES["vicuna_v1"]
        self.prefix: tuple[list[int], Prefix] | None = None  # ids and what is known of them: see `cache_prefix`
        self.settings: dict = {}  # himap.json: "template", "stages" (the schedule that suits it), "note", "palette"

    def preprocess(self, image: Picture) -> Tensor:
        """A picture or its file -> pixel_values (1, 3, S, S), fp32 on the CPU."""
        return self.image_processor(load_image(image))

    def encode(self, question: str, num_image_tokens: int | None = None) -> Prompt:
        """Question -> ids with the image tokens (default: the model's N; 0: no picture) in place, and their span."""
        N = self.config.num_image_tokens if num_image_tokens is None else num_image_tokens
        image_token, vocab_size = self.config.image_token_index, self.config.text_config.vocab_size
        prompt = encode_prompt(self.tokenizer, question, self.template, image_token, N)
        if foreign := [id for id in prompt.ids if id >= vocab_size and id != image_token]:
            raise HimapError(f"the tokenizer gives id {foreign[0]}, the weights know {vocab_size}: not of one model")
        return prompt

    def embed_image(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, N, d) image tokens."""
        weight = self.multi_modal_projector.linear_1.weight
        return self.multi_modal_projector(self.vision_tower(pixel_values.to(weight.device, weight.dtype)))

    def embed(self, input_ids: Tensor, image_embeds: Tensor | None) -> tuple[Tensor, tuple[int, int] | None]:
        """(B, n) ids and (B, N, d) image tokens -> (B, n, d) embeddings, and the image span as the ids have it.

        Raises HimapError if the prompts' spans differ or do not have N places.
        """
        spans = {find_image_span(ids, self.config.image_token_index) for ids in input_ids.tolist()}
        if len(spans) > 1:
            raise HimapError("the prompts of a batch must have their image tokens at the same places")
        start, stop = span = spans.pop() or (0, 0)
        N = 0 if image_embeds is None else image_embeds.shape[1]
        if stop - start != N:
            raise HimapError(f"the prompt has {stop - start} image tokens, the picture {N}")
        input_ids = input_ids.to(self.language_model.norm.weight.device)
        before, after = (self.language_model.embed_tokens(ids) for ids in (input_ids[:, :start], input_ids[:, stop:]))
        if image_embeds is None:
            return after, None
        return torch.cat((before, image_embeds, after), dim=1), span  # the image token's own vector is never looked up

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        stages: Sequence[Stage] = (),
        all_rows: bool = False,
    ) -> DecoderOutput:
        """(B, n) ids, image tokens expanded, and (B, 3, S, S) -> the prefill's output (see `LlamaDecoder.forward`)."""
        image_embeds = None if pixel_values is None else self.embed_image(pixel_values)
        return self.language_model(*self.embed(input_ids, image_embeds), stages, all_rows)

    @torch.no_grad()
    def cache_prefix(self) -> int:
        """Computes what stands before the picture once; prompts that begin with it take it from there. -> its FLOPs.

        The answers' own FLOPs are without it from then on; their vanilla computes it. Off: `model.prefix = None`.
        """
        prompt = self.encode("?", num_image_tokens=1)
        ids = prompt.ids[: prompt.ids.index(self.config.image_token_index)]
        embeds = self.language_model.embed_tokens(torch.tensor([ids], device=self.language_model.norm.weight.device))
        self.prefix = ids, self.language_model.compute_prefix(embeds)
        return prefix_flops(self.config.text_config, self.prefix[1].trace)

    @torch.no_grad()
    def generate(
        self,
        image: Picture | None | Sequence[Picture | None],
        prompt: str | Sequence[str],
        stages: Sequence[Stage] = (),
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        reprune: bool = False,
        on_text: Callable[[str], None] | None = None,
        reducer: ImageReducer | None = None,
    ) -> Answer | list[Answer]:
        """Answers a question about a picture (None: no picture, so the stages have nothing to prune).

        Lists of pictures and questions are a batch, and a list comes back: prompts of equal length, each picture pruned
        by its own scores. reprune: see `generation.generate`. on_text receives the (first) answer piece by piece.
        reducer: makes the image tokens in the model's place.
        Raises HimapError for input that does not fit.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        alone = image is None or isinstance(prompt, str)
        images: list[Any] = [image] * len(prompts) if alone else list(image)  # type: ignore[arg-type]
        if not prompts or len(images) != len(prompts) or len({picture is None for picture in images}) > 1:
            raise HimapError(f"a batch of {len(prompts)} questions needs as many pictures, or None")
        N = None if reducer is None else reducer.num_image_tokens(self.config)
        encoded = [self.encode(question, 0 if images[0] is None else N) for question in prompts]
        if len(lengths := {len(p.ids) for p in encoded}) > 1:
            raise HimapError(f"the prompts of a batch must have equal lengths, not {sorted(lengths)} tokens")

        device, image_embeds = self.language_model.norm.weight.device, None
        start = clock(device)
        if images[0] is not None:
            pixel_values = torch.cat([self.preprocess(picture) for picture in images])
            image_embeds = reducer.embed_image(self, pixel_values) if reducer else self.embed_image(pixel_values)
        x, span = self.embed(torch.tensor([p.ids for p in encoded]), image_embeds)
        ids, prefix = self.prefix or ([], None)
        fits = span and all(p.ids[: len(ids)] == ids for p in encoded)  # not, if the template has changed since
        seconds = {"vision": clock(device) - start}
        out = generate(
            self.language_model, x, span, stages if span else (), max_new_tokens, self.eos_token_ids,
            Sampling(temperature, top_p, seed), reprune, self._streamer(on_text) if on_text else None,
            prefix if fits else None,
        )  # fmt: skip
        answers = []
        for b, ids in enumerate(out.token_ids):
            traces = [trace.item(b) for trace in out.traces[: len(ids)]]
            steps = [trace.layers for trace in traces[1:]] if reprune else out.decode_layers
            answers.append(Answer(
                text=self.tokenizer.decode(ids, skip_special_tokens=True).strip(), token_ids=ids,
                prompt_ids=encoded[b].ids, image_span=span, finish=out.finish[b], first_logits=out.first_logits[b],
                trace=traces[0], traces=traces, seconds={**seconds, **out.seconds},
                flops=count_flops(self.config, x.shape[1], span, traces[0].layers, steps[: len(ids) - 1],
                                  reducer.flops(self.config) if reducer and span else None),
            ))  # fmt: skip
        return answers[0] if isinstance(prompt, str) else answers

    def _streamer(self, on_text: Callable[[str], None]) -> Callable[[int], None]:
        """Token ids to text as it becomes readable: bytes that are no whole character yet are held back."""
        stream, begun = DecodeStream(skip_special_tokens=True), False

        def on_token(token_id: int) -> None:
            nonlocal begun
            piece = stream.step(self.tokenizer, token_id) or ""
            if piece := piece if begun else piece.lstrip():  # no space before the first word
                begun = True
                on_text(piece)

        return on_token
