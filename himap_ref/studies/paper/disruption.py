"""The paper's validation: hide the picture from some rows in some layers, and see what becomes of the answer.

    python -m himap_ref.studies disruption --scenes 50 --plot runs/disruption.png

A block hides the image columns, as keys, from the text rows (img2txt), from the image rows (img2img: they see only what
stands before the image) or from as many random rows of image and text as there are text rows (random; official name:
img2rnd). It holds in one layer (only), from a layer to the last (from) or from the first to a layer (upto). "from" is
what the official code does, although its option says "layer": it writes into a mask that all layers share. "upto" with
img2img is the control that HiMAP's reviewers asked for: no exchange among image tokens in shallow layers.

Measured as there: label consistency, the share of answers that contain the label, and top-5, the Jaccard index of the
five likeliest first tokens and those of the undisrupted model. Also the share of answers that stay the same. The
official files hold only questions that the undisrupted model gets right; others lower label consistency everywhere.
One JSON line per question goes to --out; the same command started again goes on where it stopped.

Two things differ from the official code. It computes the whole sequence anew for every new token; here each is computed
once, behind the cache. Its random rows are drawn anew, unseeded, for every new token, new tokens among
them; here once per question, from the prompt: the same rows in every layer, reading and run.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ...assistant import Llava
from ...assistant.text import text_of
from ...cache import causal_mask
from ...commands.manners import run_command
from ...commands.options import add_model_arguments
from ...decoder import LlamaDecoder
from ...errors import HimapError
from ...generation import Generated, generate
from ...methods.reducers import check_grid
from ...model import find_image_span
from ..accuracy.metrics import wilson
from ..common.asking import record_each
from ..common.plots import check_picture, figure
from ..common.records import load_recorded, results_path
from ..questions.selection import Example, add_question_arguments, load_examples

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


def visible(block: Block, n: int, image: slice, seeds: Sequence[str], new: int) -> Tensor:
    """(B, 1, m, m), m = n + new: True where the row sees the key: causal, and image keys not from the block's rows.

    New tokens are text, but never drawn. Raises HimapError if a row would see nothing, to which softmax has no answer.
    """
    positions = torch.arange(n + new)
    blocked, columns = torch.zeros(len(seeds), n + new, dtype=torch.bool), torch.zeros(n + new, dtype=torch.bool)
    columns[image] = True
    text, images = range(image.stop, n + new), range(image.start, image.stop)
    for b, seed in enumerate(seeds):
        rows = {"img2txt": text, "img2img": images, "random": draw_rows(n, image, seed)}[block.kind]
        blocked[b, list(rows)] = True
    hidden = blocked[:, :, None] & columns  # (B, m, m)
    if block.keep_diagonal:
        hidden &= ~torch.eye(n + new, dtype=torch.bool)
    mask = causal_mask(positions[None], positions[None]) & ~hidden[:, None]
    if not mask.any(dim=-1).all():
        raise HimapError(f"{block.kind}: no token stands before the image, so its rows see nothing: keep the diagonal")
    return mask


@contextmanager
def blocked(decoder: LlamaDecoder, layers: Iterable[int], mask: Tensor) -> Iterator[None]:
    """Within it, rows of these layers see what `mask` (B, 1, m, m) says, in the prompt and in new tokens.

    For prompts of one length without stages: there, the rows of a pass are the last ones among its keys.
    """
    attentions = [decoder.layers[i].self_attn for i in layers]

    def attend(plain: Callable, q: Tensor, k: Tensor, v: Tensor, _: Tensor | None) -> Tensor:
        rows, keys = q.shape[1], k.shape[1]
        return plain(q, k, v, mask[:, :, keys - rows : keys, :keys])

    for attention in attentions:
        attention.attend = partial(attend, attention.attend)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for attention in attentions:
            del attention.attend


def disrupt(
    decoder: LlamaDecoder, x: Tensor, image_span: tuple[int, int], block: Block | None, seeds: Sequence[str],
    max_new_tokens: int, eos_token_ids: Sequence[int] = (),
) -> Generated:  # fmt: skip
    """Greedy answers to prompts of one length, (B, n, d), the block in place for the new tokens too.

    seeds: one per prompt, for its random rows.
    """
    ask = partial(generate, decoder, x, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids)
    if block is None:
        return ask()
    mask = visible(block, x.shape[1], slice(*image_span), seeds, max_new_tokens).to(x.device)
    with blocked(decoder, block.layers(len(decoder.layers)), mask):
        return ask()


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
        seeds = [f"{seed} {examples[i].key}" for i in places]
        for block in tqdm((None, *blocks), "blocks", leave=False):
            out = disrupt(model.language_model, x, span, block, seeds, max_new_tokens, model.eos_token_ids)
            top5 = out.first_logits.float().topk(5).indices.tolist()
            for i, ids, top in zip(places, out.token_ids, top5, strict=True):
                rows[i]["results"][name_of(block)] = {"answer": text_of(model.tokenizer, ids), "top5": top}
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
    check_grid(model.config, "disruption", "take a LLaVA-1.5")
    blocks = blocks_of(args, model.config.text_config.num_hidden_layers)
    own = {name: getattr(args, name) for name in ("kinds", "readings", "layers", "keep_diagonal", "seed")}
    settings = {**weights, **data, **own, "max_new_tokens": args.max_new_tokens}

    def ask(group: list[Example], pictures: list) -> list[dict]:
        return answer(model, group, pictures, blocks, args.seed, args.max_new_tokens)

    path = results_path(args.out, "disruption", settings)
    rows = record_each(examples, path, settings, args.batch, ask, "questions")
    report(list(rows.values()), examples, blocks, args.plot)


if __name__ == "__main__":
    run_command(main)
