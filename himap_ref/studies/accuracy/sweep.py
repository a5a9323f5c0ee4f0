"""Accuracy against exact FLOPs: HiMAP over K1, K2, R1, R2 and criteria, and beside its baselines at equal FLOPs.

    python -m himap_ref.studies sweep --quick --methods "2:0.5:mine:my_score,8:0.25:image_to_image"
    python -m himap_ref.studies sweep --scenes 200 --plot sweep.png

Every schedule is an evaluation of its own (evaluate.py) in the folder --out, so an interrupted sweep goes on where it
stopped; there, table.md has every column and table.json every figure. --quick: your methods beside HiMAP, chance and
oracle on the paper's layers, minutes on two cores, and a line that says what so many questions can show.

over chance   questions' mean score minus that of chance on HiMAP's layers at the same FLOPs, 95 % bootstrap interval
recall        of the target patches (those that show what must be seen), the share that the last stage left; behind it
              that of a choice by chance
hard          accuracy on the questions that a smaller picture fails: the largest that costs no more than the budget
no picture    the same questions asked as text: what the words alone give away
lost, won     questions that score lower, higher than without pruning; p: the exact sign test, by Holm's rule for as
              many tests as the table has

Equal FLOPs: encoder, projector and prefill within 2 points of vanilla's share, all found by planning; a method that
cannot come so near to a budget is left out at it. Chance draws anew for every question, five times. The oracle keeps
the target patches first: the most that any criterion could reach.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ...commands.files import write_text
from ...commands.manners import run_command
from ...commands.report import markdown
from ...errors import HimapError
from ...methods.reducers import check_grid
from ...methods.schedules import parse_method
from ..common.plots import COLORS, check_picture, figure, label_ends
from ..questions.examples import Example
from .controls import ORACLE, POSITIONS
from .entries import (
    CHANCE,
    PAPER,
    SMALLER,
    Entry,
    ablations,
    criteria,
    equal_flops,
    fitting,
    published,
    seeded,
    stages_text,
)
from .evaluate import Evaluation, add_arguments
from .metrics import bootstrap, cells, holm, interval, paired
from .recall import recalls

# ---------------------------------------------------------------- measuring

Rows = dict[str, dict]  # key of the question -> what an evaluation recorded
RATIOS = ("ratio", "decoder_ratio", "image_only_ratio")
BLIND = "no picture"
QUICK_SCENES = 120  # some 980 questions: the difference from chance to about 3 points


def kinds_of(rows: list[dict]) -> dict[str, float]:
    """Mean score by kind of question."""
    rows = [row for row in rows if row["correct"] is not None]
    kinds = sorted({row["kind"] for row in rows if "kind" in row})
    return {kind: mean(row["correct"] for row in rows if row.get("kind") == kind) for kind in kinds}


def scores_of(runs: Sequence[Rows], vanilla: Rows) -> dict[str, float]:
    """Each judged question's score, of several seeds the mean: those answered in all runs and in vanilla."""
    keys = [key for key in vanilla if all(rows[key].get("correct") is not None for rows in (vanilla, *runs))]
    return {key: mean(rows[key]["correct"] for rows in runs) for key in keys}


def line_of(
    entry: Entry, measured: list[tuple[dict, Rows]], vanilla: Rows, examples: Sequence[Example] = ()
) -> dict:  # fmt: skip
    """An entry's figures over the questions that were answered in all of its runs and in vanilla.

    With several seeds a question's score is their mean, so that the interval is over questions; spread: of the seeds.
    Of questions without a label only same_answer tells; where none has one, accuracy and all that follows are None.
    """
    runs = [rows for _, rows in measured]
    keys = [key for key in vanilla if all("error" not in rows[key] for rows in (vanilla, *runs))]
    if not keys:
        raise HimapError(f"{entry.label}: no question was answered both with and without pruning")
    every, before = [[rows[key] for key in keys] for rows in runs], [vanilla[key] for key in keys]
    scores = scores_of(runs, vanilla)
    by_seed = [[rows[key]["correct"] for key in scores] for rows in runs]
    means = [mean(seed) for seed in by_seed] if scores else []
    pairs = [paired([vanilla[key]["correct"] for key in scores], seed) for seed in by_seed] if scores else []
    summaries, values = [summary for summary, _ in measured], list(scores.values())
    seen, by_stage = entry.label != BLIND, recalls(runs, examples)  # without a picture there is nothing to save
    return {
        "group": entry.group, "label": entry.label, "methods": entry.methods,
        "n": len(keys), "judged": len(scores), "left_out": len(vanilla) - len(keys),
        "accuracy": mean(values) if scores else None,
        "interval": (interval(values) if len(runs) == 1 else bootstrap(values)) if scores else None,
        "spread": (min(means), max(means)) if len(means) > 1 else None,
        **{name: mean(s[name] for s in summaries) if seen else None for name in RATIOS},
        "kept": summaries[0]["kept"],
        "recall": (by_stage[-1]["all"]["recall"], by_stage[-1]["all"]["chance"]) if by_stage else None,
        "recall_by_stage": by_stage,
        "same_answer": mean(a["answer"] == b["answer"] for rows in every for a, b in zip(before, rows, strict=True)),
        **{name: mean(pair[name] for pair in pairs) if scores else None for name in ("lost", "won")},
        "p": pairs[0]["p"] if len(pairs) == 1 else None,
        "kinds": kinds_of([row for rows in every for row in rows]),
    }  # fmt: skip


