"""A method's answers to many questions: accuracy beside exact FLOPs, seconds and memory.

    python -m himap_ref.studies.evaluate --method himap
    python -m himap_ref.studies.evaluate --weights llava-1.5-7b --questions FILE --image-folder DIR --metric letter

One JSON line per question goes to --out at once; the same command started again goes on where it stopped. A question
that cannot be asked (no picture, too long) is recorded with its error and counted apart; remove its line to retry it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch
from tqdm import tqdm

from ..errors import HimapError, run_command
from ..flops import kv_cache_bytes
from ..model import Answer, Llava
from .literature import paper_flops
from .methods import Method, parse_method
from .metrics import METRICS, Metric, interval
from .options import add_model_arguments, load_model
from .questions import Example, add_question_arguments, ask_each, load_examples
from .records import Records
from .report import amount

# ---------------------------------------------------------------- asking


def answer_all(
    model: Llava, examples: Sequence[Example], method: Method, max_new_tokens: int, batch: int = 1
) -> Iterator[tuple[Example, tuple[Answer, int] | HimapError]]:
    """Greedy answers, each with the size of the batch it came in; what cannot be asked comes with its error."""

    def ask(group: list[Example]) -> list[tuple[Answer, int]]:
        pictures, questions = [e.picture() for e in group], [e.question for e in group]
        answers = model.generate(pictures, questions, method.stages, max_new_tokens, reducer=method.reducer)
        return [(answer, len(group)) for answer in answers]

    return ask_each(model, examples, batch, ask, method.num_image_tokens(model.config))


# ---------------------------------------------------------------- recording


@dataclass
class Evaluation:
    """Questions, a model and how answers are judged: all but the method."""

    model: Llava
    examples: list[Example]
    metric: Metric
    max_new_tokens: int
    batch: int
    settings: dict  # by which a results file recognises all this

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Evaluation:
        examples, data = load_examples(args)
        model, weights = load_model(args)
        own = {"metric": args.metric, "max_new_tokens": args.max_new_tokens, "batch": args.batch}
        metric = METRICS[args.metric]
        return cls(model, examples, metric, args.max_new_tokens, args.batch, {**weights, **data, **own})

    def run(self, method: Method, path: Path, with_kept: bool = False) -> tuple[dict, dict[str, dict]]:
        """Answers what `path` does not hold yet; returns the summary and each question's row.

        with_kept: also record which image tokens each stage kept.
        """
        stages = [[stage.layer, stage.keep, stage.name] for stage in method.stages]  # a name may change its meaning
        settings = {"method": method.name, "stages": stages, "reducer": repr(method.reducer), "kept_tokens": with_kept}
        with Records(path, {**self.settings, **settings}) as records:
            todo = [example for example in self.examples if example.id not in records]
            progress = tqdm(total=len(self.examples), initial=len(self.examples) - len(todo), unit="question")
            progress.set_description(method.name)
            for example, result in answer_all(self.model, todo, method, self.max_new_tokens, self.batch):
                row = self._row(example, result, with_kept)
                if "error" in row:
                    progress.write(f"{example.id}: {row['error']}", file=sys.stderr)
                records.add(example.id, row)
                progress.update()
            progress.close()
        return self.summarize(method, records.rows), records.rows

    def _row(self, example: Example, result: tuple[Answer, int] | HimapError, with_kept: bool) -> dict:
        """What is recorded of one answer. seconds: its batch's, divided by the batch's size."""
        kind = {"kind": example.kind} if example.kind else {}
        if isinstance(result, HimapError):
            return {**kind, "error": str(result)}
        answer, size = result
        span, flops, text = answer.image_span, answer.flops, self.model.config.text_config
        row = {
            **kind,
            "answer": answer.text,
            "label": list(example.answers),
            "correct": self.metric.score(answer.text, example) if self.metric.score else None,
            "finish": answer.finish,
            "prompt_tokens": len(answer.prompt_ids),
            "new_tokens": len(answer.token_ids),
            "kept": [span[1] - span[0], *(len(stage.kept) for stage in answer.trace.stages)],
            "flops": {"total": flops.total, "decoder": flops.decoder},
            "vanilla_flops": {"total": flops.vanilla.total, "decoder": flops.vanilla.decoder},
            "kv_cache_bytes": kv_cache_bytes(text, answer.trace.layers, answer.first_logits.element_size()),
            "seconds": {part: round(value / size, 6) for part, value in answer.seconds.items()},
        }
        return row | {"kept_tokens": [stage.kept.tolist() for stage in answer.trace.stages]} if with_kept else row

    def summarize(self, method: Method, rows: dict[str, dict]) -> dict:
        """Figures over all questions that were answered; raises HimapError if none was."""
        answered = [(row, e) for e in self.examples for row in [rows[e.id]] if "error" not in row]
        if not answered:
            raise HimapError(f"no question could be asked; the first: {rows[self.examples[0].id]['error']}")
        done, config = [row for row, _ in answered], self.model.config
        tokens = [m.tokens_per_layer(config) for m in (method, Method("none"))]
        image_only, vanilla = (paper_flops(config.text_config, per_layer) for per_layer in tokens)
        decode = [row["seconds"]["decode"] / (row["new_tokens"] - 1) for row in done if row["new_tokens"] > 1]

        def share(part: str) -> float:
            return sum(row["flops"][part] for row in done) / sum(row["vanilla_flops"][part] for row in done)

        return {
            "method": method.name,
            "n": len(done),
            "errors": len(self.examples) - len(done),
            "metrics": self.metric.summary([(row["answer"], example) for row, example in answered]),
            "interval": interval([row["correct"] for row in done]) if self.metric.score else None,
            "kept": [mean(counts) for counts in zip(*(row["kept"] for row in done), strict=True)],
            "flops": mean(row["flops"]["total"] for row in done),
            "ratio": share("total"),
            "decoder_ratio": share("decoder"),
            "image_only_ratio": image_only / vanilla,
            "seconds": {part: median(row["seconds"][part] for row in done) for part in ("vision", "prefill")}
            | {"decode_per_token": median(decode) if decode else 0.0},
            "kv_cache_bytes": mean(row["kv_cache_bytes"] for row in done),
        }


# ---------------------------------------------------------------- showing


def peak_memory(device: str) -> int:
    """Bytes this process has held at most: on the GPU if it computed there, else in main memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def table(summary: dict, peak: int) -> str:
    """The summary, a figure a line."""
    seconds = summary["seconds"]
    lines = {
        "method": summary["method"],
        "questions": f"{summary['n']} answered, {summary['errors']} could not be asked",
        **{name: f"{value:.4g}" for name, value in summary["metrics"].items()},
        **({"  95 % interval": "{:.4g} - {:.4g}".format(*summary["interval"])} if summary["interval"] else {}),
        "image tokens": " -> ".join(f"{count:g}" for count in summary["kept"]),
        "FLOPs": f"{amount(summary['flops'])}FLOPs an answer, {summary['ratio']:.1%} of vanilla",
        "  decoder": f"{summary['decoder_ratio']:.1%} of vanilla: whole prompt and answer, as executed",
        "  image tokens only": f"{summary['image_only_ratio']:.1%} of vanilla: the paper's eq. 10",
        "seconds, median": f"vision {seconds['vision']:.4f}, prefill {seconds['prefill']:.4f}, "
        f"decode {seconds['decode_per_token']:.4f} a token",
        "KV cache": f"{summary['kv_cache_bytes'] / 2**20:.2f} MiB after the prefill, mean",
        "peak memory": f"{peak / 2**30:.2f} GiB, weights included",
    }
    return "\n".join(f"{name:20} {value}" for name, value in lines.items())


def add_arguments(parser: argparse.ArgumentParser, max_new_tokens: int, batch: int) -> None:
    """All that `Evaluation.from_args` reads."""
    add_model_arguments(parser)
    add_question_arguments(parser)
    parser.add_argument("--metric", default="exact", choices=METRICS, help="default: exact")
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens)
    parser.add_argument("--batch", type=int, default=batch, help="questions at a time; 1 times each by itself")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, max_new_tokens=64, batch=1)
    parser.add_argument("--method", default="himap", help="a name as in run.py, or stages: LAYER:KEEP:SCORE,...")
    parser.add_argument("--out", type=Path, default=Path("runs/evaluate.jsonl"))
    args = parser.parse_args()
    evaluation = Evaluation.from_args(args)
    summary, _ = evaluation.run(parse_method(args.method, evaluation.model), args.out)
    print(table(summary, peak_memory(args.device)))


if __name__ == "__main__":
    run_command(main)
