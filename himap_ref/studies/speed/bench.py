"""Seconds and memory beside exact FLOPs, at a LLaVA's real shape: are FLOPs that were saved time that was saved?

    python -m himap_ref.studies bench --shape 7b --device cuda          random weights, no download
    python -m himap_ref.studies bench --shape 7b --layers 9 --peers     cut to what a small machine holds
    python -m himap_ref.studies bench --shape 7b --write FOLDER         and then --shape FOLDER: loading is timed, too
    python -m himap_ref.studies bench --start                           run.py against `import torch`

What is timed is what users run: `Llava.embed_image`, `generation.generate`, `Llava.from_pretrained`. All take turns;
figures are medians, ± half the range (timing.py). On a CPU let nothing else run. OMP_PROC_BIND=true may steady the
figures or, where later threads inherit the first one's core, halve them: cores that the threads did not get are told
first, and a table without a calm sample is not printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from ...assistant import Llava
from ...assistant.answer import kv_cache_bytes, vanilla_passes
from ...assistant.device import find_device
from ...checkpoint.files import find_folder
from ...checkpoint.load import rename
from ...commands.files import check_writable, write_text
from ...commands.manners import run_command
from ...commands.options import EMBEDDED
from ...commands.report import amount, markdown
from ...config import LLAVA_1_5_7B, LLAVA_1_5_13B, LlavaConfig
from ...errors import HimapError
from ...flops import LayerTrace, pass_flops, projector_flops, vision_flops
from ...generation import generate
from ...kernels import single_rows
from ...methods.reducers import ImageReducer
from ...methods.schedules import parse_method
from ..weights.hub_layout import config_json
from ..weights.random_weights import random_model, write
from .timing import CALM, Contestant, Mark, cores_had, note_products, take_turns

SHAPES = {"7b": LLAVA_1_5_7B, "13b": LLAVA_1_5_13B}
METHODS = ("none", "himap", "himap+prefix", "himap+reprune", "fastv")
SYSTEM_TOKENS = 35  # before the image, in LLaVA-1.5's prompt
RUN = EMBEDDED.parents[1] / "run.py"

# ---------------------------------------------------------------- contestants


@dataclass
class Setting:
    """What all contestants have in common."""

    model: Llava
    pixels: Tensor  # (B, 3, S, S), in the model's dtype and on its device
    text: int  # tokens after the image
    new: int  # tokens of an answer

    @property
    def threads(self) -> int | None:
        return torch.get_num_threads() if self.pixels.device.type == "cpu" else None

    def prompt(self, reducer: ImageReducer | None = None) -> tuple[Tensor, tuple[int, int]]:
        """Random words around the picture: (B, n, d), and the span of the image tokens."""
        model, image = self.model, self.model.config.image_token_index
        embeds = reducer(model, self.pixels) if reducer else model.embed_image(self.pixels)
        draw = Random(0)  # every contestant gets the same words
        words = [draw.randrange(model.config.text_config.vocab_size - 1) for _ in range(SYSTEM_TOKENS + self.text)]
        words = [word + (word >= image) for word in words]  # any but the image token
        ids = [*words[:SYSTEM_TOKENS], *[image] * embeds.shape[1], *words[SYSTEM_TOKENS:]]
        x = torch.stack([model.embed(ids, each) for each in embeds])
        return x, (SYSTEM_TOKENS, SYSTEM_TOKENS + embeds.shape[1])

    def answering(self, name: str, ask: Callable) -> Contestant:
        """ask: `generate`, all but its on_token; that tells where the prefill ends."""

        def play(mark: Mark) -> object:
            parts = chain(["prefill"], repeat("decode"))
            return ask(on_token=lambda _: mark(next(parts)))

        sums: dict[str, tuple[str, ...]] = {"answer": ("prefill", "decode")} if self.new > 1 else {}
        return Contestant(name, play, self.threads, times={"decode": self.new - 1}, sums=sums)

    def describe(
        self, answer: Contestant, prefill: Sequence[LayerTrace], steps: Iterable, tokens: Iterable[int]
    ) -> None:
        """Fills in what the traces tell of an answer; tokens: image tokens at first and after each stage."""
        text, B = self.model.config.text_config, len(self.pixels)
        first, later = pass_flops(text, prefill), sum(pass_flops(text, step) for step in steps)
        answer.flops = {"prefill": B * first, "decode": B * later, "answer": B * (first + later)}
        answer.facts["prefill"] = {
            "tokens": " > ".join(map(str, tokens)),
            "flops_by_paper": first / pass_flops(text, paper_order(prefill)),
            "kv_bytes": B * kv_cache_bytes(text, prefill, self.pixels.element_size()),
        }


def paper_order(layers: Sequence[LayerTrace]) -> list[LayerTrace]:
    """The same tokens in each layer, but all of it computed for every one of them, and nothing ranked or cached."""
    return [LayerTrace(x.keys, 0, x.keys, x.keys) for x in layers]


def our_answer(setting: Setting, name: str) -> Contestant:
    """name: of a method, with +prefix (what stands before the image is cached) or +reprune (no cache) or both."""
    base, *ways = name.split("+")
    if not set(ways) <= {"prefix", "reprune"}:
        raise HimapError(f"method {name!r}: only +prefix and +reprune can be added to a method")
    method, decoder = parse_method(base, setting.model), setting.model.language_model
    x, span = setting.prompt(method.reducer)
    start = SYSTEM_TOKENS if "prefix" in ways else 0
    cache = decoder(x[:1, :start]).cache if start else None
    ask = partial(
        generate, decoder, x[:, start:], span, method.stages, setting.new, reprune="reprune" in ways, cache=cache,
        start=start,
    )  # fmt: skip
    contestant = setting.answering(name, ask)
    out = note_products(contestant, x.device)
    steps = [trace.layers for trace in out.traces[1:]]
    kept = [stage.kept.shape[1] for stage in out.traces[0].stages]
    setting.describe(contestant, out.traces[0].layers, steps, [span[1] - span[0], *kept])
    if "reprune" in ways:  # each token has products of its own shapes: too many to hold
        contestant.bare = None
    return contestant


def our_vision(setting: Setting, name: str) -> Contestant:
    """Picture to image tokens, by the model or by the method's reducer."""
    model, reducer = setting.model, parse_method(name, setting.model).reducer
    embed = partial(reducer, model) if reducer else model.embed_image
    each = reducer.flops(model.config) if reducer else (vision_flops(model.config), projector_flops(model.config))

    def play(mark: Mark) -> None:
        embed(setting.pixels)
        mark("vision")

    flops = {"vision": len(setting.pixels) * sum(each)}
    contestant = Contestant(name if reducer else "none", play, setting.threads, flops)
    note_products(contestant, setting.pixels.device)
    return contestant


