"""The paper's validation: hide the picture from some rows in some layers, and see what becomes of the answer.

    python -m himap_ref.studies.disruption --scenes 50 --plot runs/disruption.png

A block hides the image columns, as keys, from the text rows (img2txt), from the image rows (img2img: they see only what
stands before the image) or from as many random rows of image and text as there are text rows (random; official name:
img2rnd). It holds in one layer (only), from a layer to the last (from) or from the first to a layer (upto). "from" is
what the official code does, although its option says "layer": it writes into a mask that all layers share. "upto" with
img2img is the control that HiMAP's reviewers asked for: no exchange among image tokens in shallow layers.

Measured as there: label consistency, the share of answers that contain the label, and top-5, the Jaccard index of the
five likeliest first tokens and those of the undisrupted model. Also the share of answers that stay the same. The
official files hold only questions that the undisrupted model gets right; others lower label consistency everywhere.
One JSON line per question goes to --out; the same command started again goes on where it stopped.

Two things differ from the official code. It computes the whole sequence anew for every new token; here a cache
without what is hidden gives the same. Its random rows are drawn anew, unseeded, for every new token, new tokens among
them; here once per question, from the prompt: the same rows in every layer, reading and run.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..assistant import Llava
from ..cache import LayerCache, causal_mask
from ..commands.manners import run_command
from ..commands.options import add_model_arguments
from ..decoder import DecoderOutput, LlamaDecoder, rope
from ..errors import HimapError
from ..flops import Trace
from ..generation import Generated, generate
from ..model import find_image_span
from .asking import record_each
from .metrics import wilson
from .plots import check_picture, figure
from .questions import Example, add_question_arguments, load_examples
from .records import Records, load_recorded, results_path

KINDS = ("img2txt", "img2img", "random")
READINGS = {"only": "in this layer only", "from": "from this layer on", "upto": "up to this layer"}

# ---------------------------------------------------------------- what is blocked


@dataclass(frozen=True)
class Block:
    """Which rows lose sight of the image, and where. keep_diagonal: an image token still sees itself (official: no)."""

    kind: str
    reading: str
    layer: int
    keep_diagonal: bool = False

    def __post_init__(self):
        if self.kind not in KINDS or self.reading not in READINGS:
            known = f"{', '.join(KINDS)} and {', '.join(READINGS)}"
            raise HimapError(f"block {self.kind!r} {self.reading!r} is unknown: expected one each of {known}")

    @property
    def name(self) -> str:
        return f"{self.kind} {self.reading} {self.layer}"

    def layers(self, num_layers: int) -> range:
        """The blocked layers; raises HimapError if the decoder has no such layer."""
        if not 0 <= self.layer < num_layers:
            raise HimapError(f"layer {self.layer} does not exist: the decoder's layers are 0..{num_layers - 1}")
        first = 0 if self.reading == "upto" else self.layer
        return range(first, num_layers if self.reading == "from" else self.layer + 1)


def name_of(block: Block | None) -> str:
    return block.name if block else "undisrupted"


def draw_rows(n: int, image: slice, seed: str) -> list[int]:
    """As many rows as the text has, of image and text: what the official code draws, but seeded."""
    return random.Random(seed).sample(range(image.start, n), n - image.stop)


def visible(block: Block, n: int, image: slice, seeds: Sequence[str]) -> Tensor:
    """(B, 1, n, n), True where the row sees the key: causal, and image keys not from the block's rows.

    Raises HimapError if a row would see nothing, to which softmax has no answer.
    """
    blocked, columns = torch.zeros(len(seeds), n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    columns[image] = True
    text, images = range(image.stop, n), range(image.start, image.stop)
    for b, seed in enumerate(seeds):
        rows = {"img2txt": text, "img2img": images, "random": draw_rows(n, image, seed)}[block.kind]
        blocked[b, list(rows)] = True
    hidden = blocked[:, :, None] & columns  # (B, n, n)
    if block.keep_diagonal:
        hidden &= ~torch.eye(n, dtype=torch.bool)
    positions = torch.arange(n)[None]
    mask = causal_mask(positions, positions) & ~hidden[:, None]
    if not mask.any(dim=-1).all():
        raise HimapError(f"{block.kind}: no token stands before the image, so its rows see nothing: keep the diagonal")
    return mask


# ---------------------------------------------------------------- blocked prefills


class State(NamedTuple):
    """On entry to layer len(kv): what the layers below have made."""

    x: Tensor  # (B, n, d); after the last layer (B, 1, d)
    kv: tuple[tuple[Tensor, Tensor], ...]  # keys and values of each layer below, (B, n, g, c) each


class Prompts:
    """A batch of prompts to run under many blocks. Layers that the blocks have in common run once.

    inputs_embeds: (B, n, d). seeds: one per prompt, for its random rows.
    """

    def __init__(self, decoder: LlamaDecoder, inputs_embeds: Tensor, image_span: tuple[int, int], seeds: Sequence[str]):
        self.decoder, self.x, self.image, self.seeds = decoder, inputs_embeds, slice(*image_span), seeds
        B, n, _ = inputs_embeds.shape
        self.positions = torch.arange(n, device=inputs_embeds.device).expand(B, n)
        self.cos_sin = rope(self.positions[:1], decoder.config, inputs_embeds.dtype)
        self.masks: dict[tuple, Tensor] = {}
        self.trunks: dict[tuple | None, list[State]] = {}

    @torch.no_grad()
    def prefill(self, block: Block | None = None) -> DecoderOutput:
        """The decoder's output for the last row. The cache is as new tokens may see it: to img2txt they are text."""
        T = len(self.decoder.layers)
        layers = block.layers(T) if block else range(T, T)
        state = self._trunk(block, layers.stop) if layers.start == 0 else self._trunk(None, layers.start)
        while len(state.kv) < T:
            state = self._run_layer(state, block if len(state.kv) in layers else None)
        cache = []
        for i, kv in enumerate(state.kv):
            hides = i in layers and block and block.kind == "img2txt"
            tokens = (*kv, self.positions)
            cache.append(LayerCache(*(self._without_image(t) for t in tokens) if hides else tokens))
        hidden = self.decoder.norm(state.x)
        trace = Trace([], [], torch.zeros(len(self.x), 2, dtype=torch.long))
        return DecoderOutput(self.decoder.logits(hidden[:, -1]), hidden, trace, cache)

    def generate(self, block: Block | None, max_new_tokens: int, eos_token_ids: Sequence[int]) -> Generated:
        """Greedy answers, the block in place for the new tokens too."""
        prefilled: Any = _Prefilled(self.decoder, self.prefill(block))
        return generate(prefilled, self.x, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids)

    def _trunk(self, block: Block | None, layer: int) -> State:
        """On entry to `layer` with every layer below blocked, or none."""
        states = self.trunks.setdefault((block.kind, block.keep_diagonal) if block else None, [State(self.x, ())])
        while len(states) <= layer:
            states.append(self._run_layer(states[-1], block))
        return states[layer]

    def _run_layer(self, state: State, block: Block | None) -> State:
        """One layer further, as in `LlamaDecoder.forward`: the last one only for the last row."""
        layer, mask, (cos, sin) = self.decoder.layers[len(state.kv)], self._mask(block), self.cos_sin
        x, (q, k, v) = state.x, layer.self_attn.qkv(layer.input_layernorm(state.x), cos, sin)
        if len(state.kv) == len(self.decoder.layers) - 1:
            mask = causal_mask(self.positions, self.positions) if mask is None else mask
            x, q, mask = x[:, -1:], q[:, -1:], mask[:, :, -1:]
        x = x + layer.self_attn.attend(q, k, v, mask)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        return State(x, (*state.kv, (k, v)))

    def _mask(self, block: Block | None) -> Tensor | None:
        if block is None:
            return None
        key = block.kind, block.keep_diagonal
        if key not in self.masks:
            self.masks[key] = visible(block, self.x.shape[1], self.image, self.seeds).to(self.x.device)
        return self.masks[key]

    def _without_image(self, t: Tensor) -> Tensor:
        return torch.cat((t[:, : self.image.start], t[:, self.image.stop :]), dim=1)  # (B, n - N, ...)


