"""The pieces of a streamed answer, joined, are the answer's text; and each is given as soon as it is sure."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from toys import TOKENIZERS, make_tokenizer

from himap_ref.assistant.text import Stream, text_of

BYTES = "\n\t x🦊猫é\u2028\ufffd".encode()  # whole and half characters, white space, a real U+FFFD


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return make_tokenizer(request.param)


def streamed(tokenizer, ids):
    """Pieces, one for each id ("" where nothing came), and the rest."""
    pieces = [""]

    def say(text):
        pieces[-1] += text

    stream = Stream(tokenizer, say)
    for id in ids:
        stream(id)
        pieces.append("")
    stream.finish()
    return pieces


def joined(tokenizer, ids):
    """The whole answer, as the user sees it come and as it is returned in the end."""
    text = "".join(streamed(tokenizer, ids))
    assert text == text_of(tokenizer, ids) == text.strip(), ids
    return text


def byte_id(tokenizer, byte):
    """Of the token for a single byte."""
    if (id := tokenizer.token_to_id(f"<0x{byte:02X}>")) is not None:
        return id
    table = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's: the others are moved behind 255
    code = byte if byte in table else 256 + [b for b in range(256) if b not in table].index(byte)
    return tokenizer.token_to_id(chr(code))


def random_ids(tokenizer, seed):
    """Words, special tokens, and many single bytes: of whole characters, of halves, of nothing."""
    draw = random.Random(seed)
    ids: list[int] = []
    while len(ids) < draw.choice((1, 5, 60)):
        kind = draw.random()
        if kind < 0.3:
            ids.append(draw.randrange(tokenizer.get_vocab_size() + 5))  # unknown ones, too
        elif kind < 0.6:
            ids += [byte_id(tokenizer, draw.choice(BYTES)) for _ in range(draw.randint(1, 4))]
        elif kind < 0.9:
            start = draw.randrange(len(BYTES))
            ids += [byte_id(tokenizer, byte) for byte in BYTES[start : start + draw.randint(1, 5)]]
        else:
            ids.append(tokenizer.token_to_id(draw.choice(("<s>", "</s>", "<image>", "<unk>"))))
    return ids


def test_pieces_are_the_text(tokenizer):
    """An exception on half a character; bytes given out before a later one spoils them; blanks that the text lacks."""
    for seed in range(300):
        joined(tokenizer, random_ids(tokenizer, seed))
    for text in ("A red circle", "line\nbreaks\n\nand 🦊 猫!", "  spaces  here "):  # and something is said at all
        assert joined(tokenizer, tokenizer.encode(text, add_special_tokens=False).ids) == text.strip()


def test_words_come_at_once(tokenizer):
    """An answer that comes in one piece at the end; half a character given out as U+FFFD and the other half, too."""
    words = tokenizer.encode("two red circles", add_special_tokens=False).ids
    assert streamed(tokenizer, words)[-1] == "" and len([x for x in streamed(tokenizer, words) if x]) > 2
    fox = [byte_id(tokenizer, byte) for byte in "🦊".encode()]
    pieces = streamed(tokenizer, [*words, *fox, *words])
    assert pieces[len(words) : len(words) + 3] == ["", "", ""] and "\ufffd" not in "".join(pieces)


def test_bad_bytes_of_llama():
    """The smallest case: a line break, half a character, a word, each of LLaMA's single bytes a token."""
    tokenizer = make_tokenizer("llama-prepend")
    newline, half = (byte_id(tokenizer, byte) for byte in (0x0A, 0xE4))
    word = tokenizer.encode("red", add_special_tokens=False).ids
    assert joined(tokenizer, [*word, newline, half, *word]) == "red\ufffd\ufffd red"
    assert joined(tokenizer, [*word, newline]) == "red" and joined(tokenizer, [*word, half]) == "red\ufffd"


def test_special_tokens_within_a_character(tokenizer):
    """A special token taken for the end of a run of bytes, which is decoded without it."""
    fox = [byte_id(tokenizer, byte) for byte in "🦊".encode()]
    assert joined(tokenizer, [*fox[:2], tokenizer.token_to_id("</s>"), *fox[2:]]) == "🦊"
    for nothing in (tokenizer.token_to_id("</s>"), tokenizer.get_vocab_size() + 3):
        joined(tokenizer, [byte_id(tokenizer, ord("x")), nothing, byte_id(tokenizer, 0xE4)])


def test_a_decoder_that_joins_words():
    """WordPiece: what a token adds depends on the one before."""
    tokenizer = Tokenizer(models.WordPiece({"a": 0, "##b": 1, ".": 2, "[UNK]": 3}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    assert joined(tokenizer, [0, 1, 0, 2, 0]) == "ab a. a"
