"""What a sweep measures: published schedules, one parameter at a time, criteria, and all methods at equal FLOPs."""

from __future__ import annotations

import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from ...assistant import Llava
from ...config import LlavaConfig
from ...errors import HimapError
from ...flops import pass_flops, projector_flops, vision_flops
from ...methods.plan import plan_prefill
from ...methods.schedules import METHODS, Method, parse_method
from ...model import find_image_span
from ..questions.examples import Example
from .controls import ORACLE

PAPER = (2, 0.5, 8, 0.25)  # K1, share kept by stage 1, K2, share kept by stage 2
TEXT, IMAGE = "text_to_image", "image_to_image"
SEEDS = 5
NEAR = 0.02  # share of vanilla: how close to a budget counts as equal
CHANCE, SMALLER = "chance on HiMAP's layers", "smaller picture"


@dataclass(frozen=True)
class Entry:
    """A line of the table: one schedule, or several that differ by their seed."""

    group: str
    label: str
    methods: tuple[str, ...]


def share(keep: float) -> str:
    """As a stage's text wants it: with a point, without an exponent."""
    return f"{keep:.6f}".rstrip("0")


def stages_text(k1: int, keep1: float, k2: int, keep2: float, first: str = TEXT, second: str = IMAGE) -> str:
    return f"{k1}:{share(keep1)}:{first},{k2}:{share(keep2)}:{second}"


def seeded(text: str) -> tuple[str, ...]:
    """The method `random`, or stages with that score, once for every seed; another method as it is."""
    texts = (re.sub(r"(^|[\d.]:)random(?=,|$)", rf"\g<1>random{seed}", text) for seed in range(SEEDS))
    return tuple(dict.fromkeys(texts))


def published(config: LlavaConfig) -> list[Entry]:
    """Every method as it was published, and as the weights recommend it; FLOPs differ."""
    patches = config.vision_config.num_patches
    names = {name: name for name in METHODS if name != "none"}
    names |= {"CLS attention, half": f"cls:{patches // 2}", "average pooling 2 x 2": f"pool:{int(patches**0.5) // 2}"}
    return [Entry("as published", label, seeded(text)) for label, text in names.items()]


def ablations(k1s: Iterable[int], k2s: Iterable[int], keep1s: Iterable[float], keep2s: Iterable[float]) -> list[Entry]:
    """One of the four at a time, the others as in the paper."""
    k1, keep1, k2, keep2 = PAPER
    lines = [("K1", f"K1 = {k}", (k, keep1, k2, keep2)) for k in k1s]
    lines += [("K2", f"K2 = {k}", (k1, keep1, k, keep2)) for k in k2s]
    lines += [("R1", f"stage 1 keeps {keep:g}", (k1, keep, k2, keep2)) for keep in keep1s]
    lines += [("R2", f"stage 2 keeps {keep:g}", (k1, keep1, k2, keep)) for keep in keep2s]
    return [Entry(group, label, (stages_text(*schedule),)) for group, label, schedule in lines]


def criteria() -> list[Entry]:
    """Both stages' scores exchanged, each stage alone, the sum's bias taken out; on the paper's layers and shares."""
    k1, keep1, k2, keep2 = PAPER
    pairs = {
        "text, image (HiMAP)": (TEXT, IMAGE), "image, text (swapped)": (IMAGE, TEXT), "text, text": (TEXT, TEXT),
        "image, image": (IMAGE, IMAGE), "text, image count-normalised": (TEXT, f"{IMAGE}_mean"),
        "text, image relative": (TEXT, f"{IMAGE}_relative"), "last row, last row": ("last_to_image",) * 2,
        "chance, chance": ("random", "random"), "oracle, oracle": (ORACLE, ORACLE),
    }  # fmt: skip
    both = [Entry("criteria", label, seeded(stages_text(*PAPER, *scores))) for label, scores in pairs.items()]
    alone = {"stage 1 alone": f"{k1}:{share(keep1)}:{TEXT}", "stage 2 alone": f"{k2}:{share(keep2)}:{IMAGE}"}
    return both + [Entry("criteria", label, (text,)) for label, text in alone.items()]