def transformers_peer(model: Llava) -> Any:
    """transformers' LLaVA with sdpa on this model's own tensors. Raises HimapError if transformers is missing."""
    try:
        import transformers
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    except ImportError:
        raise HimapError("--peers needs transformers: pip install 'himap-ref[parity]'") from None
    weight, own = model.language_model.norm.weight, model.state_dict()
    config: Any = transformers.LlavaConfig.from_dict(config_json(model.config, {}))
    with torch.device("meta"):
        peer = transformers.AutoModelForImageTextToText.from_config(
            config, dtype=weight.dtype, attn_implementation="sdpa"
        )
    # Zeros stand for what we do not have: the encoder's layers after the one that LLaVA reads. transformers runs them.
    state = {
        name: own[rename(name)] if rename(name) in own else torch.zeros_like(theirs, device=weight.device)
        for name, theirs in peer.state_dict().items()
    }
    peer.load_state_dict(state, assign=True)
    peer.tie_weights()
    peer.model.language_model.rotary_emb = LlamaRotaryEmbedding(config.text_config).to(weight.device)
    places = torch.arange(model.config.vision_config.num_patches + 1, device=weight.device)[None]
    peer.model.vision_tower.embeddings.position_ids = places
    return peer.requires_grad_(False).eval()


def transformers_contestants(setting: Setting) -> list[Contestant]:
    """Vision and an answer; the prefill's last layer is whole, lm_head is asked for the last row alone."""
    model, B = setting.model, len(setting.pixels)
    config, (x, _) = model.config, setting.prompt()
    peer, n = transformers_peer(model), x.shape[1]

    def ask(on_token: Callable[[int], None]) -> None:
        out = peer(inputs_embeds=x, use_cache=True, logits_to_keep=1)
        for step in range(setting.new):
            ids = out.logits[:, -1].argmax(dim=-1)
            on_token(ids.tolist()[0])
            if step + 1 < setting.new:
                out = peer(input_ids=ids[:, None], past_key_values=out.past_key_values, logits_to_keep=1)

    def see(mark: Mark) -> None:
        peer.get_image_features(pixel_values=setting.pixels)
        mark("vision")

    everything = replace(config, vision_feature_layer=-1)
    flops = {"vision": B * (vision_flops(everything) + projector_flops(config))}
    vision = Contestant("transformers", see, setting.threads, flops)
    prefill, *steps = vanilla_passes(config.text_config, n, 0, setting.new)
    answer = setting.answering("transformers", ask)
    setting.describe(answer, paper_order(prefill), steps, [config.num_image_tokens])
    return [vision, answer]


