"""The page: a picture, a question and stages on the left; answers, patches and FLOPs on the right.

What comes from the browser is data: a method or criterion is looked up by its name, never imported. Only the box for a
criterion of one's own runs what is typed, and it is there only with --allow-code.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import gradio as gr

from ..assistant import Llava
from ..assistant.picture import load_image
from ..commands.html_report import draw_report
from ..commands.known import note_on
from ..commands.manners import told
from ..errors import HimapError
from ..methods.schedules import METHODS, Method, parse_method, tell_errors
from ..methods.scores import SCORES
from ..pruning import Score, Stage

SLIDERS, NO_STAGE, OWN = "the stages below", "no stage", "your own, below"
CODE = '''def score(view):  # one number per image token, higher is kept: README, "Fork it"
    return view.attention(view.text).amax(dim=1)
'''


def build_page(model: Llava, example: tuple[Path, str] | None = None, allow_code: bool = False) -> gr.Blocks:
    """example: a picture and a question to begin with."""
    N, L = model.config.num_image_tokens, model.config.text_config.num_hidden_layers
    methods = {name: parse_method(name, model) for name in names_of_methods(model)}
    scores = [*SCORES, *([OWN] if allow_code else [])]

    def ask(picture: str, question: str, name: str, tokens: float, code: str, *stages: Any) -> str:
        try:
            method = methods.get(name) or Method(name, stages_of(stages, code if allow_code else ""))
            return answer_as_html(model, picture, question, method, int(tokens))
        except Exception as error:
            if (line := told(error)) is None:
                raise  # a bug of ours: Gradio says "Error", and the terminal has the traceback
            raise gr.Error(html.escape(line), print_exception=False) from None

    with gr.Blocks(title="HiMAP", analytics_enabled=False, fill_width=True) as page, gr.Row():
        with gr.Column(scale=1, min_width=320):
            shown = example and str(example[0])
            picture = gr.Image(shown, label="picture", sources=["upload", "clipboard"], type="filepath", height=280)
            picture.preprocess = lambda file: file and file.path  # for `load_image`, stricter than Gradio's own reader
            question = gr.Textbox(example and example[1], label="question", max_length=4000)
            button = gr.Button("Ask", variant="primary")
            method = gr.Dropdown([SLIDERS, *methods], label="method")
            stages: list[Any] = []
            for number, stage in zip("12", [*model.himap, None, None], strict=False):
                layer, keep, name = (stage.layer, stage.keep, stage.name) if stage else (1, 0.5, NO_STAGE)
                keep = keep if isinstance(keep, float) else round(keep / N, 2)
                stages += [
                    gr.Slider(1, L - 1, min(layer, L - 1), step=1, label=f"K{number}: on entry to layer"),
                    gr.Slider(0.01, 1, keep, step=0.01, label=f"R{number}: share of image tokens kept"),
                    gr.Dropdown([NO_STAGE, *scores], value=name, label=f"criterion {number}"),
                ]
            tokens = gr.Slider(1, 512, 128, step=1, label="longest answer, in tokens")
            code = gr.Code(CODE, "python", label="a criterion of your own: runs on this machine", visible=allow_code)
        with gr.Column(scale=3, min_width=640):
            report = gr.HTML(container=False)
        moved = [stage.input if isinstance(stage, gr.Dropdown) else stage.release for stage in [*stages, method]]
        # One question at a time, whoever asks; of a slider's moves meanwhile only the last is answered.
        gr.on([button.click, question.submit, *moved], ask, [picture, question, method, tokens, code, *stages], report,
              concurrency_limit=1, trigger_mode="always_last", api_name="ask")  # fmt: skip
    return page.queue(max_size=32)


def names_of_methods(model: Llava) -> list[str]:
    """Those of `METHODS` that suit the model; a quarter and a half of the tokens for those before the decoder."""
    N = model.config.num_image_tokens
    names, side = [*METHODS, f"cls:{N // 4}", f"cls:{N // 2}"], int(N**0.5)
    suit = []
    for name in [*names, f"pool:{max(1, side // 2)}", f"pool:{max(1, round(side * 0.7))}"]:
        try:
            parse_method(name, model).num_image_tokens(model.config)
            suit.append(name)
        except HimapError:  # a decoder of few layers, a class token among the patches
            continue
    return suit


def stages_of(values: tuple[Any, ...], code: str) -> tuple[Stage, ...]:
    """(layer, share, name of a score) for each stage, one behind the other."""
    triples = zip(values[0::3], values[1::3], values[2::3], strict=True)
    return tuple(
        Stage(int(layer), float(share), own_score(code) if name == OWN and code else SCORES[name])
        for layer, share, name in triples
        if name != NO_STAGE
    )


def own_score(code: str) -> Score:
    """The function `score` of what was typed. Raises HimapError."""
    names: dict[str, Any] = {}
    try:
        exec(compile(code, "the box", "exec"), names)
        return tell_errors("your own", names["score"])
    except Exception as error:
        raise HimapError(f"the box must define score(view) ({type(error).__name__}: {error})") from None


def answer_as_html(model: Llava, picture: str | None, question: str, method: Method, tokens: int) -> str:
    """Asked with and without pruning; the report in a frame of its own, whose scripts cannot reach the page."""
    if not picture:
        raise HimapError("give a picture first")
    try:
        image = load_image(picture)
    except HimapError as error:
        raise HimapError(str(error).replace(picture, "the picture")) from None
    if note := note_on(model, image, question):
        gr.Warning(html.escape(note))
    answer: Any = model.generate(image, question, method.stages, tokens, reducer=method.reducer)
    vanilla: Any = model.generate(image, question, (), tokens)
    report = html.escape(draw_report(model, image, question, answer, vanilla, method.reducer))
    return f'<iframe sandbox="allow-scripts" srcdoc="{report}" style="width: 100%; height: 1000px; border: 0"></iframe>'
