"""Ids become text: of a whole answer, or piece by piece as they come. Joined, the pieces are that text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Of an answer: without special tokens, and bytes that are no character as U+FFFD."""
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


class Stream:
    """Takes ids, gives text as soon as no later id can change it; `finish` gives the rest.

    All ids are decoded anew for each one (0.4 ms for 1000): a decoder may look at any number of them at once.
    """

    def __init__(self, tokenizer: Tokenizer, on_text: Callable[[str], None]):
        self.tokenizer, self.on_text, self.said = tokenizer, on_text, ""
        self.special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.ids: list[int] = []

    def __call__(self, token_id: int) -> None:
        token = self.tokenizer.id_to_token(token_id)
        if token is None or token_id in self.special:  # decoded as if it were not there
            return
        self.ids.append(token_id)
        if not re.fullmatch("<0x[0-9A-F]{2}>", token):  # of LLaMA's single bytes one bad one spoils its whole run
            self.say(text_of(self.tokenizer, self.ids).rstrip("\ufffd").rstrip())  # perhaps half a character, yet

    def say(self, text: str) -> None:
        """Up to the end of `text`, which begins with all that was said before."""
        if len(text) > len(self.said):
            self.on_text(text[len(self.said) :])
            self.said = text

    def finish(self) -> None:
        """The answer has ended: nothing is held back any more."""
        self.say(text_of(self.tokenizer, self.ids))
