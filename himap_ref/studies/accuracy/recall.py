"""Which target patches each stage keeps: measures a criterion without an answer, in one prefill a question.

    python -m himap_ref.studies recall --methods himap-paper "2:0.5:mine:my_score,8:0.25:image_to_image" --scenes 100

Target patches show what must be seen to answer (scenes.py); questions without any are not asked.

recall   of a question's target patches the share that a stage left, mean over questions: reading a number takes all
hit      the share of questions of which at least one target patch is left: enough to see a colour
chance   what that would be by chance, if as many of the tokens that entered the decoder were left

By kind of question, by size (patches of the one thing asked for) and by place of that thing, if it is one.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from math import comb
from pathlib import Path
from statistics import fmean

from ...commands.manners import run_command
from ...commands.report import markdown
from ...errors import HimapError
from ...methods.schedules import parse_method
from ..questions.examples import Example
from ..questions.scenes import KINDS, PLACES
from .entries import seeded
from .evaluate import Evaluation, add_arguments

SIZES = ("1 patch", "2", "3", "4+")
GROUPS = ("all", *KINDS, *SIZES, *PLACES)
Figures = dict[str, float]  # n (questions), recall, chance, hit, hit_chance


def groups_of(example: Example) -> tuple[str, ...]:
    """Of `GROUPS` those that a question counts in."""
    return ("all", example.kind, *((SIZES[min(example.size, 4) - 1], example.place) if example.size else ()))


def of_question(targets: Sequence[int], left: Sequence[int], entered: int) -> Figures:
    """left: the tokens that a stage left of the `entered` ones at the decoder's door, both of them of one question."""
    seen = len({*left} & {*targets})
    missed = comb(entered - len(targets), len(left)) / comb(entered, len(left))  # how likely chance leaves no target
    return {"recall": seen / len(targets), "chance": len(left) / entered, "hit": seen > 0, "hit_chance": 1 - missed}


def recalls(runs: Sequence[Mapping[str, dict]], examples: Sequence[Example]) -> list[dict[str, Figures]]:
    """For each stage, the figures of each of `GROUPS` that has a question; of several runs (seeds) the mean.

    runs: rows by question, as `Evaluation.run` records them with their kept tokens; an error's row counts nowhere.
    Empty without targets or stages.
    """
    found: list[dict[str, list[Figures]]] = []
    for rows in runs:
        for example in (example for example in examples if example.targets):
            row = rows[example.key]
            for stage, left in enumerate(row.get("kept_tokens", ())):
                if stage == len(found):
                    found.append({})
                for group in groups_of(example):
                    figures = of_question(example.targets, left, row["kept"][0])
                    found[stage].setdefault(group, []).append(figures)
    return [
        {
            group: {"n": len(each) // len(runs), **{name: fmean(one[name] for one in each) for name in each[0]}}
            for group in GROUPS
            if (each := groups.get(group))
        }
        for groups in found
    ]


def table(found: Mapping[str, tuple[Sequence[int], list[dict[str, Figures]]]]) -> str:
    """A row for each method's stage; found: label -> its stages' layers and their figures."""
    first = next(iter(found.values()))[1][0]
    header = ["", "layer", *(f"{group} ({figures['n']:g})" for group, figures in first.items())]
    rows = [
        [label, str(layer), *(f"{figures['recall']:.1%}" for figures in stage.values())]
        + [f"{stage['all'][name]:.1%}" for name in ("chance", "hit", "hit_chance")]
        for label, (layers, stages) in found.items()
        for layer, stage in zip(layers, stages, strict=True)
    ]
    return markdown([*header, "chance", "hit", "hit by chance"], rows) + "\n\nrecall (of so many questions)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, max_new_tokens=1, batch=64)
    parser.add_argument("--methods", nargs="+", default=["himap-paper"], help="names or stages; default: himap-paper")
    parser.add_argument("--out", type=Path, default=Path("runs/recall"), help="folder of the evaluations")
    args = parser.parse_args()
    evaluation = Evaluation.from_args(args, needs_picture=True)
    evaluation.examples = [example for example in evaluation.examples if example.targets]
    if not evaluation.examples:
        raise HimapError("no target patches are known: recall needs drawn scenes, and a model that sees their patches")
    methods = {text: [parse_method(one, evaluation.model) for one in seeded(text)] for text in args.methods}
    if early := [text for text, (method, *_) in methods.items() if not method.stages]:
        raise HimapError(f"method {early[0]!r} has no stages, and recall is of what stages keep")
    found = {}
    for text, seeds in methods.items():
        runs = [evaluation.run(method, args.out, with_kept=True)[1] for method in seeds]
        found[text] = [stage.layer for stage in seeds[0].stages], recalls(runs, evaluation.examples)
    print(table(found))


if __name__ == "__main__":
    run_command(main)
