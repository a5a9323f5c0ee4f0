"""Prompt: a question becomes token ids, one of them repeated for every image token; and ids become text as they come.
Tokenised in one go with one `<image>` in it and expanded afterwards: the ids of transformers' `LlavaProcessor`."""

import re
from collections.abc import Callable
from copy import deepcopy

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from .errors import HimapError

TEMPLATES = {
    # the original LLaVA's and the paper's
    "vicuna_v1": "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions. USER: <image>\n{question} ASSISTANT:",
    "llava-hf": "USER: <image>\n{question} ASSISTANT:",  # the model cards of llava-hf: no system prompt
    "shapes": "Answer questions about the drawn picture. USER: <image>\n{question} ASSISTANT:",
}


def encode_prompt(
    tokenizer: Tokenizer, question: str, template: str, image_token: int, N: int, turn: bool = False
) -> list[int]:
    """`template` holds `<image>` and `{question}`; without image tokens (N = 0) <image> and its line break go.

    turn: only what a later turn repeats, from the word before <image> on ("USER: "), and no BOS.
    """
    if not question.strip():
        raise HimapError("the prompt is empty: ask something")
    added = tokenizer.get_added_tokens_decoder()
    image = added[image_token].content if image_token in added else "<image>"
    before, found, after = template.partition("<image>")
    if not found or "<image>" in after or "{question}" not in after:
        raise HimapError("the template must hold <image> once and, after it, {question}")
    before = "".join(re.findall(r"\S+\s*$", before)) if turn else before
    text = f"{before}{image}{after}" if N else before + after.removeprefix("\n")
    try:
        ids = tokenizer.encode(text.replace("{question}", question), add_special_tokens=not turn).ids
    except Exception as error:
        raise HimapError(f"the prompt cannot be tokenised: is it valid Unicode? ({error})") from None
    if N and (image_token not in added or image_token not in ids):
        raise HimapError(f"the tokenizer has no added token {image_token} (image_token_index): add <image> to it")
    own = ids.index(image_token) if N else -1  # the template's comes before any the user typed
    typed = {id: _as_text(tokenizer, id) for id, token in added.items() if token.content in question}
    expanded: list[int] = []
    for place, id in enumerate(ids):
        words = typed.get(id, [id]) if turn or place > 0 else [id]  # place 0 is BOS
        expanded += [image_token] * N if place == own else words
    return expanded


def _as_text(tokenizer: Tokenizer, id: int) -> list[int]:
    """A special token that the user typed ("<image>", "</s>"), spelled out in ordinary ones."""
    text, tokenizer = tokenizer.id_to_token(id) or "", deepcopy(tokenizer)  # the other one may be in use elsewhere
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if id in ids:  # an added token that is not marked special: only cut in two is it text
        ids = [i for part in (text[:1], text[1:]) for i in tokenizer.encode(part, add_special_tokens=False).ids]
    return ids


def streamer(tokenizer: Tokenizer, on_text: Callable[[str], None]) -> Callable[[int], None]:
    """Takes ids, gives text as it becomes readable: bytes that are no whole character yet are held back."""
    stream, begun = DecodeStream(skip_special_tokens=True), False

    def on_token(token_id: int) -> None:
        nonlocal begun
        piece = stream.step(tokenizer, token_id) or ""
        if piece := piece if begun else piece.lstrip():  # no space before the first word
            begun = True
            on_text(piece)

    return on_token
