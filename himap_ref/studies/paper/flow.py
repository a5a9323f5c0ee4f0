"""Where information flows in the decoder, layer by layer: attention times its gradient (the paper's findings 1 and 2).

    python -m himap_ref.studies flow --scenes 20 --plot runs/flow.png --show runs/tokens.png
    python -m himap_ref.studies flow --weights llava-1.5-7b --questions FILE --image-folder DIR --plot runs/flow.png

The loss L is the cross entropy of one label at the prompt's last position: the first token of the answer or, with
--label greedy, the token that the model itself would say. The saliency S[i, j], mean over heads, tells how much it
matters to L that row i reads column j. Two definitions, both recorded; --saliency chooses what is shown:

    plain      |A * dL/dA|: to first order, how far L would move if A[i, j] were cut
    official   |A * A * dL/dA|: what the authors' code computes. It differentiates by a factor of 1 put before A, whose
               gradient is A * dL/dA already, and multiplies by A again; its recorded numbers show it.

Information flows from key columns to query rows, and every name here says so in this order:

    image->text     text rows read image columns: S_vt, stage 1's direction
    image->image    image rows read image columns: stage 2's direction
    text->image     image rows read text columns: S_tv. Exactly 0, as causal attention shows no row what comes later;
                    the only text that reaches the picture is what stands before it, system->image
    into text       sum over the query rows of the text, whatever they read (official "props for all": per row)
    out of image    sum over the key columns of the image, whoever reads them

A mean per pair divides by the pairs (row, column) that causality lets see each other.

Memory: the forward pass keeps what entered each layer; the backward pass computes one layer anew, with its maps (55 MiB
each for 7B's 32 heads and 671 tokens), and drops them before the next. Measured at that size on a CPU, above the
weights: 297 MiB in bf16 with 2 layers, 307 with 4 (fp32: 350, 371), hence 0.45 GiB (0.65) with 7B's 32.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import cast

import torch
from PIL import Image
from torch import Tensor

from ...assistant import Llava
from ...cache import causal_mask
from ...commands.files import check_writable, write_whole
from ...commands.manners import run_command
from ...commands.options import add_model_arguments
from ...commands.picture import enlarge, heat_panel, look, sheet
from ...decoder import DecoderLayer, LlamaDecoder, rope
from ...errors import HimapError
from ...methods.reducers import check_grid
from ...model import find_image_span
from ...prompt import encode_prompt
from ...pruning import attention_map
from ..accuracy.evaluate import peak_memory
from ..common.asking import record_each
from ..common.plots import check_picture, figure
from ..common.records import load_recorded, results_path
from ..questions.selection import Example, add_question_arguments, load_examples

GROUPS = ("system", "image", "text")
DIRECTIONS = tuple(f"{source}->{target}" for target in GROUPS for source in GROUPS)
DEFINITIONS = ("plain", "official")
BLUE, PURPLE, RED, GREEN = "#2a7f9e", "#965e9b", "#c8553d", "#5b8c5a"
PANEL, PER_ROW = 168, 8  # of `draw_tokens`: pixels a side, panels beside each other

# ---------------------------------------------------------------- saliency: forward once, backward layer by layer
# Shapes: n tokens, d hidden size, h query heads; one prompt at a time.


def run_layer(layer: DecoderLayer, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(1, n, d) -> the layer's output and its attention A (1, h, n, n) in fp32, which the output is computed from.

    Beside `DecoderLayer.forward`, because its fused attention has no A that a gradient could be taken of; tests hold
    both together.
    """
    positions = torch.arange(x.shape[1], device=x.device)[None]
    q, k, v = layer.self_attn.qkv(layer.input_layernorm(x), *cos_sin)
    A = attention_map(q, k, causal_mask(positions, positions))
    v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)  # a key/value head serves neighbouring query heads
    x = x + layer.self_attn.o_proj((A.to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.post_attention_layernorm(x)), A


class ForwardPass:
    """A prompt run forward, unpruned, ready for the way back. logits: (vocab,) of the last row."""

    @torch.no_grad()
    def __init__(self, decoder: LlamaDecoder, inputs_embeds: Tensor):
        """inputs_embeds: (1, n, d)."""
        self.decoder, self.states = decoder, [inputs_embeds]  # states: what entered each layer, and left the last one
        positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        self.cos_sin = rope(positions, decoder.config, inputs_embeds.dtype)
        for layer in decoder.layers:
            self.states.append(run_layer(layer, self.states[-1], self.cos_sin)[0])
        self.logits = decoder.logits(decoder.norm(self.states[-1][:, -1]))[0].float()

    def saliency(self, label: int) -> Iterator[Tensor]:
        """(2, n, n) for each layer, the last one first: S by each of `DEFINITIONS`, query rows x key columns, fp32.

        Raises HimapError for a label that is no token, or gradients that are not finite.
        """
        if not 0 <= label < len(self.logits):
            raise HimapError(f"label {label} is no token: the model's ids are 0..{len(self.logits) - 1}")
        wrong = self.logits.softmax(dim=-1)
        wrong[label] -= 1  # dL/dlogits of the cross entropy
        gradient, scale = to_unit(wrong)
        x = self.states[-1].detach().requires_grad_()
        with torch.enable_grad():
            logits = self.decoder.logits(self.decoder.norm(x[:, -1]))[0]
        (gradient,) = torch.autograd.grad(logits, x, gradient.to(x.dtype))  # (1, n, d), of the last row alone
        for layer, x in zip(reversed(self.decoder.layers), reversed(self.states[:-1]), strict=True):
            gradient, factor = to_unit(gradient)
            scale *= factor
            S, gradient = layer_saliency(layer, x, gradient, self.cos_sin)
            if not S.isfinite().all():
                raise HimapError("the saliency is NaN or infinite: damaged weights, or a --dtype too narrow for it")
            yield S * scale


@torch.enable_grad()
def layer_saliency(
    layer: DecoderLayer, x: Tensor, gradient: Tensor, cos_sin: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """x (1, n, d) entered the layer, gradient (1, n, d) is dL/d(output) -> S (2, n, n) and dL/dx.

    A function of its own, so that the layer's maps are gone when the next one is computed.
    """
    x = x.detach().requires_grad_()
    out, A = run_layer(layer, x, cos_sin)
    gradient, product = torch.autograd.grad(out, (x, A), gradient)  # product: dL/dA, (1, h, n, n)
    A = A.detach()
    plain = product.mul_(A).abs_().mean(dim=1)  # in place: one map of all heads is 55 MiB at 7B's size
    return torch.cat((plain, product.mul_(A).mean(dim=1))), gradient


def to_unit(gradient: Tensor) -> tuple[Tensor, float]:
    """The gradient divided by a power of two, its largest number then between 1/2 and 1, and that power.

    A sure answer has gradients so small that fp16 would make most of them 0; the backward pass is linear, so the power
    may be multiplied back onto what comes of it.
    """
    power = 2.0 ** torch.frexp(gradient.abs().max().float()).exponent.item()
    return gradient / power, power


# ---------------------------------------------------------------- from S to figures


def groups_of(image_span: tuple[int, int], n: int) -> dict[str, slice]:
    """The rows, and likewise the columns, of each of `GROUPS` in a prompt of n tokens; text: all behind the image."""
    start, stop = image_span
    return dict(zip(GROUPS, (slice(0, start), slice(start, stop), slice(stop, n)), strict=True))


def flows(S: Tensor, groups: dict[str, slice]) -> dict[str, list[float]]:
    """(2, n, n) -> for each direction the sum of S over the target's rows and the source's columns, by definition."""
    sums = {}
    for direction in DIRECTIONS:
        source, target = direction.split("->")
        sums[direction] = S[:, groups[target], groups[source]].sum(dim=(1, 2)).tolist()
    return sums


def visible_pairs(direction: str, tokens: dict[str, int]) -> int:
    """How many (row, column) pairs of a direction causality lets see each other, the diagonal included."""
    source, target = direction.split("->")
    if source == target:
        return tokens[source] * (tokens[source] + 1) // 2
    return tokens[source] * tokens[target] if GROUPS.index(source) < GROUPS.index(target) else 0


def by_layer(row: dict, definition: str, equal: bool = False) -> dict[str, list[float]]:
    """What is shown of one record, a list over the layers each. equal: all divided by the example's total saliency.

    "into GROUP" and "out of GROUP": sum per query row, per key column; "SOURCE->TARGET": sum; "mean SOURCE->TARGET":
    per visible pair, if there is any; "to text": image->text as a share of itself and image->image.
    """
    sums, tokens = row[definition], row["tokens"]
    total = (sum(map(sum, sums.values())) if equal else 1.0) or 1.0
    sums = {direction: [value / total for value in layers] for direction, layers in sums.items()}
    shown = dict(sums)
    for group in GROUPS:
        into = zip(*(sums[f"{source}->{group}"] for source in GROUPS), strict=True)
        out = zip(*(sums[f"{group}->{target}"] for target in GROUPS), strict=True)
        shown[f"into {group}"] = [sum(parts) / max(1, tokens[group]) for parts in into]
        shown[f"out of {group}"] = [sum(parts) / max(1, tokens[group]) for parts in out]
    for direction in DIRECTIONS:
        if pairs := visible_pairs(direction, tokens):
            shown[f"mean {direction}"] = [value / pairs for value in sums[direction]]
    both = zip(sums["image->text"], sums["image->image"], strict=True)
    shown["to text"] = [text / (text + image) if text + image else 0.0 for text, image in both]
    return shown


def mean_by_layer(rows: Sequence[dict], definition: str, equal: bool = False) -> dict[str, list[float]]:
    """`by_layer` averaged over the examples."""
    every = [by_layer(row, definition, equal) for row in rows]
    return {name: [fmean(layer) for layer in zip(*(one[name] for one in every), strict=True)] for name in every[0]}


# ---------------------------------------------------------------- one example


def prepare(model: Llava, example: Example, label: str) -> tuple[ForwardPass, dict[str, slice], int]:
    """The forward pass, its groups and the label's id. label: "answer" or "greedy".

    Raises HimapError if the picture, the question or the answer cannot be used.
    """
    ids, context = model.encode(example.question), model.config.text_config.max_position_embeddings
    if len(ids) > context:
        raise HimapError(f"the prompt has {len(ids)} tokens, the model's context {context}: shorten the question")
    said = None if label == "greedy" else answer_label(model, example)
    with torch.no_grad():
        image_embeds = model.embed_image(model.preprocess(example.picture()))[0]
        run = ForwardPass(model.language_model, model.embed(ids, image_embeds)[None])
    span = find_image_span(ids, model.config.image_token_index)
    target = int(run.logits.argmax()) if said is None else said
    return run, groups_of(cast(tuple[int, int], span), len(ids)), target  # with a picture never None


def answer_label(model: Llava, example: Example) -> int:
    """The first token that the model must say: that of the answer as it stands behind the prompt, after a space.

    Of several answers the most frequent one. (The official code takes the answer's token without the space before it,
    which LLaMA's tokenizer tells apart from the one that is said.)
    """
    answers = [answer.strip() for answer in example.answers if answer.strip()]
    if not answers:
        raise HimapError("no answer to take the label from: use --label greedy")
    answer, config = max(answers, key=answers.count), model.config

    def ids(template: str) -> list[int]:
        return encode_prompt(
            model.tokenizer, example.question, template, config.image_token_index, config.num_image_tokens
        )

    template = model.template.partition("{answer}")[0]
    prompt, whole = ids(template), ids(f"{template}{'' if template[-1:].isspace() else ' '}{answer}")
    if len(whole) == len(prompt) or whole[: len(prompt)] != prompt:
        raise HimapError(f"the answer {answer!r} has no first token of its own: use --label greedy")
    return whole[len(prompt)]


def measure(model: Llava, example: Example, label: str) -> dict:
    """What is recorded of one example: for each definition the sums by direction, a list over the layers each."""
    run, groups, target = prepare(model, example, label)
    layers = [flows(S, groups) for S in run.saliency(target)][::-1]
    row = {
        "label": target,
        "label_text": model.tokenizer.decode([target]).strip(),
        "loss": -run.logits.log_softmax(dim=-1)[target].item(),
        "tokens": {group: place.stop - place.start for group, place in groups.items()},
    }
    for d, definition in enumerate(DEFINITIONS):
        row[definition] = {name: [float(f"{layer[name][d]:.6g}") for layer in layers] for name in DIRECTIONS}
    return row


# ---------------------------------------------------------------- table and pictures

COLUMNS = {  # heading: what `by_layer` calls the columns below it
    "into, per query row": ("into system", "into image", "into text"),
    "out of, per key column": ("out of system", "out of image", "out of text"),
    "sum": ("image->image", "image->text", "text->image", "system->image"),
    "mean per pair": ("mean image->image", "mean image->text"),
}
SHORT = {"image->image": "img->img", "image->text": "img->txt", "text->image": "txt->img", "system->image": "sys->img"}


def table(shown: dict[str, list[float]]) -> str:
    """One line per layer. The last column: of what flows out of the image to image and text, the share to text."""
    names = [name for group in COLUMNS.values() for name in group]
    heads = [name.removeprefix("mean ").split(" ")[-1] for name in names]
    lines = [
        "     " + "".join(f"{heading:^{9 * len(group)}}" for heading, group in COLUMNS.items()),
        "layer" + "".join(f"{SHORT.get(head, head):>9}" for head in heads) + "  to text",
    ]
    for layer, share in enumerate(shown["to text"]):
        lines.append(f"{layer:5}" + "".join(f"{shown[name][layer]:9.1e}" for name in names) + f"{share:9.1%}")
    return "\n".join(lines)


def summary(rows: Sequence[dict], errors: int, definition: str, equal: bool) -> str:
    """How many examples the table is the mean of, and whether a few of them make it up."""
    totals = sorted((sum(map(sum, row[definition].values())) for row in rows), reverse=True)
    top = -(-len(totals) // 20)
    share = sum(totals[:top]) / (sum(totals) or 1.0)
    weight = "each scaled to 1" if equal else f"the {top} most salient make up {share:.0%}; --equal weighs all alike"
    return f"{definition} saliency, mean of {len(rows)} examples ({weight}); {errors} could not be used"


def draw_bars(path: Path, shown: dict[str, list[float]], title: str) -> None:
    """The paper's two figures: flow into a row of each group, and what flows out of the image. Below them the same on a
    logarithmic scale, where what is small is seen too; as points, since bars would start anywhere."""
    panels = {
        "into a token of each group (per query row)": {"into system": RED, "into image": BLUE, "into text": GREEN},
        "out of the image tokens (sum)": {"image->image": BLUE, "image->text": PURPLE},
    }
    with figure(path, panels=4, size=(12, 8), across=2) as axes:
        for axis, below, (heading, colors) in zip(axes, axes[2:], panels.items(), strict=False):
            width = 0.8 / len(colors)
            for place, (name, color) in enumerate(colors.items()):
                left = place * width - 0.4  # of the layer's number, the middle of its bars
                x = [layer + left for layer in range(len(shown[name]))]
                axis.bar(x, shown[name], width, align="edge", label=name, color=color)
                seen = [value or math.nan for value in shown[name]]  # an exact 0 has no logarithm
                below.plot(seen, marker="o", markersize=5, label=name, color=color)
            axis.set(title=heading, xlabel="layer", ylabel=title)
            below.set(yscale="log", xlabel="layer", ylabel=f"{title}, logarithmic")
            axis.legend()


def draw_tokens(model: Llava, example: Example, label: str, definition: str) -> Image.Image:
    """The picture, then for each layer where image->text, and below where image->image comes from: the brighter, the
    more flows out of that patch; each panel has its own scale, whose sum stands above it."""
    run, groups, target = prepare(model, example, label)
    out_of: dict[str, list[Tensor]] = {"image->text": [], "image->image": []}
    for S in run.saliency(target):
        for direction, layers in out_of.items():
            rows = groups[direction.split("->")[1]]
            layers.insert(0, S[DEFINITIONS.index(definition), rows, groups["image"]].sum(dim=0))  # (N,)
    frame, side = look(model, example.picture()), math.isqrt(model.config.num_image_tokens)
    frame = enlarge(frame, side, PANEL)
    sections = [[(example.question.split("\n")[0], frame)]]
    for direction, layers in out_of.items():
        captions = (f"{i}: {direction}  {tokens.sum().item():.1e}" for i, tokens in enumerate(layers))
        scores = (dict(enumerate(tokens.tolist(), side**2 - len(tokens))) for tokens in layers)  # class token: -1
        panels = [*zip(captions, (heat_panel(frame, side, each) for each in scores), strict=True)]
        sections += [panels[start : start + PER_ROW] for start in range(0, len(panels), PER_ROW)]
    return sheet(sections, 14)


# ---------------------------------------------------------------- running it


def show(args: argparse.Namespace, model: Llava, examples: Sequence[Example], rows: Sequence[dict]) -> None:
    """Table and pictures of what was recorded of each example; raises HimapError if that is nothing but errors."""
    usable = [(example, row) for example, row in zip(examples, rows, strict=True) if "error" not in row]
    if not usable:
        raise HimapError(f"none of {len(rows)} examples could be used; the first: {rows[0]['error']}")
    measured = [row for _, row in usable]
    shown = mean_by_layer(measured, args.saliency, args.equal)
    print(table(shown))
    print(summary(measured, len(rows) - len(measured), args.saliency, args.equal))
    print(f"peak memory {peak_memory(args.device) / 2**30:.2f} GiB")
    if args.plot:
        draw_bars(args.plot, shown, f"{args.saliency} saliency" + (", share of all" if args.equal else ""))
    if args.show:
        write_whole(args.show, draw_tokens(model, usable[0][0], args.label, args.saliency).save)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model_arguments(parser)
    add_question_arguments(parser)
    parser.add_argument("--label", choices=("answer", "greedy"), default="answer",
                        help="whose first token the loss is of: the right answer's or the model's")  # fmt: skip
    parser.add_argument("--saliency", choices=DEFINITIONS, default="plain", help="what is shown; both are recorded")
    parser.add_argument("--equal", action="store_true", help="show every example's saliency scaled to a total of 1")
    parser.add_argument("--out", type=Path, default=Path("runs/flow"), help="a file, or a folder for one")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="bar chart by layer; needs matplotlib (extra plots)")
    parser.add_argument("--show", metavar="FILE.png", type=Path,
                        help="the first example's picture, tinted by what flows out of each image token")  # fmt: skip
    args = parser.parse_args()
    if args.plot:
        check_picture(args.plot)
    if args.show:
        check_writable(args.show)
    examples, asked = load_examples(args, needs_picture=True)
    model, settings = load_recorded(args)
    check_grid(model.config, "flow", "take a LLaVA-1.5")
    settings = {**settings, **asked, "label": args.label}
    path = results_path(args.out, "flow", settings)
    rows = record_each(examples, path, settings, 1, lambda group, _: [measure(model, group[0], args.label)], "flow")
    show(args, model, examples, list(rows.values()))


if __name__ == "__main__":
    run_command(main)