def minus(scores: Mapping[str, float], others: Mapping[str, float]) -> tuple[float, float, float]:
    """Mean difference over the questions that both have, and its 95 % interval over questions."""
    differences = [scores[key] - others[key] for key in scores if key in others]
    return (mean(differences), *bootstrap(differences))


def compare(lines: list[dict], scores: list[dict[str, float]]) -> None:
    """Adds to every line what others tell of it: over chance and hard within its group, p of them all by Holm."""
    groups: dict[str, dict[str, dict[str, float]]] = {}
    for line, own in zip(lines, scores, strict=True):
        groups.setdefault(line["group"], {})[line["label"].split(",")[0]] = own
    for line, own in zip(lines, scores, strict=True):
        group = groups[line["group"]]
        chance, smaller = group.get(CHANCE) or group.get("chance"), group.get(SMALLER, {})
        line["over_chance"] = minus(own, chance) if chance and own and own is not chance else None
        hard = [own[key] for key, score in smaller.items() if score < 1 and key in own]
        line["hard"] = (mean(hard), len(hard)) if hard else None
    tested = [line for line in lines if line["p"] is not None and line["group"]]
    for line, p in zip(tested, holm([line["p"] for line in tested]), strict=True):
        line["p_holm"] = p


# ---------------------------------------------------------------- showing


def signed(difference: tuple[float, float, float] | None) -> str:
    """In points: a difference and its interval."""
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * x for x in difference)) if difference else ""


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def recall_cell(line: dict) -> str:
    return "{:.1%} ({:.1%})".format(*line["recall"]) if line["recall"] else ""


def short_table(lines: list[dict]) -> str:
    """What fits a terminal."""
    rows = [["", "FLOPs", "accuracy", "95 %", "over chance, points", "recall (chance)"]]
    for i, line in enumerate(lines):
        if line["group"] and line["group"] != lines[i - 1]["group"]:
            rows.append([f"-- {line['group']}", "", "", "", "", ""])
        accuracy, between = cells(line["accuracy"], line["interval"])
        over = signed(line["over_chance"])
        rows.append([line["label"][:44], percent(line["ratio"]), accuracy, between, over, recall_cell(line)])
    wide = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:{w}}" for cell, w in zip(row, wide, strict=True)).rstrip() for row in rows)


def table(lines: list[dict]) -> str:
    """Every column, for a file."""
    kinds, rows = list(lines[0]["kinds"]), []
    header = ["", "", "n", "FLOPs", "decoder", "image tokens", "accuracy", "95 %", "over chance", "recall (chance)"]
    header += ["hard (n)", "same answer", "lost", "won", "p"]
    for line in lines:
        accuracy, between = cells(line["accuracy"], line["interval"])
        few = f" ({line['judged']} judged)" if 0 < line["judged"] < line["n"] else ""
        flips = ["" if line[name] is None else f"{line[name]:g}" for name in ("lost", "won")]
        spread = " ({:.1%} - {:.1%})".format(*line["spread"]) if line["spread"] else ""
        rows.append([
            line["group"], line["label"], f"{line['n']}{few}", percent(line["ratio"]), percent(line["decoder_ratio"]),
            " > ".join(f"{count:g}" for count in line["kept"]), accuracy + spread, between,
            signed(line.get("over_chance")), recall_cell(line),
            "{:.1%} ({})".format(*line["hard"]) if line.get("hard") else "", f"{line['same_answer']:.1%}", *flips,
            f"{line['p_holm']:.1g}" if "p_holm" in line else "",
            *(f"{line['kinds'].get(kind, 0):.1%}" for kind in kinds),
        ])  # fmt: skip
    return f"{markdown([*header, *kinds], rows)}\n\n(of several seeds the mean, in brackets their range)"


