"""Why papers print different FLOPs for one model: each definition in use, under its name, for LLaVA-1.5.

    python -m himap_ref.studies literature

n tokens, d hidden size, m intermediate size, T layers. The first two count multiply-accumulates and call them FLOPs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from ...assistant.answer import kv_cache_bytes
from ...commands.manners import run_command
from ...config import LLAVA_1_5_7B, LLAVA_1_5_13B, TextConfig
from ...errors import HimapError
from ...flops import pass_flops
from ...methods.plan import plan_prefill, tokens_per_layer
from ...pruning import HIMAP, HIMAP_CAPTION, Stage


def paper_layer(n: int, d: int, m: int) -> int:
    """4nd^2 + 2n^2 d + 2ndm: HiMAP eq. 10, FastV, DivPrune. Counts two of the MLP's three matrices."""
    return 4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m


def three_matrix_layer(n: int, d: int, m: int) -> int:
    """4nd^2 + 2n^2 d + 3ndm: PyramidDrop, SparseVLM. All three matrices; twice this is the true FLOPs of a layer."""
    return paper_layer(n, d, m) + n * d * m


def paper_flops(config: TextConfig, tokens: Sequence[int], layer: Callable[..., int] = paper_layer) -> int:
    """Sum of `layer` over the layers' token numbers (`tokens_per_layer`: image tokens only, as the papers count)."""
    return sum(layer(n, config.hidden_size, config.intermediate_size) for n in tokens)


def lm_head_flops(config: TextConfig, rows: int) -> int:
    """True FLOPs."""
    return 2 * rows * config.hidden_size * config.vocab_size


def definitions(
    config: TextConfig, stages: Sequence[Stage], system: int, image: int, text: int
) -> dict[str, float]:
    """One schedule under each definition in use. system, image, text: tokens before, of and after the image."""
    T, n, span = config.num_hidden_layers, system + image + text, (system, system + image)
    tokens = tokens_per_layer(stages, image, T)
    whole = [system + left + text for left in tokens]
    executed, vanilla = plan_prefill(config, span, n, stages), plan_prefill(config, span, n)
    three_matrix = paper_flops(config, tokens, three_matrix_layer)
    all_rows = 2 * paper_flops(config, whole, three_matrix_layer) + lm_head_flops(config, whole[-1])
    paper_ratio = paper_flops(config, tokens) / paper_flops(config, [image] * T)
    return {
        "image tokens, 4nd^2+2n^2d+2ndm, MACs (HiMAP, FastV, DivPrune)": paper_flops(config, tokens),
        "image tokens, 4nd^2+2n^2d+3ndm, MACs (PyramidDrop, SparseVLM)": three_matrix,
        "whole prompt, 4nd^2+2n^2d+2ndm, MACs": paper_flops(config, whole),
        "whole prompt, every row and its lm_head, FLOPs (VTW)": all_rows,
        "prefill as executed here, FLOPs": pass_flops(config, executed),
        "ratio to vanilla, image tokens, 2ndm (the paper's)": paper_ratio,
        "ratio to vanilla, whole prompt, as executed here": pass_flops(config, executed) / pass_flops(config, vanilla),
        "mean image tokens per layer": sum(tokens) / T,
        "KV-cache bytes after the prefill, bf16": kv_cache_bytes(config, executed),
    }


def _shown(what: str, value: float) -> str:
    if "bytes" in what:
        return f"{value / 2**20:.1f} MiB"
    return f"{value / 1e12:.3f} T" if value > 1e11 else f"{value:.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--system", type=int, default=35, help="tokens before the image")
    parser.add_argument("--image", type=int, default=576)
    parser.add_argument("--text", type=int, default=10, help="tokens after the image")
    args = parser.parse_args()
    if args.system < 0 or min(args.image, args.text) < 1 or args.system + args.image + args.text > 2**20:
        raise HimapError("--system from 0, --image and --text from 1, together at most 2^20 tokens")
    for model, config in (("7B", LLAVA_1_5_7B), ("13B", LLAVA_1_5_13B)):
        for name, stages in (("vanilla", ()), ("HiMAP, K2 = 8", HIMAP), ("HiMAP, K2 = 15", HIMAP_CAPTION)):
            print(f"{model} {name}, {args.system} + {args.image} + {args.text} tokens")
            for what, value in definitions(config.text_config, stages, args.system, args.image, args.text).items():
                print(f"  {what:62} {_shown(what, value)}")


if __name__ == "__main__":
    run_command(main)
