"""Ask a picture a question: what `himap`, `python run.py` and `python -m himap_ref` do.

Standard output holds the answer (or, with --json, one JSON object) and nothing else; notes and tables go to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from textwrap import shorten
from typing import Any

from PIL import Image

from ..assistant import Answer, Llava
from ..assistant.picture import load_image
from ..errors import HimapError
from ..methods.reducers import check_grid
from ..methods.schedules import Method, parse_method, parse_stages
from ..sampling import Sampling
from . import report
from .chat import chat
from .files import write_text, write_whole
from .html_report import draw_report
from .known import note_on
from .manners import run_command, tell
from .options import EMBEDDED, add_model_arguments, is_embedded, load_model, note_roles, revision_of
from .picture import DRAWN, draw_kept
from .ranks import from_first

EXAMPLE = (EMBEDDED / "example.png", "What color is the star?")
ROUNDS = 5  # of --compare, after one that is not counted


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Ask a picture a question, with HiMAP pruning its image tokens.")
    add = p.add_argument
    add("--image", nargs="+", metavar="FILE", help="picture file, or several that one question is about, or 'none' for "
        "text only; embedded model: the example, if left out")
    add("--prompt", help="the question; asked for, if left out")
    add_model_arguments(p)
    add("--method", help="himap (default), himap-paper, himap-caption, fastv, pyramiddrop, vtw, "
        "random, none; before the decoder: cls:TOKENS, divprune:TOKENS, visionzip:TOKENS, pool:SIDE, down:SIDE")
    add("--stages", help='LAYER:KEEP:SCORE,... instead of --method: "2:0.5:text_to_image,8:72:image_to_image"; KEEP '
        "with a point is a share, else a count; SCORE is a name or your own module:function")
    add("--max-new-tokens", type=int, default=128)
    add("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    add("--top-p", type=float, default=1.0)
    add("--seed", type=int, default=0, help="of sampling and of --method random")
    add("--reprune", action="store_true", help="no cache, rank anew for every token, as the official code does")
    add("--chat", action="store_true", help="go on asking, line by line, with the pruned cache kept; Ctrl-D ends")
    add("--compare", action="store_true", help="also run without pruning and set both side by side")
    add("--show", metavar="FILE.png", type=Path, help="write the picture with the patches that each stage kept")
    add("--report", metavar="FILE.html", type=Path, help="write a page with patches, scores and FLOPs by layer")
    add("--trace", action="store_true", help="print tokens and FLOPs layer by layer")
    add("--json", action="store_true", help="print one JSON object instead of the answer")
    return p.parse_args()  # fmt: skip


def what_to_ask(args: argparse.Namespace) -> tuple[list[str | Path], str | None]:
    """Pictures and question. The embedded model's example stands in for what is left out; a terminal is asked."""
    images, prompt = args.image, args.prompt
    if images is None and not is_embedded(args.weights):
        raise HimapError("--image FILE (or none) is missing: which picture is the question about?")
    if prompt is None and not args.chat:
        if is_embedded(args.weights):
            prompt = EXAMPLE[1]
        elif sys.stdin is not None and sys.stdin.isatty():
            print("question: ", end="", file=sys.stderr, flush=True)
            prompt = from_first(sys.stdin.readline).strip()
        else:
            raise HimapError("--prompt QUESTION is missing: what is to be asked?")
    return ([EXAMPLE[0]] if images is None else [] if images == ["none"] else images), prompt


def check_outputs(args: argparse.Namespace, images: Sequence[Image.Image]) -> None:
    """Raises HimapError for options that exclude each other, and for files that could not be written later."""
    if args.chat and (args.compare or args.json or args.reprune or args.show or args.report or args.trace):
        raise HimapError("--chat goes without --compare, --json, --reprune, --show, --report and --trace")
    for name, file, kind in (("--show", args.show, ".png"), ("--report", args.report, ".html")):
        if file and len(images) > 1:
            raise HimapError(f"{name} {file}: draws on one picture, not on {len(images)}: leave it out")
        if file and (not images or file.suffix.lower() != kind or not file.absolute().parent.is_dir()):
            raise HimapError(f"{name} {file}: needs a picture to draw on, and a {kind} file in a folder that exists")


