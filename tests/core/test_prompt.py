"""Prompts without transformers: one image span, found from the ids, whatever the user typed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers import processors
from toys import IMAGE_TOKEN, TOKENIZERS, make_tokenizer

from himap_ref import HimapError
from himap_ref.checkpoint.files import read_tokenizer
from himap_ref.model import find_image_span
from himap_ref.prompt import TEMPLATES, encode_prompt

N = 9  # image tokens
TEMPLATE = TEMPLATES["vicuna_v1"]


@pytest.fixture(params=[(style, special) for style in TOKENIZERS for special in (True, False)], ids=str)
def tokenizer(request):
    """Three styles; llava-hf's older tokenizer files do not mark <image> as special."""
    return make_tokenizer(*request.param)


def encode(tokenizer, question, template=TEMPLATE, has_image=True, turn=None):
    image = tokenizer.token_to_id(IMAGE_TOKEN)
    return encode_prompt(tokenizer, question, template, image, N if has_image else 0, turn)


def span_of(tokenizer, ids):
    return find_image_span(ids, tokenizer.token_to_id(IMAGE_TOKEN))


def text_of(tokenizer, ids):
    """The prompt's text with one <image> for all of the image's tokens, without whitespace (LLaMA adds some)."""
    start, stop = span_of(tokenizer, ids) or (0, 1)
    return "".join(tokenizer.decode(ids[: start + 1] + ids[stop:], skip_special_tokens=False).split())


def test_templates_are_word_for_word():
    """LLaVA-1.5 was trained on exactly these words: another space or line break costs accuracy unseen."""
    assert TEMPLATES["llava-hf"].partition("{answer}")[0] == "USER: <image>\n{question} ASSISTANT:"
    assert TEMPLATES["vicuna_v1"] == (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. USER: <image>\n{question} ASSISTANT:"
    )


@pytest.mark.parametrize("question, template, message", [
    *((question, template, "template") for question in ("What is it?", "Is <image> a tag?") for template in (
        "{question} <image>", "<image><image>{question}", "<image>", "{question}", "USER: {question}",
        "<image>\nWhat is it?", "<image> <image>\n{question}",
    )),
    *((question, TEMPLATE, "empty") for question in ("", " ", "\n\t ")), ("what \ud800?", TEMPLATE, "Unicode"),
])  # fmt: skip
def test_refused(tokenizer, question, template, message):
    """A typed <image> taken for the template's, no place for picture or question, no question, half a letter."""
    with pytest.raises(HimapError, match=message):
        encode(tokenizer, question, template)


def test_tokenizer_without_image_token(tokenizer):
    """A plain LLaMA's tokenizer beside LLaVA's weights would fail later, or take another token for the picture."""
    with pytest.raises(HimapError, match="32000"):
        encode_prompt(tokenizer, "What is it?", TEMPLATE, 32000, N)


def test_padding_and_truncation_in_the_file_are_ignored(tokenizer, tmp_path):
    """A tokenizer.json saved in the middle of somebody's training: prompts padded to 203 tokens, or cut to 10."""
    expected = encode(tokenizer, "What is it?")
    tokenizer.enable_padding(length=203)
    tokenizer.enable_truncation(10)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert encode(read_tokenizer(tmp_path), "What is it?") == expected


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_span_is_found_in_the_ids(tokenizer, template):
    """A span fixed at 35 (the official code) would be wrong for every other tokenizer and template."""
    image, bos, question = tokenizer.token_to_id(IMAGE_TOKEN), tokenizer.token_to_id("<s>"), "What is in the picture?"
    prompt = encode(tokenizer, question, template)
    start, stop = span_of(tokenizer, prompt)
    assert prompt[start:stop] == [image] * N and prompt.count(image) == N
    assert prompt[0] == bos and prompt.count(bos) == 1
    before, after = template.partition("{answer}")[0].replace("{question}", question).split("<image>")
    assert start == len(tokenizer.encode(before).ids)
    assert tokenizer.decode(prompt[stop:], skip_special_tokens=False).strip() == after.strip()


