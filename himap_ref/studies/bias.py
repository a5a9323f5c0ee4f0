"""The position bias of stage 2: where in the picture the kept tokens lie, and what taking the bias out buys.

    python -m himap_ref.studies.bias --scenes 300 --plot bias.png

Stage 2 sums each column of a causal matrix over the image rows: a token is summed over as many rows as stand behind it,
so early (upper) patches are favoured whatever they show. `image_to_image_mean` divides by that number. For each
schedule this asks the same questions and looks at each stage's choice among the tokens that entered it:

first half   share of the kept tokens that come from the first half of those that entered (no bias: 50 %)
survival     share kept of the first tenth of those that entered, of the second tenth, ...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

import torch

from ..errors import HimapError, run_command
from .evaluate import Evaluation, add_arguments
from .methods import parse_method
from .metrics import interval
from .plots import check_picture, figure
from .report import markdown

TENTHS = 10


SECOND = {  # stage 2's score; stage 1's is HiMAP's throughout
    "sum (HiMAP)": "image_to_image", "mean": "image_to_image_mean", "text rows": "text_to_image", "chance": "random",
}  # fmt: skip


def places(entered: list[int], kept: list[int]) -> torch.Tensor:
    """Where among the tokens that entered those kept stand: (N',) in [0, 1), each at the middle of its step."""
    rank = {token: i for i, token in enumerate(entered)}
    return (torch.tensor([rank[token] for token in kept]) + 0.5) / len(entered)


def position_figures(rows: list[dict], stage: int, num_image_tokens: int) -> dict:
    """First half and survival of a stage (0-based) over the rows of an evaluation with kept tokens."""
    entered = [row["kept_tokens"][stage - 1] if stage else list(range(num_image_tokens)) for row in rows]
    kept = [row["kept_tokens"][stage] for row in rows]
    where = torch.cat([places(a, b) for a, b in zip(entered, kept, strict=True)])
    every = torch.cat([places(a, a) for a in entered])
    halves = (where < 0.5).float() + 0.5 * (where == 0.5)  # the middle of an odd number belongs to both halves
    survival = torch.histc(where, TENTHS, 0, 1) / torch.histc(every, TENTHS, 0, 1)
    return {"first_half": halves.mean().item(), "survival": survival.tolist(), "mean_place": where.mean().item()}


def measure(evaluation: Evaluation, label: str, text: str, path: Path) -> dict:
    """A line of the table: accuracy, and both stages' positions."""
    _, rows = evaluation.run(parse_method(text, evaluation.model), path, with_kept=True)
    done = [row for row in rows.values() if "error" not in row]
    stages = [position_figures(done, stage, evaluation.model.config.num_image_tokens) for stage in (0, 1)]
    scores = [row["correct"] for row in done]
    kinds = sorted({row["kind"] for row in done if "kind" in row})
    return {
        "label": label, "method": text, "n": len(done),
        "accuracy": mean(scores), "interval": interval(scores), "stages": stages,
        "kinds": {kind: mean(row["correct"] for row in done if row.get("kind") == kind) for kind in kinds},
    }  # fmt: skip


def table(lines: list[dict]) -> str:
    kinds, rows = list(lines[0]["kinds"]), []
    header = ["stage 2 by", "first half", "mean place", "first tenth", "last tenth", "accuracy", "95 %", *kinds]
    for line in lines:
        second, (low, high) = line["stages"][1], line["interval"]
        rows.append([
            line["label"], f"{second['first_half']:.1%}", f"{second['mean_place']:.2f}",
            f"{second['survival'][0]:.1%}", f"{second['survival'][-1]:.1%}",
            f"{line['accuracy']:.1%}", f"{low:.1%} - {high:.1%}",
            *(f"{line['kinds'][kind]:.1%}" for kind in kinds),
        ])  # fmt: skip
    first = lines[0]["stages"][0]
    note = f"stage 1, the same for all: first half {first['first_half']:.1%}, mean place {first['mean_place']:.2f}"
    return f"{markdown(header, rows)}\n\n{note}; n = {lines[0]['n']}"


def draw(lines: list[dict], path: Path) -> None:
    """Survival by place, one line for each of stage 2's scores."""
    with figure(path, panels=1, size=(7, 4.5)) as (panel,):
        for line in lines:
            x = [(tenth + 0.5) / TENTHS for tenth in range(TENTHS)]
            label = f"{line['label']}: {line['accuracy']:.1%} right"
            panel.plot(x, line["stages"][1]["survival"], marker="o", label=label)
        panel.set(xlabel="place among the image tokens that entered stage 2", ylabel="share kept", ylim=(0, None))
        panel.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, max_new_tokens=16, batch=64)
    parser.add_argument("--schedule", default="2:0.5,8:0.25", help="K1:KEEP1,K2:KEEP2; default: the paper's")
    parser.add_argument("--out", type=Path, default=Path("runs/bias"), help="folder of the evaluations")
    parser.add_argument("--plot", type=Path, help="draw who survives into this file")
    args = parser.parse_args()
    if args.plot:
        check_picture(args.plot)
    first, comma, second = args.schedule.partition(",")
    if not comma:
        raise HimapError(f"--schedule {args.schedule!r}: expected K1:KEEP1,K2:KEEP2, such as 2:0.5,8:0.25")
    evaluation, lines = Evaluation.from_args(args), []
    for label, score in SECOND.items():
        text = f"{first}:text_to_image,{second}:{score}"
        lines.append(measure(evaluation, label, text, args.out / f"{score}.jsonl"))
    print(table(lines))
    (args.out / "table.json").write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        draw(lines, args.plot)


if __name__ == "__main__":
    run_command(main)