def readers(setting: Setting) -> list[Contestant]:
    """Two ways to read once all weights that a token passes through: no cached token can come sooner."""
    decoder, tied = setting.model.language_model, setting.model.config.text_config.tie_word_embeddings
    weights = [p for name, p in decoder.named_parameters() if p.ndim == 2 and (tied or name != "embed_tokens.weight")]
    ones = {width: weights[0].new_ones(width) for width in {weight.shape[1] for weight in weights}}

    def add(weight: Tensor) -> Tensor:  # as whole words: half-precision numbers would be converted first
        return (weight.flatten().view(torch.int64) if weight.nbytes % 8 == 0 else weight).sum()

    def multiply(weight: Tensor) -> Tensor:
        return torch.mv(weight, ones[weight.shape[1]])

    def play(read: Callable[[Tensor], Tensor], mark: Mark) -> None:
        for weight in weights:
            read(weight)
        mark("reading")

    ways = {"sum of the bits as int64": add, "product with one row": multiply}
    return [Contestant(name, partial(play, read), setting.threads) for name, read in ways.items()]


# ---------------------------------------------------------------- loading and starting


def loading(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[Contestant, list[Llava]]:
    """`Llava.from_pretrained`; the list holds the model loaded last. The untimed round fills the page cache."""
    loaded: list[Llava] = []

    def play(mark: Mark) -> None:
        loaded.clear()
        loaded.append(Llava.from_pretrained(folder, dtype, device))
        mark("load")

    return Contestant("from_pretrained", play), loaded


def starting() -> list[Contestant]:
    """Whole processes: `import torch`, and run.py as the README has it. Raises HimapError if one of them fails."""

    def play(command: Sequence[str], mark: Mark) -> None:
        process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if process.stdout and process.stdout.read(1):
            mark("first token")
        _, error = process.communicate()
        mark("rest")
        if process.returncode:
            raise HimapError(f"{command[-1]}: {(error.decode().strip().splitlines() or ['failed'])[-1]}")

    torch_alone = Contestant("import torch", partial(play, ("-c", "import torch")), sums={"start": ("rest",)})
    answer = Contestant("run.py", partial(play, (str(RUN),)), sums={"start": ("first token", "rest")})
    return [torch_alone, answer]


# ---------------------------------------------------------------- figures

PARTS = {
    "start": "Process start to end", "first token": "Process start to the first token", "load": "Loading",
    "vision": "Picture to image tokens", "prefill": "Prefill: image tokens and prompt to the first token",
    "decode": "Each later token", "answer": "Prefill and all tokens", "reading": "Reading the decoder's weights once",
}  # fmt: skip
# of a row: heading, how it is shown; a column without a figure is left out
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "method": ("", str),
    "tokens": ("image tokens", str),
    "seconds": ("seconds", "{:.4g}".format),
    "spread": ("±", "{:.0%}".format),
    "disturbed": ("disturbed samples", str),
    "flops": ("FLOPs", amount),
    "speed": ("FLOP/s", amount),
    "of_bare": ("of bare products' FLOP/s", "{:.1%}".format),
    "by_vanilla": ("time / vanilla", "{:.3f}".format),
    "flops_by_vanilla": ("FLOPs / vanilla", "{:.3f}".format),
    "time_by_flops": ("time ratio / FLOPs ratio", "{:.3f}".format),
    "flops_by_paper": ("FLOPs / paper's order", "{:.4f}".format),
    "by_transformers": ("time / transformers", "{:.3f}".format),
    "by_reading": ("time / reading the weights", "{:.3f}".format),
    "by_reprune": ("time / reprune", "{:.3f}".format),
    "by_import": ("time / import torch", "{:.3f}".format),
    "kv_bytes": ("KV cache, MiB", lambda value: f"{value / 2**20:.1f}"),
    "peak_bytes": ("peak memory, GiB", lambda value: f"{value / 2**30:.2f}"),
    "added_bytes": ("added by this, GiB", lambda value: f"{value / 2**30:.3f}"),
}


