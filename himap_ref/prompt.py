"""Prompt: a question becomes token ids, one of them repeated for every image token; the image span is found from them.

The text is tokenised in one go with one `<image>` in it and expanded afterwards, which gives the ids of transformers'
`LlavaProcessor`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from .config import read_bytes
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


def read_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json, the one file of the fast tokenizer; raises HimapError if it is not there or not one."""
    try:
        tokenizer = Tokenizer.from_buffer(read_bytes(folder / "tokenizer.json"))
        tokenizer.no_padding()  # a file may carry the settings of somebody's training run
        tokenizer.no_truncation()
        tokenizer.decode(tokenizer.encode("A <b>?").ids)  # parts that do not fit each other are found only in use
        return tokenizer
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the library raises bare Exception, and panics that are not even that
        raise HimapError(f"{folder / 'tokenizer.json'}: not a readable tokenizer ({error})") from None


def encode_prompt(
    tokenizer: Tokenizer, question: str, template: str, image_token: int, num_image_tokens: int
) -> Prompt:
    """`template` holds `<image>` and `{question}`; with 0 image tokens "<image>" and its line break are left out."""
    if not question.strip():
        raise HimapError("the prompt is empty: ask something")
    added = tokenizer.get_added_tokens_decoder()
    image = added[image_token].content if image_token in added else "<image>"
    before, found, after = template.partition("<image>")
    if not found or "<image>" in after or "{question}" not in after:
        raise HimapError("the template must hold <image> once and, after it, {question}")
    text = f"{before}{image}{after}" if num_image_tokens else before + after.removeprefix("\n")
    try:
        ids = tokenizer.encode(text.replace("{question}", question)).ids
    except Exception as error:
        raise HimapError(f"the prompt cannot be tokenised: is it valid Unicode? ({error})") from None
    if num_image_tokens and (image_token not in added or image_token not in ids):
        raise HimapError(f"the tokenizer has no added token {image_token} (image_token_index): add <image> to it")
    own = ids.index(image_token) if num_image_tokens else -1  # the template's comes before any the user typed
    typed = {id for id, token in added.items() if token.content in question}
    expanded: list[int] = []
    for place, id in enumerate(ids):
        if place == own:
            expanded += [image_token] * num_image_tokens
        elif id in typed and place > 0:  # place 0 is BOS
            expanded += _as_text(tokenizer, id)
        else:
            expanded.append(id)
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
    if not places:
        return None
    if places[-1] - places[0] + 1 != len(places):
        raise HimapError("the image tokens are not one unbroken run: one picture per prompt is supported")
    return places[0], places[-1] + 1
