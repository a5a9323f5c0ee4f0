"""Accuracy against exact FLOPs: HiMAP over K1, K2, R1, R2 and criteria, and beside its baselines at equal FLOPs.

    python -m himap_ref.studies.sweep --scenes 500 --plot sweep.png

Every schedule is an evaluation of its own (evaluate.py) in the folder --out, so an interrupted sweep goes on where it
stopped; the table so far is in table.json there. Chance runs with several seeds, because one seed is one mask.

Equal FLOPs: encoder, projector and prefill within 2 points of vanilla's share, all found by planning; a method that
cannot come so near to a budget is left out at it. lost, won: questions that score lower, higher than without pruning;
p: the exact sign test.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from ..assistant import Llava
from ..commands.files import write_text
from ..commands.manners import run_command
from ..commands.report import markdown
from ..config import LlavaConfig
from ..errors import HimapError
from ..flops import pass_flops, projector_flops, vision_flops
from ..methods.plan import plan_prefill
from ..methods.schedules import METHODS, Method, parse_method
from ..model import find_image_span
from .evaluate import Evaluation, add_arguments
from .metrics import bootstrap, cells, interval, paired
from .plots import check_picture, figure
from .questions import Example

PAPER = (2, 0.5, 8, 0.25)  # K1, share kept by stage 1, K2, share kept by stage 2
TEXT, IMAGE = "text_to_image", "image_to_image"
SEEDS = 5
NEAR = 0.02  # share of vanilla: how close to a budget counts as equal


@dataclass(frozen=True)
class Entry:
    """A line of the table: one schedule, or several that differ by their seed."""

    group: str
    label: str
    methods: tuple[str, ...]


# ---------------------------------------------------------------- what is swept


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
        "chance, chance": ("random", "random"),
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
        "chance on HiMAP's layers": lambda k: f"{k1}:{k}:random,{k2}:{share(keep2)}:random",
        "FastV, last row": lambda k: f"2:{k}:last_to_image",
        "FastV, mean of all rows": lambda k: f"2:{k}:all_to_image",
        "FastV, text rows": lambda k: f"2:{k}:{TEXT}",
        "PyramidDrop": lambda k: ",".join(f"{layer}:{share(k / N)}:last_to_image" for layer in pyramid),
        "VTW": lambda k: f"{k}:0:none",  # k: the layer
        "CLS attention": lambda k: f"cls:{k}",
        "average pooling": lambda k: f"pool:{k}",  # k: the side
    }


def planned_flops(model: Llava, method: Method, before: int, after: int) -> int:
    """Of encoder, projector and prefill, with `before` and `after` tokens around the image."""
    config, N = model.config, method.num_image_tokens(model.config)
    image = method.reducer.flops(config) if method.reducer else (vision_flops(config), projector_flops(config))
    plan = plan_prefill(config.text_config, (before, before + N), before + N + after, method.stages)
    return sum(image) + pass_flops(config.text_config, plan)


def equal_flops(model: Llava, examples: list[Example], budgets: list[float] | None) -> list[Entry]:
    """For each budget (a share of vanilla) each family's schedule that comes nearest to it, if near enough.

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
    shares: dict[str, dict[str, float]] = {label: {} for label in families(model.config)}
    for label, family in families(model.config).items():
        for k in range(1, model.config.num_image_tokens if budgets else 1):  # all N tokens would be no stage
            try:
                method = parse_method(family(k), model)
                shares[label][family(k)] = planned_flops(model, method, before, after) / vanilla
            except HimapError:  # no such layer, side or number of tokens
                continue
    for budget in sorted(budgets):
        for label, by_text in shares.items():
            nearest = min(by_text, key=lambda text: abs(by_text[text] - budget), default=None)
            if nearest and abs(by_text[nearest] - budget) < NEAR:
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


# ---------------------------------------------------------------- measuring

Rows = dict[str, dict]  # id -> what an evaluation recorded


def kinds_of(rows: list[dict]) -> dict[str, float]:
    """Mean score by kind of question."""
    rows = [row for row in rows if row["correct"] is not None]
    kinds = sorted({row["kind"] for row in rows if "kind" in row})
    return {kind: mean(row["correct"] for row in rows if row.get("kind") == kind) for kind in kinds}


