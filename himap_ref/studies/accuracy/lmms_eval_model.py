"""This model inside lmms-eval 0.7 (github.com/EvolvingLMMs-Lab/lmms-eval), which brings the public benchmarks.

    lmms-eval --model himap_ref --model_args weights=llava-1.5-7b,method=himap,device=cuda --tasks pope,mme

It is found through the entry point `lmms_eval.models` in pyproject.toml; the model arguments are those of `HimapRef`.
A task's text becomes the question in the model's own template. Beside the scores, lmms-eval's "Throughput Summary" and
results file hold each task's FLOPs relative to no pruning, `avg_flops_ratio_TASK` (of several processes, the first's).
"""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from ...assistant import Answer
from ...commands.options import EMBEDDED, load_model
from ...errors import HimapError
from ...methods.schedules import parse_method

MANIFEST = ModelManifest("himap_ref", simple_class_path=f"{__name__}.HimapRef")
DTYPES = ("float32", "bfloat16", "float16")

# ---------------------------------------------------------------- a task's generation_kwargs

MAX_NEW_TOKENS = 1024  # where a task sets none, as for lmms-eval's own LLaVA
FILLER = ["\n\n"]  # `until` where a task sets none: a few-shot delimiter, which would cut answers after a paragraph
READ = ("max_new_tokens", "do_sample", "temperature", "top_p", "until")
IGNORED = ("image_aspect_ratio",)  # how pictures are made square is for the weights and `pad` to say
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1}  # what tasks say that want nothing special