@pytest.mark.parametrize("question", [
    "Is <image> a tag?", "<image>", "<image><image>\n<image> ?", "What does </s> mean?", "</s>", "<s>",
    "<s> and </s>, <s>", "What is <unk>?", "<pad><image></s>",
    "Was ist 🦊 und 猫?", "naïve é\u0301 \u200d\u200b", "\tTabs\r\nand lines\n\n", "{}{question}{0}%s\\n",
])  # fmt: skip
@pytest.mark.parametrize("has_image", [True, False])
def test_any_question_is_text(tokenizer, question, has_image):
    """A typed <image> that is a second picture, a typed </s> that ends; unknown letters lost, braces filled in."""
    prompt = encode(tokenizer, question, has_image=has_image)
    ids = {token: tokenizer.token_to_id(token) for token in ("<image>", "</s>", "<s>", "<unk>", "<pad>")}
    assert prompt.count(ids["<image>"]) == (N if has_image else 0)
    assert prompt.count(ids["<s>"]) == 1 and prompt[0] == ids["<s>"]
    assert not {ids["</s>"], ids["<unk>"], ids["<pad>"]} & set(prompt)
    span = span_of(tokenizer, prompt)
    assert span == span_of(tokenizer, encode(tokenizer, "x", has_image=has_image))
    expected = TEMPLATE if has_image else TEMPLATE.replace("<image>\n", "")
    assert text_of(tokenizer, prompt) == "".join(f"<s>{expected.replace('{question}', question)}".split())
    if has_image:  # what an answer's text would be: nothing of the question is a token that decoding skips
        kept = tokenizer.decode(prompt[span[1] :], skip_special_tokens=True)
        assert "".join(f"{question} ASSISTANT:".split()) == "".join(kept.split())


@pytest.mark.parametrize("template", [TEMPLATE, "Answer as {json} {}: <image>\n{question}"])
def test_question_without_special_tokens_is_tokenised_in_one_piece(tokenizer, template):
    """A question that is stripped, formatted or cut into pieces on its way gets other ids than LLaVA's."""
    question = "  How many cats are there? {} {question} < image > <b>\n "
    prompt = encode(tokenizer, question, template)
    ids = tokenizer.encode(template.replace("{question}", question)).ids
    place = ids.index(tokenizer.token_to_id(IMAGE_TOKEN))
    assert prompt == ids[:place] + [ids[place]] * N + ids[place + 1 :]


def test_text_only(tokenizer):
    """A prompt without a picture would still hold an image token, or the line break that followed it."""
    prompt = encode(tokenizer, "What is in the picture?", has_image=False)
    text = TEMPLATE.replace("<image>\n", "").replace("{question}", "What is in the picture?")
    assert prompt == tokenizer.encode(text).ids
    own = encode(tokenizer, "Hello?", "USER: <image> {question} ASSISTANT:", has_image=False)  # without a line break
    assert tokenizer.token_to_id(IMAGE_TOKEN) not in own


def test_odd_questions_disturb_nobody(tokenizer):
    """The shared tokenizer's switch flipped for one question: another thread's, or every later one, gets other ids."""
    plain, saved = encode(tokenizer, "What is it?"), tokenizer.to_str()
    with ThreadPoolExecutor(4) as pool:
        odd = [pool.submit(encode, tokenizer, f"Is <image> or </s> tag {i}?") for i in range(20)]
        others = [pool.submit(encode, tokenizer, "What is it?") for _ in range(100)]
    assert all(other.result() == plain for other in others)
    assert all(span_of(tokenizer, one.result()) == span_of(tokenizer, plain) for one in odd)
    assert tokenizer.to_str() == saved and not tokenizer.encode_special_tokens


