"""What arithmetic alone changes: bf16 and fp16 beside fp32, two threads beside one, questions one by one.

    python -m himap_ref.studies precision --scenes 200

Every method answers the same questions in each dtype: on one thread and in batches, then on two threads, then one by
one. Half precision is compared with fp32, the other two with the same dtype's batches on one thread. Nothing that is
recorded depends on the clock, so a second run elsewhere (--out) writes the same files byte for byte, unless a question
comes out otherwise.

kept differ   share of the tokens a stage kept that the other run's did not, stage by stage
same sets     share of questions for which every stage kept the same tokens
bits          share of questions whose scores (of all stages), and whose first token's logits, are equal bit by bit
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import mean
from typing import Any, cast

import torch
from torch import Tensor

from ...assistant import Answer
from ...commands.manners import run_command
from ...commands.report import markdown
from ...errors import HimapError
from ...methods.schedules import Method, parse_method
from ..common.asking import record_each
from ..common.records import results_path
from ..questions.examples import Example
from .evaluate import Evaluation, add_arguments, answer
from .metrics import cells, interval, paired

HALVES = ("bfloat16", "float16")
METHODS = ("none", "himap", "himap-paper")

Rows = dict[str, dict]  # id -> what was recorded of the question


@dataclass(frozen=True)
class Way:
    """One way to compute the same answers."""

    dtype: str
    threads: int
    batch: int

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.dtype}, {threads}, " + (f"batches of {self.batch}" if self.batch > 1 else "one by one")


def ways_of(dtypes: Sequence[str], batch: int, device: str) -> dict[Way, Way]:
    """Each way -> the one it is compared with, float32's first way -> itself. A GPU has no threads of ours."""
    ways = {}
    for dtype in dtypes:
        plain = Way(dtype, 1, batch)
        ways[plain] = Way("float32", 1, batch)
        others = [Way(dtype, 2, batch)] if torch.device(device).type == "cpu" else []
        ways |= {way: plain for way in (*others, Way(dtype, 1, 1)) if way != plain}
    return ways


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many for torch, as long as it lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- measuring


def digest(tensors: Sequence[Tensor]) -> str:
    """The same for the same numbers, bit by bit."""
    return sha256(json.dumps([tensor.float().tolist() for tensor in tensors]).encode()).hexdigest()[:16]


def row_of(evaluation: Evaluation, example: Example, got: Answer) -> dict:
    stages, metric = got.trace.stages, cast(Any, evaluation.metric)  # one that judges each answer: see `main`
    return {
        "answer": got.text,
        "correct": metric.score(got.text, example) if example.answers else None,
        "kept_tokens": [stage.kept.tolist() for stage in stages],
        "scores": digest([stage.scores for stage in stages]),
        "logits": digest([got.first_logits]),
    }


def measure(evaluation: Evaluation, method: Method, way: Way, out: Path) -> Rows:
    """Answers what is not recorded yet. The evaluation's model is of the way's dtype."""

    def ask(examples: list[Example], pictures: list) -> list[dict]:
        answers = answer(evaluation.model, examples, pictures, method, evaluation.max_new_tokens)
        return [row_of(evaluation, example, got) for example, got in zip(examples, answers, strict=True)]

    settings = {**evaluation.settings, **method.settings(), "threads": way.threads, "batch": way.batch}
    path = results_path(out, f"{method.name} {way}", settings)
    with threads(way.threads):
        return record_each(evaluation.examples, path, settings, way.batch, ask, f"{method.name}, {way}")


def compare(mine: Rows, others: Rows) -> dict:
    """Figures over the questions that were answered in both; raises HimapError if none was."""
    ids = [id for id in mine if "error" not in mine[id] and "error" not in others[id]]
    if not ids:
        raise HimapError(f"no question could be asked; the first: {[*mine.values()][0].get('error', 'see the others')}")
    pairs = [(mine[id], others[id]) for id in ids]
    judged = [pair for pair in pairs if pair[0]["correct"] is not None]
    scores, before = ([pair[side]["correct"] for pair in judged] for side in (0, 1))

    def same(name: str) -> float:
        return mean(a[name] == b[name] for a, b in pairs)

    kept = [zip(a["kept_tokens"], b["kept_tokens"], strict=True) for a, b in pairs]
    strangers = [[len({*a} - {*b}) / max(1, len(a)) for a, b in stages] for stages in kept]
    return {
        "n": len(ids), "left_out": len(mine) - len(ids),
        "kept_differ": [mean(shares) for shares in zip(*strangers, strict=True)],
        **{f"same_{name}": same(name) for name in ("kept_tokens", "scores", "logits", "answer")},
        "accuracy": mean(scores) if judged else None, "interval": interval(scores) if judged else None,
        **{name: paired(before, scores)[name] if judged else "" for name in ("lost", "won")},
    }  # fmt: skip


# ---------------------------------------------------------------- showing


def table(lines: Sequence[dict]) -> str:
    header = ["method", "computed in", "beside", "accuracy", "95 %", "kept differ", "same sets", "bits: scores",
              "bits: logits", "same answer", "lost", "won"]  # fmt: skip
    rows = []
    for line in lines:
        compared = [" > ".join(f"{share:.2%}" for share in line["kept_differ"])]
        for name in ("kept_tokens", "scores", "logits", "answer"):
            has_it = line["kept_differ"] or name in ("logits", "answer")  # without stages there is nothing to choose
            compared.append(f"{line[f'same_{name}']:.1%}" if has_it else "")
        compared += [str(line["lost"]), str(line["won"])]
        rows.append([
            line["method"], line["way"], line["beside"], *cells(line["accuracy"], line["interval"]),
            *(compared if line["beside"] else [""] * len(compared)),
        ])  # fmt: skip
    counts = {(line["n"], line["left_out"]) for line in lines}
    told = "; ".join(f"n = {n}" + (f", {left_out} left out" if left_out else "") for n, left_out in sorted(counts))
    return f"{markdown(header, rows)}\n\n{told}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, max_new_tokens=16, batch=64)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="names or stages; default: " + ", ".join(METHODS))
    parser.add_argument("--out", type=Path, default=Path("runs/precision"), help="folder of the results")
    args = parser.parse_args()
    dtypes = ("float32", *(HALVES if args.dtype is None else {args.dtype} & {*HALVES}))  # --dtype: only this one
    ways, measured, lines = ways_of(dtypes, args.batch, args.device), {}, []
    for dtype in dtypes:
        args.dtype = dtype
        evaluation = Evaluation.from_args(args, needs_picture=True)
        if evaluation.metric.score is None:
            raise HimapError(f"--metric {args.metric} judges all answers at once: choose one that judges each")
        methods = [parse_method(text, evaluation.model) for text in args.methods]
        for way in (way for way in ways if way.dtype == dtype):
            for method in methods:
                measured[method.name, way] = measure(evaluation, method, way, args.out)
    for method in methods:
        for way, beside in ways.items():
            figures = compare(measured[method.name, way], measured[method.name, beside])
            shown = "" if way == beside else str(beside)
            lines.append({"method": method.name, "way": str(way), "beside": shown, **figures})
    print(table(lines))


if __name__ == "__main__":
    run_command(main)
