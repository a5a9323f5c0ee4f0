"""SCALE.md: the figures of its tables, and the computed ones of its text, from the plan and the FLOPs of himap_ref."""

import re
from dataclasses import replace
from functools import cache
from itertools import count
from math import ceil
from pathlib import Path

import torch

from himap_ref import HIMAP, LLAVA_1_5_7B, LLAVA_1_5_13B, LlavaConfig, LlavaModel
from himap_ref.assistant.answer import kv_cache_bytes
from himap_ref.flops import LayerTrace, layer_flops, pass_flops, projector_flops, vision_flops
from himap_ref.methods.plan import plan_prefill, tokens_per_layer
from himap_ref.methods.schedules import FASTV

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "SCALE.md").read_text(encoding="utf-8")
WORDS = " ".join(PAGE.split())
MODELS = {"7B": LLAVA_1_5_7B, "13B": LLAVA_1_5_13B}
METHODS = {"none": ((), 576), "fastv": (FASTV, 576), "himap": (HIMAP, 576), "pool:12": ((), 144)}  # and image tokens
SYSTEM, TEXT, ANSWERS, BATCHES, QUESTIONS = 35, 60, (16, 256), (1, 8, 32, 128), (1, 2, 4, 8, 16)
GB, TB, TFLOP, BLOCK = (141, 90), (4.8, 80), (989, 50), 16  # of the card, and how many % are had; tokens
MEMORY, (BANDWIDTH, FLOPS) = GB[0] * GB[1] * 1e7, (there * had * 1e10 for there, had in (TB, TFLOP))  # (per second)
K1, K2 = (stage.layer for stage in HIMAP)
SHARING = ("none", "himap, each its choice", "himap, first choice stays", "pool:12")


# ---------------------------------------------------------------- one request
@cache
def plan(config: LlavaConfig, method: str, cached: int = 0) -> list[LayerTrace]:
    stages, image = METHODS[method]
    return plan_prefill(config.text_config, (SYSTEM, SYSTEM + image), SYSTEM + image + TEXT, stages, cached)


def prefill(config: LlavaConfig, layers: list[LayerTrace]) -> int:
    """FLOPs with a new picture: encoder, projector, decoder."""
    return vision_flops(config) + projector_flops(config) + pass_flops(config.text_config, layers)


def cached(config: LlavaConfig, method: str, answer: int = 0, block: int = 1) -> int:
    """Bytes of keys and values of a prompt and so many tokens of its answer; each layer has whole blocks."""
    layers = [replace(x, keys=ceil((x.keys + answer) / block) * block) for x in plan(config, method)]
    return kv_cache_bytes(config.text_config, layers)


@cache
def weights(config: LlavaConfig) -> tuple[int, int]:
    """Bytes in bf16: all, and those that each decode step reads (the decoder without its embeddings)."""
    with torch.device("meta"):
        model = LlavaModel(config)
    decoder = model.language_model
    whole, part, rows = (2 * sum(p.numel() for p in m.parameters()) for m in (model, decoder, decoder.embed_tokens))
    return whole, part - rows


