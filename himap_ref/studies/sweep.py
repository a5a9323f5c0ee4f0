"""Accuracy against exact FLOPs on drawn scenes: HiMAP over K1, K2, R1, R2, beside FastV and random.

    python -m himap_ref.studies.sweep --scenes 300

Asks one question of every kind per scene and counts exact matches of the answer. A schedule with `random` in it runs
with several seeds, because one seed is one mask. One JSON line per schedule goes to --out; lines of the same weights,
scenes and schedule that are there already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import mean

from ..errors import run_command
from ..model import Llava
from ..pruning import Stage
from .methods import parse_stages, random
from .scenes import KINDS, TEST, Question, Scene, draw, make_questions, make_scene

RANDOM_SEEDS = 3
# K1, share kept by stage 1, K2, share kept by stage 2
PAPER, LATER = (2, 0.5, 8, 0.25), (4, 0.5, 8, 0.25)
VARIANTS = (
    PAPER, (1, 0.5, 8, 0.25), (3, 0.5, 8, 0.25), LATER, (6, 0.5, 8, 0.25),
    (2, 0.5, 4, 0.25), (2, 0.5, 6, 0.25), (2, 0.5, 10, 0.25), (4, 0.5, 6, 0.25),
    (2, 0.75, 8, 0.25), (2, 0.25, 8, 0.25), (2, 0.5, 8, 0.5), (4, 0.5, 8, 0.5), (4, 0.25, 8, 0.25),
)  # fmt: skip


def two_stages(k1: int, keep1: float, k2: int, keep2: float, first: str, second: str) -> str:
    return f"{k1}:{keep1}:{first},{k2}:{keep2}:{second}"


def default_sweep() -> list[str]:
    """Vanilla; HiMAP's variants; on two of their schedules, and as one stage, FastV's score, stage 1's and chance."""
    schedules = ["", *(two_stages(*v, "text_to_image", "image_to_image") for v in VARIANTS)]
    for score in ("last_to_image", "text_to_image", "random"):
        schedules += [two_stages(*v, score, score) for v in (PAPER, LATER)] + [f"2:0.5:{score}"]
    return schedules


def ask_all(count: int, first: int = TEST) -> list[tuple[Scene, Question]]:
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
                results[p] = (a.text, f.decoder, f.vanilla.decoder)
    return results


def measure(model: Llava, asked: list[tuple[Scene, Question]], stages: tuple[Stage, ...]) -> dict:
    """Accuracy over all and per kind, with a Wilson 95 % interval, and decoder FLOPs relative to vanilla."""
    results = answer_all(model, asked, stages)
    hits = defaultdict(list)
    for (_, question), (text, _, _) in zip(asked, results, strict=True):
        hits[question.kind].append(text == question.answer)
    every = [hit for kind in hits.values() for hit in kind]
    return {
        "n": len(every),
        "accuracy": sum(every) / len(every),
        "interval": wilson(sum(every), len(every)),
        "kinds": {kind: sum(hits[kind]) / len(hits[kind]) for kind in KINDS},
        "decoder_flops_ratio": sum(r[1] for r in results) / sum(r[2] for r in results),
    }


def measure_schedule(model: Llava, asked: list[tuple[Scene, Question]], schedule: str) -> dict:
    """`measure` for a schedule as text. With `random` in it: the mean of several seeds, and their range as interval."""
    stages = parse_stages(schedule)
    if not any(stage.score is random for stage in stages):
        return measure(model, asked, stages)
    rows = []
    for seed in range(RANDOM_SEEDS):
        seeded = partial(random, seed=seed)
        rows.append(measure(model, asked, tuple(replace(s, score=seeded) if s.score is random else s for s in stages)))
    accuracies = [row["accuracy"] for row in rows]
    return {
        **rows[0],
        "accuracy": mean(accuracies),
        "interval": (min(accuracies), max(accuracies)),
        "kinds": {kind: mean(row["kinds"][kind] for row in rows) for kind in KINDS},
        "seeds": accuracies,
    }


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    p, z2 = hits / n, z * z
    middle, half = p + z2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, default=Path("weights/shapes"))
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--first-seed", type=int, default=TEST)
    parser.add_argument("--stages", action="append", help="a schedule to measure instead of the default sweep")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep.jsonl"))
    args = parser.parse_args()
    model, asked = Llava.from_pretrained(args.weights), ask_all(args.scenes, args.first_seed)
    weights = sha256((args.weights / "model.safetensors").read_bytes()).hexdigest()[:16]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    print("| schedule | decoder FLOPs | accuracy | interval | " + " | ".join(KINDS) + " |")
    print("|---" * (4 + len(KINDS)) + "|")
    for schedule in args.stages or default_sweep():
        key = {"weights": weights, "scenes": args.scenes, "first_seed": args.first_seed, "stages": schedule}
        row = next((row for row in known if key.items() <= row.items()), None)
        if row is None:
            row = {**key, **measure_schedule(model, asked, schedule)}
            with args.out.open("a") as out:
                out.write(json.dumps(row) + "\n")
        kinds = " | ".join(f"{row['kinds'][kind]:.1%}" for kind in KINDS)
        low, high = row["interval"]
        figures = f"{row['decoder_flops_ratio']:.1%} | {row['accuracy']:.1%} | {low:.1%} - {high:.1%}"
        print(f"| {schedule or 'vanilla'} | {figures} | {kinds} |", flush=True)


if __name__ == "__main__":
    run_command(main)
