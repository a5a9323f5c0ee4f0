"""Prompt: a question becomes token ids, one of them repeated for every image token; the image span is found from them.

The text is tokenised in one go with one `<image>` in it and expanded afterwards, which gives the ids of transformers'
`LlavaProcessor`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer

from .errors import HimapError

TEMPLATES = {
    "vicuna_v1": (  # the original LLaVA's and the paper's
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions. "
        "USER: <image>\n{question} ASSISTANT:"
    ),
    "llava-hf": "USER: <image>\n{question} ASSISTANT:",  # the model cards of llava-hf: no system prompt
    "shapes": "Answer questions about the drawn picture. USER: <image>\n{question} ASSISTANT:",
}


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    image_span: tuple[int, int] | None  # [start, stop) of the image tokens in ids; None without a picture


def encode_prompt(
    tokenizer: Tokenizer, question: str, template: str, image_token: int, num_image_tokens: int, has_image: bool
) -> Prompt:
    """`template` holds `<image>` and `{question}`; without a picture "<image>" and its line break are left out."""
    if not question.strip():
        raise HimapError("the prompt is empty: ask something")
    image = tokenizer.id_to_token(image_token)
    if image is None:
        raise HimapError(f"the tokenizer has no token with the image token's id {image_token}: not a LLaVA's tokenizer")
    before, after = template.split("<image>")
    if not has_image:
        before, after = before + after.removeprefix("\n"), ""
    text = (before + image + after if has_image else before).replace("{question}", question)
    try:
        ids = tokenizer.encode(text).ids
    except (UnicodeError, TypeError):
        raise HimapError("the prompt is not valid Unicode text") from None
    own = ids.index(image_token) if has_image else -1
    ids = _spell_out(tokenizer, ids, own, question)
    if not has_image:
        return Prompt(ids, None)
    ids = ids[:own] + [image_token] * num_image_tokens + ids[own + 1 :]
    return Prompt(ids, find_image_span(ids, image_token))


def _spell_out(tokenizer: Tokenizer, ids: list[int], own: int, question: str) -> list[int]:
    """Special tokens that the user typed ("<image>", "</s>") become ordinary text; the template's image token, at place
    `own`, and the leading BOS stay."""
    typed = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.content in question}
    spelled = []
    for place, id in enumerate(ids):
        spelled += _as_text(tokenizer, id) if id in typed and place not in (0, own) else [id]
    return spelled


def _as_text(tokenizer: Tokenizer, id: int) -> list[int]:
    text = tokenizer.id_to_token(id)
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    tokenizer.encode_special_tokens = False
    if id in ids:  # an added token that is not marked special: only cut in two is it text
        ids = [i for part in (text[:1], text[1:]) for i in tokenizer.encode(part, add_special_tokens=False).ids]
    return ids


def find_image_span(ids: list[int], image_token: int) -> tuple[int, int] | None:
    """[start, stop) of the one run of image tokens; None if there is none. More than one run is an error."""
    places = [i for i, id in enumerate(ids) if id == image_token]
    if not places:
        return None
    if places[-1] - places[0] + 1 != len(places):
        raise HimapError("the image tokens are not one unbroken run: one picture per prompt is supported")
    return places[0], places[-1] + 1