# ---------------------------------------------------------------- many requests
def fitting(config: LlavaConfig, method: str, answer: int) -> int:
    """Requests at the end of their answers; the last token's keys and values are not needed."""
    return int((MEMORY - weights(config)[0]) // cached(config, method, answer - 1, BLOCK))


def products(config: LlavaConfig) -> int:
    """FLOPs of one generated token's matrix products with weights."""
    return pass_flops(config.text_config, [LayerTrace(1, 0, 1, 0)] * config.text_config.num_hidden_layers)


def step(config: LlavaConfig, method: str, answer: int, batch: int) -> float:
    """Seconds of a decode step halfway through the answers: products, as bytes or FLOPs allow, then reading caches."""
    weighing = max(weights(config)[1] / BANDWIDTH, batch * products(config) / FLOPS)
    return weighing + batch * cached(config, method, answer // 2) / BANDWIDTH


def rates(config: LlavaConfig, method: str, answer: int) -> list[float]:
    """Requests per second at each batch: decode alone; with the prefill, which gives the first token."""
    rest = [batch / ((answer - 1) * step(config, method, answer, batch)) for batch in BATCHES]
    return [*rest, *(1 / (prefill(config, plan(config, method)) / FLOPS + 1 / each) for each in rest)]


def batch_from(config: LlavaConfig, times: float, answer: int = 256) -> int:
    """The smallest batch at which HiMAP's decode step is so many times as fast."""
    return next(b for b in count(1) if step(config, "none", answer, b) >= times * step(config, "himap", answer, b))


# ---------------------------------------------------------------- several questions about one picture
def first(config: LlavaConfig, sharing: str) -> list[LayerTrace]:
    """If each question chooses, all image tokens finish layer K1 - 1: their outputs there are cached for the next."""
    layers = list(plan(config, sharing.split(",")[0]))
    if sharing.endswith("each its choice"):
        layers[K1 - 1] = replace(layers[K1 - 1], rows=layers[K1 - 1].entered)
    return layers


def later(config: LlavaConfig, sharing: str) -> list[LayerTrace]:
    """The prefill of a further question, when all that does not depend on questions is cached."""
    if sharing in METHODS:
        return plan(config, sharing, SYSTEM + METHODS[sharing][1])
    if sharing.endswith("first choice stays"):
        return [replace(x, entered=TEXT, ranking=0, rows=min(x.rows, TEXT)) for x in plan(config, "himap")]
    layers = enumerate(plan(config, "himap", SYSTEM))  # from K1 on the image tokens are this question's own
    return [replace(x, entered=TEXT, rows=TEXT) if i < K1 else x for i, x in layers]


def asked(config: LlavaConfig, sharing: str, questions: int) -> int:
    """FLOPs of all prefills."""
    further = pass_flops(config.text_config, later(config, sharing))
    return prefill(config, first(config, sharing)) + (questions - 1) * further


def own_bytes(config: LlavaConfig, sharing: str) -> int:
    """Keys and values that a further question adds: those of the tokens that it computes."""
    return kv_cache_bytes(config.text_config, [replace(x, keys=x.entered) for x in later(config, sharing)])


# ---------------------------------------------------------------- the page
def costs(config: LlavaConfig) -> dict[str, str]:
    """The last table's rows for one model."""
    text, layers = config.text_config, plan(config, "himap")
    before, after = layers[K1 - 1], layers[K2 - 1]
    one, two = (layer_flops(text, x)["ranking"] for x in (before, after))
    candidates = before.keys + after.keys - 2 * (SYSTEM + TEXT)
    finished = pass_flops(text, [replace(x, rows=x.entered) if x.ranking else x for x in layers])
    wider = sum(max(x.keys, before.keys * (i < K2)) for i, x in enumerate(layers)) / sum(x.keys for x in layers)
    return {
        f"second look of stage 1: {before.ranking} queries, {before.keys} keys, GFLOP": figure(one / 1e9),
        f"second look of stage 2: {after.ranking} queries, {after.keys} keys, GFLOP": figure(two / 1e9),
        "both, % of the prefill's FLOPs": f"{100 * (one + two) / prefill(config, layers):.3f}",
        "losers finish layers K1 - 1 and K2 - 1, % more FLOPs": figure(100 * (finished / pass_flops(text, layers) - 1)),
        "image tokens that wait between two chunks, MB": figure(2 * METHODS["none"][1] * text.hidden_size / 1e6),
        "tensor parallelism: scores to add up, both stages, fp32, KB": figure(4 * candidates / 1e3),
        "block tables in groups of 2 layers / of 8 (and so much more cache)":
            f"{text.num_hidden_layers // 2} / {text.num_hidden_layers // 8} ({100 * (wider - 1):.0f} %)",
    }  # fmt: skip


def tables():
    """Rows of all tables, in order, without their heads."""
    for name, config in MODELS.items():
        for method, (stages, image) in METHODS.items():
            layers = plan(config, method)
            flops, tokens = prefill(config, layers), tokens_per_layer(stages, image, len(layers))
            ratio = f"{flops / prefill(config, plan(config, 'none')):.3f}"
            fits = [str(fitting(config, method, answer)) for answer in ANSWERS]
            mean, mb = sum(tokens) / len(tokens), cached(config, method) / 1e6
            yield [name, method, mean, mb, flops / 1e12, ratio, FLOPS / flops, *fits]
    for name, config in MODELS.items():
        for answer in ANSWERS:
            none, himap = (rates(config, method, answer) for method in ("none", "himap"))
            yield [name, str(answer), "none", *none]
            times = (f"{figure(b)} ({b / a:.2f})" for a, b in zip(none, himap, strict=True))
            yield [name, str(answer), "himap", *times]
    for sharing in SHARING:
        flops = (asked(LLAVA_1_5_7B, sharing, questions) / 1e12 for questions in QUESTIONS)
        yield [sharing, *flops, own_bytes(LLAVA_1_5_7B, sharing) / 1e6]
    for what, *values in zip(costs(LLAVA_1_5_7B), *(costs(config).values() for config in MODELS.values()), strict=True):
        yield [what, *values]


def figure(x: float) -> str:
    """Three digits."""
    return f"{x:.{0 if x >= 99.95 else 1 if x >= 9.995 else 2}f}"


def sentences():
    """Pieces of the text that hold a computed figure; models side by side."""
    yield "of its {} GB {} % usable, of {} TB/s {} % reached, of {} TFLOP/s (bf16, dense) {} %".format(*GB, *TB, *TFLOP)
    yield f"blocks of {BLOCK} tokens; {SYSTEM} tokens before the picture, {TEXT} behind it; K1 = {K1}, K2 = {K2}"
    short, long = ANSWERS
    yield f"answers of {short} tokens | of {long} |"
    batches, questions = (" | ".join(map(str, heads)) for heads in (BATCHES, QUESTIONS))
    yield f"decode alone, batch {batches} | with the prefill, batch {batches} |"
    yield f"for so many questions | {questions} |"
    d = (plan(LLAVA_1_5_7B, "none")[i].keys - plan(LLAVA_1_5_7B, "himap")[i].keys for i in (0, K1, K2))
    yield "d = {}, {}, {}".format(*d)
    ratio = prefill(LLAVA_1_5_7B, plan(LLAVA_1_5_7B, "himap")) / prefill(LLAVA_1_5_7B, plan(LLAVA_1_5_7B, "none"))
    yield f"for {ratio:.2f} of the FLOPs"
    whole, read = zip(*(weights(config) for config in MODELS.values()), strict=True)
    yield "Weights {:.1f} GB (13B: {:.1f})".format(*(x / 1e9 for x in whole))
    yield "{:.1f} GB (13B: {:.1f}) of weights".format(*(x / 1e9 for x in read))
    for method, i in (("none", K1), ("fastv", K1), ("himap", K1), ("himap", K2)):
        small, large = (kv_cache_bytes(c.text_config, [plan(c, method)[i]]) / 1e6 for c in MODELS.values())
        yield f"{figure(small)} ({figure(large)}) for {plan(LLAVA_1_5_7B, method)[i].keys} tokens"
    even = [[round(weights(c)[1] / cached(c, m, 128)) for c in MODELS.values()] for m in ("none", "himap")]
    yield "at batch {} (13B: {}) without pruning, at {} ({}) with HiMAP".format(*even[0], *even[1])
    yield "10 % faster from batch {} (13B: {})".format(*(batch_from(config, 1.1) for config in MODELS.values()))
    yield "1.5 times as fast from batch {} ({})".format(*(batch_from(config, 1.5) for config in MODELS.values()))
    bound = (ceil(weights(c)[1] / BANDWIDTH * FLOPS / products(c)) for c in MODELS.values())
    yield "From batch {} (13B: {})".format(*bound)
    dearer = (next(n for n in count(1) if asked(c, SHARING[1], n) > asked(c, "none", n)) for c in MODELS.values())
    yield "from the {}th question (13B: {}th)".format(*dearer)


def test_tables():
    """A table that says what the code does not compute; the difference shows the rows as they should stand."""
    blocks = re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE)
    rows = [line for block in blocks for line in block.splitlines()[2:]]
    cells = [[cell if isinstance(cell, str) else figure(cell) for cell in row] for row in tables()]
    assert rows == [f"| {' | '.join(row)} |" for row in cells]


def test_text():
    """A sentence with a figure that is computed no longer so; a page that is longer than one."""
    assert [sentence for sentence in sentences() if sentence not in WORDS] == []
    assert len(PAGE.splitlines()) <= 110 and max(map(len, PAGE.splitlines())) <= 140


def test_measured():
    """Measured figures that RESULTS.md and README do not have; computed caches that are not those measured there."""
    results = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    for method in ("none", "fastv", "himap"):
        row = re.search(rf"^\| {method} \| 576.* \| ([\d.]+) \|$", results, re.MULTILINE)
        assert row[1] == f"{cached(LLAVA_1_5_7B, method) / 2**20:.1f}"
    assert "| **0.284** | **0.335** |" in results and "0.284 of the time for 0.335 of the decoder's FLOPs" in WORDS
    words = " ".join(results.split())
    assert all(share in words and share in WORDS for share in ("49 %", "2 to 8 %"))
    table = results.split("| equal FLOPs, 61.5% |")[1].split("\n\n")[0]
    shown = {"HiMAP": "87.4", "chance on HiMAP's layers": "76.2", "average pooling": "57.1", "FastV, text rows": "98.5"}
    for method, right in shown.items():
        assert re.search(rf"^\| {method} \|.* \| {right}%", table, re.MULTILINE) and right in WORDS
