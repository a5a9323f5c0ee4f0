"""Accuracy against exact FLOPs on drawn scenes: HiMAP over K1, K2, R1, R2, beside FastV and random.

    python -m himap_ref.studies.sweep --scenes 500

Asks one question of every kind per scene, of seeds that training never saw, and counts exact matches of the answer.
One JSON line per schedule goes to --out; schedules that are there already, for the same weights and scenes, are kept.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

from ..model import Llava
from ..pruning import Stage
from .methods import parse_stages
from .scenes import KINDS, UNSEEN, Question, Scene, draw, make_questions, make_scene

DEFAULT_SWEEP = (
    "",  # vanilla
    # HiMAP over K1, K2 and the shares; the first line is the paper's
    "2:0.5:text_to_image,8:0.25:image_to_image",
    "1:0.5:text_to_image,8:0.25:image_to_image",
    "3:0.5:text_to_image,8:0.25:image_to_image",
    "4:0.5:text_to_image,8:0.25:image_to_image",
    "6:0.5:text_to_image,8:0.25:image_to_image",
    "2:0.5:text_to_image,4:0.25:image_to_image",
    "2:0.5:text_to_image,6:0.25:image_to_image",
    "2:0.5:text_to_image,10:0.25:image_to_image",
    "4:0.5:text_to_image,6:0.25:image_to_image",
    "2:0.25:text_to_image,8:0.25:image_to_image",
    "4:0.25:text_to_image,8:0.25:image_to_image",
    "2:0.75:text_to_image,8:0.25:image_to_image",
    "2:0.5:text_to_image,8:0.5:image_to_image",
    "4:0.5:text_to_image,8:0.5:image_to_image",
    # FastV and chance on the same schedule: the FLOPs differ only by the ranking
    "2:0.5:last_to_image,8:0.25:last_to_image",
    "2:0.5:random,8:0.25:random",
    "4:0.5:last_to_image,8:0.25:last_to_image",
    "4:0.5:text_to_image,8:0.25:text_to_image",
    "4:0.5:random,8:0.25:random",
    "4:0.5:random,8:0.5:random",
    # FastV and chance as they are used: one stage
    "2:0.5:last_to_image",
    "2:0.5:text_to_image",
    "2:0.5:random",
    "2:0.25:last_to_image",
    "2:0.25:random",
)


def ask_all(count: int, first: int = UNSEEN) -> list[tuple[Scene, Question]]:
    """One question of every kind that each of `count` scenes allows."""
    asked = []
    for seed in range(first, first + count):
        scene = make_scene(seed)
        by_kind = {question.kind: question for question in reversed(make_questions(scene, 30))}
        asked += [(scene, by_kind[kind]) for kind in KINDS if kind in by_kind]
    return asked


def answer_all(model: Llava, asked: list[tuple[Scene, Question]], stages: tuple[Stage, ...], batch: int = 64):
    """[(answer, decoder FLOPs, vanilla decoder FLOPs)], in batches of prompts of equal length."""
    by_length = defaultdict(list)
    for place, (_, question) in enumerate(asked):
        by_length[len(model.encode(question.text).ids)].append(place)
    results = [None] * len(asked)
    for places in by_length.values():
        for start in range(0, len(places), batch):
            part = places[start : start + batch]
            answers = model.generate(
                [draw(asked[p][0]) for p in part], [asked[p][1].text for p in part], stages, max_new_tokens=8
            )
            for p, a in zip(part, answers, strict=True):
                f = a.flops
                results[p] = (a.text, f.prefill + sum(f.decode), f.vanilla_prefill + sum(f.vanilla_decode))
    return results


def measure(model: Llava, asked: list[tuple[Scene, Question]], stages: tuple[Stage, ...]) -> dict:
    """Accuracy per kind and over all, with a Wilson 95 % interval, and decoder FLOPs relative to vanilla."""
    results = answer_all(model, asked, stages)
    hits = defaultdict(list)
    for (_, question), (text, _, _) in zip(asked, results, strict=True):
        hits[question.kind].append(text == question.answer)
    every = [hit for kind in hits.values() for hit in kind]
    return {
        "n": len(every),
        "accuracy": round(sum(every) / len(every), 4),
        "interval": wilson(sum(every), len(every)),
        "kinds": {kind: round(sum(hits[kind]) / len(hits[kind]), 4) for kind in KINDS},
        "decoder_flops_ratio": round(sum(r[1] for r in results) / sum(r[2] for r in results), 4),
        "answers": [text for text, _, _ in results],
    }


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    p, z2 = hits / n, z * z
    middle, half = p + z2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return round((middle - half) / (1 + z2 / n), 4), round((middle + half) / (1 + z2 / n), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", default="weights/shapes")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--stages", action="append", help="a schedule to measure instead of the default sweep")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep.jsonl"))
    args = parser.parse_args()
    model, asked = Llava.from_pretrained(args.weights), ask_all(args.scenes)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    known = {}
    if args.out.exists():
        known = {(r["stages"], r["scenes"]): r for r in map(json.loads, args.out.read_text().splitlines())}
    print("| schedule | decoder FLOPs | accuracy | 95 % interval | " + " | ".join(KINDS) + " |")
    print("|---" * (4 + len(KINDS)) + "|")
    for schedule in args.stages or DEFAULT_SWEEP:
        row = known.get((schedule, args.scenes))
        if row is None:
            row = {"stages": schedule, "scenes": args.scenes, **measure(model, asked, parse_stages(schedule))}
            with args.out.open("a") as out:
                out.write(json.dumps(row) + "\n")
        kinds = " | ".join(f"{row['kinds'][kind]:.1%}" for kind in KINDS)
        low, high = row["interval"]
        figures = f"{row['decoder_flops_ratio']:.1%} | {row['accuracy']:.1%} | {low:.1%} - {high:.1%}"
        print(f"| {schedule or 'vanilla'} | {figures} | {kinds} |", flush=True)


if __name__ == "__main__":
    main()
