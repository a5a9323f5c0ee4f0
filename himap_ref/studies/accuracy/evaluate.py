"""A method's answers to many questions: accuracy beside exact FLOPs, seconds and memory.

    python -m himap_ref.studies evaluate --method himap
    python -m himap_ref.studies evaluate --weights llava-1.5-7b --questions FILE --image-folder DIR --metric letter
    torchrun --nproc-per-node 8 -m himap_ref.studies evaluate ...    (the questions shared out over so many devices)

One JSON line per question goes to --out at once; the same command started again goes on where it stopped, also with
more questions, another --batch (in half precision that may change an answer: see precision.py) or another number of
processes. One that cannot be asked (a missing file, too long) is recorded with its error, counted apart, and asked
again next time. Questions without a picture are asked as text, those without a right answer are not judged; both are
counted.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from ...assistant import Answer, Llava, Past
from ...assistant.answer import kv_cache_bytes, vanilla_passes
from ...commands.manners import run_command
from ...commands.options import add_model_arguments
from ...commands.report import amount
from ...errors import HimapError
from ...flops import pass_flops
from ...methods.schedules import Method, parse_method
from ..common.asking import record_each
from ..common.records import load_recorded, results_path
from ..questions.examples import Example
from ..questions.scenes import GRID
from ..questions.selection import add_question_arguments, load_examples
from .controls import for_questions, renumbered
from .literature import paper_flops
from .metrics import METRICS, Metric, interval

PREFILL = ("vision", "prefill")


def answer(
    model: Llava, examples: Sequence[Example], pictures: Sequence, method: Method, max_new_tokens: int,
    past: Past | None = None, positions: str = "kept",
) -> list[Answer]:  # fmt: skip
    """Greedy answers. pictures: one each, or None each; past: a prefix, for those with one; positions: see controls."""
    past = past if pictures[0] is not None else None  # without <image>, other tokens may stand before the question
    questions, stages = [example.question for example in examples], for_questions(method.stages, examples)
    span = None if pictures[0] is None else model.image_span([model.encode(questions[0])])
    with renumbered(model.language_model, span or (0, 0), positions if span and stages else "kept"):
        answers: Any = model.generate(pictures, questions, stages, max_new_tokens, reducer=method.reducer, past=past)
    return answers  # a list, as the questions are one


@dataclass
class Evaluation:
    """Questions, a model and how answers are judged: all but the method."""

    model: Llava
    examples: list[Example]
    metric: Metric
    max_new_tokens: int
    batch: int
    settings: dict  # by which a results file recognises all this
    prefix: Past | None = None  # see `Llava.prefix`
    positions: str = "kept"  # of the tokens that are left: see `controls.renumbered`

    @classmethod
    def from_args(cls, args: argparse.Namespace, needs_picture: bool = False) -> Evaluation:
        if min(args.batch, args.max_new_tokens) < 1:
            raise HimapError("--batch and --max-new-tokens: must be at least 1")
        examples, data = load_examples(args, needs_picture)
        METRICS[args.metric].check([example for example in examples if example.answers])
        model, weights = load_recorded(args)
        if model.config.num_image_tokens != GRID**2:  # its tokens are other patches than the scenes' targets
            examples = [replace(example, targets=()) for example in examples]
        settings = {**weights, **data, "metric": args.metric, "max_new_tokens": args.max_new_tokens}
        return cls(model, examples, METRICS[args.metric], args.max_new_tokens, args.batch, settings)

    def blind(self) -> Evaluation:
        """The same questions about scenes asked as text alone, recorded apart."""
        examples = [replace(example, source=None) for example in self.examples]
        return replace(self, examples=examples, settings={**self.settings, "questions": "scenes, no picture"})

    def run(self, method: Method, out: Path, with_kept: bool = False) -> tuple[dict, dict[str, dict]]:
        """Answers what is not recorded yet; returns the summary and each question's row.

        out: see `results_path`. with_kept: also record the tokens each stage kept.
        """

        def ask(examples: list[Example], pictures: list) -> list[dict]:
            answers = answer(self.model, examples, pictures, method, self.max_new_tokens, self.prefix, self.positions)
            steps = max(len(each.token_ids) for each in answers) - 1  # all wait for the longest answer
            rows = [self._row(e, each, len(answers), steps) for e, each in zip(examples, answers, strict=True)]
            for row, each in zip(rows, answers if with_kept else (), strict=False):
                row["kept_tokens"] = [stage.kept.tolist() for stage in each.trace.stages]
            return rows

        settings = {**self.settings, **method.settings(), "kept_tokens": with_kept}
        if self.positions != "kept":
            settings["positions"] = self.positions
        path = results_path(out, method.name, settings)
        rows = record_each(self.examples, path, settings, self.batch, ask, method.name)
        return {**self.summarize(method, rows), "file": str(path)}, rows

    def _row(self, example: Example, answer: Answer, batch: int, steps: int) -> dict:
        """What is recorded of one answer. seconds: its batch's; decode_steps: how many it took for all its answers."""
        flops, text = answer.flops, self.model.config.text_config
        vanilla, span = flops.vanilla or flops, answer.image_span
        return ({"kind": example.kind} if example.kind else {}) | {
            "question": example.question,
            "answer": answer.text,
            "label": list(example.answers),
            "correct": self.metric.score(answer.text, example) if self.metric.score and example.answers else None,
            "finish": answer.finish,
            "prompt_tokens": len(answer.prompt_ids),
            "new_tokens": len(answer.token_ids),
            "kept": [span[1] - span[0], *(len(stage.kept) for stage in answer.trace.stages)] if span else [],
            "flops": {"total": flops.total, "decoder": flops.decoder},
            "vanilla_flops": {"total": vanilla.total, "decoder": vanilla.decoder},
            "batch_flops": answer.batch_flops,
            "kv_cache_bytes": kv_cache_bytes(text, answer.trace.layers, answer.first_logits.element_size()),
            "batch": batch,
            "decode_steps": steps,
            "seconds": {part: round(value, 6) for part, value in answer.seconds.items()},
            "peak_bytes": peak_memory(self.model.language_model.norm.weight.device),
        }

    def summarize(self, method: Method, rows: dict[str, dict]) -> dict:
        """Figures over all questions that were answered; raises HimapError if none was."""
        answered = [(rows[e.key], e) for e in self.examples if "error" not in rows[e.key]]
        if not answered:
            raise HimapError(f"no question could be asked; the first: {rows[self.examples[0].key]['error']}")
        done, config = [row for row, _ in answered], self.model.config
        with_picture = [row for row, example in answered if example.source is not None]
        tokens = [m.tokens_per_layer(config) for m in (method, Method("none"))]
        image_only, vanilla = (paper_flops(config.text_config, per_layer) for per_layer in tokens)
        decode = [row["seconds"]["decode"] / row["decode_steps"] for row in done if row["decode_steps"]]

        executed = sum(row["batch_flops"] / row["batch"] for row in done) / sum(row["flops"]["decoder"] for row in done)

        def share(part: str) -> float:
            return sum(row["flops"][part] for row in done) / sum(row["vanilla_flops"][part] for row in done)

        return {
            "method": method.name,
            "judged_by": f"{self.metric.name}: {self.metric.about}",
            "n": len(done),
            "errors": len(self.examples) - len(done),
            "left_out": Counter(example.problem for example in self.examples if example.problem),
            "repeated": sum(example.copies - 1 for example in self.examples),
            **self._judged(answered),
            "with_picture": self._judged([pair for pair in answered if pair[1].source is not None]),
            "text_only": self._judged([pair for pair in answered if pair[1].source is None]),
            "kept": [mean(counts) for counts in zip(*(row["kept"] for row in with_picture), strict=True)],
            "flops": mean(row["flops"]["total"] for row in done),
            "prefix_flops": self.settings.get("prefix_flops", 0),
            "executed": executed,
            "ratio": share("total"),
            "decoder_ratio": share("decoder"),
            "image_only_ratio": image_only / vanilla,
            "seconds": {part: median(row["seconds"][part] for row in with_picture or done) for part in PREFILL}
            | {"decode_step": median(decode) if decode else 0.0},
            "batch": max(row["batch"] for row in done),
            "cut": sum(row["finish"] != "eos" for row in done),
            "kv_cache_bytes": mean(row["kv_cache_bytes"] for row in done),
            "peak_bytes": max(row["peak_bytes"] for row in done),
        }

    def _judged(self, answered: Sequence[tuple[dict, Example]]) -> dict:
        """How many were asked, how many of them have an answer to be judged by, and how those came out."""
        labelled = [(row, example) for row, example in answered if example.answers]
        scores = [row["correct"] for row, _ in labelled]
        return {
            "asked": len(answered),
            "labelled": len(labelled),
            "metrics": self.metric.summary([(row["answer"], e) for row, e in labelled]) if labelled else {},
            "interval": interval(scores) if self.metric.score and labelled else None,
        }


