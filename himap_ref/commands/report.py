"""What commands print of answers: a JSON object, one line, tables."""

from __future__ import annotations

from collections.abc import Sequence

from ..anyres import Size
from ..assistant import Answer
from ..assistant.answer import kv_cache_bytes
from ..config import LlavaConfig
from ..flops import layer_flops
from ..methods.schedules import Method

SMALL = 10**11  # FLOPs of a prefill, below which a step's fixed costs are most of its time


def as_json(config: LlavaConfig, answer: Answer, seconds: dict[str, float], vanilla: Answer | None = None) -> dict:
    """Everything known of an answer, as `run.py --json` prints it. FLOPs: a multiply-add is 2."""
    f, text = answer.flops, config.text_config
    layers = [
        {"layer": i, "tokens_in": x.entered, "kv": x.entered, "q": x.entered, "score_rows": x.ranking, "rows": x.rows,
         "keys": x.keys, "flops": sum(parts.values()), "parts": parts}
        for i, x in enumerate(answer.trace.layers)
        for parts in [layer_flops(text, x)]
    ]  # fmt: skip
    result = {
        "answer": answer.text,
        "token_ids": answer.token_ids,
        "finish": answer.finish,
        "prompt_tokens": len(answer.prompt_ids),
        "image_span": answer.image_span and list(answer.image_span),
        "stages": [{"layer": s.layer, "score": s.score, "kept": s.kept.tolist()} for s in answer.trace.stages],
        "layers": layers,
        "flops": {
            "vision": f.vision, "projector": f.projector, "prefill": f.prefill, "decode": sum(f.decode),
            "total": f.total, "total_macs": f.macs, "vanilla_total": (f.vanilla or f).total, "ratio": f.ratio,
            "decoder_ratio": f.decoder_ratio,
        },
        "kv_cache_bytes": kv_cache_bytes(text, answer.trace.layers, answer.first_logits.element_size()),
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
    }  # fmt: skip
    if vanilla:
        result["vanilla"] = {"answer": vanilla.text, "token_ids": vanilla.token_ids, "seconds": vanilla.seconds}
        result["agree"] = vanilla.text == answer.text
    return result


def schedule(method: Method, config: LlavaConfig, images: Sequence[Size] = ()) -> str:
    """A method in words: "himap: 576 image tokens; from layer 2 on 288, by text_to_image; ...". images: the pictures'
    sizes, by which the number of tokens differs in LLaVA-NeXT. Raises HimapError if a stage is to keep more."""
    entering = sum(method.num_image_tokens(config, image) for image in images) or method.num_image_tokens(config)
    left, parts = entering, list[str]()
    whole = config.num_image_tokens * max(1, len(images))
    whose = "pictures'" if len(images) > 1 else "picture's"
    before = f", made of the {whose} {whole}" if method.reducer else ""
    for stage in method.stages:
        left = stage.count(left)
        parts.append(f"; from layer {stage.layer} on {left}" + (f", by {stage.name}" if stage.score else ""))
    everywhere = "" if parts or method.reducer else ", all of them in every layer"
    return f"{method.name}: {entering} image tokens{before}{everywhere}{''.join(parts)}"


def summary(result: dict) -> str:
    """Three lines for a stranger: tokens, work, time."""
    f, s, span = result["flops"], result["seconds"], result["image_span"]
    entering = str(sum(span[1::2]) - sum(span[::2])) if span else "no"
    counts = [entering, *(str(len(stage["kept"])) for stage in result["stages"])]
    return "\n".join((
        f"tokens    prompt {result['prompt_tokens']}, of them image tokens {' -> '.join(counts)}; "
        f"answer {len(result['token_ids'])}",
        f"work      {amount(f['total'])}FLOPs, {f['ratio']:.1%} of what it takes without pruning "
        f"(decoder alone: {f['decoder_ratio']:.1%})",
        f"seconds   loading {s['load']:.2f}, picture {s['vision']:.3f}, first token {s['prefill']:.3f}, "
        f"the others {s['decode']:.3f}",
    ))  # fmt: skip


def amount(number: float) -> str:
    """1234567 -> "1.235 M"."""
    units = ["T", "G", "M", "k", ""]
    while number >= 1000 and len(units) > 1:
        number, _ = number / 1000, units.pop()
    return f"{number:.4g} {units[-1]}"


def layer_table(result: dict) -> str:
    """Tokens that entered each part of each layer of the prefill, and its FLOPs."""
    stage_at = {stage["layer"]: stage for stage in result["stages"]}
    lines = ["layer  tokens in  ranking rows  attention+mlp rows      FLOPs       MACs"]
    for layer in result["layers"]:
        if stage := stage_at.get(layer["layer"]):
            lines.append(f"       -- stage: {len(stage['kept'])} image tokens kept by {stage['score']}")
        lines.append(
            f"{layer['layer']:5}  {layer['tokens_in']:9}  {layer['score_rows']:12}  {layer['rows']:18}"
            f"  {amount(layer['flops']):>9}  {amount(layer['flops'] // 2):>9}"
        )
    return "\n".join(lines)


def compare_table(pruned: Answer, vanilla: Answer) -> str:
    """Vanilla beside pruned; seconds: medians of several rounds."""
    same = sum(1 for a, b in zip(pruned.token_ids, vanilla.token_ids, strict=False) if a == b)
    rows = [("", "pruned", "vanilla"), ("answer", pruned.text, vanilla.text)]
    rows += [("FLOPs", amount(pruned.flops.total), amount(vanilla.flops.total))]
    for part in ("prefill", "decode"):
        rows.append((f"{part} s", f"{pruned.seconds[part]:.3f}", f"{vanilla.seconds[part]:.3f}"))
    wide = max(len(row[1]) for row in rows)
    lines = [f"{name:10} {a:{wide}}  {b}".rstrip() for name, a, b in rows]
    verdict = "same answer" if pruned.text == vanilla.text else f"different answers, {same} tokens in common"
    ratio = f"FLOPs {pruned.flops.ratio:.1%} of vanilla for the same tokens, cached"
    lines += [f"agreement  {verdict}; {ratio}"]
    if vanilla.flops.prefill < SMALL:
        lines += ["note: so small a model is busy with other things than FLOPs: time shows what is saved at 7B's size"]
    return "\n".join(lines)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))