def verdict(line: dict) -> str:
    """What the figures of one method say about it and chance, and what so many questions cannot say."""
    if not line["over_chance"]:
        return f"{line['label']}: no chance on the same layers to hold it against"
    difference, low, high = line["over_chance"]
    said = "better than chance" if low > 0 else "worse than chance" if high < 0 else "cannot be told from chance"
    unseen = (high - low) / 2
    return (
        f"{line['label']}: {said} ({signed(line['over_chance'])} points, n = {line['judged']}); "
        f"so few questions do not tell differences below about {100 * unseen:.0f} points from none, four times as many "
        "scenes half of that"
    )


RIVALS = ("PyramidDrop", "VTW", "CLS attention", "DivPrune", "VisionZip", "average pooling", SMALLER)


def draw(lines: list[dict], path: Path) -> None:
    """At equal FLOPs accuracy and recall; HiMAP's parameters one at a time; and all that stands alone."""
    curves: dict[str, list[dict]] = {}
    for line in lines:
        if line["group"].startswith("equal"):
            curves.setdefault(line["label"], []).append(line)
    ranked = {name: curve for name, curve in curves.items() if name not in RIVALS}
    recalled = {name: curve for name, curve in ranked.items() if curve[0]["recall"]}
    others = {name: curve for name, curve in curves.items() if name in ("HiMAP", *RIVALS)}
    alone = {name: [line for line in lines if line["group"] == name] for name in ("K1", "K2", "R1", "R2")}
    panels: list[tuple] = [(draw_curves, "equal FLOPs: criteria", ranked, "accuracy")]
    panels += [(draw_curves, "equal FLOPs: their target recall", recalled, "recall")]
    panels += [(draw_curves, "equal FLOPs: HiMAP and other methods", others, "accuracy")]
    panels += [(draw_curves, "HiMAP, one parameter at a time", {k: v for k, v in alone.items() if v}, "accuracy")]
    for group in ("criteria", "as published", "own"):
        panels.append((draw_points, group, [line for line in lines if line["group"] == group], ""))
    panels = [panel for panel in panels if panel[2]] or [(draw_points, "", lines, "")]
    levels = {line["label"]: line["accuracy"] for line in lines if not line["group"]}
    across = min(3, len(panels))
    with figure(path, len(panels), (max(10, 7 * across), 5 * -(-len(panels) // across)), across) as axes:
        for axis, (show, title, shown, what) in zip(axes, panels, strict=True):
            show(axis, shown, levels, what)
            n = "" if what == "recall" else f" (n = {lines[0]['n']}, 95 %)"
            axis.set_title(f"{title}{n}", loc="left", fontsize=10)


def draw_curves(axis: Any, curves: dict[str, list[dict]], levels: dict[str, float], what: str) -> None:
    """A line for each name, against FLOPs, named where it ends; levels: horizontal lines."""
    ends: list[tuple[float, float, str, str]] = []
    for (name, curve), color in zip(curves.items(), COLORS, strict=False):
        curve.sort(key=lambda line: line["ratio"])
        x, y, errors = [line["ratio"] for line in curve], [line[what] for line in curve], None
        if what == "recall":
            y = [recall for recall, _ in y]
        else:
            errors = [[abs(line[what] - line["interval"][side]) for line in curve] for side in (0, 1)]
        axis.errorbar(x, y, yerr=errors, color=color, marker="o", markersize=4, linewidth=1 if ends else 2.5,
                      elinewidth=0.5)  # fmt: skip
        ends.append((x[-1], y[-1], name, color))
    for name, level in levels.items() if what == "accuracy" else ():
        axis.axhline(level, color="black", linestyle=":", linewidth=1)
        ends.append((axis.get_xlim()[1], level, name, "black"))
    axis.set(xlabel="FLOPs of an answer, share of vanilla", ylabel=what, xlim=axis.get_xlim(), ylim=axis.get_ylim())
    label_ends(axis, ends)


def draw_points(axis: Any, lines: list[dict], levels: dict[str, float], _: str) -> None:
    """A row for each line, the first on top."""
    rows, accuracy = range(len(lines), 0, -1), [line["accuracy"] for line in lines]
    errors = [[abs(line["accuracy"] - line["interval"][side]) for line in lines] for side in (0, 1)]
    axis.yaxis.tick_right()  # beside the names of the lines above
    axis.errorbar(accuracy, rows, xerr=errors, color=COLORS[1], marker="o", linestyle="", capsize=2)
    names = [f"{percent(line['ratio'])}  {line['label']}" for line in lines]
    axis.set(xlabel="accuracy; beside the names: FLOPs", yticks=rows, yticklabels=names, ylim=(0, len(lines) + 1))
    ends = [(len(lines) + 0.9, "top"), (0.1, "bottom")]  # apart, as the levels may be close
    for (name, level), (height, side) in zip(levels.items(), ends, strict=False):
        axis.axvline(level, color="black", linestyle=":", linewidth=1)
        axis.text(level, height, f" {name}", fontsize=8, rotation=90, va=side)


# ---------------------------------------------------------------- command


def entries_of(args: argparse.Namespace, evaluation: Evaluation) -> list[Entry]:
    """What the command line asks for; vanilla first."""
    model, vanilla = evaluation.model, Entry("", "vanilla", ("none",))
    own = [Entry("own", text, seeded(text)) for text in args.methods or ()]  # as typed: a mistake ends the command
    [parse_method(text, model) for entry in own for text in entry.methods]
    if not all(0 < budget <= 1 for budget in args.budgets or ()):
        raise HimapError(f"--budgets {args.budgets}: expected shares of vanilla's FLOPs, above 0 and at most 1")
    if args.quick:
        rows = {"HiMAP": stages_text(*PAPER)}
        rows |= {"chance": stages_text(*PAPER, "random", "random"), "oracle": stages_text(*PAPER, ORACLE, ORACLE)}
        beside = [Entry("own", name, seeded(text)) for name, text in rows.items()]
        swept = [*fitting(beside, model), *own]
    elif own:
        swept = own
    else:
        swept = published(model.config) + ablations(args.k1, args.k2, args.keep1, args.keep2) + criteria()
        swept = [*fitting(swept, model), *equal_flops(model, evaluation.examples, args.budgets)]
    known = any(example.targets for example in evaluation.examples)
    blind = [Entry("", BLIND, ("none",))] if args.questions is None else []
    return [vanilla, *blind, *(entry for entry in swept if known or not any(ORACLE in text for text in entry.methods))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, max_new_tokens=16, batch=64)
    several: Any = {"nargs": "*"}
    parser.add_argument("--quick", action="store_true", help="HiMAP, chance, oracle and --methods, nothing else")
    parser.add_argument("--k1", type=int, default=[1, 2, 3, 4, 6], **several)
    parser.add_argument("--k2", type=int, default=[4, 6, 8, 10, 15], **several)
    parser.add_argument("--keep1", type=float, default=[0.25, 0.5, 0.75], help="1 - R1", **several)
    parser.add_argument("--keep2", type=float, default=[0.1, 0.25, 0.5], help="1 - R2", **several)
    parser.add_argument("--budgets", type=float, help="shares of vanilla's FLOPs at which methods are compared; "
                        "default: four around the paper's schedule", **several)  # fmt: skip
    parser.add_argument("--methods", nargs="+", help="measure only these (names or stages), or with --quick these, too")
    parser.add_argument("--positions", choices=POSITIONS, default="kept", help="of the tokens that stages leave: "
                        "their own (HiMAP), without gaps, or stretched over the picture's span; those made before the "
                        "decoder stand without gaps anyway")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="folder of the evaluations")
    parser.add_argument("--plot", type=Path, help="draw accuracy against FLOPs into this file")
    args = parser.parse_args()
    if args.quick and args.questions is None and args.scenes is None:
        args.scenes = QUICK_SCENES
    if args.plot:
        check_picture(args.plot)
    evaluation = Evaluation.from_args(args)
    check_grid(evaluation.model.config, "sweep", "take a LLaVA-1.5, or evaluate, method by method")
    if evaluation.metric.score is None:
        raise HimapError(f"--metric {args.metric} judges all answers at once: a sweep needs one that judges each")
    if args.plot and not any(example.answers for example in evaluation.examples):
        raise HimapError(f"{args.questions}: no question has a label, so there is no accuracy for --plot to draw")
    evaluation.positions = args.positions
    lines: list[dict] = []
    scores: list[dict[str, float]] = []
    entries = entries_of(args, evaluation)
    vanilla: Rows = {}
    for number, entry in enumerate(entries, start=1):
        print(f"{number} of {len(entries)}: {entry.group} {entry.label}", file=sys.stderr)
        texts = [parse_method(text, evaluation.model) for text in entry.methods]
        asked = evaluation.blind() if entry.label == BLIND else evaluation
        measured = [asked.run(method, args.out, with_kept=True) for method in texts]
        vanilla = vanilla or measured[0][1]
        lines.append(line_of(entry, measured, vanilla, evaluation.examples))
        scores.append(scores_of([rows for _, rows in measured], vanilla))
        compare(lines, scores)
        write_text(args.out / "table.json", json.dumps(lines, indent=1) + "\n")
        write_text(args.out / "table.md", table(lines) + "\n")
    print(short_table(lines))
    print(f"\nevery column: {args.out / 'table.md'}")
    if args.quick:
        told = [line for line in lines if line["group"] and line["label"] not in ("chance", "oracle")]
        print(*map(verdict, told), sep="\n")
    if args.plot:
        draw(lines, args.plot)


if __name__ == "__main__":
    run_command(main)