class Sampling(NamedTuple):
    """Arguments of `Llava.generate`."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


def read_sampling(options: dict[str, Any], seed: int = 0) -> Sampling:
    """`do_sample: false` is greedy whatever the temperature. Raises HimapError for what `Llava.generate` cannot do."""
    for name, value in options.items():
        if name not in (*READ, *IGNORED) and value not in (None, NEUTRAL.get(name)):
            raise HimapError(f"generation option {name}={value!r} is not supported: expected {', '.join(READ)}")
    sample, limit = options.get("do_sample"), options.get("max_new_tokens")
    temperature, top_p = options.get("temperature"), options.get("top_p")
    if temperature is None:
        temperature = 1.0 if sample else 0.0
    if sample is False or temperature == 0:
        temperature, top_p = 0.0, None  # greedy tasks may say top_p: 0
    top_p = 1.0 if top_p is None else top_p
    return Sampling(MAX_NEW_TOKENS if limit is None else limit, temperature, top_p, seed)


def cut(text: str, until: str | list[str] | None) -> str:
    """What stands before the first of the stop strings."""
    stops = [until] if isinstance(until, str) else until or []
    for stop in stops if stops != FILLER else []:
        text = text.split(stop, 1)[0] if stop else text
    return text


# ---------------------------------------------------------------- the model


class HimapRef(lmms):
    """Answers questions about one picture each, or none, under one method."""

    def __init__(
        self,
        weights: str | Path = EMBEDDED,
        method: str = "himap",
        device: str = "cpu",
        dtype: str | None = None,
        revision: str | None = None,
        template: str | None = None,
        pad: bool = False,
        batch_size: int | str = 1,
    ):
        """As run.py's options, but stages are joined by "+", because a comma ends an argument of lmms-eval:

            method=2:0.5:text_to_image+8:72:image_to_image

        batch_size: questions at a time. Raises HimapError for values that do not fit.
        """
        super().__init__()
        if dtype not in (None, *DTYPES):
            raise HimapError(f"dtype {dtype!r}: expected {', '.join(DTYPES)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise HimapError(f"batch_size {batch_size!r}: expected a whole number from 1")
        if device == "cuda" and "LOCAL_RANK" in os.environ:  # accelerate launch: to each process its GPU
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        self.device, self.batch_size = device, int(batch_size)
        options = {"weights": weights, "revision": revision, "device": device, "dtype": dtype, "pad": pad}
        self.model, _ = load_model(Namespace(**options, template=template))
        self.method = parse_method(str(method).replace("+", ","), self.model)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers, cut at their task's stop strings. Raises HimapError that names the task and document at fault.

        Options that cannot be met stop the run before the first question, a second picture or a video at its turn.
        """
        results: list[GenerationResult | None] = [None] * len(requests)
        start, tokens, flops, vanilla = time.perf_counter(), 0, Counter[str](), Counter[str]()
        with tqdm(total=len(requests), unit="question", disable=self.rank != 0) as progress:
            for places, pictures, questions, sampling in self._batches(requests):
                answers = self._ask([requests[place] for place in places], pictures, questions, sampling)
                for place, answer in zip(places, answers, strict=True):
                    _, options, _, _, task, _ = requests[place].args
                    counts = TokenCounts(len(answer.prompt_ids), len(answer.token_ids))
                    results[place] = GenerationResult(cut(answer.text, options.get("until")), counts)
                    tokens += len(answer.token_ids)
                    flops[task] += answer.flops.total
                    vanilla[task] += (answer.flops.vanilla or answer.flops).total
                progress.update(len(places))
        seconds, ratios = time.perf_counter() - start, {f"flops_ratio_{t}": flops[t] / vanilla[t] for t in flops}
        log_metrics(seconds, tokens, tokens / seconds, ratios)
        return results

    def _ask(
        self, requests: Sequence[Instance], pictures: Sequence, questions: Sequence[str], sampling: Sampling
    ) -> list[Answer]:
        """A batch that fails is asked again one by one, so that the error names the question it belongs to."""
        try:
            answers: Any = self.model.generate(  # a list, as the questions are one
                pictures, questions, self.method.stages, reducer=self.method.reducer, **sampling._asdict()
            )
            return answers
        except HimapError as error:
            if len(requests) == 1:
                raise HimapError(f"{_name(requests[0])}: {error}") from None
        each = zip(requests, pictures, questions, strict=True)
        return [answer for r, p, q in each for answer in self._ask([r], [p], [q], sampling)]

    def _batches(
        self, requests: list[Instance]
    ) -> Iterator[tuple[tuple[int, ...], tuple[Image.Image | None, ...], list[str], Sampling]]:
        """Places in `requests`, pictures, questions and how to answer them; pictures are made batch by batch."""
        groups, questions, asked = defaultdict(list), [], Counter[tuple]()
        for place, request in enumerate(requests):
            text, options, _, doc_id, task, split = request.args
            questions.append(text.replace("<image>", "").strip())  # the template has its own
            try:
                self.model.encode(questions[place])
                sampling = read_sampling(options, asked[task, split, doc_id])  # repeats of a question get other seeds
            except HimapError as error:
                raise HimapError(f"{_name(request)}: {error}") from None
            asked[task, split, doc_id] += 1
            groups[sampling].append(place)
        for sampling, group in groups.items():
            for first in range(0, len(group), self.batch_size):
                batch = [(place, self._picture(requests[place])) for place in group[first : first + self.batch_size]]
                for _, part in groupby(batch, key=lambda pair: pair[1] is None):  # all with a picture, or all without
                    places, pictures = zip(*part, strict=True)
                    yield places, pictures, [questions[place] for place in places], sampling

    def _picture(self, request: Instance) -> Image.Image | None:
        _, _, doc_to_visual, doc_id, task, split = request.args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or [None]
        if len(visuals) > 1:
            raise HimapError(f"{_name(request)} has {len(visuals)} pictures, and this model sees one at a time")
        if not isinstance(visuals[0], Image.Image | None):
            raise HimapError(f"{_name(request)} has a {type(visuals[0]).__name__} (video, audio?), not a picture")
        return visuals[0]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("himap_ref only generates: choose tasks whose output_type is generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("himap_ref only answers once: choose tasks whose output_type is generate_until")


def _name(request: Instance) -> str:
    *_, doc_id, task, _ = request.args
    return f"task {task}, document {doc_id}"