class _Prefilled:
    """Stands in for a decoder whose prefill is done: all that `generate` asks of one."""

    def __init__(self, decoder: LlamaDecoder, output: DecoderOutput):
        self.config, self.embed_tokens, self.decoder = decoder.config, decoder.embed_tokens, decoder
        self.output: DecoderOutput | None = output

    def __call__(self, *args: Any, **kwargs: Any) -> DecoderOutput:
        output, self.output = self.output, None
        return output or self.decoder(*args, **kwargs)


# ---------------------------------------------------------------- many questions under many blocks


@torch.no_grad()
def answer(
    model: Llava, examples: Sequence[Example], pictures: Sequence[Image.Image], blocks: Sequence[Block],
    seed: int, max_new_tokens: int,
) -> list[dict]:  # fmt: skip
    """[{"label", "results": {block's name: {"answer", "top5" ids of the first new token}}}], one per example.

    Raises HimapError if one of them cannot be asked.
    """
    rows: list[dict] = [{"label": list(example.answers), "results": {}} for example in examples]
    prompts = [model.encode(example.question) for example in examples]
    images = [model.embed_image(model.preprocess(picture))[0] for picture in pictures]
    for n in sorted({len(ids) for ids in prompts}):  # its masks are of one length
        places = [i for i, ids in enumerate(prompts) if len(ids) == n]
        x = torch.stack([model.embed(prompts[i], images[i]) for i in places])
        span: Any = find_image_span(prompts[places[0]], model.config.image_token_index)  # never None with a picture
        equal = Prompts(model.language_model, x, span, [f"{seed} {examples[i].key}" for i in places])
        for block in tqdm((None, *blocks), "blocks", leave=False):
            out = equal.generate(block, max_new_tokens, model.eos_token_ids)
            top5 = out.first_logits.float().topk(5).indices.tolist()
            for i, ids, top in zip(places, out.token_ids, top5, strict=True):
                text = model.tokenizer.decode(ids, skip_special_tokens=True).strip()
                rows[i]["results"][name_of(block)] = {"answer": text, "top5": top}
    return rows