# ---------------------------------------------------------------- showing


def peak_memory(device: str | torch.device) -> int:
    """Bytes this process has held at most: on the GPU if it computed there, else in main memory; 0 if not known."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def judged_lines(summary: dict) -> dict[str, str]:
    """The metric's figures of all questions with a label, then apart of those with a picture and as text, if both."""
    lines: dict[str, str] = {}
    parts = [("", summary)]
    if summary["text_only"]["asked"] and summary["with_picture"]["asked"]:
        parts += [("  with a picture", summary["with_picture"]), ("  text only", summary["text_only"])]
    for part, s in parts:
        names = {name: f"{part}, {name}" if part else name for name in s["metrics"] or ["accuracy"]}
        lines |= {names[name]: f"{value:.4g}" for name, value in s["metrics"].items()}
        unlabelled = s["asked"] - s["labelled"]
        told = f" (n = {s['labelled']}{f', {unlabelled} more have no label' if unlabelled else ''})"
        first = next(iter(names.values()))
        lines[first] = lines[first] + told if s["metrics"] else f"no labels for {s['asked']} answers"
        if s["interval"]:
            lines[f"{part}, 95 % interval" if part else "  95 % interval"] = "{:.4g} - {:.4g}".format(*s["interval"])
    return lines


def table(summary: dict) -> str:
    """The summary, a figure a line."""
    s, seconds = summary, summary["seconds"]
    batch, text_only = f", of a batch of {s['batch']}" if s["batch"] > 1 else "", s["text_only"]["asked"]
    lines = {
        "method": s["method"],
        "questions": f"{s['n']} answered, {s['errors']} could not be asked, {s['cut']} answers cut at the limit",
        **({"  text only": f"{text_only} of those answered have no picture"} if text_only else {}),
        **({"  left out": "; ".join(f"{n}: {why}" for why, n in s["left_out"].items())} if s["left_out"] else {}),
        **({"  repeated": f"{s['repeated']}, copies of entries before them: asked once"} if s["repeated"] else {}),
        "judged by": s["judged_by"],
        **judged_lines(s),
        "image tokens": " -> ".join(f"{count:g}" for count in s["kept"]) or "none: no question has a picture",
        "FLOPs": f"{amount(s['flops'])}FLOPs an answer, {s['ratio']:.1%} of vanilla",
        **({"  prefix": f"{amount(s['prefix_flops'])}FLOPs more, once for all answers"} if s["prefix_flops"] else {}),
        "  decoder": f"{s['decoder_ratio']:.1%} of vanilla: whole prompt and answer, as executed for each alone",
        **({"  batches": f"decoder {s['executed'] - 1:.1%} more: padding, waiting for the longest"} if batch else {}),
        "  image tokens only": f"{s['image_only_ratio']:.1%} of vanilla: the paper's eq. 10",
        f"seconds, median{batch}": f"vision {seconds['vision']:.4f}, prefill {seconds['prefill']:.4f}, "
        f"decode {seconds['decode_step']:.4f} a token",
        "KV cache": f"{s['kv_cache_bytes'] / 2**20:.2f} MiB after the prefill, mean",
        "peak memory": f"{s['peak_bytes'] / 2**30:.2f} GiB, weights included" if s["peak_bytes"] else "unknown",
        "results": s["file"],
    }
    wide = max(map(len, lines))
    return "\n".join(f"{name:{wide}}  {value}" for name, value in lines.items())


