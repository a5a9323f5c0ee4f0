"""Accuracy against exact FLOPs: HiMAP over K1, K2, R1, R2 and criteria, and beside its baselines at equal FLOPs.

    python -m himap_ref.studies.sweep --scenes 500 --plot sweep.png

Every schedule is an evaluation of its own (evaluate.py) in the folder --out, so an interrupted sweep goes on where it
stopped. Chance runs with several seeds, because one seed is one mask: its line is their mean, its interval their range.
Paired: the same questions with and without pruning; "lost" were right without it, "won" are right only with it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from ..config import LlavaConfig
from ..errors import HimapError, run_command
from ..flops import pass_flops, projector_flops, vision_flops
from ..model import Llava
from .evaluate import Evaluation, add_arguments
from .methods import Method, parse_method
from .metrics import interval, paired
from .plan import plan_prefill
from .plots import check_picture, figure
from .questions import Example
from .report import markdown

PAPER = (2, 0.5, 8, 0.25)  # K1, share kept by stage 1, K2, share kept by stage 2
SCORES = ("text_to_image", "image_to_image")
SEEDS = 5


@dataclass(frozen=True)
class Entry:
    """A line of the table: one schedule, or several that differ by their seed."""

    group: str
    label: str
    methods: tuple[str, ...]


# ---------------------------------------------------------------- what is swept


def stages_text(k1: int, keep1: float, k2: int, keep2: float, first: str = SCORES[0], second: str = SCORES[1]) -> str:
    return f"{k1}:{keep1}:{first},{k2}:{keep2}:{second}"


def ablations(k1s: Iterable[int], k2s: Iterable[int], keep1s: Iterable[float], keep2s: Iterable[float]) -> list[Entry]:
    """One of the four at a time, the others as in the paper."""
    k1, keep1, k2, keep2 = PAPER
    lines = [("K1", f"K1 = {k}", (k, keep1, k2, keep2)) for k in k1s if k < k2]
    lines += [("K2", f"K2 = {k}", (k1, keep1, k, keep2)) for k in k2s if k > k1]
    lines += [("R1", f"stage 1 keeps {keep:g}", (k1, keep, k2, keep2)) for keep in keep1s]
    lines += [("R2", f"stage 2 keeps {keep:g}", (k1, keep1, k2, keep)) for keep in keep2s]
    return [Entry(group, label, (stages_text(*schedule),)) for group, label, schedule in lines]


def criteria() -> list[Entry]:
    """Both stages' scores exchanged, each stage alone, the sum's bias taken out; on the paper's layers and shares."""
    text, image = SCORES
    k1, keep1, k2, keep2 = PAPER
    pairs = {
        "text, image (HiMAP)": (text, image), "image, text (swapped)": (image, text), "text, text": (text, text),
        "image, image": (image, image), "text, image mean": (text, "image_to_image_mean"),
        "image mean, image mean": ("image_to_image_mean",) * 2, "last row, last row": ("last_to_image",) * 2,
    }  # fmt: skip
    entries = [Entry("criteria", label, (stages_text(*PAPER, *scores),)) for label, scores in pairs.items()]
    seeds = tuple(stages_text(*PAPER, f"random{seed}", f"random{seed}") for seed in range(SEEDS))
    return [
        *entries,
        Entry("criteria", "chance, chance", seeds),
        Entry("criteria", "stage 1 alone", (f"{k1}:{keep1}:{text}",)),
        Entry("criteria", "stage 2 alone", (f"{k2}:{keep2}:{image}",)),
    ]