def figures(contestants: Iterable[Contestant]) -> list[dict]:
    """A row for each part of each contestant that took its turns, parts in the order of `PARTS`."""
    rows = []
    for c in contestants:
        for part in set(c.samples) & set(PARTS):
            row = {"part": part, "method": c.name, **c.typical(part), **c.facts.get(part, {})}
            if part in ("load", "vision", "prefill"):
                row |= {"peak_bytes": c.peak_bytes, "added_bytes": c.added_bytes}
            if part in c.flops:
                row["flops"] = c.flops[part] / c.times.get(part, 1)
                row["speed"] = row["flops"] / row["seconds"]
            if c.bare and part in c.bare.samples:
                row["by_bare"] = row["seconds"] / c.bare.typical(part)["seconds"]
                row["of_bare"] = 1 / row["by_bare"]
            rows.append(row)
    rows.sort(key=lambda row: list(PARTS).index(row["part"]))  # stable: the contestants keep their order
    return compared(rows)


def compared(rows: list[dict]) -> list[dict]:
    """Adds the ratios between rows."""
    at = {(row["part"], row["method"]): row for row in rows}
    reading = min((row["seconds"] for row in rows if row["part"] == "reading"), default=None)
    for row in rows:
        part, name = row["part"], row["method"]
        others = {
            "by_vanilla": (part, "none"), "by_transformers": (part, "transformers"),
            "by_reprune": ("answer" if part == "answer" else None, f"{name}+reprune"),
            "by_import": ("start", "import torch"),
        }  # fmt: skip
        for key, place in others.items():
            if (other := at.get(place)) and other is not row:
                row[key] = row["seconds"] / other["seconds"]
        if "by_vanilla" in row:
            row["flops_by_vanilla"] = row["flops"] / at[part, "none"]["flops"]
            row["time_by_flops"] = row["by_vanilla"] / row["flops_by_vanilla"]
        if part == "decode" and reading:
            row["by_reading"] = row["seconds"] / reading
    return rows


def tables(rows: list[dict]) -> str:
    """A table for each part that had at least one calm sample."""
    shown = []
    for part, title in PARTS.items():
        own = [row for row in rows if row["part"] == part]
        if own and all(row["disturbed"] == len(row["samples"]) for row in own):
            shown.append(f"{title}\n\nno table: in no sample did all threads work all the time (--json has them)")
        elif own:
            columns = [key for key in COLUMNS if any(row.get(key) for row in own)]
            lines = [[COLUMNS[key][1](row[key]) if key in row else "" for key in columns] for row in own]
            shown.append(f"{title}\n\n" + markdown([COLUMNS[key][0] for key in columns], lines))
    return "\n\n".join(shown)


# ---------------------------------------------------------------- the command


def build(args: argparse.Namespace) -> tuple[Llava, list[Contestant]]:
    """The model, and the loading of it where it is loaded."""
    device, dtype = find_device(args.device), getattr(torch, args.dtype)
    if args.shape in SHAPES:
        model = random_model(shallow(SHAPES[args.shape], args.layers), dtype, device)
        single_rows(model.language_model)  # as `Llava.from_pretrained` does
        return model, []
    folder = EMBEDDED if args.shape == "embedded" else find_folder(args.shape)
    load, loaded = loading(folder, dtype, device)
    take_turns([load], args.rounds, device)
    return loaded.pop(), [load]


def shallow(config: LlavaConfig, layers: int | None) -> LlavaConfig:
    """With the decoder's first `layers` only (None: all). Raises HimapError if it has fewer."""
    text = config.text_config
    if layers is not None and not 1 <= layers <= text.num_hidden_layers:
        raise HimapError(f"--layers {layers}: the decoder has {text.num_hidden_layers}")
    return replace(config, text_config=replace(text, num_hidden_layers=layers or text.num_hidden_layers))


def check_context(config: LlavaConfig, text: int, new: int) -> None:
    """Raises HimapError if an answer would end before its last token."""
    room, n = config.text_config.max_position_embeddings, SYSTEM_TOKENS + config.num_image_tokens + text
    if n + new - 1 > room:
        raise HimapError(f"{n} tokens and {new} new ones do not fit the model's context of {room}")


def start(args: argparse.Namespace) -> tuple[list[dict], dict]:
    """-> rows, and the setting they hold for."""
    contestants = starting()
    take_turns(contestants, args.rounds, torch.device("cpu"))
    return figures(contestants), {"torch": torch.__version__, "rounds": args.rounds}