def line_of(entry: Entry, measured: list[tuple[dict, Rows]], vanilla: Rows) -> dict:
    """An entry's figures over the questions that were answered in all of its runs and in vanilla.

    With several seeds a question's score is their mean, so that the interval is over questions; spread: of the seeds.
    Of questions without a label only same_answer tells; where none has one, accuracy and all that follows are None.
    """
    runs = [rows for _, rows in measured]
    ids = [id for id in vanilla if all("error" not in rows[id] for rows in (vanilla, *runs))]
    if not ids:
        raise HimapError(f"{entry.label}: no question was answered both with and without pruning")
    every, before = [[rows[id] for id in ids] for rows in runs], [vanilla[id] for id in ids]
    judged = [id for id in ids if vanilla[id]["correct"] is not None]
    by_seed = [[rows[id]["correct"] for id in judged] for rows in runs]
    scores = [mean(same) for same in zip(*by_seed, strict=True)]
    means = [mean(seed) for seed in by_seed] if judged else []
    pairs = [paired([vanilla[id]["correct"] for id in judged], seed) for seed in by_seed] if judged else []
    summaries = [summary for summary, _ in measured]
    return {
        "group": entry.group, "label": entry.label, "methods": entry.methods,
        "n": len(ids), "judged": len(judged), "left_out": len(vanilla) - len(ids),
        "accuracy": mean(scores) if judged else None,
        "interval": (interval(scores) if len(runs) == 1 else bootstrap(scores)) if judged else None,
        "spread": (min(means), max(means)) if len(means) > 1 else None,
        **{name: mean(s[name] for s in summaries) for name in ("ratio", "decoder_ratio", "image_only_ratio")},
        "kept": summaries[0]["kept"],
        "same_answer": mean(a["answer"] == b["answer"] for rows in every for a, b in zip(before, rows, strict=True)),
        **{name: mean(pair[name] for pair in pairs) if judged else None for name in ("lost", "won")},
        "p": pairs[0]["p"] if len(pairs) == 1 else None,
        "kinds": kinds_of([row for rows in every for row in rows]),
    }  # fmt: skip


# ---------------------------------------------------------------- showing


def table(lines: list[dict]) -> str:
    kinds, rows = list(lines[0]["kinds"]), []
    header = ["", "", "n", "FLOPs", "decoder", "image tokens", "accuracy", "95 %", "same answer", "lost", "won", "p"]
    for line in lines:
        accuracy, between = cells(line["accuracy"], line["interval"])
        few = f" ({line['judged']} judged)" if 0 < line["judged"] < line["n"] else ""
        flips = ["" if line[name] is None else f"{line[name]:g}" for name in ("lost", "won")]
        spread = " ({:.1%} - {:.1%})".format(*line["spread"]) if line["spread"] else ""
        rows.append([
            line["group"], line["label"], f"{line['n']}{few}", f"{line['ratio']:.1%}", f"{line['decoder_ratio']:.1%}",
            " > ".join(f"{count:g}" for count in line["kept"]), accuracy + spread,
            between, f"{line['same_answer']:.1%}", *flips,
            "" if line["p"] is None else f"{line['p']:.1g}", *(f"{line['kinds'].get(kind, 0):.1%}" for kind in kinds),
        ])  # fmt: skip
    return f"{markdown([*header, *kinds], rows)}\n\n(of several seeds the mean, in brackets their range)"


