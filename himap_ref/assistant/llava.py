"""`Llava`: the model with its tokenizer and picture settings, loaded from a checkpoint, answering questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..anyres import most_image_tokens, num_image_tokens
from ..cache import LayerCache
from ..checkpoint.config import read_config, read_eos, read_image_processor, read_settings
from ..checkpoint.files import find_folder, read_json, read_tokenizer
from ..checkpoint.load import find_tensors, load_weights, settle_head
from ..config import LlavaConfig
from ..errors import HimapError
from ..flops import pass_flops, projector_flops, vision_flops
from ..generation import clock, generate
from ..image import ImageProcessor
from ..kernels import single_rows
from ..methods.reducers import ImageReducer, check_grid
from ..methods.schedules import parse_stages
from ..model import LlavaModel
from ..prompt import TEMPLATES, encode_prompt
from ..pruning import Stages, stages_by_layer
from ..sampling import Sampling
from .answer import Answer, Past, count_flops
from .chat_template import read_template
from .device import find_device
from .picture import Picture, load_image
from .text import Stream, text_of

if TYPE_CHECKING:  # which a torch without its distributed engine lacks
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Seen:
    """The pictures of one prompt, as the decoder gets them."""

    tokens: Tensor | None = None  # (N, d), of all of them
    counts: Sequence[int] = ()  # how many of each
    whole: int = 0  # how many without a reducer
    looks: int = 0  # how often the encoder ran


def listed(image: Any) -> list[Picture]:
    """A picture, several or None, as a list."""
    return list(image) if isinstance(image, list | tuple) else [] if image is None else [image]


class Llava(LlavaModel):
    """`from_pretrained` fills it and reads what else a checkpoint holds."""

    tokenizer: Tokenizer  # only a checkpoint has one

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.image_processor = ImageProcessor()
        self.eos_token_ids: tuple[int, ...] = ()
        self.template = TEMPLATES["vicuna_v1"]
        self.settings: dict = {}  # himap.json: "template", "stages" (that suit it), what it knows: `commands.known`

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        mesh: DeviceMesh | None = None,
    ) -> Llava:
        """From a folder, a hub id or a short name (`checkpoint.files.SHORT_NAMES`).

        Built on the meta device, strict; on the CPU and in the file's own dtype, tensors stay mapped from the file.
        mesh: of processes that hold the decoder together, each a part (see `parallel`), and ask it the same.
        Raises HimapError that names the file or tensor at fault.
        """
        device, folder = find_device(device, dtype), find_folder(source, revision)
        read_config(data := read_json(folder / "config.json"))  # refuses other models before anything else is read
        tokenizer = read_tokenizer(folder)
        config, tensors = read_config(data, tokenizer.token_to_id("<image>")), find_tensors(folder)
        with torch.device("meta"):
            model = cls(settle_head(config, tensors))
        model.tokenizer = tokenizer
        model.image_processor = read_image_processor(
            folder, config.vision_config.image_size, config.image_grid_pinpoints
        )
        model.eos_token_ids = read_eos(folder)
        model.settings = read_settings(folder)
        model.template = model.settings.get("template") or read_template(folder)[0] or model.template
        if "stages" in model.settings:
            model.himap = parse_stages(model.settings["stages"], trusted=False)
        if mesh:
            from .. import parallel  # a second more, which one process does not need

            parallel.split(model.language_model, mesh)
        load_weights(model, folder, tensors, dtype, device, parallel.own_part if mesh else None)  # takes longest
        if not mesh:
            single_rows(model.language_model)
        return model.eval()

    def preprocess(self, image: Picture) -> Tensor:
        """A picture or its file -> pixel_values (1, 3, S, S), fp32 on the CPU; LLaVA-NeXT: (looks, 3, S, S)."""
        return self.image_processor(load_image(image))

    def encode(
        self, question: str, num_image_tokens: int | Sequence[int] | None = None, past: Past | None = None
    ) -> list[int]:
        """Question -> ids, the image tokens (default: the model's N, LLaVA-NeXT's largest; 0: no picture; a number each
        of several pictures) in place.

        Behind a conversation so far, it is the next turn. Raises HimapError if the ids do not go on from `past`.
        """
        N = most_image_tokens(self.config) if num_image_tokens is None else num_image_tokens
        image_token, vocab_size = self.config.image_token_index, self.config.text_config.vocab_size
        if past and past.is_conversation:
            said = past.ids[:-1] if past.ids[-1] in self.eos_token_ids else past.ids
            eos = past.ids[len(said) :] or self.eos_token_ids[:1]  # if the template does not say what ends an answer
            text = self.tokenizer.id_to_token(eos[0]) if eos else None
            ids = said + encode_prompt(self.tokenizer, question, self.template, image_token, 0, text or "")
        else:
            ids = encode_prompt(self.tokenizer, question, self.template, image_token, N)
        if foreign := [id for id in ids if id >= vocab_size and id != image_token]:
            raise HimapError(f"the tokenizer gives id {foreign[0]}, the weights know {vocab_size}: not of one model")
        if past and ids[: past.length] != past.ids[: past.length]:
            raise HimapError("the prompt does not begin with the prefix: it was computed for another template")
        return ids

    def fingerprint(self) -> list:
        """By which a `Past` knows the decoder that computed it: another after any change of weight, dtype or device."""
        weights = [*self.language_model.parameters()]  # those loaded in inference mode have no version
        return [(p.data_ptr(), None if p.is_inference() else p._version, p.dtype, p.device) for p in weights]

    @torch.no_grad()
    def prefix(self) -> Past:
        """What stands before the picture, computed once: `generate(..., past=prefix)` takes it from there.

        Attention is causal, so no picture or question changes it. Raises HimapError if nothing stands there.
        """
        ids = self.encode("?", num_image_tokens=1)
        ids = ids[: ids.index(self.config.image_token_index)]
        if not ids:
            raise HimapError("nothing stands before the picture, neither BOS nor text: there is no prefix to compute")
        cache = self.language_model(self.embed(ids, None)[None]).cache
        cache = [layer.item(0) for layer in cache]  # without room to write in: many may go on from it at once
        return Past(ids, cache, self.fingerprint(), len(ids))

    @torch.no_grad()
    def generate(
        self,
        image: Picture | None | Sequence[Picture | None | Sequence[Picture]],
        prompt: str | Sequence[str],
        stages: Stages = (),
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        reprune: bool = False,
        on_text: Callable[[str], None] | None = None,
        reducer: ImageReducer | None = None,
        past: Past | None = None,
    ) -> Answer | list[Answer]:
        """Answers a question about a picture or a list of them (None: no picture, so the stages have nothing to prune).

        A list of questions is a batch, and a list comes back: of any lengths, each pruned by its own scores, about one
        picture or about a list with one for each question, or a list of them for each; image tokens stand at the same
        places in all prompts of a batch. Several pictures of one question stand before it, one behind the other
        (`<image>` and its line break once for each), and are ranked together. stages: "himap" is what the weights
        recommend. reprune: see `generation.generate`. on_text receives the (first) answer piece by piece. reducer:
        makes the image tokens in the model's place. past: a prefix, or an answer's `past`, whose next turn this is
        (image: None, it has been seen). Raises HimapError for input that does not fit.
        """
        questions = [prompt] if isinstance(prompt, str) else list(prompt)
        is_batch = isinstance(image, list | tuple) and not isinstance(prompt, str)
        each_image: Any = image if is_batch else [image] * len(questions)
        pictures = [listed(one) for one in each_image]  # of each question
        self._check(pictures, questions, past)
        stages = self.himap if stages == "himap" else stages
        stages_by_layer(stages, len(self.language_model.layers))  # checked without a picture, too
        config, decoder, device = self.config, self.language_model, self.language_model.norm.weight.device
        begun, seen = clock(device), self._look(pictures, reducer) if pictures[0] else [Seen()] * len(questions)
        N = sum(seen[0].counts)
        pruned_before = seen[0].whole - N
        encoded = [self.encode(question, each.counts, past) for question, each in zip(questions, seen, strict=True)]
        start = past.length if past else 0
        if past and past.is_conversation:  # of which any token may be part, the image token as a word, too
            prompts = [decoder.embed_tokens(torch.tensor(ids[start:], device=device)) for ids in encoded]
            span, pruned_before = past.image_span, past.pruned_before
        else:
            prompts = [self.embed(ids[start:], each.tokens) for ids, each in zip(encoded, seen, strict=True)]
            span = self.image_span(encoded)
        seeing = clock(device) - begun
        stream = Stream(self.tokenizer, on_text) if on_text else None
        out = generate(
            decoder, prompts, span if N else None, stages if N else (),
            max_new_tokens, self.eos_token_ids, Sampling(temperature, top_p, seed), reprune,
            stream, past.cache if past else None, start,
        )  # fmt: skip
        if stream:
            stream.finish()
        look = vision_flops(config), projector_flops(config)
        reduced = reducer.flops(config) if reducer else look
        executed = len(prompts) * sum(pass_flops(config.text_config, trace.layers) for trace in out.traces)
        answers = []
        for b, (ids, asked) in enumerate(zip(out.token_ids, encoded, strict=True)):
            n = len(asked) + pruned_before
            cached = n - len(prompts[b]) if past and past.is_conversation else 0  # a prefix is no vanilla run's
            traces = [trace.item(b) for trace in out.traces[: len(ids)]]
            encoding, own = ((seen[b].looks * flops[0], seen[b].looks * flops[1]) for flops in (reduced, look))
            answers.append(Answer(
                text=text_of(self.tokenizer, ids), token_ids=ids, prompt_ids=asked,
                image_span=span, finish=out.finish[b], first_logits=out.first_logits[b], traces=traces,
                flops=count_flops(config, traces, n - cached, cached, encoding, own), batch_flops=executed,
                seconds={"vision": seeing, **out.seconds},
                make_past=self._past_of(b, asked + ids, out.cache, span, pruned_before),
            ))  # fmt: skip
        return answers[0] if isinstance(prompt, str) else answers

    def _look(self, pictures: Sequence[Sequence[Picture]], reducer: ImageReducer | None) -> list[Seen]:
        """All pictures of all prompts through the encoder at once."""
        if reducer:
            check_grid(self.config, "a reducer", "take stages")
        loaded = [[load_image(picture) for picture in each] for each in pictures]
        sizes = [[(picture.height, picture.width) for picture in each] for each in loaded]
        whole = [[num_image_tokens(size, self.config) for size in each] for each in sizes]
        if len(totals := sorted({sum(each) for each in whole})) > 1:
            told = " and ".join(map(str, totals))
            raise HimapError(f"the prompts of a batch must have equally many image tokens, not {told}: ask one by one")
        pixels = [torch.cat([self.preprocess(picture) for picture in each]) for each in loaded]
        every = torch.cat(pixels)
        x = reducer(self, every) if reducer else self.embed_image(every, [size for each in sizes for size in each])
        counts = [[x.shape[1]] * len(each) for each in whole] if reducer else whole
        tokens = x.reshape(len(pictures), -1, x.shape[-1])  # (B, N, d)
        return [Seen(tokens[b], counts[b], sum(whole[b]), len(pixels[b])) for b in range(len(pictures))]

    def _past_of(
        self, b: int, ids: list[int], cache: list[LayerCache], span: tuple[int, ...] | None, pruned_before: int
    ) -> Callable[[], Past]:
        """Made when it is asked for: it copies prompt `b`'s part of the batch's cache."""
        fingerprint = self.fingerprint()
        return lambda: Past(ids, [layer.item(b) for layer in cache], fingerprint, len(ids) - 1, span, pruned_before)

    def _check(self, pictures: Sequence[Sequence], questions: Sequence[str], past: Past | None) -> None:
        with_pictures = {len(each) > 0 for each in pictures}
        if not questions or len(pictures) != len(questions) or len(with_pictures) > 1:
            raise HimapError(f"a batch of {len(questions)} questions needs as many pictures, or None")
        if past and past.weights != self.fingerprint():
            raise HimapError("the prefix or conversation was computed by other weights, or on another dtype or device")
        if past and past.is_conversation and pictures[0]:
            raise HimapError("a later turn is about the picture of the first: give None for its picture")