def told_cores(threads: int, had: float) -> dict[str, str]:
    """What stands at the top of the figures; a warning before hours of measuring where threads lack their cores."""
    if had < CALM * threads:
        print(f"warning: {threads} threads get {had:.2f} cores: these figures will not be this machine's; "
              "stop what else runs, or try without OMP_PROC_BIND", file=sys.stderr)  # fmt: skip
        return {"NOT THIS MACHINE'S SPEED": f"{threads} threads had {had:.2f} cores"}
    return {"cores had": f"{had:.2f} of {threads}"}


@torch.no_grad()
def measure(args: argparse.Namespace) -> tuple[list[dict], dict]:
    """-> rows, and the setting they hold for."""
    model, loads = build(args)
    config, weight = model.config, model.language_model.norm.weight
    size = config.vision_config.image_size
    pixels = torch.randn(args.batch, config.vision_config.num_channels, size, size).to(weight.device, weight.dtype)
    setting = Setting(model, pixels, args.text_tokens, args.new_tokens)
    check_context(config, args.text_tokens, args.new_tokens)
    bases = dict.fromkeys(name.split("+")[0] for name in args.methods)
    ways_to_see = ["none", *(name for name in bases if parse_method(name, model).reducer)]
    runs = [our_vision(setting, name) for name in ways_to_see]
    runs += [our_answer(setting, name) for name in dict.fromkeys(args.methods)]
    if args.peers:
        runs += transformers_contestants(setting)
    runs += readers(setting)
    with_bare = [contestant for run in runs for contestant in (run, run.bare) if contestant]
    cores = told_cores(setting.threads, cores_had()) if setting.threads else {}
    take_turns(with_bare, args.rounds, weight.device)
    return figures([*loads, *runs]), {
        **cores,
        "shape": str(args.shape), "layers": config.text_config.num_hidden_layers, "dtype": args.dtype,
        "device": torch.cuda.get_device_name(weight.device) if weight.is_cuda else weight.device.type,
        "threads": setting.threads, "bound": os.environ.get("OMP_PROC_BIND", "no"), "torch": torch.__version__,
        "prompt": f"{SYSTEM_TOKENS} + {config.num_image_tokens} + {args.text_tokens}", "new tokens": args.new_tokens,
        "batch": args.batch, "rounds": args.rounds,
        "weights": f"{sum(p.nbytes for p in model.parameters()) / 2**30:.2f} GiB",
    }  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--shape", default="embedded", help="7b or 13b (random weights), embedded (default), or a folder or hub id")
    add("--layers", type=int, help="of the decoder of 7b or 13b, for small machines; default: all")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, mps")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 if embedded, else bfloat16")
    add("--methods", nargs="+", default=METHODS, help="as in run.py; +prefix caches what stands before the image, "
        "+reprune ranks anew for each token; default: %(default)s")  # fmt: skip
    add("--peers", action="store_true", help="also transformers' LLaVA, sdpa, on the same weights (extra parity)")
    add("--text-tokens", type=int, default=60, help="after the image; default: 60")
    add("--new-tokens", type=int, default=16, help="of an answer; default: 16")
    add("--batch", type=int, default=1, help="prompts at a time")
    add("--rounds", type=int, default=5, help="samples of each figure; default: 5")
    add("--start", action="store_true", help="time instead how long run.py takes, from its start to its end")
    add("--write", metavar="FOLDER", type=Path, help="write instead a random checkpoint of this shape")
    add("--json", metavar="FILE", type=Path, help="write all figures and samples")
    args = parser.parse_args()
    args.dtype = args.dtype or ("float32" if args.shape == "embedded" else "bfloat16")
    for name in ("text_tokens", "new_tokens", "batch", "rounds"):
        if getattr(args, name) < 1:
            raise HimapError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if (args.layers is not None or args.write) and args.shape not in SHAPES:
        raise HimapError(f"--layers and --write: --shape must be {' or '.join(SHAPES)}")
    return args


def main() -> None:
    args = parse_args()
    if args.write:
        size = write(shallow(SHAPES[args.shape], args.layers), getattr(torch, args.dtype), args.write)
        print(f"{args.write}: {size / 2**30:.2f} GiB of random weights")
        return
    if args.json:
        check_writable(args.json, ("json",))  # rather than after hours
    rows, setting = start(args) if args.start else measure(args)
    print("; ".join(f"{key} {value}" for key, value in setting.items()), tables(rows), sep="\n\n")
    if args.json:
        write_text(args.json, json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
