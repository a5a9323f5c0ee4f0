"""LLaVA: picture -> encoder -> projector -> decoder <- embeddings <- prompt. This class is the diagram."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor, nn

from .config import LlavaConfig, read_json
from .decoder import DecoderOutput, LlamaDecoder
from .errors import HimapError
from .flops import Flops, count_flops
from .generation import Sampling, generate
from .image import ImageProcessor, load_image
from .projector import Projector
from .prompt import TEMPLATES, Prompt, encode_prompt, find_image_span
from .pruning import Stage, Trace, parse_stages
from .vision import VisionTower
from .weights import find_folder, load_weights


@dataclass
class Answer:
    """What `Llava.generate` returns for one prompt."""

    text: str
    token_ids: list[int]  # generated, an EOS included
    prompt_ids: list[int]  # image tokens expanded
    image_span: tuple[int, int] | None  # [start, stop) in prompt_ids
    finish: str  # "eos", "length" or "context"
    first_logits: Tensor  # (vocab,)
    trace: Trace  # of the prefill
    traces: list[Trace]  # with reprune one per token, else only `trace`
    flops: Flops
    seconds: dict[str, float]  # vision, prefill, decode


class Llava(nn.Module):
    """The module tree bears llava-hf's names. `from_pretrained` fills it and adds what belongs to the checkpoint."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config)
        self.multi_modal_projector = Projector(config)
        self.language_model = LlamaDecoder(config.text_config)
        # What from_pretrained reads beside the weights:
        self.tokenizer: Tokenizer | None = None
        self.image_processor = ImageProcessor()
        self.eos_token_ids: tuple[int, ...] = ()
        self.template = TEMPLATES["vicuna_v1"]
        self.stages: tuple[Stage, ...] | None = None  # the schedule that a folder recommends for itself (himap.json)
        self.note = ""  # what a folder says about itself (himap.json)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", revision: str | None = None
    ) -> Llava:
        """From a folder, a hub id or a short name (`weights.SHORT_NAMES`).

        Built on the meta device, strict; on the CPU in the file's own dtype the tensors stay mapped from the file.
        Raises HimapError that names the file or tensor at fault.
        """
        folder = find_folder(source, revision)
        config = LlavaConfig.from_file(folder / "config.json")
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, config, folder, dtype, torch.device(device))
        model.tokenizer = _read_tokenizer(folder / "tokenizer.json")
        model.image_processor = _read_image_processor(folder, config.vision_config.image_size)
        model.eos_token_ids = _read_eos(folder)
        if (folder / "himap.json").exists():
            ours = read_json(folder / "himap.json")
            model.template = ours.get("template", model.template)
            model.note = ours.get("note", "")
            model.stages = parse_stages(ours["stages"], trusted=False) if "stages" in ours else None
        return model.eval()

    def preprocess(self, image: str | Path | Image.Image) -> Tensor:
        """A picture or its file -> pixel_values (1, 3, S, S), fp32 on the CPU."""
        return self.image_processor(load_image(image))

    def encode(self, question: str, has_image: bool = True) -> Prompt:
        """Question -> ids with the image tokens in place, and their span."""
        return encode_prompt(
            self.tokenizer, question, self.template, self.config.image_token_index, self.config.num_image_tokens, has_image
        )

    def embed_image(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, N, d) image tokens."""
        weight = self.multi_modal_projector.linear_1.weight
        return self.multi_modal_projector(self.vision_tower(pixel_values.to(weight.device, weight.dtype)))

    def embed(self, input_ids: Tensor, image_embeds: Tensor | None = None) -> tuple[Tensor, tuple[int, int] | None]:
        """(B, n) ids and (B, N, d) image tokens -> (B, n, d) embeddings and the image span, found in the ids.

        Raises HimapError if the prompts' spans differ or do not have N places.
        """
        spans = {find_image_span(ids, self.config.image_token_index) for ids in input_ids.tolist()}
        if len(spans) != 1:
            raise HimapError("the prompts of a batch must have their image tokens at the same places")
        span, found = spans.pop(), 0 if image_embeds is None else image_embeds.shape[1]
        places = span[1] - span[0] if span else 0
        if places != found:
            raise HimapError(f"the prompt has {places} image tokens, the picture {found}")
        x = self.language_model.embed_tokens(input_ids.to(self.language_model.embed_tokens.weight.device))
        return (torch.cat((x[:, : span[0]], image_embeds, x[:, span[1] :]), dim=1) if span else x), span

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, stages: Sequence[Stage] = (), all_rows: bool = False
    ) -> DecoderOutput:
        """(B, n) ids, image tokens expanded, and (B, 3, S, S) -> the prefill's output (see `LlamaDecoder.forward`)."""
        image_embeds = None if pixel_values is None else self.embed_image(pixel_values)
        x, span = self.embed(input_ids, image_embeds)
        return self.language_model(x, span, stages, all_rows)

    @torch.inference_mode()
    def generate(
        self,
        image: str | Path | Image.Image | None | Sequence,
        prompt: str | Sequence[str],
        stages: Sequence[Stage] = (),
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        reprune: bool = False,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer | list[Answer]:
        """Answers a question about a picture (None: no picture; the stages then have nothing to prune).

        Lists of pictures and questions are a batch, and a list comes back; the prompts must have equal lengths, and each
        picture is pruned by its own scores. on_text receives the (first) answer piece by piece. reprune: see
        `generation.generate`. Raises HimapError for input that does not fit.
        """
        if isinstance(prompt, str):
            images, prompts = [image], [prompt]
        else:
            images, prompts = list(image) if image is not None else [None] * len(prompt), list(prompt)
        if len(images) != len(prompts) or len({picture is None for picture in images}) > 1:
            raise HimapError(f"a batch needs one picture for each of its {len(prompts)} questions, or none at all")
        encoded = [self.encode(question, picture is not None) for picture, question in zip(images, prompts, strict=True)]
        if len({len(p.ids) for p in encoded}) > 1:
            raise HimapError(f"the prompts of a batch must have equal lengths, not {[len(p.ids) for p in encoded]} tokens")

        start, image_embeds = time.perf_counter(), None
        if images[0] is not None:
            image_embeds = self.embed_image(torch.cat([self.preprocess(picture) for picture in images]))
        x, span = self.embed(torch.tensor([p.ids for p in encoded]), image_embeds)
        vision_seconds = time.perf_counter() - start
        stream = DecodeStream(skip_special_tokens=True)  # holds back bytes that are no character yet

        def on_token(id: int) -> None:
            if piece := stream.step(self.tokenizer, id):
                on_text(piece)

        out = generate(
            self.language_model, x, span, stages if span else (), max_new_tokens, self.eos_token_ids,
            Sampling(temperature, top_p, seed), reprune, on_token if on_text else None,
        )  # fmt: skip
        answers = []
        for b, ids in enumerate(out.token_ids):
            decode = [trace.layers for trace in out.traces[1:]] if reprune else out.decode_layers
            traces = [trace.item(b) for trace in out.traces]
            answers.append(Answer(
                text=self.tokenizer.decode(ids, skip_special_tokens=True).strip(), token_ids=ids, prompt_ids=encoded[b].ids,
                image_span=span, finish=out.finish[b], first_logits=out.first_logits[b], trace=traces[0], traces=traces,
                flops=count_flops(self.config, x.shape[1], span, out.traces[0].layers, decode[: len(ids) - 1]),
                seconds={"vision": vision_seconds, **out.seconds},
            ))  # fmt: skip
        return answers[0] if isinstance(prompt, str) else answers


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise HimapError(f"{path}: missing; a folder needs the fast tokenizer's file (transformers: save_pretrained)")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise HimapError(f"{path}: not a tokenizer ({error})") from None


def _read_image_processor(folder: Path, image_size: int) -> ImageProcessor:
    """transformers 4 writes preprocessor_config.json; 5 may put the same inside processor_config.json."""
    if (folder / "preprocessor_config.json").exists():
        data = read_json(folder / "preprocessor_config.json")
    elif (folder / "processor_config.json").exists():
        data = read_json(folder / "processor_config.json").get("image_processor", {})
    else:
        data = {}
    processor = ImageProcessor.from_dict({"size": image_size, "crop_size": image_size, **data})
    if (processor.crop_size or processor.size) != (image_size, image_size):
        raise HimapError(f"{folder}: the preprocessor makes pictures of {processor.crop_size}, the encoder takes {image_size}")
    return processor


def _read_eos(folder: Path) -> tuple[int, ...]:
    """From generation_config.json, else config.json, else LLaMA's 2."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            data = read_json(folder / name)
            eos = data.get("eos_token_id", (data.get("text_config") or {}).get("eos_token_id"))
            if eos is not None:
                return tuple(eos) if isinstance(eos, list) else (eos,)
    return (2,)
