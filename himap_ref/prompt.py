"""Prompt: a question becomes token ids, one of them repeated for every image token; the image span is found from them.
Tokenised in one go with one `<image>` in it and expanded afterwards: the ids of transformers' `LlavaProcessor`."""

from typing import NamedTuple

from tokenizers import Tokenizer

from .errors import HimapError

TEMPLATES = {
    # the original LLaVA's and the paper's
    "vicuna_v1": "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions. USER: <image>\n{question} ASSISTANT:",
    "llava-hf": "USER: <image>\n{question} ASSISTANT:",  # the model cards of llava-hf: no system prompt
    "shapes": "Answer questions about the drawn picture. USER: <image>\n{question} ASSISTANT:",
}


class Prompt(NamedTuple):
    ids: list[int]
    image_span: tuple[int, int] | None  # [start, stop) of the image tokens in ids; None without a picture


def encode_prompt(tokenizer: Tokenizer, question: str, template: str, image_token: int, N: int) -> Prompt:
    """`template` holds `<image>` and `{question}`; without image tokens (N = 0) <image> and its line break go."""
    if not question.strip():
        raise HimapError("the prompt is empty: ask something")
    added = tokenizer.get_added_tokens_decoder()
    image = added[image_token].content if image_token in added else "<image>"
    before, found, after = template.partition("<image>")
    if not found or "<image>" in after or "{question}" not in after:
        raise HimapError("the template must hold <image> once and, after it, {question}")
    text = f"{before}{image}{after}" if N else before + after.removeprefix("\n")
    try:
        ids = tokenizer.encode(text.replace("{question}", question)).ids
    except Exception as error:
        raise HimapError(f"the prompt cannot be tokenised: is it valid Unicode? ({error})") from None
    if N and (image_token not in added or image_token not in ids):
        raise HimapError(f"the tokenizer has no added token {image_token} (image_token_index): add <image> to it")
    own = ids.index(image_token) if N else -1  # the template's comes before any the user typed
    typed = {id: _as_text(tokenizer, id) for id, token in added.items() if token.content in question}
    expanded: list[int] = []
    for place, id in enumerate(ids):
        words = typed.get(id, [id]) if place > 0 else [id]  # place 0 is BOS
        expanded += [image_token] * N if place == own else words
    return Prompt(expanded, find_image_span(expanded, image_token))


def _as_text(tokenizer: Tokenizer, id: int) -> list[int]:
    """A special token that the user typed ("<image>", "</s>"), spelled out in ordinary ones."""
    text = tokenizer.id_to_token(id) or ""
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    tokenizer.encode_special_tokens = False
    if id in ids:  # an added token that is not marked special: only cut in two is it text
        ids = [i for part in (text[:1], text[1:]) for i in tokenizer.encode(part, add_special_tokens=False).ids]
    return ids


def find_image_span(ids: list[int], image_token: int) -> tuple[int, int] | None:
    """[start, stop) of the one run of image tokens; None if there is none. More than one run is an error."""
    places = [i for i, id in enumerate(ids) if id == image_token]
    if places and places[-1] - places[0] + 1 != len(places):
        raise HimapError("the image tokens are not one unbroken run: one picture per prompt is supported")
    return (places[0], places[-1] + 1) if places else None