def families(config: LlavaConfig) -> dict[str, Callable[[int], tuple[str, ...]]]:
    """Method -> its schedules by a whole number: image tokens kept by the first stage, unless said otherwise."""
    N, T = config.num_image_tokens, config.text_config.num_hidden_layers
    k1, _, k2, share = PAPER

    def himap(first: str, second: str, k1: int = k1, share: float = share) -> Callable[[int], tuple[str, ...]]:
        return lambda k: (f"{k1}:{k}:{first},{k2}:{share}:{second}",)

    def pyramid(k: int) -> tuple[str, ...]:
        layers = [(quarter * T // 4) for quarter in (1, 2, 3)]
        return (",".join(f"{layer}:{k / N:.4f}:last_to_image" for layer in layers),)

    def chance(k: int) -> tuple[str, ...]:
        return tuple(f"{k1}:{k}:random{seed},{k2}:{share}:random{seed}" for seed in range(SEEDS))

    return {
        "HiMAP": himap(*SCORES),
        "HiMAP, stage 2 by the mean": himap(SCORES[0], "image_to_image_mean"),
        "HiMAP, K1 = 4, second share 1/2": himap(*SCORES, k1=4, share=0.5),
        "chance, two stages": chance,
        "chance, layer 2": lambda k: tuple(f"2:{k}:random{seed}" for seed in range(SEEDS)),
        "FastV, last row": lambda k: (f"2:{k}:last_to_image",),
        "FastV, mean of all rows": lambda k: (f"2:{k}:all_to_image",),
        "FastV, text rows": lambda k: (f"2:{k}:text_to_image",),
        "PyramidDrop": pyramid,  # k / N is the share that each of its three stages keeps
        "VTW": lambda k: (f"{k}:0:none",) if 0 < k < T else (),  # k is the layer
        "CLS attention": lambda k: (f"cls:{k}",),
        "average pooling": lambda k: (f"pool:{k}",) if k * k <= N else (),  # k is the side
    }


def planned_flops(model: Llava, method: Method, before: int, after: int) -> int:
    """Of picture and prefill, with `before` and `after` tokens around the image."""
    config, N = model.config, method.num_image_tokens(model.config)
    image = method.reducer.flops(config) if method.reducer else (vision_flops(config), projector_flops(config))
    plan = plan_prefill(config.text_config, (before, before + N), before + N + after, method.stages)
    return sum(image) + pass_flops(config.text_config, plan)


def equal_flops(model: Llava, examples: list[Example], budgets: Iterable[float]) -> list[Entry]:
    """For each budget (a share of vanilla's picture and prefill) each family's schedule that comes nearest to it.

    A family that reaches it to no better than 5 points is left out there.
    """
    prompts = [model.encode(example.question) for example in examples[:200]]
    before = prompts[0].image_span[0]
    after = int(median(len(prompt.ids) - prompt.image_span[1] for prompt in prompts))
    vanilla, entries = planned_flops(model, Method("none"), before, after), []
    for label, family in families(model.config).items():
        shares = {}  # schedules -> share of vanilla
        for k in range(1, model.config.num_image_tokens + 1):
            if texts := family(k):
                method = parse_method(texts[0], model)
                shares[texts] = planned_flops(model, method, before, after) / vanilla
        for budget in budgets:
            nearest = min(shares, key=lambda texts: abs(shares[texts] - budget))
            if abs(shares[nearest] - budget) < 0.05:
                entries.append(Entry(f"equal FLOPs, {budget:.0%}", label, nearest))
    return sorted(entries, key=lambda entry: entry.group)  # stable: the families keep their order


# ---------------------------------------------------------------- measuring


def measure(evaluation: Evaluation, entry: Entry, folder: Path) -> list[tuple[dict, dict]]:
    """(summary, rows by question) of each of the entry's schedules."""
    paths = [folder / (re.sub(r"[^\w.]+", "-", text) + ".jsonl") for text in entry.methods]
    methods = [parse_method(text, evaluation.model) for text in entry.methods]
    return [evaluation.run(method, path) for method, path in zip(methods, paths, strict=True)]


def line_of(entry: Entry, measured: list[tuple[dict, dict]], vanilla: dict) -> dict:
    """An entry's figures: accuracy with its interval, FLOPs, and the comparison with vanilla question by question."""
    scores = [[row["correct"] for row in rows.values() if "error" not in row] for _, rows in measured]
    accuracies = [mean(values) for values in scores]
    pairs = [(vanilla[id], row) for _, rows in measured for id, row in rows.items() if "error" not in row]
    same = mean(before["answer"] == row["answer"] for before, row in pairs)
    both = paired([before["correct"] > 0.5 for before, _ in pairs], [row["correct"] > 0.5 for _, row in pairs])
    kinds = sorted({row["kind"] for row in vanilla.values() if "kind" in row})
    return {
        "group": entry.group, "label": entry.label, "methods": entry.methods,
        "n": len(scores[0]), "accuracy": mean(accuracies),
        "interval": interval(scores[0]) if len(scores) == 1 else (min(accuracies), max(accuracies)),
        "decoder_ratio": mean(summary["decoder_ratio"] for summary, _ in measured),
        "ratio": mean(summary["ratio"] for summary, _ in measured),
        "kept": measured[0][0]["kept"], "same_answer": same,
        "lost": both["lost"] / len(measured), "won": both["won"] / len(measured),
        "kinds": {kind: mean(row["correct"] for _, row in pairs if row["kind"] == kind) for kind in kinds},
    }  # fmt: skip


# ---------------------------------------------------------------- showing


def table(lines: list[dict]) -> str:
    kinds, rows = list(lines[0]["kinds"]), []
    header = ["", "", "FLOPs", "decoder", "image tokens", "accuracy", "95 %", "same answer", "lost", "won", *kinds]
    for line in lines:
        low, high = line["interval"]
        rows.append([
            line["group"], line["label"], f"{line['ratio']:.1%}", f"{line['decoder_ratio']:.1%}",
            " > ".join(f"{count:g}" for count in line["kept"]), f"{line['accuracy']:.1%}", f"{low:.1%} - {high:.1%}",
            f"{line['same_answer']:.1%}", f"{line['lost']:g}", f"{line['won']:g}",
            *(f"{line['kinds'][kind]:.1%}" for kind in kinds),
        ])  # fmt: skip
    return markdown(header, rows)


def draw(lines: list[dict], path: Path) -> None:
    """Accuracy against FLOPs: left each family over the budgets, right HiMAP's own parameters one at a time."""
    with figure(path, panels=2, size=(13, 5.5)) as panels:
        for panel, wanted in zip(panels, ("equal FLOPs", ("K1", "K2", "R1", "R2")), strict=True):
            curves: dict[str, list[dict]] = {}
            for line in lines:
                if line["group"].startswith(wanted):
                    name = line["label"] if isinstance(wanted, str) else line["group"]
                    curves.setdefault(name, []).append(line)
            for name, curve in curves.items():
                curve.sort(key=lambda line: line["ratio"])
                x, y = [line["ratio"] for line in curve], [line["accuracy"] for line in curve]
                errors = [[abs(line["accuracy"] - line["interval"][side]) for line in curve] for side in (0, 1)]
                panel.errorbar(x, y, yerr=errors, marker="o", markersize=4, capsize=2, linewidth=1, label=name)
            panel.axhline(lines[0]["accuracy"], color="gray", linestyle=":", label="vanilla")
            panel.set(xlabel="FLOPs of an answer, share of vanilla", ylabel="accuracy")
            panel.legend(fontsize=7)
        panels[0].set_title("methods at equal FLOPs")
        panels[1].set_title("HiMAP: one parameter at a time, the others as in the paper")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, max_new_tokens=16, batch=64)
    several = {"nargs": "*"}
    parser.add_argument("--k1", type=int, default=[1, 2, 3, 4, 6], **several)
    parser.add_argument("--k2", type=int, default=[4, 6, 8, 10], **several)
    parser.add_argument("--keep1", type=float, default=[0.25, 0.5, 0.75], help="1 - R1", **several)
    parser.add_argument("--keep2", type=float, default=[0.1, 0.25, 0.5], help="1 - R2", **several)
    parser.add_argument("--budgets", type=float, default=[0.55, 0.65, 0.75, 0.85], **several,
                        help="shares of vanilla's FLOPs at which methods are compared")  # fmt: skip
    parser.add_argument("--methods", nargs="+", help="measure only these (names or stages), beside vanilla")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="folder of the evaluations")
    parser.add_argument("--plot", type=Path, help="draw accuracy against FLOPs into this file")
    args = parser.parse_args()
    if args.plot:
        check_picture(args.plot)
    evaluation = Evaluation.from_args(args)
    if evaluation.metric.score is None:
        raise HimapError(f"--metric {args.metric} judges all answers at once: a sweep needs one that judges each")
    entries = [Entry("", "vanilla", ("none",))]
    if args.methods:
        entries += [Entry("", text, (text,)) for text in args.methods]
    else:
        entries += ablations(args.k1, args.k2, args.keep1, args.keep2) + criteria()
        entries += equal_flops(evaluation.model, evaluation.examples, args.budgets)
    lines, vanilla = [], {}
    for entry in entries:
        measured = measure(evaluation, entry, args.out)
        vanilla = vanilla or measured[0][1]
        lines.append(line_of(entry, measured, vanilla))
    print(table(lines))
    (args.out / "table.json").write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        draw(lines, args.plot)


if __name__ == "__main__":
    run_command(main)
