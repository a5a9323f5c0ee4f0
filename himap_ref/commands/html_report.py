"""One answer as a page to look into: a single file, for any browser, that asks nothing of any network."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

from PIL import Image

from ..assistant import Answer, Llava
from ..flops import layer_flops
from ..methods.reducers import ImageReducer
from .picture import Choice, follow, heat_colors
from .report import amount

TEMPLATE = Path(__file__).with_name("html_report.html")


def draw_report(
    model: Llava,
    image: Image.Image,
    question: str,
    answer: Answer,
    vanilla: Answer,
    reducer: ImageReducer | None = None,
) -> str:
    """HTML. vanilla: the answer to the same without pruning. Raises HimapError if there is no picture."""
    tokens, png, flops = follow(model, image, answer, reducer), io.BytesIO(), answer.flops
    tokens.frame.save(png, "PNG")
    layers = []
    for own, plain in zip(answer.trace.layers, vanilla.trace.layers, strict=True):
        cost, most = (sum(layer_flops(model.config.text_config, layer).values()) for layer in (own, plain))
        layers.append({
            "tokens": own.entered, "vanilla_tokens": plain.entered, "flops": cost, "vanilla": most,
            "told": f"{amount(cost)} of {amount(most)}",
        })  # fmt: skip
    data = {
        "question": question, "answer": answer.text, "vanilla": vanilla.text,
        "flops": f"{amount(flops.total)}FLOPs, {flops.ratio:.1%} of those without pruning "
                 f"(decoder alone {flops.decoder_ratio:.1%})",
        "picture": "data:image/png;base64," + base64.b64encode(png.getvalue()).decode(),
        "side": tokens.side, "all": tokens.all, "choices": [_as_json(choice) for choice in tokens.choices],
        "layers": layers,
    }  # fmt: skip
    inert = json.dumps(data).replace("<", "\\u003c")  # no question can end the script that holds it
    return TEMPLATE.read_text(encoding="utf-8").replace("$DATA", inert)


def _as_json(choice: Choice) -> dict:
    colors = heat_colors(choice.scores)
    tokens = [
        {"place": place, "score": score, "color": "#" + bytes(colors[place]).hex()}
        for place, score in choice.scores.items()
    ]
    own = {"layer": choice.layer, "score": choice.score, "ranked": choice.is_ranked}
    return {**own, "tokens": tokens, "kept": choice.kept}
