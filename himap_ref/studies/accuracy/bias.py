"""The position bias of stage 2: where in the picture the kept tokens lie, and what taking the bias out buys.

    python -m himap_ref.studies bias --scenes 300 --plot bias.png

Stage 2 sums each column of a causal matrix over the image rows. A token is summed over as many rows as stand behind it,
and early rows have fewer keys to share their attention among: both favour early (upper) patches, whatever they show.
`image_to_image_mean` takes the first out, `image_to_image_relative` both. For each score this asks the same questions
and looks at stage 2's choice among the tokens that entered it:

first half   share of the kept tokens that come from the first half of those that entered (no bias: 50 %)
survival     share kept of the first tenth of those that entered, of the second tenth, ...

--plot also shows how often each place of the picture is among the kept. Chance draws anew for every question.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from ...commands.files import write_text
from ...commands.manners import run_command
from ...commands.report import markdown
from ...errors import HimapError
from ...methods.reducers import check_grid
from ...methods.schedules import Method, parse_method
from ..common.plots import check_picture, figure
from .entries import Entry
from .evaluate import Evaluation, add_arguments
from .metrics import cells
from .sweep import line_of

TENTHS = 10
SECOND = {  # stage 2's score; stage 1's is HiMAP's throughout
    "sum (HiMAP)": "image_to_image", "count-normalised": "image_to_image_mean", "relative": "image_to_image_relative",
    "text rows": "text_to_image", "chance": "random",
}  # fmt: skip


def places(entered: list[int], kept: list[int]) -> Tensor:
    """Where among the tokens that entered those kept stand: (N',) in [0, 1), each at the middle of its step."""
    rank = {token: i for i, token in enumerate(entered)}
    return (torch.tensor([rank[token] for token in kept]) + 0.5) / len(entered)


def position_figures(rows: list[dict], stage: int, num_image_tokens: int) -> dict:
    """First half, mean place and survival of a stage (0-based) over the rows of an evaluation with kept tokens.

    survival: None where no token entered; often: of each of the picture's tokens, how often it is kept.
    """
    entered = [row["kept_tokens"][stage - 1] if stage else list(range(num_image_tokens)) for row in rows]
    kept = [row["kept_tokens"][stage] for row in rows]
    where = torch.cat([places(a, b) for a, b in zip(entered, kept, strict=True)])
    every = torch.cat([places(a, a) for a in entered])
    halves = (where < 0.5).float() + 0.5 * (where == 0.5)  # the middle of an odd number belongs to both halves
    survivors, all_of_them = (torch.histc(x, TENTHS, 0, 1).tolist() for x in (where, every))
    counts = torch.tensor([token for tokens in kept for token in tokens]).bincount(minlength=num_image_tokens)
    return {
        "first_half": halves.mean().item(),
        "mean_place": where.mean().item(),
        "survival": [a / b if b else None for a, b in zip(survivors, all_of_them, strict=True)],
        "often": (counts / len(rows)).tolist(),
    }


def measure(evaluation: Evaluation, label: str, text: str, folder: Path, vanilla: dict[str, dict]) -> dict:
    """A line of the table: the sweep's figures, and both stages' positions."""
    measured = evaluation.run(parse_method(text, evaluation.model), folder, with_kept=True)
    done = [row for row in measured[1].values() if "error" not in row]
    stages = [position_figures(done, stage, evaluation.model.config.num_image_tokens) for stage in (0, 1)]
    return {**line_of(Entry("bias", label, (text,)), [measured], vanilla), "stages": stages}


def table(lines: list[dict]) -> str:
    kinds, rows = list(lines[0]["kinds"]), []
    header = ["stage 2 by", "first half", "mean place", "first tenth", "last tenth", "decoder", "accuracy", "95 %"]
    for line in lines:
        second = line["stages"][1]
        first, *_, last = ("-" if share is None else f"{share:.1%}" for share in second["survival"])
        rows.append([
            line["label"], f"{second['first_half']:.1%}", f"{second['mean_place']:.2f}", first, last,
            f"{line['decoder_ratio']:.1%}", *cells(line["accuracy"], line["interval"]),
            *(f"{line['kinds'].get(kind, 0):.1%}" for kind in kinds),
        ])  # fmt: skip
    first = lines[0]["stages"][0]
    note = f"stage 1, the same for all: first half {first['first_half']:.1%}, mean place {first['mean_place']:.2f}"
    left_out = f", {lines[0]['left_out']} left out" if lines[0]["left_out"] else ""
    return f"{markdown([*header, *kinds], rows)}\n\n{note}; n = {lines[0]['n']}{left_out}"


def draw(lines: list[dict], grid: int, path: Path) -> None:
    """Survival by place among those that entered; then for each score how often each patch is kept in the end."""
    with figure(path, panels=1 + len(lines), size=(6 + 2.6 * len(lines), 4)) as (left, *maps):
        x = [(tenth + 0.5) / TENTHS for tenth in range(TENTHS)]
        for line in lines:
            survival = [float("nan") if share is None else share for share in line["stages"][1]["survival"]]
            left.plot(x, survival, marker="o", label=f"{line['label']}: {cells(line['accuracy'], line['interval'])[0]}")
        left.set(xlabel="place among the image tokens that entered stage 2", ylabel="share kept", ylim=(0, None))
        left.legend(fontsize=8)
        highest = max(max(line["stages"][1]["often"]) for line in lines)
        for axis, line in zip(maps, lines, strict=True):
            often = torch.tensor(line["stages"][1]["often"][-grid * grid :]).view(grid, grid)  # without a class token
            axis.imshow(often, vmin=0, vmax=highest, cmap="viridis")
            axis.set(xlabel=f"{line['label']}: kept at most {often.max():.0%} of the time", xticks=[], yticks=[])
            axis.xaxis.label.set_size(8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, max_new_tokens=16, batch=64)
    parser.add_argument("--schedule", default="2:0.5,8:0.25", help="K1:KEEP1,K2:KEEP2; default: the paper's")
    parser.add_argument("--out", type=Path, default=Path("runs/bias"), help="folder of the evaluations")
    parser.add_argument("--plot", type=Path, help="draw who survives, and where, into this file")
    args = parser.parse_args()
    if args.plot:
        check_picture(args.plot)
    first, comma, second = args.schedule.partition(",")
    if not comma:
        raise HimapError(f"--schedule {args.schedule!r}: expected K1:KEEP1,K2:KEEP2, such as 2:0.5,8:0.25")
    evaluation = Evaluation.from_args(args, needs_picture=True)
    check_grid(evaluation.model.config, "bias", "take a LLaVA-1.5")
    if evaluation.metric.score is None:
        raise HimapError(f"--metric {args.metric} judges all answers at once: choose one that judges each")
    texts = {label: f"{first}:text_to_image,{second}:{score}" for label, score in SECOND.items()}
    [parse_method(text, evaluation.model) for text in texts.values()]  # a mistake shows before vanilla is asked
    _, vanilla = evaluation.run(Method("none"), args.out, with_kept=True)
    lines = [measure(evaluation, label, text, args.out, vanilla) for label, text in texts.items()]
    write_text(args.out / "table.json", json.dumps(lines, indent=1) + "\n")
    print(table(lines))
    if args.plot:
        vision = evaluation.model.config.vision_config
        draw(lines, vision.image_size // vision.patch_size, args.plot)


if __name__ == "__main__":
    run_command(main)