# ---------------------------------------------------------------- figures


def holds(answer: str, labels: Sequence[str]) -> bool:
    """Whether one of the labels is part of the answer, as the official code judges; a blank label never is."""
    return any(label in answer for label in labels if label.strip())


def jaccard(a: Sequence[int], b: Sequence[int]) -> float:
    """Shared ids over all ids."""
    return len({*a} & {*b}) / len({*a} | {*b})


def summarize(rows: Sequence[dict], blocks: Sequence[Block]) -> dict[Block | None, dict]:
    """Figures by block, None for no block. rows: as `answer` makes them, none with an error."""
    return {block: _figures(rows, name_of(block)) for block in (None, *blocks)}


def _figures(rows: Sequence[dict], name: str) -> dict:
    pairs = [(row["results"][name], row["results"][name_of(None)]) for row in rows]
    labelled = [row for row in rows if row["label"]]
    hits = sum(holds(row["results"][name]["answer"], row["label"]) for row in labelled)
    return {
        "label": hits / len(labelled) if labelled else float("nan"),
        "interval": wilson(hits, len(labelled)) if labelled else None,
        "same": mean(mine["answer"] == plain["answer"] for mine, plain in pairs),
        "top5": mean(jaccard(mine["top5"], plain["top5"]) for mine, plain in pairs),
    }


def axes_of(figures: dict[Block | None, dict]) -> tuple[list[str], list[str], list[int]]:
    """The kinds, readings and layers that were swept."""
    blocks = [block for block in figures if block]
    names = ("kind", "reading", "layer")
    kinds, readings, layers = (list(dict.fromkeys(getattr(b, name) for b in blocks)) for name in names)
    return kinds, readings, layers


def table(figures: dict[Block | None, dict]) -> str:
    """A line per reading and layer, the kinds side by side: label consistency with its interval, same answer, top-5."""
    kinds, readings, layers = axes_of(figures)
    by_name = {name_of(block): f for block, f in figures.items()}

    def cells(name: str) -> str:
        f = by_name[name]
        label = "{:.1%} ({:.0%} - {:.0%})".format(f["label"], *f["interval"]) if f["interval"] else "no labels"
        return f"{label} | {f['same']:.1%} | {f['top5']:.2f}"

    lines = ["| blocked | " + " | ".join(f"{kind}: label (95 %) | same | top-5" for kind in kinds) + " |"]
    lines.append("|---" * (1 + 3 * len(kinds)) + "|")
    lines.append("| nothing | " + " | ".join([cells(name_of(None))] * len(kinds)) + " |")
    for reading in readings:
        for layer in layers:
            where = f"{reading} {layer}"
            lines.append(f"| {where} | " + " | ".join(cells(f"{kind} {where}") for kind in kinds) + " |")
    return "\n".join(lines)