def add_arguments(parser: argparse.ArgumentParser, max_new_tokens: int, batch: int) -> None:
    """All that `Evaluation.from_args` reads."""
    add_model_arguments(parser)
    add_question_arguments(parser)
    metrics = "; ".join(f"{name}: {metric.about}" for name, metric in METRICS.items())
    parser.add_argument("--metric", default="exact", choices=METRICS, help=f"default: exact. {metrics}")
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens)
    parser.add_argument("--batch", type=int, default=batch, help="questions at a time; 1 times each by itself")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, max_new_tokens=64, batch=1)
    parser.add_argument("--method", default="himap", help="a name as in run.py, or stages: LAYER:KEEP:SCORE,...")
    parser.add_argument("--prefix", action="store_true", help="compute what stands before the picture only once")
    parser.add_argument("--out", type=Path, default=Path("runs/evaluate"), help="a file, or a folder for one")
    args = parser.parse_args()
    evaluation = Evaluation.from_args(args)
    if args.prefix:
        text, evaluation.prefix = evaluation.model.config.text_config, evaluation.model.prefix()
        evaluation.settings["prefix_flops"] = pass_flops(text, vanilla_passes(text, evaluation.prefix.length, 0, 1)[0])
    summary, _ = evaluation.run(parse_method(args.method, evaluation.model), args.out)
    print(table(summary))


if __name__ == "__main__":
    run_command(main)
