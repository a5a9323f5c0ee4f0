"""A conversation about one picture on the terminal: the pruned cache is kept, so a turn costs only its own tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from PIL import Image

from ..assistant import Answer, Llava
from ..errors import HimapError
from .known import note_on
from .manners import tell
from .options import note_roles
from .ranks import from_first
from .report import amount


def questions(first: str | None) -> Iterator[str]:
    """`first`, if there is one, then line by line what is typed, until the input ends (Ctrl-D)."""
    if first is not None:
        yield first
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = from_first(sys.stdin.readline)
        if not line:
            print(file=sys.stderr)
            return
        if line.strip():
            yield line.strip()


def chat(
    model: Llava, images: Sequence[Image.Image], ask: Callable[..., Any], ask_first: Callable[..., Any],
    first: str | None,
) -> None:  # fmt: skip
    """Answers go to standard output as they come, all else to standard error.

    images: what it is all about; ask_first: `Llava.generate` for the first turn, all but the question; ask: for later
    ones.
    """
    past, turn, context = None, 0, model.config.text_config.max_position_embeddings
    full = f"note: the conversation ends here: it fills the model's context of {context} tokens"
    for question in questions(first):
        note_roles(model, question)
        if note := note_on(model, images, question):
            tell(f"note: {note}")
        try:
            show: Callable[[str], None] = partial(print, end="", flush=True)
            answer = ask(None, question, past=past, on_text=show) if past else ask_first(question, on_text=show)
        except HimapError as error:
            if past is None:
                raise
            if len(model.encode(question, past=past)) > context >= len(model.encode(question)):
                tell(full)
                return
            tell(f"note: {error}")  # the conversation is as it was before
            continue
        print(flush=True)
        past, turn = answer.past, turn + 1
        tell(told(turn, answer))
        if answer.finish == "context":
            tell(full)
            return
        if answer.finish == "length":
            tell("note: the answer stops at --max-new-tokens")


def told(turn: int, answer: Answer) -> str:
    """One line of what a turn took."""
    layers, flops = answer.trace.layers, answer.flops
    new, keys = layers[0].entered, sorted({layer.keys for layer in answer.traces[-1].layers})
    held = f"{keys[-1]}" if len(keys) == 1 else f"{keys[-1]} to {keys[0]}"
    return (
        f"[turn {turn}: {new} new tokens of {len(answer.prompt_ids)}, answer {len(answer.token_ids)}, cached by layer "
        f"{held}; {amount(flops.total)}FLOPs, {flops.ratio:.1%} of vanilla; prefill {answer.seconds['prefill']:.3f} s, "
        f"decode {answer.seconds['decode']:.3f} s]"
    )