def plot(path: Path, figures: dict[Block | None, dict]) -> None:
    """A panel per reading; a colour per kind: label consistency drawn through, top-5 dashed."""
    kinds, readings, layers = axes_of(figures)
    with figure(path, panels=len(readings), size=(4.5 * len(readings), 4)) as panels:
        for axes, reading in zip(panels, readings, strict=True):
            axes.axhline(figures[None]["label"], color="gray", linewidth=0.8, label="label, no block")
            for number, kind in enumerate(kinds):
                curve = [f for b, f in figures.items() if b and (b.kind, b.reading) == (kind, reading)]
                for which, style in (("label", "-"), ("top5", "--")):
                    values = [f[which] for f in curve]
                    axes.plot(layers, values, style, marker=".", color=f"C{number}", label=f"{which}, {kind}")
            axes.set(title=f"blocked {READINGS[reading]}", xlabel="layer", ylim=(-0.03, 1.03))
        panels[0].set_ylabel("label consistency; Jaccard index of the top 5")
        panels[0].legend(fontsize="small")


def report(rows: Sequence[dict], examples: Sequence[Example], blocks: Sequence[Block], picture: Path | None) -> None:
    """Prints the figures; raises HimapError if no question could be asked."""
    asked = [(row, example) for row, example in zip(rows, examples, strict=True) if "error" not in row]
    if not asked:
        raise HimapError(f"none of {len(rows)} questions could be asked; the first: {rows[0]['error']}")
    figures = summarize([row for row, _ in asked], blocks)
    print(table(figures))
    print(f"{len(asked)} questions, {len(rows) - len(asked)} more could not be asked")
    recorded = [jaccard(row["results"][name_of(None)]["top5"], e.top5) for row, e in asked if e.top5]
    if recorded:
        print(f"top-5 of the undisrupted model against the {len(recorded)} recorded in the file: {mean(recorded):.2f}")
    if picture:
        plot(picture, figures)


# ---------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_question_arguments(parser)
    add = parser.add_argument
    add("--kinds", nargs="+", choices=KINDS, default=KINDS)
    add("--readings", nargs="+", choices=READINGS, default=list(READINGS), help="only: that layer; from: it and all "
        "after it, as the official code; upto: it and all before it")  # fmt: skip
    add("--layers", nargs="+", type=int, help="default: all")
    add("--keep-diagonal", action="store_true", help="an image token still sees itself (official: it does not)")
    add("--seed", type=int, default=0, help="of the random rows")
    add("--max-new-tokens", type=int, default=8)
    add("--batch", type=int, default=16, help="questions at a time; fewer need less memory")
    add("--out", type=Path, default=Path("runs/disruption"), help="a file, or a folder for one")
    add("--plot", type=Path, help="a picture of the curves; needs matplotlib")


def blocks_of(args: argparse.Namespace, num_layers: int) -> list[Block]:
    """Every kind, reading and layer asked for; raises HimapError for a layer that is not there."""
    layers = sorted(set(args.layers or range(num_layers)))
    every = [Block(k, r, i, args.keep_diagonal) for r in args.readings for i in layers for k in args.kinds]
    return [block for block in every if block.layers(num_layers)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    args = parser.parse_args()
    if min(args.batch, args.max_new_tokens) < 1:
        raise HimapError("--batch and --max-new-tokens: must be at least 1")
    if args.plot:
        check_picture(args.plot)
    examples, data = load_examples(args, needs_picture=True)
    model, weights = load_recorded(args)
    blocks = blocks_of(args, model.config.text_config.num_hidden_layers)
    own = {name: getattr(args, name) for name in ("kinds", "readings", "layers", "keep_diagonal", "seed")}
    settings = {**weights, **data, **own, "max_new_tokens": args.max_new_tokens}
    with Records(results_path(args.out, "disruption", settings), settings) as records:

        def ask(group: list[Example], pictures: list) -> list[dict]:
            return answer(model, group, pictures, blocks, args.seed, args.max_new_tokens)

        rows = record_each(examples, records, args.batch, ask, "questions")
        report(list(rows.values()), examples, blocks, args.plot)


if __name__ == "__main__":
    run_command(main)
