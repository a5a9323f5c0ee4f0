"""Prompt: a question becomes token ids, one of them repeated for every image token.
Tokenised in one go with one `<image>` for a picture and expanded afterwards: the ids of transformers' processors."""

import re
from collections.abc import Sequence
from copy import deepcopy
from reprlib import repr as short

from tokenizers import Tokenizer

from .errors import HimapError

LLAMA_3 = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
TEMPLATES = {  # `<image>`, `{question}` and, where a later turn is not as `split` makes it, what follows an `{answer}`
    # the original LLaVA's and the paper's
    "vicuna_v1": "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions. USER: <image>\n{question} ASSISTANT:",
    # the model cards of llava-hf: no system prompt, and no EOS behind an answer
    "llava-hf": "USER: <image>\n{question} ASSISTANT:{answer} USER: {question} ASSISTANT:",
    "llama-3": LLAMA_3.format("<image>\n{question}") + "{answer}<|eot_id|>" + LLAMA_3.format("{question}"),
    "mistral": "[INST] <image>\n{question} [/INST]",
    "shapes": "Answer questions about the drawn picture. USER: <image>\n{question} ASSISTANT:",
}


def split(template: str, eos: str = "") -> tuple[str, str, str]:
    """What stands before `<image>`, what behind it, and a later turn with what comes between it and the answer before.

    A template without `{answer}`: eos, then from the last word before <image> on ("USER: ").
    """
    first, says, later = template.partition("{answer}")
    before, found, after = first.partition("<image>")
    if not found or "<image>" in after or "{question}" not in after or says and "{question}" not in later:
        names = ", ".join(TEMPLATES)
        raise HimapError(f"template {short(template)}: it must hold <image> once and, after it, {{question}}, or be a "
                         f"name: {names}")  # fmt: skip
    word = re.split(r"<s>|</s>|<\|begin_of_text\|>|<\|eot_id\|>|<\|im_end\|>|\s+(?=\S)", before)[-1]
    return before, after, later if says else eos + word + after.removeprefix("\n")


def encode_prompt(
    tokenizer: Tokenizer, question: str, template: str, image_token: int, N: int | Sequence[int],
    turn: str | None = None,
) -> list[int]:  # fmt: skip
    """Ids, `<image>` N times; without image tokens (N = 0) <image> and its line break go. Of several pictures N is a
    number each, and <image> stands there once for each, with its line break, as in llava-hf's chat templates.

    turn: only what a later turn adds behind an answer; it is the EOS as text, for templates that do not say.
    """
    if not question.strip():
        raise HimapError("the prompt is empty: ask something")
    added = tokenizer.get_added_tokens_decoder()
    image = added[image_token].content if image_token in added else "<image>"
    before, after, later = split(template, turn or "")
    counts = [count for count in ([N] if isinstance(N, int) else N) if count]
    gap = after[: len(after) - len(after.lstrip())]
    text = before + gap.join([image] * len(counts)) + after if counts else before + after.removeprefix("\n")
    text = text if turn is None else f"x{later}"  # "x" is the answer: a text's first word gets ids of its own
    begin = text.index("{question}")
    text = text.replace("{question}", question)
    try:
        encoding = tokenizer.encode(text, add_special_tokens=turn is None)
    except Exception as error:
        raise HimapError(f"the prompt cannot be tokenised: is it valid Unicode? ({error})") from None
    places = [b - len(text[a:b].lstrip()) if a < b else -1 for a, b in encoding.offsets]  # of each token in the text
    typed = [id in added and begin <= at < begin + len(question) for id, at in zip(encoding.ids, places, strict=True)]
    tokens = list(zip(encoding.ids, typed, strict=True))
    if counts and (image_token not in added or tokens.count((image_token, False)) < len(counts)):
        raise HimapError(f"the tokenizer has no added token {image_token} (image_token_index): add <image> to it")
    if turn is not None:
        del tokens[: len(tokenizer.encode("x", add_special_tokens=False).ids)]
    while tokens[:1] == tokens[1:2] and tokens[0][0] in {*added} - {image_token}:  # BOS by template and tokenizer
        del tokens[0]
    expanded, numbers = list[int](), iter(counts)
    for id, by_user in tokens:
        expanded += _as_text(tokenizer, id) if by_user else [id] * (next(numbers, 1) if id == image_token else 1)
    return expanded


def _as_text(tokenizer: Tokenizer, id: int) -> list[int]:
    """A special token that the user typed ("<image>", "</s>"), spelled out in ordinary ones."""
    text, tokenizer = tokenizer.id_to_token(id) or "", deepcopy(tokenizer)  # the other one may be in use elsewhere
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if id in ids:  # an added token that is not marked special: only cut in two is it text
        ids = [i for part in (text[:1], text[1:]) for i in tokenizer.encode(part, add_special_tokens=False).ids]
    return ids