def families(config: LlavaConfig) -> dict[str, Callable[[int], str]]:
    """Method -> its schedule by a whole number: the tokens its first stage keeps, unless said otherwise."""
    N, T = config.num_image_tokens, config.text_config.num_hidden_layers
    k1, _, k2, keep2 = PAPER
    pyramid = [stage.layer for stage in METHODS["pyramiddrop"](T)]
    return {
        "HiMAP": lambda k: f"{k1}:{k}:{TEXT},{k2}:{share(keep2)}:{IMAGE}",
        "HiMAP, count-normalised": lambda k: f"{k1}:{k}:{TEXT},{k2}:{share(keep2)}:{IMAGE}_mean",
        CHANCE: lambda k: f"{k1}:{k}:random,{k2}:{share(keep2)}:random",
        "oracle on HiMAP's layers": lambda k: f"{k1}:{k}:{ORACLE},{k2}:{share(keep2)}:{ORACLE}",
        "FastV, last row": lambda k: f"2:{k}:last_to_image",
        "FastV, mean of all rows": lambda k: f"2:{k}:all_to_image",
        "FastV, text rows": lambda k: f"2:{k}:{TEXT}",
        "DART": lambda k: f"2:{k}:dart",
        "PyramidDrop": lambda k: ",".join(f"{layer}:{share(k / N)}:last_to_image" for layer in pyramid),
        "VTW": lambda k: f"{k}:0:none",  # k: the layer
        "CLS attention": lambda k: f"cls:{k}",
        "DivPrune": lambda k: f"divprune:{k}",
        "VisionZip": lambda k: f"visionzip:{k}",
        "average pooling": lambda k: f"pool:{k}",  # k: the side
        SMALLER: lambda k: f"down:{k}",  # k: the side
    }


def planned_flops(model: Llava, method: Method, before: int, after: int) -> int:
    """Of encoder, projector and prefill, with `before` and `after` tokens around the image."""
    config, N = model.config, method.num_image_tokens(model.config)
    image = method.reducer.flops(config) if method.reducer else (vision_flops(config), projector_flops(config))
    plan = plan_prefill(config.text_config, (before, before + N), before + N + after, method.stages)
    return sum(image) + pass_flops(config.text_config, plan)


def equal_flops(model: Llava, examples: list[Example], budgets: list[float] | None) -> list[Entry]:
    """For each budget (a share of vanilla) each family's schedule that comes nearest to it, if near enough, and the
    largest smaller picture that costs no more; in every family a larger number costs more.

    Default budgets: the paper's schedule's share, and 0.85, 1.15 and 1.25 times it.
    """
    prompts = [model.encode(example.question) for example in examples[:200]]
    spans: list[Any] = [find_image_span(ids, model.config.image_token_index) for ids in prompts]  # all have one
    before = spans[0][0]
    after = int(median(len(ids) - stop for ids, (_, stop) in zip(prompts, spans, strict=True)))
    vanilla, entries = planned_flops(model, Method("none"), before, after), []
    if budgets is None:
        paper = planned_flops(model, parse_method("himap-paper", model), before, after) / vanilla
        budgets = [paper * factor for factor in (0.85, 1, 1.15, 1.25)]

    def share_of(text: str) -> float:
        """Of vanilla; more than all where the model has no such layer, side or number of tokens."""
        try:
            return planned_flops(model, parse_method(text, model), before, after) / vanilla
        except HimapError:
            return 2.0

    for budget in sorted(budgets):
        for label, family in families(model.config).items():
            numbers = range(3 if label == "VisionZip" else 1, model.config.num_image_tokens)  # all N would be no stage
            texts = [family(k) for k in numbers]
            above = bisect_left(texts, budget, key=share_of)
            near = [texts[i] for i in (above - 1, above) if 0 <= i < len(texts)]
            nearest = min(near, key=lambda text: abs(share_of(text) - budget))
            if label == SMALLER and above:  # few sizes: the largest that costs no more
                entries.append(Entry(f"equal FLOPs, {budget:.1%}", label, (texts[above - 1],)))
            elif label != SMALLER and abs(share_of(nearest) - budget) < NEAR:
                entries.append(Entry(f"equal FLOPs, {budget:.1%}", label, seeded(nearest)))
    return entries


def fitting(entries: list[Entry], model: Llava) -> list[Entry]:
    """Those whose schedules the model can run; the others are named on standard error before anything is measured."""
    good = []
    for entry in entries:
        try:
            [parse_method(text, model) for text in entry.methods]
            good.append(entry)
        except HimapError as error:
            print(f"left out: {entry.group} {entry.label}: {error}", file=sys.stderr)
    return good
