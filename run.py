"""Ask a picture a question. `python run.py` alone runs the small embedded model on its example picture.

Standard output holds the answer (or, with --json, one JSON object) and nothing else; notes and tables go to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

EMBEDDED = Path(__file__).parent / "weights" / "shapes"
EXAMPLE = (EMBEDDED / "example.png", "What color is the star?")


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Ask a picture a question, with HiMAP pruning its image tokens.")
    add = p.add_argument
    add("--weights", default=EMBEDDED, help="folder, hub id, llava-1.5-7b, llava-1.5-13b (default: the embedded model)")
    add("--revision", help="branch, tag or commit of a hub repository")
    add("--image", help="picture file, or 'none' for text only (default: the embedded model's example)")
    add("--prompt", help="the question")
    add("--pad", action="store_true", help="pad the picture to a square instead of cropping it")
    add("--template", help="vicuna_v1, llava-hf, llama-3, mistral or text with <image> and {question} (default: own)")
    add("--method", default="himap", help="himap (default), himap-paper, himap-caption, fastv, pyramiddrop, vtw, "
        "random, none; before the decoder: cls:TOKENS, pool:SIDE")
    add("--stages", help='LAYER:KEEP:SCORE,... instead of --method: "2:0.5:text_to_image,8:72:image_to_image"; KEEP '
        "with a point is a share, else a count; SCORE is a name or your own module:function")
    add("--max-new-tokens", type=int, default=128)
    add("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    add("--top-p", type=float, default=1.0)
    add("--seed", type=int, default=0, help="of sampling and of --method random")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, mps")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32, bfloat16 for other --weights")
    add("--reprune", action="store_true", help="no cache, rank anew for every token, as the official code does")
    add("--chat", action="store_true", help="go on asking, line by line, with the pruned cache kept; Ctrl-D ends")
    add("--compare", action="store_true", help="also run without pruning and set both side by side")
    add("--show", metavar="FILE.png", type=Path, help="write the picture with the patches that each stage kept")
    add("--report", metavar="FILE.html", type=Path, help="write a page with patches, scores and FLOPs by layer")
    add("--trace", action="store_true", help="print tokens and FLOPs layer by layer")
    add("--json", action="store_true", help="print one JSON object instead of the answer")
    return p.parse_args()  # fmt: skip


def main(args: argparse.Namespace) -> None:
    # here, so that --help and wrong arguments answer at once: torch comes with it
    from himap_ref.assistant.picture import load_image
    from himap_ref.commands import report
    from himap_ref.commands.chat import chat
    from himap_ref.commands.files import write_text, write_whole
    from himap_ref.commands.html_report import draw_report
    from himap_ref.commands.options import is_embedded, load_model, note_roles, revision_of
    from himap_ref.commands.picture import draw_kept, looks_drawn
    from himap_ref.errors import HimapError
    from himap_ref.methods.schedules import Method, parse_method, parse_stages

    if args.chat and (args.compare or args.json or args.reprune or args.show or args.report or args.trace):
        raise HimapError("--chat goes without --compare, --json, --reprune, --show, --report and --trace")
    alone = (args.image is None) != (args.prompt is None) and not args.chat
    if alone or args.image is None and not is_embedded(args.weights):
        raise HimapError("--image FILE (or none) and --prompt QUESTION: give both, or neither to see the example")
    image, prompt = EXAMPLE if args.image is None and not args.chat else (args.image or EXAMPLE[0], args.prompt)
    image = None if image == "none" else load_image(image)
    for name, file, kind in (("--show", args.show, ".png"), ("--report", args.report, ".html")):
        if file and (image is None or file.suffix.lower() != kind or not file.absolute().parent.is_dir()):
            raise HimapError(f"{name} {file}: needs a picture to draw on, and a {kind} file in a folder that exists")

    start = time.perf_counter()
    model, folder = load_model(args)
    seconds = {"load": time.perf_counter() - start}
    if image and {"note", "palette"} <= {*model.settings} and not looks_drawn(image, model.settings["palette"]):
        print("note: " + model.settings["note"], file=sys.stderr)

    name = f"random{args.seed}" if args.method == "random" else args.method
    method = parse_method(name, model) if args.stages is None else Method("stages", parse_stages(args.stages))
    generate: Callable[..., Any] = partial(  # one answer to one question
        model.generate, max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p,
        seed=args.seed,
    )  # fmt: skip
    if args.chat:
        chat(model, generate, partial(generate, image, stages=method.stages, reducer=method.reducer), prompt)
        return
    note_roles(model, prompt)
    ask, vanilla = partial(generate, image, prompt), None
    ask_pruned = partial(ask, method.stages, reprune=args.reprune, reducer=method.reducer)
    if args.compare:  # warmed up, and nothing printed in between: both sides are timed alike
        ask_pruned(), ask()
        answer, vanilla = ask_pruned(), ask()
        print(answer.text if not args.json else "", end="\n" if not args.json else "")
    else:
        answer = ask_pruned(on_text=None if args.json else partial(print, end="", flush=True))
        print(end="" if args.json else "\n", flush=True)

    result = report.as_json(model.config, answer, {**seconds, **answer.seconds}, vanilla)
    result["revision"] = revision_of(folder)
    if args.show and image:
        write_whole(args.show, draw_kept(model, image, prompt, answer, method.reducer).save)
    if args.report and image:
        write_text(args.report, draw_report(model, image, prompt, answer, vanilla or ask(), method.reducer))
    if args.json:
        print(json.dumps(result), flush=True)
    if args.trace:
        print(report.layer_table(result), file=sys.stderr)
    if answer.finish != "eos":
        limit = "--max-new-tokens" if answer.finish == "length" else "the end of the model's context"
        print(f"note: the answer stops at {limit}", file=sys.stderr)
    print(report.compare_table(answer, vanilla) if vanilla else report.summary(result), file=sys.stderr)


if __name__ == "__main__":
    try:
        arguments = parse_args()
    except SystemExit:  # --help, perhaps for a reader that has gone away
        try:
            print(end="", flush=True)
        except OSError:
            sys.stdout = None
            sys.exit(141)
        raise
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch says so, but NumPy is not needed
    warnings.filterwarnings("ignore", module=r"PIL\.")  # half of its limit reached, metadata that it cannot read
    try:
        from himap_ref.commands.manners import run_command  # torch with it, which takes seconds
    except KeyboardInterrupt:
        sys.exit(130)

    run_command(lambda: main(arguments))