def find_method(args: argparse.Namespace, model: Llava, pictures: int) -> Method:
    if args.stages is None:
        name = "himap" if args.method is None else args.method
        return parse_method(f"random{args.seed}" if name == "random" else name, model)
    if args.method is not None:
        raise HimapError("--stages goes in place of --method: give one of them")
    method = Method("stages", parse_stages(args.stages))
    method.tokens_per_layer(model.config, max(pictures, 1))  # raises what does not fit
    return method


def short(path: object) -> str:
    """From here, if it lies below; a hub id stays as it is."""
    here = f"{os.getcwd()}{os.sep}"
    return str(path).removeprefix(here)


def tell_of_input(
    args: argparse.Namespace, model: Llava, method: Method, images: Sequence[Image.Image], names: Sequence,
    question: str | None,
) -> None:  # fmt: skip
    """What is asked of whom, before the answer; raises HimapError before a line is said if that cannot be asked."""
    Sampling(args.temperature, args.top_p, args.seed)
    if question is not None:
        model.encode(question, method.num_image_tokens(model.config) if images else 0)
    weight = model.language_model.norm.weight
    where = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}"
    lines = {
        "weights": f"{short(args.weights)} ({where})",
        "pictures" if len(names) > 1 else "picture": ", ".join(map(short, names)) or "none",
        "method": report.schedule(method, model.config, [(image.height, image.width) for image in images]),
        "question": question and shorten(question, 200, placeholder=" ..."),
    }  # fmt: skip
    tell(*(f"{what:8}  {value}" for what, value in lines.items() if value is not None))


def compare(ask_pruned: Callable[[], Answer], ask: Callable[[], Answer]) -> tuple[Answer, Answer]:
    """Pruned and not, in turn and without a print in between: of each the answer, with the medians of its seconds."""
    ask_pruned(), ask()
    rounds = [(ask_pruned(), ask()) for _ in range(ROUNDS)]
    for answers in zip(*rounds, strict=True):
        answers[0].seconds = {part: median(a.seconds[part] for a in answers) for part in answers[0].seconds}
    return rounds[0]


def main(args: argparse.Namespace) -> None:
    names, prompt = what_to_ask(args)
    images = [load_image(name) for name in names]
    check_outputs(args, images)
    start = time.perf_counter()
    model, folder = load_model(args, together=True)
    loading = {"load": time.perf_counter() - start}
    if args.show or args.report:
        check_grid(model.config, *DRAWN)
    method = find_method(args, model, len(images))
    tell_of_input(args, model, method, images, names, prompt)
    generate: Callable[..., Any] = partial(  # one answer to one question
        model.generate, max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p,
        seed=args.seed,
    )  # fmt: skip
    if args.chat:
        chat(model, images, generate, partial(generate, images, stages=method.stages, reducer=method.reducer), prompt)
        return
    note_roles(model, str(prompt))
    if note := note_on(model, images, str(prompt)):
        tell(f"note: {note}")
    ask, vanilla = partial(generate, images, prompt), None
    ask_pruned = partial(ask, method.stages, reprune=args.reprune, reducer=method.reducer)
    if args.compare:
        answer, vanilla = compare(ask_pruned, ask)
        print("" if args.json else answer.text, end="" if args.json else "\n", flush=True)
    else:
        answer = ask_pruned(on_text=None if args.json else partial(print, end="", flush=True))
        print(end="" if args.json else "\n", flush=True)

    result = report.as_json(model.config, answer, {**loading, **answer.seconds}, vanilla)
    result["revision"] = revision_of(folder)
    if args.json:
        print(json.dumps(result), flush=True)
    if args.trace:
        tell(report.layer_table(result))
    if not answer.text:
        tell("note: the answer is empty: the model ended it at once")
    if answer.finish != "eos":
        limit = "--max-new-tokens" if answer.finish == "length" else "the end of the model's context"
        tell(f"note: the answer stops at {limit}")
    tell(report.compare_table(answer, vanilla) if vanilla else report.summary(result))
    if args.show:
        write_whole(args.show, draw_kept(model, images[0], str(prompt), answer, method.reducer).save)
        tell(f"wrote {args.show}")
    if args.report:
        write_text(args.report, draw_report(model, images[0], str(prompt), answer, vanilla or ask(), method.reducer))
        tell(f"wrote {args.report}")


def run() -> None:
    """The whole command, with the manners of all commands."""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # half of its limit reached, metadata that it cannot read
    run_command(lambda: main(parse_args()))