def draw(lines: list[dict], path: Path) -> None:
    """Accuracy against FLOPs: methods at equal FLOPs, HiMAP's parameters one at a time, and all that stands alone."""
    panels = {"methods at equal FLOPs": ("equal",), "HiMAP, one parameter at a time": ("K1", "K2", "R1", "R2")}
    panels["criteria on the paper's schedule; methods as published"] = ("criteria", "as published", "own")
    with figure(path, panels=3, size=(19, 6)) as axes:
        for axis, (title, groups) in zip(axes, panels.items(), strict=True):
            curves: dict[str, list[dict]] = {}
            for line in lines:
                if line["group"].startswith(groups):
                    name = line["group"] if groups[0] == "K1" else line["label"]
                    curves.setdefault(name, []).append(line)
            for number, (name, curve) in enumerate(curves.items()):
                curve.sort(key=lambda line: line["ratio"])
                x, y = [line["ratio"] for line in curve], [line["accuracy"] for line in curve]
                errors = [[abs(line["accuracy"] - line["interval"][side]) for line in curve] for side in (0, 1)]
                look = {"color": f"C{number % 10}", "marker": "os^Dv"[number // 10 % 5], "label": name}
                axis.errorbar(x, y, yerr=errors, markersize=5, capsize=2, linewidth=1 if number else 2.5, **look)
            axis.axhline(lines[0]["accuracy"], color="gray", linestyle=":", label="vanilla")
            axis.set(xlabel="FLOPs of an answer, share of vanilla", ylabel="accuracy", title=title)
            axis.legend(fontsize=7, loc="lower right")
        axes[0].text(0.02, 0.02, f"n = {lines[0]['n']}, 95 % intervals", transform=axes[0].transAxes, fontsize=8)


def entries_of(args: argparse.Namespace, evaluation: Evaluation) -> list[Entry]:
    """What the command line asks for; vanilla first."""
    model, vanilla = evaluation.model, Entry("", "vanilla", ("none",))
    if args.methods:  # as typed: a mistake in them ends the command
        chosen = [Entry("own", text, seeded(text)) for text in args.methods]
        return [vanilla, *(entry for entry in chosen if [parse_method(text, model) for text in entry.methods])]
    if not all(0 < budget <= 1 for budget in args.budgets or ()):
        raise HimapError(f"--budgets {args.budgets}: expected shares of vanilla's FLOPs, above 0 and at most 1")
    swept = published(model.config) + ablations(args.k1, args.k2, args.keep1, args.keep2) + criteria()
    return [vanilla, *fitting(swept, model), *equal_flops(model, evaluation.examples, args.budgets)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, max_new_tokens=16, batch=64)
    several: Any = {"nargs": "*"}
    parser.add_argument("--k1", type=int, default=[1, 2, 3, 4, 6], **several)
    parser.add_argument("--k2", type=int, default=[4, 6, 8, 10, 15], **several)
    parser.add_argument("--keep1", type=float, default=[0.25, 0.5, 0.75], help="1 - R1", **several)
    parser.add_argument("--keep2", type=float, default=[0.1, 0.25, 0.5], help="1 - R2", **several)
    parser.add_argument("--budgets", type=float, help="shares of vanilla's FLOPs at which methods are compared; "
                        "default: four around the paper's schedule", **several)  # fmt: skip
    parser.add_argument("--methods", nargs="+", help="measure only these (names or stages), beside vanilla")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="folder of the evaluations")
    parser.add_argument("--plot", type=Path, help="draw accuracy against FLOPs into this file")
    args = parser.parse_args()
    if args.plot:
        check_picture(args.plot)
    evaluation = Evaluation.from_args(args)
    if evaluation.metric.score is None:
        raise HimapError(f"--metric {args.metric} judges all answers at once: a sweep needs one that judges each")
    if args.plot and not any(example.answers for example in evaluation.examples):
        raise HimapError(f"{args.questions}: no question has a label, so there is no accuracy for --plot to draw")
    lines, entries = [], entries_of(args, evaluation)
    vanilla: dict[str, dict] = {}
    for number, entry in enumerate(entries, start=1):
        print(f"{number} of {len(entries)}: {entry.group} {entry.label}", file=sys.stderr)
        measured = [evaluation.run(parse_method(text, evaluation.model), args.out) for text in entry.methods]
        vanilla = vanilla or measured[0][1]
        lines.append(line_of(entry, measured, vanilla))
        write_text(args.out / "table.json", json.dumps(lines, indent=1) + "\n")
    print(table(lines))
    if args.plot:
        draw(lines, args.plot)


if __name__ == "__main__":
    run_command(main)