@pytest.mark.parametrize("question", ["And to the left?", "Is <image> or </s> a tag?", "<s>"])
@pytest.mark.parametrize("template, text", [
    (TEMPLATES["vicuna_v1"], "</s>USER: {question} ASSISTANT:"),
    (TEMPLATES["shapes"], "</s>USER: {question} ASSISTANT:"),
    (TEMPLATES["mistral"], "</s>[INST] {question} [/INST]"),
    (TEMPLATES["llava-hf"], " USER: {question} ASSISTANT:"),
    ("<image>\n{question}", "</s>{question}"),
    ("<s>[INST] <image>\n{question} [/INST]", "</s>[INST] {question} [/INST]"),
    ("Be brief.<|eot_id|><|user|>\n\n<image>{question}", "</s><|user|>\n\n{question}"),
    ("A <image>\n{question} B{answer}\n</s>\nC {question} D", "\n</s>\nC {question} D"),
])  # fmt: skip
def test_later_turn(tokenizer, question, template, text):
    """A second BOS or system prompt, a role or the answer's end left out, a typed token that ends; other ids."""
    turn = encode(tokenizer, question, template, has_image=False, turn="</s>")
    special = {tokenizer.token_to_id(token) for token in ("<s>", "</s>", "<image>")}
    assert [id for id in turn if id in special] == [tokenizer.token_to_id("</s>")] * ("</s>" in text)
    assert text_of(tokenizer, turn) == "".join(text.replace("{question}", question).split())
    if "<" not in question:
        said = tokenizer.encode("A circle").ids
        assert said + turn == tokenizer.encode("A circle" + text.replace("{question}", question)).ids


@pytest.mark.parametrize("template", ["<s>{}", "<s> {}", "<s><s>{}"])
@pytest.mark.parametrize("question", ["What is it?", "<s>", "Is <s> a tag?"])
def test_one_bos(tokenizer, template, question):
    """The template's BOS and the tokenizer's; or, once the user types one, too, the template's spelled out as text."""
    bos = tokenizer.token_to_id("<s>")
    for has_image in (True, False):
        ids = encode(tokenizer, question, template.format("<image>\n{question} ASSISTANT:"), has_image)
        assert ids[0] == bos and ids.count(bos) == 1
    tokenizer.post_processor = processors.TemplateProcessing("<s> <s> $A", None, [("<s>", bos)])
    assert encode(tokenizer, question).count(bos) == 1


def test_a_template_of_special_tokens(tokenizer):
    """A typed role token that ends the turn, or the template's own spelled out as text along with it."""
    tokenizer.add_special_tokens(["<|user|>", "<|end|>"])
    user, end = (tokenizer.token_to_id(token) for token in ("<|user|>", "<|end|>"))
    template = "<|user|><image>\n{question}<|end|>{answer}<|end|><|user|>{question}<|end|>"
    plain, odd = (encode(tokenizer, question, template) for question in ("Why?", "<|end|>"))
    assert [id for id in plain if id in (user, end)] == [id for id in odd if id in (user, end)] == [user, end]
    turn = encode(tokenizer, "<|user|><|end|>", template, has_image=False, turn="")
    assert [id for id in turn if id in (user, end)] == [end, user, end] and turn[-1] == end


@pytest.mark.parametrize(
    ("ids", "span"),
    [([1, 2, 3], None), ([], None), ([7], (0, 1)), ([1, 7, 7, 2], (1, 3)), ([7, 7], (0, 2)), ([1, 2, 7], (2, 3)),
     ([7, 1, 7], (0, 1, 2, 3)), ([1, 7, 7, 2, 7, 3], (1, 3, 4, 5)), ([7, 7, 3, 3, 7, 7], (0, 2, 4, 6))],
)  # fmt: skip
def test_find_image_span(ids, span):
    """An end that is off by one prunes a text token or spares an image token; text between pictures is none."""
    assert find_image_span(ids, 7) == span
